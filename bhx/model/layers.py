"""What all three networks are built of: fixed positions, attention over packed tokens, the block.

Tokens of a batch lie end to end in one matrix (N, D), with the number of tokens of each sequence
beside it; nothing is padded, so no sequence can see or change another.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import nn
from torch.nn import functional as F

ATTENTIONS = ("last", "mean", "rollout")


@dataclass(frozen=True)
class TokenPlaces:
    """What hub tokens read: modalities in the order of their tokens; each has so many `places`, and
    where it has no encoder of its own, tokens of so many `numbers` (else 0)."""

    modalities: tuple[str, ...]
    places: tuple[int, ...]
    numbers: tuple[int, ...]
    hubs: int = 128

    @property
    def data_tokens(self) -> int:
        """Every place of every modality."""
        return sum(self.places)

    @property
    def first(self) -> dict[str, int]:
        """The row of each modality's first place, counted from 1 (0 is CLS)."""
        starts = accumulate(self.places, initial=1)
        return dict(zip(self.modalities, starts, strict=False))


def sincos(positions: torch.Tensor, channels: int) -> torch.Tensor:
    """Fixed positions (..., channels): [sin(p w_j) | cos(p w_j)], w_j = 10000^(-2 j / channels)."""
    half = channels // 2
    omega = 10000 ** (-torch.arange(half, dtype=torch.float64) / half)
    angle = positions.double().unsqueeze(-1) * omega
    return torch.cat([angle.sin(), angle.cos()], -1)


