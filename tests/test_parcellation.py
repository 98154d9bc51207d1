"""An atlas of one's own: equal to the shipped one from the same labels, refused where its source
cannot be right, and used wherever a shipped one is."""

import json
import re

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import xarray as xr
from small_files import ATLAS, affine_of, label_image, parcel_series, sidecar, table, volume
from tiny_runs import QUICK, TINY

import bhx
from bhx.data import atlas as atlas_file
from bhx.data.atlas import atlas_of, centroids, load_atlas
from bhx.data.geometry import gradients
from bhx.data.parcellation import build_atlas
from bhx.errors import InputError

DEEP = {"Thalamus": (11, -18, 8), "Putamen": (26, 1, 0), "Hippocampus": (26, -21, -14)}


def coordinates(step=2):
    """A table of every second Schaefer-100 parcel, and of deep regions of both sides."""
    parcels = load_atlas(ATLAS).isel(roi=slice(None, None, step))
    cortex = pd.DataFrame(centroids(parcels), columns=[*"xyz"]).assign(name=parcels.roi.values)
    deep = [
        (s * x, y, z, f"{n}_{h}") for n, (x, y, z) in DEEP.items() for s, h in ((-1, "L"), (1, "R"))
    ]
    return pd.concat([cortex, pd.DataFrame(deep, columns=[*"xyz", "name"])], ignore_index=True)


@pytest.fixture(scope="module")
def mine():
    return build_atlas(coordinates(), name="mine")


@pytest.fixture
def forgotten(monkeypatch):
    """As in a new session, in which no atlas was built."""
    return lambda: monkeypatch.setattr(atlas_file, "_OWN", {})


def people(atlas, n=8, volumes=80):
    series = [parcel_series(volumes, seed, atlas).T for seed in range(n)]
    labels = pd.DataFrame(
        {"age": np.arange(20.0, 20 + n), "site": "A"}, [f"p{i}" for i in range(n)]
    )
    return series, labels


# Sources ---


def gifti_labels(folder):
    """Schaefer-100 of fsLR-32k as label files, with its names."""
    shipped = load_atlas(ATLAS)
    for side, numbers in zip("LR", np.split(shipped.labels_fslr32k.values, 2), strict=True):
        image = nib.GiftiImage(darrays=[nib.gifti.GiftiDataArray(numbers.astype("int32"))])
        for key, name in enumerate(["???", *shipped.roi.values]):
            label = nib.gifti.GiftiLabel(key, 0.5, 0.5, 0.5, 1)
            label.label = str(name)
            image.labeltable.labels.append(label)
        nib.save(image, folder / f"schaefer.{side}.label.gii")
    return folder / "schaefer.L.label.gii"


def test_surface_labels_give_what_is_shipped(tmp_path):
    shipped, own = load_atlas(ATLAS), build_atlas(gifti_labels(tmp_path), name="surf")
    assert own.roi.values.tolist() == shipped.roi.values.tolist()
    assert own.hemi.values.tolist() == shipped.hemi.values.tolist()
    for kind in ("labels_fslr32k", "labels_fsaverage5"):
        np.testing.assert_array_equal(own[kind], shipped[kind])
    assert (own.network.values == shipped.network.values).mean() > 0.9
    assert np.linalg.norm(centroids(own) - centroids(shipped), axis=1).max() < 10
    angles = [(x.sphere.values[:50] @ x.sphere.values[:50].T).ravel() for x in (own, shipped)]
    assert np.corrcoef(angles)[0, 1] > 0.98  # the two spheres differ by a rotation
    for n in (10, 50):  # one space of modes, though pairs of left and right may change places
        a, b = (np.linalg.qr(x.harmonics.values[:, :n].astype(float))[0] for x in (own, shipped))
        assert np.linalg.norm(a.T @ b) ** 2 / n > 0.9
    left = own.harmonics.values[:, 0] > 0  # the first tells left from right, as shipped
    assert ((left == left[0]) == (own.hemi.values == own.hemi.values[0])).all()
    pairs = np.triu_indices(100, 1)
    carried = np.corrcoef(own.connectome.values[pairs], shipped.connectome.values[pairs])[0, 1]
    assert carried > 0.9


