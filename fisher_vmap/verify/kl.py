"""`verify DIR --kl`: do the stored matrices predict how steps of the residual stream change the next token?

For some prompts the model runs again, in float32, with steps +-eps v added at the hooked layer, for the leading stored
directions v and random ones. The measured KL divergence is compared with 1/2 eps^2 v^T F v, as text and as a plot.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fisher_vmap.completions import Completions
from fisher_vmap.data.files import spelt_as_path
from fisher_vmap.data.local_files import kind_of
from fisher_vmap.data.sequences import Tokens
from fisher_vmap.errors import UserError
from fisher_vmap.fisher import check_inputs
from fisher_vmap.linearize.linear_map import undisturbed
from fisher_vmap.linearize.probe import layer_widths
from fisher_vmap.linearize.whole import rows_from_logits, with_biases
from fisher_vmap.load.model import Loaded
from fisher_vmap.model.layers import hooked, resolve_layers
from fisher_vmap.model.layout import lay_out
from fisher_vmap.model.precision import choose_precision
from fisher_vmap.model.targets import most_targets
from fisher_vmap.model.validation import check_tensor
from fisher_vmap.model.wrappers import names_inside, unwrapped
from fisher_vmap.objective import divergence
from fisher_vmap.progress import bar, passing, step
from fisher_vmap.results.folder import plain_values
from fisher_vmap.results.reader import Results
from fisher_vmap.results.record import PromptRecord
from fisher_vmap.run.open import make_renderer, model_of, source_of
from fisher_vmap.run.settings import Settings
from fisher_vmap.verify.kl_report import PREDICTED, Directions, KlCheck, Numbers

ROWS_AT_A_TIME = 1024  # tokens of the steps that go through the model together


def measured_kl(
    model: nn.Module,
    input_ids: Tensor,
    layer: str | int,
    steps: Tensor,
    positions: str | Tensor = "all",
    precision: str = "auto",
    targets: str | Tensor = "last",
) -> Tensor:
    """KL(p_0 || p_step) of one prompt for each step added to the residual stream, summed over its targets.

    To second order it is 1/2 step^T F step with the Fisher matrix F of the whole vocabulary. It is summed in float64 as
    sum_v p_v (e^d - 1 - d) with d = log p_step - log p_0: no term is negative, so that small values do not cancel.
    Each target's distribution with the step is compared with the one without it after the same tokens, those of
    `input_ids`: nothing is generated.

    Args:
        model: a causal LM.
        input_ids: [T] int64, the prompt.
        layer: the hooked layer.
        steps: [N, D], the steps.
        positions: where they are added: "all", "last", or a mask [1, T].
        precision: as for `fisher_scores`; "float32" if small steps are to be seen.
        targets: the positions whose next-token distribution is read: "last", "all", or a mask [1, T].

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
    T, prompt = len(input_ids), lay_out(input_ids[None], None, positions, targets)
    with undisturbed(model, precision):
        (name,) = resolve_layers(model, names_inside(given, model, layer))
        check_inputs(model, prompt)
    if steps.shape[1] != (width := layer_widths(model, [name], precision)[name]):
        raise ValueError(f"steps has shape {tuple(steps.shape)}; expected [N, {width}], the width of {name}")
    mask_T = prompt.bias_mask()
    where_1T1 = (torch.ones(T) if mask_T is None else mask_T).to(input_ids.device)[None, :, None]

    def log_p(steps_nD: Tensor) -> Tensor:
        n = len(steps_nD)
        layout = lay_out(input_ids.expand(n, T), None)._replace(targets=prompt.targets and prompt.targets * n)
        function = with_biases(rows_from_logits(model, layout, gather=True), modules)
        biases = steps_nD.to(input_ids.device)[:, None] * where_1T1.to(steps_nD.dtype)
        return function({name: biases}).double().log_softmax(1).view(n, most_targets(prompt), -1)

    with torch.no_grad(), undisturbed(model, precision):
        modules = hooked(model, [name])
        (origin_mV,) = log_p(torch.zeros_like(steps[:1]))
        found = []
        for some in steps.split(max(1, ROWS_AT_A_TIME // T)):
            found.append(divergence(origin_mV, log_p(some)).sum(1))
    return torch.cat(found).cpu()


LEADING, RANDOM = 3, 1  # directions of each prompt
FRESH, FRESH_STEP = 16, 3  # completions drawn anew for each prompt, and which of PREDICTED their step is of


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
        sequences = _sequences(results, settings, loaded, chosen)
    model = _widened(loaded, settings)
    leading, random, fresh = [], [], []
    with bar(len(chosen), "prompts", "running the model") as advance:
        for i in passing(chosen, advance):
            record = results[i]
            shown = _directions(record, i)
            found = _steps(model, record, sequences[i], shown, settings)
            split = len(shown) - RANDOM
            leading.append(Directions(*(x[:split] for x in found)))
            random.append(Directions(*(x[split:] for x in found)))
            if _draws_from_the_model(settings):
                fresh.append(_fresh(model, record, sequences[i][0], shown[:1], settings))
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
        settings.targets != "last",
        np.array(fresh) if fresh else None,
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


def _sequences(results: Results, settings: Settings, loaded: Loaded, chosen: Sequence[int]) -> dict[int, list[Tokens]]:
    """The sequences of the prompts, read and rendered again, with the completions that were stored."""
    source = source_of(settings.model_copy(update={"num_prompts": max(chosen) + 1}))
    date = (results.index.resolved or {}).get("template_date")
    renderer = make_renderer(settings, loaded, source, date)
    found: dict[int, list[Tokens]] = {}
    for prompt in source:
        if prompt.index in chosen:
            if prompt.messages_or_text is None:
                raise UserError(
                    f"prompt {prompt.index} of {settings.dataset_name} is not the folder's: it is empty now"
                )
            rendered, record = renderer.render(prompt.messages_or_text, prompt.completion), results[prompt.index]
            own, row = rendered.ids[: rendered.start], record.row
            if len(own) != row["tokens"] or row["text"] not in (None, rendered.text):
                raise UserError(
                    f"prompt {prompt.index} of {settings.dataset_name} is not the folder's: it has {len(own)} "
                    f"tokens now, {row['tokens']} then; the data set has changed"
                )
            completions = record.completion_ids or ((),)
            found[prompt.index] = [Tokens([*own, *ids], len(own) if ids else None) for ids in completions]
    if missing := set(chosen) - set(found):
        raise UserError(f"{settings.dataset_name} has no prompt {min(missing)} any more; the data set has changed")
    return found


def _directions(record: PromptRecord, seed: int) -> Numbers:
    """The leading directions of a prompt and random ones, as unit rows."""
    shown = record.V[: min(LEADING, int((record.S > 0).sum()))].astype(np.float64)
    random = np.random.default_rng(seed).standard_normal((RANDOM, record.V.shape[1]))
    return np.concatenate([shown, random / np.linalg.norm(random, axis=1, keepdims=True)])


def _steps(
    model: Any, record: PromptRecord, sequences: Sequence[Tokens], directions: Numbers, settings: Settings
) -> tuple[Numbers, Numbers, Numbers, Numbers]:
    along_F = np.stack([v @ record.matvec(v).astype(np.float64) for v in directions])
    eps = np.sqrt(2 * PREDICTED / np.maximum(along_F, np.finfo(np.float32).tiny)[:, None])
    kl = np.mean([_measured(model, record, one, directions, eps, settings) for one in sequences], 0)
    return np.broadcast_to(PREDICTED, eps.shape).copy(), kl, eps, np.full(len(eps), record.residual_norm)


def _measured(
    model: Any, record: PromptRecord, one: Tokens, directions: Numbers, eps: Numbers, settings: Settings
) -> Numbers:
    """[n, E] nats: the mean of steps of +eps and -eps along each direction, of one sequence."""
    steps = (eps[:, :, None] * directions[:, None]).reshape(-1, directions.shape[1])
    both = torch.from_numpy(np.concatenate([steps, -steps])).to(next(model.parameters()).dtype)
    place, T = next(model.parameters()).device, len(one.ids)

    def where(asked: str | int, part: str, words: tuple[str, ...]) -> str | Tensor:
        return str(asked) if asked in words else torch.tensor([one.mask(T, part)], device=place)

    positions = where(settings.bias_positions, settings.bias_positions, ("all", "last"))
    targets = where(settings.targets, "targets", ("all", "last"))
    ids = torch.tensor(one.ids, device=place)
    kl = measured_kl(model, ids, record.layer, both.to(place), positions, targets=targets).numpy()
    measured: Numbers = kl.reshape(2, *eps.shape).mean(0)
    return measured


def _draws_from_the_model(settings: Settings) -> bool:
    """Whether the matrices are of sequences that were drawn from the model's own distribution."""
    drawn = 1.0 if settings.temperature is None and settings.samples > 1 else settings.temperature
    return isinstance(settings.targets, int) and drawn == 1.0


def _fresh(model: Any, record: PromptRecord, one: Tokens, direction_1D: Numbers, settings: Settings) -> list[float]:
    """Predicted nats, the KL divergence of whole sequences along the leading direction, and its standard error.

    The KL of sequences is the mean, over sequences drawn from the model, of the sum over their positions: here of
    completions drawn anew, which the matrix has not seen.
    """
    prompt, N = one.ids[: one.start], int(settings.targets)
    drawn = Completions(N, FRESH, 1.0, settings.completion_seed + 1).write(model, [prompt])[0]
    predicted = PREDICTED[FRESH_STEP : FRESH_STEP + 1]
    eps = np.sqrt(2 * predicted / np.maximum(record.quadratic(direction_1D[0]), np.finfo(np.float32).tiny))[None]
    kl = [
        float(_measured(model, record, Tokens(prompt).completed(ids), direction_1D, eps, settings)[0, 0])
        for ids in drawn
    ]
    return [float(predicted[0]), float(np.mean(kl)), float(np.std(kl, ddof=1) / len(kl) ** 0.5)]


def _joined(parts: Sequence[Directions]) -> Directions:
    return Directions(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))
