"""An atlas of one's own, from whatever says where its regions are.

Each kind of source gives a table of regions, a line each, and where it has them the region of every
vertex; what `load_atlas` holds for a shipped atlas follows from these two.
"""

from __future__ import annotations

import re
import warnings
from functools import cache
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import xarray as xr
from scipy import ndimage
from scipy.sparse.csgraph import laplacian
from scipy.spatial import cKDTree
from scipy.spatial.distance import cdist

from bhx.data.atlas import (
    ATLASES,
    N_FSAVERAGE5,
    N_FSLR32K,
    centroids,
    load_atlas,
    load_mesh,
    load_mni_mesh,
    places_of,
    to_other_mesh,
)
from bhx.data.files import attempt, check_affine, check_file, check_space, reading
from bhx.data.geometry import fix_signs, gradients, harmonics
from bhx.errors import InputError, listed

N_HARMONICS, N_GRADIENTS = 200, 30  # as shipped; atlases of fewer regions have 0 behind theirs
MNI = ["mni_x", "mni_y", "mni_z"]
IN_BRAIN = 0.8  # share of labeled voxels inside the MNI152 brain below which an image is refused
FILL_MM = 3.0  # label images leave thin gaps along the cortex; they go to the nearest region
VERTEX_MM3 = 26.0  # cortex that one fsaverage5 vertex stands for: 8.8 mm2 x 3 mm
ON_CORTEX = 0.15  # share of a region's volume that must be cortex; caudate 0.01, insula 0.3
SPHERE_MM = 10.0  # a coordinate takes the vertices nearest to it, as far as this
AROUND = 25  # vertices within that reach of a place on the cortex: Schaefer 28, accumbens 21
CARRY_MM = 5.0  # Schaefer-400's connectome carried so far resembles Schaefer-100's and -200's most
OFF_CORTEX_MM = 20.0  # reach of the kernel between regions off the cortex
NO_REGION = r"(?i)(unknown|background|medial.?wall|corpus.?callosum|\?+|)"
SIDES = {
    "L": r"(?i)(?:^|[^a-z])(?:l|lh)(?:[^a-z]|$)|left",
    "R": r"(?i)(?:^|[^a-z])(?:r|rh)(?:[^a-z]|$)|right",
}


def build_atlas(source, *, name: str, names=None, connectome=None) -> xr.Dataset:
    """An atlas of your own, used wherever a shipped one is.

    Parameters
    ----------
    source : a label image in MNI152 space (path or nibabel image); labels of the cortex (.annot,
        .label.gii: the left file, with its partner beside it, or a list of both; fsaverage or
        fsLR-32k) or of grayordinates (.dlabel.nii); a table with a line a region and its MNI
        coordinates (DataFrame, .csv or .tsv with name, x, y, z [mm]; network where known); a list
        of names; or what one of nilearn's fetch_atlas functions returns
    name : of the atlas
    names : of the regions of an image: a list in the order of its numbers, {number: name}, or a
        table (also a path) with the columns label or index, name, and network where known
    connectome : correlations of regions (roi, roi), averaged over training people, from which the
        gradients are made; by default the shipped Schaefer-400's, carried over by centroids

    Returns
    -------
    Dataset as of `bhx.load_atlas`, and known to it by its name in this session. `vertices` counts
    those of fsaverage5 in a region; regions off the cortex have none, a network "none", and
    harmonics of their own. `atlas.to_netcdf(path)` saves it for `bhx.load_atlas(path)`.
    """
    if name in ATLASES or not re.fullmatch(r"[A-Za-z0-9][\w-]*", name):
        fact = (
            f"Expected a name of letters, digits, - and _ that no shipped atlas has, found '{name}'"
        )
        raise InputError(fact, "Choose another, such as name='cc200'")
    if isinstance(source, dict) and "maps" in source:  # of nilearn
        names = source.get("lut", source.get("labels")) if names is None else names
        source = source["maps"]
    table, vertices = _regions(source, names, name)
    _check_regions(table, name)
    table = table.assign(**{c: table.get(c, np.nan) for c in MNI}, vertices=0)
    labels = {} if vertices is None else to_other_mesh(vertices.astype("int32"))
    if labels:
        on = labels["labels_fsaverage5"]
        middle = pd.DataFrame(_cortex()[0], columns=MNI).groupby(on).mean().reindex(table.label)
        table[MNI] = table[MNI].fillna(middle.set_index(table.index))
        table["vertices"] = np.bincount(on, minlength=int(table.label.max()) + 1)[table.label]
    if "network" not in table:
        table["network"] = _networks(labels.get("labels_fsaverage5"), table)
    table["hemi"] = _hemispheres(table)
    place = {"labels": str(Path(source).resolve())} if isinstance(source, str | Path) else {}
    out = _dataset(table, labels, _group_connectome(connectome, table), {"atlas": name, **place})
    return load_atlas(out)


