"""One loop, three objectives: pretraining in a notebook or under torchrun, resumable to the bit.

A step is decided by its number alone: which subjects, which crops, which masks. So a run that was
killed goes on as if it had not been, and several processes compute what one would.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import time
import warnings
from copy import deepcopy
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import xarray as xr
from torch import nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from . import __version__
from .checkpoints import HarmonixConfig, read_weights, save_weights
from .encoding import (
    Model,
    Reading,
    _aligned,
    encode_parts,
    random_model,
    scale_bold,
    scale_t1,
    sequences,
)
from .harmonix_f import jepa_loss, jepa_masks, patchify
from .harmonix_s import mae_loss
from .layers import Block
from .schema import InputError, check, listed

STAGES = ("structure", "dynamics", "harmonizer")


@dataclass(frozen=True)
class Recipe:
    """Settings of a run. The defaults are the published ones (see RECIPES for the presets).

    Rates are per step; `batch` counts subjects, `tokens_at_once` bounds what is computed at once
    (a batch above it is accumulated). `decimate` lists factors of TR augmentation.
    """

    stage: str
    steps: int = 100_000
    batch: int = 512
    seed: int = 0
    rate: tuple[float, float, float] = (5e-5, 1e-3, 1e-6)  # first, highest, last
    warmup: float = 40 / 300  # share of the steps
    decay: tuple[float, float] = (0.04, 0.4)  # weight decay, first and last
    betas: tuple[float, float] = (0.9, 0.999)
    clip: float = 1.0
    momentum: tuple[float, float] = (0.996, 1.0)  # of the teacher, first and last
    hidden: float = 0.75  # share of cubes removed
    loss: str = "paper"  # of the harmonizer; or "release"
    drop_modality: float = 0.2
    decimate: tuple[int, ...] = (1, 2, 3, 4)
    slowest_tr: float = 3.0  # s, after decimation
    antialias: bool = False
    shortest: int = 4  # patches of a crop in time, where the scan has as many
    precision: str = "bfloat16"
    compile: bool = False
    tokens_at_once: int = 65536
    evaluate_every: int = 500
    checkpoint_every: int = 500


def recipe(stage: str, preset: str = "base", **changes) -> Recipe:
    """The published settings of a stage, or those of a smaller preset, with changes by name."""
    if stage not in STAGES:
        raise InputError(f"Expected a stage of {listed(STAGES)}, found '{stage}'", "Choose one")
    known = {f.name for f in fields(Recipe)}
    if unknown := set(changes) - known:
        raise InputError(
            f"Expected settings of {listed(sorted(known), 30)}, found {listed(unknown)}",
            "Rename it",
        )
    return Recipe(
        stage, **{**_PUBLISHED[stage], **_SMALLER.get(preset, {}).get(stage, {}), **changes}
    )


_PUBLISHED = {
    "structure": {
        "rate": (0.0, 3e-4, 0.0), "decay": (0.05, 0.05), "betas": (0.9, 0.95),
    },
    "dynamics": {},
    "harmonizer": {
        "rate": (0.0, 1e-3, 0.0), "decay": (0.05, 0.05), "betas": (0.9, 0.95),
    },
}  # fmt: skip
_QUICK = {"precision": "float32", "tokens_at_once": 16384, "warmup": 0.1}
_SMALLER = {
    "workshop": {
        "structure": _QUICK | {
            "steps": 400, "batch": 16, "rate": (1e-4, 2e-3, 1e-5), "evaluate_every": 100,
            "checkpoint_every": 100,
        },
        "dynamics": _QUICK | {
            "steps": 200, "batch": 8, "rate": (1e-4, 1e-3, 1e-5), "momentum": (0.996, 1.0),
            "decay": (0.04, 0.1), "evaluate_every": 50, "checkpoint_every": 100,
            "decimate": (1, 2),
        },
        "harmonizer": _QUICK | {
            "steps": 200, "batch": 8, "rate": (1e-4, 2e-3, 1e-5), "evaluate_every": 50,
            "checkpoint_every": 100, "decimate": (1, 2),
        },
    },
}  # fmt: skip


def pretrain(
    cohort,
    *,
    stage: str,
    out,
    preset: str | HarmonixConfig = "workshop",
    model: Model | str | None = None,
    subjects=None,
    held_out: float | list = 0.1,
    resume: bool = False,
    device: str | None = None,
    workers: int = 0,
    progress: bool = True,
    **settings,
) -> Model:
    """Train one part of a model on a cohort.

    Parameters
    ----------
    cohort : Dataset, or the path of a store of bhx.save_cohort (read chunk by chunk, fastest)
    stage : "structure" (masked autoencoder), "dynamics" (joint-embedding prediction) or
        "harmonizer" (reconstruction from the hub tokens; the encoders are frozen)
    out : folder of the run. The stages of one model share it: each begins with the weights that
        the one before left there. `<out>/<stage>/` holds the log and the checkpoint.
    preset : "workshop", "small", "base" or a configuration of your own
    model : where to begin instead: a Model, or what bhx.load_model takes
    subjects : ids to use, all by default
    held_out : share of the participants, or subject ids, that are evaluated and never trained on
    resume : continue the run in `out` where its last checkpoint left it
    workers : processes that read ahead
    settings : any field of `Recipe`, such as steps=, batch=, seed=, precision=, compile=

    Returns
    -------
    Model
        With the trained weights, which are also in `out` for bhx.load_model.

    Raises
    ------
    InputError
        The cohort lacks what the stage needs, `out` holds another run, the configuration changed,
        a loss was not finite, or data could not be read; the last checkpoint stays.
    """
    start = _starting_point(model, preset, Path(out), stage, device)
    plan = recipe(stage, start.config.name, **settings)
    cohort, path = _opened(cohort, subjects, start)
    feed = Feed(cohort, start.config, plan, path)
    run = _Run(feed, start, Path(out) / stage, held_out, workers, progress)
    run.begin(resume)
    with run:
        for step in range(run.step, plan.steps):
            run.advance(step)
    return run.finish()


def read_log(out, stage: str) -> xr.Dataset:
    """The log of a run as a Dataset: `loss`, `rate`, ... on (step), evaluations on (evaluation)."""
    path = Path(out) / stage / "log.jsonl"
    if not path.exists():
        raise InputError(f"Expected a log at '{path}', found none", "Is this the folder of a run")
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    steps = [x for x in lines if x["kind"] == "step"]
    tests = [x for x in lines if x["kind"] == "evaluation"]
    data = {
        k: ("step", [x[k] for x in steps]) for k in (steps[0] if steps else {}) if k not in _KEYS
    }
    keys = list(dict.fromkeys(k for x in tests for k in x))
    data |= {k: ("evaluation", [x.get(k, np.nan) for x in tests]) for k in keys if k not in _KEYS}
    coords = {"step": [x["step"] for x in steps], "evaluation": [x["step"] for x in tests]}
    return xr.Dataset(data, coords, {"stage": stage})


_KEYS = ("kind", "step")


# Data: a step's number to its readings -----------------------------------------------------------


@dataclass
class Sample:
    """One subject of a batch with what hides from the network, made where the batch is made."""

    subject: str
    reading: Reading
    hidden: torch.Tensor | None = None  # of cubes, 1 = removed
    keep: list = field(default_factory=list)  # of each window's tokens
    hide: list = field(default_factory=list)
    dropped: str = ""  # modality the harmonizer does not see


class Feed:
    """Samples by (step, subject): crops, decimation and masks come from this pair and the seed.

    With `path` the cohort is that store, and its zarr arrays are read without Dask.
    """

    def __init__(self, cohort: xr.Dataset, config: HarmonixConfig, plan: Recipe, path=None):
        self.config, self.plan, self.path = config, plan, path
        self.labels = cohort.drop_vars(list(cohort.data_vars)).compute()
        self.cohort = None if path else cohort
        self.arrays = None
        need = {"structure": ("t1",), "dynamics": ("bold",)}.get(plan.stage, ("bold", "t1"))
        there = {m: self.labels[f"has_{m}"].values.astype(bool) & (m in cohort) for m in need}
        self.need = there
        self.usable = np.flatnonzero(np.any(list(there.values()), axis=0))
        if not len(self.usable) or not any(t.any() for t in there.values()):
            raise InputError(
                f"Expected a cohort with {' or '.join(need)} for the stage '{plan.stage}', "
                f"found {listed(cohort.data_vars)}",
                "Choose the stage that fits the cohort",
            )

    def __getitem__(self, key: tuple[int, int]) -> Sample:
        step, i = key
        subject = str(self.labels.subject.values[i])
        random = np.random.default_rng([self.plan.seed, step + 1, i])
        has = [m for m, there in self.need.items() if there[i]]
        reading = Reading([], [])
        if "bold" in has:
            reading = self._dynamics(i, random)
        if "t1" in has:
            t1 = scale_t1(self._read("t1", i), self.config.structure.voxel_mm)
            reading.t1 = torch.from_numpy(t1)
            reading.cubes = torch.arange(self.config.structure.tokens)
        return self._hide(Sample(subject, reading), random)

    def _dynamics(self, i, random):
        n, tr = int(self.labels.n_volumes.values[i]), float(self.labels.tr.values[i])
        bold = scale_bold(self._read("bold", i)[:, :n], names=self.labels.roi.values)
        bold, tr = decimated(bold, tr, self.plan, random)
        patches = patchify(torch.from_numpy(cropped(bold, tr, self.config, self.plan, random)), tr,
                           self.config.dynamics)  # fmt: skip
        patches = patches[:, : self.config.dynamics.max_patches]
        return Reading([patches], [torch.arange(patches.shape[0] * patches.shape[1])])

    def _hide(self, sample, random):
        reading, plan = sample.reading, self.plan
        if plan.stage == "structure":
            sample.hidden = cube_mask(self.config.structure.tokens, plan.hidden, random)
        elif plan.stage == "dynamics":
            masks = jepa_masks(*reading.windows[0].shape[:2], random)
            sample.keep, sample.hide = ([torch.from_numpy(m)] for m in masks)
        elif reading.windows and reading.t1 is not None and random.random() < plan.drop_modality:
            sample.dropped = str(random.choice(["bold", "t1"]))
        return sample

    def _read(self, name, i):
        try:
            if self.cohort is not None:
                return self.cohort[name].isel(subject=i).compute(scheduler="synchronous").values
            if self.arrays is None:
                import zarr

                group = zarr.open_group(self.path, mode="r")
                self.arrays = {k: group[k] for k in ("bold", "t1") if k in group}
                ids = {str(s): row for row, s in enumerate(group["subject"][:])}
                self.rows = [ids[str(s)] for s in self.labels.subject.values]
            return self.arrays[name][self.rows[i]]
        except InputError:
            raise
        except Exception as error:
            raise InputError(
                f"Expected to read '{name}' of '{self.labels.subject.values[i]}' in "
                f"'{self.path or 'the cohort'}', found {type(error).__name__}: {error}",
                "The file is damaged: write the store again; the last checkpoint is untouched",
            ) from error

    def __getstate__(self):  # zarr arrays are opened again in each worker
        return self.__dict__ | {"arrays": None}


def decimated(bold, tr: float, plan: Recipe, random):
    """(parcels, volumes) at `tr` [s] thinned by one of the plan's factors, from a random start."""
    possible = [f for f in plan.decimate if f == 1 or f * tr <= plan.slowest_tr + 1e-9]
    factor = int(random.choice(possible)) if possible else 1
    if factor == 1:
        return bold, tr
    if plan.antialias:
        from scipy import signal

        low = signal.firwin(8 * factor + 1, 1 / factor)
        bold = signal.filtfilt(low, [1.0], bold, axis=1, padlen=min(24 * factor, bold.shape[1] - 1))
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


