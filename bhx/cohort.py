"""A cohort: opened from the catalogue or a store, saved, cut into scans and splits.

Datasets go in and come out; one subject's files are read in `scans`. Data stay lazy (Dask) until
somebody computes them; labels are in memory.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from contextlib import contextmanager, nullcontext
from pathlib import Path

import dask
import dask.array as da
import numpy as np
import pandas as pd
import xarray as xr
import zarr

from bhx import folders
from bhx.atlas import load_atlas, load_sample
from bhx.catalog import catalog_files, entry_rows, find_scans, load_entry
from bhx.scans import FILES, fetch_labels, is_volume, read_scan, read_template_t1
from bhx.schema import (
    DIMS,
    ROI_COORDS,
    T1_SHAPE,
    InputError,
    build_cohort,
    check,
    listed,
    plain_labels,
)

SHARD_BYTES = 64e6  # of one file of a store; a store of one file a subject chokes file systems
FLOAT16_RANGE = (0.1, 6e4)  # of a T1's highest intensity; others are scaled to keep precision
DENOISING = {"strategy": "simple"}


def open_cohort(name_or_path, *, catalog=None, voxel_mm=None) -> xr.Dataset:
    """Open a cohort lazily.

    Parameters
    ----------
    name_or_path : name of a catalogue entry ("synthetic", "abide1", ...), path of a zarr store, or
        a folder of derivatives, which is prepared into bhx's cache folder first (see `prepare`)
    catalog : folder with catalogue entries of your own
    voxel_mm : average the T1 to voxels of this size [mm]; as stored by default

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
        cohort = _open_entry(load_entry(str(name_or_path), catalog))
    elif is_store:
        cohort = _open_store(path)
    else:
        cohort = _prepared(path.name, path)
    return cohort if voxel_mm is None else coarsen_t1(check(cohort, "cohort"), voxel_mm)


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
    if "bold" not in cohort or not row.has_bold:
        raise InputError(f"Expected a scan with BOLD, found none for '{subject}'", "See has_bold")
    bold = row.bold.isel(time=slice(0, int(row.n_volumes)))
    seconds = ("time", np.arange(bold.sizes["time"]) * float(row.tr), {"units": "s"})
    return bold.assign_coords(time=seconds)


def split(
    cohort: xr.Dataset,
    *,
    shares: dict[str, float] | None = None,
    stratify: str | list[str] = (),
    leave_out: str | None = None,
    repeats: int = 1,
    seed: int = 0,
    path=None,
) -> xr.DataArray:
    """Cut a cohort into parts by participant: all scans of one participant share a part.

    Parameters
    ----------
    shares : share of the participants in each part, by default train 0.6, validation 0.2, test 0.2
    stratify : subject coordinates whose combinations every part gets its share of, such as
        ["site", "diagnosis"]; a participant counts with its first scan
    leave_out : subject coordinate, such as "site": one repeat for each of its values, whose
        participants are "test" and all others "train"
    repeats, seed : how many independent cuts, and where the random numbers start
    path : of a JSON file that keeps the split with the cohort's hash; when it is there already, the
        split is read from it

    Returns
    -------
    DataArray (repeat, subject) of part names; `cohort.sel(subject=parts[0] == "train")`

    Raises
    ------
    InputError
        A coordinate is missing, the shares do not sum to 1, a participant has two values of
        `leave_out`, or the kept split was made from other subjects or with other options.
    """
    check(cohort, "cohort")
    shares = shares or {"train": 0.6, "validation": 0.2, "test": 0.2}
    stratify = [stratify] if isinstance(stratify, str) else list(stratify)
    _check_split(cohort, shares, stratify, leave_out)
    made_by = {
        "cohort_sha256": cohort_hash(cohort),
        "seed": seed,
        "shares": shares,
        "stratify": stratify,
        "leave_out": leave_out,
        "repeats": repeats,
    }
    if path is not None and Path(path).exists():
        return _read_split(path, made_by)
    names = [*stratify, leave_out] if leave_out else stratify
    rows = pd.DataFrame({name: cohort[name].values for name in ["participant", *names]})
    people = rows.drop_duplicates("participant").set_index("participant")
    if leave_out:
        values = people[leave_out]
        cuts = {v: np.where(values == v, "test", "train") for v in sorted(values.unique())}
    else:
        cuts = {i: _cut(people, shares, seed + i) for i in range(repeats)}
    parts = [pd.Series(cut, people.index)[rows.participant].to_numpy(str) for cut in cuts.values()]
    coords = {"repeat": list(cuts), "subject": cohort.subject.values}
    if path is not None:
        kept = {"repeat": list(cuts), "subject": cohort.subject.values.tolist()}
        kept |= {"part": [part.tolist() for part in parts], "made_by": made_by}
        Path(path).write_text(json.dumps(kept, indent=1, default=str), encoding="utf8")
    return xr.DataArray(np.stack(parts), coords, ("repeat", "subject"), "part", made_by)


