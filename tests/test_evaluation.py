"""What a reviewer would ask of a score: no leak, no lost subject, the control in the same folds."""

import json

import dask
import dask.array as da
import numpy as np
import pandas as pd
import pytest
import xarray as xr
from small_cohorts import make_cohort, noise

from bhx.data.splits import split
from bhx.errors import InputError
from bhx.evaluate import estimators as estimators_file
from bhx.evaluate import folds as folds_file
from bhx.evaluate import metrics
from bhx.evaluate import probe as probe_file
from bhx.evaluate import report as report_file
from bhx.evaluate import scores as scores_file
from bhx.evaluate.features import confound_features, connectome, fuse, nothing
from bhx.evaluate.probe import probe
from bhx.evaluate.scores import compare
from bhx.evaluate.task import make_task
from bhx.schema import check


@pytest.fixture(scope="module")
def features():
    return connectome(make_cohort())


# ------------------------------------------------------------------- probe


def test_a_planted_effect_is_found_and_noise_is_at_chance(features):
    scores = probe([features, noise(features)], "age")
    check(scores, "scores")
    table = compare(scores)
    assert table.loc[("connectome", "r"), "low"] > 0.3
    assert table.loc[("noise", "r"), "low"] < 0 < table.loc[("noise", "r"), "high"]
    labels = compare(probe([features, noise(features)], "group"))
    assert labels.loc[("connectome", "auroc"), "low"] > 0.6
    assert labels.loc[("noise", "auroc"), "low"] < 0.5 < labels.loc[("noise", "auroc"), "high"]


def test_codes_of_which_one_is_missing_stay_labels(features):
    codes = np.where(features.age.values > np.median(features.age), 2.0, 1.0)
    whole = probe(features.assign_coords(dx=("subject", codes.astype(int))), "dx")
    codes[3] = np.nan
    holed = probe(features.assign_coords(dx=("subject", codes)), "dx")
    assert holed.attrs["task"] == whole.attrs["task"] == "label"
    assert holed.attrs["positive"] == whole.attrs["positive"] == "2"


@pytest.mark.parametrize("groups", [None, "site"])
@pytest.mark.parametrize("target", ["age", "group"])
def test_participants_and_groups_never_stand_on_both_sides(features, groups, target):
    scores = probe(features, target, groups=groups)
    tested = np.isfinite(scores.output[0, :, :, 0].values)
    assert (tested.sum(0) == 1).all()  # everyone is tested once
    for row in tested:
        for name in ("participant", groups or "participant"):
            of = scores[name].values
            assert not set(of[row]) & set(of[~row])


def test_stratified_folds_balance_the_sites(features):
    scores = probe(features, "group", stratify="site")
    tested = np.isfinite(scores.output[0, :, :, 0].values)
    for site in "ABC":
        per_fold = (tested & (scores.site.values == site)).sum(1)
        assert per_fold.max() - per_fold.min() <= 4  # two rows a participant, ten cells


def test_predictions_do_not_depend_on_the_test_targets(features):
    """Nothing fitted sees a test subject: shuffling a held-out site's ages changes no output."""
    shuffled = features.age.values.copy()
    at = np.flatnonzero(features.site.values == "B")
    shuffled[at] = shuffled[np.random.default_rng(0).permutation(at)]
    before = probe(features, "age", groups="site")
    after = probe(features.assign_coords(age=("subject", shuffled)), "age", groups="site")
    fold = list(before.fold.values).index("B")
    np.testing.assert_allclose(before.output[0, fold, at], after.output[0, fold, at])
    assert not np.allclose(before.score[0, :, fold], after.score[0, :, fold])


def test_predictions_do_not_depend_on_the_company_of_a_test_subject(features):
    """The scaler is fitted on training rows: one wild test subject moves no other prediction."""
    wild = features.copy(deep=True)
    at = int(np.flatnonzero(features.site.values == "B")[0])
    wild.features[at] = 1e3
    before, after = (probe(f, "age", groups="site") for f in (features, wild))
    fold = list(before.fold.values).index("B")
    others = np.setdiff1d(np.arange(90), [at])
    np.testing.assert_allclose(before.output[0, fold, others], after.output[0, fold, others])
    assert abs(before.output[0, fold, at, 0] - after.output[0, fold, at, 0]) > 1


EXACT = {"solver": "newton-cholesky", "tol": 1e-12, "max_iter": 10**4}


@pytest.mark.parametrize("width", [80, 12])  # more features than rows, and fewer
@pytest.mark.parametrize("labels", [0, 2, 3])
def test_many_penalties_and_targets_at_once_are_scikit_learns_one_by_one(width, labels):
    from sklearn.linear_model import LogisticRegression, Ridge

    rng = np.random.default_rng(0)
    x, new = rng.standard_normal((40, width)) + 3, rng.standard_normal((10, width))
    y = x[:, :3] @ rng.standard_normal((3, 5)) + rng.standard_normal((40, 5))
    mean = x.mean(0)
    pieces = [(0, x[:, cut] - mean[cut], new[:, cut] - mean[cut]) for cut in np.s_[:7, 7:]]
    on = estimators_file.on_axes(pieces, wide=width > 40)
    assert (on[0] ** 2).sum(1).mean() == pytest.approx(1)
    np.testing.assert_allclose(on[0].T @ on[0], np.diag((on[0] ** 2).sum(0)), atol=1e-12)
    size = ((x - mean) ** 2).sum(1).mean()
    for penalty, *found in on_every_penalty(on, y, labels, penalties := np.logspace(1, -4, 4)):
        assert penalty in penalties
        for target, one in zip(y.T, found[0], strict=True):
            if not labels:
                plain = Ridge(penalty * size * 40).fit(x, target).predict(new)[:, None]
            else:
                model = LogisticRegression(C=1 / (penalty * size * 40), **EXACT)
                plain = model.fit(x, codes(target, labels)).predict_proba(new)
            np.testing.assert_allclose(one, plain, atol=1e-6 if labels else 1e-9)


def codes(target, labels):
    return np.digitize(target, np.quantile(target, np.arange(1, labels) / labels))


def on_every_penalty(on, y, labels, penalties):
    """Penalty and outputs (target, row, class)."""
    if labels:
        y = np.stack([codes(target, labels) for target in y.T], 1)
        found = estimators_file.logistic(on[0], y, on[1], penalties, labels)
    else:
        found = estimators_file.ridge(on[0], y, on[1], penalties)
    return zip(penalties, found, strict=True)


@pytest.mark.parametrize("scale", [1e-3, 1, 1e3])
def test_logistic_regression_ends_at_its_minimum_however_far_and_rare(scale):
    """Two rows of forty have the label, and one of them stands a thousand deviations apart."""
    from sklearn.linear_model import LogisticRegression

    rng = np.random.default_rng(1)
    x = rng.standard_normal((40, 5))
    x[7] *= 1000
    x -= x.mean(0)
    x = scale * x @ np.linalg.eigh(x.T @ x)[1]
    y = np.isin(np.arange(40), [3, 7]).astype(int)
    for penalty in (1.0, 1e-3, 1e-6):
        found = next(estimators_file.logistic(x, y[:, None], x, [penalty], 2))[0]
        exact = LogisticRegression(C=1 / (penalty * 40), **EXACT).fit(x, y).predict_proba(x)
        np.testing.assert_allclose(found, exact, atol=2e-5)


