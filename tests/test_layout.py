"""The corridor: which file of bhx may import which, and what a file may not do."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
from functools import cache
from io import StringIO
from pathlib import Path
from tokenize import COMMENT, DEDENT, ENDMARKER, INDENT, NEWLINE, NL, generate_tokens

import pytest

import bhx

PACKAGE = Path(bhx.__file__).parent
REPO = PACKAGE.parent

# The sentence: each room imports only rooms before it, each file only files before it in its room.
ROOMS = {
    "": ("errors", "settings"),
    "modalities": ("base", "bold", "coupling", "running", "t1", "cubes", "table"),
    "./": ("schema",),  # what the table of modalities allows
    "data": (
        *(
            "files",
            "labels",
            "atlas",
            "geometry",
            "parcellation",
            "derivatives",
            "catalog",
            "page",
            "quality",
            "tables",
        ),
        *(
            "quality_page",
            "bold",
            "anatomy",
            "store",
            "prepare",
            "brains",
            "synthetic",
            "cohort",
            "splits",
        ),
    ),
    "model": (
        *("layers", "structure", "dynamics", "harmonizer", "hub", "config", "released"),
        *("published", "checkpoints"),
    ),
    "encode": ("processes", "inputs", "model", "embed", "stream"),
    "train": ("recipes", "dataset", "objectives", "log", "loop", "pretrain"),
    "latents": ("pool", "similarity", "maps", "gradients", "lesions"),
    "evaluate": (
        *("metrics", "options", "confounds", "features", "estimators", "rows", "folds", "task"),
        *("probe", "scores", "report", "fine_tuning"),
    ),
    "show": (
        *("colors", "surface", "volume", "tokens", "people", "hidden", "answers", "figures"),
        *("fit", "panels", "offline", "explorer"),
    ),
}
LAST = ("demo", "doctor", "__main__")
CORRIDOR = [f"{room}.{file}".lstrip("./") for room, files in ROOMS.items() for file in files]
CORRIDOR += LAST
AT_MOST_LINES = 11690
AT_MOST = {"file": 400, "function": 60}  # lines of code

# What still breaks a rule below. These lists only get shorter: nothing is added, and what has been
# mended is deleted (the tests ask for it).
STILL_NAME_A_MODALITY = ("data.derivatives",)
STILL_LONG_FILES = ()
STILL_LONG_FUNCTIONS = ()

SOURCES = [p for room in ROOMS for p in (PACKAGE / room).glob("*.py")]
there = sorted({".".join(p.relative_to(PACKAGE).with_suffix("").parts) for p in SOURCES})
there = [name for name in there if not name.endswith("__init__")]
every_file = pytest.mark.parametrize("file", there)


def room_of(file: str) -> str:
    return file.rpartition(".")[0]


@cache
def tree(file: str) -> ast.Module:
    return ast.parse(path_of(file).read_text(encoding="utf-8"))


def path_of(file: str) -> Path:
    return PACKAGE / f"{file.replace('.', '/')}.py"


def imports(node: ast.AST):
    """(module, names) of every import below a node."""
    for found in ast.walk(node):
        if isinstance(found, ast.Import):
            for alias in found.names:
                yield alias.name, ()
        elif isinstance(found, ast.ImportFrom):
            assert not found.level, "one style: bhx is imported by its whole name"
            yield found.module, tuple(alias.name for alias in found.names)


def files_imported(node: ast.AST) -> set[str]:
    """Names of the bhx files that the imports below a node load."""
    home = {name: file for file, names in bhx.PUBLIC.items() for name in names}
    files = set()
    for module, names in imports(node):
        where = module.split(".")
        if where[0] != "bhx":
            continue
        if len(where) == 1:
            files |= {home.get(name, name) for name in names} - {"__version__"}
        elif len(where) == 2 and where[1] in ROOMS:
            files |= {f"{where[1]}.{name}" for name in names}
        else:
            files.add(".".join(where[1:]))
    return files


def packages_imported(node: ast.AST) -> set[str]:
    return {module.split(".")[0] for module, _ in imports(node)}


def without_functions(module: ast.Module) -> ast.Module:
    """What runs when a file is loaded: everything but the bodies of its functions."""

    class Drop(ast.NodeTransformer):
        def visit_FunctionDef(self, node):
            return ast.copy_location(ast.Pass(), node)

        visit_AsyncFunctionDef = visit_FunctionDef

    return Drop().visit(ast.parse(ast.unparse(module)))


def public_definitions(file: str) -> list[ast.FunctionDef | ast.ClassDef]:
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    return [n for n in tree(file).body if isinstance(n, kinds) and not n.name.startswith("_")]


def test_every_file_has_its_place():
    assert set(there) <= set(CORRIDOR), f"not in the corridor: {set(there) - set(CORRIDOR)}"
    folders = {p.name for p in PACKAGE.iterdir() if p.is_dir() and p.name != "__pycache__"}
    assert folders <= {*ROOMS, "assets", "weights", "data_catalog"}


def test_readme_lists_every_file_in_order():
    listed = re.findall(r"(?m)^ {6,8}(\w+)\.py ", (REPO / "README.md").read_text(encoding="utf-8"))
    assert listed == [file.rpartition(".")[2] for file in CORRIDOR]


@every_file
def test_arrows_point_one_way(file):
    before = set(CORRIDOR[: CORRIDOR.index(file)])
    assert files_imported(tree(file)) <= before


@every_file
def test_no_private_name_of_another_file(file):
    for module, names in imports(tree(file)):
        if module.split(".")[0] == "bhx":
            private = [n for n in names if n.startswith("_") and not n.startswith("__")]
            assert not private, f"{file} imports {private} of {module}"


@every_file
def test_data_wing_never_imports_torch(file):
    if room_of(file) in ("", "modalities", "data") and file not in LAST:
        assert not packages_imported(tree(file)) & {"torch", "safetensors", "captum"}


@every_file
def test_model_wing_knows_no_labels(file):
    if room_of(file) == "model":
        assert not packages_imported(tree(file)) & {"xarray", "dask", "zarr", "pandas"}
        rooms = {room_of(f) or f for f in files_imported(tree(file))}
        assert rooms <= {"model", "modalities", "errors", "settings"}


@every_file
def test_reading_rooms_load_without_torch(file):
    runs_networks = file in ("show.hidden", "evaluate.fine_tuning", "demo")
    if room_of(file) in ("latents", "evaluate", "show") and not runs_networks:
        loaded = without_functions(tree(file))
        assert "torch" not in packages_imported(loaded)
        assert not {room_of(f) for f in files_imported(loaded)} & {"model", "encode", "train"}


@every_file
def test_no_public_name_is_a_room(file):
    assert not {node.name for node in public_definitions(file)} & {*ROOMS, "errors", "schema"}


@every_file
def test_docstrings(file):
    assert ast.get_docstring(tree(file)), f"{file}.py does not say what is in it"
    bare = [node.name for node in public_definitions(file) if not ast.get_docstring(node)]
    assert not bare, f"without a docstring: {bare}"


# Only bhx/modalities/ knows which modalities there are --------------------------------------------

MODALITY_NAMES = ("bold", "t1", "has_bold", "has_t1", "hub_to_roi", "hub_to_t1")
MODALITY_WORD = re.compile(rf"(?<!\w)({'|'.join(MODALITY_NAMES)})(?!\w)")


def modality_names(module: ast.Module) -> list[tuple[int, str]]:
    """(line, text) of each string and attribute that names a modality; docstrings may."""
    silent = {id(n.value) for n in ast.walk(module) if isinstance(n, ast.Expr)}
    found = []
    for node in ast.walk(module):
        if isinstance(node, ast.Attribute) and node.attr in MODALITY_NAMES:
            found.append((node.lineno, f".{node.attr}"))
        elif isinstance(node, ast.Constant) and id(node) not in silent:
            text = node.value if isinstance(node.value, str) else ""
            found += [(node.lineno, text)] if MODALITY_WORD.search(text) else []
    return sorted(found)


def test_modalities_are_named_in_their_room_alone():
    named = {f: modality_names(tree(f)) for f in there if room_of(f) != "modalities"}
    only_known({file for file, found in named.items() if found}, STILL_NAME_A_MODALITY, named)


@pytest.mark.parametrize(
    "line, expected",
    [
        ("cohort['bold']", ["bold"]),
        ("cohort.has_t1", [".has_t1"]),
        ("print(f'{x} of hub_to_roi')", [" of hub_to_roi"]),
        ("help = 'cohort.t1.sel(subject=...)'", ["cohort.t1.sel(subject=...)"]),
        ("open('task-rest_bold.nii')", []),
        ("print('bolder')", []),
        ("bold = patchify(bold, t1=None)  # bold", []),
        ("from bhx.modalities.bold import BOLD", []),
        ("def read():\n    'Volumes of bold.'", []),
    ],
)
def test_what_counts_as_naming_a_modality(line, expected):
    assert [text for _, text in modality_names(ast.parse(line))] == expected


def only_known(found: set[str], known: tuple[str, ...], detail) -> None:
    """A rule is broken by those of its list alone, and by each of them."""
    new = sorted(found - set(known))
    assert not new, "\n".join(f"{name}: {detail[name]}" for name in new)
    mended = sorted(set(known) - found)
    assert not mended, f"mended, so delete from the list in {Path(__file__).name}: {mended}"


# Size --------------------------------------------------------------------------------------------


def test_library_is_small():
    assert sum(map(code_lines, there)) < AT_MOST_LINES


def test_files_are_short():
    sizes = {file: code_lines(file) for file in there}
    long = {file for file, n in sizes.items() if n > AT_MOST["file"]}
    only_known(long, STILL_LONG_FILES, sizes)


def test_functions_are_short():
    every = sorted((n, f"{file}.{name}") for file in there for name, n in function_sizes(file))
    sizes = {name: n for n, name in every}  # the longest of one name
    long = {name for name, n in sizes.items() if n > AT_MOST["function"]}
    only_known(long, STILL_LONG_FUNCTIONS, sizes)


def function_sizes(file: str) -> list[tuple[str, int]]:
    """(name, lines of code) of every function and method of a file."""
    lines = lines_with_code(file)
    functions = (ast.FunctionDef, ast.AsyncFunctionDef)
    found = [node for node in ast.walk(tree(file)) if isinstance(node, functions)]
    return [(n.name, len(lines & set(range(n.lineno, n.end_lineno + 1)))) for n in found]


def code_lines(file: str) -> int:
    """Number of lines that hold code."""
    return len(lines_with_code(file))


@cache
def lines_with_code(file: str) -> set[int]:
    """Lines that hold code: no blank ones, comments or docstrings."""
    source = path_of(file).read_text(encoding="utf-8")
    quiet = {COMMENT, NL, NEWLINE, INDENT, DEDENT, ENDMARKER}
    tokens = [t for t in generate_tokens(StringIO(source).readline) if t.type not in quiet]
    code = {line for t in tokens for line in range(t.start[0], t.end[0] + 1)}
    for node in ast.walk(tree(file)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(
            node
        ):
            code -= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    return code


@pytest.mark.parametrize("name", [n for names in bhx.PUBLIC.values() for n in names])
def test_public_names_resolve(name):
    file = next(file for file, names in bhx.PUBLIC.items() if name in names)
    found = getattr(bhx, name)
    assert found is getattr(importlib.import_module(f"bhx.{file}"), name)
    assert found.__doc__
    assert name in dir(bhx)
    assert name in bhx.__all__


def test_names_for_type_checkers_are_the_table():
    stub = ast.parse((PACKAGE / "__init__.pyi").read_text(encoding="utf-8"))
    repeated = {(m.removeprefix("bhx."), n) for m, names in imports(stub) for n in names}
    table = {(file, name) for file, names in bhx.PUBLIC.items() for name in names}
    own = {("errors", "InputError"), ("settings", "__version__"), ("settings", "folders")}
    assert repeated == table | own


def test_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no 'harmonise'"):
        _ = bhx.harmonise


def test_import_is_light():
    code = (
        "import sys, time; start = time.perf_counter(); import bhx;"
        "print(time.perf_counter() - start, *({'torch', 'xarray', 'numpy'} & set(sys.modules)))"
    )
    run = [sys.executable, "-c", code]
    printed = [subprocess.check_output(run, cwd=REPO, text=True).split() for _ in range(5)]
    assert not printed[0][1:], "loaded by import bhx"
    assert min(float(seconds) for seconds, *_ in printed) < 0.3


# Written in pieces, so that this file does not find itself.
FORBIDDEN = re.compile(
    "|".join(
        (
            r"(?<![\w.])/(?:wo" + r"rk|ro" + r"ot|ho" + r"me/\w+|Us" + r"ers/\w+)/",
            r"(?<![\w.])/t" + r"mp/",
            r"py" + r"pi\.org|pythonho" + r"sted|anaco" + r"nda\.org|registry\.np" + r"mjs",
            r"download\.pyto" + r"rch|deb\.deb" + r"ian|crat" + r"es\.io|proxy\.gol" + r"ang",
        )
    )
)


def project_files() -> list[Path]:
    try:
        listed = subprocess.run(
            ["git", "ls-files", "-z"], cwd=REPO, capture_output=True, check=True, text=True
        ).stdout
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout")
    return [REPO / name for name in listed.split("\0") if name and (REPO / name).is_file()]


def test_no_machine_path_or_registry_host():
    found = []
    for path in project_files():
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        found += [f"{path.relative_to(REPO)}: {hit.group()}" for hit in FORBIDDEN.finditer(text)]
    assert not found
