"""The data card of a results folder on the hub: what it is, where it comes from, and how to open it."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import yaml

from fisher_vmap._version import __version__
from fisher_vmap.sharing.local_paths import without_local_paths
from fisher_vmap.storage.index import TABLE_NAME

if TYPE_CHECKING:
    from fisher_vmap.results import Results


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
