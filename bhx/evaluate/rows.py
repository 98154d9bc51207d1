"""Who enters, and with which truth.

Labels only: nothing is fitted here, and of the features no more is looked at than whether they are
there and are numbers.
"""

from __future__ import annotations

import json
from ast import literal_eval
from dataclasses import dataclass

import numpy as np
import pandas as pd
import xarray as xr

from bhx.errors import InputError, check_choice, listed
from bhx.evaluate.features import name_of
from bhx.evaluate.options import check_coords
from bhx.schema import is_missing, plain_labels, subject_coords

# Who enters ---


@dataclass
class Rows:
    """Who enters, and why others do not."""

    labels: xr.Dataset  # coordinates on subject of those who enter
    features: list  # Datasets of features in memory, as they were given
    excluded: dict  # reason -> ids

    @property
    def people(self) -> np.ndarray:
        """Participant of each row; where none is named, every row is one of its own."""
        named = "participant" if "participant" in self.labels.coords else "subject"
        return self.labels[named].values.astype(str)

    @property
    def families(self) -> np.ndarray | None:
        """Family of each row, where there are any; who has none is a family of one."""
        if "family" not in self.labels.coords:
            return None
        family = self.labels.family.values
        return np.where(is_missing(family), self.people, family)

    @property
    def sites(self) -> np.ndarray:
        """Site of each row, one and the same where none is named."""
        labels = self.labels
        return labels.site.values if "site" in labels.coords else np.zeros(len(labels.subject))


def common_rows(data: list, target: str, needed, classes=None, parts=None) -> Rows:
    """The subjects who have every label and every feature, and why the others do not enter.

    Parameters
    ----------
    data : Datasets with labels on subject and, some of them, features, which are read once
    needed : coordinates without which nobody enters, beside the target
    classes : labels of the target that enter, or None for all
    parts : DataArray of `bhx.split` whose subjects enter, or None
    """
    if not data:
        raise InputError("Expected features, found an empty list", "Give at least one Dataset")
    data = [plain_labels(one) for one in data]  # also of a bare store
    ids, excluded = np.concatenate([one.subject.values for one in data]), {}
    ids = ids[np.sort(np.unique(ids, return_index=True)[1])]

    def leave_out(reason, out):
        nonlocal ids
        if out.any():
            excluded[reason] = excluded.get(reason, []) + [str(i) for i in ids[out]]
        ids = ids[~out]

    for one in data:
        leave_out(f"not in {name_of(one)}", ~np.isin(ids, one.subject.values))
    if parts is not None:
        leave_out("not in the split", ~np.isin(ids, parts.subject.values.astype(str)))
    labels = _merged_labels(data, ids, (target, *needed))
    features = [_loaded(one) for one in data if "features" in one]
    for one in features:
        if one.sizes["feature"]:
            values = one.features.sel(subject=ids).values
            leave_out(f"no {name_of(one)}", np.isnan(values).all(1))
    for name in dict.fromkeys((target, *needed)):
        leave_out(f"no {name}", is_missing(labels[name].sel(subject=ids).values))
    if classes is not None:
        known = np.isin(as_words(labels[target].sel(subject=ids).values), as_words(classes))
        leave_out(f"another {target}", ~known)
    if len(ids) == 0:
        out = "; ".join(f"{len(v)} {k}" for k, v in excluded.items())
        fact = f"Expected subjects with '{target}' and features, found none"
        raise InputError(fact, f"Look at who was left out: {out}")
    return Rows(labels.sel(subject=ids), features, excluded)


def _merged_labels(data, ids, names):
    """Every coordinate that some Dataset has of these subjects; those in use must agree."""
    labels, used = xr.Dataset(coords={"subject": ids}), {*names, "participant", "family", "site"}
    for one in data:
        found = subject_coords(one.coords.to_dataset().sel(subject=ids))
        for name in used & set(found) & set(labels.coords):
            a, b = labels[name].values, found[name].values
            numbers = a.dtype.kind in "iuf" and b.dtype.kind in "iuf"
            same = np.isclose(a, b, equal_nan=True) if numbers else a.astype(str) == b.astype(str)
            if not same.all():
                at = f"{name_of(one)} for {listed(ids[~same])}"
                fact = f"Expected one '{name}' of each subject, found another in {at}"
                raise InputError(fact, "Make the labels alike: features.assign_coords(...)")
        new = {n: found[n].variable for n in found if n not in labels.coords}
        labels = labels.assign_coords(new)
    check_coords(labels, names)
    return labels


