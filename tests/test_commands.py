"""The command line: what does not fit is refused in one sentence, before anything heavy loads."""

from __future__ import annotations

import inspect
import os
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import xarray as xr

import bhx
from bhx import __main__ as commands
from bhx.__main__ import main
from bhx.data.catalog import catalog_files
from bhx.modalities.table import MODALITIES
from bhx.model.config import PRESETS
from bhx.train.recipes import STAGES

NAMES = ("doctor", "demo", "catalog", "prepare", "pretrain", "embed", "evaluate", "explore")


def refused(line, folder, capsys) -> str:
    """What a command line that does not fit prints."""
    where = os.getcwd()
    os.chdir(folder)
    try:
        code = main(shlex.split(line))
    except SystemExit as ended:
        code = ended.code
    finally:
        os.chdir(where)
    assert code == 2
    return capsys.readouterr().err


@pytest.fixture
def folder(tmp_path):
    """A folder with an empty cohort, empty latents and a text file."""
    (tmp_path / "store.zarr").mkdir()
    (tmp_path / "store.zarr" / "zarr.json").write_text('{"attributes": {}}')
    (tmp_path / "latents.zarr" / "hub").mkdir(parents=True)
    (tmp_path / "latents.zarr" / "zarr.json").write_text('{"attributes": {}}')
    (tmp_path / "note.txt").write_text("not a folder")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").touch()
    return tmp_path


REFUSED = {  # command line -> what its sentence says
    "evaluate missing.zarr synthetic --target age": "stored latents, found 'missing.zarr'",
    "evaluate store.zarr synthetic --target age": "stored latents, found 'store.zarr'",
    "evaluate latents.zarr missing.zarr --target age": "a stored cohort, .* found 'missing.zarr'",
    "evaluate latents.zarr latents.zarr --target age": "a stored cohort, .* found 'latents.zarr'",
    "evaluate latents.zarr synthetic": "arguments are required: --target",
    "embed synthetic note.txt/out.zarr": r"write 'note.txt/out.zarr', found '.*note.txt'",
    "embed synthetik out.zarr": "found 'synthetik'. Name a folder that exists, or one of abcd, .*",
    "embed sample out.zarr": "parcels of schaefer100.*found schaefer400. Add --reparcellate",
    "embed synthetic out.zarr --model shop": "weights, found 'shop'. Name paper, workshop, a fo",
    "embed synthetic out.zarr --keep hub": "invalid choice: 'hub'.*coupling.*attention",
    "embed synthetic out.zarr --keep dynamics": "keep to be coupling, cubes, attention, found 'dyn",
    "embed synthetic out.zarr --device gpu": "Expected cpu, cuda, cuda:N or mps, found 'gpu'",
    "pretrain missing.zarr --stage structure --out o": "a stored cohort, found 'missing.zarr'",
    "pretrain latents.zarr --stage structure --out o": "a stored cohort, found 'latents.zarr'",
    "explore store.zarr": "stored latents, found 'store.zarr'. Name a folder that embed wrote",
    "pretrain store.zarr --stage hub --out o": "invalid choice: 'hub'.*harmonizer",
    "pretrain store.zarr --stage dynamics --out note.txt/o": "write 'note.txt/o'",
    "pretrain store.zarr --stage dynamics --out o --preset big": "invalid choice: 'big'.*workshop",
    "pretrain store.zarr --stage dynamics --out o --set steps": "NAME=VALUE, found 'steps'",
    "pretrain store.zarr --stage dynamics --out o --set steps=-1": "steps .* found -1",
    "pretrain store.zarr --stage dynamics --out o --set steps=few": "steps .* found 'few'",
    "pretrain store.zarr --stage dynamics --out o --set stepz=3": "settings of .*, found stepz",
    "pretrain store.zarr --stage dynamics --out o --workers -1": "at least 0, found '-1'",
    "prepare missing out.zarr": "a catalog entry or a folder, found 'missing'",
    "prepare . out.zarr --voxel-mm 0": "a number above 0, found '0'. Give one such as 2",
    "prepare . out.zarr --workers none": "a whole number of at least 1, found 'none'",
    "prepare . out.zarr --atlas schaefer300": "invalid choice: 'schaefer300'.*schaefer400",
    "prepare . out.zarr --phenotypes people.tsv": "a file, found 'people.tsv'",
    "catalog --catalog missing": "a folder, found 'missing'",
    "demo --out note.txt/demo": "write 'note.txt/demo'",
    "demo --subjects 0": "at least 1, found '0'. Give 1, 2, 3 or more",
    "demo --out full": "an empty folder or one of an earlier demo, found files in 'full'",
    "embed": "the following arguments are required: cohort, out",
    "teach": "invalid choice: 'teach'",
}


@pytest.mark.parametrize("line", REFUSED)
def test_what_does_not_fit_is_refused_in_one_line(line, folder, capsys):
    message = refused(line, folder, capsys)
    assert re.search(REFUSED[line], message)
    assert message.startswith("bhx: ")
    assert message.count("\n") == 1
    assert not (folder / "out.zarr").exists()


def test_refusals_come_before_heavy_packages(folder):
    code = "import sys\nfrom bhx.__main__ import main\nfor line in sys.argv[1:]:\n"
    code += "    try:\n        assert main(line.split()) == 2\n"
    code += "    except SystemExit as ended:\n        assert ended.code == 2\n"
    code += "print(*sorted({'torch', 'xarray', 'pandas', 'zarr', 'sklearn'} & set(sys.modules)))"
    started = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", code, *REFUSED], cwd=folder, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []
    assert time.perf_counter() - started < 2 * len(REFUSED)


