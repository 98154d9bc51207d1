"""What `bhx.probe` fits: penalized regressions for many penalties and targets at once, and a small
network of scikit-learn's.

No split is made and no score is read here. Ridge and L2 logistic regression predict the same on the
training rows' own axes (`on_axes`), of which there are never more than rows: one decomposition
serves every penalty and every target, exchanged labels too.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from scipy.special import log_softmax, softmax
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

CLOSE, STEPS = 1e-15, 1000  # gain a row of one more step at which a fit ends; and the most steps


def on_axes(pieces, wide: bool, keep: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Rows on the training rows' own axes, the largest last: (train, axis) and (test, axis).

    Parameters
    ----------
    pieces : (part, train (row, column), test (row, column)) of the features, each column with mean
        zero over the training rows. All parts get the same weight, and the rows a mean norm of one:
        one grid of penalties fits any number of features
    wide : whether there are more features than training rows. No more than a piece is then held
    keep : number of leading axes, or None for all: principal components
    """
    if wide:
        grams, across = {}, {}
        for part, train, test in pieces:
            grams[part] = grams.get(part, 0) + train @ train.T
            across[part] = across.get(part, 0) + test @ train.T
        weight = _weights({part: np.trace(gram) for part, gram in grams.items()}, len(train))
        power, axes = _leading(sum(w * grams[part] for part, w in weight.items()), keep)
        test = sum(w * across[part] for part, w in weight.items())
        return axes * np.sqrt(power), test @ (axes / np.sqrt(power))
    parts, trains, tests = zip(*pieces, strict=True)
    part = np.repeat(parts, [train.shape[1] for train in trains])
    train, test = np.hstack(trains), np.hstack(tests)
    del trains, tests
    size = np.bincount(part, np.einsum("ij,ij->j", train, train))
    weight = _weights(dict(enumerate(size)), len(train))
    scale = np.sqrt([weight[p] for p in part])
    axes = scale[:, None] * _leading(scale[:, None] * (train.T @ train) * scale, keep)[1]
    return train @ axes, test @ axes


def _weights(size, rows):
    """Part -> factor of its squares, so that all have the same sum and a row has one on average."""
    return {part: rows / (len(size) * s) if s > 0 else 0.0 for part, s in size.items()}


def _leading(gram, keep):
    """Powers and axes of a Gram matrix, ascending; one axis of zeros where nothing varies."""
    power, axes = np.linalg.eigh(gram)
    known = np.flatnonzero(power > 1e-12 * power[-1])[-(keep or 0) :]
    if not len(known):
        return np.ones(1), np.zeros((len(gram), 1))
    return power[known], axes[:, known]


def ridge(x, y, new, penalties) -> Iterator[np.ndarray]:
    """Predictions (target, new row, 1) of ridge regressions, an array a penalty.

    Parameters
    ----------
    x, new : rows on their axes (`on_axes`): no column of x varies with another
    y : (row, target)
    """
    power, mean = (x**2).sum(0)[:, None], y.mean(0)
    along = x.T @ (y - mean)
    for penalty in penalties:
        found = mean + new @ (along / (power + penalty * len(x)))
        yield found.T[..., None]


def logistic(x, y, new, penalties, labels: int) -> Iterator[np.ndarray]:
    """Probabilities (target, new row, label) of L2 logistic regressions, an array a penalty.

    Parameters
    ----------
    x, new : rows on their axes (`on_axes`)
    y : (row, target) codes of `labels`, each of which every target has
    penalties : of the mean loss; each starts where the last ended

    Notes
    -----
    The minimum of scikit-learn's LogisticRegression(C=1 / (penalty * rows)), which gives two labels
    one column of weights where there are two here, each with half of it. Conjugate gradients, one
    Newton step along each, for all targets at once; the axes and a bound of the curvature
    (Boehning, Ann. Inst. Statist. Math. 1992) make a diagonal preconditioner. Source: Minka, A
    comparison of numerical optimizers for logistic regression, 2003.
    """
    wanted = y[..., None] == np.arange(labels)
    x, new = (np.insert(rows, 0, 1, axis=1) for rows in (x, new))
    weights = np.zeros((x.shape[1], *wanted.shape[1:]))
    for penalty in penalties:
        strength = penalty * len(x) * (2 if labels == 2 else 1)
        weights = _minimum(x, wanted, weights, strength)
        yield softmax(_times(new, weights).swapaxes(0, 1), 2)


def _minimum(x, wanted, weights, penalty):
    """Weights (column, target, label) of least loss, from those given; the first column's bear no
    penalty."""
    penalty = np.where(np.arange(x.shape[1]), penalty, 0)[:, None, None]
    scale = (x**2).sum(0)[:, None, None] / 2 + penalty
    found, direction, size = _times(x, weights), 0, np.inf
    loss, rate = _loss(found, wanted, weights, penalty)
    before = 0
    for _ in range(STEPS):
        slope = _times(x.T, rate - wanted) + penalty * weights
        steepest = slope / scale
        turn = ((slope - before) * steepest).sum((0, 2)).clip(0) / size
        before, size = slope, (slope * steepest).sum((0, 2)).clip(1e-300)
        direction = turn[:, None] * direction - steepest
        along = _times(x, direction)
        bend = ((rate * along**2).sum(2) - (rate * along).sum(2) ** 2).sum(0)
        bend = (bend + (penalty * direction**2).sum((0, 2))).clip(1e-300)
        step = -(slope * direction).sum((0, 2)) / bend
        if (step**2 * bend <= CLOSE * len(x)).all():
            break
        least, far = loss * (1 + 1e-12), True
        while np.any(far):  # where a step of Newton's goes too far, half of it
            ahead = found + step[:, None] * along
            moved = weights + step[:, None] * direction
            loss, rate = _loss(ahead, wanted, moved, penalty)
            far = (loss > least) & (abs(step) > 1e-12)
            step = np.where(far, step / 2, step)
        weights, found = moved, ahead
    return weights


def _times(matrix, values):
    """(a, column) and (column, ...) -> (a, ...)."""
    return (matrix @ values.reshape(len(values), -1)).reshape(-1, *values.shape[1:])


def _loss(found, wanted, weights, penalty):
    """Loss (target,) and probabilities (row, target, label) of what was found."""
    logs = log_softmax(found, 2)
    squares = (penalty * weights**2).sum((0, 2))
    return squares / 2 - (logs * wanted).sum((0, 2)), np.exp(logs)


def perceptron(task: str, seed: int = 0):
    """A plain network for features that ask for one (`raw_signal`), unfitted: 64 hidden units."""
    from sklearn.compose import TransformedTargetRegressor
    from sklearn.neural_network import MLPClassifier, MLPRegressor

    kind = MLPRegressor if task == "number" else MLPClassifier
    steady = {"activation": "tanh", "solver": "lbfgs", "alpha": 3.0}  # and learns a product still
    network = kind(hidden_layer_sizes=64, max_iter=5000, tol=1e-6, random_state=seed, **steady)
    scaled = make_pipeline(StandardScaler(), network)
    if task == "number":
        return TransformedTargetRegressor(scaled, transformer=StandardScaler())
    return scaled


ESTIMATORS = {"MLP": perceptron}  # attrs["estimator"] of features -> (task, seed) -> estimator
