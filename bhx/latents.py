"""Geometry of the latent space: pool, project, compare, contrast and map hub tokens.

Every function takes plain xarray objects and returns one, with the subjects' labels kept. No
weights are read here and nothing is drawn; what changes an input (`lesion`) embeds it again
through `bhx.encoding`.
"""

from __future__ import annotations

import numpy as np
import xarray as xr

from bhx.errors import check_choice
from bhx.geometry import spins
from bhx.schema import InputError, check, listed

MAPS = {"roi": "hub_to_roi", "t1": "hub_to_t1", "modality": "modality_share"}


def pool(latents: xr.Dataset, how: str = "mean", *, of: str = "hub", weights=None) -> xr.Dataset:
    """One feature vector a subject, from the hub tokens or an encoder's; lazy when the latents are.

    Parameters
    ----------
    latents : Dataset with `hub` (subject, token, feature); with embed(..., keep=) also `dynamics`
        and `structure`
    how : "mean" over tokens, "concatenate" (token-major), or "weighted"
    of : "hub", "dynamics" (a token is a parcel, its mean over patches) or "structure" (a token is
        a cube)
    weights : DataArray over `token` (and `subject`), not negative; for "weighted" only: the mean
        over tokens under these weights, say a modality's share or a trained pooling's attention

    Returns
    -------
    Dataset with `features` (subject, feature), the subjects' coordinates, and attrs["name"]
    """
    check_choice("of", of, ("hub", "dynamics", "structure"))
    every = _as_tokens(check(latents, "latents"), of)
    if (weights is not None) != (how == "weighted"):
        fact = f"Expected weights with how='weighted' and only then, found how='{how}'"
        raise InputError(fact, "Give both or neither: pool(latents, 'weighted', weights=...)")
    check_choice("how", how, ("mean", "concatenate", "weighted"))
    if how == "concatenate":
        features = every.stack(flat=("token", "feature")).drop_vars(["flat", "token", "feature"])
        features = features.rename(flat="feature")
    else:
        tokens = every if how == "mean" else every.weighted(weights.fillna(0))
        features = tokens.mean("token", keep_attrs=True)
    keep = [name for name, c in every.coords.items() if "token" not in c.dims]
    features = features.drop_vars([name for name in features.coords if name not in keep])
    out = features.transpose("subject", "feature").astype("float32").to_dataset(name="features")
    out.attrs = latents.attrs | {"name": f"{of} tokens, {how}"}
    return check(out, "features")


def _as_tokens(latents, of):
    """(subject, token, feature) of what `pool` reads."""
    if of not in latents:
        fact = f"Expected latents with '{of}', found {listed(latents.data_vars, 20)}"
        raise InputError(fact, f"Keep them: embed(..., keep=('{of}',))")
    if of == "hub":
        return latents.hub
    tokens = latents[of].mean("patch") if of == "dynamics" else latents[of]
    places = [d for d in tokens.dims if d not in ("subject", "feature")]
    tokens = tokens.stack(token=places).reset_index("token", drop=True)
    return tokens.drop_vars([n for n, c in tokens.coords.items() if "token" in c.dims])


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
    chosen = subject_mask(features, fit_on)
    values = np.asarray(features, float)
    if not 1 <= n <= min(chosen.sum(), values.shape[1]):
        fact = f"Expected 1 to {min(chosen.sum(), values.shape[1])} components of {chosen.sum()} "
        fact += f"subjects with {values.shape[1]} features, found n={n}"
        raise InputError(fact, "Ask for fewer components, or fit on more subjects")
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
    check_choice("method", method, ("pca", "umap"))
    if method == "pca":
        from sklearn.decomposition import PCA

        return PCA(n, svd_solver="full")
    try:
        from umap import UMAP
    except ImportError as error:
        raise InputError(
            "Expected the package umap-learn for method='umap', found none",
            "Install it with pip install 'bhx[umap]', or take method='pca'",
        ) from error
    return UMAP(n_components=n, random_state=seed, n_jobs=1)


