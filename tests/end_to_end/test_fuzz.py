"""Drawn models, hooks, batches and changes: the scores are those of plain autograd, or one line says why none are.

python tests/end_to_end/test_fuzz.py --minutes 60 --seed 3     # a long run: each fault once, with a case to replay
replay(Case(family="gpt2", lengths=(300,)))                    # one case again, in Python
"""

import argparse
import copy
import logging
import re
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1]))  # run as a script, it would know its own folder alone

import pytest
import torch
from fuzz_cases import (
    CHANGES,
    EXPERTS,
    MAKES,
    OF_THE_BATCH,
    SHIFTED_BY_PADDING,
    TAIL_VALUES,
    Batch,
    Case,
    Hook,
    Steer,
    batch_of,
    build,
    changed,
    layer_names,
    steers_of,
)
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import fisher_vmap
from fisher_vmap import FisherModel, fisher_full, fisher_scores

TOLERANCE = {"float64": 1e-6, "float32": 1e-3}  # of scores, pooled over a prompt's tokens
FLOOR = {"scores": 0.05, "log_probs": 0.1}  # of bfloat16, where plain bfloat16 happens to be near
LOOSER = {"mamba": 100}  # its residual stream is float32 in any dtype, and its recurrence rounds at each token
PACKAGE = str(Path(fisher_vmap.__file__).parent)
WIDE_NORMS = ("gpt2", "gpt_neox", "opt", "bloom", "falcon", "phi")  # the others' norms are float32 in any dtype


@dataclass(frozen=True)
class Outcome:
    """What came of a case: "agreed", "refused", "unchecked" (plain autograd does not run either) or "fault"."""

    kind: str
    reason: str = ""
    detail: str = ""


class Fault(Exception):
    """`reason` names the kind of fault, `detail` has the numbers."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail = reason, detail


class NoOracle(Exception):
    """Plain autograd does not run."""


def tolerance_of(case: Case) -> float:
    """Of float32 where that is what bfloat16 weights are computed in, or compared with."""
    if case.dtype == "float64":
        return TOLERANCE["float64"] * LOOSER.get(case.family, 1)
    return TOLERANCE["float32"]


# -- plain autograd ----------------------------------------------------------------------------------------------


class Truth(NamedTuple):
    """Of one prompt: log p [V], and for each layer the scores [K, T, D] of a bias at each position, and its outputs."""

    log_probs: Tensor
    scores: dict[str, Tensor]
    outputs: dict[str, Tensor]


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def autograd(model: nn.Module, ids: Tensor, mask: Tensor | None, layers: Sequence[str], tokens: Tensor) -> list[Truth]:
    """A batch [B, T] as the model itself takes it: a bias of its own for each position, one backward pass a token.

    Raises:
        NoOracle: the model's own forward or backward fails.
    """
    B, T = ids.shape
    real = torch.ones(B, T, dtype=torch.bool) if mask is None else mask.bool()
    biases: dict[str, Tensor] = {}
    outputs: dict[str, Tensor] = {}

    def adding(layer: str) -> Callable[..., Any]:
        def add(_module: nn.Module, _args: Any, output: Any) -> Any:
            out = output if isinstance(output, Tensor) else output[0]
            outputs[layer] = out.detach().clone()
            biases[layer] = torch.zeros_like(out, requires_grad=True)
            return out + biases[layer] if isinstance(output, Tensor) else (out + biases[layer], *output[1:])

        return add

    inputs: dict[str, Any] = {"input_ids": ids, "use_cache": False}
    if mask is not None:
        inputs["attention_mask"] = mask
    handles = [model.get_submodule(layer).register_forward_hook(adding(layer)) for layer in layers]
    try:
        with torch.enable_grad(), evaluating(model):
            logits = model(**inputs).logits
            last = T - 1 - real.int().flip(1).argmax(1)
            log_p = logits[torch.arange(B), last].to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
            rows = [
                torch.autograd.grad(log_p.gather(1, t[:, None]).sum(), [biases[x] for x in layers], retain_graph=True)
                for t in tokens.T
            ]
    except (RuntimeError, IndexError, TypeError) as error:
        raise NoOracle(one_line(error)) from error
    finally:
        for handle in handles:
            handle.remove()
    if bool(log_p.isnan().any()):  # some models give NaN for rows whose window is all padding
        raise NoOracle("the model's own logits are not numbers")
    return [
        Truth(
            log_p[b].detach(),
            {x: torch.stack([row[i][b][real[b]] for row in rows]) for i, x in enumerate(layers)},
            {x: outputs[x][b][real[b]] for x in layers},
        )
        for b in range(B)
    ]


def truths(case: Case, model: nn.Module, batch: Batch, layers: Sequence[str], tokens: Tensor) -> list[Truth]:
    """Each prompt alone and unpadded; in the caller's batch where a hook means nothing else."""
    kinds, several = {hook.kind for hook in case.hooks}, len(batch.rows) > 1
    if ("stored" in kinds and (several or batch.mask is not None)) or ("per_prompt" in kinds and several):
        return autograd(model, batch.ids, batch.mask, layers, tokens)
    return [autograd(model, row[None], None, layers, t[None])[0] for row, t in zip(batch.rows, tokens, strict=True)]


