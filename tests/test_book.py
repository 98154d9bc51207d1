"""The book: how it reads a notebook; and, where BHX_BOOK names a built site, every link of it."""

from __future__ import annotations

import importlib.util
import json
import os
import re
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urldefrag, urlsplit

import nbformat
import plotly.graph_objects as go
import pytest

import bhx

REPO = Path(__file__).parents[1]
SITE = Path(os.environ.get("BHX_BOOK") or REPO / "no-site")
MACHINE = re.compile(r"(?<![\w.:/])/(?:ro" r"ot|wo" r"rk|ho" r"me|Us" r"ers|tm" r"p)/[\w.-]+/")
built = pytest.mark.skipif(not SITE.is_dir(), reason="no book here: make book")


@pytest.fixture(scope="module")
def reader():
    place = REPO / "notebooks" / "book" / "reader.py"
    spec = importlib.util.spec_from_file_location("reader", place)
    spec.loader.exec_module(module := importlib.util.module_from_spec(spec))
    return module


def one_cell(reader, cell):
    book = nbformat.v4.new_notebook(cells=[cell])
    return reader.read_notebook(nbformat.writes(book)).cells[0]


def with_output(data):
    output = nbformat.v4.new_output("display_data", data=data)
    return nbformat.v4.new_code_cell("figure", outputs=[output])


def test_figure_survives_as_json(reader):
    figure = go.Figure(go.Scatter(y=[1, 2, 4], text="</script>"), layout_height=300)
    plain = json.loads(figure.to_json())
    html = one_cell(reader, with_output({reader.FIGURE: plain})).outputs[0].data["text/html"]
    words = re.search(r"<script[^>]*>(.*?)</script>", html)[1]
    assert json.loads(words) == plain
    assert "min-height:300px" in html


def test_widget_becomes_a_sentence(reader):
    state = {"model_id": "x", "version_major": 2, "version_minor": 0}
    cell = one_cell(reader, with_output({reader.WIDGET: state, "text/plain": "FigureWidget()"}))
    assert list(cell.outputs[0].data) == ["text/html"]
    cell = one_cell(reader, with_output({reader.WIDGET: state, "image/png": "aGVsbG8="}))
    assert list(cell.outputs[0].data) == ["image/png"]


def test_prose_has_links_for_badges(reader):
    first = sorted((REPO / "notebooks").glob("*.ipynb"))[0].stem
    prose = f"# A\n\n[![Binder](b.svg)](x) [![Colab](c.svg)](y)\n\nSee `{first}`, `99_none`."
    assert one_cell(reader, nbformat.v4.new_markdown_cell(prose)).source == (
        f"# A\n\n\nSee [`{first}`]({first}.ipynb), `99_none`."
    )


def test_install_cell_is_left_out(reader):
    cell = nbformat.v4.new_code_cell("%pip install", metadata={"tags": ["install"]})
    assert "remove-cell" in one_cell(reader, cell).metadata["tags"]


@pytest.mark.parametrize(
    "lesson", sorted((REPO / "notebooks").glob("*.ipynb")), ids=lambda p: p.stem
)
def test_formulas_need_no_typesetting(lesson):
    """Pages load nothing from elsewhere, so no MathJax: write 2π/√λ."""
    cells = nbformat.read(lesson, as_version=4).cells
    assert not [c.source for c in cells if c.cell_type == "markdown" and "$" in c.source]


class Page(HTMLParser):
    """What a page names (`ids`), leads to (`links`), and loads (`loads`)."""

    def __init__(self, text):
        super().__init__()
        self.ids, self.links, self.loads = set(), set(), set()
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self.ids |= {found[key] for key in ("id", "name") if found.get(key)}
        if tag == "a" and "href" in found:
            self.links.add(found["href"])
        elif tag == "link" and found.get("rel") in ("stylesheet", "icon", "preload"):
            self.loads.add(found["href"])
        elif tag in ("img", "script", "iframe", "source") and found.get("src"):
            self.loads.add(found["src"])


@cache
def text_of(file: Path) -> str:
    return file.read_text(encoding="utf-8")


@cache
def page(file: Path) -> Page:
    return Page(text_of(file))


def pages() -> list[Path]:
    return sorted(
        f for f in SITE.rglob("*.html") if not f.relative_to(SITE).parts[0].startswith("_")
    )


def dangling(file: Path, address: str) -> bool:
    """Does an address within the site lead nowhere?"""
    path, anchor = urldefrag(address)
    target = (file.parent / unquote(urlsplit(path).path)).resolve() if path else file
    if not target.is_file():
        return True
    return bool(anchor) and target.suffix == ".html" and unquote(anchor) not in page(target).ids


def outside(address: str) -> bool:
    return bool(urlsplit(address).scheme) or address.startswith("//")


@built
def test_links_anchors_and_pictures_lead_somewhere():
    lost = [
        f"{file.relative_to(SITE)}: {address}"
        for file in pages()
        for address in page(file).links | page(file).loads
        if not outside(address) and address != "#" and dangling(file, address)
    ]
    assert not lost


@built
def test_nothing_is_loaded_from_elsewhere():
    assert not {a for file in pages() for a in page(file).loads if outside(a)}


@built
def test_every_lesson_and_every_public_name_has_a_page():
    lessons = {f"notebooks/{f.stem}.html" for f in (REPO / "notebooks").glob("*.ipynb")}
    names = {f"api/bhx.{name}.html" for name in bhx.__all__ if name != "__version__"}
    assert lessons | names | {"index.html", "search.html"} <= {
        file.relative_to(SITE).as_posix() for file in pages()
    }
    assert all((SITE / name).is_file() for name in lessons | names)


@built
def test_every_stored_figure_is_drawn():
    for notebook in (SITE / "_sources" / "notebooks").glob("*.ipynb"):
        stored = text_of(notebook).count('"application/vnd.plotly.v1+json"')
        html = text_of(SITE / "notebooks" / f"{notebook.stem}.html")
        assert html.count('class="bhx-figure"') == stored, notebook.stem
        assert ("plotly.min.js" in html) == ("figures.js" in html) == (stored > 0), notebook.stem
    assert (SITE / "_static" / "plotly.min.js").stat().st_size > 1e6


@built
def test_no_machine_path():
    assert not [hit.group() for file in pages() for hit in MACHINE.finditer(text_of(file))]
