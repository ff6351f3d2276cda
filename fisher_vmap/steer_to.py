"""`python -m fisher_vmap.steer_to`: the step of the residual stream that gains a token most for a KL divergence."""

import sys

if __name__ == "__main__":
    from fisher_vmap.__main__ import start

    sys.exit(start("steer-to"))

import argparse
import json
import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from fisher_vmap import __version__
from fisher_vmap.cli import command
from fisher_vmap.direction_files import check_control_vector, save_control_vector, save_directions
from fisher_vmap.errors import UserError
from fisher_vmap.progress import step
from fisher_vmap.results.local_paths import found_here, last_part
from fisher_vmap.run.settings import Settings
from fisher_vmap.steer_to_flags import read

if TYPE_CHECKING:
    from fisher_vmap.data.prompts import SourcePrompt
    from fisher_vmap.data.render import Renderer, TokenizedPrompt
    from fisher_vmap.natural import NaturalStep

log = logging.getLogger("fisher_vmap")


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Find a step, show what it does, and write it; returns the exit code: 0 done, 2 a user's mistake."""
    arguments, settings = read(argv)
    for line in steer_to(arguments, settings):
        print(line, flush=True)
    return 0


def steer_to(arguments: argparse.Namespace, settings: Settings) -> Iterator[str]:
    """Find the step and write it; yields the lines to print.

    Raises:
        UserError: the model, the prompts or the tokens are not as they should be, or a file cannot be written.
    """
    with step("loading the libraries"):
        from fisher_vmap.before_after import lines, look
        from fisher_vmap.completions import Completions
        from fisher_vmap.data.prompts import SourcePrompt
        from fisher_vmap.natural import natural_step
        from fisher_vmap.objective import Objective, token_ids
        from fisher_vmap.run.open import make_renderer, model_of, open_model, source_of

    with _user_errors():
        Completions(settings.targets, settings.samples, settings.temperature, settings.completion_seed)
    source = None
    if not arguments.prompt:
        with step("opening the data set"):
            source = source_of(settings)
    _look_up_before_loading(arguments, settings)
    loaded = model_of(settings)
    towards, away_from = _tokens(arguments, loaded.tokenizer)
    renderer = make_renderer(settings, loaded, source, None)
    with step("finding the layers"):
        fisher = open_model(settings, loaded, renderer)
    if settings.max_batch_tokens == "auto":
        fisher.max_batch_tokens = fisher.batch_tokens(arguments.rank)
    (layer,) = fisher.layers
    if any(path.suffix == ".gguf" for path in arguments.output):
        check_control_vector([layer])
        if settings.bias_positions != "all":
            log.warning(
                "bias_positions is %s, and llama.cpp adds a control vector at all positions: what it does there is not "
                "what is shown here",
                settings.bias_positions,
            )
    with step("reading the prompts"):
        typed = [SourcePrompt(i, i, text, {}, None) for i, text in enumerate(arguments.prompt)]
        given, prompts = _rendered(renderer, typed if source is None else source)
    with step("finding the step"), _user_errors():
        found = natural_step(
            fisher,
            given,
            towards=towards,
            away_from=away_from or None,
            at="first",
            kl=arguments.kl,
            damping=arguments.damping,
            steps=arguments.steps,
            estimator=arguments.estimator,
            rank=arguments.rank,
            products=arguments.products,
        )
    wanted = Objective(token_ids(towards, None), token_ids(away_from or None, None), None, "log_odds", "first")
    with _user_errors():
        looks = look(fisher, [prompt.ids for prompt in prompts], found, wanted, arguments.tokens)
    for path in arguments.output:  # before anything is printed, which a closed pipe would end
        if path.suffix == ".gguf":
            save_control_vector(path, {layer: found}, loaded.model.config.model_type)
        else:
            save_directions(path, {"step": found}, **_notes(arguments, settings, found, len(prompts)))
    unicode = "utf" in (sys.stdout.encoding or "").lower()
    yield from lines(fisher, prompts, found, wanted, looks, unicode=unicode)
    for number, path in enumerate(arguments.output):
        yield f"{'' if number else chr(10)}written in {path}"


