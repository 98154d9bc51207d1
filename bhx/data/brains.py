"""One synthetic participant: what is known of a session, and its BOLD and T1 computed from that.

Brain activity is the exact solution of a linear stochastic whole-brain model, written as a
function of continuous time, so that one scan can be sampled at any TR. Anatomy is the MNI152
template under smooth warps. The size of every planted effect is in `SIZES`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from threading import Lock

import numpy as np
from scipy import ndimage
from threadpoolctl import ThreadpoolController

from bhx.data.atlas import centroids, load_atlas
from bhx.modalities.t1 import block_mean, t1_grid


@dataclass(frozen=True)
class Site:
    """A scanner and its protocol."""

    name: str
    tr: float  # s
    minutes: float  # length of a BOLD scan
    noise: float = 0.4  # share of white noise in the variance of BOLD
    gain: float = 1.0  # of both modalities, times about 1000 (T1) and 10 000 (BOLD)
    bias: tuple[float, float, float] = (0.0, 0.0, 0.0)  # log intensity from one side to the other

    @property
    def n_volumes(self) -> int:
        return int(self.minutes * 60 / self.tr + 1e-9)


# The planted effects, each multiplied by its entry in `effects`. Couplings and lengths are natural
# logarithms of a factor; SD is one standard deviation of the age or the trait.
SIZES = {
    "age": {
        "ventricle_border_mm_per_decade": 0.5,
        "cortex_lost_per_decade": 0.04,  # share of gray matter: 0.1 mm of 2.5 mm
        "within_network_coupling_per_sd": -0.2,
        "between_network_coupling_per_sd": 0.2,
    },
    "diagnosis": {"default_mode_coupling_of_patients": -1.2},
    "sex": {"head_length_of_men": 0.018, "head_length_of_women": -0.018},
    "motion": {
        "median_fd_control_mm": 0.11,
        "log_fd_of_patients": 0.85,
        "percent_signal_per_mm": 2.5,
    },
    "fusion": {
        "structure_elongation_per_sd": 0.035,  # longer and as much narrower, of the same volume
        "function_sensory_coupling_per_sd": 0.8,  # within and between Vis and SomMot
        "trait_shift": 0.5,  # SD: function up and structure down, or the other way
    },
    "site": {},  # see SITES
}
EFFECTS = tuple(SIZES)
AGES = (20.0, 80.0)  # years, uniform

_NEURAL, _HEMODYNAMIC, _STAGES = 0.4, 1.2, 3  # s, s, and how many low-pass stages of the latter
_COUPLING = 0.88  # distance to instability is 1 minus this, in every brain
_LOCAL = 0.3  # share of the coupling along the cortical sheet, from its harmonics
_INDIVIDUAL = 0.35  # SD of the log of each connection over participants: their fingerprint
_PERIOD, _HIGHEST = 1024.0, 0.5  # s and Hz: resolution and end of the spectrum
_SHARED_NOISE = 0.5  # of the measurement noise, how much parcels share as they share signal
_SIGNAL = 0.8  # percent, SD of the brain's part
_EVENT_EVERY, _EVENT_LASTS, _EVENT_REACH = 12.0, 3.0, 30.0  # s, s, mm: head movements
_WARP, _WARP_REACH = 1.5, 28.0  # mm, mm: individual anatomy
_CENTER = (0.0, -20.0, 12.0)  # mm, what heads are scaled about
_MARGIN = 16  # mm of template kept around the T1 grid
# random streams
PEOPLE, _WIRING, _LEVEL, _ACTIVITY, _NOISE, _MOTION, _ANATOMY, _SCANNER = range(8)
_ONE_BY_ONE, _TEMPLATE = Lock(), Lock()  # a limit on BLAS threads is the whole process's


@dataclass(frozen=True)
class Session:
    """One session of one participant: labels, and the key of every random number in it."""

    seed: int
    number: int  # of the participant, from 0
    session: int  # from 1
    n_sessions: int
    site: Site
    age: float
    sex: str
    diagnosis: str
    mean_fd: float
    trait_structure: float
    trait_function: float
    has_run: bool
    has_image: bool

    def rng(self, stream: int, lasting: bool = False) -> np.random.Generator:
        """A generator of its own for each participant, stream and (unless lasting) session."""
        session = 0 if lasting else self.session
        return np.random.default_rng([self.seed, self.number, stream, session])

    @property
    def decades(self) -> float:
        return float(self.age - np.mean(AGES)) / 10

    @property
    def age_sd(self) -> float:
        return (self.age - np.mean(AGES)) / (np.ptp(AGES) / np.sqrt(12))


# ---------------------------------------------------------------------------------------- BOLD


def simulate_bold(row: Session, shape, atlas: str, effects) -> np.ndarray:
    """One scan (roi, time) in scanner units, NaN behind its end."""
    out = np.full(shape, np.nan, np.float32)
    if not row.has_run:
        return out
    site, seconds = row.site, row.site.tr * np.arange(row.site.n_volumes)
    with _ONE_BY_ONE, _blas().limit(limits=1):  # more threads are slower here and round otherwise
        brain = _group_brain(atlas)
        percent = _activity(row, brain, seconds, effects)
        percent += np.sqrt(site.noise / (1 - site.noise)) * _scanner_noise(row, brain, seconds)
        percent += effects["motion"] * _movement(row, brain, seconds)
    level = 0.05 * row.rng(_LEVEL, lasting=True).standard_normal(shape[0])
    baseline = 10_000 * site.gain * np.exp(level)
    out[:, : len(seconds)] = (baseline * (1 + percent / 100)).T
    return out


def _activity(row, brain, seconds, effects):
    """The whole-brain model's hemodynamic signal [percent] at any moments, (time, roi).

    dx = (-1 + c W) x dt / tau + dn, then low-pass stages; solved in the frequency domain, where
    every eigenmode of W is its own filter: h(w) = 1 / ((1 - c l) / tau + i w) / (1 + i w th)^m.
    White noise n is shared between parcels by `brain["drive"]`.
    """
    coupling = _coupling(row, brain, effects)
    value, mode = np.linalg.eigh(coupling)
    period = _PERIOD * np.ceil((row.site.minutes * 60) / (0.9 * _PERIOD))
    omega = _frequencies(period)
    white = row.rng(_ACTIVITY).standard_normal((2, len(omega), len(value)))
    spectrum = ((white[0] + 1j * white[1]) @ brain["drive"]) @ mode
    spectrum *= _response(value, omega).T * np.sqrt(_PERIOD / period)
    cosine, sine = _waves(tuple(seconds[:2]), len(seconds), period)
    return _SIGNAL * ((cosine @ spectrum.real - sine @ spectrum.imag) @ mode.T)


def _response(value, omega):
    """Each mode's filter from noise to hemodynamic signal, (mode, frequency)."""
    neural = 1 / ((1 - _COUPLING * value)[:, None] / _NEURAL + 1j * omega)
    return neural / (1 + 1j * omega * _HEMODYNAMIC) ** _STAGES