def cohort_hash(cohort: xr.Dataset) -> str:
    """SHA-256 of who is in a cohort: the ids and participants of its rows, in their order."""
    rows = zip(cohort.subject.values.tolist(), cohort.participant.values.tolist(), strict=True)
    return hashlib.sha256(json.dumps(list(rows)).encode()).hexdigest()


def _cut(people, shares, seed):
    """A part for each participant: strata in turn, each member to the part furthest behind."""
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(people))
    if len(people.columns):
        strata = people.astype(str).agg(" / ".join, axis=1).to_numpy(str)
        order = order[np.argsort(strata[order], kind="stable")]
    names, wanted = list(shares), np.array(list(shares.values()))
    given, parts = np.zeros(len(names)), np.empty(len(people), object)
    for i, person in enumerate(order):
        behind = int(np.argmax(wanted * (i + 1) - given))
        given[behind] += 1
        parts[person] = names[behind]
    return parts


def _check_split(cohort, shares, stratify, leave_out):
    for name in [*stratify, *([leave_out] if leave_out else [])]:
        if name not in cohort.coords or cohort[name].dims != ("subject",):
            on_subject = [n for n, c in cohort.coords.items() if c.dims == ("subject",)]
            fact = f"Expected a coordinate on subject to split by, found '{name}'"
            raise InputError(fact, f"This cohort has {listed(on_subject, 20)}")
    if not np.isclose(sum(shares.values()), 1) or min(shares.values()) <= 0:
        fact = f"Expected positive shares that sum to 1, found {shares}"
        raise InputError(fact, "Give for instance shares={'train': 0.8, 'test': 0.2}")
    if leave_out:
        several = pd.Series(cohort[leave_out].values).groupby(cohort.participant.values).nunique()
        if (several > 1).any():
            fact = f"Expected one {leave_out} for each participant, found several for "
            fact += f"{listed(several.index[several > 1])}"
            raise InputError(fact, f"Choose the scans of one {leave_out} for them")


def _read_split(path, made_by):
    """A kept split, when it was made from these subjects with these options."""
    kept = json.loads(Path(path).read_text(encoding="utf8"))
    for name, value in made_by.items():
        if kept["made_by"].get(name) != value:
            raise InputError(
                f"Expected the split in {path} to be made with {name}={value}, found "
                f"{kept['made_by'].get(name)}",
                "Give the same subjects and options, or another path for a new split",
            )
    coords = {"repeat": kept["repeat"], "subject": kept["subject"]}
    return xr.DataArray(np.array(kept["part"]), coords, ("repeat", "subject"), "part", made_by)


def coarsen_t1(cohort: xr.Dataset, voxel_mm: float) -> xr.Dataset:
    """The cohort with its T1 averaged in blocks to voxels of `voxel_mm`, lazily."""
    if "t1" not in cohort:
        return cohort
    fold = voxel_mm * cohort.sizes["x"] / T1_SHAPE[0]
    if fold != int(fold) or fold < 1 or any(cohort.sizes[axis] % fold for axis in "xyz"):
        raise InputError(
            f"Expected a T1 voxel that is a multiple of {T1_SHAPE[0] / cohort.sizes['x']:g} mm and "
            f"divides the {T1_SHAPE} mm grid, found {voxel_mm:g} mm",
            "Take 1, 2, 4, 8, 16 or 32 mm",
        )
    t1 = cohort.t1.coarsen(x=int(fold), y=int(fold), z=int(fold)).mean()
    return cohort.drop_dims(["x", "y", "z"]).assign(t1=t1.astype("float32"))


