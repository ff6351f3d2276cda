"""Figures with a mark for each prompt, side by side with the others: a scatter plot, and the map of similarities.

Points carry the prompt's index, from which the page makes its tooltip.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from fisher_vmap.report.parts import Figure, colour_bar, layout_of, log_axis, typed
from fisher_vmap.report.rows import OTHERS
from fisher_vmap.report.survey import LayerSurvey, Survey

GROUP_COLOURS = ("@blue", "@orange", "@green", "@pink", "@amber", "@sky", "@wine", "@olive", "@ink", "@grey")


def scatter(survey: Survey, layer: LayerSurvey, group: str | None = None) -> Figure:
    """Prompts by effective rank and trace x norm^2, coloured by covered mass or by a kept column."""
    rows = survey.rows
    where = np.flatnonzero(np.isin(rows.index, survey.points))
    x, y = rows.effective_rank[layer.name][where], rows.trace_norm2[layer.name][where]
    unlike = {outlier.index for outlier in layer.outliers}
    ring = np.array([index in unlike for index in rows.index[where]], bool)
    layout = layout_of("effective rank", "trace × residual norm² (nats²)")
    layout["yaxis"] |= log_axis(y)
    data: list[Figure] = []
    if group is None:
        marker = {
            "color": typed(np.nan_to_num(rows.mass[where])),
            "colorscale": "@points",
            "colorbar": colour_bar("covered<br>mass", ".0%"),
        }
        data.append(_points(x, y, rows.index[where], marker, "prompts") | {"showlegend": False})
    else:
        values = np.array(rows.groups[group])[where]
        for colour, value in zip(GROUP_COLOURS, group_values(rows.groups[group]), strict=False):
            mask = values == value
            data.append(_points(x[mask], y[mask], rows.index[where][mask], {"color": colour}, value))
    if ring.any():
        circle = {"symbol": "circle-open", "size": 13, "color": "@red", "line": {"width": 1.8}, "opacity": 1}
        data.append(_points(x[ring], y[ring], rows.index[where][ring], circle, "unlike the rest"))
    return {"data": data, "layout": layout}


def similarity(survey: Survey, layer: LayerSurvey, group: str | None = None) -> Figure:
    """The heat map of cosines in the order of the clustering, with a strip of groups above it."""
    found = layer.similarity
    assert found is not None
    size = len(found.prompts)
    # Each prompt is like itself; the colours are for the others.
    apart = np.round(100 * found.cosines[~np.eye(size, dtype=bool)])
    most = int(max(20, min(100, 5 * np.ceil(np.quantile(apart, 0.995) / 5)))) if len(apart) else 100
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
        values = group_values(survey.rows.groups[group])
        of = dict(zip(survey.rows.index.tolist(), survey.rows.groups[group], strict=True))
        codes = np.array([values.index(of[int(prompt)]) for prompt in found.prompts])
        for code, value in enumerate(values):  # one bar of thin marks a group, so that the legend names it
            where = np.flatnonzero(codes == code)
            data.append(
                {
                    "type": "scatter",
                    "mode": "markers",
                    "x": typed(where),
                    "y": typed(np.full(len(where), -0.028 * size)),
                    "marker": {"symbol": "square", "size": 7, "color": GROUP_COLOURS[code]},
                    "name": value,
                    "hovertemplate": f"{value}<extra></extra>",
                    "cliponaxis": False,
                }
            )
        layout["yaxis"]["range"] = [size - 0.5, -0.06 * size]
    return {"data": data, "layout": layout}


def group_values(values: list[str]) -> list[str]:
    """The different values in order, the others last."""
    return sorted(set(values), key=lambda value: (value == OTHERS, value))


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