def _frequencies(period):
    return 2 * np.pi * np.arange(1, round(_HIGHEST * period) + 1) / period  # rad/s


@lru_cache(maxsize=16)
def _waves(first_two, n, period):
    phase = np.outer(first_two[1] * np.arange(n), _frequencies(period))
    return np.cos(phase), np.sin(phase)


def _coupling(row, brain, effects):
    """This participant's coupling W: the group's, its fingerprint and its planted effects."""
    same, default, sensory = brain["same_network"], brain["default_mode"], brain["sensory"]
    age = SIZES["age"]
    noise = row.rng(_WIRING, lasting=True).standard_normal(same.shape)
    noise = brain["near"] @ noise @ brain["near"]  # neighbors are wired alike
    log = _INDIVIDUAL * (noise + noise.T) / np.sqrt(2)
    within, between = age["within_network_coupling_per_sd"], age["between_network_coupling_per_sd"]
    log += effects["age"] * row.age_sd * np.where(same, within, between)
    if row.diagnosis == "patient":
        change = SIZES["diagnosis"]["default_mode_coupling_of_patients"]
        log += effects["diagnosis"] * change * default
    per_sd = effects["fusion"] * SIZES["fusion"]["function_sensory_coupling_per_sd"]
    log += per_sd * row.trait_function * sensory
    coupling = brain["coupling"] * np.exp(log)
    return coupling / np.linalg.eigvalsh(coupling)[-1]


@lru_cache(maxsize=1)
def _blas():
    return ThreadpoolController()  # finds the libraries once


@lru_cache(maxsize=4)
def _group_brain(atlas):
    """What all participants share: coupling, shared drive, noise, networks, distances."""
    labels = load_atlas(atlas)
    network = labels.network.values
    place = centroids(labels)
    distance = np.linalg.norm(place[:, None] - place[None], axis=2)
    connectome = labels.connectome.values.astype(float)
    sensory = np.isin(network, ("Vis", "SomMot"))
    coupling = _group_coupling(connectome, labels.harmonics.values)
    shared = _SHARED_NOISE * connectome + (1 - _SHARED_NOISE) * np.eye(len(connectome))
    return {
        "coupling": coupling,
        "drive": _drive(coupling, connectome),
        "noise": _root(shared),
        "near": _root(np.exp(-((distance / _EVENT_REACH) ** 2) / 2)),
        "same_network": network[:, None] == network[None],
        "default_mode": np.outer(network == "Default", network == "Default"),
        "sensory": np.outer(sensory, sensory),
    }


