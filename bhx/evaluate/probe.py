"""Does it beat the connectome: probes fitted inside the fold, tidy scores, one table.

Nothing that is fitted here ever sees a test subject, and no step before the estimator sees the
target. Who enters and who is tested is decided in `splits`, our own estimators are in `estimators`,
plain arithmetic on predictions in `metrics`, site and motion in `confounds`, plain features in
`controls`, figures and pages in `reporting`.
"""

from __future__ import annotations

import json
import warnings
from dataclasses import dataclass, field, replace
from numbers import Integral, Real

import numpy as np
import pandas as pd
import sklearn
import xarray as xr
from sklearn.base import clone, is_classifier
from sklearn.compose import ColumnTransformer
from sklearn.dummy import DummyClassifier, DummyRegressor
from sklearn.impute import SimpleImputer
from sklearn.linear_model import LogisticRegression, LogisticRegressionCV, Ridge
from sklearn.model_selection import GroupKFold, StratifiedGroupKFold, StratifiedShuffleSplit
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler

from bhx.errors import InputError, check_choice, listed
from bhx.evaluate import metrics
from bhx.evaluate.confounds import ComBat, ConfoundRegression, check_names
from bhx.evaluate.estimators import OrdinalLogistic, Rotation, perceptron
from bhx.evaluate.features import Tangent, blocks_of, encoded, name_of
from bhx.evaluate.rows import (
    RESPLITS,
    check_folds,
    check_leak,
    common_rows,
    positive_code,
    splits_of,
    truth_of,
)
from bhx.schema import subject_coords
from bhx.settings import __version__

PENALTIES = np.logspace(-5, 1, 7)  # a row, for rows of unit norm: fits any number of either


# ---------------------------------------------------------------- probe


