"""The flags of `fisher-vmap steer-to`, and every check of them that needs no model."""

import argparse
import inspect
import math
import os
from collections.abc import Sequence
from pathlib import Path

from fisher_vmap.cli import Parser, add_quiet, path_argument
from fisher_vmap.data.prompts import read_prompts
from fisher_vmap.direction_files import check_control_vector, holds_a_step
from fisher_vmap.errors import UserError
from fisher_vmap.results.folder import check_output
from fisher_vmap.run.cli_args import add_settings, settings_of
from fisher_vmap.run.settings import Settings

# The settings of a run that mean nothing here; all others are flags.
_OF_RESULTS = (
    "output_dir", "overwrite", "shard_size", "vectors_dtype", "store_text", "export_npz", "save", "strict",
    "keep_columns", "completion_column",
)  # fmt: skip
_OF_OTHER_MATRICES = (
    "estimator", "include_rest", "oversampling", "passes", "trace_samples", "score_samples", "num_singular_values",
)  # fmt: skip
_OF_MACHINES = ("engine", *(name for name in Settings.model_fields if name.startswith("ray_")))
SETTINGS = [n for n in Settings.model_fields if n not in (*_OF_RESULTS, *_OF_OTHER_MATRICES, *_OF_MACHINES)]
ENDINGS = (".safetensors", ".gguf")
_HINTS = {
    "config": "this command reads no file of settings; give them as flags",
    "direction": "did you mean --towards?",
    "target": "did you mean --towards?",
}
_EPILOG = """\
examples:
  fisher-vmap steer-to --model_path Qwen/Qwen2.5-0.5B-Instruct --hook_layer_name 12 \\
      --prompt "Is the sky green?" --towards Yes --away_from No --output yes.safetensors
  fisher-vmap steer-to --model_path Qwen/Qwen2.5-0.5B-Instruct --hook_layer_name 12 \\
      --dataset_name prompts.jsonl --num_prompts 20 --towards " Paris" --kl 0.02

The file of --output holds the tensor `step`, [D].
In Python: steer(model, Step.load("yes.safetensors")).
"""


def read(argv: Sequence[str] | None) -> tuple[argparse.Namespace, Settings]:
    """The values of a command line, and the settings of a run among them.

    Raises:
        UserError: a value is wrong, flags exclude each other, or a file cannot be written.
    """
    arguments = _parser().read(argv)
    return arguments, _checked(arguments)


def _checked(arguments: argparse.Namespace) -> Settings:
    """The settings among the flags."""
    for name in ("towards", "away_from", "prompt"):
        for text in getattr(arguments, name):
            if not (text.strip() if name == "prompt" else text):  # a token may be white space
                raise UserError(f"--{name} is an empty text; expected {'a prompt' if name == 'prompt' else 'a token'}")
    if not arguments.towards:
        raise UserError('nothing is wanted; say which token with --towards, such as --towards " Paris"')
    data = hasattr(arguments, "dataset_name")
    if not arguments.prompt and not data:
        raise UserError("there is no prompt; give a text with --prompt, or a data set with --dataset_name")
    if arguments.prompt and data:
        raise UserError("--prompt and --dataset_name are both given; keep one")
    for name, expected in (("kl", "nats above zero, such as 0.1"), ("damping", "a number above zero, in units of F")):
        value = getattr(arguments, name)
        if value is not None and not 0 < value < math.inf:
            raise UserError(f"--{name} is {value:g}; expected {expected}")
    for name, least in (("steps", 1), ("rank", 1), ("products", 1), ("tokens", 0)):
        if (value := getattr(arguments, name)) is not None and value < least:
            raise UserError(f"--{name} is {getattr(arguments, name)}; expected {least} or more")
    given = {name: getattr(arguments, name) for name in SETTINGS if hasattr(arguments, name)}
    # overwrite: a results folder that lies here has nothing to say about the precision
    settings: Settings = settings_of(**given, estimator=arguments.estimator, overwrite=True)
    layer = settings.hook_layer_name
    if layer == "all" or (isinstance(layer, tuple) and len(layer) > 1):
        raise UserError(f"hook_layer_name is {arguments.hook_layer_name}; a step is for one layer, such as 15")
    if settings.targets in ("completion", "all"):
        raise UserError(f"targets is {settings.targets}; expected last, or how many tokens the model is to write")
    if settings.bias_positions == "completion":
        raise UserError("bias_positions is completion, which begins behind the token that is to change; take another")
    if settings.bias_positions == "last" and settings.targets != "last":
        raise UserError(
            f"bias_positions is last, with targets {settings.targets} the last token that the model writes, behind "
            "which nothing is read; take all or prompt, or leave --targets out"
        )
    if len({os.path.realpath(path) for path in arguments.output}) < len(arguments.output):
        raise UserError(f"--output is {arguments.output[-1]} twice; name different files")
    if arguments.prompt and (unused := [name for name in given if name in inspect.signature(read_prompts).parameters]):
        raise UserError(f"--{unused[0]} is for --dataset_name, and --prompt is given; leave one of the two out")
    for path in arguments.output:
        _check_output(path, layer)
    return settings


