"""The page's figures as dictionaries for plotly.

A colour is a name of the page's palette: "@blue", or "@blue/0.2" with an opacity. The page replaces it by the colour of
the current theme, in properties for colours alone. Points carry the prompt's index, from which the page makes its
tooltips: no data is in a hover template, and what names a trace or a tick went through `escape.plotly_text`.
"""

import base64
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fisher_vmap.escape import plotly_text, visible
from fisher_vmap.report import data as numbers
from fisher_vmap.report.data import Bands, LayerSurvey, Survey
from fisher_vmap.report.targets import shade_of

Figure = dict[str, Any]

_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def layout_of(x: str, y: str) -> Figure:
    """A layout with these axis titles, in the page's colours."""
    axis = {
        "type": "linear",  # else plotly guesses it from the values
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
    """A logarithmic axis with ticks at 1, 2 and 5, or at fewer steps if there are more than `most`."""
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
    """What makes a trace a line."""
    common = {"type": "scatter", "mode": "lines", "line": {"color": colour, "width": width}}
    return common | ({"name": name} if name else {})


def fill(colour: str) -> Figure:
    """What fills a trace down to the trace before it."""
    return {"fill": "tonexty", "fillcolor": colour, "hoverinfo": "skip"}


def colour_bar(title: str, tickformat: str | None = None) -> Figure:
    """A slim colour bar."""
    bar: Figure = {"title": {"text": title, "side": "top"}, "thickness": 12, "outlinewidth": 0, "len": 0.9}
    return bar | ({"tickformat": tickformat} if tickformat else {})


def typed(values: ArrayLike) -> Figure:
    """An array for plotly.js as base 64: short, and fast to read."""
    array = np.ascontiguousarray(values)
    wire = {"i": np.int32, "u": np.uint8, "f": np.float32, "b": np.uint8}[array.dtype.kind]
    code = {np.int32: "i4", np.uint8: "u1", np.float32: "f4"}[wire]
    spec = {"dtype": code, "bdata": base64.b64encode(array.astype(wire).tobytes()).decode()}
    return spec | ({"shape": ", ".join(map(str, array.shape))} if array.ndim > 1 else {})


def spectra(survey: Survey, layer: LayerSurvey) -> Figure:
    """Singular values of the prompts: quantile bands, the median, and some single prompts."""
    found = numbers.spectra_of(layer)
    assert found is not None
    S, some = found.S, found.lines
    R, gap = S.shape[1], np.full((len(some), 1), np.nan)
    single = {
        "x": typed(np.hstack([np.tile(np.arange(1.0, R + 1), (len(some), 1)), gap]).ravel()),
        "y": typed(np.hstack([S[some], gap]).ravel()),
        "customdata": typed(np.repeat(survey.rows.index[survey.rows.ok][some], R + 1)),
        **line("@grey/0.28", 1, "single prompts"),
        "hoverinfo": "none",
    }
    median = _median(found.bands) | {"hovertemplate": "rank %{x}: median %{y:.3g}<extra></extra>"}
    layout = layout_of("rank of the singular value", f"singular value ({numbers.UNIT})")
    layout["yaxis"] |= log_axis(S)
    layout["xaxis"]["dtick"] = 1 if R <= 16 else None
    return {"data": [single, *_bands(found.bands), median], "layout": layout}


def mean_spectrum(layer: LayerSurvey) -> Figure:
    """The share of the mean's trace that its leading directions hold together."""
    share = numbers.mean_share(layer)
    bars = {
        "type": "bar",
        "x": typed(np.arange(1, len(share) + 1)),
        "y": typed(share),
        "marker": {"color": "@blue/0.75"},
        "hovertemplate": "the %{x} leading directions hold %{y:.0%}<extra></extra>",
    }
    layout = layout_of("number of leading directions of the mean", "share of the mean's trace")
    layout["yaxis"] |= {"tickformat": ".0%", "range": [0, 1]}
    layout["showlegend"] = False
    return {"data": [bars], "layout": layout}


def histograms(survey: Survey, layer: LayerSurvey) -> dict[str, Figure]:
    """Trace, trace x norm^2, effective rank, and covered mass or mean entropy over prompts."""
    rows, name = survey.rows, layer.name
    shade = shade_of(rows.mass, rows.of_targets)
    return {
        "trace": _histogram(rows.trace[name], numbers.TITLES["trace"], log=True),
        "trace_norm2": _histogram(rows.trace_norm2[name], "trace × norm² (nats²)", log=True),
        "effective_rank": _histogram(rows.effective_rank[name], numbers.TITLES["effective_rank"]),
        "mass": _histogram(shade.values, shade.title, tickformat=shade.tickformat),
    }


def layers_figure(survey: Survey, column: str) -> Figure:
    """Median and spread of one column of the table against the layers."""
    found = numbers.over_layers(survey, column)
    median = _median(found) | {
        "mode": "lines+markers",
        "marker": {"size": 6},
        "text": [plotly_text(visible(survey.layers[i].name)) for i in found.x],
        "hovertemplate": "%{text}: median %{y:.3g}<extra></extra>",
    }
    layout = layout_of("layer", numbers.TITLES[column])
    layout["yaxis"] |= {} if column == "effective_rank" else log_axis(np.concatenate([found.low, found.high]))
    names = [plotly_text(visible(name)) for name in numbers.short_names([layer.name for layer in survey.layers])]
    layout["showlegend"] = False  # the page explains line and bands
    layout["xaxis"] |= {"tickvals": list(range(len(names))), "ticktext": names, "tickangle": 0}
    return {"data": [*_bands(found), median], "layout": layout}


def _median(found: Bands) -> Figure:
    return {"x": typed(found.x), "y": typed(found.median), **line("@blue", 2.5, "median")}


def _bands(found: Bands) -> list[Figure]:
    """Two bands, 5% to 95% and 25% to 75%, each drawn as its lower edge and its upper one filled down to that."""
    x, low, quarter, _, three, high = found
    edge = line("@blue/0", 0) | {"hoverinfo": "skip", "showlegend": False}
    return [
        {"x": typed(x), "y": typed(low), **edge},
        {"x": typed(x), "y": typed(high), **line("@blue/0", 0, "5% to 95%"), **fill("@blue/0.14")},
        {"x": typed(x), "y": typed(quarter), **edge},
        {"x": typed(x), "y": typed(three), **line("@blue/0", 0, "25% to 75%"), **fill("@blue/0.26")},
    ]


def _histogram(values: NDArray[np.float64], title: str, *, log: bool = False, tickformat: str | None = None) -> Figure:
    counts, edges, median = numbers.histogram(values, log=log)
    middle = np.sqrt(edges[1:] * edges[:-1]) if log else (edges[1:] + edges[:-1]) / 2
    data = [
        {
            "type": "bar",
            "x": typed(middle),
            "y": typed(counts),
            "width": typed(np.diff(edges)),
            "marker": {"color": "@blue/0.75"},
            "hovertemplate": "about %{x:.3g}: %{y} prompts<extra></extra>",
        }
    ]
    if some := np.isfinite(median):
        mark = {"x": [median, median], "y": [0, int(counts.max())], **line("@orange", 2)}
        data.append(mark | {"hovertemplate": f"median {median:.3g}<extra></extra>"})
    layout = layout_of(title, "prompts")
    layout["showlegend"] = False
    layout["bargap"] = 0.06
    layout["xaxis"] |= log_axis(edges, most=4) if log and some else {"nticks": 6, "tickformat": tickformat or ""}
    return {"data": data, "layout": layout}


GROUP_COLOURS = ("@blue", "@orange", "@green", "@pink", "@amber", "@sky", "@wine", "@olive", "@ink", "@grey")


def scatter(survey: Survey, layer: LayerSurvey, group: str | None = None) -> Figure:
    """Prompts by effective rank and trace x norm^2, coloured by covered mass (or mean entropy) or by a kept column."""
    rows = survey.rows
    where, x, y, ring = numbers.points_of(survey, layer)
    layout = layout_of(numbers.TITLES["effective_rank"], numbers.TITLES["trace_norm2"])
    layout["yaxis"] |= log_axis(y)
    data: list[Figure] = []
    if group is None:
        shade = shade_of(rows.mass, rows.of_targets)
        marker = {
            "color": typed(np.nan_to_num(shade.values[where])),
            "colorscale": "@points",
            "colorbar": colour_bar(shade.short, shade.tickformat),
        }
        data.append(_points(x, y, rows.index[where], marker, "prompts") | {"showlegend": False})
    else:
        values = np.array(rows.groups[group])[where]
        for colour, value in zip(GROUP_COLOURS, numbers.group_values(rows.groups[group]), strict=False):
            mask = values == value
            data.append(_points(x[mask], y[mask], rows.index[where][mask], {"color": colour}, plotly_text(value)))
    if ring.any():
        circle = {"symbol": "circle-open", "size": 13, "color": "@red", "line": {"width": 1.8}, "opacity": 1}
        data.append(_points(x[ring], y[ring], rows.index[where][ring], circle, "unlike the rest"))
    return {"data": data, "layout": layout}


def similarity(survey: Survey, layer: LayerSurvey, group: str | None = None) -> Figure:
    """The heat map of cosines in the order of the clustering, with a strip of groups above it."""
    found = layer.similarity
    assert found is not None
    size, most = len(found.prompts), numbers.brightest(found)
    ticks = np.linspace(0, most, 5)
    names = [f"{tick / 100:.2g}" for tick in ticks[:-1]] + [f"≥ {most / 100:.2g}"]
    heat = {
        "type": "heatmap",
        "z": typed(np.round(100 * found.cosines).astype(np.uint8)),
        "zmin": 0,
        "zmax": most,
        "colorscale": "@scale",
        "colorbar": colour_bar("cosine") | {"tickvals": ticks.tolist(), "ticktext": names},
        "hoverinfo": "none",
    }
    layout = layout_of("prompts, in the order of the clustering", "")
    for axis in ("xaxis", "yaxis"):
        layout[axis] |= {"showgrid": False, "showticklabels": False, "zeroline": False, "ticks": "", "showline": False}
    layout["yaxis"] |= {"range": [size - 0.5, -0.5], "scaleanchor": "x", "constrain": "domain"}
    layout["xaxis"] |= {"range": [-0.5, size - 0.5], "constrain": "domain"}
    data = [heat]
    if group is not None:
        # One bar of thin marks for each group, so that the legend names it.
        for colour, (value, where) in zip(GROUP_COLOURS, numbers.group_marks(survey, found, group), strict=False):
            data.append(
                {
                    "type": "scatter",
                    "mode": "markers",
                    "x": typed(where),
                    "y": typed(np.full(len(where), -0.028 * size)),
                    "customdata": typed(found.prompts[where]),
                    "marker": {"symbol": "square", "size": 7, "color": colour},
                    "name": plotly_text(value),
                    "hoverinfo": "none",
                    "cliponaxis": False,
                }
            )
        layout["yaxis"]["range"] = [size - 0.5, -0.06 * size]
    return {"data": data, "layout": layout}


def _points(x: Any, y: Any, prompts: NDArray[np.int64], marker: Figure, name: str) -> Figure:
    return {
        "type": "scatter",
        "mode": "markers",
        "x": typed(x),
        "y": typed(y),
        "customdata": typed(prompts),
        "marker": {"size": 7, "opacity": 0.85, "line": {"width": 0.5, "color": "@paper"}} | marker,
        "name": name,
        "hoverinfo": "none",
    }


def layer_figures(survey: Survey, number: int) -> dict[str, Figure]:
    """The figures of one layer by name; those of single prompts are left out where there are none."""
    layer = survey.layers[number]
    figures = {"mean": mean_spectrum(layer), **histograms(survey, layer)}
    if layer.S is not None and len(layer.S):
        figures["spectra"] = spectra(survey, layer)
    if layer.similarity is not None:
        figures["similarity"] = similarity(survey, layer)
        for name in survey.rows.groups:
            figures[f"similarity by {name}"] = similarity(survey, layer, name)
    figures["scatter"] = scatter(survey, layer)
    for name in survey.rows.groups:
        figures[f"scatter by {name}"] = scatter(survey, layer, name)
    return figures
