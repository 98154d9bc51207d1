"""ComBat equals neuroCombat, nothing is fitted at transform, and matching balances."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import xarray as xr
from sklearn.utils.estimator_checks import parametrize_with_checks

from bhx.errors import InputError
from bhx.evaluate.confounds import ComBat, ConfoundRegression, match_subjects
from bhx.evaluate.features import Tangent

DATA = Path(__file__).parent / "data"


@pytest.fixture(scope="module")
def published():
    """Simulated data of three sites, and what neuroCombat 0.2.12 makes of it."""
    table = pd.read_csv(DATA / "neurocombat_0.2.12.csv")
    return {
        "x": table.filter(regex=r"^x\d+$").values,
        "site": table[["site"]].values.astype(float),
        "covariates": table[["sex", "age"]].values.astype(float),
        "plain": table.filter(regex="^plain").values,
        "kept": table.filter(regex="^covariates").values,
    }


def test_combat_equals_neurocombat(published):
    x, site, covariates = published["x"], published["site"], published["covariates"]
    plain = ComBat().fit_transform(np.hstack([x, site]))
    kept = ComBat(covariates=2).fit_transform(np.hstack([x, covariates, site]))
    np.testing.assert_allclose(plain, published["plain"], atol=1e-6)
    np.testing.assert_allclose(kept, published["kept"], atol=1e-6)


def test_combat_removes_what_it_should_and_keeps_the_covariates(published):
    rng = np.random.default_rng(0)
    n = 600
    site, age = rng.integers(0, 4, n), rng.normal(0, 1, n)
    shift, scale = rng.normal(0, 2, (4, 30)), rng.uniform(0.5, 2, (4, 30))
    seen = 0.7 * age[:, None] + rng.normal(size=(n, 30)) * scale[site] + shift[site]
    out = ComBat(covariates=1).fit_transform(np.column_stack([seen, age, site]))
    rest = out - 0.7 * age[:, None]
    means = np.stack([rest[site == s].mean(0) for s in range(4)])
    spread = np.stack([rest[site == s].std(0) for s in range(4)])
    assert means.std(0).max() < 0.1 * shift.std(0).mean()
    assert (spread.std(0) / spread.mean(0)).mean() < 0.2 * (scale.std(0) / scale.mean(0)).mean()
    r = [[np.corrcoef(x[:, k], age)[0, 1] for k in range(30)] for x in (seen, out)]
    assert np.mean(r[1]) > np.mean(r[0]) + 0.1


def test_transform_uses_no_statistic_of_the_rows_it_is_given(published):
    x = np.hstack([published["x"], published["site"]])
    fitted = ComBat().fit(x[::2])
    together = fitted.transform(x[1::2])
    alone = np.vstack([fitted.transform(row[None]) for row in x[1::2]])
    np.testing.assert_allclose(together, alone, atol=1e-10)


def test_unseen_sites_stay_as_they_are(published):
    x, site = published["x"], published["site"][:, 0]
    known = np.column_stack([x, site])[site < 2]
    new = np.column_stack([x, site])[site == 2]
    np.testing.assert_allclose(ComBat().fit(known).transform(new), x[site == 2])


def test_site_with_one_row_and_constant_features_pass(published):
    x = np.column_stack([published["x"], np.full(36, 3.0), published["site"]])
    few = np.vstack([x[:26], x[26:27]])
    out = ComBat().fit_transform(few)
    assert np.isfinite(out).all()
    np.testing.assert_array_equal(out[:, -1], 3.0)


@pytest.mark.parametrize("size", [1e-9, 1.0, 1e9])
def test_combat_leaves_no_feature_that_is_the_site(size, published):
    site, covariates = published["site"], published["covariates"]
    coded = size * np.hstack([site == 1, site, site == 2])
    out = ComBat(2).fit_transform(np.hstack([coded, published["x"], covariates, site]))
    np.testing.assert_allclose(out[:, :3] - coded.mean(0), 0, atol=1e-9 * size)
    alone = ComBat().fit_transform(np.hstack([coded, site]))
    np.testing.assert_allclose(alone - coded.mean(0), 0, atol=1e-9 * size)


@pytest.mark.parametrize("absent", [0, 1, 2])
def test_combat_takes_words_that_the_training_part_lacks(absent, published):
    """Rows that lack a word are fitted alike, whether it has a column or not."""
    site, x = published["site"], published["x"]
    word = np.arange(36) % 3
    columns = np.eye(3)[word][:, 1:]  # one column a word but the first
    there = word != absent
    both = np.hstack([x, columns, site])[there]
    single = np.column_stack([x, word == np.delete(range(3), absent)[1], site])[there]
    np.testing.assert_allclose(ComBat(2).fit_transform(both), ComBat(1).fit_transform(single))


def test_combat_refuses_covariates_that_are_the_site(published):
    site = published["site"]
    with pytest.raises(InputError, match="found one that the sites determine"):
        ComBat(covariates=1).fit(np.hstack([published["x"], site == 1, site]))
    with pytest.raises(InputError, match=r"Expected \[features \| 3 covariates"):
        ComBat(covariates=3).fit(np.zeros((5, 3)))


def test_regression_removes_the_linear_effect_and_nothing_of_the_test_rows():
    rng = np.random.default_rng(1)
    confound = rng.normal(size=(200, 2))
    clean = rng.normal(size=(200, 5))
    x = clean + confound @ rng.normal(size=(2, 5)) + 4
    both = np.hstack([x, confound])
    fitted = ConfoundRegression(2).fit(both[:150])
    train, test = fitted.transform(both[:150]), fitted.transform(both[150:])
    r = np.corrcoef(train.T, confound[:150].T)[:5, 5:]
    np.testing.assert_allclose(r, 0, atol=1e-10)
    np.testing.assert_allclose(train.mean(0), x[:150].mean(0))
    np.testing.assert_allclose(test, np.vstack([fitted.transform(r[None]) for r in both[150:]]))
    assert np.corrcoef(test[:, 0], clean[150:, 0])[0, 1] > 0.95
    with pytest.raises(InputError, match=r"Expected \[features \| 5 confounds\], found 5 columns"):
        ConfoundRegression(5).fit(x)


def test_regression_leaves_nothing_of_a_feature_that_is_a_confound():
    """What rounding leaves of it is no signal, whatever its units."""
    rng = np.random.default_rng(0)
    confound = np.column_stack([rng.normal(40, 12, 60), rng.integers(0, 2, 60)])
    mixed = confound @ [[1e6, 1e-6, 2, 0], [3, 1, 0, 1]]
    both = np.hstack([mixed, rng.normal(1e5, 1, (60, 1)), confound])
    fitted = ConfoundRegression(2).fit(both[:40])
    out = fitted.transform(both)
    np.testing.assert_array_equal(out[:, :4], np.broadcast_to(out[0, :4], (60, 4)))
    assert out[:, 4].std() > 0.8


def test_regression_refuses_as_many_confounds_as_rows():
    both = np.random.default_rng(0).normal(size=(20, 24))
    ConfoundRegression(18).fit(both)
    with pytest.raises(InputError, match="fewer confounds than training rows, found 19 columns"):
        ConfoundRegression(19).fit(both)


COLUMNS = "the last columns are no features: one column has none"
TRIANGLE = "features are the upper triangle of a matrix: n (n + 1) / 2 of them"
FAILS = {  # where [features | confounds], or a triangle, makes a check meaningless
    "ComBat": {"check_fit2d_1feature": COLUMNS},
    "ConfoundRegression": {
        "check_fit2d_1feature": COLUMNS,
        "check_fit2d_1sample": "refused as too few rows for the confounds, in other words",
    },
    "Tangent": dict.fromkeys(
        (
            "check_estimators_overwrite_params",
            "check_estimators_fit_returns_self",
            "check_readonly_memmap_input",
            "check_n_features_in_after_fitting",
            "check_positive_only_tag_during_fit",
            "check_estimators_dtypes",
            "check_fit_idempotent",
            "check_fit_check_is_fitted",
            "check_n_features_in",
        ),
        TRIANGLE,
    ),
}


@parametrize_with_checks(
    [ComBat(), ConfoundRegression(), Tangent()],
    expected_failed_checks=lambda estimator: FAILS.get(type(estimator).__name__, {}),
)
def test_scikit_learn_contract(estimator, check):
    check(estimator)


def test_matched_pairs_are_alike_where_the_groups_were_not():
    rng = np.random.default_rng(0)
    n = 200
    patient = np.arange(n) % 2 == 0
    motion = rng.normal(0.2, 0.05, n) + 0.06 * patient
    data = xr.Dataset(
        coords={
            "subject": [f"s{i}" for i in range(n)],
            "diagnosis": ("subject", np.where(patient, "patient", "control")),
            "mean_fd": ("subject", np.where(np.arange(n) == 3, np.nan, motion)),
            "site": ("subject", np.array(list("ABC"))[rng.integers(0, 3, n)]),
        }
    )
    pairs = match_subjects(data, "diagnosis", on=("mean_fd",), exact=("site",), caliper=0.2)
    groups = pairs.groupby("diagnosis").groups
    assert len(groups["patient"]) == len(groups["control"]) > 25
    fd = pairs.mean_fd
    gap = abs(fd[groups["patient"]].mean() - fd[groups["control"]].mean())
    assert gap < 0.2 * data.mean_fd.std()
    assert "s3" not in pairs.subject.values
    for site in "ABC":
        labels = pairs.diagnosis[pairs.site.values == site].values
        assert (labels == "patient").sum() == (labels == "control").sum()
    with pytest.raises(InputError, match="Expected pairs within 0 standard deviations"):
        match_subjects(data, "diagnosis", on=("mean_fd",), caliper=0)
    with pytest.raises(InputError, match="Expected 'iq' as a coordinate"):
        match_subjects(data, "diagnosis", on=("iq",))
    with pytest.raises(InputError, match="Expected two labels in 'site'"):
        match_subjects(data, "site", on=("mean_fd",))
    with pytest.raises(InputError, match="Expected numbers to match on, found site"):
        match_subjects(data, "diagnosis", on=("mean_fd", "site"))
    for on in ((), "mean_fd", None):
        with pytest.raises(InputError, match="Expected on as a list of coordinates, found"):
            match_subjects(data, "diagnosis", on=on)


@pytest.mark.parametrize("missing", ["", "n/a", "NA", "<NA>", "nan"])
def test_matching_leaves_out_missing_labels_and_takes_what_is_the_same_for_all(missing):
    data = xr.Dataset(
        coords={
            "subject": list("abcde"),
            "diagnosis": ("subject", ["patient", "control", missing, "control", "patient"]),
            "tr": ("subject", np.full(5, 2.0)),
        }
    )
    assert list(match_subjects(data, "diagnosis", on=("tr",)).subject.values) == list("abde")
