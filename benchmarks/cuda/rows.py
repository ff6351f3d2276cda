"""A row: the loops and the package by turns, the floor of this device's own products, memory, and whether all agree."""

from collections import Counter
from collections.abc import Callable
from functools import partial
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from benchmarks.agreement import agreement
from benchmarks.baselines import Loop, careful_pipeline, plain_loop, plain_pipeline
from benchmarks.cuda.session import Session, free
from benchmarks.cuda.shapes import ROWS, SMALL_ROWS, Models, Row
from benchmarks.package_job import package_loop, package_pipeline
from benchmarks.peak_memory import added_at_peak
from benchmarks.roofline import Buffers
from benchmarks.timing import Timed, by_turns, once
from benchmarks.workloads import Batch, Workload
from fisher_vmap import compress, fisher_full
from fisher_vmap.decomposition import LowRank
from fisher_vmap.estimators import EstimatorOptions
from fisher_vmap.model.layers import decoder_blocks
from fisher_vmap.run.plan_model import Product, Skeleton, Work, batch_memory, unavoidable, work_of_full

MOST_ROUNDS, SMALL_ROUNDS = 5, 2
MOST_SECONDS = 30.0  # of a row's rounds
CHECKED_TOKENS = 2048  # of the first prompts, which are computed once more in float32
FULL = EstimatorOptions(estimator="full")  # the defaults of `fisher_full`

# What is timed of each estimator against ours; the floor is that of the scores, without the decomposition.
RATIOS = {
    "topk": (
        ("plain", "ours"),
        ("plain scores", "scores"),
        ("careful", "ours"),
        ("scores", "floor"),
        ("ours", "scores"),
    ),
    "full": (("ours", "topk"), ("ours", "floor")),
}


def claims(session: Session) -> None:
    """All rows that there is time for, in order of importance."""
    models = Models(session.device)
    for row in SMALL_ROWS if session.small else ROWS:
        if session.left() <= 0:
            session.leave_out(row.name)
            continue
        session.attempt(row.name, partial(measure, session, models, row))
    models.clear()


def work_of(row: Row) -> Work:
    """How many vectors go through the blocks, as `--plan` counts them."""
    if row.estimator == "topk":
        return Work(row.top_k)
    return work_of_full(row.top_k + FULL.oversampling, FULL.passes, FULL.samples)


def job(workload: Workload, row: Row, batch: Batch) -> Callable[[], Any]:
    """The row's whole job by the package, from token ids to a matrix of rank K for each prompt."""
    layer = workload.layer(row.hook(workload.blocks))
    if row.estimator == "topk":
        return partial(package_pipeline, workload.model, batch, layer, row.top_k, row.top_k, positions=row.positions)

    def full() -> LowRank:
        found = fisher_full(workload.model, *batch, layers=layer, rank=row.top_k, positions=row.positions)
        return compress(found.factors[layer], row.top_k)

    return full


def measure(session: Session, models: Models, row: Row) -> None:
    """One row, added to the record."""
    workload = models[row.model]
    batch, hook = row.batch(workload), row.hook(workload.blocks)
    functions, flops = _functions(workload, row, batch)
    limit = min(MOST_SECONDS, session.left())
    seconds, memory = _warmed(session, row, functions, limit)
    most = SMALL_ROUNDS if session.small else MOST_ROUNDS
    rounds = max(1, min(most, int(limit / max(sum(seconds.values()), 1e-9))))
    timed = by_turns({name: functions[name] for name in seconds}, rounds, warmup=0)
    ratios = {f"{a} / {b}": timed.ratio(a, b) for a, b in RATIOS[row.estimator] if a in seconds and b in seconds}
    expected = batch_memory(
        Skeleton(
            workload.model,
            None,
            decoder_blocks(workload.model),
            {workload.layer(hook): workload.model.config.hidden_size},
            [hook],
            False,
        ),
        batch.lengths,
        work_of(row).shared,
        workload.model.dtype.itemsize,
        session.device,
    )
    entry = {
        "name": row.name,
        **row._asdict(),
        "dtype": str(workload.model.dtype),
        "precision": workload.precision.stored(),
        "layer": workload.layer(hook),
        "batch": batch.describe(),
        "seconds": timed.seconds,
        "ratios": {what: ratio._asdict() for what, ratio in ratios.items()},
        "flops": flops,
        "bytes": memory,
        "planned_bytes": {"total": expected.total, **expected.parts},
    }
    line = _line(row, timed, ratios, memory, expected.total)
    functions.clear()  # with the floor's operands: a float32 copy of the model needs the room
    try:
        entry["agreement"] = _agree(workload, row, batch, timed.outputs)
    except Exception as error:  # the times are kept; that the results differ, or were not compared, is told
        session.failed(f"{row.name}: agreement", error)
        line += "; NOT SEEN TO AGREE"
    session.add("rows", entry, line)


