"""Files of directions for other programs: safetensors, control vectors (GGUF), and Neuronpedia's vectors (JSON).

A control vector is a GGUF file with `general.architecture` "controlvector", `controlvector.model_hint`, the model's
type, `controlvector.layer_count`, and for block N, counted from 0, a tensor "direction.N", float32 [D]. Both programs
add it to the output of block N, where `steer(model, "model.layers.N", ...)` does; llama.cpp cannot steer block 0.
"""

import importlib.util
import json
import os
import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from safetensors.numpy import save_file

from fisher_vmap.errors import UserError
from fisher_vmap.results.files import readable_write_errors, replacing

Float64 = NDArray[np.float64]

DEFAULT_KL = 0.1
"""Nats, of a .json's strengths: a step that shows in the next token and that F still predicts."""

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
    with _in_place_of(path) as temporary:
        save_file(arrays, temporary, metadata=dict(notes) | {"format": "np"})


def save_control_vector(path: str | os.PathLike[str], vectors: Mapping[str, ArrayLike], model_type: str) -> None:
    """Write a control vector for llama.cpp (`--control-vector FILE`) and repeng (`ControlVector.import_gguf`).

    At a scale of 1 the vector is added with its own length.

    Args:
        path: the file, a .gguf.
        vectors: a block's name, such as "model.layers.15", -> [D].
        model_type: what transformers calls the kind of model, such as "llama": `model.config.model_type`.

    Raises:
        UserError: a module that is not a block, block 0, numbers that are not finite, the package `gguf` is missing,
            or the file cannot be written.
    """
    check_control_vector(vectors)
    from gguf import GGUFWriter

    numbered = {_block_number(name): _finite(name, vector) for name, vector in vectors.items()}
    if bad := [vector.shape for vector in numbered.values() if vector.ndim != 1]:
        raise UserError(f"a control vector has one direction a layer, [D]; this one has the shape {bad[0]}")
    with _in_place_of(path) as temporary:
        writer = GGUFWriter(temporary, "controlvector")
        writer.add_string("controlvector.model_hint", model_type)
        writer.add_uint32("controlvector.layer_count", len(numbered))
        for number, vector in sorted(numbered.items()):
            writer.add_tensor(f"direction.{number}", vector)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def check_control_vector(layers: Iterable[str]) -> None:
    """Raise UserError, as `save_control_vector` does, unless these layers can stand in a control vector."""
    if importlib.util.find_spec("gguf") is None:
        raise UserError("control vectors need the package gguf: pip install 'fisher_vmap[gguf]'")
    numbered = {name: _block_number(name) for name in layers}
    if first := [name for name, number in numbered.items() if number == 0]:
        raise UserError(
            f"{first[0]} is block 0, which llama.cpp cannot steer; take a higher layer, or a .safetensors file"
        )


def _block_number(name: str) -> int:
    found = _BLOCK.search(name)
    if found is None:
        raise UserError(
            f"{name} is not a block of the model, and such a file is for the output of blocks: name blocks with "
            "--layer, or write a .safetensors file"
        )
    return int(found[1])


class Direction(NamedTuple):
    """A direction, and how much the output changes along it."""

    vector: Float64
    """[D]."""
    curvature: float
    """v^T F v along its unit vector v, in nats^2 per squared unit of the residual stream."""
    label: str

    def length(self, kl: float) -> float:
        """The length sqrt(2 kl / v^T F v) of a step whose predicted KL divergence at the next token is `kl` nats.

        Raises:
            UserError: no step along it changes anything.
        """
        if not self.curvature > 0:
            raise UserError(f"{self.label} changes nothing: no length of it has a KL of {kl:g} nats")
        return float(np.sqrt(2 * kl / self.curvature))


def save_neuronpedia(
    path: str | os.PathLike[str], directions: Mapping[str, Sequence[Direction]], model_id: str, kl: float = DEFAULT_KL
) -> None:
    """Write a JSON list of vectors, each the body of a request to Neuronpedia's `/api/vector/new`.

    Args:
        path: the file.
        directions: a block's name, such as "model.layers.15" (its output is "blocks.15.hook_resid_post" there), ->
            directions [D], of any length; the file has unit vectors.
        model_id: Neuronpedia's name of the model, such as "gemma-2-2b".
        kl: nats; the default strength of a vector is `Direction.length(kl)`.

    Raises:
        UserError: a module that is not a block, a direction that is not finite or changes nothing, or the file cannot
            be written.
    """
    vectors = [
        {
            "modelId": model_id,
            "layerNumber": _block_number(layer),
            "hookType": "hook_resid_post",
            # nine digits give back the same float32
            "vector": [float(f"{x:.9g}") for x in _finite(layer, each.vector / np.linalg.norm(each.vector))],
            "vectorDefaultSteerStrength": each.length(kl),
            "vectorLabel": each.label,
        }
        for layer, some in directions.items()
        for each in some
    ]
    with replacing(Path(os.path.expanduser(path))) as file:
        file.write(json.dumps(vectors, indent=1).encode())


def _finite(name: str, values: ArrayLike) -> NDArray[np.float32]:
    array = np.ascontiguousarray(values, np.float32)
    if not np.isfinite(array).all():
        raise UserError(f"the direction of {name} is not finite; was a prompt without numbers chosen?")
    return array


def holds_a_step(path: Path) -> bool:
    """Whether a file is empty, or a step that this package has written as safetensors, or a control vector."""
    with readable_write_errors(path), open(path, "rb") as file:
        head = file.read(2**16)
    if not head or path.suffix == ".gguf":
        return not head or b"controlvector" in head
    try:
        header = json.loads(head[8 : 8 + int.from_bytes(head[:8], "little")])
        return "step" in header and "fisher_vmap" in header["__metadata__"]
    except (ValueError, KeyError, TypeError):
        return False


@contextmanager
def _in_place_of(given: str | os.PathLike[str]) -> Iterator[str]:
    """A temporary path for a library that writes by name; at the end the file is moved to the given one."""
    path = Path(os.path.expanduser(given))
    path = Path(os.path.realpath(path)) if path.is_symlink() else path  # a link stays one
    with readable_write_errors(path), tempfile.TemporaryDirectory(prefix=f".{path.name}~", dir=path.parent) as folder:
        temporary = Path(folder, path.name)
        yield str(temporary)
        temporary.replace(path)
