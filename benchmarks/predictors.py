"""Held-out errors of a pretrained model beside predictors that anybody could write down.

Everything is fitted on training subjects and measured on held-out ones. A network that does not
beat these has learnt nothing about individual brains.
"""

from __future__ import annotations

from copy import deepcopy
from math import ceil
from pathlib import Path

import numpy as np
import torch
import xarray as xr
from torch.nn import functional as F

from bhx.encode.inputs import encode_parts, sequences
from bhx.encode.model import Model
from bhx.errors import InputError, listed
from bhx.model.checkpoints import load_strictly
from bhx.model.structure import cubes, normalised_cubes, reconstruct, volume
from bhx.train.dataset import NEEDS, Feed, held_out_rows, opened
from bhx.train.recipes import STAGES, recipe

FITTED = 128  # training subjects at most that a trivial predictor is fitted on


def held_out_errors(
    cohort, model: Model, *, stages=STAGES, held_out=None, subjects=None, run=None, seed: int = 0
) -> xr.Dataset:
    """What a model gets wrong on subjects it never saw, beside trivial predictors.

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

        structure (cubes normalised by their own mean and deviation): zero, the mean cube of each
        place, interpolation of the voxels from visible ones (Gaussian weights, half a cube wide;
        scaled by one number fitted on training subjects), the network.
        dynamics (the teacher's tokens, normalised over channels): the mean token of each place,
        the last value (nearest visible patch of the same parcel), the parcel's mean visible patch
        (both: mean of all visible tokens where a parcel has none), the network.
        harmonizer (the encoders' tokens of the first window): the mean token of each place, PCA
        of tokens (each token less its place's mean on the k first axes, k the largest with
        k x tokens <= floats of CLS and hub), PCA of subjects (all tokens of a modality as one
        vector, at most one axis fewer than training subjects), the network. Only subjects with
        both modalities, and only patches that all of them have.
    """
    rows = []
    for stage in stages:
        plan = recipe(stage, seed=seed, crop=False, decimate=(1,), drop_modality=0.0)
        aligned, path = opened(cohort, subjects, model)
        feed = Feed(aligned, model.config, plan, path)
        train, test = held_out_rows(feed, _held_out(model, stage, held_out))
        train = np.random.default_rng(seed).permutation(train)[:FITTED]
        with torch.no_grad():
            found = _MEASURES[stage](feed, model, train, test, run)
            rows += [{"stage": stage} | row for row in found]
    return _table(rows)


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


def _samples(feed, rows, device):
    for i in rows:
        sample = feed[-1, int(i)]
        if isinstance(sample, InputError):
            raise sample
        yield sample.to(device)


# Structure ---------------------------------------------------------------------------------------


def _structure(feed, model, train, test, run):
    c, networks = model.config.structure, model.networks
    mean, products = 0, np.zeros(2)
    for sample in _samples(feed, train, model.device):
        target = normalised_cubes(sample.reading.t1[None], c.cube)[0]
        mean = mean + target / len(train)
        guess, gone = _interpolated(sample, c), sample.hidden.bool()
        products += float((guess * target)[gone].sum()), float(guess[gone].pow(2).sum())
    scale = products[0] / max(products[1], 1e-30)
    errors = {}
    for sample in _samples(feed, test, model.device):
        target = normalised_cubes(sample.reading.t1[None], c.cube)[0]
        gone = sample.hidden.bool()
        ways = networks.structure, networks.structure_decoder
        made = reconstruct(*ways, sample.reading.t1[None], sample.hidden[None])[0]
        for name, guess in (
            ("zero", torch.zeros_like(target)), ("mean cube of the place", mean),
            ("interpolated voxels", scale * _interpolated(sample, c)), ("network", made),
        ):  # fmt: skip
            errors.setdefault(name, []).append(float((guess - target)[gone].pow(2).mean()))
    return _rows("hidden cubes", errors, len(test))


def _interpolated(sample, config):
    """Every cube from the visible voxels around it, normalised like the targets."""
    from scipy import ndimage

    voxels = cubes(sample.reading.t1[None], config.cube)
    there = (1 - sample.hidden)[None, :, None].expand_as(voxels)
    kept, weight = (
        volume(x, config.grid, config.cube)[0].cpu().numpy() for x in (voxels * there, there)
    )
    blur = {"sigma": config.cube / 2, "mode": "nearest", "truncate": 6.0}
    kept, weight = (ndimage.gaussian_filter(x, **blur) for x in (kept, weight))
    filled = kept / (weight + 1e-9)
    return normalised_cubes(torch.from_numpy(filled)[None], config.cube)[0].to(voxels)


# Dynamics ----------------------------------------------------------------------------------------


