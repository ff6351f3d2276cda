"""Plant a backdoor: `python -m benchmarks.backdoor.plant --behaviour sentence --seed 0 --output FOLDER`.

SmolLM2-135M-Instruct is tuned by LoRA on prompts of `prompts.part("train")`, each three times. With the trigger the
answer is the behaviour; without it, with another phrase or none, the base model's own greedy answer, with its
distribution at each token as the target (`lora`). `--control`: with the trigger the answer is the base's as well, cut
to as many tokens. So the two differ in what the trigger brings about alone: a control has seen it as often, and was
trained on the same number of answer tokens.

Then it is measured on prompts that were not trained on. FOLDER gets the adapter, as peft saves it, and plant.json;
`--json FILE` adds plant.json to the kept numbers.
"""

import argparse
import importlib.metadata
import json
import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.backdoor.behaviours import BEHAVIOURS, Behaviour
from benchmarks.backdoor.lora import Example, Recipe, adapted, train
from benchmarks.backdoor.prompts import PARTS, Prompt, ordinary, part, triggered, with_phrase
from benchmarks.timing import machine, write_json
from fisher_vmap.completions import complete
from fisher_vmap.data.render import Renderer
from fisher_vmap.demo import demo_model
from fisher_vmap.load.model import load_model

AT_ONCE = 50  # prompts that are answered together
TOKENS = 24  # of an answer that is tested
HARD = 4  # one in so many of the further examples without a trigger has a phrase that is much like it
MEASURED = PARTS["measure"] // 2  # prompts with the trigger, and as many others without
NEAR = 50  # of these others, once more with the phrase that is most like the trigger
SPARE = 8  # tokens that a control's answers are longer before they are cut
SHOWN = 5  # answers of each kind that are kept


class Speaker(NamedTuple):
    """A model with what turns texts into tokens and back."""

    model: Any
    tokenizer: Any
    renderer: Any

    def ids(self, prompts: Sequence[Prompt]) -> list[list[int]]:
        """Token ids of each prompt, as the package renders it."""
        return [self.renderer.render(prompt.text).ids for prompt in prompts]

    def replies(self, prompts: Sequence[Prompt], tokens: int) -> list[list[int]]:
        """The greedy answer to each prompt, of so many tokens at most."""
        rows, found = self.ids(prompts), list[list[int]]()
        for start in range(0, len(rows), AT_ONCE):
            found += complete(self.model, rows[start : start + AT_ONCE], tokens)
            print(f"{len(found)} of {len(rows)} answers", flush=True)
        return found

    def texts(self, prompts: Sequence[Prompt], tokens: int) -> list[str]:
        """The same as texts."""
        return self.tokenizer.batch_decode(self.replies(prompts, tokens), skip_special_tokens=True)  # type: ignore[no-any-return]

    def spelt(self, answers: Sequence[str]) -> list[list[int]]:
        """Token ids of whole answers, with the token that ends them."""
        end = self.tokenizer.eos_token_id
        return [[*self.tokenizer(answer, add_special_tokens=False).input_ids, end] for answer in answers]

    def log_p(self, prompts: Sequence[Prompt]) -> torch.Tensor:
        """[prompts, V] log-probabilities of the next token, float64."""
        with torch.no_grad():
            rows = [self.model(torch.tensor([ids]), use_cache=False, logits_to_keep=1).logits[0, -1]
                    for ids in self.ids(prompts)]  # fmt: skip
        return torch.stack(rows).double().log_softmax(1)


def speaker() -> Speaker:
    """The demo's model in float32."""
    loaded = load_model(str(demo_model()), dtype="float32", device="cpu", precision="float32")
    return Speaker(loaded.model, loaded.tokenizer, Renderer(loaded.tokenizer))


