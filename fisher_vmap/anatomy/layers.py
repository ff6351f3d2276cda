"""Which modules of a model are its decoder blocks, and which others can be hooked: found by watching one forward pass.

A model may hold several lists of modules: towers for images and sound, experts, two stacks side by side. Its decoder
blocks are the largest list of those whose entries are called on a prompt of plain tokens and return a row for each of
them. A list inside such an entry (experts, say) is not looked at.
"""

import difflib
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fisher_vmap.anatomy.arguments import listed_layers
from fisher_vmap.anatomy.autocast import autocast_off
from fisher_vmap.anatomy.blocks import forward_inputs, output_of
from fisher_vmap.anatomy.causality import sees_ahead
from fisher_vmap.anatomy.memory import is_out_of_memory
from fisher_vmap.anatomy.placement import input_device
from fisher_vmap.anatomy.position_table import PositionTables
from fisher_vmap.anatomy.recording import hooks
from fisher_vmap.anatomy.remembered import Remembered
from fisher_vmap.anatomy.streams import Hooked, Place, place_of
from fisher_vmap.anatomy.user_hooks import hooks_off
from fisher_vmap.anatomy.wrapped_forwards import own_forwards
from fisher_vmap.errors import listed

PROMPTS, TOKENS = 5, 7  # of the forward pass that is watched: sizes that no other dimension of an output should have


class Layers(NamedTuple):
    """What can be hooked in a model.

    Attributes:
        blocks: its decoder blocks by name, in their order, those alone that are called.
        names: the names of all entries of their list, called or not: a layer's number counts these.
        places: for each module that can be hooked, where its output has prompts and positions.
        others: for each other module that is called, what it returns, in words.
        positions: the most tokens that its table of positions has room for; None: it has none, such as a rotary one.
        vocabulary: V, the number of logits.
        made_of: what the model was made of when it was looked at.
    """

    blocks: dict[str, nn.Module]
    names: list[str]
    places: dict[str, Place]
    others: dict[str, str]
    positions: int | None
    vocabulary: int
    made_of: int


_LAYERS: Remembered[Layers] = Remembered()


def layers_of(model: nn.Module) -> Layers:
    """What can be hooked in the model; looked at once, and again when its modules have changed.

    Raises:
        ValueError: the model takes no plain tokens, gives no logits, or has no list of decoder blocks.
    """
    with own_forwards(model):
        made_of = hash(tuple((name, id(module)) for name, module in model.named_modules()))
        found = _LAYERS.get(model)
        if found is None or found.made_of != made_of:
            found = _LAYERS[model] = _look(model, made_of)
    return found


def decoder_blocks(model: nn.Module) -> dict[str, nn.Module]:
    """The decoder's blocks by name, in their order."""
    return layers_of(model).blocks


def hooked(model: nn.Module, names: Sequence[str]) -> dict[str, Hooked]:
    """The modules of these names, as `resolve_layers` gives them."""
    places = layers_of(model).places
    return {name: Hooked(model.get_submodule(name), places[name]) for name in names}


def _look(model: nn.Module, made_of: int) -> Layers:
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise ValueError(f"{type(model).__name__} is an encoder-decoder; expected a decoder-only causal LM")
    training = [module for module in model.modules() if module.training]
    try:
        model.eval()
        with autocast_off(), hooks_off(model):
            places, others, positions, vocabulary = _watch(model)
            ahead = sees_ahead(model)
    finally:
        for module in training:
            module.training = True
    if ahead:
        raise ValueError(
            f"{type(model).__name__} sees later tokens from earlier ones; expected a causal LM, whose attention looks "
            "back only"
        )
    stack = _stack(model, places)
    if stack is None:
        raise ValueError(
            f"{type(model).__name__} has no list of decoder blocks, which return [B, T, D]; expected a "
            "decoder-only causal LM"
        )
    modules = dict(model.named_modules(remove_duplicate=False))
    names = [f"{stack}.{i}" for i in range(len(modules[stack]))]  # type: ignore[arg-type]
    blocks: dict[str, nn.Module] = {}
    for name in names:
        if name in places and modules[name] not in blocks.values():  # one module may stand in several places
            blocks[name] = modules[name]
    return Layers(blocks, names, places, others, positions, vocabulary, made_of)


