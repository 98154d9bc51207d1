"""Draw the destination pictures of the lessons again: `python make_pictures.py [name ...]`.

Those that are a lesson's own stored figure are cut out of the executed notebook, so run
`make notebooks` first. The others are drawn with the shipped weights.
"""

import base64
import json
import sys
from io import BytesIO
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from PIL import Image

import bhx
from bhx.latents.maps import region_map
from bhx.show.hidden import hidden_cubes
from bhx.show.volume import plane_of

HERE = Path(__file__).parent


def five_sites():
    return stored("01_a_cohort_is_a_dataset", "top.set(title=f")


def accepted_scans():
    return stored("10_bring_your_own_scans", "top.set(title=subject")


def beside_controls():
    title = "age: r with the truth, synthetic people"
    return scored("08_does_it_beat_the_connectome", 'plot_scores(table, "r")', title, 0)


def fine_tune():
    return scored("09_fine_tune", "figure", "sex: AUROC, synthetic people", 0.5)


def scored(notebook, code, title, chance):
    """The dots and intervals of a stored figure of `plot_scores`."""
    (dots,) = stored(notebook, code)["data"]
    bar = dots["error_x"]
    low, score, high = (numbers(v) for v in (bar["arrayminus"], dots["x"], bar["array"]))
    figure, axis = plt.subplots(figsize=(8.2, 4.4), layout="constrained")
    axis.errorbar(score, dots["y"], xerr=(low, high), fmt="o", capsize=3)
    axis.axvline(chance, color="gray", linestyle=":")
    axis.invert_yaxis()
    axis.set(title=title, xlabel="mean over folds, 95 % interval")
    return beside(figure)


def real_people():
    figure, axis = plt.subplots(figsize=(8.2, 4.4), layout="constrained")
    for trace in stored("13_real_people", "Diagnosis, ABIDE I")["data"]:
        bar = trace["error_x"]
        error = numbers(bar["arrayminus"]), numbers(bar["array"])
        axis.errorbar(numbers(trace["x"]), trace["y"], xerr=error, fmt="o", label=trace["name"])
    axis.axvline(0.5, color="gray", linestyle=":")
    axis.invert_yaxis()
    axis.legend(frameon=False, loc="upper left")
    axis.set(title="Diagnosis, real people (ABIDE I)", xlabel="AUROC, 95 % interval")
    return beside(figure)


def while_it_runs():
    lines = stored("12_while_the_scan_runs", "Eight synthetic people")["data"]
    figure, axis = plt.subplots(figsize=(8.2, 4.4), layout="constrained")
    for line in lines:
        axis.plot(numbers(line["x"]), numbers(line["y"]), color=line["line"]["color"])
    axis.set(
        title="Eight synthetic people, while they are scanned (red: patients)",
        xlabel="minutes scanned",
        ylabel="probability of being a patient",
    )
    return beside(figure)


def right_and_misread():
    atlas, other = (bhx.load_atlas("schaefer400", order=f"{n}networks") for n in (7, 17))
    right = atlas.harmonics.sel(mode=7, drop=True)
    wrong = right.drop_vars(["network", "hemi"]).assign_coords(roi=other.roi.values)
    titles = {"mode 7": right, "under wrong names": wrong}
    return beside(
        *(bhx.plot_surface(v, title=t, static=True, hemi="left") for t, v in titles.items())
    )


def two_tables():
    bars = stored("11_released_weights", "figure = px.bar")["data"]
    figure, axis = plt.subplots(figsize=(8.2, 4.4), layout="constrained")
    for i, bar in enumerate(bars):
        color = bar["marker"]["color"]
        label = f"rows in the order of {bar['name']}"
        axis.bar(np.arange(2) + 0.4 * i - 0.2, numbers(bar["y"]), 0.38, color=color, label=label)
    axis.set_xticks([0, 1], ["harmonics", "gradients"])
    axis.set(
        title="How smooth the two tables of the stand-in are",
        ylabel="Moran's I, mean of ten columns",
    )
    axis.legend(frameon=False)
    return beside(figure)


def tokens_and_networks():
    cohort = bhx.open_cohort("synthetic").isel(subject=slice(24))
    cohort = cohort.sel(subject=cohort.has_bold & cohort.has_t1)
    table = bhx.token_table(embedded(cohort))
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(8.5, 5), sharey=True, layout="constrained", width_ratios=(3, 1)
    )
    change = np.log2(table.preference.transpose("token", "network"))
    shown = left.imshow(change, cmap="RdBu_r", vmin=-1.5, vmax=1.5, aspect="auto")
    left.set_xticks(range(table.sizes["network"]), table.network.values, rotation=45)
    left.set(ylabel="hub token, sorted", title="attention to a network, against an even spread")
    figure.colorbar(shown, ax=left, label="log2")
    start = np.zeros(table.sizes["token"])
    for name, color in zip(table.modality.values, ("#D55E00", "#0072B2"), strict=True):
        share = table.share.sel(modality=name).values
        right.barh(range(len(share)), share, left=start, color=color, label=name)
        start = start + share
    right.set(xlabel="share of what it takes in")
    right.legend(loc="lower center", bbox_to_anchor=(0.5, 1), frameon=False)
    return beside(figure)


