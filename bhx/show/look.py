"""Colors, color scales and limits that all figures share."""

from __future__ import annotations

from functools import cache
from html import escape

import matplotlib
import numpy as np

from bhx.errors import InputError

# Okabe and Ito's colours, told apart in every common form of colour blindness
CATEGORIES = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#000")


def look_of(values, cmap=None, limits=None, title=None) -> dict:
    """Title, units, colour map and limits of a map; for values of both signs these are diverging
    and symmetric."""
    told, values = getattr(values, "attrs", {}), np.asarray(values)
    finite = values[np.isfinite(values)]
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 1.0)
    both_signs = low < 0 < high
    if limits is None:
        top = max(-low, high)
        limits = (-top, top) if both_signs else (low, high if high > low else low + 1)
    if not limits[0] < limits[1]:
        raise InputError(f"Expected limits (low, high), found {tuple(limits)}", "Swap them")
    return {
        "title": told.get("long_name", "") if title is None else title,
        "units": told.get("units", ""),
        "cmap": cmap or ("RdBu_r" if both_signs else "viridis"),
        "limits": tuple(limits),
    }


@cache
def colours(cmap, steps=33):
    """A matplotlib colour map as a plotly colour scale."""

    rgb = (255 * matplotlib.colormaps[cmap](np.linspace(0, 1, steps))[:, :3]).round().astype(int)
    return [[i / (steps - 1), f"rgb({r},{g},{b})"] for i, (r, g, b) in enumerate(rgb.tolist())]


def colour_bar(look):
    """The colour axis of a look: scale, limits, title."""
    return {
        "colorscale": colours(look["cmap"]),
        "cmin": look["limits"][0],
        "cmax": look["limits"][1],
        "colorbar": {"title": {"text": escape(look["units"])}, "len": 0.7, "thickness": 14},
    }
