"""Do hub tokens of real people know what plain features know: BOLD of parcels, any atlas.

    python benchmarks/people.py --train table.npz --labels people.csv --atlas cc200.nii.gz \\
        --targets dx sex age --out people.json

A relational hub is trained on some people without any label; the others are embedded. Tables hold
one array (parcel x volume, or volume x parcel) a scan, named as the ids of --labels (columns
participant, site, tr, and the targets), or `sub-XXX_ses-K`. Without --test half of the people,
stratified by site, are tested, and the hub never saw them. Each label is predicted from the mean
and from all hub tokens, the same of the network untrained, connectome, flattened connectome, mean
and log SD of each parcel, and confounds: AUROC or r over all folds, with 95 % intervals over
people; folds over participants (stratified by site) and leaving one site out; from whole scans and
from the first two minutes. Identification is the share found again, both ways, between the halves
of a scan, or between sessions where people have two.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd

import bhx
from bhx.evaluate.features import CONFOUNDS, confound_features, signal_spread

SHORT = 120.0  # s


def main():
    """Train, embed, probe, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--train", type=Path, required=True, help="a table, or 'synthetic'")
    parser.add_argument("--test", type=Path, help="another table")
    parser.add_argument("--run", help="folder to keep the trained hub in, or one that holds it")
    parser.add_argument("--labels", type=Path)
    parser.add_argument("--atlas", required=True, help="name, or a label image")
    parser.add_argument("--targets", nargs="*", default=[])
    parser.add_argument("--tr", type=float, help="of all scans [s], where no label says it")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--hubs", type=int, default=64, help="hub tokens")
    parser.add_argument("--width", type=int, default=192, help="numbers of each")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    began = time.perf_counter()
    shipped = args.atlas in ("schaefer100", "schaefer200", "schaefer400")
    atlas = args.atlas if shipped else bhx.build_atlas(args.atlas, name=Path(args.atlas).name[:5])
    labels = pd.read_csv(args.labels) if args.labels else None
    train, test = people(args, atlas, labels)
    print(f"{len(train.subject)} scans to train on, {len(test.subject)} to test", flush=True)
    model = trained(train, args)
    print(f"trained, {time.perf_counter() - began:.0f} s", flush=True)
    found = {"scores": [], "identified": identified(test, model)}
    for length, cohort in {"whole": test, "two minutes": first_seconds(test)}.items():
        read = features(cohort, model)
        for target in args.targets:
            names = [n for n in CONFOUNDS if n in cohort.coords and n != target]
            plain = confound_features(cohort, names)
            found["scores"] += scores([*read.values(), plain], target, length)
    table = pd.DataFrame(found["scores"])
    if len(table):
        rows = ["length", "features"]
        print(table.pivot_table("text", rows, ["target", "folds"], "first", sort=False).to_string())
    print(pd.Series(found["identified"]).round(3).to_string())
    found |= {"train": len(train.subject), "test": len(test.subject), "steps": args.steps}
    found |= {"hubs": args.hubs, "width": args.width}
    found["seconds"] = round(time.perf_counter() - began)
    if args.out:
        args.out.write_text(json.dumps(found, indent=1) + "\n")


# Whom ---


def people(args, atlas, labels):
    """Cohorts to train on and to test."""
    train = cohort_of(args.train, atlas, labels, args.tr)
    if args.test:
        return train, cohort_of(args.test, atlas, labels, args.tr)
    shares = {"train": 0.5, "test": 0.5}
    part = bhx.split(train, shares=shares, stratify=["site"], seed=args.seed)[0]
    return train.sel(subject=part == "train"), train.sel(subject=part == "test")


def cohort_of(path, atlas, labels, tr):
    """A table of arrays as a cohort, or 300 synthetic people of no other benchmark."""
    if str(path) == "synthetic":
        cohort = bhx.synthetic_cohort(300, seed=77_000, atlas=atlas, missing=0.0)
        return cohort.assign_coords(has_t1=cohort.has_t1 & False).drop_vars("t1")
    with np.load(path) as table:
        names = [k for k in table if not k.startswith("mean_")]
        arrays = {k: table[k].astype("float32") for k in names}
    parcels = bhx.load_atlas(atlas).sizes["roi"] if isinstance(atlas, str) else atlas.sizes["roi"]
    arrays = {k: in_time(v, parcels) for k, v in arrays.items()}
    if labels is None:
        labels = pd.DataFrame({"subject": names, "site": "A"})
        labels["participant"] = labels.subject.str.split("_").str[0]
        labels["session"] = labels.subject.str.split("_ses-").str[-1]
        labels = labels.drop(columns="subject")
    else:
        labels = labels[labels.participant.isin(names)]
        names = labels.participant.tolist()
    return bhx.as_cohort([arrays[k] for k in names], labels, atlas=atlas, tr=tr)


