"""Upload a results folder to the Hugging Face hub, as a data set with a card, and download one.

Prompt texts are left out on request, and paths of this machine are cut to their last part. The copy that is uploaded
is a valid results folder.
"""

import logging
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from glob import escape
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from fisher_vmap.errors import UserError
from fisher_vmap.progress import readable, step
from fisher_vmap.results.card import data_card
from fisher_vmap.results.files import readable_write_errors, replacing, sha256_of
from fisher_vmap.results.index import (
    INDEX_NAME,
    METADATA_NAME,
    SHARD_FOLDER,
    TABLE_NAME,
    FileEntry,
    Index,
    ShardEntry,
    sum_name,
    write_index,
)
from fisher_vmap.results.local_paths import without_local_paths
from fisher_vmap.results.outputs import metadata_of, table_of, write_metadata, write_table
from fisher_vmap.results.shard_reader import ShardReader, readers

HUB = "hf://datasets/"
_NAME = re.compile(r"([\w.-]+/[\w.-]+)(?:@([\w./-]+))?/?")
TEXTS = ("text", "prompt_tokens", "completions", "completion_tokens", "completion_ids")  # and the kept columns
_DESCRIPTIONS = (INDEX_NAME, METADATA_NAME)  # the files that hold the run's settings

log = logging.getLogger(__name__)


class Address(NamedTuple):
    """A repository on the hub; revision None is its main branch."""

    repo_id: str
    revision: str | None


def address(text: str) -> Address:
    """Read "hf://datasets/OWNER/NAME", with "@REVISION" if wanted, or "OWNER/NAME".

    Raises:
        UserError: it is neither.
    """
    found = _NAME.fullmatch(text.removeprefix(HUB))
    if found is None:
        raise UserError(f"{text!r} is no data set on the hub; expected {HUB}OWNER/NAME or {HUB}OWNER/NAME@REVISION")
    return Address(found[1], found[2])


def download(text: str, *, everything: bool = False, token: str | None = None) -> Path:
    """Fetch a results folder into the hub's cache, unless it is there already.

    Args:
        text: its address.
        everything: fetch the npz too, which repeats what the shards hold.
        token: of the hub; None: as `hf auth login` left it.

    Raises:
        UserError: no such address, no access, or no network.
    """
    from huggingface_hub import snapshot_download

    place = address(text)
    with _readable_errors(place.repo_id), step(f"fetching {place.repo_id}"):
        folder = snapshot_download(
            place.repo_id,
            repo_type="dataset",
            revision=place.revision,
            token=token,
            ignore_patterns=None if everything else ["*.npz"],
        )
    return Path(folder)


def push_to_hub(
    folder: Path,
    index: Index,
    repo: str,
    *,
    private: bool = True,
    share_text: bool | None = None,
    token: str | None = None,
) -> str:
    """Upload a finished results folder with a data card: `Results.push_to_hub` describes the arguments."""
    from huggingface_hub import HfApi

    place = address(repo)
    if not index.complete:
        raise UserError(f"{folder} is unfinished; give the command of its run again to finish it, then push it")
    api = HfApi(token=token)
    with step("looking for the prompts' text"):
        texts = _has_text(folder, index)
    if texts and share_text is not False and (gate := _gated(api, index)):
        if share_text is None:
            raise UserError(
                f"{gate}, and its text would be shared with the results; pass share_text=True (--text) if its terms "
                "allow that, or share_text=False (--no-text) to leave the text out"
            )
        log.warning("%s: the text of %d prompts is shared in %s", gate, index.prompts, place.repo_id)
    with _readable_errors(place.repo_id), tempfile.TemporaryDirectory(prefix="fisher_vmap-") as temporary:
        source, with_text = folder, texts and share_text is not False
        if texts and not with_text:
            source = Path(temporary, "results")
            with step("copying the results without the text"):
                index = _copy_without_text(folder, index, source)
        metadata = metadata_of(source, index)
        settings = metadata["settings"]
        metadata["settings"] = without_local_paths(settings, index)
        if cut := [name for name, value in settings.items() if metadata["settings"][name] != value]:
            log.info("of %s, paths of this machine, only the last part is shared", ", ".join(cut))
        described = Path(temporary, "described")
        index = _write_descriptions(described, index, metadata)
        url = api.create_repo(place.repo_id, repo_type="dataset", private=private, exist_ok=True)
        where: dict[str, Any] = {"repo_id": place.repo_id, "repo_type": "dataset", "revision": place.revision}
        with step("writing the data card"):
            card = data_card(index, metadata, table_of(source, index).to_pandas(), place.repo_id, with_text)
        api.upload_file(path_or_fileobj=card.encode(), path_in_repo="README.md", commit_message="Data card", **where)
        names = [name for name in _file_names(index) if name not in _DESCRIPTIONS]
        size = readable(sum((source / name).stat().st_size for name in names))
        with step(f"uploading {size} to {place.repo_id}"):
            api.upload_folder(
                folder_path=source,
                allow_patterns=[escape(name) for name in names],  # a layer's name may look like a pattern
                # Files of an earlier upload would not match the index.
                delete_patterns=[f"{SHARD_FOLDER}/*", "*.safetensors", "*.npz", "*.parquet"],
                commit_message="Fisher matrices",
                **where,
            )
        api.upload_folder(
            folder_path=described, allow_patterns=list(_DESCRIPTIONS), commit_message="Index and settings", **where
        )
    return str(url)


