"""A figure is compared with its reference by its numbers; what differs is named."""

import numpy as np
import plotly.graph_objects as go
import pytest

from bhx.errors import InputError
from bhx.show.figures import check_figure


def drawn(change=0.0):
    y = np.linspace(0, 1, 50)
    y[20] += change
    return go.Figure([go.Scatter(y=y, name="curve"), go.Bar(x=["a", "b"], y=[1, 2], name="bars")])


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("BHX_UPDATE_FIGURES", "1")
    check_figure(drawn(), "00/drawn", folder=tmp_path)
    monkeypatch.delenv("BHX_UPDATE_FIGURES")
    return tmp_path


@pytest.mark.parametrize("change", [0.0, 1e-4])
def test_the_same_figure_passes(folder, change, capsys):
    check_figure(drawn(change), "00/drawn", folder=folder)
    assert capsys.readouterr().out == "figure 00/drawn: ok (2 traces, 6 arrays)\n"


def test_a_changed_figure_names_trace_and_difference(folder):
    with pytest.raises(AssertionError, match=r"0 curve/y differs by up to 0\.1, allowed 0\.002"):
        check_figure(drawn(0.1), "00/drawn", folder=folder)
    words = drawn()
    words.data[1].x = ["a", "c"]
    with pytest.raises(AssertionError, match=r"1 bars/x\[1\] is 'c', expected 'b'"):
        check_figure(words, "00/drawn", folder=folder)


def test_a_missing_reference_is_an_error_where_there_is_a_folder(folder):
    with pytest.raises(InputError, match=r"Expected a reference at '.*other\.npz', found none"):
        check_figure(drawn(), "00/other", folder=folder)


def test_a_notebook_on_its_own_says_that_nothing_was_checked(tmp_path, capsys):
    """Opened alone (on Colab, say) it has no folder of references."""
    check_figure(drawn(), "00/drawn", folder=tmp_path / "figures")
    assert "figure 00/drawn: not checked" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []
