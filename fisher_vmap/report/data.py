"""What the report shows: the numbers of its figures, the prompts in its table, and which prompts of a large run."""

from collections import Counter
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.cluster.hierarchy import leaves_list, linkage
from scipy.spatial.distance import squareform

from fisher_vmap import algebra
from fisher_vmap.escape import distinct_labels, visible
from fisher_vmap.progress import bar, passing, step
from fisher_vmap.report.outliers import Outlier, Scores, rank_outliers, score_prompts
from fisher_vmap.report.targets import COLUMNS, TargetRows, read_targets, shortened
from fisher_vmap.results.reader import Results
from fisher_vmap.results.shard import common_schema, in_schema
from fisher_vmap.results.shard_reader import ShardReader, is_ok

TOP = 5  # next tokens in the table
GROUP_VALUES = 60  # a kept column with at most this many different values divides the prompts into groups
GROUPS = 9  # the largest groups have a colour of their own
OTHERS = "others"
LINES = 150  # single prompts drawn in the spectra
UNIT = "nats² / unit²"  # unit: of the residual stream
TITLES = {  # of the axes of the table's columns
    "trace": f"trace ({UNIT})",
    "trace_norm2": "trace × residual norm² (nats²)",
    "effective_rank": "effective rank",
}


@dataclass(frozen=True)
class Rows:
    """All prompts of a run, column by column."""

    index: NDArray[np.int64]
    status: list[str]
    text: list[str]
    top: list[str]
    """The five likeliest next tokens, or the completion, as one line."""
    tokens: NDArray[np.int64]
    mass: NDArray[np.float64]
    trace: dict[str, NDArray[np.float64]]
    """Layer -> [n]; NaN where there are no numbers. The next two are alike."""
    trace_norm2: dict[str, NDArray[np.float64]]
    effective_rank: dict[str, NDArray[np.float64]]
    groups: dict[str, list[str]]
    """Kept columns with few values: the label of each prompt's value, fit to be seen but not escaped."""
    of_targets: TargetRows | None
    """Where there are several targets a prompt; `mass` is then NaN, and a completion takes the place of `top`."""

    @property
    def ok(self) -> NDArray[np.bool_]:
        """[n] whether each prompt has numbers."""
        return np.array([status == "ok" for status in self.status], bool)


def read_rows(results: Results) -> Rows:
    """Read the columns that the page needs, shard by shard, without the prompts' own tokens."""
    layers = results.layers
    lists: dict[str, list[Any]] = {
        name: [] for name in ("prompt_index", "status", "text", "top_tokens", "tokens", "mass", "reason")
    }
    lists |= {f"{layer}/{name}": [] for layer in layers for name in ("trace", "trace_norm2", "effective_rank")}
    tables, whole = [], []
    for reader in results.shards():
        tables.append(reader.table.select(results.index.layout.keep_columns))
        if results.index.layout.pairs:
            whole.append(reader.table.select(COLUMNS))
        for name, values in lists.items():
            found: list[Any] = [None] * reader.table.num_rows
            if name in reader.table.schema.names:
                found = reader.table.column(name).to_pylist()
            if name == "text":
                found = [shortened(text) for text in found]
            elif name == "top_tokens":
                if results.index.layout.pairs:
                    found = [[text for text in texts or () if text] for texts in found]  # "" pads the pairs
                found = [_next_tokens(texts, reader, row) for row, texts in enumerate(found)]
            values.extend(found)
    of_targets = read_targets(whole)
    shown = [
        text or f"({reason or 'no text stored'})" for text, reason in zip(lists["text"], lists["reason"], strict=True)
    ]
    per_layer = {
        name: {layer: _floats(lists[f"{layer}/{name}"]) for layer in layers}
        for name in ("trace", "trace_norm2", "effective_rank")
    }
    return Rows(
        index=np.array(lists["prompt_index"], np.int64),
        status=lists["status"],
        text=shown,
        top=(of_targets and of_targets.completions) or lists["top_tokens"],
        tokens=np.array(lists["tokens"], np.int64),
        mass=_floats(lists["mass"]),
        groups=_groups(_kept(tables, results) if results.index.layout.keep_columns else {}),
        of_targets=of_targets,
        **per_layer,
    )


