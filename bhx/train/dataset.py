"""Samples: one subject of a batch, read, cropped and masked where the batch is made.

A sample is decided by the seed, the step and the subject alone, whoever makes it and when. No
network is run here.
"""

from __future__ import annotations

from copy import copy
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

import numpy as np
import torch
import xarray as xr
import zarr

from bhx.data.cohort import open_cohort
from bhx.data.splits import cut
from bhx.encode.inputs import Reading, Sequences
from bhx.errors import InputError, listed
from bhx.model.config import HarmonixConfig
from bhx.schema import check, who_has
from bhx.train.recipes import Recipe


@dataclass
class Sample:
    """One subject of a batch, with what hides from the network."""

    row: int  # of the cohort
    subject: str
    reading: Reading = field(default_factory=Reading)
    tokens: Sequences | None = None  # made before by frozen encoders
    hidden: dict[str, torch.Tensor] = field(default_factory=dict)  # see each objective's `hide`
    unseen: str = ""  # modality that the harmonizer has to do without

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
    if isinstance(value, Sample | Reading | Sequences):
        return replace(
            value, **{f.name: _moved(getattr(value, f.name), move) for f in fields(value)}
        )
    return value


class Samples(torch.utils.data.Dataset):
    """Samples by (step, row of the cohort), for one objective.

    An error is a sample's value, raised by who reads it: on its way out of a worker process it
    would lose its form.

    Parameters
    ----------
    cohort : aligned to the model; its labels are kept
    names : modalities that the objective reads
    hide : function (sample, config, plan, random) that says what hides from the network
    path : of the cohort's store, whose zarr arrays are then read without Dask
    tokens : path or Dataset of `bhx.embed` with the tokens of these subjects, read instead of scans
    """

    def __init__(
        self,
        cohort: xr.Dataset,
        config: HarmonixConfig,
        plan: Recipe,
        names,
        hide,
        path=None,
        tokens=None,
    ):
        self.config, self.plan, self.hide, self.path = config, plan, hide, path
        self.modalities = {n: m for n, m in config.modalities.items() if n in names}
        self.labels = cohort.drop_vars(list(cohort.data_vars)).compute()
        self.cohort = None if path else cohort
        self.tokens, self._arrays = tokens, None
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
            if self.tokens is not None:
                sample = Sample(i, subject, tokens=self.read_tokens(i, crop))
            else:
                sample = Sample(i, subject, self.read(i, crop))
            self.hide(sample, self.config, self.plan, hide)
            return sample
        except InputError as error:
            return InputError(f"Subject '{subject}': {error.fact}", error.help)

    def read(self, i: int, random, one_window: bool = True) -> Reading:
        """A subject's modalities, thinned and cropped as the plan says; at most one window."""
        reading, windows = Reading(), None
        for name, modality in self.modalities.items():
            if not self.has[name][i]:
                continue
            facts = {k: self.labels[k].values[i] for k in modality.needs}
            values = modality.trim(self._stored(modality.variable, i), facts)
            names = self.labels.roi.values if "roi" in modality.dims else ()
            values, facts = modality.augment(values, facts, self.config, self.plan, random)
            scaled = modality.scale(values, self.config, scaling=self.config.scaling, names=names)
            if not np.isfinite(scaled).all():
                fact = (
                    f"Expected finite values of '{modality.variable}', found NaN or infinite ones"
                )
                raise InputError(fact, "Leave this subject out with subjects=")
            cuts = modality.cut(scaled, facts, self.config)
            if one_window and len(cuts) > 1:
                windows = int(random.integers(len(cuts))) if windows is None else windows
                cuts = [cuts[windows]]
            reading.add(name, cuts)
        return reading

    def read_tokens(self, i: int, random) -> Sequences:
        """Stored tokens of a subject."""
        parts = {}
        for name, modality in self.modalities.items():
            if self.has[name][i]:
                stored = self._token_arrays()[modality.tokens][self._token_rows[i]]
                parts[name] = modality.split(stored, self.config)
        windows = max(map(len, parts.values()))
        whole = self.plan.stage == "label"  # reads every window; others one that is drawn
        chosen = range(windows) if whole else [int(random.integers(windows))]
        subjects, weight = [], []
        for j in chosen:
            one = {}
            for name, cuts in parts.items():
                x = torch.from_numpy(np.ascontiguousarray(cuts[j if len(cuts) > 1 else 0]))
                places = self.modalities[name].rows(self.config, x.shape[:-1])
                flat = x.flatten(0, -2)
                there = flat.isfinite().all(-1)
                if there.any():
                    one[name] = flat[there], torch.from_numpy(places)[there]
            subjects.append(one)
            weight.append(max((len(t) for t, _ in one.values()), default=1))
        share = torch.tensor(weight, dtype=torch.float32)
        return Sequences(subjects, [0] * len(subjects), share / share.sum())

    def _stored(self, variable, i):
        try:
            if self.cohort is not None:
                return self.cohort[variable].isel(subject=i).compute(scheduler="synchronous").values
            return self._opened()[variable][self._rows[i]]
        except InputError:
            raise
        except Exception as error:
            raise InputError(
                f"Expected to read '{variable}' in '{self.path or 'the cohort'}', found "
                f"{type(error).__name__}: {error}",
                "The file is damaged: write the store again; the last checkpoint is untouched",
            ) from error

    def _opened(self):
        """The store's zarr arrays; where each subject stands in it."""
        if self._arrays is None:
            group = zarr.open_group(self.path, mode="r")
            self._arrays = {m.variable: group[m.variable] for m in self.modalities.values()
                            if m.variable in group}  # fmt: skip
            self._rows = self._rows_in(group)
        return self._arrays

    def _token_arrays(self):
        if self._arrays is None:
            stored = isinstance(self.tokens, str)
            group = zarr.open_group(self.tokens, mode="r") if stored else self.tokens
            names = [m.tokens for m in self.modalities.values()]
            self._arrays = {n: group[n] if stored else group[n].values for n in names}
            self._token_rows = self._rows_in(group)
        return self._arrays

    def _rows_in(self, group):
        ids = {str(s): row for row, s in enumerate(np.asarray(group["subject"][:]))}
        return [ids[str(s)] for s in self.labels.subject.values]

    def _check(self, cohort):
        if not len(self.usable):
            names = " or ".join(m.variable for m in self.modalities.values())
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

    def __getstate__(self):  # zarr arrays are opened again in each worker
        return self.__dict__ | {"_arrays": None}


