"""Sphinx's settings for the book. build.py lays out the sources; nothing is fetched or executed."""

import sys
from pathlib import Path

import plotly

import bhx

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

project = "bhx"
author = copyright = "bhx developers"
release = version = bhx.__version__
language = "en"
root_doc = "index"

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.autosummary", "numpydoc"]
nb_execution_mode = "off"
nb_custom_formats = {".ipynb": "reader.read_notebook"}
nb_ipywidgets_js = {}  # else pages load require.js from elsewhere
nb_merge_streams = True
myst_heading_anchors = 3
html_math_renderer = None

templates_path = [str(HERE / "templates")]
autosummary_generate = True
autodoc_typehints = "none"
autodoc_preserve_defaults = True
numpydoc_show_class_members = False

html_theme = "sphinx_book_theme"
html_title = "bhx"
html_static_path = [
    str(HERE / "static"),
    str(Path(plotly.__file__).parent / "package_data" / "plotly.min.js"),
]
html_css_files = ["book.css"]
html_sourcelink_suffix = ""  # the button brings the notebook itself
html_context = {"default_mode": "auto"}  # light or dark as the reader's system
html_theme_options = {
    "repository_url": "https://github.com/bhx-project/bhx",
    "repository_branch": "main",
    "use_repository_button": True,
    "launch_buttons": {
        "binderhub_url": "https://mybinder.org",
        "colab_url": "https://colab.research.google.com",
        "notebook_interface": "jupyterlab",
    },
    "show_toc_level": 2,
    "home_page_in_toc": True,
    "logo": {"text": "bhx"},
}


def draw_figures(app, pagename, templatename, context, doctree):
    """Only pages with a figure load plotly, the one copy in _static."""
    if "bhx-figure" in context.get("body", ""):
        app.add_js_file("plotly.min.js", loading_method="defer")
        app.add_js_file("figures.js", loading_method="defer")


def setup(app):
    app.connect("html-page-context", draw_figures)
