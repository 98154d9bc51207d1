"""Can hub tokens know as much as a connectome: the relational hub, trained and probed.

    python benchmarks/hub.py [--people 800] [--steps 400] [--seeds 101 102 103]
    python benchmarks/hub.py --people 60 --steps 5    # does it run; the numbers mean nothing

Reads synthetic people once (kept in --cache, about 0.5 GB), trains a small hub whose distances
between people must agree with those of two plain teachers, and prints what can be predicted from a
connectome, a flattened connectome, and the mean hub token before and after training. What was found
with it is in benchmarks/README.md. Cohort seeds 0 to 2 are reserved for a final report: choose
nothing on them.

BOLD enters as C^0.35, the correlation matrix of the parcels with its eigenvalues to the power 0.35,
a token a parcel; the T1 as its cubes, a token a cube. Predictions are those of `bhx.probe`, pooled
over five folds stratified by site: r for numbers, balanced accuracy for labels. "After a year" is
the share of 80 people found again among each other by all tokens of another scan.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import xarray as xr
from torch import nn
from torch.nn import functional as F

import bhx
from bhx.encode.inputs import read_subject
from bhx.modalities.bold import BOLD
from bhx.modalities.t1 import ANATOMY
from bhx.model.config import PRESETS
from bhx.schema import subject_coords

CONFIG = PRESETS["workshop"]
PARCELS, CUBES = CONFIG.dynamics.parcels, math.prod(CONFIG.structure.grid)
SIZES = {BOLD.name: (PARCELS, PARCELS), ANATOMY.name: (CUBES, CONFIG.structure.cube**3)}
UPPER = np.triu_indices(PARCELS, 1)
WIDTH, HUBS, HEADS, DEPTH = 96, 32, 8, 2
POWER = 0.35  # of the eigenvalues of a correlation matrix
SHORT = 3  # patches of a short scan, 106 s
SLOWEST = 6.01  # TR [s] of a thinned scan
CROPS, THINNED = 9, 3  # stretches of each training scan, so many of them of a thinned copy
TRAIN, YEAR, TESTED = 20_000, 104, 212  # seeds of other cohorts; participants of a tested one

# Training. The teachers' scores are singular values to the power FLAT, the first K of them.
BATCH, RATE, DECAY, BETAS, CLIP, WARM = 64, 2e-3, 0.05, (0.9, 0.95), 1.0, 0.1
K_FUNCTION, K_STRUCTURE, FLAT, FUNCTION = 32, 48, 0.5, 1.5
WHOLE, GONE = 0.3, 0.1  # how often a scan is whole, and a modality is left out
GAIN = 2.0  # of the fixed sketch

# column of the table -> what the hub read, and the label
QUESTIONS = {
    "age": ("both", "age"),
    "sex": ("both", "sex"),
    "dx": ("both", "diagnosis"),
    "structure": ("both", "trait_structure"),
    "function": ("both", "trait_function"),
    "fusion": ("both", "fusion"),
    "dx, BOLD only": ("bold", "diagnosis"),
    "function, BOLD only": ("bold", "trait_function"),
    "age, T1 only": ("t1", "age"),
    "dx, 3 patches": ("short", "diagnosis"),
    "function, 3 patches": ("short", "trait_function"),
}


def main():
    """Read, train, probe; print the table and write it where --out says."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--people", type=int, default=800)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seeds", type=int, nargs="+", default=[101, 102, 103])
    parser.add_argument("--cache", type=Path, default=bhx.folders()["cache"] / "hub")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    began = time.perf_counter()
    people = Training(read(with_both(TRAIN, args.people), args.cache, crops=True))
    print(f"{people.n} people read, {time.perf_counter() - began:.0f} s", flush=True)
    torch.manual_seed(0)
    hubs = {"untrained hub": Hub(people.scale).eval()}
    hubs["trained hub"] = trained(people, args.steps)
    year, found = pd.Series(after_a_year(hubs, args.cache)), []
    for seed in args.seeds:
        found += probed(seed, hubs, args.cache)
        table = pd.DataFrame(found).pivot_table("score", "features", "question", sort=False)
        table = table[list(QUESTIONS)].assign(**{"after a year": year}).round(3)
        print(f"mean over cohorts up to {seed}\n{table.to_string()}", flush=True)
    if args.out:
        facts = {"people": people.n, "steps": args.steps, "seeds": args.seeds}
        rows = {name: row.dropna().to_dict() for name, row in table.iterrows()}
        args.out.write_text(json.dumps(facts | {"table": rows}, indent=1) + "\n")


