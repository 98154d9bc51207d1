"""Strata, confounds and the page say what the predictions say."""

import configparser
import json
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from small_cohorts import make_cohort, noise

import bhx
from bhx.data.splits import cohort_hash
from bhx.errors import InputError
from bhx.evaluate import report as report_file
from bhx.evaluate.features import connectome, nothing
from bhx.evaluate.probe import probe
from bhx.evaluate.report import explained_by, report, within
from bhx.evaluate.scores import compare
from bhx.settings import PACKAGE


@pytest.fixture(scope="module")
def features():
    return connectome(make_cohort())


@pytest.fixture(scope="module")
def ages(features):
    return probe([features, noise(features)], "age")


@pytest.fixture(scope="module")
def labels(features):
    return probe([features, noise(features)], "group")


def test_scores_within_sites_are_those_of_the_sites_rows(ages):
    table = within(ages, "site")
    site = ages.site.values == "B"
    r = np.corrcoef(ages.prediction[0].values[site], ages.truth.values[site])[0, 1]
    assert table.loc[("connectome", "B"), "r"] == pytest.approx(r, abs=1e-3)
    assert table.loc["connectome", "n"].sum() == 90
    with pytest.raises(InputError, match="Expected 'scanner' as a coordinate"):
        within(ages, "scanner")


def test_subjects_without_a_label_are_in_no_stratum(ages):
    """Neither those of a missing number nor those of a missing word, whatever it is written as."""
    half, site = np.arange(90) // 2 % 2 * 1.0, ages.site.values.astype("U3")
    half[:6], site[:6] = np.nan, "n/a"
    some = ages.assign_coords(half=("subject", half), site=("subject", site))
    for by, values in (("half", [0, 1]), ("site", ["A", "B", "C"])):
        table = within(some, by).loc["connectome"]
        assert list(table.index) == values
        assert table.n.sum() == 84
    assert explained_by(some, ["site"]).loc["connectome", "n"] == 84


def test_confounds_explain_a_prediction_made_of_them_and_nothing_of_another(features, ages):
    with_age = ages.assign_coords(years=("subject", ages.truth.values))
    own = explained_by(with_age, ["years"])
    assert own.loc["connectome", "partial_r"] == 0
    assert own.loc["connectome", "explained"] > 0.7
    random = np.random.default_rng(0).normal(size=90)
    other = explained_by(ages.assign_coords(dice=("subject", random)), ["dice"])
    assert other.loc["connectome", "explained"] < 0.08
    row = other.loc["connectome"]
    assert row.partial_r == pytest.approx(row.r, abs=0.02)
    with pytest.raises(InputError, match="Expected 'iq' as a coordinate on subject"):
        explained_by(ages, ["iq"])


@pytest.fixture(scope="module")
def split(features):
    """Scores of the three splits, which leave some subjects untested."""
    return {target: probe(features, target, protocol="paper") for target in ("age", "group")}


READ = {
    "within": ("group", lambda s: within(s, "site")),
    "explained_by": ("age", lambda s: explained_by(s, ["n_volumes", "site"])),
    "calibration": ("group", lambda s: points(report_file.plot_calibration(s))),
    "predictions": ("age", lambda s: points(report_file.plot_predictions(s))),
}


def points(figure):
    return pd.DataFrame({"x": figure.data[1].x, "y": figure.data[1].y})


@pytest.mark.parametrize(("target", "read"), READ.values(), ids=READ)
def test_subjects_that_no_split_tested_are_not_there(split, target, read):
    scores = split[target]
    tested = np.isfinite(scores.output.values).any((0, 1, 3))
    assert 0 < tested.sum() < 60
    found = read(scores)
    assert np.isfinite(found.to_numpy(float)).all()
    pd.testing.assert_frame_equal(found, read(scores.isel(subject=tested)))


def test_page_is_self_contained_and_says_who_was_left_out(features, tmp_path):
    some = features.copy(deep=True)
    some.features[3] = np.nan
    scores = probe([some, noise(some)], "group", confounds=["n_volumes"], stratify="site")
    page = report(scores, path=tmp_path / "scores.html").read_text()
    assert not re.findall(r"<(?:script|link|img|iframe)[^>]{0,200}(?:src|href)=", page)
    assert "90 rows given" in page
    assert "1 out: no connectome" in page
    assert "89 rows of 45 participants tested" in page
    for sentence in ("Linear effects of n_volumes", "balanced over site", "Within each site"):
        assert sentence in page
    markdown = (tmp_path / "scores.md").read_text()
    rows = [line for line in markdown.splitlines() if line.startswith("| connectome")]
    assert len(rows) == scores.sizes["metric"]
    table = compare(scores)
    assert str(table.loc[("connectome", "auroc"), "score"]) in markdown


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("missing/page.html", "Expected a path that can be written, found '.*page.html'"),
        ("", "Expected a path that can be written"),
        ("page.md", "Expected a page that ends in .html, found '.*page.md'"),
        ("page.MD", "Expected a page that ends in .html, found '.*page.MD'"),
    ],
)
def test_page_is_not_written_where_it_cannot_be(ages, tmp_path, path, message):
    with pytest.raises(InputError, match=message):
        report(ages, path=tmp_path / path)
    assert not list(tmp_path.iterdir())


