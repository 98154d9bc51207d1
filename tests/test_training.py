"""Laws of pretraining in one process: samples, schedules, steps, what is refused and what stays.

Runs in other processes (killed, shared, read ahead) are in test_training_processes.py.
"""

import json
import math
import resource
import shutil
from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import signal
from tiny_runs import QUICK, TINY, tiny_cohort

from bhx.data.splits import cut
from bhx.data.store import save_cohort
from bhx.encode.embed import aligned_to
from bhx.encode.model import load_model, random_model
from bhx.errors import InputError
from bhx.modalities.bold import BOLD, cropped, decimated
from bhx.modalities.t1 import cube_mask
from bhx.model import structure as structure_file
from bhx.model.config import PRESETS
from bhx.train import loop as loop_file
from bhx.train import objectives as objectives_file
from bhx.train.dataset import Samples, held_out_rows, is_as_stored, opened
from bhx.train.log import collapse, plot_log, read_log
from bhx.train.loop import Run
from bhx.train.objectives import OBJECTIVES
from bhx.train.pretrain import pretrain
from bhx.train.recipes import Recipe, cosine, learning_rate, linear, recipe

pytestmark = pytest.mark.filterwarnings("ignore:The representation is collapsing")  # of course

STAGES = ("structure", "dynamics", "harmonizer")


@pytest.fixture(scope="module")
def cohort():
    return tiny_cohort()


@pytest.fixture(scope="module")
def store(cohort, tmp_path_factory):
    return save_cohort(cohort, tmp_path_factory.mktemp("cohort") / "tiny.zarr")


@pytest.fixture(scope="module")
def model():
    return random_model(TINY)


def plan_of(stage, **changes):
    return recipe(
        stage, "base", **{**{k: v for k, v in QUICK.items() if k in Recipe.model_fields}, **changes}
    )


def samples_of(cohort, model, stage, path=None, **changes):
    objective, plan = OBJECTIVES[stage], plan_of(stage, **changes)
    names = objective.names or tuple(model.config.modalities)
    return Samples(cohort, model.config, plan, names, objective.hide, path)


def run_of(cohort, model, stage, folder, held_out=0.2, **changes):
    """A run that has begun."""
    networks = random_model(TINY, device="cpu").networks.requires_grad_(True)
    samples = samples_of(cohort, model, stage, **changes)
    objective, rows = OBJECTIVES[stage](networks, samples.plan), held_out_rows(samples, held_out)
    run = Run(objective, samples, samples.plan, folder / stage, *rows, {})
    run._begin(False)
    return run


def batch_of(run, step=0):
    return [run.samples[step, int(i)] for i in run.batch(step)]


def train(cohort, out, stage="structure", **changes):
    return pretrain(cohort, out=out, stage=stage, **{**QUICK, **changes})


def weights(model):
    return {k: v.clone() for k, v in model.networks.state_dict().items()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(v, other[k]) for k, v in one.items())


def log_of(out, stage):
    return (out / stage / "log.jsonl").read_text()


# Recipes and schedules ---------------------------------------------------------------------------


def test_published_values_of_the_stages():
    f, s, h = (recipe(stage) for stage in ("dynamics", "structure", "harmonizer"))
    assert (f.rate, f.decay, f.batch, f.momentum) == ((5e-5, 1e-3, 1e-6), (0.04, 0.4), 512,
                                                      (0.996, 1.0))  # fmt: skip
    assert s.rate[1] == 1.5e-4 * 512 / 256
    assert h.rate[1] == 5e-4 * 512 / 256
    assert s.betas == h.betas == (0.9, 0.95)
    assert f.warmup == s.warmup == 40 / 300


@pytest.mark.parametrize("setting, value", [
    ("steps", 0), ("batch", 1.5), ("rate", (1e-3, 1e-3)), ("warmup", 1.0), ("hidden", 1),
    ("loss", "L1"), ("precision", "float16"), ("decimate", ()), ("decimate", (0,)), ("seed", -1),
    ("drop_modality", 1.1), ("evaluate_every", 0),
])  # fmt: skip
def test_settings_out_of_range_are_refused_by_name(setting, value):
    with pytest.raises(InputError, match=f"Expected {setting} "):
        recipe("dynamics", **{setting: value})


def test_unknown_settings_and_stages_are_refused():
    with pytest.raises(InputError, match="found learning_rate"):
        recipe("dynamics", learning_rate=1e-3)
    with pytest.raises(InputError, match="'structure', 'dynamics', 'harmonizer'"):
        recipe("fusion")


