"""The lessons: their form, what is stored in them, and that their checks bite.

`pytest tests/test_notebooks.py -k 05_` asks about one notebook, BHX_SOLVE=all adds the exercises of
all notebooks. Their outputs are compared by nbval (`make nbval`), which is not repeated here.
"""

from __future__ import annotations

import ast
import json
import os
import re
import runpy
import shutil
import statistics
import subprocess
import sys
from functools import cache
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import xarray as xr
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from nbformat import NotebookNode, from_dict, v4
from safetensors.torch import load_file, save_file
from test_layout import FORBIDDEN
from traitlets.config import Config

import bhx
from bhx.model import checkpoints as checkpoints_file
from bhx.show import figures as figures_file

REPO = Path(bhx.__file__).parents[1]
FOLDER = REPO / "notebooks"
NAMES = (
    *("00_start_here", "01_a_cohort_is_a_dataset", "02_structure_as_cubes"),
    *("03_function_at_any_tr", "04_the_shape_of_the_cortex", "05_the_hub", "06_pretrain"),
    *("07_walking_the_latent_space", "08_does_it_beat_the_connectome", "09_fine_tune"),
    *("10_bring_your_own_scans", "11_released_weights", "12_while_the_scan_runs"),
    "13_real_people",
)
every_notebook = pytest.mark.parametrize("name", NAMES)

INSTALL = """import importlib.util

if importlib.util.find_spec("bhx") is None:  # Colab, or a kernel without bhx
    %pip install -q torch==2.13.0 "bhx @ git+https://github.com/bhx-project/bhx\""""
BADGES = (
    "[![Binder](https://mybinder.org/badge_logo.svg)]"
    "(https://mybinder.org/v2/gh/bhx-project/bhx/main?labpath=notebooks/NAME.ipynb) "
    "[![Colab](https://colab.research.google.com/assets/colab-badge.svg)]"
    "(https://colab.research.google.com/github/bhx-project/bhx/blob/main/notebooks/NAME.ipynb)"
)
LIVE = ("application/vnd.plotly.v1+json", "application/vnd.jupyter.widget-view+json")
TIMING = re.compile(r"\bin \d+(\.\d+)? (ms|s|min)\b|\d+%\||\bit/s|[Ww]all time")
ANSWER = re.compile(r"^(\w+) = None *(?:#.*)?$", re.M)
SOLUTION = re.compile(r"<details><summary>Solution</summary>\n\n(.+?)\n</details>", re.S)
HEADINGS = ["## What could be wrong with this result", "## Exercises", "## Next"]


@cache
def read(name) -> SimpleNamespace:
    """A notebook as it is stored, its sources as text."""
    path = FOLDER / f"{name}.ipynb"
    assert path.exists(), f"there is no {path.name}"
    raw = json.loads(path.read_text(encoding="utf-8"))
    cells = [from_dict(cell | {"source": "".join(cell["source"])}) for cell in raw["cells"]]
    code = [cell for cell in cells if cell.cell_type == "code"]
    text = [cell.source for cell in cells if cell.cell_type == "markdown"]
    return SimpleNamespace(path=path, metadata=raw["metadata"], cells=cells, code=code, text=text)


def python(source) -> ast.Module:
    """Code without the lines that are the notebook's own."""
    return ast.parse(re.sub(r"(?m)^(\s*)%.*$", r"\1pass", source))


def words(source) -> int:
    return len(re.findall(r"\w+", re.sub(r"\(https?:[^)]*\)", "", source)))


def lines(source) -> int:
    return sum(bool(line.strip()) for line in source.splitlines())


def printed(cell) -> str:
    """What a code cell printed or showed as text."""
    found = [o.get("text") or o.get("data", {}).get("text/plain", "") for o in cell.outputs]
    return "".join(map("".join, found))


# How a lesson is written ---------------------------------------------------------------------


def test_the_curriculum_is_whole():
    assert sorted(path.stem for path in FOLDER.glob("*.ipynb")) == list(NAMES)


