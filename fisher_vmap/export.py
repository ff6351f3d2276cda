"""`python -m fisher_vmap.export DIR OUT`: write directions, an npz, or the whole folder for other programs.

A control vector is a GGUF file with `general.architecture` "controlvector", `controlvector.model_hint`, the model's
type, `controlvector.layer_count`, and for block N, counted from 0, a tensor "direction.N", float32 [D]. Both programs
add it to the output of block N, where `steer(model, "model.layers.N", ...)` does; llama.cpp cannot steer block 0.
"""

import sys

if __name__ == "__main__":
    from fisher_vmap.__main__ import start

    sys.exit(start("export"))

import argparse
import importlib.util
import os
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import ArrayLike, NDArray
from safetensors.numpy import save_file

from fisher_vmap.cli import Parser, add_quiet, command, path_argument
from fisher_vmap.errors import UserError, listed
from fisher_vmap.progress import bar, passing, step
from fisher_vmap.results.files import readable_write_errors
from fisher_vmap.results.hub import HUB
from fisher_vmap.results.kept import is_missing, wanted
from fisher_vmap.results.outputs import write_npz
from fisher_vmap.results.reader import Results, open_results
from fisher_vmap.results.record import several, was
from fisher_vmap.results.shard_reader import Where

NOTHING = ("", "none", "null", "nan", "nat")  # what people type for a missing value

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
    if importlib.util.find_spec("gguf") is None:
        raise UserError("control vectors need the package gguf: pip install 'fisher_vmap[gguf]'")
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


def _block_number(name: str) -> int:
    found = _BLOCK.search(name)
    if found is None:
        raise UserError(f"{name} is not a block of the model; a control vector is added to the output of blocks only")
    if int(found[1]) == 0:
        raise UserError(f"{name} is block 0, which llama.cpp cannot steer; take a higher layer, or a .safetensors file")
    return int(found[1])


def _finite(name: str, values: ArrayLike) -> NDArray[np.float32]:
    array = np.ascontiguousarray(values, np.float32)
    if not np.isfinite(array).all():
        raise UserError(f"the direction of {name} is not finite; was a prompt without numbers chosen?")
    return array


@contextmanager
def _in_place_of(given: str | os.PathLike[str]) -> Iterator[str]:
    """A temporary path for a library that writes by name; at the end the file is moved to the given one."""
    path = Path(os.path.expanduser(given))
    with readable_write_errors(path), tempfile.TemporaryDirectory(prefix=f".{path.name}~", dir=path.parent) as folder:
        temporary = Path(folder, path.name)
        yield str(temporary)
        temporary.replace(path)


Float64 = NDArray[np.float64]

EXAMPLES = """what OUT says:
  NAME.safetensors     directions, a tensor [N, D] for each layer
  NAME.gguf            a control vector for llama.cpp and repeng: one direction a layer
  NAME.npz             U_{i}, S_{i}, V_{i} of every prompt at one layer
  hf://datasets/A/B    the whole folder, to the hub

examples:
  fisher-vmap export fisher_results mean.safetensors --directions 5
  fisher-vmap export fisher_results prompt3.gguf --prompt 3 --scale 0.05
  fisher-vmap export fisher_results code.gguf --where kind=code --against rest --scale -0.05
  fisher-vmap export fisher_results all.npz --layer model.layers.15
  fisher-vmap export fisher_results hf://datasets/me/fisher --no-text"""


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Export; returns the exit code: 0 done, 2 a user's mistake."""
    print(export(_parser().read(argv)))
    return 0


