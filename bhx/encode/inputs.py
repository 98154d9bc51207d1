"""From one subject's arrays to what the networks read, and from tokens back to arrays.

Everything walks over the model's modalities. Who the subjects are is not known here.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
import torch

from bhx.errors import InputError
from bhx.modalities.base import Modality
from bhx.model.config import Harmonix, HarmonixConfig


@dataclass
class Reading:
    """One subject, scaled and cut: of each modality its windows, tensors (*places, numbers) with 0
    where nothing was measured, and which of their tokens, counted flat, can be computed."""

    windows: dict[str, list[torch.Tensor]] = field(default_factory=dict)
    there: dict[str, list[torch.Tensor]] = field(default_factory=dict)

    def add(self, modality: Modality, windows: list[np.ndarray]) -> None:
        """Take the windows of a modality, NaN where nothing was measured."""
        each = [torch.from_numpy(np.ascontiguousarray(w, np.float32)) for w in windows]
        finite = [w.isfinite() for w in each]
        found = [w.any(-1) if modality.partial else w.all(-1) for w in finite]
        self.there[modality.name] = [w.flatten().nonzero().squeeze(1) for w in found]
        self.windows[modality.name] = each if modality.partial else [w.nan_to_num() for w in each]

    def __len__(self):
        """Tokens that can be computed."""
        return sum(len(at) for windows in self.there.values() for at in windows)


def read_subject(values: dict, facts, config: HarmonixConfig, **options) -> Reading:
    """Arrays of one subject to a Reading.

    Parameters
    ----------
    values : variable of the cohort -> array with the dims of its modality; what is absent is absent
    facts : the subject's coordinates by name, such as tr [s] and n_volumes
    options : scaling, missing and names, as of `Modality.scale`
    """
    reading, scaled = Reading(), {}  # once for all modalities that read a variable alike
    for modality in config.modalities.values():
        if modality.variable in values:
            alike = modality.variable, type(modality).scale
            if alike not in scaled:
                one = modality.trim(values[modality.variable], facts)
                scaled[alike] = modality.scale(one, config, **options)
            reading.add(modality, modality.cut(scaled[alike], facts, config))
    if not len(reading):
        raise InputError("Expected a subject with finite data, found none", "Leave it out")
    return reading


def encode_readings(networks: Harmonix, readings, device, made=None) -> list[dict[str, list]]:
    """Tokens (n, width) of every window of each modality of each subject; None of a window of
    which no token can be computed. Subjects are encoded together, and cannot see each other.
    What is in `made`, a dict of each subject such as those returned, is not encoded again."""
    made = made or [{}] * len(readings)
    out = [
        {name: [None] * len(w) for name, w in r.windows.items()} | done
        for r, done in zip(readings, made, strict=True)
    ]
    for name in networks.config.modalities:
        new = [i for i, r in enumerate(readings) if name in r.there and name not in made[i]]
        each = [(i, j) for i in new for j in range(len(readings[i].there[name]))]
        at = [(i, j) for i, j in each if len(readings[i].there[name][j])]
        if at:
            inputs = [readings[i].windows[name][j].to(device) for i, j in at]
            keep = [readings[i].there[name][j].to(device) for i, j in at]
            tokens, lengths = networks.encoder(name)(inputs, keep)
            for (i, j), part in zip(at, tokens.split(lengths), strict=True):
                out[i][name][j] = part
    return out


@dataclass
class Sequences:
    """What the harmonizer reads: for each window of each subject the tokens of every modality and
    the places they take, whose it is, and what share of its subject it stands for."""

    subjects: list[dict]
    owner: list[int]
    share: torch.Tensor


def sequences(config: HarmonixConfig, readings, tokens) -> Sequences:
    """One sequence a window; a modality that has one window only stands in each of them."""
    found, owner, share = [], [], []
    for i, (reading, mine) in enumerate(zip(readings, tokens, strict=True)):
        windows = max(map(len, mine.values()), default=1)
        each = []
        for j in range(windows):
            one, own = {}, 0
            for name, parts in mine.items():
                at = j if len(parts) > 1 else 0
                if parts[at] is not None:
                    there, shape = reading.there[name][at], reading.windows[name][at].shape[:-1]
                    places = torch.from_numpy(config.modalities[name].rows(config, shape))
                    places = places.to(there.device)[there].to(parts[at].device)
                    one[name] = parts[at], places
                    own += len(there) if len(parts) == windows else 0
            each.append((one, own))
        kept = [(one, n) for one, n in each if n] or [(each[0][0], 1)]  # windows with own tokens
        found += [one for one, _ in kept]
        owner += [i] * len(kept)
        share += [n / sum(m for _, m in kept) for _, n in kept]
    return Sequences(found, owner, torch.tensor(share))


def in_turns(costs, bound: int) -> list[slice]:
    """Slices of neighbours whose costs together stay within the bound, at least one in each."""
    starts, total = [0], 0
    for i, cost in enumerate(costs):
        if i > starts[-1] and total + cost > bound:
            starts, total = [*starts, i], 0
        total += cost
    return [slice(a, b) for a, b in pairwise([*starts, len(costs)])]


def made_before(config: HarmonixConfig, tokens: dict, device="cpu") -> Sequences:
    """What the harmonizer reads of one subject's tokens that were made before: of each modality
    its windows (*places, width), NaN where a token is not there."""
    reading, packed = Reading(), {}
    for name, windows in tokens.items():
        reading.add(config.modalities[name], windows)
        pairs = zip(reading.windows[name], reading.there[name], strict=True)
        flat = [w.flatten(0, -2)[at].to(device) for w, at in pairs]
        packed[name] = [x if len(x) else None for x in flat]
    return sequences(config, [reading], [packed])


def run_networks(networks: Harmonix, readings, device, want=(), attention="last") -> list[dict]:
    """Readings of a batch to a list of dicts of float32 arrays: "hub", the tokens that `want`
    names, and with "attention" the maps of every modality and "modality_share"."""
    config, tokens = networks.config, encode_readings(networks, readings, device)
    read = sequences(config, readings, tokens)
    hub = networks.harmonizer(read.subjects).float().cpu()
    with_maps = "attention" in want
    maps = networks.harmonizer.attention(read.subjects, attention) if with_maps else []
    out = []
    for i, (reading, mine) in enumerate(zip(readings, tokens, strict=True)):
        at = [j for j, owner in enumerate(read.owner) if owner == i]
        share = read.share[at]
        one = {"hub": (hub[at] * share[:, None, None]).sum(0).numpy()}
        for name, windows in mine.items():
            kept = config.modalities[name].tokens
            if kept in want and any(w is not None for w in windows):
                one[kept] = as_array(config, name, reading, windows)
        if with_maps:
            one |= _read_maps(config, [(maps[j], read.subjects[j]) for j in at], share)
        out.append(one)
    return out


def as_array(config: HarmonixConfig, name: str, reading: Reading, windows) -> np.ndarray:
    """Tokens of all windows of a modality (*token dims, width), NaN where none was computed."""
    parts, modality, width = [], config.modalities[name], config.harmonizer.width
    for inputs, at, tokens in zip(reading.windows[name], reading.there[name], windows, strict=True):
        full = torch.full((*inputs.shape[:-1], width), torch.nan)
        if tokens is not None:
            full.view(-1, width)[at] = tokens[:, :width].float().cpu()
        parts.append(full.numpy())
    return modality.join(parts, config)


def _read_maps(config, maps, share):
    """Attention of each window over its tokens, to the map of each modality; shares sum to 1."""
    out, shares = {}, []
    for name, modality in config.modalities.items():
        total = torch.zeros(config.harmonizer.hubs, config.places(name))
        for weight, (one, subject) in zip(share, maps, strict=True):
            if name in one:
                total[:, subject[name][1].cpu()] += weight * one[name].float().cpu()
        shares.append(total.sum(1))
        out[modality.map_name] = modality.to_map(total.numpy(), config)
    return out | {"modality_share": torch.stack(shares, 1).numpy()}
