"""Fine-tuning: the harmonizer and a fresh head learn a label, fold by fold, to scores that stand
beside a probe's.

The encoders stay frozen, so their tokens are computed once for all folds and epochs. An epoch is
decided by its number alone, so that a run that was killed goes on as if it had not been.
"""

from __future__ import annotations

import json
import math
from copy import deepcopy
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
import torch
import xarray as xr
import zarr
from torch import nn
from torch.nn import functional as F
from tqdm.auto import tqdm

from bhx.encode.embed import embed
from bhx.encode.inputs import Reading, autocast, sequences
from bhx.encode.model import Model
from bhx.errors import InputError, listed
from bhx.evaluate.features import nothing
from bhx.evaluate.folds import inner_splits
from bhx.evaluate.probe import probe, provenance_of
from bhx.evaluate.task import codes_of, participants_of, plan_of, rescored
from bhx.schema import check, subject_coords
from bhx.settings import __version__
from bhx.train.loop import check_unchanged, read_whole, schedule, write_whole
from bhx.train.objectives import digest
from bhx.train.recipes import Recipe

TRAINS = ("all", "last block", "head only")
TOKENS = ("dynamics", "structure")


@dataclass(frozen=True)
class FineTuning:
    """Settings of fine-tuning: the paper's, and from `batch` on our own where it gives none."""

    trains: str = "all"
    seed: int = 0
    epochs: int = 50
    rate: float = 5e-4  # of the head, the highest
    layer_decay: float = 0.65  # factor of the rate from each layer to the one below
    drop_path: float = 0.1  # of the last block; grows evenly from 0 at the first
    smoothing: float = 0.1  # of labels
    batch: int = 16  # subjects
    decay: float = 0.05  # of weights
    warmup: float = 0.1  # share of the steps; then cosine to 0
    clip: float = 1.0  # norm of the gradient
    patience: int | None = 10  # epochs without a better loss on the inner split; None: no split
    precision: str = "float32"  # or "bfloat16"
    tokens_at_once: int = 65536  # a batch above it is accumulated

    def __post_init__(self):
        for fits, name, wanted in (
            (self.trains in TRAINS, "trains", f"of {listed(TRAINS)}"),
            (0 < self.layer_decay <= 1, "layer_decay", "above 0 and at most 1"),
            (0 <= self.drop_path < 1, "drop_path", "from 0 to below 1"),
            (0 <= self.smoothing < 1, "smoothing", "from 0 to below 1"),
            (self.patience is None or self.patience >= 1, "patience", "as None or at least 1"),
            (0 < self.rate < math.inf, "rate", "above 0"),
            (self.clip > 0, "clip", "above 0"),
            (0 <= self.decay < math.inf, "decay", "of at least 0"),
        ):
            if not fits:
                found = repr(getattr(self, name))
                raise InputError(f"Expected {name} {wanted}, found {found}", "Change it")
        self.recipe(self.epochs)

    def recipe(self, steps):
        """The settings that pretraining has, too, for `training.schedule`; they are checked."""
        names = ("seed", "batch", "warmup", "clip", "precision", "tokens_at_once")
        same = {name: getattr(self, name) for name in names}
        return Recipe("harmonizer", steps, rate=(0.0, self.rate, 0.0), **same)


