"""Subjects in the latent space."""

from __future__ import annotations

from html import escape

import matplotlib.pyplot as plt
import numpy as np
import plotly.graph_objects as go
import xarray as xr

from bhx.errors import InputError, listed
from bhx.show.colors import CATEGORIES, finish, finish_static, plotly_colors


def plot_latents(
    projection: xr.DataArray,
    *,
    color: str | None = None,
    components: tuple[int, int] = (1, 2),
    title: str | None = None,
    static: bool = False,
):
    """Subjects in the latent space, colored by any of their coordinates.

    Parameters
    ----------
    projection : DataArray (subject, component) of `project`
    color : a coordinate on subject: numbers take a color map, names a color each
    components : which two are drawn
    """
    if getattr(projection, "dims", None) != ("subject", "component"):
        raise InputError(
            f"Expected a projection (subject, component), found {type(projection).__name__} with "
            f"{getattr(projection, 'dims', 'no dims')}",
            "Make it with bhx.project(latents)",
        )
    if color is not None and color not in projection.coords:
        fact = f"Expected color among {listed(projection.coords, 12)}, found '{color}'"
        raise InputError(fact, "Choose one of the subjects' coordinates")
    groups = point_groups(projection, color)
    title = (color or "subjects") if title is None else title
    units = projection[color].attrs.get("units") if color else None
    label = f"{color} [{units}]" if units else color
    axes = [axis_name(projection, c) for c in components]
    points = projection.sel(component=list(components))
    draw = _static_latents if static else _latents_figure
    return draw(points, groups, axes, title, label)


def point_groups(projection, color) -> list:
    """Which points share a trace: (name, positions, color or numbers to be mapped)."""
    if color is None:
        return [("", np.arange(projection.sizes["subject"]), CATEGORIES[0])]
    values = projection[color].values
    if values.dtype.kind in "fiu" and len(np.unique(values)) > len(CATEGORIES):
        return [("", np.arange(len(values)), values)]
    names, group = np.unique([str(v) for v in values.tolist()], return_inverse=True)
    return [
        (name, np.flatnonzero(group == i), CATEGORIES[i % len(CATEGORIES)])
        for i, name in enumerate(names.tolist())
    ]


def axis_name(projection, component):
    """A component's name, with the variance that it explains."""
    name = f"{projection.attrs.get('long_name', 'component')} {component}"
    if "explained" in projection.coords:
        name += f" ({100 * float(projection.explained.sel(component=component)):.0f} %)"
    return name


def dots(points, where, color, name="") -> go.Scatter:
    """Some of the subjects as one trace that names each under the mouse."""
    x, y = points.values[where].T.astype(np.float32)
    ids = [escape(str(s)) for s in points.subject.values[where]]
    trace = go.Scatter(x=x, y=y, text=ids, mode="markers", name=escape(name))
    trace.hovertemplate = "%{text}<extra>" + escape(name) + "</extra>"
    return trace.update(marker={"color": color, "size": 7, "colorscale": plotly_colors("viridis")})


def _latents_figure(points, groups, axes, title, label):
    figure = go.Figure([dots(points, where, color, name) for name, where, color in groups])
    figure.update_traces(marker_opacity=0.8)
    if not isinstance(groups[0][2], str):
        bar = {"title": {"text": escape(label)}, "thickness": 14}
        figure.update_traces(marker={"showscale": True, "colorbar": bar})
    figure.update_layout(xaxis_title=axes[0], yaxis_title=axes[1], height=450)
    return finish(figure, title, showlegend=len(groups) > 1)


def _static_latents(points, groups, axes, title, label):
    figure, axis = plt.subplots(figsize=(5.5, 4.2), layout="constrained")
    for name, where, color in groups:
        drawn = axis.scatter(*points.values[where].T, c=color, label=name, s=18, alpha=0.8)
    if not isinstance(groups[0][2], str):
        figure.colorbar(drawn, label=label)
    axis.set(xlabel=axes[0], ylabel=axes[1])
    if len(groups) > 1:
        axis.legend(frameon=False)
    return finish_static(figure, title)
