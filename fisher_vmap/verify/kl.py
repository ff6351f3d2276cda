"""`verify DIR --kl`: do the stored matrices predict how steps of the residual stream change the next token?

For some prompts the model runs again, in float32, with steps +-eps v added at the hooked layer, for the leading stored
directions v and random ones. The measured KL divergence is compared with 1/2 eps^2 v^T F v, as text and as a plot.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fisher_vmap.data.files import spelt_as_path
from fisher_vmap.data.local_files import kind_of
from fisher_vmap.errors import UserError
from fisher_vmap.escape import visible
from fisher_vmap.fisher import check_inputs
from fisher_vmap.linearize.linear_map import undisturbed
from fisher_vmap.linearize.probe import layer_widths
from fisher_vmap.linearize.whole import rows_from_logits, with_biases
from fisher_vmap.load.model import Loaded
from fisher_vmap.model.layers import hooked, resolve_layers
from fisher_vmap.model.layout import lay_out
from fisher_vmap.model.precision import choose_precision
from fisher_vmap.model.validation import check_tensor
from fisher_vmap.model.wrappers import names_inside, unwrapped
from fisher_vmap.progress import bar, passing, step
from fisher_vmap.results.folder import plain_values
from fisher_vmap.results.reader import Results
from fisher_vmap.results.record import PromptRecord
from fisher_vmap.run.open import make_renderer, model_of, source_of
from fisher_vmap.run.settings import Settings

ROWS_AT_A_TIME = 1024  # tokens of the steps that go through the model together


def measured_kl(
    model: nn.Module,
    input_ids: Tensor,
    layer: str | int,
    steps: Tensor,
    positions: str | Tensor = "all",
    precision: str = "auto",
) -> Tensor:
    """KL(p_0 || p_step) of one prompt for each step added to the residual stream.

    To second order it is 1/2 step^T F step with the Fisher matrix F of the whole vocabulary. It is summed in float64 as
    sum_v p_v (e^d - 1 - d) with d = log p_step - log p_0: no term is negative, so that small values do not cancel.

    Args:
        model: a causal LM.
        input_ids: [T] int64, the prompt.
        layer: the hooked layer.
        steps: [N, D], the steps.
        positions: where they are added: "all", "last", or a mask [1, T].
        precision: as for `fisher_scores`; "float32" if small steps are to be seen.

    Returns:
        [N] float64, in nats.

    Raises:
        ValueError: an argument is not as described.
    """
    for argument, value, shape in (("input_ids", input_ids, "[T] int64"), ("steps", steps, "[N, D]")):
        check_tensor(argument, value, shape)
        if value.dim() != shape.count(",") + 1:
            raise ValueError(f"{argument} has shape {tuple(value.shape)}; expected {shape}, of one prompt")
    given, model = model, unwrapped(model)
    precision = choose_precision(model, precision).name
    T, prompt = len(input_ids), lay_out(input_ids[None], None, positions)
    with undisturbed(model, precision):
        (name,) = resolve_layers(model, names_inside(given, model, layer))
        check_inputs(model, prompt)
    if steps.shape[1] != (width := layer_widths(model, [name], precision)[name]):
        raise ValueError(f"steps has shape {tuple(steps.shape)}; expected [N, {width}], the width of {name}")
    mask_T = prompt.bias_mask()
    where_1T1 = (torch.ones(T) if mask_T is None else mask_T).to(input_ids.device)[None, :, None]

    def log_p(steps_nD: Tensor) -> Tensor:
        layout = lay_out(input_ids.expand(len(steps_nD), T), None)
        function = with_biases(rows_from_logits(model, layout, gather=True), modules)
        biases = steps_nD.to(input_ids.device)[:, None] * where_1T1.to(steps_nD.dtype)
        return function({name: biases}).double().log_softmax(1)

    with torch.no_grad(), undisturbed(model, precision):
        modules = hooked(model, [name])
        (origin_V,) = log_p(torch.zeros_like(steps[:1]))
        found = []
        for some in steps.split(max(1, ROWS_AT_A_TIME // T)):
            change_nV = log_p(some) - origin_V
            terms_nV = origin_V.exp() * (torch.expm1(change_nV) - change_nV)
            found.append(torch.where(origin_V > -torch.inf, terms_nV, 0).sum(1))  # a banned token stays banned
    return torch.cat(found).cpu()


# The KL divergences, in nats, that F predicts for the steps. Smaller ones drown in float32's rounding.
PREDICTED = np.array([1e-5, 1e-4, 1e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0])
# How far the median ratio of leading directions may be from 1, by the precision of the folder's gradients. On SmolLM2
# it was 1.00 in float32, 0.997 in mixed and 0.995 in bfloat16, where single directions were up to 5% off.
ALLOWED = {"float64": 0.01, "float32": 0.01, "mixed": 0.03, "float16": 0.05, "bfloat16": 0.1}

Numbers = NDArray[np.float64]


class Directions(NamedTuple):
    """The effect of steps along n directions: the leading ones of every prompt, or the random ones.

    Attributes:
        predicted: [n, E] nats, 1/2 eps^2 v^T F v.
        measured: [n, E] nats, the mean of +eps and -eps, whose odd terms cancel.
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
        share_full: median share of the whole vocabulary's trace that is stored, if it was estimated.
    """

    layer: str
    leading: Directions
    random: Directions
    estimator: str
    precision: str
    share_full: float | None

    @property
    def ok(self) -> bool:
        """Whether predictions are not above the measurements and, for estimator full, not below them either."""
        median, allowed = float(np.median(self.leading.ratio[:, 0])), ALLOWED[self.precision]
        return median < 1 + allowed and (self.estimator != "full" or median > 1 - allowed)

    def lines(self) -> list[str]:
        """The report of this layer."""
        outcome, layer = "ok  " if self.ok else "BAD ", visible(self.layer, spaces=False)
        lines = [
            f"{outcome} KL at {layer}: {len(self.leading.eps)} leading and {len(self.random.eps)} random directions; "
            "predicted / measured, median (10% to 90%):",
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
    # A name is no mathematics: matplotlib would read what stands between two dollar signs.
    axes.set_title(
        f"{visible(check.layer, spaces=False)}, estimator {check.estimator}, {check.precision}",
        fontsize="medium",
        parse_math=False,
    )
    axes.legend(frameon=False)
    try:
        figure.savefig(path, dpi=150)
    except (OSError, ValueError) as error:
        raise UserError(f"the plot cannot be written to {path}: {' '.join(str(error).split())}") from error


def _spread(values: Numbers) -> str:
    low, median, high = np.quantile(values, [0.1, 0.5, 0.9])
    return f"{median:.3f} ({low:.2f} to {high:.2f})"


LEADING, RANDOM = 3, 1  # directions of each prompt


def check_kl(
    results: Results,
    *,
    prompts: int = 8,
    layer: str | None = None,
    model_path: str | None = None,
    dataset_name: str | None = None,
) -> KlCheck:
    """Compare predicted and measured KL divergences for a few prompts of a results folder.

    Args:
        results: the folder, complete.
        prompts: how many prompts, spread evenly over those with results.
        layer: which hooked layer; None: the first.
        model_path: where the model is now; None: as in the folder's settings.
        dataset_name: where the prompts are now; None: as in the folder's settings.

    Raises:
        UserError: the model or the prompts cannot be read, or are not those of the folder.
    """
    results = results.at(layer or results.layer)
    settings = _settings(results, model_path=model_path, dataset_name=dataset_name)
    ok = [i for i, status in enumerate(results.table().column("status").to_pylist()) if status == "ok"]
    if not ok:
        raise UserError(f"{results.folder} has no prompt with results; there is nothing to compare")
    chosen = [ok[i] for i in np.linspace(0, len(ok) - 1, min(len(ok), prompts)).round().astype(int)]
    loaded = model_of(settings)
    if (now := plain_values(loaded.identity)) != (then := results.index.fingerprint.get("model")):
        raise UserError(f"the model at {settings.model_path} is not the folder's: {now} here, {then} there")
    with step("reading the prompts"):
        ids = _token_ids(results, settings, loaded, chosen)
    model = _widened(loaded, settings)
    leading, random = [], []
    with bar(len(chosen), "prompts", "running the model") as advance:
        for i in passing(chosen, advance):
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


def _settings(results: Results, **now: str | None) -> Settings:
    """The folder's settings, with new places.

    Raises:
        UserError: a file or folder is not where it was.
    """
    values: dict[str, Any] = results.metadata["settings"]
    known = {name: value for name, value in values.items() if name in Settings.model_fields}
    settings = Settings(**{**known, **{name: value for name, value in now.items() if value is not None}})
    for name, what in (("model_path", "model"), ("dataset_name", "prompts")):
        value = getattr(settings, name)
        if now[name] is None and _is_a_path(value) and not Path(value).expanduser().exists():
            raise UserError(
                f"{value}, where the {what} of {results.folder} came from, is not there (seen from {Path.cwd()}); "
                f"say with --{name} where it is now"
            )
    return settings


def _is_a_path(value: str) -> bool:
    """Whether a setting is a local path, not a name on the hub."""
    if Path(value).suffix == ".gguf":  # OWNER/NAME/FILE.gguf is on the hub
        return value.count("/") != 2 or spelt_as_path(value)
    return kind_of(Path(value)) is not None or spelt_as_path(value)


def _widened(loaded: Loaded, settings: Settings) -> Any:
    """The model in float32, which small steps need; float64 stays."""
    if settings.dtype == "float64":
        return loaded.model
    try:
        return loaded.model.float()
    except (ValueError, RuntimeError, NotImplementedError) as error:  # quantised or offloaded weights
        raise UserError(
            f"the model cannot be widened to float32 ({' '.join(str(error).split())[:120]}); --kl needs weights that "
            "are not quantised and fit on one device"
        ) from error


def _token_ids(results: Results, settings: Settings, loaded: Loaded, chosen: Sequence[int]) -> dict[int, list[int]]:
    """The token ids of the prompts, read and rendered again."""
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


def _directions(record: PromptRecord, seed: int) -> Numbers:
    """The leading directions of a prompt and random ones, as unit rows."""
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
