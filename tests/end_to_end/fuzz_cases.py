"""What a fuzzed call is made of: a tiny model, a user's hooks on it, a batch of prompts, a change between two calls.

A case is one frozen record, whose repr can be pasted into `replay(Case(...))` of test_fuzz.py.
"""

import types
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
import transformers
from architectures import config_of, spread_out
from models import BLOCKS, FAMILIES, VOCABULARY, WIDTH, draw, padded, prompts
from torch import Tensor, nn

SINKS = 4  # of the registered attention: keys that every query sees, beside those of its window


class _Short:
    """A repr of what is not as by default alone."""

    def __repr__(self) -> str:
        told = [f"{f.name}={getattr(self, f.name)!r}" for f in fields(self) if getattr(self, f.name) != f.default]
        return f"{type(self).__name__}({', '.join(told)})"


@dataclass(frozen=True, repr=False)
class Hook(_Short):
    """A user's hook.

    Attributes:
        where: "block", "attention", "mlp", "final_norm" or "unembedding".
        number: of the block.
        kind: what it does: `_Steer.changed` has them.
        at: a position, a length or a token.
    """

    where: str = "block"
    number: int = 0
    kind: str = "add"
    at: int = 0


@dataclass(frozen=True, repr=False)
class Case(_Short):
    """One model, and one call of it, or two with a change between them.

    Attributes:
        family: one of `MAKES`.
        blocks: how many.
        seed: of weights, tokens and vectors.
        dtype: of the model.
        precision: as for fisher_scores.
        hooks: the user's.
        lengths: of the prompts.
        side: of the padding.
        extra: columns of padding beyond the longest prompt.
        layers: "block 1", "attention 0", "mlp 2": what is hooked by the package.
        kernel, top_k, positions: as for fisher_scores.
        call: "scores" (fisher_scores), "full" (fisher_full, exact) or "numbers" (FisherModel.numbers).
        change: what happens before a second call; "none": there is no second one.
    """

    family: str = "llama"
    blocks: int = 2
    seed: int = 0
    dtype: str = "float64"
    precision: str = "auto"
    hooks: tuple[Hook, ...] = ()
    lengths: tuple[int, ...] = (5,)
    side: str = "right"
    extra: int = 0
    layers: tuple[str, ...] = ("block 0",)
    kernel: str = "auto"
    top_k: int = 3
    positions: str = "all"
    call: str = "scores"
    change: str = "none"


class Make(NamedTuple):
    """How a family is built, and what its parts are called; {} stands for a block's number."""

    config: str
    arguments: Mapping[str, Any]
    block: str = "model.layers.{}"
    attention: str = "self_attn"
    mlp: str = "mlp"
    final_norm: str = "model.norm"


_LLAMA = {**FAMILIES["llama"][1], "max_position_embeddings": 512}
_NO_HEAD_DIM = {k: v for k, v in _LLAMA.items() if k != "head_dim"}
_WIDE = {"max_position_embeddings": 512}
_CAPS = {"final_logit_softcapping": 3.0, "attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 6}
_EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 24}
_GPT_NAMES = ("transformer.h.{}", "self_attention", "mlp", "transformer.ln_f")

