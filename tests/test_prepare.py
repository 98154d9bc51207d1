"""Laws of preparing: a folder becomes its cohort, and an interruption leaves no trace."""

import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import xarray as xr
from small_cohorts import brains_of
from small_files import ATLAS, parcel_series, t1_image

from bhx.data import cohort as cohort_file
from bhx.data import files as files_file
from bhx.data import prepare as prepare_file
from bhx.data import store as store_file
from bhx.data.anatomy import read_t1
from bhx.data.atlas import load_atlas, match_names
from bhx.data.derivatives import find_scans, join_phenotypes, write_derivatives
from bhx.errors import InputError
from bhx.modalities.base import Modality
from bhx.modalities.t1 import coarsen_t1, t1_grid
from bhx.modalities.table import MODALITIES

OPTIONS = {"atlas": ATLAS, "voxel_mm": 16.0}


@pytest.fixture(scope="module")
def derivatives(tmp_path_factory):
    """Six participants with parcel tables."""
    folder = tmp_path_factory.mktemp("study") / "derivatives"
    return write_derivatives(brains_of(), folder, surface=False)


@pytest.fixture
def one_file_each(monkeypatch):
    monkeypatch.setattr(store_file, "SHARD_BYTES", 1)


def files_of(store):
    files = (p for p in sorted(Path(store).rglob("*")) if p.is_file())
    return {str(p.relative_to(store)): p.read_bytes() for p in files}


def test_a_folder_becomes_its_cohort(tmp_path):
    cohort = brains_of(2, t1=[0])
    folder = write_derivatives(cohort, tmp_path / "derivatives", surface=False)
    again = prepare_file.prepare(folder, tmp_path / "c.zarr", **OPTIONS)
    assert all(v.chunks is not None for v in again.data_vars.values())
    np.testing.assert_allclose(again.bold, cohort.bold, rtol=1e-4, atol=1e-4)
    for name in (
        "subject",
        "site",
        "age",
        "tr",
        "n_volumes",
        "has_bold",
        "has_t1",
        "roi",
        "network",
    ):
        np.testing.assert_array_equal(again[name], cohort[name])
    coarse = coarsen_t1(cohort, 16).t1[0]
    assert np.corrcoef(again.t1[0].values.ravel(), coarse.values.ravel())[0, 1] > 0.99
    assert np.isnan(again.t1[1:]).all()
    for axis, values in t1_grid(16).items():
        np.testing.assert_array_equal(again[axis], values)
    assert again.attrs["refused"] == {}
    assert not (tmp_path / "c.zarr.parts").exists()


def test_surfaces_are_denoised_and_become_the_same_parcels(tmp_path):
    cohort = brains_of(2)
    folder = write_derivatives(cohort.isel(time=slice(0, 60)), tmp_path / "derivatives")
    raw = prepare_file.prepare(folder, tmp_path / "raw.zarr", **OPTIONS, denoising=None)
    np.testing.assert_allclose(raw.bold, cohort.bold + 1000, rtol=1e-5)
    assert raw.bold_scale.values.tolist() == ["raw", "raw"]
    assert (raw.mean_fd > 0).all()


KILLED = """
import os, signal, sys
from bhx.data import prepare as prepare_file, store as store_file
store_file.SHARD_BYTES = 1
calls, original = [], getattr(prepare_file, sys.argv[3])
def dies(*args):
    calls.append(1)
    if len(calls) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return original(*args)
setattr(prepare_file, sys.argv[3], dies)
prepare_file.prepare(sys.argv[1], sys.argv[2], atlas="schaefer100", voxel_mm=16.0, workers=1)
"""


@pytest.mark.parametrize("moment", ["_stage_one", "_load_parts"])
def test_a_killed_run_continues_and_equals_an_unbroken_one(
    moment, derivatives, tmp_path, one_file_each
):
    broken, whole = tmp_path / "broken.zarr", tmp_path / "whole.zarr"
    command = [sys.executable, "-c", KILLED, str(derivatives), str(broken), moment]
    ended = subprocess.run(command, capture_output=True, timeout=120)
    assert ended.returncode == -signal.SIGKILL
    assert broken.exists() == (moment == "_load_parts")
    assert len(list((tmp_path / "broken.zarr.parts").glob("*.npz"))) == (
        2 if moment == "_stage_one" else 6
    )
    if broken.exists():
        with pytest.raises(InputError, match="still being written"):
            cohort_file.open_cohort(broken)
    prepare_file.prepare(derivatives, broken, **OPTIONS)
    prepare_file.prepare(derivatives, whole, **OPTIONS)
    assert files_of(broken) == files_of(whole)


