"""Small latents with attention maps, for the tests of pictures and the explorer."""

import numpy as np
import xarray as xr

from bhx import load_atlas


def make_latents(n=20, tokens=8, seed=0):
    """Latents of Schaefer-100 with fMRI-only and T1-only people among them."""
    atlas = load_atlas("schaefer100")
    rng = np.random.default_rng(seed)
    has_bold, has_t1 = np.arange(n) % 5 != 3, np.arange(n) % 5 != 2
    share = rng.random((n, tokens)) * has_bold[:, None]
    share[~has_t1] = 1
    to_roi = rng.dirichlet(np.ones(100), (n, tokens)) * share[..., None]
    to_t1 = rng.dirichlet(np.ones(150), (n, tokens)) * (1 - share)[..., None]
    ids = np.array([f"sub-{i:02d}" for i in range(n)])
    data = xr.Dataset(
        {
            "hub": (("subject", "token", "feature"), rng.standard_normal((n, tokens, 4))),
            "hub_to_roi": (("subject", "token", "roi"), to_roi),
            "hub_to_t1": (
                ("subject", "token", "cx", "cy", "cz"),
                to_t1.reshape(n, tokens, 5, 6, 5),
            ),
            "modality_share": (("subject", "token", "modality"), np.stack([share, 1 - share], -1)),
        },
        {
            "subject": ids,
            "participant": ("subject", ids),
            "token": np.arange(tokens),
            "modality": ["bold", "t1"],
            "has_bold": ("subject", has_bold),
            "has_t1": ("subject", has_t1),
            "age": ("subject", rng.uniform(20, 80, n)),
            "site": ("subject", np.array(["A", "B"])[np.arange(n) % 2]),
            "roi": atlas.roi.values,
            "network": ("roi", atlas.network.values),
        },
        {"atlas": "schaefer100"},
    )
    names = {n: c.astype(object) for n, c in data.coords.items() if c.dtype.kind == "U"}
    return data.assign_coords(names)
