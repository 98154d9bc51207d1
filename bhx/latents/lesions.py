"""Parts of every scan removed, and how the hub tokens move."""

from __future__ import annotations

import numpy as np
import xarray as xr

from bhx.errors import InputError, listed
from bhx.modalities.table import by_variable
from bhx.modalities.table import modality as modality_named
from bhx.schema import check, who_has


def lesion(
    cohort: xr.Dataset,
    model,
    *,
    roi=None,
    modality: str | None = None,
    intact: xr.Dataset | None = None,
) -> xr.Dataset:
    """Remove a part of every scan, embed again, and measure how each hub token moves.

    What is removed is absent, not zero: its tokens are not computed and nothing can read them.
    Large parts move tokens more than small ones, so compare with as many parcels drawn at random.

    Parameters
    ----------
    cohort, model : as for `embed`; subjects who would have nothing left are left out
    roi : parcel names, of every variable that has parcels, such as those of one network:
        cohort.roi[cohort.network == "Default"]
    modality : one to remove whole: "bold", "t1" or another that the model reads
    intact : the latents of the same cohort, where they are there already

    Returns
    -------
    Dataset with `moved` (subject, token), the Euclidean distance; `relative`, the same over the
    root mean square distance of people from the mean person (two people are about 1.4 of it
    apart); `hub`, the tokens after
    """
    from bhx.encode.embed import embed

    cut = _without(check(cohort, "cohort"), roi, modality)
    before = embed(cohort, model) if intact is None else intact
    before = before.hub.sel(subject=cut.subject.values).compute()
    after = embed(cut, model, missing_parcels="leave out").compute()
    moved = np.sqrt(((after.hub - before) ** 2).sum("feature"))
    spread = np.sqrt(before.var("subject").sum("feature"))
    return after[["hub"]].assign(moved=moved, relative=moved / spread)


def _without(cohort, roi, modality):
    """The cohort with NaN in these parcels, and without a modality."""
    if roi is None and modality is None:
        fact = "Expected something to remove, found nothing"
        raise InputError(fact, "Give roi or modality")
    there = by_variable(cohort.data_vars)
    gone = {modality_named(modality).variable} & {*there} if modality else set()
    if roi is not None:
        kept = ~_parcels(cohort, roi)
        with_parcels = [name for name in there if "roi" in cohort[name].dims]
        for name in with_parcels:
            values = cohort[name].where(kept).transpose(*cohort[name].dims)
            cohort = cohort.assign({name: values})
        gone |= set() if kept.any() else set(with_parcels)
    for variable in gone:
        nobody = xr.zeros_like(cohort[f"has_{variable}"], bool)
        cohort = cohort.assign_coords({f"has_{variable}": nobody})
    left = np.any([who_has(cohort, variable) for variable in there], axis=0)
    if not left.any():
        raise InputError("Expected subjects with something left, found none", "Remove less")
    return cohort.isel(subject=np.flatnonzero(left))


def _parcels(cohort, names):
    """Which parcels have one of these names, (roi)."""
    asked, known = np.atleast_1d(names).tolist(), cohort.indexes.get("roi", [])
    unknown = [a for a in asked if a not in known]
    if unknown:
        fact = f"Expected roi among {listed(known, 8)}, found {listed(unknown)}"
        raise InputError(fact, "See cohort.roi for all of them")
    return cohort.roi.isin(asked).drop_vars("roi")
