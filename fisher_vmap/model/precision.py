"""Chooses the format to compute in: the model's own or float32, whichever is faster on this processor.

Many processors have no arithmetic for bfloat16 or float16: matrix products in these formats are then 3 to 100 times
slower than in float32, and less exact. Whether that is so is measured, on products of the model's own widths.
"""

import logging
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fisher_vmap.model.offload import input_device, is_offloaded, model_dtype
from fisher_vmap.model.patches import Remembered, autocast_off, one_at_a_time, own_forwards
from fisher_vmap.model.validation import is_out_of_memory
from fisher_vmap.model.widening import NARROW, in_float32, narrow_tensors
from fisher_vmap.model.wrappers import hooks_off

log = logging.getLogger(__name__)

PRECISIONS = ("auto", "model", "mixed", "float32")
GAIN = 1.2  # float32 is chosen if it is at least this many times as fast
WIDTHS = (256, 1024)  # least and most features of a measured product: above call overhead, below a second anywhere
ROWS = (64, 1024)  # least and most rows of a measured product
ENOUGH_S = 0.01  # a product that takes this long is accurate enough


class Rates(NamedTuple):
    """Matrix products of this process on one device, in GFLOP/s: as x W^T and as g W, narrow and in float32."""

    narrow: tuple[float, float]
    float32: tuple[float, float]

    @property
    def gain(self) -> float:
        """How many times as fast float32 is, for one product of each kind together."""
        narrow, wide = (sum(1 / rate for rate in rates) for rates in self)
        return narrow / wide


class Precision(NamedTuple):
    """The chosen precision.

    Attributes:
        name: "model", "mixed" or "float32".
        why: the reason, in words.
        rates: the measured rates; None: nothing was measured.
    """

    name: str
    why: str
    rates: Rates | None = None

    def stored(self) -> dict[str, Any]:
        """The entry in index.json and metadata.yaml."""
        entry = {"chosen": self.name, "why": self.why}
        if self.rates is None:
            return entry
        return entry | {"gflops": {kind: [round(r, 1) for r in rates] for kind, rates in self.rates._asdict().items()}}


# By model, its dtype and the precision asked for. Each choice is logged once.
_CHOSEN: Remembered[dict[tuple[torch.dtype, str], Precision]] = Remembered()


def check_precision(precision: str) -> None:
    """Raise ValueError unless there is a precision of this name."""
    if precision not in PRECISIONS:
        raise ValueError(f"precision is {precision!r}; expected 'auto', 'model', 'mixed' or 'float32'")


def choose_precision(model: nn.Module, precision: str) -> Precision:
    """The precision to compute a model in, for the one asked for; chosen once in a process and for a model.

    Raises:
        ValueError: no such precision, or the weights cannot be widened.
    """
    check_precision(precision)
    with one_at_a_time(model):
        chosen, key = _CHOSEN.setdefault(model, {}), (model_dtype(model), precision)
        if key not in chosen:
            with autocast_off(), own_forwards(model):
                chosen[key] = _choose(model, precision)
            level = logging.INFO if key[0] in NARROW and (precision == "auto" or chosen[key].rates) else logging.DEBUG
            log.log(level, "precision: %s, because %s", chosen[key].name, chosen[key].why)
        return chosen[key]


def _choose(model: nn.Module, precision: str) -> Precision:
    dtype = model_dtype(model)
    name = str(dtype).removeprefix("torch.")
    if dtype not in NARROW:
        if precision == "float32" and dtype == torch.float64:
            raise ValueError("precision float32 was asked for, and the weights are float64; use precision model")
        return Precision("model" if precision == "auto" else precision, f"the weights are {name}")
    if precision == "float32":
        if is_offloaded(model):
            raise ValueError("precision float32 needs all weights in memory, and some are offloaded; use dtype float32")
        if (packed := _quantised(model)) is not None:
            raise ValueError(
                f"precision float32 was asked for, and {packed} is quantised; use precision model, or load the model "
                "with its weights unpacked (dequantize: true)"
            )
        return Precision("float32", "it was asked for")
    faster = faster_precision(model, input_device(model), dtype)
    if precision != "auto":
        if faster.name == "model":
            return Precision(precision, "it was asked for")
        why = f"it was asked for, though {faster.why}; float32 is faster, and no less exact"
        return Precision(precision, why, faster.rates)
    if faster.name == "float32" and (reason := _why_not_widened(model)) is not None:
        return Precision("model", f"{reason}, though {faster.why}", faster.rates)
    return faster


