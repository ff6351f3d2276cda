"""Local files: the kind of one by its name, its bytes and lines, a JSON document's rows; and a folder's data files."""

from __future__ import annotations

import bz2
import gzip
import hashlib
import io
import lzma
import os
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NamedTuple, cast

from fisher_vmap.errors import UserError, listed

JSON_LINES = (".jsonl", ".ndjson", ".jsonlines")
DELIMITERS = {".csv": ",", ".tsv": "\t"}
SUFFIXES = (*JSON_LINES, ".json", *DELIMITERS, ".parquet", ".arrow", ".txt")
COMPRESSIONS = (".gz", ".zst", ".bz2", ".xz")
Tell = Callable[[str], None]
"""Takes a line that tells what a file was taken for."""

# The end of a sentence that begins with "expected".
EXPECTED = ".jsonl, .json, .csv, .tsv, .parquet, .arrow or .txt, also with .gz, .zst, .bz2 or .xz behind"


class Kind(NamedTuple):
    """What a data file's name says: one of `SUFFIXES`, and one of `COMPRESSIONS` or nothing."""

    suffix: str
    compression: str


def kind_of(path: Path) -> Kind | None:
    """The kind of a data file by its name, in any case of letters; None for any other file."""
    name = path.name.lower()
    compression = next((ending for ending in COMPRESSIONS if name.endswith(ending)), "")
    suffix = Path(name.removesuffix(compression)).suffix
    return Kind(suffix, compression) if suffix in SUFFIXES else None


def check_suffix(path: Path) -> Kind:
    """The kind of a data file.

    Raises:
        UserError: its name does not tell one.
    """
    kind = kind_of(path)
    if kind is None:
        raise UserError(f"{path}: a file of unknown kind; expected {EXPECTED}")
    return kind


@contextmanager
def readable_errors(path: Path) -> Iterator[None]:
    """Within the context, an error of reading the file is a UserError that names it."""
    try:
        yield
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        reason = " ".join(str(getattr(error, "strerror", None) or error).split())[:200]
        compression = (kind_of(path) or ("", ""))[1]
        if compression and getattr(error, "errno", None) is None:
            raise UserError(
                f"{path}: not {compression} data that can be read to its end ({reason}); write or fetch it again"
            ) from error
        raise UserError(f"{path}: cannot be read ({reason}); check the file") from error


@contextmanager
def opened(path: Path) -> Iterator[IO[bytes]]:
    """A data file's bytes, decompressed."""
    compression = check_suffix(path).compression
    with path.open("rb") as file:
        if compression == ".zst":
            import pyarrow  # 40 MB, needed here only

            yield io.BufferedReader(pyarrow.CompressedInputStream(file, "zstd"))
        elif compression:
            open_packed: Any = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}[compression]
            with open_packed(file) as unpacked:
                yield cast(IO[bytes], unpacked)
        else:
            yield file