def summed(truth: Truth, layer: str, positions: str) -> Tensor:
    scores_KTD = truth.scores[layer].double()
    return scores_KTD[:, -1] if positions == "last" else scores_KTD.sum(1)


def away(found: Tensor, expected: Tensor) -> float:
    """||found - expected|| / ||expected||, or in units of 1e-3 where that is less."""
    found, expected = found.detach().double(), expected.detach().double()
    return float((found - expected).norm() / max(float(expected.norm()), 1e-3))


def apart(found: Tensor, expected: Tensor) -> float:
    """Largest difference of two vectors of log-probabilities; what is -inf in both does not count."""
    gap = torch.where(found == expected, 0.0, (found.double() - expected.double()).abs())
    return float(gap.max())


# -- one call ----------------------------------------------------------------------------------------------------


class Answer(NamedTuple):
    """What the package gave: scores, or a matrix of each prompt and layer."""

    log_probs: Tensor
    token_ids: Tensor
    scores: Any
    matrices: dict[str, list[Tensor]] | None


def ask(case: Case, model: nn.Module, batch: Batch, layers: list[str], opened: list[FisherModel]) -> Answer:
    options: dict[str, Any] = {
        "layers": layers, "top_k": case.top_k, "positions": case.positions, "kernel": case.kernel,
        "precision": case.precision,
    }  # fmt: skip
    if case.call == "full":
        full = fisher_full(
            model, batch.ids, batch.mask, rank=64, oversampling=case.seed % 3, trace_samples=0, **options
        )
        matrices = {x: [A.double().mT @ A.double() for A in full.factors[x]] for x in layers}
        return Answer(full.log_probs, full.token_ids, None, matrices)
    if case.call == "numbers":
        if not opened:
            opened.append(FisherModel(model, **options))
        found = opened[0].numbers([row.tolist() for row in batch.rows], case.top_k)
        as_tensor = lambda x: torch.from_numpy(x.copy()).double()  # noqa: E731
        matrices = {
            x: [as_tensor(n.layers[x].V).T * as_tensor(n.layers[x].S) @ as_tensor(n.layers[x].V) for n in found]
            for x in layers
        }
        log_probs = torch.stack([torch.from_numpy(n.log_probs.copy()) for n in found])
        return Answer(log_probs, torch.stack([torch.from_numpy(n.token_ids.copy()) for n in found]), None, matrices)
    scores = fisher_scores(model, batch.ids, batch.mask, **options)
    return Answer(scores.log_probs, scores.token_ids, scores, None)


def snapshot(model: nn.Module) -> dict[str, Any]:
    """What a call must leave as it was."""
    of: dict[str, Any] = {}
    for name, module in model.named_modules():
        own = vars(module)
        kept = ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs", "_backward_hooks")
        of[f"{name} itself"] = (id(module), type(module), type(module).forward)
        of[f"{name} forward"] = own.get("forward")
        of[f"{name} hooks"] = [list(own[key].items()) for key in kept]
        of[f"{name} training"] = module.training
        of[f"{name} attributes"] = sorted(
            (key, value) for key, value in own.items() if type(value) in (bool, int, float, str) and key != "training"
        )
    for name, p in model.named_parameters():
        of[f"{name} parameter"] = (id(p), p.data_ptr(), p.dtype, p.requires_grad, p.grad is None)
        of[f"{name} values"] = p.detach().clone()
    for name, buffer in model.named_buffers():
        of[f"{name} buffer"] = buffer.clone()
    of["config"] = model.config.to_dict()
    of["attention"] = model.config._attn_implementation
    of["torch"] = (torch.is_grad_enabled(), torch.get_default_dtype(), torch.is_inference_mode_enabled())
    return of


