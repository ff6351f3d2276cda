"""Finds a model's decoder blocks, and the other modules that can be hooked, by watching one forward pass.

A model may hold several lists of modules: towers for images and sound, experts, parallel stacks. Its decoder blocks are
the largest list whose entries are called on a prompt of plain tokens and return a row for each of them. Lists inside
such an entry (experts, for example) do not count.

The output of a module is nearly always [B, T, D]. Some models carry several residual streams, [S, B, T, D] or
[B, T, S, D]: the bias, one vector of width D for each prompt and position, is then added to each of the S (`Place`).

The whole package relies on causality: the results at a token must not depend on tokens to its right (`sees_ahead`).
"""

import difflib
import re
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fisher_vmap.errors import listed
from fisher_vmap.model.offload import input_device, small_graph
from fisher_vmap.model.patches import Remembered, autocast_off, own_forwards
from fisher_vmap.model.recording import forward_inputs, hooks, output_of
from fisher_vmap.model.validation import PositionTables, in_float64, is_out_of_memory, listed_layers
from fisher_vmap.model.wrappers import hooks_off

PROMPTS, TOKENS = 5, 7  # of the watched forward pass: sizes that no other dimension of an output should have


class Place(NamedTuple):
    """Which dimensions of a tensor are B and T; its last dimension is D."""

    prompts: int
    positions: int
    dims: int

    @property
    def plain(self) -> bool:
        """Whether it is [B, T, D]."""
        return self == (0, 1, 3)

    def fits(self, shape: torch.Size, B: int, T: int) -> bool:
        """Whether a tensor of this shape has B prompts and T positions there."""
        return len(shape) == self.dims and shape[self.prompts] == B and shape[self.positions] == T

    def spread(self, x_BTD: Tensor) -> Tensor:
        """[B, T, D] in the order of this tensor, its other dimensions 1."""
        if self.plain:
            return x_BTD
        shape = [1] * self.dims
        shape[self.prompts], shape[self.positions], shape[-1] = x_BTD.shape
        return (x_BTD if self.prompts < self.positions else x_BTD.transpose(0, 1)).reshape(shape)

    def gathered(self, x: Tensor) -> Tensor:
        """[B, T, D], or [B, T, S, D] with all other dimensions in S."""
        if self.plain:
            return x
        x = x.movedim((self.prompts, self.positions), (0, 1))
        return x if x.dim() == 3 else x.flatten(2, -2)


class Hooked(NamedTuple):
    """A module whose output a bias is added to, and where that output has prompts and positions."""

    module: nn.Module
    place: Place


def place_of(shape: torch.Size, B: int, T: int) -> Place | None:
    """Where an output of this shape has B prompts and T positions; None if there are none or this is ambiguous."""
    dims = range(len(shape) - 1)
    found = [Place(b, t, len(shape)) for b in dims for t in dims if b != t and shape[b] == B and shape[t] == T]
    if len(found) != 1 or shape[-1] == T:  # attention weights, [B, H, T, T], have no width D
        return None
    return found[0]


def block_numbers(blocks: Iterable[str], layers: Iterable[str]) -> list[int]:
    """For each layer, by name, the number of the block that it is or is in; -1: in none, and so below all of them."""
    names = list(blocks)
    return [next((i for i, name in enumerate(names) if f"{layer}.".startswith(f"{name}.")), -1) for layer in layers]


