"""Does it beat the connectome: probes fitted inside the fold, as tidy scores.

Nothing that is fitted here ever sees a test subject, and no step before the estimator sees the
target. Who enters, who is tested and how it is measured is decided in `task`.
"""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import sklearn
import xarray as xr
from sklearn.base import clone, is_classifier
from sklearn.dummy import DummyClassifier, DummyRegressor
from sklearn.impute import SimpleImputer
from sklearn.linear_model import LogisticRegressionCV
from sklearn.model_selection import StratifiedShuffleSplit
from sklearn.preprocessing import StandardScaler

from bhx.data.splits import permute_within
from bhx.errors import InputError, check_choice, listed
from bhx.evaluate.confounds import ComBat, ConfoundRegression, share_priors
from bhx.evaluate.estimators import ESTIMATORS, logistic, on_axes, ridge
from bhx.evaluate.features import encoded, name_of, parts_of, provenance_of
from bhx.evaluate.options import check_count, check_name, check_names
from bhx.evaluate.rows import check_leak
from bhx.evaluate.task import make_task
from bhx.schema import check
from bhx.settings import __version__

PENALTIES = np.logspace(1, -5, 7)  # a row, for rows of unit norm: fits any number of either


def probe(
    features,
    target: str,
    *,
    groups: str | None = None,
    stratify: str | None = None,
    confounds=(),
    harmonize: str | None = None,
    preserve=(),
    task: str | None = None,
    classes=None,
    estimator=None,
    protocol: str | None = None,
    split: xr.DataArray | None = None,
    folds: int | None = None,
    repeats: int = 1,
    permutations: int = 0,
    seed: int = 0,
) -> xr.Dataset:
    """Predict a label of the subjects from features, honestly.

    Ridge regression for numbers, logistic regression for labels. Whatever is fitted (filling,
    ComBat, confounds, scaler, penalty) is fitted in the training part of each fold, the penalty
    by an inner cross-validation, and one participant, or family where there is a coordinate
    `family`, is never on both sides of a split.

    Parameters
    ----------
    features : Features Dataset (`bhx.pool(latents)`, `bhx.connectome(cohort)`), or a list of them:
        then all are tested on the subjects that every one of them has, in the same folds; labels
        come from all of them, and those in use must agree
    target : name of a coordinate on subject; who has none ("", "n/a", "NA", NaN) is left out
    groups : None, or the name of a coordinate whose values are held out whole, one a fold ("site"
        is leave-one-site-out; a few sites of fewer than 5 subjects are held out together)
    stratify : name of a coordinate to balance over the folds, beside the target; numbers of which
        fewer than `folds` are alike by their fifths
    confounds : coordinates whose linear effect is taken out of the features; their columns (one a
        word) must be fewer than the training rows
    harmonize : coordinate ("site") whose shift and scale ComBat takes out of the features; a site
        that the training part lacks is left as it is
    preserve : coordinates whose effect ComBat keeps. Neither they, `confounds` nor `harmonize`
        may reveal the target: be in its order, or have a value of their own for each label
    task : "number" or "label"; None decides by the target
        (floats, and integers with more than ten values, are numbers)
    classes : labels to use, in order; subjects with others are left out and counted. Precision and
        recall of two labels are about the last, in alphabetical order where none is given
    estimator : any scikit-learn estimator instead of ridge or logistic regression; it gets the
        scaled features, and for labels needs predict_proba. Features whose attrs["estimator"] is
        a name in `estimators.ESTIMATORS` bring their own (`raw_signal`), and attrs["components"]
        says how many principal components of a fold's training rows to keep
    protocol : None for `folds` x `repeats`; or one that makes its own splits: "paper" for
        BrainHarmonix' 6:2:2 split stratified by site with three seeds, "brainmarks" for 100
        stratified resplits and its logistic grid
    split : of `bhx.split`, instead of folds: a repeat is a fold, "train" and "test" are its parts,
        and the penalty is chosen on "validation" where there is one
    folds, repeats, seed : number of folds (by default 5, or one a group; 5 where most groups are
        of fewer than 5 subjects), of repeated splits, and the seed of the first
    permutations : how often to repeat all with labels exchanged between participants of one site
        (families, where there is a coordinate `family`, exchanged whole)

    Returns
    -------
    Scores Dataset: `score (model, metric, fold)`, `prediction (model, subject)` (mean over the
    folds that tested the subject), `output (model, fold, subject, class)` and
    `decision (model, fold, subject)`, `truth (subject)`, and `null (model, permutation)` of the
    first metric; the coordinate `estimator (model)` says what read the features. attrs: target,
    task, n, excluded (JSON: reason -> subject ids), notes (JSON list of fallbacks that were taken
    and of folds that say too little), and every option.

    Notes
    -----
    Labels are decided by Bayes' rule for balanced accuracy: the largest probability over training
    frequency. The protocols decide by the largest probability, as their authors do.
    """
    many = list(features) if isinstance(features, (list, tuple)) else [features]
    many = [check(one, "features") for one in many]
    check_name("harmonize", harmonize)
    check_names("confounds", confounds)
    check_names("preserve", preserve)
    check_count("permutations", permutations, 0, 1000)
    if len(preserve) and not harmonize:
        fact = f"Expected harmonize beside preserve, found preserve={preserve!r} alone"
        raise InputError(fact, "It says what ComBat keeps: name harmonize, or leave it out")
    used = [name for name in (harmonize, *confounds, *preserve) if name]
    design: dict = {"groups": groups, "stratify": stratify, "protocol": protocol, "split": split}
    design |= {"folds": folds, "repeats": repeats, "seed": seed}
    task = make_task(many, target, task=task, classes=classes, needed=used, **design)
    check_leak(task.rows.labels, used, target, task.truth, task.names)
    _check_estimator(estimator, task.kind)
    if harmonize and groups == harmonize:
        note = f"ComBat has not seen the {harmonize} it tests: features left as are"
        task.splits.notes.append(note)
    given = [_estimator_of(one, task, estimator) for one in task.rows.features]
    truths, scores = _exchanged(task, permutations), []
    for one, own in zip(task.rows.features, given, strict=True):
        preparation = Preparation(one, task.rows.labels, confounds, harmonize, preserve)
        scores.append(_probe_one(one, task, own, preparation, truths))
    out = xr.concat(scores, "model", data_vars="minimal", coords="minimal", compat="override")
    return out.assign_attrs(
        confounds=json.dumps(list(confounds)),
        harmonize=harmonize or "",
        preserve=json.dumps(list(preserve)),
        estimator=_described(estimator, task),
        notes=json.dumps(task.splits.notes),
        features=json.dumps({name_of(one): provenance_of(one) for one in many}),
        versions=json.dumps({"bhx": __version__, "scikit-learn": sklearn.__version__}),
    )


