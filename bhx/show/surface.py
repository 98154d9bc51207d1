"""Pictures: a value per parcel or vertex on the cortex, slices, tokens and subjects.

Everything here turns labelled arrays into plotly figures, or with `static=True` into matplotlib
ones for papers. No statistics are computed, nothing is stored, and no figure listens to a click.

Left is left: brains are seen from the top with the nose up, slices in neurological convention.
"""

from __future__ import annotations

from html import escape

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import plotly.graph_objects as go
import xarray as xr

from bhx.data.atlas import ATLASES, N_FSAVERAGE5, aliases, load_atlas, load_mesh, load_sulc
from bhx.errors import InputError, check_choice, listed
from bhx.show.look import colour_bar, look_of

VERTEX = "vertex_fsaverage5"
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


def plot_surface(
    values,
    *,
    mesh: str = "inflated",
    hemi: str = "both",
    view: str | None = None,
    cmap: str | None = None,
    limits: tuple[float, float] | None = None,
    threshold: float | None = None,
    outlines: bool = False,
    title: str | None = None,
    atlas: xr.Dataset | None = None,
    static: bool = False,
):
    """Draw one value per parcel or vertex on fsaverage5.

    Parameters
    ----------
    values : DataArray on roi (aligned by parcel name; parcels that are absent stay grey), values
        of the 20,484 vertices (left first), or a nilearn SurfaceImage on fsaverage5
    mesh : "inflated", "pial", "white" or "flat"
    hemi : "both", "left" or "right"
    view : "top", "left lateral", "left medial", "right medial" or "right lateral"; buttons offer
        them all
    cmap : a matplotlib colour map; by default a sequential one, or where values have both signs
        a diverging one around 0, both safe for colour-blind readers
    limits : values at the ends of the colour map; by default the extremes, symmetric around 0 for
        values of both signs
    threshold : smaller magnitudes are not drawn
    outlines : draw the borders of the seven networks
    atlas : `load_atlas(...)` for vertex values, or where it cannot be told from the parcels
    static : a matplotlib figure with the four standard views instead of a plotly one

    Returns
    -------
    plotly.graph_objects.Figure, or matplotlib.figure.Figure
    """
    check_choice("hemi", hemi, SIDES)
    brain = on_vertices(values, atlas)
    if threshold is not None:
        brain = brain.where(abs(brain) >= threshold)
    look = look_of(brain, cmap, limits, title)
    if static:
        return _static_surface(brain, mesh, SIDES[hemi], look, outlines)
    return _surface_figure(brain, mesh, SIDES[hemi], view, look, outlines)


def on_vertices(values, atlas: xr.Dataset | None = None) -> xr.DataArray:
    """Values of parcels carried to the 20,484 vertices of fsaverage5, NaN where there is no parcel.

    Returns
    -------
    DataArray (vertex_fsaverage5) of float32 with the coordinates `parcel`, `network` and `hemi`
    """
    if hasattr(values, "mesh") and hasattr(values, "data"):  # nilearn's SurfaceImage
        values = np.concatenate([np.squeeze(values.data.parts[s]) for s in SIDES["both"]])
    by_roi = isinstance(values, xr.DataArray) and values.dims == ("roi",)
    if not by_roi and np.shape(values) != (2 * N_FSAVERAGE5,):
        found = values.dims if isinstance(values, xr.DataArray) else np.shape(values)
        fact = f"Expected one value per parcel (dim 'roi') or {2 * N_FSAVERAGE5} vertices of "
        fact += f"fsaverage5, found {found}"
        raise InputError(fact, "Select or average the other dims first")
    atlas = (_atlas_of(values) if by_roi else load_atlas()) if atlas is None else atlas
    labels = atlas.labels_fsaverage5.values
    rank = np.zeros(labels.max() + 1, int)
    rank[atlas.label.values] = np.arange(1, atlas.sizes["roi"] + 1)
    rank = rank[labels]  # 0 = no parcel, else position in the atlas + 1
    per_vertex = _per_parcel(values, atlas)[rank] if by_roi else np.asarray(values, np.float32)
    out = xr.DataArray(per_vertex, dims=VERTEX, attrs=getattr(values, "attrs", {}))
    names = {"parcel": atlas.roi.values, "network": atlas.network.values}
    return out.assign_coords(
        {k: (VERTEX, np.concatenate([[""], v])[rank]) for k, v in names.items()}
        | {"hemi": (VERTEX, np.repeat(SIDES["both"], N_FSAVERAGE5))}
    )


