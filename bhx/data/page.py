"""The one HTML page of bhx: a title, a body and a stylesheet, nothing that must be fetched.

And the one door of plotly's figures, plain, in a page or as widgets: none offers to upload scans.
"""

from __future__ import annotations

import json
import sys
from html import escape

# plotly 7 shows "Share chart" unless it is told not to
CONFIG = {"plotlyServerURL": "", "showSendToCloud": False, "displaylogo": False, "responsive": True}

STYLE = """
body {font: 16px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem}
table {border-collapse: collapse; margin: 1rem 0; font-size: 14px}
th, td {padding: .2rem .7rem; border-bottom: 1px solid #ddd; text-align: left}
td {font-variant-numeric: tabular-nums}
img {max-width: 100%}
footer {color: #666; font-size: .8rem}
"""


def page(title: str, body: str, *, scripts: str = "") -> str:
    """A self-contained HTML page.

    Parameters
    ----------
    title : plain text, which is escaped
    body : HTML behind the title
    scripts : HTML for the head, such as `<script>` elements
    """
    head = f'<meta charset="utf-8"><title>{escape(title)}</title><style>{STYLE}</style>{scripts}'
    body = f"<h1>{escape(title)}</h1>{body}"
    return f'<!doctype html><html lang="en"><head>{head}</head><body>{body}</body></html>'


def private(figure, **layout):
    """A plotly figure, or widget, of this layout, without the button that uploads its data.

    The button is gone wherever the figure is drawn, and in notebooks the address is too.
    """
    if "IPython" in sys.modules:  # else they are not needed, and slow to import
        from plotly.io import renderers

        for renderer in map(renderers.__getitem__, renderers):
            if hasattr(renderer, "config"):
                renderer.config = {**(renderer.config or {}), **CONFIG}
    figure._config = dict(CONFIG)  # what a widget sends along
    return figure.update_layout(modebar_remove="sendChartToCloud", **layout)


def drawn(figures) -> list[str]:
    """HTML of each plotly figure; the first one's brings the script that draws them all."""
    from plotly.offline import get_plotlyjs

    config = json.dumps({"config": CONFIG})
    parts, script = [], f"<script>{get_plotlyjs()}</script>"
    for i, figure in enumerate(figures):
        draw = f"Plotly.newPlot('figure{i}', Object.assign({config}, {figure.to_json()}))"
        parts.append(f'{script * (i == 0)}<div id="figure{i}"></div><script>{draw}</script>')
    return parts