def _check_estimator(estimator, kind):
    """Refuse what is no estimator, or not one of this task."""
    if estimator is None:
        return
    if isinstance(estimator, type) or not hasattr(estimator, "get_params"):
        wanted, help = "an estimator of scikit-learn", "Give an instance, such as Ridge(1.0)"
    elif kind == "number" and is_classifier(estimator):
        wanted, help = "a regressor for a number", "Take another, or task='label'"
    elif kind != "number" and not hasattr(estimator, "predict_proba"):
        wanted, help = "a classifier with predict_proba", "Wrap it in CalibratedClassifierCV"
    else:
        return
    raise InputError(f"Expected {wanted}, found {estimator!r}", help)


# Before the estimator ---

PIECE = 1024  # columns of features that are prepared at a time


class Preparation:
    """What stands between features and estimator, fitted to training rows; none of it looks at the
    target. Features are prepared in pieces of columns, so that no copy of them all is needed."""

    def __init__(self, features, labels, confounds=(), harmonize=None, preserve=()):
        self.values = features.features.transpose("subject", "feature").values
        self.row = features.indexes["subject"].get_indexer(labels.subject)
        self.keep = features.attrs.get("components")
        self.pieces = [
            (part, slice(start, min(start + width, columns.stop)), steps)
            for part, (columns, steps) in enumerate(parts_of(features))
            for width in [columns.stop if steps else PIECE]
            for start in range(columns.start, columns.stop, width)
        ]
        kept, site = encoded(labels, preserve), labels[harmonize].values if harmonize else []
        site = np.unique(site, return_inverse=True)[1][:, None]
        self.beside = encoded(labels, confounds), np.hstack([kept, site]) if harmonize else None
        if self.pieces and not any(self._varies(columns) for _, columns, _ in self.pieces):
            fact = "Expected features that vary over subjects, found constants in "
            help = "Were they pooled over subjects by mistake"
            raise InputError(fact + name_of(features), help)

    def _varies(self, columns):
        values = self.values[:, columns][self.row]
        return (np.fmax.reduce(values) > np.fmin.reduce(values)).any()

    def on_axes(self, fit, new):
        """Rows to fit, and new ones, on the axes of those to fit."""
        return on_axes(self._prepared(fit, new), self.values.shape[1] > len(fit), self.keep)

    def scaled(self, fit, new):
        """Rows to fit, and new ones: every column with mean zero and unit variance in the first."""
        pieces = [*self._prepared(fit, new), (0, np.zeros((len(fit), 0)), np.zeros((len(new), 0)))]
        return tuple(np.hstack(rows) for rows in list(zip(*pieces, strict=True))[1:])

    def _prepared(self, fit, new):
        """(part, rows to fit, new rows) of each piece of the features."""

        def through(step, both, beside):
            pairs = zip(both, (fit, new), strict=True)
            return [step.transform(np.hstack([x, beside[rows]])) for x, rows in pairs]

        confounds, site = self.beside
        combats = []
        if site is not None:
            filled = (self._filled(fit, new, *piece[1:])[0] for piece in self.pieces)
            combats = [ComBat(site.shape[1] - 1).fit(np.hstack([x, site[fit]])) for x in filled]
            share_priors(combats)
        for i, (part, columns, steps) in enumerate(self.pieces):
            both = self._filled(fit, new, columns, steps)
            if combats:
                both = through(combats[i], both, site)
            if width := confounds.shape[1]:
                regression = ConfoundRegression(width).fit(np.hstack([both[0], confounds[fit]]))
                both = through(regression, both, confounds)
            scaler = StandardScaler().fit(both[0])
            yield part, *map(scaler.transform, both)

    def _filled(self, fit, new, columns, steps):
        """Rows to fit and new ones of some columns, filled with the mean of the first."""
        both = [self.values[:, columns][self.row[rows]].astype(float) for rows in (fit, new)]
        if any(np.isnan(rows).any() for rows in both):
            steps = [SimpleImputer(keep_empty_features=True), *steps]
        for step in map(clone, steps):
            both = [step.fit_transform(both[0]), step.transform(both[1])]
        return both


