"""The Jacobian lens by transformer-lens and by this package: the same matrices, by turns, in one process.

    pip install transformer-lens==4.3.0     # in an environment of its own: it asks for older versions than we do
    python -m benchmarks.peers.jacobian_lens --model FOLDER --layers 0 7 15 22 28 --prompts 2 \
        --json benchmarks/results/jacobian-lens.json

Both get the same token ids, weights (float32) and layers. transformer-lens copies a prompt `dim_batch` times; which of
`BATCHES` is fastest is found from some passes of each, by turns, and that one is measured. Further rows of ours: all
layers from the lowest one up, and the lowest alone. Peak memory is taken in a process of its own, of the first prompt;
there transformer-lens makes three passes, whose memory is that of all.
"""

import argparse
import gc
import importlib.metadata
import json
import statistics
import subprocess
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.peak_memory import added_at_peak
from benchmarks.peers.passages import PASSAGES
from benchmarks.timing import Ratio, machine, once, write_json
from fisher_vmap import FisherModel, load_model
from fisher_vmap.lens.matrices import SKIP_FIRST, prompt_matrices

BATCHES = (1, 2, 4, 8, 16, 32)
PASSES, ROUNDS = 3, 3  # that an estimate is made from
WARM_TOKENS = SKIP_FIRST + 4
AGREE = 1e-3  # of J; float32 rounds differently in the two
OURS, THEIRS = "fisher_vmap", "transformer-lens"
ALL, LOWEST = f"{OURS}, all layers from the lowest up", f"{OURS}, the lowest layer alone"

Matrices = dict[int, Tensor]
"""The number of a block -> J of one prompt, [D, D] float32."""


class _Enough(Exception):
    """As many passes as were asked for."""