def _check_output(path: Path, layer: int | str | tuple[int | str, ...]) -> None:
    """Raise UserError if a file of this name cannot be written, or is none of this command's."""
    if path.suffix not in ENDINGS:
        raise UserError(f"{path} ends in {path.suffix or 'nothing'}; expected {' or '.join(ENDINGS)}")
    check_output(path)
    if path.is_file() and not holds_a_step(path):
        raise UserError(f"{path} is there and holds something else than a step; choose another --output")
    (layer,) = layer if isinstance(layer, tuple) else (layer,)
    if path.suffix == ".gguf" and not str(layer).startswith("-"):  # a number from the top: known with the model
        check_control_vector([str(layer)])


def _parser() -> Parser:
    parser = Parser(
        "steer-to",
        hints=_HINTS,
        usage="%(prog)s --towards TOKEN (--prompt TEXT | --dataset_name PATH) [--NAME VALUE ...]",
        description="Find the step of the residual stream that gains the log-odds of a token most for a given KL\n"
        "divergence of the model's output, show what it does, and write it.",
        epilog=_EPILOG,
    )
    own = parser.add_argument_group("the step")
    own.add_argument("--prompt", action="append", default=[], metavar="TEXT", help="a prompt; may be repeated")
    own.add_argument(
        "--dataset_name", metavar="PATH", default=argparse.SUPPRESS, help="in place of --prompt: prompts as for a run"
    )
    own.add_argument(
        "--towards", action="append", default=[], metavar="TOKEN",
        help='the wanted token, with its leading space if it has one, as " Paris"; may be repeated',
    )  # fmt: skip
    own.add_argument(
        "--away_from", action="append", default=[], metavar="TOKEN",
        help="a token to trade for it; may be repeated; by default all others",
    )  # fmt: skip
    own.add_argument("--kl", type=float, default=0.1, metavar="NATS", help="the budget, a prompt (0.1)")
    own.add_argument("--steps", type=int, default=1, metavar="N", help="how many steps to divide it into (1)")
    own.add_argument(
        "--damping", type=float, metavar="LAMBDA", help="lambda, in the units of F (0.01 of its mean eigenvalue)"
    )
    own.add_argument(
        "--estimator", choices=("topk", "full"), default="topk",
        help="the first guess of F: of the --top_k_tokens likeliest tokens (topk), or of all (full)",
    )  # fmt: skip
    own.add_argument(
        "--products",
        type=int,
        metavar="K",
        help="by F of all tokens, which refine the step; a push and a pull each (8)",
    )
    own.add_argument("--rank", type=int, default=32, metavar="R", help="vectors of estimator full (32)")
    own.add_argument("--tokens", type=int, default=24, metavar="N", help="length of the texts; 0: none (24)")
    own.add_argument(
        "--output", type=path_argument, action="append", default=[], metavar="FILE",
        help="where to write the step, a .safetensors or a .gguf (a control vector); may be repeated",
    )  # fmt: skip
    own.add_argument(
        "--no-text", dest="text", action="store_false", help="leave the text of --prompt out of the .safetensors"
    )
    add_quiet(own)
    settings = parser.add_argument_group("settings, as for a run")
    add_settings(settings, [name for name in SETTINGS if name != "dataset_name"])
    return parser
