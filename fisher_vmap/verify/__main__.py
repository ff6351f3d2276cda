"""`python -m fisher_vmap.verify DIR`: check a results folder's files and numbers.

Prints a line for each check: "ok", or "BAD" with the reason. Exit code 0: all checks passed; 1: a check failed or the
run is unfinished; 2: DIR is not a results folder. With `--kl` the matrices are compared with the model: see `kl.py`.

The checks of `verify DIR` on a results folder's files.
"""

import sys

if __name__ == "__main__":
    from fisher_vmap.__main__ import start

    sys.exit(start("verify"))

import argparse
import re
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from fisher_vmap.cli import Parser, add_quiet, command, path_argument
from fisher_vmap.errors import UserError
from fisher_vmap.escape import visible
from fisher_vmap.progress import aside, bar, step
from fisher_vmap.results.files import check_sha256, damaged
from fisher_vmap.results.folder import check_not_ours
from fisher_vmap.results.index import (
    INDEX_NAME,
    MEAN_NAME,
    TABLE_NAME,
    FileEntry,
    Index,
    ShardEntry,
    ShardLayout,
    npz_name,
    read_index,
    sum_name,
)
from fisher_vmap.results.means import read_mean, running_sum, sum_is_intact
from fisher_vmap.results.outputs import npz_arrays
from fisher_vmap.results.record import Float32, Stack, covered_mass, natural
from fisher_vmap.results.shard import common_schema, in_schema
from fisher_vmap.results.shard_reader import ShardReader, is_ok, readers

# Largest entry of V V^T - 1. The relative error of a float16 number is up to 2^-11, that of a squared norm twice that.
ORTHONORMAL_TO = {"float32": 1e-5, "float16": 2e-3}


class Check(NamedTuple):
    """One check.

    Attributes:
        name: of the check.
        look: returns what it found, or raises UserError.
        kind: a name for all checks of this kind, if there is one for each layer; None: it is the only one.
        size: bytes that it reads.
    """

    name: str
    look: Callable[[], str]
    kind: str | None = None
    size: int = 0


def checks(folder: Path) -> Iterator[Check]:
    """All checks of a folder; those of one kind follow one another."""
    try:
        index = read_index(folder)
    except UserError as error:
        yield Check(INDEX_NAME, partial(_fail, error))
        return
    yield Check(INDEX_NAME, partial(_check_index, folder, index))
    tables = sum(shard.table_bytes for shard in index.shards)
    arrays = sum(0 if shard.folded else shard.bytes for shard in index.shards)
    for shard in index.shards:
        size = shard.table_bytes + (0 if shard.folded else shard.bytes)
        yield Check(shard.file, partial(_check_shard, folder, index, shard), size=size)
    if index.sum is not None:
        name = sum_name(index.folded)
        for layer in index.layers:
            look = partial(_check_sum, folder, index, layer)
            yield Check(f"{name}, {layer}", look, f"{name}, the sum of each layer", index.sum.bytes)
    archives = {npz_name(layer, index.layers): layer for layer in index.layers}
    for name in sorted(index.files, key=natural):
        kind = "the npz of each layer" if name in archives else None
        yield Check(name, partial(_check_file, folder / name, index.files[name]), kind, index.files[name].bytes)
    if TABLE_NAME in index.files:
        size = 2 * (index.files[TABLE_NAME].bytes + tables)
        yield Check(f"{TABLE_NAME} = the shards' rows", partial(_check_table, folder, index), size=size)
    means = index.files[MEAN_NAME].tensors if MEAN_NAME in index.files else {}
    for layer in [name for name in index.layers if name in means]:  # a wide layer has none
        kind = f"{MEAN_NAME}, the mean of each layer"
        size = index.files[MEAN_NAME].bytes // len(means)
        yield Check(f"{MEAN_NAME}, {layer}", partial(_check_mean, folder, index, layer), kind, size)
    for name, layer in archives.items():
        if name in index.files:
            look = partial(_check_npz, folder, index, layer)
            size = index.files[name].bytes + arrays // len(index.layers)
            yield Check(f"{name} = the shards' arrays", look, "the npz of each layer = the shards' arrays", size)


def _fail(error: UserError) -> str:
    raise error