def test_a_place_that_cannot_be_written_is_named(folder, capsys, monkeypatch):
    def no_right(dir):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(commands.tempfile, "TemporaryFile", no_right)
    message = refused("embed synthetic out.zarr", folder, capsys)
    assert re.search(r"place to write 'out.zarr', found '.+' \(Permission denied\)", message)


def test_what_the_system_refuses_is_one_line(monkeypatch, capsys):
    def full(*_):
        raise OSError(28, "No space left on device", "out.zarr")

    monkeypatch.setattr(commands.bhx, "catalog_table", full, raising=False)
    assert main(["catalog"]) == 1
    assert capsys.readouterr().err.endswith("No space left on device: 'out.zarr'\n")


# Help --------------------------------------------------------------------------------------------


def helped(name, capsys) -> str:
    with pytest.raises(SystemExit) as ended:
        main([name, "--help"] if name else ["--help"])
    assert ended.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("name", NAMES)
def test_help_has_an_example_and_short_lines(name, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    text = helped(name, capsys)
    assert max(map(len, text.splitlines())) <= 100
    assert "None" not in text
    (example,) = re.findall(r"example:\n  python -m bhx (.+)", text)
    options = commands._parser().parse_args
    assert example.split()[0] == name
    if name in ("embed", "demo", "doctor"):  # the others name files that must be there
        assert options(example.split()).run


def test_help_names_choices_and_defaults(capsys):
    text = " ".join(helped("pretrain", capsys).split())
    assert "{structure,dynamics,harmonizer}" in text
    assert "(default: workshop)" in text
    assert "(default: schaefer400)" in " ".join(helped("prepare", capsys).split())
    overview = helped("", capsys)
    for name in NAMES:  # each with an example
        assert f"\n  python -m bhx {name}" in overview
    wide = "".join(helped(name, capsys) for name in NAMES).splitlines()
    assert 80 < max(map(len, wide)) <= 100


def test_choices_are_those_of_the_library():
    tokens = [modality.tokens for modality in MODALITIES.values()]
    assert {*tokens, "attention"} == set(commands.KEEP)
    assert tuple(STAGES) == commands.STAGES
    assert set(PRESETS) == set(commands.PRESETS)
    assert list(catalog_files()) == commands.catalog_names()
    assert commands.shipped_weights() == ["paper", "workshop"]
    for atlas in commands.ATLASES:
        bhx.load_atlas(atlas)
    for entry, atlas in commands.ENTRY_ATLAS.items():
        assert bhx.open_cohort(entry).attrs["atlas"] == atlas


@pytest.mark.parametrize("name", ["prepare", "pretrain", "embed"])
def test_defaults_are_those_of_the_library(name, folder):
    lines = {
        "prepare": f"prepare {folder} out.zarr",
        "pretrain": f"pretrain {folder}/store.zarr --stage dynamics --out run",
        "embed": "embed synthetic out.zarr",
    }
    given = vars(commands._parser().parse_args(lines[name].split()))
    library = inspect.signature(getattr(bhx, name)).parameters
    library = library | ({"model": inspect.signature(bhx.load_model).parameters["source"]})
    for option, value in given.items():
        if option in library and library[option].default is not inspect.Parameter.empty:
            assert value == library[option].default


# What they do ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cohort(tmp_path_factory):
    """Forty synthetic people of 100 parcels, as a store."""
    path = tmp_path_factory.mktemp("people") / "cohort.zarr"
    bhx.save_cohort(bhx.synthetic_cohort(40, seed=1).compute(), path)
    return path


@pytest.fixture(scope="module")
def latents(cohort):
    path = cohort.with_name("latents.zarr")
    assert main(["embed", str(cohort), str(path), "--keep", "attention"]) == 0
    return path


def test_embed_writes_what_was_asked_for(latents):
    written = xr.open_zarr(latents, consolidated=False)
    assert written.sizes["subject"] == 40
    assert {"hub", "modality_share"} <= set(written.data_vars)


def test_evaluate_prints_the_control_beside_the_tokens(latents, cohort, capsys):
    assert main(["evaluate", str(latents), str(cohort), "--target", "age"]) == 0
    printed = capsys.readouterr().out
    assert "hub tokens, mean" in printed
    assert "connectome" in printed


def test_explore_writes_a_page_and_opens_it(latents, tmp_path, monkeypatch, capsys):
    opened = []
    monkeypatch.setattr("webbrowser.open", opened.append)
    page = tmp_path / "explorer.html"
    assert main(["explore", str(latents), "--out", str(page)]) == 0
    assert opened == [page.as_uri()]
    assert str(page) in capsys.readouterr().out
    assert "sub-0001" in page.read_text(encoding="utf-8")


def test_evaluate_names_the_labels_there_are(latents, cohort, folder, capsys):
    message = refused(f"evaluate {latents} {cohort} --target agee", folder, capsys)
    assert re.search("Expected a label of the subjects in .* found 'agee'. The labels are", message)
    assert "age" in message


def test_parcels_of_another_atlas_can_be_averaged(folder, capsys):
    assert main(["embed", "sample", str(folder / "out.zarr"), "--reparcellate"]) == 0
    written = xr.open_zarr(folder / "out.zarr", consolidated=False)
    assert bool(np.isfinite(written.hub).all())


def test_commands_of_the_package_are_one(folder):
    """`python -m bhx` and the installed script print the same version."""
    line = [sys.executable, "-m", "bhx", "--version"]
    printed = subprocess.check_output(line, text=True, cwd=Path(bhx.__file__).parents[1])
    assert printed == f"bhx {bhx.__version__}\n"
