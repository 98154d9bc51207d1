"""Numbers from a mesh or a connectome: harmonics, gradients, and random rotations of parcels on the
sphere.

Plain NumPy arrays in and out, no labels and no files: a mesh is `coords` (vertex, 3) with `faces`
(triangle, 3). Labels live in `atlas`; what only builds the shipped atlases is in
`scripts/make_assets.py`.
"""

from __future__ import annotations

import numpy as np
from scipy import linalg, optimize, spatial

from bhx.data.files import attempt
from bhx.errors import InputError, listed


def harmonics(coords, faces, n_modes: int, mask=None) -> tuple[np.ndarray, np.ndarray]:
    """Geometric harmonics: the first eigenmodes of the Laplace-Beltrami operator of a mesh.

    Linear finite elements of LaPy: stiffness K and consistent mass M, K u = eigenvalue M u.

    Parameters
    ----------
    coords : array (vertex, 3)
    faces : array (triangle, 3) of int
    n_modes : how many modes, the constant one included; fewer than vertices
    mask : array (vertex,) of bool, True where the surface is kept; all of it by default

    Returns
    -------
    eigenvalues : array (mode,) in 1 / unit of coords squared, ascending
    modes : array (vertex, mode), u' M u = 1, NaN outside the mask and where there is no
        triangle; the entry of largest magnitude of each mode is positive

    Source: Pang et al., Nature 2023; Reuter et al., Computer-Aided Design 2006.
    """
    from lapy import Solver

    mesh, inside = _surface(coords, faces, mask)
    if not 1 <= n_modes < len(mesh.v):
        fact = f"Expected 1 to {len(mesh.v) - 1} modes on {len(mesh.v)} vertices, found {n_modes}"
        raise InputError(fact, "Ask for far fewer modes than the mesh has vertices")
    area = mesh.area()
    mesh.v = mesh.v / np.sqrt(area)  # of area 1, so that LaPy's shift suits every scale
    start = np.random.default_rng(0).standard_normal(len(mesh.v))
    values, vectors = Solver(mesh).eigs(n_modes, v0=start)
    modes = np.full((len(coords), n_modes), np.nan)
    modes[inside] = fix_signs(vectors) / np.sqrt(area)
    return values / area, modes


def gradients(connectome, n_components: int, *, keep: float = 0.1) -> np.ndarray:
    """Diffusion-map gradients of a connectome: array (roi, component), strongest first.

    Each row keeps its strongest `keep` share of connections; rows are compared by the normalized
    angle, 1 - arccos(cosine) / pi; the anisotropic diffusion map (alpha = 0.5) of that affinity
    is scaled by eigenvalue / (1 - eigenvalue), all diffusion times together.

    Source: Margulies et al., PNAS 2016; Coifman and Lafon, 2006; Vos de Wael et al., 2020.
    """
    connectome = _checked_connectome(connectome, n_components)
    affinity = normalized_angle(_strongest(connectome, keep))
    return _diffusion_map(affinity, n_components)


def normalized_angle(rows) -> np.ndarray:
    """Similarity of rows by their angle: 1 for parallel, 0 for opposite; array (row, row)."""
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    similarity = 1 - np.arccos(np.clip(unit @ unit.T, -1, 1)) / np.pi
    np.fill_diagonal(similarity, 1)
    return similarity


def spins(sphere, hemi, n: int, seed: int) -> np.ndarray:
    """Random rotations of parcels on the sphere: array (n, roi) of int, the parcel moved there.

    `values[spins[i]]` is the i-th null map: it keeps the spatial smoothness of `values` and breaks
    its place. The right hemisphere turns as the mirror image of the left.

    Parameters
    ----------
    sphere : array (roi, 3), the parcels' centers on the spherical surface (`atlas.sphere`)
    hemi : array (roi,) of "L" or "R"
    n : number of rotations
    seed : the same seed gives the same spins; each uses every parcel once

    Source: Alexander-Bloch et al., NeuroImage 2018; Markello and Misic, NeuroImage 2021.
    """
    sphere, hemi = np.asarray(sphere, float), np.asarray(hemi)
    unit = sphere / np.linalg.norm(sphere, axis=1, keepdims=True)
    out = np.empty((n, len(hemi)), int)
    for i, rotation in enumerate(random_rotations(n, seed)):
        for side, turn in (("L", rotation), ("R", MIRROR @ rotation @ MIRROR)):
            here = np.flatnonzero(hemi == side)
            nearness = unit[here] @ (unit[here] @ turn.T).T
            out[i, here] = here[optimize.linear_sum_assignment(-nearness)[1]]
    return out


