"""Laws of the explorer, without a browser: what is seen equals what the plain functions give."""

import base64
import json
import re

import matplotlib
import numpy as np
import pytest
import xarray as xr
from plotly.callbacks import Points
from small_latents import make_latents

from bhx import contrast, explore, neighbours, plot_tokens, pool, region_map, register
from bhx.errors import InputError
from bhx.modalities.base import Modality
from bhx.modalities.t1 import t1_grid
from bhx.modalities.table import MODALITIES
from bhx.schema import ATTENTION
from bhx.show import explorer as explorer_file
from bhx.show import offline as offline_file
from bhx.show import people as people_file
from bhx.show.colors import CLEAR
from bhx.show.panels import FADED, GROUPS
from bhx.show.people import binned
from bhx.show.surface import SIDES as HEMIS
from bhx.show.tokens import token_table

matplotlib.use("agg")
BAD = "<img src=x onerror=alert(1)>"


@pytest.fixture
def explorer():
    return explore(make_latents())


def test_maps_are_those_of_region_map(explorer):
    who = ["sub-01", "sub-04", "sub-12"]
    explorer.select_subjects(who)
    explorer.select_token(5)
    expected = region_map(explorer.latents, 5, subjects=who)
    np.testing.assert_allclose(explorer.surface_map(), expected, rtol=1e-5)
    np.testing.assert_allclose(
        explorer.cube_map(), region_map(explorer.latents, 5, subjects=who, of="t1"), rtol=1e-5
    )
    explorer.select_token(None)
    np.testing.assert_allclose(
        explorer.surface_map(), region_map(explorer.latents, None, subjects=who), rtol=1e-5
    )
    np.testing.assert_allclose(
        explorer.cube_map(), region_map(explorer.latents, None, subjects=who, of="t1"), rtol=1e-4
    )


def test_comparison_is_the_difference_of_maps(explorer):
    a, b = explorer.subjects[:6], explorer.subjects[10:]
    explorer.select_token(2)
    explorer.compare(a, b)
    expected = region_map(explorer.latents, 2, subjects=a) - region_map(
        explorer.latents, 2, subjects=b
    )
    np.testing.assert_allclose(explorer.surface_map(), expected, atol=1e-7)
    card = explorer.card()  # one line each
    assert re.search("A</td>.*6 of 20.*B</td>.*10 of 20", card)
    explorer.select_subjects(a)
    assert explorer.groups is None


def test_parcel_leads_to_the_token_that_prefers_it():
    data = make_latents()
    data.hub_to_roi.values[:, 6, 42] += 1
    explorer = explore(data)
    explorer.select_parcel(str(data.roi.values[42]))
    assert explorer.token == 6
    assert explorer.preference().argmax() == 6


def test_network_is_the_sum_of_its_parcels(explorer):
    explorer.select_parcel("Limbic")
    np.testing.assert_array_equal(explorer.parcels, explorer.latents.network == "Limbic")
    maps = region_map(explorer.latents, explorer.token)
    preference = maps[explorer.parcels].mean() / maps.mean()
    got = explorer.preference()[explorer.token]
    assert got == pytest.approx(float(preference), rel=1e-4)


def test_written_code_draws_what_is_seen(explorer):
    explorer.select_token(3)
    for select in (
        lambda: explorer.select_subjects(["sub-00", "sub-06"]),
        lambda: explorer.compare(["sub-00", "sub-01"], ["sub-05", "sub-06"]),
    ):
        select()
        names = {"latents": explorer.latents}
        exec(explorer.code(), names)
        np.testing.assert_allclose(names["values"], explorer.surface_map(), atol=1e-7)


def test_lazy_store_gives_the_same(tmp_path, explorer):
    explorer.latents.to_zarr(tmp_path / "latents.zarr", consolidated=False, zarr_format=3)
    lazy = explore(xr.open_zarr(tmp_path / "latents.zarr", consolidated=False))
    for one in (lazy, explorer):
        one.select_token(1)
        one.select_subjects(explorer.subjects[3:9])
    np.testing.assert_allclose(lazy.surface_map(), explorer.surface_map())
    np.testing.assert_allclose(lazy.points, explorer.points, atol=1e-6)
    assert lazy.panels.card.value == explorer.panels.card.value
    lazy.panels.controls["color"].value = "site"
    assert len(set(lazy.panels.people.data[0].marker.color)) == 2
    xr.testing.assert_allclose(token_table(lazy.latents), token_table(explorer.latents))


@pytest.mark.parametrize("kept", ["bold", "t1"])
def test_one_modality_is_enough(kept):
    data = make_latents()
    data = data.isel(subject=np.flatnonzero(~data[f"has_{'t1' if kept == 'bold' else 'bold'}"]))
    explorer = explore(data)
    panels = explorer.panels
    explorer.select_token(2)
    assert bool(explorer.surface_map().any()) == (kept == "bold")
    assert bool(explorer.cube_map().any()) == (kept == "t1")
    assert ("nobody" in panels.heading.value) == (kept == "t1")


# the widgets ------------------------------------------------------------------------------------


