"""What the table says of each peer: its file, its package, what it needed to run at all, and what it cannot do."""

import importlib
import importlib.metadata
import re
from pathlib import Path
from types import ModuleType
from typing import NamedTuple


class Peer(NamedTuple):
    """One way to the matrix.

    Attributes:
        name: as the table has it.
        module: its file in this folder.
        package: the distribution whose version is stated.
        needed: what a causal LM of transformers needed before it ran.
        cannot: what it cannot do.
    """

    name: str
    module: str
    package: str
    needed: str
    cannot: str

    def load(self) -> ModuleType:
        """Its module; ImportError where its package is not installed."""
        return importlib.import_module(f"benchmarks.peers.{self.module}")

    def version(self) -> str:
        """The version of its package."""
        return importlib.metadata.version(self.package)

    def lines(self, job: str) -> int:
        """Lines that a user has to write for a job: between the markers `begin: both` or `begin: JOB` and `end`.

        Empty lines, comments and the one-line docstrings do not count, imports stand outside the markers.
        """
        text = Path(__file__).with_name(f"{self.module}.py").read_text(encoding="utf-8")
        parts = re.findall(rf"^# begin: (?:both|{job})\n(.*?)^# end$", text, re.MULTILINE | re.DOTALL)
        lines = [line.strip() for part in parts for line in part.splitlines()]
        return sum(1 for line in lines if line and not line.startswith(("#", '"""')))


PEERS = {
    "ours": Peer("fisher_vmap", "ours", "fisher_vmap", "nothing", "weights' Fisher matrices, anything but a bias"),
    "loop": Peer(
        "autograd loop",
        "autograd_loop",
        "torch",
        "a hook; the last rows taken before the unembedding",
        "the whole vocabulary in less than V backward passes",
    ),
    "batched": Peer(
        "grad(is_grads_batched)",
        "batched_grad",
        "torch",
        "as the loop; eager attention, or fused attention's backward is looped over, with a warning",
        "as the loop; memory grows with the chunk",
    ),
    "jacrev": Peer(
        "torch.func.jacrev",
        "jacrev",
        "torch",
        "as the loop, with the hook set inside the function; eager attention, for the same reason",
        "as the loop; memory grows with the chunk",
    ),
    "nngeometry": Peer(
        "nngeometry",
        "nngeometry_fisher",
        "nngeometry",
        "the bias as the weight of a Linear(1, D) fed with a one: it knows layers, not parameters, and float inputs",
        "a matrix a prompt in one batch (it averages); a vocabulary of 49,152 (a V x V matrix, V - 1 passes a prompt)",
    ),
    "curvlinops": Peer(
        "curvlinops",
        "curvlinops_ggn",
        "curvlinops-for-pytorch",
        "a module with the bias as its parameter; eager attention (fused attention has no forward derivative)",
        "a matrix a prompt in one batch (it averages); the scores of tokens",
    ),
}
