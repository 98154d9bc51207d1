"""How good a prediction is and how sure we are of it: metrics, intervals, nulls, tests.

Everything here works on plain arrays of truths and predictions; no model is fitted here and no
Dataset is read. Every metric is weighted and vectorised over rows of weights, so that a
participant bootstrap is one call.
"""

from __future__ import annotations

import numpy as np
from scipy.stats import norm

NUMBER = ("r", "r2", "mae")
LABEL = ("balanced_accuracy", "auroc", "auprc", "macro_f1", "accuracy", "positive_f1")
ORDINAL = ("kappa", "rank_mae", *LABEL)
LOWER_IS_BETTER = ("mae", "rank_mae")
CHANCE = {"r": 0.0, "r2": 0.0, "auroc": 0.5, "kappa": 0.0}  # balanced accuracy: 1 / classes


def measure_numbers(truth, output, weights=None) -> dict[str, np.ndarray]:
    """Pearson r, R2 and mean absolute error, each (B,), under weights (B, n).

    R2 is one minus the squared error over the squared distance of the truths from their mean; the
    mean stays that of all rows in every resample, or R2 of a small fold would fall in each. A
    metric that is undefined (fewer than two distinct truths) is NaN.
    """
    y, p = np.asarray(truth, float), np.asarray(output, float)
    w = _weights(weights, y)
    my, mp = w @ y, w @ p
    vy, vp = w @ y**2 - my**2, w @ p**2 - mp**2
    flat_y, flat_p = vy <= 1e-12 * (w @ y**2), vp <= 1e-12 * (w @ p**2)
    with np.errstate(invalid="ignore", divide="ignore"):
        r = (w @ (y * p) - my * mp) / np.sqrt(vy * vp)
        r2 = 1 - w @ (y - p) ** 2 / (w @ (y - y.mean()) ** 2)
    r = np.where(flat_p, 0.0, r)  # a constant prediction orders nobody
    return {
        "r": np.where(flat_y, np.nan, r),
        "r2": np.where(flat_y, np.nan, r2),
        "mae": w @ np.abs(y - p),
    }


def measure_labels(truth, output, decision, weights=None, positive=-1, ordinal=False):
    """Metrics of labels, each (B,), under weights (B, n).

    Parameters
    ----------
    truth, decision : int (n,), codes 0..K-1
    output : float (n, K), probabilities
    positive : the code that `auprc` and `positive_f1` of two classes are about; with more
        classes `auroc` and `auprc` are means of one-against-rest, and `positive_f1` is NaN

    Notes
    -----
    `positive_f1` is the field's legacy F1: an all-positive guess scores well whenever the
    positive class is the larger one. Prefer `balanced_accuracy` and `auroc`.
    """
    truth, decision, output = np.asarray(truth), np.asarray(decision), np.asarray(output, float)
    w, n_labels = _weights(weights, truth), output.shape[1]
    confusion = np.stack(
        [[w @ ((truth == t) & (decision == d)) for d in range(n_labels)] for t in range(n_labels)]
    )  # (K truth, K decision, B)
    hit = np.einsum("kkb->kb", confusion)
    with np.errstate(invalid="ignore", divide="ignore"):
        recall = hit / confusion.sum(1)
        f1 = 2 * hit / (confusion.sum(0) + confusion.sum(1))
    out = {"balanced_accuracy": _mean(recall)}
    ranked = range(n_labels) if n_labels > 2 else [positive % n_labels]
    out["auroc"] = _mean(np.stack([auroc(truth == k, output[:, k], w) for k in ranked]))
    out["auprc"] = _mean(np.stack([auprc(truth == k, output[:, k], w) for k in ranked]))
    out |= {"macro_f1": _mean(f1), "accuracy": hit.sum(0)}
    out["positive_f1"] = f1[positive] if n_labels == 2 else np.full(len(w), np.nan)
    if ordinal:
        steps = np.abs(np.subtract.outer(np.arange(n_labels), np.arange(n_labels)))
        by_chance = np.einsum("ib,jb,ij->b", confusion.sum(1), confusion.sum(0), steps**2)
        with np.errstate(invalid="ignore", divide="ignore"):
            kappa = 1 - np.einsum("ijb,ij->b", confusion, steps**2) / by_chance
        out |= {"kappa": kappa, "rank_mae": np.einsum("ijb,ij->b", confusion, steps)}
    return {name: out[name] for name in (ORDINAL if ordinal else LABEL)}


