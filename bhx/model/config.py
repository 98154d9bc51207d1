"""Sizes of a whole model, the presets, and the networks they describe."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace

import torch
from torch import nn

from bhx.errors import InputError, listed
from bhx.modalities.base import Modality
from bhx.modalities.bold import BOLD
from bhx.modalities.t1 import ANATOMY, T1_SHAPE
from bhx.modalities.table import modality
from bhx.model.dynamics import DynamicsConfig, DynamicsEncoder, DynamicsPredictor
from bhx.model.harmonizer import Harmonizer, HarmonizerConfig
from bhx.model.layers import LinearEmbedding
from bhx.model.structure import StructureConfig, StructureDecoder, StructureEncoder


@dataclass(frozen=True)
class HarmonixConfig:
    """The whole model: its parts, and what its input must look like.

    `atlas` and `order` name the parcels; `scaling` is how parcel series are scaled before they
    are read (see bhx.embed).
    """

    name: str
    atlas: str
    structure: StructureConfig
    dynamics: DynamicsConfig
    harmonizer: HarmonizerConfig
    order: str = "7networks"
    scaling: str = "zscore"

    @property
    def modalities(self) -> dict[str, Modality]:
        """What the model reads, in the order of its tokens."""
        return {name: modality(name) for name in self.harmonizer.modalities}

    def places(self, name: str) -> int:
        """Places of a modality's tokens."""
        return dict(zip(self.harmonizer.modalities, self.harmonizer.places, strict=True))[name]

    def with_modality(self, name: str, places: int, numbers: int) -> HarmonixConfig:
        """The same model with a further modality: so many tokens, each of so many numbers."""
        h = self.harmonizer
        modalities, numbers_of = (*h.modalities, name), (*h.numbers, numbers)
        more = replace(h, modalities=modalities, places=(*h.places, places), numbers=numbers_of)
        return replace(self, harmonizer=more)

    @classmethod
    def from_dict(cls, values: dict) -> HarmonixConfig:
        """Inverse of dataclasses.asdict."""
        parts = {
            "structure": StructureConfig,
            "dynamics": DynamicsConfig,
            "harmonizer": HarmonizerConfig,
        }
        try:
            made = {name: part(**_tuples(values[name])) for name, part in parts.items()}
            return cls(**{**values, **made})
        except (TypeError, KeyError, AttributeError) as error:
            raise InputError(
                f"Expected the configuration of a bhx model, found one that does not fit ({error})",
                "It was written by another version of bhx: make the weights again with this one",
            ) from error


def _tuples(values):
    return {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}


def assemble(name, atlas, structure, dynamics, hubs, order="7networks", **sizes) -> HarmonixConfig:
    """A configuration whose harmonizer has a place for every token of the built-in modalities."""
    places = (dynamics.parcels * dynamics.max_patches, structure.tokens)
    harmonizer = HarmonizerConfig((BOLD.name, ANATOMY.name), places, (0, 0), hubs, **sizes)
    return HarmonixConfig(name, atlas, structure, dynamics, harmonizer, order)


def _smaller(name, parcels, voxel_mm, cube, *, width, depth, heads, inner, hubs):
    """A smaller model; `inner` (width, depth, heads) is of the predictor and both decoders."""
    common = {"width": width, "depth": depth, "heads": heads}
    kinds = ("width", "depth", "heads")
    decoder = {f"decoder_{kind}": n for kind, n in zip(kinds, inner, strict=True)}
    predictor = {f"predictor_{kind}": n for kind, n in zip(kinds, inner, strict=True)}
    shape = tuple(round(n / voxel_mm) for n in T1_SHAPE)
    structure = StructureConfig(voxel_mm, shape, cube, **common, **decoder)
    dynamics = DynamicsConfig(parcels, **common, **predictor)
    sizes = {**common, **decoder, "target_width": width}
    return assemble(name, f"schaefer{parcels}", structure, dynamics, hubs, **sizes)


PRESETS = {
    "base": assemble("base", "schaefer400", StructureConfig(), DynamicsConfig(), 128),
    "small": _smaller(
        "small", 200, 2.0, 8, width=384, depth=6, heads=6, inner=(192, 4, 6), hubs=64
    ),
    "workshop": _smaller(
        "workshop", 100, 4.0, 8, width=96, depth=3, heads=4, inner=(64, 2, 4), hubs=32
    ),
}


def as_released(config: HarmonixConfig, name: str) -> HarmonixConfig:
    """The same sizes, read as the release reads: parcels in its order, patches by its rule."""
    tape = replace(config.dynamics, patching="tape")
    return replace(config, name=name, order="17networks", dynamics=tape)


RELEASE = as_released(PRESETS["base"], "release")
# the release's parcels, patches, cubes and hub tokens, in thin networks
STAND_IN = as_released(
    _smaller("stand-in", 400, 4.0, 4, width=48, depth=2, heads=4, inner=(32, 1, 4), hubs=128),
    "stand-in",
)


class Harmonix(nn.Module):
    """The networks of one model: an encoder for each modality, under the name of its tokens, and
    the harmonizer; the decoder and the predictor serve training and pictures."""

    def __init__(self, config: HarmonixConfig, harmonics=None, gradients=None):
        super().__init__()
        f = config.dynamics
        harmonics = torch.zeros(f.parcels, f.harmonics) if harmonics is None else harmonics
        gradients = torch.zeros(f.parcels, f.gradients) if gradients is None else gradients
        self.config = config
        self.provenance = {}
        self.structure = StructureEncoder(config.structure)
        self.structure_decoder: StructureDecoder | None = StructureDecoder(config.structure)
        self.dynamics = DynamicsEncoder(f, harmonics, gradients)
        self.dynamics_predictor = DynamicsPredictor(f, harmonics.clone(), gradients.clone())
        self.harmonizer = Harmonizer(config.harmonizer)
        h = config.harmonizer
        for name, places, numbers in zip(h.modalities, h.places, h.numbers, strict=True):
            if numbers:
                self.add_module(modality(name).tokens, LinearEmbedding(places, numbers, h.width))

    def encoder(self, name: str) -> nn.Module:
        """What makes tokens of a modality's inputs."""
        return getattr(self, modality(name).tokens)


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
