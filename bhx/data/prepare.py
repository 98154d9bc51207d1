"""Files of many subjects to a cohort store, resumable. Whose files are read is registered by
modality (`files.reader_of`); this file works by dims and names no modality but one in `HALF`."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from warnings import warn

import dask
import dask.array as da
import numpy as np
import pandas as pd
import xarray as xr
import zarr

import bhx.data.anatomy  # noqa: F401 - registers its reader
from bhx.data.atlas import ATLASES, load_atlas, match_names, parcel_labels, with_atlas
from bhx.data.bold import beside, check_table, fetch_labels, is_volume
from bhx.data.catalog import catalog_files, entry_rows, load_entry
from bhx.data.derivatives import FACTS, find_scans
from bhx.data.files import READERS, attempt, file_columns, readable
from bhx.data.labels import as_words, tidy
from bhx.data.store import (
    compute_each,
    count_written,
    create_store,
    extend_store,
    fill,
    mend,
    only_writer,
    open_store,
    write_labels,
    write_rows,
)
from bhx.errors import InputError, listed
from bhx.modalities.bold import BOLD
from bhx.modalities.t1 import ANATOMY
from bhx.modalities.table import MODALITIES
from bhx.schema import build_cohort, check_names, dims_of, is_missing
from bhx.settings import folders

DENOISING = {"strategy": "simple"}
HALF = (ANATOMY.variable,)  # stored in half precision
FLOAT16_RANGE = (0.1, 6e4)  # of their highest value; others are scaled to keep precision
IDS = ("subject", "participant", "site", "session", "run")
WORDS = (*IDS, "warnings", "inputs", "bold_scale")  # labels that are text whatever they hold
MADE_DIMS = ("time", "x", "y", "z")  # their labels follow from their length: see build_cohort


def read_scan(
    row: dict,
    *,
    atlas="schaefer400",
    voxel_mm: float = 1.0,
    denoising: dict | None = None,
    order: str | None = None,
    labels=None,
    parcels_in: str | None = None,
) -> tuple[xr.Dataset, list[str]]:
    """Read and check the files of one row: BOLD on parcels, T1 on the grid, and what is odd.

    Parameters
    ----------
    row : paths under `bold`, `confounds`, `t1`, `t1_mask` (each may be missing) and the columns of
        other modalities, `tr` [s] where no file states it, and any labels of the subject
    atlas, order, labels, parcels_in : see `bhx.data.bold.read_bold`
    voxel_mm : voxel of the T1 [mm]
    denoising : options of `bhx.data.bold.denoise` for BOLD that is not denoised yet; None leaves it
        as it is

    Returns
    -------
    Dataset with `bold (roi, time)`, `t1 (x, y, z)` and others as far as there are any, facts as
    attributes (tr, n_volumes, coverage, mean_fd, ...), and a list of warnings.

    Raises
    ------
    InputError
        The scan cannot be used.
    """
    options = {"atlas": atlas, "voxel_mm": voxel_mm, "denoising": denoising, "order": order}
    options |= {"labels": labels, "parcels_in": parcels_in}
    there = [modality for column, modality in readable().items() if row.get(column)]
    if not there:
        names = " or ".join(f"'{column}'" for column in readable())
        fact = f"Expected a row with a file under {names}, found none"
        raise InputError(fact, "Give the path of one")
    data, facts, warnings = [], {"n_volumes": 0, "tr": np.nan}, []
    for modality in there:
        values, more, odd = READERS[modality.name](row, options)
        if atlas is not None and "roi" in values.dims:
            values = _in_order(values, load_atlas(atlas))
        data.append(values.rename(modality.variable))
        facts |= more
        warnings += odd
    with attempt("the same labels on a dim of all files of a row", "Give them the same parcels"):
        merged = xr.merge(data, compat="override", join="exact", combine_attrs="drop")
    return merged.assign_attrs(facts), warnings


def _in_order(values, atlas):
    """Values of parcels by the atlas's own names, in its order."""
    values = values.assign_coords(roi=match_names(values.roi.values, atlas))
    with attempt(f"all parcels of {atlas.attrs['atlas']} in a file", "Give a line to each"):
        return values.sel(roi=atlas.roi.values)


