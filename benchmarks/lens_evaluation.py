"""How good is a lens? `python -m benchmarks.lens_evaluation --lens DIR --texts FILE`, on texts it was not fitted on.

(a) KL(model || lens) of the next-token distributions and (b) the rank of the true next token, for each layer, by the
Jacobian lens and by the logit lens. (c) The KL that a step at a layer is predicted to have beside the KL it has.
(d) Which ten tokens hold most of that KL: the first by the lens's logits, or by their predicted share of it. The
numbers go into a JSON file, and from there into docs/lens-evaluation.md (`--render` alone writes the page again).
"""

import argparse
import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import spearmanr
from torch import Tensor

from benchmarks import lens_evaluation_page
from benchmarks.steering_measure import Site
from benchmarks.timing import machine, write_json
from fisher_vmap import FisherModel
from fisher_vmap.demo import demo_model
from fisher_vmap.lens.jacobian_lens import JacobianLens
from fisher_vmap.lens.matrices import SKIP_FIRST
from fisher_vmap.lens.reading import Streams, along, log_probabilities, streams
from fisher_vmap.linearize.linear_map import undisturbed
from fisher_vmap.load.model import load_model
from fisher_vmap.model.head import likeliest
from fisher_vmap.model.layers import decoder_blocks
from fisher_vmap.objective import divergence

ROOT = Path(__file__).parent.parent
KEPT = ROOT / "benchmarks" / "results" / "lens.json"
PAGE = ROOT / "docs" / "lens-evaluation.md"
FIGURE = ROOT / "docs" / "images" / "lens-evaluation.png"
LOGIT, JACOBIAN = "logit lens", "Jacobian lens"
TOP = 10  # tokens of a top, in (b) and (d)
SMALL = 1e-4  # nats: the KL that a step is predicted to have; its length follows
KINDS = {"random": 6, "singular vectors of J": 5, "sensitive directions": 5}  # directions a layer
AGREES = 1e-3  # nats: how far log-probabilities of the two ways to run the model may be apart


def cut(texts: Sequence[str], tokenizer: Any, count: int, tokens: int) -> Tensor:
    """[count, tokens]: the first texts that are long enough, cut.

    Raises:
        ValueError: too few are.
    """
    rows: list[list[int]] = []
    for text in texts:
        ids = tokenizer(text)["input_ids"][:tokens]
        rows += [ids] if len(ids) == tokens else []
        if len(rows) == count:
            return torch.tensor(rows)
    raise ValueError(f"{len(rows)} of {len(texts)} texts have {tokens} tokens; expected {count}: give more texts")


def evaluate(
    fisher: FisherModel, lens: JacobianLens, ids_BT: Tensor, *, step_texts: int, step_layers: int, draws: int, seed: int
) -> Iterator[dict[str, Any]]:
    """Measure; yields the numbers so far, whole at the end.

    Args:
        fisher: the model.
        lens: a lens with a metric.
        ids_BT: the texts.
        step_texts: of how many texts steps are measured.
        step_layers: at how many layers, evenly spread.
        draws: of each of these texts, how many positions for (d).
        seed: of random directions and positions.
    """
    skip, T = int(lens.metadata.get("skip_first", SKIP_FIRST)), ids_BT.shape[1]
    valid = slice(skip, T - 1)
    chosen = sorted({lens.layers[round(i)] for i in np.linspace(0, len(lens.layers) - 1, step_layers).tolist()})
    known = [_streams(fisher, ids_T, lens.layers) for ids_T in ids_BT]
    kept: dict[str, Any] = {
        "seed": seed, "texts": len(ids_BT), "tokens": T, "skip_first": skip, "step_texts": step_texts, "draws": draws,
        "small": SMALL, "positions": len(ids_BT) * (T - 1 - skip), "steps": {}, "orders": {},
    }  # fmt: skip
    found: dict[tuple[int, str], list[Tensor]] = {}
    own = []
    with undisturbed(fisher.model, fisher.precision), torch.no_grad():
        for ids_T, text in zip(ids_BT, known, strict=True):
            log_p_NV, next_N = log_probabilities(text.head, text.top[valid]), ids_T[skip + 1 :]
            p_NV = log_p_NV.exp()
            own.append(_ranks(log_p_NV, next_N))
            entropy_N = -torch.linalg.vecdot(p_NV, log_p_NV)
            for layer in lens.layers:
                h_ND = text.outputs[layer][valid]
                for name, rows_ND in ((LOGIT, h_ND), (JACOBIAN, h_ND @ lens.of(layer).to(h_ND).T)):
                    log_q_NV = log_probabilities(text.head, rows_ND)
                    kl_N = -entropy_N - torch.linalg.vecdot(p_NV, log_q_NV)
                    found.setdefault((layer, name), []).append(torch.stack([kl_N, _ranks(log_q_NV, next_N).to(kl_N)]))
    kept["model"] = _told(None, torch.cat(own))
    kept["layers"] = {
        str(layer): {name: _told(*torch.cat(found[layer, name], 1)) for name in (LOGIT, JACOBIAN)}
        for layer in lens.layers
    }
    yield kept
    generator, some = torch.Generator().manual_seed(seed), known[:step_texts]
    with undisturbed(fisher.model, fisher.precision), torch.no_grad():
        base_BNV = torch.stack([log_probabilities(text.head, text.top[valid]) for text in some])
    for layer in chosen:
        kept["steps"][str(layer)] = _steps(fisher, lens, layer, some, base_BNV, valid, generator)
        kept["orders"][str(layer)] = _orders(fisher, lens, layer, some, base_BNV, valid, draws, generator)
        yield kept


