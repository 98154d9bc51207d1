"""Files of BOLD to series of parcels: every form of file, its repetition time, its denoising.

A file that cannot be used raises InputError with its name.
"""

from __future__ import annotations

import json
import os
import re
from contextlib import suppress
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import xarray as xr
from scipy import ndimage
from scipy.sparse import csr_array

from bhx.data.atlas import ATLASES, centroids, load_atlas, places_of
from bhx.data.files import (
    FORM,
    attempt,
    check_affine,
    check_file,
    check_space,
    entities,
    reader_of,
    reading,
)
from bhx.data.parcellation import both_sides, fslr_vertices, whole_numbers
from bhx.data.quality import check_bold_quality
from bhx.data.tables import Table, check_names, read_array, read_mat, read_text, take_parcels
from bhx.errors import InputError, listed
from bhx.modalities.bold import BOLD, check_tr
from bhx.schema import ROI_COORDS
from bhx.settings import folders

COUNTED = {"n_scrubbed": 0, "dof": np.nan}  # attributes of series that become facts of the row
MIN_DOF = 10


@reader_of(BOLD)
def read_run(row: dict, options: dict) -> tuple[xr.DataArray, dict, list[str]]:
    """The BOLD of one row of a table of scans, denoised where it is not yet; see `reader_of`."""
    file, confounds = (row.get(column) for column in BOLD.files)
    source = {name: options[name] for name in ("order", "labels", "parcels_in")}
    bold = read_bold(file, options["atlas"], **source, tr=row.get("tr"))
    mean_fd = row.get("mean_fd", np.nan)
    if confounds:
        found = read_motion(confounds)
        mean_fd = mean_fd if np.isnan(found) else found
    bold = in_time(bold, Path(str(file)), confounds)
    if options["denoising"] and needs_denoising(file):
        bold = denoise(bold, file, confounds, **options["denoising"])
    series, facts, warnings = check_bold_quality(bold, mean_fd)
    facts |= {name: bold.attrs.get(name, default) for name, default in COUNTED.items()}
    warnings = bold.attrs["notes"] + warnings
    if confounds and np.isnan(mean_fd):
        warnings.append(f"no framewise displacement in {Path(confounds).name}")
    return series, {"mean_fd": mean_fd, **facts}, warnings


def read_bold(
    path, atlas="schaefer400", *, order=None, labels=None, tr=None, parcels_in=None
) -> xr.DataArray:
    """BOLD of one run on the parcels of an atlas, whatever kind of file it is in.

    Parameters
    ----------
    path : volume in MNI152 space (.nii, .nii.gz), CIFTI (.dtseries.nii, .ptseries.nii), surface of
        one hemisphere with its partner beside it (.func.gii, .mgz; fsaverage5 or fsLR-32k), or a
        table of parcels (.csv, .tsv, .txt, .1D, also .gz; .npy; .mat)
    atlas : see `bhx.load_atlas`; its parcels come out in its own order; None keeps a table's
        columns, or the numbers of the image `labels`, as they are
    order : "7networks" or "17networks": the order of a table without parcel names
    labels : label image for volumes; Schaefer's through nilearn by default
    tr : repetition time [s] for files that do not state it
    parcels_in : "rows" or "columns" of a table, where it does not show by itself

    Returns
    -------
    DataArray (roi, time), float64, `time` in seconds; on roi the atlas's labels and `covered`, the
    share of each parcel's voxels or vertices with signal; `tr` [s], and `notes` on what was decided
    or left out, in the attributes.
    """
    options = {"order": order, "labels": labels, "parcels_in": parcels_in}
    path = check_file(path)
    reader = _reader_of(path.name)
    if reader is None:
        fact = f"Expected BOLD in a file ending in {listed(_READERS, 12)}, found {path.name}"
        raise InputError(fact, "Convert it, or give the parcels as a table")
    needs_one = reader in (_read_dtseries, _read_surface) or (reader is _read_volume and not labels)
    if atlas is None and needs_one:
        fact = f"Expected an atlas to average {path.name} in parcels, found none"
        raise InputError(fact, "Name one, such as atlas='schaefer400'")
    atlas = None if atlas is None else load_atlas(atlas)
    with reading(path, "BOLD"):
        names, series, covered, header_tr, notes = reader(path, atlas, options)
    tr = read_tr(path, header_tr, tr)
    if header_tr and header_tr > 20:
        notes = [*notes, f"TR of {header_tr:g} in the header taken as ms"]
    if series.ndim != 2 or 0 in series.shape:
        fact = f"Expected BOLD as parcels x time in {path.name}, found shape {series.shape}"
        raise InputError(fact, "Give one run of several volumes")
    time = ("time", tr * np.arange(series.shape[1]), {"units": "s"})
    coords = {"roi": names, "time": time, "covered": ("roi", covered)}
    attrs = {"tr": tr, "file": path.name, "notes": notes}
    bold = xr.DataArray(series, coords, BOLD.dims, BOLD.name, attrs)
    if atlas is None:
        return bold
    known = {*ROI_COORDS, "label17"} & {*atlas.coords}
    return bold.sel(roi=atlas.roi.values).assign_coords({name: atlas[name] for name in known})


