"""BOLD: parcel time series at any TR to patches of 35.28 s, one token a parcel and patch."""

from __future__ import annotations

import warnings
from functools import lru_cache
from math import ceil

import numpy as np

from bhx.errors import InputError, listed
from bhx.modalities.base import Modality

GRID_SECONDS = 0.735  # step of the base kernel: the TR of UK Biobank
WINDOW = 8  # volumes that a sample on this grid is interpolated from
# Autocorrelation of resting BOLD at a distance of d seconds: a slow part and white noise, which
# fades over one grid step. Fitted to HCP scans at TR 0.72 s (1, .57, .49, .42, .35, .28, .22, .17).
SLOW_SHARE, SLOW_SECONDS, SLOW_POWER = 0.575, 4.38, 1.76


class Bold(Modality):
    """Series (roi, time), NaN behind each scan's end; tokens of parcel x patch."""

    name = "bold"
    dims = ("roi", "time")
    files: tuple[str, ...] = ("bold", "confounds")
    tokens = "dynamics"
    token_dims: tuple[str, ...] = ("roi", "patch")
    map_name, map_dims = "hub_to_roi", ("roi",)
    needs = ("tr", "n_volumes")
    encoder = True

    def check(self, cohort):
        """Parcel names that are there once each, and repetition times in seconds."""
        if "roi" not in cohort.indexes or not cohort.indexes["roi"].is_unique:
            raise InputError(
                "Expected unique parcel names on the dim 'roi', found none or repeated ones",
                "Assign them: ds.assign_coords(roi=bhx.load_atlas('schaefer400').roi)",
            )
        has = cohort[self.has].values.astype(bool)
        check_tr(cohort.tr.values[has], cohort.subject.values[has])

    def check_lengths(self, cohort, config):
        """Enough patches of every scan: one, or two for a coupling."""
        for i in np.flatnonzero(cohort[self.has].values):
            n, tr, subject = (cohort[k].values[i] for k in ("n_volumes", "tr", "subject"))
            where = f" in '{subject}'"
            _whole_patches(int(n), float(tr), config.dynamics, self.least, where)

    def check_training(self, labels):
        """A signal in every parcel, where the coverage is known."""
        if "coverage" not in labels:
            return
        low = labels[self.has].values.astype(bool) & (labels.coverage.values < 1)
        if low.any():
            raise InputError(
                f"Expected BOLD with a signal in every parcel, found a coverage below 1 in "
                f"{int(low.sum())} subjects ({listed(labels.subject.values[low])})",
                "Leave them out: subjects=cohort.subject[cohort.coverage == 1]",
            )

    def trim(self, values, facts):
        """Volumes before the scan's end."""
        return values[:, : int(facts["n_volumes"])]

    def scale(self, values, config=None, *, scaling="zscore", missing="refuse", names=()):
        """Series (roi, volume) z-scored in time, or (x - median) / iqr with those two arrays.

        Parcels that are flat or not finite are refused, or with missing="leave out" become NaN.
        """
        bold = np.asarray(values, np.float32)
        finite = np.isfinite(bold)
        bold = np.where(finite, bold, np.nan)
        with np.errstate(all="ignore"), warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # parcels that are NaN throughout
            varies = np.nanmax(bold, 1) > np.nanmin(bold, 1)
            if missing == "refuse":
                check_parcels(varies, finite.all(1), names)
            if isinstance(scaling, str):
                middle = np.nanmean(bold, 1, dtype=np.float64)
                width = np.nanstd(bold, 1, dtype=np.float64)
            else:
                middle, width = scaling
            out = (bold - middle[:, None]) / width[:, None]
        out[~varies] = np.nan
        return out.astype(np.float32)

    def cut(self, values, facts, config):
        """Equal windows of at most `max_patches` patches, (roi, patch, sample)."""
        return self._windows(patchify(values, float(facts["tr"]), config.dynamics), config)

    def so_far(self, running, config, middle, width):
        """What `cut` gives for a scan that is still running, scaled by `middle` and `width`."""
        return self._windows(running.patches_so_far(middle, width), config)

    def _windows(self, patches, config):
        windows = ceil(patches.shape[1] / config.dynamics.max_patches)
        return np.array_split(patches, windows, axis=1)

    def augment(self, values, facts, config, plan, random):
        """Thinned by a factor of the plan; a stretch of whole patches where it crops."""
        tr = float(facts["tr"])
        values, tr = decimated(values, tr, config.dynamics, plan, random, self.least)
        if plan.crop and not (plan.whole and random.random() < plan.whole):
            values = cropped(values, tr, config.dynamics, plan, random, self.least)
        return values, {**facts, "tr": tr, "n_volumes": values.shape[1]}

    def count(self, facts, config):
        """Patches of the scan."""
        return config.dynamics.patch_count(int(facts["n_volumes"]), float(facts["tr"]))

    def places(self, config):
        """(parcels, patches of a window)."""
        return config.dynamics.parcels, config.dynamics.max_patches

    def join(self, windows, config):
        """Patches of all windows behind one another."""
        return np.concatenate(windows, 1)

    def split(self, tokens, config):
        """Windows of patches, as `cut` makes them; patches behind the scan's end are dropped."""
        there = np.flatnonzero(np.isfinite(tokens).all(-1).any(0))
        patches = there[-1] + 1 if len(there) else 0
        windows = ceil(patches / config.dynamics.max_patches)
        return np.array_split(tokens[:, :patches], windows, axis=1) if windows else [tokens[:, :0]]

    def about(self, cohort):
        """The repetition times that were read [s]."""
        return {"trs": [float(t) for t in np.unique(cohort.tr.values[cohort[self.has].values])]}


