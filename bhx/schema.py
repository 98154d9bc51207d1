"""The nouns of bhx: names of dims, variables and units, and the sentences of its errors.

Every other file takes its names from here. No numbers are computed here and no file is read.
"""

from __future__ import annotations

import numpy as np
import xarray as xr

from bhx.errors import InputError, listed

VERSION = "1"  # of the Datasets below, stored as attrs["bhx_schema"]

# FSL's MNI152 1 mm grid, which every T1 of a cohort lives on: shape in voxels, and the world
# coordinate of voxel (0, 0, 0); x runs from right to left.
MNI_SHAPE = (182, 218, 182)
MNI_ORIGIN = (90.0, -126.0, -72.0)  # mm
MNI_STEP = (-1.0, 1.0, 1.0)  # mm
CROP = (11, 13, 11)  # voxels cut off on either side of each axis
T1_SHAPE = tuple(n - 2 * c for n, c in zip(MNI_SHAPE, CROP, strict=True))  # 160, 192, 160 at 1 mm

DIMS = {
    "cohort": {"bold": ("subject", "roi", "time"), "t1": ("subject", "x", "y", "z")},
    "latents": {
        "hub": ("subject", "token", "feature"),
        "dynamics": ("subject", "roi", "patch", "feature"),
        "structure": ("subject", "cx", "cy", "cz", "feature"),
        "valid": ("subject", "patch"),
        "hub_to_roi": ("subject", "token", "roi"),
        "hub_to_t1": ("subject", "token", "cx", "cy", "cz"),
        "modality_share": ("subject", "token", "modality"),
    },
    "features": {"features": ("subject", "feature")},
    "scores": {
        "score": ("model", "metric", "fold"),
        "prediction": ("model", "subject"),
        "null": ("model", "permutation"),
    },
}
REQUIRED = {"cohort": (), "latents": ("hub",), "features": ("features",), "scores": ("score",)}
SUBJECT_COORDS = ("participant", "site", "tr", "n_volumes", "has_bold", "has_t1")
ROI_COORDS = ("network", "hemi", "mni_x", "mni_y", "mni_z")
UNITS = {"tr": "s", "onset": "s", "age": "years"}
UNITS |= dict.fromkeys(("mean_fd", "mni_x", "mni_y", "mni_z", "x", "y", "z"), "mm")


def t1_grid(voxel_mm: float = 1.0) -> dict[str, np.ndarray]:
    """World coordinates [mm, MNI152] of the T1 grid's voxel centres along x, y and z.

    The grid is FSL's MNI152 grid after the crop of 11, 13 and 11 voxels; a coarser one averages
    whole blocks of it, so `voxel_mm` divides 160, 192 and 160.
    """
    if voxel_mm < 1 or any(n % voxel_mm for n in T1_SHAPE):
        fact = f"A T1 voxel of {voxel_mm} mm does not divide the {T1_SHAPE} mm grid"
        raise InputError(fact, "Take 1, 2, 4, 8, 16 or 32 mm")
    middle = (voxel_mm - 1) / 2
    grid = zip("xyz", T1_SHAPE, MNI_ORIGIN, MNI_STEP, CROP, strict=True)
    return {
        axis: origin + step * (crop + middle + voxel_mm * np.arange(int(n / voxel_mm)))
        for axis, n, origin, step, crop in grid
    }


def build_cohort(bold, t1, subject: dict, roi: dict | None, attrs: dict, voxel_mm: float = 1.0):
    """Put arrays and labels together as a cohort Dataset.

    Parameters
    ----------
    bold : array (subject, roi, time) of float32, NaN behind each scan's end, or None
    t1 : array (subject, x, y, z) of float32 on `t1_grid(voxel_mm)`, or None
    subject : name -> values on subject; `subject` itself holds the unique row ids
    roi : name -> values on roi; `roi` itself holds the parcel names; None without `bold`
    attrs : attributes, among them `atlas` and `source`
    """
    coords = {name: ("subject", np.asarray(values)) for name, values in subject.items()}
    data = {}
    if bold is not None:
        data["bold"] = (DIMS["cohort"]["bold"], bold)
        coords |= {name: ("roi", np.asarray(values)) for name, values in roi.items()}
        coords["time"] = ("time", np.arange(bold.shape[2]))
    if t1 is not None:
        data["t1"] = (DIMS["cohort"]["t1"], t1)
        coords |= {axis: (axis, values) for axis, values in t1_grid(voxel_mm).items()}
    out = xr.Dataset(data, coords, {"bhx_schema": VERSION, **attrs})
    for name, units in UNITS.items():
        if name in out.coords:
            out[name].attrs["units"] = units
    return check(out, "cohort")


