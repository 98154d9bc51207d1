"""Fine-tuning: the harmonizer and a fresh head learn a label, fold by fold, to scores that stand
beside a probe's.

The encoders stay frozen, so their tokens are computed once for all folds and epochs. Each fold is a
run of the one training loop, stopped by participants that it does not learn from.
"""

from __future__ import annotations

import json
import tempfile
from copy import deepcopy
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
import xarray as xr
from pydantic import Field
from tqdm.auto import tqdm

from bhx.encode.embed import aligned_to, embed
from bhx.encode.model import Model, check_model
from bhx.errors import InputError
from bhx.evaluate.probe import provenance_of
from bhx.evaluate.task import make_task
from bhx.model.layers import skip
from bhx.schema import check, subject_coords
from bhx.settings import __version__
from bhx.train.dataset import Samples, readable
from bhx.train.log import read_log
from bhx.train.loop import Run, read_whole
from bhx.train.objectives import LabelObjective, digest
from bhx.train.recipes import Count, Decays, Part, Patience, Rates, Recipe

_Factor = Annotated[float, Field(gt=0, le=1, description="a factor above 0 and at most 1")]


class FineTuning(Recipe):
    """Settings of fine-tuning: the paper's, and our own where it gives none. Those that are not
    named here are as in `bhx.Recipe`; `steps` follow from `epochs`."""

    stage: Literal["label"] = "label"
    trains: Literal["all", "last block", "head only"] = "all"
    epochs: Count = 50
    rate: Rates = (0.0, 5e-4, 0.0)  # of the head
    layer_decay: _Factor = 0.65  # of the rate, from each layer to the one below
    drop_path: Part = 0.1
    smoothing: Part = 0.1  # of labels
    batch: Count = 16
    decay: Decays = (0.05, 0.05)
    warmup: Part = 0.1
    patience: Patience = 10  # epochs without a lower inner loss
    precision: Literal["float32", "bfloat16"] = "float32"

    def for_rows(self, rows: int, keeps: bool) -> FineTuning:
        """The settings of a fold with so many rows to train on: an epoch is one pass; a checkpoint
        is kept after each, or after the last alone."""
        batch = min(self.batch, rows)
        epoch = rows // batch
        steps = self.epochs * epoch
        return self.model_copy(
            update={
                "batch": batch,
                "steps": steps,
                "evaluate_every": epoch,
                "checkpoint_every": epoch if keeps else steps,
                "patience": self.patience or self.epochs + 1,
            }
        )


