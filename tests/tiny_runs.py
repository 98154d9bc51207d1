"""A tiny model and a tiny cohort on disk, and runs of them that another process can start.

python tests/tiny_runs.py STORE OUT '{"stage": "dynamics", ...}', or null to embed
(or "auto": so that each process finds another precision faster)
"""

import json
import os
import sys

import numpy as np

from bhx.data.atlas import load_atlas
from bhx.data.store import open_store
from bhx.encode import embed as embed_file
from bhx.encode.embed import PRECISIONS, embed
from bhx.encode.model import random_model
from bhx.modalities.t1 import t1_grid
from bhx.model.config import HarmonixConfig
from bhx.model.dynamics import DynamicsConfig
from bhx.model.harmonizer import HarmonizerConfig
from bhx.model.hub import HubConfig
from bhx.model.structure import StructureConfig
from bhx.schema import ROI_COORDS, build_cohort

WIDTH = {"width": 24, "depth": 1, "heads": 2}
DECODER = {"decoder_width": 12, "decoder_depth": 1, "decoder_heads": 2}
TINY = HarmonixConfig(
    "tiny",
    "schaefer100",
    structure=StructureConfig(16.0, (10, 12, 10), 2, **WIDTH, **DECODER),
    dynamics=DynamicsConfig(
        100, max_patches=4, harmonics=8, gradients=4, **WIDTH,
        predictor_width=12, predictor_depth=1, predictor_heads=2,
    ),
    harmonizer=HarmonizerConfig(
        ("bold", "t1"), (400, 150), (0, 0), 4, **WIDTH, **DECODER, target_width=24
    ),
)  # fmt: skip
HUB = HarmonixConfig(  # a relational hub that reads coupling and cubes of the same scans
    "tiny hub", TINY.atlas, TINY.structure, TINY.dynamics,
    HubConfig(("coupling", "cubes"), (100, 150), (100, 8), 4, width=24, depth=2, heads=2),
)  # fmt: skip
QUICK = {
    "preset": TINY, "steps": 6, "batch": 4, "rate": (1e-3, 1e-2, 1e-3), "precision": "float32",
    "tokens_at_once": 800, "evaluate_every": 3, "checkpoint_every": 2, "progress": False,
    "shortest": 1, "momentum": (0.9, 1.0), "held_out": 0.2,
}  # fmt: skip


def tiny_cohort(n=12, seed=0, t1_only=(3,), bold_only=(5,)):
    """Random people on 100 parcels and 16 mm cubes of brain; two TRs, two lengths."""
    random = np.random.default_rng(seed)
    atlas = load_atlas("schaefer100")
    tr = np.where(np.arange(n) % 2, 1.5, 2.0)
    volumes = np.where(np.arange(n) % 3, 60, 80)
    bold = np.full((n, 100, 80), np.nan, np.float32)
    for i in range(n):
        waves = np.cumsum(random.standard_normal((5, volumes[i])), 1)
        noise = random.standard_normal((100, volumes[i]))
        bold[i, :, : volumes[i]] = random.standard_normal((100, 5)) @ waves + noise + 100
    shape = [len(v) for v in t1_grid(16.0).values()]
    t1 = np.linspace(1, 5, np.prod(shape)).reshape(shape) * random.uniform(0.5, 1.5, (n, *shape))
    has_bold = ~np.isin(np.arange(n), t1_only)
    has_t1 = ~np.isin(np.arange(n), bold_only)
    bold[~has_bold], t1[~has_t1] = np.nan, np.nan
    subject = {
        "subject": [f"s{i:02}" for i in range(n)], "participant": [f"s{i:02}" for i in range(n)],
        "site": ["A"] * n, "tr": tr, "n_volumes": np.where(has_bold, volumes, 0),
        "has_bold": has_bold, "has_t1": has_t1,
    }  # fmt: skip
    roi = {name: atlas[name].values for name in ("roi", *ROI_COORDS)}
    attrs = {"atlas": "schaefer100", "source": "test"}
    return build_cohort({"bold": bold, "t1": t1.astype(np.float32)}, subject, roi, attrs)


def embed_tiny(store, out, precision="float32"):
    """Hub tokens and attention of a stored cohort, one block a person."""
    how = {"keep": ("attention",), "tokens_at_once": 1, "precision": precision, "progress": False}
    return embed(open_store(store), random_model(TINY, device="cpu"), store=out, **how)


if __name__ == "__main__":
    from bhx.train.pretrain import pretrain

    store, *runs = sys.argv[1:]
    for out, settings in zip(runs[::2], runs[1::2], strict=True):
        if settings == "null":
            embed_tiny(store, out)
            continue
        if settings == '"auto"':
            embed_file._fastest = lambda *_: PRECISIONS[int(os.environ["RANK"])]
            embed_tiny(store, out, "auto")
            continue
        given = {**QUICK, **json.loads(settings)}
        given["preset"] = HUB if given["preset"] == "hub" else given["preset"]
        pretrain(store, out=out, **given)
