"""The catalogue: one validated YAML entry a cohort, where it comes from and on which terms.

No scan is read and nothing is fetched here.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from bhx.schema import InputError, listed

USER_FOLDER = "BHX_CATALOG"  # environment variable: a folder with entries of your own


class Phenotype(BaseModel):
    """One column of a cohort's table of participants."""

    model_config = ConfigDict(extra="forbid")
    units: str = ""
    coding: dict[str | int, str] = {}
    column: str = ""  # its name in the source, when that differs


class Entry(BaseModel):
    """One cohort of the catalogue."""

    model_config = ConfigDict(extra="forbid")
    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]*$")]
    title: str
    access: Literal["open", "agreement", "application", "local"]
    licence: str
    homepage: str = ""
    citation: str
    modalities: list[Literal["bold", "t1"]]
    layout: Literal["synthetic", "sample", "nilearn", "derivatives", "table", "zarr"]
    sites: dict[str, float | list[float] | None] = {}  # site -> TR(s) [s]
    phenotypes: dict[str, Phenotype] = {}
    steps: list[str] = []  # what to download by hand, and where to put it
    path: str = ""  # inside the catalogue's folder or the user's data folder, never outside
    options: dict[str, str | int | float | bool | list[str]] = {}
    splits: dict[str, float | str | int] = {}


def load_entry(name: str, catalog: str | Path | None = None) -> Entry:
    """The catalogue entry of one cohort.

    Parameters
    ----------
    name : of an entry, such as "synthetic" or "abide1"
    catalog : a folder with entries of your own; by default the one named by BHX_CATALOG

    Raises
    ------
    InputError
        No entry has this name, or the entry does not follow the schema.
    """
    files = catalog_files(catalog)
    if name not in files:
        raise InputError(
            f"Expected a cohort of the catalogue or the path of a store, found '{name}'",
            f"The catalogue has {listed(sorted(files), 30)}",
        )
    return read_entry(files[name])


def catalog_files(catalog: str | Path | None = None) -> dict[str, Path]:
    """Every entry's file by its name; entries of the user's own folder come first."""
    own = catalog or os.environ.get(USER_FOLDER)
    if own and not Path(own).is_dir():
        raise InputError(
            f"Expected a folder of catalogue entries, found none at {own}", "Create it"
        )
    folders = [shipped_folder(), *([Path(own)] if own else [])]
    return {file.stem: file for folder in folders for file in sorted(folder.glob("*.yaml"))}


def shipped_folder() -> Path:
    """The catalogue that travels with bhx: inside an installed wheel, else beside the package."""
    package = Path(__file__).parent
    inside = package / "data_catalog"
    return inside if inside.is_dir() else package.parent / "data_catalog"


def read_entry(file: Path) -> Entry:
    """Read and validate one entry."""
    try:
        entry = Entry.model_validate(yaml.safe_load(Path(file).read_text(encoding="utf8")))
    except yaml.YAMLError as error:
        raise InputError(
            f"Expected plain YAML in {file}, found {str(error).splitlines()[0]}",
            "Use mappings, lists, text and numbers only, without tags",
        ) from error
    except ValidationError as error:
        found = error.errors()[0]
        where = ".".join(map(str, found["loc"])) or "the entry"
        raise InputError(
            f"Expected a valid catalogue entry in {file}, found {where}: {found['msg']}",
            "See data_catalog/README.md for the fields",
        ) from error
    if entry.name != Path(file).stem:
        raise InputError(
            f"Expected the entry '{Path(file).stem}' in {file}, found the name '{entry.name}'",
            "Give the file the entry's name",
        )
    return entry