def test_a_continued_run_reads_only_what_is_missing(derivatives, tmp_path, monkeypatch):
    read = []
    original = prepare_file.read_scan
    monkeypatch.setattr(
        prepare_file, "read_scan", lambda row, **o: read.append(row) or original(row, **o)
    )
    rows = find_scans(derivatives)
    prepare_file.prepare(rows.iloc[:4], tmp_path / "c.zarr", **OPTIONS)
    assert len(read) == 4
    prepare_file.prepare(rows, tmp_path / "c.zarr", **OPTIONS)
    assert len(read) == 6
    prepare_file.prepare(rows, tmp_path / "c.zarr", **OPTIONS)
    assert len(read) == 6


@pytest.mark.parametrize("shard", [1, 1e9])
def test_added_subjects_follow_and_longer_scans_fit(shard, derivatives, tmp_path, monkeypatch):
    monkeypatch.setattr(store_file, "SHARD_BYTES", shard)
    rows = find_scans(derivatives)
    at_once = prepare_file.prepare(rows, tmp_path / "a.zarr", **OPTIONS).compute()
    for some in ([0, 1, 2], [0, 1, 2, 3], range(6)):
        grown = prepare_file.prepare(rows.iloc[list(some)], tmp_path / "b.zarr", **OPTIONS)
    xr.testing.assert_identical(grown.compute(), at_once)


def test_broken_subjects_are_left_out_and_named(derivatives, tmp_path):
    folder = shutil.copytree(derivatives, tmp_path / "derivatives")
    content = {file: file.read_bytes() for file in folder.rglob("*timeseries.tsv")}
    for file in content:
        if file.parts[-3] == "sub-02" and "confounds" not in file.name:
            file.write_text("no numbers here")
        if file.parts[-3] == "sub-04" and "confounds" not in file.name:
            file.write_bytes(b"")
    cohort = prepare_file.prepare(folder, tmp_path / "c.zarr", **OPTIONS)
    assert cohort.subject.values.tolist() == ["sub-00", "sub-01", "sub-03", "sub-05"]
    assert {*cohort.attrs["refused"]} == {"sub-02", "sub-04"}
    assert "found 0 bytes" in cohort.attrs["refused"]["sub-04"]
    for file, was in content.items():
        file.write_bytes(was)
    mended = prepare_file.prepare(folder, tmp_path / "c.zarr", **OPTIONS)
    assert mended.subject.values.tolist()[4:] == ["sub-02", "sub-04"]
    assert mended.attrs["refused"] == {}


def test_nothing_usable_is_an_error_and_leaves_no_store(derivatives, tmp_path):
    rows = find_scans(derivatives).assign(bold=str(tmp_path / "nowhere.tsv"), t1="")
    with pytest.raises(
        InputError, match="a usable subject, found none among 6; the first: Expected"
    ):
        prepare_file.prepare(rows, tmp_path / "c.zarr", **OPTIONS)
    assert not (tmp_path / "c.zarr").exists()


def test_other_options_for_the_same_store_are_refused(derivatives, tmp_path):
    rows = find_scans(derivatives).iloc[1:3]
    prepare_file.prepare(rows, tmp_path / "c.zarr", **OPTIONS)
    with pytest.raises(InputError, match="'voxel_mm': 8.0}, found {'voxel_mm': 16.0}"):
        prepare_file.prepare(rows, tmp_path / "c.zarr", atlas=ATLAS, voxel_mm=8.0)


def test_a_second_writer_is_refused(derivatives, tmp_path):
    out = tmp_path / "c.zarr"
    with (
        store_file.only_writer(out),
        pytest.raises(InputError, match="only writer of .* found another"),
    ):
        prepare_file.prepare(derivatives, out, **OPTIONS)


