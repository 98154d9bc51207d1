"""Colors, limits and titles that all figures share."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from html import escape

import matplotlib
import matplotlib.pyplot as plt
import numpy as np

from bhx.data.page import private
from bhx.errors import InputError

# Okabe and Ito's colors, distinct in every common form of color blindness
CATEGORIES = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#000")


@dataclass(frozen=True)
class Scale:
    """How the numbers of a map become colors, and the words beside them."""

    cmap: str
    limits: tuple[float, float]
    title: str = ""
    units: str = ""

    @classmethod
    def of(cls, values, *, cmap=None, limits=None, title=None) -> Scale:
        """The scale of these values: from their lowest to their highest, or where they have both
        signs a diverging one, symmetric around 0."""
        attrs, values = getattr(values, "attrs", {}), np.asarray(values)
        finite = values[np.isfinite(values)]
        low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 1.0)
        usual, ends = "viridis", (low, high if high > low else low + 1)
        if low < 0 < high:
            usual, ends = "RdBu_r", (-max(-low, high), max(-low, high))
        low, high = limits or ends
        if not low < high:
            fact = f"Expected limits (low, high), found {(low, high)}"
            raise InputError(fact, "Give the lower one first")
        title = attrs.get("long_name", "") if title is None else title
        return cls(cmap or usual, (low, high), title, attrs.get("units", ""))

    def color_axis(self) -> dict:
        """For plotly, with its color bar."""
        low, high = self.limits
        bar = {"title": {"text": escape(self.units)}, "len": 0.7, "thickness": 14}
        colors = plotly_colors(self.cmap)
        return {"colorscale": colors, "cmin": low, "cmax": high, "colorbar": bar}

    def mappable(self) -> plt.cm.ScalarMappable:
        """For matplotlib: turns values into colors, and has a color bar."""
        return plt.cm.ScalarMappable(plt.Normalize(*self.limits), self.cmap)


@cache
def plotly_colors(cmap, steps=33):
    """A matplotlib color map as a plotly color scale."""
    rgb = (255 * matplotlib.colormaps[cmap](np.linspace(0, 1, steps))[:, :3]).round().astype(int)
    return [[i / (steps - 1), f"rgb({r},{g},{b})"] for i, (r, g, b) in enumerate(rgb.tolist())]


def finish(figure, title: str, **layout):
    """A plotly figure with its title, which nobody can upload by a button."""
    return private(figure, title={"text": escape(title), "x": 0.5}, **layout)


def finish_static(figure, title: str):
    """A matplotlib figure with its title, not shown by itself."""
    figure.suptitle(title)
    plt.close(figure)
    return figure