def _groups(columns: dict[str, list[Any]]) -> dict[str, list[str]]:
    """Kept columns with few values; all but the `GROUPS` most frequent values of a column become `OTHERS`."""
    groups = {}
    for name, values in zip(distinct_labels(columns), columns.values(), strict=True):
        if 2 <= len({(type(value), str(value)) for value in values}) <= GROUP_VALUES:
            labels = distinct_labels(values, taken=(OTHERS,))
            counts = Counter(labels).most_common()
            large = {label for label, _ in counts[: GROUPS if len(counts) > GROUPS + 1 else len(counts)]}
            groups[name] = [label if label in large else OTHERS for label in labels]
    return groups


def _kept(tables: list[Any], results: Results) -> dict[str, list[Any]]:
    """The kept columns' values, in the type that they have in prompts.parquet: a shard's own may be a narrower one."""
    schema = common_schema((table.schema for table in tables), results.index.layout)
    tables = [in_schema(table, schema) for table in tables]
    return {name: [value for table in tables for value in table.column(name).to_pylist()] for name in schema.names}


def _floats(values: list[float | None]) -> NDArray[np.float64]:
    return np.array([np.nan if value is None else value for value in values], np.float64)


def _next_tokens(texts: list[str] | None, reader: ShardReader, row: int) -> str:
    """The five likeliest next tokens of a shard's row; those that look like another, or like nothing, with their ids.

    Older folders have U+FFFD for every token that is a part of a character.
    """
    shown = [visible(text) for text in (texts or ())[:TOP]]
    unclear = [not text or "\ufffd" in text or shown.count(text) > 1 for text in shown]
    if any(unclear) and not reader.entry.folded:  # of a mean that is kept alone there are no ids
        token_ids, _ = reader.tokens(reader.entry.start + row)
        shown = [
            f"{text}<id {token}>" if also else text
            for text, also, token in zip(shown, unclear, token_ids[:TOP].tolist(), strict=True)
        ]
    return " ".join(text or "∅" for text in shown)


class Similarity(NamedTuple):
    """Cosines between prompts, in an order that puts similar ones side by side."""

    prompts: NDArray[np.int64]
    """[m] indices, in order."""
    cosines: NDArray[np.float32]
    """[m, m], from 0 to 1."""


def compare_prompts(results: Results, layer: str, prompts: NDArray[np.int64]) -> Similarity:
    """Cosines of all pairs of prompts, ordered by average linkage with optimal leaf order.

    [Bar-Joseph, Gifford and Jaakkola, Bioinformatics 2001]

    Args:
        results: a folder that keeps its prompts.
        layer: the layer's name.
        prompts: [m] the indices of prompts with numbers.
    """
    prompts = np.sort(prompts)
    stored = np.concatenate([np.arange(entry.start, entry.stop) for entry in results.index.shards])
    cosines = np.clip(algebra.cosines(results.stack(layer, where=np.isin(stored, prompts))), 0, 1)
    cosines = np.nan_to_num(cosines)  # a zero matrix is similar to none
    if len(prompts) > 2:
        distances = squareform(1 - cosines, checks=False)
        order = leaves_list(linkage(distances, "average", optimal_ordering=True))
        prompts, cosines = prompts[order], cosines[np.ix_(order, order)]
    return Similarity(prompts, cosines.astype(np.float32))


MEAN_RANK = 30  # eigenvalues of the mean that are shown
MANY_LAYERS = 4  # with more, less is shown of each


@dataclass(frozen=True)
class Sampling:
    """How many prompts of a large run are shown: in the similarity map, in full, as points, and as table rows."""

    similarity: int = 400
    details: int = 300
    points: int = 4000
    rows: int = 20_000
    always: tuple[int, ...] = ()
    """Prompts that are always shown in full."""
    seed: int = 0


@dataclass(frozen=True)
class LayerSurvey:
    """The numbers of one layer; those of single prompts are None if the run kept only the mean."""

    name: str
    width: int
    mean_values: NDArray[np.float64]
    """The leading eigenvalues of the mean."""
    mean_trace: float
    S: NDArray[np.float32] | None
    """[n, R] of the prompts with numbers, in order."""
    similarity: Similarity | None
    scores: Scores | None
    outliers: list[Outlier]


