"""The nouns of bhx: names of dims, variables and units, and what cohorts, latents, features and
scores must look like. What a cohort may hold is read off the table of modalities.

No number of a scan is computed here and no file is read.
"""

from __future__ import annotations

import numpy as np
import xarray as xr

from bhx.errors import InputError, listed
from bhx.modalities.t1 import T1_SHAPE, t1_grid
from bhx.modalities.table import MODALITIES, by_variable

VERSION = "1"  # of the Datasets below, stored as attrs["bhx_schema"]

REQUIRED = {"cohort": (), "latents": ("hub",), "features": ("features",), "scores": ("score",)}
SUBJECT_COORDS = ("participant", "site", "tr", "n_volumes")  # and has_<variable>
ROI_COORDS = ("network", "hemi", "mni_x", "mni_y", "mni_z")
UNITS = {"tr": "s", "onset": "s", "age": "years"}
UNITS |= dict.fromkeys(("mean_fd", "mni_x", "mni_y", "mni_z", "x", "y", "z"), "mm")
ATTENTION = "modality_share"
MISSING = ("", "nan", "none", "n/a", "<na>", "na", "nat", "null", ".", "-", "?", "unknown")


def dims_of(kind: str) -> dict[str, tuple[str, ...]]:
    """Variable -> dims, of a "cohort", "latents", "features" or "scores"."""
    if kind == "cohort":
        return {m.variable: ("subject", *m.dims) for m in MODALITIES.values()}
    if kind == "latents":
        out = {"hub": ("subject", "token", "feature"), "valid": ("subject", "patch")}
        for m in MODALITIES.values():
            out[m.tokens] = ("subject", *m.token_dims, "feature")
            out[m.map_name] = ("subject", "token", *m.map_dims)
        return out | {ATTENTION: ("subject", "token", "modality")}
    if kind == "features":
        return {"features": ("subject", "feature")}
    return {
        "score": ("model", "metric", "fold"),
        "prediction": ("model", "subject"),
        "null": ("model", "permutation"),
    }


def build_cohort(data: dict, subject: dict, roi: dict | None = None, attrs: dict | None = None):
    """Put arrays and labels together as a cohort Dataset.

    Parameters
    ----------
    data : variable -> array (subject, ...) of float32 with the dims of its modality, NaN where a
        subject has none; None is left out
    subject : name -> values on subject; `subject` itself holds the unique row ids
    roi : name -> values on roi; `roi` itself holds the parcel names; where a variable has that dim
    attrs : attributes, among them `atlas` and `source`
    """
    there = {name: v for name, v in data.items() if v is not None}
    dims = dims_of("cohort")
    coords = {name: ("subject", np.asarray(values)) for name, values in subject.items()}
    sizes = {d: n for name, v in there.items() for d, n in zip(dims[name], v.shape, strict=True)}
    if "roi" in sizes:
        coords |= {name: ("roi", np.asarray(values)) for name, values in (roi or {}).items()}
    if "time" in sizes:
        coords["time"] = ("time", np.arange(sizes["time"]))
    if "x" in sizes:
        grid = t1_grid(T1_SHAPE[0] / sizes["x"])
        coords |= {axis: (axis, mm) for axis, mm in grid.items()}
    variables = {name: (dims[name], v) for name, v in there.items()}
    out = xr.Dataset(variables, coords, {"bhx_schema": VERSION, **(attrs or {})})
    for name in UNITS.keys() & out.coords.keys():
        out[name].attrs["units"] = UNITS[name]
    return check(out, "cohort")


def plain_labels(obj: xr.Dataset) -> xr.Dataset:
    """The same with every coordinate in memory, and text as numpy's fixed-width str, which pandas
    and scikit-learn take as it is; a reopened store gives text of variable length."""
    plain = {
        name: np.array(c.values.tolist(), str) if c.dtype.kind in "OT" else c.values
        for name, c in obj.coords.items()
    }
    return obj.assign_coords({name: obj[name].copy(data=values) for name, values in plain.items()})


def subject_coords(data) -> dict[str, xr.DataArray]:
    """The coordinates that lie on subject alone."""
    return {name: c for name, c in data.coords.items() if c.dims == ("subject",)}


