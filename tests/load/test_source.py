"""Where weights come from, end to end through the command: a model in shards is the model in one file."""

import numpy as np
from safetensors.torch import load_file, save_file
from source_cases import agrees, base, run, stored, with_tokenizer

from fisher_vmap import open_results


def test_shards_of_weights_give_what_one_file_gives(model, tmp_path):
    sharded = tmp_path / "sharded"
    base().save_pretrained(sharded, max_shard_size="100KB")
    with_tokenizer(sharded)
    assert len(list(sharded.glob("model-*.safetensors"))) > 2
    out, whole = run(sharded, tmp_path, out=tmp_path / "a"), run(model, tmp_path, out=tmp_path / "b")
    for (S, V), (S_whole, V_whole) in zip(stored(out), stored(whole), strict=True):
        np.testing.assert_allclose(S, S_whole, rtol=1e-5)
        np.testing.assert_allclose(V, V_whole, atol=1e-4)
    agrees(out, base(), 2e-4)


def test_every_shard_is_part_of_the_models_identity(tmp_path, capsys):
    sharded = tmp_path / "sharded"
    base().save_pretrained(sharded, max_shard_size="100KB")
    with_tokenizer(sharded)
    out = run(sharded, tmp_path)
    last = sorted(sharded.glob("model-*.safetensors"))[-1]
    save_file({name: tensor * 1.01 for name, tensor in load_file(last).items()}, last, {"format": "pt"})
    run(sharded, tmp_path, code=2)
    assert "model" in capsys.readouterr().err and open_results(out) is not None
