"""Speed and memory of cohorts: preparing them, reading them, and how both grow.

Four parts, each measured within one run so that its ratios hold on a loaded machine:
  prepare   small fMRIPrep-like folders (parcel tables and 1 mm T1) with 1 and with 2 workers
  read      subjects of a store, one at a time, beside numpy reading one .npy a subject of the same
            values; warm (files in memory) and cold (the system told to forget them)
  train     a training step of the workshop preset on a store, beside one on data in memory
  scale     opening, selecting and writing stores of 100 to 10,000 subjects, each in a process of
            its own; peak memory of that process

    python benchmarks/cohort.py [--subjects 12] [--out cohort.json]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

CORPUS = {"T1": 64_594, "BOLD": 70_933}  # scans that the released model was trained on


def main():
    """Measure, print, and write it where asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--subjects", type=int, default=12)
    parser.add_argument("--sizes", type=int, nargs="+", default=[100, 1000, 10_000])
    parser.add_argument("--out")
    parser.add_argument("--one-size", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if args.one_size:
            print(json.dumps(one_size(Path(folder), args.one_size)))
            return
        report = {
            "prepare": prepare_rates(Path(folder), args.subjects),
            "read": read_ratios(Path(folder)),
            "train": step_ratio(Path(folder)),
            "scale": [scale(n) for n in args.sizes],
        }
    report["corpus"] = corpus(report)
    text = json.dumps(report, indent=1)
    print(text)
    if args.out:
        Path(args.out).write_text(text)


def prepare_rates(folder, n):
    """Scans prepared a second, from reading to the finished store; T1 at 1 mm."""
    import bhx
    from bhx.data.derivatives import write_derivatives
    from bhx.data.prepare import prepare

    cohort = bhx.synthetic_cohort(n, atlas="schaefer400", voxel_mm=1.0, missing=0)
    write_derivatives(cohort, folder / "study", surface=False)
    rates = {}
    for workers in (1, 2):
        start = time.perf_counter()
        prepare(folder / "study", folder / f"{workers}.zarr", workers=workers)
        rates[f"{workers} workers, scans/s"] = round(n / (time.perf_counter() - start), 3)
    size = sum(f.stat().st_size for f in (folder / "1.zarr").rglob("*") if f.is_file())
    return rates | {"MB a subject in the store": round(size / n / 1e6, 2)}


def read_ratios(folder, n=24):
    """Time of numpy over time of the store, for the same values read subject by subject."""
    import zarr

    import bhx
    from bhx.data.store import save_cohort

    cohort = bhx.synthetic_cohort(n, atlas="schaefer400", voxel_mm=1.0, missing=0)
    store = save_cohort(cohort, folder / "read.zarr", half=["t1"])
    out = {}
    for name, dtype in (("bold", "float32"), ("t1", "float16")):
        array = zarr.open_array(store / name, mode="r")
        files = [folder / f"{name}{i}.npy" for i in range(n)]
        for i, file in enumerate(files):
            np.save(file, array[i].astype(dtype))
        shards = [f for f in (store / name).rglob("*") if f.is_file()]
        for state, forget in (("warm", False), ("cold", True)):
            ours = [_timed(array.__getitem__, range(n), forget and shards) for _ in range(3)]
            numpy = [_timed(np.load, files, forget and files) for _ in range(3)]
            out[f"{name}, {state}: ratio"] = round(np.median(numpy) / np.median(ours), 2)
            out[f"{name}, {state}: ms a subject"] = round(1e3 * np.median(ours) / n, 2)
        stored = sum(f.stat().st_size for f in shards)
        out[f"{name}: stored / in memory"] = round(stored / sum(f.stat().st_size for f in files), 2)
    return out


def step_ratio(folder, people=96, rounds=3):
    """Seconds of a step of the harmonizer's stage whose scans lie in a store, over those of one
    whose scans lie in memory, after a first pass over the people."""
    import bhx

    cohort = bhx.synthetic_cohort(people, seed=5).compute()
    sources = {"store": bhx.save_cohort(cohort, folder / "t.zarr", half=["t1"]), "memory": cohort}
    how = {"stage": "harmonizer", "batch": 16, "progress": False, "held_out": 0.1}
    how |= {"evaluate_every": 1000, "checkpoint_every": 1000}
    found = {name: [] for name in sources}
    for i in range(rounds):
        for name, source in sources.items():
            ends = []
            for steps in (8, 72):
                start = time.process_time()
                bhx.pretrain(source, out=folder / f"{name}{i}{steps}", steps=steps, **how)
                ends.append(time.process_time() - start)
            found[name].append((ends[1] - ends[0]) / 64)
    store, memory = (float(np.median(found[name])) for name in ("store", "memory"))
    return {"store / memory": round(store / memory, 2), "ms a step in memory": round(1e3 * memory)}


def _timed(read, keys, forget):
    for file in forget or ():
        with open(file, "rb") as open_file:
            os.fsync(open_file.fileno())
            os.posix_fadvise(open_file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    start = time.perf_counter()
    for key in keys:
        read(key)
    return time.perf_counter() - start


def scale(n):
    """One size in a process of its own, so that its peak memory is its own."""
    command = [sys.executable, __file__, "--one-size", str(n)]
    return json.loads(subprocess.run(command, capture_output=True, check=True).stdout)


def one_size(folder, n):
    """Write, open, select from and read a store of n subjects of 400 parcels x 120 volumes."""
    import dask.array as da

    from bhx.data.atlas import load_atlas, parcel_labels
    from bhx.data.cohort import open_cohort
    from bhx.data.store import save_cohort
    from bhx.schema import build_cohort

    atlas, ids = load_atlas("schaefer400"), [f"sub-{i:05d}" for i in range(n)]
    subject = {
        "subject": ids,
        "participant": ids,
        "site": np.array(["a", "b", "c"])[np.arange(n) % 3],
        "tr": np.full(n, 2.0),
        "n_volumes": np.full(n, 120),
        "has_bold": np.ones(n, bool),
        "has_t1": np.zeros(n, bool),
    }
    roi = parcel_labels(atlas)
    shape = (n, 400, 120)
    bold = da.random.default_rng(0).standard_normal(shape, dtype="float32", chunks=(1, 400, 120))
    cohort = build_cohort(
        {"bold": bold}, subject, roi, {"atlas": "schaefer400", "source": "benchmark"}
    )
    before = _peak_mb()
    start = time.perf_counter()
    path = save_cohort(cohort, folder / "c.zarr")
    wrote = time.perf_counter()
    opened = open_cohort(path)
    there = time.perf_counter()
    some = opened.sel(subject=opened.site == "b").isel(subject=slice(0, 50))
    selected = time.perf_counter()
    some.bold.isel(subject=slice(0, 20)).compute()
    read = time.perf_counter()
    return {
        "subjects": n,
        "write, ms a subject": round(1e3 * (wrote - start) / n, 2),
        "open, s": round(there - wrote, 3),
        "select, s": round(selected - there, 3),
        "read, ms a subject": round(1e3 * (read - selected) / 20, 2),
        "peak memory, MB": _peak_mb(),
        "of it before writing, MB": before,
    }


def _peak_mb():
    """Peak resident memory of this process alone (Linux)."""
    status = Path("/proc/self/status").read_text().split("VmHWM:")[1]
    return int(status.split()[0]) // 1024


def corpus(report):
    """What the released model's training data would need here, from the rates above."""
    scans = max(CORPUS.values())
    rate = max(v for k, v in report["prepare"].items() if "scans/s" in k)
    mb = report["prepare"]["MB a subject in the store"]
    return {
        "scans": scans,
        "core-days to prepare": round(2 * scans / rate / 86_400, 1),
        "store, GB": round(scans * mb / 1e3),
    }


if __name__ == "__main__":
    main()