def _streams(fisher: FisherModel, ids_T: Tensor, layers: Sequence[int]) -> Streams:
    with undisturbed(fisher.model, fisher.precision), torch.no_grad():
        return streams(fisher, ids_T, layers)


def _ranks(log_q_NV: Tensor, next_N: Tensor) -> Tensor:
    """[N]: of the true next token; 1 is the likeliest."""
    return (log_q_NV > log_q_NV.gather(1, next_N[:, None])).sum(1) + 1


def _told(kl_N: Tensor | None, rank_N: Tensor) -> dict[str, float]:
    told = {"rank_median": float(rank_N.double().median()), "top10": float((rank_N <= TOP).double().mean())}
    if kl_N is None:
        return told
    return {"kl_median": float(kl_N.double().median()), "kl_mean": float(kl_N.double().mean()), **told}


def stepped(fisher: FisherModel, layer: int, outputs_BTD: Tensor, steps_BD: Tensor, where: slice) -> Tensor:
    """Log p at some positions, [B, N, V], after a step of each text's own, added at these to the output of a block."""
    site = Site(fisher.model, list(decoder_blocks(fisher.model)), layer)
    moved_BTD = outputs_BTD.clone()
    moved_BTD[:, where] += steps_BD[:, None]
    with torch.no_grad(), site.above():
        return site.logits(moved_BTD, keep=moved_BTD.shape[1])[:, where].log_softmax(2)


def _outputs(fisher: FisherModel, layer: int, texts: Sequence[Streams], base_BNV: Tensor, where: slice) -> Tensor:
    """A block's output for the texts, [B, T, D]; the model run from there on must say what it says as a whole."""
    outputs_BTD = torch.stack([text.outputs[layer] for text in texts])
    again_BNV = stepped(fisher, layer, outputs_BTD, torch.zeros_like(outputs_BTD[:, 0]), where)
    gap = float((again_BNV - base_BNV).abs().max())
    assert gap < AGREES, f"run from layer {layer} on, log-probabilities are {gap:.2g} nats away from the model's"
    return outputs_BTD


def _steps(
    fisher: FisherModel,
    lens: JacobianLens,
    layer: int,
    texts: Sequence[Streams],
    base_BNV: Tensor,
    where: slice,
    generator: torch.Generator,
) -> dict[str, Any]:
    """Predicted and measured KL of unit steps along directions of each kind, added at all positions."""
    outputs_BTD, D = _outputs(fisher, layer, texts, base_BNV, where), lens.d_model
    directions = {
        "random": torch.randn(KINDS["random"], D, generator=generator),
        "singular vectors of J": torch.linalg.svd(lens.of(layer)).Vh[: KINDS["singular vectors of J"]],
        "sensitive directions": lens.sensitive_directions(layer, KINDS["sensitive directions"]).directions,
    }
    rows = []
    for kind, v_nD in directions.items():
        v_nD = v_nD.double() / v_nD.double().norm(dim=1, keepdim=True)
        for v_D, predicted in zip(v_nD, torch.as_tensor(lens.sensitivity(v_nD, layer)).tolist(), strict=True):
            length = (SMALL / predicted) ** 0.5
            step_BD = (length * v_D).to(outputs_BTD).expand(len(texts), -1)
            kl = divergence(base_BNV, stepped(fisher, layer, outputs_BTD, step_BD, where)).double().mean()
            rows.append({"kind": kind, "predicted": predicted, "measured": float(kl) / length**2})
    ratio = {kind: _median_ratio([row for row in rows if row["kind"] == kind]) for kind in directions}
    predicted, measured = ([row[name] for row in rows] for name in ("predicted", "measured"))
    rank = float(spearmanr(predicted, measured).statistic)
    return {"ratio": _median_ratio(rows), "ratio_of": ratio, "spearman": rank, "directions": rows}


def _median_ratio(rows: Sequence[dict[str, Any]]) -> float:
    return float(np.median([row["measured"] / row["predicted"] for row in rows]))


