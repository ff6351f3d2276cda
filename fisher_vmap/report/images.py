"""The main figures as PNGs, by matplotlib, for papers and slides: white ground, no interaction."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib.figure
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg

from fisher_vmap.progress import bar, passing
from fisher_vmap.report.data import LayerSurvey, Survey
from fisher_vmap.report.figures import LINES, UNIT, group_values, short_names
from fisher_vmap.results.files import readable_write_errors, replacing

BLUE, ORANGE, GREY, RED = "#0072b2", "#d55e00", "#7a8490", "#c8342b"
GROUPS = (BLUE, ORANGE, "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#882255", "#999933", "#1b2027", GREY)


def write_images(folder: Path, survey: Survey) -> list[Path]:
    """Write spectra.png, prompts.png, similarity.png and, with several layers, layers.png; those of one layer each.

    Raises:
        UserError: the folder cannot be written.
    """
    with readable_write_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    found: list[Path] = []

    def save(name: str, figure: matplotlib.figure.Figure) -> None:
        with replacing(folder / f"{name}.png") as file:
            FigureCanvasAgg(figure).print_png(file, metadata={"Software": None})
        found.append(folder / f"{name}.png")

    with bar(len(survey.layers), "layers", "drawing") as advance:
        for layer in passing(survey.layers, advance):
            suffix = f".{layer.name}" if len(survey.layers) > 1 else ""
            save(f"spectra{suffix}", _drawn(partial(_spectra, survey=survey, layer=layer), 2, layer.name))
            save(f"prompts{suffix}", _drawn(partial(_prompts, survey=survey, layer=layer), 2, layer.name))
            if layer.similarity is not None:
                save(f"similarity{suffix}", _similarity(survey, layer))
    if len(survey.layers) > 1 and survey.rows.ok.any():
        save("layers", _drawn(partial(_layers, survey=survey), 3, "all layers"))
    return found


def _drawn(draw: Callable[[list[Axes]], None], columns: int, title: str) -> matplotlib.figure.Figure:
    figure = matplotlib.figure.Figure(figsize=(5.2 * columns, 4.1), dpi=150, layout="constrained")
    axes = [figure.add_subplot(1, columns, i + 1) for i in range(columns)]
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(color="#e4e8ec", linewidth=0.7)
        ax.set_axisbelow(True)
    draw(axes)
    figure.suptitle(title, fontsize=11, x=0.01, ha="left")
    return figure


def _spectra(axes: list[Axes], survey: Survey, layer: LayerSurvey) -> None:
    if layer.S is not None and len(layer.S):
        S = np.where(layer.S > 0, layer.S.astype(np.float64), np.nan)
        alive = np.isfinite(S).any(0)
        rank = np.arange(1, S.shape[1] + 1)[alive]
        for line in S[np.unique(np.linspace(0, len(S) - 1, min(LINES, len(S))).astype(int))]:
            axes[0].plot(rank, line[alive], color=GREY, alpha=0.25, linewidth=0.6)
        _bands(axes[0], rank, S[:, alive].T)
        axes[0].set(yscale="log", xlabel="rank of the singular value", ylabel=f"singular value\n({UNIT})")
        axes[0].set_title("Single prompts", fontsize=10, loc="left")
        axes[0].legend(frameon=False, fontsize=8)
    else:
        axes[0].set_axis_off()
    share = np.cumsum(layer.mean_values) / layer.mean_trace
    axes[1].bar(np.arange(1, len(share) + 1), share, color=BLUE, alpha=0.8)
    axes[1].set(xlabel="number of leading directions of the mean", ylabel="share of the mean's trace", ylim=(0, 1))
    axes[1].set_title("The mean over prompts", fontsize=10, loc="left")


def _prompts(axes: list[Axes], survey: Survey, layer: LayerSurvey) -> None:
    rows = survey.rows
    where = np.isin(rows.index, survey.points)
    x, y = rows.effective_rank[layer.name], rows.trace_norm2[layer.name]
    found = axes[0].scatter(x[where], y[where], c=rows.mass[where], cmap="viridis", vmin=0, vmax=1, s=22, alpha=0.9)
    unlike = np.isin(rows.index, [outlier.index for outlier in layer.outliers])
    if unlike.any():
        ring: dict[str, Any] = {"facecolors": "none", "edgecolors": RED, "s": 75, "linewidths": 1.3}
        axes[0].scatter(x[unlike], y[unlike], label="unlike the rest", **ring)
        axes[0].legend(frameon=False, fontsize=8)
    axes[0].set(yscale="log", xlabel="effective rank", ylabel="trace × residual norm² (nats²)")
    bar = axes[0].figure.colorbar(found, ax=axes[0], label="covered mass")
    bar.outline.set_visible(False)
    trace = rows.trace[layer.name]
    trace = np.log10(trace[np.isfinite(trace) & (trace > 0)])
    axes[1].hist(trace, bins=int(np.clip(2 * np.sqrt(len(trace)), 8, 50)), color=BLUE, alpha=0.8)
    if len(trace):
        median = float(np.median(trace))
        axes[1].axvline(median, color=ORANGE, linewidth=2, label=f"median {10**median:.3g}")
        axes[1].legend(frameon=False, fontsize=8)
    axes[1].set(xlabel=f"log10 of the trace\n({UNIT})", ylabel="prompts")


def _similarity(survey: Survey, layer: LayerSurvey) -> matplotlib.figure.Figure:
    found = layer.similarity
    assert found is not None
    figure = matplotlib.figure.Figure(figsize=(6.4, 5.8), dpi=150, layout="constrained")
    ax = figure.add_subplot()
    apart = found.cosines[~np.eye(len(found.prompts), dtype=bool)]
    most = float(np.clip(np.quantile(apart, 0.995), 0.2, 1)) if len(apart) else 1.0
    image = ax.imshow(found.cosines, cmap="cividis", vmin=0, vmax=most, interpolation="nearest")
    ax.set(xticks=[], yticks=[], xlabel=f"{len(found.prompts)} prompts, in the order of the clustering")
    bar = figure.colorbar(image, ax=ax, shrink=0.85, label="cosine of the Fisher matrices", extend="max")
    bar.outline.set_visible(False)
    for name, values in list(survey.rows.groups.items())[:1]:
        kinds = group_values(values)
        of = dict(zip(survey.rows.index.tolist(), values, strict=True))
        for code, kind in enumerate(kinds):
            places = [i for i, prompt in enumerate(found.prompts) if of[int(prompt)] == kind]
            style: dict[str, Any] = {"marker": "s", "s": 9, "color": GROUPS[code], "clip_on": False, "label": kind}
            ax.scatter(places, np.full(len(places), -0.025 * len(found.prompts)), **style)
        ax.set_ylim(len(found.prompts) - 0.5, -0.05 * len(found.prompts))
        ax.spines[:].set_visible(False)
        ax.legend(
            frameon=False, fontsize=8, ncols=min(5, len(kinds)), loc="lower left", bbox_to_anchor=(0, 1), title=name,
            title_fontsize=8,
        )  # fmt: skip
    figure.suptitle(layer.name, fontsize=11, x=0.01, ha="left")
    return figure


def _layers(axes: list[Axes], survey: Survey) -> None:
    names = short_names([layer.name for layer in survey.layers])
    titles = ("trace × residual norm² (nats²)", f"trace ({UNIT})", "effective rank")
    for ax, column, title in zip(axes, ("trace_norm2", "trace", "effective_rank"), titles, strict=True):
        columns = getattr(survey.rows, column)
        values = np.stack([columns[layer.name] for layer in survey.layers])
        some = np.flatnonzero(np.isfinite(values).any(1))
        _bands(ax, some, values[some])
        ax.plot(some, np.nanmedian(values[some], axis=1), "o", color=BLUE, markersize=4)
        ax.set(xlabel="layer", ylabel=title, yscale="linear" if column == "effective_rank" else "log")
        ax.set_xticks(range(len(names)), names)
    axes[0].legend(frameon=False, fontsize=8)


def _bands(ax: Axes, x: np.ndarray, values: np.ndarray) -> None:
    """Median and quantile bands over the last axis."""
    low, quarter, median, three, high = np.nanquantile(values, [0.05, 0.25, 0.5, 0.75, 0.95], axis=-1)
    ax.fill_between(x, low, high, color=BLUE, alpha=0.15, linewidth=0, label="5% to 95%")
    ax.fill_between(x, quarter, three, color=BLUE, alpha=0.28, linewidth=0, label="25% to 75%")
    ax.plot(x, median, color=BLUE, linewidth=2, label="median")
