"""T1: an anatomy on the MNI152 grid to cubes, one token a cube."""

from __future__ import annotations

from math import prod

import numpy as np

from bhx.errors import InputError
from bhx.modalities.base import Modality

# FSL's MNI152 1 mm grid, which every T1 of a cohort lives on: shape in voxels, and the world
# coordinate of voxel (0, 0, 0); x runs from right to left.
MNI_SHAPE = (182, 218, 182)
MNI_ORIGIN = (90.0, -126.0, -72.0)  # mm
MNI_STEP = (-1.0, 1.0, 1.0)  # mm
CROP = (11, 13, 11)  # voxels cut off on either side of each axis
T1_SHAPE = tuple(n - 2 * c for n, c in zip(MNI_SHAPE, CROP, strict=True))  # 160, 192, 160 at 1 mm
CUBE_DIMS = ("cx", "cy", "cz")


class T1(Modality):
    """Volumes (x, y, z) in MNI152 space, 0 outside the brain; tokens of cubes."""

    name = "t1"
    dims = ("x", "y", "z")
    files: tuple[str, ...] = ("t1", "t1_mask")
    tokens = "structure"
    token_dims = CUBE_DIMS
    map_name = "hub_to_t1"
    encoder = True

    def fit(self, cohort, config):
        """Averaged to the model's voxel where that is a multiple; then its grid is checked."""
        voxel_mm = config.structure.voxel_mm
        fold = cohort.sizes["x"] / len(t1_grid(voxel_mm)["x"])
        if fold in (2, 4, 8, 16, 32):
            cohort = coarsen_t1(cohort, voxel_mm)
        check_grid(cohort[self.variable], voxel_mm)
        return cohort

    def scale(self, values, config, *, scaling=None, missing="refuse", names=()):
        """Z-scored over FSL's whole MNI152 volume (`scale_t1`)."""
        return scale_t1(values, config.structure.voxel_mm)

    def cut(self, values, facts, config):
        """One window of cubes, (cube, voxel)."""
        return [cubes(values, config.structure.cube)]

    def places(self, config):
        """Cubes along x, y and z."""
        return config.structure.grid

    def coords(self, config):
        """MNI mm of the cubes' centers."""
        grid, cube = t1_grid(config.structure.voxel_mm), config.structure.cube
        return {
            dim: (dim, mm.reshape(-1, cube).mean(1), {"units": "mm"})
            for dim, mm in zip(CUBE_DIMS, grid.values(), strict=True)
        }

    def about(self, cohort):
        """How intensities were scaled."""
        return {"t1_scaling": "zscore over the MNI152 volume"}


ANATOMY = T1()


def t1_grid(voxel_mm: float = 1.0) -> dict[str, np.ndarray]:
    """World coordinates [mm, MNI152] of the T1 grid's voxel centers along x, y and z.

    The grid is FSL's MNI152 grid after the crop of 11, 13 and 11 voxels; a coarser one averages
    whole blocks of it, so `voxel_mm` divides 160, 192 and 160.
    """
    if voxel_mm < 1 or any(n % voxel_mm for n in T1_SHAPE):
        fact = f"A T1 voxel of {voxel_mm} mm does not divide the {T1_SHAPE} mm grid"
        raise InputError(fact, "Take 1, 2, 4, 8, 16 or 32 mm")
    middle = (voxel_mm - 1) / 2
    grid = zip("xyz", T1_SHAPE, MNI_ORIGIN, MNI_STEP, CROP, strict=True)
    return {
        axis: origin + step * (crop + middle + voxel_mm * np.arange(int(n / voxel_mm)))
        for axis, n, origin, step, crop in grid
    }


def scale_t1(t1, voxel_mm: float) -> np.ndarray:
    """T1 (x, y, z), 0 outside the brain, z-scored over FSL's whole MNI152 volume.

    The mean and deviation count the background, the cropped margin included, as the release does.
    """
    t1 = np.where(np.isfinite(t1), t1, np.nan).astype(np.float32)
    count = prod(MNI_SHAPE) / voxel_mm**3 - np.isnan(t1).sum()
    mean = np.nansum(t1, dtype=np.float64) / count
    std = np.sqrt(max(np.nansum(np.square(t1, dtype=np.float64)) / count - mean**2, 0))
    if not std > 0:
        fact = "Expected a T1 with some contrast, found a constant one"
        raise InputError(fact, "Look at the image, and leave this subject's T1 out")
    return ((t1 - mean) / (std + 1e-9)).astype(np.float32)


