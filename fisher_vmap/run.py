"""`python -m fisher_vmap.run`: the main job, from settings to a results folder."""

import logging
import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from fisher_vmap.config import Settings, load_settings
from fisher_vmap.errors import UserError

if TYPE_CHECKING:
    from fisher_vmap.pipeline import Summary

log = logging.getLogger("fisher_vmap")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns its exit code.

    0 done; 2 the user's mistake, told in one line; 3 with --strict when a prompt failed; 130 stopped by Ctrl-C.
    """
    start_logging()
    settings = None
    try:
        settings = load_settings(sys.argv[1:] if argv is None else argv)
        summary = run(settings)
    except UserError as error:
        return user_mistake(error)
    except KeyboardInterrupt:
        print(f"\nfisher_vmap: {stopped(settings)}", file=sys.stderr)
        return 130
    return 3 if settings.strict and summary.failed else 0


def stopped(settings: Settings | None) -> str:
    """What is said after Ctrl-C: what is stored, and how to carry on."""
    from fisher_vmap.storage.index import read_index

    stored = 0
    if settings is not None:
        with suppress(UserError):  # there is no folder yet
            stored = sum(shard.stop - shard.start for shard in read_index(Path(settings.output_dir)).shards)
    if settings is None or not stored:
        return "stopped before anything was stored; the same command begins again"
    return f"stopped; {stored} prompts are stored in {settings.output_dir}, and the same command carries on from there"


def run(settings: Settings) -> "Summary":
    """The main job with these settings.

    Raises:
        UserError: one line that says what is wrong with the settings, the model, the data or the folder.
    """
    from fisher_vmap.storage.folder import inspect_folder

    inspect_folder(Path(settings.output_dir), overwrite=settings.overwrite)  # before minutes of loading

    from fisher_vmap.models import load_model
    from fisher_vmap.opening import open_run
    from fisher_vmap.pipeline import run_prompts
    from fisher_vmap.progress import bar
    from fisher_vmap.sources import read_prompts

    source = read_prompts(
        settings.dataset_name,
        dataset_config=settings.dataset_config,
        dataset_split=settings.dataset_split,
        dataset_revision=settings.dataset_revision,
        num_prompts=settings.num_prompts,
        offset=settings.offset,
        shuffle_seed=settings.shuffle_seed,
        prompt_column=settings.prompt_column,
        keep_columns=settings.keep_columns,
        conversation=settings.conversation,
    )
    loaded = load_model(
        settings.model_path,
        revision=settings.model_revision,
        trust_remote_code=settings.trust_remote_code,
        dtype=settings.dtype,
        device=settings.device,
        device_map=settings.device_map,
        max_memory=settings.max_memory,
        adapter_path=settings.adapter_path,
        adapter_revision=settings.adapter_revision,
        dequantize=settings.dequantize,
    )
    opened = open_run(settings, loaded, source)
    total = source.total if source.total is not None else settings.num_prompts
    with bar(None if total == "all" else int(total)) as report:
        summary = run_prompts(opened, report)
    tell(summary, settings)
    return summary


def tell(summary: "Summary", settings: Settings) -> None:
    """The closing lines: what was done, how fast, what went wrong, and where it is."""
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
    if summary.failed or summary.skipped:
        log.warning(
            "%d prompts failed and %d were skipped; %s lists them",
            summary.failed,
            summary.skipped,
            Path(settings.output_dir, "metadata.yaml"),
        )
    log.info("results in %s", settings.output_dir)


def start_logging() -> None:
    """Our own lines on standard error; of the libraries only warnings, and none of their progress bars."""
    logging.basicConfig(format="%(message)s", level=logging.WARNING, stream=sys.stderr)
    log.setLevel(logging.INFO)
    for name in ("torchao", "torch.utils._pytree", "bitsandbytes"):  # they warn wherever they are installed
        logging.getLogger(name).setLevel(logging.ERROR)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def user_mistake(error: UserError) -> int:
    """Show a mistake as one line; returns exit code 2."""
    print(f"fisher_vmap: {' '.join(str(error).split())}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
