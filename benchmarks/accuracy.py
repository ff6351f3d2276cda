"""How good are the matrices? `python -m benchmarks.accuracy`: estimators x layers x precisions, into docs/accuracy.md.

The truth is F = J^T C J in float32, from the pullback of every unit vector of the residual stream and the product of C
with it: by the same code, of which the tests show on small models that it is the Hessian of the KL divergence. It takes
about 40 seconds a prompt on two cores and is kept in --cache; each (precision, layer) is kept there too as it is done,
so that a run that is stopped carries on, and only what is missing is computed.
"""

import argparse
import json
import math
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.accuracy_page import LAYERS, MEMORY_TOKENS, PRECISIONS, PROMPTS, RANK, page
from benchmarks.peak_memory import added_at_peak
from benchmarks.workloads import Batch, Workload, chat, smollm2, uniform
from fisher_vmap import Estimate, FisherModel, compress, fisher_full, fisher_scores
from fisher_vmap.decomposition import quality
from fisher_vmap.estimators import topk

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "accuracy.md"
KEPT = ROOT / "benchmarks" / "results" / "accuracy.json"
TRUTH_COTANGENTS = 96


class Row(NamedTuple):
    """One estimator at one layer in one precision, over the prompts."""

    name: str
    error: float
    worst: float
    estimated: float | None
    trace_error: float | None
    seconds: float
    cpu_seconds: float


def estimators(workload: Workload, batch: Batch, layer: str, precision: str) -> dict[str, Callable[[], Estimate]]:
    """What the table compares, by name; the first is what the others' costs are measured by."""
    common: dict[str, Any] = {"layers": layer, "precision": "mixed" if precision == "mixed" else "model"}

    def tokens(K: int, **choices: Any) -> Callable[[], Estimate]:
        return lambda: topk(fisher_scores(workload.model, *batch, top_k=K, **common, **choices))

    def full(m: int, passes: int = 1) -> Callable[[], Estimate]:
        choices = {"rank": RANK, "oversampling": m - RANK, "passes": passes}
        return lambda: fisher_full(workload.model, *batch, **common, **choices)

    return {
        "topk, K = 10": tokens(10),
        "topk, K = 10, include_rest": tokens(10, include_rest=True),
        "topk, K = 32": tokens(32),
        "topk, K = 100": tokens(100),
        "full, 10 vectors": full(10),
        "full, 16 vectors (the default)": full(16),
        "full, 24 vectors": full(24),
        "full, 16 vectors, 2 passes": full(16, passes=2),
    }


def truth(batch: Batch, b: int, cache: Path, model: Callable[[], Workload]) -> dict[str, Tensor]:
    """The whole vocabulary's F of prompt b at each layer, [D, D] float32."""
    file = cache / f"truth-{b}.pt"
    if not file.exists():
        workload = model()
        layers = [workload.layer(number) for number in LAYERS.values()]
        opened = FisherModel(workload.model, layers=layers)
        with torch.no_grad(), opened.linearize(batch.input_ids[b : b + 1, : batch.lengths[b]]) as net:
            (upper,) = net.sharing()
            D = net.output.shape[1]
            every = torch.eye(D)[None]
            C = net.metric(layers[0]).product(every)[0].double()
            parts = [upper.pull(every[:, i : i + TRUTH_COTANGENTS]) for i in range(0, D, TRUTH_COTANGENTS)]
            J = {layer: torch.cat([part[layer].gradients[0] for part in parts]).double() for layer in layers}
        torch.save({layer: (J[layer].T @ C @ J[layer]).float() for layer in layers}, file)
    found: dict[str, Tensor] = torch.load(file)
    return found


def measure(estimate: Callable[[], Estimate], name: str, layer: str, exact: list[Tensor]) -> Row:
    """Errors of the matrices cut to `RANK`, and what they cost."""
    wall, cpu = time.perf_counter(), time.process_time()
    found = estimate()
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    A = found.factors[layer]
    low = compress(A, RANK)
    errors = []
    for F, S, V in zip(exact, low.singular_values.double(), low.vectors.double(), strict=True):
        errors.append(float(((V.T * S) @ V - F.double()).norm() / F.double().norm()))
    how_good = quality(A, low, found.remainder[layer])
    traces = torch.tensor([float(F.trace()) for F in exact])
    trace_error = float((how_good.trace_full.float() / traces - 1).abs().mean())
    estimated = float(how_good.relative_error.mean())
    known = [None if math.isnan(x) else x for x in (estimated, trace_error)]
    return Row(name, sum(errors) / len(errors), max(errors), known[0], known[1], wall, cpu)