# What is read ---


def with_both(seed, people=None):
    """Synthetic people who have BOLD and T1: the first so many, or those of a tested cohort."""
    n = TESTED if people is None else int(1.1 * people) + 20
    cohort = bhx.synthetic_cohort(n, seed=seed)
    return cohort.isel(subject=np.flatnonzero(cohort.has_bold & cohort.has_t1)[:people])


def read(cohort, folder, crops=False):
    """Name -> tensor (subject, ...) of what the hub and the controls read, kept in a file.

    whole, short : C^0.35 of the scan and of its first three patches, (parcel, parcel)
    plain, plain_short : Fisher z of the same seconds of BOLD, (pair)
    cubes : of the T1, (cube, voxel)
    crops : with `crops`, C^0.35 of stretches of two patches to all, (crop, parcel, parcel)
    """
    path = folder / f"{cohort.attrs['seed']}-{cohort.sizes['subject']}.pt"
    if path.exists():
        return torch.load(path)
    random, rows = np.random.default_rng(5), []
    for i in range(cohort.sizes["subject"]):
        one = cohort.isel(subject=i).load()
        series, tr = one[BOLD.name].values[:, : int(one.n_volumes)], float(one.tr)
        patches = patches_of(series, tr)
        facts = {"tr": tr, "n_volumes": series.shape[1]}
        anatomy = read_subject({ANATOMY.name: one[ANATOMY.name].values}, facts, CONFIG)
        short = math.ceil(SHORT * CONFIG.dynamics.patch_seconds / tr)
        row = {
            "whole": flattened(patches), "short": flattened(patches[:, :SHORT]),
            "plain": fisher_z(series), "plain_short": fisher_z(series[:, :short]),
            "cubes": anatomy.windows[ANATOMY.name][0].half(),
        }  # fmt: skip
        if crops:
            row["crops"] = stretches(series, tr, patches, random)
        rows.append(row)
    out = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(out, path)
    return out


def patches_of(series, tr):
    """BOLD (parcel, volume) at `tr` [s] to patches (parcel, patch, sample)."""
    facts = {"tr": tr, "n_volumes": series.shape[1]}
    return torch.cat(read_subject({BOLD.name: series}, facts, CONFIG).windows[BOLD.name], 1)


def flattened(patches):
    """Correlation matrix of the parcels, its eigenvalues to the power 0.35."""
    x = patches.flatten(1)
    x = F.normalize(x - x.mean(1, keepdim=True), dim=1, eps=1e-6)
    value, vector = torch.linalg.eigh(x @ x.T)
    return (vector * value.clamp(min=1e-4) ** POWER) @ vector.T


def fisher_z(series):
    """The connectome of `bhx.connectome`, of some volumes."""
    r = np.corrcoef(series)[UPPER]
    return torch.from_numpy(np.arctanh(np.clip(r, -1 + 1e-7, 1 - 1e-7)).astype(np.float32))


def stretches(series, tr, patches, random):
    """C^0.35 of random stretches of a scan and of a copy of it thinned two to four times."""
    k = int(random.choice([k for k in (2, 3, 4) if k * tr <= SLOWEST]))
    thin = np.ascontiguousarray(series[:, int(random.integers(k)) :: k])
    copies = [patches] * (CROPS - THINNED) + [patches_of(thin, k * tr)] * THINNED
    out = []
    for x in copies:
        length = int(random.integers(2, x.shape[1] + 1))
        start = int(random.integers(x.shape[1] - length + 1))
        out.append(flattened(x[:, start : start + length]).half())
    return torch.stack(out)


class Training:
    """People to train on, and what is fitted on them: how inputs are scaled, and the teachers."""

    def __init__(self, x):
        self.whole, self.crops, self.n = x["whole"], x["crops"], len(x["whole"])
        cubes = x["cubes"].float()
        self.scale = {BOLD.name: spread(self.whole), ANATOMY.name: spread(cubes)}
        self.cubes = cubes
        mean, width = self.scale[ANATOMY.name]
        self.function = teacher(self.whole[:, UPPER[0], UPPER[1]], K_FUNCTION)
        self.structure = teacher((cubes - mean) / width, K_STRUCTURE)  # scaled: see the README

    def batch(self, random):
        """People and their inputs: each a stretch of their own, sometimes one modality only."""
        i = torch.from_numpy(random.choice(self.n, min(BATCH, self.n), replace=False))
        bold = self.whole[i].clone()
        cut = torch.from_numpy(random.random(len(i)) > WHOLE)
        which = torch.from_numpy(random.integers(0, CROPS, int(cut.sum())))
        bold[cut] = self.crops[i[cut], which].float()
        inputs = {BOLD.name: bold, ANATOMY.name: self.cubes[i]}
        for name in (ANATOMY.name, BOLD.name):
            if len(inputs) == 2 and random.random() < GONE:
                inputs.pop(name)
        return i, inputs


