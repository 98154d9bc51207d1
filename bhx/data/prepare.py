"""Files of many subjects to a cohort store, resumable. Whose files are read is registered by
modality (`files.reader_of`); this file works by dims and names no modality but one in `HALF`."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from contextlib import nullcontext
from pathlib import Path

import dask
import dask.array as da
import numpy as np
import pandas as pd
import xarray as xr
import zarr

import bhx.data.anatomy  # noqa: F401 - registers its reader
from bhx.data.atlas import ATLASES, load_atlas, match_names, parcel_labels, with_atlas
from bhx.data.bold import check_table, fetch_labels, is_volume
from bhx.data.catalog import catalog_files, entry_rows, load_entry
from bhx.data.derivatives import find_scans
from bhx.data.files import READERS, attempt, file_columns, readable
from bhx.data.store import count_written, create_store, extend_store, fill, only_writer, open_store
from bhx.errors import InputError, listed
from bhx.modalities.bold import BOLD
from bhx.modalities.t1 import ANATOMY
from bhx.modalities.table import MODALITIES
from bhx.schema import build_cohort, dims_of
from bhx.settings import folders

DENOISING = {"strategy": "simple"}
HALF = (ANATOMY.variable,)  # stored in half precision
FLOAT16_RANGE = (0.1, 6e4)  # of their highest value; others are scaled to keep precision
MADE_DIMS = ("time", "x", "y", "z")  # their labels follow from their length: see build_cohort


def read_scan(
    row: dict,
    *,
    atlas="schaefer400",
    voxel_mm: float = 1.0,
    denoising: dict | None = None,
    order: str | None = None,
    labels=None,
    parcels_in: str | None = None,
) -> tuple[xr.Dataset, list[str]]:
    """Read and check the files of one row: BOLD on parcels, T1 on the grid, and what is odd.

    Parameters
    ----------
    row : paths under `bold`, `confounds`, `t1`, `t1_mask` (each may be missing) and the columns of
        other modalities, `tr` [s] where no file states it, and any labels of the subject
    atlas, order, labels, parcels_in : see `bhx.data.bold.read_bold`
    voxel_mm : voxel of the T1 [mm]
    denoising : options of `bhx.data.bold.denoise` for BOLD that is not denoised yet; None leaves it
        as it is

    Returns
    -------
    Dataset with `bold (roi, time)`, `t1 (x, y, z)` and others as far as there are any, facts as
    attributes (tr, n_volumes, coverage, mean_fd, ...), and a list of warnings.

    Raises
    ------
    InputError
        The scan cannot be used.
    """
    options = {"atlas": atlas, "voxel_mm": voxel_mm, "denoising": denoising, "order": order}
    options |= {"labels": labels, "parcels_in": parcels_in}
    there = [modality for column, modality in readable().items() if row.get(column)]
    if not there:
        names = " or ".join(f"'{column}'" for column in readable())
        fact = f"Expected a row with a file under {names}, found none"
        raise InputError(fact, "Give the path of one")
    data, facts, warnings = [], {"n_volumes": 0, "tr": np.nan}, []
    for modality in there:
        values, more, odd = READERS[modality.name](row, options)
        if atlas is not None and "roi" in values.dims:
            values = _in_order(values, load_atlas(atlas))
        data.append(values.rename(modality.variable))
        facts |= more
        warnings += odd
    with attempt("the same labels on a dim of all files of a row", "Give them the same parcels"):
        merged = xr.merge(data, compat="override", join="exact", combine_attrs="drop")
    return merged.assign_attrs(facts), warnings


def _in_order(values, atlas):
    """Values of parcels by the atlas's own names, in its order."""
    values = values.assign_coords(roi=match_names(values.roi.values, atlas))
    with attempt(f"all parcels of {atlas.attrs['atlas']} in a file", "Give a line to each"):
        return values.sel(roi=atlas.roi.values)


