"""Small cohorts and features with a known effect, for the tests of scores."""

import numpy as np

from bhx.schema import build_cohort


def make_cohort(n=90, rois=8, volumes=60, seed=0, bold=None, t1=None):
    """Parcel 1 follows parcel 0 the more the older; two rows a participant; three sites."""
    rng = np.random.default_rng(seed)
    rois = rois if bold is None else bold.shape[1]
    age = np.repeat(rng.uniform(20, 80, (n + 1) // 2), 2)[:n]
    if bold is None:
        bold = rng.standard_normal((n, rois, volumes)).astype(np.float32)
        bold[:, 1] += bold[:, 0] * (age[:, None] - 20) / 40
    subject = {
        "subject": [f"sub-{i // 2:03}/ses-{i % 2}" for i in range(n)],
        "participant": [f"sub-{i // 2:03}" for i in range(n)],
        "site": np.array(["A", "B", "C"])[np.arange(n) // 2 % 3],
        "tr": np.full(n, 2.0),
        "n_volumes": np.isfinite(bold[:, 0]).sum(1),
        "has_bold": np.isfinite(bold).any((1, 2)),
        "has_t1": np.full(n, t1 is not None),
        "age": age,
        "group": np.where(age > 50, "older", "younger"),
    }
    roi = {"roi": [f"roi{i}" for i in range(rois)]}
    return build_cohort({"bold": bold, "t1": t1}, subject, roi, {"atlas": "test", "source": "test"})


def noise(features, seed=1, width=12):
    """Features of the same subjects that mean nothing."""
    values = np.random.default_rng(seed).standard_normal((features.sizes["subject"], width))
    out = features.drop_vars(["features", "roi_a", "roi_b"], errors="ignore")
    return out.assign(features=(("subject", "feature"), values)).assign_attrs(name="noise")
