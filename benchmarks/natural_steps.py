"""`python -m benchmarks.natural_steps`: what natural steps cost beside the scores of the same prompt.

SmolLM2-135M, one chat prompt, the middle layer, by turns: ten calls of `fisher_scores` without steering, ten iterated
steps (products by F: 8 in the first step, 2 in each later one), and one step. And what more products do to a step.
"""

import argparse
from functools import partial
from pathlib import Path

from benchmarks.timing import by_turns, machine, measurement_flags, parsed, write_json
from benchmarks.workloads import chat, middle, smollm2
from fisher_vmap import FisherModel, natural_step

STEPS, KL, TOKEN = 10, 0.01, 28


def main() -> None:
    """Print the ratios, and write them if asked to."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.natural_steps", description=__doc__.splitlines()[0])
    measurement_flags(parser, rounds=5)
    parser.add_argument("--json", type=Path)
    args = parsed(parser)
    workload = smollm2(device=args.device, precision=args.precision)
    batch = chat(workload)
    ids = batch.input_ids[0, : batch.lengths[0]]
    layer = workload.layer(middle(workload.blocks))
    fisher = FisherModel(workload.model, layers=layer)

    def scores() -> None:
        for _ in range(STEPS):
            fisher.scores(ids[None])

    step = partial(natural_step, fisher, ids, towards=TOKEN, kl=KL)
    ways = {"scores, ten calls": scores, "ten steps": partial(step, steps=STEPS), "one step": step}
    timed = by_turns(ways, args.rounds)
    for name in ("ten steps", "one step"):
        print(f"{name:10} / scores, ten calls   {timed.ratio(name, 'scores, ten calls')}")
    told = {}
    for products in (1, 2, 4, 8, 16, 32):
        found = step(products=products)
        told[products] = {name: getattr(found, name) for name in ("measured_kl", "off_target_kl", "objective")}
        gain, kl, off = found.objective[1] - found.objective[0], found.measured_kl, found.off_target_kl
        print(f"{products:3} products: log-odds {gain:+.3f}, KL {kl:.2e}, off target {off:.2e}")
    record = {
        "machine": machine(),
        "tokens": len(ids),
        "layer": layer,
        "precision": workload.precision._asdict(),
        "seconds": timed.seconds,
        "products": told,
    }
    write_json(args.json, record)


if __name__ == "__main__":
    main()