def _file_names(index: Index) -> list[str]:
    """The files that belong to a finished folder."""
    names = [INDEX_NAME, *index.files, *([sum_name(index.folded)] if index.sum else [])]
    for shard in index.shards:
        names += [f"{SHARD_FOLDER}/{name}" for name in ([] if shard.folded else [shard.file]) + [shard.table]]
    return names


def _has_text(folder: Path, index: Index) -> bool:
    return any(
        reader.table.column(name).null_count < reader.table.num_rows
        for reader in readers(folder, index)
        for name in (*TEXTS, *index.layout.keep_columns)
        if name in reader.table.schema.names
    )


def _gated(api: Any, index: Index) -> str | None:
    """Why the user must decide about the text; None for a local file or an open data set."""
    from huggingface_hub.errors import HfHubHTTPError

    read_from = re.match(r"hub (\S+) ", str(index.fingerprint.get("data")))
    if read_from is None:
        return None
    source = read_from[1]
    try:
        gate = api.dataset_info(source).gated
    except (*HfHubHTTPError.__bases__,) as error:  # type: ignore[misc]  # the HTTP client's, and the system's own
        return f"whether {source} is gated cannot be looked up ({type(error).__name__})"
    return f"{source} is a gated data set" if gate else None


@contextmanager
def _readable_errors(repo_id: str) -> Iterator[None]:
    """Turn errors of the hub and the network into one-line errors."""
    from huggingface_hub import errors

    try:
        yield
    except errors.GatedRepoError as error:
        raise UserError(f"{repo_id} is gated: accept its terms on its page, then `hf auth login`") from error
    except errors.RepositoryNotFoundError as error:
        raise UserError(
            f"the hub has no data set {repo_id}, or hides it: check the name and `hf auth login`"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise UserError(f"{repo_id} has no such revision; check what follows the @") from error
    except (*errors.HfHubHTTPError.__bases__,) as error:  # type: ignore[misc]  # also the HTTP client's, the system's
        reason = " ".join(str(error).split())[:160]
        raise UserError(
            f"no access to {repo_id} on the hub ({reason}); see to the network and `hf auth login`"
        ) from error


def _write_descriptions(target: Path, index: Index, metadata: dict[str, Any]) -> Index:
    """Write metadata.yaml and an index.json that matches it, without local paths; returns that index."""
    with readable_write_errors(target):
        target.mkdir(parents=True)
    write_metadata(target / METADATA_NAME, metadata)
    changed = {
        "settings": None if index.settings is None else without_local_paths(index.settings, index),
        "fingerprint": without_local_paths(index.fingerprint, index),
    }
    written = _with_file(index.model_copy(update=changed), target / METADATA_NAME)
    write_index(target, written)
    return written


def _copy_without_text(folder: Path, index: Index, target: Path) -> Index:
    """Copy a finished folder without texts and tokens; files of numbers are linked where possible."""
    with readable_write_errors(target):
        (target / SHARD_FOLDER).mkdir(parents=True)
        for name in _file_names(index):
            if name != INDEX_NAME and not name.endswith(".parquet"):
                _link(folder / name, target / name)
        shards = tuple(_copy_rows(reader, target) for reader in readers(folder, index))
    layout = index.layout.model_copy(update={"store_text": False})
    copied = index.model_copy(update={"shards": shards, "layout": layout})
    if TABLE_NAME in index.files:
        write_table(target / TABLE_NAME, lambda: readers(target, copied), copied)
        copied = _with_file(copied, target / TABLE_NAME)
    write_index(target, copied)
    return copied


def _with_file(index: Index, path: Path) -> Index:
    return index.model_copy(update={"files": {**index.files, path.name: FileEntry.of(path)}})


def _copy_rows(reader: ShardReader, target: Path) -> ShardEntry:
    """Copy a shard's rows of the table without texts; returns its new entry."""
    table = reader.table
    for name in (*TEXTS, *reader.layout.keep_columns):
        place = table.schema.get_field_index(name)
        if place >= 0 and _holds_text(table.schema.field(place).type):
            field = table.schema.field(place)
            table = table.set_column(place, field, pa.nulls(table.num_rows, field.type))
    path = target / SHARD_FOLDER / reader.entry.table
    with replacing(path) as file:
        pq.write_table(table, file, compression="zstd")
    return reader.entry.model_copy(update={"table_sha256": sha256_of(path), "table_bytes": path.stat().st_size})


def _holds_text(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_list(kind))


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source.resolve(), target)
    except OSError:  # another file system, or one without links
        shutil.copyfile(source, target)
