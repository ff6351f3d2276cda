"""What the report is about: the figures' numbers of each layer, and what of a large run is sampled."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fisher_vmap import algebra
from fisher_vmap.progress import bar, passing, step
from fisher_vmap.report.outliers import Outlier, Scores, rank_outliers, score_prompts
from fisher_vmap.report.rows import Rows, read_rows
from fisher_vmap.report.similarity import Similarity, compare_prompts
from fisher_vmap.results import Results
from fisher_vmap.storage.mean import is_ok

MEAN_RANK = 30  # eigenvalues of the mean that are shown
MANY_LAYERS = 4  # above, less is shown of each


@dataclass(frozen=True)
class Sampling:
    """How much of a large run is shown: prompts in the similarity map, in full, as points, and as rows of the table."""

    similarity: int = 400
    details: int = 300
    points: int = 4000
    rows: int = 20_000
    always: tuple[int, ...] = ()
    """Prompts that are shown in full whatever happens."""
    seed: int = 0


@dataclass(frozen=True)
class LayerSurvey:
    """The numbers of one layer; those of single prompts are None where the run kept the mean alone."""

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
    """A results folder as the report sees it."""

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
        """Did the run keep the mean alone?"""
        return self.results.index.layout.means_only


def survey(results: Results, sampling: Sampling) -> Survey:
    """Look through a results folder.

    Raises:
        UserError: the folder is damaged, or a prompt that is to be shown is not there.
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
    pointed_at = np.unique(np.concatenate([shown, points, compared]))  # all that has a tooltip has a row
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
    mean = results.mean(layer)
    nothing = not np.isfinite(mean).all()
    values = np.zeros(0) if nothing else algebra.eigenvectors(mean, min(MEAN_RANK, width)).S
    alone = results.index.layout.means_only
    scores = None if alone else score_prompts(results, layer)
    return LayerSurvey(
        name=layer,
        width=width,
        mean_values=values,
        mean_trace=float(np.trace(mean)),
        S=None if alone else _singular_values(results, layer),
        similarity=None if alone or len(compared) < 2 else compare_prompts(results, layer, compared),
        scores=scores,
        outliers=[] if scores is None else rank_outliers(scores),
    )


def _singular_values(results: Results, layer: str) -> NDArray[np.float32]:
    found = [reader.stack(layer).S[is_ok(reader)] for reader in results.shards()]
    return np.concatenate(found) if found else np.zeros((0, results.index.layout.rank), np.float32)


def _sample(
    prompts: NDArray[np.int64], count: int, rng: np.random.Generator, first: NDArray[np.int64] | None = None
) -> NDArray[np.int64]:
    """At most `count` prompts in order: those of `first`, and others drawn at random."""
    kept = np.zeros(0, np.int64) if first is None else first[np.isin(first, prompts)][:count]
    rest = np.setdiff1d(prompts, kept)
    drawn = rest if len(rest) + len(kept) <= count else rng.choice(rest, count - len(kept), replace=False)
    return np.sort(np.concatenate([kept, drawn])).astype(np.int64)
