"""Pretraining: one stage of a model trained on a cohort."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import asdict
from pathlib import Path

import torch

from bhx.data.atlas import atlas_of
from bhx.encode.embed import aligned_to
from bhx.encode.model import Model, config_of, load_model, random_model, reading_all_of, save_model
from bhx.encode.processes import gathered, own_device
from bhx.errors import InputError, listed
from bhx.model.checkpoints import read_weights
from bhx.model.config import PRESETS, Harmonix, HarmonixConfig
from bhx.model.hub import HubConfig
from bhx.settings import __version__
from bhx.train.dataset import Samples, held_out_rows, is_as_stored, opened
from bhx.train.log import read_log
from bhx.train.loop import Run, differences
from bhx.train.objectives import digest, objective_of
from bhx.train.recipes import recipe


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
        "harmonizer": a relational hub learns to place people in its mean token as they lie in
        their whole data, that of the preset "paper" to give tokens back. Encoders are frozen.
    out : folder of the run. The stages of one model share it: each begins with the weights that
        the one before left there. `<out>/<stage>/` holds the log and the checkpoint.
    preset : "workshop" (a hub without encoders: stage "harmonizer" alone), "small", "base" or
        "paper", with the parcels of the cohort's atlas, or a configuration of your own. Modalities
        of the cohort that it does not read are added; a relational hub leaves out those that
        nobody has
    model : where to begin instead: a Model, or what bhx.load_model takes
    subjects : ids to use, all by default
    held_out : share of the participants, or subject ids, that are evaluated and never trained on.
        The same share and seed hold out the same participants in every stage.
    resume : continue the run in `out` where its last checkpoint left it
    watch : called with the log (see `bhx.read_log`) and the model after every evaluation;
        `bhx.live` draws both in a notebook
    workers : processes that read ahead
    settings : any field of `bhx.Recipe`, such as steps=, batch=, seed=, precision=, compile=

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
    if not isinstance(model, Model | None):
        model = load_model(model, device=own_device(device))
    config = config_of(preset) if model is None else model.config
    own = isinstance(config.harmonizer, HubConfig) and config.name not in PRESETS
    plan = recipe(stage, "base" if own else config.name, **settings)
    cohort, path = opened(cohort, subjects)
    start = _starting_point(model, preset, cohort, Path(out), plan, own_device(device))
    aligned = aligned_to(cohort, start)
    path = path if is_as_stored(aligned, cohort) else None
    objective = objective_of(start.networks, plan).to(start.device)
    names = objective.names or tuple(start.config.modalities)
    samples = Samples(aligned, start.config, plan, names, objective.hide, path)
    train, test = held_out_rows(samples, held_out)
    ids = samples.labels.subject.values
    frozen = [m for m in start.config.modalities.values() if start.config.encodes(m)]
    encoders = [start.networks.encoder(m.name) for m in frozen]
    fixed = {
        "plan": plan.model_dump(),
        "config": asdict(start.config),
        "subjects": [str(s) for s in ids],
        "held_out": [str(ids[i]) for i in test],
        "encoders": digest(*encoders) if stage == "harmonizer" else "",
    }
    folder = Path(out) / stage
    shown = watch and (lambda run: watch(read_log(out, stage), start))
    options = {"workers": workers, "progress": progress, "watch": shown}
    run = Run(objective, samples, plan, folder, train, test, fixed, **options)
    run.go(resume)
    return _finished(run, start, Path(out))


def _finished(run, start, out) -> Model:
    """Write the model, with what made it, and hand it over."""
    networks = Harmonix(start.config)
    networks.load_state_dict(gathered(start.networks.state_dict()))
    if run.processes.rank == 0:
        labels = run.samples.labels
        stages = dict(start.provenance.get("stages", {}))
        stages[run.plan.stage] = {
            "recipe": run.plan.model_dump(),
            "cohort": {k: str(v) for k, v in labels.attrs.items() if k != "truth"},
            "subjects": len(run.train),
            "held_out": run.fixed["held_out"],
            **run.objective.record(),
            "versions": {"bhx": __version__, "torch": torch.__version__.split("+")[0]},
        }
        source = f"bhx.pretrain on {labels.attrs.get('source', 'a cohort')}"
        save_model(networks, out, {"source": source, "stages": stages})
    run.processes.wait()
    return Model(read_weights(out), start.device)


def _starting_point(model, preset, cohort, out, plan, device) -> Model:
    """The given model, the one an earlier stage left in `out`, or random weights."""
    config = config_of(preset)
    atlas = atlas_of(cohort) if isinstance(preset, str) and "roi" in cohort.dims else None
    if atlas is not None:
        config = config.on_atlas(atlas.attrs["atlas"], atlas.sizes["roi"])
    config = reading_all_of(config, cohort)
    there = read_weights(out) if (out / "config.json").exists() else None
    if isinstance(model, Model):
        start = Model(deepcopy(model.networks), device or model.device)
    elif there is not None:
        start = Model(there, device)
    elif plan.stage == "harmonizer" and any(map(config.encodes, config.modalities.values())):
        raise InputError(
            f"Expected encoders for the harmonizer in '{out}', found none",
            "Train the stages 'structure' and 'dynamics' there first, or give model=",
        )
    else:
        start = random_model(config, seed=plan.seed, device=device)
    wanted = config if model is None else start.config
    if there is not None and there.config != wanted:
        differing = listed(differences(asdict(there.config), asdict(wanted)))
        raise InputError(
            f"Expected a run of the model '{wanted.name}' in '{out}', found "
            f"'{there.config.name}' ({differing})",
            "Give another folder, or that model",
        )
    start.networks.requires_grad_(True)
    return start