@dataclass(frozen=True)
class Survey:
    """What the report shows of a results folder."""

    results: Results
    rows: Rows
    layers: list[LayerSurvey]
    shown: NDArray[np.int64]
    """Prompts shown in full, in order."""
    points: NDArray[np.int64]
    """Prompts that are points in the scatter plots."""
    listed: NDArray[np.int64]
    """Prompts in the table."""

    @property
    def means_only(self) -> bool:
        """Whether the run kept only the mean."""
        return self.results.index.layout.means_only


def survey(results: Results, sampling: Sampling) -> Survey:
    """Collect what the report shows.

    Raises:
        UserError: the folder is damaged, or it lacks a prompt that `sampling` names.
    """
    with step("reading the table"):
        rows = read_rows(results)
    rng = np.random.default_rng(sampling.seed)
    have = rows.index[rows.ok]
    few = len(results.layers) <= MANY_LAYERS
    compared = _sample(have, sampling.similarity if few else sampling.similarity // 2, rng)
    with bar(len(results.layers), "layers", "comparing the prompts") as advance:
        layers = [_survey_layer(results, layer, compared) for layer in passing(results.layers, advance)]
    unlike = [outlier.index for layer in layers for outlier in layer.outliers]
    details = sampling.details if few else sampling.details // 3
    first = np.array(list(dict.fromkeys([*sampling.always, *unlike])), np.int64)
    shown = np.zeros(0, np.int64) if results.index.layout.means_only else _sample(have, details, rng, first)
    points = _sample(have, sampling.points, rng, first)
    pointed_at = np.unique(np.concatenate([shown, points, compared]))  # a tooltip needs the row
    return Survey(
        results=results,
        rows=rows,
        layers=layers,
        shown=shown,
        points=points,
        listed=_sample(rows.index, max(sampling.rows, len(pointed_at)), rng, pointed_at),
    )


def _survey_layer(results: Results, layer: str, compared: NDArray[np.int64]) -> LayerSurvey:
    width = results.index.layout.widths[layer]
    if results.is_wide(layer):
        factors = results.mean_factors(layer)
        values, mean_trace = factors.S[:MEAN_RANK], factors.trace
    else:
        mean = results.mean(layer)
        finite = np.isfinite(mean).all()
        values = algebra.eigenvectors(mean, min(MEAN_RANK, width)).S if finite else np.zeros(0)
        mean_trace = float(np.trace(mean))
    alone = results.index.layout.means_only
    S = [np.zeros((0, results.index.layout.rank), np.float32)]
    S += [] if alone else [reader.stack(layer).S[is_ok(reader)] for reader in results.shards()]
    scores = None if alone else score_prompts(results, layer)
    return LayerSurvey(
        name=layer,
        width=width,
        mean_values=values,
        mean_trace=mean_trace,
        S=None if alone else np.concatenate(S),
        similarity=None if alone or len(compared) < 2 else compare_prompts(results, layer, compared),
        scores=scores,
        outliers=[] if scores is None else rank_outliers(scores),
    )


def _sample(
    prompts: NDArray[np.int64], count: int, rng: np.random.Generator, first: NDArray[np.int64] | None = None
) -> NDArray[np.int64]:
    """At most `count` prompts in order: those of `first`, and others drawn at random."""
    kept = np.zeros(0, np.int64) if first is None else first[np.isin(first, prompts)][:count]
    rest = np.setdiff1d(prompts, kept)
    drawn = rest if len(rest) + len(kept) <= count else rng.choice(rest, count - len(kept), replace=False)
    return np.sort(np.concatenate([kept, drawn])).astype(np.int64)


class Bands(NamedTuple):
    """Quantiles against x: 5%, 25%, the median, 75% and 95%; entries of x without numbers are left out."""

    x: NDArray[np.int64]
    low: NDArray[np.float64]
    quarter: NDArray[np.float64]
    median: NDArray[np.float64]
    three: NDArray[np.float64]
    high: NDArray[np.float64]


def bands(x: NDArray[np.int64], values: NDArray[np.float64]) -> Bands:
    """Quantiles of each row of `values` [len(x), n]."""
    some = np.isfinite(values).any(1)
    levels = [0.05, 0.25, 0.5, 0.75, 0.95]
    found = np.nanquantile(values[some], levels, axis=1) if some.any() else np.zeros((len(levels), 0))
    return Bands(x[some], *found)


class Spectra(NamedTuple):
    """Singular values [n, R], NaN where zero; their bands against the rank; and the prompts drawn as single lines."""

    S: NDArray[np.float64]
    bands: Bands
    lines: NDArray[np.int64]


def spectra_of(layer: LayerSurvey) -> Spectra | None:
    """The spectra of a layer's prompts; None without prompts."""
    if layer.S is None or not len(layer.S):
        return None
    S = np.where(layer.S > 0, layer.S.astype(np.float64), np.nan)
    lines = np.unique(np.linspace(0, len(S) - 1, min(LINES, len(S))).astype(int))
    return Spectra(S, bands(np.arange(1, S.shape[1] + 1), S.T), lines)


def mean_share(layer: LayerSurvey) -> NDArray[np.float64]:
    """The share of the mean's trace that its leading directions hold together, by their number."""
    values = layer.mean_values
    return np.cumsum(values) / layer.mean_trace if layer.mean_trace > 0 else values


class Histogram(NamedTuple):
    """Counts between edges, and the median; NaN without values."""

    counts: NDArray[np.int64]
    edges: NDArray[np.float64]
    median: float


def histogram(values: NDArray[np.float64], *, log: bool = False) -> Histogram:
    """The histogram of the finite values; with `log` of the positive ones, in bins of equal ratio."""
    values = values[np.isfinite(values) & ((values > 0) | (not log))]
    bins = int(np.clip(2 * np.sqrt(len(values)), 8, 50))
    counts, edges = np.histogram(np.log10(values) if log else values, bins)
    return Histogram(counts, 10**edges if log else edges, float(np.median(values)) if len(values) else np.nan)


class Points(NamedTuple):
    """The scatter plot: rows of the table, effective rank and trace x norm^2 of each, and which are outliers."""

    rows: NDArray[np.int64]
    x: NDArray[np.float64]
    y: NDArray[np.float64]
    unlike: NDArray[np.bool_]


def points_of(survey: Survey, layer: LayerSurvey) -> Points:
    """The points of a layer's scatter plot."""
    rows = survey.rows
    where = np.flatnonzero(np.isin(rows.index, survey.points))
    unlike = np.isin(rows.index[where], [outlier.index for outlier in layer.outliers])
    return Points(where, rows.effective_rank[layer.name][where], rows.trace_norm2[layer.name][where], unlike)


def over_layers(survey: Survey, column: str) -> Bands:
    """The bands of one of the `TITLES` against the layer's number."""
    columns: dict[str, NDArray[np.float64]] = getattr(survey.rows, column)
    return bands(np.arange(len(survey.layers)), np.stack([columns[layer.name] for layer in survey.layers]))


def group_marks(survey: Survey, found: Similarity, group: str) -> list[tuple[str, NDArray[np.int64]]]:
    """Each value of a kept column, with the places of its prompts in the similarity map."""
    of = dict(zip(survey.rows.index.tolist(), survey.rows.groups[group], strict=True))
    values = np.array([of[int(prompt)] for prompt in found.prompts])
    return [(value, np.flatnonzero(values == value)) for value in group_values(survey.rows.groups[group])]


def brightest(found: Similarity) -> int:
    """The cosine, in percent, at the top of the similarity map's colour scale."""
    apart = np.round(100 * found.cosines[~np.eye(len(found.prompts), dtype=bool)])  # a prompt is always like itself
    return int(max(20, min(100, 5 * np.ceil(np.quantile(apart, 0.995) / 5)))) if len(apart) else 100


def short_names(names: list[str]) -> list[str]:
    """Layer names without the parts that all have in common: "model.layers.15" becomes "15"."""
    parts = [name.split(".") for name in names]
    if len(names) < 2 or len({len(part) for part in parts}) > 1:
        return [name if len(name) < 12 else "…" + name[-10:] for name in names]
    different = [i for i in range(len(parts[0])) if len({part[i] for part in parts}) > 1]
    return [".".join(part[i] for i in different) for part in parts]


def group_values(values: list[str]) -> list[str]:
    """The different values in order, the others last."""
    return sorted(set(values), key=lambda value: (value == OTHERS, value))