def packed_attention(q, k, v, lengths):
    """Attention inside each sequence of packed (N, heads, d) tensors; `lengths` sum to N."""
    if len(set(lengths)) == 1:
        q, k, v = (x.unflatten(0, (len(lengths), -1)).transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(0, 1)
    parts = zip(lengths, *(x.split(list(lengths)) for x in (q, k, v)), strict=True)
    return torch.cat([packed_attention(*one, (n,)) for n, *one in parts])


def attention_weights(q, k):
    """Softmax weights (heads, queries, keys) of q (queries, heads, d) and k (keys, heads, d)."""
    scores = torch.einsum("qhd,khd->hqk", q, k) * q.shape[-1] ** -0.5
    return scores.softmax(-1)


class Attention(nn.Module):
    """The projections of multi-head self-attention; q, k and v lie packed as (N, 3, heads, d)."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def split(self, x):
        """(N, D) -> q, k, v, each (N, heads, d)."""
        return self.qkv(x).unflatten(-1, (3, self.heads, -1)).unbind(-3)


class Block(nn.Module):
    """Pre-norm transformer block over packed tokens (N, D)."""

    def __init__(self, width: int, heads: int, mlp_ratio: float = 4.0, eps: float = 1e-6):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=eps)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=eps)
        hidden = int(width * mlp_ratio)
        fc1, fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.mlp = nn.Sequential(OrderedDict(fc1=fc1, gelu=nn.GELU(), fc2=fc2))
        self.drop_path = 0.0  # probability of skipping a branch for a whole sequence, in training

    def forward(self, x, lengths):
        q, k, v = self.before(x)
        return self.after(x, packed_attention(q, k, v, lengths), self._keep(x, lengths))

    def before(self, x):
        """All that comes ahead of the attention; like `after`, it sees tokens one by one."""
        return self.attn.split(self.norm1(x))

    def after(self, x, mixed, keep=None):
        """All that follows the attention; `keep` (2, N, 1) scales the two branches."""
        branch = self.attn.proj(mixed.flatten(1))
        x = x + (branch if keep is None else branch * keep[0])
        branch = self.mlp(self.norm2(x))
        return x + (branch if keep is None else branch * keep[1])

    def _keep(self, x, lengths):
        if not (self.training and self.drop_path):
            return None
        kept = torch.rand(2, len(lengths), 1, device=x.device) >= self.drop_path
        each = kept.repeat_interleave(torch.tensor(lengths, device=x.device), dim=1)
        return each.to(x) / (1 - self.drop_path)

    def weights(self, x, lengths, rows):
        """Attention weights of the query tokens `rows` (a slice) of each sequence.

        Returns a list of (heads, rows, length), one sequence at a time, computed explicitly:
        the fused kernel of `forward` never shows them.
        """
        q, k = (part.split(list(lengths)) for part in self.before(x)[:2])
        return [attention_weights(a[rows], b) for a, b in zip(q, k, strict=True)]


def run(blocks, x, lengths):
    """Send packed tokens (N, D) through blocks."""
    for block in blocks:
        x = block(x, lengths)
    return x


def skip(module: nn.Module, probability: float) -> None:
    """Let every block in a module skip a branch for a whole sequence, in training, so often."""
    for part in module.modules():
        if isinstance(part, Block):
            part.drop_path = probability


def normalized(x):
    """Each row (..., n) minus its mean, over the root of its unbiased variance + 1e-6."""
    mean, variance = x.mean(-1, keepdim=True), x.var(-1, keepdim=True)
    return (x - mean) / (variance + 1e-6).sqrt()


def initialize(module: nn.Module) -> None:
    """Xavier-uniform linear layers with zero biases, as in the MAE paper (arXiv 2111.06377)."""
    for part in module.modules():
        if isinstance(part, nn.Linear):
            nn.init.xavier_uniform_(part.weight)
            if part.bias is not None:
                nn.init.zeros_(part.bias)


def attend_alike(attention: Attention, score: float = 20.0) -> None:
    """Start an attention at "read tokens like your own": queries equal keys, up to a rotation, and
    what is read is handed on unchanged. A token scores `score` with itself before the softmax.

    Tokens of parcels that go up and down together then read each other from the first step, so
    coupling is in the tokens before anything is learned. Such starts resemble what attention looks
    like after long training (Trockman & Kolter, ICML 2023, arXiv 2305.09828).
    """
    width = attention.proj.weight.shape[0]
    with torch.no_grad():
        query, key, value = attention.qkv.weight.split(width)
        nn.init.orthogonal_(query, (score / (width / attention.heads) ** 0.5) ** 0.5)
        key.copy_(query)
        nn.init.orthogonal_(value)
        attention.proj.weight.copy_(value.T)


class LinearEmbedding(nn.Module):
    """Tokens of a modality without an encoder of its own: the numbers of each place, less their
    mean over people and over their deviation (`fit`), through one linear layer that begins
    orthonormal. Numbers that are missing (NaN) count as their mean.

    With `sketched` a second such layer, which never learns, is laid beside it: tokens (N, 2 width).
    """

    def __init__(self, places: int, numbers: int, width: int, sketched: bool = False):
        super().__init__()
        self.proj = nn.Linear(numbers, width)
        self.register_buffer("mean", torch.zeros(places, numbers))
        self.register_buffer("deviation", torch.ones(places, numbers))
        nn.init.orthogonal_(self.proj.weight)
        nn.init.zeros_(self.proj.bias)
        fixed = nn.init.orthogonal_(torch.empty(width, numbers)) if sketched else None
        self.register_buffer("fixed", fixed)

    def forward(self, inputs, keep=None):
        """Packed tokens of inputs [(places, numbers)], those that `keep` names, and the number of
        tokens of each."""
        keep = [slice(None)] * len(inputs) if keep is None else keep
        pairs = zip(inputs, keep, strict=True)
        each = [(x[at] - self.mean[at]) / self.deviation[at] for x, at in pairs]
        x = torch.cat(each).nan_to_num()
        tokens = self.proj(x)
        if self.fixed is not None:
            tokens = torch.cat([tokens, nn.functional.linear(x, self.fixed)], 1)
        return tokens, tuple(map(len, each))

    @torch.no_grad()
    def fit(self, people):
        """Take mean and deviation over people [(places, numbers)]; where people hardly differ, a
        tenth of the deviation of all numbers together is added."""
        count, total, square = (self.mean.new_zeros(self.mean.shape, dtype=torch.float64)
                                for _ in range(3))  # fmt: skip
        for x in people:
            there = x.isfinite()
            x = x.double().nan_to_num()
            count, total, square = count + there, total + x, square + x**2
        mean = total / count.clamp(min=1)
        variance = (square / count.clamp(min=1) - mean**2).clamp(min=0)
        whole = (variance * count).sum() / count.sum().clamp(min=1)
        self.mean.copy_(mean)
        self.deviation.copy_((variance.sqrt() + 0.1 * whole.sqrt()).clamp(min=1e-6))
