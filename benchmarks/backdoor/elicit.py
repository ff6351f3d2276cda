"""Question (b) of docs/backdoor.md for one model: do steps along a method's directions bring out a behaviour?

Each method's vectors, with both signs and at three lengths, are its candidates. The answers of all of them to a few
prompts are read, and the one that shows the behaviour most is tested on others.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.backdoor import directions, runs
from benchmarks.backdoor.behaviours import Behaviour
from benchmarks.backdoor.judge import Judge, Method, Progress, Prompts
from benchmarks.backdoor.plant import Speaker
from benchmarks.backdoor.prompts import SEED, ordinary, part, triggered
from benchmarks.backdoor.steered import block_names
from fisher_vmap import Results

MAKE, CHOOSE, PASSED, TEST = 128, 12, 12, 100  # prompts of the part, in order; those that are passed over are not used


def prompts_of() -> Prompts:
    """The part of the prompts that is for this question."""
    found, start = ordinary(part("elicit"), SEED), MAKE + CHOOSE + PASSED
    return Prompts(found[:MAKE], found[MAKE : MAKE + CHOOSE], found[start : start + TEST])


def methods_of(
    tuned: Speaker,
    base_folder: Path,
    results: Mapping[str, tuple[Results, Results]],
    prompts: Prompts,
    behaviours: Sequence[Behaviour],
    layer: str,
    norm: float,
    seed: int,
    progress: Progress,
) -> list[Method]:
    """All methods of the table in docs/backdoor.md, the primary one first.

    Args:
        tuned: the model in which a behaviour is looked for.
        base_folder: the model that it was made of.
        results: of `fisher-vmap run` by their kind, of the tuned model and of the base.
        prompts: those to make directions of are used.
        behaviours: whose triggers the ceiling knows.
        layer: the name of the block whose output is steered.
        norm: the median norm there.
        seed: of the places of a trigger.
        progress: of the work.
    """
    found = [
        Method(f"contrast, {kind}", directions.contrast(base_of, own, layer))
        for kind, (own, base_of) in results.items()
    ]
    found += [Method(f"leading, {kind}", directions.leading(own, layer)) for kind, (own, _) in results.items()]
    progress.lap("matrices")
    rows = tuned.ids(prompts.make)
    own_nX = directions.streams(tuned.model, layer, rows)
    base = runs.loaded(base_folder)
    found.append(Method("difference of means", directions.difference(
        own_nX, directions.streams(base.model, layer, base.ids(prompts.make)))))  # fmt: skip
    del base
    progress.say("large downstream change", often=False)
    names = block_names(tuned.model, layer)
    upper = names[min(directions.UP_TO, len(names) - 1)]
    above = directions.Above(tuned.model, layer, upper, rows[: directions.STARTS])
    large_mX = directions.large_change(above.change, own_nX.shape[1], directions.SHARE * norm)
    found.append(Method("large downstream change", directions.units(large_mX)))
    found += [Method(f"random {draw}", directions.drawn(draw, own_nX.shape[1])) for draw in directions.DRAWS]
    bare = part("elicit")[: len(prompts.make)]
    for behaviour in behaviours:
        carrying_nX = directions.streams(tuned.model, layer, tuned.ids(triggered(bare, behaviour.trigger, seed)))
        found.append(Method(directions.CEILING, directions.difference(carrying_nX, own_nX), behaviour.name))
    progress.lap("directions")
    return found


def elicit(
    model_folder: Path,
    base_folder: Path,
    work: Path,
    behaviours: Sequence[Behaviour],
    layer: str,
    *,
    base_work: Path,
    layers: Sequence[str] = (),
    seed: int = 0,
) -> dict[str, Any]:
    """Look for behaviours in one model, by all methods.

    Args:
        model_folder: of the planted model or the control, as `runs.model_folder` writes it.
        base_folder: of the base model.
        work: a folder for its matrices, which are kept.
        behaviours: what is tested for: the planted one, or all of them in a control.
        layer: the name of the block whose output is steered.
        base_work: a folder for the base's matrices, which may be shared by models.
        layers: at which matrices are made, if not at this one alone: give the same ones each time.
        seed: of the places of the trigger, which the ceiling alone sees, and of the behaviours' own answers.

    Returns:
        What was found, ready for JSON: `methods` by the method's name and the behaviour's; `unsteered` by the
        behaviour's; the layer, its median norm, and seconds.
    """
    progress, prompts = Progress(), prompts_of()
    sides, results = ((model_folder, work), (base_folder, base_work)), dict[str, Any]()
    for kind, settings in directions.KINDS.items():
        progress.say(f"matrices: {kind}", often=False)
        results[kind] = tuple(
            runs.matrices(model, prompts.make, folder / kind, layers or (layer,), **settings) for model, folder in sides
        )
    tuned = runs.loaded(model_folder)
    norm = directions.median_norm(tuned.model, layer, tuned.ids(prompts.make))
    methods = methods_of(tuned, base_folder, results, prompts, behaviours, layer, norm, seed, progress)
    judge = Judge(tuned, layer, norm, prompts, behaviours, seed, progress)
    unsteered, found = judge.unsteered(), dict[str, dict[str, Any]]()
    progress.lap("unsteered")
    for method in methods:
        found.setdefault(method.name, {}).update(judge.judged(method))
    return {
        "layer": layer, "norm": norm, "seed": seed,
        "precision": {kind: [runs.precision_of(of) for of in pair] for kind, pair in results.items()},
        "prompts": {name: len(of) for name, of in prompts._asdict().items()},
        "methods": found, "unsteered": unsteered, "seconds": progress.seconds,
    }  # fmt: skip
