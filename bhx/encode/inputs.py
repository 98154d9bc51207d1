"""One subject's arrays, scaled and cut, to what the networks read, and what they give back."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from math import ceil

import numpy as np
import torch

from bhx.errors import InputError
from bhx.modalities.bold import BOLD
from bhx.modalities.t1 import scale_t1, t1_grid
from bhx.model.config import Harmonix, HarmonixConfig
from bhx.model.dynamics import patchify
from bhx.model.structure import cubes

CUBE_DIMS = ("cx", "cy", "cz")


@dataclass
class Reading:
    """One subject, scaled and cut: windows of patches (parcels, P, samples) with the tokens that
    can be computed of each, and a T1 (X, Y, Z) with its computable cubes."""

    windows: list
    tokens: list
    t1: torch.Tensor | None = None
    cubes: torch.Tensor | None = None


def read_subject(
    bold, tr, t1, config: HarmonixConfig, scaling="zscore", missing="refuse", names=()
):
    """Arrays of one subject, (parcels, volumes) and (X, Y, Z) or None, to a Reading."""
    reading = Reading([], [])
    if bold is not None:
        scaled = BOLD.scale(bold, scaling=scaling, missing=missing, names=names)
        reading.windows, reading.tokens = in_windows(scaled, tr, config.dynamics)
    if t1 is not None:
        reading.t1 = torch.from_numpy(scale_t1(t1, config.structure.voxel_mm))
        whole = cubes(reading.t1[None], config.structure.cube)[0].isfinite().all(-1)
        reading.cubes = whole.nonzero().squeeze(1)
    if not any(len(k) for k in reading.tokens) and (t1 is None or not len(reading.cubes)):
        raise InputError("Expected a subject with finite data, found none", "Leave it out")
    return reading


def in_windows(bold, tr, config):
    """Scaled series (parcels, volumes) in equal windows of at most `max_patches` patches, and the
    tokens of each that can be computed."""
    patches = patchify(torch.tensor(bold, dtype=torch.float32), tr, config)
    windows = patches.tensor_split(ceil(patches.shape[1] / config.max_patches), dim=1)
    return windows, [w.isfinite().all(-1).flatten().nonzero().squeeze(1) for w in windows]


def run_networks(networks: Harmonix, readings, device, want=(), attention="last"):
    """Readings of a batch to a list of dicts of float32 arrays: "hub" and what `want` names."""
    dynamics, structure = encode_parts(networks, readings, device)
    tokens, rows, owner = sequences(networks.config, readings, dynamics, structure)
    hub = networks.harmonizer(tokens, rows)[:, 1:].float().cpu()
    maps = networks.harmonizer.attention(tokens, rows, attention) if "attention" in want else None
    out = []
    for i, reading in enumerate(readings):
        mine = [j for j, o in enumerate(owner) if o == i]
        weight = torch.tensor([float(len(k)) for k in reading.tokens if len(k)] or [1.0])
        weight = weight / weight.sum()
        one = {"hub": (hub[mine] * weight[:, None, None]).sum(0).numpy()}
        if "dynamics" in want and dynamics[i]:
            one["dynamics"], one["valid"] = dynamics_array(networks.config, reading, dynamics[i])
        if "structure" in want and structure[i] is not None:
            one["structure"] = _structure_array(networks.config, reading, structure[i])
        if maps is not None:
            one |= _read_maps(networks.config, [(maps[j], rows[j]) for j in mine], weight)
        out.append(one)
    return out


def encode_parts(networks, readings, device):
    """Dynamics tokens of each subject's windows, and structure tokens of each subject."""
    return encode_windows(networks, readings, device), _encode_t1(networks, readings, device)


def encode_windows(networks, readings, device):
    """Packed dynamics tokens of each subject's windows, those that can be computed."""
    flat = [
        (w.nan_to_num().to(device), k.to(device))
        for r in readings
        for w, k in zip(r.windows, r.tokens, strict=True)
    ]
    flat = [(w, k) for w, k in flat if len(k)]
    done = iter(())
    if flat:
        tokens, lengths = networks.dynamics(*map(list, zip(*flat, strict=True)))
        done = iter(tokens.split(lengths))
    return [[next(done) if len(k) else None for k in r.tokens] for r in readings]