def _dataset(table, labels, connectome, attrs):
    """What `load_atlas` returns, from regions, vertex labels and connectome."""
    found = np.zeros((len(table), N_GRADIENTS))
    if connectome is not None:
        n = min(N_GRADIENTS, len(table) - 1)
        found[:, :n] = gradients(connectome, n)
    modes, sphere = _positions(table, labels)
    data = {
        "harmonics": (("roi", "mode"), modes.astype("f4")),
        "gradients": (("roi", "component"), found.astype("f4")),
        "sphere": (("roi", "axis"), sphere.astype("f4")),
        **{kind: (f"vertex_{kind.removeprefix('labels_')}", v) for kind, v in labels.items()},
    }
    if connectome is not None:
        data["connectome"] = (("roi", "roi_other"), connectome.astype("f4"))
    kept = {c: table[c].to_numpy() for c in ("label", "vertices", *MNI)}
    kept |= {c: table[c].to_numpy(str) for c in ("network", "hemi")}
    coords = {c: ("roi", values) for c, values in kept.items()} | {"roi": table.name.to_numpy(str)}
    return xr.Dataset(data, coords | {"axis": list("xyz")}, {**attrs, "order": "7networks"})


# Sources: a table of regions, and the region of each vertex of fsaverage5 or fsLR-32k ---


def _regions(source, names, name):
    several = isinstance(source, list | tuple) and len(source) == 2
    file = str(source[0] if several else source) if not hasattr(source, "dataobj") else ""
    if file.endswith((".annot", ".gii")):
        return _surface_regions(source if several else both_sides(Path(source)), names, name)
    if file.endswith(".dlabel.nii"):
        return _cifti_regions(check_file(source), names, name)
    if hasattr(source, "dataobj") or file.endswith((".nii", ".nii.gz", ".mgz")):
        return _image_regions(source, names, name)
    if isinstance(source, str | Path):
        with reading(check_file(source), "a table of regions"):
            source = pd.read_csv(source, sep=None, engine="python", encoding="utf-8-sig")
    if not isinstance(source, pd.DataFrame):
        source = pd.DataFrame({"name": [str(n) for n in source]})
    table = source.rename(columns=lambda c: str(c).lower().removeprefix("mni_"))
    table = table.rename(
        columns={"roi": "name", "region": "name", **dict(zip("xyz", MNI, strict=True))}
    )
    if "name" not in table:
        fact = f"Expected a table of regions with a column name, found {listed(source.columns, 12)}"
        raise InputError(fact, "Name the columns name, x, y, z [mm]")
    table["label"] = np.arange(1, len(table) + 1)
    return table, _nearest_vertices(table) if {*MNI} <= {*table} else None


def _image_regions(source, names, name):
    image, where = source, "the label image"
    if isinstance(source, str | Path):
        where = check_file(source).name
        check_space(source)
        with reading(source, "labels"):
            image = nib.load(source)
    check_affine(image, where)
    numbers = whole_numbers(image, where)
    found = np.unique(numbers[numbers > 0])
    table = _named(found, names, name)
    inside = np.argwhere(numbers > 0)
    _check_in_brain(nib.affines.apply_affine(image.affine, inside), where)
    middle = np.array(ndimage.center_of_mass(numbers > 0, numbers, found))
    table[MNI] = nib.affines.apply_affine(image.affine, middle)
    vertices = _ribbon_labels(numbers, image.affine)
    volume = np.bincount(numbers.ravel())[found] * abs(np.linalg.det(image.affine))
    cortex = np.bincount(vertices, minlength=found.max() + 1)[found] * VERTEX_MM3
    vertices[np.isin(vertices, found[cortex < ON_CORTEX * volume])] = 0
    return table, vertices