def save_cohort(cohort: xr.Dataset, path, *, t1_dtype="float32") -> Path:
    """Write a cohort as a zarr v3 store that xarray alone can open.

    One chunk a subject, many chunks a file (shards); chunks that hold only NaN are not written;
    text is of variable length. Subjects are written block by block, so memory does not grow with
    the cohort, and `attrs["complete"]` turns true at the very end.

    Parameters
    ----------
    cohort : lazy or in memory
    path : of the new store
    t1_dtype : "float32" or "float16"
    """
    check(cohort, "cohort")
    path = Path(path)
    if path.exists():
        raise InputError(f"Expected a new path, found something at {path}", "Choose another name")
    _create_store(cohort, path, t1_dtype)
    _write_rows(path, lambda rows: cohort.isel(subject=rows)[list(cohort.data_vars)].compute())
    return path


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
    with _only_writer(out):
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
    return open_cohort(out)


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
        _extend_store(new, out)
    else:
        unfinished = next(iter(parts.values())).with_name("store")
        _create_store(new, unfinished, "float16")
        os.replace(unfinished, out)
    ids = zarr.open_array(out / "subject", mode="r")[:].tolist()
    _write_rows(out, lambda rows: _load_parts([parts[i] for i in ids[rows]], new))


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
    return build_cohort(bold, t1, subject, roi, attrs, made_by["voxel_mm"])


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


def _create_store(cohort, path, t1_dtype):
    """Write labels and empty arrays for a cohort."""
    from zarr.codecs import BloscCodec

    encoding, empty = {}, {}
    for name, v in cohort.data_vars.items():
        each = 2 ** np.floor(np.log2(SHARD_BYTES / v[0].nbytes))
        chunks, shards = (1, *v.shape[1:]), (int(np.clip(each, 1, 256)), *v.shape[1:])
        dtype = t1_dtype if name == "t1" else "float32"
        empty[name] = (v.dims, da.empty(v.shape, dtype=dtype, chunks=shards), v.attrs)
        encoding[name] = {"chunks": chunks, "shards": shards, "fill_value": np.nan}
        encoding[name]["compressors"] = (BloscCodec(cname="lz4", clevel=1, shuffle="shuffle"),)
    attrs = {**cohort.attrs, "complete": False, "rows_written": 0}
    coords = {name: _text(c) for name, c in cohort.coords.items()}
    store = xr.Dataset(empty, coords, attrs)
    store.to_zarr(path, mode="w", consolidated=False, encoding=encoding, compute=False)


def _extend_store(new, path):
    """Make room for new rows behind those of a store, and write their labels."""

    group = zarr.open_group(path, mode="r+")
    n = group.attrs["rows_written"]
    surplus = {*new.coords, *new.data_vars} - {*group.array_keys()}
    if surplus:
        fact = f"Expected new subjects with the labels of {path}, found also "
        fact += f"{listed(sorted(surplus))}"
        raise InputError(fact, "Prepare all subjects into a new store")
    if "roi" in new.coords and group["roi"][:].tolist() != new.roi.values.tolist():
        fact = f"Expected the parcels of {path}, found others in the new subjects"
        raise InputError(fact, "Prepare them into another store")
    group.attrs["complete"] = False
    longest = max(new.sizes.get("time", 0), group["time"].shape[0] if "time" in group else 0)
    for name, array in group.arrays():
        dims = array.metadata.dimension_names
        size = {"subject": n + new.sizes["subject"], "time": longest}
        array.resize(tuple(size.get(d, m) for d, m in zip(dims, array.shape, strict=True)))
        if name == "time":
            array[:] = np.arange(longest)
        elif dims == ("subject",) and name in new.coords:
            array[n:] = _text(new[name]).values.astype(array.dtype)


