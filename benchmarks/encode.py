"""Time to encode one subject at base size: the relational hub, the paper's architecture, padding.

One T1 and 150 volumes at TR 2.0 s. "relational" is the preset `base`; "hub alone" the same without
its two encoders, as `workshop` has it; "paper" the architecture of the paper on the tokens that are
there; "padded" computes what the release computes: 18 patches of every parcel (7,200 dynamics
tokens), 1,200 cubes and 129 hub tokens. Rounds alternate, so that ratios hold when the machine's
speed drifts; medians are reported, beside the rate of a plain matrix product in the same run.

    python benchmarks/encode.py [--rounds 5] [--out encode.json]
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import time
from dataclasses import replace

import numpy as np
import torch

from bhx.encode.inputs import Reading, encode_readings, read_subject, sequences
from bhx.modalities.bold import BOLD
from bhx.modalities.t1 import ANATOMY
from bhx.model.config import PRESETS, RELEASE, Harmonix

TR, VOLUMES = 2.0, 150


def main():
    """Measure, print a table, and write it where asked."""
    args = _arguments()
    torch.manual_seed(0)
    base = PRESETS["base"]
    paper = replace(RELEASE, dynamics=RELEASE.dynamics.exact)
    configs = {"relational": base, "hub alone": base.reading(("coupling", "cubes")), "paper": paper}
    networks = {name: Harmonix(c).eval().to(args.device) for name, c in configs.items()}
    networks["padded"] = networks["paper"]
    rounds = [
        {name: _times(net, name == "padded", args.device) for name, net in networks.items()}
        for _ in range(args.rounds + 1)
    ][1:]  # the first one warms up
    report = {
        "device": args.device,
        "processor": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "matmul_gflop_per_s": round(_matmul_rate(args.device), 1),
        "peak_memory_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
        "rounds": args.rounds,
        "seconds": {name: _medians([r[name] for r in rounds]) for name in networks},
    }
    print(_table(report))
    if args.out:
        with open(args.out, "w") as file:
            json.dump(report, file, indent=1)


@torch.no_grad()
def _times(networks, padded, device):
    """Part -> seconds: reading the arrays, each modality's tokens, hub tokens, and all."""
    config, random = networks.config, np.random.default_rng(0)
    bold = random.standard_normal((config.dynamics.parcels, VOLUMES)).astype(np.float32)
    t1 = random.random(config.structure.shape).astype(np.float32)
    values = {BOLD.variable: bold, ANATOMY.variable: t1}
    out, start = {}, _now(device)
    reading = read_subject(values, {"tr": TR, "n_volumes": VOLUMES}, config)
    out["read"], tokens = _now(device) - start, {}
    if padded:
        _fill_up(reading, config.dynamics)
    for name in config.modalities:
        begun = _now(device)
        alone = Reading({name: reading.windows[name]}, {name: reading.there[name]})
        tokens |= encode_readings(networks, [alone], device)[0]
        out[name] = _now(device) - begun
    begun = _now(device)
    networks.harmonizer(sequences(config, [reading], [tokens]).subjects)
    out["hub"] = _now(device) - begun
    return out | {"all": sum(out.values())}


def _fill_up(reading, c):
    """The scan up to all patches that the positions know."""
    full = torch.zeros(c.parcels, c.max_patches, c.kernel)
    (window,) = reading.windows[BOLD.name]
    full[:, : window.shape[1]] = window
    reading.windows[BOLD.name] = [full]
    reading.there[BOLD.name] = [torch.arange(c.parcels * c.max_patches)]


def _medians(rounds):
    return {part: round(float(np.median([r[part] for r in rounds])), 3) for part in rounds[0]}


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


def _table(report):
    parts = list(dict.fromkeys(part for row in report["seconds"].values() for part in row))
    parts.append(parts.pop(parts.index("all")))
    padded = report["seconds"]["padded"]["all"]
    lines = [
        f"{report['device']}, {report['threads']} threads, matrix product "
        f"{report['matmul_gflop_per_s']} GFLOP/s, peak memory {report['peak_memory_gib']} GiB",
        f"| [s] | {' | '.join(parts)} | of padded |",
        "|---" * (len(parts) + 2) + "|",
    ]
    for name, row in report["seconds"].items():
        cells = " | ".join(f"{row[part]:.2f}" if part in row else "" for part in parts)
        lines.append(f"| {name} | {cells} | {row['all'] / padded:.2f} |")
    return "\n".join(lines)


def _arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out")
    return parser.parse_args()


if __name__ == "__main__":
    main()
