"""Numbers from a mesh or a connectome: harmonics, parcel means, gradients, spins.

Plain NumPy arrays in and out, no labels and no files: a mesh is `coords` (vertex, 3) with `faces`
(triangle, 3), a parcellation is an integer a vertex (0 = none). Labels live in `atlas`.
"""

from __future__ import annotations

import numpy as np
from scipy import linalg, optimize, sparse, spatial
from scipy.sparse import csgraph
from scipy.sparse import linalg as sparse_linalg

from bhx.errors import InputError, listed


def harmonics(coords, faces, n_modes: int, mask=None) -> tuple[np.ndarray, np.ndarray]:
    """Geometric harmonics: the first eigenmodes of the Laplace-Beltrami operator of a mesh.

    Linear finite elements: cotangent stiffness K and consistent mass M, K u = eigenvalue M u.
    A mesh of several pieces (two hemispheres) is solved piece by piece and merged by eigenvalue,
    so every mode with an eigenvalue above 0 lives on one piece; the modes with eigenvalue 0 are
    first the constant, then the contrasts between pieces.

    Parameters
    ----------
    coords : array (vertex, 3)
    faces : array (triangle, 3) of int
    n_modes : how many modes, those with eigenvalue 0 included
    mask : array (vertex,) of bool, True where the surface is kept; all of it by default

    Returns
    -------
    eigenvalues : array (mode,) in 1 / unit of coords squared, ascending
    modes : array (vertex, mode), u' M u = 1, NaN outside the mask; the entry of largest
        magnitude of each mode is positive

    Source: Pang et al., Nature 2023; Reuter et al., Computer-Aided Design 2006.
    """
    coords, faces, mask = _checked_mesh(coords, faces, mask)
    kept, coords, faces = _cut(coords, faces, mask)
    if not 1 <= n_modes <= len(coords):
        raise InputError(
            f"Expected 1 to {len(coords)} modes on {len(coords)} vertices, found {n_modes}",
            "Ask for as many modes as the mesh has vertices at most, far fewer to be accurate",
        )
    stiffness, mass = _laplacian(coords, faces)
    values, vectors = _solve_pieces(stiffness, mass, n_modes)
    modes = np.full((len(mask), n_modes), np.nan)
    modes[kept] = fix_signs(vectors)
    return values, modes


def parcel_means(values, labels, n_parcels: int) -> np.ndarray:
    """Mean of vertex values (vertex, ...) over each parcel 1..n_parcels: array (parcel, ...).

    Vertices that are NaN (outside a mask) are left out; label 0 belongs to no parcel.
    """
    values, labels = np.asarray(values, float), np.asarray(labels)
    if len(values) != len(labels):
        fact = f"Expected one label for each of {len(values)} vertices, found {len(labels)}"
        raise InputError(fact, "Take the labels and the values from the same mesh")
    if labels.min() < 0 or labels.max() > n_parcels:
        fact = f"Expected labels from 0 to {n_parcels}, found {labels.min()} to {labels.max()}"
        raise InputError(fact, "Number the parcels 1 to n_parcels, 0 for none")
    flat = values.reshape(len(values), -1)
    good = (labels > 0) & ~np.isnan(flat).all(axis=1)
    member = sparse.csr_array(
        (np.ones(good.sum()), (labels[good] - 1, np.flatnonzero(good))),
        shape=(n_parcels, len(labels)),
    )
    count = member.sum(axis=1)
    if len(empty := np.flatnonzero(count == 0) + 1):
        raise InputError(
            f"Expected values in each of {n_parcels} parcels, found none in parcel {listed(empty)}",
            "Check the mask and the labels",
        )
    means = (member @ np.where(good[:, None], flat, 0)) / count[:, None]
    return means.reshape(n_parcels, *values.shape[1:])


def gradients(connectome, n_components: int, *, keep: float = 0.1) -> np.ndarray:
    """Diffusion-map gradients of a connectome: array (roi, component), strongest first.

    Each row keeps its strongest `keep` share of connections; rows are compared by the normalised
    angle, 1 - arccos(cosine) / pi; the anisotropic diffusion map (alpha = 0.5) of that affinity
    is scaled by eigenvalue / (1 - eigenvalue), all diffusion times together.

    Source: Margulies et al., PNAS 2016; Coifman and Lafon, 2006; Vos de Wael et al., 2020.
    """
    connectome = _checked_connectome(connectome, n_components, keep)
    affinity = normalised_angle(_strongest(connectome, keep))
    return _diffusion_map(affinity, n_components)


