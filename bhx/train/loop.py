"""One loop for all stages: pretraining in a notebook or under torchrun, resumable to the bit.

A step is decided by its number alone: which subjects, which crops, which masks. So a run that was
killed goes on as if it had not been, and several processes compute what one would.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import math
import os
import time
import warnings
from copy import deepcopy
from dataclasses import asdict
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from bhx.encode.inputs import autocast
from bhx.encode.model import Model, random_model
from bhx.errors import InputError, check_choice, listed
from bhx.model.checkpoints import read_weights, save_weights
from bhx.model.config import PRESETS, Harmonix, HarmonixConfig
from bhx.settings import __version__
from bhx.train.dataset import Feed, held_out_rows, opened
from bhx.train.log import collapse, parsed, plot_log, read_log
from bhx.train.objectives import OBJECTIVES, compile_blocks, digest, gathered, shard_blocks, spread
from bhx.train.recipes import Recipe, recipe
from bhx.train.token_cache import TokenCache

__all__ = ["Recipe", "plot_log", "pretrain", "read_log", "recipe"]

AT_ONCE = 4  # subjects that a worker reads for one message
EVALUATED = 64  # held-out subjects at most
FREE = ("tokens_at_once", "compile", "shard", "checkpoint_every")  # how, not what, is computed


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
    cache=None,
    watch=None,
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
    held_out : share of the participants, or subject ids, that are evaluated and never trained on.
        The same share and seed hold out the same participants in every stage.
    resume : continue the run in `out` where its last checkpoint left it
    cache : path of a store of the frozen encoders' tokens (bfloat16), for the harmonizer: made
        once, its size said beforehand, then read instead of scans. Needs crop=False and
        decimate=(1,), which are then the default.
    watch : called with the log (see `bhx.training.read_log`) and the model after every
        evaluation; `bhx.pictures.live` draws both in a notebook
    workers : processes that read ahead
    settings : any field of `Recipe`, such as steps=, batch=, seed=, precision=, compile=, shard=

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
    if cache is not None:
        settings = {"crop": False, "decimate": (1,)} | settings
    plan = recipe(stage, preset if isinstance(preset, str) else preset.name, **settings)
    device = _own_device(device)
    start = _starting_point(model, preset, Path(out), plan, device)
    cohort, path = opened(cohort, subjects, start)
    feed = Feed(cohort, start.config, plan, path)
    run = _Run(feed, start, Path(out) / stage, held_out, workers, progress, watch)
    run.begin(resume, cache)
    with run:
        for step in range(run.step, plan.steps):
            run.advance(step)
    return run.finish()


class _Run:
    """The state of a run: objective, optimiser, step, log; what a checkpoint holds."""

    def __init__(self, feed, model, folder, held_out, workers=0, progress=False, watch=None):
        self.feed, self.model, self.plan, self.watch = feed, model, feed.plan, watch
        self.folder, self.device, self.workers = folder, model.device, workers
        self.rank, self.world = _processes(self.device)
        self.train, self.test = held_out_rows(feed, held_out)
        if len(self.train) < self.plan.batch or self.plan.batch < self.world:
            raise InputError(
                f"Expected at least a batch of {self.plan.batch} subjects to train on (and one for "
                f"each of {self.world} processes), found {len(self.train)}",
                "Set batch= lower, or train on more subjects",
            )
        self.objective = OBJECTIVES[self.plan.stage](model.networks, self.plan).to(self.device)
        self.parallel = _parallel(self.objective, self.device, self.world, self.plan.shard)
        self.learning = [p for p in self.objective.parameters() if p.requires_grad]
        self.optimiser = _optimiser(self.objective, self.plan)
        self.step, self.seen, self.began = 0, 0, time.perf_counter()
        self.bar = tqdm(
            total=self.plan.steps,
            desc=self.plan.stage,
            unit="step",
            disable=not progress or self.rank > 0,
        )

    # A run's life, in order

    def begin(self, resume, cache=None):
        """Start anew in an empty folder, or from the last checkpoint."""
        checkpoint = self.folder / "checkpoint.pt"
        if not resume and (checkpoint.exists() or (self.folder / "log.jsonl").exists()):
            raise InputError(
                f"Expected a folder without a run of the stage '{self.plan.stage}', found one at "
                f"'{self.folder}'",
                "resume=True continues it; or give another folder",
            )
        _barrier(self.world)
        torch.manual_seed(self.plan.seed)
        if cache is not None:
            self._use_cache(cache)
        if checkpoint.exists():
            self._restore(checkpoint)
        else:
            self._first_time()
        if self.plan.compile:
            compile_blocks(self.objective)
        self.bar.update(self.step)
        loader = DataLoader(
            self.feed,
            batch_sampler=self._keys(),
            collate_fn=list,
            num_workers=self.workers,
            multiprocessing_context="forkserver" if self.workers else None,
            pin_memory=self.workers > 0 and self.device.type == "cuda",
        )
        self.batches = iter(loader)

    def _first_time(self):
        if self.plan.stage == "harmonizer" and self.plan.loss == "paper":
            with autocast(self.device, self.plan.precision):
                self.objective.see(self._samples(self._order(0)[:EVALUATED]))
        if self.rank == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / "log.jsonl").write_text("")

    def advance(self, step):
        """One optimiser step, and what is due after it."""
        rate, decay, momentum = schedule(step, self.plan)
        for group in self.optimiser.param_groups:
            group["lr"], group["weight_decay"] = rate, decay * group["decays"]
        losses, tokens, norm = self._gradients(step)
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        self.objective.follow(momentum)
        self.step = step + 1
        self._report(losses, rate, norm, tokens)
        last = self.step == self.plan.steps
        if self.step % self.plan.evaluate_every == 0 or last:
            found = self.evaluate()
            self._log("evaluation", found)
            _warn_of_collapse(found, self.step)
            if self.watch is not None and self.rank == 0:
                self.watch(read_log(self.folder.parent, self.plan.stage), self.model)
        if self.step % self.plan.checkpoint_every == 0 or last:
            self._save()

    def finish(self):
        """Write the model, with what made it, and hand it over."""
        networks = Harmonix(self.model.config)
        networks.load_state_dict(gathered(self.model.networks.state_dict()))
        folder = self.folder.parent
        if self.rank == 0:
            save_weights(networks, folder, self._provenance())
        _barrier(self.world)
        return Model(read_weights(folder), self.device)

    def _provenance(self):
        labels = self.feed.labels
        stages = dict(self.model.provenance.get("stages", {}))
        stages[self.plan.stage] = {
            "recipe": asdict(self.plan),
            "cohort": {k: str(v) for k, v in labels.attrs.items() if k != "truth"},
            "subjects": len(self.train),
            "held_out": [str(labels.subject.values[i]) for i in self.test],
            "versions": {"bhx": __version__, "torch": torch.__version__.split("+")[0]},
        }
        source = f"bhx.pretrain on {labels.attrs.get('source', 'a cohort')}"
        return {"source": source, "stages": stages}

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.bar.close()
        self.batches = None  # ends the workers

    # One step

    def _batch(self, step):
        """Subjects of a step: whole batches of one shuffled pass after another."""
        per_pass = len(self.train) // self.plan.batch
        number, place = divmod(step, per_pass)
        return self._order(number)[place * self.plan.batch : (place + 1) * self.plan.batch]

    def _order(self, number):
        """The subjects of a pass."""
        return np.random.default_rng([self.plan.seed, number]).permutation(self.train)

    def _mine(self, subjects):
        return subjects[self.rank :: self.world]

    def _keys(self):
        """(step, subject) of this process's share of every step to come, a few at a time."""
        for step in range(self.step, self.plan.steps):
            mine = [(step, int(i)) for i in self._mine(self._batch(step))]
            for start in range(0, len(mine), AT_ONCE):
                yield mine[start : start + AT_ONCE]

    def _parts(self, count):
        """The next `count` samples in parts that are computed at once; is each the last?"""
        part, total, seen = [], 0, 0
        while seen < count:
            for sample in next(self.batches):
                if isinstance(sample, InputError):
                    raise sample
                cost = self.objective.cost(sample)
                if part and total + cost > self.plan.tokens_at_once:
                    yield part, total, False
                    part, total = [], 0
                part.append(sample)
                total, seen = total + cost, seen + 1
        yield part, total, True

    def _together(self, parts):
        """Parts, the share that each counts, and is it the last? Split weights are gathered by all
        processes at once, so one that has no part left repeats its last, for nothing."""
        done = everyone = False
        while not everyone:
            share = 0 if done else 1
            if share:
                part, cost, done = next(parts)
            everyone = done
            if self.plan.shard and self.world > 1:
                everyone = _summed([done], self.device, self.world)[0] == self.world
            yield part, cost, share, everyone

    def _gradients(self, step):
        """Accumulate the gradient of the batch's mean loss, clipped; losses, tokens and norm of
        the whole batch."""
        subjects = self._batch(step)
        counts, tokens, found = self._counts(subjects), 0, []
        for part, cost, share, last in self._together(self._parts(len(self._mine(subjects)))):
            here = [sample.to(self.device) for sample in part]
            with self._in_step(last):
                with autocast(self.device, self.plan.precision):
                    losses = self.parallel(here)
                terms = [losses[k].sum() * share / max(n, 1) for k, n in counts.items()]
                (sum(terms) * self.world).backward()
            found.append(([s.subject for s in part], torch.stack([t.detach() for t in terms])))
            tokens += cost * share
        norm = nn.utils.clip_grad_norm_(self.learning, self.plan.clip)
        norm = float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)
        total = torch.stack([values for _, values in found]).double().sum(0).tolist()
        *total, tokens = _summed([*total, tokens], self.device, self.world)
        losses = dict(zip(counts, total, strict=True))
        if not all(map(math.isfinite, (*total, norm))):
            self._stop_at_nan(step, losses, norm, found)
        return losses, int(tokens), norm

    def _in_step(self, last):
        """Processes exchange gradients only after the last part."""
        if self.world == 1:
            return contextlib.nullcontext()
        if self.plan.shard:
            self.parallel.set_requires_gradient_sync(last)
            return contextlib.nullcontext()
        return contextlib.nullcontext() if last else self.parallel.no_sync()

    def _counts(self, subjects):
        """How many subjects of the whole batch have each term of the loss."""
        there = self.feed.need
        return {
            k: len(subjects) if modality is None else int(there[modality][subjects].sum())
            for k, modality in self.objective.terms.items()
        }

    def _stop_at_nan(self, step, losses, norm, found):
        suspects = [s for names, values in found if not values.isfinite().all() for s in names]
        subjects = suspects or self.feed.labels.subject.values[self._batch(step)]
        path = self.folder / "checkpoint.pt"
        kept = f"The last good checkpoint is '{path}'" if path.exists() else "No checkpoint yet"
        fact = f"Expected a finite loss, found {losses} and a gradient of norm {norm:g} at step "
        fact += f"{step} with the subjects {listed(subjects, 20)}"
        raise InputError(fact, f"{kept}: look at these subjects, or lower rate=")

    # What is seen of it

    def _report(self, losses, rate, norm, tokens):
        total = sum(losses.values())
        self._log("step", {**losses, "loss": total, "rate": rate, "norm": norm, "tokens": tokens})
        self.seen += tokens
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
        totals, tokens = {k: [] for k in self.objective.terms}, []
        self.objective.eval()
        for sample in self._samples(self.test[:EVALUATED]):
            with autocast(self.device, self.plan.precision):
                losses = self.parallel([sample])
                tokens += [t.float().cpu() for t in self.parallel([sample], True)]
            for k, v in losses.items():
                totals[k] += v.tolist()
        self.objective.train()
        out = {f"held_out_{k}": float(np.mean(v)) for k, v in totals.items() if v}
        out |= collapse(torch.stack(tokens))
        return out

    def _samples(self, rows):
        """One sample of each row, the same at every call."""
        for i in rows:
            sample = self.feed[-1, int(i)]
            if isinstance(sample, InputError):
                raise sample
            yield sample.to(self.device)

    # What survives

    def _save(self):
        state = self._state()
        if self.rank == 0:
            write_whole(state, self.folder / "checkpoint.pt")
        _barrier(self.world)

    def _state(self):
        return {
            **self._settings(),
            "step": self.step,
            "objective": gathered(self.objective.state_dict()),
            "optimiser": gathered(self.optimiser.state_dict()),
            "random": torch.get_rng_state(),
        }

    def _settings(self):
        """What may not change when a run is resumed."""
        ids = self.feed.labels.subject.values
        return {
            "plan": asdict(self.plan),
            "config": asdict(self.model.config),
            "subjects": [str(s) for s in ids],
            "held_out": [str(ids[i]) for i in self.test],
            "encoders": self._encoders,
        }

    @cached_property
    def _encoders(self):
        """Checksum of the encoders that the harmonizer learns from."""
        if self.plan.stage != "harmonizer":
            return ""
        return digest(self.model.networks.dynamics, self.model.networks.structure)

    def _restore(self, path):
        state = read_whole(path)
        check_unchanged(state, self._settings(), path)
        own = self.objective.state_dict()
        self.objective.load_state_dict(
            {k: spread(v, own[k]) for k, v in state["objective"].items()}
        )
        self.optimiser.load_state_dict(self._spread_optimiser(state["optimiser"]))
        torch.set_rng_state(state["random"])
        self.step = state["step"]
        if self.rank == 0:
            self._cut_log(self.folder / "log.jsonl")

    def _spread_optimiser(self, state):
        params = [p for group in self.optimiser.param_groups for p in group["params"]]
        each = {
            i: {k: spread(v, params[i]) for k, v in values.items()}
            for i, values in state["state"].items()
        }
        return {**state, "state": each}

    def _cut_log(self, log):
        """Drop what was logged after the checkpoint."""
        lines = log.read_text().splitlines() if log.exists() else []
        kept = [x + "\n" for x in lines if parsed(x).get("step", math.inf) <= self.step]
        part = log.with_suffix(".part")
        with _says_where(log):
            part.write_text("".join(kept))
            os.replace(part, log)

    def _use_cache(self, path):
        """Read the frozen encoders' tokens from a store, which the first process makes."""
        if self.plan.stage != "harmonizer":
            fact = f"Expected a token cache for the stage 'harmonizer', found '{self.plan.stage}'"
            raise InputError(fact, "Leave cache= out: this stage trains an encoder")
        for turn in (True, False):
            if (self.rank == 0) == turn:
                self.feed.cache = TokenCache(
                    path, self.feed, self.model.networks, self.device, not self.bar.disable
                )
            _barrier(self.world)


