"""The relational hub: a few tokens that read each modality by an attention of its own.

Data tokens are not updated, so reading costs tokens x hubs; a modality that a subject does not have
is a reading that is not added. What the hub tokens are trained for is in `train/objectives.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from bhx.errors import InputError, check_choice
from bhx.model.layers import ATTENTIONS, Block, TokenPlaces, attention_weights


@dataclass(frozen=True)
class HubConfig(TokenPlaces):
    """Sizes of a relational hub; `gain` scales its sketch."""

    width: int = 96
    depth: int = 2
    heads: int = 8
    gain: float = 2.0
    kind: str = "relational"


class Reading(nn.Module):
    """Attention of hub tokens (B, hubs, width) to packed tokens (N, width), `lengths` a subject."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(width, width)
        self.key_value = nn.Linear(width, 2 * width)
        self.proj = nn.Linear(width, width)
        with torch.no_grad():
            self.query.weight.mul_(3)  # places are told apart from the start

    def forward(self, hub, x, lengths):
        q, k, v = self._split(hub, x)
        if len(set(lengths)) == 1:
            parts = [(q, *(t.unflatten(0, (len(lengths), -1)) for t in (k, v)))]
        else:
            each = (t.split(list(lengths)) for t in (k, v))
            parts = [(a[None], b[None], c[None]) for a, b, c in zip(q, *each, strict=True)]
        mixed = [
            F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in part)) for part in parts
        ]
        return self.proj(torch.cat(mixed).transpose(1, 2).flatten(2))

    def weights(self, hub, x, lengths):
        """Attention (hubs, n) to the tokens of each subject, the mean of the heads."""
        q, k, _ = self._split(hub, x)
        pairs = zip(q, k.split(list(lengths)), strict=True)
        return [attention_weights(a, b).mean(0) for a, b in pairs]

    def _split(self, hub, x):
        heads = (self.heads, -1)
        key, value = self.key_value(x).chunk(2, -1)
        return (t.unflatten(-1, heads) for t in (self.query(hub), key, value))


class HubLayer(nn.Module):
    """Hub tokens read every modality, then each other."""

    def __init__(self, config: HubConfig):
        super().__init__()
        c = config
        self.norm_hub, self.norm_data = nn.LayerNorm(c.width), nn.LayerNorm(c.width)
        self.readings = nn.ModuleDict({name: Reading(c.width, c.heads) for name in c.modalities})
        self.block = Block(c.width, c.heads)

    def forward(self, hub, data):
        """Hub tokens (B, hubs, width); `data` is what `Hub.gather` gives."""
        for rows, read in self.read(hub, data).values():
            hub = hub.index_add(0, rows, read.to(hub.dtype))
        return self.block(hub.flatten(0, 1), len(hub) * (hub.shape[1],)).view_as(hub)

    def read(self, hub, data):
        """Modality -> the subjects who have it, and what their hub tokens take from it."""
        asked = self.norm_hub(hub)
        return {
            name: (rows, self.readings[name](asked[rows], self.norm_data(x), lengths))
            for name, (rows, x, lengths) in data.items()
        }