def similarity(data: xr.Dataset, other: xr.Dataset | None = None) -> xr.DataArray:
    """Correlation between subjects' features, (subject, subject_other).

    Both sides keep their `participant` and `site` labels (with the suffix `_other`), so that
    similarity within and between people is one `where` away.
    """
    a, b = (_features(d) for d in (data, data if other is None else other))
    if a.sizes["feature"] != b.sizes["feature"]:
        fact = f"Expected as many features on both sides, found {a.sizes['feature']} and "
        fact += f"{b.sizes['feature']}"
        raise InputError(fact, "Pool both latents in the same way, and from the same model")
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
    return out if subject is None else out.isel(subject=_at(near, subject))


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
        fact = f"Expected at least two groups of two participants in '{groups}', found "
        fact += f"{dict(zip(names.tolist(), np.bincount(codes).tolist(), strict=True))}"
        raise InputError(fact, "Choose another coordinate, or more subjects")
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
            fact = f"Expected the coordinate '{name}' on subject, found {listed(hub.coords, 12)}"
            raise InputError(fact, "Assign it: latents.assign_coords(name=('subject', values))")
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
    check_choice("of", of, MAPS)
    check(latents, "latents")
    if MAPS[of] not in latents:
        raise InputError(
            f"Expected latents with the variable '{MAPS[of]}', found {listed(latents.data_vars)}",
            'Keep the attention when embedding: embed(cohort, model, keep=("attention",))',
        )
    values = latents[MAPS[of]]
    chosen = subject_mask(values, subjects) & who_has(latents, of)
    if not chosen.any():
        fact = "Expected at least one subject with this modality, found none in the selection"
        raise InputError(fact, "Choose other subjects, or the other modality's map")
    out = values.isel(subject=np.flatnonzero(chosen)).mean("subject")
    return out.assign_attrs(n_subjects=int(chosen.sum()))


def who_has(latents: xr.Dataset, of: str) -> np.ndarray:
    """Which subjects have what a kind of map is about: a mask (subject)."""
    name = {"roi": "has_bold", "t1": "has_t1"}.get(of)
    everyone = np.ones(latents.sizes["subject"], bool)
    return latents[name].values.astype(bool) if name in latents.coords else everyone


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


def lesion(
    cohort: xr.Dataset,
    model,
    *,
    roi=None,
    network: str | None = None,
    modality: str | None = None,
    seconds: tuple[float, float] | None = None,
    box: dict | None = None,
    intact: xr.Dataset | None = None,
    predict=None,
) -> xr.Dataset:
    """Remove a part of every scan, embed again, and measure how each hub token moves.

    What is removed is absent, not zero: its tokens are not computed and nothing can read them.
    Large parts move tokens more than small ones, so compare with as many parcels drawn at random.

    Parameters
    ----------
    cohort, model : as for `embed`; subjects who would have nothing left are left out
    roi : parcel names
    network : a value of `network` on roi, such as "Default"
    modality : "bold" or "t1"
    seconds : start and end of a time span of every scan [s]
    box : MNI bounds [mm], such as {"x": (-90, 0), "y": (-110, -60)}: parcels with their centre,
        and T1 cubes with any voxel, inside
    intact : the latents of the same cohort, where they are there already
    predict : a function from features (`pool`) to one number a subject

    Returns
    -------
    Dataset with `moved` (subject, token), the Euclidean distance; `relative`, the same over the
    root mean square distance of people from the mean person (two people are about 1.4 of it
    apart); `hub`, the tokens after; with `predict`, `prediction` (subject, state)
    """
    from bhx.encoding import embed

    cut = _without(check(cohort, "cohort"), roi, network, modality, seconds, box)
    before = embed(cohort, model) if intact is None else intact
    before = before.hub.sel(subject=cut.subject.values).compute()
    after = embed(cut, model, missing_parcels="leave out").compute()
    moved = np.sqrt(((after.hub - before) ** 2).sum("feature"))
    spread = np.sqrt(before.var("subject").sum("feature"))
    out = after[["hub"]].assign(moved=moved, relative=moved / spread)
    if predict is not None:
        states = [predict(pool(d)) for d in (before.to_dataset(name="hub"), after)]
        out["prediction"] = (("subject", "state"), np.stack(states, 1))
        out = out.assign_coords(state=["intact", "lesioned"])
    return out


def _without(cohort, roi, network, modality, seconds, box):
    """The cohort with NaN where something is removed, or without the modality."""
    if roi is network is modality is seconds is box is None:
        fact = "Expected something to remove, found nothing"
        raise InputError(fact, "Give roi, network, modality, seconds or box")
    if box == {} or any(a not in "xyz" or not ends[0] < ends[1] for a, ends in (box or {}).items()):
        fact = f"Expected bounds (low, high) [mm] on x, y or z, found {box}"
        raise InputError(fact, 'Give for example box={"y": (-110, -60)}')
    out = cohort
    if "bold" in out:
        gone = _parcels(out, roi, network, box)
        kept = out.bold.where(~(gone | _span(out, seconds)))
        out = out.assign(bold=kept.transpose(*out.bold.dims))
        if gone.all():
            modality = "bold"
    if "t1" in out and box:
        out = out.assign(t1=out.t1.where(~_inside(box, out)))
    if modality is not None:
        check_choice("modality", modality, ("bold", "t1"))
        out = out.assign_coords({f"has_{modality}": xr.zeros_like(out[f"has_{modality}"], bool)})
    left = (out.has_bold.astype(bool) | out.has_t1.astype(bool)).values
    if not left.any():
        raise InputError("Expected subjects with something left, found none", "Remove less")
    return out.isel(subject=np.flatnonzero(left))


