"""Finds out what is known of a model (its blocks, its head, their dependencies) once, and keeps it with the model.

Is the chain of blocks whole? The layerwise form is right if a block's output depends on the bias only through the
block's own input. To test that, one forward with gradients detaches every block's output and replaces it by a leaf. If
a later output can reach a leaf other than the one just below it, there is another path to the bias: keys and values
shared between blocks, or a residual that skips a block. The answer is exact, because it depends on which tensors can be
reached and not on the size of a gradient.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from fisher_vmap.kernels import hf_attention
from fisher_vmap.kernels.compose import rules_of
from fisher_vmap.kernels.decoder_block import Forward, Rules, fused_forward
from fisher_vmap.kernels.hf_attention import attention_set_to, noting_odd_masks, prompts_packed, supports_ours
from fisher_vmap.kernels.rotary_attention import fused_attention_forward, proven_attentions
from fisher_vmap.linearize.find_head import watch
from fisher_vmap.linearize.linear_map import undisturbed
from fisher_vmap.linearize.model_info import ModelInfo, Parts, Reach
from fisher_vmap.linearize.whole import hooked_outputs, rows_from_logits
from fisher_vmap.model.layers import decoder_blocks, hooked, layers_of
from fisher_vmap.model.layout import Layout, lay_out, pack_rows
from fisher_vmap.model.offload import input_device, model_dtype, small_graph, weights_ready
from fisher_vmap.model.patches import Remembered, old_functions
from fisher_vmap.model.recording import StructureChanged, forward_inputs, hooks, output_of, run_blocks, with_output
from fisher_vmap.model.validation import is_our_fault, is_out_of_memory
from fisher_vmap.model.wrappers import hook_behind, hooks_off, is_hooked, is_step

log = logging.getLogger(__name__)

STANDARD = ("eager", "sdpa", "flash", "flex", "paged")  # prefixes of the names of transformers' own attention
HOOKED_LOGITS = 2**26  # a hooked model is watched on its whole batch up to this many logits
# Configuration entries that are set by this package or for a single call.
NOT_THE_MODEL = ("_attn_implementation", "_attn_implementation_internal", "use_cache")
MOST_KEPT = 4  # sets of hooks for which findings are kept

Hooks = tuple[int, ...]  # the handles of the hooks that may change what is known

# By model, the dtype that it is computed in, and its hooks.
_PROBES: Remembered[dict[tuple[torch.dtype, Hooks], ModelInfo]] = Remembered()


def block_reach(model: nn.Module, blocks: Mapping[str, nn.Module], input_ids: Tensor) -> Reach:
    """For each block call, and last for the logits: the numbers of the block calls whose output it can reach directly.

    Structure does not depend on the tokens, [B, T], so a few short prompts will do. In a plain chain, entry i is
    {i - 1}.
    """
    leaves: list[Tensor] = []
    outputs: list[Tensor] = []

    def cut(_module: nn.Module, _args: Any, output: Any) -> Any:
        hidden = output_of(output)
        if hidden is None:
            raise StructureChanged("a block returned no tensor")
        outputs.append(hidden)
        leaves.append(hidden.detach().clone().requires_grad_())
        return with_output(output, leaves[-1].clone())  # a copy, because the next module may write into it

    with (
        torch.enable_grad(),
        small_graph(model),
        hooks(*(block.register_forward_hook(cut) for block in blocks.values())),
    ):
        outputs.append(model(**forward_inputs(model, input_ids)).logits)
        reach: Reach = []
        for output in outputs:
            if not output.requires_grad:
                reach.append(set())
                continue
            grads = torch.autograd.grad(output.float().sum(), leaves, retain_graph=True, allow_unused=True)
            reach.append({i for i, grad in enumerate(grads) if grad is not None})
    return reach


def chain_is_whole(reach: Reach, hooked_call: int) -> bool:
    """Whether a bias at the output of that block call reaches the logits only from block to block."""
    return all({j for j in reach[i] if j >= hooked_call} == {i - 1} for i in range(hooked_call + 1, len(reach)))


def probe(model: nn.Module, layout: Layout) -> ModelInfo:
    """What is known of the model; found at the first call, and again after the model has been changed.

    With other hooks than before, only what a hook can change is found again. Findings are kept for each set of hooks.
    """
    probes, dtype = _PROBES.setdefault(model, {}), model_dtype(model)
    made_of, key = signature(model), (dtype, hooks_of(model))
    for other in [other for other, info in probes.items() if other[0] == dtype and info.made_of != made_of]:
        del probes[other]
    found = probes.pop(key, None)
    if found is None:
        before = next((info for other, info in probes.items() if other[0] == dtype and not other[1]), None)
        found = _look(model, looked_at(model, layout), made_of, before)
    if found.finite:
        probes[key] = found  # the last one used comes last
        for other in list(probes)[:-MOST_KEPT]:
            del probes[other]
    return found


def known_of(model: nn.Module) -> ModelInfo | None:
    """What is known of a model in the precision that it is computed in now; None: nothing yet."""
    key = model_dtype(model), hooks_of(model)
    probes = {other: info for other, info in (_PROBES.get(model) or {}).items() if other[1] == key[1]}
    return probes.get(key) if len(probes) != 1 else next(iter(probes.values()))


def signature(model: nn.Module) -> int:
    """A hash that changes when a module or parameter is replaced, patched or moved, but not with parameter values."""
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    parts: list[object] = [getattr(config, "_attn_implementation", None), *_plain_values(text)]
    for module in model.modules():
        parts += [id(module), type(module), id(vars(module).get("forward"))]
        # A module's own floats, such as an epsilon; its integers may count calls.
        parts += [(name, value) for name, value in vars(module).items() if type(value) is float]
    parts += [(p.is_meta or id(p), p.dtype, p.device) for p in model.parameters()]  # offloaded: a new object each time
    return hash(tuple(parts))


def hooks_of(model: nn.Module) -> Hooks:
    """The hooks that may change what is known of a model: all except those of `steer` at or inside a block."""
    hooked = [m for m in model.modules() if m._forward_hooks or m._forward_pre_hooks]
    if not hooked:
        return ()
    inside = {id(module) for block in decoder_blocks(model).values() for module in block.modules()}
    keys: list[int] = []
    for module in hooked:
        for kind in (module._forward_hooks, module._forward_pre_hooks):
            keys += [key for key, hook in kind.items() if not (is_step(hook) and id(module) in inside)]
    return tuple(keys)


def _plain_values(config: object) -> list[object]:
    """The plain values of a configuration that affect the model's function: a soft-cap, a scale, a window."""
    plain = (bool, int, float, str, type(None))
    values = vars(config).items() if hasattr(config, "__dict__") else ()
    return [(name, value) for name, value in values if type(value) in plain and name not in NOT_THE_MODEL]