def _atlas_of(values):
    """The atlas whose parcels these are, by name."""
    names = [str(n) for n in values.roi.values] if "roi" in values.coords else []
    for name, size in ATLASES.items():
        if 0 < len(names) <= size and {*names} <= aliases(atlas := load_atlas(name)).keys():
            return atlas
    fact = f"Expected the parcel names of {listed(ATLASES)}, found {listed(names, 3) or 'none'}"
    raise InputError(fact, "Name them as bhx.load_atlas(name).roi does, or give atlas=")


def _per_parcel(values, atlas):
    """NaN, then one value per parcel of the atlas."""
    named, known = values.to_series(), aliases(atlas)
    unknown = named.index.difference(known, sort=False)
    if len(unknown):
        raise InputError(
            f"Expected parcels of {atlas.attrs.get('atlas', 'the atlas')}, found {listed(unknown)}",
            "Take the atlas that the values were made with",
        )
    in_order = named.rename(known).reindex(atlas.roi.values).to_numpy(np.float32)
    return np.concatenate([[np.nan], in_order]).astype(np.float32)


# the cortex -------------------------------------------------------------------------------------


def _surface_figure(brain, mesh, sides, view, look, outlines):

    traces = [trace for side in sides for trace, _ in cortex(brain, mesh, side, sides)]
    if outlines:
        traces += [_outline(brain, mesh, side, sides) for side in sides]
    view = view or ("top" if len(sides) == 2 or mesh == "flat" else f"{sides[0]} lateral")
    return go.Figure(traces, stage(mesh, sides, view, [trace.name for trace in traces], look))


def cortex(brain: xr.DataArray, mesh: str, side: str, sides=("left", "right")) -> list:
    """One hemisphere as plotly traces, each with the vertices it draws.

    Returns
    -------
    list of (Mesh3d, array of vertex numbers among the 20,484): the part with values, whose
    intensities are `brain.values[vertices]`, and the grey rest, shaded by sulcal depth
    """

    coords, faces = _placed(mesh, side, sides)
    offset = SIDES["both"].index(side) * N_FSAVERAGE5
    here = brain.isel({VERTEX: slice(offset, offset + N_FSAVERAGE5)})
    known = np.isfinite(here.values)[faces].all(axis=1)
    traces = []
    for part, kept in (("values", known), ("grey", ~known)):
        vertices, corner = np.unique(faces[kept], return_inverse=True)
        i, j, k = corner.reshape(-1, 3).astype(np.uint16).T
        x, y, z = coords[vertices].T
        look = {"name": f"{side} {part}", "lighting": LIGHT, "showscale": False}
        trace = go.Mesh3d(x=x, y=y, z=z, i=i, j=j, k=k, **look)
        if part == "values":
            prefix, short = _short_names(here.parcel.values[vertices])
            hover = f"{prefix}%{{text}}<br>%{{intensity:.4g}}<extra>{side}</extra>"
            trace.update(coloraxis="coloraxis", text=short, hovertemplate=hover)
            trace.intensity = here.values[vertices]
        else:
            greys = [[0, "rgb(205,205,205)"], [1, "rgb(130,130,130)"]]
            trace.update(colorscale=greys, cmin=-1.5, cmax=1.5, hoverinfo="skip")
            trace.intensity = load_sulc(side)[vertices].round(2)
        traces.append((trace, vertices + offset))
    return traces


def _short_names(names):
    """What all names share at their start, and the rest of each: names are repeated per vertex."""
    known = sorted(set(names.tolist()) - {""})
    shared = "_".join(known[0].split("_")[:2]) + "_" if known else ""
    shared = shared if all(name.startswith(shared) for name in known) else ""
    return escape(shared), [escape(n.removeprefix(shared)) or "no parcel" for n in names.tolist()]


