"""Does it beat the connectome: probes fitted inside the fold, as tidy scores.

Nothing that is fitted here ever sees a test subject, and no step before the estimator sees the
target. Who enters, who is tested and how it is measured is decided in `task`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field

import numpy as np
import pandas as pd
import sklearn
import xarray as xr
from sklearn.base import clone, is_classifier
from sklearn.compose import ColumnTransformer
from sklearn.dummy import DummyClassifier, DummyRegressor
from sklearn.impute import SimpleImputer
from sklearn.linear_model import LogisticRegression, LogisticRegressionCV, Ridge
from sklearn.model_selection import StratifiedShuffleSplit
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler

from bhx.data.splits import permute_within
from bhx.errors import InputError, check_choice, listed
from bhx.evaluate.confounds import ComBat, ConfoundRegression
from bhx.evaluate.estimators import ESTIMATORS, Rotation
from bhx.evaluate.features import encoded, name_of, parts_of, provenance_of
from bhx.evaluate.options import check_count, check_name, check_names
from bhx.evaluate.rows import check_leak
from bhx.evaluate.task import Task, make_task
from bhx.schema import check
from bhx.settings import __version__

PENALTIES = np.logspace(-5, 1, 7)  # a row, for rows of unit norm: fits any number of either


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
    folds: int = 5,
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
    groups : None, or the name of a coordinate whose values are held out whole ("site" is
        leave-site-out; a few sites of fewer than 5 subjects are held out together)
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
    folds, repeats, seed : number of folds, of repeated splits, and the seed of the first
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
    beside = Beside.of(task.rows.labels, confounds, harmonize, preserve)
    if harmonize and groups == harmonize:
        task.notes.append(f"ComBat has not seen the {harmonize} it tests: features left as are")
    given = [_estimator_of(one, task, estimator) for one in task.rows.features]
    pairs = zip(task.rows.features, given, strict=True)
    scores = [_probe_one(one, task, own, beside, permutations) for one, own in pairs]
    out = xr.concat(scores, "model", data_vars="minimal", coords="minimal", compat="override")
    read_by = [_described(own, task) for own in given]
    return out.assign_coords(estimator=("model", read_by)).assign_attrs(
        confounds=json.dumps(list(confounds)),
        harmonize=harmonize or "",
        preserve=json.dumps(list(preserve)),
        estimator=_described(estimator, task),
        notes=json.dumps(task.notes),
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


@dataclass
class Beside:
    """Columns that stand beside the features: what ComBat keeps, site, confounds."""

    columns: np.ndarray
    covariates: int = 0
    combat: bool = False
    confounds: int = 0

    @classmethod
    def of(cls, labels, confounds, harmonize, preserve):
        """The columns of these coordinates."""
        kept, regressed = encoded(labels, preserve), encoded(labels, confounds)
        columns = [regressed]
        if harmonize:
            site = np.unique(labels[harmonize].values, return_inverse=True)[1]
            columns = [kept, site[:, None], regressed]
        return cls(np.hstack(columns), kept.shape[1], bool(harmonize), regressed.shape[1])


def preparation(features, beside: Beside | None = None, rotate: bool = True) -> Pipeline:
    """The steps between features and estimator, unfitted; none of them looks at the target.

    Parameters
    ----------
    features : Features Dataset, whose parts, and entries of `features.IN_FOLD`, they are
    beside : the columns behind the features, or None
    rotate : whether to end on the training rows' own axes (`Rotation`)
    """
    parts = parts_of(features)
    filled = [
        (f"part{i}", make_pipeline(SimpleImputer(keep_empty_features=True), *steps), columns)
        for i, (columns, steps) in enumerate(parts)
    ]
    steps = [("fill", ColumnTransformer(filled, remainder="passthrough"))]
    if beside is not None and beside.combat:
        last = features.sizes["feature"] + beside.covariates + 1
        combat = ("combat", ComBat(beside.covariates), slice(0, last))
        steps.append(("combat", ColumnTransformer([combat], remainder="passthrough")))
    if beside is not None and beside.confounds:
        steps.append(("confounds", ConfoundRegression(beside.confounds)))
    steps.append(("scale", StandardScaler()))
    if rotate:
        widths = tuple(c.stop - c.start for c, _ in parts)
        steps.append(("rotate", Rotation(widths, features.attrs.get("components"))))
    return Pipeline(steps)


@dataclass
class Fold:
    """Rows of one fold and their prepared features; `inner` are (fit, hold) rows and their
    features, for choosing a penalty."""

    train: np.ndarray
    test: np.ndarray
    x: np.ndarray
    test_x: np.ndarray
    inner: list = field(default_factory=list)


def _prepared(x, steps, task, nested):
    """Each fold's features, prepared on its training rows; one fold at a time."""

    def prepare(train, test):
        if steps is None:
            return x[train], x[test]
        fitted = clone(steps)
        return fitted.fit_transform(x[train]), fitted.transform(x[test])

    for train, test, validation in task.folds():
        inner = []
        if nested:
            inner = [(train, validation)] if len(validation) else task.inner_splits(train)
        inner = [(fit, hold, *prepare(fit, hold)) for fit, hold in inner]
        yield Fold(train, test, *prepare(train, test), inner)