def _write_rows(path, read):
    """Fill a store's rows from the first unwritten one, whole files at a time; then mark it.

    `read` takes a slice of rows and returns arrays by variable name.
    """

    group = zarr.open_group(path, mode="r+")
    arrays = {n: a for n, a in group.arrays() if n in DIMS["cohort"]}
    step = max(a.shards[0] for a in arrays.values())
    start, end = group.attrs["rows_written"], group["subject"].shape[0]
    while start < end:
        stop = min(end, (start // step + 1) * step)
        block = read(slice(start, stop))
        for name in block:  # what these rows do not have at all stays unwritten: NaN
            values, array = np.asarray(block[name]), arrays[name]
            array[(slice(start, stop), *map(slice, values.shape[1:]))] = values
        group.attrs["rows_written"] = start = stop
    group.attrs["complete"] = True


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
    return set(group["subject"][: group.attrs["rows_written"]].tolist())


@contextmanager
def _only_writer(out):
    """Hold the lock of a store, which the system frees when a process dies."""
    from filelock import FileLock, Timeout

    out.parent.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(out.with_name(f".{out.name}.lock"), timeout=0):
            yield
    except Timeout as error:
        raise InputError(
            f"Expected to be the only writer of {out}, found another", "Wait"
        ) from error


def _open_store(path):
    """A zarr store as a checked cohort: data lazy, labels in memory and as plain text."""
    if not (path / "zarr.json").exists():
        found = "no zarr.json" if path.exists() else "nothing"
        fact = f"Expected a zarr v3 store at {path}, found {found}"
        raise InputError(fact, "Write one with bhx.save_cohort or bhx.prepare")
    cohort = xr.open_zarr(path, chunks={}, consolidated=False)
    if not cohort.attrs.get("complete", True):
        raise InputError(
            f"Expected a finished store at {path}, found {cohort.attrs.get('rows_written', 0)} of "
            f"{cohort.sizes.get('subject', 0)} subjects written",
            "Run the call that writes it again",
        )
    cohort = plain_labels(cohort)
    if "t1" in cohort:
        cohort["t1"] = cohort.t1.astype("float32")
    return check(cohort, "cohort")


def _text(coord):
    """Text of variable length for the store; numbers as they are."""
    if coord.dtype.kind not in "UOT":
        return coord.variable.compute()
    values = np.array([str(v) for v in coord.values.ravel()], object).reshape(coord.shape)
    return xr.Variable(coord.dims, values, coord.attrs)


def _open_entry(entry):
    """A cohort of the catalogue: made, or fetched or found and then prepared."""
    from bhx.synthetic import synthetic_cohort

    if entry.layout == "synthetic":
        return synthetic_cohort(**entry.options)
    if entry.layout == "sample":
        return _open_sample(entry)
    rows = entry_rows(entry, folders()["data"])
    attrs = {"source": entry.name, "licence": entry.licence}
    return _prepared(entry.name, rows, attrs=attrs, **entry.prepare)


def _prepared(name, source, **options):
    """A folder or table, prepared into the cache folder."""
    place = str(Path(source).resolve()) if isinstance(source, Path) else "catalogue"
    key = hashlib.sha256(place.encode()).hexdigest()[:8]
    return prepare(source, folders()["cache"] / f"{name}-{key}.zarr", **options)


def _open_sample(entry):
    """The real scan of the atlas assets, and the MNI152 template as a subject with T1 only."""

    real = load_sample()
    atlas = load_atlas("schaefer400").sel(roi=real.roi.values)
    series = da.from_array(real.bold.values[None], chunks=-1)
    template = da.from_delayed(dask.delayed(read_template_t1)(), T1_SHAPE, "float32")[None]
    ids = [real.attrs["participant"], "mni152"]
    subject = {
        "subject": ids,
        "participant": ids,
        "site": ["leipzig", "montreal"],
        "tr": [real.attrs["tr"], np.nan],
        "n_volumes": [real.sizes["time"], 0],
        "has_bold": [True, False],
        "has_t1": [False, True],
    }
    about = {"source": entry.name, "licence": entry.licence}
    return build_cohort(
        da.concatenate([series, da.full_like(series, np.nan)]),
        da.concatenate([da.full_like(template, np.nan), template]),
        subject,
        {name: atlas[name].values for name in ("roi", *ROI_COORDS)},
        {"atlas": "schaefer400", **about, "preprocessing": real.attrs["preprocessing"]},
    )
