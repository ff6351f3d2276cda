"""Reading a results folder: prompts by index, stacks, the table, and means. It needs numpy, but not torch."""

import operator
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, SupportsIndex, overload

import numpy as np
import pyarrow as pa

from fisher_vmap import algebra
from fisher_vmap.errors import UserError
from fisher_vmap.results.comparison import Comparison, compare
from fisher_vmap.results.files import check_sha256
from fisher_vmap.results.hub import download, push_to_hub
from fisher_vmap.results.index import Index, read_index, sum_name
from fisher_vmap.results.means import add_shards, check_dense, dense_layers, mean_by_factors, mean_of, mean_of_group
from fisher_vmap.results.outputs import metadata_of, table_of
from fisher_vmap.results.record import Float32, PromptRecord, Stack, layer_named
from fisher_vmap.results.same_prompts import Side
from fisher_vmap.results.shard_reader import ShardReader, Where, chooser, readers, why_none

if TYPE_CHECKING:
    import pandas as pd

Check = Literal["sizes", "full", "none"]
Layer = str | SupportsIndex

KEPT_OPEN = 8  # shards kept open: each takes a file handle and the memory of its table


def open_results(
    folder: str | os.PathLike[str], *, check: Check = "sizes", allow_incomplete: bool = False
) -> "Results":
    """Open a results folder for reading.

    Args:
        folder: the `--output_dir` of a run, or "hf://datasets/OWNER/NAME@REVISION", which is fetched from the hub into
            its cache.
        check: "sizes" checks the size of every shard now, and the checksum of everything that is read later, single
            prompts too; "full" compares the SHA-256 of every file now; "none" trusts the folder.
        allow_incomplete: open an unfinished run with the prompts that are stored.

    Raises:
        UserError: no results folder, an unfinished one, or a damaged one; the line names the shard.
    """
    if check not in ("sizes", "full", "none"):
        raise UserError(f"check is {check!r}, expected 'sizes', 'full' or 'none'")
    if str(folder).startswith("hf://"):
        folder = download(str(folder), everything=check == "full")
    folder = Path(os.path.expanduser(folder))
    index = read_index(folder)
    if not index.complete and not allow_incomplete:
        total = "an unknown number of" if index.num_prompts is None else index.num_prompts
        raise UserError(
            f"{folder} is unfinished: {index.prompts} of {total} prompts are stored; give "
            "the command of its run again to carry on, or in Python allow_incomplete=True"
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
    if the folder turns out to be damaged.
    """

    def __init__(self, folder: Path, index: Index, *, verify: bool = True, layer: str | None = None) -> None:
        self.folder = folder
        self.index = index
        """The contents of index.json: fingerprint, automatic choices, versions, shards and so on."""
        self.layer = index.layers[0] if layer is None else layer
        """The layer of records, stacks and means that do not name another."""
        self._verify, self._viewed = verify, layer is not None
        self._open: dict[int, ShardReader] = {}  # by the shard's number, the one used last at the end

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
        return self.index.prompts

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
        entry = self.index.find(number // self.index.shard_size)
        if entry is None or number >= entry.stop:
            raise IndexError(f"prompt {number} is not stored yet: {self.folder} is unfinished")
        reader = self._open.pop(entry.number, None)
        reader = reader or ShardReader(self.folder, entry, self.index.layout, self._verify)
        self._open[entry.number] = reader
        if len(self._open) > KEPT_OPEN:
            self._open.pop(next(iter(self._open)))
        return reader.record(number, self.layer)

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
        name, layout = self._layer(layer), self.index.layout
        K, R, D = layout.outcomes, layout.rank, layout.widths[name]

        def empty(n: int) -> Stack:
            return Stack(*(np.empty((n, *shape), np.float32) for shape in ((R,), (R, D), (K, R))))

        if where is None:  # read shard by shard into place, so that the numbers are in memory only once
            stack, start = empty(len(self)), 0
            for reader in self.shards():
                part = reader.stack(name)
                for whole, piece in zip(stack, part, strict=True):
                    whole[start : start + len(piece)] = piece
                start += len(part.S)
            return stack
        chosen, parts = chooser(where, self.shards), [empty(0)]
        for reader in self.shards():
            mask = chosen(reader)
            if mask.any():  # other shards need not be read
                parts.append(Stack(*(piece[mask] for piece in reader.stack(name))))
        return Stack(*(np.concatenate(pieces) for pieces in zip(*parts, strict=True)))

    def mean(self, layer: Layer | None = None, where: Where = None) -> Float32:
        """The mean Fisher matrix over prompts: [D, D] float32, summed in float64.

        Args:
            layer: its name or number, as for `at`; by default this view's layer.
            where: which prompts. None takes all, from mean.safetensors if it exists. Prompts without numbers are left
                out. A run with `save: mean` has only the mean over all prompts. Otherwise one of

                * {column: value}, the value read as the column's type; several values in a list, array, Index or the
                  like mean any of them, and None or NaN the prompts without one;
                * a function of the table's row, a dict;
                * booleans, one for each stored prompt, in order. A pandas Series of booleans goes by its index, which
                  must have prompt numbers, as that of `to_pandas` does; it may lack prompts without numbers alone;
                * prompt numbers, different ones: integers in a list, array, Index or the values of a Series.

        Returns:
            The mean; NaN if no prompt is chosen.

        Raises:
            UserError: unknown layer or column, a value that is not of the column's type, a mask or prompt numbers that
                do not fit the prompts, a layer of a width above 16,384 (take `directions` or `mean_factors`), or a
                damaged folder.
        """
        name = self._layer(layer)
        if where is None or not self.index.shards:
            return mean_of(self.folder, self.index, name, self._verify)
        check_dense(self.index.layout, name)
        return add_shards(None, self.shards(), name, chooser(where, self.shards)).mean().astype(np.float32)

    def mean_factors(self, layer: Layer | None = None, where: Where = None) -> algebra.MeanFactors:
        """The mean Fisher matrix over prompts by its eigenvalues and eigenvectors, without a matrix [D, D].

        It is accepted by the functions of `fisher_vmap.algebra`. Up to as many directions as fit in half a gigabyte all
        are kept; then the leading ones, and a line says which share of the trace they hold.

        Args:
            layer: its name or number, as for `at`; by default this view's layer.
            where: which prompts, as for `mean`.

        Returns:
            A named tuple: S [m], V [m, D], float64, the trace of the whole mean and the number of prompts.

        Raises:
            UserError: as `mean`, but for the width.
        """
        return mean_by_factors(self.shards, self.index.layout, self._layer(layer), chooser(where, self.shards))

    def is_wide(self, layer: Layer | None = None) -> bool:
        """Whether the dense mean of a layer is left out because its width is above 16,384."""
        return self._layer(layer) not in dense_layers(self.index.layout)

    def directions(self, rank: int = 10, *, layer: Layer | None = None, where: Where = None) -> algebra.Spectrum:
        """The leading eigenvalues and eigenvectors of the mean Fisher matrix: what a group of prompts shares.

        An eigenvalue is the mean over the prompts of v^T F v, in nats^2 per squared unit of the residual stream.

        Args:
            rank: how many.
            layer: its name or number, as for `at`; by default this view's layer. At one of a width above 16,384 they
                come from `mean_factors`.
            where: which prompts, as for `mean`.

        Returns:
            S [rank], V [rank, D], float64.

        Raises:
            ValueError: no prompt is chosen (the line says what there is), or rank is above D or the directions that
                a wide layer's prompts have; else as `mean`.
        """
        if self.is_wide(layer):
            found = self.mean_factors(layer, where)
            if not found.prompts:
                raise UserError(why_none(where, self.shards))
            if not 1 <= rank <= len(found.S):
                there = f"the mean of {found.prompts:,} prompts at {self._layer(layer)} has {len(found.S):,} directions"
                raise UserError(f"rank is {rank}, but {there}; ask for 1 to {len(found.S):,}")
            return algebra.Spectrum(found.S[:rank], found.V[:rank])
        matrix = self.mean(layer, where)
        if np.isnan(matrix).all():
            raise UserError(why_none(where, self.shards))
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
        others = (lambda reader: ~chosen(reader)) if against is None else chooser(against, self.shards)
        inside, prompts = mean_of_group(self.shards, self.index.layout, name, chosen)
        if not prompts:
            raise UserError(why_none(where, self.shards))
        outside, prompts = mean_of_group(self.shards, self.index.layout, name, others)
        if not prompts and against is None:
            raise UserError("the group has every prompt that has numbers: there is none to contrast it with")
        if not prompts:
            raise UserError(why_none(against, self.shards))
        return algebra.contrast(inside, outside, rank, ridge)

    def compare(
        self,
        other: "Results",
        layer: Layer | None = None,
        other_layer: Layer | None = None,
        rank: int = 5,
        ridge: float = 0.01,
        by: str | None = None,
    ) -> Comparison:
        """How the matrices of the same prompts differ in another folder, such as that of a fine-tuned model.

        Args:
            other: the other folder, B; this one is A.
            layer: of this folder, its name or number, as for `at`; by default this view's layer.
            other_layer: of the other one; by default the layer of its view if `at` has made it, else the one with the
                same name.
            rank: how many of the directions that B reacts to and A does not.
            ridge: r of `algebra.contrast`, as a fraction of A's mean eigenvalue.
            by: a kept column; its values are groups with directions of their own.

        Returns:
            Arrays with an entry for each prompt that has numbers in both, the directions, and the tokens they trade.

        Raises:
            UserError: other prompts (the line names the first), other widths, an unknown layer or column, a folder
                that keeps the mean alone, or a damaged one.
        """
        if not isinstance(other, Results):
            raise UserError(f"other is {type(other).__name__}; expected the Results that open_results returns")
        name = self._layer(layer)
        own = other_layer is None and other._viewed
        its = other.layer if own else other._layer(name if other_layer is None else other_layer)
        a, b = (Side(each.folder, each.index, of, each.shards) for each, of in ((self, name), (other, its)))
        return compare(a, b, rank, ridge, by)

    def residual_norm(self, layer: Layer | None = None, where: Where = None) -> float:
        """The mean over prompts of their `residual_norm` at a layer; NaN without prompts.

        Args:
            layer: its name or number, as for `at`; by default this view's layer.
            where: which prompts, as for `mean`.
        """
        name, chosen, norms = self._layer(layer), chooser(where, self.shards), list[float]()
        for reader in self.shards():  # the table has trace x norm^2
            columns = (reader.table.column(f"{name}/{column}").to_pylist() for column in ("trace", "trace_norm2"))
            for trace, trace_norm2, wanted in zip(*columns, chosen(reader), strict=True):
                if wanted and trace:
                    norms.append((trace_norm2 / trace) ** 0.5)
        return float(np.mean(norms)) if norms else float("nan")

    def push_to_hub(
        self, repo: str, *, private: bool = True, share_text: bool | None = None, token: str | None = None
    ) -> str:
        """Upload the finished folder to the Hugging Face hub as a data set with a data card.

        Settings that are paths of this machine are cut to their last part.

        Args:
            repo: "OWNER/NAME" or "hf://datasets/OWNER/NAME"; created if it does not exist.
            private: whether a new repository is private.
            share_text: whether to upload the prompts' text, their tokens and the kept columns that hold text. None:
                yes, but raise an error if the data set is gated or cannot be looked up.
            token: of the hub, with write access; None: as `hf auth login` left it.

        Returns:
            The repository's web address.

        Raises:
            UserError: an unfinished folder, text of a gated data set with share_text None, no access, or no network.
        """
        return push_to_hub(self.folder, self.index, repo, private=private, share_text=share_text, token=token)

    def to_pandas(self) -> "pd.DataFrame":
        """The prompts table as a DataFrame, one row a prompt; `fisher_vmap.results.shard` describes the columns.

        Its index has the prompts' numbers, so that a Series made from it chooses prompts as `where`.
        """
        table: pd.DataFrame = self.table().to_pandas()
        if len(table) == self.index.stop:
            return table
        return table.set_index(table["prompt_index"].rename(None))  # an unfinished run may lack prompts in between

    def table(self) -> pa.Table:
        """The prompts table as an Arrow table; of an unfinished run, the rows that are stored."""
        return table_of(self.folder, self.index, self._verify)

    @property
    def metadata(self) -> dict[str, Any]:
        """The contents of metadata.yaml; of an unfinished run, the same about the stored prompts, without settings."""
        return metadata_of(self.folder, self.index, self._verify)

    def shards(self) -> Iterator[ShardReader]:
        """A reader of each shard, in order."""
        return readers(self.folder, self.index, self._verify)

    def __repr__(self) -> str:
        layout, state = self.index.layout, "complete" if self.index.complete else "unfinished"
        widths = "/".join(map(str, dict.fromkeys(layout.widths.values())))
        layers = self.layer if len(self.layers) == 1 else f"{self.layer} (one of {len(self.layers)} layers)"
        return (
            f"Results({str(self.folder)!r}: {len(self)} prompts at {layers}, {layout.top_k} tokens, "
            f"rank {layout.rank}, width {widths}, {layout.vectors_dtype}, {state})"
        )

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}}  # open files cannot be pickled

    def _layer(self, layer: Layer | None) -> str:
        return self.layer if layer is None else layer_named(layer, self.layers, self.folder)