MAKES: dict[str, Make] = {
    "llama": Make("LlamaConfig", _LLAMA),
    "llama_sinks": Make("LlamaConfig", {**_LLAMA, "attn_implementation": "fuzz_sinks_6"}),
    "llama_far_sinks": Make("LlamaConfig", {**_LLAMA, "attn_implementation": "fuzz_sinks_80"}),
    "gpt2": Make("GPT2Config", {**FAMILIES["gpt2"][1], "n_positions": 512}, "transformer.h.{}", "attn", "mlp",
                 "transformer.ln_f"),
    "gpt_neox": Make("GPTNeoXConfig", {**FAMILIES["gpt_neox"][1], **_WIDE}, "gpt_neox.layers.{}", "attention", "mlp",
                     "gpt_neox.final_layer_norm"),
    "opt": Make("OPTConfig", {**FAMILIES["opt"][1], **_WIDE}, "model.decoder.layers.{}", "self_attn", "self_attn",
                "model.decoder.final_layer_norm"),
    "mistral": Make("MistralConfig", {**_LLAMA, "sliding_window": 5}),
    "mistral_far": Make("MistralConfig", {**_LLAMA, "sliding_window": 80}),
    "gemma2": Make("Gemma2Config", {**_LLAMA, **_CAPS, "sliding_window": 5}),
    "gemma3": Make("Gemma3TextConfig", {**_LLAMA, "sliding_window": 5, "query_pre_attn_scalar": 6,
                                        "sliding_window_pattern": 2}),
    "granite": Make("GraniteConfig", {**FAMILIES["granite"][1], **_WIDE}),
    "cohere": Make("CohereConfig", {**_NO_HEAD_DIM, "logit_scale": 0.25}),
    "phi": Make("PhiConfig", {**FAMILIES["phi"][1], **_WIDE}, final_norm="model.final_layernorm"),
    "qwen2": Make("Qwen2Config", _NO_HEAD_DIM),
    "qwen3": Make("Qwen3Config", _LLAMA),
    "olmo2": Make("Olmo2Config", _NO_HEAD_DIM),
    "bloom": Make("BloomConfig", {"vocab_size": VOCABULARY, "hidden_size": WIDTH, "n_layer": BLOCKS, "n_head": 6},
                  *_GPT_NAMES),
    "falcon": Make("FalconConfig", {"vocab_size": VOCABULARY, "hidden_size": WIDTH, "num_hidden_layers": BLOCKS,
                                    "num_attention_heads": 6, "alibi": True, "max_position_embeddings": 512},
                   *_GPT_NAMES),
    "mixtral": Make("MixtralConfig", {**_LLAMA, "intermediate_size": 64, "num_local_experts": 4,
                                      "num_experts_per_tok": 2}),
    "qwen2_moe": Make("Qwen2MoeConfig", {**_NO_HEAD_DIM, **_EXPERTS, "num_experts": 4}),
    "mamba": Make("MambaConfig", {"vocab_size": VOCABULARY, "hidden_size": WIDTH, "num_hidden_layers": BLOCKS,
                                  "state_size": 4, "time_step_rank": 3}, "backbone.layers.{}", "mixer", "mixer",
                  "backbone.norm_f"),
    "llama4": Make("", {"attention_chunk_size": 6, "floor_scale": 2, "attn_scale": 0.5, "num_local_experts": 3,
                        "no_rope_layer_interval": 2, **_WIDE}, mlp="feed_forward"),
}  # fmt: skip
EXPERTS = ("mixtral", "qwen2_moe", "llama4")
# What a batch's left padding shifts where a plain call says no positions: learned ones, chunks, the first keys.
SHIFTED_BY_PADDING = ("gpt2", "llama4", "llama_sinks", "llama_far_sinks")
# A value that what follows the blocks reads at each call.
TAIL_VALUES = {"gemma2": ("final_logit_softcapping", 1.5), "cohere": ("logit_scale", 0.1)} | {
    "granite": ("logits_scaling", 0.7),
    "mistral": ("sliding_window", 3),
}
# What only means something in the batch that it was made for, as the caller pads it.
OF_THE_BATCH = ("stored", "per_prompt")


def _sinks(window: int) -> Any:
    def attend(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
    ) -> tuple[Tensor, None]:
        groups, T, S = query.shape[1] // key.shape[1], query.shape[2], key.shape[2]
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        scores = query @ key.mT * (kwargs.get("scaling") or query.shape[-1] ** -0.5)
        i, j = torch.arange(S - T, S)[:, None], torch.arange(S)
        seen = (j <= i) & ((j > i - window) | (j < SINKS))
        if attention_mask is not None and attention_mask.dtype == torch.bool:
            seen = (seen & attention_mask) | (i == j)
        elif attention_mask is not None:
            scores = scores + attention_mask
        weights = scores.masked_fill(~seen, torch.finfo(scores.dtype).min).softmax(-1)
        return (weights @ value).transpose(1, 2).contiguous(), None

    return attend


for _window in (6, 80):
    transformers.AttentionInterface.register(f"fuzz_sinks_{_window}", _sinks(_window))
    transformers.AttentionMaskInterface.register(
        f"fuzz_sinks_{_window}", transformers.masking_utils.ALL_MASK_ATTENTION_FUNCTIONS["sdpa"]
    )


@cache
def _weights(family: str, blocks: int, seed: int) -> dict[str, Tensor]:
    return spread_out(draw(_skeleton(family, blocks), seed)).state_dict()


def _skeleton(family: str, blocks: int) -> nn.Module:
    make = MAKES[family]
    depth = {"n_layer" if "n_layer" in make.arguments else "num_hidden_layers": blocks}
    if family == "llama4":
        base = config_of("llama4_text").to_dict() | {"layer_types": None, "no_rope_layers": None, "moe_layers": None}
        config = transformers.Llama4TextConfig.from_dict(base | dict(make.arguments) | depth)
    else:
        config = getattr(transformers, make.config)(**{**make.arguments, **depth})
    return transformers.AutoModelForCausalLM.from_config(
        config, attn_implementation=make.arguments.get("attn_implementation")
    ).eval()