def opened(cohort, subjects=None) -> tuple[xr.Dataset, str | None]:
    """The cohort, those of its subjects that are asked for, and the path of its store, if any."""
    path = None
    if not isinstance(cohort, xr.Dataset):
        path = str(cohort) if (Path(cohort) / "zarr.json").exists() else None
        cohort = open_cohort(cohort)
    cohort = check(cohort, "cohort")
    if subjects is not None:
        wanted = [str(s) for s in np.asarray(subjects)]
        if unknown := set(wanted) - set(cohort.subject.values.tolist()):
            fact = f"Expected subjects of the cohort, found others ({listed(sorted(unknown))})"
            raise InputError(fact, "cohort.subject lists them")
        cohort = cohort.sel(subject=wanted)
    return cohort, path


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
        wanted = [str(s) for s in np.asarray(held_out)]
        if unknown := set(wanted) - set(labels.subject.values.tolist()):
            fact = f"Expected held-out subjects of the cohort, found others ({listed(unknown)})"
            raise InputError(fact, "cohort.subject lists them")
        is_test = np.isin(labels.subject.values, wanted)
        if both := set(everyone[is_test]) & set(everyone[~is_test]):
            fact = "Expected held-out subjects whose participants are not trained on, found "
            fact += f"participants on both sides ({listed(sorted(both))})"
            raise InputError(fact, "Hold out all rows of a participant")
    train, test = usable[~is_test[usable]], usable[is_test[usable]]
    if not len(test):
        fact = f"Expected held-out subjects with {' or '.join(samples.modalities)}, found none"
        raise InputError(fact, "Give a larger share, or ids, as held_out=")
    return train, test