def _placed(mesh, side, sides):
    """A hemisphere's mesh, moved aside where the two would overlap."""
    coords, faces = load_mesh(mesh, side)
    used = np.unique(faces)
    if len(sides) == 2:
        other = load_mesh(mesh, "right" if side == "left" else "left")[0]
        reach = max(abs(coords[used, 0]).max(), abs(other[used, 0]).max())
        inner = coords[used, 0].max() if side == "left" else -coords[used, 0].min()
        if inner > 5:  # mm; pial and white surfaces stay where they are
            coords = coords + np.array([(-1 if side == "left" else 1) * 1.04 * reach, 0, 0], "f4")
    return coords, faces


def _outline(brain, mesh, side, sides):
    """Borders between networks as one line trace: across each triangle, edge middle to middle."""

    coords, faces = _placed(mesh, side, sides)
    points, pairs = _borders(brain, side, faces, coords)
    gap = len(points)
    order = [node for stroke in _strokes(pairs.tolist()) for node in (*stroke, gap)]
    x, y, z = np.concatenate([points, np.full((1, 3), np.nan, np.float32)])[order].T
    line = {"color": "black", "width": 3}
    trace = go.Scatter3d(x=x, y=y, z=z, mode="lines", line=line, name=f"{side} networks")
    return trace.update(hoverinfo="skip", showlegend=False)


def _borders(brain, side, faces, coords):
    """Points (point, xyz) on the edges between networks, and the pairs of them to join."""
    codes = np.unique(brain.network.values, return_inverse=True)[1]
    codes = codes.reshape(2, -1)[SIDES["both"].index(side)][faces]
    corner = np.stack([faces, np.roll(faces, -1, axis=1)], axis=-1)  # (triangle, edge, 2)
    edges, edge = np.unique(np.sort(corner.reshape(-1, 2), axis=1), axis=0, return_inverse=True)
    edge = edge.reshape(-1, 3)
    crossed = codes != np.roll(codes, -1, axis=1)
    two, three = crossed.sum(1) == 2, crossed.all(1)  # networks that meet in a triangle
    centre = len(edges) + np.arange(three.sum())
    spokes = np.stack([edge[three], np.repeat(centre[:, None], 3, 1)], axis=-1).reshape(-1, 2)
    points = np.concatenate([coords[edges].mean(1), coords[faces[three]].mean(1)])
    return points, np.concatenate([edge[two][crossed[two]].reshape(-1, 2), spokes])


def _strokes(pairs):
    """Join pairs of nodes into long strokes, ends and crossings first, then closed loops."""
    left = {}
    for a, b in pairs:
        left.setdefault(a, []).append(b)
        left.setdefault(b, []).append(a)
    for start in sorted(left, key=lambda node: len(left[node]) % 2 == 0):
        while left[start]:
            stroke = [start]
            while left[stroke[-1]]:
                stroke.append(left[stroke[-1]].pop())
                left[stroke[-1]].remove(stroke[-2])
            yield stroke


def stage(mesh, sides, view, names, look) -> dict:
    """The layout around a brain: camera, view buttons, colour bar and title."""
    check_choice("view", view, VIEWS)
    offered = {
        name: (camera(name), [n.split()[0] in SIDES[shown] for n in names])
        for name, (_, _, shown) in VIEWS.items()
        if set(SIDES[shown]) & set(sides) and (mesh != "flat" or name == "top")
    }
    axes = {f"{name}axis": {"visible": False, "showspikes": False} for name in "xyz"}
    buttons = [
        {"label": name, "method": "update", "args": [{"visible": on}, {"scene.camera": cam}]}
        for name, (cam, on) in offered.items()
    ]
    menu = {"type": "buttons", "direction": "right", "x": 0.5, "xanchor": "center", "y": 0}
    menu |= {"yanchor": "top", "showactive": True, "buttons": buttons, "active": -1}
    return {
        "title": {"text": escape(look["title"]), "x": 0.5},
        "scene": {
            **axes,
            "aspectmode": "manual",
            "aspectratio": _extent(mesh, sides),
            "camera": camera(view),
        },
        "coloraxis": colour_bar(look),
        "updatemenus": [menu] if len(offered) > 1 else [],
        "margin": {"l": 0, "r": 0, "t": 40, "b": 50},
        "showlegend": False,
    }


