"""A parcellation as a Dataset: names, networks, centroids, vertex labels, harmonics, gradients.

Shipped ones are read from `bhx/assets` and from nilearn's fsaverage5, offline; `parcellation.py`
builds others, which are known by their name here and travel inside cohorts, latents and weights.
"""

from __future__ import annotations

import json
from functools import cache
from importlib.resources import files
from pathlib import Path

import numpy as np
import pandas as pd
import xarray as xr
from scipy.spatial.distance import squareform

from bhx.data.files import attempt
from bhx.errors import InputError, check_choice, listed
from bhx.modalities.bold import BOLD
from bhx.schema import ROI_COORDS, UNITS, plain_labels

ATLASES = {"schaefer100": 100, "schaefer200": 200, "schaefer400": 400}
N_FSAVERAGE5, N_FSLR32K = 10_242, 32_492  # vertices of one hemisphere
ARRAYS = {"harmonics", "gradients", "connectome", "sphere", "labels_fsaverage5", "labels_fslr32k"}
TEXT = ("name7", "name17", "network", "hemi")  # labels of parcels
SURFACES = ("inflated", "pial", "white", "flat", "sphere")
HEMISPHERES = {"left": "left", "right": "right", "L": "left", "R": "right"}
# FreeSurfer's fsaverage to MNI152 (surfer.nmr.mgh.harvard.edu/fswiki/CoordinateSystems)
MNI305_TO_MNI152 = np.array(
    [
        [0.9975, -0.0073, 0.0176, -0.0429],
        [0.0146, 1.0009, -0.0024, 1.5496],
        [-0.0130, -0.0093, 0.9971, 1.1840],
    ]
)
TRAVELS = "atlas_"  # before the names of an atlas's variables and dims inside a cohort
_OWN: dict[str, xr.Dataset] = {}  # atlases built or opened in this session, the newest last


def load_atlas(name="schaefer400", order: str = "7networks") -> xr.Dataset:
    """A parcellation with everything bhx knows of it.

    Parameters
    ----------
    name : "schaefer100", "schaefer200" or "schaefer400"; the name of an atlas of your own that
        `bhx.build_atlas` made, or that came with a cohort or weights, in this session; the path
        where one was saved (.nc, .zarr); or an atlas, which is then known by its name
    order : "7networks", or "17networks" (Schaefer-400 only): the names on `roi` and their order

    Returns
    -------
    Dataset with the parcel names on `roi` and, along it, `network` (of the 7), `hemi`, `mni_x`,
    `mni_y`, `mni_z` [mm], `label` (its number in the vertex labels), `name7` and, for 400,
    `name17` and `label17`; the variables
        harmonics (roi, mode), gradients (roi, component), connectome (roi, roi_other),
        sphere (roi, axis), labels_fsaverage5 (vertex_fsaverage5),
        labels_fslr32k (vertex_fslr32k); left hemisphere first, 0 = no parcel.
    """
    if isinstance(name, xr.Dataset):
        return _known(name)
    if Path(name).suffix in (".nc", ".zarr"):
        with attempt(f"an atlas at {name}", "Give the path where atlas.to_netcdf saved it"):
            opener = xr.open_zarr if Path(name).suffix == ".zarr" else xr.open_dataset
            with opener(name) as saved:
                return _known(plain_labels(saved.load()))
    if name in _OWN:
        return _OWN[name]
    check_choice("the atlas", name, ATLASES)
    check_choice("order", order, ("7networks", "17networks"))
    if order == "17networks" and name != "schaefer400":
        fact = f"Expected order '7networks' for {name}, found '17networks'"
        raise InputError(fact, "The 17-network order is known for schaefer400 only")
    parcels, arrays = _parcels(ATLASES[name]), _arrays(name)
    connectome = squareform(arrays["connectome"])  # its upper triangle is stored
    out = xr.Dataset(
        {
            "harmonics": (("roi", "mode"), arrays["harmonics"]),
            "gradients": (("roi", "component"), arrays["gradients"]),
            "connectome": (("roi", "roi_other"), connectome + np.eye(len(connectome), dtype="f4")),
            "sphere": (("roi", "axis"), arrays["sphere"]),
            "labels_fsaverage5": ("vertex_fsaverage5", arrays["labels_fsaverage5"]),
            "labels_fslr32k": ("vertex_fslr32k", arrays["labels_fslr32k"]),
        },
        {key: ("roi", values) for key, values in parcels.items()}
        | {
            "roi": parcels["name7"],
            "roi_other": parcels["name7"],
            "mode": np.arange(1, arrays["harmonics"].shape[1] + 1),
            "eigenvalue": ("mode", arrays["eigenvalue"], {"units": "mm^-2"}),
            "component": np.arange(1, arrays["gradients"].shape[1] + 1),
            "axis": list("xyz"),
        },
        {"atlas": name},
    )
    sources = _provenance()
    for variable in out.data_vars:
        out[variable].attrs |= sources[variable]
    for axis in ("mni_x", "mni_y", "mni_z"):
        out[axis].attrs |= {"units": UNITS[axis], **sources["mni"]}
    out["labels_fsaverage5"].attrs["agreement"] = float(arrays["agreement"])
    out = out.assign_attrs({**sources["atlas"], "order": order})
    if order == "7networks":
        return out
    out = out.sortby("label17").sortby(out.label17.rename(roi="roi_other"))
    return out.assign_coords(roi=out.name17.values, roi_other=out.name17.values)