@contextmanager
def _user_errors() -> Iterator[None]:
    """Turn a ValueError about what was asked for into a UserError."""
    try:
        yield
    except ValueError as error:
        raise error if isinstance(error, UserError) else UserError(str(error)) from error


def _look_up_before_loading(arguments: argparse.Namespace, settings: Settings) -> None:
    """Look the tokens up before the weights are loaded, where that is much faster.

    A .gguf file is read whole for its tokenizer, and an adapter may bring one of its own.
    """
    from fisher_vmap.load.model import without_weights
    from fisher_vmap.load.options import LoadOptions
    from fisher_vmap.load.source import refuse_empty, without_slash
    from fisher_vmap.run.open import loading_of

    if settings.adapter_path is None and not settings.model_path.endswith(".gguf"):
        with step("looking up the tokens"):
            name, _, tokenizer = without_weights(settings.model_path, LoadOptions(**loading_of(settings)))
        if name == without_slash(settings.model_path):
            refuse_empty(name, tokenizer)
            _tokens(arguments, tokenizer)


def _tokens(arguments: argparse.Namespace, tokenizer: Any) -> tuple[list[int], list[int]]:
    """The ids of the wanted tokens and of those to trade for them.

    Raises:
        UserError: a text is not one token, or stands on both sides.
    """
    from fisher_vmap.objective import token_ids

    found: dict[str, list[int]] = {"towards": [], "away_from": []}
    for name, ids in found.items():
        for text in getattr(arguments, name):
            try:
                one = token_ids(text, tokenizer)
            except ValueError as error:
                raise UserError(f"--{name}: {error}") from error
            assert one is not None
            token = int(one)
            if token == getattr(tokenizer, "unk_token_id", None) and text.strip() != tokenizer.unk_token:
                raise UserError(
                    f"--{name}: {text!r} is not in the vocabulary of this model; expected one of its tokens"
                )
            if token in found["towards"] and name == "away_from":
                raise UserError(f"--away_from: {text!r} is a token of --towards as well; leave one of the two out")
            ids.append(token)
    return found["towards"], found["away_from"]


def _rendered(renderer: "Renderer", prompts: "Iterable[SourcePrompt]") -> "tuple[list[Any], list[TokenizedPrompt]]":
    """Prompts as conversations, and as tokens; those that cannot be used are left out with a line.

    Raises:
        UserError: none is left.
    """
    from fisher_vmap.run.open import prepare

    found = prepare(renderer, 0, list(prompts))
    reasons = [f"prompt {number}: {reason}" for number, reason in found.skipped.items()]
    if not found.rendered:
        raise UserError(f"no prompt can be used ({reasons[0]}); give another one")
    if reasons:
        log.warning("%d of %d prompts are left out (%s)", len(reasons), len(found.prompts), reasons[0])
    given = [found.prompts[number].messages_or_text for number in found.rendered]
    turns = [[{"role": "user", "content": each}] if isinstance(each, str) else each for each in given]
    return turns, list(found.rendered.values())


def _notes(arguments: argparse.Namespace, settings: Settings, found: "NaturalStep", prompts: int) -> dict[str, str]:
    """What a file says of its step; of paths of this machine the last part alone."""
    names = {"model": "model_path", "model_revision": "model_revision", "adapter": "adapter_path"}
    values = {told: getattr(settings, name) for told, name in names.items()}
    if not arguments.prompt:
        values["dataset"] = settings.dataset_name
    elif arguments.text:
        values["prompt_texts"] = json.dumps(arguments.prompt, ensure_ascii=False)
    for told, name in (*names.items(), ("dataset", "dataset_name")):
        if values.get(told) and name in found_here({name: values[told]}):
            values[told] = last_part(values[told])
    values |= {name: json.dumps(getattr(arguments, name), ensure_ascii=False) for name in ("towards", "away_from")}
    values |= {name: getattr(arguments, name) for name in ("estimator", "rank", "products")}
    of_step = ("layer", "positions", "kl", "predicted_kl", "measured_kl", "off_target_kl", "damping", "steps")
    values |= {name: getattr(found, name) for name in of_step}
    values |= {"targets": settings.targets, "prompts": prompts, "fisher_vmap": __version__}
    return {name: str(value) for name, value in values.items() if value is not None}