MIRROR = np.diag([-1.0, 1.0, 1.0])  # left to right


def random_rotations(n: int, seed: int) -> np.ndarray:
    """Rotation matrices (n, 3, 3), uniform over all rotations."""
    quaternions = np.random.default_rng(seed).standard_normal((n, 4))
    return spatial.transform.Rotation.from_quat(quaternions).as_matrix()


def fix_signs(vectors) -> np.ndarray:
    """Columns turned so that the entry of largest magnitude is positive."""
    largest = np.abs(vectors).argmax(axis=0)
    return vectors * np.where(vectors[largest, np.arange(vectors.shape[1])] < 0, -1.0, 1.0)


def _surface(coords, faces, mask):
    """The part of a mesh inside the mask as LaPy's, and the vertices that are in it."""
    from lapy import TriaMesh

    what = "a mesh of coords (vertex, 3), faces (triangle, 3) and mask (vertex,)"
    with attempt(what, "Pass coords and faces of one mesh; mask = labels > 0, for example"):
        coords, faces = np.asarray_chkfinite(coords, float), np.asarray(faces)
        mask = np.broadcast_to(True if mask is None else np.asarray(mask, bool), len(coords))
        kept = faces[mask[faces].all(1)]
        inside = np.flatnonzero(np.bincount(kept.ravel()))
        mesh = TriaMesh(coords[inside], np.searchsorted(inside, kept))
        area = mesh.tria_areas()
    if flat := np.count_nonzero(area <= 1e-12 * area.mean()):
        fact = f"Expected triangles with an area, found {flat} degenerate of {len(area)}"
        raise InputError(fact, "Merge repeated vertices and remove the triangles they leave")
    if not mesh.is_manifold():
        fact = f"Expected at most 2 triangles at an edge, found {int(mesh.adj_sym.max())}"
        raise InputError(fact, "Remove repeated triangles, or split the mesh at that edge")
    return mesh, inside


def _checked_connectome(connectome, n_components):
    connectome = np.asarray(connectome, float)
    n = len(connectome)
    if connectome.shape != (n, n) or not np.isfinite(connectome).all():
        fact = f"Expected a finite connectome (roi, roi), found shape {connectome.shape} with "
        fact += f"{(~np.isfinite(connectome)).sum()} values missing"
        raise InputError(fact, "Drop the parcels without signal first")
    if not np.allclose(connectome, connectome.T, atol=1e-6):
        fact = "Expected a symmetric connectome, found "
        fact += f"{np.abs(connectome - connectome.T).max():.3g} between the two halves"
        raise InputError(fact, "Average it with its transpose")
    if not 1 <= n_components < n:
        fact = f"Expected 1 to {n - 1} components of {n} parcels, found {n_components}"
        raise InputError(fact, "Ask for fewer components, at least 1")
    return connectome


def _strongest(connectome, keep):
    """Each row's largest entries, the rest 0; nothing negative is kept."""
    n_kept = max(1, round(keep * len(connectome)))
    threshold = np.sort(connectome, axis=1)[:, [-n_kept]]
    rows = np.where((connectome >= threshold) & (connectome > 0), connectome, 0)
    if len(empty := np.flatnonzero(~rows.any(axis=1))):
        raise InputError(
            f"Expected a positive connection of every parcel, found none of parcel {listed(empty)}",
            "Drop the parcels without signal first",
        )
    return rows


def _diffusion_map(affinity, n_components):
    degree = affinity.sum(axis=1)
    affinity = affinity / np.sqrt(np.outer(degree, degree))  # alpha = 0.5
    root = np.sqrt(affinity.sum(axis=1))
    n = len(root)
    values, vectors = linalg.eigh(
        affinity / np.outer(root, root), subset_by_index=(n - n_components - 1, n - 1)
    )
    values, vectors = values[::-1], vectors[:, ::-1]
    maps = vectors[:, 1:] / vectors[:, :1]  # eigenvectors of the random walk
    return fix_signs(maps) * (values[1:] / (1 - values[1:]))