def prepare(
    source,
    out,
    *,
    atlas="schaefer400",
    voxel_mm: float = 1.0,
    denoising: dict | None = DENOISING,
    order: str | None = None,
    labels=None,
    parcels_in: str | None = None,
    task: str = "rest",
    phenotypes=None,
    attrs: dict | None = None,
    workers: int = 2,
    client=None,
) -> xr.Dataset:
    """Read a folder of derivatives, or a table of files, into a cohort store; open it.

    Each subject is one Dask task that leaves one finished file beside the store; at the end the
    files are packed into it. A run that was killed continues when it is started again, and its
    store equals that of an unbroken run. Subjects that the store has already are not read again;
    new ones are added behind them. A subject that cannot be used is left out and named, with the
    reason, in `attrs["refused"]`.

    Parameters
    ----------
    source : folder (see `bhx.find_scans`); catalog entry, whose own options go before these;
        or a DataFrame with `subject`, `participant` and the paths `bold`, `confounds`, `t1`,
        `t1_mask` and those of other modalities (each optional), `tr` [s], and any labels
    out : path of the zarr store, new or made with the same options
    atlas, order, labels, parcels_in : see `bhx.data.bold.read_bold`
    voxel_mm : voxel of the T1 [mm], stored masked, unscaled, in half precision
    denoising : options of `bhx.data.bold.denoise` for BOLD that is not denoised yet, or None
    task, phenotypes : see `bhx.find_scans`
    attrs : more attributes of the cohort, such as its licence
    workers : subjects read at a time on threads; each holds one T1 and one volume of BOLD
    client : a dask.distributed Client, or the address of a Dask cluster, instead of threads

    Raises
    ------
    InputError
        No subject can be used, another process writes this store, or it has other options.
    """
    made_by = {"atlas": atlas, "voxel_mm": voxel_mm, "denoising": denoising, "order": order}
    made_by["labels"] = labels and str(labels)
    if parcels_in:
        made_by["parcels_in"] = parcels_in
    if isinstance(source, str) and source in catalog_files():
        entry = load_entry(source)
        made_by |= entry.prepare
        attrs = {"source": entry.name, "licence": entry.licence, **(attrs or {})}
        source = entry_rows(entry, folders()["data"])
    if not isinstance(source, pd.DataFrame):
        attrs = {"source": str(source), **(attrs or {})}
        source = find_scans(source, task=task, phenotypes=phenotypes)

    if made_by["atlas"] is not None:
        known = load_atlas(made_by["atlas"])
        made_by["atlas"] = known.attrs["atlas"]  # known by its name from here on
        if made_by["atlas"] not in ATLASES:
            parts = b"".join(known[n].values.tobytes() for n in sorted(map(str, known.variables)))
            made_by["atlas_sha256"] = hashlib.sha256(parts).hexdigest()[:16]
    rows, out = check_rows(source), Path(out)
    with only_writer(out):
        have = _rows_in(out, made_by)
        rows = [row for row in rows if row["subject"] not in have]
        folder = out.with_name(out.name + ".parts")
        parts = {row["subject"]: _part(folder, row, made_by) for row in rows}
        refused = _stage(rows, parts, made_by, workers, client)
        if not have and len(refused) == len(rows):
            first = next(iter(refused.values()))
            fact = f"Expected a usable subject, found none among {len(rows)}; the first: {first}"
            raise InputError(fact, "Correct what this reason names, and prepare again")
        parts = {subject: part for subject, part in parts.items() if subject not in refused}
        if parts:
            about = {"source": "table", "preprocessing": json.dumps(made_by), **(attrs or {})}
            _pack(parts, out, about)
        zarr.open_group(out, mode="r+").attrs["refused"] = refused
        shutil.rmtree(folder, ignore_errors=True)
    return open_store(out)


