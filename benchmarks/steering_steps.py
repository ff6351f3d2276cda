"""The directions that `benchmarks.steering` compares: natural steps, and what else is in use."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from benchmarks.steering_measure import Site
from fisher_vmap import fisher_full, fisher_scores
from fisher_vmap.natural import natural_step

TRACE_SAMPLES = 4  # as natural_step has
BATCH = 10


class Factor(NamedTuple):
    """A prompt's Fisher matrix, A^T A, [n, D] float64, and an estimate of the trace that it lacks."""

    rows: Tensor
    rest: float

    @property
    def trace(self) -> float:
        """Of the whole matrix."""
        return float(self.rows.square().sum()) + self.rest


class Estimator(NamedTuple):
    """What `natural_step` calls estimator and rank; of topk the number of tokens."""

    name: str
    rank: int

    def __str__(self) -> str:
        return f"{self.name} {self.rank}"


SEEDS = (0,)


def padded(rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask, [B, T]."""
    T = max(map(len, rows))
    ids = torch.tensor([[*row, *[0] * (T - len(row))] for row in rows])
    return ids, torch.tensor([[1] * len(row) + [0] * (T - len(row)) for row in rows])


def predicting(mask: Tensor, targets: int) -> Tensor:
    """[B, T]: the positions that predict the last so many tokens of each row."""
    ends = mask.sum(1, keepdim=True) - 1
    places = torch.arange(mask.shape[1])
    return ((places >= ends - targets) & (places < ends)).long()


def factors(site: Site, rows: Sequence[Sequence[int]], how: Estimator) -> list[Factor]:
    """The Fisher matrix of each prompt, estimated by the package."""
    found: list[Factor] = []
    for start in range(0, len(rows), BATCH):
        ids, mask = padded(rows[start : start + BATCH])
        if how.name == "topk":
            A_BnD = fisher_scores(site.model, ids, mask, layers=site.layer, top_k=how.rank).factor(site.layer)
            found += [Factor(A_nD.double(), 0.0) for A_nD in A_BnD]
            continue
        full = fisher_full(
            site.model, ids, mask, layers=site.layer, rank=how.rank, oversampling=0, top_k=1,
            trace_samples=TRACE_SAMPLES,
        )  # fmt: skip
        rest_BSD = full.remainder[site.layer].double()
        for b, A_nD in enumerate(full.factors[site.layer]):
            rest = float(rest_BSD[b].square().sum() / max(1, rest_BSD.shape[1])) if rest_BSD.numel() else 0.0
            found.append(Factor(A_nD.double(), rest))
    return found


def mean_eigenvalues(site: Site, rows: Sequence[Sequence[int]]) -> list[float]:
    """The mean eigenvalue tr F / D of each prompt, as natural_step finds it: of ten tokens, and random vectors."""
    ids, mask = padded(rows)
    found = fisher_scores(site.model, ids, mask, layers=site.layer, top_k=10, trace_samples=TRACE_SAMPLES)
    A_BnD, random_BSD = found.factor(site.layer).double(), found.remainder[site.layer].double()
    traces = A_BnD.square().sum((1, 2)) + random_BSD.square().sum((1, 2)) / TRACE_SAMPLES
    return [float(trace) / A_BnD.shape[2] for trace in traces]


def natural(site: Site, rows: Sequence[Sequence[int]], wanted: Tensor, ridge: float, **how: Any) -> Tensor:
    """[D], length 1: the natural step for the mean of prompts, by the package; ridge is lambda.

    With `predict` F is the sum over so many last tokens of each row, and the gradient that of the first of them.
    """
    ids, mask = padded(rows)
    if targets := how.pop("predict", 0):
        how |= {"targets": predicting(mask, targets), "at": "first"}
    found = natural_step(
        site.model, ids, attention_mask=mask, layer=site.layer, towards=wanted.tolist(), damping=ridge, **how
    )
    return unit(found.step.double())


def from_estimate(factor: Factor, gradient_D: Tensor, damping: float) -> Tensor:
    """[D], length 1: (A^T A + lambda I)^-1 g, of an estimate alone; lambda = damping * tr F / D."""
    ridge = damping * factor.trace / len(gradient_D)
    _, S_r, V_rD = torch.linalg.svd(factor.rows, full_matrices=False)
    along_r = V_rD @ gradient_D
    inside_D = (along_r / (S_r.square() + ridge)) @ V_rD
    return unit(inside_D + (gradient_D - along_r @ V_rD) / ridge)


def unit(v_D: Tensor) -> Tensor:
    """A vector of length 1."""
    length: Tensor = v_D.norm()
    return v_D / length


def from_contrast(wanted_nD: Tensor, unwanted_nD: Tensor) -> dict[str, Tensor]:
    """The difference of means, and the first component of the paired differences as repeng (pca_diff) takes it.

    repeng's component is that of scikit-learn, which takes the mean of the differences out first.
    """
    differences_nD = (wanted_nD - unwanted_nD).double()
    mean_D = differences_nD.mean(0)
    first_D = torch.linalg.svd(differences_nD - mean_D, full_matrices=False).Vh[0]
    onto = differences_nD @ first_D
    sign = -1.0 if (onto < 0).sum() > (onto > 0).sum() else 1.0
    return {"difference of means": unit(mean_D), "PCA of differences": sign * first_D}


def at_random(gradient_D: Tensor, seeds: Sequence[int]) -> dict[str, Tensor]:
    """Random directions, with the sign that the gradient asks for."""
    found = {}
    for seed in seeds:
        v_D = torch.tensor(np.random.default_rng(seed).standard_normal(len(gradient_D)))
        found[f"random {seed}"] = unit(v_D) * torch.sign(v_D @ gradient_D)
    return found
