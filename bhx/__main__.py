"""python -m bhx: one subcommand a job. Each is a function that adds its options and one that runs.

Whatever can be seen without reading data (paths, names, numbers) is checked while the command line
is read, before a heavy package is imported. No computation may be here.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import sys
import tempfile
from ast import literal_eval
from pathlib import Path

import bhx
from bhx.errors import InputError, listed
from bhx.settings import PACKAGE

# Repeated here, where nothing heavy is imported; tests/test_commands.py compares them.
ATLASES = ("schaefer100", "schaefer200", "schaefer400")
ORDERS = ("7networks", "17networks")
STAGES = ("structure", "dynamics", "harmonizer")
PRESETS = ("workshop", "small", "base")
KEEP = ("dynamics", "structure", "attention")


def main(argv=None) -> int:
    """Run one subcommand; 0 is success, 1 a failure it reports, 2 input that does not fit."""
    options = vars(_parser().parse_args(argv))
    run = options.pop("run")
    try:
        return run(**options) or 0
    except InputError as error:
        print(f"bhx: {error}", file=sys.stderr)
        return 2


# The subcommands ----------------------------------------------------------------------------------


def _parser():
    parser = _Parser(prog="python -m bhx", description=bhx.__doc__.splitlines()[0])
    parser.add_argument("--version", action="version", version=f"bhx {bhx.__version__}")
    commands = parser.add_subparsers(metavar="command", required=True)
    for add in (_doctor, _demo, _catalog, _prepare, _pretrain, _embed, _evaluate):
        add(commands)
    return parser


def _doctor(commands):
    from bhx.doctor import doctor

    _command(commands, "doctor", doctor, "versions, device and memory; what is missing", "")


def _demo(commands):
    text = "a real scan and a cohort: tokens, scores and one page of figures"
    command = _command(commands, "demo", _run_demo, text, "--out demo --subjects 60")
    command.add_argument("--out", type=_output, default="demo", help="folder to write")
    command.add_argument(
        "--subjects", type=_at_least_one, help="how many of the synthetic cohort; all if not given"
    )


def _run_demo(**options):
    from bhx.demo import run_demo

    run_demo(**options)


def _catalog(commands):
    text = "list and check the entries of the catalogue"
    command = _command(commands, "catalog", _run_catalog, text, "--catalog my_entries")
    command.add_argument("--catalog", type=_folder, help="folder with entries of your own")


def _run_catalog(catalog=None):
    print(bhx.catalog_table(catalog).to_string())


def _prepare(commands):
    text = "read the files of a study into one checked store"
    example = "derivatives cohort.zarr --atlas schaefer100 --quality page.html"
    command = _command(commands, "prepare", _run_prepare, text, example)
    add = command.add_argument
    add("source", type=_source, help="catalogue entry, or folder of derivatives (fMRIPrep-like)")
    add("out", type=_output, help="store to write, or to continue")
    add("--workers", type=_at_least_one, default=2, help="subjects read at a time")
    add("--scheduler", dest="client", help="address of a Dask cluster, instead of threads here")
    add("--atlas", choices=ATLASES, default="schaefer400", help="parcels to average over")
    add("--order", choices=ORDERS, help="order of tables whose columns have no names")
    add("--labels", type=_file, help="label image or file, instead of the atlas's own")
    add("--voxel-mm", type=_above_zero, default=1.0, help="voxel of stored volumes [mm]")
    add("--task", default="rest", help="task in the names of the files")
    add("--phenotypes", type=_file, help="table of participants, with their labels")
    add(
        "--no-denoising",
        dest="denoising",
        action="store_const",
        const=None,
        help="the scans are denoised already",
    )
    add("--quality", type=_output, metavar="HTML", help="write the page of quality checks here")


def _run_prepare(quality=None, **options):
    cohort = bhx.prepare(**options)
    print(f"{cohort.sizes['subject']} subjects in {options['out']}")
    for subject, reason in cohort.attrs["refused"].items():
        print(f"left out: {subject}: {reason}")
    if quality:
        print(f"quality page {bhx.quality_page(cohort, quality)}")


def _pretrain(commands):
    text = "train one part of a model on a cohort; also under torchrun"
    example = "cohort.zarr --stage structure --out run --set steps=200 batch=8"
    command = _command(commands, "pretrain", _run_pretrain, text, example)
    add = command.add_argument
    add("cohort", type=_store, help="store that prepare or bhx.save_cohort wrote")
    add("--stage", required=True, choices=STAGES, help="which part, in this order")
    add("--out", required=True, type=_output, help="folder of the run, shared by the stages")
    add("--preset", choices=PRESETS, default="workshop", help="size of the model")
    add("--model", type=_weights, help="weights to start from, instead of those in OUT or random")
    add("--workers", type=_at_least_zero, default=0, help="processes that read ahead")
    add("--device", type=_device, help="cpu, cuda, cuda:N or mps; a GPU where there is one")
    add("--resume", action="store_true", help="continue from the last checkpoint in OUT")
    add(
        "--set",
        nargs="+",
        type=_setting,
        default=argparse.SUPPRESS,
        metavar="NAME=VALUE",
        dest="settings",
        help="other settings of the training, such as steps=200",
    )


def _run_pretrain(stage, preset, settings=(), **options):
    from bhx.train.recipes import recipe

    recipe(stage, preset, **dict(settings))  # refuses settings before torch is imported
    bhx.pretrain(stage=stage, preset=preset, **options, **dict(settings))
    print(f"weights in {options['out']}")


def _embed(commands):
    text = "turn every subject of a cohort into tokens"
    example = "sample latents.zarr --reparcellate --keep attention"
    command = _command(commands, "embed", _run_embed, text, example)
    add = command.add_argument
    add("cohort", type=_cohort, help="catalogue entry, such as synthetic; or a store or folder")
    add("out", type=_output, help="store to write, or to continue")
    add("--model", type=_weights, default="workshop", help="shipped name, folder or release:FOLDER")
    text = f"what to store beside the hub tokens: {listed(KEEP)}"
    add("--keep", nargs="+", choices=KEEP, metavar="WHAT", help=text)
    add("--reparcellate", action="store_true", help="average to the parcels that the model reads")
    add("--device", type=_device, help="cpu, cuda, cuda:N or mps; a GPU where there is one")


def _run_embed(cohort, out, model, keep=(), reparcellate=False, device=None):
    cohort, network = bhx.open_cohort(cohort), bhx.load_model(model, device=device)
    wanted = network.config.atlas
    found = cohort.attrs.get("atlas", wanted) if "roi" in cohort.dims else wanted
    if found != wanted:
        if not reparcellate:
            fact = f"Expected parcels of {wanted}, which the model '{model}' reads, found {found}"
            raise InputError(fact, f"Add --reparcellate to average them to parcels of {wanted}")
        cohort = bhx.reparcellate(cohort, wanted)
    print(bhx.embed(cohort, network, store=out, keep=keep))


def _evaluate(commands):
    text = "scores of hub tokens beside those of the connectome"
    example = "latents.zarr cohort.zarr --target age sex --groups site"
    command = _command(commands, "evaluate", _run_evaluate, text, example)
    add = command.add_argument
    add("latents", type=_store, help="store that embed wrote")
    add("cohort", type=_cohort, help="the cohort that it was made from")
    add("--target", required=True, nargs="+", help="labels to predict, such as age")
    add("--groups", help="label whose groups are held out whole, such as site")


def _run_evaluate(latents, cohort, target, groups=None):
    import xarray as xr

    from bhx.schema import check, subject_coords

    tokens = check(xr.open_zarr(latents, consolidated=False), "latents")
    for name in [*target, *([groups] if groups else [])]:
        if name not in subject_coords(tokens):
            fact = f"Expected a label of the subjects in '{latents}', found '{name}'"
            raise InputError(fact, f"The labels are {listed(subject_coords(tokens), 30)}")
    ours = bhx.pool(tokens.load())
    control = bhx.connectome(bhx.open_cohort(cohort)).compute()
    scores = [bhx.probe([ours, control], name, groups=groups) for name in target]
    print(bhx.compare(*scores, control=control.attrs["name"]).to_string())


# How the command line is read ---------------------------------------------------------------------


class _Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    def __init__(self, prog):
        super().__init__(prog, width=min(100, shutil.get_terminal_size().columns))


class _Parser(argparse.ArgumentParser):
    """Refuses in one sentence; an option that is not given is left to the function's default."""

    def __init__(self, **options):
        options |= {"formatter_class": _Help, "argument_default": argparse.SUPPRESS}
        super().__init__(**options)

    def error(self, message):
        self.exit(2, f"bhx: {message.rstrip('.')}. See {self.prog} --help.\n")