@pytest.fixture
def panels(explorer):
    return explorer.panels


def sent_by(figure, act):
    """The plotly messages that an action sends for one figure."""
    messages = []
    names = ["_py2js_addTraces", "_py2js_restyle", "_py2js_update", "_py2js_relayout"]
    follow = lambda change: messages.append((change["name"], change["new"]))  # noqa: E731
    figure.observe(follow, names)
    act()
    figure.unobserve(follow, names)
    return [m for m in messages if m[1]]


def test_only_intensities_are_sent_after_the_mesh(explorer, panels):
    messages = sent_by(panels.brain, lambda: explorer.select_token(4))
    assert messages
    keys = {k for _, m in messages for style in (m.get("style_data") or {},) for k in style}
    changed = {k for name, m in messages for one in m.get("restyle_data", [m]) for k in one}
    assert "_py2js_addTraces" not in {name for name, _ in messages}
    assert not ({"x", "y", "z", "i", "j", "k", "text"} & (keys | changed))


def test_brain_shows_the_map_and_its_color_bar(explorer, panels):
    explorer.select_token(4)
    values = explorer.surface_map()
    left, right = (t for t in panels.brain.data if t.name.endswith("values"))
    assert {*left.intensity, *right.intensity} <= set(values)
    axis = panels.brain.layout.coloraxis
    assert (axis.cmin, axis.cmax) == pytest.approx(np.quantile(values, (0.02, 0.98)))
    assert axis.colorbar.title.text == "share of attention"
    explorer.compare(explorer.subjects[:5], explorer.subjects[5:])
    assert axis.cmin == -axis.cmax


def test_callbacks_do_what_the_methods_do(explorer, panels):
    panels._people_picked([1, 2, 8])
    np.testing.assert_array_equal(np.flatnonzero(explorer.chosen), [1, 2, 8])
    assert list(panels.people.data[0].selectedpoints) == [1, 2, 8]
    panels._token_clicked([5])
    assert explorer.token == 5
    assert panels.strip.layout.shapes[0].x0 == 4.5
    panels.controls["token"].value = "3"
    assert explorer.token == 3
    panels.controls["parcel"].value = "Default"
    assert explorer.parcels.sum() == (explorer.networks == "Default").sum()
    assert panels.strip.data[2].visible
    panels.controls["subject"].value = "sub-07"
    assert explorer.subjects[explorer.chosen] == ["sub-07"]
    panels.controls["reset"].click()
    assert {panels.controls[name].value for name in ("token", "parcel", "subject")} == {""}
    assert explorer.chosen.all()
    assert explorer.token is None


def test_click_on_the_brain_selects_the_parcel_under_it(explorer, panels):

    trace = next(t for t in panels.brain.data if t.name == "right values")
    at = 1234
    panels._brain_clicked(trace, Points(point_inds=[at]), None)
    name = explorer.roi[explorer.parcels].item()
    assert trace.hovertemplate.split("%{text}")[0] + trace.text[at] == name
    assert panels.controls["parcel"].value == name


def test_two_groups_are_compared(explorer, panels):
    panels._people_picked([0, 1, 4])
    panels.controls["first"].click()
    panels._people_picked([5, 6, 7, 8])
    panels.controls["second"].click()
    assert [g.sum() for g in explorer.groups] == [3, 4]
    assert "minus" in panels.heading.value


def test_one_parcel_does_not_set_the_scale():
    data = make_latents()
    data.hub_to_roi.values[:, :, 7] = 9
    axis = explore(data).panels.brain.layout.coloraxis
    assert axis.cmax < 0.1


def test_locked_colors_stay(explorer, panels):
    axis = panels.brain.layout.coloraxis
    panels.controls["lock"].value = True
    before = axis.cmin, axis.cmax
    explorer.select_token(2)
    assert (axis.cmin, axis.cmax) == before
    panels.controls["lock"].value = False
    assert (axis.cmin, axis.cmax) != before


def test_groups_are_ringed_in_the_colors_of_their_cards(explorer, panels):
    panels._people_picked([0, 1, 4])
    panels.controls["first"].click()
    ring = np.array(panels.people.data[0].marker.line.color)
    assert np.flatnonzero(ring == GROUPS["A"]).tolist() == [0, 1, 4]
    assert "Now set B" in panels.message.value
    panels.controls["first"].click()  # twice is once
    panels._people_picked([5, 6])
    panels.controls["second"].click()
    ring = np.array(panels.people.data[0].marker.line.color)
    assert [(ring == GROUPS[name]).sum() for name in "AB"] == [3, 2]
    assert all(GROUPS[name] in panels.card.value for name in "AB")
    panels.controls["reset"].click()
    assert set(panels.people.data[0].marker.line.color) == {CLEAR}


def test_a_lasso_is_removed_and_its_people_stay(explorer, panels):
    messages = sent_by(panels.people, lambda: panels._people_picked([3, 5], lasso=True))
    cleared = [m for name, m in messages if name == "_py2js_relayout"]
    assert cleared[0]["relayout_data"] == {"selections": []}
    panels.people.data[0].selectedpoints = []  # what pages answer
    panels._people_picked([])
    assert list(panels.people.data[0].selectedpoints) == [3, 5]
    assert explorer.chosen.sum() == 2
    again = sent_by(panels.people, panels.controls["reset"].click)
    assert "_py2js_relayout" in {name for name, _ in again}