def spins(sphere, hemi, n: int, seed: int) -> np.ndarray:
    """Random rotations of parcels on the sphere: array (n, roi) of int, the parcel moved there.

    `values[spins[i]]` is the i-th null map: it keeps the spatial smoothness of `values` and breaks
    its place. The right hemisphere turns as the mirror image of the left.

    Parameters
    ----------
    sphere : array (roi, 3), the parcels' centres on the spherical surface (`atlas.sphere`)
    hemi : array (roi,) of "L" or "R"
    n : number of rotations
    seed : the same seed gives the same spins; each uses every parcel once

    Source: Alexander-Bloch et al., NeuroImage 2018; Markello and Misic, NeuroImage 2021.
    """
    sphere, hemi = np.asarray(sphere, float), np.asarray(hemi)
    if sphere.shape != (len(hemi), 3) or not np.isin(hemi, ["L", "R"]).all():
        fact = f"Expected sphere (roi, 3) with hemi 'L' or 'R' for each roi, found {sphere.shape} "
        fact += f"and {listed(np.unique(hemi))}"
        raise InputError(fact, "Take atlas.sphere and atlas.hemi")
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


def normalised_angle(rows) -> np.ndarray:
    """Similarity of rows by their angle: 1 for parallel, 0 for opposite; array (row, row)."""
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    similarity = 1 - np.arccos(np.clip(unit @ unit.T, -1, 1)) / np.pi
    np.fill_diagonal(similarity, 1)
    return similarity


def fix_signs(vectors) -> np.ndarray:
    """Columns turned so that the entry of largest magnitude is positive."""
    largest = np.abs(vectors).argmax(axis=0)
    return vectors * np.where(vectors[largest, np.arange(vectors.shape[1])] < 0, -1.0, 1.0)


def edges(faces) -> np.ndarray:
    """The edges of each triangle, smaller vertex first: array (3 x triangle, 2)."""
    return np.sort(np.concatenate([faces[:, [0, 1]], faces[:, [1, 2]], faces[:, [2, 0]]]), axis=1)


def adjacency(faces, n_vertices: int) -> sparse.csr_array:
    """Which vertices share an edge: array (vertex, vertex) of 0 and 1."""
    a, b = np.unique(edges(np.asarray(faces)), axis=0).T
    ones = np.ones(len(a))
    half = sparse.coo_array((ones, (a, b)), shape=(n_vertices, n_vertices))
    return (half + half.T).tocsr()


def _laplacian(coords, faces):
    """Cotangent stiffness and consistent mass matrix of linear elements."""
    n, corner = len(coords), coords[faces]  # (triangle, 3 corners, xyz)
    side = np.roll(corner, -2, axis=1) - np.roll(corner, -1, axis=1)  # opposite each corner
    area = _areas(coords, faces)
    k = np.einsum("tix,tjx,t->tij", side, side, 1 / (4 * area))
    m = area[:, None, None] * (np.ones((3, 3)) + np.eye(3)) / 12
    place = np.repeat(faces, 3, axis=1).ravel(), np.tile(faces, 3).ravel()
    return [sparse.csc_array((values.ravel(), place), shape=(n, n)) for values in (k, m)]


def _solve_pieces(stiffness, mass, n_modes):
    n_pieces, piece = csgraph.connected_components(mass, directed=False)
    values, vectors = [np.zeros(n_pieces)], [_constants(mass, piece, n_pieces)]
    for p in range(n_pieces):
        here = np.flatnonzero(piece == p)
        wanted = min(n_modes + 1, len(here))
        w, v = _solve(stiffness[here][:, here], mass[here][:, here], wanted)
        padded = np.zeros((len(piece), wanted - 1))
        padded[here] = v[:, 1:]
        values.append(w[1:])
        vectors.append(padded)
    order = _ascending(values)[:n_modes]
    return np.concatenate(values)[order], np.concatenate(vectors, axis=1)[:, order]


def _ascending(values):
    """Order of the eigenvalues of all pieces; equal ones (1e-9) in the order of the pieces."""
    piece = np.repeat(np.arange(len(values)), [len(v) for v in values])
    values = np.concatenate(values)
    order = np.argsort(values, kind="stable")
    step = np.diff(values[order], prepend=0) > 1e-9 * values[order]
    return order[np.lexsort((piece[order], np.cumsum(step)))]


