"""What scores mean, for a reader: strata, confounds, figures, one page.

Everything here reads the Scores Datasets of `bhx.probe`; no model is fitted.
"""

from __future__ import annotations

import json
import platform
from html import escape
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pandas as pd
import xarray as xr
from sklearn.linear_model import LinearRegression

from bhx.data.page import drawn, page, private
from bhx.data.splits import cohort_hash
from bhx.errors import InputError, listed
from bhx.evaluate import metrics
from bhx.evaluate.features import CONFOUNDS, encoded
from bhx.evaluate.options import check_coords
from bhx.evaluate.scores import compare
from bhx.evaluate.task import codes_of, participants_of, plan_of
from bhx.schema import is_missing
from bhx.settings import PACKAGE, __version__

BLUE, GRAY = "#0072B2", "#7f7f7f"
NAMED = ("torch", "xarray", "dask", "zarr", "numpy", "scipy", "scikit-learn", "plotly")


def report(*scores: xr.Dataset, path="report.html", control=None, reference=None) -> Path:
    """Write one self-contained page about scores of one target, and its table as Markdown.

    Parameters
    ----------
    scores : what `bhx.probe` returned, one or several
    path : where the page goes; the table goes beside it, ending in .md
    control, reference : as for `bhx.compare`

    Returns
    -------
    Path of the page: methods, who was left out and why, the scores with intervals beside their
    controls, calibration or bias with age, strata, what confounds explain, versions and hashes.
    """
    path = Path(path)
    if path.suffix.lower() == ".md":
        fact = f"Expected a page that ends in .html, found '{path}'"
        raise InputError(fact, "The table goes beside it and ends in .md")
    table = compare(*scores, control=control, reference=reference)
    found = dict.fromkeys(f"{s.attrs['target']} ({s.attrs['task']})" for s in scores)
    if len(found) > 1:
        fact = f"Expected scores of one target, found {listed(found)}"
        raise InputError(fact, "Write a page about each")
    try:
        path.write_text(_page(scores, table), encoding="utf-8")
        path.with_suffix(".md").write_text(as_markdown(table), encoding="utf-8")
    except OSError as error:
        fact = f"Expected a path that can be written, found '{path}': {error.strerror}"
        raise InputError(fact, "Give a file in a folder that is there") from error
    return path


def _page(scores, table):
    figures, first = [plot_scores(table)], scores[0]
    if first.attrs["task"] == "label" and first.sizes["class"] == 2:
        figures.append(plot_calibration(*scores))
    if first.attrs["task"] == "number":
        figures.append(plot_predictions(*scores))
    notes = ["Rows without a label, a confound or a feature are left out as shown above."]
    notes += [note for s in scores for note in json.loads(s.attrs["notes"])]
    sections = {
        "Methods": "".join(f"<p>{escape(methods(s))}</p>" for s in scores),
        "Who entered": "".join(map(_entered, scores)),
        "Scores": "".join([_html(table), *drawn(figures)]),
        "Within each site": "".join(_html(within(s, "site")) for s in scores if "site" in s.coords),
        "Confounds": "".join(map(_explained, scores)),
        "What was taken for granted": _list(notes),
        "Made by": _list([*made_with(*scores).splitlines(), *map(_made_by, scores)]),
    }
    body = "".join(f"<h2>{name}</h2>{content}" for name, content in sections.items() if content)
    return page(f"Scores: {first.attrs['target']}", body)


def made_with(*objects) -> str:
    """Versions, then whose weights, which rows of which cohort and which seeds made these objects.

    Parameters
    ----------
    objects : cohorts, latents, features, scores (their attributes are read) or models

    Returns
    -------
    Text: one line of versions, then each thing once. Hashes are the first twelve digits of
    SHA-256: of the weights' file, and of the ids of the rows in their order. Weights that are not
    shipped with bhx are called "made here": another machine's may differ in their last digits.
    """
    versions = [f"Python {platform.python_version()}", f"bhx {__version__}"]
    versions += [f"{name} {version(name)}" for name in NAMED]
    lines = dict.fromkeys(line for o in objects for line in _about(o))
    return "\n".join([", ".join(versions), *lines])


