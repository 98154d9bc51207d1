"""Does it beat the connectome: control features, probes fitted inside the fold, tidy scores.

Nothing that is fitted here ever sees a test subject, and no step before the estimator sees the
target. Plain arithmetic on predictions lives in `metrics`, site and motion in `confounds`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass

import numpy as np
import pandas as pd
import xarray as xr
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from sklearn.base import BaseEstimator, TransformerMixin, clone
from sklearn.feature_selection import VarianceThreshold
from sklearn.impute import SimpleImputer
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.model_selection import GroupKFold, StratifiedGroupKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from . import metrics
from .errors import InputError, listed
from .schema import check

PENALTIES = np.logspace(-5, 1, 7)  # a row, for rows of unit norm: fits any number of either
FEWEST = 5  # sites with fewer subjects are held out together


# ---------------------------------------------------------------- features


def connectome(cohort: xr.Dataset, kind: str = "correlation") -> xr.Dataset:
    """Functional connectivity as features: the control beside every score.

    Parameters
    ----------
    cohort : cohort Dataset with `bold`
    kind : "correlation" (Fisher z of Pearson r) or "partial" (Fisher z of partial correlations
        under Ledoit-Wolf shrinkage)

    Returns
    -------
    Features Dataset, lazy where the cohort is: `features (subject, feature)` float32, the upper
    triangle of roi by roi, with the coordinates `roi_a` and `roi_b` on feature. Only the volumes
    before each scan's end enter. A pair with a parcel that has no signal is NaN, and so is the
    whole row of a subject without BOLD; `attrs["without_bold"]` counts those.
    """
    check(cohort, "cohort")
    if "bold" not in cohort:
        raise InputError("Expected a cohort with 'bold', found 't1' only", "Open one with BOLD")
    if kind not in CONNECTIVITY:
        raise InputError(
            f"Expected kind as one of {listed(CONNECTIVITY)}, found '{kind}'", "Choose one"
        )
    a, b = np.triu_indices(cohort.sizes["roi"], 1)
    bold = cohort.bold.chunk(roi=-1, time=-1) if cohort.bold.chunks else cohort.bold
    values = xr.apply_ufunc(
        _connectivity,
        bold,
        kwargs={"kind": kind},
        input_core_dims=[["roi", "time"]],
        output_core_dims=[["feature"]],
        dask="parallelized",
        output_dtypes=[np.float32],
        dask_gufunc_kwargs={"output_sizes": {"feature": len(a)}},
    )
    roi = cohort.roi.values
    out = values.rename("features").to_dataset()
    out = out.assign_coords(roi_a=("feature", roi[a]), roi_b=("feature", roi[b]))
    name = "connectome" if kind == "correlation" else f"connectome, {kind}"
    missing = int((~cohort.has_bold.values.astype(bool)).sum())
    return out.assign_attrs(name=name, atlas=cohort.attrs.get("atlas", ""), without_bold=missing)


def _connectivity(bold, kind):
    """(subject, roi, time) -> (subject, roi * (roi - 1) / 2)."""
    rows = [CONNECTIVITY[kind](scan[:, np.isfinite(scan).any(0)]) for scan in bold]
    upper = np.triu_indices(bold.shape[1], 1)
    return np.stack([row[upper] for row in rows]).astype(np.float32)


def _correlation(scan):
    """(roi, volume) -> Fisher z (roi, roi), NaN where a parcel is silent."""
    out = np.full((len(scan),) * 2, np.nan)
    alive = np.isfinite(scan).all(1) & (np.ptp(scan, 1) > 0) if scan.shape[1] > 2 else []
    if np.any(alive):
        out[np.ix_(alive, alive)] = _fisher_z(np.atleast_2d(np.corrcoef(scan[alive])))
    return out


def _partial(scan):
    from sklearn.covariance import ledoit_wolf

    out = np.full((len(scan),) * 2, np.nan)
    alive = np.isfinite(scan).all(1) & (np.ptp(scan, 1) > 0) if scan.shape[1] > 2 else []
    if np.any(alive):
        precision = np.linalg.inv(ledoit_wolf(StandardScaler().fit_transform(scan[alive].T))[0])
        scale = np.sqrt(np.diag(precision))
        out[np.ix_(alive, alive)] = _fisher_z(-precision / np.outer(scale, scale))
    return out


def _fisher_z(r):
    return np.arctanh(np.clip(r, -1 + 1e-7, 1 - 1e-7))


CONNECTIVITY = {"correlation": _correlation, "partial": _partial}


# ---------------------------------------------------------------- probe


def probe(
    features,
    target: str,
    *,
    groups: str | None = None,
    stratify: str | None = None,
    task: str | None = None,
    positive=None,
    folds: int = 5,
    repeats: int = 1,
    seed: int = 0,
) -> xr.Dataset:
    """Predict a label of the subjects from features, honestly.

    Ridge regression for numbers, logistic regression for labels. The scaler and the penalty are
    fitted inside each fold (the penalty by an inner cross-validation of the same kind), and one
    participant is never on both sides of a split.

    Parameters
    ----------
    features : Features Dataset (`bhx.pool(latents)`, `bhx.connectome(cohort)`), or a list of them:
        then all are judged on the subjects that every one of them has, in the same folds
    target : name of a coordinate on subject
    groups : None, or the name of a coordinate whose values are held out whole ("site" is
        leave-site-out; sites of fewer than 5 subjects are held out together)
    stratify : name of a coordinate to balance over the folds, beside the target
    task : "number" or "label"; None decides by the target (floats and integers with more than
        ten values are numbers)
    positive : which of two labels precision and recall are about; default the last in order
    folds, repeats, seed : number of folds, of repeated splits, and the seed of the first

    Returns
    -------
    Scores Dataset: `score (model, metric, fold)`, `prediction (model, subject)` (mean over the
    folds that tested the subject), `output (model, fold, subject, class)` and
    `decision (model, fold, subject)`, `truth (subject)`. attrs: target, task, n, excluded (JSON:
    reason -> subject ids), notes (JSON list of fallbacks that were taken).
    """
    many = list(features) if isinstance(features, (list, tuple)) else [features]
    rows = _common_rows(many, target, [c for c in (groups, stratify) if c])
    truth, classes = _truth(rows.labels[target].values, target, task)
    splits = _splits(rows, truth, classes, groups, stratify, folds, repeats, seed)
    scores = [_probe_one(f, rows, truth, classes, splits, positive, seed) for f in many]
    out = xr.concat(scores, "model", data_vars="minimal", coords="minimal", compat="override")
    excluded = {reason: list(ids) for reason, ids in rows.excluded.items()}
    return out.assign_attrs(
        target=target,
        task="number" if classes is None else "label",
        n=len(truth),
        n_participants=len(np.unique(rows.units)),
        groups=groups or "participant",
        stratify=stratify or "",
        seed=seed,
        excluded=json.dumps(excluded),
        notes=json.dumps(splits.notes),
    )


@dataclass
class _Rows:
    keep: np.ndarray  # ids of the subjects that enter
    labels: xr.Dataset  # their coordinates
    units: np.ndarray  # their participants
    excluded: dict  # reason -> ids


@dataclass
class _Splits:
    train_test: list  # (train, test) row indices, one a fold
    names: list
    groups: np.ndarray  # for the inner splits
    notes: list


def _common_rows(many, target, names):
    """The subjects who have every label and every feature, and why the others do not enter."""
    first = check(many[0], "features")
    for name in (target, *names):
        if name not in first.coords or first[name].dims != ("subject",):
            known = [c for c in first.coords if first[c].dims == ("subject",)]
            raise InputError(
                f"Expected '{name}' as a coordinate on subject, found {listed(known, 20)}",
                f"Assign it: features.assign_coords({name}=('subject', values))",
            )
    ids, excluded = first.subject.values, {}
    for features in many:
        have = check(features, "features").subject.values
        _leave_out(excluded, f"not in {name_of(features)}", ids[~np.isin(ids, have)])
        ids = ids[np.isin(ids, have)]
    for features in many:
        empty = ~np.isfinite(features.features.sel(subject=ids).values).any(1)
        _leave_out(excluded, f"no {name_of(features)}", ids[empty])
        ids = ids[~empty]
    for name in (target, *names):
        missing = _is_missing(first[name].sel(subject=ids).values)
        _leave_out(excluded, f"no {name}", ids[missing])
        ids = ids[~missing]
    if len(ids) == 0:
        raise InputError(
            f"Expected subjects with '{target}' and features, found none",
            "Left out: " + "; ".join(f"{len(v)} {k}" for k, v in excluded.items()),
        )
    labels = first.coords.to_dataset().sel(subject=ids)
    units = labels.participant.values if "participant" in labels else ids
    return _Rows(ids, labels, units.astype(str), excluded)


def _leave_out(excluded, reason, ids):
    if len(ids):
        excluded[reason] = [str(i) for i in ids]


def _is_missing(values):
    if np.issubdtype(values.dtype, np.number):
        return ~np.isfinite(values.astype(float))
    return np.array(
        [v is None or str(v).strip().lower() in ("", "nan", "none", "n/a") for v in values]
    )


def _truth(values, target, task):
    """The target as floats (classes None) or as codes of sorted classes."""
    numeric = np.issubdtype(values.dtype, np.number) and values.dtype != bool
    if task is None:
        few = np.issubdtype(values.dtype, np.integer) and len(np.unique(values)) <= 10
        task = "number" if numeric and not few else "label"
    if task not in ("number", "label"):
        raise InputError(f"Expected task as 'number' or 'label', found '{task}'", "Choose one")
    if task == "number":
        if not numeric:
            raise InputError(
                f"Expected numbers in '{target}', found {listed(np.unique(values.astype(str)))}",
                "Convert them, or pass task='label'",
            )
        if len(np.unique(values)) < 2:
            raise InputError(
                f"Expected '{target}' to vary, found {values[0]} only", "Choose another target"
            )
        return values.astype(float), None
    classes, codes = np.unique(values.astype(str), return_inverse=True)
    folded = pd.Series(classes).str.strip().str.casefold()
    if folded.duplicated().any():
        alike = classes[folded.duplicated(keep=False)]
        raise InputError(
            f"Expected distinct labels in '{target}', found {listed(repr(str(a)) for a in alike)} "
            "that differ only by case or spaces",
            "Spell them alike first",
        )
    if len(classes) < 2:
        raise InputError(
            f"Expected at least two labels in '{target}', found '{classes[0]}' only",
            "Choose another target or other subjects",
        )
    return codes, classes


def _splits(rows, truth, classes, groups, stratify, folds, repeats, seed):
    """Outer folds: participants never split, groups held out whole, strata balanced."""
    notes, units = [], rows.units
    if groups:
        units, merged = _held_out_groups(rows, groups)
        folds = min(folds, len(np.unique(units)))
        notes += merged
        notes += [f"{folds} folds that hold out whole values of {groups}"]
        if folds < 2:
            raise InputError(
                f"Expected at least two values of '{groups}' to hold out, found {folds}",
                "Leave groups=None for folds over participants",
            )
    if folds < 2 or folds > len(np.unique(units)):
        raise InputError(
            f"Expected from 2 to {len(np.unique(units))} folds (participants), found {folds}",
            "Choose a number in that range",
        )
    strata = _strata(rows, truth, classes, stratify, folds, notes)
    train_test, names = [], []
    for repeat in range(repeats):
        if groups:
            splitter = GroupKFold(folds, shuffle=True, random_state=seed + repeat)
        else:
            splitter = StratifiedGroupKFold(folds, shuffle=True, random_state=seed + repeat)
        for train, test in splitter.split(units, strata, units):
            held = np.unique(units[test]) if groups and folds == len(np.unique(units)) else None
            name = str(held[0]) if held is not None else str(len(names))
            names.append(name if repeats == 1 or held is None else f"{name}/{repeat}")
            train_test.append((train, test))
            _check_classes(truth, classes, train, test, name, notes)
    return _Splits(train_test, names, units, notes)


def _held_out_groups(rows, groups):
    """One name a subject for what is held out together; participants tie their sites together."""
    values = rows.labels[groups].values.astype(str)
    names, counts = np.unique(values, return_counts=True)
    few = names[counts < FEWEST]
    notes = []
    if len(few):
        notes.append(
            f"{groups} {listed(few, 20)} with fewer than {FEWEST} subjects held out together"
        )
        values = np.where(np.isin(values, few), "+".join(few), values)
    _, site = np.unique(values, return_inverse=True)
    _, unit = np.unique(rows.units, return_inverse=True)
    edges = coo_array((np.ones(len(site)), (site, unit + site.max() + 1)))
    n = site.max() + unit.max() + 2
    edges.resize((n, n))
    _, component = connected_components(edges, directed=False)
    joined = np.array(["+".join(np.unique(values[component[site] == c])) for c in component[site]])
    if len(np.unique(joined)) < len(np.unique(values)):
        notes.append(f"values of {groups} that share participants held out together")
    return joined, notes


def _strata(rows, truth, classes, stratify, folds, notes):
    """Codes to balance over the folds: label or fifth of the target, times `stratify`."""
    if classes is None:
        cells = pd.Series(pd.qcut(truth, 5, labels=False, duplicates="drop")).astype(str)
    else:
        cells = pd.Series(classes[truth])
    if stratify:
        cells = cells + "|" + pd.Series(rows.labels[stratify].values).astype(str)
    small = cells.map(cells.value_counts()) < folds
    if small.any() and not small.all():
        notes.append(
            f"{cells[small].nunique()} strata with fewer than {folds} subjects taken together"
        )
    cells[small] = "few"
    if (cells == "few").sum() < folds:
        cells[small] = cells.mode()[0]
    return cells.values


def _check_classes(truth, classes, train, test, name, notes):
    if classes is None:
        return
    absent = np.setdiff1d(np.arange(len(classes)), truth[train])
    if len(absent):
        raise InputError(
            f"Expected every label in the training part of fold {name}, found no "
            f"'{listed(classes[absent])}'",
            "Take fewer folds, groups=None, or leave that label out",
        )
    if len(np.unique(truth[test])) < 2:
        notes.append(f"fold {name} tests '{classes[truth[test][0]]}' only: its AUROC is undefined")


# ---------------------------------------------------------------- one model


def _probe_one(features, rows, truth, classes, splits, positive, seed):
    x = features.features.sel(subject=rows.keep).values.astype(float)
    if not (np.nanstd(x, 0) > 0).any():
        raise InputError(
            f"Expected features that vary over subjects, found only constants in {name_of(features)}",
            "Were they pooled over subjects by mistake",
        )
    width = 1 if classes is None else len(classes)
    output = np.full((len(splits.train_test), len(x), width), np.nan, np.float32)
    decision = np.full(output.shape[:2], -1, int)
    for fold, (train, test) in enumerate(splits.train_test):
        output[fold, test], decision[fold, test] = _fit_fold(
            x, truth, classes, train, test, splits.groups, seed
        )
    return _tidy(features, rows, truth, classes, splits, output, decision, positive)


def _fit_fold(x, truth, classes, train, test, groups, seed):
    """Prepare, choose the penalty on inner folds, fit, predict: test rows are only transformed."""
    estimator = _estimator(classes)
    losses = np.zeros(len(PENALTIES))
    for fit, hold in _inner_splits(truth[train], classes, groups[train], seed):
        a, b = _prepare(x[train[fit]], x[train[hold]])
        for i, penalty in enumerate(PENALTIES):
            model = _fit(clone(estimator), penalty, a, truth[train[fit]])
            losses[i] += _loss(model, b, truth[train[hold]], classes)
    a, b = _prepare(x[train], x[test])
    model = _fit(estimator, PENALTIES[losses.argmin()], a, truth[train])
    if classes is None:
        return model.predict(b)[:, None], -1
    output = model.predict_proba(b)
    prior = np.bincount(truth[train], minlength=len(classes)) / len(train)
    return output, (output / prior).argmax(1)  # Bayes' rule for balanced accuracy


def _prepare(train, test):
    steps = make_pipeline(
        SimpleImputer(keep_empty_features=True), VarianceThreshold(), StandardScaler(), Rotation()
    )
    return steps.fit_transform(train), steps.transform(test)


class Rotation(TransformerMixin, BaseEstimator):
    """Features on the training rows' own axes, rows of unit mean norm.

    Ridge and L2 logistic regression give the same predictions before and after; with more
    features than rows it makes them fast, and one grid of penalties fits any number of features.
    """

    def fit(self, x, y=None):
        self.mean_ = x.mean(0)
        _, size, axes = np.linalg.svd(x - self.mean_, full_matrices=False)
        keep = size > 1e-9 * size[0]
        self.axes_ = axes[keep] / np.sqrt((size**2).sum() / len(x))
        return self

    def transform(self, x):
        return (x - self.mean_) @ self.axes_.T


def _estimator(classes):
    return Ridge() if classes is None else LogisticRegression(max_iter=2000)


def _fit(estimator, penalty, x, y):
    if isinstance(estimator, Ridge):
        return estimator.set_params(alpha=penalty * len(x)).fit(x, y)
    return estimator.set_params(C=1 / (penalty * len(x))).fit(x, y)


def _loss(model, x, truth, classes):
    if classes is None:
        return ((model.predict(x) - truth) ** 2).sum()
    probability = np.zeros((len(x), len(classes)))
    probability[:, model.classes_] = model.predict_proba(x)
    return -np.log(np.clip(probability[np.arange(len(x)), truth], 1e-12, 1)).sum()


def _inner_splits(truth, classes, groups, seed, folds=3):
    """Folds of the training rows, held-out groups never split; fewer where groups are few."""
    folds = min(folds, len(np.unique(groups)))
    if folds < 2:  # one group left to train on: rows are all there is to split
        groups, folds = np.arange(len(truth)), 3
    if classes is None:
        return list(GroupKFold(folds, shuffle=True, random_state=seed).split(truth, truth, groups))
    splits = StratifiedGroupKFold(folds, shuffle=True, random_state=seed)
    if np.bincount(truth).max() < folds:
        splits = GroupKFold(folds, shuffle=True, random_state=seed)
    return [s for s in splits.split(truth, truth, groups) if len(np.unique(truth[s[0]])) > 1]


def _tidy(features, rows, truth, classes, splits, output, decision, positive):
    task = "number" if classes is None else "label"
    code = -1 if classes is None else _positive_code(classes, positive)
    tested = [test for _, test in splits.train_test]
    table = [
        _measure(truth[t], output[f, t], decision[f, t], code, task) for f, t in enumerate(tested)
    ]
    names = list(table[0])
    scores = np.array([[row[m][0] for row in table] for m in names])
    mean = np.nanmean(np.where(np.isnan(output).all(0), 0, output), 0)
    coords = {
        "model": [name_of(features)],
        "metric": names,
        "fold": splits.names,
        "class": ["value"] if classes is None else list(classes),
    }
    out = xr.Dataset(
        {
            "score": (("model", "metric", "fold"), scores[None]),
            "prediction": (("model", "subject"), _label(mean, classes)[None]),
            "output": (("model", "fold", "subject", "class"), output[None]),
            "decision": (("model", "fold", "subject"), decision[None]),
            "truth": ("subject", truth if classes is None else classes[truth]),
        },
        coords,
    ).assign_coords(rows.labels.coords)
    if classes is not None:
        out.attrs["positive"] = str(classes[code])
    return out


def _label(mean, classes):
    return mean[:, 0] if classes is None else classes[mean.argmax(1)]


def _positive_code(classes, positive):
    if positive is None:
        return len(classes) - 1
    if str(positive) not in classes:
        raise InputError(
            f"Expected positive as one of {listed(classes)}, found '{positive}'", "Choose one"
        )
    return int(np.flatnonzero(classes == str(positive))[0])


def _measure(truth, output, decision, positive, task, weights=None):
    if task == "number":
        return metrics.measure_numbers(truth, output[:, 0], weights)
    return metrics.measure_labels(truth, output, decision, weights, positive, task == "ordinal")


# ---------------------------------------------------------------- compare


def compare(*scores: xr.Dataset, level: float = 0.95, draws: int = 1000, seed: int = 0):
    """One readable table of every model on one target, with intervals.

    Parameters
    ----------
    scores : what `probe` returned, one or several, of the same target

    Returns
    -------
    pandas DataFrame, a row a model and metric: `score` (mean over folds), `low` and `high` (its
    bias-corrected interval under a bootstrap of participants), `n` subjects.
    """
    targets = {s.attrs["target"] for s in scores}
    if len(targets) != 1:
        raise InputError(
            f"Expected scores of one target, found {listed(targets)}", "Compare them apart"
        )
    rows = [row for s in scores for row in _table(s, level, draws, seed)]
    table = pd.DataFrame(rows).set_index(["model", "metric"])
    table.columns.name = targets.pop()
    return table.round(3)


def _table(scores, level, draws, seed):
    estimate = scores.score.mean("fold").values
    low, high = metrics.interval(estimate, resample(scores, draws, seed).values, level)
    for i, model in enumerate(scores.model.values):
        for j, metric in enumerate(scores.metric.values):
            yield {
                "model": model,
                "metric": metric,
                "score": estimate[i, j],
                "low": low[i, j],
                "high": high[i, j],
                "n": scores.attrs["n"],
            }


def resample(scores: xr.Dataset, draws: int = 1000, seed: int = 0) -> xr.DataArray:
    """The mean over folds of each score in `draws` bootstraps of participants.

    A participant drawn twice counts twice in every fold that tested them; predictions are kept,
    models are not fitted again.
    """
    units = scores.participant.values if "participant" in scores.coords else scores.subject.values
    weights = metrics.bootstrap_weights(units.astype(str), draws, seed)
    task, classes = scores.attrs["task"], scores["class"].values.astype(str)
    truth = scores.truth.values
    if task != "number":
        truth = np.searchsorted(classes, truth.astype(str))
    positive = list(classes).index(scores.attrs["positive"]) if "positive" in scores.attrs else -1
    out = np.empty((scores.sizes["model"], scores.sizes["metric"], draws))
    for i in range(scores.sizes["model"]):
        output, decision = scores.output.values[i], scores.decision.values[i]
        folds = []
        for f in range(len(output)):
            t = np.flatnonzero(np.isfinite(output[f, :, 0]))
            measured = _measure(
                truth[t], output[f, t], decision[f, t], positive, task, weights[:, t]
            )
            folds.append([measured[m] for m in scores.metric.values])
        out[i] = np.nanmean(np.array(folds), 0)
    dims = ("model", "metric", "draw")
    return xr.DataArray(out, {"model": scores.model, "metric": scores.metric}, dims)


def name_of(features: xr.Dataset) -> str:
    """What a features Dataset is called in tables of scores."""
    return str(features.attrs.get("name", "features"))
