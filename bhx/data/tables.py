"""Tables of parcel series as people have them (text, .npy, .mat): which axis holds the parcels, and
which parcel each line is.

Both are decided by evidence, and refused with the option to give where there is none.
"""

from __future__ import annotations

import csv
import gzip
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import xarray as xr

from bhx.data.atlas import ATLASES, aliases, centroids, load_atlas, match_names
from bhx.data.quality import homotopy
from bhx.errors import InputError, check_choice, listed
from bhx.schema import ROI_COORDS

MISSING = ["", "n/a", "NA", "NaN", "nan"]
NO_PARCEL = (
    r"(?i)(global.?signal|gsr?|csf|wm|white.?matter|time|volume|frame|index|(trans|rot)_[xyz])"
)
# Differences of the mean autocorrelation from one sample to the next, along time and along parcels:
# 0.3 to 0.7 in real scans (whose 5th percentile is 0.15), by chance below 0.1.
SMOOTHER, MUCH_SMOOTHER = 0.15, 0.4
MOST_SURPLUS = 60  # lines beside a cortical atlas that may be subcortical ones


class Table(NamedTuple):
    """Numbers as they stand in a file, and the names of its rows and columns, if any."""

    values: np.ndarray
    rows: list[str] | None = None
    columns: list[str] | None = None


def read_text(path: Path) -> Table:
    """Numbers separated by commas, semicolons, tabs or spaces, with names or without."""
    lines, numbers = _first_lines(path)
    separator = next((s for s in "\t;," if s in lines[-1].strip()), None)
    above, first = (_cells(line, separator) for line in lines[-2:])
    numbered = above[0] == "" and len(first) > 1 and not _is_number(first[1])  # by pandas, too
    named = not _is_number(first[numbered].replace(",", "."))
    header = lines[-2].startswith("#") or not all(map(_is_number, above[numbered + named :]))
    header = header or _counts_up(sorted(above[numbered + named :], key=float))
    frame = pd.read_csv(
        path,
        sep=separator or r"\s+",
        header=None,
        skiprows=numbers[-1] if header else numbers[-2],
        na_values=MISSING,
        encoding="utf-8-sig",
    ).iloc[:, int(numbered) :]
    frame = frame.set_index(frame.columns[0]) if named else frame
    for column in frame.columns[[kind.kind not in "iuf" for kind in frame.dtypes]]:
        odd = frame[column][pd.to_numeric(frame[column], errors="coerce").isna()].dropna()
        fact = f"Expected numbers in {path.name}, found '{[*odd.astype(str), 'text'][0]}'"
        raise InputError(fact, "Write parcels as columns under one line of names, and nothing else")
    rows = frame.index.astype(str).tolist() if named else None
    columns = above[-frame.shape[1] :] if header and len(above) >= frame.shape[1] else None
    values = frame.to_numpy(float)
    if columns and columns[0] == "" and _counts_up(values[:, 0]):  # the index of a DataFrame
        values, columns = values[:, 1:], columns[1:]
    return Table(values, rows, columns)


def _first_lines(path):
    """The lines up to the second one that is no comment, empty ones left out, and their numbers."""
    lines: list[str] = []
    numbers: list[int] = []
    with (gzip.open if path.name.lower().endswith(".gz") else open)(
        path, "rt", encoding="utf-8-sig"
    ) as file:
        for number, line in enumerate(file):
            if line.strip():
                lines.append(line)
                numbers.append(number)
                if len(lines) > 1 and not line.startswith("#"):
                    return lines, numbers
    fact = f"Expected lines of numbers in {path.name}, found {len(lines)} line"
    raise InputError(fact, "Write one line of parcel names, then one line for each volume")


def _cells(line, separator):
    cells = next(csv.reader([line], delimiter=separator)) if separator else line.split()
    return [cell.strip().lstrip("#").strip() for cell in cells if separator or cell != "#"]


def _is_number(cell):
    try:
        return cell in MISSING or np.isfinite(float(cell)) or True
    except ValueError:
        return False


def _counts_up(cells) -> bool:
    """Whether these are 0, 1, 2, ... or 1, 2, 3, ...: numbers of lines and not values."""
    found = pd.to_numeric(pd.Series(cells), errors="coerce").to_numpy(float)
    return len(found) > 2 and found[0] in (0, 1) and bool((np.diff(found) == 1).all())


def read_array(path: Path) -> Table:
    """A numpy array."""
    return Table(np.load(path, allow_pickle=False))


