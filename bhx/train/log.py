"""What a run leaves to be read: its log as a Dataset, figures of it, and signs of collapse."""

from __future__ import annotations

import contextlib
import json
import os
import warnings
from pathlib import Path

import numpy as np
import torch
import xarray as xr
from torch import nn

from bhx.data.page import private
from bhx.errors import InputError
from bhx.modalities.table import MODALITIES

NAMES = {
    "loss": "loss",
    "loss_relations": "disagreement on who is like whom (1 - r)",
    "rate": "learning rate",
    "norm": "norm of the gradient before clipping",
    "tokens": "tokens of the step",
    "variance": "variance between subjects, mean of the dimensions",
    "effective_rank": "effective rank",
    "cosine": "cosine between subjects, mean of the pairs",
}


def long_name(key: str) -> str:
    """A quantity of the log in words."""
    part = key.removeprefix("held_out_")
    held_out = "held-out " if part != key else ""
    for modality in MODALITIES.values():
        if part == f"loss_{modality.name}":
            return f"{held_out}loss of the {modality.tokens.replace('_tokens', '')} tokens"
    return held_out + NAMES.get(part, part)


def append(path: Path, kind: str, step: int, values: dict) -> None:
    """Add a line to a log: of a "step" or an "evaluation"."""
    with names_what_failed(path), open(path, "a") as file:
        file.write(json.dumps({"kind": kind, "step": step, **values}) + "\n")


def cut_after(path: Path, step: int) -> None:
    """Drop what was logged after a step, whole or not at all."""
    kept = [json.dumps(line) + "\n" for line in _lines(path) if line["step"] <= step]
    part = path.with_suffix(".part")
    with names_what_failed(path):
        part.write_text("".join(kept))
        os.replace(part, path)


@contextlib.contextmanager
def names_what_failed(path):
    """An error of writing as a sentence with the path."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        fact = f"Expected to write '{path}', found {error}"
        raise InputError(fact, "Make room and resume: the last checkpoint is untouched") from error


def read_log(out, stage: str) -> xr.Dataset:
    """The log of a run as a Dataset.

    Parameters
    ----------
    out : folder given to bhx.pretrain
    stage : "structure", "dynamics" or "harmonizer"

    Returns
    -------
    xarray.Dataset
        On `step` (1 = the first): `loss` and its parts, `rate`, `norm`, `tokens`. On `evaluation`
        (the step it followed): the held-out losses and `variance`, `effective_rank`, `cosine`.
    """
    path = Path(out) / stage / "log.jsonl"
    if not path.exists():
        fact = f"Expected a log at '{path}', found none"
        raise InputError(fact, "Give the folder that bhx.pretrain was given as out=")
    lines, data, coords = _lines(path), {}, {}
    for dim in ("step", "evaluation"):
        rows = [x for x in lines if x["kind"] == dim]
        for key in dict.fromkeys(k for x in rows for k in x if k not in ("kind", "step")):
            values = np.array([x.get(key, np.nan) for x in rows], float)
            data[key] = (dim, values, {"long_name": long_name(key)})
        coords[dim] = (dim, np.array([x["step"] for x in rows], int), {"long_name": dim})
    return xr.Dataset(data, coords, {"stage": stage})


def _lines(path):
    """What a log says, but for a last line that a kill cut short."""
    return [json.loads(line) for line in path.read_text().split("\n")[:-1]]


def plot_log(log: xr.Dataset):
    """Losses above, signs of collapse below, as a plotly figure of a log from `read_log`."""
    from plotly.subplots import make_subplots

    shown = [k for k in ("effective_rank", "variance", "cosine") if k in log]
    titles, n = ["", *(NAMES[k].split(",")[0] for k in shown)], max(1, len(shown))
    places = [[{"colspan": n}] + [None] * (n - 1), [{}] * n]
    figure = make_subplots(2, n, specs=places, subplot_titles=titles, vertical_spacing=0.2)
    losses = [k for k in map(str, log) if "loss" in k]
    in_parts = any(k.startswith("loss_") for k in losses)
    for name in [k for k in losses if not (k == "loss" and in_parts)]:
        dim = log[name].dims[0]
        mode = "lines" if dim == "step" else "lines+markers"
        x, y = log[dim].values, log[name].values
        figure.add_scatter(x=x, y=y, mode=mode, name=long_name(name), row=1, col=1)
    for column, name in enumerate(shown, 1):
        x, y = log.evaluation.values, log[name].values
        figure.add_scatter(x=x, y=y, mode="lines+markers", showlegend=False, row=2, col=column)
    figure.update_xaxes(title_text="step").update_yaxes(title_text="loss", row=1, col=1)
    legend = {"orientation": "h", "y": 1.02, "yanchor": "bottom"}
    figure.update_layout(template="plotly_white", height=600, margin={"t": 110}, legend=legend)
    return private(figure, title=log.attrs.get("stage", ""))


def collapse(tokens: torch.Tensor) -> dict:
    """Signs of collapse in subjects' tokens (subjects, n, width), which stand at the same places.

    `variance` (mean over dimensions) and `effective_rank` (exponential of the entropy of the
    covariance's eigenvalues, Roy & Vetterli 2007) look at what is left when the mean over subjects
    is taken off each place; `cosine` is the mean over pairs of subjects. NaN for one subject.
    """
    n = len(tokens)
    if n < 2:
        return dict.fromkeys(("variance", "effective_rank", "cosine"), float("nan"))
    left = (tokens - tokens.mean(0)).flatten(0, 1).double()
    values = torch.linalg.eigvalsh(left.T @ left).clamp(min=0)
    share = values / values.sum().clamp(min=1e-300)
    flat = nn.functional.normalize(tokens.flatten(1).double(), dim=1)
    return {
        "variance": float(values.sum() / (left.shape[0] - left.shape[0] / n) / left.shape[1]),
        "effective_rank": float(torch.special.entr(share).sum().exp()),
        "cosine": float(((flat @ flat.T).sum() - n) / (n * (n - 1))),
    }


def warn_of_collapse(found: dict, step: int) -> None:
    """Say that subjects become alike, and what to try."""
    if found["effective_rank"] < 3 or found["variance"] < 1e-6:
        warnings.warn(
            f"The representation is collapsing at step {step}: effective rank "
            f"{found['effective_rank']:.1f}, variance {found['variance']:.1e}. Lower rate=, raise "
            "momentum= toward (0.999, 1), or train on more varied subjects.",
            stacklevel=5,
        )
