"""What is to be predicted, of whom, in which folds: the door of `probe` and `fine_tune`.

A `Task` knows who enters, with which truth, who trains and who is tested, how predictions are
measured and how they become a Scores Dataset. No model is fitted here.
"""

from __future__ import annotations

import json
from dataclasses import dataclass

import numpy as np
import xarray as xr

from bhx.evaluate import metrics
from bhx.evaluate.folds import Design, Splits, cut_units, tied_units
from bhx.evaluate.options import check_name
from bhx.evaluate.rows import Rows, common_rows, said_of, truth_of
from bhx.schema import subject_coords


@dataclass
class Outcome:
    """What a prediction is about: a number or a label."""

    names: np.ndarray | None  # of the labels; None for numbers

    @property
    def kind(self) -> str:
        """What it is called in `bhx.probe`."""
        return "number" if self.names is None else "label"

    @property
    def classes(self) -> list[str]:
        """Columns of an output: labels, or "value"."""
        return ["value"] if self.names is None else [str(name) for name in self.names]

    def measure(self, truth, output, decision, weights=None) -> dict[str, np.ndarray]:
        """Metric -> values (B,) of outputs (n, class) and decisions (n,) under weights (B, n)."""
        if self.names is None:
            return metrics.measure_numbers(truth, output[:, 0], weights)
        return metrics.measure_labels(truth, output, decision, weights)

    def measure_folds(self, truth, tested, output, decision, weights=None) -> dict[str, np.ndarray]:
        """Metric -> values (fold, B) on the rows that each fold tested; each array (fold, row)."""
        found = [
            self.measure(truth[t], o[t], d[t], None if weights is None else weights[:, t])
            for t, o, d in zip(tested, output, decision, strict=True)
        ]
        return {name: np.array([one[name] for one in found]) for name in found[0]}


@dataclass
class Task(Outcome):
    """An outcome with its rows, their truth and their folds."""

    target: str
    rows: Rows
    truth: np.ndarray  # (row,): numbers, or codes of the labels
    splits: Splits
    design: Design

    def folds(self):
        """(train, test, validation) row indices of each fold; the last is mostly empty."""
        parts = (self.splits.rows(part) for part in ("train", "test", "validation"))
        return zip(*parts, strict=True)

    def inner_splits(self, train, folds: int = 3, units=None) -> list:
        """(fit, hold) row indices inside a training part; never splits what the folds keep whole.

        `units` (row,) keeps others whole instead. Empty where no cut has every label to fit.
        """
        y, units = self.truth[train], (self.splits.units if units is None else units)[train]
        folds = min(folds, len(np.unique(units)))
        if folds < 2:  # one unit left to train on: rows are all there is to split
            units, folds = np.arange(len(y)), min(3, len(y))
        if folds < 2:
            return []
        alike = self.names is not None and np.bincount(y).max() >= folds
        cuts = cut_units(units, y, folds, self.design.seed, alike)
        if self.names is not None:
            cuts = [(a, b) for a, b in cuts if len(np.unique(y[a])) == len(np.unique(y))]
        return [(train[a], train[b]) for a, b in cuts]

    def stopping_split(self, train, validation):
        """(fit, stop) row indices: who is learned from, and who only says when to stop.

        The validation rows of the split, or else a fifth of the training participants; nobody stops
        where labels are too few for that.
        """
        if len(validation):
            return train, validation
        cuts = self.inner_splits(train, 5, tied_units(self.rows))
        return cuts[0] if cuts else (train, train[:0])

    def decide(self, output, learned) -> np.ndarray:
        """Codes (n,) of probabilities (n, class), -1 for numbers.

        Bayes' rule for balanced accuracy: the largest probability over the label's frequency among
        the truths `learned` from. Protocols take the largest probability, as their authors do.
        """
        if self.names is None:
            return np.full(len(output), -1)
        if self.design.protocol:
            return output.argmax(1)
        frequency = np.bincount(learned, minlength=len(self.names)) / len(learned)
        return (output / frequency.clip(1e-300)).argmax(1)

    def loss(self, truth, output) -> np.ndarray:
        """Squared error, or negative log-likelihood, (target,) of truths (n, target) and outputs
        (target, n, class), summed over rows."""
        if self.names is None:
            return ((output[..., 0] - truth.T) ** 2).sum(1)
        known = np.take_along_axis(output, truth.T[..., None], 2)[..., 0]
        return -np.log(known.clip(1e-12)).sum(1)

    def empty(self):
        """Arrays to fill: output (fold, row, class) of NaN and decision (fold, row) of -1."""
        shape = (len(self.splits.part), len(self.truth))
        return np.full((*shape, len(self.classes)), np.nan), np.full(shape, -1)

    def scores(self, name: str, output, decision, **attrs) -> xr.Dataset:
        """Scores Dataset of one model.

        Parameters
        ----------
        name : of the model
        output, decision : (fold, row, class) and (fold, row), as `empty` made and a model filled
        attrs : more attributes, such as estimator=
        """
        prediction, truth = metrics.known_mean(output[..., 0]), self.truth
        if self.names is not None:
            most = metrics.majority(decision, len(self.names))
            prediction = np.where(np.isfinite(prediction), self.names[most], "")
            truth = self.names[truth]
            attrs["positive"] = self.classes[-1]
        tested, folds = self.splits.rows("test"), ("model", "fold", "subject")
        found = self.measure_folds(self.truth, tested, output, decision)
        variables = {
            "score": (("model", "metric", "fold"), np.array(list(found.values()))[None, ..., 0]),
            "prediction": (("model", "subject"), prediction[None]),
            "output": ((*folds, "class"), output[None]),
            "decision": (folds, decision[None]),
            "truth": ("subject", truth),
        }
        coords: dict = {"model": [name], "metric": list(found)}
        coords |= {"fold": self.splits.names, "class": self.classes}
        labels = subject_coords(self.rows.labels)  # one called "score" or "fold" gives way
        taken = {*variables, *coords, "permutation", "epoch", "null", "estimator", "part"}
        coords |= {name: c.variable for name, c in labels.items() if name not in taken}
        return xr.Dataset(variables, coords, {**self._attributes(), **attrs})

    def _attributes(self):
        """What scores keep of the task."""
        split = self.design.split
        return {
            "target": self.target,
            "task": self.kind,
            "n": len(self.truth),
            "n_rows": len(self.truth) + sum(map(len, self.rows.excluded.values())),
            "n_participants": len(np.unique(self.rows.people)),
            "groups": self.design.groups or "participant",
            "stratify": self.design.stratify or "",
            "protocol": self.design.protocol or "",
            "split": "" if split is None else json.dumps(split.attrs, default=str),
            "seed": self.design.seed,
            "test_share": self.splits.test_share,
            "mutual": self.splits.mutual,
            "excluded": json.dumps(self.rows.excluded),
            "notes": json.dumps(self.splits.notes),
        }