def _command(commands, name, run, text, example):
    command = commands.add_parser(
        name,
        help=text,
        description=f"{text[0].upper()}{text[1:]}.",
        epilog=f"example:\n  python -m bhx {name} {example}".rstrip(),
    )
    command.set_defaults(run=run)
    return command


def _refused(expected, found, help):
    return argparse.ArgumentTypeError(f"Expected {expected}, found {found}. {help}")


def _number(kind, fits, expected):
    def read(text):
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not fits(value):
            raise _refused(expected, f"'{text}'", "Give another number")
        return value

    return read


_at_least_one = _number(int, lambda n: n >= 1, "a whole number of at least 1")
_at_least_zero = _number(int, lambda n: n >= 0, "a whole number of at least 0")
_above_zero = _number(float, lambda x: 0 < x < float("inf"), "a number above 0")


def _setting(text):
    name, equals, value = text.partition("=")
    if not (name.isidentifier() and equals):
        raise _refused("NAME=VALUE", f"'{text}'", "Write it without spaces, as in steps=200")
    try:
        return name, literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value


def _device(text):
    if not re.fullmatch(r"cpu|cuda(:\d+)?|mps", text):
        raise _refused("cpu, cuda, cuda:N or mps", f"'{text}'", "Name one of these devices")
    return text


