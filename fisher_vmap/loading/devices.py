"""Where a model goes: one device, or several as `device_map` says."""

import importlib.util
import logging
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from fisher_vmap.errors import UserError

log = logging.getLogger(__name__)


def choose_device(device: str) -> torch.device:
    """The device of that name; for "auto" CUDA, else MPS, else the CPU.

    Raises:
        UserError: no such device, or torch cannot use it.
    """
    if device != "auto":
        try:
            chosen = torch.device(device)
            torch.empty(1, device=chosen)
        except (RuntimeError, AssertionError, NotImplementedError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(
                f"device {device!r} cannot be used ({reason}); expected auto, cpu, cuda, cuda:1 or mps"
            ) from error
        return chosen
    if torch.cuda.is_available():
        return torch.device("cuda")
    if shutil.which("nvidia-smi") or Path("/proc/driver/nvidia/version").exists():
        log.warning(
            "an NVIDIA GPU seems to be there, but torch %s cannot use it: running on the CPU", torch.__version__
        )
    if torch.backends.mps.is_available():
        return torch.device("mps")
    return torch.device("cpu")


def placement_options(
    model_path: str, config: Any, place: torch.device, device_map: Any, max_memory: dict[Any, Any] | None
) -> dict[str, Any]:
    """What `from_pretrained` is told of devices; nothing where the model is moved to its device afterwards."""
    if device_map is None:
        quantized = getattr(config, "quantization_config", None) is not None
        return {"device_map": {"": place}} if quantized else {}  # quantised weights are packed for the device at once
    if importlib.util.find_spec("accelerate") is None:
        raise UserError("device_map needs the package accelerate: pip install accelerate")
    if device_map == "auto" and max_memory is None and not torch.accelerator.is_available():
        log.warning("device_map is auto, but torch sees no GPU: all of %s goes to the CPU", model_path)
    return {"device_map": device_map} | ({"max_memory": max_memory} if max_memory else {})


def places_of(model: Any, place: torch.device) -> str:
    """The devices of a model, in words."""
    placed = getattr(model, "hf_device_map", None) or {"": place}
    count = Counter(str(device) for device in placed.values())
    return " and ".join(device if len(count) == 1 else f"{device} ({n} parts)" for device, n in count.items())
