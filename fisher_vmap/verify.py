"""`python -m fisher_vmap.verify DIR`: is a results folder whole, and are its numbers what they claim to be?

One line a check: "ok", or "BAD" with what is wrong. Exit code 0 when all is well, 1 when something is damaged or the
run is unfinished, 2 when DIR is no results folder.

With `--kl` the model is loaded, and what the matrices predict is set beside what it does: see `kl_verify`.
"""

import argparse
import sys
import zipfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from fisher_vmap.errors import UserError
from fisher_vmap.settings.command_line import start_logging, user_mistake
from fisher_vmap.storage.checking import check_sha256, damaged
from fisher_vmap.storage.folding import running_sum, sum_is_sound
from fisher_vmap.storage.index import (
    INDEX_NAME,
    MEAN_NAME,
    TABLE_NAME,
    FileEntry,
    Index,
    npz_name,
    read_index,
    sum_name,
)
from fisher_vmap.storage.mean import is_ok, read_mean
from fisher_vmap.storage.npz import npz_arrays
from fisher_vmap.storage.reading import ShardReader, Stack
from fisher_vmap.storage.shard_readers import readers
from fisher_vmap.storage.table import common_schema, covered_mass, in_schema

# Largest entry of V V^T - 1. A float16 number is off by up to 2^-11 of itself, a squared norm by twice that.
ORTHONORMAL_TO = {"float32": 1e-5, "float16": 2e-3}


