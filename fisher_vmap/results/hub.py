"""Results folders on the Hugging Face hub, as data set repositories: "hf://datasets/OWNER/NAME@REVISION".

The data card of a results folder on the hub: what it is, where it comes from, and how to open it.
"""

import logging
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import yaml

from fisher_vmap import __version__
from fisher_vmap.errors import UserError
from fisher_vmap.progress import readable, step
from fisher_vmap.results.index import INDEX_NAME, METADATA_NAME, SHARD_FOLDER, TABLE_NAME, Index, sum_name
from fisher_vmap.results.share import copy_descriptions, copy_without_text, is_local_path, without_local_paths

if TYPE_CHECKING:
    from fisher_vmap.results.reader import Results


def data_card(results: "Results", repo_id: str, *, with_text: bool) -> str:
    """The card as Markdown with the hub's YAML header, made from the folder alone.

    Args:
        results: a finished folder.
        repo_id: "OWNER/NAME", where it will be.
        with_text: whether the prompts' text goes along.
    """
    metadata, index = results.metadata, results.index
    settings = without_local_paths(metadata["settings"])
    layout, table = index.layout, results.to_pandas()
    ok = table[table["status"] == "ok"]
    model, data = _name(settings.get("model_path")), _name(settings.get("dataset_name"))
    header: dict[str, Any] = {
        "pretty_name": f"Fisher matrices of {model} on {data}",
        "tags": ["fisher-information", "interpretability", "fisher_vmap"],
        "configs": [{"config_name": "prompts", "data_files": TABLE_NAME}],
        "size_categories": [_size(len(results))],
    }
    if "/" in data:
        header["source_datasets"] = [data]
    layers = "\n".join(
        f"| `{layer}` | {width} | {_median(ok, f'{layer}/trace'):.3g} | {_median(ok, f'{layer}/effective_rank'):.2f} |"
        for layer, width in layout.widths.items()
    )
    text = (
        "The prompts' text and tokens are in the table; their data set's terms hold here too."
        if with_text
        else "The prompts' text is left out; `source_row` is their row in the data set."
    )
    whole = index.fingerprint.get("estimator") == "full"
    of_what = "of the whole vocabulary" if whole else f"summed over the {layout.top_k} likeliest tokens"
    kept = "" if layout.means_only else "results[0].S, results[0].V      # singular values [R], directions [R, D]\n"
    versions = ", ".join(f"{name} {number}" for name, number in index.versions.items())
    asked = "\n".join(f"| `{name}` | `{value}` |" for name, value in settings.items() if value is not None)
    return f"""---
{yaml.safe_dump(header, sort_keys=False, allow_unicode=True).strip()}
---

# Fisher matrices of {model} on {data}

For each of {len(results):,} prompts ({len(ok):,} with results, {len(metadata["failed_prompts"]):,} failed,
{len(metadata["skipped_prompts"]):,} skipped), the Fisher information matrix of the next-token distribution with respect
to a bias on the residual stream, {of_what}, as its {layout.rank} leading singular
values and directions: F = V^T diag(S) V, in nats^2 per squared unit of the residual stream. The likeliest tokens cover
{_median(ok, "mass"):.0%} of the probability in the median prompt.

| layer | width | median trace | median effective rank |
| --- | --- | --- | --- |
{layers}

## How to open it

```python
from fisher_vmap import open_results

results = open_results("hf://datasets/{repo_id}")
{kept}results.mean()                    # the mean matrix, [D, D]
results.to_pandas()               # a row a prompt
```

{text}

## How it was made

By fisher_vmap {index.versions.get("fisher_vmap", __version__)}, with {versions}, and these settings:

| setting | value |
| --- | --- |
{asked}
"""


def _name(path: Any) -> str:
    """A hub id as it is; of a local path its last part, since the rest concerns nobody."""
    text = str(path or "unknown")
    local = text.startswith(("/", ".", "~")) or text.count("/") != 1 or Path(text).exists()
    return Path(text).name if local else text


def _median(table: Any, column: str) -> float:
    return float(np.nanmedian(table[column])) if len(table) else float("nan")


def _size(count: int) -> str:
    for limit, name in ((1e3, "n<1K"), (1e4, "1K<n<10K"), (1e5, "10K<n<100K"), (1e6, "100K<n<1M"), (1e7, "1M<n<10M")):
        if count < limit:
            return name
    return "n>10M"


log = logging.getLogger(__name__)

HUB = "hf://datasets/"
DESCRIPTIONS = (INDEX_NAME, METADATA_NAME)  # the files that hold the run's settings
_NAME = re.compile(r"([\w.-]+/[\w.-]+)(?:@([\w./-]+))?/?")


class Address(NamedTuple):
    """A repository on the hub; revision None is its main branch."""

    repo_id: str
    revision: str | None


def address(text: str) -> Address:
    """Read "hf://datasets/OWNER/NAME", with "@REVISION" if wanted, or "OWNER/NAME".

    Raises:
        UserError: it is neither.
    """
    found = _NAME.fullmatch(text.removeprefix(HUB))
    if found is None:
        raise UserError(f"{text!r} is no data set on the hub; expected {HUB}OWNER/NAME or {HUB}OWNER/NAME@REVISION")
    return Address(found[1], found[2])


def download(text: str, *, everything: bool = False, token: str | None = None) -> Path:
    """Fetch a results folder from the hub into its cache; what is there already is not fetched again.

    Args:
        text: its address.
        everything: the npz as well, which says nothing that the shards do not.
        token: of the hub; None: as `hf auth login` left it.

    Raises:
        UserError: no such address, no access, or no network.
    """
    from huggingface_hub import snapshot_download

    place = address(text)
    with _readable_errors(place.repo_id), step(f"fetching {place.repo_id}"):
        folder = snapshot_download(
            place.repo_id,
            repo_type="dataset",
            revision=place.revision,
            token=token,
            ignore_patterns=None if everything else ["*.npz"],
        )
    return Path(folder)


