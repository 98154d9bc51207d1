"""Where hub tokens read from, and the controls of such maps."""

from __future__ import annotations

import numpy as np
import xarray as xr

from bhx.data.geometry import spins
from bhx.errors import InputError, check_choice, listed
from bhx.latents.pool import row_of, standardized, subject_mask
from bhx.modalities.bold import BOLD
from bhx.modalities.table import MODALITIES, modality
from bhx.schema import ATTENTION, check, who_has


def region_map(latents: xr.Dataset, token=None, *, subjects=None, of: str = "roi") -> xr.DataArray:
    """Where hub tokens read from: attention from tokens to parcels, averaged over subjects.

    Attention says what was read, not what mattered; compare with `lesion`, and with the same map
    from random weights.

    Parameters
    ----------
    latents : Dataset embedded with keep=("attention",)
    token : one token, several, or None for all; several are averaged
    subjects : ids or a boolean mask; None for all. People without the modality are left out
    of : name of a modality, for its own map; "roi" for the first map that lies on parcels;
        "modality" for the share of each

    Returns
    -------
    DataArray on the dims of that map, such as roi, (cx, cy, cz) or modality
    """
    values = each_token(latents, of=of, subjects=subjects)
    values = values.isel(token=_tokens(latents, token)).mean("token", keep_attrs=True)
    which = "all tokens" if token is None else f"token {listed(np.atleast_1d(token))}"
    return values.assign_attrs(long_name=f"attention of {which}")


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
        of = [*maps_in(latents, ("roi",)), BOLD.name][0]
    return modality(of).map_name, who_has(latents, modality(of).variable)


def spin_test(values: xr.DataArray, other, atlas: xr.Dataset, *, n_spins=1000, seed=0):
    """Is a map related to another map, or to the networks, beyond what smooth maps always are?

    The parcels' centers are turned on the sphere, the right hemisphere as the mirror image of the
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
        target = standardized(other.sel(roi=atlas.roi.values).values)
        observed = standardized(values.values) @ target
        null = standardized(turned) @ target
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
    nothing about what was learned or about these brains.

    Returns
    -------
    Dataset with `map` (version, token, roi) and `agreement` (control, token), the correlations
    over parcels of the model's map with those of "random weights" and "shuffled parcels", and
    "retest", of the two halves with one another
    """
    from bhx.encode.embed import embed
    from bhx.encode.model import random_model

    cohort = check(cohort, "cohort")
    chosen = subject_mask(cohort, subjects) & who_has(cohort, BOLD.variable)
    cohort = cohort.isel(subject=np.flatnonzero(chosen))
    series = cohort[BOLD.variable]
    order = np.random.default_rng(seed).permutation(cohort.sizes["roi"])
    late = xr.DataArray(np.arange(cohort.sizes["time"]), dims="time") >= cohort.n_volumes / 2

    def maps_of(series, network):
        changed = cohort.assign({BOLD.variable: series})
        options = {"keep": ("attention",), "attention": attention}
        latents = embed(changed, network, missing_parcels="leave out", **options)
        return each_token(latents, of=BOLD.name).compute()

    renamed = series.isel(roi=order).assign_coords(cohort.roi.coords)
    maps = {
        "model": maps_of(series, model),
        "random weights": maps_of(series, random_model(model.config, seed=seed)),
        "shuffled parcels": maps_of(renamed, model),
        "first half": maps_of(series.where(~late), model),
        "second half": maps_of(series.where(late), model),
    }
    unit = {name: m.copy(data=standardized(m.values)) for name, m in maps.items()}
    agreement = {
        "random weights": (unit["model"] * unit["random weights"]).sum("roi"),
        "shuffled parcels": (unit["model"] * unit["shuffled parcels"]).sum("roi"),
        "retest": (unit["first half"] * unit["second half"]).sum("roi"),
    }
    return xr.Dataset({"map": _stack(maps, "version"), "agreement": _stack(agreement, "control")})


