"""BrainHarmonix-F: parcel time series at any TR to tokens, and the joint-embedding prediction
(JEPA) that trains it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from math import ceil

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from bhx.errors import InputError
from bhx.model.layers import Block, attend_alike, initialise, run, sincos

GRID_SECONDS = 0.735  # step of the base kernel: the TR of UK Biobank
# Autocorrelation of resting BOLD at a distance of d seconds: a slow part and white noise, which
# fades over one grid step. Fitted to HCP scans at TR 0.72 s (1, .57, .49, .42, .35, .28, .22, .17).
SLOW_SHARE, SLOW_SECONDS, SLOW_POWER = 0.575, 4.38, 1.76


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


def patchify(bold, tr: float, config: DynamicsConfig):
    """Scaled series (parcels, volumes) at `tr` [s] to patches (parcels, patches, samples).

    Exact patches have `config.kernel` samples on the 0.735 s grid; tape patches have k volumes,
    the last one filled with zeros.
    """
    patches = config.patch_count(bold.shape[1], tr)
    seconds = bold.shape[1] * tr
    if patches == 0 or bold.shape[1] < 2:
        fact = f"Expected a scan of at least one patch ({config.patch_seconds:.2f} s), "
        fact += f"found {bold.shape[1]} volumes at TR {tr:g} s = {seconds:.1f} s"
        raise InputError(fact, "Leave this scan out, or check its TR")
    if config.patching == "tape":
        k = config.patch_volumes(tr)
        return F.pad(bold, (0, patches * k - bold.shape[1])).unflatten(1, (patches, k))
    index, weights = wiener(tr, bold.shape[1], patches * config.kernel)
    grid = (bold[:, index] * weights.to(bold)).sum(-1)
    return grid.unflatten(1, (patches, config.kernel))


def unpatchify(patches, volumes: int):
    """Inverse of `patchify` by the rule `tape`: patches (parcels, patches, samples) to a series
    (parcels, volumes)."""
    return patches.flatten(1)[:, :volumes]


def autocovariance(seconds):
    """Prior of BOLD's autocorrelation at these distances [s]."""
    d = np.abs(seconds)
    slow = SLOW_SHARE * np.exp(-((d / SLOW_SECONDS) ** SLOW_POWER))
    return slow + (1 - SLOW_SHARE) * np.clip(1 - d / GRID_SECONDS, 0, None)


@lru_cache(maxsize=64)
def wiener(tr: float, volumes: int, samples: int, window: int = 8):
    """Best linear interpolation from volumes at `tr` [s] to the 0.735 s grid.

    Returns the volumes each grid sample reads, (samples, window) indices, and their weights
    C_grid,volumes C_volumes,volumes^-1 under `autocovariance`.
    """
    window = min(window, volumes)
    grid = np.arange(samples) * GRID_SECONDS
    first = np.clip(np.floor(grid / tr).astype(int) - window // 2 + 1, 0, volumes - window)
    index = first[:, None] + np.arange(window)
    among = autocovariance(tr * np.subtract.outer(np.arange(window), np.arange(window)))
    towards = autocovariance(grid[:, None] - index * tr)
    weights = np.linalg.solve(among, towards.T).T
    return torch.from_numpy(index), torch.from_numpy(weights)


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
        self._resized = {}  # k -> (version of the weight, kernel), outside training
        initialise(self)
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
        """The kernel (k, width) for patches of k volumes, resized once per k outside training."""
        weight = self.patch_embed.proj.weight
        if k == self.config.kernel:
            return weight.flatten(1).T
        version = (weight.data_ptr(), weight._version, weight.dtype)
        if torch.is_grad_enabled() and weight.requires_grad:
            return self._resize(k)
        if self._resized.get(k, (None,))[0] != version:
            self._resized[k] = version, self._resize(k)
        return self._resized[k][1]

    def _resize(self, k):
        weight = self.patch_embed.proj.weight
        return resizing(self.config.kernel, k).to(weight) @ weight.flatten(1).T


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
        initialise(self)
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


def jepa_masks(parcels: int, patches: int, random: np.random.Generator):
    """Visible and hidden token indices of one scan (Brain-JEPA, arXiv 2409.19407, section 3.2).

    The observed block is 84-100 % of the parcels over a contiguous 84-100 % of the patches.
    Hidden are: Cross-ROI (45-60 % of the parcels, 20-60 % of the patches, inside the window),
    and Double-Cross and Cross-Time (15-30 % of the parcels, up to 40 % of the patches, outside
    it). Hidden tokens leave the observed block.
    """
    observed = np.zeros((parcels, patches), bool)
    hidden = np.zeros_like(observed)
    window = _span(patches, random.uniform(0.84, 1.0), random)
    order = random.permutation(parcels)
    seen = order[: _count(parcels, random.uniform(0.84, 1.0))]
    observed[np.ix_(seen, window)] = True
    rows = random.permutation(parcels)[: _count(parcels, random.uniform(0.45, 0.60))]
    inside = _span(len(window), random.uniform(0.20, 0.60), random)
    hidden[np.ix_(rows, window[inside])] = True
    outside = np.setdiff1d(np.arange(patches), window)
    unseen = order[len(seen) :]
    for pool in (seen, unseen):  # Cross-Time, Double-Cross
        if len(outside) and len(pool):
            rows = random.permutation(pool)[: _count(parcels, random.uniform(0.15, 0.30))]
            columns = _span(len(outside), random.uniform(0.0, 0.40), random)
            hidden[np.ix_(rows, outside[columns])] = True
    observed &= ~hidden
    return np.flatnonzero(observed), np.flatnonzero(hidden)


def _count(total, share):
    return max(1, round(total * share))


def _span(total, share, random):
    """A contiguous run of round(share x total) indices, at least one."""
    size = _count(total, share)
    start = random.integers(0, total - size + 1)
    return np.arange(start, start + size)