def fine_tune(
    cohort: xr.Dataset,
    model: Model,
    target: str,
    *,
    groups: str | None = None,
    stratify: str | None = None,
    task: str | None = None,
    classes=None,
    protocol: str | None = None,
    split: xr.DataArray | None = None,
    folds: int | None = None,
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
    a linear layer. The encoders stay frozen. Each fold starts from `model` again, is stopped by
    its loss on a fifth of its training participants, and only then sees its test subjects.

    Parameters
    ----------
    cohort : cohort Dataset; a subject may lack a modality
    model : what each fold starts from; computed on its device, and not changed
    target : name of a coordinate on subject; numbers are standardized on the rows trained on,
        and predicted in their own units
    groups, stratify, task, classes, protocol, split, folds, repeats, seed : as in
        `bhx.probe`: the folds are the same
    cache : path of a store for the encoders' tokens (26 MB a subject at base size), which every
        call with this cohort and model can share; without it they are held in memory
    out : folder to keep each fold's weights in, after every epoch
    resume : continue the run in `out`
    settings : any field of `bhx.FineTuning`, such as trains=, epochs=, rate=, patience=

    Returns
    -------
    Dataset
        Scores Dataset as of `bhx.probe`, for `bhx.compare` beside it, with `training_loss` and
        `inner_loss (model, fold, epoch)`, the `epoch_kept (model, fold)`, and `part (model, fold,
        subject)`: "train", "stop" (the inner split), "test" or, of who was not used, "". The losses
        are cross-entropy in nats, or squared error over the variance of the rows trained on.

    Raises
    ------
    InputError
        Whatever `bhx.probe` and `bhx.embed` refuse; a setting out of range; `out` holds another
        run; a loss was not finite.
    """
    check_model(model)
    plan = FineTuning(seed=seed, **settings)
    chosen = make_task(
        check(cohort, "cohort"), target, groups=groups, stratify=stratify, task=task,
        classes=classes, protocol=protocol, split=split, folds=folds,
        repeats=repeats, seed=seed,
    )  # fmt: skip
    if not resume and out is not None and Path(out, "fold_0").exists():
        fact = f"Expected a folder without a run of fine_tune, found one at '{out}'"
        raise InputError(fact, "resume=True continues it; or give another folder")
    tokens = _Tokens(cohort, model, plan, cache, progress)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary if out is None else out)
        tuning = _Tuning(chosen, tokens, model, plan, folder, keeps=out is not None)
        bar = tqdm(chosen.folds(), "fine-tune", len(chosen.splits.names), disable=not progress)
        found = [tuning.fold(i, resume, *parts) for i, parts in enumerate(bar)]
        return tuning.scores(found)


def tuned_model(out, fold: int, model: Model) -> Model:
    """The model with the harmonizer that `fine_tune` kept of a fold (counted from 0) in `out`.

    `model` is the one it began with. What `bhx.embed` makes with it is explored as any latents.
    """
    networks = deepcopy(model.networks)
    networks.harmonizer = _kept(out, fold, model)[0].harmonizer
    skip(networks.harmonizer, 0.0)
    source = f"{model.provenance.get('source', '')}, fine-tuned, fold {fold}"
    networks.provenance = {"source": source, "weights_sha256": digest(networks)}
    return Model(networks, model.device)


def predict(out, fold: int, cohort: xr.Dataset, model: Model) -> xr.DataArray:
    """What the model that `fine_tune` kept of a fold in `out` predicts for a cohort's subjects.

    Returns (subject, class): probabilities, or numbers in the target's units as the class "value".
    """
    objective, state, plan = _kept(out, fold, model)
    tokens = _Tokens(check(cohort, "cohort"), model, plan)
    values = tokens.outputs(objective, range(cohort.sizes["subject"]))
    coords = {**subject_coords(cohort), "class": state["classes"]}
    return xr.DataArray(values, coords, ("subject", "class"))


class _Tokens:
    """The frozen encoders' tokens of every subject, as samples for the loop."""

    def __init__(self, cohort, model, plan, cache=None, progress=False):
        keep = [m.tokens for m in model.config.modalities.values()]
        options = {"keep": keep, "precision": plan.precision, "progress": progress}
        made = embed(cohort, model, store=cache, **options)
        self.about = provenance_of(made)
        source = made.compute() if cache is None else str(cache)
        aligned = aligned_to(cohort, model)
        names = tuple(model.config.modalities)
        self.samples = Samples(
            aligned, model.config, plan, names, LabelObjective.hide, tokens=source
        )
        self.pooled = {}  # row -> mean hub token, where the harmonizer does not learn

    @torch.no_grad()
    def outputs(self, objective, rows) -> np.ndarray:
        """(row of the cohort, class): probabilities, or numbers in the target's units."""
        objective.eval()
        each = []
        for row in rows:
            sample = readable(self.samples[-1, int(row)])
            each.append(objective.outputs([sample.to(objective.head.weight.device)]))
        raw, units = torch.cat(each).cpu(), objective.units
        return (raw.softmax(1) if units is None else raw * units[1] + units[0]).numpy()


class _Tuning:
    """All folds of a call."""

    def __init__(self, task, tokens, model, plan, folder, keeps):
        self.task, self.tokens, self.model, self.plan = task, tokens, model, plan
        self.folder, self.keeps = folder, keeps
        labels, entered = tokens.samples.labels, task.rows.labels.subject
        self.rows = labels.indexes["subject"].get_indexer(entered)  # of the cohort
        self.truth = np.zeros(labels.sizes["subject"], task.truth.dtype)
        self.truth[self.rows] = task.truth
        self.part = np.full((len(task.splits.names), len(task.truth)), "", "<U5")

    def fold(self, i, resume, train, test, validation):
        """Train, stop and test one fold, from where its checkpoint left it."""
        fit, stop = train, train[:0]
        if self.plan.patience is not None:
            fit, stop = self.task.stopping_split(train, validation)
            if not len(stop):
                name = self.task.splits.names[i]
                self.task.splits.notes.append(f"fold {name}: too few of a label to stop early")
        for name, rows in {"train": fit, "stop": stop, "test": test}.items():
            self.part[i, rows] = name
        plan, folder = self.plan.for_rows(len(fit), self.keeps), self.folder / f"fold_{i}"
        truth, units = self.task.truth[fit], None
        if self.task.names is None:
            units = (float(truth.mean()), float(truth.std()) or 1.0)
        options = {"truth": self.truth, "outputs": len(self.task.classes), "units": units}
        objective = _label_objective(self.model, plan, **options, pooled=self.tokens.pooled)
        samples = self.tokens.samples.with_plan(plan)
        fixed = {
            "plan": plan.model_dump(),
            "config": asdict(self.model.config),
            "encoders": digest(self.model.networks),
            "subjects": [str(s) for s in self.task.rows.labels.subject.values],
            "target": self.task.target,
            "truth": self.task.truth.tolist(),
            "part": self.part[i].tolist(),
            "classes": self.task.classes,
            "units": units,
        }
        run = Run(objective, samples, plan, folder, self.rows[fit], self.rows[stop], fixed)
        run.go(resume)
        log = read_log(self.folder, folder.name)
        output = self.tokens.outputs(objective, self.rows[test])
        return log, run.kept // plan.evaluate_every, output

    def scores(self, found) -> xr.Dataset:
        """What was found in all folds, as `probe` would give it."""
        output, decision = self.task.empty()
        losses = np.full((2, 1, len(found), self.plan.epochs), np.nan)
        for i, (log, _, values) in enumerate(found):
            test, trained = self.part[i] == "test", self.part[i] == "train"
            output[i, test] = values
            decision[i, test] = self.task.decide(values, self.task.truth[trained])
            each = log.loss.values.reshape(len(log.evaluation), -1).mean(1)
            losses[0, 0, i, : len(each)] = each
            if "held_out_loss" in log:
                losses[1, 0, i, : len(each)] = log.held_out_loss
        name, dims = f"fine-tuned, {self.plan.trains}", ("model", "fold", "epoch")
        versions = {"bhx": __version__, "torch": torch.__version__.split("+")[0]}
        out = self.task.scores(
            name, output, decision,
            estimator=f"fine-tuning ({self.plan.trains}; frozen encoders)",
            settings=json.dumps(self.plan.model_dump()),
            features=json.dumps({name: self.tokens.about}),
            versions=json.dumps(versions),
        )  # fmt: skip
        return out.assign(
            training_loss=(dims, losses[0]),
            inner_loss=(dims, losses[1]),
            epoch_kept=(dims[:2], [[kept for _, kept, _ in found]]),
            part=(("model", "fold", "subject"), self.part[None]),
        ).assign_coords(epoch=np.arange(1, self.plan.epochs + 1))


def _label_objective(model, plan, **options):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(plan.seed)
        return LabelObjective(model.networks, plan, **options).to(model.device)


def _kept(out, fold, model):
    """The objective of a finished fold, its state, and the settings of its run."""
    path = Path(out) / f"fold_{fold}" / "checkpoint.pt"
    state = read_whole(path) if path.exists() else {}
    plan = FineTuning(**state["plan"]) if "plan" in state else None
    ended = plan and (state["step"] == plan.steps or _stopped(state, plan))
    if not ended or state["encoders"] != digest(model.networks):
        raise InputError(
            f"Expected a finished fold {fold} of this model in '{out}', found none",
            "Give what out= named and the model that was fine-tuned; resume=True finishes a run",
        )
    options = {"truth": None, "outputs": len(state["classes"]), "units": state["units"]}
    objective = _label_objective(model, plan, **options)
    objective.load_state_dict(state["stopping"]["best"] or state["objective"], strict=False)
    return objective, state, plan


def _stopped(state, plan):
    return state["step"] - state["stopping"]["kept"] >= plan.patience * plan.evaluate_every