def build(case: Case) -> nn.Module:
    """The model of a case, as an object of its own, in evaluation mode."""
    torch.manual_seed(case.seed)
    model = _skeleton(case.family, case.blocks)
    model.load_state_dict(_weights(case.family, case.blocks, case.seed))
    if case.family in EXPERTS and case.dtype == "float64":
        model.set_experts_implementation("eager")  # the grouped product knows no float64
    return model.to(getattr(torch, case.dtype))


def module_name(case: Case, model: nn.Module, where: str, number: int) -> str:
    """What a part of the model is called."""
    make = MAKES[case.family]
    if where == "unembedding":
        unembedding = model.get_output_embeddings()
        return next(name for name, module in model.named_modules() if module is unembedding)
    if where == "final_norm":
        return make.final_norm
    block = make.block.format(number % case.blocks)
    return block if where == "block" else f"{block}.{getattr(make, where)}"


def layer_names(case: Case, model: nn.Module) -> list[str]:
    """The modules that the package hooks."""
    parts = [layer.split() for layer in case.layers]
    return list(dict.fromkeys(module_name(case, model, where, int(number)) for where, number in parts))


class Batch(NamedTuple):
    """Prompts, and how the caller pads them."""

    rows: list[Tensor]
    ids: Tensor
    mask: Tensor | None


def batch_of(case: Case, second: bool) -> Batch:
    """The prompts of the first call or of the second."""
    lengths = case.lengths
    if case.change == "longer" and not second:
        lengths = tuple(min(length, 1 + length % 4) for length in lengths)
    rows = prompts(lengths, seed=2 * case.seed + second)
    ids, mask = padded(
        rows, "right" if case.call == "numbers" else case.side, 0 if case.call == "numbers" else case.extra
    )
    return Batch(rows, ids, None if bool(mask.all()) else mask)


