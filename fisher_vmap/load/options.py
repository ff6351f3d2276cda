"""The options of `load_model`, and which names may stand in its `model_kwargs`."""

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import nn

from fisher_vmap.errors import UserError
from fisher_vmap.kernels.hf_attention import NAME

# Arguments of from_pretrained that say where files come from and how they are read, with the types of their values.
HUB: dict[str, Any] = {"token": (str, bool), "cache_dir": str, "local_files_only": bool, "force_download": bool}
READING: dict[str, Any] = {
    "low_cpu_mem_usage": bool, "offload_folder": str, "offload_buffers": bool, "offload_state_dict": bool,
    "disable_mmap": bool,
}  # fmt: skip
CONTENT: dict[str, Any] = {  # these change what is loaded
    "subfolder": str, "variant": str, "use_safetensors": bool, "weights_only": bool, "key_mapping": dict,
    "code_revision": str, "experts_implementation": str,
}  # fmt: skip
ARGUMENTS = HUB | READING | CONTENT
# Arguments that have a setting of their own, or that another setting decides.
SETTINGS = {
    "dtype": "dtype", "torch_dtype": "dtype", "device_map": "device_map", "max_memory": "max_memory",
    "tp_plan": "device_map", "tp_size": "device_map", "distributed_config": "device_map",
    "quantization_config": "quantization", "load_in_4bit": "quantization", "load_in_8bit": "quantization",
    "revision": "model_revision", "trust_remote_code": "trust_remote_code",
    "attn_implementation": "attn_implementation", "_attn_implementation": "attn_implementation",
    "use_flash_attention_2": "attn_implementation", "gguf_file": "model_path",
    "pretrained_model_name_or_path": "model_path", "adapter_name": "adapter_path", "adapter_kwargs": "adapter_path",
}  # fmt: skip
NARROW_ATTENTION = ("bfloat16", "float16")  # what flash attention computes in