def _check_index(folder: Path, index: Index) -> str:
    stored = sum(entry.stop - entry.start for entry in index.shards)
    if not index.complete:
        raise UserError(
            f"the run is unfinished: {stored} of {index.num_prompts} prompts; give the command of its run again"
        )
    return f"complete, {stored} prompts in {len(index.shards)} shards"


def _check_file(path: Path, entry: FileEntry) -> str:
    check_sha256(path, entry.bytes, entry.sha256)
    return f"SHA-256 as recorded, {entry.bytes:,} bytes"


def _check_sum(folder: Path, index: Index, layer: str) -> str:
    path = folder / sum_name(index.folded)
    if not sum_is_intact(folder, index):
        raise damaged(path, "its SHA-256 differs from the index")
    found = running_sum(folder, index, layer)
    if found is None or not np.isfinite(found.total).all() or not np.allclose(found.total, found.total.T, rtol=1e-9):
        raise damaged(path, f"the sum of {layer} is not finite or not symmetric")
    return f"SHA-256 as recorded, {found.prompts} prompts of {index.folded} shards, trace {np.trace(found.total):.4g}"


def _check_shard(folder: Path, index: Index, entry: ShardEntry) -> str:
    shard = ShardReader(folder, entry, index.layout)
    shard.check_sha256()
    prompts = f"prompts {entry.start}..{entry.stop - 1}"
    if entry.folded:
        return f"SHA-256 of its table; {prompts}, in the sum alone"
    ok = is_ok(shard)
    agree: Agree = _pairs_agree if index.layout.pairs else partial(_tokens_agree, index.layout.top_k)
    described = shard.table.select(_target_lists(index.layout) if index.layout.pairs else ["mass"]).to_pylist()
    for row, prompt in enumerate(range(entry.start, entry.stop)):
        token_ids, log_probs = shard.tokens(prompt)
        if ok[row] and not (np.isfinite(log_probs).all() and agree(token_ids, log_probs, described[row])):
            raise damaged(shard.path, f"the tokens of prompt {prompt} are not the table's")
    for layer in shard.layout.layers:
        stack = shard.stack(layer)
        _check_numbers(shard, layer, Stack(*(part[ok] for part in stack)), np.flatnonzero(ok) + shard.entry.start)
        if not all(np.isnan(part[~ok]).all() for part in stack):
            raise damaged(shard.path, f"{layer}: a prompt without a result has numbers")
    without = f", {(~ok).sum()} without numbers" if not ok.all() else ""
    return f"SHA-256, shapes, order of S, orthonormal V; {prompts}{without}"


Agree = Callable[[NDArray[np.int64], Float32, Mapping[str, Any]], bool]


def _tokens_agree(top_k: int, token_ids: NDArray[np.int64], log_probs: Float32, row: Mapping[str, Any]) -> bool:
    """Whether the tokens of the only target are those of the row; after the `top_k` may come "any other token"."""
    covered = covered_mass(log_probs, token_ids) or 0.0
    return bool((token_ids[:top_k] >= 0).all() and abs(covered - row["mass"]) <= 1e-5)


def _target_lists(layout: ShardLayout) -> list[str]:
    """Columns about several targets: their number, and lists."""
    of_layers = [f"{layer}/target_trace" for layer in layout.layers]
    lists = ["target_positions", "target_samples", "target_log_probs", "target_entropy", *of_layers]
    return ["targets", "token_targets", *lists]


def _pairs_agree(token_ids: NDArray[np.int64], log_probs: Float32, row: Mapping[str, Any]) -> bool:
    """Whether the (target, token) pairs are of the row's targets, each of which has its place in the row's lists."""
    row = dict(row)
    n, of_pair = row.pop("targets"), np.array(row.pop("token_targets"))
    there = of_pair >= 0  # the others pad
    return (
        {len(values) for values in row.values()} == {n}
        and of_pair.shape == token_ids.shape == log_probs.shape
        and bool((of_pair < n).all() and ((token_ids >= 0) == there).all())
    )