def prepare(
    source,
    out,
    *,
    atlas="schaefer400",
    voxel_mm: float = 1.0,
    denoising: dict | None = DENOISING,
    order: str | None = None,
    labels=None,
    parcels_in: str | None = None,
    task: str = "rest",
    phenotypes=None,
    missing=None,
    redo: bool = False,
    attrs: dict | None = None,
    workers: int = 2,
    client=None,
) -> xr.Dataset:
    """Read a folder of derivatives, or a table of files, into a cohort store; open it.

    Each subject is one Dask task that leaves one finished file beside the store; at the end the
    files are packed into it. A run that was killed continues when it is started again, and its
    store equals that of an unbroken run. Subjects that the store has already are not read again,
    but get the labels that `source` has now; new ones are added behind them. Where files are no
    longer those that the store was made from (name and size, then time or checksum), nothing is
    done unless `redo` is True. A subject that cannot be used is left out and named, with the
    reason, in `attrs["refused"]`; what was taken for granted is in `attrs["notes"]`.

    A label is a number (NaN where missing) or text ("" where missing; truths are "True", "False").

    Parameters
    ----------
    source : folder (see `bhx.find_scans`); catalog entry, whose own options go before these;
        or a DataFrame with `subject`, `participant` and the paths `bold`, `confounds`, `t1`,
        `t1_mask` and those of other modalities (each optional), `tr` [s], and any labels
    out : path of the zarr store, new or made with the same options
    atlas, order, labels, parcels_in : see `bhx.data.bold.read_bold`
    voxel_mm : voxel of the T1 [mm], stored masked, unscaled, in half precision
    denoising : options of `bhx.data.bold.denoise` for BOLD that is not denoised yet, or None
    task, phenotypes : see `bhx.find_scans`
    missing : codes of missing values in labels, such as (-9999, 999); () for none; None asks where
        numbers look like codes
    redo : read subjects again whose files have changed
    attrs : more attributes of the cohort, such as its licence
    workers : subjects read at a time on threads; each holds one T1 and one volume of BOLD
    client : a dask.distributed Client, or the address of a Dask cluster, instead of threads

    Raises
    ------
    InputError
        No subject can be used, another process writes this store, or it has other options.
    """
    made_by = {"atlas": atlas, "voxel_mm": voxel_mm, "denoising": denoising, "order": order}
    made_by["labels"] = labels and str(labels)
    if parcels_in:
        made_by["parcels_in"] = parcels_in
    how = {"task": task, "phenotypes": phenotypes}
    source, made_by, attrs, of_task = _found(source, made_by, attrs or {}, how)
    made_by |= _atlas_of(made_by["atlas"])
    (rows, notes), out = check_rows(source, missing), Path(out)
    for note in notes:
        warn(note, stacklevel=2)
    with only_writer(out):
        if (out / "zarr.json").exists():
            mend(out)
        stored = _stored_labels(out, {**made_by, "task": of_task})
        changed = {row["subject"] for row in rows if _is_changed(row, stored, made_by)}
        if changed and not redo:
            fact = f"Expected the files that {out} was made from, found others for {len(changed)} "
            fact += f"subjects: {listed(sorted(changed))}"
            raise InputError(fact, "Read them again with redo=True, or give another path")
        kept = {*stored.index} - changed
        new = [row for row in rows if row["subject"] not in kept]
        folder = out.with_name(out.name + ".parts")
        parts = {row["subject"]: _part(folder, row, made_by) for row in new}
        refused = _stage(new, parts, made_by, workers, client)
        if stored.empty and len(refused) == len(rows):
            first = next(iter(refused.values()))
            fact = f"Expected a usable subject, found none among {len(rows)}; the first: {first}"
            raise InputError(fact, "Correct what this reason names, and prepare again")
        parts = {subject: part for subject, part in parts.items() if subject not in refused}
        about = {
            "source": "table",
            "preprocessing": json.dumps({**made_by, "task": of_task}),
            **attrs,
        }
        _pack(rows, stored, parts, out, about)
        zarr.open_group(out, mode="r+", use_consolidated=False).attrs.update(
            refused=refused, notes=notes
        )
        shutil.rmtree(folder, ignore_errors=True)
    return open_store(out)


def _found(source, made_by, attrs, how):
    """The table of files of an entry, a folder or a table; options, attributes, and the task if
    only its scans were looked for."""
    of_task = None if isinstance(source, pd.DataFrame) else how["task"]
    if isinstance(source, str) and source in catalog_files():
        entry = load_entry(source)
        made_by = made_by | entry.prepare
        attrs = {"source": entry.name, "licence": entry.licence, **attrs}
        source = entry_rows(entry, folders()["data"], atlas=made_by["atlas"], **how)
        of_task = how["task"] if entry.layout == "derivatives" else None
    if not isinstance(source, pd.DataFrame):
        attrs, of_task = {"source": str(source), **attrs}, how["task"]
        source = find_scans(source, atlas=made_by["atlas"], **how)
    return source, made_by, attrs, of_task


