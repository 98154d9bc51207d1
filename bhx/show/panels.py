"""The explorer's widgets: four linked figures and the boxes around them.

Callbacks do nothing but call the explorer, and `update` sends what follows; no analysis lives here.
"""

from __future__ import annotations

from html import escape

import ipywidgets as widgets
import numpy as np
import plotly.graph_objects as go
import xarray as xr
from IPython.display import display
from plotly.subplots import make_subplots

from bhx.errors import InputError
from bhx.schema import subject_coords
from bhx.show.colors import CATEGORIES, Scale, finish
from bhx.show.people import axis_name, dots, point_groups
from bhx.show.surface import plot_surface
from bhx.show.volume import PLANES, gray_levels, slices, square_axes, template, with_mm

ALL_TOKENS = "all tokens"
WIDE = 470  # px, of every figure: two fit side by side in JupyterLab on a laptop, files shown
REACH = {"x": (-76, 0, 76), "y": (-110, -20, 74), "z": (-58, 10, 94)}  # mm: first, start, last


class Panels:
    """The explorer as widgets; the mesh is sent once, afterwards only intensities."""

    def __init__(self, explorer):
        self.explorer = explorer
        self._gray = None, gray_levels(template())  # whose brain the slices show
        self._groups = {}  # A and B, as far as they are set
        self.sliders = {axis: self._slider(axis) for axis in REACH}
        self.people, self.strip = self._people(), self._strip()
        self.brain, self.slices = self._brain(), self._slices()
        for figure in (self.people, self.strip, self.brain, self.slices):
            _keep_state(figure)
        self.card, self.heading, self.message, self.legend = (widgets.HTML() for _ in range(4))
        self.controls = self._controls()
        self.written = widgets.Textarea(layout={"width": "60%", "height": "120px"})
        self.picture = widgets.Output(layout={"width": "40%"})
        self.box = self._arranged()
        explorer.followers.append(self.update)
        self.color_people()
        self.update()

    def update(self):
        """Send what follows from the selection: values, never a mesh."""
        e = self.explorer
        self.card.value = e.card()
        self.heading.value, self.message.value = f"<b>{escape(e.heading())}</b>", ""
        with self.people.batch_update():
            everyone = e.chosen.all()
            self.people.data[0].selectedpoints = None if everyone else np.flatnonzero(e.chosen)
        self._update_strip()
        self._update_brain()
        self._update_slices()

    # people ---------------------------------------------------------------------------------

    def _people(self):
        points = self.explorer.points
        figure = _widget([dots(points, slice(None), CATEGORIES[0])], "people", 330)
        figure.update_traces(marker_colorbar_thickness=12)
        figure.update_layout(xaxis_title=axis_name(points, 1), yaxis_title=axis_name(points, 2))
        figure.update_layout(dragmode="lasso")
        trace = figure.data[0]
        for listen in (trace.on_selection, trace.on_click):
            listen(lambda _, picked, how: self._people_picked(picked.point_inds))
        trace.on_deselect(lambda *_: self.explorer.select_subjects())
        return figure

    def _people_picked(self, where):
        self.explorer.select_subjects(self.explorer.subjects[where] if len(where) else None)

    def color_people(self, *_):
        """Color the people by the coordinate chosen."""
        groups = point_groups(self.explorer.points, self.controls["color"].value)
        colors = np.empty(len(self.explorer.subjects), object)
        for _, where, color in groups:
            colors[where] = color
        named = [(name, color) for name, _, color in groups if isinstance(color, str)]
        self.people.update_traces(marker={"color": colors.tolist(), "showscale": not named})
        self.legend.value = " ".join(
            f'<span style="color:{color}">&#9679;</span> {escape(n)}' for n, color in named[:12]
        )

    # tokens ---------------------------------------------------------------------------------

    def _strip(self):
        tokens, names = self.explorer.tokens, self.explorer.modalities
        bars = [
            go.Bar(x=tokens, y=np.zeros(len(tokens)), name=escape(name), marker_color=color)
            for name, color in zip(names, CATEGORIES, strict=False)
        ]
        line = go.Scatter(x=tokens, y=np.zeros(len(tokens)), name="preference", yaxis="y2")
        figure = _widget([*bars, line.update(line_color="black", mode="lines")], "tokens", 210)
        second = {"overlaying": "y", "side": "right", "title": "preference", "showgrid": False}
        legend = {"orientation": "h", "x": 0, "y": 1, "yanchor": "bottom"}
        figure.update_layout(barmode="relative", bargap=0.1, yaxis2=second, legend=legend)
        figure.update_layout(xaxis_title="token", yaxis_title="share", margin={"r": 50, "t": 35})
        for trace in figure.data[:-1]:
            trace.on_click(lambda _, picked, how: self._token_clicked(picked.point_inds))
        return figure

    def _token_clicked(self, where):
        if where:
            self.explorer.select_token(int(self.explorer.tokens[where[0]]))

    def _update_strip(self):
        e = self.explorer
        *bars, line = self.strip.data
        marked = bool(e.parcels.any() and not e.groups)
        with self.strip.batch_update():
            for bar, share in zip(bars, e.shares().T, strict=False):
                bar.y = share
            line.visible = self.strip.layout.yaxis2.visible = marked
            if marked:
                line.y = e.preference()
            self.strip.layout.yaxis.range = [-1, 1] if e.groups else [0, 1]
            self.strip.layout.shapes = [] if e.token is None else [_band(e.token)]

    # the cortex -----------------------------------------------------------------------------

    def _brain(self):
        roi = self.explorer.roi
        # drawn once with each parcel's number as its value: so vertices know their parcel
        numbers = xr.DataArray(np.arange(len(roi), dtype="f4"), {"roi": roi}, ["roi"])
        figure = _widget(plot_surface(numbers), "brain", 360, margin={"l": 0, "r": 0, "t": 5})
        colored = [trace for trace in figure.data if trace.name.endswith("values")]
        self._parcels = {trace.name: trace.intensity.astype(int) for trace in colored}
        for trace in colored:
            trace.on_click(self._brain_clicked)
        return figure

    def _brain_clicked(self, trace, picked, _):
        if picked.point_inds:
            parcel = self._parcels[trace.name][picked.point_inds[0]]
            self.controls["parcel"].value = str(self.explorer.roi[parcel])

    def _update_brain(self):
        values = self.explorer.surface_map()
        with self.brain.batch_update():
            for trace in self.brain.data:
                if trace.name in self._parcels:
                    trace.intensity = values[self._parcels[trace.name]]
            self.brain.update_layout(coloraxis=Scale.of(values).color_axis())

    # slices ---------------------------------------------------------------------------------

    def _slider(self, axis):
        first, start, last = REACH[axis]
        style, layout = {"description_width": "15px"}, {"width": f"{WIDE // 3}px"}
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
        cubes = None if cubes is None else with_mm(cubes)
        stops = {plane: self.sliders[through].value for plane, (_, _, through) in PLANES.items()}
        return cubes, [slices(self._gray[1], cubes, plane, stop) for plane, stop in stops.items()]

    def _slices(self):
        figure = make_subplots(1, 3, horizontal_spacing=0.08)
        for column, traces in enumerate(self._cuts()[1], 1):
            figure.add_traces(traces, 1, column)
        square_axes(figure)
        for axes in (figure.update_xaxes, figure.update_yaxes):
            axes(tickangle=0, tickvals=[-50, 0, 50], tickfont_size=10, constrain="domain")
        figure.update_layout(coloraxis=Scale.of([]).color_axis())
        return _widget(figure, "slices", 230)

    def _update_slices(self, *_):
        cubes, planes = self._cuts()
        new = [trace for traces in planes for trace in traces]
        with self.slices.batch_update():
            for trace, cut in zip(self.slices.data, new, strict=True):
                trace.update(x=cut.x, y=cut.y, z=cut.z, hovertemplate=cut.hovertemplate)
            if cubes is not None:
                self.slices.update_layout(coloraxis=Scale.of(cubes.values).color_axis())

    # controls -------------------------------------------------------------------------------

    def _controls(self):
        e = self.explorer
        coords = list(subject_coords(e.points))
        tokens = {ALL_TOKENS: None} | {str(token): token for token in e.tokens}
        controls = {
            "token": _typed_in("token", list(tokens), 160),
            "parcel": _typed_in("parcel", e.places, 300),
            "subject": _typed_in("subject", list(e.subjects), 300),
            "color": widgets.Dropdown(description="color", options=coords),
            "map": widgets.Dropdown(description="map of", options=e.on_roi + e.on_cubes),
            "reset": widgets.Button(description="Reset", layout={"width": "100px"}),
            "first": widgets.Button(description="Set group A"),
            "second": widgets.Button(description="Set group B"),
            "code": widgets.Button(description="Show code"),
        }
        known = ("age", "site", "diagnosis", "subject")
        controls["color"].value = next(c for c in known if c in coords)
        controls["color"].layout.width = controls["map"].layout.width = "200px"
        if max(len(e.on_roi), len(e.on_cubes)) < 2:  # nothing to choose
            controls["map"].layout.display = "none"
        controls["color"].observe(self.color_people, "value")
        acts = {
            "token": lambda v: e.select_token(tokens.get(v, v or None)),
            "parcel": lambda v: e.select_parcel(v or None),
            "subject": lambda v: e.select_subjects([v] if v else None),
            "map": e.select_map,
        }
        for name, act in acts.items():
            controls[name].observe(self._answering(lambda c, act=act: act(c["new"])), "value")
        controls["reset"].on_click(self._reset)
        controls["first"].on_click(self._answering(lambda _: self._set_group("A")))
        controls["second"].on_click(self._answering(lambda _: self._set_group("B")))
        controls["code"].on_click(self._answering(self._show_code))
        return controls

    def _answering(self, act):
        """A callback that shows what is wrong with an entry instead of failing."""

        def follow(change):
            try:
                act(change)
            except InputError as error:
                self.message.value = escape(str(error))

        return follow

    def _reset(self, _):
        """Everyone, all tokens, no parcel, no groups, and boxes that say so."""
        self._groups = {}
        for name in ("token", "parcel", "subject"):
            self.controls[name].value = ""
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
            self.message.value = f"{groups[which].sum()} subjects kept. Now set group {other}."

    def _show_code(self, _):
        self.written.value = self.explorer.code()
        self.picture.clear_output(wait=True)
        with self.picture:
            display(self.explorer.figure())

    def _arranged(self):
        column = {"width": f"{WIDE + 10}px"}
        controls, sliders = list(self.controls.values()), widgets.HBox([*self.sliders.values()])
        left = [self.legend, self.people, self.strip, self.card]
        right = [self.heading, self.brain, self.slices, sliders]
        panels = [widgets.VBox(part, layout=column) for part in (left, right)]
        entries = widgets.HBox(controls[:6], layout={"flex_flow": "row wrap"})
        buttons = widgets.HBox([*controls[6:], self.message])
        shown = widgets.HBox([self.written, self.picture])
        return widgets.VBox([entries, widgets.HBox(panels), buttons, shown])


def _widget(data, name, height, **layout):
    """Traces or a figure as a widget that tests and callbacks find by its name."""
    figure = go.FigureWidget(data)
    figure.update_layout(template="plotly_white", width=WIDE, height=height, meta=name)
    figure.update_layout(margin={"l": 50, "r": 10, "t": 10, "b": 40})
    return finish(figure, "", **layout)


def _keep_state(figure):
    """Let a page that opens later, or again, begin with what is drawn now, as plotly does not."""
    figure._trait_values |= {"_widget_data": figure._data, "_widget_layout": figure._layout}


def _band(token):
    """A band around a token of the strip."""
    ends = {"x0": token - 0.5, "x1": token + 0.5, "y0": 0, "y1": 1, "yref": "paper"}
    return {"type": "rect", "fillcolor": "black", "opacity": 0.25, "line_width": 0} | ends


def _typed_in(name, options, width):
    """A box to type in, with suggestions; it reports when the entry is complete."""
    style, layout = {"description_width": "55px"}, {"width": f"{width}px"}
    box = widgets.Combobox(description=name, options=options, style=style, layout=layout)
    box.continuous_update = False
    return box
