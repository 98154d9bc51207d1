"""Which map of a hub token deserves to be shown: attention, integrated gradients or lesions.

    python benchmarks/maps.py [--model workshop] [--seed 101] [--people 24] [--out maps.json]

For people that no model has seen, three maps (token, parcel) of each person's BOLD: attention of
the last layer; the size of integrated gradients; and the distance that a token moves when the
parcel is removed from the scan. Tokens are taken before the sketch, which is fixed and random. For
each map:

repeats      correlation over parcels between the two halves of a scan, mean over tokens and people
             ("mean": of the mean map over people)
own          the same after the mean map over people is taken out: is it about this person
untrained    correlation of the mean map with that of the same network untrained
lesions      correlation with the lesion map of the same scan: does it foretell what matters
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import pandas as pd
import torch

import bhx
from bhx.encode.inputs import Reading, encode_readings, read_subject, sequences
from bhx.modalities.coupling import COUPLING
from bhx.model.harmonizer import Harmonizer

STEPS = 8  # of the way that gradients are summed on


def main():
    """Compute the maps, compare them, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="workshop")
    parser.add_argument("--seed", type=int, default=101)
    parser.add_argument("--people", type=int, default=24)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    trained = bhx.load_model(args.model, device="cpu")
    untrained = bhx.random_model(trained.config, device="cpu")
    cohort = bhx.synthetic_cohort(args.people, seed=args.seed, missing=0)[["bold"]].load()
    whole, first, second = ([maps_of(trained, one, part) for one in scans(cohort)] for part in
                            (slice(None), 0, 1))  # fmt: skip
    random = [maps_of(untrained, one, slice(None)) for one in scans(cohort)]
    table = {kind: compared(kind, whole, first, second, random) for kind in whole[0]}
    table = pd.DataFrame(table).T.round(3)
    print(table.to_string())
    if args.out:
        found = {"model": args.model, "seed": args.seed, "people": args.people}
        args.out.write_text(json.dumps(found | {"maps": table.to_dict("index")}, indent=1) + "\n")


def scans(cohort):
    """(series, facts) of each person."""
    for i in range(cohort.sizes["subject"]):
        n = int(cohort.n_volumes[i])
        yield cohort.bold.values[i, :, :n], {"tr": float(cohort.tr[i]), "n_volumes": n}


def maps_of(model, scan, half):
    """Kind of map -> (token, parcel) of a scan, or of a half of it."""
    series, facts = scan
    if not isinstance(half, slice):
        middle = series.shape[1] // 2
        series = series[:, middle:] if half else series[:, :middle]
        facts = facts | {"n_volumes": series.shape[1]}
    reading = read_subject({COUPLING.variable: series}, facts, model.config)
    x = reading.windows[COUPLING.name][0]
    with torch.no_grad():
        attention = model.networks.harmonizer.attention([subject(model, x)])[0][COUPLING.name]
        tokens = learned(model, x)
    return {
        "attention": attention.numpy(),
        "gradients": gradients(model, x),
        "lesions": lesions(model, series, facts, tokens),
    }


def subject(model, x):
    """What the harmonizer reads of a coupling (parcel, parcel)."""
    reading = Reading({COUPLING.name: [x]}, {COUPLING.name: [torch.arange(len(x))]})
    tokens = encode_readings(model.networks, [reading], model.device)
    return sequences(model.config, [reading], tokens).subjects[0]


def learned(model, x):
    """Hub tokens (token, width) before the sketch."""
    hub, one = model.networks.harmonizer, [subject(model, x)]
    return (hub(one) if isinstance(hub, Harmonizer) else hub.read(one))[0]


def gradients(model, x):
    """Size of integrated gradients (token, parcel), from the mean person to this one."""
    empty = model.networks.encoder(COUPLING.name).mean
    with torch.no_grad():
        way = learned(model, x) - learned(model, empty)
        way = way / way.norm(dim=1, keepdim=True)
    total = torch.zeros(len(way), *x.shape)
    for share in (np.arange(STEPS) + 0.5) / STEPS:
        at = (empty + float(share) * (x - empty)).requires_grad_()
        along = (learned(model, at) * way).sum(1)
        for token in range(len(way)):
            total[token] += torch.autograd.grad(along[token], at, retain_graph=True)[0]
    return (total / STEPS * (x - empty)).sum(-1).abs().numpy()


@torch.no_grad()
def lesions(model, series, facts, tokens):
    """How far each token moves (token, parcel) when a parcel is not measured."""
    moved = []
    for parcel in range(len(series)):
        cut = series.copy()
        cut[parcel] = np.nan
        reading = read_subject({COUPLING.variable: cut}, facts, model.config, missing="leave out")
        made = encode_readings(model.networks, [reading], model.device)
        one = sequences(model.config, [reading], made).subjects
        moved.append((model.networks.harmonizer.read(one)[0] - tokens).norm(dim=1))
    return torch.stack(moved, 1).numpy()


def compared(kind, whole, first, second, random):
    """The four numbers of one kind of map."""
    whole, lesion = (np.stack([one[k] for one in whole]) for k in (kind, "lesions"))
    first, second, random = (np.stack([m[kind] for m in each]) for each in (first, second, random))
    return {
        "repeats": alike(first, second),
        "repeats, mean": alike(first.mean(0), second.mean(0)),
        "own": alike(first - first.mean(0), second - second.mean(0)),
        "untrained": alike(whole.mean(0), random.mean(0)),
        "lesions": alike(whole, lesion),
        "lesions, mean": alike(whole.mean(0), lesion.mean(0)),
    }


def alike(a, b):
    """Mean correlation over the last dim."""
    a, b = (x - x.mean(-1, keepdims=True) for x in (a, b))
    size = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
    return float(((a * b).sum(-1) / np.maximum(size, 1e-12)).mean())


if __name__ == "__main__":
    main()
