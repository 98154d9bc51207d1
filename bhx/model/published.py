"""Weights by name: files of a Hugging Face repository, from its cache or downloaded once."""

from __future__ import annotations

import json
import os
from pathlib import Path
from warnings import warn

from bhx.errors import InputError
from bhx.settings import folders

RELEASE = "hzlab/BrainHarmonix"  # where the authors publish; BHX_RELEASE names another place


def fetch(repository: str, files: list[str]) -> Path:
    """The folder that holds these files of a repository; what is downloaded is announced.

    Parameters
    ----------
    repository : "owner/name" on the Hugging Face Hub, or on that of HF_ENDPOINT
    files : their paths in it; those that it does not have are left to the reader to miss

    Raises
    ------
    InputError
        huggingface_hub is not installed, or the repository cannot be reached or read.
    """
    try:
        import huggingface_hub as hub
        from huggingface_hub import errors
    except ImportError as error:
        fact = "Expected the package huggingface_hub, found none"
        help = "pip install 'bhx[weights]', or load files you have as 'release:<folder>'"
        raise InputError(fact, help) from error
    try:
        return Path(hub.snapshot_download(repository, allow_patterns=files, local_files_only=True))
    except (errors.LocalEntryNotFoundError, errors.HFValidationError):
        pass  # not here, or refused below
    try:
        planned = hub.snapshot_download(repository, allow_patterns=files, dry_run=True)
        card = hub.HfApi().model_info(repository).card_data
        licence = getattr(card, "license", None) or "none stated: ask the authors"
        size = sum(file.file_size or 0 for file in planned if file.will_download) / 1e6
        warn(f"Downloading {size:,.0f} MB of {repository}; license: {licence}", stacklevel=4)
        return Path(hub.snapshot_download(repository, allow_patterns=files))
    except (errors.HfHubHTTPError, errors.HFValidationError, OSError, ValueError) as error:
        said = (str(error).splitlines() or [type(error).__name__])[0]
        fact = f"Expected the files of '{repository}', found none here, and none there ({said})"
        help = "Connect to the network once, or download them and load 'release:<folder>'"
        raise InputError(fact, help) from error


def check_as_before(repository: str, sha256: str) -> None:
    """Refuse weights of a repository that differ from those that were read the first time."""
    path = folders()["cache"] / "weights.json"
    known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    if known.setdefault(repository, sha256) != sha256:
        fact = f"Expected weights of {repository} with sha256 {known[repository][:12]}, as read "
        fact += f"first, found {sha256[:12]}"
        raise InputError(fact, f"Empty the cache and load again; if both are right, delete {path}")
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(f".{os.getpid()}")
    part.write_text(json.dumps(known, indent=1), encoding="utf-8")
    os.replace(part, path)
