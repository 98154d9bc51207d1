"""Each hub token: which network it reads, which modality."""

from __future__ import annotations

from html import escape

import matplotlib.pyplot as plt
import numpy as np
import xarray as xr
from plotly.subplots import make_subplots

from bhx.show.look import CATEGORIES, colours

# tokens and subjects ----------------------------------------------------------------------------


def plot_tokens(latents: xr.Dataset, *, subjects=None, title: str | None = None, static=False):
    """Each hub token's attention by network, beside its share of each modality.

    A cell is the token's mean attention to a parcel of the network over its mean attention to
    any parcel: 1 is no preference. Tokens are sorted by their share of BOLD.

    Parameters
    ----------
    latents : Dataset embedded with keep=("attention",)
    subjects : ids or a boolean mask; None for all
    """
    table = token_table(latents, subjects)
    title = "where hub tokens read from" if title is None else title
    if static:
        return _static_tokens(table, title)
    return _token_figure(table, title)


def token_table(latents: xr.Dataset, subjects=None) -> xr.Dataset:
    """What `plot_tokens` draws: `preference` (token, network) and `share` (token, modality)."""
    from bhx.latents.maps import each_token

    share = each_token(latents, of="modality", subjects=subjects)
    maps = each_token(latents, of="roi", subjects=subjects)
    maps = maps.assign_coords(network=("roi", maps.network.values.astype(object)))  # not lazy
    preference = maps.groupby("network").mean() / maps.mean("roi")
    order = np.argsort(-share.sel(modality="bold").values, kind="stable")
    names = list(dict.fromkeys(maps.network.values.tolist()))
    table = xr.Dataset({"preference": preference.sel(network=names), "share": share})
    return table.isel(token=order).compute()


def _token_figure(table, title):

    figure = make_subplots(1, 2, column_widths=[0.72, 0.28], horizontal_spacing=0.2)
    tokens = [str(t) for t in table.token.values]
    bar = {"title": {"text": "preference", "side": "top"}, "x": 0.58, "thickness": 12}
    bar |= {"tickvals": [0, 1, 2], "ticktext": ["0", "even", "2 or more"]}
    figure.add_heatmap(
        x=table.network.values,
        y=tokens,
        z=table.preference.values.astype(np.float32),
        hovertemplate="token %{y}, %{x}<br>%{z:.3g} times even<extra></extra>",
        **{"colorscale": colours("RdBu_r"), "zmin": 0, "zmax": 2, "colorbar": bar},
    )
    for colour, modality in zip(CATEGORIES, table.modality.values.tolist(), strict=False):
        share = table.share.sel(modality=modality).values.astype(np.float32)
        hover = "token %{y}<br>%{x:.3g}<extra>" + escape(modality) + "</extra>"
        look = {"orientation": "h", "marker_color": colour, "hovertemplate": hover}
        figure.add_bar(x=share, y=tokens, name=modality, **look, row=1, col=2)
    figure.update_yaxes(type="category", autorange="reversed", title_text="token", col=1)
    figure.update_yaxes(type="category", autorange="reversed", showticklabels=False, col=2)
    figure.update_xaxes(title_text="share of attention", range=[0, 1], col=2)
    legend = {"orientation": "h", "x": 1, "xanchor": "right", "y": 1.08}
    figure.update_layout(barmode="stack", bargap=0, height=520, legend=legend)
    return figure.update_layout(title={"text": escape(title), "x": 0.5}, margin={"t": 60, "b": 50})


def _static_tokens(table, title):

    figure, (left, right) = plt.subplots(
        1, 2, width_ratios=[3, 1], figsize=(7, 5), sharey=True, layout="constrained"
    )
    image = left.imshow(table.preference, aspect="auto", cmap="RdBu_r", vmin=0, vmax=2)
    bar = figure.colorbar(image, ax=left, ticks=[0, 1, 2])
    bar.set_ticklabels(["0", "even", "2 or more"])
    bar.ax.set_title("preference", size="medium")
    left.set_xticks(range(table.sizes["network"]), table.network.values, rotation=45, ha="right")
    left.set_ylabel("token, sorted by share of BOLD")
    left.set_yticks([])
    start = np.zeros(table.sizes["token"])
    for colour, modality in zip(CATEGORIES, table.modality.values.tolist(), strict=False):
        share = table.share.sel(modality=modality).values
        right.barh(np.arange(len(share)), share, 1, start, color=colour, label=modality)
        start = start + share
    right.set(xlabel="share of attention", xlim=(0, 1))
    right.legend(loc="upper center", bbox_to_anchor=(0.5, 1.12), ncols=2, frameon=False)
    figure.suptitle(title)
    plt.close(figure)
    return figure
