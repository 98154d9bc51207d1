"""What `bhx.probe` fits beside scikit-learn's own: estimators of its contract.

No split is made and no score is read here. Sources stand with each class.
"""

from __future__ import annotations

import numpy as np
from scipy.special import softmax
from sklearn.base import BaseEstimator, ClassifierMixin, TransformerMixin, clone
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from bhx.errors import InputError


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


class OrdinalLogistic(ClassifierMixin, BaseEstimator):
    """Ordered labels as one logistic regression for each "higher than", all with one penalty.

    Source: Frank and Hall, ECML 2001.
    """

    def __init__(self, C: float = 1.0, max_iter: int = 100):
        self.C, self.max_iter = C, max_iter

    def fit(self, x, y):
        """Fit on rows (row, feature) and codes in order."""
        self.classes_ = np.unique(y)
        one = LogisticRegression(C=self.C, solver="newton-cholesky", max_iter=self.max_iter)
        self.above_ = [clone(one).fit(x, y > code) for code in self.classes_[:-1]]
        return self

    def predict_proba(self, x):
        """(row, class)."""
        above = np.stack([model.predict_proba(x)[:, 1] for model in self.above_], 1)
        edges = np.hstack([np.ones((len(x), 1)), above, np.zeros((len(x), 1))])
        steps = (edges[:, :-1] - edges[:, 1:]).clip(1e-6)
        return steps / steps.sum(1, keepdims=True)

    def predict(self, x):
        """The most probable class."""
        return self.classes_[self.predict_proba(x).argmax(1)]


class AttentionPooling(BaseEstimator):
    """A probe that learns which hub tokens to read: one query, softmax over tokens, linear head.

    For `probe(pool(latents, "concatenate"), ..., estimator=AttentionPooling(tokens))`. It starts as
    the mean over tokens. Trained by AdamW on four fifths of the training rows and stopped by the
    loss on the last fifth: rows, as it knows no participants, so that sessions of one may stand on
    both sides of that cut, though never of a fold.

    Parameters
    ----------
    tokens : number of tokens in a row of features, token-major
    lr, decay, epochs, patience, seed : learning rate, weight decay, most epochs, epochs without
        a better held-out loss before the end, seed of the split

    Attributes
    ----------
    query_ (feature,), weight_ (feature, class), level_ (class,) ; classes_ for labels (integers)
    """

    def __init__(self, tokens: int, lr=0.01, decay=0.1, epochs=300, patience=30, seed=0):
        self.tokens, self.lr, self.decay = tokens, lr, decay
        self.epochs, self.patience, self.seed = epochs, patience, seed

    def fit(self, x, y):
        """Fit on rows (row, token * feature) and numbers, or integer labels."""
        import torch
        from torch.nn.functional import cross_entropy, mse_loss

        x = torch.tensor(self._tokens(x), dtype=torch.float32)
        if len(x) < 5:
            raise InputError(f"Expected at least 5 training rows, found {len(x)}", "Add subjects")
        labels = np.issubdtype(np.asarray(y).dtype, np.integer)
        if labels:
            self.classes_, codes = np.unique(y, return_inverse=True)
            truth, width, loss = torch.tensor(codes), len(self.classes_), cross_entropy
        else:
            self.mean_, self.spread_ = np.mean(y), np.std(y) or 1.0
            truth = torch.tensor((y - self.mean_) / self.spread_, dtype=torch.float32)[:, None]
            width, loss = 1, mse_loss
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(self.seed))
        fit, hold = order[len(x) // 5 :], order[: len(x) // 5]
        sizes = ((x.shape[2],), (x.shape[2], width), (width,))
        parts = [torch.zeros(size, requires_grad=True) for size in sizes]
        optimiser = torch.optim.AdamW(parts, lr=self.lr, weight_decay=self.decay)
        best, waited = np.inf, 0
        for _ in range(self.epochs):
            optimiser.zero_grad()
            loss(_pooled(x[fit], *parts), truth[fit]).backward()
            optimiser.step()
            with torch.no_grad():
                held = float(loss(_pooled(x[hold], *parts), truth[hold]))
            waited = 0 if held < best else waited + 1
            if held < best:
                best, kept = held, [part.detach().numpy().copy() for part in parts]
            if waited > self.patience:
                break
        self.query_, self.weight_, self.level_ = kept
        return self

    def attention(self, x):
        """Share of each token in the reading of each row, (row, token)."""
        return softmax(self._tokens(x) @ self.query_ / np.sqrt(len(self.query_)), 1)

    def predict_proba(self, x):
        """(row, class)."""
        return softmax(self._read(x), 1)

    def predict(self, x):
        """Numbers, or the most probable labels."""
        if hasattr(self, "classes_"):
            return self.classes_[self._read(x).argmax(1)]
        return self._read(x)[:, 0] * self.spread_ + self.mean_

    def _read(self, x):
        pooled = np.einsum("nt,ntf->nf", self.attention(x), self._tokens(x))
        return pooled @ self.weight_ + self.level_

    def _tokens(self, x):
        if x.shape[1] % self.tokens:
            fact = f"Expected features of {self.tokens} tokens, found {x.shape[1]} columns"
            raise InputError(fact, "Pool with how='concatenate' and give the number of hub tokens")
        return np.reshape(x, (len(x), self.tokens, -1))


def _pooled(x, query, weight, level):
    share = (x @ query / len(query) ** 0.5).softmax(1)  # (N, T)
    return (share[..., None] * x).sum(1) @ weight + level
