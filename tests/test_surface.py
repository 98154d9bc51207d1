"""Laws of the pictures: parcels by name, left on the left, small, nothing injected."""

import io
import json
from itertools import pairwise

import matplotlib.pyplot as plt
import numpy as np
import pytest
import xarray as xr

from bhx.data.atlas import load_atlas, load_mesh
from bhx.errors import InputError
from bhx.latents.maps import region_map
from bhx.latents.pool import project
from bhx.modalities.t1 import t1_grid
from bhx.show import people as people_file
from bhx.show import surface as surface_file
from bhx.show import tokens as tokens_file
from bhx.show import volume as volume_file
from bhx.show.colors import Scale

LIMIT = 1.3e6  # bytes of plotly JSON
HALF = 10_242  # vertices of a hemisphere


@pytest.fixture(scope="module")
def atlas():
    return load_atlas("schaefer400")


@pytest.fixture(scope="module")
def values(atlas):
    """A map of both signs, highest at the front."""
    return (
        atlas.mni_y.astype("float32")
        .rename("front")
        .assign_attrs(long_name="front to back", units="mm")
    )


@pytest.fixture(scope="module")
def latents():
    atlas = load_atlas("schaefer100")
    rng = np.random.default_rng(0)
    n, tokens = 12, 8
    ids = [f"sub-{i:02d}" for i in range(n)]
    bold = np.linspace(0, 1, tokens) * np.ones((n, 1))
    return xr.Dataset(
        {
            "hub": (("subject", "token", "feature"), rng.standard_normal((n, tokens, 4))),
            "hub_to_roi": (("subject", "token", "roi"), rng.dirichlet(np.ones(100), (n, tokens))),
            "hub_to_t1": (("subject", "token", "cx", "cy", "cz"), rng.random((n, tokens, 5, 6, 5))),
            "modality_share": (("subject", "token", "modality"), np.stack([bold, 1 - bold], -1)),
        },
        {
            "subject": ids,
            "token": np.arange(tokens),
            "modality": ["bold", "t1"],
            "age": ("subject", rng.uniform(20, 80, n), {"units": "years"}),
            "site": ("subject", np.array(["A", "B"])[np.arange(n) % 2]),
            "roi": atlas.roi.values,
            "network": ("roi", atlas.network.values),
        },
    )


def mesh_traces(figure, part="values"):
    return [t for t in figure.data if t.type == "mesh3d" and t.name.endswith(part)]


def test_every_vertex_has_its_parcels_value_and_name(atlas, values):
    brain = surface_file.on_vertices(values)
    labels = atlas.labels_fsaverage5.values
    for i in (0, 57, 399):
        here = labels == int(atlas.label[i])
        assert here.any()
        np.testing.assert_array_equal(brain.values[here], values[i])
        assert set(brain.parcel.values[here]) == {str(atlas.roi[i].values)}
        assert set(brain.network.values[here]) == {str(atlas.network[i].values)}
    assert np.isnan(brain.values[labels == 0]).all()


def test_parcels_are_placed_by_name_in_any_order(atlas, values):
    straight = surface_file.on_vertices(values)
    mixed = values[np.random.default_rng(0).permutation(400)]
    xr.testing.assert_identical(straight, surface_file.on_vertices(mixed))
    seventeen = load_atlas("schaefer400", order="17networks")
    renamed = xr.DataArray(seventeen.mni_y.values, {"roi": seventeen.roi.values}, ["roi"])
    np.testing.assert_allclose(surface_file.on_vertices(renamed), straight)


def test_missing_parcels_stay_gray(values):
    whole, part = surface_file.plot_surface(values), surface_file.plot_surface(values[:150])
    drawn = [sum(len(t.x) for t in mesh_traces(f)) for f in (whole, part)]
    assert drawn[1] < drawn[0]
    brain = surface_file.on_vertices(values[:150])
    assert np.isnan(brain.values[brain.hemi.values == "right"]).all()


def test_both_hemispheres_fit_into_the_limit_with_outlines(values):
    figure = surface_file.plot_surface(values, outlines=True)
    assert len(figure.to_json()) <= LIMIT


def test_left_is_left_and_nothing_overlaps(values):
    left, right = mesh_traces(surface_file.plot_surface(values))
    assert (left.name, right.name) == ("left values", "right values")
    assert max(left.x) < 0 < min(right.x)


