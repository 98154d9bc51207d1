"""Slices of a T1, with a map of its cubes on top."""

from __future__ import annotations

from functools import cache
from html import escape

import matplotlib.pyplot as plt
import numpy as np
import plotly.graph_objects as go
import xarray as xr
from plotly.subplots import make_subplots

from bhx.errors import InputError
from bhx.modalities.t1 import CUBE_DIMS, T1_SHAPE, t1_grid
from bhx.show.colors import Scale, finish, finish_static

# across, up and through of each plane; left is left
PLANES = {"sagittal": ("y", "z", "x"), "coronal": ("x", "z", "y"), "axial": ("x", "y", "z")}
SIDES = {"x": "LR", "y": "PA"}  # what stands at the two ends of an axis
STOPS = 15  # positions on each plane's slider


def plot_volume(
    values: xr.DataArray | None = None,
    *,
    overlay: xr.DataArray | None = None,
    at: tuple[float, float, float] = (0, -20, 10),
    cmap: str | None = None,
    limits: tuple[float, float] | None = None,
    title: str | None = None,
    static: bool = False,
):
    """Three planes of a T1, with a map of its cubes on top.

    Parameters
    ----------
    values : DataArray (x, y, z) on the T1 grid, one subject's; None for the MNI152 template
    overlay : DataArray (cx, cy, cz), such as a `region_map` over cubes
    at : MNI coordinates [mm] where the planes start, or for static=True lie
    cmap, limits, title : as in `plot_surface`, of the overlay
    static : a matplotlib figure instead of a plotly one

    Returns
    -------
    plotly.graph_objects.Figure, or matplotlib.figure.Figure
    """
    t1 = template() if values is None else values
    if t1.dims != ("x", "y", "z"):
        fact = f"Expected a volume with dims ('x', 'y', 'z'), found {t1.dims}"
        raise InputError(fact, "Select one subject: volumes.sel(subject=...)")
    cubes = None if overlay is None else with_mm(overlay)
    shown = t1 if cubes is None else cubes
    title = shown.attrs.get("long_name", "T1") if title is None else title
    scale = Scale.of([] if cubes is None else cubes, cmap=cmap, limits=limits, title=title)
    gray = gray_levels(t1)
    return (_static_volume if static else _volume_figure)(gray, cubes, at, scale)


def with_mm(cubes):
    """A cube map with the MNI coordinates of its cubes' centers, as dims x, y and z."""
    if cubes.dims != CUBE_DIMS:
        fact = f"Expected a cube map with dims {CUBE_DIMS}, found {cubes.dims}"
        raise InputError(fact, "Average the other dims first, as bhx.region_map does")
    grid = t1_grid(T1_SHAPE[0] / cubes.sizes["cx"])  # a cube as one large voxel
    return xr.DataArray(cubes.values, grid, tuple(grid), attrs=cubes.attrs)


@cache
def template():
    """The MNI152 template in nilearn's wheel, masked, on the T1 grid at 2 mm."""
    from bhx.data.anatomy import read_template_t1

    whole = xr.DataArray(read_template_t1(), t1_grid(1), ("x", "y", "z"))
    return whole.coarsen(x=2, y=2, z=2).mean()


def gray_levels(t1):
    """Intensities as 0 to 255, at 2 mm or coarser, axes ascending."""
    if abs(float(t1.x[1] - t1.x[0])) < 2:
        t1 = t1.coarsen(x=2, y=2, z=2).mean()
    t1 = t1.assign_coords({axis: t1[axis].astype(np.float32) for axis in "xyz"}).sortby([*"xyz"])
    values = np.asarray(t1.values, np.float32)
    top = np.quantile(values[values > 0], 0.995) if (values > 0).any() else 1
    return t1.copy(data=np.clip(255 * values / top, 0, 255).round().astype(np.uint8))


def plane_of(volume, plane: str, stop: float) -> xr.DataArray:
    """The slice of a volume (x, y, z) nearest to `stop` [mm], as (up, across)."""
    across, up, through = PLANES[plane]
    return volume.sel({through: stop}, method="nearest").transpose(up, across)


