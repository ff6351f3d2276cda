"""Peak memory of one call, in a process of its own: `python -m benchmarks.peak_memory --call forward|package|careful`.

The peak of a process never falls, and what one call has freed another uses again; so each call gets a fresh process.
There the model is loaded and the same call made once on a short prompt, which brings in libraries and weights; what
the long prompt then adds at its highest is printed, in bytes. On a GPU the allocator's own count is taken.
"""

import argparse
import ctypes
import json
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.baselines import careful_loop, last_logits
from benchmarks.package_job import package_pipeline
from benchmarks.workloads import Batch, Workload, qwen2_shape, smollm2, uniform

CALLS = ("forward", "package", "careful")
WARM_TOKENS = 16


def added_at_peak(call: Callable[[], Any], device: torch.device) -> int:
    """Bytes that a call holds at its highest, above what was held before."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return int(torch.cuda.max_memory_allocated(device)) - before
    _give_back_freed()
    before, resettable = _resident_now()
    call()
    peak = _status("VmHWM") if resettable else _largest_resident()
    return max(0, peak - before)


def _give_back_freed() -> None:
    """Let the C library hand freed memory back, so that it does not hide what the call takes."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)


def _resident_now() -> tuple[int, bool]:
    """Resident bytes, and whether the kernel let us begin its record of the peak anew (Linux)."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return _largest_resident(), False
    return _status("VmRSS"), True


def _status(key: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key + ":"))
    return int(line.split()[1]) * 1024


def _largest_resident() -> int:
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def run_call(name: str, workload: Workload, batch: Batch, layer: int, top_k: int) -> Any:
    """One of `CALLS` on a batch."""
    if name == "forward":
        return last_logits(workload.model, batch.input_ids)
    if name == "careful":
        return careful_loop(workload.model, *batch, workload.layer(layer), top_k)
    return package_pipeline(workload.model, batch, workload.layer(layer), top_k, rank=top_k)


def in_fresh_process(call: str, model: str, layer: int, tokens: int, top_k: int, device: str) -> int:
    """The bytes that a call adds at its peak, measured in a child process.

    Raises:
        RuntimeError: the child failed; with the end of its error output.
    """
    options = {"call": call, "model": model, "layer": layer, "tokens": tokens, "top-k": top_k, "device": device}
    options["threads"] = torch.get_num_threads()
    flags = [text for name, value in options.items() for text in (f"--{name}", str(value))]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.peak_memory", *flags],
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise RuntimeError(f"the child process for {call} failed: {done.stderr[-500:]}")
    return int(json.loads(done.stdout.splitlines()[-1])["bytes"])


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peak_memory", description=__doc__.splitlines()[0])
    parser.add_argument("--call", choices=CALLS, required=True)
    parser.add_argument("--model", choices=("smollm2", "qwen2"), default="smollm2")
    parser.add_argument("--layer", type=int, default=15)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--top-k", type=int, default=10)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    workload = smollm2(device=args.device) if args.model == "smollm2" else qwen2_shape(device=args.device)
    for tokens in (WARM_TOKENS, args.tokens):
        batch = uniform(workload, 1, tokens)

        def call(batch: Batch = batch) -> Any:
            return run_call(args.call, workload, batch, args.layer, args.top_k)

        added = added_at_peak(call, workload.model.device)
    print(json.dumps({"call": args.call, "tokens": args.tokens, "bytes": added}))


if __name__ == "__main__":
    main()
