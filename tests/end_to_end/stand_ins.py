"""What the book's blocks use of programs that are not installed here, under their names."""

import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


class LLM:
    """vLLM's offline engine, on transformers; as vLLM's own, each block has the name that it has there."""

    def __init__(self, path, *, enforce_eager):
        assert enforce_eager
        self.model, self.tokenizer = AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path)

    def apply_model(self, function):
        return [function(self.model)]

    def chat(self, chat, sampling):
        text = self.tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
        inputs = self.tokenizer(text, return_tensors="pt", add_special_tokens=False)
        with torch.no_grad():
            out = self.model.generate(**inputs, max_new_tokens=sampling.max_tokens, do_sample=sampling.temperature > 0)
        return [SimpleNamespace(outputs=[SimpleNamespace(text=self.tokenizer.decode(out[0]))])]


class NPVector:
    """Neuronpedia's, which sends a vector; this one compares it with the file's next entry."""

    sent = 0

    @classmethod
    def new(cls, *, label, model_id, layer_num, hook_type, vector, default_steer_strength=10):
        entry = json.loads(Path("mean.json").read_text())[cls.sent]
        assert hook_type in ("hook_resid_pre", "hook_resid_post")
        assert entry == {
            "modelId": model_id, "layerNumber": layer_num, "hookType": hook_type, "vector": vector,
            "vectorDefaultSteerStrength": default_steer_strength, "vectorLabel": label,
        }  # fmt: skip
        cls.sent += 1


def install() -> None:
    """Make them importable."""
    NPVector.sent = 0
    neuronpedia = {"neuronpedia": {}, "neuronpedia.np_vector": {"NPVector": NPVector}}
    for name, members in {**neuronpedia, "vllm": {"LLM": LLM, "SamplingParams": SimpleNamespace}}.items():
        sys.modules[name] = ModuleType(name)
        vars(sys.modules[name]).update(members)


def remove() -> None:
    """Leave the modules as they were."""
    for name in ("neuronpedia", "neuronpedia.np_vector", "vllm"):
        sys.modules.pop(name, None)
