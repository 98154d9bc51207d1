"""The linked explorer: people, tokens, cortex and T1 side by side, each following the others.

`Explorer` holds what is selected and computes what is to be seen; `_Panels` shows it as widgets,
whose callbacks do nothing but call the Explorer. No analysis lives here.
"""

from __future__ import annotations

from functools import cached_property
from html import escape

import numpy as np
import plotly.graph_objects as go
import xarray as xr
from plotly.subplots import make_subplots

from bhx.errors import InputError, listed
from bhx.latents.maps import MAPS, region_map, who_has
from bhx.latents.pool import project, subject_mask
from bhx.schema import check
from bhx.show.look import CATEGORIES, colour_bar, colours, look_of
from bhx.show.people import axis_name, point_groups
from bhx.show.surface import SIDES, cortex, on_vertices, plot_surface, stage
from bhx.show.volume import PLANES, grey_levels, plane_of, slices, template, with_mm

EVERYTHING = "all tokens"


def explore(latents: xr.Dataset, cohort: xr.Dataset | None = None) -> Explorer:
    """Walk around in a latent space: pick people, tokens, parcels; everything else follows.

    Parameters
    ----------
    latents : Dataset, lazy or not; with embed(..., keep=("attention",)) also the cortex and the
        T1 follow
    cohort : the same subjects' scans: then a single person's own T1 is shown

    Returns
    -------
    Explorer: shows itself in JupyterLab, and answers `select_subjects`, `select_token`,
    `select_parcel`, `compare` and `code` without any browser
    """
    return Explorer(latents, cohort)