def test_annotations_drop_what_is_no_region_and_tell_sides_apart(tmp_path):
    rng = np.random.default_rng(0)
    for hemi in ("lh", "rh"):
        labels = rng.integers(0, 4, 163_842)
        colors = np.c_[rng.integers(0, 255, (4, 3)), np.zeros(4, int)]
        names = ["unknown", "bankssts", "cuneus", "corpuscallosum"]
        path = tmp_path / f"{hemi}.aparc.annot"
        nib.freesurfer.write_annot(path, labels, colors, names, fill_ctab=True)
    own = build_atlas([tmp_path / "lh.aparc.annot", tmp_path / "rh.aparc.annot"], name="dk")
    assert own.roi.values.tolist() == ["L_bankssts", "L_cuneus", "R_bankssts", "R_cuneus"]
    read = nib.freesurfer.read_annot(tmp_path / "rh.aparc.annot")[0][:10_242]
    right = own.labels_fsaverage5.values[10_242:]
    np.testing.assert_array_equal(right, np.select([read == 1, read == 2], [3, 4], 0))


def dlabel(path, deep):
    """Schaefer-100 on fsLR-32k and one deep region of voxels, as CIFTI labels."""
    shipped = load_atlas(ATLAS)
    brain = None
    for side, numbers in zip(
        ("LEFT", "RIGHT"), np.split(shipped.labels_fslr32k.values, 2), strict=True
    ):
        at = np.flatnonzero(numbers)
        part = nib.cifti2.BrainModelAxis.from_surface(at, 32_492, f"CORTEX_{side}")
        brain = part if brain is None else brain + part
    affine, shape = affine_of(4, "RAS")
    voxels = np.rint(nib.affines.apply_affine(np.linalg.inv(affine), deep)).astype(int)
    mask = np.zeros(shape, bool)
    mask[tuple(voxels)] = True
    brain += nib.cifti2.BrainModelAxis.from_mask(mask, "THALAMUS_LEFT", affine)
    names = dict(enumerate(["???", *shipped.roi.values, "Thalamus_L"]))
    key = nib.cifti2.LabelAxis(["own"], [{k: (str(n), (1, 1, 1, 1)) for k, n in names.items()}])
    labels = shipped.labels_fslr32k.values
    data = np.append(labels[labels > 0], 101).astype("float32")[None]
    nib.save(nib.Cifti2Image(data, (key, brain)), path)
    return nib.affines.apply_affine(affine, voxels)


def test_cifti_labels_bring_deep_regions(tmp_path):
    where = dlabel(tmp_path / "own.dlabel.nii", (-11, -18, 8))
    own, shipped = build_atlas(str(tmp_path / "own.dlabel.nii"), name="cifti"), load_atlas(ATLAS)
    assert own.roi.values.tolist() == [*shipped.roi.values, "Thalamus_L"]
    np.testing.assert_array_equal(own.labels_fslr32k, shipped.labels_fslr32k)
    np.testing.assert_allclose(centroids(own)[-1], where)
    last = own.isel(roi=-1)
    assert (last.hemi, last.network, last.vertices) == ("L", "none", 0)
    assert np.isnan(last.sphere).all()


def test_a_label_image_gives_centroids_and_the_labels_of_its_cortex(tmp_path):
    numbers = np.arange(1, 101) * 3  # gaps
    path, shipped = label_image(tmp_path / "labels.nii.gz", numbers=numbers), load_atlas(ATLAS)
    names = {int(n): str(name) for n, name in zip(numbers, shipped.roi.values, strict=True)}
    own = build_atlas(path, name="image", names=names)
    image = nib.load(path)
    data = np.asarray(image.dataobj)
    for i in (0, 40, 99):
        mean = nib.affines.apply_affine(image.affine, np.argwhere(data == 3 * (i + 1))).mean(0)
        np.testing.assert_allclose(centroids(own)[i], mean)
    assert own.label.values.tolist() == numbers.tolist()
    assert own.roi.values.tolist() == shipped.roi.values.tolist()
    assert {*np.unique(own.labels_fsaverage5)} <= {0, *numbers}
    mine = own.labels_fsaverage5.values // 3
    both = (mine > 0) & (shipped.labels_fsaverage5.values > 0)
    assert (mine == shipped.labels_fsaverage5.values)[both].mean() > 0.6  # balls around centers
    np.testing.assert_array_equal(
        own.vertices, np.bincount(own.labels_fsaverage5, minlength=301)[numbers]
    )


def test_what_nilearn_fetches_is_taken_as_it_is(tmp_path):
    path = label_image(tmp_path / "labels.nii.gz")
    names = ["Background", *load_atlas(ATLAS).roi.values]
    own = build_atlas({"maps": str(path), "labels": names, "description": "x"}, name="fetched")
    assert own.roi.values.tolist() == names[1:]


