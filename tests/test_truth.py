"""What was planted in the synthetic cohort is found, with its sign, and what was not is not.

Two cohorts, so that each effect is present in one and absent from the other while others are
present; every interval of a test is at 95 % for all of them together (Bonferroni). Plain features,
but for one test of the shipped weights: the rest is about the cohort and the scores.
"""

import numpy as np
import pytest
from scipy.stats import binom

from bhx.data.splits import permute_within
from bhx.data.synthetic import synthetic_cohort
from bhx.encode.embed import embed
from bhx.encode.model import load_model
from bhx.evaluate import metrics as metrics_file
from bhx.evaluate.confounds import match_subjects
from bhx.evaluate.features import connectome, cube_means, fuse
from bhx.evaluate.probe import probe
from bhx.evaluate.report import explained_by, plot_scores
from bhx.evaluate.scores import compare, resample
from bhx.latents.pool import pool

PEOPLE, FAMILY = 120, 28  # intervals tested together: 7 targets x 2 features x 2 cohorts
LIGHT = {"minutes": 4, "tr": 2.0, "voxel_mm": 16.0, "missing": 0, "seed": 7}
PRESENT = {  # effect -> target, the features that it was planted in, and their cohort
    "age in T1": ("age", "T1 cubes", "one"),
    "age in BOLD": ("age", "connectome", "one"),
    "structure trait": ("trait_structure", "T1 cubes", "one"),
    "function trait": ("trait_function", "connectome", "one"),
    "site": ("site", "T1 cubes", "one"),
    "sex": ("sex", "T1 cubes", "other"),
    "diagnosis": ("diagnosis", "connectome", "other"),
}
ABSENT = {
    "one": ("sex", "diagnosis"),
    "other": ("age", "trait_structure", "trait_function", "fusion", "site"),
}


@pytest.fixture(scope="module")
def cohorts():
    """Age, fusion and site in one; sex and diagnosis in the other; motion in neither."""
    one = {"sex": 0, "diagnosis": 0, "motion": 0}
    other = {"age": 0, "fusion": 0, "site": 0, "motion": 0}
    return {
        name: synthetic_cohort(PEOPLE, effects=effects, **LIGHT).compute()
        for name, effects in (("one", one), ("other", other))
    }


@pytest.fixture(scope="module")
def features(cohorts):
    return {name: [cube_means(c), connectome(c)] for name, c in cohorts.items()}


@pytest.fixture(scope="module")
def trap():
    """Motion follows diagnosis and leaves its trace; diagnosis itself leaves none."""
    options = LIGHT | {"seed": 3}
    cohort = synthetic_cohort(150, effects={"diagnosis": 0}, **options).drop_vars("t1").compute()
    return connectome(cohort)


def first_score(features, target, level=1 - 0.05 / FAMILY, **options):
    """The first score of each features, with its interval: r of numbers, AUROC of labels."""
    scores = probe(features, target, **options)
    metric = "r" if scores.attrs["task"] == "number" else "auroc"
    table = compare(scores, level=level, draws=4000).xs(metric, level="metric")
    return table.assign(chance=0.0 if metric == "r" else 0.5)


# ------------------------------------------------------------------ planted


@pytest.mark.parametrize("effect", PRESENT)
def test_planted_effects_are_found(features, effect):
    target, where, cohort = PRESENT[effect]
    row = first_score(features[cohort], target).loc[where]
    assert row.low > row.chance, row


@pytest.mark.parametrize(("cohort", "target"), [(c, t) for c in ABSENT for t in ABSENT[c]])
def test_effects_that_were_not_planted_are_not_found(features, cohort, target):
    table = first_score(features[cohort], target)
    assert ((table.low < table.chance) & (table.chance < table.high)).all(), table


@pytest.mark.parametrize("target", ["sex", "diagnosis"])
def test_the_other_modality_knows_nothing_of_an_effect_in_one(features, target):
    where = {"sex": "connectome", "diagnosis": "T1 cubes"}[target]
    row = first_score(features["other"], target).loc[where]
    assert row.low < 0.5 < row.high, row


def coupling(cohort, pairs):
    """Mean Fisher z over the pairs of parcels that `pairs(network, network)` picks, a subject."""
    of = dict(zip(cohort.roi.values, cohort.network.values, strict=True))
    z = connectome(cohort)
    a, b = (np.array([of[r] for r in z[name].values]) for name in ("roi_a", "roi_b"))
    return z.features.values[:, pairs(a, b)].mean(1)


def extents(cohort):
    """Second moments of where the brain is along x and y [mm], (subject, 2)."""
    mass = (cohort.t1 > 0).astype(float)
    mass = mass / mass.sum(("x", "y", "z"))
    spread = []
    for axis in "xy":
        along = mass.sum([other for other in "xyz" if other != axis])
        center = (along * cohort[axis]).sum(axis)
        spread.append(np.sqrt((along * (cohort[axis] - center) ** 2).sum(axis)).values)
    return np.stack(spread, 1)


def sensory(a, b):
    return np.isin(a, ("Vis", "SomMot")) & np.isin(b, ("Vis", "SomMot"))


