"""What hub tokens know that no model has been told, beside what plain features know.

    python benchmarks/hub.py [--model workshop] [--seeds 101 102 103] [--out hub.json]
    python benchmarks/hub.py --stages ts.npz      # real people seen twice, beside it

Synthetic people of cohorts that no model has seen, all with both modalities: age, sex, diagnosis
and the planted traits are predicted from the mean hub token, with both modalities, with BOLD or T1
alone, from the first two minutes, and from every second, third and fourth volume. Controls are the
same network untrained, connectome, flattened connectome, cube means, and both modalities together.

Predictions are those of `bhx.probe`, five folds stratified by site: r for numbers, balanced
accuracy for labels, the mean over cohorts with a 95 % interval from a bootstrap over people within
each.
Who is who: the share of people found again in another session by all hub tokens, each session
centered. --stages names a table of series `sub-XXX_ses-K` (rows of 400 Schaefer parcels first).
Settings were chosen on seeds 101 to 103; seeds 0 to 2 are for reporting.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import pandas as pd
import xarray as xr

import bhx
from bhx.schema import build_cohort

TESTED, SHORT = 212, 120.0  # participants of a cohort; seconds of a short scan
YEAR = 104  # seed of the people who are seen twice
QUESTIONS = {  # column of the table -> what is read, and the label
    "age": ("both", "age"),
    "sex": ("both", "sex"),
    "diagnosis": ("both", "diagnosis"),
    "structure": ("both", "trait_structure"),
    "function": ("both", "trait_function"),
    "fusion": ("both", "fusion"),
    "diagnosis, BOLD": ("bold", "diagnosis"),
    "function, BOLD": ("bold", "trait_function"),
    "age, T1": ("t1", "age"),
    "diagnosis, 2 min": ("short", "diagnosis"),
    "function, 2 min": ("short", "trait_function"),
    "function, TR x1": ("bold", "trait_function"),
    "function, TR x2": ("TR x2", "trait_function"),
    "function, TR x3": ("TR x3", "trait_function"),
    "function, TR x4": ("TR x4", "trait_function"),
}


def main():
    """Embed, probe, print, and write what was found."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="workshop")
    parser.add_argument("--seeds", type=int, nargs="+", default=[101, 102, 103])
    parser.add_argument("--stages", type=Path)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    trained = bhx.load_model(args.model, device="cpu")
    models = {"hub": trained, "untrained hub": bhx.random_model(trained.config, device="cpu")}
    predictions = {seed: predicted(seed, models) for seed in args.seeds}
    table = with_intervals(predictions)
    print(table.to_string(), flush=True)
    again = {"synthetic, after a year": found_again(after_a_year(), models)}
    if args.stages:
        again["STAGES, after three months"] = found_again(stages(args.stages), models)
    print(pd.DataFrame(again).round(3).to_string())
    if args.out:
        found = {"model": args.model, "seeds": args.seeds, "scores": table.to_dict("index")}
        args.out.write_text(json.dumps(found | {"found again": again}, indent=1) + "\n")


# Whom ---


def people(seed):
    """Synthetic people of one cohort who have both modalities, in memory."""
    cohort = bhx.synthetic_cohort(TESTED, seed=seed)
    return cohort.isel(subject=np.flatnonzero(cohort.has_bold & cohort.has_t1)).load()


def first_seconds(cohort, seconds):
    """The cohort with the beginning of each scan alone."""
    n = np.minimum(cohort.n_volumes, np.ceil(seconds / cohort.tr).astype(int))
    bold = cohort.bold.where(xr.DataArray(np.arange(cohort.sizes["time"]), dims="time") < n)
    return cohort.assign(bold=bold).assign_coords(n_volumes=n)


