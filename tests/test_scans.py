"""Laws of the readers: the same scan in another form is the same scan."""

import json

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import xarray as xr
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from small_files import (
    ATLAS,
    TR,
    biobank,
    dtseries,
    gifti,
    label_image,
    mgz,
    parcel_series,
    ptseries,
    sidecar,
    t1_image,
    table,
    volume,
)

from bhx.data import anatomy as anatomy_file
from bhx.data import bold as bold_file
from bhx.data import quality as quality_file
from bhx.data.atlas import load_atlas, load_sample
from bhx.data.files import MNI_AFFINE
from bhx.errors import InputError
from bhx.modalities.t1 import CROP, MNI_SHAPE, t1_grid

SERIES = parcel_series()
NAMES = load_atlas(ATLAS).roi.values
SHORT = [name.split("_", 1)[1] for name in NAMES]
SHUFFLED = np.random.default_rng(1).permutation(len(NAMES))


def _volume(step, orientation, suffix):
    def write(folder):
        labels = label_image(folder / "labels.nii.gz", step, orientation)
        return volume(folder / f"sub-01_space-MNI152NLin6Asym_bold{suffix}", SERIES, labels)

    return write


FORMS = {
    "volume RAS 4 mm nii": _volume(4, "RAS", ".nii"),
    "volume LAS 4 mm nii.gz": _volume(4, "LAS", ".nii.gz"),
    "volume LAS 3 mm nii": _volume(3, "LAS", ".nii"),
    "CIFTI dtseries": lambda d: dtseries(d / "a.dtseries.nii", SERIES),
    "CIFTI ptseries": lambda d: ptseries(d / "a.ptseries.nii", SERIES[SHUFFLED], NAMES[SHUFFLED]),
    "GIFTI fsaverage5": lambda d: gifti(d, SERIES),
    "GIFTI fsLR": lambda d: gifti(d, SERIES, "fsLR"),
    "MGZ fsaverage5": lambda d: mgz(d, SERIES),
    "tsv": lambda d: table(d / "a.tsv", SERIES, NAMES),
    "tsv, short names, any order": lambda d: table(
        d / "a.tsv", SERIES[SHUFFLED], np.array(SHORT)[SHUFFLED]
    ),
    "csv.gz": lambda d: table(d / "a.csv.gz", SERIES, NAMES, ","),
    "UK Biobank rows": lambda d: biobank(d / "a.csv.gz", SERIES, SHORT),
    "UK Biobank numbers": lambda d: biobank(
        d / "fMRI.Schaefer7n100p.csv.gz", SERIES, [f"ROI_{i + 1}" for i in range(100)]
    ),
    "more parcels than the atlas": lambda d: table(
        d / "a.tsv", np.vstack([SERIES, SERIES[:2]]), [*NAMES, "LH-Amygdala", "RH-Amygdala"]
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_scan(form, tmp_path):
    path = FORMS[form](tmp_path)
    bold = bold_file.read_bold(path, ATLAS, labels=tmp_path / "labels.nii.gz")
    assert bold.dims == ("roi", "time")
    assert bold.roi.values.tolist() == NAMES.tolist()
    assert bold.attrs["tr"] == pytest.approx(TR)
    np.testing.assert_allclose(bold.time, TR * np.arange(60))
    np.testing.assert_allclose(bold, SERIES, rtol=1e-6)


def test_a_right_hemisphere_finds_its_left(tmp_path):
    left = gifti(tmp_path, SERIES)
    right = left.with_name(left.name.replace("hemi-L", "hemi-R"))
    xr.testing.assert_equal(bold_file.read_bold(left, ATLAS), bold_file.read_bold(right, ATLAS))


def test_tables_without_names_need_an_order(tmp_path):
    path = table(tmp_path / "a.csv", SERIES, separator=",")
    np.save(tmp_path / "b.npy", SERIES.T)
    for file in (path, tmp_path / "b.npy"):
        bold = bold_file.read_bold(file, ATLAS, order="7networks", tr=TR)
        np.testing.assert_allclose(bold, SERIES)
        with pytest.raises(InputError, match="parcel names in .*, found none"):
            bold_file.read_bold(file, ATLAS, tr=TR)


def test_the_17_network_order_is_aligned_by_name(tmp_path):
    bold = parcel_series(60, atlas="schaefer400")
    seventeen = load_atlas("schaefer400", order="17networks")
    there = load_atlas("schaefer400").indexes["roi"].get_indexer(seventeen.name7)
    path = table(tmp_path / "a.tsv", bold[there], seventeen.roi.values)
    np.testing.assert_allclose(bold_file.read_bold(path), bold)
    path = table(tmp_path / "b.csv", bold[there], separator=",")
    np.testing.assert_allclose(bold_file.read_bold(path, order="17networks"), bold)


def test_other_atlases_keep_their_columns(tmp_path):
    path = tmp_path / "rois_cc200.1D"
    rows = "\n".join("\t".join(f"{v:.6f}" for v in volume) for volume in SERIES[:7].T)
    path.write_text("\t".join(f"#{i}" for i in range(1, 8)) + "\n" + rows)
    bold = bold_file.read_bold(path, None, tr=1.5)
    assert bold.roi.values.tolist() == [str(i) for i in range(1, 8)]
    np.testing.assert_allclose(bold, SERIES[:7], atol=1e-6)


def test_volumes_are_parcelled_as_nilearn_does(tmp_path):
    from nilearn.maskers import NiftiLabelsMasker

    labels = label_image(tmp_path / "labels.nii.gz")
    path = volume(tmp_path / "bold.nii.gz", SERIES, labels)
    image = nib.load(path)
    noise = np.random.default_rng(0).normal(100, 1, image.shape).astype("float32")
    nib.save(
        nib.Nifti1Image(image.get_fdata().astype("float32") + noise, image.affine, image.header),
        path,
    )
    theirs = NiftiLabelsMasker(labels, standardize=None).fit_transform(path)
    ours = bold_file.read_bold(path, ATLAS, labels=labels)
    np.testing.assert_allclose(ours, theirs.T, rtol=1e-5)


def test_voxels_without_signal_are_left_out_of_the_mean(tmp_path):
    labels = label_image(tmp_path / "labels.nii.gz")
    path = volume(tmp_path / "bold.nii", SERIES, labels)
    image = nib.load(path)
    data, numbers = image.get_fdata().astype("float32"), np.asarray(nib.load(labels).dataobj)
    mine = np.argwhere(numbers == 5)
    data[tuple(mine[: len(mine) // 4].T)] = 0
    nib.save(nib.Nifti1Image(data, image.affine, image.header), path)
    bold = bold_file.read_bold(path, ATLAS, labels=labels)
    np.testing.assert_allclose(bold, SERIES, rtol=1e-6)
    assert bold.covered[4] == pytest.approx(1 - len(mine) // 4 / len(mine))


# --- repetition time ---


def test_the_repetition_time_is_found_and_checked(tmp_path):
    path = tmp_path / "sub-01" / "func" / "sub-01_task-rest_bold.nii.gz"
    path.parent.mkdir(parents=True)
    assert bold_file.read_tr(path, 0.8) == 0.8
    assert bold_file.read_tr(path, None, 0.72) == 0.72
    (tmp_path / "task-rest_bold.json").write_text('{"RepetitionTime": 2.5}')
    assert bold_file.read_tr(path, 1.0) == 2.5  # 1 s is what writers leave in an unfilled header
    sidecar(path, 3.0)
    assert bold_file.read_tr(path) == 3.0
    with pytest.raises(InputError, match="found 3 s in the sidecar and 2 s in the header"):
        bold_file.read_tr(path, 2.0)


def test_milliseconds_in_the_header_are_understood_when_it_says_so(tmp_path):
    labels = label_image(tmp_path / "labels.nii.gz")
    path = volume(tmp_path / "bold.nii", SERIES, labels, tr=2000, units="msec")
    assert bold_file.read_bold(path, ATLAS, labels=labels).attrs["tr"] == pytest.approx(2)


# --- denoising ---


def fmriprep_confounds(folder, n, outliers=()):
    """Motion, tissue signals and cosines, as the "simple" and "scrubbing" presets need them."""
    rng = np.random.default_rng(0)
    kinds = ("", "_derivative1", "_power2", "_derivative1_power2")
    names = [f"{m}_{axis}{k}" for m in ("trans", "rot") for axis in "xyz" for k in kinds]
    frame = pd.DataFrame(rng.standard_normal((n, len(names))), columns=names)
    frame["csf"], frame["white_matter"] = rng.standard_normal((2, n))
    for tissue in ("csf", "white_matter"):
        for kind in kinds[1:]:
            frame[tissue + kind] = rng.standard_normal(n)
    frame["cosine00"] = np.cos(np.pi * (np.arange(n) + 0.5) / n)
    frame["framewise_displacement"] = np.where(np.isin(np.arange(n), outliers), 3.0, 0.1)
    frame["std_dvars"] = 1.0
    path = folder / "sub-01_task-rest_desc-confounds_timeseries.tsv"
    frame.to_csv(path, sep="\t", index=False, na_rep="n/a")
    return path, frame


def test_denoising_removes_confounds_and_keeps_signal_and_mean(tmp_path):
    n = 150
    table_path, frame = fmriprep_confounds(tmp_path, n)
    clean = parcel_series(n)
    noisy = clean + 50 * frame["trans_x"].to_numpy()
    bold = bold_file.read_bold(gifti(tmp_path, noisy), ATLAS)
    out = bold_file.denoise(bold, gifti(tmp_path, noisy), table_path)
    before, after = (np.abs(np.corrcoef(b, frame["trans_x"])[-1, :-1]).max() for b in (noisy, out))
    assert before > 0.9
    assert after < 0.01
    np.testing.assert_allclose(out.mean("time"), noisy.mean(1), rtol=1e-6)
    assert out.attrs["n_scrubbed"] == 0


def test_scrubbed_volumes_are_filled_so_that_time_stays_regular(tmp_path):
    n, bad = 150, [70, 71]
    table_path, _ = fmriprep_confounds(tmp_path, n, bad)
    spiked = parcel_series(n)
    spiked[:, bad] += 500
    path = gifti(tmp_path, spiked)
    out = bold_file.denoise(
        bold_file.read_bold(path, ATLAS), path, table_path, strategy="scrubbing", scrub=0
    )
    assert out.sizes["time"] == n
    assert out.attrs["n_scrubbed"] >= 2
    assert np.abs(out - out.mean("time"))[:, bad].max() < 100


def test_the_filter_keeps_its_band():
    time = TR * np.arange(300)
    slow, fast = (np.sin(2 * np.pi * hz * time) for hz in (0.03, 0.2))
    bold = xr.DataArray((slow + fast)[None] + 5, dims=("roi", "time"), attrs={"tr": TR})
    out = bold_file.denoise(bold, "a.tsv", strategy=None, low_pass=0.1, high_pass=0.01)
    inner = slice(30, -30)
    assert np.corrcoef(out[0, inner], slow[inner])[0, 1] > 0.99


def test_denoised_files_and_tables_are_left_alone():
    assert bold_file.needs_denoising("sub-01_space-MNI152NLin6Asym_desc-preproc_bold.nii.gz")
    for name in ("a_desc-denoised_bold.dtseries.nii", "a_timeseries.tsv", "a.ptseries.nii"):
        assert not bold_file.needs_denoising(name)


# --- verdicts on BOLD ---


def bold_of(series=SERIES, atlas=ATLAS, tr=TR):
    parcels = load_atlas(atlas)
    known = {n: c for n, c in parcels.coords.items() if c.dims == ("roi",)}
    return xr.DataArray(series, known, ("roi", "time"), attrs={"tr": tr, "file": "a.tsv"})


def test_a_real_scan_betrays_the_order_of_its_parcels():
    sample, parcels = load_sample(), load_atlas("schaefer400")
    seven = bold_of(sample.bold.values, "schaefer400", 1.4)
    assert quality_file.homotopy(seven) > 0.9
    for start in range(0, 600, 100):
        window = seven.isel(time=slice(start, start + 60))
        swapped = window.copy(data=window.values[np.r_[200:400, 0:200]])
        seventeen = window.copy(data=window.values[np.argsort(parcels.label17.values)])
        assert quality_file.better_order(window) == ""
        assert quality_file.better_order(swapped) == "the other hemisphere"
        assert quality_file.better_order(seventeen) == "the 17-network order"


def test_homotopy_of_noise_is_a_half():
    noise = bold_of(np.random.default_rng(0).standard_normal((400, 200)), "schaefer400")
    assert quality_file.homotopy(noise) == pytest.approx(0.5, abs=0.07)
    assert quality_file.better_order(noise) == ""


@pytest.mark.parametrize(
    ("change", "scale"),
    [
        (lambda b: b, "raw"),
        (lambda b: (b - b.mean(1, keepdims=True)) / b.std(1, keepdims=True), "zscored"),
        (lambda b: b - b.mean(1, keepdims=True), "percent"),
    ],
)
def test_scales_are_told_apart(change, scale):
    assert quality_file.scale_of(change(SERIES)) == scale


def test_lost_parcels_become_zeros_and_a_warning():
    series = parcel_series(200)
    series[3], series[7, 5] = 1000, np.nan
    out, facts, warnings = quality_file.check_bold_quality(bold_of(series), mean_fd=0.8)
    assert facts["coverage"] == pytest.approx(0.98)
    assert (out[[3, 7]] == 0).all()
    np.testing.assert_allclose(out[8], series[8], rtol=1e-6)
    assert any(NAMES[3] in w and NAMES[7] in w for w in warnings)
    assert any("displacement 0.80 mm" in w for w in warnings)
    assert not any("s of BOLD" in w for w in warnings)


# --- T1 ---


def test_a_t1_in_any_orientation_and_file_is_the_same_t1(tmp_path):
    template = anatomy_file.read_template_t1()
    for orientation, suffix in (("LAS", ".nii"), ("RAS", ".nii.gz")):
        path = t1_image(tmp_path / f"{orientation}_T1w{suffix}", 1, orientation)
        t1, warnings = anatomy_file.read_t1(path)
        assert warnings == []
        np.testing.assert_allclose(t1, 600 * template, rtol=1e-5, atol=1e-3)
    for axis, values in t1_grid(1).items():
        np.testing.assert_array_equal(t1[axis], values)


@pytest.mark.parametrize("step", [2, 3])
def test_coarser_t1_images_are_close(step, tmp_path):
    fine, _ = anatomy_file.read_t1(t1_image(tmp_path / "fine.nii"), voxel_mm=4)
    coarse, _ = anatomy_file.read_t1(t1_image(tmp_path / "coarse.nii", step), voxel_mm=4)
    assert fine.shape == (40, 48, 40)
    assert np.corrcoef(fine.values.ravel(), coarse.values.ravel())[0, 1] > 0.98


def test_a_mask_cuts_the_skull_away(tmp_path):
    brain = nib.load(t1_image(tmp_path / "brain.nii"))
    nib.save(
        nib.Nifti1Image((brain.get_fdata() > 0).astype("uint8"), brain.affine),
        tmp_path / "mask.nii",
    )
    head = brain.get_fdata() + 300
    nib.save(nib.Nifti1Image(head.astype("float32"), brain.affine), tmp_path / "head.nii")
    t1, _ = anatomy_file.read_t1(tmp_path / "head.nii", tmp_path / "mask.nii")
    np.testing.assert_array_equal(t1 > 0, anatomy_file.read_template_t1() > 0)
    with pytest.raises(InputError, match="Skull-strip it or give its brain mask"):
        anatomy_file.read_t1(tmp_path / "head.nii")


def test_t1_voxels_are_block_means_of_the_1_mm_grid(tmp_path):
    path = t1_image(tmp_path / "a.nii")
    fine, coarse = (anatomy_file.read_t1(path, voxel_mm=v)[0] for v in (1, 16))
    blocks = fine.coarsen(x=16, y=16, z=16).mean()
    xr.testing.assert_allclose(coarse, blocks.astype("float32"))


@pytest.mark.parametrize("shift", [(0, 0, 0), (7, -11, 3), (-20, 5, -9), (0.5, 0, 0), (400, 0, 0)])
@pytest.mark.parametrize("flipped", [False, True])
@pytest.mark.parametrize("shape", [(182, 218, 182), (60, 70, 50), (193, 229, 193)])
def test_an_image_on_whole_voxels_is_copied_as_nilearn_resamples_it(
    shape, flipped, shift, monkeypatch
):
    """Of a cut-out, shifted, flipped image; half voxels alone are interpolated."""
    from nilearn import image as nilearn_image

    values = np.random.default_rng(0).uniform(1, 9, shape).astype("float32")
    affine = np.diag([1.0, 1, 1, 1]) if not flipped else np.diag([-1.0, 1, 1, 1])
    affine[:3, 3] = np.array([90 if flipped else -90, -126, -72]) + shift
    image, calls = nib.Nifti1Image(values, affine), []
    grid = MNI_AFFINE @ np.array([[-1, 0, 0, MNI_SHAPE[0] - 1], *np.eye(4)[1:]])
    resample = nilearn_image.resample_img
    expected = resample(image, grid, MNI_SHAPE, interpolation="linear").get_fdata()[::-1]
    crop = tuple(slice(c, n - c) for c, n in zip(CROP, MNI_SHAPE, strict=True))
    monkeypatch.setattr(
        nilearn_image, "resample_img", lambda *a, **k: (calls.append(1), resample(*a, **k))[1]
    )
    found = anatomy_file.t1_to_grid(image)
    np.testing.assert_allclose(found, expected[crop].astype("float32"), rtol=1e-5)
    assert bool(calls) == (shift[0] == 0.5)


# --- fuzzing: whatever is in a file, the answer is an array or an InputError ---

FUZZ = settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


def outcome(read, *args, **options):
    """What was read and "", or None and why it was refused; anything else is raised."""
    try:
        return read(*args, **options), ""
    except InputError as error:
        return None, str(error)


FILES = st.sampled_from(["a.csv", "a.tsv", "a.1D", "a.csv.gz", "a.npy", "a.nii", "a.nii.gz"])


@FUZZ
@given(st.binary(max_size=300), FILES)
@example(b"\x1f\x8b", "a.csv.gz")
@example(b"\xff\xfe1\t2", "a.tsv")
def test_any_bytes_are_read_or_refused(tmp_path, content, name):
    (tmp_path / name).write_bytes(content)
    bold, why = outcome(bold_file.read_bold, tmp_path / name, None, tr=2.0)
    assert name in why if bold is None else bold.size > 0


CELL = st.floats(allow_nan=False, width=32).map(str) | st.sampled_from(["", "n/a", "x", "#1"])


@FUZZ
@given(st.lists(st.lists(CELL, min_size=1, max_size=4), min_size=1, max_size=6))
def test_any_table_is_read_or_refused(tmp_path, rows):
    (tmp_path / "a.csv").write_text("\n".join(",".join(row) for row in rows))
    bold, why = outcome(bold_file.read_bold, tmp_path / "a.csv", None, tr=2.0)
    assert "a.csv" in why if bold is None else bold.size > 0


KEYS = st.text(max_size=3)
JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(KEYS, inner, max_size=2),
    max_leaves=4,
)


@FUZZ
@given(JSON | st.fixed_dictionaries({"RepetitionTime": JSON}))
@example({"RepetitionTime": "2.0"})
@example({"RepetitionTime": True})
@example({"RepetitionTime": 2000})
@example({"RepetitionTime": 10**400})
def test_any_sidecar_is_read_or_refused(tmp_path, content):
    (tmp_path / "a.json").write_text(json.dumps(content))
    tr, why = outcome(bold_file.read_tr, tmp_path / "a.nii.gz")
    assert why.startswith("Expected") if tr is None else 0 < tr <= 20


def test_memory_does_not_grow_with_the_length_of_a_volume(tmp_path):
    import tracemalloc

    labels = label_image(tmp_path / "labels.nii.gz")
    path = volume(tmp_path / "bold.nii.gz", parcel_series(240), labels)
    whole = 4 * np.prod(nib.load(path).shape)  # bytes
    bold_file.read_bold(path, ATLAS, labels=labels)  # so that no import is counted
    tracemalloc.start()
    bold_file.read_bold(path, ATLAS, labels=labels)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < whole / 4
