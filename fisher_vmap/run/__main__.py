"""`python -m fisher_vmap.run`: compute a data set's Fisher matrices into a results folder."""

import sys

if __name__ == "__main__":
    from fisher_vmap.__main__ import start

    sys.exit(start("run"))

import logging
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from fisher_vmap.cli import command, start_logging
from fisher_vmap.cli import stopped as say_stopped
from fisher_vmap.errors import UserError
from fisher_vmap.progress import hide, step
from fisher_vmap.run.cli_args import load_command
from fisher_vmap.run.settings import RunOptions, Settings

if TYPE_CHECKING:
    from fisher_vmap.data.files import Extent
    from fisher_vmap.load.model import Loaded
    from fisher_vmap.run.compute import Summary


log = logging.getLogger("fisher_vmap")


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns its exit code.

    0 done; 1 a worker failed; 2 a user's mistake; 3 a prompt failed, with --strict; 130 stopped by Ctrl-C. 1 and 2
    come with a one-line message.
    """
    start_logging()
    settings = None
    try:
        settings, options = load_command(sys.argv[1:] if argv is None else argv)
        if options.quiet:
            hide()
        if options.plan or options.plan_rate is not None:
            with step("loading the libraries"):
                from fisher_vmap.run.plan import plan

            print("\n".join(plan(settings, options.plan_rate)))
            return 0
        summary = run(settings, options)
    except KeyboardInterrupt:
        return say_stopped(stopped(settings))
    return 3 if settings.strict and summary.failed else 0


def stopped(settings: Settings | None) -> str:
    """The message after Ctrl-C: what is stored, and how to continue."""
    from fisher_vmap.results.index import read_index

    stored = 0
    if settings is not None:
        with suppress(UserError):  # there is no folder yet
            stored = sum(shard.stop - shard.start for shard in read_index(Path(settings.output_dir)).shards)
    if settings is None or not stored:
        return "stopped before anything was stored; the same command begins again"
    return f"stopped; {stored} prompts are stored in {settings.output_dir}, and the same command carries on from there"


def run(settings: Settings, options: RunOptions | None = None, loaded: "Loaded | None" = None) -> "Summary":
    """Run with these settings.

    Args:
        settings: of the run.
        options: of this process: its share of the shards.
        loaded: the model, if it is loaded already.

    Raises:
        UserError: the settings, the model, the data or the folder are wrong.
        WorkerError: with engine ray, a worker failed.
    """
    from fisher_vmap.results.folder import check_writable, inspect_folder

    shards = None if options is None else options.shards
    if shards is not None and settings.overwrite:
        raise UserError(
            "--shards with overwrite: each process would remove the others' results; remove the folder first"
        )
    if shards is not None and settings.engine != "local":
        raise UserError(f"--shards is for engine local, but engine is {settings.engine}; leave one of the two out")
    inspect_folder(Path(settings.output_dir), overwrite=settings.overwrite)  # before minutes of loading
    check_writable(Path(settings.output_dir))
    if settings.engine == "ray":
        from fisher_vmap.run.ray import require_ray

        require_ray()

    with step("loading the libraries"):
        from fisher_vmap.results.files import at_work
        from fisher_vmap.run.bar import run_bar
        from fisher_vmap.run.compute import Share, prompts_of, run_prompts
        from fisher_vmap.run.open import check_save, model_of, open_run, source_of

    check_save(settings)
    with step("opening the data set"):
        source = source_of(settings)
        extent = source.extent()
    if not extent.is_whole:
        log.info("the run takes %s", extent)
    if settings.engine == "ray":
        with step("loading the libraries"):
            from fisher_vmap.run.ray import run_on_ray

        summary = run_on_ray(settings, source, run_bar)
    else:
        loaded = loaded or model_of(settings)
        with step("opening the run"):
            opened = open_run(settings, loaded, source)
        share = None if shards is None else Share(*shards)
        asked = source.total if source.total is not None else settings.num_prompts
        total = prompts_of(asked, settings.shard_size, share)
        with at_work(Path(settings.output_dir)) as others, run_bar(total) as report:
            if others and share is None:
                log.warning(
                    "another process is computing in %s as well, and each computes all of it; "
                    "use --shards i/n to share the work",
                    settings.output_dir,
                )
            summary = run_prompts(opened, report, share)
    # At the end of a stream it is known how many prompts there were; a share of the shards does not tell.
    tell(summary, settings, source.extent(summary.prompts if shards is None else None))
    return summary


def tell(summary: "Summary", settings: Settings, extent: "Extent") -> None:
    """Log what was done, how fast, what went wrong, which part of the data it is, and where the results are."""
    computed = summary.prompts - summary.stored_before
    if computed:
        seconds = max(summary.seconds, 1e-9)
        log.info(
            "%d prompts in %.1f s: %.1f prompts and %.0f tokens a second",
            computed,
            seconds,
            computed / seconds,
            summary.tokens / seconds,
        )
    if summary.stored_before:
        log.info("%d prompts were stored already", summary.stored_before)
    for reason in summary.reasons:
        log.warning("%s", reason)
    if not summary.finished:
        log.info("this process's shards are stored in %s", settings.output_dir)
        return
    if summary.failed or summary.skipped:
        log.warning(
            "%d prompts failed and %d were skipped; %s lists them",
            summary.failed,
            summary.skipped,
            Path(settings.output_dir, "metadata.yaml"),
        )
    if not extent.is_whole:
        log.info("these are %s%s", extent, "; a higher num_prompts adds to them" if extent.can_grow else "")
    log.info("results in %s", settings.output_dir)
    if summary.without_results is not None:
        none = summary.failed + summary.skipped
        log.warning("none of %d prompts has results: %s", none, summary.without_results)
    if summary.note is not None:
        log.warning("%s", summary.note)
