"""One architecture against plain autograd: hooks at the first, a middle and the last block, padding on either side."""

import functools
import itertools
import logging
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import architectures
import torch
from models import padded
from oracles import Plain, log_probabilities, plain_scores, relative
from torch import nn

from fisher_vmap import FisherModel
from fisher_vmap.model.layers import resolve_layers

BATCHES = ((9, 4, 11), (2, 4, 3), (60, 180, 41))  # the second is shorter than the windows of attention, 4
TOP_K = 4
TOLERANCE = 2e-4


@dataclass
class Finding:
    """What came of one model type.

    Attributes:
        kind: the model type.
        model_class: the name of its class.
        outcome: "agrees", "differs", "refused" or "not built".
        reason: why it was refused or not built; where it differs, by how much.
        blocks: the names of its decoder blocks.
        forms: for each hooked block, the form and why.
        distance: the largest relative distance from plain autograd over prompts, hooks and paddings.
        oracle: the dtype of plain autograd.
        warnings: what the package warned of.
        unbatched: operations that torch ran once for each cotangent, for want of a batching rule.
    """

    kind: str
    model_class: str
    outcome: str
    reason: str = ""
    blocks: list[str] = field(default_factory=list)
    forms: dict[str, dict[str, str]] = field(default_factory=dict)
    distance: float = float("nan")
    oracle: str = ""
    warnings: list[str] = field(default_factory=list)
    unbatched: list[str] = field(default_factory=list)


def examine(kind: str) -> Finding:
    """Build a model type and compare the package with plain autograd on it."""
    model_class = architectures.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[kind]
    try:
        model = architectures.build(kind)
    except Exception as error:  # anything that a config or a constructor may say
        return Finding(kind, model_class, "not built", one_line(error))
    batches = [architectures.prompts(lengths, seed) for seed, lengths in enumerate(BATCHES)]
    with listening() as heard:
        try:
            every = resolve_layers(model, "all")
            names = [every[i] for i in sorted({0, len(every) // 2, len(every) - 1})]
            opened = FisherModel(model, layers=names, top_k=TOP_K)
            found = [
                {side: opened.scores(*padded(rows, side, extra=1)) for side in ("right", "left")} for rows in batches
            ]
        except ValueError as refusal:
            return Finding(kind, model_class, "refused", one_line(refusal), warnings=heard.logged)
    reference, oracle = wide_reference(kind, model, [row for rows in batches for row in rows])
    distance, where, own = 0.0, "", 0.0
    for rows, by_side in zip(batches, found, strict=True):
        for b, row in enumerate(rows):
            with torch.no_grad():
                log_p_V = log_probabilities(reference, row)
            assert log_p_V.std() > 0.5, f"{kind}: near a uniform distribution every score is small, and nothing shows"
            for name, (side, scores) in itertools.product(names, by_side.items()):
                expected = oracle_scores(reference, row, name, tuple(scores.token_ids[b].tolist()))
                away = max(
                    relative(scores.gradients[name][b], expected.gradients),
                    float((scores.log_probs[b] - expected.log_probs).abs().max()),
                    float((scores.log_probs[b] - log_p_V.topk(TOP_K).values).abs().max()),
                )
                if not away <= distance:
                    distance, where = away, f"{name}, prompt {b} of {[len(r) for r in rows]} tokens, padded {side}"
                    if away > TOLERANCE:  # how far the model's own float32 is
                        plain = plain_scores(model, row, name, token_ids=expected.token_ids)
                        own = relative(plain.gradients, expected.gradients)
            oracle_scores.cache_clear()
    outcome = "agrees" if distance <= max(TOLERANCE, 2 * own) else "differs"
    reason = "" if outcome == "agrees" else f"{distance:.1e} from plain autograd at {where}"
    forms, logged, unbatched = opened.forms, heard.logged, heard.unbatched()
    return Finding(kind, model_class, outcome, reason, every, forms, distance, oracle, logged, unbatched)


def wide_reference(kind: str, model: nn.Module, rows: list[torch.Tensor]) -> tuple[nn.Module, str]:
    """The model in float64 and "float64", or itself and why float64 says nothing of it."""
    wide = architectures.build(kind).double()
    if hasattr(wide, "set_experts_implementation"):
        wide.set_experts_implementation("eager")  # the grouped product knows no float64
    try:
        with torch.no_grad():
            apart = max(
                float((log_probabilities(model, row) - log_probabilities(wide, row)).abs().max()) for row in rows
            )
    except (RuntimeError, NotImplementedError):
        return model, "float32: it does not run in float64"
    if apart > 1e-3:
        return model, "float32: experts or keys that it chooses are others in float64"
    return wide, "float64"


@functools.cache
def oracle_scores(model: nn.Module, row: torch.Tensor, layer: str, token_ids: tuple[int, ...]) -> Plain:
    return plain_scores(model, row, layer, token_ids=torch.tensor(token_ids))


def one_line(error: BaseException) -> str:
    return f"{' '.join(str(error).split())[:200]}" or type(error).__name__


class Heard(logging.Handler):
    """What the package logged as a warning, and what torch warned of."""

    def __init__(self, told: list[warnings.WarningMessage]) -> None:
        super().__init__(logging.WARNING)
        self.logged: list[str] = []
        self._told = told

    def emit(self, record: logging.LogRecord) -> None:
        self.logged.append(record.getMessage())

    def unbatched(self) -> list[str]:
        """The operations that torch has no batching rule for."""
        return sorted({op for w in self._told for op in re.findall(r"batching rule for aten::(\w+)", str(w.message))})


@contextmanager
def listening() -> Iterator[Heard]:
    """Gives what is heard within the context."""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        heard = Heard(told)
        logging.getLogger("fisher_vmap").addHandler(heard)
        try:
            yield heard
        finally:
            logging.getLogger("fisher_vmap").removeHandler(heard)


examined = functools.cache(examine)