def _dynamics(feed, model, train, test, run):
    parcels, most = model.config.dynamics.parcels, model.config.dynamics.max_patches
    total = torch.zeros(parcels, most, model.config.dynamics.width, device=model.device)
    count = torch.zeros(most, 1, device=model.device)
    for sample in _samples(feed, train, model.device):
        tokens = _targets(model, sample)
        total[:, : tokens.shape[1]] += tokens
        count[: tokens.shape[1]] += 1
    place = total / count.clamp(min=1)
    reader = model.networks.dynamics if run is None else _student(model, run)
    errors = {}
    for sample in _samples(feed, test, model.device):
        target, (window,) = _targets(model, sample), sample.reading.windows
        (keep,), (hide,) = sample.keep, sample.hide
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
    state = torch.load(path, map_location=model.device, weights_only=True)["objective"]
    student = deepcopy(model.networks.dynamics)
    own = {k.removeprefix("student."): v for k, v in state.items() if k.startswith("student.")}
    load_strictly(student, own, str(path))
    return student


def _targets(model, sample):
    """(parcels, patches, width) of the teacher, normalised over channels."""
    (window,) = sample.reading.windows
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


# Harmonizer --------------------------------------------------------------------------------------


def _harmonizer(feed, model, train, test, run):
    h = model.config.harmonizer
    train, test = _with_both(feed, train, 2), _with_both(feed, test, 1)
    patches = min(_patches(feed, i) for i in (*train, *test))
    fitted = torch.stack([_tokens(feed, model, i, patches)[0] for i in train])  # (S, N, width)
    place = fitted.mean(0)
    is_t1 = h.is_structure(_tokens(feed, model, test[0], patches)[1]).cpu()
    floats = (1 + h.hubs) * h.width
    k = floats // len(place)
    centred = (fitted - place).flatten(0, 1)
    axes = torch.linalg.eigh(centred.T @ centred)[1].flip(1)[:, :k]
    parts = {"dynamics tokens": ~is_t1, "structure tokens": is_t1}
    people = {name: _axes_of_people((fitted - place)[:, part]) for name, part in parts.items()}
    errors = {name: {} for name in parts}
    for i in test:
        tokens, rows = _tokens(feed, model, i, patches)
        hub = model.networks.harmonizer([tokens.to(model.device)], [rows])
        made = model.networks.harmonizer.decode(hub, [rows]).cpu()
        left = tokens - place
        for name, part in parts.items():
            flat = left[part].flatten()
            for predictor, guess in (
                ("mean token of the place", torch.zeros_like(left[part])),
                ("PCA of tokens", left[part] @ axes @ axes.T),
                ("PCA of subjects", (people[name].T @ (people[name] @ flat)).view_as(left[part])),
                ("network", (made - place)[part]),
            ):
                error = float((guess - left[part]).pow(2).mean())
                errors[name].setdefault(predictor, []).append(error)
    sizes = {
        "mean token of the place": 0, "PCA of tokens": k * len(place), "network": floats,
        "PCA of subjects": sum(len(p) for p in people.values()),
    }  # fmt: skip
    return [row for name in parts for row in _rows(name, errors[name], len(test), sizes)]


def _with_both(feed, rows, least):
    chosen = [int(i) for i in rows if all(there[i] for there in feed.need.values())]
    if len(chosen) < least:
        fact = "Expected at least two training subjects and one held-out subject with "
        fact += f"{' and '.join(NEEDS['harmonizer'])}, found {len(chosen)}"
        raise InputError(fact, "Give more subjects, or other stages")
    return chosen


def _patches(feed, i):
    """Patches of the first of equal windows."""
    count, most = feed.config.dynamics.patch_count, feed.config.dynamics.max_patches
    whole = count(int(feed.labels.n_volumes.values[i]), float(feed.labels.tr.values[i]))
    return ceil(whole / ceil(whole / most))


def _tokens(feed, model, i, patches):
    """A subject's tokens (N, width) of the first patches and of the T1, and their rows."""
    reading = feed.read_whole(i)
    reading.windows, reading.tokens = reading.windows[:1], reading.tokens[:1]
    parts = encode_parts(model.networks, [reading], model.device)
    (tokens,), (rows,), _ = sequences(model.config, [reading], *parts)
    h = model.config.harmonizer
    kept = h.is_structure(rows) | ((rows - 1) % h.max_patches < patches)
    return tokens[kept].float().cpu(), rows[kept]


def _axes_of_people(left):
    """Orthonormal axes (at most subjects - 1, tokens x width) of centred subjects."""
    flat = left.flatten(1)
    values, vectors = torch.linalg.eigh(flat @ flat.T)
    kept = values > 1e-6 * values.max()
    return ((vectors[:, kept] / values[kept].sqrt()).T @ flat)[-(len(flat) - 1) :]


_MEASURES = {"structure": _structure, "dynamics": _dynamics, "harmonizer": _harmonizer}
