"""The catalog: every entry valid, every hostile one refused, every cohort found or explained."""

import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
from sklearn.utils import Bunch
from small_cohorts import brains_of
from small_files import ATLAS, biobank, dtseries, label_image, parcel_series, t1_image, volume

from bhx.data import catalog as catalog_file
from bhx.data import cohort as cohort_file
from bhx.data import derivatives as derivatives_file
from bhx.data import prepare as prepare_file
from bhx.data.atlas import load_atlas
from bhx.errors import InputError

README = Path(__file__).parents[1] / "data_catalog" / "README.md"
WANTED = {"synthetic", "sample", "development-fmri", "abide1", "abide2", "adhd200", "hcp-aging"}
WANTED |= {"hcp-ya", "uk-biobank", "abcd", "ppmi", "adni", "local-cohort", "derivatives"}
WANTED |= {"stages", "local-tables"}


@pytest.fixture
def home(tmp_path, monkeypatch):
    """Data and cache folders of one test."""
    monkeypatch.setenv("BHX_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("BHX_CACHE", str(tmp_path / "cache"))
    return tmp_path


def test_every_entry_is_valid_and_in_the_readme():
    table = catalog_file.catalog_table()
    assert set(table.name) == WANTED
    readme = README.read_text(encoding="utf8")
    for row in table.itertuples(index=False):
        assert f"| {' | '.join(row)} |" in readme


def test_entries_say_how_to_be_had():
    for name in WANTED:
        entry = catalog_file.load_entry(name)
        assert entry.citation
        assert entry.licence
        assert entry.steps or entry.layout in ("synthetic", "sample", "nilearn")
        assert {*entry.prepare} <= {"atlas", "voxel_mm", "denoising", "order"}


@pytest.mark.parametrize("name", ["hcp-aging", "uk-biobank", "abcd", "adni", "derivatives"])
def test_cohorts_to_be_downloaded_say_how(name, home):
    steps = catalog_file.load_entry(name).steps
    with pytest.raises(InputError, match="found no such folder") as caught:
        cohort_file.open_cohort(name)
    assert str(home / "data" / name) in str(caught.value)
    assert all(step.rstrip(".") in str(caught.value) for step in steps)


def entry(folder, **changes):
    """A local entry in a folder of its own."""
    content = yaml.safe_load((catalog_file.shipped_folder() / "local-cohort.yaml").read_text())
    name = changes.get("name", "mine")
    (folder / f"{name}.yaml").write_text(yaml.safe_dump({**content, "name": name, **changes}))
    return folder


def test_own_entries_by_argument_and_environment(tmp_path, monkeypatch):
    entry(tmp_path, title="Our clinic")
    assert catalog_file.load_entry("mine", tmp_path).title == "Our clinic"
    with pytest.raises(InputError, match="found 'mine'. The catalog has"):
        catalog_file.load_entry("mine")
    monkeypatch.setenv("BHX_CATALOG", str(tmp_path))
    assert catalog_file.load_entry("mine").title == "Our clinic"
    assert "mine" in set(catalog_file.catalog_table().name)


BAD_ENTRIES = {
    "path outside": ({"path": "../../etc"}, "path: .*'../../etc' leads out of the data folder"),
    "absolute path": ({"path": "/etc"}, "'/etc' leads out"),
    "backslashes": ({"path": "..\\x"}, "leads out"),
    "pattern outside": (
        {"files": {"bold": "../{participant}/a.tsv"}},
        "files.bold.0: .* leads out",
    ),
    "pattern without participant": ({"files": {"bold": "a.tsv"}}, "files.bold.0: .*participant"),
    "file of no modality": (
        {"files": {"eeg": "{participant}/a.edf"}},
        "a column of files to be bold.*'eeg'",
    ),
    "unknown field": ({"color": "red"}, "color: Extra inputs are not permitted"),
    "unknown access": ({"access": "stolen"}, "access: Input should be 'open'"),
    "unknown layout": ({"layout": "zip"}, "layout: Input should be"),
    "text as TR": ({"sites": {"a": "fast"}}, "sites.a: Input should be a valid number"),
    "no licence": ({"licence": None}, "licence: Input should be a valid string"),
    "name with a slash": (
        {"title": "x", "modalities": ["eeg"]},
        "modalities.0: .* to be bold, .*found 'eeg'",
    ),
    "other function": (
        {
            "fetch": {"function": "fetch_haxby", "id": "x", "files": {"bold": "func"}},
            "layout": "nilearn",
        },
        "fetch.function: Input should be",
    ),
    "nothing to fetch": ({"layout": "nilearn"}, "layout 'nilearn' needs 'fetch'"),
    "no steps": ({"steps": []}, "needs 'path' and 'steps'"),
}


@pytest.mark.parametrize("case", BAD_ENTRIES)
def test_bad_entries_are_refused(case, tmp_path):
    changes, message = BAD_ENTRIES[case]
    with pytest.raises(InputError, match=message):
        catalog_file.load_entry("mine", entry(tmp_path, **changes))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("!!python/object/apply:os.system ['touch hacked']", "plain YAML .* without tags"),
        ("name: [", "plain YAML"),
        ("- a list", "valid catalog entry"),
        ("", "valid catalog entry"),
        ("name: other", "valid catalog entry"),
    ],
)
def test_bad_yaml_is_refused_and_never_run(text, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(InputError, match=message):
        catalog_file.load_entry("mine", tmp_path)
    assert not (tmp_path / "hacked").exists()


def test_an_entry_must_be_named_as_its_file(tmp_path):
    entry(tmp_path, name="mine")
    (tmp_path / "mine.yaml").rename(tmp_path / "yours.yaml")
    with pytest.raises(InputError, match="the entry 'yours' .* found the name 'mine'"):
        catalog_file.load_entry("yours", tmp_path)


def test_a_missing_folder_of_entries_is_said(tmp_path):
    with pytest.raises(InputError, match="a folder of catalog entries, found none"):
        catalog_file.catalog_files(tmp_path / "nowhere")


# --- cohorts that are fetched: nilearn's functions are replaced, no connection is opened ---


def fake_fetch(folder, series, phenotypic, confounds=None):
    """What a nilearn fetcher would return, with small volumes on disk."""
    folder.mkdir(parents=True)
    labels = label_image(folder / "labels.nii.gz")
    paths = [volume(folder / f"{i}_bold.nii.gz", s, labels) for i, s in enumerate(series)]
    tables = [folder / f"{i}_confounds.tsv" for i in range(len(series))] if confounds else None
    for table in tables or []:
        pd.DataFrame(confounds).to_csv(table, sep="\t", index=False)
    return labels, lambda **_: Bunch(
        func=[*map(str, paths)],
        func_preproc=np.array([*map(str, paths)]),
        confounds=[*map(str, tables)] if tables else None,
        phenotypic=pd.DataFrame(phenotypic),
    )


def small(entry_name, tmp_path, **prepare):
    """The shipped entry, on Schaefer-100 and with little T1."""
    content = yaml.safe_load((catalog_file.shipped_folder() / f"{entry_name}.yaml").read_text())
    content["prepare"] = {**content.get("prepare", {}), "atlas": ATLAS, "voxel_mm": 16, **prepare}
    folder = tmp_path / "entries"
    folder.mkdir()
    (folder / f"{entry_name}.yaml").write_text(yaml.safe_dump(content))
    return folder


ABIDE = {
    "SUB_ID": [51, 52],
    "SITE_ID": ["PITT", "NYU"],
    "DX_GROUP": [1, 2],
    "AGE_AT_SCAN": [12.5, -9999],
    "SEX": [1, 2],
    "func_mean_fd": [0.1, 0.7],
}


def abide_folder(folder, series, people=ABIDE):
    """Parcel series as ABIDE publishes them, and its table of people."""
    (folder / "cpac").mkdir(parents=True)
    for one, site, values in zip(people["SUB_ID"], ("Pitt", "NYU"), series, strict=True):
        path = folder / "cpac" / f"{site}_{one:07d}_rois_cc200.1D"
        header = "\t".join(f"#{i + 1}" for i in range(len(values)))
        np.savetxt(path, values.T, delimiter="\t", header=header, comments="")
    pd.DataFrame(people).to_csv(folder / "Phenotypic_V1.csv", index=False)
    return folder


def test_abide_is_read_from_the_published_series(home):
    """By its name or a path alone; TR and labels of each site come from entry and table."""
    series = [parcel_series(60, seed) for seed in range(2)]
    folder = abide_folder(home / "files", series)
    named = cohort_file.open_cohort("abide1", path=folder)
    cohort = cohort_file.open_cohort(folder)
    assert named.equals(cohort)
    assert cohort.attrs["source"] == "abide1"
    assert cohort.subject.values.tolist() == ["0000051", "0000052"]
    assert cohort.site.values.tolist() == ["PITT", "NYU"]
    assert cohort.tr.values.tolist() == [1.5, 2.0]
    assert cohort.diagnosis.values.tolist() == ["autism", "control"]
    np.testing.assert_array_equal(cohort.age, [12.5, np.nan])
    np.testing.assert_allclose(cohort.bold, series, rtol=1e-6)
    placed = cohort_file.open_cohort(folder, atlas=ATLAS, order="7networks")
    assert placed.roi.values.tolist() == load_atlas(ATLAS).roi.values.tolist()
    np.testing.assert_array_equal(placed.bold, cohort.bold)


def test_a_site_without_a_tr_is_named(home):
    people = {**ABIDE, "SITE_ID": ["MARS", "NYU"]}
    folder = abide_folder(home / "files", [parcel_series(60)] * 2, people)
    with pytest.raises(
        InputError, match="repetition time of each site of abide1, found none of 'MARS'"
    ):
        cohort_file.open_cohort("abide1", path=folder)


def test_files_of_two_pipelines_are_told_apart(home):
    folder = abide_folder(home / "files", [parcel_series(60)] * 2)
    shutil.copytree(folder / "cpac", folder / "niak")
    with pytest.raises(InputError, match="Expected one file .* of 000005., found .*cpac.*niak"):
        cohort_file.open_cohort("abide1", path=folder)


def test_stages_is_read_in_sessions(home):
    """Parcels in rows, subcortical ones behind them; outcomes a line a session."""
    folder = home / "files"
    folder.mkdir()
    rng = np.random.default_rng(0)
    smooth = [parcel_series(89, i, "schaefer400") for i in range(2)]
    smooth = [np.stack([s[:, i : i + 80] for i in range(9)]).mean(0) for s in smooth]
    for i, values in enumerate(smooth):
        deep = rng.standard_normal((19, 80))
        np.savetxt(folder / f"ts_sub-001_ses-{i + 1}.txt", np.concatenate([values, deep]))
    lines = {"participant_id": ["001", "001"], "session": [2, 1], "panss": [20.0, 10.0]}
    pd.DataFrame(lines).to_csv(folder / "outcomes.csv", index=False)
    cohort = cohort_file.open_cohort(folder)
    assert cohort.attrs["source"] == "stages"
    assert cohort.subject.values.tolist() == ["sub-001/ses-1", "sub-001/ses-2"]
    assert cohort.participant.values.tolist() == ["sub-001"] * 2
    assert cohort.panss.values.tolist() == [10.0, 20.0]
    assert cohort.tr.values.tolist() == [2.0, 2.0]
    assert all("left out the last 19 of 419 parcels" in w for w in cohort.warnings.values)
    np.testing.assert_allclose(cohort.bold, smooth, rtol=1e-5)
    pd.DataFrame({**lines, "session": [1, 1]}).to_csv(folder / "outcomes.csv", index=False)
    with pytest.raises(InputError, match="one line a scan in outcomes.csv, found several of 001"):
        cohort_file.open_cohort("stages", path=folder)
    pd.DataFrame(lines).drop(columns="session").to_csv(folder / "outcomes.csv", index=False)
    with pytest.raises(InputError, match="the columns session in outcomes.csv"):
        cohort_file.open_cohort("stages", path=folder)


def test_abide_is_fetched_as_published(home, monkeypatch):
    series = [parcel_series(60, seed) for seed in range(2)]

    def fetch(data_dir, derivatives, **_):
        assert derivatives == ["rois_cc200"]
        abide_folder(data_dir / "ABIDE_pcp", series)

    monkeypatch.setattr("nilearn.datasets.fetch_abide_pcp", fetch)
    np.testing.assert_allclose(cohort_file.open_cohort("abide1").bold, series, rtol=1e-6)


def test_volumes_of_abide_are_read_prepared_and_decoded(home, monkeypatch):
    series = [parcel_series(60, seed) for seed in range(2)]
    folder = home / "abide"
    folder.mkdir()
    labels = label_image(home / "labels.nii.gz")
    for name, one, tr in zip(("Pitt_0000051", "NYU_0000052"), series, (1.5, 2.0), strict=True):
        volume(folder / f"{name}_func_preproc.nii.gz", one, labels, tr=tr)
    pd.DataFrame(ABIDE).to_csv(folder / "Phenotypic.csv", index=False)
    monkeypatch.setattr("bhx.data.prepare.fetch_labels", lambda atlas: labels)
    cohort = cohort_file.open_cohort("abide1", path=folder, catalog=small("abide1", home))
    assert cohort.diagnosis.values.tolist() == ["autism", "control"]
    assert cohort.sex.values.tolist() == ["M", "F"]
    assert cohort.site.values.tolist() == ["PITT", "NYU"]
    assert cohort.mean_fd.values.tolist() == [0.1, 0.7]
    assert "displacement 0.70 mm" in cohort.warnings.values[1]
    assert cohort.attrs["licence"].startswith("CC BY-NC-SA")
    np.testing.assert_allclose(cohort.bold, series, rtol=1e-5)


def test_development_fmri_is_denoised_with_its_own_columns(home, monkeypatch):
    noise = np.random.default_rng(0).standard_normal(60)
    series = [parcel_series(60) + 40 * noise]
    people = {"participant_id": ["sub-pixar123"], "Age": [27.1], "Gender": ["F"]}
    people["Child_Adult"] = ["adult"]
    labels, fetch = fake_fetch(home / "dev", series, people, {"trans_x": noise})
    monkeypatch.setattr("nilearn.datasets.fetch_development_fmri", fetch)
    monkeypatch.setattr("bhx.data.prepare.fetch_labels", lambda atlas: labels)
    cohort = cohort_file.open_cohort("development-fmri", catalog=small("development-fmri", home))
    r = [np.corrcoef(parcel, noise)[0, 1] for parcel in cohort.bold.values[0]]
    assert np.abs(r).max() < 0.01
    assert cohort.group.item() == "adult"
    assert cohort.age.item() == 27.1


def test_a_failed_download_is_said(home, monkeypatch):
    def fetch(**_):
        raise ConnectionError("no route")

    monkeypatch.setattr("nilearn.datasets.fetch_adhd", fetch)
    with pytest.raises(InputError, match="found ConnectionError: no route. Try again with"):
        cohort_file.open_cohort("adhd200")


# --- cohorts that lie in the data folder ---


def test_files_are_found_by_pattern(home):
    folder = home / "data" / "hcp-ya"
    bold = "MNINonLinear/Results/rfMRI_REST1_LR"
    name = "rfMRI_REST1_LR_Atlas_MSMAll_hp2000_clean.dtseries.nii"
    for i in (1, 2):
        (folder / f"10030{i}" / bold).mkdir(parents=True)
        dtseries(folder / f"10030{i}" / bold / name, parcel_series(60, i), tr=0.72)
    t1_image(folder / "100301" / "MNINonLinear" / "T1w_restore_brain.nii.gz", 2)
    people = {"participant_id": ["100301", "100302"], "age": [28, 31], "sex": ["F", "M"]}
    pd.DataFrame(people).to_csv(folder / "participants.tsv", sep="\t", index=False)
    cohort = cohort_file.open_cohort("hcp-ya", catalog=small("hcp-ya", home))
    assert cohort.subject.values.tolist() == ["100301", "100302"]
    assert cohort.has_t1.values.tolist() == [True, False]
    np.testing.assert_allclose(cohort.tr, 0.72)
    assert cohort.sex.values.tolist() == ["F", "M"]
    np.testing.assert_allclose(cohort.bold[1], parcel_series(60, 2), rtol=1e-5)


def test_biobank_tables_say_their_order(home):
    folder = home / "data" / "uk-biobank" / "1000001" / "i2"
    folder.mkdir(parents=True)
    seventeen = load_atlas("schaefer400", order="17networks")
    there = load_atlas("schaefer400").indexes["roi"].get_indexer(seventeen.name7)
    series = parcel_series(60, atlas="schaefer400")
    numbers = [f"ROI_{i + 1}" for i in range(400)]
    biobank(folder / "fMRI.Schaefer17n400p.csv.gz", series[there], numbers)
    cohort = cohort_file.open_cohort("uk-biobank")
    np.testing.assert_allclose(cohort.bold[0], series, rtol=1e-5)


def test_derivatives_in_the_data_folder_are_prepared_into_the_cache(home):
    (home / "data").mkdir()
    cohort = brains_of(2)
    derivatives_file.write_derivatives(cohort, home / "data" / "mine", surface=False)
    entries = entry(home / "data", path="mine", prepare={"atlas": ATLAS})
    again = cohort_file.open_cohort("mine", catalog=entries)
    np.testing.assert_allclose(again.bold, cohort.bold, rtol=1e-4, atol=1e-4)
    assert len(list((home / "cache").glob("mine-*.zarr"))) == 1


def test_a_folder_is_prepared_into_the_cache(home):
    folder = derivatives_file.write_derivatives(brains_of(2), home / "study", surface=False)
    with pytest.raises(InputError, match="the 400 parcels of schaefer400"):
        cohort_file.open_cohort(folder)


def test_an_entry_is_prepared_by_its_name(home, monkeypatch):
    (home / "data").mkdir()
    derivatives_file.write_derivatives(brains_of(2), home / "data" / "mine", surface=False)
    folder = entry(home / "data", path="mine", prepare={"atlas": ATLAS, "voxel_mm": 16})
    monkeypatch.setenv("BHX_CATALOG", str(folder))
    cohort = prepare_file.prepare("mine", home / "here.zarr")
    assert cohort.attrs["source"] == "mine"
    assert cohort.attrs["atlas"] == ATLAS
