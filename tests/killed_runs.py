"""Jobs that are killed at random moments and started again, until they end.

python tests/killed_runs.py JOB FOLDER SEED KILLS PROCESSES

Prints the digest of what an unbroken run leaves, that of what is left after so many kills, and how
many there were; at first with a full disk instead of a kill. Each attempt is a fork of this
process, in which nothing has run yet, so it starts at once. With two processes, training is shared
as torchrun shares it: one of the two is killed, and then the other, as torchrun does. The other
jobs are sent to a cluster of two workers, of which one is killed, or who sends them is.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import resource
import signal
import socket
import subprocess
import sys
import time
import warnings
from contextlib import contextmanager
from pathlib import Path

import pandas as pd
import psutil
from small_files import parcel_series, table
from tiny_runs import HUB, QUICK, tiny_cohort

import bhx
from bhx.data.atlas import load_atlas
from bhx.encode.model import random_model
from bhx.train.pretrain import pretrain

NAMES = load_atlas("schaefer100").roi.values
KILLS = 20


def after_kills(job: str, folder: Path, processes: int = 1) -> tuple[list, str]:
    """What this file, run as a script, prints of a job: (digests and kills), and what it said."""
    command = [sys.executable, __file__, job, folder, "7", str(KILLS), str(processes)]
    one_thread = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    how = {"env": os.environ | one_thread, "capture_output": True, "text": True, "timeout": 600}
    done = subprocess.run(command, **how)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [line for line in done.stdout.splitlines() if line.startswith("[")]
    return [json.loads(line) for line in lines], done.stderr


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
    how = {"atlas": "schaefer100", "client": cluster_of(out)}
    for n in (8, 14):
        bhx.prepare(rows_of(out.parent / "files", n), out / "cohort.zarr", **how)


def embed(out: Path):
    """Hub tokens and attention of a dozen people, one block a person."""
    cohort = tiny_cohort()
    how = {"keep": ("attention",), "tokens_at_once": 1, "progress": False}
    how["client"] = cluster_of(out)
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


@contextmanager
def cluster(folder: Path):
    """A scheduler and two workers that outlive who sends them work; their processes."""
    known = folder / "scheduler.json"
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    begun = []

    def start(what, *options):
        command = [sys.executable, "-m", "dask", what, "--scheduler-file", str(known), *options]
        how = {"env": os.environ | {"PYTHONPATH": path}, "stderr": subprocess.DEVNULL}
        begun.append(subprocess.Popen([*command, "--no-dashboard"], **how))

    try:
        start("scheduler", "--host", "127.0.0.1", "--port", "0")
        while not known.exists():
            time.sleep(0.1)
        start("worker", "--nworkers", "2", "--nthreads", "1", "--local-directory", str(folder))
        yield begun[1]
    finally:
        for process in begun[::-1]:
            process.terminate()
            process.wait()


def cluster_of(out: Path) -> str | None:
    """Address of the cluster beside a job's folder, where there is one."""
    known = out.parent / "scheduler.json"
    return json.loads(known.read_text())["address"] if known.exists() else None


class Attempt:
    """A job that runs in forks of this process, and ends or is killed."""

    def __init__(self, job, out: Path, processes: int = 1, largest: int = -1):
        """Begin; no file may be larger than so many bytes."""
        out.mkdir(exist_ok=True)
        shared = processes if job is train else 1
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.children = [self._fork(job, out, largest, i, shared, port) for i in range(shared)]

    def _fork(self, job, out, largest, rank, world, port):
        child = os.fork()
        if child:
            return child
        try:
            warnings.simplefilter("ignore")
            resource.setrlimit(resource.RLIMIT_FSIZE, (largest, largest))
            where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            told = where | {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world}
            os.environ |= {name: str(value) for name, value in told.items()}
            job(out)
            os._exit(0)
        except BaseException as error:
            print(f"\nended by {type(error).__name__}: {error}", file=sys.stderr, flush=True)
            os._exit(1)

    def ended(self) -> bool:
        """Wait for it; whether all went well."""
        return not any([os.waitpid(child, 0)[1] for child in self.children])

    def kill(self, first: int) -> bool:
        """Kill one, then the others; whether any was still alive."""
        order = [*self.children[first:], *self.children[:first]]
        for child in order:
            os.kill(child, signal.SIGKILL)
            time.sleep(0.01)
        return signal.SIGKILL in [os.waitpid(child, 0)[1] for child in order]


def digest(out: Path) -> str:
    """Of every file, but of locks, and of checkpoints, which hold what order came first."""
    found = hashlib.sha256()
    for path in sorted(p for p in out.rglob("*") if p.is_file()):
        if not path.name.endswith((".lock", "checkpoint.pt")):
            found.update(str(path.relative_to(out)).encode() + path.read_bytes())
    return found.hexdigest()[:16]


def kill_a_worker(nanny, moments):
    """One that has been at work for a while; its nanny starts another."""
    started = [
        p for p in psutil.Process(nanny.pid).children(True) if "spawn_main" in str(p.cmdline())
    ]
    workers = [p for p in started if time.time() - p.create_time() > 5]
    if workers:
        moments.choice(workers).kill()
    return len(workers) > 0


def main(name, folder, seed, kills, processes):
    folder, job, moments = Path(folder), JOBS[name], random.Random(int(seed))
    kills, processes = int(kills), int(processes)
    began = time.monotonic()
    assert Attempt(job, folder / "whole", processes).ended()
    took = time.monotonic() - began
    if processes == 1:
        full = folder / "full"  # the disk, it seems, for a while
        assert not Attempt(job, full, largest=300).ended()
        assert Attempt(job, full).ended()
        print(json.dumps([digest(folder / "whole"), digest(full), 0]), flush=True)
    if processes == 1 or job is train:
        kill_all(job, folder, moments, kills, took, processes)
        return
    with cluster(folder) as nanny:
        kill_all(job, folder, moments, kills, max(took, 1.5), processes, nanny)


def kill_all(job, folder, moments, kills, took, processes, nanny=None):
    """Run the job until it was killed so often, and until it ends; print what each left."""
    killed = 0
    while killed < kills:
        out = folder / f"broken{killed}"
        while killed < kills:
            attempt = Attempt(job, out, processes)
            time.sleep(moments.uniform(0.02, 0.6 if nanny is None else 1.5) * took)
            if nanny and moments.random() < 0.3:
                killed += kill_a_worker(nanny, moments)
            if not attempt.kill(moments.randrange(len(attempt.children))):
                break
            killed += 1
        assert Attempt(job, out, processes).ended()
        print(json.dumps([digest(folder / "whole"), digest(out), killed]), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
