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
Whole = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0, le=1)]
Rate = Annotated[float, Field(ge=0, lt=math.inf)]


class Settings(BaseModel):
    """Named values with bounds, checked once when they are made; they never change."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    def __init__(self, **values):
        values = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise _refusal(type(self), error.errors()[0]) from None


def _refusal(kind, found):
    """One sentence of what does not fit, with the bounds and the default beside it."""
    name = str(found["loc"][0])
    if found["type"] == "extra_forbidden":
        known = listed(sorted(kind.model_fields), 40)
        return InputError(f"Expected settings of {known}, found {name}", "Take one of these names")
    if found["type"] == "missing" and len(found["loc"]) == 1:
        return InputError(f"Expected {name}, found no value for it", f"Give {name}=")
    field = kind.model_fields[name]
    inside = len(found["loc"]) > 1 and found["type"] != "missing"
    value = f"{found['input']!r} in it" if inside else repr(found["input"])
    default = "" if field.is_required() else f", such as the default {field.default!r}"
    fact = f"Expected {name} as {field.description}, found {value}"
    return InputError(fact, f"Give {name}= within these bounds{default}")


class Recipe(Settings):
    """Settings of a run. The defaults are the published ones (see `recipe` for the presets).

    Rates are per step; `batch` counts subjects, `tokens_at_once` bounds what is computed at once
    (a batch above it is accumulated). `decimate` lists factors of TR augmentation; `crop` takes a
    random stretch of each scan. `shard` splits weights and optimizer over the processes (FSDP2).
    """

    stage: Literal["structure", "dynamics", "harmonizer", "label"] = Field(
        description=f"one of {listed(STAGES)}"
    )
    steps: Whole = Field(100_000, description="a whole number of at least 1")
    batch: Whole = Field(512, description="a whole number of at least 1 (subjects)")
    seed: int = Field(0, ge=0, description="a whole number of at least 0")
    rate: tuple[Rate, Rate, Rate] = Field(
        (5e-5, 1e-3, 1e-6), description="three learning rates: first, highest, last"
    )
    warmup: float = Field(40 / 300, ge=0, lt=1, description="a share of the steps, below 1")
    decay: tuple[Rate, Rate] = Field((0.04, 0.4), description="two weight decays: first, last")
    betas: tuple[Share, Share] = Field((0.9, 0.999), description="two shares from 0 to 1")
    clip: float = Field(1.0, gt=0, lt=math.inf, description="a norm of the gradient above 0")
    momentum: tuple[Share, Share] = Field(
        (0.996, 1.0), description="two shares from 0 to 1: the teacher's first and last"
    )
    hidden: float = Field(0.75, gt=0, lt=1, description="a share of cubes between 0 and 1")
    loss: Literal["paper", "release"] = Field("paper", description="'paper' or 'release'")
    drop_modality: Share = Field(0.2, description="a share from 0 to 1")
    decimate: tuple[Whole, ...] = Field(
        (1, 2, 3, 4), min_length=1, description="whole factors such as (1, 2)"
    )
    slowest_tr: float = Field(3.0, gt=0, description="seconds above 0, after decimation")
    antialias: bool = Field(False, description="True or False")
    crop: bool = Field(True, description="True or False")
    shortest: Whole = Field(4, description="a whole number of patches, at least 1")
    precision: Literal["float32", "bfloat16"] = Field(
        "bfloat16", description="'float32' or 'bfloat16'"
    )
    compile: bool = Field(False, description="True or False")
    shard: bool = Field(False, description="True or False")
    tokens_at_once: Whole = Field(65536, description="a whole number of at least 1")
    evaluate_every: Whole = Field(500, description="a whole number of steps, at least 1")
    checkpoint_every: Whole = Field(500, description="a whole number of steps, at least 1")
    patience: Whole | None = Field(
        None, description="a whole number of evaluations, at least 1, or None"
    )


def recipe(stage: str, preset: str = "base", **changes) -> Recipe:
    """The published settings of a stage, or those of a smaller preset, with changes by name."""
    smaller = _SMALLER.get(preset, {}).get(stage, {})
    return Recipe(**{"stage": stage, **_PUBLISHED.get(stage, {}), **smaller, **changes})


_PUBLISHED = {  # rates of both at the batch of 512: base rate x batch / 256
    "structure": {"rate": (0.0, 3e-4, 0.0), "decay": (0.05, 0.05), "betas": (0.9, 0.95)},
    "harmonizer": {"rate": (0.0, 1e-3, 0.0), "decay": (0.05, 0.05), "betas": (0.9, 0.95)},
}
_QUICK = {"precision": "float32", "tokens_at_once": 16384, "warmup": 0.1, "checkpoint_every": 100}
_SMALLER = {
    "workshop": {
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