def best_possible(exact: list[Tensor]) -> float:
    """Mean error of the best matrices of rank `RANK`."""
    errors = []
    for F in exact:
        S = torch.linalg.eigvalsh(F.double()).abs().sort(descending=True).values
        errors.append(float(S[RANK:].norm() / S.norm()))
    return sum(errors) / len(errors)


def memory_of(precision: str, layer: int) -> dict[str, float]:
    """Bytes that topk takes at its peak on one prompt of `MEMORY_TOKENS` tokens, in a process of its own; seconds."""
    flags = ["--memory-of", precision, str(layer)]
    command = [sys.executable, "-m", "benchmarks.accuracy", *flags]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def print_memory(precision: str, layer: int) -> None:
    workload = smollm2("float32" if precision == "float32" else "bfloat16", precision="model")
    weights = sum(p.numel() * p.element_size() for p in workload.model.parameters())
    choices = {"layers": workload.layer(layer), "precision": "mixed" if precision == "mixed" else "model"}
    for tokens in (16, MEMORY_TOKENS):
        batch = uniform(workload, 1, tokens)
        began = time.process_time()
        added = added_at_peak(lambda batch=batch: fisher_scores(workload.model, *batch, **choices), batch[0].device)
        cpu = time.process_time() - began
    print(json.dumps({"bytes": added, "cpu_seconds": cpu, "weights": weights}))


def fill(kept: dict[str, Any], cache: Path, until: float) -> bool:
    """Compute what is missing, as far as the time goes; returns whether all of it is there."""
    loaded: dict[str, Workload] = {}

    def model(dtype: str) -> Workload:
        if dtype not in loaded:
            loaded.clear()
            loaded[dtype] = smollm2(dtype, "cpu", "model")
        return loaded[dtype]

    batch: Batch | None = None
    for precision in reversed(PRECISIONS):
        for where, number in LAYERS.items():
            if f"{precision} {where}" in kept:
                continue
            dtype = "float32" if precision == "float32" else "bfloat16"
            batch = batch or chat(model(dtype), prompts=PROMPTS)
            exact = []
            for b in range(PROMPTS):
                if time.monotonic() > until and not (cache / f"truth-{b}.pt").exists():
                    return False
                exact.append(truth(batch, b, cache, lambda: model("float32"))[f"model.layers.{number}"])
            if time.monotonic() > until:
                return False
            layer = model(dtype).layer(number)
            rows = []
            todo = estimators(model(dtype), batch, layer, precision)
            if where == "early" and precision != "float32":
                del todo["topk, K = 100"]  # minutes, to show what float32 has shown
            next(iter(todo.values()))()  # once before the clock runs: the forms are proven, memory is there
            for name, estimate in todo.items():
                rows.append(measure(estimate, name, layer, exact)._asdict())
                print(precision, where, rows[-1], flush=True)
            kept[f"{precision} {where}"] = {"best": best_possible(exact), "rows": rows}
            KEPT.write_text(json.dumps(kept, indent=1) + "\n")
    for precision in PRECISIONS:
        for number in (0, 28):
            if (key := f"memory {precision} {number}") not in kept:
                if time.monotonic() > until:
                    return False
                kept[key] = memory_of(precision, number)
                KEPT.write_text(json.dumps(kept, indent=1) + "\n")
    return True


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.accuracy", description=__doc__.splitlines()[0])
    parser.add_argument("--cache", type=Path, default=ROOT / ".accuracy-cache", help="where the truth is kept")
    parser.add_argument("--seconds", type=float, default=math.inf, help="begin nothing new after this time")
    parser.add_argument("--memory-of", nargs=2, metavar=("PRECISION", "LAYER"), help="measure one call (internal)")
    args = parser.parse_args()
    if args.memory_of:
        print_memory(args.memory_of[0], int(args.memory_of[1]))
        return
    args.cache.mkdir(exist_ok=True)
    kept = json.loads(KEPT.read_text()) if KEPT.exists() else {}
    kept["machine"] = f"{torch.get_num_threads()} CPU cores ({platform.machine()}), torch {torch.__version__}"
    finished = fill(kept, args.cache, time.monotonic() + args.seconds)
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(page(kept))
    print(f"{PAGE} written")
    if not finished:
        sys.exit("not finished: the same command carries on")


if __name__ == "__main__":
    main()
