"""Metrics equal scikit-learn's under any weights; resampling draws whole participants."""

import tracemalloc
from itertools import islice

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import pearsonr
from sklearn import metrics as oracle

from bhx.data.splits import permute_within
from bhx.evaluate import metrics as metrics_file


def drawn(units, draws):
    return np.concatenate(list(metrics_file.bootstrap_weights(units, draws)))


def cases(seed, n, labels):
    rng = np.random.default_rng(seed)
    truth = np.r_[np.arange(labels), rng.integers(0, labels, n - labels)]
    raw = np.round(rng.random((n, labels)), 1) + 0.05  # rounded: ties in the scores
    return truth, raw / raw.sum(1, keepdims=True), rng.integers(0, 4, n) + (np.arange(n) < labels)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), n=st.integers(6, 40))
def test_binary_metrics_equal_scikit_learn(seed, n):
    truth, output, weight = cases(seed, n, 2)
    decision = output.argmax(1)
    got = metrics_file.measure_labels(truth, output, decision, weight)
    kw = {"sample_weight": weight}
    score = output[:, 1]
    wanted = {
        "balanced_accuracy": oracle.balanced_accuracy_score(truth, decision, **kw),
        "auroc": oracle.roc_auc_score(truth, score, **kw),
        "auprc": oracle.average_precision_score(truth, score, **kw),
        "macro_f1": oracle.f1_score(truth, decision, average="macro", **kw),
        "accuracy": oracle.accuracy_score(truth, decision, **kw),
        "positive_f1": oracle.f1_score(truth, decision, **kw),
    }
    for name, value in wanted.items():
        assert got[name][0] == pytest.approx(value, abs=1e-9), name


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_metrics_of_three_labels_equal_scikit_learn(seed):
    truth, output, weight = cases(seed, 30, 3)
    decision = output.argmax(1)
    got = metrics_file.measure_labels(truth, output, decision, weight)
    kw = {"sample_weight": weight}
    one_against_rest = [oracle.roc_auc_score(truth == k, output[:, k], **kw) for k in range(3)]
    assert got["auroc"][0] == pytest.approx(np.mean(one_against_rest))
    assert got["balanced_accuracy"][0] == pytest.approx(
        oracle.balanced_accuracy_score(truth, decision, **kw)
    )
    assert np.isnan(got["positive_f1"]).all()


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), n=st.integers(5, 60))
def test_number_metrics_equal_references(seed, n):
    rng = np.random.default_rng(seed)
    y, p, w = rng.normal(50, 10, n), rng.normal(50, 10, n), rng.integers(1, 4, n)
    got = metrics_file.measure_numbers(y, p, w)
    assert got["r"][0] == pytest.approx(pearsonr(np.repeat(y, w), np.repeat(p, w))[0])
    assert metrics_file.measure_numbers(y, p)["r2"][0] == pytest.approx(oracle.r2_score(y, p))
    assert got["mae"][0] == pytest.approx(oracle.mean_absolute_error(y, p, sample_weight=w))


@pytest.mark.parametrize("offset", [1e4, 1e7, -1e9])
@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_number_metrics_do_not_depend_on_where_zero_is(offset, scale):
    rng = np.random.default_rng(0)
    y = rng.normal(size=50)
    p, weights = y + rng.normal(size=50), drawn(np.arange(50), 20)
    moved = metrics_file.measure_numbers(offset + scale * y, offset + scale * p, weights)
    for name, values in metrics_file.measure_numbers(y, p, weights).items():
        wanted = values * (scale if name == "mae" else 1)
        np.testing.assert_allclose(moved[name], wanted, rtol=1e-4, err_msg=name)