def _read_volume(path, atlas, options):
    """A 4D image, volume by volume, so that memory holds one of them."""
    # gzip is read forward only while the file stays open
    image = nib.load(path, keep_file_open=True)
    long = [axis for axis, n in enumerate(image.shape) if axis > 2 and n > 1]
    if len(image.shape) < 4 or len(long) != 1:
        fact = f"Expected a 4D image of several volumes in {path.name}, found {image.shape}"
        raise InputError(fact, "Give the preprocessed BOLD run, not its reference or mask")
    check_affine(image, path)
    check_space(path, options["labels"])
    places, names = _labels_on(image, atlas, options["labels"])
    unit = image.header.get_xyzt_units()[1]
    tr = float(image.header.get_zooms()[3]) * {"msec": 1e-3, "usec": 1e-6}.get(unit, 1)
    ones = [0] * (image.ndim - 3)
    moments = [
        (..., *ones[: long[0] - 3], t, *ones[long[0] - 2 :]) for t in range(image.shape[long[0]])
    ]
    volumes = (np.asarray(image.dataobj[at], "float32").reshape(-1, 1) for at in moments)
    return names, *_parcel_means(volumes, places.ravel(), len(names)), tr, []


def _read_dtseries(path, atlas, options):
    """CIFTI grayordinates: the cortex's vertices by the shipped fsLR-32k labels."""
    image = nib.load(path)
    series, brain = (image.header.get_axis(i) for i in range(2))
    at = fslr_vertices(brain, path.name)
    places = np.where(at < 0, -1, places_of(atlas, "labels_fslr32k")[at])
    starts = range(0, image.shape[0], 64)
    blocks = (np.asarray(image.dataobj[t : t + 64], "float32").T for t in starts)
    tr = _step_of(series, path)
    return atlas.roi.values, *_parcel_means(blocks, places, atlas.sizes["roi"]), tr, []


def _step_of(series, path):
    """Repetition time [s] of CIFTI's axis of time."""
    if not hasattr(series, "step"):
        fact = f"Expected an axis of time in {path.name}, found {type(series).__name__} of maps"
        raise InputError(fact, "Give the run itself: this file is a dscalar or pscalar")
    return series.step * {"SECOND": 1, "MILLISECOND": 1e-3}.get(str(series.unit).upper(), 1)


def _read_ptseries(path, atlas, options):
    """CIFTI parcels: their names are in the file."""
    image = nib.load(path)
    series, parcels = (image.header.get_axis(i) for i in range(2))
    table = Table(image.get_fdata().T, rows=[*parcels.name])
    names, values, covered, _, notes = _take(table, atlas, {**options, "parcels_in": "rows"}, path)
    return names, values, covered, _step_of(series, path), notes


