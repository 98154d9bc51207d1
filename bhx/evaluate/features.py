"""Features that need no network: what every claim stands beside.

Each function takes a cohort and returns a Features Dataset. Nothing is fitted over subjects here
but `Tangent`, a scikit-learn transformer that `bhx.probe` fits in the training fold.
"""

from __future__ import annotations

import json

import numpy as np
import xarray as xr
from sklearn.base import BaseEstimator, TransformerMixin
from sklearn.preprocessing import StandardScaler

from bhx.errors import InputError, check_choice
from bhx.schema import check, subject_coords

GUESS = "mean or majority"
COMPONENTS = 20  # principal components of the controls that take some
CONFOUNDS = ("age", "sex", "site", "mean_fd", "coverage", "n_volumes")


def connectome(cohort: xr.Dataset, kind: str = "correlation") -> xr.Dataset:
    """Functional connectivity as features: the control beside every score.

    Parameters
    ----------
    cohort : cohort Dataset with `bold`
    kind : "correlation" (Fisher z of Pearson r), "partial" (Fisher z of partial correlations) or
        "tangent" (correlations that `probe` carries to the tangent space at the training mean);
        the last two under Ledoit-Wolf shrinkage

    Returns
    -------
    Features Dataset, lazy where the cohort is: `features (subject, feature)` float32, the upper
    triangle of roi by roi (with the diagonal for "tangent"), with the coordinates `roi_a` and
    `roi_b` on feature. Only the volumes before each scan's end enter. A pair with a parcel that
    has no signal is NaN, and so is the whole row of a subject without BOLD;
    `attrs["without_bold"]` counts those.
    """
    check(cohort, "cohort")
    if "bold" not in cohort:
        raise InputError("Expected a cohort with 'bold', found 't1' only", "Open one with BOLD")
    check_choice("kind", kind, CONNECTIVITY)
    a, b = np.triu_indices(cohort.sizes["roi"], int(kind != "tangent"))
    values = _per_subject(cohort.bold, _connectivity, len(a), kind=kind)
    roi = cohort.roi.values
    name = "connectome" if kind == "correlation" else f"connectome, {kind}"
    return (
        values.to_dataset(name="features")
        .assign_coords(roi_a=("feature", roi[a]), roi_b=("feature", roi[b]))
        .assign_attrs(
            name=name,
            atlas=cohort.attrs.get("atlas", ""),
            without_bold=int((~cohort.has_bold.values.astype(bool)).sum()),
            in_fold="tangent" if kind == "tangent" else "",
        )
    )


def _per_subject(data, function, width, *labels, **options):
    """`function(rows, *labels, **options)` -> (rows, width), lazily where the data are."""
    dims = list(data.dims[1:])
    data = data.chunk(dict.fromkeys(dims, -1)) if data.chunks else data
    out = xr.apply_ufunc(
        function,
        data,
        *labels,
        kwargs=options,
        input_core_dims=[dims, *([] for _ in labels)],
        output_core_dims=[["feature"]],
        dask="parallelized",
        output_dtypes=[np.float32],
        dask_gufunc_kwargs={"output_sizes": {"feature": width}},
    )
    return out.drop_vars([name for name, c in out.coords.items() if c.dims != ("subject",)])


def _connectivity(bold, kind):
    """(subject, roi, time) -> (subject, upper triangle)."""
    upper = np.triu_indices(bold.shape[1], int(kind != "tangent"))
    out = np.full((len(bold), len(upper[0])), np.nan, np.float32)
    for row, scan in zip(out, bold, strict=True):
        scan = scan[:, np.isfinite(scan).any(0)].astype(float)
        alive = np.isfinite(scan).all(1) & (np.ptp(scan, 1) > 0) if scan.shape[1] > 2 else [False]
        if np.any(alive):
            full = np.full((len(scan),) * 2, np.nan)
            full[np.ix_(alive, alive)] = CONNECTIVITY[kind](scan[alive])
            row[:] = full[upper]
    return out


def _correlation(scan):
    """(roi, volume) -> Fisher z (roi, roi)."""
    return _fisher_z(np.atleast_2d(np.corrcoef(scan)))


def _shrunk(scan):
    """Ledoit-Wolf estimate of the correlation matrix."""
    from sklearn.covariance import ledoit_wolf

    return ledoit_wolf(StandardScaler().fit_transform(scan.T))[0]


def _partial(scan):
    precision = np.linalg.inv(_shrunk(scan))
    scale = np.sqrt(np.diag(precision))
    return _fisher_z(-precision / np.outer(scale, scale))


def _fisher_z(r):
    return np.arctanh(np.clip(r, -1 + 1e-7, 1 - 1e-7))


CONNECTIVITY = {"correlation": _correlation, "partial": _partial, "tangent": _shrunk}


