"""Readers of files by modality, and what every file must pass: it is there, its affine is sound,
its space is MNI152."""

from __future__ import annotations

import os
import re
import zipfile
import zlib
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

import nibabel as nib
import numpy as np

from bhx.errors import InputError
from bhx.modalities.base import Modality
from bhx.modalities.t1 import MNI_ORIGIN, MNI_STEP
from bhx.modalities.table import MODALITIES

MNI_AFFINE = np.diag([*MNI_STEP, 1.0])
MNI_AFFINE[:3, 3] = MNI_ORIGIN

# Entities of file names that tell forms of one run apart; others (acq, dir, rec ...) tell runs.
FORM = {"space", "cohort", "hemi", "den", "res", "desc", "atlas", "seg", "scale", "stat", "label"}
FORM |= {"tpl", "from", "to", "mode"}

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
    codes = ("qform_code", "sform_code")
    if isinstance(image, nib.Nifti1Image) and not any(int(image.header[code]) for code in codes):
        fact = f"Expected a position in {name}, found neither a qform nor an sform (codes 0)"
        raise InputError(fact, "Copy the header of the file it was made from, such as by fslcpgeom")
    if affine is None or not (np.isfinite(affine).all() and abs(np.linalg.det(affine)) > 1e-6):
        fact = f"Expected an invertible affine in {name}, found {affine}"
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


def entities(name: str) -> dict[str, str]:
    """What a file's name says, key-value by key-value."""
    return dict(re.findall(r"(?:^|_)([a-zA-Z]+)-([^_.]+)", name))


def space_of(name: str) -> str:
    """The space that a file's name says, such as MNI152NLin6Asym or MNIInfant:1, or ""."""
    tags = entities(name)
    space = tags.get("space") or tags.get("tpl", "")
    return f"{space}:{tags['cohort']}" if space and "cohort" in tags else space


def check_space(path, labels=None) -> None:
    """Refuse a file whose name says a space other than MNI152 or that of its label image."""
    spaces = [(space_of(Path(file).name), file) for file in (path, labels) if file]
    odd = [one for one in spaces if one[0] and not re.match(r"(?i)mni(152|$)", one[0])]
    same = len(odd) == 2 and odd[0][0] == odd[1][0]
    if odd and not same:
        space, file = odd[0]
        fact = (
            f"Expected an image in MNI152 space, found space-{space.replace(':', '_cohort-')} in "
        )
        help = "Take that of fMRIPrep's --output-spaces MNI152NLin6Asym, or labels in its space"
        raise InputError(fact + Path(file).name, help)


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


@contextmanager
def reading(path, what: str):
    """Report whatever goes wrong while `what` is read from a file, with the file's name."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        cut = isinstance(error, (EOFError, OSError, zlib.error)) or "mmap" in str(error)
        help = "Convert the file: it is of another kind, or written in another form"
        help = "Copy the file again: it may be damaged" if cut else help
        if zipfile.is_zipfile(path):
            help = "Unpack it: this is a zip"
        with attempt(f"to read {what} from {Path(path).name}", help):
            raise
