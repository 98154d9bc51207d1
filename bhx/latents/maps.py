"""Where hub tokens read from, and the controls of such maps."""

from __future__ import annotations

import numpy as np
import xarray as xr

from bhx.data.geometry import spins
from bhx.errors import InputError, check_choice, listed
from bhx.latents.pool import standardized, subject_mask
from bhx.schema import check

MAPS = {"roi": "hub_to_roi", "t1": "hub_to_t1", "modality": "modality_share"}


def region_map(latents: xr.Dataset, token=None, *, subjects=None, of: str = "roi") -> xr.DataArray:
    """Where hub tokens read from: attention from tokens to parcels, averaged over subjects.

    Attention says what was read, not what mattered; compare with `lesion`, and with the same map
    from random weights.

    Parameters
    ----------
    latents : Dataset embedded with keep=("attention",)
    token : one token, several, or None for all; several are averaged
    subjects : ids or a boolean mask; None for all. People without the modality are left out
    of : "roi" (parcels), "t1" (cubes: cx, cy, cz) or "modality"

    Returns
    -------
    DataArray on roi; on (cx, cy, cz); or on modality
    """
    values = each_token(latents, of=of, subjects=subjects)
    values = values.isel(token=_tokens(latents, token)).mean("token", keep_attrs=True)
    which = "all tokens" if token is None else f"token {listed(np.atleast_1d(token))}"
    return values.assign_attrs(long_name=f"attention of {which}")


def each_token(latents: xr.Dataset, *, of: str = "roi", subjects=None) -> xr.DataArray:
    """The maps of all tokens, averaged over subjects: DataArray (token, ...); see `region_map`."""
    check_choice("of", of, MAPS)
    check(latents, "latents")
    if MAPS[of] not in latents:
        raise InputError(
            f"Expected latents with the variable '{MAPS[of]}', found {listed(latents.data_vars)}",
            'Keep the attention when embedding: embed(cohort, model, keep=("attention",))',
        )
    values = latents[MAPS[of]]
    chosen = subject_mask(values, subjects) & who_has(latents, of)
    if not chosen.any():
        fact = "Expected at least one subject with this modality, found none in the selection"
        raise InputError(fact, "Choose other subjects, or the other modality's map")
    out = values.isel(subject=np.flatnonzero(chosen)).mean("subject")
    return out.assign_attrs(n_subjects=int(chosen.sum()))


def who_has(latents: xr.Dataset, of: str) -> np.ndarray:
    """Which subjects have what a kind of map is about: a mask (subject)."""
    name = {"roi": "has_bold", "t1": "has_t1"}.get(of)
    everyone = np.ones(latents.sizes["subject"], bool)
    return latents[name].values.astype(bool) if name in latents.coords else everyone


def spin_test(values: xr.DataArray, other, atlas: xr.Dataset, *, n_spins=1000, seed=0):
    """Is a map related to another map, or to the networks, beyond what smooth maps always are?

    The parcels' centres are turned on the sphere, the right hemisphere as the mirror image of the
    left, and every parcel takes the value of one turned onto it (`geometry.spins`).

    Parameters
    ----------
    values : DataArray on roi
    other : DataArray on roi, or the name of a coordinate on roi such as "network"
    atlas : `load_atlas(...)`, whose parcels the values are on

    Returns
    -------
    Dataset with `statistic` and `p` (two-sided, from the spins): the correlation of two maps, or
    for a coordinate, on each of its values the mean inside minus the mean outside
    """
    values = values.sel(roi=atlas.roi.values)
    turned = values.values[spins(atlas.sphere, atlas.hemi, n_spins, seed)]  # (spin, roi)
    if isinstance(other, str):
        labels = atlas[other].values
        names = list(dict.fromkeys(labels.tolist()))
        inside = np.stack([labels == name for name in names]).astype(float)
        weights = inside / inside.sum(1, keepdims=True)
        weights -= (1 - inside) / (1 - inside).sum(1, keepdims=True)
        observed, null = weights @ values.values, turned @ weights.T
        dims, coords = (other,), {other: names}
    else:
        target = standardized(other.sel(roi=atlas.roi.values).values[None])[0]
        observed, null = (
            standardized(values.values[None])[0] @ target,
            standardized(turned) @ target,
        )
        dims, coords = (), {}
    p = (1 + (np.abs(null) >= np.abs(observed) - 1e-12).sum(0)) / (n_spins + 1)
    out = xr.Dataset({"statistic": (dims, observed), "p": (dims, p)}, coords)
    return out.assign_attrs(n_spins=n_spins, seed=seed)


def map_controls(
    cohort: xr.Dataset, model, *, subjects=None, attention: str | int = "last", seed: int = 0
) -> xr.Dataset:
    """Would the same map come out without what it is said to show?

    The region maps of all tokens, averaged over subjects, of the model and of its controls: the
    same network with random weights; the parcels' series under shuffled names; and the first and
    the second half of every scan. A map that random weights or shuffled parcels also give says
    nothing about what was learnt or about these brains.

    Returns
    -------
    Dataset with `map` (version, token, roi) and `agreement` (control, token), the correlations
    over parcels of the model's map with those of "random weights" and "shuffled parcels", and
    "retest", of the two halves with one another
    """
    from bhx.encode.embed import embed
    from bhx.encode.model import random_model

    cohort = check(cohort, "cohort")
    chosen = subject_mask(cohort, subjects) & cohort.has_bold.values.astype(bool)
    cohort = cohort.isel(subject=np.flatnonzero(chosen))
    order = np.random.default_rng(seed).permutation(cohort.sizes["roi"])
    late = xr.DataArray(np.arange(cohort.sizes["time"]), dims="time") >= cohort.n_volumes / 2
    shuffled = cohort.bold.isel(roi=order).assign_coords(cohort.roi.coords)
    versions = {
        "model": (cohort, model),
        "random weights": (cohort, random_model(model.config, seed=seed)),
        "shuffled parcels": (cohort.assign(bold=shuffled), model),
        "first half": (cohort.assign(bold=cohort.bold.where(~late)), model),
        "second half": (cohort.assign(bold=cohort.bold.where(late)), model),
    }
    options = {"keep": ("attention",), "attention": attention, "missing_parcels": "leave out"}
    each = [each_token(embed(c, m, **options)).compute() for c, m in versions.values()]
    maps = xr.concat(
        each, xr.Variable("version", list(versions)), coords="minimal", compat="override"
    )
    unit = maps.copy(data=standardized(maps.transpose("version", "token", "roi").values))
    pairs = {
        "random weights": ("model", "random weights"),
        "shuffled parcels": ("model", "shuffled parcels"),
        "retest": ("first half", "second half"),
    }
    agreement = [
        (unit.sel(version=a, drop=True) * unit.sel(version=b, drop=True)).sum("roi")
        for a, b in pairs.values()
    ]
    return xr.Dataset(
        {"map": maps, "agreement": xr.concat(agreement, xr.Variable("control", list(pairs)))}
    )


def _tokens(latents, token):
    """Positions of the tokens asked for."""
    labels = latents["token"].to_index()
    asked = np.atleast_1d(labels if token is None else token)
    at = labels.get_indexer(asked)
    unknown = listed(asked[at < 0])
    if unknown or not len(at):
        fact = f"Expected tokens among {labels[0]} to {labels[-1]}, found {unknown or 'none'}"
        raise InputError(fact, "See latents.token")
    return at
