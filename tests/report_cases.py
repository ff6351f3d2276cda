"""Results folders for the tests of the report: prompts of a shape, and five among them that share a direction."""

import numpy as np
from results_cases import make_layout, open_writer

from fisher_vmap.results.reader import open_results
from fisher_vmap.results.record import LayerResult, PromptResult


def planted(kind, seed=0, *, count=200, few=5, width=64, rank=8, share=0.2):
    """Factors [count, rank, width] of prompts, `few` of which have `share` of their trace along u, the others nothing.

    kind "common": all react within the same 12 directions; "private": each in its own. Traces differ by factors of e.
    """
    rng = np.random.default_rng(seed)
    u = rng.normal(size=width)
    u /= np.linalg.norm(u)
    who = np.sort(rng.choice(count, few, replace=False))
    common = np.linalg.qr(rng.normal(size=(width, 12)))[0].T
    factors = np.empty((count, rank, width))
    for i in range(count):
        G = rng.normal(size=(rank, width)) * np.linspace(1.5, 0.5, rank)[:, None]
        if kind == "common":
            G = (rng.normal(size=(rank, 12)) * np.linspace(1.5, 0.3, 12)) @ common + 0.1 * G
        G -= np.outer(G @ u, u)
        if i in who:
            G[-1] = np.sqrt(share / (1 - share) * (G[:-1] ** 2).sum()) * u
        factors[i] = G * np.exp(0.5 * rng.normal()) / np.linalg.norm(G)
    return factors, who, u


def write_factors(folder, layers, *, shard_size=32, texts=None, tokens=True, values=None, words=None, **options):
    """A finished folder from {layer: factors [n, K, D]}; texts and tokens of no meaning.

    `values` has the values of kept columns, used in turn; `words` the top tokens' texts.
    """
    options |= {"keep_columns": tuple(values)} if values else {}
    first = next(iter(layers.values()))
    n, K, _ = first.shape
    layout = make_layout({name: f.shape[2] for name, f in layers.items()}, top_k=K, rank=K, **options)
    log_probs = np.log(np.linspace(0.2, 0.05, K) / 1.2).astype(np.float32)
    svds = {name: np.linalg.svd(f, full_matrices=False) for name, f in layers.items()}
    writer = open_writer(folder, layout, shard_size=shard_size)
    for number, start, stop in writer.missing_shards(n):
        prompts = []
        for i in range(start, stop):
            T = 3 + i % 5
            found = {
                name: LayerResult(s[i] ** 2, V[i], Q[i], 5.0, np.linspace(1, 2, T), (s[i] ** 2).sum())
                for name, (Q, s, V) in svds.items()
            }
            text = f"prompt number {i}" if texts is None else texts[i]
            kept = {column: f"{column} {i % 3}" for column in layout.keep_columns}
            kept |= {column: found[i % len(found)] for column, found in (values or {}).items()}
            top = [f" t{k}" for k in range(K)] if words is None else words
            stored = {"top_tokens": top, "prompt_tokens": [text[:3], *["\n"] * (T - 1)]}
            prompts.append(
                PromptResult(
                    index=i, text=text, num_tokens=T, kept=kept, token_ids=np.arange(K), log_probs=log_probs,
                    layers=found, **(stored if tokens else {}),
                )
            )  # fmt: skip
        writer.add(number, prompts)
    save = "mean" if layout.means_only else "both"
    writer.finish(settings={"model_path": "/models/tiny", "dataset_name": "owner/data"}, save=save, export_npz=False)
    return open_results(folder)
