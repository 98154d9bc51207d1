"""Checks of a scan's quality, on arrays that are read already.

What cannot be used raises InputError; what can be used with care is a warning, one clause of text.
"""

from __future__ import annotations

import numpy as np
import xarray as xr
from scipy import ndimage, stats

from bhx.data.atlas import centroids
from bhx.errors import InputError, listed
from bhx.modalities.t1 import block_mean

PATCH_SECONDS = 35.28  # a scan shorter than one patch has no token (48 x 0.735 s)
SHORT_SECONDS = 180.0  # connectivity of shorter scans is poorly repeatable
MIN_COVERAGE = 0.8  # share of parcels with signal below which a scan is refused
PARCEL_COVERAGE = 0.5  # share of a parcel's voxels or vertices that must have signal
HIGH_MOTION = 0.5  # mm, mean framewise displacement
# A scan is refused when its `homotopy` in another order of the parcels is at least this high, and
# higher by this margin; one real scan in the wrong order: 0.91 against 0.71 as named.
ORDER_HOMOTOPY, ORDER_MARGIN = 0.75, 0.1
# Real scans have a homotopy of 0.79 to 0.98 (64 of CC200, 28 of Schaefer-400), other orders of the
# same parcels at most 0.57, shifted by one or by 19 parcels of Schaefer-400 up to 0.74.
LOW_HOMOTOPY, MIN_HOMOTOPY = 0.75, 0.6
# Of regions on one side only, how correlation falls with distance: real -0.12 to -0.50, else -0.06.
LOW_DISTANCE_R, MAX_DISTANCE_R = -0.1, -0.05
# How a T1 must fit the MNI152 template: correlation in blocks of 8 mm, overlap of the outlines
# (Dice), distance of the centroids [mm], and correlation inside, of values and edges at 2 mm. Two
# heads after an affine registration: 0.95, 0.93, 0.4 mm, 0.30; before it, with a mask: at most
# 0.84, 0.84; with a mask that is not theirs: 0.90, 0.99, 0.7 mm, 0.12; shifted by 8 mm: 0.12.
MIN_TEMPLATE_R, LOW_TEMPLATE_R = 0.75, 0.85
MIN_OVERLAP, MAX_APART, MIN_INSIDE = 0.85, 8.0, 0.17
# The outline may differ, as that of a long head does, where inside and place agree as well as this.
SURE_INSIDE, SURE_PLACE = 0.35, 3.0
MIN_DISTINCT, MAX_ALIKE = 30, 0.6  # values of a T1; share of neighbors with the same whole number
BRAIN_ML = 2400.0  # at most, in MNI152 space; the template has 1881 ml


def check_bold_quality(
    bold: xr.DataArray, mean_fd: float = np.nan
) -> tuple[xr.DataArray, dict, list[str]]:
    """Refuse, or warn of, what is wrong with parcel series; parcels without signal become zeros.

    Returns
    -------
    float32 series, facts (tr, n_volumes, coverage, bold_scale, homotopy), warnings
    """
    tr, n, name = bold.attrs["tr"], bold.sizes["time"], bold.attrs.get("file", "a scan")
    if n * tr < PATCH_SECONDS:
        found = f"{n * tr:.1f} s ({n} volumes at TR {tr:g} s)"
        fact = f"Expected at least {PATCH_SECONDS} s of BOLD in {name}, found {found}"
        raise InputError(fact, "Leave this scan out: it is shorter than one patch, one token")
    values = bold.values
    lost = ~np.isfinite(values).all(1)
    flat = ~lost & (np.ptp(np.where(lost[:, None], 0, values), axis=1) <= 1e-9)
    covered = bold.covered.values if "covered" in bold.coords else np.ones(len(lost))
    sparse = ~lost & ~flat & (covered < PARCEL_COVERAGE)
    without = lost | flat | sparse
    coverage = 1 - without.mean()
    if coverage < MIN_COVERAGE:
        fact = f"Expected signal in at least {MIN_COVERAGE:.0%} of the parcels of {name}, found it "
        fact += f"in {coverage:.0%}; NaN: {lost.sum()}, constant: {flat.sum()}, hardly in the "
        fact += f"field of view: {sparse.sum()}"
        raise InputError(fact, "Correct its space or mask, or leave this scan out")
    out = bold.copy(data=np.where(without[:, None], 0, values))
    if better := better_order(out):
        fact = f"Expected parcels in the order their names say in {name}, found left and right "
        fact += f"partners that correlate far better in {better}"
        raise InputError(fact, "Correct the names, or give the order of a table without names")
    partners, text = _check_places(out.isel(roi=np.flatnonzero(~without)), name)
    out = out.astype("float32")
    facts = {
        "tr": tr,
        "n_volumes": n,
        "coverage": float(coverage),
        "bold_scale": scale_of(values[~without]),
        "homotopy": partners,
    }
    displaced = f"mean framewise displacement {mean_fd:.2f} mm, expected below {HIGH_MOTION}"
    warnings = {
        f"no signal in {listed(bold.roi.values[without])} (stored as zeros)": without.any(),
        f"only {n * tr:.0f} s of BOLD, expected {SHORT_SECONDS:.0f} s or more": n * tr
        < SHORT_SECONDS,
        displaced: mean_fd > HIGH_MOTION,
    }
    return out, facts, [*text, *(text for text, found in warnings.items() if found)]


