"""The only door between labels and tensors: a labelled model, and cohorts sent through it.

Scans are scaled, aligned by parcel name and cut into windows here; what the networks do with the
numbers is not decided here.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import warnings
from dataclasses import asdict, dataclass
from math import ceil
from pathlib import Path
from threading import Lock

import numpy as np
import torch
import xarray as xr
from tqdm.auto import tqdm

from . import __version__
from .atlas import load_atlas, match_names
from .checkpoints import PRESETS, Harmonix, HarmonixConfig, build, read_weights
from .errors import check_choice
from .harmonix_f import patchify
from .harmonix_s import cubes
from .schema import (
    DIMS,
    MNI_SHAPE,
    ROI_COORDS,
    VERSION,
    InputError,
    check,
    check_tr,
    listed,
    plain_labels,
    t1_grid,
)

KEEP = {
    "dynamics": ("dynamics", "valid"),
    "structure": ("structure",),
    "attention": ("hub_to_roi", "hub_to_t1", "modality_share"),
}
CUBE_DIMS = ("cx", "cy", "cz")
_ONE_AT_A_TIME = Lock()  # the networks use all cores, so threads of Dask take turns


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


def embed(
    cohort: xr.Dataset,
    model: Model,
    *,
    store=None,
    keep=(),
    scaling: str | xr.Dataset | None = None,
    missing_parcels: str = "refuse",
    attention: str | int = "last",
    precision: str = "float32",
    tokens_at_once: int = 16384,
    progress: bool = True,
) -> xr.Dataset:
    """Send every subject of a cohort through a model.

    Parameters
    ----------
    cohort : `bold (subject, roi, time)` and / or `t1 (subject, x, y, z)`; a subject may lack one
    model : from load_model
    store : path of a zarr store to write, subject by subject; a store that was begun with the same
        model and cohort is continued. Without it the result is lazy and computed on access.
    keep : more than the hub tokens: "dynamics", "structure", "attention"
    scaling : of the parcel series: "zscore" (each parcel of each scan), or the Dataset of
        `robust_scaling` for the released rule; the model's own by default
    missing_parcels : "refuse" parcels that are flat or not finite, or "leave out" their tokens.
        Volumes and voxels that are NaN leave out the tokens that would read them.
    attention : which attention is kept: "last" layer, "mean", "rollout" or a layer's number
    precision : "float32" or "bfloat16"
    tokens_at_once : bound of a batch, and so of memory
    progress : show a bar while a store is written

    Returns
    -------
    xarray.Dataset
        Latents: `hub (subject, token, feature)` with every label of the cohort's subjects. A scan
        longer than the model's positions is read in windows of equal length; its dynamics tokens
        are joined, its hub tokens and attention are means weighted by the windows' patches.

    Raises
    ------
    InputError
        Before any work: parcels, TRs, T1 grid, lengths or the store do not fit. At a subject:
        its data are flat, not finite, or too short; what a store holds by then stays.
    """
    if not isinstance(model, Model):
        raise InputError(
            f"Expected a model, found {type(model).__name__}", "Load it first: bhx.load_model(...)"
        )
    cohort = aligned_to(check(cohort, "cohort"), model)
    keep = (keep,) if isinstance(keep, str) else tuple(keep)
    options = _Options(model, keep, _scaling(scaling, model), missing_parcels, attention, precision)
    template = _template(cohort, options)
    blocks = _blocks(cohort, model.config, tokens_at_once)
    if store is None:
        return _lazy(cohort, options, template, blocks)
    return _stored(cohort, options, template, blocks, Path(store), progress)


def robust_scaling(cohort: xr.Dataset) -> xr.Dataset:
    """The released scaling, fitted on this cohort: `median` and `iqr` (roi) over its subjects of
    each parcel's mean in time. Fit it on training subjects only."""
    mean = cohort.bold.isel(subject=np.flatnonzero(cohort.has_bold)).mean("time").compute()
    low, mid, high = mean.quantile([0.25, 0.5, 0.75], "subject").values
    if not (high > low).all():
        raise InputError(
            "Expected parcels whose mean differs between subjects, found constant ones",
            "Series without a mean (z-scored, denoised) cannot be scaled this way: use 'zscore'",
        )
    return xr.Dataset({"median": ("roi", mid), "iqr": ("roi", high - low)}, {"roi": cohort.roi})


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
        t1 = (t1.expand_dims("subject") if one else t1).transpose(*DIMS["cohort"]["t1"])
        _check_grid(t1, self.config.structure.voxel_mm)
        x = torch.tensor(np.ascontiguousarray(t1), dtype=torch.float32, device=self.device)
        y = self.networks.structure(x).unflatten(1, self.config.structure.grid)
        out = xr.DataArray(
            y.cpu().numpy(), dims=DIMS["latents"]["structure"], coords=_cube_coords(self.config)
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
        bold = bold.isel(roi=_positions_of(self, bold.roi.values))
        reading = Reading(*in_windows(bold.values, tr, self.config.dynamics))
        done = _encode_windows(self.networks, [reading], self.device)[0]
        tokens, _ = _dynamics_array(self.config, reading, done)
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
            dynamics = dynamics.isel(roi=_positions_of(self, dynamics.roi.values))
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
            self._roi() | _cube_coords(self.config),
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


# From a cohort to what the networks read ----------------------------------------------------------


@dataclass(frozen=True)
class _Options:
    model: Model
    keep: tuple
    scaling: tuple | str
    missing_parcels: str
    attention: str | int
    precision: str

    def __post_init__(self):
        for name, given, known in (
            ("keep", self.keep, KEEP),
            ("missing_parcels", [self.missing_parcels], ("refuse", "leave out")),
            ("precision", [self.precision], ("float32", "bfloat16")),
        ):
            for one in given:
                check_choice(name, one, known)
        self.model.networks.harmonizer.layers_of(self.attention)


@dataclass
class Reading:
    """One subject, scaled and cut: windows of patches (parcels, P, samples) with the tokens that
    can be computed of each, and a T1 (X, Y, Z) with its computable cubes."""

    windows: list
    tokens: list
    t1: torch.Tensor | None = None
    cubes: torch.Tensor | None = None


def read_subject(
    bold, tr, t1, config: HarmonixConfig, scaling="zscore", missing="refuse", names=()
):
    """Arrays of one subject, (parcels, volumes) and (X, Y, Z) or None, to a Reading."""
    reading = Reading([], [])
    if bold is not None:
        scaled = scale_bold(bold, scaling, missing, names)
        reading.windows, reading.tokens = in_windows(scaled, tr, config.dynamics)
    if t1 is not None:
        reading.t1 = torch.from_numpy(scale_t1(t1, config.structure.voxel_mm))
        whole = cubes(reading.t1[None], config.structure.cube)[0].isfinite().all(-1)
        reading.cubes = whole.nonzero().squeeze(1)
    if not any(len(k) for k in reading.tokens) and (t1 is None or not len(reading.cubes)):
        raise InputError("Expected a subject with finite data, found none", "Leave it out")
    return reading


def scale_bold(bold, scaling="zscore", missing="refuse", names=()):
    """Parcel series (parcels, volumes) scaled: z-scored in time, or (x - median) / iqr."""
    bold = np.asarray(bold, np.float32)
    finite = np.isfinite(bold)
    bold = np.where(finite, bold, np.nan)
    with np.errstate(all="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # parcels that are NaN throughout
        varies = np.nanmax(bold, 1) > np.nanmin(bold, 1)
        if missing == "refuse" and not (varies.all() and finite.all()):
            _refuse_parcels(varies, finite, names)
        if isinstance(scaling, str):
            middle, width = (
                np.nanmean(bold, 1, dtype=np.float64),
                np.nanstd(bold, 1, dtype=np.float64),
            )
        else:
            middle, width = scaling
        out = (bold - middle[:, None]) / width[:, None]
    out[~varies] = np.nan
    return out.astype(np.float32)


def scale_t1(t1, voxel_mm: float):
    """T1 (X, Y, Z), 0 outside the brain, z-scored over FSL's whole MNI152 volume.

    The mean and deviation count the background, the cropped margin included, as the release does.
    """
    t1 = np.where(np.isfinite(t1), t1, np.nan).astype(np.float32)
    count = np.prod(MNI_SHAPE) / voxel_mm**3 - np.isnan(t1).sum()
    mean = np.nansum(t1, dtype=np.float64) / count
    std = np.sqrt(max(np.nansum(np.square(t1, dtype=np.float64)) / count - mean**2, 0))
    if not std > 0:
        raise InputError(
            "Expected a T1 with some contrast, found a constant one", "Look at the image"
        )
    return ((t1 - mean) / (std + 1e-9)).astype(np.float32)


def _refuse_parcels(varies, finite, names):
    names = np.asarray(names if len(names) else [f"#{i}" for i in range(len(varies))])
    broken = ~finite.all(1)
    kind = "NaN or infinite values" if broken.any() else "a constant series"
    raise InputError(
        f"Expected parcels with a signal, found {kind} in {int((~varies | broken).sum())} of "
        f"{len(varies)} ({listed(names[~varies | broken])})",
        'Leave their tokens out with missing_parcels="leave out", or leave the subject out',
    )


def in_windows(bold, tr, config):
    """Scaled series (parcels, volumes) in equal windows of at most `max_patches` patches, and the
    tokens of each that can be computed."""
    patches = patchify(torch.tensor(bold, dtype=torch.float32), tr, config)
    windows = patches.tensor_split(ceil(patches.shape[1] / config.max_patches), dim=1)
    return windows, [w.isfinite().all(-1).flatten().nonzero().squeeze(1) for w in windows]


def encode(networks: Harmonix, readings, device, want=(), attention="last"):
    """Readings of a batch to a list of dicts of float32 arrays: "hub" and what `want` names."""
    dynamics, structure = encode_parts(networks, readings, device)
    tokens, rows, owner = sequences(networks.config, readings, dynamics, structure)
    hub = networks.harmonizer(tokens, rows)[:, 1:].float().cpu()
    maps = networks.harmonizer.attention(tokens, rows, attention) if "attention" in want else None
    out = []
    for i, reading in enumerate(readings):
        mine = [j for j, o in enumerate(owner) if o == i]
        weight = torch.tensor([float(len(k)) for k in reading.tokens if len(k)] or [1.0])
        weight = weight / weight.sum()
        one = {"hub": (hub[mine] * weight[:, None, None]).sum(0).numpy()}
        if "dynamics" in want and dynamics[i]:
            one["dynamics"], one["valid"] = _dynamics_array(networks.config, reading, dynamics[i])
        if "structure" in want and structure[i] is not None:
            one["structure"] = _structure_array(networks.config, reading, structure[i])
        if maps is not None:
            one |= _read_maps(networks.config, [(maps[j], rows[j]) for j in mine], weight)
        out.append(one)
    return out


def encode_parts(networks, readings, device):
    """Dynamics tokens of each subject's windows, and structure tokens of each subject."""
    return _encode_windows(networks, readings, device), _encode_t1(networks, readings, device)


def _encode_windows(networks, readings, device):
    """Packed dynamics tokens of each subject's windows, those that can be computed."""
    flat = [
        (w.nan_to_num().to(device), k.to(device))
        for r in readings
        for w, k in zip(r.windows, r.tokens, strict=True)
    ]
    flat = [(w, k) for w, k in flat if len(k)]
    done = iter(())
    if flat:
        tokens, lengths = networks.dynamics(*map(list, zip(*flat, strict=True)))
        done = iter(tokens.split(lengths))
    return [[next(done) if len(k) else None for k in r.tokens] for r in readings]


def _encode_t1(networks, readings, device):
    """Structure tokens of each subject; those with the same number of cubes together."""
    out = [None] * len(readings)
    groups = {}
    for i, r in enumerate(readings):
        if r.t1 is not None and len(r.cubes):
            groups.setdefault(len(r.cubes), []).append(i)
    for members in groups.values():
        t1 = torch.stack([readings[i].t1 for i in members]).nan_to_num().to(device)
        visible = torch.stack([readings[i].cubes for i in members]).to(device)
        for i, tokens in zip(members, networks.structure(t1, visible), strict=True):
            out[i] = tokens
    return out


def sequences(config, readings, dynamics, structure):
    """What the harmonizer reads: one sequence a window, each with the whole structure.

    Returns tokens [(n, width)], the rows of their positions [(n,)], and whose they are.
    """
    c, tokens, rows, owner = config.harmonizer, [], [], []
    for i, r in enumerate(readings):
        windows = [
            (x, c.dynamics_rows(w.shape[1])[k])
            for x, w, k in zip(dynamics[i], r.windows, r.tokens, strict=True)
            if x is not None
        ]
        cube = [] if structure[i] is None else [(structure[i], c.structure_rows()[r.cubes])]
        for window in windows or [None]:
            parts = ([window] if window else []) + cube
            tokens.append(torch.cat([p[0] for p in parts]))
            rows.append(torch.cat([p[1] for p in parts]).to(tokens[-1].device))
            owner.append(i)
    return tokens, rows, owner


def _dynamics_array(config, reading, tokens):
    """(parcels, patches, width) joined over windows, NaN where nothing was computed; and the
    patches that are there."""
    parts = []
    for window, kept, x in zip(reading.windows, reading.tokens, tokens, strict=True):
        full = torch.full((window.shape[0] * window.shape[1], config.dynamics.width), torch.nan)
        if x is not None:
            full[kept] = x.float().cpu()
        parts.append(full.unflatten(0, window.shape[:2]))
    joined = torch.cat(parts, 1).numpy()
    return joined, np.isfinite(joined[..., 0]).any(0)


def _structure_array(config, reading, tokens):
    full = torch.full((config.structure.tokens, config.structure.width), torch.nan)
    full[reading.cubes] = tokens.float().cpu()
    return full.unflatten(0, config.structure.grid).numpy()


def _read_maps(config, maps, weight):
    """Attention of each window over its tokens, to parcels and cubes: shares that sum to 1."""
    c = config.harmonizer
    total = torch.zeros(c.hubs, 1 + c.data_tokens)
    for share, (one, rows) in zip(weight, maps, strict=True):
        total[:, rows.cpu()] += share * one.float().cpu()
    dynamics = total[:, 1 : 1 + c.parcels * c.max_patches].unflatten(1, (c.parcels, -1)).sum(-1)
    structure = total[:, 1 + c.parcels * c.max_patches :]
    return {
        "hub_to_roi": dynamics.numpy(),
        "hub_to_t1": structure.unflatten(1, config.structure.grid).numpy(),
        "modality_share": torch.stack([dynamics.sum(1), structure.sum(1)], 1).numpy(),
    }


# A whole cohort -----------------------------------------------------------------------------------


def aligned_to(cohort, model):
    """The cohort with parcels in the model's order and the T1 on its grid."""
    if "bold" in cohort and cohort.has_bold.any():
        _check_atlas(cohort, model)
        index = _positions_of(model, cohort.roi.values)
        if not np.array_equal(index, np.arange(len(index))):
            warnings.warn(
                f"Parcels were aligned by name to {model.config.atlas}, {model.config.order}",
                stacklevel=3,
            )
        cohort = cohort.isel(roi=index)
        _check_lengths(cohort, model.config.dynamics)
    if "t1" in cohort and cohort.has_t1.any():
        voxel_mm = model.config.structure.voxel_mm
        if cohort.sizes["x"] in [n * len(t1_grid(voxel_mm)["x"]) for n in (2, 4, 8, 16, 32)]:
            from .cohort import coarsen_t1  # here: the networks alone run without zarr or Dask

            cohort = coarsen_t1(cohort, voxel_mm)
        _check_grid(cohort.t1, voxel_mm)
    return cohort


def _check_atlas(cohort, model):
    given = cohort.attrs.get("atlas") or model.config.atlas  # names alone tell, if nothing else
    if given != model.config.atlas:
        raise InputError(
            f"Expected parcels of {model.config.atlas} ({model.config.dynamics.parcels}), which "
            f"these weights were trained on, found {given} ({cohort.sizes['roi']})",
            f"bhx.atlas.reparcellate(cohort, '{model.config.atlas}') brings them there, or load "
            "other weights",
        )


def _positions_of(model, given):
    """Where each parcel of the model stands among the names `given`."""
    found = {name: i for i, name in enumerate(match_names(given, model.atlas))}
    return np.array([found[str(name)] for name in model.atlas.roi.values])


def _patch_counts(cohort, config):
    """Patches of each subject's scan, 0 without one."""
    has = cohort.has_bold.values.astype(bool) & ("bold" in cohort)
    scans = zip(has, cohort.n_volumes.values, cohort.tr.values, strict=True)
    return np.array([config.patch_count(int(n), float(tr)) if h else 0 for h, n, tr in scans])


def _check_lengths(cohort, config):
    short = cohort.has_bold.values.astype(bool) & (_patch_counts(cohort, config) < 1)
    for i in np.flatnonzero(short)[:1]:
        subject, n, tr = (cohort[k].values[i] for k in ("subject", "n_volumes", "tr"))
        raise InputError(
            f"Expected scans of at least one patch ({config.patch_seconds:.2f} s), found {int(n)} "
            f"volumes at TR {tr:g} s = {n * tr:.1f} s in '{subject}'",
            "Leave this subject's BOLD out, or check its TR",
        )


def _check_grid(t1, voxel_mm):
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


def _scaling(scaling, model):
    scaling = model.config.scaling if scaling is None else scaling
    if isinstance(scaling, xr.Dataset):
        at = _positions_of(model, scaling.roi.values)
        return scaling["median"].values[at], scaling["iqr"].values[at]
    if scaling != "zscore":
        raise InputError(
            f"Expected the scaling 'zscore' or a Dataset of robust_scaling, found {scaling!r}",
            "Fit the released rule on training subjects: bhx.encoding.robust_scaling(cohort)",
        )
    return scaling


def _template(cohort, options):
    """Latents with every label and no data."""
    model, c = options.model, options.model.config
    n, h = cohort.sizes["subject"], c.harmonizer
    patches = int(_patch_counts(cohort, c.dynamics).max())
    shapes = {
        "hub": (n, h.hubs, h.width),
        "dynamics": (n, h.parcels, patches, c.dynamics.width),
        "valid": (n, patches),
        "structure": (n, *c.structure.grid, c.structure.width),
        "hub_to_roi": (n, h.hubs, h.parcels),
        "hub_to_t1": (n, h.hubs, *c.structure.grid),
        "modality_share": (n, h.hubs, 2),
    }
    wanted = [v for k in options.keep for v in KEEP[k]] + ["hub"]  # hub is written last
    coords = {k: v for k, v in cohort.coords.items() if v.dims == ("subject",)}
    coords["token"] = np.arange(h.hubs)
    if "attention" in options.keep:
        coords["modality"] = ["bold", "t1"]
    if {"attention", "dynamics"} & set(options.keep):
        coords |= model._roi()
    if {"attention", "structure"} & set(options.keep):
        coords |= _cube_coords(c)
    if "dynamics" in options.keep:
        coords["onset"] = _onsets(c.dynamics, patches, cohort)
    return xr.Dataset(
        {name: (DIMS["latents"][name], _empty(shapes[name], name == "valid")) for name in wanted},
        coords,
        _describe(cohort, options),
    )


def _empty(shape, flag):
    import dask.array as da

    dtype = np.dtype(bool if flag else "float32")
    return da.full(shape, _fill(dtype), dtype=dtype, chunks=(1, *shape[1:]))


def _fill(dtype):
    return False if dtype.kind == "b" else np.nan


def _onsets(config, patches, cohort):
    if config.patching == "exact":
        return ("patch", config.patch_onsets(patches, 1.0), {"units": "s"})
    each = [
        config.patch_onsets(patches, float(tr)) if has else np.full(patches, np.nan)
        for has, tr in zip(cohort.has_bold.values, cohort.tr.values, strict=True)
    ]
    return (("subject", "patch"), np.array(each), {"units": "s"})


def _describe(cohort, options):
    """Attributes that say what made these latents."""
    model = options.model
    trs = np.unique(cohort.tr.values[cohort.has_bold.values.astype(bool)])
    scaling = options.scaling
    if not isinstance(scaling, str):  # two fits are told apart
        scaling = f"cohort-robust {hashlib.sha256(np.stack(scaling).tobytes()).hexdigest()[:12]}"
    return {
        "bhx_schema": VERSION,
        "model": model.config.name,
        "config": json.dumps(asdict(model.config)),
        "weights": model.provenance.get("source", ""),
        "weights_sha256": model.provenance.get("weights_sha256", ""),
        "versions": json.dumps({"bhx": __version__, "torch": torch.__version__.split("+")[0]}),
        "scaling": scaling,
        "t1_scaling": "zscore over the MNI152 volume",
        "missing_parcels": options.missing_parcels,
        "precision": options.precision,
        "attention": str(options.attention) if "attention" in options.keep else "",
        "atlas": model.config.atlas,
        "trs": [float(t) for t in trs],
        "source": cohort.attrs.get("source", ""),
        "cohort": json.dumps({k: str(v) for k, v in cohort.attrs.items()}),
    }


def _cube_coords(config):
    """MNI mm of the cubes' centres on cx, cy, cz."""
    s = config.structure
    grid = t1_grid(s.voxel_mm)
    return {
        dim: (dim, grid[axis].reshape(-1, s.cube).mean(1), {"units": "mm"})
        for dim, axis in zip(CUBE_DIMS, "xyz", strict=True)
    }


def _blocks(cohort, config, tokens_at_once):
    """Slices of subjects whose tokens together stay within the bound, at least one subject."""
    cost = (
        _patch_counts(cohort, config.dynamics) * config.dynamics.parcels + config.structure.tokens
    )
    blocks, start, total = [], 0, 0
    for i, tokens in enumerate(cost):
        if i > start and total + tokens > tokens_at_once:
            blocks.append(slice(start, i))
            start, total = i, 0
        total += tokens
    return [*blocks, slice(start, len(cost))]


def _block(rows: xr.Dataset, options, like):
    """Encode subjects in memory; arrays (subjects, ...) by name, shaped as `like`."""
    model = options.model
    readings = []
    for i, subject in enumerate(rows.subject.values):
        one = rows.isel(subject=i)
        has_bold = "bold" in rows and bool(one.has_bold)
        has_t1 = "t1" in rows and bool(one.has_t1)
        bold = one.bold.values[:, : int(one.n_volumes)] if has_bold else None
        try:
            readings.append(
                read_subject(
                    bold,
                    float(one.tr),
                    one.t1.values if has_t1 else None,
                    model.config,
                    options.scaling,
                    options.missing_parcels,
                    model.atlas.roi.values,
                )
            )
        except InputError as error:
            raise InputError(f"Subject '{subject}': {error.fact}", error.help) from error
    with _ONE_AT_A_TIME, torch.no_grad(), autocast(model.device, options.precision):
        done = encode(model.networks, readings, model.device, options.keep, options.attention)
    out = {}
    for name, (shape, dtype) in like.items():
        full = np.full((len(done), *shape), _fill(dtype), dtype)
        for target, one in zip(full, done, strict=True):
            if name in one:
                target[tuple(slice(0, n) for n in one[name].shape)] = one[name]
        out[name] = full
    return out


def _like(template):
    return {name: (v.shape[1:], v.dtype) for name, v in template.data_vars.items()}


def _lazy(cohort, options, template, blocks):
    import dask
    import dask.array as da

    like = _like(template)
    needed = cohort[[v for v in ("bold", "t1") if v in cohort]]
    parts = [dask.delayed(_block)(needed.isel(subject=b), options, like) for b in blocks]
    out = template.copy()
    for name, (shape, dtype) in like.items():
        pieces = [
            da.from_delayed(part[name], (b.stop - b.start, *shape), dtype)
            for part, b in zip(parts, blocks, strict=True)
        ]
        out[name] = (template[name].dims, da.concatenate(pieces))
    return out


def _stored(cohort, options, template, blocks, path, progress):
    """Write block by block; blocks whose hub tokens are all there are not computed again."""
    import zarr

    from .cohort import _text

    if not path.exists():
        start = template.assign_attrs(complete=False)
        encoding = {
            n: {"chunks": (1, *v.shape[1:])}
            | ({} if v.dtype.kind == "b" else {"fill_value": np.nan})
            for n, v in template.data_vars.items()
        }
        start = start.assign_coords({k: _text(v) for k, v in start.coords.items()})
        part = path.with_name(path.name + ".part")  # a store is there whole or not at all
        start.to_zarr(part, "w", compute=False, encoding=encoding, consolidated=False)
        os.replace(part, path)
    _check_same(path, template)
    todo = [b for b in blocks if not all(_written(path, i) for i in range(b.start, b.stop))]
    like = _like(template)
    needed = cohort[[v for v in ("bold", "t1") if v in cohort]]
    group, total = zarr.open_group(path, mode="r+"), cohort.sizes["subject"]
    there = total - sum(b.stop - b.start for b in todo)
    with tqdm(
        desc="embed", total=total, initial=there, unit="subject", disable=not progress
    ) as bar:
        for b in todo:
            done = _block(needed.isel(subject=b).compute(), options, like)
            for name in template.data_vars:  # hub last: its chunk says the subject is done
                group[name][b] = done[name]
            bar.update(b.stop - b.start)
    group.attrs["complete"] = True
    return plain_labels(xr.open_zarr(path, consolidated=False))


def _written(path, subject):
    return (path / "hub" / "c" / str(subject) / "0" / "0").exists()


def _check_same(path, template):
    """Refuse to go on with a store that another model, cohort or option began."""
    if not (path / "zarr.json").exists():
        raise InputError(
            f"Expected latents or nothing at '{path}', found something else", "Give a new path"
        )
    there = xr.open_zarr(path, consolidated=False)
    made = {k: v for k, v in template.attrs.items() if k != "versions"}
    different = [k for k, v in made.items() if there.attrs.get(k) != v]
    if set(there.data_vars) != set(template.data_vars):
        different.append("keep")
    if not np.array_equal(there.get("subject", ()), template.subject):
        different.append("subjects")
    if different:
        fact = f"Expected latents of this model and cohort in '{path}', "
        fact += f"found another {listed(different)}"
        raise InputError(fact, "Give a new path, or delete this store")


def autocast(device, precision):
    """The context in which a network computes at that precision."""
    if precision == "bfloat16":
        return torch.autocast(device.type, torch.bfloat16)
    return contextlib.nullcontext()


def _tr(bold, tr):
    if tr is None:
        if bold["time"].attrs.get("units") != "s" or bold.sizes["time"] < 2:
            raise InputError(
                "Expected the scan's TR, found none", "Give tr= in seconds, or take bhx.scan(...)"
            )
        tr = float(bold.time[1] - bold.time[0])
    check_tr(tr)
    return float(tr)