def _known(atlas):
    """The atlas itself, from now on known by its name."""
    name, missing = atlas.attrs.get("atlas"), {"roi", *ROI_COORDS} - {*atlas.variables}
    if not name or missing or "harmonics" not in atlas:
        fact = f"Expected an atlas, found a Dataset of {listed(atlas.variables) or 'nothing'}"
        raise InputError(fact, "Make one with bhx.build_atlas")
    if name not in ATLASES:
        _OWN.pop(name, None)
        _OWN[name] = atlas
    return atlas


def known_atlases() -> list[xr.Dataset]:
    """The shipped atlases, and then those of this session, the newest first."""
    return [*map(load_atlas, ATLASES), *reversed(_OWN.values())]


def with_atlas(data: xr.Dataset, atlas: xr.Dataset) -> xr.Dataset:
    """A cohort or latents with an atlas of one's own inside, as coordinates; a shipped one is
    found by its name."""
    data = data.assign_attrs(atlas=atlas.attrs["atlas"])
    if atlas.attrs["atlas"] in ATLASES:
        return data
    own = atlas.sel(roi=data.roi.values)
    there = {str(n) for n in (*own.variables, *own.dims)} - {"roi", *ROI_COORDS}
    own = own.rename({name: TRAVELS + name for name in there})
    own[f"{TRAVELS}label"].attrs |= atlas.attrs
    return data.assign_coords(own.set_coords([*own.data_vars]).coords)


def atlas_of(data: xr.Dataset) -> xr.Dataset | None:
    """The atlas that travels in a cohort or latents, else the one of its name, if known."""
    if f"{TRAVELS}label" not in data.coords:
        name = data.attrs.get("atlas")
        return load_atlas(name) if name in {*ATLASES, *_OWN} else None
    names = [*map(str, data.coords)]
    inside = [n for n in names if n.startswith(TRAVELS) or n in ("roi", *ROI_COORDS)]
    own = xr.Dataset(coords={name: data[name].variable for name in inside})
    travels = [n for n in map(str, {*own.variables, *own.dims}) if n.startswith(TRAVELS)]
    own = own.rename({n: n.removeprefix(TRAVELS) for n in travels})
    return _known(own.reset_coords(ARRAYS & {*own.coords}).assign_attrs(own.label.attrs))


def check_same_places(data: xr.Dataset, atlas: xr.Dataset) -> None:
    """Refuse parcels of the atlas's name that do not lie where the atlas has them."""
    if data.attrs.get("atlas") in ATLASES or data.attrs.get("atlas") != atlas.attrs["atlas"]:
        return
    known = atlas.sel(roi=match_names(data.roi.values, atlas))
    if np.nanmax(np.abs(centroids(data) - centroids(known)), initial=0) > 1:  # mm
        fact = f"Expected parcels where the model's atlas '{atlas.attrs['atlas']}' has them, found "
        raise InputError(f"{fact}them elsewhere", "Give two atlases two names")