def _about(one):
    """Lines of `made_with` about one object."""
    if hasattr(one, "provenance"):  # a model
        kept = {"weights": one.provenance.get("source"), **one.provenance}
        return _weights([{"model": one.config.name, **kept}])
    attrs = getattr(one, "attrs", {})
    lines = _weights([attrs, *json.loads(attrs.get("features", "{}")).values()])
    cohort = str(attrs.get("cohort", ""))  # latents carry their cohort's attributes
    data = json.loads(cohort) if cohort.startswith("{") else attrs
    name = attrs.get("target") or attrs.get("method") or f"{data.get('source') or ''} cohort"
    seed = attrs.get("seed", data.get("seed", ""))
    facts = [f"seed {seed}"] if seed != "" else []
    if {"subject", "participant"} <= {*getattr(one, "coords", ())}:
        facts.append(f"{one.sizes['subject']} rows {cohort_hash(one)[:12]}")
    return [*lines, f"{name.strip()}: {', '.join(facts)}"] if facts else lines


def _weights(provenances):
    """A line for each of those that name weights."""
    shipped = PACKAGE.glob("weights/*/config.json")
    names = {json.loads(path.read_text("utf8"))["sha256"]: path.parent.name for path in shipped}
    lines = []
    for made in (p for p in provenances if "weights_sha256" in p):
        digest = made["weights_sha256"]
        kind = "shipped" if digest in names else "made here"
        origin = f"{kind} {digest[:12]}" if digest else made.get("weights", "random")
        lines.append(f"weights {names.get(digest, made.get('model', 'model'))}: {origin}")
    return lines


def methods(scores: xr.Dataset) -> str:
    """The methods paragraph of a probe, in full sentences."""
    a = scores.attrs
    confounds, preserve = (json.loads(a.get(k, "[]")) for k in ("confounds", "preserve"))
    named, site = "participant" in scores.coords, "site" in scores.coords
    people, n = "participants" if named else "rows", scores.sizes["fold"]
    splits = f"{n} folds that held out whole values of {a['groups']}"
    if a["protocol"] == "paper":
        splits = f"three splits of 6:2:2 stratified by {a['target']}{' and site' if site else ''}"
    elif a["split"]:
        splits = f"{n} splits that were made before"
    elif a["protocol"]:
        splits = f"{n} stratified resplits with one fifth tested"
    elif a["groups"] == "participant":
        splits = f"{n} folds over {people}"
    apart = "; no participant was on both sides of a split" if named else ""
    harmonize = a.get("harmonize")
    kept = f", keeping the effect of {listed(preserve)}" if preserve else ""
    within = " within site" if site else ""
    within += ", families whole" if "family" in scores.coords else ""
    exchanges = f"{scores.sizes.get('permutation')} exchanges of labels between {people}{within}"
    effects = f"Linear effects of {listed(confounds, 20)}, fitted in the training part,"
    tuned = "settings" in a  # by bhx.fine_tune: there are no features
    unsure = a["protocol"] == "paper" and a["task"] != "number"
    sentences = {
        f"We predicted the {a['task']} '{a['target']}' {_read_by(scores)} in {splits}{apart}.": 1,
        f"Folds were balanced over {a['stratify']}.": a["stratify"],
        "Missing features were filled with training means, and all were scaled.": not tuned,
        f"ComBat, fitted in the training part, removed {harmonize}{kept}.": harmonize,
        f"{effects} were removed.": confounds,
        f"Scores are means over folds with 95 % intervals of a bootstrap over {people}, models not "
        "refitted, widened for pairs of subjects that predict each other; models were compared by "
        "the corrected resampled t-test over folds and by a paired bootstrap over "
        f"{people}, each with Holm's adjustment.": 1,
        "Metrics of decisions have no interval: three splits are too few for one.": unsure,
        f"The null comes from {exchanges}.": "null" in scores,
    }
    return " ".join(sentence for sentence, holds in sentences.items() if holds)


def _read_by(scores):
    """Which features were read by which estimator, in words."""
    by, estimators = {}, scores.attrs["estimator"]
    estimators = scores.coords.get("estimator", np.full(scores.sizes["model"], estimators))
    for model, how in zip(scores.model.values, np.asarray(estimators), strict=True):
        by.setdefault(str(how), []).append(model)
    return ", ".join(f"from {listed(models, 20)} by {how}" for how, models in by.items())