def _check_first_line(path: Path, line: bytes) -> None:
    """Raise UserError for what makes a whole file one strange line."""
    head = line[:400]
    zeros = [place % 2 for place, byte in enumerate(head) if byte == 0]
    if head.startswith((b"\xff\xfe", b"\xfe\xff")) or (len(zeros) > len(head) // 3 > 0 and len(set(zeros)) == 1):
        raise UserError(f"{path}: line 1 is UTF-16, not UTF-8; convert the file, as by iconv -f UTF-16 -t UTF-8")
    if not line.endswith(b"\n") and b"\r" in line.rstrip(b"\r"):
        raise UserError(
            rf"{path}: its lines end in carriage returns alone, and it is read as one line; convert it, as by "
            r"tr '\r' '\n'"
        )


def lines_of(path: Path) -> Iterator[tuple[int, str]]:
    """The lines of a UTF-8 file with their numbers from 1; only a line feed ends a line."""
    with opened(path) as file:
        for number, line in enumerate(file, 1):
            if number == 1:
                _check_first_line(path, line)
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise UserError(f"{path}: line {number} is not UTF-8; convert the file to UTF-8") from error
            yield number, text


_PROMPTS = ("prompt", "instruction", "question", "text", "input")  # an object with one of these, a text, is a row


def rows_of_document(path: Path, value: Any, tell: Tell) -> list[Any]:
    """The rows of a JSON document: a list, the list inside an object, columns, or the object itself."""
    if isinstance(value, list):
        return value
    if not isinstance(value, dict):
        return [value]
    data, names = value.get("data"), value.get("columns")
    if isinstance(names, list) and isinstance(data, list) and data and all(_are(list, row) for row in data):
        if any(len(row) != len(names) for row in data):
            raise UserError(f"{path}: a row of its list 'data' is not as long as its list 'columns'; write it again")
        tell(f"{path}: its rows are the list 'data', with the names in 'columns'")
        return [dict(zip(map(str, names), row, strict=True)) for row in data]
    lists = {name: part for name, part in value.items() if _are_objects(part)}
    if "data" in lists:
        return _list_inside(path, value, "data", tell)
    if any(_are_turns(part) or (name in _PROMPTS and _are(str, part)) for name, part in value.items()):
        tell(f"{path}: it is one JSON object, which is taken for one row")
        return [value]
    if value and all(_are(list, part) for part in value.values()) and len(lists) < len(value):
        if len({len(column) for column in value.values()}) > 1:
            raise UserError(f"{path}: the lists in its object differ in length; expected columns of one length")
        tell(f"{path}: its rows are read from an object of columns")
        return [dict(zip(value, row, strict=True)) for row in zip(*value.values(), strict=True)]
    if len(lists) > 1:
        raise UserError(
            f"{path}: its object holds several lists of objects ({listed(list(lists))}); write the one that is meant "
            "into a file of its own"
        )
    if lists:
        return _list_inside(path, value, next(iter(lists)), tell)
    return _keyed(path, value, tell)


def _keyed(path: Path, value: dict[str, Any], tell: Tell) -> list[Any]:
    """The rows of an object of objects: columns by row number, as pandas writes them, or rows by any key."""
    parts = list(value.values())
    if parts and all(isinstance(part, dict) and part for part in parts):
        if all(part.keys() == parts[0].keys() for part in parts) and all(key.isdecimal() for key in parts[0]):
            tell(f"{path}: its rows are read from an object of columns")
            return [{name: column[key] for name, column in value.items()} for key in parts[0]]
        if len(parts) > 1 and set.intersection(*(set(part) for part in parts)):
            tell(f"{path}: its rows are the {len(parts):,} objects in its object, without their keys")
            return parts
    tell(f"{path}: it is one JSON object, which is taken for one row")
    return [value]


def _list_inside(path: Path, value: dict[str, Any], name: str, tell: Tell) -> list[Any]:
    others = [other for other in value if other != name]
    left_out = f"; {listed(others)} beside it {'is' if len(others) == 1 else 'are'} left out" if others else ""
    tell(f"{path}: its rows are the list {name!r}{left_out}")
    rows: list[Any] = value[name]
    return rows


def _are(kind: type, value: object) -> bool:
    return isinstance(value, kind)


def _are_objects(value: object) -> bool:
    """Whether a value is a list of objects that are not the turns of a conversation."""
    return isinstance(value, list) and bool(value) and all(_are(dict, x) for x in value) and not _are_turns(value)


def _are_turns(value: object) -> bool:
    return isinstance(value, list) and any(isinstance(x, dict) and ("role" in x or "from" in x) for x in value)


def content_hash(paths: Sequence[Path]) -> str:
    """The SHA-256 of the files' contents, as hex digits; of several files, that of their hashes in order.

    Raises:
        UserError: a file cannot be read.
    """
    digests = []
    for path in paths:
        with readable_errors(path), path.open("rb") as file:
            digests.append(hashlib.file_digest(file, "sha256").hexdigest())
    return digests[0] if len(digests) == 1 else hashlib.sha256("\n".join(digests).encode()).hexdigest()


# What tokenizers, trainers and saved data sets keep as JSON or text beside a file of the first group.
_SIGNS = ("config.json", "adapter_config.json", "tokenizer_config.json", "dataset_info.json", "state.json")
_OF_MODELS = re.compile(
    r"(.*_)?config\.json|tokenizer.*\.json|(special_tokens_map|added_tokens|vocab|trainer_state|all_results)\.json"
    r"|(vocab|merges)\.txt|.*\.(safetensors|bin)\.index\.json|(dataset_infos?|state|dataset_dict)\.json"
)


# How the vectors begin that `fisher-vmap export` writes for Neuronpedia.
_VECTORS = re.compile(rb'\[\s*\{\s*"modelId":\s*"[^"]*",\s*"layerNumber":')


class FoundFiles(NamedTuple):
    """The data files of a folder, in order of their names, and what beside them is not data, by why."""

    files: list[Path]
    left_out: dict[str, list[str]]


def find_data_files(folder: Path) -> FoundFiles:
    """The files of a folder and the folders below it that may be data; results, exports and models' files are not.

    Hidden files and folders, and those that begin with two underscores, are passed over. Links to folders are not
    followed.
    """
    files: list[Path] = []
    results, models, vectors = [], [], []
    for root, folders, names in os.walk(folder):
        here = Path(root)
        kept = []
        for name in sorted(folders):
            if is_results(here / name):
                results.append(str((here / name).relative_to(folder)))
            elif not name.startswith((".", "__")):
                kept.append(name)
        folders[:] = kept
        beside_a_model = not set(names).isdisjoint(_SIGNS)
        for name in sorted(names):
            path = here / name
            if name.startswith(".") or kind_of(path) is None or not path.is_file():
                continue
            if beside_a_model and _OF_MODELS.fullmatch(name):
                models.append(str(path.relative_to(folder)))
            elif _has_vectors(path):
                vectors.append(str(path.relative_to(folder)))
            else:
                files.append(path)
    left_out = {"results of fisher_vmap": results, "exported vectors": vectors, "a model's files": models}
    return FoundFiles(sorted(files), {why: names for why, names in left_out.items() if names})


def _has_vectors(path: Path) -> bool:
    if path.suffix.lower() != ".json":
        return False
    with readable_errors(path), path.open("rb") as file:
        return _VECTORS.match(file.read(400)) is not None


def is_results(folder: Path) -> bool:
    """Whether a folder is a results folder of ours, finished or not."""
    try:
        from fisher_vmap.results.index import is_index  # pydantic, which the loading of models does without

        return is_index(folder)
    except OSError:
        return False


def refuse_results(name: str, path: Path) -> None:
    """Raise UserError if a path, given as `name`, is a results folder of ours, its shards, or its table."""
    real = path.resolve()
    for home in (real, *real.parents[:2]):
        if is_results(home):
            from fisher_vmap.results.index import INDEX_NAME, SHARD_FOLDER, TABLE_NAME

            inside = real.relative_to(home).parts
            if not inside:
                raise UserError(f"{name} is a results folder of fisher_vmap, not data; correct dataset_name")
            if inside[0] in (SHARD_FOLDER, TABLE_NAME, INDEX_NAME):
                raise UserError(f"{name} belongs to {home}, a results folder of fisher_vmap; correct dataset_name")


def refuse_results_table(name: str, columns: Sequence[str]) -> None:
    """Raise UserError if a table has all columns of the prompts table of a results folder, wherever it lies now."""
    from fisher_vmap.results.index import TABLE_COLUMNS

    if set(TABLE_COLUMNS) - {"crc32", "top_tokens", "prompt_tokens", "audit", "top_probability"} <= set(columns):
        raise UserError(
            f"{name} is the table of a results folder of fisher_vmap, not data; correct dataset_name (the run's "
            "metadata.yaml tells what it read)"
        )
