"""A cohort: opened from the catalogue or a store, saved, cut into scans and splits.

Datasets go in and come out; one subject's files are read in `scans`. Data stay lazy (Dask) until
somebody computes them; labels are in memory.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pandas as pd
import xarray as xr

from bhx.catalog import load_entry
from bhx.schema import ROI_COORDS, T1_SHAPE, InputError, build_cohort, check, listed

SHARD_BYTES = 64e6  # of one file of a store; a store of one file a subject chokes file systems
FLOAT16_MAX = 6e4


def open_cohort(name_or_path, *, catalog=None, voxel_mm=None) -> xr.Dataset:
    """Open a cohort lazily.

    Parameters
    ----------
    name_or_path : name of a catalogue entry ("synthetic", "sample", ...) or path of a zarr store
    catalog : folder with catalogue entries of your own
    voxel_mm : average the T1 to voxels of this size [mm]; as stored by default

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
    path = Path(name_or_path)
    if path.exists() or path.suffix == ".zarr" or len(path.parts) > 1:
        cohort = _open_store(path)
    else:
        entry = load_entry(str(name_or_path), catalog)
        cohort = _OPENERS[entry.layout](entry)
    return cohort if voxel_mm is None else coarsen_t1(check(cohort, "cohort"), voxel_mm)


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
        raise InputError(
            f"Expected a subject of this cohort, found '{subject}'",
            f"The ids are {listed(cohort.subject.values)}",
        )
    row = cohort.sel(subject=subject)
    if "bold" not in cohort or not row.has_bold:
        raise InputError(f"Expected a scan with BOLD, found none for '{subject}'", "See has_bold")
    bold = row.bold.isel(time=slice(0, int(row.n_volumes)))
    seconds = ("time", np.arange(bold.sizes["time"]) * float(row.tr), {"units": "s"})
    return bold.assign_coords(time=seconds)


def split(
    cohort: xr.Dataset,
    *,
    shares: dict[str, float] | None = None,
    stratify: str | list[str] = (),
    leave_out: str | None = None,
    repeats: int = 1,
    seed: int = 0,
    path=None,
) -> xr.DataArray:
    """Cut a cohort into parts by participant: all scans of one participant share a part.

    Parameters
    ----------
    shares : share of the participants in each part, by default train 0.6, validation 0.2, test 0.2
    stratify : subject coordinates whose combinations every part gets its share of, such as
        ["site", "diagnosis"]; a participant counts with its first scan
    leave_out : subject coordinate, such as "site": one repeat for each of its values, whose
        participants are "test" and all others "train"
    repeats, seed : how many independent cuts, and where the random numbers start
    path : of a JSON file that keeps the split with the cohort's hash; when it is there already, the
        split is read from it

    Returns
    -------
    DataArray (repeat, subject) of part names; `cohort.sel(subject=parts[0] == "train")`

    Raises
    ------
    InputError
        A coordinate is missing, the shares do not sum to 1, a participant has two values of
        `leave_out`, or the kept split was made from other subjects or with other options.
    """
    check(cohort, "cohort")
    shares = shares or {"train": 0.6, "validation": 0.2, "test": 0.2}
    stratify = [stratify] if isinstance(stratify, str) else list(stratify)
    _check_split(cohort, shares, stratify, leave_out)
    made_by = {
        "cohort_sha256": cohort_hash(cohort),
        "seed": seed,
        "shares": shares,
        "stratify": stratify,
        "leave_out": leave_out,
        "repeats": repeats,
    }
    if path is not None and Path(path).exists():
        return _read_split(cohort, path, made_by)
    names = [*stratify, leave_out] if leave_out else stratify
    rows = pd.DataFrame({name: cohort[name].values for name in ["participant", *names]})
    people = rows.drop_duplicates("participant").set_index("participant")
    if leave_out:
        values = people[leave_out]
        cuts = {v: np.where(values == v, "test", "train") for v in sorted(values.unique())}
    else:
        cuts = {i: _cut(people, shares, seed + i) for i in range(repeats)}
    parts = [pd.Series(cut, people.index)[rows.participant].to_numpy(str) for cut in cuts.values()]
    parts = _as_split(list(cuts), cohort.subject.values, np.stack(parts), made_by)
    if path is not None:
        kept = {"repeat": list(cuts), "subject": parts.subject.values.tolist()}
        kept |= {"part": parts.values.tolist(), "made_by": made_by}
        Path(path).write_text(json.dumps(kept, indent=1, default=str), encoding="utf8")
    return parts


