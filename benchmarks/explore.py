"""How long the explorer's kernel works for one interaction, and what it sends.

1,000 subjects x 128 tokens x 400 parcels x 1,200 T1 cubes, random numbers, widgets attached:

    OMP_NUM_THREADS=1 python benchmarks/explore.py [subjects]

With Chromium and Playwright also its page without Python: size, and from an event to what is drawn.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import xarray as xr

from bhx import load_atlas, plot_surface
from bhx.show.explorer import explore

REPEATS = 7
FLAGS = ["--no-sandbox", "--use-gl=angle", "--use-angle=swiftshader", "--enable-unsafe-swiftshader"]
# from an event of a figure until the frame with the new map, and until all figures are drawn [ms]
REDRAWN = """async ([figure, event, what]) => {
    const start = performance.now()
    document.getElementById(figure).emit(event, what)
    await new Promise(requestAnimationFrame)
    const map = performance.now() - start
    await new Promise(r => requestAnimationFrame(() => requestAnimationFrame(r)))
    return [map, performance.now() - start]
}"""


def random_latents(n: int, tokens: int = 128, features: int = 768, grid=(10, 12, 10)) -> xr.Dataset:
    """Latents of base size without any meaning."""
    rng = np.random.default_rng(0)
    atlas = load_atlas("schaefer400")
    share = rng.random((n, tokens), dtype="f4")
    ids = [f"sub-{i:04d}" for i in range(n)]

    def maps(*shape):
        values = rng.random((n, tokens, *shape), dtype="f4")
        return values / values.sum(axis=tuple(range(2, values.ndim)), keepdims=True)

    return xr.Dataset(
        {
            "hub": (("subject", "token", "feature"), rng.random((n, tokens, features), "f4")),
            "hub_to_roi": (("subject", "token", "roi"), maps(400)),
            "hub_to_t1": (("subject", "token", "cx", "cy", "cz"), maps(*grid)),
            "modality_share": (("subject", "token", "modality"), np.stack([share, 1 - share], -1)),
        },
        {
            "subject": ids,
            "token": np.arange(tokens),
            "modality": ["bold", "t1"],
            "roi": atlas.roi.values,
            "network": ("roi", atlas.network.values),
            "age": ("subject", rng.uniform(20, 80, n)),
            "site": ("subject", rng.choice(list("ABC"), n)),
        },
    )


def milliseconds(act, choices) -> np.ndarray:
    """Wall and processor time [ms] of an interaction under each of several choices."""
    clocks = time.perf_counter, time.process_time
    out = []
    for choice in choices:
        start = [clock() for clock in clocks]
        act(*choice)
        out.append([1000 * (clock() - s) for clock, s in zip(clocks, start, strict=True)])
    return np.array(out)


def main(n: int = 1000):
    """Print one line an interaction; on a busy machine the processor's time says more."""
    latents = random_latents(n)
    start = time.perf_counter()
    explorer = explore(latents)
    print(f"open: {time.perf_counter() - start:.1f} s for {latents.nbytes / 1e9:.1f} GB")
    start = time.perf_counter()
    panels = explorer.panels
    print(f"widgets: {time.perf_counter() - start:.1f} s")
    rng = np.random.default_rng(1)
    masks = [(rng.random(n) < rng.uniform(0.05, 0.95),) for _ in range(REPEATS)]
    pairs = [(m & (np.arange(n) % 2 > 0), ~m) for (m,) in masks]
    acts = {
        "select subjects": (explorer.select_subjects, masks),
        "select token": (
            explorer.select_token,
            [(int(t),) for t in rng.permutation(128)[:REPEATS]],
        ),
        "select parcel": (
            explorer.select_parcel,
            [(str(p),) for p in rng.choice(latents.roi.values, REPEATS)],
        ),
        "select network": (
            explorer.select_parcel,
            [(str(p),) for p in np.unique(latents.network.values)],
        ),
        "compare groups": (explorer.compare, pairs),
    }
    for name, (act, choices) in acts.items():
        times = milliseconds(act, choices)
        (wall, cpu), worst = np.median(times, 0), times[:, 0].max()
        print(f"{name:16s} median {wall:4.0f} ms (processor {cpu:4.0f} ms), worst {worst:4.0f} ms")
    sent = sum(len(trace.intensity) * 4 for trace in panels.brain.data if "values" in trace.name)
    print(f"sent to the cortex at each step: {sent / 1e3:.0f} kB of intensities, no mesh")
    figure = plot_surface(explorer.latents.hub_to_roi[0, 0])
    print(f"one mesh figure: {len(figure.to_json()) / 1e6:.2f} MB of JSON")
    browsers = map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))
    if browser := next(filter(None, browsers), None):
        explorer.reset()
        page_times(explorer, browser)


def page_times(explorer, browser: str):
    """Print the size of the page without Python, and how fast it answers."""
    from playwright.sync_api import sync_playwright

    rng = np.random.default_rng(2)
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as play:
        path = explorer.save(Path(folder, "explorer.html"))
        print(f"page: {path.stat().st_size / 1e6:.1f} MB")
        page = play.chromium.launch(executable_path=browser, args=FLAGS).new_page()
        start = time.perf_counter()
        page.goto(path.as_uri())
        page.wait_for_function("() => window.explorer")
        print(f"page opens in {time.perf_counter() - start:.1f} s")
        loops = [np.flatnonzero(rng.random(len(explorer.subjects)) < 0.3) for _ in range(REPEATS)]
        points = [{"points": [{"pointIndex": int(i)} for i in who]} for who in loops]
        bars = [{"points": [{"curveNumber": 2, "pointIndex": i % 3}]} for i in range(REPEATS)]
        acts = {"lasso": ("figure0", "plotly_selected", points)}
        acts["bar of a label"] = ("figure3", "plotly_click", bars)
        for name, (figure, event, choices) in acts.items():
            times = []
            for choice in choices:
                times.append(page.evaluate(REDRAWN, [figure, event, choice]))
                page.wait_for_timeout(300)
                page.evaluate("() => document.getElementById('undo').click()")
                page.wait_for_timeout(300)
            (first, last), worst = np.median(times, 0), np.max(times, 0)[0]
            print(f"page, {name}: map {first:.0f} ms (worst {worst:.0f}), all figures {last:.0f}")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:2]))
