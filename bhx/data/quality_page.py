"""The page that shows a cohort's quality, the odd subjects first."""

from __future__ import annotations

import base64
import io
from html import escape
from pathlib import Path

import numpy as np
import pandas as pd
import xarray as xr
from matplotlib.figure import Figure

from bhx.errors import listed
from bhx.schema import check

# --- the page -------------------------------------------------------------------------------------


def quality_page(cohort: xr.Dataset, path, *, pictures: int = 12) -> Path:
    """Write one self-contained HTML page on the quality of a cohort, the odd subjects first.

    It has a table of all subjects with their warnings, the subjects that were refused, where on
    the cortex there is signal, and, for the first few subjects, a carpet plot (parcels by network
    x time) and a mosaic of the T1. Subjects are read one after another.

    Parameters
    ----------
    cohort : from `prepare` or any other; what it lacks (coverage, motion, warnings) is left out
    path : of the .html file
    pictures : how many subjects are drawn
    """
    check(cohort, "cohort")
    table = _rank(cohort)
    shown = [_portrait(cohort.sel(subject=subject)) for subject in table.index[:pictures]]
    has = [int(cohort[f"has_{name}"].sum()) for name in ("bold", "t1")]
    facts = {
        "rows": f"{len(table)}, {has[0]} with BOLD, {has[1]} with T1",
        "participants": len(np.unique(cohort.participant)),
        "with warnings": int((table["warnings"] != "").sum()),
    }
    told = ("source", "atlas", "preprocessing", "licence")
    facts = {name: cohort.attrs.get(name, "") for name in told} | facts
    refused = pd.Series(cohort.attrs.get("refused", {}), dtype=object, name="reason").to_frame()
    sections = [
        f"<h1>Quality of {escape(str(facts['source']) or 'a cohort')}</h1>",
        pd.Series(facts, dtype=object).to_frame().to_html(header=False, escape=True),
        "<h2>Refused</h2>" + refused.to_html(escape=True) if len(refused) else "",
        "<h2>Where there is signal</h2>" + _coverage_figure(cohort) if "bold" in cohort else "",
        "<h2>The odd ones first</h2>" + "".join(shown),
        "<h2>Every subject</h2>" + table.to_html(escape=True, float_format="{:.3g}".format),
    ]
    style = "body{font:15px sans-serif;max-width:70em;margin:2em auto;padding:0 1em}"
    style += "table{border-collapse:collapse}td,th{border:1px solid #ccc;padding:.2em .5em;"
    style += "text-align:left;font-weight:normal}img{max-width:100%}"
    head = f"<meta charset=utf-8><title>Quality of a cohort</title><style>{style}</style>"
    path = Path(path)
    path.write_text(f"<!doctype html>{head}{''.join(sections)}", encoding="utf8")
    return path


def _rank(cohort):
    """A table of all subjects, those with most warnings and farthest from the others on top."""
    names = ("site", "tr", "n_volumes", "coverage", "homotopy", "mean_fd", "bold_scale", "warnings")
    table = pd.DataFrame(
        {name: cohort[name].values for name in names if name in cohort.coords},
        index=pd.Index(cohort.subject.values, name="subject"),
    )
    if "warnings" not in table:
        table["warnings"] = ""
    numbers = table[[n for n in ("coverage", "homotopy", "mean_fd") if n in table]]
    spread = (numbers - numbers.median()).abs() / (numbers.quantile(0.75) - numbers.quantile(0.25))
    far = spread.replace(np.inf, np.nan).max(axis=1).fillna(0)
    many = table["warnings"].str.count(";") + (table["warnings"] != "")
    order = pd.DataFrame({"many": -many, "far": -far}).sort_values(["many", "far"], kind="stable")
    return table.loc[order.index]


def _portrait(row):
    """Heading, warnings, carpet plot and T1 mosaic of one subject."""

    panels = [name for name in ("bold", "t1") if name in row and row[f"has_{name}"]]
    figure = Figure(figsize=(11, 2.6), layout="constrained")
    for axes, name in zip(np.atleast_1d(figure.subplots(1, len(panels))), panels, strict=True):
        if name == "bold":
            bold = row.bold.isel(time=slice(0, int(row.n_volumes)))
            bold = bold.sortby("network") if "network" in bold.coords else bold
            z = (bold - bold.mean("time")) / bold.std("time").clip(1e-6)
            ends = (0, bold.sizes["time"] * float(row.tr), len(z), 0)  # s, parcels
            axes.imshow(z, cmap="gray", vmin=-2, vmax=2, aspect="auto", extent=ends)
            axes.set(xlabel="time [s]", ylabel="parcel, by network")
        else:
            t1 = row.t1.values[::-1]  # left on the left
            cuts = [t1[:, :, int(t1.shape[2] * q)].T for q in np.linspace(0.25, 0.7, 6)]
            axes.imshow(np.hstack(cuts), cmap="gray", origin="lower")
            axes.set_axis_off()
    warnings = escape(str(row.warnings.values)) if "warnings" in row.coords else ""
    return f"<h3>{escape(str(row.subject.values))}</h3><p>{warnings}</p>{_image(figure)}"


def _coverage_figure(cohort):
    """Share of scans with signal in each parcel, drawn at the parcels' centroids."""

    bold = cohort.bold.isel(subject=np.flatnonzero(cohort.has_bold.values))
    share = ((bold.fillna(0) != 0).any("time")).mean("subject").values
    worst = sorted(zip(share, cohort.roi.values, strict=True))[:5]
    worst = [f"{name} {part:.0%}" for part, name in worst if part < 1]
    text = f"<p>Parcels without signal in some scans: {escape(listed(worst)) or 'none'}.</p>"
    if "mni_x" not in cohort.coords:
        return text
    x, y, z = (cohort[f"mni_{axis}"].values for axis in "xyz")
    views = {"the left": (-y, z, x < 0), "above": (x, y, x == x), "the right": (y, z, x > 0)}
    figure = Figure(figsize=(11, 3.2), layout="constrained")
    panels = figure.subplots(1, 3)
    look = {"vmin": 0, "vmax": 1, "cmap": "viridis", "s": 30}
    for axes, (name, (across, up, seen)) in zip(panels, views.items(), strict=True):
        dots = axes.scatter(across[seen], up[seen], c=share[seen], **look)
        axes.set(title=f"from {name}", aspect="equal")
        axes.set_axis_off()
    figure.colorbar(dots, ax=panels, label="share of scans with signal")
    return text + _image(figure)


def _image(figure):
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=80)
    text = base64.b64encode(buffer.getvalue()).decode()
    return f'<img alt="" src="data:image/png;base64,{text}">'