def looked_at(model: nn.Module, layout: Layout) -> Tensor:
    """The tokens, [B, T], on which to watch a model: a few, or the whole batch if user's hooks may expect its shape."""
    if is_hooked(model) and layout.input_ids.numel() * layers_of(model).vocabulary <= HOOKED_LOGITS:
        return layout.input_ids
    return excerpt(layout, tokens=8).input_ids


def look_under_plain(model: nn.Module, known: ModelInfo, layout: Layout) -> ModelInfo | None:
    """What is known of the model under an attention other than ours; None if `known` is that already.

    It is transformers' eager attention, which `torch.func` can transform, or the model's own if a user made it.
    """
    if known.attention != hf_attention.NAME:
        return None
    if known.plain is None:
        input_ids = looked_at(model, layout)
        why = "not under our attention"
        known.plain = _look_under(_plain_attention(model), model, input_ids, known.made_of, why)
    return known.plain


def _plain_attention(model: nn.Module) -> str | None:
    current = getattr(getattr(model, "config", None), "_attn_implementation", None)
    return "eager" if isinstance(current, str) and current.startswith(STANDARD) else None


def _look(model: nn.Module, input_ids: Tensor, made_of: int, before: ModelInfo | None) -> ModelInfo:
    why = "the model has no attention that ours can replace"
    if supports_ours(model):
        try:
            return _look_under(hf_attention.NAME, model, input_ids, made_of, "", before)
        except Exception as reason:  # a user's hook may raise anything
            if is_out_of_memory(reason) or is_our_fault(reason):
                raise
            log.info("attention: eager, because %s", reason)
            why = " ".join(str(reason).split())[:120] or type(reason).__name__
    try:
        return _look_under(_plain_attention(model), model, input_ids, made_of, why)
    except Exception as reason:
        if is_out_of_memory(reason) or is_our_fault(reason) or not is_hooked(model):
            raise
        behind = hook_behind(model, reason) or "a hook"
        why = f"{behind} does not run on prompts other than its own ({type(reason).__name__})"
        with hooks_off(model):
            found = _look_under(_plain_attention(model), model, input_ids, made_of, why)
        found.parts, found.why_no_head = replace(found.parts, head=None, gather=False), why
        return found


