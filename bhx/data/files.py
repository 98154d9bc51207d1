"""Readers of files by modality, and what every file must pass: it is there, its affine is sound,
its space is MNI152."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from bhx.errors import InputError
from bhx.modalities.base import Modality
from bhx.modalities.t1 import MNI_ORIGIN, MNI_STEP
from bhx.modalities.table import MODALITIES

MNI_AFFINE = np.diag([*MNI_STEP, 1.0])
MNI_AFFINE[:3, 3] = MNI_ORIGIN

READERS: dict[str, Callable] = {}  # name of a modality -> reader of a row of a table of scans


def reader_of(modality: Modality) -> Callable:
    """Register a function that reads one subject's files of a modality.

    `reader(row, options)` gets the row of a table of scans, with paths under `modality.files`, and
    the options of `prepare`. It returns a DataArray (*modality.dims) with labels on its dims,
    facts about the subject (name -> value), and warnings; what cannot be used is an InputError.
    """

    def register(reader):
        READERS[modality.name] = reader
        return reader

    return register


def file_columns() -> list[str]:
    """Columns of a table of scans that name files; all others are labels of the subject."""
    return [*dict.fromkeys(name for m in MODALITIES.values() for name in m.files)]


def readable() -> dict[str, Modality]:
    """Column of a table of scans -> the modality whose own file stands there."""
    return {m.files[0]: m for m in MODALITIES.values() if m.name in READERS and m.files}


def check_file(path) -> Path:
    """Refuse a path that is no file with content."""
    path = Path(path)
    annex = os.path.islink(path) and "annex" in os.readlink(path)
    help = "Correct the path: it is relative to the folder that Python runs in"
    with attempt(f"a file at {path}", "Run datalad get" if annex else help):
        size = path.stat().st_size
    if path.is_dir() or size == 0:
        found = "a folder" if path.is_dir() else "0 bytes"
        fact = f"Expected a file with content at {path}, found {found}"
        raise InputError(fact, "Name the file inside the folder, or copy it again")
    return path


def check_affine(image, path) -> None:
    """Refuse an image whose voxel axes are not the world's, or whose two affines disagree."""
    affine, name = image.affine, Path(path).name
    if not np.isfinite(affine).all() or abs(np.linalg.det(affine[:3, :3])) < 1e-6:
        fact = f"Expected an invertible affine in {name}, found {affine[:3]}"
        raise InputError(fact, "Write it again with the affine of the file it was made from")
    steps = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
    if (cosine := np.abs(steps).max(0).min()) < 0.999:
        found = f"them oblique by {np.degrees(np.arccos(cosine)):.0f} degrees"
        fact = f"Expected axes along the world's in {name}, found {found}"
        raise InputError(fact, "Resample it to MNI152 space, in which images are never oblique")
    if not hasattr(image.header, "get_qform"):
        return
    (q, q_code), (s, s_code) = image.get_qform(coded=True), image.get_sform(coded=True)
    if q_code and s_code and (apart := np.abs(q - s).max()) > 1:
        fact = (
            f"Expected one orientation in {name}, found a qform and an sform {apart:.0f} mm apart"
        )
        raise InputError(fact, "Keep the right one in both: the other may flip left and right")


def check_space(path):
    """Refuse a file whose name says a space other than MNI152."""
    space = re.search(r"space-([a-zA-Z0-9]+)", Path(path).name)
    if space and not space[1].startswith(("MNI", "mni")):
        fact = f"Expected an image in MNI152 space, found space-{space[1]} in {Path(path).name}"
        raise InputError(fact, "Take that of fMRIPrep's --output-spaces MNI152NLin6Asym")


@contextmanager
def attempt(what: str, help: str):
    """Report whatever goes wrong inside as InputError: "Expected `what`, found ..."."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        reason = (str(error).splitlines() or ["no reason"])[0][:200]
        fact = f"Expected {what}, found {type(error).__name__}: {reason}"
        raise InputError(fact, help) from error


def reading(path, what: str):
    """Report whatever goes wrong while `what` is read from a file, with the file's name."""
    help = "Copy or convert the file again: it may be damaged or of another kind"
    return attempt(f"to read {what} from {Path(path).name}", help)
