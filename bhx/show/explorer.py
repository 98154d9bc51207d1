"""The linked explorer: people, tokens, cortex and T1 side by side, each following the others.

`Explorer` holds what is selected and computes what is to be seen; `panels` shows it as widgets.
"""

from __future__ import annotations

from functools import cached_property
from html import escape

import numpy as np
import xarray as xr

from bhx.errors import InputError, check_choice, listed
from bhx.latents.maps import maps_in, region_map
from bhx.latents.pool import project, subject_mask
from bhx.modalities.t1 import CUBE_DIMS
from bhx.modalities.table import by_variable, modality
from bhx.schema import ATTENTION, check, subject_coords, who_has
from bhx.show.panels import ALL_TOKENS, Panels
from bhx.show.surface import plot_surface


def explore(latents: xr.Dataset, cohort: xr.Dataset | None = None) -> Explorer:
    """Walk around in a latent space: pick people, tokens, parcels; everything else follows.

    Parameters
    ----------
    latents : Dataset, lazy or not; with embed(..., keep=("attention",)) also the cortex and the
        T1 follow
    cohort : the same subjects' scans: then a single person's own T1 is shown

    Returns
    -------
    Explorer: shows itself in JupyterLab, and answers `select_subjects`, `select_token`,
    `select_parcel`, `select_map`, `compare` and `code` without any browser
    """
    return Explorer(latents, cohort)