def test_every_panel_says_what_to_do_and_stands_on_any_theme(panels):
    for figure in (panels.people, panels.strip, panels.brain, panels.slices):
        assert ": " in figure.layout.title.text
        assert figure.layout.paper_bgcolor == figure.layout.plot_bgcolor == CLEAR
        assert figure.layout.width is None  # as wide as its place
        assert figure.layout.margin.t >= 30  # room for the bar of buttons
    letters = [a.text for a in panels.slices.layout.annotations]
    assert letters.count("L") == letters.count("R") == 2
    assert [a.text for a in panels.brain.layout.scene.annotations] == ["<b>L</b>", "<b>R</b>"]


def test_tokens_that_fail_their_controls_are_faded():
    data = make_latents()
    tokens, again = data.token.values, np.linspace(0.5, 1, data.sizes["token"])
    controls = xr.Dataset(
        {"agreement": (("control", "token"), again[None]), "passes": ("token", again >= 0.9)},
        {"control": ["retest"], "token": tokens},
    )
    explorer = explore(data, controls=controls)
    drawn = explorer.panels.strip.data[0].marker.opacity
    assert [o == 1 for o in drawn] == controls.passes.values.tolist()
    surface = next(t for t in explorer.panels.brain.data if t.name in explorer.panels.parcels)
    explorer.select_token(int(tokens[0]))
    assert "(repeats 0.50, fails its controls)" in explorer.panels.heading.value
    assert surface.opacity == FADED
    explorer.select_token(int(tokens[-1]))
    assert "(repeats 1.00, passes its controls)" in explorer.panels.heading.value
    assert surface.opacity == 1
    explorer.select_token(None)
    assert "repeats" not in explorer.panels.heading.value
    with pytest.raises(InputError, match="Make them of this model"):
        explore(data, controls=controls.isel(token=slice(2)))


def test_thirty_names_look_different(panels):
    data = make_latents(n=30)
    panels = explore(data).panels
    panels.controls["color"].value = "subject"
    marker = panels.people.data[0].marker
    assert len({*zip(marker.color, marker.symbol, strict=True)}) == 30
    assert "and 18 more" in panels.legend.value


def test_two_compared_groups_never_become_one(explorer, panels):
    explorer.compare(explorer.subjects[:3], explorer.subjects[5:9])
    panels.controls["first"].click()
    assert "Select people first" in panels.message.value
    panels._people_picked([9])
    panels.controls["second"].click()
    assert explorer.groups is None  # there is no group A yet
    panels.controls["first"].click()
    assert "sub-09 in both" in panels.message.value
    assert "sub-09" not in panels.heading.value


def test_bars_point_the_way_a_share_changed(explorer, panels):
    a, b = explorer.subjects[[0, 1]], explorer.subjects[[5, 6]]
    explorer.compare(a, b)
    assert panels.strip.layout.barmode == "relative"  # below 0 what is negative
    share = explorer.latents.modality_share
    change = share.sel(subject=a).mean("subject") - share.sel(subject=b).mean("subject")
    for i, bar in enumerate(panels.strip.data[:2]):
        np.testing.assert_allclose(bar.y, change[:, i], atol=1e-6)


def test_wrong_entries_are_answered_not_raised(explorer, panels):
    heading = panels.heading.value
    for box, entry in (("parcel", "Amygdala"), ("token", "99"), ("token", "many")):
        panels.controls[box].value = entry
        assert entry in panels.message.value
        assert panels.heading.value == heading
        assert panels.controls[box].value == ""  # taken back
    explorer.select_token(3)
    assert panels.message.value == ""


def test_a_picture_stands_beside_the_widgets_for_stored_notebooks(explorer, monkeypatch):
    shown = []
    monkeypatch.setattr("IPython.display.display", lambda bundle, raw: shown.append(bundle))
    explorer._ipython_display_()
    assert base64.b64decode(shown[0]["image/png"]).startswith(b"\x89PNG")
    assert "application/vnd.jupyter.widget-view+json" in shown[0]


def test_a_page_for_a_thousand_people_stays_small(tmp_path):
    explorer = explore(make_latents(n=1000, tokens=32))
    page = explorer.save(tmp_path / "explorer.html")
    assert page.stat().st_size < 10e6
    text = page.read_text(encoding="utf-8")
    assert not re.search(r"<(script|link|img)[^>]+(src|href)=", text)


def test_a_page_escapes_names(tmp_path):
    data = make_latents().assign_coords(subject=[BAD + str(i) for i in range(20)])
    data["site"] = ("subject", [BAD] * 10 + ["</script>"] * 10)
    text = explore(data).save(tmp_path / "explorer.html").read_text(encoding="utf-8")
    assert BAD not in text
    assert text.count("</script>") == 8  # plotly, five figures, the numbers, the module