@every_notebook
def test_it_opens_with_what_it_is_for(name):
    first = read(name).cells[0]
    assert first.cell_type == "markdown"
    title, badges, *rest = first.source.split("\n\n")
    assert re.fullmatch(r"# \S.*", title)
    assert badges == BADGES.replace("NAME", name)
    assert re.match(r"!\[\w.+?\]\(pictures/\w+\.png\)", rest[0]), "no destination picture"
    rest = "\n\n".join(rest)
    assert re.search(r"^\*\*You will be able to\*\* \w", rest, re.M)
    needs = re.search(r"^\*\*Needs:\*\* .+", rest, re.M).group()
    assert re.search("minute", needs)
    assert "GPU" in needs
    assert re.search("mechanics, not findings", rest)


@every_notebook
def test_cells_are_few_and_short(name):
    sizes = [lines(cell.source) for cell in read(name).code]
    assert 12 <= len(sizes) <= 25
    assert statistics.median(sizes) <= 3
    assert max(sizes) <= 12


@every_notebook
def test_there_is_as_much_text_as_code(name):
    notebook = read(name)
    assert sum(map(words, notebook.text)) >= sum(words(cell.source) for cell in notebook.code)


@every_notebook
def test_no_function_is_longer_than_five_lines(name):
    for cell in read(name).code:
        for node in ast.walk(python(cell.source)):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                assert node.end_lineno - node.lineno < 5, f"'{node.name}' belongs in bhx"


@every_notebook
def test_first_cell_installs_and_last_cell_says_what_was_used(name):
    code = read(name).code
    assert (code[0].source, code[0].metadata.get("tags")) == (INSTALL, ["install"])
    assert code[0].outputs == []
    assert any("bhx.made_with(" in cell.source for cell in code)
    assert re.fullmatch(r"print\(bhx\.made_with\(\w.*\)\)", code[-1].source)


@every_notebook
def test_sections_come_in_order(name):
    text = "\n".join(read(name).text)
    found = re.findall(r"(?m)^#+ .+$", text)
    assert found[-3:] == HEADINGS
    assert len([h for h in found if h.startswith("# ")]) == 1


def exercises(notebook) -> list[tuple]:
    """(answer cell, its code with the solution in the answer's place) of each exercise."""
    starts = [i for i, c in enumerate(notebook.cells) if "## Exercises" in c.source]
    rest = notebook.cells[starts[-1] :]
    out = []
    for answer, behind in pairwise(rest):
        if answer.cell_type == "code" and ANSWER.search(answer.source):
            folded = SOLUTION.search(behind.source)
            assert folded, f"no folded solution behind '{answer.source}'"
            out.append((answer, _solved(answer.source, folded.group(1))))
    return out


def _solved(answer, solution) -> str:
    """With the code of a solution, in a fence or in backticks, which assigns what was asked for."""
    code = re.findall(r"(?ms)^```python\n(.+?)^```|`([^`\n]+ = [^`\n]+)`", solution)
    code = "\n".join(fenced or inline for fenced, inline in code)
    (asked,) = ANSWER.findall(answer)
    assert re.search(rf"(?m)^{asked} = ", code), (
        f"the solution does not say '{asked} = ...' in code"
    )
    return ANSWER.sub(lambda _: code, answer)


@every_notebook
def test_each_exercise_answers_mistakes_and_has_a_folded_solution(name):
    notebook = read(name)
    found = exercises(notebook)
    assert len(found) >= 3
    solutions = "".join(notebook.text).count("<summary>Solution</summary>")
    assert (solutions, "".join(notebook.text).count("</details>")) == (len(found), len(found))
    for answer, _ in found:
        check = python(answer.source).body[-1].value
        assert ast.unparse(check.func) == "bhx.check_answer"
        assert len(check.args) == 3, "no hint answers a mistake"
        assert printed(answer) == "not yet\n", "unanswered, a check must say 'not yet'"


