"""A cohort of synthetic brains with planted, documented effects, computed when it is read.

What one participant's scans are computed from is in `brains`. Every number that a test or a lesson
may look for is in `SIZES`, `SITES` and `attrs["truth"]`. These brains show how the tools work; they
are no evidence about real ones. No file of a user is read here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace

import dask
import dask.array as da
import numpy as np
import xarray as xr
from scipy.special import ndtr

from bhx.data.atlas import load_atlas, parcel_labels
from bhx.data.brains import AGES, EFFECTS, PEOPLE, SIZES, Session, Site, simulate_bold, simulate_t1
from bhx.errors import InputError, check_choice, listed
from bhx.modalities.bold import BOLD, check_tr
from bhx.modalities.t1 import ANATOMY, t1_grid
from bhx.schema import build_cohort

SITES = {
    "A": Site("A", 0.72, 8.0, 0.40, 1.00, (0.00, 0.10, 0.10)),
    "B": Site("B", 0.80, 6.0, 0.44, 1.30, (0.20, -0.10, 0.00)),
    "C": Site("C", 1.50, 7.0, 0.34, 0.80, (-0.15, 0.15, 0.25)),
    "D": Site("D", 2.00, 8.0, 0.47, 1.10, (0.00, -0.30, 0.15)),
    "E": Site("E", 3.00, 6.0, 0.38, 0.90, (-0.25, 0.00, -0.20)),
}

ABOUT = {
    "licence": "BSD-3-Clause; T1 derived from the ICBM 2009a template, (C) 1993-2004 "
    "Louis Collins, McConnell Brain Imaging Centre, free with this notice",
    "preprocessing": "none: simulated on the grid; BOLD in scanner units, baseline "
    "10 000 times the site's gain, so 1 % signal change is 100 times the gain",
}
TRAITS = ("trait_structure", "trait_function")


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
    _check_sizes(n, seed, missing, repeats)
    scanners = [_scaled(site, effects["site"]) for site in _check_sites(sites, minutes, tr)]
    labels = load_atlas(atlas)
    people = (_participant(i, seed, scanners, effects, missing, repeats) for i in range(n))
    rows = [row for sessions in people for row in sessions]
    n_time = max(site.n_volumes for site in scanners)
    shape = tuple(len(axis) for axis in t1_grid(voxel_mm).values())
    bold = _lazily(simulate_bold, rows, (labels.sizes["roi"], n_time), atlas=atlas, effects=effects)
    t1 = _lazily(simulate_t1, rows, shape, voxel_mm=voxel_mm, effects=effects)
    truth = json.dumps(_truth(scanners, effects))
    attrs = {"atlas": atlas, "source": "synthetic", **ABOUT, "seed": seed, "truth": truth}
    data = {BOLD.name: bold, ANATOMY.name: t1}
    return build_cohort(data, _labels(rows), parcel_labels(labels), attrs)


def _scaled(site: Site, factor: float) -> Site:
    """A site whose noise, gain and bias differ from the neutral ones by `factor` as much."""
    noise = float(np.clip(Site.noise + factor * (site.noise - Site.noise), 0, 0.95))
    x, y, z = (factor * slope for slope in site.bias)
    return replace(site, noise=noise, gain=site.gain**factor, bias=(x, y, z))


def _participant(number, seed, sites, effects, missing, repeats) -> list[Session]:
    """The sessions of one participant; draws in a fixed order, whatever the options."""
    rng = np.random.default_rng([seed, number, PEOPLE, 0])
    age, man, patient, lacks, repeated = rng.random(5)
    lacks = lacks if number else 0.5  # the first participant is complete
    function_led = rng.random() < 0.5
    fd, both = np.clip(rng.standard_normal(2), -2.5, 2.5)
    shift = SIZES["fusion"]["trait_shift"] * (1 if function_led else -1)
    both *= np.sqrt(1 - shift**2)
    motion = SIZES["motion"]
    median = np.log(motion["median_fd_control_mm"])
    median += motion["log_fd_of_patients"] * effects["motion"] * (patient < 0.5)
    first = Session(
        seed=seed,
        number=number,
        session=1,
        n_sessions=2 if repeated < repeats else 1,
        site=sites[number % len(sites)],
        age=round(AGES[0] + np.ptp(AGES) * age, 1),
        sex="M" if man < 0.5 else "F",
        diagnosis="patient" if patient < 0.5 else "control",
        mean_fd=round(float(np.exp(median + 0.4 * fd)), 3),
        trait_structure=float(both - shift),
        trait_function=float(both + shift),
        has_run=bool(lacks <= 1 - missing / 2),
        has_image=bool(lacks >= missing / 2),
    )
    return [replace(first, session=1 + k, age=first.age + k) for k in range(first.n_sessions)]


def _labels(rows) -> dict[str, Sequence]:
    """Coordinates on subject."""
    participant = [f"sub-{row.number + 1:04d}" for row in rows]
    session = [f"/ses-{row.session}" if row.n_sessions > 1 else "" for row in rows]
    ids = [*map("".join, zip(participant, session, strict=True))]
    has_run = np.array([row.has_run for row in rows])
    out: dict = {"subject": ids, "participant": participant}
    out["session"] = [str(row.session) for row in rows]
    out["site"] = [row.site.name for row in rows]
    out["tr"] = np.where(has_run, [row.site.tr for row in rows], np.nan)
    out["n_volumes"] = np.where(has_run, [row.site.n_volumes for row in rows], 0)
    out["mean_fd"] = np.where(has_run, [row.mean_fd for row in rows], np.nan)
    out["coverage"] = has_run.astype(float)
    for name in ("age", "sex", "diagnosis", *TRAITS):
        out[name] = [getattr(row, name) for row in rows]
    out[BOLD.has], out[ANATOMY.has] = has_run, [row.has_image for row in rows]
    ahead = np.greater(out["trait_function"], out["trait_structure"])
    out["fusion"] = np.where(ahead, "function-led", "structure-led")
    return out


def _lazily(compute, rows, shape, **options) -> da.Array:
    """`compute(row, shape, **options)` of every row as a Dask array, one chunk a row."""
    one = dask.delayed(compute, pure=True)
    values = [da.from_delayed(one(row, shape, **options), shape, "float32") for row in rows]
    return da.stack(values)


def _truth(sites, effects):
    """What was planted, for `attrs["truth"]`."""
    out = {name: {"factor": effects[name], **SIZES[name]} for name in EFFECTS}
    out["site"] |= {site.name: asdict(site) for site in sites}
    shift = SIZES["fusion"]["trait_shift"]
    alone = round(float(ndtr(shift / np.sqrt(1 - shift**2))), 3)
    out["fusion"]["label"] = "function-led where trait_function > trait_structure"
    out["fusion"]["best_accuracy"] = {"structure": alone, "function": alone, "both": 1.0}
    return out


def _check_effects(effects):
    """A factor for every effect."""
    if isinstance(effects, bool):
        return dict.fromkeys(EFFECTS, float(effects))
    known = isinstance(effects, Mapping) and set(effects) <= set(EFFECTS)
    if not (known and all(0 <= factor <= 3 for factor in effects.values())):
        fact = f"Expected effects as factors from 0 to 3 of {listed(EFFECTS, 9)}, found {effects!r}"
        raise InputError(fact, "Give True, False or a mapping such as {'age': 0, 'motion': 2}")
    return dict.fromkeys(EFFECTS, 1.0) | {name: float(f) for name, f in effects.items()}


def _check_sizes(n, seed, missing, repeats):
    if not all(isinstance(k, int | np.integer) for k in (n, seed)) or n < 1 or seed < 0:
        fact = "Expected n as a whole number from 1 and seed as one from 0, found "
        raise InputError(f"{fact}{n!r} and {seed!r}", "Call synthetic_cohort(200, seed=0), say")
    if not (0 <= missing <= 1 and 0 <= repeats <= 1):
        fact = f"Expected missing and repeats from 0 to 1, found {missing!r} and {repeats!r}"
        raise InputError(fact, "Give shares of the participants: missing=0.06 is 6 %")


def _check_sites(sites, minutes, tr):
    """Sites as `Site` objects with the overriding length and TR, checked."""
    chosen = [sites] if isinstance(sites, str | Site) else list(sites)
    for site in chosen or [None]:
        if not isinstance(site, Site):
            check_choice("sites", site, SITES)
    given = {k: v for k, v in {"tr": tr, "minutes": minutes}.items() if v is not None}
    chosen = [replace(s if isinstance(s, Site) else SITES[s], **given) for s in chosen]
    names = [site.name for site in chosen]
    if len({*names}) < len({*chosen}):
        fact = f"Expected a name of its own for each site, found {listed(names)}"
        raise InputError(fact, "Rename the sites that differ")
    check_tr([site.tr for site in chosen], [f"site {name}" for name in names])
    for site in chosen:
        scanned = 0 < site.minutes <= 120 and site.n_volumes >= 2
        if not (scanned and 0 <= site.noise < 1 and site.gain > 0 and len(site.bias) == 3):
            fact = "Expected scans of two volumes to 120 minutes, noise in [0, 1), a positive gain "
            fact += f"and three bias slopes, found {site}"
            raise InputError(fact, "Give minutes, and seconds for tr; see bhx.data.synthetic.SITES")
    return tuple(chosen)