def plain_labels(obj: xr.Dataset) -> xr.Dataset:
    """The same with every coordinate in memory, and text as numpy's fixed-width str, which pandas
    and scikit-learn take as it is; a reopened store gives text of variable length."""
    plain = {
        name: np.array(c.values.tolist(), str) if c.dtype.kind in "OT" else c.values
        for name, c in obj.coords.items()
    }
    return obj.assign_coords({name: obj[name].copy(data=values) for name, values in plain.items()})


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
            raise InputError(fact, f"Is this Dataset really {kind}")
    for name, dims in DIMS[kind].items():
        if name in obj and obj[name].dims != dims:
            fact = f"Expected '{name}' with dims {dims}, found {obj[name].dims}"
            raise InputError(fact, f"Rename or transpose: ds['{name}'].transpose{dims}")
    if kind in ("cohort", "latents", "features"):
        _check_subjects(obj, kind)
    if kind == "cohort":
        _check_cohort(obj)
    return obj


def _check_subjects(obj, kind):
    if obj.sizes.get("subject", 0) == 0:
        raise InputError(
            f"Expected {kind} with at least one subject, found none", "Check the selection"
        )
    if "subject" not in obj.indexes:
        fact = f"Expected {kind} with unique ids on the dim 'subject', found no ids"
        raise InputError(fact, "Assign them: ds.assign_coords(subject=ids)")
    index = obj.indexes["subject"]
    if not index.is_unique:
        twice = index[index.duplicated()].unique()
        fact = f"Expected unique subject ids, found {listed(twice)} more than once"
        raise InputError(fact, "Name each row participant[/session][/run]")
    if not obj.attrs.get("complete", True):
        fact = f"Expected finished {kind}, found a store that was still being written"
        raise InputError(fact, "Run the same call again: it continues where it stopped")


def _check_cohort(obj):
    if "bold" not in obj and "t1" not in obj:
        fact = f"Expected a cohort with 'bold' or 't1', found {listed(obj.data_vars) or 'none'}"
        raise InputError(fact, "bhx.schema.DIMS lists the names")
    for name in SUBJECT_COORDS:
        if name not in obj.coords or obj[name].dims != ("subject",):
            fact = f"Expected the coordinate '{name}' on subject, found {listed(obj.coords, 12)}"
            raise InputError(fact, f"Assign it: ds.assign_coords({name}=('subject', values))")
    if "bold" in obj:
        if "roi" not in obj.indexes or not obj.indexes["roi"].is_unique:
            raise InputError(
                "Expected unique parcel names on the dim 'roi', found none or repeated ones",
                "Assign them: ds.assign_coords(roi=bhx.load_atlas('schaefer400').roi)",
            )
        has = obj.has_bold.values.astype(bool)
        check_tr(obj.tr.values[has], obj.subject.values[has])


def check_tr(tr, where=()) -> None:
    """Refuse repetition times [s] that are missing, not positive, or in milliseconds."""
    tr = np.atleast_1d(np.asarray(tr, float))
    bad = ~(np.isfinite(tr) & (tr > 0) & (tr <= 20))
    if bad.any():
        first = int(np.flatnonzero(bad)[0])
        of = f" of {where[first]}" if len(where) == len(tr) else ""
        unit = "; this looks like milliseconds" if tr[first] > 20 else ""
        fact = "Expected a repetition time in seconds, above 0 and at most 20, "
        fact += f"found {tr[first]:g}{of}{unit}"
        raise InputError(fact, "Set it: cohort.assign_coords(tr=('subject', seconds))")
