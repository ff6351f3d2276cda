"""`python -m fisher_vmap.report DIR`: a page that shows a results folder, and images of its figures."""

import sys

if __name__ == "__main__":
    from fisher_vmap.__main__ import start

    sys.exit(start("report"))

import argparse
import importlib.util
import os.path
import time
from collections.abc import Sequence
from pathlib import Path

from fisher_vmap.cli import Parser, add_quiet, command, path_argument
from fisher_vmap.errors import UserError
from fisher_vmap.progress import step
from fisher_vmap.report.lens import READOUTS, lens_section, read_readouts, write_lens_page
from fisher_vmap.results.folder import check_output
from fisher_vmap.results.index import INDEX_NAME
from fisher_vmap.results.reader import open_results
from fisher_vmap.results.record import was
from fisher_vmap.results.shard_reader import is_ok

SHOWN = 10  # images that are named one by one
EXTRA = ("plotly", "matplotlib", "scipy")


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Write the report; returns the exit code: 0 done, 2 a mistake of the user's."""
    for line in write_report(_parser().read(argv)):
        print(line)
    return 0


def write_report(arguments: argparse.Namespace) -> list[str]:
    """Write the page and the images; returns the lines to print.

    Raises:
        UserError: a package is missing, a folder holds no results or no readouts or is damaged, or the page cannot be
            written.
    """
    # A folder from the hub is in the cache, which nothing else should be written to.
    page = arguments.output or Path("" if arguments.folder.startswith("hf://") else arguments.folder, "report.html")
    if arguments.output is not None:
        check_output(page)
    if arguments.lens is None and _is_of_a_lens(arguments.folder):
        return _write_lens_report(arguments, page)
    if missing := [name for name in EXTRA if importlib.util.find_spec(name) is None]:
        raise UserError(f"the report needs {', '.join(missing)}: pip install 'fisher_vmap[report]'")
    with step("loading the libraries"):
        from fisher_vmap.report.data import Sampling, survey
        from fisher_vmap.report.images import write_images
        from fisher_vmap.report.page import write_page

    began = time.perf_counter()
    with step(f"opening {arguments.folder}"):
        results = open_results(arguments.folder, allow_incomplete=True)
    if not len(results):
        raise UserError(f"{arguments.folder} holds no prompts yet; there is nothing to report")
    if not any(is_ok(reader).any() for reader in results.shards()):
        first = results[results.index.shards[0].start]
        raise UserError(
            f"none of the {len(results)} prompts of {arguments.folder} has results (the first {was(first.status)}: "
            f"{first.reason}); there is nothing to report"
        )
    if outside := [index for index in arguments.prompts if not 0 <= index < results.index.stop]:
        raise UserError(
            f"there is no prompt {outside[0]} in {arguments.folder}, which has 0 to {results.index.stop - 1}"
        )
    sampling = Sampling(
        similarity=arguments.similarity, details=arguments.details, always=tuple(arguments.prompts), seed=arguments.seed
    )
    lens = None if arguments.lens is None else lens_section(read_readouts(arguments.lens), arguments.details)
    found = survey(results, sampling)
    with step(f"writing {page.name}"):
        size = write_page(page, found, lens)
    lines = [f"{page}: {size / 1e6:.1f} MB, {len(found.rows.index):,} prompts, {len(found.layers)} layers"]
    if lens is not None:
        lines[0] += f", {lens.shown:,} read by a lens"
    if arguments.images:
        images = write_images(page.with_suffix(""), found)
        names = [image.name for image in images]
        kinds = dict.fromkeys(f"{name.split('.')[0]}{'.LAYER' * (name.count('.') > 1)}.png" for name in names)
        many = f"{len(names)} images, {', '.join(kinds)}"
        lines.append(f"{images[0].parent}: {', '.join(names) if len(names) <= SHOWN else many}")
    return [*lines, f"written in {time.perf_counter() - began:.1f} s"]


def _is_of_a_lens(folder: str) -> bool:
    """Whether a folder holds a lens's readouts and no results."""
    return Path(folder, READOUTS).is_file() and not Path(folder, INDEX_NAME).exists()


def _write_lens_report(arguments: argparse.Namespace, page: Path) -> list[str]:
    folder = Path(arguments.folder)
    section = lens_section(read_readouts(folder), arguments.details)
    size = write_lens_page(page, folder, section)
    return [f"{page}: {size / 1e6:.1f} MB, {section.shown:,} prompts read by a lens; {folder} holds no results"]


def _parser() -> Parser:
    parser = Parser(
        "report",
        description="Write one self-contained page (no network needed) to look at a results folder, and PNGs of its\n"
        "figures: spectra, traces, similar prompts, layers, outliers, and single prompts in full.",
        epilog="examples:\n"
        "  fisher-vmap report fisher_results\n"
        "  fisher-vmap report fisher_results --lens fisher_lens\n"
        "  fisher-vmap report fisher_results --prompts 12,40 --output look.html --no-images",
    )
    parser.add_argument(
        "folder", metavar="DIR", type=os.path.expanduser, help="the results folder, such as fisher_results or "
        "hf://datasets/A/B; or the folder of a lens, for a page of its readouts alone"
    )  # fmt: skip
    parser.add_argument(
        "--output", metavar="FILE", type=path_argument, help="the page's file; by default DIR/report.html, images in "
        "DIR/report"
    )  # fmt: skip
    parser.add_argument(
        "--lens", metavar="LENS_DIR", type=path_argument, help="the folder of `fisher-vmap lens`, or its "
        "readouts.json: adds what the lens reads"
    )  # fmt: skip
    parser.add_argument("--prompts", type=_indices, default=(), metavar="I,J", help="prompts to show in full, by index")
    parser.add_argument("--details", type=_count, default=300, help="most prompts shown in full (300)")
    parser.add_argument("--similarity", type=_count, default=400, help="most prompts in the similarity map (400)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the sampling")
    parser.add_argument("--no-images", dest="images", action="store_false", help="leave the PNGs out")
    add_quiet(parser)
    return parser


def _indices(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(",") if part.strip())
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} are not prompt numbers; expected such as 12,40") from error


def _count(text: str) -> int:
    if not text.strip().isdecimal() or not 2 <= int(text) <= 2000:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 2 to 2000")
    return int(text)
