"""Train the shipped models on synthetic brains, and measure them beside their controls.

Run by `make weights`; names of models train those alone. Nothing that is shipped comes from a real
person's scan. With --controls only the tables are made again, from the weights that are there.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd

import bhx
from bhx.evaluate.features import fuse
from bhx.train.recipes import STAGES

REPO = Path(__file__).parents[1]
HERE = REPO / "bhx" / "weights"
sys.path.insert(0, str(REPO / "benchmarks"))  # weights are made in a checkout only

from predictors import held_out_errors  # noqa: E402

SEED = 20_000  # other people than those of open_cohort("synthetic")
PEOPLE = {"workshop": 1200, "paper": 240}
STAGES_OF = {"workshop": ("harmonizer",), "paper": STAGES}
FACTORS = ("age", "sex", "diagnosis", "fusion", "trait_structure", "trait_function")


def main():
    """Make the cohorts, train every stage, keep the weights, write the tables."""
    for name in sys.argv[1:] or PEOPLE:
        if name not in PEOPLE:
            continue
        began = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            cohort = bhx.synthetic_cohort(PEOPLE[name], seed=SEED)
            store = bhx.save_cohort(cohort, Path(folder) / "c.zarr")
            print(f"cohort: {time.perf_counter() - began:.0f} s", flush=True)
            if "--controls" not in sys.argv:
                train(name, store, Path(folder) / "run")
            tables(name, store)
        print(f"{name}: {time.perf_counter() - began:.0f} s")


def train(name, store, run):
    """Every stage; the weights, and the logs of their training, replace the shipped ones."""
    for stage in STAGES_OF[name]:
        start = time.perf_counter()
        bhx.pretrain(store, stage=stage, preset=name, out=run, device="cpu")
        print(f"{stage}: {time.perf_counter() - start:.0f} s", flush=True)
    (HERE / name).mkdir(exist_ok=True)
    for file in ("config.json", "model.safetensors"):
        shutil.copy(run / file, HERE / name / file)
    for stage in STAGES_OF[name]:
        shutil.copy(run / stage / "log.jsonl", HERE / name / f"{stage}.jsonl")


def tables(name, store):
    """Planted factors beside every control; errors of reconstruction beside simple predictors."""
    model = bhx.load_model(name, device="cpu")
    if "structure" in STAGES_OF[name]:
        errors = held_out_errors(store, model).to_dataframe().round(4)
        errors.to_csv(HERE / name / "held_out_errors.csv", index=False)
        print(errors.to_string(index=False))
    factors = planted_factors(model)
    factors.rename_axis("factor").to_csv(HERE / name / "planted_factors.csv")
    print(factors.to_string())


def planted_factors(model):
    """First metric of a probe of each factor, on people neither model has seen."""
    cohort = bhx.open_cohort("synthetic")
    cohort = cohort.isel(subject=np.flatnonzero(cohort.has_bold & cohort.has_t1)).load()
    features = []
    untrained = bhx.random_model(model.config, device="cpu")
    for name, one in (("trained", model), ("random weights", untrained)):
        encoders = [m.tokens for m in model.config.modalities.values() if m.encoder]
        latents = bhx.embed(cohort, one, keep=encoders).load()
        pooled = {f"hub, {how}": bhx.pool(latents, how) for how in ("mean", "concatenate")}
        pooled |= {of: bhx.pool(latents, "concatenate", of=of) for of in encoders}
        features += [f.assign_attrs(name=f"{of}, {name}") for of, f in pooled.items()]
    connectome, cubes = bhx.connectome(cohort).compute(), bhx.cube_means(cohort).compute()
    flattened = bhx.connectome(cohort, kind="flattened").compute()
    features += [connectome, flattened, cubes, fuse(connectome, cubes)]
    rows = {}
    for factor in FACTORS:
        scores = bhx.compare(bhx.probe(features, factor, stratify="site"))
        first = scores.index.get_level_values("metric")[0]
        rows[f"{factor} ({first})"] = scores.xs(first, level="metric").score
    return pd.DataFrame(rows).T.round(2)


if __name__ == "__main__":
    main()