def auroc(truth, score, weights=None) -> np.ndarray:
    """Area under the ROC curve (B,): P(score of a positive > of a negative), ties count half."""
    truth, score = np.asarray(truth, bool), np.asarray(score, float)
    w = _weights(weights, score)
    pos, neg = w[:, truth], w[:, ~truth]
    wins = np.sign(np.subtract.outer(score[truth], score[~truth])) / 2 + 0.5
    with np.errstate(invalid="ignore", divide="ignore"):
        return ((pos @ wins) * neg).sum(1) / (pos.sum(1) * neg.sum(1))


def auprc(truth, score, weights=None) -> np.ndarray:
    """Average precision (B,): precision summed over the steps of recall, ties taken together."""
    truth, score = np.asarray(truth, bool), np.asarray(score, float)
    w = _weights(weights, score)
    levels, place = np.unique(-score, return_inverse=True)
    onehot = np.eye(len(levels))[place]
    positives = (w * truth) @ onehot  # (B, level), from the highest score down
    with np.errstate(invalid="ignore", divide="ignore"):
        precision = np.cumsum(positives, 1) / np.cumsum(w @ onehot, 1)
        share = positives / positives.sum(1, keepdims=True)
    return np.where(positives.sum(1) > 0, np.nansum(precision * share, 1), np.nan)


def bootstrap_weights(units, n: int = 1000, seed: int = 0, strata=None) -> np.ndarray:
    """Weights (n, rows) of a bootstrap that draws whole units (participants) with replacement.

    `strata` (per row, constant within a unit) keeps the number of units drawn in each stratum.
    """
    rng = np.random.default_rng(seed)
    names, first, of_row = np.unique(np.asarray(units), return_index=True, return_inverse=True)
    stratum = np.zeros(len(names)) if strata is None else np.asarray(strata)[first]
    counts = np.zeros((n, len(names)))
    for level in np.unique(stratum):
        members = np.flatnonzero(stratum == level)
        share = np.full(len(members), 1 / len(members))
        counts[:, members] = rng.multinomial(len(members), share, size=n)
    return counts[:, of_row]


def interval(estimate, draws, level: float = 0.95) -> tuple[np.ndarray, np.ndarray]:
    """Bias-corrected percentile interval of an estimate from bootstrap draws on the last axis.

    A score of a small test fold (R2 above all) is lower on average in a resample than in the
    fold itself; the correction moves both quantiles by the share of draws below the estimate.
    Source: Efron and Tibshirani 1993, section 14.3, without the acceleration.
    """
    estimate, draws = np.asarray(estimate, float), np.asarray(draws, float)
    known = np.isfinite(draws)
    n = known.sum(-1)
    below = ((draws < estimate[..., None]) & known).sum(-1)
    below = below + ((draws == estimate[..., None]) & known).sum(-1) / 2
    bias = norm.ppf(np.clip(below / np.maximum(n, 1), 1 / (n + 1), n / (n + 1)))
    ends = []
    for tail in ((1 - level) / 2, (1 + level) / 2):
        share = norm.cdf(2 * bias + norm.ppf(tail))
        flat = [
            np.quantile(d[k], q) if k.any() else np.nan
            for d, k, q in zip(
                draws.reshape(-1, draws.shape[-1]),
                known.reshape(-1, draws.shape[-1]),
                np.ravel(share),
                strict=True,
            )
        ]
        ends.append(np.reshape(flat, estimate.shape))
    return tuple(ends)


def _weights(weights, like):
    w = np.ones((1, len(like))) if weights is None else np.atleast_2d(np.asarray(weights, float))
    with np.errstate(invalid="ignore", divide="ignore"):
        return w / w.sum(1, keepdims=True)


def _mean(values):
    """Mean over the first axis of what is defined; NaN where nothing is."""
    known = np.isfinite(values)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(known, values, 0).sum(0) / known.sum(0)