def _opened(cohort, subjects, model):
    """The cohort aligned to the model, and the path of its store where that can be read as is."""
    from .cohort import open_cohort  # here: the objectives alone run without zarr or Dask

    path = None if isinstance(cohort, xr.Dataset) else str(cohort)
    cohort = check(open_cohort(path) if path else cohort, "cohort")
    if subjects is not None:
        cohort = cohort.sel(subject=list(subjects))
    aligned, _ = _aligned(cohort, model)
    as_stored = all(aligned[v].shape == cohort[v].shape for v in cohort.data_vars) and (
        "roi" not in cohort or aligned.roi.equals(cohort.roi)
    )
    return aligned, path if as_stored else None


def _starting_point(model, preset, out, stage, device):
    """The given model, the one an earlier stage left in `out`, or random weights."""
    if isinstance(model, Model):
        return Model(deepcopy(model.networks), device or model.device)
    if model is not None:
        return Model(read_weights(model), device)
    if (out / "config.json").exists():
        found = Model(read_weights(out), device)
        name = preset if isinstance(preset, str) else preset.name
        if found.config.name != name:
            raise InputError(
                f"Expected a run of the preset '{name}' in '{out}', found '{found.config.name}'",
                "Give another folder, or that preset",
            )
        return found
    if stage == "harmonizer":
        raise InputError(
            f"Expected encoders for the harmonizer in '{out}', found none",
            "Train the stages 'structure' and 'dynamics' there first, or give model=",
        )
    return random_model(preset, device=device)


