"""The explorer as one page that needs neither Python nor a network; offline.js is its other half.

People, labels, cortex and bars, linked; the slices of the T1 stay with the widgets.
"""

from __future__ import annotations

import base64
import json
from html import escape
from pathlib import Path

import numpy as np

from bhx.data.page import drawn, page
from bhx.schema import ATTENTION
from bhx.show.colors import Scale
from bhx.show.panels import BEYOND, GROUPS

SCRIPT = Path(__file__).with_suffix(".js")
AT_MOST = 600_000  # values of single tokens in a page; beyond, it has their mean alone
SIGNS = {"plain": (0, 1), "signed": (-1, 1)}  # of a map's values
STYLE = "display: grid; grid-template-columns: minmax(0, 1fr) minmax(0, 1fr)"


def offline_page(explorer) -> str:
    """HTML of the explorer as it is: colored and lit as its widgets, everybody selected."""
    panels, maps = explorer.panels, explorer.maps[explorer.surface_of]
    maps = np.broadcast_to(maps, (len(explorer.subjects), *maps.shape[1:]))  # or one for all
    maps = maps if maps.size <= AT_MOST else maps.mean(1, keepdims=True)
    shares = explorer.maps[ATTENTION]
    content = {
        "subjects": list(map(str, explorer.subjects)),
        "has": explorer.has[explorer.surface_of].tolist(),
        "what": explorer.what().capitalize(),
        "tokens": explorer.tokens.tolist(),
        "modalities": shares.shape[2],
        "layers": maps.shape[1],
        "parcelCount": maps.shape[2],
        "maps": _bytes(maps, "<f4"),
        "shares": _bytes(shares, "<f4"),
        "parcels": {name: _bytes(parcel, "<u2") for name, parcel in panels.parcels.items()},
        "dots": {name: _bytes(parcel, "<u2") for name, parcel in panels.dots.items()},
        "labels": {name: _values(coord) for name, coord in explorer.labels.items()},
        "beyond": BEYOND,
        "groups": GROUPS,
        "scales": {name: Scale.of(ends).color_axis()["colorscale"] for name, ends in SIGNS.items()},
    }
    by = dict.fromkeys(
        [panels.controls["color"].value, *(c.name for c in explorer.labels.values())]
    )
    keys = ("marker", "hover", "legend")
    content["looks"] = {name: dict(zip(keys, panels.markers_by(name), strict=True)) for name in by}
    content["bars"] = {name: [kinds, at.tolist()] for name, (kinds, at) in explorer.bars.items()}
    words = json.dumps(content).replace("<", "\\u003c")
    shown = [panels.people, panels.brain, panels.strip, panels.labels]  # the script knows by place
    figures = "".join(drawn(shown))
    hint = "Drag around people, or click one" + ("; click a bar" if maps.shape[1] > 1 else "")
    hint += ". Attention says what was read, not what mattered."
    if (n := len(explorer.subjects)) < explorer.drawn_from:
        hint += f" These are {n:,} of {explorer.drawn_from:,} people, drawn at random."
    names = {"groupA": "Set group A", "groupB": "Set group B", "undo": "Undo", "reset": "Reset"}
    buttons = " ".join(f"<button id='{key}'>{name}</button>" for key, name in names.items())
    color = "".join(f"<option>{escape(name)}</option>" for name in by)
    color = f"<label>color <select id='color'>{color}</select></label> <span id='legend'></span>"
    body = f"<p>{hint} {buttons} {color}</p><p id='said' aria-live='polite'></p>"
    body += f'<div style="{STYLE}">{figures}<table id="card"></table></div>'
    body += f'<script type="application/json" id="explorer">{words}</script>'
    script = SCRIPT.read_text(encoding="utf-8")
    return page("Explorer", f'{body}<script type="module">{script}</script>')


def _bytes(values, dtype):
    return base64.b64encode(np.ascontiguousarray(values, dtype).tobytes()).decode()


def _values(coord):
    """Labels as JSON knows them: numbers, none for those missing, and words."""
    values = coord.values
    if values.dtype.kind != "f":
        return values.tolist() if values.dtype.kind in "iu" else [str(v) for v in values.tolist()]
    return [None if np.isnan(v) else float(v) for v in values]
