"""Who is like whom, and which tokens differ between groups."""

from __future__ import annotations

from itertools import islice

import numpy as np
import pandas as pd
import xarray as xr

from bhx.data.splits import permute_within
from bhx.errors import InputError, check_choice
from bhx.latents.pool import features_of, row_of, standardized
from bhx.schema import check, is_missing, subject_coords


def similarity(data: xr.Dataset, other: xr.Dataset | None = None) -> xr.DataArray:
    """Correlation between subjects' features, (subject, subject_other)."""
    a, b = (features_of(d) for d in (data, data if other is None else other))
    if a.sizes["feature"] != b.sizes["feature"]:
        fact = f"Expected as many features on both sides, found {a.sizes['feature']} and "
        fact += f"{b.sizes['feature']}"
        raise InputError(fact, "Pool both latents in the same way, and from the same model")
    values = standardized(a.values) @ standardized(b.values).T
    coords = {"subject": a.subject.values, "subject_other": b.subject.values}
    return xr.DataArray(values, coords, ("subject", "subject_other"), "similarity")


def neighbours(data: xr.Dataset, subject: str | None = None, *, k: int = 5) -> xr.Dataset:
    """The k most similar other subjects of one subject, or of all.

    Returns
    -------
    Dataset with `neighbour` (subject ids) and `similarity`, (subject, rank), nearest first
    """
    rows = slice(None) if subject is None else [row_of(data, subject)]
    near = similarity(data.isel(subject=rows), data)
    n = near.sizes["subject_other"]
    if not 1 <= k < n:
        fact = f"Expected 1 to {n - 1} neighbours of {n} subjects, found k={k}"
        raise InputError(fact, "Ask for fewer")
    near.values[near.subject.values[:, None] == near.subject_other.values] = -np.inf
    order = np.argsort(-near.values, axis=1, kind="stable")[:, :k]
    dims, values = ("subject", "rank"), np.take_along_axis(near.values, order, 1)
    out = xr.Dataset(
        {"neighbour": (dims, near.subject_other.values[order]), "similarity": (dims, values)},
        {"subject": near.subject.values, "rank": np.arange(1, k + 1)},
    )
    return out if subject is None else out.isel(subject=0)


def fingerprint(data: xr.Dataset, other: xr.Dataset) -> xr.Dataset:
    """Can a person be found again among all in another half, run or TR of the same people?

    Parameters
    ----------
    data, other : features or latents with the coordinate `participant`, one row a participant

    Returns
    -------
    Dataset with `similarity` (subject, subject_other), `identified` (subject): the most similar
    row of `other` is the same participant's; `within` (subject) and `between` (subject), the
    similarity to oneself and the mean of that to others; attrs `rate` and `chance`
    """
    near = similarity(data, other)
    person, found = data.participant.values, other.participant.values
    same = xr.DataArray(person[:, None] == found, dims=near.dims)
    if not ((same.sum("subject") == 1).all() and (same.sum("subject_other") == 1).all()):
        raise InputError(
            "Expected each participant once on both sides, found participants missing or repeated",
            "Select one row a participant, the same people in both",
        )
    identified = found[near.values.argmax(1)] == person
    within, between = (near.where(pairs).mean("subject_other") for pairs in (same, ~same))
    data = {"similarity": near, "within": within, "between": between}
    return xr.Dataset(
        data | {"identified": ("subject", identified)},
        attrs={"rate": float(identified.mean()), "chance": 1 / len(found)},
    )


def contrast(
    latents: xr.Dataset,
    groups: str,
    *,
    within: str | None = None,
    n_permutations: int = 1000,
    seed: int = 0,
) -> xr.Dataset:
    """Which hub tokens differ between groups of people?

    The statistic is the pseudo-F of PERMANOVA (Anderson 2001, Austral Ecology 26) with Euclidean
    distances: the spread between the groups' mean tokens over the spread inside groups, each per
    degree of freedom. Rows of one participant are averaged first, since people are exchanged.

    Parameters
    ----------
    latents : Dataset with `hub`
    groups : a coordinate on subject; rows where it is missing are left out
    within : a coordinate on subject; labels are exchanged only inside its values, such as "site"

    Returns
    -------
    Dataset on token with `F`, `p` (permutation, smallest possible 1 / (n + 1)), `q` (Benjamini-
    Hochberg over tokens) and `mean` (group, token, feature)
    """
    from scipy.stats import false_discovery_control

    hub, labels, blocks = _people(latents, groups, within)
    names, codes, sizes = np.unique(labels, return_inverse=True, return_counts=True)
    if len(names) < 2 or sizes.min() < 2:
        found = dict(zip(names.tolist(), sizes.tolist(), strict=True))
        fact = f"Expected at least two groups of two participants in '{groups}', found {found}"
        raise InputError(fact, "Choose another coordinate, or more subjects")
    rng = np.random.default_rng(seed)
    people = np.arange(len(codes))
    orders = islice(permute_within(people, blocks, rng), n_permutations)
    draws = codes[np.stack([people, *orders])]
    f = np.stack([_pseudo_f(hub[:, t], draws) for t in range(hub.shape[1])], axis=1)
    p = (f >= f[0] * (1 - 1e-6)).sum(0) / (n_permutations + 1)
    mean = np.stack([hub[codes == i].mean(0) for i in range(len(names))])
    return xr.Dataset(
        {
            "F": ("token", f[0]),
            "p": ("token", p),
            "q": ("token", false_discovery_control(p)),
            "mean": (("group", "token", "feature"), mean),
        },
        {"token": latents.token.values, "group": names},
        {"groups": groups, "within": within or "", "n_permutations": n_permutations, "seed": seed},
    )


def _people(latents, groups, within):
    """Tokens, labels and blocks of participants: rows of one person averaged."""
    hub = check(latents, "latents")["hub"]
    for name in (groups, within):
        if name is not None:
            check_choice("the coordinate", name, subject_coords(hub))
    hub = hub.isel(subject=np.flatnonzero(~is_missing(hub[groups].values)))
    labels = {name: hub[name].values for name in (groups, within) if name is not None}
    people = pd.DataFrame(labels, index=hub.participant.values).groupby(level=0)
    if (people.nunique() > 1).any(axis=None):
        fact = f"Expected one value of {' and '.join(labels)} a participant, found several"
        raise InputError(fact, "Contrast people, not sessions: select one row each")
    first, rows = people.first(), people.indices
    values = np.asarray(hub.astype("float32"))
    means = np.stack([values[rows[name]].mean(0) for name in first.index])
    blocks = first[within].to_numpy() if within else np.zeros(len(first))
    return means, first[groups].to_numpy(), blocks


def _pseudo_f(values, draws):
    """PERMANOVA's F of one token (person, feature) under each row of labels (draw, person)."""
    n, k = draws.shape[1], draws.max() + 1
    sizes = np.bincount(draws[0])
    values = values - values.mean(0)
    total = (values**2).sum()
    between = 0
    for group in range(k):
        sums = (draws == group).astype(values.dtype) @ values  # (draw, feature)
        between = between + (sums**2).sum(1) / sizes[group]
    return between / (k - 1) / ((total - between) / (n - k))