def differences(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    def same(a: Any, b: Any) -> bool:
        if isinstance(a, Tensor):
            return isinstance(b, Tensor) and a.dtype == b.dtype and torch.equal(a, b)
        return bool(a == b)

    return [key for key in before | after if key not in before or key not in after or not same(before[key], after[key])]


def one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"


def check_call(case: Case, model: nn.Module, batch: Batch, opened: list[FisherModel], steers: list[Steer]) -> str:
    """Ask once, and compare; returns the reason where the package refused, else "".

    Raises:
        Fault: another exception than one line of a ValueError's, another model than before, or wrong numbers.
    """
    for steer in steers:
        steer.shape = tuple(batch.ids.shape)
    layers = layer_names(case, model)
    before, refusal, answer = snapshot(model), None, None
    try:
        answer = ask(case, model, batch, layers, opened)
    except Exception as error:
        refusal = error
    for steer in steers:
        steer.seen = None
    if gone := differences(before, snapshot(model)):
        raise Fault(f"changed the model: {gone[0].rpartition(' ')[2]}", ", ".join(gone[:6]))
    if refusal is not None:
        frames = traceback.extract_tb(refusal.__traceback__)
        inside = [frame for frame in frames if frame.filename.startswith(PACKAGE)]
        said = one_line(refusal)
        where = f"{Path(inside[-1].filename).name}:{inside[-1].lineno}" if inside else "?"
        if not isinstance(refusal, ValueError):
            also = " (as the model itself does)" if fails_itself(case, model, batch, layers) else ""
            raise Fault(said + also, f"raised below {where}") from refusal
        if "\n" in str(refusal) or not str(refusal) or frames[-1] is not (inside or [None])[-1]:
            raise Fault(f"{said} (no line of the package's)", f"raised below {where}") from refusal
        return said
    assert answer is not None
    if case.call == "full":
        compare_matrices(
            case, model, batch, layers, answer, torch.arange(answer_width(model)).expand(len(batch.rows), -1)
        )
    else:
        compare(case, model, batch, layers, answer)
    return ""


def fails_itself(case: Case, model: nn.Module, batch: Batch, layers: list[str]) -> bool:
    """Whether plain autograd does not run on these prompts either."""
    try:
        truths(case, model, batch, layers, torch.zeros(len(batch.rows), 1, dtype=torch.int64))
    except NoOracle:
        return True
    return False


def answer_width(model: nn.Module) -> int:
    return int(model.get_output_embeddings().weight.shape[0])


# -- comparisons -------------------------------------------------------------------------------------------------


def widened(case: Case, model: nn.Module) -> nn.Module:
    return copy.deepcopy(model).float() if case.dtype == "bfloat16" else model


def sensitivity(case: Case, model: nn.Module, batch: Batch, layers: list[str], tokens: Tensor) -> float:
    """How far the scores of plain autograd move when the embedding moves by rounding."""
    weight = model.get_input_embeddings().weight
    eps = 2e-15 if case.dtype == "float64" and case.family in WIDE_NORMS else 2e-7
    kept = weight.detach().clone()
    still = truths(case, model, batch, layers, tokens)
    try:
        weight.data.mul_(1 + eps * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)).to(weight))
        moved = truths(case, model, batch, layers, tokens)
    finally:
        weight.data.copy_(kept)
    return max(
        away(summed(a, x, case.positions), summed(b, x, case.positions))
        for a, b in zip(moved, still, strict=True)
        for x in layers
    )