@dataclass(frozen=True, kw_only=True)
class LoadOptions:
    """How a model is loaded.

    Raises:
        UserError: options exclude each other, or one has a value or a name that cannot be given there.
    """

    revision: str | None = None
    """Of a hub model: branch, tag or commit."""
    trust_remote_code: bool = False
    """Whether code that comes with the model may run."""
    dtype: str = "bfloat16"
    """Of the weights: "bfloat16", "float32", "float16" or "float64"."""
    device: str = "auto"
    """A torch device, or "auto"."""
    device_map: str | dict[str, Any] | None = None
    """The blocks' devices, as for `from_pretrained`; None: the whole model on `device`."""
    max_memory: dict[Any, Any] | None = None
    """Most memory that `device_map` may use of each device."""
    adapter_path: str | None = None
    """A PEFT adapter, hub id or folder, to merge into the model."""
    adapter_revision: str | None = None
    """Of an adapter on the hub."""
    dequantize: bool = False
    """Whether quantised weights are unpacked to `dtype`."""
    precision: str = "model"
    """As for `fisher_scores`; for float32 the weights are widened from `dtype` if memory allows."""
    attn_implementation: str | None = None
    """The attention of transformers that the model is loaded with, such as "sdpa" or "eager"; None: its default."""
    quantization: str | None = None
    """Quantise the weights with bitsandbytes: "4bit" (nf4, computed in `dtype`) or "8bit"; None: leave them."""
    model_kwargs: Mapping[str, Any] | None = None
    """Further arguments of `from_pretrained`: where files are found, and values of the model's configuration."""

    def __post_init__(self) -> None:
        if self.device_map is not None and self.device != "auto":
            raise UserError(f"device is {self.device!r} and device_map is {self.device_map!r}; give one of the two")
        if self.max_memory is not None and self.device_map is None:
            raise UserError("max_memory is for device_map; give device_map: auto as well")
        if self.quantization not in (None, "4bit", "8bit"):
            raise UserError(f"quantization is {self.quantization!r}; expected none, 4bit or 8bit")
        registered = transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS.valid_keys()
        known = ["eager", *(key for key in registered if key != NAME and not key.startswith("paged"))]
        attention = self.attn_implementation
        if attention is not None and attention not in known and "/" not in attention:  # with a slash: of the hub
            raise UserError(
                f"attn_implementation is {attention!r}; this version of transformers has {', '.join(known)}"
            )
        for name, value in (self.model_kwargs or {}).items():
            if setting := SETTINGS.get(name):
                raise UserError(f"model_kwargs has {name!r}, which has a setting of its own; give {setting} instead")
            expected = ARGUMENTS.get(name)
            if expected is not None and not isinstance(value, expected):
                kinds = expected if isinstance(expected, tuple) else (expected,)
                wanted = " or ".join(kind.__name__ for kind in kinds)
                raise UserError(f"{name} in model_kwargs is a {type(value).__name__}; expected a {wanted}")

    def _given(self, names: Mapping[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in (self.model_kwargs or {}).items() if name in names}

    @property
    def hub(self) -> dict[str, Any]:
        """The arguments of every download: whose token, and which cache."""
        return self._given(HUB)

    @property
    def files(self) -> dict[str, Any]:
        """The arguments of every `from_pretrained` besides the revision."""
        return {"trust_remote_code": self.trust_remote_code, **self._given({"code_revision": str}), **self.hub}

    @property
    def loading(self) -> dict[str, Any]:
        """The arguments of the model's `from_pretrained` alone; `subfolder` is found before."""
        return self._given({name: kind for name, kind in (READING | CONTENT).items() if name != "subfolder"})

    @property
    def subfolder(self) -> str:
        """Where in its folder or repository the model lies; empty: at the top."""
        return str((self.model_kwargs or {}).get("subfolder", ""))

    @property
    def overrides(self) -> dict[str, Any]:
        """What is changed in the model's configuration."""
        return {name: value for name, value in (self.model_kwargs or {}).items() if name not in ARGUMENTS}

    @property
    def to_check(self) -> str:
        """What to do where loading fails, if options may be at fault; empty: they are not."""
        given = [name for name in ("model_kwargs", "quantization", "attn_implementation") if getattr(self, name)]
        return f"check {' and '.join(given)}" if given else ""


def kwargs_of_results(model_kwargs: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """The part of `model_kwargs` that results depend on; None: nothing."""
    return {n: v for n, v in (model_kwargs or {}).items() if n not in HUB and n not in READING} or None


def attention_argument(options: LoadOptions, place: torch.device) -> dict[str, Any]:
    """The argument of `from_pretrained` for the attention asked for.

    Raises:
        UserError: it cannot run on this device or in this format.
    """
    name = options.attn_implementation
    if name is None:
        return {}
    if "flash" in name and place.type == "cpu" and options.device_map is None:
        raise UserError(f"attn_implementation {name} needs a GPU, and the model goes to the CPU; give sdpa or eager")
    if "flash" in name and not (options.dtype in NARROW_ATTENTION and options.precision in ("auto", "model")):
        raise UserError(
            f"attn_implementation {name} computes in bfloat16 or float16, but dtype is {options.dtype} and precision "
            f"{options.precision}; change these, or give sdpa or eager"
        )
    return {"attn_implementation": name}


def quantization_argument(model_path: str, config: Any, options: LoadOptions) -> dict[str, Any]:
    """The argument of `from_pretrained` for the quantisation asked for.

    Raises:
        UserError: the weights are quantised already, or bitsandbytes is missing.
    """
    if options.quantization is None:
        return {}
    stored = getattr(config, "quantization_config", None)
    if stored is not None or model_path.endswith(".gguf"):
        method = stored.get("quant_method") if isinstance(stored, dict) else getattr(stored, "quant_method", None)
        method = "gguf" if model_path.endswith(".gguf") else getattr(method, "value", method)
        raise UserError(
            f"quantization is {options.quantization}, but the weights of {model_path} are quantised already "
            f"({method}); leave quantization out, or give the unquantised model"
        )
    for package in ("bitsandbytes", "accelerate"):
        if importlib.util.find_spec(package) is None:
            raise UserError(f"quantization {options.quantization} needs the package {package}: pip install {package}")
    if options.quantization == "8bit":
        return {"quantization_config": transformers.BitsAndBytesConfig(load_in_8bit=True)}
    return {
        "quantization_config": transformers.BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=getattr(torch, options.dtype)
        )
    }


def saved_by_packing(model: Any, quantization: str) -> int:
    """Bytes that bitsandbytes saves: it packs every linear layer but the unembedding."""
    saved: int = 0
    for module in model.modules():
        plain = type(module) is nn.Linear or type(module).__name__ == "Conv1D"
        if plain and module is not model.get_output_embeddings():
            weight = module.weight
            # A scale of 4 bytes for 64 numbers, or for each row of the matrix.
            scales = -(-weight.numel() // 64) if quantization == "4bit" else len(weight)
            packed = weight.numel() // (2 if quantization == "4bit" else 1) + 4 * scales
            saved += weight.numel() * weight.element_size() - packed
    return saved