def _warn_of_collapse(found, step):
    if found["effective_rank"] < 3 or found["variance"] < 1e-6:
        warnings.warn(
            f"The representation is collapsing at step {step}: effective rank "
            f"{found['effective_rank']:.1f}, variance {found['variance']:.1e}. Lower rate=, raise "
            "momentum= towards (0.999, 1), or train on more varied subjects.",
            stacklevel=4,
        )


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


def _starting_point(model, preset, out, plan, device):
    """The given model, the one an earlier stage left in `out`, or random weights."""
    config = _config(preset)
    there = read_weights(out) if (out / "config.json").exists() else None
    if isinstance(model, Model):
        start = Model(deepcopy(model.networks), device or model.device)
    elif model is not None:
        start = Model(read_weights(model), device)
    elif there is not None:
        start = Model(there, device)
    elif plan.stage == "harmonizer":
        raise InputError(
            f"Expected encoders for the harmonizer in '{out}', found none",
            "Train the stages 'structure' and 'dynamics' there first, or give model=",
        )
    else:
        start = random_model(config, seed=plan.seed, device=device)
    wanted = config if model is None else start.config
    if there is not None and there.config != wanted:
        raise InputError(
            f"Expected a run of the model '{wanted.name}' in '{out}', found "
            f"'{there.config.name}' ({listed(_differences(asdict(there.config), asdict(wanted)))})",
            "Give another folder, or that model",
        )
    start.networks.requires_grad_(True)
    return start