def main(argv: Sequence[str] | None = None) -> int:
    """Check a results folder, print a line a check, and return the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m fisher_vmap.verify",
        description="Check a results folder: checksums, shapes, finite numbers, orthonormal directions, and that the "
        "npz, the table and the index agree with the shards. With --kl, also run the model: do the matrices predict "
        "how far a step of the residual stream moves the next-token distribution?",
        epilog="examples:\n  python -m fisher_vmap.verify fisher_results\n"
        "  python -m fisher_vmap.verify fisher_results --kl --prompts 16",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", metavar="DIR", type=Path, help="the results folder, such as fisher_results")
    parser.add_argument("--kl", action="store_true", help="compare predicted with measured KL divergences")
    parser.add_argument("--prompts", type=int, default=8, metavar="N", help="with --kl: how many prompts (8)")
    parser.add_argument("--layer", metavar="NAME", help="with --kl: which hooked layer (the first)")
    parser.add_argument("--model_path", "--model-path", metavar="PATH", help="with --kl: where the model is now")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="with --kl: where the plot goes (DIR/kl.png)")
    arguments = parser.parse_args(argv)
    folder: Path = arguments.folder
    if not (folder / INDEX_NAME).exists():
        print(f"{folder} is not a results folder: it has no {INDEX_NAME}", file=sys.stderr)
        return 2
    bad = 0
    for name, check in _checks(folder):
        try:
            print(f"ok   {name}: {check()}", flush=True)
        except UserError as error:
            print(f"BAD  {name}: {error}", flush=True)
            bad += 1
    if arguments.kl and not bad:
        try:
            bad += _check_kl(arguments)
        except UserError as error:
            return user_mistake(error)
    print(f"{folder} is sound" if not bad else f"{folder}: {bad} checks failed")
    return 1 if bad else 0


def _check_kl(arguments: argparse.Namespace) -> int:
    """Print how well the matrices predict, and draw it; returns the number of layers where they do not."""
    from fisher_vmap.results import open_results
    from fisher_vmap.verification.kl_outcome import plot_kl
    from fisher_vmap.verification.kl_verify import check_kl

    start_logging()
    if arguments.prompts < 1:
        raise UserError(f"--prompts is {arguments.prompts}; expected at least 1")
    found = check_kl(
        open_results(arguments.folder),
        prompts=arguments.prompts,
        layer=arguments.layer,
        model_path=arguments.model_path,
    )
    print("\n".join(found.lines()), flush=True)
    plot = arguments.plot or arguments.folder / "kl.png"
    try:
        plot_kl(found, plot)
        print(f"     drawn in {plot}")
    except UserError as error:
        if arguments.plot is not None:
            raise
        print(f"     not drawn: {error}")
    return 0 if found.ok else 1


def _checks(folder: Path) -> Iterator[tuple[str, Callable[[], str]]]:
    try:
        index = read_index(folder)
    except UserError as error:
        yield INDEX_NAME, partial(_fail, error)
        return
    yield INDEX_NAME, partial(_check_index, folder, index)
    for shard in readers(folder, index):
        yield shard.entry.file, partial(_check_shard, shard)
    for layer in index.layers if index.sum else ():
        yield f"{sum_name(index.folded)}, {layer}", partial(_check_sum, folder, index, layer)
    for name, entry in index.files.items():
        yield name, partial(_check_file, folder / name, entry)
    if TABLE_NAME in index.files:
        yield f"{TABLE_NAME} = the shards' rows", partial(_check_table, folder, index)
    for layer in index.layers:
        if MEAN_NAME in index.files:
            yield f"{MEAN_NAME}, {layer}", partial(_check_mean, folder, index, layer)
        if npz_name(layer, index.layers) in index.files:
            yield f"{npz_name(layer, index.layers)} = the shards' arrays", partial(_check_npz, folder, index, layer)


def _fail(error: UserError) -> str:
    raise error


def _check_index(folder: Path, index: Index) -> str:
    stored = sum(entry.stop - entry.start for entry in index.shards)
    if not index.complete:
        raise UserError(f"the run is unfinished: {stored} of {index.num_prompts} prompts; run the same command again")
    return f"complete, {stored} prompts in {len(index.shards)} shards"


def _check_file(path: Path, entry: FileEntry) -> str:
    check_sha256(path, entry.bytes, entry.sha256)
    return f"SHA-256 as recorded, {entry.bytes:,} bytes"


def _check_sum(folder: Path, index: Index, layer: str) -> str:
    path = folder / sum_name(index.folded)
    if not sum_is_sound(folder, index):
        raise damaged(path, "its SHA-256 differs from the index")
    found = running_sum(folder, index, layer)
    if found is None or not np.isfinite(found.total).all() or not np.allclose(found.total, found.total.T, rtol=1e-9):
        raise damaged(path, f"the sum of {layer} is not finite or not symmetric")
    return f"SHA-256 as recorded, {found.prompts} prompts of {index.folded} shards, trace {np.trace(found.total):.4g}"


def _check_shard(shard: ShardReader) -> str:
    shard.check_sha256()
    prompts = f"prompts {shard.entry.start}..{shard.entry.stop - 1}"
    if shard.entry.folded:
        return f"SHA-256 of its table; {prompts}, in the sum alone"
    ok = is_ok(shard)
    mass = shard.table.column("mass").to_pylist()
    for row, index in enumerate(range(shard.entry.start, shard.entry.stop)):
        token_ids, log_probs = shard.tokens(index)
        if not ok[row]:
            continue
        covered = covered_mass(log_probs, token_ids)
        known = token_ids[: shard.layout.top_k]
        if not np.isfinite(log_probs).all() or (known < 0).any() or abs((covered or 0.0) - mass[row]) > 1e-5:
            raise damaged(shard.path, f"the tokens of prompt {index} are not the table's")
    for layer in shard.layout.layers:
        stack = shard.stack(layer)
        _check_numbers(shard, layer, Stack(*(part[ok] for part in stack)), np.flatnonzero(ok) + shard.entry.start)
        if not all(np.isnan(part[~ok]).all() for part in stack):
            raise damaged(shard.path, f"{layer}: a prompt without a result has numbers")
    without = f", {(~ok).sum()} without numbers" if not ok.all() else ""
    return f"SHA-256, shapes, order of S, orthonormal V; {prompts}{without}"


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
    check_sha256(path, index.files[TABLE_NAME].bytes, index.files[TABLE_NAME].sha256)  # Arrow trusts what it reads
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


if __name__ == "__main__":
    sys.exit(main())
