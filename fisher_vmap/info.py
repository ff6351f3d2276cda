"""`python -m fisher_vmap.info DIR`: what a results folder holds, on one screen."""

import sys
from collections.abc import Iterator, Sequence
from itertools import groupby
from operator import itemgetter

from fisher_vmap.cli import command, folder_command
from fisher_vmap.escape import short, visible
from fisher_vmap.progress import readable
from fisher_vmap.results.index import sum_name
from fisher_vmap.results.reader import Results, open_results
from fisher_vmap.results.record import RUN, natural, several
from fisher_vmap.run.settings import Settings

SHOWN = 5  # failed prompts, and skipped ones
VALUE = 200  # characters of a setting's value


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Print what a finished or unfinished results folder holds; returns the exit code."""
    what = "Show what a results folder holds: prompts, layers, settings, what failed, and sizes."
    return folder_command(
        "info", what, lambda folder: describe(open_results(folder, allow_incomplete=True)), argv, long=False
    )


def describe(results: Results) -> Iterator[str]:
    """The lines to print.

    Raises:
        UserError: the folder is damaged.
    """
    index, metadata = results.index, results.metadata
    failed, skipped = metadata["failed_prompts"], metadata["skipped_prompts"]
    total = "an unknown number of" if index.num_prompts is None else f"{index.num_prompts:,}"
    yield f"{results.folder}: {'complete' if index.complete else f'unfinished, of {total} prompts'}"
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
    yield f"matrix    {index.layout.top_k} tokens, rank {index.layout.rank}, vectors in {index.layout.vectors_dtype}"
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


if __name__ == "__main__":
    sys.exit(main())