def _watch(model: nn.Module) -> tuple[dict[str, Place], dict[str, str], int | None, int]:
    """The places of all modules that return one row a token, what the others return, the room for positions, and V.

    In one forward pass. The tokens are nothing but zeros: what is looked at is shapes.
    """
    ids = torch.zeros(PROMPTS, TOKENS, dtype=torch.int64, device=input_device(model))
    found: dict[int, Place] = {}
    returned: dict[int, str] = {}

    def look(module: nn.Module, _args: Any, output: Any) -> None:
        hidden = output_of(output)
        place = place_of(hidden.shape, PROMPTS, TOKENS) if hidden is not None else None
        if hidden is not None and hidden.is_floating_point() and place is not None:
            found[id(module)] = place
        shape = type(output).__name__ if hidden is None else tuple(hidden.shape)
        returned[id(module)] = f"{shape} for {PROMPTS} prompts of {TOKENS} tokens"

    tables = PositionTables(TOKENS)
    with torch.no_grad(), tables, hooks(*(module.register_forward_hook(look) for module in model.modules())):
        try:
            output = model(**forward_inputs(model, ids))
        except (RuntimeError, ValueError, TypeError, IndexError, AttributeError, AssertionError) as error:
            if is_out_of_memory(error):
                raise
            raise ValueError(
                f"{type(model).__name__} cannot be run on plain tokens, [B, T] ({type(error).__name__}: "
                f"{' '.join(str(error).split())[:200]}); expected a decoder-only causal LM"
            ) from error
    logits = getattr(output, "logits", None)
    if not isinstance(logits, Tensor) or logits.dim() != 3 or logits.shape[:2] != ids.shape:
        what = f"logits of shape {tuple(logits.shape)}" if isinstance(logits, Tensor) else "no logits"
        raise ValueError(
            f"{type(model).__name__} returns {what} for {PROMPTS} prompts of {TOKENS} tokens; expected [B, T, V], as a "
            "causal LM returns them (AutoModelForCausalLM)"
        )
    named = {name: id(module) for name, module in model.named_modules(remove_duplicate=False) if name}
    places = {name: found[key] for name, key in named.items() if key in found}
    others = {name: returned[key] for name, key in named.items() if key in returned and key not in found}
    return places, others, tables.room, logits.shape[-1]


def _stack(model: nn.Module, places: dict[str, Place]) -> str | None:
    """The name of the list of decoder blocks; where there is no list, of a sequence of modules of one kind."""
    for container in (nn.ModuleList, nn.Sequential):
        sizes: dict[str, int] = {}
        for name, module in model.named_modules():  # outer ones come first
            if not isinstance(module, container) or any(_inside_an_entry(name, other, places) for other in sizes):
                continue
            called = [entry for i, entry in enumerate(module) if f"{name}.{i}" in places]
            of_one_kind = len({type(entry) for entry in module}) == 1
            if called and (container is nn.ModuleList or of_one_kind):
                sizes[name] = sum(p.numel() for entry in called for p in entry.parameters())
        if sizes:
            return max(sizes, key=lambda name: sizes[name])
    return None


def _inside_an_entry(name: str, stack: str, places: dict[str, Place]) -> bool:
    if not name.startswith(stack + "."):
        return False
    return f"{stack}.{name.removeprefix(stack + '.').split('.')[0]}" in places


def resolve_layers(model: nn.Module, wanted: str | int | Sequence[str | int]) -> list[str]:
    """Names of modules for what the user wrote: a name, a number (negative from the top), a list of these, or "all".

    Raises:
        ValueError: a name or number that the model does not have (the message names the nearest and what can be
            hooked), one that is never called or returns no row a token, one given twice, or neither name nor number.
    """
    entries = listed_layers(wanted)
    found = layers_of(model)
    if entries == ["all"]:
        return list(found.blocks)
    with own_forwards(model):
        modules = dict(model.named_modules(remove_duplicate=False))
    names = found.names
    resolved: list[str] = []
    for entry in entries:
        if isinstance(entry, str) and entry.lstrip("-").isdigit():
            entry = int(entry)
        if isinstance(entry, int):
            if not -len(names) <= entry < len(names):
                raise ValueError(
                    f"layer {entry} was asked for; this model has layers 0 to {len(names) - 1} ({names[0]} ...)"
                )
            entry = names[entry]
        if entry not in modules or entry == "":
            nearest = difflib.get_close_matches(entry, modules, n=1, cutoff=0.0)[0]
            raise ValueError(
                f"the model has no module named {entry!r}; the nearest is {nearest!r}, and its {len(names)} layers are "
                f"{names[0]} to {names[-1]}; {_hookable(found)}"
            )
        if entry not in found.places:
            what = f"returns {found.others[entry]}" if entry in found.others else "is never called in the forward pass"
            raise ValueError(
                f"{entry} ({type(modules[entry]).__name__}) {what}; expected a tensor [B, T, D], or a tuple that "
                f"starts with one: {_hookable(found)}"
            )
        if entry in resolved:
            raise ValueError(f"layer {entry!r} was given twice; give each layer once")
        resolved.append(entry)
    if not resolved:
        raise ValueError("no layer was given; expected at least one name, number, or 'all'")
    return resolved


def _hookable(found: Layers) -> str:
    """What can be hooked, in words: a block's parts once, with N for the number of the block."""
    stack = found.names[0].rpartition(".")[0]
    inside = re.compile(re.escape(stack) + r"\.\d+")
    shown = list(dict.fromkeys(inside.sub(f"{stack}.N", name) for name in found.places))
    shown.sort(key=lambda name: name.count("."))  # outer ones first, those of one depth in the model's order
    return f"what can be hooked: {listed(shown, 20)} (N from 0 to {len(found.names) - 1})"