def test_both_hemispheres_are_lit_alike(values):
    """The light stands behind the reader: 0 is the same gray on the left and on the right."""
    for trace in surface_file.plot_surface(values).data:
        assert (trace.lightposition.x, trace.lightposition.y) == (0, 0)
        assert trace.lightposition.z < 0


@pytest.mark.parametrize("view", list(surface_file.VIEWS))
def test_standard_views_are_the_right_way_up(view):
    """The camera's right-hand side and up, from its eye and up vectors."""
    camera = surface_file.camera(view)
    eye, up = (np.array([camera[k][a] for a in "xyz"]) for k in ("eye", "up"))
    right = np.cross(up, eye / np.linalg.norm(eye))
    if view == "top":
        np.testing.assert_array_equal(up, [0, 1, 0])  # nose up
        np.testing.assert_array_equal(right, [1, 0, 0])  # right on the right
    else:
        np.testing.assert_array_equal(up, [0, 0, 1])
        towards_front = -1 if view in ("left lateral", "right medial") else 1
        np.testing.assert_array_equal(right, [0, towards_front, 0])


def test_buttons_show_one_hemisphere_from_its_side(values):
    figure = surface_file.plot_surface(values)
    buttons = {b.label: b.args for b in figure.layout.updatemenus[0].buttons}
    assert list(buttons) == list(surface_file.VIEWS)
    visible = buttons["left medial"][0]["visible"]
    shown = [t.name for t, on in zip(figure.data, visible, strict=True) if on]
    assert shown == ["left values", "left gray"]
    assert buttons["left medial"][1]["scene.camera"]["eye"]["x"] > 0


@pytest.mark.parametrize(
    "view, letters", [("top", "LR"), ("left medial", "L"), ("right lateral", "R")]
)
def test_every_view_says_which_side_it_is(values, view, letters):
    figure = surface_file.plot_surface(values)
    layout = next(b.args[1] for b in figure.layout.updatemenus[0].buttons if b.label == view)
    sides = enumerate(figure.layout.scene.annotations)
    shown = [a.text[3] for i, a in sides if layout[f"scene.annotations[{i}].visible"]]
    assert "".join(shown) == letters
    left, right = figure.layout.scene.annotations
    assert left.x < 0 < right.x


def test_planes_are_named_and_have_their_sides():
    letters = {}
    for note in volume_file.plot_volume().layout.annotations:
        letters.setdefault(note.xref.split()[0], []).append((note.text, note.x))
    named = [a.text for a in volume_file.plot_volume().layout.annotations[:3]]
    assert named == ["sagittal", "coronal", "axial"]
    assert letters["x"] == [("P", 0), ("A", 1)]
    assert letters["x2"] == letters["x3"] == [("L", 0), ("R", 1)]


def test_zero_is_clear_over_a_brain():
    for limits in ((0, 3), (-2, 2)):
        colors = Scale("RdBu_r", limits).fade().colors
        value = np.linspace(*limits, len(colors))
        assert colors[np.abs(value).argmin(), 3] == 0
        assert colors[np.abs(value).argmax(), 3] == pytest.approx(0.8)


def test_hover_names_parcel_network_and_value(atlas, values):
    left, _ = mesh_traces(surface_file.plot_surface(values))
    prefix = left.hovertemplate.split("%{text}")[0]
    assert "%{intensity" in left.hovertemplate
    brain = surface_file.on_vertices(values)
    names = [prefix + text for text in left.text]
    assert set(names) <= set(atlas.roi.values) | {prefix + "no parcel"}
    value_of = dict(zip(atlas.roi.values.tolist(), values.values.tolist(), strict=True))
    assert all(value_of[n] == v for n, v in zip(names, left.intensity, strict=True))
    network = dict(zip(atlas.roi.values.tolist(), atlas.network.values.tolist(), strict=True))
    assert all(network[n] in n for n in set(names))
    assert brain.sizes[surface_file.VERTEX] == 2 * HALF


def test_all_triangles_are_drawn_once(values):
    figure = surface_file.plot_surface(values, hemi="left")
    assert sum(len(t.i) for t in figure.data) == len(load_mesh("inflated", "left")[1])