def sees_ahead(model: Any) -> bool:
    """Whether the first token's logits depend on later tokens.

    Decided by the gradient with respect to the embedded tokens, which is exactly zero if there is no path, however weak
    a path may be. For a model without a gradient there, decided by changing the later tokens.
    """
    embedding: Any = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
    ids = torch.arange(1, TOKENS + 1, device=input_device(model))[None]
    ids %= getattr(embedding, "num_embeddings", TOKENS + 1)
    embedded: list[Tensor] = []

    def cut(_module: nn.Module, _args: Any, output: Any) -> Any:
        if embedded or not isinstance(output, Tensor) or place_of(output.shape, 1, TOKENS) is None:
            return output
        embedded.append(output.detach().requires_grad_())
        return embedded[0].clone()  # a copy, because the next module may write into it

    if isinstance(embedding, nn.Module):
        with torch.enable_grad(), small_graph(model), hooks(embedding.register_forward_hook(cut)):
            gradient = _gradient(model, ids, embedded)
        if gradient is not None:
            place = place_of(gradient.shape, 1, TOKENS)
            assert place is not None
            return bool((place.gathered(gradient)[0, 1:].abs() > 0).any())  # false for NaN, which proves no path
    with torch.no_grad():
        changed = torch.cat([ids[:, :1], ids[:, 1:].flip(1)], 1)
        one, other = (model(**forward_inputs(model, x)).logits[0, 0] for x in (ids, changed))
        dtype, one, other = one.dtype, in_float64(one), in_float64(other)
    return bool((one - other).norm() > 64 * torch.finfo(dtype).eps * one.norm())


def _gradient(model: Any, ids: Tensor, embedded: list[Tensor]) -> Tensor | None:
    """The gradient of the first token's logits with respect to the embedded tokens; None if it cannot be computed."""
    try:
        first = model(**forward_inputs(model, ids)).logits[0, 0]
        if not embedded or not first.requires_grad:
            return None
        return torch.autograd.grad(first.float().square().sum(), embedded[0], allow_unused=True)[0]
    except (RuntimeError, NotImplementedError, AssertionError) as error:
        if is_out_of_memory(error):
            raise
        return None  # a model that cannot be differentiated is reported later, for its hooked layer


class Layers(NamedTuple):
    """The modules of a model that can be hooked.

    Attributes:
        blocks: the decoder blocks that are called, by name, in their order.
        names: the names of all entries of their list, called or not; layer numbers count these.
        places: for each module that can be hooked, where its output has prompts and positions.
        others: for each other module that is called, what it returns, in words.
        positions: how many tokens its table of positions has rows for; None: it has no table (rotary, for example).
        vocabulary: V, the number of logits.
        made_of: a hash of the model's modules when it was watched.
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
    """The modules that can be hooked; found once, and again after the model's modules have changed.

    Raises:
        ValueError: the model does not run on plain tokens, returns no logits, or has no list of decoder blocks.
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
            f"{type(model).__name__} sees later tokens from earlier ones; expected a causal LM, whose attention only "
            "looks back"
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
        if name in places and modules[name] not in blocks.values():  # one module may have several names
            blocks[name] = modules[name]
    return Layers(blocks, names, places, others, positions, vocabulary, made_of)


def _watch(model: nn.Module) -> tuple[dict[str, Place], dict[str, str], int | None, int]:
    """`places`, `others`, `positions` and `vocabulary` of `Layers`, from one forward pass.

    Only shapes matter, so all tokens are 0.
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
    """The name of the list of decoder blocks, or else of an `nn.Sequential` of modules of one class."""
    for container in (nn.ModuleList, nn.Sequential):
        sizes: dict[str, int] = {}
        for name, module in model.named_modules():  # outer modules come first
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
    """Names of modules from the user's names and numbers (negative counts from the top), a list of these, or "all".

    Raises:
        ValueError: a name or number that the model does not have (the message names the nearest and what can be
            hooked), one that is never called or does not return a row for each token, one given twice, or an entry
            that is neither a name nor a number.
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
    """What can be hooked, in words: the parts of a block once, with N for the number of the block."""
    stack = found.names[0].rpartition(".")[0]
    inside = re.compile(re.escape(stack) + r"\.\d+")
    shown = list(dict.fromkeys(inside.sub(f"{stack}.N", name) for name in found.places))
    root = stack.partition(".")[0]
    # Blocks first, then outer modules; those outside the decoder, such as the unembedding, last. The sort is stable.
    shown.sort(key=lambda name: (name != f"{stack}.N", name.partition(".")[0] != root, name.count(".")))
    return f"what can be hooked: {listed(shown, 20)} (N from 0 to {len(found.names) - 1})"
