"""The records of a prompt: `PromptResult` as it is computed, `PromptRecord` as it is read, and numbers of both."""

import operator
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from math import nan
from pathlib import Path
from typing import Any, Literal, NamedTuple, SupportsIndex

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fisher_vmap import algebra
from fisher_vmap.errors import UserError, listed
from fisher_vmap.results.targets import RecordTargets, targets_of

RUN = 4  # from so many consecutive names on, `several` shows only the first and the last

_LAST_NUMBER = re.compile(r"^(.*?)(\d+)(\D*)$", re.DOTALL)


def natural(name: str) -> list[tuple[int, str]]:
    """A key that sorts 2 before 10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


def several(names: Iterable[str]) -> str:
    """Names on one line: the first and last of each run of consecutive numbers, and at most ten others."""
    runs: list[list[str]] = []
    for name in names:
        if runs and _follows(runs[-1][-1], name):
            runs[-1].append(name)
        else:
            runs.append([name])
    total = sum(map(len, runs))
    parts = [part for run in runs for part in ([f"{run[0]} ... {run[-1]}"] if len(run) >= RUN else run)]
    return listed(parts) + (f", {total} in all" if len(parts) < total else "")


def layer_named(wanted: str | SupportsIndex, layers: Sequence[str], folder: Path) -> str:
    """The name of a stored layer.

    Args:
        wanted: a name, or a block's number (digits too): 15 is the layer whose name ends in ".15".
        layers: the names that are stored.
        folder: the results folder, for the errors.

    Raises:
        UserError: no such layer, several, or a negative number.
    """
    if isinstance(wanted, str) and wanted in layers:
        return wanted
    there = f"there is {several(layers)}"
    try:
        number = int(wanted) if isinstance(wanted, str) else operator.index(wanted)
    except (TypeError, ValueError) as error:
        raise UserError(f"{wanted!r:.80} was not hooked in {folder}; {there}") from error
    if number < 0:
        raise UserError(f"layer {number} counts from the model's top, which a results folder does not know; {there}")
    found = [layer for layer in layers if layer.rpartition(".")[2] == str(number)]
    if len(found) > 1:
        raise UserError(f"layer {number} may be {' or '.join(found)}; give the name")
    if not found:
        raise UserError(f"layer {number} was not hooked in {folder}; {there}")
    return found[0]


def _follows(one: str, other: str) -> bool:
    a, b = _LAST_NUMBER.match(one), _LAST_NUMBER.match(other)
    return a is not None and b is not None and (a[1], a[3], int(a[2]) + 1) == (b[1], b[3], int(b[2]))


Status = Literal["ok", "failed", "skipped"]
Float32 = NDArray[np.float32]
FloatArray = NDArray[np.floating[Any]]

QUALITY = ("share_kept", "trace_full", "trace_full_error", "share_full", "relative_error")  # columns of `how_good`


class LayerResult(NamedTuple):
    """One prompt's low-rank Fisher matrix at one layer: F = V^T diag(S) V, and A = Q diag(sqrt S) V with F = A^T A."""

    S: FloatArray
    """[R] singular values of F, highest first, zero beyond the rank."""
    V: FloatArray
    """[R, D] orthonormal rows, zero beyond the rank."""
    Q: FloatArray
    """[K, R] how much of which token each direction carries."""
    residual_norm: float
    """Median norm of the residual stream over the prompt's real positions; of several completions, their mean."""
    position_energy: FloatArray
    """[T] sum over tokens of p_t |g_t at that position|^2, for the prompt's T real positions."""
    trace: float
    """Trace of F before it was cut to rank R; at least the sum of the kept S."""
    trace_full: float = nan
    """Estimate of the trace of the whole vocabulary's Fisher matrix; NaN if not estimated."""
    trace_full_error: float = nan
    """Its standard error."""
    relative_error: float = nan
    """Estimate of |F - V^T diag(S) V| / |F|, F of the whole vocabulary, in the Frobenius norm."""


