"""Does it beat the connectome: probes fitted inside the fold, tidy scores, one table.

Nothing that is fitted here ever sees a test subject, and no step before the estimator sees the
target. Plain arithmetic on predictions lives in `metrics`, site and motion in `confounds`, plain
features in `controls`, figures and pages in `reporting`.
"""

from __future__ import annotations

import json
import warnings
from dataclasses import dataclass, field, replace
from numbers import Integral, Real
from pathlib import Path

import numpy as np
import pandas as pd
import sklearn
import xarray as xr
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from scipy.special import softmax
from sklearn.base import BaseEstimator, ClassifierMixin, TransformerMixin, clone, is_classifier
from sklearn.compose import ColumnTransformer
from sklearn.dummy import DummyClassifier, DummyRegressor
from sklearn.impute import SimpleImputer
from sklearn.linear_model import LogisticRegression, LogisticRegressionCV, Ridge
from sklearn.model_selection import GroupKFold, StratifiedGroupKFold, StratifiedShuffleSplit
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler

from . import __version__, metrics
from .confounds import ComBat, ConfoundRegression, check_coords, check_names, is_missing
from .controls import Tangent, blocks_of, connectome, encoded, name_of, subject_coords
from .errors import InputError, check_choice, listed
from .schema import check, plain_labels

PENALTIES = np.logspace(-5, 1, 7)  # a row, for rows of unit norm: fits any number of either
FEWEST = 5  # sites with fewer subjects are held out together
TASKS = ("number", "label", "ordinal")
RESPLITS = {"paper": 3, "brainmarks": 100}

__all__ = ["compare", "connectome", "probe"]

# What others report, in the units of `score` (assets/README.md says who measured it, and how)
REPORTED = Path(__file__).parent / "assets" / "reported.csv"

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
    rows = _common_rows(many, target, needed, classes, protocol)
    truth, names = _truth(rows.labels[target].values, target, task, classes)
    _check_leak(rows.labels, aside, target, truth, names)
    task = task or ("number" if names is None else "label")
    _check_estimator(estimator, task)
    if protocol:
        _check_protocol(protocol, task, [groups, stratify, folds, repeats] != [None, None, 5, 1])
    splits = _splits(rows, truth, names, groups, stratify, folds, repeats, seed, protocol)
    splits.thin(train_share, seed, rows.units, truth if names is not None else 0 * truth)
    _check_folds(truth, names, splits)
    plan = _Plan(task, names, _positive(names, positive), estimator, protocol, seed)
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


def _check_protocol(protocol, task, more):
    """A protocol makes its own splits and is of one task; nothing given beside it is ignored."""
    check_choice("protocol", protocol, list(RESPLITS))
    if more:
        fact = f"Expected protocol '{protocol}' alone, found groups, stratify, folds or repeats too"
        raise InputError(fact, "It makes its own splits: leave them out, or the protocol")
    if protocol == "brainmarks" and task != "label":
        fact = f"Expected labels for protocol 'brainmarks', found task '{task}'"
        raise InputError(fact, "It knows neither numbers nor order: bin them and use task='label'")


# -- who enters


@dataclass
class _Rows:
    labels: xr.Dataset  # the coordinates of those who enter
    units: np.ndarray  # their participants
    excluded: dict  # reason -> ids
    families: np.ndarray | None = None  # who has none is a family of one
    given: int = 0  # rows before any was left out


