"""Situations from public bug reports: what went wrong silently is read right, or said.

Labels and files of people; what is inside scans is in test_scans.py and test_bad_input_scans.py.
"""

import json
import os
import warnings
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import xarray as xr
import yaml
import zarr
from small_cohorts import make_cohort
from small_files import (
    ATLAS,
    dtseries,
    gifti,
    label_image,
    parcel_series,
    ptseries,
    sidecar,
    t1_image,
    table,
    volume,
)

import bhx
from bhx.data import bold as bold_file
from bhx.data import catalog as catalog_file
from bhx.data import cohort as cohort_file
from bhx.data import labels as labels_file
from bhx.data.anatomy import read_t1
from bhx.data.atlas import load_atlas
from bhx.data.derivatives import find_scans, join_phenotypes
from bhx.data.prepare import prepare, read_scan
from bhx.errors import InputError
from bhx.evaluate.rows import said_of
from bhx.schema import check

NAMES = load_atlas(ATLAS).roi.values
SHORT = [name.split("_", 1)[1] for name in NAMES]
SPACE = "space-MNI152NLin6Asym"


@pytest.fixture(autouse=True)
def without_notes():
    """Notes are warnings of Python, too; tests read them from the attributes."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def rows_of(folder, ids, **labels):
    """A table of scans, one small parcel table for each id."""
    paths = [table(folder / f"{i}.tsv", parcel_series(60, n), NAMES) for n, i in enumerate(ids)]
    return pd.DataFrame({"subject": list(ids), "bold": [*map(str, paths)], **labels})


def func(folder, *names):
    """A folder sub-01/func with empty files, or with a table where the name says one."""
    where = folder / "sub-01" / "func"
    where.mkdir(parents=True, exist_ok=True)
    for name in names:
        (where / name).write_text("x")
    return where


# --- labels have one type ---


def test_labels_of_added_subjects_keep_their_values(tmp_path):
    first = {"age": [30, 41], "group": ["x", "y"], "kids": [1, 2], "patient": [True, False]}
    prepare(rows_of(tmp_path, "ab", **first), tmp_path / "c.zarr", atlas=ATLAS)
    more = {"age": [23.6, np.nan], "group": ["x", ""], "kids": [0, 3], "patient": [True, None]}
    grown = prepare(rows_of(tmp_path, "cd", **more), tmp_path / "c.zarr", atlas=ATLAS)
    np.testing.assert_equal(grown.age.values, [30, 41, 23.6, np.nan])
    np.testing.assert_equal(grown.kids.values, [1, 2, 0, 3])
    assert grown.group.values.tolist() == ["x", "y", "x", ""]
    assert grown.patient.values.tolist() == ["True", "False", "True", ""]

    grown = prepare(rows_of(tmp_path, "e"), tmp_path / "c.zarr", atlas=ATLAS)
    assert np.isnan(grown.age.values[4])
    assert np.isnan(grown.kids.values[4])
    assert grown.patient.values[4] == grown.group.values[4] == ""
    grown = prepare(rows_of(tmp_path, "f", iq=[101.5]), tmp_path / "c.zarr", atlas=ATLAS)
    np.testing.assert_equal(grown.iq.values, [np.nan] * 5 + [101.5])
    with pytest.raises(InputError, match="only numbers or only words in 'age' .* also 'old'"):
        prepare(rows_of(tmp_path, "g", age=["old"]), tmp_path / "c.zarr", atlas=ATLAS)


def test_a_column_that_was_all_missing_takes_the_type_that_comes(tmp_path):
    prepare(rows_of(tmp_path, "ab", sex=[None, None]), tmp_path / "c.zarr", atlas=ATLAS)
    grown = prepare(rows_of(tmp_path, "c", sex=["F"]), tmp_path / "c.zarr", atlas=ATLAS)
    assert grown.sex.values.tolist() == ["", "", "F"]


@pytest.mark.parametrize("given", [[1, 2, None], ["1", " 2 ", "n/a"], pd.array([1, 2, None])])
def test_numbers_are_numbers_however_they_are_written(given):
    values, notes = labels_file.typed(pd.Series(given), "age")
    np.testing.assert_equal(values.to_numpy(), [1.0, 2.0, np.nan])
    assert notes == []


@pytest.mark.parametrize("word", ["", "n/a", "NA", ".", "unknown", "Unknown", "None", "?", None])
def test_words_for_missing_are_missing(word):
    values, _ = labels_file.typed([word, "12.5"], "age")
    np.testing.assert_equal(values.to_numpy(), [np.nan, 12.5])
    values, _ = labels_file.typed([word, "F"], "sex")
    assert values.tolist() == ["", "F"]


def test_an_open_age_is_a_number_with_a_note(tmp_path):
    rows = rows_of(tmp_path, "abc", age=["71", "89+", ">90"])
    cohort = prepare(rows, tmp_path / "c.zarr", atlas=ATLAS)
    assert cohort.age.values.tolist() == [71, 89, 90]
    assert "'age': 2 written as 89+, >90" in cohort.attrs["notes"][0]


def test_scores_say_that_a_label_has_an_open_end(tmp_path):
    """As target and as confound, through latents and through a connectome."""
    ages = ["71", "89+", *(str(60 + i) for i in range(18))]
    rows = rows_of(tmp_path, "abcdefghijklmnopqrst", age=ages, iq=[100.0 + i for i in range(20)])
    cohort = prepare(rows, tmp_path / "c.zarr", atlas=ATLAS)
    latents = bhx.embed(cohort, bhx.load_model(device="cpu"), progress=False)
    for features in (bhx.pool(latents), bhx.connectome(cohort)):
        for target, how in (("age", {}), ("iq", {"confounds": ("age",)}), ("iq", {})):
            notes = bhx.probe(features, target, folds=3, **how).attrs["notes"]
            assert ("1 written as 89+ read as a number" in notes) == (target == "age" or bool(how))


def test_a_single_note_that_a_file_format_made_a_word_is_read():
    note = "'age': 1 written as 89+ read as a number"
    for notes in (note, str([note, "'sex': other"])):
        latents = xr.Dataset(attrs={"cohort": json.dumps({"notes": notes})})
        assert said_of([latents], ["age"]) == [note]


def test_bins_dates_and_ids_stay_words():
    for words in (["40-44", "45-49"], ["2020-01-01", "2021-05-05"], ["0012", "0110"]):
        assert labels_file.typed(words, "x")[0].tolist() == words


def test_a_word_among_numbers_is_asked_about():
    with pytest.raises(InputError, match="numbers or words in 'age', found forty among numbers"):
        labels_file.typed([*map(str, range(20, 40)), "forty"], "age")


# --- codes ---


def test_one_missing_code_leaves_the_others_alone(tmp_path, monkeypatch):
    entry = yaml.safe_load((catalog_file.shipped_folder() / "local-cohort.yaml").read_text())
    entry |= {"name": "mine", "path": "mine", "prepare": {"atlas": ATLAS}}
    (tmp_path / "cat").mkdir()
    (tmp_path / "cat" / "mine.yaml").write_text(yaml.safe_dump(entry))
    monkeypatch.setenv("BHX_CATALOG", str(tmp_path / "cat"))
    monkeypatch.setenv("BHX_DATA", str(tmp_path / "data"))
    mine = tmp_path / "data" / "mine"
    for i in range(1, 6):
        where = mine / f"sub-0{i}" / "func"
        where.mkdir(parents=True)
        name = f"sub-0{i}_task-rest_{SPACE}_atlas-Schaefer_timeseries.tsv"
        table(where / name, parcel_series(60, i), NAMES)

    def prepared(last, out):
        lines = [f"sub-0{i}\t6{i}\t{i % 2}\t{i % 3}" for i in range(1, 5)] + [last]
        (mine / "participants.tsv").write_text("participant_id\tage\tsex\tdx\n" + "\n".join(lines))
        return prepare("mine", tmp_path / out)

    cohort = prepared("sub-05\tn/a\tn/a\tn/a", "a.zarr")
    assert cohort.sex.values.tolist() == ["M", "F", "M", "F", ""]
    assert cohort.diagnosis.values[:2].tolist() == ["mild impairment", "dementia"]
    assert np.isnan(cohort.age.values[4])
    cohort = prepared("sub-05\t-999\t9\t-9", "b.zarr")
    assert cohort.sex.values.tolist() == ["M", "F", "M", "F", ""]
    assert np.isnan(cohort.age.values[4])
    assert "codes of 'sex' among 0, 1, found 9 in 1 rows" in cohort.attrs["notes"][0]


def test_every_entry_with_whole_codes_reads_them_as_floats():
    for file in catalog_file.catalog_files().values():
        for name, phenotype in catalog_file.read_entry(file).phenotypes.items():
            codes = [code for code in phenotype.coding if code.isdigit()]
            floats = pd.Series([*map(float, codes), np.nan], dtype=float)
            decoded, _ = labels_file.coded(floats, name, phenotype.coding)
            assert decoded.tolist() == [*map(phenotype.coding.get, codes), ""]


def test_words_that_are_decoded_already_stay_and_unknown_codes_are_refused():
    assert labels_file.coded(["F", "1"], "sex", {"0": "F", "1": "M"})[0].tolist() == ["F", "M"]
    with pytest.raises(InputError, match="codes of 'sex' among 0, 1, found f, m"):
        labels_file.coded(["f", "m"], "sex", {"0": "F", "1": "M"})


@pytest.mark.parametrize("code", [-9999, -999, -99, 999, 9999])
def test_codes_of_missing_values_are_asked_about(code, tmp_path):
    rows = rows_of(tmp_path, "abc", iq=[101, code, 99])
    with pytest.raises(InputError, match=f"found {code} in 1 rows of 'iq', which look like codes"):
        prepare(rows, tmp_path / "c.zarr", atlas=ATLAS)
    named = prepare(rows, tmp_path / "c.zarr", atlas=ATLAS, missing=[code])
    np.testing.assert_equal(named.iq.values, [101, np.nan, 99])
    none = prepare(rows, tmp_path / "d.zarr", atlas=ATLAS, missing=())
    np.testing.assert_equal(none.iq.values, [101, code, 99])


@pytest.mark.parametrize("code", [-1, -3, -9])
def test_short_codes_are_noted(code):
    table, notes = labels_file.tidy(pd.DataFrame({"kids": [1, 0, code, 2]}))
    assert table.kids.tolist() == [1, 0, code, 2]
    assert f"{code} in 1 rows of 'kids' look like codes" in notes[0]
    assert labels_file.tidy(pd.DataFrame({"z": [-1.5, -1, 0.3, 2]}))[1] == []


# --- tables of participants ---


def people(text, ids=("sub-001", "sub-002", "sub-010"), path=None):
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return join_phenotypes(pd.DataFrame({"subject": ids, "participant": ids}), path)


def test_lost_zeros_are_found_and_people_without_a_line_named(tmp_path):
    path = tmp_path / "participants.csv"
    joined = people("participant_id,age\n1,30\n002,31\n", path=path)
    np.testing.assert_equal(joined.age.to_numpy(), [30, 31, np.nan])
    lost, blank = joined.attrs["notes"]
    assert "ids 1 of 1 participants lack zeros" in lost
    assert "no line in the table of participants for 1: 010" in blank
    ids = ("sub-01", "sub-001")
    joined = people("participant_id,age\n01,30\n1,31\n", ids, path)
    np.testing.assert_equal(joined.age.to_numpy(), [30, np.nan])


def test_spaces_marks_and_empty_lines_are_no_values(tmp_path):
    text = "\ufeffparticipant_id\t age \tsex\n sub-001 \t 30\tF \n\t\t\nsub-002\t.\tM\n\n"
    joined = people(text, path=tmp_path / "participants.tsv")
    np.testing.assert_equal(joined.age.to_numpy(), [30, np.nan, np.nan])
    assert joined.sex.tolist()[:2] == ["F", "M"]


# --- reserved names ---

TAKEN = ["prediction", "null", "score", "model", "metric", "fold", "output", "truth", "class"]
TAKEN += ["hub", "valid", "features", "token", "roi"]


@pytest.mark.parametrize("name", TAKEN)
def test_reserved_names_are_refused_when_the_cohort_is_made(name, tmp_path):
    message = f"that bhx does not use itself, found {name}.* taken are .*class.*valid"
    rows = rows_of(tmp_path, "ab", **{name: [1, 2]})
    with pytest.raises(InputError, match=message):
        prepare(rows, tmp_path / "c.zarr", atlas=ATLAS)
    (tmp_path / "people.tsv").write_text(f"participant_id\t{name}\na\t1\n")
    with pytest.raises(InputError, match=message):
        join_phenotypes(rows[["subject"]].assign(participant=rows.subject), tmp_path / "people.tsv")
    if name not in ("features", "roi"):  # dims and variables of a cohort cannot be labels at all
        with pytest.raises(InputError, match=message):
            check(make_cohort(4).assign_coords({name: ("subject", np.arange(4))}), "cohort")


# --- a store that is continued ---


def test_another_task_is_refused_and_labels_are_refreshed(tmp_path):
    where = func(tmp_path / "d")
    for seed, task in enumerate(("rest", "movie")):
        name = f"sub-01_task-{task}_{SPACE}_atlas-Schaefer_timeseries.tsv"
        table(where / name, parcel_series(60, seed), NAMES)
    file = tmp_path / "d" / "participants.tsv"
    file.write_text("participant_id\tage\tsex\nsub-01\t30\tF\n")
    prepare(tmp_path / "d", tmp_path / "c.zarr", atlas=ATLAS)
    with pytest.raises(InputError, match="prepared with {'task': 'movie'}, found {'task': 'rest'}"):
        prepare(tmp_path / "d", tmp_path / "c.zarr", atlas=ATLAS, task="movie")
    with pytest.raises(InputError, match="files that .* was made from, found others for 1"):
        prepare(find_scans(tmp_path / "d", task="movie"), tmp_path / "c.zarr", atlas=ATLAS)
    file.write_text("participant_id\tage\tsex\tiq\nsub-01\t31.5\tn/a\t99\n")
    again = prepare(tmp_path / "d", tmp_path / "c.zarr", atlas=ATLAS)
    assert {"age", "iq"} <= {*again.coords}
    assert (again.age.item(), again.sex.item(), again.iq.item()) == (31.5, "", 99)
    np.testing.assert_allclose(again.bold[0], parcel_series(60, 0), rtol=1e-5)


def test_changed_files_are_refused_or_read_again(tmp_path):
    rows = rows_of(tmp_path, "abc")
    prepare(rows, tmp_path / "c.zarr", atlas=ATLAS)
    os.utime(rows.bold[0], (1, 1))  # another time alone is no change
    prepare(rows, tmp_path / "c.zarr", atlas=ATLAS)
    table(tmp_path / "b.tsv", parcel_series(90, 7), NAMES)
    sidecar(tmp_path / "c.tsv", 2.5)
    with pytest.raises(InputError, match="found others for 2 subjects: b, c. .* redo=True"):
        prepare(rows, tmp_path / "c.zarr", atlas=ATLAS)
    redone = prepare(rows, tmp_path / "c.zarr", atlas=ATLAS, redo=True)
    assert redone.subject.values.tolist() == ["a", "b", "c"]
    assert redone.n_volumes.values.tolist() == [60, 90, 60]
    assert redone.tr.values.tolist() == [2.0, 2.0, 2.5]
    for i, series in enumerate((parcel_series(60, 0), parcel_series(90, 7), parcel_series(60, 2))):
        np.testing.assert_allclose(cohort_file.scan(redone, "abc"[i]), series, rtol=1e-5)
    fresh = prepare(rows, tmp_path / "d.zarr", atlas=ATLAS)
    np.testing.assert_array_equal(redone.bold, fresh.bold)


def test_a_shorter_scan_leaves_nothing_of_the_longer_one(tmp_path):
    rows = rows_of(tmp_path, "ab")
    prepare(rows, tmp_path / "c.zarr", atlas=ATLAS)
    table(tmp_path / "a.tsv", parcel_series(40, 7), NAMES)
    redone = prepare(rows, tmp_path / "c.zarr", atlas=ATLAS, redo=True)
    assert np.isnan(redone.bold.values[0, :, 40:]).all()
    assert np.isfinite(redone.bold.values[1]).all()


def test_what_a_killed_run_left_is_cut_off_when_nobody_else_is_usable(tmp_path):
    rows = rows_of(tmp_path, "ab", age=[30, 40])
    prepare(rows, tmp_path / "c.zarr", atlas=ATLAS)
    zarr.open_group(tmp_path / "c.zarr").attrs.update(complete=False, rows_written=1)
    left = prepare(rows[:1], tmp_path / "c.zarr", atlas=ATLAS)
    assert left.subject.values.tolist() == ["a"]
    assert left.age.values.tolist() == [30]
    assert left.bold.shape == (1, 100, 60)


def test_a_part_of_a_cohort_is_saved_by_xarray_alone(tmp_path):
    prepare(rows_of(tmp_path, "abcd"), tmp_path / "c.zarr", atlas=ATLAS)
    cohort = cohort_file.open_cohort(tmp_path / "c.zarr")
    cohort.isel(subject=[0, 3]).to_zarr(tmp_path / "part.zarr")
    part = cohort_file.open_cohort(tmp_path / "part.zarr")
    np.testing.assert_array_equal(part.bold, cohort.bold.isel(subject=[0, 3]))


def test_a_zip_is_called_a_zip(tmp_path):
    import shutil

    func(tmp_path / "d", "sub-01_bold.txt")
    path = shutil.make_archive(str(tmp_path / "d"), "zip", tmp_path / "d")
    with pytest.raises(InputError, match="found a zip at .* Unzip it"):
        cohort_file.open_cohort(path)
    Path(path).rename(tmp_path / "a.nii")
    with pytest.raises(InputError, match="Unpack it: this is a zip"):
        read_scan({"bold": str(tmp_path / "a.nii")}, atlas=ATLAS)


# --- runs and their files ---


def test_runs_that_differ_in_any_entity_are_rows_with_their_own_confounds(tmp_path):
    bold, noise = f"{SPACE}_desc-preproc_bold.nii.gz", "desc-confounds_timeseries.tsv"
    runs = ("dir-AP", "dir-PA", "acq-mb4_dir-AP", "ce-gad", "rec-norm", "part-mag")
    func(tmp_path, *(f"sub-01_task-rest_{run}_{bold}" for run in runs))
    func(tmp_path, f"sub-01_task-rest_part-phase_{bold}")
    func(tmp_path, *(f"sub-01_task-rest_{run}_{noise}" for run in runs[1:3]))
    rows = find_scans(tmp_path).set_index("subject")
    assert [*rows.index] == [
        "sub-01/acq-mb4/dir-AP",
        "sub-01/ce-gad",
        "sub-01/dir-AP",
        "sub-01/dir-PA",
        "sub-01/part-mag",
        "sub-01/rec-norm",
    ]
    for subject, row in rows.iterrows():
        run = "_".join(subject.split("/")[1:])
        assert f"task-rest_{run}_" in row.bold
        assert row.confounds == "" or f"task-rest_{run}_" in row.confounds
    assert (rows.confounds != "").sum() == 2
    assert rows.dir["sub-01/dir-PA"] == "PA"


def test_run_1_and_run_01_are_one_run(tmp_path):
    func(tmp_path, f"sub-01_task-rest_run-01_{SPACE}_desc-preproc_bold.nii.gz")
    func(tmp_path, "sub-01_task-rest_run-1_space-fsLR_den-91k_bold.dtseries.nii")
    func(tmp_path, "sub-01_task-rest_run-1_desc-confounds_timeseries.tsv")
    (row,) = find_scans(tmp_path).to_dict("records")
    assert row["subject"] == "sub-01/run-1"
    assert row["bold"].endswith("dtseries.nii")
    assert row["confounds"] != ""


def test_echoes_give_way_to_their_combination(tmp_path):
    bold = f"{SPACE}_desc-preproc_bold.nii.gz"
    func(tmp_path, *(f"sub-01_task-rest_echo-{i}_{bold}" for i in (1, 2)))
    func(tmp_path, "sub-01_task-rest_desc-confounds_timeseries.tsv")
    rows = find_scans(tmp_path)
    assert rows.subject.tolist() == ["sub-01/echo-1", "sub-01/echo-2"]
    assert (rows.confounds != "").all()
    func(tmp_path, f"sub-01_task-rest_{bold}")
    assert find_scans(tmp_path).subject.tolist() == ["sub-01"]


def test_masks_go_with_their_t1_and_further_t1_are_named(tmp_path):
    where = tmp_path / "sub-01" / "anat"
    where.mkdir(parents=True)
    for name in (
        "acq-a_{}_desc-preproc_T1w",
        "acq-b_{}_desc-preproc_T1w",
        "acq-b_{}_desc-brain_mask",
    ):
        (where / f"sub-01_{name.format(SPACE)}.nii.gz").write_text("x")
    rows = find_scans(tmp_path)
    assert "acq-a" in rows.t1.item()
    assert rows.t1_mask.item() == ""
    (note,) = rows.attrs["notes"]
    assert "acq-b" in note


def test_files_that_are_not_for_us_are_counted(tmp_path, monkeypatch):
    name = f"sub-01_task-rest_{SPACE}_atlas-Schaefer_timeseries.tsv"
    where = func(tmp_path, f"._{name}", "._sub-01_task-rest_desc-confounds_timeseries.tsv")
    table(where / name, parcel_series(60), NAMES)
    closed = tmp_path / "sub-02"
    closed.mkdir()
    scandir = os.scandir

    def refuses(path):
        if not isinstance(path, int) and Path(path) == closed:
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuses)
    cohort = prepare(tmp_path, tmp_path / "out" / "c.zarr", atlas=ATLAS)
    assert cohort.subject.values.tolist() == ["sub-01"]
    unread, apple = cohort.attrs["notes"]
    assert "sub-02 cannot be read: Permission denied" in unread
    assert "2 files that macOS leaves are passed over" in apple


def test_the_table_of_the_atlas_is_taken_among_many(tmp_path):
    stem, rng = "sub-01_task-rest_", np.random.default_rng(0)
    series = parcel_series(60)
    where = func(tmp_path / "a")
    for n in (56, 956):
        names = (
            [*SHORT, *(f"LH-Sub-{i}" for i in range(n))]
            if n == 56
            else [f"x{i}" for i in range(1056)]
        )
        values = np.vstack([series, rng.standard_normal((n, 60))])
        name = f"{stem}space-fsLR_seg-4S{100 + n}Parcels_den-91k_stat-mean_timeseries.ptseries.nii"
        ptseries(where / name, values, names)
    dtseries(where / f"{stem}space-fsLR_den-91k_desc-denoised_bold.dtseries.nii", series)
    assert "4S156" in find_scans(tmp_path / "a", atlas=ATLAS).bold.item()
    assert "dtseries" in find_scans(tmp_path / "a").bold.item()  # no table of Schaefer-400
    cohort = prepare(tmp_path / "a", tmp_path / "a.zarr", atlas=ATLAS)
    np.testing.assert_allclose(cohort.bold[0], series, rtol=1e-5)

    for n, said in enumerate(
        ("seg-4S156Parcels_stat-mean", "atlas-Schaefer117", "seg-Schaefer100")
    ):
        where = func(tmp_path / f"b{n}")
        (where / f"{stem}{SPACE}_{said}_stat-alff_bold.tsv").write_text("x")
        (where / f"{stem}{SPACE}_seg-Glasser_stat-mean_timeseries.tsv").write_text("x")
        (where / f"{stem}{SPACE}_{said}_timeseries.tsv").write_text("x")
        found = find_scans(tmp_path / f"b{n}", atlas=ATLAS).bold.item()
        assert found.endswith(f"{said}_timeseries.tsv")


def test_a_form_that_is_read_goes_before_one_that_is_not(tmp_path):
    stem = "sub-01_task-rest_"
    usable = f"{stem}{SPACE}_desc-preproc_bold.nii.gz"
    for other in (
        "space-fsLR_den-170k_bold.dtseries.nii",
        "hemi-L_space-fsaverage6_bold.func.gii",
        "space-MNI152NLin2009cAsym_desc-preproc_bold.nii.gz",
        "space-MNIInfant_cohort-1_desc-preproc_bold.nii.gz",
    ):
        folder = tmp_path / other
        func(folder, usable, stem + other)
        assert find_scans(folder).bold.item().endswith(usable)


def test_older_names_are_known(tmp_path):
    where = func(tmp_path)
    series = parcel_series(60)
    left = gifti(where, series)
    for hemi in "LR":
        old = left.with_name(left.name.replace("hemi-L", f"hemi-{hemi}"))
        old.rename(where / f"sub-01_task-rest_space-fsaverage5_hemi-{hemi}_bold.func.gii")
    motion = pd.DataFrame({"FramewiseDisplacement": [np.nan] + [0.3] * 59})
    file = where / "sub-01_task-rest_desc-confounds_regressors.tsv"
    motion.to_csv(file, sep="\t", index=False, na_rep="n/a")
    cohort = prepare(tmp_path, tmp_path / "out" / "c.zarr", atlas=ATLAS, denoising=None)
    np.testing.assert_allclose(cohort.bold[0], series, rtol=1e-5)
    assert cohort.mean_fd.item() == pytest.approx(0.3)


# --- geometry ---


def without_codes(path):
    image = nib.load(path)
    image.header["qform_code"] = image.header["sform_code"] = 0
    header = image.header.copy()
    out = nib.Nifti1Image(np.array(image.dataobj), None, header)
    nib.save(out, path)
    return path


def test_images_without_a_position_are_refused(tmp_path):
    labels = label_image(tmp_path / "labels.nii")
    bold = sidecar(volume(tmp_path / "bold.nii", parcel_series(60), labels))
    for use in (
        lambda: bold_file.read_bold(bold, ATLAS, labels=without_codes(labels)),
        lambda: bold_file.read_bold(without_codes(bold), ATLAS, labels=labels),
        lambda: read_t1(without_codes(t1_image(tmp_path / "t1.nii", 4))),
    ):
        with pytest.raises(InputError, match="found neither a qform nor an sform"):
            use()


@pytest.mark.parametrize("space", ["MNIInfant_cohort-1", "MNIPediatricAsym_cohort-2", "MNI305"])
def test_labels_and_images_of_different_templates_do_not_meet(space, tmp_path):
    labels, series = label_image(tmp_path / "labels.nii.gz"), parcel_series(60)
    path = sidecar(volume(tmp_path / f"sub-1_space-{space}_bold.nii.gz", series, labels))
    with pytest.raises(InputError, match=f"MNI152 space, found space-{space}"):
        bold_file.read_bold(path, ATLAS, labels=labels)
    theirs = labels.rename(tmp_path / f"tpl-{space}_atlas-x_dseg.nii.gz")
    np.testing.assert_allclose(bold_file.read_bold(path, ATLAS, labels=theirs), series, rtol=1e-5)
    adult = sidecar(path.rename(tmp_path / f"sub-1_{SPACE}_bold.nii.gz"))
    with pytest.raises(InputError, match=f"found space-{space} in tpl-"):
        bold_file.read_bold(adult, ATLAS, labels=theirs)


def test_dims_of_one_are_squeezed_away(tmp_path):
    labels, series = label_image(tmp_path / "labels.nii"), parcel_series(60)
    image = nib.load(volume(tmp_path / "a.nii", series, labels))
    for shape in ((..., None), (..., None, slice(None))):
        nib.save(
            nib.Nifti1Image(np.asarray(image.dataobj)[shape], image.affine), tmp_path / "b.nii"
        )
        bold = bold_file.read_bold(tmp_path / "b.nii", ATLAS, labels=labels, tr=2.0)
        np.testing.assert_allclose(bold, series, rtol=1e-5)


def test_a_surface_in_one_array_is_read(tmp_path):
    series = parcel_series(60)
    halves = np.split(np.vstack([0 * series[:1], series])[load_atlas(ATLAS).labels_fsaverage5], 2)
    for hemi, values in zip("LR", halves, strict=True):
        array = nib.gifti.GiftiDataArray(values.astype("float32"))
        name = f"sub-1_space-fsaverage5_desc-denoised_bold_hemi-{hemi}.gii"
        nib.save(nib.GiftiImage(darrays=[array]), tmp_path / name)
    left = tmp_path / "sub-1_space-fsaverage5_desc-denoised_bold_hemi-L.gii"
    np.testing.assert_allclose(bold_file.read_bold(left, ATLAS, tr=2.0), series, rtol=1e-5)


# --- time ---


def test_one_second_in_a_header_alone_is_no_repetition_time(tmp_path):
    labels, series = label_image(tmp_path / "labels.nii"), parcel_series(60)
    for units in ("sec", "unknown"):
        path = volume(tmp_path / f"{units}.nii", series, labels, tr=1.0, units=units)
        with pytest.raises(InputError, match="found 1 s in the header alone"):
            bold_file.read_bold(path, ATLAS, labels=labels)
        assert bold_file.read_bold(path, ATLAS, labels=labels, tr=1.0).attrs["tr"] == 1
        assert bold_file.read_bold(sidecar(path), ATLAS, labels=labels).attrs["tr"] == 2


def test_a_header_in_milliseconds_beside_a_sidecar_is_said(tmp_path):
    labels, series = label_image(tmp_path / "labels.nii"), parcel_series(60)
    path = sidecar(volume(tmp_path / "a.nii", series, labels, tr=2000, units="unknown"))
    scan, notes = read_scan({"bold": str(path)}, atlas=ATLAS, labels=labels)
    assert scan.attrs["tr"] == 2
    assert "TR of 2000 in the header taken as ms" in notes
    with pytest.raises(InputError, match="found 2 s in the sidecar and 2.5 s in the header"):
        bold_file.read_tr(path, 2500)


def test_censored_volumes_come_back_to_their_places(tmp_path):
    series, cut = parcel_series(100), np.isin(np.arange(100), [10, 11, 12, 60])
    path = tmp_path / f"sub-1_task-rest_{SPACE}_seg-Schaefer100_stat-mean_timeseries.tsv"
    table(path, series[:, ~cut], NAMES)
    outliers = tmp_path / "sub-1_task-rest_outliers.tsv"
    pd.DataFrame({"framewise_displacement": cut.astype(int)}).to_csv(
        outliers, sep="\t", index=False
    )
    motion = tmp_path / "sub-1_task-rest_motion.tsv"
    pd.DataFrame({"framewise_displacement": [0.2] * 100}).to_csv(motion, sep="\t", index=False)
    row = {"bold": str(path), "confounds": str(motion)}
    scan, notes = read_scan(row, atlas=ATLAS)
    assert scan.sizes["time"] == scan.attrs["n_volumes"] == 100
    np.testing.assert_allclose(scan.bold[:, ~cut], series[:, ~cut], rtol=1e-5)
    np.testing.assert_allclose(scan.bold[:, 60], series[:, [59, 61]].mean(1), rtol=1e-5)
    assert scan.attrs["n_scrubbed"] == 4
    assert notes == ["4 of 100 volumes were missing and are filled in linearly"]
    assert scan.attrs["mean_fd"] == pytest.approx(0.2)
    outliers.unlink()
    with pytest.raises(InputError, match="as many volumes in .* found 96 and 100"):
        read_scan(row, atlas=ATLAS)


def test_volumes_without_a_number_are_filled_in_and_counted(tmp_path):
    series = parcel_series(100)
    blank = series.copy()
    blank[:, [10, 11, 90]] = np.nan
    path = tmp_path / "a_timeseries.tsv"
    pd.DataFrame(blank.T, columns=NAMES).to_csv(path, sep="\t", index=False, na_rep="n/a")
    scan, notes = read_scan({"bold": str(sidecar(path))}, atlas=ATLAS)
    assert scan.attrs["coverage"] == 1
    assert notes == ["3 of 100 volumes were missing and are filled in linearly"]
    kept = np.delete(np.arange(100), [10, 11, 90])
    np.testing.assert_allclose(scan.bold[:, kept], series[:, kept], rtol=1e-5)


def test_degrees_of_freedom_are_counted(tmp_path):
    noise = np.random.default_rng(0).standard_normal((60, 55))
    path, file = gifti(tmp_path, parcel_series(60)), tmp_path / "confounds.tsv"
    row = {"bold": str(path), "confounds": str(file)}
    for columns, left in ((40, 19), (20, 39)):
        pd.DataFrame(noise[:, :columns]).to_csv(file, sep="\t", index=False)
        scan, notes = read_scan(row, atlas=ATLAS, denoising={"strategy": "columns"})
        assert scan.attrs["dof"] == left
        assert any(f"{left} of 60 degrees of freedom after" in n for n in notes) == (left < 30)
        assert "no framewise displacement in confounds.tsv" in notes
    pd.DataFrame(noise).to_csv(file, sep="\t", index=False)
    with pytest.raises(InputError, match="at least 10 degrees of freedom .*, found 4 of 60"):
        read_scan(row, atlas=ATLAS, denoising={"strategy": "columns"})


# --- T1 ---


def test_nan_outside_and_rims_of_a_spline_are_no_brain(tmp_path):
    from nilearn.image import resample_img

    plain = nib.load(t1_image(tmp_path / "a.nii", 2))
    there = np.array(plain.dataobj)
    nib.save(nib.Nifti1Image(np.where(there > 0, there, np.nan), plain.affine), tmp_path / "b.nii")
    right = read_t1(tmp_path / "a.nii", voxel_mm=4)[0]
    np.testing.assert_array_equal(read_t1(tmp_path / "b.nii", voxel_mm=4)[0], right)
    affine = np.diag([1.2, 1.2, 1.2, 1])
    affine[:3, 3] = -90, -126, -72
    ringing = resample_img(plain, affine, (152, 182, 152), interpolation="continuous", clip=False)
    assert ringing.get_fdata().min() < 0
    nib.save(ringing, tmp_path / "c.nii")
    t1, notes = read_t1(tmp_path / "c.nii", voxel_mm=4)
    assert notes == []
    assert np.corrcoef(t1.values.ravel(), right.values.ravel())[0, 1] > 0.99


def segmented(t1):
    return np.digitize(t1, [1, 250, 450])


def labeled(t1):
    """Blocks of 12 mm, each with a whole number."""
    x, y, z = (i // 12 for i in np.indices(t1.shape))
    return np.where(t1 > 0, 1 + x + 14 * (y + 16 * z), 0)


@pytest.mark.parametrize("turn", [segmented, labeled])
def test_segmentations_and_maps_of_labels_are_no_t1(turn, tmp_path):
    with pytest.raises(InputError, match="a segmentation or a map of labels"):
        read_t1(t1_image(tmp_path / "a.nii", turn=turn))


def head_in(tmp_path, change):
    """A brain away from MNI152 space, with the mask that goes with it."""
    path, mask = t1_image(tmp_path / "a.nii", 2), tmp_path / "mask.nii"
    image = nib.load(path)
    values = np.array(image.dataobj)
    affine = change @ image.affine
    nib.save(nib.Nifti1Image((values > 0).astype("uint8"), affine), mask)
    nib.save(nib.Nifti1Image(values + 300, affine), tmp_path / "head.nii")  # with its skull
    return tmp_path / "head.nii", mask


def scaled(x, y, z, shift=(0, 0, 0)):
    change = np.diag([x, y, z, 1.0])
    change[:3, 3] = shift
    return change


@pytest.mark.parametrize(
    "change", [scaled(0.85, 0.85, 0.8), scaled(0.95, 0.9, 0.75), scaled(1, 1, 1, (0, 0, 9))]
)
def test_heads_that_are_not_in_mni_space_are_refused_with_their_mask(change, tmp_path):
    with pytest.raises(InputError, match="Not registered to MNI.* run fMRIPrep or sMRIPrep"):
        read_t1(*head_in(tmp_path, change))


@pytest.mark.parametrize(
    "change", [np.eye(4), scaled(1.03, 0.98, 1.02), scaled(1, 1, 1, (1, -2, 1))]
)
def test_heads_in_mni_space_pass(change, tmp_path):
    assert read_t1(*head_in(tmp_path, change))[1] == []


def test_the_mask_of_another_image_is_refused(tmp_path):
    head, mask = head_in(tmp_path, np.eye(4))
    image = nib.load(head)
    affine = scaled(1, 1, 1, (0, 20, 15)) @ image.affine
    nib.save(nib.Nifti1Image(np.array(image.dataobj), affine), tmp_path / "moved.nii")
    with pytest.raises(InputError, match="or not with this mask"):
        read_t1(tmp_path / "moved.nii", mask)