def make_task(data, target: str, *, task=None, classes=None, needed=(), **design) -> Task:
    """Who enters, with which truth and in which folds.

    Parameters
    ----------
    data : Dataset with labels on subject (a cohort, latents, features), or a list of them: who
        enters is in all, and has some of the features of each that has features
    target, task, classes : as in `bhx.probe`
    needed : further coordinates without which nobody enters
    design : fields of `folds.Design`: groups, stratify, protocol, split, folds, repeats, seed
    """
    data = list(data) if isinstance(data, (list, tuple)) else [data]
    check_name("target", target, optional=False)
    design = Design(**design)
    needed = [*filter(None, (design.groups, design.stratify)), *needed]
    if design.protocol == "paper" and any("site" in one.coords for one in data):
        needed.append("site")
    rows = common_rows(data, target, needed, classes, design.split)
    values = rows.labels[target].values
    whole = values.dtype.kind == "f" and (values == np.round(values)).all()
    if whole and f"no {target}" in rows.excluded:  # missing ones had made floats of integers
        values = values.astype(int)
    names, truth = truth_of(values, target, task, classes)
    splits = design.splits(rows, truth, names)
    splits.notes += said_of(data, dict.fromkeys((target, *needed)))
    return Task(names, target, rows, truth, splits, design)


# Scores, read ---


def plan_of(scores: xr.Dataset) -> Outcome:
    """The outcome that these scores are about."""
    number = scores.attrs["task"] == "number"
    return Outcome(None if number else scores["class"].values.astype(str))


def codes_of(scores: xr.Dataset) -> np.ndarray:
    """The truth as numbers: itself, or the place of each label among the classes."""
    plan, truth = plan_of(scores), scores.truth.values
    return truth if plan.names is None else np.array([plan.classes.index(str(t)) for t in truth])


def participants_of(scores: xr.Dataset) -> np.ndarray:
    """Whose row each subject is."""
    units = scores.participant if "participant" in scores.coords else scores.subject
    return units.values.astype(str)


def tested_of(scores: xr.Dataset) -> np.ndarray:
    """Who was tested in which fold, (fold, subject)."""
    return np.isfinite(scores.output.values[0, :, :, 0])
