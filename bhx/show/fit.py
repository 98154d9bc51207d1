"""What the explorer's page does for itself."""

from __future__ import annotations

from anywidget import AnyWidget
from traitlets import Bool


class Fit(AnyWidget):
    """Tells figures when their page gives them another width, and screen readers what each figure
    is; copies what it is sent; while Python works for longer than 300 ms, it says so."""

    busy = Bool(False).tag(sync=True)

    _esm = """export default { render({ model, el }) {
        const sign = Object.assign(document.createElement("div"), { textContent: "Working …" })
        sign.setAttribute("role", "status")
        sign.style = "position: absolute; right: 8px; z-index: 9; padding: 2px 10px;" +
            "background: #E69F00; color: black; border-radius: 4px; visibility: hidden"
        el.style.height = "0"
        el.append(sign)
        let waiting
        model.on("change:busy", () => {
            clearTimeout(waiting)
            const show = () => { sign.style.visibility = model.get("busy") ? "visible" : "hidden" }
            model.get("busy") ? (waiting = setTimeout(show, 300)) : show()
        })
        model.on("msg:custom", ({ copy }) => navigator.clipboard?.writeText(copy))
        const name = (g) => { g.setAttribute("role", "img"); g.setAttribute("aria-label",
            `${g.layout?.title?.text ?? "figure"}. The boxes above do the same by keyboard.`) }
        new ResizeObserver(() => {
            window.dispatchEvent(new Event("resize"))
            document.querySelectorAll(".js-plotly-plot").forEach(name)
        }).observe(el)
    } }"""