def _read_surface(path, atlas, options):
    """Both hemispheres of fsaverage5 or fsLR-32k, of which one file is named."""
    left, right = both_sides(path)
    values, tr = [], None
    for file in (left, right):
        image = nib.load(check_file(file))
        if isinstance(image, nib.gifti.GiftiImage):
            arrays = [d.data.reshape(len(d.data), -1) for d in image.darrays]  # nilearn: one in 2D
            values.append(np.concatenate(arrays, 1))
            step = image.darrays[0].meta.get("TimeStep", "") if image.darrays else ""
            tr = float(step) / 1000 if step else None
        else:
            values.append(np.asarray(image.dataobj, "float32").reshape(image.shape[0], -1))
            tr = float(image.header.get_zooms()[3]) / 1000 if image.ndim == 4 else None
    sizes = [v.shape for v in values]
    kinds = {10242: "labels_fsaverage5", 32492: "labels_fslr32k"}
    if sizes[0] != sizes[1] or sizes[0][0] not in kinds:
        fact = "Expected two hemispheres of 10242 (fsaverage5) or 32492 (fsLR) vertices in "
        fact += f"{left.name} and its partner, found {sizes[0]} and {sizes[1]}"
        raise InputError(fact, "Resample to fsaverage5 or fsLR-32k")
    places = places_of(atlas, kinds[sizes[0][0]])
    means = _parcel_means([np.concatenate(values)], places, atlas.sizes["roi"])
    return atlas.roi.values, *means, tr, []


def _read_table(path, atlas, options):
    """Parcels in a table, read by the kind of its file."""
    table = _TABLES[_ending(path.name, _TABLES)](path)
    if options["order"] is None and (found := re.search(r"Schaefer(7|17)n(\d+)p", path.name)):
        options = {**options, "order": f"{found[1]}networks"}
    return _take(table, atlas, options, path)


def _take(table, atlas, options, path):
    """Names, series, whether each is complete, and what was left out, of a table."""
    how = {name: options[name] for name in ("order", "parcels_in")}
    names, series, notes = take_parcels(table, atlas, **how, where=path.name)
    return names, series, np.isfinite(series).all(1).astype(float), None, notes


_TABLES = dict.fromkeys((".csv", ".csv.gz", ".tsv", ".tsv.gz", ".txt", ".1d"), read_text)
_TABLES |= {".npy": read_array, ".mat": read_mat}
_READERS = {".dtseries.nii": _read_dtseries, ".ptseries.nii": _read_ptseries}
_READERS |= dict.fromkeys((".nii.gz", ".nii"), _read_volume)
_READERS |= dict.fromkeys((".gii", ".mgz", ".mgh"), _read_surface)
_READERS |= dict.fromkeys(_TABLES, _read_table)


def _parcel_means(blocks, places, n):
    """Mean of the points with signal in each of n parcels, and the share of points that have any.

    `blocks` are arrays (point, time); `places` is the parcel of each point, -1 for none.
    """
    inside = np.flatnonzero(places >= 0)
    rows = (places[inside], np.arange(len(inside)))
    member = csr_array((np.ones(len(inside)), rows), shape=(n, len(inside)))
    sums, seen = [], np.zeros(len(inside), bool)
    for block in blocks:
        values = np.nan_to_num(block[inside], posinf=0, neginf=0)
        seen |= (values != 0).any(1)
        sums.append(member @ values)
    counts = member @ seen.astype(float)
    means = np.concatenate(sums, 1) / np.maximum(counts, 1)[:, None]
    return means, counts / np.maximum(member.sum(1), 1)


# --- label images -------------------------------------------------------------------------------


def fetch_labels(atlas) -> Path:
    """The label image of an atlas: the one it was built from, or Schaefer's (2 mm MNI152, 7-network
    numbers) through nilearn and bhx's cache."""
    from nilearn.datasets import fetch_atlas_schaefer_2018

    atlas = load_atlas(atlas)
    help = "Give an image with labels=, or use CIFTI, surfaces or tables, which need none"
    if atlas.attrs["atlas"] not in ATLASES:
        if not (made_from := atlas.attrs.get("labels", "")).endswith((".nii", ".nii.gz")):
            fact = f"Expected the label image of '{atlas.attrs['atlas']}' for volumes, found none"
            raise InputError(fact, help)
        return check_file(made_from)
    n = atlas.sizes["roi"]
    with attempt("to fetch Schaefer's label image", help):
        fetched = fetch_atlas_schaefer_2018(n, 7, 2, data_dir=folders()["cache"], verbose=0)
    return Path(fetched.maps)


