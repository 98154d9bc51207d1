"""Where hub tokens read from, and the controls of such maps."""

from __future__ import annotations

import numpy as np
import xarray as xr

from bhx.data.atlas import load_atlas
from bhx.data.geometry import spins
from bhx.errors import InputError, check_choice, listed
from bhx.latents.pool import standardized, subject_mask
from bhx.modalities.bold import BOLD
from bhx.modalities.table import MODALITIES, modality
from bhx.schema import ATTENTION, check, who_has

REPEATS, ALIKE = 0.9, 0.7  # correlations that a map reaches, and that its controls do not pass
SHARE = "share of attention"  # units of the maps


def region_map(latents: xr.Dataset, token=None, *, subjects=None, of: str = "roi") -> xr.DataArray:
    """Where hub tokens read from: attention from tokens to parcels, averaged over subjects.

    Attention says what was read, not what mattered; compare with `lesion`, and with the same map
    from random weights.

    Parameters
    ----------
    latents : Dataset embedded with keep=("attention",)
    token : one token, several, or None for all; several are averaged
    subjects : ids or a boolean mask; None for all. People without the modality are left out
    of : name of a modality, such as "bold" or "t1", for its own map, or that of whichever modality
        reads the same variable of the cohort; "roi" for the first map that lies on parcels;
        "modality" for the share of each

    Returns
    -------
    DataArray on the dims of that map, such as roi, (cx, cy, cz) or modality
    """
    values = each_token(latents, of=of, subjects=subjects)
    known = latents["token"].values
    asked = np.atleast_1d(known if token is None else token)
    unknown = np.setdiff1d(asked, known)
    if len(unknown) or not len(asked):
        fact = f"Expected tokens among {known[0]} to {known[-1]}, found {listed(unknown) or 'none'}"
        raise InputError(fact, "See latents.token")
    values = values.sel(token=asked).mean("token", keep_attrs=True)
    which = "all tokens" if token is None else f"token {listed(asked)}"
    return values.assign_attrs(long_name=f"attention of {which}", units=SHARE)


def each_token(latents: xr.Dataset, *, of: str = "roi", subjects=None) -> xr.DataArray:
    """The maps of all tokens, averaged over subjects: DataArray (token, ...); see `region_map`."""
    name, has = _map_of(check(latents, "latents"), of)
    if name not in latents:
        raise InputError(
            f"Expected latents with the variable '{name}', found {listed(latents.data_vars)}",
            'Keep the attention when embedding: embed(cohort, model, keep=("attention",))',
        )
    values = latents[name]
    chosen = subject_mask(values, subjects) & has
    if not chosen.any():
        fact = "Expected at least one subject with this modality, found none in the selection"
        raise InputError(fact, "Choose other subjects, or another modality's map")
    out = values.isel(subject=np.flatnonzero(chosen)).mean("subject")
    return out.assign_attrs(n_subjects=int(chosen.sum()))


def maps_in(latents: xr.Dataset, dims: tuple[str, ...]) -> list[str]:
    """Names of the modalities with a map on these dims in the latents, in the table's order."""
    return [n for n, m in MODALITIES.items() if m.map_dims == dims and m.map_name in latents]


def _map_of(latents, of):
    """The variable with a kind of map, and who has what it is about: a mask (subject)."""
    check_choice("of", of, ("roi", "modality", *MODALITIES))
    if of == "modality":
        return ATTENTION, np.ones(latents.sizes["subject"], bool)
    if of == "roi":
        names = maps_in(latents, ("roi",)) or [BOLD.name]
    else:  # its own map first, then that of another modality that reads the same variable
        same = [n for n, m in MODALITIES.items() if m.variable == modality(of).variable]
        same.sort(key=lambda name: name != of)
        names = [n for n in same if modality(n).map_name in latents] or [of]
    return modality(names[0]).map_name, who_has(latents, modality(names[0]).variable)


