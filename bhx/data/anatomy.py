"""A T1 file to the MNI152 grid."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import nibabel as nib
import numpy as np
import xarray as xr
from scipy.ndimage import binary_fill_holes

from bhx.data.files import MNI_AFFINE, check_affine, check_file, check_space, reader_of, reading
from bhx.data.quality import check_contrast, check_t1_quality
from bhx.errors import InputError
from bhx.modalities.t1 import ANATOMY, CROP, MNI_SHAPE, block_mean, t1_grid

RIM = 0.01  # of the highest intensities
WHOLE = 1e-4  # how far from a whole number of voxels a shift may be that is a copy


@reader_of(ANATOMY)
def read_anatomy(row: dict, options: dict) -> tuple[xr.DataArray, dict, list[str]]:
    """The T1 of one row of a table of scans; see `reader_of`."""
    image, mask = (row.get(column) for column in ANATOMY.files)
    t1, warnings = read_t1(image, mask, voxel_mm=options["voxel_mm"])
    return t1, {}, warnings


def read_t1(path, mask=None, *, voxel_mm: float = 1.0) -> tuple[xr.DataArray, list[str]]:
    """A T1 in MNI152 space as `(x, y, z)` on `bhx.t1_grid(voxel_mm)`, with its warnings.

    It is resampled to FSL's 182 x 218 x 182 grid of 1 mm, set to 0 outside the mask, cropped by 11,
    13 and 11 voxels and averaged in blocks. It is not z-scored: embedding scales, and records it.

    Parameters
    ----------
    path : image aligned to MNI152, as fMRIPrep and sMRIPrep write with --output-spaces MNI152...
    mask : image, > 0.5 inside the brain; not needed for a skull-stripped T1
    voxel_mm : 1, 2, 4, 8, 16 or 32 [mm]

    Raises
    ------
    InputError
        The file cannot be read, is not in MNI152 space, still has its skull, or is no brain.
    """
    grid = t1_grid(voxel_mm)
    images = []
    for file in filter(None, (path, mask)):
        file = check_file(file)
        with reading(file, "a T1"):
            image = nib.squeeze_image(nib.load(file))
            check_affine(image, file)
            values = np.asarray(image.dataobj, "float32")
        if values.ndim != 3:
            fact = f"Expected 3 dims in {file.name}, found {values.shape}"
            raise InputError(fact, "Give one volume, such as the preprocessed T1w")
        there = np.isfinite(values)  # SPM writes NaN outside the field of view
        if not there.all() and (binary_fill_holes(there) != there).any():
            fact = f"Expected numbers in {file.name}, found NaN or infinity"
            raise InputError(fact, "Set those voxels to 0 or run the pipeline that made it again")
        images.append(nib.Nifti1Image(np.where(there, values, 0), image.affine))
    check_space(path)
    check_contrast(np.asarray(images[0].dataobj), Path(path).name)
    t1 = t1_to_grid(*images)
    warnings = check_t1_quality(t1, read_template_t1(), Path(path).name)
    return xr.DataArray(block_mean(t1, int(voxel_mm)), grid, ANATOMY.dims, ANATOMY.name), warnings


def t1_to_grid(image, mask=None) -> np.ndarray:
    """A T1 image on `bhx.t1_grid(1)` (trilinear): masked, cropped, unscaled.

    `mask` is an image, > 0.5 inside the brain; None keeps what is above 0 by more than the rims
    that splines leave around a skull-stripped brain.
    """
    from nibabel import as_closest_canonical
    from nilearn.image import resample_img

    ras = MNI_AFFINE @ np.array([[-1, 0, 0, MNI_SHAPE[0] - 1], *np.eye(4)[1:]])

    def on_grid(img, how):  # both sides left to right
        img = as_closest_canonical(img)
        step = np.linalg.inv(img.affine) @ ras
        shift = np.round(step[:3, 3]).astype(int)
        if np.abs(step - nib.affines.from_matvec(np.eye(3), shift)).max() < WHOLE:
            return _moved(np.asarray(img.dataobj, "float32"), shift)[::-1]
        out = resample_img(img, ras, MNI_SHAPE, interpolation=how)
        return np.asarray(out.dataobj, dtype="float32")[::-1]

    t1 = on_grid(image, "linear")
    if mask is None:
        inside = t1 > RIM * np.percentile(t1[t1 > 0], 99) if (t1 > 0).any() else t1 > 0
    else:
        inside = on_grid(mask, "nearest") > 0.5
    crop = tuple(slice(c, n - c) for c, n in zip(CROP, MNI_SHAPE, strict=True))
    return np.where(inside, t1, 0).astype("float32")[crop]


def _moved(values, shift):
    """Values (x, y, z) of the voxels `shift` further on, on the MNI grid; 0 outside."""
    out = np.zeros(MNI_SHAPE, "float32")
    ends = zip(shift, values.shape, MNI_SHAPE, strict=True)
    here = [slice(max(0, -by), max(0, min(wanted, n - by))) for by, n, wanted in ends]
    there = tuple(slice(s.start + by, s.stop + by) for s, by in zip(here, shift, strict=True))
    out[tuple(here)] = values[there]
    return out


@cache
def read_template_t1() -> np.ndarray:
    """nilearn's MNI152 2009a T1 template, skull-stripped, on `bhx.t1_grid(1)`."""
    from nilearn.datasets import load_mni152_template

    template = t1_to_grid(load_mni152_template(resolution=1))
    template.setflags(write=False)
    return template
