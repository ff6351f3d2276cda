"""The main figures as PNG images by matplotlib, for papers and slides."""

import logging
import re
from collections.abc import Callable, Iterable
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.figure
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.font_manager import FontProperties, findfont, findSystemFonts, fontManager
from matplotlib.ft2font import FT2Font
from matplotlib.text import Text
from numpy.typing import NDArray

from fisher_vmap.escape import code_points, file_names, short, visible
from fisher_vmap.progress import bar, passing
from fisher_vmap.report import data as numbers
from fisher_vmap.report.data import Bands, LayerSurvey, Survey
from fisher_vmap.report.targets import shade_of
from fisher_vmap.results.files import readable_write_errors, replacing

BLUE, ORANGE, GREY, RED = "#0072b2", "#d55e00", "#7a8490", "#c8342b"
GROUPS = (BLUE, ORANGE, "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#882255", "#999933", "#1b2027", GREY)
LEGEND = 75  # characters of the legend's widest line
TITLE = 80  # characters of a layer's name above a figure

# Fonts that are tried first for what the usual one lacks, and those whose glyphs are boxes, empty or coloured bitmaps.
_LARGE = re.compile(r"(?i)cjk|noto sans|wenquanyi|droid sans fallback|source han|arial unicode|pingfang|hiragino|yahei|"
                    r"gothic|symbola|unifont|emoji")  # fmt: skip
_UNFIT = re.compile(r"(?i)last ?resort|adobe ?blank|notdef|colou?r|apple .*emoji")
_MOST_FONTS = 500  # opened in search of a character
_NO_INK = re.compile("[\u200c\u200d\ufe00-\ufe0f]")

log = logging.getLogger(__name__)


class Lettering:
    """How data is written into the images: as it is, never as mathematics, in fonts that have its characters.

    A character that no font of the machine has is written as its code point.
    """

    def __init__(self, texts: Iterable[str]) -> None:
        """Look for fonts.

        Args:
            texts: all that will be written.
        """
        self.families = list(mpl.rcParams["font.family"])
        self._missing = {ord(sign) for sign in "".join(texts)}
        for family in self.families:
            self._missing -= _characters(family)
        for family in islice(_other_families(), _MOST_FONTS) if self._missing else ():
            if found := self._missing & _characters(family):
                self.families.append(family)
                self._missing -= found
            if not self._missing:
                break
        if without := [chr(code) for code in sorted(self._missing) if not _NO_INK.match(chr(code))]:
            log.info(
                "no font of this machine has %d of the characters in the images' labels, such as %s: their code points "
                "are drawn; with a font that has them, such as Noto Sans CJK, they are drawn themselves",
                len(without), code_points(without[0]),
            )  # fmt: skip
        self._run = re.compile(f"[{re.escape(''.join(map(chr, sorted(self._missing))))}]+") if self._missing else None

    @property
    def style(self) -> dict[str, Any]:
        """Properties of a text that shows data."""
        return {"parse_math": False, "usetex": False, "fontfamily": self.families}

    def drawn(self, text: str) -> str:
        """The text with code points for the characters that no font has."""
        return text if self._run is None else self._run.sub(lambda run: _code_points_of_ink(run[0]), text)

    def write(self, place: Text, text: str) -> None:
        """Make this the text of a title or of an entry of a legend."""
        place.set(text=self.drawn(text), **self.style)


def _code_points_of_ink(text: str) -> str:
    inked = _NO_INK.sub("", text)
    return code_points(inked) if inked else ""


def _characters(family: str) -> set[int]:
    """The code points of the characters that a font has; none if it is not on this machine."""
    try:
        path = findfont(FontProperties(family=[family]), fallback_to_default=False)
        face: dict[str, Any] = {"face_index": path.face_index} if hasattr(path, "face_index") else {}
        return set(FT2Font(path, **face).get_charmap())
    except (OSError, RuntimeError, ValueError):
        return set()


def _other_families() -> Iterable[str]:
    """The fonts of this machine by name, large ones first; also those that matplotlib's own list, a cache, lacks."""
    known = {font.fname for font in fontManager.ttflist}
    for path in sorted(set(findSystemFonts()) - known):
        try:
            fontManager.addfont(path)
        except Exception as error:  # a damaged file, and bitmaps, in many ways
            log.debug("%s is no font to draw with: %s", path, error)
    fonts = [font for font in fontManager.ttflist if not _UNFIT.search(font.name)]
    upright = {font.name for font in fonts if font.style == "normal" and font.weight in (400, "normal", "regular")}
    return sorted(upright, key=lambda name: (_LARGE.search(name) is None, name))  # of others matplotlib would complain


def write_images(folder: Path, survey: Survey) -> list[Path]:
    """Write spectra.png, prompts.png and similarity.png for each layer and, with several layers, layers.png.

    Raises:
        UserError: the folder cannot be written.
    """
    with readable_write_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    found: list[Path] = []
    groups = dict(islice(survey.rows.groups.items(), 1))
    names = [layer.name for layer in survey.layers]
    titles = [short(visible(name), TITLE) for name in names]
    values = {value for each in groups.values() for value in each}
    lettering = Lettering([*titles, *map(visible, numbers.short_names(names)), *groups, *values])

    def save(name: str, figure: matplotlib.figure.Figure) -> None:
        with replacing(folder / f"{name}.png") as file:
            FigureCanvasAgg(figure).print_png(file, metadata={"Software": None})
        found.append(folder / f"{name}.png")

    with bar(len(survey.layers), "layers", "drawing") as advance:
        for layer, name, title in zip(passing(survey.layers, advance), file_names(names), titles, strict=True):
            suffix = f".{name}" if len(names) > 1 else ""
            for kind, draw in (("spectra", _spectra), ("prompts", _prompts)):
                figure = _drawn(partial(draw, survey=survey, layer=layer), 2)
                lettering.write(_above(figure), title)
                save(f"{kind}{suffix}", figure)
            if layer.similarity is not None:
                figure = _similarity(survey, layer, lettering)
                lettering.write(_above(figure), title)
                save(f"similarity{suffix}", figure)
    if len(names) > 1 and survey.rows.ok.any():
        figure = _drawn(partial(_layers, survey=survey, lettering=lettering), 3)
        lettering.write(_above(figure), "all layers")
        save("layers", figure)
    return found