def people_and_tokens():
    cohort = bhx.synthetic_cohort(30, seed=7, repeats=0.4, missing=0)
    latents = embedded(cohort)
    explorer = bhx.explore(latents)
    older = (latents.age > latents.age.median()).values
    explorer.select_parcel("Vis")
    explorer.compare(older, ~older)
    points = bhx.project(latents)
    figure, axis = plt.subplots(figsize=(6, 5), layout="constrained")
    for site in np.unique(points.site):
        axis.scatter(*points.values[(points.site == site).values].T, label=site)
    shares = [f"component {i + 1} ({share:.0%})" for i, share in enumerate(points.explained.values)]
    axis.set(title="people, by site", xlabel=shares[0], ylabel=shares[1])
    axis.legend(title="site", frameon=False)
    return beside(figure, explorer.figure())


def hub_on_surface():
    real = bhx.open_cohort("sample").sel(subject=["sub-010188"])
    attention = region_map(embedded(bhx.reparcellate(real, "schaefer100")))
    title = "Attention of all hub tokens, one real scan"
    return beside(bhx.plot_surface(attention, title=title, static=True))


def masked_brain():
    cohort = bhx.open_cohort("synthetic")
    brain = hidden_cubes(cohort, bhx.load_model("paper", device="cpu"), "sub-0001")
    titles = {"what the encoder sees": "visible", "what comes back": "returned", "the scan": "t1"}
    figure, axes = plt.subplots(1, 3, figsize=(8.5, 3.2), layout="constrained")
    for axis, (title, name) in zip(axes, titles.items(), strict=True):
        cut = plane_of(brain[name].fillna(0), "coronal", -20)
        axis.pcolormesh(cut.x, cut.z, cut, cmap="gray")
        axis.set(title=title, xlabel="x [mm]", aspect="equal")
    return beside(figure)


def _02_masked_and_returned():
    parts = stored("02_structure_as_cubes", "back = px.imshow")["data"]
    titles = ("one (synthetic) T1", "what the encoder sees", "what comes back", "mean of others")
    figure, axes = plt.subplots(1, 4, figsize=(10, 3.3), layout="constrained", sharey=True)
    for axis, title, part in zip(axes, titles, parts, strict=True):
        x, y, gray = (numbers(part[k]) for k in "xyz")
        axis.pcolormesh(x, y, gray.reshape(len(y), len(x)), cmap="gray", vmin=0, vmax=1000)
        axis.set(title=title, xlabel="x [mm]", aspect="equal", facecolor="lightblue")
    axes[0].set_ylabel("y [mm]")
    return beside(figure, height=330)


def _03_tokens_across_tr():
    shown = stored("03_function_at_any_tr", "lines = px.line")
    stranger = shown["layout"]["shapes"][0]["y0"]
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained", sharey=True)
    for line in shown["data"]:
        axis = axes[int(line["xaxis"] == "x2")]
        axis.plot(numbers(line["x"]), numbers(line["y"]), label=f"TR {line['name']}", lw=2)
    for axis, rule in zip(axes, ("35.28 s (bhx)", "whole volumes (TAPE)"), strict=True):
        axis.axhline(stranger, color="black", linestyle=":", label="another person's token")
        axis.set(title=f"a patch is {rule}", xlabel="patch")
    axes[0].set_ylabel("cosine to the token at TR 0.735 s")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center", fontsize=9)
    return beside(figure, height=330)


def embedded(cohort):
    """The latents of a cohort, with attention, from the shipped weights."""
    model = bhx.load_model("workshop", device="cpu")
    return bhx.embed(cohort, model, keep=("attention",)).load()


def stored(notebook, code):
    """What a notebook shows first under a cell with this code: a picture, or plotly's dict."""
    cells = json.loads((HERE.parent / f"{notebook}.ipynb").read_text("utf8"))["cells"]
    cells = [c for c in cells if c["cell_type"] == "code" and code in "".join(c["source"])]
    shown = next(o["data"] for cell in cells for o in cell["outputs"] if "data" in o)
    if "image/png" not in shown:
        return shown["application/vnd.plotly.v1+json"]
    return Image.open(BytesIO(base64.b64decode("".join(shown["image/png"]))))


def numbers(values):
    """An array as plotly stores it, plain or in base64."""
    if isinstance(values, dict):
        return np.frombuffer(base64.b64decode(values["bdata"]), values["dtype"])
    return np.array(values, float)


def beside(*figures, height=430):
    """Matplotlib figures as one image, side by side."""
    images = []
    for figure in figures:
        buffer = BytesIO()
        figure.savefig(buffer, dpi=90, facecolor="white", bbox_inches="tight")
        image = Image.open(buffer)
        images.append(image.resize((image.width * height // image.height, height)))
    out = Image.new("RGB", (sum(image.width for image in images), height), "white")
    for i, image in enumerate(images):
        out.paste(image, (sum(before.width for before in images[:i]), 0))
    return out


PICTURES = (five_sites, accepted_scans, beside_controls, fine_tune, right_and_misread)
PICTURES += (while_it_runs, real_people)
PICTURES += (two_tables, tokens_and_networks, people_and_tokens, hub_on_surface, masked_brain)
PICTURES += (_02_masked_and_returned, _03_tokens_across_tr)

if __name__ == "__main__":
    for name, draw in ((draw.__name__.lstrip("_"), draw) for draw in PICTURES):
        if name in (sys.argv[1:] or [name]):
            draw().convert("RGB").save(HERE / f"{name}.png", optimize=True)