def _labels_on(image, atlas, labels):
    """The place of each voxel's parcel (nearest neighbor), -1 for none, and the parcels' names."""
    from nilearn.image import resample_to_img

    file = check_file(labels or fetch_labels(atlas))
    with reading(file, "labels"):
        source = nib.load(file)
        check_affine(source, file)
        numbers = whole_numbers(source, file.name)
    found = np.unique(numbers[numbers > 0])
    if atlas is not None:
        _check_label_image(numbers, found, source.affine, atlas, file)
    source = nib.Nifti1Image(numbers, source.affine)
    grid = nib.Nifti1Image(np.zeros(image.shape[:3], "int8"), image.affine)
    numbers = np.asarray(resample_to_img(source, grid, interpolation="nearest").dataobj, int)
    if atlas is not None:
        return places_of(atlas, numbers), atlas.roi.values
    return pd.Index(found).get_indexer(numbers.ravel()), found.astype(str)


def _check_label_image(numbers, present, affine, parcels, file):
    """The numbers must be the atlas's: each parcel's center lies near its published one."""
    at = places_of(parcels, present)
    if (at < 0).any():
        known = parcels.label.values
        fact = f"Expected labels {known.min()} to {known.max()} in {file.name}, found "
        raise InputError(
            f"{fact}{present[at < 0].max()}", "Give the label image of the atlas you name"
        )
    middle = np.array(ndimage.center_of_mass(numbers > 0, numbers, present))  # voxels
    distance = nib.affines.apply_affine(affine, middle) - centroids(parcels)[at]
    if (far := np.median(np.linalg.norm(distance, axis=1))) > 10:
        fact = f"Expected labels of {file.name} where {parcels.attrs['atlas']} has them, found "
        help = "Give labels in MNI152 space, numbered as the atlas is (Schaefer: 7-network order)"
        raise InputError(f"{fact}them {far:.0f} mm away (median)", help)


# --- repetition time, motion, denoising -----------------------------------------------------------


def read_tr(path, header_tr: float | None = None, given: float | None = None) -> float:
    """Repetition time [s]: from the sidecar, checked against the header, else as given."""
    path = Path(path)
    stated = {"the call": given, "the sidecar": _sidecar_tr(path), "the header": header_tr}
    known = {k: float(v) for k, v in stated.items() if v is not None and not pd.isna(v)}
    header, others = known.get("the header"), [v for k, v in known.items() if k != "the header"]
    if header == 1 or (others and header == 0):  # what writers put where they know none
        known.pop("the header")
    elif others and header is not None and header > 20:  # milliseconds
        known["the header"] = header / 1000
    if not known:
        found = "1 s in the header alone" if header == 1 else "none in a sidecar or header"
        fact = f"Expected a repetition time for {path.name}, found {found}"
        raise InputError(fact, "Add RepetitionTime [s] to its .json, or give tr=")
    first, tr = next(iter(known.items()))
    for place, value in known.items():
        if abs(value - tr) > 1e-3 * max(abs(tr), 1e-3):
            found = f"{tr:g} s in {first} and {value:g} s in {place}"
            fact = f"Expected one repetition time for {path.name}, found {found}"
            raise InputError(fact, "Correct the wrong one")
    check_tr(tr, [path.name])
    return tr


def _sidecar_tr(path):
    for file in _sidecars(path):
        with reading(file, "RepetitionTime"):
            tr = json.loads(file.read_text(encoding="utf-8-sig")).get("RepetitionTime")
            if tr is not None:
                return float(tr)
    return None


