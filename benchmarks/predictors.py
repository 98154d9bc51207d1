"""Held-out errors of a pretrained model beside predictors that anybody could write down.

Everything is fitted on training subjects and measured on held-out ones. A network that does not
beat these has learned nothing about individual brains.
"""

from __future__ import annotations

from copy import deepcopy
from functools import reduce
from pathlib import Path

import numpy as np
import torch
import xarray as xr
from scipy import ndimage
from torch.nn import functional as F

from bhx.encode.embed import aligned_to
from bhx.encode.inputs import encode_readings, sequences
from bhx.encode.model import Model
from bhx.errors import InputError, listed
from bhx.modalities.bold import BOLD
from bhx.modalities.t1 import ANATOMY, cubes, volume
from bhx.model.config import load_strictly
from bhx.model.layers import normalized as normalized_cubes
from bhx.model.structure import reconstruct
from bhx.train.dataset import Samples, held_out_rows, is_as_stored, opened
from bhx.train.loop import read_whole
from bhx.train.objectives import OBJECTIVES
from bhx.train.recipes import STAGES, recipe

FITTED = 128  # training subjects at most that a predictor is fitted on


def held_out_errors(
    cohort, model: Model, *, stages=STAGES, held_out=None, subjects=None, run=None, seed: int = 0
) -> xr.Dataset:
    """What a model gets wrong on subjects it never saw, beside simple predictors.

    Parameters
    ----------
    cohort : Dataset or path of a store; the one of the pretraining
    model : with trained weights (bhx.load_model)
    stages : which of "structure", "dynamics", "harmonizer"
    held_out : subject ids (or a share of the participants); those of each stage's pretraining by
        default. Other subjects are training subjects, at most 128 of which are used.
    subjects : ids to use, all by default
    run : folder given to bhx.pretrain: its checkpoint of the dynamics holds the student, whose
        context the predictor was trained on. Without it the teacher gives the context, which it
        does poorly after a short training.
    seed : of the masks

    Returns
    -------
    xarray.Dataset
        One `row` a predictor with the labels `stage`, `target` and `predictor`: `error`, the mean
        squared error over hidden tokens, channels and held-out subjects; `explained`, 1 - error /
        (error of the first predictor of that target); `floats` a subject, for the harmonizer.

        structure (cubes normalized by their own mean and deviation): zero, the mean cube of each
        place, interpolation of the voxels from visible ones (Gaussian weights, half a cube wide;
        scaled by one number fitted on training subjects), the network.
        dynamics (the teacher's tokens, normalized over channels): the mean token of each place,
        the last value (nearest visible patch of the same parcel), the parcel's mean visible patch
        (both: mean of all visible tokens where a parcel has none), the network.
        harmonizer (the encoders' tokens of the first window): the mean token of each place, PCA
        of tokens (each token less its place's mean on the k first axes, k the largest with
        k x tokens <= floats of CLS and hub), PCA of subjects (all tokens of a modality as one
        vector, at most one axis fewer than training subjects), the network. Only subjects with
        every modality, and only places that all of them have.
    """
    rows = []
    for stage in stages:
        samples = _samples_of(stage, cohort, model, subjects, seed)
        train, test = held_out_rows(samples, _held_out(model, stage, held_out))
        train = np.random.default_rng(seed).permutation(train)[:FITTED]
        with torch.no_grad():
            found = _MEASURES[stage](samples, model, train, test, run)
            rows += [{"stage": stage} | row for row in found]
    return _table(rows)


def _samples_of(stage, cohort, model, subjects, seed):
    """Whole scans as this stage reads and masks them."""
    plan = recipe(stage, seed=seed, crop=False, decimate=(1,), drop_modality=0.0)
    cohort, path = opened(cohort, subjects)
    aligned = aligned_to(cohort, model)
    path = path if is_as_stored(aligned, cohort) else None
    objective = OBJECTIVES[stage]
    names = objective.names or tuple(model.config.modalities)
    return Samples(aligned, model.config, plan, names, objective.hide, path)


def _held_out(model, stage, held_out):
    if held_out is not None:
        return held_out
    made = model.provenance.get("stages", {})
    if stage not in made:
        fact = f"Expected a model whose stage '{stage}' was pretrained, found the stages "
        fact += f"{listed(made) or 'none'}"
        raise InputError(fact, "Give held_out=, the subjects that it never saw")
    return made[stage]["held_out"]


def _table(rows):
    out = xr.Dataset({key: ("row", [row[key] for row in rows]) for key in rows[0]})
    names = {"error": "mean squared error", "explained": "share of the first predictor's error"}
    for k, name in names.items():
        out[k].attrs["long_name"] = name
    return out.set_coords(["stage", "target", "predictor", "subjects"])