def _common_rows(many, target, names, classes, protocol=None):
    """The subjects who have every label and every feature, and why the others do not enter."""
    if not many:
        raise InputError("Expected features, found an empty list", "Give at least one Dataset")
    many = [plain_labels(check(features, "features")) for features in many]  # also of a bare store
    ids, excluded = np.concatenate([f.subject.values for f in many]), {}
    ids = ids[np.sort(np.unique(ids, return_index=True)[1])]
    given = len(ids)

    def leave_out(reason, out):
        nonlocal ids
        if out.any():
            excluded[reason] = [str(i) for i in ids[out]]
        ids = ids[~out]

    for features in many:
        leave_out(f"not in {name_of(features)}", ~np.isin(ids, features.subject.values))
    labels = _merged_labels(many, ids, (target, *names))
    if protocol == "paper" and "site" in labels.coords:
        names = [*names, "site"]
    for features in many:
        if features.sizes["feature"]:
            values = _checked_values(features).sel(subject=ids).values
            leave_out(f"no {name_of(features)}", np.isnan(values).all(1))
    for name in dict.fromkeys((target, *names)):
        leave_out(f"no {name}", is_missing(labels[name].sel(subject=ids).values))
    if classes is not None:
        known = np.isin(_words(labels[target].sel(subject=ids).values), _words(classes))
        leave_out(f"another {target}", ~known)
    if len(ids) == 0:
        out = "; ".join(f"{len(v)} {k}" for k, v in excluded.items())
        fact = f"Expected subjects with '{target}' and features, found none"
        raise InputError(fact, f"Left out: {out}")
    labels, families = labels.sel(subject=ids), None
    units = (labels.participant if "participant" in labels.coords else labels.subject).values
    if "family" in labels.coords:
        families = np.where(is_missing(labels.family.values), units, labels.family.values)
    return _Rows(labels, units.astype(str), excluded, families, given)


def _merged_labels(many, ids, names):
    """Every coordinate that some Dataset has of these subjects; those in use must agree."""
    labels, used = xr.Dataset(coords={"subject": ids}), {*names, "participant", "family", "site"}
    for features in many:
        found = subject_coords(features.coords.to_dataset().sel(subject=ids))
        for name in used & set(found) & set(labels.coords):
            a, b = labels[name].values, found[name].values
            numbers = a.dtype.kind in "iuf" and b.dtype.kind in "iuf"
            same = np.isclose(a, b, equal_nan=True) if numbers else a.astype(str) == b.astype(str)
            if not same.all():
                at = f"{name_of(features)} for {listed(ids[~same])}"
                fact = f"Expected one '{name}' of each subject, found another in {at}"
                raise InputError(fact, "Make the labels alike: features.assign_coords(...)")
        labels = labels.assign_coords(
            {n: found[n].variable for n in found if n not in labels.coords}
        )
    check_coords(labels, names)
    return labels


def _checked_values(features):
    """The features of a Dataset that are numbers, finite or NaN."""
    values, name = features.features.compute(), name_of(features)
    if values.dtype.kind not in "biuf":
        raise InputError(f"Expected numbers in {name}, found {values.dtype}", "Convert them")
    if np.isinf(values.values).any():
        fact = f"Expected finite numbers in {name}, or NaN, found infinite ones"
        raise InputError(fact, "Put NaN: those are filled with the training mean")
    return values


def _words(labels):
    """Labels as text, 1.0 as "1"."""
    plain = np.asarray(labels).tolist()
    return np.array([str(int(v) if isinstance(v, float) and v.is_integer() else v) for v in plain])


def _truth(values, target, task, classes):
    """The target as floats (names None), or as codes of sorted names."""
    numeric, asked = values.dtype.kind in "iuf", task
    if task is None:
        few = np.issubdtype(values.dtype, np.integer) and len(np.unique(values)) <= 10
        task = "number" if numeric and not few and classes is None else "label"
    check_choice("task", task, TASKS)
    if task == "number":
        _check_numbers(values, target, numeric)
        return values.astype(float), None
    if asked is None and classes is None and not numeric:
        _check_words(values, target)
    found, codes = np.unique(values if numeric else values.astype(str), return_inverse=True)
    found = _words(found)
    _check_names(found, target, task, numeric, classes)
    if classes is None:
        return codes, found
    names = _words(classes)
    return np.array([list(names).index(n) for n in found])[codes], names


