"""The main job of `python -m bhx demo`: one real scan and one cohort to tokens, scores and a page.

Nothing is decided here that a user would not decide in the same words; see the README's ten lines.
"""

from __future__ import annotations

import html
import shutil
import time
from contextlib import contextmanager
from pathlib import Path

import bhx
from bhx.data.page import drawn, page
from bhx.modalities.t1 import ANATOMY

TARGETS = ("age", "sex", "diagnosis", "fusion")


def run_demo(out="demo", *, subjects: int | None = None, model: str = "workshop") -> Path:
    """Embed the real sample scan and the synthetic cohort, score them, and write `out`.

    `out` gets `sample.zarr` and `latents.zarr` (latents), `cohort.zarr`, `scores.csv` with the
    connectome beside every score, and `index.html`, which needs no network. A folder an earlier
    demo made is made anew; any other is refused.

    Returns
    -------
    Path of the page.
    """
    out = _fresh(Path(out))
    with _step("load the model"):
        network = bhx.load_model(model)
    with _step("embed the real scan and the MNI152 T1"):
        sample = bhx.reparcellate(bhx.open_cohort("sample"), network.config.atlas)
        sample = bhx.embed(sample, network, store=out / "sample.zarr", keep=("attention",)).load()
    with _step("simulate the synthetic cohort"):
        cohort = bhx.open_cohort("synthetic").isel(subject=slice(subjects))
        cohort = bhx.open_cohort(bhx.save_cohort(cohort, out / "cohort.zarr"))
    with _step("embed the cohort"):
        latents = bhx.embed(cohort, network, store=out / "latents.zarr", keep=("attention",)).load()
    with _step("score, with the control beside the claim"):
        table = score_table(latents, cohort)
        table.to_csv(out / "scores.csv")
    with _step("draw the page"):
        body = _body(table, _figures(sample, latents, cohort), latents)
        file = out / "index.html"
        file.write_text(page("bhx: a scan in, labeled tokens out", body), encoding="utf-8")
    print(main_scores(table).to_string())
    print(f"\nlatents   {out / 'latents.zarr'}, {out / 'sample.zarr'}")
    print(f"scores    {out / 'scores.csv'}")
    print(f"figures   {file}   <- open this in a browser")
    return file


def score_table(latents, cohort):
    """Scores of the pooled hub tokens and of the plain connectome, on the same folds."""
    ours, control = bhx.pool(latents), bhx.connectome(cohort).compute()
    scores = [bhx.probe([ours, control], target, stratify="site") for target in TARGETS]
    return bhx.compare(*scores, control=control.attrs["name"])


def main_scores(table):
    """The rows to read first; `scores.csv` has every metric."""
    return table[table.index.get_level_values("metric").isin(("r", "mae", "balanced_accuracy"))]


def _figures(sample, latents, cohort):
    """In the order of the page."""
    first = cohort[ANATOMY.variable].sel(subject=str(latents.subject.values[0]))
    people, cubes = bhx.project(bhx.pool(latents)), bhx.region_map(latents, of=ANATOMY.name)
    return [
        bhx.plot_surface(bhx.region_map(sample), title="The real scan: parcels its tokens read"),
        bhx.plot_latents(people, color="age", title="The synthetic cohort, colored by age"),
        bhx.plot_tokens(latents, title="Its hub tokens: which network, which modality"),
        bhx.plot_volume(first, overlay=cubes, title="T1 cubes that they read, on one subject"),
    ]


def _body(table, figures, latents):
    """The page's content as HTML."""
    made_by = " · ".join(
        f"{k}: {html.escape(str(latents.attrs[k])[:80])}"
        for k in ("model", "weights", "weights_sha256", "versions", "scaling")
    )
    return (
        "<p>Every score of the hub tokens stands beside the same estimator on the plain "
        "connectome. <b>The cohort is synthetic: it shows mechanics, not findings.</b></p>"
        + main_scores(table).to_html(border=0, na_rep="")
        + drawn(figures)
        + f"<footer>{made_by}</footer>"
    )


def _fresh(out):
    if out.exists() and any(out.iterdir()):
        if not (out / ".bhx-demo").exists():
            fact = f"Expected an empty folder or one of an earlier demo, found files in '{out}'"
            raise bhx.InputError(fact, "Choose another with --out")
        shutil.rmtree(out)
    out.mkdir(parents=True, exist_ok=True)
    (out / ".bhx-demo").touch()
    return out


@contextmanager
def _step(name):
    print(f"{name} ...", flush=True)
    start = time.perf_counter()
    yield
    print(f"    {time.perf_counter() - start:.1f} s", flush=True)
