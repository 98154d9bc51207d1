"""Participants cut into parts: all scans of one participant share a part."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pandas as pd
import xarray as xr

from bhx.errors import InputError, listed
from bhx.schema import check


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
        return _read_split(path, made_by)
    names = [*stratify, leave_out] if leave_out else stratify
    rows = pd.DataFrame({name: cohort[name].values for name in ["participant", *names]})
    people = rows.drop_duplicates("participant").set_index("participant")
    if leave_out:
        values = people[leave_out]
        cuts = {v: np.where(values == v, "test", "train") for v in sorted(values.unique())}
    else:
        cuts = {i: _cut(people, shares, seed + i) for i in range(repeats)}
    parts = [pd.Series(cut, people.index)[rows.participant].to_numpy(str) for cut in cuts.values()]
    coords = {"repeat": list(cuts), "subject": cohort.subject.values}
    if path is not None:
        kept = {"repeat": list(cuts), "subject": cohort.subject.values.tolist()}
        kept |= {"part": [part.tolist() for part in parts], "made_by": made_by}
        Path(path).write_text(json.dumps(kept, indent=1, default=str), encoding="utf8")
    return xr.DataArray(np.stack(parts), coords, ("repeat", "subject"), "part", made_by)


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
            fact = f"Expected a coordinate on subject to split by, found '{name}'"
            raise InputError(fact, f"This cohort has {listed(on_subject, 20)}")
    if not np.isclose(sum(shares.values()), 1) or min(shares.values()) <= 0:
        fact = f"Expected positive shares that sum to 1, found {shares}"
        raise InputError(fact, "Give for instance shares={'train': 0.8, 'test': 0.2}")
    if leave_out:
        several = pd.Series(cohort[leave_out].values).groupby(cohort.participant.values).nunique()
        if (several > 1).any():
            fact = f"Expected one {leave_out} for each participant, found several for "
            fact += f"{listed(several.index[several > 1])}"
            raise InputError(fact, f"Choose the scans of one {leave_out} for them")


def _read_split(path, made_by):
    """A kept split, when it was made from these subjects with these options."""
    kept = json.loads(Path(path).read_text(encoding="utf8"))
    for name, value in made_by.items():
        if kept["made_by"].get(name) != value:
            raise InputError(
                f"Expected the split in {path} to be made with {name}={value}, found "
                f"{kept['made_by'].get(name)}",
                "Give the same subjects and options, or another path for a new split",
            )
    coords = {"repeat": kept["repeat"], "subject": kept["subject"]}
    return xr.DataArray(np.array(kept["part"]), coords, ("repeat", "subject"), "part", made_by)


def cut(participants, shares: dict[str, float], seed: int) -> np.ndarray:
    """A part's name for each row: participants in a random order, none of them split."""
    names, of_row = np.unique(np.asarray(participants), return_inverse=True)
    order = np.random.default_rng(seed).permutation(len(names))
    ends = np.round(np.cumsum(list(shares.values())) * len(names)).astype(int)
    part = np.empty(len(names), object)
    for name, start, end in zip(shares, [0, *ends[:-1]], ends, strict=True):
        part[order[start : max(end, start + 1)]] = name
    return part[of_row].astype(str)
