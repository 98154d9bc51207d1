"""python -m bhx: one subcommand a job. Each is a line in `_parser` and a function that calls bhx.

No computation may be here. `doctor` runs without any of the packages it looks for.
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import sys
from importlib import metadata
from pathlib import Path

import bhx
from bhx.errors import InputError

HERE = Path(__file__).parent
NEEDED = ("", "notebooks")  # extras that the lessons run on; "" is the core
LABEXTENSIONS = {  # what JupyterLab needs for widgets and figures -> the package that brings it
    "@jupyter-widgets/jupyterlab-manager": "ipywidgets",
    "anywidget": "anywidget",
    "jupyterlab-plotly": "plotly",
}


def main(argv=None) -> int:
    """Run one subcommand; 0 is success, 1 a failure it reports, 2 input that does not fit."""
    options = vars(_parser().parse_args(argv))
    run = options.pop("run")
    try:
        return run(**options) or 0
    except InputError as error:
        print(f"bhx: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bhx", description=bhx.__doc__.splitlines()[0])
    parser.add_argument("--version", action="version", version=f"bhx {bhx.__version__}")
    commands = parser.add_subparsers(metavar="command", required=True)

    doctor = commands.add_parser("doctor", help="versions, device, memory; what is missing")
    doctor.set_defaults(run=_doctor)

    demo = commands.add_parser("demo", help="a real scan and a cohort to tokens, scores, a page")
    demo.add_argument("--out", default="demo")
    demo.add_argument("--subjects", type=int, help="of the synthetic cohort; all by default")
    demo.set_defaults(run=_demo)

    catalog = commands.add_parser("catalog", help="list and check the catalogue's entries")
    catalog.add_argument("--catalog", help="folder with entries of your own")
    catalog.set_defaults(run=_catalog)

    prepare = commands.add_parser("prepare", help="derivatives to a checked store")
    prepare.add_argument("source", help="catalogue entry or folder of derivatives")
    prepare.add_argument("out", help="store to write or continue")
    prepare.add_argument("--workers", type=int, default=1)
    prepare.add_argument("--scheduler", dest="client", help="a Dask cluster's, not threads")
    prepare.add_argument("--atlas", default="schaefer400")
    prepare.add_argument("--order", choices=("7networks", "17networks"))
    prepare.add_argument("--labels", help="label image or file, instead of the atlas's own")
    prepare.add_argument("--voxel-mm", type=float, default=1.0)
    prepare.add_argument("--task", default="rest")
    prepare.add_argument("--phenotypes", help="table of participants")
    prepare.add_argument(
        "--no-denoising",
        dest="denoising",
        action="store_const",
        const=None,
        default=argparse.SUPPRESS,
        help="BOLD is denoised already",
    )
    prepare.add_argument("--quality", metavar="HTML", help="write the quality page here")
    prepare.set_defaults(run=_prepare)

    pretrain = commands.add_parser("pretrain", help="train one stage; also under torchrun")
    pretrain.add_argument("cohort", help="store of bhx prepare or bhx.save_cohort")
    pretrain.add_argument("--stage", required=True)
    pretrain.add_argument("--out", required=True)
    pretrain.add_argument("--preset", default="workshop")
    pretrain.add_argument("--model", help="where to begin instead of --out or random weights")
    pretrain.add_argument("--workers", type=int, default=0)
    pretrain.add_argument("--device")
    pretrain.add_argument("--resume", action="store_true")
    pretrain.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE", dest="settings")
    pretrain.set_defaults(run=_pretrain)

    embed = commands.add_parser("embed", help="a cohort to latents")
    embed.add_argument("cohort", help="catalogue entry or store")
    embed.add_argument("out", help="store to write or continue")
    embed.add_argument("--model", default="workshop")
    embed.add_argument("--keep", nargs="*", default=[])
    embed.add_argument("--device")
    embed.set_defaults(run=_embed)

    evaluate = commands.add_parser("evaluate", help="scores of latents beside the connectome's")
    evaluate.add_argument("latents", help="store that embed wrote")
    evaluate.add_argument("cohort", help="the cohort it was made from")
    evaluate.add_argument("--target", required=True, nargs="+")
    evaluate.add_argument("--groups", help="coordinate held out whole, such as site")
    evaluate.set_defaults(run=_evaluate)
    return parser


def _demo(**options):
    from bhx.demo import run_demo

    run_demo(**options)


def _catalog(catalog):
    from bhx.data.catalog import catalog_table

    print(catalog_table(catalog).to_string())


def _prepare(quality, **options):
    from bhx.data.quality_page import quality_page

    cohort = bhx.prepare(**options)
    print(f"{cohort.sizes['subject']} subjects in {options['out']}")
    for subject, reason in cohort.attrs["refused"].items():
        print(f"left out: {subject}: {reason}")
    if quality:
        print(f"quality page {quality_page(cohort, quality)}")


def _pretrain(settings, **options):
    from ast import literal_eval

    for name, text in (pair.split("=", 1) for pair in settings):
        try:
            options[name] = literal_eval(text)
        except (ValueError, SyntaxError):
            options[name] = text
    bhx.pretrain(**options)
    print(f"weights in {options['out']}")


def _embed(cohort, out, model, keep, device):
    network = bhx.load_model(model, device=device)
    print(bhx.embed(bhx.open_cohort(cohort), network, store=out, keep=keep))


def _evaluate(latents, cohort, target, groups):
    import xarray as xr

    ours = bhx.pool(xr.open_zarr(latents, consolidated=False).load())
    control = bhx.connectome(bhx.open_cohort(cohort)).compute()
    scores = [bhx.probe([ours, control], name, groups=groups) for name in target]
    print(bhx.compare(*scores, control=control.attrs["name"]).to_string())


def _doctor() -> int:
    """Print what this machine has, and what is missing; 1 when the core is not complete."""
    packages = _packages()
    sections = {
        f"bhx {bhx.__version__}": _system(),
        "device": _devices(),
        "memory": _memory(),
        "notebooks": _front_end(),
        "folders": [f"{name:<8}{_state(path)}" for name, path in bhx.folders().items()],
        "packages": [_row(*package) for package in packages],
        "missing": _missing(p for p in packages if p[1] in NEEDED),
        "optional, and not needed by the notebooks": _missing(
            p for p in packages if p[1] not in NEEDED
        ),
    }
    for title, lines in sections.items():
        print(title, *(f"  {line}" for line in lines or ["nothing: ready"]), sep="\n")
    return int(any(extra == "" and problem for _, extra, _, problem in packages))


def _system():
    return [f"Python {platform.python_version()} at {sys.prefix}", platform.platform()]


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
        name, bounds, extra = re.match(
            r"([\w.-]+)(?:\[\w+\])?\s*([^;]*?)\s*(?:;.*extra == ['\"](\w+)['\"])?$", line
        ).groups(default="")
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:
            found.append((name, extra, "", "missing"))
        else:
            found.append((name, extra, version, _outside(version, bounds)))
    return sorted(found, key=lambda package: (package[1], package[0]))


def _requirements() -> list[str]:
    """What pyproject.toml asks for: from the file beside bhx, or from the installed package."""
    project = HERE.parent / "pyproject.toml"
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
    checkout = (HERE.parent / "pyproject.toml").is_file()
    before, name = ("--editable ", ".") if checkout else ("", "bhx")
    return [
        f"{extra or 'CORE'}: {', '.join(problems)}; "
        f'pip install --upgrade {before}"{name}{extra and f"[{extra}]"}"'
        for extra, problems in wrong.items()
    ]


if __name__ == "__main__":
    sys.exit(main())
