"""Laws of meshes and connectomes: what rotations, scales, masks and permutations may change."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lapy import Solver, TriaMesh
from make_assets import adjacency, harmonics_of_both, parcel_means
from scipy.spatial import ConvexHull

from bhx.data import atlas as atlas_file
from bhx.data.geometry import (
    MIRROR,
    gradients,
    harmonics,
    normalized_angle,
    random_rotations,
    spins,
)
from bhx.errors import InputError

DATA = Path(__file__).parent / "data"


def ball(n, stretch=(1.0, 1.0, 1.0)):
    """A closed triangle mesh: n points spread evenly over a sphere, then stretched."""
    i = np.arange(n) + 0.5
    z, angle = 1 - 2 * i / n, np.pi * (1 + 5**0.5) * i
    points = np.stack(
        [np.sqrt(1 - z**2) * np.cos(angle), np.sqrt(1 - z**2) * np.sin(angle), z], axis=1
    )
    return points * stretch, ConvexHull(points).simplices


EGG = ball(400, (1.0, 1.3, 1.7))  # no symmetry that would repeat an eigenvalue
SQUARE = (
    np.array([[0, 0, 0], [1, 0, 0], [1, 1, 0], [0, 1, 0]], float),
    np.array([[0, 1, 2], [0, 2, 3]]),
)


@pytest.fixture(scope="module")
def cortex():
    """Left fsaverage5 white surface and the mask without the medial wall."""
    coords, faces = atlas_file.load_mesh("white", "left")
    return coords, faces, atlas_file.load_atlas("schaefer400").labels_fsaverage5.values[:10_242] > 0


def test_modes_of_the_masked_cortex_are_orthonormal_and_its_own(cortex):
    coords, faces, mask = cortex
    values, modes = harmonics(coords, faces, 21, mask)
    number = np.cumsum(mask) - 1
    solver = Solver(TriaMesh(coords[mask].astype(float), number[faces[mask[faces].all(axis=1)]]))
    assert np.isnan(modes[~mask]).all()
    gram = modes[mask].T @ (solver.mass @ modes[mask])
    np.testing.assert_allclose(gram, np.eye(21), atol=1e-8)
    bent = modes[mask].T @ (solver.stiffness @ modes[mask])
    np.testing.assert_allclose(bent, np.diag(values), atol=1e-8)
    largest = np.nanargmax(np.abs(modes), axis=0)
    assert (modes[largest, np.arange(21)] > 0).all()


def test_a_sphere_has_eigenvalues_l_times_l_plus_1():
    values, modes = harmonics(*ball(2500), 16)
    expected = np.repeat([0, 2, 6, 12], [1, 3, 5, 7])
    np.testing.assert_allclose(values, expected, rtol=0.01, atol=1e-9)
    np.testing.assert_allclose(modes[:, 0], 1 / np.sqrt(4 * np.pi), rtol=0.01)


@settings(max_examples=10, deadline=None)
@given(
    seed=st.integers(0, 1000),
    shift=st.tuples(*[st.floats(-1e3, 1e3)] * 3),
    scale=st.floats(1e-2, 1e2),
)
def test_rotation_and_shift_change_nothing_and_scale_divides_by_its_square(seed, shift, scale):
    coords, faces = EGG
    values, modes = harmonics(coords, faces, 12)
    moved, turned = harmonics(coords @ random_rotations(1, seed)[0].T + shift, faces, 12)
    np.testing.assert_allclose(moved, values, rtol=1e-7, atol=1e-9)
    np.testing.assert_allclose(turned, modes, atol=1e-6)
    scaled, _ = harmonics(coords * scale, faces, 12)
    np.testing.assert_allclose(scaled * scale**2, values, rtol=1e-7, atol=1e-9)


def test_order_of_vertices_and_triangles_moves_the_modes_along():
    coords, faces = EGG
    values, modes = harmonics(coords, faces, 12)
    order = np.random.default_rng(0).permutation(len(coords))
    shuffled = np.argsort(order)[faces][::-1]
    again, moved = harmonics(coords[order], shuffled, 12)
    np.testing.assert_allclose(again, values, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(moved, modes[order], atol=1e-7)


def test_two_runs_are_bitwise_equal(cortex):
    first, second = harmonics(*cortex[:2], 5, cortex[2]), harmonics(*cortex[:2], 5, cortex[2])
    assert all(a.tobytes() == b.tobytes() for a, b in zip(first, second, strict=True))


def test_hemispheres_have_the_modes_of_both_and_a_contrast_between_them():
    """The halves are mirror images, so that every eigenvalue comes twice."""
    coords = np.concatenate([EGG[0], EGG[0] @ MIRROR + 9])
    faces = np.concatenate([EGG[1], EGG[1] + len(EGG[0])])
    mask = np.ones(len(coords), bool)
    mask[[7, 407]] = False
    values, modes = harmonics_of_both(coords, faces, mask, 10)
    left, alone = mask & (np.arange(800) < 400), harmonics(*EGG, 5, mask[:400])[0]
    np.testing.assert_allclose(values[:2], 0, atol=1e-12)
    np.testing.assert_allclose(values[2:], np.repeat(alone[1:], 2), rtol=1e-9)
    assert np.ptp(modes[mask, 0]) < 1e-12
    assert max(np.ptp(modes[left, 1]), np.ptp(modes[mask & ~left, 1])) < 1e-12
    assert modes[0, 1] * modes[-1, 1] < 0
    on_left = (modes[left, 2:] ** 2).sum(axis=0) > 0
    on_right = (modes[mask & ~left, 2:] ** 2).sum(axis=0) > 0
    assert (on_left ^ on_right).all()
    solvers = [Solver(TriaMesh(coords[mask], (np.cumsum(mask) - 1)[faces[mask[faces].all(1)]]))]
    gram = modes[mask].T @ (solvers[0].mass @ modes[mask])
    np.testing.assert_allclose(gram, np.eye(10), atol=1e-8)


def test_a_mask_equals_a_mesh_cut_by_hand():
    coords, faces = EGG
    mask = coords[:, 2] < 1.2
    values, modes = harmonics(coords, faces, 8, mask)
    by_hand = harmonics(coords[mask], (np.cumsum(mask) - 1)[faces[mask[faces].all(axis=1)]], 8)
    np.testing.assert_array_equal(values, by_hand[0])
    np.testing.assert_array_equal(modes[mask], by_hand[1])


def test_a_small_mesh_has_all_modes_but_one():
    values, modes = harmonics(*SQUARE, 3)
    assert values[0] == pytest.approx(0, abs=1e-12)
    np.testing.assert_allclose(values[1:], 12)  # one eigenvalue, two modes
    assert np.linalg.matrix_rank(modes) == 3


def changed(array, place, value):
    out = np.array(array)
    out[place] = value
    return out


@pytest.mark.parametrize(
    "mesh, options, sentence",
    [
        ((SQUARE[0][:, :1], SQUARE[1]), {}, "Expected a mesh of coords"),
        ((changed(SQUARE[0], (2, 1), np.nan), SQUARE[1]), {}, "found .* infs or NaNs"),
        ((SQUARE[0], SQUARE[1] + 1), {}, "index 4 is out of bounds"),
        ((SQUARE[0], SQUARE[1] - 1), {}, "negative"),
        ((SQUARE[0], SQUARE[1] * 1.0), {}, "integer"),
        ((SQUARE[0], SQUARE[1][:0]), {}, "no triangles"),
        (SQUARE, {"mask": np.ones(3, bool)}, r"\(3,\) +and requested shape \(4,\)"),
        (SQUARE, {"mask": np.arange(4) < 2}, "no triangles"),
        ((SQUARE[0], np.vstack([SQUARE[1], [[1, 1, 2]]])), {}, "1 degenerate of 3"),
        ((changed(SQUARE[0], 1, [0.5, 0.5, 0]), SQUARE[1]), {}, "1 degenerate of 2"),
        (
            (np.vstack([SQUARE[0], [[0, 0, 1], [1, 1, 1]]]),
             np.vstack([SQUARE[1], [[0, 2, 4], [0, 2, 5]]])),
            {},
            "at most 2 triangles at an edge, found 4",
        ),
        (SQUARE, {"n_modes": 5}, "1 to 3 modes on 4 vertices, found 5"),
        (SQUARE, {"n_modes": 0}, "found 0"),
    ],
)  # fmt: skip
def test_a_faulty_mesh_is_named(mesh, options, sentence):
    with pytest.raises(InputError, match=sentence):
        harmonics(*mesh, **{"n_modes": 2, **options})


def test_parcel_means_are_means_and_leave_out_nan():
    values = np.array([[1.0, 10], [3, 30], [np.nan, np.nan], [5, 50], [7, 70]])
    labels = np.array([1, 1, 1, 2, 0])
    np.testing.assert_array_equal(parcel_means(values, labels, 2), [[2, 20], [5, 50]])
    np.testing.assert_array_equal(parcel_means(values[:, 0], labels, 2), [2, 5])


@pytest.mark.parametrize(
    "labels, n, sentence",
    [
        ([1, 2], 2, "each of 3 vertices, found 2"),
        ([1, 1, 3], 3, "none in parcel 2"),
        ([1, 2, 3], 2, "labels from 0 to 2, found 1 to 3"),
    ],
)
def test_faulty_labels_are_named(labels, n, sentence):
    with pytest.raises(InputError, match=sentence):
        parcel_means([1.0, 2.0, 3.0], np.array(labels), n)


@pytest.fixture(scope="module")
def connectome():
    """Correlations of smooth random series along a line of 80 parcels, without ties."""
    place = np.linspace(0, 1, 80)
    distance = np.abs(place[:, None] - place[None])
    noise = np.random.default_rng(0).normal(scale=0.02, size=distance.shape)
    return np.exp(-4 * distance) + noise + noise.T


def test_gradients_move_with_the_parcels_and_ignore_scale(connectome):
    first = gradients(connectome, 6)
    order = np.random.default_rng(1).permutation(80)
    np.testing.assert_allclose(gradients(connectome[order][:, order], 6), first[order], atol=1e-9)
    np.testing.assert_allclose(gradients(0.3 * connectome, 6), first, atol=1e-9)


def test_the_first_gradient_of_a_line_is_its_order(connectome):
    rank = gradients(connectome, 1)[:, 0].argsort().argsort()
    assert abs(np.corrcoef(rank, np.arange(80))[0, 1]) > 0.98


def test_the_gradients_of_a_ring_are_waves_around_it():
    """A circulant connectome has the discrete Fourier modes, in pairs of one eigenvalue."""
    turn = 2 * np.pi * np.arange(60) / 60
    maps = gradients(2 + np.cos(turn[:, None] - turn[None]), 2, keep=0.35)
    radius = np.linalg.norm(maps, axis=1)
    np.testing.assert_allclose(radius, radius.mean(), rtol=1e-9)
    waves = np.stack([np.cos(turn), np.sin(turn)], axis=1)
    left_over = maps - waves @ np.linalg.lstsq(waves, maps, rcond=None)[0]
    np.testing.assert_allclose(left_over, 0, atol=1e-10)


def test_gradients_are_eigenvectors_of_the_random_walk(connectome):
    maps = gradients(connectome, 5, keep=1.0)
    affinity = normalized_angle(np.where(connectome > 0, connectome, 0))
    degree = affinity.sum(axis=1)
    walk = affinity / np.sqrt(np.outer(degree, degree))
    walk /= walk.sum(axis=1, keepdims=True)
    values = (maps * (walk @ maps)).sum(axis=0) / (maps**2).sum(axis=0)
    np.testing.assert_allclose(walk @ maps, maps * values, atol=1e-9)
    assert (np.diff(values) < 0).all()
    assert values[0] < 1


def test_gradients_agree_with_brainspace(connectome):
    theirs = np.loadtxt(DATA / "brainspace_0.3.0_gradients.csv", delimiter=",")
    ours = gradients(connectome, 10, keep=0.25)
    for i in range(10):
        assert abs(np.corrcoef(ours[:, i], theirs[:, i])[0, 1]) > 0.999


@pytest.mark.parametrize(
    "change, options, sentence",
    [
        (lambda c: c[:, :-1], {}, r"\(80, 79\)"),
        (lambda c: changed(c, (3, 3), np.nan), {}, "1 values missing"),
        (lambda c: changed(c, (3, 4), 9.0), {}, "symmetric connectome"),
        (lambda c: changed(changed(c, 7, -1), (slice(None), 7), -1), {}, "none of parcel 7"),
        (lambda c: c, {"n_components": 80}, "1 to 79 components of 80 parcels, found 80"),
    ],
)
def test_a_faulty_connectome_is_named(connectome, change, options, sentence):
    with pytest.raises(InputError, match=sentence):
        gradients(change(connectome), **{"n_components": 3, **options})


def test_rotations_keep_distances_and_hands_and_cover_all_directions():
    turns = random_rotations(4000, 0)
    identity = np.broadcast_to(np.eye(3), turns.shape)
    np.testing.assert_allclose(turns @ turns.transpose(0, 2, 1), identity, atol=1e-12)
    np.testing.assert_allclose(np.linalg.det(turns), 1)
    np.testing.assert_allclose(turns.mean(axis=0), np.zeros((3, 3)), atol=5 / np.sqrt(3 * 4000))


@pytest.fixture(scope="module")
def parcels():
    atlas = atlas_file.load_atlas("schaefer200")
    return atlas.sphere.values, atlas.hemi.values


def test_spins_are_seeded_and_stay_in_their_hemisphere(parcels):
    sphere, hemi = parcels
    null = spins(sphere, hemi, 20, seed=3)
    np.testing.assert_array_equal(null, spins(sphere, hemi, 20, seed=3))
    assert (null != spins(sphere, hemi, 20, seed=4)).any()
    assert (hemi[null] == hemi).all()


def test_hungarian_spins_use_each_parcel_once(parcels):
    null = spins(*parcels, 10, seed=0)
    np.testing.assert_array_equal(np.sort(null, axis=1), np.tile(np.arange(200), (10, 1)))


def test_spins_keep_neighbours_together_and_forget_the_place(parcels):
    sphere, hemi = parcels
    left = np.flatnonzero(hemi == "L")
    here = sphere[left] @ sphere[left].T
    pairs = np.triu_indices(len(left), 1)
    for moved in spins(sphere, hemi, 10, seed=0)[:, left]:
        there = sphere[moved] @ sphere[moved].T
        assert np.corrcoef(here[pairs], there[pairs])[0, 1] > 0.9
    null = spins(sphere, hemi, 200, seed=0)
    np.testing.assert_allclose(
        sphere[null][:, left].mean(axis=(0, 1)), sphere[left].mean(axis=0), atol=0.15
    )
    direction = (sphere[left] * sphere[null][:, left]).sum(axis=2).mean()
    assert abs(direction - (sphere[left].mean(axis=0) ** 2).sum()) < 0.1


def test_mirrored_hemispheres_spin_as_mirror_images():
    points = random_rotations(50, 1)[:, 0]
    sphere = np.concatenate([points, points @ MIRROR])
    null = spins(sphere, np.repeat(["L", "R"], 50), 10, seed=0)
    np.testing.assert_array_equal(null[:, :50], null[:, 50:] - 50)


def test_a_vertex_in_no_triangle_has_no_mode():
    _, modes = harmonics(np.vstack([SQUARE[0], [[5, 5, 5]]]), SQUARE[1], 2)
    np.testing.assert_array_equal(np.isnan(modes), np.arange(5)[:, None].repeat(2, 1) == 4)
    np.testing.assert_allclose(modes[:4], harmonics(*SQUARE, 2)[1])


def test_neighbours_of_a_square():
    expected = 1 - np.eye(4)
    expected[1, 3] = expected[3, 1] = 0
    np.testing.assert_array_equal(adjacency(SQUARE[1], 4).toarray(), expected)
