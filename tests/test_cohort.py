"""Laws of a cohort: what is saved comes back lazily and unchanged; what does not fit is said."""

import numpy as np
import pytest
import xarray as xr
import zarr
from small_cohorts import noise_cohort

from bhx.data import cohort as cohort_file
from bhx.data import splits as splits_file
from bhx.data import store as store_file
from bhx.errors import InputError
from bhx.modalities.t1 import coarsen_t1, t1_grid


def is_lazy(cohort):
    return all(v.chunks is not None for v in cohort.data_vars.values())


def test_saved_cohort_comes_back_lazily_and_unchanged(tmp_path):
    cohort = noise_cohort()
    path = store_file.save_cohort(cohort, tmp_path / "c.zarr")
    again = cohort_file.open_cohort(path)
    assert is_lazy(again)
    assert again.bold.chunks[0] == (1,) * 6
    xr.testing.assert_equal(again.drop_attrs(), cohort.drop_attrs())
    for name, coord in cohort.coords.items():
        assert again[name].dtype == coord.dtype
    assert again.attrs == cohort.attrs  # how far it was written is the store's own affair


def test_lazy_and_eager_cohorts_give_the_same_store(tmp_path):
    cohort = noise_cohort()
    eager = cohort_file.open_cohort(store_file.save_cohort(cohort, tmp_path / "a.zarr"))
    lazy = cohort_file.open_cohort(
        store_file.save_cohort(cohort.chunk(subject=1), tmp_path / "b.zarr")
    )
    xr.testing.assert_identical(eager.compute(), lazy.compute())


def test_xarray_alone_opens_the_store(tmp_path):
    cohort = noise_cohort()
    path = store_file.save_cohort(cohort, tmp_path / "c.zarr")
    again = xr.open_zarr(path, consolidated=False)
    np.testing.assert_array_equal(again.bold, cohort.bold)
    assert again.subject.values.tolist() == cohort.subject.values.tolist()


def test_text_is_of_variable_length(tmp_path):
    path = store_file.save_cohort(noise_cohort(), tmp_path / "c.zarr")
    group = zarr.open_group(path, mode="r")
    assert {str(group[name].metadata.data_type) for name in ("subject", "site", "roi")} == {
        str(zarr.dtype.VariableLengthUTF8())
    }


def test_chunks_of_nan_are_not_written(tmp_path, monkeypatch):
    monkeypatch.setattr(store_file, "SHARD_BYTES", 1)  # one subject a file
    path = store_file.save_cohort(noise_cohort(), tmp_path / "c.zarr")
    group = zarr.open_group(path, mode="r")
    assert group["bold"].nchunks_initialized == group["t1"].nchunks_initialized == 5


def test_t1_may_be_stored_in_half_precision(tmp_path):
    cohort = noise_cohort()
    again = cohort_file.open_cohort(
        store_file.save_cohort(cohort, tmp_path / "c.zarr", half=["t1"])
    )
    assert again.t1.dtype == "float32"
    np.testing.assert_allclose(again.t1, cohort.t1, rtol=1e-3)


def test_half_written_store_is_refused_with_its_count(tmp_path, monkeypatch):
    class PowerCut(Exception):
        pass

    def cut(block, block_info):
        if block_info[0]["chunk-location"][0] == 4:
            raise PowerCut
        return block

    monkeypatch.setattr(store_file, "SHARD_BYTES", 1)
    cohort = noise_cohort().chunk(subject=1)
    bold = cohort.bold.copy(data=cohort.bold.data.map_blocks(cut, dtype="float32"))
    with pytest.raises(PowerCut):
        store_file.save_cohort(cohort.assign(bold=bold), tmp_path / "c.zarr")
    with pytest.raises(InputError, match=r"finished cohort, .*still being written"):
        cohort_file.open_cohort(tmp_path / "c.zarr")
    with pytest.raises(InputError, match="Expected a new path"):  # that store is of other subjects
        store_file.save_cohort(cohort.isel(subject=[5, 4, 3, 2, 1, 0]), tmp_path / "c.zarr")
    continued = store_file.save_cohort(cohort, tmp_path / "c.zarr")
    xr.testing.assert_equal(
        cohort_file.open_cohort(continued).drop_attrs(), noise_cohort().drop_attrs()
    )