def test_rate_warms_up_linearly_and_falls_by_a_cosine():
    plan = Recipe(stage="dynamics", steps=100, warmup=0.2)
    first, highest, last = plan.rate
    rates = [learning_rate(step, plan.steps, plan.warmup, plan.rate) for step in range(100)]
    rates = np.array(rates)
    assert np.allclose(np.diff(rates[:20]), (highest - first) / 20)
    assert np.isclose(rates[19], highest)
    through = np.arange(80) / 80
    cosine = last + (highest - last) * (1 + np.cos(np.pi * through)) / 2
    assert np.allclose(rates[20:], cosine)


def test_weight_decay_follows_a_cosine_and_momentum_a_line():
    assert np.allclose([cosine(0.04, 0.4, share) for share in (0, 0.5, 1)], [0.04, 0.22, 0.4])
    share = np.linspace(0, 1, 201)
    assert np.allclose([linear(0.996, 1.0, s) for s in share], np.linspace(0.996, 1.0, 201))


# Samples -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", STAGES)
def test_a_sample_is_decided_by_seed_step_and_subject(cohort, model, stage):
    one, other = samples_of(cohort, model, stage), samples_of(cohort, model, stage)
    i = int(one.usable[1])
    for step in (5, 3, 5):  # whatever was made before
        assert equal(one[step, i], other[step, i])
    reseeded = samples_of(cohort, model, stage, seed=1, drop_modality=1.0)
    assert not equal(one[5, i], one[6, i])
    assert not equal(one[5, i], reseeded[5, i])
    assert not equal(one[5, i], one[5, int(one.usable[2])])


def equal(a, b):
    """Whether two samples hold the same."""
    parts = [
        [*s.hidden.values(), *(w for windows in s.reading.windows.values() for w in windows)]
        for s in (a, b)
    ]
    return (a.subject, a.unseen) == (b.subject, b.unseen) and all(
        x.shape == y.shape and torch.equal(x, y) for x, y in zip(*parts, strict=True)
    )


@pytest.mark.parametrize("stage", STAGES)
def test_a_store_gives_the_samples_of_its_cohort(cohort, store, model, stage):
    direct = samples_of(cohort, model, stage)
    whole, path = opened(store)
    assert path == str(store)
    assert is_as_stored(aligned_to(whole, model), whole)
    read = samples_of(whole, model, stage, path)
    for i in direct.usable:
        assert equal(direct[0, int(i)], read[0, int(i)])


def test_rows_of_a_store_follow_the_chosen_subjects(cohort, store, model):
    chosen = ["s07", "s02", "s10"]
    whole, path = opened(store, chosen)
    read = samples_of(whole, model, "structure", path)
    direct = samples_of(cohort.sel(subject=chosen), model, "structure")
    assert [read[0, i].subject for i in range(3)] == chosen
    assert all(equal(read[0, i], direct[0, i]) for i in range(3))


def test_catalog_names_open_as_cohorts():
    whole, path = opened("synthetic")
    assert path is None
    assert whole.sizes["subject"] > 10


@pytest.mark.parametrize("share", [0.75, 0.5])
def test_exactly_the_asked_share_of_cubes_is_hidden(share):
    for tokens in (150, 1200):
        for seed in range(5):
            mask = cube_mask(tokens, share, np.random.default_rng(seed))
            assert mask.sum() == round(tokens * share)
            assert set(mask.tolist()) == {0.0, 1.0}


def test_context_and_targets_are_valid_patches_of_their_scan(cohort, model):
    feed = samples_of(cohort, model, "dynamics")
    for step in range(20):
        sample = feed[step, int(feed.usable[step % len(feed.usable)])]
        keep, hide = sample.hidden["keep"], sample.hidden["hide"]
        (window,) = sample.reading.windows["bold"]
        assert len(keep) > 0
        assert len(hide) > 0
        assert not set(keep.tolist()) & set(hide.tolist())
        tokens = window.shape[0] * window.shape[1]
        assert max(keep.max(), hide.max()) < tokens
        assert window.isfinite().all()


@pytest.mark.parametrize("factor", [2, 3])
def test_thinning_is_slicing_from_a_random_start(factor):
    bold = np.random.default_rng(0).standard_normal((4, 90)).astype(np.float32)
    plan = Recipe(stage="dynamics", decimate=(factor,), slowest_tr=10.0)
    starts = set()
    for seed in range(20):
        thin, tr = decimated(bold, 2.0, TINY.dynamics, plan, np.random.default_rng(seed))
        assert tr == 2.0 * factor
        found = [s for s in range(factor) if np.array_equal(thin, bold[:, s::factor])]
        assert len(found) == 1
        starts |= set(found)
    assert starts == set(range(factor))


