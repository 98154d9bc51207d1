"""Build the book: notebooks with their stored outputs, the API, and the project's pages.

    python notebooks/book/build.py [folder]

The sources are laid out in `folder`/source as in the repository, so that relative links hold; the
site is `folder`/html. Nothing is executed and nothing is fetched.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
import time
from pathlib import Path

from sphinx.cmd.build import build_main

import bhx

HERE = Path(__file__).parent
REPO = HERE.parents[1]
PAGES = (
    *("README.md", "CITATION.cff", "LICENSE", "CHANGELOG.md", "environment.yml"),
    *("notebooks/*.ipynb", "notebooks/*.md", "notebooks/pictures/*"),
    *("data_catalog/README.md", "benchmarks/*.md", "bhx/*/README.md"),
)
ON_GITHUB = "https://github.com/bhx-project/bhx/blob/main/"
LINK = re.compile(r"(?<=\]\()(?!https?:|mailto:|#)([^)\s#]+)")


def main(folder="build/book") -> int:
    """Lay out the sources, run Sphinx with warnings as errors, and say how long it took."""
    started, folder = time.perf_counter(), Path(folder).resolve()
    source = folder / "source"
    lay_out(source)
    options = ["--fail-on-warning", "--keep-going", "--nitpicky", "--quiet", "--builder", "html"]
    failed = build_main(
        [
            *options,
            "-c",
            str(HERE),
            "-d",
            str(folder / "doctrees"),
            str(source),
            str(folder / "html"),
        ]
    )
    if not failed:
        size = sum(p.stat().st_size for p in (folder / "html").rglob("*") if p.is_file())
        seconds = time.perf_counter() - started
        print(f"book: {os.path.relpath(folder / 'html' / 'index.html')}, "
              f"{seconds:.0f} s, {size / 1e6:.0f} MB")  # fmt: skip
    return failed


def lay_out(source: Path) -> None:
    """Copy the pages as they lie in the repository, and write those of the API."""
    shutil.rmtree(source, ignore_errors=True)
    for pattern in PAGES:
        for file in sorted(REPO.glob(pattern)):
            place = source / file.relative_to(REPO)
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(file, place)
    shutil.copy2(HERE / "index.md", source)
    for page in source.rglob("*.md"):
        page.write_text(outward(page, source), encoding="utf-8")
    (source / "api.md").write_text(api_page(), encoding="utf-8")


def outward(page: Path, source: Path) -> str:
    """A page's text; links to files of the repository that the book leaves out go to GitHub."""

    def link(found):
        target = (page.parent / found[1]).resolve()
        original = REPO / target.relative_to(source)
        left_out = original.exists() and not target.is_file()
        return ON_GITHUB + original.relative_to(REPO).as_posix() if left_out else found[1]

    return LINK.sub(link, page.read_text(encoding="utf-8"))


def api_page() -> str:
    """The public names, in the order of the table in bhx/__init__.py, under their files' words."""
    parts = ["# Public names", "Everything below is reached as `bhx.<name>`."]
    for file, names in bhx.PUBLIC.items():
        purpose = __import__(f"bhx.{file}", fromlist=["_"]).__doc__.splitlines()[0]
        parts += [f"## {file}", purpose, summary(names)]
    return (
        "\n\n".join([*parts, "## The machine, and errors", summary(["folders", "InputError"])])
        + "\n"
    )


def summary(names) -> str:
    lines = "\n".join(f"   bhx.{name}" for name in names)
    return f"```{{eval-rst}}\n.. autosummary::\n   :toctree: api\n\n{lines}\n```"


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
