"""A figure is compared with its reference by its numbers; what differs is named."""

import numpy as np
import plotly.graph_objects as go
import pytest
import torch

import bhx
from bhx.errors import InputError
from bhx.show.figures import check_figure, difference


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
    with pytest.raises(AssertionError, match=r"1 bars/x at 1 is c, expected b"):
        check_figure(words, "00/drawn", folder=folder)


MEASURED = 1.8e-6  # of a log's values, between processors with AVX2 and with SSE4.2 alone
LOG = np.array([0.95, 0.95003, 0.94999])  # a held-out loss that hardly moves


@pytest.mark.parametrize("change, fits", [(MEASURED, True), (10 * MEASURED, False)])
def test_a_log_may_differ_by_the_noise_of_training(change, fits):
    assert (difference(LOG * (1 + change), LOG, trained=True) == "") is fits
    assert difference(LOG * (1 + change), LOG)


@pytest.mark.parametrize("trained", [False, True])
def test_a_range_is_compared_as_tightly_whether_trained_or_not(trained):
    """A brain's coordinates, in mm: within 2e-3 of their range."""
    brain = np.linspace(-72, 68, 50)
    assert difference(brain + 0.27, brain, trained=trained) == ""
    assert difference(brain + 0.29, brain, trained=trained)


def test_geometry_that_does_not_vary_is_compared_to_the_last_bits():
    plane = np.full(50, -72.0)
    assert difference(plane + 1e-8, plane)
    assert difference(plane, plane) == ""


def test_missing_values_and_single_numbers():
    gap = np.where(np.arange(3) == 1, np.nan, LOG)
    assert difference(LOG, gap, trained=True) == "is missing values elsewhere"
    assert difference(gap, gap) == ""
    assert difference(np.array(1.001), np.array(1.0)) == ""
    assert difference(np.array(1.003), np.array(1.0)) == "differs by up to 0.003, allowed 0.002"
    nothing = np.full(2, np.nan)
    assert difference(nothing, nothing, trained=True) == ""


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Logs of two runs of the hub that begin at weights of which one matrix is 5 % apart."""
    from tiny_runs import QUICK, TINY, tiny_cohort

    folder = tmp_path_factory.mktemp("runs")
    store = bhx.save_cohort(tiny_cohort(), folder / "cohort.zarr")
    logs = []
    for name, factor in (("as it is", 1.0), ("larger", 1.05)):
        model = bhx.random_model(TINY)
        with torch.no_grad():
            model.networks.harmonizer.blocks[0].mlp.fc1.weight *= factor
        out = folder / name
        bhx.pretrain(store, stage="harmonizer", out=out, **{**QUICK, "model": model})
        logs.append(bhx.read_log(out, "harmonizer"))
    return logs


@pytest.mark.filterwarnings("ignore:The representation is collapsing")
def test_a_perturbed_weight_is_noticed_in_a_log(runs, tmp_path, monkeypatch):
    as_it_is, larger = map(bhx.plot_log, runs)
    assert "sendChartToCloud" in as_it_is.layout.modebar.remove  # nothing is uploaded
    monkeypatch.setenv("BHX_UPDATE_FIGURES", "1")
    check_figure(as_it_is, "06/log", folder=tmp_path)
    monkeypatch.delenv("BHX_UPDATE_FIGURES")
    check_figure(as_it_is, "06/log", folder=tmp_path, trained=True)
    with pytest.raises(AssertionError, match="differs by up to"):
        check_figure(larger, "06/log", folder=tmp_path, trained=True)


def test_a_missing_reference_is_an_error_where_there_is_a_folder(folder):
    with pytest.raises(InputError, match=r"Expected a reference at '.*other\.npz', found none"):
        check_figure(drawn(), "00/other", folder=folder)


def test_a_notebook_on_its_own_says_that_nothing_was_checked(tmp_path, capsys):
    """Opened alone (on Colab, say) it has no folder of references."""
    check_figure(drawn(), "00/drawn", folder=tmp_path / "figures")
    assert "figure 00/drawn: not checked" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []
