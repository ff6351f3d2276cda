"""What reading one prompt gives: its row of the table, its arrays at one layer, and the small algebra on them."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fisher_vmap import algebra
from fisher_vmap.results.shard_reader import Float32


def was(status: str) -> str:
    """A prompt's status as the end of a sentence: it failed, it was skipped."""
    return f"was {status}" if status == "skipped" else status


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
    """Mean norm of the residual stream over the prompt's positions."""
    position_energy: Float32
    """[T] sum over tokens of p_t |g_t at that position|^2."""
    token_ids: NDArray[np.int64]
    """[K] the tokens, likeliest first; with `include_rest` one more, -1, any other token. All -1 without numbers."""
    log_probs: Float32
    """[K] their log-probabilities in nats."""
    row: dict[str, Any]
    """The prompt's row of prompts.parquet, with its text, status, reason, kept columns and the rest."""

    @property
    def U(self) -> Float32:
        """[D, R], V transposed, since F is symmetric. F = U @ np.diag(S) @ V."""
        return self.V.T

    @property
    def text(self) -> str | None:
        """The prompt, as far as it is stored."""
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
        """The K tokens as text, as far as the run stored them."""
        texts = self.row.get("top_tokens")
        return None if texts is None else tuple(texts)

    @property
    def prompt_tokens(self) -> tuple[str, ...] | None:
        """The prompt's T tokens as text, template and all, as far as the run stored them."""
        texts = self.row.get("prompt_tokens")
        return None if texts is None else tuple(texts)

    @property
    def mass(self) -> float:
        """The probability that the K tokens cover, sum exp(log p); NaN without numbers."""
        return float("nan") if self.row["mass"] is None else float(self.row["mass"])

    @property
    def trace(self) -> float:
        """Trace of F over all K tokens, at least the sum of S; NaN without numbers."""
        trace = self.row[f"{self.layer}/trace"]
        return float("nan") if trace is None else float(trace)

    @property
    def share_kept(self) -> float:
        """The share of the trace that the R stored directions hold."""
        return self._estimate("share_kept")

    @property
    def share_full(self) -> float:
        """The same of `trace_full`, the whole vocabulary's; NaN where that was not asked for."""
        return self._estimate("share_full")

    @property
    def trace_full(self) -> float:
        """Estimate of the trace of the whole vocabulary's Fisher matrix; NaN where none was asked for."""
        return self._estimate("trace_full")

    @property
    def trace_full_error(self) -> float:
        """The standard error of `trace_full`; NaN without it."""
        return self._estimate("trace_full_error")

    @property
    def relative_error(self) -> float:
        """Estimate of |F - matrix()| / |F| in the Frobenius norm, F of the whole vocabulary in the run's own precision.

        What rounding to that precision adds it does not see. NaN where none was asked for.
        """
        return self._estimate("relative_error")

    def _estimate(self, name: str) -> float:
        value = self.row.get(f"{self.layer}/{name}")
        return float("nan") if value is None else float(value)

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
        """How alike two prompts' matrices are, tr(F G) / (|F| |G|), from 0 to 1; `fisher_vmap.algebra` has more."""
        return algebra.cosine(self, other)

    def trades(self) -> Float32:
        """What a unit step along each direction does to each token: d log p_t = g_t . V_r, [K, R] float32, in nats.

        It is Q_tr sqrt(S_r / p_t), without the vectors.
        """
        root_p = np.exp(0.5 * self.log_probs.astype(np.float64))
        return np.asarray(self.Q * np.sqrt(self.S.astype(np.float64)) / root_p[:, None], np.float32)

    def scores(self) -> Float32:
        """The gradients of log p_t with respect to the bias, [K, D] float32: A / sqrt(p), A = Q diag(sqrt S) V.

        Of estimator topk, with R >= K or a rank below R, to rounding, except for tokens with p_t below about K times
        float32's eps (1e-6 for K = 10): what they add to F is below its numerical rank. Else the best approximation of
        A by rank R. Of estimator full: what the stored directions hold of the scores.
        """
        root_p = np.exp(0.5 * self.log_probs.astype(np.float64))
        A = (self.Q * np.sqrt(self.S.astype(np.float64))) @ self.V.astype(np.float64)
        return (A / root_p[:, None]).astype(np.float32)

    def __repr__(self) -> str:
        if self.status != "ok":
            return f"PromptRecord({self.index}, {self.layer!r}: {self.status}: {self.reason})"
        text = "" if self.text is None else f", {self.text[:40]!r}" + ("..." if len(self.text) > 40 else "")
        return f"PromptRecord({self.index}, {self.layer!r}: trace {self.trace:.4g}, S[0] {self.S[0]:.4g}{text})"
