"""The one row store: a Dataset in zarr v3 whose rows (subjects) are written in any order.

Cohorts and latents are such stores. `create_store` writes labels and empty arrays, `write_rows`
fills the rows that are still `unwritten`, `finish` declares the store complete. A run that was
killed goes on with the unwritten rows, and several processes may write different blocks.
"""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Callable, Hashable, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path

import dask
import dask.array as da
import numpy as np
import pandas as pd
import xarray as xr
import zarr
from dask.callbacks import Callback

from bhx.data.atlas import TRAVELS, atlas_of
from bhx.data.files import attempt
from bhx.errors import InputError, listed
from bhx.schema import UNITS, check, check_finished, plain_labels, subject_coords
from bhx.settings import __version__

SHARD_BYTES = 64e6  # of one file of a sharded store; one file a subject chokes file systems


def save_cohort(cohort: xr.Dataset, path, *, half=()) -> Path:
    """Write a cohort as a zarr v3 store that xarray alone can open.

    One chunk a subject, many chunks a file (shards); chunks that hold only NaN are not written;
    text is of variable length. Subjects are written block by block, so memory does not grow with
    the cohort, and `attrs["complete"]` turns true at the very end. A call that was killed is
    continued by the same call.

    Parameters
    ----------
    cohort : lazy or in memory
    path : of the new store
    half : variables to store in half precision, such as "t1"; they are float32 again when opened
    """
    check(cohort, "cohort")
    path = Path(path)
    if not path.exists():
        create_store(cohort, path, half=half)
    elif not _was_begun(path, cohort):
        raise InputError(f"Expected a new path, found something at {path}", "Choose another name")
    fill(path, lambda rows: cohort.isel(subject=rows)[list(cohort.data_vars)].compute())
    return path


def create_store(dataset: xr.Dataset, path, *, half=(), sharded: bool = True) -> None:
    """Write a Dataset's labels, and empty arrays for its variables; it appears whole or not at all.

    Parameters
    ----------
    dataset : variables (subject, ...), of which only shapes and dtypes are read; floats are stored
        as float32 and are NaN until they are written, bools are False
    path : of the store, which must not exist
    half : names of variables to store as float16
    sharded : many rows a file, up to SHARD_BYTES; False stores each row in a file of its own
    """
    from zarr.codecs import BloscCodec

    encoding: dict[Hashable, dict] = {}
    empty = {}
    for name, v in dataset.data_vars.items():
        dtype, codec = v.dtype, BloscCodec(cname="lz4", clevel=1, shuffle="shuffle")
        file = chunk = (1, *(max(n, 1) for n in v.shape[1:]))
        more: dict = {"chunks": chunk, "compressors": (codec,)}
        if v.dtype.kind == "f":
            more["fill_value"], dtype = np.nan, np.dtype("f2" if name in half else "f4")
        if sharded:
            rows = 2 ** np.floor(np.log2(SHARD_BYTES / max(v[0].nbytes, 1)))
            file = more["shards"] = (int(np.clip(rows, 1, 256)), *chunk[1:])
        encoding[name] = more
        empty[name] = (v.dims, da.empty(v.shape, dtype=dtype, chunks=file), v.attrs)
    coords = {name: as_text(c) for name, c in dataset.coords.items()}
    store = xr.Dataset(empty, coords, {**dataset.attrs, "complete": False, "rows_written": 0})
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    store.to_zarr(part, mode="w", consolidated=False, encoding=encoding, compute=False)
    os.replace(part, path)


