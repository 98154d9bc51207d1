"""Subjects in the latent space."""

from __future__ import annotations

from html import escape

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import xarray as xr

from bhx.errors import InputError, check_choice
from bhx.schema import is_missing, subject_coords
from bhx.show.colors import CATEGORIES, SHAPES, finish, plotly_colors

MANY = 2000  # people; more are drawn by the graphics processor


def plot_latents(
    projection: xr.DataArray, *, color: str | None = None, title: str | None = None
) -> go.Figure:
    """Subjects in the first two dimensions of the latent space, colored by a coordinate.

    Parameters
    ----------
    projection : DataArray (subject, component) of `project`
    color : a coordinate on subject: numbers take a color map, names a color each
    """
    dims = getattr(projection, "dims", "no dims")
    if dims != ("subject", "component"):
        fact = f"Expected a projection with dims ('subject', 'component'), found {dims}"
        raise InputError(fact, "Make it with bhx.project(latents)")
    if color is not None:
        check_choice("color", color, subject_coords(projection))
    groups = point_groups(projection, color)
    title = (color or "subjects") if title is None else title
    units = projection[color].attrs.get("units") if color else None
    traces = [dots(projection, *group) for group in groups]
    figure = go.Figure(traces).update_traces(marker_opacity=0.8)
    if not isinstance(groups[0][2], str):
        named = escape(f"{color} [{units}]" if units else str(color))
        bar = {"title": {"text": named, "side": "right"}, "thickness": 12, "outlinewidth": 0}
        figure.update_traces(marker={"showscale": True, "colorbar": bar})
        figure.data[0].hovertemplate = f"%{{text}}<br>{named} %{{marker.color:.4g}}<extra></extra>"
    x, y = axis_name(projection, 1), axis_name(projection, 2)
    figure.update_layout(xaxis_title=x, yaxis_title=y, height=450)
    return finish(figure, title, showlegend=len(groups) > 1)


def point_groups(projection, color) -> list:
    """Which points share a trace: (name, positions, color or numbers to be mapped, shape)."""
    everyone = np.arange(projection.sizes["subject"])
    if color is None:
        return [("", everyone, CATEGORIES[0], "circle")]
    values = projection[color].values
    if values.dtype.kind in "fiu" and len(np.unique(values)) > len(CATEGORIES):
        return [("", everyone, values, "circle")]
    names, group = np.unique([str(v) for v in values.tolist()], return_inverse=True)
    looks = [(color, shape) for shape in SHAPES for color in CATEGORIES]
    return [
        (name, np.flatnonzero(group == i), *looks[i % len(looks)])
        for i, name in enumerate(names.tolist())
    ]


def binned(values, most: int = 8) -> tuple[list[str], np.ndarray]:
    """A label's bars: their names, and the number of each person's bar (subject)."""
    missing = is_missing(values)
    known = pd.Series(values).where(~missing)
    if values.dtype.kind in "fiu" and known.nunique() > most:
        cut = pd.cut(known.astype(float), most)
        names, at = [f"{i.left:.3g} to {i.right:.3g}" for i in cut.cat.categories], cut.cat.codes
    else:
        kinds = sorted(known.value_counts().index[:most])
        names = [f"{kind:.4g}" if isinstance(kind, float) else str(kind) for kind in kinds]
        at = pd.Index(kinds).get_indexer(known)
    if (at < 0).any():
        names = [*names, "missing" if missing[at < 0].all() else "others"]
    return names, np.where(at < 0, len(names) - 1, at)


def axis_name(projection, component):
    """A component's name, with the variance that it explains."""
    name = f"{projection.attrs.get('long_name', 'component')} {component}"
    if "explained" in projection.coords:
        name += f" ({100 * float(projection.explained.sel(component=component)):.0f} %)"
    return name


def dots(points, name, where, color, shape) -> go.Scatter | go.Scattergl:
    """Some of the subjects as one trace that names each under the mouse."""
    x, y = points.values[where, :2].T.astype(np.float32)
    ids = [escape(str(s)) for s in points.subject.values[where]]
    kind = go.Scatter if points.sizes["subject"] <= MANY else go.Scattergl
    trace = kind(x=x, y=y, text=ids, mode="markers", name=escape(name))
    trace.hovertemplate = "%{text}<extra>" + escape(name) + "</extra>"
    look = {"color": color, "symbol": shape, "colorscale": plotly_colors("viridis")}
    return trace.update(marker=look | {"size": 7})
