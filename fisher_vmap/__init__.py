"""The Fisher geometry of a language model's residual stream, one low-rank matrix a prompt.

Letters, used as shape suffixes in the maths modules (`scores_BKD`):

    B  prompts in a batch       D  residual width               R  kept rank
    T  positions                V  vocabulary                   H  heads, E  head width
    K  cotangents (top-k tokens)                                L  hooked layers

Nothing heavy is imported before one of the names below is used.
"""

from typing import TYPE_CHECKING, Any

from fisher_vmap._version import __version__

if TYPE_CHECKING:
    from fisher_vmap.decomposition import LowRank, compress
    from fisher_vmap.errors import UserError
    from fisher_vmap.estimators import Estimate, fisher_full
    from fisher_vmap.fisher_model import FisherModel
    from fisher_vmap.kernel import fisher_scores
    from fisher_vmap.linearized import LinearizedNetwork
    from fisher_vmap.results import Results, open_results
    from fisher_vmap.scores import Scores
    from fisher_vmap.steering import steer

_HOMES = {
    "Estimate": "fisher_vmap.estimators",
    "FisherModel": "fisher_vmap.fisher_model",
    "LowRank": "fisher_vmap.decomposition",
    "Results": "fisher_vmap.results",
    "Scores": "fisher_vmap.scores",
    "UserError": "fisher_vmap.errors",
    "compress": "fisher_vmap.decomposition",
    "fisher_full": "fisher_vmap.estimators",
    "fisher_scores": "fisher_vmap.kernel",
    "LinearizedNetwork": "fisher_vmap.linearized",
    "open_results": "fisher_vmap.results",
    "steer": "fisher_vmap.steering",
}

__all__ = [
    "Estimate",
    "FisherModel",
    "LinearizedNetwork",
    "LowRank",
    "Results",
    "Scores",
    "UserError",
    "__version__",
    "compress",
    "fisher_full",
    "fisher_scores",
    "open_results",
    "steer",
]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
