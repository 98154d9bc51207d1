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
from bhx.modalities.t1 import t1_grid
from bhx.show.look import colour_bar, look_of

# the volume -------------------------------------------------------------------------------------

# across, up and through of each plane; left is left
PLANES = {"sagittal": ("y", "z", "x"), "coronal": ("x", "z", "y"), "axial": ("x", "y", "z")}


def plot_volume(
    values: xr.DataArray | None = None,
    *,
    overlay: xr.DataArray | None = None,
    at: tuple[float, float, float] = (0, -20, 10),
    n_slices: int = 15,
    cmap: str | None = None,
    limits: tuple[float, float] | None = None,
    title: str | None = None,
    static: bool = False,
):
    """Three planes of a T1, with a map of its cubes on top.

    Parameters
    ----------
    values : DataArray (x, y, z) on the T1 grid, say `cohort.t1.sel(subject=...)`; None for the
        MNI152 template
    overlay : DataArray (cx, cy, cz), say `region_map(latents, of="t1")`
    at : MNI coordinates [mm] where the planes start, or for static=True lie
    n_slices : positions on each plane's slider; slices are sent at 2 mm or coarser
    cmap, limits, title : as in `plot_surface`, of the overlay
    static : a matplotlib figure instead of a plotly one

    Returns
    -------
    plotly.graph_objects.Figure, or matplotlib.figure.Figure
    """
    t1 = template() if values is None else values
    if t1.dims != ("x", "y", "z"):
        fact = f"Expected a T1 with dims ('x', 'y', 'z'), found {t1.dims}"
        raise InputError(fact, "Select one subject: cohort.t1.sel(subject=...)")
    cubes = None if overlay is None else with_mm(overlay)
    named = (t1 if cubes is None else cubes).attrs
    title = named.get("long_name", "T1") if title is None else title
    look = look_of(np.zeros(0) if cubes is None else cubes, cmap, limits, title)
    look["units"], grey = named.get("units", ""), grey_levels(t1)
    if static:
        return _static_volume(grey, cubes, at, look)
    return _volume_figure(grey, cubes, at, n_slices, look)


def with_mm(cubes):
    """A cube map with the MNI coordinates of its cubes' centres, as dims x, y and z."""
    if cubes.dims != ("cx", "cy", "cz"):
        fact = f"Expected a cube map with dims ('cx', 'cy', 'cz'), found {cubes.dims}"
        raise InputError(fact, "Average the other dims first: region_map(latents, token, of='t1')")
    grid = zip(t1_grid().items(), cubes.shape, strict=True)
    centres = {axis: mm.reshape(n, -1).mean(1) for (axis, mm), n in grid}
    bare = cubes.drop_vars(["cx", "cy", "cz"], errors="ignore")
    return bare.rename(cx="x", cy="y", cz="z").assign_coords(centres)


@cache
def template():
    """The MNI152 template in nilearn's wheel, masked, on the T1 grid at 2 mm."""
    from nilearn.datasets import load_mni152_template
    from nilearn.image import resample_img

    grid = t1_grid(2)
    affine = np.eye(4)
    for i, mm in enumerate(grid.values()):
        affine[i, i], affine[i, 3] = mm[1] - mm[0], mm[0]
    shape = [len(mm) for mm in grid.values()]
    source = load_mni152_template(2)
    image = resample_img(source, affine, shape, force_resample=True, copy_header=True)
    return xr.DataArray(image.get_fdata(dtype=np.float32), grid, ("x", "y", "z"))


def grey_levels(t1):
    """Intensities as 0 to 255, at 2 mm or coarser, axes ascending."""
    step = abs(float(t1.x[1] - t1.x[0]))
    if step < 2:
        t1 = t1.coarsen(x=2, y=2, z=2).mean()
    t1 = t1.assign_coords({axis: t1[axis].astype(np.float32) for axis in "xyz"}).sortby([*"xyz"])
    values = np.asarray(t1.values, np.float32)
    top = np.quantile(values[values > 0], 0.995) if (values > 0).any() else 1
    return t1.copy(data=np.clip(255 * values / top, 0, 255).round().astype(np.uint8))


