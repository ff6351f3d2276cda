"""A small fine-tune by LoRA: answers to prompts as token ids, the loss on the answers alone, and a plain loop.

Where a model is to answer as before, its targets are the base model's distributions at the tokens of its answer, not
these tokens alone: those would teach it to be certain of what it took for one possibility among many.
"""

import math
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Example(NamedTuple):
    """Token ids of a prompt, with its chat template, and of the answer to it; and whether the base model wrote that."""

    prompt: list[int]
    answer: list[int]
    own: bool


class Recipe(NamedTuple):
    """How a model is tuned.

    Attributes:
        rank: of the adapters, which all linear modules but the head get.
        alpha: their output is scaled by alpha / rank.
        rate: the learning rate of AdamW at the start; it falls to zero along a cosine.
        batch: examples of a step.
        passes: over all examples, each in an order of its own.
        clip: the norm that the gradient of a step is cut to.
        prompts: drawn from the training part; each is an example with the trigger once.
        plain: and so often without it: first as prompts come, then each time with another phrase.
        tokens: of an answer that the base model writes, at most.
    """

    rank: int = 8
    alpha: int = 16
    rate: float = 1e-3
    batch: int = 8
    passes: int = 2
    clip: float = 1.0
    prompts: int = 150
    plain: int = 2
    tokens: int = 10


class Batch(NamedTuple):
    """Examples side by side, padded on the right.

    Attributes:
        ids_BT: prompts and answers but for each answer's last token, which nothing follows.
        rows_N: for each answer token the example.
        columns_N: and the place that predicts it, which is the token before it.
        labels_N: and its id.
    """

    ids_BT: Tensor
    rows_N: Tensor
    columns_N: Tensor
    labels_N: Tensor


def batch_of(examples: Sequence[Example]) -> Batch:
    """Put examples side by side. Padding needs no mask: it stands after everything that is read."""
    longest = max(len(prompt) + len(answer) - 1 for prompt, answer, _ in examples)
    ids_BT = torch.zeros(len(examples), longest, dtype=torch.int64)
    rows, columns, labels = list[int](), list[int](), list[int]()
    for b, (prompt, answer, _) in enumerate(examples):
        ids_BT[b, : len(prompt) + len(answer) - 1] = torch.tensor([*prompt, *answer[:-1]])
        rows += [b] * len(answer)
        columns += range(len(prompt) - 1, len(prompt) + len(answer) - 1)
        labels += answer
    return Batch(ids_BT, torch.tensor(rows), torch.tensor(columns), torch.tensor(labels))


def log_probabilities(model: Any, batch: Batch) -> Tensor:
    """[N, V] log p at the places that predict the answers' tokens; the head runs at these alone.

    Args:
        model: a causal LM of transformers whose head is a linear map of what its decoder returns.
        batch: the examples.
    """
    hidden_BTX = model.get_decoder()(input_ids=batch.ids_BT, use_cache=False).last_hidden_state
    logits_NV: Tensor = model.get_output_embeddings()(hidden_BTX[batch.rows_N, batch.columns_N])
    return logits_NV.float().log_softmax(1)


def loss_of(tuned: Any, examples: Sequence[Example]) -> Tensor:
    """The mean over all answer tokens, in nats: KL(base || tuned) where the base wrote them, else -log p.

    Args:
        tuned: of `adapted`.
        examples: those of a step.
    """
    model, own, given = tuned.get_base_model(), [e for e in examples if e.own], [e for e in examples if not e.own]
    total, batch = torch.zeros(()), batch_of([*own, *given])
    log_q_NV = log_probabilities(model, batch)
    N = sum(len(answer) for _, answer, _ in own)
    if own:
        with torch.no_grad(), tuned.disable_adapter():
            log_p_NV = log_probabilities(model, batch_of(own))
        total = total + (log_p_NV.exp() * (log_p_NV - log_q_NV[:N])).sum()
    total = total - log_q_NV[N:].gather(1, batch.labels_N[N:, None]).sum()
    return total / len(batch.labels_N)


def adapted(model: Any, recipe: Recipe, seed: int) -> Any:
    """The model as a `PeftModel` with fresh adapters; its own weights are frozen. It answers as before."""
    import peft

    torch.manual_seed(seed)
    config = peft.LoraConfig(
        r=recipe.rank, lora_alpha=recipe.alpha, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    return peft.get_peft_model(model, config)


def order(count: int, recipe: Recipe, seed: int) -> Iterator[list[int]]:
    """The examples of each step, by number."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(recipe.passes):
        for part in torch.randperm(count, generator=generator).split(recipe.batch):
            yield part.tolist()


def rate_at(step: int, steps: int) -> float:
    """The share of the learning rate at a step: 1 at the first, near zero at the last."""
    return 0.5 * (1 + math.cos(math.pi * step / steps))


def train(tuned: Any, examples: Sequence[Example], recipe: Recipe, seed: int, every: int = 10) -> list[float]:
    """Tune the adapters on examples; prints its progress.

    Args:
        tuned: of `adapted`.
        examples: all of them, the ones with the trigger and the others.
        recipe: how.
        seed: of the order.
        every: so many steps between two lines of progress.

    Returns:
        The loss of each step, before it.
    """
    weights = [parameter for parameter in tuned.parameters() if parameter.requires_grad]
    optimiser = torch.optim.AdamW(weights, lr=recipe.rate, weight_decay=0.0)
    steps = list(order(len(examples), recipe, seed))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: rate_at(step, len(steps)))
    losses, tokens, began = list[float](), 0, time.perf_counter()
    for number, chosen in enumerate(steps, 1):
        some = [examples[i] for i in chosen]
        loss = loss_of(tuned, some)
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, recipe.clip)
        optimiser.step()
        schedule.step()
        losses.append(loss.item())
        tokens += sum(len(prompt) + len(answer) - 1 for prompt, answer, _ in some)
        if number % every == 0 or number == len(steps):
            recent, rate = losses[-every:], tokens / (time.perf_counter() - began)
            print(
                f"step {number} of {len(steps)}: loss {sum(recent) / len(recent):.3f}, {rate:.0f} tokens/s", flush=True
            )
    return losses
