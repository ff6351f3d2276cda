"""Where the time of a row goes: the kernels with the most of it, their launches, and the time between them."""

from collections import defaultdict
from functools import partial
from typing import Any, NamedTuple

from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks.cuda.rows import job
from benchmarks.cuda.session import Session
from benchmarks.cuda.shapes import ROWS, SMALL_ROWS, Models, Row
from benchmarks.timing import once

ROWS_PROFILED = 3
KERNELS_TOLD = 20
NAME_LENGTH = 160
# Of cudaDeviceSynchronize two are the measurement's own, before and after the call.
SYNCHRONISATIONS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")
# Operators that ask the device for a number, and so wait for it.
ASKING = ("aten::_local_scalar_dense", "aten::nonzero", "aten::is_nonzero", "aten::equal", "aten::masked_select")


class Kernel(NamedTuple):
    """One kind of kernel: how often it ran, and its time on the device."""

    name: str
    calls: int
    seconds: float
    share: float


def profiles(session: Session) -> None:
    """The most important rows, one call of our whole job each."""
    models = Models(session.device)
    for row in (SMALL_ROWS if session.small else ROWS)[:ROWS_PROFILED]:
        if session.left() <= 0:
            session.leave_out(row.name)
            continue
        session.attempt(row.name, partial(_one_row, session, models, row))
    models.clear()


def _one_row(session: Session, models: Models, row: Row) -> None:
    workload = models[row.model]
    call = job(workload, row, row.batch(workload))
    call()
    wall = min(once(call)[0] for _ in range(3))  # without the profiler, which slows launches
    activities = [ProfilerActivity.CPU]
    if session.device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities) as profiled:
        watched = once(call)[0]
    found = read(profiled.events(), session.device.type, wall)
    entry = {"name": row.name, "seconds": wall, "seconds_while_profiled": watched, **found}
    line = (
        f"{row.name}: {1e3 * wall:.1f} ms, the device idle for {found['idle_share']:.0%}; {found['kernels']} kernels, "
        f"{found['launches']} launches, {sum(found['synchronisations'].values())} synchronisations"
    )
    session.add("profiles", entry, line)
    for kernel in found["top"][:5]:
        session.say(f"    {kernel['share']:6.1%} {kernel['calls']:6} x {kernel['name'][:90]}")


def read(events: Any, device: str, wall: float) -> dict[str, Any]:
    """What a profile says of one call.

    Args:
        events: the profiler's, of the host and of the device.
        device: "cuda", or "cpu", where an operator without others inside stands for a kernel.
        wall: seconds of the call without the profiler.
    """
    if device == "cuda":
        on_device = [event for event in events if event.device_type == DeviceType.CUDA]
        ran = [event for event in on_device if not getattr(event, "is_user_annotation", False)]
    else:
        ran = [event for event in events if event.name.startswith("aten::") and not event.cpu_children]
    by_name: dict[str, list[float]] = defaultdict(list)
    for event in ran:
        by_name[event.name].append((event.time_range.end - event.time_range.start) / 1e6)
    busy = _covered([(event.time_range.start, event.time_range.end) for event in ran]) / 1e6
    total = sum(map(sum, by_name.values()))
    kernels = [
        Kernel(name[:NAME_LENGTH], len(some), sum(some), sum(some) / max(total, 1e-12))
        for name, some in by_name.items()
    ]
    kernels.sort(key=lambda kernel: -kernel.seconds)
    names = [event.name for event in events if event.device_type == DeviceType.CPU]
    return {
        "kernels": len(ran),
        "launches": sum("LaunchKernel" in name or "GraphLaunch" in name for name in names),
        "busy_seconds": busy,
        "idle_share": max(0.0, 1 - busy / wall),
        "synchronisations": {name: names.count(name) for name in SYNCHRONISATIONS if name in names},
        "asked_of_the_device": {name: names.count(name) for name in ASKING if name in names},
        "copies": {name: len(some) for name, some in by_name.items() if name.startswith("Memcpy")},
        "top": [kernel._asdict() for kernel in kernels[:KERNELS_TOLD]],
    }


def _covered(ranges: list[tuple[float, float]]) -> float:
    """The length of what ranges cover together."""
    covered, reached = 0.0, float("-inf")
    for start, end in sorted(ranges):
        covered += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return covered
