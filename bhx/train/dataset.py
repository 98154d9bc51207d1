"""Samples: one subject of a batch, read, cropped and masked where the batch is made.

A sample is decided by the seed, the step and the subject alone, whoever makes it and when. No
network is run here.
"""

from __future__ import annotations

from copy import copy
from dataclasses import dataclass, field, is_dataclass, replace
from pathlib import Path

import numpy as np
import torch
import xarray as xr
import zarr

from bhx.data.cohort import open_cohort
from bhx.data.splits import cut
from bhx.encode.inputs import Reading, Sequences, made_before
from bhx.errors import InputError, listed
from bhx.schema import check, who_has
from bhx.train.recipes import Recipe

KEPT_BYTES = 1e9  # about as much of a store is held in memory once it was read, in each process


@dataclass
class Sample:
    """One subject of a batch, with what hides from the network."""

    row: int  # of the cohort
    subject: str
    reading: Reading = field(default_factory=Reading)
    tokens: Sequences | None = None  # made before by frozen encoders
    made: dict[str, list] = field(default_factory=dict)  # by frozen encoders in this step
    hidden: dict[str, torch.Tensor] = field(default_factory=dict)  # see each objective's `hide`
    unseen: str = ""  # variable that the harmonizer has to do without
    signal: tuple | None = None  # what the whole batch says to this subject: see `Objective.relate`

    @property
    def cost(self) -> int:
        """Tokens that are computed for it, or read."""
        if self.tokens is None:
            return len(self.reading)
        return sum(len(x) for one in self.tokens.subjects for x, _ in one.values())

    def to(self, device) -> Sample:
        """The same sample with what the networks read on a device."""
        return _moved(self, lambda x: x.to(device, non_blocking=True))

    def pin_memory(self) -> Sample:
        """The same sample in memory that a GPU copies from while it computes."""
        return _moved(self, torch.Tensor.pin_memory)

    @property
    def has(self) -> list[str]:
        """Modalities of which there is a token."""
        if self.tokens is not None:
            return list(dict.fromkeys(name for one in self.tokens.subjects for name in one))
        return [n for n, windows in self.reading.there.items() if any(map(len, windows))]


def _moved(value, move):
    """A dataclass, dict, list or tuple with every tensor in it moved."""
    if isinstance(value, torch.Tensor):
        return move(value)
    if isinstance(value, dict):
        return {k: _moved(v, move) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_moved(v, move) for v in value)
    if is_dataclass(value):
        return replace(value, **_moved(vars(value), move))
    return value


class Samples(torch.utils.data.Dataset):
    """Samples by (step, row of the cohort), for one objective.

    An error is a sample's value, raised by who reads it: on its way out of a worker process it
    would lose its form.

    Parameters
    ----------
    cohort, config, plan : aligned to the model of that configuration; settings of the run
    names : modalities that the objective reads
    hide : function (sample, config, plan, random) that says what hides from the network
    path : of the cohort's store, whose zarr arrays are then read without Dask
    tokens : path or Dataset of `bhx.embed` with the tokens of these subjects, read instead of scans
    """

    def __init__(self, cohort, config, plan: Recipe, names, hide, path=None, tokens=None):
        self.config, self.plan, self.hide, self.path = config, plan, hide, path
        self.modalities = {n: m for n, m in config.modalities.items() if n in names}
        self.labels = cohort.drop_vars(list(cohort.data_vars)).compute()
        self.source = path or cohort if tokens is None else tokens
        self.tokens, self._arrays, self._ready = tokens is not None, {}, {}
        self._kept: dict = {}  # what was read of a store once, as far as there is room
        self.has = {
            name: who_has(cohort, m.variable) & (m.variable in cohort)
            for name, m in self.modalities.items()
        }
        self.usable = np.flatnonzero(np.any(list(self.has.values()), axis=0))
        self._check(cohort)

    def __getitem__(self, key: tuple[int, int]) -> Sample | InputError:
        step, i = key
        subject = str(self.labels.subject.values[i])
        crop, hide = (np.random.default_rng([self.plan.seed, step + 1, i, n]) for n in (0, 1))
        try:
            sample = Sample(i, subject)
            if self.tokens:
                sample.tokens = self.read_tokens(i)
            else:
                sample.reading = self.read(i, crop)
            self.hide(sample, self.config, self.plan, hide)
            return sample
        except InputError as error:
            return InputError(f"Subject '{subject}': {error.fact}", error.help)

    def read(self, i: int, random, one_window: bool = True) -> Reading:
        """A subject's modalities, thinned and cropped as the plan says; at most one window."""
        reading, windows, seen = Reading(), None, {}
        for modality in {
            m.variable: m for _, m in self._had(i)
        }.values():  # once for all its readers
            facts = {k: self.labels[k].values[i] for k in modality.needs}
            values = modality.trim(self._stored(modality.variable, i), facts)
            augmented = modality.augment(values, facts, self.config, self.plan, random)
            seen[modality.variable] = augmented
        for _, modality in self._had(i):
            values, facts = seen[modality.variable]
            names = self.labels.roi.values if "roi" in modality.dims else ()
            scaled = modality.scale(values, self.config, scaling=self.config.scaling, names=names)
            if not np.isfinite(scaled).all():
                fact = f"Expected finite values of '{modality.variable}', found others"
                raise InputError(fact, "Leave this subject out with subjects=")
            cuts = modality.cut(scaled, facts, self.config)
            if one_window and len(cuts) > 1:
                windows = int(random.integers(len(cuts))) if windows is None else windows
                cuts = [cuts[windows]]
            reading.add(modality, cuts)
        return reading

    def read_tokens(self, i: int) -> Sequences:
        """Stored tokens of a subject, of all windows; prepared once where they are in memory."""
        ready = self._ready if isinstance(self.source, xr.Dataset) else {}
        if i not in ready:
            stored = {n: m.split(self._stored(m.tokens, i), self.config) for n, m in self._had(i)}
            ready[i] = made_before(self.config, stored)
        return ready[i]

    def _had(self, i):
        return [(name, m) for name, m in self.modalities.items() if self.has[name][i]]

    def _stored(self, variable, i):
        subject = str(self.labels.subject.values[i])
        try:
            if isinstance(self.source, xr.Dataset):
                found = self.source[variable].sel(subject=subject)
                return found.compute(scheduler="synchronous").values
            if not self._arrays:
                self._arrays = dict(zarr.open_group(self.source, mode="r").arrays())
                self._rows = {str(s): row for row, s in enumerate(self._arrays["subject"][:])}
            if (variable, i) not in self._kept:
                found = self._arrays[variable][self._rows[subject]]
                found = found.astype("float32") if found.dtype == "float16" else found
                if len(self._kept) * found.nbytes > KEPT_BYTES:
                    return found
                self._kept[variable, i] = found
            return self._kept[variable, i]
        except InputError:
            raise
        except Exception as error:
            where = "the cohort" if isinstance(self.source, xr.Dataset) else self.source
            raise InputError(
                f"Expected to read '{variable}' in '{where}', found {type(error).__name__}: "
                f"{error}",
                "The file is damaged: write the store again; the last checkpoint is untouched",
            ) from error

    def _check(self, cohort):
        if not len(self.usable):
            names = " or ".join(dict.fromkeys(m.variable for m in self.modalities.values()))
            fact = f"Expected a cohort with {names} for the stage '{self.plan.stage}', found "
            fact += f"{listed(cohort.data_vars)} and no subject that has it"
            raise InputError(fact, "Choose the stage that fits the cohort")
        if self.config.scaling != "zscore":
            fact = "Expected a model that reads series scaled by 'zscore', found "
            fact += f"'{self.config.scaling}'"
            raise InputError(fact, "Training knows no other scaling: take another model")
        for modality in self.modalities.values():
            modality.check_training(self.labels)

    def with_plan(self, plan: Recipe) -> Samples:
        """The same samples under other settings."""
        other = copy(self)
        other.plan = plan
        return other

    def whole(self, name: str) -> Samples:
        """One modality of the same subjects, of whole scans as they were measured."""
        other = self.with_plan(self.plan.model_copy(update={"crop": False, "decimate": (1,)}))
        other.modalities = {name: self.modalities[name]}
        return other

    def __getstate__(self):  # zarr arrays are opened again in each worker
        return self.__dict__ | {"_arrays": {}, "_kept": {}}