def unwritten(path) -> list[slice]:
    """Blocks of rows that are still to be written, in order.

    A block is what one file holds, so that several processes can write different blocks; without
    shards it is one row.
    """
    with xr.open_zarr(path, chunks=None, consolidated=False) as store:
        n, first = store.sizes["subject"], store.attrs["rows_written"]
        files = [v.encoding["shards"] or v.encoding["chunks"] for v in store.data_vars.values()]
    step = max(file[0] for file in files)
    starts = [first, *range((first // step + 1) * step, n, step)]
    blocks = [slice(a, b) for a, b in zip(starts, [*starts[1:], n], strict=True) if a < b]
    written = _marked_rows(path)
    return [b for b in blocks if not written.issuperset(range(b.start, b.stop))]


def write_rows(path, rows: slice, arrays: Mapping) -> None:
    """Write arrays (row, ...) by variable name, then mark these rows as written.

    Variables that are not given stay empty (NaN), and so does what lies behind a shorter array.
    """
    group = zarr.open_group(path, mode="r+", use_consolidated=False)
    for name, values in arrays.items():
        values = np.asarray(values)
        group[name][(rows, *map(slice, values.shape[1:]))] = values
    _markers(path).mkdir(exist_ok=True)
    (_markers(path) / f"{rows.start}-{rows.stop}").touch()


def fill(path, arrays_of: Callable) -> None:
    """Write every row that is still to be written, a block at a time, and finish the store.

    `arrays_of(rows)` gets a slice and returns what `write_rows` takes.
    """
    for rows in unwritten(path):
        write_rows(path, rows, arrays_of(rows))
    finish(path)


def finish(path) -> None:
    """Declare a store complete; from then on it opens. What killed writers left half is removed."""
    for part in Path(path).rglob("*.partial"):
        part.unlink(missing_ok=True)
    group = zarr.open_group(path, mode="r+", use_consolidated=False)
    group.attrs.update(complete=True, rows_written=group["subject"].shape[0])
    shutil.rmtree(_markers(path), ignore_errors=True)


def count_written(path) -> int:
    """How many rows from the first one on are written without a gap."""
    todo = unwritten(path)
    return todo[0].start if todo else zarr.open_array(Path(path) / "subject", mode="r").shape[0]


def extend_store(new: xr.Dataset, path) -> None:
    """Make room for new rows behind those that are written; `write_labels` writes their labels.

    Only `time` may be longer or shorter than in the store; other dims must have the same labels.
    """
    n = count_written(path)
    group = zarr.open_group(path, mode="r+", use_consolidated=False)
    if surplus := {*new.variables} - {*subject_coords(new)} - {*group.array_keys()}:
        found = listed(sorted(surplus))
        fact = f"Expected new subjects with the data of {path}, found also {found}"
        raise InputError(fact, "Prepare all subjects together into a new store")
    for dim in {*new.dims} - {"subject", "time"}:
        if dim in new.coords and group[dim][:].tolist() != new[dim].values.tolist():
            fact = f"Expected the labels of {path} on '{dim}', found others in the new subjects"
            raise InputError(fact, "Prepare them into another store")
    group.attrs.update(complete=False, rows_written=n)
    shutil.rmtree(_markers(path), ignore_errors=True)
    longest = max(new.sizes.get("time", 0), group["time"].shape[0] if "time" in group else 0)
    for name, array in group.arrays():
        dims = array.metadata.dimension_names
        size = {"subject": n + new.sizes["subject"], "time": longest}
        array.resize(tuple(size.get(d, m) for d, m in zip(dims, array.shape, strict=True)))
        if name == "time":
            array[:] = np.arange(longest)


def mend(path) -> None:
    """Give all arrays one length again, if `extend_store` was killed between them."""
    group = zarr.open_group(path, mode="r+", use_consolidated=False)
    shortest: dict[str, int] = {}
    for _, array in group.arrays():
        for dim, n in zip(array.metadata.dimension_names, array.shape, strict=True):
            shortest[dim] = min(n, shortest.get(dim, n))
    for _, array in group.arrays():
        shape = tuple(shortest[dim] for dim in array.metadata.dimension_names)
        if shape != array.shape:
            array.resize(shape)


def write_labels(path, labels: Mapping) -> None:
    """Write labels (name -> values of every row) where they differ; a new one, or one of another
    type, is made anew."""
    group = zarr.open_group(path, mode="r+", use_consolidated=False)
    for name, values in labels.items():
        values = np.asarray(values)
        kinds, array = "UOT" if values.dtype.kind in "UOT" else values.dtype.kind, group.get(name)
        if array is None or array.dtype.kind not in kinds or array.shape != values.shape:
            how: dict = {"shape": values.shape, "dtype": str if "U" in kinds else values.dtype}
            how |= {"attributes": {"units": UNITS[name]} if name in UNITS else {}}
            array = group.create_array(name, dimension_names=["subject"], overwrite=True, **how)
            for one in (group, *dict(group.arrays()).values()):  # where xarray lists coordinates
                listed_there = str(one.attrs.get("coordinates", "")).split()
                if "participant" in listed_there and name not in listed_there:
                    one.attrs["coordinates"] = " ".join([*listed_there, name])
        values = values.astype(object) if "U" in kinds else values
        if not pd.Series(array[:].tolist()).equals(pd.Series(values.tolist())):
            array[:] = values


def open_store(path, kind: str = "cohort") -> xr.Dataset:
    """A zarr store as a checked Dataset: data lazy, labels in memory and as plain text.

    `kind` is "cohort" or "latents" (see `bhx.schema.check`).
    """
    path = Path(path)
    if not (path / "zarr.json").exists():
        found = "no zarr.json" if path.exists() else "nothing"
        fact = f"Expected a zarr v3 store at {path}, found {found}"
        writers = {"cohort": "bhx.save_cohort or bhx.prepare", "latents": "bhx.embed(store=...)"}
        raise InputError(fact, f"Write one with {writers[kind]}")
    check_finished(zarr.open_group(path, mode="r", use_consolidated=False).attrs, kind)
    data = xr.open_zarr(path, chunks={}, consolidated=False)
    half = [name for name, v in data.data_vars.items() if v.dtype == "float16"]
    data = data.assign({n: data[n].astype("float32") for n in half})
    data.attrs = {k: v for k, v in data.attrs.items() if k not in ("complete", "rows_written")}
    # without encoding: xarray writes it anew as it likes
    out = check(plain_labels(data.drop_encoding()), kind)
    if f"{TRAVELS}label" in out.coords:
        atlas_of(out)  # is known by its name from now on
    return out


@contextmanager
def only_writer(path):
    """Hold the lock of a store, which the system frees when a process dies; a full disk is said."""
    from filelock import FileLock, Timeout

    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(path.with_name(f".{path.name}.lock"), timeout=0):
            yield
    except Timeout as error:
        fact = f"Expected to be the only writer of {path}, found another process"
        raise InputError(fact, "Run this again when that process has ended") from error
    except OSError as error:
        fact = f"Expected to write {path}, found {error}"
        help = "Make room, or mend what this says; the same call then continues where it stopped"
        raise InputError(fact, help) from error


def compute_each(tasks, client, tick: Callable, workers: int = 1) -> list:
    """Results of Dask tasks, calling `tick` as each one ends; of one that failed on a cluster, what
    it says.

    Parameters
    ----------
    client : a dask.distributed Client, the address of a cluster, or None for `workers` threads
    """
    if client is None:
        with Callback(posttask=lambda *_: tick()):
            return list(dask.compute(*tasks, scheduler="threads", num_workers=workers))
    from distributed import Client, KilledWorker, as_completed, wait

    with attempt("a Dask cluster that answers", "Start one, or correct the address"):
        own = Client(client, timeout="10s") if isinstance(client, str) else nullcontext(client)
    with own as cluster:
        with attempt(f"bhx {__version__} on every worker", "Install the same version there"):
            found = cluster.run(_version).values()
        if not found:
            warnings.warn("The Dask cluster has no worker yet; waits for one", stacklevel=2)
        if versions := {*found} - {__version__}:
            fact = f"Expected bhx {__version__} on every worker, found {listed(versions)}"
            raise InputError(fact, "Install the same version there")
        futures = cluster.compute(list(tasks))
        for _ in as_completed(futures, raise_errors=False):
            tick()
        for future in futures:  # alone: who shared a worker with its killer is not to blame
            if future.status == "error" and isinstance(future.exception(), KilledWorker):
                cluster.retry([future])
                wait([future])
        return [str(f.exception()) if f.status == "error" else f.result() for f in futures]


def _version():
    return __version__


def as_text(coord: xr.DataArray) -> xr.Variable:
    """Text of variable length for the store; numbers as they are."""
    if coord.dtype.kind not in "UOT":
        return coord.variable.compute()
    return xr.Variable(coord.dims, coord.values.astype(str).astype(object), coord.attrs)


def _markers(path):
    """Folder of empty files "start-stop", one for each call of `write_rows`; it lies where zarr
    looks for nothing, and is gone from a finished store."""
    return Path(path) / "subject" / "written"


def _marked_rows(path):
    spans = [map(int, file.name.split("-")) for file in _markers(path).glob("*-*")]
    return {row for span in spans for row in range(*span)}


def _was_begun(path, cohort):
    """Whether a store is the unfinished one of this cohort."""
    if not (path / "zarr.json").exists():
        return False
    with xr.open_zarr(path, chunks=None, consolidated=False) as store:
        begun = store.attrs.get("complete") is False and store.sizes == cohort.sizes
        alike = {*store.data_vars} == {*cohort.data_vars}
        return begun and alike and store.subject.values.tolist() == cohort.subject.values.tolist()