def whole_numbers(image, where: str) -> np.ndarray:
    """The labels of a 3D image as integers, or a refusal."""
    numbers = np.asarray(image.dataobj)
    numbers = numbers[..., 0] if numbers.ndim == 4 and numbers.shape[3] == 1 else numbers
    if numbers.ndim != 3 or (numbers != np.round(numbers)).any() or not numbers.any():
        fact = f"Expected whole numbers in 3D in {where}, found others"
        raise InputError(fact, "Give an image in which each voxel has the number of its parcel")
    if (lowest := numbers.min()) < 0:
        fact = f"Expected labels from 0 on in {where}, found {lowest:g} ({image.get_data_dtype()})"
        raise InputError(fact, "An int8 image holds no number over 127: save it again as int16")
    return numbers.astype("int32")


def _ribbon_labels(numbers, affine):
    """The label that fsaverage5's cortex has most often between white and pial surface."""
    from nilearn.surface import InMemoryMesh, vol_to_surf

    step = np.linalg.norm(affine[:3, :3], axis=0)
    gap, nearest = ndimage.distance_transform_edt(numbers == 0, step, return_indices=True)
    filled = nib.Nifti1Image(np.where(gap <= FILL_MM, numbers[tuple(nearest)], 0), affine)
    halves = []
    for hemi in ("left", "right"):
        pial, white = (InMemoryMesh(*load_mni_mesh(kind, hemi)) for kind in ("pial", "white"))
        how = {"inner_mesh": white, "interpolation": "nearest_most_frequent", "n_samples": 5}
        halves.append(np.nan_to_num(vol_to_surf(filled, pial, **how)))
    return np.concatenate(halves).astype(int) * (load_atlas().labels_fsaverage5.values > 0)


def _surface_regions(files, names, name):
    known, sides, vertices, n = [], [], [], 0
    for hemi, file in zip("LR", map(check_file, files), strict=True):
        with reading(file, "labels of the cortex"):
            if file.suffix == ".annot":
                labels, _, titles = nib.freesurfer.read_annot(file)
                titles = dict(enumerate(title.decode() for title in titles))
            else:
                image = nib.load(file)
                labels = image.darrays[0].data.astype(int)
                titles = image.labeltable.get_labels_as_dict()
        if len(labels) in (40_962, 163_842):  # of finer fsaverages the first are fsaverage5's
            labels = labels[:N_FSAVERAGE5]
        if len(labels) not in (N_FSAVERAGE5, N_FSLR32K):
            fact = f"Expected labels of fsaverage or fsLR-32k in {file.name}, found {len(labels)}"
            raise InputError(fact, "Resample them to one of these meshes")
        found = [k for k in np.unique(labels) if not re.fullmatch(NO_REGION, titles.get(k, str(k)))]
        found = [k for k in found if k > 0 or titles.get(k)]
        place = pd.Index(found).get_indexer(labels)
        vertices.append(np.where(place >= 0, place + 1 + n, 0))
        known += [titles.get(k, str(k)) for k in found]
        sides += [hemi] * len(found)
        n += len(found)
    if len({*known}) < len(known) or all(title.isdigit() for title in known):
        known = [f"{hemi}_{title}" for hemi, title in zip(sides, known, strict=True)]
    table = _named(np.arange(1, n + 1), known if names is None else names, name)
    return table.assign(hemi=sides), np.concatenate(vertices)


def both_sides(path: Path) -> tuple[Path, Path]:
    """Left and right file of a surface, given one of them."""
    for left, right in (("hemi-L", "hemi-R"), ("lh.", "rh."), (".L.", ".R."), ("_lh", "_rh")):
        for this, other in ((left, right), (right, left)):
            if this in path.name:
                pair = path, path.with_name(path.name.replace(this, other))
                return pair if this == left else pair[::-1]
    fact = f"Expected a hemisphere in the name of {path.name} (hemi-L, lh.), found none"
    raise InputError(
        fact, "Name the two files alike but for the hemisphere, or give both in a list"
    )


