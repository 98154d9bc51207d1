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
ENOUGH, ENOUGH_OF_A_LABEL = 20, 5  # participants for an interval


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
    of decisions under protocol "paper"), `n` subjects that entered, `diff` to the control and two
    tests of it: `p` (corrected resampled t-test over shared folds; NaN where the folds are not the
    same), which asks whether other training rows would show it, and `p_paired` (paired bootstrap of
    the participants, models not refitted; NaN where they are not the same), which asks whether
    other test participants would. Both with Holm's adjustment over all models and targets, metric
    by metric. `p_null` where `probe` was given permutations. A p of 0.001 may be less. Under 20
    participants, or 5 of some label, there are no intervals and no tests of a difference, and
    `note` says so. attrs["chance"]: metric -> what guessing scores (balanced accuracy only where
    all have as many classes).
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
    for test in ("p", "p_paired"):
        table[test] = table.groupby("metric")[test].transform(lambda p: metrics.adjust_p(p.values))
    if reference is not None:
        table = _with_reference(table, reference)
    index = ["target", "model", "metric"] if len(targets) > 1 else ["model", "metric"]
    table = table.set_index(index).drop(columns="target", errors="ignore")
    share = {1 / s.sizes["class"] for s in scores if s.attrs["task"] != "number"}
    shared = {"balanced_accuracy": share.pop()} if len(share) == 1 else {}
    table.attrs["chance"] = {**shared, **metrics.CHANCE}
    table.columns.name = targets[0] if len(targets) == 1 else None
    table = table.round(3)
    tests = table.columns[table.columns.str.match("p($|_)")]
    return table.assign(**table[tests].clip(lower=0.001))  # no p is 0


def _table(scores, control, level, draws, seed):
    """Rows of one target."""
    found = []
    for s in scores:
        drawn = resample(s, draws, seed)
        found += [(s.isel(model=[i]), drawn[i].values) for i in range(s.sizes["model"])]
    names = [str(s.model.item()) for s, _ in found]
    if control is not None:
        check_choice("control", control, names)
    against = found[-1 if control is None else names.index(control)]
    return pd.DataFrame([row for one in found for row in _rows(*one, *against, level)])


def _rows(s, drawn, control, base, level):
    """A row for each metric of one model, from its draws (metric, draw) and its control's."""
    few, rarest = _people(s)
    mutual, unsure = s.attrs.get("mutual", 1.0), s.attrs["protocol"] == "paper"
    for metric, folds, own in zip(s.metric.values, s.score.values[0], drawn, strict=True):
        score = float(metrics.known_mean(folds))
        row = {"target": s.attrs["target"], "model": str(s.model.item()), "metric": metric}
        ends = metrics.interval(score, own, level, mutual)
        low, high = np.clip(ends, *metrics.RANGE[metric])
        if low > 1 - 1e-9 and metric in metrics.LABEL:  # as many people of a label, no error
            low = ((1 - level) / 2) ** (1 / rarest)
        if few or (unsure and metric in metrics.DECIDED):
            low = high = np.nan
        row |= {"score": score, "low": low, "high": high, "n": s.attrs["n"]}
        row |= {"diff": np.nan, "p": np.nan, "p_paired": np.nan}
        if s is not control and metric in control.metric.values:
            at = list(control.metric.values).index(metric)
            row["diff"] = score - float(metrics.known_mean(control.score.values[0, at]))
            if not few and _same_folds(s, control):
                each = folds - control.score.values[0, at]
                row["p"] = metrics.corrected_t(each, s.attrs["test_share"])[1]
            if not few and _same_people(s, control):
                row["p_paired"] = metrics.paired_p(row["diff"], own - base[at], mutual)
        if "null" in s and metric == s.metric.values[0]:
            row["p_null"] = metrics.permutation_p(score, s.null[0])
        yield row | ({"note": few} if few else {})


def _people(s):
    """Why those tested are too few for an interval or a test, or ""; and how many have the rarest
    label."""
    seen = tested_of(s).any(0)
    people, truth = participants_of(s)[seen], codes_of(s)[seen]
    n = rarest = len(np.unique(people))
    if s.attrs["task"] == "label":
        rarest = min(len(np.unique(people[truth == code])) for code in range(s.sizes["class"]))
    if n < ENOUGH:
        return f"too few: {n} participants", rarest
    scarce = rarest < ENOUGH_OF_A_LABEL
    return f"too few: {rarest} participants of a label" if scarce else "", rarest


def _same_people(a, b):
    return np.array_equal(*(np.unique(participants_of(s)) for s in (a, b)))


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
        models = []
        for output, decision in zip(scores.output.values, scores.decision.values, strict=True):
            found = plan.measure_folds(truth, folds, output, decision, weights)
            models.append([metrics.known_mean(found[m]) for m in scores.metric.values])
        blocks.append(models)
    dims = ("model", "metric", "draw")
    coords = {"model": scores.model, "metric": scores.metric}
    return xr.DataArray(np.concatenate(blocks, -1), coords, dims)
