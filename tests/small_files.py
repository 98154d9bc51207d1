"""Small derivatives for tests: parcel series and brains, written in every form bhx reads."""

from __future__ import annotations

import json

import nibabel as nib
import numpy as np
import pandas as pd

from bhx.data.anatomy import read_template_t1
from bhx.data.atlas import load_atlas
from bhx.modalities.t1 import block_mean, t1_grid

ATLAS = "schaefer100"
TR = 2.0


def parcel_series(n_volumes=60, seed=0, atlas=ATLAS):
    """Series (roi, time) around 1000 in which mirror partners correlate, in atlas order."""
    parcels, rng = load_atlas(atlas), np.random.default_rng(seed)
    places = np.stack([np.abs(parcels.mni_x), parcels.mni_y, parcels.mni_z], 1)
    sources = rng.uniform([0, -100, -50], [70, 70, 80], (40, 3))
    weights = np.exp(-((np.linalg.norm(places[:, None] - sources, axis=2) / 25) ** 2))
    signal = weights @ rng.standard_normal((40, n_volumes))
    return 1000 + 10 * signal + rng.standard_normal((len(places), n_volumes))


def sidecar(path, tr=TR, **more):
    stem = path.name.removesuffix(".gz").rpartition(".")[0].removesuffix(".nii")
    path.with_name(f"{stem}.json").write_text(json.dumps({"RepetitionTime": tr, **more}))
    return path


def affine_of(step, orientation):
    """An MNI152 grid that holds the brain, in RAS or LAS."""
    shape = tuple(int(np.ceil(n / step)) for n in (182, 218, 182))
    affine = np.diag([step, step, step, 1.0])
    affine[:3, 3] = [-90, -126, -72]
    if orientation == "LAS":
        affine = affine @ np.array([[-1, 0, 0, shape[0] - 1], *np.eye(4)[1:]])
    return affine, shape


def label_image(path, step=4, orientation="RAS", atlas=ATLAS, numbers=None):
    """Labels 1 to n around the published centroids."""
    from scipy.spatial import cKDTree

    parcels = load_atlas(atlas)
    affine, shape = affine_of(step, orientation)
    where = np.indices(shape).reshape(3, -1).T @ affine[:3, :3].T + affine[:3, 3]
    centres = np.stack([parcels[f"mni_{axis}"].values for axis in "xyz"], 1)
    distance, nearest = cKDTree(centres).query(where)
    numbers = parcels.label.values if numbers is None else numbers
    labels = np.where(distance < 2.2 * step, numbers[nearest], 0).reshape(shape)
    nib.save(nib.Nifti1Image(labels.astype("int16"), affine), path)
    return path


def volume(path, series, labels, tr=TR, units="sec"):
    """A 4D image in which every voxel of a parcel has its series."""
    image = nib.load(labels)
    numbers = np.asarray(image.dataobj)
    paint = np.zeros((numbers.max() + 1, series.shape[1]), "float32")
    paint[1 : len(series) + 1] = series
    bold = nib.Nifti1Image(paint[numbers], image.affine)
    bold.header.set_zooms((*bold.header.get_zooms()[:3], tr))
    bold.header.set_xyzt_units("mm", units)
    nib.save(bold, path)
    return path


def gifti(folder, series, space="fsaverage5", name="sub-01_task-rest", tr=TR):
    """Both hemispheres; the path of the left one is returned."""
    atlas = load_atlas(ATLAS)
    numbers = atlas.labels_fsaverage5 if space == "fsaverage5" else atlas.labels_fslr32k
    paint = np.vstack([np.zeros(series.shape[1]), series]).astype("float32")
    for hemi, vertices in zip("LR", np.split(numbers.values, 2), strict=True):
        arrays = [
            nib.gifti.GiftiDataArray(v, meta={"TimeStep": str(1000 * tr)})
            for v in paint[vertices].T
        ]
        nib.save(
            nib.GiftiImage(darrays=arrays),
            folder / f"{name}_hemi-{hemi}_space-{space}_bold.func.gii",
        )
    return folder / f"{name}_hemi-L_space-{space}_bold.func.gii"


def mgz(folder, series, tr=TR):
    paint = np.vstack([np.zeros(series.shape[1]), series]).astype("float32")
    halves = np.split(load_atlas(ATLAS).labels_fsaverage5.values, 2)
    for hemi, vertices in zip(("lh", "rh"), halves, strict=True):
        image = nib.MGHImage(paint[vertices][:, None, None], np.eye(4))
        image.header.set_zooms((1, 1, 1, 1000 * tr))
        nib.save(image, folder / f"{hemi}.rest.mgz")
    return folder / "lh.rest.mgz"


def dtseries(path, series, tr=TR, n_vertices=32492):
    labels = load_atlas(ATLAS).labels_fslr32k.values
    brain = None
    for i, side in enumerate(("LEFT", "RIGHT")):
        vertices = np.flatnonzero(labels[i * 32492 : (i + 1) * 32492])
        part = nib.cifti2.BrainModelAxis.from_surface(vertices, n_vertices, f"CORTEX_{side}")
        brain = part if brain is None else brain + part
    time = nib.cifti2.SeriesAxis(0, tr, series.shape[1])
    data = series[labels[labels > 0] - 1].T.astype("float32")
    nib.save(nib.Cifti2Image(data, (time, brain)), path)
    return path


def ptseries(path, series, names, tr=TR):
    voxels = np.empty(len(names), object)
    voxels[:] = [np.zeros((0, 3), int)] * len(names)
    parcels = nib.cifti2.ParcelsAxis(names, voxels, [{}] * len(names))
    time = nib.cifti2.SeriesAxis(0, tr, series.shape[1])
    nib.save(nib.Cifti2Image(series.T.astype("float32"), (time, parcels)), path)
    return path


def table(path, series, names=None, separator="\t"):
    """Time in rows, parcels in columns."""
    header = list(names) if names is not None else False
    pd.DataFrame(series.T).to_csv(path, sep=separator, header=header, index=False)
    return sidecar(path)


def biobank(path, series, names):
    """Parcels in rows that begin with their name, as UK Biobank gives them."""
    rows = pd.DataFrame(series, columns=[f"timepoint_{i}" for i in range(series.shape[1])])
    rows.insert(0, "label_name", list(names))
    rows.to_csv(path, index=False)
    return sidecar(path)


def t1_image(path, step=1, orientation="LAS", turn=lambda t1: t1, scale=600, shift=0):
    """The MNI152 template as somebody's T1; `turn` changes the voxels, `shift` [mm] the place."""
    grid = t1_grid(1)
    t1 = turn(scale * np.asarray(read_template_t1()))
    if step > 1:
        t1 = block_mean(t1, step)
    affine = np.diag([-step, step, step, 1.0])
    first = np.array([grid[axis][0] for axis in "xyz"])
    affine[:3, 3] = first + np.array([-1, 1, 1]) * (step - 1) / 2
    affine[1, 3] += shift
    if orientation == "RAS":
        t1, affine = t1[::-1], affine @ np.array([[-1, 0, 0, t1.shape[0] - 1], *np.eye(4)[1:]])
    image = nib.Nifti1Image(t1.astype("float32"), affine)
    image.header.set_xyzt_units("mm")
    nib.save(image, path)
    return path
