"""Write docs/architectures.md: what came of every class of transformers' causal-LM mapping. `make architectures`."""

import logging
import re
import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # run as a script, it would know its own folder alone

import architectures
import torch
import transformers
from architecture_check import BATCHES, TOLERANCE, Finding, examined

TABLE = Path(__file__).parents[2] / "docs" / "architectures.md"

HEAD = """\
# Architectures

Every class of the causal-LM mapping of transformers {transformers}, built tiny and random from its config, in float32:
prompts of {lengths} tokens, padded on the right and on the left, hooked at the first, a middle
and the last block. All scores and log-probabilities are compared with plain autograd, one prompt at a time and
unpadded: in float64 where the model runs in float64 (and within twice what the model's own float32 is away from that,
where that is more). Classes that can be encoders are built as decoders (`is_decoder`,
`causal`, `attn_type="uni"`).
`make architectures` writes this page (torch {torch}, a CPU); `make test-all` holds it.

**{agree} of the {built} classes that can be built agree to {tolerance:.0e} ({share:.1f}%).** Forms: {forms}.

`packed` and `layerwise` go down one block at a time, `whole` through the upper network in one call; `loop` is K
backward passes, no faster than plain autograd. Where a form failed, the log warns and says how. `rules` says how many
of the blocks between the first and the last are pulled back by a rule, and which of their parts, or which blocks, are
left to autograd and why.

| model type | class | blocks | form | why | rules | distance |
| --- | --- | --- | --- | --- | --- | --- |
"""

CANNOT_HEAD = """
## Refused, or not built

| model type | class | outcome | reason | | |
| --- | --- | --- | --- | --- | --- |
"""


def row_of(found: Finding) -> str:
    """One line of the table."""
    if found.outcome in ("refused", "not built"):
        return f"| {found.kind} | {found.model_class} | {found.outcome} | {plain(found.reason)} | | |"
    by_choice: dict[tuple[str, str], list[str]] = {}
    for layer, form in found.forms.items():
        by_choice.setdefault((form["form"], form["why"]), []).append(layer)
    forms = " / ".join(dict.fromkeys(form for form, _ in by_choice))
    reasons = dict.fromkeys(reason(form, why) for form, why in by_choice)
    why = "; ".join(r for r in reasons if r)
    if found.unbatched:
        why = f"{why}; " * bool(why) + f"one at a time for want of a batching rule: {', '.join(found.unbatched)}"
    if found.oracle != "float64":
        why = f"{why}; compared in {found.oracle}" if why else f"compared in {found.oracle}"
    blocks = found.blocks[0].rpartition(".")[0] + ".N"
    cells = found.kind, found.model_class, blocks, forms, plain(why), plain(rules(found)), f"{found.distance:.0e}"
    return f"| {' | '.join(cells)} |"


def rules(found: Finding) -> str:
    """How many blocks above the lowest packed hook go by rule, and why not all of each."""
    told = next((form["rules"] for form in found.forms.values() if form["form"] == "packed"), "")
    if not told:
        return ""
    count, *others = told.split("; ")
    reasons = (re.sub(r"^(not \S+|in \d+ of them) ?", "", line) for line in others)
    kinds = dict.fromkeys(re.sub(r"[0-9.]+e-[0-9]+ away", "away", line.removeprefix(": ")) for line in reasons)
    return "; ".join([count.removesuffix(" blocks by rule"), *kinds])


def reason(form: str, why: str) -> str:
    """Why a form and not a faster one, without numbers that differ from machine to machine; nothing for the fastest."""
    if form == "packed":
        return ""
    why = re.sub(r"[0-9.e-]+ standard deviations away from the model's own, more than [0-9.e-]+", "off", why)
    why = re.sub(r": scores at .*| is [0-9.e-]+ away.*", "", why.removeprefix("the chain of blocks is whole; "))
    return why if len(why) <= 120 else why[:120].rpartition(" ")[0] + " ..."


def plain(text: str) -> str:
    """Without what would end a cell."""
    return text.replace("|", "/")


def main() -> None:
    logging.getLogger("fisher_vmap").setLevel(logging.CRITICAL)
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    found = [examined(kind) for kind in architectures.kinds()]
    works = [f for f in found if f.outcome in ("agrees", "differs")]
    others = [f for f in found if f.outcome not in ("agrees", "differs")]
    built = [f for f in found if f.outcome != "not built"]
    agree = sum(f.outcome == "agrees" for f in found)
    counts = Counter(form for f in works for form in {choice["form"] for choice in f.forms.values()})
    text = HEAD.format(
        transformers=transformers.__version__,
        torch=torch.__version__.partition("+")[0],
        lengths="; ".join(", ".join(map(str, lengths)) for lengths in BATCHES),
        agree=agree,
        built=len(built),
        tolerance=TOLERANCE,
        share=100 * agree / len(built),
        forms=", ".join(f"{form} {counts[form]}" for form in ("packed", "layerwise", "whole", "loop")),
    )
    text += "".join(row_of(f) + "\n" for f in works) + CANNOT_HEAD + "".join(row_of(f) + "\n" for f in others)
    TABLE.parent.mkdir(exist_ok=True)
    TABLE.write_text(text)
    print(f"{agree} of {len(built)} agree; written to {TABLE}")


if __name__ == "__main__":
    main()
