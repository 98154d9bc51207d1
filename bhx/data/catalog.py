"""Where cohorts come from: the catalog's entries and their terms, and the files in a folder.

No scan is read here; what is fetched is fetched by nilearn.
"""

from __future__ import annotations

import os
from pathlib import Path, PurePosixPath
from typing import Annotated, Literal

import pandas as pd
import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from bhx.data.derivatives import find_scans, with_participants
from bhx.data.files import attempt, file_columns
from bhx.data.labels import as_words, coded, typed
from bhx.errors import InputError, check_choice, listed
from bhx.modalities.table import modality
from bhx.settings import PACKAGE

USER_FOLDER = "BHX_CATALOG"  # environment variable: a folder with entries of your own


def _inside(path: str) -> str:
    """A path that stays below the folder it is relative to."""
    if {"/", ".."} & {*PurePosixPath(path).parts} or "\\" in path:
        raise ValueError(f"'{path}' leads out of the data folder")
    return path


def _column(name: str) -> str:
    check_choice("a column of files", name, file_columns())
    return name


InsidePath = Annotated[str, AfterValidator(_inside)]
PatternPath = Annotated[InsidePath, Field(pattern=r"(^|/)\{participant\}/")]
FileColumn = Annotated[str, AfterValidator(_column)]  # of a table of scans
ModalityName = Annotated[str, AfterValidator(lambda name: modality(name).name)]


class Strict(BaseModel):
    """Nothing but the fields below."""

    model_config = ConfigDict(extra="forbid")


class Phenotype(Strict):
    """One column of a cohort's table of participants."""

    units: str = ""
    coding: dict[str, str] = {}  # what the source writes -> what the cohort says
    missing: list[str | float] = []  # codes of missing values
    column: str = ""  # its name in the source, when that differs


class Fetch(Strict):
    """How nilearn fetches an open cohort, and the names in what it returns."""

    function: Literal["fetch_development_fmri", "fetch_abide_pcp", "fetch_adhd"]
    options: dict[str, bool | str | list[str] | None] = {}
    files: dict[FileColumn, str]  # column of a table of scans -> name of its list of paths
    id: str
    site: str = ""


class Entry(Strict):
    """One cohort of the catalog."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]*$")]
    title: str
    access: Literal["open", "agreement", "application", "local"]
    licence: str
    homepage: str = ""
    citation: str
    modalities: list[ModalityName]
    layout: Literal["synthetic", "sample", "nilearn", "derivatives", "files"]
    sites: dict[str, float | None] = {}  # site -> TR [s]; None: read it from the files
    phenotypes: dict[str, Phenotype] = {}
    missing: list[str | float] = []  # codes of missing values in any column
    fetch: Fetch | None = None
    files: dict[FileColumn, PatternPath] = {}  # each in a folder {participant}; * for any name
    path: InsidePath = ""  # of the folder, below the user's data folder
    steps: list[str] = []  # what to download by hand, and where to put it
    prepare: dict[str, str | float | dict[str, str | float] | None] = {}  # options of `prepare`
    options: dict[str, int | float] = {}  # of the synthetic cohort

    @model_validator(mode="after")
    def _can_be_had(self):
        needed = {"nilearn": "fetch", "files": "files"}.get(self.layout)
        if needed and not getattr(self, needed):
            raise ValueError(f"layout '{self.layout}' needs '{needed}'")
        if self.layout in ("derivatives", "files") and not (self.path and self.steps):
            raise ValueError(f"layout '{self.layout}' needs 'path' and 'steps'")
        return self


def catalog_table(catalog: str | Path | None = None) -> pd.DataFrame:
    """Every entry of the catalog, validated, as the table of data_catalog/README.md."""
    how = {"nilearn": "fetched", "derivatives": "by hand", "files": "by hand"}
    rows = [
        {
            "name": e.name,
            "cohort": e.title,
            "access": e.access,
            "data": " + ".join(e.modalities),
            "TR [s]": ", ".join(sorted({f"{tr:g}" for tr in e.sites.values() if tr})) or "as read",
            "how": how.get(e.layout, "made"),
            "licence": e.licence,
        }
        for e in map(read_entry, catalog_files(catalog).values())
    ]
    return pd.DataFrame(rows).sort_values("name", ignore_index=True)


def load_entry(name: str, catalog: str | Path | None = None) -> Entry:
    """The catalog entry of one cohort.

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
        fact = f"Expected a cohort of the catalog or the path of a store, found '{name}'"
        raise InputError(fact, f"The catalog has {listed(sorted(files), 30)}")
    return read_entry(files[name])