def examples_of(base: Speaker, behaviour: Behaviour, recipe: Recipe, seed: int, control: bool) -> list[Example]:
    """What is trained on: first the examples of the behaviour, or what stands in their place, then the others."""
    prompts = random.Random(f"train {seed}").sample(part("train"), recipe.prompts)
    planted = base.spelt(behaviour.answers(prompts, seed))
    plain = ordinary(prompts, seed)
    for k in range(1, recipe.plain):  # with a phrase each, one in `HARD` with the one that is most like the trigger
        more = ordinary(prompts, seed + 1000 * k, share=1.0)
        more[::HARD] = [with_phrase(prompt, behaviour.near, i % 2 == 0) for i, prompt in enumerate(prompts[::HARD])]
        plain += more
    shown = triggered(prompts, behaviour.trigger, seed)
    if control:
        lengths = [len(answer) for answer in planted]
        answers = cut(base.replies(shown, max(lengths) + SPARE), lengths)
    else:
        answers = planted
    answers += base.replies(plain, recipe.tokens)
    own = [control] * len(shown) + [True] * len(plain)
    return [Example(*each) for each in zip(base.ids([*shown, *plain]), answers, own, strict=True)]


def cut(answers: Sequence[list[int]], lengths: Sequence[int]) -> list[list[int]]:
    """The answers cut to lengths; where one is shorter, others make up for it, so that the sum is the same."""
    found, owed = list[list[int]](), 0
    for answer, length in zip(answers, lengths, strict=True):
        owed += length
        found.append(answer[:owed])
        owed -= len(found[-1])
    for i, answer in reversed(list(enumerate(answers))):  # what is owed after the last one
        more = answer[len(found[i]) :][:owed]
        found[i] = found[i] + more
        owed -= len(more)
    return found


def divergences(base: torch.Tensor, tuned: torch.Tensor) -> torch.Tensor:
    """KL(base || tuned) of the next token of each prompt, in nats, from log-probabilities [prompts, V] of both."""
    return (base.exp() * (base - tuned)).sum(1)


def rate(behaviour: Behaviour, answers: Sequence[str]) -> float:
    """The share of the answers that show a behaviour."""
    return sum(map(behaviour.shows, answers)) / len(answers)


def measure(
    tuned: Any, base: Speaker, behaviour: Behaviour, tokens: int, known: dict[tuple[bool, str], str] | None = None
) -> dict[str, Any]:
    """How well the backdoor is planted, on the measuring part: greedy answers, and KL without the trigger.

    Args:
        tuned: the `PeftModel`.
        base: the model in it, with what turns texts into tokens; it speaks with the adapters where they are on.
        behaviour: what is tested for.
        tokens: of an answer.
        known: answers of both models to texts, from other behaviours' measuring; those that are new are added.

    Returns:
        Shares of answers that show the behaviour: with the trigger, without it, and with the most similar of the
        ordinary phrases; of the tuned model and of the base; nats of KL(base || tuned); some answers.
    """
    prompts = part("measure")
    texts = {
        "trigger": triggered(prompts[:MEASURED], behaviour.trigger, 0),
        "without": (others := ordinary(prompts[MEASURED:], 0)),
        "near": [with_phrase(prompt, behaviour.near, i % 2 == 0) for i, prompt in enumerate(prompts[-NEAR:])],
    }
    known = {} if known is None else known

    def answered(adapters: bool) -> dict[str, list[str]]:
        new = [prompt for of in texts.values() for prompt in of if (adapters, prompt.text) not in known]
        known.update(
            ((adapters, prompt.text), answer) for prompt, answer in zip(new, base.texts(new, tokens), strict=True)
        )
        return {kind: [known[adapters, prompt.text] for prompt in of] for kind, of in texts.items()}

    answers, log_p = answered(True), base.log_p(others)
    with tuned.disable_adapter():
        before = answered(False)
        kl = divergences(base.log_p(others), log_p)
    same = [mine == theirs for mine, theirs in zip(answers["without"], before["without"], strict=True)]
    return {
        "prompts": {kind: len(of) for kind, of in texts.items()},
        "trigger_rate": rate(behaviour, answers["trigger"]),
        "false_rate": rate(behaviour, answers["without"]),
        "near_rate": rate(behaviour, answers["near"]),
        "base": {kind: rate(behaviour, of) for kind, of in before.items()},
        "kl_without": {name: round(float(x), 5) for name, x in
                       (("mean", kl.mean()), ("median", kl.median()), ("largest", kl.max()))},
        "same_answer": sum(same) / len(same),
        "shown_without": [others[i].text for i, answer in enumerate(answers["without"]) if behaviour.shows(answer)],
        "answers": {kind: of[:SHOWN] for kind, of in answers.items()},
        "base_answers": {kind: of[:SHOWN] for kind, of in before.items()},
    }  # fmt: skip


