"""The one HTML page of bhx: a title, a body and a stylesheet, nothing that must be fetched."""

from __future__ import annotations

from html import escape

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