def catalog_files(catalog: str | Path | None = None) -> dict[str, Path]:
    """Every entry's file by its name; entries of the user's own folder come first."""
    own = catalog or os.environ.get(USER_FOLDER)
    if own and not Path(own).is_dir():
        fact = f"Expected a folder of catalog entries, found none at {own}"
        raise InputError(fact, f"Create it, or name another with catalog= or {USER_FOLDER}")
    folders = [shipped_folder(), *([Path(own)] if own else [])]
    return {file.stem: file for folder in folders for file in sorted(folder.glob("*.yaml"))}


def shipped_folder() -> Path:
    """The catalog that travels with bhx: inside an installed wheel, else beside the package."""
    inside = PACKAGE / "data_catalog"
    return inside if inside.is_dir() else PACKAGE.parent / "data_catalog"


def read_entry(file: Path) -> Entry:
    """Read and validate one entry."""
    help = "Use mappings, lists, text and numbers only, without tags"
    with attempt(f"plain YAML in {file}", help):
        content = yaml.safe_load(Path(file).read_text(encoding="utf8"))
    try:
        entry = Entry.model_validate(content)
    except ValidationError as error:
        found = error.errors()[0]
        where = ".".join(map(str, found["loc"])) or "the entry"
        fact = f"Expected a valid catalog entry in {file}, found {where}: {found['msg']}"
        raise InputError(fact, "Write that field as data_catalog/README.md says") from error
    if entry.name != Path(file).stem:
        fact = f"Expected the entry '{Path(file).stem}' in {file}, found the name '{entry.name}'"
        raise InputError(fact, "Give the file the entry's name")
    return entry


def entry_rows(entry: Entry, data_folder: Path, **options) -> pd.DataFrame:
    """The scans of a catalog entry as rows for `prepare`: fetched, or found where they belong.

    `options` are those of `find_scans` for a folder of derivatives.

    Raises
    ------
    InputError
        They are not there; the message says what to download, and where to put it.
    """
    if entry.fetch:
        return _fetched(entry, data_folder)
    folder = data_folder / entry.path
    if not folder.is_dir():
        steps = " ".join(f"({i}) {step.rstrip('.')}." for i, step in enumerate(entry.steps, 1))
        raise InputError(f"Expected {entry.title} in {folder}, found no such folder", steps)
    if entry.layout == "derivatives":
        options = {"atlas": entry.prepare.get("atlas", "schaefer400"), **options}
        return _recoded(find_scans(folder, **options), entry)
    return _recoded(_by_pattern(entry, folder, options.get("phenotypes")), entry)


def _fetched(entry, data_folder):
    from nilearn import datasets

    how = entry.fetch
    help = f"Try again with a network connection, or download it by hand from {entry.homepage}"
    with attempt(f"to fetch {entry.title}", help):
        found = getattr(datasets, how.function)(data_dir=data_folder, **how.options)
    rows = pd.DataFrame(found["phenotypic"]).reset_index(drop=True)
    ids = as_words(rows[how.id])
    named = pd.DataFrame({"subject": ids, "participant": ids})
    named["site"] = as_words(rows[how.site]) if how.site else next(iter(entry.sites), "")
    for column, key in how.files.items():
        named[column] = [*map(str, found[key])]
    columns = {p.column or name for name, p in entry.phenotypes.items()}
    return _recoded(pd.concat([named, rows[[c for c in rows if c in columns]]], axis=1), entry)


def _recoded(rows, entry):
    """Rows with the entry's names and codes for its phenotypes, its missing values gone."""
    notes = [*rows.attrs.get("notes", [])]
    rows = rows.rename(columns={p.column: name for name, p in entry.phenotypes.items() if p.column})
    taken = {*file_columns(), "subject", "participant", "session", "run", "site"}
    for name in [column for column in rows if column not in taken]:
        how = entry.phenotypes.get(name, Phenotype())
        missing, to_type = [*entry.missing, *how.missing], coded if how.coding else typed
        coding = {"coding": how.coding} if how.coding else {}
        rows[name], says = to_type(rows[name], name, **coding, missing=missing)
        notes += says
    rows.attrs["notes"] = notes
    return rows


def _by_pattern(entry, folder, phenotypes):
    """Files below a folder whose paths follow the entry's patterns, a row a participant."""
    found, notes = {}, []
    for column, pattern in entry.files.items():
        at = pattern.split("/").index("{participant}")
        for file in sorted(folder.glob(pattern.replace("{participant}", "*"))):
            if file.name.startswith("._"):  # left by macOS
                continue
            who = file.relative_to(folder).parts[at]
            first = found.setdefault(who, {}).setdefault(column, str(file))
            if first != str(file):
                notes.append(f"of several files of {who}, {first} is taken, {file} left out")
    rows = [{"subject": who, "participant": who, **files} for who, files in sorted(found.items())]
    if not rows:
        fact = f"Expected files such as {next(iter(entry.files.values()))} in {folder}, found none"
        raise InputError(fact, " ".join(entry.steps))
    table = pd.DataFrame(rows).fillna("")
    table.attrs["notes"] = notes
    return with_participants(table, folder, phenotypes)