def slices(gray, cubes, plane, stop, visible=True) -> list:
    """One plane of the T1 as a heat map, and the same plane of the cube map on top."""
    across, up, through = PLANES[plane]
    mm = f"{across} %{{x:.0f}}, {up} %{{y:.0f}}, {through} {float(stop):.0f} mm"
    cut = plane_of(gray, plane, stop)
    drawn = [go.Heatmap(z=cut.values, name=plane, zmin=0, zmax=255, colorscale="Greys_r")]
    drawn[0].update(x=cut[across].values, y=cut[up].values, showscale=False)
    drawn[0].hovertemplate = mm + "<extra></extra>"
    if cubes is not None:
        cut = plane_of(cubes.astype(np.float32), plane, stop)
        over = go.Heatmap(z=cut.values, name=f"{plane} map", coloraxis="coloraxis")
        over.update(x=cut[across].values, y=cut[up].values)
        units = escape(cubes.attrs.get("units", ""))
        over.hovertemplate = mm + f"<br>%{{z:.3g}} {units}<extra></extra>"
        drawn.append(over)
    return [trace.update(visible=bool(visible)) for trace in drawn]


def _volume_figure(gray, cubes, at, scale):
    figure, sliders = three_planes(), []
    for column, (plane, start) in enumerate(zip(PLANES, at, strict=True), 1):
        through = PLANES[plane][2]
        where = np.linspace(0, gray.sizes[through] - 1, STOPS + 2).round().astype(int)[1:-1]
        stops = gray[through].values[where]
        shown = int(np.abs(stops - start).argmin())
        traces = [slices(gray, cubes, plane, s, s == stops[shown]) for s in stops]
        sliders.append(_slider(through, stops, shown, column, len(figure.data), len(traces[0])))
        figure.add_traces([trace for both in traces for trace in both], 1, column)
    margin = {"l": 10, "r": 10, "t": 70, "b": 90}
    figure.update_layout(sliders=sliders, height=400, margin=margin)
    axis = scale.color_axis(faded=True) | {"showscale": cubes is not None}
    return finish(figure, scale.title, coloraxis=axis)


def three_planes():
    """An empty figure of the planes in one row, millimeters alike in both directions, with the
    letters of their sides: left and right, or posterior and anterior."""
    figure = make_subplots(1, 3, horizontal_spacing=0.02, subplot_titles=list(PLANES))
    figure.update_xaxes(visible=False, constrain="domain")
    figure.update_yaxes(visible=False, constrain="domain")
    for column, (across, *_) in enumerate(PLANES.values(), 1):
        for letter, x in zip(SIDES[across], ("left", "right"), strict=True):
            place = {"x": float(x == "right"), "xanchor": x, "y": 1, "yanchor": "top"}
            place |= {"xref": "x domain", "yref": "y domain", "font": {"color": "#ccc"}}
            figure.add_annotation(place, text=letter, showarrow=False, row=1, col=column)
        figure.update_yaxes(col=column, scaleanchor=f"x{column if column > 1 else ''}")
    return figure


def _slider(through, stops, shown, column, first, layers):
    """A slider that shows the traces of one position and hides those of the others."""
    traces = list(range(first, first + len(stops) * layers))
    visible = np.eye(len(stops), dtype=bool).repeat(layers, axis=1).tolist()
    steps = [
        {"label": f"{stop:.0f}", "method": "restyle", "args": [{"visible": on}, traces]}
        for stop, on in zip(stops, visible, strict=True)
    ]
    value = {"prefix": f"{through} = ", "suffix": " mm", "font": {"color": "black"}}
    out = {"active": shown, "steps": steps, "currentvalue": value}
    out |= {"x": 0.02 + (column - 1) * 0.35, "len": 0.26, "y": -0.05}
    return out | {"ticklen": 0, "minorticklen": 0, "font": {"color": "rgba(0,0,0,0)"}}


def _static_volume(gray, cubes, at, scale):
    figure, axes = plt.subplots(1, 3, figsize=(10, 3.6), layout="constrained")
    for axis, plane, stop in zip(axes, PLANES, at, strict=True):
        across, up, through = PLANES[plane]
        cut = plane_of(gray, plane, stop)
        axis.pcolormesh(cut[across], cut[up], cut, cmap="gray", vmin=0, vmax=255)
        if cubes is not None:
            cut, norm = plane_of(cubes, plane, stop), plt.Normalize(*scale.limits)
            axis.pcolormesh(cut[across], cut[up], cut, cmap=scale.fade(), norm=norm)
        title, (low, high) = f"{plane}, {through} = {stop:g} mm", SIDES[across]
        axis.set(title=title, xlabel=f"{low}   {across} [mm]   {high}", ylabel=f"{up} [mm]")
        axis.set_aspect("equal")
    if cubes is not None:
        figure.colorbar(scale.mappable(faded=True), ax=axes, shrink=0.8, label=scale.units)
    return finish_static(figure, scale.title)
