"""Bad inputs, each made here, each with the sentence it gets."""

import gzip
import json
import os
import re

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
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

from bhx.data import anatomy as anatomy_file
from bhx.data import derivatives as derivatives_file
from bhx.data import prepare as prepare_file
from bhx.data.atlas import load_atlas
from bhx.errors import InputError

SERIES = parcel_series()
NAMES = load_atlas(ATLAS).roi.values
CASES = {}


def bad(name, message):
    """Register an input: a function of a folder that uses it, and the message it must get."""

    def register(use):
        CASES[name] = (use, message)
        return use

    return register


def refused(path, **options):
    return prepare_file.read_scan({"bold": str(path)}, **{"atlas": ATLAS, **options})


def refused_t1(path, mask=""):
    return prepare_file.read_scan({"t1": str(path), "t1_mask": str(mask)})


def bold_volume(folder, name="bold.nii.gz", **options):
    labels = label_image(folder / "labels.nii.gz")
    return volume(folder / name, SERIES, labels, **options), labels


# --- files ---

bad("nothing there", "Expected a file at .*, found .*No such file")(lambda d: refused(d / "a.tsv"))
bad("a folder", "found a folder")(lambda d: ((d / "a.tsv").mkdir(), refused(d / "a.tsv")))
bad("0 bytes", "found 0 bytes")(lambda d: ((d / "a.tsv").touch(), refused(d / "a.tsv")))
bad("unknown ending", "Expected BOLD in a file ending in .* found a.sav")(
    lambda d: ((d / "a.sav").write_text("x"), refused(d / "a.sav"))
)
bad("name too long", "Expected a file at")(lambda d: refused(d / ("x" * 300 + ".tsv")))
bad("NUL in a path", "Expected a file at")(lambda d: refused("a\0.tsv"))
bad("row without files", "a file under 'bold' or 't1', found none")(
    lambda d: prepare_file.read_scan({})
)


@bad("loop of links", "Too many levels of symbolic links")
def _(folder):
    (folder / "a.tsv").symlink_to(folder / "b.tsv")
    (folder / "b.tsv").symlink_to(folder / "a.tsv")
    refused(folder / "a.tsv")


@bad("annex content not fetched", "found .*No such file.* Run datalad get")
def _(folder):
    (folder / "a.nii.gz").symlink_to(".git/annex/objects/xx/yy")
    refused(folder / "a.nii.gz")


@bad("truncated gzip", "Expected to read BOLD from bold.nii.gz, found EOFError")
def _(folder):
    path, labels = bold_volume(folder)
    path.write_bytes(path.read_bytes()[:-2000])
    refused(path, labels=labels)


