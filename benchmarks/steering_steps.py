"""The directions that `benchmarks.steering` compares: natural steps, and what else is in use."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from benchmarks.steering_measure import Prompt, Site
from fisher_vmap import fisher_full, fisher_scores
from fisher_vmap.natural_step import natural_step, solved

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


MEAN = {"natural, full": Estimator("full", 16), "natural, top 10": Estimator("topk", 10)}  # of many prompts
OWN_BY = {"natural, full": Estimator("full", 32), "natural, top 10": Estimator("topk", 10)}  # of one
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


def factors(site: Site, rows: Sequence[Sequence[int]], how: Estimator, targets: int = 0) -> list[Factor]:
    """The Fisher matrix of each prompt, by the package: of the token that follows.

    With `targets` it is the sum over its last so many tokens, at the positions that predict them.
    """
    found: list[Factor] = []
    for start in range(0, len(rows), BATCH):
        ids, mask = padded(rows[start : start + BATCH])
        if how.name == "topk":
            A_BnD = fisher_scores(site.model, ids, mask, layers=site.layer, top_k=how.rank).factor(site.layer)
            found += [Factor(A_nD.double(), 0.0) for A_nD in A_BnD]
            continue
        full = fisher_full(
            site.model, ids, mask, layers=site.layer, rank=how.rank, oversampling=0, top_k=1,
            trace_samples=TRACE_SAMPLES, targets=predicting(mask, targets) if targets else "last",
        )  # fmt: skip
        rest_BSD = full.remainder[site.layer].double()
        for b, A_nD in enumerate(full.factors[site.layer]):
            rest = float(rest_BSD[b].square().sum() / max(1, rest_BSD.shape[1])) if rest_BSD.numel() else 0.0
            found.append(Factor(A_nD.double(), rest))
    return found


def natural(known: Sequence[Factor], gradients: Sequence[Tensor], damping: float, spread: bool = False) -> Tensor:
    """[D], length 1: (F + lambda I)^-1 g of the mean F and g, with lambda = damping * tr F / D.

    With `spread` the trace that the factors lack is taken to be the same along all directions that they lack.
    """
    g_D = torch.stack(list(gradients)).mean(0)
    A_nD = torch.cat([one.rows for one in known]) / len(known) ** 0.5
    trace = sum(one.trace for one in known) / len(known)
    y_D = solved(A_nD, g_D, ridge := damping * trace / len(g_D))
    if spread:
        _, S_r, V_rD = torch.linalg.svd(A_nD, full_matrices=False)
        seen_rD = V_rD[S_r > 1e-6 * S_r[0]]
        outside_D = y_D - (seen_rD @ y_D) @ seen_rD
        rest = sum(one.rest for one in known) / len(known) / max(1, len(g_D) - len(seen_rD))
        y_D = y_D + outside_D * (ridge / (ridge + rest) - 1)
    return unit(y_D)


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


def check(site: Site, prompts: Sequence[Prompt], how: Estimator, damping: float, wanted: Tensor) -> None:
    """What is put together here is the package's own natural step: raises AssertionError if it is not."""
    known = factors(site, [prompt.ids for prompt in prompts], how)
    expected = natural(known, [prompt.gradient for prompt in prompts], damping)
    ids, mask = padded([prompt.ids for prompt in prompts])
    ridge = damping * sum(one.trace for one in known) / len(known) / len(expected)
    found = natural_step(
        site.model, ids, attention_mask=mask, layer=site.layer, towards=wanted.tolist(), damping=ridge,
        estimator=how.name, rank=how.rank,
    )  # fmt: skip
    cosine = float(unit(found.step.double()) @ expected)
    assert cosine > 0.9999, f"{site.layer}: a natural step by its parts and natural_step differ, cosine {cosine}"
