"""BrainHarmonix-F: parcel time series at any TR to tokens, and the joint-embedding prediction
(JEPA) that trains it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from math import ceil

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from bhx.errors import InputError
from bhx.modalities.bold import GRID_SECONDS
from bhx.model.layers import Block, attend_alike, initialize, run, sincos


@dataclass(frozen=True)
class DynamicsConfig:
    """Sizes of BrainHarmonix-F; the defaults are the released ("base") ones.

    `patching` is "exact" (patch p covers [p, p + 1) x 35.28 s at every TR) or "tape" (the paper's
    rule: round(35.28 s / TR) volumes a patch, and the kernel resized).
    """

    parcels: int = 400
    kernel: int = 48  # samples of GRID_SECONDS in a patch
    patching: str = "exact"
    max_patches: int = 18
    harmonics: int = 200
    gradients: int = 30
    width: int = 768
    depth: int = 12
    heads: int = 12
    predictor_width: int = 384
    predictor_depth: int = 6
    predictor_heads: int = 12
    predictor_eps: float = 1e-6

    @property
    def exact(self) -> DynamicsConfig:
        """The same with patches that are exact in time."""
        return replace(self, patching="exact")

    @property
    def patch_seconds(self) -> float:
        return self.kernel * GRID_SECONDS

    def patch_volumes(self, tr: float) -> int:
        """Volumes in a `tape` patch at this TR [s]."""
        return max(1, round(self.patch_seconds / tr))

    def patch_count(self, volumes: int, tr: float) -> int:
        """Patches of a scan: whole ones; with tape the last may be part-filled, if not the only."""
        if self.patching == "tape":
            k = self.patch_volumes(tr)
            return ceil(volumes / k) if volumes >= k else 0
        return int(volumes * tr / self.patch_seconds + 1e-6)

    def patch_onsets(self, patches: int, tr: float) -> np.ndarray:
        """Seconds from the scan's start to each patch."""
        step = self.patch_seconds if self.patching == "exact" else self.patch_volumes(tr) * tr
        return step * np.arange(patches)


@lru_cache(maxsize=256)
def resizing(kernel: int, k: int):
    """pinv(M) (k, kernel): M's rows are the unit vectors resized to k (bicubic, antialias)."""
    unit = torch.eye(kernel, dtype=torch.float64)[:, None, None]
    resized = F.interpolate(unit, (1, k), mode="bicubic", antialias=True, align_corners=False)
    return torch.linalg.pinv(resized[:, 0, 0])


