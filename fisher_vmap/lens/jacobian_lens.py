"""`JacobianLens`: the mean Jacobian from each layer's output to the last block's, and the files that hold it.

Two files hold the same matrices: `jacobian_lens.pt`, the format of the reference implementation (anthropics/
jacobian-lens) and of transformer-lens 4.3 (`torch.save` of {"J": {layer: [D, D]}, "n_prompts", "source_layers",
"d_model", "metadata"}), and `jacobian_lens.safetensors`, with the mean output metric C and standard errors as well.
"""

import json
import logging
import math
import os
import pickle
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from fisher_vmap.errors import UserError
from fisher_vmap.lens.flags import PT_NAME, SAFETENSORS_NAME
from fisher_vmap.results.files import replacing

if TYPE_CHECKING:
    from fisher_vmap.lens.reading import Readout, Sensitive

log = logging.getLogger("fisher_vmap")

_KEYS = ("J", "n_prompts", "source_layers", "d_model")


@dataclass(frozen=True)
class JacobianLens:
    """A fitted lens.

    Attributes:
        jacobians: the number of a block -> J, [D, D] float32: rows are dimensions of the last block's output, columns
            those of this block's. J h is where h goes, on average.
        n_prompts: how many prompts J is the mean of.
        metric: [D, D] float32, the mean over the same prompts and positions of the output metric C (nats per unit of
            the last block's output, squared); None: the file does not have it.
        standard_errors: of each J, the standard error of the mean over prompts, as a part of |J|; empty: not known.
        metadata: what the lens was fitted with: plain values.
    """

    jacobians: dict[int, Tensor]
    n_prompts: int
    metric: Tensor | None = None
    standard_errors: dict[int, float] = field(default_factory=dict)
    metadata: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check the shapes.

        Raises:
            ValueError: no layer, or matrices of different shapes.
        """
        if not self.jacobians:
            raise ValueError("a lens without layers; expected at least one")
        D = self.d_model
        matrices = {f"J of layer {layer}": J for layer, J in self.jacobians.items()}
        for name, matrix in (matrices | ({} if self.metric is None else {"the metric": self.metric})).items():
            if matrix.shape != (D, D):
                raise ValueError(f"{name} has shape {tuple(matrix.shape)}; expected ({D}, {D})")

    @property
    def layers(self) -> list[int]:
        """The numbers of the fitted blocks, in order."""
        return sorted(self.jacobians)

    @property
    def d_model(self) -> int:
        """D."""
        return len(next(iter(self.jacobians.values())))

    def of(self, layer: int) -> Tensor:
        """J of a layer, [D, D].

        Raises:
            ValueError: the layer was not fitted.
        """
        if layer not in self.jacobians:
            raise ValueError(f"layer {layer!r} has no lens; expected one of {self.layers}")
        return self.jacobians[layer]

    def readout(
        self,
        model: Any,
        prompt: Any,
        *,
        layers: int | Sequence[int] | None = None,
        top_k: int = 10,
        order: str = "logit",
        use_jacobian: bool = True,
        tokenizer: Any = None,
    ) -> "Readout":
        """The tokens that the lens reads at each layer and position of a prompt: softmax(unembed(norm(J h))).

        The model is run once, in the precision of the FisherModel; the head is computed in float32 or wider.

        Args:
            model: a FisherModel; or a causal LM, with its `tokenizer` if the prompt is no token ids.
            prompt: one prompt: a text, a list of messages, or token ids, [T] int64.
            layers: numbers of blocks; None: all of the lens. Without J any block of the model.
            top_k: k, how many tokens a layer and position.
            order: "logit", the likeliest tokens of the lens; or "kl", those that account for most of the KL of the
                model's own final distribution p when its last block's output moves along J h: token v for
                1/2 p_v (a_v . u)^2, with a_v the gradient of log p_v and u = J h / |h|.
            use_jacobian: False: the logit lens, J = I.
            tokenizer: of a plain model.

        Returns:
            Readout, with token ids, log-probabilities and shares, [T, k] for each layer.

        Raises:
            ValueError: a layer without a lens, a model of another width or whose head cannot be taken apart, more than
                one prompt, an unknown order, or top_k above V.
        """
        from fisher_vmap.lens.reading import read

        asked: Any = self.layers if layers is None else layers
        each = [asked] if isinstance(asked, Integral) else asked
        chosen = [int(layer) if isinstance(layer, Integral) else layer for layer in each]
        jacobians = {layer: self.of(layer) for layer in chosen} if use_jacobian else None
        how: dict[str, Any] = {"layers": chosen, "top_k": top_k, "order": order, "tokenizer": tokenizer}
        return read(jacobians, self.d_model, model, prompt, **how)

    def sensitivity(self, direction: Any, layer: int) -> float | Tensor:
        """How much the output cares about a direction of a layer: 1/2 v^T J^T C J v nats, for v of length 1.

        That is the mean KL of a unit step along v, added to the layer's output at all positions of the corpus, if every
        position answered as the mean J does; answers that differ in sign cancel in it. A step of length s has s^2 times
        as much.

        Args:
            direction: [D], or [N, D] for several; of any length.
            layer: the number of the block.

        Returns:
            float for [D]; [N] float64, on the CPU, for [N, D].

        Raises:
            ValueError: the lens has no metric or not the layer; a direction of another width, zero, or not finite.
        """
        from fisher_vmap.lens.reading import mean_kl

        return mean_kl(self.of(layer), self._metric(), direction)

    def sensitive_directions(self, layer: int, count: int) -> "Sensitive":
        """The directions of the largest `sensitivity`: the leading eigenvectors of J^T C J, [count, D], and their KL.

        Raises:
            ValueError: the lens has no metric or not the layer; count is below 1 or above D.
        """
        from fisher_vmap.lens.reading import leading

        return leading(self.of(layer), self._metric(), count)

    def _metric(self) -> Tensor:
        if self.metric is None:
            raise ValueError(
                f"this lens has no metric; load {SAFETENSORS_NAME} of its fit, a .pt file does not hold it"
            )
        return self.metric

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """A lens from a .safetensors or .pt file, or from the folder of a fit.

        Raises:
            UserError: the file is missing, is damaged, or holds no lens.
        """
        path = Path(os.path.expanduser(path))
        if path.is_dir():
            found = [path / name for name in (SAFETENSORS_NAME, PT_NAME) if (path / name).exists()]
            if not found:
                raise UserError(f"{path} has no {PT_NAME}: expected the folder of a finished `fisher-vmap lens`")
            path = found[0]
        if not path.is_file():
            raise UserError(f"there is no file {path}; expected a lens, a .pt or .safetensors file or a fit's folder")
        try:
            return cls(**(_from_safetensors(path) if path.suffix == ".safetensors" else _from_pt(path)))
        except _DAMAGED as error:
            reason = " ".join(str(error).split())[:160]
            raise UserError(f"{path} holds no lens ({reason}); expected {', '.join(_KEYS)}") from error

    def save(self, path: str | os.PathLike[str], dtype: torch.dtype = torch.float16) -> None:
        """Write a .pt, with J in `dtype` (in float32 if that cannot hold it), or a .safetensors: float32, everything.

        Raises:
            UserError: another ending, or the file cannot be written.
        """
        path = Path(os.path.expanduser(path))
        if path.suffix == ".pt":
            largest = max(float(J.abs().max()) for J in self.jacobians.values())
            if torch.finfo(dtype).max < largest < float("inf"):
                log.warning("%s is in float32, since %s cannot hold J, up to %.3g", path, dtype, largest)
                dtype = torch.float32
            payload = {
                "J": {layer: self.jacobians[layer].to(dtype) for layer in self.layers},
                "n_prompts": self.n_prompts,
                "source_layers": self.layers,
                "d_model": self.d_model,
                "metadata": self.metadata,
            }
            with replacing(path) as file:
                torch.save(payload, file)
        elif path.suffix == ".safetensors":
            tensors = {f"J.{layer}": self.jacobians[layer].contiguous() for layer in self.layers}
            tensors |= {} if self.metric is None else {"metric": self.metric.contiguous()}
            notes = {"n_prompts": self.n_prompts, "standard_errors": self.standard_errors, "metadata": self.metadata}
            with replacing(path) as file:
                file.write(save(tensors, {name: json.dumps(value) for name, value in notes.items()}))
        else:
            raise UserError(f"{path} ends in {path.suffix or 'nothing'}; expected .pt or .safetensors")

    @classmethod
    def merged(cls, lenses: Sequence["JacobianLens"]) -> "JacobianLens":
        """The lens of all prompts together, from lenses of slices of them, weighted by their prompts.

        Standard errors follow from those of the slices, if all have them; so does the metric.

        Raises:
            ValueError: no lens, or lenses of different layers, widths, or settings.
        """
        if not lenses:
            raise ValueError("no lens to merge; expected at least one")
        first, total = lenses[0], sum(lens.n_prompts for lens in lenses)
        for lens in lenses:
            if (lens.layers, lens.d_model) != (first.layers, first.d_model):
                raise ValueError(
                    f"one lens has layers {first.layers} of width {first.d_model}, another {lens.layers} of width "
                    f"{lens.d_model}; expected lenses of the same layers"
                )
            for name in ("model", "skip_first", "max_length"):
                if lens.metadata.get(name) != first.metadata.get(name):
                    here, there = first.metadata.get(name), lens.metadata.get(name)
                    raise ValueError(f"one lens has {name} {here}, another {there}; expected lenses of one fit")
            if lens.n_prompts < 1:
                raise ValueError(f"a lens of {lens.n_prompts} prompts; expected at least one")
        weights = [lens.n_prompts / total for lens in lenses]

        def mean(matrices: Sequence[Tensor]) -> Tensor:
            return sum(w * m.double() for w, m in zip(weights, matrices, strict=True)).float()  # type: ignore[union-attr]

        jacobians = {layer: mean([lens.jacobians[layer] for lens in lenses]) for layer in first.layers}
        metrics = [lens.metric for lens in lenses if lens.metric is not None]
        errors: dict[int, float] = {}
        if all(lens.standard_errors for lens in lenses):
            for layer, J in jacobians.items():
                squares = [
                    (w * lens.standard_errors[layer] * float(lens.jacobians[layer].norm())) ** 2
                    for w, lens in zip(weights, lenses, strict=True)
                ]
                errors[layer] = sum(squares) ** 0.5 / float(J.norm()) if J.any() else math.nan
        metric = mean(metrics) if len(metrics) == len(lenses) else None
        return cls(jacobians, total, metric, errors, dict(first.metadata))


def _from_pt(path: Path) -> Mapping[str, Any]:
    payload = torch.load(path, map_location="cpu", weights_only=True)
    return {
        "jacobians": {int(layer): J.float() for layer, J in payload["J"].items()},
        "n_prompts": int(payload["n_prompts"]),
        "metadata": dict(payload.get("metadata") or {}),
    }


def _from_safetensors(path: Path) -> Mapping[str, Any]:
    with safe_open(path, "pt") as file:
        notes = {name: json.loads(text) for name, text in (file.metadata() or {}).items() if name != "format"}
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no mapping)
    return {
        "jacobians": {int(name[2:]): J for name, J in tensors.items() if name.startswith("J.")},
        "n_prompts": int(notes["n_prompts"]),
        "metric": tensors.get("metric"),
        "standard_errors": {int(layer): float(error) for layer, error in notes["standard_errors"].items()},
        "metadata": notes["metadata"],
    }


_DAMAGED = (
    *(KeyError, TypeError, ValueError, AttributeError, EOFError, RuntimeError, OSError),
    *(pickle.UnpicklingError, zipfile.BadZipFile, SafetensorError),
)
