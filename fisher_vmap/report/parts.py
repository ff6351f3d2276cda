"""What plotly's figures are put together from: axes, lines, colour bars, and arrays as they travel."""

import base64
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

Figure = dict[str, Any]

_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def layout_of(x: str, y: str) -> Figure:
    """A layout with these axis titles, in the page's colours."""
    axis = {
        "gridcolor": "@grid",
        "zerolinecolor": "@grid",
        "linecolor": "@grid",
        "ticks": "outside",
        "tickcolor": "@grid",
    }
    return {
        "xaxis": axis | {"title": {"text": x}},
        "yaxis": axis | {"title": {"text": y}},
        "font": {"color": "@ink", "size": 13, "family": "system-ui, -apple-system, Segoe UI, Roboto, sans-serif"},
        "paper_bgcolor": "@paper/0",
        "plot_bgcolor": "@paper/0",
        "margin": {"l": 70, "r": 20, "t": 16, "b": 56},
        "legend": {"orientation": "h", "y": 1.12, "x": 0},
        "hoverlabel": {"bgcolor": "@panel", "bordercolor": "@grid", "font": {"color": "@ink"}},
    }


def log_axis(values: ArrayLike, most: int = 6) -> Figure:
    """A logarithmic axis for these values with ticks at 1, 2 and 5, or at powers of ten where there are too many."""
    array = np.asarray(values, np.float64)
    array = array[np.isfinite(array) & (array > 0)]
    if not len(array):
        return {"type": "log"}
    low, high = np.floor(np.log10(array.min())), np.ceil(np.log10(array.max()))
    powers = np.arange(low, high + 1)
    for steps, stride in (((1, 2, 5), 1), ((1, 3), 1), ((1,), 1), ((1,), 2), ((1,), 4)):
        ticks = [(step, int(power)) for power in powers[::stride] for step in steps]
        shown = [t for t in ticks if 0.7 * array.min() <= t[0] * 10.0 ** t[1] <= 1.4 * array.max()]
        if len(shown) <= most:
            break
    return {
        "type": "log",
        "tickvals": [step * 10.0**power for step, power in shown],
        "ticktext": [_tick(step, power) for step, power in shown],
    }


def _tick(step: int, power: int) -> str:
    if -3 <= power <= 3:
        return f"{step * 10.0**power:,.10g}"
    tens = f"10{str(power).translate(_SUPERSCRIPT)}"
    return tens if step == 1 else f"{step}·{tens}"


def line(colour: str, width: float, name: str | None = None) -> Figure:
    """The part of a trace that makes it a line."""
    common = {"type": "scatter", "mode": "lines", "line": {"color": colour, "width": width}}
    return common | ({"name": name} if name else {})


def fill(colour: str) -> Figure:
    """The part of a trace that fills it down to the trace before."""
    return {"fill": "tonexty", "fillcolor": colour, "hoverinfo": "skip"}


def colour_bar(title: str, tickformat: str | None = None) -> Figure:
    """A slim colour bar."""
    bar: Figure = {"title": {"text": title, "side": "top"}, "thickness": 12, "outlinewidth": 0, "len": 0.9}
    return bar | ({"tickformat": tickformat} if tickformat else {})


def typed(values: ArrayLike) -> Figure:
    """An array as plotly.js reads it fastest and shortest: its bytes in base 64."""
    array = np.ascontiguousarray(values)
    wire = {"i": np.int32, "u": np.uint8, "f": np.float32, "b": np.uint8}[array.dtype.kind]
    code = {np.int32: "i4", np.uint8: "u1", np.float32: "f4"}[wire]
    spec = {"dtype": code, "bdata": base64.b64encode(array.astype(wire).tobytes()).decode()}
    return spec | ({"shape": ", ".join(map(str, array.shape))} if array.ndim > 1 else {})
