"""Files of many subjects to a cohort store, resumable; one subject's files in `bold`, `anatomy`."""

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

from bhx.data.anatomy import read_t1
from bhx.data.atlas import load_atlas
from bhx.data.bold import denoise, fetch_labels, is_volume, needs_denoising, read_bold, read_motion
from bhx.data.catalog import catalog_files, entry_rows, load_entry
from bhx.data.derivatives import find_scans
from bhx.data.files import FILES
from bhx.data.quality import judge_bold
from bhx.data.store import (
    count_written,
    create_store,
    extend_store,
    finish,
    only_writer,
    open_store,
    unwritten,
    write_rows,
)
from bhx.errors import InputError, listed
from bhx.modalities.bold import BOLD
from bhx.modalities.t1 import ANATOMY
from bhx.schema import ROI_COORDS, build_cohort
from bhx.settings import folders


def read_scan(
    row: dict,
    *,
    atlas: str | None = "schaefer400",
    voxel_mm: float = 1.0,
    denoising: dict | None = None,
    order: str | None = None,
    labels=None,
) -> tuple[xr.Dataset, list[str]]:
    """Read and judge the files of one row: BOLD on parcels, T1 on the grid, and what is odd.

    Parameters
    ----------
    row : paths under `bold`, `confounds`, `t1`, `t1_mask` (each may be missing), `tr` [s] where no
        file tells it, and any labels of the subject
    atlas, order, labels : see `read_bold`
    voxel_mm : voxel of the T1 [mm]
    denoising : options of `denoise` for BOLD that is not denoised yet; None leaves it as it is

    Returns
    -------
    Dataset with `bold (roi, time)` and `t1 (x, y, z)` as far as there are any, facts as attributes
    (tr, n_volumes, coverage, mean_fd, ...), and a list of warnings.

    Raises
    ------
    InputError
        The scan is refused.
    """
    given = {key: row[key] for key in FILES if row.get(key)}
    if "bold" not in given and "t1" not in given:
        raise InputError("Expected a row with BOLD or a T1, found neither", "Give the path of one")
    data, facts, warnings = {}, {"n_volumes": 0, "tr": np.nan}, []
    if "bold" in given:
        bold = read_bold(given["bold"], atlas, order=order, labels=labels, tr=row.get("tr"))
        known = row.get("mean_fd", np.nan)
        facts["mean_fd"] = read_motion(given["confounds"]) if "confounds" in given else known
        if denoising and needs_denoising(given["bold"]):
            bold = denoise(bold, given["bold"], given.get("confounds"), **denoising)
        data["bold"], judged, warnings = judge_bold(bold, facts["mean_fd"])
        facts |= judged | {"n_scrubbed": bold.attrs.get("n_scrubbed", 0)}
    if "t1" in given:
        data["t1"], odd = read_t1(given["t1"], given.get("t1_mask"), voxel_mm=voxel_mm)
        warnings = warnings + odd
    return xr.Dataset(data, attrs=facts), warnings


FLOAT16_RANGE = (0.1, 6e4)  # of a T1's highest intensity; others are scaled to keep precision
DENOISING = {"strategy": "simple"}


