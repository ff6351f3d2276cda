"""The driver of a run on Ray: it hands out shard numbers, and records the finished shards in index.json.

The numbers go through `ray.data ... map_batches` on a pool of actors, each of which makes its worker once. Ray restarts
an actor that dies, on another node if necessary, and its shards are computed again.
"""

import importlib.util
import json
import logging
import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

from fisher_vmap.data.prompts import PromptSource
from fisher_vmap.errors import UserError, WorkerError
from fisher_vmap.progress import step
from fisher_vmap.results.index import ShardEntry
from fisher_vmap.results.writer import ResultsWriter, ShardRange
from fisher_vmap.run.bar import Progress
from fisher_vmap.run.compute import Summary, finish
from fisher_vmap.run.ray_worker import ShardWorker, begin
from fisher_vmap.run.settings import Settings

OBJECT_STORE_BYTES = 200 * 2**20  # of a local Ray, which only carries numbers and lines of text
ITEMS_AT_A_TIME = 4  # most items in one call of a worker, so that it can prepare one while it computes another
CALLS_PER_WORKER = 8  # fewer items in a call, if there are not enough for so many calls
CALL_RETRIES = 3  # of a single call whose process died
MOST_FAILED = 10  # shards that may fail before the run stops

_COLOURS = re.compile(r"\x1b\[[0-9;]*m")

log = logging.getLogger(__name__)

Worker = Callable[[list[int]], list[dict[str, Any]]]
"""Takes items and returns a result for each, as JSON can hold it. Each actor makes one."""


class Pool(NamedTuple):
    """Which Ray to use, and the number and size of the workers."""

    address: str | None
    """As `ray.init` takes it; None: start a local Ray."""
    workers: int | tuple[int, int] | Literal["auto"]
    gpus: float | Literal["auto"]
    cpus: int

    @classmethod
    def of(cls, settings: Settings) -> "Pool":
        """Those of the settings."""
        return cls(
            settings.ray_address, settings.ray_workers, settings.ray_gpus_per_worker, settings.ray_cpus_per_worker
        )


def require_ray() -> None:
    """Raise UserError unless Ray is installed; it is not imported."""
    if importlib.util.find_spec("ray") is None:
        raise UserError("engine ray needs the package ray: pip install 'fisher_vmap[ray]'")