# Objectives: what is trained, and the loss of each subject ---------------------------------------


class StructureObjective(nn.Module):
    """Masked autoencoding of T1 cubes."""

    def __init__(self, networks, plan):
        super().__init__()
        self.terms = {"loss": "t1"}  # of the loss, and the modality that a subject needs for it
        self.encoder, self.decoder = networks.structure, networks.structure_decoder

    def forward(self, samples, device):
        t1 = torch.stack([s.reading.t1 for s in samples]).to(device)
        hidden = torch.stack([s.hidden for s in samples]).to(device)
        return {"loss": mae_loss(self.encoder, self.decoder, t1, hidden)}

    def tokens(self, samples, device):
        """Trained representation of each sample, for the monitors."""
        return list(self.encoder(torch.stack([s.reading.t1 for s in samples]).to(device)))

    def cost(self, sample):
        return self.encoder.config.tokens

    def follow(self, share):
        """Nothing follows the encoder."""

    def deliver(self, networks):
        """The networks are trained in place."""


class DynamicsObjective(nn.Module):
    """Joint-embedding prediction: the student's predictor guesses the teacher's hidden tokens.

    The predictor reads the student's geometry, and the teacher is the moving average of the
    student; the teacher is what is kept.
    """

    def __init__(self, networks, plan):
        super().__init__()
        self.terms = {"loss": "bold"}
        self.student = deepcopy(networks.dynamics)
        self.predictor = networks.dynamics_predictor
        self.predictor.predictor_pos_embed = self.student.pos_embed
        self.teacher = networks.dynamics.requires_grad_(False)

    def forward(self, samples, device):
        patches = [s.reading.windows[0].to(device) for s in samples]
        keep, hide = ([getattr(s, k)[0].to(device) for s in samples] for k in ("keep", "hide"))
        return {"loss": jepa_loss(self.student, self.predictor, self.teacher, patches, keep, hide)}

    def tokens(self, samples, device):
        """Trained representation of each sample, for the monitors: the mean over its patches."""
        tokens, lengths = self.teacher([s.reading.windows[0].to(device) for s in samples])
        parcels = self.teacher.config.parcels
        return [t.unflatten(0, (parcels, -1)).mean(1) for t in tokens.split(lengths)]

    def cost(self, sample):
        return len(sample.reading.tokens[0])

    @torch.no_grad()
    def follow(self, share):
        """Move the teacher towards the student."""
        pairs = zip(self.teacher.parameters(), self.student.parameters(), strict=True)
        for slow, fast in pairs:
            slow.lerp_(fast.detach(), 1 - share)

    def deliver(self, networks):
        """The predictor gets its own copy of the geometry it was trained with."""
        networks.dynamics_predictor.predictor_pos_embed = deepcopy(self.student.pos_embed)


