"""The record of a run: written after each result, so that a run that is cut short leaves what it had measured."""

import gc
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.timing import machine
from fisher_vmap.model.validation import is_out_of_memory


class Session:
    """What was asked for, the time that is left, and the results so far.

    Attributes:
        device: where everything is computed.
        small: whether the tiny shapes were asked for, which any machine has time for.
        record: what the JSON file holds.
    """

    def __init__(self, device: torch.device, small: bool, budget: float, file: Path | None) -> None:
        self.device, self.small, self._file = device, small, file
        self._end = time.perf_counter() + budget
        self._part, self._part_end = "", self._end
        self.record: dict[str, Any] = {
            "machine": machine() | _gpu(device),
            "choices": {"device": str(device), "small": small, "budget": budget},
            "tests": {},
            "rows": [],
            "profiles": [],
            "small_svd": [],
            "part_seconds": {},
            "left_out": [],
            "errors": [],
        }
        self.write()

    def run(self, part: str, share: float, work: Callable[["Session"], None]) -> None:
        """One part, which may take a share of the time that is left; its failure is told, and no more."""
        began = time.perf_counter()
        self._part, self._part_end = part, began + share * max(0.0, self._end - began)
        self.say(f"== {part}, {self.left():.0f} s at most")
        gc.collect()
        gc.freeze()  # no model is there now; what is, Python modules mostly, need not be looked through in each round
        self.attempt("the whole part", lambda: work(self))
        self.record["part_seconds"][part] = round(time.perf_counter() - began, 1)
        self.write()

    def left(self) -> float:
        """Seconds that the part still has."""
        return self._part_end - time.perf_counter()

    def attempt(self, what: str, work: Callable[[], Any]) -> None:
        """Do one thing of the part. An error is told in one line, and kept; memory that ran out is given back."""
        try:
            work()
        except Exception as error:  # whatever one row does, the others are measured
            self.failed(what, error)
        free(self.device)

    def failed(self, what: str, error: Exception) -> None:
        """Tell an error in one line, and keep it."""
        text = " ".join(str(error).split())[:300]
        told = f"out of memory: {text}" if is_out_of_memory(error) else f"{type(error).__name__}: {text}"
        self.record["errors"].append({"part": self._part, "what": what, "error": told})
        self.say(f"{what}: FAILED, {told}")
        self.write()

    def leave_out(self, what: str) -> None:
        """Tell that there is no time for something, and keep that."""
        self.record["left_out"].append({"part": self._part, "what": what})
        self.say(f"{what}: left out, no time")

    def add(self, kind: str, entry: Any, line: str) -> None:
        """A result, as a line and in the file."""
        self.record[kind].append(entry)
        self.say(line)
        self.write()

    def say(self, line: str) -> None:
        """Print a line at once."""
        print(line, flush=True)

    def write(self) -> None:
        """Replace the file by what is known now."""
        if self._file is None:
            return
        self._file.parent.mkdir(parents=True, exist_ok=True)
        beside = self._file.with_name(f"{self._file.name}.{os.getpid()}.tmp")
        beside.write_text(json.dumps(self.record, indent=1) + "\n")
        os.replace(beside, self._file)


def free(device: torch.device) -> None:
    """Give back what nothing refers to any more."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _gpu(device: torch.device) -> dict[str, Any]:
    if device.type != "cuda":
        return {}
    about = torch.cuda.get_device_properties(device)
    return {
        "gpu_memory": about.total_memory,
        "compute_capability": f"{about.major}.{about.minor}",
        "tf32": torch.backends.cuda.matmul.allow_tf32,
    }
