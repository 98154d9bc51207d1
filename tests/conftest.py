"""What every test process shares: one thread each, folders of its own, no network but loopback."""

from __future__ import annotations

import os

# Before NumPy and torch are loaded: several pytest workers share the cores.
if "PYTEST_XDIST_WORKER" in os.environ:
    for name in ("OMP", "MKL", "OPENBLAS", "NUMBA"):
        os.environ[f"{name}_NUM_THREADS"] = "1"

import socket

import pytest

LOOPBACK = ("127.0.0.1", "::1", "localhost")


@pytest.fixture(autouse=True, scope="session")
def own_folders(tmp_path_factory):
    """bhx's data and cache folders, inside pytest's."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("BHX_DATA", "BHX_CACHE"):
            patch.setenv(name, str(tmp_path_factory.mktemp(name.lower())))
        yield


@pytest.fixture(autouse=True, scope="session")
def loopback_only():
    """A test that reaches for the network fails at once, naming the address."""
    connect = socket.socket.connect

    def guarded(self, address):
        if isinstance(address, tuple) and address[0] not in LOOPBACK:
            raise OSError(f"a test may not connect to {address[0]}")
        return connect(self, address)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", guarded)
        yield


@pytest.fixture(scope="module")
def brains():
    """Four short scans with T1, in memory, and an untrained workshop model."""
    from bhx import synthetic_cohort
    from bhx.encode.model import random_model

    cohort = synthetic_cohort(4, seed=3, sites=("C", "D"), minutes=4, missing=0).compute()
    return cohort, random_model("paper", seed=1)
