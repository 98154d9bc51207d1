"""Participants cut into parts: all rows of one participant share a part."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import pandas as pd
import xarray as xr

from bhx.errors import InputError, listed
from bhx.schema import check, is_missing, subject_coords


def cut(participants, shares: Mapping[str, float], seed: int, strata=None) -> np.ndarray:
    """A part for each row, such that no participant is in two parts: array (row,) of names.

    Parameters
    ----------
    participants : array (row,) of ids
    shares : name of a part -> share of the participants; they sum to 1
    seed : the same seed and participants give the same parts
    strata : array (row,); every part gets its share of each stratum. A participant counts with its
        first row.
    """
    if not shares or not np.isclose(sum(shares.values()), 1) or min(shares.values()) <= 0:
        fact = f"Expected positive shares that sum to 1, found {dict(shares)}"
        raise InputError(fact, "Give for instance shares={'train': 0.8, 'test': 0.2}")
    person, people = pd.factorize(np.asarray(participants))
    order = np.random.default_rng(seed).permutation(len(people))
    if strata is not None:
        first = np.unique(person, return_index=True)[1]
        stratum = np.asarray(strata).astype(str)[first]
        order = order[np.argsort(stratum[order], kind="stable")]
    names, wanted = np.array([*shares]), np.array([*shares.values()])
    given, parts = np.zeros(len(names)), np.zeros(len(people), int)
    for i, one in enumerate(order):  # each to the part that is furthest behind its share
        parts[one] = np.argmax(wanted * (i + 1) - given)
        given[parts[one]] += 1
    return names[parts[person]]


def split(
    cohort: xr.Dataset,
    *,
    shares: dict[str, float] | None = None,
    stratify: str | Sequence[str] = (),
    leave_out: str | None = None,
    repeats: int = 1,
    seed: int = 0,
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

    Returns
    -------
    DataArray (repeat, subject) of part names; `cohort.sel(subject=parts[0] == "train")`. The same
    subjects and options give the same parts; the attributes name both, the subjects by their hash,
    and `parts.to_pandas().to_csv(path)` writes the list.

    Raises
    ------
    InputError
        A coordinate is missing, the shares do not sum to 1, or a participant has no value of
        `leave_out`, or two.
    """
    check(cohort, "cohort")
    shares = shares or {"train": 0.6, "validation": 0.2, "test": 0.2}
    stratify = [stratify] if isinstance(stratify, str) else list(stratify)
    people = cohort.participant.values
    if leave_out:
        parts = _one_out(cohort, _labels(cohort, leave_out), leave_out)
    else:
        labels = [_labels(cohort, name).astype(str) for name in stratify]
        strata = [" / ".join(names) for names in zip(*labels, strict=True)] or None
        parts = {i: cut(people, shares, seed + i, strata) for i in range(repeats)}
    made_by = {"cohort_sha256": cohort_hash(cohort), "seed": seed, "shares": shares}
    made_by |= {"stratify": stratify, "leave_out": leave_out, "repeats": repeats}
    coords = {"repeat": [*parts], "subject": cohort.subject.values}
    values = np.stack([*parts.values()])
    return xr.DataArray(values, coords, ("repeat", "subject"), "part", made_by)


def cohort_hash(cohort: xr.Dataset) -> str:
    """SHA-256 of who is in a cohort: the ids and participants of its rows, in their order."""
    rows = zip(cohort.subject.values.tolist(), cohort.participant.values.tolist(), strict=True)
    return hashlib.sha256(json.dumps(list(rows)).encode()).hexdigest()


def _labels(cohort, name):
    known = subject_coords(cohort)
    if name not in known:
        fact = f"Expected a coordinate on subject to split by, found '{name}'"
        raise InputError(fact, f"This cohort has {listed(known, 20)}")
    return cohort[name].values


def _one_out(cohort, values, name):
    """For each value, "test" for its participants and "train" for all others."""
    if (missing := is_missing(values)).any():
        fact = f"Expected a {name} for each subject, found none for "
        fact += f"{missing.sum()}: {listed(cohort.subject.values[missing])}"
        raise InputError(
            fact, f"Assign the {name}, or leave them out: cohort.drop_sel(subject=...)"
        )
    several = pd.Series(values).groupby(cohort.participant.values).nunique()
    if (several > 1).any():
        fact = f"Expected one {name} for each participant, found several for "
        fact += f"{listed(several.index[several > 1])}"
        raise InputError(fact, f"Choose the scans of one {name} for them")
    return {value: np.where(values == value, "test", "train") for value in np.unique(values)}


def permute_within(units, strata, rng, families=None) -> Iterator[np.ndarray]:
    """Orders of the rows without end: each exchanges labels which, if they mean nothing, are
    exchangeable.

    Parameters
    ----------
    units : participant of each row; all rows of one move together
    strata : site of each row; labels stay within it
    rng : numpy random Generator
    families : family of each row, or None; whole families of like make-up are exchanged, then
        members within each
    """
    units, strata = np.asarray(units), np.asarray(strata)
    plans = []
    if families is not None:
        families = np.asarray(families)
        plans.append(_alike(families, units, strata))
        strata = np.char.add(families.astype(str), np.char.add("|", strata.astype(str)))
    plans.append(_alike(units, units, strata))
    while True:
        order = np.arange(len(units))
        for plan in plans:
            moved = np.arange(len(units))
            for rows in plan:
                moved[rows] = rows[rng.permutation(len(rows))]
            order = order[moved]
        yield order


def _alike(blocks, units, strata):
    """Rows (block, row) of each set of blocks with the same strata and pattern of units."""
    _, of_row, counts = np.unique(units, return_inverse=True, return_counts=True)
    rows, alike = {}, {}
    for row in np.lexsort((units, -counts[of_row])):
        rows.setdefault(blocks[row], []).append(row)
    for members in rows.values():
        _, sizes = np.unique(units[members], return_counts=True)
        alike.setdefault((tuple(sorted(sizes)), tuple(strata[members])), []).append(members)
    return [np.array(group) for group in alike.values()]