def test_selections_stay_lazy(tmp_path):
    cohort = cohort_file.open_cohort(store_file.save_cohort(noise_cohort(), tmp_path / "c.zarr"))
    north = cohort.sel(subject=cohort.site == "north")
    assert is_lazy(north)
    assert north.sizes["subject"] == 3
    assert is_lazy(xr.concat([north, cohort.sel(subject=cohort.site != "north")], "subject"))
    assert all(is_lazy(part) for _, part in cohort.groupby("site"))


def test_scan_is_trimmed_and_in_seconds():
    cohort = noise_cohort()
    bold = cohort_file.scan(cohort, "sub-003")
    assert bold.dims == ("roi", "time")
    assert bold.sizes["time"] == cohort.n_volumes[3]
    assert np.isfinite(bold).all()
    np.testing.assert_allclose(bold.time, 0.72 * np.arange(bold.sizes["time"]))
    assert bold.time.attrs["units"] == "s"


@pytest.mark.parametrize(
    ("subject", "message"),
    [
        ("sub-999", "a subject of this cohort, found 'sub-999'"),
        ("sub-001", "found none for 'sub-001'"),
    ],
)
def test_scan_says_what_is_missing(subject, message):
    with pytest.raises(InputError, match=message):
        cohort_file.scan(noise_cohort(), subject)


def test_coarser_t1_is_a_block_mean_on_the_coarser_grid():
    cohort = noise_cohort(voxel_mm=16)
    coarse = coarsen_t1(cohort, 32)
    for axis, values in t1_grid(32).items():
        np.testing.assert_allclose(coarse[axis], values)
    blocks = cohort.t1.values.reshape(6, 5, 2, 6, 2, 5, 2).mean((2, 4, 6))
    np.testing.assert_allclose(coarse.t1, blocks, rtol=1e-6)
    with pytest.raises(InputError, match=r"multiple of 16 mm .* found 24 mm"):
        coarsen_t1(cohort, 24)


def _with(**coords):
    return lambda c: c.assign_coords({k: ("subject", v(c)) for k, v in coords.items()})


BAD_COHORTS = {
    "empty": (lambda c: c.isel(subject=[]), "at least one subject, found none"),
    "duplicate ids": (
        lambda c: c.isel(subject=[0, 1, 1]),
        "unique subject ids, found sub-001 more than once",
    ),
    "TR missing": (_with(tr=lambda c: c.tr.values * np.nan), "repetition time .* found nan"),
    "TR zero": (_with(tr=lambda c: c.tr.values * 0), "repetition time .* found 0"),
    "TR in ms": (_with(tr=lambda c: c.tr.values * 1000), "found 720.*milliseconds"),
    "parcel twice": (lambda c: c.isel(roi=[0, 1, 1]), "unique parcel names"),
    "no data": (lambda c: c.drop_vars(["bold", "t1"]), "a cohort with 'bold' or 't1'"),
    "transposed": (lambda c: c.transpose("roi", ...), "'bold' with dims"),
    "no site": (lambda c: c.drop_vars("site"), "the coordinate 'site' on subject"),
    "an array": (lambda c: c.bold, "xarray.Dataset, found DataArray"),
}


@pytest.mark.parametrize("case", BAD_COHORTS)
def test_bad_cohorts_are_refused_before_anything_is_written(case, tmp_path):
    spoil, message = BAD_COHORTS[case]
    with pytest.raises(InputError, match=message):
        store_file.save_cohort(spoil(noise_cohort()), tmp_path / "c.zarr")
    assert not (tmp_path / "c.zarr").exists()


@pytest.mark.parametrize(
    ("name", "message"),
    [("nowhere", "found 'nowhere'. The catalog has"), ("no/such.zarr", "found nothing")],
)
def test_unknown_cohorts_are_named(name, message):
    with pytest.raises(InputError, match=message):
        cohort_file.open_cohort(name)


def test_a_store_is_not_written_over(tmp_path):
    path = store_file.save_cohort(noise_cohort(), tmp_path / "c.zarr")
    with pytest.raises(InputError, match="Expected a new path"):
        store_file.save_cohort(noise_cohort(), path)


