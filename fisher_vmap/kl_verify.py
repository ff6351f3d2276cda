"""`verify DIR --kl`: do the stored matrices predict what steps of the residual stream do to the next token?

For some prompts the model is run anew, in float32, with steps +-eps v added at the hooked layer, v the leading stored
directions and random ones. The KL divergence that it shows is set beside 1/2 eps^2 v^T F v.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from fisher_vmap.config import Settings
from fisher_vmap.errors import UserError
from fisher_vmap.from_settings import make_renderer, model_of, source_of
from fisher_vmap.kl import measured_kl
from fisher_vmap.models import Loaded
from fisher_vmap.results import Results
from fisher_vmap.storage.fingerprint import plain_values
from fisher_vmap.storage.prompt_record import PromptRecord

LEADING, RANDOM = 3, 1  # directions of each prompt
# Steps are chosen by the KL divergence that F predicts for them, in nats. Below the first, float32's rounding shows.
PREDICTED = np.array([1e-5, 1e-4, 1e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0])
# How far the median ratio of leading directions may be from 1, by the precision of the folder's gradients. On SmolLM2
# it was 1.00 in float32, 0.997 in mixed and 0.995 in bfloat16, and single directions of the last up to 5% away.
ALLOWED = {"float64": 0.01, "float32": 0.01, "mixed": 0.03, "float16": 0.05, "bfloat16": 0.1}

Numbers = NDArray[np.float64]


class Directions(NamedTuple):
    """What steps along n directions did: the leading ones of every prompt, or the random ones.

    Attributes:
        predicted: [n, E] nats, 1/2 eps^2 v^T F v.
        measured: [n, E] nats, the mean of +eps and -eps: odd terms cancel.
        eps: [n, E].
        residual_norm: [n], of the residual stream where the step was added.
    """

    predicted: Numbers
    measured: Numbers
    eps: Numbers
    residual_norm: Numbers

    @property
    def ratio(self) -> Numbers:
        """Predicted / measured, [n, E]."""
        return self.predicted / self.measured

    def quadratic_until(self) -> Numbers:
        """[n]: the largest eps, in units of the residual stream's norm, up to which KL / eps^2 stays within 10%."""
        curvature = self.measured / self.eps**2
        near = np.abs(curvature / curvature[:, :1] - 1) < 0.1
        last = np.minimum.accumulate(near, axis=1).sum(1) - 1
        longest: Numbers = self.eps[np.arange(len(last)), last] / self.residual_norm
        return longest


class KlCheck(NamedTuple):
    """The outcome of the check of one layer.

    Attributes:
        layer: its name.
        leading: the leading stored directions.
        random: random directions.
        estimator: of the folder.
        precision: of the folder's gradients, a key of `ALLOWED`.
        share_full: median share of the whole vocabulary's trace that is stored, or None where it was not estimated.
    """

    layer: str
    leading: Directions
    random: Directions
    estimator: str
    precision: str
    share_full: float | None

    @property
    def ok(self) -> bool:
        """Whether the matrices promise no more than there is, and those of estimator full all of it."""
        median, allowed = float(np.median(self.leading.ratio[:, 0])), ALLOWED[self.precision]
        return median < 1 + allowed and (self.estimator != "full" or median > 1 - allowed)

    def lines(self) -> list[str]:
        """The report of this layer."""
        lines = [
            f"{'ok  ' if self.ok else 'BAD '} KL at {self.layer}: {len(self.leading.eps)} leading and "
            f"{len(self.random.eps)} random directions; predicted / measured, median (10% to 90%):",
            "     predicted, nats      leading directions           random directions",
        ]
        for e, kl in enumerate(PREDICTED):
            both = (_spread(d.ratio[:, e]) for d in (self.leading, self.random))
            lines.append(f"     {kl:<16g} {'    '.join(f'{text:>24}' for text in both)}")
        for name, directions in (("leading", self.leading), ("random", self.random)):
            until = directions.quadratic_until()
            most = np.quantile(until, [0.1, 0.5, 0.9])
            lines.append(
                f"     KL grows as eps^2, to 10%, up to {most[1]:.2g} of the residual stream's norm ({most[0]:.1g} to "
                f"{most[2]:.1g}) along {name} directions"
            )
        return [*lines, f"     {self._expected()}"]

    def _expected(self) -> str:
        allowed = f"{self.precision} gradients allow {ALLOWED[self.precision]:.0%}"
        if self.estimator == "full":
            return f"estimator full: 1 is expected along leading directions for small steps, and {allowed}"
        share = "" if self.share_full is None else f" (median share of the trace held: {self.share_full:.0%})"
        return f"estimator topk: the ratio falls short of 1 by what the tail of the vocabulary holds{share}; {allowed}"


