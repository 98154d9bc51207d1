"""The linked explorer: people, tokens, cortex and T1 side by side, each following the others.

`Explorer` holds what is selected and computes what is to be seen; `panels` shows it as widgets.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cached_property, lru_cache
from html import escape
from pathlib import Path

import numpy as np
import xarray as xr

from bhx.data.files import reading
from bhx.errors import InputError, check_choice, listed
from bhx.latents.maps import SHARE, maps_in
from bhx.latents.pool import pool, project, subject_mask
from bhx.latents.similarity import contrast, neighbours
from bhx.modalities.bold import BOLD
from bhx.modalities.t1 import CUBE_DIMS
from bhx.modalities.table import by_variable, modality
from bhx.schema import ATTENTION, check, subject_coords, who_has
from bhx.show.colors import CLEAR
from bhx.show.offline import IN_A_PAGE, offline_page
from bhx.show.panels import ALL_TOKENS, GROUPS, Panels
from bhx.show.people import binned
from bhx.show.surface import plot_surface

PCA = "PCA"
STATE = 1  # the version of what `Explorer.state` returns
KEPT = ("token", "place", "surface_of", "cubes_of")
LABELS = ("age", "sex", "diagnosis", "site", "tr", "mean_fd")  # what cards say of people


def explore(
    latents: xr.Dataset,
    cohort: xr.Dataset | None = None,
    *,
    controls: xr.Dataset | None = None,
    points: xr.DataArray | Mapping[str, xr.DataArray] | None = None,
    maps: Mapping[str, xr.DataArray] | None = None,
) -> Explorer:
    """Walk around in a latent space: pick people, tokens, parcels; everything else follows.

    Parameters
    ----------
    latents : Dataset of embed(..., keep=("attention",)), lazy or not
    cohort : the same subjects' scans: then a single person's own T1, series and connectome are
        shown
    controls : of `bhx.map_controls`: tokens whose map fails them are drawn faded, and the heading
        says how well a token's map repeats
    points : another map of the people than `bhx.project`'s, (subject, component), such as one of
        UMAP, or several, name -> map: the box "people by" goes from one to the other and to the
        PCA; `attrs["long_name"]` names their axes
    maps : what the cortex may show instead of attention, name -> (token, roi), or the same with
        subject first: parts of `integrated_gradients`, what `lesion` of each parcel changes, ..;
        `attrs["units"]` names their unit

    Returns
    -------
    Explorer: shows itself in JupyterLab, and answers `select_subjects`, `select_token`,
    `select_parcel`, `select_map`, `select_points`, `compare`, `filter`, `undo`, `picked`,
    `differences`, `nearest`, `save`, `restore` and `code` without any browser
    """
    return Explorer(latents, cohort, controls, points, maps)


class Explorer:
    """What is selected, and what follows from it.

    Attributes
    ----------
    chosen : mask over subjects; groups : two masks, or None; token : a token, or None for all;
    parcels : mask over parcels; place : their name, or None; places : names of networks and
    parcels; on_roi, on_cubes : names of maps on parcels, on cubes; others : those that are not
    attention; surface_of, cubes_of :
    those of them that are seen; maps, has : each person's maps, and who has them; labels : what
    cards show; layouts : maps of the people by name, points_of : the one that is seen; bars : of
    their histograms, names and each person's; passes : mask over tokens,
    whose map passes its controls; drawn_from : how many people there were
    """

    def __init__(self, latents, cohort=None, controls=None, points=None, maps=None):
        self.latents = check(latents, "latents")
        self.on_roi, self.on_cubes = maps_in(latents, ("roi",)), maps_in(latents, CUBE_DIMS)
        if not self.on_roi:
            fact = "Expected latents with attention to parcels, found none"
            raise InputError(fact, 'Keep it: embed(cohort, model, keep=("attention",))')
        self.surface_of, self.cubes_of = self.on_roi[0], next(iter(self.on_cubes), None)
        self.subjects, self.tokens = latents.subject.values, latents.token.values
        self.roi, self.networks = latents.roi.values, latents.network.values
        self.places = [*dict.fromkeys(self.networks.tolist()), *self.roi.tolist()]
        self.modalities = latents.modality.values.tolist()
        self.pooled = pool(latents).compute()
        if not isinstance(points, Mapping | None):
            points = {getattr(points, "attrs", {}).get("long_name", "points"): points}
        self.layouts = {PCA: project(self.pooled)}
        self.layouts |= {name: self._checked(one) for name, one in (points or {}).items()}
        self.points_of = [*self.layouts][-1]
        self.cohort, self.controls = cohort, controls
        self.passes = np.ones(len(self.tokens), bool)
        if controls is not None:
            known = np.isin(self.tokens, controls.token)
            if not known.all():
                fact = f"Expected controls of tokens {listed(self.tokens)}, found none of "
                raise InputError(fact + listed(self.tokens[~known]), "Make them of this model")
            self.passes = controls.passes.sel(token=self.tokens).values
        if cohort is not None:
            subject_mask(cohort, self.subjects)  # refuses a cohort without one of them
            self.cohort = cohort.sel(subject=self.subjects)
        kinds = [modality(name) for name in self.on_roi + self.on_cubes]
        read = {ATTENTION: latents[ATTENTION]} | {m.name: latents[m.map_name] for m in kinds}
        self.maps = {name: np.nan_to_num(v.values.astype("f4")) for name, v in read.items()}
        self.has = {m.name: who_has(latents, m.variable) for m in kinds}
        self.others = {name: self._aligned(name, values) for name, values in (maps or {}).items()}
        self.maps |= {name: values.values.astype("f4") for name, values in self.others.items()}
        self.has |= dict.fromkeys(self.others, np.ones(len(self.subjects), bool))
        self.on_roi += self.others
        self._mean = lru_cache(8)(self._weighted)
        coords = subject_coords(latents)
        self.labels = {_with_units(coords[name]): coords[name] for name in LABELS if name in coords}
        self.bars = {name: binned(label.values) for name, label in self.labels.items()}
        self.drawn_from = len(self.subjects)
        self.followers: list = []
        self._past: list[dict] = []
        self.reset()

    def _checked(self, points):
        """Another map of the same people, with their labels."""
        dims = getattr(points, "dims", "no dims")
        if dims != ("subject", "component") or points.sizes["component"] < 2:
            fact = f"Expected points (subject, component) of two components, found {dims}"
            raise InputError(fact, "Name the dims so: xr.DataArray(values, {...}, dims)")
        subject_mask(points, self.subjects)  # refuses points without one of them
        points = points.sel(subject=self.subjects).assign_coords(subject_coords(self.pooled))
        if not np.isfinite(points).all():
            who = self.subjects[~np.isfinite(points).all("component").values]
            fact = f"Expected points of finite coordinates, found others of {listed(who)}"
            raise InputError(fact, "Leave these subjects out of the latents, or place them")
        return points

    def _aligned(self, name, values):
        """A map (subject or one for all, token, roi) in the order of the latents."""
        order = {"subject": self.subjects, "token": self.tokens, "roi": self.roi}
        dims = getattr(values, "dims", ())
        if not {"token", "roi"} <= {*dims} <= {*order} or name in [*self.maps, *self.on_cubes]:
            fact = f"Expected a map '{name}' of (token, roi) beside {listed(self.maps)}, found "
            raise InputError(
                f"{fact}{dims}", "Give it a name of its own, and select or average other dims"
            )
        for dim in dims:
            if gone := sorted({*order[dim]} - {*values[dim].values}):
                fact = f"Expected a map '{name}' of every {dim}, found none of {listed(gone)}"
                raise InputError(fact, "Make it of the same latents")
        values = values.sel({dim: order[dim] for dim in dims})
        if not np.isfinite(values).all():
            fact = f"Expected a map '{name}' of finite numbers, found others"
            raise InputError(fact, "Fill them in: maps.fillna(0), if they are 0")
        values = values if "subject" in dims else values.expand_dims("subject")
        return values.transpose(*order)

    def reset(self):
        """Everyone, all tokens, no parcel."""
        self.chosen = np.ones(len(self.subjects), bool)
        self.groups, self.token, self.place = None, None, None
        self.parcels = np.zeros(len(self.roi), bool)
        self._announce()

    def select_subjects(self, subjects=None):
        """Average over these subjects (ids, a mask, or None for all); ends a comparison."""
        self.chosen, self.groups = subject_mask(self.latents, subjects), None
        self._announce()

    def select_token(self, token=None):
        """Show one token's maps, or those of all tokens together."""
        if token is not None:
            check_choice("the token", token, self.tokens)
        self.token = None if token is None else int(token)
        self._announce()

    def select_parcel(self, name: str | None = None):
        """Follow a parcel or a whole network: the token that prefers it most."""
        if name is not None:
            check_choice("the parcel or network", name, self.places)
        self.parcels, self.place = (self.roi == name) | (self.networks == name), name
        if self.parcels.any():
            self.token = int(self.tokens[np.argmax(self.preference())])
        self._announce()

    def select_map(self, name: str):
        """Show this modality's attention on the cortex or, where its tokens are cubes, the T1."""
        check_choice("map", name, self.on_roi + self.on_cubes)
        if name in self.on_roi:
            self.surface_of = name
        else:
            self.cubes_of = name
        self._announce()

    def select_points(self, name: str):
        """Place people by this one of the maps of them."""
        check_choice("the map of people", name, self.layouts)
        self.points_of = name
        self._announce()

    def compare(self, first, second):
        """Show the maps of one group minus those of another (ids or masks)."""
        first, second = subject_mask(self.latents, first), subject_mask(self.latents, second)
        if (first & second).any():
            twice = listed(self.subjects[first & second])
            fact = f"Expected groups without common subjects, found {twice} in both"
            raise InputError(fact, "Remove them from one")
        self.groups, self.chosen = (first, second), first | second
        self._announce()

    def filter(self, label: str, bar: str):
        """Keep of the selected, or of both groups, those in one bar of a label's histogram."""
        check_choice("the label", label, self.bars)
        names, at = self.bars[label]
        check_choice("the bar", bar, names)
        kept = [who & (at == names.index(bar)) for who in self._selected()]
        if not all(who.any() for who in kept):
            fact = f"Expected selected people of {label} {bar}, found none in one of the groups"
            raise InputError(fact, "Take another bar, or undo")
        self.compare(*kept) if self.groups else self.select_subjects(*kept)

    def undo(self):
        """What was selected before; at the beginning nothing happens."""
        if len(self._past) > 1:
            self._past.pop()
            self.restore(self._past[-1])

    def state(self) -> dict:
        """What is selected, in words and numbers that JSON holds."""
        everyone = self.groups is None and self.chosen.all()
        people = None if everyone else [self.subjects[w].tolist() for w in self._selected()]
        kept = {name: getattr(self, name) for name in KEPT}
        return {"explorer": STATE, "subjects": people, **kept}

    def restore(self, state):
        """Select what a state says: one of `state`, or a JSON file of it that `save` wrote."""
        if not isinstance(state, dict):
            with reading(state, "a state of the explorer"):
                state = json.loads(Path(state).read_text(encoding="utf-8"))
        if state.get("explorer") != STATE or not {*KEPT, "subjects"} <= {*state}:
            fact = f"Expected a state of the explorer, version {STATE}, found {listed(state)}"
            raise InputError(fact, "Save one with this version: explorer.save('state.json')")
        people = [subject_mask(self.latents, who) for who in state["subjects"] or [None]]
        options = (self.tokens, self.places, self.on_roi, self.on_cubes)
        for name, known in zip(KEPT, options, strict=True):
            check_choice(f"the {name}", state[name], [None, *known])
        self.token, self.place, self.surface_of, self.cubes_of = (state[name] for name in KEPT)
        self.parcels = (self.roi == self.place) | (self.networks == self.place)
        self.groups = tuple(people) if len(people) == 2 else None
        self.chosen = np.any(people, 0)
        self._announce()

    def picked(self) -> xr.DataArray:
        """The selection as a label (subject): "A" and "B" of two groups, else "picked"; the others
        are "". `latents.assign_coords(picked=explorer.picked())` takes it on, and
        `explorer.picked().to_series().to_csv(path)` writes it."""
        label = np.full(len(self.subjects), "", object)
        for name, who in zip(GROUPS if self.groups else ["picked"], self._selected(), strict=False):
            label[who] = name
        return xr.DataArray(label, {"subject": self.subjects}, ["subject"], "picked")

    # what is seen ---------------------------------------------------------------------------

    @property
    def points(self) -> xr.DataArray:
        """The map of the people that is seen (subject, component)."""
        return self.layouts[self.points_of]

    def surface_map(self) -> np.ndarray:
        """Attention to each parcel (roi): of the token and people selected, or of the groups'
        difference; zero where nobody has the modality."""
        return self._of_token(self.surface_of)

    def cube_map(self) -> xr.DataArray | None:
        """The same over cubes (cx, cy, cz)."""
        if not self.on_cubes:
            return None
        return xr.DataArray(self._of_token(self.cubes_of), dims=CUBE_DIMS)

    def counts(self, label: str) -> np.ndarray:
        """How many of the selected, or of each group, are in each bar of a label (group, bar)."""
        names, at = self.bars[label]
        return np.stack([np.bincount(at[who], minlength=len(names)) for who in self._selected()])

    def shares(self) -> np.ndarray:
        """Each token's share of attention (token, modality)."""
        return self._average(ATTENTION)

    def preference(self) -> np.ndarray:
        """Each token's attention to the selected parcels over its mean attention (token)."""
        of = self.on_roi[0] if self.surface_of in self.others else self.surface_of
        maps = self._average(of, (self.chosen,))
        return maps[:, self.parcels].mean(1) / np.maximum(maps.mean(1), 1e-12)

    def own_volume(self) -> xr.DataArray | None:
        """A volume (x, y, z) of the one person selected, where the cohort has one."""
        if self.cohort is None or self.chosen.sum() != 1:
            return None
        one = self.cohort.isel(subject=np.flatnonzero(self.chosen))
        for name, kind in by_variable(one.data_vars).items():
            if kind.dims == ("x", "y", "z") and who_has(one, name).all():
                return one[name].isel(subject=0)
        return None

    def own_series(self) -> xr.DataArray | None:
        """The BOLD (roi, time) of the one person selected, each parcel z-scored, where the cohort
        has it."""
        if self.cohort is None or self.chosen.sum() != 1 or BOLD.variable not in self.cohort:
            return None
        one = self.cohort.isel(subject=np.flatnonzero(self.chosen)[0])
        if not bool(one[BOLD.has]):
            return None
        series = one[BOLD.variable].dropna("time", how="all").compute()
        return (series - series.mean("time")) / series.std("time").clip(1e-9)

    def nearest(self, k: int = 5) -> list[str]:
        """The people whose mean hub tokens are most like those of the one person selected."""
        if self.chosen.sum() != 1 or len(self.subjects) < 2:
            return []
        k = min(k, len(self.subjects) - 1)
        (one,) = self.subjects[self.chosen]
        return list(neighbours(self.pooled, one, k=k).neighbour.values)

    def differences(self, n_permutations: int = 1000) -> xr.Dataset:
        """Which hub tokens differ between groups A and B: `bhx.contrast` of them.

        Groups that were drawn around people in this space differ in it by the way they were made:
        then p says nothing of whatever else they differ in.
        """
        if not self.groups:
            fact = "Expected two groups, found one selection"
            raise InputError(fact, "Give both first: explorer.compare(first, second)")
        both = self.latents.assign_coords(picked=self.picked())
        return contrast(both, "picked", n_permutations=n_permutations)

    def card(self) -> str:
        """Who is selected, or is in each of the groups, as an HTML table; names are escaped."""
        rows = [("", "subjects", *self.labels)]
        for name, who in zip(GROUPS if self.groups else " ", self._selected(), strict=False):
            one = self.subjects[who][0] if who.sum() == 1 else f"{who.sum()} of {len(who)}"
            rows.append((name, one, *(_summary(v.values[who]) for v in self.labels.values())))
        cell, table = '<td style="padding-right: 1em">', '<table style="border-collapse: collapse">'
        if near := self.nearest():
            rows = [(*rows[0], "nearest in hub tokens"), (*rows[1], listed(near))]
        for name, *row in rows:
            table += f'<tr style="border-left: 6px solid {GROUPS.get(name, CLEAR)}">'
            table += "".join(f"{cell}{escape(str(one))}</td>" for one in (name, *row)) + "</tr>"
        return table + "</table>"

    def heading(self) -> str:
        """One line on what the maps show."""
        token = ALL_TOKENS if self.token is None else f"token {self.token}"
        if not (self.chosen & self.has[self.surface_of]).any():
            return f"{token}: nobody selected has {self.surface_of}"
        return f"{self.what()} of {token}{self._badge()}" + (
            ", group A minus group B" if self.groups else ""
        )

    def what(self, of: str | None = None) -> str:
        """What a map, or the cortex, shows: attention, or the name of another map."""
        return of if (of := of or self.surface_of) in self.others else "attention"

    def units(self, of: str | None = None) -> str:
        """Of what a map, or the cortex, shows."""
        other = self.others.get(of or self.surface_of)
        return SHARE if other is None else other.attrs.get("units", "")

    def faded(self) -> bool:
        """Whether the map that is seen is one token's attention, and fails its controls."""
        if self.token is None or self.surface_of in self.others:
            return False
        return not self.passes[self.tokens == self.token][0]

    def _badge(self):
        """How well the selected token's map repeats, where it is known."""
        if self.controls is None or self.token is None or self.surface_of in self.others:
            return ""
        again = self.controls.agreement.sel(control="retest", token=self.token).item()
        return f" (repeats {again:.2f}, {'fails' if self.faded() else 'passes'} its controls)"

    def code(self) -> str:
        """The lines that make the same map without the explorer."""
        names = ["first", "second"] if self.groups else ["subjects"]
        lines = [
            f"{name} = {self.subjects[group].tolist()!r}"
            for name, group in zip(names, self._selected(), strict=True)
        ]
        calls = [self._call(name) for name in names]
        draw = "bhx.plot_surface(values, static=True)"
        return "\n".join(["import bhx", "", *lines, f"values = {' - '.join(calls)}", draw])

    def _call(self, names):
        """Code of the map of these subjects."""
        if self.surface_of not in self.others:
            of = "" if self.surface_of == self.on_roi[0] else f", of={self.surface_of!r}"
            return f"bhx.region_map(latents, token={self.token}, subjects={names}{of})"
        call = f"maps[{self.surface_of!r}]"
        call += '.mean("token")' if self.token is None else f".sel(token={self.token})"
        each = len(self.maps[self.surface_of]) > 1
        return call + (f'.sel(subject={names}).mean("subject")' if each else "")

    def figure(self):
        """The static figure that `code` draws."""
        values = xr.DataArray(self.surface_map(), {"roi": self.roi}, ["roi"])
        values.attrs["units"] = self.units()
        return plot_surface(values, static=True, title=self.heading())

    def save(self, path="explorer.html") -> Path:
        """Write one HTML page of people, labels, cortex, T1 and bars that opens without Python or a
        network; or, to a path that ends in .json, what is selected, for `restore`. A page of very
        many people has a part of them, drawn at random, and says so."""
        is_state = Path(path).suffix.lower() == ".json"
        text = json.dumps(self.state(), indent=1) if is_state else offline_page(self._for_page())
        Path(path).write_text(text, encoding="utf-8")
        return Path(path)

    def _for_page(self):
        """This explorer, or one of as many people, drawn at random, as a page holds."""
        most = IN_A_PAGE // (len(self.roi) + len(self.tokens) * len(self.modalities))
        if len(self.subjects) <= most:
            return self
        who = np.sort(np.random.default_rng(0).choice(len(self.subjects), most, replace=False))
        maps = {
            name: one[0].drop_vars("subject", errors="ignore") if len(one) == 1 else one[who]
            for name, one in self.others.items()
        }
        some = self.latents.isel(subject=who)
        layouts = {name: points.isel(subject=who) for name, points in self.layouts.items()}
        part = Explorer(some, None, self.controls, layouts, maps)
        part.restore(self.state() | {"subjects": None})
        part.panels.controls["color"].value = self.panels.controls["color"].value
        part.drawn_from, part.points_of = len(self.subjects), self.points_of
        return part

    def _ipython_display_(self):
        """The widgets, and beside them the picture that stored notebooks show in their place."""
        from IPython.core.pylabtools import print_figure
        from IPython.display import display

        picture = print_figure(self.figure(), base64=True, dpi=70)
        display(self.panels.box._repr_mimebundle_() | {"image/png": picture}, raw=True)

    @cached_property
    def panels(self) -> Panels:
        """The widgets, made once."""
        return Panels(self)

    # how ------------------------------------------------------------------------------------

    def _selected(self):
        return self.groups or (self.chosen,)

    def _announce(self):
        now = self.state()
        self._past += [] if self._past[-1:] == [now] else [now]
        for follow in self.followers:
            follow()

    def _of_token(self, of):
        maps = self._average(of)
        return maps.mean(0) if self.token is None else maps[self.tokens == self.token][0]

    def _average(self, of, groups=None):
        """Maps (token, ...) averaged over the selected who have the modality, or the difference
        between the groups' averages."""
        weights = np.zeros(len(self.subjects), np.float32)
        for sign, group in zip((1, -1), groups or self._selected(), strict=False):
            counted = group & self.has.get(of, True)
            weights += sign * counted / max(counted.sum(), 1)
        return self._mean(of, weights.tobytes())

    def _weighted(self, of, weights):
        weights, maps = np.frombuffer(weights, np.float32), self.maps[of]
        return np.tensordot(
            weights if len(maps) == len(weights) else weights.sum(keepdims=True), maps, 1
        )


def _with_units(coord):
    units = coord.attrs.get("units")
    return f"{coord.name} [{units}]" if units else coord.name


def _summary(values):
    """One value, the range of numbers, or names."""
    plain = [f"{v:.4g}" if isinstance(v, float) else str(v) for v in values.tolist()]
    names = np.unique(plain)
    if len(names) > 1 and values.dtype.kind in "fi":
        return f"{np.nanmin(values):.3g} to {np.nanmax(values):.3g}"
    return listed(names)
