"""Settings of a pretraining run, and the published values of each stage.

No data is read and nothing is trained here.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from bhx.errors import InputError, listed

STAGES = ("structure", "dynamics", "harmonizer")


@dataclass(frozen=True)
class Recipe:
    """Settings of a run. The defaults are the published ones (see `recipe` for the presets).

    Rates are per step; `batch` counts subjects, `tokens_at_once` bounds what is computed at once
    (a batch above it is accumulated). `decimate` lists factors of TR augmentation; `crop` takes a
    random stretch of each scan. `shard` splits weights and optimiser over the processes (FSDP2).
    """

    stage: str
    steps: int = 100_000
    batch: int = 512
    seed: int = 0
    rate: tuple[float, float, float] = (5e-5, 1e-3, 1e-6)  # first, highest, last
    warmup: float = 40 / 300  # share of the steps
    decay: tuple[float, float] = (0.04, 0.4)  # weight decay, first and last
    betas: tuple[float, float] = (0.9, 0.999)
    clip: float = 1.0
    momentum: tuple[float, float] = (0.996, 1.0)  # of the teacher, first and last
    hidden: float = 0.75  # share of cubes removed
    loss: str = "paper"  # of the harmonizer; or "release"
    drop_modality: float = 0.2
    decimate: tuple[int, ...] = (1, 2, 3, 4)
    slowest_tr: float = 3.0  # s, after decimation
    antialias: bool = False
    crop: bool = True
    shortest: int = 4  # patches of a crop in time, where the scan has as many
    precision: str = "bfloat16"
    compile: bool = False
    shard: bool = False
    tokens_at_once: int = 65536
    evaluate_every: int = 500
    checkpoint_every: int = 500

    def __post_init__(self):
        for name, fits, wanted in _LIMITS:
            value = getattr(self, name)
            if not fits(value):
                raise InputError(f"Expected {name} {wanted}, found {value!r}", "Change it")


def _whole(value):
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


_LIMITS = (
    ("stage", STAGES.__contains__, f"of {listed(STAGES)}"),
    *(
        (name, _whole, "as a whole number of at least 1")
        for name in (
            "steps", "batch", "shortest", "tokens_at_once", "evaluate_every", "checkpoint_every",
        )
    ),
    ("seed", lambda v: isinstance(v, int) and v >= 0, "as a whole number of at least 0"),
    ("rate", lambda v: len(v) == 3 and min(v) >= 0, "as three rates: first, highest, last"),
    ("warmup", lambda v: 0 <= v < 1, "as a share of the steps, below 1"),
    ("hidden", lambda v: 0 < v < 1, "as a share between 0 and 1"),
    ("drop_modality", lambda v: 0 <= v <= 1, "as a share between 0 and 1"),
    ("loss", ("paper", "release").__contains__, "of 'paper' and 'release'"),
    ("precision", ("float32", "bfloat16").__contains__, "of 'float32' and 'bfloat16'"),
    ("decimate", lambda v: len(v) > 0 and all(map(_whole, v)), "as whole factors such as (1, 2)"),
)  # fmt: skip


def recipe(stage: str, preset: str = "base", **changes) -> Recipe:
    """The published settings of a stage, or those of a smaller preset, with changes by name."""
    known = {f.name for f in fields(Recipe)}
    if unknown := set(changes) - known:
        fact = f"Expected settings of {listed(sorted(known), 30)}, found {listed(unknown)}"
        raise InputError(fact, "Rename it")
    changes = {k: tuple(v) if isinstance(v, list) else v for k, v in changes.items()}
    smaller = _SMALLER.get(preset, {}).get(stage, {})
    return Recipe(stage, **{**_PUBLISHED.get(stage, {}), **smaller, **changes})


_PUBLISHED = {  # rates of both at the batch of 512: base rate x batch / 256
    "structure": {
        "rate": (0.0, 3e-4, 0.0), "decay": (0.05, 0.05), "betas": (0.9, 0.95),
    },
    "dynamics": {},
    "harmonizer": {
        "rate": (0.0, 1e-3, 0.0), "decay": (0.05, 0.05), "betas": (0.9, 0.95),
    },
}  # fmt: skip
_QUICK = {"precision": "float32", "tokens_at_once": 16384, "warmup": 0.1}
_SMALLER = {
    "workshop": {
        "structure": _QUICK | {
            "steps": 400, "batch": 16, "rate": (1e-4, 2e-3, 1e-5), "evaluate_every": 100,
            "checkpoint_every": 100,
        },
        "dynamics": _QUICK | {
            "steps": 200, "batch": 8, "rate": (1e-4, 1e-3, 1e-5), "momentum": (0.996, 1.0),
            "decay": (0.04, 0.1), "evaluate_every": 50, "checkpoint_every": 100,
            "decimate": (1, 2),
        },
        "harmonizer": _QUICK | {
            "steps": 300, "batch": 8, "rate": (1e-4, 1e-3, 1e-5), "evaluate_every": 50,
            "checkpoint_every": 100, "decimate": (1, 2),
        },
    },
}  # fmt: skip
