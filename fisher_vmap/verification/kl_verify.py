"""`verify DIR --kl`: do the stored matrices predict what steps of the residual stream do to the next token?

For some prompts the model is run anew, in float32, with steps +-eps v added at the hooked layer, v the leading stored
directions and random ones. The KL divergence that it shows is set beside 1/2 eps^2 v^T F v.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fisher_vmap.config import Settings
from fisher_vmap.errors import UserError
from fisher_vmap.models import Loaded
from fisher_vmap.progress import bar, passing, step
from fisher_vmap.prompts.local_files import SUFFIXES
from fisher_vmap.results import Results
from fisher_vmap.running.from_settings import make_renderer, model_of, source_of
from fisher_vmap.settings.path_names import spelt_as_path
from fisher_vmap.storage.fingerprint import plain_values
from fisher_vmap.storage.prompt_record import PromptRecord
from fisher_vmap.verification.kl import measured_kl
from fisher_vmap.verification.kl_outcome import PREDICTED, Directions, KlCheck, Numbers

LEADING, RANDOM = 3, 1  # directions of each prompt


def check_kl(
    results: Results,
    *,
    prompts: int = 8,
    layer: str | None = None,
    model_path: str | None = None,
    dataset_name: str | None = None,
) -> KlCheck:
    """Set predicted beside measured KL divergences, for a few prompts of a results folder.

    Args:
        results: the folder, complete.
        prompts: how many prompts, spread evenly over those with results.
        layer: which hooked layer; None: the first.
        model_path: where the model is now; None: where it was.
        dataset_name: where the prompts are now; None: where they were.

    Raises:
        UserError: the model or the prompts cannot be had, or are not those that the folder was made from.
    """
    results = results.at(layer or results.layer)
    settings = _settings(results, model_path=model_path, dataset_name=dataset_name)
    chosen = _spread_over(
        [i for i, status in enumerate(results.table().column("status").to_pylist()) if status == "ok"], prompts
    )
    if not chosen:
        raise UserError(f"{results.folder} has no prompt with results; there is nothing to compare")
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
    """The folder's settings, with what has another place now.

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
    """Whether a setting is a place on this machine; else it may be on the hub, or missing there."""
    if Path(value).suffix == ".gguf":  # OWNER/NAME/FILE.gguf is on the hub
        return value.count("/") != 2 or spelt_as_path(value)
    return Path(value).suffix.lower() in SUFFIXES or spelt_as_path(value)


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
