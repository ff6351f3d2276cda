"""The end of a run: the files made from all shards are written, then the index says complete."""

from pathlib import Path
from typing import Any

from fisher_vmap.errors import UserError
from fisher_vmap.progress import step
from fisher_vmap.storage.fingerprint import compare_fingerprints
from fisher_vmap.storage.folder import remove_leftovers
from fisher_vmap.storage.folding import fold
from fisher_vmap.storage.index import Index, read_index, write_index
from fisher_vmap.storage.lock import folder_lock
from fisher_vmap.storage.products import Save, is_whole, product_names, write_product


def finish_folder(
    folder: Path,
    fingerprint: dict[str, Any],
    num_prompts: int | None = None,
    *,
    settings: dict[str, Any] | None = None,
    save: Save = "both",
    export_npz: bool = True,
) -> Index:
    """Make prompts.parquet, mean.safetensors, the npz and metadata.yaml, and mark the folder complete.

    A folder that has all of it already is left alone. Whoever is killed in here can be followed by anyone: what is
    whole is kept, the rest is done again.

    Args:
        folder: a results folder with all its shards.
        fingerprint: that of the run that finishes it.
        num_prompts: by default the number that `ResultsWriter.missing_shards` was asked for.
        settings: the settings used, for metadata.yaml; None: those that the index has.
        save: "both", "prompts" to leave the mean out, or "mean" to leave the prompts' matrices out.
        export_npz: write the npz, about twice as large as the shards.

    Returns:
        The index of the finished folder.

    Raises:
        UserError: a shard is missing or damaged, the disk is full, or the folder is of another run.
    """
    with step("finishing the folder"), folder_lock(folder):
        index = read_index(folder)
        compare_fingerprints(folder, index.fingerprint, fingerprint)
        total = max(index.num_prompts or 0 if num_prompts is None else num_prompts, index.stop)
        if missing := index.missing(total):
            numbers = ", ".join(map(str, missing[:5])) + (", ..." if len(missing) > 5 else "")
            raise UserError(
                f"{folder} lacks {len(missing)} shards ({numbers}) of its {total} prompts; run the same command again, "
                f"with num_prompts {total} or more"
            )
        settings = (index.settings or {}) if settings is None else settings
        names = product_names(index, save, export_npz)
        index = fold(folder, index, least=1)
        whole = {name: index.files[name] for name in names if is_whole(folder, name, index.files.get(name))}
        if not (index.complete and set(whole) == set(names) == set(index.files)):
            # metadata.yaml, the last, is written anew with any other file: the settings may have changed with it.
            files = {name: entry for name, entry in whole.items() if name != names[-1]}
            index = index.model_copy(update={"complete": False, "num_prompts": total, "files": files})
            write_index(folder, index)
            for name in names:
                if name not in files:
                    files = dict(sorted({**files, name: write_product(folder, name, index, settings)}.items()))
                    index = index.model_copy(update={"files": files, "complete": len(files) == len(names)})
                    write_index(folder, index)
        remove_leftovers(folder, index)
    return index