def as_markdown(table: pd.DataFrame) -> str:
    """A table of `bhx.compare` as Markdown."""
    flat = table.reset_index()
    lines = [flat.columns, ["---"] * len(flat.columns), *flat.itertuples(index=False)]
    title = f"**{_cell(table.columns.name)}**\n\n" if table.columns.name else ""
    return title + "".join("| " + " | ".join(map(_cell, line)) + " |\n" for line in lines)


def _cell(value):
    return "" if pd.isna(value) else " ".join(str(value).replace("|", "\\|").split())


def _entered(scores):
    """From all rows to those tested, with what was left out on the way."""
    excluded, kept = json.loads(scores.attrs["excluded"]), tested(scores)
    if len(untested := np.setdiff1d(scores.subject, kept.subject)):
        excluded["tested in no split"] = untested
    out = [f"{len(ids)} out: {why} ({listed(ids, 20)})" for why, ids in excluded.items()]
    n, people = kept.sizes["subject"], len(np.unique(participants_of(kept)))
    given = f"{scores.attrs['n_rows']} rows given"
    return _list([given, *out, f"{n} rows of {people} participants tested"])


def _html(table):
    return table.to_html(border=0, na_rep="", float_format=lambda v: f"{v:.3f}")


def _list(items):
    items = list(dict.fromkeys(items))
    return "<ul>" + "".join(f"<li>{escape(i)}</li>" for i in items) + "</ul>"


def _made_by(scores):
    versions = json.loads(scores.attrs["versions"])
    parts = [f"{k} {v}" for k, v in versions.items()] + [f"seed {scores.attrs['seed']}"]
    for name, made in json.loads(scores.attrs["features"]).items():
        parts += [f"{name}: {k} {v}" for k, v in made.items() if k != "config"]
    return "; ".join(parts)


def _explained(scores):
    """What the confounds that vary explain of each prediction: a sentence and a table."""
    names = [n for n in CONFOUNDS if n in scores.coords and n != scores.attrs["target"]]
    names = [n for n in names if len(np.unique(scores[n].values)) > 1]
    if not names or scores.sizes["class"] > 2:
        return ""
    try:
        table = _html(explained_by(scores, names))
    except InputError as error:
        table = f"<p>{escape(str(error))}</p>"
    title = f"Linear share of each prediction that {listed(names, 20)} explain together."
    return f"<p>{escape(title)}</p>{table}"


# ---------------------------------------------------------------- figures


def plot_scores(table: pd.DataFrame, metric: str | None = None):
    """One metric of a table of `bhx.compare`: a dot and an interval a model, the first on top."""
    import plotly.graph_objects as go

    levels = table.index.get_level_values("metric")
    metric = metric or levels[0]
    rows = table[levels == metric].droplevel("metric")
    names = [" · ".join(map(str, np.atleast_1d(n))) for n in rows.index.to_list()]
    bars = {"array": rows.high - rows.score, "arrayminus": rows.score - rows.low, "thickness": 2}
    dots = go.Scatter(
        x=rows.score,
        y=names,
        error_x={"type": "data", "symmetric": False, **bars},
        mode="markers",
        marker={"size": 10, "color": BLUE},
        hovertemplate="%{y}: %{x:.3f}<extra></extra>",
    )
    figure = go.Figure(dots)
    if metric in table.attrs["chance"]:
        line = {"dash": "dot", "color": GRAY, "width": 1.5}
        figure.add_vline(table.attrs["chance"][metric], line=line, opacity=1)
    figure.update_xaxes(title=f"{metric.replace('_', ' ')} (mean over folds, 95 % interval)")
    figure.update_yaxes(autorange="reversed", automargin=True)
    height, title = 140 + 36 * len(names), table.columns.name
    return private(figure, template="simple_white", height=height, title=title)


def plot_calibration(*scores: xr.Dataset, bins: int = 10):
    """Predicted probability of the positive label against how often it is true."""

    def curve(one, output):
        found = metrics.calibration(codes_of(one) == one.sizes["class"] - 1, output, bins)
        line = {"x": found.predicted, "y": found.observed, "mode": "lines+markers"}
        return line, f" (error {found.attrs['error']:.2f})"

    x = f"predicted probability of {scores[0].attrs['positive']}"
    return _beside_diagonal(scores, [0, 1], curve, "Calibration", x, "observed frequency")


