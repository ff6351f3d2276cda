"""Times that can be compared: several functions in one run, by turns, so that a drifting machine slows all alike."""

import argparse
import gc
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fisher_vmap.model.precision import product_rates


class Timed(NamedTuple):
    """Seconds of each function, a list with one entry a round, and what each returned in the last round."""

    seconds: dict[str, list[float]]
    outputs: dict[str, Any]

    def ratio(self, slow: str, fast: str) -> "Ratio":
        """How many times longer one took than another."""
        return Ratio.of(self.seconds[slow], self.seconds[fast])


class Ratio(NamedTuple):
    """Of times taken in the same rounds: the median of the rounds' ratios, their extremes, the ratio of the minima."""

    median: float
    low: float
    high: float
    of_minima: float

    @classmethod
    def of(cls, slow: Sequence[float], fast: Sequence[float]) -> "Ratio":
        """The ratio of two lists with one entry a round."""
        rounds = [a / b for a, b in zip(slow, fast, strict=True)]
        return cls(statistics.median(rounds), min(rounds), max(rounds), min(slow) / min(fast))

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.low:.2f} to {self.high:.2f}; of minima {self.of_minima:.2f})"


def synchronise() -> None:
    """Wait for what was given to a GPU."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def once(function: Callable[[], Any]) -> tuple[float, Any]:
    """The seconds that one call takes, and what it returns."""
    synchronise()
    began = time.perf_counter()
    output = function()
    synchronise()
    return time.perf_counter() - began, output


def by_turns(functions: Mapping[str, Callable[[], Any]], rounds: int, warmup: int = 1) -> Timed:
    """Time functions A, B, C as A B C, C B A, A B C and so on, after calling each `warmup` times.

    The order turns round so that a machine that slows down steadily favours none of them. Python's garbage collector
    runs between the calls and not in them.
    """
    for _ in range(warmup):
        for function in functions.values():
            function()
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    outputs: dict[str, Any] = {}
    collecting = gc.isenabled()
    try:
        for number in range(rounds):
            for name in list(functions)[:: 1 if number % 2 == 0 else -1]:
                outputs.pop(name, None)
                gc.collect()
                gc.disable()
                taken, outputs[name] = once(functions[name])
                if collecting:
                    gc.enable()
                seconds[name].append(taken)
    finally:
        if collecting:
            gc.enable()
    return Timed(seconds, outputs)


# What decides how fast products of each format are; those with bf16 in their name compute in bfloat16.
INSTRUCTION_SETS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "bf16", "asimd", "sve")


def machine() -> dict[str, Any]:
    """What a number must be kept with: processor, threads, versions, and how busy the machine was."""
    return {
        "cpu": _cpu_name(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "instruction_sets": instruction_sets(),
        "gflops": product_rates(torch.device("cpu"), torch.bfloat16, 576, 1536)._asdict(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY"),
        "load_average": list(os.getloadavg()) if hasattr(os, "getloadavg") else None,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "cuda": torch.version.cuda if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "platform": platform.platform(),
        **{name: importlib.metadata.version(name) for name in ("torch", "transformers", "numpy")},
        "commit": _commit(),
        "date": time.strftime("%Y-%m-%d"),
    }


def instruction_sets() -> list[str]:
    """Those of `INSTRUCTION_SETS` that this processor has."""
    return [flag for flag in INSTRUCTION_SETS if flag in _cpu_flags()]


def _cpuinfo(key: str) -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(key)), "")


def _cpu_name() -> str:
    return _cpuinfo("model name") or platform.processor() or platform.machine()


def _cpu_flags() -> set[str]:
    return set((_cpuinfo("flags") or _cpuinfo("Features")).split())


def _commit() -> str | None:
    """The commit that was measured, with "-dirty" where files differ from it; None outside a git repository."""
    try:
        described = subprocess.run(
            ["git", "describe", "--always", "--dirty"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return described.stdout.strip()


def measurement_flags(parser: argparse.ArgumentParser, rounds: int = 5) -> None:
    """Add the flags of every command that measures: how often, on what, in which precision."""
    parser.add_argument("--rounds", type=int, default=rounds)
    parser.add_argument("--device", default="auto")
    parser.add_argument(
        "--precision", default="auto", choices=("auto", "model", "float32"), help="of all that is timed"
    )
    parser.add_argument("--threads", type=int)


def parsed(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The command line, with torch set to the number of threads asked for."""
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    return args


def write_json(path: Path | None, record: Any) -> None:
    """Write a record where one was asked for."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(record, indent=1) + "\n")
