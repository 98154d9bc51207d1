"""What is to be predicted, of whom, in which folds: the door of `probe` and `fine_tune`.

A `Task` knows who enters, with which truth, who trains and who is tested, how predictions are
measured and how they become a Scores Dataset. No model is fitted here.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from numbers import Real

import numpy as np
import xarray as xr

from bhx.errors import InputError, check_choice
from bhx.evaluate import metrics
from bhx.evaluate.folds import (
    RESPLITS,
    Splits,
    check_folds,
    inner_splits,
    make_folds,
    make_resplits,
    read_split,
    tied_units,
)
from bhx.evaluate.options import check_count, check_name
from bhx.evaluate.rows import Rows, common_rows, positive_code, truth_of
from bhx.schema import subject_coords


@dataclass
class Outcome:
    """What a prediction is about: a number, a label, or a label in an order ("ordinal")."""

    kind: str
    names: np.ndarray | None = None  # of the labels; None for numbers
    positive: int = -1  # code of the label that precision and recall are about

    @property
    def classes(self) -> list[str]:
        """Columns of an output: labels, or "value"."""
        return ["value"] if self.names is None else [str(name) for name in self.names]

    def measure(self, truth, output, decision, weights=None) -> dict[str, np.ndarray]:
        """Metric -> values (B,) of outputs (n, class) and decisions (n,) under weights (B, n)."""
        if self.names is None:
            return metrics.measure_numbers(truth, output[:, 0], weights)
        ordinal = self.kind == "ordinal"
        return metrics.measure_labels(truth, output, decision, weights, self.positive, ordinal)


@dataclass(kw_only=True)
class Task(Outcome):
    """An outcome with its rows, their truth and their folds."""

    target: str
    rows: Rows
    truth: np.ndarray  # (row,): numbers, or codes of the labels
    splits: Splits
    protocol: str | None
    seed: int
    options: dict  # what else its scores keep as attributes

    @property
    def subject(self) -> np.ndarray:
        """Ids of the rows."""
        return self.rows.labels.subject.values

    @property
    def notes(self) -> list[str]:
        """What was taken for granted, for the reader of the scores."""
        return self.splits.notes

    def folds(self):
        """(train, test, validation) row indices of each fold; the last is mostly empty."""
        parts = (self.splits.rows(part) for part in ("train", "test", "validation"))
        return zip(*parts, strict=True)

    def inner_splits(self, train, folds: int = 3, units=None) -> list:
        """(fit, hold) row indices inside a training part; never splits what the folds keep whole.

        `units` (row,) keeps others whole instead. Empty where no cut has every label to fit.
        """
        units = self.splits.units if units is None else units
        return inner_splits(train, self.truth, units, self.names, self.seed, folds)

    def stopping_split(self, train, validation):
        """(fit, stop) row indices: who is learnt from, and who only says when to stop.

        The validation rows of the split, or else a fifth of the training participants; nobody stops
        where labels are too few for that.
        """
        if len(validation):
            return train, validation
        cuts = self.inner_splits(train, 5, tied_units(self.rows))
        return cuts[0] if cuts else (train, train[:0])

    def decide(self, output, learnt) -> np.ndarray:
        """Codes (n,) of probabilities (n, class), -1 for numbers.

        Bayes' rule for balanced accuracy: the largest probability over the label's frequency among
        the truths `learnt` from. Protocols take the largest probability, as their authors do.
        """
        if self.names is None:
            return np.full(len(output), -1)
        if self.protocol:
            return output.argmax(1)
        frequency = np.bincount(learnt, minlength=len(self.names)) / len(learnt)
        return (output / frequency.clip(1e-300)).argmax(1)

    def empty(self):
        """Arrays to fill: output (fold, row, class) of NaN and decision (fold, row) of -1."""
        shape = (len(self.splits.part), len(self.truth))
        return np.full((*shape, len(self.classes)), np.nan), np.full(shape, -1)

    def score(self, output, decision, truth=None) -> dict[str, np.ndarray]:
        """Metric -> values (fold,) on the test rows of each fold."""
        truth = self.truth if truth is None else truth
        found = [
            self.measure(truth[t], o[t], d[t])
            for t, o, d in zip(self.splits.rows("test"), output, decision, strict=True)
        ]
        return {name: np.array([one[name][0] for one in found]) for name in found[0]}

    def scores(self, name: str, output, decision, **attrs) -> xr.Dataset:
        """Scores Dataset of one model.

        Parameters
        ----------
        name : of the model
        output, decision : (fold, row, class) and (fold, row), as `empty` made and a model filled
        attrs : more attributes, such as estimator=
        """
        known = np.isfinite(output).any((0, 2))
        mean = np.full(output.shape[1:], np.nan)
        mean[known] = np.nanmean(output[:, known], 0)
        prediction, truth = mean[:, 0], self.truth
        if self.names is not None:
            most = metrics.majority(decision, len(self.names))
            prediction = np.where(known, self.names[most], "")
            truth = self.names[truth]
            attrs["positive"] = str(self.names[self.positive])
        found = self.score(output, decision)
        out = xr.Dataset(
            {
                "score": (("model", "metric", "fold"), np.array(list(found.values()))[None]),
                "prediction": (("model", "subject"), prediction[None]),
                "output": (("model", "fold", "subject", "class"), output[None]),
                "decision": (("model", "fold", "subject"), decision[None]),
                "truth": ("subject", truth),
            },
            {
                "model": [name],
                "metric": list(found),
                "fold": self.splits.names,
                "class": self.classes,
            },
        )
        return out.assign_coords(subject_coords(self.rows.labels)).assign_attrs(
            target=self.target,
            task=self.kind,
            n=len(self.truth),
            n_rows=self.rows.given,
            n_participants=len(np.unique(self.rows.people)),
            protocol=self.protocol or "",
            seed=self.seed,
            test_share=self.splits.test_share,
            mutual=self.splits.mutual,
            excluded=json.dumps(self.rows.excluded),
            notes=json.dumps(self.notes),
            **{**self.options, **attrs},
        )


def make_task(
    data,
    target: str,
    *,
    groups: str | None = None,
    stratify: str | None = None,
    task: str | None = None,
    classes=None,
    positive=None,
    protocol: str | None = None,
    split: xr.DataArray | None = None,
    folds: int = 5,
    repeats: int = 1,
    train_share: float = 1.0,
    seed: int = 0,
    needed=(),
) -> Task:
    """Who enters, with which truth and in which folds.

    Parameters
    ----------
    data : Dataset with labels on subject (a cohort, latents, features), or a list of them: who
        enters is in all, and has some of the features of each that has features
    needed : further coordinates without which nobody enters
    target, groups, stratify, task, classes, positive, protocol, split, folds, repeats, \
