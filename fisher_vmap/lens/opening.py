"""Open a fit: the model, its layers and the data, compared with what the folder holds."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fisher_vmap.data.prompts import PromptSource, ShardPrompts
from fisher_vmap.data.render import Renderer
from fisher_vmap.errors import UserError
from fisher_vmap.fisher_model import FisherModel
from fisher_vmap.lens.flags import LensSettings
from fisher_vmap.lens.folder import inspect, read_info, remove, told, write_info
from fisher_vmap.lens.matrices import FIELD_ELEMENTS
from fisher_vmap.lens.sums import Shard, Sums, part_files, stored_shards
from fisher_vmap.load.model import Loaded, load_model
from fisher_vmap.model.layers import decoder_blocks
from fisher_vmap.progress import step
from fisher_vmap.results.files import folder_lock, readable_write_errors
from fisher_vmap.results.folder import compare_fingerprints, plain_values, remove_stale
from fisher_vmap.results.index import SHARD_FOLDER, installed_versions
from fisher_vmap.run.fingerprint import fingerprint
from fisher_vmap.run.open import loading_of, make_renderer, open_model


class Fit(NamedTuple):
    """An opened fit.

    Attributes:
        settings: of the fit.
        folder: where its sums go.
        mark: identifies it.
        fisher: the model, with the layers.
        numbers: layer -> the number of its block.
        prompts: the data.
        renderer: turns them into tokens.
    """

    settings: LensSettings
    folder: Path
    mark: str
    fisher: FisherModel
    numbers: dict[str, int]
    prompts: ShardPrompts
    renderer: Renderer

    def parts(self) -> dict[int, tuple[Path, Shard]]:
        """The stored shards."""
        return stored_shards(part_files(self.folder), self.mark)

    def joined(self) -> Sums:
        """The sums of all parts together."""
        return Sums.joined([Sums.load(path) for path in part_files(self.folder)])


def load(settings: LensSettings) -> Loaded:
    """Load the model; a resumed fit keeps the precision of its folder."""
    info = inspect(settings)
    stored = {} if info is None or settings.precision != "auto" else {"precision": info["fingerprint"]["precision"]}
    return load_model(settings.model_path, **loading_of(settings) | stored)


def open_fit(settings: LensSettings, loaded: Loaded, source: PromptSource) -> Fit:
    """Open a fit: find the layers and compare the folder, or begin it.

    Raises:
        UserError: settings do not fit the model, the data or the folder.
    """
    with step("finding the layers"):
        blocks = list(decoder_blocks(loaded.model))
        if settings.hook_layer_name == "all":  # the last block's J is the identity
            settings = settings.model_copy(update={"hook_layer_name": tuple(range(max(1, len(blocks) - 1)))})
        fisher = open_model(settings, loaded)
    numbers = _numbers(fisher.layers, blocks)
    width = next(iter(fisher.widths.values()))
    if settings.max_batch_tokens == "auto":
        fisher.max_batch_tokens = max(1, FIELD_ELEMENTS.get(fisher.device.type, FIELD_ELEMENTS["cpu"]) // width**2)
    marks = fingerprint(settings, loaded, source, fisher)
    for name in ("until", "batch_size", "max_batch_tokens", "cotangent_chunk"):
        marks.pop(name, None)
    folder = Path(settings.output_dir)
    info = inspect(settings)
    if info is not None:
        compare_fingerprints(folder, info["fingerprint"] | {"shard_size": info["shard_size"]},
                             marks | {"shard_size": settings.shard_size})  # fmt: skip
    renderer = make_renderer(settings, loaded, source, (info or {}).get("template_date"))
    marks = plain_values(marks)
    new: dict[str, Any] = {
        "fingerprint": marks,
        "shard_size": settings.shard_size,
        "template_date": renderer.template_date,
        "threads": torch.get_num_threads(),
        "layers": numbers,
        "model": told(settings, "model_path"),
        "data": told(settings, "dataset_name"),
        "precision": loaded.precision.stored(),
        "versions": installed_versions(),
    }
    with readable_write_errors(folder, "choose another --output_dir"):
        folder.mkdir(parents=True, exist_ok=True)
    with folder_lock(folder):
        if settings.overwrite:
            remove(folder)
        info = read_info(folder)  # another process may have begun it meanwhile
        if info is None:
            info = new
            write_info(folder, info)  # before any other file, by which `inspect` knows the folder
        with readable_write_errors(folder, "choose another --output_dir"):
            (folder / SHARD_FOLDER).mkdir(exist_ok=True)
    remove_stale(folder)
    compare_fingerprints(folder, info["fingerprint"], marks)
    if info["threads"] != torch.get_num_threads():
        torch.set_num_threads(info["threads"])  # sums split over threads differ in their last bits
    mark = hashlib.sha256(json.dumps(info["fingerprint"], sort_keys=True).encode()).hexdigest()[:16]
    return Fit(settings, folder, mark, fisher, numbers, ShardPrompts(source, settings.shard_size), renderer)


def _numbers(layers: Sequence[str], blocks: Sequence[str]) -> dict[str, int]:
    """Layer -> the number of its block.

    Raises:
        UserError: a layer is no block, or the last one.
    """
    if other := [layer for layer in layers if layer not in blocks]:
        raise UserError(f"{other[0]} is no decoder block, and a lens is of blocks; give numbers, or names such as "
                        f"{blocks[0]}")  # fmt: skip
    if blocks[-1] in layers and len(blocks) > 1:
        raise UserError(f"{blocks[-1]} is the last block, whose J is the identity; leave it out")
    return {layer: blocks.index(layer) for layer in layers}