def cube_means(cohort: xr.Dataset, mm: float = 16.0) -> xr.Dataset:
    """T1 as features, the structural baseline: mean and deviation of cubes of the z-scored volume.

    Parameters
    ----------
    cohort : cohort Dataset with `t1`
    mm : edge of a cube [mm], a multiple of the grid's voxel

    Returns
    -------
    Features Dataset, lazy where the cohort is; NaN rows for subjects without T1.
    """
    check(cohort, "cohort")
    if "t1" not in cohort:
        raise InputError("Expected a cohort with 't1', found 'bold' only", "Open one with T1")
    voxel = abs(float(cohort.x[1] - cohort.x[0]))
    edge = round(mm / voxel)
    if edge < 1 or abs(edge * voxel - mm) > 1e-6:
        raise InputError(f"Expected mm as a multiple of {voxel:g} mm, found {mm:g}", "Take 16")
    shape = tuple(cohort.sizes[axis] // edge for axis in "xyz")
    values = _per_subject(cohort.t1, _cubes, 2 * int(np.prod(shape)), edge=edge, shape=shape)
    values = values.where(cohort.has_t1.astype(bool))
    out = values.astype("float32").to_dataset(name="features")
    return out.assign_attrs(name="T1 cubes")


def _cubes(t1, edge, shape):
    x, y, z = (n * edge for n in shape)
    cubes = t1[:, :x, :y, :z].reshape(len(t1), shape[0], edge, shape[1], edge, shape[2], edge)
    flat = t1.reshape(len(t1), -1)
    mean, std = flat.mean(1)[:, None], flat.std(1)[:, None] + 1e-9
    within = (2, 4, 6)
    level = (cubes.mean(within).reshape(len(t1), -1) - mean) / std
    spread = cubes.std(within).reshape(len(t1), -1) / std
    return np.concatenate([level, spread], 1).astype(np.float32)


def raw_signal(cohort: xr.Dataset, step: float = 2.0) -> xr.Dataset:
    """The z-scored parcel series themselves, on one time axis: what a plain network would see.

    Each scan is interpolated linearly to `step` [s], over the seconds that all scans have. `probe`
    reads it by a small network on its principal components.
    """
    check(cohort, "cohort")
    has = cohort.has_bold.values.astype(bool)
    if "bold" not in cohort or not has.any():
        raise InputError("Expected a cohort with 'bold', found no scan", "Open one with BOLD")
    shortest = float((cohort.tr * (cohort.n_volumes - 1)).values[has].min())
    seconds = np.arange(0, shortest + 1e-9, step)
    width = cohort.sizes["roi"] * len(seconds)
    values = _per_subject(cohort.bold, _resampled, width, cohort.tr, seconds=seconds)
    out = values.to_dataset(name="features")
    return out.assign_attrs(name="raw signal (MLP)", estimator="MLP", components=COMPONENTS)


def _resampled(bold, tr, seconds):
    """(subject, roi, time), (subject,) -> (subject, roi * second), NaN without BOLD."""
    out = np.full((len(bold), bold.shape[1], len(seconds)), np.nan, np.float32)
    for row, scan, step in zip(out, bold, tr, strict=True):
        known = np.isfinite(scan).any(0)
        if known.any():
            scan = scan[:, known].astype(float)
            scale = np.where(scan.std(1) > 0, scan.std(1), 1)
            z = (scan - scan.mean(1, keepdims=True)) / scale[:, None]
            row[:] = [np.interp(seconds, step * np.arange(z.shape[1]), series) for series in z]
    return out.reshape(len(bold), -1)


def confound_features(data: xr.Dataset, names=None) -> xr.Dataset:
    """Labels as features: what can be predicted without looking at a brain.

    `names` are coordinates on subject, by default those of age, sex, site, mean_fd, coverage and
    n_volumes that there are; words become one column a word. A missing number is NaN, which
    `probe` fills with the training mean.
    """
    names = [n for n in CONFOUNDS if n in data.coords] if names is None else list(names)
    values = encoded(data.coords.to_dataset(), names)
    out = xr.Dataset({"features": (("subject", "feature"), values)})
    out = out.assign_coords(subject_coords(data))
    return out.assign_attrs(name="confounds", columns=", ".join(names))


def nothing(data: xr.Dataset) -> xr.Dataset:
    """Features of no width: `probe` then guesses the training mean or the training frequencies."""
    out = xr.Dataset({"features": (("subject", "feature"), np.zeros((data.sizes["subject"], 0)))})
    return out.assign_coords(subject_coords(data)).assign_attrs(name=GUESS)


def fuse(*features: xr.Dataset, name: str | None = None) -> xr.Dataset:
    """Several features side by side, for the subjects that all of them have.

    A subject without any value of one of them is NaN throughout. `probe` gives each of them the
    same weight, whatever its width.
    """
    if not features:
        raise InputError("Expected features to put side by side, found none", "Give two or more")
    blocks = [b for f in features for b in blocks_of(check(f, "features")) if b[0]]
    own = ["feature", "roi_a", "roi_b"]
    parts = [f[["features"]].drop_vars(own, errors="ignore") for f in features]
    joined = xr.concat(parts, "feature", join="inner", coords="minimal", compat="override")
    for part in (f.features for f in features if f.sizes["feature"]):
        there = np.isfinite(part).any("feature").reset_coords(drop=True)
        joined["features"] = joined.features.where(there)
    name = name or " + ".join(name_of(f) for f in features)
    return joined.assign_attrs(name=name, blocks=json.dumps(blocks))


def plain_controls(cohort: xr.Dataset, target: str | None = None) -> list[xr.Dataset]:
    """What every claim stands beside: no brain, confounds, T1, function, and both, all plain.

    `target` is left out of the confounds. Beside linear models stand a small network on the raw
    signal and principal components of the T1.
    """
    names = [n for n in CONFOUNDS if n in cohort.coords and n != target]
    out = [nothing(cohort), confound_features(cohort, names)]
    t1, bold = (n in cohort and bool(cohort[f"has_{n}"].any()) for n in ("t1", "bold"))
    if t1:
        cubes = cube_means(cohort).compute()
        out.append(cubes)
    if bold:
        functions = [connectome(cohort, kind).compute() for kind in CONNECTIVITY]
        out += [*functions, raw_signal(cohort).compute()]
    if t1:
        out.append(cubes.assign_attrs(name="T1 cubes (PCA)", components=COMPONENTS))
    if t1 and bold:
        out.append(fuse(cubes, functions[0]))
    return out


def name_of(features: xr.Dataset) -> str:
    """What a features Dataset is called in tables of scores."""
    return str(features.attrs.get("name", "features"))


def encoded(labels, names):
    """Numbers as they are and words as one column a word but the first, (subject, column)."""
    columns = [np.zeros((labels.sizes["subject"], 0))]
    for name in names:
        values = labels[name].values
        if np.issubdtype(values.dtype, np.number) or values.dtype == bool:
            columns.append(values.astype(float)[:, None])
        else:
            words, code = np.unique(values.astype(str), return_inverse=True)
            columns.append(np.eye(len(words))[code][:, 1:])
    return np.hstack(columns)


def blocks_of(features):
    """(width, what must be fitted in the fold) of the parts that `fuse` put side by side."""
    width, kind = features.sizes["feature"], features.attrs.get("in_fold", "")
    blocks, whole = [[width, kind]], kind != "tangent" or _is_triangle(features)
    if "blocks" in features.attrs:
        blocks = json.loads(features.attrs["blocks"])
        whole = sum(w for w, _ in blocks) == width
    if not whole:
        fact = f"Expected all features of '{name_of(features)}' in their order, found a selection"
        raise InputError(fact, "Select parcels before bhx.connectome, and features before fuse")
    return blocks


def _is_triangle(features):
    """Whether the features are the upper triangle, with its diagonal, of roi by roi."""
    if "roi_a" not in features.coords:
        return False
    one, other = features.roi_a.values, features.roi_b.values
    roi = np.array(list(dict.fromkeys(one)))
    a, b = np.triu_indices(len(roi))
    return np.array_equal(one, roi[a]) and np.array_equal(other, roi[b])


class Tangent(TransformerMixin, BaseEstimator):
    """Covariances (row, upper triangle with diagonal) to the tangent space at their mean.

    log(M^-1/2 C M^-1/2) with M the arithmetic mean of the training rows; off-diagonal elements
    times sqrt(2). Source: Varoquaux et al., MICCAI 2010; Ng et al., MICCAI 2014.
    """

    def fit(self, x, y=None):
        """Find the mean of the rows; `y` is not looked at."""
        value, vector = np.linalg.eigh(_full(x.mean(0)[None])[0])
        self.whitening_ = (vector / np.sqrt(value.clip(1e-9))) @ vector.T
        return self

    def transform(self, x):
        """(row, element) -> (row, element)."""
        value, vector = np.linalg.eigh(self.whitening_ @ _full(x) @ self.whitening_)
        logs = (vector * np.log(value.clip(1e-9))[:, None]) @ vector.transpose(0, 2, 1)
        a, b = np.triu_indices(logs.shape[1])
        return logs[:, a, b] * np.where(a == b, 1, np.sqrt(2))


def _full(x):
    n = int((np.sqrt(8 * x.shape[1] + 1) - 1) / 2)
    a, b = np.triu_indices(n)
    out = np.zeros((len(x), n, n))
    out[:, a, b] = out[:, b, a] = x
    return out
