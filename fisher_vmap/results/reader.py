"""Reading a results folder: prompts by index, stacks, the table, and means. Numpy only; nothing here needs torch.

Which of a folder's layers is meant, by its name or by its block's number.

Prompts across shards, all of them or a group: their stack, and the length of their residual stream.
"""

import operator
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, SupportsIndex, overload

import numpy as np
import pyarrow as pa

from fisher_vmap import algebra
from fisher_vmap.errors import UserError
from fisher_vmap.results.files import check_sha256
from fisher_vmap.results.index import Index, read_index, sum_name
from fisher_vmap.results.mean import add_shards
from fisher_vmap.results.outputs import mean_of, metadata_of, table_of
from fisher_vmap.results.record import PromptRecord
from fisher_vmap.results.shard_reader import (
    Chooser,
    Float32,
    OpenShards,
    ShardReader,
    Stack,
    Where,
    chooser,
    others,
    readers,
    why_nobody,
)
from fisher_vmap.results.table import ShardLayout, several

if TYPE_CHECKING:
    import pandas as pd


def layer_named(wanted: str | SupportsIndex, layers: Sequence[str], folder: Path) -> str:
    """The name of a stored layer.

    Args:
        wanted: a name; or a block's number, as digits too: that of the layer whose name ends in it ("model.layers.15").
        layers: the names that are stored.
        folder: where.

    Raises:
        UserError: no such layer, several, or a number from the top, which only the model knows.
    """
    if isinstance(wanted, str) and wanted in layers:
        return wanted
    there = f"there is {several(layers)}"
    number = _number(wanted)
    if number is None:
        raise UserError(f"{wanted!r:.80} was not hooked in {folder}; {there}")
    if number < 0:
        raise UserError(f"layer {number} counts from the model's top, which a results folder does not know; {there}")
    found = [layer for layer in layers if layer.rpartition(".")[2] == str(number)]
    if len(found) > 1:
        raise UserError(f"layer {number} may be {' or '.join(found)}; give the name")
    if not found:
        raise UserError(f"layer {number} was not hooked in {folder}; {there}")
    return found[0]


def _number(wanted: object) -> int | None:
    try:
        return int(wanted) if isinstance(wanted, str) else operator.index(wanted)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return None


def stack_of_all(readers: Iterable[ShardReader], layer: str, layout: ShardLayout, prompts: int) -> Stack:
    """All prompts at one layer, in order, read shard by shard into their places: they are never there twice."""
    stack, start = _empty_stack(layer, layout, prompts), 0
    for reader in readers:
        part = reader.stack(layer)
        for whole, piece in zip(stack, part, strict=True):
            whole[start : start + len(piece)] = piece
        start += len(part.S)
    return stack


def stack_of_chosen(readers: Iterable[ShardReader], layer: str, layout: ShardLayout, chosen: Chooser) -> Stack:
    """The chosen prompts at one layer, in order; shards without any are not read."""
    parts = [_empty_stack(layer, layout, 0)]
    for reader in readers:
        mask = chosen(reader)
        if mask.any():
            parts.append(Stack(*(piece[mask] for piece in reader.stack(layer))))
    return Stack(*(np.concatenate(pieces) for pieces in zip(*parts, strict=True)))


def _empty_stack(layer: str, layout: ShardLayout, prompts: int) -> Stack:
    K, R, D = layout.outcomes, layout.rank, layout.widths[layer]
    return Stack(*(np.empty((prompts, *shape), np.float32) for shape in ((R,), (R, D), (K, R))))


def mean_residual_norm(readers: Iterable[ShardReader], layer: str, chosen: Chooser) -> float:
    """The mean over the chosen prompts of the residual stream's mean norm, from the table; NaN without prompts."""
    norms: list[float] = []
    for reader in readers:
        columns = (reader.table.column(f"{layer}/{name}").to_pylist() for name in ("trace", "trace_norm2"))
        for trace, trace_norm2, wanted in zip(*columns, chosen(reader), strict=True):
            if wanted and trace:
                norms.append((trace_norm2 / trace) ** 0.5)
    return float(np.mean(norms)) if norms else float("nan")


Check = Literal["sizes", "full", "none"]
Layer = str | SupportsIndex


