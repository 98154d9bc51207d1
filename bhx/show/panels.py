"""The explorer's widgets: four linked figures and the boxes around them.

Callbacks do nothing but call the explorer, and `update` sends what follows; no analysis lives here.
"""

from __future__ import annotations

from html import escape

import ipywidgets as widgets
import numpy as np
import plotly.graph_objects as go
import xarray as xr
from plotly.subplots import make_subplots

from bhx.errors import InputError, listed
from bhx.latents.maps import SHARE
from bhx.schema import subject_coords
from bhx.show.colors import CATEGORIES, CLEAR, SHAPES, Scale, finish
from bhx.show.fit import Fit
from bhx.show.people import axis_name, dots, point_groups
from bhx.show.surface import around, on_vertices, plot_surface, with_edges
from bhx.show.volume import PLANES, gray_levels, slices, template, three_planes, with_mm

ALL_TOKENS = "all tokens"
REACH = {"x": (-76, 0, 76), "y": (-110, -20, 74), "z": (-58, 10, 94)}  # mm: first, start, last
BEYOND = 0.02  # share of a map's values that may lie outside either end of its colors
GROUPS = {"A": "#B2182B", "B": "#2166AC"}  # as in the difference: red where A has more
GRAY = "#7a7a7a"  # readable on white and on black
FADED = 0.35  # opacity of what fails its controls