def _rows(target, sums, subjects, floats=None):
    """Rows of one target from predictor -> list of a mean squared error each subject."""
    errors = {name: float(np.mean(values)) for name, values in sums.items()}
    first = next(iter(errors.values()))
    return [
        {
            "target": target, "predictor": name, "error": error, "explained": 1 - error / first,
            "subjects": subjects, "floats": (floats or {}).get(name, np.nan),
        }
        for name, error in errors.items()
    ]  # fmt: skip


def _each(samples, rows, device):
    for i in rows:
        sample = samples[-1, int(i)]
        if isinstance(sample, InputError):
            raise sample
        yield sample.to(device)


# Structure ---


def _structure(samples, model, train, test, run):
    c, networks = model.config.structure, model.networks
    mean, products = 0, np.zeros(2)
    for sample in _each(samples, train, model.device):
        voxels, hidden = sample.reading.windows[ANATOMY.name][0], sample.hidden["cubes"]
        target, gone = normalized_cubes(voxels), hidden.bool()
        mean = mean + target / len(train)
        guess = _interpolated(voxels, hidden, c)
        products += float((guess * target)[gone].sum()), float(guess[gone].pow(2).sum())
    scale = products[0] / max(products[1], 1e-30)
    errors = {}
    for sample in _each(samples, test, model.device):
        voxels, hidden = sample.reading.windows[ANATOMY.name][0], sample.hidden["cubes"]
        target, gone = normalized_cubes(voxels), hidden.bool()
        ways = networks.structure, networks.structure_decoder
        made = reconstruct(*ways, voxels[None], hidden[None])[0]
        for name, guess in (
            ("zero", torch.zeros_like(target)), ("mean cube of the place", mean),
            ("interpolated voxels", scale * _interpolated(voxels, hidden, c)), ("network", made),
        ):  # fmt: skip
            errors.setdefault(name, []).append(float((guess - target)[gone].pow(2).mean()))
    return _rows("hidden cubes", errors, len(test))


def _interpolated(voxels, hidden, config):
    """Every cube (cube, voxel) from the visible voxels around it, normalized like the targets."""
    there = (1 - hidden)[:, None].expand_as(voxels)
    kept, weight = (
        volume(x.cpu().numpy(), config.grid, config.cube) for x in (voxels * there, there)
    )
    blur = {"sigma": config.cube / 2, "mode": "nearest", "truncate": 6.0}
    kept, weight = (ndimage.gaussian_filter(x, **blur) for x in (kept, weight))
    filled = cubes(kept / (weight + 1e-9), config.cube)
    return normalized_cubes(torch.from_numpy(filled)).to(voxels)


# Dynamics ----


def _dynamics(samples, model, train, test, run):
    parcels, most = model.config.dynamics.parcels, model.config.dynamics.max_patches
    total = torch.zeros(parcels, most, model.config.dynamics.width, device=model.device)
    count = torch.zeros(most, 1, device=model.device)
    for sample in _each(samples, train, model.device):
        tokens = _targets(model, sample)
        total[:, : tokens.shape[1]] += tokens
        count[: tokens.shape[1]] += 1
    place = total / count.clamp(min=1)
    reader = model.networks.dynamics if run is None else _student(model, run)
    errors = {}
    for sample in _each(samples, test, model.device):
        target, (window,) = _targets(model, sample), sample.reading.windows[BOLD.name]
        keep, hide = sample.hidden["keep"], sample.hidden["hide"]
        context, _ = reader([window], [keep])
        made = model.networks.dynamics_predictor(context, [keep], [hide], [window.shape[1]])
        last, mean = _from_visible(target, keep, hide)
        flat = target.flatten(0, 1)[hide]
        for name, guess in (
            ("mean token of the place", place[:, : target.shape[1]].flatten(0, 1)[hide]),
            ("last value", last), ("mean patch", mean), ("network", made),
        ):  # fmt: skip
            errors.setdefault(name, []).append(float((guess - flat).pow(2).mean()))
    return _rows("hidden tokens", errors, len(test))


def _student(model, run):
    """The encoder that the predictor was trained beside, from the checkpoint of its run."""
    path = Path(run) / "dynamics" / "checkpoint.pt"
    if not path.exists():
        fact = f"Expected a checkpoint of the dynamics at '{path}', found none"
        raise InputError(fact, "Is this the folder of a run; leave run= out")
    state = read_whole(path)["objective"]
    student = deepcopy(model.networks.dynamics)
    own = {k.removeprefix("student."): v for k, v in state.items() if k.startswith("student.")}
    load_strictly(student, own, str(path))
    return student


def _targets(model, sample):
    """(parcels, patches, width) of the teacher, normalized over channels."""
    (window,) = sample.reading.windows[BOLD.name]
    tokens, _ = model.networks.dynamics([window])
    return F.layer_norm(tokens, tokens.shape[-1:], eps=1e-5).unflatten(0, window.shape[:2])