def _atlas_of(atlas) -> dict:
    """An atlas by its name, and a checksum of one that is not shipped."""
    if atlas is None:
        return {}
    known = load_atlas(atlas)
    name = known.attrs["atlas"]
    if name in ATLASES:
        return {"atlas": name}
    parts = b"".join(known[n].values.tobytes() for n in sorted(map(str, known.variables)))
    return {"atlas": name, "atlas_sha256": hashlib.sha256(parts).hexdigest()[:16]}


def check_rows(rows: pd.DataFrame, missing=None) -> tuple[list[dict], list[str]]:
    """Rows of a table of scans, complete, with typed labels and in the order of their unique ids;
    and notes. `missing` as in `prepare`."""
    notes, name_them = [*rows.attrs.get("notes", [])], "Name each row participant[/session][/run]"
    rows, files = rows.reset_index(drop=True), {*file_columns()}
    if "subject" not in rows and "participant" in rows:
        rows["subject"] = rows["participant"]
    if "subject" not in rows or not len(rows):
        fact = f"Expected rows with a column 'subject', found {len(rows)} rows with "
        raise InputError(fact + (listed(rows.columns, 20) or "no columns"), name_them)
    check_names({*rows.columns} - files)
    rows["subject"] = as_words(rows["subject"])
    if rows["subject"].duplicated().any() or "" in {*rows["subject"]}:
        twice = listed(rows["subject"][rows["subject"].duplicated()].unique()) or "a row without"
        fact = f"Expected unique subject ids, found {twice} more than once"
        raise InputError(fact, name_them)
    for name, default in {"participant": rows["subject"], "site": ""}.items():
        rows[name] = as_words(rows[name]) if name in rows else default
    rows["participant"] = rows["participant"].where(rows["participant"] != "", rows["subject"])
    for name in {*rows.columns} & {"session", "run"}:
        rows[name] = as_words(rows[name])
    for name in files & {*rows.columns}:
        rows[name] = rows[name].astype(object).where(rows[name].notna(), "")
    labels = [name for name in rows if name not in {*files, *IDS}]
    rows[labels], says = tidy(rows[labels], missing)
    return rows.sort_values("subject").to_dict("records"), [*notes, *says]


def _stored_labels(out, made_by):
    """Labels of the rows that a store has, by subject; it must have the same options."""
    if not out.exists():
        return pd.DataFrame(index=pd.Index([], dtype=object))
    group, n = zarr.open_group(out, mode="r", use_consolidated=False), count_written(out)
    before = json.loads(group.attrs.get("preprocessing", "{}"))
    differ = sorted(k for k in made_by if before.get(k) != made_by[k])
    if "task" in differ and None in (before.get("task"), made_by["task"]):
        differ.remove("task")  # a table of scans says none
    if differ:
        asked, found = ({k: o.get(k) for k in differ} for o in (made_by, before))
        fact = f"Expected {out} to be prepared with {asked}, found {found}"
        raise InputError(fact, "Give the same options, or another path")
    on_subject = {k: v for k, v in group.arrays() if v.metadata.dimension_names == ("subject",)}
    labels = {name: pd.Series(v[:n].tolist(), dtype=object) for name, v in on_subject.items()}
    return pd.DataFrame(labels).set_index("subject")


def _inputs(row, labels):
    """Files that a row is read from, [name, size, time], and its repetition time if it has one."""
    files = [row[k] for k in file_columns() if row.get(k)] + [labels or ""]
    files = [Path(file) for file in files if os.path.isfile(file)]
    files += beside(row.get(BOLD.files[0]))
    state = [[f.name, f.stat().st_size, f.stat().st_mtime_ns] for f in files]
    return files, [*state, ["tr", str(row.get("tr")), 0]]


def _checksums(files):
    sums = []
    for path in files:
        with open(path, "rb") as file:
            sums.append(hashlib.file_digest(file, "sha256").hexdigest()[:16])
    return sums


def _is_changed(row, stored, options):
    """Whether a row of the store was read from other files than it has now."""
    if row["subject"] not in stored.index or not stored.get("inputs", {}).get(row["subject"]):
        return False
    if not all(os.path.isfile(row[k]) for k in file_columns() if row.get(k)):
        return False  # files that are gone cannot be read again
    before = {"files": [], "sums": []} | json.loads(stored["inputs"][row["subject"]])
    files, now = _inputs(row, options["labels"])
    if before["files"] == now:
        return False
    alike = [one[:2] for one in before["files"]] == [one[:2] for one in now]
    return not alike or before["sums"] != _checksums(files)


