"""Hub tokens while a scan runs: milliseconds a volume and a patch, and memory, over four hours.

    python benchmarks/stream.py [--hours 4] [--out benchmarks/stream.json]

Noise of the size of BOLD goes volume by volume into `bhx.stream`, for the shipped model and for
one of base size with all encoders and without. A patch of 35.28 s has to be read in less.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from pathlib import Path

import numpy as np

import bhx
from bhx.model.config import PRESETS

TR = 0.72  # s, as of HCP


def models():
    """Name -> model: shipped, base without encoders, and base."""
    base = PRESETS["base"]
    yield "workshop", bhx.load_model("workshop", device="cpu")
    without = base.reading(("coupling", "cubes"))
    yield "base, coupling alone", bhx.random_model(without, device="cpu")
    yield "base", bhx.random_model("base", device="cpu")


def measure(model, hours):
    """Times and memory of one stream."""
    rng, parcels = np.random.default_rng(0), model.config.dynamics.parcels
    stream = bhx.stream(model, tr=TR)
    volumes, patches, before = [], [], resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(int(hours * 3600 / TR)):
        volume = 1000 + 10 * rng.normal(size=parcels)
        start = time.perf_counter()
        came = stream.add(volume)
        took = 1000 * (time.perf_counter() - start)
        (volumes if came is None else patches).append(took)
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {
        "ms_a_volume": round(float(np.median(volumes)), 3),
        "ms_a_patch_first_ten": round(float(np.median(patches[:10])), 1),
        "ms_a_patch_last_ten": round(float(np.median(patches[-10:])), 1),
        "patches": len(patches) + 1,
        "memory_mb_grown": round((after - before) / 1024, 1),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hours", type=float, default=4.0)
    parser.add_argument("--base-hours", type=float, default=0.5, help="for base with encoders")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    given = parser.parse_args()
    table = {}
    for name, model in models():
        hours = given.base_hours if name == "base" else given.hours
        table[name] = {"hours": hours, **measure(model, hours)}
        print(name, table[name])
    given.out.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
