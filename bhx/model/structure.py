"""BrainHarmonix-S: T1 cubes to tokens, and the masked autoencoding that trains it."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import torch
from torch import nn

from bhx.model.layers import Block, initialize, normalized, run, sincos


@dataclass(frozen=True)
class StructureConfig:
    """Sizes of BrainHarmonix-S; the defaults are the released ("base") ones.

    `shape` counts voxels of `voxel_mm` mm, `cube` the voxels along a cube's edge.
    """

    voxel_mm: float = 1.0
    shape: tuple[int, int, int] = (160, 192, 160)
    cube: int = 16
    width: int = 768
    depth: int = 12
    heads: int = 12
    decoder_width: int = 512
    decoder_depth: int = 8
    decoder_heads: int = 16

    @property
    def grid(self) -> tuple[int, int, int]:
        """Cubes along x, y and z."""
        x, y, z = (n // self.cube for n in self.shape)
        return x, y, z

    @property
    def tokens(self) -> int:
        """Cubes of one T1."""
        return prod(self.grid)


class StructureEncoder(nn.Module):
    """Cubes of a batch of scaled T1s to packed tokens."""

    def __init__(self, config: StructureConfig):
        super().__init__()
        self.config = config
        c = config
        self.patch_embed = nn.Module()
        self.patch_embed.proj = nn.Conv3d(1, c.width, c.cube, stride=c.cube)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, c.width))
        self.register_buffer("pos_embed", cube_positions(c.grid, c.width), persistent=False)
        self.blocks = nn.ModuleList(Block(c.width, c.heads) for _ in range(c.depth))
        self.norm = nn.LayerNorm(c.width, eps=1e-6)
        initialize(self)
        nn.init.xavier_uniform_(self.patch_embed.proj.weight.flatten(1))
        nn.init.zeros_(self.patch_embed.proj.bias)
        nn.init.normal_(self.cls_token, std=0.02)

    def forward(self, inputs, keep=None):
        """Tokens of T1s given as cubes [(cube, voxel)] (modalities.t1.cubes).

        `keep` names, for each T1, the cubes to encode (all without it); the others are never
        computed. Returns packed tokens (N, width) and the number of tokens of each T1.
        """
        x, lengths = self.encode(inputs, keep)
        return torch.cat([s[1:] for s in x.split(lengths)]), tuple(n - 1 for n in lengths)

    def encode(self, inputs, keep=None):
        """Packed [CLS | cubes] of every T1 after the norm (N, width), and each one's length."""
        weight, bias = self.patch_embed.proj.weight.flatten(1), self.patch_embed.proj.bias
        cls, places = (self.cls_token + self.pos_embed[:, :1])[0], self.pos_embed[0, 1:]
        sequences = []
        for i, x in enumerate(inputs):
            at = slice(None) if keep is None else keep[i]
            sequences += [cls, nn.functional.linear(x[at], weight, bias) + places[at]]
        lengths = tuple(1 + len(tokens) for tokens in sequences[1::2])
        return self.norm(run(self.blocks, torch.cat(sequences), lengths)), lengths


class StructureDecoder(nn.Module):
    """Fills in removed cubes from visible ones: the decoder of the masked autoencoder."""

    def __init__(self, config: StructureConfig):
        super().__init__()
        c = config
        self.decoder_embed = nn.Linear(c.width, c.decoder_width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, c.decoder_width))
        table = cube_positions(c.grid, c.decoder_width)
        self.register_buffer("decoder_pos_embed", table, persistent=False)
        self.decoder_blocks = nn.ModuleList(
            Block(c.decoder_width, c.decoder_heads) for _ in range(c.decoder_depth)
        )
        self.decoder_norm = nn.LayerNorm(c.decoder_width, eps=1e-6)
        self.decoder_pred = nn.Linear(c.decoder_width, c.cube**3)
        initialize(self)
        nn.init.normal_(self.mask_token, std=0.02)

    def forward(self, encoded, visible, total: int):
        """[CLS | visible cubes] (B, 1 + n, width) to all cubes (B, total, voxels)."""
        seen = self.decoder_embed(encoded)
        full = self.mask_token.to(seen).expand(len(seen), total, -1)
        full = full.scatter(1, visible.unsqueeze(-1).expand(-1, -1, full.shape[-1]), seen[:, 1:])
        x = torch.cat([seen[:, :1], full], 1) + self.decoder_pos_embed
        lengths = (x.shape[1],) * len(x)
        x = run(self.decoder_blocks, x.flatten(0, 1), lengths)
        return self.decoder_pred(self.decoder_norm(x)).unflatten(0, (len(lengths), -1))[:, 1:]


def reconstruct(encoder, decoder, voxels, hidden):
    """Predicted normalized cubes (B, cubes, voxels) of T1s given as cubes of the same shape.

    `hidden` (B, cubes): 1 = removed; every row removes the same number.
    """
    order = hidden.to(torch.int8).argsort(dim=1, stable=True)  # visible cubes first
    visible = order[:, : int((hidden[0] == 0).sum())]
    encoded, _ = encoder.encode(list(voxels), list(visible))
    return decoder(encoded.unflatten(0, (len(voxels), -1)), visible, hidden.shape[1])


def mae_loss(encoder, decoder, voxels, hidden):
    """Mean squared error of the removed cubes of each T1 (B,), each target normalized by its own
    cube (He et al., arXiv 2111.06377)."""
    guess = reconstruct(encoder, decoder, voxels, hidden)
    error = (guess - normalized(voxels)).pow(2).mean(-1)
    return (error * hidden).sum(1) / hidden.sum(1)


def cube_positions(grid, width: int):
    """Fixed positions (1, 1 + cubes, width); CLS is zero, channels in axis order 1, 0, 2.

    The order of the axes is the released one (their table is built so). Channels that do not
    divide by six stay zero.
    """
    third = width // 6 * 2
    i, j, k = torch.meshgrid(*(torch.arange(n) for n in grid), indexing="ij")
    table = torch.cat([sincos(axis.flatten(), third) for axis in (j, i, k)], -1).float()
    return nn.functional.pad(table, (0, width - 3 * third, 1, 0))[None]
