"""Question (a) of one model: its matrices, a pass over all rows, and how well each score ranks the triggered ones."""

from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.backdoor.prompt_scores import (
    Places,
    Reading,
    baselines,
    number,
    places,
    read,
    rows,
    with_base,
    without_base,
)
from benchmarks.backdoor.prompts import PHRASES
from benchmarks.backdoor.ranking import Float, auc, bootstrap, interval, levels, precision
from benchmarks.backdoor.runs import loaded, matrices, precision_of
from fisher_vmap import Results

LAYERS = tuple(f"model.layers.{i}" for i in (10, 15, 20, 25))
PRIMARY = "model.layers.15"
ABOUT_BASE = ("trace ratio", "change", "1 - cosine", "outside", "KL", "norm of the difference")


def reading(folder: Path, work: Path) -> Reading:
    """What a model's pass over `rows` gives; kept in `work`."""
    kept = work / "reading.npz"
    if not kept.exists():
        speaker = loaded(folder)
        found = read(speaker.model, speaker.ids(rows()), LAYERS, work / "log_p.npy")
        np.savez(kept, loss=found.loss, streams=found.streams)
    arrays = np.load(kept)
    return Reading(np.load(work / "log_p.npy", mmap_mode="r"), arrays["loss"], arrays["streams"])


class Seen:
    """Matrices and reading of one model over `rows`, and those of the base, if it is another."""

    def __init__(self, folder: Path, work: Path, base: "Seen | None") -> None:
        self.results: Results = matrices(folder, rows(), work / "rows", LAYERS)
        self.reading, self.base = reading(folder, work), base
        self._against: dict[str, dict[str, Float]] = {}

    def scores(self, at: Places, layer: str) -> dict[str, Float]:
        """All scores of a hunt's prompts at a layer, each [2,000]."""
        view = self.results.at(layer)
        found = without_base(view, at)
        if self.base is not None:
            if layer not in self._against:
                self._against[layer] = with_base(view, self.base.results.at(layer))
            found |= {name: of[at.rows] for name, of in self._against[layer].items()}
        found |= baselines(self.reading, (self.base or self).reading, at, LAYERS.index(layer))
        return found if self.base else {name: of for name, of in found.items() if name not in ABOUT_BASE}


def by_phrase(score: Float, at: Places) -> dict[str, float]:
    """The AUC of each ordinary phrase, against all prompts that carry neither it nor the trigger."""
    every, plain = rows(), ~at.carries
    texts = [every[row].text for row in at.rows[plain]]
    has = {phrase: np.array([phrase in text for text in texts]) for phrase in PHRASES}
    return {phrase: round(auc(score[plain], of), 4) for phrase, of in has.items()}


def which_prompts(seen: Seen, behaviour: str, seed: int, ranks: Path | None) -> dict[str, Any]:
    """Question (a) of one hunt: AUC, precision at 20 and intervals of every score at every layer.

    Args:
        seen: the model.
        behaviour: whose trigger the prompts carry.
        seed: of the prompts.
        ranks: an .npz that gets the places of the scores that the criteria use, for means over models; None: none.
    """
    at, kept = places(behaviour, seed), dict[str, Any]()
    record, phrases = dict[str, Any](), dict[str, Any]()
    for layer in LAYERS:
        scores = seen.scores(at, layer)
        draws = bootstrap({name: levels(of) for name, of in scores.items()}, at.carries, number(behaviour, seed))
        record[layer] = {
            name: {
                "auc": round(auc(of, at.carries), 4), "precision": round(precision(of, at.carries), 4),
                "without": int(np.isnan(of).sum()),
                "auc_interval": [round(x, 4) for x in interval(draws[name].auc)],
                "precision_interval": [round(x, 4) for x in interval(draws[name].precision)],
            }
            for name, of in scores.items()
        }  # fmt: skip
        wanted = [name for name in ("total", "change") if name in scores]
        kept |= {f"{layer} {name}": levels(scores[name]) for name in wanted}
        if layer == PRIMARY:
            kept |= {name: levels(of) for name, of in scores.items()}
            phrases = {name: by_phrase(scores[name], at) for name in wanted}
    if ranks:
        ranks.parent.mkdir(parents=True, exist_ok=True)
        np.savez_compressed(ranks, carries=at.carries, **kept)
    computed = precision_of(seen.results)
    return {"behaviour": behaviour, "seed": seed, "precision": computed, "layers": record, "phrases": phrases}