# One model ---

DEFAULTS = {"number": Ridge, "label": LogisticRegression}
NAMES = {"number": "ridge regression", "label": "logistic regression"}


def _probe_one(features, task, estimator, beside, permutations):
    x = features.features.sel(subject=task.subject).values.astype(float)
    if x.shape[1] and not (np.nanstd(x, 0) > 0).any():
        fact = f"Expected features that vary over subjects, found constants in {name_of(features)}"
        raise InputError(fact, "Were they pooled over subjects by mistake")
    width = x.shape[1]
    steps = preparation(features, beside, estimator is None or "components" in features.attrs)
    nested = estimator is None and task.design.protocol != "brainmarks"
    x = np.hstack([x, beside.columns]) if width else x
    folds = _prepared(x, steps if width else None, task, nested)
    folds = list(folds) if permutations else folds
    out = task.scores(name_of(features), *_predict(folds, task, task.truth, estimator))
    if permutations:
        null = _null(folds, task, estimator, permutations)
        out["null"] = (("model", "permutation"), null[None])
    return out


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


def _predict(folds, task, truth, estimator):
    """Outputs (fold, subject, class) and decisions (fold, subject); untested is NaN and -1."""
    output, decision = task.empty()
    for i, fold in enumerate(folds):
        model = fit_fold(fold, task, truth, estimator)
        output[i, fold.test] = found = _outputs(model, fold.test_x, task)
        decision[i, fold.test] = task.decide(found, truth[fold.train])
    return output, decision


def fit_fold(fold: Fold, task: Task, truth, estimator=None):
    """The estimator fitted to a fold's training rows: that given, or one of chosen penalty."""
    if estimator is not None:
        return clone(estimator).fit(fold.x, truth[fold.train])
    if task.design.protocol == "brainmarks":
        cuts = resplit_people(task.splits.units[fold.train], truth[fold.train], task.design.seed)
        scoring = {"scoring": "balanced_accuracy", "use_legacy_attributes": False}
        model = LogisticRegressionCV(Cs=10, l1_ratios=(0,), max_iter=1000, cv=cuts, **scoring)
        return model.fit(fold.x, truth[fold.train])
    inner = fold.inner
    if task.names is not None:  # exchanged labels may be missing where the true ones are not
        inner = [part for part in inner if set(truth[part[0]]) == set(truth[fold.train])]
    if not inner:
        return DEFAULTS[task.kind]().fit(fold.x, truth[fold.train])

    def loss(penalty):
        return sum(
            _loss(_penalized(task, penalty, x, truth[fit]), hold_x, truth[hold], task)
            for fit, hold, x, hold_x in inner
        )

    return _penalized(task, min(PENALTIES, key=loss), fold.x, truth[fold.train])


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


def _penalized(task, penalty, x, y):
    model = DEFAULTS[task.kind]()
    if task.kind == "number":
        return model.set_params(alpha=penalty * len(x)).fit(x, y)
    solver = "newton-cholesky" if len(np.unique(y)) == 2 else "lbfgs"
    model.set_params(C=1 / (penalty * len(x)), max_iter=2000, solver=solver)
    return model.fit(x, y)


def _loss(model, x, truth, task):
    """Squared error, or negative log-likelihood, summed over rows."""
    output = _outputs(model, x, task)
    if task.names is None:
        return ((output[:, 0] - truth) ** 2).sum()
    return -np.log(np.clip(output[np.arange(len(x)), truth], 1e-12, 1)).sum()


def _outputs(model, x, task):
    """Numbers (n, 1), or probabilities (n, class) also of classes absent from training."""
    if task.names is None:
        return np.reshape(model.predict(x), (-1, 1))
    out = np.zeros((len(x), len(task.names)))
    out[:, model.classes_] = model.predict_proba(x)
    return out


def _null(folds, task, estimator, permutations):
    """The first metric's mean over folds, with labels exchanged within site.

    An exchange that leaves a training part without some label is drawn again: that of the truth
    has them all, too.
    """
    rng, rows = np.random.default_rng(task.design.seed), task.rows
    labels = 0 if task.names is None else len(task.names)
    out = []
    for drawn in range(1, 100 * permutations + 1):
        moved = task.truth[permute_within(rows.people, rows.sites, rng, rows.families)]
        if not labels or all(len(set(moved[fold.train])) == labels for fold in folds):
            found = task.score(*_predict(folds, task, moved, estimator), moved)
            out.append(np.nanmean(next(iter(found.values()))))
        if len(out) == permutations:
            if again := drawn - permutations:
                task.notes.append(f"{again} exchanges without some label drawn again")
            return np.array(out)
    fact = f"Expected {permutations} exchanges with every label in each training part, found "
    raise InputError(fact + f"{len(out)} in {drawn}", "Leave a rare label out")