class Hub(nn.Module):
    """Subjects' data tokens to hub tokens.

    A batch is a list of subjects; a subject is a dict: modality -> tokens and the places (n,) that
    they take among the modality's. Tokens (n, width) are read by attention; those of a linear
    embedding are (n, 2 width), and their second half goes through the sketch: fixed weights
    (hubs, places) that sum to zero over the hub tokens. So the mean hub token, by which people are
    compared, does not depend on it, and no training can take from all hub tokens together who a
    person is.
    """

    def __init__(self, config: HubConfig):
        super().__init__()
        c = config
        self.config = config
        self.tokens = nn.Parameter(torch.randn(c.hubs, c.width))
        places = zip(c.modalities, c.places, strict=True)
        self.places = nn.ParameterDict(
            {m: nn.Parameter(torch.randn(n, c.width)) for m, n in places}
        )
        self.blocks = nn.ModuleList(HubLayer(c) for _ in range(c.depth))
        self.norm = nn.LayerNorm(c.width)
        for name, n, numbers in zip(c.modalities, c.places, c.numbers, strict=True):
            if numbers:
                self.register_buffer(f"sketch_{name}", zero_sum(c.hubs, n))
        self.decoder_places = nn.ParameterDict({m: p.clone() for m, p in self.places.items()})
        self.decoder = Reading(c.width, c.heads)
        self.decoder_norm, self.decoder_out = nn.LayerNorm(c.width), nn.Linear(c.width, c.width)

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return self.tokens.device

    def entries(self) -> list[nn.Parameter]:
        """Parameters of what enters the first block."""
        return [self.tokens, *self.places.values()]

    def forward(self, subjects):
        """Hub tokens (B, hubs, width) after the norm, with the sketch."""
        out = list(self.read(subjects))
        for i, subject in enumerate(subjects):
            for name, (x, at) in subject.items():
                fixed = x[:, self.config.width :]
                if fixed.shape[1]:
                    sketch = getattr(self, f"sketch_{name}")[:, at]
                    out[i] = out[i] + self.config.gain * (sketch @ fixed)
        return torch.stack(out)

    def pooled(self, subjects):
        """The mean hub token (B, width) of each subject."""
        return self.read(subjects).mean(1)

    def read(self, subjects):
        """Hub tokens (B, hubs, width) after the norm, without the sketch."""
        data, hub = self.gather(subjects), self.tokens.expand(len(subjects), -1, -1)
        for block in self.blocks:
            hub = block(hub, data)
        return self.norm(hub)

    def gather(self, subjects):
        """Modality -> the subjects (rows) who have it, their packed tokens with places, lengths."""
        if not all(subjects):
            raise InputError("Expected a subject with data tokens, found none", "Leave it out")
        data = {}
        for name, places in self.places.items():
            rows = [i for i, subject in enumerate(subjects) if name in subject]
            if rows:
                each = [subjects[i][name] for i in rows]
                x = torch.cat([x[:, : self.config.width] for x, _ in each])
                x = x + places[torch.cat([at for _, at in each])]
                index = torch.tensor(rows, device=x.device)
                data[name] = index, x, tuple(len(at) for _, at in each)
        return data

    @torch.no_grad()
    def attention(self, subjects, method: str = "last"):
        """How much each hub token reads each data token: [modality -> (hubs, n)] of each subject.

        The attention to each modality, times the share that its reading has in the length of all
        readings; so over all modalities each row sums to 1. `method` is "last" (layer), "mean"
        (over layers), or "rollout": what hub tokens read of each other is traced, too.
        """
        check_choice("attention", method, ATTENTIONS)
        data, hub = self.gather(subjects), self.tokens.expand(len(subjects), -1, -1)
        out: list[dict] = [{} for _ in subjects]
        for _depth, block in enumerate(self.blocks):
            if method == "last":
                out = [{} for _ in subjects]
            each = self._shares(block, hub, data)
            new, mixing = block(hub, data), self._mixing(block, hub, data, method)
            for i, maps in enumerate(each):
                for name, weights in maps.items():
                    out[i][name] = mixing[i] @ (out[i].get(name, 0) + weights)
            hub = new
        layers = 1 if method == "last" else len(self.blocks)
        return [{name: x / layers for name, x in one.items()} for one in out]

    def _shares(self, block, hub, data):
        """Attention of one layer by subject and modality, weighted by what was taken from each."""
        read = block.read(hub, data)
        total = hub.new_zeros(*hub.shape[:2], 1)
        for rows, taken in read.values():
            total = total.index_add(0, rows, taken.norm(dim=-1, keepdim=True))
        out: list[dict] = [{} for _ in hub]
        for name, (rows, x, lengths) in data.items():
            asked, x = block.norm_hub(hub)[rows], block.norm_data(x)
            share = read[name][1].norm(dim=-1, keepdim=True) / total[rows]
            weights = block.readings[name].weights(asked, x, lengths)
            for row, weight, part in zip(rows.tolist(), weights, share, strict=True):
                out[row][name] = weight * part
        return out

    def _mixing(self, block, hub, data, method):
        """How hub tokens pass on what they read within a layer: (hubs, hubs) of each subject."""
        own = torch.eye(hub.shape[1], device=hub.device)
        if method != "rollout":
            return [own] * len(hub)
        for rows, read in block.read(hub, data).values():
            hub = hub.index_add(0, rows, read.to(hub.dtype))
        lengths = (hub.shape[1],) * len(hub)
        weights = block.block.weights(hub.flatten(0, 1), lengths, slice(None))
        return [(own + w.mean(0)) / 2 for w in weights]

    def losses(self, hub, targets):
        """The mean squared error of tokens that are decoded from hub tokens (B, hubs, width), by
        modality, of the subjects who have it among their `targets`."""
        out = {}
        for name, places in self.decoder_places.items():
            rows = [i for i, subject in enumerate(targets) if name in subject]
            errors = [hub.new_zeros(0)]
            if rows:
                asked = places.expand(len(rows), -1, -1)
                lengths = (hub.shape[1],) * len(rows)
                guess = asked + self.decoder(asked, hub[rows].flatten(0, 1), lengths)
                guess = self.decoder_out(self.decoder_norm(guess))
                for i, one in zip(rows, guess, strict=True):
                    x, at = targets[i][name]
                    errors.append((one[at] - x[:, -self.config.width :]).pow(2).mean()[None])
            out[f"loss_{name}"] = torch.cat(errors)
        return out


def zero_sum(hubs: int, places: int) -> torch.Tensor:
    """Random (hubs, places), orthonormal among the matrices whose columns sum to zero."""
    random = torch.randn(hubs, places)
    u, _, v = torch.linalg.svd(random - random.mean(0), full_matrices=False)
    k = min(hubs - 1, places)
    return u[:, :k] @ v[:k]
