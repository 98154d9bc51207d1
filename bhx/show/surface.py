"""A value per parcel or vertex on the cortex.

This room turns labeled arrays into plotly figures, or with `static=True` into matplotlib ones
for papers. No statistics are computed, nothing is stored, and no figure listens to a click.

Left is left: brains are seen from the top with the nose up, slices in neurological convention.
"""

from __future__ import annotations

from html import escape
from itertools import product

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import plotly.graph_objects as go
import xarray as xr

from bhx.data.atlas import (
    N_FSAVERAGE5,
    aliases,
    centroids,
    known_atlases,
    load_atlas,
    load_mesh,
    load_sulc,
    places_of,
)
from bhx.errors import InputError, check_choice, listed
from bhx.show.colors import CLEAR, Scale, finish, finish_static

VERTEX = "vertex_fsaverage5"
PICKED = "magenta"  # seen on every color map
SIDES = {"both": ("left", "right"), "left": ("left",), "right": ("right",)}
# eye, up, and the sides that are shown; x runs to the right, y to the front, z up
VIEWS = {
    "top": ((0, 0, 1), (0, 1, 0), "both"),
    "left lateral": ((-1, 0, 0), (0, 0, 1), "left"),
    "left medial": ((1, 0, 0), (0, 0, 1), "left"),
    "right medial": ((-1, 0, 0), (0, 0, 1), "right"),
    "right lateral": ((1, 0, 0), (0, 0, 1), "right"),
}
LIGHT = {"ambient": 0.8, "diffuse": 0.35, "specular": 0.05, "roughness": 0.9, "fresnel": 0.05}
LIGHT_FROM = {"x": 0, "y": 0, "z": -1e5}  # from behind the reader: both hemispheres are lit alike


def plot_surface(
    values,
    *,
    atlas=None,
    hemi: str = "both",
    cmap: str | None = None,
    limits: tuple[float, float] | None = None,
    outlines: bool = False,
    title: str | None = None,
    static: bool = False,
):
    """Draw one value per parcel or vertex on fsaverage5, inflated.

    Parameters
    ----------
    values : DataArray on roi (aligned by parcel name; parcels that are absent stay gray), or
        values of the 20,484 vertices (left first); where they are NaN nothing is drawn
    atlas : of the parcels (see `bhx.load_atlas`); by default found by their names. Its regions off
        the cortex are drawn as dots behind the brain, static ones in a row of their own
    hemi : "both", "left" or "right"
    cmap : a matplotlib color map; by default a sequential one, or where values have both signs a
        diverging one, both safe for color-blind readers
    limits : values at the ends of the color map; by default the extremes, symmetric around 0 for
        values of both signs
    outlines : draw the borders of the seven networks
    static : a matplotlib figure with the four standard views instead of a plotly one

    Returns
    -------
    plotly.graph_objects.Figure, or matplotlib.figure.Figure
    """
    check_choice("hemi", hemi, SIDES)
    brain, dots = on_vertices(values, atlas), off_cortex(values, atlas)
    every = xr.DataArray(np.append(brain.values, dots.value.astype("f4")), attrs=brain.attrs)
    scale = Scale.of(every, cmap=cmap, limits=limits, title=title)
    draw = _static_surface if static else _surface_figure
    return draw(brain, hemi, scale, outlines, dots)


def on_vertices(values, atlas=None) -> xr.DataArray:
    """Values of parcels carried to the 20,484 vertices of fsaverage5, NaN where there is no parcel.

    Returns
    -------
    DataArray (vertex_fsaverage5) of float32 with the coordinates `parcel`, `network` and `hemi`
    """
    by_roi = isinstance(values, xr.DataArray) and values.dims == ("roi",)
    if not by_roi and np.shape(values) != (2 * N_FSAVERAGE5,):
        found = values.dims if isinstance(values, xr.DataArray) else np.shape(values)
        fact = f"Expected one value per parcel (dim 'roi') or {2 * N_FSAVERAGE5} vertices of "
        fact += f"fsaverage5, found {found}"
        raise InputError(fact, "Select or average the other dims first")
    atlas, per_parcel = _in_order(values, atlas) if by_roi else (load_atlas(), None)
    parcel = places_of(atlas, "labels_fsaverage5")  # or -1
    per_vertex = np.asarray(values) if per_parcel is None else np.append(per_parcel, np.nan)[parcel]
    coords = {
        "parcel": (VERTEX, np.append(atlas.roi.values, "")[parcel]),
        "network": (VERTEX, np.append(atlas.network.values, "")[parcel]),
        "hemi": (VERTEX, np.repeat(SIDES["both"], N_FSAVERAGE5)),
    }
    attrs = getattr(values, "attrs", {})
    return xr.DataArray(per_vertex.astype(np.float32), coords, [VERTEX], attrs=attrs)


