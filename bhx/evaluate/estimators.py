"""What `bhx.probe` fits beside scikit-learn's own: estimators of its contract.

No split is made and no score is read here. Sources stand with each class.
"""

from __future__ import annotations

import numpy as np
from sklearn.base import BaseEstimator, TransformerMixin
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.validation import check_is_fitted, validate_data


class Rotation(TransformerMixin, BaseEstimator):
    """Features on the training rows' own axes, rows of unit mean norm.

    Ridge and L2 logistic regression give the same predictions before and after; with more
    features than rows it makes them fast, and one grid of penalties fits any number of features.
    Blocks of the given widths get the same weight. With `keep`, only that many leading axes stay:
    principal components.
    """

    def __init__(self, blocks: tuple[int, ...] = (), keep: int | None = None):
        self.blocks, self.keep = blocks, keep

    def fit(self, x, y=None):
        """Find the axes of rows (row, feature); `y` is not looked at."""
        x = validate_data(self, x, dtype=float)
        self.mean_ = x.mean(0)
        widths = [w for w in self.blocks if w] or [x.shape[1]]
        power = ((x - self.mean_) ** 2).mean(0)
        size = [part.sum() for part in np.split(power, np.cumsum(widths)[:-1])]
        self.weight_ = np.repeat([1 / np.sqrt(len(size) * s) if s > 0 else 0 for s in size], widths)
        x = (x - self.mean_) * self.weight_
        wide = x.shape[1] > len(x)  # the Gram matrix of the shorter side has the same axes
        power, axes = np.linalg.eigh(x @ x.T if wide else x.T @ x)
        known = np.flatnonzero(power > 1e-12 * power[-1])[-(self.keep or 0) :]  # they ascend
        axes, power = axes[:, known], power[known]
        self.axes_ = x.T @ (axes / np.sqrt(power)) if wide else axes
        if not len(known):  # nothing varies over these rows: one column of zeros
            self.axes_ = np.zeros((x.shape[1], 1))
        return self

    def transform(self, x):
        """(row, feature) -> (row, axis)."""
        check_is_fitted(self)
        x = validate_data(self, x, dtype=float, reset=False)
        return ((x - self.mean_) * self.weight_) @ self.axes_


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
