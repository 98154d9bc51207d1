"""What `bhx.probe` and ComBat cost beside plain scikit-learn and neuroCombat's arithmetic.

    OMP_NUM_THREADS=1 python benchmarks/probing.py --rounds 3
    OMP_NUM_THREADS=1 python benchmarks/probing.py --people 14000 --width 5000 --only memory

Ratios are medians over rounds, in which each is measured beside what it is compared with. The
folds, the inner folds and the penalties are the same on both sides. Memory is the largest resident
set of a process of its own, above what it held before there were features, in units of the
features.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import xarray as xr
from sklearn.linear_model import LogisticRegression, Ridge, RidgeCV
from sklearn.preprocessing import StandardScaler

import bhx
from bhx.evaluate.confounds import ComBat
from bhx.evaluate.probe import PENALTIES
from bhx.evaluate.task import make_task

SITES = 20
MEMORY = {
    "probe of a number": {"target": "age"},
    "probe of a label": {"target": "diagnosis"},
    "probe of a number, ComBat": {"target": "age", "harmonize": "site"},
}


def main():
    """Measure, and print two tables."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--people", type=int, default=1100)
    parser.add_argument("--width", type=int, default=19900)
    parser.add_argument("--permutations", type=int, default=1000)
    parser.add_argument("--folds", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", choices=["time", "memory", *MEMORY])
    options = parser.parse_args()
    if options.only in MEMORY:
        print(peak(options.people, options.width, options.folds, **MEMORY[options.only]))
        return
    if options.only != "memory":
        times(options)
    if options.only != "time":
        print("\n| memory | times the features | GB |\n|---|---|---|")
        for name in MEMORY:
            again = [sys.executable, __file__, "--only", name, "--folds", str(options.folds)]
            again += ["--people", str(options.people), "--width", str(options.width)]
            share, whole = subprocess.check_output(again, text=True).split()
            print(f"| {name} | {float(share):.2f} | {float(whole):.2f} |", flush=True)


def times(options):
    """Ratios of times, with their medians over the rounds."""
    data = made_up(options.people, options.width)
    cases = {
        "ridge / scikit-learn's Ridge": (ours(data, "age", options), plain(data, "age", options)),
        "ridge / scikit-learn's RidgeCV": (ours(data, "age", options), quick(data, options)),
        "logistic / scikit-learn's": (
            ours(data, "diagnosis", options),
            plain(data, "diagnosis", options),
        ),
        "ComBat / neuroCombat's": combats(data),
        f"ridge with {options.permutations} permutations / without": (
            ours(data, "age", options, options.permutations),
            ours(data, "age", options),
        ),
        f"logistic with {options.permutations} permutations / without": (
            ours(data, "diagnosis", options, options.permutations),
            ours(data, "diagnosis", options),
        ),
    }
    print("| time | ours [s] | other [s] | ratio |\n|---|---|---|---|")
    for name, (one, other) in cases.items():
        found = np.array([[timed(one), timed(other)] for _ in range(options.rounds)])
        ratio = np.median(found[:, 0] / found[:, 1])
        print(f"| {name} | {' | '.join(f'{t:.1f}' for t in np.median(found, 0))} ", end="")
        print(f"| **{ratio:.2f}** |", flush=True)


def timed(function):
    """Seconds that a call takes on its processor."""
    start = time.process_time()
    function()
    return time.process_time() - start


def made_up(people, width):
    """Features of people at twenty sites, float32, with an age and a diagnosis to be found."""
    rng = np.random.default_rng(0)
    site, age = rng.integers(0, SITES, people), rng.uniform(20, 80, people)
    sick = rng.random(people) < 0.5
    values = rng.standard_normal((people, width), np.float32)
    for row, where, years, ill in zip(values, site, age, sick, strict=True):
        row += 0.1 * np.sin(where + np.arange(width))
        row[: width // 100] += (years - 50) / 60 + 0.3 * ill
    names = [f"p{i}" for i in range(people)]
    labels = {"subject": names, "participant": ("subject", names), "age": ("subject", age)}
    labels |= {"site": ("subject", np.array([f"s{i}" for i in site]))}
    labels |= {"diagnosis": ("subject", np.where(sick, "patient", "control"))}
    return xr.Dataset({"features": (("subject", "feature"), values)}, labels)


def ours(data, target, options, permutations=0):
    """A call of `bhx.probe`."""
    return lambda: bhx.probe(data, target, folds=options.folds, permutations=permutations)


def plain(data, target, options):
    """The same folds and penalties by scikit-learn: features scaled once a fold, then a fit for
    each penalty."""

    def call():
        task, x = make_task(data, target, folds=options.folds), data.features.values
        y, width = task.truth, x.shape[1]

        def model(penalty, rows):
            strength = penalty * rows * width
            if task.names is None:
                return Ridge(strength)
            return LogisticRegression(C=1 / strength, max_iter=2000)

        def scaled(fit, new):
            scaler = StandardScaler().fit(x[fit].astype(float))
            return scaler.transform(x[fit].astype(float)), scaler.transform(x[new].astype(float))

        for train, test, _ in task.folds():
            score = np.zeros(len(PENALTIES))
            for fit, hold in task.inner_splits(train):
                a, b = scaled(fit, hold)
                for i, penalty in enumerate(PENALTIES):
                    score[i] += model(penalty, len(fit)).fit(a, y[fit]).score(b, y[hold])
            a, b = scaled(train, test)
            model(PENALTIES[score.argmax()], len(train)).fit(a, y[train]).predict(b)

    return call


def quick(data, options):
    """The penalty by scikit-learn's left-out rows instead of the inner folds: one decomposition a
    fold where ours has four."""

    def call():
        task, x = make_task(data, "age", folds=options.folds), data.features.values
        for train, test, _ in task.folds():
            scaler = StandardScaler().fit(x[train].astype(float))
            model = RidgeCV(PENALTIES * len(train) * x.shape[1])
            model.fit(scaler.transform(x[train].astype(float)), task.truth[train])
            model.predict(scaler.transform(x[test].astype(float)))

    return call


def combats(data):
    """ComBat and neuroCombat's arithmetic on the same features."""
    x = data.features.values.astype(float)
    site = np.unique(data.site.values, return_inverse=True)[1]
    joined = np.hstack([x, site[:, None]])
    ours, theirs = ComBat().fit_transform(joined), neurocombat(x, site)
    assert np.allclose(ours, theirs, atol=1e-5)
    return lambda: ComBat().fit_transform(joined), lambda: neurocombat(x, site)


def neurocombat(x, site):
    """Rows (person, feature) without their sites' shift and scale, step by step as in the paper
    (Johnson et al. 2007) and as neuroCombat computes it: every step of the posterior walks over all
    rows of a site."""
    data, design = x.T, np.eye(site.max() + 1)[site]
    n, batches = len(x), [np.flatnonzero(site == i) for i in range(site.max() + 1)]
    effects = np.linalg.inv(design.T @ design) @ design.T @ data.T
    grand = (design.mean(0) @ effects)[:, None]
    pooled = (((data - (design @ effects).T) ** 2) @ np.full((n, 1), 1 / n)) ** 0.5
    z = (data - grand) / pooled
    shifts = np.linalg.inv(design.T @ design) @ design.T @ z.T
    out = z.copy()
    for rows, shift in zip(batches, shifts, strict=True):
        scale = z[:, rows].var(1, ddof=1)
        mean, spread, m, s2 = shift.mean(), shift.var(ddof=1), scale.mean(), scale.var(ddof=1)
        a, b = (2 * s2 + m**2) / s2, (m * s2 + m**3) / s2
        g_old, d_old, change = shift, scale, 1.0
        while change > 1e-4:
            g = (spread * len(rows) * shift + d_old * mean) / (spread * len(rows) + d_old)
            sum2 = ((z[:, rows] - g[:, None]) ** 2).sum(1)
            d = (0.5 * sum2 + b) / (len(rows) / 2 + a - 1)
            change = max((abs(g - g_old) / g_old).max(), (abs(d - d_old) / d_old).max())
            g_old, d_old = g, d
        out[:, rows] = (out[:, rows] - g_old[:, None]) / np.sqrt(d_old)[:, None]
    return (out * pooled + grand).T


def peak(people, width, folds, **options):
    """(times the features, GB) of a probe in this process."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        bhx.probe(made_up(100, 100), folds=folds, **options)  # what is imported is not counted
        before = largest()
        data = made_up(people, width)
        bhx.probe(data, folds=folds, **options)
    held = largest() - before
    return f"{held / data.features.nbytes} {(held + before) / 1e9}"


def largest():
    """Bytes of this process's largest resident set (Linux; what it was forked from not counted)."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s*(\d+) kB", status)[1]) * 1024


if __name__ == "__main__":
    main()