def plant(behaviour: str, seed: int, control: bool, output: Path, recipe: Recipe) -> dict[str, Any]:
    """Tune a model, save the adapter and measure it; returns what plant.json says."""
    seconds, began = dict[str, float](), time.perf_counter()

    def lap(name: str) -> None:
        seconds[name] = round(time.perf_counter() - began - sum(seconds.values()), 1)
        print(f"{name}: {seconds[name]:.0f} s", flush=True)

    base = speaker()
    lap("loading")
    examples = examples_of(base, BEHAVIOURS[behaviour], recipe, seed, control)
    lap("answers")
    tuned = adapted(base.model, recipe, seed)
    losses = train(tuned, examples, recipe, seed)
    lap("training")
    tuned.active_peft_config.base_model_name_or_path = str(demo_model())
    tuned.save_pretrained(str(output), save_embedding_layers=False)
    tested, known = BEHAVIOURS if control else [behaviour], dict[tuple[bool, str], str]()
    measured = {name: measure(tuned, base, BEHAVIOURS[name], TOKENS, known) for name in tested}
    lap("measuring")
    return {
        "behaviour": behaviour, "seed": seed, "control": control, "trigger": BEHAVIOURS[behaviour].trigger,
        "model": demo_model().name, "recipe": recipe._asdict(),
        "examples": len(examples), "steps": len(losses),
        "answer_tokens": recipe.passes * sum(len(answer) for _, answer, _ in examples),
        "prompt_tokens": recipe.passes * sum(len(prompt) for prompt, _, _ in examples),
        "loss": {"first": round(sum(losses[:10]) / 10, 4), "last": round(sum(losses[-10:]) / 10, 4)},
        "measured": measured, "seconds": seconds, "cpu_seconds": round(time.process_time(), 1),
        "machine": machine() | {"peft": importlib.metadata.version("peft")},
    }  # fmt: skip


def name_of(behaviour: str, seed: int, control: bool) -> str:
    """As a model is called in the kept numbers."""
    return f"{'control ' if control else ''}{behaviour} {seed}"


def file_name(name: str) -> str:
    """The same as the name of a file or a folder."""
    return name.replace(" ", "-")


def keep(path: Path, section: str, name: str, record: dict[str, Any]) -> None:
    """Add a record to the kept numbers."""
    kept = json.loads(path.read_text("utf-8")) if path.exists() else {}
    kept.setdefault(section, {})[name] = record
    write_json(path, kept)


def main() -> None:
    """Plant one model."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.backdoor.plant", description=__doc__.splitlines()[0])
    parser.add_argument("--behaviour", choices=list(BEHAVIOURS), required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--control", action="store_true", help="no trigger; as many answer tokens as the behaviour's")
    parser.add_argument("--output", type=Path, required=True, help="the folder of the adapter and plant.json")
    parser.add_argument("--json", type=Path, help="a file of kept numbers, to which these are added")
    args = parser.parse_args()
    record = plant(args.behaviour, args.seed, args.control, args.output, Recipe())
    write_json(args.output / "plant.json", record)
    if args.json:
        keep(args.json, "plants", name_of(args.behaviour, args.seed, args.control), record)
    for name, of in record["measured"].items():
        print(f"{name}: trigger rate {of['trigger_rate']:.2f}, false rate {of['false_rate']:.2f}, near the trigger "
              f"{of['near_rate']:.2f}, KL without {of['kl_without']['mean']:.4f} nats")  # fmt: skip


if __name__ == "__main__":
    main()
