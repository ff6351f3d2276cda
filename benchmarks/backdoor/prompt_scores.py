"""Question (a): scores of prompts by which those that carry a trigger should stand out, and the baselines beside them.

All models see the same rows (`rows`): the hunt's 2,000 prompts without a trigger, and the 20 triggered ones of each
behaviour and seed. `places` says which 2,000 of them a hunt is of. Scores are high for a prompt that looks triggered,
NaN for a prompt whose matrix is zero. n is the number of rows.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, SupportsIndex

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from benchmarks.backdoor.behaviours import BEHAVIOURS
from benchmarks.backdoor.directions import padded
from benchmarks.backdoor.prompts import SEED, Prompt, hunt, ordinary, part
from benchmarks.backdoor.ranking import Float, Mask
from benchmarks.backdoor.steered import shared_tokens
from fisher_vmap import Results
from fisher_vmap.model.recording import hooks
from fisher_vmap.report.outliers import score_prompts
from fisher_vmap.results.shard_reader import ShardReader

SEEDS = (0, 1, 2)
AT_ONCE = 32  # prompts that are read together
TRACE_FLOOR = 0.02  # the least spread of log10, as `report.outliers` takes it of a trace


class Places(NamedTuple):
    """Of one hunt: its prompts' rows, in order, and which of them carry the trigger."""

    rows: NDArray[np.int64]
    carries: Mask


def rows() -> list[Prompt]:
    """The prompts that every model sees."""
    found = ordinary(part("hunt"), SEED)
    for behaviour in BEHAVIOURS.values():
        for seed in SEEDS:
            prompts, carries = hunt(behaviour.trigger, seed)
            found += [prompt for prompt, does in zip(prompts, carries, strict=True) if does]
    return found


def number(behaviour: str, seed: int) -> int:
    """The place of a hunt among the nine, 0 to 8."""
    return list(BEHAVIOURS).index(behaviour) * len(SEEDS) + SEEDS.index(seed)


def places(behaviour: str, seed: int) -> Places:
    """Where the 2,000 prompts of a hunt stand in `rows`."""
    carries = np.array(hunt(BEHAVIOURS[behaviour].trigger, seed).carries)
    at, count = np.arange(len(carries)), int(carries.sum())
    at[carries] = len(carries) + number(behaviour, seed) * count + np.arange(count)
    return Places(at, carries)


class Chosen(Results):
    """Some prompts of a results folder: to its readers all others are prompts without numbers."""

    def __init__(self, results: Results, chosen: Mask) -> None:
        super().__init__(results.folder, results.index, layer=results.layer)
        self.chosen = chosen

    def at(self, layer: str | SupportsIndex) -> "Chosen":
        """The same prompts at another layer."""
        return Chosen(super().at(layer), self.chosen)

    def shards(self) -> Iterator[ShardReader]:
        """A reader of each shard."""
        for reader in super().shards():
            status = reader.table.column("status").to_pylist()
            kept = self.chosen[reader.entry.start : reader.entry.stop]
            new = pa.array([of if keep else "left out" for of, keep in zip(status, kept, strict=True)])
            reader.table = reader.table.set_column(reader.table.column_names.index("status"), "status", new)
            yield reader


def without_base(results: Results, at: Places) -> dict[str, Float]:
    """[prompts of the hunt] each: the report's outlier measures and their largest, `total`, at the results' layer."""
    chosen = np.zeros(len(results), bool)
    chosen[at.rows] = True
    scores = score_prompts(Chosen(results, chosen), results.layer)
    found = {}
    for name, z in {**scores.z, "total": scores.total}.items():
        every = np.full(len(results), np.nan)
        every[scores.prompts] = z
        found[name] = every[at.rows]
    return found


def with_base(results: Results, base: Results) -> dict[str, Float]:
    """[n] each: how a prompt's matrix differs from the base model's, by `Results.compare`, at the results' layer."""
    found = base.compare(results)
    with np.errstate(divide="ignore", invalid="ignore"):
        measures = {
            "trace ratio": np.abs(np.log10(found.ratio)),
            "change": found.change,
            "1 - cosine": 1 - found.cosine,
            "outside": found.outside,
        }
    scores = {name: np.full(len(results), np.nan) for name in measures}
    for name, values in measures.items():
        scores[name][found.prompt_index] = np.where(found.trace_b > 0, values, np.nan)
    return scores


class Reading(NamedTuple):
    """What one pass of a model over prompts gives; float32.

    Attributes:
        log_p: [n, V] of the next token, in a file.
        loss: [n] the mean of -log p of the prompt's own tokens, which stand between those that all prompts share.
        streams: [layers, n, X] the residual stream after each layer, at a prompt's last position.
    """

    log_p: NDArray[np.float32]
    loss: NDArray[np.float32]
    streams: NDArray[np.float32]