class RayEngine:
    """A connection to Ray. Make one with `connected`.

    Attributes:
        gpus: GPUs of each worker.
        cpus: CPU cores of each.
        least: how many workers there are at least.
        most: at most.
    """

    def __init__(self, ray: Any, pool: Pool) -> None:
        self._ray = ray
        there = ray.cluster_resources()
        self.cpus = pool.cpus
        self.gpus = float(there.get("GPU", 0) > 0) if pool.gpus == "auto" else pool.gpus
        room = (
            int(there["GPU"] / self.gpus + 1e-9) if self.gpus and there.get("GPU") else there.get("CPU", 1) // self.cpus
        )
        if isinstance(pool.workers, tuple):
            self.least, self.most = pool.workers
        else:
            self.least = self.most = max(1, int(room)) if pool.workers == "auto" else pool.workers
        self._check_room(pool.address, there)

    def _check_room(self, address: str | None, there: dict[str, float]) -> None:
        """A local Ray never grows, so a worker that does not fit would be waited for forever."""
        wanted = max(1, self.least) * self.gpus
        if self.gpus and wanted > there.get("GPU", 0) + 1e-9:
            asked = f"{self.least} workers with {self.gpus:g} GPUs each were asked for"
            line = f"{asked}, and Ray has {there.get('GPU', 0):g} GPUs"
            if address is None:
                raise UserError(f"{line}; lower ray_workers or ray_gpus_per_worker, or give a ray_address")
            log.warning("%s: waiting for the others", line)

    def call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Call a function once, in its own process on a node with room for a worker; returns its result.

        Raises:
            UserError: the function raised it.
            WorkerError: the function raised anything else, or the process died.
        """
        ray = self._ray
        task = ray.remote(num_cpus=self.cpus, num_gpus=self.gpus, max_calls=1, max_retries=CALL_RETRIES)(function)
        try:
            return ray.get(task.remote(*arguments))
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, UserError):
                raise UserError(str(error.cause)) from error
            raise WorkerError(f"the first worker failed: {_in_a_line(error.cause)}") from error
        except ray.exceptions.RayError as error:
            raise WorkerError(f"the first worker failed: {_in_a_line(error)}") from error

    def run_items(
        self, worker: Callable[..., Worker], arguments: Sequence[Any], items: Sequence[int]
    ) -> Iterator[dict[str, Any]]:
        """The workers' results, in any order.

        Args:
            worker: makes a worker; called once in each actor.
            arguments: of that call.
            items: to compute.

        Raises:
            WorkerError: a worker could not be made, or Ray itself failed. A worker that dies is restarted without
                limit; it must itself refuse an item that killed it before.
        """
        if not items:
            return
        ray = self._ray
        import ray.data as ray_data

        context = ray_data.DataContext.get_current()
        context.enable_progress_bars = False
        context.print_on_execution_start = False
        logging.getLogger("ray.data").setLevel(logging.CRITICAL)
        most = max(1, min(self.most, len(items)))
        at_a_time = max(1, min(ITEMS_AT_A_TIME, len(items) // (most * CALLS_PER_WORKER)))
        results = ray_data.from_items(
            [{"item": item} for item in items], override_num_blocks=-(-len(items) // at_a_time)
        ).map_batches(
            _Actor,
            fn_constructor_args=(worker, tuple(arguments)),
            batch_size=None,
            # One call is computed and one waits; with more, calls would wait while other workers have none.
            compute=ray_data.ActorPoolStrategy(
                # If a node is lost for good, its items go to a new actor, which takes the place of an idle one. So the
                # pool must be allowed to shrink.
                min_size=1,
                initial_size=min(self.least, most),
                max_size=most,
                max_tasks_in_flight_per_actor=2,
            ),
            num_cpus=self.cpus,
            num_gpus=self.gpus or None,
        )
        try:
            for row in results.iter_rows():
                yield json.loads(row["result"])
        except ray.exceptions.RayError as error:
            cause = error.cause if isinstance(error, ray.exceptions.RayTaskError) else error
            if isinstance(cause, UserError):
                raise UserError(str(cause)) from error
            raise WorkerError(f"a worker failed: {_in_a_line(cause)}") from error


@contextmanager
def connected(pool: Pool) -> Iterator[RayEngine]:
    """Within the context, a connection to Ray. A local Ray is started and stopped; an existing connection is kept.

    Raises:
        UserError: no Ray answers at the address, or it cannot be started.
    """
    require_ray()
    if pool.address is not None and pool.address.startswith("ray://"):
        raise UserError(
            f"ray_address {pool.address} is for Ray Client, which Ray Data does not run on; start the run on a node of "
            "the cluster (ray submit, ray job submit), with ray_address auto"
        )
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # no usage reports from a local Ray
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # errors come as exceptions
    if pool.address is None:  # use loopback, Ray's default on Windows and macOS; read when Ray is imported
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    with step("loading Ray"):
        import ray

    ours = not ray.is_initialized()
    if ours:
        options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.CRITICAL}
        try:
            with step("starting Ray" if pool.address is None else "connecting to Ray"):
                if pool.address is None:
                    ray.init(address="local", **options, **_own_ray(pool))
                else:
                    ray.init(address=pool.address, **options)
        except Exception as error:
            # Ray raises exactly `Exception` if its processes take too long to start.
            if type(error) is not Exception and not isinstance(error, ConnectionError | ValueError | RuntimeError):
                raise
            where = "on this machine" if pool.address is None else f"at ray_address {pool.address}"
            raise UserError(
                f"Ray cannot be reached {where} ({_in_a_line(error)[:160]}); start it with `ray start --head`, or "
                "leave ray_address at none"
            ) from error
    try:
        yield RayEngine(ray, pool)
    finally:
        if ours:
            with step("leaving Ray"):
                ray.shutdown()


def _own_ray(pool: Pool) -> dict[str, Any]:
    """Options of a local Ray, which other machines cannot reach."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    workers = 1 if pool.workers == "auto" else pool.workers[0] if isinstance(pool.workers, tuple) else pool.workers
    return {
        "num_cpus": max(cores, workers * pool.cpus),  # the workers that were asked for, even on fewer cores
        "include_dashboard": False,
        "object_store_memory": OBJECT_STORE_BYTES,
    }


class _Actor:
    """A worker for Ray Data. Results are lines of JSON, which every version of Ray Data passes unchanged."""

    def __init__(self, worker: Callable[..., Worker], arguments: tuple[Any, ...]) -> None:
        self._worker = worker(*arguments)

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[str]]:
        return {"result": [json.dumps(result) for result in self._worker(batch["item"].tolist())]}


def _in_a_line(error: BaseException | None) -> str:
    """An error in one line; if Ray's message ends in a traceback, its last line."""
    lines = [line for line in _COLOURS.sub("", str(error)).splitlines() if line.strip()]
    if "creation task" in (lines or [""])[0]:
        return f"it could not be made: {' '.join(lines[-1].split())}"
    return f"{type(error).__name__}: {' '.join((lines or [''])[0].split())}"


Bar = Callable[[int | None, int], AbstractContextManager[Callable[[Progress], None]]]