class Explorer:
    """What is selected, and what follows from it.

    Attributes
    ----------
    chosen : mask over subjects; groups : two masks, or None; token : a token, or None for all;
    parcels : mask over parcels
    """

    def __init__(self, latents: xr.Dataset, cohort: xr.Dataset | None = None):
        self.latents = check(latents, "latents")
        self.cohort = None if cohort is None else _same_people(cohort, latents)
        self.points = project(latents, n=2)
        self.subjects = latents.subject.values
        self.tokens = latents.token.values
        self._maps = {of: _loaded(latents, of) for of in MAPS if MAPS[of] in latents}
        self.roi = latents.roi.values if "roi" in self._maps else np.array([], str)
        self.networks = latents.network.values if "roi" in self._maps else np.array([], str)
        self.followers, self._cache = [], {}
        self.reset()

    def reset(self):
        """Everyone, all tokens, no parcel."""
        self.chosen = np.ones(len(self.subjects), bool)
        self.groups, self.token = None, None
        self.parcels = np.zeros(len(self.roi), bool)
        self._tell()

    def select_subjects(self, subjects=None):
        """Average over these subjects (ids, a mask, or None for all); ends a comparison."""
        self.chosen, self.groups = self._mask(subjects), None
        self._tell()

    def select_token(self, token=None):
        """Show one token's maps, or those of all tokens together."""
        if token is not None and token not in self.tokens:
            fact = f"Expected a token from {self.tokens[0]} to {self.tokens[-1]}, found {token}"
            raise InputError(fact, "See latents.token")
        self.token = None if token is None else int(token)
        self._tell()

    def select_parcel(self, name: str | None = None):
        """Follow a parcel or a whole network: the token that prefers it most, and who reads it."""
        self.parcels = (self.roi == name) | (self.networks == name)
        if name is not None and not self.parcels.any():
            fact = f"Expected a parcel or a network ({listed(np.unique(self.networks), 8)}), found "
            fact += f"'{name}'"
            raise InputError(fact, "See latents.roi and latents.network")
        if self.parcels.any():
            self.token = int(self.tokens[np.argmax(self.preference())])
        self._tell()

    def compare(self, first, second):
        """Show the maps of one group minus those of another (ids or masks)."""
        first, second = self._mask(first), self._mask(second)
        if (first & second).any():
            twice = listed(self.subjects[first & second])
            fact = f"Expected groups without common subjects, found {twice} in both"
            raise InputError(fact, "Remove them from one")
        self.groups, self.chosen = (first, second), first | second
        self._tell()

    # what is seen ---------------------------------------------------------------------------

    def surface_map(self) -> np.ndarray:
        """Attention to each parcel (roi): of the token and people selected, or of the groups'
        difference; zero where nobody has BOLD."""
        maps = self._averaged("roi")
        return maps.mean(0) if self.token is None else maps[self._at(self.token)]

    def t1_map(self) -> xr.DataArray | None:
        """The same over the T1's cubes (cx, cy, cz)."""
        if "t1" not in self._maps:
            return None
        like = self.latents.hub_to_t1.isel(subject=0, token=0, drop=True)
        return like.copy(data=self._averaged("t1").reshape(like.shape))

    def shares(self) -> np.ndarray:
        """Each token's share of attention (token, modality)."""
        return self._averaged("modality")

    def preference(self) -> np.ndarray:
        """Each token's attention to the selected parcels over its mean attention (token)."""
        maps = self._averaged("roi", (self.chosen,))
        return maps[:, self.parcels].mean(1) / np.maximum(maps.mean(1), 1e-12)

    def reading(self) -> np.ndarray:
        """Each subject's attention to a selected parcel, by the selected token (subject)."""
        values, _ = self._maps["roi"]
        at = slice(None) if self.token is None else [self._at(self.token)]
        return values[:, at][..., self.parcels].mean((1, 2))

    def card(self) -> str:
        """Who is selected, as HTML; names are escaped."""
        rows = [("subjects", f"{self.chosen.sum()} of {len(self.chosen)}")]
        if self.groups is not None:
            rows = [("compared", " against ".join(str(g.sum()) for g in self.groups))]
        if self.chosen.sum() == 1:
            rows = [("subject", self.subjects[self.chosen][0])]
        coords = {n: c for n, c in self.latents.coords.items() if c.dims == ("subject",)}
        shown = [n for n in ("age", "sex", "diagnosis", "site", "tr", "mean_fd") if n in coords]
        rows += [(name, _summary(coords[name].values[self.chosen])) for name in shown]
        cells = [f"<tr><td>{escape(str(k))}</td><td>{escape(str(v))}</td></tr>" for k, v in rows]
        return f"<table>{''.join(cells)}</table>"

    def heading(self) -> str:
        """One line on what the maps show."""
        token = EVERYTHING if self.token is None else f"token {self.token}"
        if not self._has("roi").any():
            return f"{token}: nobody selected has BOLD"
        return f"attention of {token}" + (", first group minus second" if self.groups else "")

    def code(self) -> str:
        """The lines that make the same map without the explorer."""
        token = "None" if self.token is None else str(self.token)
        call = f"bhx.region_map(latents, token={token}, subjects="
        ids = [self.subjects[group].tolist() for group in self._selected()]
        names = ["first", "second"] if self.groups else ["subjects"]
        lines = ["import bhx", ""]
        lines += [f"{name} = {who!r}" for name, who in zip(names, ids, strict=True)]
        lines += [f"values = {' - '.join(f'{call}{name})' for name in names)}"]
        return "\n".join([*lines, "bhx.plot_surface(values, static=True)"])

    def figure(self):
        """The static figure that `code` draws."""
        maps = [region_map(self.latents, self.token, subjects=g) for g in self._selected()]
        values = maps[0] - maps[1] if self.groups else maps[0]
        return plot_surface(values, static=True, title=self.heading())

    def _ipython_display_(self):
        from IPython.display import display

        display(self.panels.box)

    @cached_property
    def panels(self) -> _Panels:
        """The widgets, made once."""
        return _Panels(self)

    # how ------------------------------------------------------------------------------------

    def _selected(self):
        return self.groups or (self.chosen,)

    def _tell(self):
        for follow in self.followers:
            follow()

    def _averaged(self, of, groups=None):
        """Maps (token, ...) averaged over the selected who have the modality, or the difference
        between the groups' averages; one product of weights with all maps."""
        if of not in self._maps:
            return np.zeros((len(self.tokens), 2 if of == "modality" else len(self.roi)), "f4")
        values, has = self._maps[of]
        if of == "t1":
            values = values[-1 if self.token is None else self._at(self.token)]
        groups = groups or self._selected()
        weights = np.zeros(len(has), np.float32)
        for sign, group in zip((1, -1), groups, strict=False):
            weights += sign * (group & has) / max((group & has).sum(), 1)
        key = (of, self.token if of == "t1" else None, weights.tobytes())
        if key not in self._cache:
            if len(self._cache) > 8:
                self._cache.clear()
            flat = values.reshape(len(weights), -1)
            self._cache[key] = (weights @ flat).reshape(values.shape[1:])
        return self._cache[key]

    def _has(self, of):
        return self.chosen & (self._maps[of][1] if of in self._maps else False)

    def _at(self, token):
        return int(np.flatnonzero(self.tokens == token)[0])

    def _mask(self, subjects):
        mask = subject_mask(self.latents, subjects)
        if not mask.any():
            raise InputError("Expected at least one subject, found none", "Select some, or None")
        return mask


