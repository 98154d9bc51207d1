"""Arrays in memory and a table of people to a cohort."""

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import xarray as xr
from small_files import ATLAS, parcel_series, t1_image

import bhx
from bhx.data.atlas import load_atlas
from bhx.errors import InputError

LENGTHS = (60, 80, 70, 60)
NAMES = load_atlas(ATLAS).roi.values.tolist()


def arrays():
    return [parcel_series(n, i).T for i, n in enumerate(LENGTHS)]


def labels(**more):
    about = {"age": [20.0, 30.0, np.nan, 50.0], "site": ["A", "B", None, "A"], **more}
    return pd.DataFrame(about, pd.Index(["d", "c", "b", "a"], name="participant"))


def cohort_of(bold=None, people=None, **options):
    bold, people = arrays() if bold is None else bold, labels() if people is None else people
    return bhx.as_cohort(bold, people, **{"atlas": ATLAS, "tr": 2.0, **options})


def test_arrays_and_their_labels_stay_together(tmp_path):
    cohort = cohort_of()
    assert cohort.subject.values.tolist() == ["d", "c", "b", "a"]
    assert cohort.n_volumes.values.tolist() == [*LENGTHS]
    np.testing.assert_array_equal(cohort.age, [20, 30, np.nan, 50])
    assert cohort.site.values.tolist() == ["A", "B", "", "A"]
    for subject, one in zip("dcba", arrays(), strict=True):
        np.testing.assert_array_equal(bhx.scan(cohort, subject), one.T.astype("f4"))
    assert (cohort.homotopy > 0.9).all()
    bhx.save_cohort(cohort, tmp_path / "c.zarr")
    xr.testing.assert_equal(bhx.open_cohort(tmp_path / "c.zarr"), cohort)


def test_it_is_what_prepare_makes_of_files(tmp_path):
    rows = labels().reset_index().assign(subject=[*"dcba"], tr=2.0)
    for subject, one in zip(rows.subject, arrays(), strict=True):
        pd.DataFrame(one, columns=NAMES).to_csv(tmp_path / f"{subject}.csv", index=False)
    rows["bold"] = [str(tmp_path / f"{subject}.csv") for subject in rows.subject]
    prepared = bhx.prepare(rows, tmp_path / "p.zarr", atlas=ATLAS).sel(subject=[*"dcba"])
    cohort = cohort_of()
    np.testing.assert_allclose(cohort.bold, prepared.bold)
    for name in ("age", "site", "homotopy", "coverage", "n_volumes", "warnings", "network"):
        assert cohort[name].values.tolist() == pytest.approx(
            prepared[name].values.tolist(), nan_ok=True
        )


def test_columns_of_tables_go_by_their_names():
    cohort = cohort_of()
    mixed = [
        pd.DataFrame(one, columns=NAMES).sample(frac=1, axis=1, random_state=0) for one in arrays()
    ]
    xr.testing.assert_identical(cohort_of(mixed), cohort)


def test_sessions_of_one_participant_are_rows():
    people = pd.DataFrame({"participant": ["a", "a", "b", "b"], "session": ["1", "2"] * 2})
    cohort = cohort_of(people=people.assign(tr=[2.0, 2.0, 1.5, 1.5]), tr=None)
    assert cohort.subject.values.tolist() == ["a/1", "a/2", "b/1", "b/2"]
    assert cohort.participant.values.tolist() == ["a", "a", "b", "b"]
    assert cohort.tr.values.tolist() == [2.0, 2.0, 1.5, 1.5]


def test_what_cannot_be_used_is_left_out_and_named():
    bold = arrays()
    bold[1] = bold[1][:, np.random.default_rng(0).permutation(100)]
    bold[2][:, :40] = np.nan
    cohort = cohort_of(bold)
    assert cohort.subject.values.tolist() == ["d", "a"]
    assert [*cohort.attrs["refused"]] == ["c", "b"]
    assert "behave as their places say" in cohort.attrs["refused"]["c"]
    assert "signal in at least 80%" in cohort.attrs["refused"]["b"]


def test_images_of_t1_come_beside(tmp_path):
    path = t1_image(tmp_path / "t1.nii.gz", step=2)
    assert nib.load(path).shape
    cohort = cohort_of(t1=[None, str(path), None, None])
    assert cohort.has_t1.values.tolist() == [False, True, False, False]
    assert np.isfinite(cohort.t1.sel(subject="c")).all()
    assert np.isnan(cohort.t1.sel(subject="d")).all()


BAD = {
    "another atlas": (
        lambda: cohort_of(atlas="schaefer200"),
        r"time x 200 parcels .*\(60, 100\) of d",
    ),
    "one of another": (
        lambda: cohort_of([*arrays()[:3], np.ones((60, 300))]),
        r"found \(60, 300\) of a",
    ),
    "turned": (lambda: cohort_of([one.T for one in arrays()]), r"one\.T for one in arrays"),
    "fewer labels": (lambda: cohort_of(people=labels()[:3]), "each of 3 lines of labels, found 4"),
    "no TR": (lambda: cohort_of(tr=None), "repetition time in seconds"),
    "milliseconds": (lambda: cohort_of(tr=2000), "looks like milliseconds"),
    "an id twice": (
        lambda: cohort_of(people=labels().set_index(pd.Index([*"aabc"]))),
        "a more than once",
    ),
    "a taken name": (
        lambda: cohort_of(people=labels(bold=1)),
        "names that bhx does not use itself, found bold",
    ),
    "no table": (lambda: cohort_of(people={"age": 1}), "labels as a DataFrame, found dict"),
    "nobody": (
        lambda: cohort_of([one[:10] for one in arrays()]),
        "a usable scan, found none among 4",
    ),
}


@pytest.mark.parametrize("kind", BAD)
def test_what_does_not_fit_is_refused(kind):
    use, sentence = BAD[kind]
    with pytest.raises(InputError, match=sentence):
        use()
