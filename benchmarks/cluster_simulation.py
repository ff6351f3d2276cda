"""What the driver of engine ray costs a shard: many workers that sleep as long as a shard takes, on this machine.

Driver, engine, results folder and index are the real ones; a worker sleeps instead of computing, and stores a shard of
a few hundred bytes. The sleep is the measured time of a real shard, divided by `--scale`: everything that the driver
does for a shard comes so much more often, and a driver that keeps up here has that much to spare. All workers are
processes of one machine, so that its cores start them one after the other: what counts is from when all are there.
"""

import argparse
import json
import os
import resource
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil

from benchmarks.sleeping_worker import LAYOUT, SHARD_SIZE, SleepingWorker
from benchmarks.timing import machine
from fisher_vmap.results.index import read_index_file
from fisher_vmap.results.writer import ResultsWriter
from fisher_vmap.run.ray import Pool, RayEngine, connected, drive

MEASURED_S = 8.4  # a shard of 32 of the demo's prompts on two CPU cores: 3.8 prompts a second


class Watched:
    """The engine, with an eye on each account that comes back, and on this process when it comes."""

    def __init__(self, engine: RayEngine) -> None:
        self.engine = engine
        self.accounts: list[dict[str, Any]] = []
        self.cpu: list[float] = []
        self.memory: list[int] = []

    def run_items(self, worker: Any, arguments: Sequence[Any], items: Sequence[int]) -> Iterator[dict[str, Any]]:
        me = psutil.Process()
        for account in self.engine.run_items(worker, arguments, items):
            self.accounts.append(account | {"came": time.time()})
            self.cpu.append(time.process_time())
            if len(self.accounts) % 100 == 0:
                self.memory.append(me.memory_info().rss)
            yield account


def simulate(workers: int, shards: int, seconds: float) -> dict[str, Any]:
    """Run the driver over so many shards; what it cost."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch, "results")
        writer = ResultsWriter.open(folder, layout=LAYOUT, shard_size=SHARD_SIZE, fingerprint={}, resolved={})
        total = shards * SHARD_SIZE
        missing = writer.missing_shards(total)
        began = time.time()
        with connected(Pool(None, workers, 0.0, 1)) as engine:
            watched = Watched(engine)
            before = psutil.Process().memory_info().rss
            helpers = _helpers()
            helpers_before = sum(_cpu(process) for process in helpers)
            arguments = (str(folder), writer.index.mark, seconds)
            drive(watched, SleepingWorker, arguments, writer, missing, total, lambda step: None)  # type: ignore[arg-type]
            helpers_cpu = sum(_cpu(process) for process in helpers) - helpers_before
        ended = time.time()
        assert read_index_file(folder).missing(total) == [] or len(writer.index.shards) == shards
        recorded = _recording_alone(folder, writer)
        index_bytes = (folder / "index.json").stat().st_size
    return _summary(watched, workers, shards, seconds) | {
        "seconds_in_all": ended - began,
        "memory_before_mb": before / 1e6,
        "memory_of_the_driver_mb": [
            round(size / 1e6, 1) for size in watched.memory[:: max(1, len(watched.memory) // 10)]
        ],
        "peak_memory_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3,
        "memory_a_shard_kb": (watched.memory[-1] - watched.memory[len(watched.memory) // 4]) / (0.75 * shards) / 1e3,
        "cpu_of_gcs_and_raylet_ms_a_shard": 1000 * helpers_cpu / shards,
        "recording_ms_a_shard": 1000 * recorded / shards,
        "index_bytes_a_shard": index_bytes / shards,
    }


def _summary(watched: Watched, workers: int, shards: int, seconds: float) -> dict[str, Any]:
    """From when all workers are at it until the first has nothing to do any more."""
    accounts = watched.accounts
    first: dict[int, float] = {}
    last: dict[int, float] = {}
    for account in accounts:
        first[account["process"]] = min(first.get(account["process"], 1e18), account["began"])
        last[account["process"]] = max(last.get(account["process"], 0.0), account["ended"])
    start, stop = max(first.values()), min(last.values())
    inside = [i for i, account in enumerate(accounts) if start <= account["came"] <= stop]
    rate = len(inside) / (accounts[inside[-1]]["came"] - accounts[inside[0]]["came"])
    cpu = (watched.cpu[inside[-1]] - watched.cpu[inside[0]]) / len(inside)
    busy = sum(
        min(a["ended"], stop) - max(a["began"], start) for a in accounts if a["ended"] > start and a["began"] < stop
    )
    delays = sorted(accounts[i]["came"] - accounts[i]["ended"] for i in inside)
    return {
        "workers": workers,
        "workers_seen": len(first),
        "shards": shards,
        "sleep_s": seconds,
        "shards_counted": len(inside),
        "shards_a_second": rate,
        "ideal_shards_a_second": workers / seconds,
        "time_of_the_workers_at_work": busy / (len(first) * (stop - start)),
        "driver_cpu_ms_a_shard": 1000 * cpu,
        "most_shards_a_second_of_one_driver": 1 / cpu,
        "writing_ms_a_shard": 1000 * sum(a["written_in"] for a in accounts) / len(accounts),
        "median_delay_s": delays[len(delays) // 2],
    }


def _recording_alone(folder: Path, writer: ResultsWriter) -> float:
    """Seconds that the index takes for all shards, once more and with nothing else going on."""
    entries = writer.index.shards
    again = ResultsWriter(folder, writer.index.model_copy(update={"shards": ()}))
    (folder / "index.json").unlink()
    from fisher_vmap.results.index import write_index

    write_index(folder, again.index)
    began = time.perf_counter()
    for entry in entries:
        again.record([entry])
    return time.perf_counter() - began


def _helpers() -> list[psutil.Process]:
    names = ("gcs_server", "raylet")
    return [p for p in psutil.Process().children(recursive=True) if any(name in p.name() for name in names)]


def _cpu(process: psutil.Process) -> float:
    try:
        times = process.cpu_times()
    except psutil.Error:
        return 0.0
    return times.user + times.system


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.cluster_simulation", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--workers", type=int, default=64)
    parser.add_argument("--shards", type=int, default=10_000)
    parser.add_argument("--scale", type=float, default=8.0, help="how much shorter the sleep is than a real shard")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    # The workers import this folder's modules.
    os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    record = simulate(args.workers, args.shards, MEASURED_S / args.scale) | {
        "measured_s": MEASURED_S,
        "scale": args.scale,
    }
    print(json.dumps(record, indent=1))
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps({"machine": machine(), "cluster_simulation": record}, indent=1) + "\n")


if __name__ == "__main__":
    main()