def test_antialias_removes_what_the_slow_tr_cannot_show():
    time = np.arange(400) * 0.75
    slow, fast = np.sin(2 * np.pi * 0.05 * time), np.sin(2 * np.pi * 0.55 * time)  # Hz
    plan = Recipe(stage="dynamics", decimate=(2,), slowest_tr=3.0)
    results = {}
    for antialias in (False, True):
        one = plan.model_copy(update={"antialias": antialias})
        bold = np.stack([slow, fast])
        results[antialias], tr = decimated(bold, 0.75, TINY.dynamics, one, np.random.default_rng(0))
    power = {k: signal.periodogram(v, 1 / tr)[1].sum(1) for k, v in results.items()}
    assert power[True][0] > 0.9 * power[False][0]
    assert power[True][1] < 1e-2 * power[False][1]


def test_thinning_keeps_to_the_slowest_tr_and_leaves_a_patch():
    plan = Recipe(stage="dynamics", decimate=(1, 2, 3, 4), slowest_tr=3.0)
    bold = np.zeros((2, 36), np.float32)
    random = np.random.default_rng(0)
    seen = {decimated(bold, 1.0, TINY.dynamics, plan, random)[1] for _ in range(50)}
    assert seen == {1.0, 2.0, 3.0}
    just = np.zeros((2, 49), np.float32)  # 35.3 s at 0.72 s: any thinning would leave too little
    for _ in range(20):
        thin, tr = decimated(just, 0.72, TINY.dynamics, plan, random)
        assert TINY.dynamics.patch_count(thin.shape[1], tr) == 1


@pytest.mark.parametrize("patching", ["exact", "tape"])
@pytest.mark.parametrize("tr", [0.72, 1.5, 2.0, 2.5])
def test_crops_are_whole_patches_within_the_bounds(tr, patching):
    dynamics = replace(TINY.dynamics, patching=patching, max_patches=6)
    plan, random, seen = Recipe(stage="dynamics", shortest=3), np.random.default_rng(0), set()
    bold = np.arange(int(500 / tr), dtype=np.float32)[None]
    for _ in range(60):
        crop = cropped(bold, tr, dynamics, plan, random)
        seen.add(dynamics.patch_count(crop.shape[1], tr))
        assert np.array_equal(np.diff(crop[0]), np.ones(crop.shape[1] - 1))
    assert seen == {3, 4, 5, 6}
    short = cropped(bold[:, : int(80 / tr)], tr, dynamics, plan, random)
    assert dynamics.patch_count(short.shape[1], tr) >= 2


def test_thinned_scans_are_scaled_as_scans_of_that_tr(cohort, model):
    feed = samples_of(cohort, model, "dynamics", crop=False, decimate=(2,), slowest_tr=4.0)
    facts = {"tr": float(cohort.tr[0]), "n_volumes": int(cohort.n_volumes[0])}
    values = BOLD.trim(cohort.bold.values[0], facts)
    thin, facts = BOLD.augment(values, facts, TINY, feed.plan, np.random.default_rng(0))
    assert facts["tr"] == 2 * float(cohort.tr[0])
    scaled = BOLD.cut(BOLD.scale(thin), facts, TINY)
    start = int(np.random.default_rng(0).integers(2))
    assert np.array_equal(thin, values[:, start::2].astype("float32"))
    window = feed.read(0, np.random.default_rng(0)).windows["bold"][0]
    assert any(torch.equal(window, torch.from_numpy(w)) for w in scaled)


def test_one_modality_is_dropped_at_the_asked_rate_from_those_who_have_both(cohort, model):
    feed = samples_of(cohort, model, "harmonizer", drop_modality=0.5)
    both = [i for i in feed.usable if all(there[i] for there in feed.has.values())]
    single = [i for i in feed.usable if i not in both]
    assert single
    assert not any(feed[step, int(i)].unseen for i in single for step in range(10))
    dropped = [feed[step, int(i)].unseen for i in both for step in range(20)]
    share = np.mean([d != "" for d in dropped])
    assert abs(share - 0.5) < 4 * math.sqrt(0.25 / len(dropped))
    assert {"bold", "t1"} <= set(dropped)


# Steps -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", STAGES)
def test_a_batch_in_small_parts_is_the_batch(cohort, model, stage, tmp_path):
    found = {}
    for tokens_at_once in (1, 10**6):
        folder = tmp_path / str(tokens_at_once)
        run = run_of(cohort, model, stage, folder, tokens_at_once=tokens_at_once)
        losses, tokens, norm = run._gradients(batch_of(run))
        gradients = [p.grad for p in run.learning]
        assert all(g is not None for g in gradients)
        found[tokens_at_once] = (list(losses.values()), norm, gradients, tokens)
    one, other = found.values()
    assert one[3] == other[3]
    assert np.allclose(one[0], other[0], rtol=1e-5)
    assert np.isclose(one[1], other[1], rtol=1e-4)
    for a, b in zip(one[2], other[2], strict=True):
        assert torch.allclose(a, b, atol=1e-6)