def _sidecars(path):
    """The JSON beside a file, and its task's JSON in a folder above, as far as they are there."""
    stem = re.split(r"\.(dtseries|ptseries|func|nii|gii|mg[zh]|[ct]sv|txt|1D|npy)", path.name)[0]
    task = re.search(r"task-[a-zA-Z0-9]+", path.name)
    above = [p / f"{task[0]}_bold.json" for p in list(path.parents)[:4]] if task else []
    return [file for file in [path.with_name(f"{stem}.json"), *above] if file.is_file()]


def beside(path) -> list[Path]:
    """Files that are read with one of BOLD: sidecars, the other hemisphere, outliers."""
    if not path or not os.path.isfile(path):
        return []
    path = Path(path)
    both: tuple = ()
    if _reader_of(path.name) is _read_surface:
        with suppress(InputError):
            both = both_sides(path)
    return [*_sidecars(path), *(f for f in both if f != path and f.is_file()), *_outliers(path)]


def _outliers(path):
    """XCP-D's table that says which volumes of a run it cut out."""
    run = "_".join(f"{k}-{v}" for k, v in entities(path.name).items() if k not in FORM)
    return [file for file in [path.with_name(f"{run}_outliers.tsv")] if file.is_file()]


def read_motion(confounds) -> float:
    """Mean framewise displacement [mm] of a table of confounds or motion; NaN where it has none."""
    table = _confounds(confounds)
    names = {re.sub("[^a-z]", "", str(name).lower()): name for name in reversed(table.columns)}
    found = [names[name] for name in ("framewisedisplacement", "fd") if name in names]
    return float(pd.to_numeric(table[found[0]], errors="coerce").mean()) if found else np.nan


def in_time(bold: xr.DataArray, path, confounds=None) -> xr.DataArray:
    """Series whose volumes are all there, at regular times.

    Volumes that XCP-D's table of outliers says were cut out, and those without a number in any
    parcel, are filled in linearly and counted in `attrs["n_scrubbed"]`. A run that is shorter than
    its confounds is refused when nothing says where it was cut.
    """
    values, total = bold.values, bold.sizes["time"]
    places = np.arange(total)
    for file in _outliers(path):
        table = _confounds(file)
        cut = table.get("framewise_displacement", table.iloc[:, 0]).to_numpy(float) > 0
        if total != len(cut):
            _check_length(path, total, (~cut).sum(), file, "0")
            places, total = np.flatnonzero(~cut), len(cut)
    if confounds:
        _check_length(path, total, len(_confounds(confounds)), Path(confounds), "one volume")
    there = (np.isfinite(values) & (values != 0)).any(0)
    if not there.any() or there.sum() == total:
        return bold
    full = [np.interp(np.arange(total), places[there], v) for v in values[:, there]]
    note = f"{total - there.sum()} of {total} volumes were missing and are filled in linearly"
    out = bold.isel(time=[0] * total).copy(data=np.stack(full))
    out["time"] = ("time", bold.attrs["tr"] * np.arange(total), {"units": "s"})
    whole = np.isfinite(values[:, there]).all(1) & ~np.isfinite(values).all(1)
    out["covered"] = out["covered"].where(~whole, 1.0)
    notes = [*bold.attrs["notes"], note]
    return out.assign_attrs(n_scrubbed=int(total - there.sum()), notes=notes)


def _check_length(path, volumes, lines, file, what):
    if volumes != lines:
        fact = f"Expected as many volumes in {path.name} as lines of {what} in {file.name}, found "
        fact += f"{volumes} and {lines}"
        help = "Volumes may have been cut out, or this is another run: give the tables of this run"
        raise InputError(fact, help)


def _confounds(file):
    file = check_file(file)
    with reading(file, "confounds"):
        return pd.read_csv(file, sep="\t" if ".tsv" in file.name else ",", na_values="n/a")


def needs_denoising(path) -> bool:
    """Whether BOLD is images whose name does not say that a pipeline denoised it."""
    name = Path(path).name
    images = _reader_of(name) in (_read_volume, _read_dtseries, _read_surface)
    return images and not re.search(r"denoised|clean|residual", name)


