"""Build the shipped atlas arrays and the sample scan from the wheels of brainspace and nilearn.

Run by `make assets` (extra `assets`); offline, a minute or two on one core. `parcels.csv` is an
input, not an output: names, numbers and centroids as published by CBIG. What each array is and
where it comes from is told in `bhx/assets/README.md`.
"""

from __future__ import annotations

import csv
from importlib.resources import files
from pathlib import Path

import nibabel
import numpy as np
from scipy import sparse
from scipy.spatial import cKDTree
from scipy.spatial.transform import Rotation

from bhx.data import atlas
from bhx.data.geometry import fix_signs, gradients, harmonics
from bhx.errors import InputError, listed

REPO = Path(__file__).parents[1]
HERE = REPO / "bhx" / "assets"
PUBLISHED = REPO / "tests" / "data" / "schaefer400_fsaverage5_published.npz"
SMOOTHING = 400  # steps; 200 to 1600 give the same labels within half a per cent of vertices
SCALES = (100, 200, 400)
N_HARMONICS, N_GRADIENTS = 200, 30
SCAN = "sub-010188_ses-02_task-rest_acq-AP_run-01"
SCAN_TR = 1.4  # s


def main():
    coords, faces, sphere, mask = read_conte69()
    print("harmonics of", mask.sum(), "vertices")
    values, modes = harmonics_of_both(coords, faces, mask, N_HARMONICS + 1)
    twin = conte69_twins(coords, sphere)
    labels = {n: read_table(f"parcellations/schaefer_{n}_conte69.csv") for n in SCALES}
    shared = {"eigenvalue": values[1:], "agreement": agreement(labels[400][twin])}
    for n in SCALES:
        arrays = atlas_arrays(n, labels[n].astype(np.int16), twin, modes[:, 1:], sphere)
        save(f"schaefer{n}.npz", **arrays, **shared)
    save("meshes.npz", fslr32k=twin.astype("u2"), fsaverage5=twins_back(twin, sphere).astype("u2"))
    save("sample.npz", **sample_arrays(labels[400][twin].astype(int)))


def atlas_arrays(scale, labels, twin, modes, sphere) -> dict:
    connectome = read_table(f"matrices/main_group/schaefer_{scale}_mean_connectivity_matrix.csv")
    connectome = connectome.astype(np.float16)  # as shipped, so the gradients can be repeated
    center = parcel_means(sphere, labels, scale)
    return {
        "harmonics": parcel_means(modes, labels, scale).astype(np.float32),
        "gradients": gradients(connectome, N_GRADIENTS).astype(np.float32),
        "connectome": connectome[np.triu_indices(scale, 1)],
        "sphere": (center / np.linalg.norm(center, axis=1, keepdims=True)).astype(np.float32),
        "labels_fslr32k": labels,
        "labels_fsaverage5": labels[twin],
    }


def harmonics_of_both(coords, faces, mask, n_modes) -> tuple[np.ndarray, np.ndarray]:
    """Harmonics of two hemispheres in one mesh, merged by eigenvalue: (mode), (vertex, mode).

    First come the modes with eigenvalue 0, the constant and the contrast between the hemispheres;
    every other mode lives on one hemisphere and is 0 on the other.
    """
    half = len(coords) // 2
    values, modes, areas = [], [], []
    for side in (slice(0, half), slice(half, None)):
        here = faces[(faces[:, 0] >= half) == (side.start == half)] - side.start
        value, mode = harmonics(coords[side], here, n_modes, mask[side])
        areas.append(np.nanmax(mode[:, 0]) ** -2)  # u' M u = 1 of a constant u
        whole = np.where(mask[:, None], np.zeros((len(coords), n_modes - 1)), np.nan)
        whole[side] = mode[:, 1:]
        values.append(value[1:])
        modes.append(whole)
    left, right = areas
    contrast = [np.sqrt(right / left), -np.sqrt(left / right)]
    flat = np.stack([np.ones(len(coords)), np.repeat(contrast, half)], 1) / np.sqrt(left + right)
    values, modes = np.concatenate(values), np.concatenate(modes, 1)
    order = np.argsort(values, kind="stable")[: n_modes - 2]
    out = np.full((len(coords), n_modes), np.nan)
    out[mask] = np.concatenate([fix_signs(flat[mask]), modes[mask][:, order]], 1)
    return np.concatenate([[0, 0], values[order]]), out


def conte69_twins(coords, sphere) -> np.ndarray:
    """For each fsaverage5 vertex, the conte69 vertex in the same place of the folded cortex.

    The nearest conte69 vertex in MNI152 mm jumps across sulci, so it only guides a smooth map from
    one sphere to the other: the best rotation, then the smoothed rest; the nearest vertex on the
    sphere is the twin. No label is used.
    """
    half, twins = len(coords) // 2, []
    for hemi, start in (("left", 0), ("right", half)):
        here = slice(start, start + half)
        unit = sphere[here] / np.linalg.norm(sphere[here], axis=1, keepdims=True)
        middle = sum(atlas.load_mni_mesh(surface, hemi)[0] for surface in ("white", "pial")) / 2
        goal = unit[cKDTree(coords[here]).query(middle)[1]]
        ball, faces = atlas.load_mesh("sphere", hemi)
        ball = ball / np.linalg.norm(ball, axis=1, keepdims=True)
        turned = Rotation.align_vectors(goal, ball)[0].apply(ball)
        rest = smoothed(goal - turned, faces)
        twins.append(start + cKDTree(unit).query(turned + rest)[1])
    return np.concatenate(twins)


