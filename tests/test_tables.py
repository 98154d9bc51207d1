"""Tables of parcels as people have them: read exactly, or refused with the option to give."""

import tracemalloc

import h5py
import numpy as np
import pandas as pd
import pytest
import scipy.io
from small_files import ATLAS, TR, parcel_series

from bhx.data import tables as tables_file
from bhx.data.atlas import load_atlas
from bhx.data.bold import read_bold
from bhx.data.quality import check_bold_quality, distance_effect, homotopy
from bhx.errors import InputError

SEVEN = {"atlas": ATLAS, "order": "7networks", "tr": TR}
NAMES = load_atlas(ATLAS).roi.values.tolist()


def smooth_series(n=60, seed=0):
    """Mirror-symmetric series that are smooth in time, as BOLD is."""
    series = parcel_series(n + 8, seed) - 1000
    return np.stack([series[:, i : i + n] for i in range(8)]).mean(0)


SERIES = smooth_series()


def read(path, values, **options):
    """A table without names, written as its ending says, and read."""
    if path.suffix == ".npy":
        np.save(path, values)
    else:
        np.savetxt(path, values, fmt="%.17g", delimiter="," if path.suffix == ".csv" else " ")
    return read_bold(path, **{**SEVEN, **options})


# Which axis ---


@pytest.mark.parametrize("ending", ["txt", "csv", "1D", "npy"])
@pytest.mark.parametrize("turned", [False, True])
def test_the_axis_of_the_atlas_count_holds_the_parcels(ending, turned, tmp_path):
    bold = read(tmp_path / f"a.{ending}", SERIES if turned else SERIES.T)
    np.testing.assert_array_equal(bold, SERIES)


@pytest.mark.parametrize("turned", [False, True])
def test_of_a_square_table_time_is_the_smooth_axis(turned, tmp_path):
    series = smooth_series(100)
    bold = read(tmp_path / "a.txt", series if turned else series.T)
    np.testing.assert_array_equal(bold, series)
    assert "since time is smooth" in bold.attrs["notes"][0]


def test_where_nothing_tells_the_option_is_named(tmp_path):
    values = np.random.default_rng(0).standard_normal((100, 100))
    with pytest.raises(
        InputError, match='found no name.*parcels_in="rows" or parcels_in="columns"'
    ):
        read(tmp_path / "a.txt", values)
    np.testing.assert_array_equal(read(tmp_path / "a.txt", values, parcels_in="rows"), values)
    np.testing.assert_array_equal(read(tmp_path / "a.txt", values, parcels_in="columns"), values.T)
    with pytest.raises(InputError, match="rows, columns, found 'lines'"):
        read(tmp_path / "a.txt", values, parcels_in="lines")


def test_a_number_of_columns_that_time_contradicts_is_refused(tmp_path):
    header = " ".join(f"V{i + 1}" for i in range(60))
    np.savetxt(tmp_path / "a.txt", SERIES, header=header)
    with pytest.raises(InputError, match="columns by their number but rows by the smoothness"):
        read_bold(tmp_path / "a.txt", None, tr=TR)


def test_without_an_atlas_all_lines_stay(tmp_path):
    bold = read(tmp_path / "a.txt", SERIES[:30], atlas=None)
    np.testing.assert_array_equal(bold, SERIES[:30])
    assert bold.roi.values.tolist() == [str(i + 1) for i in range(30)]


# Which parcel ---


@pytest.mark.parametrize("where, said", [("behind", "last"), ("before", "first")])
def test_subcortical_lines_beside_the_atlas_are_left_out_and_said(where, said, tmp_path):
    deep = np.random.default_rng(0).standard_normal((16, 60))
    whole = [SERIES, deep] if where == "behind" else [deep, SERIES]
    bold = read(tmp_path / "a.txt", np.concatenate(whole))
    np.testing.assert_array_equal(bold, SERIES)
    assert bold.attrs["notes"] == [f"left out the {said} 16 of 116 parcels"]


def test_far_more_lines_are_those_of_another_atlas(tmp_path):
    with pytest.raises(InputError, match=f"100 parcels of {ATLAS} in a.txt, found 200 x 60"):
        read(tmp_path / "a.txt", np.concatenate([SERIES, SERIES]))


