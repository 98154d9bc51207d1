"""A model that takes and returns labelled arrays."""

from __future__ import annotations

import json
from dataclasses import asdict

import numpy as np
import torch
import xarray as xr

from bhx.data.atlas import load_atlas, match_names
from bhx.encode.inputs import (
    CUBE_DIMS,
    Reading,
    cube_coords,
    dynamics_array,
    encode_windows,
    in_windows,
)
from bhx.errors import InputError, check_choice
from bhx.modalities.bold import check_tr
from bhx.modalities.t1 import t1_grid
from bhx.model.checkpoints import read_weights
from bhx.model.config import PRESETS, Harmonix, HarmonixConfig, build
from bhx.schema import ROI_COORDS, dims_of


def load_model(source="workshop", *, device: str | None = None) -> Model:
    """A model with its weights, ready to read labelled scans.

    Parameters
    ----------
    source : name of shipped weights ("workshop"), a folder that bhx.pretrain wrote, or
        "release:<folder>" with the published BrainHarmonix files
    device : "cpu", "cuda", or "mps" (untested); by default "cuda" where there is one, else "cpu"

    Raises
    ------
    InputError
        The files are missing, cut short, altered, or of another architecture.
    """
    return Model(read_weights(source), device)


def random_model(preset: str | HarmonixConfig = "workshop", *, seed: int = 0, device=None) -> Model:
    """The same network before any training: the control of every claim about trained weights."""
    if isinstance(preset, str):
        check_choice("preset", preset, PRESETS)
    config = PRESETS[preset] if isinstance(preset, str) else preset
    atlas = load_atlas(config.atlas, order=config.order)
    harmonics = atlas.harmonics.values[:, : config.dynamics.harmonics]
    networks = build(
        config, harmonics, atlas.gradients.values[:, : config.dynamics.gradients], seed
    )
    networks.provenance = {"source": f"random weights, seed {seed}", "weights_sha256": ""}
    return Model(networks, device)


