"""Parts of every scan removed, and how the hub tokens move."""

from __future__ import annotations

import numpy as np
import xarray as xr

from bhx.errors import InputError, listed
from bhx.latents.pool import pool
from bhx.modalities.table import by_variable
from bhx.modalities.table import modality as modality_named
from bhx.schema import check, who_has


def lesion(
    cohort: xr.Dataset,
    model,
    *,
    roi=None,
    network: str | None = None,
    modality: str | None = None,
    seconds: tuple[float, float] | None = None,
    box: dict | None = None,
    intact: xr.Dataset | None = None,
    predict=None,
) -> xr.Dataset:
    """Remove a part of every scan, embed again, and measure how each hub token moves.

    What is removed is absent, not zero: its tokens are not computed and nothing can read them.
    Large parts move tokens more than small ones, so compare with as many parcels drawn at random.

    Parameters
    ----------
    cohort, model : as for `embed`; subjects who would have nothing left are left out
    roi : parcel names, of every variable that has parcels
    network : a value of `network` on roi, such as "Default"
    modality : one to remove whole: "bold", "t1" or another that the model reads
    seconds : start and end of a time span of every scan [s]
    box : MNI bounds [mm], such as {"x": (-90, 0), "y": (-110, -60)}: parcels with their center,
        and T1 cubes with any voxel, inside
    intact : the latents of the same cohort, where they are there already
    predict : a function from features (`pool`) to one number a subject

    Returns
    -------
    Dataset with `moved` (subject, token), the Euclidean distance; `relative`, the same over the
    root mean square distance of people from the mean person (two people are about 1.4 of it
    apart); `hub`, the tokens after; with `predict`, `prediction` (subject, state)
    """
    from bhx.encode.embed import embed

    removed = {"roi": roi, "network": network, "seconds": seconds, "box": box}
    cut = _without(check(cohort, "cohort"), removed, modality)
    before = embed(cohort, model) if intact is None else intact
    before = before.hub.sel(subject=cut.subject.values).compute()
    after = embed(cut, model, missing_parcels="leave out").compute()
    moved = np.sqrt(((after.hub - before) ** 2).sum("feature"))
    spread = np.sqrt(before.var("subject").sum("feature"))
    out = after[["hub"]].assign(moved=moved, relative=moved / spread)
    if predict is not None:
        states = [predict(pool(d)) for d in (before.to_dataset(name="hub"), after)]
        out["prediction"] = (("subject", "state"), np.stack(states, 1))
        out = out.assign_coords(state=["intact", "lesioned"])
    return out


def _without(cohort, removed, without):
    """The cohort with NaN where something is removed, or without a modality."""
    box = removed["box"]
    if all(part is None for part in (*removed.values(), without)):
        fact = "Expected something to remove, found nothing"
        raise InputError(fact, "Give roi, network, modality, seconds or box")
    if box == {} or any(a not in "xyz" or not ends[0] < ends[1] for a, ends in (box or {}).items()):
        fact = f"Expected bounds (low, high) [mm] on x, y or z, found {box}"
        raise InputError(fact, 'Give for example box={"y": (-110, -60)}')
    gone = {modality_named(without).variable} if without else set()
    for variable in by_variable(cohort.data_vars):
        lost = _lost(cohort, cohort[variable].dims, **removed)
        if lost is False:
            continue
        kept = cohort[variable].where(~lost)
        cohort = cohort.assign({variable: kept.transpose(*cohort[variable].dims)})
        if "subject" not in lost.dims and bool(lost.all()):
            gone |= {variable}
    for variable in gone & {*cohort.data_vars}:
        nobody = xr.zeros_like(cohort[f"has_{variable}"], bool)
        cohort = cohort.assign_coords({f"has_{variable}": nobody})
    left = np.any([who_has(cohort, variable) for variable in by_variable(cohort.data_vars)], axis=0)
    if not left.any():
        raise InputError("Expected subjects with something left, found none", "Remove less")
    return cohort.isel(subject=np.flatnonzero(left))


def _lost(cohort, dims, roi, network, seconds, box):
    """What is removed of a variable with these dims: a mask, or False for nothing."""
    lost = False
    if "roi" in dims:
        for name, asked in (("roi", roi), ("network", network)):
            if asked is not None:
                lost = lost | _named(cohort, name, asked)
        lost = lost | _inside(box, cohort, "mni_") if box else lost
    if "time" in dims and seconds is not None:
        onset = cohort.tr * xr.DataArray(np.arange(cohort.sizes["time"]), dims="time")
        lost = lost | ((onset >= seconds[0]) & (onset < seconds[1]))
    if box and {*"xyz"} <= {*dims}:
        lost = lost | _inside(box, cohort)
    return lost


def _named(cohort, name, asked):
    """Which parcels have one of these values of a coordinate, (roi)."""
    asked, known = np.atleast_1d(asked).tolist(), cohort[name].values
    unknown = [a for a in asked if a not in known]
    if unknown:
        fact = f"Expected {name} among {listed(np.unique(known), 8)}, found {listed(unknown)}"
        raise InputError(fact, f"See cohort.{name} for all of them")
    return cohort[name].isin(asked).drop_vars(name)


def _inside(box, places, prefix=""):
    """What lies in the box, over the dims of its axes' coordinates."""
    inside = True
    for axis, (low, high) in box.items():
        inside = inside & (places[prefix + axis] >= low) & (places[prefix + axis] < high)
    return inside