class Panels:
    """The explorer as widgets; the mesh is sent once, afterwards only intensities."""

    def __init__(self, explorer):
        self.explorer = explorer
        self._gray = None, gray_levels(template())  # whose brain the slices show
        self._groups = {}  # A and B, as far as they are set
        self._follows = True  # whether boxes act: not while they are brought up to date
        self._lasso = False  # whether the page shows a loop around people
        self._placed = ""  # the map of people that is drawn
        self._whose: list = []  # the people whose scan was looked for last
        self.sliders = {axis: self._slider(axis) for axis in REACH}
        self.people, self.strip = self._people(), self._strip()
        self.brain, self.slices = self._brain(), self._slices()
        self.person, self.own = self._person(), widgets.VBox([])
        self.labels = self._labels()
        for figure in (
            self.people, self.strip, self.brain, self.slices, self.person, self.labels
        ):  # fmt: skip
            _keep_state(figure)
        self.card, self.heading, self.message, self.legend = (widgets.HTML() for _ in range(4))
        self.controls = self._controls()
        self.fit = Fit()
        hidden = {"width": "100%", "height": "120px", "display": "none"}  # until it is asked for
        self.written = widgets.Textarea(layout=hidden)
        self.box = self._arranged()
        explorer.followers.append(self.update)
        self.color_people()
        self.update()

    def update(self):
        """Send what follows from the selection: values, never a mesh."""
        e, self.fit.busy = self.explorer, True
        self.card.value = f'<div style="line-height: 1.3; overflow: auto">{e.card()}</div>'
        self.heading.value, self.message.value = f"<b>{escape(e.heading())}</b>", ""
        self._update_boxes()
        self._update_people()
        self._update_labels()
        self._update_strip()
        self._update_brain()
        self._update_slices()
        self._update_person()
        self.fit.busy = False

    # people ---------------------------------------------------------------------------------

    def _people(self):
        everyone = dots(self.explorer.points, "", slice(None), CATEGORIES[0], "circle")
        everyone.unselected = {"marker": {"color": GRAY, "opacity": 0.3}}
        everyone.hovertemplate = "%{text}<br>%{customdata}<extra></extra>"
        figure = _widget([everyone], "people", 300, "People: drag around some, or click one")
        figure.update_traces(marker_colorbar={"thickness": 12, "outlinewidth": 0})
        figure.update_layout(dragmode="lasso")
        trace = figure.data[0]
        trace.on_selection(lambda _, picked, how: self._people_picked(picked.point_inds, True))
        trace.on_click(lambda _, picked, how: self._people_picked(picked.point_inds))
        trace.on_deselect(lambda *_: self.explorer.select_subjects())
        return figure

    def _people_picked(self, where, lasso=False):
        if len(where):
            self._lasso = lasso
            self.explorer.select_subjects(self.explorer.subjects[where])
        else:  # a loop around nobody, or what pages answer when a loop is removed
            self._update_people()

    def _update_people(self):
        e, trace = self.explorer, self.people.data[0]
        groups = dict(zip(GROUPS, e.groups, strict=True)) if e.groups else self._groups
        ring = np.full(len(e.subjects), CLEAR, object)
        for name, who in groups.items():
            ring[who] = GROUPS[name]
        if self._lasso:  # it has done its work
            self._lasso, trace.selectedpoints = False, None
            self.people._send_relayout_msg({"selections": []})
        with self.people.batch_update():
            if self._placed != e.points_of:
                trace.x, trace.y = e.points.values[:, :2].T.astype("f4")
                self.people.layout.xaxis.title.text = axis_name(e.points, 1)
                self.people.layout.yaxis.title.text = axis_name(e.points, 2)
                self._placed = e.points_of
            trace.marker.line = {"color": ring.tolist(), "width": 2.5 if groups else 0}
            trace.selectedpoints = None if e.chosen.all() else np.flatnonzero(e.chosen)

    def color_people(self, *_):
        """Color the people by the coordinate chosen."""
        marker, labels, self.legend.value = self.markers_by(self.controls["color"].value)
        self.people.update_traces(marker=marker, customdata=labels)

    def markers_by(self, name) -> tuple[dict, list, str]:
        """People's markers, what is said of each, and the legend: by a coordinate."""
        points = self.explorer.points
        groups = point_groups(points, name)
        colors, shapes = np.empty((2, len(self.explorer.subjects)), object)
        for _, where, color, shape in groups:
            colors[where], shapes[where] = color, shape
        named = [(n, c, SHAPES[shape]) for n, _, c, shape in groups if isinstance(c, str)]
        look = {"color": colors.tolist(), "symbol": shapes.tolist(), "showscale": not named}
        labels = [f"{escape(name)} {escape(str(v))}" for v in points[name].values.tolist()]
        words = [f'<span style="color:{c}">{s}</span> {escape(n)}' for n, c, s in named[:12]]
        more = [f"and {len(named) - 12} more"] if len(named) > 12 else []
        return look, labels, f"<b>{escape(name)}</b> " + " ".join(words + more)

    # labels ---------------------------------------------------------------------------------

    def _labels(self):
        bars = self.explorer.bars
        figure = make_subplots(1, max(len(bars), 1), subplot_titles=[escape(n) for n in bars])
        figure = _widget(figure, "labels", 130, "Labels: click a bar to keep its people")
        for column, (name, (kinds, _)) in enumerate(bars.items(), 1):
            for group, color in GROUPS.items():
                bar = go.Bar(x=[escape(kind) for kind in kinds], name=group, marker_color=color)
                bar.hovertemplate = "%{x}<br>%{customdata} people, %{y:.0f} %<extra></extra>"
                figure.add_trace(bar, 1, column)
                figure.data[-1].on_click(self._bar_clicked(name))
        figure.update_yaxes(rangemode="tozero", nticks=3).update_xaxes(tickangle=0, nticks=3)
        figure.update_yaxes(title="%", col=1).update_annotations(font_size=11, y=0.97)
        return figure.update_layout(bargap=0.1, margin={"t": 36, "b": 24}, showlegend=False)

    def _bar_clicked(self, name):
        keep = self._answering(lambda i: self.explorer.filter(name, self.explorer.bars[name][0][i]))
        return lambda _, picked, how: [keep(i) for i in picked.point_inds[:1]]

    def _update_labels(self):
        e, traces = self.explorer, self.labels.data
        with self.labels.batch_update():
            for row, name in enumerate(e.bars):
                counts = e.counts(name)
                for i, trace in enumerate(traces[2 * row : 2 * row + 2]):
                    trace.visible = shown = i < len(counts)
                    if shown:
                        trace.marker.color = [*GROUPS.values()][i] if e.groups else GRAY
                        trace.y = 100 * counts[i] / max(counts[i].sum(), 1)
                        trace.customdata = counts[i]

    # tokens ---------------------------------------------------------------------------------

    def _strip(self):
        tokens, names = self.explorer.tokens, self.explorer.modalities
        hover = "token %{x}<br>%{y:.3f} of its attention<extra>%{fullData.name}</extra>"
        opacity = np.where(self.explorer.passes, 1, FADED).tolist()
        bars = [
            go.Bar(x=tokens, name=escape(name), marker_color=color, hovertemplate=hover)
            for name, color in zip(names, CATEGORIES, strict=False)
        ]
        for bar in bars:
            bar.marker.opacity = opacity
        line = go.Scatter(x=tokens, name="preference", yaxis="y2", line_color=GRAY, mode="lines")
        line.hovertemplate = "token %{x}<br>%{y:.2f} times its mean attention<extra></extra>"
        figure = _widget([*bars, line], "tokens", 190, "Hub tokens: click a bar")
        second = {"overlaying": "y", "side": "right", "title": "preference", "showgrid": False}
        legend = {"orientation": "h", "x": 0.98, "xanchor": "right", "y": 1, "yanchor": "bottom"}
        figure.update_layout(barmode="relative", bargap=0.1, yaxis2=second, legend=legend)
        figure.update_layout(xaxis_title="token", yaxis_title="share")
        for trace in figure.data[:-1]:
            trace.on_click(lambda _, picked, how: self._token_clicked(picked.point_inds))
        return figure

    def _token_clicked(self, where):
        if where:
            self.explorer.select_token(int(self.explorer.tokens[where[0]]))

    def _update_strip(self):
        e = self.explorer
        *bars, line = self.strip.data
        shares, marked = e.shares(), bool(e.parcels.any() and not e.groups)
        most = 1.1 * float(np.abs(shares).max()) or 1
        with self.strip.batch_update():
            for bar, share in zip(bars, shares.T, strict=False):
                bar.y = share
            line.visible = self.strip.layout.yaxis2.visible = marked
            line.y = e.preference() if marked else None
            self.strip.layout.yaxis.range = [-most, most] if e.groups else [0, 1]
            self.strip.layout.yaxis.title.text = "A minus B" if e.groups else "share"
            self.strip.layout.shapes = [] if e.token is None else [_band(e.token)]

    # the cortex -----------------------------------------------------------------------------

    def _brain(self):
        roi = self.explorer.roi
        # drawn once with each parcel's number as its value: so vertices know their parcel
        numbers = xr.DataArray(np.arange(len(roi), dtype="f4"), {"roi": roi}, ["roi"])
        numbers.attrs["units"] = SHARE
        figure = _widget(plot_surface(numbers), "brain", 300, "Cortex: click a parcel")
        figure.update_layout(margin={"l": 0, "b": 45}, updatemenus=[{"font": {"size": 9}}])
        colored = [trace for trace in figure.data if trace.name.endswith("values")]
        self.parcels = {trace.name: trace.intensity.astype(int) for trace in colored}
        dots = [trace for trace in figure.data if trace.name.endswith("off the cortex")]
        self.dots = {trace.name: trace.marker.color.astype(int) for trace in dots}
        for trace in [*colored, *dots]:
            trace.on_click(self._brain_clicked)
        self._parcel_of, self._around = on_vertices(numbers), ""
        return with_edges(figure)

    def _brain_clicked(self, trace, picked, _):
        if picked.point_inds:
            parcel = (self.parcels | self.dots)[trace.name][picked.point_inds[0]]
            self.explorer.select_parcel(str(self.explorer.roi[parcel]))

    def _update_brain(self):
        values = self.explorer.surface_map()
        with self.brain.batch_update():
            for trace in self.brain.data:
                if trace.name in self.parcels:
                    trace.intensity = values[self.parcels[trace.name]]
                    trace.opacity = FADED if self.explorer.faded() else 1
                elif trace.name in self.dots:
                    trace.marker.color = values[self.dots[trace.name]]
            self._recolor(self.brain, values, self.explorer.units())
        if self._around != self.explorer.place:  # alone: a batch would take x off the other traces
            self._around = self.explorer.place
            picked = np.flatnonzero(self.explorer.parcels)
            for side, (x, y, z) in around(self._parcel_of, picked).items():
                self.brain.update_traces({"x": x, "y": y, "z": z}, {"name": f"{side} picked"})

    def _recolor(self, figure, values, units, **how):
        """The colors of a map, unless they are locked."""
        if not self.controls["lock"].value:
            scale = Scale.of(values, units=units, beyond=BEYOND)
            figure.update_layout(coloraxis=scale.color_axis(**how))

    # slices ---------------------------------------------------------------------------------

    def _slider(self, axis):
        first, start, last = REACH[axis]
        style, layout = {"description_width": "15px"}, {"width": "33%", "min_width": "0"}
        options = {"description": axis, "style": style, "layout": layout}
        slider = widgets.IntSlider(start, first, last, 2, **options)
        slider.observe(self._update_slices, "value")
        return slider

    def _cuts(self):
        """The map, and traces of the three planes where the sliders are: of a single person's
        brain, else the template's."""
        own = self.explorer.own_volume()
        who = None if own is None else own.subject.item()
        if who != self._gray[0]:
            self._gray = who, gray_levels(template() if own is None else own.compute())
        cubes = self.explorer.cube_map()
        cubes = None if cubes is None else with_mm(cubes.assign_attrs(units=SHARE))
        stops = {plane: self.sliders[through].value for plane, (_, _, through) in PLANES.items()}
        return cubes, [slices(self._gray[1], cubes, plane, stop) for plane, stop in stops.items()]

    def _slices(self):
        figure = three_planes()
        for column, traces in enumerate(self._cuts()[1], 1):
            figure.add_traces(traces, 1, column)
        figure.update_layout(coloraxis=Scale.of([]).color_axis())
        figure = _widget(figure, "slices", 190, "T1: move the sliders [mm]")
        figure.update_annotations(font_size=12)
        return figure.update_layout(margin={"l": 5, "b": 5, "t": 50})

    def _update_slices(self, *_):
        cubes, planes = self._cuts()
        new = [trace for traces in planes for trace in traces]
        with self.slices.batch_update():
            for trace, cut in zip(self.slices.data, new, strict=True):
                trace.update(x=cut.x, y=cut.y, z=cut.z, hovertemplate=cut.hovertemplate)
            if cubes is not None:
                self._recolor(self.slices, cubes.values, SHARE, faded=True)

    # one person -----------------------------------------------------------------------------

    def _person(self):
        figure = make_subplots(1, 2, column_widths=[0.78, 0.22])
        look = {"coloraxis": "coloraxis", "name": ""}
        series, pairs = "parcel %{y}<br>volume %{x}<br>z %{z:.2f}", "%{x}, %{y}<br>r %{z:.2f}"
        figure.add_trace(go.Heatmap(hovertemplate=series, **look), 1, 1)
        figure.add_trace(go.Heatmap(hovertemplate=pairs, coloraxis="coloraxis2", name=""), 1, 2)
        hint = "One person's BOLD: each parcel in time [z], and correlations of parcels"
        figure = _widget(figure, "person", 280, hint)
        for axis, limit in (("coloraxis", 3), ("coloraxis2", 1)):
            scale = Scale.of([-limit, limit]).color_axis() | {"showscale": False}
            figure.update_layout({axis: scale})
        figure.update_xaxes(title="volume", col=1).update_yaxes(title="parcel")
        figure.update_xaxes(title="parcel", showticklabels=False, col=2)  # names: under the mouse
        return figure.update_yaxes(autorange="reversed", showticklabels=False)

    def _update_person(self):
        who = self.explorer.subjects[self.explorer.chosen].tolist()
        if who == self._whose:  # their scan is not read and sent again
            return
        self._whose = who
        series, (carpet, pairs) = self.explorer.own_series(), self.person.data
        if series is not None:
            with self.person.batch_update():
                carpet.z, carpet.y = series.values.astype("f4"), series.roi.values
                pairs.z = np.corrcoef(series.values).astype("f4")
                pairs.x = pairs.y = series.roi.values
        self.own.children = [] if series is None else [self.person]

    # controls -------------------------------------------------------------------------------

    def _controls(self):
        e = self.explorer
        coords = list(subject_coords(e.points))
        tokens = {ALL_TOKENS: None} | {str(token): token for token in e.tokens}
        controls = {
            "token": _typed_in("token", list(tokens), 140),
            "parcel": _typed_in("parcel", e.places, 250),
            "subject": _typed_in("subject", list(e.subjects), 200),
            "color": widgets.Dropdown(description="color", options=coords),
            "map": widgets.Dropdown(description="map of", options=e.on_roi + e.on_cubes),
            "points": widgets.Dropdown(description="people by", options=[*e.layouts]),
            "first": widgets.Button(description="Set group A"),
            "second": widgets.Button(description="Set group B"),
            "lock": widgets.ToggleButton(description="Lock colors"),
            "reset": widgets.Button(description="Reset"),
            "undo": widgets.Button(description="Undo"),
            "test": widgets.Button(description="Test A, B"),
            "code": widgets.Button(description="Show code"),
        }
        known = ("age", "site", "diagnosis", "subject")
        controls["color"].value = next(c for c in known if c in coords)
        controls["points"].value = e.points_of
        for name in ("color", "map", "points"):
            controls[name].style.description_width, controls[name].layout.width = "72px", "200px"
        for name in ("first", "second", "lock", "reset", "undo", "test", "code"):
            controls[name].layout.width = "auto"
        if max(len(e.on_roi), len(e.on_cubes)) < 2:  # nothing to choose
            controls["map"].layout.display = "none"
        if len(e.layouts) < 2:
            controls["points"].layout.display = "none"
        controls["color"].observe(self.color_people, "value")
        acts = {
            "token": lambda v: e.select_token(tokens.get(v, v or None)),
            "parcel": lambda v: e.select_parcel(_meant(v, e.places) or None),
            "subject": lambda v: e.select_subjects([_meant(v, e.subjects)] if v else None),
            "map": e.select_map,
            "points": e.select_points,
            "lock": lambda _: self.update(),
        }
        for name, act in acts.items():
            controls[name].observe(self._answering(lambda c, act=act: act(c["new"])), "value")
        controls["reset"].on_click(self._reset)
        controls["first"].on_click(self._answering(lambda _: self._set_group("A")))
        controls["second"].on_click(self._answering(lambda _: self._set_group("B")))
        controls["undo"].on_click(lambda _: e.undo())
        controls["test"].on_click(self._answering(self._test))
        controls["code"].on_click(self._answering(self._show_code))
        return controls

    def _answering(self, act):
        """A callback that shows what is wrong with an entry, and takes it back, before failing."""

        def follow(change):
            try:
                if self._follows:
                    self.fit.busy = True
                    act(change)
            except InputError as error:
                self._update_boxes()
                self.message.value = escape(str(error))
            self.fit.busy = False

        return follow

    def _update_boxes(self):
        """Let the boxes hold what is selected."""
        e = self.explorer
        one = e.subjects[e.chosen][0] if e.chosen.sum() == 1 else None
        self._follows = False
        for name, value in (("token", e.token), ("parcel", e.place), ("subject", one)):
            self.controls[name].value = "" if value is None else str(value)
        self._follows = True

    def _reset(self, _):
        """Everyone, all tokens, no parcel, no groups."""
        self._groups, self._lasso = {}, True
        self.explorer.reset()

    def _set_group(self, which):
        """Keep the selection as one of two groups; with both, compare them."""
        if self.explorer.groups:
            fact = "Expected a selection to become a group, found two groups compared"
            raise InputError(fact, "Select people first")
        groups = self._groups | {which: self.explorer.chosen.copy()}
        if len(groups) == 2:
            self.explorer.compare(groups["A"], groups["B"])
            self._groups = {}
        else:
            self._groups, other = groups, {"A": "B", "B": "A"}[which]
            self._update_people()
            self.message.value = f"Group {which}: {groups[which].sum()} subjects. Now set {other}."

    def _test(self, _):
        """Say which tokens differ between the groups, and what that is worth."""
        found = self.explorer.differences()
        differ = [str(t) for t in found.token.values[found.q < 0.05]]
        self.message.value = (
            f"{len(differ)} of {found.sizes['token']} tokens differ (q < 0.05): {listed(differ)}."
            f" Smallest p {float(found.p.min()):.3f} of {found.n_permutations} permutations. Groups"
            " drawn in this space differ in it by how they were drawn: test a label instead."
        )

    def _show_code(self, _):
        self.written.value, self.written.layout.display = self.explorer.code(), ""
        self.fit.send({"copy": self.written.value})
        self.message.value = "Copied: paste these lines into a new cell."

    def _arranged(self):
        row, columns = {"flex_flow": "row wrap"}, "repeat(2, minmax(0, 1fr))"
        controls = widgets.HBox([*self.controls.values(), self.message], layout=row)
        sliders = widgets.HBox([*self.sliders.values()])
        cells = [self.legend, self.heading, self.people, self.brain, self.strip, self.slices]
        cells += [widgets.HTML(), sliders]
        grid = {"grid_template_columns": columns, "grid_gap": "0 12px", "width": "100%"}
        figures = widgets.GridBox(cells, layout=grid)
        last = [self.labels] if self.explorer.bars else []
        return widgets.VBox([self.fit, controls, self.card, figures, *last, self.own, self.written])