def _orders(
    fisher: FisherModel,
    lens: JacobianLens,
    layer: int,
    texts: Sequence[Streams],
    base_BNV: Tensor,
    where: slice,
    draws: int,
    generator: torch.Generator,
) -> dict[str, float]:
    """The share of the measured KL that the first ten tokens of each order hold, the median over positions.

    At position t the step is along h_t, added at all positions. "most" is what any ten tokens hold at most.
    """
    outputs_BTD, J = _outputs(fisher, layer, texts, base_BNV, where), lens.of(layer)
    shares: dict[str, list[float]] = {"kl": [], "logit": [], "logit, no J": [], "model": [], "most": []}
    B, N = base_BNV.shape[:2]
    at_BP = torch.stack([torch.randperm(N, generator=generator)[:draws] for _ in range(B)])
    for at_B in at_BP.T.tolist():
        rows_BD = torch.stack([text.top[where][n] for text, n in zip(texts, at_B, strict=True)])
        h_BD = torch.stack([text.outputs[layer][where][n] for text, n in zip(texts, at_B, strict=True)])
        unit_BD = h_BD / h_BD.norm(dim=1, keepdim=True)
        with undisturbed(fisher.model, fisher.precision), torch.no_grad():
            log_p_BV, change_BV = along(texts[0].head, rows_BD, unit_BD @ J.to(h_BD).T)
            lens_BV = log_probabilities(texts[0].head, h_BD @ J.to(h_BD).T)
            plain_BV = log_probabilities(texts[0].head, h_BD)
        predicted_BV = log_p_BV.exp() * change_BV.square() / 2
        length_B1 = (SMALL / predicted_BV.sum(1, keepdim=True)).sqrt()
        after_BNV = stepped(fisher, layer, outputs_BTD, length_B1 * unit_BD, where)
        after_BV = after_BNV[torch.arange(B), at_B]
        measured_BV = log_p_BV.exp() * (after_BV - log_p_BV).square() / 2
        orders = {"kl": predicted_BV, "logit": lens_BV, "logit, no J": plain_BV, "model": log_p_BV, "most": measured_BV}
        for name, by_BV in orders.items():
            held_B = measured_BV.gather(1, likeliest(by_BV, TOP)).sum(1) / measured_BV.sum(1)
            shares[name] += held_B.tolist()
    return {name: float(np.median(values)) for name, values in shares.items()}


def main() -> None:
    """Measure, keep the numbers, write the page and the figure."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.lens_evaluation", description=__doc__.splitlines()[0])
    parser.add_argument("--lens", type=Path, help="the folder of a fit, or its .safetensors file")
    parser.add_argument("--texts", type=Path, help="held-out texts, one a line")
    parser.add_argument("--corpus", help="what the texts are, and the lens's, for the page")
    parser.add_argument("--model", help="a file or folder to load it from; SmolLM2 if not given")
    parser.add_argument("--count", type=int, default=16, help="texts")
    parser.add_argument("--tokens", type=int, default=128, help="tokens of each; shorter texts are passed over")
    parser.add_argument("--step_texts", type=int, default=4, help="texts of them whose steps are measured")
    parser.add_argument("--step_layers", type=int, default=6, help="layers at which they are")
    parser.add_argument("--draws", type=int, default=8, help="positions of each at which orders are compared")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, default=KEPT)
    parser.add_argument("--render", action="store_true", help="write the page again from the kept numbers")
    args = parser.parse_args()
    if not args.render:
        if args.lens is None or args.texts is None:
            parser.error("give --lens and --texts, or --render alone")
        began, lens = time.monotonic(), JacobianLens.load(args.lens)
        loaded = load_model(args.model or str(demo_model()), dtype="float32", device="cpu", precision="float32")
        fisher = FisherModel(loaded.model.requires_grad_(False), loaded.tokenizer, layers=0, precision="float32")
        texts = [line for line in args.texts.read_text("utf-8").splitlines() if line.strip()]
        ids_BT = cut(texts, loaded.tokenizer, args.count, args.tokens)
        fixed = {name: vars(args)[name] for name in ("step_texts", "step_layers", "draws", "seed")}
        about = {"name": "SmolLM2-135M-Instruct" if args.model is None else Path(args.model).name}
        about |= {"lens_prompts": lens.n_prompts, "max_length": lens.metadata.get("max_length"), "machine": machine()}
        about |= {"corpus": args.corpus} if args.corpus else {}
        about |= {"standard_errors": {str(layer): error for layer, error in lens.standard_errors.items()}}
        for kept in evaluate(fisher, lens, ids_BT, **fixed):
            kept |= {"about": about, "seconds": round(time.monotonic() - began)}
            write_json(args.json, kept)
            print(f"{kept['seconds']} s: {len(kept['steps'])} of up to {args.step_layers} layers stepped", flush=True)
    kept = json.loads(args.json.read_text("utf-8"))
    if args.json == KEPT:
        lens_evaluation_page.draw(kept, FIGURE)
        PAGE.write_text(lens_evaluation_page.page(kept), "utf-8")
        print(f"{PAGE} written")


if __name__ == "__main__":
    main()