def _check_numbers(
    shard: ShardReader, layer: str, stack: Stack, prompts: np.ndarray[tuple[int], np.dtype[np.int64]]
) -> None:
    tolerance = ORTHONORMAL_TO[shard.layout.vectors_dtype]
    trace = shard.table.column(f"{layer}/trace").to_pylist()
    for S, V, Q, prompt in zip(*stack, prompts, strict=True):
        what = f"{layer}, prompt {prompt}"
        if not (np.isfinite(S).all() and np.isfinite(V).all() and np.isfinite(Q).all()):
            raise damaged(shard.path, f"{what}: not finite")
        if (S < 0).any() or (np.diff(S) > 0).any():
            raise damaged(shard.path, f"{what}: S is negative or not in order")
        if float(S.astype(np.float64).sum()) > trace[prompt - shard.entry.start] * (1 + 1e-4) + 1e-30:
            raise damaged(shard.path, f"{what}: the trace is below the sum of S")
        V = V.astype(np.float64)
        expected = np.diag((S > 0).astype(np.float64))  # rows beyond the rank are zero
        if (off := float(np.abs(V @ V.T - expected).max())) > tolerance:
            raise damaged(shard.path, f"{what}: V is off orthonormal by {off:.1e}, more than {tolerance:.0e}")


def _check_table(folder: Path, index: Index) -> str:
    path = folder / TABLE_NAME
    check_sha256(path, index.files[TABLE_NAME].bytes, index.files[TABLE_NAME].sha256)  # Arrow does not check it
    schema = common_schema((shard.table.schema for shard in readers(folder, index)), index.layout)
    with pq.ParquetFile(path) as table:
        groups = (table.read_row_group(number, use_threads=False) for number in range(table.num_row_groups))
        rest = schema.empty_table()
        for shard in readers(folder, index):
            expected = in_schema(shard.table, schema)
            while rest.num_rows < expected.num_rows and (group := next(groups, None)) is not None:
                rest = pa.concat_tables([rest, group])
            if not rest.slice(0, expected.num_rows).equals(expected):
                raise damaged(path, f"its rows differ from {shard.entry.table}")
            rest = rest.slice(expected.num_rows)
        if rest.num_rows or next(groups, None) is not None:
            raise damaged(path, "it has more rows than the shards")
    return f"{index.stop} rows"


def _check_mean(folder: Path, index: Index, layer: str) -> str:
    mean = read_mean(folder / MEAN_NAME, index.files[MEAN_NAME], layer, index.layout.widths[layer])
    if not np.isnan(mean).all() and not np.allclose(mean, mean.T, rtol=1e-5, atol=1e-6 * np.abs(mean).max()):
        raise damaged(folder / MEAN_NAME, f"the mean of {layer} is not symmetric")
    return f"{mean.shape}, symmetric, trace {np.trace(mean):.4g}"


def _check_npz(folder: Path, index: Index, layer: str) -> str:
    path = folder / npz_name(layer, index.layers)
    count = 0
    try:
        with np.load(path, allow_pickle=False) as archive:
            for name, array in npz_arrays(readers(folder, index), layer):
                found, count = archive[name], count + 1
                if found.dtype != array.dtype or not np.array_equal(found, array, equal_nan=True):
                    raise damaged(path, f"{name} differs from the shards")
            if len(archive.files) != count:
                raise damaged(path, f"it has {len(archive.files)} arrays instead of {count}")
    except (OSError, KeyError, EOFError, zipfile.BadZipFile, NotImplementedError) as error:
        raise damaged(path, str(error)) from error
    except ValueError as error:
        raise error if isinstance(error, UserError) else damaged(path, str(error)) from error
    return f"{count} arrays"