@every_notebook
def test_links_lead_somewhere(name):
    text = "\n".join(read(name).text)
    local = re.findall(r"\]\((?!https?:|#|attachment:)([^)#\s]+)", text)
    assert [link for link in local if not (FOLDER / link).exists()] == []
    assert set(re.findall(r"`(\d\d_\w+)(?:\.ipynb)?`", text)) <= set(NAMES)
    pictures = [FOLDER / link for link in local if link.endswith(".png")]
    assert all(path.stat().st_size < 200e3 for path in pictures)


@every_notebook
def test_chance_is_named(name):
    """No generator without a seed, and nothing from the shared ones."""
    code = "\n".join(cell.source for cell in read(name).code)
    loose = r"default_rng\(\)|np\.random\.(?!default_rng|Generator)\w+|manual_seed|import random\b"
    assert re.findall(loose, code) == []


# What is stored ------------------------------------------------------------------------------


@every_notebook
def test_it_is_executed_and_stripped(name):
    """nbval passes over a cell that was never executed, so none may be stored."""
    notebook = read(name)
    assert set(notebook.metadata) <= {"kernelspec", "language_info", "made_from"}
    counts = [cell.execution_count for cell in notebook.code]
    assert counts == list(range(1, len(counts) + 1))
    assert all(set(cell.metadata) <= {"tags"} for cell in notebook.cells)


@every_notebook
def test_outputs_belong_to_the_code_and_the_weights(name):
    notebook = read(name)
    config = runpy.run_path(str(FOLDER / "nbconvert_config.py"), {"get_config": Config})
    fresh = notebook.metadata.get("made_from") == config["stamp"](notebook.cells)
    assert fresh, "code or weights are newer than the outputs: make notebooks"
    shipped = {
        json.loads(path.read_text())["sha256"][:12]
        for path in checkpoints_file.SHIPPED.glob("*/config.json")
    }
    text = printed(notebook.code[-1])
    assert re.match(rf"Python 3\.\d+.*, bhx {bhx.__version__}, torch 2\.", text)
    assert set(re.findall(r": shipped ([0-9a-f]{12})", text)) <= shipped
    assert len(text.splitlines()) > 1, "made_with was given nothing that it knows"


@every_notebook
def test_only_what_is_live_is_not_compared(name):
    """A cell is tagged just when it holds a widget or draws while it runs: what it prints is not
    compared."""
    for cell in read(name).code[1:]:
        kinds = [set(output.get("data", {})) for output in cell.outputs]
        live = any(LIVE[1] in kind for kind in kinds) or "live(" in cell.source
        live = live or cell.source.split("\n")[-1] == "explorer"  # a picture stands for it
        assert ("nbval-ignore-output" in cell.metadata.get("tags", [])) == live
        if live:
            drawn = [bool(kind & {*LIVE, "image/png"}) for kind in kinds]
            assert all(drawn), f"text beside something live: {cell.source}"


@every_notebook
def test_figures_of_training_are_tagged(name):
    """`trained` stands at the cells that show a log, or a figure checked as one of training."""
    cells = read(name).code[1:]
    checked = [re.findall(r"check_figure\((\w+), .*trained=True\)", c.source) for c in cells]
    logs = {figure for found in checked for figure in found}
    for cell in cells:
        drawn = any(LIVE[0] in output.get("data", {}) for output in cell.outputs)
        of_training = "plot_log(" in cell.source or cell.source.split("\n")[-1] in logs
        tagged = "trained" in cell.metadata.get("tags", [])
        assert tagged == (drawn and of_training), cell.source
        assert set(cell.metadata.get("tags", [])) <= {"trained", "nbval-ignore-output"}


