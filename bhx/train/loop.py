"""One loop for all objectives: in a notebook or under torchrun, resumable to the bit.

A step is decided by its number alone: which subjects, which crops, which masks, which drops. So a
run that was killed goes on as if it had not been, and several processes compute what one would.
"""

from __future__ import annotations

import math
import os
import warnings

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from bhx.encode.inputs import in_turns
from bhx.encode.processes import Processes, gathered, split_like
from bhx.errors import InputError, listed
from bhx.train.dataset import Samples, readable
from bhx.train.log import append, collapse, cut_after, names_what_failed, warn_of_collapse
from bhx.train.objectives import FEWEST, Objective, compile_blocks
from bhx.train.recipes import Recipe, cosine, learning_rate, linear

AT_ONCE = 4  # subjects that a worker reads for one message
EVALUATED = 64  # held-out subjects at most, where nothing is stopped by them
FREE = ("tokens_at_once", "compile", "shard", "checkpoint_every")  # how, not what, is computed


class Run:
    """A run: what learns, how far it has come, and what is kept of it.

    Parameters
    ----------
    objective, samples, plan : what is trained, on what, with which settings
    folder : of the log and the checkpoint; None keeps neither
    train, test : rows of the samples to train on and to evaluate
    fixed : what must be the same when the run is resumed: name -> value, "plan" among them
    workers : processes that read ahead
    watch : called with the run after every evaluation
    """

    def __init__(self, objective: Objective, samples: Samples, plan: Recipe, folder, train, test,
                 fixed, *, workers=0, progress=False, watch=None):  # fmt: skip
        self.objective, self.samples, self.plan, self.folder = objective, samples, plan, folder
        self.train, self.test, self.fixed = train, test, fixed
        self.workers, self.watch = workers, watch
        self.device = next(objective.parameters()).device
        self.processes = Processes.join(self.device)
        if len(train) < plan.batch or plan.batch < self.processes.world:
            raise InputError(
                f"Expected at least a batch of {plan.batch} subjects to train on (and one for "
                f"each of {self.processes.world} processes), found {len(train)}",
                "Set batch= lower, or train on more subjects",
            )
        self.parallel = self.processes.parallel(objective, plan.shard)
        self.learning = [p for p in objective.parameters() if p.requires_grad]
        on_gpu = self.device.type == "cuda"
        groups = objective.groups(plan)
        self.optimizer = torch.optim.AdamW(groups, plan.rate[0], plan.betas, fused=on_gpu)
        self.step, self.at_once = 0, plan.tokens_at_once
        self.lowest, self.kept, self.best = math.inf, 0, None  # for stopping early
        quiet = not progress or self.processes.rank > 0
        self.bar = tqdm(total=plan.steps, desc=plan.stage, unit="step", disable=quiet)

    # A run's life, in order ---

    def go(self, resume: bool = False) -> None:
        """From the start, or from the last checkpoint, to the end."""
        self._begin(resume)
        with torch.random.fork_rng(), self.bar:
            self.bar.update(self.step)
            batches = self._loader()
            while self.step < self.plan.steps and not self.stopped:
                self._advance(self._next(batches))
            del batches  # ends the workers
        if self.best is not None:
            self.objective.load_state_dict(self.best, strict=False)

    @property
    def stopped(self) -> bool:
        """Whether no evaluation has been better for as long as the plan waits."""
        every, patience = self.plan.evaluate_every, self.plan.patience
        return patience is not None and self.step - self.kept >= patience * every

    def _begin(self, resume):
        checkpoint = self.folder and self.folder / "checkpoint.pt"
        log = self.folder and self.folder / "log.jsonl"
        if self.folder and not resume and (checkpoint.exists() or log.exists()):
            raise InputError(
                f"Expected a folder without a run of the stage '{self.plan.stage}', found one at "
                f"'{self.folder}'",
                "resume=True continues it; or give another folder",
            )
        self.processes.wait()
        if self.folder and checkpoint.exists():
            self._restore(checkpoint)
        else:
            with torch.autocast(self.device.type, torch.bfloat16, self._half):
                self.objective.begin(self)
            if self.folder and self.processes.rank == 0:
                self.folder.mkdir(parents=True, exist_ok=True)
                log.write_text("")
        self.objective.train()
        if self.plan.compile:
            compile_blocks(self.objective)

    def _advance(self, samples):
        """One step of the optimizer, and what is due after it."""
        plan, share = self.plan, self.step / max(1, self.plan.steps)
        rate = learning_rate(self.step, plan.steps, plan.warmup, plan.rate)
        decay = cosine(*plan.decay, share)
        for group in self.optimizer.param_groups:
            group["lr"], group["weight_decay"] = rate * group["scale"], decay * group["decays"]
        losses, tokens, norm = self._gradients_in_memory(samples)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.objective.follow(linear(*plan.momentum, share))
        self.step += 1
        total = sum(losses.values())
        self._log("step", {**losses, "loss": total, "rate": rate, "norm": norm, "tokens": tokens})
        self.bar.set_postfix(loss=f"{total:.4f}", refresh=False)
        self.bar.update(1)
        last = self.step == plan.steps
        if self.step % plan.evaluate_every == 0 or last:
            self._evaluate()
        if self.step % plan.checkpoint_every == 0 or last or self.stopped:
            self._save()

    # One step ---

    def batch(self, step: int) -> np.ndarray:
        """Rows of a step: whole batches of one shuffled pass after another."""
        size = self.plan.batch
        number, place = divmod(step, len(self.train) // size)
        return self._order(number)[place * size : (place + 1) * size]

    def first(self) -> list:
        """Samples of training subjects, to fit what begins with them."""
        return list(self.read(self._order(0)[:EVALUATED]))

    def compared(self) -> tuple[np.ndarray, np.ndarray]:
        """Rows of all subjects that are trained on, in a random order, and that are evaluated."""
        return self._order(0), self.test[:EVALUATED]

    def _order(self, number):
        return np.random.default_rng([self.plan.seed, number]).permutation(self.train)

    def _loader(self):
        """This process's samples of every step to come, a few at a time."""
        keys = []
        for step in range(self.step, self.plan.steps):
            mine = [(step, int(i)) for i in self.processes.share_of(self.batch(step))]
            keys += [mine[start : start + AT_ONCE] for start in range(0, len(mine), AT_ONCE)]
        return iter(DataLoader(
            self.samples,
            batch_sampler=keys,
            collate_fn=list,
            num_workers=self.workers,
            multiprocessing_context="forkserver" if self.workers else None,
            pin_memory=self.workers > 0 and self.device.type == "cuda",
        ))  # fmt: skip

    def _next(self, batches) -> list:
        """This process's samples of the next step."""
        count, samples = len(self.processes.share_of(self.batch(self.step))), []
        while len(samples) < count:
            samples += next(batches)
        return [readable(sample) for sample in samples]

    def _gradients_in_memory(self, samples):
        """The gradients, from fewer tokens at once where the device has no room for as many."""
        seed = int(np.random.default_rng([self.plan.seed, self.step]).integers(2**31))
        while True:
            torch.manual_seed(seed)
            try:
                return self._gradients(samples)
            except torch.OutOfMemoryError as error:
                alone = self.processes.world == 1  # others would wait for this one
                if not alone or self.at_once <= max(s.cost for s in samples):
                    found, help = str(error).partition(".")[0], "Set tokens_at_once= lower"
                    fact = f"Expected room for {self.at_once} tokens, found too little: {found}"
                    raise InputError(fact, f"{help}, or free {self.device}") from error
            self.at_once //= 2
            self.optimizer.zero_grad(set_to_none=True)
            warnings.warn(
                f"The device had no room for a batch: from now on {self.at_once} tokens at once",
                stacklevel=2,
            )

    def _gradients(self, samples):
        """Accumulate the gradient of the batch's mean loss, clipped; losses, tokens and norm of
        the whole batch."""
        counts, costs, found = self._counts(self.batch(self.step)), [s.cost for s in samples], []
        parts = [samples[turn] for turn in in_turns(costs, self.at_once)]
        rounds = self.processes.most(len(parts)) if self.plan.shard else len(parts)
        if self.objective.compares:
            self._relate(parts, self.batch(self.step), rounds)
        for i in range(rounds):  # all gather split weights: who is done repeats for nothing
            part, weight = parts[min(i, len(parts) - 1)], float(i < len(parts))
            here = [sample.to(self.device) for sample in part]
            with self.processes.exchange(self.parallel, self.plan.shard, i == rounds - 1):
                with torch.autocast(self.device.type, torch.bfloat16, self._half):
                    losses = self.parallel(here)
                terms = [losses[k].sum() * weight / max(n, 1) for k, n in counts.items()]
                (sum(terms) * self.processes.world).backward()
            found.append(torch.stack([t.detach() for t in terms]))
        for sample in samples:
            sample.made = {}
        norm = nn.utils.clip_grad_norm_(self.learning, self.plan.clip)
        norm = float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)
        *total, tokens = self.processes.summed([*torch.stack(found).sum(0).tolist(), sum(costs)])
        losses = dict(zip(counts, total, strict=True))
        if not all(map(math.isfinite, (*total, norm))):
            self._stop_at_nan(losses, norm, [
                s.subject for part, values in zip(parts, found, strict=False)
                for s in part if not values.isfinite().all()
            ])  # fmt: skip
        return losses, int(tokens), norm

    def _relate(self, parts, rows, rounds, together=True):
        """Show an objective that compares people all of them, before the gradients of parts."""
        pooled = []
        with torch.no_grad(), torch.autocast(self.device.type, torch.bfloat16, self._half):
            for i in range(rounds):
                part = parts[min(i, len(parts) - 1)]
                here = [sample.to(self.device) for sample in part]
                pooled.append(torch.stack([t.mean(0) for t in self.parallel(here, True)]).float())
                for sample, moved in zip(part, here, strict=True):
                    sample.made = moved.made  # frozen encoders make the same again
        mine = torch.cat(pooled[: len(parts)])
        whole = self.processes.joined(mine, len(rows)) if together else mine
        signals = self.objective.compare(whole, rows)
        signals = self.processes.share_of(signals) if together else signals
        for sample, signal in zip((s for part in parts for s in part), signals, strict=True):
            sample.signal = signal

    def _counts(self, rows):
        """How many subjects of the whole batch have each term of the loss."""
        has = {None: np.ones(len(self.samples.labels.subject), bool), **self.samples.has}
        return {term: int(has[name][rows].sum()) for term, name in self.objective.terms.items()}

    def _stop_at_nan(self, losses, norm, suspects):
        subjects = suspects or self.samples.labels.subject.values[self.batch(self.step)]
        path = self.folder and self.folder / "checkpoint.pt"
        kept = f"The last good checkpoint is '{path}'" if path and path.exists() else "None is kept"
        fact = f"Expected a finite loss, found {losses} and a gradient of norm {norm:g} at step "
        fact += f"{self.step} with the subjects {listed(subjects, 20)}"
        raise InputError(fact, f"{kept}: look at these subjects, or set rate= lower")

    @property
    def _half(self):
        return self.plan.precision == "bfloat16"

    # What is shown of it ---

    def _log(self, kind, values):
        if self.folder and self.processes.rank == 0:
            append(self.folder / "log.jsonl", kind, self.step, values)

    def read(self, rows):
        """One sample of each row, the same at every call."""
        for i in rows:
            yield readable(self.samples[-1, int(i)]).to(self.device)

    def _evaluate(self):
        """Held-out loss, and whether the representation still tells subjects apart; with patience,
        what learned is kept where the loss is the lowest so far."""
        stopping = self.plan.patience is not None
        found = self.evaluate(self.test if stopping else self.test[:EVALUATED])
        self._log("evaluation", found)
        if stopping:
            loss = found.get("held_out_loss", math.nan)  # nobody to stop by: the last one is kept
            if len(self.test) and not math.isfinite(loss):
                self._stop_at_nan({"held-out loss": loss}, math.nan, [])
            if not loss >= self.lowest:
                self.lowest, self.kept = loss, self.step
                self.best = gathered(self._learned())
        elif not self.objective.compares:  # whose loss sees people fall together
            warn_of_collapse(found, self.step)
        if self.watch is not None and self.processes.rank == 0:
            self.watch(self)

    @torch.no_grad()
    def evaluate(self, rows) -> dict:
        """Mean held-out loss of each term, and signs of collapse."""
        totals, tokens = {k: [] for k in self.objective.terms}, []
        self.objective.eval()
        samples = self.read(rows)
        if self.objective.compares:
            samples = list(samples)
            if len(samples) >= FEWEST:  # else nobody's place among others is known
                self._relate([[s] for s in samples], rows, len(samples), together=False)
        for sample in samples:
            with torch.autocast(self.device.type, torch.bfloat16, self._half):
                losses = self.parallel([sample])
                if self.plan.patience is None:
                    tokens += [t.float().cpu() for t in self.parallel([sample], True)]
            for k, v in losses.items():
                totals[k] += v.tolist()
        self.objective.train()
        out = {f"held_out_{k}": float(np.mean(v)) for k, v in totals.items() if v}
        return out | (collapse(torch.stack(tokens)) if tokens else {})

    # What is kept ---

    def _learned(self):
        """What learns, by name; clones."""
        named = self.objective.named_parameters()
        return {k: p.detach().clone() for k, p in named if p.requires_grad}

    def _save(self):
        state = {
            **self.fixed,
            "step": self.step,
            "objective": gathered(self.objective.state_dict()),
            "optimizer": gathered(self.optimizer.state_dict()),
            "stopping": {"lowest": self.lowest, "kept": self.kept, "best": self.best},
        }
        if self.folder and self.processes.rank == 0:
            write_whole(state, self.folder / "checkpoint.pt")
        self.processes.wait()

    def _restore(self, path):
        state = read_whole(path)
        check_unchanged(state, self.fixed, path)
        own = self.objective.state_dict()
        self.objective.load_state_dict(
            {k: split_like(v, own[k]) for k, v in state["objective"].items()}
        )
        params = [p for group in self.optimizer.param_groups for p in group["params"]]
        each = {
            i: {k: split_like(v, params[i]) for k, v in values.items()}
            for i, values in state["optimizer"]["state"].items()
        }
        self.optimizer.load_state_dict({**state["optimizer"], "state": each})
        self.step = state["step"]
        stopping = state["stopping"]
        self.lowest, self.kept, self.best = (stopping[k] for k in ("lowest", "kept", "best"))
        if self.processes.rank == 0:
            cut_after(self.folder / "log.jsonl", self.step)


