"""Weights to networks and back: our own format (safetensors + JSON) and the released files."""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import os
import shutil
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from .errors import InputError, listed
from .harmonix_f import DynamicsConfig, DynamicsEncoder, DynamicsPredictor
from .harmonix_s import StructureConfig, StructureDecoder, StructureEncoder
from .harmonizer import Harmonizer, HarmonizerConfig

SHIPPED = Path(__file__).parent / "weights"


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


def save_weights(model: Harmonix, folder, provenance: dict | None = None) -> Path:
    """Write `config.json` and `model.safetensors` into `folder`, each whole or not at all."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    part = folder / "model.safetensors.part"
    save_file({k: v.contiguous().cpu() for k, v in model.state_dict().items()}, part)
    description = {
        "format": 1,
        "config": asdict(model.config),
        "sha256": sha256(part),
        "provenance": provenance or model.provenance,
    }
    os.replace(part, folder / "model.safetensors")
    text = folder / "config.json.part"
    text.write_text(json.dumps(description, indent=1) + "\n")
    shutil.copymode(text, folder / "model.safetensors")  # for others, too
    os.replace(text, folder / "config.json")
    return folder


def read_weights(source) -> Harmonix:
    """Networks from shipped weights, a folder of save_weights, or "release:<folder>"."""
    source = str(source)
    if source.startswith("release:"):
        return _read_release(Path(source.removeprefix("release:")).expanduser())
    folder = SHIPPED / source if (SHIPPED / source / "config.json").exists() else Path(source)
    return _read_own(folder.expanduser())


def _read_own(folder):
    weights, description = folder / "model.safetensors", folder / "config.json"
    if not (weights.exists() and description.exists()):
        shipped = sorted(p.parent.name for p in SHIPPED.glob("*/config.json"))
        raise InputError(
            f"Expected a folder with config.json and model.safetensors, found none at '{folder}'",
            f"Shipped weights are: {listed(shipped) or 'none'}; "
            "the published ones load as 'release:<folder>'",
        )
    try:
        about = json.loads(description.read_text())
        written, digest, provenance = (about[k] for k in ("config", "sha256", "provenance"))
        state = load_file(weights)
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        fact = f"Expected whole weights in '{folder}', found a file cut short or damaged ({error})"
        raise InputError(fact, "Copy or make them again") from error
    model = Harmonix(HarmonixConfig.from_dict(written))
    if not any(k.startswith("structure_decoder.") for k in state):
        model.structure_decoder = None  # as in the release
    load_strictly(model, state, str(weights))
    if sha256(weights) != digest:
        fact = f"Expected weights with sha256 {digest[:12]}, found {sha256(weights)[:12]}"
        raise InputError(fact, "The file is not the one its config.json describes: copy both again")
    model.provenance = {**provenance, "weights_sha256": digest}
    return model.eval()


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


# The released files ------------------------------------------------------------------------------

FOLDERS = {"dynamics": "harmonix-f", "structure": "harmonix-s", "harmonizer": "harmonizer"}
RELEASED = {name: f"{folder}/model.pth" for name, folder in FOLDERS.items()}
TABLES = {"harmonics": "schaefer400_roi_eigenmodes.csv", "gradients": "gradient_mapping_400.csv"}


SIZES = "sizes.json"  # beside files in this layout that are of another size than the published


def write_release(model: Harmonix, folder) -> Path:
    """Write networks in the layout of the released files: three model.pth, two tables, sizes.

    `read_weights("release:<folder>")` reads them. Left out are the structure decoder and the tables
    of time positions of the dynamics file, which do not fit 18 patches and which no reader uses.
    """
    folder, f = Path(folder), model.dynamics
    groups = {"encoder": f, "decoder": model.dynamics_predictor, "encoder_ema": f}
    contents = {
        "dynamics": {f"{g}.{k}": v for g, part in groups.items() for k, v in _learnt(part).items()},
        "structure": {"model": _learnt(model.structure, "pos_embed")},
        "harmonizer": {"model": _learnt(model.harmonizer, "pos_embed", "decoder_pos_embed")},
    }
    for name, content in contents.items():
        (folder / RELEASED[name]).parent.mkdir(parents=True, exist_ok=True)
        torch.save(content, folder / RELEASED[name])
    for name, path in TABLES.items():
        rows = getattr(f.pos_embed, name).tolist()
        if name == "harmonics":  # with a header and a column of row names
            rows = [["", *range(len(rows[0]))], *([i, *row] for i, row in enumerate(rows))]
        with open(folder / path, "w", newline="") as file:
            csv.writer(file).writerows(rows)
    (folder / SIZES).write_text(json.dumps(asdict(model.config)))
    return folder


def _learnt(part, *fixed):
    """Tensors of a released file: what was learnt, and the fixed tables named."""
    tensors = dict(part.named_parameters()) | {name: getattr(part, name) for name in fixed}
    return {k: v.detach().cpu() for k, v in tensors.items()}


def _read_release(folder, config: HarmonixConfig = RELEASE):
    """The published weights, read strictly and without unpickling anything but tensors.

    Their harmonics are used as they are although their rows are in another parcel order than the
    data: the weights were trained so.
    """
    paths = {name: _find(folder, path) for name, path in (RELEASED | TABLES).items()}
    if (folder / SIZES).is_file():
        config = HarmonixConfig.from_dict(json.loads((folder / SIZES).read_text()))
    harmonics = _table(paths["harmonics"], header=True)
    gradients = _table(paths["gradients"], header=False)
    model = build(config, harmonics, gradients)
    digest = hashlib.sha256()
    for name in sorted(paths):
        digest.update(sha256(paths[name]).encode())
    _fill_dynamics(model, _tensors(paths["dynamics"]), str(paths["dynamics"]))
    _fill_structure(model, _tensors(paths["structure"]), str(paths["structure"]))
    _fill(model.harmonizer, _tensors(paths["harmonizer"]), str(paths["harmonizer"]))
    source = "released files" if config.name == "release" else f"{config.name}, released layout"
    model.provenance = {"source": source, "weights_sha256": digest.hexdigest()}
    return model.eval()


def _find(folder, path):
    for place in (folder / path, folder / Path(path).name):
        if place.is_file() and not (place.name == "model.pth" and place.parent == folder):
            return place
    there = sorted(p.name for p in folder.iterdir()) if folder.is_dir() else []
    fact = f"Expected the released file '{path}' in '{folder}', found {listed(there) or 'nothing'}"
    raise InputError(fact, f"The folder must hold {listed([*RELEASED.values(), *TABLES.values()])}")


def _tensors(path):
    """The tensors of a released file; anything that would run code on loading is refused."""
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise InputError(
            f"Expected a file of tensors at '{path}', found one that is damaged or holds other "
            f"objects ({type(error).__name__})",
            "Nothing in it was run; download it again from the authors",
        ) from error
    if isinstance(loaded, dict) and isinstance(loaded.get("model"), dict):
        loaded = loaded["model"]
    if not isinstance(loaded, dict):
        fact = f"Expected named tensors at '{path}', found one {type(loaded).__name__}"
        raise InputError(fact, "Is this the file of the release")
    return {str(k): v for k, v in loaded.items() if isinstance(v, torch.Tensor)}


def _table(path, header):
    try:
        with open(path, newline="") as file:
            rows = list(csv.reader(file))
        rows = [row[1:] for row in rows[1:]] if header else rows
        return torch.tensor([[float(x) for x in row] for row in rows])
    except ValueError as error:
        fact = f"Expected a table of numbers at '{path}', found another content ({error})"
        raise InputError(fact, "Take the file of the release unchanged") from error


def _fill_dynamics(model, state, where):
    """The exponential moving average is the encoder; tables of time positions are made anew."""
    groups = {"encoder": {}, "decoder": {}, "encoder_ema": {}}
    for key, value in state.items():
        group, _, rest = key.partition(".")
        if group not in groups:
            fact = f"Expected keys of {listed(groups)} in {where}, found '{key}'"
            raise InputError(fact, "Is this the file of BrainHarmonix-F")
        if ".emb_h_" not in key:
            groups[group][rest] = value
    tables = ("harmonics", "gradients")
    for part, group, place in (
        (model.dynamics, "encoder", "pos_embed"),  # only checked: the next replaces it
        (model.dynamics, "encoder_ema", "pos_embed"),
        (model.dynamics_predictor, "decoder", "predictor_pos_embed"),
    ):
        own = {f"{place}.{t}": part.state_dict()[f"{place}.{t}"] for t in tables}
        load_strictly(part, groups[group] | own, f"{where} ({group})")


def _fill_structure(model, state, where):
    """The encoder, and the decoder of the masked autoencoder if the file has one."""
    is_decoder = {k: k.startswith(("decoder_", "mask_token")) for k in state}
    _fill(model.structure, {k: v for k, v in state.items() if not is_decoder[k]}, where)
    decoder = {k: v for k, v in state.items() if is_decoder[k]}
    if decoder:
        _fill(model.structure_decoder, decoder, where)
    else:
        model.structure_decoder = None


def _fill(part, state, where):
    """Load a released part; its fixed position tables replace ours."""
    fixed = {k: state.pop(k) for k in ("pos_embed", "decoder_pos_embed") if k in state}
    ours = {k: v for k, v in part.named_buffers() if k in ("mean_tokens", "spread")}
    load_strictly(part, state | ours, where)
    for name, table in fixed.items():
        own = getattr(part, name)
        if own.shape != table.shape:
            fact = f"Expected '{name}' of shape {tuple(own.shape)} in {where}, "
            fact += f"found {tuple(table.shape)}"
            raise InputError(fact, "These may be weights of another size")
        own.copy_(table)
