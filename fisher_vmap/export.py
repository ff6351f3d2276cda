"""`python -m fisher_vmap.export DIR OUT`: write directions, an npz, or the whole folder for other programs."""

import sys

if __name__ == "__main__":
    from fisher_vmap.__main__ import start

    sys.exit(start("export"))

import argparse
import logging
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from fisher_vmap.cli import Parser, add_quiet, command, path_argument
from fisher_vmap.direction_files import (
    DEFAULT_KL,
    Direction,
    save_control_vector,
    save_directions,
    save_neuronpedia,
)
from fisher_vmap.errors import UserError, listed
from fisher_vmap.progress import bar, passing, step
from fisher_vmap.results.hub import HUB
from fisher_vmap.results.kept import is_missing, wanted
from fisher_vmap.results.local_paths import without_local_paths
from fisher_vmap.results.outputs import write_npz
from fisher_vmap.results.reader import Results, open_results
from fisher_vmap.results.record import several, was
from fisher_vmap.results.shard_reader import Where

NOTHING = ("", "none", "null", "nan", "nat")  # what people type for a missing value

log = logging.getLogger("fisher_vmap")

EXAMPLES = """what OUT says:
  NAME.safetensors     directions, a tensor [N, D] for each layer
  NAME.gguf            a control vector for llama.cpp and repeng: one direction a layer
  NAME.json            vectors for Neuronpedia: directions of length 1, and their strengths
  NAME.npz             U_{i}, S_{i}, V_{i} of every prompt at one layer
  hf://datasets/A/B    the whole folder, to the hub

examples:
  fisher-vmap export fisher_results mean.safetensors --directions 5
  fisher-vmap export fisher_results prompt3.gguf --prompt 3 --scale 0.05
  fisher-vmap export fisher_results code.gguf --where kind=code --against rest --scale -0.05
  fisher-vmap export fisher_results mean.json --kl 0.1 --model-id gemma-2-2b
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
    if suffix not in (".safetensors", ".gguf", ".json"):
        expected = f".safetensors, .gguf, .json, .npz or {HUB}OWNER/NAME"
        raise UserError(f"{out} ends in {suffix or 'nothing'}; expected {expected}")
    if suffix == ".gguf" and not arguments.layer:
        layers = _without_block_0(layers)
    count = arguments.directions or 1
    where = arguments.where or (f"prompt {arguments.prompt}" if arguments.prompt is not None else "all prompts")
    what = f"{where}{f' against {arguments.against}' if arguments.against else ''}"
    with bar(len(layers), "layers", "finding directions") as advance:
        found = {layer: _directions(results.at(layer), arguments, count, what) for layer in passing(layers, advance)}
    if suffix == ".json":
        save_neuronpedia(out, found, *_neuronpedia_choices(arguments, _model(results)))
    elif suffix == ".safetensors":
        notes = {name: str(getattr(arguments, name)) for name in ("scale", "kl")}
        stacked = {layer: np.stack([each.vector for each in some]) for layer, some in found.items()}
        save_directions(out, stacked, source=what, model=_model(results), **notes)
    else:
        model_type = arguments.model_type or (results.index.resolved or {}).get("model_type")
        if model_type is None:
            raise UserError("the folder does not say what kind of model it is of; add --model-type, such as llama")
        save_control_vector(out, {layer: some[0].vector for layer, some in found.items()}, model_type)
    return f"{out}: {count} direction{'s' * (count > 1)} of {what} at {several(layers)}"


def _neuronpedia_choices(arguments: argparse.Namespace, model: str) -> tuple[str, float]:
    """The model's name there and the KL divergence of the strengths; a line for each that was not given."""
    model_id, kl = arguments.model_id, arguments.kl
    if model_id is None and not model:
        raise UserError("the folder does not say which model it is of; add --model-id, Neuronpedia's name of it")
    if model_id is None:
        model_id = model.rpartition("/")[2].lower()
        log.info("modelId: %s, by the model's name %s; if Neuronpedia has another, --model-id NAME", model_id, model)
    if kl is None:
        kl = DEFAULT_KL
        log.info("strengths: steps with a predicted KL of %g nats at the next token; --kl NATS sets it", kl)
    return model_id, kl