def off_cortex(values, atlas=None) -> pd.DataFrame:
    """Regions without a vertex that have a value and a place: name, side, x, y, z [mm], value."""
    columns = ["name", "side", "x", "y", "z", "value"]
    if not isinstance(values, xr.DataArray) or values.dims != ("roi",):
        return pd.DataFrame(columns=columns)
    atlas, per_parcel = _in_order(values, atlas)
    x, y, z = centroids(atlas).T
    side = np.where(x < 0, "left", "right")
    found = zip(atlas.roi.values, side, x, y, z, per_parcel.values, strict=True)
    there = atlas.vertices.values == 0 if "vertices" in atlas.coords else np.zeros(len(x), bool)
    return pd.DataFrame(found, columns=columns)[there].dropna()


def _in_order(values, atlas=None):
    """The atlas whose parcels these are, by name and place, and their values in its order."""
    names = {str(n) for n in values.roi.values} if "roi" in values.coords else {"unnamed parcels"}
    candidates = known_atlases() if atlas is None else [load_atlas(atlas)]
    candidates.sort(key=lambda one: one.sizes["roi"] != len(names))  # all of one before some
    by_name = []
    for one in candidates:
        known = aliases(one)
        if names <= known.keys() and len(names) <= one.sizes["roi"]:
            own = values.to_series().rename(known)
            by_name.append((one, own.reindex(one.roi.values)))
            if "mni_x" in values.coords:
                apart = centroids(values) - centroids(one.sel(roi=own.index))
                if np.nanmax(np.abs(apart), initial=0) > 1:  # mm: another atlas with such names?
                    continue
            return by_name[-1]
    if by_name:  # none is at these places: names decide
        return by_name[0]
    found = listed(sorted(names - known.keys()) or names, 3)
    fact = f"Expected parcel names of {listed(a.attrs['atlas'] for a in candidates)}, found {found}"
    raise InputError(fact, "Name them as bhx.load_atlas(name).roi does, or give their atlas=")


# the cortex -------------------------------------------------------------------------------------


def _surface_figure(brain, hemi, scale, outlines, dots):
    sides = SIDES[hemi]
    placed = {side: _placed(side, sides) for side in sides}
    traces = [t for side in sides for t in _hemisphere(brain, side, *placed[side])]
    if outlines:
        traces += [_outline(brain, side, *placed[side]) for side in sides]
    front = min(coords[:, 1].min() for coords, _ in placed.values())
    apart = [_dots(here, side, front) for side, here in dots.groupby("side") if side in sides]
    traces += apart
    figure = go.Figure(traces)
    figure.update_scenes(
        {f"{axis}axis": {"visible": False, "showspikes": False} for axis in "xyz"},
        annotations=[_letter(side, coords) for side, (coords, _) in placed.items()],
        aspectmode="manual",
        aspectratio=_extent(
            [coords for coords, _ in placed.values()]
            + [np.stack([dot.x, dot.y, dot.z], 1) for dot in apart]
        ),
        camera=camera("top" if hemi == "both" else f"{hemi} lateral"),
    )
    buttons = []
    for name, (_, _, shown) in VIEWS.items():
        seen = {"visible": [trace.name.split()[0] in SIDES[shown] for trace in traces]}
        view = {f"scene.annotations[{i}].visible": s in SIDES[shown] for i, s in enumerate(sides)}
        view["scene.camera"] = camera(name)
        if set(SIDES[shown]) & set(sides):
            buttons.append({"label": name, "method": "update", "args": [seen, view]})
    menu = {"type": "buttons", "direction": "right", "buttons": buttons, "active": -1}
    menu |= {"x": 0.5, "xanchor": "center", "y": 0, "yanchor": "top", "bgcolor": CLEAR}
    figure.update_layout(updatemenus=[menu], showlegend=False)
    margin = {"l": 0, "r": 0, "t": 40, "b": 50}
    return finish(figure, scale.title, coloraxis=scale.color_axis(), margin=margin)


def _dots(here, side, front):
    """Regions off the cortex, seen through no brain: behind it, as they lie to one another."""
    y = here.y - here.y.max() + front - 15
    trace = go.Scatter3d(x=here.x, y=y, z=here.z, mode="markers", name=f"{side} off the cortex")
    marker = {"color": here.value, "coloraxis": "coloraxis", "size": 9, "line": {"width": 1}}
    hover = f"%{{text}}<br>%{{marker.color:.4g}}<extra>{side}</extra>"
    return trace.update(marker=marker, text=[escape(n) for n in here.name], hovertemplate=hover)