@bad("corrupted gzip", "Expected to read BOLD from bold.nii.gz, found (.*rror|Bad)")
def _(folder):
    path, labels = bold_volume(folder)
    content = bytearray(path.read_bytes())
    content[len(content) // 2 : len(content) // 2 + 200] = os.urandom(200)
    path.write_bytes(content)
    refused(path, labels=labels)


@bad("gzip of something else", "Expected to read BOLD from bold.nii.gz, found ImageFileError")
def _(folder):
    (folder / "bold.nii.gz").write_bytes(gzip.compress(b"not an image" * 100))
    refused(folder / "bold.nii.gz")


@bad("truncated NIfTI", "Expected to read BOLD from bold.nii, found")
def _(folder):
    path, labels = bold_volume(folder, "bold.nii")
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    refused(path, labels=labels)


# --- volumes ---


@bad("3D instead of 4D", r"4D image of several volumes in a.nii, found \(46, 55, 46\)")
def _(folder):
    refused(label_image(folder / "a.nii"))


@bad("native space", "an image in MNI152 space, found space-T1w")
def _(folder):
    refused(bold_volume(folder, "sub-1_task-rest_space-T1w_desc-preproc_bold.nii.gz")[0])


def reoriented(path, change):
    image = nib.load(path)
    affine = change @ image.affine
    nib.save(nib.Nifti1Image(np.array(image.dataobj), affine, nib.Nifti1Header()), path)
    return path


@bad("oblique BOLD", "oblique by 15 degrees")
def _(folder):
    path, labels = bold_volume(folder)
    sidecar(path)
    turn = np.eye(4)
    turn[:2, :2] = [
        [np.cos(np.pi / 12), -np.sin(np.pi / 12)],
        [np.sin(np.pi / 12), np.cos(np.pi / 12)],
    ]
    refused(reoriented(path, turn), labels=labels)


@bad("flipped affine", "left and right partners that correlate far better in the other hemisphere")
def _(folder):
    path, labels = bold_volume(folder, "bold.nii")
    image = nib.load(path)
    numbers = np.asarray(nib.load(labels).dataobj)
    there = load_atlas(ATLAS)
    swap = np.r_[0, 51:101, 1:51]  # the left hemisphere's labels carry the right one's series
    paint = np.vstack([np.zeros(60), SERIES]).astype("float32")
    assert there.sizes["roi"] == 100
    nib.save(nib.Nifti1Image(paint[swap][numbers], image.affine, image.header), path)
    refused(path, labels=labels)


@bad("qform against sform", "a qform and an sform .* mm apart")
def _(folder):
    path, labels = bold_volume(folder, "bold.nii")
    image = nib.load(path)
    image.set_qform(np.diag([-1, 1, 1, 1]) @ image.affine, 1)
    image.set_sform(image.affine, 1)
    nib.save(image, folder / "b.nii")
    refused(folder / "b.nii", labels=labels)


@bad("singular affine", "an invertible affine")
def _(folder):
    path, labels = bold_volume(folder, "bold.nii")
    image = nib.load(path)
    header = image.header.copy()
    header.set_sform(np.diag([1, 1, 0, 1]), 1)
    nib.save(nib.Nifti1Image(image.get_fdata(dtype="float32"), None, header), folder / "b.nii")
    refused(folder / "b.nii", labels=labels)


@bad("labels of another atlas", "labels 1 to 100 in big.nii.gz, found 200")
def _(folder):
    path, _ = bold_volume(folder)
    refused(path, labels=label_image(folder / "big.nii.gz", atlas="schaefer200"))


@bad("labels in another order", "where schaefer100 has them, found them .* mm away")
def _(folder):
    path, _ = bold_volume(folder)
    numbers = np.random.default_rng(0).permutation(100) + 1
    refused(path, labels=label_image(folder / "other.nii.gz", numbers=numbers))


@bad("left and right of labels swapped", "where schaefer100 has them, found them .* mm away")
def _(folder):
    path, _ = bold_volume(folder)
    numbers = np.r_[51:101, 1:51]
    refused(path, labels=label_image(folder / "other.nii.gz", numbers=numbers))


@bad("probabilistic labels", "whole numbers in 3D in prob.nii, found others")
def _(folder):
    path, labels = bold_volume(folder)
    image = nib.load(labels)
    half = image.get_fdata() * 0.5
    nib.save(nib.Nifti1Image(half, image.affine), folder / "prob.nii")
    refused(path, labels=folder / "prob.nii")


@bad("field of view too small", "at least 80% of the parcels .* hardly in the field of view")
def _(folder):
    path, labels = bold_volume(folder, "bold.nii")
    image = nib.load(path)
    data = np.asarray(image.dataobj).copy()
    data[:, :20] = 0
    nib.save(nib.Nifti1Image(data, image.affine, image.header), path)
    refused(path, labels=labels)


# --- surfaces and CIFTI ---


@bad("hemisphere missing", "Expected a file at .*hemi-R.*, found .*No such file")
def _(folder):
    left = gifti(folder, SERIES)
    left.with_name(left.name.replace("hemi-L", "hemi-R")).unlink()
    refused(left)


@bad("hemisphere unnamed", "a hemisphere in the name of rest.func.gii")
def _(folder):
    refused(gifti(folder, SERIES).rename(folder / "rest.func.gii"))


@bad("fsaverage6", "10242 .fsaverage5. or 32492 .fsLR. vertices in .* found .40962, 60.")
def _(folder):
    for hemi in "LR":
        arrays = [nib.gifti.GiftiDataArray(np.ones(40962, "float32")) for _ in range(60)]
        nib.save(nib.GiftiImage(darrays=arrays), folder / f"hemi-{hemi}.func.gii")
    refused(folder / "hemi-L.func.gii")


@bad("170k CIFTI", "fsLR-32k in a.dtseries.nii, found a cortex of 59412 vertices")
def _(folder):
    refused(dtseries(folder / "a.dtseries.nii", SERIES, n_vertices=59412))


@bad("CIFTI of other parcels", "the 100 parcels of schaefer100, found 3 names; unknown: V1, V2, V3")
def _(folder):
    refused(ptseries(folder / "a.ptseries.nii", SERIES[:3], ["V1", "V2", "V3"]))


@bad("NIfTI named CIFTI", "Expected to read BOLD from a.dtseries.nii")
def _(folder):
    path, _ = bold_volume(folder)
    refused(path.rename(folder / "a.dtseries.nii"))


# --- tables ---


def rows(folder, text, name="a.tsv"):
    (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    return sidecar(folder / name)


bad("a sentence", "lines of numbers in a.tsv, found 1 line")(
    lambda d: refused(rows(d, "there are no numbers here"))
)
bad("only a header", "lines of numbers in a.tsv, found 1 line")(
    lambda d: refused(rows(d, "\t".join(NAMES) + "\n"))
)
bad("UTF-16", "Expected to read BOLD from a.tsv, found UnicodeDecodeError")(
    lambda d: refused(rows(d, "a\tb\n1\t2".encode("utf-16")))
)
bad("ragged lines", "Expected to read BOLD from a.tsv, found ParserError")(
    lambda d: refused(rows(d, "a\tb\n1\t2\n1\t2\t3\n"))
)
bad("decimal comma", "numbers in a.tsv, found '1,5'")(
    lambda d: refused(rows(d, "a\tb\n1,5\t2\n1\t2\n"), atlas=None)
)
bad("pickled array", "Expected to read BOLD from a.npy, found ValueError")(
    lambda d: (
        np.save(d / "a.npy", np.array([{}], object), allow_pickle=True),
        refused(d / "a.npy", order="7networks"),
    )
)
bad("array of 3 dims", "time x parcel in a.npy, found")(
    lambda d: (np.save(d / "a.npy", np.ones((2, 3, 4))), refused(d / "a.npy"))
)
bad("one parcel missing", "100 parcels of .*, found 99 names; missing: 7Networks_LH_Vis_1")(
    lambda d: refused(table(d / "a.tsv", SERIES[1:], NAMES[1:]))
)
bad("one parcel twice", "in a.tsv, and parcels alone, found 7Networks_LH_Vis_1 again")(
    lambda d: refused(table(d / "a.tsv", SERIES[[0, *range(100)]], NAMES[[0, *range(100)]]))
)
bad("parcels of another scale", "the 100 parcels of schaefer100, found")(
    lambda d: refused(
        table(d / "a.tsv", parcel_series(atlas="schaefer200"), load_atlas("schaefer200").roi.values)
    )
)
bad("numbers for names", "parcel names in a.tsv, found none")(
    lambda d: refused(table(d / "a.tsv", SERIES, [f"ROI_{i}" for i in range(100)]))
)
bad("wrong count with an order", "the 100 parcels of schaefer100 in a.tsv, found 60 x 90")(
    lambda d: refused(table(d / "a.tsv", SERIES[:90]), order="7networks")
)
bad("unknown atlas", "schaefer123")(
    lambda d: refused(table(d / "a.tsv", SERIES, NAMES), atlas="schaefer123")
)
bad("names of the other hemisphere", "correlate far better in the other hemisphere")(
    lambda d: refused(table(d / "a.tsv", SERIES, NAMES[np.r_[50:100, 0:50]]))
)


@bad("17-network columns called 7-network", "correlate far better in the 17-network order")
def _(folder):
    seventeen = load_atlas("schaefer400", order="17networks")
    there = load_atlas("schaefer400").indexes["roi"].get_indexer(seventeen.name7)
    series = parcel_series(atlas="schaefer400")[there]
    refused(table(folder / "a.csv", series, separator=","), atlas="schaefer400", order="7networks")


@bad("NaN parcels", "found it in 70%; NaN: 30")
def _(folder):
    series = SERIES.copy()
    series[:30, 4] = np.nan
    refused(table(folder / "a.tsv", series, NAMES))


@bad("constant parcels", "found it in 75%; NaN: 0, constant: 25")
def _(folder):
    series = SERIES.copy()
    series[::4] = 7
    refused(table(folder / "a.tsv", series, NAMES))


bad("shorter than one patch", r"at least 35.28 s of BOLD in a.tsv, found 34.0 s \(17 volumes")(
    lambda d: refused(table(d / "a.tsv", SERIES[:, :17], NAMES))
)


# --- repetition time, sidecars, confounds ---


def timed(folder, text):
    path = table(folder / "a.tsv", SERIES, NAMES)
    (folder / "a.json").write_text(text)
    return refused(path)


bad("no TR anywhere", "a repetition time for a.tsv, found none")(lambda d: timed(d, "{}"))
bad("TR of 0", "above 0 and at most 20, found 0")(lambda d: timed(d, '{"RepetitionTime": 0}'))
bad("negative TR", "found -2")(lambda d: timed(d, '{"RepetitionTime": -2}'))
bad("TR in ms", "found 2000 of a.tsv; this looks like milliseconds")(
    lambda d: timed(d, '{"RepetitionTime": 2000}')
)
bad("NaN as TR", "Expected a repetition time")(lambda d: timed(d, '{"RepetitionTime": NaN}'))
bad("text as TR", "Expected to read RepetitionTime from a.json")(
    lambda d: timed(d, '{"RepetitionTime": "fast"}')
)
bad("list as TR", "Expected to read RepetitionTime from a.json")(
    lambda d: timed(d, '{"RepetitionTime": [2, 2]}')
)
bad("broken JSON", "Expected to read RepetitionTime from a.json, found JSONDecodeError")(
    lambda d: timed(d, '{"RepetitionTime": 2')
)
bad("JSON list", "Expected to read RepetitionTime from a.json")(lambda d: timed(d, "[2.0]"))


@bad("sidecar against header", "found 0.72 s in the sidecar and 2 s in the header")
def _(folder):
    path, labels = bold_volume(folder)
    refused(sidecar(path, 0.72), labels=labels)


def confounded(folder, lines, **options):
    path = gifti(folder, SERIES)
    file = folder / "sub-01_task-rest_desc-confounds_timeseries.tsv"
    file.write_text(lines)
    row = {"bold": str(path), "confounds": str(file)}
    return prepare_file.read_scan(row, atlas=ATLAS, denoising={"strategy": "columns", **options})


bad("confounds of another run", "as many volumes in .* as lines of .*confounds.*, found 60 and 3")(
    lambda d: confounded(d, "a\n1\n2\n3\n")
)
bad("confounds of text", "Expected to read confounds from")(
    lambda d: confounded(d, "a\n" + "x\n" * 60)
)
bad("unknown strategy", "Expected to read confounds from")(
    lambda d: confounded(d, "a\n" + "1\n" * 60, strategy="magic")
)
bad("preset without its columns", "Expected to read confounds from")(
    lambda d: confounded(d, "a\n" + "1\n" * 60, strategy="simple")
)
bad("no confounds", "fMRIPrep confounds beside .*, found none")(
    lambda d: prepare_file.read_scan(
        {"bold": str(gifti(d, SERIES))}, atlas=ATLAS, denoising={"strategy": "simple"}
    )
)


# --- T1 ---


@bad("T1 of 4 dims", "Expected 3 dims in a.nii")
def _(folder):
    nib.save(nib.Nifti1Image(np.ones((9, 9, 9, 2), "float32"), np.eye(4)), folder / "a.nii")
    refused_t1(folder / "a.nii")


@bad("oblique T1", "found them oblique by 20 degrees")
def _(folder):
    angle = np.radians(20)
    turn = np.eye(4)
    turn[1:3, 1:3] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    refused_t1(reoriented(t1_image(folder / "a.nii", 2), turn))


@bad("T1 named native", "MNI152 space, found space-T1w")
def _(folder):
    refused_t1(t1_image(folder / "sub-1_space-T1w_desc-preproc_T1w.nii", 2))


@bad("T1 elsewhere", "a.nii in MNI152 space, found a correlation of .* with the template")
def _(folder):
    refused_t1(t1_image(folder / "a.nii", 2, shift=35))


bad("T1 back to front", "back to front it fits better")(
    lambda d: refused_t1(t1_image(d / "a.nii", 2, turn=lambda t: t[:, ::-1]))
)
bad("T1 upside down", "upside down it fits better")(
    lambda d: refused_t1(t1_image(d / "a.nii", 2, turn=lambda t: t[:, :, ::-1]))
)
bad("T1 with its skull", "Skull-strip it or give its brain mask")(
    lambda d: refused_t1(t1_image(d / "a.nii", 2, turn=lambda t: t + 100))
)
bad("constant T1", "a brain in a.nii, found 0 everywhere")(
    lambda d: refused_t1(t1_image(d / "a.nii", 2, turn=lambda t: 0 * t))
)
bad("NaN in a T1", "numbers in a.nii, found NaN")(
    lambda d: refused_t1(t1_image(d / "a.nii", 2, turn=lambda t: np.where(t > 500, np.nan, t)))
)
bad("noise as T1", "in MNI152 space|Skull-strip")(
    lambda d: refused_t1(
        t1_image(d / "a.nii", 2, turn=lambda t: np.random.default_rng(0).uniform(0, 9, t.shape))
    )
)
bad("half a brain", "in MNI152 space, found .* ml of brain")(
    lambda d: refused_t1(
        t1_image(d / "a.nii", 2, turn=lambda t: t * (np.arange(160) < 70)[:, None, None])
    )
)
bad("empty mask", "found 0 everywhere. Give the brain mask")(
    lambda d: refused_t1(
        t1_image(d / "a.nii", 2), t1_image(d / "mask.nii", 2, turn=lambda t: 0 * t)
    )
)
bad("T1 voxel that does not fit", "5 mm does not divide")(
    lambda d: anatomy_file.read_t1(t1_image(d / "a.nii", 2), voxel_mm=5)
)


# --- tables of scans and participants ---


def joined(text, name="participants.tsv"):
    def use(folder):
        (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())
        people = pd.DataFrame({"subject": ["sub-1"], "participant": ["sub-1"]})
        return derivatives_file.join_phenotypes(people, folder / name)

    return use


bad("no participant_id", "a column participant_id, found id, age")(joined("id\tage\n1\t2\n"))
bad("participant twice", "one line a participant, found several for 1")(
    joined("participant_id\tage\nsub-1\t2\n1\t3\n")
)
bad("reserved column", "columns that bhx does not use itself, found coverage")(
    joined("participant_id\tcoverage\n1\t2\n")
)
bad("other ids", "phenotypes of these participants, found ids like 7")(
    joined("participant_id\tage\n7\t2\n")
)
bad("binary participants", "a table of participants in .*, found UnicodeDecodeError")(
    joined(b"\xff\xfe\x00\x81\n")
)
bad("no rows", "rows with a column 'subject', found 0 rows")(
    lambda d: prepare_file.prepare(pd.DataFrame({"subject": []}), d / "c.zarr")
)
bad("rows without ids", "found 1 rows with bold")(
    lambda d: prepare_file.prepare(pd.DataFrame({"bold": ["a.tsv"]}), d / "c.zarr")
)
bad("ids twice", "unique subject ids, found a more than once")(
    lambda d: prepare_file.prepare(pd.DataFrame({"subject": ["a", "a"]}), d / "c.zarr")
)
bad("no such folder", "a folder of derivatives, found none")(
    lambda d: prepare_file.prepare(d / "nowhere", d / "c.zarr")
)
bad("an empty folder", "found tasks: none")(lambda d: prepare_file.prepare(d, d / "c.zarr"))


@pytest.mark.parametrize("name", CASES)
def test_bad_input_gets_its_message(name, tmp_path):
    use, message = CASES[name]
    with pytest.raises(InputError) as caught:
        use(tmp_path)
    sentence = str(caught.value)
    assert re.search(message, sentence), sentence
    assert sentence.startswith(("Expected", "A T1"))
    assert caught.value.help


def test_there_are_enough_of_them():
    assert len(CASES) >= 40
    assert len({json.dumps(message) for _, message in CASES.values()}) >= 40
