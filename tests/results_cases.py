"""Small results folders for the tests: random factors, decomposed densely, written through the public writer."""

import hashlib
import json
from pathlib import Path

import numpy as np

from fisher_vmap.results.index import INDEX_NAME, ShardLayout
from fisher_vmap.results.record import LayerResult, PromptResult
from fisher_vmap.results.writer import ResultsWriter

FINGERPRINT = {"model_path": "tiny", "top_k_tokens": 4, "hook_layer_name": ["blocks.0"]}
SETTINGS = {**FINGERPRINT, "output_dir": Path("somewhere")}
RESOLVED = {"kernel": {"blocks.0": {"form": "layerwise", "why": "the chain is whole"}}, "max_batch_tokens": 512}


def make_layout(widths=None, top_k=4, rank=3, median_norm=True, **options):
    return ShardLayout(widths=widths or {"blocks.0": 7}, top_k=top_k, rank=rank, median_norm=median_norm, **options)


def factor(index, layer_number, K, D, seed=0):
    """A = diag(sqrt p) G of one prompt, [K, D] float64, with its log p [K]."""
    rng = np.random.default_rng([seed, index, layer_number])
    p = np.sort(rng.dirichlet(np.ones(K + 1))[:K])[::-1]
    log_probs = np.log(np.random.default_rng([seed, index]).dirichlet(np.ones(K + 1))[:K])
    log_probs = np.sort(log_probs)[::-1].astype(np.float32)
    p = np.exp(log_probs.astype(np.float64))
    return np.sqrt(p)[:, None] * rng.normal(size=(K, D)), log_probs


def make_prompt(index, layout, seed=0, **changes):
    rng = np.random.default_rng([seed, index, 99])
    K, R = layout.top_k, layout.rank
    layers = {}
    length = int(rng.integers(1, 9))
    for number, (layer, D) in enumerate(layout.widths.items()):
        A, log_probs = factor(index, number, K, D, seed)
        Q, root_S, V = np.linalg.svd(A, full_matrices=False)
        r = min(R, len(root_S))
        S = np.zeros(R)
        S[:r] = root_S[:r] ** 2
        V_RD, Q_KR = np.zeros((R, D)), np.zeros((K, R))
        V_RD[:r], Q_KR[:, :r] = V[:r], Q[:, :r]
        layers[layer] = LayerResult(S, V_RD, Q_KR, 3.0 + index, rng.random(length), float((root_S**2).sum()))
    values = {
        "index": index, "source_row": 10 + index, "text": f"prompt number {index}", "num_tokens": length,
        "kept": {column: f"{column} {index % 2}" for column in layout.keep_columns},
        "token_ids": rng.permutation(100)[:K], "log_probs": log_probs, "layers": layers,
    }  # fmt: skip
    return PromptResult(**{**values, **changes})


def without_numbers(index, status, reason):
    return PromptResult(index=index, source_row=10 + index, text="x", status=status, reason=reason)


def make_prompts(start, stop, layout, seed=0):
    """Prompt 2 failed and prompt 3 was skipped, in every folder."""
    special = {2: without_numbers(2, "failed", "not finite"), 3: without_numbers(3, "skipped", "empty prompt")}
    return [special.get(i) or make_prompt(i, layout, seed) for i in range(start, stop)]


def open_writer(folder, layout=None, shard_size=4, fingerprint=None, **options):
    return ResultsWriter.open(
        folder,
        layout=layout or make_layout(),
        shard_size=shard_size,
        fingerprint=FINGERPRINT if fingerprint is None else fingerprint,
        **{"resolved": RESOLVED, **options},
    )


def write_folder(
    folder, num_prompts=10, layout=None, *, finish=True, seed=0, save="both", export_npz=True, settings=None, **options
):
    """What the pipeline does with a folder: open, fill what is missing, finish. Returns the shards it computed."""
    layout = layout or make_layout()
    writer = open_writer(folder, layout, **{"settings": settings, **options})
    missing = writer.missing_shards(num_prompts)
    for number, start, stop in missing:
        writer.add(number, make_prompts(start, stop, layout, seed))
    if finish:
        writer.finish(settings=settings or SETTINGS, save=save, export_npz=export_npz)
    return [shard.number for shard in missing]


def without_fields(folder, *names):
    """Take fields of the layout out of a folder's index.json, as a package wrote it that did not know them."""
    path = Path(folder) / INDEX_NAME
    values = json.loads(path.read_text())
    for name in names:
        del values["layout"][name]
    text = json.dumps({**values, "checksum": "0" * 64}, indent=1)
    path.write_text(text.replace("0" * 64, hashlib.sha256(text.encode()).hexdigest(), 1))
    return values


def digests(folder):
    """SHA-256 of every file of a folder, but for the lock."""
    files = sorted(path for path in Path(folder).rglob("*") if path.is_file() and path.name != ".lock")
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
