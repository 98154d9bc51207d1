"""Sizes of a whole model, the presets, and the networks they describe."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field, replace

import torch
from torch import nn

from bhx.errors import InputError, listed
from bhx.model.dynamics import DynamicsConfig, DynamicsEncoder, DynamicsPredictor
from bhx.model.harmonizer import Harmonizer, HarmonizerConfig
from bhx.model.structure import StructureConfig, StructureDecoder, StructureEncoder


@dataclass(frozen=True)
class HarmonixConfig:
    """The whole model: its three parts, and what its input must look like.

    `atlas` and `order` name the parcels; `scaling` is how parcel series are scaled before they
    are read (see bhx.embed).
    """

    name: str = "base"
    atlas: str = "schaefer400"
    order: str = "7networks"
    scaling: str = "zscore"
    structure: StructureConfig = field(default_factory=StructureConfig)
    dynamics: DynamicsConfig = field(default_factory=DynamicsConfig)
    harmonizer: HarmonizerConfig = field(default_factory=HarmonizerConfig)

    @classmethod
    def from_dict(cls, values: dict) -> HarmonixConfig:
        """Inverse of dataclasses.asdict."""
        parts = (StructureConfig, DynamicsConfig, HarmonizerConfig)
        names = ("structure", "dynamics", "harmonizer")
        try:
            made = {k: make(**_tuples(values[k])) for k, make in zip(names, parts, strict=True)}
            return cls(**{**values, **made})
        except (TypeError, KeyError, AttributeError) as error:
            raise InputError(
                f"Expected the configuration of a bhx model, found one that does not fit ({error})",
                "It may have been written by another version of bhx",
            ) from error


def _tuples(values):
    return {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}


def _preset(
    name, atlas, voxel_mm, cube, width, depth, heads, inner, inner_depth, inner_heads, hubs
):
    """A smaller model; `inner` sizes are those of the predictor and both decoders."""
    shape = tuple(round(n / voxel_mm) for n in (160, 192, 160))
    common = {"width": width, "depth": depth, "heads": heads}
    decoder = {"decoder_width": inner, "decoder_depth": inner_depth, "decoder_heads": inner_heads}
    predictor = {f"predictor_{k[8:]}": v for k, v in decoder.items()}
    structure = StructureConfig(voxel_mm, shape, cube, **common, **decoder)
    parcels = int(atlas.removeprefix("schaefer"))
    dynamics = DynamicsConfig(parcels=parcels, **common, **predictor)
    tokens = (parcels, dynamics.max_patches, structure.tokens, hubs)
    harmonizer = HarmonizerConfig(*tokens, **common, **decoder, target_width=width)
    parts = {"structure": structure, "dynamics": dynamics, "harmonizer": harmonizer}
    return HarmonixConfig(name, atlas, **parts)


PRESETS = {
    "base": HarmonixConfig(),
    "small": _preset("small", "schaefer200", 2.0, 8, 384, 6, 6, 192, 4, 6, 64),
    "workshop": _preset("workshop", "schaefer100", 4.0, 8, 96, 3, 4, 64, 2, 4, 32),
}
RELEASE = replace(
    PRESETS["base"],
    name="release",
    order="17networks",
    dynamics=replace(PRESETS["base"].dynamics, patching="tape"),
)
_narrow = _preset("stand-in", "schaefer400", 4.0, 4, 48, 2, 4, 32, 1, 4, 128)
STAND_IN = replace(  # the release's parcels, patches, cubes and hub tokens, in thin networks
    _narrow, order="17networks", dynamics=replace(_narrow.dynamics, patching="tape")
)


class Harmonix(nn.Module):
    """The networks of one model; the decoder and the predictor serve training and pictures."""

    def __init__(self, config: HarmonixConfig, harmonics=None, gradients=None):
        super().__init__()
        f = config.dynamics
        harmonics = torch.zeros(f.parcels, f.harmonics) if harmonics is None else harmonics
        gradients = torch.zeros(f.parcels, f.gradients) if gradients is None else gradients
        self.config = config
        self.provenance = {}
        self.structure = StructureEncoder(config.structure)
        self.structure_decoder = StructureDecoder(config.structure)
        self.dynamics = DynamicsEncoder(f, harmonics, gradients)
        self.dynamics_predictor = DynamicsPredictor(f, harmonics.clone(), gradients.clone())
        self.harmonizer = Harmonizer(config.harmonizer)


def build(config: HarmonixConfig, harmonics, gradients, seed: int = 0) -> Harmonix:
    """A model with random weights; `harmonics` and `gradients` are (parcels, ...) arrays."""
    for name, table in {"harmonics": harmonics, "gradients": gradients}.items():
        shape = (config.dynamics.parcels, getattr(config.dynamics, name))
        if tuple(table.shape) != shape:
            fact = f"Expected {name} of shape {shape}, found {tuple(table.shape)}"
            raise InputError(fact, f"The model reads {config.atlas}: take that atlas")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tables = (torch.as_tensor(x, dtype=torch.float32).clone() for x in (harmonics, gradients))
        return Harmonix(config, *tables).eval()


def load_strictly(module: nn.Module, state: dict, where: str) -> None:
    """Load every key of `state`, or name what is missing, surplus or of another shape."""
    own = module.state_dict()
    missing, surplus = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    if missing or surplus:
        raise InputError(
            f"Expected the {len(own)} keys of {type(module).__name__} in {where}, found "
            f"{len(missing)} missing ({listed(missing) or 'none'}) and "
            f"{len(surplus)} surplus ({listed(surplus) or 'none'})",
            "These may be weights of another model",
        )
    for key, value in own.items():
        if value.shape != state[key].shape:
            fact = f"Expected '{key}' of shape {tuple(value.shape)} in {where}, "
            fact += f"found {tuple(state[key].shape)}"
            raise InputError(fact, "These may be weights of another size or atlas")
    module.load_state_dict(state)


def sha256(path) -> str:
    """Checksum of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