def _check_words(values, target):
    """Refuse numbers and dates that are stored as words: each would be a label."""
    words = np.unique(values.astype(str))
    numbers = pd.to_numeric(words, errors="coerce")
    dates = pd.to_datetime(words, errors="coerce", format="ISO8601")
    dates = words if values.dtype.kind in "mM" else dates
    for kind, read in (("numbers", numbers), ("dates", dates)):
        if len(words) > 10 and pd.notna(read).all():
            fact = f"Expected numbers or labels in '{target}', found {kind} as words: {words[0]}..."
            raise InputError(fact, "Convert them with assign_coords, or pass task='label'")


def _check_numbers(values, target, numeric):
    found = np.unique(values.astype(values.dtype if numeric else str))
    if not numeric:
        fact = f"Expected numbers in '{target}', found {listed(found)}"
        raise InputError(fact, "Convert them, or pass task='label'")
    if len(found) < 2:
        fact = f"Expected '{target}' to vary, found {found[0]} only"
        raise InputError(fact, "Choose another target")


def _check_names(found, target, task, numeric, classes):
    folded = pd.Series(found).str.strip().str.casefold()
    if folded.duplicated().any():
        alike = listed([repr(str(a)) for a in found[folded.duplicated(keep=False)]])
        fact = f"Expected distinct labels in '{target}', found {alike} that differ only by case or "
        raise InputError(fact + "spaces", "Spell them alike first")
    if classes is not None and len(found) < len(classes):
        fact = f"Expected subjects of every class {listed(classes)}, found {listed(found)}"
        raise InputError(fact, f"Compare with the values of '{target}'")
    if len(found) < 2:
        fact = f"Expected at least two labels in '{target}', found '{found[0]}' only"
        raise InputError(fact, "Choose another target or other subjects")
    if task == "ordinal" and classes is None and not numeric:
        fact = f"Expected an order for the words of '{target}', found none"
        raise InputError(fact, f"Give it from low to high: classes={tuple(map(str, found))}")


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


def _check_leak(labels, aside, target, truth, names):
    """Refuse to prepare features by the target under another name, test subjects' too."""
    for name in aside:
        values = pd.Series(labels[name].values)
        number = values.dtype.kind in "iuf"
        if number and names is None:
            pair = pd.DataFrame({"a": values, "b": truth})
            tells = any(abs(found.a.corr(found.b)) > 0.9999 for found in (pair, pair.rank()))
        else:
            pairs = len(set(zip(values, truth, strict=True)))
            tells = pairs == values.nunique() < len(values) and (
                not number or pairs == len(set(truth))
            )
        if tells:
            fact = (
                f"Expected confounds, harmonise and preserve without the target, found '{name}', "
            )
            fact += f"which tells '{target}' of everyone"
            raise InputError(fact, "What helps to prepare the features leaks into the test fold")


def _positive(names, positive):
    if names is None or positive is None:
        return -1 if names is None else len(names) - 1
    positive = _words([positive])[0]
    check_choice("positive", positive, list(names))
    return list(names).index(positive)


# -- who trains and who is tested


@dataclass
class _Splits:
    train_test: list  # (train, test) row indices, one a fold
    names: list
    units: np.ndarray  # what is never split, a row
    notes: list
    hold: list | None = None  # the paper's validation rows of each fold, beside train and test

    @property
    def test_share(self):
        """Test rows over training rows, as `metrics.corrected_t` wants it."""
        return float(np.mean([len(b) / len(a) for a, b in self.train_test]))

    @property
    def mutual(self):
        """How far subjects predict each other: 1 in folds, 0 in one split; for `interval`.

        Sum of n_ij n_ji over that of n_ij^2, n_ij the splits in which j trained what tested i.
        """
        tested, trained = (np.zeros((len(self.train_test), len(self.units))) for _ in range(2))
        for i, (train, test) in enumerate(self.train_test):
            tested[i, test] = trained[i, train] = 1
        across = tested @ trained.T
        pairs = (tested @ tested.T) * (trained @ trained.T)
        return float((across * across.T).sum() / pairs.sum())

    def thin(self, share, seed, people, labels):
        """Keep a share of each fold's training participants, of every label alike."""
        rng = np.random.default_rng(seed)

        def fewer(rows):
            names, first = np.unique(people[rows], return_index=True)
            alike = [names[labels[rows[first]] == k] for k in np.unique(labels[rows])]
            kept = [rng.permutation(a)[: max(2, round(share * len(a)))] for a in alike]
            return rows[np.isin(people[rows], np.concatenate(kept))]

        if share < 1:
            self.train_test = [(fewer(train), test) for train, test in self.train_test]
            self.hold = self.hold and [fewer(hold) for hold in self.hold]