def _loaded(latents, of):
    """A kind of map in memory, and who has it: (subject, token, ...), or for "t1" (token, subject,
    cubes) with the mean token last, so that every selection is one product of matrices."""
    values = np.nan_to_num(latents[MAPS[of]].values.astype(np.float32, copy=False))
    has = who_has(latents, of)
    if of == "t1":
        values = np.moveaxis(values.reshape(*values.shape[:2], -1), 1, 0)
        values = np.concatenate([values, values.mean(0, keepdims=True)])
    return values, has


def _same_people(cohort, latents):
    missing = set(latents.subject.values.tolist()) - set(cohort.subject.values.tolist())
    if missing:
        raise InputError(
            f"Expected a cohort with the subjects of the latents, found {listed(sorted(missing))} "
            "missing",
            "Give the cohort that was embedded",
        )
    return cohort.sel(subject=latents.subject.values)


def _summary(values):
    """One value, a mean and range of numbers, or counts of names."""
    names, counts = np.unique([str(v) for v in values.tolist()], return_counts=True)
    if len(names) == 1:
        return values[0]
    if values.dtype.kind in "fi":
        return f"{np.nanmean(values):.3g} ({np.nanmin(values):.3g} to {np.nanmax(values):.3g})"
    return listed([f"{n}: {c}" for n, c in zip(names, counts, strict=True)])


def _keep_state(figure):
    """Let a page that opens later, or again, begin with what is drawn now, as plotly does not."""
    figure._trait_values |= {"_widget_data": figure._data, "_widget_layout": figure._layout}


WIDE = 470  # px, of every figure: two fit side by side in JupyterLab on a laptop, files shown
PLAIN = {"template": "plotly_white", "width": WIDE, "margin": {"l": 50, "r": 10, "t": 10, "b": 40}}
START = {"x": 0, "y": -20, "z": 10}  # mm, where the slices lie at first