def test_a_batch_without_room_is_trained_in_smaller_parts(cohort, model, tmp_path, monkeypatch):
    """The step is the one of a device with room, up to rounding; one person too large is said."""
    found, forward = [], Run._gradients
    for room in (10**6, 400, 1):

        def gradients(run, samples, room=room):
            if run.at_once > room:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
            return forward(run, samples)

        monkeypatch.setattr(Run, "_gradients", gradients)
        run = run_of(cohort, model, "structure", tmp_path / str(room), tokens_at_once=800)
        if room == 1:
            with pytest.raises(InputError, match="Expected room for .* Set tokens_at_once= lower"):
                run._gradients_in_memory(batch_of(run))
            break
        with nullcontext() if room > 800 else pytest.warns(UserWarning, match="now on 400 tokens"):
            run._gradients_in_memory(batch_of(run))
        found.append(torch.cat([p.grad.flatten() for p in run.learning]))
    assert run.at_once < 400
    torch.testing.assert_close(*found, atol=1e-6, rtol=0)


def test_biases_and_single_rows_do_not_decay(cohort, model, tmp_path):
    run = run_of(cohort, model, "dynamics", tmp_path)
    decays, still = (g["params"] for g in run.optimizer.param_groups)
    names = {id(p): n for n, p in run.objective.named_parameters()}
    assert all(p.ndim > 1 and not names[id(p)].endswith("bias") for p in decays)
    assert all(p.ndim <= 1 or names[id(p)].endswith("bias") for p in still)
    assert {id(p) for p in (*decays, *still)} == {id(p) for p in run.learning}
    assert not {id(p) for p in run.learning} & {id(p) for p in run.objective.teacher.parameters()}
    run._advance(batch_of(run))
    assert run.optimizer.param_groups[0]["weight_decay"] == run.plan.decay[0]
    assert run.optimizer.param_groups[1]["weight_decay"] == 0


def test_the_teacher_is_the_moving_average_of_the_student(cohort, model, tmp_path):
    run = run_of(cohort, model, "dynamics", tmp_path)
    expected = [p.clone() for p in run.objective.teacher.parameters()]
    for step in range(3):
        run._advance(batch_of(run, step))
        momentum = linear(*run.plan.momentum, step / run.plan.steps)
        for e, fast in zip(expected, run.objective.student.parameters(), strict=True):
            e.mul_(momentum).add_(fast.detach(), alpha=1 - momentum)
    for e, slow in zip(expected, run.objective.teacher.parameters(), strict=True):
        assert torch.allclose(e, slow, atol=1e-7)


def test_the_predictor_reads_the_students_geometry_and_is_saved_with_it(cohort, tmp_path):
    trained = train(cohort, tmp_path, "dynamics", steps=2)
    state = torch.load(tmp_path / "dynamics" / "checkpoint.pt", weights_only=True)["objective"]
    prefix = "student.pos_embed."
    for k in (k for k in state if k.startswith(prefix)):
        own = trained.networks.state_dict()[f"dynamics_predictor.predictor_pos_embed.{k[18:]}"]
        assert torch.equal(own, state[k])
    for k in (k for k in state if k.startswith("teacher.")):
        assert torch.equal(trained.networks.state_dict()[f"dynamics.{k[8:]}"], state[k])


@pytest.mark.parametrize("stage", STAGES)
def test_only_the_stage_learns(cohort, model, stage, tmp_path):
    before, after = weights(model), weights(train(cohort, tmp_path, stage, model=model, steps=2))
    parts = {"structure": ("structure",), "dynamics": ("dynamics",), "harmonizer": ("harmonizer",)}
    changed = {k.split(".")[0] for k in before if not torch.equal(before[k], after[k])}
    assert changed
    assert all(k.startswith(parts[stage]) for k in changed)


def test_subjects_with_one_modality_teach_the_harmonizer(cohort, model, tmp_path):
    run = run_of(cohort, model, "harmonizer", tmp_path, drop_modality=1.0)
    single = [i for i in run.samples.usable if not all(t[i] for t in run.samples.has.values())]
    assert len(single) == 2
    for i in single:
        losses = run.objective([run.samples[0, int(i)]])
        assert sorted(len(v) for v in losses.values()) == [0, 1]
        sum(v.sum() for v in losses.values()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in run.learning)
    both = next(i for i in run.samples.usable if i not in single)
    sample = run.samples[0, int(both)]
    assert sample.unseen
    assert all(len(v) == 1 for v in run.objective([sample]).values())  # still asked for both


