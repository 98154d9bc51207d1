"""Train the shipped workshop model on synthetic brains, and measure it beside its controls.

Run by `make weights`. Nothing that is shipped comes from a real person's scan.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from pathlib import Path

import bhx
from bhx.recipes import STAGES

HERE = Path(__file__).parent
SUBJECTS, SEED = 240, 20_000  # other subjects than those of open_cohort("synthetic")


def main():
    """Make the cohort, train the three stages, and keep the weights."""
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        store = bhx.save_cohort(bhx.synthetic_cohort(SUBJECTS, seed=SEED), Path(folder) / "c.zarr")
        print(f"cohort: {time.perf_counter() - began:.0f} s", flush=True)
        for stage in STAGES:
            start = time.perf_counter()
            bhx.pretrain(store, stage=stage, out=Path(folder) / "run", device="cpu")
            print(f"{stage}: {time.perf_counter() - start:.0f} s", flush=True)
        keep(Path(folder) / "run", HERE / "workshop")
    print(f"all: {time.perf_counter() - began:.0f} s, in {HERE / 'workshop'}")


def keep(run, target):
    """Copy the weights and the logs of their training."""
    target.mkdir(exist_ok=True)
    for name in ("config.json", "model.safetensors"):
        shutil.copy(run / name, target / name)
    for stage in STAGES:
        shutil.copy(run / stage / "log.jsonl", target / f"{stage}.jsonl")


if __name__ == "__main__":
    main()
