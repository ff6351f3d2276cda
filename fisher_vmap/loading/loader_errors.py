"""Calls of other libraries' loaders: what can go wrong in them becomes one line, and their bars are not shown."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import transformers

from fisher_vmap.errors import UserError


@contextmanager
def quiet_progress() -> Iterator[None]:
    """Without the progress bars of transformers: ours is the only one on the screen."""
    shown = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers.utils.logging.enable_progress_bar()


def refuse_empty(model_path: str, tokenizer: Any) -> None:
    """Raise UserError for the tokenizer that transformers makes of no files: special tokens, and no others."""
    if len(tokenizer) <= len(set(tokenizer.all_special_ids)):
        raise UserError(
            f"the tokenizer of {model_path} gives no tokens for any text; save its tokenizer into the folder "
            "(tokenizer.save_pretrained)"
        )


def explained(model_path: str, what: str, load: Any, *source: Any, **options: Any) -> Any:
    """Load a part; what can go wrong outside this package becomes one line."""
    try:
        return load(*source, **options)
    except Exception as error:
        message = " ".join(str(error).split())
        if re.search(r"gated repo|is restricted|\b40[13] Client Error", message):
            todo = "it is gated: accept its terms on its page, then `hf auth login`"
        elif "trust_remote_code" in message:
            todo = "it brings code of its own: read that, then set trust_remote_code: true"
        elif isinstance(error, torch.OutOfMemoryError | MemoryError):
            todo = "it does not fit in memory: try device_map auto, another device or dtype"
        elif isinstance(error, ImportError):
            todo = "it needs a package that is not here: install that"
        elif (
            "huggingface.co" in message
            or "is not a valid model identifier" in message
            or "not a local folder" in message
        ):
            todo = "the hub does not answer or has no such model: check the name, the network and `hf auth login`"
        elif what == "tokenizer":
            todo = "put the tokenizer's files beside the model's"
        else:
            todo = "fetch it again, or give another model"
        first = message[:160] + ("..." if len(message) > 160 else "")
        raise UserError(
            f"the {what} of {model_path} cannot be loaded: {todo} ({type(error).__name__}: {first})"
        ) from error
