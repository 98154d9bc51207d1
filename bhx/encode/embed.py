"""A whole cohort through a model: lazily, or into a store that is continued where it stopped.

Scans are aligned by parcel name and cut into windows; what the networks do with the numbers is not
decided here.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from threading import Lock
from time import perf_counter

import dask
import dask.array as da
import numpy as np
import torch
import xarray as xr
import zarr
from tqdm.auto import tqdm

from bhx.data.atlas import check_same_places, with_atlas
from bhx.data.store import (
    compute_each,
    create_store,
    finish,
    only_writer,
    open_store,
    unwritten,
    write_labels,
    write_rows,
)
from bhx.encode.inputs import in_turns, read_subject, run_networks
from bhx.encode.model import Model, check_model
from bhx.encode.processes import Processes, computes_bfloat16
from bhx.errors import InputError, check_choice, listed
from bhx.modalities.bold import BOLD
from bhx.modalities.table import MODALITIES
from bhx.model.layers import ATTENTIONS
from bhx.schema import ATTENTION, VERSION, check, dims_of, subject_coords, who_has
from bhx.settings import __version__

PRECISIONS = ("float32", "bfloat16")
ALIKE, TRIED = 0.999, 8  # cosine of mean hub tokens in both precisions; people it is tried on
AT_WORK = 4  # blocks of subjects, where they are written to a store
_ONE_AT_A_TIME = Lock()  # the networks use all cores, so threads of Dask take turns


def embed(
    cohort: xr.Dataset,
    model: Model,
    *,
    store=None,
    keep=(),
    scaling: str | xr.Dataset | None = None,
    missing_parcels: str = "refuse",
    attention: str = "last",
    precision: str = "float32",
    tokens_at_once: int = 16384,
    client=None,
    progress: bool = True,
) -> xr.Dataset:
    """Send every subject of a cohort through a model.

    Parameters
    ----------
    cohort : `bold (subject, roi, time)`, `t1 (subject, x, y, z)` or any other modality that the
        model reads; a subject may lack some of them
    model : from load_model
    store : path of a zarr store to write, subject by subject; a store that was begun with the same
        model and cohort is continued, and its labels become the cohort's; one that was made from
        other scans is refused. Without it the result is lazy and computed on access.
    keep : more than the hub tokens: "dynamics", "structure" (the tokens of a modality's encoder,
        under the names that latents give them), "attention"
    scaling : of the parcel series: "zscore" (each parcel of each scan), or the Dataset of
        `robust_scaling` for the released rule; the model's own by default
    missing_parcels : "refuse" parcels that are flat or not finite, or "leave out" their tokens.
        Volumes and voxels that are NaN leave out the tokens that would read them.
    attention : which attention is kept: of the "last" layer, the "mean" of all, or their "rollout"
    precision : "float32", "bfloat16", or "auto": bfloat16 where the first eight people's scans are
        encoded faster in it, and their mean hub tokens, less the average of the eight, keep a
        cosine of 0.999 to those of float32. `attrs["precision"]` says which it was.
    tokens_at_once : bound of a batch, and so of memory; a batch that a GPU has no room for is
        halved
    client : a dask.distributed Client, or the address of a Dask cluster, whose workers see the
        cohort's files and the store: each encodes and writes blocks of its own. A worker that is
        lost costs its block, which another does again. The store is the same, bit for bit on one
        kind of processor. Under torchrun the processes share the blocks, each on its own GPU.
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
    check_model(model)
    keep = (keep,) if isinstance(keep, str) else tuple(keep)
    kept = [m.tokens for m in model.config.modalities.values()]
    for name in keep:
        check_choice("keep", name, [*kept, "attention"])
    check_choice("missing_parcels", missing_parcels, ("refuse", "leave out"))
    check_choice("precision", precision, (*PRECISIONS, "auto"))
    check_choice("attention", attention, ATTENTIONS)
    cohort = aligned_to(check(cohort, "cohort"), model)
    options = Options(
        model, keep, scaling_of(scaling, model), missing_parcels, attention, precision
    )
    if precision == "auto":
        precision = _agreed_precision(cohort, options, store, tokens_at_once)
        options = replace(options, precision=precision)
    template = template_of(cohort, options)
    blocks = _blocks(cohort, model.config, tokens_at_once)
    read = {m.variable for m in model.config.modalities.values()}
    cohort = cohort[[name for name in cohort.data_vars if name in read]]
    if client is not None and store is None:
        fact = "Expected a store for the workers to write into, found none"
        raise InputError(fact, "Give embed(store=) on a disk that they all see, or no client")
    if store is None:
        return _lazy(cohort, options, template, blocks)
    return _stored(cohort, options, template, blocks, Path(store), progress, client)


