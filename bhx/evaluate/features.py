"""Features that need no network: what every claim stands beside.

Each function takes a cohort and returns a Features Dataset. Nothing is fitted over subjects here
but `Tangent`, a scikit-learn transformer that `bhx.probe` fits in the training fold.
"""

from __future__ import annotations

import warnings

import numpy as np
import xarray as xr
from sklearn.base import BaseEstimator, TransformerMixin
from sklearn.preprocessing import StandardScaler
from sklearn.utils.validation import check_is_fitted, validate_data

from bhx.errors import InputError, check_choice, listed
from bhx.modalities.bold import BOLD
from bhx.modalities.coupling import flattened
from bhx.modalities.t1 import ANATOMY
from bhx.modalities.table import by_variable
from bhx.schema import check, is_missing, subject_coords, who_has

COMPONENTS = 20  # principal components of the controls that take some
CONFOUNDS = ("age", "sex", "site", "mean_fd", "coverage", "n_volumes")


def connectome(cohort: xr.Dataset, kind: str = "correlation") -> xr.Dataset:
    """Functional connectivity as features: the control beside every score.

    Parameters
    ----------
    cohort : cohort Dataset with `bold`
    kind : "correlation" (Fisher z of Pearson r), "partial" (Fisher z of partial correlations),
        "tangent" (correlations that `probe` carries to the tangent space at the training mean),
        both under Ledoit-Wolf shrinkage, or "flattened" (the power 0.35 of the correlation matrix,
        whose smaller components count for more)

    Returns
    -------
    Features Dataset, lazy where the cohort is: `features (subject, feature)` float32, the upper
    triangle of roi by roi (with the diagonal for "tangent"), with the coordinates `roi_a` and
    `roi_b` on feature. Only the volumes before each scan's end enter. A pair with a parcel that
    has no signal is NaN, and so is the whole row of a subject without BOLD;
    `attrs["without_bold"]` counts those.
    """
    bold = _variable(cohort, BOLD)
    check_choice("kind", kind, CONNECTIVITY)
    a, b = np.triu_indices(cohort.sizes["roi"], int(kind != "tangent"))
    values = _per_subject(bold, _connectivity, len(a), kind=kind)
    roi = cohort.roi.values
    name = "connectome" if kind == "correlation" else f"connectome, {kind}"
    return values.assign_coords(roi_a=("feature", roi[a]), roi_b=("feature", roi[b])).assign_attrs(
        name=name,
        atlas=cohort.attrs.get("atlas", ""),
        without_bold=int((~who_has(cohort, BOLD.variable)).sum()),
        notes=cohort.attrs.get("notes", []),
        in_fold="tangent" if kind == "tangent" else "",
    )


def _variable(cohort, modality):
    """A modality's data in the cohort."""
    check(cohort, "cohort")
    if modality.variable not in cohort or not who_has(cohort, modality.variable).any():
        there = [v for v in cohort.data_vars if who_has(cohort, v).any()]
        fact = f"Expected a cohort with '{modality.variable}', found {listed(there) or 'no scan'}"
        raise InputError(fact, f"Open one in which some subject has {modality.variable}")
    return cohort[modality.variable]


def _per_subject(data, function, width, *labels, **options):
    """`function(rows, *labels, **options)` -> (rows, width) as features, lazily where data are."""
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
    out = out.to_dataset(name="features")
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
    from nilearn.connectome import prec_to_partial

    return _fisher_z(prec_to_partial(np.linalg.inv(_shrunk(scan))))


def _fisher_z(r):
    return np.arctanh(np.clip(r, -1 + 1e-7, 1 - 1e-7))


CONNECTIVITY = {
    "correlation": _correlation,
    "partial": _partial,
    "tangent": _shrunk,
    "flattened": flattened,
}


def signal_spread(cohort: xr.Dataset) -> xr.Dataset:
    """Mean and log standard deviation in time of each parcel, no coupling: arXiv 2609.34167.

    NaN where a parcel has no signal. Scans that were z-scored before have nothing to read.
    """
    bold = _variable(cohort, BOLD)
    values = _per_subject(bold, _spread, 2 * cohort.sizes["roi"])
    return values.assign_attrs(name="mean and log SD")


