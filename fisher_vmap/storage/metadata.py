"""metadata.yaml: the run in words, for people and for readers that know nothing of index.json."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from fisher_vmap.errors import UserError
from fisher_vmap.storage.atomic import replacing
from fisher_vmap.storage.fingerprint import plain_values
from fisher_vmap.storage.index import Index
from fisher_vmap.storage.reading import ShardReader


def describe_run(index: Index, readers: Iterable[ShardReader], settings: dict[str, Any]) -> dict[str, Any]:
    """Number of prompts, shapes, failed and skipped prompts with their reasons, settings and versions.

    `bias_dim` is D, or {layer: D} where the layers differ.
    """
    without: dict[str, list[dict[str, Any]]] = {"failed": [], "skipped": []}
    for reader in readers:
        columns = (reader.table.column(name).to_pylist() for name in ("prompt_index", "status", "reason"))
        for prompt, status, reason in zip(*columns, strict=True):
            if status in without:
                without[status].append({"index": prompt, "reason": reason})
    widths = index.layout.widths
    return {
        "num_prompts": index.stop,
        "num_singular_values": index.layout.rank,
        "top_k_tokens": index.layout.top_k,
        "layers": list(widths),
        "bias_dim": dict(widths) if len(set(widths.values())) > 1 else next(iter(widths.values())),
        "vectors_dtype": index.layout.vectors_dtype,
        "failed_prompts": without["failed"],
        "skipped_prompts": without["skipped"],
        "settings": plain_values(settings),
        "resolved": index.resolved,
        "versions": index.versions,
    }


def write_metadata(path: Path, metadata: dict[str, Any]) -> None:
    """Write metadata.yaml.

    Raises:
        UserError: the folder cannot be written.
    """
    text = yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True, width=120)
    with replacing(path) as file:
        file.write(text.encode())


def read_metadata(path: Path, text: bytes) -> dict[str, Any]:
    """Parse metadata.yaml.

    Raises:
        UserError: it is not what `write_metadata` writes.
    """
    try:
        metadata = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(metadata, dict):
        raise UserError(f"{path} is not a metadata.yaml of a results folder")
    return metadata
