"""Weights to networks and back: our own format (safetensors + JSON) and the released files."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import asdict
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from bhx.errors import InputError, listed
from bhx.model.config import Harmonix, HarmonixConfig, load_strictly, sha256, unwrapped
from bhx.model.published import RELEASE, check_as_before, fetch
from bhx.model.released import RELEASED, SIZES, TABLES, read_release
from bhx.settings import PACKAGE

SHIPPED = PACKAGE / "weights"
ATLAS_FILE = "atlas.nc"  # beside weights: their atlas, where it is not a shipped one


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


def located(source) -> tuple[Path, str]:
    """The folder of weights by their name, and the repository it was downloaded from, or ""."""
    if not isinstance(source, str | os.PathLike):
        fact = f"Expected the name or folder of weights, found {type(source).__name__}"
        raise InputError(fact, "A configuration without weights goes to preset=, or random_model")
    source = str(source)
    if source == "release":
        repository = os.environ.get("BHX_RELEASE", RELEASE)
        return fetch(repository, [*RELEASED.values(), *TABLES.values(), SIZES]), repository
    if source.startswith("hf:"):
        repository = source.removeprefix("hf:")
        return fetch(repository, ["config.json", "model.safetensors", ATLAS_FILE]), repository
    if source in [path.parent.name for path in SHIPPED.glob("*/config.json")]:
        return SHIPPED / source, ""
    return Path(source.removeprefix("release:")).expanduser(), ""


def read_weights(source) -> Harmonix:
    """Networks from shipped weights, a folder of save_weights, or "release:<folder>"; "release" and
    "hf:<owner>/<name>" are of the Hugging Face Hub (see `bhx.model.published`)."""
    folder, repository = located(source)
    published = str(source) == "release" or str(source).startswith("release:")
    model = read_release(folder) if published else _read_folder(folder)
    if repository:
        check_as_before(repository, model.provenance["weights_sha256"])
    return model


def _read_folder(folder):
    """Networks that `save_weights` wrote."""
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
    state = unwrapped(state)
    if not any(k.startswith("structure_decoder.") for k in state):
        model.structure_decoder = None  # as in the release
    load_strictly(model, state, str(weights))
    if sha256(weights) != digest:
        fact = f"Expected weights with sha256 {digest[:12]}, found {sha256(weights)[:12]}"
        raise InputError(fact, "The file is not the one its config.json describes: copy both again")
    model.provenance = {**provenance, "weights_sha256": digest}
    return model.eval()