def check_kl(results: Results, *, prompts: int = 8, layer: str | None = None, model_path: str | None = None) -> KlCheck:
    """Set predicted beside measured KL divergences, for a few prompts of a results folder.

    Args:
        results: the folder, complete.
        prompts: how many prompts, spread evenly over those with results.
        layer: which hooked layer; None: the first.
        model_path: where the model is now; None: where it was.

    Raises:
        UserError: the model or the prompts cannot be had, or are not those that the folder was made from.
    """
    results = results.at(layer or results.layer)
    settings = _settings(results, model_path)
    chosen = _spread_over(
        [i for i, status in enumerate(results.table().column("status").to_pylist()) if status == "ok"], prompts
    )
    if not chosen:
        raise UserError(f"{results.folder} has no prompt with results; there is nothing to compare")
    loaded = model_of(settings)
    if (now := plain_values(loaded.identity)) != (then := results.index.fingerprint.get("model")):
        raise UserError(f"the model at {settings.model_path} is not the folder's: {now} here, {then} there")
    ids = _token_ids(results, settings, loaded, chosen)
    model = _widened(loaded, settings)
    leading, random = [], []
    for i in chosen:
        record = results[i]
        shown = _directions(record, i)
        found = _steps(model, record, ids[i], shown, settings.bias_positions)
        split = len(shown) - RANDOM
        leading.append(Directions(*(x[:split] for x in found)))
        random.append(Directions(*(x[split:] for x in found)))
    mixed = settings.precision == "mixed" and settings.dtype in ("bfloat16", "float16")
    shares = [results[i].row.get(f"{results.layer}/share_full") for i in chosen]
    known = [share for share in shares if share is not None]
    return KlCheck(
        results.layer,
        _joined(leading),
        _joined(random),
        settings.estimator,
        "mixed" if mixed else settings.dtype,
        float(np.median(known)) if known else None,
    )