@pytest.mark.parametrize("level", [0.0, 0.1, 3.7e6, -1e9])
def test_numbers_that_differ_by_rounding_only_are_constant(level):
    jitter = np.nextafter(level, np.where(np.arange(40) % 2, np.inf, -np.inf))
    y, weights = np.arange(40.0), drawn(np.arange(40), 20)
    assert (metrics_file.measure_numbers(y, jitter, weights)["r"] == 0).all()
    for constant in (jitter, np.full(40, level)):
        assert np.isnan(metrics_file.measure_numbers(constant, y, weights)["r"]).all()


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), n=st.integers(4, 60), decimals=st.integers(0, 3))
def test_areas_equal_scikit_learn_for_any_ties_and_weights(seed, n, decimals):
    """Weights of zero, whole weights and fractions, many rows of them at once."""
    rng = np.random.default_rng(seed)
    truth, score = np.arange(n) % 2 == 0, np.round(rng.random(n), decimals)
    weights = rng.random((5, n)) * rng.integers(0, 3, (5, n))
    weights[:, :2] += 0.1
    auroc, auprc = metrics_file.areas_under_curves(truth, score, weights)
    for b, w in enumerate(weights):
        wanted = oracle.roc_auc_score(truth, score, sample_weight=w)
        assert auroc[b] == pytest.approx(wanted, abs=1e-9)
        wanted = oracle.average_precision_score(truth, score, sample_weight=w)
        assert auprc[b] == pytest.approx(wanted, abs=1e-9)


def test_areas_of_many_subjects_take_memory_in_proportion():
    """A table of positives by negatives would be 800 MB."""
    rng = np.random.default_rng(0)
    truth, score, weights = rng.random(20_000) < 0.5, rng.random(20_000), np.ones((10, 20_000))
    tracemalloc.start()
    metrics_file.areas_under_curves(truth, score, weights)
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most < 12 * weights.nbytes


def test_undefined_scores_are_nan_not_a_number_that_looks_fine():
    one = metrics_file.measure_labels(np.zeros(5, int), np.full((5, 2), 0.5), np.zeros(5, int))
    assert np.isnan(one["auroc"][0])
    assert np.isnan(one["auprc"][0])
    same = metrics_file.measure_numbers(np.full(5, 3.0), np.arange(5))
    assert np.isnan(same["r"][0])
    assert np.isnan(same["r2"][0])
    flat = metrics_file.measure_numbers(np.arange(5), np.full(5, 2.0))
    assert flat["r"][0] == 0
    assert flat["r2"][0] == 0


def test_many_rows_of_weights_equal_one_at_a_time():
    truth, output, _ = cases(0, 25, 2)
    weights = drawn(np.arange(25), 20)
    together = metrics_file.measure_labels(truth, output, output.argmax(1), weights)
    for b in range(20):
        alone = metrics_file.measure_labels(truth, output, output.argmax(1), weights[b])
        for name, values in alone.items():
            np.testing.assert_allclose(together[name][b], values[0], err_msg=name)


@pytest.mark.parametrize("block", [1, 7, 200])
def test_bootstrap_draws_whole_participants_whatever_the_block(block):
    people = np.repeat(["a", "b", "c", "d"], [1, 2, 3, 4])
    blocks = list(metrics_file.bootstrap_weights(people, 200, block=block))
    assert max(map(len, blocks)) == block
    weights = np.concatenate(blocks)
    assert weights.shape == (200, 10)
    for person in "abcd":
        own = weights[:, people == person]
        assert (own == own[:, :1]).all()
    assert (weights[:, [0, 1, 3, 6]].sum(1) == 4).all()
    assert weights.std() > 0
    np.testing.assert_array_equal(weights, drawn(people, 200))


def test_interval_sets_the_draws_about_the_estimate_and_widens_them():
    draws = np.random.default_rng(0).normal(size=(2, 4001)) + [[0.0], [3.0]]
    low, high = metrics_file.interval(np.array([0.0, 0.0]), draws)
    np.testing.assert_allclose(low, -1.96, atol=0.1)  # the second one's bias is gone
    np.testing.assert_allclose(high, 1.96, atol=0.1)
    wide = metrics_file.interval(np.array([0.0, 0.0]), draws, mutual=0.25)
    np.testing.assert_allclose(wide[1] - wide[0], (high - low) * np.sqrt(1.25))
    assert np.isnan(metrics_file.interval(np.array([np.nan]), np.full((1, 9), np.nan))).all()


