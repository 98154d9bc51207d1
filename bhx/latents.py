"""Geometry of the latent space: pool, project, compare, contrast and map hub tokens.

Every function takes plain xarray objects and returns one, with the subjects' labels kept. No
weights are read here and nothing is drawn; what changes an input (`lesion`) embeds it again
through `bhx.encoding`.
"""

from __future__ import annotations

import numpy as np
import xarray as xr

from bhx.geometry import spins
from bhx.schema import InputError, check, listed

MAPS = {"roi": "hub_to_roi", "t1": "hub_to_t1", "modality": "modality_share"}


def pool(latents: xr.Dataset, how: str = "mean", *, weights=None) -> xr.Dataset:
    """One feature vector a subject, from the hub tokens; lazy when the latents are.

    Parameters
    ----------
    latents : Dataset with `hub` (subject, token, feature)
    how : "mean" over tokens, "concatenate" (token-major), or "weighted"
    weights : DataArray over `token` (and `subject`), not negative; for "weighted" only: the mean
        over tokens under these weights, say a modality's share or a trained pooling's attention

    Returns
    -------
    Dataset with `features` (subject, feature), the subjects' coordinates, and attrs["name"]
    """
    hub = check(latents, "latents")["hub"]
    if (weights is not None) != (how == "weighted"):
        raise InputError(
            f"Expected weights with how='weighted' and only then, found how='{how}'",
            "Give both or neither: pool(latents, 'weighted', weights=...)",
        )
    if how == "mean":
        features = hub.mean("token", keep_attrs=True)
    elif how == "concatenate":
        features = hub.stack(flat=("token", "feature")).drop_vars(["flat", "token", "feature"])
        features = features.rename(flat="feature")
    elif how == "weighted":
        features = hub.weighted(weights.fillna(0)).mean("token", keep_attrs=True)
    else:
        raise InputError(
            f"Expected how to be mean, concatenate or weighted, found '{how}'", "Choose one of them"
        )
    keep = [name for name, c in hub.coords.items() if "token" not in c.dims]
    features = features.drop_vars([name for name in features.coords if name not in keep])
    out = features.transpose("subject", "feature").astype("float32").to_dataset(name="features")
    out.attrs = latents.attrs | {"name": f"hub tokens, {how}"}
    return check(out, "features")


def project(data: xr.Dataset, *, n: int = 2, method: str = "pca", fit_on=None, seed: int = 0):
    """Subjects in a few dimensions.

    Parameters
    ----------
    data : features, or latents (then their mean over tokens)
    n : components
    method : "pca", or "umap" (the extra `bhx[umap]`)
    fit_on : subject ids or a boolean mask; the others are only carried into the fitted space
    seed : of UMAP; PCA has no randomness, and its signs make each component's largest loading
        positive

    Returns
    -------
    DataArray (subject, component), with the subjects' coordinates; for PCA also `explained`
    (component), the share of the fitted subjects' variance
    """
    features = _features(data)
    chosen = _chosen(features, fit_on)
    values = np.asarray(features, float)
    if not 1 <= n <= min(chosen.sum(), values.shape[1]):
        raise InputError(
            f"Expected 1 to {min(chosen.sum(), values.shape[1])} components of {chosen.sum()} "
            f"subjects with {values.shape[1]} features, found n={n}",
            "Ask for fewer components, or fit on more subjects",
        )
    fitted = _reducer(method, n, seed).fit(values[chosen])
    out = xr.DataArray(
        fitted.transform(values),
        {name: c for name, c in features.coords.items() if c.dims == ("subject",)}
        | {"component": np.arange(1, n + 1)},
        ("subject", "component"),
        name="projection",
        attrs={"long_name": method.upper(), "method": method, "seed": seed},
    )
    if method == "pca":
        out = out.assign_coords(explained=("component", fitted.explained_variance_ratio_))
    return out


def _reducer(method, n, seed):
    if method == "pca":
        from sklearn.decomposition import PCA

        return PCA(n, svd_solver="full")
    if method == "umap":
        try:
            from umap import UMAP
        except ImportError as error:
            raise InputError(
                "Expected the package umap-learn for method='umap', found none",
                "Install it with pip install 'bhx[umap]', or take method='pca'",
            ) from error
        return UMAP(n_components=n, random_state=seed, n_jobs=1)
    raise InputError(f"Expected method to be pca or umap, found '{method}'", "Choose one of them")


def similarity(data: xr.Dataset, other: xr.Dataset | None = None) -> xr.DataArray:
    """Correlation between subjects' features, (subject, subject_other).

    Both sides keep their `participant` and `site` labels (with the suffix `_other`), so that
    similarity within and between people is one `where` away.
    """
    a, b = (_features(d) for d in (data, data if other is None else other))
    if a.sizes["feature"] != b.sizes["feature"]:
        raise InputError(
            f"Expected as many features on both sides, found {a.sizes['feature']} and "
            f"{b.sizes['feature']}",
            "Pool both latents in the same way, and from the same model",
        )
    values = _standard(np.asarray(a)) @ _standard(np.asarray(b)).T
    out = xr.DataArray(values, dims=("subject", "subject_other"), name="similarity")
    out = out.assign_coords(subject=a.subject.values, subject_other=b.subject.values)
    for name in ("participant", "site"):
        if name in a.coords and name in b.coords:
            labels = {name: ("subject", a[name].values)}
            out = out.assign_coords(labels | {f"{name}_other": ("subject_other", b[name].values)})
    return out.assign_attrs(long_name="correlation of features")