def cohort_hash(cohort: xr.Dataset) -> str:
    """SHA-256 of who is in a cohort: the ids and participants of its rows, in their order."""
    rows = zip(cohort.subject.values.tolist(), cohort.participant.values.tolist(), strict=True)
    return hashlib.sha256(json.dumps(list(rows)).encode()).hexdigest()


def _cut(people, shares, seed):
    """A part for each participant: strata in turn, each member to the part furthest behind."""
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(people))
    if len(people.columns):
        strata = people.astype(str).agg(" / ".join, axis=1).to_numpy(str)
        order = order[np.argsort(strata[order], kind="stable")]
    names, wanted = list(shares), np.array(list(shares.values()))
    given, parts = np.zeros(len(names)), np.empty(len(people), object)
    for i, person in enumerate(order):
        behind = int(np.argmax(wanted * (i + 1) - given))
        given[behind] += 1
        parts[person] = names[behind]
    return parts


def _check_split(cohort, shares, stratify, leave_out):
    for name in [*stratify, *([leave_out] if leave_out else [])]:
        if name not in cohort.coords or cohort[name].dims != ("subject",):
            on_subject = [n for n, c in cohort.coords.items() if c.dims == ("subject",)]
            raise InputError(
                f"Expected a coordinate on subject to split by, found '{name}'",
                f"This cohort has {listed(on_subject, 20)}",
            )
    if not np.isclose(sum(shares.values()), 1) or min(shares.values()) <= 0:
        raise InputError(
            f"Expected positive shares that sum to 1, found {shares}",
            "Give for instance shares={'train': 0.8, 'test': 0.2}",
        )
    if leave_out:
        several = pd.Series(cohort[leave_out].values).groupby(cohort.participant.values).nunique()
        if (several > 1).any():
            raise InputError(
                f"Expected one {leave_out} for each participant, found several for "
                f"{listed(several.index[several > 1])}",
                f"Choose the scans of one {leave_out} for them",
            )


def _read_split(cohort, path, made_by):
    """A kept split, when it was made from these subjects with these options."""
    kept = json.loads(Path(path).read_text(encoding="utf8"))
    for name, value in made_by.items():
        if kept["made_by"].get(name) != value:
            raise InputError(
                f"Expected the split in {path} to be made with {name}={value}, found "
                f"{kept['made_by'].get(name)}",
                "Give the same subjects and options, or another path for a new split",
            )
    return _as_split(kept["repeat"], kept["subject"], np.array(kept["part"]), made_by)


def _as_split(repeats, subjects, parts, made_by):
    coords = {"repeat": repeats, "subject": subjects}
    return xr.DataArray(parts, coords, ("repeat", "subject"), "part", made_by)


def coarsen_t1(cohort: xr.Dataset, voxel_mm: float) -> xr.Dataset:
    """The cohort with its T1 averaged in blocks to voxels of `voxel_mm`, lazily."""
    if "t1" not in cohort:
        return cohort
    fold = voxel_mm * cohort.sizes["x"] / T1_SHAPE[0]
    if fold != int(fold) or fold < 1 or any(cohort.sizes[axis] % fold for axis in "xyz"):
        raise InputError(
            f"Expected a T1 voxel that is a multiple of {T1_SHAPE[0] / cohort.sizes['x']:g} mm and "
            f"divides the {T1_SHAPE} mm grid, found {voxel_mm:g} mm",
            "Take 1, 2, 4, 8, 16 or 32 mm",
        )
    t1 = cohort.t1.coarsen(x=int(fold), y=int(fold), z=int(fold)).mean()
    return cohort.drop_dims(["x", "y", "z"]).assign(t1=t1.astype("float32"))


def save_cohort(cohort: xr.Dataset, path, *, t1_dtype="float32") -> Path:
    """Write a cohort as a zarr v3 store that xarray alone can open.

    One chunk a subject, many chunks a file (shards); chunks that hold only NaN are not written;
    text is of variable length. Subjects are written block by block, so memory does not grow with
    the cohort, and `attrs["complete"]` turns true at the very end.

    Parameters
    ----------
    cohort : lazy or in memory
    path : of the new store
    t1_dtype : "float32" or "float16"
    """
    check(cohort, "cohort")
    path = Path(path)
    if path.exists():
        raise InputError(f"Expected a new path, found something at {path}", "Choose another name")
    per_shard = create_store(cohort, path, t1_dtype=t1_dtype)
    data = cohort[list(cohort.data_vars)].drop_vars(list(cohort.coords))
    for start in range(0, cohort.sizes["subject"], per_shard):
        rows = slice(start, start + per_shard)
        block = data.isel(subject=rows).compute()
        block.to_zarr(path, region={"subject": rows}, consolidated=False, safe_chunks=False)
    finish_store(path)
    return path