class TransformerLens:
    """transformer-lens' estimator on a model folder.

    Args:
        folder: a model in the format of transformers.
    """

    def __init__(self, folder: Path) -> None:
        from transformer_lens.model_bridge import TransformerBridge

        self.model = TransformerBridge.boot_transformers(str(folder), device="cpu", dtype=torch.float32)
        self.model.requires_grad_(False)  # as `JacobianLens.fit` does
        self.width: int = self.model.cfg.d_model

    def ids(self, text: str, tokens: int) -> list[int]:
        """Token ids of a text, at most so many."""
        return self.model.to_tokens(text)[0, :tokens].tolist()

    def matrices(self, ids: Sequence[int], layers: Sequence[int], dim_batch: int, provider: Any = None) -> Matrices:
        """What `JacobianLens.fit` takes of one prompt."""
        from transformer_lens.tools.analysis import jacobian_lens

        return jacobian_lens._jacobian_for_prompt(
            self.model,
            torch.tensor([list(ids)]),
            source_layers=list(layers),
            dim_batch=dim_batch,
            skip_first_positions=SKIP_FIRST,
            backward_provider=provider or jacobian_lens._ordinary_vjp,
        )

    def some_passes(self, ids: Sequence[int], layers: Sequence[int], dim_batch: int) -> list[float]:
        """Seconds of the forward pass, and of each of the first backward passes."""
        from transformer_lens.tools.analysis import jacobian_lens

        seconds: list[float] = []

        def counted(*arguments: Any) -> Any:
            taken, gradients = once(lambda: jacobian_lens._ordinary_vjp(*arguments))
            seconds.append(taken)
            if len(seconds) == PASSES:
                raise _Enough
            return gradients

        def until_enough() -> None:
            try:
                self.matrices(ids, layers, dim_batch, counted)
            except _Enough:
                return

        whole, _ = once(until_enough)
        return [whole - sum(seconds), *seconds]

    def estimates(self, ids: Sequence[int], layers: Sequence[int]) -> dict[int, float]:
        """The seconds that a whole prompt would take with each of `BATCHES`, if no pass were disturbed.

        The sizes take turns, and the fastest pass of each counts: a busy moment must not choose a slower size.
        """
        forward, passes = dict.fromkeys(BATCHES, float("inf")), dict.fromkeys(BATCHES, float("inf"))
        for number in range(ROUNDS):
            for size in BATCHES[:: 1 if number % 2 == 0 else -1]:
                gc.collect()
                first, *others = self.some_passes(ids, layers, size)
                forward[size], passes[size] = min(first, forward[size]), min(*others, passes[size])
        return {size: forward[size] + passes[size] * -(-self.width // size) for size in BATCHES}


class Ours:
    """This package on the same folder.

    Args:
        folder: a model in the format of transformers.
    """

    def __init__(self, folder: Path) -> None:
        self.model = load_model(str(folder), dtype="float32", device="cpu").model
        self.blocks = int(self.model.config.num_hidden_layers)

    def matrices(self, ids: Sequence[int], layers: Sequence[int]) -> Matrices:
        """The matrices of one prompt, and the output metric, which belongs to a fit of ours."""
        fisher = FisherModel(self.model, layers=list(layers), precision="float32")
        (found,) = prompt_matrices(fisher, [list(ids)])
        return {number: found.jacobians[name].float() for number, name in zip(layers, fisher.layers, strict=True)}


def distances(found: Matrices, expected: Matrices) -> dict[int, float]:
    """For each layer |J - J'| / |J'| in the Frobenius norm."""
    return {layer: float((found[layer] - J).norm() / J.norm()) for layer, J in expected.items()}


def by_turns(calls: dict[str, Callable[[Sequence[int]], Matrices]], prompts: Sequence[list[int]]) -> dict[str, Any]:
    """Seconds of every row on each prompt, and each prompt's distances; the order turns round from one to the next."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    apart: list[dict[int, float]] = []
    for number, ids in enumerate(prompts):
        outputs: dict[str, Matrices] = {}
        for name in list(calls)[:: 1 if number % 2 == 0 else -1]:
            gc.collect()
            taken, outputs[name] = once(lambda name=name, ids=ids: calls[name](ids))
            seconds[name].append(taken)
            print(f"prompt {number}, {len(ids)} tokens: {taken:8.2f} s  {name}", flush=True)
        apart.append(distances(outputs[OURS], outputs[THEIRS]))
        for name in (ALL, LOWEST):
            shared = {layer: J for layer, J in outputs[OURS].items() if layer in outputs[name]}
            for layer, found in distances(outputs[name], shared).items():
                assert found <= AGREE, f"layer {layer}: {name} is {found:.1e} from {OURS}; expected at most {AGREE:.0e}"
    worst = {layer: max(found[layer] for found in apart) for layer in apart[0]}
    for layer, found in worst.items():
        assert found <= AGREE, f"layer {layer}: {found:.1e} from {THEIRS}; expected at most {AGREE:.0e}"
    return {"seconds": seconds, "distance": worst}


def bytes_added(row: str, folder: Path, ids: list[int], layers: Sequence[int], dim_batch: int) -> int:
    """Bytes that one prompt adds at its highest to a process that has done the same on a few tokens."""
    if row == THEIRS:
        theirs = TransformerLens(folder)

        def call(ids: list[int]) -> Any:
            return theirs.some_passes(ids, layers, dim_batch)
    else:
        ours = Ours(folder)

        def call(ids: list[int]) -> Any:
            return ours.matrices(ids, layers)

    call(ids[:WARM_TOKENS])
    return added_at_peak(lambda: call(ids), torch.device("cpu"))


def in_fresh_process(row: str, folder: Path, ids: list[int], layers: Sequence[int], dim_batch: int) -> int:
    """`bytes_added` in a child process.

    Raises:
        RuntimeError: the child failed; with the end of its error output.
    """
    asked = {"row": row, "folder": str(folder), "ids": ids, "layers": list(layers), "dim_batch": dim_batch}
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.peers.jacobian_lens", "--threads", str(torch.get_num_threads()), "--memory"],
        cwd=Path(__file__).parents[2],
        input=json.dumps(asked),
        capture_output=True,
        text=True,
    )
    if done.returncode != 0:
        raise RuntimeError(f"the child process for {row} failed: {done.stderr[-500:]}")
    return int(done.stdout.splitlines()[-1])


def time_rows(folder: Path, layers: Sequence[int], prompts: int, tokens: int) -> tuple[list[list[int]], dict[str, Any]]:
    """The prompts' token ids, and the times and distances of all rows as a part of the record."""
    theirs, ours = TransformerLens(folder), Ours(folder)
    batch = [theirs.ids(text, tokens) for text in PASSAGES[:prompts]]
    above = list(range(layers[0], ours.blocks - 1))
    print(f"{folder.name}, layers {list(layers)}, prompts of {[len(ids) for ids in batch]} tokens, float32", flush=True)
    few = batch[0][:WARM_TOKENS]
    theirs.some_passes(few, layers, BATCHES[0])
    ours.matrices(few, layers)
    estimates = theirs.estimates(batch[0], layers)
    dim_batch = min(estimates, key=lambda size: estimates[size])
    told = ", ".join(f"{size}: {seconds:.1f} s" for size, seconds in estimates.items())
    print(f"{THEIRS} by dim_batch, estimated: {told}; taken: {dim_batch}", flush=True)
    found = by_turns(
        {
            THEIRS: lambda ids: theirs.matrices(ids, layers, dim_batch),
            OURS: lambda ids: ours.matrices(ids, layers),
            ALL: lambda ids: ours.matrices(ids, above),
            LOWEST: lambda ids: ours.matrices(ids, layers[:1]),
        },
        batch,
    )
    return batch, {"all_layers": above, "dim_batch": dim_batch, "dim_batch_estimates_s": estimates, **found}


def measure(folder: Path, layers: Sequence[int], prompts: int, tokens: int) -> dict[str, Any]:
    """All numbers of the comparison, as a record; they are printed on the way."""
    batch, found = time_rows(folder, layers, prompts, tokens)
    gc.collect()  # both models, before the children load theirs
    seconds = found["seconds"]
    ratios = {
        "theirs over ours": Ratio.of(seconds[THEIRS], seconds[OURS]),
        "all layers over the lowest alone": Ratio.of(seconds[ALL], seconds[LOWEST]),
    }
    added = {row: in_fresh_process(row, folder, batch[0], layers, found["dim_batch"]) for row in (THEIRS, OURS)}
    for row, times in seconds.items():
        memory = f", {added[row] / 1e6:.0f} MB added at the peak" if row in added else ""
        print(f"{row}: {statistics.median(times):.2f} s a prompt (median){memory}")
    for name, ratio in ratios.items():
        print(f"{name}: {ratio}")
    print("distance of J by layer: " + ", ".join(f"{layer}: {x:.1e}" for layer, x in found["distance"].items()))
    return {
        "model": folder.name,
        "layers": list(layers),
        "tokens": [len(ids) for ids in batch],
        "skip_first": SKIP_FIRST,
        **found,
        **{name.replace(" ", "_"): ratio._asdict() for name, ratio in ratios.items()},
        "bytes_added_at_peak": added,
    }


def _parser() -> argparse.ArgumentParser:
    about = __doc__ or ""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers.jacobian_lens", description=about.splitlines()[0])
    parser.add_argument("--model", type=Path, help="a folder in the format of transformers")
    parser.add_argument("--layers", type=int, nargs="+", default=[0, 7, 15, 22, 28], help="numbers of blocks, from 0")
    parser.add_argument("--prompts", type=int, choices=range(1, len(PASSAGES) + 1), default=2, metavar="N")
    parser.add_argument("--tokens", type=int, default=128, help="of each prompt, at most")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json", type=Path)
    parser.add_argument(
        "--memory", action="store_true", help="print one row's peak memory, asked for on standard input"
    )
    return parser


def main() -> None:
    parser = _parser()
    args = parser.parse_args()
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.memory:
        asked = json.load(sys.stdin)
        print(bytes_added(**asked | {"folder": Path(asked["folder"])}))
        return
    if args.model is None:
        parser.error("--model is missing; expected the folder of a model")
    versions = {name: importlib.metadata.version(name) for name in (OURS, THEIRS)}
    print(", ".join(f"{name} {version}" for name, version in versions.items()), flush=True)
    folder = args.model.resolve()  # the children run in the repository's root
    measured = measure(folder, sorted(set(args.layers)), args.prompts, args.tokens)
    write_json(args.json, {"machine": machine(), "versions": versions, **measured})


if __name__ == "__main__":
    main()
