"""Cohorts as zarr v3 stores: created, extended, filled row by row, opened."""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path

import dask.array as da
import numpy as np
import xarray as xr
import zarr

from bhx.errors import InputError, listed
from bhx.schema import check, dims_of, plain_labels

SHARD_BYTES = 64e6  # of one file of a store; a store of one file a subject chokes file systems


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
    create_store(cohort, path, t1_dtype)
    write_rows(path, lambda rows: cohort.isel(subject=rows)[list(cohort.data_vars)].compute())
    return path


def create_store(cohort, path, t1_dtype):
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
    coords = {name: as_text(c) for name, c in cohort.coords.items()}
    store = xr.Dataset(empty, coords, attrs)
    store.to_zarr(path, mode="w", consolidated=False, encoding=encoding, compute=False)


def extend_store(new, path):
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
            array[n:] = as_text(new[name]).values.astype(array.dtype)


def write_rows(path, read):
    """Fill a store's rows from the first unwritten one, whole files at a time; then mark it.

    `read` takes a slice of rows and returns arrays by variable name.
    """

    group = zarr.open_group(path, mode="r+")
    arrays = {n: a for n, a in group.arrays() if n in dims_of("cohort")}
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


@contextmanager
def only_writer(out):
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


def open_store(path):
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


def as_text(coord):
    """Text of variable length for the store; numbers as they are."""
    if coord.dtype.kind not in "UOT":
        return coord.variable.compute()
    values = np.array([str(v) for v in coord.values.ravel()], object).reshape(coord.shape)
    return xr.Variable(coord.dims, values, coord.attrs)