def test_pieces_of_features_give_what_all_of_them_give(features, monkeypatch):
    """However many columns are prepared at a time, with ComBat's priors over all of them."""
    some = features.compute().copy(deep=True)
    some.features[3, 5] = np.nan
    options = {"harmonize": "site", "preserve": ["age"], "confounds": ["age"]}
    whole = [probe(some, "group", **options), probe(some, "age")]
    monkeypatch.setattr(probe_file, "PIECE", 7)
    pieces = [probe(some, "group", **options), probe(some, "age")]
    for a, b in zip(whole, pieces, strict=True):
        np.testing.assert_allclose(a.output, b.output, atol=1e-6)


def test_everyone_left_out_is_counted_with_a_reason(features):
    age = features.age.values.copy()
    age[[0, 5]] = np.nan
    some = features.assign_coords(age=("subject", age)).copy(deep=True)
    some.features[7] = np.nan
    other = noise(some).isel(subject=slice(1, None))
    scores = probe([some, other], "age")
    excluded = json.loads(scores.attrs["excluded"])
    ids = features.subject.values
    assert excluded == {"not in noise": [ids[0]], "no connectome": [ids[7]], "no age": [ids[5]]}
    assert scores.attrs["n"] == 87 == scores.sizes["subject"]


def test_labels_come_from_all_features_whatever_their_order(features):
    bare = noise(features).drop_vars(["participant", "site"]).isel(subject=slice(None, None, -1))
    for many in ([features, bare], [bare, features]):
        for options in ({}, {"protocol": "paper"}):
            scores = probe(many, "age", **options)
            for row in np.isfinite(scores.output[0, :, :, 0].values):
                people = scores.participant.values
                assert not set(people[row]) & set(people[~row])
            assert "no participant" not in scores.attrs["notes"]
    more = bare.assign_coords(tr=("subject", np.full(90, 0.8)))  # another, and not in use
    assert set(probe([features, more], "age").tr.values) == {2.0}
    assert probe([more, features], "age").subject.dtype == features.subject.dtype
    few = bare.isel(subject=slice(80))
    for many in ([features, few], [few, features]):
        scores = probe(many, "age")
        assert scores.attrs["n_rows"] == 90 == scores.attrs["n"] + 10
        assert len(json.loads(scores.attrs["excluded"])["not in noise"]) == 10
    assert "no participant is named" in probe(bare, "age").attrs["notes"]


@pytest.mark.parametrize("name", ["age", "site", "participant"])
def test_labels_that_disagree_are_refused(features, name):
    other = noise(features)
    other = other.assign_coords({name: ("subject", features[name].values[::-1])})
    with pytest.raises(InputError, match=f"Expected one '{name}' of each subject, found"):
        probe([features, other], "age")


def test_missing_labels_of_pandas_are_missing(features):
    n = features.sizes["subject"]
    words = np.where(np.arange(n) % 9 == 0, None, features.group.values)
    for values in (pd.array(words, dtype="string"), [w or "NA" for w in words]):
        scores = probe(features.assign_coords(dx=("subject", values)), "dx")
        assert list(scores["class"].values) == ["older", "younger"]
        assert len(json.loads(scores.attrs["excluded"])["no dx"]) == 10


def test_whole_floats_are_labels_as_whole_numbers_are(features):
    code = (features.age.values > 50).astype(float)
    some = features.assign_coords(code=("subject", code))
    for options in ({"classes": (0, 1)}, {"task": "label"}):
        scores = probe(some, "code", **options)
        assert list(scores["class"].values) == ["0", "1"]
        assert scores.attrs["n"] == 90


@pytest.mark.parametrize("protocol", ["paper", "brainmarks"])
def test_protocols_refuse_too_few_participants(features, protocol):
    for rows in (slice(6), [0, 2, 4]):
        few = features.isel(subject=rows)
        few = few.assign_coords(
            half=("subject", ["a", "b", "a", "b", "a", "b"][: few.subject.size])
        )
        with pytest.raises(InputError, match=f"Expected 5 participants for '{protocol}', found 3"):
            probe(few, "half", protocol=protocol)


def bad_features(features):
    values = features.features.copy()
    values[3, 2] = np.inf
    words = features.features.astype(str)
    tangent = connectome(make_cohort(), "tangent")
    return [
        ([], "Expected features, found an empty list"),
        (features.features.values, "Expected features as an xarray.Dataset, found ndarray"),
        (features.assign(features=values), "Expected finite numbers in connectome, or NaN"),
        (features.assign(features=words), "Expected numbers in connectome, found <U"),
        (fuse(features, noise(features)).isel(feature=[30, 2]), "Expected all features of"),
        (tangent.isel(feature=slice(30)), "Expected all features of 'connectome, tangent'"),
    ]


def test_bad_features_are_refused(features):
    for bad, message in bad_features(features):
        with pytest.raises(InputError, match=message):
            probe(bad, "age")


def test_models_of_one_probe_share_subjects_and_folds(features):
    scores = probe([features, noise(features)], "group")
    tested = np.isfinite(scores.output[..., 0].values)
    np.testing.assert_array_equal(tested[0], tested[1])
    assert list(scores.model.values) == ["connectome", "noise"]


def test_same_seed_same_scores_whatever_the_order_of_features(features):
    a = probe(features, "age", repeats=2)
    b = probe(features, "age", repeats=2)
    xr.testing.assert_identical(a, b)
    turned = probe(features.isel(feature=slice(None, None, -1)), "age", repeats=2)
    np.testing.assert_allclose(a.score, turned.score, atol=1e-4)


def test_lazy_features_are_read_once(features):
    reads = []

    def read():
        reads.append(1)
        return features.features.values

    lazy = da.from_delayed(dask.delayed(read)(), features.features.shape, np.float32)
    found = probe(features.assign(features=(("subject", "feature"), lazy)), "age", permutations=2)
    assert len(reads) == 1
    xr.testing.assert_allclose(found.score, probe(features, "age").score)


def test_boolean_three_label_and_integer_targets(features):
    third = np.array(["low", "mid", "high"])[np.digitize(features.age.values, [40, 60])]
    some = features.assign_coords(
        third=("subject", third),
        old=("subject", features.age.values > 50),
        years=("subject", features.age.values.astype(int)),
    )
    assert set(probe(some, "third")["class"].values) == {"low", "mid", "high"}
    assert probe(some, "old").attrs["positive"] == "True"
    assert probe(some, "years").attrs["task"] == "number"
    assert probe(some, "group", classes=("younger", "older")).attrs["positive"] == "older"