def _parcels(cohort, roi, network, box):
    """Which parcels are removed, (roi)."""
    gone = xr.zeros_like(cohort.roi, bool)
    for name, asked in (("roi", roi), ("network", network)):
        asked = [] if asked is None else np.atleast_1d(asked).tolist()
        known = cohort[name].values if asked else ()
        unknown = [a for a in asked if a not in known]
        if unknown:
            fact = f"Expected {name} among {listed(np.unique(known), 8)}, found {listed(unknown)}"
            raise InputError(fact, f"See cohort.{name}")
        gone = gone | cohort[name].isin(asked) if asked else gone
    return gone | _inside(box, cohort, "mni_") if box else gone


def _span(cohort, seconds):
    """Which volumes are removed, (subject, time)."""
    if seconds is None:
        return False
    onset = cohort.tr * xr.DataArray(np.arange(cohort.sizes["time"]), dims="time")
    return (onset >= seconds[0]) & (onset < seconds[1])


def _inside(box, places, prefix=""):
    """What lies in the box, over the dims of its axes' coordinates."""
    inside = True
    for axis, (low, high) in box.items():
        inside = inside & (places[prefix + axis] >= low) & (places[prefix + axis] < high)
    return inside


def map_controls(
    cohort: xr.Dataset, model, *, subjects=None, attention: str | int = "last", seed: int = 0
) -> xr.Dataset:
    """Would the same map come out without what it is said to show?

    The region maps of all tokens, averaged over subjects, of the model and of its controls: the
    same network with random weights; the parcels' series under shuffled names; and the first and
    the second half of every scan. A map that random weights or shuffled parcels also give says
    nothing about what was learnt or about these brains.

    Returns
    -------
    Dataset with `map` (version, token, roi) and `agreement` (control, token), the correlations
    over parcels of the model's map with those of "random weights" and "shuffled parcels", and
    "retest", of the two halves with one another
    """
    from bhx.encoding import embed, random_model

    cohort = check(cohort, "cohort")
    chosen = subject_mask(cohort, subjects) & cohort.has_bold.values.astype(bool)
    cohort = cohort.isel(subject=np.flatnonzero(chosen))
    order = np.random.default_rng(seed).permutation(cohort.sizes["roi"])
    late = xr.DataArray(np.arange(cohort.sizes["time"]), dims="time") >= cohort.n_volumes / 2
    shuffled = cohort.bold.isel(roi=order).assign_coords(cohort.roi.coords)
    versions = {
        "model": (cohort, model),
        "random weights": (cohort, random_model(model.config, seed=seed)),
        "shuffled parcels": (cohort.assign(bold=shuffled), model),
        "first half": (cohort.assign(bold=cohort.bold.where(~late)), model),
        "second half": (cohort.assign(bold=cohort.bold.where(late)), model),
    }
    options = {"keep": ("attention",), "attention": attention, "missing_parcels": "leave out"}
    each = [each_token(embed(c, m, **options)).compute() for c, m in versions.values()]
    maps = xr.concat(
        each, xr.Variable("version", list(versions)), coords="minimal", compat="override"
    )
    unit = maps.copy(data=_standard(maps.transpose("version", "token", "roi").values))
    pairs = {
        "random weights": ("model", "random weights"),
        "shuffled parcels": ("model", "shuffled parcels"),
        "retest": ("first half", "second half"),
    }
    agreement = [
        (unit.sel(version=a, drop=True) * unit.sel(version=b, drop=True)).sum("roi")
        for a, b in pairs.values()
    ]
    return xr.Dataset(
        {"map": maps, "agreement": xr.concat(agreement, xr.Variable("control", list(pairs)))}
    )


