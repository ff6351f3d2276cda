"""The Fisher geometry of a language model's residual stream, one low-rank matrix a prompt.

Letters, used as shape suffixes in the maths modules (`scores_BKD`):

    B  prompts in a batch       D  residual width               R  kept rank
    T  positions                V  vocabulary                   H  heads, E  head width
    K  cotangents (top-k tokens)                                L  hooked layers

Nothing heavy is imported before one of the names below is used.
"""

import importlib
import sys
import types
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fisher_vmap.decomposition import LowRank as LowRank
    from fisher_vmap.decomposition import compress as compress
    from fisher_vmap.errors import UserError as UserError
    from fisher_vmap.estimators import Estimate as Estimate
    from fisher_vmap.fisher import fisher_scores as fisher_scores
    from fisher_vmap.fisher_model import FisherModel as FisherModel
    from fisher_vmap.full_matrix import fisher_full as fisher_full
    from fisher_vmap.full_matrix import fisher_sampled as fisher_sampled
    from fisher_vmap.lens.jacobian_lens import JacobianLens as JacobianLens
    from fisher_vmap.linearize.network import LinearizedNetwork as LinearizedNetwork
    from fisher_vmap.linearize.scores import Scores as Scores
    from fisher_vmap.load.model import load_model as load_model
    from fisher_vmap.natural import NaturalStep as NaturalStep
    from fisher_vmap.natural import natural_step as natural_step
    from fisher_vmap.results.reader import Results as Results
    from fisher_vmap.results.reader import open_results as open_results
    from fisher_vmap.steering import Step as Step
    from fisher_vmap.steering import steer as steer
    from fisher_vmap.verify.kl import measured_kl as measured_kl

__version__ = "0.1.0"

_HOMES = {
    "Estimate": "estimators",
    "FisherModel": "fisher_model",
    "JacobianLens": "lens.jacobian_lens",
    "LinearizedNetwork": "linearize.network",
    "LowRank": "decomposition",
    "NaturalStep": "natural",
    "Results": "results.reader",
    "Scores": "linearize.scores",
    "Step": "steering",
    "UserError": "errors",
    "compress": "decomposition",
    "fisher_full": "full_matrix",
    "fisher_sampled": "full_matrix",
    "fisher_scores": "fisher",
    "load_model": "load.model",
    "measured_kl": "verify.kl",
    "natural_step": "natural",
    "open_results": "results.reader",
    "steer": "steering",
}

__all__ = ["__version__", *_HOMES]


def _home(module: str, name: str) -> Any:
    return getattr(importlib.import_module(f"fisher_vmap.{module}"), name)


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return _home(_HOMES[name], name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])


class _Moved(types.ModuleType):
    """A module that earlier documentation names; what it held lives elsewhere."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _home({"models": "load.model", "verification.kl": "verify.kl"}[self.__name__.partition(".")[2]], name)


for _name in ("fisher_vmap.models", "fisher_vmap.verification.kl"):
    sys.modules[_name] = _Moved(_name)
