"""The flags of `fisher-vmap lens`: the settings of a run that a fit has, and its own."""

from collections.abc import Sequence
from typing import NamedTuple

from pydantic import Field

from fisher_vmap.cli import Parser, add_quiet
from fisher_vmap.errors import UserError
from fisher_vmap.run.cli_args import add_settings, read_settings_file, settings_of
from fisher_vmap.run.setting_types import AutoOrTruth, Count, CountFromZero, Layers, PartOfNorm, PathName
from fisher_vmap.run.settings import RunOptions, Settings

_OF_A_MATRIX = (
    *("estimator", "include_rest", "oversampling", "passes", "trace_samples", "score_samples", "num_singular_values"),
    *("top_k_tokens", "targets", "samples", "temperature", "completion_seed", "completion_column", "bias_positions"),
    "prefill",
)
_OF_RESULTS = ("vectors_dtype", "store_text", "export_npz", "save", "keep_columns")

PT_NAME, SAFETENSORS_NAME = "jacobian_lens.pt", "jacobian_lens.safetensors"


class LensSettings(Settings):
    """The settings of a fit: those of a run, with other defaults, and its own."""

    hook_layer_name: Layers = Field("all", description="The blocks: numbers or names, a list; all: all but the last.")
    chat_template: AutoOrTruth = Field(
        False, description="Render prompts as chat; false: as plain text, as the reference implementation does."
    )
    max_length: Count = Field(128, description="Most tokens of a prompt; the rest of it is cut off.")
    shard_size: Count = Field(8, description="Prompts that are added to the sums before these are stored.")
    output_dir: PathName = Field(
        "jacobian_lens", description="Folder of the lens and of its sums; the same command again continues in it."
    )
    skip_first: CountFromZero = Field(
        16, description="Leading positions of each prompt that are left out; the last one always is."
    )
    until: PartOfNorm = Field(
        None,
        description="Stop when J of even and of odd prompts differ by no more than this part of |J|, at each layer.",
    )


SETTINGS = [name for name in LensSettings.model_fields if name not in (*_OF_A_MATRIX, *_OF_RESULTS)]
_HINTS = {
    "dim_batch": "did you mean --cotangent_chunk?",
    "max_seq_len": "did you mean --max_length?",
    "skip_first_positions": "did you mean --skip_first?",
    "source_layers": "did you mean --hook_layer_name?",
    "layers": "did you mean --hook_layer_name?",
}
_EPILOG = """\
examples:
  fisher-vmap lens --model_path Qwen/Qwen2.5-0.5B --dataset_name texts.jsonl --num_prompts 200
  fisher-vmap lens --model_path Qwen/Qwen2.5-0.5B --dataset_name texts.jsonl --num_prompts all --until 0.02
  fisher-vmap lens --model_path Qwen/Qwen2.5-0.5B --dataset_name texts.jsonl --shards 3/8 --output_dir lens
  fisher-vmap lens ... --read "The Eiffel Tower is in the city of"

In Python: JacobianLens.load("jacobian_lens"). Other programs read jacobian_lens/jacobian_lens.pt.
"""


class LensCommand(NamedTuple):
    """A command line.

    Attributes:
        settings: of the fit.
        options: of this process.
        read: texts to read with the lens.
    """

    settings: LensSettings
    options: RunOptions
    read: tuple[str, ...]


def read(argv: Sequence[str] | None) -> LensCommand:
    """The values of a command line.

    Raises:
        UserError: a value is wrong, or flags exclude each other.
    """
    arguments = _parser().read(argv)
    given = {}
    if arguments.config is not None:
        given = read_settings_file(arguments.config, LensSettings.model_fields, SETTINGS)
    given |= {name: getattr(arguments, name) for name in SETTINGS if hasattr(arguments, name)}
    settings: LensSettings = settings_of(LensSettings, **given)
    options: RunOptions = settings_of(
        RunOptions, **({} if arguments.shards is None else {"shards": arguments.shards}), quiet=arguments.quiet
    )
    if any(not text.strip() for text in arguments.read):
        raise UserError("--read is an empty text; expected a text to read with the lens")
    several = options.shards is not None or settings.engine != "local"
    if several and settings.until is not None:
        which = "--shards" if options.shards is not None else f"engine {settings.engine}"
        raise UserError(
            f"until with {which}: each process sees only its own prompts; leave until out, and set num_prompts"
        )
    if options.shards is not None and settings.engine != "local":
        raise UserError(f"--shards is for engine local, but engine is {settings.engine}; leave one of the two out")
    if options.shards is not None and settings.overwrite:
        raise UserError("--shards with overwrite: each process would remove the others' sums; remove the folder first")
    if settings.skip_first + 2 > settings.max_length:
        raise UserError(
            f"skip_first is {settings.skip_first} and max_length {settings.max_length}: no position is left; lower "
            "skip_first"
        )
    return LensCommand(settings, options, tuple(arguments.read))


def _parser() -> Parser:
    parser = Parser(
        "lens",
        hints=_HINTS,
        usage="%(prog)s --model_path MODEL --dataset_name DATA [--NAME VALUE ...]",
        description="Fit the Jacobian lens: for each layer the mean over texts of the derivative of the last block's\n"
        "output by the layer's.",
        epilog=_EPILOG,
    )
    own = parser.add_argument_group("the lens")
    own.add_argument("--config", metavar="FILE", help="YAML file with settings, as for a run; flags beat it")
    own.add_argument(
        "--read", action="append", default=[], metavar="TEXT",
        help="read this text with the lens, print it, and keep it in readouts.json; may be repeated",
    )  # fmt: skip
    own.add_argument("--shards", metavar="I/N", default=None, help=str(RunOptions.model_fields["shards"].description))
    add_quiet(own)
    settings = parser.add_argument_group("settings, most of them as for a run")
    add_settings(settings, SETTINGS, LensSettings.model_fields)
    return parser