def _above(figure: matplotlib.figure.Figure) -> Text:
    return figure.suptitle("-", fontsize=11, x=0.01, ha="left")


def _drawn(draw: Callable[[list[Axes]], None], columns: int) -> matplotlib.figure.Figure:
    figure = matplotlib.figure.Figure(figsize=(5.2 * columns, 4.1), dpi=150, layout="constrained")
    axes = [figure.add_subplot(1, columns, i + 1) for i in range(columns)]
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(color="#e4e8ec", linewidth=0.7)
        ax.set_axisbelow(True)
    draw(axes)
    return figure


def _spectra(axes: list[Axes], survey: Survey, layer: LayerSurvey) -> None:
    if found := numbers.spectra_of(layer):
        rank = np.arange(1, found.S.shape[1] + 1)
        axes[0].plot(rank, found.S[found.lines].T, color=GREY, alpha=0.25, linewidth=0.6)
        _bands(axes[0], found.bands)
        axes[0].set(
            yscale=_scale(found.S), xlabel="rank of the singular value", ylabel=f"singular value\n({numbers.UNIT})"
        )
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
    shade = shade_of(rows.mass, rows.of_targets)
    found = axes[0].scatter(x, y, c=shade.values[where], cmap="viridis", vmin=0, vmax=shade.most, s=22, alpha=0.9)
    if unlike.any():
        ring: dict[str, Any] = {"facecolors": "none", "edgecolors": RED, "s": 75, "linewidths": 1.3}
        axes[0].scatter(x[unlike], y[unlike], label="unlike the rest", **ring)
        axes[0].legend(frameon=False, fontsize=8)
    axes[0].set(yscale=_scale(y), xlabel=numbers.TITLES["effective_rank"], ylabel=numbers.TITLES["trace_norm2"])
    bar = axes[0].figure.colorbar(found, ax=axes[0], label=shade.title)
    bar.outline.set_visible(False)
    counts, edges, median = numbers.histogram(rows.trace[layer.name], log=True)
    axes[1].stairs(counts, np.log10(edges), fill=True, color=BLUE, alpha=0.8)
    if np.isfinite(median):
        axes[1].axvline(np.log10(median), color=ORANGE, linewidth=2, label=f"median {median:.3g}")
        axes[1].legend(frameon=False, fontsize=8)
    axes[1].set(xlabel=f"log10 of the trace\n({numbers.UNIT})", ylabel="prompts")


def _similarity(survey: Survey, layer: LayerSurvey, lettering: Lettering) -> matplotlib.figure.Figure:
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
        marks, handles = numbers.group_marks(survey, found, name), []
        for colour, (_, where) in zip(GROUPS, marks, strict=False):
            style: dict[str, Any] = {"marker": "s", "s": 9, "color": colour, "clip_on": False}
            handles.append(ax.scatter(where, np.full(len(where), -0.025 * size), **style))
        ax.set_ylim(size - 0.5, -0.05 * size)
        ax.spines[:].set_visible(False)
        values = [lettering.drawn(value) for value, _ in marks]
        columns = max(1, min(5, len(marks), LEGEND // (4 + max(map(len, values)))))
        place: dict[str, Any] = {"loc": "lower left", "bbox_to_anchor": (0, 1), "ncols": columns}
        # Numbers first: matplotlib hides a label that begins with "_", and reads "$" before it can be told not to.
        labels = [str(number) for number in range(len(handles))]
        legend = ax.legend(handles, labels, frameon=False, fontsize=8, title="-", title_fontsize=8, **place)
        for text, value in zip([legend.get_title(), *legend.get_texts()], [name, *values], strict=False):
            lettering.write(text, value)
    return figure


def _layers(axes: list[Axes], survey: Survey, lettering: Lettering) -> None:
    names = numbers.short_names([layer.name for layer in survey.layers])
    for ax, column in zip(axes, ("trace_norm2", "trace", "effective_rank"), strict=True):
        found = numbers.over_layers(survey, column)
        _bands(ax, found)
        ax.plot(found.x, found.median, "o", color=BLUE, markersize=4)
        ax.set(xlabel="layer", ylabel=numbers.TITLES[column], yscale=_scale(found.median, column))
        ax.set_xticks(range(len(names)), [lettering.drawn(visible(name)) for name in names], **lettering.style)
    axes[0].legend(frameon=False, fontsize=8)


def _scale(values: NDArray[np.float64], column: str = "") -> str:
    """Logarithmic where something is above zero, but for the effective rank."""
    return "log" if column != "effective_rank" and (values > 0).any() else "linear"


def _bands(ax: Axes, found: Bands) -> None:
    ax.fill_between(found.x, found.low, found.high, color=BLUE, alpha=0.15, linewidth=0, label="5% to 95%")
    ax.fill_between(found.x, found.quarter, found.three, color=BLUE, alpha=0.28, linewidth=0, label="25% to 75%")
    ax.plot(found.x, found.median, color=BLUE, linewidth=2, label="median")