SIGNS = {  # what is measured, of which cohort, against which label, and the planted sign
    "within against between networks falls with age": (
        "one",
        lambda c: coupling(c, lambda a, b: a == b) - coupling(c, lambda a, b: a != b),
        lambda c: c.age.values,
        -1,
    ),
    "sensory coupling follows the function trait": (
        "one",
        lambda c: coupling(c, sensory),
        lambda c: c.trait_function.values,
        1,
    ),
    "heads are longer than wide with the structure trait": (
        "one",
        lambda c: np.log(extents(c)[:, 1] / extents(c)[:, 0]),
        lambda c: c.trait_structure.values,
        1,
    ),
    "scanners with more gain are brighter": (
        "one",
        lambda c: np.log(c.t1.mean(("x", "y", "z")).values),
        lambda c: np.log(
            [{"A": 1, "B": 1.3, "C": 0.8, "D": 1.1, "E": 0.9}[s] for s in c.site.values]
        ),
        1,
    ),
    "patients have less coupling in the default mode": (
        "other",
        lambda c: coupling(c, lambda a, b: (a == "Default") & (b == "Default")),
        lambda c: (c.diagnosis == "patient").values,
        -1,
    ),
    "men have larger heads": (
        "other",
        lambda c: np.log(extents(c).prod(1)),
        lambda c: (c.sex == "M").values,
        1,
    ),
}


@pytest.mark.parametrize("claim", SIGNS)
def test_planted_effects_have_their_sign_where_planted_and_are_gone_elsewhere(cohorts, claim):
    cohort, measure, label, sign = SIGNS[claim]
    there, apart = cohorts[cohort], cohorts["other" if cohort == "one" else "one"]
    bound = 1.96 / np.sqrt(PEOPLE - 3)
    assert sign * np.arctanh(np.corrcoef(measure(there), label(there))[0, 1]) > 2 * bound
    assert abs(np.arctanh(np.corrcoef(measure(apart), label(apart))[0, 1])) < 1.5 * bound


def gained(one, other):
    """Both side by side against either alone, on the same people drawn again and again: the lower
    ends of the differences of AUROC, and the table."""
    scores = probe([fuse(one, other), one, other], "fusion", stratify="site")
    mean = scores.score.sel(metric="auroc").mean("fold").values
    draws = resample(scores, 2000).sel(metric="auroc").values
    gain = metrics_file.interval(
        mean[0] - mean[1:], draws[0] - draws[1:], 0.975, scores.attrs["mutual"]
    )
    return gain[0], compare(scores).xs("auroc", level="metric")


def test_fusion_needs_both_modalities(features):
    low, table = gained(*features["one"])
    assert (low > 0).all(), table
    assert (table.low.iloc[1:] > 0.5).all(), table  # each modality knows a half


def test_tokens_of_both_encoders_know_what_neither_knows_alone():
    """The shipped weights, on people they have not seen."""
    cohort = synthetic_cohort(200, seed=31_000, missing=0).load()
    latents = embed(cohort, load_model("paper"), keep=("dynamics", "structure")).load()
    low, table = gained(*(pool(latents, "concatenate", of=m) for m in ("structure", "dynamics")))
    assert (low > 0).all(), table


# ------------------------------------------------------------------ nothing


def test_permuted_labels_score_at_chance(features):
    """Exchanged within site, three times, four labels, two features: misses as chance allows."""
    rng = np.random.default_rng(0)
    missed = []
    for _ in range(3):
        at = next(permute_within(*[features["one"][0][n].values for n in ("subject", "site")], rng))
        for target in ("age", "trait_function", "sex", "fusion"):
            moved = {target: ("subject", features["one"][0][target].values[at])}
            table = first_score([f.assign_coords(moved) for f in features["one"]], target, 0.95)
            missed += list((table.low > table.chance) | (table.chance > table.high))
    assert sum(missed) <= binom.ppf(0.999, len(missed), 0.05), f"{sum(missed)} of {len(missed)}"


def test_label_that_follows_site_is_found_across_people_and_not_across_sites(features):
    """Nine of ten at two sites are patients, one of ten elsewhere; no brain knows of it."""
    t1 = features["one"][0]
    usual = np.isin(t1.site.values, ("A", "B"))
    often = np.random.default_rng(0).random(PEOPLE) < 0.9
    t1 = t1.assign_coords(recruited=("subject", np.where(usual == often, "patient", "control")))
    naive, apart = (first_score(t1, "recruited", 0.95, groups=g).iloc[0] for g in (None, "site"))
    assert naive.low > 0.5, naive
    assert apart.low < 0.5 < apart.high, apart


# ------------------------------------------------------------------- motion


@pytest.fixture(scope="module")
def trapped(trap):
    """The naive probe of diagnosis, and two ways to control for motion."""
    moved_alike = match_subjects(trap, "diagnosis", ("mean_fd",))
    return {
        "naive": probe(trap, "diagnosis"),
        "mean_fd out of the features": probe(trap, "diagnosis", confounds=["mean_fd"]),
        "people who moved alike": probe(moved_alike, "diagnosis"),
    }


def test_motion_makes_a_diagnosis_that_control_takes_away(trapped):
    rows = {k: compare(s).loc[("connectome", "auroc")] for k, s in trapped.items()}
    naive, *controlled = rows.values()
    assert naive.low > 0.5, naive
    for row in controlled:
        assert row.low < 0.5 < row.high, row
    of_naive = explained_by(trapped["naive"], ["mean_fd"]).iloc[0]
    assert of_naive.partial_r < 0.5 * of_naive.r


def test_the_trap_as_a_figure(trapped):
    """Three intervals and the line of chance: the first beyond it, the others across."""
    named = [s.assign_coords(model=[name]) for name, s in trapped.items()]
    table = compare(*named)
    figure = plot_scores(table, "auroc")
    assert list(figure.data[0].y) == list(trapped)
    low = np.array(figure.data[0].x) - figure.data[0].error_x.arrayminus
    assert figure.layout.shapes[0].x0 == 0.5
    np.testing.assert_array_equal(low > 0.5, [True, False, False])