def check_rows(rows: pd.DataFrame) -> list[dict]:
    """Rows of a table of scans, complete and in the order of their unique ids."""
    rows, name_them = rows.copy(), "Name each row participant[/session][/run]"
    if "subject" not in rows and "participant" in rows:
        rows["subject"] = rows["participant"]
    if "subject" not in rows or not len(rows):
        fact = f"Expected rows with a column 'subject', found {len(rows)} rows with "
        raise InputError(fact + (listed(rows.columns, 20) or "no columns"), name_them)
    rows["subject"] = rows["subject"].astype(str)
    if rows["subject"].duplicated().any():
        twice = listed(rows["subject"][rows["subject"].duplicated()].unique())
        fact = f"Expected unique subject ids, found {twice} more than once"
        raise InputError(fact, name_them)
    for name, default in {"participant": rows["subject"], "site": ""}.items():
        rows[name] = rows[name].fillna("").astype(str) if name in rows else default
    for name in {*file_columns()} & {*rows.columns}:
        rows[name] = rows[name].fillna("")
    return rows.sort_values("subject").to_dict("records")


# --- each subject to a file of its own ---


def _stage(rows, parts, options, workers, client):
    """Read every row that has no part yet, one task each; the reasons of those refused."""
    from tqdm.auto import tqdm

    todo = [row for row in rows if not parts[row["subject"]].exists()]
    read_by = {key: value for key, value in options.items() if key != "atlas_sha256"}
    for row in todo[:1]:  # what is wrong with the names of one table is wrong with all
        check_table(row.get(BOLD.files[0]), options["atlas"])
    own = options["atlas"] not in (None, *ATLASES)  # other processes do not know it by its name
    options = {**read_by, "atlas": load_atlas(options["atlas"])} if own else read_by
    if options["labels"] is None and any(is_volume(row.get(BOLD.files[0])) for row in todo):
        options = {**options, "labels": fetch_labels(options["atlas"])}
    if own:
        options = {**options, "atlas": dask.delayed(options["atlas"])}  # sent once
    tasks = [dask.delayed(_stage_one)(row, parts[row["subject"]], options) for row in todo]
    with tqdm(total=len(rows), initial=len(rows) - len(todo), desc="prepare", unit="scan") as bar:
        reasons = _compute(tasks, workers, client, bar.update)
    return {row["subject"]: why for row, why in zip(todo, reasons, strict=True) if why}


def _compute(tasks, workers, client, tick):
    """Results of Dask tasks on threads or on a cluster, calling `tick` as each one ends."""
    from dask.callbacks import Callback

    if client is None:
        with Callback(posttask=lambda *_: tick()):
            return dask.compute(*tasks, scheduler="threads", num_workers=workers)
    from distributed import Client, as_completed

    with Client(client) if isinstance(client, str) else nullcontext(client) as cluster:
        futures = cluster.compute(tasks)
        for _ in as_completed(futures, raise_errors=False):
            tick()
        return [str(f.exception()) if f.status == "error" else f.result() for f in futures]


def _stage_one(row, part, options):
    """Read one row into its part, which appears whole or not at all; why it was refused."""
    try:
        data, warnings = read_scan(row, **options)
    except Exception as error:  # whatever is wrong with one subject must not end the run
        return str(error) if isinstance(error, InputError) else f"{type(error).__name__}: {error}"
    arrays = {name: v.values for name, v in data.data_vars.items()}
    for name in {*HALF} & {*arrays}:
        top = float(np.abs(arrays[name]).max())
        if not FLOAT16_RANGE[0] < top < FLOAT16_RANGE[1]:
            arrays[name] = arrays[name] * np.float32(1000 / top)
            warnings = [*warnings, f"intensities of '{name}' up to {top:g} scaled to 1000"]
        arrays[name] = arrays[name].astype("float16")
    about = {
        "labels": {k: v for k, v in row.items() if k not in file_columns()}
        | data.attrs
        | {m.has: m.variable in arrays for m in MODALITIES.values()}
        | {"warnings": "; ".join(warnings)},
        "shapes": {name: v.shape for name, v in arrays.items()},
        "dims": {d: data[d].values.tolist() for d in data.indexes if d not in MADE_DIMS},
    }
    unfinished = part.with_suffix(f".{os.getpid()}.tmp")
    part.parent.mkdir(exist_ok=True)
    with open(unfinished, "wb") as file:
        np.savez(file, about=json.dumps(about, default=_in_json), **arrays)
    os.replace(unfinished, part)
    return None


