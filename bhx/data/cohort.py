"""A cohort: opened from the catalog or a store, saved, cut into scans and splits.

Data stay lazy (Dask) until somebody computes them; labels are in memory.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import dask
import dask.array as da
import numpy as np
import xarray as xr

from bhx.data.anatomy import read_template_t1
from bhx.data.atlas import load_atlas, load_sample, parcel_labels
from bhx.data.catalog import catalog_files, entry_rows, load_entry
from bhx.data.prepare import prepare
from bhx.data.store import open_store
from bhx.errors import InputError, listed
from bhx.modalities.bold import BOLD
from bhx.modalities.t1 import ANATOMY, T1_SHAPE
from bhx.schema import build_cohort, check
from bhx.settings import folders


def open_cohort(name_or_path, *, catalog=None) -> xr.Dataset:
    """Open a cohort lazily.

    Parameters
    ----------
    name_or_path : name of a catalog entry ("synthetic", "abide1", ...), path of a zarr store, or
        a folder of derivatives, which is prepared into bhx's cache folder first (see `prepare`)
    catalog : folder with catalog entries of your own

    Returns
    -------
    xarray.Dataset
        The cohort (see `bhx.schema`): `bold (subject, roi, time)` and `t1 (subject, x, y, z)` as
        Dask arrays with one chunk a subject, every label in memory.

    Raises
    ------
    InputError
        The name is unknown, or the store is unfinished or not a cohort.
    """
    path = Path(name_or_path)
    is_store = path.suffix == ".zarr" or (path / "zarr.json").exists()
    if str(name_or_path) in catalog_files(catalog) or not (is_store or path.exists()):
        return _open_entry(load_entry(str(name_or_path), catalog))
    return open_store(path) if is_store else _prepared(path.name, path)


def scan(cohort: xr.Dataset, subject) -> xr.DataArray:
    """One scan's BOLD `(roi, time)` without its padding, `time` in seconds.

    Parameters
    ----------
    cohort : with `bold`
    subject : id of a row of the cohort

    Raises
    ------
    InputError
        There is no such row, or it has no BOLD.
    """
    check(cohort, "cohort")
    if subject not in cohort.indexes["subject"]:
        fact = f"Expected a subject of this cohort, found '{subject}'"
        raise InputError(fact, f"The ids are {listed(cohort.subject.values)}")
    row = cohort.sel(subject=subject)
    if BOLD.variable not in cohort or not row[BOLD.has]:
        fact = f"Expected a scan with BOLD, found none for '{subject}'"
        raise InputError(fact, f"Choose a subject whose label {BOLD.has} is True")
    bold = row[BOLD.variable].isel(time=slice(0, int(row.n_volumes)))
    seconds = ("time", np.arange(bold.sizes["time"]) * float(row.tr), {"units": "s"})
    return bold.assign_coords(time=seconds)


def _open_entry(entry):
    """A cohort of the catalog: made, or fetched or found and then prepared."""
    from bhx.data.synthetic import synthetic_cohort

    if entry.layout == "synthetic":
        return synthetic_cohort(**entry.options)
    if entry.layout == "sample":
        return _open_sample(entry)
    rows = entry_rows(entry, folders()["data"])
    attrs = {"source": entry.name, "licence": entry.licence}
    return _prepared(entry.name, rows, attrs=attrs, **entry.prepare)


def _prepared(name, source, **options):
    """A folder or table, prepared into the cache folder."""
    place = str(Path(source).resolve()) if isinstance(source, Path) else "catalog"
    key = hashlib.sha256(place.encode()).hexdigest()[:8]
    return prepare(source, folders()["cache"] / f"{name}-{key}.zarr", **options)


def _open_sample(entry):
    """The real scan of the atlas assets, and the MNI152 template as a subject with T1 only."""
    real = load_sample()
    atlas = load_atlas("schaefer400").sel(roi=real.roi.values)
    series = da.from_array(real[BOLD.variable].values[None], chunks=-1)
    template = da.from_delayed(dask.delayed(read_template_t1)(), T1_SHAPE, "float32")[None]
    ids = [real.attrs["participant"], "mni152"]
    subject = {
        "subject": ids,
        "participant": ids,
        "site": ["leipzig", "montreal"],
        "tr": [real.attrs["tr"], np.nan],
        "n_volumes": [real.sizes["time"], 0],
        BOLD.has: [True, False],
        ANATOMY.has: [False, True],
    }
    bold = da.concatenate([series, da.full_like(series, np.nan)])
    t1 = da.concatenate([da.full_like(template, np.nan), template])
    about = {"atlas": "schaefer400", "source": entry.name, "licence": entry.licence}
    about["preprocessing"] = real.attrs["preprocessing"]
    return build_cohort({BOLD.name: bold, ANATOMY.name: t1}, subject, parcel_labels(atlas), about)
