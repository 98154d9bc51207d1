"""Killed twenty times at random moments, jobs of two processes leave what they leave unbroken.

Of training, one process is killed and then the other; of what a cluster does, a worker or who sent
the work. See `killed_runs.py`.
"""

import pytest
from killed_runs import KILLS, after_kills


@pytest.mark.parametrize("job", ["prepare", "embed", "train"])
def test_two_processes_killed_twenty_times_leave_what_unbroken_ones_leave(job, tmp_path):
    found, _ = after_kills(job, tmp_path, processes=2)
    assert found[-1][2] >= KILLS
    assert all(whole == broken for whole, broken, _ in found), found
