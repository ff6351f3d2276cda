"""What is known of a model: its blocks, its head, what reaches what. Found out once, remembered as long as it lives.

Is the chain of blocks whole? An exact answer, by which tensors can be reached and not by how large they are.

The layerwise form holds where a block's output depends on the bias only through its own input. In one forward with
gradients every block's output is cut off and replaced by a leaf of its own. A later output that can reach any leaf but
the one just below it has another way to the bias: keys and values shared between blocks, a residual that skips a block.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from fisher_vmap.kernels import hf_attention
from fisher_vmap.kernels.decoder_block import (
    BlockRule,
    Forward,
    Rules,
    fused_forward,
    proven_blocks,
    rules_for,
    why_no_rule,
)
from fisher_vmap.kernels.hf_attention import attention_set_to, noting_odd_masks, prompts_packed, supports_ours
from fisher_vmap.kernels.rotary_attention import fused_attention_forward, proven_attentions
from fisher_vmap.linearize.find_head import watch
from fisher_vmap.linearize.linear_map import undisturbed
from fisher_vmap.linearize.model_info import ModelInfo, Parts, Reach
from fisher_vmap.linearize.whole import hooked_outputs, rows_from_logits
from fisher_vmap.model.cache import Remembered
from fisher_vmap.model.layers import decoder_blocks, hooked, layers_of
from fisher_vmap.model.layout import Layout, lay_out, pack_rows
from fisher_vmap.model.offload import input_device, model_dtype, saved_aside, weights_ready
from fisher_vmap.model.patches import old_functions
from fisher_vmap.model.recording import StructureChanged, forward_inputs, hooks, output_of, run_blocks, with_output
from fisher_vmap.model.validation import is_our_fault, is_out_of_memory
from fisher_vmap.model.wrappers import hook_behind, hooks_off, is_hooked, is_step


def block_reach(model: nn.Module, blocks: Mapping[str, nn.Module], input_ids: Tensor) -> Reach:
    """For each block call, and last for the logits: the numbers of the block calls whose output it can reach directly.

    Args:
        model: the causal LM.
        blocks: its decoder blocks by name.
        input_ids: [B, T] int64; a few short prompts, since structure does not depend on them.

    Returns:
        One set for each call in the order of the forward, and one for the logits. In a plain chain, entry i is {i - 1}.
    """
    leaves: list[Tensor] = []
    outputs: list[Tensor] = []

    def cut(_module: nn.Module, _args: Any, output: Any) -> Any:
        hidden = output_of(output)
        if hidden is None:
            raise StructureChanged("a block returned no tensor")
        outputs.append(hidden)
        leaves.append(hidden.detach().clone().requires_grad_())
        return with_output(output, leaves[-1].clone())  # a copy: what comes next may write into it

    with (
        torch.enable_grad(),
        saved_aside(model),
        hooks(*(block.register_forward_hook(cut) for block in blocks.values())),
    ):
        outputs.append(model(**forward_inputs(model, input_ids)).logits)
        return [_reached(output, leaves) for output in outputs]


def _reached(output: Tensor, leaves: Sequence[Tensor]) -> set[int]:
    if not output.requires_grad:
        return set()
    grads = torch.autograd.grad(output.float().sum(), leaves, retain_graph=True, allow_unused=True)
    return {i for i, grad in enumerate(grads) if grad is not None}


def chain_is_whole(reach: Reach, hooked_call: int) -> bool:
    """Whether a bias at the output of that block call travels up from block to block and no other way."""
    return all({j for j in reach[i] if j >= hooked_call} == {i - 1} for i in range(hooked_call + 1, len(reach)))


log = logging.getLogger(__name__)

STANDARD = ("eager", "sdpa", "flash", "flex", "paged")  # beginnings of the names of transformers' own attention
HOOKED_LOGITS = 2**26  # most logits of a hooked model's batch that it is watched on

# Of a configuration: what the package itself sets for a call, and what a call is given.
NOT_THE_MODEL = ("_attn_implementation", "_attn_implementation_internal", "use_cache")


MOST_KEPT = 4  # sets of hooks for which a model is remembered

Hooks = tuple[tuple[int, ...], ...]  # the hooks that may change what is known, by their handles

# By model, the dtype that it is computed in, and its hooks.
_PROBES: Remembered[dict[tuple[torch.dtype, Hooks], ModelInfo]] = Remembered()


def probe(model: nn.Module, layout: Layout) -> ModelInfo:
    """What is known of the model; found out at the first call, and again when the model has been rebuilt since.

    With other hooks than before, what a hook can change is looked at again. The rest is kept, and so is what was known
    without these hooks.
    """
    probes, dtype = _PROBES.setdefault(model, {}), model_dtype(model)
    made_of, key = signature(model), (dtype, hooks_of(model))
    for other in [other for other, info in probes.items() if other[0] == dtype and info.made_of != made_of]:
        del probes[other]
    found = probes.pop(key, None)
    if found is None:
        before = next((info for other, info in probes.items() if other[0] == dtype and not any(other[1])), None)
        found = _look(model, looked_at(model, layout), made_of, before)
    if found.finite:
        probes[key] = found  # the last one used comes last
        for other in list(probes)[:-MOST_KEPT]:
            del probes[other]
    return found


def known_of(model: nn.Module) -> ModelInfo | None:
    """What has been found out of a model in the precision that it is computed in now; None: nothing yet."""
    probes = _PROBES.get(model) or {}
    return probes.get((model_dtype(model), hooks_of(model))) if len(probes) != 1 else next(iter(probes.values()))


def signature(model: nn.Module) -> int:
    """Changes when a module or a parameter is exchanged, patched or moved; values may change freely."""
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    parts: list[object] = [getattr(config, "_attn_implementation", None), *_plain_values(text)]
    for module in model.modules():
        parts += [id(module), type(module), id(vars(module).get("forward"))]
        # A module's own numbers, such as an epsilon; whole ones may be counts of its calls.
        parts += [(name, value) for name, value in vars(module).items() if type(value) is float]
    parts += [(p.is_meta or id(p), p.dtype, p.device) for p in model.parameters()]  # put aside: another each time
    return hash(tuple(parts))


def hooks_of(model: nn.Module) -> Hooks:
    """The hooks that may change what is known of a model: all but steps that `steer` adds to a block or inside one."""
    blocks = decoder_blocks(model).values()
    inside = {id(module) for block in blocks for module in block.modules()}
    found = []
    for module in model.modules():
        for kind in (module._forward_hooks, module._forward_pre_hooks):
            found.append(tuple(key for key, hook in kind.items() if not (is_step(hook) and id(module) in inside)))
    return tuple(found)


def _plain_values(config: object) -> list[object]:
    """What a configuration says of the model's function in plain values: a soft-cap, a scale, a window."""
    plain = (bool, int, float, str, type(None))
    values = vars(config).items() if hasattr(config, "__dict__") else ()
    return [(name, value) for name, value in values if type(value) in plain and name not in NOT_THE_MODEL]