def test_maps_of_both_signs_are_symmetric_and_others_are_not(values):
    axis = surface_file.plot_surface(values).layout.coloraxis
    assert axis.cmin == -axis.cmax == -float(abs(values).max())
    axis = surface_file.plot_surface(values + 200).layout.coloraxis
    assert axis.cmin == pytest.approx(float(values.min() + 200))
    axis = surface_file.plot_surface(values, limits=(-5, 10), cmap="cividis").layout.coloraxis
    assert (axis.cmin, axis.cmax) == (-5, 10)
    assert axis.colorscale[0][1] == "rgb(0,34,78)"  # the first color of matplotlib's cividis


def test_outlines_lie_on_borders_between_networks(values):
    """Every point of an outline is the middle of an edge between networks."""
    figure = surface_file.plot_surface(values, hemi="left", outlines=True)
    line = next(t for t in figure.data if t.type == "scatter3d")
    points = np.stack([line.x, line.y, line.z], 1)
    points = points[np.isfinite(points).all(1)]
    coords, faces = load_mesh("inflated", "left")
    network = surface_file.on_vertices(values).network.values[:HALF]
    edges = np.concatenate([faces[:, [0, 1]], faces[:, [1, 2]], faces[:, [2, 0]]])
    border = edges[network[edges[:, 0]] != network[edges[:, 1]]]
    as_set = {tuple(p) for p in coords[border].mean(1).round(3).tolist()}
    assert {tuple(p) for p in points.round(3).tolist()} == as_set


def test_strokes_use_every_pair_once():
    pairs = [(0, 1), (1, 2), (2, 0), (5, 6), (6, 7), (6, 8)]
    walked = [tuple(sorted(step)) for s in surface_file._strokes(pairs) for step in pairwise(s)]
    assert sorted(walked) == sorted(tuple(sorted(p)) for p in pairs)


def painted(figure):
    file = io.BytesIO()
    figure.savefig(file, dpi=figure.dpi)
    file.seek(0)
    return (255 * plt.imread(file)[..., :3]).astype(int)


def test_static_brain_shows_the_front_where_it_is(values):
    """Red (front) lies left in the left lateral view and right in the right lateral one."""
    figure = surface_file.plot_surface(values, static=True, outlines=True)
    assert [a.get_title() for a in figure.axes[:2]] == ["left lateral", "right lateral"]
    picture = painted(figure)
    reddish = picture[..., 0] - picture[..., 2]
    for axis, front_is_left in zip(figure.axes[:2], (True, False), strict=True):
        box = axis.get_window_extent()
        rows = slice(int(len(picture) - box.y1), int(len(picture) - box.y0))
        cut = reddish[rows, int(box.x0) : int(box.x1)]
        middle = cut.shape[1] // 2
        assert (cut[:, :middle].mean() > cut[:, middle:].mean()) == front_is_left


def test_volume_planes_have_left_on_the_left_and_fit(latents):
    grid = t1_grid(4)
    t1 = xr.DataArray(np.zeros([len(v) for v in grid.values()], "f4"), grid, ("x", "y", "z"))
    t1 = t1 + (t1.x < 0) + (t1.z > 50)  # bright on the left and at the top
    overlay = region_map(latents, 2, of="t1")
    figure = volume_file.plot_volume(t1, overlay=overlay)
    assert len(figure.to_json()) <= LIMIT
    axial = next(t for t in figure.data if t.name == "axial" and t.visible)
    picture = np.asarray(axial.z)
    assert np.all(np.diff(axial.x) > 0)
    assert picture[:, axial.x < 0].mean() > picture[:, axial.x > 0].mean()
    coronal = next(t for t in figure.data if t.name == "coronal" and t.visible)
    assert np.all(np.diff(coronal.y) > 0)
    assert np.asarray(coronal.z)[-1].mean() > np.asarray(coronal.z)[0].mean()


def test_volume_sliders_show_one_position_of_their_plane(latents):
    figure = volume_file.plot_volume(overlay=region_map(latents, 0, of="t1"))
    for plane, slider in zip(volume_file.PLANES, figure.layout.sliders, strict=True):
        assert len(slider.steps) == volume_file.STOPS
        for step in slider.steps:
            shown, traces = step.args[0]["visible"], step.args[1]
            names = [figure.data[t].name for t, on in zip(traces, shown, strict=True) if on]
            assert names == [plane, f"{plane} map"]
    assert sum(t.visible for t in figure.data) == 6


