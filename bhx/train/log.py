"""What is seen of a run: its log as a Dataset, figures of it, and signs of collapse."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
import xarray as xr
from torch import nn

from bhx.errors import InputError

NAMES = {
    "loss": "loss",
    "loss_bold": "loss of the dynamics tokens",
    "loss_t1": "loss of the structure tokens",
    "held_out_loss": "held-out loss",
    "held_out_loss_bold": "held-out loss of the dynamics tokens",
    "held_out_loss_t1": "held-out loss of the structure tokens",
    "rate": "learning rate",
    "norm": "norm of the gradient before clipping",
    "tokens": "tokens of the step",
    "variance": "variance between subjects, mean of the dimensions",
    "effective_rank": "effective rank",
    "cosine": "cosine between subjects, mean of the pairs",
}


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
        raise InputError(f"Expected a log at '{path}', found none", "Is this the folder of a run")
    lines = [x for x in map(parsed, path.read_text().splitlines()) if x]
    data, coords = {}, {}
    for dim in ("step", "evaluation"):
        rows = [x for x in lines if x["kind"] == dim]
        for key in dict.fromkeys(k for x in rows for k in x if k not in ("kind", "step")):
            values = np.array([x.get(key, np.nan) for x in rows], float)
            data[key] = (dim, values, {"long_name": NAMES.get(key, key)})
        coords[dim] = (dim, np.array([x["step"] for x in rows], int), {"long_name": dim})
    return xr.Dataset(data, coords, {"stage": stage})


def parsed(line: str) -> dict:
    """One line of a log; empty for a line that a kill cut short."""
    try:
        return json.loads(line)
    except json.JSONDecodeError:
        return {}


def plot_log(log: xr.Dataset):
    """Losses above, signs of collapse below, as a plotly figure of a log from `read_log`."""
    from plotly.subplots import make_subplots

    shown = [k for k in ("effective_rank", "variance", "cosine") if k in log]
    titles, n = ["", *(NAMES[k].split(",")[0] for k in shown)], max(1, len(shown))
    places = [[{"colspan": n}] + [None] * (n - 1), [{}] * n]
    figure = make_subplots(2, n, specs=places, subplot_titles=titles, vertical_spacing=0.2)
    losses = [k for k in log if "loss" in k and not (k == "loss" and "loss_bold" in log)]
    for name in losses:
        dim = log[name].dims[0]
        look = {
            "mode": "lines" if dim == "step" else "lines+markers",
            "name": NAMES.get(name, name),
        }
        figure.add_scatter(x=log[dim].values, y=log[name].values, **look, row=1, col=1)
    look = {"mode": "lines+markers", "showlegend": False}
    for column, name in enumerate(shown, 1):
        figure.add_scatter(x=log.evaluation.values, y=log[name].values, **look, row=2, col=column)
    figure.update_xaxes(title_text="step").update_yaxes(title_text="loss", row=1, col=1)
    legend = {"orientation": "h", "y": 1.02, "yanchor": "bottom"}
    figure.update_layout(template="plotly_white", height=600, margin={"t": 110}, legend=legend)
    return figure.update_layout(title=log.attrs.get("stage", ""))


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
