"""`python -m fisher_vmap.info DIR`: what a results folder holds, on one screen."""

import sys

if __name__ == "__main__":
    from fisher_vmap.__main__ import start

    sys.exit(start("info"))

from collections.abc import Iterator, Sequence
from itertools import groupby
from operator import itemgetter

import numpy as np
import pyarrow.compute as pc

from fisher_vmap.cli import command, folder_command
from fisher_vmap.data.files import Count, Extent
from fisher_vmap.escape import short, visible
from fisher_vmap.progress import readable
from fisher_vmap.results.index import Index, sum_name
from fisher_vmap.results.outputs import columns_of, note_on_targets
from fisher_vmap.results.reader import Results, open_results
from fisher_vmap.results.record import RUN, natural, several
from fisher_vmap.results.targets import targets_in_words
from fisher_vmap.run.settings import Settings

SHOWN = 5  # failed prompts, and skipped ones
VALUE = 200  # characters of a setting's value


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Print what a finished or unfinished results folder holds; returns the exit code."""
    what = "Show what a results folder holds: prompts, layers, settings, what failed, and sizes."
    return folder_command("info", what, lambda folder: describe(open_results(folder, allow_incomplete=True)), argv)


def describe(results: Results) -> Iterator[str]:
    """The lines to print.

    Raises:
        UserError: the folder is damaged.
    """
    index, metadata = results.index, results.metadata
    failed, skipped = metadata["failed_prompts"], metadata["skipped_prompts"]
    extent = extent_of(index)
    total = "an unknown number of prompts" if extent.taken is None else str(extent)
    complete = "complete" if extent.is_whole else f"complete: {extent}"
    yield f"{results.folder}: {complete if index.complete else f'unfinished, of {total}'}"
    ok = len(results) - len(failed) - len(skipped)
    yield f"prompts   {len(results):,}: {ok:,} with results, {len(failed):,} failed, {len(skipped):,} skipped"
    forms = (index.resolved or {}).get("forms", {})
    described = [
        (layer, f"width {width:,}, kernel form {forms.get(layer, {}).get('form', 'not known')}")
        for layer, width in index.layout.widths.items()
    ]
    for what, alike in groupby(described, key=itemgetter(1)):
        names = [layer for layer, _ in alike]
        for name in names if len(names) < RUN else [several(names)]:
            yield f"layer     {visible(name, spaces=False)}: {what}"
    if wide := [layer for layer in index.layers if results.is_wide(layer)]:
        yield f"mean      none at {several(wide)}, which is too wide; directions() and contrast() do without"
    yield from _targets(results)
    shards = sum(shard.table_bytes + (0 if shard.folded else shard.bytes) for shard in index.shards)
    sizes = {f"{len(index.shards):,} shards of up to {index.shard_size} prompts": shards}
    if index.sum is not None:
        sizes[f"{sum_name(index.folded)}: the sum over {index.sum.prompts:,} prompts, kept alone"] = index.sum.bytes
    archives = sorted((name for name in index.files if name.endswith(".npz")), key=natural)
    if len(archives) >= RUN:
        sizes[several(archives)] = sum(index.files[name].bytes for name in archives)
        archives = []
    others = [name for name in index.files if not name.endswith(".npz")]
    sizes |= {name: index.files[name].bytes for name in [*archives, *others]}
    for number, (name, size) in enumerate(sizes.items()):
        yield f"{'' if number else 'on disk':9} {readable(size):>8}  {name}"
    defaults = {name: field.default for name, field in Settings.model_fields.items()}
    changed = {name: value for name, value in metadata["settings"].items() if value != defaults.get(name)}
    shown = ", ".join(f"{name} {short(visible(str(value), spaces=False), VALUE)}" for name, value in changed.items())
    yield f"settings  {shown or ('the defaults' if index.complete else 'not stored before the end')}"
    yield "versions  " + ", ".join(f"{name} {number}" for name, number in index.versions.items())
    for word, prompts in (("failed", failed), ("skipped", skipped)):
        for prompt in prompts[:SHOWN]:
            yield f"{word:9} prompt {prompt['index']}: {visible(str(prompt['reason']), spaces=False)}"
        if len(prompts) > SHOWN:
            yield f"{word:9} and {len(prompts) - SHOWN:,} more: metadata.yaml lists them"
    if note := note_on_targets(results.folder, index):
        yield f"note      {note}"


def _targets(results: Results) -> Iterator[str]:
    """Whose distribution was read, what is known of it, and which matrix was made of it."""
    index, layout = results.index, results.index.layout
    yield f"targets   {targets_in_words(index.fingerprint)}"
    if layout.pairs:
        table = columns_of(results.folder, index, ("status", "targets", "mean_entropy", "mean_log_prob"))
        table = table.filter(pc.field("status") == "ok")
        targets, entropy, log_prob = (table.column(name).to_numpy() for name in table.schema.names[1:])
        if len(targets):
            some = np.isfinite(log_prob)
            follows = f", log p of what follows {log_prob[some].mean():.3g}" if some.any() else ""
            yield (
                f"{'':9} {targets.sum():,} in all, {targets.mean():.3g} a prompt; on average entropy "
                f"{entropy.mean():.3g} nats{follows}"
            )
    estimator = index.fingerprint.get("estimator")
    of_each = f" a target, {layout.pairs} (target, token) pairs kept" if layout.pairs else ""
    how = f"estimator {estimator}, " if estimator else ""
    yield f"matrix    {how}{layout.top_k} tokens{of_each}, rank {layout.rank}, vectors in {layout.vectors_dtype}"


def extent_of(index: Index) -> Extent:
    """Which part of its data set a run takes, as far as its folder tells."""
    rows, settings = (index.resolved or {}).get("data_rows"), index.settings or {}
    limit, offset = settings.get("num_prompts"), settings.get("offset") or 0
    shuffled = settings.get("shuffle_seed") is not None
    limited = isinstance(limit, int) and index.num_prompts is not None and limit <= index.num_prompts
    return Extent(index.num_prompts, Count(**rows) if rows else None, offset, shuffled, limited)
