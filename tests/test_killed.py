"""Killed twenty times at random moments and started again, each job leaves what it leaves unbroken;
and so it does after a disk that was full, which is said.

`killed_runs.py` kills and compares every byte of what is left, but for checkpoints and locks.
"""

import re

import pytest
from killed_runs import KILLS, after_kills


@pytest.mark.parametrize("job", ["prepare", "embed", "train", "tune"])
def test_what_is_left_after_twenty_kills_is_what_an_unbroken_run_leaves(job, tmp_path):
    found, said = after_kills(job, tmp_path)
    assert found[-1][2] >= KILLS
    assert re.search("ended by InputError: Expected to write .*File too large.*Make room", said)
    assert all(whole == broken for whole, broken, _ in found), found
