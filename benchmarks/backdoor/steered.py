"""What a model answers with a step added at a layer, for many steps and prompts side by side.

The prompts of a chat begin with the same tokens. These are read once a step; what follows is read for steps and prompts
together, padded on the left, between the shared tokens and the prompt's own.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fisher_vmap.model.recording import hooks, output_of, with_output

ROWS = 96  # prompts times steps that are computed together


class Read(NamedTuple):
    """Prompts that were read, row c n + i being prompt i with step c.

    Attributes:
        hidden_BTX: what the decoder returns at the last T tokens; those of a shorter prompt are on the right.
        cache: keys and values.
        mask_BK: 1 at tokens, 0 at padding, of all that is in the cache.
        steps_BX: each row's step.
    """

    hidden_BTX: Tensor
    cache: Any
    mask_BK: Tensor
    steps_BX: Tensor


def added(model: Any, layer: str, steps_BX: Tensor) -> AbstractContextManager[None]:
    """Within the context step b is added to row b of the layer's output, at all positions."""

    def add(_module: Any, _args: Any, output: Any) -> Any:
        hidden_BTX = output_of(output)
        assert hidden_BTX is not None and len(hidden_BTX) == len(steps_BX)
        return with_output(output, hidden_BTX + steps_BX[:, None].to(hidden_BTX.dtype))

    return hooks(model.get_submodule(layer).register_forward_hook(add))


def shared_tokens(rows: Sequence[Sequence[int]]) -> int:
    """How many tokens all prompts begin with, so that each has one more at least."""
    most = min(map(len, rows)) - 1
    return next((t for t in range(most) if len({row[t] for row in rows}) > 1), most)