PROMPTS = 8  # of --kl
MANY = 4  # so many passed checks of one kind are printed in one line


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Check a results folder, print a line a check, and return the exit code."""
    parser = Parser(
        "verify",
        description="Check a results folder: checksums, shapes, finite numbers, orthonormal directions, and that the "
        "npz, the table and the index agree with the shards. With --kl, also run the model: do the matrices predict "
        "how far a step of the residual stream moves the next-token distribution?",
        epilog="examples:\n  fisher-vmap verify fisher_results\n  fisher-vmap verify fisher_results --kl --prompts 16",
    )
    parser.add_argument("folder", metavar="DIR", type=path_argument, help="the results folder, such as fisher_results")
    parser.add_argument("--kl", action="store_true", help="compare predicted with measured KL divergences")
    parser.add_argument("--prompts", type=int, metavar="N", help="with --kl: how many prompts (8)")
    parser.add_argument("--layer", metavar="NAME", help="with --kl: which hooked layer, by name or number (the first)")
    parser.add_argument("--model_path", metavar="PATH", help="with --kl: where the model is now")
    parser.add_argument("--dataset_name", metavar="PATH", help="with --kl: where the prompts are now")
    parser.add_argument(
        "--plot", type=path_argument, metavar="FILE", help="with --kl: where the plot goes (DIR/kl.png)"
    )
    add_quiet(parser)
    arguments = parser.read(argv)
    folder: Path = arguments.folder
    _refuse_flags_of_kl(arguments)
    if not (folder / INDEX_NAME).exists():
        raise UserError(f"{folder} is not a results folder: it has no {INDEX_NAME}")
    found = list(checks(folder))
    with bar(sum(check.size for check in found), "B", "checking") as advance:
        bad = sum(_carry_out(list(alike), advance) for _, alike in groupby(found, key=_kind))
    if arguments.kl and not bad:
        bad += _check_kl(arguments)
    print(f"{folder} is sound{_without_results(folder)}" if not bad else f"{folder}: {bad} checks failed")
    return 1 if bad else 0


def _refuse_flags_of_kl(arguments: argparse.Namespace) -> None:
    """Raise UserError for a flag that needs --kl."""
    for name in ("layer", "prompts", "model_path", "dataset_name", "plot"):
        if getattr(arguments, name) is not None and not arguments.kl:
            raise UserError(f"--{name} is for the check against the model; add --kl, or leave --{name} out")


def _kind(check: Check) -> object:
    return check.name if check.kind is None else check.kind


def _carry_out(alike: Sequence[Check], advance: Callable[[int], None]) -> int:
    """Do checks of one kind and print their lines; returns the number that failed."""
    many, good, bad = len(alike) >= MANY, 0, 0
    for check in alike:
        try:
            found = check.look()
        except UserError as error:
            _print(f"BAD  {check.name}: {error}")
            bad += 1
            continue
        finally:
            advance(check.size)
        good += 1
        if not many:
            _print(f"ok   {check.name}: {found}")
    if many and good:
        _print(f"ok   {alike[0].kind}: {good} of {len(alike)}, the last of them: {found}")
    return bad


def _print(line: str) -> None:
    with aside():
        print(visible(line, spaces=False), flush=True)


def _without_results(folder: Path) -> str:
    with pq.ParquetFile(folder / TABLE_NAME) as table:  # `read_table` would look for columns in the path
        status = table.read(columns=["status"])["status"].to_pylist()
    return "" if "ok" in status else f", but none of its {len(status)} prompts has results"


def _check_kl(arguments: argparse.Namespace) -> int:
    """Print and plot how well the matrices predict; returns 1 if they do not, else 0."""
    with step("loading the libraries"):
        from fisher_vmap.results.reader import open_results
        from fisher_vmap.verify.kl import check_kl
        from fisher_vmap.verify.kl_report import plot_kl

    prompts = PROMPTS if arguments.prompts is None else arguments.prompts
    if prompts < 1:
        raise UserError(f"--prompts is {prompts}; expected at least 1")
    if arguments.plot is not None:
        check_not_ours(arguments.plot, "--plot")
    results = open_results(arguments.folder)
    try:
        found = check_kl(
            results,
            prompts=prompts,
            layer=arguments.layer,
            model_path=arguments.model_path,
            dataset_name=arguments.dataset_name,
        )
    except UserError as error:
        raise UserError(f"{error}{_of_the_run(str(error), arguments.folder)}") from error
    print("\n".join(found.lines()), flush=True)
    plot = arguments.plot or arguments.folder / "kl.png"
    try:
        with step("drawing the plot"):
            plot_kl(found, plot)
        print(f"     drawn in {plot}")
    except UserError as error:
        if arguments.plot is not None:
            raise
        print(f"     not drawn: {error}")
    return 0 if found.ok else 1


def _of_the_run(line: str, folder: Path) -> str:
    """What to add to a line that names settings that are no flags here, such as trust_remote_code."""
    from fisher_vmap.run.settings import Settings

    others = set(Settings.model_fields) - {"model_path", "dataset_name"}
    names = sorted(others & set(re.findall(r"[a-z]+(?:_[a-z]+)+", line)))
    return f" ({', '.join(names)}: settings of the run that filled {folder}, kept here)" if names else ""
