"""What a step does to prompts, seen from outside: the next tokens and a text without it and with it, and as lines.

The passes are plain ones of the model, in the format of its weights, with the step added by `steer`. The KL divergences
are those of `natural_step`.
"""

import inspect
import textwrap
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fisher_vmap.completions import complete
from fisher_vmap.data.render import TokenizedPrompt
from fisher_vmap.escape import short, visible
from fisher_vmap.fisher_model import FisherModel
from fisher_vmap.model.recording import hooks, output_of
from fisher_vmap.natural import REACH, NaturalStep
from fisher_vmap.objective import Objective
from fisher_vmap.progress import bar, passing, step
from fisher_vmap.steering import steer

COLUMNS = 100  # of the lines
NAME = 15  # columns of what a line is about
SHOWN, TOKEN = 6, 24  # next tokens, and the most characters of one
PROMPT = 72  # characters of the first prompt
BAR = 40


class Look(NamedTuple):
    """What the model does with P prompts.

    Attributes:
        next_V: [V] float64, the probability of each next token, the mean over the prompts.
        probability_P: [P] float64, of the wanted tokens.
        objective_P: [P] float64, nats, what is to be gained.
        norm: the median norm of the layer's output, before a step is added, over all tokens of all prompts.
        text: what the model writes after the first prompt; empty if nothing was asked for.
    """

    next_V: Tensor
    probability_P: Tensor
    objective_P: Tensor
    norm: float
    text: str


def look(
    fisher: FisherModel, prompts_ids: Sequence[list[int]], found: NaturalStep, wanted: Objective, tokens: int
) -> tuple[Look, Look]:
    """Look at prompts, given as token ids, without the step and with it; a text has so many tokens at most."""
    before = _look(fisher, prompts_ids, found.layer, wanted, tokens, "without the step")
    with steer(fisher.model, found):
        return before, _look(fisher, prompts_ids, found.layer, wanted, tokens, "with the step")


def _look(
    fisher: FisherModel, prompts_ids: Sequence[list[int]], layer: str, wanted: Objective, tokens: int, how: str
) -> Look:
    assert wanted.towards is not None
    mean_V, p, objective, norms = torch.zeros(1, dtype=torch.float64), [], [], []
    with bar(len(prompts_ids), "prompts", f"reading the next tokens {how}") as advance:
        for ids in passing(prompts_ids, advance):
            log_p_1V, norm_T = _next(fisher, ids, layer)
            mean_V = mean_V + log_p_1V[0].exp() / len(prompts_ids)
            p.append(log_p_1V[:, wanted.towards].exp().sum(1))
            objective.append(wanted.values(log_p_1V))
            norms.append(norm_T)
    text = ""
    if tokens:
        with step(f"writing a text {how}"):
            (row,) = complete(fisher.model, prompts_ids[:1], tokens)
        text = str(fisher.tokenizer.decode(row))
    return Look(mean_V, torch.cat(p), torch.cat(objective), float(torch.cat(norms).median()), text)


def _next(fisher: FisherModel, ids: list[int], layer: str) -> tuple[Tensor, Tensor]:
    """The log-probabilities after a prompt, [1, V], and the norms of the layer's output, [T]; float64, on the CPU."""
    model: Any = fisher.model
    input_ids, norms = torch.tensor([ids], device=fisher.device), list[Tensor]()

    def note(_module: nn.Module, _inputs: Any, output: Any) -> None:
        if (stream := output_of(output)) is not None:
            norms.append(stream.detach().double().norm(dim=-1).flatten().cpu())

    last = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    handle = model.get_submodule(layer).register_forward_hook(note, prepend=True)  # before a step is added
    with torch.no_grad(), hooks(handle):
        logits_1V = model(input_ids=input_ids, attention_mask=torch.ones_like(input_ids), **last).logits[:, -1]
    return logits_1V.double().cpu().log_softmax(1), torch.cat(norms)