def _spread(bold):
    """(subject, roi, time) -> (subject, mean of each parcel and log deviation of each)."""
    with warnings.catch_warnings(action="ignore", category=RuntimeWarning):  # all of a parcel NaN
        deviation = np.nanstd(bold.astype(float), 2)
        level = np.where(deviation > 0, np.nanmean(bold.astype(float), 2), np.nan)
        log = np.log(np.where(deviation > 0, deviation, np.nan))
    return np.concatenate([level, log], 1).astype(np.float32)


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
    t1 = _variable(cohort, ANATOMY)
    voxel = abs(float(cohort.x[1] - cohort.x[0]))
    edge = round(mm / voxel)
    if edge < 1 or abs(edge * voxel - mm) > 1e-6:
        fact = f"Expected mm as a multiple of {voxel:g} mm, found {mm:g}"
        raise InputError(fact, f"Take for instance mm={2 * voxel:g}")
    shape = tuple(cohort.sizes[axis] // edge for axis in "xyz")
    values = _per_subject(t1, _cubes, 2 * int(np.prod(shape)), edge=edge, shape=shape)
    there = xr.DataArray(who_has(cohort, ANATOMY.variable), dims="subject")
    return values.where(there).assign_attrs(name="T1 cubes")


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
    bold = _variable(cohort, BOLD)
    seconds = (cohort.tr * (cohort.n_volumes - 1)).values[who_has(cohort, BOLD.variable)]
    seconds = np.arange(0, float(seconds.min()) + 1e-9, step)
    width = cohort.sizes["roi"] * len(seconds)
    values = _per_subject(bold, _resampled, width, cohort.tr, seconds=seconds)
    return values.assign_attrs(name="raw signal (MLP)", estimator="MLP", components=COMPONENTS)


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
    return _as_features(data, values, name="confounds", columns=", ".join(names))


def nothing(data: xr.Dataset) -> xr.Dataset:
    """Features of no width: `probe` then guesses the training mean or the training frequencies."""
    return _as_features(data, np.zeros((data.sizes["subject"], 0)), name="mean or majority")


def plain_values(cohort: xr.Dataset, variable: str) -> xr.Dataset:
    """A variable of the cohort as it is, one column an element; NaN rows for those without it."""
    check(cohort, "cohort")
    values = cohort[variable].where(xr.DataArray(who_has(cohort, variable), dims="subject"))
    return _as_features(cohort, values.values.reshape(len(values), -1), name=variable)


def _as_features(data, values, **attrs):
    """Values (subject, column) as a Features Dataset with the labels of `data`."""
    features = {"features": (("subject", "feature"), values)}
    return xr.Dataset(features, subject_coords(data), attrs)


def fuse(*features: xr.Dataset, name: str | None = None) -> xr.Dataset:
    """Several features side by side, for the subjects that all of them have.

    A subject without any value of one of them is NaN throughout. The coordinate `part` on feature
    counts them: `probe` gives each of them the same weight, whatever its width.
    """
    if not features:
        raise InputError("Expected features to put side by side, found none", "Give two or more")
    parts, count, complete = [], 0, True
    for one in features:
        there = np.isfinite(check(one, "features").features).any("feature").reset_coords(drop=True)
        complete = complete & (there if one.sizes["feature"] else True)
        on_feature = _on_feature(one)
        on_feature["part"] = on_feature["part"] + count
        count += len(np.unique(on_feature["part"]))
        coords = {key: ("feature", values) for key, values in on_feature.items()}
        parts.append(one[["features"]].assign_coords(coords))
    joined = xr.concat(parts, "feature", join="inner", coords="minimal", compat="override")
    joined["features"] = joined.features.where(complete)
    attrs = {"name": name or " + ".join(name_of(one) for one in features)}
    return joined.drop_attrs(deep=False).assign_attrs(attrs)


def plain_controls(cohort: xr.Dataset, target: str | None = None) -> list[xr.Dataset]:
    """What every claim stands beside: no brain, confounds, anatomy, function, and both, all plain.

    `target` is left out of the confounds. Beside linear models stand a small network on the raw
    signal and principal components of the T1. Another modality's control is its own values.
    """
    names = [n for n in CONFOUNDS if n in cohort.coords and n != target]
    out = [nothing(cohort), confound_features(cohort, names)]
    there = [v for v in by_variable(cohort.data_vars) if who_has(cohort, v).any()]
    t1, bold = (m.variable in there for m in (ANATOMY, BOLD))
    if t1:
        cubes = cube_means(cohort).compute()
        out.append(cubes)
    if bold:
        functions = [connectome(cohort, kind).compute() for kind in CONNECTIVITY]
        spread = signal_spread(cohort).compute()
        varies = (spread.features.std("subject") > 1e-3).any()  # not of z-scored scans
        out += [*functions, *([spread] if varies else []), raw_signal(cohort).compute()]
    if t1:
        out.append(cubes.assign_attrs(name="T1 cubes (PCA)", components=COMPONENTS))
    others = [v for v in there if v not in (ANATOMY.variable, BOLD.variable)]
    out += [plain_values(cohort, variable) for variable in others]
    if t1 and bold:
        out.append(fuse(cubes, functions[0]))
    return out


def name_of(features: xr.Dataset) -> str:
    """What a features Dataset is called in tables of scores."""
    return str(features.attrs.get("name", "features"))


def provenance_of(features) -> dict:
    """What made these features, as scores keep it."""
    keep = ("model", "weights", "weights_sha256")
    keep += ("config", "scaling", "atlas", "versions", "source")
    return {k: str(features.attrs[k]) for k in keep if k in features.attrs}


def encoded(labels: xr.Dataset, names) -> np.ndarray:
    """Numbers as they are and words as one column a word but the first, (subject, column); NaN
    where a label is missing."""
    columns = [np.zeros((labels.sizes["subject"], 0))]
    for name in names:
        values, missing = labels[name].values, is_missing(labels[name].values)
        if np.issubdtype(values.dtype, np.number) or values.dtype == bool:
            column = values.astype(float)[:, None]
        else:
            words = np.unique(values[~missing].astype(str))
            column = (values.astype(str)[:, None] == words[1:]).astype(float)
        columns.append(np.where(missing[:, None], np.nan, column))
    return np.hstack(columns)


# Parts, and what is fitted in the fold ---


def _on_feature(features):
    """What each column is: the part, its entry of IN_FOLD, and its pair of parcels."""
    n, known = features.sizes["feature"], features.coords
    plain = {"part": 0, "in_fold": features.attrs.get("in_fold", ""), "roi_a": "", "roi_b": ""}
    return {k: known[k].values if k in known else np.full(n, v) for k, v in plain.items()}


def parts_of(features: xr.Dataset) -> list:
    """(columns, unfitted transformers) of each part that `fuse` put side by side."""
    on, out = _on_feature(features), []
    ordered = not (np.diff(on["part"]) < 0).any()
    starts, counts = np.unique(on["part"], return_index=True, return_counts=True)[1:]
    for start, count in zip(starts, counts, strict=True):
        columns, name = slice(start, start + count), str(on["in_fold"][start])
        if not ordered or (name and not _is_triangle(on["roi_a"][columns], on["roi_b"][columns])):
            fact = f"Expected all features of '{name_of(features)}' in their order, found others"
            raise InputError(fact, "Select parcels before bhx.connectome, and features before fuse")
        out.append((columns, [IN_FOLD[name]()] if name else []))
    return out


def _is_triangle(a, b):
    """Whether pairs are the upper triangle, with its diagonal, of roi by roi."""
    roi = np.array(list(dict.fromkeys(a)))
    i, j = np.triu_indices(len(roi))
    return np.array_equal(a, roi[i]) and np.array_equal(b, roi[j])


class Tangent(TransformerMixin, BaseEstimator):
    """Covariances (row, upper triangle with diagonal) to the tangent space at their mean.

    log(M^-1/2 C M^-1/2) with M the arithmetic mean of the training rows; off-diagonal elements
    times sqrt(2). Source: Varoquaux et al., MICCAI 2010; Ng et al., MICCAI 2014. (nilearn's
    ConnectivityMeasure takes series alone, and M is their geometric mean.)
    """

    def fit(self, x, y=None):
        """Find the mean of the rows; `y` is not looked at."""
        x = validate_data(self, x, dtype=float)
        value, vector = np.linalg.eigh(_full(x.mean(0)[None])[0])
        self.whitening_ = (vector / np.sqrt(value.clip(1e-9))) @ vector.T
        return self

    def transform(self, x):
        """(row, element) -> (row, element)."""
        check_is_fitted(self)
        x = validate_data(self, x, dtype=float, reset=False)
        value, vector = np.linalg.eigh(self.whitening_ @ _full(x) @ self.whitening_)
        logs = (vector * np.log(value.clip(1e-9))[:, None]) @ vector.transpose(0, 2, 1)
        a, b = np.triu_indices(logs.shape[1])
        return logs[:, a, b] * np.where(a == b, 1, np.sqrt(2))


def _full(x):
    """(row, upper triangle) -> (row, n, n)."""
    n = int((np.sqrt(8 * x.shape[1] + 1) - 1) / 2)
    a, b = np.triu_indices(n)
    out = np.zeros((len(x), n, n))
    out[:, a, b] = out[:, b, a] = x
    return out


IN_FOLD = {"tangent": Tangent}  # attrs["in_fold"] of features -> what a fold fits to them first
