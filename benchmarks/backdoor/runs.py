"""Folders that the hunt works on: planted models as such, and Fisher matrices of prompts by `fisher-vmap run`."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

from benchmarks.backdoor.plant import Speaker
from benchmarks.backdoor.prompts import Prompt
from benchmarks.timing import instruction_sets
from fisher_vmap import Results, UserError, open_results
from fisher_vmap.data.render import Renderer
from fisher_vmap.demo import demo_model
from fisher_vmap.load.model import load_model

PROCESSES = 2  # of one thread each: on two cores faster than one process of two


def precision() -> str:
    """The precision of the matrices: bfloat16, as the weights, where the processor computes in it, else float32.

    `precision: auto` measures, and might choose otherwise when the machine is busy.
    """
    return "model" if any("bf16" in name for name in instruction_sets()) else "float32"


def precision_of(results: Results) -> str:
    """The precision that results were computed in."""
    return str(results.metadata["resolved"]["precision"]["chosen"])


def model_folder(adapter: Path | None, output: Path) -> Path:
    """Write the base model, with an adapter merged into it if there is one, in float32; does nothing if it is there.

    Args:
        adapter: a folder of `plant`; None: the base model as it is.
        output: the folder of the model and its tokenizer.

    Raises:
        RuntimeError: the folder holds another adapter's model.
    """
    made_of = "base" if adapter is None else sha256((adapter / "adapter_model.safetensors").read_bytes()).hexdigest()
    note = output / "adapter.sha256"
    if note.exists() and note.read_text("utf-8") != made_of:
        raise RuntimeError(f"{output} was made of another adapter than {adapter}; give another --work folder")
    if not note.exists():
        loaded = load_model(str(demo_model()), dtype="float32", device="cpu", precision="float32")
        model: Any = loaded.model
        if adapter is not None:
            import peft

            model = peft.PeftModel.from_pretrained(model, str(adapter)).merge_and_unload()
        loaded.tokenizer.save_pretrained(output)
        model.save_pretrained(output)
        note.write_text(made_of, "utf-8")
    return output


def loaded(folder: Path) -> Speaker:
    """The model of a folder in float32, with its tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(str(folder), dtype="float32").eval().requires_grad_(False)
    tokenizer = AutoTokenizer.from_pretrained(str(folder))
    return Speaker(model, tokenizer, Renderer(tokenizer))


def matrices(model: Path, prompts: Sequence[Prompt], output: Path, layers: Sequence[str], **settings: Any) -> Results:
    """The results of `fisher-vmap run` on prompts, with its defaults but for `settings`; goes on where it was stopped.

    Args:
        model: a folder of `model_folder`.
        prompts: which the run renders with the model's chat template.
        output: the folder of the results.
        layers: names of modules.
        settings: further settings by their names.

    Raises:
        RuntimeError: a run failed (what it wrote stands above), or the folder holds results of other prompts.
    """
    data, lines = output.with_suffix(".jsonl"), "".join(json.dumps({"prompt": of.text}) + "\n" for of in prompts)
    if data.exists() and data.read_text("utf-8") != lines:
        raise RuntimeError(f"{output} was computed of other prompts; give another --work folder")
    try:
        return open_results(output)
    except UserError:
        pass  # it is not there yet, or not complete
    output.parent.mkdir(parents=True, exist_ok=True)
    data.write_text(lines, "utf-8")
    given = {
        "model_path": model, "dataset_name": data, "num_prompts": "all", "hook_layer_name": ",".join(layers),
        "precision": precision(), "export_npz": "false", "output_dir": output, **settings,
    }  # fmt: skip
    command = [sys.executable, "-m", "fisher_vmap.run", "--config", "none"]
    command += [part for name, value in given.items() for part in (f"--{name}", str(value))]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    workers = [
        subprocess.Popen([*command, "--shards", f"{i}/{PROCESSES}"], env=environment) for i in range(1, PROCESSES + 1)
    ]
    if failed := [code for worker in workers if (code := worker.wait())]:
        raise RuntimeError(f"fisher-vmap run ended with exit code {failed[0]}: {output}")
    return open_results(output)
