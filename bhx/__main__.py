"""python -m bhx: one subcommand a job. Each is a function that runs, and a table of its options.

Whatever can be seen without reading data (paths, names, numbers) is checked while the command line
is read, before a heavy package is imported. No computation may be here.
"""

from __future__ import annotations

import argparse
import inspect
import json
import os
import re
import shutil
import sys
import tempfile
from ast import literal_eval
from pathlib import Path

import bhx
from bhx.errors import InputError, check_choice, listed
from bhx.settings import PACKAGE

# Repeated here, where nothing heavy is imported; tests/test_commands.py compares them.
ATLASES = ("schaefer100", "schaefer200", "schaefer400")
ORDERS = ("7networks", "17networks")
STAGES = ("structure", "dynamics", "harmonizer")
PRESETS = ("workshop", "small", "base", "paper")
KEEP = ("dynamics", "coupling", "structure", "cubes", "attention")
ENTRY_ATLAS = {"sample": "schaefer400", "synthetic": "schaefer100"}


def main(argv=None) -> int:
    """Run one subcommand; 0 is success, 1 a failure it reports, 2 input that does not fit."""
    options = vars(_parser().parse_args(argv))
    run = options.pop("run")
    try:
        return run(**options) or 0
    except InputError as error:
        print(f"bhx: {error}", file=sys.stderr)
        return 2
    except OSError as error:  # a full disk, a right that was taken away
        print(f"bhx: stopped by the system: {error}", file=sys.stderr)
        return 1


# The jobs: the help of each is its docstring -----------------------------------------------------


def _doctor():
    """Versions, device and memory; what is missing.

    example:
      python -m bhx doctor
    """
    from bhx.doctor import doctor

    return doctor()


def _demo(**options):
    """A real scan and a cohort: tokens, scores and one page of figures.

    example:
      python -m bhx demo --out demo --subjects 60
    """
    from bhx.demo import run_demo

    run_demo(**options)


def _catalog(catalog=None):
    """List and check the entries of the catalog.

    example:
      python -m bhx catalog --catalog my_entries
    """
    print(bhx.catalog_table(catalog).to_string())


def _prepare(quality=None, **options):
    """Read the files of a study into one checked store.

    example:
      python -m bhx prepare derivatives cohort.zarr --atlas schaefer100 --quality page.html
    """
    cohort = bhx.prepare(**options)
    print(f"{cohort.sizes['subject']} subjects in {options['out']}")
    for subject, reason in cohort.attrs["refused"].items():
        print(f"left out: {subject}: {reason}")
    if quality:
        print(f"quality page {bhx.quality_page(cohort, quality)}")


def _pretrain(stage, preset, settings=(), **options):
    """Train one part of a model on a cohort; also under torchrun.

    example:
      python -m bhx pretrain cohort.zarr --stage structure --out run --set steps=200 batch=8
    """
    from bhx.train.recipes import recipe

    recipe(stage, preset, **dict(settings))  # refuses settings before torch is imported
    bhx.pretrain(stage=stage, preset=preset, **options, **dict(settings))
    print(f"weights in {options['out']}")


def _embed(cohort, out, model, keep=(), reparcellate=False, device=None):
    """Turn every subject of a cohort into tokens.

    example:
      python -m bhx embed sample latents.zarr --reparcellate --keep attention
    """
    config = _config_of(model)
    if keep and (read := config.get("harmonizer", {}).get("modalities", ())):
        from bhx.modalities.table import MODALITIES

        kept = [*(MODALITIES[name].tokens for name in read if name in MODALITIES), "attention"]
        for name in keep:
            check_choice("--keep", name, kept)
    if not reparcellate:
        _check_parcels(_parcels_of(cohort), config.get("atlas", ""), model)
    data, network = bhx.open_cohort(cohort), bhx.load_model(model, device=device)
    found, wanted = data.attrs.get("atlas") if "roi" in data.dims else "", network.config.atlas
    if found and found != wanted and reparcellate:
        data = bhx.reparcellate(data, wanted)
    else:
        _check_parcels(found, wanted, model)
    print(bhx.embed(data, network, store=out, keep=keep))


def _check_parcels(found, wanted, model):
    if found and wanted and found != wanted:
        fact = f"Expected parcels of {wanted}, which the model '{model}' reads, found {found}"
        raise InputError(fact, f"Add --reparcellate to average them to parcels of {wanted}")


def _parcels_of(source):
    """The atlas of a store as its JSON has it, or of an entry; "" where more must be read."""
    store = Path(source, "zarr.json")
    if store.is_file():
        attrs = json.loads(store.read_text("utf-8"))["attributes"]
        return attrs.get("atlas", "") if Path(source, "roi").is_dir() else ""
    return ENTRY_ATLAS.get(source, "")


def _config_of(model):
    """The configuration of weights in a folder, or of shipped ones; empty where more is read."""
    for folder in (PACKAGE / "weights" / model, Path(model)):
        if (folder / "config.json").is_file():
            return json.loads((folder / "config.json").read_text("utf-8"))["config"]
    return {}