def _from_visible(target, keep, hide):
    """Hidden tokens guessed by the nearest visible patch, and by the mean visible patch, of their
    parcel; of two equally near patches the earlier one."""
    parcels, patches = target.shape[:2]
    seen = torch.zeros(parcels * patches, dtype=torch.bool, device=target.device)
    seen[keep] = True
    seen = seen.unflatten(0, (parcels, patches))
    everything = target[seen].mean(0)
    weight = seen.unsqueeze(-1).to(target)
    mean = (target * weight).sum(1) / weight.sum(1).clamp(min=1)
    row, column = hide // patches, hide % patches
    distance = (column[:, None] - torch.arange(patches, device=target.device)).abs().float()
    distance = distance.masked_fill(~seen[row], torch.inf)
    last = target[row, distance.argmin(1)]
    alone = ~seen.any(1)[row, None]
    return torch.where(alone, everything, last), torch.where(alone, everything, mean[row])


# Harmonizer ---


def _harmonizer(samples, model, train, test, run):
    harmonizer, sizes = model.networks.harmonizer, model.config.harmonizer
    train, test = _with_all(samples, train, 2), _with_all(samples, test, 1)
    found = _on_common_places([_tokens(samples, model, i) for i in (*train, *test)])
    fitted = {n: torch.stack([one[n][0] for one in found[: len(train)]]) for n in found[0]}
    place = {name: tokens.mean(0) for name, tokens in fitted.items()}  # (places, width)
    left = {name: tokens - place[name] for name, tokens in fitted.items()}
    floats, places = (1 + sizes.hubs) * sizes.width, sum(map(len, place.values()))
    k = floats // places
    every = torch.cat(list(left.values()), 1).flatten(0, 1)
    axes = torch.linalg.eigh(every.T @ every)[1].flip(1)[:, :k]
    people = {name: _axes_of_people(tokens) for name, tokens in left.items()}
    errors = {name: {} for name in place}
    for one in found[len(train) :]:
        subject = {name: (x.to(model.device), at.to(model.device)) for name, (x, at) in one.items()}
        made = harmonizer.decode(
            harmonizer.norm(harmonizer.encode([subject])), [harmonizer.rows(subject)]
        ).cpu()
        made = dict(zip(one, made.split([len(at) for _, at in one.values()]), strict=True))
        for name, (tokens, _) in one.items():
            target = tokens - place[name]
            subjects = people[name].T @ (people[name] @ target.flatten())
            for predictor, guess in (
                ("mean token of the place", torch.zeros_like(target)),
                ("PCA of tokens", target @ axes @ axes.T),
                ("PCA of subjects", subjects.view_as(target)),
                ("network", made[name] - place[name]),
            ):
                error = float((guess - target).pow(2).mean())
                errors[name].setdefault(predictor, []).append(error)
    sizes = {
        "mean token of the place": 0, "PCA of tokens": k * places, "network": floats,
        "PCA of subjects": sum(len(p) for p in people.values()),
    }  # fmt: skip
    names = {name: f"{m.tokens} tokens" for name, m in model.config.modalities.items()}
    return [row for n in errors for row in _rows(names[n], errors[n], len(test), sizes)]


def _with_all(samples, rows, least):
    chosen = [int(i) for i in rows if all(has[i] for has in samples.has.values())]
    if len(chosen) < least:
        fact = "Expected at least two training subjects and one held-out subject with "
        fact += f"{' and '.join(samples.has)}, found {len(chosen)}"
        raise InputError(fact, "Give more subjects, or other stages")
    return chosen


def _tokens(samples, model, i):
    """A subject's first window: modality -> (tokens (n, width), their places (n,))."""
    reading = samples.read(i, np.random.default_rng(0), one_window=False)
    for parts in (reading.windows, reading.there):
        parts.update({name: windows[:1] for name, windows in parts.items()})
    tokens = encode_readings(model.networks, [reading], model.device)
    (subject,) = sequences(model.config, [reading], tokens).subjects
    return {name: (x.float().cpu(), at.cpu()) for name, (x, at) in subject.items()}


def _on_common_places(subjects):
    """The tokens of the places that every subject has."""
    out = [{} for _ in subjects]
    for name in subjects[0]:
        common = torch.from_numpy(reduce(np.intersect1d, [one[name][1] for one in subjects]))
        for new, one in zip(out, subjects, strict=True):
            tokens, at = one[name]
            new[name] = tokens[torch.isin(at, common)], common
    return out


def _axes_of_people(left):
    """Orthonormal axes (at most subjects - 1, tokens x width) of centered subjects."""
    flat = left.flatten(1)
    values, vectors = torch.linalg.eigh(flat @ flat.T)
    kept = values > 1e-6 * values.max()
    return ((vectors[:, kept] / values[kept].sqrt()).T @ flat)[-(len(flat) - 1) :]


_MEASURES = {"structure": _structure, "dynamics": _dynamics, "harmonizer": _harmonizer}
