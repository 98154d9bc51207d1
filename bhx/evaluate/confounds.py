"""Site, motion and other things that should not be what a score is made of.

Scikit-learn transformers that are fitted in the training fold and only applied to the test fold,
and matched subsamples. As scikit-learn knows one matrix only, the confounds are its last columns:
`[features | confounds]`; the transformers return the features alone. No prediction happens here.
"""

from __future__ import annotations

import numpy as np
import xarray as xr
from scipy.optimize import linear_sum_assignment
from sklearn.base import BaseEstimator, TransformerMixin
from sklearn.utils.validation import check_is_fitted, validate_data

from bhx.errors import InputError, listed
from bhx.evaluate.options import check_coords, check_names
from bhx.schema import is_missing

TOLERANCE, STEPS = 1e-4, 1000  # relative change and steps at which ComBat's posterior ends


class ComBat(TransformerMixin, BaseEstimator):
    """Remove each site's shift and scale from every feature, by empirical Bayes.

    Parameters
    ----------
    covariates : number of columns before the last whose linear effect on the features is kept
        (age, sex coded 0/1); the last column of X is the site as a number

    Attributes
    ----------
    sites_ (site,), shift_ (site, feature) and scale_ (site, feature) : posterior means of gamma
        and delta squared, in units of the pooled deviation

    Notes
    -----
    Johnson, Li and Rabinovic, Biostatistics 2007 (model and empirical Bayes); Fortin et al.,
    NeuroImage 2018 (covariates, imaging). A site with one training row gets the pooled scale. A
    feature that does not vary within the training sites says nothing but the site: every row gets
    the average site's value of it. At `transform`, the features of a site that was not in `fit`
    stay as they are.
    """

    def __init__(self, covariates: int = 0):
        self.covariates = covariates

    def fit(self, x, y=None):
        """Fit on rows `[features | covariates | site]`; `y` is not looked at."""
        features, covariates, site = self._parts(validate_data(self, x, dtype=float))
        self.sites_, at = np.unique(site, return_inverse=True)
        onehot = np.eye(len(self.sites_))[at]
        z = self._fit_pooled(features, covariates, onehot)
        self.counts_ = onehot.sum(0)
        self.found_ = onehot.T @ z / self.counts_[:, None]
        z -= self.found_[at]
        squares = onehot.T @ np.square(z, out=z) / (self.counts_[:, None] - 1).clip(1)
        self.spread_ = np.where(self.counts_[:, None] > 1, squares.clip(1e-12), 1)
        share_priors([self])
        return self

    def transform(self, x):
        """Features (row, feature) as if every row came from the average training site."""
        check_is_fitted(self)
        features, covariates, site = self._parts(validate_data(self, x, dtype=float, reset=False))
        out = features.copy()
        for known, shift, scale in zip(self.sites_, self.shift_, self.scale_, strict=True):
            rows = site == known
            level = self._mean(covariates[rows])
            moved = features[rows] - (level + shift * self.deviation_)
            moved /= np.sqrt(scale)
            out[rows] = moved + level
        still = ~self.moves_
        level = self._mean(covariates)[..., still]
        out[:, still] = np.where(self.flat_[still], features[:, still], level)
        return out

    def _parts(self, x):
        width = x.shape[1] - 1 - self.covariates
        if width < 1:
            fact = f"Expected [features | {self.covariates} covariates | site], found {x.shape[1]}"
            raise InputError(fact + " columns", "Put covariates and site behind the features")
        return x[:, :width], x[:, width:-1], x[:, -1]

    def _fit_pooled(self, features, covariates, onehot):
        """Least squares on sites and covariates: grand mean, covariate effects, deviation; the
        features standardized by them."""
        design, n_sites = np.hstack([onehot, covariates]), onehot.shape[1]
        varied = np.linalg.matrix_rank(np.insert(covariates, 0, 1, axis=1)) - 1
        if np.linalg.matrix_rank(design) < n_sites + varied:
            fact = "Expected covariates that vary within sites, found one that the sites determine"
            raise InputError(fact, "Leave it out: its effect cannot be told from the site's")
        effects = np.linalg.pinv(design) @ features
        self.grand_mean_ = onehot.mean(0) @ effects[:n_sites]
        self.effects_ = effects[n_sites:]
        z = features - design @ effects
        self.deviation_ = np.sqrt(np.einsum("rf,rf->f", z, z) / len(z))
        low, high = features.min(0), features.max(0)
        self.flat_ = low == high  # nothing that a site could have shifted
        self.moves_ = self.deviation_ > 1e-12 * np.maximum(-low, high)
        z += onehot @ (effects[:n_sites] - self.grand_mean_)
        z /= np.where(self.moves_, self.deviation_, 1)
        return z

    def _mean(self, covariates):
        """The average site's features of these rows; one row for all where there are none."""
        if not covariates.shape[1]:
            return self.grand_mean_
        return self.grand_mean_ + covariates @ self.effects_


def share_priors(combats: list[ComBat]) -> None:
    """Shrink the sites' effects toward their distribution over the features of all of these.

    Features may be fitted in pieces of columns: then this makes of them what one fit would.
    """
    found = np.hstack([combat.found_ for combat in combats])
    spread = np.hstack([combat.spread_ for combat in combats])
    each = zip(combats[0].counts_, found, spread, strict=True)
    shift, scale = np.stack([_posterior(*site) for site in each], 1)
    cuts = np.cumsum([combat.found_.shape[1] for combat in combats])[:-1]
    parts = zip(np.split(shift, cuts, 1), np.split(scale, cuts, 1), strict=True)
    for combat, part in zip(combats, parts, strict=True):
        combat.shift_, combat.scale_ = part


