"""Small cohorts and features, each with what some tests need to know of them."""

import numpy as np
from small_files import ATLAS, parcel_series

from bhx.data.anatomy import read_template_t1
from bhx.data.atlas import load_atlas, parcel_labels
from bhx.modalities.t1 import block_mean, t1_grid
from bhx.schema import build_cohort


def cohort_of(bold, t1, roi, atlas="test", **labels):
    """Arrays (subject, ...) and labels as a cohort; who has what is read off the arrays."""
    n = len(bold)
    here = np.isfinite(bold).any(1)
    subject = {
        "subject": [f"sub-{i:03d}" for i in range(n)],
        "site": np.array(["north", "south-west"])[np.arange(n) % 2],
        "tr": np.full(n, 2.0),
        "n_volumes": here.sum(1),
        "has_bold": here.any(1),
        "has_t1": np.zeros(n, bool) if t1 is None else np.isfinite(t1).any((1, 2, 3)),
        **labels,
    }
    subject.setdefault("participant", subject["subject"])
    attrs = {"atlas": atlas, "source": "test"}
    return build_cohort({"bold": bold, "t1": t1}, subject, roi, attrs)


def make_cohort(n=90, rois=8, volumes=60, seed=0, bold=None, t1=None):
    """Parcel 1 follows parcel 0 the more the older; two rows a participant; three sites."""
    rng = np.random.default_rng(seed)
    rois = rois if bold is None else bold.shape[1]
    age = np.repeat(rng.uniform(20, 80, (n + 1) // 2), 2)[:n]
    if bold is None:
        bold = rng.standard_normal((n, rois, volumes)).astype(np.float32)
        bold[:, 1] += bold[:, 0] * (age[:, None] - 20) / 40
    return cohort_of(
        bold,
        t1,
        {"roi": [f"roi{i}" for i in range(rois)]},
        subject=[f"sub-{i // 2:03}/ses-{i % 2}" for i in range(n)],
        participant=[f"sub-{i // 2:03}" for i in range(n)],
        site=np.array(["A", "B", "C"])[np.arange(n) // 2 % 3],
        age=age,
        group=np.where(age > 50, "older", "younger"),
    )


def noise_cohort(n=6, rois=5, times=40, voxel_mm=32, seed=0):
    """Noise: scans of different lengths, the second without BOLD, the third without T1."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(20, times + 1, n)
    lengths[1] = 0
    bold = rng.standard_normal((n, rois, times)).astype("float32")
    bold[np.broadcast_to(np.arange(times) >= lengths[:, None, None], bold.shape)] = np.nan
    t1 = rng.uniform(0, 900, (n, *(len(v) for v in t1_grid(voxel_mm).values()))).astype("float32")
    t1[2] = np.nan
    roi = {"roi": [f"parcel_{i}" for i in range(rois)], "network": ["Vis"] * rois}
    tr = np.where(lengths > 0, 0.72, np.nan)
    return cohort_of(bold, t1, roi, "none", tr=tr, age=rng.uniform(20, 80, n))


def brains_of(n=6, t1=(), seed=0):
    """n participants with mirror-symmetric BOLD; those numbered in `t1` have the template's T1."""
    lengths = 20 + 5 * np.arange(n)
    bold = np.full((n, 100, lengths.max()), np.nan, "float32")
    for i, length in enumerate(lengths):
        bold[i, :, :length] = parcel_series(length, seed + i) - 1000
    brains = None
    if t1:
        brains = np.full((n, 40, 48, 40), np.nan, "float32")
        brains[list(t1)] = 500 * block_mean(read_template_t1(), 4)
    roi = parcel_labels(load_atlas(ATLAS))
    ids = [f"sub-{seed + i:02d}" for i in range(n)]
    sites = [f"site {i % 2}" for i in range(n)]
    return cohort_of(bold, brains, roi, ATLAS, subject=ids, site=sites, age=20.0 + np.arange(n))


def noise(features, seed=1, width=12):
    """Features of the same subjects that mean nothing."""
    values = np.random.default_rng(seed).standard_normal((features.sizes["subject"], width))
    out = features.drop_vars(["features", "roi_a", "roi_b"], errors="ignore")
    return out.assign(features=(("subject", "feature"), values)).assign_attrs(name="noise")
