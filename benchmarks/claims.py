"""What a row of `benchmarks.compare` is made of: the bound claimed, the ratio measured, and the workloads to choose."""

from functools import cache
from typing import Any, NamedTuple

import torch

from benchmarks.timing import Ratio
from benchmarks.workloads import Batch, Workload, chat, qwen2_shape, smollm2

TOP_K = RANK = 10


class Asked(NamedTuple):
    """The bound of a claim, as text and number, on a CPU and on a large GPU; None where nothing was claimed."""

    at_least: bool
    cpu: float | None
    cuda: float | None = None

    def __str__(self) -> str:
        bound = self.cuda if torch.cuda.is_available() else self.cpu
        return "" if bound is None else f"{'at least' if self.at_least else 'at most'} {bound:g}"

    def met(self, value: float) -> bool | None:
        """Whether a value keeps to the bound; None where there is none."""
        bound = self.cuda if torch.cuda.is_available() else self.cpu
        return None if bound is None else (value >= bound if self.at_least else value <= bound)


class Choices(NamedTuple):
    """What the command line says of every row."""

    device: str
    rounds: int
    mixed: bool
    precision: str

    def smollm2(self) -> Workload:
        """SmolLM2, loaded once."""
        return _smollm2(self.device, self.precision)

    def qwen(self) -> Workload:
        """Eight layers of Qwen2's shape, made once."""
        return _qwen(self.device, self.precision)

    def chat(self, workload: Workload) -> Batch:
        """Eight chat prompts, of like lengths or mixed ones."""
        return chat(workload, start=0, step=8) if self.mixed else chat(workload)


class Line(NamedTuple):
    """One line of the table."""

    what: str
    asked: Asked
    ratio: Ratio

    def text(self, row: str) -> str:
        """The line under `HEADING`."""
        verdict = {True: "", False: "  <- not met", None: ""}[self.asked.met(self.ratio.median)]
        return f"{row:16} {self.what:44} {self.asked!s:14} {self.ratio}{verdict}"

    def stored(self) -> dict[str, Any]:
        """The line for a JSON file."""
        return {"what": self.what, "asked": str(self.asked), "measured": self.ratio._asdict()}


HEADING = f"{'row':16} {'ratio':44} {'asked':14} measured: median of rounds (extremes)"
Outcome = tuple[list[Line], dict[str, Any]]


@cache
def _smollm2(device: str, precision: str) -> Workload:
    return smollm2(device=device, precision=precision)


@cache
def _qwen(device: str, precision: str) -> Workload:
    return qwen2_shape(8, device=device, precision=precision)