def _file(text):
    if not Path(text).is_file():
        raise _refused("a file", f"none at '{text}'", "Name one that exists")
    return text


def _folder(text):
    if not Path(text).is_dir():
        raise _refused("a folder", f"none at '{text}'", "Name one that exists")
    return text


def _output(text):
    """A path that can be written: tried in the nearest folder that is there already."""
    path = Path(text).absolute()
    nearest = next(p for p in (path, *path.parents) if p.exists())
    try:
        tempfile.TemporaryFile(dir=nearest.parent if path.is_file() else nearest).close()
    except OSError as error:
        found = f"'{nearest}' ({error.strerror})"
        raise _refused(f"a place to write '{text}'", found, "Name a folder of yours") from None
    return text


def _store(text):
    if not (Path(text) / "zarr.json").is_file():
        found = "another folder" if Path(text).is_dir() else "none"
        help = "Name a folder that prepare or embed wrote"
        raise _refused(f"a zarr store at '{text}'", found, help)
    return text


def _source(text):
    entries = catalogue_names()
    if text not in entries and not Path(text).is_dir():
        help = f"Name a folder that exists, or one of {listed(entries, 30)}"
        raise _refused("a catalogue entry or a folder", f"'{text}'", help)
    return text


def _cohort(text):
    return _store(text) if Path(text).suffix == ".zarr" else _source(text)


def _weights(text):
    folder = Path(text.removeprefix("release:")).expanduser()
    if text not in shipped_weights() and not folder.is_dir():
        help = f"Name {listed(shipped_weights())}, a folder of pretrain, or release:FOLDER"
        raise _refused("weights", f"none at '{text}'", help)
    return text


def catalogue_names() -> list[str]:
    """Names of the catalogue's entries, read off the names of their files."""
    folders = [PACKAGE / "data_catalog", PACKAGE.parent / "data_catalog"]
    folders += [Path(own)] if (own := os.environ.get("BHX_CATALOG")) else []
    return sorted({file.stem for folder in folders for file in folder.glob("*.yaml")})


def shipped_weights() -> list[str]:
    """Names of the weights that come with bhx."""
    return sorted(path.parent.name for path in PACKAGE.glob("weights/*/config.json"))


if __name__ == "__main__":
    sys.exit(main())
