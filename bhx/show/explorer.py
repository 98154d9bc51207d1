"""The linked explorer: people, tokens, cortex and T1 side by side, each following the others.

`Explorer` holds what is selected and computes what is to be seen; `panels` shows it as widgets.
"""

from __future__ import annotations

from functools import cached_property, lru_cache
from html import escape
from pathlib import Path

import numpy as np
import xarray as xr

from bhx.errors import InputError, check_choice, listed
from bhx.latents.maps import SHARE, maps_in
from bhx.latents.pool import project, subject_mask
from bhx.modalities.t1 import CUBE_DIMS
from bhx.modalities.table import by_variable, modality
from bhx.schema import ATTENTION, check, subject_coords, who_has
from bhx.show.colors import CLEAR
from bhx.show.offline import offline_page
from bhx.show.panels import ALL_TOKENS, GROUPS, Panels
from bhx.show.surface import plot_surface

LABELS = ("age", "sex", "diagnosis", "site", "tr", "mean_fd")  # what cards say of people


def explore(
    latents: xr.Dataset, cohort: xr.Dataset | None = None, *, controls: xr.Dataset | None = None
) -> Explorer:
    """Walk around in a latent space: pick people, tokens, parcels; everything else follows.

    Parameters
    ----------
    latents : Dataset of embed(..., keep=("attention",)), lazy or not
    cohort : the same subjects' scans: then a single person's own T1 is shown
    controls : of `bhx.map_controls`: tokens whose map fails them are drawn faded, and the heading
        says how well a token's map repeats

    Returns
    -------
    Explorer: shows itself in JupyterLab, and answers `select_subjects`, `select_token`,
    `select_parcel`, `select_map`, `compare` and `code` without any browser
    """
    return Explorer(latents, cohort, controls)


class Explorer:
    """What is selected, and what follows from it.

    Attributes
    ----------
    chosen : mask over subjects; groups : two masks, or None; token : a token, or None for all;
    parcels : mask over parcels; place : their name, or None; places : names of networks and
    parcels; on_roi, on_cubes : modalities with a map on parcels, on cubes; surface_of, cubes_of :
    those of them that are seen; maps, has : each person's maps, and who has them; labels : what
    cards show; passes : mask over tokens, whose map passes its controls
    """

    def __init__(self, latents: xr.Dataset, cohort=None, controls=None):
        self.latents = check(latents, "latents")
        self.on_roi, self.on_cubes = maps_in(latents, ("roi",)), maps_in(latents, CUBE_DIMS)
        if not self.on_roi:
            fact = "Expected latents with attention to parcels, found none"
            raise InputError(fact, 'Keep it: embed(cohort, model, keep=("attention",))')
        self.surface_of, self.cubes_of = self.on_roi[0], next(iter(self.on_cubes), None)
        self.subjects, self.tokens = latents.subject.values, latents.token.values
        self.roi, self.networks = latents.roi.values, latents.network.values
        self.places = [*dict.fromkeys(self.networks.tolist()), *self.roi.tolist()]
        self.modalities, self.points = latents.modality.values.tolist(), project(latents)
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
        maps = {ATTENTION: latents[ATTENTION]} | {m.name: latents[m.map_name] for m in kinds}
        self.maps = {name: np.nan_to_num(v.values.astype("f4")) for name, v in maps.items()}
        self.has = {m.name: who_has(latents, m.variable) for m in kinds}
        self._mean = lru_cache(8)(self._weighted)
        coords = subject_coords(latents)
        self.labels = {_with_units(coords[name]): coords[name] for name in LABELS if name in coords}
        self.followers = []
        self.reset()

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

    def compare(self, first, second):
        """Show the maps of one group minus those of another (ids or masks)."""
        first, second = subject_mask(self.latents, first), subject_mask(self.latents, second)
        if (first & second).any():
            twice = listed(self.subjects[first & second])
            fact = f"Expected groups without common subjects, found {twice} in both"
            raise InputError(fact, "Remove them from one")
        self.groups, self.chosen = (first, second), first | second
        self._announce()

    # what is seen ---------------------------------------------------------------------------

    def surface_map(self) -> np.ndarray:
        """Attention to each parcel (roi): of the token and people selected, or of the groups'
        difference; zero where nobody has the modality."""
        return self._of_token(self.surface_of)

    def cube_map(self) -> xr.DataArray | None:
        """The same over cubes (cx, cy, cz)."""
        if not self.on_cubes:
            return None
        return xr.DataArray(self._of_token(self.cubes_of), dims=CUBE_DIMS)

    def shares(self) -> np.ndarray:
        """Each token's share of attention (token, modality)."""
        return self._average(ATTENTION)

    def preference(self) -> np.ndarray:
        """Each token's attention to the selected parcels over its mean attention (token)."""
        maps = self._average(self.surface_of, (self.chosen,))
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

    def card(self) -> str:
        """Who is selected, or is in each of the groups, as an HTML table; names are escaped."""
        rows = [("", "subjects", *self.labels)]
        for name, who in zip(GROUPS if self.groups else " ", self._selected(), strict=False):
            one = self.subjects[who][0] if who.sum() == 1 else f"{who.sum()} of {len(who)}"
            rows.append((name, one, *(_summary(v.values[who]) for v in self.labels.values())))
        cell, table = '<td style="padding-right: 1em">', '<table style="border-collapse: collapse">'
        for name, *row in rows:
            table += f'<tr style="border-left: 6px solid {GROUPS.get(name, CLEAR)}">'
            table += "".join(f"{cell}{escape(str(one))}</td>" for one in (name, *row)) + "</tr>"
        return table + "</table>"

    def heading(self) -> str:
        """One line on what the maps show."""
        token = ALL_TOKENS if self.token is None else f"token {self.token}"
        if not (self.chosen & self.has[self.surface_of]).any():
            return f"{token}: nobody selected has {self.surface_of}"
        return f"attention of {token}{self._badge()}" + (
            ", group A minus group B" if self.groups else ""
        )

    def faded(self) -> bool:
        """Whether the map that is seen is one token's, and fails its controls."""
        return self.token is not None and not self.passes[self.tokens == self.token][0]

    def _badge(self):
        """How well the selected token's map repeats, where it is known."""
        if self.controls is None or self.token is None:
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
        of = "" if self.surface_of == self.on_roi[0] else f", of={self.surface_of!r}"
        calls = [f"bhx.region_map(latents, token={self.token}, subjects={n}{of})" for n in names]
        draw = "bhx.plot_surface(values, static=True)"
        return "\n".join(["import bhx", "", *lines, f"values = {' - '.join(calls)}", draw])

    def figure(self):
        """The static figure that `code` draws."""
        values = xr.DataArray(self.surface_map(), {"roi": self.roi}, ["roi"])
        values.attrs["units"] = SHARE
        return plot_surface(values, static=True, title=self.heading())

    def save(self, path="explorer.html") -> Path:
        """Write one HTML page of people, cortex and bars that opens without Python or a network."""
        Path(path).write_text(offline_page(self), encoding="utf-8")
        return Path(path)

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
        return np.tensordot(np.frombuffer(weights, np.float32), self.maps[of], 1)


def _with_units(coord):
    units = coord.attrs.get("units")
    return f"{coord.name} [{units}]" if units else coord.name


def _summary(values):
    """One value, the range of numbers, or names."""
    names = np.unique([str(v) for v in values.tolist()])
    if len(names) > 1 and values.dtype.kind in "fi":
        return f"{np.nanmin(values):.3g} to {np.nanmax(values):.3g}"
    return listed(names)