@pytest.mark.parametrize("form", ["ROI_{}", "#{}", "V{}", "{}", "region 00{}", "{}.0"])
def test_numbered_columns_are_put_in_the_order_of_their_numbers(form, tmp_path):
    columns = [form.format(i + 1) for i in range(100)]
    frame = pd.DataFrame(SERIES.T, columns=columns)[sorted(columns)]
    frame.to_csv(tmp_path / "a.csv", index=False)
    np.testing.assert_allclose(read_bold(tmp_path / "a.csv", **SEVEN), SERIES, rtol=1e-12)


def test_numbers_with_a_gap_are_refused(tmp_path):
    columns = [f"ROI_{i + 1 + (i > 50)}" for i in range(100)]
    pd.DataFrame(SERIES.T, columns=columns).to_csv(tmp_path / "a.csv", index=False)
    with pytest.raises(InputError, match="without a gap in a.csv, found 100 up to 101, without 52"):
        read_bold(tmp_path / "a.csv", **SEVEN)


def test_one_huge_number_takes_no_memory(tmp_path):
    columns = [f"ROI_{i + 1 if i < 99 else 3_000_000}" for i in range(100)]
    pd.DataFrame(SERIES.T, columns=columns).to_csv(tmp_path / "a.csv", index=False)
    tracemalloc.start()
    with pytest.raises(InputError, match="found 100 up to 3000000, without 100"):
        read_bold(tmp_path / "a.csv", **SEVEN)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 50e6  # a set of all numbers up to it takes several times as much


@pytest.mark.parametrize("other", ["global_signal", "CSF", "WhiteMatter", "trans_x"])
def test_what_is_no_parcel_is_named(other, tmp_path):
    pd.DataFrame(SERIES[:3].T, columns=["a", "b", other]).to_csv(tmp_path / "a.csv", index=False)
    with pytest.raises(InputError, match=f"parcels alone, found {other}"):
        read_bold(tmp_path / "a.csv", None, tr=TR)


def test_columns_beside_the_atlas_are_said(tmp_path):
    frame = pd.DataFrame(SERIES.T, columns=NAMES).assign(global_signal=1.0)
    frame.to_csv(tmp_path / "a.csv", index=False)
    bold = read_bold(tmp_path / "a.csv", ATLAS, tr=TR)
    assert bold.attrs["notes"] == ["left out global_signal, no parcels of the atlas"]


# Files ---


def test_the_index_of_a_dataframe_is_no_parcel(tmp_path):
    pd.DataFrame(SERIES.T, columns=NAMES).to_csv(tmp_path / "a.csv")
    np.testing.assert_allclose(read_bold(tmp_path / "a.csv", ATLAS, tr=TR), SERIES, rtol=1e-12)


@pytest.mark.parametrize("separator", [",", ";", "\t", " "])
def test_any_separator_is_seen(separator, tmp_path):
    pd.DataFrame(SERIES.T, columns=NAMES).to_csv(tmp_path / "a.txt", sep=separator, index=False)
    np.testing.assert_allclose(read_bold(tmp_path / "a.txt", ATLAS, tr=TR), SERIES, rtol=1e-12)


def test_lines_of_comment_stand_above_the_names(tmp_path):
    lines = ["# 3dROIstats", "# of a run", "#" + " ".join(NAMES)]
    lines += [" ".join(f"{v:.17g}" for v in row) for row in SERIES.T]
    (tmp_path / "a.1D").write_text("\n".join(lines))
    np.testing.assert_array_equal(read_bold(tmp_path / "a.1D", ATLAS, tr=TR), SERIES)


def cells(values):
    out = np.empty(len(values), object)
    out[:] = values
    return out


def test_matlab_files_are_read(tmp_path):
    path = tmp_path / "a.mat"
    for content in ({"ROISignals": SERIES.T, "other": np.eye(3)}, {"tc": SERIES.T}, {"x": SERIES}):
        scipy.io.savemat(path, content)
        np.testing.assert_array_equal(read_bold(path, **SEVEN), SERIES)
    scipy.io.savemat(path, {"x": np.eye(2), "y": np.eye(2)})
    with pytest.raises(InputError, match="one matrix or ROISignals, tc, .* found x, y"):
        read_bold(path, **SEVEN)