def export(arguments: argparse.Namespace) -> str:
    """Write what the arguments ask for; returns a line that says what was written.

    Raises:
        UserError: the arguments do not fit the folder or each other, or a file is damaged or cannot be written.
    """
    with step(f"opening {arguments.folder}"):
        results = open_results(arguments.folder)
    out = str(arguments.out)
    if out.startswith(HUB):
        url = results.push_to_hub(out, private=not arguments.public, share_text=arguments.text)
        return f"{results.folder} is at {url}"
    layers = [results.at(name).layer for name in arguments.layer or results.layers]
    suffix = Path(out).suffix
    _refuse_what_is_not_for(suffix, arguments)
    if suffix == ".npz":
        if len(layers) > 1:
            raise UserError(f"an npz is of one layer; name it with --layer: {several(layers)}")
        with bar(len(results.index.shards), "shards", f"writing {Path(out).name}") as advance:
            write_npz(Path(out), passing(results.shards(), advance), layers[0])
        return f"{out}: U, S and V of {len(results):,} prompts at {layers[0]}"
    if suffix not in (".safetensors", ".gguf"):
        raise UserError(f"{out} ends in {suffix or 'nothing'}; expected .safetensors, .gguf, .npz or {HUB}OWNER/NAME")
    if suffix == ".gguf" and not arguments.layer:
        layers = _without_block_0(layers)
    count = arguments.directions or 1
    with bar(len(layers), "layers", "finding directions") as advance:
        found = {layer: _directions(results.at(layer), arguments, count) for layer in passing(layers, advance)}
    where = arguments.where or (f"prompt {arguments.prompt}" if arguments.prompt is not None else "all prompts")
    what = f"{where}{f' against {arguments.against}' if arguments.against else ''}"
    if suffix == ".safetensors":
        save_directions(out, found, source=what, scale=str(arguments.scale), model=_model(results))
    else:
        model_type = arguments.model_type or (results.index.resolved or {}).get("model_type")
        if model_type is None:
            raise UserError("the folder does not say what kind of model it is of; add --model-type, such as llama")
        save_control_vector(out, {layer: rows[0] for layer, rows in found.items()}, model_type)
    return f"{out}: {count} direction{'s' * (count > 1)} of {what} at {several(layers)}"


def _refuse_what_is_not_for(suffix: str, arguments: argparse.Namespace) -> None:
    """Raise UserError for a flag that does not apply to this kind of file, and for an impossible value."""
    if suffix == ".npz":
        for name in ("prompt", "where", "against", "directions", "scale"):
            if getattr(arguments, name) is not None:
                raise UserError(f"an npz holds every prompt's U, S and V as they are; leave --{name} out")
    if arguments.directions is not None and arguments.directions < 1:
        raise UserError(f"--directions is {arguments.directions}; expected at least 1")
    if suffix == ".gguf" and arguments.directions not in (None, 1):
        raise UserError(
            f"--directions is {arguments.directions}, but a control vector holds one direction a layer; leave it out "
            "(--first chooses another one), or write a .safetensors file"
        )
    if arguments.first < 0:
        raise UserError(f"--first is {arguments.first}; expected 0, the leading direction, or more")
    if arguments.scale is not None and not (np.isfinite(arguments.scale) and arguments.scale):
        raise UserError(f"--scale is {arguments.scale:g}; expected a length, such as 0.05 or -0.05 residual norms")


def _without_block_0(layers: Sequence[str]) -> list[str]:
    """The layers without block 0, which llama.cpp cannot steer and the user did not name, unless it is the only one."""
    others = [layer for layer in layers if layer.rpartition(".")[2] != "0"]
    if others and len(others) < len(layers):
        print(f"fisher_vmap: {layers[0]} is left out: llama.cpp cannot steer block 0", file=sys.stderr)
    return others or list(layers)