def robust_scaling(cohort: xr.Dataset) -> xr.Dataset:
    """The released scaling, fitted on this cohort: `median` and `iqr` (roi) over its subjects of
    each parcel's mean in time. Fit it on training subjects only."""
    has = np.flatnonzero(who_has(cohort, BOLD.variable))
    mean = cohort[BOLD.variable].isel(subject=has).mean("time").compute()
    low, mid, high = mean.quantile([0.25, 0.5, 0.75], "subject").values
    if not (high > low).all():
        raise InputError(
            "Expected parcels whose mean differs between subjects, found constant ones",
            "Series without a mean (z-scored, denoised) cannot be scaled this way: use 'zscore'",
        )
    return xr.Dataset({"median": ("roi", mid), "iqr": ("roi", high - low)}, {"roi": cohort.roi})


def aligned_to(cohort: xr.Dataset, model: Model) -> xr.Dataset:
    """The cohort with parcels in the model's order, and every modality that it reads checked and
    on its grid; lazily."""
    read = [
        m
        for m in model.config.modalities.values()
        if m.variable in cohort and who_has(cohort, m.variable).any()
    ]
    if any("roi" in m.dims for m in read):
        _check_atlas(cohort, model)
        index = model.positions_of(cohort.roi.values)
        if not np.array_equal(index, np.arange(len(index))):
            warnings.warn(
                f"Parcels were aligned by name to {model.config.atlas}, {model.config.order}",
                stacklevel=3,
            )
        cohort = cohort.isel(roi=index)
    for modality in read:
        modality.check_lengths(cohort, model.config)
        cohort = modality.fit(cohort, model.config)
    return cohort


def _check_atlas(cohort, model):
    given = cohort.attrs.get("atlas") or model.config.atlas  # names alone tell, if nothing else
    check_same_places(cohort, model.atlas)
    if given != model.config.atlas:
        raise InputError(
            f"Expected parcels of {model.config.atlas} ({model.config.dynamics.parcels}), which "
            f"these weights were trained on, found {given} ({cohort.sizes['roi']})",
            f"bhx.reparcellate(cohort, '{model.config.atlas}') brings them there, or load other "
            "weights",
        )


def scaling_of(scaling, model):
    """What `embed(scaling=)` means: "zscore", or median and range of each parcel of the model."""
    scaling = model.config.scaling if scaling is None else scaling
    if isinstance(scaling, xr.Dataset):
        at = model.positions_of(scaling.roi.values)
        return scaling["median"].values[at], scaling["iqr"].values[at]
    if scaling != "zscore":
        raise InputError(
            f"Expected the scaling 'zscore' or a Dataset of robust_scaling, found {scaling!r}",
            "Fit the released rule on training subjects: bhx.robust_scaling(cohort)",
        )
    return scaling


@dataclass(frozen=True)
class Options:
    """How scans are read and what is kept of them, as `embed` was asked."""

    model: Model
    keep: tuple
    scaling: tuple | str
    missing_parcels: str
    attention: str
    precision: str


def _agreed_precision(cohort, options, store, tokens_at_once) -> str:
    """That of a store which is continued, or the fastest; the same in all processes."""
    begun = store is not None and Path(store, "zarr.json").exists()
    chosen = zarr.open_group(store, mode="r").attrs.get("precision") if begun else None
    chosen = chosen or _fastest(cohort, options, tokens_at_once)
    processes = Processes.join(options.model.device)
    return PRECISIONS[processes.most(PRECISIONS.index(chosen))]