# --- each subject to a file of its own ---


def _stage(rows, parts, options, workers, client):
    """Read every row that has no part yet, one task each; the reasons of those refused."""
    from tqdm.auto import tqdm

    todo = [row for row in rows if not parts[row["subject"]].exists()]
    given = options["labels"]  # not those of the atlas, which are no file of the user's
    options = {key: value for key, value in options.items() if key != "atlas_sha256"}
    for row in todo[:1]:  # what is wrong with the names of one table is wrong with all
        check_table(row.get(BOLD.files[0]), options["atlas"])
    if given is None and any(is_volume(row.get(BOLD.files[0])) for row in todo):
        options["labels"] = fetch_labels(options["atlas"])
    if options["atlas"] is not None:  # other processes may not know it by its name
        options["atlas"] = dask.delayed(load_atlas(options["atlas"]))  # sent once
    tasks = [dask.delayed(_stage_one)(row, parts[row["subject"]], options, given) for row in todo]
    with tqdm(total=len(rows), initial=len(rows) - len(todo), desc="prepare", unit="scan") as bar:
        reasons = compute_each(tasks, client, bar.update, workers)
    return {row["subject"]: why for row, why in zip(todo, reasons, strict=True) if why}


def _stage_one(row, part, options, labels):
    """Read one row into its part, which appears whole or not at all; why it was refused."""
    try:
        files, state = _inputs(row, labels)
        inputs = json.dumps({"files": state, "sums": _checksums(files)})
        data, warnings = read_scan(row, **options)
    except Exception as error:  # whatever is wrong with one subject must not end the run
        return str(error) if isinstance(error, InputError) else f"{type(error).__name__}: {error}"
    arrays = {name: v.values for name, v in data.data_vars.items()}
    for name in {*HALF} & {*arrays}:
        top = float(np.abs(arrays[name]).max())
        if not FLOAT16_RANGE[0] < top < FLOAT16_RANGE[1]:
            arrays[name] = arrays[name] * np.float32(1000 / top)
            warnings = [*warnings, f"intensities of '{name}' up to {top:g} scaled to 1000"]
        arrays[name] = arrays[name].astype("float16")
    about = {
        "labels": {"subject": row["subject"], **data.attrs}
        | {m.has: m.variable in arrays for m in MODALITIES.values()}
        | {"warnings": "; ".join(warnings), "inputs": inputs},
        "shapes": {name: v.shape for name, v in arrays.items()},
        "dims": {d: data[d].values.tolist() for d in data.indexes if d not in MADE_DIMS},
    }
    unfinished = part.with_suffix(f".{os.getpid()}.tmp")
    part.parent.mkdir(exist_ok=True)
    with open(unfinished, "wb") as file:
        np.savez(file, about=json.dumps(about, default=_in_json), **arrays)
    os.replace(unfinished, part)
    return None


def _in_json(value):
    """A label that JSON does not know: numpy's numbers as they are, dates and others as text."""
    return value.item() if hasattr(value, "item") else str(value)


def _part(folder, row, made_by):
    """The file of one row: another one when the row, its files or the options change."""
    name = json.dumps(
        [row, _inputs(row, made_by["labels"])[1], made_by], sort_keys=True, default=str
    )
    return folder / f"{hashlib.sha256(name.encode()).hexdigest()[:32]}.npz"


# --- those files to the store ---


def _pack(rows, stored, parts, out, about):
    """Put the parts of new rows, by their ids, and of rows read again, and all labels into the
    store."""
    facts, shapes, dims = _read_parts(parts.values())
    table = _label_table(rows, stored, facts)
    labels = {name: _one_type(table[name], name, stored.get(name, ()), out) for name in table}
    fresh = [subject for subject in parts if subject not in stored.index]
    if parts:
        new = _empty_cohort(table.index.get_indexer([*parts]), labels, shapes, dims, about)
    else:
        new = xr.open_zarr(out, chunks=None, consolidated=False).isel(subject=slice(0))
    if not out.exists():
        create_store(new, out, half=HALF)
    elif parts or not new.attrs.get("complete", True):
        extend_store(new.sel(subject=fresh) if fresh else new.isel(subject=slice(0)), out)
    if again := [subject for subject in parts if subject in stored.index]:
        broken = np.where(table.index.isin(again), "{}", labels["inputs"])
        write_labels(out, {**labels, "inputs": broken})
        with xr.open_zarr(out, chunks=None, consolidated=False) as whole:
            for subject in again:
                at = table.index.get_loc(subject)
                write_rows(out, slice(at, at + 1), _load_parts([parts[subject]], whole))
    write_labels(out, labels)
    ids = labels["subject"]
    fill(out, lambda rows: _load_parts([parts[i] for i in ids[rows]], new))


