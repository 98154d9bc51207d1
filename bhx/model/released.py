"""The released files: read strictly, and written in their layout."""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch

from bhx.errors import InputError, listed
from bhx.model.config import (
    RELEASE,
    Harmonix,
    HarmonixConfig,
    build,
    load_strictly,
    sha256,
    unwrapped,
)

# The released files ------------------------------------------------------------------------------

FOLDERS = {"dynamics": "harmonix-f", "structure": "harmonix-s", "harmonizer": "harmonizer"}
RELEASED = {name: f"{folder}/model.pth" for name, folder in FOLDERS.items()}
TABLES = {"harmonics": "schaefer400_roi_eigenmodes.csv", "gradients": "gradient_mapping_400.csv"}


SIZES = "sizes.json"  # beside files in this layout that are of another size than the published
# Numbers of numpy beside the tensors, such as an epoch or a loss; they hold no code.
NUMPY_SCALARS = [np.float64(0).__reduce__()[0], np.dtype]  # type: ignore[index]
NUMPY_SCALARS += map(type, map(np.dtype, "?bhilBHILefd"))


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
    """Tensors of a released file: what was learned, and the fixed tables named."""
    tensors = dict(part.named_parameters()) | {name: getattr(part, name) for name in fixed}
    return {k: v.detach().cpu() for k, v in tensors.items()}


def read_release(folder, config: HarmonixConfig = RELEASE):
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
    digest = hashlib.sha256("".join(sha256(paths[name]) for name in sorted(paths)).encode())
    _fill_dynamics(model, _tensors(paths["dynamics"]), str(paths["dynamics"]))
    _fill_structure(model, _tensors(paths["structure"]), str(paths["structure"]))
    _fill(model.harmonizer, _tensors(paths["harmonizer"]), str(paths["harmonizer"]))
    source = "released files" if config.name == "release" else f"{config.name}, released layout"
    model.provenance = {"source": source, "weights_sha256": digest.hexdigest()}
    return model.eval()


def _find(folder, path):
    if (folder / path).is_file():
        return folder / path
    there = sorted(p.name for p in folder.iterdir()) if folder.is_dir() else []
    fact = f"Expected the released file '{path}' in '{folder}', found {listed(there) or 'nothing'}"
    raise InputError(fact, f"The folder must hold {listed([*RELEASED.values(), *TABLES.values()])}")


def _tensors(path):
    """The tensors of a released file; anything that would run code on loading is refused."""
    try:
        with torch.serialization.safe_globals([argparse.Namespace, *NUMPY_SCALARS]):
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
    return unwrapped({str(k): v for k, v in loaded.items() if isinstance(v, torch.Tensor)})


def _table(path, header):
    try:
        rows = np.loadtxt(path, str, delimiter=",", skiprows=int(header), ndmin=2)
        return torch.tensor(rows[:, int(header) :].astype("float32"))  # but for names of rows
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
    parts = {"encoder": model.dynamics, "decoder": model.dynamics_predictor}
    for group in groups:  # the moving average last: it replaces the encoder, which is only checked
        part = parts[group.removesuffix("_ema")]
        load_strictly(part, groups[group] | dict(part.named_buffers()), f"{where} ({group})")


def _fill_structure(model, state, where):
    """The encoder, and the decoder of the masked autoencoder if the file has one."""
    decoder = {k: state.pop(k) for k in list(state) if k.startswith(("decoder_", "mask_token"))}
    _fill(model.structure, state, where)
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
