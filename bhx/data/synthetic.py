"""A cohort of synthetic brains with planted, documented effects, computed when it is read.

Brain activity is the exact solution of a linear stochastic whole-brain model, written as a
function of continuous time, so that one scan can be sampled at any TR. Anatomy is the MNI152
template under smooth warps. Every number that a test or a lesson may look for is in `SIZES`,
`SITES` and `attrs["truth"]`. These brains show how the tools work; they are no evidence about
real ones. No file of a user is read here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from threading import Lock

import dask
import dask.array as da
import numpy as np
import xarray as xr
from scipy import ndimage
from scipy.special import ndtr
from threadpoolctl import ThreadpoolController

from bhx.data.atlas import ATLASES, centroids, load_atlas
from bhx.errors import InputError, check_choice, listed
from bhx.modalities.bold import BOLD, check_tr
from bhx.modalities.t1 import ANATOMY, block_mean, t1_grid
from bhx.schema import ROI_COORDS, build_cohort


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


SITES = {
    "A": Site("A", 0.72, 8.0, 0.40, 1.00, (0.00, 0.10, 0.10)),
    "B": Site("B", 0.80, 6.0, 0.44, 1.30, (0.20, -0.10, 0.00)),
    "C": Site("C", 1.50, 7.0, 0.34, 0.80, (-0.15, 0.15, 0.25)),
    "D": Site("D", 2.00, 8.0, 0.47, 1.10, (0.00, -0.30, 0.15)),
    "E": Site("E", 3.00, 6.0, 0.38, 0.90, (-0.25, 0.00, -0.20)),
}

# The planted effects, each multiplied by its entry in `effects`. Couplings and lengths are natural
# logarithms of a factor; SD is one standard deviation of the age or the trait.
SIZES = {
    "age": {
        "ventricle_border_mm_per_decade": 0.5,
        "cortex_lost_per_decade": 0.04,  # share of grey matter: 0.1 mm of 2.5 mm
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
ABOUT = {
    "licence": "BSD-3-Clause; T1 derived from the ICBM 2009a template, (C) 1993-2004 "
    "Louis Collins, McConnell Brain Imaging Centre, free with this notice",
    "preprocessing": "none: simulated on the grid; BOLD in scanner units, baseline "
    "10 000 times the site's gain, so 1 % signal change is 100 times the gain",
}
AGES = (20.0, 80.0)  # years, uniform
TRAITS = ("trait_structure", "trait_function")

_NEURAL, _HAEMODYNAMIC, _STAGES = 0.4, 1.2, 3  # s, s, and how many low-pass stages of the latter
_COUPLING = 0.88  # distance to instability is 1 minus this, in every brain
_LOCAL = 0.3  # share of the coupling along the cortical sheet, from its harmonics
_INDIVIDUAL = 0.35  # SD of the log of each connection over participants: their fingerprint
_PERIOD, _HIGHEST = 1024.0, 0.5  # s and Hz: resolution and end of the spectrum
_SHARED_NOISE = 0.5  # of the measurement noise, how much parcels share as they share signal
_SIGNAL = 0.8  # percent, SD of the brain's part
_EVENT_EVERY, _EVENT_LASTS, _EVENT_REACH = 12.0, 3.0, 30.0  # s, s, mm: head movements
_WARP, _WARP_REACH = 1.5, 28.0  # mm, mm: individual anatomy
_CENTRE = (0.0, -20.0, 12.0)  # mm, what heads are scaled about
_MARGIN = 16  # mm of template kept around the T1 grid
# random streams
_PEOPLE, _WIRING, _LEVEL, _ACTIVITY, _NOISE, _MOTION, _ANATOMY, _SCANNER = range(8)
_ONE_BY_ONE, _TEMPLATE = Lock(), Lock()  # a limit on BLAS threads is the whole process's


def synthetic_cohort(
    n: int = 200,
    seed: int = 0,
    *,
    atlas: str = "schaefer100",
    sites: Sequence[str | Site] = tuple(SITES),
    voxel_mm: float = 4.0,
    minutes: float | None = None,
    tr: float | None = None,
    effects: bool | Mapping[str, float] = True,
    missing: float = 0.06,
    repeats: float = 0.0,
) -> xr.Dataset:
    """A cohort of `n` participants with known ground truth, nothing computed until it is read.

    Parameters
    ----------
    n : participants. The first ten of 200 are the same people, byte for byte, as ten of ten.
    seed : another seed is another cohort
    atlas : "schaefer100", "schaefer200" or "schaefer400"
    sites : names of `SITES`, or `Site` objects; participants take turns
    voxel_mm : voxel of the T1 [mm]
    minutes : length of every BOLD scan; None for each site's own
    tr : sample every scan at this repetition time [s] instead of the site's. Brain, noise and
        movement stay the same, so two cohorts that differ in `tr` alone agree exactly at every
        moment that both sample, to the rounding of float32.
    effects : True for all planted effects, False for none, or name -> factor on its planted size
        (`EFFECTS`); names left out keep their size. Without "site", sites still differ in TR and
        length; without "motion", movement leaves no trace and does not follow the diagnosis.
    missing : share of participants with one modality only, half of them without T1
    repeats : share of participants with a second session one year later

    Returns
    -------
    Cohort Dataset; `attrs["truth"]` (JSON) says what was planted. `fusion` says whether a trait of
    function (sensory coupling) or a trait of structure (elongation of the head) is the larger:
    knowing either is right in 72 % of people at best, knowing both in all. The traits themselves
    are on `subject` as ground truth, `trait_structure` and `trait_function`: never features.

    Raises
    ------
    InputError
        For what is out of range or unknown.
    """
    effects = _check_effects(effects)
    _check_sizes(n, seed, atlas, missing, repeats)
    scaled = [_scaled(site, effects["site"]) for site in _check_sites(sites, minutes, tr)]
    people = (_participant(i, seed, scaled, effects, missing, repeats) for i in range(n))
    rows = [row for sessions in people for row in sessions]
    labels = load_atlas(atlas)
    n_time = max(site.n_volumes for site in scaled)
    shape = tuple(len(axis) for axis in t1_grid(voxel_mm).values())
    bold = _lazily(_bold, rows, (labels.sizes["roi"], n_time), atlas=atlas, effects=effects)
    t1 = _lazily(_t1, rows, shape, voxel_mm=voxel_mm, effects=effects)
    roi = {name: labels[name].values for name in ("roi", *ROI_COORDS)}
    truth = json.dumps(_truth(scaled, effects))
    attrs = {"atlas": atlas, "source": "synthetic", **ABOUT, "seed": seed, "truth": truth}
    return build_cohort({BOLD.name: bold, ANATOMY.name: t1}, _labels(rows), roi, attrs)


def _scaled(site: Site, factor: float) -> Site:
    """A site whose noise, gain and bias differ from the neutral ones by `factor` as much."""
    noise = float(np.clip(Site.noise + factor * (site.noise - Site.noise), 0, 0.95))
    x, y, z = (factor * slope for slope in site.bias)
    return replace(site, noise=noise, gain=site.gain**factor, bias=(x, y, z))


@dataclass(frozen=True)
class _Row:
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


def _participant(number, seed, sites, effects, missing, repeats) -> list[_Row]:
    """The sessions of one participant; draws in a fixed order, whatever the options."""
    rng = np.random.default_rng([seed, number, _PEOPLE, 0])
    age, man, patient, lacks, repeated = rng.random(5)
    lacks = lacks if number else 0.5  # the first participant is complete
    function_led = rng.random() < 0.5
    fd, both = np.clip(rng.standard_normal(2), -2.5, 2.5)
    shift = SIZES["fusion"]["trait_shift"] * (1 if function_led else -1)
    both *= np.sqrt(1 - shift**2)
    diagnosis = "patient" if patient < 0.5 else "control"
    motion = SIZES["motion"]
    median = np.log(motion["median_fd_control_mm"])
    if diagnosis == "patient":
        median += motion["log_fd_of_patients"] * effects["motion"]
    first = _Row(
        seed=seed,
        number=number,
        session=1,
        n_sessions=2 if repeated < repeats else 1,
        site=sites[number % len(sites)],
        age=round(AGES[0] + np.ptp(AGES) * age, 1),
        sex="M" if man < 0.5 else "F",
        diagnosis=diagnosis,
        mean_fd=round(float(np.exp(median + 0.4 * fd)), 3),
        trait_structure=float(both - shift),
        trait_function=float(both + shift),
        has_run=bool(lacks <= 1 - missing / 2),
        has_image=bool(lacks >= missing / 2),
    )
    return [replace(first, session=1 + k, age=first.age + k) for k in range(first.n_sessions)]


def _labels(rows) -> dict[str, list | np.ndarray]:
    """Coordinates on subject."""
    participant = [f"sub-{row.number + 1:04d}" for row in rows]
    ids = [
        f"{name}/ses-{row.session}" if row.n_sessions > 1 else name
        for name, row in zip(participant, rows, strict=True)
    ]
    has_run = np.array([row.has_run for row in rows])
    out: dict[str, list | np.ndarray] = {"subject": ids, "participant": participant}
    out["session"] = [str(row.session) for row in rows]
    out["site"] = [row.site.name for row in rows]
    out["tr"] = np.where(has_run, [row.site.tr for row in rows], np.nan)
    out["n_volumes"] = np.where(has_run, [row.site.n_volumes for row in rows], 0)
    out["mean_fd"] = np.where(has_run, [row.mean_fd for row in rows], np.nan)
    out["coverage"] = has_run.astype(float)
    out[BOLD.has], out[ANATOMY.has] = has_run, [row.has_image for row in rows]
    for name in ("age", "sex", "diagnosis", *TRAITS):
        out[name] = [getattr(row, name) for row in rows]
    ahead = np.greater(out["trait_function"], out["trait_structure"])
    out["fusion"] = np.where(ahead, "function-led", "structure-led")
    return out


def _lazily(compute, rows, shape, **options) -> da.Array:
    """`compute(row, shape, **options)` of every row as a Dask array, one chunk a row."""
    one = dask.delayed(compute, pure=True)
    values = [da.from_delayed(one(row, shape, **options), shape, "float32") for row in rows]
    return da.stack(values)


# ---------------------------------------------------------------------------------------- BOLD


def _bold(row: _Row, shape, atlas: str, effects) -> np.ndarray:
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
    """The whole-brain model's haemodynamic signal [percent] at any moments, (time, roi).

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
    """Each mode's filter from noise to haemodynamic signal, (mode, frequency)."""
    neural = 1 / ((1 - _COUPLING * value)[:, None] / _NEURAL + 1j * omega)
    return neural / (1 + 1j * omega * _HAEMODYNAMIC) ** _STAGES


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
    noise = brain["near"] @ noise @ brain["near"]  # neighbours are wired alike
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
    parcels close to each other look more connected: the field's distance-dependent artefact.
    """
    rng = row.rng(_MOTION)
    most = int(np.ceil(4 * row.site.minutes * 60 / _EVENT_EVERY)) + 8
    onset = np.cumsum(rng.exponential(_EVENT_EVERY, most))
    size = row.mean_fd * SIZES["motion"]["percent_signal_per_mm"] * rng.exponential(1, most)
    pattern = rng.standard_normal((most, len(brain["near"]))) @ brain["near"] - 1
    since = seconds[:, None] - onset
    return (np.where(since >= 0, np.exp(-since.clip(0) / _EVENT_LASTS), 0) * size) @ pattern


# ------------------------------------------------------------------------------------------ T1


def _t1(row: _Row, shape, voxel_mm: float, effects) -> np.ndarray:
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
        out[axis] = (_CENTRE[axis] + (grid - _CENTRE[axis]) / scale[axis]).reshape(along)
        out[axis] += _WARP * _smooth_field(rng, head["grid"])
        out[axis] -= wider * head["outward"][axis]
        out[axis] = (out[axis] - head["origin"][axis]) / head["step"][axis]
    return out


def _smooth_field(rng, grid):
    """A Gaussian random field of variance 1 and reach _WARP_REACH on the grid."""
    reach = _WARP_REACH
    centres = [np.arange(g.min() - reach, g.max() + 2 * reach, reach) for g in grid]
    field = rng.standard_normal([len(c) for c in centres])
    for g, c in zip(grid, centres, strict=True):
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
    image, grey = (_on_grid(volume, step) for volume in _template_volumes())
    depth = ndimage.distance_transform_edt(image > 0.15, sampling=step)  # mm
    cortex = np.where(depth < 30, grey * (image - 0.3).clip(0), 0)
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
    """MNI152 (ICBM 2009a) T1 and grey matter as nilearn ships them, in 0 to 1, 1 mm."""
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


# ----------------------------------------------------------------------------------- what is true


def _truth(sites, effects):
    """What was planted, for `attrs["truth"]`."""
    out = {name: {"factor": effects[name], **SIZES[name]} for name in EFFECTS}
    out["site"] |= {site.name: asdict(site) for site in sites}
    shift = SIZES["fusion"]["trait_shift"]
    alone = round(float(ndtr(shift / np.sqrt(1 - shift**2))), 3)
    out["fusion"]["label"] = "function-led where trait_function > trait_structure"
    out["fusion"]["best_accuracy"] = {"structure": alone, "function": alone, "both": 1.0}
    return out


# ------------------------------------------------------------------------------------------ checks


def _check_effects(effects):
    """A factor for every effect."""
    if isinstance(effects, bool):
        return dict.fromkeys(EFFECTS, float(effects))
    if not isinstance(effects, Mapping) or not set(effects) <= set(EFFECTS):
        found = listed(sorted(map(str, effects))) if isinstance(effects, Mapping) else repr(effects)
        fact = f"Expected effects among {listed(EFFECTS, 9)}, found {found}"
        raise InputError(fact, "Give True, False or a mapping such as {'age': 0, 'motion': 2}")
    for name, factor in effects.items():
        if not (np.isscalar(factor) and np.isfinite(factor) and 0 <= factor <= 3):
            fact = f"Expected a factor between 0 and 3 for the effect '{name}', found {factor!r}"
            raise InputError(fact, "Give 0 to leave the effect out, 1 for its planted size")
    return dict.fromkeys(EFFECTS, 1.0) | {name: float(f) for name, f in effects.items()}


def _check_sizes(n, seed, atlas, missing, repeats):
    if not all(isinstance(k, int | np.integer) for k in (n, seed)) or n < 1 or seed < 0:
        fact = "Expected n as a whole number from 1 and seed as one from 0, found "
        raise InputError(f"{fact}{n!r} and {seed!r}", "Call synthetic_cohort(200, seed=0), say")
    check_choice("the atlas", atlas, ATLASES)
    if not (0 <= missing <= 1 and 0 <= repeats <= 1):
        fact = f"Expected missing and repeats from 0 to 1, found {missing!r} and {repeats!r}"
        raise InputError(fact, "Give shares of the participants: missing=0.06 is 6 %")


def _check_sites(sites, minutes, tr):
    """Sites as `Site` objects with the overriding length and TR, checked."""
    chosen = [sites] if isinstance(sites, str | Site) else list(sites)
    unknown = [s for s in chosen if not isinstance(s, Site) and s not in SITES]
    if unknown or not chosen:
        fact = f"Expected sites among {listed(SITES)}, found {listed(unknown) or 'none'}"
        raise InputError(fact, "Name some of these, or give bhx.Site(name, tr, minutes) objects")
    given = {k: v for k, v in {"tr": tr, "minutes": minutes}.items() if v is not None}
    chosen = [replace(s if isinstance(s, Site) else SITES[s], **given) for s in chosen]
    names = [site.name for site in chosen]
    if len({*names}) < len({*chosen}):
        fact = f"Expected a name of its own for each site, found {listed(names)}"
        raise InputError(fact, "Rename the sites that differ")
    check_tr([site.tr for site in chosen], [f"site {name}" for name in names])
    for site in chosen:
        if not (0 < site.minutes <= 120 and site.n_volumes >= 2):
            fact = f"Expected scans of two volumes to 120 minutes, found {site.minutes!r} minutes "
            fact += f"at TR {site.tr:g} s at site {site.name}"
            raise InputError(fact, "Give lengths in minutes and repetition times in seconds")
        if not (0 <= site.noise < 1 and site.gain > 0 and len(site.bias) == 3):
            fact = "Expected noise in [0, 1), a positive gain and three bias slopes at site "
            fact += f"{site.name}, found {site.noise!r}, {site.gain!r} and {site.bias!r}"
            raise InputError(fact, "Take bhx.data.synthetic.SITES as examples")
    return tuple(chosen)
