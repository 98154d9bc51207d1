"""Subjects in the latent space."""

from __future__ import annotations

from html import escape

import matplotlib.pyplot as plt
import numpy as np
import plotly.graph_objects as go
import xarray as xr

from bhx.errors import InputError, listed
from bhx.show.look import CATEGORIES, colours


def plot_latents(
    projection: xr.DataArray,
    *,
    color: str | None = None,
    components: tuple[int, int] = (1, 2),
    title: str | None = None,
    static: bool = False,
):
    """Subjects in the latent space, coloured by any of their coordinates.

    Parameters
    ----------
    projection : DataArray (subject, component) of `project`
    color : a coordinate on subject: numbers take a colour map, names a colour each
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
    names = [axis_name(projection, c) for c in components]
    title = (color or "subjects") if title is None else title
    units = projection[color].attrs.get("units") if color else None
    draw = _static_latents if static else _latents_figure
    label = f"{color} [{units}]" if units else color
    return draw(projection.sel(component=list(components)), groups, names, title, label)


def point_groups(projection, color) -> list:
    """Which points share a trace: (name, positions, colour or numbers to be mapped)."""
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


def _latents_figure(points, groups, names, title, label):

    figure = go.Figure()
    ids = np.array([escape(str(s)) for s in points.subject.values])
    for name, where, shade in groups:
        marker = {"color": shade, "size": 7, "opacity": 0.8}
        if not isinstance(shade, str):
            bar = {"title": {"text": escape(label)}, "thickness": 14}
            marker |= {"colorscale": colours("viridis"), "showscale": True, "colorbar": bar}
        x, y = points.values[where].T.astype(np.float32)
        hover = "%{text}<extra>" + escape(name) + "</extra>"
        look = {"mode": "markers", "marker": marker, "name": escape(name)}
        figure.add_scatter(x=x, y=y, text=ids[where], hovertemplate=hover, **look)
    figure.update_layout(title={"text": escape(title), "x": 0.5}, showlegend=len(groups) > 1)
    return figure.update_layout(xaxis_title=names[0], yaxis_title=names[1], height=450)


def _static_latents(points, groups, names, title, label):

    figure, axis = plt.subplots(figsize=(5.5, 4.2), layout="constrained")
    for name, where, shade in groups:
        drawn = axis.scatter(*points.values[where].T, c=shade, label=name, s=18, alpha=0.8)
        if not isinstance(shade, str):
            figure.colorbar(drawn, label=label)
    axis.set(xlabel=names[0], ylabel=names[1], title=title)
    if len(groups) > 1:
        axis.legend(frameon=False)
    plt.close(figure)
    return figure
