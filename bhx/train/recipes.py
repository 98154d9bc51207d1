"""Settings of training runs: their bounds, the published values of each stage, those of the
presets, and what a schedule makes of them.

No data is read and nothing is trained here.
"""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from bhx.errors import InputError, listed

STAGES = ("structure", "dynamics", "harmonizer")


Count = Annotated[int, Field(ge=1, description="a whole number of at least 1")]
Seed = Annotated[int, Field(ge=0, description="a whole number of at least 0")]
Share = Annotated[float, Field(ge=0, le=1, description="a share from 0 to 1")]
Part = Annotated[float, Field(ge=0, lt=1, description="a share from 0 to below 1")]
Inner = Annotated[float, Field(gt=0, lt=1, description="a share between 0 and 1")]
Above = Annotated[float, Field(gt=0, lt=math.inf, description="a number above 0")]
Rate = Annotated[float, Field(ge=0, lt=math.inf, description="a number of at least 0")]
Rates = Annotated[
    tuple[Rate, Rate, Rate], Field(description="three learning rates: first, highest, last")
]
Decays = Annotated[tuple[Rate, Rate], Field(description="two weight decays: first, last")]
Shares = Annotated[tuple[Share, Share], Field(description="two shares from 0 to 1")]
Factors = Annotated[
    tuple[Count, ...], Field(min_length=1, description="whole factors such as (1, 2)")
]
Patience = Annotated[Count | None, Field(description="a whole number of at least 1, or None")]


class Settings(BaseModel):
    """Named values with bounds, checked once when they are made; they never change."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    def __init__(self, **values):
        values = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise _refusal(type(self), error.errors()[0], values) from None


def _refusal(kind, found, values):
    """One sentence of what does not fit, with the bounds and the default beside it."""
    name = str(found["loc"][0])
    if name not in kind.model_fields:
        known = listed(sorted(kind.model_fields), 40)
        return InputError(f"Expected settings of {known}, found {name}", "Take one of these names")
    field = kind.model_fields[name]
    wanted = field.description or found["msg"].removeprefix("Input should be ")
    inside = found["input"] is not values.get(name)
    value = f"{found['input']!r} in it" if inside else repr(found["input"])
    default = "" if field.is_required() else f", such as the default {field.default!r}"
    fact = f"Expected {name} as {wanted}, found {value}"
    return InputError(fact, f"Give {name}= within these bounds{default}")


class Recipe(Settings):
    """Settings of a run. The defaults are the published ones (see `recipe` for the presets).

    Rates are per step; `batch` counts subjects, `tokens_at_once` bounds what is computed at once
    (a batch above it is accumulated). `decimate` lists factors of TR augmentation; `crop` takes a
    random stretch of each scan. `shard` splits weights and optimizer over the processes (FSDP2).
    """

    stage: Literal["structure", "dynamics", "harmonizer", "label"]
    steps: Count = 100_000
    batch: Count = 512
    seed: Seed = 0
    rate: Rates = (5e-5, 1e-3, 1e-6)
    warmup: Part = 40 / 300  # of the steps
    decay: Decays = (0.04, 0.4)
    betas: Shares = (0.9, 0.999)
    clip: Above = 1.0  # norm of the gradient
    momentum: Shares = (0.996, 1.0)  # of the teacher, first and last
    hidden: Inner = 0.75  # of the cubes
    loss: Literal["relational", "paper", "release"] | None = None  # None: the harmonizer's own
    reconstruction: Rate = 0.1  # weight beside the relational loss
    drop_modality: Share = 0.2  # of the cases
    decimate: Factors = (1, 2, 3, 4)
    slowest_tr: Above = 3.0  # s, after decimation
    antialias: bool = False
    crop: bool = True
    whole: Share = 0.0  # of the cases in which a scan is read whole although `crop`
    shortest: Count = 4  # patches of a crop in time, where the scan has as many
    precision: Literal["float32", "bfloat16"] = "bfloat16"
    compile: bool = False
    shard: bool = False
    tokens_at_once: Count = 65536
    evaluate_every: Count = 500
    checkpoint_every: Count = 500
    patience: Patience = None  # evaluations without a lower loss; None: no early stopping


def recipe(stage: str, preset: str = "release", **changes) -> Recipe:
    """The settings of a stage for a preset, else the published ones, with changes by name."""
    smaller = _PRESETS.get(preset, {}).get(stage, {})
    return Recipe(**{"stage": stage, **_PUBLISHED.get(stage, {}), **smaller, **changes})


_PUBLISHED = {  # rates of both at the batch of 512: base rate x batch / 256
    "structure": {"rate": (0.0, 3e-4, 0.0), "decay": (0.05, 0.05), "betas": (0.9, 0.95)},
    "harmonizer": {"rate": (0.0, 1e-3, 0.0), "decay": (0.05, 0.05), "betas": (0.9, 0.95)},
}
_RELATIONAL = {
    "batch": 64, "rate": (0.0, 2e-3, 0.0), "decay": (0.05, 0.05), "betas": (0.9, 0.95),
    "decimate": (1, 1, 1, 1, 2, 3, 4), "slowest_tr": 6.01, "whole": 0.3, "shortest": 2,
    "warmup": 0.1,
}  # fmt: skip
_QUICK = {"precision": "float32", "tokens_at_once": 16384, "warmup": 0.1, "checkpoint_every": 100}
_PRESETS = {
    "base": {"harmonizer": _RELATIONAL},
    "small": {"harmonizer": _RELATIONAL},
    "workshop": {"harmonizer": {
        **_QUICK, **_RELATIONAL, "steps": 400, "evaluate_every": 50,
    }},
    "paper": {
        "structure": {
            **_QUICK, "steps": 400, "batch": 16, "rate": (1e-4, 2e-3, 1e-5), "evaluate_every": 100,
        },
        "dynamics": {
            **_QUICK, "steps": 200, "batch": 8, "rate": (1e-4, 1e-3, 1e-5), "evaluate_every": 50,
            "decay": (0.04, 0.1), "decimate": (1, 2),
        },
        "harmonizer": {
            **_QUICK, "steps": 300, "batch": 8, "rate": (1e-4, 1e-3, 1e-5), "evaluate_every": 50,
            "decimate": (1, 2),
        },
    },
}  # fmt: skip


def learning_rate(step: int, steps: int, warmup: float, rate: tuple) -> float:
    """Linear from the first to the highest rate over the warm-up, then a cosine to the last."""
    first, highest, last = rate
    rising = round(warmup * steps)
    if step < rising:
        return first + (highest - first) * (step + 1) / rising
    return cosine(highest, last, (step - rising) / max(1, steps - rising))


def cosine(start: float, end: float, share: float) -> float:
    """From `start` to `end` along half a cosine; `share` 0 to 1."""
    return start + (end - start) * (1 - math.cos(math.pi * share)) / 2


def linear(start: float, end: float, share: float) -> float:
    """From `start` to `end` along a line; `share` 0 to 1."""
    return start + (end - start) * share
