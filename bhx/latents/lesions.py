"""Parts of every scan removed, and how the hub tokens move."""

from __future__ import annotations

import numpy as np
import xarray as xr

from bhx.errors import InputError, check_choice, listed
from bhx.latents.pool import pool
from bhx.schema import check


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
    roi : parcel names
    network : a value of `network` on roi, such as "Default"
    modality : "bold" or "t1"
    seconds : start and end of a time span of every scan [s]
    box : MNI bounds [mm], such as {"x": (-90, 0), "y": (-110, -60)}: parcels with their centre,
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

    cut = _without(check(cohort, "cohort"), roi, network, modality, seconds, box)
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


def _without(cohort, roi, network, modality, seconds, box):
    """The cohort with NaN where something is removed, or without the modality."""
    if roi is network is modality is seconds is box is None:
        fact = "Expected something to remove, found nothing"
        raise InputError(fact, "Give roi, network, modality, seconds or box")
    if box == {} or any(a not in "xyz" or not ends[0] < ends[1] for a, ends in (box or {}).items()):
        fact = f"Expected bounds (low, high) [mm] on x, y or z, found {box}"
        raise InputError(fact, 'Give for example box={"y": (-110, -60)}')
    out = cohort
    if "bold" in out:
        gone = _parcels(out, roi, network, box)
        kept = out.bold.where(~(gone | _span(out, seconds)))
        out = out.assign(bold=kept.transpose(*out.bold.dims))
        if gone.all():
            modality = "bold"
    if "t1" in out and box:
        out = out.assign(t1=out.t1.where(~_inside(box, out)))
    if modality is not None:
        check_choice("modality", modality, ("bold", "t1"))
        out = out.assign_coords({f"has_{modality}": xr.zeros_like(out[f"has_{modality}"], bool)})
    left = (out.has_bold.astype(bool) | out.has_t1.astype(bool)).values
    if not left.any():
        raise InputError("Expected subjects with something left, found none", "Remove less")
    return out.isel(subject=np.flatnonzero(left))


def _parcels(cohort, roi, network, box):
    """Which parcels are removed, (roi)."""
    gone = xr.zeros_like(cohort.roi, bool)
    for name, asked in (("roi", roi), ("network", network)):
        asked = [] if asked is None else np.atleast_1d(asked).tolist()
        known = cohort[name].values if asked else ()
        unknown = [a for a in asked if a not in known]
        if unknown:
            fact = f"Expected {name} among {listed(np.unique(known), 8)}, found {listed(unknown)}"
            raise InputError(fact, f"See cohort.{name}")
        gone = gone | cohort[name].isin(asked) if asked else gone
    return gone | _inside(box, cohort, "mni_") if box else gone


def _span(cohort, seconds):
    """Which volumes are removed, (subject, time)."""
    if seconds is None:
        return False
    onset = cohort.tr * xr.DataArray(np.arange(cohort.sizes["time"]), dims="time")
    return (onset >= seconds[0]) & (onset < seconds[1])


def _inside(box, places, prefix=""):
    """What lies in the box, over the dims of its axes' coordinates."""
    inside = True
    for axis, (low, high) in box.items():
        inside = inside & (places[prefix + axis] >= low) & (places[prefix + axis] < high)
    return inside
