"""Figures of many prompts' numbers: spectra, histograms, and the course of a number over the layers."""

import numpy as np
from numpy.typing import NDArray

from fisher_vmap.report.parts import Figure, fill, layout_of, line, log_axis, typed
from fisher_vmap.report.survey import LayerSurvey, Survey

LINES = 150  # single prompts drawn in the spectra
UNIT = "nats² / unit²"  # unit: of the residual stream


def spectra(survey: Survey, layer: LayerSurvey) -> Figure:
    """Singular values of the prompts: quantile bands, the median, and some single prompts."""
    assert layer.S is not None
    rank = np.arange(1, layer.S.shape[1] + 1)
    S = np.where(layer.S > 0, layer.S.astype(np.float64), np.nan)
    alive = np.isfinite(S).any(0)
    low, quarter, median, three, high = np.nanquantile(S[:, alive], [0.05, 0.25, 0.5, 0.75, 0.95], axis=0)
    prompts = survey.rows.index[survey.rows.ok]
    some = np.unique(np.linspace(0, len(S) - 1, min(LINES, len(S))).astype(int))
    gap = np.full((len(some), 1), np.nan)
    lines = {
        "x": typed(np.hstack([np.tile(rank.astype(float), (len(some), 1)), gap]).ravel()),
        "y": typed(np.hstack([S[some], gap]).ravel()),
        "customdata": typed(np.repeat(prompts[some], len(rank) + 1)),
        **line("@grey/0.28", 1, "single prompts"),
        "hoverinfo": "none",
    }
    x = rank[alive]
    data = [
        lines,
        *_bands(x, low, quarter, three, high),
        {
            "x": typed(x),
            "y": typed(median),
            **line("@blue", 2.5, "median"),
            "hovertemplate": "rank %{x}: median %{y:.3g}<extra></extra>",
        },
    ]
    layout = layout_of("rank of the singular value", f"singular value ({UNIT})")
    layout["yaxis"] |= log_axis(S)
    layout["xaxis"]["dtick"] = 1 if len(rank) <= 16 else None
    return {"data": data, "layout": layout}


def mean_spectrum(layer: LayerSurvey) -> Figure:
    """Eigenvalues of the mean matrix and the share of its trace that the leading ones hold together."""
    rank = np.arange(1, len(layer.mean_values) + 1)
    share = np.cumsum(layer.mean_values) / layer.mean_trace if len(rank) else rank
    data = [
        {
            "type": "bar",
            "x": typed(rank),
            "y": typed(share),
            "marker": {"color": "@blue/0.75"},
            "hovertemplate": "the %{x} leading directions hold %{y:.0%}<extra></extra>",
        }
    ]
    layout = layout_of("number of leading directions of the mean", "share of the mean's trace")
    layout["yaxis"] |= {"tickformat": ".0%", "range": [0, 1]}
    layout["showlegend"] = False
    return {"data": data, "layout": layout}


def histograms(survey: Survey, layer: LayerSurvey) -> dict[str, Figure]:
    """Trace, trace x norm^2, effective rank and covered mass over prompts."""
    rows, name = survey.rows, layer.name
    return {
        "trace": _histogram(rows.trace[name], f"trace ({UNIT})", log=True),
        "trace_norm2": _histogram(rows.trace_norm2[name], "trace × norm² (nats²)", log=True),
        "effective_rank": _histogram(rows.effective_rank[name], "effective rank"),
        "mass": _histogram(rows.mass, "covered mass", tickformat=".0%"),
    }


def layers_figure(survey: Survey, column: str) -> Figure:
    """Median and spread of one column of the table against the layers."""
    titles = {
        "trace": f"trace ({UNIT})",
        "trace_norm2": "trace × residual norm² (nats²)",
        "effective_rank": "effective rank",
    }
    columns: dict[str, NDArray[np.float64]] = getattr(survey.rows, column)
    values = np.stack([columns[layer.name] for layer in survey.layers])
    some = np.isfinite(values).any(1)
    low, quarter, median, three, high = np.nanquantile(values[some], [0.05, 0.25, 0.5, 0.75, 0.95], axis=1)
    x = np.flatnonzero(some)
    data = [
        *_bands(x, low, quarter, three, high),
        {
            "x": typed(x),
            "y": typed(median),
            **line("@blue", 2.5, "median"),
            "mode": "lines+markers",
            "marker": {"size": 6},
            "text": [survey.layers[i].name for i in x],
            "hovertemplate": "%{text}: median %{y:.3g}<extra></extra>",
        },
    ]
    layout = layout_of("layer", titles[column])
    layout["yaxis"] |= {} if column == "effective_rank" else log_axis(np.concatenate([low, high]))
    names = short_names([layer.name for layer in survey.layers])
    layout["showlegend"] = False  # the page says what line and bands are
    layout["xaxis"] |= {"tickvals": list(range(len(names))), "ticktext": names, "tickangle": 0}
    return {"data": data, "layout": layout}


def short_names(names: list[str]) -> list[str]:
    """Layer names without what they all have in common: "model.layers.15" is 15 among its like."""
    parts = [name.split(".") for name in names]
    if len(names) < 2 or len({len(part) for part in parts}) > 1:
        return [name if len(name) < 12 else "…" + name[-10:] for name in names]
    different = [i for i in range(len(parts[0])) if len({part[i] for part in parts}) > 1]
    return [".".join(part[i] for i in different) for part in parts]


def _bands(
    x: NDArray[np.int64],
    low: NDArray[np.float64],
    quarter: NDArray[np.float64],
    three: NDArray[np.float64],
    high: NDArray[np.float64],
) -> list[Figure]:
    """Two bands, 5% to 95% and 25% to 75%, each drawn as its lower edge and its upper one filled down to that."""
    return [
        {"x": typed(x), "y": typed(low), **line("@blue/0", 0), "hoverinfo": "skip", "showlegend": False},
        {"x": typed(x), "y": typed(high), **line("@blue/0", 0, "5% to 95%"), **fill("@blue/0.14")},
        {"x": typed(x), "y": typed(quarter), **line("@blue/0", 0), "hoverinfo": "skip", "showlegend": False},
        {"x": typed(x), "y": typed(three), **line("@blue/0", 0, "25% to 75%"), **fill("@blue/0.26")},
    ]


def _histogram(values: NDArray[np.float64], title: str, *, log: bool = False, tickformat: str | None = None) -> Figure:
    values = values[np.isfinite(values) & ((values > 0) | (not log))]
    bins = int(np.clip(2 * np.sqrt(len(values)), 8, 50))
    counts, edges = np.histogram(np.log10(values) if log else values, bins)
    if log:
        edges = 10**edges
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
    if len(values):
        median = float(np.median(values))
        mark = {"x": [median, median], "y": [0, int(counts.max())], **line("@orange", 2)}
        data.append(mark | {"hovertemplate": f"median {median:.3g}<extra></extra>"})
    layout = layout_of(title, "prompts")
    layout["showlegend"] = False
    layout["bargap"] = 0.06
    layout["xaxis"] |= log_axis(edges, most=4) if log and len(values) else {"nticks": 6, "tickformat": tickformat or ""}
    return {"data": data, "layout": layout}
