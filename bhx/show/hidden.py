"""What a stage of pretraining hides and what comes back: labeled arrays, and live figures.

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
    cohort : with T1s
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
    scaled = cubes(scale_t1(scan.values, config.voxel_mm), config.cube)
    removed = cube_mask(config.tokens, share, np.random.default_rng(seed))
    both = [torch.from_numpy(x)[None].to(model.device) for x in (scaled, removed)]
    guess = reconstruct(model.networks.structure, model.networks.structure_decoder, *both)[0].cpu()
    own, removed = normalized_cubes(both[0])[0].cpu(), torch.from_numpy(removed == 1)[:, None]
    if not normalized:
        own = torch.from_numpy(cubes(scan.values, config.cube))
        guess = guess * (own.var(-1, keepdim=True) + 1e-6).sqrt() + own.mean(-1, keepdim=True)
    parts = {
        name: own,
        "visible": own.masked_fill(removed, torch.nan),
        "returned": torch.where(removed, guess, own),
    }
    volumes = {p: volume(x.numpy(), config.grid, config.cube) for p, x in parts.items()}
    axes = {axis: scan[axis].variable for axis in ANATOMY.dims}
    return xr.Dataset({part: (ANATOMY.dims, values) for part, values in volumes.items()}, axes)


def hidden_tokens(model: Model, *, patches: int, seed: int = 0) -> xr.DataArray:
    """Which tokens of a scan of that many patches the predictor sees and must guess.

    Returns
    -------
    xarray.DataArray
        (roi, patch): 1 where a token is visible, 2 where it is hidden, 0 where it is neither.
    """
    config, atlas = model.config.dynamics, model.atlas
    state = np.zeros((config.parcels, patches), np.int8)
    for value, tokens in enumerate(jepa_masks(*state.shape, np.random.default_rng(seed)), start=1):
        state.flat[tokens] = value
    onset = config.patch_onsets(patches, config.patch_seconds)
    coords = {"roi": atlas.roi, "network": atlas.network, "onset": ("patch", onset, {"units": "s"})}
    attrs = {"long_name": "1 visible, 2 hidden, 0 neither"}
    return xr.DataArray(state, coords, ("roi", "patch"), attrs=attrs)


def live(cohort: xr.Dataset, subject: str):
    """What to give `bhx.pretrain` as `watch` in a notebook.

    At every evaluation the losses are drawn again in place, and in the stage "structure" the
    brain of `subject` as it comes back from a quarter of its cubes.
    """
    from IPython.display import display

    handles = {}

    def show(name, figure, raw):
        if name in handles:
            handles[name].update(figure, raw=raw)
        else:
            handles[name] = display(figure, raw=raw, display_id=True)

    def draw(log, model):
        # plotly displays itself past a handle, so its figure goes as the bundle it would send
        bundle = {"application/vnd.plotly.v1+json": json.loads(plot_log(log).to_json())}
        show("log", bundle, True)
        if log.attrs["stage"] == "structure":
            back = hidden_cubes(cohort, model, subject).returned
            title = f"step {int(log.evaluation[-1])}"
            show("brain", plot_volume(back, title=title, static=True), False)

    return draw
