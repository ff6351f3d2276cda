"""PEFT adapters: find them, find their base model, and merge them into its weights."""

import json
import logging
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers

from fisher_vmap.data.files import spelt_as_path
from fisher_vmap.errors import UserError
from fisher_vmap.kernels.quantized import quantized_linears
from fisher_vmap.model.offload import is_offloaded
from fisher_vmap.model.wrappers import why_not_in_modules

log = logging.getLogger(__name__)

CONFIG = "adapter_config.json"
WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")


class Base(NamedTuple):
    """The model that an adapter was trained on: a hub id or a folder, and its revision on the hub."""

    model_path: str
    revision: str | None


def find_adapter(path: str, revision: str | None, **hub: Any) -> Path | None:
    """The folder of the adapter at a path, downloaded if it is on the hub; None if there is no adapter.

    Args:
        path: a folder or a hub id.
        revision: of a hub repository.
        hub: further arguments of a download, such as `cache_dir`.
    """
    local = Path(path).expanduser()
    if local.is_dir():
        return local if (local / CONFIG).is_file() else None
    if local.exists() or spelt_as_path(path) or path.count("/") > 1:
        return None
    config = transformers.utils.find_adapter_config_file(path, revision=revision, **hub)
    if config is None:
        return None
    from huggingface_hub import snapshot_download

    wanted = ["adapter_*", "*token*", "vocab*", "merges.txt", "*.model", "*.jinja", "config.json"]
    return Path(snapshot_download(path, revision=revision, allow_patterns=wanted, **hub))


def base_of(adapter: Path) -> Base:
    """The base that an adapter names; a folder with a whole model and an adapter is its own base.

    Raises:
        UserError: the adapter's configuration cannot be read or names no base.
    """
    try:
        config = json.loads((adapter / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{adapter / CONFIG} cannot be read ({error}); fetch the adapter again") from error
    weights = (path for kind in ("*.safetensors", "pytorch_model*.bin") for path in adapter.glob(kind))
    whole = any(not path.name.startswith("adapter_") for path in weights)
    if whole and (adapter / "config.json").is_file():  # some trainers save the base's configuration alone
        return Base(str(adapter), None)
    named = config.get("base_model_name_or_path") if isinstance(config, dict) else None
    if not isinstance(named, str) or not named:
        raise UserError(
            f"the adapter in {adapter} names no base model; give that as model_path, and the adapter as adapter_path"
        )
    local = Path(named).expanduser()
    if (spelt_as_path(named) or named.count("/") > 1) and not local.exists():
        raise UserError(
            f"the adapter in {adapter} was trained on {named}, which is not there; give the base model as model_path, "
            "and the adapter as adapter_path"
        )
    return Base(named, config.get("revision"))


def adapter_files(adapter: Path) -> list[Path]:
    """The files of an adapter."""
    return [path for name in (CONFIG, *WEIGHTS) if (path := adapter / name).is_file()]


@contextmanager
def without_adapter(source: str) -> Iterator[str]:
    """A model's hub id or folder; a folder without the adapter in it, which transformers would load as well."""
    if not Path(source, CONFIG).is_file():
        yield source
        return
    with tempfile.TemporaryDirectory(prefix="fisher_vmap-") as scratch:
        for path in Path(source).iterdir():
            if path.name != CONFIG:
                Path(scratch, path.name).symlink_to(path.resolve())
        yield scratch


def with_adapter(model: Any, adapter: Path) -> Any:
    """The model with the adapter merged into its weights, or next to them if they are quantised.

    Args:
        model: the base, in the dtype that it runs in.
        adapter: the folder.

    Raises:
        UserError: peft is missing, the adapter does not fit the model, or it does not act on the model's weights.
    """
    try:
        import peft
    except ImportError as error:
        raise UserError(f"the adapter in {adapter} needs the package peft: pip install 'fisher_vmap[peft]'") from error
    if is_offloaded(model):
        raise UserError(
            f"{type(model).__name__} does not fit in memory, so that the adapter in {adapter} cannot be merged into "
            "it; merge the two first, and give the merged model"
        )
    try:
        if not any((adapter / name).is_file() for name in WEIGHTS):
            raise UserError(f"the adapter in {adapter} has no {WEIGHTS[0]}; fetch it again")
        config = peft.PeftConfig.from_pretrained(str(adapter))
        if reason := why_not_in_modules(config):
            raise UserError(f"the adapter in {adapter} {reason}; give one of another kind, or the merged model")
        _make_room(model, adapter)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about missing weights, which are checked below
            adapted = peft.PeftModel.from_pretrained(model, str(adapter), config=config)
            found = adapted.load_adapter(str(adapter), adapter_name="default")  # again, for its report
        _check_complete(adapter, model, found.missing_keys, found.unexpected_keys)
        if quantized_linears(model):
            log.info("the adapter is kept next to the quantised weights of %s", type(model).__name__)
            return adapted.get_base_model()
        merged = adapted.merge_and_unload(safe_merge=True)
    except UserError:
        raise
    except Exception as error:  # peft may raise anything: other sizes, other modules, damaged files
        message = " ".join(str(error).split())
        raise UserError(
            f"the adapter in {adapter} cannot be put on {type(model).__name__}: is it another model's? "
            f"({type(error).__name__}: {message[:160]})"
        ) from error
    log.info("adapter %s (%s) merged into the weights", adapter, config.peft_type.value)
    return merged


def _check_complete(adapter: Path, model: Any, missing: list[str], unexpected: list[str]) -> None:
    """Raise UserError for an adapter's missing or unexpected weights, which peft ignores."""
    for names, what in ((missing, "lacks"), (unexpected, "has, but the model has no place for,")):
        if names:
            raise UserError(
                f"the adapter in {adapter} {what} {len(names)} weights ({sorted(names)[0]} ...): it is damaged, or "
                f"another model's than {type(model).__name__}; fetch it again, or give its base as model_path"
            )


def _make_room(model: Any, adapter: Path) -> None:
    """Resize the token embeddings to those of the adapter, which may have been trained with added tokens."""
    file = adapter / WEIGHTS[0]
    embedding = model.get_input_embeddings()
    name = next((name for name, module in model.named_modules() if module is embedding), None)
    if name is None or not file.is_file():
        return
    from safetensors import safe_open

    with safe_open(file, framework="pt") as tensors:
        for key in tensors.keys():  # noqa: SIM118 - not a dict
            if key in (f"base_model.model.{name}.weight", f"base_model.model.{name}.base_layer.weight"):
                rows = tensors.get_slice(key).get_shape()[0]
                if rows != embedding.num_embeddings:
                    log.info("the adapter brings %d token embeddings in place of %d", rows, embedding.num_embeddings)
                    with torch.no_grad():
                        model.resize_token_embeddings(rows, mean_resizing=False)
                return
