"""Predicted beside measured KL divergences, as text and as a plot."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from fisher_vmap.errors import UserError
from fisher_vmap.escape import visible

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
        several: whether the divergences are sums over several targets, with the same tokens given.
        fresh: [prompts, 3], of completions that were drawn: the predicted KL divergence of a step along the leading
            direction, that of whole sequences from completions drawn anew, and its standard error; None: not drawn.
    """

    layer: str
    leading: Directions
    random: Directions
    estimator: str
    precision: str
    share_full: float | None
    several: bool = False
    fresh: Numbers | None = None

    @property
    def ok(self) -> bool:
        """Whether predictions are not above the measurements and, of the whole vocabulary, not below them either.

        Drawn scores find the directions along which they happen to be large: of these the random directions count.
        """
        allowed = ALLOWED[self.precision]
        if self.estimator == "sampled":
            return bool(0.5 < np.median(self.random.ratio[:, 0]) < 2)
        median = float(np.median(self.leading.ratio[:, 0]))
        return median < 1 + allowed and (self.estimator == "topk" or median > 1 - allowed)

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
        if self.several:
            lines.append("     KL is the sum over the targets, with the same tokens given")
        if self.fresh is not None:
            predicted, measured = self.fresh[:, 0].sum(), self.fresh[:, 1].sum()
            error = predicted / measured**2 * float(np.sqrt((self.fresh[:, 2] ** 2).sum()))
            lines.append(
                f"     whole sequences, completions drawn anew: predicted / measured {predicted / measured:.3f} +- "
                f"{error:.3f} along leading directions, at {self.fresh[0, 0]:g} nats a prompt"
            )
        return [*lines, f"     {self._expected()}"]

    def _expected(self) -> str:
        allowed = f"{self.precision} gradients allow {ALLOWED[self.precision]:.0%}"
        if self.estimator == "sampled":
            return f"estimator sampled: along leading directions of few samples it is above 1, and {allowed}"
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
