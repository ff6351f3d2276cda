"""`python -m fisher_vmap.compare A B`: how the matrices of the same prompts differ between two results folders."""

import sys

if __name__ == "__main__":
    from fisher_vmap.__main__ import start

    sys.exit(start("compare"))

import argparse
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from fisher_vmap.cli import Parser, add_quiet, command, path_argument
from fisher_vmap.errors import UserError
from fisher_vmap.progress import step
from fisher_vmap.results.comparison import Comparison, check
from fisher_vmap.results.files import replacing
from fisher_vmap.results.folder import check_output
from fisher_vmap.results.hub import HUB
from fisher_vmap.results.reader import Results, open_results
from fisher_vmap.results.record import several

PAGE = "compare.html"


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Compare two folders; returns the exit code: 0 done, 2 a mistake of the user's."""
    for line in compare_folders(_parser().read(argv)):
        print(line, flush=True)
    return 0


def compare_folders(arguments: argparse.Namespace) -> Iterator[str]:
    """Compare two folders and write the page and the JSON; yields the lines to print.

    Raises:
        UserError: no results folder, an unfinished one, other prompts, layers or widths, a folder that keeps the mean
            alone, or a file that cannot be written.
    """
    # A folder from the hub is in the cache, which nothing else should be written to.
    page = arguments.output or Path("" if arguments.b.startswith(HUB) else arguments.b, PAGE)
    if not arguments.page:
        if arguments.output:
            raise UserError(f"--output {arguments.output} is the page's file, and --no-page leaves it out; keep one")
        page = None
    for path, flag in ((page, "--output"), (arguments.json, "--json")):
        if path is not None:
            check_output(path, flag)
    if page and arguments.json and os.path.realpath(arguments.json) == os.path.realpath(page):
        raise UserError(f"--json and --output are both {page}; name two files")
    with step("loading the libraries"):
        from fisher_vmap.compare.page import SHOWN, write_page
        from fisher_vmap.compare.tables import PROMPTS, as_json, differing, lines_of
        from fisher_vmap.results.same_prompts import Side, other_settings, texts_of

    opened = []
    for folder in (arguments.a, arguments.b):
        with step(f"opening {folder}"):
            opened.append(open_results(folder))
    a, b = opened
    differ, found, texts = other_settings(a.index, b.index), list[Comparison](), dict[int, str | None]()
    pairs = layer_pairs(a, b, arguments.layer_a, arguments.layer_b)
    for pair in pairs:
        one, another = (Side(of.folder, of.index, name, of.shards) for of, name in zip(opened, pair, strict=True))
        check(one, another, arguments.rank, arguments.ridge)
    for layer, other in pairs:
        compared = a.compare(b, layer, other, arguments.rank, arguments.ridge, arguments.by)
        wanted = compared.prompt_index[differing(compared, PROMPTS if page is None else SHOWN)].tolist()
        texts |= texts_of((a if a.index.layout.store_text else b).shards(), wanted)
        if found:
            yield ""
        yield from lines_of(compared, texts, differ)
        found.append(compared)
    if arguments.json is not None:
        document = as_json(found, arguments.rank, arguments.ridge, differ)
        text = json.dumps(document, indent=1, ensure_ascii=False, allow_nan=False, default=str)
        with replacing(arguments.json) as file:
            file.write(text.encode("utf-8", "backslashreplace"))
        yield f"\n{arguments.json}: {len(document['prompts']):,} prompts, {len(document['directions']):,} directions"
    if page is not None:
        size = write_page(page, found, texts, differ, arguments.ridge)
        yield f"{'' if arguments.json else chr(10)}{page}: {size / 1e3:.0f} kB"


def layer_pairs(a: Results, b: Results, layer_a: str | None, layer_b: str | None) -> list[tuple[str, str]]:
    """The layers that are compared: those named, else all that both folders have.

    Raises:
        UserError: a layer is not there, or the folders have none in common.
    """
    if layer_a is None and layer_b is None:
        if common := [layer for layer in a.layers if layer in b.layers]:
            return [(layer, layer) for layer in common]
        raise UserError(
            f"{a.folder} has {several(a.layers)} and {b.folder} {several(b.layers)}, no layer in common; name one of "
            "each with --layer_a and --layer_b"
        )
    if layer_a is not None and layer_b is not None:
        return [(a.at(layer_a).layer, b.at(layer_b).layer)]
    given, other, flags = (a, b, ("a", "b")) if layer_a is not None else (b, a, ("b", "a"))
    name = given.at(layer_a if layer_a is not None else layer_b or "").layer
    if name not in other.layers:
        raise UserError(
            f"--layer_{flags[0]} is {name}, which was not hooked in {other.folder}; there is {several(other.layers)}: "
            f"name one of them with --layer_{flags[1]}"
        )
    return [(name, name)]


def _parser() -> Parser:
    parser = Parser(
        "compare",
        description="Compare two results folders of the same prompts: a base model and a fine-tuned one, two layers,\n"
        "two precisions, two checkpoints. It prints which prompts differ most and the directions that B\n"
        "reacts to and A does not, with the tokens they trade, and writes a page.",
        epilog="examples:\n"
        "  fisher-vmap compare base_results tuned_results\n"
        "  fisher-vmap compare base_results tuned_results --by kind --json compare.json --no-page\n"
        "  fisher-vmap compare fisher_results fisher_results --layer_a 5 --layer_b 15",
        hints={"layer": "name it with --layer_a, and with --layer_b where the other folder's is another"},
    )
    for name, what in (("a", "such as the base model's"), ("b", "such as the fine-tuned one's")):
        parser.add_argument(name, metavar=name.upper(), type=os.path.expanduser, help=f"a results folder, {what}")
    parser.add_argument("--layer_a", metavar="LAYER", help="of A, a name or number; by default all common layers")
    parser.add_argument("--layer_b", metavar="LAYER", help="of B; by default that of the same name")
    parser.add_argument("--rank", type=int, default=5, metavar="N", help="how many directions (5)")
    parser.add_argument(
        "--ridge", type=float, default=0.01, help="added to A's mean, a fraction of its mean eigenvalue (0.01)"
    )
    parser.add_argument("--by", metavar="COLUMN", help="a kept column; its values are groups with their own directions")
    parser.add_argument("--output", metavar="FILE", type=path_argument, help=f"the page's file; by default B/{PAGE}")
    parser.add_argument("--json", metavar="FILE", type=path_argument, help="write every number to this file, too")
    parser.add_argument("--no-page", dest="page", action="store_false", help="leave the page out")
    add_quiet(parser)
    return parser
