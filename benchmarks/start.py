"""Where attention starts: what dynamics tokens know of coupling before any training.

    python benchmarks/start.py

Mean dynamics tokens of each parcel, random weights, a probe of the planted coupling of sensory
parcels on 250 synthetic people: with attention that starts at tokens alike (`layers.attend_alike`,
as bhx does), and with the usual start (Xavier-uniform projections, tokens twice as wide).
"""

from __future__ import annotations

import torch

import bhx
from bhx.encode.model import random_model
from bhx.model.layers import initialize


def main():
    cohort = bhx.synthetic_cohort(250, seed=31_000, missing=0).drop_vars("t1").load()
    alike, usual = (random_model("workshop", seed=0, device="cpu") for _ in range(2))
    start_as_usual(usual.networks.dynamics)
    features = [bhx.connectome(cohort).compute()]
    for name, model in (("usual start", usual), ("start at tokens alike", alike)):
        latents = bhx.embed(cohort, model, keep=("dynamics",)).load()
        features.append(bhx.pool(latents, "concatenate", of="dynamics").assign_attrs(name=name))
    scores = bhx.probe(features[::-1], "trait_function", stratify="site")
    print(bhx.compare(scores).xs("r", level="metric").round(2).to_string())


def start_as_usual(encoder):
    """The start of the MAE paper, and tokens as wide as their input."""
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        initialize(encoder.blocks)
        encoder.patch_embed.proj.weight *= 2


if __name__ == "__main__":
    main()
