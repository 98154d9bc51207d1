"""Build the shipped atlas arrays and the sample scan from the wheels of brainspace and nilearn.

Run by `make assets` (extra `assets`); offline, a minute or two on one core. `parcels.csv` is an
input, not an output: names, numbers and centroids as published by CBIG. What each array is and
where it comes from is told in `README.md` beside this file.
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

from bhx.data import atlas, geometry

HERE = Path(__file__).parent
PUBLISHED = HERE.parents[1] / "tests" / "data" / "schaefer400_fsaverage5_published.npz"
SMOOTHING = 400  # steps; 200 to 1600 give the same labels within half a per cent of vertices
SCALES = (100, 200, 400)
N_HARMONICS, N_GRADIENTS = 200, 30
SCAN = "sub-010188_ses-02_task-rest_acq-AP_run-01"
SCAN_TR = 1.4  # s
# FreeSurfer's fsaverage to MNI152 (surfer.nmr.mgh.harvard.edu/fswiki/CoordinateSystems)
MNI305_TO_MNI152 = np.array(
    [
        [0.9975, -0.0073, 0.0176, -0.0429],
        [0.0146, 1.0009, -0.0024, 1.5496],
        [-0.0130, -0.0093, 0.9971, 1.1840],
    ]
)


def main():
    coords, faces, sphere, mask = read_conte69()
    print("harmonics of", mask.sum(), "vertices")
    values, modes = geometry.harmonics(coords, faces, N_HARMONICS + 1, mask)
    twin = conte69_twins(coords, sphere)
    labels = {n: read_table(f"parcellations/schaefer_{n}_conte69.csv") for n in SCALES}
    shared = {"eigenvalue": values[1:], "agreement": agreement(labels[400][twin])}
    for n in SCALES:
        arrays = atlas_arrays(n, labels[n].astype(np.int16), twin, modes[:, 1:], sphere)
        save(f"schaefer{n}.npz", **arrays, **shared)
    save("sample.npz", **sample_arrays(labels[400][twin].astype(int)))


def atlas_arrays(scale, labels, twin, modes, sphere) -> dict:
    connectome = read_table(f"matrices/main_group/schaefer_{scale}_mean_connectivity_matrix.csv")
    connectome = connectome.astype(np.float16)  # as shipped, so the gradients can be repeated
    centre = geometry.parcel_means(sphere, labels, scale)
    return {
        "harmonics": geometry.parcel_means(modes, labels, scale).astype(np.float32),
        "gradients": geometry.gradients(connectome, N_GRADIENTS).astype(np.float32),
        "connectome": connectome[np.triu_indices(scale, 1)],
        "sphere": (centre / np.linalg.norm(centre, axis=1, keepdims=True)).astype(np.float32),
        "labels_fslr32k": labels,
        "labels_fsaverage5": labels[twin],
    }


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
        goal = unit[cKDTree(coords[here]).query(middle_surface(hemi))[1]]
        ball, faces = atlas.load_mesh("sphere", hemi)
        ball = ball / np.linalg.norm(ball, axis=1, keepdims=True)
        turned = Rotation.align_vectors(goal, ball)[0].apply(ball)
        rest = smoothed(goal - turned, faces)
        twins.append(start + cKDTree(unit).query(turned + rest)[1])
    return np.concatenate(twins)


def middle_surface(hemi) -> np.ndarray:
    """Halfway between white and pial surface of fsaverage5 [mm, MNI152]."""
    white, pial = (atlas.load_mesh(surface, hemi)[0] for surface in ("white", "pial"))
    return (white + pial) / 2 @ MNI305_TO_MNI152[:, :3].T + MNI305_TO_MNI152[:, 3]


def smoothed(values, faces) -> np.ndarray:
    """Averaged over each vertex and its neighbours, SMOOTHING times."""
    near = geometry.adjacency(faces, len(values)) + sparse.eye_array(len(values))
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
    runs = [nibabel.load(brainspace_file(f"preprocessing/{SCAN}.fsa5.{h}h.mgz")) for h in "lr"]
    halves = [np.asarray(run.dataobj).reshape(len(labels) // 2, -1) for run in runs]
    vertices = np.concatenate(halves)  # (vertex, time); vertices without data are all 0
    bold = geometry.parcel_means(vertices, np.where(vertices.any(axis=1), labels, 0), 400)
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


if __name__ == "__main__":
    main()