def fine_tune(
    cohort: xr.Dataset,
    model: Model,
    target: str,
    *,
    trains: str = "all",
    groups: str | None = None,
    stratify: str | None = None,
    task: str | None = None,
    classes=None,
    positive=None,
    protocol: str | None = None,
    folds: int = 5,
    repeats: int = 1,
    seed: int = 0,
    cache=None,
    out=None,
    resume: bool = False,
    progress: bool = True,
    **settings,
) -> xr.Dataset:
    """Train the harmonizer and a head on a label of the subjects, and test it on others.

    The head reads the mean of the hub tokens before the last norm, through a fresh LayerNorm and
    a linear layer. Both encoders stay frozen. Each fold starts from `model` again, is stopped by
    its loss on a fifth of its training participants, and only then sees its test subjects.

    Parameters
    ----------
    cohort : cohort Dataset; a subject may lack a modality
    model : what each fold starts from; computed on its device, and not changed
    target : name of a coordinate on subject; numbers are standardised on the rows trained on,
        and predicted in their own units
    trains : "all" of the harmonizer, its "last block", or the "head only"; the last two for small
        cohorts
    groups, stratify, task, classes, positive, protocol, folds, repeats, seed : as in `bhx.probe`,
        which makes the folds
    cache : path of a store for the encoders' tokens (26 MB a subject at base size), which every
        call with this cohort and model can share; without it they are held in memory
    out : folder to keep each fold's weights in, after every epoch
    resume : continue the run in `out`
    settings : any field of `FineTuning`, such as epochs=, rate=, patience=, precision=

    Returns
    -------
    Dataset
        Scores Dataset as of `bhx.probe`, for `bhx.compare` beside it, with `training_loss` and
        `inner_loss (model, fold, epoch)`, the `epoch_kept (model, fold)`, and `part (model, fold,
        subject)`: "train", "stop" (the inner split) or "test". The losses are cross-entropy in
        nats, or squared error over the variance of the rows trained on.

    Raises
    ------
    InputError
        Whatever `bhx.probe` and `bhx.embed` refuse; a setting out of range; `out` holds another
        run; a loss was not finite.
    """
    plan = _plan(trains=trains, seed=seed, **settings)
    base = probe(
        nothing(check(cohort, "cohort")), target, groups=groups, stratify=stratify, task=task,
        classes=classes, positive=positive, protocol=protocol, folds=folds, repeats=repeats,
        seed=seed,
    )  # fmt: skip
    if not resume and out is not None and Path(out, "fold_0.pt").exists():
        fact = f"Expected a folder without a run of fine_tune, found one at '{out}'"
        raise InputError(fact, "resume=True continues it; or give another folder")
    if out is not None:
        Path(out).mkdir(parents=True, exist_ok=True)
    tokens = _Tokens(cohort, model, plan, base.subject.values, cache, progress)
    run = _Run(base, tokens, model, None if out is None else Path(out))
    total = base.sizes["fold"] * plan.epochs
    with tqdm(total=total, desc=f"fine-tune, {trains}", unit="epoch", disable=not progress) as bar:
        return run.scores(base, [run.fold(i, bar) for i in range(base.sizes["fold"])])


def tuned_model(out, fold: int, model: Model) -> Model:
    """The model with the harmonizer that `fine_tune` kept of a fold (counted from 0) in `out`.

    `model` is the one it began with. What `bhx.embed` makes with it is explored as any latents.
    """
    networks = deepcopy(model.networks)
    networks.harmonizer = _kept(Path(out), fold, model)[0].harmonizer
    source = f"{model.provenance.get('source', '')}, fine-tuned, fold {fold}"
    networks.provenance = {"source": source, "weights_sha256": digest(networks)}
    return Model(networks, model.device)


def predict(out, fold: int, cohort: xr.Dataset, model: Model) -> xr.DataArray:
    """What the model that `fine_tune` kept of a fold in `out` says of the subjects of a cohort.

    Returns (subject, class): probabilities, or numbers in the target's units as the class "value".
    """
    tuned, state, plan = _kept(Path(out), fold, model)
    tokens = _Tokens(cohort, model, plan, cohort.subject.values)
    values = _said(tuned, tokens, np.arange(cohort.sizes["subject"]), state)
    coords = {**subject_coords(cohort), "class": state["classes"]}
    return xr.DataArray(values, coords, ("subject", "class"))


# What learns --------------------------------------------------------------------------------------


class Tuned(nn.Module):
    """A copy of a harmonizer, and the head on the mean of its hub tokens before the last norm."""

    def __init__(self, harmonizer, outputs: int, plan: FineTuning):
        super().__init__()
        self.harmonizer = deepcopy(harmonizer).requires_grad_(False)
        width, depth = harmonizer.config.width, len(harmonizer.blocks)
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.head = nn.Linear(width, outputs)
        nn.init.normal_(self.head.weight, std=2e-5)
        nn.init.zeros_(self.head.bias)
        self.first = {"all": 0, "last block": depth, "head only": depth + 1}[plan.trains]
        for layer in self.layers()[self.first :]:
            for parameter in layer:
                parameter.requires_grad_(True)
        for i, block in enumerate(self.harmonizer.blocks):
            learns = i + 1 >= self.first
            block.drop_path = learns * plan.drop_path * (i / (depth - 1) if depth > 1 else 1)

    def layers(self) -> list:
        """Parameters of each layer: what enters the harmonizer, its blocks, the head."""
        h = self.harmonizer
        enters = [h.cls_token, h.latent_tokens, h.enc_latent_token_positional_embedding]
        blocks = [list(block.parameters()) for block in h.blocks]
        return [enters, *blocks, [*self.norm.parameters(), *self.head.parameters()]]

    def pool(self, tokens, rows, owner, share):
        """Mean hub token (subject, width), over the windows of each subject by their share."""
        hub = self.harmonizer.encode(tokens, rows)[:, 1:].float().mean(1)
        return hub.new_zeros(int(owner[-1]) + 1, hub.shape[1]).index_add(0, owner, hub * share)

    def forward(self, pooled):
        """(subject, class) of pooled hub tokens (subject, width)."""
        return self.head(self.norm(pooled))

    def learnt(self) -> dict:
        """Copies of the parameters that learn, on the CPU."""
        return {k: p.detach().cpu().clone() for k, p in self.named_parameters() if p.requires_grad}