def _splits(rows, truth, names, groups, stratify, folds, repeats, seed, protocol):
    """Outer folds: participants and families never split, groups whole, strata balanced."""
    notes, units = [], rows.units
    if rows.families is not None:
        units = _tied(rows.families, units)
    if protocol:
        return _resplits(rows, truth, names, units, seed, protocol)
    if groups:
        values = rows.labels[groups].values.astype(str)
        units, merged = _held_out_groups(values, units, folds, groups)
        folds = min(folds, len(np.unique(units)))
        notes += [*merged, f"{folds} folds that hold out whole values of {groups}"]
        if folds < 2:
            fact = f"Expected at least two values of '{groups}' to hold out, found "
            fact += "; ".join(merged) or f"'{values[0]}' only"
            raise InputError(fact, "Leave groups=None for folds over participants")
    n_units = len(np.unique(units))
    if not 2 <= folds <= n_units:
        fact = f"Expected from 2 to {n_units} folds (participants), found {folds}"
        raise InputError(fact, "Choose a number in that range")
    one = folds == n_units  # nothing to shuffle or to balance
    if one and (repeats > 1 or (groups and stratify)):
        notes.append("held out one by one: the same in every repeat, balanced over nothing")
        repeats = 1
    strata = _strata(rows, truth, names, stratify, folds, notes)
    splits = _Splits([], [], units, notes)
    for repeat in range(repeats):
        kind = GroupKFold if groups and (one or not stratify) else StratifiedGroupKFold
        splitter = kind(folds, shuffle=True, random_state=seed + repeat)
        for train, test in splitter.split(units, strata, units):
            splits.names.append(str(units[test][0] if groups and one else len(splits.names)))
            splits.train_test.append((train, test))
    return splits


def _resplits(rows, truth, names, units, seed, protocol):
    """One fifth tested, one fifth held for choosing; three seeds (paper) or a hundred."""
    if (found := len(np.unique(units))) < 5:
        raise InputError(f"Expected 5 participants for '{protocol}', found {found}", "Add some")
    site = "site" if protocol == "paper" and "site" in rows.labels.coords else None
    splits = _Splits([], [], units, [], [] if protocol == "paper" else None)
    strata = _strata(rows, truth, names, site, 5, splits.notes)
    for repeat in range(RESPLITS[protocol]):
        splitter = StratifiedGroupKFold(5, shuffle=True, random_state=seed + repeat)
        (train, test), (_, hold), *_ = splitter.split(units, strata, units)
        if splits.hold is not None:
            splits.hold.append(hold)
            train = np.setdiff1d(train, hold)
        splits.train_test.append((train, test))
        splits.names.append(str(repeat))
    return splits


def _held_out_groups(values, units, folds, groups):
    """One name a row for what is held out together; participants tie their sites together.

    Small groups are joined unless they are together more than a fold's share of the rows: then
    folds of several groups are what holds them out.
    """
    names, counts = np.unique(values, return_counts=True)
    small, notes = counts < FEWEST, []
    if 0 < counts[small].sum() <= len(values) / min(folds, len(names)):
        few = names[small]
        notes.append(f"{groups} {listed(few, 20)}: fewer than {FEWEST} subjects, held out together")
        values = np.where(np.isin(values, few), "+".join(few), values)
    joined = _tied(values, units)
    if len(np.unique(joined)) < len(np.unique(values)):
        notes.append(f"values of {groups} that share participants held out together")
    return joined, notes