@dataclass(frozen=True, kw_only=True, eq=False)
class PromptResult:
    """One prompt's results. A prompt that failed or was skipped has a reason and no numbers."""

    index: int
    """Its place in the run, from 0: the order of the prompts asked for."""
    source_row: int | None = None
    """Its row in the data set."""
    text: str | None = None
    kept: dict[str, Any] = field(default_factory=dict)
    """Values of the columns kept from the data set."""
    status: Status = "ok"
    reason: str | None = None
    num_tokens: int = 0
    truncated: bool = False
    audit: str | None = None
    """What the audit changed in how it was computed, and why; None: nothing."""
    token_ids: NDArray[np.integer[Any]] | None = None
    """[K] int64; with `include_rest` one more, -1, for any other token."""
    log_probs: FloatArray | None = None
    """[K] float32 nats, highest first."""
    layers: dict[str, LayerResult] = field(default_factory=dict)
    targets: dict[str, Any] = field(default_factory=dict)
    """Of several targets: the columns that describe them and the completions."""
    top_tokens: list[str] | None = None
    """The K tokens as text; a part of a character is its bytes, "<0xE4><0xB8>"."""
    prompt_tokens: list[str] | None = None
    """The prompt's tokens as text, those of the chat template included; stored only if the text is."""


class Stack(NamedTuple):
    """Prompts at one layer, stacked on dim 0, float32; NaN for prompts without numbers."""

    S: Float32
    """[n, R] singular values."""
    V: Float32
    """[n, R, D] their directions."""
    Q: Float32
    """[n, K, R] how much of which token each carries."""


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class PromptRecord:
    """One prompt at one layer. Its arrays are NaN if the prompt failed or was skipped: `status` and `reason` say why.

    F = V^T diag(S) V is the Fisher matrix, [D, D]; A = Q diag(sqrt S) V is its factor, [K, D], with F = A^T A. Units
    of F: nats^2 per squared unit of the residual stream.
    """

    index: int
    """Its place in the run, from 0."""
    layer: str
    """The hooked module's name."""
    S: Float32
    """[R] singular values of F, highest first, zero beyond the rank."""
    V: Float32
    """[R, D] orthonormal directions, zero beyond the rank; float32 also when stored as float16."""
    Q: Float32
    """[K, R] how much of which token each direction carries. Q diag(sqrt S) V has the rows sqrt(p_t) g_t."""
    residual_norm: float
    """Median norm of the residual stream over the prompt's positions; the mean in a folder that was begun with it."""
    position_energy: Float32
    """[T] sum over tokens of p_t |g_t at that position|^2."""
    token_ids: NDArray[np.int64]
    """[K] the tokens, likeliest first; with `include_rest` one more, -1, for any other. All -1 without numbers."""
    log_probs: Float32
    """[K] their log-probabilities in nats."""
    row: dict[str, Any]
    """The prompt's row of prompts.parquet: its text, status, reason, kept columns and so on."""

    @property
    def U(self) -> Float32:
        """[D, R], V transposed, since F is symmetric. F = U @ np.diag(S) @ V."""
        return self.V.T

    @property
    def text(self) -> str | None:
        """The prompt; None if the run did not store it."""
        return None if self.row["text"] is None else str(self.row["text"])

    @property
    def status(self) -> str:
        """One of "ok", "failed", "skipped"."""
        return str(self.row["status"])

    @property
    def reason(self) -> str | None:
        """Why there are no numbers, or None."""
        return None if self.row["reason"] is None else str(self.row["reason"])

    @property
    def top_tokens(self) -> tuple[str, ...] | None:
        """The K tokens as text, parts of characters as their bytes, "<0xE4><0xB8>"; None if they are not stored.

        Folders of before have U+FFFD for such parts; `token_ids` tells them apart.
        """
        texts = self.row.get("top_tokens")
        return None if texts is None else tuple(texts)

    @property
    def prompt_tokens(self) -> tuple[str, ...] | None:
        """The prompt's T tokens as text, those of the chat template included; None if the run did not store them.

        They join to the prompt's text: a character of several tokens stands at the last of them, the others are "".
        """
        texts = self.row.get("prompt_tokens")
        return None if texts is None else tuple(texts)

    @property
    def mass(self) -> float:
        """The probability that the K tokens cover, sum exp(log p); NaN without numbers, or with several targets."""
        return nan if self.row["mass"] is None else float(self.row["mass"])

    @property
    def targets(self) -> RecordTargets | None:
        """The targets, if the run asked for others than the last token; else None."""
        return targets_of(self.row, self.layer)

    @property
    def target_trace(self) -> FloatArray | None:
        """[n] the part of the trace that each target adds; None if the last token is the only one."""
        return None if self.targets is None else self.targets.trace

    @property
    def token_targets(self) -> NDArray[np.int64] | None:
        """[K] the number of the target, in `targets`, of each token in `token_ids`; None if there is only one."""
        found = self.row.get("token_targets")
        return None if found is None else np.array(found, np.int64)

    @property
    def completions(self) -> tuple[str, ...] | None:
        """The text of each completion; None without one."""
        found = self.row.get("completions")
        return None if found is None else tuple(found)

    @property
    def completion_ids(self) -> tuple[tuple[int, ...], ...] | None:
        """The token ids of each completion; None without one."""
        found = self.row.get("completion_ids")
        return None if found is None else tuple(tuple(ids) for ids in found)

    @property
    def trace_error(self) -> float:
        """The standard error of `trace`, over several completions or drawn scores; NaN where nothing was drawn."""
        return self._number("trace_error")

    def attribution(self) -> Float32:
        """How much the output hangs on each position, [T]: the trace of the position's own J^T C J, its Fisher scope.

        a_i = sum over targets and tokens of p_t |d log p_t / d x_i|^2, nats^2 per squared unit of the residual stream,
        for a bias at position i alone: a random step of length eps there causes a KL divergence of eps^2 a_i / 2D on
        average. It has no sign, and the positions do not add up to the trace of F. Zero where `bias_positions` adds no
        bias.

        Hook the embedding (`model.embed_tokens`) for a number of each token itself; above it, the residual stream at a
        position knows earlier tokens too. The entries belong to `prompt_tokens`, followed by the tokens of the
        completion if there is a single one. Estimator topk sums over its K tokens at each target, full over what its
        directions hold at the position: with several targets that is too little.
        """
        return self.position_energy

    @property
    def trace(self) -> float:
        """Trace of F over all K tokens, at least the sum of S; NaN without numbers."""
        return self._number("trace")

    @property
    def share_kept(self) -> float:
        """The share of the trace that the R stored directions hold."""
        return self._number("share_kept")

    @property
    def share_full(self) -> float:
        """The share of `trace_full` that the R stored directions hold; NaN if it was not estimated."""
        return self._number("share_full")

    @property
    def trace_full(self) -> float:
        """Estimate of the trace of the whole vocabulary's Fisher matrix; NaN if it was not estimated."""
        return self._number("trace_full")

    @property
    def trace_full_error(self) -> float:
        """The standard error of `trace_full`; NaN if it was not estimated."""
        return self._number("trace_full_error")

    @property
    def relative_error(self) -> float:
        """Estimate of |F - matrix()| / |F| in the Frobenius norm; NaN if it was not estimated.

        F is the whole vocabulary's matrix in the run's precision. Errors of that precision are not included.
        """
        return self._number("relative_error")

    def _number(self, name: str) -> float:
        value = self.row.get(f"{self.layer}/{name}")
        return nan if value is None else float(value)

    def matrix(self) -> Float32:
        """F = V^T diag(S) V, [D, D] float32."""
        return np.asarray((self.U * self.S) @ self.V, np.float32)

    def matvec(self, x: ArrayLike) -> Float32:
        """F x, without forming F: V^T (S * (V x)), summed in float64.

        Args:
            x: [D], or [D, n] for n vectors at once.

        Returns:
            Of x's shape, float32.
        """
        return algebra.matvec(self, x).astype(np.float32)

    def quadratic(self, v: ArrayLike) -> float:
        """v^T F v: 1/2 eps^2 of it is the KL divergence, in nats, that a small step eps v of the bias causes.

        Args:
            v: [D].
        """
        return float(algebra.quadratic(self, v))

    def cosine(self, other: Any) -> float:
        """The similarity of two prompts' matrices, tr(F G) / (|F| |G|), from 0 to 1; see also `fisher_vmap.algebra`."""
        return algebra.cosine(self, other)

    def trades(self) -> Float32:
        """How a unit step along each direction changes each token: d log p_t = g_t . V_r, [K, R] float32, in nats.

        It is computed as Q_tr sqrt(S_r / p_t), without the vectors.
        """
        root_p = np.exp(0.5 * self.log_probs.astype(np.float64))
        return np.asarray(self.Q * np.sqrt(self.S.astype(np.float64)) / root_p[:, None], np.float32)

    def scores(self) -> Float32:
        """The gradients of log p_t with respect to the bias, [K, D] float32: A / sqrt(p), A = Q diag(sqrt S) V.

        With estimator topk and R >= K, or a rank below R, they are exact to rounding, except for tokens with p_t below
        about K times float32's eps (1e-6 for K = 10), whose part of F is below its numerical rank. With a smaller R
        they come from the best approximation of A of rank R. With estimator full they are the scores' projection on
        the stored directions.
        """
        root_p = np.exp(0.5 * self.log_probs.astype(np.float64))
        A = (self.Q * np.sqrt(self.S.astype(np.float64))) @ self.V.astype(np.float64)
        return (A / root_p[:, None]).astype(np.float32)

    def __repr__(self) -> str:
        if self.status != "ok":
            return f"PromptRecord({self.index}, {self.layer!r}: {self.status}: {self.reason})"
        text = "" if self.text is None else f", {self.text[:40]!r}" + ("..." if len(self.text) > 40 else "")
        return f"PromptRecord({self.index}, {self.layer!r}: trace {self.trace:.4g}, S[0] {self.S[0]:.4g}{text})"


