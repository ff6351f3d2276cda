"""Time over the floor: the kernel beside the matrix products that its job cannot avoid, on this machine, in one run.

What cannot be avoided is counted by `fisher_vmap.run.plan_model`. The floor is the time that these products
take when they are run one after another with nothing between them, in the model's dtype and at the job's own shapes,
by turns with the kernel. Beside it stands the time at the machine's best rate, which no shape of the job may reach.
"""

import argparse
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.package_job import package_loop
from benchmarks.timing import by_turns, machine, measurement_flags, once, parsed, write_json
from benchmarks.workloads import Batch, Workload, chat, qwen2_shape, smollm2, uniform
from fisher_vmap.model.layers import decoder_blocks
from fisher_vmap.run.plan_model import Shape, Work, unavoidable

SQUARE = 2048  # side of the square product that shows the machine's best rate


class Buffers:
    """Operands for every product, cut out of three stretches of memory that are as large as the largest needs."""

    def __init__(self, shapes: Sequence[Shape], dtype: torch.dtype, device: torch.device) -> None:
        def stretch(sizes: list[int]) -> Tensor:
            return torch.randn(max(sizes), dtype=dtype, device=device)

        self._left = stretch([s.batch * s.rows * s.inner for s in shapes])
        self._right = stretch([s.batch * s.inner * s.columns for s in shapes])
        self._out = stretch([s.batch * s.rows * s.columns for s in shapes])

    def call(self, shape: Shape, weight: Tensor | None) -> Callable[[], Tensor]:
        """A function that runs one product into memory that is there already."""
        b, m, n, p = shape
        left, out = self._left[: b * m * n].view(b, m, n), self._out[: b * m * p].view(b, m, p)
        if weight is not None:
            return lambda: torch.mm(left[0], weight, out=out[0])
        right = self._right[: b * n * p].view(b, n, p)
        return lambda: torch.bmm(left, right, out=out)


def measure(workload: Workload, batch: Batch, hook: int, top_k: int, rounds: int) -> dict[str, Any]:
    """The kernel and its floor, timed by turns; and each kind of product by itself."""
    model, layer = workload.model, workload.layer(hook)
    blocks = list(decoder_blocks(model).values())
    products = unavoidable(model, blocks, batch.lengths, [hook], Work(shared=top_k))
    square = Shape(1, SQUARE, SQUARE, SQUARE)
    buffers = Buffers([*(p.shape for p in products), square], model.dtype, model.device)
    calls = [buffers.call(p.shape, p.weight) for p in products]
    by_kind: dict[str, list[Callable[[], Tensor]]] = {}
    for product, call in zip(products, calls, strict=True):
        by_kind.setdefault(product.kind, []).append(call)
    best = buffers.call(Shape(1, SQUARE, SQUARE, SQUARE), buffers._right[: SQUARE**2].view(SQUARE, SQUARE))
    with torch.no_grad():
        timed = by_turns(
            {"ours": lambda: package_loop(model, batch, layer, top_k), "floor": lambda: [call() for call in calls]},
            rounds,
        )
        of_kinds = by_turns({k: lambda some=some: [call() for call in some] for k, some in by_kind.items()}, 3)
        square_seconds = min(once(best)[0] for _ in range(5))
    flops = Counter[str]()
    for product in products:
        flops[product.kind] += product.shape.flops
    rate = square.flops / square_seconds
    ratio = timed.ratio("ours", "floor")
    return {
        "model": workload.name,
        "dtype": str(model.dtype),
        "precision": workload.precision.stored(),
        "layer": layer,
        "top_k": top_k,
        "batch": batch.describe(),
        "flops": sum(flops.values()),
        "best_rate_flops_per_second": rate,
        "seconds_at_best_rate": sum(flops.values()) / rate,
        "seconds": timed.seconds,
        "time_over_floor": ratio._asdict(),
        "time_over_best_rate": min(timed.seconds["ours"]) / (sum(flops.values()) / rate),
        "kinds": {
            kind: {"products": len(by_kind[kind]), "flops": flops[kind], "seconds": min(of_kinds.seconds[kind])}
            for kind in by_kind
        },
    }


def report(record: dict[str, Any]) -> str:
    """A record of `measure` as lines of text."""
    batch, ratio = record["batch"], record["time_over_floor"]
    lines = [
        f"{record['model']}, {record['layer']}, {batch['prompts']} prompts of {batch['real_tokens']} real tokens "
        f"({batch['padded_tokens']} with padding), K = {record['top_k']}, {record['dtype']}",
        f"  {'':24} {'products':>9} {'GFLOP':>9} {'seconds':>9} {'GFLOP/s':>9}",
    ]
    for name, kind in record["kinds"].items():
        rate = kind["flops"] / kind["seconds"] / 1e9
        lines.append(f"  {name:24} {kind['products']:9} {kind['flops'] / 1e9:9.1f} {kind['seconds']:9.4f} {rate:9.0f}")
    floor, ours = record["seconds"]["floor"], record["seconds"]["ours"]
    lines += [
        f"  the products alone: {min(floor):.4f} s at least; at the rate of a {SQUARE} x {SQUARE} square one "
        f"({record['best_rate_flops_per_second'] / 1e9:.0f} GFLOP/s): {record['seconds_at_best_rate']:.4f} s",
        f"  the kernel: {min(ours):.4f} s at least",
        f"  time over floor: {ratio['median']:.2f} (rounds from {ratio['low']:.2f} to {ratio['high']:.2f}; "
        f"of minima {ratio['of_minima']:.2f}); over the best rate: {record['time_over_best_rate']:.2f}",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.roofline", description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=("smollm2", "qwen2"), default="smollm2")
    parser.add_argument("--blocks", type=int, default=8, help="blocks of the random Qwen2 (default 8)")
    parser.add_argument("--layer", type=int, help="hooked block (default: 15 of SmolLM2, 3 of Qwen2)")
    parser.add_argument("--top-k", type=int, default=10)
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--tokens", type=int, help="random prompts of this length instead of chat prompts")
    measurement_flags(parser)
    parser.add_argument("--json", type=Path)
    args = parsed(parser)
    if args.model == "smollm2":
        workload, layer = (
            smollm2(device=args.device, precision=args.precision),
            15 if args.layer is None else args.layer,
        )
        batch = uniform(workload, args.prompts, args.tokens) if args.tokens else chat(workload, prompts=args.prompts)
    else:
        workload, layer = (
            qwen2_shape(args.blocks, device=args.device, precision=args.precision),
            3 if args.layer is None else args.layer,
        )
        batch = uniform(workload, args.prompts, args.tokens or 64)
    record = measure(workload, batch, layer, args.top_k, args.rounds)
    print(report(record))
    write_json(args.json, {"machine": machine(), "roofline": record})


if __name__ == "__main__":
    main()
