"""A fit on Ray: workers compute shards and store their own sums, which the driver joins at the end."""

import os
import secrets
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fisher_vmap.data.prompts import PromptSource
from fisher_vmap.errors import UserError, WorkerError
from fisher_vmap.lens.finish import Counted, Summary, finish
from fisher_vmap.lens.fit import fit_shards
from fisher_vmap.lens.flags import LensSettings
from fisher_vmap.lens.opening import Fit, load, open_fit
from fisher_vmap.progress import step
from fisher_vmap.run.bar import Progress
from fisher_vmap.run.open import source_of
from fisher_vmap.run.ray import MOST_FAILED, Bar, Pool, connected, counted, require_ray, seen_from_anywhere
from fisher_vmap.run.ray_worker import MOST_DEATHS, begin_shard, end_shard, forget, times_begun


def _open(settings: LensSettings) -> Fit:
    return open_fit(settings, load(settings), source_of(settings))


def begin(settings: LensSettings) -> None:
    """Open the fit once before there are workers: this checks everything.

    Raises:
        UserError: as `open_fit`.
    """
    forget(_open(settings).folder)


class LensWorker:
    """Computes shards of a fit that `begin` opened, into a part of its own."""

    def __init__(self, settings: LensSettings) -> None:
        self.fit = _open(settings)
        self._part = f"ray-{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}"

    def __call__(self, numbers: list[int]) -> list[dict[str, Any]]:
        """Compute and store the shards of these numbers that are not stored yet; returns an account of each."""
        return [self._compute(number) for number in numbers]

    def _compute(self, number: int) -> dict[str, Any]:
        folder = self.fit.folder
        account: dict[str, Any] = {"number": number, "prompts": 0, "used": 0, "tokens": 0}
        try:
            if (deaths := times_begun(folder, number)) >= MOST_DEATHS:
                raise UserError(f"{deaths} processes have died over it, as they do where memory runs out")
            begin_shard(folder, number)
            for done in fit_shards(self.fit, self._part, lambda _: None, iter([number])):
                account |= {name: getattr(done.shard, name) for name in ("prompts", "used", "tokens")}
        except Exception as error:
            account |= {"error": " ".join(f"{type(error).__name__}: {error}".split()),
                        "user_error": isinstance(error, UserError)}  # fmt: skip
        end_shard(folder, number)
        return account


def fit_on_ray(
    settings: LensSettings, source: PromptSource, bar: Bar, worker: Callable[..., Any] = LensWorker
) -> Summary:
    """Compute the shards that the folder lacks on Ray, and write the lens.

    Raises:
        UserError: as `open_fit`, or Ray cannot be reached.
        WorkerError: shards failed; all others are stored.
    """
    require_ray()
    total = counted(source)
    with connected(Pool.of(settings)) as engine:
        with step("opening the fit on a worker"):
            engine.call(begin, seen_from_anywhere(settings))
        fit = _open(settings.model_copy(update={"overwrite": False}))
        stored, size = fit.parts(), settings.shard_size
        wanted = {n: min(size, total - n * size) for n in range(-(-total // size))}
        missing = [n for n, prompts in wanted.items() if n not in stored or stored[n][1].prompts < prompts]
        arguments = (seen_from_anywhere(settings, overwrite=False),)
        began, used, failed = time.perf_counter(), 0, list[dict[str, Any]]()
        with bar(total, engine.most) as report:
            report(Progress(sum(shard.prompts for _, shard in stored.values()), 0))
            for account in engine.run_items(worker, arguments, missing):
                if "error" in account:
                    failed.append(account)
                    if len(failed) == MOST_FAILED:
                        break
                    continue
                used += account["used"]
                report(Progress(account["prompts"], account["tokens"]))
    if failed:
        first = failed[0]
        line = (
            f"shard {first['number']} failed: {first['error']}; {len(failed)} of {len(missing)} shards failed, the "
            f"others are stored in {Path(settings.output_dir)}; the same command carries on"
        )
        raise UserError(line) if all(one["user_error"] for one in failed) else WorkerError(line)
    before = sum(shard.used for _, shard in stored.values())
    return finish(fit, total, Counted(used, before, time.perf_counter() - began, False))
