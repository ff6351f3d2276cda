"""The page: figures, tables and single prompts in one HTML file that includes plotly.js and needs no network."""

from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from fisher_vmap import __version__
from fisher_vmap.escape import script_json, short, visible
from fisher_vmap.report.data import LayerSurvey, Survey, mean_share
from fisher_vmap.report.figures import layer_figures, layers_figure
from fisher_vmap.report.lens import LensSection, asset, scripts, template
from fisher_vmap.report.outliers import FEW, WORTH_A_LOOK
from fisher_vmap.report.targets import describe_targets, describe_trades, shade_of, tiles_of
from fisher_vmap.results.files import replacing
from fisher_vmap.results.local_paths import without_local_paths
from fisher_vmap.results.outputs import note_on_targets
from fisher_vmap.results.record import PromptRecord
from fisher_vmap.results.targets import targets_in_words

NAME = 80  # characters of a model's or a data set's name in the title


def write_page(path: Path, survey: Survey, lens: LensSection | None = None) -> int:
    """Write the page; returns its size in bytes.

    Args:
        path: the file.
        survey: what it shows of a results folder.
        lens: the section on a Jacobian lens; None: there is none.

    Raises:
        UserError: the file cannot be written.
    """
    text = render_page(survey, lens).encode()
    with replacing(path) as file:
        file.write(text)
    return len(text)


def render_page(survey: Survey, lens: LensSection | None = None) -> str:
    """The page's HTML."""
    settings = without_local_paths(survey.results.metadata["settings"], survey.results.index)
    model, data = (short(visible(str(settings.get(name) or "")), NAME) for name in ("model_path", "dataset_name"))
    title = f"{len(survey.rows.index):,} prompts of {data} in {model}" if model else visible(survey.results.folder.name)
    layers = survey.layers[0].name if len(survey.layers) == 1 else f"{len(survey.layers)} layers"
    versions = survey.results.index.versions
    made_by = f"fisher_vmap {__version__}; the results by " + ", ".join(
        f"{name} {versions[name]}" for name in ("fisher_vmap", "torch", "transformers") if name in versions
    )
    return template("page.html.j2").render(
        title=title,
        heading="Fisher report",
        subtitle=f"{visible(survey.results.folder.resolve().name)} · {visible(layers)}",
        single=not survey.means_only,
        several=len(survey.layers) > 1,
        covers=_covers(survey),
        targets=targets_in_words(survey.results.index.fingerprint) if survey.rows.of_targets else None,
        samples=survey.results.index.fingerprint.get("samples", 1),
        warning=note_on_targets(survey.results.folder, survey.results.index),
        notes=sampling_notes(survey),
        footer=f"Made by {made_by}. Units: F is in nats² per squared unit of the residual stream.",
        lens=lens,
        css=Markup(asset("page.css")),
        plotly=Markup(get_plotlyjs()),
        js=scripts("basics.js", "page.js", *(("lens.js",) if lens else ())),
        data=Markup(script_json(page_data(survey))),
    )


