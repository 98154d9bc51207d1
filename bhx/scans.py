"""One subject's files to arrays: T1 to the grid, BOLD to ROIs with its TR; every check of an input.

Nothing here knows about cohorts, and no model is run.
"""

from __future__ import annotations

import numpy as np

from bhx.schema import CROP, MNI_ORIGIN, MNI_SHAPE, MNI_STEP, InputError

MNI_AFFINE = np.diag([*MNI_STEP, 1.0])
MNI_AFFINE[:3, 3] = MNI_ORIGIN


def t1_to_grid(image, mask=None) -> np.ndarray:
    """A T1 in MNI152 space as `(x, y, z)` on `schema.t1_grid(1)`: masked, cropped, unscaled.

    The image is resampled (trilinear) to FSL's 182 x 218 x 182 grid of 1 mm, set to 0 outside the
    mask, and cropped by 11, 13 and 11 voxels. It is not z-scored: embedding scales, and records it.

    Parameters
    ----------
    image : nibabel image in MNI152 space, skull-stripped or with `mask`
    mask : nibabel image, > 0.5 inside the brain; None keeps every voxel above 0
    """
    from nilearn.image import resample_img

    def on_grid(img, how):
        out = resample_img(img, MNI_AFFINE, MNI_SHAPE, interpolation=how)
        return np.asarray(out.dataobj, dtype="float32")

    if image.ndim != 3:
        raise InputError(f"Expected a T1 with 3 dims, found {image.ndim}", "Give one volume")
    t1 = on_grid(image, "linear")
    inside = t1 > 0 if mask is None else on_grid(mask, "nearest") > 0.5
    crop = tuple(slice(c, n - c) for c, n in zip(CROP, MNI_SHAPE, strict=True))
    return np.where(inside, t1, 0).astype("float32")[crop]


def read_template_t1() -> np.ndarray:
    """nilearn's MNI152 2009a T1 template, skull-stripped, on `schema.t1_grid(1)`."""
    from nilearn.datasets import load_mni152_template

    return t1_to_grid(load_mni152_template(resolution=1))
