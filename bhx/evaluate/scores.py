"""Scores read: one table with intervals and the difference to a control."""

from __future__ import annotations

import numpy as np
import pandas as pd
import xarray as xr

from bhx.errors import InputError, check_choice
from bhx.evaluate import metrics
from bhx.evaluate.task import codes_of, participants_of, plan_of, tested_of
from bhx.settings import PACKAGE

# What others report, in the units of `score` (assets/README.md says who measured it, and how)
REPORTED = PACKAGE / "assets" / "reported.csv"


def compare(
    *scores: xr.Dataset,
    control: str | None = None,
    reference: str | None = None,
    level: float = 0.95,
    draws: int = 1000,
    seed: int = 0,
) -> pd.DataFrame:
    """One readable table of every model, with intervals and the difference to a control.

    Parameters
    ----------
    scores : what `probe` returned, one or several, of one target or several
    control : the model the others are tested against; by default the last of each target
    reference : name of a cohort in `REPORTED`; adds what others report for it
    level, draws, seed : of the bootstrap

    Returns
    -------
    pandas DataFrame, a row a (target,) model and metric: `score` (mean over folds), `low` and
    `high` (its interval under a bootstrap of participants, see `metrics.interval`; NaN for metrics
    of decisions under protocol "paper"), `n` subjects that entered, `diff` to the control and `p`
    (corrected resampled t-test over shared folds, with Holm's adjustment over all models and
    targets, metric by metric; NaN where the folds are not the same), `p_null` where `probe` was
    given permutations. attrs["chance"]: metric -> what guessing scores (balanced accuracy only
    where all have as many classes).
    """
    if not scores:
        raise InputError("Expected scores to compare, found none", "Call bhx.probe first")
    for s in scores:
        if not isinstance(s, xr.Dataset) or "target" not in s.attrs:
            fact = f"Expected scores as probe returns them, found {type(s).__name__}"
            raise InputError(fact, "Give them one by one: compare(*scores)")
    if not (0 < level < 1 and draws > 1):
        fact = f"Expected level in (0, 1) and two draws or more, found {level} and {draws}"
        raise InputError(fact, "Take 0.95 and 1000")
    targets = list(dict.fromkeys(s.attrs["target"] for s in scores))
    parts = [[s for s in scores if s.attrs["target"] == target] for target in targets]
    tables = [_table(part, control, level, draws, seed) for part in parts]
    table = pd.concat(tables, ignore_index=True)
    for metric in table.metric.unique():
        at = table.metric == metric
        table.loc[at, "p"] = metrics.adjust_p(table.loc[at, "p"].values)
    if reference is not None:
        table = _with_reference(table, reference)
    index = ["target", "model", "metric"] if len(targets) > 1 else ["model", "metric"]
    table = table.set_index(index).drop(columns="target", errors="ignore")
    share = {1 / s.sizes["class"] for s in scores if s.attrs["task"] != "number"}
    shared = {"balanced_accuracy": share.pop()} if len(share) == 1 else {}
    table.attrs["chance"] = {**shared, **metrics.CHANCE}
    table.columns.name = targets[0] if len(targets) == 1 else None
    return table.round(3)


def _table(scores, control, level, draws, seed):
    """Rows of one target."""
    found = [(s, i) for s in scores for i in range(s.sizes["model"])]
    against = found[-1]
    if control is not None:
        named = [str(s.model.values[i]) for s, i in found]
        check_choice("control", control, named)
        against = found[named.index(control)]
    rows = []
    for s in scores:
        low, high = _interval(s, level, draws, seed)
        for i, model in enumerate(s.model.values.astype(str)):
            for j, metric in enumerate(s.metric.values.astype(str)):
                row = {"target": s.attrs["target"], "model": model, "metric": metric}
                row |= {"score": float(s.score[i, j].mean()), "low": low[i, j], "high": high[i, j]}
                row |= {"n": s.attrs["n"], **_against(s, i, *against, metric)}
                if "null" in s and j == 0:
                    row["p_null"] = metrics.permutation_p(row["score"], s.null[i])
                rows.append(row)
    return pd.DataFrame(rows)


def _interval(scores, level, draws, seed):
    """(low, high), each (model, metric); none for decisions in the paper's three splits."""
    estimate, drawn = scores.score.mean("fold").values, resample(scores, draws, seed).values
    ends = metrics.interval(estimate, drawn, level, scores.attrs.get("mutual", 1.0))
    names = scores.metric.values
    ends = np.clip(ends, *np.transpose([metrics.RANGE[name] for name in names]))
    if scores.attrs["protocol"] == "paper":
        ends[..., np.isin(names, metrics.DECIDED)] = np.nan
    return ends


def _against(scores, i, other, control, metric):
    """Difference to the control in this metric and its p, where both saw the same folds."""
    if (scores is other and i == control) or metric not in other.metric.values:
        return {"diff": np.nan, "p": np.nan}
    one = scores.score[i].sel(metric=metric)
    base = other.score[control].sel(metric=metric)
    out = {"diff": float(one.mean() - base.mean()), "p": np.nan}
    if _same_folds(scores, other):
        difference = one.values - base.values
        out["p"] = metrics.corrected_t(difference, scores.attrs["test_share"])[1]
    return out


def _same_folds(a, b):
    same = np.array_equal(a.subject.values, b.subject.values)
    return same and np.array_equal(tested_of(a), tested_of(b))


def _with_reference(table, cohort):
    """What others report of this cohort, a column each."""
    reported = pd.read_csv(REPORTED)
    check_choice("reference", cohort, sorted(set(reported.cohort)))
    reported = reported[reported.cohort == cohort]
    for (protocol, model), found in reported.groupby(["protocol", "model"], sort=False):
        table[f"{protocol}: {model}"] = table.metric.map(found.set_index("metric").value)
    return table


def resample(scores: xr.Dataset, draws: int = 1000, seed: int = 0) -> xr.DataArray:
    """The mean over folds of each score in `draws` bootstraps of participants.

    A participant drawn twice counts twice in every fold that tested them; predictions are kept,
    models are not fitted again.
    """
    plan, truth, folds = plan_of(scores), codes_of(scores), tested_of(scores)
    blocks = []
    for weights in metrics.bootstrap_weights(participants_of(scores), draws, seed):
        out = np.empty((scores.sizes["model"], scores.sizes["metric"], len(weights)))
        for i, (output, decision) in enumerate(
            zip(scores.output.values, scores.decision.values, strict=True)
        ):
            found = [
                plan.measure(truth[t], output[f, t], decision[f, t], weights[:, t])
                for f, t in enumerate(folds)
            ]
            each = [[one[m] for m in scores.metric.values] for one in found]
            out[i] = metrics.known_mean(np.array(each))
        blocks.append(out)
    dims = ("model", "metric", "draw")
    coords = {"model": scores.model, "metric": scores.metric}
    return xr.DataArray(np.concatenate(blocks, -1), coords, dims)