class Steer:
    """A hook of a user's, whose vectors are drawn once, for the width that it meets.

    Attributes:
        strength: what its vectors are multiplied by.
        shape: [B, T] of the batch that its stored activations are of.
    """

    def __init__(self, case: Case, index: int) -> None:
        self.case, self.hook, self.index = case, case.hooks[index], index
        self.strength, self.shape = 1.0, (1, 1)
        self.handle: Any = None
        self.seen: Tensor | None = None  # what it has read

    def put_on(self, module: nn.Module) -> None:
        if self.hook.kind == "scale_input":
            self.handle = module.register_forward_pre_hook(self.scaled, with_kwargs=True)
        else:
            self.handle = module.register_forward_hook(self)

    def drawn(self, out: Tensor, *shape: int) -> Tensor:
        """A tensor [*shape, D] of this hook's, the same each time."""
        # numpy's: torch's random operations are not allowed under vmap, where a user's vector is simply there
        noise = np.random.default_rng(1000 * self.case.seed + self.index).standard_normal((*shape, out.shape[-1]))
        return torch.from_numpy(self.strength * noise).to(out.dtype)

    def scaled(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        factor = 1 + 0.5 * self.strength
        if args:
            return (args[0] * factor, *args[1:]), kwargs
        return args, kwargs | {"hidden_states": kwargs["hidden_states"] * factor}

    def __call__(self, _module: nn.Module, _args: Any, output: Any) -> Any:
        out = output if isinstance(output, Tensor) else output[0]
        changed = self.changed(out)
        return changed if changed is None or isinstance(output, Tensor) else (changed, *output[1:])

    def changed(self, out: Tensor) -> Tensor | None:
        """[B, T, D] to what takes its place; None: nothing does."""
        v, at, T = self.drawn(out), self.hook.at, out.shape[1]
        match self.hook.kind:
            case "add":
                return out + v
            case "add_last":
                out[:, -1] += v
            case "add_from":
                out[:, at:] += v
            case "patch":
                if at < T and self.strength:
                    out[:, at] = v
            case "patch_raw":
                out[:, at] = v
            case "stored":
                return out + self.drawn(out, 1, self.shape[1])
            case "per_prompt":
                return out + self.drawn(out, self.shape[0], 1)
            case "shape_if":
                return out + v if at < T else None
            case "values_if":
                return out + v if bool(out[..., 0].mean() > 0) else None
            case "values_where":
                return torch.where(out[..., :1] > 0, out + v, out)
            case "read":
                self.seen = out.detach()
                return None
            case "ban":
                if self.strength:
                    out[..., [at % VOCABULARY, (3 * at + 7) % VOCABULARY]] = -torch.inf
            case other:
                raise AssertionError(other)
        return out


def steers_of(case: Case, model: nn.Module) -> list[Steer]:
    """The hooks of a case; those that are there at the first call are on."""
    steers = [Steer(case, index) for index in range(len(case.hooks))]
    for steer in steers[1 if case.change == "hook_added" else 0 :]:
        steer.put_on(model.get_submodule(module_name(case, model, steer.hook.where, steer.hook.number)))
    if case.change == "hook_strength":
        for steer in steers:
            steer.strength = 0.0
    return steers


CHANGES = (
    "none", "exchange block", "exchange norm", "exchange final_norm", "exchange unembedding", "data block",
    "data norm", "data final_norm", "data unembedding", "assign", "config", "eps", "module final_norm",
    "module unembedding", "patch_block", "patch_class", "patch_model", "train", "frozen", "attention eager",
    "attention sdpa", "longer", "hook_added", "hook_removed", "hook_strength",
)  # fmt: skip


@contextmanager
def changed(case: Case, model: nn.Module, steers: list[Steer]) -> Iterator[None]:
    """Make the change of a case; what is changed for a whole class is put back at the end."""
    kind, _, target = case.change.partition(" ")
    undo: Any = None
    if kind in ("exchange", "data", "module"):
        _change_weight(case, model, kind, target)
    elif kind == "assign":
        state = {name: _moved(p.detach(), 17 + i) for i, (name, p) in enumerate(model.named_parameters())}
        model.load_state_dict(model.state_dict() | state, assign=True)
    elif kind == "config":
        name, value = TAIL_VALUES[case.family]
        setattr(model.config, name, value)
        if hasattr(model, name):
            setattr(model, name, value)
    elif kind == "eps":
        for module in model.modules():
            for name in ("eps", "variance_epsilon"):
                if isinstance(vars(module).get(name), float):
                    setattr(module, name, 0.5)
    elif kind.startswith("patch"):
        undo = _patch(case, model, kind)
    elif kind == "train":
        model.train()
    elif kind == "frozen":
        model.requires_grad_(False)
    elif kind == "attention":
        with suppress(ValueError):  # a model without it stays as it is
            model.set_attn_implementation(target)
    elif kind == "hook_added":
        for steer in steers[:1]:
            steer.put_on(model.get_submodule(module_name(case, model, steer.hook.where, steer.hook.number)))
    elif kind == "hook_removed":
        for steer in steers[:1]:
            steer.handle.remove()
    elif kind == "hook_strength":
        for steer in steers:
            steer.strength = 1.0
    try:
        yield
    finally:
        if undo is not None:
            undo()


def _moved(p: Tensor, seed: int) -> Tensor:
    noise = torch.randn(p.shape, generator=torch.Generator().manual_seed(seed)).to(p.dtype)
    return p * 1.3 + 0.3 * p.std() * noise if p.numel() > 1 else p * 1.3


def _change_weight(case: Case, model: nn.Module, kind: str, target: str) -> None:
    top = model.get_submodule(module_name(case, model, "block", -1))
    if target in ("block", "norm"):
        names = [name for name, p in top.named_parameters() if p.dim() == (1 if target == "norm" else 2)]
        owner, name = top.get_submodule(names[-1].rpartition(".")[0]), names[-1].rpartition(".")[2]
    else:
        owner, name = model.get_submodule(module_name(case, model, target, 0)), "weight"
    parameter = getattr(owner, name)
    if kind == "data":
        parameter.data.copy_(_moved(parameter.data, 5))
    elif kind == "exchange":
        setattr(owner, name, nn.Parameter(_moved(parameter.detach(), 5)))
    else:
        path, _, last = module_name(case, model, target, 0).rpartition(".")
        other = object.__new__(type(owner))
        nn.Module.__init__(other)
        other.__dict__.update({k: v for k, v in vars(owner).items() if k not in ("_parameters",)})
        other.__dict__["_parameters"] = dict(owner._parameters) | {name: nn.Parameter(_moved(parameter.detach(), 5))}
        setattr(model.get_submodule(path), last, other)


def _louder(output: Any) -> Any:
    if isinstance(output, Tensor):
        return output * 1.4
    return (output[0] * 1.4, *output[1:])


def _patch(case: Case, model: nn.Module, kind: str) -> Any:
    """Put another forward in the place of a block's, of its class's or of the model's; returns what undoes it."""
    block = model.get_submodule(module_name(case, model, "block", -1))
    if kind == "patch_class":
        cls, own = type(block), type(block).forward

        def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
            return _louder(own(self, *args, **kwargs))

        cls.forward = forward
        return lambda: setattr(cls, "forward", own)
    if kind == "patch_block":
        block.forward = types.MethodType(
            lambda self, *args, **kwargs: _louder(type(self).forward(self, *args, **kwargs)), block
        )
        return None

    def outer(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = type(self).forward(self, *args, **kwargs)
        output.logits = output.logits + 0.7 * torch.arange(output.logits.shape[-1]).remainder(5).to(output.logits)
        return output

    model.forward = types.MethodType(outer, model)
    return None