def _loaded(features):
    """A Dataset with its features in memory: numbers, finite or NaN."""
    values, name = features.features.compute(), name_of(features)
    if values.dtype.kind not in "biuf":
        fact = f"Expected numbers in {name}, found {values.dtype}"
        raise InputError(fact, "Convert them: astype(float)")
    if np.isinf(values.values).any():
        fact = f"Expected finite numbers in {name}, or NaN, found infinite ones"
        raise InputError(fact, "Put NaN: those are filled with the training mean")
    return features.assign(features=values)


def said_of(data: list, names) -> list[str]:
    """What was noted of these labels when their cohort was made, such as 89+ that was read as 89.

    A cohort has its notes in its attributes, latents their cohort's attributes as JSON.
    """
    found: dict = {}
    for one in data:
        kept = one.attrs.get("notes", ())
        if str(cohort := one.attrs.get("cohort", "")).startswith("{"):
            kept = json.loads(cohort).get("notes", "[]")
            kept = literal_eval(kept) if kept.startswith("[") else [kept]
        about = tuple(f"'{name}':" for name in names)
        found |= dict.fromkeys(note for note in kept if str(note).startswith(about))
    return [*found]


def as_words(labels) -> np.ndarray:
    """Labels as text, 1.0 as "1"."""
    plain = np.asarray(labels).tolist()
    return np.array([str(int(v) if isinstance(v, float) and v.is_integer() else v) for v in plain])


# With which truth ---


def truth_of(values, target: str, task: str | None, classes):
    """(names, truth): numbers (names None), or codes of sorted names."""
    numeric, asked = values.dtype.kind in "iuf", task
    if task is None:
        few = np.issubdtype(values.dtype, np.integer) and len(np.unique(values)) <= 10
        task = "number" if numeric and not few and classes is None else "label"
    check_choice("task", task, ["number", "label"])
    if task == "number":
        _check_numbers(values, target, numeric)
        return None, values.astype(float)
    if asked is None and classes is None and not numeric:
        _check_words(values, target)
    found, codes = np.unique(values if numeric else values.astype(str), return_inverse=True)
    found = as_words(found)
    _check_labels(found, target, classes)
    names = found if classes is None else as_words(classes)
    return names, pd.Index(names).get_indexer(found)[codes]


def _check_words(values, target):
    """Refuse numbers and dates that are stored as words: each would be a label."""
    words = np.unique(values.astype(str))
    numbers = pd.to_numeric(words, errors="coerce")
    dates = pd.to_datetime(words, errors="coerce", format="ISO8601")
    dates = words if values.dtype.kind in "mM" else dates
    for kind, read in (("numbers", numbers), ("dates", dates)):
        if len(words) > 10 and pd.notna(read).all():
            fact = f"Expected numbers or labels in '{target}', found {kind} as words: {words[0]}..."
            raise InputError(fact, "Convert them with assign_coords, or pass task='label'")


def _check_numbers(values, target, numeric):
    found = np.unique(values.astype(values.dtype if numeric else str))
    if not numeric:
        fact = f"Expected numbers in '{target}', found {listed(found)}"
        raise InputError(fact, "Convert them, or pass task='label'")
    if len(found) < 2:
        fact = f"Expected '{target}' to vary, found {found[0]} only"
        raise InputError(fact, "Choose another target or other subjects")


def _check_labels(found, target, classes):
    folded = pd.Series(found).str.strip().str.casefold()
    if folded.duplicated().any():
        alike = listed([repr(str(a)) for a in found[folded.duplicated(keep=False)]])
        fact = f"Expected distinct labels in '{target}', found {alike} that differ only by case or "
        raise InputError(fact + "spaces", "Spell them alike first")
    if classes is not None and len(found) < len(classes):
        fact = f"Expected subjects of every class {listed(classes)}, found {listed(found)}"
        raise InputError(fact, f"Compare with the values of '{target}'")
    if len(found) < 2:
        fact = f"Expected at least two labels in '{target}', found '{found[0]}' only"
        raise InputError(fact, "Choose another target or other subjects")


def check_leak(labels, used, target: str, truth, names) -> None:
    """Refuse to prepare features by the target under another name, test subjects' too."""
    for name in used:
        values = pd.Series(labels[name].values)
        number = values.dtype.kind in "iuf"
        if number and names is None:
            pair = pd.DataFrame({"a": values, "b": truth})
            reveals = any(abs(found.a.corr(found.b)) > 0.9999 for found in (pair, pair.rank()))
        else:
            pairs = len(set(zip(values, truth, strict=True)))
            reveals = pairs == values.nunique() < len(values)
            reveals &= not number or pairs == len(set(truth))
        if reveals:
            fact = "Expected confounds, harmonize and preserve without the target, found "
            fact += f"'{name}', which tells '{target}' of everyone"
            raise InputError(fact, "Leave it out: it would leak the target into the test fold")