def was(status: str) -> str:
    """A prompt's status as the end of a sentence: it failed, it was skipped."""
    return f"was {status}" if status == "skipped" else status


def covered_mass(log_probs: FloatArray | None, token_ids: NDArray[np.integer[Any]] | None) -> float | None:
    """Total probability of the K tokens, sum exp(log p), without "any other token". None without numbers."""
    if log_probs is None or token_ids is None:
        return None
    rest = (np.asarray(token_ids) < 0) & np.isfinite(log_probs)
    return float(np.exp(np.asarray(log_probs, np.float64))[~rest].sum())


def top_probability(log_probs: FloatArray | None) -> float | None:
    """The probability of the likeliest next token; None without numbers."""
    return None if log_probs is None else float(np.exp(np.float64(log_probs[0])))


def how_good(result: LayerResult) -> dict[str, float | None]:
    """The accuracy of a layer's matrix, by column name; None for what was not estimated."""
    kept = float(np.asarray(result.S, np.float64).sum())
    values = {
        "share_kept": kept / result.trace if result.trace > 0 else np.nan,
        "trace_full": result.trace_full,
        "trace_full_error": result.trace_full_error,
        "share_full": kept / result.trace_full if result.trace_full > 0 else np.nan,
        "relative_error": result.relative_error,
    }
    return {name: float(value) if np.isfinite(value) else None for name, value in values.items()}


def effective_rank(S: FloatArray) -> float:
    """Effective number of directions: exp of the entropy of S [R], normalised to sum to 1; 0 for a zero matrix.

    It is R if all S are equal, and 1 if only one is not zero. [Roy and Vetterli, EUSIPCO 2007]
    """
    S = np.asarray(S, np.float64)
    share = S[S > 0] / S.sum()
    return float(np.exp(-(share * np.log(share)).sum())) if share.size else 0.0