def test_each_term_is_the_mean_over_the_subjects_that_have_it(cohort, model, tmp_path):
    run = run_of(cohort, model, "harmonizer", tmp_path, batch=8)
    with torch.no_grad():
        each = [run.objective([s]) for s in batch_of(run)]
    wanted = {k: torch.cat([e[k] for e in each]).mean() for k in run.objective.terms}
    losses, _, _ = run._gradients(batch_of(run))
    for k, v in wanted.items():
        assert np.isclose(losses[k], float(v), rtol=1e-5)


def test_training_lowers_the_held_out_loss(cohort, tmp_path):
    train(cohort, tmp_path, "structure", steps=30, evaluate_every=10)
    found = read_log(tmp_path, "structure").held_out_loss.values
    assert found[-1] < found[0]
    assert found[-1] < 0.9  # a flat guess scores 1


HELD_OUT_OF_SIX = set(np.unique([f"p{i}" for i in range(6)])[
    cut([f"p{i}" for i in range(6)], {"held out": 0.4, "train": 0.6}, 0) == "held out"
])  # fmt: skip


@pytest.mark.parametrize("stage", STAGES)
def test_nothing_trains_on_held_out_participants(cohort, model, stage, tmp_path):
    """Two rows of one person stay on one side, in every stage the same people."""
    twice = cohort.assign_coords(participant=("subject", [f"p{i // 2}" for i in range(12)]))
    run = run_of(twice, model, stage, tmp_path, held_out=0.4)
    people = twice.participant.values
    trained = {people[i] for step in range(20) for i in run.batch(step)}
    tested = {people[i] for i in run.test}
    assert tested
    assert not trained & tested
    assert trained == {people[i] for i in run.train}
    assert tested <= HELD_OUT_OF_SIX  # two fifths of six people, whatever the stage


def test_a_pass_meets_every_subject_once(cohort, model, tmp_path):
    run = run_of(cohort, model, "structure", tmp_path, batch=3)
    per_pass = len(run.train) // 3
    for number in range(3):
        met = np.concatenate([run.batch(number * per_pass + k) for k in range(per_pass)])
        assert len(set(met.tolist())) == 3 * per_pass


def test_the_seed_decides_the_first_weights_too(cohort, tmp_path):
    one, two, other = (
        weights(train(cohort, tmp_path / str(i), steps=1, seed=s)) for i, s in enumerate((4, 4, 5))
    )
    assert same(one, two)
    assert not torch.equal(one["dynamics.norm.weight"] * 0, one["dynamics.norm.weight"])
    assert not torch.equal(one["harmonizer.cls_token"], other["harmonizer.cls_token"])


# What is seen ------------------------------------------------------------------------------------


def test_the_log_is_a_dataset_and_watched(cohort, tmp_path):
    seen = []
    train(cohort, tmp_path, "dynamics", watch=lambda log, model: seen.append(log))
    log = read_log(tmp_path, "dynamics")
    assert log.step.values.tolist() == [1, 2, 3, 4, 5, 6]
    assert log.evaluation.values.tolist() == [3, 6]
    assert {"loss", "rate", "norm", "tokens"} <= {k for k in log if log[k].dims == ("step",)}
    monitors = {"held_out_loss", "variance", "effective_rank", "cosine"}
    assert monitors == {k for k in log if log[k].dims == ("evaluation",)}
    assert all("units" not in v.attrs and v.attrs["long_name"] for v in log.data_vars.values())
    assert [int(s.step[-1]) for s in seen] == [3, 6]
    assert seen[-1].identical(log)


def test_a_line_cut_short_by_a_kill_is_not_read(cohort, tmp_path):
    train(cohort, tmp_path)
    before = read_log(tmp_path, "structure")
    with open(tmp_path / "structure" / "log.jsonl", "a") as file:
        file.write('{"kind": "step", "st')
    assert read_log(tmp_path, "structure").identical(before)


def test_the_figure_of_a_log_shows_its_numbers(cohort, tmp_path):
    train(cohort, tmp_path)
    log = read_log(tmp_path, "structure")
    traces = {t.name or i: t for i, t in enumerate(plot_log(log).data)}
    assert np.array_equal(traces["loss"].y, log.loss.values)
    assert np.array_equal(traces["held-out loss"].x, log.evaluation.values)
    shown = [tuple(t.y) for t in traces.values()]
    for name in ("effective_rank", "variance", "cosine"):
        assert tuple(log[name].values) in shown