def neighbours(data: xr.Dataset, subject: str | None = None, *, k: int = 5) -> xr.Dataset:
    """The k most similar other subjects of one subject, or of all.

    Returns
    -------
    Dataset with `neighbour` (subject ids) and `similarity`, (subject, rank), nearest first
    """
    near = similarity(data)
    n = near.sizes["subject"]
    if not 1 <= k < n:
        raise InputError(
            f"Expected 1 to {n - 1} neighbours of {n} subjects, found k={k}", "Lower k"
        )
    values = near.values.copy()
    np.fill_diagonal(values, -np.inf)
    order = np.argsort(-values, axis=1, kind="stable")[:, :k]
    out = xr.Dataset(
        {
            "neighbour": (("subject", "rank"), near.subject.values[order]),
            "similarity": (("subject", "rank"), np.take_along_axis(values, order, 1)),
        },
        {"subject": near.subject.values, "rank": np.arange(1, k + 1)},
    )
    return out if subject is None else out.sel(subject=_one(near, subject))


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
    same = near.participant == near.participant_other
    if not ((same.sum("subject") == 1).all() and (same.sum("subject_other") == 1).all()):
        raise InputError(
            "Expected each participant once on both sides, found participants missing or repeated",
            "Select one row a participant, the same people in both",
        )
    best = near.participant_other[near.argmax("subject_other")]
    out = xr.Dataset(
        {
            "similarity": near,
            "identified": ("subject", best.values == near.participant.values),
            "within": near.where(same).mean("subject_other"),
            "between": near.where(~same).mean("subject_other"),
        }
    )
    rate = float(out.identified.mean())
    return out.assign_attrs(rate=rate, chance=1 / near.sizes["subject_other"])


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
    names, codes = np.unique(labels, return_inverse=True)
    if len(names) < 2 or np.bincount(codes).min() < 2:
        raise InputError(
            f"Expected at least two groups of two participants in '{groups}', found "
            f"{dict(zip(names.tolist(), np.bincount(codes).tolist(), strict=True))}",
            "Choose another coordinate, or more subjects",
        )
    rng = np.random.default_rng(seed)
    draws = np.stack([codes] + [_shuffled(codes, blocks, rng) for _ in range(n_permutations)])
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
        if name is not None and name not in hub.coords:
            raise InputError(
                f"Expected the coordinate '{name}' on subject, found {listed(hub.coords, 12)}",
                "Assign it: latents.assign_coords(name=('subject', values))",
            )
    labels = hub[groups].to_series()
    known = labels.notna() & (labels.astype(str) != "")
    hub = hub.isel(subject=np.flatnonzero(known))
    columns = list(dict.fromkeys(["participant", groups, *([within] if within else [])]))
    table = hub.subject.to_dataset(name="row").reset_coords()[columns].to_dataframe()[columns]
    people = table.groupby("participant", sort=True)
    if (people.nunique().drop(columns="participant", errors="ignore") > 1).any(axis=None):
        raise InputError(
            f"Expected one value of '{groups}'{f' and {within}' if within else ''} a participant, "
            "found participants with several",
            "Contrast people, not sessions: select one row each",
        )
    first, rows = people.first(), people.indices
    values = np.asarray(hub.astype("float32"))
    means = np.stack([values[rows[name]].mean(0) for name in first.index])
    return means, first[groups].to_numpy(), first[within].to_numpy() if within else None


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


def _shuffled(codes, blocks, rng):
    if blocks is None:
        return rng.permutation(codes)
    out = codes.copy()
    for block in np.unique(blocks):
        where = np.flatnonzero(blocks == block)
        out[where] = codes[rng.permutation(where)]
    return out


def region_map(latents: xr.Dataset, token=None, *, subjects=None, of: str = "roi") -> xr.DataArray:
    """Where hub tokens read from: attention from tokens to parcels, averaged over subjects.

    Attention says what was read, not what mattered; compare with `lesion`, and with the same map
    from random weights.

    Parameters
    ----------
    latents : Dataset embedded with keep=("attention",)
    token : one token, several, or None for all; several are averaged
    subjects : ids or a boolean mask; None for all. People without the modality are left out
    of : "roi" (parcels), "t1" (cubes: cx, cy, cz) or "modality"

    Returns
    -------
    DataArray on roi; on (cx, cy, cz); or on modality
    """
    values = each_token(latents, of=of, subjects=subjects)
    values = values.isel(token=_tokens(latents, token)).mean("token", keep_attrs=True)
    which = "all tokens" if token is None else f"token {listed(np.atleast_1d(token))}"
    return values.assign_attrs(long_name=f"attention of {which}")