def _fastest(cohort, options, tokens_at_once) -> str:
    """The precision that is faster on the first people; bfloat16 only if hub tokens stay alike."""
    if not computes_bfloat16(options.model.device):
        return "float32"
    first = cohort.isel(subject=slice(TRIED)).compute()
    blocks = _blocks(first, options.model.config, tokens_at_once)
    h, tokens, seconds = options.model.config.harmonizer, {}, {}
    shapes = {"hub": (h.hubs, h.width)}
    for precision in PRECISIONS:
        how = replace(options, keep=(), precision=precision)
        _block(first.isel(subject=[0]), how, shapes)  # what is slow once only
        began = perf_counter()
        made = [_block(first.isel(subject=b), how, shapes)["hub"].mean(1) for b in blocks]
        seconds[precision], tokens[precision] = perf_counter() - began, np.concatenate(made)
    one, other = (each - each.mean(0) for each in tokens.values())
    cosine = (one * other).sum(1) / np.sqrt((one**2).sum(1) * (other**2).sum(1)).clip(1e-30)
    return min(seconds, key=lambda p: seconds[p]) if cosine.min() >= ALIKE else "float32"


# What will be there ---


def counts_of(cohort, modality, config) -> np.ndarray:
    """How long a modality is in each subject (see `Modality.count`); 0 where there is none."""
    if modality.variable not in cohort:
        return np.zeros(cohort.sizes["subject"], int)
    facts = {name: cohort[name].values for name in modality.needs}
    counts = np.zeros(cohort.sizes["subject"], int)
    for i in np.flatnonzero(who_has(cohort, modality.variable)):
        counts[i] = modality.count({name: values[i] for name, values in facts.items()}, config)
    return counts


def template_of(cohort, options):
    """Latents with every label and no data."""
    model, config = options.model, options.model.config
    n, h = cohort.sizes["subject"], config.harmonizer
    shapes, coords = {}, dict(subject_coords(cohort)) | {"token": np.arange(h.hubs)}
    for modality in config.modalities.values():
        sizes = dict(zip(modality.token_dims, modality.places(config), strict=True))
        if modality.tokens in options.keep:
            longest = int(counts_of(cohort, modality, config).max())
            own = {dim: longest if dim == "patch" else n for dim, n in sizes.items()}
            shapes[modality.tokens] = (*own.values(), h.width)
            if "patch" in sizes:
                shapes["valid"] = (longest,)
                coords["onset"] = _onsets(cohort, config.dynamics, longest)
        if "attention" in options.keep:
            shapes[modality.map_name] = (h.hubs, *(sizes[d] for d in modality.map_dims))
    if "attention" in options.keep:
        shapes[ATTENTION] = (h.hubs, len(h.modalities))
        coords["modality"] = list(h.modalities)
    shapes["hub"] = (h.hubs, h.width)
    dims = dims_of("latents")
    coords |= model.coords({d for name in shapes for d in dims[name]})
    types = dict.fromkeys(shapes, "float32") | {"valid": "bool"}
    data = {
        name: (dims[name], da.empty((n, *shape), dtype=types[name], chunks=(1, *shape)))
        for name, shape in shapes.items()
    }
    latents = xr.Dataset(data, coords, _describe(cohort, options))
    return with_atlas(latents, model.atlas) if "roi" in latents.dims else latents


def _onsets(cohort, config, patches):
    if config.patching == "exact":
        return ("patch", config.patch_onsets(patches, 1.0), {"units": "s"})
    each = [
        config.patch_onsets(patches, float(tr)) if has else np.full(patches, np.nan)
        for has, tr in zip(who_has(cohort, BOLD.variable), cohort.tr.values, strict=True)
    ]
    return (("subject", "patch"), np.array(each), {"units": "s"})


