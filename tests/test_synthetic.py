"""Laws of the synthetic cohort: same bytes, any TR, and every planted effect at its size."""

import json

import dask
import numpy as np
import pytest
import xarray as xr

from bhx.data import brains as brains_file
from bhx.data import synthetic as synthetic_file
from bhx.data.atlas import load_atlas
from bhx.data.synthetic import EFFECTS, SIZES, Site, synthetic_cohort
from bhx.errors import InputError
from bhx.modalities.t1 import t1_grid
from bhx.schema import check


def computed(n, *variables, **options):
    cohort = synthetic_cohort(n, missing=0, **options)
    return cohort[list(variables or ("bold", "t1"))].compute()


def only(**effects):
    return dict.fromkeys(EFFECTS, 0) | effects


@pytest.fixture(scope="module")
def default():
    return synthetic_cohort(80).compute()


@pytest.fixture(scope="module")
def clean():
    """All effects but motion."""
    return computed(80, effects={"motion": 0})


@pytest.fixture(scope="module")
def none():
    """The same people without any effect."""
    return computed(80, effects=False)


@pytest.fixture(scope="module")
def moved():
    """The same people with motion alone."""
    return computed(80, "bold", effects=only(motion=1))


def connectomes(cohort):
    """Fisher z of the upper triangle, (subject, edge)."""
    out = []
    for bold, n in zip(cohort.bold.values, cohort.n_volumes.values, strict=True):
        fc = np.corrcoef(bold[:, :n]) if n else np.full((len(bold),) * 2, np.nan)
        out.append(np.arctanh(fc[np.triu_indices(len(bold), 1)]))
    return np.array(out)


def edges(cohort, *networks):
    """Which edges lie inside the named networks taken together."""
    inside = np.isin(cohort.network.values, networks)
    return np.outer(inside, inside)[np.triu_indices(len(inside), 1)]


def segregation(cohort):
    """(within - between) / within, the mean Fisher z of edges inside and across networks."""
    network, z = cohort.network.values, connectomes(cohort)
    same = (network[:, None] == network)[np.triu_indices(len(network), 1)]
    within, between = z[:, same].mean(1), z[:, ~same].mean(1)
    return (within - between) / within


def r(a, b):
    known = np.isfinite(a) & np.isfinite(b)
    return np.corrcoef(a[known], b[known])[0, 1]


def effect_size(values, group):
    """Cohen's d of the group against the rest."""
    a, b = (values[which & np.isfinite(values)] for which in (group, ~group))
    return (a.mean() - b.mean()) / np.sqrt((a.var() + b.var()) / 2)


def patients(cohort):
    return cohort.diagnosis.values == "patient"


def in_the_middle(cohort):
    box = (abs(cohort.x) < 25) & (cohort.y > -50) & (cohort.y < 25)
    return box & (cohort.z > -5) & (cohort.z < 32)


def ventricles(cohort):
    """Dark volume in the middle of the brain [ml], dark against the brightest tissue."""
    t1 = cohort.t1.where(in_the_middle(cohort))
    white = cohort.t1.where(cohort.t1 > 0).quantile(0.9, ("x", "y", "z"))
    dark = ((t1 > 0) & (t1 < 0.62 * white)).sum(("x", "y", "z"))
    return dark.where(cohort.has_t1).values * 4**3 / 1000


def brain_volume(cohort):
    return (cohort.t1 > 0).sum(("x", "y", "z")).values * 4**3 / 1000


def elongation(cohort):
    """Log of the brain's length over its width, by its moments."""
    log = []
    for axis in "yx":
        rest = [a for a in "xyz" if a != axis]
        profile = (cohort.t1 > 0).sum(rest)
        middle = (profile * cohort[axis]).sum(axis) / profile.sum(axis)
        spread = (profile * (cohort[axis] - middle) ** 2).sum(axis) / profile.sum(axis)
        log.append(np.log(spread.where(cohort.has_t1).values) / 2)
    return log[0] - log[1]


# --------------------------------------------------------------------- the same bytes


def test_a_cohort_keeps_the_schema():
    cohort = check(synthetic_cohort(12), "cohort")
    assert cohort.bold.chunks[0] == cohort.t1.chunks[0] == (1,) * 12
    assert cohort.bold.chunks[1:] == ((100,), (666,))
    assert cohort.bold.dtype == cohort.t1.dtype == np.float32
    assert sorted(set(cohort.site.values)) == list("ABCDE")
    assert sorted(set(cohort.tr.values)) == [0.72, 0.8, 1.5, 2.0, 3.0]
    assert list(cohort.roi.values) == list(load_atlas("schaefer100").roi.values)
    assert set(json.loads(cohort.attrs["truth"])) == set(EFFECTS)


