"""Which outcomes a batch's scores are of, and which cotangents must be pulled back for them.

The scores of outcomes that cover everything obey sum p g = 0. Where "any other token" is an outcome, one of them
follows from the others, and nothing more is pulled back than without it. The likeliest is taken for that, so that what
rounding has left in the others is divided by the largest probability.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fisher_vmap.head import Head
from fisher_vmap.metric import Probes, metric, probe_rows

REST = -1  # the token id of "any other token"


@dataclass(frozen=True)
class Wanted:
    """What is asked of a batch.

    Attributes:
        top_k: the number of likeliest tokens.
        token_ids: [B, K], the tokens, where the caller has chosen them.
        positions: where the bias is added.
        chunk_size: cotangents at a time.
        include_rest: whether "any other token" is an outcome as well.
        probes: random vectors of what the outcomes leave out; None: none.
        precision: "model", "float32", or "mixed": the forward alone in float32.
    """

    top_k: int
    token_ids: Tensor | None
    positions: str | Tensor
    chunk_size: int | None
    include_rest: bool = False
    probes: Probes | None = None
    precision: str = "model"


class Outcomes(NamedTuple):
    """O outcomes of each prompt, and the cotangents, C of them, from which their scores follow.

    Attributes:
        log_probs: [B, O].
        token_ids: [B, O], the last of them `REST` where that is included.
        cotangents: [C, B, X]: of the outcomes but the one that is derived, then of the random vectors.
        derived: [B], the outcome that is not pulled back; None: all are.
    """

    log_probs: Tensor
    token_ids: Tensor
    cotangents: Tensor
    derived: Tensor | None

    @property
    def pulled(self) -> Tensor:
        """[B, n] int64, the outcomes that are pulled back."""
        B, O = self.log_probs.shape
        every_BO = torch.arange(O, device=self.log_probs.device).expand(B, O)
        if self.derived is None:
            return every_BO
        return every_BO[every_BO != self.derived[:, None]].view(B, O - 1)

    def weights(self) -> Tensor:
        """[B, C]: the probability of each outcome that is pulled back; 0 for random vectors."""
        p_Bn = self.log_probs.exp().gather(1, self.pulled)
        return torch.nn.functional.pad(p_Bn, (0, len(self.cotangents) - p_Bn.shape[1]))

    def derivation(self) -> tuple[Tensor, Tensor] | None:
        """How the derived score is made of the others, [B, C], and its probability, [B]; None if there is none."""
        if self.derived is None:
            return None
        p_B = self.log_probs.gather(1, self.derived[:, None])[:, 0].exp()
        return -self.weights() / p_B[:, None], p_B

    def scores(self, pulled_BCD: Tensor) -> tuple[Tensor, Tensor]:
        """The scores of the outcomes, [B, O, D], and the random vectors, [B, S, D]."""
        at_Bn = self.pulled
        n = at_Bn.shape[1]
        gradients, random = pulled_BCD[:, :n], pulled_BCD[:, n:]
        derivation = self.derivation()
        if derivation is None or self.derived is None:
            return gradients, random
        B, O = self.log_probs.shape
        scores_BOD = gradients.new_empty(B, O, gradients.shape[2])
        scores_BOD.scatter_(1, at_Bn.to(gradients.device)[:, :, None].expand_as(gradients), gradients)
        combination_BC = derivation[0].to(gradients)
        scores_BOD[torch.arange(B, device="cpu"), self.derived.cpu()] = torch.einsum(
            "bc,bcd->bd", combination_BC, pulled_BCD
        )
        return scores_BOD, random


def read_outcomes(head: Head, rows_BX: Tensor, wanted: Wanted) -> Outcomes:
    """Read the outcomes off the last rows.

    Raises:
        ValueError: "any other token" is wanted where there is none.
    """
    log_probs, token_ids, cotangents_KBX, log_rest_B = head.read(rows_BX, wanted.top_k, wanted.token_ids)
    tokens, derived = token_ids, None
    if wanted.include_rest or wanted.probes is not None:
        c = metric(head, rows_BX)
    if wanted.include_rest:
        if token_ids.shape[1] >= c.probs.shape[1]:
            raise ValueError(f"include_rest with all {token_ids.shape[1]} tokens leaves no other one; lower top_k")
        # Its own mean over the rest, not what the tokens lack: that cancels where they hold almost everything.
        # From the logits: their probabilities may all be too small for a number.
        share_BV = c.log_probs.scatter(1, token_ids.to(c.log_probs.device), -torch.inf).softmax(1)
        rest_1BX = c.transposed(share_BV[:, None]).transpose(0, 1)
        log_probs = torch.cat([log_probs, log_rest_B[:, None]], 1)
        token_ids = torch.cat([token_ids, torch.full_like(token_ids[:, :1], REST)], 1)
        derived = log_probs.argmax(1)
        every_OBX = torch.cat([cotangents_KBX, rest_1BX])
        outcomes = Outcomes(log_probs, token_ids, every_OBX, derived)
        cotangents_KBX = every_OBX.gather(0, outcomes.pulled.T[:, :, None].expand(-1, -1, every_OBX.shape[2]))
    if wanted.probes is not None:
        random_BSX = probe_rows(c, wanted.probes, tokens, centred=wanted.include_rest)
        cotangents_KBX = torch.cat([cotangents_KBX, random_BSX.transpose(0, 1)])
    return Outcomes(log_probs, token_ids, cotangents_KBX, derived)
