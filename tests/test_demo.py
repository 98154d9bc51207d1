"""The main job: what it leaves behind opens without bhx and without a network."""

from __future__ import annotations

import re

import pandas as pd
import pytest
import xarray as xr

from bhx.__main__ import main
from bhx.demo import TARGETS, run_demo
from bhx.errors import InputError


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo") / "out"
    run_demo(out, subjects=40)
    return out


def test_latents_of_the_real_scan_carry_their_labels(made):
    latents = xr.open_zarr(made / "sample.zarr", consolidated=False)
    assert latents.hub.dims == ("subject", "token", "feature")
    assert latents.subject.values.tolist() == ["sub-010188", "mni152"]
    assert bool(latents.hub.notnull().all())
    share = latents.modality_share.mean("token").values
    assert share[0].tolist() == pytest.approx([1, 0])  # BOLD only
    assert share[1].tolist() == pytest.approx([0, 1])  # T1 only


def test_every_score_has_its_control(made):
    scores = pd.read_csv(made / "scores.csv")
    for target in TARGETS:
        models = set(scores.model[scores.target == target])
        assert len(models) == 4
        assert "connectome" in " ".join(models)


def test_the_page_stands_alone(made):
    page = (made / "index.html").read_text(encoding="utf-8")
    assert not re.search(r"<(script|link|img)[^>]+(src|href)=[\"']?(https?:)?//", page)
    assert page.count("Plotly.newPlot(") >= 5
    assert "not findings" in page
    assert page.count('"modebar":{"remove":"sendChartToCloud"}') == 5  # nothing is uploaded
    assert page.count('"plotlyServerURL": ""') == 5


def test_made_anew_over_an_old_one_but_never_over_other_files(made, tmp_path):
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(InputError, match=r"Expected an empty folder or one of an earlier demo"):
        run_demo(tmp_path)
    assert (tmp_path / "mine.txt").read_text() == "keep"


def test_evaluate_from_the_shell(made, capsys):
    stores = [str(made / "latents.zarr"), str(made / "cohort.zarr")]
    assert main(["evaluate", *stores, "--target", "sex"]) == 0
    printed = capsys.readouterr().out
    assert "hub tokens" in printed
    assert "connectome" in printed


def test_embed_from_the_shell_gives_what_the_demo_wrote(made, tmp_path):
    out = tmp_path / "again.zarr"
    assert main(["embed", str(made / "cohort.zarr"), str(out)]) == 0
    old, new = (xr.open_zarr(p, consolidated=False).hub for p in (made / "latents.zarr", out))
    xr.testing.assert_allclose(old.drop_vars(list(old.coords)), new.drop_vars(list(new.coords)))


def test_pretrain_from_the_shell_reads_its_settings(made, tmp_path):
    line = ["pretrain", str(made / "cohort.zarr"), "--stage", "harmonizer", "--out", str(tmp_path)]
    assert main([*line, "--set", "steps=1", "batch=16", "rate=(0.0, 1e-3, 0.0)"]) == 0
    assert (tmp_path / "model.safetensors").exists()
    assert main([*line, "--set", "steps=1"]) == 2  # a run is there already