def integrated_gradients(
    cohort: xr.Dataset, model, subject: str, token: int, *, steps: int = 16
) -> xr.Dataset:
    """How much each parcel's and cube's own values move one hub token away from an empty scan.

    Gradients of the token's output along its own displacement are summed on the straight way from
    an empty scan (every scaled value 0) to this one, so that all parts together add up to the
    distance moved. Only the first window of a long scan is read.

    Returns
    -------
    Dataset with `roi_part` (roi) and `t1_part` (cx, cy, cz), in units of the token's distance;
    attrs `distance`, and `gap`: the share of it that the sum misses, smaller with more `steps`

    Source: Sundararajan et al., ICML 2017 (arXiv 1703.01365), Gauss-Legendre quadrature.
    """
    import torch

    from bhx.encoding import encode_parts, sequences

    reading = _reading(cohort, model, subject)
    inputs = [x for x in (*reading.windows, reading.t1) if x is not None]
    whole = [x.nan_to_num() for x in inputs]

    def output(share):
        """The hub token of the scan times `share`, and the scaled inputs it was made of."""
        scaled = [(share * x).requires_grad_() for x in whole]
        reading.windows = scaled[: len(reading.windows)]
        reading.t1 = None if reading.t1 is None else scaled[-1]
        parts = encode_parts(model.networks, [reading], model.device)
        tokens, rows, _ = sequences(model.config, [reading], *parts)
        return model.networks.harmonizer(tokens, rows)[0, 1 + token], scaled

    with torch.no_grad():
        way = output(1.0)[0] - output(0.0)[0]
    distance = way.norm()
    totals = [torch.zeros_like(x) for x in whole]
    nodes, weights = np.polynomial.legendre.leggauss(steps)
    for node, weight in zip((nodes + 1) / 2, weights / 2, strict=True):
        out, scaled = output(float(node))
        gradients = torch.autograd.grad(out @ way / distance, scaled)
        for total, gradient, x in zip(totals, gradients, whole, strict=True):
            total += float(weight) * gradient * x
    return _parts(totals, reading, model, float(distance))


def _reading(cohort, model, subject):
    """One subject as the networks read it, first window only."""
    from bhx.atlas import match_names
    from bhx.encoding import read_subject

    one = check(cohort, "cohort").isel(subject=_at(cohort, subject)).compute()
    bold = None
    if "bold" in one and bool(one.has_bold):
        named = one.bold.assign_coords(roi=match_names(one.roi.values, model.atlas))
        bold = named.sel(roi=model.atlas.roi.values).values[:, : int(one.n_volumes)]
    t1 = one.t1.values if "t1" in one and bool(one.has_t1) else None
    reading = read_subject(bold, float(one.tr), t1, model.config)
    reading.windows, reading.tokens = reading.windows[:1], reading.tokens[:1]
    return reading


def _parts(totals, reading, model, distance):
    """Attributions of patches and voxels, summed to parcels and cubes."""
    out = xr.Dataset(attrs={"distance": distance})
    if reading.windows:
        roi = model.atlas.roi.drop_vars("roi_other", errors="ignore")
        out["roi_part"] = roi.copy(data=totals[0].sum((1, 2)).numpy()).drop_attrs()
    if reading.t1 is not None:
        grid = model.config.structure.grid
        shape = [n for size, g in zip(totals[-1].shape, grid, strict=True) for n in (g, size // g)]
        out["t1_part"] = (("cx", "cy", "cz"), totals[-1].reshape(shape).sum((1, 3, 5)).numpy())
    total = sum(float(v.sum()) for v in out.data_vars.values())
    return out.assign_attrs(gap=1 - total / distance)


def _features(data):
    """The DataArray (subject, feature) of features, or of latents' mean token."""
    if not isinstance(data, xr.Dataset) or "features" not in data:
        data = pool(data)
    return check(data, "features")["features"]


def subject_mask(data, subjects):
    """A boolean mask over the subjects from ids, a mask, or None for all."""
    ids = data.indexes["subject"]
    if subjects is None:
        return np.ones(len(ids), bool)
    subjects = np.atleast_1d(np.asarray(subjects))
    if subjects.dtype == bool:
        if subjects.shape != (len(ids),):
            fact = f"Expected a mask over {len(ids)} subjects, found one of length {len(subjects)}"
            raise InputError(fact, "Make it from the same Dataset: latents.site == 'A'")
        return subjects
    unknown = [s for s in subjects if s not in ids]
    if unknown or not len(subjects):
        fact = f"Expected ids among {listed(ids, 3)}, found {listed(unknown) or 'no ids'}"
        raise InputError(fact, "See latents.subject")
    return ids.isin(subjects)


def _at(data, subject):
    return int(subject_mask(data, [subject]).argmax())


def _tokens(latents, token):
    """Positions of the tokens asked for."""
    labels = latents["token"].to_index()
    asked = np.atleast_1d(labels if token is None else token)
    at = labels.get_indexer(asked)
    unknown = listed(asked[at < 0])
    if unknown or not len(at):
        fact = f"Expected tokens among {labels[0]} to {labels[-1]}, found {unknown or 'none'}"
        raise InputError(fact, "See latents.token")
    return at


def _standard(values):
    """Rows with mean 0 and length 1; constant rows become 0."""
    values = values - values.mean(-1, keepdims=True)
    length = np.linalg.norm(values, axis=-1, keepdims=True)
    return values / np.where(length > 0, length, 1)
