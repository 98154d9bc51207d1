"""The explorer as one page that needs neither Python nor a network; offline.js is its other half.

People, labels, cortex, bars and the slices of the T1, linked.
"""

from __future__ import annotations

import base64
import json
from html import escape
from pathlib import Path

import numpy as np

from bhx.data.page import drawn, page
from bhx.errors import listed
from bhx.modalities.t1 import T1_SHAPE, t1_grid
from bhx.schema import ATTENTION
from bhx.show.colors import Scale
from bhx.show.panels import BEYOND, GROUPS, REACH
from bhx.show.people import axis_name
from bhx.show.volume import PLANES, gray_levels, template

SCRIPT = Path(__file__).with_suffix(".js")
IN_A_PAGE = 700_000  # values of people, for 10 MB
AT_MOST = 600_000  # values of single tokens in a page; beyond, it has their mean alone
SIGNS = {"plain": (0, 1), "signed": (-1, 1)}  # of a map's values
STYLE = "display: grid; grid-template-columns: minmax(0, 1fr) minmax(0, 1fr)"


def offline_page(explorer) -> str:
    """HTML of the explorer as it is: colored and lit as its widgets, everybody selected."""
    panels, shares, maps = explorer.panels, explorer.maps[ATTENTION], _maps(explorer)
    cubes = [name for name in explorer.on_cubes if name in maps]
    content = {
        "subjects": list(map(str, explorer.subjects)),
        "tokens": explorer.tokens.tolist(),
        "modalities": shares.shape[2],
        "maps": maps,
        "shares": _bytes(shares, "<f4"),
        "parcels": {name: _bytes(parcel, "<u2") for name, parcel in panels.parcels.items()},
        "dots": {name: _bytes(parcel, "<u2") for name, parcel in panels.dots.items()},
        "labels": {name: _values(coord) for name, coord in explorer.labels.items()},
        "beyond": BEYOND,
        "groups": GROUPS,
        "scales": {name: Scale.of(ends).color_axis()["colorscale"] for name, ends in SIGNS.items()},
        "points": {name: _placed(points) for name, points in explorer.layouts.items()},
        "volume": _volume(len(explorer.maps[cubes[0]][0, 0])) if cubes else None,
    }
    by = dict.fromkeys(
        [panels.controls["color"].value, *(c.name for c in explorer.labels.values())]
    )
    keys = ("marker", "hover", "legend")
    content["looks"] = {name: dict(zip(keys, panels.markers_by(name), strict=True)) for name in by}
    content["bars"] = {name: [kinds, at.tolist()] for name, (kinds, at) in explorer.bars.items()}
    words = json.dumps(content).replace("<", "\\u003c")
    shown = [panels.people, panels.brain, panels.strip, panels.labels]  # the script knows by place
    figures = drawn([*shown, panels.slices] if cubes else shown)
    if cubes:
        figures[-1] = f"<div>{figures[-1]}{_sliders()}</div>"
    single = maps[explorer.surface_of]["layers"] > 1
    hint = "Drag around people, or click one" + ("; click a bar" if single else "")
    hint += ". Attention says what was read, not what mattered."
    if (n := len(explorer.subjects)) < explorer.drawn_from:
        hint += f" These are {n:,} of {explorer.drawn_from:,} people, drawn at random."
    if left := [name for name in explorer.on_roi + explorer.on_cubes if name not in maps]:
        hint += f" Too large for this page: the maps of {escape(listed(left))}."
    names = {"groupA": "Set group A", "groupB": "Set group B", "undo": "Undo", "reset": "Reset"}
    buttons = " ".join(f"<button id='{key}'>{name}</button>" for key, name in names.items())
    choices = _choice("color", "color", by) + _choice("map", "map of", maps)
    first = dict.fromkeys([explorer.points_of, *explorer.layouts])
    choices += _choice("points", "people by", first) + "<span id='legend'></span>"
    body = f"<p>{hint} {buttons} {choices}</p><p id='said' aria-live='polite'></p>"
    body += f'<div style="{STYLE}">{"".join(figures)}<table id="card"></table></div>'
    body += f'<script type="application/json" id="explorer">{words}</script>'
    script = SCRIPT.read_text(encoding="utf-8")
    return page("Explorer", f'{body}<script type="module">{script}</script>')


def _maps(explorer) -> dict:
    """What the page has of each map, the one that is seen first: of single tokens where there is
    room for them, else their mean; of a further map that has no room, nothing."""
    room, out = IN_A_PAGE - explorer.maps[ATTENTION].size, {}
    for name in dict.fromkeys([explorer.surface_of, *explorer.on_roi, *explorer.on_cubes]):
        values = explorer.maps[name]
        values = values.reshape(*values.shape[:2], -1)
        if values.size > (room if out else AT_MOST):
            values = values.mean(1, keepdims=True)
        if out and values.size > room:
            continue
        room -= values.size
        out[name] = {
            "values": _bytes(values, "<f4"),
            "people": len(values),  # or one for all
            "layers": values.shape[1],
            "has": explorer.has[name].tolist(),
            "what": explorer.what(name).capitalize(),
            "units": explorer.units(name),
            "cubes": name in explorer.on_cubes,
        }
    return out


def _placed(points) -> dict:
    x, y = points.values[:, :2].T
    return {"x": x.tolist(), "y": y.tolist(), "axes": [axis_name(points, i) for i in (1, 2)]}


def _volume(along: int) -> dict:
    """The template's gray levels, and where its voxels and the cubes (so many along x) are."""
    gray = gray_levels(template()).transpose("x", "y", "z")
    cubes = t1_grid(T1_SHAPE[0] / along)
    return {
        "gray": _bytes(gray.values, "u1"),
        "mm": {axis: gray[axis].values.tolist() for axis in "xyz"},
        "cubes": {axis: mm.tolist() for axis, mm in cubes.items()},
        "planes": list(PLANES.values()),
    }


def _sliders():
    """Where the three planes lie [mm]."""
    return "".join(
        f"<label>{axis} <input type='range' id='at-{axis}' min='{first}' max='{last}' step='2' "
        f"value='{start}' style='width: 28%'></label> "
        for axis, (first, start, last) in REACH.items()
    )


def _choice(key, title, names):
    """A box to choose from, where there is something to choose."""
    options = "".join(f"<option>{escape(name)}</option>" for name in names)
    style = "" if len(names) > 1 else " style='display: none'"
    return f"<label{style}>{title} <select id='{key}'>{options}</select></label> "


def _bytes(values, dtype):
    return base64.b64encode(np.ascontiguousarray(values, dtype).tobytes()).decode()


def _values(coord):
    """Labels as JSON knows them: numbers, none for those missing, and words."""
    values = coord.values
    if values.dtype.kind != "f":
        return values.tolist() if values.dtype.kind in "iu" else [str(v) for v in values.tolist()]
    return [None if np.isnan(v) else float(v) for v in values]
