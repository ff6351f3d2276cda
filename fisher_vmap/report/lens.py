"""The Jacobian lens on the page: the readouts that `fisher-vmap lens` keeps, a table for each prompt."""

from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple, Self

import jinja2
import numpy as np
from markupsafe import Markup
from pydantic import BaseModel, Field, ValidationError, model_validator

from fisher_vmap import __version__
from fisher_vmap.errors import UserError
from fisher_vmap.escape import script_json, short, visible
from fisher_vmap.results.files import replacing

READOUTS = "readouts.json"
TITLE = 120  # characters of a prompt above its table

Cell = list[tuple[str, float]]
"""Tokens with a value each, the first one shown."""


class StoredReadout(BaseModel):
    """What a lens reads of one prompt of T tokens.

    Attributes:
        text: the prompt; None: not known.
        tokens: [T], as text.
        layers: the numbers of the blocks.
        top: layer -> for each position the likeliest tokens, with log-probabilities in nats.
        kl: layer -> for each position the tokens with the largest shares of the KL divergence that a unit step along
            the lens's vector costs the model's output, with the shares, in nats; empty: not known.
        model: for each position the model's own likeliest tokens, with log-probabilities in nats.
    """

    text: str | None = None
    tokens: list[str] = Field(min_length=1)
    layers: list[int] = Field(min_length=1)
    top: dict[int, list[Cell]]
    kl: dict[int, list[Cell]] | None = None
    model: list[Cell]

    @model_validator(mode="after")
    def _of_one_prompt(self) -> Self:
        """Check that there is a row for each layer, and a cell for each token."""
        if missing := [layer for layer in self.layers if layer not in self.top]:
            raise ValueError(f"layer {missing[0]} is not in top")
        rows = [("the model", self.model)]
        rows += [(f"layer {layer}", row) for kept in (self.top, self.kl or {}) for layer, row in kept.items()]
        for name, row in rows:
            if len(row) != len(self.tokens):
                raise ValueError(f"{name} has {len(row)} positions of {len(self.tokens)}")
        return self


class _File(BaseModel):
    readouts: list[StoredReadout]


class LensSection(NamedTuple):
    """What the templates show.

    Attributes:
        data: JSON for the page's script.
        prompts: how many are stored.
        shown: how many of them are on the page.
        has_kl: some of them have the order by KL.
    """

    data: Markup
    prompts: int
    shown: int
    has_kl: bool


def read_readouts(path: Path) -> list[StoredReadout]:
    """Read the readouts of a lens.

    Args:
        path: the output folder of `fisher-vmap lens`, or the file in it.

    Raises:
        UserError: the file is missing, damaged, of something else, or holds no prompt.
    """
    path = path / READOUTS if path.is_dir() else path
    try:
        stored = path.read_bytes()
    except OSError as error:
        reason = "is missing" if isinstance(error, FileNotFoundError) else f"cannot be read ({error.strerror})"
        raise UserError(f"{path} {reason}; expected the {READOUTS} that `fisher-vmap lens` writes") from error
    try:
        found = _File.model_validate_json(stored).readouts
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(map(str, first["loc"])) or "the file"
        reason = visible(short(f"{place}: {first['msg']}", 160))
        raise UserError(
            f"{path} is damaged or of something else ({reason}); write it again by `fisher-vmap lens`"
        ) from error
    if not found:
        raise UserError(f"{path} holds no prompt; give `fisher-vmap lens` texts to read")
    return found


def lens_section(readouts: Sequence[StoredReadout], most: int) -> LensSection:
    """The section of the first `most` prompts."""
    shown, words = readouts[:most], dict[str, int]()
    prompts = [_prompt_data(readout, words) for readout in shown]
    return LensSection(
        Markup(script_json({"words": list(words), "prompts": prompts})),
        len(readouts),
        len(shown),
        any(prompt["kl"] for prompt in prompts),
    )


def _prompt_data(readout: StoredReadout, words: dict[str, int]) -> dict[str, Any]:
    """One prompt for the script: tokens by their place in `words`, which grows; the highest layer first."""

    def word(token: str) -> int:
        return words.setdefault(visible(token) or "∅", len(words))

    def row(cells: Sequence[Cell]) -> list[list[Any]]:
        return [[part for token, value in cell for part in (word(token), _number(value))] for cell in cells]

    layers = sorted(set(readout.layers), reverse=True)
    return {
        "text": short(visible(" ".join((readout.text or "".join(readout.tokens)).split())), TITLE),
        "tokens": [word(token) for token in readout.tokens],
        "layers": layers,
        "model": row(readout.model),
        "top": [row(readout.top[layer]) for layer in layers],
        "kl": [row(readout.kl.get(layer, [])) for layer in layers] if readout.kl else None,
    }


def _number(value: float) -> float | None:
    return float(f"{value:.4g}") if np.isfinite(value) else None


def template(name: str) -> jinja2.Template:
    """A template of this folder; what it is given is escaped."""
    loader = jinja2.FunctionLoader(asset)
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, loader=loader)
    return environment.get_template(name)


def asset(name: str) -> str:
    """The text of a file beside this one."""
    return (files("fisher_vmap.report") / name).read_text("utf-8")


def scripts(*names: str) -> Markup:
    """Files of the page's script, one after the other."""
    return Markup("".join(asset(name) for name in names))


def write_lens_page(path: Path, folder: Path, section: LensSection) -> int:
    """Write a page of the lens alone; returns its size in bytes.

    Raises:
        UserError: the file cannot be written.
    """
    name = visible(folder.resolve().name)
    text = template("lens_page.html.j2").render(
        title=f"What the lens in {name} reads",
        subtitle=name,
        heading="Lens report",
        lens=section,
        footer=f"Made by fisher_vmap {__version__}.",
        css=Markup(asset("page.css")),
        js=scripts("basics.js", "lens.js"),
    )
    with replacing(path) as file:
        file.write(text.encode())
    return len(text.encode())