def test_the_lock_of_a_dead_process_is_free(tmp_path):
    hold = "import sys, time, pathlib\nfrom bhx.data import store as store_file\n"
    hold += (
        "with store_file.only_writer(pathlib.Path(sys.argv[1])):\n    print('held', flush=True)\n"
    )
    hold += "    time.sleep(60)"
    out = tmp_path / "c.zarr"
    with subprocess.Popen([sys.executable, "-c", hold, str(out)], stdout=subprocess.PIPE) as holder:
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(InputError, match="only writer"), store_file.only_writer(out):
            pass
        holder.kill()
    with store_file.only_writer(out):
        assert out.parent.is_dir()


def test_a_cluster_gives_what_threads_give(derivatives, tmp_path):
    from distributed import Client

    rows = find_scans(derivatives).iloc[1:4]
    with Client(
        n_workers=1, threads_per_worker=2, processes=False, dashboard_address=None
    ) as client:
        prepare_file.prepare(rows, tmp_path / "a.zarr", **OPTIONS, client=client)
        address = client.scheduler.address
        assert address.startswith("inproc")
    prepare_file.prepare(rows, tmp_path / "b.zarr", **OPTIONS)
    assert files_of(tmp_path / "a.zarr") == files_of(tmp_path / "b.zarr")


@pytest.mark.parametrize(
    "name", ["a/b", "../../a", "a b", "<script>alert(1)</script>", "ä", "x" * 300]
)
def test_any_subject_name_is_safe(name, derivatives, tmp_path):
    rows = find_scans(derivatives).iloc[1:2].assign(subject=name)
    cohort = prepare_file.prepare(rows, tmp_path / "here" / "c.zarr", **OPTIONS)
    assert cohort.subject.item() == name
    assert sorted(p.name for p in tmp_path.iterdir()) == ["here"]
    assert sorted(p.name for p in (tmp_path / "here").iterdir()) == [".c.zarr.lock", "c.zarr"]


# --- what is found in a folder ---