def _cifti_regions(file, names, name):
    with reading(file, "labels of grayordinates"):
        image = nib.load(file)
        key, brain = image.header.get_axis(0), image.header.get_axis(1)
        numbers = np.asarray(image.dataobj)[0].astype(int)
        titles = {k: title for k, (title, _) in key.label[0].items()}
    found = [k for k in np.unique(numbers[numbers > 0]) if not re.fullmatch(NO_REGION, titles[k])]
    at = fslr_vertices(brain, file.name)
    vertices = np.zeros(2 * N_FSLR32K, int)
    vertices[at[at >= 0]] = np.where(np.isin(numbers, found), numbers, 0)[at >= 0]
    table = _named(np.array(found), {k: titles[k] for k in found} if names is None else names, name)
    if brain.affine is not None:
        here = brain.volume_mask & np.isin(numbers, found)
        mm = nib.affines.apply_affine(brain.affine, brain.voxel[here])
        middle = pd.DataFrame(mm, columns=MNI).groupby(numbers[here]).mean()
        table[MNI] = middle.reindex(table.label).to_numpy()
    return table, vertices


def fslr_vertices(brain, where: str) -> np.ndarray:
    """The fsLR-32k vertex (left first) of each grayordinate of a CIFTI axis, -1 off the cortex."""
    out = np.full(len(brain), -1)
    starts = {"CIFTI_STRUCTURE_CORTEX_LEFT": 0, "CIFTI_STRUCTURE_CORTEX_RIGHT": N_FSLR32K}
    for structure, here, model in brain.iter_structures():
        if structure in starts:
            if (n := brain.nvertices[structure]) != N_FSLR32K:
                fact = f"Expected fsLR-32k in {where}, found a cortex of {n} vertices"
                raise InputError(fact, "Resample to fsLR-32k (91k grayordinates)")
            out[here] = starts[structure] + model.vertex
    return out


def _nearest_vertices(table):
    """Each vertex goes to the nearest coordinate of its hemisphere within SPHERE_MM, of those that
    lie on the cortex."""
    places = table[MNI].to_numpy(float)
    _check_mm(places)
    inside = np.flatnonzero(load_atlas().labels_fsaverage5.values > 0)
    middle = _cortex()[0][inside]
    around = cKDTree(middle).query_ball_point(places, SPHERE_MM, return_length=True)
    near, label = places[around >= AROUND], table.label.to_numpy()[around >= AROUND]
    out = np.zeros(2 * N_FSAVERAGE5, int)
    if len(near):
        distance, nearest = cKDTree(near).query(middle)
        same = (near[nearest, 0] < 0) == (inside < N_FSAVERAGE5)
        out[inside] = np.where((distance <= SPHERE_MM) & same, label[nearest], 0)
    return out


def _named(numbers, names, name):
    """A line a region: its number, its name, and what else a table of names says."""
    if isinstance(names, str | Path):
        with reading(check_file(names), "names of regions"):
            names = pd.read_csv(names, sep=None, engine="python", encoding="utf-8-sig")
    if names is None:
        names = {n: f"{name}_{n}" for n in numbers}
    if isinstance(names, dict):
        names = pd.DataFrame({"label": [*names], "name": [*names.values()]})
    if not isinstance(names, pd.DataFrame):
        given = [n.decode() if isinstance(n, bytes) else str(n) for n in names]
        given = given[1:] if given and re.fullmatch(NO_REGION, given[0]) else given
        if len(given) != len(numbers):
            fact = f"Expected a name for each of {len(numbers)} regions, found {len(given)}"
            raise InputError(fact, "Give a table with the number (label) and name of each region")
        names = pd.DataFrame({"label": numbers, "name": given})
    names = names.rename(columns=lambda c: str(c).lower()).rename(columns={"index": "label"})
    if not {"label", "name"} <= {*names}:
        fact = f"Expected names with the columns label and name, found {listed(names.columns, 12)}"
        raise InputError(fact, "Name the columns so")
    known = names[pd.to_numeric(names.label, errors="coerce").isin(numbers)]
    known = known.astype({"label": float}).astype({"label": int}).sort_values("label")
    if known.label.tolist() != [*numbers]:
        lost = [n for n in numbers if n not in {*known.label}] or known.label[
            known.label.duplicated()
        ]
        fact = f"Expected one name for each of {len(numbers)} labels, found none or several for "
        raise InputError(fact + listed(lost), "Give the names that belong to this image")
    known["name"] = known.name.astype(str).str.strip()
    return known[[c for c in ("label", "name", "network", "hemi") if c in known]].reset_index(
        drop=True
    )