def _evaluate(latents, cohort, target, groups=None):
    """Score hub tokens beside the connectome.

    example:
      python -m bhx evaluate latents.zarr cohort.zarr --target age sex --groups site
    """
    from bhx.data.store import open_store
    from bhx.schema import subject_coords

    tokens = open_store(latents, "latents")
    for name in [*target, *([groups] if groups else [])]:
        if name not in subject_coords(tokens):
            fact = f"Expected a label of the subjects in '{latents}', found '{name}'"
            raise InputError(fact, f"The labels are {listed(subject_coords(tokens), 30)}")
    ours = bhx.pool(tokens.load())
    control = bhx.connectome(bhx.open_cohort(cohort)).compute()
    scores = [bhx.probe([ours, control], name, groups=groups) for name in target]
    print(bhx.compare(*scores, control=control.attrs["name"]).to_string())


def _explore(latents, out):
    """One page of people, cortex and tokens, opened in a browser.

    example:
      python -m bhx explore latents.zarr --out explorer.html
    """
    import webbrowser

    from bhx.data.store import open_store

    page = bhx.explore(open_store(latents, "latents")).save(out).resolve()
    print(f"page {page}")
    webbrowser.open(page.as_uri())


# What an option may be ----------------------------------------------------------------------------


def _of(expected, help, fits, kind=str):
    """A reader of one option, which refuses what does not fit and says what would."""

    def read(text):
        try:
            if fits(value := kind(text)):
                return value
        except ValueError:
            pass
        raise argparse.ArgumentTypeError(f"Expected {expected}, found '{text}'. {help}")

    return read


def _is_store(text):
    return Path(text, "zarr.json").is_file()


def _is_latents(text):
    return _is_store(text) and Path(text, "hub").is_dir()


def _is_source(text):
    return text in catalog_names() or Path(text).is_dir()


def _is_stored_cohort(text):
    return _is_store(text) and not _is_latents(text)


def _is_cohort(text):
    stored = Path(text).suffix == ".zarr" or _is_store(text)
    return _is_stored_cohort(text) if stored else _is_source(text)


def _are_weights(text):
    return text in shipped_weights() or Path(text.removeprefix("release:")).expanduser().is_dir()


def catalog_names() -> list[str]:
    """Names of the catalog's entries, read off the names of their files."""
    folders = [PACKAGE / "data_catalog", PACKAGE.parent / "data_catalog"]
    folders += [Path(own)] if (own := os.environ.get("BHX_CATALOG")) else []
    return sorted({file.stem for folder in folders for file in folder.glob("*.yaml")})


def shipped_weights() -> list[str]:
    """Names of the weights that come with bhx."""
    return sorted(path.parent.name for path in PACKAGE.glob("weights/*/config.json"))


THERE = "Name one that exists"
ENTRIES = f"Name a folder that exists, or one of {listed(catalog_names(), 30)}"
WEIGHTS = f"Name {listed(shipped_weights())}, a folder of pretrain, or release:FOLDER"
COUNT = _of("a whole number of at least 1", "Give 1, 2, 3 or more", lambda n: n >= 1, int)
COUNT_OR_0 = _of("a whole number of at least 0", "Give 0, 1 or more", lambda n: n >= 0, int)
ABOVE_0 = _of("a number above 0", "Give one such as 2", lambda x: 0 < x < float("inf"), float)
FILE = _of("a file", THERE, os.path.isfile)
FOLDER = _of("a folder", THERE, os.path.isdir)
STORE = _of("a stored cohort", "Name a folder that prepare wrote", _is_stored_cohort)
LATENTS = _of("stored latents", "Name a folder that embed wrote", _is_latents)
SOURCE = _of("a catalog entry or a folder", ENTRIES, _is_source)
COHORT = _of("a stored cohort, a catalog entry or a folder", ENTRIES, _is_cohort)
MODEL = _of("weights", WEIGHTS, _are_weights)
IS_DEVICE = re.compile(r"cpu|cuda(:\d+)?|mps").fullmatch
DEVICE = _of("cpu, cuda, cuda:N or mps", "Name one of these devices", IS_DEVICE)


def _output(text):
    """A path that can be written: tried in the nearest folder that is there already."""
    path = Path(text).absolute()
    nearest = next(p for p in (path, *path.parents) if p.exists())
    try:
        tempfile.TemporaryFile(dir=nearest.parent if path.is_file() else nearest).close()
    except OSError as error:
        found = f"'{nearest}' ({error.strerror}). Name a folder of yours"
        fact = f"Expected a place to write '{text}', found {found}"
        raise argparse.ArgumentTypeError(fact) from None
    return text


def _setting(text):
    name, equals, value = text.partition("=")
    if not (name.isidentifier() and equals):
        fact = f"Expected NAME=VALUE, found '{text}'. Write it without spaces, as in steps=200"
        raise argparse.ArgumentTypeError(fact)
    try:
        return name, literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value