def _group_coupling(connectome, harmonics, n_harmonics: int = 50):
    """Positive, symmetric coupling of largest eigenvalue 1: long-range and along the sheet."""
    basis = np.linalg.qr(harmonics[:, :n_harmonics].astype(float))[0]
    local = (basis * np.exp(-np.arange(basis.shape[1]) / 15)) @ basis.T
    out = 0
    for weights, share in ((connectome**2 * (connectome > 0), 1 - _LOCAL), (local.clip(0), _LOCAL)):
        weights = weights - np.diag(np.diag(weights))
        degree = np.sqrt(weights.sum(1))
        out = out + share * weights / np.outer(degree, degree)
    return out / np.linalg.eigvalsh(out)[-1]


def _drive(coupling, target):
    """Root of the noise covariance with which `coupling` has the stationary covariance `target`."""
    value, mode = np.linalg.eigh(coupling)
    response = _response(value, _frequencies(_PERIOD))
    gain = (response @ response.conj().T).real
    return _root(mode @ ((mode.T @ target @ mode) / gain) @ mode.T)


def _root(covariance):
    """Symmetric square root of a covariance, negative eigenvalues set to 0."""
    value, vector = np.linalg.eigh((covariance + covariance.T) / 2)
    return (vector * np.sqrt(value.clip(0))) @ vector.T


def _scanner_noise(row, brain, seconds):
    """White noise as large as the signal, (time, roi), by the moment in ms and not by the TR."""
    bits = np.random.Philox(key=row.rng(_NOISE).integers(2**63, size=2, dtype=np.uint64))
    normal, state = np.random.Generator(bits).standard_normal, bits.state
    out = np.empty((len(seconds), len(brain["noise"])))
    for volume, moment in zip(out, np.rint(1000 * seconds).astype(np.uint64), strict=True):
        state["state"]["counter"][:] = (0, moment, 0, 0)
        bits.state = state
        normal(out=volume)
    return _SIGNAL * out @ brain["noise"]


def _movement(row, brain, seconds):
    """What head movements leave in the signal [percent], (time, roi).

    Events come at random; each drops the whole brain and adds a pattern of _EVENT_REACH mm, so
    parcels close to each other look more connected: the field's distance-dependent artifact.
    """
    rng = row.rng(_MOTION)
    most = int(np.ceil(4 * row.site.minutes * 60 / _EVENT_EVERY)) + 8
    onset = np.cumsum(rng.exponential(_EVENT_EVERY, most))
    size = row.mean_fd * SIZES["motion"]["percent_signal_per_mm"] * rng.exponential(1, most)
    pattern = rng.standard_normal((most, len(brain["near"]))) @ brain["near"] - 1
    since = seconds[:, None] - onset
    return (np.where(since >= 0, np.exp(-since.clip(0) / _EVENT_LASTS), 0) * size) @ pattern


# ------------------------------------------------------------------------------------------ T1


def simulate_t1(row: Session, shape, voxel_mm: float, effects) -> np.ndarray:
    """One anatomy (x, y, z) in scanner units, 0 outside the brain, NaN where there is none."""
    if not row.has_image:
        return np.full(shape, np.nan, np.float32)
    with _TEMPLATE:
        head = _template(voxel_mm)
    lost = effects["age"] * row.decades * SIZES["age"]["cortex_lost_per_decade"]
    source = _source(row, head, effects)
    image = ndimage.map_coordinates(head["image"] - lost * head["cortex"], source, order=1)
    return _scanned(row, image).astype(np.float32, copy=False)


def _source(row, head, effects):
    """Where in the template each voxel comes from: (3, x, y, z) in template voxels."""
    rng = row.rng(_ANATOMY, lasting=True)
    length = 0.9 * np.exp(0.02 * rng.standard_normal())
    who = "men" if row.sex == "M" else "women"
    length *= np.exp(effects["sex"] * SIZES["sex"][f"head_length_of_{who}"])
    per_sd = effects["fusion"] * SIZES["fusion"]["structure_elongation_per_sd"]
    scale = length * np.exp(per_sd * row.trait_structure * np.array([-0.5, 1.0, -0.5]))
    wider = effects["age"] * row.decades * SIZES["age"]["ventricle_border_mm_per_decade"]
    out = np.empty((3, *map(len, head["grid"])), np.float32)
    for axis, grid in enumerate(head["grid"]):  # mm
        along = [-1 if a == axis else 1 for a in range(3)]
        out[axis] = (_CENTER[axis] + (grid - _CENTER[axis]) / scale[axis]).reshape(along)
        out[axis] += _WARP * _smooth_field(rng, head["grid"])
        out[axis] -= wider * head["outward"][axis]
        out[axis] = (out[axis] - head["origin"][axis]) / head["step"][axis]
    return out