def test_button_writes_the_code(explorer, panels):
    explorer.select_token(1)
    assert panels.written.layout.display == "none"  # until it is asked for
    panels.controls["code"].click()
    assert not panels.written.layout.display
    assert panels.written.value == explorer.code()
    assert "token=1" in panels.written.value


@pytest.mark.parametrize("name", ["age", "site", "has_t1"])
def test_people_take_the_color_of_any_label(explorer, panels, name):
    panels.controls["color"].value = name
    color = panels.people.data[0].marker.color
    assert len(color) == len(explorer.subjects)
    if name == "site":
        assert len(set(color)) == 2


def test_names_cannot_inject_html():
    data = make_latents().assign_coords(subject=[BAD + str(i) for i in range(20)])
    data["site"] = ("subject", [BAD] * 10 + ["B"] * 10)
    explorer = explore(data)
    panels = explorer.panels
    panels.controls["color"].value = "site"
    panels._people_picked([4])
    panels.controls["subject"].value = BAD
    for html in (panels.card.value, panels.heading.value, panels.legend.value):
        assert "<img" not in html
    assert all("<" not in text for text in panels.people.data[0].text)


def test_one_person_is_shown_with_their_own_t1():
    """Where the voxels are of another size than the template's, the axes are too."""
    data = make_latents()
    grid = t1_grid(4)
    t1 = np.random.default_rng(0).random((20, *(len(v) for v in grid.values()))).astype("f4")
    labels = {name: data[name] for name in ("subject", "participant", "has_t1", "has_bold")}
    cohort = xr.Dataset({"t1": (("subject", "x", "y", "z"), t1)}, labels | grid)
    panels = explore(data, cohort).panels
    sagittal = panels.slices.data[0]
    before = np.array(sagittal.z)
    panels._people_picked([0])
    own = np.array(sagittal.z)
    assert own.shape == (len(sagittal.y), len(sagittal.x)) == (len(grid["z"]), len(grid["y"]))
    np.testing.assert_allclose(sagittal.x, np.sort(grid["y"]))
    assert own.std() > 10
    panels._people_picked([2])  # has no T1
    np.testing.assert_array_equal(sagittal.z, before)
    assert before.shape == (len(sagittal.y), len(sagittal.x))


def test_sliders_move_the_slices_and_what_they_say(panels):
    axial = next(t for t in panels.slices.data if t.name == "axial")
    before = np.array(axial.z)
    panels.sliders["z"].value = 40
    assert (np.array(axial.z) != before).any()
    assert "z 40 mm" in axial.hovertemplate


class Morphometry(Modality):
    """Measures of each parcel, read by hub tokens beside BOLD."""

    name = "morphometry"
    map_name = "hub_to_morphometry"


@pytest.fixture
def with_third():
    """Latents with a modality that only this test has registered."""
    register(Morphometry())
    data, rng = make_latents(), np.random.default_rng(1)
    third = rng.dirichlet(np.ones(100), (20, 8)) / 2
    share = np.concatenate([data.modality_share / 2, np.full((20, 8, 1), 0.5)], -1)
    tokens = rng.standard_normal((20, 100, 4))
    yield (
        data.drop_vars("modality_share")
        .drop_dims("modality", errors="ignore")
        .assign(
            hub_to_morphometry=(("subject", "token", "roi"), third),
            morphometry_tokens=(("subject", "roi", "feature"), tokens),
            modality_share=(("subject", "token", "modality"), share),
        )
        .assign_coords(
            modality=["bold", "t1", "morphometry"], has_morphometry=("subject", np.arange(20) != 4)
        )
    )
    del MODALITIES["morphometry"]


def test_a_third_modality_is_pooled_mapped_and_drawn(with_third):
    pooled = pool(with_third, of="morphometry_tokens")
    np.testing.assert_allclose(pooled.features, with_third.morphometry_tokens.mean("roi"), 1e-5)
    own = region_map(with_third, 3, of="morphometry")
    who = with_third.has_morphometry.values
    np.testing.assert_allclose(own, with_third.hub_to_morphometry[who, 3].mean("subject"))
    xr.testing.assert_identical(region_map(with_third, 3), region_map(with_third, 3, of="bold"))
    figure = plot_tokens(with_third, of="morphometry")
    assert [bar.name for bar in figure.data[1:]] == ["bold", "t1", "morphometry"]
    np.testing.assert_allclose(sum(np.array(bar.x) for bar in figure.data[1:]), 1, rtol=1e-5)


def test_a_third_modality_is_explored(with_third):
    explorer = explore(with_third)
    panels = explorer.panels
    assert panels.controls["map"].options == ("bold", "morphometry", "t1")
    explorer.select_token(5)
    shares = with_third.modality_share.mean("subject")
    np.testing.assert_allclose(explorer.shares(), shares, rtol=1e-5)
    panels.controls["map"].value = "morphometry"
    expected = region_map(with_third, 5, of="morphometry")
    np.testing.assert_allclose(explorer.surface_map(), expected, rtol=1e-5)
    left = next(t for t in panels.brain.data if t.name == "left values")
    assert np.isin(np.float32(left.intensity), np.float32(explorer.surface_map())).all()
    assert len([t for t in panels.strip.data if t.type == "bar"]) == 3
    names = {"latents": with_third}
    exec(explorer.code(), names)
    np.testing.assert_allclose(names["values"], explorer.surface_map(), atol=1e-7)
    explorer.select_subjects(["sub-04"])
    assert "nobody selected has morphometry" in explorer.heading()