def test_coordinates_take_the_vertices_around_them(mine):
    given = coordinates()
    np.testing.assert_allclose(centroids(mine), given[[*"xyz"]])
    deep = mine.sel(roi=given.name[-6:].values)
    assert (deep.vertices == 0).all()
    assert (mine.vertices[:-6] > 0).all()
    assert deep.hemi.values.tolist() == ["L", "R"] * 3
    assert len(np.unique(deep.harmonics.values.round(8), axis=0)) == 6
    sizes = (np.sqrt((part.harmonics.values**2).mean()) for part in (deep, mine))
    assert 0.01 < np.divide(*sizes) < 10


def test_names_alone_have_their_gradients_as_their_place():
    rng = np.random.default_rng(0)
    connectome = np.corrcoef(rng.standard_normal((40, 12)) @ rng.standard_normal((12, 60)))
    names = [f"region {i} {side}" for i in range(20) for side in ("left", "right")]
    with pytest.warns(UserWarning, match="no place: neither coordinates nor a connectome"):
        bare = build_atlas(names, name="bare")
    assert not bare.gradients.any()
    assert "labels_fsaverage5" not in bare
    own = build_atlas(names, name="bare", connectome=connectome)
    np.testing.assert_allclose(own.gradients, gradients(connectome, 30), rtol=1e-4)
    assert own.hemi.values.tolist() == ["L", "R"] * 20
    with pytest.raises(InputError, match="labels_fsaverage5 of the atlas bare, found none"):
        bhx.plot_surface(own.gradients[:, 0])


def test_networks_are_those_of_the_table_where_it_names_them():
    given = coordinates().assign(network="mine")
    assert {*build_atlas(given, name="named").network.values} == {"mine"}


def test_a_connectome_by_name_is_put_in_order(mine):
    rng = np.random.default_rng(0)
    values = np.corrcoef(rng.standard_normal((mine.sizes["roi"], 30)))
    frame = pd.DataFrame(values, mine.roi.values, mine.roi.values)
    mixed = frame.sample(frac=1, random_state=1)
    mixed = mixed[mixed.index]
    own = build_atlas(coordinates(), name="ordered", connectome=mixed)
    np.testing.assert_allclose(own.connectome, values, rtol=1e-5)


# Refused ---


def image_of(change, path):
    """The label image of Schaefer-100 with other numbers or another affine."""
    image = nib.load(label_image(path))
    numbers, affine = change(np.asarray(image.dataobj), image.affine.copy())
    nib.save(nib.Nifti1Image(numbers, affine), path)
    return path


def shifted(affine, mm):
    affine[1, 3] += mm
    return affine