def in_time(array, parcels):
    """(volume, parcel) of the first so many parcels, whichever way the array lies."""
    array = array if array.shape[1] in (parcels, 419) else array.T
    return array[:, :parcels]


def first_seconds(cohort):
    """The cohort with the beginning of each scan alone."""
    n = np.minimum(cohort.n_volumes, np.ceil(SHORT / cohort.tr).astype(int))
    return between(cohort, 0 * n, n)


def between(cohort, start, stop):
    """The cohort with volumes start to stop of each scan alone, moved to its beginning."""
    bold = np.full(cohort.bold.shape, np.nan, np.float32)
    for i, (a, b) in enumerate(zip(start.values, stop.values, strict=True)):
        bold[i, :, : b - a] = cohort.bold.values[i, :, a:b]
    return cohort.assign(bold=cohort.bold.copy(data=bold)).assign_coords(n_volumes=stop - start)


# What is measured ---


def trained(cohort, args):
    """A hub that was trained on those of the people whose parcels all have a signal."""
    if "coverage" in cohort.coords:
        cohort = cohort.isel(subject=np.flatnonzero(cohort.coverage == 1))
    if args.run and (Path(args.run) / "config.json").exists():
        return bhx.load_model(args.run)
    preset = bhx.PRESETS["workshop"].on_atlas(cohort.attrs["atlas"], cohort.sizes["roi"])
    sizes = replace(preset.reading(["coupling"]).harmonizer, hubs=args.hubs, width=args.width)
    preset = replace(preset, harmonizer=sizes)
    with tempfile.TemporaryDirectory() as out:
        settings = {"steps": args.steps, "seed": args.seed, "evaluate_every": args.steps}
        settings |= {"stage": "harmonizer", "preset": preset, "progress": False}
        return bhx.pretrain(cohort, out=args.run or out, **settings)


def features(cohort, model):
    """Name -> features of a cohort."""
    out, untrained = {}, bhx.random_model(model.config)
    for name, one in {"hub": model, "untrained hub": untrained}.items():
        latents = bhx.embed(cohort, one, missing_parcels="leave out", progress=False).load()
        for how in ("mean", "concatenate"):
            out[f"{name}, {'mean' if how == 'mean' else 'all tokens'}"] = bhx.pool(latents, how)
    out["connectome"] = bhx.connectome(cohort).compute()
    out["flattened connectome"] = bhx.connectome(cohort, kind="flattened").compute()
    out["mean and log SD"] = signal_spread(cohort).compute()
    return {name: f.assign_attrs(name=name) for name, f in out.items()}


def scores(read, target, length):
    """One row for each features and kind of folds."""
    for folds, how in {"stratified": {"stratify": "site"}, "site": {"groups": "site"}}.items():
        made = bhx.probe(read, target, seed=0, **how)
        table = bhx.compare(made)
        metric = "r" if "r" in table.index.get_level_values("metric") else "auroc"
        for name, row in table.xs(metric, level="metric").iterrows():
            text = f"{row.score:.2f} [{row.low:.2f}, {row.high:.2f}]"
            yield {"target": target, "folds": folds, "length": length, "features": name,
                   "metric": metric, "score": row.score, "low": row.low, "high": row.high,
                   "text": text}  # fmt: skip


def identified(cohort, model):
    """Features -> share of people found again, in another session or the other half of a scan."""
    twice = cohort.participant.to_series().value_counts()
    twice = sorted(twice.index[twice == 2])
    if twice:
        rows = [np.flatnonzero(cohort.participant == one) for one in twice]
        pair = [cohort.isel(subject=[r[k] for r in rows]) for k in (0, 1)]
    else:
        middle = cohort.n_volumes // 2
        pair = [between(cohort, 0 * middle, middle), between(cohort, middle, cohort.n_volumes)]
    first, second = (features(one, model) for one in pair)
    out = {}
    for name in first:
        a, b = (unit(np.nan_to_num(f[name].features.values)) for f in (first, second))
        near, own = a @ b.T, np.arange(len(a))
        out[name] = float(np.mean([near.argmax(1) == own, near.argmax(0) == own]))
    return out


def unit(values):
    """Rows without the mean person of the session, of length 1."""
    values = values - values.mean(0)
    return values / np.linalg.norm(values, axis=1, keepdims=True)


if __name__ == "__main__":
    main()
