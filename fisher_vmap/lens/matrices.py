"""A batch's Jacobian matrices for the lens: the unit vectors pulled back from all valid positions to all of them.

For a prompt with valid positions V the cotangent e_i at every target in V gives, summed over the bias positions V,
sum over t, t' in V, t' >= t, of row i of d h_t' / d h_t: divided by |V|, row i of the prompt's matrix J. Attention is
causal, so that terms with t' < t are zero by themselves.

Beside it the mean over V of the output metric C, from the likeliest tokens exactly and the others by random vectors.
"""

import logging
from collections.abc import Collection
from typing import NamedTuple

import torch
from torch import Tensor

from fisher_vmap.data.sequences import Tokens, padded
from fisher_vmap.fisher import prompt_seeds
from fisher_vmap.fisher_model import FisherModel
from fisher_vmap.linearize.linear_map import LinearMap
from fisher_vmap.linearize.output import Asked, Probes, distribution
from fisher_vmap.model.targets import grid_of, target_seeds
from fisher_vmap.model.validation import forget_freed, is_out_of_memory

SKIP_FIRST = 16  # positions, whose residual stream is unlike that of others
METRIC_TOP = 32  # tokens of each distribution that the metric takes exactly
METRIC_SAMPLES = 4  # random vectors for the others
FIELD_ELEMENTS = {"cpu": 2**27, "cuda": 2**31}  # most numbers of the cotangents at all rows that are pulled in one pass

log = logging.getLogger(__name__)


class PromptMatrices(NamedTuple):
    """What a lens takes of one prompt.

    Attributes:
        jacobians: layer -> [D, D], on the CPU, float32 or wider.
        metric: [D, D], likewise; nats per unit of h, squared.
        positions: |V|.
    """

    jacobians: dict[str, Tensor]
    metric: Tensor
    positions: int


def valid_positions(tokens: int, skip_first: int) -> int:
    """|V| of a prompt of so many tokens; below one: it has none."""
    return tokens - 1 - skip_first


def cotangents_together(width: int, rows: int, device: torch.device) -> int:
    """How many of the D unit vectors to pull back in one pass over so many rows."""
    most = FIELD_ELEMENTS.get(device.type, FIELD_ELEMENTS["cpu"])
    chunks = -(-width * width * rows // most)
    return max(1, -(-width // chunks))


def prompt_matrices(
    fisher: FisherModel, prompts: list[list[int]], skip_first: int = SKIP_FIRST, together: int | None = None
) -> list[PromptMatrices]:
    """The matrices of a batch of prompts at a FisherModel's layers.

    Args:
        fisher: the model, with the layers and the precision.
        prompts: token ids, each with more than `skip_first` + 1.
        skip_first: leading positions that are left out; so is the last one.
        together: how many unit vectors to pull back in one pass; None: as many as memory allows. Where it runs out they
            are halved, down to one.

    Raises:
        ValueError: a prompt is too short, or the model's last block has no output of the width of its layers.
    """
    for number, ids in enumerate(prompts):
        if valid_positions(len(ids), skip_first) < 1:
            raise ValueError(f"prompt {number} has {len(ids)} tokens; expected at least {skip_first + 2}")
    rows = [Tokens(ids) for ids in prompts]
    ids_BT, mask_BT = padded(rows, fisher.device, max(map(len, prompts)))
    valid_BT = torch.zeros_like(ids_BT, dtype=torch.bool)
    for b, ids in enumerate(prompts):
        valid_BT[b, skip_first : len(ids) - 1] = True
    with fisher.linearize(ids_BT, mask_BT, positions=valid_BT, targets=valid_BT, pull_only=True) as network:
        nets = network.maps()
    for net in nets:
        _check_width(net)
    D, counts = nets[0].rows.shape[1], [valid_positions(len(ids), skip_first) for ids in prompts]
    some = together or cotangents_together(D, sum(counts), fisher.device)
    jacobians = [dict[str, Tensor]() for _ in prompts]
    for net in nets:
        for layer, found_BDD in _pulled(net, some).items():
            for b, count in enumerate(counts):
                jacobians[b][layer] = found_BDD[b] / count
    metrics = _metrics(nets[0], counts, min(METRIC_TOP, fisher.vocabulary))
    return [PromptMatrices(*found) for found in zip(jacobians, metrics, counts, strict=True)]


def _check_width(net: LinearMap) -> None:
    X = net.rows.shape[1]
    if other := [f"{layer} is {width} wide" for layer, width in net.widths.items() if width != X]:
        raise ValueError(
            f"{other[0]}, and what the head reads {X}: expected a model whose last block's output can be read and is "
            "as wide as its layers'"
        )


def _pulled(net: LinearMap, together: int) -> dict[str, Tensor]:
    """For each layer [B, D, D] on the CPU: row i is what the i-th unit vector at all targets becomes."""
    M, D = net.rows.shape
    B, found, start = len(net.layout.lengths), dict[str, Tensor](), 0
    while start < D:
        stop = min(D, start + together)
        unit_KX = torch.zeros(stop - start, D, dtype=net.dtype, device=net.rows.device)
        unit_KX[torch.arange(stop - start), torch.arange(start, stop)] = 1
        try:
            pulled = net.pull_sums(unit_KX.expand(M, -1, -1))
        except (MemoryError, RuntimeError) as error:  # torch's OutOfMemoryError is a RuntimeError
            if not is_out_of_memory(error) or together == 1:
                raise
            pulled = {}
        if not pulled:  # outside of the handler, whose traceback keeps the tensors alive
            together = (together + 1) // 2
            log.warning("out of memory: %d unit vectors are pulled back at a time", together)
            forget_freed()
            continue
        for layer, gradients in pulled.items():
            rows_BKD = gradients.cpu()
            if layer not in found:
                found[layer] = rows_BKD.new_empty(B, D, D)
            found[layer][:, start:stop] = rows_BKD
        start = stop
    return found


def _metrics(net: LinearMap, counts: Collection[int], top_k: int) -> list[Tensor]:
    """For each prompt [D, D] on the CPU: the mean of C over its targets, of so many tokens exactly."""
    layout = net.layout
    seeds = target_seeds(layout, grid_of(layout), prompt_seeds(layout))
    with net.prepared():
        asked = Asked(top_k, probes=Probes(METRIC_SAMPLES, seeds), of_rest=True)
        reading = distribution(net.head, net.rows, asked).reading
    # [K + S, M, D]: their outer products have C as their mean
    root_KMD = reading.cotangents * (reading.log_probs.T / 2).exp()[:, :, None].to(reading.cotangents)
    root_KMD = torch.cat([root_KMD, reading.random / METRIC_SAMPLES**0.5])
    found, start = [], 0
    for count in counts:
        part = root_KMD[:, start : start + count].flatten(0, 1)
        found.append((part.T @ part / count).cpu())
        start += count
    return found