def match_names(names, atlas) -> list[str]:
    """The atlas's own name of each parcel in `names`, in the order given.

    Names may be in any order, of the 7- or the 17-network kind, with or without the prefix
    "7Networks_" or "17Networks_". Raises InputError unless they are the atlas's parcels, each once.
    """
    atlas = load_atlas(atlas)
    known = aliases(atlas)
    given = [n.decode() if isinstance(n, bytes) else str(n) for n in np.asarray(names).tolist()]
    found = [known[n] for n in given if n in known]
    unknown = [n for n in given if n not in known]
    missing, own = atlas.indexes["roi"].difference(found, sort=False), pd.Series(found)
    wrong = {"unknown": unknown, "missing": missing, "repeated": own[own.duplicated()]}
    if wrong := [f"{kind}: {listed(names)}" for kind, names in wrong.items() if len(names)]:
        raise InputError(
            f"Expected the {atlas.sizes['roi']} parcels of {atlas.attrs.get('atlas', 'the atlas')}"
            f", found {len(given)} names; {'; '.join(wrong)}",
            "Name the ROIs as bhx.load_atlas(name).roi does, or choose the atlas they come from",
        )
    return [known[name] for name in given]


def aliases(atlas: xr.Dataset) -> dict[str, str]:
    """The atlas's own name of a parcel by each name it has: 7- or 17-network, prefixed or not."""
    own = atlas.roi.values.tolist()
    known = dict(zip(own, own, strict=True))
    for kind in {"name7", "name17"} & {*atlas.coords}:
        names = atlas[kind].values.tolist()
        known |= dict(zip(names, own, strict=True))
        known |= dict(zip((name.split("_", 1)[1] for name in names), own, strict=True))
    return known


def centroids(parcels) -> np.ndarray:
    """Where parcels lie, (roi, 3) [mm, MNI152], from the labels of an atlas or cohort."""
    return np.stack([parcels[f"mni_{axis}"].values for axis in "xyz"], 1)


def parcel_labels(atlas) -> dict[str, np.ndarray]:
    """Labels of parcels by name, as `bhx.schema.build_cohort` takes them."""
    return {name: atlas[name].values for name in ("roi", *ROI_COORDS)}


def reparcellate(cohort: xr.Dataset, atlas) -> xr.Dataset:
    """The cohort's values per parcel as those of another atlas on the cortex, lazily.

    Each new parcel is the mean of the old ones weighted by the vertices they share on fsLR-32k;
    values of which fewer than half of those vertices were measured are NaN. Schaefer's scales
    are not nested, so this approximates parcellating the scans again.
    """
    old, new = atlas_of(cohort), load_atlas(atlas)
    old = load_atlas(cohort.attrs["atlas"]) if old is None else old  # or a refusal by name
    names = match_names(cohort.roi.values, old)
    share = np.zeros((new.sizes["roi"] + 1, old.sizes["roi"] + 1), np.float32)
    np.add.at(share, (places_of(new, "labels_fslr32k"), places_of(old, "labels_fslr32k")), 1)
    order = old.indexes["roi"].get_indexer(names)
    share = share[:-1, :-1][:, order] / np.maximum(share[:-1].sum(1, keepdims=True), 1)
    share = xr.DataArray(share, dims=("roi_new", "roi"))
    out = {}
    for name, v in cohort.data_vars.items():
        if "roi" not in v.dims:
            continue
        bare = v.drop_vars([c for c in v.coords if "roi" in v[c].dims])
        measured = xr.dot(bare.notnull().astype("float32"), share, dim="roi")
        mean = xr.dot(bare.fillna(0), share, dim="roi") / measured.where(measured >= 0.5)
        out[name] = mean.rename(roi_new="roi").transpose(*v.dims).astype("float32")
    coords = {name: ("roi", values) for name, values in parcel_labels(new).items()}
    cohort = cohort.assign_attrs(parcellated_from=cohort.attrs["atlas"])
    cohort = cohort.drop_vars([n for n in cohort.coords if str(n).startswith(TRAVELS)])
    return with_atlas(cohort.drop_dims("roi").assign(out).assign_coords(coords), new)


