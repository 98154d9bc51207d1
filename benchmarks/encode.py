"""Time to encode one subject at base size, beside the same network on padded input.

One T1 and 150 volumes at TR 2.0 s. "padded" computes what the release computes: 18 patches of
every parcel (7,200 dynamics tokens), 1,200 cubes and 129 hub tokens, with the same kernels. Rounds
alternate, so that the ratio holds when the machine's speed drifts; medians are reported, beside
the rate of a plain matrix product measured in the same run.

    python benchmarks/encode.py [--rounds 5] [--preset base] [--out encode.json]
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import time

import numpy as np
import torch

from bhx.encode.inputs import Reading, encode_readings, read_subject, sequences
from bhx.modalities.bold import BOLD
from bhx.modalities.t1 import ANATOMY
from bhx.model.config import PRESETS, Harmonix

TR, VOLUMES = 2.0, 150
PARTS = ("dynamics", "structure", "harmonizer")


def main():
    """Measure, print a table, and write it where asked."""
    args = _arguments()
    torch.manual_seed(0)
    config = PRESETS[args.preset]
    networks = Harmonix(config).eval().to(args.device)
    inputs = {"ours": _subject(config), "padded": _padded(config)}
    rounds = [
        {name: _times(networks, reading, args.device) for name, reading in inputs.items()}
        for _ in range(args.rounds + 1)
    ][1:]  # the first one warms up
    rate = _matmul_rate(args.device)
    report = _report(networks, inputs, rounds, rate, args)
    print(_table(report))
    if args.out:
        with open(args.out, "w") as file:
            json.dump(report, file, indent=1)


def _subject(config):
    random = np.random.default_rng(0)
    bold = random.standard_normal((config.dynamics.parcels, VOLUMES)).astype(np.float32)
    t1 = random.random(config.structure.shape).astype(np.float32)
    values = {BOLD.variable: bold, ANATOMY.variable: t1}
    return read_subject(values, {"tr": TR, "n_volumes": VOLUMES}, config)


def _padded(config):
    """The same T1 and a scan filled up to all patches that the positions know."""
    c, reading = config.dynamics, _subject(config)
    full = torch.zeros(c.parcels, c.max_patches, c.kernel)
    (window,) = reading.windows[BOLD.name]
    full[:, : window.shape[1]] = window
    reading.windows[BOLD.name] = [full]
    reading.there[BOLD.name] = [torch.arange(c.parcels * c.max_patches)]
    return reading


@torch.no_grad()
def _times(networks, reading, device):
    """Seconds of each part."""
    marks, tokens = [_now(device)], {}
    for name in (BOLD.name, ANATOMY.name):
        alone = Reading({name: reading.windows[name]}, {name: reading.there[name]})
        tokens |= encode_readings(networks, [alone], device)[0]
        marks.append(_now(device))
    networks.harmonizer(sequences(networks.config, [reading], [tokens]).subjects)
    marks.append(_now(device))
    return dict(zip(PARTS, np.diff(marks).tolist(), strict=True))


def _now(device):
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def _matmul_rate(device, n=2048, repeats=9):
    """Median GFLOP/s of an n x n float32 product."""
    a, b = torch.randn(2, n, n, device=device)
    seconds = []
    for _ in range(repeats):
        start = _now(device)
        a @ b
        seconds.append(_now(device) - start)
    return 2 * n**3 / np.median(seconds) / 1e9


def _flop(config, reading):
    """Multiply-adds x 2 of the three encoders on this reading."""
    dynamics = len(reading.there[BOLD.name][0])
    structure = len(reading.there[ANATOMY.name][0]) + 1
    hub = dynamics + structure + config.harmonizer.hubs
    out = {}
    for name, n, part in zip(
        PARTS,
        (dynamics, structure, hub),
        (config.dynamics, config.structure, config.harmonizer),
        strict=True,
    ):
        out[name] = part.depth * (24 * n * part.width**2 + 4 * n**2 * part.width)
    return out


def _report(networks, inputs, rounds, rate, args):
    out = {
        "preset": args.preset,
        "device": args.device,
        "processor": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "matmul_gflop_per_s": round(rate, 1),
        "peak_memory_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
        "rounds": args.rounds,
        "parts": {},
    }
    for part in (*PARTS, "all"):
        seconds = {
            name: np.array(
                [sum(r[name].values()) if part == "all" else r[name][part] for r in rounds]
            )
            for name in inputs
        }
        flop = {name: _flop(networks.config, reading) for name, reading in inputs.items()}
        work = sum(flop["ours"].values()) if part == "all" else flop["ours"][part]
        out["parts"][part] = {
            "ours_s": round(float(np.median(seconds["ours"])), 3),
            "padded_s": round(float(np.median(seconds["padded"])), 3),
            "ratio": round(float(np.median(seconds["ours"] / seconds["padded"])), 3),
            "of_matmul_rate": round(work / np.median(seconds["ours"]) / 1e9 / rate, 3),
        }
    return out


def _table(report):
    lines = [
        f"{report['preset']} on {report['device']}, {report['threads']} threads, matrix product "
        f"{report['matmul_gflop_per_s']} GFLOP/s, peak memory {report['peak_memory_gib']} GiB",
        "| part | ours [s] | padded [s] | ratio | share of the matrix product's rate |",
        "|---|---|---|---|---|",
    ]
    for part, row in report["parts"].items():
        lines.append(f"| {part} | " + " | ".join(str(v) for v in row.values()) + " |")
    return "\n".join(lines)


def _arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--preset", default="base", choices=list(PRESETS))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out")
    return parser.parse_args()


if __name__ == "__main__":
    main()