def each_token(latents: xr.Dataset, *, of: str = "roi", subjects=None) -> xr.DataArray:
    """The maps of all tokens, averaged over subjects: DataArray (token, ...); see `region_map`."""
    if of not in MAPS:
        raise InputError(f"Expected of to be {listed(MAPS)}, found '{of}'", "Choose one of them")
    check(latents, "latents")
    if MAPS[of] not in latents:
        raise InputError(
            f"Expected latents with the variable '{MAPS[of]}', found {listed(latents.data_vars)}",
            'Keep the attention when embedding: embed(cohort, model, keep=("attention",))',
        )
    values = latents[MAPS[of]]
    chosen = _chosen(values, subjects)
    has = {"roi": "has_bold", "t1": "has_t1"}.get(of)
    if has in values.coords:
        chosen = chosen & values[has].values.astype(bool)
    if not chosen.any():
        raise InputError(
            "Expected at least one subject with this modality, found none in the selection",
            "Choose other subjects, or the other modality's map",
        )
    out = values.isel(subject=np.flatnonzero(chosen)).mean("subject")
    return out.assign_attrs(n_subjects=int(chosen.sum()))


def spin_test(values: xr.DataArray, other, atlas: xr.Dataset, *, n_spins=1000, seed=0):
    """Is a map related to another map, or to the networks, beyond what smooth maps always are?

    The parcels' centres are turned on the sphere, the right hemisphere as the mirror image of the
    left, and every parcel takes the value of one turned onto it (`geometry.spins`).

    Parameters
    ----------
    values : DataArray on roi
    other : DataArray on roi, or the name of a coordinate on roi such as "network"
    atlas : `load_atlas(...)`, whose parcels the values are on

    Returns
    -------
    Dataset with `statistic` and `p` (two-sided, from the spins): the correlation of two maps, or
    for a coordinate, on each of its values the mean inside minus the mean outside
    """
    values = values.sel(roi=atlas.roi.values)
    turned = values.values[spins(atlas.sphere, atlas.hemi, n_spins, seed)]  # (spin, roi)
    if isinstance(other, str):
        labels = atlas[other].values
        names = list(dict.fromkeys(labels.tolist()))
        inside = np.stack([labels == name for name in names]).astype(float)
        weights = inside / inside.sum(1, keepdims=True)
        weights -= (1 - inside) / (1 - inside).sum(1, keepdims=True)
        observed, null = weights @ values.values, turned @ weights.T
        dims, coords = (other,), {other: names}
    else:
        target = _standard(other.sel(roi=atlas.roi.values).values[None])[0]
        observed, null = _standard(values.values[None])[0] @ target, _standard(turned) @ target
        dims, coords = (), {}
    p = (1 + (np.abs(null) >= np.abs(observed) - 1e-12).sum(0)) / (n_spins + 1)
    out = xr.Dataset({"statistic": (dims, observed), "p": (dims, p)}, coords)
    return out.assign_attrs(n_spins=n_spins, seed=seed)


def _features(data):
    """The DataArray (subject, feature) of features, or of latents' mean token."""
    if not isinstance(data, xr.Dataset) or "features" not in data:
        data = pool(data)
    return check(data, "features")["features"]


def _chosen(data, subjects):
    """A boolean mask over the subjects from ids, a mask, or None for all."""
    ids = data.indexes["subject"]
    if subjects is None:
        return np.ones(len(ids), bool)
    subjects = np.atleast_1d(np.asarray(subjects))
    if subjects.dtype == bool:
        if subjects.shape != (len(ids),):
            raise InputError(
                f"Expected a mask over {len(ids)} subjects, found one of length {len(subjects)}",
                "Make it from the same Dataset: latents.site == 'A'",
            )
        return subjects
    unknown = [s for s in subjects if s not in ids]
    if unknown or not len(subjects):
        raise InputError(
            f"Expected ids among {listed(ids, 3)}, found {listed(unknown) or 'no ids'}",
            "See latents.subject",
        )
    return ids.isin(subjects)


def _one(data, subject):
    return data.subject.values[np.flatnonzero(_chosen(data, [subject]))[0]]


def _tokens(latents, token):
    """Positions of the tokens asked for."""
    if token is None:
        return np.arange(latents.sizes["token"])
    labels = (
        latents.indexes["token"] if "token" in latents.indexes else range(latents.sizes["token"])
    )
    asked = np.atleast_1d(np.asarray(token)).tolist()
    unknown = [t for t in asked if t not in labels]
    if unknown or not asked:
        raise InputError(
            f"Expected tokens among {labels[0]} to {labels[-1]}, found {listed(unknown) or 'none'}",
            "See latents.token",
        )
    return [list(labels).index(t) for t in asked]


def _standard(values):
    """Rows with mean 0 and length 1; constant rows become 0."""
    values = values - values.mean(-1, keepdims=True)
    length = np.linalg.norm(values, axis=-1, keepdims=True)
    return values / np.where(length > 0, length, 1)
