"""The main figures as PNG images by matplotlib, for papers and slides."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib.figure
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg

from fisher_vmap.progress import bar, passing
from fisher_vmap.report import data as numbers
from fisher_vmap.report.data import Bands, LayerSurvey, Survey
from fisher_vmap.results.files import readable_write_errors, replacing

BLUE, ORANGE, GREY, RED = "#0072b2", "#d55e00", "#7a8490", "#c8342b"
GROUPS = (BLUE, ORANGE, "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#882255", "#999933", "#1b2027", GREY)


def write_images(folder: Path, survey: Survey) -> list[Path]:
    """Write spectra.png, prompts.png and similarity.png for each layer and, with several layers, layers.png.

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
    if found := numbers.spectra_of(layer):
        rank = np.arange(1, found.S.shape[1] + 1)
        axes[0].plot(rank, found.S[found.lines].T, color=GREY, alpha=0.25, linewidth=0.6)
        _bands(axes[0], found.bands)
        axes[0].set(yscale="log", xlabel="rank of the singular value", ylabel=f"singular value\n({numbers.UNIT})")
        axes[0].set_title("Single prompts", fontsize=10, loc="left")
        axes[0].legend(frameon=False, fontsize=8)
    else:
        axes[0].set_axis_off()
    share = numbers.mean_share(layer)
    axes[1].bar(np.arange(1, len(share) + 1), share, color=BLUE, alpha=0.8)
    axes[1].set(xlabel="number of leading directions of the mean", ylabel="share of the mean's trace", ylim=(0, 1))
    axes[1].set_title("The mean over prompts", fontsize=10, loc="left")


def _prompts(axes: list[Axes], survey: Survey, layer: LayerSurvey) -> None:
    rows, (where, x, y, unlike) = survey.rows, numbers.points_of(survey, layer)
    found = axes[0].scatter(x, y, c=rows.mass[where], cmap="viridis", vmin=0, vmax=1, s=22, alpha=0.9)
    if unlike.any():
        ring: dict[str, Any] = {"facecolors": "none", "edgecolors": RED, "s": 75, "linewidths": 1.3}
        axes[0].scatter(x[unlike], y[unlike], label="unlike the rest", **ring)
        axes[0].legend(frameon=False, fontsize=8)
    axes[0].set(yscale="log", xlabel=numbers.TITLES["effective_rank"], ylabel=numbers.TITLES["trace_norm2"])
    bar = axes[0].figure.colorbar(found, ax=axes[0], label="covered mass")
    bar.outline.set_visible(False)
    counts, edges, median = numbers.histogram(rows.trace[layer.name], log=True)
    axes[1].stairs(counts, np.log10(edges), fill=True, color=BLUE, alpha=0.8)
    if np.isfinite(median):
        axes[1].axvline(np.log10(median), color=ORANGE, linewidth=2, label=f"median {median:.3g}")
        axes[1].legend(frameon=False, fontsize=8)
    axes[1].set(xlabel=f"log10 of the trace\n({numbers.UNIT})", ylabel="prompts")


def _similarity(survey: Survey, layer: LayerSurvey) -> matplotlib.figure.Figure:
    found = layer.similarity
    assert found is not None
    size, most = len(found.prompts), numbers.brightest(found) / 100
    figure = matplotlib.figure.Figure(figsize=(6.4, 5.8), dpi=150, layout="constrained")
    ax = figure.add_subplot()
    image = ax.imshow(found.cosines, cmap="cividis", vmin=0, vmax=most, interpolation="nearest")
    ax.set(xticks=[], yticks=[], xlabel=f"{size} prompts, in the order of the clustering")
    bar = figure.colorbar(image, ax=ax, shrink=0.85, label="cosine of the Fisher matrices", extend="max")
    bar.outline.set_visible(False)
    for name in list(survey.rows.groups)[:1]:
        marks = numbers.group_marks(survey, found, name)
        for colour, (value, where) in zip(GROUPS, marks, strict=False):
            style: dict[str, Any] = {"marker": "s", "s": 9, "color": colour, "clip_on": False, "label": value}
            ax.scatter(where, np.full(len(where), -0.025 * size), **style)
        ax.set_ylim(size - 0.5, -0.05 * size)
        ax.spines[:].set_visible(False)
        place: dict[str, Any] = {"loc": "lower left", "bbox_to_anchor": (0, 1), "ncols": min(5, len(marks))}
        ax.legend(frameon=False, fontsize=8, title=name, title_fontsize=8, **place)
    figure.suptitle(layer.name, fontsize=11, x=0.01, ha="left")
    return figure


def _layers(axes: list[Axes], survey: Survey) -> None:
    names = numbers.short_names([layer.name for layer in survey.layers])
    for ax, column in zip(axes, ("trace_norm2", "trace", "effective_rank"), strict=True):
        found = numbers.over_layers(survey, column)
        _bands(ax, found)
        ax.plot(found.x, found.median, "o", color=BLUE, markersize=4)
        ax.set(xlabel="layer", ylabel=numbers.TITLES[column], yscale="linear" if column == "effective_rank" else "log")
        ax.set_xticks(range(len(names)), names)
    axes[0].legend(frameon=False, fontsize=8)


def _bands(ax: Axes, found: Bands) -> None:
    ax.fill_between(found.x, found.low, found.high, color=BLUE, alpha=0.15, linewidth=0, label="5% to 95%")
    ax.fill_between(found.x, found.quarter, found.three, color=BLUE, alpha=0.28, linewidth=0, label="25% to 75%")
    ax.plot(found.x, found.median, color=BLUE, linewidth=2, label="median")