def create_store(cohort, path, *, t1_dtype="float32") -> int:
    """Write labels and empty arrays for a cohort; how many subjects share a file is returned."""
    import dask.array as da

    per_subject = max(v[0].nbytes for v in cohort.data_vars.values())
    per_shard = int(2 ** np.clip(np.floor(np.log2(SHARD_BYTES / per_subject)), 0, 8))
    encoding, empty = {}, {}
    for name, v in cohort.data_vars.items():
        chunks, shards = (1, *v.shape[1:]), (per_shard, *v.shape[1:])
        dtype = t1_dtype if name == "t1" else "float32"
        empty[name] = (v.dims, da.empty(v.shape, dtype=dtype, chunks=shards), v.attrs)
        encoding[name] = {"chunks": chunks, "shards": shards, "fill_value": np.nan}
    attrs = {k: v for k, v in cohort.attrs.items() if k != "complete"} | {"complete": False}
    coords = {name: _text(c) for name, c in cohort.coords.items()}
    store = xr.Dataset(empty, coords, attrs)
    store.to_zarr(path, mode="w", consolidated=False, encoding=encoding, compute=False)
    return per_shard


def finish_store(path) -> None:
    """Mark a store as complete: the last thing its writer does."""
    import zarr

    zarr.open_group(path, mode="r+").attrs["complete"] = True


def _open_store(path):
    """A zarr store as a checked cohort: data lazy, labels in memory and as plain text."""
    import zarr

    if not (path / "zarr.json").exists():
        raise InputError(
            f"Expected a zarr v3 store at {path}, found "
            + ("no zarr.json" if path.exists() else "nothing"),
            "Write one with bhx.save_cohort or bhx.prepare",
        )
    cohort = xr.open_zarr(path, chunks={}, consolidated=False)
    if not cohort.attrs.get("complete", True):
        arrays = [zarr.open_array(path / name, mode="r") for name in cohort.data_vars]
        files = min(a.nchunks_initialized for a in arrays)
        each = (arrays[0].shards or arrays[0].chunks)[0]
        raise InputError(
            f"Expected a finished store at {path}, found at most {files * each} of "
            f"{cohort.sizes.get('subject', 0)} subjects written",
            "Run the call that writes it again",
        )
    cohort = cohort.assign_coords(
        {name: c.copy(data=_plain(c.values)) for name, c in cohort.coords.items()}
    )
    if "t1" in cohort:
        cohort["t1"] = cohort.t1.astype("float32")
    return check(cohort, "cohort")


def _text(coord):
    """Text of variable length for the store; numbers as they are."""
    if coord.dtype.kind not in "UOT":
        return coord.variable.compute()
    values = np.array([str(v) for v in coord.values.ravel()], object).reshape(coord.shape)
    return xr.Variable(coord.dims, values, coord.attrs)


def _plain(values):
    """Text as numpy's fixed-width str, which pandas and scikit-learn take as it is."""
    return np.array(values.tolist(), str) if values.dtype.kind in "OT" else values


def _open_synthetic(entry):
    from bhx.synthetic import synthetic_cohort

    return synthetic_cohort(**entry.options)


def _open_sample(entry):
    """The real scan of the atlas assets, and the MNI152 template as a subject with T1 only."""
    import dask
    import dask.array as da

    from bhx.atlas import load_atlas, load_sample
    from bhx.scans import read_template_t1

    real = load_sample()
    atlas = load_atlas("schaefer400").sel(roi=real.roi.values)
    series = da.from_array(real.bold.values[None], chunks=-1)
    template = da.from_delayed(dask.delayed(read_template_t1)(), T1_SHAPE, "float32")[None]
    ids = [real.attrs["participant"], "mni152"]
    return build_cohort(
        da.concatenate([series, da.full_like(series, np.nan)]),
        da.concatenate([da.full_like(template, np.nan), template]),
        subject={
            "subject": ids,
            "participant": ids,
            "site": ["leipzig", "montreal"],
            "tr": [real.attrs["tr"], np.nan],
            "n_volumes": [real.sizes["time"], 0],
            "has_bold": [True, False],
            "has_t1": [False, True],
        },
        roi={"roi": real.roi.values, **{name: atlas[name].values for name in ROI_COORDS}},
        attrs={
            "atlas": "schaefer400",
            "source": entry.name,
            "licence": entry.licence,
            "preprocessing": real.attrs["preprocessing"],
        },
    )


_OPENERS = {"synthetic": _open_synthetic, "sample": _open_sample}
