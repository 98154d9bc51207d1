"""Jobs that are killed at random moments and started again, until they end.

python tests/killed_runs.py JOB FOLDER SEED KILLS

Prints the digest of what an unbroken run leaves, that of what is left after so many kills, and how
many there were; at first with a full disk instead of a kill. Each attempt is a fork of this
process, in which nothing has run yet, so it starts at once.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import resource
import signal
import sys
import time
import warnings
from pathlib import Path

import pandas as pd
from small_files import parcel_series, table
from tiny_runs import HUB, QUICK, tiny_cohort

import bhx
from bhx.data.atlas import load_atlas
from bhx.encode.model import random_model
from bhx.train.pretrain import pretrain

NAMES = load_atlas("schaefer100").roi.values


def rows_of(folder: Path, n: int) -> pd.DataFrame:
    """A table of scans whose files lie in a folder; made once."""
    folder.mkdir(exist_ok=True)
    paths = [folder / f"s{i:02}.tsv" for i in range(n)]
    for i, path in enumerate(paths):
        if not path.exists():
            table(path, parcel_series(60, i), NAMES)
    ages = [20.0 + i for i in range(n)]
    return pd.DataFrame({"subject": [p.stem for p in paths], "bold": map(str, paths), "age": ages})


def prepare(out: Path):
    """A new store, then more people into it."""
    for n in (8, 14):
        bhx.prepare(rows_of(out.parent / "files", n), out / "cohort.zarr", atlas="schaefer100")


def embed(out: Path):
    """Hub tokens and attention of a dozen people, one block a person."""
    cohort = tiny_cohort()
    how = {"keep": ("attention",), "tokens_at_once": 1, "progress": False}
    bhx.embed(cohort, random_model(HUB), store=out / "latents.zarr", **how)


def train(out: Path):
    """A relational hub; a checkpoint every second step."""
    given = {**QUICK, "preset": HUB, "batch": 16, "steps": 14, "held_out": 0.1}
    pretrain(tiny_cohort(n=24), stage="harmonizer", out=out / "run", resume=True, **given)


def tune(out: Path):
    """Two folds of fine-tuning."""
    cohort = tiny_cohort(n=20, t1_only=(), bold_only=())
    cohort = cohort.assign_coords(age=("subject", [20.0 + (7 * i) % 20 for i in range(20)]))
    settings = {"steps": 8, "batch": 4, "evaluate_every": 2, "checkpoint_every": 1}
    settings |= {"folds": 2, "progress": False, "resume": True}
    bhx.fine_tune(cohort, random_model(HUB), "age", out=out / "tuned", **settings)


JOBS = {"prepare": prepare, "embed": embed, "train": train, "tune": tune}


def start(job, out: Path, largest: int = -1) -> int:
    """Fork, do the job and end; the process's number. No file may be larger than so many bytes."""
    out.mkdir(exist_ok=True)
    child = os.fork()
    if not child:
        try:
            warnings.simplefilter("ignore")
            resource.setrlimit(resource.RLIMIT_FSIZE, (largest, largest))
            job(out)
            os._exit(0)
        except BaseException as error:
            print(f"\nended by {type(error).__name__}: {error}", file=sys.stderr, flush=True)
            os._exit(1)
    return child


def digest(out: Path) -> str:
    """Of every file, but of locks, and of checkpoints, which hold what order came first."""
    found = hashlib.sha256()
    for path in sorted(p for p in out.rglob("*") if p.is_file()):
        if not path.name.endswith((".lock", "checkpoint.pt")):
            found.update(str(path.relative_to(out)).encode() + path.read_bytes())
    return found.hexdigest()[:16]


def main(name, folder, seed, kills):
    folder, job, moments = Path(folder), JOBS[name], random.Random(int(seed))
    began = time.monotonic()
    assert os.waitpid(start(job, folder / "whole"), 0)[1] == 0
    took = time.monotonic() - began
    full = folder / "full"  # the disk, it seems, for a while
    assert os.waitpid(start(job, full, 300), 0)[1] != 0
    assert os.waitpid(start(job, full), 0)[1] == 0
    print(json.dumps([digest(folder / "whole"), digest(full), 0]), flush=True)
    killed = 0
    while killed < int(kills):
        out = folder / f"broken{killed}"
        while True:
            child = start(job, out)
            time.sleep(moments.uniform(0.02, 0.6) * took)
            os.kill(child, signal.SIGKILL)
            if os.waitpid(child, 0)[1] == signal.SIGKILL and killed < int(kills):
                killed += 1
                continue
            break
        assert os.waitpid(start(job, out), 0)[1] == 0
        print(json.dumps([digest(folder / "whole"), digest(out), killed]), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