def _describe(cohort, options):
    """Attributes that say what made these latents."""
    model, scaling = options.model, options.scaling
    if not isinstance(scaling, str):  # two fits are told apart
        scaling = f"cohort-robust {hashlib.sha256(np.stack(scaling).tobytes()).hexdigest()[:12]}"
    read = {}
    for modality in model.config.modalities.values():
        if modality.variable in cohort:
            read |= modality.about(cohort)
    return {
        "bhx_schema": VERSION,
        "model": model.config.name,
        "config": json.dumps(asdict(model.config)),
        "weights": model.provenance.get("source", ""),
        "weights_sha256": model.provenance.get("weights_sha256", ""),
        "versions": json.dumps({"bhx": __version__, "torch": torch.__version__.split("+")[0]}),
        "scaling": scaling,
        **read,
        "missing_parcels": options.missing_parcels,
        "precision": options.precision,
        "attention": str(options.attention) if "attention" in options.keep else "",
        "atlas": model.config.atlas,
        "source": cohort.attrs.get("source", ""),
        "cohort": json.dumps({k: str(v) for k, v in cohort.attrs.items()}),
    }


# Block by block ---


def _blocks(cohort, config, tokens_at_once):
    """Slices of subjects whose tokens together stay within the bound, at least one subject."""
    cost = np.zeros(cohort.sizes["subject"], int)
    for name, modality in config.modalities.items():
        most = modality.places(config)[-1] if "patch" in modality.token_dims else 1
        cost += counts_of(cohort, modality, config) * (config.places(name) // most)
    return in_turns(cost, tokens_at_once)


def _shapes_of(template):
    """Shapes of one subject's part of each variable."""
    return {name: v.shape[1:] for name, v in template.data_vars.items()}


def _block(rows: xr.Dataset, options, shapes):
    """Encode subjects in memory; arrays (subjects, *shape) by name."""
    model, readings = options.model, []
    given = {"scaling": options.scaling, "missing": options.missing_parcels}
    for i, subject in enumerate(rows.subject.values):
        one = rows.isel(subject=i)
        values = {name: v.values for name, v in one.data_vars.items() if bool(one[f"has_{name}"])}
        facts = {name: c.values for name, c in one.coords.items() if not c.dims}
        names = model.atlas.roi.values
        try:
            readings.append(read_subject(values, facts, model.config, names=names, **given))
        except InputError as error:
            raise InputError(f"Subject '{subject}': {error.fact}", error.help) from error
    half = torch.autocast(model.device.type, torch.bfloat16, options.precision == "bfloat16")
    with _ONE_AT_A_TIME, torch.no_grad(), half:
        return filled(_in_memory(readings, options), shapes)


def _in_memory(readings, options) -> list[dict]:
    """What the networks make of these subjects: of all at once, or of as many as there is room."""
    model = options.model
    try:
        return run_networks(model.networks, readings, model.device, options.keep, options.attention)
    except torch.OutOfMemoryError as error:
        few, found = len(readings) // 2, str(error).partition(".")[0]
    if not few:
        fact = f"Expected room for one subject on {model.device}, found too little: {found}"
        raise InputError(fact, "Free it of other programs, or load_model(device='cpu')")
    warnings.warn(
        "The device had no room for a whole batch, which was halved; tokens_at_once= sets its size",
        stacklevel=2,
    )
    return _in_memory(readings[:few], options) + _in_memory(readings[few:], options)


def filled(done: list[dict], shapes: dict) -> dict[str, np.ndarray]:
    """Arrays of several subjects by name, NaN where one is shorter than its shape."""
    out = {n: np.full((len(done), *shape), np.nan, "float32") for n, shape in shapes.items()}
    for i, one in enumerate(done):
        for name in one.keys() & out.keys():
            out[name][i][tuple(map(slice, one[name].shape))] = one[name]
    if "valid" in out:
        out["valid"] = np.asarray(np.isfinite(out[BOLD.tokens][..., 0]).any(1))
    return out


def _lazy(cohort, options, template, blocks):
    shapes = _shapes_of(template)
    parts = [dask.delayed(_block)(cohort.isel(subject=b), options, shapes) for b in blocks]
    out = template.copy()
    for name, v in template.data_vars.items():
        pieces = [
            da.from_delayed(part[name], (b.stop - b.start, *shapes[name]), v.dtype)
            for part, b in zip(parts, blocks, strict=True)
        ]
        out[name] = (v.dims, da.concatenate(pieces))
    return out


def _stored(cohort, options, template, blocks, path, progress, client):
    """Write block by block; blocks whose rows are all written are not computed again."""
    processes = Processes.join(options.model.device)
    first = processes.rank == 0
    with only_writer(path) if first else nullcontext():
        if first and not path.exists():
            create_store(template, path, sharded=False)
        processes.wait()
        _check_same(path, template)
        missing = {row for rows in unwritten(path) for row in range(rows.start, rows.stop)}
        total = cohort.sizes["subject"]
        bar = {"total": total, "initial": total - len(missing), "unit": "subject"}
        todo = [[row for row in range(b.start, b.stop) if row in missing] for b in blocks]
        processes.wait()  # until all have seen what is missing
        todo = processes.share_of(list(filter(None, todo)))
        shapes = _shapes_of(template)
        with tqdm(desc="embed", disable=not (progress and first), **bar) as shown:
            if client is None:

                def write(rows):
                    _write_block(cohort.isel(subject=rows), options, shapes, path, rows)

                with ThreadPoolExecutor(AT_WORK) as pool:  # some read or write while one computes
                    for rows, _ in zip(todo, pool.map(write, todo), strict=True):
                        shown.update(len(rows))
            else:
                sent, here = dask.delayed(options), path.resolve()
                tasks = [
                    dask.delayed(_write_block)(cohort.isel(subject=rows), sent, shapes, here, rows)
                    for rows in todo
                ]
                failed = list(filter(None, compute_each(tasks, client, shown.update)))
                if failed:
                    fact = f"Expected workers to encode {len(todo)} blocks, found {len(failed)} "
                    fact += f"that failed; the first: {failed[0]}"
                    raise InputError(fact, "Mend that, and run the same call again")
        processes.wait()
        if first:
            finish(path)
            labels = subject_coords(template.drop_vars("subject"))  # as they are now
            write_labels(path, {name: c.values for name, c in labels.items()})
        processes.wait()
    return open_store(path, "latents")


def _write_block(cohort, options, shapes, path, rows) -> None:
    """Encode these rows of a cohort and write them into a store, here or on a worker."""
    done = _block(cohort.compute(scheduler="threads"), options, shapes)
    for i, row in enumerate(rows):
        one = {name: values[i : i + 1] for name, values in done.items()}
        write_rows(path, slice(row, row + 1), one)


def _read_from_others(there, template) -> list[str]:
    """Subjects whose scans are no longer those that the latents in a store were made from."""
    facts = {name for m in MODALITIES.values() for name in (*m.needs, m.has)}
    changed = np.zeros(template.sizes["subject"], bool)
    for name in facts & {*there.coords} & {*template.coords}:
        changed |= ~(there[name] == template[name]).values & there[name].notnull().values
    if "inputs" in there.coords and "inputs" in template.coords:  # of `bhx.prepare`
        sums = ([json.loads(str(text) or "{}").get("sums") for text in one.inputs.values]
                for one in (there, template))  # fmt: skip
        changed |= [a != b for a, b in zip(*sums, strict=True)]
    return template.subject.values[changed].tolist()


def _check_same(path, template):
    """Refuse to go on with a store that another model, cohort or option began."""
    if not (path / "zarr.json").exists():
        fact = f"Expected latents or nothing at '{path}', found something else"
        raise InputError(fact, "Give a new path")
    there = xr.open_zarr(path, consolidated=False)
    made = {k: v for k, v in template.attrs.items() if k != "versions"}
    different = [k for k, v in made.items() if there.attrs.get(k) != v]
    if set(there.data_vars) != set(template.data_vars):
        different.append("keep")
    if not np.array_equal(there.get("subject", ()), template.subject):
        different.append("subjects")
    elif changed := _read_from_others(there, template):
        different.append(f"scan of {listed(changed)}")
    if different:
        fact = f"Expected latents of this model and cohort in '{path}', "
        fact += f"found another {listed(different)}"
        raise InputError(fact, "Give a new path, or delete this store")
