"""What this machine has for bhx, and what is missing: `python -m bhx doctor`.

It runs without any of the packages that it looks for, so none is imported above.
"""

from __future__ import annotations

import os
import platform
import re
import sys
from importlib import metadata
from pathlib import Path

from bhx.settings import PACKAGE, __version__, folders

NEEDED = ("", "notebooks")  # extras that the lessons run on; "" is the core
LABEXTENSIONS = {  # what JupyterLab needs for widgets and figures -> the package that brings it
    "@jupyter-widgets/jupyterlab-manager": "ipywidgets",
    "anywidget": "anywidget",
    "jupyterlab-plotly": "plotly",
}
# name, bounds and extra of one line of the package's metadata
REQUIREMENT = re.compile(r"^([\w.-]+)(?:\[\w+\])?\s*([^;]*?)\s*(?:;.*extra == ['\"](\w+)['\"])?$")


def doctor() -> int:
    """Print what this machine has, and what is missing; 1 when the core is not complete."""
    packages = _packages()
    sections = {
        f"bhx {__version__}": [
            f"Python {platform.python_version()} at {sys.prefix}",
            platform.platform(),
        ],
        "device": _devices(),
        "memory": _memory(),
        "notebooks": _front_end(),
        "folders": [f"{name:<8}{_state(path)}" for name, path in folders().items()],
        "packages": [_row(*package) for package in packages],
        "missing": _missing(p for p in packages if p[1] in NEEDED),
        "optional": _missing(p for p in packages if p[1] not in NEEDED),
    }
    for title, lines in sections.items():
        print(title, *(f"  {line}" for line in lines or ["nothing: ready"]), sep="\n")
    return int(any(extra == "" and problem for _, extra, _, problem in packages))


def _devices():
    lines = [f"{os.cpu_count()} CPU cores"]
    try:
        import torch
    except (ImportError, OSError) as error:  # OSError: a library of the build does not load
        return [*lines, f"GPU unknown: torch does not import ({error})"]
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    mps = ["Apple GPU (mps)"] if torch.backends.mps.is_available() else []
    return [*lines, *(names + mps or ["no GPU: bhx runs on the CPU"])]


def _memory():
    try:
        import psutil
    except ImportError:
        return ["unknown: psutil is missing"]
    ram = psutil.virtual_memory()
    lines = [f"{ram.total / 2**30:.1f} GiB, {ram.available / 2**30:.1f} GiB of it free"]
    if (torch := sys.modules.get("torch")) is not None and torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            free, total = torch.cuda.mem_get_info(i)
            lines.append(f"GPU {i}: {total / 2**30:.1f} GiB, {free / 2**30:.1f} GiB of it free")
    return lines


def _front_end():
    """Does this environment's JupyterLab show widgets and figures?"""
    folder = Path(sys.prefix, "share", "jupyter", "labextensions")
    absent = [package for name, package in LABEXTENSIONS.items() if not (folder / name).is_dir()]
    if absent:
        return [f"figures and widgets may stay blank: {', '.join(absent)} not in {folder}"]
    return ["JupyterLab finds ipywidgets, anywidget and plotly"]


def _state(path: Path) -> str:
    near = next(p for p in (path, *path.parents) if p.exists())
    made = "" if path.exists() else ", made when needed"
    return f"{path} ({'writable' if os.access(near, os.W_OK) else 'NOT writable'}{made})"


def _packages() -> list[tuple[str, str, str, str]]:
    """(package, extra or "" for the core, version or "", problem or "") of all that bhx can use."""
    found = []
    for line in _requirements():
        name, bounds, extra = REQUIREMENT.findall(line)[0]
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:
            found.append((name, extra, "", "missing"))
        else:
            found.append((name, extra, version, _outside(version, bounds)))
    return sorted(found, key=lambda package: (package[1], package[0]))


def _requirements() -> list[str]:
    """What pyproject.toml asks for: from the file beside bhx, or from the installed package."""
    project = PACKAGE.parent / "pyproject.toml"
    if not project.is_file():
        return metadata.requires("bhx") or []
    import tomllib

    table = tomllib.loads(project.read_text(encoding="utf-8"))["project"]
    extras = table["optional-dependencies"].items()
    optional = [f'{line}; extra == "{extra}"' for extra, lines in extras for line in lines]
    return table["dependencies"] + optional


def _outside(version: str, bounds: str) -> str:
    try:
        from packaging.specifiers import SpecifierSet
    except ImportError:  # comes with several core packages; one of them is missing then
        return ""
    fits = SpecifierSet(bounds).contains(version, prereleases=True)
    return "" if fits else f"needs {bounds}"


def _row(name, extra, version, problem):
    where = f"extra '{extra}'" if extra else "core"
    return f"{name:<16}{version or '-':<16}{where:<20}{problem}".rstrip()


def _missing(packages):
    """A line for the core and one for each extra: what is wrong, and the command that mends it."""
    wrong = {}
    for name, extra, _, problem in packages:
        if problem:
            wrong.setdefault(extra, []).append(f"{name} {problem}")
    checkout = (PACKAGE.parent / "pyproject.toml").is_file()
    before, name = ("--editable ", ".") if checkout else ("", "bhx")
    return [
        f"{extra or 'CORE'}: {', '.join(problems)}; "
        f'pip install --upgrade {before}"{name}{extra and f"[{extra}]"}"'
        for extra, problems in wrong.items()
    ]
