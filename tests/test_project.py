"""The project around the code: its environment, its wheel, its doctor."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

import bhx
from bhx.__main__ import main

REPO = Path(bhx.__file__).parents[1]
PROJECT = tomllib.loads((REPO / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]
CONDA_NAMES = {"torch": "pytorch"}  # where conda-forge's name is another


def bounds(requirements) -> dict[str, str]:
    """Package -> its version bounds in one spelling."""
    parsed = [Requirement(line) for line in requirements]
    return {CONDA_NAMES.get(r.name, r.name): str(r.specifier) for r in parsed}


@pytest.fixture(scope="module")
def environment() -> dict[str, str]:
    """Package -> bounds in environment.yml, its pip section included."""
    text = (REPO / "environment.yml").read_text(encoding="utf-8")
    lines = yaml.safe_load(text)["dependencies"]
    plain = [line for line in lines if isinstance(line, str)]
    from_pip = next(line["pip"] for line in lines if isinstance(line, dict))
    assert "-e ." in from_pip
    fits = SpecifierSet(PROJECT["requires-python"])
    assert re.fullmatch(r"python =(\d+\.\d+)", plain[0])[1] in fits
    return bounds(line for line in [*plain[1:], *from_pip] if line != "-e .")


def test_environment_is_in_step_with_pyproject(environment):
    asked = bounds([*PROJECT["dependencies"], *EXTRAS["notebooks"], *EXTRAS["test"]])
    assert environment == asked | {"pip": ""}


def test_prescribed_packages_are_there(environment):
    prescribed = (
        "pytorch jupyterlab ipywidgets nibabel nilearn plotly xarray dask scikit-learn nbval"
    )
    assert set(prescribed.split()) <= set(environment)


def test_extras():
    assert set(EXTRAS) == {"notebooks", "test", "book", "weights", "assets", "brainmarks"}


def test_version_is_said_once():
    assert "version" in PROJECT["dynamic"]
    cited = yaml.safe_load((REPO / "CITATION.cff").read_text(encoding="utf-8"))
    assert cited["version"] == bhx.__version__
    changes = (REPO / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.search(r"^## (\S+?),? ", changes, re.M).group(1) == bhx.__version__


def shipped() -> set[str]:
    """Every file of the package and the catalog, by its place in a wheel."""
    places = {REPO / "bhx": "bhx", REPO / "data_catalog": "bhx/data_catalog"}
    places[REPO / "benchmarks" / "brainmarks"] = "brainmarks/models"
    return {
        f"{inside}/{path.relative_to(folder).as_posix()}"
        for folder, inside in places.items()
        for path in folder.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """A wheel built from a copy, so that nothing left over in the repository can slip in."""
    source = tmp_path_factory.mktemp("source")
    for name in ("bhx", "data_catalog", "benchmarks/brainmarks"):
        shutil.copytree(REPO / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPO / name, source)
    pip("wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", source / "dist", source)
    (built,) = (source / "dist").glob("bhx-*.whl")
    return built


def pip(*arguments) -> None:
    command = [sys.executable, "-m", "pip", "--quiet", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_wheel_holds_every_file(wheel):
    inside = {n for n in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in n}
    assert inside == shipped()
    assert {"bhx/py.typed", "bhx/data_catalog/synthetic.yaml"} <= inside


@pytest.fixture(scope="module")
def site(wheel, tmp_path_factory) -> Path:
    """The wheel, unpacked as pip does it, without anything else."""
    folder = tmp_path_factory.mktemp("site")
    pip("install", "--no-deps", "--no-index", "--target", folder, wheel)
    return folder


OFFLINE = {
    "atlases": 'print([bhx.load_atlas(f"schaefer{n}").harmonics.shape for n in (100, 200, 400)])',
    "catalog": "import bhx.data.catalog; print(bhx.data.catalog.shipped_folder())",
    "sample": 'print(bhx.open_cohort("sample").bold.shape)',
    "weights": 'print(bhx.load_model("workshop"))',
}


@pytest.mark.parametrize("part", OFFLINE)
def test_wheel_works_in_another_folder(part, site, tmp_path):
    if part == "weights" and not (REPO / "bhx" / "weights").exists():
        pytest.skip("no weights are shipped yet")
    code = f"import bhx; print(bhx.__file__); {OFFLINE[part]}"
    environment = os.environ | {"PYTHONPATH": str(site)}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    home, printed = done.stdout.strip().split("\n", 1)
    assert Path(home).is_relative_to(site)
    if part == "catalog":
        assert Path(printed) == site / "bhx" / "data_catalog"


def test_doctor_names_everything(capsys):
    assert main(["doctor"]) == 0
    printed = capsys.readouterr().out
    wanted = [bhx.__version__, "CPU cores", "GiB", "JupyterLab", "missing\n  nothing: ready"]
    wanted += [str(path) for path in bhx.folders().values()]
    wanted += list(bounds([*PROJECT["dependencies"], *EXTRAS["notebooks"]]) | {"torch": ""})
    assert [w for w in wanted if w not in printed and w != "pytorch"] == []


def test_doctor_without_any_package():
    """Python without its site-packages: the doctor still answers, and says what to do."""
    done = subprocess.run(
        [sys.executable, "-S", "-m", "bhx", "doctor"], cwd=REPO, capture_output=True, text=True
    )
    assert done.returncode == 1, done.stderr
    core = next(line for line in done.stdout.splitlines() if line.startswith("  CORE"))
    assert all(f"{name} missing" in core for name in ("torch", "xarray", "scikit-learn"))
    assert "pip install" in core


def test_doctor_sees_an_old_version(monkeypatch, capsys):
    from bhx import doctor

    real = doctor.metadata.version
    old = {"torch": "2.0.1", "nbval": "0.1"}
    monkeypatch.setattr(doctor.metadata, "version", lambda name: old.get(name) or real(name))
    assert main(["doctor"]) == 1
    printed = capsys.readouterr().out
    assert re.search(r"CORE: torch needs \S*>=2\.13", printed)
    assert re.search(r"notebooks: nbval needs .*\[notebooks\]", printed)


def test_doctor_forgives_a_missing_extra(monkeypatch, capsys):
    from bhx import doctor

    def version(name):
        if name == "nbval":
            raise doctor.metadata.PackageNotFoundError(name)
        return real(name)

    real = doctor.metadata.version
    monkeypatch.setattr(doctor.metadata, "version", version)
    assert main(["doctor"]) == 0
    assert "notebooks: nbval missing; pip install" in capsys.readouterr().out


def test_folders_follow_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("BHX_DATA", str(tmp_path))
    monkeypatch.setenv("BHX_CACHE", "")
    assert bhx.folders()["data"] == tmp_path
    assert bhx.folders()["cache"] == Path.home() / ".cache" / "bhx" / "cache"


TARGETS = ["demo", "doctor", "test", "lab", "voila", "book", "weights", "assets", "notebooks"]
TARGETS += ["brainmarks", "nbmake"]


@pytest.mark.parametrize("target", TARGETS)
def test_make_knows(target):
    if shutil.which("make") is None:
        pytest.skip("no make on this machine")
    help_text = subprocess.check_output(["make", "help"], cwd=REPO, text=True)
    assert f"make {target}" in help_text