def coarsen_t1(cohort, voxel_mm: float):
    """The cohort with its T1 averaged in blocks to voxels of `voxel_mm` [mm], lazily."""
    if ANATOMY.name not in cohort:
        return cohort
    fold = voxel_mm * cohort.sizes["x"] / T1_SHAPE[0]
    if fold != int(fold) or fold < 1 or any(cohort.sizes[axis] % fold for axis in "xyz"):
        raise InputError(
            f"Expected a T1 voxel that is a multiple of {T1_SHAPE[0] / cohort.sizes['x']:g} mm and "
            f"divides the {T1_SHAPE} mm grid, found {voxel_mm:g} mm",
            "Take 1, 2, 4, 8, 16 or 32 mm",
        )
    t1 = cohort[ANATOMY.name].coarsen(x=int(fold), y=int(fold), z=int(fold)).mean()
    return cohort.drop_dims(["x", "y", "z"]).assign({ANATOMY.name: t1.astype("float32")})


def check_grid(t1, voxel_mm: float) -> None:
    """Refuse a T1 (..., x, y, z) that is not on the grid of `voxel_mm`, saying how it differs."""
    grid = t1_grid(voxel_mm)
    size, shape = tuple(t1.sizes[a] for a in "xyz"), tuple(len(v) for v in grid.values())
    if size != shape:
        raise InputError(
            f"Expected a T1 of {shape} voxels of {voxel_mm:g} mm, found {size}",
            "bhx.prepare brings it there; or open the cohort with voxel_mm=",
        )
    for axis, values in grid.items():
        if axis not in t1.coords:
            fact = f"Expected MNI coordinates [mm] on '{axis}', found none"
            raise InputError(fact, "Assign bhx.t1_grid(voxel_mm)")
        given = t1[axis].values
        if np.allclose(given, values, atol=0.01):
            continue
        flipped = np.allclose(given[::-1], values, atol=0.01)
        raise InputError(
            f"Expected '{axis}' from {values[0]:g} to {values[-1]:g} mm, found {given[0]:g} to "
            f"{given[-1]:g}" + (": this axis is flipped" if flipped else ""),
            f"t1.sel({axis}=t1.{axis}[::-1]) turns it" if flipped else "Resample it to this grid",
        )


# Cubes ---


def cubes(t1, edge: int) -> np.ndarray:
    """(..., x, y, z) -> (..., cube, voxel), cubes and the voxels in them in C order."""
    *more, x, y, z = t1.shape
    parts = t1.reshape(*more, x // edge, edge, y // edge, edge, z // edge, edge)
    return np.moveaxis(parts, (-5, -3), (-3, -2)).reshape(*more, -1, edge**3)


def volume(voxels, grid: tuple[int, int, int], edge: int) -> np.ndarray:
    """Inverse of `cubes`: (..., cube, voxel) -> (..., x, y, z)."""
    *more, _, _ = voxels.shape
    parts = voxels.reshape(*more, *grid, edge, edge, edge)
    return np.moveaxis(parts, (-3, -2), (-5, -3)).reshape(*more, *(n * edge for n in grid))


def cube_mask(tokens: int, share: float, random) -> np.ndarray:
    """1 = removed, for round(share x tokens) cubes; float32 (cube,)."""
    mask = np.zeros(tokens, np.float32)
    mask[random.permutation(tokens)[: round(tokens * share)]] = 1
    return mask


def block_mean(values, size: int) -> np.ndarray:
    """Means (..., x, y, z) over blocks of `size` voxels along x, y and z, float32.

    Voxels that fill no whole block are left out.
    """
    x, y, z = (n // size for n in values.shape[-3:])
    whole = values[..., : x * size, : y * size, : z * size]
    blocks = whole.reshape(*values.shape[:-3], x, size, y, size, z, size)
    return blocks.mean((-5, -3, -1), dtype=np.float32)