def compare(case: Case, model: nn.Module, batch: Batch, layers: list[str], answer: Answer) -> None:
    """Tokens, log-probabilities, scores, energies and norms of each prompt; or the matrices of these tokens."""
    wide = widened(case, model)
    expected = truths(case, wide, batch, layers, answer.token_ids)
    narrow = case.dtype == "bfloat16" and case.precision != "float32"
    plain = truths(case, model, batch, layers, answer.token_ids) if narrow else expected
    tolerance = tolerance_of(case)
    for b, (want, own) in enumerate(zip(expected, plain, strict=True)):
        at = f"prompt {b} of lengths {tuple(len(row) for row in batch.rows)}"
        ids, log_p = answer.token_ids[b], answer.log_probs[b]
        room = max(4 * apart(own.log_probs, want.log_probs), FLOOR["log_probs"]) if narrow else max(tolerance, 1e-5)
        likeliest = want.log_probs.sort(descending=True).values[: len(ids)]
        if len(set(ids.tolist())) < len(ids) or not apart(want.log_probs[ids], likeliest) <= 2 * room:
            right = want.log_probs.topk(len(ids)).indices.tolist()
            raise Fault("wrong token_ids", f"{at}: {ids.tolist()}, plain autograd {right}")
        if not apart(log_p, want.log_probs[ids]) <= room:
            raise Fault("wrong log_probs", f"{at}: {apart(log_p, want.log_probs[ids]):.1e} away, room {room:.1e}")
    if answer.matrices is not None:
        compare_matrices(case, model, batch, layers, answer, answer.token_ids)
        return
    for b, (want, own) in enumerate(zip(expected, plain, strict=True)):
        alive = want.log_probs[answer.token_ids[b]] > -torch.inf
        for x in layers:
            at = f"{x}, prompt {b} of lengths {tuple(len(row) for row in batch.rows)}"
            right = summed(want, x, case.positions)[alive]
            noise = away(summed(own, x, case.positions)[alive], right) if narrow else 0.0
            room = max(4 * noise, FLOOR["scores"]) if narrow else tolerance
            got = answer.scores.gradients[x][b][alive]
            distance = away(got, right)
            if not distance <= room:
                if not narrow and distance <= 8 * sensitivity(case, wide, batch, layers, answer.token_ids):
                    continue
                told = f"{at}: {distance:.1e} away, room {room:.1e}; |g| {got.norm():.3g}, expected {right.norm():.3g}"
                raise Fault("wrong scores", told + in_batch(case, wide, batch, layers, answer))
            check_beside(case, batch, x, b, at, answer, want, room)


def check_beside(case: Case, batch: Batch, x: str, b: int, at: str, answer: Answer, want: Truth, room: float) -> None:
    """The energy of each position in the caller's columns, and the norm of the layer's outputs."""
    columns = torch.arange(batch.ids.shape[1]) if batch.mask is None else batch.mask[b].nonzero()[:, 0]
    energy = answer.scores.position_energy[x][b].double()
    if case.positions == "all":
        p_K = answer.log_probs[b].double().exp()
        right = torch.zeros_like(energy)
        right[columns] = (want.scores[x].double().square().sum(-1) * p_K[:, None]).nan_to_num().sum(0)
        if not away(energy, right) <= 8 * room + 1e-5:
            raise Fault("wrong position_energy", f"{at}: {away(energy, right):.1e} away")
    norm = float(answer.scores.residual_norm[x][b])
    norms = want.outputs[x].double().norm(dim=-1)
    right_norm = float(norms.view(len(norms), -1).mean(1).quantile(0.5))
    if not abs(norm - right_norm) <= (4 * room + 1e-5) * right_norm:
        raise Fault("wrong residual_norm", f"{at}: {norm:.6g}, expected {right_norm:.6g}")


def in_batch(case: Case, model: nn.Module, batch: Batch, layers: list[str], answer: Answer) -> str:
    """Whether wrong scores are those of the caller's padded batch: said beside, it excuses nothing."""
    if len(batch.rows) == 1 and batch.mask is None:
        return ""
    try:
        found = autograd(model, batch.ids, batch.mask, layers, answer.token_ids)
    except NoOracle:
        return ""
    gaps = [
        away(answer.scores.gradients[x][b], summed(truth, x, case.positions))
        for b, truth in enumerate(found)
        for x in layers
    ]
    return f"; from plain autograd on the caller's padded batch {max(gaps):.1e}"