def _hemisphere(brain, side, coords, faces):
    """One hemisphere as two meshes: the part with values, and the rest in gray by sulcal depth."""
    here = brain[brain.hemi == side]
    known = np.isfinite(here.values)[faces].all(axis=1)
    for part, kept in (("values", known), ("gray", ~known)):
        vertices, corner = np.unique(faces[kept], return_inverse=True)
        i, j, k = corner.reshape(-1, 3).astype(np.uint16).T
        x, y, z = coords[vertices].T
        trace = go.Mesh3d(x=x, y=y, z=z, i=i, j=j, k=k, name=f"{side} {part}", showscale=False)
        trace.update(lighting=LIGHT, lightposition=LIGHT_FROM)
        if part == "values":
            shared, short = _short_names(here.parcel.values[vertices])
            units = escape(brain.attrs.get("units", ""))
            hover = f"{shared}%{{text}}<br>%{{intensity:.3g}} {units}<extra>{side}</extra>"
            trace.update(coloraxis="coloraxis", text=short, hovertemplate=hover)
            trace.intensity = here.values[vertices]
        else:
            grays = [[0, "rgb(205,205,205)"], [1, "rgb(130,130,130)"]]
            trace.update(colorscale=grays, cmin=-1.5, cmax=1.5, hoverinfo="skip")
            trace.intensity = load_sulc(side)[vertices].round(2)
        yield trace


def _short_names(names):
    """What all names share at their start, and the rest of each: names are repeated per vertex."""
    known = sorted(set(names.tolist()) - {""})
    shared = "_".join(known[0].split("_")[:2]) + "_" if known else ""
    shared = shared if all(name.startswith(shared) for name in known) else ""
    return escape(shared), [escape(n.removeprefix(shared)) or "no parcel" for n in names.tolist()]


def _placed(side, sides):
    """A hemisphere's mesh, beside the other one where both are drawn."""
    coords, faces = load_mesh("inflated", side)
    if len(sides) == 2:
        x = coords[:, 0]
        coords = coords - np.array([x.max() + 4 if side == "left" else x.min() - 4, 0, 0], "f4")
    return coords, faces


def _letter(side, coords):
    """L or R over the front of a hemisphere, from whichever side it is seen."""
    x, (y, z) = np.median(coords[:, 0]), coords[:, 1:].max(axis=0)
    place = dict(zip("xyz", map(float, (x, y, z)), strict=True))
    return place | {"text": f"<b>{side[0].upper()}</b>", "showarrow": False, "yshift": 8}


def _extent(placed):
    """Lengths of the scene's axes, so that the brain fills a figure that is wider than high."""
    size = np.ptp(np.concatenate(placed), axis=0)
    size = size * min(2.6 / size[0], 1.8 / size[1:].max())
    return dict(zip("xyz", size.round(3).tolist(), strict=True))


def camera(view: str) -> dict:
    """A plotly camera for one of the standard views, without perspective."""
    eye, up, _ = VIEWS[view]
    return {
        "eye": dict(zip("xyz", (1.6 * e for e in eye), strict=True)),
        "up": dict(zip("xyz", up, strict=True)),
        "center": {"x": 0, "y": 0, "z": 0},
        "projection": {"type": "orthographic"},
    }


def around(brain, some) -> dict[str, np.ndarray]:
    """A line (xyz, point) on each hemisphere around the vertices that have some of the values of
    `on_vertices`, where both hemispheres are drawn."""
    inside, sides = np.isin(brain.values, some), SIDES["both"]
    return {s: _line(_borders(inside[brain.hemi.values == s], *_placed(s, sides))) for s in sides}


def with_edges(figure):
    """A cortex with a line on each hemisphere that its buttons show and hide with it."""
    names, edges = [trace.name for trace in figure.data], SIDES["both"]
    for button in figure.layout.updatemenus[0].buttons:
        seen, view = button.args
        more = [seen["visible"][names.index(f"{side} values")] for side in edges]
        button.args = ({"visible": [*seen["visible"], *more]}, view)
    for side in edges:
        line = {"color": PICKED, "width": 6}
        edge = go.Scatter3d(mode="lines", name=f"{side} picked", line=line, hoverinfo="skip")
        figure.add_trace(edge)
    return figure


def _outline(brain, side, coords, faces):
    """Borders between networks."""
    network = np.unique(brain.network.values, return_inverse=True)[1]
    x, y, z = _line(_borders(network[brain.hemi.values == side], coords, faces))
    trace = go.Scatter3d(x=x, y=y, z=z, mode="lines", name=f"{side} networks", hoverinfo="skip")
    return trace.update(line={"color": "black", "width": 3})


def _line(segments):
    """Segments (segment, end, xyz) as one line (xyz, point), interrupted between strokes."""
    points, ends = np.unique(segments.reshape(-1, 3), axis=0, return_inverse=True)
    strokes = _strokes(ends.reshape(-1, 2).tolist())
    order = [point for stroke in strokes for point in (*stroke, len(points))]
    return np.concatenate([points, np.full((1, 3), np.nan, np.float32)])[order].T


