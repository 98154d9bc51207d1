"""Laws of pretraining that need other processes: killed by the system, shared, read ahead."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_runs import HUB, QUICK, TINY, embed_tiny, tiny_cohort

from bhx.data.store import open_store, save_cohort
from bhx.encode.embed import PRECISIONS
from bhx.encode.model import load_model
from bhx.train.log import read_log
from bhx.train.pretrain import pretrain
from bhx.train.recipes import STAGES, recipe

pytestmark = pytest.mark.filterwarnings("ignore:The representation is collapsing")  # of course

HERE = Path(__file__).resolve().parent
RUNS = str(HERE / "tiny_runs.py")
ENV = os.environ | {
    "PYTHONPATH": str(HERE.parent), "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1",
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """As the other processes: sums are then made in the same order."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return save_cohort(tiny_cohort(), tmp_path_factory.mktemp("cohort") / "tiny.zarr")


def train(store, out, stage, **changes):
    return pretrain(store, out=out, stage=stage, **{**QUICK, **changes})


def state(folder):
    return load_model(str(folder), device="cpu").networks.state_dict()


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(v, other[k]) for k, v in one.items())


def kill_at(step, store, out, settings):
    """Start a run in another process and kill it once it has logged this step."""
    log = out / settings["stage"] / "log.jsonl"
    command = [sys.executable, RUNS, str(store), str(out), json.dumps(settings)]
    run = subprocess.Popen(command, env=ENV, stderr=subprocess.PIPE)
    while run.poll() is None:
        if log.exists() and log.read_text().count('"step", "step"') >= step:
            run.send_signal(signal.SIGKILL)
            break
        time.sleep(0.002)
    _, errors = run.communicate()
    assert run.returncode == -signal.SIGKILL, errors.decode()[-2000:]


@pytest.mark.parametrize("stage", ["dynamics"])
def test_a_killed_run_resumed_is_the_unbroken_one(store, stage, tmp_path):
    settings = {"steps": 40, "checkpoint_every": 3, "evaluate_every": 10}
    train(store, tmp_path / "whole", stage, **settings)
    step = random.SystemRandom().randrange(2, 30)
    kill_at(step, store, tmp_path / "killed", {"stage": stage, **settings})
    log = tmp_path / "killed" / stage / "log.jsonl"
    done = log.read_text().count('"step", "step"')
    assert step <= done < 40
    train(store, tmp_path / "killed", stage, resume=True, **settings)
    assert same(state(tmp_path / "whole"), state(tmp_path / "killed"))
    assert log.read_text() == (tmp_path / "whole" / stage / "log.jsonl").read_text()


@pytest.fixture(scope="module")
def shared(store, tmp_path_factory):
    """All stages, and one with its weights split, in two processes that torchrun starts."""
    out = tmp_path_factory.mktemp("shared")
    runs = [(out / "ddp", {"stage": stage} | CALM) for stage in STAGES]
    runs += [(out / "fsdp", {"stage": stage, "shard": True} | CALM) for stage in STAGES]
    in_two_processes(store, runs)
    return out


def in_two_processes(store, runs):
    """Runs [(folder, settings)] that torchrun starts."""
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--nnodes=1",
        "--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0", "--local-addr=127.0.0.1",
        RUNS, str(store), *(x for run in runs for x in (str(run[0]), json.dumps(run[1]))),
    ]  # fmt: skip
    done = subprocess.run(command, env=ENV, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]


# Adam divides by the gradient's size, so rounding moves a weight without gradient (a key's bias, to
# which softmax is blind) by a whole rate: small rates, and key biases are not compared.
CALM = {"rate": [1e-4, 1e-3, 1e-4], "steps": 5, "batch": 5, "held_out": 0.3}


@pytest.fixture(scope="module")
def alone(store, tmp_path_factory):
    """The same stages in this process."""
    out = tmp_path_factory.mktemp("alone")
    for stage in STAGES:
        train(store, out, stage, **CALM)
    return out


@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_two_processes_are_one(shared, alone, how):
    for stage in STAGES:
        one, two = read_log(alone, stage), read_log(shared / how, stage)
        assert one.sizes == two.sizes
        for name in one:
            assert np.isfinite(one[name]).all(), (stage, name)
            assert np.allclose(one[name], two[name], rtol=1e-4, atol=1e-5), (stage, name)
    one, two = without_key_biases(state(alone)), without_key_biases(state(shared / how))
    assert one.keys() == two.keys()
    for name in one:
        assert torch.allclose(one[name], two[name], atol=5e-5, rtol=0), name  # of five steps


def without_key_biases(weights):
    kept = {"qkv.bias": (0, 2), "key_value.bias": (1,)}  # parts of the bias; the key's is left out
    shift = "harmonizer.norm.bias"  # of all people alike, to which a relational loss is blind
    out = {k: v for k, v in weights.items() if k != shift or "harmonizer.cls_token" in weights}
    for k, v in out.items():
        for name, parts in kept.items():
            if k.endswith(name):
                out[k] = torch.cat([v.chunk(max(parts) + 1)[i] for i in parts])
    return out