def check_unchanged(old: dict, new: dict, path) -> None:
    """Refuse to continue with another plan, model or cohort, naming what differs."""
    names = [k.removeprefix("plan.") for k in differences({k: old.get(k) for k in new}, new)]
    changed = [k for k in names if k not in FREE]
    if changed:
        fact = f"Expected the settings of the run at '{path}', found other {listed(changed, 12)}"
        raise InputError(fact, "Resume with the same settings, or start in another folder")


def differences(old: dict, new: dict, prefix: str = "") -> list[str]:
    """Names of the settings that differ, those of parts as "part.name"."""
    names = []
    for k in {**old, **new}:
        a, b = (list(v) if isinstance(v, tuple) else v for v in (old.get(k), new.get(k)))
        if isinstance(a, dict) and isinstance(b, dict):
            names += differences(a, b, f"{k}.")
        elif a != b:
            names.append(prefix + k)
    return names


def read_whole(path):
    """The state that `write_whole` wrote."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        fact = f"Expected a whole checkpoint at '{path}', found a damaged one ({error})"
        raise InputError(fact, "Start again in another folder") from error


def write_whole(state, path) -> None:
    """Write a file whole or not at all."""
    part = path.with_suffix(".part")
    with names_what_failed(path):
        try:
            with open(part, "wb") as file:
                torch.save(state, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)