def test_cube_map_lies_where_its_cubes_are(latents):
    """Cube (i, j, k) covers the T1 voxels of block (i, j, k)."""
    cubes = volume_file.with_mm(region_map(latents, 0, of="t1"))
    for axis, n in zip("xyz", (5, 6, 5), strict=True):
        blocks = t1_grid()[axis].reshape(n, -1)
        assert (cubes[axis].values > blocks.min(1)).all()
        assert (cubes[axis].values < blocks.max(1)).all()


def test_tokens_are_sorted_by_bold_and_even_attention_is_one(latents):
    even = latents.assign(hub_to_roi=xr.full_like(latents.hub_to_roi, 0.01))
    table = tokens_file.token_table(even)
    np.testing.assert_allclose(table.preference, 1)
    assert (np.diff(table.share.sel(modality="bold")) <= 0).all()
    figure = tokens_file.plot_tokens(latents)
    assert list(figure.data[0].x) == list(table.network.values)
    assert len(figure.to_json()) <= LIMIT


def test_tokens_whose_map_fails_its_controls_are_faded(latents):
    order = tokens_file.token_table(latents).token.values
    passes = xr.DataArray(order % 2 == 0, {"token": order}, ["token"])
    veils = tokens_file.plot_tokens(latents, passes=passes).layout.shapes
    assert [round((v.y0 + v.y1) / 2) for v in veils] == np.flatnonzero(order % 2).tolist()
    assert not tokens_file.plot_tokens(latents).layout.shapes


def test_latents_are_colored_by_numbers_or_names(latents):
    points = project(latents)
    by_age = people_file.plot_latents(points, color="age")
    np.testing.assert_allclose(by_age.data[0].marker.color, latents.age)
    assert "[years]" in by_age.data[0].marker.colorbar.title.text
    by_site = people_file.plot_latents(points, color="site")
    assert [t.name for t in by_site.data] == ["A", "B"]
    np.testing.assert_allclose(by_site.data[1].x, points[1::2, 0], rtol=1e-5)


def test_names_cannot_inject_html_and_nothing_is_uploaded(latents, values):
    bad = "<img src=x onerror=alert(1)>"
    named = latents.assign_coords(subject=[bad + str(i) for i in range(12)])
    named["site"] = ("subject", [bad] * 6 + ["B"] * 6)
    points = project(named)
    figures = [
        people_file.plot_latents(points, color="site", title=bad),
        surface_file.plot_surface(values, title=bad),
        volume_file.plot_volume(title=bad),
        tokens_file.plot_tokens(latents, title=bad),
    ]
    for figure in figures:
        assert "<img" not in json.dumps(figure.to_dict(), default=str)
        assert "sendChartToCloud" in figure.layout.modebar.remove  # scans are not uploaded


def test_static_volume_is_drawn(latents):
    overlay = region_map(latents, 1, of="t1")
    assert painted(volume_file.plot_volume(overlay=overlay, static=True)).std() > 10


def bad_calls():
    yield "shape", lambda v: surface_file.plot_surface(np.zeros(77)), "(77,)"
    yield "dims", lambda v: surface_file.plot_surface(v.expand_dims("subject")), "'subject'"
    yield "names", lambda v: surface_file.plot_surface(v.assign_coords(roi=np.arange(400))), "0, 1"
    yield "hemi", lambda v: surface_file.plot_surface(v, hemi="l"), "found 'l'"
    yield "limits", lambda v: surface_file.plot_surface(v, limits=(1, 0)), "(1, 0)"
    yield "t1", lambda v: volume_file.plot_volume(v), "('roi',)"
    yield "cubes", lambda v: volume_file.plot_volume(overlay=v), "('roi',)"
    yield "points", lambda v: people_file.plot_latents(v), "('roi',)"


@pytest.mark.parametrize(
    "call, says", [c[1:] for c in bad_calls()], ids=[c[0] for c in bad_calls()]
)
def test_bad_input_is_named(values, call, says):
    with pytest.raises(InputError) as caught:
        call(values)
    assert says in str(caught.value)
