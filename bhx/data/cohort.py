"""A cohort: opened from the catalog or a store, saved, cut into scans and splits.

Data stay lazy (Dask) until somebody computes them; labels are in memory.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import dask
import dask.array as da
import numpy as np
import pandas as pd
import xarray as xr

from bhx.data.anatomy import read_t1, read_template_t1
from bhx.data.atlas import load_atlas, load_sample, parcel_labels, with_atlas
from bhx.data.catalog import catalog_files, entry_of, entry_rows, load_entry
from bhx.data.derivatives import reserved
from bhx.data.prepare import check_rows, prepare
from bhx.data.quality import check_bold_quality
from bhx.data.store import open_store
from bhx.data.tables import Table, take_parcels
from bhx.errors import InputError, listed
from bhx.modalities.bold import BOLD, check_tr
from bhx.modalities.t1 import ANATOMY, T1_SHAPE
from bhx.schema import build_cohort, check
from bhx.settings import folders


def open_cohort(name_or_path, *, path=None, catalog=None, **options) -> xr.Dataset:
    """Open a cohort lazily.

    Parameters
    ----------
    name_or_path : name of a catalog entry ("synthetic", "abide1", ...), path of a zarr store, or
        a folder of derivatives, or of files named as an entry says, which is prepared into bhx's
        cache folder first (see `prepare`)
    path : the folder of an entry's files, where it is not in bhx's data folder
    catalog : folder with catalog entries of your own
    options : of `prepare`, such as atlas=, instead of the entry's

    Returns
    -------
    xarray.Dataset
        The cohort (see `bhx.schema`): `bold (subject, roi, time)` and `t1 (subject, x, y, z)` as
        Dask arrays with one chunk a subject, every label in memory.

    Raises
    ------
    InputError
        The name is unknown, or the store is unfinished or not a cohort.
    """
    given = Path(name_or_path)
    is_store = given.suffix == ".zarr" or (given / "zarr.json").exists()
    if str(name_or_path) in catalog_files(catalog) or not (is_store or given.exists()):
        return _open_entry(load_entry(str(name_or_path), catalog), path, options)
    if is_store:
        return open_store(given)
    entry = entry_of(given, catalog)
    return _open_entry(entry, given, options) if entry else _prepared(given.name, given, **options)


def scan(cohort: xr.Dataset, subject) -> xr.DataArray:
    """One scan's BOLD `(roi, time)` without its padding, `time` in seconds.

    Parameters
    ----------
    cohort : with `bold`
    subject : id of a row of the cohort

    Raises
    ------
    InputError
        There is no such row, or it has no BOLD.
    """
    check(cohort, "cohort")
    if subject not in cohort.indexes["subject"]:
        fact = f"Expected a subject of this cohort, found '{subject}'"
        raise InputError(fact, f"The ids are {listed(cohort.subject.values)}")
    row = cohort.sel(subject=subject)
    if BOLD.variable not in cohort or not row[BOLD.has]:
        fact = f"Expected a scan with BOLD, found none for '{subject}'"
        raise InputError(fact, f"Choose a subject whose label {BOLD.has} is True")
    bold = row[BOLD.variable].isel(time=slice(0, int(row.n_volumes)))
    seconds = ("time", np.arange(bold.sizes["time"]) * float(row.tr), {"units": "s"})
    return bold.assign_coords(time=seconds)


def _open_entry(entry, folder, options):
    """A cohort of the catalog: made, or fetched or found and then prepared."""
    from bhx.data.synthetic import synthetic_cohort

    if entry.layout == "synthetic":
        return synthetic_cohort(**entry.options)
    if entry.layout == "sample":
        return _open_sample(entry)
    folder = None if folder is None else Path(folder)
    rows = entry_rows(entry, folders()["data"], folder)
    attrs = {"source": entry.name, "licence": entry.licence}
    place = "catalog" if folder is None else folder
    return _prepared(entry.name, rows, place, attrs=attrs, **{**entry.prepare, **options})


def _prepared(name, source, place=None, **options):
    """A folder or table, prepared into the cache folder."""
    place = str(Path(source if place is None else place).resolve()) if place != "catalog" else place
    if "atlas" in options:  # the same scans on other parcels are another store
        atlas = options["atlas"]
        place += str(atlas.attrs["atlas"] if isinstance(atlas, xr.Dataset) else atlas)
    key = hashlib.sha256(place.encode()).hexdigest()[:8]
    return prepare(source, folders()["cache"] / f"{name}-{key}.zarr", **options)


def _open_sample(entry):
    """The real scan of the atlas assets, and the MNI152 template as a subject with T1 only."""
    real = load_sample()
    atlas = load_atlas("schaefer400").sel(roi=real.roi.values)
    series = da.from_array(real[BOLD.variable].values[None], chunks=-1)
    template = da.from_delayed(dask.delayed(read_template_t1)(), T1_SHAPE, "float32")[None]
    ids = [real.attrs["participant"], "mni152"]
    subject = {
        "subject": ids,
        "participant": ids,
        "site": ["leipzig", "montreal"],
        "tr": [real.attrs["tr"], np.nan],
        "n_volumes": [real.sizes["time"], 0],
        BOLD.has: [True, False],
        ANATOMY.has: [False, True],
    }
    bold = da.concatenate([series, da.full_like(series, np.nan)])
    t1 = da.concatenate([da.full_like(template, np.nan), template])
    about = {"atlas": "schaefer400", "source": entry.name, "licence": entry.licence}
    about["preprocessing"] = real.attrs["preprocessing"]
    return build_cohort({BOLD.name: bold, ANATOMY.name: t1}, subject, parcel_labels(atlas), about)


def as_cohort(bold, labels, *, atlas, tr=None, t1=None, attrs=None) -> xr.Dataset:
    """Arrays in memory and a table of people as a cohort: the shortest way in.

    Parameters
    ----------
    bold : a list with one array (time, parcels) a scan, as nilearn's maskers return; columns of
        DataFrames go by their names
    labels : DataFrame with a line a scan, in the same order, and what is known of it (age, site,
        sex, ...); its column `subject` or `participant`, else its index, holds the ids, and its
        columns `session` and `run` tell scans of one participant apart
    atlas : whose parcels the columns are, in its order (see `bhx.load_atlas`, `bhx.build_atlas`)
    tr : repetition time [s], one or a list; by default the column `tr` of labels
    t1 : a list of T1 images in MNI152 space (paths; None where there is none), skull-stripped
    attrs : more attributes of the cohort, such as its licence

    Returns
    -------
    The cohort, in memory. As in `bhx.prepare`, scans that cannot be used are left out and named,
    with the reason, in `attrs["refused"]`, and what is odd is in the label `warnings`.

    Raises
    ------
    InputError
        The arrays fit neither the atlas nor the labels, or no scan can be used.
    """
    atlas, (people, notes) = load_atlas(atlas), _people(labels)
    _check_arrays(bold, people.subject, atlas)
    people["tr"] = people.get("tr", np.nan) if tr is None else tr
    check_tr(people.tr, people.subject)
    rows, series, images, refused = [], [], [], {}
    for i, row in enumerate(people.to_dict("records")):
        image = None if t1 is None else t1[i]
        one = _run(bold[i], row, atlas)
        try:
            one, facts, warnings = check_bold_quality(one, row.get("mean_fd", np.nan))
            if image is not None:
                image, odd = read_t1(image)
                warnings += odd
        except InputError as error:
            refused[row["subject"]] = str(error)
            continue
        has = {BOLD.has: True, ANATOMY.has: image is not None, "warnings": "; ".join(warnings)}
        rows.append(row | facts | has)
        series.append(one.values)
        images.append(image)
    if not rows:
        fact = f"Expected a usable scan, found none among {len(bold)}; the first: "
        raise InputError(fact + next(iter(refused.values())), "Correct what this reason names")
    attrs = {"notes": notes, **(attrs or {})}
    return _in_memory(pd.DataFrame(rows), series, images, atlas, refused, attrs)


def _people(labels):
    """Labels with ids, typed, and without names that a cohort has for itself; notes."""
    if not isinstance(labels, pd.DataFrame):
        fact = f"Expected labels as a DataFrame, found {type(labels).__name__}"
        raise InputError(fact, "Give a line a scan, with the ids as its index")
    people = labels.reset_index(drop=True)
    if not {"subject", "participant"} & {*people}:
        people.insert(0, "participant", labels.index)
    runs = [c for c in ("participant", "session", "run") if c in people]
    if "subject" not in people:
        people["subject"] = people[runs].astype(str).agg("/".join, axis=1)
    taken = reserved() - {"subject", "participant", "tr"} - {BOLD.has, ANATOMY.has}
    if taken := sorted(taken & {*people}):
        fact = f"Expected labels with names that bhx does not use itself, found {listed(taken)}"
        raise InputError(fact, "Rename these columns")
    rows, notes = check_rows(people)
    rows = pd.DataFrame(rows).set_index("subject", drop=False)
    return rows.loc[people["subject"].astype(str)].reset_index(drop=True), notes


def _check_arrays(bold, subjects, atlas):
    """As many arrays as lines of labels, each time x parcels of the atlas."""
    if len(bold) != len(subjects):
        fact = f"Expected an array for each of {len(subjects)} lines of labels, found {len(bold)}"
        raise InputError(fact, "Give labels of these scans alone, in their order")
    shapes = [np.shape(one) for one in bold]
    n = atlas.sizes["roi"]
    unnamed = [i for i, one in enumerate(bold) if not isinstance(one, pd.DataFrame)]
    wrong = [i for i in unnamed if len(shapes[i]) != 2 or shapes[i][1] != n]
    if wrong:
        found = [f"{shapes[i]} of {subjects.iloc[i]}" for i in wrong]
        turned = all(len(s) == 2 and s[0] == n for s in shapes)
        fact = f"Expected arrays of time x {n} parcels of {atlas.attrs['atlas']}, "
        help = (
            "Transpose them: [one.T for one in arrays]"
            if turned
            else "Give the atlas they come from"
        )
        raise InputError(f"{fact}found {listed(found)}", help)


def _run(one, row, atlas):
    """One scan (roi, time) in the atlas's order; the columns of a DataFrame go by their names."""
    names = [*map(str, one.columns)] if isinstance(one, pd.DataFrame) else None
    how = {"order": atlas.attrs["order"], "parcels_in": "columns", "where": row["subject"]}
    names, values, _ = take_parcels(Table(np.asarray(one), None, names), atlas, **how)
    about = {"tr": float(row["tr"]), "file": row["subject"]}
    run = xr.DataArray(values, {"roi": names}, BOLD.dims, BOLD.name, about)
    labels = {name: ("roi", values) for name, values in parcel_labels(atlas).items()}
    return run.sel(roi=atlas.roi.values).assign_coords(labels)


def _in_memory(table, series, images, atlas, refused, attrs):
    """Rows, series and images as a cohort, lazy by subject like any other."""
    longest = max(one.shape[1] for one in series)
    bold = np.full((len(series), len(series[0]), longest), np.nan, np.float32)
    for row, one in zip(bold, series, strict=True):
        row[:, : one.shape[1]] = one
    t1 = None
    if any(image is not None for image in images):
        nothing = np.full(T1_SHAPE, np.nan, np.float32)
        t1 = np.stack([nothing if image is None else image.values for image in images])
        t1 = da.from_array(t1, chunks=(1, *T1_SHAPE))
    text = table.select_dtypes(exclude=["number", "bool"]).columns
    table[text] = table[text].astype(object).where(table[text].notna(), "").astype(str)
    subject = {name: table[name].to_numpy(str if name in text else None) for name in table}
    data = {BOLD.name: da.from_array(bold, chunks=(1, *bold.shape[1:])), ANATOMY.name: t1}
    about = {"atlas": atlas.attrs["atlas"], "source": "arrays", "refused": refused, **(attrs or {})}
    return with_atlas(build_cohort(data, subject, parcel_labels(atlas), about), atlas)