def who_has(data, variable: str) -> np.ndarray:
    """Which subjects have a variable of the cohort: a mask (subject)."""
    name = f"has_{variable}"
    if name in data.coords:
        return data[name].values.astype(bool)
    return np.ones(data.sizes["subject"], bool)


def is_missing(values) -> np.ndarray:
    """Which labels are none: NaN, None, and the words that tables have for them (`MISSING`)."""
    values = np.asarray(values)
    if np.issubdtype(values.dtype, np.number) or values.dtype == bool:
        return ~np.isfinite(values.astype(float))
    return np.array([str(v).strip().lower() in MISSING for v in values], bool)


def taken_names() -> set[str]:
    """Names that no label of people may have: variables and dims of cohorts and of what follows."""
    names = {"output", "decision", "truth", "class", "draw"}
    for kind in REQUIRED:
        for name, dims in dims_of(kind).items():
            names |= {name, *dims}
    return names - {"subject"}


def check_names(names) -> None:
    """Refuse labels of people that have a name which bhx uses itself."""
    if taken := sorted({*names} & taken_names()):
        fact = f"Expected labels with names that bhx does not use itself, found {listed(taken, 30)}"
        raise InputError(fact, f"Rename them; taken are {listed(sorted(taken_names()), 99)}")


def check(obj: xr.Dataset, kind: str) -> xr.Dataset:
    """Return `obj` when its dims and coordinates are those of a `kind`, else raise InputError.

    `kind` is "cohort", "latents", "features" or "scores". Only labels are read, never data.
    """
    if not isinstance(obj, xr.Dataset):
        fact = f"Expected {kind} as an xarray.Dataset, found {type(obj).__name__}"
        raise InputError(fact, "Open a store with bhx.open_cohort or xarray.open_zarr first")
    for name in REQUIRED[kind]:
        if name not in obj:
            fact = f"Expected {kind} with the variable '{name}', found {listed(obj) or 'none'}"
            raise InputError(fact, f"Check that this Dataset is really {kind}")
    for name, dims in dims_of(kind).items():
        if name in obj and obj[name].dims != dims:
            fact = f"Expected '{name}' with dims {dims}, found {obj[name].dims}"
            raise InputError(fact, f"Rename or transpose: ds['{name}'].transpose{dims}")
    if kind != "scores":
        _check_subjects(obj, kind)
    if kind == "cohort":
        _check_cohort(obj)
    return obj


def check_finished(attrs, kind: str) -> None:
    """Refuse a store whose attributes say that it is still being written."""
    if not attrs.get("complete", True):
        fact = f"Expected finished {kind}, found a store that was still being written"
        raise InputError(fact, "Run the same call again: it continues where it stopped")


def _check_subjects(obj, kind):
    if obj.sizes.get("subject", 0) == 0:
        fact = f"Expected {kind} with at least one subject, found none"
        raise InputError(fact, "Check the selection: it leaves nobody")
    if "subject" not in obj.indexes:
        fact = f"Expected {kind} with unique ids on the dim 'subject', found no ids"
        raise InputError(fact, "Assign them: ds.assign_coords(subject=ids)")
    index = obj.indexes["subject"]
    if not index.is_unique:
        twice = index[index.duplicated()].unique()
        fact = f"Expected unique subject ids, found {listed(twice)} more than once"
        raise InputError(fact, "Name each row participant[/session][/run]")
    check_finished(obj.attrs, kind)


def _check_cohort(obj):
    check_names(subject_coords(obj))
    there = by_variable(obj.data_vars)
    if not there:
        names = " or ".join(
            f"'{name}'" for name in dict.fromkeys(m.variable for m in MODALITIES.values())
        )
        fact = f"Expected a cohort with {names}, found {listed(obj.data_vars) or 'none'}"
        raise InputError(fact, "Name the variables so: ds.rename(old='new')")
    for name in (*SUBJECT_COORDS, *(m.has for m in there.values())):
        if name not in obj.coords or obj[name].dims != ("subject",):
            fact = f"Expected the coordinate '{name}' on subject, found {listed(obj.coords, 12)}"
            raise InputError(fact, f"Assign it: ds.assign_coords({name}=('subject', values))")
    for modality in there.values():
        modality.check(obj)