def push_to_hub(
    results: "Results", repo: str, *, private: bool = True, share_text: bool | None = None, token: str | None = None
) -> str:
    """Upload a finished results folder, with a data card that says what it is.

    Of settings that are paths of this machine only the last part goes along; a line of the log names them.

    Args:
        results: the folder.
        repo: "OWNER/NAME" or "hf://datasets/OWNER/NAME"; made if it is not there.
        private: whether a new repository is private.
        share_text: whether the prompts' text goes along, with their tokens and the kept columns that hold text. None:
            yes, unless the data set is gated or cannot be looked up, which is an error that asks.
        token: of the hub, one that may write; None: as `hf auth login` left it.

    Returns:
        The repository's address on the web.

    Raises:
        UserError: an unfinished folder, text of a gated data set that nobody has decided about, no access, no network.
    """
    from huggingface_hub import HfApi

    place = address(repo)
    if not results.index.complete:
        raise UserError(f"{results.folder} is unfinished; run the same command again to finish it, then push it")
    api = HfApi(token=token)
    with step("looking for the prompts' text"):
        texts = has_text(results)
    if texts and share_text is not False:
        gate = gated(api, results)
        if gate and share_text is None:
            raise UserError(
                f"{gate}, and its text would be shared with the results; pass share_text=True (--text) if its terms "
                "allow that, or share_text=False (--no-text) to leave the text out"
            )
        if gate:
            log.warning("%s: the text of %d prompts is shared in %s", gate, len(results), place.repo_id)
    with _readable_errors(place.repo_id), tempfile.TemporaryDirectory(prefix="fisher_vmap-") as temporary:
        folder, index = results.folder, results.index
        if texts and share_text is False:
            folder = Path(temporary, "results")
            with step("copying the results without the text"):
                index = copy_without_text(results.folder, results.index, folder)
        described = Path(temporary, "described")
        index = copy_descriptions(folder, index, described, without_local_paths)
        if cut := [name for name, value in results.metadata["settings"].items() if is_local_path(name, value)]:
            log.info("of %s, paths of this machine, only the last part is shared", ", ".join(cut))
        url = api.create_repo(place.repo_id, repo_type="dataset", private=private, exist_ok=True)
        where: dict[str, Any] = {"repo_id": place.repo_id, "repo_type": "dataset", "revision": place.revision}
        with step("writing the data card"):
            card = data_card(results, place.repo_id, with_text=texts and share_text is not False)
        api.upload_file(path_or_fileobj=card.encode(), path_in_repo="README.md", commit_message="Data card", **where)
        names = [name for name in file_names(index) if name not in DESCRIPTIONS]
        size = readable(sum((folder / name).stat().st_size for name in names))
        # Files that the repository has from an earlier run would not fit the index.
        with step(f"uploading {size} to {place.repo_id}"):
            api.upload_folder(
                folder_path=folder,
                allow_patterns=names,
                delete_patterns=[f"{SHARD_FOLDER}/*", "*.safetensors", "*.npz", "*.parquet"],
                commit_message="Fisher matrices",
                **where,
            )
        api.upload_folder(
            folder_path=described, allow_patterns=list(DESCRIPTIONS), commit_message="Index and settings", **where
        )
    return str(url)


def file_names(index: Index) -> list[str]:
    """The files of a finished folder, and no others that may lie in it."""
    names = [INDEX_NAME, *index.files, *([sum_name(index.folded)] if index.sum else [])]
    for shard in index.shards:
        names += [f"{SHARD_FOLDER}/{name}" for name in ([] if shard.folded else [shard.file]) + [shard.table]]
    return names


def has_text(results: "Results") -> bool:
    """Does the folder hold any prompt's text?"""
    return any(
        reader.table.column(name).null_count < reader.table.num_rows
        for reader in results.shards()
        for name in ("text", "prompt_tokens", *results.index.layout.keep_columns)
        if name in reader.table.schema.names
    )


def gated(api: Any, results: "Results") -> str | None:
    """Why a data set's text needs a decision before it is shared; None for a local file, or a data set open to all."""
    from huggingface_hub.errors import HfHubHTTPError

    read_from = re.match(r"hub (\S+) ", str(results.index.fingerprint.get("data")))
    if read_from is None:
        return None
    source = read_from[1]
    try:
        gate = api.dataset_info(source).gated
    except (*HfHubHTTPError.__bases__,) as error:  # type: ignore[misc]  # the HTTP client's, and the system's own
        return f"whether {source} is gated cannot be looked up ({type(error).__name__})"
    return f"{source} is a gated data set" if gate else None


@contextmanager
def _readable_errors(repo_id: str) -> Iterator[None]:
    """What the hub and the network say, as one line."""
    from huggingface_hub import errors

    try:
        yield
    except errors.GatedRepoError as error:
        raise UserError(f"{repo_id} is gated: accept its terms on its page, then `hf auth login`") from error
    except errors.RepositoryNotFoundError as error:
        raise UserError(
            f"the hub has no data set {repo_id}, or hides it: check the name and `hf auth login`"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise UserError(f"{repo_id} has no such revision; check what follows the @") from error
    except (*errors.HfHubHTTPError.__bases__,) as error:  # type: ignore[misc]  # also the HTTP client's, the system's
        reason = " ".join(str(error).split())[:160]
        raise UserError(
            f"no access to {repo_id} on the hub ({reason}); see to the network and `hf auth login`"
        ) from error