def _in_json(value):
    """A label that JSON does not know: numpy's numbers as they are, dates and others as text."""
    return value.item() if hasattr(value, "item") else str(value)


def _part(folder, row, made_by):
    """The file of one row: another one when the row, its files or the options change."""
    files = [Path(row[k]) for k in file_columns() if row.get(k)]
    state = [(s.st_size, s.st_mtime_ns) for s in (f.stat() for f in files if f.is_file())]
    name = json.dumps([row, state, made_by], sort_keys=True, default=str)
    return folder / f"{hashlib.sha256(name.encode()).hexdigest()[:32]}.npz"


# --- those files to the store ---


def _pack(parts, out, attrs):
    """Put the parts of new rows, by their ids, into the store."""
    new = _labels_of(parts.values(), attrs)
    if out.exists():
        extend_store(new, out)
    else:
        create_store(new, out, half=HALF)
    ids = zarr.open_array(out / "subject", mode="r")[:].tolist()
    fill(out, lambda rows: _load_parts([parts[i] for i in ids[rows]], new))


def _labels_of(parts, attrs):
    """A cohort with the labels of some parts and arrays of the right shape, not yet filled."""
    rows, shapes, dims = [], {}, {}
    for part in parts:
        with np.load(part) as file:
            about = json.loads(str(file["about"]))
        rows.append(about["labels"])
        for dim, names in about["dims"].items():
            if dims.setdefault(dim, names) != names:
                one = about["labels"]["subject"]
                found = f"{len(names)} of {one} and {len(dims[dim])} before"
                fact = f"Expected the same labels on '{dim}' in every scan, found {found}"
                raise InputError(fact, "Prepare scans of different atlases into different stores")
        for name, shape in about["shapes"].items():
            shapes[name] = np.maximum(shapes.get(name, shape), shape).tolist()
    in_order = [name for name in dims_of("cohort") if name in shapes]
    data = {name: da.empty((len(rows), *shapes[name]), dtype="float32") for name in in_order}
    table = pd.DataFrame(rows)
    text = table.select_dtypes(exclude=["number", "bool"]).columns
    table[text] = table[text].fillna("").astype(str)
    counts = table.select_dtypes("integer").columns.drop("n_volumes")
    table[counts] = table[counts].astype(float)  # subjects that are added later may lack them
    subject = {name: table[name].to_numpy(str if name in text else None) for name in table}
    atlas = json.loads(attrs["preprocessing"])["atlas"]
    roi = {"roi": dims.pop("roi")} if "roi" in dims else {}
    if roi and atlas:
        roi = parcel_labels(load_atlas(atlas).sel(roi=roi["roi"]))
    new = build_cohort(data, subject, roi, {"atlas": atlas or "", **attrs}).assign_coords(dims)
    return with_atlas(new, load_atlas(atlas)) if "roi" in roi and atlas else new


def _load_parts(parts, like):
    """Arrays of some rows, NaN where a row has none."""
    shapes = {name: (len(parts), *v.shape[1:]) for name, v in like.data_vars.items()}
    out = {name: np.full(shape, np.nan, "float32") for name, shape in shapes.items()}
    for i, part in enumerate(parts):
        with np.load(part) as file:
            for name in {*out} & {*file.files}:
                out[name][(i, *map(slice, file[name].shape))] = file[name]
    return out


def _rows_in(out, made_by):
    """Ids of the rows that a store has, which must have been made with the same options."""
    if not out.exists():
        return set()
    group = zarr.open_group(out, mode="r")
    before = json.loads(group.attrs.get("preprocessing", "{}"))
    if before != made_by:
        differ = sorted(k for k in made_by if before.get(k) != made_by[k])
        asked, found = ({k: o.get(k) for k in differ} for o in (made_by, before))
        fact = f"Expected {out} to be prepared with {asked}, found {found}"
        raise InputError(fact, "Give the same options, or another path")
    return set(group["subject"][: count_written(out)].tolist())