def _widget(data, name, height, hint):
    """Traces or a figure as a widget, as wide as its place, clear on light and dark pages."""
    figure = go.FigureWidget(data)
    figure.update_layout(template="plotly_white", height=height, meta=name, font_color=GRAY)
    figure.update_layout(paper_bgcolor=CLEAR, plot_bgcolor=CLEAR, modebar={"bgcolor": CLEAR})
    figure.update_layout(margin={"l": 50, "r": 10, "t": 32, "b": 38}, font_size=11)
    figure.update_xaxes(gridcolor="rgba(128,128,128,.25)", zeroline=False)
    figure.update_yaxes(gridcolor="rgba(128,128,128,.25)", zerolinecolor="rgba(128,128,128,.5)")
    title = {"x": 0.01, "y": 1, "pad_t": 8, "font_size": 12}
    return finish(figure, hint).update_layout(title=title)


def _keep_state(figure):
    """Let a page that opens later, or again, begin with what is drawn now, as plotly does not."""
    figure._trait_values |= {"_widget_data": figure._data, "_widget_layout": figure._layout}


def _band(token):
    """A band around a token of the strip."""
    ends = {"x0": token - 0.5, "x1": token + 0.5, "y0": 0, "y1": 1, "yref": "paper"}
    return {"type": "rect", "fillcolor": GRAY, "opacity": 0.4, "line_width": 0} | ends


def _meant(typed, options):
    """The option that was typed, or the only one that has these letters in it."""
    like = [option for option in options if typed.casefold() in option.casefold()]
    return like[0] if typed not in options and len(like) == 1 else typed


def _typed_in(name, options, width):
    """A box to type in, with suggestions; it reports when the entry is complete."""
    style, layout = {"description_width": "48px"}, {"width": f"{width}px"}
    box = widgets.Combobox(description=name, options=options, style=style, layout=layout)
    box.continuous_update = False
    return box