class Engine(Protocol):
    """What `drive` needs of `RayEngine`."""

    def run_items(
        self, worker: Callable[..., Any], arguments: Sequence[Any], items: Sequence[int]
    ) -> Iterator[dict[str, Any]]:
        """The workers' results, in any order."""
        ...


def counted(source: PromptSource) -> int:
    """How many prompts there are; a stream is read to its end."""
    if source.total is not None:
        return source.total
    with step("counting the prompts"):
        return sum(1 for _ in source)


def run_on_ray(settings: Settings, source: PromptSource, bar: Bar, worker: Callable[..., Any] = ShardWorker) -> Summary:
    """Compute the shards that the results folder lacks on Ray, and finish the folder.

    Args:
        settings: of the run.
        source: its prompts, which are counted here and read by the workers.
        bar: makes the progress bar from the numbers of prompts and of workers.
        worker: makes a worker from the settings and its share of the device.

    Raises:
        UserError: as `open_run`, or Ray cannot be reached.
        WorkerError: shards failed; all others are stored.
    """
    total = counted(source)
    with connected(Pool.of(settings)) as engine:
        share = engine.gpus if 0 < engine.gpus < 1 else 1.0
        with step("opening the run on a worker"):
            engine.call(begin, seen_from_anywhere(settings), share)
        writer = ResultsWriter.attach(settings.output_dir)
        with step("checking what is stored"):
            missing = [shard for shard in writer.missing_shards(total) if shard.start < total]
        log.info("%s", _workers(engine, len(missing)))
        arguments = (seen_from_anywhere(settings, overwrite=False), share)
        with bar(total, engine.most) as report:
            summary = drive(engine, worker, arguments, writer, missing, total, report)
    finish(summary, writer, settings, total)
    return summary


def drive(
    engine: Engine | RayEngine,
    worker: Callable[..., Any],
    arguments: Sequence[Any],
    writer: ResultsWriter,
    missing: Sequence[ShardRange],
    total: int,
    report: Callable[[Progress], None],
) -> Summary:
    """Have the missing shards computed, and record each in the index.

    Raises:
        WorkerError: shards failed; the others are stored, unless `MOST_FAILED` stopped the run.
    """
    began, summary = time.perf_counter(), Summary(prompts=total)
    lacking = {shard.number: shard.stop - shard.start for shard in missing}
    summary.stored_before = total - sum(lacking.values())
    report(Progress(summary.stored_before, 0))
    failed: list[dict[str, Any]] = []
    for account in engine.run_items(worker, arguments, list(lacking)):
        if "error" in account:
            failed.append(account)
            if len(failed) == MOST_FAILED:
                break
            continue
        writer.record([ShardEntry.model_validate(account["entry"])])
        notes = account.get("notes", [])
        if split := sum(name == "splits" for name, _ in notes):
            log.warning("out of memory on %d batches: they were computed in halves", split)
        for name, item in notes:
            writer.note(name, [item])
        summary.tokens += account["tokens"]
        report(Progress(lacking.pop(account["number"], 0), account["tokens"]))
    if failed:
        raise _failure(failed, len(lacking), writer)
    summary.seconds = time.perf_counter() - began
    return summary


def seen_from_anywhere(settings: Settings, **changes: Any) -> Settings:
    """The settings with absolute paths, since a worker has another working folder."""
    names = ("model_path", "adapter_path", "dataset_name")
    here = {name: value for name in names if (value := getattr(settings, name)) is not None and os.path.exists(value)}
    here["output_dir"] = settings.output_dir
    return settings.model_copy(update={name: str(Path(value).absolute()) for name, value in here.items()} | changes)


def _failure(failed: list[dict[str, Any]], lacking: int, writer: ResultsWriter) -> Exception:
    first, size = failed[0], writer.index.shard_size
    others = f", and {len(failed) - 1} more shards failed" if len(failed) > 1 else ""
    where = f"shard {first['number']} (from prompt {first['number'] * size}) failed in {first['worker']}"
    line = (
        f"{where}: {first['error']}{others}; {len(writer.index.shards)} shards are stored in {writer.folder}, "
        f"{lacking} still lacking; the same command carries on"
    )
    return UserError(line) if all(account["user_error"] for account in failed) else WorkerError(line)


def _workers(engine: RayEngine, shards: int) -> str:
    count = f"{engine.most}" if engine.least == engine.most else f"{engine.least} to {engine.most}"
    cpus = f"{engine.cpus} CPU{'' if engine.cpus == 1 else 's'}"
    what = f"{engine.gpus:g} GPU{'' if engine.gpus <= 1 else 's'} and {cpus}" if engine.gpus else cpus
    return f"shards to compute: {shards}, on {count} workers with {what} each"