def touch(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("x")
    return folder


SPACE = "space-MNI152NLin6Asym"


def test_sessions_runs_and_lone_t1_are_rows(tmp_path):
    func, bold = "func/sub-1_ses-{}_task-rest_run-{}_", f"{SPACE}_desc-preproc_bold.nii.gz"
    touch(
        tmp_path,
        *(f"sub-1/ses-{s}/" + func.format(s, r) + bold for s, r in ("a1", "a2", "b1")),
        f"sub-1/ses-a/anat/sub-1_ses-a_{SPACE}_desc-preproc_T1w.nii.gz",
        f"sub-1/ses-a/anat/sub-1_ses-a_{SPACE}_desc-brain_mask.nii.gz",
        "sub-1/ses-a/" + func.format("a", 1) + "desc-confounds_timeseries.tsv",
        f"sub-2/anat/sub-2_{SPACE}_desc-preproc_T1w.nii.gz",
        "sub-2/anat/sub-2_desc-preproc_T1w.nii.gz",
    )
    rows = find_scans(tmp_path).set_index("subject")
    assert rows.index.tolist() == [
        "sub-1/ses-a/run-1",
        "sub-1/ses-a/run-2",
        "sub-1/ses-b/run-1",
        "sub-2",
    ]
    assert rows.participant.tolist() == ["sub-1"] * 3 + ["sub-2"]
    assert (rows.t1 != "").all()
    assert [Path(t1).name[:12] for t1 in rows.t1[:3]] == ["sub-1_ses-a_"] * 3
    assert (rows.t1_mask != "").tolist() == [True, True, True, False]
    assert (rows.confounds != "").tolist() == [True, False, False, False]
    assert rows.bold["sub-2"] == ""


def test_the_best_form_of_a_run_is_taken_once(tmp_path):
    stem = "sub-1/func/sub-1_task-rest_"
    forms = [
        "space-MNI152NLin6Asym_desc-preproc_bold.nii.gz",
        "hemi-L_space-fsaverage5_bold.func.gii",
        "hemi-R_space-fsaverage5_bold.func.gii",
        "space-fsLR_den-91k_bold.dtseries.nii",
    ]
    touch(tmp_path, *(stem + form for form in forms), stem + "desc-brain_mask.nii.gz")
    assert [Path(b).name for b in find_scans(tmp_path).bold] == ["sub-1_task-rest_" + forms[3]]


def test_fsl_space_is_preferred_for_t1(tmp_path):
    spaces = ("MNI152NLin2009cAsym", "MNI152NLin6Asym")
    touch(tmp_path, *(f"sub-1/anat/sub-1_space-{s}_desc-preproc_T1w.nii.gz" for s in spaces))
    assert "NLin6Asym" in find_scans(tmp_path).t1.item()


def test_a_loop_of_links_ends(tmp_path):
    touch(tmp_path / "study", f"sub-1/anat/sub-1_{SPACE}_desc-preproc_T1w.nii.gz")
    (tmp_path / "study" / "sub-1" / "loop").symlink_to(tmp_path / "study")
    assert len(find_scans(tmp_path / "study")) == 1


def test_other_tasks_are_named(tmp_path):
    touch(tmp_path, f"sub-1/func/sub-1_task-nback_{SPACE}_desc-preproc_bold.nii.gz")
    with pytest.raises(InputError, match="BOLD of task-rest .* found tasks: nback"):
        find_scans(tmp_path)
    assert len(find_scans(tmp_path, task="nback")) == 1


def test_phenotypes_join_by_participant():
    scans = pd.DataFrame({"subject": ["sub-1/a", "sub-1/b", "sub-2"]})
    scans["participant"] = ["sub-1", "sub-1", "sub-2"]
    people = pd.DataFrame({"participant_id": ["1"], "age": [30.0], "group": ["x"]})
    joined = join_phenotypes(scans, people)
    assert joined.age.tolist()[:2] == [30, 30]
    assert joined.age.isna().tolist() == [False, False, True]


def test_scans_of_other_parcels_do_not_mix(tmp_path):
    for name, n in (("a", 7), ("b", 8)):
        table = pd.DataFrame(parcel_series(60)[:n].T, columns=[f"p{i}" for i in range(n)])
        table.to_csv(tmp_path / f"{name}.tsv", sep="\t", index=False)
    rows = pd.DataFrame({"subject": ["a", "b"], "tr": 2.0})
    rows["bold"] = [str(tmp_path / f"{name}.tsv") for name in "ab"]
    with pytest.raises(
        InputError, match="the same labels on 'roi' in every scan, found 8 of b and 7 bef"
    ):
        prepare_file.prepare(rows, tmp_path / "both.zarr", atlas=None)
    prepare_file.prepare(rows[:1], tmp_path / "c.zarr", atlas=None)
    with pytest.raises(InputError, match="found others in the new subjects"):
        prepare_file.prepare(rows, tmp_path / "c.zarr", atlas=None)
    assert cohort_file.open_cohort(tmp_path / "c.zarr").sizes["subject"] == 1


def test_a_folder_named_like_an_entry_does_not_hide_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sample").mkdir()
    assert cohort_file.open_cohort("sample").attrs["source"] == "sample"


@pytest.mark.parametrize("scale", [600, 1e6, 1e-6])
def test_half_precision_keeps_the_t1_at_any_scale(scale, tmp_path):
    path = t1_image(tmp_path / "a.nii", 4, scale=scale)
    rows = pd.DataFrame({"subject": ["a"], "t1": [str(path)]})
    cohort = prepare_file.prepare(rows, tmp_path / "c.zarr", voxel_mm=4)
    t1, _ = read_t1(path, voxel_mm=4)
    np.testing.assert_allclose(cohort.t1[0] / cohort.t1[0].max(), t1 / t1.max(), atol=1e-3)
    assert (cohort.warnings.item() != "") == (scale != 600)


def test_labels_of_any_kind_survive(derivatives, tmp_path):
    rows = find_scans(derivatives).iloc[:2].copy()
    rows["visit"] = pd.to_datetime(["2020-01-01", "2021-05-05"])
    rows["total"] = np.array([1, 2], "int16")
    rows["smoker"] = [True, None]
    cohort = prepare_file.prepare(rows, tmp_path / "c.zarr", **OPTIONS)
    assert cohort.visit.values[1].startswith("2021-05-05")
    assert cohort.total.values.tolist() == [1, 2]
    assert cohort.smoker.values.tolist() == ["True", ""]


# --- a modality that is registered here, with files beside the scans ---


@pytest.fixture
def morphometry(monkeypatch):
    """Thickness and area of each parcel, read from a CSV."""

    class Morphometry(Modality):
        name, files = "morphometry", ("morphometry",)

    monkeypatch.setitem(MODALITIES, "morphometry", Morphometry())
    monkeypatch.setattr(files_file, "READERS", dict(files_file.READERS))
    monkeypatch.setattr(prepare_file, "READERS", files_file.READERS)

    @files_file.reader_of(MODALITIES["morphometry"])
    def read(row, options):
        table = pd.read_csv(row["morphometry"], index_col="parcel")
        table = table.loc[match_names(load_atlas(options["atlas"]).roi.values, options["atlas"])]
        values = xr.DataArray(table, dims=("roi", "measure"))
        thin = int((values.sel(measure="thickness") < 1).sum())
        return values, {"thin": thin}, [f"{thin} parcels below 1 mm"] if thin else []


def measured(folder, n=3):
    """A table of each participant's parcels in an order of its own."""
    rng, paths = np.random.default_rng(0), []
    for i in range(n):
        values = {"thickness": rng.uniform(1.5, 4, 100), "area": rng.uniform(100, 900, 100)}
        table = pd.DataFrame({"parcel": load_atlas(ATLAS).roi.values, **values})
        paths.append(folder / f"morphometry_{i}.csv")
        table.sample(frac=1, random_state=i).to_csv(paths[-1], index=False)
    return paths


def test_a_registered_modality_is_prepared_with_the_scans(morphometry, derivatives, tmp_path):
    paths, rows = measured(tmp_path), find_scans(derivatives).iloc[:4]
    rows = rows.assign(morphometry=[*map(str, paths), None])
    alone = {"subject": "sub-x", "morphometry": str(paths[0])}
    rows = pd.concat([rows, pd.DataFrame([alone])])
    cohort = prepare_file.prepare(rows, tmp_path / "c.zarr", **OPTIONS)
    assert cohort.morphometry.dims == ("subject", "roi", "measure")
    assert cohort.measure.values.tolist() == ["thickness", "area"]
    assert cohort.has_morphometry.values.tolist() == [True, True, True, False, True]
    assert cohort.has_bold.values.tolist() == [True] * 4 + [False]
    for i, path in enumerate(paths):
        table = pd.read_csv(path, index_col="parcel").loc[cohort.roi.values]
        np.testing.assert_allclose(cohort.morphometry[i], table, rtol=1e-6)
    assert np.isnan(cohort.morphometry[3]).all()
    np.testing.assert_array_equal(cohort.morphometry[4], cohort.morphometry[0])
    assert np.isnan(cohort.bold[4]).all()

    grown = prepare_file.prepare(rows.iloc[:2], tmp_path / "d.zarr", **OPTIONS)
    grown = prepare_file.prepare(rows, tmp_path / "d.zarr", **OPTIONS)
    xr.testing.assert_identical(grown.compute(), cohort.compute())
    saved = cohort_file.open_cohort(store_file.save_cohort(grown, tmp_path / "e.zarr"))
    xr.testing.assert_equal(saved.drop_attrs().compute(), cohort.drop_attrs().compute())


def test_other_measures_do_not_mix(morphometry, tmp_path):
    paths = measured(tmp_path, 2)
    pd.read_csv(paths[1]).rename(columns={"area": "volume"}).to_csv(paths[1], index=False)
    rows = pd.DataFrame({"subject": ["a", "b"], "morphometry": [str(p) for p in paths]})
    with pytest.raises(InputError, match="the same labels on 'measure' in every scan"):
        prepare_file.prepare(rows, tmp_path / "both.zarr", **OPTIONS)
    prepare_file.prepare(rows[:1], tmp_path / "c.zarr", **OPTIONS)
    with pytest.raises(InputError, match="on 'measure', found others in the new subjects"):
        prepare_file.prepare(rows, tmp_path / "c.zarr", **OPTIONS)