def _check_places(bold, name):
    """Whether parcels behave as their places say: their homotopy, and a warning or a refusal."""
    partners, distance = homotopy(bold), 0.0
    low, least = partners < LOW_HOMOTOPY, partners < MIN_HOMOTOPY
    found = f"left and right partners whose correlation ranks {partners:.2f} among others"
    wanted = f"expected above {LOW_HOMOTOPY}"
    if np.isnan(partners):
        distance = distance_effect(bold)
        low, least = distance > LOW_DISTANCE_R, distance > MAX_DISTANCE_R
        found = f"a correlation that hardly falls with distance (Spearman {distance:.2f})"
        wanted = f"expected below {LOW_DISTANCE_R}"
    if least:
        fact = (
            f"Expected parcels of {name} that behave as their places say, found {found}, {wanted}"
        )
        help = "The order may be another (7 or 17 networks), the table of another atlas or sideways"
        raise InputError(fact, f"{help}: give order=, atlas= or parcels_in=")
    return partners, [f"{found}, {wanted}: is this the order of these parcels?"] if low else []


def scale_of(series: np.ndarray) -> str:
    """What BOLD is measured in: "zscored", "percent" (around 0), or "raw" (far from 0)."""
    mean, sd = np.abs(series.mean(1)), series.std(1)
    if np.median(mean / sd) > 3:
        return "raw"
    return "zscored" if np.allclose(sd, 1, atol=0.05) and np.median(mean) < 0.05 else "percent"


def homotopy(bold: xr.DataArray) -> float:
    """How far parcels go with their mirror partner: mean rank, 0 to 1, among the other hemisphere.

    Each left parcel's correlation with the right parcel nearest to its mirrored centroid is ranked
    among its correlations with all right parcels: near 1 in a brain, 0.5 when the order of the
    parcels is wrong. A left-right flip of the whole brain cannot be seen this way, since it maps
    partners to partners. NaN without centroids.
    """
    if "hemi" not in bold.coords or not {"L", "R"} <= set(bold.hemi.values):
        return np.nan
    place = centroids(bold)
    if not np.isfinite(place).all():
        return np.nan
    left, right = (np.flatnonzero(bold.hemi.values == h) for h in "LR")
    mirrored = place[left] * [-1, 1, 1]
    partner = np.linalg.norm(mirrored[:, None] - place[right], axis=2).argmin(1)
    z = bold.values - bold.values.mean(1, keepdims=True)
    z = z / np.maximum(np.linalg.norm(z, axis=1, keepdims=True), 1e-12)
    r = z[left] @ z[right].T
    lower = r < r[np.arange(len(left)), partner][:, None]
    return float(lower.sum(1).mean() / max(len(right) - 1, 1))


def distance_effect(bold: xr.DataArray) -> float:
    """Spearman correlation of parcels' distance with their series' correlation, within each
    hemisphere; NaN without centroids or of fewer than 20 parcels."""
    if "mni_x" not in bold.coords or bold.sizes["roi"] < 20:
        return np.nan
    place = centroids(bold)
    pairs = np.triu_indices(len(place), 1)
    distance = np.linalg.norm(place[pairs[0]] - place[pairs[1]], axis=1)
    side = bold.hemi.values if "hemi" in bold.coords else np.sign(place[:, 0])
    near = np.isfinite(distance) & (side[pairs[0]] == side[pairs[1]])
    if near.sum() < 100:
        return np.nan
    return float(stats.spearmanr(distance[near], np.corrcoef(bold.values)[pairs][near])[0])