def spread(x):
    """Mean and deviation of each number over people, the latter at least a tenth of the common."""
    mean = x.mean(0)
    return mean, x.std(0) + 0.1 * (x - mean).std()


def teacher(x, k):
    """First k principal scores of people, singular values flattened: (people, k)."""
    x = x.flatten(1) - x.flatten(1).mean(0)
    value, vector = torch.linalg.eigh((x @ x.T).double())
    return (vector.flip(1)[:, :k] * value.flip(0)[:k].clamp(min=0) ** (FLAT / 2)).float()


# The hub ---


def attend(query, key, value):
    """Attention with several heads, (batch, token, width)."""
    each = (x.unflatten(-1, (HEADS, -1)).transpose(1, 2) for x in (query, key, value))
    return F.scaled_dot_product_attention(*each).transpose(1, 2).flatten(2)


def of_each(out):
    """A linear layer of each modality."""
    return nn.ModuleDict({name: nn.Linear(WIDTH, out) for name in SIZES})


def of_places():
    """A learned token of each place of each modality."""
    return nn.ParameterDict({m: nn.Parameter(torch.randn(n, WIDTH)) for m, (n, _) in SIZES.items()})


def embeddings():
    """An orthogonal linear layer of each modality."""
    out = nn.ModuleDict({name: nn.Linear(numbers, WIDTH) for name, (_, numbers) in SIZES.items()})
    for layer in out.values():
        nn.init.orthogonal_(layer.weight)
        nn.init.zeros_(layer.bias)
    return out


class Layer(nn.Module):
    """Hub tokens read every modality, then each other."""

    def __init__(self):
        super().__init__()
        self.query, self.key_value, self.out = of_each(WIDTH), of_each(2 * WIDTH), of_each(WIDTH)
        self.each_other, self.project = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(4))
        wide = nn.Linear(WIDTH, 4 * WIDTH)
        self.mlp = nn.Sequential(wide, nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))
        for query in self.query.values():  # tell places apart from the start
            query.weight.data *= 3

    def forward(self, hub, tokens, places):
        """(people, hub token, width) -> the same."""
        asked = self.norms[0](hub)
        for name, x in tokens.items():
            key, value = self.key_value[name](self.norms[1](x + places[name])).chunk(2, -1)
            hub = hub + self.out[name](attend(self.query[name](asked), key, value))
        parts = self.each_other(self.norms[2](hub)).chunk(3, -1)
        hub = hub + self.project(attend(*parts))
        return hub + self.mlp(self.norms[3](hub))


class Hub(nn.Module):
    """A few tokens that read people whole, and a fixed sketch that sums to zero over them.

    The sketch cannot change the mean token, which predictions read, and training cannot take
    people's identity out of it.
    """

    def __init__(self, scale):
        super().__init__()
        self.scale = scale
        self.embed, self.fixed_embed = embeddings(), embeddings().requires_grad_(False)
        self.sketch = {name: zero_sum(HUBS, places) for name, (places, _) in SIZES.items()}
        self.places = of_places()
        self.hub = nn.Parameter(torch.randn(HUBS, WIDTH))
        self.layers = nn.ModuleList(Layer() for _ in range(DEPTH))
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, inputs):
        """Modality -> (people, place, number), either or both, to (people, hub token, width)."""
        scaled = {m: (x.float() - self.scale[m][0]) / self.scale[m][1] for m, x in inputs.items()}
        tokens = {name: self.embed[name](x) for name, x in scaled.items()}
        hub = self.hub.expand(len(next(iter(tokens.values()))), -1, -1)
        for layer in self.layers:
            hub = layer(hub, tokens, self.places)
        hub = self.norm(hub)
        for name, x in scaled.items():
            hub = hub + GAIN * (self.sketch[name] @ self.fixed_embed[name](x))
        return hub


def zero_sum(hubs, places):
    """(hub token, place): orthonormal among the matrices whose columns sum to zero."""
    random = torch.randn(hubs, places)
    u, _, v = torch.linalg.svd(random - random.mean(0), full_matrices=False)
    k = min(hubs - 1, places)
    return u[:, :k] @ v[:k]


