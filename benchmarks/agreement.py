"""Are two results the same? Asked after every timing: a fast wrong answer must not enter a table."""

import copy
from typing import Any

import torch
from torch import Tensor

from benchmarks.baselines import Loop, careful_loop
from benchmarks.workloads import Batch

FLOAT32_BUDGET = 1e-3
# bfloat16 rounds on the way down through the blocks, each way of computing in its own manner. Ours may be no further
# from float32 than the loop is, but for this much: the distances of a few prompts are themselves a matter of luck.
BFLOAT16_FACTOR, BFLOAT16_SLACK = 1.5, 0.02
BFLOAT16_LOG_PROBS = 0.05  # of another prompt they differ by 0.2 and more


def distances(found: Loop, expected: Loop) -> Tensor:
    """[B]: of each prompt, the relative distance |G - G'| / |G'| over the tokens that both have.

    A token's score does not depend on which others were chosen, and in bfloat16 the lowest of the top k often tie.

    Raises:
        AssertionError: a prompt has fewer than half of its tokens in common.
    """
    result = []
    for ids, other_ids, G, other_G in zip(
        found.token_ids.tolist(), expected.token_ids.tolist(), found.gradients, expected.gradients, strict=True
    ):
        common = [token for token in ids if token in other_ids]
        assert 2 * len(common) >= len(ids), f"of {len(ids)} tokens only {len(common)} are in both results"
        rows = G[[ids.index(token) for token in common]].double()
        other_rows = other_G[[other_ids.index(token) for token in common]].double()
        result.append((rows - other_rows).norm() / other_rows.norm())
    return torch.stack(result).cpu()


def assert_float32_agreement(found: Loop, expected: Loop) -> float:
    """The largest distance of any prompt; at most 1e-3."""
    worst = float(distances(found, expected).max())
    assert worst <= FLOAT32_BUDGET, f"scores differ by {worst:.1e}; expected at most {FLOAT32_BUDGET:.0e}"
    return worst


def assert_bfloat16_agreement(found: Loop, careful: Loop, truth: Loop) -> tuple[float, float]:
    """Median distances from float32 of ours and of the careful loop; ours must be no further away."""
    ours, loops = float(distances(found, truth).median()), float(distances(careful, truth).median())
    limit = BFLOAT16_FACTOR * loops + BFLOAT16_SLACK
    assert ours <= limit, f"scores are {ours:.3f} from float32, the loop's {loops:.3f}; expected at most {limit:.3f}"
    return ours, loops


def assert_same_log_probs(logits_BV: Tensor, scores: Loop) -> float:
    """The largest relative distance of any prompt's log p from what these logits give for the same tokens.

    Raises:
        AssertionError: it is above the budget of the logits' dtype.
    """
    log_p_BK = logits_BV.float().log_softmax(-1).gather(1, scores.token_ids)
    worst = float(((log_p_BK - scores.log_probs).norm(dim=1) / scores.log_probs.norm(dim=1)).max())
    budget = FLOAT32_BUDGET if logits_BV.dtype == torch.float32 else BFLOAT16_LOG_PROBS
    assert worst <= budget, f"log p differs by {worst:.1e} from the forward pass's; expected at most {budget:.0e}"
    return worst


def float32_truth(model: Any, batch: Batch, layer: str, token_ids: Tensor, where: Tensor | None = None) -> Loop:
    """The scores of these tokens by the careful loop, on a float32 copy of the model."""
    wide = copy.deepcopy(model).float()
    return careful_loop(wide, batch.input_ids, batch.attention_mask, layer, token_ids.shape[1], token_ids, where)


def agreement(
    model: Any, batch: Batch, layer: str, found: dict[str, Loop], careful: Loop, where: Tensor | None = None
) -> dict[str, Any]:
    """Hold every result against the careful loop by the budget of the model's dtype; the distances, for the record.

    `where` [B, T] says at which positions the bias was added; None: all.

    Raises:
        AssertionError: one is further away than that.
    """
    if model.dtype == torch.float32:
        return {name: assert_float32_agreement(scores, careful) for name, scores in found.items()}
    truth = float32_truth(model, batch, layer, careful.token_ids, where)
    record: dict[str, Any] = {}
    for name, scores in found.items():
        record[name], record["careful"] = assert_bfloat16_agreement(scores, careful, truth)
    return {f"{name}, median distance from float32": value for name, value in record.items()}
