"""Directions as files: safetensors, and the control vectors that llama.cpp and repeng read.

A control vector is a GGUF file with `general.architecture` "controlvector", `controlvector.model_hint`, the model's
type, `controlvector.layer_count`, and for block N, counted from 0, a tensor "direction.N", float32 [D]. Both programs
add it to the output of block N, where `steer(model, "model.layers.N", ...)` does; llama.cpp cannot steer block 0.
"""

import importlib.util
import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, NDArray
from safetensors.numpy import save_file

from fisher_vmap.errors import UserError
from fisher_vmap.storage.atomic import readable_write_errors

_BLOCK = re.compile(r"(?:^|\.)(\d+)$")


def save_directions(path: str | os.PathLike[str], directions: Mapping[str, ArrayLike], **notes: str) -> None:
    """Write directions as safetensors: a float32 tensor, [D] or [N, D], under each name.

    Args:
        path: the file.
        directions: name, such as a layer's, -> numbers.
        notes: kept as the file's metadata.

    Raises:
        UserError: numbers that are not finite, or the file cannot be written.
    """
    arrays = {name: _finite(name, values) for name, values in directions.items()}
    with _in_place_of(Path(path)) as temporary:
        save_file(arrays, temporary, metadata=dict(notes) | {"format": "np"})


def save_control_vector(path: str | os.PathLike[str], vectors: Mapping[str, ArrayLike], model_type: str) -> None:
    """Write a control vector for llama.cpp (`--control-vector FILE`) and repeng (`ControlVector.import_gguf`).

    Its length is what is added at a scale of 1.

    Args:
        path: the file, a .gguf.
        vectors: a block's name, such as "model.layers.15", -> [D].
        model_type: what transformers calls the kind of model, such as "llama": `model.config.model_type`.

    Raises:
        UserError: a module that is no block, block 0, numbers that are not finite, no package `gguf`, or the file
            cannot be written.
    """
    if importlib.util.find_spec("gguf") is None:
        raise UserError("control vectors need the package gguf: pip install 'fisher_vmap[gguf]'")
    from gguf import GGUFWriter

    numbered = {_block_number(name): _finite(name, vector) for name, vector in vectors.items()}
    if bad := [vector.shape for vector in numbered.values() if vector.ndim != 1]:
        raise UserError(f"a control vector has one direction a layer, [D]; this one has the shape {bad[0]}")
    with _in_place_of(Path(path)) as temporary:
        writer = GGUFWriter(temporary, "controlvector")
        writer.add_string("controlvector.model_hint", model_type)
        writer.add_uint32("controlvector.layer_count", len(numbered))
        for number, vector in sorted(numbered.items()):
            writer.add_tensor(f"direction.{number}", vector)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def _block_number(name: str) -> int:
    found = _BLOCK.search(name)
    if found is None:
        raise UserError(f"{name} is no block of the model; a control vector is added to the output of blocks alone")
    if int(found[1]) == 0:
        raise UserError(f"{name} is block 0, which llama.cpp cannot steer; take a higher layer, or a .safetensors file")
    return int(found[1])


def _finite(name: str, values: ArrayLike) -> NDArray[np.float32]:
    array = np.ascontiguousarray(values, np.float32)
    if not np.isfinite(array).all():
        raise UserError(f"the direction of {name} is not finite; was a prompt without numbers chosen?")
    return array


@contextmanager
def _in_place_of(path: Path) -> Iterator[str]:
    """A temporary name beside `path` for a library that writes by name; it takes the file's place at the end."""
    with readable_write_errors(path), tempfile.TemporaryDirectory(prefix=f".{path.name}~", dir=path.parent) as folder:
        temporary = Path(folder, path.name)
        yield str(temporary)
        temporary.replace(path)
