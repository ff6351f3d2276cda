"""The data card of a shared results folder: Markdown, with the hub's YAML header.

Names and settings are anybody's text: `escape.py` writes them so that no renderer reads markup into them.
"""

import re
from typing import Any

import numpy as np
import yaml

from fisher_vmap import __version__
from fisher_vmap.escape import markdown, markdown_code, one_line
from fisher_vmap.results.index import TABLE_NAME, Index
from fisher_vmap.results.means import dense_layers
from fisher_vmap.results.targets import targets_in_words

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)


def data_card(index: Index, metadata: dict[str, Any], table: Any, repo_id: str, with_text: bool) -> str:
    """The card's text.

    Args:
        index: of the folder.
        metadata: its metadata.yaml, without local paths.
        table: its prompts table, a pandas DataFrame.
        repo_id: where it will be, "owner/name".
        with_text: whether the prompts' text is shared.
    """
    settings, layout, ok = metadata["settings"], index.layout, table[table["status"] == "ok"]
    model, data = (str(settings.get(name) or "unknown") for name in ("model_path", "dataset_name"))
    layers = "\n".join(
        f"| {markdown_code(name)} | {width} | {_median(ok, f'{name}/trace'):.3g} "
        f"| {_median(ok, f'{name}/effective_rank'):.2f} |"
        for name, width in layout.widths.items()
    )
    text = (
        "The prompts' text and tokens are in the table; their data set's terms hold here too."
        if with_text
        else "The prompts' text is left out; `source_row` is their row in the data set."
    )
    whole = index.fingerprint.get("estimator") in ("full", "sampled")
    of_what = "of the whole vocabulary" if whole else f"summed over the {layout.top_k} likeliest tokens"
    if layout.pairs:
        which = f"the next-token distributions at its targets ({markdown(targets_in_words(index.fingerprint))})"
        how_much = (
            f"The median prompt has\n{_median(ok, 'targets'):.0f} targets; their mean entropy is "
            f"{_median(ok, 'mean_entropy'):.3g} nats."
        )
    else:
        which = "the next-token distribution"
        how_much = f"The likeliest tokens cover\n{_median(ok, 'mass'):.0%} of the probability in the median prompt."
    kept = "" if layout.means_only else "results[0].S, results[0].V      # singular values [R], directions [R, D]\n"
    mean = "results.mean()                    # the mean matrix, [D, D]"
    if layout.layers[0] not in dense_layers(layout):
        mean = "results.directions(5)             # the mean's leading directions"
    versions = ", ".join(markdown(f"{name} {number}") for name, number in index.versions.items())
    asked = "\n".join(
        f"| {markdown_code(name)} | {markdown_code(value)} |" for name, value in settings.items() if value is not None
    )
    return f"""---
{_header(index, model, data)}
---

# Fisher matrices of {markdown(model)} on {markdown(data)}

For each of {index.prompts:,} prompts ({len(ok):,} with results, {len(metadata["failed_prompts"]):,} failed,
{len(metadata["skipped_prompts"]):,} skipped), the Fisher information matrix of {which} with respect
to a bias on the residual stream, {of_what}, as its {layout.rank} leading singular
values and directions: F = V^T diag(S) V, in nats^2 per squared unit of the residual stream. {how_much}

| layer | width | median trace | median effective rank |
| --- | --- | --- | --- |
{layers}

## How to open it

```python
from fisher_vmap import open_results

results = open_results("hf://datasets/{repo_id}")
{kept}{mean}
results.to_pandas()               # a row a prompt
```

The table alone, `{TABLE_NAME}`, is what the hub's viewer shows and what the library `datasets` loads:

```python
from datasets import load_dataset

table = load_dataset("{repo_id}", "prompts", split="train")
```

{text}

## How it was made

By fisher_vmap {markdown(index.versions.get("fisher_vmap", __version__))}, with {versions}, and these settings:

| setting | value |
| --- | --- |
{asked}
"""


def _header(index: Index, model: str, data: str) -> str:
    """The YAML header, each value on a line of its own, whatever its characters."""
    header: dict[str, Any] = {
        "pretty_name": f"Fisher matrices of {one_line(model)} on {one_line(data)}",
        "tags": ["fisher-information", "interpretability", "fisher_vmap"],
        "size_categories": [_size(index.prompts)],
    }
    if TABLE_NAME in index.files:
        header["configs"] = [{"config_name": "prompts", "data_files": TABLE_NAME}]
    if _HUB_ID.fullmatch(data):
        header["source_datasets"] = [data]
    return yaml.safe_dump(header, sort_keys=False, allow_unicode=True, width=10**6).strip()


def _median(table: Any, column: str) -> float:
    return float(np.nanmedian(table[column])) if len(table) else float("nan")


def _size(count: int) -> str:
    for limit, name in ((1e3, "n<1K"), (1e4, "1K<n<10K"), (1e5, "10K<n<100K"), (1e6, "100K<n<1M"), (1e7, "1M<n<10M")):
        if count < limit:
            return name
    return "n>10M"