def open_results(
    folder: str | os.PathLike[str], *, check: Check = "sizes", allow_incomplete: bool = False
) -> "Results":
    """Open a results folder for reading.

    Args:
        folder: what `--output_dir` was, or "hf://datasets/OWNER/NAME@REVISION": fetched from the hub into its cache.
        check: "sizes" looks at the size of every shard now, and at the checksum of everything that is read later,
            single prompts too; "full" compares the SHA-256 of every file now; "none" trusts the folder.
        allow_incomplete: open what there is of an unfinished run.

    Raises:
        UserError: no results folder, an unfinished one, or a damaged one; the line names the shard.
    """
    if check not in ("sizes", "full", "none"):
        raise UserError(f"check is {check!r}, expected 'sizes', 'full' or 'none'")
    if str(folder).startswith("hf://"):
        from fisher_vmap.results.hub import download

        folder = download(str(folder), everything=check == "full")
    folder = Path(folder)
    index = read_index(folder)
    if not index.complete and not allow_incomplete:
        total = "an unknown number of" if index.num_prompts is None else index.num_prompts
        raise UserError(
            f"{folder} is unfinished: {sum(s.stop - s.start for s in index.shards)} of {total} prompts are stored; run "
            "the same command again to carry on, or pass allow_incomplete=True"
        )
    results = Results(folder, index, verify=check != "none")
    for reader in results.shards() if check != "none" else ():
        reader.check_sha256() if check == "full" else reader.check_sizes()
    made = dict(index.files) | ({sum_name(index.folded): index.sum} if index.sum else {})
    for name, entry in made.items() if check == "full" else ():
        check_sha256(folder / name, entry.bytes, entry.sha256)
    return results


