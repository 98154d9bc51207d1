"""Build the shipped atlas arrays and the sample scan from the wheels of brainspace and nilearn.

Run by `make assets` (extra `assets`); offline, a minute or two on one core. `parcels.csv` is an
input, not an output: names, numbers and centroids as published by CBIG.
"""

from __future__ import annotations

import csv
from importlib.resources import files
from pathlib import Path

import nibabel
import numpy as np
from scipy.spatial import cKDTree

from bhx import atlas, geometry

HERE = Path(__file__).parent
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
    modes = geometry.harmonics(coords, faces, N_HARMONICS + 1, mask)[1][:, 1:]  # not the constant
    nearest = nearest_conte69(coords)
    for scale in SCALES:
        labels = read_table(f"parcellations/schaefer_{scale}_conte69.csv").astype(np.int16)
        arrays = atlas_arrays(scale, labels, labels[nearest], modes, sphere)
        save(f"schaefer{scale}.npz", **arrays)
    save("sample.npz", **sample_arrays(labels[nearest]))


def atlas_arrays(scale, labels, labels_fsaverage5, modes, sphere) -> dict:
    connectome = read_table(f"matrices/main_group/schaefer_{scale}_mean_connectivity_matrix.csv")
    centre = geometry.parcel_means(sphere, labels, scale)
    return {
        "harmonics": geometry.parcel_means(modes, labels, scale).astype(np.float32),
        "gradients": geometry.gradients(connectome, N_GRADIENTS).astype(np.float32),
        "connectome": connectome[np.triu_indices(scale, 1)].astype(np.float16),
        "sphere": (centre / np.linalg.norm(centre, axis=1, keepdims=True)).astype(np.float32),
        "labels_fslr32k": labels,
        "labels_fsaverage5": labels_fsaverage5,
    }


def nearest_conte69(coords) -> np.ndarray:
    """For each fsaverage5 vertex, the nearest conte69 vertex of its hemisphere in MNI152 mm."""
    half = len(coords) // 2
    out = []
    for start, hemi in ((0, "left"), (half, "right")):
        white, pial = (atlas.load_mesh(surface, hemi)[0] for surface in ("white", "pial"))
        middle = (white + pial) / 2 @ MNI305_TO_MNI152[:, :3].T + MNI305_TO_MNI152[:, 3]
        out.append(start + cKDTree(coords[start : start + half]).query(middle)[1])
    return np.concatenate(out)


def sample_arrays(labels) -> dict:
    runs = [nibabel.load(brainspace_file(f"preprocessing/{SCAN}.fsa5.{h}h.mgz")) for h in "lr"]
    vertices = np.concatenate([np.asarray(run.dataobj).reshape(len(labels) // 2, -1) for run in runs])
    bold = geometry.parcel_means(vertices, np.where(vertices.any(axis=1), labels, 0), SCALES[-1])
    scale = np.abs(bold).max(axis=1) / np.iinfo(np.int16).max
    return {
        "bold": np.round(bold / scale[:, None]).astype(np.int16),
        "scale": scale.astype(np.float32),
        "tr": np.float64(SCAN_TR),
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
