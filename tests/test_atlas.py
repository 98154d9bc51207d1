"""What a shipped atlas must hold, and the tables and scans it must agree with."""

import csv
import gzip
import socket
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
import xarray as xr
from make_assets import adjacency, harmonics_of_both, parcel_means
from small_cohorts import brains_of

from bhx.data.atlas import load_atlas, load_mesh, load_sample, load_sulc, match_names, reparcellate
from bhx.data.geometry import gradients
from bhx.errors import InputError

DATA = Path(__file__).parent / "data"
NETWORKS = ["Vis", "SomMot", "DorsAttn", "SalVentAttn", "Limbic", "Cont", "Default"]
PER_NETWORK = {  # left, right; Schaefer et al. 2018
    100: ([9, 6, 8, 7, 3, 4, 13], [8, 8, 7, 5, 2, 9, 11]),
    200: ([14, 16, 13, 11, 6, 13, 27], [15, 19, 13, 11, 6, 17, 19]),
    400: ([31, 37, 23, 22, 13, 22, 52], [30, 40, 23, 25, 13, 30, 39]),
}


@pytest.fixture(scope="module", params=[100, 200, 400])
def any_atlas(request):
    return load_atlas(f"schaefer{request.param}")


@pytest.fixture(scope="module")
def atlas():
    return load_atlas("schaefer400")


@pytest.fixture(scope="module")
def atlas17():
    return load_atlas("schaefer400", order="17networks")


@pytest.fixture(scope="module")
def cortex():
    """fsaverage5, both hemispheres as one mesh of two pieces."""
    (left, faces), (right, more) = load_mesh("white", "left"), load_mesh("white", "right")
    return np.concatenate([left, right]), np.concatenate([faces, more + len(left)])


@pytest.fixture(scope="module")
def neighbours(atlas, cortex):
    """Which parcels touch on fsaverage5: array (roi, roi)."""
    labels = atlas.labels_fsaverage5.values
    a, b = labels[np.stack(adjacency(cortex[1], len(labels)).nonzero())]
    touch = np.zeros((401, 401))
    touch[a[a != b], b[a != b]] = 1
    return touch[1:, 1:]


def moran(values, neighbours):
    """Moran's I: how alike the values of neighbours are; about 0 for values in any order."""
    centred = values - values.mean()
    return (neighbours * np.outer(centred, centred)).mean() / neighbours.mean() / centred.var()


def test_every_variable_is_labeled_and_finite(any_atlas):
    n = any_atlas.sizes["roi"]
    assert dict(any_atlas.sizes) == {
        "roi": n, "mode": 200, "component": 30, "roi_other": n, "axis": 3,
        "vertex_fsaverage5": 20_484, "vertex_fslr32k": 64_984,
    }  # fmt: skip
    assert any_atlas.indexes["roi"].is_unique
    assert any_atlas.indexes["roi"].equals(any_atlas.indexes["roi_other"])
    for variable in any_atlas.data_vars.values():
        assert np.isfinite(variable).all()
    np.testing.assert_allclose(np.linalg.norm(any_atlas.sphere, axis=1), 1, rtol=1e-6)
    np.testing.assert_array_equal(any_atlas.connectome, any_atlas.connectome.T)
    np.testing.assert_array_equal(np.diag(any_atlas.connectome), 1)


def test_every_array_tells_where_it_comes_from_and_its_licence(any_atlas):
    for told in (any_atlas, *any_atlas.data_vars.values(), any_atlas.mni_x, any_atlas.mni_z):
        assert told.attrs["provenance"]
        assert "BSD-3" in told.attrs["licence"] or "MIT" in told.attrs["licence"]


def test_parcels_per_network_and_hemisphere_are_the_published_ones(any_atlas):
    for hemi, counts in zip("LR", PER_NETWORK[any_atlas.sizes["roi"]], strict=True):
        networks = any_atlas.network[any_atlas.hemi.values == hemi].values
        runs = networks[np.flatnonzero(np.r_[True, networks[1:] != networks[:-1]])]
        assert runs.tolist() == NETWORKS
        assert [int((networks == name).sum()) for name in NETWORKS] == counts


