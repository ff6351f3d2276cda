"""A worker that computes nothing: it sleeps for the time that a shard takes, and stores a small one."""

import os
import time
from pathlib import Path
from typing import Any

import numpy as np

from fisher_vmap.results.index import ShardLayout, read_entry
from fisher_vmap.results.record import LayerResult, PromptResult
from fisher_vmap.results.shard import write_shard

SHARD_SIZE = 2
LAYOUT = ShardLayout(widths={"layer": 8}, top_k=2, rank=1)


class SleepingWorker:
    """Takes shard numbers and gives the account of each that a real worker gives, and when it was at it."""

    def __init__(self, folder: str, mark: str, seconds: float) -> None:
        self.folder, self.mark, self.seconds = Path(folder), mark, seconds

    def __call__(self, numbers: list[int]) -> list[dict[str, Any]]:
        return [self._one(number) for number in numbers]

    def _one(self, number: int) -> dict[str, Any]:
        began = time.time()
        time.sleep(self.seconds)
        slept = time.time()
        results = [_result(number * SHARD_SIZE + i) for i in range(SHARD_SIZE)]
        write_shard(self.folder, number, results, LAYOUT, self.mark)
        entry = read_entry(self.folder, number, self.mark)
        assert entry is not None
        return {
            "number": number, "prompts": SHARD_SIZE, "tokens": 2 * SHARD_SIZE, "entry": entry.model_dump(),
            "began": began, "ended": time.time(), "written_in": time.time() - slept, "process": os.getpid(),
        }  # fmt: skip


def _result(index: int) -> PromptResult:
    V = np.zeros((1, 8), np.float32)
    V[0, index % 8] = 1
    layer = LayerResult(np.ones(1), V, np.ones((2, 1)), 1.0, np.ones(2), 1.0)
    return PromptResult(
        index=index, text=f"prompt {index}", num_tokens=2, token_ids=np.arange(2), log_probs=np.log([0.5, 0.4]),
        layers={"layer": layer},
    )  # fmt: skip