def test_page_is_about_one_target(ages, labels, features, tmp_path):
    whole = features.assign_coords(age=("subject", features.age.values.astype(int) // 20))
    coarse = probe(nothing(whole), "age")
    for given, found in ([ages, labels], r"group \(label\)"), ([coarse, ages], r"age \(number\)"):
        with pytest.raises(InputError, match=f"Expected scores of one target, found .*{found}"):
            report(*given, path=tmp_path / "page.html")


def test_page_reads_each_scores_own_coordinates(features, tmp_path):
    moved = features.assign_coords(mean_fd=("subject", np.linspace(0.1, 0.3, 90)))
    ours, control = probe(moved, "group"), probe(noise(features).drop_vars("site"), "group")
    for given in ((ours, control), (control, ours)):
        page = report(*given, path=tmp_path / "page.html").read_text()
        assert page.count("that age, site, mean_fd explain together") == 1
        assert page.count("that age explain together") == 1
        assert "Within each site" in page


def test_page_says_so_where_no_subject_has_all_confounds(features, tmp_path):
    some = np.where(np.arange(90) < 45, np.arange(90), np.nan)
    apart = features.assign_coords(mean_fd=("subject", some), coverage=("subject", some[::-1]))
    page = report(probe(apart, "group"), path=tmp_path / "page.html").read_text()
    assert "Expected subjects with all of age, site, mean_fd, coverage, found" in page


def test_page_counts_those_that_no_split_tested(split, tmp_path):
    scores = split["age"]
    page = report(scores, path=tmp_path / "page.html").read_text()
    n = int(np.isfinite(scores.output.values).any((0, 1, 3)).sum())
    assert f"{90 - n} out: tested in no split" in page
    assert f"{n} rows of {n // 2} participants tested" in page


def test_markdown_keeps_its_columns_whatever_the_names():
    names = pd.MultiIndex.from_tuples([("a|b", "r"), ("c\nd", "r")], names=["model", "metric"])
    table = pd.DataFrame({"score": [0.5, np.nan]}, names).rename_axis(columns="x|\ny")
    assert report_file.as_markdown(table).splitlines() == [
        "**x\\| y**",
        "",
        "| model | metric | score |",
        "| --- | --- | --- |",
        "| a\\|b | r | 0.5 |",
        "| c d | r |  |",
    ]


def test_page_escapes_what_users_name(features, tmp_path):
    evil = features.assign_attrs(name="<script>alert(1)</script>")
    page = report(probe(evil, "age"), path=tmp_path / "x.html").read_text()
    assert "<script>alert(1)" not in page


def test_methods_name_every_choice(features):
    scores = probe(features, "group", groups="site", harmonize="site", preserve=["age"])
    text = report_file.methods(scores)
    for part in ("held out whole values of site", "ComBat", "age"):
        assert part in text
    paper = report_file.methods(probe(features, "age", protocol="paper"))
    assert "three splits of 6:2:2" in paper
    assert "no interval" not in paper
    assert "have no interval" in report_file.methods(probe(features, "group", protocol="paper"))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda s: explained_by(s, "scanner"), "Expected 'scanner' as a coordinate on subject"),
        (lambda s: explained_by(s, ["site", "fold"]), "Expected 'fold' as a coordinate on subject"),
        (lambda s: within(s, "fold"), "Expected 'fold' as a coordinate on subject"),
        (
            lambda s: explained_by(apart(s), ["dose", "iq"]),
            "Expected subjects with all of dose, iq, found none",
        ),
    ],
)
def test_what_cannot_be_read_off_scores_is_refused(labels, call, message):
    with pytest.raises(InputError, match=message):
        call(labels)


def apart(scores):
    """The first half have a dose and the second half an IQ."""
    half, values = np.arange(90) < 45, np.linspace(0, 1, 90)
    dose, iq = (("subject", np.where(there, values, np.nan)) for there in (half, ~half))
    return scores.assign_coords(dose=dose, iq=iq)


def test_one_confound_may_be_a_plain_name(ages):
    pd.testing.assert_frame_equal(explained_by(ages, "site"), explained_by(ages, ["site"]))


