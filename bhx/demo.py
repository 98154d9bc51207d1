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

TARGETS = {  # label -> what it is called on the page
    "age": "age (r)",
    "sex": "sex",
    "diagnosis": "diagnosis",
    "fusion": "structure against function: which of two planted traits is the larger, that of the "
    "head's shape or that of how parcels go together",
}


def run_demo(out="demo", *, subjects: int | None = None, model: str = "workshop") -> Path:
    """Embed the real sample scan and the synthetic cohort, score them, and write `out`.

    `out` gets `sample.zarr` and `latents.zarr` (latents), `cohort.zarr`, `scores.csv` with plain
    features beside every score, and `index.html`, which needs no network. A folder an earlier
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
        scores = probed(latents, cohort)
        table = bhx.compare(*scores, control="connectome")
        table.to_csv(out / "scores.csv")
    with _step("draw the page"):
        body = _body(table, _figures(sample, latents, cohort, scores[0]), latents)
        file = out / "index.html"
        file.write_text(page("bhx: a scan in, labeled tokens out", body), encoding="utf-8")
    print(main_scores(table).to_string())
    print(f"\nlatents   {out / 'latents.zarr'}, {out / 'sample.zarr'}")
    print(f"scores    {out / 'scores.csv'}")
    print(f"figures   {file}   <- open this in a browser")
    return file


def probed(latents, cohort):
    """Scores of the mean hub token and of plain features, on the same folds."""
    connectome, cubes = bhx.connectome(cohort).compute(), bhx.cube_means(cohort).compute()
    features = [bhx.pool(latents), connectome, cubes, bhx.fuse(connectome, cubes)]
    return [bhx.probe(features, target, stratify="site") for target in TARGETS]


def main_scores(table):
    """The scores to read first, with their intervals: a row a label, a column what it was predicted
    from; `scores.csv` has every metric."""
    rows = table[table.index.get_level_values("metric").isin(("r", "balanced_accuracy"))]
    text = [f"{s:.2f} [{a:.2f}, {b:.2f}]" for s, a, b in rows[["score", "low", "high"]].to_numpy()]
    rows = rows.assign(text=text).reset_index()
    columns = dict.fromkeys(rows["model"])
    return rows.pivot(index="target", columns="model", values="text").loc[list(TARGETS), [*columns]]


def _figures(sample, latents, cohort, age):
    """In the order of the page."""
    from bhx.evaluate.report import plot_predictions

    first = cohort[ANATOMY.variable].sel(subject=str(latents.subject.values[0]))
    people, cubes = bhx.project(bhx.pool(latents)), bhx.region_map(latents, of=ANATOMY.name)
    return [
        plot_predictions(age.isel(model=[0])),
        bhx.plot_latents(people, color="age", title="The synthetic cohort, colored by age"),
        bhx.plot_surface(bhx.region_map(sample), title="The real scan: parcels its tokens read"),
        bhx.plot_tokens(latents, title="Its hub tokens: which network, which modality"),
        bhx.plot_volume(first, overlay=cubes, title="T1 cubes that they read, on one subject"),
    ]


def _body(table, figures, latents):
    """The page's content as HTML."""
    made_by = " · ".join(
        f"{k}: {html.escape(str(latents.attrs[k])[:80])}"
        for k in ("model", "weights", "weights_sha256", "versions", "scaling")
    )
    first, *others = drawn(figures)
    scores = main_scores(table).rename(index=TARGETS).rename_axis(index=None, columns=None)
    return (
        "<p>Each person's T1 and fMRI became 32 hub tokens; their mean, 96 numbers, knows what is "
        "in either. Below, a dot is a person whose age was predicted from them by a ridge that was "
        "fitted to other people; nobody told the model how old anybody is.</p>"
        + first
        + "<p>What can be predicted from those 96 numbers, from the thousands of a connectome, "
        "from the T1 in blocks, and from both together: correlation r or balanced accuracy (0.5 is "
        "guessing), with 95 % intervals over people, in the same folds. No column wins every row. "
        "<b>The cohort is synthetic: it shows mechanics, not findings.</b></p>"
        + scores.to_html(border=0, na_rep="")
        + "".join(others)
        + "<p>Next: the lessons in notebooks/, or <code>python -m bhx explore</code> with the "
        "latents of this folder.</p>" + f"<footer>{made_by}</footer>"
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
