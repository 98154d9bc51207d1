"""Killed twenty times at random moments and started again, each job leaves what it leaves unbroken;
and so it does after a disk that was full, which is said.

`killed_runs.py` kills and compares every byte of what is left, but for checkpoints and locks.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

KILLS = 20


@pytest.mark.parametrize(
    "job, processes",
    [*((job, 1) for job in ("prepare", "embed", "train", "tune")),
     *((job, 2) for job in ("prepare", "embed", "train"))],
)  # fmt: skip
def test_what_is_left_after_twenty_kills_is_what_an_unbroken_run_leaves(job, processes, tmp_path):
    script = Path(__file__).with_name("killed_runs.py")
    one_thread = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    done = subprocess.run(
        [sys.executable, script, job, tmp_path, "7", str(KILLS), str(processes)],
        env=os.environ | one_thread,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]
    assert found[-1][2] >= KILLS
    said = "ended by InputError: Expected to write .*File too large.*Make room"
    assert processes > 1 or re.search(said, done.stderr)
    assert all(whole == broken for whole, broken, _ in found), found