def read_mat(path: Path) -> Table:
    """A MATLAB file, v5 or v7.3: CONN's `names` and `data`, `ROISignals`, `tc`, or its matrix."""
    from scipy.io import loadmat

    try:
        content = loadmat(path, simplify_cells=True)
    except NotImplementedError:
        import h5py

        with h5py.File(path) as file:
            content = {key: _from_hdf5(file, file[key]) for key in file if not key.startswith("#")}
    if {"names", "data"} <= content.keys():  # CONN; regions of several series are confounds
        pairs = zip(content["names"], map(np.atleast_2d, content["data"]), strict=True)
        kept = {str(name): one.ravel() for name, one in pairs if 1 in one.shape}
        return Table(np.stack([*kept.values()], 1).astype(float), columns=[*kept])
    numbers = {k: np.asarray(v) for k, v in content.items() if np.ndim(v) == 2}
    found = {k: v for k, v in numbers.items() if v.dtype.kind in "iuf"}
    usual = [k for k in ("ROISignals", "tc") if k in found] or [*found]
    if len(usual) != 1:
        fact = f"Expected one matrix or ROISignals, tc, names and data in {path.name}, found "
        raise InputError(fact + (listed(usual) or "none"), "Save the series alone")
    return Table(found[usual[0]].astype(float))


def _from_hdf5(file, item):
    """MATLAB's transposed arrays, its text and its cells."""
    if not hasattr(item, "dtype"):
        return None
    values = item[()]
    if values.dtype == object:
        return [_from_hdf5(file, file[reference]) for reference in values.ravel()]
    text = item.attrs.get("MATLAB_class") == b"char"
    return "".join(map(chr, values.ravel())) if text else values.T


# Which axis, which parcel ---


def take_parcels(table: Table, atlas, *, order=None, parcels_in=None, where="the table"):
    """Names of parcels (the atlas's own), their series (roi, time), and what was decided or left
    out; without an atlas all lines under their own names."""
    if table.values.ndim != 2:
        fact = f"Expected time x parcel in {where}, found {table.values.shape}"
        raise InputError(fact, "Save an array with one row for each volume of one run")
    check_names(table, atlas, where)
    axis, notes = _parcels_in(table, atlas, parcels_in, where)
    names = getattr(table, axis)
    values = np.asarray(table.values if axis == "rows" else table.values.T, float)
    enough = atlas is None or len(values) >= atlas.sizes["roi"]
    if names is not None and enough and (found := _numbers(names)) is not None:
        values, names = values[_in_number_order(found, atlas, where)], None
    if atlas is None:
        names = np.arange(1, len(values) + 1).astype(str) if names is None else names
        return [*map(str, names)], values, notes
    if names is None:
        names, values, left = _by_order(values, atlas, order, where, table.values.shape)
        return match_names(names, atlas), values, notes + left
    known = np.isin(names, [*aliases(atlas)])
    if known.any() and not known.all():
        notes.append(f"left out {listed(np.asarray(names)[~known])}, no parcels of the atlas")
    known = known if known.any() else slice(None)
    return match_names(np.asarray(names)[known], atlas), values[known], notes


def check_names(table: Table, atlas, where: str) -> None:
    """Refuse repeated names, and without an atlas those of what is no parcel."""
    for names in filter(None, table[1:]):
        given = pd.Series(names)
        if given.duplicated().any() and _numbers(names) is None:
            found = f"{listed(given[given.duplicated()].unique())} again"
        elif atlas is None and (other := [n for n in names if re.fullmatch(NO_PARCEL, n)]):
            found = listed(other)
        else:
            continue
        fact = f"Expected one name for each parcel in {where}, and parcels alone, found {found}"
        raise InputError(fact, "Leave these lines out, or rename them")