def _stack(arrays, dim):
    names = xr.Variable(dim, list(arrays))
    return xr.concat(list(arrays.values()), names, coords="minimal", compat="override")


def integrated_gradients(
    cohort: xr.Dataset, model, subject: str, token: int, *, steps: int = 16
) -> xr.Dataset:
    """How much each parcel's and cube's own values move one hub token away from an empty scan.

    Gradients of the token's output along its own displacement are summed on the straight way from
    an empty scan (every scaled value 0) to this one, so that all parts together add up to the
    distance moved. Only the first window of a long scan is read.

    Returns
    -------
    Dataset with `roi_part` (roi) and `t1_part` (cx, cy, cz), in units of the token's distance;
    attrs `distance`, and `gap`: the share of it that the sum misses, smaller with more `steps`

    Source: Sundararajan et al., ICML 2017 (arXiv 1703.01365), Gauss-Legendre quadrature.
    """
    import torch

    from bhx.encode.inputs import encode_parts, sequences

    reading = _reading(cohort, model, subject)
    inputs = [x for x in (*reading.windows, reading.t1) if x is not None]
    whole = [x.nan_to_num() for x in inputs]

    def output(share):
        """The hub token of the scan times `share`, and the scaled inputs it was made of."""
        scaled = [(share * x).requires_grad_() for x in whole]
        reading.windows = scaled[: len(reading.windows)]
        reading.t1 = None if reading.t1 is None else scaled[-1]
        parts = encode_parts(model.networks, [reading], model.device)
        tokens, rows, _ = sequences(model.config, [reading], *parts)
        return model.networks.harmonizer(tokens, rows)[0, 1 + token], scaled

    with torch.no_grad():
        way = output(1.0)[0] - output(0.0)[0]
    distance = way.norm()
    totals = [torch.zeros_like(x) for x in whole]
    nodes, weights = np.polynomial.legendre.leggauss(steps)
    for node, weight in zip((nodes + 1) / 2, weights / 2, strict=True):
        out, scaled = output(float(node))
        gradients = torch.autograd.grad(out @ way / distance, scaled)
        for total, gradient, x in zip(totals, gradients, whole, strict=True):
            total += float(weight) * gradient * x
    return _parts(totals, reading, model, float(distance))


def _reading(cohort, model, subject):
    """One subject as the networks read it, first window only."""
    from bhx.data.atlas import match_names
    from bhx.encode.inputs import read_subject

    one = check(cohort, "cohort").isel(subject=row_of(cohort, subject)).compute()
    bold = None
    if "bold" in one and bool(one.has_bold):
        named = one.bold.assign_coords(roi=match_names(one.roi.values, model.atlas))
        bold = named.sel(roi=model.atlas.roi.values).values[:, : int(one.n_volumes)]
    t1 = one.t1.values if "t1" in one and bool(one.has_t1) else None
    reading = read_subject(bold, float(one.tr), t1, model.config)
    reading.windows, reading.tokens = reading.windows[:1], reading.tokens[:1]
    return reading


def _parts(totals, reading, model, distance):
    """Attributions of patches and voxels, summed to parcels and cubes."""
    out = xr.Dataset(attrs={"distance": distance})
    if reading.windows:
        roi = model.atlas.roi.drop_vars("roi_other", errors="ignore")
        out["roi_part"] = roi.copy(data=totals[0].sum((1, 2)).numpy()).drop_attrs()
    if reading.t1 is not None:
        grid = model.config.structure.grid
        shape = [n for size, g in zip(totals[-1].shape, grid, strict=True) for n in (g, size // g)]
        out["t1_part"] = (("cx", "cy", "cz"), totals[-1].reshape(shape).sum((1, 3, 5)).numpy())
    total = sum(float(v.sum()) for v in out.data_vars.values())
    return out.assign_attrs(gap=1 - total / distance)


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
