"""Figures that notebooks show are compared within a tolerance when nbval runs them.

nbval compares plotly's JSON to the last bit, which differs between processors. Everything else it
compares is left as it is. A cell tagged `trained` shows a run that was trained just now.
"""

from __future__ import annotations

import base64
from copy import copy

import numpy as np

from bhx.show.figures import difference

PLOTLY = "application/vnd.plotly.v1+json"


def pytest_configure(config):
    """Let nbval's cells compare figures with `different`."""
    try:
        from nbval.plugin import IPyNbCell
    except ImportError:
        return
    if not hasattr(IPyNbCell, "compare_exactly"):
        IPyNbCell.compare_exactly = IPyNbCell.compare_outputs
        IPyNbCell.compare_outputs = compare_outputs


def compare_outputs(cell, test, ref, skip_compare=None):
    """nbval's comparison, with figures that are near the stored ones taken for these."""
    found, problems = [copy(output) for output in test], []
    trained = "trained" in cell.cell.metadata.get("tags", ())
    for output, (one, other) in zip(found, zip(map(_plotly, test), map(_plotly, ref))):  # noqa: B905
        if one is None or other is None:
            continue
        if problem := different(one, other, trained=trained):
            problems.append(f"figure: {problem}")
        else:
            output["data"] = {**output["data"], PLOTLY: other}
    same = cell.compare_exactly(found, ref, skip_compare)
    if problems:
        cell.comparison_traceback[:0] = problems
    return same


def different(found, wanted, path="", trained=False) -> str:
    """Where and by how much two figures differ, or nothing; numbers within the tolerance."""
    if isinstance(wanted, dict) and isinstance(found, dict) and not {"bdata"} & {*found, *wanted}:
        if only := sorted(found.keys() ^ wanted.keys()):
            return f"{path or 'top'}: only one of both has {only[:5]}"
        parts = [(found[k], wanted[k], _at(path, k), trained) for k in wanted]
        return next(filter(None, (different(*part) for part in parts)), "")
    if _holds_objects(wanted) and isinstance(found, list) and len(found) == len(wanted):
        pairs = enumerate(zip(found, wanted, strict=True))
        parts = [(a, b, _at(path, i, b), trained) for i, (a, b) in pairs]
        return next(filter(None, (different(*part) for part in parts)), "")
    one, other = _array(found), _array(wanted)
    if one is None or other is None or one.shape != other.shape:
        return "" if found == wanted else f"{path} is {found!r:.80}, expected {wanted!r:.80}"
    if other.size == 1:  # a number by itself, such as an axis's end
        one, other = one.squeeze(), other.squeeze()
    problem = difference(one, other, trained=trained)
    return f"{path} {problem}" if problem else ""


def _plotly(output):
    return output.get("data", {}).get(PLOTLY)


def _at(path, key, value=None):
    name = f" '{value['name']}'" if isinstance(value, dict) and value.get("name") else ""
    return f"{path}[{key}]{name}" if isinstance(key, int) else f"{path}.{key}".lstrip(".")


def _holds_objects(value):
    return isinstance(value, list) and any(isinstance(v, (dict, list, str)) for v in value)


def _array(value):
    """Numbers as a float array, plotly's typed arrays included; None for anything else."""
    if isinstance(value, dict):
        if "bdata" not in value:
            return None
        return np.frombuffer(base64.b64decode(value["bdata"]), value["dtype"]).astype(float)
    try:
        return np.asarray(np.nan if value is None else value, dtype=float)
    except (TypeError, ValueError):
        return None