def test_people_are_compared_over_all_processes(tmp_path):
    """The Gram matrix is that of the whole batch, however many share it: one part lacks the T1."""
    cohort = tiny_cohort(40, t1_only=(3, 21), bold_only=range(0, 40, 3))
    store = save_cohort(cohort, tmp_path / "people.zarr")
    settings = CALM | {"stage": "harmonizer", "batch": 16, "tokens_at_once": 1500}
    train(store, tmp_path / "one", **{**settings, "preset": HUB})
    ways = {"ddp": {}, "fsdp": {"shard": True}}
    in_two_processes(
        store, [(tmp_path / k, settings | {"preset": "hub"} | more) for k, more in ways.items()]
    )
    one = read_log(tmp_path / "one", "harmonizer")
    for how in ways:
        two = read_log(tmp_path / how, "harmonizer")
        for name in one:
            assert np.allclose(one[name], two[name], rtol=1e-5, atol=1e-5), (how, name)
        pairs = (without_key_biases(state(tmp_path / k)) for k in ("one", how))
        for (name, a), b in zip(next(pairs).items(), next(pairs).values(), strict=True):
            bound = 2e-4 if "decoder" in name else 1e-5  # a decoder's first gradients are near 0
            assert torch.allclose(a, b, atol=bound, rtol=0), (how, name)


def test_processes_share_the_subjects_to_embed(store, tmp_path):
    """The store that torchrun's processes write is the one that this process writes."""
    in_two_processes(store, [(tmp_path / "two.zarr", None)])
    alone, shared = embed_tiny(store, tmp_path / "one.zarr"), tmp_path / "two.zarr"
    files = sorted(p.relative_to(shared) for p in shared.rglob("*") if p.is_file())
    assert len(files) > alone.sizes["subject"]
    assert files == sorted(
        p.relative_to(tmp_path / "one.zarr")
        for p in (tmp_path / "one.zarr").rglob("*")
        if p.is_file()
    )
    for file in files:
        assert (shared / file).read_bytes() == (tmp_path / "one.zarr" / file).read_bytes(), file


def test_processes_that_embed_agree_on_a_precision(store, tmp_path):
    in_two_processes(store, [(tmp_path / "two.zarr", "auto")])
    found = open_store(tmp_path / "two.zarr", "latents")
    assert found.attrs["precision"] == "bfloat16"
    far = {
        p: abs(embed_tiny(store, tmp_path / p, p).hub - found.hub).max(("token", "feature"))
        for p in PRECISIONS
    }
    assert (far["bfloat16"] < far["float32"] / 2).all()  # one's rows as another's


def test_a_sharded_checkpoint_is_whole(shared):
    whole, split = (
        torch.load(shared / how / "dynamics" / "checkpoint.pt", weights_only=True)
        for how in ("ddp", "fsdp")
    )
    assert whole["objective"].keys() == split["objective"].keys()
    for k, v in whole["objective"].items():
        assert split["objective"][k].shape == v.shape
    for one, other in zip(
        whole["optimizer"]["state"].values(), split["optimizer"]["state"].values(), strict=True
    ):
        assert all(other[k].shape == v.shape for k, v in one.items())


def test_a_sharded_run_goes_on_in_one_process(shared, store):
    out = shared / "fsdp"
    before = state(out)
    path = out / "harmonizer" / "checkpoint.pt"
    assert torch.load(path, weights_only=True)["step"] == 5
    after = train(store, out, "harmonizer", resume=True, shard=False, **CALM)
    assert same(before, after.networks.state_dict())


@pytest.mark.parametrize("stage", STAGES[1:])
def test_reading_ahead_changes_nothing(store, alone, stage, tmp_path):
    settings = {**CALM, "model": load_model(str(alone), device="cpu"), "steps": 4}
    for workers in (0, 2):
        train(store, tmp_path / str(workers), stage, workers=workers, **settings)
    assert same(state(tmp_path / "0"), state(tmp_path / "2"))
    logs = [(tmp_path / k / stage / "log.jsonl").read_text() for k in ("0", "2")]
    assert logs[0] == logs[1]


def test_an_error_keeps_its_sentence_on_the_way_from_a_worker(tmp_path):
    flat = tiny_cohort()
    flat.bold[:, 4] = np.where(np.isfinite(flat.bold[:, 4]), 1.0, np.nan)
    with pytest.raises(ValueError, match=r"^Subject 's\d\d': Expected parcels with a signal"):
        train(flat, tmp_path, "dynamics", workers=1)


def test_a_feed_travels_without_its_open_store(store):
    import pickle

    from bhx.train.dataset import Samples, opened
    from bhx.train.objectives import DynamicsObjective as Kind

    cohort, path = opened(store)
    feed = Samples(cohort, TINY, recipe("dynamics"), Kind.names, Kind.hide, path)
    first = feed[0, 0]
    there = pickle.loads(pickle.dumps(feed))
    assert torch.equal(*(s.reading.windows["bold"][0] for s in (there[0, 0], first)))
    assert len(pickle.dumps(feed)) < 100_000  # labels and a path, no data
