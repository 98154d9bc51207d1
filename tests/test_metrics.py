"""Metrics equal scikit-learn's under any weights; resampling draws whole participants."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import pearsonr
from sklearn import metrics as oracle

from bhx import metrics


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
    got = metrics.measure_labels(truth, output, decision, weight)
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
    got = metrics.measure_labels(truth, output, decision, weight, ordinal=True)
    kw = {"sample_weight": weight}
    one_against_rest = [oracle.roc_auc_score(truth == k, output[:, k], **kw) for k in range(3)]
    assert got["auroc"][0] == pytest.approx(np.mean(one_against_rest))
    assert got["kappa"][0] == pytest.approx(
        oracle.cohen_kappa_score(truth, decision, weights="quadratic", **kw)
    )
    assert got["rank_mae"][0] == pytest.approx(oracle.mean_absolute_error(truth, decision, **kw))
    assert np.isnan(got["positive_f1"]).all()


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), n=st.integers(5, 60))
def test_number_metrics_equal_references(seed, n):
    rng = np.random.default_rng(seed)
    y, p, w = rng.normal(50, 10, n), rng.normal(50, 10, n), rng.integers(1, 4, n)
    got = metrics.measure_numbers(y, p, w)
    assert got["r"][0] == pytest.approx(pearsonr(np.repeat(y, w), np.repeat(p, w))[0])
    assert metrics.measure_numbers(y, p)["r2"][0] == pytest.approx(oracle.r2_score(y, p))
    assert got["mae"][0] == pytest.approx(oracle.mean_absolute_error(y, p, sample_weight=w))


def test_undefined_scores_are_nan_not_a_number_that_looks_fine():
    one = metrics.measure_labels(np.zeros(5, int), np.full((5, 2), 0.5), np.zeros(5, int))
    assert np.isnan(one["auroc"][0])
    assert np.isnan(one["auprc"][0])
    same = metrics.measure_numbers(np.full(5, 3.0), np.arange(5))
    assert np.isnan(same["r"][0])
    assert np.isnan(same["r2"][0])
    flat = metrics.measure_numbers(np.arange(5), np.full(5, 2.0))
    assert flat["r"][0] == 0
    assert flat["r2"][0] == 0


def test_many_rows_of_weights_equal_one_at_a_time():
    truth, output, _ = cases(0, 25, 2)
    weights = metrics.bootstrap_weights(np.arange(25), 20)
    together = metrics.measure_labels(truth, output, output.argmax(1), weights)
    for b in range(20):
        alone = metrics.measure_labels(truth, output, output.argmax(1), weights[b])
        for name, values in alone.items():
            np.testing.assert_allclose(together[name][b], values[0], err_msg=name)


def test_bootstrap_draws_whole_participants_within_strata():
    people = np.repeat(["a", "b", "c", "d"], [1, 2, 3, 4])
    strata = np.repeat([0, 0, 1, 1], [1, 2, 3, 4])
    weights = metrics.bootstrap_weights(people, 200, strata=strata)
    per_person = np.stack([weights[:, people == p] for p in "d"])[0]
    assert (per_person == per_person[:, :1]).all()
    first = np.array([0, 1, 3, 6])
    assert (weights[:, first[:2]].sum(1) == 2).all()
    assert (weights[:, first[2:]].sum(1) == 2).all()
    assert weights.std() > 0


def test_interval_is_the_percentile_interval_when_draws_are_unbiased():
    draws = np.sort(np.random.default_rng(0).normal(size=4001))
    low, high = metrics.interval(np.array(np.median(draws)), draws)
    np.testing.assert_allclose([low, high], np.quantile(draws, [0.025, 0.975]), atol=0.01)
    low2, _ = metrics.interval(np.array(np.median(draws) + 0.5), draws)
    assert low2 > low  # draws lie too low: both ends move up
