"""Coupling: how the parcels of a scan go together, one token a parcel, at any TR and length."""

from __future__ import annotations

import numpy as np

from bhx.errors import InputError
from bhx.modalities.bold import BOLD, Bold, patchify

POWER = 0.35  # of the eigenvalues of the correlation matrix
SMALLEST = 1e-4  # eigenvalue


class Coupling(Bold):
    """Rows of a scan's flattened correlation matrix, read from BOLD; tokens of parcels.

    The correlations are of samples that are exact in time, whatever the TR. Their eigenvalues are
    raised to the power 0.35, so that small directions of the scan count, too (arXiv 2609.37642).
    """

    name = "coupling"
    variable = BOLD.variable
    files = ()
    tokens = "coupling"
    token_dims = ("roi",)
    map_name, map_dims = "hub_to_coupling", ("roi",)
    encoder = False
    partial = True
    least = 2  # patches that a correlation needs
    components, weight = 32, 1.5

    def cut(self, values, facts, config):
        """One window (roi, roi). Patches and parcels that miss a sample are left out of it."""
        patches = patchify(values, float(facts["tr"]), config.dynamics.exact)
        whole = np.isfinite(patches).all(-1)
        there = whole.any(1)
        used = patches[there][:, whole[there].all(0)]
        self._check_patches(used.shape[1] * bool(len(used)))
        out = np.full((len(values), len(values)), np.nan, np.float32)
        out[np.ix_(there, there)] = flattened(used.reshape(len(used), -1))
        return [out]

    def so_far(self, running, config, middle, width):
        """What `cut` gives for a scan that is still running."""
        correlation, patches = running.correlation(middle)
        self._check_patches(patches)
        there = np.ix_(width > 0, width > 0)
        out = np.full(correlation.shape, np.nan, np.float32)
        out[there] = flatten(correlation[there])
        return [out]

    def _check_patches(self, found):
        if found < self.least:
            fact = f"Expected at least {self.least} patches in which every parcel was measured"
            raise InputError(f"{fact}, found {found}", "Leave this scan, or its BOLD, out")

    def count(self, facts, config):
        """One window, however long the scan is."""
        return 1

    def places(self, config):
        """Parcels."""
        return (config.dynamics.parcels,)

    def join(self, windows, config):
        """The tokens of the one window."""
        return windows[0]

    def split(self, tokens, config):
        """Inverse of `join`."""
        return [tokens]

    def summary(self, window, config):
        """The upper triangle of the matrix."""
        return window[np.triu_indices(len(window), 1)]


COUPLING = Coupling()


def flattened(samples) -> np.ndarray:
    """Correlation matrix (roi, roi) of samples (roi, sample), eigenvalues to the power 0.35."""
    x = np.asarray(samples, np.float64)
    x = x - x.mean(1, keepdims=True)
    length = np.linalg.norm(x, axis=1, keepdims=True)
    x = x / np.where(length > 0, length, 1)
    return flatten(x @ x.T)


def flatten(correlation) -> np.ndarray:
    """A correlation matrix (roi, roi) with its eigenvalues to the power 0.35."""
    values, vectors = np.linalg.eigh(correlation)
    return (vectors * np.clip(values, SMALLEST, None) ** POWER) @ vectors.T
