"""The same scans at TR x1, x2, x3, x4: how much of a token, a person and a prediction survives.

Four ways to read any TR, each with a workshop-size dynamics encoder trained alike on the same
rows (every scan at its own TR and decimated up to 3 s):

exact    time-exact Wiener patches, the default of bhx
tape     the paper's rule: round(35.28 s / TR) volumes a patch, kernel resized
resample linear interpolation to TR 2 s, then one patch length
zeros    each patch of volumes filled with zeros up to 48, one kernel

    python benchmarks/tr.py [--train 100] [--test 120] [--steps 200] [--ways exact] [--out tr.csv]
    python benchmarks/tr.py --inputs   # what reaches the network, without one; seconds

With --steps 0 the encoders have random weights.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from dataclasses import replace

import numpy as np
import pandas as pd
import xarray as xr
from sklearn.impute import SimpleImputer
from sklearn.linear_model import Ridge
from sklearn.model_selection import KFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import bhx
from bhx.data.synthetic import SITES
from bhx.encode.model import random_model
from bhx.latents.similarity import fingerprint
from bhx.modalities import bold as prior
from bhx.model.config import PRESETS

FACTORS = (1, 2, 3, 4)
PATCH, GRID, COMMON = 35.28, 0.735, 2.0  # s
SLOWEST = 3.0  # s, of a training row
TRAIT = "trait_function"  # what is probed: planted in the coupling of sensory parcels


def main():
    """Train the four alike, read the test scans at each factor, print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, value in (("train", 100), ("test", 120), ("steps", 200), ("seed", 0)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--ways", nargs="*", default=list(WAYS), choices=WAYS)
    parser.add_argument("--inputs", action="store_true")
    parser.add_argument("--out")
    args = parser.parse_args()
    if args.inputs:
        return print(inputs(args.seed))
    train = bhx.synthetic_cohort(args.train, seed=500 + args.seed, missing=0).drop_vars("t1").load()
    test = bhx.synthetic_cohort(args.test, seed=900 + args.seed, sites=("A",), missing=0)
    test = test.drop_vars("t1").load()
    rows = xr.concat([decimated(train, f) for f in FACTORS], "subject", join="outer")
    rows = rows.isel(subject=np.flatnonzero(rows.tr <= SLOWEST + 1e-9))
    table = []
    for name in args.ways:
        patching, change = WAYS[name]
        began = time.perf_counter()
        model = trained(change(rows), patching, args)
        seen = {f: tokens_of(change(decimated(test, f)), model) for f in FACTORS}
        for f in FACTORS:
            table.append({"way": name, "TR x": f, **measured(seen[1], seen[f], test[TRAIT].values)})
        print(f"{name}: {time.perf_counter() - began:.0f} s", flush=True)
    table = pd.DataFrame(table).set_index(["way", "TR x"]).round(3)
    print(f"{rows.sizes['subject']} training rows, {args.test} test scans, {args.steps} steps")
    print(table)
    if args.out:
        table.to_csv(args.out)


def decimated(cohort, factor):
    """Every `factor`-th volume; ids say which."""
    out = cohort.isel(time=slice(None, None, factor))
    return out.assign_coords(
        subject=[f"{s}/x{factor}" for s in cohort.subject.values],
        time=np.arange(out.sizes["time"]),
        tr=cohort.tr * factor,
        n_volumes=-(-cohort.n_volumes // factor),
    )


def resampled(cohort):
    """Linear interpolation to TR 2 s."""

    def one(series, tr):
        seconds = np.arange(0, (series.shape[1] - 1) * tr + 1e-9, COMMON)
        own = tr * np.arange(series.shape[1])
        return np.stack([np.interp(seconds, own, parcel) for parcel in series])

    return rewritten(cohort, one, COMMON)


def filled(cohort):
    """Whole patches of z-scored volumes, each followed by zeros up to 48 samples of 0.735 s."""
    samples = round(PATCH / GRID)

    def one(series, tr):
        k = min(samples, max(1, round(PATCH / tr)))
        z = (series - series.mean(1, keepdims=True)) / series.std(1, keepdims=True)
        patches = z[:, : z.shape[1] // k * k].reshape(len(z), -1, k)
        return np.pad(patches, ((0, 0), (0, 0), (0, samples - k))).reshape(len(z), -1)

    return rewritten(cohort, one, GRID)


def rewritten(cohort, change, tr):
    """The cohort with `change(series, tr)` of every scan, at one new TR."""
    scans = [
        change(scan.values[:, : int(n)].astype(float), float(t))
        for scan, n, t in zip(cohort.bold, cohort.n_volumes, cohort.tr, strict=True)
    ]
    bold = np.full((len(scans), cohort.sizes["roi"], max(s.shape[1] for s in scans)), np.nan)
    for row, scan in zip(bold, scans, strict=True):
        row[:, : scan.shape[1]] = scan
    out = cohort.drop_vars(["bold", "time"])
    out["bold"] = (("subject", "roi", "time"), bold.astype(np.float32))
    lengths = ("subject", [s.shape[1] for s in scans])
    return out.assign_coords(
        tr=("subject", np.full(len(scans), tr)), n_volumes=lengths, time=np.arange(bold.shape[2])
    )


def same(cohort):
    """The cohort as it is."""
    return cohort


WAYS = {
    "exact": ("exact", same),
    "tape": ("tape", same),
    "resample": ("tape", resampled),
    "zeros": ("tape", filled),
}


def trained(rows, patching, args):
    """A dynamics encoder of the workshop's size with this patch rule."""
    preset = PRESETS["workshop"]
    preset = replace(preset, dynamics=replace(preset.dynamics, patching=patching))
    if not args.steps:
        return random_model(preset, seed=args.seed, device="cpu")
    with tempfile.TemporaryDirectory() as folder:
        return bhx.pretrain(
            rows, stage="dynamics", out=folder, preset=preset, steps=args.steps, seed=args.seed,
            decimate=(1,), held_out=0.05, device="cpu", progress=False,
        )  # fmt: skip


def inputs(seed, people=24):
    """Cosine of what reaches the network at TR x f with that at x1, and with the brain's signal.

    The same people with and without scanner noise, so the brain's own signal is known. "best" is
    "exact" with the autocovariance of these very scans instead of its prior: the ceiling of a
    linear reading of one parcel's volumes.
    """
    rows = []
    for noise in (SITES["A"].noise, 0.0):
        full = of_site_a(people, seed, noise, SITES["A"].tr)
        ways = {"exact": (GRID, same), "best": (GRID, same), "resample": (COMMON, resampled)}
        for name, (step, change) in ways.items():
            slow = SLOW if name != "best" else fitted_autocovariance(full)
            own = patches_of(change(of_site_a(people, seed, 0.0, step)), step, SLOW)
            seen = [patches_of(change(decimated(full, f)), step, slow) for f in FACTORS]
            for f, found in zip(FACTORS, seen, strict=True):
                at = {"noise": noise, "way": name, "TR x": f}
                rows.append({**at, "x1": cosine(seen[0], found), "brain": cosine(own, found)})
    return pd.DataFrame(rows).pivot(index=["noise", "way"], columns="TR x").round(3)


SLOW = (prior.SLOW_SHARE, prior.SLOW_SECONDS, prior.SLOW_POWER)


def of_site_a(people, seed, noise, tr):
    """BOLD of six minutes at site A with this share of noise and TR [s]."""
    site = replace(SITES["A"], noise=noise, minutes=6.0)
    cohort = bhx.synthetic_cohort(people, seed=900 + seed, sites=[site], missing=0, tr=tr)
    return cohort.drop_vars("t1").load()


def fitted_autocovariance(cohort):
    """(share, seconds, power) of the slow part, by least squares on the scans' first 12 lags."""
    from scipy.optimize import curve_fit

    x = cohort.bold.values.astype(float)
    x = (x - x.mean(-1, keepdims=True)) / x.std(-1, keepdims=True)
    lags, tr = np.arange(1, 13), float(cohort.tr[0])
    found = [(x[..., k:] * x[..., :-k]).mean() for k in lags]

    def slow(seconds, share, scale, power):
        return share * np.exp(-((seconds / scale) ** power))

    return tuple(curve_fit(slow, lags * tr, found, SLOW, bounds=(0, (1, 60, 2)))[0])


def patches_of(cohort, step, slow):
    """Patches (subject, roi, patch, sample) of z-scored scans, carried to `step` [s] if finer."""
    prior.SLOW_SHARE, prior.SLOW_SECONDS, prior.SLOW_POWER = slow
    prior.wiener.cache_clear()
    samples, out = round(PATCH / step), []
    for scan, n, tr in zip(cohort.bold, cohort.n_volumes, cohort.tr, strict=True):
        x = scan.values[:, : int(n)].astype(float)
        x = (x - x.mean(1, keepdims=True)) / x.std(1, keepdims=True)
        count = int(int(n) * float(tr) / (samples * step) + 1e-6)
        if step == GRID:
            index, weights = prior.wiener(float(tr), x.shape[1], count * samples)
            x = (x[:, index] * weights).sum(-1)
        out.append(x[:, : count * samples].reshape(len(x), count, samples))
    prior.SLOW_SHARE, prior.SLOW_SECONDS, prior.SLOW_POWER = SLOW
    return np.stack([p[:, : min(q.shape[1] for q in out)] for p in out])


def cosine(a, b):
    """Mean cosine of patches, over the patches that both have."""
    patches = min(a.shape[2], b.shape[2])
    a, b = a[:, :, :patches], b[:, :, :patches]
    return ((a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)).mean()


def tokens_of(cohort, model):
    """Latents of all scans with their dynamics tokens, read one window long."""
    return bhx.embed(cohort, model, keep=("dynamics",), progress=False).load()


def measured(first, other, trait):
    """Identification rate, cosine of the same parcel's token, and r of a fixed probe."""
    patches = slice(min(first.sizes["patch"], other.sizes["patch"]))
    a, b = (latents.dynamics.isel(patch=patches) for latents in (first, other))
    typical = a.mean("subject")
    a, b = (a - typical).values, (b - typical.values).values
    cosine = (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)
    one, again = (bhx.pool(x, "concatenate", of="dynamics") for x in (first, other))
    found = fingerprint(one, again)
    return {
        "token cosine": np.nanmean(cosine),
        "identified": found.attrs["rate"],
        "trait r": probed(one, again, trait),
    }


def probed(first, other, trait):
    """r of predictions at this TR by a ridge fitted at the full rate, over five folds."""
    guess = np.empty(len(trait))
    x, z = first.features.values, other.features.values
    for train, test in KFold(5, shuffle=True, random_state=0).split(x):
        penalty = Ridge(0.1 * len(train) * x.shape[1])
        filled = SimpleImputer(keep_empty_features=True)
        model = make_pipeline(filled, StandardScaler(), penalty)
        guess[test] = model.fit(x[train], trait[train]).predict(z[test])
    return np.corrcoef(guess, trait)[0, 1]


if __name__ == "__main__":
    main()