train_share, seed : as in `bhx.probe`
    """
    data = list(data) if isinstance(data, (list, tuple)) else [data]
    alone = [groups, stratify, folds, repeats] == [None, None, 5, 1]
    _check_options(target, groups, stratify, folds, repeats, train_share, seed)
    needed = [*filter(None, (groups, stratify)), *needed]
    if protocol is not None:
        check_choice("protocol", protocol, list(RESPLITS))
        if protocol == "paper" and any("site" in one.coords for one in data):
            needed.append("site")
    if split is not None:
        _check_split(split)
    rows = common_rows(data, target, needed, classes, split)
    truth, names = truth_of(rows.labels[target].values, target, task, classes)
    task = task or ("number" if names is None else "label")
    if protocol or split is not None:
        _check_alone(protocol, split, task, alone)
    if split is not None:
        splits = read_split(rows, split)
    elif protocol:
        splits = make_resplits(rows, truth, names, protocol=protocol, seed=seed)
    else:
        options = {"groups": groups, "stratify": stratify, "folds": folds, "repeats": repeats}
        splits = make_folds(rows, truth, names, **options, seed=seed)
    splits.thin(train_share, seed, rows.people, truth if names is not None else 0 * truth)
    check_folds(truth, names, splits)
    if "participant" not in rows.labels.coords:
        splits.notes.append("no participant is named: every row is taken for one of its own")
    options = {
        "groups": groups or "participant",
        "stratify": stratify or "",
        "train_share": train_share,
        "split": "" if split is None else json.dumps(split.attrs, default=str),
        "confounds": "[]",
        "harmonize": "",
        "preserve": "[]",
    }
    return Task(
        kind=task,
        names=names,
        positive=positive_code(names, positive),
        target=target,
        rows=rows,
        truth=truth,
        splits=splits,
        protocol=protocol,
        seed=seed,
        options=options,
    )


def _check_options(target, groups, stratify, folds, repeats, train_share, seed):
    check_name("target", target, optional=False)
    check_name("groups", groups)
    check_name("stratify", stratify)
    check_count("folds", folds, 1, 5)
    check_count("repeats", repeats, 1, 3)
    check_count("seed", seed, 0, 0)
    if not isinstance(train_share, Real) or not 0 < train_share <= 1:
        fact = f"Expected train_share above 0 and at most 1, found {train_share!r}"
        raise InputError(fact, "Give a share such as 0.5, or leave it out to train on everyone")


def _check_split(split):
    if not isinstance(split, xr.DataArray) or {*split.dims} != {"repeat", "subject"}:
        found = split.dims if isinstance(split, xr.DataArray) else type(split).__name__
        fact = f"Expected split as a DataArray (repeat, subject), found {found}"
        raise InputError(fact, "Make it with bhx.split")


def _check_alone(protocol, split, task, alone):
    """What makes its own splits is given alone, so that nothing beside it is ignored."""
    what = f"protocol '{protocol}'" if protocol else "split"
    if not alone or (protocol and split is not None):
        fact = f"Expected {what} alone, found groups, stratify, folds or repeats too"
        fact = f"Expected {what} alone, found a split too" if alone else fact
        raise InputError(fact, "It says who is tested: leave the others out, or it")
    if protocol == "brainmarks" and task != "label":
        fact = f"Expected labels for protocol 'brainmarks', found task '{task}'"
        raise InputError(fact, "It knows neither numbers nor order: bin them and use task='label'")


# Scores, read ---


def plan_of(scores: xr.Dataset) -> Outcome:
    """The outcome that these scores are about."""
    if scores.attrs["task"] == "number":
        return Outcome("number")
    names = scores["class"].values.astype(str)
    return Outcome(scores.attrs["task"], names, positive_code(names, scores.attrs["positive"]))


def codes_of(scores: xr.Dataset) -> np.ndarray:
    """The truth as numbers: itself, or the place of each label among the classes."""
    if scores.attrs["task"] == "number":
        return scores.truth.values
    names = list(scores["class"].values.astype(str))
    return np.array([names.index(str(t)) for t in scores.truth.values])


def participants_of(scores: xr.Dataset) -> np.ndarray:
    """Whose row each subject is."""
    units = scores.participant if "participant" in scores.coords else scores.subject
    return units.values.astype(str)


def tested_of(scores: xr.Dataset) -> np.ndarray:
    """Who was tested in which fold, (fold, subject)."""
    return np.isfinite(scores.output.values[0, :, :, 0])


def rescored(scores: xr.Dataset, name: str, output, decision) -> xr.Dataset:
    """Scores of another predictor on the same subjects and folds."""
    splits = Splits(participants_of(scores))
    for fold, tested in zip(scores.fold.values, tested_of(scores), strict=True):
        splits.add(fold, train=~tested, test=tested)
    outcome, rows = plan_of(scores), Rows(scores, [], {}, 0)
    task = Task(
        kind=outcome.kind,
        names=outcome.names,
        positive=outcome.positive,
        target=scores.attrs["target"],
        rows=rows,
        truth=codes_of(scores),
        splits=splits,
        protocol=None,
        seed=0,
        options={},
    )
    out = task.scores(name, output, decision)
    return out.assign_attrs({**out.attrs, **scores.attrs})