def _solve(stiffness, mass, n_modes):
    """Smallest eigenpairs, ascending: shift-invert from a fixed start vector, or dense if few."""
    n = mass.shape[0]
    if 3 * n_modes >= n:
        return linalg.eigh(stiffness.toarray(), mass.toarray(), subset_by_index=(0, n_modes - 1))
    shift = -1 / mass.sum()  # below 0 by 1 / area: the same problem at every scale
    factor = sparse_linalg.splu(
        (stiffness - shift * mass).tocsc(),
        permc_spec="MMD_AT_PLUS_A",
        diag_pivot_thresh=0.0,
        options={"SymmetricMode": True},
    )
    inverse = sparse_linalg.LinearOperator(mass.shape, factor.solve, dtype=float)
    start = np.random.default_rng(0).standard_normal(n)
    values, vectors = sparse_linalg.eigsh(
        stiffness, n_modes, mass, sigma=shift, v0=start, OPinv=inverse
    )
    order = values.argsort()
    return values[order], vectors[:, order]


def _constants(mass, piece, n_pieces):
    """Orthonormal basis of the modes with eigenvalue 0: the constant, then contrasts."""
    area = np.bincount(piece, weights=mass.sum(axis=1), minlength=n_pieces)
    basis = np.concatenate([np.ones((n_pieces, 1)), np.eye(n_pieces)[:, :-1]], axis=1)
    q, r = np.linalg.qr(np.sqrt(area)[:, None] * basis)
    return (q * np.sign(np.diag(r)) / np.sqrt(area)[:, None])[piece]


def _areas(coords, faces):
    a, b, c = coords[faces].transpose(1, 0, 2)
    return np.linalg.norm(np.cross(b - a, c - a), axis=1) / 2


def _checked_mesh(coords, faces, mask):
    coords, faces = np.asarray(coords, float), np.asarray(faces)
    if coords.ndim != 2 or coords.shape[1] != 3 or faces.ndim != 2 or faces.shape[1] != 3:
        fact = f"Expected coords (vertex, 3) and faces (triangle, 3), found {coords.shape} and "
        fact += f"{faces.shape}"
        raise InputError(fact, "Pass the mesh as coords, faces")
    if len(bad := np.flatnonzero(~np.isfinite(coords).all(axis=1))):
        fact = f"Expected finite coordinates, found NaN or infinity at vertex {listed(bad)}"
        raise InputError(fact, "Repair the mesh or read the file again")
    whole = np.issubdtype(faces.dtype, np.integer) and faces.size > 0
    if not whole or faces.min() < 0 or faces.max() >= len(coords):
        found = f"{faces.min()} to {faces.max()}" if faces.size else "no triangle"
        raise InputError(
            f"Expected faces as whole numbers from 0 to {len(coords) - 1}, found {found} "
            f"({faces.dtype})",
            "Number the vertices from 0, and pass coords and faces of the same mesh",
        )
    mask = np.ones(len(coords), bool) if mask is None else np.asarray(mask)
    if mask.shape != (len(coords),) or mask.dtype != bool:
        fact = f"Expected a mask of {len(coords)} bools, one a vertex, found shape {mask.shape} of "
        fact += f"{mask.dtype}"
        raise InputError(fact, "Pass mask = labels > 0, for example")
    return coords, faces, mask


def _cut(coords, faces, mask):
    """The part of a mesh inside the mask, renumbered; every fault of it named."""
    faces = faces[mask[faces].all(axis=1)]
    kept = np.flatnonzero(mask)
    if len(lone := np.setdiff1d(kept, faces)):
        fact = f"Expected every vertex in a triangle, found {len(lone)} of {len(kept)} in none "
        fact += f"({listed(lone)})"
        raise InputError(fact, "Leave them out with mask")
    number = np.full(len(mask), -1)
    number[kept] = np.arange(len(kept))
    coords, faces = coords[kept], number[faces]
    area = _areas(coords, faces)
    if n_flat := np.count_nonzero(area <= 1e-12 * area.mean()):
        fact = f"Expected triangles with an area, found {n_flat} degenerate of {len(faces)}"
        raise InputError(fact, "Merge repeated vertices and remove the triangles they leave")
    times = np.unique(edges(faces), axis=0, return_counts=True)[1]
    if times.max() > 2:
        raise InputError(
            f"Expected at most 2 triangles at an edge, found {times.max()} at "
            f"{(times > 2).sum()} edges",
            "The mesh is not a manifold: remove repeated triangles or split it there",
        )
    return kept, coords, faces


def _checked_connectome(connectome, n_components, keep):
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
    if not 0 < keep <= 1:
        raise InputError(
            f"Expected keep as a share above 0 and at most 1, found {keep}", "Take 0.1, a tenth"
        )
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