class HarmonizerObjective(nn.Module):
    """Reconstruction of both modalities' tokens, made by frozen encoders, from the hub tokens."""

    def __init__(self, networks, plan):
        super().__init__()
        self.harmonizer = networks.harmonizer
        self.networks = [networks]  # in a list: the frozen encoders are no parameters of this
        for frozen in (networks.dynamics, networks.structure):
            frozen.requires_grad_(False)
        self.release = plan.loss == "release"
        self.terms = {"loss": None} if self.release else {"loss_bold": "bold", "loss_t1": "t1"}

    def forward(self, samples, device):
        tokens, rows = self.encode(samples, device)
        if self.release:
            return {"loss": self.harmonizer.release_loss(tokens, rows)}
        seen = [self.seen(*x) for x in zip(tokens, rows, samples, strict=True)]
        return self.harmonizer.losses(*map(list, zip(*seen, strict=True)), tokens, rows)

    @torch.no_grad()
    def encode(self, samples, device):
        """Each sample's data tokens (n, width) and the rows they take."""
        readings = [s.reading for s in samples]
        parts = encode_parts(self.networks[0], readings, device)
        tokens, rows, _ = sequences(self.networks[0].config, readings, *parts)
        return [t.float() for t in tokens], rows

    def seen(self, tokens, rows, sample):
        """A sample's tokens without the modality it was to lose."""
        is_t1 = self.harmonizer.config.is_structure(rows)
        kept = {"": is_t1 | ~is_t1, "bold": is_t1, "t1": ~is_t1}[sample.dropped]
        return tokens[kept], rows[kept]

    def tokens(self, samples, device):
        """Trained representation of each sample, for the monitors."""
        return list(self.harmonizer(*self.encode(samples, device))[:, 1:])

    def cost(self, sample):
        windows = sum(len(k) for k in sample.reading.tokens)
        return windows + (0 if sample.reading.t1 is None else self.harmonizer.config.cubes)

    def follow(self, share):
        """Nothing follows the harmonizer."""

    def deliver(self, networks):
        """The encoders are free again."""
        for frozen in (networks.dynamics, networks.structure):
            frozen.requires_grad_(True)


