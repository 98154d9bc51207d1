"""What each notebook costs: minutes, memory, cells, outputs that are compared, size.

    python benchmarks/notebooks.py [notebook ...] [--out benchmarks/notebooks.json]
    python benchmarks/notebooks.py --readme     # also puts the table into notebooks/README.md

Each notebook is executed once, from a copy in memory, in a process of its own; nothing is written
back. Memory is the largest sum of resident memory over the kernel and its children, sampled ten
times a second: pages that they share count twice, so it is an upper bound. Rows of notebooks that
were not run this time are kept from the file.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import psutil

REPO = Path(__file__).parents[1]
HEADS = (
    *("notebook", "minutes", "minutes of one processor", "peak GB", "code cells"),
    *("outputs compared", "figures checked", "MB"),
)
NOT_COMPARED = {"nbval-ignore-output", "nbval-skip"}
README = REPO / "notebooks" / "README.md"
PLACE = re.compile(r"(?<=<!-- measured -->\n).*?(?=\n<!-- end -->)", re.S)
CHECKED = re.compile(r"^figure \S+: ok", re.M)


def main():
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("notebooks", nargs="*", type=Path)
    options.add_argument("--out", type=Path, default=REPO / "benchmarks" / "notebooks.json")
    options.add_argument("--readme", action="store_true")
    args = options.parse_args()
    rows = json.loads(args.out.read_text(encoding="utf-8")) if args.out.exists() else {}
    for notebook in args.notebooks or sorted((REPO / "notebooks").glob("*.ipynb")):
        rows[notebook.stem] = row = described(notebook) | measured(notebook)
        print(notebook.stem, row, flush=True)
        args.out.write_text(json.dumps(rows, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    print(table(rows))
    if args.readme:
        text = README.read_text(encoding="utf-8")
        README.write_text(PLACE.sub(lambda _: table(rows), text), encoding="utf-8")


def described(notebook: Path) -> dict:
    """What the stored notebook holds."""
    cells = [c for c in nbformat.read(notebook, as_version=4).cells if c.cell_type == "code"]
    compared = [c for c in cells if not NOT_COMPARED & set(c.metadata.get("tags", []))]
    said = [o.text for c in compared for o in c.outputs if o.output_type == "stream"]
    return {
        "code_cells": len(cells),
        "outputs_compared": sum(len(c.outputs) for c in compared),
        "figures_checked": len(CHECKED.findall("\n".join(said))),
        "mb": round(notebook.stat().st_size / 1e6, 2),
    }


def measured(notebook: Path) -> dict:
    """Execute it in another process; wall and processor seconds, and peak memory [GB]."""
    environment = os.environ | {"PLOTLY_RENDERER": "plotly_mimetype"}
    environment.pop("BHX_UPDATE_FIGURES", None)
    started = time.perf_counter()
    runner = psutil.Popen([sys.executable, "-c", EXECUTE, notebook.resolve()], env=environment)
    peak, busy = 0, {}
    while runner.poll() is None:
        memory, seconds = of_kernel(runner)
        peak, busy = max(peak, memory), busy | seconds
        time.sleep(0.1)
    if runner.returncode:
        raise subprocess.CalledProcessError(runner.returncode, notebook.name)
    return {
        "wall_s": round(time.perf_counter() - started, 1),
        "cpu_s": round(sum(busy.values()), 1),
        "peak_gb": round(peak / 1e9, 2),
    }


EXECUTE = """
import sys
from pathlib import Path
import nbformat
from nbclient import NotebookClient
path = Path(sys.argv[1])
notebook = nbformat.read(path, as_version=4)
NotebookClient(notebook, timeout=900, resources={"metadata": {"path": path.parent}}).execute()
"""


def of_kernel(runner) -> tuple[int, dict]:
    """Resident bytes below a process, and processor seconds of each process there."""
    memory, seconds = 0, {}
    for process in runner.children(recursive=True):
        try:
            memory += process.memory_info().rss
            seconds[process.pid] = sum(process.cpu_times()[:2])
        except psutil.NoSuchProcess:
            continue
    return memory, seconds


def table(rows: dict) -> str:
    """The rows as Markdown, with a line of sums."""
    lines = [HEADS, ["---"] * len(HEADS)]
    for name, r in sorted(rows.items()):
        link = f"[{name}]({name}.ipynb)"
        costs = (*minutes(r), f"{r['peak_gb']:.1f}")
        counts = (r["code_cells"], r["outputs_compared"], r["figures_checked"])
        lines.append((link, *costs, *counts, f"{r['mb']:.1f}"))
    lines.append(("all", *totals(rows.values())))
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def minutes(row) -> tuple[str, str]:
    return f"{row['wall_s'] / 60:.1f}", f"{row['cpu_s'] / 60:.1f}"


def totals(rows) -> tuple:
    rows = list(rows)
    whole = {key: sum(row[key] for row in rows) for key in rows[0]}
    peak = max(row["peak_gb"] for row in rows)
    counts = (whole[key] for key in ("code_cells", "outputs_compared", "figures_checked"))
    return *minutes(whole), f"{peak:.1f}", *counts, f"{whole['mb']:.1f}"


if __name__ == "__main__":
    main()
