"""Sizes of a whole model, the presets, and the networks they describe."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace

import torch
from torch import nn

from bhx.errors import InputError, listed
from bhx.modalities.base import Modality
from bhx.modalities.bold import BOLD
from bhx.modalities.coupling import COUPLING
from bhx.modalities.cubes import CUBES
from bhx.modalities.t1 import ANATOMY, T1_SHAPE
from bhx.modalities.table import modality
from bhx.model.dynamics import DynamicsConfig, DynamicsEncoder, DynamicsPredictor
from bhx.model.harmonizer import Harmonizer, HarmonizerConfig
from bhx.model.hub import Hub, HubConfig
from bhx.model.layers import LinearEmbedding
from bhx.model.structure import StructureConfig, StructureDecoder, StructureEncoder


@dataclass(frozen=True)
class HarmonixConfig:
    """The whole model: its parts, and what its input must look like.

    `structure` and `dynamics` say how a T1 and a scan are cut, and the sizes of their encoders
    where the model has them. The harmonizer is a relational hub or that of the paper. `atlas` and
    `order` name the parcels; `scaling` is how parcel series are scaled before they are read (see
    bhx.embed).
    """

    name: str
    atlas: str
    structure: StructureConfig
    dynamics: DynamicsConfig
    harmonizer: HarmonizerConfig | HubConfig
    order: str = "7networks"
    scaling: str = "zscore"

    @property
    def modalities(self) -> dict[str, Modality]:
        """What the model reads, in the order of its tokens."""
        return {name: modality(name) for name in self.harmonizer.modalities}

    def encodes(self, modality: Modality) -> bool:
        """Whether the model has an encoder of this modality."""
        return modality.encoder and modality.name in self.harmonizer.modalities

    def places(self, name: str) -> int:
        """Places of a modality's tokens."""
        return dict(zip(self.harmonizer.modalities, self.harmonizer.places, strict=True))[name]

    def on_atlas(self, atlas: str, parcels: int) -> HarmonixConfig:
        """The same model for the parcels of another atlas; itself for those of its own."""
        if atlas == self.atlas:
            return self
        h, old = self.harmonizer, self.dynamics.parcels
        there = ["roi" in m.dims for m in self.modalities.values()]
        places = [n * parcels // old if on else n for n, on in zip(h.places, there, strict=True)]
        numbers = [
            parcels if on and n == old else n for n, on in zip(h.numbers, there, strict=True)
        ]
        wider = replace(h, places=tuple(places), numbers=tuple(numbers))
        dynamics = replace(self.dynamics, parcels=parcels)
        return replace(self, atlas=atlas, order="7networks", dynamics=dynamics, harmonizer=wider)

    def with_modality(self, name: str, places: int, numbers: int) -> HarmonixConfig:
        """The same model with a further modality: so many tokens, each of so many numbers."""
        h = self.harmonizer
        modalities, numbers_of = (*h.modalities, name), (*h.numbers, numbers)
        more = replace(h, modalities=modalities, places=(*h.places, places), numbers=numbers_of)
        return replace(self, harmonizer=more)

    def reading(self, names) -> HarmonixConfig:
        """The same model with some of its modalities only."""
        h = self.harmonizer
        each = [x for x in zip(h.modalities, h.places, h.numbers, strict=True) if x[0] in names]
        modalities, places, numbers = zip(*each, strict=True)
        fewer = replace(h, modalities=modalities, places=places, numbers=numbers)
        return replace(self, harmonizer=fewer)

    @classmethod
    def from_dict(cls, values: dict) -> HarmonixConfig:
        """Inverse of dataclasses.asdict."""
        try:
            relational = values["harmonizer"].get("kind") == "relational"
            parts = {
                "structure": StructureConfig,
                "dynamics": DynamicsConfig,
                "harmonizer": HubConfig if relational else HarmonizerConfig,
            }
            made = {name: part(**_tuples(values[name])) for name, part in parts.items()}
            return cls(**{**values, **made})
        except (TypeError, KeyError, AttributeError) as error:
            raise InputError(
                f"Expected the configuration of a bhx model, found one that does not fit ({error})",
                "It was written by another version of bhx: make the weights again with this one",
            ) from error


def _tuples(values):
    return {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}


def as_in_paper(name, atlas, structure, dynamics, hubs=128, **sizes):
    """A configuration with the harmonizer of the paper, which reads the tokens of both encoders."""
    places = (dynamics.parcels * dynamics.max_patches, structure.tokens)
    harmonizer = HarmonizerConfig((BOLD.name, ANATOMY.name), places, (0, 0), hubs, **sizes)
    return HarmonixConfig(name, atlas, structure, dynamics, harmonizer)


def relational(name, read, hubs, encoders=True, **sizes) -> HarmonixConfig:
    """A configuration with a relational hub, which reads coupling and cubes, and with `encoders`
    the tokens of dynamics and structure beside them; `read` are its first three parts."""
    atlas, structure, dynamics = read
    patches = dynamics.parcels * dynamics.max_patches
    reads = {
        BOLD.name: (patches, 0),
        COUPLING.name: (dynamics.parcels, dynamics.parcels),
        ANATOMY.name: (structure.tokens, 0),
        CUBES.name: (structure.tokens, structure.cube**3),
    }
    reads = {name: sizes for name, sizes in reads.items() if sizes[1] or encoders}
    places, numbers = zip(*reads.values(), strict=True)
    hub = HubConfig((*reads,), places, numbers, hubs, **sizes)
    return HarmonixConfig(name, atlas, structure, dynamics, hub)


def _smaller(parcels, voxel_mm, cube, *, width, depth, heads, inner):
    """Atlas and encoders of a smaller model; `inner` (width, depth, heads) is of the predictor and
    the decoder."""
    common = {"width": width, "depth": depth, "heads": heads}
    kinds = ("width", "depth", "heads")
    decoder = {f"decoder_{kind}": n for kind, n in zip(kinds, inner, strict=True)}
    predictor = {f"predictor_{kind}": n for kind, n in zip(kinds, inner, strict=True)}
    shape = tuple(round(n / voxel_mm) for n in T1_SHAPE)
    structure = StructureConfig(voxel_mm, shape, cube, **common, **decoder)
    return f"schaefer{parcels}", structure, DynamicsConfig(parcels, **common, **predictor)


def _thin(name, smaller, hubs):
    """The paper's harmonizer in the sizes of a smaller model's structure network."""
    kinds = ("width", "depth", "heads", "decoder_width", "decoder_depth", "decoder_heads")
    sizes = {kind: getattr(smaller[1], kind) for kind in kinds}
    sizes["target_width"] = sizes["width"]
    return as_in_paper(name, *smaller, hubs, **sizes)


_BASE = ("schaefer400", StructureConfig(), DynamicsConfig())
_SMALL = _smaller(200, 2.0, 8, width=384, depth=6, heads=6, inner=(192, 4, 6))
_WORKSHOP = _smaller(100, 4.0, 8, width=96, depth=3, heads=4, inner=(64, 2, 4))
_STAND_IN = _smaller(400, 4.0, 4, width=48, depth=2, heads=4, inner=(32, 1, 4))

PRESETS = {
    "base": relational("base", _BASE, hubs=128, width=768, depth=4, heads=12),
    "small": relational("small", _SMALL, hubs=64, width=384, depth=3, heads=8),
    "workshop": relational("workshop", _WORKSHOP, hubs=32, encoders=False),
    "paper": _thin("paper", _WORKSHOP, 32),
}


def as_released(config: HarmonixConfig) -> HarmonixConfig:
    """The same sizes, read as the release reads: parcels in its order, patches by its rule."""
    tape = replace(config.dynamics, patching="tape")
    return replace(config, order="17networks", dynamics=tape)


RELEASE = as_released(as_in_paper("release", *_BASE))
# the release's parcels, patches, cubes and hub tokens, in thin networks
STAND_IN = as_released(_thin("stand-in", _STAND_IN, 128))


class Harmonix(nn.Module):
    """The networks of one model: an encoder for each modality that it reads, under the name of its
    tokens, and the harmonizer; the decoder and the predictor serve training and pictures."""

    def __init__(self, config: HarmonixConfig, harmonics=None, gradients=None):
        super().__init__()
        f = config.dynamics
        harmonics = torch.zeros(f.parcels, f.harmonics) if harmonics is None else harmonics
        gradients = torch.zeros(f.parcels, f.gradients) if gradients is None else gradients
        self.config = config
        self.provenance = {}
        self.structure_decoder: StructureDecoder | None = None
        if config.encodes(ANATOMY):
            self.structure = StructureEncoder(config.structure)
            self.structure_decoder = StructureDecoder(config.structure)
        if config.encodes(BOLD):
            self.dynamics = DynamicsEncoder(f, harmonics, gradients)
            self.dynamics_predictor = DynamicsPredictor(f, harmonics.clone(), gradients.clone())
        h = config.harmonizer
        self.harmonizer = Hub(h) if isinstance(h, HubConfig) else Harmonizer(h)
        for name, places, numbers in zip(h.modalities, h.places, h.numbers, strict=True):
            if numbers:
                linear = LinearEmbedding(places, numbers, h.width, isinstance(h, HubConfig))
                self.add_module(modality(name).tokens, linear)

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


def unwrapped(state):
    """Weights without the prefixes of DistributedDataParallel and torch.compile."""
    for prefix in ("module.", "_orig_mod.") * 2:
        if state and all(name.startswith(prefix) for name in state):
            state = {name.removeprefix(prefix): values for name, values in state.items()}
    return state


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