def probe(
    features,
    target: str,
    *,
    groups: str | None = None,
    stratify: str | None = None,
    confounds=(),
    harmonise: str | None = None,
    preserve=(),
    task: str | None = None,
    classes=None,
    positive=None,
    estimator=None,
    protocol: str | None = None,
    folds: int = 5,
    repeats: int = 1,
    train_share: float = 1.0,
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
        then all are judged on the subjects that every one of them has, in the same folds; labels
        come from all of them, and those in use must agree
    target : name of a coordinate on subject; who has none ("", "n/a", "NA", NaN) is left out
    groups : None, or the name of a coordinate whose values are held out whole ("site" is
        leave-site-out; a few sites of fewer than 5 subjects are held out together)
    stratify : name of a coordinate to balance over the folds, beside the target; numbers of which
        fewer than `folds` are alike by their fifths
    confounds : coordinates whose linear effect is taken out of the features; their columns (one a
        word) must be fewer than the training rows
    harmonise : coordinate ("site") whose shift and scale ComBat takes out of the features; a site
        that the training part lacks is left as it is
    preserve : coordinates whose effect ComBat keeps. Neither they, `confounds` nor `harmonise`
        may tell the target: be in its order, or have a value of their own for each label
    task : "number", "label" or "ordinal"; None decides between the first two by the target
        (floats, and integers with more than ten values, are numbers)
    classes : labels to use, in order; subjects with others are left out and counted
    positive : which of two labels precision and recall are about; default the last
    estimator : any scikit-learn estimator instead of ridge or logistic regression; it gets the
        scaled features, and for labels needs predict_proba. Features with attrs["estimator"] "MLP"
        bring their own (`raw_signal`), and attrs["components"] says how many principal components
        of a fold's training rows to keep
    protocol : None for `folds` x `repeats`; or one that makes its own splits: "paper" for
        BrainHarmonix' 6:2:2 split stratified by site with three seeds, "brainmarks" for 100
        stratified resplits and its logistic grid
    folds, repeats, seed : number of folds, of repeated splits, and the seed of the first
    train_share : share of the training participants to use, of every label alike, for learning
        curves
    permutations : how often to repeat all with labels exchanged between participants of one site
        (families, where there is a coordinate `family`, exchanged whole)

    Returns
    -------
    Scores Dataset: `score (model, metric, fold)`, `prediction (model, subject)` (mean over the
    folds that tested the subject), `output (model, fold, subject, class)` and
    `decision (model, fold, subject)`, `truth (subject)`, and `null (model, permutation)` of the
    first metric. attrs: target, task, n, excluded (JSON: reason -> subject ids), notes (JSON list
    of fallbacks that were taken and of folds that tell too little), and every option.

    Notes
    -----
    Labels are decided by Bayes' rule for balanced accuracy: the largest probability over training
    frequency. The protocols decide by the largest probability, as their authors do.
    """
    many = list(features) if isinstance(features, (list, tuple)) else [features]
    single = {"target": target, "groups": groups, "stratify": stratify, "harmonise": harmonise}
    whole = {"folds": folds, "repeats": repeats, "permutations": permutations, "seed": seed}
    _check_options(single, whole, train_share, confounds=confounds, preserve=preserve)
    aside = [n for n in (harmonise, *confounds, *preserve) if n]
    needed = [*filter(None, (groups, stratify)), *aside]
    rows, many = common_rows(many, target, needed, classes, protocol)
    truth, names = truth_of(rows.labels[target].values, target, task, classes)
    check_leak(rows.labels, aside, target, truth, names)
    task = task or ("number" if names is None else "label")
    _check_estimator(estimator, task)
    if protocol:
        _check_protocol(protocol, task, [groups, stratify, folds, repeats] != [None, None, 5, 1])
    splits = splits_of(rows, truth, names, groups, stratify, folds, repeats, seed, protocol)
    splits.thin(train_share, seed, rows.units, truth if names is not None else 0 * truth)
    check_folds(truth, names, splits)
    plan = Plan(task, names, positive_code(names, positive), estimator, protocol, seed)
    beside = _Aside.of(rows.labels, confounds, harmonise, preserve)
    if harmonise and groups == harmonise:
        splits.notes.append(f"ComBat has not seen the {harmonise} it tests: features left as are")
    if "participant" not in rows.labels.coords:
        splits.notes.append("no participant is named: every row is taken for one of its own")
    scores = [_probe_one(f, rows, truth, splits, plan, beside, permutations) for f in many]
    out = xr.concat(scores, "model", data_vars="minimal", coords="minimal", compat="override")
    return out.assign_attrs(
        target=target,
        task=task,
        n=len(truth),
        n_rows=rows.given,
        n_participants=len(np.unique(rows.units)),
        groups=groups or "participant",
        stratify=stratify or "",
        confounds=json.dumps(list(confounds)),
        harmonise=harmonise or "",
        preserve=json.dumps(list(preserve)),
        estimator=repr(estimator) if estimator is not None else plan.default_name,
        protocol=protocol or "",
        train_share=train_share,
        seed=seed,
        test_share=splits.test_share,
        mutual=splits.mutual,
        excluded=json.dumps(rows.excluded),
        notes=json.dumps(splits.notes),
        features=json.dumps({name_of(f): provenance_of(f) for f in many}),
        versions=json.dumps({"bhx": __version__, "scikit-learn": sklearn.__version__}),
    )


def provenance_of(features) -> dict:
    """What made these features, as scores keep it."""
    keep = ("model", "weights", "weights_sha256")
    keep += ("config", "scaling", "atlas", "versions", "source")
    return {k: str(features.attrs[k]) for k in keep if k in features.attrs}


def _check_options(single, whole, train_share, **lists):
    for option, found in lists.items():
        check_names(option, found)
    for option, found in single.items():
        if not isinstance(found, str) and (found is not None or option == "target"):
            fact = f"Expected {option} as the name of a coordinate, found {found!r}"
            raise InputError(fact, "Give one name")
    for option, found in whole.items():
        least = int(option in ("folds", "repeats"))
        if not isinstance(found, Integral) or found < least:
            fact = f"Expected {option} as a whole number of at least {least}, found {found!r}"
            raise InputError(fact, "Change it")
    if not isinstance(train_share, Real) or not 0 < train_share <= 1:
        fact = f"Expected train_share above 0 and at most 1, found {train_share!r}"
        raise InputError(fact, "Use 1")
    if len(lists["preserve"]) and not single["harmonise"]:
        fact = f"Expected harmonise beside preserve, found preserve={lists['preserve']!r} alone"
        raise InputError(fact, "It says what ComBat keeps: name harmonise, or leave it out")


def _check_protocol(protocol, task, more):
    """A protocol makes its own splits and is of one task; nothing given beside it is ignored."""
    check_choice("protocol", protocol, list(RESPLITS))
    if more:
        fact = f"Expected protocol '{protocol}' alone, found groups, stratify, folds or repeats too"
        raise InputError(fact, "It makes its own splits: leave them out, or the protocol")
    if protocol == "brainmarks" and task != "label":
        fact = f"Expected labels for protocol 'brainmarks', found task '{task}'"
        raise InputError(fact, "It knows neither numbers nor order: bin them and use task='label'")


def _check_estimator(estimator, task):
    """Refuse what is no estimator, or not one of this task."""
    if estimator is None:
        return
    if isinstance(estimator, type) or not hasattr(estimator, "get_params"):
        wanted, help = "an estimator of scikit-learn", "Give an instance, such as Ridge(1.0)"
    elif task == "number" and is_classifier(estimator):
        wanted, help = "a regressor for a number", "Take another, or task='label'"
    elif task != "number" and not hasattr(estimator, "predict_proba"):
        wanted, help = "a classifier with predict_proba", "Wrap it in CalibratedClassifierCV"
    else:
        return
    raise InputError(f"Expected {wanted}, found {estimator!r}", help)


# -- one model


@dataclass
class _Aside:
    """Columns that travel behind the features: what ComBat keeps, site, confounds."""

    columns: np.ndarray
    covariates: int = 0
    combat: bool = False
    confounds: int = 0

    @classmethod
    def of(cls, labels, confounds, harmonise, preserve):
        kept, regressed = encoded(labels, preserve), encoded(labels, confounds)
        columns = [regressed]
        if harmonise:
            site = np.unique(labels[harmonise].values, return_inverse=True)[1]
            columns = [kept, site[:, None], regressed]
        return cls(np.hstack(columns), kept.shape[1], bool(harmonise), regressed.shape[1])


@dataclass
class Plan:
    """What is fitted on prepared features, and how it decides."""

    task: str
    names: np.ndarray | None
    positive: int
    estimator: object
    protocol: str | None
    seed: int

    @property
    def default_name(self):
        kind = {"number": "ridge", "label": "logistic", "ordinal": "cumulative logistic"}[self.task]
        return f"{kind} regression, nested penalty"

    def model(self, width):
        """(estimator, whether its penalty is to be chosen)."""
        if width == 0:
            dummy = DummyRegressor() if self.task == "number" else DummyClassifier(strategy="prior")
            return dummy, False
        if self.estimator is not None:
            return clone(self.estimator), False
        if self.protocol == "brainmarks":
            scoring = {"scoring": "balanced_accuracy", "use_legacy_attributes": False}
            return LogisticRegressionCV(Cs=10, l1_ratios=(0,), max_iter=1000, **scoring), False
        kinds = {"number": Ridge, "label": LogisticRegression, "ordinal": OrdinalLogistic}
        return kinds[self.task](), True

    def measure(self, truth, output, decision, weights=None):
        if self.task == "number":
            return metrics.measure_numbers(truth, output[:, 0], weights)
        ordinal = self.task == "ordinal"
        return metrics.measure_labels(truth, output, decision, weights, self.positive, ordinal)


@dataclass
class _Fold:
    """Rows of one fold, their prepared features, and whose the training rows are; `inner` the
    same rows and features for choosing a penalty."""

    train: np.ndarray
    test: np.ndarray
    a: np.ndarray
    b: np.ndarray
    units: np.ndarray
    inner: list = field(default_factory=list)


def _probe_one(features, rows, truth, splits, plan, aside, permutations):
    x = features.features.sel(subject=rows.labels.subject.values).values.astype(float)
    if x.shape[1] and not (np.nanstd(x, 0) > 0).any():
        fact = f"Expected features that vary over subjects, found constants in {name_of(features)}"
        raise InputError(fact, "Were they pooled over subjects by mistake")
    keep = features.attrs.get("components")
    if features.attrs.get("estimator") == "MLP":
        plan = replace(plan, estimator=perceptron(plan.task, plan.seed))
        splits.notes.append(f"{name_of(features)}: {plan.estimator!r}")
    turn = plan.estimator is None or keep is not None
    steps = preparation(blocks_of(features), aside, turn, keep)
    folds = _prepared(np.hstack([x, aside.columns]), x.shape[1], truth, splits, steps, plan)
    folds = list(folds) if permutations else folds
    output, decision = _predict(folds, truth, splits, plan)
    out = tidy(name_of(features), rows, truth, splits, output, decision, plan)
    if permutations:
        null = _null(folds, rows, truth, splits, plan, permutations)
        out["null"] = (("model", "permutation"), null[None])
    return out


def preparation(blocks, aside=None, turn: bool = True, keep: int | None = None) -> Pipeline:
    """The steps between features and estimator, unfitted; none of them looks at the target.

    Parameters
    ----------
    blocks : (width, "" or "tangent") of each part of the features
    aside : the confounds behind the features, or None
    turn, keep : whether to end on the training rows' own axes (`Rotation`), and how many to keep
    """
    parts, start = [], 0
    for i, (width, kind) in enumerate(blocks):
        fill = SimpleImputer(keep_empty_features=True)
        part = make_pipeline(fill, Tangent()) if kind == "tangent" else fill
        parts.append((f"part{i}", part, slice(start, start + width)))
        start += width
    steps = [("fill", ColumnTransformer(parts, remainder="passthrough"))]
    if aside is not None and aside.combat:
        last = start + aside.covariates + 1
        combat = ("combat", ComBat(aside.covariates), slice(0, last))
        steps.append(("combat", ColumnTransformer([combat], remainder="passthrough")))
    if aside is not None and aside.confounds:
        steps.append(("confounds", ConfoundRegression(aside.confounds)))
    steps.append(("scale", StandardScaler()))
    if turn:
        steps.append(("turn", Rotation(tuple(width for width, _ in blocks), keep)))
    return Pipeline(steps)


def _prepared(x, width, truth, splits, steps, plan):
    """Each fold's features, prepared on its training rows; one fold at a time."""
    nested = plan.model(width)[1]

    def prepare(train, test):
        if width == 0:
            return x[train, :0], x[test, :0]
        fitted = clone(steps)
        return fitted.fit_transform(x[train]), fitted.transform(x[test])

    for i, (train, test) in enumerate(splits.train_test):
        inner = [(train, splits.hold[i])] if splits.hold else None
        inner = (inner or inner_splits(train, truth, splits.units, plan)) if nested else []
        inner = [(fit, hold, *prepare(fit, hold)) for fit, hold in inner]
        yield _Fold(train, test, *prepare(train, test), splits.units[train], inner)


def inner_splits(train, truth, units, plan, folds=3):
    """Folds of the training rows, held-out units never split; fewer where units are few."""
    y, units = truth[train], units[train]
    folds = min(folds, len(np.unique(units)))
    if folds < 2:  # one unit left to train on: rows are all there is to split
        units, folds = np.arange(len(y)), min(3, len(y))
    if folds < 2:
        return []
    alike = plan.names is not None and np.bincount(y).max() >= folds
    kind = StratifiedGroupKFold if alike else GroupKFold
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The least populated class")
        cuts = list(kind(folds, shuffle=True, random_state=plan.seed).split(y, y, units))
    if plan.names is not None:
        cuts = [(a, b) for a, b in cuts if len(np.unique(y[a])) == len(np.unique(y))]
    return [(train[a], train[b]) for a, b in cuts]


def _predict(folds, truth, splits, plan):
    """Outputs (fold, subject, class) and decisions (fold, subject); untested is NaN and -1."""
    width = 1 if plan.names is None else len(plan.names)
    output = np.full((len(splits.train_test), len(truth), width), np.nan)
    decision = np.full(output.shape[:2], -1)
    for i, fold in enumerate(folds):
        output[i, fold.test], decision[i, fold.test] = _fit_fold(fold, truth, plan)
    return output, decision


def _fit_fold(fold, truth, plan):
    """Choose the penalty on the inner folds, fit, predict."""
    model, nested = plan.model(fold.a.shape[1])
    inner = fold.inner
    if plan.names is not None:  # exchanged labels may be missing where the true ones are not
        inner = [part for part in inner if set(truth[part[0]]) == set(truth[fold.train])]
    if nested and inner:

        def loss(penalty):
            made = ((_fitted(model, penalty, a, truth[f]), b, truth[h]) for f, h, a, b in inner)
            return sum(_loss(*one, plan) for one in made)

        model = _fitted(model, min(PENALTIES, key=loss), fold.a, truth[fold.train])
    else:
        if isinstance(model, LogisticRegressionCV) and plan.estimator is None:
            model.set_params(cv=_resplit_people(fold.units, truth[fold.train], plan.seed))
        model = model.fit(fold.a, truth[fold.train])
    if plan.names is None:
        return np.reshape(model.predict(fold.b), (-1, 1)), -1
    output = _probabilities(model, fold.b, plan)
    if plan.protocol:
        return output, output.argmax(1)
    prior = np.bincount(truth[fold.train], minlength=len(plan.names)) / len(fold.train)
    return output, (output / prior.clip(1e-300)).argmax(1)  # Bayes' rule for balanced accuracy


def _resplit_people(units, truth, seed):
    """Brainmarks' five inner resplits, a quarter held out, of whole participants."""
    person = pd.factorize(units)[0]
    label = truth[np.unique(person, return_index=True)[1]]
    counts = np.unique(label, return_counts=True)[1]
    few = 4 * (len(counts) - 1)
    if counts.min() < 2 or len(label) <= few:
        fact = f"Expected at least 2 training participants of each label and {few + 1} in all, "
        fact += f"found {listed(counts)}"
        raise InputError(fact, "Protocol 'brainmarks' splits them again: add some")
    cuts = StratifiedShuffleSplit(5, test_size=0.25, random_state=seed).split(label, label)
    return [tuple(np.flatnonzero(np.isin(person, part)) for part in cut) for cut in cuts]


def _fitted(model, penalty, x, y):
    model = clone(model)
    if isinstance(model, Ridge):
        return model.set_params(alpha=penalty * len(x)).fit(x, y)
    if isinstance(model, LogisticRegression) and len(np.unique(y)) == 2:
        model.set_params(solver="newton-cholesky")
    return model.set_params(C=1 / (penalty * len(x)), max_iter=2000).fit(x, y)


def _loss(model, x, truth, plan):
    if plan.names is None:
        return ((model.predict(x) - truth) ** 2).sum()
    likelihood = _probabilities(model, x, plan)[np.arange(len(x)), truth]
    return -np.log(np.clip(likelihood, 1e-12, 1)).sum()


def _probabilities(model, x, plan):
    """Probabilities with a column for every class, also those absent from training."""
    out = np.zeros((len(x), len(plan.names)))
    out[:, model.classes_] = model.predict_proba(x)
    return out


def _null(folds, rows, truth, splits, plan, permutations):
    """The first metric's mean over folds, with labels exchanged within site.

    An exchange that leaves a training part without some label is drawn again: that of the truth
    has them all, too.
    """
    rng = np.random.default_rng(plan.seed)
    site = rows.labels["site"].values if "site" in rows.labels.coords else np.zeros(len(truth))
    out = []
    for drawn in range(1, 100 * permutations + 1):
        moved = truth[metrics.permuted_rows(rows.units, site, rng, rows.families)]
        if plan.names is None or all(len(set(moved[f.train])) == len(plan.names) for f in folds):
            output, decision = _predict(folds, moved, splits, plan)
            out.append(np.nanmean(_scores(moved, splits, output, decision, plan)[1][0]))
        if len(out) == permutations:
            if again := drawn - permutations:
                splits.notes.append(f"{again} exchanges without some label drawn again")
            return np.array(out)
    fact = f"Expected {permutations} exchanges with every label in each training part, found "
    raise InputError(fact + f"{len(out)} in {drawn}", "Leave a rare label out")


def _scores(truth, splits, output, decision, plan):
    """Names of the metrics, and (metric, fold)."""
    tested = [test for _, test in splits.train_test]
    found = [
        plan.measure(truth[t], o[t], d[t]) for t, o, d in zip(tested, output, decision, strict=True)
    ]
    return list(found[0]), np.array([[v[0] for v in one.values()] for one in found]).T


def tidy(name, rows, truth, splits, output, decision, plan):
    """Scores Dataset of one model from its outputs and decisions."""
    names, scores = _scores(truth, splits, output, decision, plan)
    known = np.isfinite(output).any((0, 2))
    mean = np.full(output.shape[1:], np.nan)
    mean[known] = np.nanmean(output[:, known], 0)
    if plan.names is None:
        prediction, classes = mean[:, 0], ["value"]
    else:
        most = metrics.majority(decision, len(plan.names))
        prediction, classes = plan.names[most], list(plan.names)
        prediction = np.where(known, prediction, "")
    out = xr.Dataset(
        {
            "score": (("model", "metric", "fold"), scores[None]),
            "prediction": (("model", "subject"), prediction[None]),
            "output": (("model", "fold", "subject", "class"), output[None]),
            "decision": (("model", "fold", "subject"), decision[None]),
            "truth": ("subject", truth if plan.names is None else plan.names[truth]),
        },
        {"model": [name], "metric": names, "fold": splits.names, "class": classes},
    ).assign_coords(subject_coords(rows.labels))
    if plan.names is not None:
        out.attrs["positive"] = str(plan.names[plan.positive])
    return out
