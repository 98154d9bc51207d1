"""Train the shipped workshop model on synthetic brains, and measure it beside its controls.

Run by `make weights`. Nothing that is shipped comes from a real person's scan. With --controls only
the tables are made again, from the weights that are there.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
import time
from pathlib import Path

import pandas as pd

import bhx
from bhx.encode.model import random_model
from bhx.evaluate.features import fuse
from bhx.train.recipes import STAGES

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[1] / "benchmarks"))  # weights are made in a checkout only

from predictors import held_out_errors  # noqa: E402

TARGET = HERE / "workshop"
SUBJECTS, SEED = 240, 20_000  # other subjects than those of open_cohort("synthetic")
FACTORS = ("age", "sex", "diagnosis", "fusion", "trait_structure", "trait_function")


def main():
    """Make the cohort, train the three stages, keep the weights, write the tables."""
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        store = bhx.save_cohort(bhx.synthetic_cohort(SUBJECTS, seed=SEED), Path(folder) / "c.zarr")
        print(f"cohort: {time.perf_counter() - began:.0f} s", flush=True)
        if "--controls" not in sys.argv:
            train(store, Path(folder) / "run")
            print(f"weights: {time.perf_counter() - began:.0f} s, in {TARGET}", flush=True)
        tables(store)
    print(f"all: {time.perf_counter() - began:.0f} s")


def train(store, run):
    """All three stages; the weights, and the logs of their training, replace the shipped ones."""
    for stage in STAGES:
        start = time.perf_counter()
        bhx.pretrain(store, stage=stage, out=run, device="cpu")
        print(f"{stage}: {time.perf_counter() - start:.0f} s", flush=True)
    TARGET.mkdir(exist_ok=True)
    for name in ("config.json", "model.safetensors"):
        shutil.copy(run / name, TARGET / name)
    for stage in STAGES:
        shutil.copy(run / stage / "log.jsonl", TARGET / f"{stage}.jsonl")


def tables(store):
    """Held-out errors beside simple predictors; planted factors beside random weights."""
    model = bhx.load_model("workshop", device="cpu")
    errors = held_out_errors(store, model).to_dataframe().round(4)
    errors.to_csv(TARGET / "held_out_errors.csv", index=False)
    print(errors.to_string(index=False))
    factors = planted_factors(model)
    factors.rename_axis("factor").to_csv(TARGET / "planted_factors.csv")
    print(factors.to_string())


def planted_factors(model):
    """First metric of a probe of each factor, on people neither model has seen."""
    cohort = bhx.open_cohort("synthetic").load()
    features = []
    for name, one in (("trained", model), ("random weights", random_model(device="cpu"))):
        latents = bhx.embed(cohort, one, keep=("dynamics", "structure")).load()
        pooled = {f"hub, {how}": bhx.pool(latents, how) for how in ("mean", "concatenate")}
        encoders = [bhx.pool(latents, "concatenate", of=of) for of in ("dynamics", "structure")]
        pooled |= {"dynamics": encoders[0], "structure": encoders[1], "both": fuse(*encoders)}
        features += [f.assign_attrs(name=f"{of}, {name}") for of, f in pooled.items()]
    features.append(bhx.connectome(cohort))
    rows = {}
    for factor in FACTORS:
        scores = bhx.compare(bhx.probe(features, factor, stratify="site"))
        first = scores.index.get_level_values("metric")[0]
        rows[f"{factor} ({first})"] = scores.xs(first, level="metric").score
    return pd.DataFrame(rows).T.round(2)


if __name__ == "__main__":
    main()
