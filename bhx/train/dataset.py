"""Samples: one subject of a batch, cropped, thinned and masked where the batch is made.

A sample is decided by the seed, the step and the subject alone, whoever makes it and when. No
network is run here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

import numpy as np
import torch
import xarray as xr

from bhx.encode.embed import aligned_to
from bhx.encode.inputs import Reading, in_windows
from bhx.errors import InputError, listed
from bhx.modalities.bold import BOLD
from bhx.modalities.t1 import scale_t1
from bhx.model.config import HarmonixConfig
from bhx.model.dynamics import jepa_masks
from bhx.schema import check
from bhx.train.recipes import Recipe

NEEDS = {"structure": ("t1",), "dynamics": ("bold",), "harmonizer": ("bold", "t1")}


@dataclass
class Sample:
    """One subject of a batch, with what hides from the network."""

    subject: str
    reading: Reading
    hidden: torch.Tensor | None = None  # of cubes, 1 = removed
    keep: list = field(default_factory=list)  # of each window's tokens
    hide: list = field(default_factory=list)
    dropped: str = ""  # modality the harmonizer does not see
    tokens: torch.Tensor | None = None  # of the frozen encoders, from a token cache, (n, width)
    rows: torch.Tensor | None = None  # of their positions

    def to(self, device):
        """The same sample with what the networks read on a device."""
        return self._moved(lambda x: x.to(device, non_blocking=True))

    def pin_memory(self):
        """The same sample in memory that a GPU copies from while it computes."""
        return self._moved(torch.Tensor.pin_memory)

    def _moved(self, move):
        def each(value):
            if isinstance(value, list):
                return [each(x) for x in value]
            return move(value) if isinstance(value, torch.Tensor) else value

        r = self.reading
        here = {f.name: each(getattr(self, f.name)) for f in fields(self) if f.name != "reading"}
        return Sample(**here, reading=replace(r, windows=each(r.windows), t1=each(r.t1)))


class Feed:
    """Samples by (step, row of the cohort). An error is a sample's value, raised by who reads it:
    on its way out of a worker process it would lose its form.

    With `path` the cohort is that store, and its zarr arrays are read without Dask.
    """

    def __init__(self, cohort: xr.Dataset, config: HarmonixConfig, plan: Recipe, path=None):
        self.config, self.plan, self.path = config, plan, path
        self.labels = cohort.drop_vars(list(cohort.data_vars)).compute()
        self.cohort = None if path else cohort
        self.cache = self._arrays = None
        there = {
            m: self.labels[f"has_{m}"].values.astype(bool) & (m in cohort)
            for m in NEEDS[plan.stage]
        }
        self.need = there
        self.usable = np.flatnonzero(np.any(list(there.values()), axis=0))
        self._check(cohort)

    def __getitem__(self, key: tuple[int, int]) -> Sample | InputError:
        step, i = key
        subject = str(self.labels.subject.values[i])
        crop, hide = (np.random.default_rng([self.plan.seed, step + 1, i, n]) for n in (0, 1))
        try:
            if self.cache is not None:
                sample = Sample(subject, Reading([], []))
                sample.tokens, sample.rows = self.cache.read(i, crop)
            else:
                sample = Sample(subject, self.read(i, crop))
            return self._hide(sample, hide)
        except InputError as error:
            return InputError(f"Subject '{subject}': {error.fact}", error.help)

    def read(self, i: int, random) -> Reading:
        """What the encoders read of one subject: at most one window of its scan, and its T1."""
        whole = self.read_whole(i, random)
        if whole.windows:
            one = int(random.integers(len(whole.windows)))
            whole.windows, whole.tokens = [whole.windows[one]], [whole.tokens[one]]
        return whole

    def read_whole(self, i: int, random=None) -> Reading:
        """A subject's T1 and every window of its scan, thinned and cropped as the plan says."""
        reading = Reading([], [])
        if "bold" in self.need and self.need["bold"][i]:
            reading.windows, reading.tokens = in_windows(
                *self._scan(i, random), self.config.dynamics
            )
        if "t1" in self.need and self.need["t1"][i]:
            t1 = scale_t1(self._stored("t1", i), self.config.structure.voxel_mm)
            if not np.isfinite(t1).all():
                fact = "Expected a T1 of finite values, found NaN or infinite ones"
                raise InputError(fact, "Leave this subject out with subjects=")
            reading.t1 = torch.from_numpy(t1)
            reading.cubes = torch.arange(self.config.structure.tokens)
        return reading

    def _scan(self, i, random):
        """(parcels, volumes) and TR: thinned, scaled as a scan at that TR would be, cropped."""
        n, tr = int(self.labels.n_volumes.values[i]), float(self.labels.tr.values[i])
        bold, tr = decimated(self._stored("bold", i)[:, :n], tr, self.config, self.plan, random)
        bold = BOLD.scale(bold, names=self.labels.roi.values)
        if self.plan.crop:
            bold = cropped(bold, tr, self.config, self.plan, random)
        return bold, tr

    def _hide(self, sample, random):
        reading, plan = sample.reading, self.plan
        if plan.stage == "structure":
            sample.hidden = cube_mask(self.config.structure.tokens, plan.hidden, random)
        elif plan.stage == "dynamics":
            masks = jepa_masks(*reading.windows[0].shape[:2], random)
            sample.keep, sample.hide = ([torch.from_numpy(m)] for m in masks)
        elif self._has_both(sample) and random.random() < plan.drop_modality:
            sample.dropped = str(random.choice(["bold", "t1"]))
        return sample

    def _has_both(self, sample):
        if sample.rows is None:
            return bool(sample.reading.windows) and sample.reading.t1 is not None
        is_t1 = sample.rows > self.config.harmonizer.parcels * self.config.harmonizer.max_patches
        return bool(is_t1.any()) and not bool(is_t1.all())

    def _stored(self, name, i):
        try:
            if self.cohort is not None:
                return self.cohort[name].isel(subject=i).compute(scheduler="synchronous").values
            return self._opened()[name][self._rows[i]]
        except InputError:
            raise
        except Exception as error:
            raise InputError(
                f"Expected to read '{name}' in '{self.path or 'the cohort'}', found "
                f"{type(error).__name__}: {error}",
                "The file is damaged: write the store again; the last checkpoint is untouched",
            ) from error

    def _opened(self):
        """The store's zarr arrays; where each subject stands in it."""
        if self._arrays is None:
            import zarr

            group = zarr.open_group(self.path, mode="r")
            self._arrays = {k: group[k] for k in ("bold", "t1") if k in group}
            ids = {str(s): row for row, s in enumerate(group["subject"][:])}
            self._rows = [ids[str(s)] for s in self.labels.subject.values]
        return self._arrays

    def _check(self, cohort):
        stage = self.plan.stage
        if not len(self.usable):
            fact = f"Expected a cohort with {' or '.join(NEEDS[stage])} for the stage '{stage}', "
            fact += f"found {listed(cohort.data_vars)} and no subject that has it"
            raise InputError(fact, "Choose the stage that fits the cohort")
        if self.config.scaling != "zscore":
            fact = "Expected a model that reads series scaled by 'zscore', found "
            fact += f"'{self.config.scaling}'"
            raise InputError(fact, "Pretraining fits no other scaling")
        has_bold = self.need.get("bold", np.zeros(0, bool))
        if "coverage" in self.labels and has_bold.any():
            low = has_bold & (self.labels.coverage.values < 1)
            if low.any():
                raise InputError(
                    f"Expected BOLD with a signal in every parcel, found a coverage below 1 in "
                    f"{int(low.sum())} subjects ({listed(self.labels.subject.values[low])})",
                    "Leave them out: subjects=cohort.subject[cohort.coverage == 1]",
                )

    def __getstate__(self):  # zarr arrays are opened again in each worker
        return self.__dict__ | {"_arrays": None}


