"""`python -m fisher_vmap.lens`: fit the Jacobian lens of a model on a corpus."""

import sys

if __name__ == "__main__":
    from fisher_vmap.__main__ import start

    sys.exit(start("lens"))

import logging
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fisher_vmap.cli import command, start_logging
from fisher_vmap.cli import stopped as say_stopped
from fisher_vmap.lens.flags import PT_NAME, SAFETENSORS_NAME, LensCommand, read
from fisher_vmap.progress import hide, step

if TYPE_CHECKING:
    from fisher_vmap.lens.finish import Summary
    from fisher_vmap.load.model import Loaded

log = logging.getLogger("fisher_vmap")

REASONS = 3  # of prompts without a matrix, shown at the end


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Fit a lens; returns the exit code.

    0 done; 1 a worker failed; 2 a user's mistake; 3 a prompt failed, with --strict; 130 stopped by Ctrl-C.
    """
    start_logging()
    typed: LensCommand | None = None
    try:
        typed = read(sys.argv[1:] if argv is None else argv)
        if typed.options.quiet:
            hide()
        summary, loaded = fit_lens(typed)
        for line in lines(summary, typed):
            print(line, flush=True)
        if typed.read and summary.lens is None:
            print("nothing is read yet: give --read again when the lens is written", flush=True)
        elif typed.read and summary.lens is not None:
            from fisher_vmap.lens.opening import load
            from fisher_vmap.lens.stored_readouts import read_texts

            for line in read_texts(typed.settings, summary.lens, typed.read, loaded or load(typed.settings)):
                print(line, flush=True)
    except KeyboardInterrupt:
        folder = None if typed is None else typed.settings.output_dir
        return say_stopped(
            f"stopped; what is stored in {folder} is kept, and the same command carries on from there"
            if folder and Path(folder, "lens.json").exists()
            else "stopped before anything was stored; the same command begins again"
        )
    return 3 if typed.settings.strict and summary.failed else 0


def fit_lens(typed: LensCommand) -> "tuple[Summary, Loaded | None]":
    """Fit with these settings; returns what was done, and the model if this process has it.

    Raises:
        UserError: the settings, the model, the data or the folder are wrong.
        WorkerError: with engine ray, a worker failed.
    """
    from fisher_vmap.results.folder import check_writable

    settings, shards = typed.settings, typed.options.shards
    with step("loading the libraries"):
        from fisher_vmap.lens.fit import run_fit
        from fisher_vmap.lens.folder import inspect
        from fisher_vmap.lens.opening import load, open_fit
        from fisher_vmap.run.bar import run_bar
        from fisher_vmap.run.compute import Share, prompts_of
        from fisher_vmap.run.open import source_of

    inspect(settings)  # before minutes of loading
    check_writable(Path(settings.output_dir))
    with step("opening the data set"):
        source = source_of(settings)
        extent = source.extent()
    if not extent.is_whole:
        log.info("the fit takes %s", extent)
    if settings.engine == "ray":
        with step("loading the libraries"):
            from fisher_vmap.lens.ray import fit_on_ray

        return fit_on_ray(settings, source, run_bar), None
    loaded = load(settings)
    with step("opening the fit"):
        fit = open_fit(settings, loaded, source)
    share = None if shards is None else Share(*shards)
    asked = source.total if source.total is not None else settings.num_prompts
    with run_bar(prompts_of(asked, settings.shard_size, share)) as report:
        return run_fit(fit, report, share), loaded


def lines(summary: "Summary", typed: LensCommand) -> Iterator[str]:
    """What to print of a fit."""
    did = summary.did
    if did.computed:
        seconds = max(did.seconds, 1e-9)
        yield f"{did.computed} prompts in {seconds:.1f} s: {seconds / did.computed:.1f} s a prompt"
    if did.stored:
        yield f"{did.stored} prompts were in the sums already"
    for what, reasons in (("skipped", summary.skipped), ("failed", summary.failed)):
        if reasons:
            first = [f"prompt {index}: {reasons[index]}" for index in sorted(reasons)[:REASONS]]
            yield f"{len(reasons)} prompts {what} ({'; '.join(first)})"
    if summary.lens is None:
        return
    lens, folder = summary.lens, Path(typed.settings.output_dir)
    yield f"{'layer':>24}  {'|J|':>9}  standard error  two halves differ by"
    for number, (layer, spread) in zip(lens.layers, summary.spread.items(), strict=True):
        error, half = (f"{x:.3%}" if not math.isnan(x) else "-" for x in spread)
        yield f"{layer:>24}  {float(lens.of(number).norm()):9.4g}  {error:>14}  {half:>20}"
    if typed.settings.until is not None:
        yield (
            f"the halves differ by no more than until, {typed.settings.until:g}"
            if did.stopped
            else f"the data ended before the halves differed by no more than until, {typed.settings.until:g}"
        )
    yield f"lens of {lens.n_prompts} prompts in {folder / PT_NAME} and {folder / SAFETENSORS_NAME}"