def looked_at(model: nn.Module, layout: Layout) -> Tensor:
    """The tokens, [B, T], that a model is watched on: a few, or the batch where hooks may be made for its shape."""
    if is_hooked(model) and layout.input_ids.numel() * layers_of(model).vocabulary <= HOOKED_LOGITS:
        return layout.input_ids
    return excerpt(layout, tokens=8).input_ids


def look_under_plain(model: nn.Module, known: ModelInfo, layout: Layout) -> ModelInfo | None:
    """What is known of the model under another attention than ours; None where it has been looked at under that alone.

    That is transformers' eager attention, which `torch.func` can transform; the model's own where that is of the
    user's making.
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
    why = "the model has no attention that ours could stand in for"
    if supports_ours(model):
        try:
            return _look_under(hf_attention.NAME, model, input_ids, made_of, "", before)
        except Exception as reason:  # a hook of the user may raise anything
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
        why = f"{behind} cannot be run on other prompts than its own ({type(reason).__name__})"
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
    """What is known under an attention; `before` is what was known without hooks."""
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
    """The attention modules, and the whole blocks, that have a pullback by hand, proven on these tokens end to end.

    Returns:
        The attention modules' forwards, the blocks' rules, and for each other block why it has none.
    """
    inside = {id(module): module for block in parts.blocks.values() for module in block.modules()}
    forwards = {m: forward for m in inside.values() if (forward := fused_attention_forward(m)) is not None}
    candidates: dict[nn.Module, list[BlockRule]] = {}
    for block in parts.blocks.values():
        with weights_ready(block):
            candidates[block] = list(rules_for(block))
    packed = pack_rows(lay_out(input_ids, None))
    try:
        with torch.no_grad(), prompts_packed(packed):

            def run() -> object:
                return run_blocks(model, parts.blocks, parts.call_order, packed)

            attentions, rules = list(proven_attentions(forwards, run).items()), proven_blocks(candidates, run)
    except Exception as reason:  # then nothing will be packed either; a hook of the user may raise anything
        if is_out_of_memory(reason) or is_our_fault(reason):
            raise
        log.info("no attention is pulled back by hand: %s", reason)
        return [], {}, dict.fromkeys(parts.blocks, f"it does not run on packed prompts ({type(reason).__name__})")
    unlike = "it returns something else than a norm, rotary attention and gated MLP do"
    no_rule = {
        name: unlike if candidates[block] else why_no_rule(block)
        for name, block in parts.blocks.items()
        if block not in rules
    }
    return attentions, rules, no_rule


def layer_widths(model: nn.Module, layers: Sequence[str], precision: str = "model") -> dict[str, int]:
    """D of each hooked module, by running the model on two tokens.

    Raises:
        ValueError: a module's output is not [B, T, D], or it is not called.
    """
    layout = lay_out(torch.zeros(1, 2, dtype=torch.int64, device=input_device(model)), None)
    with torch.no_grad(), undisturbed(model, precision), hooks_off(model):
        outputs = hooked_outputs(rows_from_logits(model, layout, gather=False), hooked(model, layers), layout)
    return {layer: hidden.shape[-1] for layer, hidden in outputs.items()}


def excerpt(layout: Layout, tokens: int) -> Layout:
    """Two short prompts of unequal length out of a batch: its shortest and its longest, cut to a few tokens."""
    order = sorted(layout.ranges(), key=lambda r: r[0] - r[1])
    longest, shortest = (layout.input_ids.flatten()[a : min(z, a + tokens)] for a, z in (order[0], order[-1]))
    if len(shortest) == len(longest) and len(shortest) > 1:
        shortest = shortest[: (len(shortest) + 1) // 2]
    mask = torch.zeros(2, len(longest), dtype=torch.int64, device=longest.device)
    mask[0], mask[1, : len(shortest)] = 1, 1
    return lay_out(torch.stack([longest, torch.nn.functional.pad(shortest, (0, len(longest) - len(shortest)))]), mask)
