"""Every benchmark of speed, small, to one table beside that of the last commit.

    make bench

Most rows are ratios of two times of one run, so that they hold on another machine: a row that got
worse by a third is marked. `bench.json` is what the table is compared with, and `--keep` renews it.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import bhx

HERE, MARKED = Path(__file__).parent, 4 / 3
KEPT = HERE / "bench.json"
LESS, MORE = "less is better", "more is better"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--keep", action="store_true", help=f"renew {KEPT.name}")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    given = parser.parse_args()
    kept, found = json.loads(KEPT.read_text("utf-8")) if KEPT.exists() else {}, {}
    print(f"{machine()}\n{bhx.made_with()}\n\n| what | now | kept | |\n|---|---|---|---|")
    for name in given.only:
        start = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            for what, value, better in PARTS[name](Path(folder)):
                row = f"{name}: {what}"
                found[row] = {"value": value, "better": better}
                print(line(row, value, better, kept.get("rows", {}).get(row)), flush=True)
        print(f"| {name}: seconds | {time.perf_counter() - start:.0f} | | |", flush=True)
    if given.keep:
        text = json.dumps(
            {"machine": machine(), "made with": bhx.made_with(), "rows": found}, indent=1
        )
        KEPT.write_text(text + "\n", "utf-8")


def line(row, value, better, kept):
    """A row of the table, with a word where it got worse by a third."""
    before = "" if kept is None else f"{kept['value']:.3g}"
    worse = kept and (value / kept["value"]) ** (1 if better == LESS else -1) > MARKED
    return f"| {row} | {value:.3g} | {before} | {'WORSE' if worse else ''} |"


def machine() -> str:
    """The processor, and how many threads the benchmarks use."""
    info = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", info.read_text()) if info.exists() else []
    threads = os.environ.get("OMP_NUM_THREADS", "all")
    return (
        f"{names[0] if names else platform.machine()}, {os.cpu_count()} cores, threads: {threads}"
    )


def output_of(script, *options) -> str:
    """What a benchmark prints."""
    command = [sys.executable, str(HERE / script), *map(str, options)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{script} ended with {done.returncode}:\n{done.stderr[-2000:]}")
    return done.stdout


def cells_of(text):
    """Rows of a Markdown table: the first cell and the numbers of the others."""
    for row in text.splitlines():
        first, *others = (cell.strip(" *") for cell in row.strip("| ").split("|"))
        if others and all(re.fullmatch(r"[\d.]+", cell) for cell in others):
            yield first, [float(cell) for cell in others]


def encode(folder):
    """Seconds of a subject at base size, over those of what the release computes."""
    output_of("encode.py", "--rounds", 1, "--out", folder / "e.json")
    seconds = json.loads((folder / "e.json").read_text())["seconds"]
    for name in ("relational", "hub alone", "paper"):
        yield f"{name} / padded", seconds[name]["all"] / seconds["padded"]["all"], LESS


def train(folder):
    """Share of the matrix product's rate that a training step reaches."""
    for preset in ("workshop", "paper"):
        output_of("pretrain.py", "--preset", preset, "--out", folder, "--quick", "--seconds", 3)
        (report,) = folder.glob(f"*{preset}*.json")
        for row in json.loads(report.read_text())["rows"]:
            if row.get("utilisation", 0) > 0:
                yield (
                    f"{preset}, {row['stage']}: share of the matrix product",
                    row["utilisation"],
                    MORE,
                )


def read(folder):
    """Preparing and reading, beside numpy's reading of the same values."""
    report = json.loads(output_of("cohort.py", "--subjects", 6, "--sizes", 100))
    for name, value in report["read"].items():
        if name.endswith("warm: ratio"):
            yield f"{name.split(',')[0]}, numpy's time / ours", value, MORE
    for name, value in report["prepare"].items():
        if "scans/s" in name:
            yield f"prepare, {name}", value, MORE


def probe(folder):
    """Probes and ComBat beside plain scikit-learn and neuroCombat's arithmetic."""
    options = ("--people", 300, "--width", 4000, "--permutations", 200, "--rounds", 3)
    for name, (*_, ratio) in cells_of(output_of("probing.py", *options, "--only", "time")):
        yield name, ratio, LESS


def stream(folder):
    """Milliseconds of a volume and of a patch while a scan runs."""
    output_of("stream.py", "--hours", 0.25, "--base-hours", 0.03, "--out", folder / "s.json")
    for name, row in json.loads((folder / "s.json").read_text()).items():
        yield f"{name}, ms a patch / 35,280 ms", row["ms_a_patch_last_ten"] / 35_280, LESS


def explore(folder):
    """Milliseconds of the kernel for a click in the explorer with 200 people."""
    for name, wall in re.findall(
        r"(?m)^(\w[\w ]*?) +median +(\d+) ms", output_of("explore.py", 200)
    ):
        yield f"{name}, ms", float(wall), LESS


PARTS = {
    "encode": encode, "train": train, "read": read, "probe": probe, "stream": stream,
    "explore": explore,
}  # fmt: skip

if __name__ == "__main__":
    main()
