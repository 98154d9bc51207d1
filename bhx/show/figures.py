"""Is this figure the one the lesson shows? A plotly figure's data against a stored reference.

Numbers are compared within a tolerance, never as rounded hashes: another processor rounds
differently and changes nothing, another model does. No figure is drawn here.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np

from bhx.errors import InputError

AT_MOST = 2000  # numbers kept of one array, evenly spaced; its length is kept too
TOLERANCE = 2e-3  # of an array's range
# Of an array's largest value. The logs of lessons 06 and 09, with AVX2 and with SSE4.2 alone,
# differed by up to 1.8e-6 of it: rounding of single precision, carried on from step to step.
TRAINING_NOISE = 5e-6


def check_figure(
    figure, name: str, *, folder="figures", tolerance: float = TOLERANCE, trained: bool = False
) -> None:
    """Print one line when the figure's data are those of the reference, else fail saying where.

    With BHX_UPDATE_FIGURES=1 in the environment the reference is written instead, and the same
    line printed. Where there is no folder of references at all, as for a notebook opened alone,
    one line says so and nothing is compared.

    Parameters
    ----------
    figure : plotly figure
    name : of the reference, `<folder>/<name>.npz`
    tolerance : largest difference allowed, as a share of the array's range
    trained : the figure shows a run that was trained just now. What training gives differs between
        processors in proportion to its values, so an array whose range is far below its values (a
        loss that hardly moves) may differ by that much.

    Raises
    ------
    InputError
        The folder has no such reference.
    AssertionError
        The traces, arrays or texts differ; the trace and the largest difference are named.
    """
    found = _arrays(figure)
    path = Path(folder) / f"{name}.npz"
    if os.environ.get("BHX_UPDATE_FIGURES"):
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savez_compressed(path, **found)
    if not Path(folder).is_dir():  # a notebook on its own
        return print(f"figure {name}: not checked, its reference stays in bhx's repository")
    if not path.exists():
        fact = f"Expected a reference at '{path}', found none"
        raise InputError(fact, "Write it: set BHX_UPDATE_FIGURES=1 and run the notebook again")
    with np.load(path) as reference:
        _compare(name, found, dict(reference), tolerance, trained)
    print(f"figure {name}: ok ({len(figure.data)} traces, {len(found)} arrays)")


def difference(found, wanted, *, tolerance: float = TOLERANCE, trained: bool = False) -> str:
    """In words, how numbers or words differ from those wanted; "" where they are the same.

    Parameters
    ----------
    found, wanted : arrays; a single number (no dims) counts as its own range
    tolerance, trained : see `check_figure`
    """
    if found.shape != wanted.shape:
        return f"has shape {found.shape}, expected {wanted.shape}"
    if wanted.dtype.kind in "US":
        changed = np.flatnonzero(found != wanted)[:1]
        return "".join(f"at {i} is {found[i]!s}, expected {wanted[i]!s}" for i in changed)
    missing = np.isnan(wanted)
    if not np.array_equal(np.isnan(found), missing):
        return "is missing values elsewhere"
    values = wanted[~missing]
    scale = np.abs(values).max(initial=0)
    reach = (np.ptp(values) if values.size else 0) if wanted.ndim else scale
    allowed = max(tolerance * max(reach, 1e-6), TRAINING_NOISE * scale if trained else 0)
    worst = np.nanmax(np.abs(found - wanted), initial=0)
    return f"differs by up to {worst:.3g}, allowed {allowed:.3g}" if worst > allowed else ""


def _compare(name, found, reference, tolerance, trained):
    if different := sorted(found.keys() ^ reference.keys()):
        raise AssertionError(f"figure {name}: arrays that only one of both has: {different[:5]}")
    for key, wanted in reference.items():
        if problem := difference(found[key], wanted, tolerance=tolerance, trained=trained):
            raise AssertionError(f"figure {name}: {key} {problem}")


def _arrays(figure):
    """Every list of numbers or words of the traces: "<number> <trace name>/<path>" -> array."""
    out = {}
    for i, trace in enumerate(figure.data):
        label = f"{i} {trace.name or trace.type}".replace("/", "|")
        for path, values in _lists(trace.to_plotly_json()):
            array = np.asarray(values)
            if array.dtype.kind in "biuf":
                array = array.astype(np.float32)
            else:
                array = np.array([_word(v) for v in array.ravel().tolist()], str)
            flat = array.ravel()
            step = max(1, -(-flat.size // AT_MOST))
            out[f"{label}/{path}"] = flat[::step]
            out[f"{label}/{path}/size"] = np.array([flat.size], np.float32)
    return out


def _word(value):
    return value if isinstance(value, str) else json.dumps(value, default=str)


def _lists(value, path=""):
    if isinstance(value, dict) and "bdata" in value:  # plotly's typed arrays
        import base64

        data = value["bdata"]
        data = base64.b64decode(data) if isinstance(data, str) else data
        yield path, np.frombuffer(data, np.dtype(value["dtype"]))
    elif isinstance(value, dict):
        for key, inner in value.items():
            if path or key not in ("uid", "colorscale"):
                yield from _lists(inner, f"{path}.{key}" if path else key)
    elif isinstance(value, (list, tuple, np.ndarray)) and len(value):
        if isinstance(value[0], dict):
            for i, inner in enumerate(value):
                yield from _lists(inner, f"{path}[{i}]")
        else:
            yield path, value
