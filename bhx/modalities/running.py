"""A scan as it comes: volume by volume to what `cut` would make of all of them.

Kept are the last volumes, sums over the patches that no later volume changes, and the patches
themselves only where a modality reads them: without it memory does not grow with the scan.
"""

from __future__ import annotations

import numpy as np

from bhx.modalities.bold import WINDOW, first_read, wiener


class Running:
    """Volumes so far at `tr` [s]; `config` is a DynamicsConfig with exact patches.

    Attributes
    ----------
    volumes : how many were added
    patches : those that no later volume changes
    """

    def __init__(self, tr: float, config, keep_patches: bool):
        self.tr, self.config = tr, config
        self.volumes = self.patches = 0
        parcels = config.parcels
        self.zero = np.full(parcels, np.nan)  # the first volume: sums of small numbers are exact
        self.total, self.squares, self.finite = np.zeros(parcels), np.zeros(parcels), 0
        self.recent, self.start = np.empty((parcels, 0)), 0  # volumes still read, from this one on
        self.sums = np.zeros((parcels + 2, parcels + 2))
        self.kept: list[np.ndarray] | None = [] if keep_patches else None

    def add(self, volume: np.ndarray) -> None:
        """Take the next volume (roi,): finite, or NaN where none was measured."""
        if np.isfinite(volume).all():
            self.zero = np.where(np.isfinite(self.zero), self.zero, volume)
            volume = volume - self.zero
            self.total, self.squares = self.total + volume, self.squares + volume**2
            self.finite += 1
        self.recent = np.column_stack([self.recent, volume])
        self.volumes += 1
        while self.patches < self._whole() and self._is_final(self.patches):
            patch = self._patch(self.patches)
            self.sums += _products(patch)
            if self.kept is not None:
                self.kept.append(patch)
            self.patches += 1
            read = max(first_read(self.patches * self.config.kernel, self.tr), self.start)
            self.recent, self.start = self.recent[:, read - self.start :], int(read)

    def level(self) -> tuple[np.ndarray, np.ndarray]:
        """Mean and standard deviation in time (roi); exactly 0 is that of a constant series."""
        mean = self.total / self.finite
        return self.zero + mean, np.sqrt((self.squares / self.finite - mean**2).clip(0))

    def patches_so_far(self, middle, width) -> np.ndarray:
        """Scaled patches (roi, patch, sample) of the scan so far."""
        patches = np.stack([*(self.kept or []), *self._late()], 1)  # (roi + 1, patch, sample)
        samples, ones = patches[:-1], patches[-1]
        return (samples - (middle - self.zero)[:, None, None] * ones) / width[:, None, None]

    def correlation(self, middle) -> tuple[np.ndarray, int]:
        """Correlations (roi, roi) of the samples so far, in patches that were measured throughout,
        and how many patches these are."""
        sums = self.sums + sum(map(_products, self._late()))
        n = sums[-1, -1]
        center = np.hstack([np.eye(len(middle)), np.zeros((len(middle), 2))])
        center[:, -2] = self.zero - middle
        mean = center @ sums[-1] / max(n, 1)
        covariance = center @ sums @ center.T - n * np.outer(mean, mean)
        length = np.sqrt(np.diag(covariance).clip(0))
        length = np.where(length > 0, length, 1)
        return covariance / np.outer(length, length), int(n) // self.config.kernel

    def _whole(self):
        """Patches that the volumes so far fill."""
        return self.config.patch_count(self.volumes, self.tr)

    def _late(self):
        """Patches that later volumes may still change a little."""
        return [self._patch(patch) for patch in range(self.patches, self._whole())]

    def _is_final(self, patch):
        last = (patch + 1) * self.config.kernel - 1
        return first_read(last, self.tr) + WINDOW <= self.volumes

    def _patch(self, patch):
        """Samples (roi + 1, sample) of a patch; the last row is what a series of ones gives."""
        kernel = self.config.kernel
        index, weights = wiener(self.tr, self.volumes, kernel, patch * kernel)
        samples = np.einsum("rsw,sw->rs", self.recent[:, index - self.start], weights)
        return np.vstack([samples, weights.sum(1)])


def _products(patch):
    """Sums of products of samples, of ones, and their number; 0 where a volume is missing."""
    rows = np.vstack([patch, np.ones(patch.shape[1])])
    return rows @ rows.T if np.isfinite(rows).all() else np.zeros((len(rows),) * 2)