# Training ---


def trained(people, steps):
    """A hub whose mean token lies between people as the teachers' scores do."""
    torch.manual_seed(0)
    random, net = np.random.default_rng(0), Hub(people.scale)
    learned = [p for p in net.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learned, lr=RATE, weight_decay=DECAY, betas=BETAS)
    began = time.process_time()
    for step in range(steps):
        warm, cosine = (step + 1) / (WARM * steps), (1 + math.cos(math.pi * step / steps)) / 2
        for group in optimizer.param_groups:
            group["lr"] = RATE * min(1, warm) * cosine
        i, inputs = people.batch(random)
        loss = disagreement(net(inputs).mean(1), people.function[i], people.structure[i])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(learned, CLIP)
        optimizer.step()
        if (step + 1) % 100 == 0 or step + 1 == steps:
            spent = time.process_time() - began
            print(f"step {step + 1}: loss {loss.item():.3f}, {spent:.0f} CPU s", flush=True)
    return net.eval()


def disagreement(hub, function, structure):
    """1 - correlation, over pairs of people, of the Gram matrix of the hub with the teachers'."""
    hub, function, structure = (x - x.mean(0) for x in (hub, function, structure))
    hub, function, structure = (x @ x.T for x in (hub, function, structure))
    wanted = FUNCTION * function / function.norm() + structure / structure.norm()
    pairs = ~torch.eye(len(hub), dtype=torch.bool)
    a, b = hub[pairs], wanted[pairs]
    return 1 - F.cosine_similarity(a - a.mean(), b - b.mean(), 0)


# What is measured ---


@torch.no_grad()
def probed(seed, hubs, folder):
    """One row a question and features: r or balanced accuracy on the people of one cohort."""
    cohort = with_both(seed)
    x = read(cohort, folder)
    upper = (slice(None), *UPPER)
    seen = {
        "connectome": {"both": x["plain"], "short": x["plain_short"]},
        "C^0.35": {"both": x["whole"][upper], "short": x["short"][upper]},
    }
    bold, short, t1 = ({BOLD.name: x["whole"]}, {BOLD.name: x["short"]}, {ANATOMY.name: x["cubes"]})
    views = {"both": bold | t1, "bold": bold, "t1": t1, "short": short}
    for name, net in hubs.items():
        seen[name] = {view: net(inputs).mean(1) for view, inputs in views.items()}
    for question, (view, target) in QUESTIONS.items():
        features = [
            as_features(values[view], cohort, name)
            for name, values in seen.items()
            if view in values
        ]
        scores = bhx.probe(features, target, stratify="site", seed=0)
        for name in scores.model.values:
            score = pooled(scores.prediction.sel(model=name).values, scores.truth.values)
            yield {"features": name, "question": question, "seed": seed, "score": score}
    print(f"cohort {seed}: {cohort.sizes['subject']} people", flush=True)


def as_features(values, cohort, name):
    """(subject, feature) as Features with the labels of the cohort."""
    out = xr.Dataset({"features": (("subject", "feature"), values.numpy())})
    return out.assign_coords(subject_coords(cohort)).assign_attrs(name=name)


def pooled(guess, truth):
    """r of numbers, balanced accuracy of labels, over everyone."""
    if np.issubdtype(truth.dtype, np.floating):
        return np.corrcoef(guess.astype(float), truth)[0, 1]
    return np.mean([(guess[truth == label] == label).mean() for label in np.unique(truth)])


@torch.no_grad()
def after_a_year(hubs, folder):
    """Features -> share of people found again by another scan, each centered by session."""
    x = read(bhx.synthetic_cohort(80, seed=YEAR, missing=0, repeats=1.0), folder)
    seen = {"connectome": x["plain"], "C^0.35": x["whole"][:, UPPER[0], UPPER[1]]}
    seen |= {name: net({BOLD.name: x["whole"]}).flatten(1) for name, net in hubs.items()}
    return {name: found_again(values[0::2], values[1::2]) for name, values in seen.items()}


def found_again(first, second):
    """Share of rows most like their own row of the other session, both ways."""
    a, b = (F.normalize(s - s.mean(0), dim=1) for s in (first, second))
    near, own = a @ b.T, torch.arange(len(a))
    return float(torch.cat([near.argmax(1) == own, near.argmax(0) == own]).float().mean())


if __name__ == "__main__":
    main()