def _directions(view: Results, arguments: argparse.Namespace, count: int) -> Float64:
    """[count, D], of length 1 or --scale residual norms."""
    first, last = arguments.first, arguments.first + count
    if arguments.prompt is not None:
        if not 0 <= arguments.prompt < view.index.stop:
            raise UserError(f"there is no prompt {arguments.prompt}; there are 0 to {view.index.stop - 1}")
        record = view[arguments.prompt]
        if record.status != "ok":
            raise UserError(f"prompt {arguments.prompt} has no directions: it {was(record.status)} ({record.reason})")
        have = int((record.S > 0).sum())
        rows, norm = record.V[first:last].astype(np.float64), record.residual_norm
    else:
        where = condition(view, arguments.where)
        have = view.index.layout.widths[view.layer]
        norm = view.residual_norm(where=where)
        try:
            if arguments.against is None:
                rows = view.directions(min(last, have), where=where).V[first:]
            else:
                against = None if arguments.against == "rest" else condition(view, arguments.against)
                rows = view.contrast(where, against, rank=min(last, have), ridge=arguments.ridge).directions[first:]
        except ValueError as error:
            raise error if isinstance(error, UserError) else UserError(str(error)) from error
    if last > have:
        raise UserError(f"directions {first} to {last - 1} were asked for at {view.layer}; there are 0 to {have - 1}")
    return np.asarray(rows if arguments.scale is None else rows * arguments.scale * norm)


def condition(results: Results, text: str | None) -> Where:
    """The choice of prompts for COLUMN=VALUE, the value read as the column's type; None chooses all.

    An empty value, or one of the words for it, chooses the prompts without a value where the column has no such text.

    Raises:
        UserError: no such column, no such value, or no "=".
    """
    if text is None:
        return None
    column, equals, value = text.partition("=")
    table = results.table()
    if not equals or column not in table.schema.names:
        kept = results.index.layout.keep_columns  # usually chosen by these
        names = [*kept, *(name for name in table.schema.names if name not in kept and "/" not in name)]
        raise UserError(f"{text!r} does not choose prompts; expected COLUMN=VALUE, of {listed(names)}")
    there, kind = table.column(column).to_pylist(), table.schema.field(column).type
    nothing = value.lower() in NOTHING and any(map(is_missing, there))
    if (not nothing or pa.types.is_string(kind)) and any(map(wanted(column, value, kind).holds, there)):
        return {column: value}
    if nothing:
        return {column: None}
    shown = sorted({str(other) for other in there})
    raise UserError(f"no prompt has {column} {value!r}; there is {listed(shown)}")


def _model(results: Results) -> str:
    return str(results.metadata["settings"].get("model_path", ""))


def _parser() -> Parser:
    parser = Parser(
        "export",
        description="Write directions of a results folder, its npz, or the whole folder, for other programs.",
        epilog=EXAMPLES,
    )
    parser.add_argument("folder", metavar="DIR", type=path_argument, help="the results folder, such as fisher_results")
    parser.add_argument("out", metavar="OUT", type=os.path.expanduser, help="where to; its ending says what")
    parser.add_argument("--layer", action="append", help="a layer's name or number; may be repeated; by default all")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--prompt", type=int, metavar="I", help="the directions of this prompt")
    which.add_argument("--where", metavar="COLUMN=VALUE", help="of the mean over these prompts; by default over all")
    parser.add_argument(
        "--against", metavar="COLUMN=VALUE", help="directions that matter for --where and not for these; or 'rest'"
    )
    parser.add_argument(
        "--ridge", type=float, default=0.01, help="of --against, a fraction of the mean eigenvalue (0.01)"
    )
    parser.add_argument("--directions", type=int, metavar="N", help="how many, in a .safetensors (1)")
    parser.add_argument("--first", type=int, default=0, metavar="R", help="the first of them, 0 the leading one")
    parser.add_argument("--scale", type=float, help="length in residual norms, either sign; by default length 1")
    parser.add_argument(
        "--model-type", help="kind of model in a .gguf, such as llama; by default as the run recorded it"
    )
    parser.add_argument("--public", action="store_true", help="to the hub: visible to everybody; by default private")
    text = parser.add_mutually_exclusive_group()
    text.add_argument("--text", action="store_true", default=None, help="to the hub: share the prompts' text")
    text.add_argument("--no-text", dest="text", action="store_false", help="to the hub: leave the prompts' text out")
    add_quiet(parser)
    return parser