# One model ---

NAMES = {"number": "ridge regression", "label": "logistic regression"}


def _estimator_of(features, task, given):
    """What reads these features; None is a penalized regression, chosen in the fold."""
    if features.sizes["feature"] == 0:
        return DummyRegressor() if task.kind == "number" else DummyClassifier(strategy="prior")
    if own := features.attrs.get("estimator"):
        check_choice("attrs['estimator'] of features", own, list(ESTIMATORS))
        return ESTIMATORS[own](task.kind, task.design.seed)
    return given


def _described(estimator, task):
    """An estimator for the methods of a report."""
    if isinstance(estimator, DummyRegressor | DummyClassifier):
        return "the mean or the frequencies of the training part"
    if estimator is None:
        return f"{NAMES[task.kind]}, nested penalty"
    return " ".join(repr(estimator).split())


def _probe_one(features, task, estimator, preparation, truths):
    """Scores of one model, and the null of those truths (row, target) that follow the first."""
    output, decision = task.empty()
    null = np.empty((len(output), truths.shape[1] - 1))
    for i, (train, test, validation) in enumerate(task.folds()):
        found = _read(preparation, task, estimator, train, test, validation, truths)
        decided = [task.decide(*pair) for pair in zip(found, truths[train].T, strict=True)]
        output[i, test], decision[i, test] = found[0], decided[0]
        for j, pair in enumerate(zip(found[1:], decided[1:], strict=True)):
            null[i, j] = next(iter(task.measure(truths[test, j + 1], *pair).values()))[0]
    out = task.scores(name_of(features), output, decision)
    if null.size:
        out["null"] = (("model", "permutation"), np.nanmean(null, 0)[None])
    return out.assign_coords(estimator=("model", [_described(estimator, task)]))