def spin_test(values: xr.DataArray, labels: str, atlas: xr.Dataset, *, n_spins=1000, seed=0):
    """Is a map related to the networks beyond what smooth maps always are?

    The parcels' centers are turned on the sphere, the right hemisphere as the mirror image of the
    left, and every parcel takes the value of one turned onto it (`geometry.spins`).

    Parameters
    ----------
    values : DataArray on roi
    labels : name of the atlas's coordinate on roi that groups parcels, such as "network"
    atlas : `load_atlas(...)`, whose parcels the values are on; those off the cortex, which no
        rotation of the sphere moves, are left out

    Returns
    -------
    Dataset on the labels with `statistic`, the mean inside minus the mean outside, and `p`
    (two-sided, from the spins)
    """
    atlas = load_atlas(atlas)
    atlas = atlas.sel(roi=atlas.roi[np.isfinite(atlas.sphere).all("axis").values])
    if not atlas.sizes["roi"]:
        fact = f"Expected parcels on the cortex in the atlas {atlas.attrs['atlas']}, found none"
        raise InputError(fact, "Build it from a label image, a surface or coordinates")
    values = values.sel(roi=atlas.roi.values)
    turned = values.values[spins(atlas.sphere, atlas.hemi, n_spins, seed)]  # (spin, roi)
    names = list(dict.fromkeys(atlas[labels].values.tolist()))
    inside = np.stack([atlas[labels].values == name for name in names]).astype(float)
    weights = inside / inside.sum(1, keepdims=True)
    weights -= (1 - inside) / (1 - inside).sum(1, keepdims=True)
    observed, null = weights @ values.values, turned @ weights.T
    p = (1 + (np.abs(null) >= np.abs(observed) - 1e-12).sum(0)) / (n_spins + 1)
    data = {"statistic": (labels, observed), "p": (labels, p)}
    return xr.Dataset(data, {labels: names}, {"n_spins": n_spins, "seed": seed})


def map_controls(cohort: xr.Dataset, model, *, seed: int = 0) -> xr.Dataset:
    """Would the same map come out without what it is said to show?

    The region maps of all tokens, averaged over subjects, of the model and of its controls: the
    same network with random weights; the parcels' series under shuffled names; and the first and
    the second half of every scan. A map that random weights or shuffled parcels also give says
    nothing about what was learned or about these brains.

    Returns
    -------
    Dataset with `map` (version, token, roi) and `agreement` (control, token), the correlations
    over parcels of the model's map with those of "random weights" and "shuffled parcels", and
    "retest", of the two halves with one another; `passes` (token): whether a map repeats (retest
    of 0.9 or more) and is not mostly what either control gives, too (at most 0.7)
    """
    from bhx.encode.embed import embed
    from bhx.encode.model import random_model

    has = who_has(check(cohort, "cohort"), BOLD.variable)
    cohort = cohort.isel(subject=np.flatnonzero(has))
    series = cohort[BOLD.variable]
    order = np.random.default_rng(seed).permutation(cohort.sizes["roi"])
    late = xr.DataArray(np.arange(cohort.sizes["time"]), dims="time") >= cohort.n_volumes / 2

    def maps_of(series, network):
        changed = cohort.assign({BOLD.variable: series})
        latents = embed(changed, network, missing_parcels="leave out", keep=("attention",))
        return each_token(latents).compute()

    renamed = series.isel(roi=order).assign_coords(cohort.roi.coords)
    maps = {
        "model": maps_of(series, model),
        "random weights": maps_of(series, random_model(model.config, seed=seed)),
        "shuffled parcels": maps_of(renamed, model),
        "first half": maps_of(series.where(~late), model),
        "second half": maps_of(series.where(late), model),
    }
    unit = {name: m.copy(data=standardized(m.values)) for name, m in maps.items()}
    pairs = {name: ("model", name) for name in ("random weights", "shuffled parcels")}
    pairs["retest"] = "first half", "second half"
    agreement = {name: (unit[a] * unit[b]).sum("roi") for name, (a, b) in pairs.items()}
    passes = agreement["retest"] >= REPEATS
    for name in ("random weights", "shuffled parcels"):
        passes &= agreement[name] <= ALIKE
    data = {"map": _stack(maps, "version"), "agreement": _stack(agreement, "control")}
    return xr.Dataset(data | {"passes": passes})


def _stack(arrays, dim):
    names = xr.Variable(dim, list(arrays))
    return xr.concat(list(arrays.values()), names, coords="minimal", compat="override")
