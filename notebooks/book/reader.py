"""How the book reads a notebook: stored outputs as they are, figures as pages can draw them."""

from __future__ import annotations

import json
import re
from pathlib import Path

import nbformat

LESSONS = Path(__file__).parents[1]
FIGURE = "application/vnd.plotly.v1+json"
WIDGET = "application/vnd.jupyter.widget-view+json"
BADGES = re.compile(r"^\[!\[Binder\].*\n?", re.M)
LESSON = re.compile(r"(?<!\[)`(\d\d_\w+)(?:\.ipynb)?`")
NO_WIDGET = "<p class='bhx-widget'>A widget stands here when the notebook runs.</p>"


def read_notebook(text: str) -> nbformat.NotebookNode:
    """A stored notebook, its cells and outputs made ready for a page; nothing is executed."""
    notebook = nbformat.reads(text, as_version=4)
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            cell.source = as_prose(cell.source)
        elif cell.cell_type == "code":
            if "install" in cell.metadata.get("tags", []):
                cell.metadata["tags"] = [*cell.metadata["tags"], "remove-cell"]
            for output in cell.outputs:
                as_html(output)
    return notebook


def as_prose(source: str) -> str:
    """Without the badges, for which the page has buttons; names of lessons are links."""

    def link(name):
        there = (LESSONS / f"{name[1]}.ipynb").exists()
        return f"[`{name[1]}`]({name[1]}.ipynb)" if there else name[0]

    return LESSON.sub(link, BADGES.sub("", source))


def as_html(output) -> None:
    """Turn a figure's JSON, and a widget that is not there, into HTML in place."""
    data = output.get("data", {})
    if FIGURE in data:
        output["data"] = {"text/html": figure_html(data[FIGURE])}
    elif WIDGET in data:
        picture = {k: v for k, v in data.items() if k == "image/png"}
        output["data"] = picture or {"text/html": NO_WIDGET}


def figure_html(figure: dict) -> str:
    """A place for figures.js to draw in, as high as the figure asks [px], with its JSON."""
    height = int(figure.get("layout", {}).get("height") or 450)
    words = json.dumps(figure, separators=(",", ":")).replace("</", "<\\/")
    return (
        f'<div class="bhx-figure" style="min-height:{height}px">'
        f'<script type="application/json">{words}</script></div>'
    )
