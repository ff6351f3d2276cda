"""Tables of data sets of the hub and of folders, by the `datasets` library.

A hub data set is streamed. For a folder the library only says which files make up a split; `files.py` reads them.
What the library is shown is another folder, of empty files with the names of those that may be data: it would take the
folder's own name for a pattern, and read results of ours. A data set's script is never run. The library is imported
when it is first asked: local files and Python's lists of token ids do without it.
"""

from __future__ import annotations

import logging
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError
from pyarrow import ArrowException

from fisher_vmap.data.files import Count, Table, table_of_files
from fisher_vmap.data.local_files import (
    EXPECTED,
    JSON_LINES,
    SUFFIXES,
    FoundFiles,
    check_suffix,
    content_hash,
    find_data_files,
)
from fisher_vmap.errors import UserError, listed

_log = logging.getLogger(__name__)

SHUFFLE_BUFFER = 10_000

# What the library raises, besides errors of its own, for data it cannot find, fetch or read. The hub's error derives
# from the error class of its HTTP client, which differs between versions; a data set with a script raises RuntimeError.
_PROBLEMS: tuple[type[Exception], ...] = (
    *HfHubHTTPError.__bases__,
    ArrowException,
    OSError,
    ValueError,
    TypeError,
    LookupError,  # a damaged folder of `save_to_disk`
    RuntimeError,
)

_NEEDS_SCRIPT = "data set {} needs a script of its own, which is never run; use a data set of plain data files"
# What the library reads beside data files: how a folder is divided into configurations and splits.
_DESCRIPTIONS = ("README.md", ".huggingface.yaml")
# Endings that every version of the library knows, in lower case alone.
_LIBRARY_SUFFIXES = tuple(suffix for suffix in SUFFIXES if suffix not in (".ndjson", ".jsonlines"))


def _explain(error: Exception, name: str, *, local: bool, shown: str) -> str:
    """One line: what is wrong with the data set, and what to do about it."""
    import datasets

    text = str(error).replace(shown, name) if shown else str(error)
    reason = " ".join(text.split())[:300] or type(error).__name__
    if isinstance(error, GatedRepoError) or "gated dataset" in reason:
        page = f"https://huggingface.co/datasets/{name}"
        return f"data set {name} is gated: accept its terms on {page}, then run `hf auth login`"
    if "scripts are no longer supported" in reason:
        return _NEEDS_SCRIPT.format(name)
    if isinstance(error, datasets.exceptions.DatasetNotFoundError | RepositoryNotFoundError):
        if "Revision" in reason:
            return f"data set {name}: {reason.rstrip('.')}; correct dataset_revision"
        return (
            f"no file, folder or hub data set {name} was found (a private one is not seen without `hf auth login`); "
            "correct dataset_name"
        )
    if isinstance(error, ConnectionError):
        return f"data set {name}: the hub cannot be reached ({reason}); check the network, or use a local file"
    if isinstance(error, FileNotFoundError):
        return f"data set {name}: no data files ({reason}); expected {EXPECTED}"
    if reason.startswith("Bad split"):
        return f"data set {name}: {reason}; correct dataset_split"
    if reason.startswith(("BuilderConfig", "Config name")):
        return f"data set {name}: {reason}; correct dataset_config"
    advice = "its files may be empty or damaged" if local else "check dataset_name, or the network"
    return f"data set {name} cannot be read ({type(error).__name__}: {reason}); {advice}"


@contextmanager
def _explained(name: str, *, local: bool, shown: str = "") -> Iterator[None]:
    """Within the context, the library's errors are a UserError; `shown` is the path that stands for the folder."""
    import datasets

    try:
        yield
    except UserError:
        raise
    except (*_PROBLEMS, datasets.exceptions.DatasetsError) as error:
        raise UserError(_explain(error, name, local=local, shown=shown)) from error


def open_hub(name: str, *, config: str | None, split: str, revision: str | None, shuffle_seed: int | None) -> Table:
    """Open a data set of the hub as a stream, which downloads only what is read.

    Args:
        name: the hub's id of the data set.
        config: its configuration (subset), or None for its default one.
        split: its split.
        revision: branch, tag or commit, or None for the main branch; it is resolved to a commit here.
        shuffle_seed: shuffle the order of the files, and the rows in a window of `SHUFFLE_BUFFER`; None: do not.

    Raises:
        UserError: the data set is missing, gated, empty, needs a script, or cannot be reached.
    """
    import datasets

    with _explained(name, local=False):
        builder = datasets.load_dataset_builder(name, config, revision=revision)
        stream = builder.as_streaming_dataset(split=split)
        if shuffle_seed is not None:
            stream = stream.shuffle(seed=shuffle_seed, buffer_size=SHUFFLE_BUFFER)
        columns = stream.column_names
        if columns is None:  # files without a schema, such as JSON lines: take it from the first row
            columns = list(next(iter(stream), {}))
    if not columns:
        raise UserError(f"data set {name}: holds no rows; expected at least one prompt")

    def read(chosen: Sequence[str] | None) -> Iterator[object]:
        with _explained(name, local=False):
            yield from stream if chosen is None else stream.select_columns(list(chosen))

    # The builder's hash is the commit that the revision stands for (or, offline, the cached copy of it).
    fingerprint = f"hub {name} commit:{builder.hash} config:{builder.config.name} split:{split}"
    rows = getattr((builder.info.splits or {}).get(split), "num_examples", None)
    count = Count(rows, exact=True) if rows else None
    return Table(f"data set {name}", fingerprint, columns, read, local=False, counted=lambda: count)