def test_one_map_on_each_place_leaves_nothing_to_choose(panels):
    assert panels.controls["map"].layout.display == "none"


def test_no_figure_offers_to_upload_its_data(panels):
    for figure in (panels.people, panels.strip, panels.brain, panels.slices):
        assert "sendChartToCloud" in figure.layout.modebar.remove
        assert figure._config["plotlyServerURL"] == ""


def bad_calls():
    yield lambda e: e.select_token(99), "found 99"
    yield lambda e: e.select_parcel("Amygdala"), "'Amygdala'"
    yield lambda e: e.select_subjects(["who"]), "who"
    yield lambda e: e.select_subjects(np.zeros(20, bool)), "none"
    yield lambda e: e.compare(["sub-01"], ["sub-01", "sub-02"]), "sub-01 in both"
    yield lambda e: explore(e.latents, e.latents.isel(subject=slice(5))), "found sub-05"
    yield lambda e: explore(e.latents[["hub"]]), 'keep=("attention",)'
    yield lambda e: explore(e.latents.drop_vars("hub")), "'hub'"


@pytest.mark.parametrize("call, says", list(bad_calls()))
def test_bad_input_is_named(explorer, call, says):
    with pytest.raises(InputError) as caught:
        call(explorer)
    assert says in str(caught.value)


# the way back, and what is taken on ---------------------------------------------------------------


def test_undo_walks_back_through_what_was_selected(explorer, panels):
    seen = [explorer.state()]
    for act in (
        lambda: explorer.select_token(3),
        lambda: explorer.select_subjects(["sub-01", "sub-02"]),
        lambda: explorer.select_parcel("Limbic"),
        lambda: explorer.compare(["sub-01"], ["sub-05", "sub-06"]),
    ):
        act()
        seen.append(explorer.state())
    for before in seen[-2::-1]:
        panels.controls["undo"].click()
        assert explorer.state() == before
    explorer.undo()  # at the beginning
    assert explorer.state() == seen[0]


def test_a_saved_state_is_taken_up_by_another_explorer(explorer, tmp_path):
    explorer.select_parcel("Limbic")
    explorer.compare(["sub-01", "sub-04"], ["sub-05"])
    other = explore(make_latents())
    other.restore(explorer.save(tmp_path / "state.json"))
    assert other.state() == explorer.state()
    np.testing.assert_array_equal(other.surface_map(), explorer.surface_map())
    np.testing.assert_array_equal(other.parcels, explorer.parcels)
    assert other.heading() == explorer.heading()
    explorer.reset()
    other.restore(explorer.state())
    assert other.chosen.all()
    assert other.groups is None


@pytest.mark.parametrize(
    "change, says",
    [
        ({"explorer": 0}, "a state of the explorer, version 1"),
        ({"token": 99}, "the token"),
        ({"place": "Nowhere"}, "the place"),
        ({"subjects": [["sub-99"]]}, "sub-99"),
        ({"surface_of": "dance"}, "the surface_of"),
    ],
)
def test_a_state_of_something_else_changes_nothing(explorer, change, says):
    explorer.select_token(3)
    before = explorer.state()
    with pytest.raises(InputError, match=says):
        explorer.restore(before | {"token": 2} | change)
    assert explorer.state() == before


def test_files_that_are_no_state_are_named(explorer, tmp_path):
    (tmp_path / "old.json").write_text('{"picked": [1, 2]}')
    with pytest.raises(InputError, match="found picked. Save one with this version"):
        explorer.restore(tmp_path / "old.json")
    (tmp_path / "cut.json").write_text('{"explorer": 1, "sub')
    with pytest.raises(InputError, match="cut.json"):
        explorer.restore(tmp_path / "cut.json")


def test_a_selection_becomes_a_label(explorer):
    explorer.select_subjects(["sub-01", "sub-04"])
    assert explorer.picked().to_series().value_counts().to_dict() == {"": 18, "picked": 2}
    explorer.compare(["sub-01"], ["sub-05", "sub-06"])
    labelled = explorer.latents.assign_coords(picked=explorer.picked())
    assert labelled.subject.values[labelled.picked == "B"].tolist() == ["sub-05", "sub-06"]


def test_groups_are_tested_with_a_word_of_caution(explorer, panels):
    with pytest.raises(InputError, match="Expected two groups, found one selection"):
        explorer.differences()
    panels.controls["test"].click()
    assert "Expected two groups" in panels.message.value
    a, b = explorer.subjects[:6], explorer.subjects[10:]
    explorer.compare(a, b)
    panels.controls["test"].click()
    group = np.array([*"aaaaaa", *("" for _ in range(4)), *"bbbbbbbbbb"], object)
    expected = contrast(explorer.latents.assign_coords(half=("subject", group)), "half")
    np.testing.assert_array_equal(explorer.differences().p, expected.p)
    assert f"{int((expected.q < 0.05).sum())} of 8 tokens differ" in panels.message.value
    assert "test a label instead" in panels.message.value


