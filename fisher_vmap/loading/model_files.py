"""The files that a model is made of, and what identifies them."""

import hashlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path


def model_files(folder: Path) -> list[Path]:
    """The files that make a model and its tokenizer; not what a trainer leaves beside them."""
    weights = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))
    weights = [path for path in weights if not path.name.startswith("adapter_")]
    others = {path for pattern in ("config.json", "*.py") for path in folder.glob(pattern)}
    return sorted(path for path in {*weights, *others, *tokenizer_files(folder)} if path.is_file())


def tokenizer_files(folder: Path) -> list[Path]:
    """The files that make a tokenizer, its chat template among them."""
    patterns = (
        "tokenizer*",
        "special_tokens_map.json",
        "added_tokens.json",
        "vocab*",
        "merges.txt",
        "*.model",
        "*.jinja",
    )
    return sorted(path for pattern in patterns for path in folder.glob(pattern) if path.is_file())


def hashed(paths: Sequence[Path]) -> dict[str, str]:
    """The SHA-256 of each file by its name. Two fine-tuned models may differ in nothing but their weights."""

    def sha256(path: Path) -> str:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    with ThreadPoolExecutor(8) as threads:  # which hashing leaves to one another
        return dict(zip([path.name for path in paths], threads.map(sha256, paths), strict=True))