class Results:
    """A results folder, read lazily: `results[3]` reads one prompt's numbers, not its shard.

    Records are of the first layer, or of the one chosen by `at`. Open one with `open_results`. Reading raises UserError
    where the folder turns out to be damaged.
    """

    def __init__(self, folder: Path, index: Index, *, verify: bool = True, layer: str | None = None) -> None:
        self.folder = folder
        self.index = index
        """The contents of index.json, among them the fingerprint, what was resolved, versions and shards."""
        self.layer = index.layers[0] if layer is None else layer
        """The layer that records, stacks and means are of, unless they name another."""
        self._verify = verify
        self._open = OpenShards(folder, index, verify)

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of the hooked layers."""
        return self.index.layers

    def at(self, layer: Layer) -> "Results":
        """The same results, with records of another layer.

        Args:
            layer: its name, or its block's number, also as digits: 15 is the one hooked layer whose name ends in ".15".
                A negative number would count from the model's top, which the folder does not know.

        Raises:
            UserError: the layer was not hooked, or several have this number.
        """
        return Results(self.folder, self.index, verify=self._verify, layer=self._layer(layer))

    def __len__(self) -> int:
        """Number of prompts that are stored."""
        return sum(entry.stop - entry.start for entry in self.index.shards)

    def __iter__(self) -> Iterator[PromptRecord]:
        for entry in self.index.shards:
            for index in range(entry.start, entry.stop):
                yield self[index]

    @overload
    def __getitem__(self, index: int) -> PromptRecord: ...

    @overload
    def __getitem__(self, index: slice) -> list[PromptRecord]: ...

    def __getitem__(self, index: int | slice) -> PromptRecord | list[PromptRecord]:
        """The prompt of this index, from the end if negative; of a slice, a list."""
        stop = self.index.stop
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(stop))]
        number = operator.index(index)
        number += stop if number < 0 else 0
        if not 0 <= number < stop:
            raise IndexError(f"prompt {index} of {stop}")
        reader = self._open.holding(number)
        if reader is None:
            raise IndexError(f"prompt {number} is not stored yet: {self.folder} is unfinished")
        token_ids, log_probs = reader.tokens(number)
        found = reader.layer(number, self.layer)
        row = {key: value for key, value in reader.row(number).items() if key != "crc32" and not key.endswith("/crc32")}
        return PromptRecord(
            index=number, layer=self.layer, token_ids=token_ids, log_probs=log_probs, row=row, **found._asdict()
        )

    def stack(self, layer: Layer | None = None, where: Where = None) -> Stack:
        """Prompts at one layer, in memory; NaN where a prompt has no numbers.

        NaN comes first where numbers are sorted highest first, and spreads through products such as
        `algebra.cosines`: `where={"status": "ok"}` leaves those prompts out.

        Args:
            layer: its name or number, as for `at`; by default this view's layer.
            where: which prompts, as for `mean`, such as {"status": "ok"}, those with numbers; None takes all. Row i of
                the stack is then the i-th that is taken: `to_pandas().query("status == 'ok'")` has the same rows.

        Returns:
            A named tuple: S [n, R], V [n, R, D], Q [n, K, R], float32.
        """
        name = self._layer(layer)
        if where is None:
            return stack_of_all(self.shards(), name, self.index.layout, len(self))
        return stack_of_chosen(self.shards(), name, self.index.layout, chooser(where, self.shards))

    def mean(self, layer: Layer | None = None, where: Where = None) -> Float32:
        """The mean Fisher matrix over prompts: [D, D] float32, summed in float64.

        Args:
            layer: its name or number, as for `at`; by default this view's layer.
            where: which prompts: a function of the table's row (a dict), a dict of column == value, or a mask, [n]
                booleans. None takes all, from mean.safetensors where there is one. Prompts without numbers are left
                out. A run with `save: mean` has the mean over all alone.

        Returns:
            The mean; NaN if no prompt is chosen.

        Raises:
            UserError: unknown layer or column, a mask of the wrong length, or a damaged folder.
        """
        name = self._layer(layer)
        if where is None or not self.index.shards:
            return mean_of(self.folder, self.index, name, self._verify)
        return add_shards(None, self.shards(), name, chooser(where, self.shards)).mean().astype(np.float32)

    def directions(self, rank: int = 10, *, layer: Layer | None = None, where: Where = None) -> algebra.Spectrum:
        """The leading eigenvalues and eigenvectors of the mean Fisher matrix: what a group of prompts shares.

        An eigenvalue is the mean over the prompts of v^T F v, in nats^2 per squared unit of the residual stream.

        Args:
            rank: how many.
            layer: its name or number, as for `at`; by default this view's layer.
            where: which prompts, as for `mean`.

        Returns:
            S [rank], V [rank, D], float64.

        Raises:
            ValueError: no prompt is chosen (the line says what there is), or rank is above D; else as `mean`.
        """
        matrix = self.mean(layer, where)
        if np.isnan(matrix).all():
            raise UserError(why_nobody(where, self.shards))
        return algebra.eigenvectors(matrix, rank)

    def contrast(
        self, where: Where, against: Where = None, *, layer: Layer | None = None, rank: int = 5, ridge: float = 0.01
    ) -> algebra.Contrast:
        """Directions to which one group's outputs are sensitive and another's are not.

        The v with the largest (v^T A v) / (v^T (B + r I) v), A and B the groups' mean Fisher matrices; see
        `fisher_vmap.algebra.contrast` for r, the ridge.

        Args:
            where: the one group, as for `mean`.
            against: the other group; None: all prompts that `where` leaves out.
            layer: its name or number, as for `at`; by default this view's layer.
            rank: how many directions.
            ridge: r as a fraction of B's mean eigenvalue.

        Returns:
            A named tuple: ratios [R], directions [R, D], inside and outside [R], and r; float64.

        Raises:
            ValueError: a group is empty (the line says what there is); else as `mean`.
        """
        name, chosen = self._layer(layer), chooser(where, self.shards)
        inside = add_shards(None, self.shards(), name, chosen)
        if not inside.prompts:
            raise UserError(why_nobody(where, self.shards))
        outside = add_shards(
            None, self.shards(), name, others(chosen) if against is None else chooser(against, self.shards)
        )
        if not outside.prompts and against is None:
            raise UserError("the group has every prompt that has numbers: there is none to contrast it with")
        if not outside.prompts:
            raise UserError(why_nobody(against, self.shards))
        return algebra.contrast(inside.mean(), outside.mean(), rank, ridge)

    def residual_norm(self, layer: Layer | None = None, where: Where = None) -> float:
        """The mean over prompts of the residual stream's mean norm at a layer; NaN without prompts.

        Args:
            layer: its name or number, as for `at`; by default this view's layer.
            where: which prompts, as for `mean`.
        """
        return mean_residual_norm(self.shards(), self._layer(layer), chooser(where, self.shards))

    def push_to_hub(
        self, repo: str, *, private: bool = True, share_text: bool | None = None, token: str | None = None
    ) -> str:
        """Upload the folder to the hub as a data set, with a data card: `fisher_vmap.hub.push_to_hub`, its arguments.

        Text of a gated data set goes along only with share_text=True.
        """
        from fisher_vmap.results.hub import push_to_hub

        return push_to_hub(self, repo, private=private, share_text=share_text, token=token)

    def to_pandas(self) -> "pd.DataFrame":
        """The prompts table as a DataFrame, one row a prompt; `fisher_vmap.storage.table` names the columns."""
        return self.table().to_pandas()

    def table(self) -> pa.Table:
        """The prompts table as an Arrow table, from prompts.parquet or what an unfinished run's shards have of it."""
        return table_of(self.folder, self.index, self._verify)

    @property
    def metadata(self) -> dict[str, Any]:
        """The contents of metadata.yaml; of an unfinished run, the same about what there is, without settings."""
        return metadata_of(self.folder, self.index, self._verify)

    def shards(self) -> Iterator[ShardReader]:
        """Readers of the shards, in order; each is closed when the next one comes, unless it is kept."""
        return readers(self.folder, self.index, self._verify)

    def __repr__(self) -> str:
        layout, state = self.index.layout, "complete" if self.index.complete else "unfinished"
        widths = "/".join(map(str, dict.fromkeys(layout.widths.values())))
        layers = self.layer if len(self.layers) == 1 else f"{self.layer} (one of {len(self.layers)} layers)"
        return (
            f"Results({str(self.folder)!r}: {len(self)} prompts at {layers}, {layout.top_k} tokens, "
            f"rank {layout.rank}, width {widths}, {layout.vectors_dtype}, {state})"
        )

    def _layer(self, layer: Layer | None) -> str:
        return self.layer if layer is None else layer_named(layer, self.layers, self.folder)