def _read_parts(parts):
    """Facts of each part, the longest shape of each variable, and the labels of their dims."""
    facts, shapes, dims = [], {}, {}
    for part in parts:
        with np.load(part) as file:
            about = json.loads(str(file["about"]))
        facts.append(about["labels"])
        for dim, names in about["dims"].items():
            if dims.setdefault(dim, names) != names:
                one = about["labels"]["subject"]
                found = f"{len(names)} of {one} and {len(dims[dim])} before"
                fact = f"Expected the same labels on '{dim}' in every scan, found {found}"
                raise InputError(fact, "Prepare scans of different atlases into different stores")
        for name, shape in about["shapes"].items():
            shapes[name] = np.maximum(shapes.get(name, shape), shape).tolist()
    return facts, shapes, dims


def _label_table(rows, stored, facts):
    """Labels of every row of a store: as the rows have them now, with what reading found out."""
    found = pd.DataFrame(facts, columns=None if facts else ["subject"], dtype=object)
    found = found.set_index("subject")
    ids = pd.Index([*stored.index, *found.index.difference(stored.index, sort=False)])
    asked = pd.DataFrame(rows).drop(columns=file_columns(), errors="ignore").astype(object)
    asked = asked.set_index("subject")
    read = FACTS | ({"mean_fd"} if any(row.get(BOLD.files[1]) for row in rows) else set())
    table = stored.reindex(ids).astype(object)
    for labels in (asked[asked.index.isin(ids)], found):
        names = [n for n in labels if labels is found or n not in read or n not in stored]
        for name in names:
            column = table[name] if name in table else pd.Series(np.nan, ids, dtype=object)
            table[name] = labels[name].reindex(ids).where(ids.isin(labels.index), column)
    table.insert(0, "subject", ids)
    return table


def _one_type(values, name, before, out):
    """A label as one array: numbers with NaN or text with ""; whether somebody has a modality."""
    missing = is_missing(values)
    if name in {m.has for m in MODALITIES.values()}:
        return values.where(~missing, False).to_numpy(bool)
    numbers = [isinstance(v, (int, float)) and not isinstance(v, bool) for v in values[~missing]]
    still_words = not numbers and any(isinstance(v, str) for v in before)
    if name not in WORDS and all(numbers) and not still_words:
        return values.where(~missing, np.nan).to_numpy(int if name == "n_volumes" else float)
    if any(numbers) and not all(numbers):
        word = next(v for v, n in zip(values[~missing], numbers, strict=True) if not n)
        fact = f"Expected only numbers or only words in '{name}' of {out}, found also '{word}'"
        raise InputError(fact, "Write it as the other subjects have it, or give another path")
    return as_words(values).to_numpy(str)


def _empty_cohort(at, labels, shapes, dims, attrs):
    """A cohort with the labels of some rows and arrays of the right shape, not yet filled."""
    in_order = [name for name in dims_of("cohort") if name in shapes]
    data = {name: da.empty((len(at), *shapes[name]), dtype="float32") for name in in_order}
    atlas = json.loads(attrs["preprocessing"])["atlas"]
    roi = {"roi": dims.pop("roi")} if "roi" in dims else {}
    if roi and atlas:
        roi = parcel_labels(load_atlas(atlas).sel(roi=roi["roi"]))
    subject = {name: values[at] for name, values in labels.items()}
    new = build_cohort(data, subject, roi, {"atlas": atlas or "", **attrs}).assign_coords(dims)
    return with_atlas(new, load_atlas(atlas)) if "roi" in roi and atlas else new


def _load_parts(parts, like):
    """Arrays of some rows, NaN where a row has none."""
    shapes = {name: (len(parts), *v.shape[1:]) for name, v in like.data_vars.items()}
    out = {name: np.full(shape, np.nan, "float32") for name, shape in shapes.items()}
    for i, part in enumerate(parts):
        with np.load(part) as file:
            for name in {*out} & {*file.files}:
                out[name][(i, *map(slice, file[name].shape))] = file[name]
    return out
