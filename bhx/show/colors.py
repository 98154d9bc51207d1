"""Colors, limits and titles that all figures share."""

from __future__ import annotations

from dataclasses import dataclass
from html import escape

import matplotlib
import matplotlib.pyplot as plt
import numpy as np

from bhx.data.page import private
from bhx.errors import InputError

# Okabe and Ito's colors, distinct in every common form of color blindness; when all are used, they
# come again with the next shape
CATEGORIES = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#888")
SHAPES = {"circle": "●", "square": "■", "diamond": "◆", "triangle-up": "▲", "x": "✖", "star": "★"}
CLEAR = "rgba(0,0,0,0)"


@dataclass(frozen=True)
class Scale:
    """How the numbers of a map become colors, and the words beside them."""

    cmap: str
    limits: tuple[float, float]
    title: str = ""
    units: str = ""

    @classmethod
    def of(cls, values, *, cmap=None, limits=None, title=None, units="", beyond=0.0) -> Scale:
        """The scale of these values: from their lowest to their highest, or where they have both
        signs a diverging one, symmetric around 0; a share `beyond` either end may lie outside."""
        attrs, values = getattr(values, "attrs", {}), np.asarray(values)
        finite = values[np.isfinite(values)]
        ends = np.quantile(finite, (beyond, 1 - beyond)) if finite.size else (0.0, 1.0)
        low, high = map(float, ends)
        usual, ends = "viridis", (low, high if high > low else low + 1)
        if low < 0 < high:
            usual, ends = "RdBu_r", (-max(-low, high), max(-low, high))
        low, high = limits or ends
        if not low < high:
            fact = f"Expected limits (low, high), found {(low, high)}"
            raise InputError(fact, "Give the lower one first")
        title = attrs.get("long_name", "") if title is None else title
        return cls(cmap or usual, (low, high), title, units or attrs.get("units", ""))

    def color_axis(self, *, faded: bool = False) -> dict:
        """For plotly, with its color bar; faded: see `fade`."""
        low, high = self.limits
        title = {"text": escape(self.units), "side": "right"}
        bar = {"title": title, "len": 0.9, "thickness": 12, "outlinewidth": 0}
        colors = plotly_colors(self.fade() if faded else self.cmap)
        return {"colorscale": colors, "cmin": low, "cmax": high, "colorbar": bar}

    def mappable(self, *, faded: bool = False) -> plt.cm.ScalarMappable:
        """For matplotlib: turns values into colors, and has a color bar."""
        cmap = self.fade() if faded else self.cmap
        return plt.cm.ScalarMappable(plt.Normalize(*self.limits), cmap)

    def fade(self):
        """The color map to lie over a picture: 0 is clear, the extremes cover most of it."""
        value = np.linspace(*self.limits, 33)
        colors = self.mappable().to_rgba(value)
        colors[:, 3] = 0.8 * np.abs(value) / np.abs(value).max()
        return matplotlib.colors.ListedColormap(colors)


def plotly_colors(cmap, steps=33):
    """A matplotlib color map, or its name, as a plotly color scale."""
    colors = matplotlib.colormaps.get_cmap(cmap)(np.linspace(0, 1, steps)).tolist()
    words = [(*(round(255 * part) for part in rgb), round(alpha, 3)) for *rgb, alpha in colors]
    words = [f"rgba{word}" if word[3] < 1 else f"rgb{word[:3]}" for word in words]
    return [[i / (steps - 1), word.replace(" ", "")] for i, word in enumerate(words)]


def finish(figure, title: str, **layout):
    """A plotly figure with its title, which nobody can upload by a button."""
    return private(figure, title={"text": escape(title), "x": 0.5}, **layout)


def finish_static(figure, title: str):
    """A matplotlib figure with its title, not shown by itself."""
    figure.suptitle(title)
    plt.close(figure)
    return figure
