"""`python -m benchmarks.host_waits`: how often a batch would wait for a GPU, and how many operations it launches.

A GPU runs behind the host, which waits for it only where it needs a number: `.item()`, `.tolist()`, a comparison that
decides, a mask used as an index, a copy that is not asynchronous. None of these needs a GPU to be seen. In this count
tensors made for the host, by the literal device "cpu", and all that follows from them are on the host; everything else
counts as on the device. Eigenvalues and singular values wait once each, since torch reads their error codes.
"""

import argparse
import json
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode, resolve_name
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.workloads import small_llama
from fisher_vmap import FisherModel
from fisher_vmap.kernels import attention, autograd
from fisher_vmap.linearize import block
from fisher_vmap.model import head, layout

PACKAGE = "/fisher_vmap/"
READS = {"item", "tolist", "__bool__", "__int__", "__float__", "__index__", "__contains__", "cpu", "numpy"}
DECIDES = {"equal", "nonzero", "argwhere", "masked_select", "unique", "eigh", "eigvalsh", "svd", "svdvals", "allclose"}
ASYNCHRONOUS = {"on_device", "_on_host"}  # the package's functions whose copies do not wait; the second waits once
# Operations that run nothing on a GPU, besides views.
FREE = {"empty", "new_empty", "empty_like", "empty_strided", "_unsafe_view", "promote_types"}


class Waits(NamedTuple):
    """Where the host waits, and how often; and how many operations a GPU would run: neither views nor allocations."""

    places: Counter[tuple[str, str]]
    operations: int

    @property
    def total(self) -> int:
        """All waits."""
        return sum(self.places.values())


def waits_of(call: Callable[[], Any]) -> Waits:
    """Count one call."""
    counted, launched = _Waits(), _Operations()
    with launched, counted:
        call()
    return Waits(counted.places, launched.count)


class _Operations(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += not func.is_view and func.overloadpacket.__name__ not in FREE
        return func(*args, **(kwargs or {}))


class _Waits(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.places: Counter[tuple[str, str]] = Counter()
        self._copied_back = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = (resolve_name(func) or getattr(func, "__name__", "")).rpartition(".")[2]
        given = [x for x in _flat((args, kwargs)) if isinstance(x, Tensor)]
        on_host = all(_on_host(x) for x in given)
        to_host = "cpu" in [x for x in (*args, *kwargs.values()) if isinstance(x, str)]
        if not on_host and (why := self._why(name, args, to_host)):
            self._note(why)
        out = func(*args, **kwargs)
        if not given:
            return _marked(out, to_host) if name != "on_device" else out
        if name == "to" and on_host and not to_host and any(isinstance(x, torch.device) for x in _flat((args, kwargs))):
            self._note("copy to the device")
            return out.view_as(out)  # a copy there, which a CPU does not make
        return _marked(out, on_host or to_host or name == "cpu")

    def _why(self, name: str, args: Any, to_host: bool) -> str | None:
        if name in READS | DECIDES:
            return name
        if name == "to" and to_host:
            return "copy to the host"
        indices = _flat(args[1]) if name in ("__getitem__", "__setitem__") else []
        return "mask as index" if any(isinstance(i, Tensor) and i.dtype == torch.bool for i in indices) else None

    def _note(self, why: str) -> None:
        stack = [frame for frame in traceback.extract_stack() if PACKAGE in frame.filename]
        inside = [frame for frame in stack if "/benchmarks/" not in frame.filename and "/tests/" not in frame.filename]
        named = [frame for frame in inside if not frame.name.startswith("<")]
        if not named:
            return
        if named[-1].name in ASYNCHRONOUS:
            if named[-1].name == "_on_host" and not self._copied_back:
                self._copied_back = True
                self.places["all results, copied together", _place(named[-1])] += 1
            return
        self.places[why, _place(named[-1])] += 1


def _place(frame: traceback.FrameSummary) -> str:
    return f"{frame.filename.rpartition(PACKAGE)[2]} {frame.name}"


def _on_host(x: Tensor) -> bool:
    return getattr(x, "made_for_the_host", False)


def _marked(out: Any, on_host: bool) -> Any:
    if on_host:
        for x in _flat(out):
            if isinstance(x, Tensor):
                x.made_for_the_host = True
    return out


def _flat(x: Any) -> list[Any]:
    if isinstance(x, list | tuple):
        return [each for part in x for each in _flat(part)]
    return [each for part in x.values() for each in _flat(part)] if isinstance(x, dict) else [x]


@contextmanager
def as_on_a_gpu() -> Iterator[None]:
    """Within the context batches are divided as on a GPU: no chunk for a CPU's caches, prompts attend in groups."""
    tables = (
        autograd.ELEMENTS_IN_CACHE,
        block.ROWS_AT_A_TIME,
        layout.ALONE_FROM,
        attention.BLOCK_ELEMENTS,
        head.VOCABULARY_CHUNK_ELEMENTS,
    )
    before = [dict(table) for table in tables]
    try:
        for table in tables:
            table["cpu"] = table.get("cuda")  # type: ignore[assignment]
            if table["cpu"] is None:
                del table["cpu"]
        yield
    finally:
        for table, values in zip(tables, before, strict=True):
            table.update(values)


def batch_waits(blocks: int, prompts: int, estimator: str = "topk", include_rest: bool = False) -> Waits:
    """The waits of one batch, from token ids to arrays, hooked at block 1, after the batches that are audited."""
    network = small_llama(device="cpu", layers=blocks).model
    model = FisherModel(network, layers=1, top_k=10, estimator=estimator, include_rest=include_rest, audit="off")
    ids = torch.randint(0, 512, (prompts, 40), generator=torch.Generator().manual_seed(0)).tolist()
    batch = [row[: 40 - b % 8] for b, row in enumerate(ids)]
    with as_on_a_gpu():
        for _ in range(3):
            model.numbers(batch, 5)
        return waits_of(lambda: model.numbers(batch, 5))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.host_waits", description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    written = []
    for estimator, rest in (("topk", False), ("topk", True), ("full", False)):
        for blocks, prompts in ((4, 8), (12, 8), (12, 32)):
            found = batch_waits(blocks, prompts, estimator, rest)
            what = estimator + " with rest" * rest
            print(
                f"{what:15} {blocks:3} blocks {prompts:3} prompts: {found.total:4} waits, {found.operations} operations"
            )
            written.append(
                {"what": what, "blocks": blocks, "prompts": prompts, "waits": found.total, "ops": found.operations}
            )
        for (why, place), count in found.places.most_common():
            print(f"{count:6}  {why:30} {place}")
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(written, indent=1) + "\n")


if __name__ == "__main__":
    main()