def test_nothing_is_computed_before_it_is_read(monkeypatch):
    def computed_too_early(*_, **__):
        raise AssertionError("computed")

    monkeypatch.setattr(synthetic_file, "simulate_bold", computed_too_early)
    monkeypatch.setattr(synthetic_file, "simulate_t1", computed_too_early)
    cohort = synthetic_cohort(3)
    with pytest.raises(AssertionError, match="computed"):
        cohort.bold[0].compute()
    with pytest.raises(AssertionError, match="computed"):
        cohort.t1[0].compute()


def test_same_seed_same_bytes_whatever_the_order_company_and_scheduler():
    few, many = synthetic_cohort(4, seed=3), synthetic_cohort(9, seed=3)
    with dask.config.set(scheduler="synchronous"):
        backwards = many.isel(subject=[3, 2, 1, 0]).compute()
    with dask.config.set(scheduler="threads"):
        forwards = few.compute()
    xr.testing.assert_identical(forwards, backwards.isel(subject=slice(None, None, -1)))
    one = many.isel(subject=2).compute()
    xr.testing.assert_identical(one, forwards.isel(subject=2))


def test_another_seed_is_another_cohort():
    a, b = (computed(2, seed=seed) for seed in (0, 1))
    assert not np.array_equal(a.age, b.age)
    assert abs(r(a.bold[0, 0].values, b.bold[0, 0].values)) < 0.3
    assert not np.array_equal(a.t1, b.t1)


def test_options_of_the_data_leave_the_people_alone():
    labels = ["age", "sex", "diagnosis", "fusion", "trait_structure", "trait_function"]
    a, b = synthetic_cohort(20), synthetic_cohort(20, effects=False, tr=2.2, missing=0.5)
    for name in labels:
        assert np.array_equal(a[name], b[name])


# --------------------------------------------------------------------- length and TR


def test_a_scan_is_finite_up_to_its_end_and_nan_behind_it():
    cohort = computed(5)
    for bold, n, tr in zip(cohort.bold, cohort.n_volumes, cohort.tr, strict=True):
        assert np.isfinite(bold[:, : int(n)]).all()
        assert np.isnan(bold[:, int(n) :]).all()
        assert 5 <= float(n * tr) / 60 <= 8


@pytest.mark.parametrize("tr, times", [(0.8, 2), (0.8, 3), (0.72, 4), (0.5, 3)])
def test_one_scan_at_two_trs_agrees_wherever_both_sample(tr, times):
    every = (computed(2, "bold", minutes=5, tr=each).bold.values for each in (tr, tr * times))
    fast, slow = every
    assert slow.shape[2] == int(300 / (tr * times) + 1e-9)
    np.testing.assert_allclose(slow, fast[:, :, ::times][:, :, : slow.shape[2]], rtol=1e-6)


def test_autocorrelation_is_that_of_real_scans():
    """HCP at TR 0.72 s: 1, .57, .49, .42, .35, .28, .22, .17 at lags of 0, 1, 2, ... volumes."""
    cohort = computed(12, "bold", sites=["A"])
    z = (cohort.bold - cohort.bold.mean("time")) / cohort.bold.std("time")
    n = z.sizes["time"]
    lags = [float((z.values[..., : n - k] * z.values[..., k:]).mean()) for k in range(8)]
    np.testing.assert_allclose(lags, [1, 0.57, 0.49, 0.42, 0.35, 0.28, 0.22, 0.17], atol=0.05)


def test_functional_connectivity_is_that_of_the_group(default):
    group = load_atlas("schaefer100").connectome.values[np.triu_indices(100, 1)]
    fc = np.tanh(connectomes(default.sel(subject=default.has_bold)))
    assert r(fc.mean(0), group) > 0.95
    assert np.median([r(each, group) for each in fc]) > 0.7
    assert abs(fc.mean() - group.mean()) < 0.1


def test_bold_is_about_one_percent_of_its_baseline(default):
    scans = default.bold.sel(subject=default.has_bold)
    percent = 100 * scans.std("time") / scans.mean("time")
    assert 0.6 < float(percent.median()) < 1.6
    assert float(percent.max()) < 10