def optimiser_of(tuned: Tuned, plan: FineTuning):
    """AdamW whose groups say by "scale" what share of the rate each layer gets.

    The head has 1, each layer below `layer_decay` times that of the one above; biases and norms
    do not decay. Source of the rule: BEiT, arXiv 2106.08254.
    """
    layers, groups = tuned.layers(), []
    for i in range(tuned.first, len(layers)):
        scale = plan.layer_decay ** (len(layers) - 1 - i)
        for decay, kind in ((plan.decay, lambda p: p.ndim > 1), (0.0, lambda p: p.ndim <= 1)):
            params = list(filter(kind, layers[i]))
            groups.append({"params": params, "scale": scale, "weight_decay": decay})
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=plan.rate)


class _Tokens:
    """The frozen encoders' tokens of every subject, in the sequences that the harmonizer reads."""

    def __init__(self, cohort, model, plan, subjects, cache=None, progress=False):
        half = plan.precision
        made = embed(cohort, model, keep=TOKENS, store=cache, precision=half, progress=progress)
        self.config, self.device, self.plan = model.config, model.device, plan
        self.about = provenance_of(made)
        self.places = made.indexes["subject"].get_indexer(subjects)
        if cache is None:
            made = made.compute()
            self.arrays = [made[name].values for name in TOKENS]
        else:
            self.arrays = [zarr.open_group(cache, mode="r")[name] for name in TOKENS]
        self.pooled = None

    def raw(self, tuned, rows):
        """(subject, class) of these rows, before softmax or units."""
        with autocast(self.device, self.plan.precision):
            if self.plan.trains != "head only":
                return tuned(tuned.pool(*self._batch(rows))).float()
            if self.pooled is None:  # the same in every fold and epoch
                each = [tuned.pool(*self._batch([i])) for i in range(len(self.places))]
                self.pooled = torch.cat(each)
            return tuned(self.pooled[rows]).float()

    def _batch(self, rows):
        readings, dynamics, structure = zip(*map(self._read, rows), strict=True)
        tokens, at, owner = sequences(self.config, readings, dynamics, structure)
        lengths = [[len(k) for k in r.tokens if len(k)] or [1] for r in readings]
        share = [[n / sum(each)] for each in lengths for n in each]
        return tokens, at, *(torch.tensor(x, device=self.device) for x in (owner, share))

    def _read(self, i):
        """One subject's windows and cubes, those that are there, and their tokens."""
        at = self.places[i]
        dynamics, structure = (torch.from_numpy(x[at]).to(self.device) for x in self.arrays)
        structure = structure.flatten(0, 2)
        there = dynamics.isfinite().all(-1).any(0).nonzero()
        patches = int(there.max()) + 1 if len(there) else 0
        windows = math.ceil(patches / self.config.dynamics.max_patches)
        windows = dynamics[:, :patches].tensor_split(windows, 1) if windows else []
        kept = [w.isfinite().all(-1).flatten().nonzero().squeeze(1).cpu() for w in windows]
        cubes = structure.isfinite().all(-1).nonzero().squeeze(1).cpu()  # places index on the CPU
        each = [w.flatten(0, 1)[k] if len(k) else None for w, k in zip(windows, kept, strict=True)]
        return Reading(windows, kept, None, cubes), each, structure[cubes] if len(cubes) else None

    def parts(self, rows):
        """Rows in parts that are computed at once."""
        one = sum(math.prod(x.shape[1:-1]) for x in self.arrays)
        return np.array_split(rows, math.ceil(len(rows) / max(1, self.plan.tokens_at_once // one)))


# A run --------------------------------------------------------------------------------------------


class _Run:
    """All folds of a call: who trains, stops and is tested, and what is kept of each."""

    def __init__(self, base, tokens, model, folder):
        self.tokens, self.plan, self.model, self.folder = tokens, tokens.plan, model, folder
        self.truth, self.judge = codes_of(base), plan_of(base)
        self.classes = [str(c) for c in base["class"].values]
        self.notes = json.loads(base.attrs["notes"])
        tested = np.isfinite(base.output.values[0, :, :, 0])
        self.part = np.where(tested, "test", "train").astype("<U5")
        if self.plan.patience is not None:
            self._split_again(base)
        truth = {"target": base.attrs["target"], "truth": base.truth.values.tolist()}
        self.about = {
            "plan": {**asdict(self.plan), **truth},
            "config": asdict(model.config),
            "encoders": digest(model.networks),
            "subjects": base.subject.values.tolist(),
            "held_out": self.part.tolist(),
        }

    def _split_again(self, base):
        """Some participants of each training part only say when to stop: a fifth, or the share of
        the paper's 6:2:2."""
        folds = 4 if base.attrs["protocol"] == "paper" else 5
        people = participants_of(base)
        for name, part in zip(base.fold.values, self.part, strict=True):
            train = np.flatnonzero(part == "train")
            seed = self.plan.seed
            inner = inner_splits(train, self.truth, people, self.judge.names, seed, folds)
            part[inner[0][1] if inner else []] = "stop"
            if not inner:
                self.notes.append(f"fold {name}: too few of a label to stop early")

    def fold(self, i, bar):
        """Train, stop and test one fold, from where its checkpoint left it."""
        fit, stop, test = (np.flatnonzero(self.part[i] == p) for p in ("train", "stop", "test"))
        path = self.folder and self.folder / f"fold_{i}.pt"
        tuned, optimiser, state = self._restored(path, fit)
        bar.update(len(state["losses"]))
        while not self._done(state):
            loss = self._epoch(i, tuned, optimiser, fit, state)
            inner = math.nan  # nobody to stop by: the last epoch is kept
            if len(stop):
                inner = float(self._error(_seen(tuned, self.tokens, stop), stop, state)) / len(stop)
            if not math.isfinite(loss) or (len(stop) and not math.isfinite(inner)):
                epoch = len(state["losses"]) + 1
                found = f"{loss:g} and, on the inner split, {inner:g} in epoch {epoch} of fold {i}"
                raise InputError(f"Expected a finite loss, found {found}", "Set rate= lower")
            state["losses"].append((loss, inner))
            if not inner >= state["lowest"]:
                state |= {"lowest": inner, "kept": len(state["losses"]), "best": tuned.learnt()}
            if path:
                now = {"now": tuned.learnt(), "optimiser": optimiser.state_dict()}
                write_whole(state if self._done(state) else state | now, path)
            bar.set_postfix(fold=i, loss=f"{loss:.3f}", inner=f"{inner:.3f}", refresh=False)
            bar.update(1)
        bar.update(self.plan.epochs - len(state["losses"]))
        tuned.load_state_dict(state["best"], strict=False)
        return state, _said(tuned, self.tokens, test, state)

    def _restored(self, path, fit):
        with torch.random.fork_rng():
            torch.manual_seed(self.plan.seed)
            tuned = Tuned(self.model.networks.harmonizer, len(self.classes), self.plan)
        optimiser = optimiser_of(tuned.to(self.model.device), self.plan)
        if path and path.exists():
            state = read_whole(path)
            check_unchanged(state, self.about, path)
            if "now" in state:
                tuned.load_state_dict(state.pop("now"), strict=False)
                optimiser.load_state_dict(state.pop("optimiser"))
            return tuned, optimiser, state
        units, truth = None, self.truth[fit]
        if self.judge.names is None:
            units = (float(truth.mean()), float(truth.std()) or 1.0)
        state = {"losses": [], "lowest": math.inf, "kept": 0, "units": units}
        return tuned, optimiser, {**self.about, **state, "classes": self.classes}

    def _done(self, state):
        epochs = len(state["losses"])
        waited = self.plan.patience and epochs - state["kept"] >= self.plan.patience
        return epochs == self.plan.epochs or bool(waited)

    def _epoch(self, i, tuned, optimiser, fit, state):
        """One pass over the training rows in an order, and with drops, that its number decides."""
        epoch = len(state["losses"])
        random = np.random.default_rng([self.plan.seed, i, epoch])
        batches = np.array_split(random.permutation(fit), math.ceil(len(fit) / self.plan.batch))
        recipe = self.plan.recipe(len(batches) * self.plan.epochs)
        tuned.train()
        total = 0.0
        with torch.random.fork_rng():
            torch.manual_seed(int(random.integers(2**32)))
            for step, rows in enumerate(batches, epoch * len(batches)):
                for group in optimiser.param_groups:
                    group["lr"] = schedule(step, recipe)[0] * group["scale"]
                total += self._step(tuned, optimiser, rows, state)
        return total / len(fit)

    def _step(self, tuned, optimiser, rows, state):
        total = 0.0
        for part in self.tokens.parts(rows):
            loss = self._error(self.tokens.raw(tuned, part), part, state, self.plan.smoothing)
            (loss / len(rows)).backward()
            total += float(loss.detach())
        nn.utils.clip_grad_norm_(tuned.parameters(), self.plan.clip)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        return total

    def _error(self, raw, rows, state, smoothing=0.0):
        """Summed over rows: cross-entropy, or squared error in training standard deviations."""
        if self.judge.names is not None:
            truth = torch.tensor(self.truth[rows], device=raw.device)
            return F.cross_entropy(raw, truth, reduction="sum", label_smoothing=smoothing)
        middle, spread = state["units"]
        truth = ((self.truth[rows] - middle) / spread).astype(np.float32)
        return F.mse_loss(raw[:, 0], raw.new_tensor(truth), reduction="sum")

    def scores(self, base, found):
        """What was found in all folds, as `probe` would tell it."""
        output = np.full((*self.part.shape, len(self.classes)), np.nan, np.float32)
        decision = np.full(self.part.shape, -1)
        losses = np.full((1, len(found), self.plan.epochs, 2), np.nan)
        for i, (state, said) in enumerate(found):
            test = self.part[i] == "test"
            output[i, test], losses[0, i, : len(state["losses"])] = said, state["losses"]
            if self.judge.names is not None:
                seen = np.bincount(self.truth[self.part[i] == "train"])
                decision[i, test] = (said / (1 if base.attrs["protocol"] else seen)).argmax(1)
        name, dims = f"fine-tuned, {self.plan.trains}", ("model", "fold", "epoch")
        out = rescored(base, name, output, decision).assign(
            training_loss=(dims, losses[..., 0]),
            inner_loss=(dims, losses[..., 1]),
            epoch_kept=(dims[:2], [[state["kept"] for state, _ in found]]),
            part=(("model", "fold", "subject"), self.part[None]),
        )
        versions = {"bhx": __version__, "torch": torch.__version__.split("+")[0]}
        return out.assign_coords(epoch=np.arange(1, self.plan.epochs + 1)).assign_attrs(
            estimator=f"fine-tuning ({self.plan.trains}; frozen encoders)",
            settings=json.dumps(asdict(self.plan)),
            notes=json.dumps(self.notes),
            features=json.dumps({name: self.tokens.about}),
            versions=json.dumps(versions),
        )


@torch.no_grad()
def _seen(tuned, tokens, rows):
    """(subject, class) of these rows without drops."""
    tuned.eval()
    return torch.cat([tokens.raw(tuned, part) for part in tokens.parts(rows)])


def _said(tuned, tokens, rows, state):
    """(subject, class) of these rows: probabilities, or numbers in the target's units."""
    raw, units = _seen(tuned, tokens, rows), state["units"]
    return (raw.softmax(1) if units is None else raw * units[1] + units[0]).cpu().numpy()


def _plan(**settings):
    known = [f.name for f in fields(FineTuning)]
    if unknown := set(settings) - set(known):
        raise InputError(
            f"Expected settings of {listed(known, 30)}, found {listed(unknown)}", "Rename it"
        )
    return FineTuning(**settings)


def _kept(folder, fold, model):
    """The network of a finished fold, its state, and the settings of its run."""
    path = folder / f"fold_{fold}.pt"
    state = read_whole(path) if path.exists() else {}
    if "best" not in state or "now" in state or state["encoders"] != digest(model.networks):
        raise InputError(
            f"Expected a finished fold {fold} of this model in '{folder}', found none",
            "Give what out= named and the model that was fine-tuned; resume=True finishes a run",
        )
    plan = _plan(**{k: v for k, v in state["plan"].items() if k not in ("target", "truth")})
    tuned = Tuned(model.networks.harmonizer, len(state["classes"]), plan).to(model.device)
    tuned.load_state_dict(state["best"], strict=False)
    return tuned, state, plan