def two_scans_each(n=40):
    """A cohort of n participants at two sites, two scans each."""
    cohort = noise_cohort(2 * n)
    people = np.array([f"p{i:02d}" for i in range(n)])
    return cohort.assign_coords(
        participant=("subject", np.repeat(people, 2)),
        site=("subject", np.repeat(np.array(["a", "b"])[(np.arange(n) >= 10).astype(int)], 2)),
        sex=("subject", np.repeat(np.array(["F", "M"])[np.arange(n) % 2], 2)),
    )


def test_a_participant_is_never_in_two_parts():
    cohort = two_scans_each()
    parts = splits_file.split(cohort, repeats=5, stratify=["site", "sex"])
    assert parts.dims == ("repeat", "subject")
    for one in parts:
        assert one.groupby(cohort.participant).map(lambda p: p.isel(subject=0) == p).all()


def test_strata_get_their_shares():
    cohort = two_scans_each()
    for one in splits_file.split(cohort, repeats=3, stratify=["site", "sex"]):
        for _, stratum in one.groupby(cohort.site.str.cat(cohort.sex)):
            n = stratum.sizes["subject"] / 2
            for part, share in {"train": 0.6, "validation": 0.2, "test": 0.2}.items():
                assert abs((stratum == part).sum() / 2 - share * n) <= 1


def test_leave_site_out_tests_each_site_once():
    cohort = two_scans_each()
    parts = splits_file.split(cohort, leave_out="site")
    assert parts.repeat.values.tolist() == ["a", "b"]
    for one in parts:
        assert set(cohort.site.values[one == "test"]) == {one.repeat.item()}
        assert one.repeat.item() not in cohort.site.values[one == "train"]


@pytest.mark.parametrize("none", ["", "n/a", "nan"])
def test_nobody_without_a_site_is_a_site_of_their_own(none):
    cohort = two_scans_each()
    site = cohort.site.values.astype("U3")
    site[2:4] = none
    unnamed = cohort.assign_coords(site=("subject", site))
    who = ".*".join(cohort.subject.values[2:4])
    with pytest.raises(
        InputError, match=f"Expected a site for each subject, found none for 2: {who}"
    ):
        splits_file.split(unnamed, leave_out="site")


def test_splits_repeat_with_their_seed_and_differ_without():
    cohort = two_scans_each()
    assert splits_file.split(cohort, seed=3).identical(splits_file.split(cohort, seed=3))
    assert not splits_file.split(cohort, seed=3).equals(splits_file.split(cohort, seed=4))


def test_a_split_names_its_subjects_and_options():
    cohort = two_scans_each()
    parts = splits_file.split(cohort, stratify="site", seed=1)
    assert parts.attrs["seed"] == 1
    assert parts.attrs["stratify"] == ["site"]
    other = splits_file.split(cohort.isel(subject=slice(1, None)), stratify="site", seed=1)
    assert parts.attrs["cohort_sha256"] != other.attrs["cohort_sha256"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stratify": "hospital"}, "coordinate on subject to split by, found 'hospital'"),
        ({"shares": {"train": 0.8, "test": 0.3}}, "shares that sum to 1, found"),
        ({"leave_out": "age"}, "one age for each participant, found several for p00"),
    ],
)
def test_bad_splits_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        splits_file.split(two_scans_each(), **options)


def test_the_sample_has_one_scan_and_one_t1():
    sample = coarsen_t1(cohort_file.open_cohort("sample"), 4)
    assert sample.has_bold.values.tolist() == [True, False]
    assert sample.has_t1.values.tolist() == [False, True]
    assert cohort_file.scan(sample, "sub-010188").time[-1] == pytest.approx(651 * 1.4)
    t1 = sample.t1.sel(subject="mni152").values
    brain_ml = (t1 > 0).sum() * 0.064
    assert 1500 < brain_ml < 2300
    assert (t1[[0, -1]] == 0).all()
    assert (t1[:, [0, -1]] == 0).all()


def test_opening_reads_no_data(tmp_path):
    path = store_file.save_cohort(noise_cohort(), tmp_path / "c.zarr")
    for name in ("bold", "t1"):
        for file in (path / name / "c").rglob("*"):
            if file.is_file():
                file.write_bytes(b"not read")
    cohort = cohort_file.open_cohort(path)
    chosen = cohort.sel(subject=cohort.age > 30).groupby("site")
    assert cohort.subject.values[0] == "sub-000"
    assert len(chosen) == 2