BOLD = Bold()


def check_tr(tr, where=()) -> None:
    """Refuse repetition times [s] that are missing, not positive, or in milliseconds."""
    tr = np.atleast_1d(np.asarray(tr, float))
    bad = ~(np.isfinite(tr) & (tr > 0) & (tr <= 20))
    if bad.any():
        first = int(np.flatnonzero(bad)[0])
        of = f" of {where[first]}" if len(where) == len(tr) else ""
        unit = "; this looks like milliseconds" if tr[first] > 20 else ""
        fact = "Expected a repetition time in seconds, above 0 and at most 20, "
        fact += f"found {tr[first]:g}{of}{unit}"
        raise InputError(fact, "Set it: cohort.assign_coords(tr=('subject', seconds))")


def check_parcels(varies, finite, names=()) -> None:
    """Refuse parcels (roi) that do not vary, or are not finite at all times."""
    wrong = ~(varies & finite)
    if not wrong.any():
        return
    names = np.asarray(names if len(names) else [f"#{i}" for i in range(len(varies))])
    kind = "a constant series" if finite.all() else "NaN or infinite values"
    raise InputError(
        f"Expected parcels with a signal, found {kind} in {int(wrong.sum())} of "
        f"{len(varies)} ({listed(names[wrong])})",
        'Leave their tokens out with missing_parcels="leave out", or leave the subject out',
    )


# Patches ---


def patchify(bold, tr: float, config) -> np.ndarray:
    """Series (roi, volume) at `tr` [s] to patches (roi, patch, sample).

    Exact patches have `config.kernel` samples on the 0.735 s grid; tape patches have k volumes,
    the last one filled with zeros. `config` is a DynamicsConfig.
    """
    patches = _whole_patches(bold.shape[1], tr, config, 1)
    if config.patching == "tape":
        k = config.patch_volumes(tr)
        full = np.pad(bold, ((0, 0), (0, patches * k - bold.shape[1])))
        return full.reshape(len(bold), patches, k)
    index, weights = wiener(tr, bold.shape[1], patches * config.kernel)
    grid = np.einsum("rsw,sw->rs", bold[:, index], weights.astype(bold.dtype))
    return grid.reshape(len(bold), patches, config.kernel)


def _whole_patches(volumes, tr, config, least, where=""):
    """Patches of a scan, or a refusal of one that is too short."""
    patches = config.patch_count(volumes, tr)
    if patches < least:
        many = "one patch" if least == 1 else f"{least} patches"
        fact = f"Expected a scan of at least {many} ({least * config.patch_seconds:.2f} s), found "
        fact += f"{volumes} volumes at TR {tr:g} s = {volumes * tr:.1f} s{where}"
        raise InputError(fact, "Leave this scan out, or check its TR")
    return patches


def autocovariance(seconds):
    """Prior of BOLD's autocorrelation at these distances [s]."""
    d = np.abs(seconds)
    slow = SLOW_SHARE * np.exp(-((d / SLOW_SECONDS) ** SLOW_POWER))
    return slow + (1 - SLOW_SHARE) * np.clip(1 - d / GRID_SECONDS, 0, None)