def _extent(mesh, sides):
    """Lengths of the scene's axes, so that the brain fills a figure that is wider than high."""
    ends = [_placed(mesh, side, sides) for side in sides]
    ends = np.concatenate([coords[np.unique(faces)] for coords, faces in ends])
    size = np.maximum(np.ptp(ends, axis=0), 1)
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


def _static_surface(brain, mesh, sides, look, outlines):

    views = ("top",) if mesh == "flat" else ("lateral", "medial")
    size = (4 * len(sides) + 1, 2.9 * len(views))
    figure, axes = plt.subplots(len(views), len(sides), figsize=size, squeeze=False)
    for axis, (view, side) in zip(axes.flat, ((v, s) for v in views for s in sides), strict=True):
        _draw_hemisphere(axis, brain, mesh, side, view, look, outlines)
        axis.set_title(f"{side} {view}" if view != "top" else side, fontsize=9)
    figure.suptitle(look["title"])
    shades = plt.cm.ScalarMappable(plt.Normalize(*look["limits"]), look["cmap"])
    figure.colorbar(shades, ax=axes, shrink=0.6, fraction=0.05, label=look["units"])
    plt.close(figure)
    return figure


def _draw_hemisphere(axis, brain, mesh, side, view, look, outlines):
    """Paint the triangles that face the reader, and borders as thin ones, from the back to the
    front."""
    from matplotlib.collections import PolyCollection

    eye, up, _ = VIEWS[view if view == "top" else f"{side} {view}"]
    screen = np.stack([np.cross(up, eye), up, eye], axis=1)  # right, up, towards the reader
    coords, faces = load_mesh(mesh, side)
    shapes = (coords @ screen)[faces]  # (triangle, corner, 3)
    tilt = _tilt(shapes)
    faces, shapes, tilt = (part[tilt > 0] for part in (faces, shapes, tilt))
    depth, colour = shapes[:, :, 2].mean(1), _shaded(tilt, faces, brain, side, look)
    if outlines:
        points, pairs = _borders(brain, side, faces, coords)
        lines = (points @ screen)[np.c_[pairs, pairs[:, 1]]]
        depth = np.concatenate([depth, lines[:, :, 2].mean(1) + 1])  # 1 mm nearer
        shapes = np.concatenate([shapes, lines])
        colour = np.concatenate([colour, np.tile([0, 0, 0, 1], (len(lines), 1))])
    order = np.argsort(depth)
    flat, colour = shapes[order, :, :2], colour[order]
    width = np.where(order < len(faces), 0.2, 0.8)
    axis.add_collection(PolyCollection(flat, facecolors=colour, edgecolors=colour, lw=width))
    axis.autoscale_view()
    axis.set_aspect("equal")
    axis.set_axis_off()


def _shaded(tilt, faces, brain, side, look):
    """Colours of triangles: their value's, or grey by sulcal depth; darker where they tilt."""

    here = faces + SIDES["both"].index(side) * N_FSAVERAGE5
    value = np.ma.masked_invalid(brain.values[here].mean(1))
    norm = matplotlib.colors.Normalize(*look["limits"])
    grey = matplotlib.colormaps["gray"](0.6 - 0.2 * load_sulc(side)[faces].mean(1))
    colour = matplotlib.colormaps[look["cmap"]](norm(value))
    colour = np.where(value.mask[:, None], grey, colour) if value.mask.any() else colour
    colour[:, :3] *= (0.75 + 0.25 * tilt)[:, None]
    return colour


def _tilt(shapes):
    """How far triangles (triangle, corner, 3) face the reader: 1 straight, below 0 away."""
    normal = np.cross(shapes[:, 1] - shapes[:, 0], shapes[:, 2] - shapes[:, 0])
    return normal[:, 2] / np.maximum(np.linalg.norm(normal, axis=1), 1e-9)
