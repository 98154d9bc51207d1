"""What a stage of pretraining hides and what comes back: labelled arrays, and live figures.

The masks are those of `feed`; nothing is trained here.
"""

from __future__ import annotations

import json

import numpy as np
import torch
import xarray as xr

from bhx.encode.embed import aligned_to
from bhx.encode.model import Model
from bhx.errors import InputError
from bhx.modalities.bold import jepa_masks
from bhx.modalities.t1 import ANATOMY, cube_mask, cubes, scale_t1, volume
from bhx.model.layers import normalized as normalized_cubes
from bhx.model.structure import reconstruct
from bhx.schema import who_has
from bhx.show.volume import plot_volume
from bhx.train.log import plot_log


@torch.no_grad()
def hidden_cubes(
    cohort: xr.Dataset,
    model: Model,
    subject: str,
    *,
    share: float = 0.75,
    seed: int = 0,
    normalized: bool = False,
) -> xr.Dataset:
    """A T1 as the masked autoencoder meets it.

    Parameters
    ----------
    cohort : with `t1`
    model : with the decoder of its masked autoencoder
    subject : id of a row of the cohort
    share : of the cubes, removed
    seed : of the choice of cubes
    normalized : each cube less its own mean, over its own deviation: the units of the loss

    Returns
    -------
    xarray.Dataset
        On (x, y, z), in the T1's own units: `t1`; `visible`, NaN where cubes are removed; and
        `returned`, the removed cubes as the decoder guesses them. The network guesses each cube
        normalized; unless `normalized`, the cube's own mean and deviation, which the network
        never saw, are put back for the picture.

    Raises
    ------
    InputError
        The subject has no T1, its grid does not fit, or the model has no decoder.
    """
    if model.networks.structure_decoder is None:
        raise InputError(
            "Expected a model with the decoder of its masked autoencoder, found one without",
            "Released weights may lack it: take 'workshop' or train the stage 'structure'",
        )
    config, name = model.config.structure, ANATOMY.name
    row = aligned_to(cohort.sel(subject=[subject]), model)
    if name not in row or not who_has(row, name).all():
        fact = f"Expected a subject with a T1, found none for '{subject}'"
        raise InputError(fact, f"See cohort.{ANATOMY.has} for those who have one")
    scan = row[name].isel(subject=0)
    scaled = torch.from_numpy(cubes(scale_t1(scan.values, config.voxel_mm), config.cube))[None]
    hidden = torch.from_numpy(cube_mask(config.tokens, share, np.random.default_rng(seed)))[None]
    scaled, hidden = scaled.to(model.device), hidden.to(model.device)
    guess = reconstruct(model.networks.structure, model.networks.structure_decoder, scaled, hidden)
    own = normalized_cubes(scaled)
    if not normalized:
        own = torch.from_numpy(cubes(scan.values, config.cube))[None].to(model.device)
        guess = guess * (own.var(-1, keepdim=True) + 1e-6).sqrt() + own.mean(-1, keepdim=True)
    removed = hidden.bool()[..., None]
    parts = {
        "t1": own,
        "visible": own.masked_fill(removed, torch.nan),
        "returned": torch.where(removed, guess, own),
    }
    return xr.Dataset(
        {
            part: (ANATOMY.dims, volume(x[0].cpu().numpy(), config.grid, config.cube))
            for part, x in parts.items()
        },
        {axis: scan[axis] for axis in ANATOMY.dims},
    )


def hidden_tokens(model: Model, *, patches: int, seed: int = 0) -> xr.DataArray:
    """Which tokens of a scan of that many patches the predictor sees and must guess.

    Returns
    -------
    xarray.DataArray
        (roi, patch): 1 where a token is visible, 2 where it is hidden, 0 where it is neither.
    """
    shape = (model.config.dynamics.parcels, patches)
    state = np.zeros(shape, np.int8)
    for value, tokens in enumerate(jepa_masks(*shape, np.random.default_rng(seed)), start=1):
        state.flat[tokens] = value
    onset = model.config.dynamics.patch_onsets(patches, model.config.dynamics.patch_seconds)
    return xr.DataArray(
        state,
        dims=("roi", "patch"),
        coords={
            "roi": model.atlas.roi,
            "network": model.atlas.network,
            "onset": ("patch", onset, {"units": "s"}),
        },
        attrs={"long_name": "1 visible, 2 hidden, 0 neither"},
    )


def live(cohort: xr.Dataset, subject: str):
    """What to give `bhx.pretrain` as `watch` in a notebook.

    At every evaluation the losses are drawn again in place, and in the stage "structure" the
    brain of `subject` as it comes back from a quarter of its cubes.
    """
    from IPython.display import display

    shown = {}

    def draw(log, model):
        # plotly displays itself past a handle, so its figure goes as the bundle it would send
        bundle = {"application/vnd.plotly.v1+json": json.loads(plot_log(log).to_json())}
        figures = {"log": (bundle, True)}
        if log.attrs["stage"] == "structure":
            back = hidden_cubes(cohort, model, subject).returned
            title = f"step {int(log.evaluation[-1])}"
            figures["brain"] = (plot_volume(back, title=title, static=True), False)
        for name, (figure, raw) in figures.items():
            if name in shown:
                shown[name].update(figure, raw=raw)
            else:
                shown[name] = display(figure, raw=raw, display_id=True)

    return draw