@every_notebook
def test_outputs_hold_no_error_machine_or_clock(name):
    for cell in read(name).code:
        kinds = {output.get("name", output.output_type) for output in cell.outputs}
        assert not kinds & {"stderr", "error"}, cell.source
        for output in cell.outputs:
            text = json.dumps({k: v for k, v in output.items() if k not in ("data",)})
            data = output.get("data", {})
            if LIVE[1] not in data:  # else its text stands in for a widget, a bar at its start
                text += json.dumps({k: v for k, v in data.items() if k.startswith("text/")})
            found = FORBIDDEN.search(text) or TIMING.search(text)
            assert not found, f"'{found.group()}' in the output of: {cell.source}"


def test_notebooks_that_train_are_run_as_on_an_older_processor():
    tagged = {
        n for n in NAMES if any("trained" in c.metadata.get("tags", []) for c in read(n).code)
    }
    checked = set(re.findall(r"notebooks/(\w+)\.ipynb", (REPO / ".ci" / "run").read_text()))
    assert checked == tagged


def references(name) -> dict:
    return {f"{name[:2]}/{path.stem}": path for path in (FOLDER / "figures" / name[:2]).glob("*")}


@every_notebook
def test_checked_figures_are_the_references(name):
    text = "".join(printed(cell) for cell in read(name).code)
    checked = re.findall(r"(?m)^figure (\S+): ok \(", text)
    assert sorted(checked) == sorted(references(name))
    assert checked


def stored_figure(shown) -> SimpleNamespace:
    """What `check_figure` reads of a figure, from a stored output."""

    def trace(one):
        return SimpleNamespace(name=one.get("name"), type=one["type"], to_plotly_json=lambda: one)

    return SimpleNamespace(data=[trace(dict(one)) for one in shown["data"]])


@every_notebook
def test_stored_figures_are_those_that_were_checked(name):
    """Every reference is the picture of a figure that the notebook shows."""
    shown = [
        stored_figure(output.data[LIVE[0]])
        for cell in read(name).code
        for output in cell.outputs
        if LIVE[0] in output.get("data", {})
    ]
    for reference in references(name):
        for figure in shown:
            try:
                figures_file.check_figure(figure, reference, folder=FOLDER / "figures")
                break
            except AssertionError:
                continue
        else:
            raise AssertionError(f"no stored figure looks like the reference {reference}")


def test_the_folder_is_small():
    stored = [p for p in FOLDER.rglob("*") if p.is_file() and ".ipynb_checkpoints" not in p.parts]
    assert sum(path.stat().st_size for path in stored) < 12e6
    numbers = {path.name for path in (FOLDER / "figures").iterdir()}
    assert numbers == {name[:2] for name in NAMES}


# What happens when it runs -------------------------------------------------------------------


@pytest.fixture
def copy(tmp_path, monkeypatch):
    """The notebooks in another folder, with their figures' references; run in one thread."""
    ignored = shutil.ignore_patterns(".ipynb_checkpoints", "_build")
    monkeypatch.setenv("PLOTLY_RENDERER", "plotly_mimetype")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return Path(shutil.copytree(FOLDER, tmp_path / "elsewhere", ignore=ignored))


def run(cells, folder) -> NotebookNode:
    """Execute cells in a kernel of their own; an error in one ends it."""
    fresh = [v4.new_code_cell(cell) for cell in cells]
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    notebook = v4.new_notebook(cells=fresh, metadata={"kernelspec": kernel})
    where = {"metadata": {"path": str(folder)}}
    return NotebookClient(notebook, timeout=600, resources=where).execute()


QUICK = ("00_start_here", "11_released_weights")


@pytest.mark.parametrize("name", NAMES if os.environ.get("BHX_SOLVE") else QUICK)
def test_solutions_are_right(name, copy):
    notebook = read(name)
    solved = {id(answer): code for answer, code in exercises(notebook)}
    code = [solved.get(id(cell), cell.source) for cell in notebook.code]
    text = "".join(printed(cell) for cell in run(code, copy).cells)
    assert re.findall(r"(?m)^(right|not yet)$", text) == ["right"] * len(solved)


OTHER_WEIGHTS = """import bhx.model.checkpoints
from pathlib import Path
bhx.model.checkpoints.SHIPPED = Path({!r})"""


