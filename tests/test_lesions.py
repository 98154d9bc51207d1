"""Laws of lesions and gradients: what is removed is absent, and parts add up to the whole."""

import numpy as np
import pytest
import torch
import xarray as xr

from bhx import embed
from bhx.encode.inputs import Reading, encode_readings, sequences
from bhx.errors import InputError
from bhx.latents.gradients import _reading, integrated_gradients
from bhx.latents.lesions import _without, lesion


@pytest.fixture(scope="module")
def intact(brains):
    return embed(*brains, keep=("attention",)).compute()


def test_lesion_of_a_modality_is_the_cohort_without_it(brains, intact):
    cohort, model = brains
    gone = lesion(cohort, model, modality="t1", intact=intact)
    alone = embed(cohort.drop_vars("t1").assign_coords(has_t1=~cohort.has_bold), model)
    np.testing.assert_allclose(gone.hub, alone.hub, atol=1e-5)
    expected = np.linalg.norm(alone.hub.values - intact.hub.values, axis=-1)
    np.testing.assert_allclose(gone.moved, expected, rtol=1e-4)


def test_lesion_of_parcels_leaves_the_other_parcels(brains, intact):
    cohort, model = brains
    gone = cohort.network == "Limbic"
    cut = _without(cohort, cohort.roi.values[gone], None)
    assert np.isnan(cut.bold.isel(roi=gone.values)).all()
    xr.testing.assert_equal(cut.bold.isel(roi=~gone.values), cohort.bold.isel(roi=~gone.values))
    xr.testing.assert_equal(cut.t1, cohort.t1)
    assert (lesion(cohort, model, roi=cohort.roi.values[gone], intact=intact).moved > 0).all()


def test_lesion_of_all_parcels_is_that_of_the_modality(brains):
    cohort, _ = brains
    cut = _without(cohort, cohort.roi.values, None)
    assert not cut.has_bold.any()
    assert cut.has_t1.all()


def test_who_has_nothing_left_is_left_out(brains):
    cohort, _ = brains
    some = cohort.assign_coords(has_t1=("subject", [True, False, True, True]))
    left = _without(some, None, "bold")
    np.testing.assert_array_equal(left.subject, some.subject[[0, 2, 3]])


def test_integrated_gradients_add_up_to_the_distance(brains):
    cohort, model = brains
    found = integrated_gradients(cohort, model, cohort.subject.values[0], 5, steps=24)
    assert abs(found.attrs["gap"]) < 1e-3
    total = float(found.bold_part.sum() + found.t1_part.sum())
    assert total == pytest.approx(found.attrs["distance"], rel=1e-3)
    assert found.bold_part.sizes == {"roi": 100}


@pytest.mark.filterwarnings("ignore:Parcels were aligned by name")
def test_integrated_gradients_follow_parcel_names(brains):
    cohort, model = brains
    order = np.random.default_rng(0).permutation(100)
    who = cohort.subject.values[1]
    straight, mixed = (
        integrated_gradients(c.isel(time=slice(0, 80)).drop_vars("t1"), model, who, 0, steps=2)
        for c in (cohort, cohort.isel(roi=order))
    )
    xr.testing.assert_allclose(straight, mixed, rtol=1e-4)


def bad_lesions():
    yield {}, "found nothing"
    yield {"roi": ["Vis"]}, "found Vis"
    yield {"modality": "pet"}, "found 'pet'"


@pytest.mark.parametrize("asked, says", list(bad_lesions()))
def test_bad_lesions_are_named(brains, asked, says):
    with pytest.raises(InputError) as caught:
        lesion(*brains, **asked)
    assert says in str(caught.value)


def test_integrated_gradients_are_the_sum_of_gradients_on_the_way(brains):
    """An independent quadrature: autograd at the same nodes."""
    cohort, model = brains
    who, token, steps = cohort.subject.values[2], 7, 8
    reading = _reading(cohort, model, who)
    whole = {name: windows[0] for name, windows in reading.windows.items()}

    def hub(inputs):
        one = Reading({name: [x] for name, x in inputs.items()}, reading.there)
        read = sequences(model.config, [one], encode_readings(model.networks, [one], model.device))
        return model.networks.harmonizer(read.subjects)[0, token]

    with torch.no_grad():
        way = hub(whole) - hub({name: torch.zeros_like(x) for name, x in whole.items()})
    nodes, weights = np.polynomial.legendre.leggauss(steps)
    totals = {name: torch.zeros_like(x) for name, x in whole.items()}
    for node, weight in zip((nodes + 1) / 2, weights / 2, strict=True):
        scaled = {name: (float(node) * x).requires_grad_() for name, x in whole.items()}
        found = torch.autograd.grad(hub(scaled) @ way / way.norm(), list(scaled.values()))
        for (name, x), gradient in zip(whole.items(), found, strict=True):
            totals[name] += float(weight) * gradient * x
    found = integrated_gradients(cohort, model, who, token, steps=steps)
    np.testing.assert_allclose(found.bold_part, totals["bold"].sum((1, 2)), atol=1e-5)
    cubes = totals["t1"].sum(-1).reshape(found.t1_part.shape)
    np.testing.assert_allclose(found.t1_part, cubes, atol=1e-5)