def _tied(values, units):
    """The value of each row, or "A+B" where units tie several together."""
    (_, value), (_, unit) = (np.unique(v, return_inverse=True) for v in (values, units))
    n = value.max() + unit.max() + 2
    edges = coo_array((np.ones(len(value)), (value, unit + value.max() + 1)), (n, n))
    component = connected_components(edges, directed=False)[1][value]
    join = pd.Series(values).groupby(component).transform(lambda v: "+".join(np.unique(v)))
    return join.values.astype(str)


def _strata(rows, truth, names, stratify, folds, notes):
    """Codes to balance over the folds: label or fifth of the target, times `stratify`.

    Numbers of which too few are alike are balanced by fifths, words of that kind not at all.
    """

    def fifths(numbers):
        return pd.Series(pd.qcut(numbers, 5, labels=False, duplicates="drop")).astype(str)

    def rare(cells):
        return cells.map(cells.value_counts()) < folds

    cells = target = fifths(truth) if names is None else pd.Series(names[truth])
    if stratify:
        values = rows.labels[stratify].values
        cells = target + "|" + pd.Series(values).astype(str)
        if rare(cells).all() and values.dtype.kind in "iuf":
            cells = target + "|" + fifths(values)
        if rare(cells).all():
            notes.append(f"too few subjects are alike in {stratify}: not balanced over it")
            cells = target.copy()
    small = rare(cells)
    if small.any() and not small.all():
        notes.append(f"{cells[small].nunique()} strata of fewer than {folds} subjects joined")
    common = cells.mode()[0]
    cells[small] = "few" if small.sum() >= folds else common
    return cells.values


def _check_folds(truth, names, splits):
    """Refuse a training part without some label, and note a test part that tells too little."""
    for fold, (train, test) in zip(splits.names, splits.train_test, strict=True):
        tested = np.unique(truth[test])
        if names is None:
            told, at_least = f"{len(tested)} distinct: its r is no measure", 3
        else:
            told, at_least = f"'{names[tested[0]]}' only: its AUROC is undefined", 2
            absent = names[np.setdiff1d(np.arange(len(names)), truth[train])]
            if len(absent):
                fact = f"Expected every label in the training part of fold {fold}, found no "
                help = "Take fewer folds, groups=None, train_share=1, or leave that label out"
                raise InputError(fact + f"'{listed(absent)}'", help)
        if len(tested) < at_least:
            splits.notes.append(f"fold {fold} tests {told}")


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
class _Plan:
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
    out = _tidy(name_of(features), rows, truth, splits, output, decision, plan)
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
        fact = (
            f"Expected at least 2 training participants of each label and {few + 1} in all, found "
        )
        raise InputError(fact + listed(counts), "Protocol 'brainmarks' splits them again: add some")
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


def _tidy(name, rows, truth, splits, output, decision, plan):
    names, scores = _scores(truth, splits, output, decision, plan)
    known = np.isfinite(output).any((0, 2))
    mean = np.full(output.shape[1:], np.nan)
    mean[known] = np.nanmean(output[:, known], 0)
    if plan.names is None:
        prediction, classes = mean[:, 0], ["value"]
    else:
        votes = np.stack([(decision == k).sum(0) for k in range(len(plan.names))], 1)
        prediction, classes = plan.names[votes.argmax(1)], list(plan.names)
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


