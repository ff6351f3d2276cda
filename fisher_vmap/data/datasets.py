"""Tables of data sets of the hub and of folders, by the `datasets` library.

A hub data set is streamed. For a folder the library only says which files make up a split; `files.py` reads them. A
data set's script is never run. The library is imported when it is first asked: local files and Python's lists of token
ids do without it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError
from pyarrow import ArrowException

from fisher_vmap.data.files import Table, check_suffix, content_hash, table_of_files
from fisher_vmap.errors import UserError

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


def _explain(error: Exception, name: str, *, local: bool) -> str:
    """One line: what is wrong with the data set, and what to do about it."""
    import datasets

    reason = " ".join(str(error).split())[:300] or type(error).__name__
    if isinstance(error, GatedRepoError) or "gated dataset" in reason:
        page = f"https://huggingface.co/datasets/{name}"
        return f"data set {name} is gated: accept its terms on {page}, then run `hf auth login`"
    if "scripts are no longer supported" in reason:
        return f"data set {name} needs a script of its own, which is never run; use a data set of plain data files"
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
        return f"data set {name}: no data files ({reason}); expected .jsonl, .json, .csv, .parquet or .txt files"
    if reason.startswith("Bad split"):
        return f"data set {name}: {reason}; correct dataset_split"
    if reason.startswith(("BuilderConfig", "Config name")):
        return f"data set {name}: {reason}; correct dataset_config"
    advice = "its files may be empty or damaged" if local else "check dataset_name, or the network"
    return f"data set {name} cannot be read ({type(error).__name__}: {reason}); {advice}"


@contextmanager
def _explained(name: str, *, local: bool) -> Iterator[None]:
    import datasets

    try:
        yield
    except UserError:
        raise
    except (*_PROBLEMS, datasets.exceptions.DatasetsError) as error:
        raise UserError(_explain(error, name, local=local)) from error


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
    return Table(f"data set {name}", fingerprint, columns, read, local=False)


def open_folder(folder: Path, *, config: str | None, split: str) -> Table:
    """Open a folder of data files in splits by the conventions of the hub, or one that `save_to_disk` wrote.

    Args:
        folder: the folder.
        config: a configuration that the folder's README.md defines, or None for its default one.
        split: the split.

    Raises:
        UserError: there is no such split or configuration, or no file can be read.
    """
    import datasets

    if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
        return _open_saved(folder, config=config, split=split)
    with _explained(str(folder), local=True):
        # The absolute path, since a relative one might also be the name of a data set or of a format.
        files = datasets.load_dataset_builder(str(folder.resolve()), config).config.data_files
    paths = [Path(file) for file in _chosen_split(folder, files, split)]
    for path in paths:
        check_suffix(path)
    return table_of_files(str(folder), paths)


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
    return Table(str(folder), fingerprint, saved.column_names, read, local=True)


def _chosen_split(folder: Path, splits: Any, split: str) -> Any:
    if split not in splits:
        raise UserError(f"{folder}: has no split {split!r}; set dataset_split to one of: {', '.join(map(str, splits))}")
    return splits[split]
