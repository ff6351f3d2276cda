"""Prompts as they come, a window at a time: batches want prompts of like length together, a stream wants no waiting."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import NamedTuple

from fisher_vmap.prompts.batches import pack
from fisher_vmap.prompts.conversations import SkippedPrompt
from fisher_vmap.prompts.prompt_numbers import PromptNumbers
from fisher_vmap.prompts.tokens import Renderer, TokenizedPrompt

WINDOW = 32  # prompts that are sorted by length at a time


class Computed(NamedTuple):
    """A prompt's tokens and its numbers."""

    tokenized: TokenizedPrompt
    numbers: PromptNumbers


def in_windows(
    prompts: Iterable[str | Sequence[dict[str, str]]],
    renderer: Renderer,
    compute: Callable[[list[list[int]]], list[PromptNumbers]],
    batch_size: int,
    max_batch_tokens: int,
) -> Iterator[Computed | SkippedPrompt]:
    """Render and compute prompts in batches of like length, and give them back in order.

    Args:
        prompts: texts or lists of messages.
        renderer: makes tokens of a prompt, or says why it has none.
        compute: one batch: of each prompt's token ids its numbers.
        batch_size: most prompts in a batch.
        max_batch_tokens: most tokens in a batch, padding included.

    Yields:
        For each prompt its tokens and numbers, or why it is skipped.
    """
    stream = iter(prompts)
    while window := [_rendered(prompt, renderer) for prompt in islice(stream, WINDOW)]:
        tokenized = {i: prompt for i, prompt in enumerate(window) if not isinstance(prompt, SkippedPrompt)}
        places = list(tokenized)
        numbers: dict[int, PromptNumbers] = {}
        for batch in pack([len(tokenized[i].ids) for i in places], batch_size, max_batch_tokens):
            members = [places[j] for j in batch]
            numbers.update(zip(members, compute([tokenized[i].ids for i in members]), strict=True))
        for i, prompt in enumerate(window):
            yield prompt if isinstance(prompt, SkippedPrompt) else Computed(prompt, numbers[i])


def _rendered(prompt: str | Sequence[dict[str, str]], renderer: Renderer) -> TokenizedPrompt | SkippedPrompt:
    try:
        return renderer.render(prompt)
    except SkippedPrompt as reason:
        return reason
