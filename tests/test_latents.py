"""Laws of the latent space: labels travel, nothing depends on the order of rows, nulls are null."""

import numpy as np
import pytest
import xarray as xr

import bhx
from bhx.errors import InputError
from bhx.latents import maps as maps_file
from bhx.latents import pool as pool_file
from bhx.latents import similarity as similarity_file

SITES = np.array(["A", "B"])


def toy(n=24, tokens=6, features=5, rois=8, seed=0, lazy=False):
    """Latents with planted group differences in token 2 and an attention map per token."""
    rng = np.random.default_rng(seed)
    ids = np.array([f"sub-{i:02d}" for i in range(n)])
    group = np.where(np.arange(n) % 2, "patient", "control")
    hub = rng.standard_normal((n, tokens, features)).astype("float32")
    hub[group == "patient", 2] += 2
    to_roi = rng.dirichlet(np.ones(rois), (n, tokens)).astype("float32")
    has_t1 = np.arange(n) % 3 > 0
    data = xr.Dataset(
        {
            "hub": (("subject", "token", "feature"), hub),
            "hub_to_roi": (("subject", "token", "roi"), to_roi),
            "hub_to_t1": (
                ("subject", "token", "cx", "cy", "cz"),
                rng.random((n, tokens, 2, 3, 2)) * has_t1[:, None, None, None, None],
            ),
        },
        {
            "subject": ids,
            "token": np.arange(tokens),
            "participant": ("subject", ids),
            "site": ("subject", SITES[np.arange(n) // 2 % 2]),
            "diagnosis": ("subject", group),
            "age": ("subject", rng.uniform(20, 80, n)),
            "has_bold": ("subject", np.ones(n, bool)),
            "has_t1": ("subject", has_t1),
            "roi": [f"parcel {i}" for i in range(rois)],
            "network": ("roi", np.repeat(["Vis", "Default"], rois // 2)),
        },
        {"atlas": "toy", "model": "toy"},
    )
    return data.chunk({"subject": 5}) if lazy else data


@pytest.mark.parametrize("how, width", [("mean", 5), ("concatenate", 30)])
def test_pool_keeps_subjects_and_stays_lazy(how, width):
    eager, lazy = pool_file.pool(toy(), how), pool_file.pool(toy(lazy=True), how)
    assert eager.features.dims == ("subject", "feature")
    assert eager.sizes["feature"] == width
    assert lazy.features.chunks is not None
    assert {"participant", "site", "age", "has_t1"} <= set(eager.coords)
    assert eager.attrs["name"] == f"hub tokens, {how}"
    xr.testing.assert_allclose(eager, lazy.compute())


def test_pool_of_an_encoder_takes_parcels_and_cubes_as_tokens():
    rng = np.random.default_rng(0)
    bold, t1 = rng.standard_normal((24, 8, 3, 5)), rng.standard_normal((24, 2, 2, 1, 5))
    bold[0] = np.nan  # without BOLD
    data = (
        toy()
        .drop_vars("hub_to_t1")
        .assign(
            dynamics=(("subject", "roi", "patch", "feature"), bold),
            structure=(("subject", "cx", "cy", "cz", "feature"), t1),
        )
    )
    found = pool_file.pool(data, "concatenate", of="dynamics")
    np.testing.assert_allclose(found.features, bold.mean(2).reshape(24, -1), rtol=1e-6)
    assert found.features.isnull().all("feature").sum() == 1
    found = pool_file.pool(data, of="structure")
    np.testing.assert_allclose(found.features, t1.mean((1, 2, 3)), rtol=1e-5)
    assert found.attrs["name"] == "structure tokens, mean"


def test_concatenate_is_token_major():
    data = toy()
    features = pool_file.pool(data, "concatenate").features
    np.testing.assert_array_equal(features[3, 5:10], data.hub[3, 1])


def test_permuting_subjects_permutes_the_projection_and_nothing_else():
    data = toy()
    order = np.random.default_rng(1).permutation(data.sizes["subject"])
    straight = pool_file.project(data, n=3)
    mixed = pool_file.project(data.isel(subject=order), n=3)
    xr.testing.assert_allclose(straight.isel(subject=order), mixed)


def test_projection_signs_do_not_depend_on_the_solver():
    data = pool_file.pool(toy())
    negated = data.assign(features=-data.features)
    np.testing.assert_allclose(pool_file.project(data), -pool_file.project(negated), atol=1e-6)


def test_projection_is_fitted_on_the_chosen_subjects_only():
    data = pool_file.pool(toy())
    chosen = data.site.values == "A"
    changed = data.copy(deep=True)
    changed.features.values[~chosen] *= 100
    fitted = pool_file.project(data, fit_on=chosen)
    other = pool_file.project(changed, fit_on=data.subject.values[chosen])
    np.testing.assert_allclose(fitted[chosen], other[chosen])
    assert float(fitted.explained.sum()) <= 1
    np.testing.assert_allclose(fitted[chosen].mean("subject"), 0, atol=1e-6)


def test_neighbours_find_the_planted_copy():
    data = toy()
    data.hub.values[7] = data.hub.values[0] + 1e-4
    near = similarity_file.neighbours(data, k=3)
    assert near.neighbour.sel(subject="sub-00", rank=1) == "sub-07"
    assert near.neighbour.sel(subject="sub-07", rank=1) == "sub-00"
    assert not (near.neighbour == near.subject).any()
    one = similarity_file.neighbours(data, "sub-00", k=3)
    np.testing.assert_array_equal(one.neighbour, near.neighbour[0])


def test_similarity_is_the_correlation():
    data = pool_file.pool(toy())
    expected = np.corrcoef(data.features)
    np.testing.assert_allclose(similarity_file.similarity(data), expected, atol=1e-6)


def test_fingerprint_finds_people_with_something_of_their_own_and_no_others():
    rng = np.random.default_rng(0)
    a, b, noise = toy(), toy(), toy(seed=9)
    b = b.assign(hub=b.hub + 0.1 * rng.standard_normal(b.hub.shape).astype("float32"))
    b = b.isel(subject=rng.permutation(24))
    found = similarity_file.fingerprint(a, b)
    assert found.attrs["rate"] == 1
    assert (found.within > found.between).all()
    lost = similarity_file.fingerprint(a, noise.assign(hub=noise.hub * (toy().diagnosis == "none")))
    assert lost.attrs["rate"] <= 2 * lost.attrs["chance"]


def test_contrast_finds_the_planted_token_only():
    data = toy(n=40)
    found = similarity_file.contrast(data, "diagnosis", n_permutations=200)
    assert found.F.values.argmax() == 2
    assert found.q[2] < 0.05
    assert (found.q.drop_sel(token=2) > 0.05).all()
    np.testing.assert_allclose(
        found["mean"].sel(group="patient", token=2), data.hub[1::2, 2].mean("subject"), rtol=1e-5
    )
    assert found.p.min() >= 1 / 201


def test_contrast_leaves_out_people_without_a_label():
    data = toy()
    unknown = data.assign_coords(diagnosis=data.diagnosis.where(np.arange(24) != 3, "n/a"))
    some = similarity_file.contrast(unknown, "diagnosis", n_permutations=5)
    same = similarity_file.contrast(data.drop_isel(subject=3), "diagnosis", n_permutations=5)
    xr.testing.assert_allclose(some, same)


def test_contrast_statistic_is_the_anova_f_for_one_feature():
    from scipy.stats import f_oneway

    data = toy(features=1)
    found = similarity_file.contrast(data, "diagnosis", n_permutations=1)
    groups = [g.values[..., 0] for _, g in data.hub.groupby("diagnosis")]
    np.testing.assert_allclose(found.F, f_oneway(*groups).statistic, rtol=1e-4)


def test_contrast_p_values_are_uniform_without_an_effect():
    data = toy(n=20, tokens=60).isel(token=slice(3, None))
    p = similarity_file.contrast(data, "diagnosis", n_permutations=99).p
    assert 0.3 < float(p.mean()) < 0.7


def test_contrast_within_sites_never_crosses_them():
    """A label that is the site itself cannot be exchanged inside sites: p is 1."""
    data = toy()
    data.hub.values[data.site == "A"] += 5
    found = similarity_file.contrast(data, "site", within="site", n_permutations=50)
    np.testing.assert_array_equal(found.p, 1)


def test_rows_of_one_person_count_once():
    data = toy()
    twice = xr.concat(
        [data, data.assign_coords(subject=[f"{s}/run-2" for s in data.subject.values])], "subject"
    )
    once = similarity_file.contrast(data, "diagnosis", n_permutations=20)
    both = similarity_file.contrast(twice, "diagnosis", n_permutations=20)
    xr.testing.assert_allclose(once, both, rtol=1e-4)


def test_region_map_is_the_plain_mean_over_those_who_have_the_modality():
    data = toy()
    expected = data.hub_to_roi.sel(token=[1, 3], subject=["sub-01", "sub-05"])
    got = maps_file.region_map(data, [1, 3], subjects=["sub-01", "sub-05"])
    np.testing.assert_allclose(got, expected.mean(["token", "subject"]), rtol=1e-6)
    assert "network" in got.coords
    t1 = maps_file.region_map(data, 0, of="t1")
    np.testing.assert_allclose(t1, data.hub_to_t1[data.has_t1.values, 0].mean("subject"))
    assert t1.attrs["n_subjects"] == int(data.has_t1.sum())
    lazy = maps_file.region_map(toy(lazy=True), 2)
    assert lazy.chunks is not None
    xr.testing.assert_allclose(lazy.compute(), maps_file.region_map(data, 2))


def bad_calls():
    data = toy()
    bare = data.drop_vars("hub_to_roi")
    yield "no attention", lambda: maps_file.region_map(bare, 0), 'keep=("attention",)'
    yield "token", lambda: maps_file.region_map(data, 99), "tokens among 0 to 5, found 99"
    yield "subject", lambda: maps_file.region_map(data, 0, subjects=["who"]), "found who"
    yield "mask", lambda: maps_file.region_map(data, 0, subjects=[True]), "length 1"
    yield "nobody", lambda: maps_file.region_map(data, 0, subjects=["sub-00"], of="t1"), "none"
    yield "of", lambda: maps_file.region_map(data, 0, of="pet"), "found 'pet'"
    yield "how", lambda: pool_file.pool(data, "median"), "found 'median'"
    yield "n", lambda: pool_file.project(data, n=6), "found n=6"
    yield "k", lambda: similarity_file.neighbours(data, k=24), "found k=24"
    yield "label", lambda: similarity_file.contrast(data, "handedness"), "'handedness'"
    yield (
        "one group",
        lambda: similarity_file.contrast(data[{"subject": slice(0, None, 2)}], "diagnosis"),
        "two",
    )
    yield "not latents", lambda: pool_file.pool(data.drop_vars("hub")), "'hub'"
    yield (
        "others",
        lambda: similarity_file.fingerprint(data, data[{"subject": slice(3)}]),
        "missing",
    )


@pytest.mark.parametrize(
    "call, says", [c[1:] for c in bad_calls()], ids=[c[0] for c in bad_calls()]
)
def test_bad_input_is_named(call, says):
    with pytest.raises(InputError) as caught:
        call()
    assert says in str(caught.value)


def test_controls_of_an_untrained_model_are_itself(brains):
    """Random weights agree with themselves wholly, and every agreement is a correlation."""
    cohort, model = brains
    found = maps_file.map_controls(cohort.isel(subject=[0, 1]), model, seed=1)
    np.testing.assert_allclose(found.agreement.sel(control="random weights"), 1, atol=1e-5)
    retest = found.agreement.sel(control="retest", token=4)
    halves = found["map"].sel(token=4, version=["first half", "second half"])
    assert float(retest) == pytest.approx(np.corrcoef(halves)[0, 1], abs=1e-5)
    assert not found.passes.any()  # what random weights give as well has not been learned
    model_map = found["map"].sel(version="model")
    np.testing.assert_allclose(model_map.sum("roi"), 1 - _t1_share(cohort, model), atol=1e-4)


def test_maps_of_shipped_weights_repeat_and_are_not_those_of_random_weights():
    cohort = bhx.synthetic_cohort(6, seed=11, missing=0)[["bold"]].compute()
    found = maps_file.map_controls(cohort, bhx.load_model("workshop", device="cpu"))
    mean = found.agreement.mean("token").to_series()
    assert mean["retest"] > 0.9
    assert mean["random weights"] < 0.5
    alike = found.agreement.sel(control=["random weights", "shuffled parcels"]).max("control")
    wanted = (found.agreement.sel(control="retest") >= 0.9) & (alike <= 0.7)
    assert found.passes.equals(wanted.drop_vars("control", errors="ignore"))
    assert 0 < found.passes.mean() < 1


def _t1_share(cohort, model):
    from bhx import embed

    two = embed(cohort.isel(subject=[0, 1]), model, keep=("attention",))
    return two.modality_share.sel(modality="t1").mean("subject").compute()


def test_spin_test_of_noise_finds_nothing():
    atlas, _ = spinning(0)
    p = [maps_file.spin_test(spinning(i)[1], "network", atlas, n_spins=99).p for i in range(8)]
    assert np.mean(p) > 0.3


def spinning(seed):
    from bhx.data.atlas import load_atlas

    atlas = load_atlas("schaefer100")
    values = np.random.default_rng(seed).standard_normal(100)
    return atlas, xr.DataArray(values, {"roi": atlas.roi.values}, ["roi"])


def test_spin_test_of_networks_is_the_difference_of_means():
    atlas, noise = spinning(0)
    raised = noise + 3 * (atlas.network == "Vis").values
    found = maps_file.spin_test(raised[::-1], "network", atlas, n_spins=99)
    inside = raised.values[atlas.network.values == "Vis"].mean()
    outside = raised.values[atlas.network.values != "Vis"].mean()
    assert float(found.statistic.sel(network="Vis")) == pytest.approx(inside - outside)
    assert float(found.p.sel(network="Vis")) < 0.05