def open_folder(folder: Path, *, config: str | None, split: str) -> Table:
    """Open a folder of data files in splits by the conventions of the hub, or one that `save_to_disk` wrote.

    Args:
        folder: the folder.
        config: a configuration that the folder's README.md defines, or None for its default one.
        split: the split.

    Raises:
        UserError: there is no such split or configuration, or no file can be read.
    """
    if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
        return _open_saved(folder, config=config, split=split)
    if (folder / f"{folder.resolve().name}.py").is_file():
        raise UserError(_NEEDS_SCRIPT.format(folder))
    found = find_data_files(folder)
    left_out = "; ".join(f"{listed(names)} ({why})" for why, names in found.left_out.items())
    if not found.files:
        raise UserError(
            f"data set {folder}: no data files{f' beside {left_out}' if left_out else ''}; expected {EXPECTED}"
        )
    if left_out:
        _log.info("not read as data in %s: %s", folder, left_out)
    splits = _splits_of(folder, found, config)
    paths = _chosen_split(folder, splits, split)
    kinds = {_kind_of_reader(path) for path in paths}
    if others := [str(path.relative_to(folder)) for path in found.files if _kind_of_reader(path) not in kinds]:
        _log.info("%s is read as one kind of file, %s; left out: %s", folder, ", ".join(kinds), listed(others))
    return table_of_files(str(folder), paths)


def _kind_of_reader(path: Path) -> str:
    """The library's kind of a data file."""
    suffix = check_suffix(path).suffix
    return "JSON" if suffix in (*JSON_LINES, ".json") else suffix


def _splits_of(folder: Path, found: FoundFiles, config: str | None) -> dict[str, list[Path]]:
    """The files of each split, by the conventions of the hub."""
    import datasets

    with tempfile.TemporaryDirectory(prefix="fisher_vmap-") as scratch:
        shown = Path(scratch, "data").resolve()
        shown.mkdir()
        for name in _DESCRIPTIONS:
            if (folder / name).is_file():
                shutil.copyfile(folder / name, shown / name)
        real = _show(found.files, folder, shown)
        with _explained(str(folder), local=True, shown=str(shown)):
            builder = datasets.load_dataset_builder(str(shown), config, cache_dir=str(Path(scratch, "cache")))
            files: Mapping[Any, Sequence[str]] = builder.config.data_files
        # A file may match several of the library's patterns for a split.
        return {
            str(split): list(dict.fromkeys(real.get(name, Path(name)) for name in names))
            for split, names in files.items()
        }


def _show(files: Sequence[Path], folder: Path, shown: Path) -> dict[str, Path]:
    """Make empty files for the library to see, and tell which file each of them stands for."""
    real: dict[str, Path] = {}
    for path in files:
        name = (
            path.relative_to(folder).as_posix().replace("::", "\ua789\ua789")
        )  # the library takes "::" for an address
        if not any(f".{part}" in _LIBRARY_SUFFIXES for part in Path(name).name.split(".")[1:]):
            name += ".jsonl" if _kind_of_reader(path) == "JSON" else check_suffix(path).suffix
        while str(shown / name) in real:
            name = str(Path(name).with_name(f"_{Path(name).name}"))
        stand_in = shown / name
        stand_in.parent.mkdir(parents=True, exist_ok=True)
        stand_in.touch()
        real[str(stand_in)] = path
    return real


def _open_saved(folder: Path, *, config: str | None, split: str) -> Table:
    import datasets

    if config is not None:
        raise UserError(f"{folder}: a saved data set has no configurations; leave dataset_config at none")
    with _explained(str(folder), local=True):
        saved = datasets.load_from_disk(str(folder))
    if isinstance(saved, dict):  # the library's DatasetDict: one data set for each split
        saved = _chosen_split(folder, saved, split)
    elif split != "train":
        raise UserError(
            f"{folder}: a saved data set without splits was asked for {split!r}; leave dataset_split at train"
        )
    if not len(saved):
        raise UserError(f"{folder}: holds no rows; expected at least one prompt")
    saved = saved.with_format(None)

    def read(chosen: Sequence[str] | None) -> Iterator[object]:
        with _explained(str(folder), local=True):
            yield from saved if chosen is None else saved.select_columns(list(chosen))

    fingerprint = f"arrow sha256:{content_hash([Path(file['filename']) for file in saved.cache_files])}"
    rows = Count(len(saved), exact=True)
    return Table(str(folder), fingerprint, saved.column_names, read, local=True, counted=lambda: rows)


def _chosen_split(folder: Path, splits: Any, split: str) -> Any:
    if split not in splits:
        raise UserError(f"{folder}: has no split {split!r}; set dataset_split to one of: {', '.join(map(str, splits))}")
    return splits[split]