# Checked: what may not be ---


def _check_regions(table, name):
    """Names are there once each, and on the side that they say."""
    bad = table.name[table.name.duplicated() | table.name.isin(["", "nan"])]
    if len(bad) or len(table) < 2:
        fact = f"Expected two or more regions of {name} with names that differ, found "
        raise InputError(
            fact + (f"again {listed(bad)}" if len(bad) else str(len(table))), "Name each once"
        )
    if "mni_x" in table:
        says = table.name.map(_side_of_name)
        there = (says != "") & (table.mni_x.abs() > 5)
        wrong = there & ((says == "L") != (table.mni_x < 0))
        if wrong.sum() > 0.1 * there.sum():
            fact = f"Expected regions of {name} on the side that their names say, found "
            fact += f"{wrong.sum()} of {there.sum()} on the other ({listed(table.name[wrong], 3)})"
            raise InputError(
                fact, "Give names in the order of the numbers, and an image not flipped"
            )


def _side_of_name(name):
    found = [side for side, form in SIDES.items() if re.search(form, name)]
    return found[0] if len(found) == 1 else ""


def _check_mm(places):
    """Coordinates in mm of MNI152: neither voxels nor meters."""
    size = np.abs(places).max() if np.isfinite(places).all() else np.nan
    if not 10 < size < 150 or not (places[:, 0] < 0).any() or not (places[:, 0] > 0).any():
        fact = (
            f"Expected MNI coordinates in mm, left of 0 and right of it, found {size:.3g} at most "
        )
        fact += f"and x from {places[:, 0].min():.3g} to {places[:, 0].max():.3g}"
        raise InputError(fact, "Voxels need the image's affine; meters are 1000 mm each")
    _check_in_brain(places, "the table of regions")


def _check_in_brain(places, where):
    """Most places lie in the MNI152 brain, 4 mm around it included."""
    mask, to_voxel = _brain()
    voxel = np.rint(nib.affines.apply_affine(to_voxel, places)).astype(int)
    known = ((voxel >= 0) & (voxel < mask.shape)).all(1)
    share = mask[tuple(voxel[known].T)].sum() / len(places)
    if share < IN_BRAIN or (places >= 0).all():  # as where no affine was set
        fact = (
            f"Expected regions in MNI152 space in {where}, found {share:.0%} of them in its brain"
        )
        fact += f", the first at {places[0].round(1)} mm"
        raise InputError(fact, "Give labels in MNI152 space [mm], with their affine")


@cache
def _brain():
    from nilearn.datasets import load_mni152_brain_mask

    image = load_mni152_brain_mask(resolution=2)
    mask = ndimage.binary_dilation(np.asarray(image.dataobj) > 0, iterations=2)
    return mask, np.linalg.inv(image.affine)


# Placed: what follows from coordinates and vertices ---


