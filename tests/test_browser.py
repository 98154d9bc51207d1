"""The explorer in a browser: JupyterLab and Voila on loopback, driven by mouse and keyboard."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import pytest

REPO = Path(__file__).parents[1]
SHOTS = REPO / ".screenshots"
BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--use-gl=angle",
    "--use-angle=swiftshader",
    "--enable-unsafe-swiftshader",
    "--ignore-gpu-blocklist",
    "--disable-background-networking",
]
CELLS = [  # one network takes long
    "import time\nimport xarray as xr\nimport bhx",
    "latents = xr.open_zarr('latents.zarr', consolidated=False)\n"
    "explorer = bhx.explore(latents)\n"
    "explorer.followers.append(lambda: time.sleep(2 * (explorer.place == 'Limbic')))\nexplorer",
]

# anywidget gives each figure 2 s to load, which is too little while other work has the processor
PATIENT = """{
    const timeout = AbortSignal.timeout.bind(AbortSignal)
    AbortSignal.timeout = ms => timeout(Math.max(ms, 120_000))
}"""

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(BROWSER is None, reason="no Chromium here: install one to run this test"),
]


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """The address of a JupyterLab that shows the explorer's notebook."""
    import nbformat
    from small_latents import make_latents

    folder = tmp_path_factory.mktemp("lab")
    make_latents(n=40).to_zarr(folder / "latents.zarr", consolidated=False, zarr_format=3)
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(c) for c in CELLS])
    book.metadata.kernelspec = {"name": "python3", "display_name": "Python 3"}
    nbformat.write(book, folder / "explorer.ipynb")
    port = free_port()
    options = {
        "ServerApp.ip": "127.0.0.1",
        "ServerApp.port": port,
        "ServerApp.root_dir": folder,
        "ServerApp.open_browser": False,
        "ServerApp.allow_root": True,
        "IdentityProvider.token": "loopback",
        "LabApp.check_for_updates_class": "jupyterlab.NeverCheckForUpdate",
    }
    address = f"http://127.0.0.1:{port}"
    with served("jupyterlab", options, folder, f"{address}/api?token=loopback"):
        yield f"{address}/doc/tree/explorer.ipynb?token=loopback"


