"""The only door between labels and tensors: a labelled model, and cohorts sent through it.

Scans are scaled, aligned by parcel name and cut into windows here; what the networks do with the
numbers is not decided here.
"""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from threading import Lock

import numpy as np
import torch
import xarray as xr
from tqdm.auto import tqdm

from bhx.encode.inputs import autocast, cube_coords, read_subject, run_networks
from bhx.encode.model import Model, check_grid, positions_of
from bhx.errors import InputError, check_choice, listed
from bhx.modalities.t1 import t1_grid
from bhx.schema import VERSION, check, dims_of, plain_labels
from bhx.settings import __version__

KEEP = {
    "dynamics": ("dynamics", "valid"),
    "structure": ("structure",),
    "attention": ("hub_to_roi", "hub_to_t1", "modality_share"),
}
_ONE_AT_A_TIME = Lock()  # the networks use all cores, so threads of Dask take turns


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


# A whole cohort -----------------------------------------------------------------------------------


def aligned_to(cohort, model):
    """The cohort with parcels in the model's order and the T1 on its grid."""
    if "bold" in cohort and cohort.has_bold.any():
        _check_atlas(cohort, model)
        index = positions_of(model, cohort.roi.values)
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
            from bhx.data.cohort import (
                coarsen_t1,  # here: the networks alone run without zarr or Dask
            )

            cohort = coarsen_t1(cohort, voxel_mm)
        check_grid(cohort.t1, voxel_mm)
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


def _scaling(scaling, model):
    scaling = model.config.scaling if scaling is None else scaling
    if isinstance(scaling, xr.Dataset):
        at = positions_of(model, scaling.roi.values)
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
        coords |= cube_coords(c)
    if "dynamics" in options.keep:
        coords["onset"] = _onsets(c.dynamics, patches, cohort)
    return xr.Dataset(
        {
            name: (dims_of("latents")[name], _empty(shapes[name], name == "valid"))
            for name in wanted
        },
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
        done = run_networks(model.networks, readings, model.device, options.keep, options.attention)
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

    from bhx.data.store import as_text

    if not path.exists():
        start = template.assign_attrs(complete=False)
        encoding = {
            n: {"chunks": (1, *v.shape[1:])}
            | ({} if v.dtype.kind == "b" else {"fill_value": np.nan})
            for n, v in template.data_vars.items()
        }
        start = start.assign_coords({k: as_text(v) for k, v in start.coords.items()})
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
