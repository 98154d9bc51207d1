"""Laws of the simple predictors that a pretrained model stands beside."""

from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_runs import QUICK, TINY, tiny_cohort

from bhx.encode.model import random_model
from bhx.errors import InputError
from bhx.modalities.bold import jepa_masks
from bhx.train.log import read_log
from bhx.train.pretrain import pretrain

with pytest.MonkeyPatch.context() as patch:
    patch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")
    import predictors
    from predictors import held_out_errors

HELD_OUT = ["s09", "s10", "s11"]


@pytest.fixture(scope="module")
def cohort():
    return tiny_cohort()


@pytest.fixture(scope="module")
def model():
    return random_model(TINY, device="cpu")


@pytest.fixture(scope="module")
def errors(cohort, model):
    return held_out_errors(cohort, model, held_out=HELD_OUT)


def of(errors, stage, predictor, target=None):
    chosen = (errors.stage == stage) & (errors.predictor == predictor)
    chosen &= True if target is None else errors.target == target
    return errors.isel(row=np.flatnonzero(chosen.values))


def test_every_stage_has_its_predictors_and_the_network(errors):
    found = {s: errors.predictor.values[errors.stage.values == s].tolist() for s in
             ("structure", "dynamics", "harmonizer")}  # fmt: skip
    assert found["structure"] == ["zero", "mean cube of the place", "interpolated voxels",
                                  "network"]  # fmt: skip
    assert found["dynamics"] == ["mean token of the place", "last value", "mean patch", "network"]
    assert found["harmonizer"] == 2 * ["mean token of the place", "PCA of tokens",
                                       "PCA of subjects", "network"]  # fmt: skip
    assert errors.subjects.values.tolist() == [3] * 16
    assert np.isfinite(errors.error).all()


def test_explained_is_relative_to_the_first_predictor(errors):
    for stage, first in (("structure", "zero"), ("dynamics", "mean token of the place")):
        assert of(errors, stage, first).explained.item() == 0
        network = of(errors, stage, "network")
        share = 1 - network.error.item() / of(errors, stage, first).error.item()
        assert np.isclose(network.explained.item(), share)


def test_floats_are_those_of_the_hub_at_most(errors):
    floats = (1 + TINY.harmonizer.hubs) * TINY.harmonizer.width
    found = errors.where(errors.stage == "harmonizer", drop=True)
    assert (found.floats.where(found.predictor == "network", drop=True) == floats).all()
    assert (found.floats <= floats).all()


def test_cubes_of_one_and_the_same_head_are_their_mean(cohort, model):
    """Everybody has the T1 of the first: the mean of the training subjects knows it all."""
    same = cohort.copy(deep=True)
    same.t1[:] = cohort.t1[0].values
    found = held_out_errors(same, model, stages=["structure"], held_out=HELD_OUT[1:])
    assert of(found, "structure", "mean cube of the place").error.item() < 1e-8
    assert of(found, "structure", "zero").error.item() > 0.5


def test_smooth_heads_are_interpolated(cohort, model):
    """Voxels that grow along an axis are read off the visible ones; noise is not."""
    smooth = cohort.copy(deep=True)
    ramp = np.arange(1, 11)[:, None, None] * np.ones((1, 12, 10))
    smooth.t1[:] = ramp * np.linspace(1, 2, 12)[:, None, None, None]
    found, noisy = (
        of(held_out_errors(c, model, stages=["structure"], held_out=HELD_OUT), "structure",
           "interpolated voxels").explained.item()
        for c in (smooth, cohort)
    )  # fmt: skip
    assert found > 0.8
    assert noisy < 0.1


def test_people_alike_but_for_one_trait_are_one_axis():
    random = np.random.default_rng(0)
    trait, pattern = random.standard_normal(8), random.standard_normal((5, 4))
    people = torch.tensor(trait[:, None, None] * pattern)
    axes = predictors._axes_of_people(people - people.mean(0))
    assert axes.shape == (1, 20)
    new = torch.tensor(2.5 * pattern).flatten()
    assert torch.allclose(axes.T @ (axes @ new), new)


def test_axes_are_orthonormal_and_fewer_than_people():
    people = torch.randn(6, 5, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    axes = predictors._axes_of_people(people - people.mean(0))
    assert len(axes) == 5
    assert torch.allclose(axes @ axes.T, torch.eye(5, dtype=torch.float64), atol=1e-9)


@pytest.mark.parametrize("seed", range(4))
def test_last_value_and_mean_patch_are_read_off_the_visible(seed):
    random = np.random.default_rng(seed)
    parcels, patches = 7, 9
    target = torch.tensor(random.standard_normal((parcels, patches, 3)))
    keep, hide = (torch.tensor(x) for x in jepa_masks(parcels, patches, random))
    last, mean = predictors._from_visible(target, keep, hide)
    seen = np.zeros((parcels, patches), bool)
    seen.flat[keep.numpy()] = True
    for at, one, other in zip(hide.tolist(), last, mean, strict=True):
        row, column = divmod(at, patches)
        there = np.flatnonzero(seen[row])
        if len(there):
            nearest = there[np.abs(there - column).argmin()]
            assert torch.equal(one, target[row, nearest])
            assert torch.allclose(other, target[row, there].mean(0))
        else:
            everything = target[torch.tensor(seen)].mean(0)
            assert torch.allclose(one, everything)
            assert torch.allclose(other, everything)


def test_one_held_out_subject_does_not_change_another(cohort, model):
    """Nothing is fitted on held-out subjects."""
    train = ["s00", "s01", "s02", "s04", "s06", "s07", "s08"]
    each = {
        held_out: held_out_errors(
            cohort, model, stages=["harmonizer"], held_out=held_out, subjects=[*train, *held_out]
        ).error.values
        for held_out in (("s10",), ("s11",), ("s10", "s11"))
    }
    mean = (each["s10",] + each["s11",]) / 2
    assert np.allclose(mean, each["s10", "s11"], rtol=1e-4)


def test_the_student_of_the_run_gives_the_context(cohort, tmp_path):
    """What the log of the run measured, on the same masks and whole scans."""
    plain = {**QUICK, "crop": False, "decimate": (1,), "held_out": HELD_OUT, "steps": 12}
    trained = pretrain(cohort, out=tmp_path, stage="dynamics", **plain)
    asked = {"stages": ["dynamics"], "held_out": HELD_OUT}
    with_student, without = (
        of(held_out_errors(cohort, trained, run=run, **asked), "dynamics", "network").error.item()
        for run in (tmp_path, None)
    )
    assert with_student != without
    smooth = read_log(tmp_path, "dynamics").held_out_loss[-1].item()
    assert 2 * smooth <= with_student * (1 + 1e-4)  # smooth-L1 is at most half the square
    assert 2 * smooth > 0.8 * with_student
    with pytest.raises(InputError, match="checkpoint of the dynamics"):
        held_out_errors(cohort, trained, run=tmp_path / "elsewhere", **asked)


def test_a_model_without_this_stage_needs_held_out_subjects(cohort, model):
    with pytest.raises(InputError, match="stage 'structure' was pretrained.*none"):
        held_out_errors(cohort, model)
