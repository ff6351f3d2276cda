"""Data is never markup: texts, tokens, values of columns and names, made fit for the place where they are shown.

`visible` is for every place: it leaves no character that cannot be seen, or that moves others. `distinct_labels` makes
the names of a legend or a list from it. The rest escapes what one kind of place would take for its own: plotly's HTML,
templates and colours, a script element's end, Markdown's signs, the signs of paths. matplotlib knows no escape;
`report/images.py` switches its markup off. HTML itself is escaped by jinja, and by the page's script, which makes
text nodes.
"""

import json
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

LABEL = 40  # characters of a value in a legend or a list

_SIGNS = {"\n": "↵", "\t": "⇥"}
_UNSEEN = {"Cc", "Cf", "Co", "Cs", "Zl", "Zp", "Zs"}  # Unicode's categories
_BLANK = "\u115f\u1160\u2800\u3164\uffa0"  # letters and symbols without ink
_JOINERS = "\u200c\u200d"  # within a word or an emoji they belong to the spelling
_PLOTLY = {ord(sign): f"&#{ord(sign)};" for sign in "&<>$%@{}"}
_SCRIPT = {ord(sign): f"\\u{ord(sign):04x}" for sign in "<>&\u2028\u2029"}
_PLAIN_CODE = re.compile(r"[^\s`|<>&\\]+( [^\s`|<>&\\]+)*")  # what a code span in a table shows as it is
# What Markdown might read as markup; an underscore inside a word is none.
_MARKDOWN = re.compile(r"[^\w\s./:,+()%@=-]|(?<![^\W_])_|_(?![^\W_])")
_LINE_BREAK = re.compile(r"\r\n|[\n\r\v\f\x1c-\x1e\x85\u2028\u2029]")
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]")
_NOT_IN_FILES = re.compile(r"[^\w.\-+=@,()\[\] ]")
_DEVICES = re.compile(r"(?i)(con|prn|aux|nul|com\d|lpt\d)(\.|$)")  # on Windows
_FILE_NAME = 120  # characters


def visible(text: str, *, spaces: bool = True) -> str:
    """A text of which every character can be seen, on one line.

    A line break becomes "↵", a tab "⇥", a space at the edge or beside another one "␣" (unless `spaces` is False).
    Characters without ink, and those that turn the direction of others, become their code points: "<U+200B>".
    """
    if text.isascii() and text.isprintable() and (not spaces or text == " ".join(text.split())):
        return text
    return "".join(_seen(text, i, spaces) for i in range(len(text)))


def _seen(text: str, i: int, spaces: bool) -> str:
    sign, before, after = text[i], text[max(i - 1, 0) : i], text[i + 1 : i + 2]
    if sign == " ":
        return " " if not spaces or (before.strip(" ") and after.strip(" ")) else "␣"
    if sign in _JOINERS and before > "\x7f" and after > "\x7f":
        return sign
    category = unicodedata.category(sign)
    if sign in _SIGNS or not (category in _UNSEEN or sign in _BLANK or (not before and category[0] == "M")):
        return _SIGNS.get(sign, sign)
    return code_points(sign)


def code_points(text: str) -> str:
    """The characters by their numbers: "<U+4E2D U+6587>"."""
    return f"<{' '.join(f'U+{ord(sign):04X}' for sign in text)}>"


def short(text: str, most: int) -> str:
    """At most so many characters: the beginning and the end, with an ellipsis between."""
    head = (2 * most) // 3
    return text if len(text) <= most else f"{text[:head]}…{text[len(text) - (most - head - 1) :]}"


def distinct_labels(values: Iterable[object], most: int = LABEL, taken: Iterable[str] = ()) -> list[str]:
    """A label for each value: equal for equal values of the same kind, and different for all others.

    Args:
        values: of any kind; None is "none".
        most: characters of a label, before what tells it from another.
        taken: labels that have another meaning.
    """
    keys = [_kind_and_text(value) for value in values]
    plain = {key: short(visible(short(key[1], 4 * most)), most) or "(empty)" for key in dict.fromkeys(keys)}
    used, kinds = set(taken), defaultdict(set)
    counts = Counter(plain.values())
    for (kind, _), label in plain.items():
        kinds[label].add(kind)
    found: dict[tuple[str, str], str] = {}
    for key, label in plain.items():
        first = f"{label} ({key[0]})" if (label in used and counts[label] == 1) or len(kinds[label]) > 1 else label
        name, number = first, 1
        while name in used:
            number += 1
            name = f"{first} #{number}"
        used.add(name)
        found[key] = name
    return [found[key] for key in keys]


def _kind_and_text(value: object) -> tuple[str, str]:
    if value is None:
        return "missing", "none"
    kinds = {bool: "true or false", int: "number", float: "number", str: "text"}
    return kinds.get(type(value), type(value).__name__), str(value)


def plotly_text(text: str) -> str:
    """For a name, a tick, a title or a hover text of plotly, which knows tags, entities, formulas and templates.

    The page's script takes "@name" for a colour, in the properties for colours alone; data does not begin so anyway.
    """
    return text.translate(_PLOTLY)


def script_json(data: Any) -> str:
    """JSON for inside a script element, where nothing is unescaped: it holds no tag, and no line of JavaScript ends."""
    text = json.dumps(data, separators=(",", ":"), ensure_ascii=False, allow_nan=False).translate(_SCRIPT)
    return text.encode("utf-8", "backslashreplace").decode()  # half a surrogate pair becomes its JSON escape


def file_names(names: Sequence[str]) -> list[str]:
    """A part of a file's name for each name: no path, of an allowed length, different also where case is not told."""
    found: list[str] = []
    for name in names:
        plain = _NOT_IN_FILES.sub("_", name)[:_FILE_NAME].rstrip(". ") or "_"
        plain = f"_{plain}" if plain.startswith(".") or _DEVICES.match(plain) else plain
        unique, number = plain, 1
        while unique.casefold() in {other.casefold() for other in found}:
            number += 1
            unique = f"{plain}-{number}"
        found.append(unique)
    return found


def one_line(value: Any) -> str:
    """Any value as text on one line: a line break becomes ↵, another control character a space."""
    return _CONTROL.sub(" ", _LINE_BREAK.sub("↵", str(value)))


def markdown(value: Any) -> str:
    """Any value as Markdown text on one line, without markup."""
    return _MARKDOWN.sub(_entity, one_line(value))


def markdown_code(value: Any) -> str:
    """Any value as code in a cell of a Markdown table."""
    text = str(value)
    if _PLAIN_CODE.fullmatch(text):
        return f"`{one_line(text)}`"
    return f"<code>{re.sub(r'[^A-Za-z0-9 ↵]', _entity, one_line(text))}</code>"


def _entity(found: re.Match[str]) -> str:
    return f"&#{ord(found[0])};"