def plot_predictions(*scores: xr.Dataset):
    """Predicted against true numbers, one dot a subject."""

    def dots(one, output):
        marker = {"size": 6, "opacity": 0.6}
        return {"x": one.truth, "y": output, "mode": "markers", "marker": marker}, ""

    truth, target = tested(scores[0]).truth.values, scores[0].attrs["target"]
    names = "Predictions", f"true {target}", f"predicted {target}"
    return _beside_diagonal(scores, [truth.min(), truth.max()], dots, *names)


def _beside_diagonal(scores, ends, draw, title, x, y):
    """What `draw` makes of each model's outputs, beside the line of a perfect model."""
    import plotly.graph_objects as go

    line = {"dash": "dot", "color": GRAY}
    figure = go.Figure().add_scatter(x=ends, y=ends, mode="lines", line=line, name="perfect")
    for one in map(tested, scores):
        for output in pooled_output(one):
            trace, more = draw(one, output.values)
            figure.add_scatter(name=f"{output.model.item()}{more}", **trace)
    figure.update_xaxes(title=x).update_yaxes(title=y)
    return private(figure, template="simple_white", height=440, title=title)


# ---------------------------------------------------------------- tables


def tested(scores: xr.Dataset) -> xr.Dataset:
    """The same scores of the subjects that some fold tested; protocols leave some untested."""
    return scores.isel(subject=np.isfinite(scores.output.values).any((0, 1, 3)))


def pooled_output(scores: xr.Dataset) -> xr.DataArray:
    """One number a subject and model: the predicted number, or the positive label's probability,
    averaged over the folds that tested the subject."""
    return scores.output.isel({"class": -1}, drop=True).mean("fold")


def within(scores: xr.Dataset, by: str) -> pd.DataFrame:
    """Every metric inside each value of a coordinate (site, sex), and how many subjects it has.

    Predictions of all folds are taken together; a stratum of one label has no AUROC.
    """
    check_coords(scores, [by])
    scores = tested(scores)
    strata, rows = scores[by].values, []
    plan, truth = plan_of(scores), codes_of(scores)
    for i, model in enumerate(scores.model.values):
        output = np.nanmean(scores.output.values[i], 0)
        decision = metrics.majority(scores.decision.values[i], scores.sizes["class"])
        for value in np.unique(strata[~is_missing(strata)]):
            t = np.flatnonzero(strata == value)
            measured = plan.measure(truth[t], output[t], decision[t])
            row = {"model": str(model), by: value, "n": len(t)}
            rows.append(row | {k: v[0] for k, v in measured.items()})
    return pd.DataFrame(rows).set_index(["model", by]).round(3)


def explained_by(scores: xr.Dataset, confounds) -> pd.DataFrame:
    """How much of a prediction the confounds explain, and what of its skill is left without them.

    Parameters
    ----------
    scores : what `bhx.probe` returned
    confounds : name or names of coordinates on subject

    Returns
    -------
    pandas DataFrame, a row a model: `explained` (R2 of the prediction on the confounds), `r` of
    prediction and truth, and `partial_r`, the same with the confounds' linear effect taken out of
    both. Subjects without one of the confounds do not enter (`n`).
    """
    confounds = [confounds] if isinstance(confounds, str) else list(confounds)
    check_coords(scores, confounds)
    scores = tested(scores)
    design = encoded(scores.coords.to_dataset(), confounds)
    truth = codes_of(scores)
    if scores.attrs["task"] == "label":
        truth = truth == scores.sizes["class"] - 1
    known = np.isfinite(design).all(1)
    if not known.any():
        fact = f"Expected subjects with all of {listed(confounds, 20)}, found none"
        raise InputError(fact, "Leave out what is rarely known")
    rows = []
    for output in pooled_output(scores):
        both = np.column_stack([output.values[known], truth[known].astype(float)])
        rest = both - LinearRegression().fit(design[known], both).predict(design[known])
        total = both[:, 0].var()
        share = 1 - rest[:, 0].var() / total if total > 0 else np.nan
        row = {"model": str(output.model.values), "explained": share}
        rows.append(row | {"r": _r(both), "partial_r": _r(rest), "n": int(known.sum())})
    return pd.DataFrame(rows).set_index("model").round(3)


def _r(pair):
    flat = pair.std(0) <= 1e-9 * (1 + np.abs(pair).max(0))
    return 0.0 if flat.any() else float(np.corrcoef(pair.T)[0, 1])