def test_monitors_of_known_representations():
    random = torch.Generator().manual_seed(0)
    free = torch.randn(64, 5, 16, generator=random)
    found = collapse(free)
    assert abs(found["variance"] - 1) < 0.05
    assert 14.5 < found["effective_rank"] <= 16
    assert abs(found["cosine"]) < 0.05
    place = 10 * torch.randn(1, 5, 16, generator=random)  # the same in everyone: no information
    assert np.isclose(collapse(free + place)["variance"], found["variance"], rtol=1e-4)
    line = torch.randn(64, 5, 1, generator=random) * torch.randn(16, generator=random)
    assert np.isclose(collapse(line)["effective_rank"], 1, atol=1e-6)
    constant = collapse(place.expand(8, -1, -1))
    assert constant["variance"] < 1e-10
    assert np.isclose(constant["cosine"], 1)
    assert all(math.isnan(v) for v in collapse(place).values())


def test_collapse_warns_and_says_what_to_do(cohort, tmp_path, monkeypatch):
    constant = {"held_out_loss": 0.1, "variance": 1e-9, "effective_rank": 1.0, "cosine": 1.0}
    monkeypatch.setattr(Run, "evaluate", lambda self, rows: constant)
    with pytest.warns(UserWarning, match="collapsing at step 2: effective rank 1.0.*Lower rate="):
        train(cohort, tmp_path, steps=2, evaluate_every=2)


# What survives -----------------------------------------------------------------------------------


def break_off(step, *args, **options):
    """Train, and break off at a step as Ctrl-C would."""
    advance = Run._advance

    def broken(self, samples):
        if self.step == step:
            raise KeyboardInterrupt
        advance(self, samples)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "_advance", broken)
        with pytest.raises(KeyboardInterrupt):
            train(*args, **options)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("step", [1, 5])
def test_a_broken_run_resumed_is_the_unbroken_one(cohort, model, stage, step, tmp_path):
    whole = train(cohort, tmp_path / "whole", stage, model=model)
    break_off(step, cohort, tmp_path / "broken", stage, model=model)
    resumed = train(cohort, tmp_path / "broken", stage, model=model, resume=True)
    assert same(weights(whole), weights(resumed))
    assert log_of(tmp_path / "whole", stage) == log_of(tmp_path / "broken", stage)


def test_resuming_a_finished_run_changes_nothing(cohort, tmp_path):
    once = train(cohort, tmp_path)
    log = log_of(tmp_path, "structure")
    again = train(cohort, tmp_path, resume=True)
    assert same(weights(once), weights(again))
    assert log_of(tmp_path, "structure") == log


def test_stages_build_on_one_another(cohort, tmp_path):
    made = {stage: weights(train(cohort, tmp_path, stage, steps=2)) for stage in STAGES}
    last = made["harmonizer"]
    for k in last:
        part = k.split(".")[0].split("_")[0]
        assert torch.equal(last[k], made[part][k])
    found = load_model(str(tmp_path))
    assert same(weights(found), last)
    stages = found.provenance["stages"]
    assert list(stages) == list(STAGES)
    assert stages["dynamics"]["recipe"]["steps"] == 2


def test_a_loss_that_is_not_finite_stops_the_run(cohort, tmp_path, monkeypatch):
    whole = train(cohort, tmp_path / "whole")
    real, calls = structure_file.mae_loss, []

    def poisoned(*args):
        calls.append(1)
        return real(*args) * (float("nan") if len(calls) > 5 else 1)

    with monkeypatch.context() as patch:
        patch.setattr(objectives_file, "mae_loss", poisoned)
        with pytest.raises(InputError) as caught:
            train(cohort, tmp_path / "run", evaluate_every=100)
    text = str(caught.value)
    assert "nan" in text
    assert "at step 5" in text
    assert str(tmp_path / "run" / "structure" / "checkpoint.pt") in text
    run = run_of(cohort, random_model(TINY), "structure", tmp_path / "other")
    assert all(s in text for s in cohort.subject.values[run.batch(5)])
    kept = torch.load(tmp_path / "run" / "structure" / "checkpoint.pt", weights_only=True)
    assert kept["step"] == 4
    resumed = train(cohort, tmp_path / "run", evaluate_every=100, resume=True)
    assert same(weights(whole), weights(resumed))


def damage(store, name, keep=0.5):
    """Cut every chunk file of an array short."""
    files = [p for p in (store / name / "c").rglob("*") if p.is_file()]
    assert files
    for path in files:
        content = path.read_bytes()
        path.write_bytes(content[: int(len(content) * keep)])