def compare_matrices(
    case: Case, model: nn.Module, batch: Batch, layers: list[str], answer: Answer, tokens: Tensor
) -> None:
    """F of these tokens, or of the whole vocabulary."""
    assert answer.matrices is not None
    wide = widened(case, model)
    expected = truths(case, wide, batch, layers, tokens)
    room = 4 * tolerance_of(case)
    if case.call == "numbers":
        room = max(room, 1e-5)  # stored as float32
    for b, want in enumerate(expected):
        p_K = want.log_probs.double()[tokens[b]].exp()
        for x in layers:
            g_KD = summed(want, x, case.positions)[p_K > 0]
            F = (g_KD * p_K[p_K > 0, None]).T @ g_KD
            found = answer.matrices[x][b]
            distance = away(found, F)
            if not distance <= room and not distance <= 32 * sensitivity(case, wide, batch, layers, tokens):
                at = f"{x}, prompt {b} of lengths {tuple(len(row) for row in batch.rows)}"
                trace = f"trace {found.trace():.4g}, expected {F.trace():.4g}"
                raise Fault(f"wrong matrix of {case.call}", f"{at}: {distance:.1e} away, room {room:.1e}; {trace}")


# -- a case ------------------------------------------------------------------------------------------------------


def run(case: Case) -> Outcome:
    """One case from the model to the comparison."""
    with warnings.catch_warnings(), torch.random.fork_rng():
        warnings.simplefilter("ignore")
        model = build(case)
        steers, opened, refused = steers_of(case, model), list[FisherModel](), ""
        number = 1
        try:
            refused = check_call(case, model, batch_of(case, False), opened, steers)
            if case.change != "none":
                number = 2
                with changed(case, model, steers):
                    refused = check_call(case, model, batch_of(case, True), opened, steers) or refused
        except NoOracle as error:
            return Outcome("unchecked", str(error))
        except Fault as fault:
            return Outcome("fault", fault.reason, f"call {number}: {fault.detail}")
    if refused and must_work(case):
        return Outcome("fault", f"refused a plain case: {refused}")
    return Outcome("refused", refused) if refused else Outcome("agreed")


def must_work(case: Case) -> bool:
    """Whether nothing in a case is out of the ordinary, so that to refuse it is a fault."""
    ordinary = ("none", "longer", "train", "frozen", "assign", "eps", "config", "hook_added", "hook_removed")
    plain_change = case.change in ordinary or case.change.split()[0] in ("exchange", "data", "attention")
    harmless = all(hook.kind in ("read", "add") for hook in case.hooks)
    # bloom's activation has no forward derivative; falcon's attention with alibi is another under eager, so that only
    # the loop is right
    pushes = case.call != "full" or case.family not in ("bloom", "falcon")
    rows = case.family != "llama4" or not any(layer.startswith("mlp") for layer in case.layers)  # it returns [B T, D]
    return harmless and plain_change and pushes and rows and case.kernel == "auto" and "sinks" not in case.family


def replay(case: Case) -> Outcome:
    """Run a case and print what came of it."""
    outcome = run(case)
    print(outcome.kind, outcome.reason, outcome.detail, sep="\n  ")
    return outcome


# -- drawing -----------------------------------------------------------------------------------------------------

PLACES = (0, 1, 3, 7, 9, 20, 65, 70, 130, 300)
KINDS = (
    "add", "add_last", "add_from", "patch", "shape_if", "values_where", "read", "scale_input",
    "add", "add_last", "add_from", "patch", "shape_if", "values_if", "patch_raw", "stored", "per_prompt",
)  # fmt: skip


def a_hook(rng: Random, blocks: int) -> Hook:
    where = rng.choice(["block", "block", "attention", "mlp", "final_norm", "unembedding"])
    kind = rng.choice(["ban", "ban", *KINDS] if where == "unembedding" else KINDS)
    number = rng.randrange(blocks) if where in ("block", "attention", "mlp") else 0
    placed = kind in ("add_from", "patch", "patch_raw", "shape_if", "ban")
    return Hook(where, number, kind, rng.choice(PLACES) if placed else 0)