def faster_precision(model: nn.Module, device: torch.device, dtype: torch.dtype) -> Precision:
    """Which of "model" and "float32" is faster for weights of a narrow format on a device.

    The model gives the widths of the products; its weights need not be loaded.
    """
    name = str(dtype).removeprefix("torch.")
    on_gpu = device.type == "cuda"  # a GPU reports its formats; a CPU is measured
    if on_gpu and (dtype == torch.float16 or torch.cuda.is_bf16_supported(including_emulation=False)):
        return Precision("model", f"{device.type} has arithmetic for {name}")
    rates = product_rates(device, dtype, *product_widths(model))
    why = f"products in float32 run at {_shown(rates.float32)} GFLOP/s here, in {name} at {_shown(rates.narrow)}"
    return Precision("float32" if rates.gain >= GAIN else "model", f"{why} (as x W^T, g W)", rates)


def _shown(rates: tuple[float, float]) -> str:
    return " and ".join(f"{rate:.0f}" if rate >= 10 else f"{rate:.1f}" for rate in rates)


def _why_not_widened(model: nn.Module) -> str | None:
    """Why a model's forward cannot run in float32; None if it can."""
    if is_offloaded(model):
        return "some weights are offloaded"
    if (packed := _quantised(model)) is not None:
        return f"{packed} is quantised"
    error = _error_of_a_run(model, in_float32(model))
    if error is not None and _error_of_a_run(model, nullcontext()) is not None:  # a user's hook needs other prompts
        with hooks_off(model):
            error = _error_of_a_run(model, in_float32(model))
    if error is None:
        return None
    if is_out_of_memory(error):
        return "there is not enough memory for it"
    return f"this model does not run in float32 ({type(error).__name__}: {' '.join(str(error).split())[:120]})"


def _error_of_a_run(model: nn.Module, around: AbstractContextManager[Any]) -> Exception | None:
    """The error of a forward on two tokens, if any: a hook may have weights of its own, or read position 5."""
    ids = torch.zeros(1, 2, dtype=torch.int64, device=input_device(model))
    try:
        with torch.no_grad(), around:
            model(input_ids=ids, use_cache=False)
    except Exception as error:  # a user's hook may raise anything
        return error
    return None


def _quantised(model: nn.Module) -> str | None:
    """The name of the first quantised matrix, or None."""
    plain = {id(tensor) for tensor in narrow_tensors(model)}
    wide = (torch.float32, torch.float64)
    odd = (n for n, p in model.named_parameters() if p.dim() >= 2 and id(p) not in plain and p.dtype not in wide)
    return next(odd, None)


def product_widths(model: nn.Module) -> tuple[int, int]:
    """In and out features of the most frequent linear layer, limited to `WIDTHS`."""
    shapes = [(m.in_features, m.out_features) for m in model.modules() if isinstance(m, nn.Linear)]
    least, most = WIDTHS
    inner, outer = max(shapes, key=shapes.count, default=WIDTHS)
    return min(max(inner, least), most), min(max(outer, least), most)


@cache
def product_rates(device: torch.device, dtype: torch.dtype, inner: int, outer: int) -> Rates:
    """The rates of products [rows, inner] x [inner, outer], and of their pullbacks [rows, outer] x [outer, inner].

    Measured once in a process for each device, in about 0.1 s, or 0.5 s on the slowest processors.
    """
    with torch.no_grad():
        return Rates(_rates(device, dtype, inner, outer), _rates(device, torch.float32, inner, outer))


def _rates(device: torch.device, dtype: torch.dtype, inner: int, outer: int) -> tuple[float, float]:
    weight = torch.ones(outer, inner, device=device, dtype=dtype)
    few = torch.ones(8, inner, device=device, dtype=dtype)
    torch.nn.functional.linear(few, weight[:8])  # warm-up: loads the library

    def rate(product: Callable[[Tensor], Tensor], width: int) -> float:
        rows, best = ROWS[0], 0.0
        while True:
            x = torch.ones(rows, width, device=device, dtype=dtype)
            for _ in range(3):
                seconds = _seconds(product, x)
                best = max(best, 2e-9 * rows * inner * outer / seconds)
                if seconds > 15 * ENOUGH_S:
                    return best
            if seconds > ENOUGH_S or rows >= ROWS[1]:
                return best
            rows *= 4

    return rate(lambda x: torch.nn.functional.linear(x, weight), inner), rate(lambda g: torch.mm(g, weight), outer)


def _seconds(product: Callable[[Tensor], Tensor], x: Tensor) -> float:
    began = time.perf_counter()
    product(x)
    if x.device.type == "cuda":
        torch.cuda.synchronize(x.device)
    elif x.device.type == "mps":
        torch.mps.synchronize()
    return max(time.perf_counter() - began, 1e-9)