def opened(cohort, subjects, model):
    """The cohort aligned to the model, and the path of its store where that can be read as is."""
    from bhx.data.cohort import (
        open_cohort,  # here: samples made in memory need neither zarr nor Dask
    )

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
    aligned = aligned_to(cohort, model)
    as_stored = all(aligned[v].shape == cohort[v].shape for v in cohort.data_vars) and (
        "roi" not in cohort or aligned.roi.equals(cohort.roi)
    )
    return aligned, path if as_stored else None


def decimated(bold, tr: float, config: HarmonixConfig, plan: Recipe, random):
    """(parcels, volumes) at `tr` [s] thinned by one of the plan's factors, from a random start.

    A factor is possible when the TR stays within the plan's slowest and a patch remains.
    """
    volumes = bold.shape[1]
    possible = [
        f
        for f in plan.decimate
        if f == 1
        or (f * tr <= plan.slowest_tr + 1e-9
            and config.dynamics.patch_count(volumes // f, f * tr) >= 1)
    ]  # fmt: skip
    factor = int(random.choice(possible)) if len(possible) > 1 else (possible or [1])[0]
    if factor == 1:
        return bold, tr
    if plan.antialias:
        from scipy import signal

        low = signal.firwin(8 * factor + 1, 1 / factor)
        bold = signal.filtfilt(low, [1.0], bold, axis=1, padlen=min(24 * factor, volumes - 1))
    start = int(random.integers(factor))
    return np.ascontiguousarray(bold[:, start::factor], np.float32), tr * factor


def cropped(bold, tr: float, config: HarmonixConfig, plan: Recipe, random):
    """A random stretch of whole patches, at most as many as the positions cover."""
    there = config.dynamics.patch_count(bold.shape[1], tr)
    most = min(there, config.dynamics.max_patches)
    patches = int(random.integers(min(plan.shortest, most), most + 1))
    step = config.dynamics.patch_onsets(2, tr)[1]
    volumes = min(math.ceil(patches * step / tr - 1e-6), bold.shape[1])
    start = int(random.integers(bold.shape[1] - volumes + 1))
    return bold[:, start : start + volumes]


def cube_mask(tokens: int, share: float, random) -> torch.Tensor:
    """1 = removed, for round(share x tokens) cubes."""
    mask = torch.zeros(tokens)
    mask[torch.from_numpy(random.permutation(tokens)[: round(tokens * share)])] = 1
    return mask


def held_out_rows(feed: Feed, held_out):
    """Rows to train on and rows to evaluate, split by participant.

    A share is cut from all participants of the cohort, so that every stage with the same seed
    holds out the same people, whatever modalities they have.
    """
    labels, usable = feed.labels, feed.usable
    everyone = labels.participant.values
    if isinstance(held_out, (int, float)):
        people = np.random.default_rng(feed.plan.seed).permutation(np.unique(everyone))
        is_test = np.isin(everyone, people[: max(1, round(len(people) * held_out))])
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
        fact = f"Expected held-out subjects with {' or '.join(feed.need)}, found none"
        raise InputError(fact, "Give a larger share, or ids, as held_out=")
    return train, test