def prepare(
    source,
    out,
    *,
    atlas: str | None = "schaefer400",
    voxel_mm: float = 1.0,
    denoising: dict | None = DENOISING,
    order: str | None = None,
    labels=None,
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
    source : folder (see `catalog.find_scans`); catalogue entry, whose own options go before these;
        or a DataFrame with `subject`, `participant` and the paths `bold`, `confounds`, `t1`,
        `t1_mask` (each optional), `tr` [s], and any labels
    out : path of the zarr store, new or made with the same options
    atlas, order, labels : see `scans.read_bold`
    voxel_mm : voxel of the T1 [mm], stored masked, unscaled, in half precision
    denoising : options of `scans.denoise` for BOLD that is not denoised yet, or None
    task, phenotypes : see `catalog.find_scans`
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
    if isinstance(source, str) and source in catalog_files():
        entry = load_entry(source)
        made_by |= entry.prepare
        attrs = {"source": entry.name, "licence": entry.licence, **(attrs or {})}
        source = entry_rows(entry, folders()["data"])
    if not isinstance(source, pd.DataFrame):
        attrs = {"source": str(source), **(attrs or {})}
        source = find_scans(source, task=task, phenotypes=phenotypes)

    rows, out = check_rows(source), Path(out)
    with only_writer(out):
        have = _rows_in(out, made_by)
        rows = [row for row in rows if row["subject"] not in have]
        folder = out.with_name(out.name + ".parts")
        parts = {row["subject"]: _part(folder, row, made_by) for row in rows}
        refused = _stage(rows, parts, made_by, workers, client)
        if not have and len(refused) == len(rows):
            raise InputError(
                f"Expected at least one usable subject, found none among {len(rows)}; the first: "
                f"{next(iter(refused.values()))}",
                "See the reason, and prepare again",
            )
        parts = {subject: part for subject, part in parts.items() if subject not in refused}
        about = {"source": "table", "preprocessing": json.dumps(made_by), **(attrs or {})}
        if parts:
            _pack(parts, out, about)
        zarr.open_group(out, mode="r+").attrs["refused"] = refused
        shutil.rmtree(folder, ignore_errors=True)
    return open_store(out)


def check_rows(rows: pd.DataFrame) -> list[dict]:
    """Rows of a table of scans, complete and in the order of their unique ids."""
    rows = rows.copy()
    if "subject" not in rows and "participant" in rows:
        rows["subject"] = rows["participant"]
    if "subject" not in rows or not len(rows):
        fact = f"Expected rows with a column 'subject', found {len(rows)} rows with "
        fact += f"{listed(rows.columns, 20) or 'no columns'}"
        raise InputError(fact, "Name each row participant[/session][/run]")
    rows["subject"] = rows["subject"].astype(str)
    twice = rows["subject"][rows["subject"].duplicated()]
    if len(twice):
        fact = f"Expected unique subject ids, found {listed(twice.unique())} more than once"
        raise InputError(fact, "Name each row participant[/session][/run]")
    for name, default in {"participant": rows["subject"], "site": ""}.items():
        rows[name] = rows[name].fillna("").astype(str) if name in rows else default
    return rows.sort_values("subject").to_dict("records")


def _stage(rows, parts, options, workers, client):
    """Read every row that has no part yet, one task each; the reasons of those refused."""
    from tqdm.auto import tqdm

    todo = [row for row in rows if not parts[row["subject"]].exists()]
    if options["labels"] is None and any(is_volume(row.get("bold")) for row in todo):
        options = {**options, "labels": fetch_labels(options["atlas"])}
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
    if "t1" in arrays:
        top = float(np.abs(arrays["t1"]).max())
        if not FLOAT16_RANGE[0] < top < FLOAT16_RANGE[1]:
            arrays["t1"] = arrays["t1"] * np.float32(1000 / top)
            warnings = [*warnings, f"T1 intensities up to {top:g} scaled to 1000"]
        arrays["t1"] = arrays["t1"].astype("float16")
    if "bold" in arrays:
        arrays["roi"] = data.roi.values.astype(str)
    labels = {k: v for k, v in row.items() if k not in FILES} | data.attrs
    labels |= {f"has_{name}": name in arrays for name in ("bold", "t1")}
    labels["warnings"] = "; ".join(warnings)
    shapes = {name: v.shape for name, v in arrays.items()}
    unfinished = part.with_suffix(f".{os.getpid()}.tmp")
    part.parent.mkdir(exist_ok=True)
    with open(unfinished, "wb") as file:
        np.savez(file, about=json.dumps([labels, shapes], default=_in_json), **arrays)
    os.replace(unfinished, part)
    return None


def _in_json(value):
    """A label that JSON does not know: numpy's numbers as they are, dates and others as text."""
    return value.item() if hasattr(value, "item") else str(value)


def _part(folder, row, made_by):
    """The file of one row: another one when the row, its files or the options change."""
    files = [Path(row[k]) for k in FILES if row.get(k)]
    state = [(s.st_size, s.st_mtime_ns) for s in (f.stat() for f in files if f.is_file())]
    name = json.dumps([row, state, made_by], sort_keys=True, default=str)
    return folder / f"{hashlib.sha256(name.encode()).hexdigest()[:32]}.npz"


def _pack(parts, out, attrs):
    """Put the parts of new rows, by their ids, into the store."""

    new = _labels_of(parts.values(), attrs)
    if out.exists():
        extend_store(new, out)
    else:
        create_store(new, out, half=["t1"])
    ids = zarr.open_array(out / "subject", mode="r")[:].tolist()
    for rows in unwritten(out):
        write_rows(out, rows, _load_parts([parts[i] for i in ids[rows]], new))
    finish(out)


def _labels_of(parts, attrs):
    """A cohort with the labels of some parts and arrays of the right shape, not yet filled."""

    rows, shapes, roi = [], {}, None
    for part in parts:
        with np.load(part) as file:
            labels, sizes = json.loads(str(file["about"]))
            names = file["roi"] if "roi" in file.files else roi
        if roi is not None and names.tolist() != roi.tolist():
            fact = f"Expected the same parcels in every scan, found others in {labels['subject']}"
            raise InputError(fact, "Prepare scans of different atlases into different stores")
        roi = names
        rows.append(labels)
        for name in {"bold", "t1"} & {*sizes}:
            shapes[name] = np.maximum(shapes.get(name, sizes[name]), sizes[name]).tolist()
    bold, t1 = (
        da.full((len(rows), *shapes[name]), np.nan, "float32", chunks=(1, *shapes[name]))
        if name in shapes
        else None
        for name in ("bold", "t1")
    )
    table = pd.DataFrame(rows)
    text = table.select_dtypes(exclude=["number", "bool"]).columns
    table[text] = table[text].fillna("").astype(str)
    subject = {name: table[name].to_numpy(str if name in text else None) for name in table}
    made_by = json.loads(attrs["preprocessing"])
    attrs = {"atlas": made_by["atlas"] or "", **attrs}
    roi = {} if roi is None else {"roi": roi}
    if roi and made_by["atlas"]:
        atlas = load_atlas(made_by["atlas"]).sel(roi=roi["roi"])
        roi |= {name: atlas[name].values for name in ROI_COORDS}
    return build_cohort({BOLD.name: bold, ANATOMY.name: t1}, subject, roi, attrs)


def _load_parts(parts, like):
    """Arrays of some rows, NaN where a row has none."""
    shapes = {name: (len(parts), *v.shape[1:]) for name, v in like.data_vars.items()}
    out = {name: np.full(shape, np.nan, "float32") for name, shape in shapes.items()}
    for i, part in enumerate(parts):
        with np.load(part) as file:
            for name in out:
                if name in file.files:
                    out[name][(i, *map(slice, file[name].shape))] = file[name]
    return out


def _rows_in(out, made_by):
    """Ids of the rows that a store has, which must have been made with the same options."""

    if not out.exists():
        return set()
    group = zarr.open_group(out, mode="r")
    before = json.loads(group.attrs.get("preprocessing", "{}"))
    if before != made_by:
        differing = sorted(k for k in made_by if before.get(k) != made_by[k])
        asked, found = (
            ", ".join(f"{k}={options.get(k)!r}" for k in differing) for options in (made_by, before)
        )
        fact = f"Expected {out} to be prepared with {asked}, found {found}"
        raise InputError(fact, "Give the same options, or another path")
    return set(group["subject"][: count_written(out)].tolist())