def a_case(rng: Random) -> Case:
    """A case that means something; most are small."""
    family, blocks = rng.choice(list(MAKES)), rng.randint(2, 4)
    steered = tuple(a_hook(rng, blocks) for _ in range(rng.choice([0, 0, 1, 1, 1, 2])))
    kinds = {hook.kind for hook in steered}
    dtype = rng.choice(["float64", "float64", "float32", "bfloat16"])
    if family in EXPERTS or any(kind.startswith("values") for kind in kinds):
        dtype = dtype.replace("bfloat16", "float32")  # rounding would choose other experts, or another branch
    call = rng.choice(["scores"] * 6 + ["full", "numbers"])
    if call != "scores":
        dtype = dtype.replace("bfloat16", "float32")
    lengths = [rng.randint(1, 12) for _ in range(rng.randint(1, 4))]
    far = any(hook.at > 12 for hook in steered) or "far" in family
    if rng.random() < (0.5 if far else 0.2):
        lengths[rng.randrange(len(lengths))] = rng.choice([68, 75, 100, 140, 310, 400])
    side = rng.choice(["right", "left"])
    if kinds & set(OF_THE_BATCH) and family in SHIFTED_BY_PADDING:
        side = "right"
    changes = [change for change in CHANGES if steered or not change.startswith("hook")]
    changes = [change for change in changes if change != "config" or family in TAIL_VALUES]
    places = ["block"] * 4 + ["attention", "mlp"]
    layers = [f"{rng.choice(places)} {rng.randrange(blocks)}" for _ in range(rng.randint(1, 2))]
    return Case(
        family=family,
        blocks=blocks,
        seed=rng.randrange(4),
        dtype=dtype,
        precision=rng.choice(["model", "float32", "auto"] if dtype == "bfloat16" else ["auto", "model"]),
        hooks=steered,
        lengths=tuple(lengths),
        side=side,
        extra=rng.choice([0, 0, 1, 5]),
        layers=tuple(dict.fromkeys(layers)),
        kernel=rng.choice(["auto"] * 8 + ["layerwise", "whole", "whole" if call == "full" else "loop"]),
        top_k=rng.choice([1, 3, 5]),
        positions=rng.choice(["all", "all", "last"]),
        call=call,
        change=rng.choice(["none"] * len(changes) + changes),
    )


# One number for all of a case: where hypothesis draws each part, most of its cases are slight changes of few others.
CASES = st.integers(0, 2**63).map(lambda number: a_case(Random(number)))


# -- a long run --------------------------------------------------------------------------------------------------


def kind_of(outcome: Outcome) -> str:
    """The reason without the names and numbers that differ from case to case."""
    if re.match("wrong (token_ids|log_probs|scores|matrix)", outcome.reason):
        return "wrong numbers"
    text = re.sub(r"[\w.]*\.(h|layers)\.\d+[\w.]*", "LAYER", outcome.reason)
    text = re.sub(r"\b[A-Z]\w*(ForCausalLM|LMHeadModel)\b", "MODEL", text)
    return re.sub(r"\d+(\.\d+)?(e[-+]?\d+)?", "N", text)[:160]