def _config(preset):
    if isinstance(preset, HarmonixConfig):
        return preset
    check_choice("preset", preset, PRESETS)
    return PRESETS[preset]


def _optimiser(objective, plan):
    """AdamW without decay on biases and 1-D parameters."""
    named = [(n, p) for n, p in objective.named_parameters() if p.requires_grad]
    still = [p for n, p in named if p.ndim <= 1 or n.endswith("bias")]
    decays = [p for n, p in named if not (p.ndim <= 1 or n.endswith("bias"))]
    groups = [{"params": decays, "decays": 1.0}, {"params": still, "decays": 0.0}]
    fused = next(objective.parameters()).is_cuda
    return torch.optim.AdamW(groups, lr=plan.rate[0], betas=plan.betas, fused=fused)


# Several processes -------------------------------------------------------------------------------


def _own_device(device):
    """Under torchrun each process takes the GPU of its number on the machine."""
    on_gpu = torch.cuda.is_available() if device is None else str(device) == "cuda"
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and on_gpu:
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
        torch.cuda.set_device(device)
    return device


def _processes(device):
    """Rank and number of the processes that torchrun started, or 0 and 1."""
    world = int(os.environ.get("WORLD_SIZE", 1))
    if world > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        atexit.register(dist.destroy_process_group)
    return (dist.get_rank(), dist.get_world_size()) if world > 1 else (0, 1)


