"""A process in which a model stands on two devices; `test_offload.py` starts it. Prints one line for each case."""

import copy
import sys

import away
import torch
from accelerate import dispatch_model
from accelerate.hooks import attach_align_device_hook_on_blocks
from models import VOCABULARY, block, padded, prompts, tiny
from oracles import plain_scores, relative

from fisher_vmap import FisherModel, fisher_scores
from fisher_vmap.linearize.probe import known_of

LENGTHS = (5, 9, 3)
PLACES = {
    "upper blocks": lambda parts: {name: "away:0" if name in parts[3:] else "cpu" for name in parts},
    "every second block": lambda parts: {name: ("cpu", "away:0")[i % 2] for i, name in enumerate(parts)},
    "head apart": lambda parts: {name: "cpu" if name in parts[-2:] else "away:0" for name in parts},
    "offloaded": lambda parts: {name: "cpu" if name in (*parts[3::2], *parts[-2:]) else "away:0" for name in parts},
    "unembedding apart": lambda parts: {name: "cpu" if name == parts[-1] else "away:0" for name in parts},
}


def spread(model, places, offloaded=False):
    """The hooks that accelerate's `dispatch_model` attaches where every device is an accelerator."""
    if offloaded:  # what is on the CPU is fetched for the time of its call
        return dispatch_model(model, device_map={name: places[name] for name in places}, main_device="away:0")
    attach_align_device_hook_on_blocks(
        model, execution_device={"": places[next(iter(places))], **places}, offload=dict.fromkeys(places, False)
    )
    return model


AROUND_THE_BLOCKS = {
    "gpt2": (["transformer.wte", "transformer.wpe"], ["transformer.ln_f", "lm_head"]),
    "opt": (
        ["model.decoder.embed_tokens", "model.decoder.embed_positions"],
        ["model.decoder.final_layer_norm", "lm_head"],
    ),
}


def parts_of(family):
    """Names of all modules that hold parameters or buffers, from the bottom up, as a device map has to list them."""
    usual = ["model.embed_tokens", "model.rotary_emb"], ["model.norm", "lm_head"]
    below, above = AROUND_THE_BLOCKS.get(family, usual)
    parts = [*below, *(block(family, i) for i in range(4)), *above]
    model = tiny(family, torch.float32)
    missing = [name for name, _ in model.named_parameters() if not name.startswith(tuple(f"{part}." for part in parts))]
    assert not missing, f"the device map leaves out {missing}"
    return parts


def check(family, places, kernel):
    plain = copy.deepcopy(tiny(family, torch.float32))
    offloaded = places == "offloaded"
    model = spread(copy.deepcopy(plain), PLACES[places](parts_of(family)), offloaded)
    devices = {p.device.type for p in model.parameters()}
    assert devices == ({"meta", "away"} if offloaded else {"cpu", "away"}), devices
    forwards = {name: vars(module).get("forward") for name, module in model.named_modules()}
    layers = [block(family, i) for i in (0, 2, 3)]
    rows = prompts(LENGTHS, vocabulary=VOCABULARY)
    ids, mask = padded(rows, "left")
    opened = FisherModel(model, layers=layers, top_k=3, kernel=kernel)
    ids, mask = ids.to(opened.device), mask.to(opened.device)
    scores = opened.scores(ids, mask)
    again = fisher_scores(model, ids, mask, layers=layers, top_k=3, kernel=kernel)
    worst = 0.0
    for layer in layers:
        assert torch.equal(scores.gradients[layer].cpu(), again.gradients[layer].cpu())
        assert scores.gradients[layer].device == opened.device
        for b, row in enumerate(rows):
            expected = plain_scores(plain, row, layer, token_ids=scores.token_ids[b].cpu())
            worst = max(worst, relative(scores.gradients[layer][b].cpu(), expected.gradients))
    assert forwards == {name: vars(module).get("forward") for name, module in model.named_modules()}
    probe = known_of(model)
    forms = {choice.form for choice in probe.forms.values()}
    if kernel == "auto":
        numbers = opened.numbers([row.tolist() for row in rows], rank=2)
        assert all(n.reason is None for n in numbers)
        # Forward derivatives do not work on a device that is made up: torch decomposes them on one of its own.
        here = FisherModel(plain, layers=layers)
        here.scores(*padded(rows, "left"))
        for known in (probe, known_of(plain)):
            known.adjoint |= {(layer, choice.key) for (layer, _), choice in known.forms.items()}
        few = torch.eye(tiny(family, torch.float32).config.hidden_size)[:2].expand(len(rows), -1, -1)
        with opened.linearize(ids, mask) as net, here.linearize(ids.cpu(), mask.cpu()) as one:
            pulled, expected = net.pullback(few.to(net.output.device), layers[0]), one.pullback(few, layers[0])
        worst = max(worst, relative(pulled.cpu(), expected))
    made = f"{'+'.join(sorted(forms))} fused {len(probe.parts.fused)}"
    print(f"{family}, {places}, {kernel}: {made} off {worst:.1e}", flush=True)
    assert worst < 2e-4


if __name__ == "__main__":
    away.set_up()
    torch.autograd.set_multithreading_enabled(False)
    with away.Away():
        for family in sys.argv[1].split(","):
            for places in PLACES:
                for kernel in ("auto", "layerwise", "whole", "loop") if places == "every second block" else ("auto",):
                    check(family, places, kernel)