OBJECTIVES = {
    "structure": StructureObjective,
    "dynamics": DynamicsObjective,
    "harmonizer": HarmonizerObjective,
}


# The loop ----------------------------------------------------------------------------------------


class _Run:
    """The state of a run: objective, optimiser, step, log; what a checkpoint holds."""

    def __init__(self, feed, model, folder, held_out, workers, progress):
        self.feed, self.model, self.plan = feed, model, feed.plan
        self.folder, self.device, self.workers = folder, model.device, workers
        self.rank, self.world = _processes(self.device)
        self.train, self.test = _held_out(feed, held_out)
        if len(self.train) < self.plan.batch or self.plan.batch < self.world:
            raise InputError(
                f"Expected at least a batch of {self.plan.batch} subjects to train on (and one for "
                f"each of {self.world} processes), found {len(self.train)}",
                "Set batch= lower, or train on more subjects",
            )
        self.objective = OBJECTIVES[self.plan.stage](model.networks, self.plan).to(self.device)
        self.parallel = _parallel(self.objective, self.device, self.world)
        self.optimiser = _optimiser(self.objective, self.plan)
        self.step, self.began = 0, time.perf_counter()
        self.bar = tqdm(
            total=self.plan.steps,
            desc=self.plan.stage,
            unit="step",
            disable=not progress or self.rank > 0,
        )

    # What a stranger sees of a run's life, in order

    def begin(self, resume):
        """Start anew in an empty folder, or from the last checkpoint."""
        there = (self.folder / "checkpoint.pt").exists()
        if there and not resume:
            raise InputError(
                f"Expected a folder without a run of the stage '{self.plan.stage}', found one at "
                f"'{self.folder}'",
                "resume=True continues it; or give another folder",
            )
        torch.manual_seed(self.plan.seed)
        if there:
            self._restore()
        elif self.rank == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / "log.jsonl").write_text("")
        if self.plan.compile:
            _compile(self.objective)
        self.batches = iter(
            DataLoader(
                self.feed,
                batch_sampler=self._keys(),
                collate_fn=list,
                num_workers=self.workers,
                multiprocessing_context="forkserver" if self.workers else None,
            )
        )
        self.bar.update(self.step)

    def advance(self, step):
        """One optimiser step, and what is due after it."""
        samples = next(self.batches)
        rate, decay, momentum = schedule(step, self.plan)
        for group in self.optimiser.param_groups:
            group["lr"], group["weight_decay"] = rate, decay * group["decays"]
        losses = self._gradients(samples, step)
        norm = nn.utils.clip_grad_norm_(
            [p for p in self.objective.parameters() if p.requires_grad], self.plan.clip
        )
        if not all(math.isfinite(x) for x in (*losses.values(), float(norm))):
            self._stop_at_nan(step, losses)
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        self.objective.follow(momentum)
        self.step = step + 1
        self._report(samples, losses, rate, float(norm))
        last = self.step == self.plan.steps
        if self.step % self.plan.evaluate_every == 0 or last:
            self._log("evaluation", self.evaluate())
        if self.step % self.plan.checkpoint_every == 0 or last:
            self._save()

    def finish(self):
        """Write the model, with what made it, and hand it over."""
        self.objective.deliver(self.model.networks)
        model = Model(self.model.networks.requires_grad_(True), self.device)
        stages = dict(model.provenance.get("stages", {}))
        stages[self.plan.stage] = {
            "recipe": asdict(self.plan),
            "cohort": {k: str(v) for k, v in self.feed.labels.attrs.items() if k != "truth"},
            "subjects": len(self.train),
            "held_out": [str(self.feed.labels.subject.values[i]) for i in self.test],
            "versions": {"bhx": __version__, "torch": torch.__version__.split("+")[0]},
        }
        source = f"bhx.pretrain on {self.feed.labels.attrs.get('source', 'a cohort')}"
        if self.rank == 0:
            folder = self.folder.parent
            save_weights(model.networks, folder, {"source": source, "stages": stages})
            model = Model(read_weights(folder), self.device)
        _barrier(self.world)
        return model

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.bar.close()
        self.batches = None

    # One step

    def _keys(self):
        """This process's (step, subject) of every step to come."""
        for step in range(self.step, self.plan.steps):
            yield [(step, int(i)) for i in self._batch(step)[self.rank :: self.world]]

    def _batch(self, step):
        """Subjects of a step: whole batches of one shuffled pass after another."""
        per_pass = len(self.train) // self.plan.batch
        number, place = divmod(step, per_pass)
        order = np.random.default_rng([self.plan.seed, number]).permutation(self.train)
        return order[place * self.plan.batch : (place + 1) * self.plan.batch]

    def _gradients(self, samples, step):
        """Accumulate the gradient of the batch's mean loss; the losses, over all processes."""
        counts = self._counts(self._batch(step))
        totals = dict.fromkeys(self.objective.terms, 0.0)
        parts = _parts(samples, self.objective.cost, self.plan.tokens_at_once)
        for i, part in enumerate(parts):
            wait = self.world > 1 and i < len(parts) - 1
            with self.parallel.no_sync() if wait else contextlib.nullcontext():
                with _precision(self.device, self.plan.precision):
                    losses = self.parallel(part, self.device)
                mean = sum(v.sum() / counts[k] for k, v in losses.items() if counts[k])
                (mean * self.world).backward()
            for k, v in losses.items():
                totals[k] += float(v.detach().sum()) / max(counts[k], 1)
        return _summed(totals, self.device, self.world)

    def _counts(self, subjects):
        """How many subjects of the whole batch have each term of the loss."""
        there = self.feed.need
        return {
            k: len(subjects) if modality is None else int(there[modality][subjects].sum())
            for k, modality in self.objective.terms.items()
        }

    def _stop_at_nan(self, step, losses):
        subjects = self.feed.labels.subject.values[self._batch(step)]
        raise InputError(
            f"Expected a finite loss, found {losses} at step {step} with the subjects "
            f"{listed(subjects, 20)}",
            f"The last good checkpoint is '{self.folder / 'checkpoint.pt'}': look at these "
            "subjects, or lower rate= and resume",
        )

    # What is seen of it

    def _report(self, samples, losses, rate, norm):
        tokens = sum(self.objective.cost(s) for s in samples) * self.world
        total = sum(losses.values())
        self._log("step", {**losses, "loss": total, "rate": rate, "norm": norm, "tokens": tokens})
        self.seen = getattr(self, "seen", 0) + tokens
        speed = self.seen / (time.perf_counter() - self.began)
        self.bar.set_postfix(loss=f"{total:.4f}", tokens_per_s=f"{speed:.0f}", refresh=False)
        self.bar.update(1)

    def _log(self, kind, values):
        if self.rank:
            return
        line = json.dumps({"kind": kind, "step": self.step, **values})
        with _says_where(self.folder / "log.jsonl"), open(self.folder / "log.jsonl", "a") as file:
            file.write(line + "\n")

    @torch.no_grad()
    def evaluate(self):
        """Held-out loss, and whether the representation still tells subjects apart."""
        samples = [self.feed[-1, int(i)] for i in self.test[:64]]
        self.objective.eval()
        totals, tokens = {k: [] for k in self.objective.terms}, []
        for part in _parts(samples, self.objective.cost, self.plan.tokens_at_once):
            for k, v in self.objective(part, self.device).items():
                totals[k] += v.tolist()
            tokens += [t.float().cpu() for t in self.objective.tokens(part, self.device)]
        self.objective.train()
        out = {f"held_out_{k}": float(np.mean(v)) for k, v in totals.items() if v}
        out |= collapse(torch.stack(tokens))
        if out["effective_rank"] < 3 or out["variance"] < 1e-6:
            warnings.warn(
                f"The representation is collapsing at step {self.step}: effective rank "
                f"{out['effective_rank']:.1f}, variance {out['variance']:.1e}. Lower rate=, raise "
                "momentum= towards (0.999, 1), or train on more varied subjects.",
                stacklevel=2,
            )
        return out

    # What survives

    def _save(self):
        if self.rank == 0:
            _write_whole(self._state(), self.folder / "checkpoint.pt")
        _barrier(self.world)

    def _state(self):
        return {
            "step": self.step,
            "plan": asdict(self.plan),
            "config": asdict(self.model.config),
            "subjects": [str(s) for s in self.feed.labels.subject.values],
            "objective": self.objective.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "random": torch.get_rng_state(),
        }

    def _restore(self):
        path = self.folder / "checkpoint.pt"
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:
            raise InputError(
                f"Expected a whole checkpoint at '{path}', found a damaged one ({error})",
                "Start again in another folder",
            ) from error
        _check_unchanged(state, self._state(), path)
        self.objective.load_state_dict(state["objective"])
        self.optimiser.load_state_dict(state["optimiser"])
        torch.set_rng_state(state["random"])
        self.step = state["step"]
        if self.rank == 0:
            log = self.folder / "log.jsonl"
            kept = [x for x in log.read_text().splitlines() if _step_of(x) <= self.step]
            log.write_text("".join(x + "\n" for x in kept))