def rescored(scores, name: str, output, decision) -> xr.Dataset:
    """Scores of another predictor on the same subjects and folds.

    `output` (fold, subject, class) and `decision` (fold, subject) are those of `probe`, NaN and -1
    where a fold did not test a subject.
    """
    tested = np.isfinite(scores.output.values[0, :, :, 0])
    cuts = [(np.flatnonzero(~t), np.flatnonzero(t)) for t in tested]
    splits = _Splits(cuts, list(scores.fold.values), participants_of(scores), [])
    rows = _Rows(scores, splits.units, {})
    out = _tidy(name, rows, codes_of(scores), splits, output, decision, plan_of(scores))
    return out.assign_attrs({**scores.attrs, **out.attrs})


# -- fitted parts


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


# ---------------------------------------------------------------- reading scores


def compare(
    *scores: xr.Dataset,
    control: str | None = None,
    reference: str | None = None,
    adjust: str = "holm",
    level: float = 0.95,
    draws: int = 1000,
    seed: int = 0,
) -> pd.DataFrame:
    """One readable table of every model, with intervals and the difference to a control.

    Parameters
    ----------
    scores : what `probe` returned, one or several, of one target or several
    control : the model the others are tested against; by default the last of each target
    reference : name of a cohort in `REPORTED`; adds what others report for it
    adjust : "holm" or "fdr", over all models and targets of the table, metric by metric
    level, draws, seed : of the bootstrap

    Returns
    -------
    pandas DataFrame, a row a (target,) model and metric: `score` (mean over folds), `low` and
    `high` (its interval under a bootstrap of participants, see `metrics.interval`; NaN for metrics
    of decisions under protocol "paper"), `n` subjects that entered, `diff` to the control and `p`
    (corrected resampled t-test over shared folds, adjusted; NaN where the folds are not the same),
    `p_null` where `probe` was given permutations. attrs["chance"]: metric -> what guessing scores
    (balanced accuracy only where all have as many classes).
    """
    if not scores:
        raise InputError("Expected scores to compare, found none", "Call bhx.probe first")
    for s in scores:
        if not isinstance(s, xr.Dataset) or "target" not in s.attrs:
            fact = f"Expected scores as probe returns them, found {type(s).__name__}"
            raise InputError(fact, "Give them one by one: compare(*scores)")
    if not (0 < level < 1 and draws > 1):
        fact = f"Expected level in (0, 1) and two draws or more, found {level} and {draws}"
        raise InputError(fact, "Take 0.95 and 1000")
    targets = list(dict.fromkeys(s.attrs["target"] for s in scores))
    parts = [[s for s in scores if s.attrs["target"] == target] for target in targets]
    tables = [_table(part, control, level, draws, seed) for part in parts]
    table = pd.concat(tables, ignore_index=True)
    for metric in table.metric.unique():
        at = table.metric == metric
        table.loc[at, "p"] = metrics.adjust_p(table.loc[at, "p"].values, adjust)
    if reference is not None:
        table = _with_reference(table, reference)
    index = ["target", "model", "metric"] if len(targets) > 1 else ["model", "metric"]
    table = table.set_index(index).drop(columns="target", errors="ignore")
    share = {1 / s.sizes["class"] for s in scores if s.attrs["task"] != "number"}
    shared = {"balanced_accuracy": share.pop()} if len(share) == 1 else {}
    table.attrs["chance"] = {**shared, **metrics.CHANCE}
    table.columns.name = targets[0] if len(targets) == 1 else None
    return table.round(3)


def _table(scores, control, level, draws, seed):
    """Rows of one target."""
    found = [(s, i) for s in scores for i in range(s.sizes["model"])]
    against = found[-1]
    if control is not None:
        named = [str(s.model.values[i]) for s, i in found]
        check_choice("control", control, named)
        against = found[named.index(control)]
    rows = []
    for s in scores:
        low, high = _interval(s, level, draws, seed)
        for i, model in enumerate(s.model.values.astype(str)):
            for j, metric in enumerate(s.metric.values.astype(str)):
                row = {"target": s.attrs["target"], "model": model, "metric": metric}
                row |= {"score": float(s.score[i, j].mean()), "low": low[i, j], "high": high[i, j]}
                row |= {"n": s.attrs["n"], **_against(s, i, *against, metric)}
                if "null" in s and j == 0:
                    row["p_null"] = metrics.permutation_p(row["score"], s.null[i])
                rows.append(row)
    return pd.DataFrame(rows)