def better_order(bold: xr.DataArray) -> str:
    """A known order in which the parcels' homotopy is clearly higher than as named, or ""."""
    n = bold.sizes["roi"]
    orders = {"the other hemisphere": np.r_[n // 2 : n, 0 : n // 2]}
    if "label17" in bold.coords:
        rank = bold.label17.values - 1
        orders |= {"the 17-network order": rank, "the 7-network order": np.argsort(rank)}
    found = {name: homotopy(bold.copy(data=bold.values[rows])) for name, rows in orders.items()}
    best = max(found, key=found.__getitem__)
    clear = found[best] > max(ORDER_HOMOTOPY, homotopy(bold) + ORDER_MARGIN)
    return best if clear else ""


def _fit(t1, template):
    """Overlap of the outlines, distance of the centroids [mm], and likeness inside the brain."""
    outlines = t1 != 0, template > 0
    both = outlines[0] & outlines[1]
    overlap = 2 * both.sum() / sum(o.sum() for o in outlines)
    apart = np.linalg.norm(np.subtract(*(ndimage.center_of_mass(o) for o in outlines)))
    core = ndimage.binary_erosion(block_mean(both.astype("f4"), 2) > 0.99, iterations=2)
    if core.sum() < 1000:
        return overlap, apart, 0.0
    fine = [ndimage.gaussian_filter(block_mean(v, 2), 1) for v in (t1, template)]
    edges = [np.linalg.norm(np.gradient(v), axis=0) for v in fine]
    likeness = [np.corrcoef(*(v[core] for v in pair))[0, 1] for pair in (fine, edges)]
    return overlap, apart, float(np.mean(likeness))


def check_contrast(values: np.ndarray, name: str = "a T1") -> None:
    """Refuse an image (x, y, z) of few values, such as a segmentation or a map of labels."""
    inside = values[values != 0]
    pairs = (values[1:] != 0) & (values[:-1] != 0)
    alike = (values[1:] == values[:-1])[pairs].mean() if pairs.any() else 0
    whole = (inside == np.round(inside)).all()
    distinct = len(np.unique(inside))
    if distinct > 1 and (distinct < MIN_DISTINCT or (whole and alike > MAX_ALIKE)):
        fact = f"Expected a T1 in {name}, found {distinct} values, {alike:.0%} of voxels as their "
        fact += "neighbor: a segmentation or a map of labels"
        raise InputError(fact, "Give the preprocessed T1w")


def check_t1_quality(t1: np.ndarray, template: np.ndarray, name: str = "a T1") -> list[str]:
    """Refuse a T1 on the 1 mm grid that is no brain in MNI152 space; else its warnings.

    The template is symmetric: a T1 whose header hides a left-right flip is not found here.
    """
    if np.ptp(t1) == 0:
        fact = f"Expected a brain in {name}, found {t1.flat[0]:g} everywhere"
        raise InputError(fact, "Give the brain mask of this image, or another image")
    inside = t1 != 0
    brain = inside.sum() / 1000
    if brain > BRAIN_ML:
        fact = f"Expected at most {BRAIN_ML:.0f} ml of brain in {name}, found {brain:.0f} ml"
        help = "Skull-strip it or give its brain mask; if it is not registered to MNI, run fMRIPrep"
        raise InputError(fact, f"{help} or sMRIPrep")

    coarse, known = block_mean(t1, 8), block_mean(template, 8)

    def likeness(volume):
        return float(np.corrcoef(volume.ravel(), known.ravel())[0, 1])

    r = likeness(coarse)
    turned = {"back to front": np.flip(coarse, 1), "upside down": np.flip(coarse, 2)}
    better = [how for how, volume in turned.items() if likeness(volume) > r]
    overlap, apart, within = _fit(t1, template)
    outline = overlap >= MIN_OVERLAP or (within >= SURE_INSIDE and apart <= SURE_PLACE)
    poor = r < MIN_TEMPLATE_R or not outline or apart > MAX_APART or within < MIN_INSIDE
    if poor or better:
        fact = f"Expected {name} in MNI152 space, found a correlation of {r:.2f} with the template "
        fact += f"(at least {MIN_TEMPLATE_R}), an overlap of {overlap:.2f} ({MIN_OVERLAP}), "
        fact += f"centroids {apart:.0f} mm apart (at most {MAX_APART:.0f}) and {within:.2f} inside "
        fact += f"({MIN_INSIDE}), {brain:.0f} ml of brain"
        fact += "".join(f"; {how} it fits better" for how in better)
        help = "Not registered to MNI, or not with this mask: run fMRIPrep or sMRIPrep with "
        raise InputError(fact, help + "--output-spaces MNI152NLin6Asym, and give T1 and mask of it")
    warnings = {
        f"the T1 correlates only {r:.2f} with the MNI152 template": r < LOW_TEMPLATE_R,
        f"negative T1 intensities, down to {t1.min():g}": t1.min() < 0,
    }
    return [text for text, found in warnings.items() if found]
