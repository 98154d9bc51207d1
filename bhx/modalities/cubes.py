"""Cubes of the T1 as they are, through a linear embedding instead of an encoder of their own."""

from __future__ import annotations

import numpy as np

from bhx.modalities.t1 import ANATOMY, T1, block_mean

SUMMARY_MM = 4  # blocks of the summary that people are compared by


class Cubes(T1):
    """The voxels of each cube, read from the T1; tokens of cubes."""

    name = "cubes"
    variable = ANATOMY.variable
    files = ()
    tokens = "cubes"
    map_name = "hub_to_cubes"
    encoder = False
    components = 48

    def summary(self, window, config):
        """The voxels, averaged to 4 mm where they are smaller."""
        s = config.structure
        edge = max(1, int(SUMMARY_MM / s.voxel_mm))
        return block_mean(np.asarray(window).reshape(-1, *(s.cube,) * 3), edge).ravel()


CUBES = Cubes()
