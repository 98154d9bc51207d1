"""Each hub token: which network it reads, which modality."""

from __future__ import annotations

from html import escape

import numpy as np
import plotly.graph_objects as go
import xarray as xr
from plotly.subplots import make_subplots

from bhx.latents.maps import each_token
from bhx.show.colors import CATEGORIES, finish, plotly_colors


def plot_tokens(
    latents: xr.Dataset, *, of: str = "roi", passes=None, title: str = "where hub tokens read from"
) -> go.Figure:
    """Each hub token's attention by network, beside its share of each modality.

    A cell is the token's mean attention to a parcel of the network over its mean attention to
    any parcel: 1 is no preference. Tokens are sorted by their share of the first modality.

    Parameters
    ----------
    latents : Dataset embedded with keep=("attention",)
    of : whose attention to parcels, as in `region_map`
    passes : `map_controls(...).passes`; tokens whose map fails its controls are then drawn faded
    """
    table = token_table(latents, of=of)
    figure = make_subplots(1, 2, column_widths=[0.72, 0.28], horizontal_spacing=0.2)
    tokens = [str(t) for t in table.token.values]
    bar = {"title": {"text": "preference", "side": "top"}, "x": 0.58, "thickness": 12}
    bar |= {"tickvals": [0, 1, 2], "ticktext": ["0", "even", "2 or more"]}
    z = table.preference.values.astype(np.float32)
    cells = go.Heatmap(x=table.network.values, y=tokens, z=z, zmin=0, zmax=2, colorbar=bar)
    cells.hovertemplate = "token %{y}, %{x}<br>%{z:.3g} times even<extra></extra>"
    figure.add_trace(cells.update(colorscale=plotly_colors("RdBu_r")), 1, 1)
    for name, color in zip(table.modality.values.tolist(), CATEGORIES, strict=False):
        share = table.share.sel(modality=name).values.astype(np.float32)
        bars = go.Bar(x=share, y=tokens, name=escape(name), orientation="h", marker_color=color)
        bars.hovertemplate = "token %{y}<br>%{x:.3g}<extra>" + escape(name) + "</extra>"
        figure.add_trace(bars, 1, 2)
    veil = {"x0": 0, "x1": 1, "xref": "x domain", "yref": "y", "line_width": 0}
    for i, token in enumerate(table.token.values if passes is not None else ()):
        if not bool(passes.sel(token=token)):
            figure.add_shape(**veil, y0=i - 0.5, y1=i + 0.5, fillcolor="white", opacity=0.7)
    figure.update_yaxes(type="category", autorange="reversed")
    figure.update_yaxes(title_text="token", col=1)
    figure.update_yaxes(showticklabels=False, col=2)
    figure.update_xaxes(title_text="share of attention", range=[0, 1], col=2)
    legend = {"orientation": "h", "x": 1, "xanchor": "right", "y": 1.08}
    figure.update_layout(barmode="stack", bargap=0, height=520, legend=legend)
    return finish(figure, title, margin={"t": 60, "b": 50})


def token_table(latents: xr.Dataset, *, of: str = "roi") -> xr.Dataset:
    """What `plot_tokens` draws: `preference` (token, network) and `share` (token, modality)."""
    share, maps = each_token(latents, of="modality"), each_token(latents, of=of)
    maps = maps.assign_coords(network=("roi", maps.network.values.astype(object)))  # not lazy
    names = list(dict.fromkeys(maps.network.values.tolist()))
    preference = (maps.groupby("network").mean() / maps.mean("roi")).sel(network=names)
    order = np.argsort(-share.isel(modality=0).values, kind="stable")
    return xr.Dataset({"preference": preference, "share": share}).isel(token=order).compute()