def _functions(workload: Workload, row: Row, batch: Batch) -> tuple[dict[str, Callable[[], Any]], int | None]:
    """What is timed by turns, and the operations of the floor."""
    model, layer, where = workload.model, workload.layer(row.hook(workload.blocks)), row.where(batch)
    functions: dict[str, Callable[[], Any]] = {"ours": job(workload, row, batch)}
    if row.estimator == "full":
        functions["topk"] = job(workload, row._replace(estimator="topk"), batch)
    else:
        functions["scores"] = partial(package_loop, model, batch, layer, row.top_k, positions=row.positions)
        functions["careful"] = partial(careful_pipeline, model, *batch, layer, row.top_k, row.top_k, where)
    if row.plain:
        functions["plain scores"] = partial(plain_loop, model, *batch, layer, row.top_k)
    if row.plain == "whole":
        functions["plain"] = partial(plain_pipeline, model, *batch, layer, row.top_k, row.top_k)
    if row.positions == "last":
        return functions, None  # what a bias at the last position cannot avoid is less, and is not counted
    functions["floor"], flops = _floor(workload, row, batch)
    return functions, flops


def _floor(workload: Workload, row: Row, batch: Batch) -> tuple[Callable[[], Any], int]:
    """The products that the job cannot avoid, one after another.

    Prompts count with their mean length, and each kind of attention's products runs for all of them in one call: a
    GPU's floor must not consist of launches.
    """
    model, B = workload.model, len(batch.input_ids)
    lengths = [max(1, round(sum(batch.lengths) / B))] * B
    blocks = list(decoder_blocks(model).values())
    products = together(unavoidable(model, blocks, lengths, [row.hook(workload.blocks)], work_of(row)))
    flops = sum(product.shape.flops for product in products)
    calls: list[Callable[[], Tensor]] = []

    def run() -> None:
        if not calls:  # the operands are made when the floor is first asked for, after the others' memory was seen
            buffers = Buffers([product.shape for product in products], model.dtype, model.device)
            calls.extend(buffers.call(product.shape, product.weight) for product in products)
        with torch.no_grad():
            for call in calls:
                call()

    return run, flops


def together(products: list[Product]) -> list[Product]:
    """The same products with neighbouring ones of activations, if equal, as one batch."""
    found: list[Product] = []
    for of_activations, some in groupby(products, lambda product: product.weight is None):
        if not of_activations:
            found += some
            continue
        for (kind, shape), count in Counter((product.kind, product.shape) for product in some).items():
            found.append(Product(kind, shape._replace(batch=count * shape.batch), None))
    return found


def _warmed(
    session: Session, row: Row, functions: dict[str, Callable[[], Any]], limit: float
) -> tuple[dict[str, float], dict[str, int]]:
    """Seconds of a warm call of each function that works and has time, and the bytes that it adds at its peak."""
    seconds: dict[str, float] = {}
    memory: dict[str, int] = {}
    for name, function in functions.items():
        if name.startswith("plain") and seconds.get("careful", limit) * row.prompts > limit:
            session.leave_out(f"{row.name}: {name}")
            continue
        try:
            if not name.startswith("plain"):
                function()
            seconds[name], memory[name] = once(partial(added_at_peak, function, session.device))
        except Exception as error:  # the others are measured without it
            session.failed(f"{row.name}: {name}", error)
            seconds.pop(name, None)
        free(session.device)
    return seconds, memory


def _agree(workload: Workload, row: Row, batch: Batch, outputs: dict[str, Any]) -> dict[str, Any]:
    """The distances of the first prompts' results.

    Raises:
        AssertionError: they differ by more than the budget of the model's dtype.
    """
    if row.estimator == "full":
        # The Fisher matrix of all tokens is at least that of the likeliest: so is its largest eigenvalue.
        leading, likeliest = outputs["ours"].singular_values[:, 0], outputs["topk"].singular_values[:, 0]
        share = float((leading / likeliest).min())
        assert share >= 0.9, f"the largest singular value of the whole vocabulary is {share:.2f} of the top k's"
        return {"largest singular value, full / topk, least": share}
    checked = max(1, min(len(batch.input_ids), CHECKED_TOKENS // max(batch.lengths)))
    first = {
        name: Loop(*(field[:checked] for field in (output if isinstance(output, Loop) else output.scores)))
        for name, output in outputs.items()
        if name != "floor"
    }
    careful, where = first.pop("careful"), row.where(batch)
    assert {"ours", "scores"} <= first.keys(), "there is no result of ours to compare"
    few = Batch(*(field[:checked] for field in batch))
    layer = workload.layer(row.hook(workload.blocks))
    found = agreement(workload.model, few, layer, first, careful, None if where is None else where[:checked])
    values, expected = (outputs[name].singular_values[:checked].sum(1) for name in ("ours", "careful"))
    allowed = 1e-2 if workload.model.dtype == torch.float32 else 0.15
    distance = float(((values - expected).abs() / expected).median())
    assert distance <= allowed, f"the median trace of F differs by {distance:.2g}; expected at most {allowed:g}"
    return {"prompts": checked, **found, "median_distance_of_traces": distance}


def _line(row: Row, timed: Timed, ratios: dict[str, Any], memory: dict[str, int], expected: int) -> str:
    parts = [f"{what} {ratio.median:.2f}" for what, ratio in ratios.items()]
    parts += [f"{name} {min(some):.4f} s" for name, some in timed.seconds.items()]
    held = ", ".join(
        f"{name} {memory[name] / 1e9:.3f}" for name in memory if name in ("ours", "careful", "plain", "topk")
    )
    return f"{row.name}: {'; '.join(parts)}; GB at the peak: {held} (planned {expected / 1e9:.3f})"