# --------------------------------------------------------------------- planted effects


def test_ventricles_grow_with_age(clean, none):
    assert r(ventricles(clean), clean.age.values) > 0.7
    assert abs(r(ventricles(none), none.age.values)) < 0.3


def test_the_ventricle_border_moves_by_its_millimetres():
    """What it sweeps is at least a ball's surface times the millimetres, and not a multiple."""
    pair = [computed(30, "t1", effects=each, sites=["A"]) for each in (only(age=1), False)]
    swept = (pair[1].t1 - pair[0].t1).where(in_the_middle(pair[0])).sum(("x", "y", "z"))
    contrast = 1000 * (0.8 - 0.4)  # white matter less ventricle in the template
    slope = np.polyfit(pair[0].age / 10, swept * 4**3 / 1000 / contrast, 1)[0]
    volume = np.median(ventricles(pair[1]))
    ball = (36 * np.pi * volume**2) ** (1 / 3) / 10  # ml for each mm
    planted = SIZES["age"]["ventricle_border_mm_per_decade"]
    assert planted * ball < slope < 4 * planted * ball


def test_cortex_is_lost_with_age():
    with_age, without = (
        computed(30, "t1", effects=each, sites=["A"]) for each in (only(age=1), False)
    )
    template = brains_file._template(4.0)
    grey = float(template["cortex"].sum() / template["image"].sum())
    signal = with_age.t1.sum(("x", "y", "z")) / without.t1.sum(("x", "y", "z"))
    loss = -np.polyfit(with_age.age / 10, signal, 1)[0]
    planted = SIZES["age"]["cortex_lost_per_decade"] * grey
    assert planted < loss < 1.5 * planted  # the ventricles take their part too


def test_networks_blend_with_age(clean, none):
    assert r(segregation(clean), clean.age.values) < -0.45
    assert abs(r(segregation(none), none.age.values)) < 0.3


def test_the_default_mode_uncouples_in_patients(clean, none):
    for cohort, low, high in ((clean, -2.5, -0.9), (none, -0.5, 0.5)):
        coupling = connectomes(cohort)[:, edges(cohort, "Default")].mean(1)
        assert low < effect_size(coupling, patients(cohort)) < high


def test_men_have_larger_heads(clean, none):
    volume, man = brain_volume(clean), clean.sex.values == "M"
    planted = np.exp(6 * SIZES["sex"]["head_length_of_men"])
    assert abs(volume[man].mean() / volume[~man].mean() - planted) < 0.04
    volume = brain_volume(none)
    assert abs(volume[man].mean() / volume[~man].mean() - 1) < 0.04
    assert 1100 < volume.mean() < 1700  # ml


def test_couplings_change_by_exactly_what_was_planted():
    """Ratios of ratios of the model's coupling: the common normalisation falls out."""
    brain = brains_file._group_brain("schaefer100")
    row = synthetic_file._participant(
        1, 0, (synthetic_file.SITES["A"],), dict.fromkeys(EFFECTS, 1.0), 0, 0
    )[0]
    on, off = (
        brains_file._coupling(row, brain, dict.fromkeys(EFFECTS, size)) for size in (1.0, 0.0)
    )
    change = np.log(np.divide(on, off, where=off > 0, out=np.ones_like(on)))
    network = load_atlas("schaefer100").network.values
    between = off[:, network == "Vis"] > 0
    vis = change[:, network == "Vis"]
    sensory = vis[(network == "SomMot")[:, None] & between].mean()
    other = vis[(network == "Cont")[:, None] & between].mean()
    planted = SIZES["fusion"]["function_sensory_coupling_per_sd"] * row.trait_function
    assert sensory - other == pytest.approx(planted, abs=1e-6)


def test_sites_differ_in_noise_gain_and_bias():
    cohort, neutral = computed(20), computed(20, effects={"site": 0})
    for each, low, high in ((cohort, 1.4, 1.8), (neutral, 0.9, 1.1)):
        level = each.bold.mean(("roi", "time")).groupby(each.site).mean()
        assert low < float(level.max() / level.min()) < high
    ratio = (cohort.t1 / neutral.t1.where(neutral.t1 > 0)).sel(subject=cohort.site == "D")
    front, back = (ratio.sel(y=y, method="nearest").median() for y in (50, -90))
    planted = synthetic_file.SITES["D"].bias[1] * 140 / 192
    assert float(np.log(front / back)) == pytest.approx(planted, abs=0.02)


