"""Integrated gradients: how much each part of a scan itself moves a hub token."""

from __future__ import annotations

import numpy as np
import xarray as xr

from bhx.latents.pool import row_of
from bhx.schema import check


def integrated_gradients(
    cohort: xr.Dataset, model, subject: str, token: int, *, steps: int = 16
) -> xr.Dataset:
    """How much each parcel's and cube's own values move one hub token away from an empty scan.

    Gradients of the token's output along its own displacement are summed on the straight way from
    an empty scan to this one, so that all parts together add up to the distance moved. Empty is
    every scaled value 0, or where a modality has no encoder, the mean person of training. A
    relational hub's fixed sketch is left out. Only the first window of a long scan is read.

    Returns
    -------
    Dataset with one variable a modality, `<modality>_part` on the dims of its map (such as
    `bold_part` (roi)), in units of the token's distance; attrs `distance`, and `gap`: the
    share of it that the sum misses, smaller with more `steps`

    Source: Sundararajan et al., ICML 2017 (arXiv 1703.01365), by captum, Gauss-Legendre quadrature.
    """
    import torch
    from captum.attr import IntegratedGradients

    from bhx.encode.inputs import Reading, encode_readings, sequences

    reading = _reading(cohort, model, subject)
    names = list(reading.windows)
    whole = tuple(reading.windows[name][0][None].to(model.device) for name in names)

    def output(*inputs):
        """The hub token (n, width) of n scans whose windows are stacked in the inputs."""
        there = {name: reading.there[name] for name in names}
        readings = [
            Reading({n: [x[i]] for n, x in zip(names, inputs, strict=True)}, there)
            for i in range(len(inputs[0]))
        ]
        read = sequences(
            model.config, readings, encode_readings(model.networks, readings, model.device)
        )
        return model.networks.harmonizer.read(read.subjects)[:, token]

    encoders = [model.networks.encoder(name) for name in names]
    pairs = zip(encoders, whole, strict=True)
    empty = tuple(getattr(e, "mean", torch.zeros_like(x[0]))[None].clone() for e, x in pairs)
    with torch.no_grad():
        way = (output(*whole) - output(*empty))[0]
    distance = float(way.norm())
    found = IntegratedGradients(lambda *x: output(*x) @ way / distance).attribute(
        whole, empty, n_steps=steps, method="gausslegendre", internal_batch_size=4
    )
    out = xr.Dataset(attrs={"distance": distance})
    for name, parts in zip(names, found, strict=True):
        modality = model.config.modalities[name]
        places = modality.rows(model.config, parts.shape[1:-1])
        each = np.zeros((1, model.config.places(name)))
        each[0, places] = parts[0].sum(-1).flatten().detach().cpu().numpy()
        values = modality.to_map(each, model.config)[0]
        coords = {n: c for n, c in model.coords(modality.map_dims).items()
                  if c[0] in modality.map_dims}  # fmt: skip
        out[f"{name}_part"] = xr.DataArray(values, coords, modality.map_dims)
    total = sum(float(v.sum()) for v in out.data_vars.values())
    return out.assign_attrs(gap=1 - total / distance)


def _reading(cohort, model, subject):
    """One subject as the networks read it, first window only."""
    from bhx.encode.embed import aligned_to
    from bhx.encode.inputs import read_subject

    cohort = cohort.isel(subject=[row_of(cohort, subject)])
    one = aligned_to(check(cohort, "cohort"), model).isel(subject=0).compute()
    values = {name: v.values for name, v in one.data_vars.items() if bool(one[f"has_{name}"])}
    facts = {name: c.values for name, c in one.coords.items() if not c.dims}
    reading = read_subject(values, facts, model.config)
    for name in reading.windows:
        reading.windows[name] = reading.windows[name][:1]
        reading.there[name] = reading.there[name][:1]
    return reading
