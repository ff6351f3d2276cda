"""The kernel is proven on a run's first batch before anything is written, and its form compared with the folder's."""

from collections.abc import Sequence

from fisher_vmap.data.batching import pack
from fisher_vmap.data.conversations import SkippedPrompt
from fisher_vmap.data.render import Renderer, TokenizedPrompt
from fisher_vmap.data.sequences import Tokens, padded
from fisher_vmap.errors import UserError
from fisher_vmap.fisher_model import FisherModel
from fisher_vmap.model.validation import is_out_of_memory
from fisher_vmap.run.settings import Settings

PROOF_TOKENS = 64  # of each of two prompts, if a whole batch does not fit in memory
PROOF_TOP = 2  # tokens that the forms of the kernel are proven for when a run begins


def excerpts_of(
    settings: Settings, fisher: FisherModel, prompts: Sequence[TokenizedPrompt], renderer: Renderer
) -> list[list[Tokens]]:
    """The batches to prove the kernel on: the run's first batch, and two short prompts if that does not fit in memory.

    A resumed run takes the same ones. A real batch has the run's lengths and number of rows, which a proof depends on.

    Raises:
        UserError: neither a prompt nor a plain word becomes tokens that the model knows.
    """
    known = fisher.model.get_input_embeddings().num_embeddings  # type: ignore[operator]
    every = [prompt for prompt in prompts if max(prompt.ids) < known]
    every = every or [TokenizedPrompt(_plain_word(settings, renderer, known), "", False)]
    batch = [
        every[i] for i in pack([len(prompt.ids) for prompt in every], fisher.batch_size, fisher.max_batch_tokens)[0]
    ]
    short = sorted(
        (_for_proof(prompt, settings.targets, PROOF_TOKENS) for prompt in every), key=lambda one: len(one.ids)
    )
    return [[_for_proof(prompt, settings.targets) for prompt in batch], [short[0], short[-1]]]


def _for_proof(prompt: TokenizedPrompt, targets: str | int, most: int | None = None) -> Tokens:
    """The first tokens of a prompt, with a completion if the run has any: one token where the model is to write it."""
    ids = prompt.ids[:most]
    if isinstance(targets, int) or (targets == "completion" and prompt.start is None):
        return Tokens(ids).completed(ids[-1:])
    return Tokens(ids, prompt.start and min(prompt.start, len(ids) - 1))


def _plain_word(settings: Settings, renderer: Renderer, known: int) -> list[int]:
    try:
        ids = renderer.render("Hello").ids
    except SkippedPrompt as skip:
        raise UserError(
            f"the tokenizer of {settings.model_path} gives no tokens for any text ({skip}); save its tokenizer into "
            "the folder"
        ) from skip
    if max(ids) >= known:
        raise UserError(
            f"the tokenizer of {settings.model_path} does not fit the model: it gives token {max(ids)} for a plain "
            f"word, and the model knows {known} tokens; save the model's own tokenizer into the folder"
        )
    return ids


def prove(fisher: FisherModel, excerpts: Sequence[list[Tokens]]) -> dict[str, dict[str, str]]:
    """Choose the kernel's form for each layer on the first excerpt that fits in memory.

    Raises:
        UserError: the kernel asked for cannot be trusted with this model, or there is no memory for it.
    """
    few, *others = excerpts
    longest = max(len(one.ids) for one in few)
    where = fisher.options.positions if fisher.options.positions in ("all", "last") else "all"
    try:
        fisher.scores(*padded(few, fisher.device, longest), top_k=min(fisher.top_k, PROOF_TOP), positions=where)
        if fisher.estimator != "topk":
            fisher.numbers(few, 1)
    except ValueError as error:
        raise UserError(str(error)) from error
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        if not others:
            raise UserError(
                f"out of memory on two prompts of {longest} tokens; try dtype bfloat16, fewer layers or "
                "top_k_tokens, or another device"
            ) from error
    else:
        return fisher.forms
    return prove(fisher, others)  # outside of the handler, whose traceback keeps the tensors alive


def compare_forms(folder: str, stored: dict[str, dict[str, str]] | None, chosen: dict[str, dict[str, str]]) -> None:
    """Raise UserError if a layer's form is another than the one that the folder stored."""
    for layer, here in chosen.items():
        there = (stored or {}).get(layer, here)
        if there["form"] != here["form"]:
            raise UserError(
                f"the kernel's form for {layer} is {here['form']} here ({here['why']}) but {there['form']} in {folder} "
                f"({there['why']}); carry on with the versions and the machine of that run, or use another --output_dir"
            )