def schedule(step: int, plan: Recipe) -> tuple[float, float, float]:
    """Learning rate, weight decay and teacher momentum of a step."""
    warmup = round(plan.warmup * plan.steps)
    first, highest, last = plan.rate
    if step < warmup:
        rate = first + (highest - first) * (step + 1) / warmup
    else:
        rate = _cosine(highest, last, (step - warmup) / max(1, plan.steps - warmup))
    through = step / max(1, plan.steps)
    low, high = plan.momentum
    return rate, _cosine(*plan.decay, through), low + (high - low) * through


def _cosine(start, end, share):
    return end + (start - end) * (1 + math.cos(math.pi * share)) / 2


def collapse(tokens) -> dict:
    """Signs of collapse in subjects' tokens (subjects, n, width), which stand at the same places.

    All but `cosine` look at what is left when the mean over subjects is taken off each place.
    `variance`: mean over dimensions. `effective_rank`: exponential of the entropy of the
    covariance's eigenvalues (Roy & Vetterli 2007). `cosine`: mean over pairs of subjects.
    """
    left = (tokens - tokens.mean(0)).flatten(0, 1)
    values = torch.linalg.svdvals(left) ** 2
    share = (values / values.sum().clamp(min=1e-30)).clamp(min=1e-30)
    flat = nn.functional.normalize(tokens.flatten(1), dim=1)
    n = len(flat)
    return {
        "variance": float(left.var(0).mean()),
        "effective_rank": float((-(share * share.log()).sum()).exp()),
        "cosine": float(((flat @ flat.T).sum() - n) / max(1, n * (n - 1))),
    }


