"""What a comparison of two folders says: the lines that are printed, the JSON, and the rows of the page."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fisher_vmap.errors import shown
from fisher_vmap.escape import short, visible
from fisher_vmap.results.comparison import Comparison, GroupChange
from fisher_vmap.results.record import several
from fisher_vmap.results.traded import TokenChange

PROMPTS = 10  # that are printed
TEXT = 60  # characters of a prompt in the printed table
TOKEN = 24  # characters of a token

_OF_DATA = ", of which only what is named below was compared: system turns and other columns may differ"

# Of each prompt, by their names in the JSON.
NUMBERS = ("cosine", "change", "trace_a", "trace_b", "trace_ratio", "outside", "overlap")


class Direction(NamedTuple):
    """A direction as it is shown: quadratic forms v^T F v in nats^2 per squared unit, tokens fit to be seen."""

    number: int
    ratio: str
    in_b: str
    in_a: str
    up: list[str]
    down: list[str]


def numbers_of(comparison: Comparison) -> dict[str, NDArray[np.float64]]:
    """`NUMBERS`, each [n]."""
    found = {name: getattr(comparison, name) for name in NUMBERS if name != "trace_ratio"}
    return {name: comparison.ratio if name == "trace_ratio" else found[name] for name in NUMBERS}


def summary_of(comparison: Comparison) -> dict[str, float]:
    """The number of prompts, and the medians of `NUMBERS`; NaN where no prompt has one."""
    medians = {}
    for name, values in numbers_of(comparison).items():
        known = values[np.isfinite(values)]
        medians[f"median_{name}"] = float(np.median(known)) if len(known) else float("nan")
    return {"prompts": len(comparison.prompt_index), "left_out": comparison.left_out, **medians}


def lines_of(comparison: Comparison, texts: Mapping[int, str | None], differ: Mapping[str, Any]) -> Iterator[str]:
    """The table as it is printed.

    Args:
        comparison: of one pair of layers.
        texts: of the prompts of `differing`, as far as they are stored.
        differ: settings that differ between the two runs, with both values.
    """
    for letter, folder, layer in zip("AB", comparison.folders, comparison.layers, strict=True):
        yield f"{letter:<10} {visible(str(folder), spaces=False)}: {visible(layer, spaces=False)}"
    if note := note_on_settings(differ):
        yield f"{'note':<10} {note}"
    yield f"{'prompts':<10} {matched(comparison)}"
    values, medians = numbers_of(comparison), summary_of(comparison)
    for title, name, what in (
        ("cosine", "cosine", "of F_A and F_B"),
        ("change", "change", "|F_B - F_A| / (|F_A| + |F_B|)"),
        ("trace", "trace_ratio", "of F_B as a multiple of that of F_A"),
        ("not held", "outside", "of the trace of F_B is outside of A's directions"),
    ):
        known = values[name][np.isfinite(values[name])]
        spread = f", {known.min():.4g} to {known.max():.4g}" if len(known) else ""
        yield f"{title:<10} {number(medians[f'median_{name}'])} (median{spread}) {what}"
    yield ""
    yield f"{'prompt':>7}{'change':>10}{'cosine':>10}{'trace A':>11}{'trace B':>11}{'B / A':>10}{'not held':>10}  text"
    for place in differing(comparison, PROMPTS):
        cells = (values[name][place] for name in ("change", "cosine", "trace_a", "trace_b", "trace_ratio", "outside"))
        prompt = int(comparison.prompt_index[place])
        row = "".join(f"{number(value):>{width}}" for value, width in zip(cells, (10, 10, 11, 11, 10, 10), strict=True))
        yield f"{prompt:>7}{row}  {short(visible(texts.get(prompt) or '', spaces=False), TEXT)}".rstrip()
    for title, group in groups_of(comparison):
        yield ""
        yield f"what B reacts to and A does not, {title}{none_of(group)}"
        above = max(int((group.directions.ratios > 1).sum()), 1)
        for direction in directions_of(group)[: None if group is comparison.all else above]:
            yield (
                f"{direction.number:>7}  ratio {direction.ratio}: v^T F v is {direction.in_b} in B and "
                f"{direction.in_a} in A"
            )
            for word, tokens in (("likelier", direction.up), ("less likely", direction.down)):
                if tokens:
                    yield f"{'':9}{word:<12} {' '.join(tokens)}"
    if notes := notes_on_groups(comparison):
        yield ""
        yield from notes


def none_of(group: GroupChange) -> str:
    """Why a group has no directions, if it has none."""
    return "" if len(group.directions.ratios) else ": no direction, since all matrices of A or all of B are zero"


def notes_on_groups(comparison: Comparison) -> list[str]:
    """What is not said of the groups of `--by`."""
    notes, by = [], visible(str(comparison.by))
    if comparison.more_groups:
        notes.append(f"{comparison.more_groups:,} smaller groups of {by} are left out")
    if comparison.other_values:
        notes.append(f"prompts whose {by} is another in B: {comparison.other_values:,}; the groups are by that in A")
    return notes


def groups_of(comparison: Comparison) -> list[tuple[str, GroupChange]]:
    """All prompts and the groups, each with its title."""
    found = [(f"all {len(comparison.prompt_index):,} prompts", comparison.all)]
    for label, group in comparison.groups.items():
        found.append((f"{visible(str(comparison.by))} {label} ({len(group.prompt_index):,} prompts)", group))
    return found


def directions_of(group: GroupChange) -> list[Direction]:
    """The directions as they are shown."""
    found = group.directions
    rows = zip(found.ratios, found.inside, found.outside, group.tokens, strict=True)
    return [
        Direction(i, number(ratio), number(inside), number(outside), _shown(traded.up), _shown(traded.down))
        for i, (ratio, inside, outside, traded) in enumerate(rows)
    ]


def _shown(tokens: Iterable[TokenChange]) -> list[str]:
    return [f"'{short(visible(each.text), TOKEN)}'" if each.text else f"<id {each.token_id}>" for each in tokens]


def matched(comparison: Comparison) -> str:
    """How many prompts were compared, and by what they are the same."""
    without = comparison.left_out
    left_out = f"; {without:,} left out, without numbers in A or B" if without else ""
    how = "text" if comparison.matched_by == "text" else f"{comparison.matched_by}, since not both folders store texts"
    return f"{len(comparison.prompt_index):,} compared, the same by {how}{left_out}"


def note_on_settings(differ: Mapping[str, Any]) -> str:
    """The settings that differ, in a sentence; empty if none does."""
    parts = [
        f"{visible(name)} is {shown(a)} in A and {shown(b)} in B" + (_OF_DATA if name == "data" else "")
        for name, (a, b) in differ.items()
    ]
    return visible("; ".join(parts), spaces=False)


def differing(comparison: Comparison, most: int) -> NDArray[np.int64]:
    """The places of the prompts that differ most."""
    return comparison.order()[:most]


def number(value: float) -> str:
    """A number as it is shown."""
    return f"{value:.4g}" if np.isfinite(value) else "-"


def as_json(comparisons: Sequence[Comparison], rank: int, ridge: float, differ: Mapping[str, Any]) -> dict[str, Any]:
    """Everything as JSON: lists over all pairs of layers, whose entries name their layers. NaN is None."""
    first = comparisons[0]
    document: dict[str, Any] = {
        "a": str(first.folders[0]),
        "b": str(first.folders[1]),
        "matched_by": first.matched_by,
        "rank": rank,
        "ridge": ridge,
        "by": first.by,
        "settings_that_differ": {name: list(values) for name, values in differ.items()},
        "layers": [],
        "prompts": [],
        "directions": [],
    }
    for comparison in comparisons:
        layers = dict(zip(("layer_a", "layer_b"), comparison.layers, strict=True))
        summary = {name: rounded(value) for name, value in summary_of(comparison).items()}
        counts = {name: int(summary_of(comparison)[name]) for name in ("prompts", "left_out")}
        document["layers"].append(
            {
                **layers,
                **summary,
                **counts,
                "more_groups": comparison.more_groups,
                "other_values": comparison.other_values,
            }
        )
        columns = {name: [rounded(x) for x in values] for name, values in numbers_of(comparison).items()}
        for place, prompt in enumerate(comparison.prompt_index.tolist()):
            row = {name: values[place] for name, values in columns.items()}
            document["prompts"].append({"prompt_index": prompt, **layers, **row})
        groups = [(None, comparison.all), *comparison.groups.items()]
        for label, group in groups:
            known = not isinstance(group.value, float) or np.isfinite(group.value)
            of = {**layers, "group": label, "value": group.value if known else None}
            document["directions"] += [{**of, **each} for each in _directions_as_json(group)]
    return document


def _directions_as_json(group: GroupChange) -> Iterator[dict[str, Any]]:
    found = group.directions
    for i, traded in enumerate(group.tokens):
        yield {
            "prompts": len(group.prompt_index),
            "direction": i,
            "ratio": rounded(found.ratios[i]),
            "in_b": rounded(found.inside[i]),
            "in_a": rounded(found.outside[i]),
            **{
                name: [{"id": x.token_id, "token": x.text, "change": rounded(x.change)} for x in getattr(traded, name)]
                for name in ("up", "down")
            },
        }


def rounded(value: float) -> float | None:
    """A number to 6 digits; None for NaN and for an infinite one."""
    return float(f"{float(value):.6g}") if np.isfinite(value) else None


def pairs_in_words(pairs: Sequence[tuple[str, str]]) -> str:
    """The layers that are compared, on one line."""
    same = [a for a, b in pairs if a == b]
    return several(same) if len(same) == len(pairs) else ", ".join(f"{a} and {b}" for a, b in pairs)