@pytest.fixture(scope="module")
def lecture(tmp_path_factory):
    """The address of a Voila that serves the page for a public lecture."""
    folder, port = tmp_path_factory.mktemp("voila"), free_port()
    shutil.copy(REPO / "notebooks" / "voila" / "explorer.ipynb", folder)
    options = {"Voila.ip": "127.0.0.1", "Voila.port": port, "Voila.open_browser": False}
    address = f"http://127.0.0.1:{port}/"
    with served("voila", options, folder, address):
        yield f"{address}voila/render/explorer.ipynb"


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@contextmanager
def served(module, options, folder, address):
    """A server of a package, up as long as the context lasts."""
    own = {"PYTHONPATH": REPO, "JUPYTER_CONFIG_DIR": folder, "IPYTHONDIR": folder / "ipython"}
    with (folder / "server.log").open("w") as log:
        server = subprocess.Popen(
            [sys.executable, "-m", module, *(f"--{k}={v}" for k, v in options.items())],
            cwd=folder,
            env=os.environ | {k: str(v) for k, v in own.items()},
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    try:
        _wait_until_up(address, server)
        yield
    finally:
        server.terminate()
        server.wait(20)


def _wait_until_up(address, server, seconds=240):
    end = time.monotonic() + seconds
    while server.poll() is None and time.monotonic() < end:
        try:
            urllib.request.urlopen(address, timeout=5).close()
            return
        except OSError:
            time.sleep(0.5)
    raise RuntimeError("the server did not start")


@pytest.fixture(scope="module")
def browser():
    """One Chromium for all: Playwright cannot be started twice in a process."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=BROWSER, args=FLAGS)
        yield browser
        browser.close()


def new_page(browser):
    """An empty page from which no address but loopback can be reached."""
    page = browser.new_page(viewport={"width": 1280, "height": 1000})
    page.set_default_timeout(300_000)
    page.add_init_script(PATIENT)
    elsewhere = re.compile(r"^(?!(https?|wss?)://127\.0\.0\.1|blob:|data:|file:)")
    page.reached = []
    page.on("request", lambda r: page.reached.append(r.url) if elsewhere.match(r.url) else None)
    page.route(elsewhere, lambda route: route.abort())
    return page


def offers_upload(page):
    """Whether a figure of a page has a button to share it, or an address to upload it to."""
    return page.evaluate(
        f"""() => ({FIGURES})().some(g => g._context.plotlyServerURL || g._context.showSendToCloud
            || g.querySelector('[data-title*=hare], [data-title*=loud], [data-title*=tudio]'))"""
    )


@pytest.fixture(scope="module")
def page(lab, browser):
    """The explorer, drawn in JupyterLab."""
    page = new_page(browser)
    page.goto(lab)
    page.get_by_text(re.compile(r"Python 3.*\| Idle")).wait_for()
    page.add_style_tag(content=".Toastify {display: none}")
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_text("Run All Cells", exact=True).click()
    page.wait_for_function(f"() => ({FIGURES})().length === 5 || {FAILED}")
    assert not page.evaluate(FAILED), page.locator(".jp-OutputArea-output").inner_text()
    page.wait_for_timeout(4000)
    yield page
    page.close()


FAILED = "document.querySelector('[data-mime-type*=error]') !== null"
FIGURES = "() => [...document.querySelectorAll('.js-plotly-plot')].filter(g => g._fullLayout)"


def drawn(page, name):
    """Wait until a figure of the explorer is there: a slow machine may be drawing it again."""
    page.wait_for_function(f"name => ({FIGURES})().some(g => g.layout.meta === name)", arg=name)


def state(page, name):
    """What a figure of the explorer draws now: sums of its numbers, by trace."""
    drawn(page, name)
    return page.evaluate(
        f"""name => {{
            const figure = ({FIGURES})().find(g => g.layout.meta === name)
            const sum = v => {{
                let total = 0, i = 0
                const walk = w => w == null ? 0 : typeof w === 'number' ? total += w * (1 + i++ % 7)
                    : typeof w === 'object' ? Array.from(w).forEach(walk) : 0
                walk(v)
                return total
            }}
            return figure._fullData.map(t => [t.name, sum(t.intensity), sum(t.z), sum(t.y),
                t.visible, t.selectedpoints ? t.selectedpoints.length : null])
        }}""",
        name,
    )


def changed(page, name, before):
    """Wait until a figure draws something else, and return it."""
    for _ in range(100):
        page.wait_for_timeout(200)
        if state(page, name) != before:
            return state(page, name)
    raise AssertionError(f"the figure '{name}' did not change")


def box_of(page, name):
    """Where a figure's drawing area is on the page."""
    drawn(page, name)
    return page.evaluate(
        f"""name => {{
            const g = ({FIGURES})().find(g => g.layout.meta === name)
            g.scrollIntoView({{block: 'center'}})
            const box = g.getBoundingClientRect(), s = g._fullLayout._size
            return [box.x + s.l, box.y + s.t, s.w, s.h]
        }}""",
        name,
    )


def heading(page):
    return page.locator(".widget-html b").last.inner_text()


def shot(page, name):
    SHOTS.mkdir(exist_ok=True)
    page.screenshot(path=SHOTS / f"{name}.png")


def test_five_figures_are_drawn_without_overlap(page):
    shot(page, "explorer")
    boxes = page.evaluate(
        f"""() => ({FIGURES})().map(g => [g.getBoundingClientRect(), g.layout.meta])
            .map(([b, name]) => [b.left, b.top, b.right, b.bottom, name])"""
    )
    assert len(boxes) == 5
    for i, a in enumerate(boxes):
        assert a[2] - a[0] > 300
        assert a[3] - a[1] > (100 if a[4] == "labels" else 150)
        for b in boxes[:i]:
            apart = a[2] <= b[0] + 1 or b[2] <= a[0] + 1 or a[3] <= b[1] + 1 or b[3] <= a[1] + 1
            assert apart
    assert heading(page) == "attention of all tokens"


def test_nothing_can_be_uploaded(page):
    assert page.locator(".modebar-btn").count() > 10
    assert not offers_upload(page)


@pytest.mark.parametrize("width, height", [(1100, 900), (1440, 900), (1920, 1080)])
def test_all_panels_fit_a_screen(page, width, height):
    usual = page.viewport_size
    page.set_viewport_size({"width": width, "height": height})
    page.wait_for_timeout(2500)
    boxes = page.evaluate(
        f"""() => {{
            const all = ({FIGURES})()
            all[0].closest('.widget-gridbox').parentElement.scrollIntoView({{block: 'start'}})
            const inside = all.map(g => [g, ...g.querySelectorAll('.infolayer, .menulayer')])
            return inside.flat().map(e => e.getBoundingClientRect()).filter(b => b.width)
                .map(b => [b.left, b.top, b.right, b.bottom])
        }}"""
    )
    shot(page, f"explorer_{width}")
    page.set_viewport_size(usual)
    page.wait_for_timeout(1500)
    assert max(box[2] for box in boxes) <= width
    assert max(box[3] for box in boxes) <= height
    assert max(box[2] for box in boxes) > 0.9 * width  # nothing is left empty


def test_lasso_of_people_changes_the_cortex(page):
    brain, x, y, w, h = state(page, "brain"), *box_of(page, "people")
    corners = [(0.05, 0.05), (0.5, 0.02), (0.52, 0.95), (0.05, 0.97), (0.05, 0.05)]
    page.mouse.move(x + corners[0][0] * w, y + corners[0][1] * h)
    page.mouse.down()
    for cx, cy in corners[1:]:
        page.mouse.move(x + cx * w, y + cy * h, steps=12)
    page.mouse.up()
    changed(page, "brain", brain)
    loops = f"() => ({FIGURES})().flatMap(g => g.layout.selections || []).length === 0"
    page.wait_for_function(loops)  # the loop goes, its people stay
    dots = f"({FIGURES})().find(g => g.layout.meta === 'people')._fullData[0]"
    page.wait_for_function(f"() => {dots}.selectedpoints?.length")
    page.wait_for_timeout(1000)
    picked = state(page, "people")[0][-1]
    assert 0 < picked < 40
    assert page.get_by_text(f"{picked} of 40").count() == 1
    shot(page, "lasso")
    people = state(page, "people")
    page.get_by_role("button", name="Reset", exact=True).click()
    assert changed(page, "people", people)[0][-1] is None
    page.wait_for_function(loops)


def test_click_on_a_bar_of_a_label_keeps_its_people(page):
    people = state(page, "people")
    box_of(page, "labels")  # into view
    middle = page.evaluate(
        f"""() => {{
            const g = ({FIGURES})().find(g => g.layout.meta === 'labels')
            const box = [...g.querySelectorAll('.bars path')].map(b => b.getBoundingClientRect())
                .find(b => b.height > 5)
            return [box.x + box.width / 2, box.y + box.height / 2]
        }}"""
    )
    page.mouse.move(*middle)
    page.mouse.click(*middle)
    picked = changed(page, "people", people)[0][-1]
    assert 0 < picked < 40
    assert page.get_by_text(f"{picked} of 40").count() == 1
    shot(page, "bar")
    people = state(page, "people")
    page.get_by_role("button", name="Undo", exact=True).click()
    assert changed(page, "people", people)[0][-1] is None


def test_click_on_a_token_changes_cortex_and_slices(page):
    brain, slices = state(page, "brain"), state(page, "slices")
    x, y, w, h = box_of(page, "tokens")
    page.mouse.click(x + w * 5.5 / 8, y + h * 0.97)  # the bar of token 5 of 8
    changed(page, "brain", brain)
    changed(page, "slices", slices)
    assert heading(page) == "attention of token 5"
    shot(page, "token")


def test_click_on_the_cortex_selects_the_parcel_under_it(page):
    x, y, w, h = box_of(page, "brain")
    parcel = page.get_by_role("combobox", name="parcel")
    for at in (0.41, 0.43, 0.39, 0.44):  # from the middle of the left hemisphere's usual place
        page.mouse.move(x + w * at - 20, y + h * 0.5)
        page.mouse.move(x + w * at, y + h * 0.5, steps=4)
        page.wait_for_timeout(2000)  # software WebGL needs a moment to find what is hovered,
        page.mouse.down()
        page.wait_for_timeout(2000)  # and a frame to see the button
        page.mouse.up()
        page.wait_for_timeout(2000)
        if parcel.input_value():
            break
    assert "_LH_" in parcel.input_value()  # left of the middle is left
    shot(page, "parcel")


def test_typed_network_and_its_code(page):
    tokens = state(page, "tokens")
    page.get_by_role("combobox", name="parcel").fill("Default")
    page.get_by_role("combobox", name="parcel").press("Enter")
    changed(page, "tokens", tokens)
    page.get_by_role("button", name="Show code").click()
    page.wait_for_function(
        "() => document.querySelector('textarea:not(.xterm-helper-textarea)').value"
    )
    written = page.locator(".widget-textarea textarea").input_value()
    assert "bhx.region_map(latents, token=" in written
    shot(page, "code")


def test_the_picked_network_has_a_line_around_it_and_waiting_is_said(page):
    lines = {"left picked", "right picked"}
    brain, sign = state(page, "brain"), page.get_by_role("status").filter(has_text="Working")
    assert not sign.is_visible()
    page.get_by_role("combobox", name="parcel").fill("Limbic")
    page.get_by_role("combobox", name="parcel").press("Enter")
    sign.wait_for(state="visible")
    shot(page, "working")
    sign.wait_for(state="hidden")
    before, after = ({t[0]: t[3] for t in which} for which in (brain, state(page, "brain")))
    assert all(before[name] != after[name] != 0 for name in lines)
    shot(page, "picked")


def test_a_page_of_figures_loads_and_uploads_nothing(browser, tmp_path):
    import numpy as np
    from small_latents import make_latents

    import bhx
    from bhx.data.page import drawn
    from bhx.data.page import page as html

    latents = make_latents()
    figures = [
        bhx.plot_surface(bhx.region_map(latents)),
        bhx.plot_volume(overlay=bhx.region_map(latents, of="t1")),
        bhx.plot_tokens(latents),
        bhx.plot_latents(bhx.project(latents), color="age"),
    ]
    file = tmp_path / "page.html"
    file.write_text(html("Figures", "".join(drawn(figures))), encoding="utf-8")
    page = new_page(browser)
    page.goto(file.as_uri())
    page.wait_for_function(f"() => ({FIGURES})().length === {len(figures)}")
    assert np.diff(page.evaluate(f"() => ({FIGURES})().map(g => g.offsetTop)")).min() > 200
    assert not offers_upload(page)
    assert not page.reached
    shot(page, "page")


def test_the_saved_explorer_works_without_python(browser, tmp_path):
    """A loop around people, then a click on a token: the values are Python's."""
    import numpy as np
    from small_latents import make_latents

    import bhx

    explorer = bhx.explore(make_latents(n=40))
    page = new_page(browser)
    page.goto(explorer.save(tmp_path / "explorer.html").resolve().as_uri())
    page.wait_for_function("() => window.explorer")
    seen = lambda: page.evaluate("() => window.explorer")  # noqa: E731
    np.testing.assert_allclose(seen()["map"], explorer.surface_map(), atol=1e-6)

    x, y, w, h = box_of(page, "people")
    page.mouse.move(x + 0.05 * w, y + 0.05 * h)
    page.mouse.down()
    for cx, cy in [(0.5, 0.02), (0.52, 0.95), (0.05, 0.97), (0.05, 0.05)]:
        page.mouse.move(x + cx * w, y + cy * h, steps=12)
    page.mouse.up()
    page.wait_for_function("() => window.explorer.chosen.length < 40")
    page.wait_for_timeout(1000)
    explorer.select_subjects(explorer.subjects[seen()["chosen"]])
    np.testing.assert_allclose(seen()["map"], explorer.surface_map(), atol=1e-6)
    assert page.get_by_role("cell", name=f"{explorer.chosen.sum()} of 40").is_visible()

    x, y, w, h = box_of(page, "tokens")
    page.mouse.click(x + w * 5.5 / 8, y + h * 0.97)
    page.wait_for_function("() => window.explorer.token === 5")
    explorer.select_token(5)
    np.testing.assert_allclose(seen()["map"], explorer.surface_map(), atol=1e-6)
    ends = explorer.panels.brain.layout.coloraxis
    np.testing.assert_allclose(seen()["ends"], (ends.cmin, ends.cmax), atol=1e-6)
    drawn_map = page.evaluate(
        f"() => ({FIGURES})().find(g => g.layout.meta === 'brain').data[0].intensity"
    )
    assert set(np.float32(drawn_map)) <= set(np.float32(seen()["map"]))
    shot(page, "offline")

    # another color; those of a bar, and back again
    page.get_by_label("color").select_option("site")
    marker = page.evaluate(
        f"() => ({FIGURES})().find(g => g.layout.meta === 'people').data[0].marker"
    )
    look, _, legend = explorer.panels.markers_by("site")
    assert (marker["color"], marker["symbol"]) == (look["color"], look["symbol"])
    assert page.locator("#legend").inner_html() == legend
    page.evaluate(
        f"""() => ({FIGURES})().find(g => g.layout.meta === 'labels')
            .emit('plotly_click', {{points: [{{curveNumber: 2, pointIndex: 1}}]}})"""
    )
    before = explorer.state()
    explorer.filter(*[(name, names[1]) for name, (names, _) in explorer.bars.items()][1])
    assert seen()["chosen"] == np.flatnonzero(explorer.chosen).tolist()
    labels = f"({FIGURES})().find(g => g.layout.meta === 'labels')"
    page.wait_for_function(f"() => {labels}.data[2].y[1] === 100")  # it follows the map
    shares = page.evaluate(
        f"() => ({FIGURES})().find(g => g.layout.meta === 'labels').data.map(t => Array.from(t.y))"
    )
    for name, share in zip(explorer.bars, shares[::2], strict=True):
        counts = explorer.counts(name)[0]
        np.testing.assert_allclose(share, 100 * counts / counts.sum())
    page.get_by_role("button", name="Undo", exact=True).click()
    explorer.restore(before)
    assert seen()["chosen"] == np.flatnonzero(explorer.chosen).tolist()

    # two groups, compared; and back again
    press = lambda name: page.get_by_role("button", name=name, exact=True).click()  # noqa: E731
    first = explorer.subjects[explorer.chosen]
    press("Set group A")
    page.get_by_label("People: arrows").focus()
    page.keyboard.press("Escape")
    press("Set group B")
    assert page.get_by_text("people in common").is_visible()
    chosen = next(i for i in range(40) if not explorer.chosen[i] and explorer.has["bold"][i])
    for _ in range(chosen + 1):
        page.get_by_label("People: arrows").focus()
        page.keyboard.press("ArrowRight")
    assert seen()["chosen"] == [chosen]
    press("Set group B")
    explorer.compare(first, explorer.subjects[[chosen]])
    np.testing.assert_allclose(seen()["map"], explorer.surface_map(), atol=1e-6)
    ends = explorer.panels.brain.layout.coloraxis
    np.testing.assert_allclose(seen()["ends"], (ends.cmin, ends.cmax), atol=1e-6)
    drawn_scale = page.evaluate(
        f"() => ({FIGURES})().find(g => g.layout.meta === 'brain').layout.coloraxis.colorscale"
    )
    assert drawn_scale == [list(step) for step in ends.colorscale]
    shot(page, "offline-groups")
    press("Undo")
    assert seen()["chosen"] == [chosen]
    page.get_by_label("Hub tokens: arrows").focus()
    page.keyboard.press("ArrowLeft")
    assert seen()["token"] == 4

    press("Reset")
    page.wait_for_function("() => window.explorer.chosen.length === 40")
    assert seen()["token"] is None
    assert not page.reached
    assert not offers_upload(page)


def test_the_saved_explorer_has_all_maps_slices_and_places(browser, tmp_path):
    """Other maps than that seen when it was saved, the T1's planes, another map of the people."""
    import numpy as np
    import xarray as xr
    from small_latents import make_latents

    import bhx

    latents = make_latents(n=30)
    at = {"token": latents.token.values, "roi": latents.roi.values}
    one = xr.DataArray(np.random.default_rng(0).normal(size=(8, 100)), at, ("token", "roi"))
    points = {"UMAP": bhx.project(bhx.pool(latents))[:, ::-1].assign_attrs(long_name="UMAP")}
    points["UMAP"]["component"] = [1, 2]
    explorer = bhx.explore(latents, maps={"lesions": one.assign_attrs(units="r")}, points=points)
    page = new_page(browser)
    page.goto(explorer.save(tmp_path / "explorer.html").resolve().as_uri())
    page.wait_for_function("() => window.explorer?.cubes")
    seen = lambda: page.evaluate("() => window.explorer")  # noqa: E731
    figure = lambda name: f"({FIGURES})().find(g => g.layout.meta === '{name}')"  # noqa: E731
    np.testing.assert_allclose(seen()["cubes"], explorer.cube_map().values.ravel(), atol=1e-6)

    def same_slices():
        drawn = page.evaluate(f"() => {figure('slices')}.data.map(t => t.z)")
        for ours, theirs in zip(explorer.panels.slices.data, drawn, strict=True):
            np.testing.assert_allclose(theirs, ours.z, atol=1e-6)

    same_slices()
    shot(page, "offline-slices")
    for axis, stop in {"x": 24, "y": 30, "z": -8}.items():
        explorer.panels.sliders[axis].value = stop
        page.locator(f"#at-{axis}").fill(str(stop))
    same_slices()
    axes = page.evaluate(f"() => {figure('slices')}.layout.coloraxis")
    ours = explorer.panels.slices.layout.coloraxis
    np.testing.assert_allclose((axes["cmin"], axes["cmax"]), (ours.cmin, ours.cmax), atol=1e-6)
    numbers = lambda scale: [  # noqa: E731
        [float(x) for x in re.findall(r"[\d.]+", color)] for _, color in scale
    ]
    for there, here in zip(numbers(axes["colorscale"]), numbers(ours.colorscale), strict=True):
        np.testing.assert_allclose(there[:3], here[:3], atol=2)  # of 255
        np.testing.assert_allclose(there[3], [*here, 1][3], atol=2e-3)

    page.get_by_label("map of").select_option("lesions")
    explorer.select_map("lesions")
    page.get_by_label("Hub tokens: arrows").focus()
    page.keyboard.press("ArrowLeft")
    explorer.select_token(7)
    np.testing.assert_allclose(seen()["map"], explorer.surface_map(), atol=1e-6)
    layout = page.evaluate(f"() => {figure('brain')}.layout")
    assert layout["coloraxis"]["colorbar"]["title"]["text"] == "r"
    assert layout["title"]["text"] == "Lesions of token 7"

    x = page.evaluate(f"() => Array.from({figure('people')}._fullData[0].x)")
    np.testing.assert_allclose(x, points["UMAP"][:, 0], atol=1e-6)
    page.get_by_label("people by").select_option("PCA")
    x = page.evaluate(f"() => Array.from({figure('people')}._fullData[0].x)")
    np.testing.assert_allclose(x, explorer.layouts["PCA"][:, 0], atol=1e-6)
    title = page.evaluate(f"() => {figure('people')}.layout.xaxis.title.text")
    assert title.startswith("PCA 1")
    shot(page, "offline-places")
    assert not page.reached


def test_lecture_is_a_page_without_code(lecture, browser):
    page = new_page(browser)
    page.goto(lecture)
    page.wait_for_function(f"() => ({FIGURES})().length === 5")
    page.wait_for_timeout(4000)
    shot(page, "lecture")
    assert page.get_by_text("These brains are synthetic.").is_visible()
    assert page.locator(".jp-CodeCell .jp-InputArea, .jp-Editor, .highlight").count() == 0
    assert "bhx.embed" not in page.content()

    brain, slices = state(page, "brain"), state(page, "slices")
    assert max(intensity for _, intensity, *_ in brain) > 0  # drawn as it is, not as it began
    x, y, w, h = box_of(page, "tokens")
    page.mouse.click(x + w * 5.5 / 32, y + h * 0.97)  # the bar of token 5 of 32
    changed(page, "brain", brain)
    changed(page, "slices", slices)
    assert heading(page) == "attention of token 5"
    shot(page, "lecture_token")