def _look_under(
    attention: str | None,
    model: nn.Module,
    input_ids: Tensor,
    made_of: int,
    why_not_ours: str,
    before: ModelInfo | None = None,
) -> ModelInfo:
    """What is found under an attention; `before` is what is known of the model without hooks."""
    blocks = decoder_blocks(model)
    with attention_set_to(model, attention), noting_odd_masks() as odd:
        watched = watch(model, blocks, input_ids)
    why_not_packed = why_not_ours or (odd[0] if odd else "")
    parts = Parts(
        blocks=blocks,
        call_order=tuple(watched.call_order),
        head=watched.head,
        vocabulary=watched.vocabulary,
        why_not_packed=why_not_packed,
        gather=watched.gather,
        above=watched.above,
        fused=_fused(blocks),
        rules={},
        old_functions=old_functions(model),
    )
    if not why_not_packed:
        if before is not None and before.attention == attention and not before.parts.why_not_packed:
            parts = replace(parts, fused=before.parts.fused, rules=before.parts.rules, no_rule=before.parts.no_rule)
        else:
            with attention_set_to(model, attention):
                attentions, rules, no_rule = _proven_packed(model, parts, input_ids)
            parts = replace(parts, fused=[*parts.fused, *attentions], rules=rules, no_rule=no_rule)
    reach: Reach = []
    why_no_head = watched.why_not
    try:
        with attention_set_to(model, attention):
            reach = block_reach(model, blocks, input_ids)
    except (RuntimeError, TypeError, StructureChanged) as reason:
        if is_out_of_memory(reason) or is_our_fault(reason) or attention == hf_attention.NAME:
            raise
        why_no_head = f"the chain of blocks cannot be proven whole ({type(reason).__name__}: {str(reason)[:80]})"
        parts = replace(parts, head=None)
    return ModelInfo(parts, reach, attention, why_no_head, made_of, watched.finite)


def _fused(blocks: Mapping[str, nn.Module]) -> list[tuple[nn.Module, Forward]]:
    """The modules inside the blocks that have a fused pullback."""
    found: dict[int, tuple[nn.Module, Forward]] = {}
    for block in blocks.values():
        with weights_ready(block):
            for module in block.modules():
                if id(module) not in found and (forward := fused_forward(module)) is not None:
                    found[id(module)] = module, forward
    return list(found.values())


def _proven_packed(
    model: nn.Module, parts: Parts, input_ids: Tensor
) -> tuple[list[tuple[nn.Module, Forward]], Rules, dict[str, str]]:
    """The forwards of fused attention modules, the rules of blocks, and why the other blocks have none.

    All are proven on these tokens, packed.
    """
    inside = {id(module): module for block in parts.blocks.values() for module in block.modules()}
    forwards = {m: forward for m in inside.values() if (forward := fused_attention_forward(m)) is not None}
    packed = pack_rows(lay_out(input_ids, None))
    try:
        with torch.no_grad(), prompts_packed(packed):

            def run() -> object:
                return run_blocks(model, parts.blocks, parts.call_order, packed)

            attentions = list(proven_attentions(forwards, run).items())
            rules, no_rule = rules_of(parts.blocks, run)
    except Exception as reason:  # a user's hook may raise anything; prompts will not be packed either
        if is_out_of_memory(reason) or is_our_fault(reason):
            raise
        log.info("no attention and no block is pulled back by a rule: %s", reason)
        return [], {}, dict.fromkeys(parts.blocks, f"it does not run on packed prompts ({type(reason).__name__})")
    return attentions, rules, no_rule


def layer_widths(model: nn.Module, layers: Sequence[str], precision: str = "model") -> dict[str, int]:
    """D of each hooked module, from a run on two tokens.

    Raises:
        ValueError: a module's output is not [B, T, D], or it is not called.
    """
    layout = lay_out(torch.zeros(1, 2, dtype=torch.int64, device=input_device(model)), None)
    with torch.no_grad(), undisturbed(model, precision), hooks_off(model):
        outputs = hooked_outputs(rows_from_logits(model, layout, gather=False), hooked(model, layers), layout)
    return {layer: hidden.shape[-1] for layer, hidden in outputs.items()}


def excerpt(layout: Layout, tokens: int) -> Layout:
    """The shortest and the longest prompt of a batch, cut to at most `tokens` tokens and to unequal lengths."""
    order = sorted(layout.ranges(), key=lambda r: r[0] - r[1])
    longest, shortest = (layout.input_ids.flatten()[a : min(z, a + tokens)] for a, z in (order[0], order[-1]))
    if len(shortest) == len(longest) and len(shortest) > 1:
        shortest = shortest[: (len(shortest) + 1) // 2]
    mask = torch.zeros(2, len(longest), dtype=torch.int64, device=longest.device)
    mask[0], mask[1, : len(shortest)] = 1, 1
    return lay_out(torch.stack([longest, torch.nn.functional.pad(shortest, (0, len(longest) - len(shortest)))]), mask)