def test_both_label_maps_hold_every_parcel_in_its_hemisphere(any_atlas):
    n = any_atlas.sizes["roi"]
    for space in ("labels_fsaverage5", "labels_fslr32k"):
        labels = any_atlas[space]
        assert labels.dtype == np.int16
        left, right = labels.values.reshape(2, -1)
        assert sorted({*left.tolist()}) == list(range(n // 2 + 1))
        assert sorted({*right.tolist()}) == [0, *range(n // 2 + 1, n + 1)]


def test_derived_labels_agree_with_the_published_as_stated(atlas):
    with np.load(DATA / "schaefer400_fsaverage5_published.npz") as file:
        published = file["labels"]
    labels = atlas.labels_fsaverage5
    share = (labels.values == published)[published > 0].mean()
    assert share > 0.85
    assert labels.attrs["agreement"] == pytest.approx(share)


def test_parcels_lie_at_their_published_centroids(any_atlas, cortex):
    """In MNI305, so up to some mm off; a wrong number or name would put a parcel far away."""
    n = any_atlas.sizes["roi"]
    middle = parcel_means(cortex[0], any_atlas.labels_fsaverage5.values, n)
    published = np.stack([any_atlas[f"mni_{axis}"].values for axis in "xyz"], axis=1)
    distance = np.linalg.norm(middle[:, None] - published[None], axis=2)
    assert np.median(np.diag(distance)) < 6
    assert np.diag(distance).max() < 17
    assert (distance.argmin(axis=1) == np.arange(n)).mean() > 0.93


def test_the_table_of_both_orders_is_the_published_one(atlas, atlas17):
    with gzip.open(DATA / "schaefer400_orders.csv.gz", "rt") as file:
        rows = list(csv.DictReader(file))
    assert atlas17.roi.values.tolist() == [row["name17"] for row in rows]
    assert atlas17.name7.values.tolist() == [row["name7"] for row in rows]
    assert atlas17.label.values.tolist() == [int(row["id7"]) for row in rows]
    assert atlas17.mni_y.values.tolist() == [float(row["A"]) for row in rows]
    by_7 = sorted(rows, key=lambda row: int(row["id7"]))
    assert atlas.roi.values.tolist() == [row["name7"] for row in by_7]


def test_both_orders_hold_the_same_values_for_each_parcel(atlas, atlas17):
    assert (atlas17.roi.values != atlas.name17.values).sum() == 396  # 4 of 400 keep their place
    renamed = atlas17.assign_coords(roi=atlas17.name7.values, roi_other=atlas17.name7.values)
    xr.testing.assert_equal(renamed.sel(roi=atlas.roi, roi_other=atlas.roi_other), atlas)
    assert (atlas.attrs["order"], atlas17.attrs["order"]) == ("7networks", "17networks")


def test_selecting_names_aligns_everything_on_roi(atlas):
    names = np.random.default_rng(0).permutation(atlas.roi.values)[:50]
    chosen = atlas.sel(roi=names)
    assert chosen.name7.values.tolist() == names.tolist()
    numbers = chosen.label.values - 1
    np.testing.assert_array_equal(chosen.harmonics, atlas.harmonics.values[numbers])
    np.testing.assert_array_equal(chosen.connectome, atlas.connectome.values[numbers])


def test_the_first_mode_tells_left_from_right_and_the_rest_live_on_one_side(any_atlas):
    left = any_atlas.hemi.values == "L"
    modes = any_atlas.harmonics.values
    assert len(np.unique(modes[left, 0])) == len(np.unique(modes[~left, 0])) == 1
    assert modes[left, 0][0] * modes[~left, 0][0] < 0
    assert (modes[left, 1:].any(axis=0) ^ modes[~left, 1:].any(axis=0)).all()
    assert (np.diff(any_atlas.eigenvalue) > 0).all()


def test_harmonics_are_those_of_another_mesh_of_the_same_cortex(atlas, cortex):
    """fsaverage5 is another sampling of another group's cortex; its slow modes are the same."""
    labels = atlas.labels_fsaverage5.values
    _, modes = harmonics_of_both(*cortex, labels > 0, 14)
    other = parcel_means(modes[:, 1:], labels, 400)
    likeness = np.abs(np.corrcoef(atlas.harmonics[:, :9].T, other.T)[:9, 9:])
    assert (likeness.max(axis=1) > 0.95).all()


def test_harmonics_and_gradients_are_in_the_order_of_their_names(atlas, atlas17, neighbours):
    """Slow modes are alike in parcels that touch, unless they are in the other order."""
    for name, columns, margin in (("harmonics", range(1, 10), 0.3), ("gradients", range(3), 0.1)):
        for i in columns:
            own = moran(atlas[name][:, i].values, neighbours)
            other = moran(atlas17[name][:, i].values, neighbours)
            assert own > other + margin
    assert moran(atlas.harmonics[:, 1].values, neighbours) > 0.9


def test_gradients_can_be_repeated_from_the_connectome(any_atlas):
    again = gradients(any_atlas.connectome, 30)
    np.testing.assert_allclose(again, any_atlas.gradients, atol=1e-6)


def test_the_connectome_is_stronger_within_networks(any_atlas):
    network = any_atlas.network.values
    same = network[:, None] == network[None]
    np.fill_diagonal(same, False)
    other = ~same & ~np.eye(len(network), dtype=bool)
    assert (
        any_atlas.connectome.values[same].mean() > 1.5 * any_atlas.connectome.values[other].mean()
    )


def test_changing_one_copy_leaves_the_next_as_shipped():
    first = load_atlas("schaefer100")
    first.harmonics[:] = 0
    first.network.values[:] = "none"
    assert load_atlas("schaefer100").harmonics.any()
    assert "none" not in load_atlas("schaefer100").network.values


def test_names_are_found_in_any_order_and_either_naming(atlas, atlas17):
    shuffled = np.random.default_rng(0).permutation(400)
    expected = atlas.roi.values[shuffled].tolist()
    for given in (atlas.name7, atlas.name17):
        names = given.values[shuffled]
        bare = [name.split("_", 1)[1] for name in names]
        for form in (names, names.tolist(), bare, [name.encode() for name in bare]):
            assert match_names(form, atlas) == expected
    assert match_names(atlas.roi, atlas17) == atlas17.roi.sortby(atlas17.label).values.tolist()
    assert match_names(atlas.roi, "schaefer400") == atlas.roi.values.tolist()


@pytest.mark.parametrize(
    "change, sentence",
    [
        (lambda n: n[:-2], "400 parcels of schaefer400, found 398 names; missing: 7Networks_RH_D"),
        (lambda n: ["Background", *n], "found 401 names; unknown: Background"),
        (lambda n: ["V1", *n[1:]], "unknown: V1; missing: 7Networks_LH_Vis_1"),
        (lambda n: [*n, "LH_Vis_1"], "found 401 names; repeated: 7Networks_LH_Vis_1"),
        (lambda n: load_atlas("schaefer100").roi.values, "found 100 names; "),
        (lambda n: range(400), "unknown: 0, 1, 2, 3, 4 and 395 more; missing: .* and 395 more"),
        (lambda n: [], "found 0 names"),
    ],
)
def test_names_that_do_not_fit_are_told(atlas, change, sentence):
    with pytest.raises(InputError, match=sentence):
        match_names(change(atlas.roi.values.tolist()), atlas)


@pytest.mark.parametrize(
    "call, sentence",
    [
        (lambda: load_atlas("schaefer300"), "schaefer100, schaefer200, schaefer400, found 'sch"),
        (lambda: load_atlas(order="yeo"), "7networks, 17networks, found 'yeo'"),
        (lambda: load_atlas("schaefer100", order="17networks"), "known for schaefer400 only"),
        (lambda: load_mesh("cortex"), "found 'cortex'"),
        (lambda: load_sulc("both"), "found 'both'"),
    ],
)
def test_what_is_not_shipped_is_told(call, sentence):
    with pytest.raises(InputError, match=sentence):
        call()


def test_nothing_is_fetched(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a connection was tried")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)
    assert load_atlas("schaefer200").sizes["roi"] == 200
    assert load_sample().sizes["roi"] == 400
    assert len(load_mesh("pial", "right")[0]) == len(load_sulc("right"))


def test_the_assets_are_small():
    sizes = {f.name: f.stat().st_size for f in Path(str(files("bhx") / "assets")).iterdir()}
    assert sizes.pop("sample.npz") <= 1e6
    assert sum(sizes.values()) <= 3e6


def test_the_sample_is_a_scan_in_the_order_of_its_names(atlas, atlas17):
    sample = load_sample()
    assert sample.bold.dims == ("roi", "time")
    assert (sample.bold.dtype, sample.bold.shape) == (np.float32, (400, 652))
    assert (sample.attrs["tr"], sample.attrs["atlas"]) == (1.4, "schaefer400")
    assert all(sample.attrs[key] for key in ("source", "licence", "preprocessing"))
    assert match_names(sample.roi, atlas) == atlas.roi.values.tolist()
    assert (sample.bold.std("time") > 0).all()
    pairs = np.triu_indices(400, 1)
    own = np.corrcoef(sample.bold)[pairs]
    likeness = np.corrcoef(own, atlas.connectome.values[pairs])[0, 1]
    assert likeness > 0.35
    assert likeness > 3 * abs(np.corrcoef(own, atlas17.connectome.values[pairs])[0, 1])


@pytest.mark.parametrize("hemi", ["left", "right"])
def test_meshes_share_their_vertices_and_are_closed(hemi):
    meshes = {name: load_mesh(name, hemi) for name in ("inflated", "pial", "white", "sphere")}
    for coords, faces in meshes.values():
        assert (coords.dtype, coords.shape) == (np.float32, (10_242, 3))
        assert (faces.dtype, faces.shape) == (np.int32, (20_480, 3))
        n_edges = adjacency(faces, len(coords)).nnz / 2
        assert len(coords) - n_edges + len(faces) == 2  # Euler: one sphere
    inward = meshes["white"][0].mean(axis=0)
    assert (inward[0] < 0) == (hemi == "left")
    radius = np.linalg.norm(meshes["sphere"][0], axis=1)
    np.testing.assert_allclose(radius, 100, rtol=1e-3)
    flat, cut = load_mesh("flat", hemi)
    assert len(flat) == 10_242
    assert not flat[cut, 2].any()
    assert {*map(frozenset, cut.tolist())} < {*map(frozenset, faces.tolist())}


def test_sulcal_depth_is_positive_in_sulci():
    for hemi in ("left", "right"):
        pial, inflated = load_mesh("pial", hemi)[0], load_mesh("inflated", hemi)[0]
        outward = np.linalg.norm(pial - pial.mean(0), axis=1)
        smooth = np.linalg.norm(inflated - inflated.mean(0), axis=1)
        out_of_shape = outward - np.polyval(np.polyfit(smooth, outward, 1), smooth)
        assert np.corrcoef(load_sulc(hemi), out_of_shape)[0, 1] < -0.3


def test_whatever_has_parcels_is_reparcellated():
    """Measures of parcels as series are: means of the parcels that share their vertices."""
    cohort = brains_of(2)
    thickness = xr.DataArray(np.full((2, 100, 3), 2.5), dims=("subject", "roi", "measure"))
    cohort = cohort.assign(thickness=thickness)
    finer = reparcellate(cohort, "schaefer200")
    assert finer.bold.dims == ("subject", "roi", "time")
    assert finer.thickness.dims == ("subject", "roi", "measure")
    np.testing.assert_allclose(finer.thickness, 2.5, rtol=1e-6)
    assert finer.roi.values.tolist() == load_atlas("schaefer200").roi.values.tolist()
    assert finer.attrs["parcellated_from"] == "schaefer100"
