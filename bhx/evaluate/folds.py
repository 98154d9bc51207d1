"""Who trains and who is tested: folds, resplits of a protocol, or a split that was made before.

Labels only; nothing is fitted here. What is never split (participants, families, whole sites) is
the `unit` of a row.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field

import numpy as np
import pandas as pd
import xarray as xr
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from sklearn.model_selection import GroupKFold, StratifiedGroupKFold

from bhx.errors import InputError, check_choice, listed
from bhx.evaluate.options import check_count, check_name

FEWEST = 5  # groups with fewer subjects are held out together
RESPLITS = {"paper": 3, "brainmarks": 100}  # protocol -> splits


@dataclass(frozen=True)
class Design:
    """How folds are asked for: options of `bhx.probe`, checked once."""

    groups: str | None = None
    stratify: str | None = None
    protocol: str | None = None
    split: xr.DataArray | None = None
    folds: int | None = None  # 5, or one a group
    repeats: int = 1
    seed: int = 0

    def __post_init__(self):
        check_name("groups", self.groups)
        check_name("stratify", self.stratify)
        if self.folds is not None:
            check_count("folds", self.folds, 1, 5)
        check_count("repeats", self.repeats, 1, 3)
        check_count("seed", self.seed, 0, 0)
        if self.protocol is not None:
            check_choice("protocol", self.protocol, list(RESPLITS))
        array = isinstance(self.split, xr.DataArray)
        dims = self.split.dims if array else type(self.split).__name__
        if self.split is not None and not (array and {*dims} == {"repeat", "subject"}):
            fact = f"Expected split as a DataArray (repeat, subject), found {dims}"
            raise InputError(fact, "Make it with bhx.split")
        made = [f"protocol '{self.protocol}'"] if self.protocol else []
        made += ["split"] if self.split is not None else []
        more = [self.groups, self.stratify, self.folds, self.repeats] != [None, None, None, 1]
        if len(made) + more > 1 and made:
            beside = "groups, stratify, folds or repeats" if more else made[1]
            fact = f"Expected {made[0]} alone, found {beside} too"
            raise InputError(fact, "It says who is tested: leave the others out, or it")

    def splits(self, rows, truth, names) -> Splits:
        """The parts of these rows in each fold."""
        if self.protocol == "brainmarks" and names is None:
            fact = "Expected labels for protocol 'brainmarks', found numbers"
            raise InputError(fact, "Bin the numbers, and give task='label'")
        if self.split is not None:
            splits = read_split(rows, self.split)
        elif self.protocol:
            splits = make_resplits(rows, truth, names, self.protocol, self.seed)
        else:
            splits = make_folds(rows, truth, names, self)
        check_folds(truth, names, splits)
        if "participant" not in rows.labels.coords:
            splits.notes.append("no participant is named: every row is taken for one of its own")
        return splits


@dataclass
class Splits:
    """Each row's part in each fold: "train", "test", "validation" (of a protocol or a split that
    holds some out to choose by), or "" for none."""

    units: np.ndarray  # (row,): rows of one unit share a part
    part: list = field(default_factory=list)  # of (row,) arrays of text, one a fold
    names: list = field(default_factory=list)  # of the folds
    notes: list = field(default_factory=list)  # what was taken for granted, for who reads scores

    def add(self, name, **rows) -> None:
        """A fold, by the rows of each part."""
        part = np.full(len(self.units), "", "<U10")
        for key, index in rows.items():
            part[index] = key
        self.names.append(str(name))
        self.part.append(part)

    def rows(self, part: str) -> list[np.ndarray]:
        """Indices of the rows of a part, one array a fold."""
        return [np.flatnonzero(fold == part) for fold in self.part]

    @property
    def test_share(self) -> float:
        """Test rows over training rows, as `metrics.corrected_t` wants it."""
        both = zip(self.rows("train"), self.rows("test"), strict=True)
        return float(np.mean([len(test) / len(train) for train, test in both]))

    @property
    def mutual(self) -> float:
        """How far subjects predict each other: 1 in folds, 0 in one split; for `interval`.

        Sum of n_ij n_ji over that of n_ij^2, n_ij the splits in which j trained what tested i.
        """
        tested, trained = (np.stack(self.part) == p for p in ("test", "train"))
        tested, trained = tested.astype(float), trained.astype(float)
        across = tested @ trained.T
        pairs = (tested @ tested.T) * (trained @ trained.T)
        return float((across * across.T).sum() / pairs.sum())


def make_folds(rows, truth, names, design: Design) -> Splits:
    """Participants and families never split, groups whole, strata balanced."""
    splits, groups, stratify = Splits(tied_units(rows)), design.groups, design.stratify
    folds, repeats = design.folds or 5, design.repeats
    if groups:
        values = rows.labels[groups].values.astype(str)
        splits.units, merged, each = _held_out_groups(values, splits.units, folds, groups)
        whole = len(np.unique(splits.units))
        folds = whole if each and design.folds is None else min(folds, whole)
        splits.notes += [*merged, f"{folds} folds that hold out whole values of {groups}"]
        if folds < 2:
            fact = f"Expected at least two values of '{groups}' to hold out, found "
            fact += "; ".join(merged) or f"'{values[0]}' only"
            raise InputError(fact, "Leave groups=None for folds over participants")
    units = splits.units
    n_units = len(np.unique(units))
    if not 2 <= folds <= n_units:
        fact = f"Expected from 2 to {n_units} folds (participants), found {folds}"
        raise InputError(fact, "Choose a number in that range")
    one = folds == n_units  # nothing to shuffle or to balance
    if one and (repeats > 1 or (groups and stratify)):
        splits.notes.append("held out one by one: the same in every repeat, balanced over nothing")
        repeats = 1
    strata = _strata(rows, truth, names, stratify, folds, splits.notes)
    balanced = not groups or (stratify is not None and not one)
    for repeat in range(repeats):
        for train, test in cut_units(units, strata, folds, design.seed + repeat, balanced):
            name = units[test][0] if groups and one else len(splits.names)
            splits.add(name, train=train, test=test)
    return splits


def make_resplits(rows, truth, names, protocol: str, seed: int) -> Splits:
    """One fifth tested, one fifth held for choosing; three seeds (paper) or a hundred."""
    splits = Splits(tied_units(rows))
    if (found := len(np.unique(splits.units))) < 5:
        fact = f"Expected 5 participants for '{protocol}', found {found}"
        raise InputError(fact, "Give more participants, or leave protocol out")
    paper = protocol == "paper"
    site = "site" if paper and "site" in rows.labels.coords else None
    strata = _strata(rows, truth, names, site, 5, splits.notes)
    for repeat in range(RESPLITS[protocol]):
        (train, test), (_, hold), *_ = cut_units(splits.units, strata, 5, seed + repeat)
        splits.add(repeat, train=train, **({"validation": hold} if paper else {}), test=test)
    return splits


def read_split(rows, split: xr.DataArray) -> Splits:
    """The parts of a DataArray of `bhx.split`, of the subjects that enter, one fold a repeat."""
    splits = Splits(tied_units(rows), notes=["folds are those of the split that was given"])
    parts = split.sel(subject=rows.labels.subject.values).transpose("repeat", "subject")
    for name, part in zip(parts.repeat.values, parts.values.astype(str), strict=True):
        both = pd.Series(part).groupby(splits.units).nunique()
        if (both > 1).any():
            fact = "Expected one part for all rows of a participant, or of a family, found several "
            fact += f"for {listed(both.index[both > 1])} in repeat {name}"
            raise InputError(fact, "Give them the same part, as bhx.split does for participants")
        splits.add(name, **{known: part == known for known in ("train", "validation", "test")})
        trained, tested = ((part == p).sum() for p in ("train", "test"))
        if not trained * tested:
            fact = f"Expected subjects to train on and to test in repeat {name}, found {trained} "
            raise InputError(f"{fact}and {tested}", "Call two of its parts 'train' and 'test'")
    return splits


def check_folds(truth, names, splits: Splits) -> None:
    """Refuse a training part without some label, and note a test part that tells too little."""
    parts = splits.rows("train"), splits.rows("test")
    for fold, train, test in zip(splits.names, *parts, strict=True):
        tested = np.unique(truth[test])
        if names is None:
            reason, at_least = f"{len(tested)} distinct: its r is no measure", 3
        else:
            reason, at_least = f"'{names[tested[0]]}' only: its AUROC is undefined", 2
            absent = names[np.setdiff1d(np.arange(len(names)), truth[train])]
            if len(absent):
                fact = f"Expected every label in the training part of fold {fold}, found no "
                help = "Take fewer folds, groups=None, or leave that label out"
                raise InputError(fact + f"'{listed(absent)}'", help)
        if len(tested) < at_least:
            splits.notes.append(f"fold {fold} tests {reason}")


def cut_units(units, strata, folds, seed, balanced=True) -> list:
    """(train, test) of whole units, balanced over strata where that leaves no test part empty."""
    cuts = []
    if balanced:
        splitter = StratifiedGroupKFold(folds, shuffle=True, random_state=seed)
        with warnings.catch_warnings(action="ignore", category=UserWarning):  # of rare labels
            cuts = list(splitter.split(units, strata, units))
    if not cuts or not all(len(test) for _, test in cuts):
        cuts = list(GroupKFold(folds, shuffle=True, random_state=seed).split(units, None, units))
    return cuts


# Units and strata ---


def tied_units(rows) -> np.ndarray:
    """What is never split, of each row: its participant, or all that share a family with it."""
    return rows.people if rows.families is None else _tied(rows.families, rows.people)


def _tied(values, units):
    """The value of each row, or "A+B" where units tie several together."""
    (_, value), (_, unit) = (np.unique(v, return_inverse=True) for v in (values, units))
    n = value.max() + unit.max() + 2
    edges = coo_array((np.ones(len(value)), (value, unit + value.max() + 1)), (n, n))
    component = connected_components(edges, directed=False)[1][value]
    join = pd.Series(values).groupby(component).transform(lambda v: "+".join(np.unique(v)))
    return join.values.astype(str)


def _held_out_groups(values, units, folds, groups):
    """One name a row for what is held out together, notes, and whether each can be a fold.

    Participants tie their sites together. Small groups are joined unless they are together more
    than a fold's share of the rows: then folds of several groups are what holds them out.
    """
    names, counts = np.unique(values, return_counts=True)
    small, notes = counts < FEWEST, []
    each = counts[small].sum() <= len(values) / min(folds, len(names))
    if each and small.any():
        few = names[small]
        notes.append(f"{groups} {listed(few, 20)}: fewer than {FEWEST} subjects, held out together")
        values = np.where(np.isin(values, few), "+".join(few), values)
    joined = _tied(values, units)
    if len(np.unique(joined)) < len(np.unique(values)):
        several = pd.Series(values).groupby(units).nunique()
        people = listed(several.index[several > 1])
        notes.append(f"values of {groups} that share participants held out together: {people}")
    return joined, notes, each


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