def test_typed_letters_find_the_one_they_are_in(explorer, panels):
    panels.controls["parcel"].value = "limbi"
    assert "Expected" in panels.message.value  # a network, and parcels of it
    panels.controls["parcel"].value = explorer.roi[7].lower()
    assert explorer.place == explorer.roi[7]
    panels.controls["subject"].value = "07"
    assert explorer.subjects[explorer.chosen].tolist() == ["sub-07"]


def test_another_map_of_the_people(explorer):
    other = explorer.points[::-1] * 2
    other.attrs["long_name"] = "UMAP"
    theirs = explore(make_latents(), points=other.drop_vars([*other.coords]).assign_coords(
        subject=other.subject.values, component=[1, 2]))  # fmt: skip
    np.testing.assert_allclose(theirs.points, 2 * explorer.points, rtol=1e-6)
    panels = theirs.panels
    assert panels.people.layout.xaxis.title.text == "UMAP 1"
    panels.controls["points"].value = "PCA"
    np.testing.assert_allclose(theirs.points, explorer.points, rtol=1e-6)
    np.testing.assert_allclose(panels.people.data[0].x, explorer.points[:, 0], rtol=1e-6)
    assert panels.people.layout.xaxis.title.text.startswith("PCA 1")
    both = explore(make_latents(), points={"UMAP": other, "half": explorer.points / 2})
    assert both.panels.controls["points"].options == ("PCA", "UMAP", "half")
    both.select_points("UMAP")
    np.testing.assert_allclose(both.panels.people.data[0].y, other[::-1, 1], rtol=1e-6)
    with pytest.raises(InputError, match="map of people to be PCA, UMAP, half, found 'TSNE'"):
        both.select_points("TSNE")
    with pytest.raises(InputError, match="points \\(subject, component\\) of two components"):
        explore(make_latents(), points=explorer.points[:, :1])
    with pytest.raises(InputError, match="found others of sub-03"):
        explore(
            make_latents(), points=explorer.points.where(explorer.subjects[:, None] != "sub-03")
        )


def test_the_picked_parcel_has_a_line_around_it_on_its_own_hemisphere(explorer, panels):
    mesh, busy = panels.brain.data[0], []
    lines = {
        side: next(panels.brain.select_traces({"name": f"{side} picked"})) for side in HEMIS["both"]
    }
    panels.fit.observe(lambda change: busy.append(change["new"]), "busy")
    explorer.select_parcel(explorer.roi[7])  # the left ones come first
    assert busy == [True, False]
    x, y, z = (np.asarray(lines["left"][axis]) for axis in "xyz")
    assert np.isnan(lines["right"].x).all()
    at = np.stack([mesh.x, mesh.y, mesh.z], 1)
    faces = np.stack([mesh.i, mesh.j, mesh.k], 1).astype(int)
    inside = (panels.parcels[mesh.name] == 7)[faces]
    mixed = faces[inside.any(1) & ~inside.all(1)]  # triangles on the border
    middles = {
        tuple(at[face[[a, b]]].mean(0).round(3))
        for face in mixed
        for a, b in ((0, 1), (1, 2), (2, 0))
    }
    points = {tuple(p) for p in np.stack([x, y, z], 1)[~np.isnan(x)].round(3).tolist()}
    assert len(points) > 20
    close = [min(np.abs(np.subtract(p, m)).max() for m in middles) for p in [*points][:20]]
    assert max(close) < 0.01
    explorer.select_parcel()
    assert np.isnan(lines["left"].x).all()
    for button in panels.brain.layout.updatemenus[0].buttons:
        assert len(button.args[0]["visible"]) == len(panels.brain.data)
        hidden = "right" if button.label.startswith("left") else "left"
        shown = dict(
            zip((t.name for t in panels.brain.data), button.args[0]["visible"], strict=True)
        )
        assert shown[f"{hidden} picked"] == shown[f"{hidden} values"]


def test_one_person_is_shown_with_their_nearest_series_and_connectome():
    latents = make_latents()
    rng = np.random.default_rng(0)
    series = rng.standard_normal((20, 100, 60)).astype("f4") * 7 + 100
    series[0, :, 50:] = np.nan
    coords = {"subject": latents.subject.values, "roi": latents.roi.values}
    coords |= {"has_bold": ("subject", latents.has_bold.values)}
    cohort = xr.Dataset({"bold": (("subject", "roi", "time"), series)}, coords)
    explorer = explore(latents, cohort)
    panels = explorer.panels
    assert not panels.own.children
    explorer.select_subjects(["sub-00"])
    carpet, pairs = panels.person.data
    assert panels.own.children == (panels.person,)
    np.testing.assert_allclose(pairs.z, np.corrcoef(series[0, :, :50]), atol=1e-5)
    expected = series[0, :, :50] - series[0, :, :50].mean(1, keepdims=True)
    expected /= series[0, :, :50].std(1, keepdims=True)
    np.testing.assert_allclose(carpet.z, expected, atol=1e-4)
    near = neighbours(latents, "sub-00").neighbour.values
    assert explorer.nearest() == near.tolist()
    assert all(name in panels.card.value for name in near)
    explorer.select_subjects(["sub-03"])  # without BOLD
    assert not panels.own.children