def altered_weights(folder, change) -> Path:
    """The shipped weights, one matrix of the harmonizer a little off and all else in order."""
    source = checkpoints_file.SHIPPED / "workshop"
    shutil.copytree(source, folder / "workshop")
    path = folder / "workshop" / "model.safetensors"
    state = load_file(path)
    state["harmonizer.blocks.0.block.mlp.fc1.weight"] *= 1 + change
    save_file(state, path)
    about = json.loads((source / "config.json").read_text())
    about["sha256"] = checkpoints_file.sha256(path)
    (folder / "workshop" / "config.json").write_text(json.dumps(about))
    return folder


@pytest.mark.parametrize("change", [0.0, 0.05])
def test_a_changed_weight_is_noticed_in_the_first_figure(change, copy, tmp_path):
    """Notebook 00 up to its first figure, with weights of which one matrix is 5 % larger."""
    code = [cell.source for cell in read("00_start_here").code]
    last = next(i for i, source in enumerate(code) if "check_figure(" in source and i > 1)
    weights = altered_weights(tmp_path / "weights", change)
    cells = [OTHER_WEIGHTS.format(str(weights)), *code[: last + 1]]
    if not change:
        assert "figure 00/hub_on_surface: ok" in printed(run(cells, copy).cells[-1])
        return
    with pytest.raises(CellExecutionError) as failed:
        run(cells, copy)
    message = failed.value.evalue
    assert re.match(r"figure 00/hub_on_surface: \d .+/\w+ differs by up to \S+, allowed", message)


def test_another_folder_and_more_threads_change_nothing(copy, monkeypatch):
    """nbval compares a run elsewhere in two threads with what one thread made and `make nbval`
    compares at home."""
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--nbval"]
    command += ["--nbval-current-env", "--nbval-sanitize-with", "nbval_sanitize.cfg"]
    command += ["00_start_here.ipynb", "--rootdir", ".", "-c", os.devnull]
    done = subprocess.run(command, cwd=copy, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:]
    assert f"{len(read('00_start_here').code)} passed" in done.stdout


@pytest.mark.parametrize(
    "given, printed",
    [
        (None, "not yet"), (25, "right"), (25.04, "right"), (np.float32(25), "right"),
        (26, "Round down."), (27, "not yet"), ("25", "not yet"), ([25], "not yet"),
        (xr.DataArray(25), "right"), (np.nan, "not yet"),
    ],
)  # fmt: skip
def test_an_answer_is_right_or_a_known_mistake(given, printed, capsys):
    bhx.check_answer(given, 25, {"Round down.": 26}, within=0.05)
    assert capsys.readouterr().out == printed + "\n"


def test_answers_may_be_words_and_lists(capsys):
    hints = {"The other one.": "control"}
    for given in ("patient", "control", "both"):
        bhx.check_answer(given, "patient", hints)
    bhx.check_answer(np.array(["a", "b"]), ["a", "b"])
    bhx.check_answer((20, False), (20, True), {"Longer.": (20, False)})
    words = ["right", "The other one.", "not yet", "right", "Longer."]
    assert capsys.readouterr().out.split("\n") == [*words, ""]


def test_no_hint_calls_the_right_answer_wrong():
    with pytest.raises(bhx.InputError, match="hints to wrong answers, found the right one: Less"):
        bhx.check_answer(None, 0.5, {"Less.": 0.51}, within=0.02)


def test_stored_scores_of_real_people_are_those_of_the_benchmark():
    found = json.loads((REPO / "benchmarks" / "people.json").read_text(encoding="utf-8"))
    table = pd.read_csv(FOLDER / "real_people.csv")
    assert table.score.tolist() == [round(row["score"], 4) for row in found["scores"]]
    assert set(table.columns) == {*("features", "target", "folds", "length", "metric"),
                                  *("score", "low", "high")}  # fmt: skip
    sites = pd.read_csv(FOLDER / "real_sites.csv")
    assert sites.people.min() > 20  # no line stands for a person