def _encode_t1(networks, readings, device):
    """Structure tokens of each subject; those with the same number of cubes together."""
    out = [None] * len(readings)
    groups = {}
    for i, r in enumerate(readings):
        if r.t1 is not None and len(r.cubes):
            groups.setdefault(len(r.cubes), []).append(i)
    for members in groups.values():
        t1 = torch.stack([readings[i].t1 for i in members]).nan_to_num().to(device)
        visible = torch.stack([readings[i].cubes for i in members]).to(device)
        for i, tokens in zip(members, networks.structure(t1, visible), strict=True):
            out[i] = tokens
    return out


def sequences(config, readings, dynamics, structure):
    """What the harmonizer reads: one sequence a window, each with the whole structure.

    Returns tokens [(n, width)], the rows of their positions [(n,)], and whose they are.
    """
    c, tokens, rows, owner = config.harmonizer, [], [], []
    for i, r in enumerate(readings):
        windows = [
            (x, c.dynamics_rows(w.shape[1])[k])
            for x, w, k in zip(dynamics[i], r.windows, r.tokens, strict=True)
            if x is not None
        ]
        cube = [] if structure[i] is None else [(structure[i], c.structure_rows()[r.cubes])]
        for window in windows or [None]:
            parts = ([window] if window else []) + cube
            tokens.append(torch.cat([p[0] for p in parts]))
            rows.append(torch.cat([p[1] for p in parts]).to(tokens[-1].device))
            owner.append(i)
    return tokens, rows, owner


def dynamics_array(config, reading, tokens):
    """(parcels, patches, width) joined over windows, NaN where nothing was computed; and the
    patches that are there."""
    parts = []
    for window, kept, x in zip(reading.windows, reading.tokens, tokens, strict=True):
        full = torch.full((window.shape[0] * window.shape[1], config.dynamics.width), torch.nan)
        if x is not None:
            full[kept] = x.float().cpu()
        parts.append(full.unflatten(0, window.shape[:2]))
    joined = torch.cat(parts, 1).numpy()
    return joined, np.isfinite(joined[..., 0]).any(0)


def _structure_array(config, reading, tokens):
    full = torch.full((config.structure.tokens, config.structure.width), torch.nan)
    full[reading.cubes] = tokens.float().cpu()
    return full.unflatten(0, config.structure.grid).numpy()


def _read_maps(config, maps, weight):
    """Attention of each window over its tokens, to parcels and cubes: shares that sum to 1."""
    c = config.harmonizer
    total = torch.zeros(c.hubs, 1 + c.data_tokens)
    for share, (one, rows) in zip(weight, maps, strict=True):
        total[:, rows.cpu()] += share * one.float().cpu()
    dynamics = total[:, 1 : 1 + c.parcels * c.max_patches].unflatten(1, (c.parcels, -1)).sum(-1)
    structure = total[:, 1 + c.parcels * c.max_patches :]
    return {
        "hub_to_roi": dynamics.numpy(),
        "hub_to_t1": structure.unflatten(1, config.structure.grid).numpy(),
        "modality_share": torch.stack([dynamics.sum(1), structure.sum(1)], 1).numpy(),
    }


def cube_coords(config):
    """MNI mm of the cubes' centres on cx, cy, cz."""
    s = config.structure
    grid = t1_grid(s.voxel_mm)
    return {
        dim: (dim, grid[axis].reshape(-1, s.cube).mean(1), {"units": "mm"})
        for dim, axis in zip(CUBE_DIMS, "xyz", strict=True)
    }


def autocast(device, precision):
    """The context in which a network computes at that precision."""
    if precision == "bfloat16":
        return torch.autocast(device.type, torch.bfloat16)
    return contextlib.nullcontext()