def every(cohort, k):
    """The cohort with every k-th volume of each scan."""
    n = -(-cohort.n_volumes // k)
    return cohort.isel(time=slice(None, None, k)).assign_coords(tr=cohort.tr * k, n_volumes=n)


def after_a_year():
    """80 synthetic people, BOLD of both sessions."""
    return bhx.synthetic_cohort(80, seed=YEAR, missing=0, repeats=1.0)[["bold"]].load()


def stages(path):
    """People of the table who have two sessions, on 100 parcels."""
    table = np.load(path)
    rows = sorted(k for k in table if k.startswith("sub-"))
    who = pd.Series(rows).str.split("_").str[0]
    rows = [r for r in rows if (who == r.split("_")[0]).sum() == 2]
    series = np.stack([table[r][:400].astype("float32") for r in rows])
    atlas = bhx.load_atlas("schaefer400")
    subject = {
        "subject": rows, "participant": [r.split("_")[0] for r in rows], "site": ["A"] * len(rows),
        "tr": [2.0] * len(rows), "n_volumes": [series.shape[2]] * len(rows),
        "has_bold": [True] * len(rows),
    }  # fmt: skip
    roi = {"roi": atlas.roi.values, "network": atlas.network.values, "hemi": atlas.hemi.values}
    roi |= {k: atlas[k].values for k in ("mni_x", "mni_y", "mni_z")}
    cohort = build_cohort(
        {"bold": series}, subject, roi, {"atlas": "schaefer400", "source": "STAGES"}
    )
    return bhx.reparcellate(cohort, "schaefer100").load()


# What is measured ---


def predicted(seed, models):
    """(features, question) -> prediction and truth of the people of one cohort."""
    cohort, out = people(seed), {}
    short = first_seconds(cohort[["bold"]], SHORT)
    views = {"both": cohort, "bold": cohort[["bold"]], "t1": cohort[["t1"]], "short": short}
    views |= {f"TR x{k}": every(cohort[["bold"]], k) for k in (2, 3, 4)}
    read = {view: features(one, models) for view, one in views.items()}
    for question, (view, target) in QUESTIONS.items():
        scores = bhx.probe(list(read[view].values()), target, stratify="site", seed=0)
        for name, one in zip(read[view], scores.prediction, strict=True):
            out[name, question] = one.values, scores.truth.values
    print(f"cohort {seed}: {cohort.sizes['subject']} people", flush=True)
    return out


def features(cohort, models):
    """Name -> features of a view of the cohort."""
    out = {}
    for name, model in models.items():
        out[name] = bhx.pool(bhx.embed(cohort, model, progress=False).load())
    plain = {}
    if "bold" in cohort:
        plain["connectome"] = bhx.connectome(cohort).compute()
        plain["flattened connectome"] = bhx.connectome(cohort, kind="flattened").compute()
    if "t1" in cohort:
        plain["cube means"] = bhx.cube_means(cohort).compute()
    if len(plain) == 3:
        plain["connectome + cubes"] = bhx.fuse(plain["connectome"], plain["cube means"])
    out |= plain
    return {name: f.assign_attrs(name=name) for name, f in out.items()}


def score(guess, truth):
    """r of numbers, balanced accuracy of labels."""
    if np.issubdtype(truth.dtype, np.floating):
        return np.corrcoef(guess.astype(float), truth)[0, 1]
    return np.mean([(guess[truth == label] == label).mean() for label in np.unique(truth)])


def with_intervals(predictions, draws=1000):
    """Features x questions: "mean [low, high]" over cohorts."""
    random, cells = np.random.default_rng(0), {}
    for key in next(iter(predictions.values())):
        each = [found[key] for found in predictions.values()]
        mean = np.mean([score(*one) for one in each])
        drawn = []
        for _ in range(draws):
            picks = [random.integers(len(truth), size=len(truth)) for _, truth in each]
            pairs = zip(each, picks, strict=True)
            drawn.append(np.mean([score(guess[i], truth[i]) for (guess, truth), i in pairs]))
        low, high = np.quantile(drawn, [0.025, 0.975])
        cells[key] = f"{mean:.3f} [{low:.2f}, {high:.2f}]"
    table = pd.Series(cells).unstack()
    order = dict.fromkeys(name for name, _ in cells)
    return table.loc[list(order), list(QUESTIONS)].fillna("")


def found_again(cohort, models):
    """Name -> share of people most like themselves in the other session, both ways."""
    out = {}
    everything = features(cohort, {}) | {
        f"{name}, {how}": bhx.pool(bhx.embed(cohort, model, progress=False).load(), how)
        for name, model in models.items()
        for how in ("mean", "concatenate")
    }
    for name, one in everything.items():
        values = one.features.values
        first, second = (v - v.mean(0) for v in (values[0::2], values[1::2]))
        a, b = (v / np.linalg.norm(v, axis=1, keepdims=True) for v in (first, second))
        near, own = a @ b.T, np.arange(len(a))
        out[name] = float(np.mean([near.argmax(1) == own, near.argmax(0) == own]))
    return out


if __name__ == "__main__":
    main()
