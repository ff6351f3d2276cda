"""Writing safetensors as a stream: one tensor in memory at a time, and the same bytes for the same numbers.

The library's own writer wants every tensor at once, which for mean.safetensors is L x D x D, and it may order equal
metadata differently from run to run. The format is a length, a JSON header and the raw little-endian numbers; the tests
read what is written here with the library.
"""

import json
import math
from collections.abc import Callable, Mapping
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray

_CODES = {"float16": "F16", "float32": "F32", "float64": "F64", "int64": "I64"}


class TensorSpec(NamedTuple):
    """What the header says of one tensor."""

    dtype: str
    shape: tuple[int, ...]


def code_of(dtype: str) -> str:
    """The safetensors name of a numpy dtype, such as "F16"."""
    return _CODES[dtype]


def write_tensors(file: BinaryIO, specs: Mapping[str, TensorSpec], tensor: Callable[[str], NDArray[Any]]) -> None:
    """Write a safetensors file of the tensors in `specs`, asking `tensor(name)` for each just before it is written.

    Raises:
        ValueError: a tensor has not the shape that its spec announced.
    """
    names, text = _header(specs)
    file.write(len(text).to_bytes(8, "little"))
    file.write(text)
    for name in names:
        dtype, shape = specs[name]
        array = np.ascontiguousarray(tensor(name), dtype=np.dtype(dtype).newbyteorder("<"))
        if array.shape != shape:
            raise ValueError(f"{name} has shape {array.shape}, not {shape} as announced")
        file.write(array.data)


def size_of(specs: Mapping[str, TensorSpec]) -> int:
    """Bytes of the file that `write_tensors` makes."""
    _, text = _header(specs)
    return 8 + len(text) + sum(_bytes(spec) for spec in specs.values())


def _header(specs: Mapping[str, TensorSpec]) -> tuple[list[str], bytes]:
    """The names in the order of the file, and its header."""
    # The widest numbers first keep every tensor aligned, which readers that map the file are glad of.
    names = sorted(specs, key=lambda name: -np.dtype(specs[name].dtype).itemsize)
    header: dict[str, dict[str, object]] = {}
    end = 0
    for name in names:
        dtype, shape = specs[name]
        start, end = end, end + _bytes(specs[name])
        header[name] = {"dtype": _CODES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    return names, text + b" " * (-len(text) % 8)


def _bytes(spec: TensorSpec) -> int:
    return math.prod(spec.shape) * np.dtype(spec.dtype).itemsize