def lines(
    fisher: FisherModel,
    prompts: Sequence[TokenizedPrompt],
    found: NaturalStep,
    wanted: Objective,
    looks: tuple[Look, Look],
    *,
    unicode: bool = True,
) -> Iterator[str]:
    """What to print, at most 100 columns wide; `unicode`: whether the bar may have more than ASCII."""
    (before, after), others = looks, len(prompts) - 1
    yield from _field("prompt", _quoted(prompts[0].text) + (f" and {others} more" if others else ""))
    yield from _field("towards", _names(fisher, wanted.towards))
    if wanted.away_from is not None:
        yield from _field("away from", _names(fisher, wanted.away_from))
    length, taken = float(found.step.norm()), f" in {found.steps} steps" if found.steps > 1 else ""
    share = f"{_percent(length / before.norm)} of the residual stream's median norm {before.norm:.3g}"
    yield from _field("step", f"at {found.layer}, added at {_places(found.positions)}")
    yield from _field("length", f"{length:.3g}{taken}, {share}")
    yield ""
    yield f"{'next token':{NAME}}{'without the step':{TOKEN + 12}}with the step"
    for one, other in zip(*(_likeliest(fisher, each.next_V) for each in looks), strict=True):
        yield f"{'':{NAME}}{one:{TOKEN + 12}}{other}"
    yield ""
    yield from _field("probability", " -> ".join(_percent(float(each.probability_P.mean())) for each in looks))
    odds = " -> ".join(f"{float(each.objective_P.mean()):.3f}" for each in looks)
    yield from _field("log-odds", f"{odds} nats")
    if others:
        gained = int((after.objective_P > before.objective_P).sum())
        yield from _field("prompts", f"{gained} of {len(prompts)} gained; the numbers are means over the prompts")
    yield ""
    several = f", of up to {fisher.targets} tokens together" if isinstance(fisher.targets, int) else ""
    kl = f"budget {found.kl:.3g}, predicted {found.predicted_kl:.3g}, measured {found.measured_kl:.3g}{several}"
    yield from _field("KL in nats", kl)
    yield from _field("off target", f"{found.off_target_kl:.3g} nats, the KL among the other tokens")
    yield from _field("budget used", used(found.measured_kl / found.kl, unicode))
    if not found.quadratic:
        what = "budget" if abs(found.measured_kl - found.kl) > REACH * found.kl else "predicted one"
        far = f"the measured KL differs from the {what} by more than {REACH:.0%}"
        far += ": the quadratic form does not reach so far"
        nearer = f"{found.kl**2 / found.measured_kl:.2g} comes nearer to {found.kl:.3g}" if found.measured_kl else ""
        yield from _field("note", f"{far}; --kl {nearer}" if nearer else far)
    if before.text or after.text:
        yield ""
        for name, each in (("text without", before), ("text with", after)):
            yield from _field(name, visible(each.text, spaces=False))


def used(part: float, unicode: bool) -> str:
    """A bar of how much of the budget was used; beyond all of it the bar is full."""
    full, empty = ("█", "░") if unicode else ("#", ".")
    count = min(BAR, round(BAR * part))
    return f"{full * count}{empty * (BAR - count)} {part:.0%}"


def _field(name: str, text: str) -> list[str]:
    """What stands behind a name, on as many lines as it takes."""
    indent = " " * NAME
    wrapped = textwrap.wrap(text, COLUMNS, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False)
    return [f"{name:{NAME}}{(wrapped or [indent])[0][NAME:]}".rstrip(), *wrapped[1:]]


def _quoted(text: str) -> str:
    return f'"{short(visible(" ".join(text.split()), spaces=False), PROMPT)}"'


def _places(positions: str | Tensor) -> str:
    where = {"all": "all positions", "last": "the prompt's last token", "prompt": "every token of the prompt"}
    return where[str(positions)]


def _percent(p: float) -> str:
    """Three digits."""
    return f"{100 * p:#.3g}".rstrip(".") + "%"


def _token(fisher: FisherModel, token: int) -> str:
    assert fisher.pieces is not None
    return short(visible(fisher.pieces.single(token)), TOKEN)


def _names(fisher: FisherModel, tokens: Tensor | None) -> str:
    return ", ".join(_token(fisher, int(token)) for token in ([] if tokens is None else tokens))


def _likeliest(fisher: FisherModel, p_V: Tensor) -> list[str]:
    top = p_V.topk(min(SHOWN, len(p_V)))
    return [f"{_percent(float(p)):>7}  {_token(fisher, int(t))}" for p, t in zip(top.values, top.indices, strict=True)]