def test_permutations_keep_participants_whole_and_within_their_site():
    rng = np.random.default_rng(0)
    units = np.array(list("aabbccddefgh"))
    sites = np.array([*"XXXXYYYYXXYY"])
    label = {u: i for i, u in enumerate("abcdefgh")}
    values = np.array([label[u] for u in units])
    seen = set()
    for _ in range(50):
        order = next(permute_within(units, sites, rng))
        assert sorted(order) == list(range(12))
        np.testing.assert_array_equal(sites[order], sites)
        moved = values[order]
        assert all(len(set(moved[units == u])) == 1 for u in "abcdefgh")
        seen.add(tuple(moved))
    assert len(seen) > 8


def test_permutations_exchange_families_whole():
    rng = np.random.default_rng(0)
    family = np.array(["f1", "f1", "f2", "f2", "f3", "f4"])
    units, sites = np.array(list("abcdef")), np.full(6, "X")
    orders = {tuple(o) for o in islice(permute_within(units, sites, rng, family), 400)}
    for order in orders:
        origin = family[list(order)]
        assert origin[0] == origin[1]
        assert origin[2] == origin[3]
    assert len(orders) == 2 * 2 * 2 * 2  # two pairs swapped, members of each, two singletons


def test_permutation_p_counts_the_observation():
    assert metrics_file.permutation_p(5.0, np.arange(99) / 100) == pytest.approx(0.01)
    assert metrics_file.permutation_p(0.5, [0.4, np.nan, 0.6]) == pytest.approx(2 / 3)


def test_corrected_t_is_the_t_test_without_overlap_and_keeps_its_level_with_it():
    d = np.random.default_rng(0).normal(0.3, 1, 12)
    from scipy.stats import ttest_1samp

    plain = ttest_1samp(d, 0)
    np.testing.assert_allclose(metrics_file.corrected_t(d, 0), [plain.statistic, plain.pvalue])
    assert metrics_file.corrected_t(d, 0.25)[1] > plain.pvalue
    assert metrics_file.corrected_t(np.zeros(5), 0.25) == (0.0, 1.0)
    assert np.isnan(metrics_file.corrected_t([1.0], 0.25)).all()


def test_adjusted_p_values_by_hand():
    p = [0.01, 0.04, np.nan, 0.03]
    np.testing.assert_allclose(metrics_file.adjust_p(p), [0.03, 0.06, np.nan, 0.06])


def test_calibration_error_is_small_for_true_probabilities_only():
    rng = np.random.default_rng(0)
    p = rng.random(20_000)
    truth = rng.random(20_000) < p
    assert metrics_file.calibration(truth, p).attrs["error"] < 0.02
    assert metrics_file.calibration(truth, p**3).attrs["error"] > 0.15
    assert metrics_file.calibration(truth, p)["count"].sum() == 20_000


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), decimals=st.integers(0, 3), bins=st.integers(1, 12))
def test_calibration_never_depends_on_the_order_of_rows(seed, decimals, bins):
    rng = np.random.default_rng(seed)
    p = np.round(rng.random(50), decimals)  # the fewer decimals, the more ties
    truth = rng.random(50) < p
    sorted_ = metrics_file.calibration(np.sort(truth), p[np.argsort(truth)], bins)
    found = metrics_file.calibration(truth, p, bins)
    pd.testing.assert_frame_equal(found, sorted_, rtol=1e-12)
    assert found.attrs["error"] == pytest.approx(sorted_.attrs["error"], abs=1e-12)


def test_calibration_of_one_probability_is_one_bin():
    found = metrics_file.calibration(np.r_[np.zeros(50), np.ones(50)], np.full(100, 0.5))
    assert found.attrs["error"] == 0
    assert found["count"].tolist() == [100]


def test_calibration_bins_are_of_equal_count_without_ties():
    p = np.random.default_rng(0).permutation(95) / 95
    assert sorted(metrics_file.calibration(p > 0.5, p)["count"]) == [9] * 5 + [10] * 5
