"""How nbval compares figures that notebooks show: near is the same, a difference is named."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path

import nbformat
import numpy as np
import plotly.graph_objects as go
import pytest

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"
spec = importlib.util.spec_from_file_location("notebooks_conftest", NOTEBOOKS / "conftest.py")
rules = importlib.util.module_from_spec(spec)
spec.loader.exec_module(rules)


def figure(change=0.0, title="age", gap=False, log=(0.95, 0.95003)):
    """A figure's JSON as a notebook stores it: typed arrays, a list, words, layout numbers."""
    x = np.linspace(0, 1, 50) * (1 + change)
    line = [None if gap and i == 3 else float(v) for i, v in enumerate(x[:6])]
    made = go.Figure(
        [
            go.Scatter(x=x, y=np.sin(x), name="cohort"),
            go.Scatter(y=line, text=["a", "b"]),
            go.Scatter(y=list(log), name="held-out loss"),
        ]
    ).update_layout(title=title, coloraxis={"cmin": 0, "cmax": float(x[-1])})
    return json.loads(made.to_json())


def test_the_last_bits_are_no_difference():
    assert rules.different(figure(), figure()) == ""
    assert rules.different(figure(change=1e-6), figure()) == ""
    assert figure(change=1e-6) != figure()


@pytest.mark.parametrize(
    "changed, sentence",
    [
        ({"change": 0.05}, r"data\[0\] 'cohort'.*differs by up to 0.0"),
        ({"title": "sex"}, r"title.text is 'sex', expected 'age'"),
        ({"gap": True}, r"data\[1\].*"),
    ],
)
def test_a_difference_is_named(changed, sentence):
    assert re.search(sentence, rules.different(figure(**changed), figure()))


def test_traces_that_come_or_go_are_named():
    fewer = figure()
    fewer["data"].pop()
    assert rules.different(fewer, figure())
    more = figure()
    more["layout"]["width"] = 3
    assert "width" in rules.different(more, figure())


class Cell:
    """As much of nbval's cell as the comparison touches."""

    def __init__(self, *tags):
        self.comparison_traceback = []
        self.cell = nbformat.v4.new_code_cell(metadata={"tags": list(tags)})

    def compare_exactly(self, test, ref, skip_compare):
        assert all(hasattr(output, "output_type") for output in [*test, *ref])
        return test == ref


def shown(**how):
    data = {rules.PLOTLY: figure(**how), "text/plain": "figure"}
    return [nbformat.v4.new_output("display_data", data)]


def test_a_cell_passes_by_its_figure_and_fails_by_it():
    cell = Cell()
    assert rules.compare_outputs(cell, shown(change=1e-6), shown())
    assert not rules.compare_outputs(cell, shown(change=0.05), shown())
    assert "differs by up to" in cell.comparison_traceback[0]
    text = [[nbformat.v4.new_output("stream", text=f"r 0.6{n}")] for n in (1, 2)]
    assert not rules.compare_outputs(cell, *text)


def test_a_cell_tagged_trained_forgives_what_another_processor_changes():
    """A held-out loss near 1 that moved by 3e-5, and another processor's rounding of it."""
    other = shown(log=(0.95, 0.9500302))
    assert not rules.compare_outputs(Cell(), other, shown())
    assert rules.compare_outputs(Cell("trained"), other, shown())
    assert not rules.compare_outputs(Cell("trained"), shown(log=(0.95, 0.95005)), shown())
    assert not rules.compare_outputs(Cell("trained"), shown(change=0.05), shown())