def test_a_scan_is_read_once_however_often_its_person_is_looked_at(monkeypatch):
    latents = make_latents()
    series = np.random.default_rng(0).standard_normal((20, 100, 30)).astype("f4")
    coords = {"subject": latents.subject.values, "roi": latents.roi.values}
    coords |= {"has_bold": ("subject", latents.has_bold.values)}
    explorer = explore(latents, xr.Dataset({"bold": (("subject", "roi", "time"), series)}, coords))
    panels, read, asked = explorer.panels, explorer.own_series, []
    monkeypatch.setattr(explorer, "own_series", lambda: (asked.append(1), read())[1])
    explorer.select_subjects(["sub-00"])
    for token in range(4):
        explorer.select_token(token)
    assert len(asked) == 1
    assert panels.own.children
    explorer.select_subjects(["sub-01"])
    np.testing.assert_allclose(panels.person.data[1].z, np.corrcoef(series[1]), atol=1e-5)


def test_a_bar_of_a_label_keeps_its_people():
    latents = make_latents(n=40)
    age = latents.age.values.copy()
    age[7] = np.nan
    latents = latents.assign_coords(
        age=("subject", age), diagnosis=("subject", [""] * 3 + ["x"] * 37)
    )
    explorer = explore(latents)
    names, at = explorer.bars["age"]
    assert names[-1] == "missing"
    assert (len(names), at[7]) == (9, 8)
    known, edges = np.histogram(age[np.isfinite(age)], 8)
    np.testing.assert_allclose([float(n.split()[2]) for n in names[:-1]], edges[1:], rtol=0.01)
    assert explorer.counts("age").tolist() == [[*known, 1]]
    assert explorer.bars["diagnosis"][0] == ["x", "missing"]
    explorer.filter("age", names[2])
    assert (explorer.chosen == (at == 2)).all()
    explorer.filter("site", "A")
    assert (explorer.chosen == (at == 2) & (latents.site == "A").values).all()
    explorer.undo()
    assert explorer.counts("age").tolist() == [[0, 0, known[2], *[0] * 6]]
    with pytest.raises(InputError, match="the bar to be A, B, found 'C'"):
        explorer.filter("site", "C")


def test_a_bar_keeps_the_people_of_both_groups():
    latents = make_latents(n=40)
    first = latents.site.values == "A"
    explorer = explore(latents)
    explorer.compare(first, ~first)
    at = explorer.bars["age"][1]
    assert explorer.counts("site").tolist() == [[20, 0], [0, 20]]
    explorer.panels._bar_clicked("age")(None, Points(point_inds=[3]), None)
    assert (explorer.groups[0] == first & (at == 3)).all()
    assert (explorer.groups[1] == ~first & (at == 3)).all()
    shown = explorer.panels.labels.data
    assert [t.customdata.sum() for t in shown] == [*explorer.counts("age").sum(1)] * 2
    explorer.panels._bar_clicked("site")(None, Points(point_inds=[0]), None)
    assert "found none in one of the groups" in explorer.panels.message.value
    assert explorer.groups[1].any()


def test_words_beyond_the_commonest_share_a_bar():
    names, at = binned(np.array([*"aabbccddeeffgghhij"]))
    assert names == [*"abcdefgh", "others"]
    assert np.bincount(at).tolist() == [2] * 9