BAD = [
    ({"target": "iq"}, "Expected 'iq' as a coordinate on subject, found .*age"),
    ({"target": "age", "groups": "scanner"}, "Expected 'scanner' as a coordinate"),
    ({"target": ["age"]}, "Expected target as the name of a coordinate, found .'age'."),
    ({"target": "age", "groups": ["site"]}, "Expected groups as the name of a coordinate"),
    ({"target": "age", "harmonize": ["site"]}, "Expected harmonize as the name of a coordinate"),
    ({"target": "age", "confounds": "group"}, "Expected confounds as a list .*, found 'group'"),
    ({"target": "age", "confounds": None}, "Expected confounds as a list .*, found None"),
    ({"target": "age", "confounds": 7}, "Expected confounds as a list .*, found 7"),
    ({"target": "age", "preserve": "sex"}, "Expected preserve as a list .*, found 'sex'"),
    ({"target": "age", "preserve": ["sex"]}, "Expected harmonize beside preserve, found preserve="),
    ({"target": "age", "seed": -1}, "Expected seed as a whole number of at least 0, found -1"),
    ({"target": "age", "seed": None}, "Expected seed as a whole number of at least 0, found None"),
    ({"target": "age", "folds": 2.5}, "Expected folds as a whole number of at least 1, found 2.5"),
    ({"target": "age", "folds": "5"}, "Expected folds as a whole number of at least 1, found '5'"),
    ({"target": "age", "repeats": 0}, "Expected repeats as a whole number of at least 1, found 0"),
    ({"target": "age", "permutations": -1}, "Expected permutations as a whole number"),
    ({"target": "age", "folds": 46}, "Expected from 2 to 45 folds .participants., found 46"),
    ({"target": "age", "folds": 1}, "Expected from 2 to 45 folds"),
    ({"target": "group", "task": "number"}, "Expected numbers in 'group', found older, younger"),
    ({"target": "age", "task": "regression"}, "Expected task to be number, label, found"),
    ({"target": "third", "classes": ("low", "top")}, "Expected subjects of every class low, top"),
    ({"target": "age", "protocol": "kfold"}, "Expected protocol to be paper, brainmarks, found"),
    ({"target": "age", "protocol": "brainmarks"}, "Expected labels for protocol 'brainmarks'"),
    (
        {"target": "age", "protocol": "paper", "groups": "site"},
        "alone, found groups, stratify, folds or repeats too",
    ),
    (
        {"target": "age", "protocol": "paper", "folds": 10},
        "alone, found groups, stratify, folds or",
    ),
    (
        {"target": "group", "protocol": "brainmarks", "stratify": "site", "repeats": 2},
        "Expected protocol 'brainmarks' alone, found groups, stratify, folds or repeats too",
    ),
    ({"target": "age", "confounds": ["age"]}, "found 'age', which tells 'age' of everyone"),
    ({"target": "age", "confounds": ["born"]}, "found 'born', which tells 'age' of everyone"),
    (
        {"target": "age", "preserve": ["log_age"], "harmonize": "site"},
        "found 'log_age', which tells 'age'",
    ),
    ({"target": "age", "confounds": ["participant"]}, "found 'participant', which tells 'age'"),
    ({"target": "site", "harmonize": "site"}, "found 'site', which tells 'site' of everyone"),
    (
        {"target": "group", "preserve": ["coded"], "harmonize": "site"},
        "found 'coded', which tells 'group'",
    ),
    ({"target": "group", "harmonize": "subtype"}, "found 'subtype', which tells 'group'"),
    ({"target": "mixed"}, "Expected distinct labels in 'mixed', found 'ASD', 'asd' that differ"),
    ({"target": "single"}, "Expected at least two labels in 'single', found 'x' only"),
    ({"target": "flat"}, "Expected 'flat' to vary, found 1.0 only"),
    ({"target": "empty"}, "Expected subjects with 'empty' and features, found none"),
    ({"target": "age", "groups": "single"}, "Expected at least two values of 'single'"),
    (
        {"target": "by_site", "groups": "site"},
        "Expected every label in the training part of fold A, found no 'patient'",
    ),
]