def page_data(survey: Survey) -> dict[str, Any]:
    """The data for the page's script."""
    rows = survey.rows
    listed = np.flatnonzero(np.isin(rows.index, survey.listed))
    ok = int(rows.ok.sum())
    status = {word: rows.status.count(word) for word in ("failed", "skipped")}
    without = ", ".join(f"{count} {word}" for word, count in status.items() if count) or "all with results"
    widths = sorted({layer.width for layer in survey.layers})
    layout, of_targets = survey.results.index.layout, rows.of_targets
    mass = _percent(np.nanmedian(rows.mass)) if ok and of_targets is None else "–"
    views = {name: survey.results.at(name) for name in survey.results.layers}
    return {
        "single": not survey.means_only,
        "total": len(rows.index),
        "tiles": [
            (f"{len(rows.index):,}", f"prompts, {without}"),
            (f"{len(survey.layers)}", f"layer{'s' * (len(survey.layers) > 1)} of width {', '.join(map(str, widths))}"),
            (f"{layout.rank}", "singular values kept, " + ("of the whole vocabulary's" if _whole(survey) else "of F")),
            *([(mass, "of the probability covered (median)")] if of_targets is None else tiles_of(of_targets)),
        ],
        "outcome": "next tokens" if of_targets is None else "completion" if of_targets.completions else "tokens traded",
        "written": bool(of_targets and of_targets.completions),
        "average": "median" if layout.median_norm else "mean",
        "shade": shade_of(rows.mass, of_targets).title,
        "rows": {
            "index": rows.index[listed].tolist(),
            "status": [rows.status[i] for i in listed],
            "text": [rows.text[i] for i in listed],
            "top": [rows.top[i] for i in listed],
            "tokens": rows.tokens[listed].tolist(),
            "mass": rounded(rows.mass[listed]),
            "groups": {name: [values[i] for i in listed] for name, values in rows.groups.items()},
            "targets": None if of_targets is None else rounded(of_targets.targets[listed]),
            "entropy": None if of_targets is None else rounded(of_targets.mean_entropy[listed]),
            "log_prob": None if of_targets is None else rounded(of_targets.mean_log_prob[listed]),
        },
        "layers": [_layer_data(survey, number, listed) for number in range(len(survey.layers))],
        "layer_figures": {name: layers_figure(survey, name) for name in ("trace", "trace_norm2", "effective_rank")}
        if len(survey.layers) > 1 and ok
        else {},
        "details": {
            int(index): describe_prompt({name: view[int(index)] for name, view in views.items()})
            for index in survey.shown
        },
    }


def describe_prompt(records: dict[str, PromptRecord]) -> dict[str, Any]:
    """What the page shows of one prompt, from its record at each layer."""
    first = next(iter(records.values()))
    names = first.top_tokens or tuple(f"#{token}" for token in first.token_ids)
    several = describe_targets(first, rounded)
    pieces = None if first.prompt_tokens is None else list(first.prompt_tokens)
    if several is not None and several["start"] is not None and pieces is not None:
        pieces += several["blocks"][0]["pieces"]  # of a single completion, the energy of its tokens follows
    return {
        "text": first.text,
        "pieces": pieces,
        "targets": several,
        "top": list(names),
        "ids": first.token_ids.tolist(),
        "p": rounded(np.exp(first.log_probs)),
        "layers": {
            layer: {
                "S": rounded(record.S[record.S > 0]),
                "trace": rounded(record.trace),
                "norm": rounded(record.residual_norm),
                "energy": rounded(record.position_energy),
                **(
                    {"trades": [rounded(row) for row in record.trades()[:, record.S > 0].T]}
                    if several is None
                    else describe_trades(record, rounded)
                ),
            }
            for layer, record in records.items()
        },
    }


def rounded(values: Any, digits: int = 4) -> Any:
    """Numbers to a few significant digits, for JSON; NaN becomes None."""
    if np.ndim(values):
        return [rounded(value, digits) for value in values]
    return float(f"{float(values):.{digits}g}") if np.isfinite(values) else None


def sampling_notes(survey: Survey) -> list[str]:
    """What the page leaves out of a large run, one sentence each."""
    ok, total = int(survey.rows.ok.sum()), len(survey.rows.index)
    if survey.means_only:
        return []
    notes = []
    compared = min((len(layer.similarity.prompts) for layer in survey.layers if layer.similarity), default=ok)
    if compared < ok:
        notes.append(f"The similarity map compares {compared:,} prompts drawn at random of {ok:,}.")
    if len(survey.points) < ok:
        notes.append(f"The scatter plot shows {len(survey.points):,} of {ok:,} prompts, all outliers among them.")
    if len(survey.shown) < ok:
        notes.append(f"{len(survey.shown):,} prompts can be opened in full: outliers first, others at random.")
    if len(survey.listed) < total:
        notes.append(f"The table has {len(survey.listed):,} of {total:,} prompts.")
    if notes:
        notes.append("Spectra, histograms, means and outliers are of all prompts.")
    return notes


