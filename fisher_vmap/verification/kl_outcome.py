"""What `verify DIR --kl` found: predicted beside measured KL divergences, whether they agree, as text and as a plot."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from fisher_vmap.errors import UserError

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


def _spread(values: Numbers) -> str:
    low, median, high = np.quantile(values, [0.1, 0.5, 0.9])
    return f"{median:.3f} ({low:.2f} to {high:.2f})"