def _strokes(segments):
    """Join pairs of points into long strokes, ends and crossings first, then closed loops."""
    left = {}
    for a, b in segments:
        left.setdefault(a, []).append(b)
        left.setdefault(b, []).append(a)
    for start in sorted(left, key=lambda point: len(left[point]) % 2 == 0):
        while left[start]:
            stroke = [start]
            while left[stroke[-1]]:
                stroke.append(left[stroke[-1]].pop())
                left[stroke[-1]].remove(stroke[-2])
            yield stroke


def _borders(labels, coords, faces):
    """Where labels of vertices meet, (segment, end, xyz): through triangles, from edge middle to
    middle."""
    middle = (coords[faces] + coords[np.roll(faces, -1, axis=1)]) / 2  # (triangle, edge, xyz)
    crossed = labels[faces] != np.roll(labels[faces], -1, axis=1)  # (triangle, edge)
    segments = np.stack([middle, np.roll(middle, -1, axis=1)], axis=2)
    return segments[crossed & np.roll(crossed, -1, axis=1)]


# for papers -------------------------------------------------------------------------------------


def _static_surface(brain, hemi, scale, outlines, dots):
    sides = SIDES[hemi]
    size = (4 * len(sides) + 1, 5.8 if dots.empty else 8)
    figure, axes = plt.subplots(2 + (not dots.empty), len(sides), figsize=size, squeeze=False)
    for axis, side in zip(axes[2:].flat, sides, strict=False):
        here = dots[dots.side == side]
        along = -here.y if side == "left" else here.y  # the nose points as in the lateral view
        color = scale.mappable().to_rgba(here.value)
        axis.scatter(along, here.z, s=60, c=color, edgecolors="gray", linewidths=0.5)
        for at in zip(here.name, along, here.z, strict=True) if len(here) <= 20 else ():
            axis.annotate(at[0], at[1:], (0, 6), textcoords="offset points", ha="center", size=6)
        axis.set_title(f"{side}, off the cortex", fontsize=9)
        axis.set(aspect="equal")
        axis.set_axis_off()
    views = product(("lateral", "medial"), sides)
    for axis, (view, side) in zip(axes[:2].flat, views, strict=True):
        _draw_hemisphere(axis, brain, side, f"{side} {view}", scale, outlines)
        axis.set_title(f"{side} {view}", fontsize=9)
        axis.set(aspect="equal")
        axis.set_axis_off()
    figure.colorbar(scale.mappable(), ax=axes, shrink=0.6, fraction=0.05, label=scale.units)
    return finish_static(figure, scale.title)


def _draw_hemisphere(axis, brain, side, view, scale, outlines):
    """Triangles that face the reader, and borders as triangles without a surface, drawn from the
    back to the front."""
    from matplotlib.collections import PolyCollection

    eye, up, _ = VIEWS[view]
    screen = np.stack([np.cross(up, eye), up, eye], axis=1)  # right, up, toward the reader
    coords, faces = load_mesh("inflated", side)
    shapes = (coords @ screen)[faces]  # (triangle, corner, 3)
    tilt = _tilt(shapes)
    faces, shapes, tilt = (part[tilt > 0] for part in (faces, shapes, tilt))
    depth, color = shapes[:, :, 2].mean(1), _shaded(tilt, faces, brain, side, scale)
    if outlines:
        network = brain.network.values[brain.hemi.values == side]
        lines = (_borders(network, coords, faces) @ screen)[:, [0, 1, 1]]
        shapes = np.concatenate([shapes, lines])
        depth = np.concatenate([depth, lines[:, :, 2].mean(1) + 1])  # 1 mm nearer
        color = np.concatenate([color, np.tile([0, 0, 0, 1], (len(lines), 1))])
    order = np.argsort(depth)
    width = np.where(order < len(faces), 0.2, 0.8)
    color = color[order]
    axis.add_collection(PolyCollection(shapes[order, :, :2], fc=color, ec=color, lw=width))
    axis.autoscale_view()


def _tilt(shapes):
    """How far triangles (triangle, corner, 3) face the reader: 1 straight, below 0 away."""
    normal = np.cross(shapes[:, 1] - shapes[:, 0], shapes[:, 2] - shapes[:, 0])
    return normal[:, 2] / np.maximum(np.linalg.norm(normal, axis=1), 1e-9)


def _shaded(tilt, faces, brain, side, scale):
    """Colors of triangles: their value's, or gray by sulcal depth; darker where they tilt."""
    value = brain.values[brain.hemi.values == side][faces].mean(1)
    gray = matplotlib.colormaps["gray"](0.6 - 0.2 * load_sulc(side)[faces].mean(1))
    color = np.where(np.isfinite(value)[:, None], scale.mappable().to_rgba(value), gray)
    color[:, :3] *= (0.75 + 0.25 * tilt)[:, None]
    return color