def _interval(scores, level, draws, seed):
    """(low, high), each (model, metric); none for decisions in the paper's three splits."""
    estimate, drawn = scores.score.mean("fold").values, resample(scores, draws, seed).values
    ends = metrics.interval(estimate, drawn, level, scores.attrs.get("mutual", 1.0))
    names = scores.metric.values
    ends = np.clip(ends, *np.transpose([metrics.RANGE[name] for name in names]))
    if scores.attrs["protocol"] == "paper":
        ends[..., np.isin(names, metrics.DECIDED)] = np.nan
    return ends


def _against(scores, i, other, control, metric):
    """Difference to the control in this metric and its p, where both saw the same folds."""
    if (scores is other and i == control) or metric not in other.metric.values:
        return {"diff": np.nan, "p": np.nan}
    one = scores.score[i].sel(metric=metric)
    base = other.score[control].sel(metric=metric)
    out = {"diff": float(one.mean() - base.mean()), "p": np.nan}
    if _same_folds(scores, other):
        difference = one.values - base.values
        out["p"] = metrics.corrected_t(difference, scores.attrs["test_share"])[1]
    return out


def _same_folds(a, b):
    tested = [np.isfinite(s.output.values[0, :, :, 0]) for s in (a, b)]
    return np.array_equal(a.subject.values, b.subject.values) and np.array_equal(*tested)


def _with_reference(table, cohort):
    """What others report of this cohort, a column each."""
    reported = pd.read_csv(REPORTED)
    check_choice("reference", cohort, sorted(set(reported.cohort)))
    reported = reported[reported.cohort == cohort]
    for (protocol, model), found in reported.groupby(["protocol", "model"], sort=False):
        table[f"{protocol}: {model}"] = table.metric.map(found.set_index("metric").value)
    return table


def resample(scores: xr.Dataset, draws: int = 1000, seed: int = 0) -> xr.DataArray:
    """The mean over folds of each score in `draws` bootstraps of participants.

    A participant drawn twice counts twice in every fold that tested them; predictions are kept,
    models are not fitted again.
    """
    weights = metrics.bootstrap_weights(participants_of(scores), draws, seed)
    plan, truth = plan_of(scores), codes_of(scores)
    out = np.empty((scores.sizes["model"], scores.sizes["metric"], draws))
    for i in range(scores.sizes["model"]):
        output, decision = scores.output.values[i], scores.decision.values[i]
        folds = []
        for f in range(len(output)):
            t = np.flatnonzero(np.isfinite(output[f, :, 0]))
            measured = plan.measure(truth[t], output[f, t], decision[f, t], weights[:, t])
            folds.append([measured[m] for m in scores.metric.values])
        out[i] = metrics.known_mean(np.array(folds))
    dims = ("model", "metric", "draw")
    return xr.DataArray(out, {"model": scores.model, "metric": scores.metric}, dims)


def participants_of(scores):
    """Whose row each subject is."""
    units = scores.participant if "participant" in scores.coords else scores.subject
    return units.values.astype(str)


def plan_of(scores):
    """The plan that made these scores, read from them."""
    if scores.attrs["task"] == "number":
        return _Plan("number", None, -1, None, None, 0)
    names = scores["class"].values.astype(str)
    return _Plan(
        scores.attrs["task"], names, _positive(names, scores.attrs["positive"]), None, None, 0
    )


def codes_of(scores):
    """The truth as numbers: itself, or the place of each label among the classes."""
    if scores.attrs["task"] == "number":
        return scores.truth.values
    names = list(scores["class"].values.astype(str))
    return np.array([names.index(str(t)) for t in scores.truth.values])