def _refuse_what_is_not_for(suffix: str, arguments: argparse.Namespace) -> None:
    """Raise UserError for a flag that does not apply to this kind of file, and for an impossible value."""
    if suffix == ".npz":
        for name in ("prompt", "where", "against", "directions", "scale", "kl"):
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
    if arguments.kl is not None and not (np.isfinite(arguments.kl) and arguments.kl > 0):
        raise UserError(f"--kl is {arguments.kl:g}; expected nats above zero, such as {DEFAULT_KL}")
    if suffix == ".json" and arguments.scale is not None:
        raise UserError("the vectors of a .json have length 1, and strengths by --kl; leave --scale out")
    if suffix != ".json" and arguments.model_id is not None:
        raise UserError("--model-id is Neuronpedia's name of the model, in a .json; leave it out")


def _without_block_0(layers: Sequence[str]) -> list[str]:
    """The layers without block 0, which llama.cpp cannot steer and the user did not name, unless it is the only one."""
    others = [layer for layer in layers if layer.rpartition(".")[2] != "0"]
    if others and len(others) < len(layers):
        print(f"fisher_vmap: {layers[0]} is left out: llama.cpp cannot steer block 0", file=sys.stderr)
    return others or list(layers)


def _directions(view: Results, arguments: argparse.Namespace, count: int, what: str) -> list[Direction]:
    """The directions asked for, of length 1, of --scale residual norms, or of the length that --kl gives."""
    first, last = arguments.first, arguments.first + count
    if arguments.prompt is not None:
        if not 0 <= arguments.prompt < view.index.stop:
            raise UserError(f"there is no prompt {arguments.prompt}; there are 0 to {view.index.stop - 1}")
        record = view[arguments.prompt]
        if record.status != "ok":
            raise UserError(f"prompt {arguments.prompt} has no directions: it {was(record.status)} ({record.reason})")
        have = int((record.S > 0).sum())
        curvatures, rows, norm = record.S[first:last], record.V[first:last].astype(np.float64), record.residual_norm
    else:
        where = condition(view, arguments.where)
        have = view.index.layout.widths[view.layer]
        norm = view.residual_norm(where=where)
        try:
            if arguments.against is None:
                curvatures, rows = (part[first:] for part in view.directions(min(last, have), where=where))
            else:
                against = None if arguments.against == "rest" else condition(view, arguments.against)
                apart = view.contrast(where, against, rank=min(last, have), ridge=arguments.ridge)
                curvatures, rows = apart.inside[first:], apart.directions[first:]
        except ValueError as error:
            raise error if isinstance(error, UserError) else UserError(str(error)) from error
    if last > have:
        raise UserError(f"directions {first} to {last - 1} were asked for at {view.layer}; there are 0 to {have - 1}")
    found = [
        Direction(row, float(curvature), f"direction {number} of {what}, {view.layer}")
        for number, (curvature, row) in enumerate(zip(curvatures, rows, strict=True), first)
    ]
    if arguments.scale is not None:
        return [each._replace(vector=arguments.scale * norm * each.vector) for each in found]
    if arguments.kl is not None:
        return [each._replace(vector=each.length(arguments.kl) * each.vector) for each in found]
    return found


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
    """What the run was given as its model: an id of the hub, or the last part of a path."""
    return str(without_local_paths(results.metadata["settings"], results.index).get("model_path", ""))


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
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--scale", type=float, help="length in residual norms, either sign; by default length 1")
    length.add_argument(
        "--kl", type=float, metavar="NATS", help=f"length by its predicted KL, sqrt(2 KL / S); {DEFAULT_KL} for a .json"
    )
    parser.add_argument(
        "--model-id", metavar="NAME", help="Neuronpedia's name of the model; by default the hub's last part"
    )
    parser.add_argument(
        "--model-type", help="kind of model in a .gguf, such as llama; by default as the run recorded it"
    )
    parser.add_argument("--public", action="store_true", help="to the hub: visible to everybody; by default private")
    text = parser.add_mutually_exclusive_group()
    text.add_argument("--text", action="store_true", default=None, help="to the hub: share the prompts' text")
    text.add_argument("--no-text", dest="text", action="store_false", help="to the hub: leave the prompts' text out")
    add_quiet(parser)
    return parser