BAD_IMAGES = {
    "int8": (lambda n, a: ((n + 60).astype("uint8").view("int8"), a), "labels from 0 on"),
    "shares": (lambda n, a: (n / 3, a), "whole numbers in 3D"),
    "4D": (lambda n, a: (np.stack([n, n], -1), a), "whole numbers in 3D"),
    "empty": (lambda n, a: (0 * n, a), "whole numbers in 3D"),
    "no affine": (lambda n, a: (n, np.eye(4)), "in MNI152 space in bad.nii.gz, found .*% of them"),
    "another space": (lambda n, a: (n, shifted(a, 70)), "in MNI152 space in bad.nii.gz"),
    "turned": (lambda n, a: (n.transpose(2, 1, 0), a), "in MNI152 space|side that their names say"),
    "flipped": (lambda n, a: (n[::-1], a), "side that their names say, found .* on the other"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD_IMAGES)
def test_images_that_cannot_be_right_are_refused(kind, tmp_path):
    change, sentence = BAD_IMAGES[kind]
    path = image_of(change, tmp_path / "bad.nii.gz")
    with pytest.raises(InputError, match=sentence):
        build_atlas(path, name="bad", names=load_atlas(ATLAS).roi.values)


def named(names):
    return lambda folder: build_atlas(label_image(folder / "a.nii.gz"), name="bad", names=names)


def placed(change):
    return lambda folder: build_atlas(change(coordinates()), name="bad")


def times(factor):
    return lambda t: t.assign(**{c: factor * t[c] for c in "xyz"})


NAMES = load_atlas(ATLAS).roi.values.tolist()
BAD = {
    "fewer names": (named(NAMES[1:]), "a name for each of 100 regions, found 99"),
    "names of others": (named({n: str(n) for n in range(2, 102)}), "found none or several for 1"),
    "a name twice": (named([*NAMES[:99], NAMES[0]]), f"found again {NAMES[0]}"),
    "sides exchanged": (named(NAMES[::-1]), "on the side that their names say, found .* of"),
    "no names": (named(pd.DataFrame({"number": [1]})), "columns label and name, found number"),
    "metres": (placed(times(0.001)), "MNI coordinates in mm, .* found 0.0"),
    "voxels": (placed(lambda t: t.assign(x=(t.x + 90) / 2, y=t.y + 126)), "in mm, left of 0"),
    "far away": (placed(lambda t: t.assign(z=t.z + 50)), "in MNI152 space in the table"),
    "no column": (placed(lambda t: t.drop(columns="name")), "a column name, found x, y, z"),
    "a shipped name": (lambda d: build_atlas(coordinates(), name=ATLAS), "no shipped atlas has"),
    "no vertices": (lambda d: build_atlas(["a"], name="one"), "two or more regions"),
    "small connectome": (
        lambda d: build_atlas(coordinates(), name="x", connectome=np.eye(3)), "56 x 56 .*\\(3, 3",
    ),
    "no such file": (lambda d: build_atlas(d / "none.nii.gz", name="x"), "a file at"),
    "half a surface": (lambda d: build_atlas(d / "L.gii", name="x"), "a hemisphere in the name"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD)
def test_regions_that_cannot_be_right_are_refused(kind, tmp_path):
    use, sentence = BAD[kind]
    with pytest.raises(InputError, match=sentence):
        use(tmp_path)


# Saved, carried, used ---


@pytest.mark.parametrize("kind", ["nc", "zarr"])
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore:The data type")
def test_a_saved_atlas_is_the_same(mine, tmp_path, kind, forgotten):
    path = tmp_path / f"mine.{kind}"
    mine.to_netcdf(path) if kind == "nc" else mine.to_zarr(path)
    forgotten()
    with pytest.raises(InputError, match="found 'mine'"):
        load_atlas("mine")
    xr.testing.assert_identical(load_atlas(path), mine)
    xr.testing.assert_identical(load_atlas("mine"), mine)


def test_what_is_no_atlas_is_refused(tmp_path):
    with pytest.raises(InputError, match="Expected an atlas, found a Dataset of nothing"):
        load_atlas(xr.Dataset())
    with pytest.raises(InputError, match="an atlas at .*none.nc"):
        load_atlas(tmp_path / "none.nc")


def test_it_travels_in_cohort_weights_and_latents(mine, tmp_path, forgotten):
    """Each of them opened in a new session draws, removes and turns its own parcels."""
    series, labels = people(mine)
    cohort = bhx.as_cohort(series, labels, atlas=mine, tr=2.0)
    bhx.save_cohort(cohort, tmp_path / "cohort.zarr")
    forgotten()
    cohort = bhx.open_cohort(tmp_path / "cohort.zarr")
    own = atlas_of(cohort)
    xr.testing.assert_equal(own, mine.assign_coords(own.coords))
    settings = {**QUICK, "steps": 2, "preset": TINY.on_atlas("mine", mine.sizes["roi"])}
    bhx.pretrain(cohort, stage="dynamics", out=tmp_path / "run", **settings)
    forgotten()
    model = bhx.load_model(tmp_path / "run")
    latents = bhx.embed(cohort, model, store=tmp_path / "l.zarr", keep=("attention",))
    assert latents.attrs["atlas"] == "mine"
    forgotten()
    latents = bhx.embed(cohort, model, store=tmp_path / "l.zarr", keep=("attention",))
    values = bhx.region_map(latents)
    traces = bhx.plot_surface(values).data
    dots = np.concatenate([t.marker.color for t in traces if t.name.endswith("off the cortex")])
    assert sorted(dots) == sorted(values.values[-6:].tolist())
    drawn = np.concatenate([t.intensity for t in traces if t.name.endswith("values")])
    np.testing.assert_allclose(np.unique(drawn), np.unique(values.values[:-6].astype("f4")))
    tested = bhx.spin_test(values, "network", atlas_of(latents), n_spins=20)
    assert "none" not in tested.network.values
    moved = bhx.lesion(cohort, model, roi=cohort.roi[-6:].values)
    assert (moved.moved > 0).any()
    assert bhx.explore(latents).panels


def test_presets_take_the_parcels_of_an_atlas(mine):
    config = bhx.random_model("workshop", atlas=mine).config
    assert (config.atlas, config.dynamics.parcels) == ("mine", 56)
    harmonizer, before = config.harmonizer, bhx.PRESETS["workshop"].harmonizer
    for name, new, old in zip(harmonizer.modalities, harmonizer.places, before.places, strict=True):
        on_roi = "roi" in config.modalities[name].dims
        assert new == (old * 56 // 100 if on_roi else old)


def test_two_atlases_of_one_name_are_told_apart(mine):
    series, labels = people(mine)
    cohort = bhx.as_cohort(series, labels, atlas=mine, tr=2.0)
    model = bhx.random_model(TINY, atlas=mine)
    other = coordinates().assign(name=coordinates().name.values[::-1].tolist())
    other.loc[:, "name"] = coordinates().name
    moved = cohort.assign_coords(mni_y=cohort.mni_y + 5)
    with pytest.raises(
        InputError, match="where the model's atlas 'mine' has them, found them elsewh"
    ):
        bhx.embed(moved, model)


def test_a_dotted_region_stays_off_a_figure_of_the_other_side(mine):
    values = xr.DataArray(np.arange(56.0), {"roi": mine.roi}, ["roi"])
    names = {t.name for t in bhx.plot_surface(values, atlas=mine, hemi="left").data}
    assert "left off the cortex" in names
    assert not any(name.startswith("right") for name in names)
    assert len(bhx.plot_surface(values, atlas=mine, static=True).axes) == 7


def test_volumes_and_tables_are_read_on_it(tmp_path):
    path = label_image(tmp_path / "labels.nii.gz", numbers=np.arange(1, 101) * 2)
    own, series = build_atlas(path, name="twos"), parcel_series(60)
    paint = np.zeros((200, 60))
    paint[1::2] = series
    bold = volume(tmp_path / "a_bold.nii.gz", paint, path)
    numbered = table(tmp_path / "b.tsv", series[::-1], [f"ROI_{n}" for n in range(200, 0, -2)])
    rows = pd.DataFrame({"subject": ["a", "b"], "bold": [str(bold), str(numbered)], "tr": 2.0})
    cohort = bhx.prepare(rows, tmp_path / "out.zarr", atlas=own, denoising=None)
    assert cohort.roi.values.tolist() == [f"twos_{n}" for n in range(2, 201, 2)]
    for one in cohort.bold:
        np.testing.assert_allclose(one, series, rtol=1e-4)
    assert atlas_of(cohort).harmonics.equals(own.harmonics)
    again = bhx.prepare(rows, tmp_path / "out.zarr", atlas="twos", denoising=None)
    xr.testing.assert_equal(again, cohort)
    with pytest.raises(InputError, match="the label image of 'mine2' for volumes, found none"):
        bhx.prepare(rows[:1], tmp_path / "x.zarr", atlas=build_atlas(coordinates(), name="mine2"))


def test_a_cohort_is_carried_to_and_from_it(mine):
    series, labels = people(mine)
    cohort = bhx.as_cohort(series, labels, atlas=mine, tr=2.0)
    shipped = bhx.reparcellate(cohort, ATLAS)
    assert shipped.attrs["atlas"] == ATLAS
    assert not any(str(name).startswith("atlas_") for name in shipped.coords)
    back = bhx.reparcellate(shipped, mine)
    assert atlas_of(back).equals(atlas_of(cohort))
    assert np.isnan(back.bold.values[:, -6:]).all()


def test_the_command_prepares_on_a_saved_atlas(mine, tmp_path, capsys):
    from bhx.__main__ import main

    mine.to_netcdf(tmp_path / "mine.nc")
    folder = tmp_path / "in"
    folder.mkdir()
    series = parcel_series(60, 0, mine)
    name = "sub-01_task-rest_space-MNI152NLin6Asym_atlas-Schaefer_timeseries.tsv"
    sidecar(table(folder / name, series, mine.roi.values))
    assert main(
        ["prepare", str(folder), str(tmp_path / "o.zarr"), "--atlas", str(tmp_path / "mine.nc")]
    ) in (0, None)
    assert "1 subjects" in capsys.readouterr().out
    about = json.loads(bhx.open_cohort(tmp_path / "o.zarr").attrs["preprocessing"])
    assert about["atlas"] == "mine"
    assert re.fullmatch("[0-9a-f]{16}", about["atlas_sha256"])