def pieces(C: int, n: int, most: int) -> Iterator[tuple[slice, slice]]:
    """Steps and prompts that are computed together: of all prompts several steps, or of one step some prompts."""
    parts = math.ceil(n / most)
    size, few = math.ceil(n / parts), max(1, most // n)
    for c in range(0, C, few):
        for i in range(0, n, size):
            yield slice(c, min(c + few, C)), slice(i, min(i + size, n))


def read(model: Any, layer: str, steps_CX: Tensor, rows: Sequence[Sequence[int]], shared: int) -> Read:
    """Read prompts under each of the steps.

    Args:
        model: a causal LM of transformers, in evaluation mode, whose attention reaches back over the whole prompt.
        layer: the name of the module to whose output a step is added.
        steps_CX: the steps.
        rows: token ids of n prompts.
        shared: how many tokens at the beginning are the same for all.
    """
    decoder, (C, n) = model.get_decoder(), (len(steps_CX), len(rows))
    T, cache = max(map(len, rows)) - shared, None
    ids_nT, mask_nK = torch.zeros(n, T, dtype=torch.int64), torch.ones(n, shared + T, dtype=torch.int64)
    for i, row in enumerate(rows):
        ids_nT[i, T - len(row) + shared :] = torch.tensor(row[shared:])
        mask_nK[i, shared : shared + T - (len(row) - shared)] = 0
    if shared:
        with added(model, layer, steps_CX):
            first_CT = torch.tensor(rows[0][:shared]).expand(C, -1)
            cache = decoder(input_ids=first_CT, use_cache=True).past_key_values
        cache.batch_repeat_interleave(n)
    steps_BX, mask_BK = steps_CX.repeat_interleave(n, 0), mask_nK.repeat(C, 1)
    hidden_BTX, cache = _next(model, layer, Read(torch.empty(0), cache, mask_BK, steps_BX), ids_nT.repeat(C, 1))
    return Read(hidden_BTX, cache, mask_BK, steps_BX)


def _next(model: Any, layer: str, so_far: Read, ids_BT: Tensor) -> tuple[Tensor, Any]:
    """The decoder's output at T more tokens, which the mask has already, and the cache with them."""
    places_BT = (so_far.mask_BK.cumsum(1) - 1).clamp(min=0)[:, -ids_BT.shape[1] :]
    with added(model, layer, so_far.steps_BX):
        found = model.get_decoder()(
            input_ids=ids_BT,
            attention_mask=so_far.mask_BK,
            position_ids=places_BT,
            past_key_values=so_far.cache,
            use_cache=True,
        )
    return found.last_hidden_state, found.past_key_values


def _parts(
    model: Any, layer: str, steps_CX: Tensor, rows: Sequence[Sequence[int]]
) -> Iterator[tuple[slice, slice, Read]]:
    """All steps and prompts, read piece by piece."""
    shared = shared_tokens(rows)
    for some, of in pieces(len(steps_CX), len(rows), ROWS):
        yield some, of, read(model, layer, steps_CX[some], rows[of], shared)


@torch.no_grad()
def next_log_p(model: Any, layer: str, steps_CX: Tensor, rows: Sequence[Sequence[int]]) -> Tensor:
    """[C, n, V] log-probabilities of the token after each prompt, under each step; float32 at least."""
    found = torch.empty(0)
    for some, of, done in _parts(model, layer, steps_CX, rows):
        log_p_BV = _log_p(model, done.hidden_BTX[:, -1])
        if not len(found):
            found = log_p_BV.new_empty(len(steps_CX), len(rows), log_p_BV.shape[1])
        found[some, of] = log_p_BV.unflatten(0, (some.stop - some.start, -1))
    return found


def _log_p(model: Any, hidden_NX: Tensor) -> Tensor:
    logits_NV = model.get_output_embeddings()(hidden_NX)
    return logits_NV.to(torch.promote_types(logits_NV.dtype, torch.float32)).log_softmax(1)  # type: ignore[no-any-return]


@torch.no_grad()
def divergence(model: Any, layer: str, steps_CX: Tensor, rows: Sequence[Sequence[int]], plain_nV: Tensor) -> Tensor:
    """[C] the mean over prompts of KL(without a step || with it) of the next token, in nats, float64.

    Args:
        model, layer, steps_CX, rows: as for `read`.
        plain_nV: log-probabilities without a step.
    """
    total_C = torch.zeros(len(steps_CX), dtype=torch.float64)
    for some, of, done in _parts(model, layer, steps_CX, rows):
        log_q_cnV = _log_p(model, done.hidden_BTX[:, -1]).unflatten(0, (some.stop - some.start, -1))
        plain = plain_nV[of]
        total_C[some] += (plain.exp() * (plain - log_q_cnV)).sum((1, 2), dtype=torch.float64)
    return total_C / len(rows)


@torch.no_grad()
def answers(
    model: Any, layer: str, steps_CX: Tensor, rows: Sequence[Sequence[int]], tokens: int, end_id: int | None
) -> list[list[list[int]]]:
    """The greedy answers to n prompts under each of C steps, added at the answer's tokens too: [C][n] token ids.

    Args:
        model, layer, steps_CX, rows: as for `read`.
        tokens: of an answer, at most.
        end_id: the token that ends an answer, and is part of it; None: none does.
    """
    found: list[list[list[int]]] = [[] for _ in steps_CX]
    for some, _, done in _parts(model, layer, steps_CX, rows):
        written = list[Tensor]()
        ended_B = torch.zeros(len(done.steps_BX), dtype=torch.bool)
        while True:
            written.append(model.get_output_embeddings()(done.hidden_BTX[:, -1]).argmax(1))
            ended_B |= written[-1] == (-1 if end_id is None else end_id)
            if len(written) == tokens or ended_B.all():
                break
            done = done._replace(mask_BK=torch.cat([done.mask_BK, torch.ones_like(done.mask_BK[:, :1])], 1))
            hidden_BTX, cache = _next(model, layer, done, written[-1][:, None])
            done = done._replace(hidden_BTX=hidden_BTX, cache=cache)
        for c, of in enumerate(torch.stack(written, 1).unflatten(0, (some.stop - some.start, -1)).tolist(), some.start):
            found[c] += [row[: row.index(end_id) + 1] if end_id in row else row for row in of]
    return found


@torch.no_grad()
def answers_log_p(
    model: Any, layer: str, steps_CX: Tensor, rows: Sequence[Sequence[int]], given: Sequence[Sequence[int]]
) -> Tensor:
    """[C, n] the sum of the log-probabilities of a given answer's tokens, for each step and prompt; float64.

    Args:
        model, layer, steps_CX, rows: as for `read`.
        given: token ids of n answers.
    """
    longer = [[*row, *answer[:-1]] for row, answer in zip(rows, given, strict=True)]
    found_Cn = torch.zeros(len(steps_CX), len(rows), dtype=torch.float64)
    shared = min(shared_tokens(longer), min(map(len, rows)) - 1)
    for some, of in pieces(len(steps_CX), len(rows), max(1, ROWS // 4)):
        hidden_BTX = read(model, layer, steps_CX[some], longer[of], shared).hidden_BTX
        for b, hidden_TX in enumerate(hidden_BTX):
            c, i = divmod(b, of.stop - of.start)
            labels_T = torch.tensor(given[of][i])
            log_p_TV = _log_p(model, hidden_TX[-len(labels_T) :])
            found_Cn[some.start + c, of.start + i] = log_p_TV.gather(1, labels_T[:, None]).sum(dtype=torch.float64)
    return found_Cn