def first_read(samples, tr: float):
    """The first volume that samples of the 0.735 s grid are interpolated from; below 0 at first."""
    return np.floor(samples * GRID_SECONDS / tr).astype(int) - WINDOW // 2 + 1


@lru_cache(maxsize=64)
def wiener(tr: float, volumes: int, samples: int, start: int = 0):
    """Best linear interpolation from volumes at `tr` [s] to the 0.735 s grid, from sample `start`.

    Returns the volumes each grid sample reads, (samples, window) indices, and their weights
    C_grid,volumes C_volumes,volumes^-1 under `autocovariance`.
    """
    window, samples = min(WINDOW, volumes), np.arange(start, start + samples)
    first = np.clip(first_read(samples, tr), 0, volumes - window)
    index = first[:, None] + np.arange(window)
    among = autocovariance(tr * np.subtract.outer(np.arange(window), np.arange(window)))
    around = autocovariance((samples * GRID_SECONDS)[:, None] - index * tr)
    return index, np.linalg.solve(among, around.T).T


# What training does to a scan ---


def decimated(bold, tr: float, config, plan, random, least: int = 1):
    """(roi, volume) at `tr` [s] thinned by one of the plan's factors, from a random start.

    A factor is possible when the TR stays within the plan's slowest and `least` patches remain.
    """
    volumes = bold.shape[1]
    possible = [
        f
        for f in plan.decimate
        if f == 1
        or (f * tr <= plan.slowest_tr + 1e-9 and config.patch_count(volumes // f, f * tr) >= least)
    ]
    factor = int(random.choice(possible)) if len(possible) > 1 else (possible or [1])[0]
    if factor == 1:
        return bold, tr
    if plan.antialias:
        from scipy import signal

        low = signal.firwin(8 * factor + 1, 1 / factor)
        bold = signal.filtfilt(low, [1.0], bold, axis=1, padlen=min(24 * factor, volumes - 1))
    start = int(random.integers(factor))
    return np.ascontiguousarray(bold[:, start::factor], np.float32), tr * factor


def cropped(bold, tr: float, config, plan, random, least: int = 1):
    """A random stretch of whole patches, at most as many as the positions cover."""
    most = min(config.patch_count(bold.shape[1], tr), config.max_patches)
    patches = int(random.integers(min(max(plan.shortest, least), most), most + 1))
    step = config.patch_onsets(2, tr)[1]
    volumes = min(ceil(patches * step / tr - 1e-6), bold.shape[1])
    start = int(random.integers(bold.shape[1] - volumes + 1))
    return bold[:, start : start + volumes]


def jepa_masks(parcels: int, patches: int, random: np.random.Generator):
    """Visible and hidden token indices of one scan (Brain-JEPA, arXiv 2409.19407, section 3.2).

    The observed block is 84-100 % of the parcels over a contiguous 84-100 % of the patches.
    Hidden are: Cross-ROI (45-60 % of the parcels, 20-60 % of the patches, inside the window),
    and Double-Cross and Cross-Time (15-30 % of the parcels, up to 40 % of the patches, outside
    it). Hidden tokens leave the observed block.
    """
    observed = np.zeros((parcels, patches), bool)
    hidden = np.zeros_like(observed)
    window = _span(patches, random.uniform(0.84, 1.0), random)
    order = random.permutation(parcels)
    seen = order[: _count(parcels, random.uniform(0.84, 1.0))]
    observed[np.ix_(seen, window)] = True
    rows = random.permutation(parcels)[: _count(parcels, random.uniform(0.45, 0.60))]
    inside = _span(len(window), random.uniform(0.20, 0.60), random)
    hidden[np.ix_(rows, window[inside])] = True
    outside = np.setdiff1d(np.arange(patches), window)
    unseen = order[len(seen) :]
    for pool in (seen, unseen):  # Cross-Time, Double-Cross
        if len(outside) and len(pool):
            rows = random.permutation(pool)[: _count(parcels, random.uniform(0.15, 0.30))]
            columns = _span(len(outside), random.uniform(0.0, 0.40), random)
            hidden[np.ix_(rows, outside[columns])] = True
    observed &= ~hidden
    return np.flatnonzero(observed), np.flatnonzero(hidden)


def _count(total, share):
    return max(1, round(total * share))


def _span(total, share, random):
    """A contiguous run of round(share x total) indices, at least one."""
    size = _count(total, share)
    start = random.integers(0, total - size + 1)
    return np.arange(start, start + size)