# --------------------------------------------------------------------- motion


def test_motion_follows_diagnosis_and_shows_in_bold(moved, none):
    log_fd, ill = np.log(moved.mean_fd.values), patients(moved)
    planted = SIZES["motion"]["log_fd_of_patients"]
    assert log_fd[ill].mean() - log_fd[~ill].mean() == pytest.approx(planted, abs=0.2)
    assert abs(effect_size(np.log(none.mean_fd.values), ill)) < 0.5
    assert r(connectomes(moved).mean(1), moved.mean_fd.values) > 0.4
    assert abs(r(connectomes(none).mean(1), none.mean_fd.values)) < 0.3


def test_motion_is_a_trap_even_where_the_diagnosis_does_nothing(moved):
    coupling = connectomes(moved)[:, edges(moved, "Default")].mean(1)
    assert effect_size(coupling, patients(moved)) > 0.3  # and the planted effect is negative


def test_motion_adds_more_to_short_connections(moved, none):
    added = (connectomes(moved) - connectomes(none)).mean(0)
    place = np.stack([moved[f"mni_{axis}"].values for axis in "xyz"], 1)
    distance = np.linalg.norm(place[:, None] - place, axis=2)[np.triu_indices(100, 1)]
    assert added[distance < 30].mean() > 1.5 * added[distance > 100].mean() > 0


# --------------------------------------------------------------------- structure and function


def sensory_coupling(cohort):
    z = connectomes(cohort)
    return z[:, edges(cohort, "Vis", "SomMot")].mean(1) - z.mean(1)


def test_each_trait_is_in_its_own_modality(default, none):
    assert r(sensory_coupling(default), default.trait_function.values) > 0.7
    assert r(elongation(default), default.trait_structure.values) > 0.85
    for measure in (sensory_coupling, elongation):
        for trait in ("trait_structure", "trait_function"):
            assert abs(r(measure(none), none[trait].values)) < 0.35


def test_heads_are_longer_by_what_was_planted():
    cohort = computed(40, "t1", effects=only(fusion=1))
    slope = np.polyfit(cohort.trait_structure, elongation(cohort), 1)[0]
    planted = 1.5 * SIZES["fusion"]["structure_elongation_per_sd"]
    assert slope == pytest.approx(planted, rel=0.15)


def accuracy(features, label):
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import cross_val_predict

    guess = cross_val_predict(LogisticRegression(), np.stack(features, 1), label, cv=5)
    return (guess == label).mean()


def test_fusion_needs_both_traits():
    people = synthetic_cohort(1500)
    structure, function = people.trait_structure.values, people.trait_function.values
    label = people.fusion.values == "function-led"
    assert abs(label.mean() - 0.5) < 0.05
    best = json.loads(people.attrs["truth"])["fusion"]["best_accuracy"]
    assert accuracy([structure], label) == pytest.approx(best["structure"], abs=0.04)
    assert accuracy([function], label) == pytest.approx(best["function"], abs=0.04)
    assert accuracy([structure, function], label) > 0.99


def test_fusion_is_in_the_data_for_who_looks_at_both(default):
    function, structure = sensory_coupling(default), elongation(default)
    known = np.isfinite(function) & np.isfinite(structure)
    label = default.fusion.values[known] == "function-led"
    function, structure = (
        (v[known] - v[known].mean()) / v[known].std() for v in (function, structure)
    )
    alone = max(accuracy([function], label), accuracy([structure], label))
    assert accuracy([function, structure], label) > alone + 0.1
    assert alone < 0.8


def test_labels_are_independent_of_one_another():
    people = synthetic_cohort(1500)
    columns = [people.age.values, people.sex.values == "M", patients(people)]
    columns += [people.fusion.values == "function-led", people.trait_structure.values]
    between = np.corrcoef(np.array(columns, float))
    between[3, 4] = between[4, 3] = 0  # fusion is made of the traits
    assert np.abs(between - np.eye(len(columns))).max() < 0.08


# --------------------------------------------------------------------- who has what