def simpler(case: Case) -> Iterator[Case]:
    """Cases with one thing less."""
    default = Case()
    for field in fields(Case):
        if field.name != "hooks" and getattr(case, field.name) != getattr(default, field.name):
            yield replace(case, **{field.name: getattr(default, field.name)})
    for i, hook in enumerate(case.hooks):
        yield replace(case, hooks=case.hooks[:i] + case.hooks[i + 1 :])
        for other in (replace(hook, where="block"), replace(hook, number=0), replace(hook, kind="add", at=0)):
            if other != hook and not (hook.kind == "ban" and other.where == "block"):
                yield replace(case, hooks=(*case.hooks[:i], other, *case.hooks[i + 1 :]))
    if len(case.lengths) > 1:
        for i in range(len(case.lengths)):
            yield replace(case, lengths=case.lengths[:i] + case.lengths[i + 1 :])
    for i, length in enumerate(case.lengths):
        if length > 5:
            yield replace(case, lengths=(*case.lengths[:i], max(5, length // 2), *case.lengths[i + 1 :]))
    if len(case.layers) > 1:
        yield from (replace(case, layers=(layer,)) for layer in case.layers)


def simplest(case: Case, outcome: Outcome, tries: int = 40) -> tuple[Case, Outcome]:
    """A smaller case of the same kind of fault, greedily."""
    tried = {case}
    smaller = True
    while smaller:
        smaller = False
        for other in simpler(case):
            if other in tried or tries == 0:
                continue
            tried.add(other)
            tries -= 1
            try:
                found = run(other)
            except Exception:  # a case that means nothing
                continue
            if found.kind == "fault" and kind_of(found) == kind_of(outcome):
                case, outcome, smaller = other, found, True
                break
    return case, outcome


def features(case: Case) -> str:
    """What groups wrong numbers: hooks and the change, and the family."""
    worn = ", ".join(sorted(f"{hook.kind} on {hook.where}" for hook in case.hooks)) or "no hook"
    return f"{worn}; change {case.change}; {case.call}; {case.dtype}"


class Survey:
    """What came of many cases: each kind of fault once, with a small case of it."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.faults: Counter[str] = Counter()
        self.others: dict[str, Counter[str]] = {"refused": Counter(), "unchecked": Counter()}
        self.told: list[str] = []
        self._examples: dict[str, Case] = {}
        self._group_of: dict[str, str] = {}

    def take(self, case: Case) -> None:
        """Run a case."""
        try:
            outcome = run(case)
        except Exception as error:
            outcome = Outcome("fault", f"the fuzzer itself: {one_line(error)}", traceback.format_exc(limit=-3))
        self.counts[outcome.kind] += 1
        if outcome.kind in self.others:
            self.others[outcome.kind][kind_of(outcome)] += 1
            self._examples.setdefault(kind_of(outcome), case)
        if outcome.kind != "fault":
            return
        wrong = outcome.reason.startswith("wrong")
        raw = f"{kind_of(outcome)} | {features(case)}" if wrong else kind_of(outcome)
        if raw not in self._group_of:
            small, now = simplest(case, outcome)
            group = f"{kind_of(now)} | {small.family}; {features(small)}" if wrong else raw
            self._group_of[raw] = group
            if group not in self.faults:
                self.told.append(f"FAULT {now.reason}\n  {now.detail}\n  replay({small!r})\n")
                print(self.told[-1], flush=True)
        self.faults[self._group_of[raw]] += 1

    def __str__(self) -> str:
        lines = []
        for title, found in ({"faults": self.faults} | self.others).items():
            lines.append(f"{title}:")
            for kind, count in found.most_common():
                lines.append(f"  {count:5d}  {kind}")
                if kind in self._examples:
                    lines.append(f"         {self._examples[kind]!r}")
        lines.append(
            f"{self.counts.total()} cases: {self.counts['agreed']} agreed, {self.counts['refused']} refused with a "
            f"reason, {self.counts['unchecked']} unchecked, {self.counts['fault']} faults of {len(self.faults)} kinds"
        )
        return "\n".join(lines)


def drawn(take: Callable[[Case], None], number: int, **choices: Any) -> Callable[[], None]:
    """A function that gives so many drawn cases to another."""
    options = settings(
        max_examples=number,
        deadline=None,
        database=None,
        phases=(Phase.generate,),
        suppress_health_check=list(HealthCheck),
        **choices,
    )
    return options(given(CASES)(take))


@pytest.mark.slow
def test_drawn_cases(caplog):
    caplog.set_level(logging.CRITICAL, "fisher_vmap")
    survey = Survey()

    def take(case):
        survey.take(case)

    drawn(take, 100, derandomize=True)()
    assert not survey.faults, "\n".join(survey.told)
    assert survey.counts["agreed"] >= 50, str(survey)


def long_run(minutes: float, number: int) -> int:
    """Draw cases for so many minutes, from this seed on; returns how many kinds of faults there were."""
    ends, survey = time.monotonic() + 60 * minutes, Survey()

    def take(case: Case) -> None:
        if time.monotonic() < ends:
            survey.take(case)

    while time.monotonic() < ends:
        seed(number)(drawn(take, 200))()
        number += 1
    print(survey)
    return len(survey.faults)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("fisher_vmap").setLevel(logging.CRITICAL)
    sys.exit(1 if long_run(chosen.minutes, chosen.seed) else 0)