def twins_back(twin, sphere) -> np.ndarray:
    """For each conte69 vertex, the fsaverage5 vertex whose twin lies nearest on the sphere."""
    out = []
    for here, there in zip(np.split(np.arange(len(sphere)), 2), np.split(twin, 2), strict=True):
        nearest = cKDTree(sphere[there]).query(sphere[here])[1]
        out.append(nearest + (len(twin) // 2 if here[0] else 0))
    return np.concatenate(out)


def smoothed(values, faces) -> np.ndarray:
    """Averaged over each vertex and its neighbors, SMOOTHING times."""
    near = adjacency(faces, len(values)) + sparse.eye_array(len(values))
    near = sparse.diags_array(1 / near.sum(axis=1)) @ near
    for _ in range(SMOOTHING):
        values = near @ values
    return values


def agreement(labels) -> float:
    """Share of cortical vertices with the published Schaefer-400 label (ENIGMA toolbox)."""
    with np.load(PUBLISHED) as file:
        published = file["labels"]
    return float((labels == published)[published > 0].mean())


def sample_arrays(labels) -> dict:
    paths = [brainspace_file(f"preprocessing/{SCAN}.fsa5.{h}h.mgz") for h in "lr"]
    runs = [nibabel.MGHImage.from_filename(path) for path in paths]
    halves = [np.asarray(run.dataobj).reshape(len(labels) // 2, -1) for run in runs]
    vertices = np.concatenate(halves)  # (vertex, time); vertices without data are all 0
    bold = parcel_means(vertices, np.where(vertices.any(axis=1), labels, 0), 400)
    scale = np.abs(bold).max(axis=1) / np.iinfo(np.int16).max
    return {
        "bold": np.round(bold / scale[:, None]).astype(np.int16),
        "scale": scale.astype(np.float32),  # signal units of one count, per parcel
        "tr": SCAN_TR,
    }


def read_conte69():
    meshes = [nibabel.load(brainspace_file(f"surfaces/conte69_32k_{h}h.gii")) for h in "lr"]
    spheres = [nibabel.load(brainspace_file(f"surfaces/conte69_32k_{h}h_sphere.gii")) for h in "lr"]
    half = len(meshes[0].darrays[0].data)
    coords = np.concatenate([m.darrays[0].data for m in meshes]).astype(float)
    faces = np.concatenate([i * half + m.darrays[1].data for i, m in enumerate(meshes)])
    sphere = np.concatenate([s.darrays[0].data for s in spheres]).astype(float)
    mask = np.concatenate([read_table(f"surfaces/conte69_32k_{h}h_mask.csv") > 0 for h in "lr"])
    return coords, faces, sphere, mask


def brainspace_file(name) -> Path:
    return Path(str(files("brainspace") / "datasets" / name))


def read_table(name) -> np.ndarray:
    with open(brainspace_file(name)) as file:
        return np.array([[float(x) for x in row] for row in csv.reader(file)]).squeeze()


def save(name, **arrays):
    np.savez_compressed(HERE / name, **arrays)
    print(name, f"{(HERE / name).stat().st_size / 1e3:.0f} kB")


# Parcels and connectomes to numbers ---


def parcel_means(values, labels, n_parcels: int) -> np.ndarray:
    """Mean of vertex values (vertex, ...) over each parcel 1..n_parcels: array (parcel, ...).

    Vertices that are NaN (outside a mask) are left out; label 0 belongs to no parcel.
    """
    values, labels = np.asarray(values, float), np.asarray(labels)
    if len(values) != len(labels):
        fact = f"Expected one label for each of {len(values)} vertices, found {len(labels)}"
        raise InputError(fact, "Take the labels and the values from the same mesh")
    if labels.min() < 0 or labels.max() > n_parcels:
        fact = f"Expected labels from 0 to {n_parcels}, found {labels.min()} to {labels.max()}"
        raise InputError(fact, "Number the parcels 1 to n_parcels, 0 for none")
    flat = values.reshape(len(values), -1)
    good = (labels > 0) & ~np.isnan(flat).all(axis=1)
    member = sparse.csr_array(
        (np.ones(good.sum()), (labels[good] - 1, np.flatnonzero(good))),
        shape=(n_parcels, len(labels)),
    )
    count = member.sum(axis=1)
    if len(empty := np.flatnonzero(count == 0) + 1):
        raise InputError(
            f"Expected values in each of {n_parcels} parcels, found none in parcel {listed(empty)}",
            "Take a mask and labels of the same mesh: every parcel needs a vertex in the mask",
        )
    means = (member @ np.where(good[:, None], flat, 0)) / count[:, None]
    return means.reshape(n_parcels, *values.shape[1:])


def edges(faces) -> np.ndarray:
    """The edges of each triangle, smaller vertex first: array (3 x triangle, 2)."""
    return np.sort(np.concatenate([faces[:, [0, 1]], faces[:, [1, 2]], faces[:, [2, 0]]]), axis=1)


def adjacency(faces, n_vertices: int) -> sparse.csr_array:
    """Which vertices share an edge: array (vertex, vertex) of 0 and 1."""
    a, b = np.unique(edges(np.asarray(faces)), axis=0).T
    ones = np.ones(len(a))
    half = sparse.coo_array((ones, (a, b)), shape=(n_vertices, n_vertices))
    return (half + half.T).tocsr()


if __name__ == "__main__":
    main()