def _read(preparation, task, estimator, train, test, validation, truths):
    """Outputs (target, test row, class) of an estimator fitted to each column of truths."""
    if estimator is None and task.design.protocol != "brainmarks":
        return _penalized(preparation, task, train, test, validation, truths)
    turned = estimator is None or preparation.keep
    x, new = (preparation.on_axes if turned else preparation.scaled)(train, test)
    out = np.zeros((truths.shape[1], len(test), len(task.classes)))
    for found, y in zip(out, truths[train].T, strict=True):
        if estimator is None:
            cuts = resplit_people(task.splits.units[train], y, task.design.seed)
            scoring = {"scoring": "balanced_accuracy", "use_legacy_attributes": False}
            model = LogisticRegressionCV(Cs=10, l1_ratios=(0,), max_iter=1000, cv=cuts, **scoring)
        else:
            model = clone(estimator)
        model.fit(x, y)
        if task.names is None:
            found[:, 0] = np.ravel(model.predict(new))
        else:
            found[:, model.classes_] = model.predict_proba(new)
    return out


def _penalized(preparation, task, train, test, validation, truths):
    """Outputs of ridge or logistic regression, each target's penalty chosen inside the fold."""

    def fitted(both, rows, targets, penalties):
        y = truths[np.ix_(rows, targets)]
        if task.names is None:
            return ridge(both[0], y, both[1], penalties)
        return logistic(both[0], y, both[1], penalties, len(task.names))

    every = np.arange(truths.shape[1])
    loss, used = np.zeros((len(PENALTIES), len(every))), np.zeros(len(every), bool)
    cuts = [(train, validation)] if len(validation) else task.inner_splits(train)
    for fit, hold in cuts:
        targets = every  # exchanged labels may be missing where the true ones are not
        if task.names is not None:
            targets = [t for t in every if set(truths[fit, t]) == set(truths[train, t])]
        both = preparation.on_axes(fit, hold)
        for i, found in enumerate(fitted(both, fit, targets, PENALTIES)):
            loss[i, targets] += task.loss(truths[np.ix_(hold, targets)], found)
        used[targets] = True
    chosen = np.where(used, PENALTIES[loss.argmin(0)], 1 / len(train))
    both = preparation.on_axes(train, test)
    out = np.empty((len(every), len(test), len(task.classes)))
    for penalty in np.unique(chosen):
        targets = np.flatnonzero(chosen == penalty)
        out[targets] = next(fitted(both, train, targets, [penalty]))
    return out


def resplit_people(units, truth, seed: int) -> list:
    """Brainmarks' five inner resplits, a quarter held out, of whole participants."""
    person = pd.factorize(units)[0]
    label = truth[np.unique(person, return_index=True)[1]]
    counts = np.unique(label, return_counts=True)[1]
    few = 4 * (len(counts) - 1)
    if counts.min() < 2 or len(label) <= few:
        fact = f"Expected at least 2 training participants of each label and {few + 1} in all, "
        fact += f"found {listed(counts)}"
        raise InputError(fact, "Protocol 'brainmarks' splits them again: give more participants")
    cuts = StratifiedShuffleSplit(5, test_size=0.25, random_state=seed).split(label, label)
    return [tuple(np.flatnonzero(np.isin(person, part)) for part in cut) for cut in cuts]


def _exchanged(task, permutations):
    """The truth, and what it becomes as labels are exchanged within site: (row, target).

    An exchange that leaves a training part without some label is drawn again: that of the truth
    has them all, too.
    """
    rows, trains = task.rows, task.splits.rows("train")
    rng = np.random.default_rng(task.design.seed)
    labels, found = 0 if task.names is None else len(task.names), []
    orders = permute_within(rows.people, rows.sites, rng, rows.families)
    drawn = 0
    while len(found) < permutations and drawn < 100 * permutations:
        drawn += 1
        moved = task.truth[next(orders)]
        if not labels or all(len(np.unique(moved[train])) == labels for train in trains):
            found.append(moved)
    if len(found) < permutations:
        fact = f"Expected {permutations} exchanges with every label in each training part, found "
        raise InputError(f"{fact}{len(found)} in {drawn}", "Leave a rare label out")
    if again := drawn - permutations:
        task.splits.notes.append(f"{again} exchanges without some label drawn again")
    return np.column_stack([task.truth, *found])
