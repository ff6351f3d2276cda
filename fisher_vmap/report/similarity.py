"""Prompts by the similarity of their Fisher matrices: their cosines, in an order that shows groups."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.cluster.hierarchy import leaves_list, linkage
from scipy.spatial.distance import squareform

from fisher_vmap import algebra
from fisher_vmap.results import Results


class Similarity(NamedTuple):
    """A square of cosines, its prompts in an order in which similar ones stand side by side."""

    prompts: NDArray[np.int64]
    """[m] indices, in order."""
    cosines: NDArray[np.float32]
    """[m, m], from 0 to 1."""


def compare_prompts(results: Results, layer: str, prompts: NDArray[np.int64]) -> Similarity:
    """Compare prompts pairwise and order them by average linkage with optimal leaf order.

    [Bar-Joseph, Gifford and Jaakkola, Bioinformatics 2001]

    Args:
        results: a folder that keeps its prompts.
        layer: the layer's name.
        prompts: [m] the indices of prompts with numbers.
    """
    prompts = np.sort(prompts)
    mask = np.isin(np.arange(results.index.stop), prompts)
    cosines = np.clip(algebra.cosines(results.stack(layer, where=mask[_stored(results)])), 0, 1)
    cosines = np.nan_to_num(cosines)  # a zero matrix is like none
    if len(prompts) > 2:
        distances = squareform(1 - cosines, checks=False)
        order = leaves_list(linkage(distances, "average", optimal_ordering=True))
        prompts, cosines = prompts[order], cosines[np.ix_(order, order)]
    return Similarity(prompts, cosines.astype(np.float32))


def _stored(results: Results) -> NDArray[np.int64]:
    return np.concatenate([np.arange(entry.start, entry.stop) for entry in results.index.shards])
