"""The blocks of a page of the book, run as its reader would: Python, shell lines, files, and the output that is shown.

    ```python    runs; a page's blocks share their names
    ```sh        our commands run in this process; pip's and make's words are looked up
    ```yaml      is YAML
    ```output    what the block above printed, numbers to 10%, `...` for any lines

A comment in the line above a block, which readers do not see, says more of it:

    <!-- file: prompts.jsonl -->        the block is that file, and is written into the working folder
    <!-- not run: needs a hub -->       the block is not run; its flags are checked against the parser
    <!-- ends with 2 -->                the exit code of its command
    <!-- illustration -->               nothing to run

A comment `<!-- run: fisher-vmap ... -->` or `<!-- python: ... -->` anywhere is run, unseen by the reader.
"""

import argparse
import contextlib
import importlib
import io
import re
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import yaml
from sybil import Document, Example, Region, Sybil
from sybil.parsers.markdown.lexers import RawFencedCodeBlockLexer

from fisher_vmap.cli import COMMANDS
from fisher_vmap.run.settings import Settings

ROOT = Path(__file__).parents[2]
FENCES = RawFencedCodeBlockLexer(re.compile(r"(?P<language>.*)$\n", re.MULTILINE))
COMMENT_ABOVE = re.compile(r"<!-- (?P<note>.+?) -->\n\Z")
UNSEEN = re.compile(r"<!-- (?P<kind>run|python):\s(?P<source>.+?)\s*-->", re.DOTALL)
NUMBER = re.compile(r"(?<![\w.])[-+]?\d[\d,]*\.?\d*(?:e[-+]?\d+)?")
NEVER_RUN = ("text",)


def blocks(document: Document) -> Iterator[Region]:
    """Every fence of a page, and what is run unseen. A fence of no known language is a mistake of the page's."""
    for found in UNSEEN.finditer(document.text):
        evaluate = shell if found["kind"] == "run" else python
        yield Region(found.start(), found.end(), found["source"], evaluate, {"note": ""})
    for region in FENCES(document):
        language, above = region.lexemes["language"], COMMENT_ABOVE.search(document.text[: region.start])
        note = above["note"] if above else ""
        if language.startswith("{") or language in NEVER_RUN or note == "illustration":
            continue
        region.lexemes["note"], region.parsed = note, str(region.lexemes["source"])
        if note.startswith("file: "):
            region.evaluator = write_file
        elif note.startswith("not run: "):
            region.evaluator = check_flags
        else:
            region.evaluator = {"python": python, "sh": shell, "output": output, "yaml": check_yaml}[language]
        yield region


PAGES = Sybil([blocks], filenames=[])


def python(example: Example) -> None:
    """Run it; what it prints is kept for the output block."""
    code = compile("\n" * example.line + example.parsed, example.path, "exec")
    example.namespace["_printed"] = ""
    with kept(example):
        exec(code, example.namespace)


def shell(example: Example) -> None:
    """Run its lines, one after another."""
    example.namespace["_printed"] = ""
    for words in commands(example.parsed):
        note = example.region.lexemes["note"]
        expected = int(note.removeprefix("ends with ")) if note.startswith("ends with ") else 0
        with kept(example):
            code = carry_out(words)
        assert code == expected, f"{shlex.join(words)} ended with {code}"


def write_file(example: Example) -> None:
    """Write the block into the working folder."""
    Path(example.region.lexemes["note"].removeprefix("file: ")).write_text(example.parsed, encoding="utf-8")


def check_flags(example: Example) -> None:
    """Check every use of our commands in it, wherever in a line it stands."""
    lines = list(commands(example.parsed))
    lines += [shlex.split(word) for words in lines for word in words if "fisher-vmap " in word]  # sbatch --wrap "..."
    found = [rest for words in lines if (rest := ours(words))]
    for words in found:
        check(*words)
    assert found, "a block that is not run and has nothing to check"


def check_yaml(example: Example) -> None:
    """Raise unless it is YAML."""
    assert yaml.safe_load(example.parsed) is not None


def output(example: Example) -> None:
    """Compare it with what the block above printed."""
    printed = example.namespace["_printed"]
    differences = unlike(example.parsed, printed)
    assert not differences, f"{differences}\nThe page shows:\n{example.parsed}\nIt printed:\n{printed}"


