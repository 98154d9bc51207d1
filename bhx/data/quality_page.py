"""The page that shows a cohort's quality, the most conspicuous subjects first. Drawn by dims."""

from __future__ import annotations

import base64
import io
from html import escape
from pathlib import Path

import numpy as np
import pandas as pd
import xarray as xr
from matplotlib.figure import Figure

from bhx.data.atlas import centroids
from bhx.data.page import page
from bhx.errors import listed
from bhx.schema import check, who_has

SERIES = ("roi", "time")
LABELS = ("site", "tr", "n_volumes", "coverage", "homotopy", "mean_fd", "bold_scale", "warnings")


def quality_page(cohort: xr.Dataset, path, *, pictures: int = 12) -> Path:
    """Write one self-contained HTML page on the quality of a cohort.

    It has a table of all subjects with their warnings, the subjects that were refused, where on
    the cortex there is signal, and, for the most conspicuous subjects, a carpet plot of parcel
    series (parcels by network x time) and a mosaic of volumes. Subjects are read one by one.

    Parameters
    ----------
    cohort : from `prepare` or any other; what it lacks (coverage, motion, warnings) is left out
    path : of the .html file
    pictures : how many subjects are drawn
    """
    check(cohort, "cohort")
    table = _ranked(cohort)
    ranked = cohort.get_index("subject").get_indexer(table.index[:pictures])
    facts = {n: cohort.attrs.get(n, "") for n in ("source", "atlas", "preprocessing", "licence")}
    has = (f"{who_has(cohort, name).sum()} with {name}" for name in map(str, cohort.data_vars))
    facts["rows"] = ", ".join([str(len(table)), *has])
    facts["participants"] = len(np.unique(cohort.participant))
    facts["with warnings"] = int((table["warnings"] != "").sum())
    refused = pd.Series(cohort.attrs.get("refused", {}), dtype=object, name="reason").to_frame()
    series = [name for name, v in cohort.data_vars.items() if v.dims[1:] == SERIES]
    sections = {
        "": pd.Series(facts, dtype=object).to_frame().to_html(header=False),
        "Refused": refused.to_html() if len(refused) else "",
        "Where there is signal": "".join(_coverage(cohort, name) for name in series),
        "The most conspicuous subjects": "".join(_portrait(cohort, i) for i in ranked),
        "Every subject": table.to_html(float_format="{:.3g}".format),
    }
    body = "".join(f"<h2>{name}</h2>{text}" for name, text in sections.items() if text)
    title = f"Quality of {facts['source'] or 'a cohort'}"
    Path(path).write_text(page(title, body), encoding="utf8")
    return Path(path)


def _ranked(cohort):
    """A table of all subjects, those with most warnings and farthest from the others on top."""
    labels = {name: cohort[name].values for name in LABELS if name in cohort.coords}
    table = pd.DataFrame(
        {**labels, "warnings": labels.get("warnings", "")}, cohort.indexes["subject"]
    )
    numbers = table[[n for n in ("coverage", "homotopy", "mean_fd") if n in table]]
    spread = (numbers - numbers.median()).abs() / (numbers.quantile(0.75) - numbers.quantile(0.25))
    far = spread.replace(np.inf, np.nan).max(axis=1).fillna(0)
    many = table["warnings"].str.count(";") + (table["warnings"] != "")
    return table.iloc[np.lexsort((-far, -many))]


def _portrait(cohort, i):
    """Heading, warnings and pictures of one subject."""
    row = cohort.isel(subject=i)
    drawn = [n for n in map(str, row) if row[n].dims in PANELS and who_has(cohort, n)[i]]
    figure = Figure(figsize=(11, 2.6), layout="constrained")
    for axes, name in zip(np.atleast_1d(figure.subplots(1, len(drawn) or 1)), drawn, strict=False):
        PANELS[row[name].dims](axes, row[name], row)
    warnings = escape(str(row.warnings.values)) if "warnings" in row.coords else ""
    heading = f"<h3>{escape(str(row.subject.values))}</h3><p>{warnings}</p>"
    return heading + (_image(figure) if drawn else "")


def _carpet(axes, series, row):
    """z-scored parcels by network x time."""
    series = series.isel(time=slice(0, int(row.n_volumes)))
    series = series.sortby("network") if "network" in series.coords else series
    z = (series - series.mean("time")) / series.std("time").clip(1e-6)
    ends = (0, series.sizes["time"] * float(row.tr), len(z), 0)  # s, parcels
    axes.imshow(z, cmap="gray", vmin=-2, vmax=2, aspect="auto", extent=ends)
    axes.set(xlabel="time [s]", ylabel="parcel, by network")


def _mosaic(axes, volume, row):
    """Six axial slices, left on the left."""
    values = volume.values[::-1]
    cuts = [values[:, :, int(values.shape[2] * q)].T for q in np.linspace(0.25, 0.7, 6)]
    axes.imshow(np.hstack(cuts), cmap="gray", origin="lower")
    axes.set_axis_off()


PANELS = {SERIES: _carpet, ("x", "y", "z"): _mosaic}  # variables of other dims are not drawn


def _coverage(cohort, name):
    """Share of scans with signal in each parcel, in a glass brain."""
    series = cohort[name].isel(subject=np.flatnonzero(who_has(cohort, name)))
    share = ((series.fillna(0) != 0).any("time")).mean("subject").values
    worst = sorted(zip(share, cohort.roi.values, strict=True))[:5]
    worst = [f"{roi} {part:.0%}" for part, roi in worst if part < 1]
    text = f"<p>Parcels without signal in some scans: {escape(listed(worst)) or 'none'}.</p>"
    if "mni_x" not in cohort.coords:
        return text
    from nilearn.plotting import plot_markers  # slow to import

    figure = Figure(figsize=(11, 3.2))
    colors = {"node_vmin": 0, "node_vmax": 1, "node_cmap": "viridis", "node_size": 30}
    plot_markers(share, centroids(cohort), display_mode="lzr", figure=figure, **colors)
    return text + _image(figure)


def _image(figure):
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=80)
    text = base64.b64encode(buffer.getvalue()).decode()
    return f'<img alt="" src="data:image/png;base64,{text}">'