def test_files_of_conn_go_by_their_names(tmp_path):
    """One cell a region; cells of several series are confounds."""
    data = [np.ones((60, 5)), *(one[:, None] for one in SERIES)]
    content = {"names": cells(["White Matter", *NAMES]), "data": cells(data)}
    scipy.io.savemat(tmp_path / "a.mat", content)
    np.testing.assert_array_equal(read_bold(tmp_path / "a.mat", ATLAS, tr=TR), SERIES)


def test_matlab_files_of_version_7_3_are_read(tmp_path):
    path = tmp_path / "a.mat"
    header = b"MATLAB 7.3 MAT-file".ljust(116) + b" " * 8 + b"\x00\x02IM" + bytes(384)
    with h5py.File(path, "w", userblock_size=512) as file:
        file["ROISignals"] = SERIES  # MATLAB writes what is transposed
    with open(path, "r+b") as raw:
        raw.write(header)
    np.testing.assert_array_equal(read_bold(path, **SEVEN), SERIES)
    with h5py.File(path, "w", userblock_size=512) as file:
        for name, values in (("names", NAMES), ("data", SERIES)):
            refs = file.create_dataset(name, (1, 100), h5py.ref_dtype)
            for i, one in enumerate(values):
                text = name == "names"
                one = np.array([[ord(c)] for c in one], "u2") if text else one[None]
                item = file.create_dataset(f"#refs#/{name}{i}", data=one)
                item.attrs["MATLAB_class"] = np.bytes_("char" if text else "double")
                refs[0, i] = item.ref
    with open(path, "r+b") as raw:
        raw.write(header)
    np.testing.assert_array_equal(read_bold(path, ATLAS, tr=TR), SERIES)


def test_reading_costs_little_more_than_pandas_alone(tmp_path):
    from time import perf_counter

    path = tmp_path / "a.csv"
    values = np.random.default_rng(0).standard_normal((1500, 300))
    pd.DataFrame(values, columns=[f"p{i}" for i in range(300)]).to_csv(path, index=False)

    def seconds(read):
        start = perf_counter()
        read(path)
        return perf_counter() - start

    pairs = [(seconds(tables_file.read_text), seconds(pd.read_csv)) for _ in range(5)]
    assert min(a for a, _ in pairs) < 3 * min(b for _, b in pairs)  # 1.5 on an idle core


# Order, checked by what the brain does ---


def labeled(series, atlas=None):
    parcels = load_atlas(ATLAS) if atlas is None else atlas
    coords = {n: parcels[n] for n in ("roi", "hemi", "mni_x", "mni_y", "mni_z")}
    return tables_file.xr.DataArray(series, coords, ("roi", "time"), attrs={"tr": TR})


def test_shuffled_parcels_are_refused_and_doubtful_ones_warned_of():
    order = np.random.default_rng(0).permutation(100)
    _, facts, warnings = check_bold_quality(labeled(SERIES))
    assert facts["homotopy"] > 0.9
    assert not any("partners" in w for w in warnings)
    with pytest.raises(
        InputError, match=r"partners whose correlation ranks 0\.[45].*order=, atlas="
    ):
        check_bold_quality(labeled(SERIES[order]))
    mixed = SERIES / SERIES.std() + 1.5 * SERIES[order] / SERIES.std()
    assert 0.6 < homotopy(labeled(mixed)) < 0.75
    assert any(
        "partners whose correlation ranks 0." in w for w in check_bold_quality(labeled(mixed))[2]
    )


def test_on_one_side_distance_tells_the_order():
    left = load_atlas(ATLAS).isel(roi=slice(50))
    order = np.random.default_rng(0).permutation(50)
    assert np.isnan(check_bold_quality(labeled(SERIES[:50], left))[1]["homotopy"])
    assert distance_effect(labeled(SERIES[:50], left)) < -0.3
    with pytest.raises(InputError, match="hardly falls with distance"):
        check_bold_quality(labeled(SERIES[:50][order], left))


@pytest.mark.parametrize("indexed", [False, True])
def test_the_index_of_a_data_frame_is_no_parcel(indexed, tmp_path):
    rows = pd.DataFrame(SERIES, columns=[f"timepoint_{i}" for i in range(SERIES.shape[1])])
    rows.insert(0, "label_name", NAMES)
    rows.to_csv(tmp_path / "a.csv", index=indexed)
    np.testing.assert_allclose(read_bold(tmp_path / "a.csv", **SEVEN), SERIES, rtol=1e-6)
