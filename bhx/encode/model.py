"""A model that takes and returns labeled arrays."""

from __future__ import annotations

import json
from dataclasses import asdict
from math import prod
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import xarray as xr

from bhx.data.atlas import ATLASES, load_atlas, match_names
from bhx.encode.inputs import Reading, as_array, encode_readings, made_before
from bhx.encode.processes import own_device
from bhx.errors import InputError, check_choice, listed
from bhx.modalities.bold import BOLD, check_tr
from bhx.modalities.t1 import ANATOMY, check_grid
from bhx.modalities.table import MODALITIES
from bhx.model.checkpoints import ATLAS_FILE, SHIPPED, located, read_weights, save_weights
from bhx.model.config import PRESETS, Harmonix, HarmonixConfig, build
from bhx.model.hub import HubConfig
from bhx.schema import ROI_COORDS, who_has


def load_model(source="workshop", *, device: str | None = None) -> Model:
    """A model with its weights, ready to read labeled scans.

    Parameters
    ----------
    source : name of shipped weights ("workshop", or "paper" for the architecture of the paper at
        the same size, with its encoders); a folder that bhx.pretrain wrote; "release:<folder>" with
        the published BrainHarmonix files; "release" for these from the Hugging Face Hub, or
        "hf:<owner>/<name>" for a folder that somebody uploaded there (`pip install 'bhx[weights]'`;
        downloaded once, then used offline, and refused when they change)
    device : "cpu", "cuda", or "mps" (untested); by default "cuda" where there is one, else "cpu"

    Raises
    ------
    InputError
        The files are missing, cut short, altered, or of another architecture.
    """
    own_atlas = located(source)[0] / ATLAS_FILE
    if own_atlas.exists():
        load_atlas(own_atlas)
    return Model(read_weights(source), device)


def weights_table(name: str = "workshop", table: str = "planted_factors") -> pd.DataFrame:
    """Measurements that were made with shipped weights and travel beside them.

    Parameters
    ----------
    name : of the weights
    table : "planted_factors" (how well probes of trained and of random weights, and of plain
        features, predict each factor of the synthetic cohort) or, of the weights "paper",
        "held_out_errors" (the network beside simple predictors, on subjects it never saw:
        `explained` is 1 - error / error of the first predictor of that target)
    """
    check_choice("weights", name, sorted(p.parent.name for p in SHIPPED.glob("*/config.json")))
    check_choice("table", table, sorted(p.stem for p in (SHIPPED / name).glob("*.csv")))
    return pd.read_csv(SHIPPED / name / f"{table}.csv")


def random_model(
    preset: str | HarmonixConfig = "workshop", *, seed: int = 0, device=None, atlas=None
) -> Model:
    """The same network before any training: the control of every claim about trained weights.

    Parameters
    ----------
    preset : a name of `bhx.PRESETS`, or a configuration
    atlas : whose parcels it reads (see `bhx.load_atlas`), instead of the preset's own
    seed : of the weights; the same seed gives the same weights
    """
    config = config_of(preset)
    if atlas is not None:
        atlas = load_atlas(atlas)
        config = config.on_atlas(atlas.attrs["atlas"], atlas.sizes["roi"])
    atlas = load_atlas(config.atlas, order=config.order)
    harmonics = atlas.harmonics.values[:, : config.dynamics.harmonics]
    gradients = atlas.gradients.values[:, : config.dynamics.gradients]
    networks = build(config, harmonics, gradients, seed)
    networks.provenance = {"source": f"random weights, seed {seed}", "weights_sha256": ""}
    return Model(networks, device)


def config_of(preset: str | HarmonixConfig) -> HarmonixConfig:
    """The configuration of that name, or the one given."""
    if isinstance(preset, HarmonixConfig):
        return preset
    check_choice("preset", preset, PRESETS)
    return PRESETS[preset]


def reading_all_of(config: HarmonixConfig, cohort: xr.Dataset) -> HarmonixConfig:
    """The configuration with a modality for every variable of the cohort that it does not read;
    a relational hub leaves out those that nobody in the cohort has."""
    there = {n for n, m in config.modalities.items()
             if m.variable in cohort and who_has(cohort, m.variable).any()}  # fmt: skip
    if isinstance(config.harmonizer, HubConfig) and there:
        config = config.reading(there)
    read = {m.variable for m in config.modalities.values()}
    for name, modality in MODALITIES.items():
        if modality.variable in cohort and modality.variable not in read:
            places, *numbers = (cohort.sizes[dim] for dim in modality.dims)
            config = config.with_modality(name, places, prod(numbers))
    return config


def save_model(networks: Harmonix, folder, provenance: dict) -> None:
    """Weights as `load_model` reads them, with the atlas that their parcels come from."""
    save_weights(networks, folder, provenance)
    if networks.config.atlas not in ATLASES:
        load_atlas(networks.config.atlas).to_netcdf(Path(folder) / ATLAS_FILE)


