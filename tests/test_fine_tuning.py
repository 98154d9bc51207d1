"""Fine-tuning: what learns, what is never seen, and that a killed run goes on to the same bits."""

import json
from copy import deepcopy
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
import xarray as xr
from tiny_runs import TINY, tiny_cohort
from torch.utils._python_dispatch import TorchDispatchMode

from bhx.encode.embed import embed
from bhx.encode.model import random_model
from bhx.errors import InputError
from bhx.evaluate.features import nothing
from bhx.evaluate.fine_tuning import FineTuning, _Tokens, fine_tune, predict, tuned_model
from bhx.evaluate.probe import probe
from bhx.evaluate.scores import compare
from bhx.schema import check
from bhx.train import loop as loop_file
from bhx.train.objectives import LabelObjective, digest

N = 24
TRAINS = ("all", "last block", "head only")
BLOCKS = 2
SMALL = replace(
    TINY,
    dynamics=replace(TINY.dynamics, max_patches=1),
    harmonizer=replace(TINY.harmonizer, depth=BLOCKS, places=(100, 150)),
)
FAST = {"folds": 2, "epochs": 2, "batch": 6, "patience": 2, "progress": False}


def people():
    """Two rows a participant; half of the T1s are brighter on one side, which is `side`."""
    cohort = tiny_cohort(N).isel(time=slice(40)).copy(deep=True)  # one patch, or two
    one = np.arange(N) // 2 % 2 == 0
    cohort.t1.values[one, : cohort.sizes["x"] // 2] *= 3
    return cohort.assign_coords(
        participant=("subject", [f"p{i // 2:02}" for i in range(N)]),
        n_volumes=np.minimum(cohort.n_volumes, 40),
        site=("subject", np.array(["A", "B", "C"])[np.arange(N) // 2 % 3]),
        side=("subject", np.where(one, "left", "right")),
        age=("subject", np.repeat(np.random.default_rng(0).permutation(N // 2) * 5.0 + 20, 2)),
    )


@pytest.fixture(scope="module")
def cohort():
    return people()


@pytest.fixture(scope="module")
def model():
    return random_model(SMALL, device="cpu")


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("tokens") / "tokens.zarr"


@pytest.fixture(scope="module")
def tune(cohort, model, cache):
    def run(target="side", cohort=cohort, **settings):
        return fine_tune(cohort, model, target, **{**FAST, "cache": cache, **settings})

    return run


def weights(out, fold):
    path = out / f"fold_{fold}" / "checkpoint.pt"
    return torch.load(path, weights_only=True)["stopping"]["best"]


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# ------------------------------------------------------------------- what learns


@pytest.mark.parametrize("trains", TRAINS)
def test_only_what_was_named_learns(tune, model, tmp_path, trains):
    before = digest(model.networks)
    tune(trains=trains, out=tmp_path)
    learnt, start = weights(tmp_path, 0), model.networks.harmonizer.state_dict()
    h = "harmonizer."
    inside = {k.removeprefix(h) for k in learnt if k.startswith(h)}
    expected = {
        "head only": set(),
        "last block": {k for k in start if k.startswith(f"blocks.{BLOCKS - 1}.")},
        "all": {k for k in start if k.startswith(("blocks.", "cls_token", "latent_tokens", "enc"))},
    }[trains]
    assert inside == expected
    moved = {k for k in inside if not torch.equal(learnt[h + k], start[k])}
    assert moved == inside
    kept = tuned_model(tmp_path, 0, model).networks.state_dict()
    others = {
        k: v for k, v in model.networks.state_dict().items() if k.removeprefix(h) not in moved
    }
    assert all(torch.equal(kept[k], v) for k, v in others.items())
    assert digest(model.networks) == before  # each fold starts from the given model


def objective_of(model, **settings):
    return LabelObjective(model.networks, FineTuning(**settings), truth=None, outputs=2)


def test_rates_fall_from_the_head_down(tune, tmp_path, model):
    tune(out=tmp_path, layer_decay=0.5, rate=(0.0, 1e-3, 0.0))
    state = torch.load(tmp_path / "fold_0" / "checkpoint.pt", weights_only=True)
    groups = state["optimizer"]["param_groups"]
    rates = sorted({round(g["lr"] / groups[-1]["lr"], 9) for g in groups})
    assert rates == [0.125, 0.25, 0.5, 1.0]  # what enters, two blocks, the head
    plan, tuned = FineTuning(layer_decay=0.5), objective_of(model)
    scale = {id(p): g["scale"] for g in tuned.groups(plan) for p in g["params"]}
    for name, parameter in tuned.named_parameters():
        if parameter.requires_grad:
            block = int(name.split(".")[2]) + 1 if "blocks." in name else None
            depth = block or (0 if name.startswith("harmonizer.") else 3)
            assert scale[id(parameter)] == 0.5 ** (3 - depth)
    assert len(scale) == sum(p.requires_grad for p in tuned.parameters())


@pytest.mark.parametrize(
    ("trains", "drops"), [("all", [0, 0.2]), ("last block", [0, 0.2]), ("head only", [0, 0])]
)
def test_only_blocks_that_learn_are_dropped(model, trains, drops):
    tuned = objective_of(model, trains=trains, drop_path=0.2)
    assert [b.drop_path for b in tuned.harmonizer.blocks] == pytest.approx(drops)
    assert [b.drop_path for b in model.networks.harmonizer.blocks] == [0, 0]


def test_the_head_reads_the_mean_hub_token_before_the_norm(cohort, model):
    """Windows of long scans, missing modalities, and a parcel that was left out included."""
    cohort = cohort.copy(deep=True)
    cohort.bold.values[1, 7] = np.nan
    bare = deepcopy(model)
    bare.networks.harmonizer.norm = torch.nn.Identity()
    hub = embed(cohort, bare, missing_parcels="leave out").hub.values
    gaps = cohort.drop_isel(subject=1)  # fine_tune refuses parcels without a signal
    samples = _Tokens(gaps, model, FineTuning()).samples
    tuned = objective_of(model).eval()
    with torch.no_grad():
        pooled = tuned.pool([samples[0, i] for i in range(N - 1)])
    np.testing.assert_allclose(pooled, np.delete(hub, 1, 0).mean(1), atol=2e-5)


# ------------------------------------------------------------------- what is never seen


def test_test_subjects_move_no_weight(tune, cohort, tmp_path):
    first = tune("age", out=tmp_path / "a")
    at = np.flatnonzero(first.part[0, 0] == "test")
    other = cohort.copy(deep=True)
    other.t1.values[at] = other.t1.values[at] ** 2
    other.bold.values[at] = other.bold.values[at][..., ::-1, :]
    second = tune("age", out=tmp_path / "b", cohort=other, cache=None)
    assert same(weights(tmp_path / "a", 0), weights(tmp_path / "b", 0))
    assert not same(weights(tmp_path / "a", 1), weights(tmp_path / "b", 1))  # there they train
    assert not np.allclose(first.output[0, 0, at], second.output[0, 0, at])


@pytest.mark.parametrize("part", ["train", "stop", "test"])
def test_labels_work_only_where_they_should(tune, cohort, part):
    """Ages move by less than what would change the folds."""
    first = tune("age")
    at = np.flatnonzero(first.part[0, 0] == part)
    age = cohort.age.values.copy()
    age[at] += np.random.default_rng(1).uniform(-1, 1, N // 2)[at // 2]
    second = tune("age", cohort=cohort.assign_coords(age=("subject", age)))
    assert (first.part == second.part).all()
    training, inner = (
        np.array_equal(first[k][0, 0], second[k][0, 0]) for k in ("training_loss", "inner_loss")
    )
    assert (training, inner) == {
        "train": (False, False), "stop": (True, False), "test": (True, True),
    }[part]  # fmt: skip


def test_no_participant_is_on_two_sides(tune):
    for options in ({}, {"groups": "site"}, {"protocol": "paper", "folds": None}):
        scores = tune(epochs=1, trains="head only", **options)
        for part in scores.part[0].values:
            sides = [set(scores.participant.values[part == p]) for p in ("train", "stop", "test")]
            assert all(sides)
            assert not sides[0] & sides[1]
            assert not (sides[0] | sides[1]) & sides[2]
    whole = tune(epochs=1, trains="head only", patience=None)
    assert "stop" not in whole.part.values


def test_the_kept_epoch_is_the_best_of_the_inner_split(tune):
    scores = tune("age", epochs=6, rate=(0.0, 0.01, 0.0), trains="last block")
    for loss, kept in zip(scores.inner_loss.values[0], scores.epoch_kept.values[0], strict=True):
        assert kept == np.nanargmin(loss) + 1
        assert np.isfinite(loss).sum() == min(6, kept + 2)  # patience


def test_who_is_in_another_part_of_a_split_was_not_trained_on(tune, cohort):
    person = np.unique(cohort.participant, return_inverse=True)[1]
    part = np.array(["train", "train", "test", "later", "validation"])[person % 5]
    split = xr.DataArray(
        part[None], {"repeat": [0], **cohort.participant.coords}, ("repeat", "subject")
    )
    for patience, validated in ((None, ""), (2, "stop")):
        scores = tune("age", split=split, epochs=1, folds=None, patience=patience)
        found = scores.part[0, 0].to_series()
        expected = pd.Series(part, cohort.subject.values).replace(
            {"later": "", "validation": validated}
        )
        pd.testing.assert_series_equal(found, expected[found.index], check_names=False)


# ------------------------------------------------------------------- beside a probe


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"groups": "site"},
        {"stratify": "site", "repeats": 2},
        {"protocol": "paper", "folds": None},
    ],
)
def test_the_folds_are_those_of_probe(tune, cohort, options):
    scores = tune(trains="head only", **options)
    check(scores, "scores")
    base = probe(nothing(cohort), "side", **{"folds": 2, **options})
    tested = [np.isfinite(s.output[0, :, :, 0].values) for s in (scores, base)]
    assert np.array_equal(*tested)
    assert list(scores.fold.values) == list(base.fold.values)
    table = compare(scores, base)
    assert np.isfinite(table.loc[("fine-tuned, head only", "balanced_accuracy"), "diff"])
    assert json.loads(scores.attrs["settings"])["trains"] == "head only"


def test_a_planted_label_is_learnt_and_an_exchanged_one_is_not(tune, cohort):
    quick = {"rate": (0.0, 0.02, 0.0), "patience": None}
    learnt = tune(epochs=8, **quick)
    assert learnt.score.sel(metric="balanced_accuracy").mean() > 0.8
    chance = []
    for seed in range(6):
        order = np.repeat(np.random.default_rng(seed).permutation(N // 2) * 2, 2)
        moved = cohort.assign_coords(side=("subject", cohort.side.values[order]))
        scores = tune(cohort=moved, trains="head only", epochs=20, **quick)
        chance.append(float(scores.score.sel(metric="balanced_accuracy").mean()))
    # 6 x 12 participants: a standard error near 0.06
    assert abs(np.mean(chance) - 0.5) < 0.2


def test_predictions_are_in_the_units_of_the_target(tune, cohort):
    years = tune("age")
    days = tune("age", cohort=cohort.assign_coords(age=365.25 * cohort.age + 1000))
    np.testing.assert_allclose(days.prediction, 365.25 * years.prediction + 1000, rtol=1e-4)
    mae = days.score.sel(metric="mae") / years.score.sel(metric="mae")
    np.testing.assert_allclose(mae, 365.25, rtol=1e-3)


def test_three_labels_and_one_modality(tune, cohort):
    three = cohort.assign_coords(kind=("subject", np.array(list("abc"))[np.arange(N) // 2 % 3]))
    scores = tune("kind", cohort=three, trains="last block")
    tested = scores.output.values[scores.part.values == "test"]  # rows of all folds, class
    np.testing.assert_allclose(tested.sum(-1), 1, rtol=1e-5)
    assert tested.shape == (N, 3)
    for modality in ("bold", "t1"):
        there = cohort[[modality]].isel(subject=np.flatnonzero(cohort[f"has_{modality}"]))
        assert np.isfinite(tune("age", cohort=there, epochs=1, cache=None).prediction).all()


def test_half_precision_is_near(tune):
    full, half = (tune("age", precision=p, cache=None) for p in ("float32", "bfloat16"))
    assert np.abs(full.prediction - half.prediction).max() < 0.1 * full.truth.std()


# ------------------------------------------------------------------- what is kept


def test_a_killed_run_goes_on_to_the_same_bits(tune, tmp_path, monkeypatch):
    torch.set_num_threads(1)
    whole = tune("age", out=tmp_path / "whole")
    write, written = loop_file.write_whole, []

    def killed(state, path):
        write(state, path)
        written.append(path.parent.name)
        if len(written) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(loop_file, "write_whole", killed)
    with pytest.raises(KeyboardInterrupt):
        tune("age", out=tmp_path / "killed")
    assert written[-1] == "fold_1"  # in the midst of the second fold
    monkeypatch.setattr(loop_file, "write_whole", write)
    went_on = tune("age", out=tmp_path / "killed", resume=True)
    for name in ("output", "training_loss", "inner_loss", "epoch_kept"):
        assert np.array_equal(whole[name], went_on[name], equal_nan=True), name
    for fold in range(2):
        assert same(weights(tmp_path / "whole", fold), weights(tmp_path / "killed", fold))


def test_another_run_is_refused(tune, cohort, tmp_path):
    tune(out=tmp_path, trains="head only")
    with pytest.raises(InputError, match="found one at"):
        tune(out=tmp_path, trains="head only")
    with pytest.raises(InputError, match="found other rate"):
        tune(out=tmp_path, trains="head only", rate=(0.0, 1e-2, 0.0), resume=True)
    with pytest.raises(InputError, match="found other target, truth, part"):
        tune("age", out=tmp_path, trains="head only", resume=True)
    (tmp_path / "fold_1" / "checkpoint.pt").write_bytes(b"cut short")
    with pytest.raises(InputError, match="damaged"):
        tune(out=tmp_path, trains="head only", resume=True)


@pytest.mark.parametrize("target", ["side", "age"])
def test_a_kept_fold_says_the_same_again(tune, cohort, model, tmp_path, target):
    scores = tune(target, out=tmp_path)
    said = predict(tmp_path, 1, cohort, model)
    assert said.dims == ("subject", "class")
    test = scores.part.values[0, 1] == "test"
    np.testing.assert_allclose(said[test], scores.output[0, 1, test], rtol=1e-4, atol=1e-5)
    hub = [embed(cohort, m).hub.values for m in (model, tuned_model(tmp_path, 1, model))]
    assert not np.allclose(*hub)
    with pytest.raises(InputError, match="finished fold 7 of this model"):
        predict(tmp_path, 7, cohort, model)
    with pytest.raises(InputError, match="finished fold 0 of this model"):
        tuned_model(tmp_path, 0, random_model(SMALL, seed=1))


# ------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (
            {"trains": "encoders"},
            "Expected trains as 'all', 'last block' or 'head only', found 'encoders'",
        ),
        ({"epochs": 0}, "Expected epochs as a whole number of at least 1, found 0"),
        ({"rate": -1.0}, "Expected rate as three learning rates: .*, found -1.0"),
        ({"rate": 1e-3}, "Expected rate as three learning rates"),
        ({"rate": (0.0, float("nan"), 0.0)}, "Expected rate as three .*found nan in it"),
        ({"layer_decay": 0.0}, "Expected layer_decay as a factor above 0 and at most 1, found 0.0"),
        ({"smoothing": 1.0}, "Expected smoothing as a share from 0 to below 1"),
        ({"drop_path": -0.1}, "Expected drop_path as a share from 0"),
        ({"warmup": 1.0}, "Expected warmup as a share"),
        ({"patience": 0}, "Expected patience as .*found 0"),
        ({"clip": 0.0}, "Expected clip as a number above 0, found 0.0"),
        ({"decay": 0.1}, "Expected decay as two weight decays"),
        ({"precision": "float16"}, "Expected precision as 'float32' or 'bfloat16'"),
        ({"learning_rate": 1.0}, "found learning_rate"),
        ({"target": "nowhere"}, "Expected 'nowhere' as a coordinate on subject"),
        ({"target": "participant", "classes": ("p00", "p99")}, "Expected subjects of every class"),
        ({"folds": 40}, "Expected from 2 to 12 folds"),
        ({"task": "rank"}, "Expected task to be number, label, found"),
    ],
)
def test_wrong_settings_are_refused(tune, wrong, message):
    with pytest.raises(InputError, match=message):
        tune(**wrong)


def test_a_loss_that_explodes_is_said(tune):
    with pytest.raises(InputError, match="finite loss"):
        tune("age", rate=(0.0, 1e30, 0.0), clip=1e30, warmup=0.0)


def test_a_last_step_that_explodes_is_said(tune):
    with pytest.raises(InputError, match="finite loss, found .*held-out loss.*(nan|inf)"):
        tune("age", rate=(0.0, 1e30, 0.0), clip=1e30, warmup=0.0, epochs=1, batch=N)


def test_numbers_that_are_all_alike_in_training_are_learnt(tune, cohort):
    odd = np.where(cohort.participant == "p00", 9.0, 5.0)
    scores = tune("odd", cohort.assign_coords(odd=("subject", odd)), folds=N // 2, epochs=1)
    assert np.isfinite(scores.prediction).all()


class NoDoubles(TorchDispatchMode):
    """As a GPU that lacks double precision: no tensor may have it."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        assert getattr(out, "dtype", None) is not torch.float64, func
        return out


def test_numbers_are_learnt_in_single_precision(tune):
    tune("age", epochs=1)  # the encoders' tokens are stored by now
    with NoDoubles():
        tune("age", epochs=1)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("target", ["side", "age"])
@pytest.mark.parametrize("trains", TRAINS)
def test_a_gpu_finds_what_the_cpu_finds(tune, cohort, target, trains):
    gpu = random_model(SMALL, device="cuda")
    options = {**FAST, "trains": trains, "epochs": 1}
    there, here = fine_tune(cohort, gpu, target, **options), tune(target, trains=trains, epochs=1)
    np.testing.assert_allclose(there.training_loss, here.training_loss, rtol=1e-2)


def test_no_model_is_said(cohort):
    with pytest.raises(InputError, match="Expected a model, found str"):
        fine_tune(cohort, "workshop", "side", **FAST)