@pytest.mark.parametrize("keep", [0.5, 0.0])
def test_an_unreadable_chunk_names_the_store_and_the_subject(store, keep, tmp_path):
    copy = shutil.copytree(store, tmp_path / "copy.zarr")
    train(copy, tmp_path / "run", steps=4)
    checkpoint = (tmp_path / "run" / "structure" / "checkpoint.pt").read_bytes()
    damage(copy, "t1", keep)
    with pytest.raises(InputError, match=r"Subject 's\d\d': Expected to read 't1' in .*copy.zarr"):
        train(copy, tmp_path / "other", steps=4)
    kept = tmp_path / "run" / "structure" / "checkpoint.pt"
    assert kept.read_bytes() == checkpoint


def test_a_full_disk_leaves_the_last_checkpoint_whole(cohort, tmp_path):
    whole = train(cohort, tmp_path / "whole")
    out = tmp_path / "run"
    break_off(3, cohort, out)
    before = (out / "structure" / "checkpoint.pt").read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, limits[1]))
    try:
        with pytest.raises(InputError, match="Expected to write .*checkpoint.pt.*Make room"):
            train(cohort, out, resume=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (out / "structure" / "checkpoint.pt").read_bytes() == before
    assert not list(out.rglob("*.part"))
    resumed = train(cohort, out, resume=True)
    assert same(weights(whole), weights(resumed))


def test_a_damaged_checkpoint_is_named(cohort, tmp_path):
    train(cohort, tmp_path)
    path = tmp_path / "structure" / "checkpoint.pt"
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(InputError, match="whole checkpoint.*checkpoint.pt"):
        train(cohort, tmp_path, resume=True)


# What is refused ---------------------------------------------------------------------------------


def test_a_cohort_without_the_modality_is_refused(cohort, tmp_path):
    without = cohort.drop_vars("t1").assign_coords(has_t1=("subject", np.zeros(12, bool)))
    with pytest.raises(InputError, match="with t1 for the stage 'structure', found bold"):
        train(without, tmp_path)
    assert not tmp_path.joinpath("structure").exists()


def test_fewer_subjects_than_a_batch_are_refused(cohort, tmp_path):
    with pytest.raises(InputError, match="at least a batch of 12 subjects.*found 9"):
        train(cohort, tmp_path, batch=12)


def test_a_folder_that_holds_a_run_is_refused(cohort, tmp_path):
    train(cohort, tmp_path, steps=1)
    with pytest.raises(InputError, match="without a run of the stage 'structure'"):
        train(cohort, tmp_path, steps=1)


def test_a_folder_of_another_model_is_refused(cohort, tmp_path):
    train(cohort, tmp_path, steps=1)
    with pytest.raises(InputError, match="the model 'small' in .* found 'tiny'"):
        train(cohort, tmp_path, "dynamics", preset="small")
    wider = replace(TINY, structure=replace(TINY.structure, depth=2))
    with pytest.raises(InputError, match="structure.depth"):
        train(cohort, tmp_path, "dynamics", preset=wider)
    with pytest.raises(InputError, match="structure.depth"):
        train(cohort, tmp_path, "dynamics", model=random_model(wider))


def test_an_unknown_preset_is_refused(cohort, tmp_path):
    with pytest.raises(InputError, match=f"{next(iter(PRESETS))}.*found 'huge'"):
        train(cohort, tmp_path, preset="huge")


def test_another_atlas_is_refused(cohort, tmp_path):
    with pytest.raises(InputError, match="schaefer100"):
        train(cohort.assign_attrs(atlas="schaefer200"), tmp_path, "dynamics")


def test_the_harmonizer_needs_encoders(cohort, tmp_path):
    with pytest.raises(InputError, match="Expected encoders for the harmonizer"):
        train(cohort, tmp_path, "harmonizer")


@pytest.mark.parametrize("changes, named", [
    ({"rate": (1e-3, 2e-2, 1e-3)}, "rate"), ({"steps": 8, "batch": 3}, "steps, batch"),
    ({"held_out": 0.4}, "held_out"), ({"seed": 1}, "seed"),
])  # fmt: skip
def test_resuming_with_other_settings_names_them(cohort, tmp_path, changes, named):
    train(cohort, tmp_path, steps=4)
    with pytest.raises(InputError, match=f"found other {named}"):
        train(cohort, tmp_path, resume=True, **{"steps": 4, **changes})


def test_resuming_with_other_subjects_or_encoders_is_refused(cohort, tmp_path):
    for stage in STAGES:
        train(cohort, tmp_path, stage, steps=2)
    with pytest.raises(InputError, match="subjects"):
        train(cohort.isel(subject=slice(1, None)), tmp_path, steps=2, resume=True)
    other = random_model(TINY, seed=1)
    with pytest.raises(InputError, match="encoders"):
        train(cohort, tmp_path, "harmonizer", steps=2, resume=True, model=other)


def test_how_it_is_computed_may_change_on_resuming(cohort, tmp_path):
    train(cohort, tmp_path / "whole")
    break_off(3, cohort, tmp_path / "run")
    train(cohort, tmp_path / "run", resume=True, tokens_at_once=100, checkpoint_every=1)
    one, other = (read_log(tmp_path / k, "structure").loss for k in ("whole", "run"))
    assert np.allclose(one, other, rtol=1e-4)


@pytest.mark.parametrize("held_out, fact", [
    (["s99"], "found others .s99."), (["s00"], "participants on both sides"),
    (["s03"], "held-out subjects with bold, found none"),
])  # fmt: skip
def test_held_out_ids_that_do_not_fit_are_refused(cohort, model, held_out, fact):
    twice = cohort.assign_coords(
        participant=("subject", ["s01", *cohort.subject.values[1:].tolist()])
    )
    with pytest.raises(InputError, match=fact):
        held_out_rows(samples_of(twice, model, "dynamics"), held_out)


def test_unknown_subjects_are_refused(cohort, tmp_path):
    with pytest.raises(InputError, match="found others .s99."):
        train(cohort, tmp_path, subjects=["s00", "s99"])


def test_parcels_without_signal_are_refused_before_any_work(cohort, tmp_path):
    low = cohort.assign_coords(coverage=("subject", np.where(np.arange(12) == 7, 0.98, 1.0)))
    with pytest.raises(InputError, match="coverage below 1 in 1 subjects .s07."):
        train(low, tmp_path, "dynamics")
    assert not list(tmp_path.iterdir())


def test_a_constant_parcel_names_the_subject(cohort, tmp_path):
    flat = cohort.copy(deep=True)
    flat.bold[:, 4] = np.where(np.isfinite(flat.bold[:, 4]), 1.0, np.nan)
    with pytest.raises(InputError, match=r"Subject 's\d\d': Expected parcels with a signal"):
        train(flat, tmp_path, "dynamics")


# Compiled ----------------------------------------------------------------------------------------


def test_compiled_blocks_give_the_step_of_eager_ones(cohort, model, tmp_path):
    try:
        torch.compile(lambda x: x + 1)(torch.ones(2))
    except Exception as error:
        pytest.skip(f"no compiler: {error}")
    found = []
    for compiled in (False, True):
        run = run_of(cohort, model, "structure", tmp_path / str(compiled), compile=compiled)
        losses, _, norm = run._gradients(batch_of(run))
        found.append((losses["loss"], norm, *(p.grad for p in run.learning)))
        assert not any("_orig_mod" in k for k in run.objective.state_dict())
    (loss, norm, *gradients), (other_loss, other_norm, *others) = found
    assert np.isclose(loss, other_loss, rtol=1e-5)
    assert np.isclose(norm, other_norm, rtol=1e-4)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(gradients, others, strict=True))