def _parallel(objective, device, world, shard):
    if world == 1:
        return objective
    if shard:
        return shard_blocks(objective, device, world)
    ids = [device.index or 0] if device.type == "cuda" else None
    return nn.parallel.DistributedDataParallel(
        objective, device_ids=ids, forward_sync_buffers=False, gradient_as_bucket_view=True
    )


def _summed(values, device, world):
    """Each value summed over the processes."""
    if world == 1:
        return values
    values = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(values)
    return values.tolist()


def _barrier(world):
    if world > 1:
        dist.barrier()


# Files -------------------------------------------------------------------------------------------


def check_unchanged(old, new, path):
    """Refuse to continue with another plan, model or cohort, naming what differs."""
    changed = [k for k in _differences(old["plan"], new["plan"]) if k not in FREE]
    changed += _differences(old["config"], new["config"])
    changed += [k for k in ("subjects", "held_out", "encoders") if old.get(k) != new[k]]
    if changed:
        fact = f"Expected the settings of the run at '{path}', found other {listed(changed, 12)}"
        raise InputError(fact, "Resume with the same settings, or start in another folder")


def _differences(old, new, prefix=""):
    """Names of the settings that differ, those of parts as "part.name"."""
    names = []
    for k in {**old, **new}:
        a, b = old.get(k), new.get(k)
        if isinstance(a, dict) and isinstance(b, dict):
            names += _differences(a, b, f"{k}.")
        elif _plain(a) != _plain(b):
            names.append(prefix + k)
    return names


def _plain(value):
    return list(value) if isinstance(value, (tuple, list)) else value


def read_whole(path):
    """The state that `write_whole` wrote."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        fact = f"Expected a whole checkpoint at '{path}', found a damaged one ({error})"
        raise InputError(fact, "Start again in another folder") from error


def write_whole(state, path):
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
        fact = f"Expected to write '{path}', found {error}"
        raise InputError(fact, "Make room and resume: the last checkpoint is untouched") from error
