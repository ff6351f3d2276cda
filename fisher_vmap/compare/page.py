"""The page of a comparison: a summary, the prompts that changed most, and the directions. It needs no network."""

from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray

from fisher_vmap import __version__
from fisher_vmap.compare.tables import (
    differing,
    directions_of,
    groups_of,
    matched,
    none_of,
    note_on_settings,
    notes_on_groups,
    number,
    numbers_of,
    pairs_in_words,
    summary_of,
)
from fisher_vmap.escape import short, visible
from fisher_vmap.results.comparison import Comparison
from fisher_vmap.results.files import replacing

SHOWN = 1000  # prompts in the page's table
TEXT = 240  # characters of a prompt

Texts = Mapping[int, str | None]  # by the prompt's number

_BINS, _WIDTH, _HEIGHT = 40, 640, 160  # of the histogram: the most bars, and the size of their area


def write_page(
    path: Path, comparisons: Sequence[Comparison], texts: Texts, differ: Mapping[str, Any], ridge: float
) -> int:
    """Write the page; returns its size in bytes.

    Args:
        path: of the file.
        comparisons: of one pair of layers after the other.
        texts: of the prompts that the tables show, as far as they are stored.
        differ: settings that differ between the two runs, with both values.
        ridge: that of the directions.

    Raises:
        UserError: the file cannot be written.
    """
    text = render_page(comparisons, texts, differ, ridge).encode("utf-8", "backslashreplace")
    with replacing(path) as file:
        file.write(text)
    return len(text)


def render_page(comparisons: Sequence[Comparison], texts: Texts, differ: Mapping[str, Any], ridge: float) -> str:
    """The page's HTML."""
    template = (files("fisher_vmap.compare") / "page.html.j2").read_text("utf-8")
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    folders = [visible(str(folder), spaces=False) for folder in comparisons[0].folders]
    return environment.from_string(template).render(
        a=folders[0],
        b=folders[1],
        layers=visible(pairs_in_words([each.layers for each in comparisons]), spaces=False),
        note=note_on_settings(differ),
        parts=[_part(each, texts) for each in comparisons],
        ridge=f"{ridge:g}",
        version=__version__,
    )


def _part(comparison: Comparison, texts: Texts) -> dict[str, Any]:
    """What the page shows of one pair of layers."""
    values, summary = numbers_of(comparison), summary_of(comparison)
    columns = ("change", "cosine", "trace_a", "trace_b", "trace_ratio", "outside", "overlap")
    shown = differing(comparison, SHOWN)
    rows = []
    for place in shown:
        prompt = int(comparison.prompt_index[place])
        text = texts.get(prompt)
        cells = [number(values[name][place]) for name in columns]
        rows.append((prompt, cells, "" if text is None else short(visible(text, spaces=False), TEXT)))
    one, other = (visible(layer, spaces=False) for layer in comparison.layers)
    return {
        "title": one if one == other else f"{one} and {other}",
        "matched": matched(comparison),
        "tiles": [
            (f"{summary['prompts']:,}", "prompts compared"),
            (number(summary["median_cosine"]), "cosine of the two matrices (median)"),
            (number(summary["median_trace_ratio"]), "trace in B / trace in A (median)"),
            (number(summary["median_outside"]), "of B's trace is not held by A (median)"),
            (number(summary["median_change"]), "change (median)"),
        ],
        "histogram": histogram(values["cosine"]),
        "rows": rows,
        "total": len(comparison.prompt_index),
        "groups": [(f"{title}{none_of(group)}", directions_of(group)) for title, group in groups_of(comparison)],
        "notes": notes_on_groups(comparison),
    }


def histogram(values: NDArray[np.float64]) -> Markup:
    """A histogram of the finite values as SVG, which holds numbers alone; empty without any."""
    known = values[np.isfinite(values)]
    if not len(known):
        return Markup("")
    low, high = float(known.min()), float(known.max())
    if high - low < 1e-6:
        low, high = low - 5e-7, high + 5e-7
    bins = min(max(10, int(2 * np.sqrt(len(known)))), _BINS)
    counts, _ = np.histogram(known, bins, (low, high))
    step, tallest = _WIDTH / bins, int(counts.max())
    bars = "".join(
        f'<rect x="{i * step + 1:.1f}" y="{_HEIGHT * (1 - count / tallest) + 14:.1f}" width="{step - 2:.1f}" '
        f'height="{_HEIGHT * count / tallest:.1f}"/>'
        for i, count in enumerate(counts.tolist())
        if count
    )
    base = _HEIGHT + 14
    return Markup(
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT + 36}" role="img" aria-label="Histogram of the cosines">{bars}'
        f'<path d="M0 {base}H{_WIDTH}"/><text x="0" y="{base + 18}">{low:.4g}</text>'
        f'<text x="{_WIDTH}" y="{base + 18}" text-anchor="end">{high:.4g}</text>'
        f'<text x="0" y="10">{tallest:,} prompts in the tallest bar</text></svg>'
    )
