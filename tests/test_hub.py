"""Laws of the relational hub: what it reads, how people are compared, what is refused."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import linalg
from tiny_runs import HUB, QUICK, TINY, tiny_cohort

import bhx
from bhx.encode.embed import embed
from bhx.encode.model import random_model
from bhx.errors import InputError
from bhx.modalities.coupling import COUPLING, flattened
from bhx.model.hub import Hub, HubConfig, zero_sum
from bhx.train import objectives
from bhx.train.dataset import Samples, held_out_rows
from bhx.train.loop import Run
from bhx.train.objectives import RelationalObjective, Teacher, disagreement
from bhx.train.recipes import recipe

RELATED = {**QUICK, "preset": HUB, "batch": 16, "held_out": 0.45}


@pytest.fixture(scope="module")
def cohort():
    return tiny_cohort(40, t1_only=(3, 21), bold_only=(5,))


@pytest.fixture(scope="module")
def model():
    return random_model(HUB, device="cpu")


@pytest.fixture(scope="module")
def latents(cohort, model):
    return embed(cohort, model, keep=("attention", "coupling", "cubes")).load()


def facts_of(cohort, i):
    return {"tr": float(cohort.tr[i]), "n_volumes": int(cohort.n_volumes[i])}


# Coupling ---


def test_coupling_is_the_correlation_matrix_to_a_power():
    """An independent computation agrees: scipy's power of numpy's correlations."""
    samples = np.random.default_rng(0).standard_normal((6, 50))
    power = linalg.fractional_matrix_power(np.corrcoef(samples), 0.35)
    np.testing.assert_allclose(flattened(samples), power, atol=1e-8)


def test_coupling_of_more_parcels_than_samples_is_finite_and_positive():
    made = flattened(np.random.default_rng(0).standard_normal((20, 8)))
    assert np.isfinite(made).all()
    assert np.linalg.eigvalsh(made).min() >= 1e-4**0.35 - 1e-9


def test_a_coupling_does_not_depend_on_the_unit_of_a_parcel(cohort):
    scan = COUPLING.trim(cohort.bold.values[0], facts_of(cohort, 0))
    scaled = [COUPLING.scale(x, HUB) for x in (scan, scan * np.arange(1, 101)[:, None] + 5)]
    one, other = (COUPLING.cut(x, facts_of(cohort, 0), HUB)[0] for x in scaled)
    np.testing.assert_allclose(one, other, atol=1e-4)


@pytest.mark.parametrize("keep", [2, 3])
def test_a_slower_tr_of_a_smooth_scan_gives_the_same_coupling(keep):
    seconds = np.arange(400) * 0.72
    random = np.random.default_rng(1)
    waves = np.sin(
        2 * np.pi * (random.uniform(0.01, 0.05, (5, 1)) * seconds + random.random((5, 1)))
    )
    scan = (random.standard_normal((100, 5)) @ waves).astype("float32")
    cut = [
        COUPLING.cut(COUPLING.scale(scan[:, ::k], HUB), {"tr": 0.72 * k}, HUB)[0] for k in (1, keep)
    ]
    assert np.corrcoef(*(COUPLING.summary(x, HUB) for x in cut))[0, 1] > 0.99


def test_parcels_and_patches_that_were_not_measured_are_left_out(cohort):
    scan, facts = COUPLING.scale(cohort.bold.values[0][:, :80], HUB), facts_of(cohort, 0)
    whole = COUPLING.cut(scan, facts, HUB)[0]
    scan[7] = np.nan
    without = COUPLING.cut(scan, facts, HUB)[0]
    others = np.delete(np.arange(100), 7)
    assert np.isnan(without[7]).all()
    assert np.isnan(without[:, 7]).all()
    assert np.isfinite(without[np.ix_(others, others)]).all()
    assert np.isfinite(whole).all()
    scan[:, :20] = np.nan  # the first patch of four
    late = COUPLING.cut(scan, facts, HUB)[0]
    again = COUPLING.cut(scan[:, 20:], facts, HUB)[0]
    assert np.isfinite(late[np.ix_(others, others)]).all()
    assert late.shape == again.shape
    scan[:, :45] = np.nan
    with pytest.raises(InputError, match="at least 2 patches in which every parcel.*found 1"):
        COUPLING.cut(scan, facts, HUB)


def test_a_scan_of_one_patch_is_refused_before_any_work(cohort, model):
    short = cohort.isel(subject=[0]).assign_coords(n_volumes=("subject", [30]))
    with pytest.raises(InputError, match=r"at least 2 patches \(70.56 s\).*'s00'"):
        embed(short, model)


# The hub ---


def subjects_of(n=4, seed=0):
    torch.manual_seed(seed)
    tokens = {"coupling": torch.randn(n, 100, 48), "cubes": torch.randn(n, 150, 48)}
    return [
        {name: (x[i], torch.arange(x.shape[1])) for name, x in tokens.items()} for i in range(n)
    ]


@pytest.fixture
def hub():
    torch.manual_seed(1)
    return Hub(HUB.harmonizer).eval()


@torch.no_grad()
def test_a_subject_does_not_depend_on_who_else_is_in_the_batch(hub):
    batch = subjects_of()
    del batch[1]["cubes"]
    x, at = batch[2]["coupling"]
    batch[2]["coupling"] = x[10:], at[10:]
    together = hub(batch)
    for one, subject in zip(together, batch, strict=True):
        torch.testing.assert_close(hub([subject])[0], one, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_the_order_of_tokens_does_not_matter_and_their_places_do(hub):
    subject = subjects_of(1)[0]
    x, at = subject["coupling"]
    turned = hub([{**subject, "coupling": (x.flip(0), at.flip(0))}])
    torch.testing.assert_close(turned, hub([subject]), atol=1e-5, rtol=1e-5)
    moved = hub([{**subject, "coupling": (x.flip(0), at)}])
    assert (moved - hub([subject])).abs().max() > 0.01


@torch.no_grad()
def test_a_missing_modality_is_a_reading_that_is_not_added(hub):
    """With its reading silenced, a modality that is there changes no more than one that is not."""
    subject = subjects_of(1)[0]
    alone = hub.read([{"coupling": subject["coupling"]}])
    assert (hub.read([subject]) - alone).abs().max() > 0.01
    for block in hub.blocks:
        block.readings["cubes"].proj.weight.zero_()
        block.readings["cubes"].proj.bias.zero_()
    torch.testing.assert_close(hub.read([subject]), alone)


@torch.no_grad()
def test_the_mean_token_does_not_depend_on_the_sketch(hub):
    batch = subjects_of()
    assert (hub(batch) - hub.read(batch)).abs().max() > 0.1
    torch.testing.assert_close(hub(batch).mean(1), hub.pooled(batch), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("places", [3, 100])
def test_a_sketch_is_orthonormal_and_sums_to_zero(places):
    sketch = zero_sum(32, places)
    k = min(31, places)
    torch.testing.assert_close(sketch.sum(0), torch.zeros(places), atol=1e-5, rtol=0)
    values = torch.linalg.svdvals(sketch)[:k]
    torch.testing.assert_close(values, torch.ones(k), atol=1e-5, rtol=0)


@torch.no_grad()
def test_a_subject_without_tokens_is_refused(hub):
    with pytest.raises(InputError, match="with data tokens, found none"):
        hub([{}])


@torch.no_grad()
@pytest.mark.parametrize("method", ["last", "mean", "rollout"])
def test_attention_sums_to_one_over_all_modalities(hub, method):
    batch = subjects_of()
    del batch[0]["coupling"]
    for maps, subject in zip(hub.attention(batch, method), batch, strict=True):
        assert maps.keys() == subject.keys()
        total = sum(x.sum(1) for x in maps.values())
        torch.testing.assert_close(total, torch.ones(4), atol=1e-5, rtol=0)
    alone = hub.attention(batch[:1], method)[0]
    torch.testing.assert_close(alone["cubes"], hub.attention(batch, method)[0]["cubes"])


@torch.no_grad()
def test_attention_of_the_last_layer_is_that_of_one_layer_when_there_is_one():
    torch.manual_seed(0)
    one = Hub(replace(HUB.harmonizer, depth=1)).eval()
    last, mean = (one.attention(subjects_of(), how) for how in ("last", "mean"))
    for a, b in zip(last, mean, strict=True):
        torch.testing.assert_close(a["cubes"], b["cubes"])


# A cohort through it ---


def test_latents_are_labeled_and_a_lone_modality_has_all_the_share(latents, cohort):
    assert latents.hub.shape == (40, 4, 24)
    assert latents.coupling.dims == ("subject", "roi", "feature")
    assert latents.cubes.dims == ("subject", "cx", "cy", "cz", "feature")
    share = latents.modality_share.mean("token").sel(modality="coupling")
    assert share.sel(subject="s05") == 1
    assert share.sel(subject="s03") == 0
    assert 0 < share.sel(subject="s00") < 1
    assert np.isnan(latents.coupling.sel(subject="s03")).all()


def test_kept_tokens_give_the_same_mean_hub_token(latents, model):
    one = latents.sel(subject="s00")
    again = model.harmonize(coupling=one.coupling, cubes=one.cubes)
    np.testing.assert_allclose(again.mean("token"), one.hub.mean("token"), atol=1e-5)


def test_lazy_is_stored_is_one_by_one(cohort, model, latents, tmp_path):
    """People of two TRs, two lengths, some with one modality: together, apart, and from a store."""
    stored = embed(cohort, model, store=tmp_path / "l.zarr", progress=False)
    np.testing.assert_allclose(stored.hub, latents.hub, atol=1e-5)
    for i in (0, 1, 3, 5):
        alone = embed(cohort.isel(subject=[i]), model, tokens_at_once=1)
        np.testing.assert_allclose(alone.hub[0], latents.hub[i], atol=1e-4)


def test_a_scan_longer_than_the_positions_of_an_encoder_is_one_coupling(model):
    long = bhx.synthetic_cohort(1, seed=2, minutes=15, missing=0)[["bold"]].load()
    whole = embed(long, model, keep="coupling").load()
    assert whole.coupling.dims == ("subject", "roi", "feature")
    assert np.isfinite(whole.hub).all()
    facts = {"tr": float(long.tr[0]), "n_volumes": int(long.n_volumes[0])}
    scan = COUPLING.trim(long.bold.values[0], facts)
    (window,) = COUPLING.cut(COUPLING.scale(scan, HUB), facts, HUB)
    by_hand = model.networks.coupling([torch.from_numpy(window)])[0][:, :24]
    np.testing.assert_allclose(whole.coupling[0], by_hand.detach(), atol=1e-5)


def test_parcels_are_taken_by_name(cohort, model, latents):
    with pytest.warns(UserWarning, match="aligned by name"):
        turned = embed(cohort.isel(roi=slice(None, None, -1)), model)
    np.testing.assert_allclose(turned.hub, latents.hub, atol=2e-4)


def test_a_flat_parcel_is_refused_or_left_out(cohort, model):
    flat = cohort.isel(subject=[0, 1]).copy(deep=True)
    flat.bold[0, 4] = 1.0
    with pytest.raises(InputError, match="'s00'.*a constant series in 1 of 100"):
        embed(flat, model).load()
    left = embed(flat, model, missing_parcels="leave out", keep="coupling").load()
    assert np.isnan(left.coupling[0, 4]).all()
    assert np.isfinite(left.coupling[0, 5]).all()
    assert np.isfinite(left.hub).all()


def test_encoders_that_a_model_does_not_have_are_named(model, cohort):
    with pytest.raises(InputError, match="encoder of t1, found 'tiny hub'.*coupling, cubes"):
        model.structure(cohort.t1[0])
    with pytest.raises(InputError, match="encoder for the stage 'dynamics'"):
        bhx.pretrain(cohort, stage="dynamics", out="nowhere", **RELATED)


PLACES = (400, 100, 150, 150)
READS = HubConfig(("bold", "coupling", "t1", "cubes"), PLACES, (0, 100, 0, 8), 4, 24, 1, 2)
WITH_ENCODERS = replace(HUB, harmonizer=READS)


def test_the_hub_reads_encoders_beside_coupling_and_cubes(cohort):
    both = random_model(WITH_ENCODERS, device="cpu")
    keep = ("attention", "dynamics", "structure")
    latents = embed(cohort.isel(subject=slice(6)), both, keep=keep).load()
    np.testing.assert_allclose(latents.modality_share.sum("modality"), 1, atol=1e-5)
    assert (latents.modality_share.sel(subject="s00") > 0).all()


# Relations ---


def test_disagreement_is_one_minus_the_correlation_over_pairs():
    random = np.random.default_rng(0)
    pooled, teacher = random.standard_normal((20, 5)), random.standard_normal((20, 3))
    a, b = (x - x.mean(0) for x in (pooled, teacher))
    pairs = ~np.eye(20, dtype=bool)
    wanted = 1 - np.corrcoef((a @ a.T)[pairs], (b @ b.T)[pairs])[0, 1]
    found = disagreement(torch.tensor(pooled).float(), torch.tensor(teacher @ teacher.T).float())
    assert float(found) == pytest.approx(wanted, abs=1e-5)


def test_a_teacher_gives_principal_scores_with_flattened_singular_values():
    people = torch.from_numpy(np.random.default_rng(0).standard_normal((30, 80)))
    teacher = Teacher(people.float(), 6)
    left = (people - people.mean(0)) / teacher.spread
    u, s, _ = np.linalg.svd(left.numpy(), full_matrices=False)
    ours = np.stack([teacher(one) for one in people.float()])
    gram = (u[:, :6] * s[:6]) @ u[:, :6].T  # signs of components do not matter
    np.testing.assert_allclose(ours @ ours.T, gram, atol=1e-3)
    assert teacher.record["people"] == 30
    assert 0 < teacher.record["explained"] < 1


def begun(cohort, folder, config=HUB, **changes):
    """A relational run that has begun."""
    given = {**RELATED, **changes}
    fields = {k: v for k, v in given.items() if k not in ("preset", "progress", "held_out")}
    plan = recipe("harmonizer", **fields)
    networks = random_model(config, device="cpu").networks.requires_grad_(True)
    objective = RelationalObjective(networks, plan)
    samples = Samples(cohort, config, plan, tuple(config.modalities), objective.hide)
    run = Run(objective, samples, plan, folder, *held_out_rows(samples, given["held_out"]), {})
    run._begin(False)
    return run


def test_teachers_are_fitted_on_training_people_only(cohort, tmp_path):
    one = begun(cohort, tmp_path / "one")
    changed = cohort.copy(deep=True)
    changed.t1[one.test] = changed.t1[one.test] * 3 + 1
    other = begun(changed, tmp_path / "other")
    for name, scores in one.objective.scores.items():
        assert torch.equal(scores[one.train], other.objective.scores[name][one.train])
    assert not torch.equal(
        one.objective.scores["cubes"][one.test], other.objective.scores["cubes"][one.test]
    )
    assert one.objective.fitted["coupling"]["people"] == int(cohort.has_bold[one.train].sum())


def test_gradients_of_parts_are_those_of_the_whole_batch(cohort, tmp_path):
    """What is computed at once changes nothing: all of a batch are compared with one another."""
    found = []
    for at_once in (100_000, 300):
        run = begun(cohort, tmp_path / str(at_once), tokens_at_once=at_once)
        losses, _, norm = run._gradients([run.samples[0, int(i)] for i in run.batch(0)])
        found.append((losses["loss_relations"], run.objective.harmonizer.tokens.grad.clone(), norm))
    assert found[0][0] == pytest.approx(found[1][0], abs=1e-6)
    torch.testing.assert_close(found[0][1], found[1][1], atol=1e-7, rtol=1e-4)


def test_frozen_encoders_read_each_subject_once_a_step(cohort, tmp_path, monkeypatch):
    """People are compared first and learned from then: their tokens are the same both times."""
    run, read = begun(cohort, tmp_path, WITH_ENCODERS), []
    encoder = run.objective.networks[0].dynamics
    encoder.register_forward_hook(lambda m, given, out: read.append(len(given[0])))
    samples = [run.samples[0, int(i)] for i in run.batch(0)]
    losses, _, norm = run._gradients(samples)
    assert sum(read) == sum("bold" in s.has for s in samples)
    assert not any(s.made for s in samples)  # nothing is held for the next step

    kept = objectives.read_sequences
    monkeypatch.setattr(objectives, "read_sequences", lambda *given: kept(*given[:3]))
    run.optimizer.zero_grad()
    read.clear()
    again, _, same = run._gradients(samples)
    assert sum(read) == 2 * sum("bold" in s.has for s in samples)
    assert (losses, norm) == (again, same)


def test_it_trains_in_half_precision(cohort, tmp_path):
    whole, half = (
        begun(cohort, tmp_path / p, precision=p)._gradients for p in ("float32", "bfloat16")
    )
    samples = whole.__self__.samples
    one, other = (
        step([samples[0, int(i)] for i in whole.__self__.batch(0)])[0] for step in (whole, half)
    )
    assert one["loss_relations"] != other["loss_relations"]
    assert one["loss_relations"] == pytest.approx(other["loss_relations"], abs=0.02)


def test_the_loss_and_its_gradient_are_those_of_plain_autograd(cohort, tmp_path):
    run = begun(cohort, tmp_path, reconstruction=0.0, drop_modality=0.0)
    samples, rows = [run.samples[0, int(i)] for i in run.batch(0)], run.batch(0)
    run.plan = run.plan.model_copy(update={"clip": 1e9})
    losses, _, _ = run._gradients(samples)
    hub = run.objective.harmonizer
    ours = hub.tokens.grad.clone()
    hub.tokens.grad = None
    subjects, _ = run.objective.read(samples)
    loss = disagreement(hub.pooled(subjects), run.objective.wanted(rows))
    loss.backward()
    assert losses["loss_relations"] == pytest.approx(float(loss), abs=1e-6)
    torch.testing.assert_close(ours, hub.tokens.grad, atol=1e-7, rtol=1e-4)


def test_no_gradient_of_the_decoder_reaches_the_hub_tokens(cohort, tmp_path):
    grads = []
    for weight in (0.0, 1.0):
        run = begun(cohort, tmp_path / str(weight), reconstruction=weight, clip=1e9)
        run._gradients([run.samples[0, int(i)] for i in run.batch(0)])
        grads.append(run.objective.harmonizer.blocks[0].block.mlp.fc1.weight.grad.clone())
        assert run.objective.harmonizer.decoder_out.weight.grad.abs().sum() > 0 or not weight
    torch.testing.assert_close(*grads)


def test_training_makes_people_lie_as_the_teachers_say(cohort, tmp_path):
    settings = {**RELATED, "steps": 40, "evaluate_every": 40, "rate": (0.0, 5e-3, 0.0)}
    made = bhx.pretrain(cohort, stage="harmonizer", out=tmp_path, **settings)
    log = bhx.read_log(tmp_path, "harmonizer")
    loss = log.loss_relations.values
    assert loss[-5:].mean() < 0.8 * loss[:5].mean()
    assert "held_out_loss_relations" in log
    assert "held_out_loss_cubes" in log
    stage = made.provenance["stages"]["harmonizer"]
    assert set(stage["teachers"]) == {"coupling", "cubes"}
    assert stage["teachers"]["cubes"]["people"] < 40
    json.dumps(stage)


def test_a_run_resumed_is_the_unbroken_one(cohort, tmp_path, monkeypatch):
    settings = {**RELATED, "steps": 6, "checkpoint_every": 2, "evaluate_every": 3}
    whole = bhx.pretrain(cohort, stage="harmonizer", out=tmp_path / "whole", **settings)
    advance = Run._advance

    def killed(run, samples):
        if run.step == 5:
            raise KeyboardInterrupt
        advance(run, samples)

    monkeypatch.setattr(Run, "_advance", killed)
    with pytest.raises(KeyboardInterrupt):
        bhx.pretrain(cohort, stage="harmonizer", out=tmp_path / "broken", **settings)
    monkeypatch.undo()
    again = bhx.pretrain(
        cohort, stage="harmonizer", out=tmp_path / "broken", resume=True, **settings
    )
    for a, b in zip(*(m.networks.state_dict().values() for m in (whole, again)), strict=True):
        assert torch.equal(a, b)


def test_one_modality_is_enough(cohort, tmp_path):
    for variable in ("bold", "t1"):
        alone = cohort[[variable]]
        made = bhx.pretrain(
            alone, stage="harmonizer", out=tmp_path / variable, **{**RELATED, "held_out": 0.2}
        )
        assert len(made.provenance["stages"]["harmonizer"]["teachers"]) == 1
        assert {m.variable for m in made.config.modalities.values()} == {variable}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch": 8}, "a batch of at least 16 people, found 8"),
        ({"loss": "paper"}, "loss to be relational, found 'paper'"),
        ({"batch": 30}, "at least a batch of 30"),
    ],
)
def test_what_cannot_be_compared_is_refused(cohort, tmp_path, changes, message):
    with pytest.raises(InputError, match=message):
        bhx.pretrain(cohort, stage="harmonizer", out=tmp_path, **{**RELATED, **changes})


def test_the_relational_loss_needs_a_relational_hub(cohort, tmp_path):
    model = random_model(TINY, device="cpu")
    settings = {**RELATED, "preset": TINY, "model": model, "loss": "relational"}
    with pytest.raises(InputError, match="loss to be paper, release, found 'relational'"):
        bhx.pretrain(cohort, stage="harmonizer", out=tmp_path, **settings)


def test_settings_are_those_of_the_model_that_is_given(cohort, tmp_path):
    """Not those of the default preset: the paper's harmonizer goes on as the paper's."""
    model, given = random_model(TINY, device="cpu"), {**QUICK, "model": None, "steps": 2}
    del given["preset"], given["batch"]
    made = bhx.pretrain(
        cohort, stage="harmonizer", out=tmp_path, batch=4, **given | {"model": model}
    )
    assert made.provenance["stages"]["harmonizer"]["recipe"]["decimate"] == [1, 2, 3, 4]


def test_a_store_takes_corrected_labels_and_refuses_other_scans(cohort, model, tmp_path):
    path, few = tmp_path / "l.zarr", cohort.isel(subject=slice(4))
    few = few.assign_coords(age=("subject", [20.0, 30.0, 40.0, 50.0]))
    sums = [json.dumps({"sums": [str(i)]}) for i in range(4)]
    few = few.assign_coords(inputs=("subject", sums))
    first = embed(few, model, store=path, progress=False)
    corrected = few.assign_coords(age=("subject", [20.5, 30.0, np.nan, 50.0]))
    again = embed(corrected, model, store=path, progress=False)
    np.testing.assert_array_equal(again.age, corrected.age)
    np.testing.assert_array_equal(again.hub, first.hub)
    other = few.assign_coords(inputs=("subject", [*sums[:3], json.dumps({"sums": ["x"]})]))
    slower = few.assign_coords(tr=few.tr * [1, 2, 1, 1])
    for changed, who in ((other, "s03"), (slower, "s01")):
        with pytest.raises(InputError, match=f"found another .*scan of {who}. Give a new path"):
            embed(changed, model, store=path, progress=False)
