"""Laws of the row store: rows in any order, by any process, and no trace of an interruption."""

import os
import subprocess
import sys
import warnings
from pathlib import Path
from threading import Timer

import dask.array as da
import numpy as np
import pytest
import xarray as xr

from bhx.data import store as store_file
from bhx.data.store import compute_each
from bhx.errors import InputError


def latents(n=5):
    """Latents whose arrays have shapes and dtypes, but no values."""
    variables = {
        "hub": (("subject", "token", "feature"), da.empty((n, 4, 3), dtype="float32")),
        "valid": (("subject", "patch"), da.empty((n, 6), dtype=bool)),
    }
    onset = (("subject", "patch"), np.arange(6.0 * n).reshape(n, 6))
    subject = [f"sub-{'x' * i}" for i in range(n)]
    return xr.Dataset(variables, {"subject": subject, "onset": onset}, {"model": "test"})


def values(row):
    return {"hub": np.full((1, 4, 3), row, "float32"), "valid": np.full((1, 6), row % 2 == 0)}


def files_of(store):
    return {
        str(p.relative_to(store)): p.read_bytes() for p in Path(store).rglob("*") if p.is_file()
    }


def written_in_order(path, n=5):
    store_file.create_store(latents(n), path, sharded=False)
    for row in range(n):
        store_file.write_rows(path, slice(row, row + 1), values(row))
    store_file.finish(path)
    return path


def test_without_shards_a_block_is_a_row_with_a_file_of_its_own(tmp_path):
    path = written_in_order(tmp_path / "a.zarr")
    assert len([*(path / "hub" / "c").glob("*/0/0")]) == 5
    again = store_file.open_store(path, "latents")
    np.testing.assert_array_equal(again.hub[:, 0, 0], np.arange(5))
    np.testing.assert_array_equal(again.valid[:, 0], [True, False, True, False, True])
    assert again.subject.values.tolist() == latents().subject.values.tolist()
    assert store_file.unwritten(path) == []


def test_rows_in_any_order_and_after_a_break_give_the_same_bytes(tmp_path):
    path = tmp_path / "b.zarr"
    store_file.create_store(latents(), path, sharded=False)
    for row in (3, 0):
        store_file.write_rows(path, slice(row, row + 1), values(row))
    assert store_file.unwritten(path) == [slice(1, 2), slice(2, 3), slice(4, 5)]
    assert store_file.count_written(path) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(InputError, match=r"still being written.*Run the same call"):
            store_file.open_store(path, "latents")
    for rows in store_file.unwritten(path):
        store_file.write_rows(path, rows, values(rows.start))
    store_file.finish(path)
    assert files_of(path) == files_of(written_in_order(tmp_path / "a.zarr"))


def test_what_is_not_written_is_missing(tmp_path):
    path = tmp_path / "a.zarr"
    store_file.create_store(latents(2), path, sharded=False)
    store_file.write_rows(path, slice(0, 2), {"hub": np.ones((2, 3, 3), "float32")})
    store_file.finish(path)
    again = store_file.open_store(path, "latents")
    np.testing.assert_array_equal(np.isnan(again.hub[0, :, 0]), [False, False, False, True])
    assert not again.valid.any()


def test_several_processes_write_different_blocks(tmp_path):
    path = tmp_path / "a.zarr"
    store_file.create_store(latents(4), path, sharded=False)
    writer = "import sys; sys.path.insert(0, sys.argv[1])\n"
    writer += "from test_store import store_file, values\n"
    writer += "for row in map(int, sys.argv[3:]):\n"
    writer += "    store_file.write_rows(sys.argv[2], slice(row, row + 1), values(row))\n"
    command = [sys.executable, "-c", writer, str(Path(__file__).parent), str(path)]
    both = [subprocess.Popen([*command, *rows]) for rows in (("0", "2"), ("1", "3"))]
    assert [process.wait(60) for process in both] == [0, 0]
    store_file.finish(path)
    assert files_of(path) == files_of(written_in_order(tmp_path / "b.zarr", 4))


def test_a_cluster_without_workers_is_said_and_waited_for():
    from dask import delayed
    from distributed import Client, LocalCluster

    cluster = LocalCluster(n_workers=0, processes=False, dashboard_address=None)
    with cluster, Client(cluster) as client:
        later = Timer(2, cluster.scale, [1])
        later.start()
        with pytest.warns(UserWarning, match="has no worker yet; waits for one"):
            assert compute_each([delayed(sum)([1, 2])], client, lambda: None) == [3]
        later.join()


def perish(here):
    """End this process, unless it is the one that asks."""
    if os.getpid() != here:
        os._exit(9)


def test_a_task_that_kills_its_worker_takes_no_other_with_it():
    from dask import delayed
    from distributed import Client

    tasks = [delayed(abs)(-1), delayed(perish)(os.getpid()), delayed(abs)(-2)]
    with Client(n_workers=1, threads_per_worker=1, dashboard_address=None) as client:
        one, killed, two = compute_each(tasks, client, lambda: None)
    assert (one, two) == (1, 2)
    assert "all those workers died" in killed