class _Panels:
    """The Explorer as widgets; the mesh is sent once, afterwards only intensities."""

    def __init__(self, explorer):
        import ipywidgets as widgets

        self.explorer = explorer
        self.people, self.strip = self._people(), self._strip()
        self.brain, self.slices = self._brain(), self._slices()
        for figure in (self.people, self.strip, self.brain, self.slices):
            _keep_state(figure)
        self.card, self.heading, self.legend = (widgets.HTML() for _ in range(3))
        self.controls, self.sliders = self._controls(widgets), self._sliders(widgets)
        self.written = widgets.Textarea(layout={"width": "60%", "height": "120px"})
        self.picture = widgets.Output(layout={"width": "40%"})
        self.box = self._arranged(widgets)
        self._ends = (None, None)  # the groups marked so far
        explorer.followers.append(self.update)
        self.colour()
        self.update()

    def update(self):
        """Send what follows from the selection: values, never a mesh."""
        e = self.explorer
        self.card.value = e.card()
        self.heading.value = f"<b>{escape(e.heading())}</b>"
        with self.people.batch_update():
            everyone = e.chosen.all()
            self.people.data[0].selectedpoints = None if everyone else np.flatnonzero(e.chosen)
        self._update_strip()
        self._update_brain()
        self._update_slices()
        if e.parcels.any() and self.controls["colour"].value == "attention":
            self.colour()

    # people ---------------------------------------------------------------------------------

    def _people(self):

        points, ids = self.explorer.points, self.explorer.subjects
        x, y = points.values.T.astype(np.float32)
        marker = {"size": 7, "colorscale": colours("viridis"), "colorbar_thickness": 12}
        dots = go.Scatter(x=x, y=y, mode="markers", marker=marker)
        dots.update(text=[escape(str(s)) for s in ids], hovertemplate="%{text}<extra></extra>")
        figure = go.FigureWidget(dots)
        figure.update_layout(PLAIN, height=330, dragmode="lasso", meta="people")
        figure.update_layout(xaxis_title=axis_name(points, 1), yaxis_title=axis_name(points, 2))
        trace = figure.data[0]
        for listen in (trace.on_selection, trace.on_click):
            listen(lambda _, picked, how: self._picked(picked.point_inds))
        trace.on_deselect(lambda *_: self.explorer.select_subjects())
        return figure

    def _picked(self, where):
        self.explorer.select_subjects(self.explorer.subjects[where] if len(where) else None)

    def colour(self, *_):
        """Colour the people by the coordinate chosen, or by attention to the selected parcel."""
        name, e = self.controls["colour"].value, self.explorer
        if name == "attention":
            values = e.reading() if e.parcels.any() else np.zeros(len(e.subjects))
            groups = [("", slice(None), values)]
        else:
            groups = point_groups(e.points, name)
        named = all(isinstance(shade, str) for _, _, shade in groups)
        shades = np.empty(len(e.subjects), object if named else np.float32)
        for _, where, shade in groups:
            shades[where] = shade
        with self.people.batch_update():
            self.people.data[0].marker.color = shades.tolist() if named else shades
            self.people.data[0].marker.showscale = not named
        names = [(n, s) for n, _, s in groups if isinstance(s, str)]
        self.legend.value = " ".join(
            f'<span style="color:{s}">&#9679;</span> {escape(n)}' for n, s in names[:12]
        )

    # tokens ---------------------------------------------------------------------------------

    def _strip(self):

        tokens = self.explorer.tokens
        bars = [
            go.Bar(x=tokens, y=np.zeros(len(tokens)), name=name, marker_color=shade)
            for name, shade in zip(("bold", "t1"), CATEGORIES, strict=False)
        ]
        line = go.Scatter(x=tokens, y=np.zeros(len(tokens)), name="preference", yaxis="y2")
        figure = go.FigureWidget([*bars, line.update(line_color="black", mode="lines")])
        figure.update_layout(PLAIN, height=210, barmode="stack", bargap=0.1, meta="tokens")
        second = {"overlaying": "y", "side": "right", "title": "preference", "showgrid": False}
        legend = {"orientation": "h", "x": 0, "y": 1, "yanchor": "bottom"}
        figure.update_layout(xaxis_title="token", yaxis={"title": "share", "range": [0, 1]})
        figure.update_layout(yaxis2=second, legend=legend, margin={"r": 50, "t": 35})
        for trace in figure.data[:2]:
            trace.on_click(lambda _, picked, how: self._token_clicked(picked.point_inds))
        return figure

    def _token_clicked(self, where):
        if where:
            self.explorer.select_token(int(self.explorer.tokens[where[0]]))

    def _update_strip(self):
        e = self.explorer
        shares, marked = e.shares(), e.parcels.any() and not e.groups
        with self.strip.batch_update():
            for i in range(2):
                self.strip.data[i].y = shares[:, i]
            self.strip.data[2].visible = self.strip.layout.yaxis2.visible = bool(marked)
            if marked:
                self.strip.data[2].y = e.preference()
            self.strip.layout.yaxis.range = [-1, 1] if e.groups else [0, 1]
            self.strip.layout.shapes = [] if e.token is None else [_band(e.token)]

    # the cortex -----------------------------------------------------------------------------

    def _brain(self):

        e = self.explorer
        if not len(e.roi):
            return go.FigureWidget(layout=PLAIN | {"title": NO_MAP, "meta": "brain"})
        values = xr.DataArray(np.zeros(len(e.roi), "f4"), {"roi": e.roi}, ["roi"])
        self._rank = on_vertices(values.copy(data=np.arange(len(e.roi), dtype="f4"))).values
        brain = on_vertices(values)
        pieces = [piece for side in SIDES["both"] for piece in cortex(brain, "inflated", side)]
        figure = go.FigureWidget([trace for trace, _ in pieces])
        names = [trace.name for trace, _ in pieces]
        figure.update_layout(stage("inflated", SIDES["both"], "top", names, look_of(values)))
        figure.update_layout(height=360, width=WIDE, margin_t=5, meta="brain")
        self._drawn = {}
        for trace, (_, vertices) in zip(figure.data, pieces, strict=True):
            if trace.name.endswith("values"):
                self._drawn[trace.name] = self._rank[vertices].astype(int)
                trace.on_click(self._brain_clicked)
        return figure

    def _brain_clicked(self, trace, picked, _):
        if picked.point_inds:
            parcel = self._drawn[trace.name][picked.point_inds[0]]
            self.controls["parcel"].value = str(self.explorer.roi[parcel])

    def _update_brain(self):
        e = self.explorer
        if not len(e.roi):
            return
        values = e.surface_map()
        with self.brain.batch_update():
            for trace in self.brain.data:
                if trace.name in self._drawn:
                    trace.intensity = values[self._drawn[trace.name]]
            _rescale(self.brain, look_of(values))

    # the T1 ---------------------------------------------------------------------------------

    def _slices(self):

        self._grey, self._shown, self._sent = grey_levels(template()), None, ()
        cubes = self.explorer.t1_map()
        cubes = None if cubes is None else with_mm(cubes)
        figure = go.FigureWidget(make_subplots(1, 3, horizontal_spacing=0.08))
        for column, (plane, (_, _, through)) in enumerate(PLANES.items(), 1):
            traces = slices(self._grey, cubes, plane, START[through])
            figure.add_traces(traces, rows=[1] * len(traces), cols=[column] * len(traces))
            figure.update_yaxes(scaleanchor=f"x{column if column > 1 else ''}", col=column)
        for axes in (figure.update_xaxes, figure.update_yaxes):
            axes(tickangle=0, tickvals=[-50, 0, 50], tickfont_size=10, constrain="domain")
            axes(showgrid=False, zeroline=False)
        figure.update_layout(PLAIN, height=230, margin_t=10, meta="slices")
        figure.update_layout(coloraxis=colour_bar(look_of(np.zeros(0))))
        return figure

    def _update_slices(self, *_):
        cubes = self.explorer.t1_map()
        volumes = {"": self._own_t1(), " map": None if cubes is None else with_mm(cubes)}
        sent = (self._shown, *(slider.value for slider in self.sliders.values()))
        if sent == self._sent:
            volumes[""] = None
        with self.slices.batch_update():
            for trace in self.slices.data:
                plane, *kind = trace.name.split(" ", 1)
                volume = volumes[" map" if kind else ""]
                if volume is not None:
                    trace.z = plane_of(volume, plane, self.sliders[PLANES[plane][2]].value).values
            if cubes is not None:
                _rescale(self.slices, look_of(cubes))
        self._sent = sent

    def _own_t1(self):
        """The T1 of a single person, where there is one; else the template."""
        e, one = self.explorer, None
        if e.chosen.sum() == 1 and e.cohort is not None and "t1" in e.cohort:
            row = int(e.chosen.argmax())
            one = e.subjects[row] if e.cohort.has_t1[row] else None
        if one != self._shown:
            t1 = template() if one is None else e.cohort.t1.sel(subject=one).compute()
            self._shown, self._grey = one, grey_levels(t1)
        return self._grey

    # controls -------------------------------------------------------------------------------

    def _controls(self, widgets):
        e = self.explorer
        numbers = [EVERYTHING, *map(str, e.tokens)]
        places = [*dict.fromkeys(e.networks.tolist()), *map(str, e.roi)]
        coords = [n for n, c in e.points.coords.items() if c.dims == ("subject",)]
        shades, style = ["attention", *coords], {"description_width": "55px"}
        narrow, middle, wide = (
            {"style": style, "layout": {"width": width}} for width in ("160px", "200px", "300px")
        )
        out = {
            "token": widgets.Combobox(description="token", options=numbers, **narrow),
            "parcel": widgets.Combobox(description="parcel", options=places, **wide),
            "subject": widgets.Combobox(description="subject", options=list(e.subjects), **wide),
            "colour": widgets.Dropdown(description="colour", options=shades, **middle),
            "everyone": widgets.Button(description="everything", layout={"width": "100px"}),
            "first": widgets.Button(description="selection = A"),
            "second": widgets.Button(description="selection = B"),
            "code": widgets.Button(description="write code"),
        }
        known = [c for c in ("age", "site", "diagnosis", "subject") if c in coords]
        out["colour"].value = known[0]
        typed = {
            "token": lambda v: e.select_token(_number(v)),
            "parcel": lambda v: e.select_parcel(v or None),
            "subject": lambda v: e.select_subjects([v] if v else None),
        }
        for name, act in typed.items():
            out[name].continuous_update = False
            out[name].observe(self._typed(act), "value")
        out["colour"].observe(self.colour, "value")
        out["everyone"].on_click(self._everything)
        out["first"].on_click(lambda _: self._mark(0))
        out["second"].on_click(lambda _: self._mark(1))
        out["code"].on_click(self._write)
        return out

    def _everything(self, _):
        """Everyone, all tokens, no parcel, and boxes that say so."""
        for name in ("token", "parcel", "subject"):
            self.controls[name].value = ""
        self.explorer.reset()

    def _sliders(self, widgets):
        out, style = {}, {"description_width": "15px"}
        for axis, ends in {"x": (-76, 76), "y": (-110, 74), "z": (-58, 94)}.items():
            slider = widgets.IntSlider(START[axis], *ends, 2, description=axis, style=style)
            slider.layout.width = f"{WIDE // 3}px"
            slider.observe(self._update_slices, "value")
            out[axis] = slider
        return out

    def _typed(self, act):
        """A callback that shows what is wrong with an entry instead of failing."""

        def follow(change):
            try:
                act(change["new"])
            except InputError as error:
                self.heading.value = f"<b>{escape(str(error))}</b>"

        return follow

    def _mark(self, which):
        """Keep the selection as one of two groups; with both, compare them."""
        ends = list(self._ends)
        ends[which] = self.explorer.chosen.copy()
        self._ends = tuple(ends)
        if all(end is not None for end in ends):
            self._ends = (None, None)
            self._typed(lambda _: self.explorer.compare(*ends))({"new": None})

    def _write(self, _):
        self.written.value = self.explorer.code()
        self.picture.clear_output(wait=True)
        with self.picture:
            from IPython.display import display

            display(self.explorer.figure())

    def _arranged(self, widgets):
        column = {"width": f"{WIDE + 10}px"}
        controls = list(self.controls.values())
        left = [self.legend, self.people, self.strip, self.card]
        right = [self.heading, self.brain, self.slices, widgets.HBox(list(self.sliders.values()))]
        both = [widgets.VBox(panels, layout=column) for panels in (left, right)]
        rows = [controls[:5], both, controls[5:], [self.written, self.picture]]
        rows = [widgets.HBox(row) for row in rows]
        rows[0].layout.flex_flow = "row wrap"
        return widgets.VBox(rows)


NO_MAP = 'no attention kept: embed(..., keep=("attention",))'


def _rescale(figure, look):
    """Send new limits, and a new colour map only where it is another."""
    axis = figure.layout.coloraxis
    axis.cmin, axis.cmax = look["limits"]
    if figure.layout.coloraxis.colorscale[0][1] != colours(look["cmap"])[0][1]:
        axis.colorscale = colours(look["cmap"])


def _band(token):
    """A band around a token of the strip."""
    ends = {"x0": token - 0.5, "x1": token + 0.5, "y0": 0, "y1": 1, "yref": "paper"}
    return {"type": "rect", "fillcolor": "black", "opacity": 0.25, "line_width": 0} | ends


def _number(text):
    """A token's number as typed, or None for all of them."""
    if text in ("", EVERYTHING):
        return None
    if not text.lstrip("-").isdigit():
        raise InputError(f"Expected a token's number, found '{text}'", "Type one, or choose")
    return int(text)
