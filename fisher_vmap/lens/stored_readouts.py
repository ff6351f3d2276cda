"""Readouts of texts that are kept beside a lens, in readouts.json, for the report and for other programs."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from fisher_vmap.errors import UserError
from fisher_vmap.escape import visible
from fisher_vmap.fisher_model import FisherModel
from fisher_vmap.lens.flags import LensSettings
from fisher_vmap.lens.folder import READOUTS
from fisher_vmap.lens.jacobian_lens import JacobianLens
from fisher_vmap.load.model import Loaded
from fisher_vmap.progress import step
from fisher_vmap.results.files import replacing
from fisher_vmap.run.open import make_renderer

TOP = 8  # tokens kept of each layer and position


def read_texts(settings: LensSettings, lens: JacobianLens, texts: Sequence[str], loaded: Loaded) -> Iterator[str]:
    """Read texts with a lens and keep what it reads; yields lines to print: what each layer reads at the last position.

    Raises:
        UserError: a text has no tokens, or the file cannot be written.
    """
    renderer = make_renderer(settings, loaded, None, None)
    fisher = FisherModel(
        loaded.model,
        loaded.tokenizer,
        layers=lens.layers,
        precision=loaded.precision.name,
        renderer=renderer,
    )
    found: list[dict[str, Any]] = []
    for text in texts:
        try:
            rendered = renderer.render(text)
            ids = rendered.ids
            with step("reading"):
                by_logit = lens.readout(fisher, ids, top_k=TOP)
                by_kl = lens.readout(fisher, ids, top_k=TOP, order="kl")
        except ValueError as error:
            raise UserError(f"{text[:40]!r} cannot be read: {error}") from error
        read = rendered.text if rendered.truncated else text
        one = by_logit.as_json(loaded.tokenizer) | {"text": read, "kl": by_kl.as_json(loaded.tokenizer)["kl"]}
        found.append(one)
        yield ""
        cut = f" (cut to max_length, {settings.max_length} tokens)" if rendered.truncated else ""
        yield f"after {visible(read[-60:])!r}{cut}, the likeliest by each layer:"
        for layer in one["layers"]:
            yield f"{layer:>6}  {_tokens(one['top'][str(layer)][-1])}"
        yield f"{'model':>6}  {_tokens(one['model'][-1])}"
    path = Path(settings.output_dir, READOUTS)
    with replacing(path) as file:
        file.write((json.dumps({"readouts": found}, ensure_ascii=False) + "\n").encode())
    yield f"kept in {path}"


def _tokens(top: Sequence[Sequence[Any]]) -> str:
    return "  ".join(repr(visible(str(token))) for token, _ in top[:5])