def _posterior(n, found, spread):
    """Shift and scale of one site: the fixed point of the conditional posterior means.

    Source: Johnson 2007, equations 3.1 and 3.2.
    """
    mean, variance, (a, b) = found.mean(), _variance(found), _inverse_gamma(spread)
    shift, scale = found, spread
    for _ in range(STEPS):
        new_shift = (n * variance * found + scale * mean) / (n * variance + scale)
        squares = (n - 1) * spread + n * (found - new_shift) ** 2
        new_scale = (b + squares / 2) / (n / 2 + a - 1) if np.isfinite(a) else scale
        moved = max(_relative(new_shift, shift), _relative(new_scale, scale))
        shift, scale = new_shift, new_scale
        if moved < TOLERANCE:
            break
    return shift, scale


def _variance(values):
    """Unbiased variance; one where a single value leaves none to estimate."""
    return max(values.var(ddof=1), 1e-12) if len(values) > 1 else 1.0


def _inverse_gamma(values):
    """Shape and rate of the inverse gamma with the mean and variance of `values`."""
    mean, variance = values.mean(), values.var(ddof=1) if len(values) > 1 else 0.0
    if variance <= 1e-12 * mean**2:
        return np.inf, np.inf  # no spread to shrink toward: the scale stays as estimated
    return 2 + mean**2 / variance, mean + mean**3 / variance


def _relative(new, old):
    return np.max(np.abs(new - old) / np.maximum(np.abs(old), 1e-12), initial=0.0)


class ConfoundRegression(TransformerMixin, BaseEstimator):
    """Subtract from every feature what the confounds predict linearly, by least squares.

    Parameters
    ----------
    confounds : number of last columns of X that are confounds, not features

    Notes
    -----
    The features keep their training mean; one that the confounds explain wholly has nothing else
    left. As many independent confounds as training rows less one explain anything, and are
    refused. Source: Snoek, Miletic and Scholte, NeuroImage 2019, who show why this belongs inside
    the fold.
    """

    def __init__(self, confounds: int = 1):
        self.confounds = confounds

    def fit(self, x, y=None):
        """Fit on rows `[features | confounds]`; `y` is not looked at."""
        features, design = self._parts(validate_data(self, x, dtype=float))
        self.mean_, self.level_ = design.mean(0), features.mean(0)
        design, moved = design - self.mean_, features - self.level_
        self.effects_, _, rank, _ = np.linalg.lstsq(design, moved)
        if rank >= len(design) - 1:
            found = f"{design.shape[1]} columns for {len(design)} rows"
            fact = f"Expected fewer confounds than training rows, found {found}"
            raise InputError(
                fact, "Leave some out; a word is a column: are numbers stored as words"
            )
        rounding = 1e-16 * (moved**2).sum(0) + 1e-28 * (features**2).sum(0)
        self.spent_ = ((moved - design @ self.effects_) ** 2).sum(0) <= rounding
        return self

    def transform(self, x):
        """Features (row, feature) without the confounds' linear effect."""
        check_is_fitted(self)
        features, design = self._parts(validate_data(self, x, dtype=float, reset=False))
        rest = features - (design - self.mean_) @ self.effects_
        return np.where(self.spent_, self.level_, rest)

    def _parts(self, x):
        if not 0 < self.confounds < x.shape[1]:
            fact = f"Expected [features | {self.confounds} confounds], found {x.shape[1]} columns"
            raise InputError(fact, "Put the confounds behind the features")
        return x[:, : -self.confounds], x[:, -self.confounds :]


def match_subjects(
    data: xr.Dataset, target: str, on: tuple[str, ...], exact: tuple[str, ...] = (), caliper=0.25
) -> xr.Dataset:
    """A subsample in which two groups are alike: pairs of subjects, one of each label.

    Parameters
    ----------
    data : Dataset with `subject` (cohort, latents or features)
    target : coordinate with two labels
    on : numeric coordinates that a pair may differ in by at most `caliper` standard deviations
    exact : coordinates that a pair must share ("site", "sex")
    caliper : standard deviations, for each of `on`

    Returns
    -------
    The rows of `data` that found a partner, in their order; as many pairs as the caliper allows,
    with the least total distance. A subject without a label finds none.
    """
    check_names("on", on, at_least=1)
    check_names("exact", exact)
    check_coords(data, (target, *on, *exact))
    words = [name for name in on if data[name].dtype.kind not in "biuf"]
    if words:
        fact = f"Expected numbers to match on, found {listed(words)}"
        raise InputError(fact, "Put words in exact")
    data = data.isel(subject=~is_missing(data[target].values))
    labels = np.unique(data[target].values)
    if len(labels) != 2:
        raise InputError(f"Expected two labels in '{target}', found {listed(labels)}", "Select two")
    values = np.stack([data[name].values.astype(float) for name in on], 1)
    spread = np.nanstd(values, 0)
    values = values / np.where(spread > 0, spread, 1)
    a, b = (np.flatnonzero(data[target].values == label) for label in labels)
    apart = np.abs(values[a][:, None] - values[b][None])  # (one, other, coordinate)
    allowed = (apart <= caliper).all(-1)  # never where a value is NaN
    for name in exact:
        allowed &= data[name].values[a][:, None] == data[name].values[b][None]
    cost = np.where(allowed, (apart**2).sum(-1) ** 0.5, 1e6)
    left, right = linear_sum_assignment(cost)
    good = allowed[left, right]
    if not good.any():
        fact = f"Expected pairs within {caliper} standard deviations of {listed(on)}, found none"
        raise InputError(fact, "Widen the caliper or match on less")
    return data.isel(subject=np.sort(np.r_[a[left[good]], b[right[good]]]))