def _held_out(feed, held_out):
    """Rows to train on and rows to evaluate, split by participant."""
    usable, labels = feed.usable, feed.labels
    if isinstance(held_out, (int, float)):
        people = np.unique(labels.participant.values[usable])
        people = np.random.default_rng(feed.plan.seed).permutation(people)
        chosen = people[: max(1, round(len(people) * held_out))]
        is_test = np.isin(labels.participant.values[usable], chosen)
    else:
        is_test = np.isin(labels.subject.values[usable], list(held_out))
        people = set(labels.participant.values[usable][is_test])
        if people & set(labels.participant.values[usable][~is_test]):
            raise InputError(
                "Expected held-out subjects whose participants are not trained on, found "
                f"participants on both sides ({listed(people)})",
                "Hold out all rows of a participant",
            )
    if not is_test.any():
        raise InputError("Expected held-out subjects of this cohort, found none", "See held_out=")
    return usable[~is_test], usable[is_test]


def _optimiser(objective, plan):
    """AdamW without decay on biases and 1-D parameters."""
    named = [(n, p) for n, p in objective.named_parameters() if p.requires_grad]
    still = [p for n, p in named if p.ndim <= 1 or n.endswith("bias")]
    decays = [p for n, p in named if not (p.ndim <= 1 or n.endswith("bias"))]
    groups = [{"params": decays, "decays": 1.0}, {"params": still, "decays": 0.0}]
    return torch.optim.AdamW(groups, lr=plan.rate[0], betas=plan.betas)


