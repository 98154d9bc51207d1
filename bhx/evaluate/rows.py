"""Who enters a probe, with which truth, and who trains and who is tested.

Labels and splits only: nothing is fitted here, and of the features no more is looked at than
whether they are there and are numbers.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
import xarray as xr
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from sklearn.model_selection import GroupKFold, StratifiedGroupKFold

from bhx.errors import InputError, check_choice, listed
from bhx.evaluate.confounds import check_coords
from bhx.evaluate.features import name_of
from bhx.schema import check, is_missing, plain_labels, subject_coords

FEWEST = 5  # sites with fewer subjects are held out together
TASKS = ("number", "label", "ordinal")
RESPLITS = {"paper": 3, "brainmarks": 100}


# Who enters, with which truth ---------------------------------------------------------------


@dataclass
class Rows:
    """Who enters."""

    labels: xr.Dataset  # the coordinates of those who enter
    units: np.ndarray  # their participants
    excluded: dict  # reason -> ids
    families: np.ndarray | None = None  # who has none is a family of one
    given: int = 0  # rows before any was left out


def common_rows(many, target, names, classes, protocol=None):
    """The subjects who have every label and every feature, why the others do not enter, and the
    features, read once."""
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
    many = [_loaded(features) for features in many]
    for features in many:
        if features.sizes["feature"]:
            values = features.features.sel(subject=ids).values
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
    return Rows(labels, units.astype(str), excluded, families, given), many


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


def _loaded(features):
    """A Dataset with its features in memory: numbers, finite or NaN."""
    values, name = features.features.compute(), name_of(features)
    if values.dtype.kind not in "biuf":
        raise InputError(f"Expected numbers in {name}, found {values.dtype}", "Convert them")
    if np.isinf(values.values).any():
        fact = f"Expected finite numbers in {name}, or NaN, found infinite ones"
        raise InputError(fact, "Put NaN: those are filled with the training mean")
    return features.assign(features=values)


def _words(labels):
    """Labels as text, 1.0 as "1"."""
    plain = np.asarray(labels).tolist()
    return np.array([str(int(v) if isinstance(v, float) and v.is_integer() else v) for v in plain])


def truth_of(values, target, task, classes):
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


def check_leak(labels, aside, target, truth, names):
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
            fact = "Expected confounds, harmonise and preserve without the target, found "
            fact += f"'{name}', which tells '{target}' of everyone"
            raise InputError(fact, "What helps to prepare the features leaks into the test fold")


def positive_code(names, positive):
    """The code of the label that precision and recall are about: the last without a choice."""
    if names is None or positive is None:
        return -1 if names is None else len(names) - 1
    positive = _words([positive])[0]
    check_choice("positive", positive, list(names))
    return list(names).index(positive)


# Who trains and who is tested -------------------------------------------------------------------


@dataclass
class Splits:
    """Training and test rows of every fold."""

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


def splits_of(rows, truth, names, groups, stratify, folds, repeats, seed, protocol):
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
    splits = Splits([], [], units, notes)
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
    splits = Splits([], [], units, [], [] if protocol == "paper" else None)
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


def check_folds(truth, names, splits):
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
