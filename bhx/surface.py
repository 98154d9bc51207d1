"""Pictures: a value per parcel or vertex on the cortex, slices, tokens and subjects.

Everything here turns labelled arrays into plotly figures, or with `static=True` into matplotlib
ones for papers. No statistics are computed, nothing is stored, and no figure listens to a click.

Left is left: brains are seen from the top with the nose up, slices in neurological convention.
"""

from __future__ import annotations

from functools import cache
from html import escape

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import plotly.graph_objects as go
import xarray as xr
from plotly.subplots import make_subplots

from bhx.atlas import ATLASES, N_FSAVERAGE5, aliases, load_atlas, load_mesh, load_sulc
from bhx.errors import check_choice
from bhx.schema import InputError, listed, t1_grid

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
# Okabe and Ito's colours, told apart in every common form of colour blindness
CATEGORIES = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#000")
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


def look_of(values, cmap=None, limits=None, title=None) -> dict:
    """Title, units, colour map and limits of a map; for values of both signs these are diverging
    and symmetric."""
    told, values = getattr(values, "attrs", {}), np.asarray(values)
    finite = values[np.isfinite(values)]
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 1.0)
    both_signs = low < 0 < high
    if limits is None:
        top = max(-low, high)
        limits = (-top, top) if both_signs else (low, high if high > low else low + 1)
    if not limits[0] < limits[1]:
        raise InputError(f"Expected limits (low, high), found {tuple(limits)}", "Swap them")
    return {
        "title": told.get("long_name", "") if title is None else title,
        "units": told.get("units", ""),
        "cmap": cmap or ("RdBu_r" if both_signs else "viridis"),
        "limits": tuple(limits),
    }


@cache
def colours(cmap, steps=33):
    """A matplotlib colour map as a plotly colour scale."""

    rgb = (255 * matplotlib.colormaps[cmap](np.linspace(0, 1, steps))[:, :3]).round().astype(int)
    return [[i / (steps - 1), f"rgb({r},{g},{b})"] for i, (r, g, b) in enumerate(rgb.tolist())]


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


def colour_bar(look):
    """The colour axis of a look: scale, limits, title."""
    return {
        "colorscale": colours(look["cmap"]),
        "cmin": look["limits"][0],
        "cmax": look["limits"][1],
        "colorbar": {"title": {"text": escape(look["units"])}, "len": 0.7, "thickness": 14},
    }


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


# tokens and subjects ----------------------------------------------------------------------------


def plot_tokens(latents: xr.Dataset, *, subjects=None, title: str | None = None, static=False):
    """Each hub token's attention by network, beside its share of each modality.

    A cell is the token's mean attention to a parcel of the network over its mean attention to
    any parcel: 1 is no preference. Tokens are sorted by their share of BOLD.

    Parameters
    ----------
    latents : Dataset embedded with keep=("attention",)
    subjects : ids or a boolean mask; None for all
    """
    table = token_table(latents, subjects)
    title = "where hub tokens read from" if title is None else title
    if static:
        return _static_tokens(table, title)
    return _token_figure(table, title)


def token_table(latents: xr.Dataset, subjects=None) -> xr.Dataset:
    """What `plot_tokens` draws: `preference` (token, network) and `share` (token, modality)."""
    from bhx.latents import each_token

    share = each_token(latents, of="modality", subjects=subjects)
    maps = each_token(latents, of="roi", subjects=subjects)
    maps = maps.assign_coords(network=("roi", maps.network.values.astype(object)))  # not lazy
    preference = maps.groupby("network").mean() / maps.mean("roi")
    order = np.argsort(-share.sel(modality="bold").values, kind="stable")
    names = list(dict.fromkeys(maps.network.values.tolist()))
    table = xr.Dataset({"preference": preference.sel(network=names), "share": share})
    return table.isel(token=order).compute()


def _token_figure(table, title):

    figure = make_subplots(1, 2, column_widths=[0.72, 0.28], horizontal_spacing=0.2)
    tokens = [str(t) for t in table.token.values]
    bar = {"title": {"text": "preference", "side": "top"}, "x": 0.58, "thickness": 12}
    bar |= {"tickvals": [0, 1, 2], "ticktext": ["0", "even", "2 or more"]}
    figure.add_heatmap(
        x=table.network.values,
        y=tokens,
        z=table.preference.values.astype(np.float32),
        hovertemplate="token %{y}, %{x}<br>%{z:.3g} times even<extra></extra>",
        **{"colorscale": colours("RdBu_r"), "zmin": 0, "zmax": 2, "colorbar": bar},
    )
    for colour, modality in zip(CATEGORIES, table.modality.values.tolist(), strict=False):
        share = table.share.sel(modality=modality).values.astype(np.float32)
        hover = "token %{y}<br>%{x:.3g}<extra>" + escape(modality) + "</extra>"
        look = {"orientation": "h", "marker_color": colour, "hovertemplate": hover}
        figure.add_bar(x=share, y=tokens, name=modality, **look, row=1, col=2)
    figure.update_yaxes(type="category", autorange="reversed", title_text="token", col=1)
    figure.update_yaxes(type="category", autorange="reversed", showticklabels=False, col=2)
    figure.update_xaxes(title_text="share of attention", range=[0, 1], col=2)
    legend = {"orientation": "h", "x": 1, "xanchor": "right", "y": 1.08}
    figure.update_layout(barmode="stack", bargap=0, height=520, legend=legend)
    return figure.update_layout(title={"text": escape(title), "x": 0.5}, margin={"t": 60, "b": 50})


def _static_tokens(table, title):

    figure, (left, right) = plt.subplots(
        1, 2, width_ratios=[3, 1], figsize=(7, 5), sharey=True, layout="constrained"
    )
    image = left.imshow(table.preference, aspect="auto", cmap="RdBu_r", vmin=0, vmax=2)
    bar = figure.colorbar(image, ax=left, ticks=[0, 1, 2])
    bar.set_ticklabels(["0", "even", "2 or more"])
    bar.ax.set_title("preference", size="medium")
    left.set_xticks(range(table.sizes["network"]), table.network.values, rotation=45, ha="right")
    left.set_ylabel("token, sorted by share of BOLD")
    left.set_yticks([])
    start = np.zeros(table.sizes["token"])
    for colour, modality in zip(CATEGORIES, table.modality.values.tolist(), strict=False):
        share = table.share.sel(modality=modality).values
        right.barh(np.arange(len(share)), share, 1, start, color=colour, label=modality)
        start = start + share
    right.set(xlabel="share of attention", xlim=(0, 1))
    right.legend(loc="upper center", bbox_to_anchor=(0.5, 1.12), ncols=2, frameon=False)
    figure.suptitle(title)
    plt.close(figure)
    return figure


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