def _smooth_field(rng, grid):
    """A Gaussian random field of variance 1 and reach _WARP_REACH on the grid."""
    reach = _WARP_REACH
    centers = [np.arange(g.min() - reach, g.max() + 2 * reach, reach) for g in grid]
    field = rng.standard_normal([len(c) for c in centers])
    for g, c in zip(grid, centers, strict=True):
        basis = np.exp(-(((g[:, None] - c) / reach) ** 2) / 2)
        basis /= np.linalg.norm(basis, axis=1, keepdims=True)
        field = np.tensordot(field, basis, ((0,), (1,)))  # the axes rotate back into place
    return field


def _scanned(row, image):
    """The anatomy as the site's scanner sees it: noise, gain, bias field."""
    brain = image > 0.15
    image = image + 0.02 * row.rng(_SCANNER).standard_normal(image.shape, dtype=np.float32)
    across = [np.linspace(-0.5, 0.5, n, dtype=np.float32) for n in image.shape]
    x, y, z = np.ix_(*(b * a for b, a in zip(row.site.bias, across, strict=True)))
    image *= 1000 * row.site.gain * np.exp(x) * np.exp(y) * np.exp(z)
    return np.where(brain, image.clip(0), 0)


@lru_cache(maxsize=2)
def _template(voxel_mm):
    """The template seen with voxels of `voxel_mm`, its cortex, the way out of its ventricles.

    Images stay on a finer grid, `step` [mm], that reaches _MARGIN beyond the T1 grid.
    """
    step = 1 if voxel_mm < 2 else 2
    image, gray = (_on_grid(volume, step) for volume in _template_volumes())
    depth = ndimage.distance_transform_edt(image > 0.15, sampling=step)  # mm
    cortex = np.where(depth < 30, gray * (image - 0.3).clip(0), 0)
    grid = tuple(t1_grid(voxel_mm).values())
    sign = np.array([np.sign(g[1] - g[0]) for g in grid])
    first = [axis[0] for axis in t1_grid(step).values()]
    blur = np.sqrt((voxel_mm**2 - step**2) / 12) / step  # a voxel's average, less the grid's own
    return {
        "image": ndimage.gaussian_filter(image, blur),
        "cortex": ndimage.gaussian_filter(cortex, blur),
        "outward": _outward(voxel_mm),
        "grid": grid,
        "step": sign * step,
        "origin": first - sign * _MARGIN,
    }


def _outward(voxel_mm, step: int = 2, reach: float = 8.0):
    """Vectors [mm] away from the lateral ventricles, (3, x, y, z): 1 mm long at their border.

    They fade over `reach` mm and are made on a grid of `step` mm whatever the voxel.
    """
    edt = ndimage.distance_transform_edt
    image = _on_grid(_template_volumes()[0], step)
    parts, _ = ndimage.label((image < 0.5) & (edt(image > 0.15, sampling=step) > 25))
    ventricles = parts == 1 + np.argmax(np.bincount(parts.ravel())[1:])
    outside, inside = edt(~ventricles, sampling=step), edt(ventricles, sampling=step)
    away = np.stack(np.gradient(outside - inside, step))
    away *= np.exp(-(((outside + inside) / reach) ** 2) / 2)
    away = ndimage.gaussian_filter(away, (0, 1, 1, 1))
    away /= np.linalg.norm(away, axis=0)[outside + inside == step].mean()
    trim = slice(_MARGIN // step, -_MARGIN // step)
    away = away[:, trim, trim, trim] * [[[[-1]]], [[[1]]], [[[1]]]]  # x falls along its axis
    if voxel_mm >= step:
        return block_mean(away, int(voxel_mm) // step)
    fine = away.repeat(step, 1).repeat(step, 2).repeat(step, 3).astype(np.float32)
    return ndimage.uniform_filter(fine, (1, 3, 3, 3))


def _template_volumes():
    """MNI152 (ICBM 2009a) T1 and gray matter as nilearn ships them, in 0 to 1, 1 mm."""
    from nilearn import datasets  # slow to import

    volumes = datasets.load_mni152_template(1), datasets.load_mni152_gm_template(1)
    return [(volume.get_fdata(dtype=np.float32), volume.affine) for volume in volumes]


def _on_grid(volume, step):
    """A 1 mm volume cut to the T1 grid and its margin, then averaged over blocks of `step` mm."""
    values, affine = volume
    for axis, world in enumerate(t1_grid(1).values()):
        along = world[1] - world[0]
        wanted = world[0] + along * np.arange(-_MARGIN, len(world) + _MARGIN)
        index = np.rint((wanted - affine[axis, 3]) / affine[axis, axis]).astype(int)
        known = (index >= 0) & (index < values.shape[axis])
        cut = np.take(values, np.where(known, index, 0), axis)
        values = cut * known.reshape([-1 if a == axis else 1 for a in range(3)])
    return block_mean(values, step)