def findings(survey: Survey, layer: LayerSurvey) -> list[str]:
    """The layer in a few sentences."""
    found = []
    if layer.S is not None and len(layer.S):
        S = layer.S.astype(np.float64)
        share = S[:, 0] / np.maximum(S.sum(1), 1e-300)
        low, middle, high = np.quantile(share, [0.05, 0.5, 0.95])
        found.append(
            f"The leading direction holds {_percent(middle)} of the kept trace in the median prompt, and "
            f"{_percent(low)} to {_percent(high)} in nine of ten."
        )
    if len(shares := mean_share(layer)) and layer.mean_trace > 0:
        found.append(
            f"Of the mean over prompts, the leading direction holds {_percent(shares[0])} of the trace and the leading "
            f"{len(shares)} hold {_percent(shares[-1])}, of {layer.width} directions."
        )
    trace = survey.rows.trace[layer.name]
    trace = trace[np.isfinite(trace) & (trace > 0)]
    if len(trace):
        ratio = np.quantile(trace, 0.95) / np.quantile(trace, 0.05)
        found.append(f"Between the 5% and the 95% quantile of the prompts the trace grows {ratio:.2g}-fold.")
    if layer.scores is not None:
        count = int((layer.scores.total >= WORTH_A_LOOK).sum())
        some = f"{count:,} prompts stand" if count != 1 else "1 prompt stands"
        few = int((layer.scores.z["shared with few"] >= WORTH_A_LOOK).sum())
        found.append(
            f"{some} out from the rest (robust z of {WORTH_A_LOOK} or more)"
            + (f"; {few} along a direction shared with at most {FEW:.0%} of the prompts." if few else ".")
        )
    return found


def _layer_data(survey: Survey, number: int, listed: Any) -> dict[str, Any]:
    layer, rows = survey.layers[number], survey.rows
    score: list[float | None] = [None] * len(rows.index)
    if layer.scores is not None:
        place = {int(index): i for i, index in enumerate(rows.index)}
        for index, value in zip(layer.scores.prompts, layer.scores.total, strict=True):
            score[place[int(index)]] = rounded(value, 3)
    rank = rows.effective_rank[layer.name]
    return {
        "name": layer.name,
        "figures": layer_figures(survey, number),
        "similarity": None if layer.similarity is None else layer.similarity.prompts.tolist(),
        "trace": rounded(rows.trace[layer.name][listed]),
        "trace_norm2": rounded(rows.trace_norm2[layer.name][listed]),
        "effective_rank": rounded(rank[listed]),
        "score": [score[i] for i in listed],
        "outliers": [
            {"index": o.index, "score": rounded(o.score, 3), "reasons": list(o.reasons), "company": list(o.company)}
            for o in layer.outliers
        ],
        "tiles": [
            (f"{np.nanmedian(rank):.2g}" if np.isfinite(rank).any() else "–", f"effective rank (median), {layer.name}"),
            *([(f"{len(layer.outliers)}", "prompts unlike the rest")] if layer.scores is not None else []),
        ],
        "findings": findings(survey, layer),
    }


def _whole(survey: Survey) -> bool:
    return survey.results.index.fingerprint.get("estimator") in ("full", "sampled")


def _covers(survey: Survey) -> str:
    """How much of the full matrix is shown, in words."""
    layout = survey.results.index.layout
    if _whole(survey):
        return f"as far as the {layout.rank} leading directions of the whole vocabulary's matrix show it"
    return f"as far as the top {layout.top_k} tokens{' of each target' * bool(layout.pairs)} show it"


def _percent(x: float) -> str:
    return f"{x:.0%}" if x >= 0.0995 else f"{x:.1%}"