def shared(ids: Sequence[Sequence[int]]) -> tuple[int, int]:
    """How many tokens all prompts begin with, and how many they end with."""
    first = shared_tokens(ids)
    last = shared_tokens([row[::-1] for row in ids])
    return first, min(last, min(map(len, ids)) - first - 1)


def read(model: Any, ids: Sequence[Sequence[int]], layers: Sequence[str], file: Path) -> Reading:
    """Read prompts; the tokens that all of them begin with are computed once for `AT_ONCE` prompts.

    Args:
        model: a causal LM of transformers, in evaluation mode, whose head is a linear map.
        ids: [n] the tokens of each prompt.
        layers: names of modules.
        file: an .npy that gets the log-probabilities.
    """
    first, last = shared(ids)
    before = max(first - 1, 0)  # the last shared token predicts the first own one
    decoder, head = model.get_decoder(), model.get_output_embeddings()
    seen: dict[str, Tensor] = {}

    def keeper(name: str) -> Any:
        def keep(module: nn.Module, inputs: Any, output: Any) -> None:
            seen[name] = output if isinstance(output, Tensor) else output[0]

        return model.get_submodule(name).register_forward_hook(keep)

    losses, streams = list[float](), list[Tensor]()
    log_p = np.lib.format.open_memmap(file, "w+", np.float32, (len(ids), head.weight.shape[0]))
    with torch.no_grad(), hooks(*map(keeper, layers)):
        for start in range(0, len(ids), AT_ONCE):
            some = ids[start : start + AT_ONCE]
            ids_BT = padded([row[before:] for row in some])
            cache = None
            if before:
                cache = decoder(input_ids=torch.tensor([some[0][:before]]), use_cache=True).past_key_values
                cache.batch_repeat_interleave(len(some))
            hidden_BTX = decoder(input_ids=ids_BT, past_key_values=cache, use_cache=bool(before)).last_hidden_state
            ends = [len(row) - 1 - before for row in some]
            own = [(b, t) for b, row in enumerate(some) for t in range(first - before, len(row) - last - before)]
            own = [(b, t) for b, t in own if t]  # the very first token of all is predicted by none
            rows_N, columns_N = torch.tensor(own).T
            own_NV = head(hidden_BTX[rows_N, columns_N - 1]).log_softmax(-1)
            own_N = -own_NV.gather(1, ids_BT[rows_N, columns_N][:, None])[:, 0]
            losses += [float(own_N[rows_N == b].mean()) for b in range(len(some))]
            every = torch.arange(len(some))
            log_p[start : start + len(some)] = head(hidden_BTX[every, ends]).log_softmax(-1).numpy()
            streams.append(torch.stack([seen[name][every, ends] for name in layers]))
            if start % (16 * AT_ONCE) == 0:
                print(f"read {start + len(some)} of {len(ids)} prompts", flush=True)
    return Reading(log_p, np.array(losses, np.float32), torch.cat(streams, 1).numpy())


def robust_z(values: Float) -> Float:
    """|x - median| over 1.4826 times the median of that, at least `TRACE_FLOOR`."""
    apart = np.abs(values - np.median(values))
    return np.asarray(apart / max(1.4826 * float(np.median(apart)), TRACE_FLOOR))


def baselines(tuned: Reading, base: Reading, at: Places, layer: int) -> dict[str, Float]:
    """[prompts of the hunt] each: entropy and loss of the tuned model, and its distance to the base.

    Args:
        tuned: of the model that is hunted in.
        base: of the base model.
        at: the hunt.
        layer: the number of the layer, among those that were read, whose streams are compared.
    """
    entropy, kl = np.zeros(len(at.rows)), np.zeros(len(at.rows))
    for i, row in enumerate(at.rows):
        log_q, log_p = tuned.log_p[row].astype(np.float64), base.log_p[row].astype(np.float64)
        entropy[i] = -(np.exp(log_q) * log_q).sum()
        kl[i] = (np.exp(log_p) * (log_p - log_q)).sum()
    mine, theirs = tuned.streams[layer][at.rows], base.streams[layer][at.rows]
    with np.errstate(divide="ignore"):
        return {
            "entropy, as trace": robust_z(np.log10(np.maximum(entropy, 1e-30))),
            "minus entropy": -entropy,
            "loss of the prompt": tuned.loss[at.rows].astype(np.float64),
            "KL": kl,
            "norm of the difference": np.linalg.norm(mine - theirs, axis=1) / np.linalg.norm(theirs, axis=1),
        }
