"""What a model answers with a step added at a layer, for many steps and prompts side by side.

The prompts of a chat begin with the same tokens. These are read once a step; what follows is read for steps and prompts
together, padded on the left, between the shared tokens and the prompt's own. Below the layer a step changes nothing
about a prompt, so these blocks run once for all steps; their keys and values are kept for the tokens that are written.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fisher_vmap.model.recording import forwards_set, hidden_of, hooks, output_of, with_output

ROWS = 96  # prompts times steps that are computed together


def added(model: Any, layer: str, steps_BX: Tensor) -> AbstractContextManager[None]:
    """Within the context step b is added to row b of the layer's output, at all positions."""

    def add(_module: Any, _args: Any, output: Any) -> Any:
        hidden_BTX = output_of(output)
        assert hidden_BTX is not None and len(hidden_BTX) == len(steps_BX)
        return with_output(output, hidden_BTX + steps_BX[:, None].to(hidden_BTX.dtype))

    return hooks(model.get_submodule(layer).register_forward_hook(add))


def block_names(model: Any, layer: str) -> list[str]:
    """The names of all blocks, of which the layer is one, from the bottom."""
    above, _, _ = layer.rpartition(".")
    return [f"{above}.{i}" for i in range(len(model.get_submodule(above)))]


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


class Steered:
    """A model on n prompts, with steps [C, X] added to a block's output at all positions, those written too.

    Args:
        model: a causal LM of transformers, in evaluation mode, whose attention reaches back over the whole prompt and
            whose head is a linear map of what its decoder returns.
        layer: the name of the block.
        rows: token ids of each prompt.
        shared: how many tokens at the beginning are the same for all, fewer than any prompt has; None: look.
        writes: whether answers will be asked for, which takes more memory.
    """

    @torch.no_grad()
    def __init__(
        self, model: Any, layer: str, rows: Sequence[Sequence[int]], shared: int | None = None, writes: bool = True
    ) -> None:
        self.model, self.layer, self.count = model, layer, len(rows)
        shared = shared_tokens(rows) if shared is None else shared
        n, T = self.count, max(map(len, rows)) - shared
        self._first_1P = torch.tensor([rows[0][:shared]])
        self._ids_nT, self._mask_nK = torch.zeros(n, T, dtype=torch.int64), torch.ones(n, shared + T, dtype=torch.int64)
        for i, row in enumerate(rows):
            own = len(row) - shared
            self._ids_nT[i, T - own :] = torch.tensor(row[shared:])
            self._mask_nK[i, shared : shared + T - own] = 0
        seen, names = list[Any](), block_names(model, layer)
        self._below = [model.get_submodule(name) for name in names[: names.index(layer) + 1]]
        with hooks(self._below[-1].register_forward_hook(lambda *given: seen.append(given[2]))):
            cache = None
            if shared:
                cache = self._run(self._first_1P, self._mask_nK[:1, :shared], None)[1]
                cache.batch_repeat_interleave(n)
            _, cache = self._run(self._ids_nT, self._mask_nK, cache)
        self._output = seen[-1]  # the kind of thing that a block returns
        known: list[Any] = [output_of(each) for each in seen]
        self._first_1PX, self._own_nTX = known[0], known[-1]
        kept = cache.layers[: len(self._below) if writes else 1]
        self._kept = [(each.keys, each.values) for each in kept]

    def _run(
        self, ids_BT: Tensor, mask_BK: Tensor, cache: Any, steps_BX: Tensor | None = None, known_BTX: Any = None
    ) -> tuple[Tensor, Any]:
        """The decoder's output at T more tokens, which the mask has already, and the cache with them.

        `known_BTX` is the layer's output without the step, if it is known: then nothing is computed below.
        """
        places_BT = (mask_BK.cumsum(1) - 1).clamp(min=0)[:, -ids_BT.shape[1] :]
        step = nullcontext() if steps_BX is None else added(self.model, self.layer, steps_BX)
        with step, nullcontext() if known_BTX is None else self._known(known_BTX):
            found = self.model.get_decoder()(
                input_ids=ids_BT, attention_mask=mask_BK, position_ids=places_BT, past_key_values=cache, use_cache=True
            )
        return found.last_hidden_state, found.past_key_values

    def _known(self, known_BTX: Tensor) -> AbstractContextManager[None]:
        """Within the context blocks below the layer do nothing, and the layer returns what is known."""

        def nothing(*args: Any, **kwargs: Any) -> Any:
            hidden_BTX = hidden_of(args, kwargs)
            assert hidden_BTX is not None
            return with_output(self._output, hidden_BTX)

        def known(*args: Any, **kwargs: Any) -> Any:
            return with_output(self._output, known_BTX)

        forwards: list[Callable[..., Any]] = [nothing] * (len(self._below) - 1) + [known]
        return forwards_set(zip(self._below, forwards, strict=True))

    def _read(self, steps_CX: Tensor, of: slice, writes: bool) -> Read:
        """Read some of the prompts under each of the steps; `writes`: tokens follow.

        Keys and values below the layer are needed if tokens follow. If not, those of one block are, since the cache
        tells its length by them.
        """
        C, ids_nT, mask_nK = len(steps_CX), self._ids_nT[of], self._mask_nK[of]
        n, P, kept, cache = len(ids_nT), self._first_1P.shape[1], self._kept if writes else self._kept[:1], None
        if P:
            first = self._first_1P.expand(C, -1), mask_nK[:1, :P].expand(C, -1), None
            _, cache = self._run(*first, steps_CX, self._first_1PX.expand(C, -1, -1))
            for i, each in enumerate(kept):
                cache.update(*(x[:1, :, :P].expand(C, -1, -1, -1) for x in each), i)
            cache.batch_repeat_interleave(n)
        steps_BX, mask_BK = steps_CX.repeat_interleave(n, 0), mask_nK.repeat(C, 1)
        known_BTX = self._own_nTX[of].repeat(C, 1, 1)
        hidden_BTX, cache = self._run(ids_nT.repeat(C, 1), mask_BK, cache, steps_BX, known_BTX)
        if writes:
            for i, each in enumerate(kept):
                cache.update(*(x[of, :, P:].repeat(C, 1, 1, 1) for x in each), i)
        return Read(hidden_BTX, cache, mask_BK, steps_BX)

    def _parts(self, steps_CX: Tensor, most: int, writes: bool = False) -> Iterator[tuple[slice, slice, Read]]:
        """All steps and prompts, read piece by piece of so many rows at most."""
        for some, of in pieces(len(steps_CX), self.count, most):
            yield some, of, self._read(steps_CX[some], of, writes)

    def _log_p(self, hidden_NX: Tensor) -> Tensor:
        logits_NV: Tensor = self.model.get_output_embeddings()(hidden_NX)
        return logits_NV.to(torch.promote_types(logits_NV.dtype, torch.float32)).log_softmax(1)

    @torch.no_grad()
    def next_log_p(self, steps_CX: Tensor) -> Tensor:
        """[C, n, V] log-probabilities of the token after each prompt, under each step; float32 at least."""
        found = torch.empty(0)
        for some, of, done in self._parts(steps_CX, ROWS):
            log_p_BV = self._log_p(done.hidden_BTX[:, -1])
            if not len(found):
                found = log_p_BV.new_empty(len(steps_CX), self.count, log_p_BV.shape[1])
            found[some, of] = log_p_BV.unflatten(0, (some.stop - some.start, -1))
        return found

    @torch.no_grad()
    def divergence(self, steps_CX: Tensor, plain_nV: Tensor) -> Tensor:
        """[C] the mean over prompts of KL(without a step || with it) of the next token, in nats, float64.

        `plain_nV` are the log-probabilities without a step.
        """
        total_C = torch.zeros(len(steps_CX), dtype=torch.float64)
        for some, of, done in self._parts(steps_CX, ROWS):
            log_q_cnV = self._log_p(done.hidden_BTX[:, -1]).unflatten(0, (some.stop - some.start, -1))
            plain = plain_nV[of]
            total_C[some] += (plain.exp() * (plain - log_q_cnV)).sum((1, 2), dtype=torch.float64)
        return total_C / self.count

    @torch.no_grad()
    def answers(self, steps_CX: Tensor, tokens: int, end_id: int | None) -> list[list[list[int]]]:
        """The greedy answers under each step: [C][n] token ids, `tokens` at most, up to the end token if there is one.

        The end token is part of the answer.
        """
        if len(self._kept) < len(self._below):
            raise ValueError("these prompts were read without writes=True")
        found: list[list[list[int]]] = [[] for _ in steps_CX]
        for some, _, done in self._parts(steps_CX, ROWS, writes=True):
            written, hidden_BTX, cache, mask_BK = list[Tensor](), *done[:3]
            ended_B = torch.zeros(len(mask_BK), dtype=torch.bool)
            while True:
                written.append(self.model.get_output_embeddings()(hidden_BTX[:, -1]).argmax(1))
                ended_B |= written[-1] == (-1 if end_id is None else end_id)
                if len(written) == tokens or ended_B.all():
                    break
                mask_BK = torch.cat([mask_BK, torch.ones_like(mask_BK[:, :1])], 1)
                hidden_BTX, cache = self._run(written[-1][:, None], mask_BK, cache, done.steps_BX)
            rows = torch.stack(written, 1).unflatten(0, (some.stop - some.start, -1)).tolist()
            for c, of in enumerate(rows, some.start):
                found[c] += [row[: row.index(end_id) + 1] if end_id in row else row for row in of]
        return found

    @torch.no_grad()
    def last_log_p(self, steps_CX: Tensor, given: Sequence[Sequence[int]]) -> Tensor:
        """[C, n] the sum of the log-probabilities of given tokens, which follow the prompts but for the last; float64.

        Prompt i ends with all but the last of its tokens `given[i]`, after which that one comes.
        """
        found_Cn = torch.zeros(len(steps_CX), self.count, dtype=torch.float64)
        for some, of, done in self._parts(steps_CX, max(1, ROWS // 4)):
            for b, hidden_TX in enumerate(done.hidden_BTX):
                c, i = divmod(b, of.stop - of.start)
                labels_T = torch.tensor(given[of][i])
                log_p_TV = self._log_p(hidden_TX[-len(labels_T) :])
                total = log_p_TV.gather(1, labels_T[:, None]).sum(dtype=torch.float64)
                found_Cn[some.start + c, of.start + i] = total
        return found_Cn


def with_answers(model: Any, layer: str, rows: Sequence[Sequence[int]], given: Sequence[Sequence[int]]) -> Steered:
    """Prompts with given answers but for their last tokens, for `Steered.last_log_p`."""
    longer = [[*row, *answer[:-1]] for row, answer in zip(rows, given, strict=True)]
    return Steered(model, layer, longer, min(shared_tokens(longer), min(map(len, rows)) - 1), writes=False)