def test_some_participants_lack_one_modality():
    cohort = synthetic_cohort(60, missing=0.4)
    has_bold, has_t1 = cohort.has_bold.values, cohort.has_t1.values
    assert (has_bold | has_t1).all()
    assert 0.05 < (~has_bold).mean() < 0.35
    assert 0.05 < (~has_t1).mean() < 0.35
    assert has_bold[0]
    assert has_t1[0]
    without_bold, without_t1 = np.flatnonzero(~has_bold)[0], np.flatnonzero(~has_t1)[0]
    assert np.isnan(cohort.bold[without_bold]).all()
    assert np.isnan(cohort.t1[without_t1]).all()
    assert np.isfinite(cohort.t1[without_bold]).all()
    assert cohort.n_volumes[without_bold] == 0
    assert np.isnan(cohort.mean_fd[without_bold])


def test_a_second_session_is_the_same_brain_on_another_day():
    cohort = synthetic_cohort(20, missing=0, repeats=1, effects=False, sites=["A"]).compute()
    assert list(cohort.subject.values[:2]) == ["sub-0001/ses-1", "sub-0001/ses-2"]
    assert cohort.sizes["subject"] == 40
    np.testing.assert_allclose(cohort.age[1::2] - cohort.age[::2], 1)
    assert np.array_equal(cohort.trait_structure[1::2], cohort.trait_structure[::2])
    assert not np.array_equal(cohort.bold[0], cohort.bold[1])
    z = connectomes(cohort)
    alike = np.corrcoef(z)[::2, 1::2]
    assert (alike.argmax(1) == np.arange(20)).mean() > 0.6  # a fingerprint; 0.05 by chance
    anatomy = np.corrcoef(cohort.t1.values.reshape(40, -1))[::2, 1::2]
    assert (anatomy.argmax(1) == np.arange(20)).all()


def test_other_atlases_voxels_and_sites():
    mine = Site("mine", tr=1.4, minutes=2.5, noise=0.2, gain=2.0)
    cohort = synthetic_cohort(1, atlas="schaefer400", voxel_mm=8, sites=[mine]).compute()
    assert cohort.bold.shape == (1, 400, 107)
    assert np.isfinite(cohort.bold).all()
    assert cohort.t1.shape == (1, 20, 24, 20)
    assert [len(axis) for axis in t1_grid(8).values()] == [20, 24, 20]
    assert cohort.attrs["atlas"] == "schaefer400"
    fine, coarse = (computed(1, "t1", voxel_mm=v).t1[0] for v in (2.0, 4.0))
    halved = fine.coarsen(x=2, y=2, z=2).mean()
    np.testing.assert_allclose(halved.x, coarse.x)
    assert r(halved.values.ravel(), coarse.values.ravel()) > 0.99


# --------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    "options, sentence",
    [
        ({"n": 0}, "n as a whole number from 1 .* found 0"),
        ({"n": 2.5}, "found 2.5"),
        ({"seed": -1}, "seed as one from 0, found 200 and -1"),
        ({"atlas": "aal"}, "schaefer100, .* found 'aal'"),
        ({"sites": ["A", "Z"]}, "A, B, C, D, E, found 'Z'"),
        ({"sites": []}, "found None"),
        ({"sites": [Site("x", 1, 5), Site("x", 2, 5)]}, "a name of its own"),
        ({"sites": [Site("x", 2, 5, noise=1.2)]}, r"noise in \[0, 1\)"),
        ({"tr": 0}, "seconds, above 0 and at most 20, found 0"),
        ({"tr": -2.0}, "found -2"),
        ({"tr": 800.0}, "found 800 of site A; this looks like milliseconds"),
        ({"tr": float("nan")}, "found nan"),
        ({"minutes": -1}, "found .*minutes=-1"),
        ({"minutes": 300}, "found .*minutes=300"),
        ({"minutes": float("nan")}, "found .*minutes=nan"),
        ({"effects": {"height": 1}}, "of age, .* found {'height'"),
        ({"effects": {"age": -1}}, "from 0 to 3 of .*found {'age': -1}"),
        ({"effects": "age"}, "found 'age'"),
        ({"missing": 1.5}, "from 0 to 1, found 1.5"),
        ({"repeats": -0.1}, "found 0.06 and -0.1"),
        ({"voxel_mm": 3}, "voxel of 3 mm does not divide"),
        ({"voxel_mm": -4}, "voxel of -4 mm"),
    ],
)
def test_bad_input_is_refused_before_any_work(options, sentence):
    with pytest.raises(InputError, match=sentence):
        synthetic_cohort(**options)