class Explorer:
    """What is selected, and what follows from it.

    Attributes
    ----------
    chosen : mask over subjects; groups : two masks, or None; token : a token, or None for all;
    parcels : mask over parcels; on_roi, on_cubes : modalities with a map on parcels, on cubes;
    surface_of, cubes_of : those of them whose maps are seen
    """

    def __init__(self, latents: xr.Dataset, cohort: xr.Dataset | None = None):
        self.latents = check(latents, "latents")
        self.cohort = None if cohort is None else _same_people(cohort, latents)
        self.points = project(latents, n=2)
        self.subjects = latents.subject.values
        self.tokens = latents.token.values
        self.on_roi, self.on_cubes = maps_in(latents, ("roi",)), maps_in(latents, CUBE_DIMS)
        self.surface_of, self.cubes_of = (next(iter(n), None) for n in (self.on_roi, self.on_cubes))
        self.roi = latents.roi.values if self.on_roi else np.array([], str)
        self.networks = latents.network.values if self.on_roi else np.array([], str)
        self.modalities = latents.modality.values.tolist() if ATTENTION in latents else []
        everyone = np.ones(len(self.subjects), bool)
        self._maps: dict[str | None, tuple] = {}
        if self.modalities:
            self._maps[ATTENTION] = _loaded(latents, ATTENTION), everyone
        for kind in map(modality, self.on_roi + self.on_cubes):
            has = who_has(latents, kind.variable)
            self._maps[kind.name] = _loaded(latents, kind.map_name), has
        self.followers, self._cache = [], {}
        self.reset()

    def reset(self):
        """Everyone, all tokens, no parcel."""
        self.chosen = np.ones(len(self.subjects), bool)
        self.groups, self.token = None, None
        self.parcels = np.zeros(len(self.roi), bool)
        self._announce()

    def select_subjects(self, subjects=None):
        """Average over these subjects (ids, a mask, or None for all); ends a comparison."""
        self.chosen, self.groups = subject_mask(self.latents, subjects), None
        self._announce()

    def select_token(self, token=None):
        """Show one token's maps, or those of all tokens together."""
        if token is not None and token not in self.tokens:
            fact = f"Expected a token from {self.tokens[0]} to {self.tokens[-1]}, found {token}"
            raise InputError(fact, "See latents.token")
        self.token = None if token is None else int(token)
        self._announce()

    def select_parcel(self, name: str | None = None):
        """Follow a parcel or a whole network: the token that prefers it most, and who reads it."""
        parcels = (self.roi == name) | (self.networks == name)
        if name is not None and not parcels.any():
            known = listed(np.unique(self.networks), 8)
            fact = f"Expected a parcel or a network ({known}), found '{name}'"
            raise InputError(fact, "See latents.roi and latents.network")
        self.parcels = parcels
        if parcels.any():
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
        return self._of_token(self.surface_of) if self.on_roi else np.zeros(0, np.float32)

    def cube_map(self) -> xr.DataArray | None:
        """The same over cubes (cx, cy, cz)."""
        return (
            xr.DataArray(self._of_token(self.cubes_of), dims=CUBE_DIMS) if self.on_cubes else None
        )

    def shares(self) -> np.ndarray:
        """Each token's share of attention (token, modality)."""
        return self._average(ATTENTION) if self.modalities else np.zeros((len(self.tokens), 0))

    def preference(self) -> np.ndarray:
        """Each token's attention to the selected parcels over its mean attention (token)."""
        maps = self._average(self.surface_of, (self.chosen,))
        return maps[:, self.parcels].mean(1) / np.maximum(maps.mean(1), 1e-12)

    def reading(self) -> np.ndarray:
        """Each subject's attention to a selected parcel, by the selected token (subject)."""
        if not self.parcels.any():
            return np.zeros(len(self.subjects), np.float32)
        values, _ = self._maps[self.surface_of]
        at = slice(None) if self.token is None else self.tokens == self.token
        return values[:, at][..., self.parcels].mean((1, 2))

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
        """Who is selected, as HTML; names are escaped."""
        rows = [("subjects", f"{self.chosen.sum()} of {len(self.chosen)}")]
        if self.groups is not None:
            rows = [("compared", " against ".join(str(g.sum()) for g in self.groups))]
        if self.chosen.sum() == 1:
            rows = [("subject", self.subjects[self.chosen][0])]
        coords = subject_coords(self.latents)
        shown = [n for n in ("age", "sex", "diagnosis", "site", "tr", "mean_fd") if n in coords]
        rows += [(name, _summary(coords[name].values[self.chosen])) for name in shown]
        cells = [f"<tr><td>{escape(str(k))}</td><td>{escape(str(v))}</td></tr>" for k, v in rows]
        return f"<table>{''.join(cells)}</table>"

    def heading(self) -> str:
        """One line on what the maps show."""
        token = ALL_TOKENS if self.token is None else f"token {self.token}"
        if self.on_roi and not (self.chosen & self._maps[self.surface_of][1]).any():
            return f"{token}: nobody selected has {self.surface_of}"
        return f"attention of {token}" + (", first group minus second" if self.groups else "")

    def code(self) -> str:
        """The lines that make the same map without the explorer."""
        names = ["first", "second"] if self.groups else ["subjects"]
        lines = [
            f"{name} = {self.subjects[group].tolist()!r}"
            for name, group in zip(names, self._selected(), strict=True)
        ]
        of = "" if self.surface_of in self.on_roi[:1] else f", of={self.surface_of!r}"
        calls = [f"bhx.region_map(latents, token={self.token}, subjects={n}{of})" for n in names]
        draw = "bhx.plot_surface(values, static=True)"
        return "\n".join(["import bhx", "", *lines, f"values = {' - '.join(calls)}", draw])

    def figure(self):
        """The static figure that `code` draws."""
        of = self.surface_of or "roi"
        maps = [region_map(self.latents, self.token, subjects=g, of=of) for g in self._selected()]
        values = maps[0] - maps[1] if self.groups else maps[0]
        return plot_surface(values, static=True, title=self.heading())

    def _ipython_display_(self):
        from IPython.display import display

        display(self.panels.box)

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
        between the groups' averages; one product of weights with all maps."""
        values, has = self._maps[of]
        weights = np.zeros(len(has), np.float32)
        for sign, group in zip((1, -1), groups or self._selected(), strict=False):
            weights += sign * (group & has) / max((group & has).sum(), 1)
        key = (of, weights.tobytes())
        if key not in self._cache:
            if len(self._cache) > 8:
                self._cache.clear()
            flat = weights @ values.reshape(len(weights), -1)
            self._cache[key] = flat.reshape(values.shape[1:])
        return self._cache[key]


def _loaded(latents, name):
    """Maps in memory, 0 where a subject has none."""
    return np.nan_to_num(latents[name].values.astype(np.float32, copy=False))


def _same_people(cohort, latents):
    missing = sorted({*latents.subject.values.tolist()} - {*cohort.subject.values.tolist()})
    if missing:
        fact = "Expected a cohort with the subjects of the latents, found without "
        raise InputError(fact + listed(missing), "Give the cohort that was embedded")
    return cohort.sel(subject=latents.subject.values)


def _summary(values):
    """One value, a mean and range of numbers, or counts of names."""
    names, counts = np.unique([str(v) for v in values.tolist()], return_counts=True)
    if len(names) == 1:
        return values[0]
    if values.dtype.kind in "fi":
        return f"{np.nanmean(values):.3g} ({np.nanmin(values):.3g} to {np.nanmax(values):.3g})"
    return listed([f"{n}: {c}" for n, c in zip(names, counts, strict=True)])