def plot_kl(check: KlCheck, path: Path) -> None:
    """Draw predicted against measured KL divergences.

    Raises:
        UserError: matplotlib is not installed, or the file cannot be written.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError("a plot needs matplotlib: pip install 'fisher_vmap[report]'") from error
    figure = Figure(figsize=(5, 5), layout="constrained")
    axes = figure.add_subplot()
    axes.plot(PREDICTED[[0, -1]], PREDICTED[[0, -1]], color="0.6", linewidth=1, label="as predicted")
    for directions, name, mark in (
        (check.leading, "leading directions", "o"),
        (check.random, "random directions", "x"),
    ):
        axes.plot(directions.predicted.ravel(), directions.measured.ravel(), mark, alpha=0.6, label=name)
    axes.set(xscale="log", yscale="log", xlabel="predicted KL, 1/2 eps² vᵀFv (nats)", ylabel="measured KL (nats)")
    axes.set_title(f"{check.layer}, estimator {check.estimator}, {check.precision}", fontsize="medium")
    axes.legend(frameon=False)
    try:
        figure.savefig(path, dpi=150)
    except (OSError, ValueError) as error:
        raise UserError(f"the plot cannot be written to {path}: {' '.join(str(error).split())}") from error


def _settings(results: Results, model_path: str | None) -> Settings:
    values: dict[str, Any] = results.metadata["settings"]
    known = {name: value for name, value in values.items() if name in Settings.model_fields}
    return Settings(**{**known, **({} if model_path is None else {"model_path": model_path})})


def _widened(loaded: Loaded, settings: Settings) -> Any:
    """The model in float32, which small steps need; float64 stays."""
    if settings.dtype == "float64":
        return loaded.model
    try:
        return loaded.model.float()
    except (ValueError, RuntimeError, NotImplementedError) as error:  # quantised weights, or weights put aside
        raise UserError(
            f"the model cannot be widened to float32 ({' '.join(str(error).split())[:120]}); --kl needs weights that "
            "are not quantised and fit on one device"
        ) from error


def _token_ids(results: Results, settings: Settings, loaded: Loaded, chosen: Sequence[int]) -> dict[int, list[int]]:
    """The prompts as the run gave them to the model, read and rendered anew."""
    source = source_of(settings.model_copy(update={"num_prompts": max(chosen) + 1}))
    date = (results.index.resolved or {}).get("template_date")
    renderer = make_renderer(settings, loaded, source, date)
    found: dict[int, list[int]] = {}
    for prompt in source:
        if prompt.index in chosen:
            if prompt.messages_or_text is None:
                raise UserError(
                    f"prompt {prompt.index} of {settings.dataset_name} is not the folder's: it is empty now"
                )
            rendered, row = renderer.render(prompt.messages_or_text), results[prompt.index].row
            if len(rendered.ids) != row["tokens"] or row["text"] not in (None, rendered.text):
                raise UserError(
                    f"prompt {prompt.index} of {settings.dataset_name} is not the folder's: it has {len(rendered.ids)} "
                    f"tokens now, {row['tokens']} then; the data set has changed"
                )
            found[prompt.index] = rendered.ids
    if missing := set(chosen) - set(found):
        raise UserError(f"{settings.dataset_name} has no prompt {min(missing)} any more; the data set has changed")
    return found


def _spread_over(items: Sequence[int], count: int) -> list[int]:
    if len(items) <= count:
        return list(items)
    return [items[i] for i in np.linspace(0, len(items) - 1, count).round().astype(int)]


def _directions(record: PromptRecord, seed: int) -> Numbers:
    """The leading directions of a prompt, and random ones, as unit rows."""
    shown = record.V[: min(LEADING, int((record.S > 0).sum()))].astype(np.float64)
    random = np.random.default_rng(seed).standard_normal((RANDOM, record.V.shape[1]))
    return np.concatenate([shown, random / np.linalg.norm(random, axis=1, keepdims=True)])


def _steps(
    model: Any, record: PromptRecord, ids: Sequence[int], directions: Numbers, positions: str
) -> tuple[Numbers, Numbers, Numbers, Numbers]:
    along_F = np.stack([v @ record.matvec(v).astype(np.float64) for v in directions])
    eps = np.sqrt(2 * PREDICTED / np.maximum(along_F, np.finfo(np.float32).tiny)[:, None])
    steps = (eps[:, :, None] * directions[:, None]).reshape(-1, directions.shape[1])
    both = torch.from_numpy(np.concatenate([steps, -steps])).to(next(model.parameters()).dtype)
    place = next(model.parameters()).device
    kl = measured_kl(model, torch.tensor(ids, device=place), record.layer, both.to(place), positions).numpy()
    measured = kl.reshape(2, *eps.shape).mean(0)
    return np.broadcast_to(PREDICTED, eps.shape).copy(), measured, eps, np.full(len(eps), record.residual_norm)


def _joined(parts: Sequence[Directions]) -> Directions:
    return Directions(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))


def _spread(values: Numbers) -> str:
    low, median, high = np.quantile(values, [0.1, 0.5, 0.9])
    return f"{median:.3f} ({low:.2f} to {high:.2f})"
