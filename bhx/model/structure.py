"""BrainHarmonix-S: a T1 volume to cube tokens, and the masked autoencoding that trains it."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import torch
from torch import nn

from bhx.errors import InputError
from bhx.model.layers import Block, initialise, run, sincos


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
        return tuple(n // self.cube for n in self.shape)

    @property
    def tokens(self) -> int:
        return prod(self.grid)


class StructureEncoder(nn.Module):
    """Scaled T1 volumes (B, X, Y, Z) to cube tokens (B, cubes, width)."""

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
        initialise(self)
        nn.init.xavier_uniform_(self.patch_embed.proj.weight.flatten(1))
        nn.init.zeros_(self.patch_embed.proj.bias)
        nn.init.normal_(self.cls_token, std=0.02)

    def forward(self, t1, visible=None):
        """Tokens of all cubes, or of the cubes `visible` (B, n) only."""
        return self.encode(cubes(t1, self.config.cube), visible)[:, 1:]

    def encode(self, voxels, visible=None):
        """Cubes (B, cubes, voxels) to [CLS | tokens] (B, 1 + n, width) after the norm."""
        places = self.pos_embed[:, 1:]
        if visible is not None:
            voxels, places = take(voxels, visible), places[0, visible]
        weight = self.patch_embed.proj.weight.flatten(1)
        x = nn.functional.linear(voxels, weight, self.patch_embed.proj.bias) + places
        cls = self.cls_token + self.pos_embed[:, :1]
        x = torch.cat([cls.expand(len(x), -1, -1), x], 1)
        lengths = (x.shape[1],) * len(x)
        return self.norm(run(self.blocks, x.flatten(0, 1), lengths)).unflatten(0, x.shape[:2])


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
        initialise(self)
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


def reconstruct(encoder, decoder, t1, hidden):
    """Predicted normalised cubes (B, cubes, voxels) of T1 volumes (B, X, Y, Z).

    `hidden` (B, cubes): 1 = removed; every row removes the same number.
    """
    order = hidden.to(torch.int8).argsort(dim=1, stable=True)  # visible cubes first
    visible = order[:, : int((hidden[0] == 0).sum())]
    encoded = encoder.encode(cubes(t1, encoder.config.cube), visible)
    return decoder(encoded, visible, hidden.shape[1])


def mae_loss(encoder, decoder, t1, hidden):
    """Mean squared error of the removed cubes of each volume (B,), each target normalised by its
    own cube (He et al., arXiv 2111.06377)."""
    target = normalised_cubes(t1, encoder.config.cube)
    error = (reconstruct(encoder, decoder, t1, hidden) - target).pow(2).mean(-1)
    return (error * hidden).sum(1) / hidden.sum(1)


def cubes(t1, edge: int):
    """(B, X, Y, Z) -> (B, cubes, edge^3), cubes and the voxels in them in C order."""
    size = t1.shape[1:]
    if any(n % edge or n < edge for n in size):
        raise InputError(
            f"Expected a T1 whose sides are multiples of {edge} voxels, found {tuple(size)}",
            "Put it on the model's grid, bhx.schema.t1_grid(model.config.structure.voxel_mm)",
        )
    x, y, z = (n // edge for n in size)
    t1 = t1.reshape(len(t1), x, edge, y, edge, z, edge)
    return t1.permute(0, 1, 3, 5, 2, 4, 6).reshape(len(t1), x * y * z, edge**3)


def volume(voxels, grid, edge: int):
    """Inverse of `cubes`: (B, cubes, edge^3) -> (B, X, Y, Z)."""
    parts = voxels.reshape(len(voxels), *grid, edge, edge, edge)
    return parts.permute(0, 1, 4, 2, 5, 3, 6).reshape(len(voxels), *(n * edge for n in grid))


def normalised_cubes(t1, edge: int):
    """Each cube minus its mean, over the root of its unbiased variance + 1e-6."""
    x = cubes(t1, edge)
    return (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True) + 1e-6).sqrt()


def cube_positions(grid, width: int):
    """Fixed positions (1, 1 + cubes, width); CLS is zero, channels in axis order 1, 0, 2.

    The order of the axes is the released one (their table is built so). Channels that do not
    divide by six stay zero.
    """
    third = width // 6 * 2
    i, j, k = torch.meshgrid(*(torch.arange(n) for n in grid), indexing="ij")
    table = torch.cat([sincos(axis.flatten(), third) for axis in (j, i, k)], -1).float()
    return nn.functional.pad(table, (0, width - 3 * third, 1, 0))[None]


def take(x, index):
    """Rows `index` (B, n) of x (B, N, D)."""
    return x.gather(1, index.unsqueeze(-1).expand(-1, -1, x.shape[-1]))