# The command line ---------------------------------------------------------------------------------


class _Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    def __init__(self, prog):
        super().__init__(prog, width=min(100, shutil.get_terminal_size((100, 24)).columns))


class _Parser(argparse.ArgumentParser):
    """Refuses in one sentence; an option that is not given is left to the function's default."""

    def __init__(self, **options):
        options |= {"formatter_class": _Help, "argument_default": argparse.SUPPRESS}
        super().__init__(**options)

    def error(self, message):
        self.exit(2, f"bhx: {message.rstrip('.')}. See {self.prog} --help.\n")


def _atlas(text):
    """A shipped atlas, or a path of one."""
    if text in ATLASES or text.endswith((".nc", ".zarr")):
        return text
    known = listed([*ATLASES, "or the path of a saved one"])
    raise argparse.ArgumentTypeError(f"invalid choice: '{text}' (choose from {known})")


def _parser():
    about = {"description": bhx.__doc__.splitlines()[0], "epilog": "examples:"}
    parser = _Parser(prog="python -m bhx", **about)
    parser.add_argument("--version", action="version", version=f"bhx {bhx.__version__}")
    commands = parser.add_subparsers(metavar="command", required=True)

    def command(run):
        text = inspect.cleandoc(run.__doc__)
        parser.epilog += "\n" + text.splitlines()[-1]
        names = {"name": run.__name__.strip("_"), "help": text.split(".")[0], "description": text}
        added = commands.add_parser(**names)
        added.set_defaults(run=run)
        return added.add_argument

    command(_doctor)

    add = command(_demo)
    add("--out", type=_output, default="demo", help="folder to write")
    add("--subjects", type=COUNT, help="how many of the synthetic cohort; all if not given")

    add = command(_catalog)
    add("--catalog", type=FOLDER, help="folder with entries of your own")

    add = command(_prepare)
    add("source", type=SOURCE, help="catalog entry, or folder of derivatives (fMRIPrep-like)")
    add("out", type=_output, help="store to write, or to continue")
    add("--workers", type=COUNT, default=2, help="subjects read at a time")
    add("--scheduler", dest="client", help="address of a Dask cluster, instead of threads here")
    add("--atlas", type=_atlas, default="schaefer400", help="a shipped or saved one (.nc, .zarr)")
    add("--order", choices=ORDERS, help="order of tables whose columns have no names")
    add("--parcels-in", choices=("rows", "columns"), help="of tables, where it does not show")
    add("--labels", type=FILE, help="label image or file, instead of the atlas's own")
    add("--voxel-mm", type=ABOVE_0, default=1.0, help="voxel of stored volumes [mm]")
    add("--task", default="rest", help="task in the names of the files")
    add("--phenotypes", type=FILE, help="table of participants, with their labels")
    off = {"action": "store_const", "const": None, "dest": "denoising"}
    add("--no-denoising", **off, help="the scans are denoised already")
    add("--quality", type=_output, metavar="HTML", help="write the page of quality checks here")

    add = command(_pretrain)
    add("cohort", type=STORE, help="store that prepare or bhx.save_cohort wrote")
    add("--stage", required=True, choices=STAGES, help="which part, in this order")
    add("--out", required=True, type=_output, help="folder of the run, shared by the stages")
    add("--preset", choices=PRESETS, default="workshop", help="size of the model")
    add("--model", type=MODEL, help="weights to start from, instead of those in OUT or random")
    add("--workers", type=COUNT_OR_0, default=0, help="processes that read ahead")
    add("--device", type=DEVICE, help="cpu, cuda, cuda:N or mps; a GPU where there is one")
    add("--resume", action="store_true", help="continue from the last checkpoint in OUT")
    several = {"nargs": "+", "type": _setting, "metavar": "NAME=VALUE", "dest": "settings"}
    add("--set", **several, help="other settings of the training, such as steps=200")

    add = command(_embed)
    add("cohort", type=COHORT, help="catalog entry, such as synthetic; or a store or folder")
    add("out", type=_output, help="store to write, or to continue")
    add("--model", type=MODEL, default="workshop", help="shipped name, folder or release:FOLDER")
    add("--keep", nargs="+", choices=KEEP, metavar="WHAT", help=f"to store too: {listed(KEEP)}")
    add("--reparcellate", action="store_true", help="average to the parcels that the model reads")
    add("--device", type=DEVICE, help="cpu, cuda, cuda:N or mps; a GPU where there is one")

    add = command(_evaluate)
    add("latents", type=LATENTS, help="store that embed wrote")
    add("cohort", type=COHORT, help="the cohort that it was made from")
    add("--target", required=True, nargs="+", help="labels to predict, such as age")
    add("--groups", help="label whose groups are held out whole, such as site")

    add = command(_explore)
    add("latents", type=LATENTS, help="store that embed wrote with --keep attention")
    add("--out", type=_output, default="explorer.html", help="page to write; it needs no network")
    return parser


if __name__ == "__main__":
    sys.exit(main())
