"""What a stage hides and what comes back: the pictures show what the loss is about."""

import numpy as np
import pytest
import torch

import bhx
from bhx.encode.model import random_model
from bhx.errors import InputError
from bhx.modalities.t1 import cube_mask, cubes, scale_t1
from bhx.model.structure import mae_loss
from bhx.show.hidden import hidden_cubes


@pytest.fixture(scope="module")
def model():
    return random_model("paper", device="cpu")


@pytest.fixture(scope="module")
def people():
    return bhx.synthetic_cohort(6, missing=0.4).drop_vars("bold").load()


def with_t1(people):
    return str(people.subject.values[people.has_t1][0])


def test_normalized_pictures_hold_the_loss_of_the_masked_autoencoder(people, model):
    subject = with_t1(people)
    brain = hidden_cubes(people, model, subject, share=0.5, seed=3, normalized=True)
    hidden = cube_mask(model.config.structure.tokens, 0.5, np.random.default_rng(3))
    hidden = torch.from_numpy(hidden)[None]
    t1 = scale_t1(people.t1.sel(subject=subject).values, 4.0)
    t1 = torch.from_numpy(cubes(t1, model.config.structure.cube))[None]
    loss = mae_loss(model.networks.structure, model.networks.structure_decoder, t1, hidden)
    error = ((brain.returned - brain.t1) ** 2).where(brain.visible.isnull()).mean()
    assert float(error) == pytest.approx(loss.item(), rel=1e-4)


@pytest.mark.parametrize("normalized", [False, True])
def test_visible_voxels_come_back_as_they_are(people, model, normalized):
    brain = hidden_cubes(people, model, with_t1(people), normalized=normalized)
    gone = brain.visible.isnull()
    assert float(gone.mean()) == pytest.approx(0.75, abs=0.01)
    assert bool((brain.returned == brain.t1).where(~gone, True).all())
    assert float(abs(brain.returned - brain.t1).where(gone).max()) > 0.1


def test_pictures_are_in_the_units_of_the_scan(people, model):
    subject = with_t1(people)
    brain = hidden_cubes(people, model, subject)
    np.testing.assert_array_equal(brain.t1, people.t1.sel(subject=subject))
    assert brain.x.equals(people.x)


def test_a_subject_without_t1_is_named(people, model):
    without = str(people.subject.values[~people.has_t1][0])
    with pytest.raises(
        InputError, match=f"Expected a subject with a T1, found none for '{without}'"
    ):
        hidden_cubes(people, model, without)


def test_a_mirrored_view_of_a_t1_is_read_like_its_copy(people, model):
    t1 = people.t1.sel(subject=with_t1(people))
    view = model.structure(t1.copy(data=t1.values[::-1]))
    np.testing.assert_array_equal(view, model.structure(t1.copy(data=t1.values[::-1].copy())))