def _parcels_in(table, atlas, given, where):
    """The axis that holds the parcels: as given, by names, by the atlas's count, by smoothness."""
    if given is not None:
        check_choice("parcels_in", given, ("rows", "columns"))
        return given, []
    sides = {"rows": table.rows, "columns": table.columns}
    named = [side for side, names in sides.items() if names and _numbers(names) is None]
    if len(named) == 2 and atlas is not None:
        known = {side: np.isin(sides[side], [*aliases(atlas)]).sum() for side in named}
        named = [max(named, key=known.__getitem__)]
    if len(named) == 1:
        return named[0], []
    lengths = dict(zip(sides, table.values.shape, strict=True))
    n = atlas.sizes["roi"] if atlas is not None else 0
    by_count = [s for s in sides if lengths[s] == n] or [s for s in sides if n < lengths[s]]
    if n and not by_count:
        _refuse_count(atlas, where, table.values.shape)
    by_number = [side for side, names in sides.items() if names]
    first = next((v[0] for v in (by_count, by_number) if len(v) == 1), None)
    # where parcels have places, `quality` asks next whether they behave as these say
    if first and atlas is not None and np.isfinite(centroids(atlas)).all():
        return first, []
    gap = smoothness(table.values) - smoothness(table.values.T)  # above 0: time runs along rows
    smoother = "rows" if gap > 0 else "columns"
    shape = " x ".join(map(str, table.values.shape))
    if first is None and abs(gap) > SMOOTHER:
        return smoother, [f"parcels taken from {smoother} of {shape}, since time is smooth"]
    if first is None or (abs(gap) > MUCH_SMOOTHER and smoother != first):
        fact = f"Expected to see which axis of {where} ({shape}) holds the parcels, found "
        fact += (
            "no name, number or smoothness that tells"
            if first is None
            else (f"{first} by their number but {smoother} by the smoothness of time")
        )
        raise InputError(fact, 'Say it: parcels_in="rows" or parcels_in="columns"')
    return first, []


def smoothness(series: np.ndarray) -> float:
    """Median over rows of the autocorrelation from one column to the next; rows of one scale, and
    without what all share."""
    with np.errstate(all="ignore"):
        z = np.nan_to_num(series - np.nanmean(series, 1, keepdims=True))
        z = z / np.maximum(z.std(1, keepdims=True), 1e-12)
        z = z - z.mean(0)
        size = (z**2).sum(1)
        return float(
            np.median(((z[:, 1:] * z[:, :-1]).sum(1) / np.maximum(size, 1e-12))[size > 1e-9])
        )


def _numbers(names):
    """The numbers of names that are one prefix, or none, and a number; None for other names."""
    found = [re.fullmatch(r"(.*?)[ _.-]?0*(\d+)(?:\.0)?", str(name)) for name in names]
    if not all(found) or len({one[1].lower() for one in found}) > 1:
        return None
    return np.array([int(one[2]) for one in found])


def _in_number_order(numbers, atlas, where):
    """Where each number stands, from the lowest on: 1 to n or 0 to n - 1, or the atlas's labels."""
    full = [np.arange(len(numbers)), np.arange(1, len(numbers) + 1)]
    full += [] if atlas is None else [np.sort(atlas.label.values)]
    if not any(np.array_equal(np.sort(numbers), one) for one in full):
        lost = np.setdiff1d(full[1], numbers)
        fact = f"Expected numbered parcels without a gap in {where}, found {len(numbers)} up to "
        fact += f"{numbers.max()}, without {listed(lost)}"
        raise InputError(fact, "Name the parcels as the atlas does")
    return np.argsort(numbers, kind="stable")


def _by_order(values, atlas, order, where, shape):
    """Names of lines without any: the atlas's, in its order; surplus lines beside a cortical atlas
    are left out at the end, or where partners then go together clearly better at the start."""
    if order is None and atlas.attrs["atlas"] in ATLASES:
        fact = f"Expected parcel names in {where}, found none"
        raise InputError(fact, "Give the order of its columns, such as order='7networks'")
    other = order not in (None, atlas.attrs["order"])
    own = load_atlas(atlas.attrs["atlas"], order) if other else atlas
    names, n, surplus = own.roi.values, own.sizes["roi"], len(values) - own.sizes["roi"]
    if not 0 <= surplus <= (MOST_SURPLUS if own.attrs["atlas"] in ATLASES else 0):
        _refuse_count(own, where, shape)
    if not surplus:
        return names, values, []
    coords = {name: ("roi", own[name].values) for name in ROI_COORDS}
    parts = {"last": values[:n], "first": values[surplus:]}
    fit = {k: homotopy(xr.DataArray(v, coords, ("roi", "time"))) for k, v in parts.items()}
    left = "first" if fit["first"] > fit["last"] + 0.1 else "last"
    return names, parts[left], [f"left out the {left} {surplus} of {len(values)} parcels"]


def _refuse_count(atlas, where, shape):
    fact = f"Expected the {atlas.sizes['roi']} parcels of {atlas.attrs['atlas']} in {where}, "
    fact += f"found {' x '.join(map(str, shape))}"
    raise InputError(fact, "Choose the atlas it was made with")