@cache
def _cortex():
    """fsaverage5, both hemispheres in one: the middle of the cortex (vertex, 3) [mm, MNI152], and
    its harmonics (vertex, mode) without the constant one, the contrast of left and right first."""
    both = [[load_mni_mesh(kind, hemi) for kind in ("white", "pial")] for hemi in ("left", "right")]
    middle = np.concatenate([(white[0] + pial[0]) / 2 for white, pial in both])
    faces = np.concatenate([side[0][1] + i * N_FSAVERAGE5 for i, side in enumerate(both)])
    inside = load_atlas().labels_fsaverage5.values > 0
    modes = harmonics(middle, faces, N_HARMONICS + 1, inside)[1]
    flat = (modes[:, :2] ** 2).sum(1)  # of the two constant modes, in any mixture: 1 / area
    left, right = (1 / np.nanmean(part) for part in np.split(flat, 2))
    sides = np.repeat([np.sqrt(right / left), -np.sqrt(left / right)], N_FSAVERAGE5)
    modes[:, 1] = np.where(inside, sides, np.nan) / np.sqrt(left + right)
    return middle, modes[:, 1:]


def _positions(table, labels):
    """Harmonics (roi, mode) and directions on the sphere (roi, axis): means over the vertices of a
    region; off the cortex eigenmodes of a Gaussian kernel of centroids, and no direction."""
    modes, sphere = np.zeros((len(table), N_HARMONICS)), np.full((len(table), 3), np.nan)
    on = table.vertices.to_numpy() > 0
    if on.any():
        at, mesh = labels["labels_fsaverage5"], _cortex()[1]
        ball = np.concatenate([load_mesh("sphere", hemi)[0] for hemi in ("left", "right")])
        modes[on], sphere[on] = (
            pd.DataFrame(v).groupby(at).mean().reindex(table.label[on]).fillna(0).to_numpy()
            for v in (mesh, ball / np.linalg.norm(ball, axis=1, keepdims=True))
        )
        sphere /= np.linalg.norm(sphere, axis=1, keepdims=True)
    off = np.flatnonzero(~on & table.mni_x.notna())
    if len(off) > 1:
        places = table[MNI].to_numpy(float)[off]
        near = np.exp(-((cdist(places, places) / OFF_CORTEX_MM) ** 2) / 2)
        own = fix_signs(np.linalg.eigh(laplacian(near))[1][:, 1 : N_HARMONICS + 1])
        spread = np.sqrt((load_atlas().harmonics.values ** 2).mean())  # of a shipped atlas
        modes[off, : own.shape[1]] = own * np.sqrt(len(off)) * spread
    return modes, sphere


def _group_connectome(given, table):
    """The connectome given, checked, or Schaefer-400's at these centroids; None without any."""
    n = len(table)
    if given is not None:
        if isinstance(given, pd.DataFrame):
            with attempt("a connectome with the names of the regions", "Name its lines so"):
                given = given.loc[table.name, table.name]
        given = np.asarray(given, float)
        if given.shape != (n, n):
            fact = f"Expected a connectome of {n} x {n} regions, found {given.shape}"
            raise InputError(fact, "Give the group's mean correlation (roi, roi)")
        return given
    if table.mni_x.isna().any():
        warnings.warn(
            "These regions have no place: neither coordinates nor a connectome were given. Give "
            "build_atlas(connectome=), the mean correlation of training people, before pretraining",
            stacklevel=3,
        )
        return None
    shipped = load_atlas()
    square = cdist(table[MNI], centroids(shipped), "sqeuclidean")
    weight = np.exp((square.min(1, keepdims=True) - square) / (2 * CARRY_MM**2))
    weight /= weight.sum(1, keepdims=True)
    carried = weight @ shipped.connectome.values @ weight.T
    size = np.sqrt(np.diag(carried))
    return carried / np.outer(size, size)


def _networks(on, table):
    """The shipped Schaefer-400's network that a region shares most vertices with."""
    if on is None:
        return "none"
    shipped = load_atlas()
    network = np.append(shipped.network.values, "")[places_of(shipped, "labels_fsaverage5")]
    shared = pd.crosstab(on, network).drop(columns="").reindex(table.label, fill_value=0)
    return np.where(shared.sum(1) > 0, shared.idxmax(axis=1), "none")


def _hemispheres(table):
    """As the source says, else by the sign of x, else by the name; "" where nothing says."""
    by_name = table.name.map(_side_of_name)
    by_x = by_name.where(table.mni_x.isna(), np.where(table.mni_x < 0, "L", "R"))
    return table["hemi"].fillna(by_x) if "hemi" in table else by_x