def is_volume(path) -> bool:
    """Whether a file is BOLD that needs a label image."""
    return _reader_of(str(path or "")) is _read_volume


def check_table(path, atlas) -> None:
    """Refuse a table whose names cannot be right in any other table like it."""
    if _reader_of(str(path or "")) is _read_table and Path(path).is_file():
        with reading(path, "BOLD"):
            table = _TABLES[_ending(Path(path).name, _TABLES)](Path(path))
        check_names(table, atlas, Path(path).name)


def _reader_of(name):
    return _READERS.get(_ending(name, _READERS))


def _ending(name, known):
    return next((k for k in known if name.lower().endswith(k)), "")


def denoise(
    bold: xr.DataArray,
    path,
    confounds=None,
    *,
    strategy: str | None = "simple",
    low_pass: float | None = None,
    high_pass: float | None = None,
    **options,
) -> xr.DataArray:
    """Regress confounds out of parcel series and filter them, with nilearn; means are kept.

    Parameters
    ----------
    bold : (roi, time) with `tr` in its attributes
    path : the file it was read from; nilearn finds fMRIPrep's confounds beside it
    confounds : table of which "columns" takes every column; also says that there are confounds
    strategy : preset of nilearn's load_confounds_strategy ("simple", "scrubbing", "compcor",
        "ica_aroma"), "columns", or None for the filter alone
    low_pass, high_pass : [Hz]; fMRIPrep's presets bring their own high-pass
    options : of the preset

    Returns
    -------
    DataArray like `bold`. Scrubbed volumes are filled in linearly, so that time stays regular, and
    counted in `attrs["n_scrubbed"]`; degrees of freedom that are left are in `attrs["dof"]`.
    """
    from nilearn.interfaces.fmriprep import load_confounds_strategy
    from nilearn.signal import clean

    path, table, kept = Path(path), None, None
    if strategy == "columns":
        table = _confounds(confounds)
        with reading(Path(confounds), "confounds"):
            table = table.astype(float).bfill()
    elif strategy is not None:
        if confounds is None:
            fact = f"Expected fMRIPrep confounds beside {path.name}, found none"
            raise InputError(fact, "Add them, or prepare with denoising=None")
        image = list(map(str, both_sides(path))) if path.name.endswith("gii") else str(path)
        with reading(Path(confounds), "confounds"):
            table, kept = load_confounds_strategy(image, strategy, **options)
    n = bold.sizes["time"]
    filters = {"t_r": bold.attrs["tr"], "low_pass": low_pass, "high_pass": high_pass}
    options = {"confounds": table, "sample_mask": kept, "standardize": None, **filters}
    with attempt(f"confounds for {n} volumes of {path.name}", "Give the table of this run"):
        cleaned = clean(bold.values.T, **options)
    kept = np.arange(n) if kept is None else kept
    full = np.stack([np.interp(np.arange(n), kept, series) for series in cleaned.T])
    out = bold.copy(data=full + bold.values.mean(1, keepdims=True))
    # a filter leaves its share of the frequencies; cosines of a high-pass are among the confounds
    nyquist = 0.5 / bold.attrs["tr"]
    share = (min(low_pass or nyquist, nyquist) - (high_pass or 0)) / nyquist
    ones = np.ones((len(kept), 1))
    used = ones if table is None else np.hstack([np.asarray(table, float)[kept], ones])
    dof = int(len(kept) * share) - np.linalg.matrix_rank(used)
    fact = f"{dof} of {n} degrees of freedom after {used.shape[1] - 1} confounds and filters"
    if dof < MIN_DOF:
        fact = f"Expected at least {MIN_DOF} degrees of freedom in {path.name}, found {fact}"
        raise InputError(fact, "Take a strategy with fewer confounds, or a longer scan")
    notes = [*bold.attrs.get("notes", []), *([fact] if dof < n / 2 else [])]
    scrubbed = n - len(kept) + bold.attrs.get("n_scrubbed", 0)
    return out.assign_attrs(n_scrubbed=scrubbed, dof=float(dof), notes=notes)
