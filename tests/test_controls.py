"""Plain features: valid volumes only, labels that travel, lazy equal to eager."""

import json

import numpy as np
import pandas as pd
import pytest
import xarray as xr
from small_cohorts import make_cohort

from bhx.errors import InputError
from bhx.evaluate.features import (
    Tangent,
    confound_features,
    connectome,
    cube_means,
    fuse,
    nothing,
    parts_of,
    plain_controls,
    raw_signal,
    signal_spread,
)
from bhx.evaluate.probe import probe
from bhx.evaluate.scores import compare
from bhx.modalities.base import Modality
from bhx.modalities.t1 import T1_SHAPE
from bhx.modalities.table import MODALITIES
from bhx.schema import check, plain_labels


@pytest.fixture(scope="module")
def cohort():
    return make_cohort()


@pytest.fixture(scope="module")
def both():
    """Twelve subjects with T1; the first has none."""
    t1 = np.random.default_rng(0).random((12, *(n // 16 for n in T1_SHAPE)), dtype=np.float32)
    out = make_cohort(n=12, t1=t1)
    out["t1"][0] = 0
    return out.assign_coords(has_t1=("subject", np.arange(12) > 0))


def test_connectome_is_fisher_z_of_the_upper_triangle_over_valid_volumes(cohort):
    short = cohort.bold.values.copy()
    short[2, :, 40:] = np.nan
    features = connectome(make_cohort(bold=short))
    check(features, "features")
    assert features.sizes["feature"] == 8 * 7 // 2
    for i in (0, 2):
        r = np.corrcoef(short[i][:, np.isfinite(short[i][0])])
        np.testing.assert_allclose(
            np.tanh(features.features[i]), r[np.triu_indices(8, 1)], atol=1e-6
        )
    pair = features.isel(feature=9)
    a, b = str(pair.roi_a.item()), str(pair.roi_b.item())
    assert (a, b) == ("roi1", "roi4")


def test_lazy_connectome_equals_eager_and_reads_nothing_before_it_must(cohort):
    lazy = connectome(cohort.chunk(subject=7))
    assert lazy.features.chunks is not None
    xr.testing.assert_allclose(lazy.compute(), connectome(cohort))


def test_labels_travel_when_subjects_and_parcels_are_permuted(cohort):
    rng = np.random.default_rng(3)
    moved = cohort.isel(subject=rng.permutation(90), roi=rng.permutation(8))
    a = connectome(cohort).features
    b = connectome(moved).features.sel(subject=a.subject)
    for i in range(0, a.sizes["feature"], 5):
        pair = {a.roi_a.values[i], a.roi_b.values[i]}
        at = [j for j in range(28) if {b.roi_a.values[j], b.roi_b.values[j]} == pair]
        np.testing.assert_allclose(a[:, i], b[:, at[0]], atol=1e-6)


def test_partial_connectome_explains_away_a_chain():
    rng = np.random.default_rng(0)
    bold = rng.standard_normal((4, 3, 2000)).astype(np.float32)
    bold[:, 1] += bold[:, 0]
    bold[:, 2] += bold[:, 1]
    cohort = make_cohort(n=4, bold=bold)
    full = connectome(cohort).features.mean("subject").values  # pairs 01, 02, 12
    partial = connectome(cohort, "partial").features.mean("subject").values
    assert full[1] > 0.5
    assert abs(partial[1]) < 0.05
    assert partial[0] > 0.3


def test_silent_parcels_and_subjects_without_bold_are_missing_not_zero(cohort):
    bold = cohort.bold.values.copy()
    bold[0] = np.nan
    bold[1, 4] = 7.0
    features = connectome(make_cohort(bold=bold))
    assert features.attrs["without_bold"] == 1
    assert np.isnan(features.features[0]).all()
    silent = (features.roi_a == "roi4") | (features.roi_b == "roi4")
    np.testing.assert_array_equal(np.isnan(features.features[1]), silent)


def test_controls_refuse_what_they_cannot_read(cohort, both):
    kinds = "correlation, partial, tangent, flattened"
    with pytest.raises(InputError, match=f"Expected kind to be {kinds}, found 'coherence'"):
        connectome(cohort, "coherence")
    with pytest.raises(InputError, match="Expected a cohort with 'bold', found t1"):
        connectome(both.drop_vars("bold"))
    with pytest.raises(InputError, match="Expected a cohort with 't1', found bold"):
        cube_means(cohort)
    with pytest.raises(InputError, match="Expected mm as a multiple of 16 mm, found 24"):
        cube_means(both, 24)


def test_tangent_of_the_mean_is_zero_and_distances_do_not_depend_on_a_mixing():
    rng = np.random.default_rng(0)
    a, b = np.triu_indices(5)
    spd = [np.cov(rng.normal(size=(5, 30))) for _ in range(20)]
    rows = np.stack([c[a, b] for c in spd])
    fitted = Tangent().fit(rows)
    np.testing.assert_allclose(fitted.transform(rows.mean(0)[None]), 0, atol=1e-9)
    mix = rng.normal(size=(5, 5))
    mixed = np.stack([(mix @ c @ mix.T)[a, b] for c in spd])
    norm = np.linalg.norm(fitted.transform(rows), axis=1)
    np.testing.assert_allclose(np.linalg.norm(Tangent().fit_transform(mixed), axis=1), norm)


def test_tangent_connectome_is_fitted_in_the_fold(cohort):
    features = connectome(cohort, "tangent")
    assert features.sizes["feature"] == 8 * 9 // 2
    scores = probe(features, "age")
    assert scores.score.sel(metric="r").mean() > 0.6


def test_flattened_connectome_is_a_power_of_the_correlation_matrix(cohort):
    features = connectome(cohort, "flattened")
    assert features.sizes["feature"] == 8 * 7 // 2
    value, vector = np.linalg.eigh(np.corrcoef(cohort.bold.values[4]))
    wanted = vector @ np.diag(np.maximum(value, 1e-4) ** 0.35) @ vector.T
    np.testing.assert_allclose(features.features[4], wanted[np.triu_indices(8, 1)], atol=1e-6)
    short = cohort.isel(time=slice(5))  # fewer volumes than parcels: eigenvalues of zero
    assert np.isfinite(connectome(short, "flattened").features).all()
    assert probe(features, "age").score.sel(metric="r").mean() > 0.6


def test_signal_spread_is_mean_and_log_deviation_of_each_parcel(cohort):
    bold = cohort.bold.values.copy()
    bold[0], bold[1, 4], bold[2, :, 40:] = np.nan, 7.0, np.nan
    features = signal_spread(make_cohort(bold=bold).chunk(subject=7))
    assert features.features.chunks is not None
    check(features, "features")
    values = features.features.values
    assert np.isnan(values[0]).all()
    assert np.flatnonzero(np.isnan(values[1])).tolist() == [4, 12]
    np.testing.assert_allclose(values[2, :8], bold[2, :, :40].mean(1), atol=1e-6)
    np.testing.assert_allclose(values[2, 8:], np.log(bold[2, :, :40].std(1)), atol=1e-5)


def test_cube_means_are_block_statistics_of_the_scaled_volume(both):
    features = cube_means(both.chunk(subject=5), 32.0)
    check(features, "features")
    assert np.isnan(features.features[0]).all()
    volume = both.t1[3].values.astype(float)
    z = (volume - volume.mean()) / volume.std()
    half = features.sizes["feature"] // 2
    np.testing.assert_allclose(features.features[3, 0], z[:2, :2, :2].mean(), rtol=1e-4)
    np.testing.assert_allclose(features.features[3, half], z[:2, :2, :2].std(), rtol=1e-4)
    brighter = both.assign(t1=both.t1 * 7)
    xr.testing.assert_allclose(cube_means(brighter, 32.0), features.compute(), rtol=1e-4, atol=1e-4)


def test_raw_signal_of_one_sinusoid_agrees_across_sampling_rates():
    seconds = {tr: np.arange(int(90 / tr)) * tr for tr in (0.75, 1.5)}
    bold = np.full((2, 3, 120), np.nan, np.float32)
    for row, (_tr, t) in zip(bold, seconds.items(), strict=True):
        row[:, : len(t)] = np.sin(2 * np.pi * t / 30 + np.arange(3)[:, None])
    cohort = make_cohort(n=2, bold=bold).assign_coords(tr=("subject", list(seconds)))
    values = raw_signal(cohort).features.values
    assert values.shape == (2, 3 * 45)
    np.testing.assert_allclose(values[0], values[1], atol=0.05)


def test_confound_features_encode_words_and_keep_unknown_numbers(cohort):
    age = cohort.age.values.copy()
    age[0] = np.nan
    features = confound_features(cohort.assign_coords(age=("subject", age)))
    assert features.attrs["columns"] == "age, site, n_volumes"
    values = features.features.values
    assert values.shape == (90, 4)  # age, two of three sites, n_volumes
    assert np.isnan(values[0, 0])
    np.testing.assert_array_equal(values[:, 1] == 1, cohort.site.values == "B")


def test_plain_controls_leave_the_target_out(both):
    found = plain_controls(both, "age")
    names = [f.attrs["name"] for f in found]
    assert names[:3] == ["mean or majority", "confounds", "T1 cubes"]
    assert names[6:] == [
        "connectome, flattened",
        "mean and log SD",
        "raw signal (MLP)",
        "T1 cubes (PCA)",
        "T1 cubes + connectome",
    ]
    assert found[1].attrs["columns"] == "site, n_volumes"
    assert nothing(both).sizes["feature"] == 0
    only_t1 = [f.attrs["name"] for f in plain_controls(both.drop_vars("bold"), "age")]
    assert only_t1 == ["mean or majority", "confounds", "T1 cubes", "T1 cubes (PCA)"]


def test_z_scored_scans_have_no_spread_to_read(both):
    flat = (both.bold - both.bold.mean("time")) / both.bold.std("time")
    scored = both.assign(bold=flat.astype("float32").transpose(*both.bold.dims))
    assert "mean and log SD" not in [f.attrs["name"] for f in plain_controls(scored, "age")]


class Thickness(Modality):
    """Measures of each parcel."""

    name = "thickness"


def test_another_modality_is_its_own_control(both, monkeypatch):
    monkeypatch.setitem(MODALITIES, "thickness", Thickness())
    rng = np.random.default_rng(0)
    values = rng.normal(size=(12, 8, 3)).astype(np.float32)
    more = both.assign(thickness=(("subject", "roi", "measure"), values))
    more = more.assign_coords(has_thickness=("subject", np.arange(12) != 4))
    found = {f.attrs["name"]: f for f in plain_controls(more, "age")}
    control = found["thickness"]
    assert control.sizes["feature"] == 24
    assert np.isnan(control.features[4]).all()
    np.testing.assert_array_equal(control.features[5], values[5].ravel())
    assert np.isfinite(probe(control, "age", folds=3).score.sel(metric="mae")).all()


def test_compare_puts_every_plain_control_into_one_table(both):
    found = plain_controls(both, "age")
    table = compare(probe(found, "age", folds=3), control="connectome")
    assert set(table.index.get_level_values("model")) == {f.attrs["name"] for f in found}
    assert np.isfinite(table.score.drop("r", level="metric")).all()  # r of two ages a fold is none
    assert table.loc[pd.IndexSlice[:, "r"], "score"].isna().all()


def test_controls_without_any_scan_of_a_kind(both):
    unscanned = both.assign_coords(has_bold=("subject", np.zeros(12, bool)))
    names = [f.attrs["name"] for f in plain_controls(unscanned, "age")]
    assert "T1 cubes" in names
    assert "raw signal (MLP)" not in names
    for nobody in (unscanned, both.drop_vars("bold")):
        with pytest.raises(InputError, match="Expected a cohort with 'bold', found t1"):
            raw_signal(nobody)


@pytest.mark.parametrize("lazy", [False, True])
def test_a_subject_that_lacks_one_fused_part_is_missing_whole(both, lazy):
    both = both.chunk(subject=5) if lazy else both
    cubes, function = cube_means(both, 32.0), connectome(both)  # the first has no T1
    joined = fuse(cubes, function, nothing(both))
    assert (joined.features.chunks is not None) == lazy
    assert np.isnan(joined.features[0]).all()
    np.testing.assert_array_equal(joined.features[1:, -28:], function.features[1:])
    assert list(json.loads(probe(joined, "age", folds=3).attrs["excluded"])) == [
        "no T1 cubes + connectome + mean or majority"
    ]
    partly = function.copy(deep=True).load()
    partly.features[3, :5] = np.nan
    assert np.isfinite(fuse(cubes, partly).features[3]).sum() == joined.sizes["feature"] - 5
    turned = fuse(cubes, function.isel(subject=slice(None, None, -1)).drop_vars("age"))
    xr.testing.assert_identical(turned.sel(subject=joined.subject).features, joined.features)


@pytest.mark.filterwarnings("ignore:.*Zarr V3 specification")
def test_parts_survive_a_store_and_a_selection_within_them(cohort, tmp_path):
    tangent, whole = connectome(cohort, "tangent"), connectome(cohort)
    joined = fuse(fuse(tangent, whole), whole.assign_attrs(name="again"))
    joined.to_zarr(tmp_path / "joined.zarr", consolidated=False)
    stored = xr.open_zarr(tmp_path / "joined.zarr", consolidated=False)
    assert np.unique(stored.part, return_counts=True)[1].tolist() == [36, 28, 28]
    kinds = [steps for _, steps in parts_of(plain_labels(stored))]
    assert [type(step[0]) if step else None for step in kinds] == [Tangent, None, None]
    np.testing.assert_array_equal(probe(stored, "age").score, probe(joined, "age").score)
    fewer = joined.isel(feature=np.r_[:36, 40:60])  # of what needs no fitting in the fold
    assert np.isfinite(probe(fewer, "age").score).all()


def test_missing_words_are_missing_and_no_word_of_their_own(cohort):
    sex = np.array(["F", "M", "n/a"])[np.arange(90) // 2 % 3]
    features = confound_features(cohort.assign_coords(sex=("subject", sex)), ["sex"])
    assert features.sizes["feature"] == 1
    np.testing.assert_array_equal(np.isnan(features.features[:, 0]), sex == "n/a")
    np.testing.assert_array_equal(features.features[sex == "M", 0], 1)


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (lambda f: fuse(), "Expected features to put side by side, found none"),
        (lambda f: fuse(f, [f]), "Expected features as an xarray.Dataset, found list"),
        (lambda f: fuse(f, f).isel(feature=slice(40)), "Expected all features of 'connectome, tan"),
        (lambda f: f.isel(feature=slice(10)), "Expected all features of 'connectome, tangent' in"),
        (lambda f: f.isel(feature=slice(11)), "Expected all features of 'connectome, tangent' in"),
        (lambda f: fuse(f.isel(feature=slice(10)), f), "Expected all features of 'connectome, tan"),
        (lambda f: f.isel(feature=np.arange(36)[::-1]), "Expected all features of 'connectome, ta"),
    ],
)
def test_parts_of_what_belongs_together_are_refused(cohort, made, message):
    with pytest.raises(InputError, match=message):
        probe(made(connectome(cohort, "tangent")), "age")


def test_tangent_connectome_of_some_parcels_is_whole_again(cohort):
    whole, some = connectome(cohort, "tangent"), ["roi0", "roi1", "roi5"]
    part = whole.isel(feature=np.isin(whole.roi_a, some) & np.isin(whole.roi_b, some))
    assert part.sizes["feature"] == 6
    assert probe(part, "age").score.sel(metric="r").mean() > 0.6
