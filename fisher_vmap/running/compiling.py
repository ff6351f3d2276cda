"""`compile: auto`: whether a run is long enough to earn the compilation back, and whether it is faster at all."""

import logging
import time
from collections.abc import Callable
from statistics import median

import torch

log = logging.getLogger(__name__)

# Compiling took 6 to 12 s on two CPU cores and made a job 2 to 4% faster (benchmarks/README.md): a run of five minutes
# would just earn it back.
LEAST_SECONDS = 600.0
LEAST_GAIN = 1.01
ROUNDS = 3


def worth_compiling(job: Callable[[bool], object], jobs: float | None, least_seconds: float = LEAST_SECONDS) -> bool:
    """Estimate a run from one small job; if it is long, compile, and time the job with and without by turns.

    Args:
        job: does some of the run's work, compiled or not; it has been done before, not compiled.
        jobs: how many times that work the whole run is; None: unknown, which is taken for long.
        least_seconds: what counts as long.
    """
    seconds = _seconds(job, False)
    if jobs is not None and seconds * jobs < least_seconds:
        log.debug("compile auto: no, the run is estimated at %.0f s, too short to earn it back", seconds * jobs)
        return False
    estimate = "of unknown length" if jobs is None else f"estimated at {seconds * jobs:.0f} s"
    try:
        compiling = _seconds(job, True)
    except ValueError as error:
        log.warning("compile auto: no; %s", error)
        return False
    gains = []
    for turn in range(ROUNDS):
        order = (False, True) if turn % 2 == 0 else (True, False)
        taken = {compiled: _seconds(job, compiled) for compiled in order}
        gains.append(taken[False] / taken[True])
    gain = median(gains)
    wins = gain >= LEAST_GAIN
    log.info(
        "compile auto: %s, for a run %s; compiling took %.0f s, and compiled work is %.2f times as fast",
        "yes" if wins else "no",
        estimate,
        compiling,
        gain,
    )
    return wins


def _seconds(job: Callable[[bool], object], compiled: bool) -> float:
    began = time.perf_counter()
    job(compiled)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began