def places_of(atlas: xr.Dataset, labels) -> np.ndarray:
    """Vertex or voxel labels as places among the atlas's parcels, -1 where there is none; `labels`
    is an array, or the atlas's variable of that name."""
    if isinstance(labels, str):
        if labels not in atlas:
            fact = f"Expected {labels} of the atlas {atlas.attrs['atlas']}, found none"
            raise InputError(fact, "Build it from a label image, a surface or coordinates")
        labels = atlas[labels].values
    return pd.Index(atlas.label.values).get_indexer(labels.ravel()).reshape(labels.shape)


def load_sample() -> xr.Dataset:
    """One real resting-state scan, Schaefer-400 parcels: bold (roi, time), TR in `attrs["tr"]`."""
    arrays = _arrays("sample")
    bold = arrays[BOLD.variable] * arrays["scale"][:, None]
    return xr.Dataset(
        {BOLD.variable: (BOLD.dims, bold.astype(np.float32))},
        {"roi": _parcels(400)["name7"], "time": np.arange(bold.shape[1])},
        {"tr": float(arrays["tr"]), **_provenance()["sample"]},
    )


def load_mesh(surface: str = "inflated", hemi: str = "left") -> tuple[np.ndarray, np.ndarray]:
    """fsaverage5 from nilearn's wheel: coords (10242, 3) float32 [mm, MNI305], faces int32.

    `surface` is "inflated", "pial", "white", "flat" or "sphere"; `hemi` is "left" or "right".
    The flat surface is cut open, so some vertices are in no triangle of it.
    """
    check_choice("the surface", surface, SURFACES)
    coords, faces = _gifti("infl" if surface == "inflated" else surface, hemi)
    return coords.astype(np.float32), faces.astype(np.int32)


def load_mni_mesh(surface: str, hemi: str) -> tuple[np.ndarray, np.ndarray]:
    """The white or pial surface of fsaverage5 in MNI152 space [mm]."""
    coords, faces = load_mesh(surface, hemi)
    return coords @ MNI305_TO_MNI152[:, :3].T + MNI305_TO_MNI152[:, 3], faces


def to_other_mesh(labels) -> dict[str, np.ndarray]:
    """Labels of fsaverage5 or fsLR-32k vertices (left first) on both meshes, by variable name."""
    kinds = {"fsaverage5": 2 * N_FSAVERAGE5, "fslr32k": 2 * N_FSLR32K}
    twins = _arrays("meshes")  # name of a mesh -> the vertex of the other in the place of each
    here = next(name for name, n in kinds.items() if n == len(labels))
    (other,) = kinds.keys() - {here}
    return {f"labels_{here}": labels, f"labels_{other}": labels[twins[here]]}


def load_sulc(hemi: str = "left") -> np.ndarray:
    """Sulcal depth of fsaverage5 (10242,) float32, positive in sulci, from nilearn's wheel."""
    return _gifti("sulc", hemi)[0].astype(np.float32)


@cache
def _gifti(name, hemi):
    import nibabel  # heavy, and importing nilearn.datasets instead takes two seconds more

    check_choice("hemi", hemi, HEMISPHERES)
    folder = files("nilearn") / "datasets" / "data" / "fsaverage5"
    image = nibabel.load(str(folder / f"{name}_{HEMISPHERES[hemi]}.gii.gz"))
    return tuple(array.data for array in image.darrays)


def _arrays(name):
    with _asset(f"{name}.npz").open("rb") as raw, np.load(raw) as file:
        return dict(file)


def _parcels(scale):
    with _asset("parcels.csv").open("rb") as file:
        table = pd.read_csv(file).query("scale == @scale").drop(columns="scale")
    table = table.dropna(axis=1).astype({f"mni_{axis}": float for axis in "xyz"})
    table = table.astype({"label17": int}) if "label17" in table else table
    name = table["name7"].str.split("_", expand=True)
    table = table.assign(network=name[2], hemi=name[1].str[0])
    return {key: table[key].to_numpy(str if key in TEXT else None) for key in table}


def _provenance():
    return json.loads(_asset("provenance.json").read_text(encoding="utf-8"))


def _asset(name):
    return files("bhx") / "assets" / name
