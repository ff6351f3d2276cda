"""`python -m benchmarks.targets`: what several targets cost, and whether their matrix predicts what a step does.

SmolLM2-135M, chat prompts, each with a completion of 20 tokens that the model has drawn itself. Times are by turns on
the same tokens. The KL divergences are measured in float32, summed over the targets, with the same tokens given.
"""

import argparse
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.timing import by_turns, machine, measurement_flags, parsed, write_json
from benchmarks.workloads import Batch, Workload, chat, middle, padded, smollm2
from fisher_vmap import compress, fisher_full, fisher_sampled, fisher_scores, measured_kl
from fisher_vmap.completions import Completions
from fisher_vmap.model.widening import widen_for_good

TOKENS, RANK, LEADING = 20, 10, 3
SMALL = 1e-3  # nats, predicted, of the steps


def completed(workload: Workload, batch: Batch) -> tuple[Batch, torch.Tensor]:
    """The prompts with their completions, and the mask of the positions that predict these."""
    prompts = [ids[:n].tolist() for ids, n in zip(batch.input_ids, batch.lengths, strict=True)]
    written = Completions(TOKENS, 1, 1.0, 0).write(workload.model, prompts)
    whole = padded([[*ids, *one] for ids, (one,) in zip(prompts, written, strict=True)], batch.input_ids.device)
    targets = torch.zeros_like(whole.attention_mask)
    for b, (ids, (one,)) in enumerate(zip(prompts, written, strict=True)):
        targets[b, len(ids) - 1 : len(ids) + len(one) - 1] = 1
    return whole, targets


def costs(workload: Workload, batch: Batch, targets: torch.Tensor, layer: str, rounds: int) -> dict[str, Any]:
    """Seconds of one target and of all of them, by estimator, on the same tokens."""
    common: dict[str, Any] = {"layers": layer, "precision": "model"}
    ways = {
        "full, last": partial(fisher_full, rank=RANK, **common),
        "full, 20 targets": partial(fisher_full, rank=RANK, targets=targets, **common),
        "sampled 64, 20 targets": partial(fisher_sampled, rank=RANK, targets=targets, **common),
        "topk 10, last": partial(fisher_scores, top_k=10, **common),
        "topk 10, 20 targets": partial(fisher_scores, top_k=10, targets=targets, **common),
    }
    timed = by_turns({name: partial(way, workload.model, *batch) for name, way in ways.items()}, rounds)
    for name in list(ways)[1:]:
        print(f"{name:24} / full, last   {timed.ratio(name, 'full, last')}")
    return timed.seconds


def agreement(workload: Workload, batch: Batch, targets: torch.Tensor, layer: str) -> dict[str, Any]:
    """Predicted over measured KL of small steps along each prompt's leading directions."""
    widen_for_good(workload.model)
    found = fisher_full(workload.model, *batch, layers=layer, rank=RANK, targets=targets, precision="model")
    low, ratios = compress(found.factors[layer], RANK), []
    for b, length in enumerate(batch.lengths):
        S, V = low.singular_values[b, :LEADING].double(), low.vectors[b, :LEADING].double()
        steps = V * (2 * SMALL / S).sqrt()[:, None]
        ids, chosen = batch.input_ids[b, :length], targets[b : b + 1, :length]
        both = torch.cat([steps, -steps]).float()
        kl = measured_kl(workload.model, ids, layer, both, precision="model", targets=chosen)
        ratios += (SMALL / kl.view(2, -1).mean(0)).tolist()
    low_, median, high = np.quantile(ratios, [0.1, 0.5, 0.9])
    print(f"predicted / measured KL, leading directions: {median:.4f} ({low_:.3f} to {high:.3f})")
    return {"ratios": ratios, "nats": SMALL}


def main() -> None:
    """Print the table, and write it if asked to."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.targets", description=__doc__.splitlines()[0])
    measurement_flags(parser, rounds=3)
    parser.add_argument("--json", type=Path)
    args = parsed(parser)
    workload = smollm2(device=args.device, precision=args.precision)
    batch, targets = completed(workload, chat(workload))
    layer = workload.layer(middle(workload.blocks))
    record = {
        "machine": machine(),
        "batch": batch.describe() | {"targets": targets.sum(1).tolist()},
        "layer": layer,
        "precision": workload.precision._asdict(),
        "seconds": costs(workload, batch, targets, layer, args.rounds),
        "agreement": agreement(workload, batch, targets, layer),
    }
    write_json(args.json, record)


if __name__ == "__main__":
    main()