@pytest.mark.parametrize(("options", "message"), BAD, ids=[str(b[0]) for b in BAD])
def test_bad_input_is_refused_with_both_facts(features, options, message):
    n = features.sizes["subject"]
    bad = features.assign_coords(
        mixed=("subject", np.array(["ASD", "asd", "TDC"])[np.arange(n) % 3]),
        single=("subject", np.full(n, "x")),
        flat=("subject", np.ones(n)),
        third=("subject", np.array(["low", "mid", "high"])[np.arange(n) % 3]),
        empty=("subject", np.full(n, np.nan)),
        born=("subject", np.round(2020.5 - features.age.values, 2)),
        log_age=("subject", np.log(features.age.values)),
        coded=("subject", np.where(features.group == "older", 2, 1)),
        subtype=("subject", np.char.add(features.group.values, ["", " I"] * (n // 2))),
        by_site=("subject", np.where(features.site == "A", "patient", "control")),
    )
    with pytest.raises(InputError, match=message):
        probe(bad, **options)


def test_constant_features_are_refused_and_some_constant_ones_ignored(features):
    with pytest.raises(InputError, match="Expected features that vary over subjects"):
        probe(xr.ones_like(features), "age")
    partly = features.copy(deep=True)
    partly.features[:, 3] = 1.0
    without = features.drop_isel(feature=3)
    np.testing.assert_allclose(probe(partly, "age").score, probe(without, "age").score, atol=1e-6)


TAKEN = "score class fold model metric output decision prediction truth null estimator group_label"


@pytest.mark.parametrize("name", TAKEN.split())
def test_a_label_called_as_a_part_of_scores_changes_none(features, name):
    values = np.random.default_rng(0).normal(50, 10, 90)
    for labels in (values, np.where(values > 50, "a", "b")):
        named = features.assign_coords({name: ("subject", labels)})
        scores = probe(named, "group", permutations=2)
        assert scores.equals(
            probe(features, "group", permutations=2).assign_coords(
                {name: scores[name]} if name == "group_label" else {}
            )
        )
    as_target = compare(probe(named, name))
    words = compare(probe(features.assign_coords(word=named[name].drop_vars(name)), "word"))
    pd.testing.assert_frame_equal(as_target, words, check_names=False)


@pytest.mark.parametrize(("people", "folds"), [(5, 5), (6, 5), (10, 10), (8, 5)])
def test_no_fold_is_left_without_anyone_to_test(people, folds):
    """Scikit-learn's stratified folds of a few people with many scans each may be empty."""
    for seed in range(25):
        rng = np.random.default_rng(seed)
        person = np.repeat(np.arange(people), rng.integers(1, 10, people))
        data = xr.Dataset(
            coords={
                "subject": [f"s{i}" for i in range(len(person))],
                "participant": ("subject", person.astype(str)),
                "y": ("subject", rng.permutation(np.arange(len(person)) % 2).astype(str)),
                "score": ("subject", rng.normal(size=len(person))),
            }
        )
        for target in ("y", "score"):
            try:
                task = make_task(data, target, folds=folds)
            except InputError:  # a label that only one of them has
                continue
            for train, test, _ in task.folds():
                assert len(test)
                assert all(len(fit) * len(hold) for fit, hold in task.inner_splits(train))


@pytest.mark.parametrize("options", [{}, {"preserve": ["age", "sex"]}, {"groups": "site"}])
def test_combat_with_sites_of_one_and_features_that_are_constant(options):
    rng = np.random.default_rng(0)
    site = np.array(["A"] * 44 + ["B"] * 44 + ["C", "D"])
    x = rng.standard_normal((90, 12)) + (site == "B")[:, None]
    x[:, 0], x[site == "A", 1], x[:, 2], x[5, 3] = 3.0, 0.0, site == "B", np.nan
    labels = {"y": rng.choice(["p", "c"], 90), "age": rng.uniform(20, 80, 90), "site": site}
    labels |= {"sex": rng.choice(["F", "M"], 90)}
    data = xr.Dataset(
        {"features": (("subject", "feature"), x)}, {"subject": np.arange(90).astype(str)}
    )
    data = data.assign_coords({name: ("subject", values) for name, values in labels.items()})
    scores = probe(data, "y", harmonize="site", **options)
    assert np.isfinite(scores.output.sum("class")).all()
    assert set(scores.prediction.values.ravel()) <= {"p", "c"}


def test_small_sites_are_held_out_together_with_a_note(features):
    site = features.site.values.astype("U10")
    site[:2], site[2:4] = "tiny", "small"
    scores = probe(features.assign_coords(site=("subject", site)), "age", groups="site")
    assert "small+tiny" in scores.fold.values
    assert "fewer than 5 subjects, held out together" in scores.attrs["notes"]


@pytest.mark.parametrize("groups", ["participant", "alone", "pair"])
def test_many_small_groups_are_held_out_several_a_fold(features, groups):
    some = features.assign_coords(
        alone=("subject", [f"scanner {i}" for i in range(90)]),
        pair=("subject", [f"pair {i // 4}" if i < 80 else "rest" for i in range(90)]),
    )
    scores = probe(some, "age", groups=groups)
    tested = np.isfinite(scores.output[0, :, :, 0].values)
    assert len(tested) == 5
    assert tested.sum(1).max() < 40
    for row in tested:
        assert (
            not set(some[groups].values[row]) & set(some[groups].values[~row]) or groups == "alone"
        )
        assert not set(some.participant.values[row]) & set(some.participant.values[~row])


def test_sites_that_share_all_participants_cannot_be_held_out_and_it_says_why(features):
    scanner = np.array(["A", "B"])[np.arange(90) % 2]
    with pytest.raises(InputError, match="share participants held out together: sub-000, sub-001"):
        probe(features.assign_coords(scanner=("subject", scanner)), "age", groups="scanner")


@pytest.mark.parametrize("options", [{}, {"groups": "site"}, {"protocol": "paper"}])
def test_families_are_never_split(features, options):
    family = np.array([f"f{i // 3 % 8}" for i in range(90)])  # across participants
    family[:12] = "n/a"
    tied = np.array([f"{i // 6 % 4}" for i in range(90)])
    tied[:12] = features.participant.values[:12]
    if options.get("groups"):
        tied = family = np.where(features.site == "A", "a", "b")
    scores = probe(features.assign_coords(family=("subject", family)), "age", **options)
    for row in np.isfinite(scores.output[0, :, :, 0].values):
        assert not set(tied[row]) & set(tied[~row])
    assert scores.attrs["n_participants"] == 45


def test_groups_are_balanced_over_strata(features):
    """Twelve families of one sex each: of every fold half of them."""
    clinic = np.array([f"c{i // 2 % 12:02}" for i in range(90)])
    sex = np.where(np.arange(90) // 2 % 12 < 6, "F", "M")
    some = features.assign_coords(clinic=("subject", clinic), sex=("subject", sex))
    scores = probe(some, "age", groups="clinic", stratify="sex", folds=3)
    tested = np.isfinite(scores.output[0, :, :, 0].values)
    share = [(sex[row] == "F").mean() for row in tested]
    np.testing.assert_allclose(share, 0.5, atol=0.15)
    one = probe(some, "age", groups="site", stratify="sex", folds=3)
    assert "balanced over nothing" in one.attrs["notes"]


def test_strata_of_numbers_are_fifths_and_rare_ones_are_noted(features):
    late = np.random.default_rng(0).permutation(np.repeat(np.arange(45.0), 2))
    some = features.assign_coords(
        late=("subject", late), word=("subject", [f"w{i}" for i in range(90)])
    )
    scores = probe(some, "group", stratify="late", folds=3)
    tested = np.isfinite(scores.output[0, :, :, 0].values)
    fifth = late // 9
    counts = np.array([np.bincount(fifth[row].astype(int), minlength=5) for row in tested])
    assert counts.std(0).mean() < 1.7
    plain, word = probe(some, "group"), probe(some, "group", stratify="word")
    np.testing.assert_array_equal(plain.output, word.output)
    assert "too few subjects are alike in word: not balanced over it" in word.attrs["notes"]


@pytest.mark.parametrize("options", [{"groups": "site"}, {"folds": 45}])
def test_folds_one_by_one_are_not_repeated(features, options):
    once, thrice = (probe(features, "age", repeats=r, **options) for r in (1, 3))
    np.testing.assert_array_equal(once.score, thrice.score)
    assert "the same in every repeat" in thrice.attrs["notes"]


def test_folds_that_measure_no_correlation_are_noted(features):
    pairs = probe(features.isel(subject=slice(10)), "age", folds=5)
    assert pairs.attrs["notes"].count("its r is no measure") == 5
    flat = features.assign_coords(
        age=("subject", np.where(features.site == "A", 40.0, features.age))
    )
    assert "fold A tests 1 distinct" in probe(flat, "age", groups="site").attrs["notes"]


def test_more_folds_than_groups_is_one_fold_a_group_with_a_note(features):
    scores = probe(features, "age", groups="site", folds=8)
    assert list(np.sort(scores.fold.values)) == ["A", "B", "C"]
    assert "3 folds that hold out whole values of site" in scores.attrs["notes"]


def test_a_site_with_one_subject_is_harmonized_and_a_family_of_one_is_exchanged(features):
    site = features.site.values.astype("U8")
    site[0] = "lone"
    family = np.array([f"f{i // 8}" for i in range(90)])
    family[4:6] = "f alone"
    some = features.assign_coords(site=("subject", site), family=("subject", family))
    scores = probe(some, "group", harmonize="site", permutations=3)
    assert np.isfinite(scores.score.sel(metric="auroc")).all()
    assert np.isfinite(scores.null).all()


def test_participants_at_two_sites_tie_the_sites_together(features):
    site = features.site.values.copy()
    site[1] = "B"  # the first participant's second session
    scores = probe(features.assign_coords(site=("subject", site)), "age", groups="site")
    assert list(np.sort(scores.fold.values)) == ["A+B", "C"]
    assert "share participants" in scores.attrs["notes"]


def test_a_site_of_one_class_gets_no_auroc_and_a_note(features):
    group = np.where(features.site == "A", "older", features.group.values)
    scores = probe(features.assign_coords(group=("subject", group)), "group", groups="site")
    auroc = scores.score.sel(metric="auroc", fold="A")
    assert np.isnan(auroc).all()
    assert np.isfinite(scores.score.sel(metric="accuracy")).all()
    assert "fold A tests 'older' only" in scores.attrs["notes"]
    assert np.isfinite(compare(scores).score.drop("positive_f1", level="metric")).all()


# ---------------------------------------------------- splits that were made before


@pytest.fixture(scope="module")
def parts(features):
    """Three cuts of the participants into train, validation and test."""
    return split(make_cohort(), stratify="site", repeats=3, seed=1)


def test_a_split_says_who_trains_and_who_is_tested(features, parts):
    scores = probe([features, noise(features)], "age", split=parts)
    tested = np.isfinite(scores.output[0, :, :, 0].values)
    np.testing.assert_array_equal(tested, parts.values == "test")
    assert scores.attrs["test_share"] == pytest.approx(1 / 3, abs=0.05)
    assert json.loads(scores.attrs["split"])["seed"] == 1
    assert np.isfinite(compare(scores).score).all()
    assert "3 splits that were made before" in report_file.methods(scores)


def test_a_split_that_leaves_sites_out_is_the_folds_over_sites(features):
    by_site = probe(features, "age", split=split(make_cohort(), leave_out="site"))
    folds = probe(features, "age", groups="site")
    assert set(by_site.fold.values) == {"A", "B", "C"}
    turned = folds.sel(fold=by_site.fold)
    tested = [np.isfinite(s.output.values[0, :, :, 0]) for s in (by_site, turned)]
    np.testing.assert_array_equal(*tested)


def test_a_split_chooses_the_penalty_on_its_validation_part(features, parts):
    """What the validation rows are called changes their predictions' use, and no one else's."""
    task = make_task(features, "age", split=parts)
    for (train, test, validation), part in zip(task.folds(), parts.values, strict=True):
        fit, stop = task.stopping_split(train, validation)
        np.testing.assert_array_equal(fit, np.flatnonzero(part == "train"))
        np.testing.assert_array_equal(stop, np.flatnonzero(part == "validation"))
        np.testing.assert_array_equal(test, np.flatnonzero(part == "test"))


def test_subjects_that_a_split_does_not_know_are_left_out(features, parts):
    scores = probe(features, "age", split=parts.isel(subject=slice(None, 80)))
    assert scores.attrs["n"] == 80
    assert len(json.loads(scores.attrs["excluded"])["not in the split"]) == 10


def bad_splits(parts):
    torn = parts.copy(deep=True)
    torn[1, 0], torn[1, 1] = "train", "test"
    return [
        ({"split": parts[0]}, r"Expected split as a DataArray \(repeat, subject\), found"),
        ({"split": parts.values}, r"Expected split as a DataArray .*, found ndarray"),
        ({"split": parts, "groups": "site"}, "Expected split alone, found groups, stratify"),
        ({"split": parts, "protocol": "paper"}, "Expected protocol 'paper' alone, found split too"),
        ({"split": torn}, "Expected one part for all rows of a participant, .*sub-000 in repeat 1"),
        (
            {"split": parts.where(parts != "test", "held")},
            "Expected subjects to train on and to test in repeat 0, found .* and 0",
        ),
    ]


def test_splits_that_do_not_fit_are_refused(features, parts):
    for options, message in bad_splits(parts):
        with pytest.raises(InputError, match=message):
            probe(features, "age", **options)


@pytest.mark.parametrize("options", [{}, {"groups": "site"}, {"protocol": "paper"}])
def test_who_says_when_to_stop_shares_no_participant_with_anyone(features, options):
    task = make_task(features, "group", **options)
    for train, test, validation in task.folds():
        fit, stop = task.stopping_split(train, validation)
        assert set(fit) | set(stop) == set(train) | set(validation)
        people = [np.unique(task.rows.people[rows]) for rows in (fit, stop, test)]
        assert np.unique(np.concatenate(people), return_counts=True)[1].max() == 1
        assert 0.1 < len(stop) / len(fit) < 0.4


def test_a_task_needs_labels_alone_and_scores_what_it_is_given(features):
    """What a network predicts stands beside a probe in the same folds."""
    task = make_task(make_cohort(), "group", seed=3)
    output, decision = task.empty()
    for i, (train, test, _) in enumerate(task.folds()):
        output[i, test] = np.bincount(task.truth[train]) / len(train)
        decision[i, test] = task.decide(output[i, test], task.truth[train])
    ours = task.scores("guess", output, decision, estimator="by hand")
    check(ours, "scores")
    guess = probe(nothing(features), "group", seed=3)
    np.testing.assert_allclose(ours.score, guess.score)
    np.testing.assert_allclose(ours.output, guess.output)
    np.testing.assert_array_equal(ours.truth, guess.truth)
    assert ours.attrs["estimator"] == "by hand"
    table = compare(ours, probe(features, "group", seed=3))
    assert np.isfinite(table.loc[("guess", "auroc"), "p"])


# ----------------------------------------------------------------- compare


def test_compare_is_one_table_of_one_target(features):
    a, b = probe(features, "age"), probe(noise(features), "age")
    table = compare(a, b)
    assert list(table.index.get_level_values("model").unique()) == ["connectome", "noise"]
    assert (table.low <= table.score).all()
    assert (table.score <= table.high).all()
    np.testing.assert_allclose(
        table.loc[("connectome", "mae"), "score"], a.score.sel(metric="mae").mean(), atol=1e-3
    )


def test_compare_tests_against_the_control_on_shared_folds_only(features):
    both = probe([features, noise(features)], "age")
    table = compare(both)
    assert 0 <= table.loc[("connectome", "r"), "p"] < 0.05
    assert np.isnan(table.loc[("noise", "r"), "p"])
    r = both.score.sel(metric="r").mean("fold").values
    np.testing.assert_allclose(table.loc[("connectome", "r"), "diff"], r[0] - r[1], atol=1e-3)
    apart = compare(probe(features, "age"), probe(noise(features), "age"))
    assert apart.loc[("connectome", "r"), "p"] == table.loc[("connectome", "r"), "p"]
    fewer = probe(noise(features).isel(subject=slice(4, None)), "age")
    other = compare(probe(features, "age"), fewer)
    assert np.isnan(other.p).all()
    assert np.isfinite(other.loc[("connectome", "r"), "diff"])
    turned = compare(both, control="connectome")
    assert turned.loc[("noise", "r"), "diff"] < 0
    with pytest.raises(InputError, match="Expected control to be connectome, noise, found 'x'"):
        compare(both, control="x")


@pytest.mark.parametrize("target", ["age", "group"])
def test_too_few_people_get_no_interval_and_no_test(features, target):
    """Eight people once had r 1.000 [1.000, 1.000] and a p of 0.000."""
    some = features.isel(subject=slice(0, 16))
    for rows in (some, some.isel(subject=slice(0, None, 2))):
        table = compare(probe([rows, noise(rows)], target, folds=4))
        assert (table.note == "too few: 8 participants").all()
        assert table[["low", "high", "p", "p_paired"]].isna().all(axis=None)
    if target == "age":  # two rows a fold: any line goes through both
        assert np.isnan(table.loc[("connectome", "r"), "score"])
    assert "note" not in compare(probe(features, target))


def test_too_few_of_a_label_get_no_interval(features):
    rare = np.where(np.arange(90) // 2 % 12 == 0, "rare", "common")  # four participants
    some = features.assign_coords(rare=("subject", rare))
    table = compare(probe(some, "rare", folds=3))
    assert set(table.note) == {"too few: 4 participants of a label"}
    assert table.high.isna().all()


def foretold(task, name, noise, seed=0):
    """Scores of a model that knows the truth but for noise."""
    output, decision = task.empty()
    rng = np.random.default_rng(seed)
    for i, (_, test, _) in enumerate(task.folds()):
        output[i, test, -1] = task.truth[test] + noise * rng.normal(size=len(test))
        if task.names is not None:
            output[i, test, 0] = 1 - output[i, test, 1]
            decision[i, test] = output[i, test].argmax(1)
    return task.scores(name, output, decision, estimator="by hand")


def test_a_clear_difference_is_found_over_participants_and_no_p_is_zero():
    task = make_task(make_cohort(n=150), "age")
    clear = compare(foretold(task, "sure", 0.01), foretold(task, "vague", 25.0, seed=1))
    row = clear.loc[("sure", "r")]
    assert row.score > 0.99 > 0.7 > clear.loc[("vague", "r"), "score"]
    assert 0 < row.p_paired <= 0.01
    assert clear[["p", "p_paired"]].min(axis=None) >= 0.001


def test_models_that_are_alike_seldom_differ():
    """Two of equal noise: a p of 0.05 or less in about one of twenty studies."""
    task = make_task(make_cohort(), "age")
    p = []
    for seed in range(60):
        pair = [foretold(task, name, 20.0, 2 * seed + i) for i, name in enumerate("ab")]
        p.append(compare(*pair, draws=200).loc[("a", "r"), "p_paired"])
    assert np.mean(np.array(p) <= 0.05) < 0.15
    assert np.mean(p) > 0.35


def test_a_perfect_score_is_as_sure_as_its_people_are_many():
    perfect = [foretold(make_task(make_cohort(n=n), "group"), "all right", 0.0) for n in (60, 180)]
    low = [compare(s).loc[("all right", "accuracy"), "low"] for s in perfect]
    assert 0.7 < low[0] < low[1] < 1


def test_a_site_a_fold_unless_folds_are_asked_for(features):
    site = np.array([f"site {i // 2 % 9}" for i in range(90)])
    some = features.assign_coords(site=("subject", site))
    scores = probe(some, "age", groups="site")
    assert sorted(scores.fold.values) == sorted(set(site))
    tested = np.isfinite(scores.output.values[0, :, :, 0])
    for name, row in zip(scores.fold.values, tested, strict=True):
        assert set(site[row]) == {name}
    assert probe(some, "age", groups="site", folds=3).sizes["fold"] == 3


def test_p_values_are_adjusted_over_targets(features):
    by_age = probe([features, noise(features)], "age")
    later = features.assign_coords(later=("subject", features.age.values + 1.0))
    second = probe([later, noise(later)], "later")
    alone, both = compare(by_age), compare(by_age, second)
    p = alone.loc[("connectome", "r"), "p"]
    np.testing.assert_allclose(both.loc[("age", "connectome", "r"), "p"], min(1, 2 * p), atol=2e-3)


def test_reference_numbers_stand_in_their_own_column(features):
    table = compare(probe(features, "age", protocol="paper"), reference="HCP-A")
    assert table.loc[("connectome", "mae"), "paper: BrainHarmonix"] == 6.56
    with pytest.raises(InputError, match="Expected reference to be ABIDE, ABIDE-I"):
        compare(probe(features, "age"), reference="UKB")


def test_one_call_a_cohort_gives_the_papers_table(features):
    """Sites, words and a few missing diagnoses as ABIDE has them, beside the published numbers."""
    rng = np.random.default_rng(0)
    dx = np.where(rng.random(90) < 0.5 + (features.age - 50) / 80, "Autism", "Control")
    dx = dx.astype("U10")
    dx[[1, 20]] = "n/a"
    abide = features.assign_coords(
        dx_group=("subject", dx),
        site=("subject", np.array(["NYU", "UM_1"])[np.arange(90) // 2 % 2]),
    )
    for cohort in ("ABIDE-I", "ABIDE-II", "ADHD-200", "PPMI", "ADNI", "HCP-A"):
        target = "age" if cohort == "HCP-A" else "dx_group"
        table = compare(probe(abide, target, protocol="paper"), reference=cohort)
        column = table["paper: BrainHarmonix"].droplevel("model").dropna()
        assert column.to_dict() == pytest.approx(PUBLISHED[cohort])
        assert np.isfinite(table.droplevel("model").loc[list(PUBLISHED[cohort]), "score"]).all()


# accuracy and positive-class F1, or MAE [years] and r: Dong, Li et al., NeurIPS 2025
PUBLISHED = {
    "ABIDE-I": {"accuracy": 0.631, "positive_f1": 0.726},
    "ABIDE-II": {"accuracy": 0.667, "positive_f1": 0.749},
    "ADHD-200": {"accuracy": 0.701, "positive_f1": 0.667},
    "PPMI": {"accuracy": 0.643, "positive_f1": 0.564},
    "ADNI": {"accuracy": 0.646, "positive_f1": 0.688},
    "HCP-A": {"mae": 6.56, "r": 0.42},
}


@pytest.mark.parametrize(("protocol", "without"), [("paper", True), (None, False)])
def test_metrics_of_decisions_have_no_interval_in_the_papers_three_splits(protocol, without):
    """Where the largest probability falls in three splits says too little of other splits."""
    table = compare(probe(connectome(make_cohort(n=160)), "group", protocol=protocol))
    table = table.droplevel("model")
    decided = ["balanced_accuracy", "macro_f1", "accuracy", "positive_f1"]
    assert np.isfinite(table.score).all()
    assert (table.loc[decided, ["low", "high"]].isna() == without).all(axis=None)
    assert np.isfinite(table.loc[["auroc", "auprc"], ["low", "high"]]).all(axis=None)


@pytest.mark.parametrize("together", [True, False])
def test_models_of_one_name_are_still_tested_against_each_other(features, together):
    other = noise(features).assign_attrs(name="connectome")
    given = [[features, other]] if together else [features, other]
    table = compare(*(probe(f, "age") for f in given))
    named = compare(probe([features, noise(features)], "age"))
    for column in ("score", "diff", "p"):
        np.testing.assert_array_equal(table[column], named[column])
    assert len(report_file.explained_by(probe([features, other], "age"), ["site"])) == 2


@pytest.mark.parametrize(
    ("options", "least", "most"),
    [
        ({"target": "age"}, {"r": -1, "r2": -np.inf, "mae": 0}, {"r": 1, "r2": 1}),
        ({"target": "group"}, {"auroc": 0, "positive_f1": 0}, {"auroc": 1, "accuracy": 1}),
        ({"target": "third"}, {"auroc": 0, "macro_f1": 0}, {"auroc": 1, "macro_f1": 1}),
    ],
)
def test_intervals_end_where_their_metric_does(features, options, least, most):
    """Few subjects and an interval of nearly all draws reach past both ends."""
    few = features.isel(subject=slice(24))
    few = few.assign_coords(third=("subject", (few.age.values // 21).astype(int) % 3))
    scores = probe([few, noise(few)], folds=6, **options)
    table = compare(scores, level=0.99999).reset_index().dropna(subset="low")
    assert (table.low >= table.metric.map(least).fillna(-np.inf)).all()
    assert (table.high <= table.metric.map(most).fillna(np.inf)).all()
    assert ((table.low <= table.score) & (table.score <= table.high)).all()


@pytest.mark.parametrize(
    ("classes", "chance"), [((2,), 1 / 2), ((3,), 1 / 3), ((2, 3), None), ((1, 3), 1 / 3)]
)
def test_chance_stands_where_all_models_share_it(features, classes, chance):
    """Of one class are numbers, which have no balanced accuracy."""
    third = np.array(list("abc"))[np.arange(90) // 2 % 3]
    many = features.assign_coords(third=("subject", third))
    target = {1: "age", 2: "group", 3: "third"}
    table = compare(*(probe(many, target[n]) for n in classes))
    assert table.attrs["chance"].get("balanced_accuracy") == chance
    assert table.attrs["chance"]["auroc"] == 0.5


@pytest.mark.parametrize(
    ("given", "options", "message"),
    [
        (lambda s: [s], {"level": 95}, r"Expected level in \(0, 1\) .*, found 95 and 1000"),
        (lambda s: [s], {"level": 0}, r"Expected level in \(0, 1\) .*, found 0 and 1000"),
        (lambda s: [s], {"draws": 0}, "Expected .* two draws or more, found 0.95 and 0"),
        (lambda s: [], {}, "Expected scores to compare, found none"),
        (lambda s: [[s, s]], {}, "Expected scores as probe returns them, found list"),
        (lambda s: [s, s.score], {}, "Expected scores as probe returns them, found DataArray"),
        (lambda s: [s.drop_attrs()], {}, "Expected scores as probe returns them, found Dataset"),
    ],
)
def test_compare_refuses_what_it_cannot_read(features, given, options, message):
    scores = probe(nothing(features), "age")
    with pytest.raises(InputError, match=message):
        compare(*given(scores), **options)


# ----------------------------------------------------------- other options


def test_nothing_predicts_the_mean_or_the_frequencies(features):
    number = probe(nothing(features), "age")
    tested = np.isfinite(number.output[0, :, :, 0].values)
    for fold, test in enumerate(tested):
        guess = number.output[0, fold, test, 0].values
        np.testing.assert_allclose(guess, features.age.values[~test].mean(), rtol=1e-6)
    label = probe(nothing(features), "group")
    np.testing.assert_allclose(label.score.sel(metric="auroc"), 0.5)
    np.testing.assert_allclose(label.score.sel(metric="balanced_accuracy"), 0.5)


def test_fused_parts_weigh_the_same_whatever_their_width(features):
    """A hundred copies of a noisy part beside the signal cost no more than one."""
    wide = noise(features, width=5)
    wide = xr.concat([wide] * 100, "feature").assign_attrs(name="copies")
    narrow = probe(fuse(features, noise(features, width=5)), "age").score.sel(metric="r").mean()
    copied = probe(fuse(features, wide), "age").score.sel(metric="r").mean()
    np.testing.assert_allclose(narrow, copied, atol=1e-3)


def test_fuse_keeps_common_subjects_and_all_labels(features):
    some = noise(features).isel(subject=slice(10, None))
    both = fuse(features, some)
    check(both, "features")
    assert both.sizes == {"subject": 80, "feature": 28 + 12}
    assert both.attrs["name"] == "connectome + noise"
    np.testing.assert_array_equal(both.site, some.site)
    np.testing.assert_array_equal(both.features[:, 28:], some.features)


def test_confound_regression_takes_out_a_confound_and_only_in_the_fold(features):
    """Features that are motion and nothing else predict what follows motion, until asked."""
    rng = np.random.default_rng(0)
    motion = np.where(features.group == "older", 0.4, 0.2) + rng.normal(0, 0.08, 90)
    values = motion[:, None] * rng.normal(size=20) + 0.01 * rng.normal(size=(90, 20))
    moving = noise(features).drop_vars("features").assign_coords(mean_fd=("subject", motion))
    moving["features"] = (("subject", "feature"), values)
    naive = compare(probe(moving, "group"))
    controlled = compare(probe(moving, "group", confounds=["mean_fd"]))
    assert naive.loc[("noise", "auroc"), "low"] > 0.75
    assert controlled.loc[("noise", "auroc"), "low"] < 0.5
    assert controlled.loc[("noise", "auroc"), "score"] < 0.65


@pytest.mark.filterwarnings("error")
def test_a_confound_that_is_the_same_for_all_changes_nothing(features):
    plain, same = (probe(features, "age", confounds=c) for c in ([], ["tr"]))
    np.testing.assert_allclose(plain.output, same.output)


def test_what_the_confounds_explain_wholly_predicts_nothing(features):
    """Words and numbers that follow the target, as features and as confounds."""
    rng = np.random.default_rng(0)
    some = features.assign_coords(
        iq=("subject", features.age.values + 5 * rng.normal(size=90)),
        word=("subject", [f"{v:.6f}" for v in rng.normal(size=90)]),
    )
    words = confound_features(some, ["iq", "site"])
    assert probe(words, "age").score.sel(metric="r").mean() > 0.8
    gone = probe(words, "age", confounds=["site", "iq"])
    np.testing.assert_array_equal(gone.score.sel(metric="r"), 0)
    flat = probe(confound_features(some, ["site"]), "iq", harmonize="site")
    np.testing.assert_array_equal(flat.score.sel(metric="r"), 0)
    with pytest.raises(InputError, match="Expected fewer confounds than training rows"):
        probe(some, "age", confounds=["word"])


def test_combat_in_the_fold_removes_site_but_not_age(features):
    rng = np.random.default_rng(0)
    site = np.unique(features.site, return_inverse=True)[1]
    shifted = features.copy(deep=True)
    shifted.features[:] = features.features + 3 * rng.normal(size=(3, 28))[site]
    scanner = np.where(rng.random(90) < 0.05, "A", features.site)  # nearly the site, not quite
    shifted = shifted.assign_coords(scanner=("subject", scanner))
    seen = probe(shifted, "site").score.sel(metric="auroc").mean()
    gone = probe(shifted, "scanner", harmonize="site").score.sel(metric="auroc").mean()
    assert seen > 0.99
    assert gone < 0.65
    plain = probe(shifted, "age").score.sel(metric="r").mean()
    harmonized = probe(shifted, "age", harmonize="site", preserve=["group"])
    assert harmonized.score.sel(metric="r").mean() > plain - 0.05
    apart = probe(shifted, "age", harmonize="site", groups="site")
    assert "ComBat has not seen the site it tests" in apart.attrs["notes"]


def test_permuted_labels_give_the_null_and_a_small_p_only_where_there_is_an_effect(features):
    scores = probe([features, noise(features)], "age", permutations=19)
    assert scores.null.dims == ("model", "permutation")
    assert abs(float(scores.null.mean())) < 0.15
    table = compare(scores)
    assert table.loc[("connectome", "r"), "p_null"] == pytest.approx(1 / 20, abs=1e-3)
    assert table.loc[("noise", "r"), "p_null"] > 0.1


def test_exchanged_labels_that_leave_a_fold_without_one_are_drawn_again(features):
    n = np.arange(90) // 2
    rare = np.array(["a", "b"])[(n > 4).astype(int)]
    third = np.where(n < 2, "c", features.group.values)
    some = features.assign_coords(rare=("subject", rare), third=("subject", third)).drop_vars(
        "site"
    )
    seen = probe(some, "rare", permutations=15)
    assert np.isfinite(seen.null).all()
    few = probe(noise(some), "third", permutations=3, folds=2)
    assert np.isfinite(few.null).all()
    assert "exchanges without some label drawn again" in few.attrs["notes"]


def test_a_label_that_no_model_knows_is_never_decided(features):
    third = np.array(["a", "b", "c"])[np.arange(90) // 2 % 3]
    task = make_task(features.assign_coords(third=("subject", third)), "third")
    output = np.random.default_rng(0).random((30, 3)) * [1, 1, 0]
    assert set(task.decide(output, np.arange(60) % 2)) <= {0, 1}


def test_large_numbers_keep_their_digits(features):
    far = features.assign_coords(far=("subject", 1e9 + features.age.values))
    near, apart = probe(features, "age"), probe(far, "far")
    np.testing.assert_allclose(apart.output - 1e9, near.output, atol=1e-4)
    assert near.output.dtype == float


def test_brainmarks_chooses_its_penalty_on_whole_participants():
    person = np.repeat([f"p{i}" for i in range(20)], 2)[::-1]
    truth = np.repeat(np.arange(20) % 2, 2)
    cuts = probe_file.resplit_people(person, truth, 0)
    assert len(cuts) == 5
    for fit, hold in cuts:
        assert not set(person[fit]) & set(person[hold])
        assert len(fit) == 30 == 40 - len(hold)
    from sklearn.model_selection import StratifiedShuffleSplit

    plain = StratifiedShuffleSplit(5, test_size=0.25, random_state=0).split(truth, truth)
    alone = probe_file.resplit_people(np.arange(40).astype(str), truth, 0)
    for (fit, hold), (a, b) in zip(alone, plain, strict=True):
        np.testing.assert_array_equal(fit, np.sort(a))
        np.testing.assert_array_equal(hold, np.sort(b))
    with pytest.raises(InputError, match="Expected at least 2 training participants of each"):
        probe_file.resplit_people(person[:6], truth[:6], 0)


def test_words_that_are_numbers_or_dates_are_refused(features):
    days = np.datetime64("2020-01-01") + (features.age.values * 10).astype(int)
    age = features.age.values
    for kind, values in (
        ("numbers", age.astype(str)),
        ("numbers", age.astype(object)),
        ("dates", days),
        ("dates", days.astype(str)),
        ("dates", days - days.min()),
    ):
        some = features.assign_coords(target=("subject", values))
        with pytest.raises(InputError, match=f"labels in 'target', found {kind} as words: "):
            probe(some, "target")
    few = features.assign_coords(code=("subject", (age > 50).astype(int).astype(str)))
    assert list(probe(few, "code")["class"].values) == ["0", "1"]


def bad_estimators():
    from sklearn.linear_model import LogisticRegression, Ridge, RidgeClassifier
    from sklearn.svm import LinearSVC

    proba, fits = (
        "Expected a classifier with predict_proba, found",
        "Expected an estimator of scikit",
    )
    return [
        ("group", LinearSVC(), proba),
        ("group", RidgeClassifier(), proba),
        ("group", Ridge(), proba),
        (
            "age",
            LogisticRegression(),
            "Expected a regressor for a number, found LogisticRegression",
        ),
        ("age", "ridge", fits),
        ("age", Ridge, fits),
    ]


@pytest.mark.parametrize(("target", "estimator", "message"), bad_estimators())
def test_estimators_that_do_not_fit_are_refused(features, target, estimator, message):
    with pytest.raises(InputError, match=message):
        probe(features.isel(subject=slice(20)), target, estimator=estimator, folds=2)


def test_classes_choose_and_order_labels_and_count_the_rest(features):
    third = np.array(["low", "mid", "high"])[np.digitize(features.age.values, [40, 60])]
    some = features.assign_coords(third=("subject", third))
    scores = probe(some, "third", classes=("low", "high"))
    assert scores.attrs["positive"] == "high"
    out = json.loads(scores.attrs["excluded"])["another third"]
    np.testing.assert_array_equal(out, features.subject.values[third == "mid"])


def test_any_scikit_learn_estimator_fits_in(features):
    from sklearn.neighbors import KNeighborsRegressor

    scores = probe(features, "age", estimator=KNeighborsRegressor(5))
    assert scores.score.sel(metric="r").mean() > 0.4
    assert "KNeighborsRegressor" in scores.attrs["estimator"]


def test_paper_protocol_is_three_splits_of_6_2_2_balanced_over_sites(features):
    scores = probe(features, "group", protocol="paper")
    tested = np.isfinite(scores.output[0, :, :, 0].values)
    assert tested.shape[0] == 3
    np.testing.assert_allclose(tested.mean(1), 0.2, atol=0.05)
    assert scores.attrs["test_share"] == pytest.approx(1 / 3, abs=0.08)  # validation trains nothing
    for row in tested:
        assert not set(scores.participant.values[row]) & set(scores.participant.values[~row])
        assert set(scores.site.values[row]) == {"A", "B", "C"}
    np.testing.assert_array_equal(
        scores.decision.values[0][tested], scores.output.values[0].argmax(-1)[tested]
    )


def test_brainmarks_protocol_is_a_hundred_resplits(features, monkeypatch):
    assert folds_file.RESPLITS["brainmarks"] == 100
    monkeypatch.setitem(folds_file.RESPLITS, "brainmarks", 6)
    scores = probe(features.isel(subject=slice(40)), "group", protocol="brainmarks")
    tested = np.isfinite(scores.output[0, :, :, 0].values)
    assert tested.shape[0] == 6
    np.testing.assert_allclose(tested.mean(1), 0.2, atol=0.05)


def test_subjects_predict_each_other_in_folds_and_not_in_one_split(features):
    """The share by hand: n[i, j] splits in which j trained the model that i was tested by."""
    folds, paper = probe(features, "age"), probe(features, "age", protocol="paper")
    assert folds.attrs["mutual"] == pytest.approx(1)
    tested = np.isfinite(paper.output[0, :, :, 0].values)
    one = folds_file.Splits(np.arange(90))
    one.add("0", train=~tested[0], test=tested[0])
    assert one.mutual == 0
    assert 0 < paper.attrs["mutual"] < 0.5


def test_mutual_counts_pairs_that_predict_each_other():
    rng = np.random.default_rng(0)
    cuts = [np.split(rng.permutation(12), [7, 10]) for _ in range(4)]  # train, test, neither
    splits = folds_file.Splits(np.arange(12))
    for train, test, _ in cuts:
        splits.add("fold", train=train, test=test)
    found = splits.mutual
    n = np.zeros((12, 12))
    for train, test, _ in cuts:
        n[np.ix_(test, train)] += 1
    assert found == pytest.approx((n * n.T).sum() / (n**2).sum())


def test_features_may_bring_a_network_or_keep_their_leading_axes(features):
    """A network sees a product of two features, which no linear model does."""
    rng = np.random.default_rng(0)
    x = rng.choice([-1.0, 1.0], size=(90, 2)) + 0.3 * rng.normal(size=(90, 2))
    some = noise(features).drop_vars("features").drop_vars("participant")
    some = some.assign(features=(("subject", "feature"), x))
    some = some.assign_coords(same=("subject", x.prod(1) > 0), size=("subject", x.prod(1)))
    network = some.assign_attrs(name="network", estimator="MLP", components=2)
    scores = probe([network, some], "same")
    auroc = scores.score.sel(metric="auroc").mean("fold")
    assert auroc[0] > 0.9 > 0.7 > auroc[1]
    assert "MLPClassifier" in scores["estimator"].values[0]
    assert probe(network, "size").score.sel(metric="r").mean() > 0.8
    pieces = [(0, x[:60], x[60:])]
    leading, every = (estimators_file.on_axes(pieces, False, keep) for keep in (1, None))
    for few, all_of_them in zip(leading, every, strict=True):
        np.testing.assert_allclose(few, all_of_them[:, -1:])


@pytest.mark.parametrize("effect", [0.0, 1.0])
def test_intervals_cover_the_expected_score(effect):
    """Two hundred small studies of one effect, or of none: 95 % intervals hold their mean.

    Without effect, draws that forget the training rows hold it too rarely.
    """
    from sklearn.linear_model import Ridge

    def study(seed, n=60):
        rng = np.random.default_rng(seed)
        x = rng.normal(size=(n, 3))
        names = [f"s{i}" for i in range(n)]
        labels = {"subject": names, "y": ("subject", effect * x[:, 0] + rng.normal(size=n))}
        data = xr.Dataset({"features": (("subject", "feature"), x)}, labels)
        return probe(data, "y", estimator=Ridge(1.0), folds=3, seed=seed)

    studies = [study(seed) for seed in range(200)]
    estimate = np.array([s.score.sel(metric=["r", "mae"]).mean("fold")[0] for s in studies])
    draws = np.array([scores_file.resample(s, 150).sel(metric=["r", "mae"])[0] for s in studies])
    low, high = metrics.interval(estimate, draws, mutual=1.0)
    covered = ((low <= estimate.mean(0)) & (estimate.mean(0) <= high)).mean(0)
    assert (covered > 0.9).all(), covered
    assert covered[0] < 1, covered  # of r; that of the error is wider than it need be
    bare = metrics.interval(estimate[:, 0], draws[:, 0])
    missed = (bare[0] > estimate[:, 0].mean()) | (bare[1] < estimate[:, 0].mean())
    assert effect or missed.mean() > 0.1, missed.mean()


def test_features_that_are_constant_in_a_training_part_guess_the_mean():
    three = make_cohort(n=3)
    three = three.assign_coords(participant=three.subject, score=("subject", [1.0, 2.0, 3.0]))
    flat = nothing(three).drop_vars("features")
    flat["features"] = ("subject", "feature"), np.array([[0.0], [0.0], [1.0]])
    found = probe(flat, "score", folds=3)
    assert found.prediction.sel(subject=three.subject[2]).item() == pytest.approx(1.5)
    assert found.score.dims == ("model", "metric", "fold")  # whatever the target is called