def _parts(samples, cost, tokens_at_once):
    """Consecutive samples that together stay within the bound, longest first."""
    parts, total = [], 0
    for sample in sorted(samples, key=cost, reverse=True):
        if not parts or total + cost(sample) > tokens_at_once:
            parts.append([])
            total = 0
        parts[-1].append(sample)
        total += cost(sample)
    return parts


def _compile(objective):
    """Compile what each token goes through alone; attention keeps its own fused kernels."""
    for module in objective.modules():
        if isinstance(module, Block):
            module.before = torch.compile(module.before, dynamic=True)
            module.after = torch.compile(module.after, dynamic=True)


def _processes(device):
    """Rank and number of the processes that torchrun started, or 0 and 1."""
    world = int(os.environ.get("WORLD_SIZE", 1))
    if world > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return (dist.get_rank(), dist.get_world_size()) if world > 1 else (0, 1)


def _parallel(objective, device, world):
    if world == 1:
        return objective
    ids = [device.index or 0] if device.type == "cuda" else None
    return nn.parallel.DistributedDataParallel(objective, device_ids=ids)


def _summed(totals, device, world):
    if world == 1:
        return totals
    values = torch.tensor(list(totals.values()), dtype=torch.float64, device=device)
    dist.all_reduce(values)
    return dict(zip(totals, values.tolist(), strict=True))


def _barrier(world):
    if world > 1:
        dist.barrier()


def _precision(device, precision):
    if precision == "bfloat16":
        return torch.autocast(device.type, torch.bfloat16)
    return contextlib.nullcontext()


def _check_unchanged(old, new, path):
    """Refuse to continue with another plan, model or cohort, naming what differs."""
    changed = [k for k in new["plan"] if _plain(old["plan"].get(k)) != _plain(new["plan"][k])]
    for part in ("structure", "dynamics", "harmonizer"):
        theirs, ours = old["config"].get(part, {}), new["config"][part]
        changed += [f"{part}.{k}" for k in ours if _plain(theirs.get(k)) != _plain(ours[k])]
    changed += [k for k in ("name", "atlas", "order") if old["config"].get(k) != new["config"][k]]
    if old["subjects"] != new["subjects"]:
        changed.append("subjects")
    if changed:
        raise InputError(
            f"Expected the settings of the run at '{path}', found other {listed(changed, 12)}",
            "Resume with the same settings, or start in another folder",
        )


def _plain(value):
    return list(value) if isinstance(value, (tuple, list)) else value


def _write_whole(state, path):
    """Write a file whole or not at all."""
    part = path.with_suffix(".part")
    with _says_where(path):
        try:
            with open(part, "wb") as file:
                torch.save(state, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)


@contextlib.contextmanager
def _says_where(path):
    try:
        yield
    except (OSError, RuntimeError) as error:
        raise InputError(
            f"Expected to write '{path}', found {error}",
            "Make room and resume: the last checkpoint is untouched",
        ) from error


def _step_of(line):
    try:
        return json.loads(line)["step"]
    except json.JSONDecodeError:  # a line cut short by the kill
        return math.inf