class Model:
    """Networks that take and return labelled arrays.

    `structure`, `dynamics` and `harmonize` are the bare networks on data already scaled; `embed`
    does everything for a cohort. `networks` holds the torch modules, `config` their sizes.
    """

    def __init__(self, networks: Harmonix, device: str | None = None):
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.networks = networks.to(self.device).eval()
        self.config = networks.config
        self.provenance = networks.provenance
        self.atlas = load_atlas(self.config.atlas, order=self.config.order)

    def __repr__(self):
        size = sum(p.numel() for p in self.networks.parameters()) / 1e6
        return (
            f"bhx model '{self.config.name}': {size:.1f} M parameters, {self.config.atlas} "
            f"({self.config.order}), {self.config.harmonizer.hubs} hub tokens x "
            f"{self.config.harmonizer.width}, patches '{self.config.dynamics.patching}', "
            f"{self.device}"
        )

    @torch.no_grad()
    def structure(self, t1: xr.DataArray) -> xr.DataArray:
        """Cube tokens (..., cx, cy, cz, feature) of scaled T1 volumes (..., x, y, z)."""
        one = "subject" not in t1.dims
        t1 = (t1.expand_dims("subject") if one else t1).transpose(*dims_of("cohort")["t1"])
        check_grid(t1, self.config.structure.voxel_mm)
        x = torch.tensor(np.ascontiguousarray(t1), dtype=torch.float32, device=self.device)
        y = self.networks.structure(x).unflatten(1, self.config.structure.grid)
        out = xr.DataArray(
            y.cpu().numpy(), dims=dims_of("latents")["structure"], coords=cube_coords(self.config)
        )
        out = out.assign_coords(subject=t1.subject) if "subject" in t1.coords else out
        return out.isel(subject=0) if one else out

    @torch.no_grad()
    def dynamics(self, bold: xr.DataArray, *, tr: float | None = None) -> xr.DataArray:
        """Tokens (roi, patch, feature) of one scaled scan (roi, time), in windows if it is long.

        `tr` [s]; read off `time` in seconds (bhx.scan gives it) by default. Patches with a NaN
        are not computed and are NaN in the result.
        """
        if bold.dims != ("roi", "time"):
            fact = f"Expected one scan with dims ('roi', 'time'), found {bold.dims}"
            raise InputError(fact, "Take it from the cohort: bhx.scan(cohort, subject)")
        tr = _tr(bold, tr)
        bold = bold.isel(roi=positions_of(self, bold.roi.values))
        reading = Reading(*in_windows(bold.values, tr, self.config.dynamics))
        done = encode_windows(self.networks, [reading], self.device)[0]
        tokens, _ = dynamics_array(self.config, reading, done)
        onset = self.config.dynamics.patch_onsets(tokens.shape[1], tr)
        return xr.DataArray(
            tokens,
            dims=("roi", "patch", "feature"),
            coords=self._roi() | {"onset": ("patch", onset, {"units": "s"})},
        )

    @torch.no_grad()
    def harmonize(self, dynamics=None, structure=None) -> xr.DataArray:
        """Hub tokens (token, feature) of one subject's tokens, either of which may be None.

        Tokens that are NaN are left out.
        """
        c = self.config.harmonizer
        tokens, rows = [], []
        if dynamics is not None:
            dynamics = dynamics.transpose("roi", "patch", "feature")
            dynamics = dynamics.isel(roi=positions_of(self, dynamics.roi.values))
            tokens.append(torch.tensor(dynamics.values).flatten(0, 1))
            rows.append(c.dynamics_rows(dynamics.sizes["patch"]))
        if structure is not None:
            cube = structure.transpose(*CUBE_DIMS, "feature")
            tokens.append(torch.tensor(cube.values).flatten(0, 2))
            rows.append(c.structure_rows())
        if not tokens:
            raise InputError("Expected dynamics or structure tokens, found neither", "Give one")
        if dynamics is not None and dynamics.sizes["patch"] > c.max_patches:
            raise InputError(
                f"Expected at most {c.max_patches} patches, found {dynamics.sizes['patch']}",
                "Give one window: dynamics.isel(patch=slice(0, 18)); bhx.embed does this by itself",
            )
        tokens, rows = torch.cat(tokens), torch.cat(rows)
        there = tokens.isfinite().all(-1)
        hub = self.networks.harmonizer([tokens[there].to(self.device)], [rows[there]])
        return xr.DataArray(hub[0, 1:].cpu().numpy(), dims=("token", "feature"))

    @torch.no_grad()
    def positions(self) -> xr.Dataset:
        """What tells tokens apart: `place (roi, channel)`, `time (patch, time_channel)`,
        `cube (cx, cy, cz, feature)`."""
        f, s = self.networks.dynamics, self.networks.structure
        both = f.pos_embed(self.config.dynamics.max_patches).cpu()
        half = self.config.dynamics.width // 2
        cube = s.pos_embed[0, 1:].unflatten(0, self.config.structure.grid).cpu()
        return xr.Dataset(
            {
                "place": (("roi", "channel"), both[:, 0, half:].numpy()),
                "time": (("patch", "time_channel"), both[0, :, :half].numpy()),
                "cube": ((*CUBE_DIMS, "feature"), cube.numpy()),
            },
            self._roi() | cube_coords(self.config),
        )

    @torch.no_grad()
    def kernels(self, tr: float) -> xr.DataArray:
        """The patch kernel (feature, seconds) as a scan at this TR [s] meets it."""
        check_tr(tr)
        c = self.config.dynamics
        k = c.kernel if c.patching == "exact" else c.patch_volumes(tr)
        step = c.patch_seconds / c.kernel if c.patching == "exact" else tr
        return xr.DataArray(
            self.networks.dynamics.kernel(k).T.cpu().numpy(),
            dims=("feature", "seconds"),
            coords={"seconds": ("seconds", np.arange(k) * step, {"units": "s"})},
            attrs={"tr": tr, "patching": c.patching, "patch_seconds": k * step},
        )

    def describe(self) -> xr.Dataset:
        """Sizes of every part: `parameters (part)`, and the configuration in the attributes."""
        parts = {
            n: sum(p.numel() for p in m.parameters()) for n, m in self.networks.named_children()
        }
        return xr.Dataset(
            {"parameters": ("part", list(parts.values()))},
            {"part": list(parts)},
            {
                "name": self.config.name,
                "config": json.dumps(asdict(self.config)),
                **self.provenance,
            },
        )

    def _roi(self):
        names = ("roi", *ROI_COORDS)
        return {n: ("roi", self.atlas[n].values, self.atlas[n].attrs) for n in names}


def positions_of(model, given):
    """Where each parcel of the model stands among the names `given`."""
    found = {name: i for i, name in enumerate(match_names(given, model.atlas))}
    return np.array([found[str(name)] for name in model.atlas.roi.values])


def check_grid(t1, voxel_mm):
    """Refuse a T1 that is not on the model's grid, saying how it differs."""
    grid = t1_grid(voxel_mm)
    size, shape = tuple(t1.sizes[a] for a in "xyz"), tuple(len(v) for v in grid.values())
    if size != shape:
        raise InputError(
            f"Expected a T1 of {shape} voxels of {voxel_mm:g} mm, found {size}",
            "bhx.cohort.prepare brings it there; or open the cohort with voxel_mm=",
        )
    for axis, values in grid.items():
        if axis not in t1.coords:
            fact = f"Expected MNI coordinates [mm] on '{axis}', found none"
            raise InputError(fact, "Assign bhx.schema.t1_grid(voxel_mm)")
        given = t1[axis].values
        if np.allclose(given, values, atol=0.01):
            continue
        flipped = np.allclose(given[::-1], values, atol=0.01)
        raise InputError(
            f"Expected '{axis}' from {values[0]:g} to {values[-1]:g} mm, found {given[0]:g} to "
            f"{given[-1]:g}" + (": this axis is flipped" if flipped else ""),
            f"t1.sel({axis}=t1.{axis}[::-1]) turns it" if flipped else "Resample it to this grid",
        )


def _tr(bold, tr):
    if tr is None:
        if bold["time"].attrs.get("units") != "s" or bold.sizes["time"] < 2:
            raise InputError(
                "Expected the scan's TR, found none", "Give tr= in seconds, or take bhx.scan(...)"
            )
        tr = float(bold.time[1] - bold.time[0])
    check_tr(tr)
    return float(tr)