class Model:
    """Networks that take and return labeled arrays.

    `structure`, `dynamics` and `harmonize` are the bare networks on data already scaled; `embed`
    does everything for a cohort. `networks` holds the torch modules, `config` their sizes.
    """

    def __init__(self, networks: Harmonix, device: str | None = None):
        device = own_device(device) or ("cuda" if torch.cuda.is_available() else "cpu")
        self.device = torch.device(device)
        self.networks = networks.to(self.device).eval()
        self.config = networks.config
        self.provenance = networks.provenance
        self.atlas = load_atlas(self.config.atlas, order=self.config.order)

    def __repr__(self):
        size = sum(p.numel() for p in self.networks.parameters()) / 1e6
        return (
            f"bhx model '{self.config.name}': {size:.1f} M parameters, {self.config.atlas} "
            f"({self.config.order}), {self.config.harmonizer.hubs} hub tokens x "
            f"{self.config.harmonizer.width}, reads {listed(self.config.modalities)}, "
            f"patches '{self.config.dynamics.patching}', {self.device}"
        )

    def structure(self, t1: xr.DataArray) -> xr.DataArray:
        """Cube tokens (cx, cy, cz, feature) of one scaled T1 (x, y, z)."""
        self._check_encoder(ANATOMY)
        check_grid(t1, self.config.structure.voxel_mm)
        return self._tokens(ANATOMY, t1.transpose(*ANATOMY.dims), {})

    def dynamics(self, bold: xr.DataArray, *, tr: float | None = None) -> xr.DataArray:
        """Tokens (roi, patch, feature) of one scaled scan (roi, time), in windows if it is long.

        `tr` [s]; read off `time` in seconds (bhx.scan gives it) by default. Patches with a NaN
        are not computed and are NaN in the result.
        """
        self._check_encoder(BOLD)
        if bold.dims != BOLD.dims:
            fact = f"Expected one scan with dims {BOLD.dims}, found {bold.dims}"
            raise InputError(fact, "Take it from the cohort: bhx.scan(cohort, subject)")
        tr = _tr_of(bold, tr)
        bold = bold.isel(roi=self.positions_of(bold.roi.values))
        out = self._tokens(BOLD, bold, {"tr": tr, "n_volumes": bold.sizes["time"]})
        onset = self.config.dynamics.patch_onsets(out.sizes["patch"], tr)
        return out.assign_coords(onset=("patch", onset, {"units": "s"}))

    def _check_encoder(self, modality):
        if not self.config.encodes(modality):
            fact = (
                f"Expected a model with an encoder of {modality.name}, found '{self.config.name}'"
            )
            raise InputError(f"{fact}, which reads {listed(self.config.modalities)}",
                             "Take another: bhx.load_model('paper')")  # fmt: skip

    @torch.no_grad()
    def _tokens(self, modality, scaled, facts):
        """Tokens of one subject's scaled values, with the coordinates of their dims."""
        reading = Reading()
        reading.add(modality, modality.cut(scaled.values, facts, self.config))
        tokens = encode_readings(self.networks, [reading], self.device)[0][modality.name]
        values = as_array(self.config, modality.name, reading, tokens)
        dims = (*modality.token_dims, "feature")
        return xr.DataArray(values, self.coords(modality.token_dims), dims)

    @torch.no_grad()
    def harmonize(self, dynamics=None, structure=None, **more) -> xr.DataArray:
        """Hub tokens (token, feature) of one subject's tokens, any of which may be None.

        `more` are tokens of further modalities under the names that latents give them (coupling=,
        cubes=). Tokens that are NaN are left out. The sketch of a relational hub, which needs the
        data themselves, is left out, too; the mean hub token does not depend on it.
        """
        given, windows = {"dynamics": dynamics, "structure": structure, **more}, {}
        for name, modality in self.config.modalities.items():
            tokens = given.get(modality.tokens)
            if tokens is None:
                continue
            tokens = tokens.transpose(*modality.token_dims, "feature")
            if "roi" in tokens.dims:
                tokens = tokens.isel(roi=self.positions_of(tokens.roi.values))
            most = modality.places(self.config)
            if any(n > m for n, m in zip(tokens.shape, most, strict=False)):
                raise InputError(
                    f"Expected tokens of at most {most} on {modality.token_dims}, found "
                    f"{tokens.shape[:-1]}",
                    "Give one window, such as dynamics.isel(patch=slice(0, 18)); bhx.embed cuts "
                    "by itself",
                )
            windows[name] = [tokens.values]
        hub = self.networks.harmonizer(made_before(self.config, windows, self.device).subjects)
        return xr.DataArray(hub[0].cpu().numpy(), dims=("token", "feature"))

    @torch.no_grad()
    def kernels(self, tr: float) -> xr.DataArray:
        """The patch kernel (feature, seconds) as a scan at this TR [s] meets it."""
        self._check_encoder(BOLD)
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
        parts = dict(self.networks.named_children())
        sizes = [sum(p.numel() for p in part.parameters()) for part in parts.values()]
        about = {"name": self.config.name, "config": json.dumps(asdict(self.config))}
        return xr.Dataset(
            {"parameters": ("part", sizes)}, {"part": list(parts)}, about | self.provenance
        )

    def positions_of(self, names) -> np.ndarray:
        """Where each parcel of the model stands among the names given."""
        found = {name: i for i, name in enumerate(match_names(names, self.atlas))}
        return np.array([found[str(name)] for name in self.atlas.roi.values])

    def coords(self, dims) -> dict:
        """Coordinates that this model's tokens and maps have on these dims."""
        out = {}
        if "roi" in dims:
            names = ("roi", *ROI_COORDS)
            out = {n: ("roi", self.atlas[n].values, self.atlas[n].attrs) for n in names}
        for modality in self.config.modalities.values():
            if set(dims) & set(modality.token_dims):
                out |= modality.coords(self.config)
        return out


def check_model(model) -> None:
    """Refuse what is no Model, such as the name of one."""
    if not isinstance(model, Model):
        fact = f"Expected a model, found {type(model).__name__}"
        raise InputError(fact, "Load it first: bhx.load_model(...)")


def _tr_of(bold, tr):
    if tr is None:
        if bold["time"].attrs.get("units") != "s" or bold.sizes["time"] < 2:
            fact = "Expected the scan's TR, found none"
            raise InputError(fact, "Give tr= in seconds, or take bhx.scan(...)")
        tr = float(bold.time[1] - bold.time[0])
    check_tr(tr)
    return float(tr)