def test_every_stage_has_an_objective_and_a_cost(cohort, model):
    assert tuple(OBJECTIVES) == STAGES
    for stage in STAGES:
        feed = samples_of(cohort, model, stage)
        sample = feed[0, 0]
        windows = [w for each in sample.reading.windows.values() for w in each]
        assert sample.cost == sum(w[..., 0].numel() for w in windows)


def test_checkpoints_say_what_they_are(cohort, tmp_path):
    train(cohort, tmp_path, steps=2)
    state = torch.load(tmp_path / "structure" / "checkpoint.pt", weights_only=True)
    assert state["step"] == 2
    assert set(state) == {
        "plan", "config", "subjects", "held_out", "encoders", "step", "objective", "optimizer",
        "stopping",
    }  # fmt: skip
    assert json.loads(json.dumps(state["plan"]))["stage"] == "structure"
    assert loop_file.FREE[0] in state["plan"]


def test_live_draws_the_log_and_a_brain_coming_back(cohort, tmp_path, monkeypatch):
    import IPython.display

    from bhx.show.hidden import live

    drawn, again = [], []

    class Handle:
        def update(self, figure, raw):
            again.append(figure)

    def display(figure, raw, display_id):
        drawn.append(figure)
        return Handle()

    monkeypatch.setattr(IPython.display, "display", display)
    watch = live(cohort, str(cohort.subject.values[0]))
    train(cohort, tmp_path, "structure", watch=watch)
    assert len(drawn) == 2  # the log and the brain, once each
    assert again
    assert len(again) % 2 == 0