def readable(sample: Sample | InputError) -> Sample:
    """The sample, or the error that stands in its place, raised."""
    if isinstance(sample, InputError):
        raise sample
    return sample


def opened(cohort, subjects=None) -> tuple[xr.Dataset, str | None]:
    """The cohort, those of its subjects that are asked for, and the path of its store, if any."""
    path = None
    if not isinstance(cohort, xr.Dataset):
        path = str(cohort) if (Path(cohort) / "zarr.json").exists() else None
        cohort = open_cohort(cohort)
    cohort = check(cohort, "cohort")
    if subjects is not None:
        cohort = cohort.isel(subject=_rows_of(cohort, subjects))
    return cohort, path


def _rows_of(data, subjects):
    """Where subjects stand in a Dataset."""
    wanted = np.asarray(subjects, str)
    rows = data.indexes["subject"].get_indexer(wanted)
    if (rows < 0).any():
        fact = f"Expected subjects of the cohort, found others ({listed(wanted[rows < 0])})"
        raise InputError(fact, "cohort.subject lists them")
    return rows


def is_as_stored(aligned: xr.Dataset, cohort: xr.Dataset) -> bool:
    """Whether aligning changed nothing, so that a store can be read as it is."""
    same = all(aligned[v].shape == cohort[v].shape for v in cohort.data_vars)
    return same and ("roi" not in cohort or aligned.roi.equals(cohort.roi))


def held_out_rows(samples: Samples, held_out) -> tuple[np.ndarray, np.ndarray]:
    """Rows to train on and rows to evaluate, split by participant.

    A share is cut from all participants of the cohort, so that every stage with the same seed
    holds out the same people, whatever modalities they have.
    """
    labels, usable = samples.labels, samples.usable
    everyone = labels.participant.values
    if isinstance(held_out, int | float):
        shares = {"held out": float(held_out), "train": 1 - float(held_out)}
        is_test = cut(everyone, shares, samples.plan.seed) == "held out"
    else:
        is_test = np.zeros(len(everyone), bool)
        is_test[_rows_of(labels, held_out)] = True
        if both := set(everyone[is_test]) & set(everyone[~is_test]):
            fact = "Expected held-out subjects whose participants are not trained on, found "
            fact += f"participants on both sides ({listed(sorted(both))})"
            raise InputError(fact, "Hold out all rows of a participant")
    train, test = usable[~is_test[usable]], usable[is_test[usable]]
    if not len(test):
        fact = f"Expected held-out subjects with {' or '.join(samples.modalities)}, found none"
        raise InputError(fact, "Give a larger share, or ids, as held_out=")
    return train, test