PAPER, NULL = {"protocol": "paper"}, {"permutations": 2}
ALONE, KIN = ["participant"], {"family": ("subject", np.arange(90) // 4)}


@pytest.mark.parametrize(
    ("options", "lacks", "adds", "claimed", "absent"),
    [
        (PAPER, [], {}, "stratified by age and site;", "label"),
        (PAPER, ["site"], {}, "stratified by age;", "site"),
        (NULL, [], {}, "2 exchanges of labels between participants within site.", "famil"),
        (NULL, ["site"], {}, "2 exchanges of labels between participants.", "site"),
        (NULL, [], KIN, "between participants within site, families whole.", "rows"),
        ({}, [], {}, "5 folds over participants; no participant was on both sides", "rows"),
        ({}, ALONE, {}, "5 folds over rows.", "participant"),
        ({"groups": "site"}, ALONE, {}, "held out whole values of site.", "participant"),
    ],
)
def test_methods_claim_only_what_was_done(features, options, lacks, adds, claimed, absent):
    given = features.drop_vars(lacks).assign_coords(adds)
    text = report_file.methods(probe(given, "age", **options))
    assert claimed in text
    assert absent not in text


def test_methods_say_what_read_which_features(features):
    own = noise(features).assign_attrs(name="wave", estimator="MLP")
    text = report_file.methods(probe([features, own, nothing(features)], "age"))
    for part in (
        "from connectome by ridge regression, nested penalty",
        "from wave by TransformedTargetRegressor(",
        "from mean or majority by the mean or the frequencies of the training part",
    ):
        assert part in text
    assert "\n" not in text


def test_figures_show_the_numbers_of_the_table(ages, labels):
    table = compare(ages)
    figure = report_file.plot_scores(table, "r")
    assert "sendChartToCloud" in figure.layout.modebar.remove
    np.testing.assert_allclose(figure.data[0].x, table.xs("r", level="metric").score)
    ends = figure.data[0].x + figure.data[0].error_x.array
    np.testing.assert_allclose(ends, table.xs("r", level="metric").high)
    curves = report_file.plot_calibration(labels)
    assert [t.name.split(" (")[0] for t in curves.data[1:]] == ["connectome", "noise"]
    dots = report_file.plot_predictions(ages)
    np.testing.assert_array_equal(dots.data[1].x, ages.truth)
    assert json.loads(figure.to_json())["layout"]["title"]["text"] == "age"


def a_model(digest, source="bhx.pretrain on test"):
    """What `made_with` reads of a model, and its `coords`, which are no labels."""
    provenance = {"source": source, "weights_sha256": digest}
    config = SimpleNamespace(name="tiny")
    return SimpleNamespace(provenance=provenance, config=config, coords=lambda dims: {})


def test_made_with_names_weights_rows_and_seeds_once(ages):
    cohort = make_cohort()
    rows = f"{cohort.sizes['subject']} rows {cohort_hash(cohort)[:12]}"
    trained, random = a_model("ab" * 32), a_model("", "random weights, seed 4")
    lines = report_file.made_with(cohort, cohort, trained, random, ages).splitlines()
    assert lines[1:] == [
        f"test cohort: {rows}",
        "weights tiny: made here abababababab",
        "weights tiny: random weights, seed 4",
        f"age: seed 0, {rows}",
    ]
    other = report_file.made_with(cohort[{"subject": slice(0, 89)}]).splitlines()[1]
    assert other.startswith("test cohort: 89 rows ")
    assert rows.split()[-1] not in other


def test_made_with_knows_the_shipped_weights():
    described = PACKAGE / "weights" / "workshop" / "config.json"
    digest = json.loads(described.read_text())["sha256"]
    assert report_file.made_with(a_model(digest)).endswith(
        f"\nweights workshop: shipped {digest[:12]}"
    )


def test_another_machines_versions_compare_equal_and_its_rows_do_not():
    """As nbval does it: every section's pattern replaced, in their order."""
    rules = configparser.RawConfigParser()
    rules.read(Path(bhx.__file__).parents[1] / "notebooks" / "nbval_sanitize.cfg")

    def clean(text):
        for name in rules.sections():
            text = re.sub(rules[name]["regex"], rules[name]["replace"], text)
        return text

    text = clean(report_file.made_with(make_cohort(), a_model("ab" * 32)))
    versions, rows, weights = text.splitlines()
    assert not re.search(r"\d", versions)
    assert weights == "weights tiny: made here HASH"
    assert re.search(" rows [0-9a-f]{12}$", rows)
    shipped = "weights workshop: shipped abababababab"
    assert clean(shipped) == shipped


def test_made_with_reads_attributes_that_bhx_did_not_write():
    named = make_cohort(n=4).assign_attrs(cohort="my clinic")
    weighted = connectome(named).assign_attrs(weights_sha256="a" * 64)
    assert "weights model: made here aaaaaaaaaaaa" in report_file.made_with(named, weighted)