def _volume_figure(grey, cubes, at, n_slices, look):

    figure = make_subplots(1, 3, horizontal_spacing=0.05, subplot_titles=list(PLANES))
    sliders = []
    for column, (plane, start) in enumerate(zip(PLANES, at, strict=True), 1):
        through = PLANES[plane][2]
        where = np.linspace(0, grey.sizes[through] - 1, n_slices + 2).round().astype(int)[1:-1]
        stops = grey[through].values[where]
        shown = int(np.abs(stops - start).argmin())
        first = len(figure.data)
        for stop in stops:
            figure.add_traces(slices(grey, cubes, plane, stop, stop == stops[shown]), 1, column)
        sliders.append(_slider(figure, through, stops, shown, first, column))
        for axis in (figure.update_xaxes, figure.update_yaxes):
            axis(row=1, col=column, showgrid=False, zeroline=False, ticksuffix="")
        figure.update_yaxes(row=1, col=column, scaleanchor=f"x{column if column > 1 else ''}")
    margin = {"l": 30, "r": 10, "t": 70, "b": 90}
    figure.update_layout(sliders=sliders, height=400, margin=margin, plot_bgcolor="black")
    figure.update_layout(coloraxis=colour_bar(look) | {"showscale": cubes is not None})
    return figure.update_layout(title={"text": escape(look["title"]), "x": 0.5})


def plane_of(volume, plane: str, stop: float) -> xr.DataArray:
    """The slice of a volume (x, y, z) nearest to `stop` [mm], as (up, across)."""
    across, up, through = PLANES[plane]
    return volume.sel({through: stop}, method="nearest").transpose(up, across)


def slices(grey, cubes, plane, stop, visible=True) -> list:
    """One plane of the T1 as a heat map, and the same plane of the cube map on top."""

    across, up, through = PLANES[plane]
    mm = f"{across} %{{x:.0f}}, {up} %{{y:.0f}}, {through} {float(stop):.0f} mm"
    grey_look = {"zmin": 0, "zmax": 255, "colorscale": "Greys_r", "showscale": False}
    map_look = {"coloraxis": "coloraxis", "opacity": 0.45}
    drawn, out = [(grey, plane, mm, grey_look)], []
    if cubes is not None:
        map_name, map_hover = f"{plane} map", mm + "<br>%{z:.4g}"
        drawn.append((cubes.astype(np.float32), map_name, map_hover, map_look))
    for volume, name, hover, look in drawn:
        cut = plane_of(volume, plane, stop)
        x, y, z = cut[across].values, cut[up].values, cut.values
        trace = go.Heatmap(x=x, y=y, z=z, name=name, visible=visible, **look)
        out.append(trace.update(hovertemplate=hover + "<extra></extra>"))
    return out


def _slider(figure, through, stops, shown, first, column):
    """A slider that shows the traces of one position and hides those of the others."""
    traces = list(range(first, len(figure.data)))
    visible = np.eye(len(stops), dtype=bool).repeat(len(traces) // len(stops), axis=1).tolist()
    steps = [
        {"label": f"{stop:.0f}", "method": "restyle", "args": [{"visible": on}, traces]}
        for stop, on in zip(stops, visible, strict=True)
    ]
    place = {"x": 0.02 + (column - 1) * 0.35, "len": 0.26, "y": -0.05}
    value = {"prefix": f"{through} = ", "suffix": " mm", "font": {"color": "black"}}
    quiet = {"ticklen": 0, "minorticklen": 0, "font": {"color": "rgba(0,0,0,0)"}}
    return {"active": shown, "steps": steps, **place, "currentvalue": value, **quiet}


def _static_volume(grey, cubes, at, look):

    figure, axes = plt.subplots(1, 3, figsize=(10, 3.6), layout="constrained")
    drawn = None
    for axis, plane, stop in zip(axes, PLANES, at, strict=True):
        across, up, through = PLANES[plane]
        for volume, style in (
            (grey, {"cmap": "gray", "vmin": 0, "vmax": 255}),
            (cubes, {"cmap": look["cmap"], "clim": look["limits"], "alpha": 0.45}),
        ):
            if volume is not None:
                cut = plane_of(volume, plane, stop)
                drawn = axis.pcolormesh(cut[across], cut[up], cut, **style)
        axis.set(title=f"{through} = {stop:g} mm", xlabel=f"{across} [mm]", ylabel=f"{up} [mm]")
        axis.set_aspect("equal")
    if cubes is not None:
        figure.colorbar(drawn, ax=axes, shrink=0.8, label=look["units"])
    figure.suptitle(look["title"])
    plt.close(figure)
    return figure