def test_other_maps_than_attention_are_shown(tmp_path):
    latents, random = make_latents(), np.random.default_rng(1)
    dims = ("token", "roi")
    at = {"token": latents.token.values, "roi": latents.roi.values}
    lesion = xr.DataArray(random.normal(size=(8, 100)), at, dims, attrs={"units": "moved"})
    each = xr.DataArray(random.normal(size=(20, 8, 100)), at, ("subject", *dims))
    each = each.assign_coords(subject=latents.subject.values)
    order = {"roi": random.permutation(100), "token": random.permutation(8)}
    maps = {
        "lesion": lesion.isel(order),
        "gradients": each.isel(order | {"subject": slice(None, None, -1)}),
    }
    explorer = explore(latents, maps=maps)
    panels = explorer.panels
    assert panels.controls["map"].options[-3:] == ("lesion", "gradients", "t1")
    explorer.select_token(3)
    panels.controls["map"].value = "lesion"
    assert explorer.heading() == "lesion of token 3"
    np.testing.assert_allclose(explorer.surface_map(), lesion[3], rtol=1e-6)
    assert panels.brain.layout.coloraxis.colorbar.title.text == "moved"
    who = ["sub-02", "sub-05"]
    explorer.select_subjects(who)
    np.testing.assert_allclose(explorer.surface_map(), lesion[3], rtol=1e-6)
    assert "maps['lesion'].sel(token=3)\n" in explorer.code()
    explorer.select_map("gradients")
    np.testing.assert_allclose(
        explorer.surface_map(), each.sel(subject=who).mean("subject")[3], rtol=1e-5
    )
    assert "maps['gradients'].sel(token=3).sel(subject=subjects).mean(" in explorer.code()
    namespace = {"maps": maps, "latents": latents}
    exec(explorer.code().rsplit("\n", 1)[0], namespace)  # but the drawing
    found = namespace["values"].sel(roi=latents.roi)
    np.testing.assert_allclose(explorer.surface_map(), found, rtol=1e-5)
    explorer.compare(["sub-01"], ["sub-05"])
    np.testing.assert_allclose(explorer.surface_map(), each[1, 3] - each[5, 3], rtol=1e-4)
    explorer.select_map("lesion")
    np.testing.assert_allclose(explorer.surface_map(), 0, atol=1e-6)  # one map for all
    kept = explorer.state()
    explorer.reset()
    explorer.restore(kept)
    assert explorer.surface_of == "lesion"
    assert '"what": "Lesion"' in explorer.save(tmp_path / "a.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "name, change, words",
    [
        ("bold", lambda m: m, "a map 'bold' of (token, roi) beside modality_share, bold, t1"),
        ("a", lambda m: m.mean("token"), "found ('roi',)"),
        ("a", lambda m: m.expand_dims("mode"), "found ('mode', 'token', 'roi')"),
        ("a", lambda m: m[1:], "a map 'a' of every token, found none of 0"),
        ("a", lambda m: m.values, "found ()"),
        ("a", lambda m: m.where(m.token > 0), "a map 'a' of finite numbers"),
    ],
)
def test_other_maps_that_do_not_fit_are_refused(name, change, words):
    latents = make_latents()
    at = {"token": latents.token.values, "roi": latents.roi.values}
    values = xr.DataArray(np.ones((8, 100)), at, ("token", "roi"))
    with pytest.raises(InputError, match=re.escape(words)):
        explore(latents, maps={name: change(values)})


def test_a_page_of_very_many_people_has_a_part_of_them(tmp_path, monkeypatch):
    latents = make_latents(n=40)
    at = {"token": latents.token.values, "roi": latents.roi.values}
    one = xr.DataArray(np.random.default_rng(0).normal(size=(8, 100)), at, ("token", "roi"))
    each = one.expand_dims(subject=latents.subject.values) * xr.ones_like(latents.age)
    explorer = explore(latents, maps={"one": one, "each": each})
    explorer.panels.controls["color"].value = "site"
    explorer.select_map("each")
    explorer.select_token(2)
    whole = explorer.save(tmp_path / "whole.html").read_text(encoding="utf-8")
    assert "drawn at random" not in whole
    monkeypatch.setattr(explorer_file, "IN_A_PAGE", 10 * (100 + 8 * 2) + 5)
    text = explorer.save(tmp_path / "part.html").read_text(encoding="utf-8")
    assert "These are 10 of 40 people, drawn at random." in text
    held = json.loads(re.search(r'id="explorer">(.+?)</script>', text)[1])
    assert len(held["subjects"]) == len(held["labels"]["age"]) == 10
    assert set(held["subjects"]) < set(latents.subject.values)
    assert next(iter(held["looks"])) == "site"
    shape = {"each": (10, 8, 100), "one": (1, 8, 100)}
    maps = {
        name: np.frombuffer(base64.b64decode(held["maps"][name]["values"]), "<f4").reshape(size)
        for name, size in shape.items()
    }
    assert next(iter(held["maps"])) == "each"  # that which is seen
    np.testing.assert_allclose(maps["each"], each.sel(subject=held["subjects"]), rtol=1e-6)
    np.testing.assert_allclose(maps["one"][0], one, rtol=1e-6)
    assert len(explorer.subjects) == 40
    assert explorer.token == 2


def test_a_page_leaves_out_maps_that_have_no_room_and_says_so(tmp_path, monkeypatch):
    explorer = explore(make_latents(n=20))
    shares, most = explorer.maps[ATTENTION].size, explorer.maps["bold"].size
    for room, kept in ((most, ["bold"]), (most + 20 * 600, ["bold", "t1"])):  # t1: the mean alone
        monkeypatch.setattr(offline_file, "IN_A_PAGE", shares + room)
        text = explorer.save(tmp_path / "explorer.html").read_text(encoding="utf-8")
        held = json.loads(re.search(r'id="explorer">(.+?)</script>', text)[1])
        assert [*held["maps"]] == kept
        assert ("Too large for this page: the maps of t1." in text) == (kept == ["bold"])
        assert ("id='at-x'" in text) == (held["volume"] is not None) == ("t1" in kept)


def test_very_many_people_are_drawn_by_the_graphics_processor(monkeypatch):
    assert explore(make_latents(n=20)).panels.people.data[0].type == "scatter"
    monkeypatch.setattr(people_file, "MANY", 19)
    panels = explore(make_latents(n=20)).panels
    assert panels.people.data[0].type == "scattergl"
    panels._people_picked([0, 1, 4])
    assert list(panels.people.data[0].selectedpoints) == [0, 1, 4]