class PlacePositions(nn.Module):
    """Half time, half place: the place half is read off the cortex's geometry and gradients."""

    def __init__(self, config: DynamicsConfig, harmonics, gradients):
        super().__init__()
        half = config.width // 2
        self.config = config
        self.geo_harm_proj = nn.Linear(config.harmonics, half)
        self.grad_proj = nn.Linear(config.gradients, half)
        self.decoder_pos_embed_proj = nn.Linear(half, config.predictor_width // 2)
        self.register_buffer("harmonics", harmonics)
        self.register_buffer("gradients", gradients)

    def place(self):
        """(parcels, width / 2), brought to [-1, 1] by one minimum and maximum of the whole."""
        x = (self.grad_proj(self.gradients) + self.geo_harm_proj(self.harmonics)) / 2
        return (x - x.min()) / (x.max() - x.min()) * 2 - 1

    def forward(self, patches: int):
        """(parcels, patches, width) of the encoder, time half first."""
        return self._join(self.place(), patches)

    def predictor(self, patches: int):
        """(parcels, patches, predictor width); no gradient reaches the geometry from here."""
        return self._join(self.decoder_pos_embed_proj(self.place().detach()), patches)

    def _join(self, place, patches):
        if patches > self.config.max_patches:
            fact = f"Expected at most {self.config.max_patches} patches at once, found {patches}"
            raise InputError(fact, "Read the scan in windows, as bhx.embed does")
        time = sincos(torch.arange(patches, device="cpu"), place.shape[1]).float().to(place)
        shape = (len(place), patches, -1)
        return torch.cat([time[None].expand(shape), place[:, None].expand(shape)], -1)


class DynamicsEncoder(nn.Module):
    """Patches of a batch of scans to packed tokens; token = parcel * patches + patch."""

    def __init__(self, config: DynamicsConfig, harmonics, gradients):
        super().__init__()
        self.config = config
        self.patch_embed = nn.Module()
        self.patch_embed.proj = nn.Conv2d(1, config.width, (1, config.kernel))
        self.pos_embed = PlacePositions(config, harmonics, gradients)
        self.blocks = nn.ModuleList(Block(config.width, config.heads) for _ in range(config.depth))
        self.norm = nn.LayerNorm(config.width, eps=1e-6)
        initialize(self)
        for block in self.blocks:
            attend_alike(block.attn)
        # tokens half as wide as the scaled input, and as their positions
        nn.init.normal_(self.patch_embed.proj.weight, std=0.5 * config.kernel**-0.5)
        nn.init.zeros_(self.patch_embed.proj.bias)

    def forward(self, patches, keep=None):
        """Tokens of scans given as patches [(parcels, P_i, samples)].

        `keep` names, for each scan, the tokens to encode (all without it); the others are never
        computed. Returns packed tokens (N, width) and the number of tokens of each scan.
        """
        tokens = [(self.embed(p) + self.pos_embed(p.shape[1])).flatten(0, 1) for p in patches]
        if keep is not None:
            tokens = [x[index] for x, index in zip(tokens, keep, strict=True)]
        lengths = tuple(len(x) for x in tokens)
        return self.norm(run(self.blocks, torch.cat(tokens), lengths)), lengths

    def embed(self, patches):
        """(parcels, P, samples) -> (parcels, P, width)."""
        return patches @ self.kernel(patches.shape[-1]) + self.patch_embed.proj.bias

    def kernel(self, k: int):
        """The kernel (k, width) for patches of k volumes."""
        weight = self.patch_embed.proj.weight.flatten(1).T
        if k == self.config.kernel:
            return weight
        return resizing(self.config.kernel, k).to(weight) @ weight


class DynamicsPredictor(nn.Module):
    """Fills in hidden tokens from visible ones: the predictor of the JEPA."""

    def __init__(self, config: DynamicsConfig, harmonics, gradients):
        super().__init__()
        c = config
        self.config = config
        self.predictor_embed = nn.Linear(c.width, c.predictor_width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, c.predictor_width))
        self.predictor_pos_embed = PlacePositions(config, harmonics, gradients)
        self.predictor_blocks = nn.ModuleList(
            Block(c.predictor_width, c.predictor_heads, eps=c.predictor_eps)
            for _ in range(c.predictor_depth)
        )
        self.predictor_norm = nn.LayerNorm(c.predictor_width, eps=c.predictor_eps)
        self.predictor_proj = nn.Linear(c.predictor_width, c.width)
        initialize(self)
        nn.init.normal_(self.mask_token, std=0.02)

    def forward(self, context, keep, hide, patches):
        """Packed context tokens (N, width) to packed predictions of the hidden tokens (M, width).

        `keep` and `hide` are token indices of each scan, `patches` its number of patches.
        """
        seen = self.predictor_embed(context).split([len(k) for k in keep])
        sequences = []
        for x, kept, hidden, count in zip(seen, keep, hide, patches, strict=True):
            place = self.predictor_pos_embed.predictor(count).flatten(0, 1)
            sequences += [x + place[kept], self.mask_token[0] + place[hidden]]
        lengths = tuple(len(k) + len(h) for k, h in zip(keep, hide, strict=True))
        x = run(self.predictor_blocks, torch.cat(sequences), lengths)
        x = torch.cat([s[-len(h) :] for s, h in zip(x.split(lengths), hide, strict=True)])
        return self.predictor_proj(self.predictor_norm(x))


def jepa_loss(encoder, predictor, teacher, patches, keep, hide):
    """Smooth-L1 between predicted and the teacher's tokens of each scan (B,): mean over channels,
    then over its hidden tokens (Assran et al., arXiv 2301.08243)."""
    with torch.no_grad():
        target, lengths = teacher(patches)
        target = F.layer_norm(target, target.shape[-1:], eps=1e-5).split(lengths)
        target = torch.cat([x[h] for x, h in zip(target, hide, strict=True)])
    context, _ = encoder(patches, keep)
    guess = predictor(context, keep, hide, [p.shape[1] for p in patches])
    error = F.smooth_l1_loss(guess, target, reduction="none").mean(-1)
    return torch.stack([e.mean() for e in error.split([len(h) for h in hide])])
