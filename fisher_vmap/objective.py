"""What a step is to gain: log-odds or log-probability of tokens at the targets, or any gradient given for it."""

from collections.abc import Iterable, Mapping
from numbers import Integral
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fisher_vmap.linearize.output import Distribution

OBJECTIVES = ("log_odds", "log_prob")


class Objective(NamedTuple):
    """What a step is to gain.

    Attributes:
        towards: [t] int64, the wanted tokens; None: a gradient was given.
        away_from: [a] int64; None: all others.
        gradient: [M, X]; None: that of the tokens.
        objective: one of `OBJECTIVES`.
        at: "all" targets or the "first" of each prompt.
    """

    towards: Tensor | None
    away_from: Tensor | None
    gradient: Tensor | None
    objective: str
    at: str

    def values(self, log_p_MV: Tensor) -> Tensor:
        """[M] nats: the objective at each target."""
        assert self.towards is not None
        inside_M = log_p_MV[:, self.towards].logsumexp(1)
        if self.away_from is not None:
            return inside_M - log_p_MV[:, self.away_from].logsumexp(1)
        return inside_M if self.objective == "log_prob" else inside_M - _log_rest(inside_M)

    def cotangents(self, c: Distribution, width: int) -> Tensor:
        """[M, X]: the gradient of the objective with respect to h at each target, X wide.

        Raises:
            ValueError: a token is not in the vocabulary, the tokens are all of it, or a given gradient has another
                shape.
        """
        if self.gradient is not None:
            if self.gradient.shape != (expected := (len(c.probs), width)):
                raise ValueError(f"gradient has shape {tuple(self.gradient.shape)}; expected {list(expected)}")
            return self.gradient.to(c.probs)
        assert self.towards is not None
        u_MX = self._of_set(c, self.towards)
        if self.away_from is not None:
            return u_MX - self._of_set(c, self.away_from)
        if len(self.towards) == c.probs.shape[1]:
            raise ValueError("towards is the whole vocabulary, whose probability is 1 with any step; leave some out")
        if self.objective == "log_prob":
            return u_MX
        inside_M = c.log_probs[:, self.towards].logsumexp(1)
        return u_MX / _log_rest(inside_M).exp()[:, None].to(u_MX)

    def _of_set(self, c: Distribution, tokens: Tensor) -> Tensor:
        """[M, X]: the gradient of log p of a set, the mean of its tokens' own weighted by their probability."""
        M, V = c.probs.shape
        if outside := [int(token) for token in tokens if not 0 <= token < V]:
            raise ValueError(f"token {outside[0]} is not in the vocabulary, 0 to {V - 1}")
        weights_Mt = c.log_probs[:, tokens].softmax(1)
        return c.sketch(tokens.expand(M, -1), weights_Mt[:, None])[:, 0]


def _log_rest(log_p: Tensor) -> Tensor:
    """log(1 - p), of p below 1 by at least the rounding of its format."""
    return torch.log(-torch.expm1(log_p.clamp(max=-torch.finfo(log_p.dtype).eps)))


def token_ids(tokens: Any, tokenizer: Any) -> Tensor | None:
    """[t] int64 of tokens given as ids or as texts.

    Raises:
        ValueError: a text is not one token, or there is no tokenizer for it.
    """
    if tokens is None:
        return None
    if isinstance(tokens, Tensor):
        tokens = tokens.flatten().tolist()
    if isinstance(tokens, bytes | Mapping) or not isinstance(tokens, str | Integral | Iterable):
        raise ValueError(f"{tokens!r} is no token; expected an id, a text of one token, or a list of these")
    each = [tokens] if isinstance(tokens, str | Integral) else list(tokens)
    found = []
    for token in each:
        if isinstance(token, str):
            if tokenizer is None:
                raise ValueError(f"{token!r} is a text and there is no tokenizer; give token ids")
            ids = tokenizer.encode(token, add_special_tokens=False)
            if len(ids) != 1:
                pieces = [tokenizer.decode([i]) for i in ids]
                raise ValueError(f"{token!r} is {len(ids)} tokens, {pieces}; give the first of them, or another word")
            token = ids[0]
        if not isinstance(token, Integral) or isinstance(token, bool):
            raise ValueError(f"{token!r} is no token; expected an id, or a text of one token")
        found.append(int(token))
    if not found:
        raise ValueError("no token was given; expected at least one")
    return torch.tensor(sorted(set(found)), device="cpu")


def divergence(log_p_MV: Tensor, log_q_MV: Tensor) -> Tensor:
    """KL(p || q) of each row, [..., M] nats, from log p [M, V] and log q [..., M, V].

    It is summed as sum p (e^d - 1 - d) with d = log q - log p: no term is negative, so that small values do not cancel.
    """
    change_MV = log_q_MV - log_p_MV
    terms_MV = log_p_MV.exp() * (torch.expm1(change_MV) - change_MV)
    return torch.where(log_p_MV > -torch.inf, terms_MV, 0).sum(-1)  # a banned token stays banned


def without(log_p_MV: Tensor, tokens: Tensor) -> Tensor:
    """The log-probabilities of all other tokens, renormalised."""
    others_MV = log_p_MV.index_fill(1, tokens.to(log_p_MV.device), -torch.inf)
    return others_MV.log_softmax(1)