@contextlib.contextmanager
def kept(example: Example) -> Iterator[None]:
    """Keep what is printed; what goes to standard error, such as progress bars, is none of the page's."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        yield
    example.namespace["_printed"] += said.getvalue()


def commands(source: str) -> Iterator[list[str]]:
    """The words of each line; a line that ends in a backslash goes on in the next, and comments are left out."""
    for line in source.replace("\\\n", " ").splitlines():
        if words := shlex.split(line, comments=True):
            yield words


def ours(words: list[str]) -> tuple[str, list[str]] | None:
    """The module and the arguments of our command in a line, or None."""
    for i, word in enumerate(words):
        if word == "fisher-vmap":
            return COMMANDS[words[i + 1]][0], words[i + 2 :]
        if word == "-m" and words[i + 1].startswith("fisher_vmap."):
            return words[i + 1], words[i + 2 :]
    return None


def carry_out(words: list[str]) -> int:
    """One line of the shell; returns its exit code."""
    if found := ours(words):
        module, arguments = found
        return int(main_of(module)(arguments))
    if words[:2] == ["pip", "install"]:
        known = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["optional-dependencies"]
        for extra in re.findall(r"fisher_vmap\[(\w+)\]", " ".join(words)):
            assert extra in known, f"there is no extra {extra}"
    elif words[0] == "make":
        assert f"\n{words[1]}:" in (ROOT / "Makefile").read_text("utf-8"), f"there is no make {words[1]}"
    else:
        raise AssertionError(f"a command that nobody checks: {shlex.join(words)}")
    return 0


class Parsed(Exception):
    """The arguments were understood; nothing else is done with them."""


def check(module: str, arguments: list[str]) -> None:
    """Raise unless the command takes these arguments; values from shell variables are not looked at."""
    end = next((i for i, word in enumerate(arguments) if word in ("|", "&&", ";", "&", ">", ">>")), len(arguments))
    parse = argparse.ArgumentParser.parse_known_args

    def parse_alone(parser, args=None, namespace=None):
        found, left_over = parse(parser, args, namespace)
        if left_over:
            raise ValueError(f"unknown flag or argument {left_over[0]!r}")
        raise Parsed(vars(found))

    main = main_of(module)
    with mock.patch.object(argparse.ArgumentParser, "parse_known_args", parse_alone):
        try:
            main(arguments[:end])
        except Parsed as parsed:
            values = {name: value for name, value in parsed.args[0].items() if name in Settings.model_fields}
        else:
            raise AssertionError(f"{module} did not parse {arguments[:end]}")
    if module == "fisher_vmap.run":
        Settings(**{name: value for name, value in values.items() if "$" not in value})


def main_of(module: str):
    """The `main` of a command's module, or of the package that `python -m` runs."""
    found = importlib.import_module(module)
    return (importlib.import_module(f"{module}.__main__") if hasattr(found, "__path__") else found).main


def unlike(shown: str, printed: str) -> str:
    """Where the printed text is not the one shown: "" if nowhere."""
    pattern, numbers = [], []
    for line in shown.strip().splitlines():
        if line.strip() == "...":
            pattern.append(r"(?:.*\n)*?")
            continue
        words = re.split(r"\s+", line.strip())
        for word in words:
            found = NUMBER.findall(word)
            numbers += found
            parts = [re.escape(part) for part in NUMBER.split(word)]
            pattern.append(f"({NUMBER.pattern})".join(parts) + r"\s+")
    match = re.fullmatch("".join(pattern), printed.strip() + "\n")
    if match is None:
        return "the text is another"
    for one, other in zip(numbers, match.groups(), strict=True):
        if not near(one, other):
            return f"{one} on the page, {other} printed"
    return ""


def near(one: str, other: str) -> bool:
    """Within a tenth, or two units of the last digit shown; whole numbers are exact, for they count something."""
    a, b = (float(text.replace(",", "")) for text in (one, other))
    mantissa, _, exponent = one.partition("e")
    digits = len(mantissa.partition(".")[2])
    if "." not in mantissa and not exponent:
        return a == b
    return abs(a - b) <= max(0.1 * abs(a), 2 * 10.0 ** (int(exponent or 0) - digits))
