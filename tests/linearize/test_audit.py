"""The audit alone, with the proofs switched off, catches what is wrong; a run repeats what it led to, to the bit."""

import json
import logging
from contextlib import contextmanager, nullcontext

import pyarrow.parquet as pq
import pytest
import torch
import yaml
from command_cases import arguments, save_model, texts, write_prompts
from models import block, fresh, padded, prompts
from oracles import plain_scores, relative

from fisher_vmap import FisherModel, fisher_full, fisher_scores, open_results
from fisher_vmap.linearize import audit, scores, select
from fisher_vmap.run.__main__ import main

LAYERS = [block("llama", 0), block("llama", 1)]
LENGTHS = (9, 4, 7)


@pytest.fixture
def unproven(monkeypatch):
    """Every form is taken for right before it is used."""
    monkeypatch.setattr(select, "why_wrong", lambda *_: None)


def planted(monkeypatch, change, kinds=("packed",)):
    """Change what the forms of these kinds give."""
    right = scores.scores_of

    def wrong(net, wanted):
        found = right(net, wanted)
        return change(found) if form_of(net) in kinds else found

    monkeypatch.setattr(scores, "scores_of", wrong)


def form_of(net):
    return "packed" if net.layout.packed else {"Blockwise": "layerwise"}.get(type(net).__name__, "whole")


def _gradients(found, change):
    return found._replace(gradients={layer: change(g) for layer, g in found.gradients.items()})


def _by_one_token(found):
    return found._replace(token_ids=(found.token_ids + 1) % 101)


def _by_one_layer(found):
    first, second = found.gradients
    return found._replace(gradients={first: found.gradients[second], second: found.gradients[first]})


def _by_one_neighbour(found):
    return _gradients(found, lambda g: g.roll(1, 0))


def _all_of_a_neighbour(found):
    return _by_one_neighbour(found)._replace(log_probs=found.log_probs.roll(1, 0), token_ids=found.token_ids.roll(1, 0))


def _by_one_rank(found):
    return _gradients(found, lambda g: g.roll(1, 1))


def _by_scale(found):
    return _gradients(found, lambda g: 1.01 * g)


def _by_temperature(found):
    return found._replace(log_probs=(found.log_probs * 1.05))


def _by_the_norm(found):
    return found._replace(residual_norm={layer: 1.01 * norm for layer, norm in found.residual_norm.items()})


FAULTS = [
    _by_one_token, _by_one_layer, _by_one_neighbour, _all_of_a_neighbour, _by_one_rank, _by_scale, _by_temperature,
    _by_the_norm,
]  # fmt: skip


def assert_right(found, model, rows):
    for layer in found.gradients:
        for b, row in enumerate(rows):
            expected = plain_scores(model, row, layer, top_k=4)
            assert found.token_ids[b].tolist() == expected.token_ids.tolist()
            assert relative(found.gradients[layer][b], expected.gradients) < 1e-6
            torch.testing.assert_close(found.log_probs[b], expected.log_probs, atol=1e-5, rtol=0)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_caught_told_and_mended(fault, unproven, monkeypatch, caplog):
    model, rows = fresh("llama"), prompts(LENGTHS)
    planted(monkeypatch, fault)
    opened = FisherModel(model, layers=LAYERS, top_k=4)
    for _ in range(3):
        assert_right(opened.scores(*padded(rows, "left")), model, rows)
    told = [record.getMessage() for record in caplog.records if "given up" in record.getMessage()]
    assert len(told) == len({line.split(" is given up")[0] for line in told}) and "audit found" in told[0]
    assert any(f["form"] == "layerwise" and "audit found" in f["why"] for f in opened.forms.values())


def test_a_position_off_by_one_is_caught(unproven, monkeypatch):
    right = scores.pack_rows
    monkeypatch.setattr(
        scores, "pack_rows", lambda layout: (p := right(layout))._replace(position_ids=3 * p.position_ids)
    )
    model, rows = fresh("llama"), prompts(LENGTHS)
    assert_right(fisher_scores(model, *padded(rows, "left"), layers=LAYERS, top_k=4), model, rows)


def test_a_hook_that_is_lost_is_caught(unproven, monkeypatch):
    from fisher_vmap.model.wrappers import hooks_off

    right = scores.opened

    @contextmanager
    def without(choice, model, *rest, **more):
        with hooks_off(model) if choice.form == "packed" else nullcontext(), right(choice, model, *rest, **more) as net:
            yield net

    monkeypatch.setattr(scores, "opened", without)
    model, rows = fresh("llama"), prompts(LENGTHS)
    model.model.layers[2].register_forward_hook(lambda _m, _a, out: 1.02 * out)
    assert_right(fisher_scores(model, *padded(rows, "left"), layers=LAYERS, top_k=4), model, rows)


def test_a_stale_weight_is_caught(unproven, monkeypatch):
    from fisher_vmap.model.head import UnembeddingHead

    model, rows = fresh("llama"), prompts(LENGTHS)
    stale = model.lm_head.weight.detach().clone()
    monkeypatch.setattr(UnembeddingHead, "weight", property(lambda _self: stale))
    first = fisher_scores(model, *padded(rows, "left"), layers=LAYERS, top_k=4)
    assert_right(first, model, rows)
    model.lm_head.weight.data += 0.05 * torch.randn(101, 36, dtype=torch.float64)
    assert_right(fisher_scores(model, *padded(rows, "left"), layers=LAYERS, top_k=4), model, rows)


def test_the_full_matrix_and_the_linearised_network_are_audited(unproven, monkeypatch):
    from fisher_vmap.linearize.blockwise import Blockwise

    right = Blockwise._pull

    def scaled(self, unit_KBX):
        for arrived in right(self, unit_KBX):
            yield arrived._replace(cotangents=1.1 * arrived.cotangents)

    model, rows, layer = fresh("llama"), prompts(LENGTHS), LAYERS[1]
    with monkeypatch.context() as patch:
        expected = fisher_full(model, *padded(rows, "left"), layers=layer, rank=30)
        model = fresh("llama")
        patch.setattr(Blockwise, "_pull", scaled)
        patch.setattr("fisher_vmap.linearize.network._prove", lambda *_: None)
        found = fisher_full(model, *padded(rows, "left"), layers=layer, rank=30)
        assert relative(found.factors[layer], expected.factors[layer]) < 1e-6
        with FisherModel(fresh("llama"), layers=layer).linearize(*padded(rows, "left")) as net:
            ids = torch.tensor([[3, 4]] * 3)
            pulled = net.pullback(token_ids=ids)
        for b, row in enumerate(rows):
            assert relative(pulled[b], plain_scores(model, row, layer, token_ids=ids[b]).gradients) < 1e-6


def test_what_no_form_gets_right_is_refused(unproven, monkeypatch):
    planted(monkeypatch, _by_scale, kinds=("packed", "layerwise", "whole", "loop"))
    with pytest.raises(ValueError, match="no form of the kernel agrees"):
        fisher_scores(fresh("llama"), *padded(prompts(LENGTHS), "left"), layers=LAYERS, top_k=4)
    with pytest.raises(ValueError, match=r"the layerwise kernel disagrees with plain autograd at .*: the audit found"):
        fisher_scores(fresh("llama"), *padded(prompts(LENGTHS), "left"), layers=LAYERS, top_k=4, kernel="layerwise")


def test_audit_off_compares_nothing_but_what_reaches_beyond_the_proof(monkeypatch):
    compared = []
    for name in ("plain_log_probs", "plain_autograd"):
        right = getattr(audit, name)
        monkeypatch.setattr(audit, name, lambda *a, f=right, n=name: (compared.append(n), f(*a))[1])
    model = fresh("llama", max_position_embeddings=512)
    opened = FisherModel(model, layers=LAYERS, top_k=4, audit="off")
    for _ in range(3):
        opened.scores(*padded(prompts(LENGTHS), "left"))
    assert not compared
    opened.scores(*padded(prompts((200, 9)), "left"))
    assert compared == ["plain_autograd"] * 2  # the longest prompt, and the last row
    with pytest.raises(ValueError, match="audit is 'never'; expected 'auto', 'always' or 'off'"):
        FisherModel(model, layers=LAYERS, audit="never")


def test_calls_are_audited_at_1_2_4_8_and_batches_at_their_share(monkeypatch):
    scored = []
    right = audit.plain_autograd
    monkeypatch.setattr(audit, "plain_autograd", lambda *a: (scored.append(call), right(*a))[1])
    opened = FisherModel(fresh("llama"), layers=LAYERS, top_k=4)
    for call in range(1, 18):
        opened.scores(*padded(prompts((9,), seed=call), "left"))
    assert sorted(set(scored)) == [1, 2, 4, 8, 16]
    every = FisherModel(fresh("llama"), layers=LAYERS, top_k=4, audit="always")
    scored.clear()
    for call in range(1, 6):
        every.scores(*padded(prompts((9,), seed=call), "left"))
    assert sorted(set(scored)) == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("seed", range(8))
def test_a_batch_that_comes_again_is_audited_at_its_share(seed, monkeypatch):
    """Not at every call, or at none, by what is in it."""
    audited, right = [], audit.plain_log_probs
    monkeypatch.setattr(audit, "plain_log_probs", lambda *a: (audited.append(1), right(*a))[1])  # not of scores
    opened = FisherModel(fresh("llama"), layers=LAYERS[:1], top_k=4)
    batch = padded(prompts((9, 4, 7, 5), seed=seed), "left")
    for _ in range(2):
        opened.scores(*batch)
    audited.clear()
    for _ in range(64):
        opened.scores(*batch)
    assert 1 <= len(audited) <= 4  # one in 16, less those at which scores are audited


def test_longer_prompts_and_more_rows_are_proven_anew(caplog):
    """A part that sees rows where it should see positions is right on what the proof is made on."""
    model = fresh("llama", max_position_embeddings=512)

    def from_row_150(_module, _args, out):
        rows = torch.arange(out.shape[1], dtype=out.dtype)
        return out * (1 + 0.5 * (rows >= 150))[:, None]

    own = type(model.model.layers[1].mlp).forward
    mlp = model.model.layers[1].mlp
    mlp.forward = lambda x: from_row_150(None, None, own(mlp, x))  # a patched forward, not a hook
    opened = FisherModel(model, layers=LAYERS, top_k=4)
    assert_right(opened.scores(*padded(prompts(LENGTHS), "left")), model, prompts(LENGTHS))
    assert opened.forms[LAYERS[0]]["form"] == "packed"
    rows = prompts((100, 90, 110))
    assert_right(opened.scores(*padded(rows, "left")), model, rows)
    assert opened.forms[LAYERS[0]]["form"] == "layerwise"


# Runs.


@pytest.fixture
def job(tmp_path):
    model = save_model(tmp_path / "model")
    data = write_prompts(tmp_path / "prompts.jsonl", texts(14))
    return lambda out, **more: arguments(
        model, data, tmp_path / out, shard_size=4, batch_size=2, num_prompts=14, hook_layer_name="0,2", **more
    )


def _wrong_in_some_batches(monkeypatch):
    """The packed form is wrong for a prompt of 43 tokens, in the second shard."""
    right = scores.scores_of

    def wrong(net, wanted):
        found = right(net, wanted)
        if net.layout.packed and 38 < max(net.layout.lengths) < 45:
            return _by_temperature(_by_scale(found))
        return found

    monkeypatch.setattr(scores, "scores_of", wrong)


def _tensors(folder):
    results = open_results(folder)
    return [(results[i].S, results[i].V, results[i].log_probs) for i in range(len(results))]


def test_a_shard_with_a_wrong_batch_is_computed_anew_and_told(job, tmp_path, unproven, monkeypatch, caplog):
    main(job("right", audit="always"))
    _wrong_in_some_batches(monkeypatch)
    with caplog.at_level(logging.WARNING):
        main(job("mended", audit="always"))
    told = [r.getMessage() for r in caplog.records if "given up" in r.getMessage()]
    assert len(told) == 2  # one line a layer, however many shards
    for one, other in zip(_tensors(tmp_path / "right"), _tensors(tmp_path / "mended"), strict=True):
        for a, b in zip(one, other, strict=True):
            assert relative(torch.tensor(abs(b)), torch.tensor(abs(a))) < 1e-3
    index = json.loads((tmp_path / "mended" / "index.json").read_text())
    shards = {number for number, *_ in index["resolved"]["audits"]}
    table = pq.read_table(tmp_path / "mended" / "prompts.parquet").to_pydict()
    changed = {i // 4 for i, text in enumerate(table["audit"]) if text is not None}
    assert shards and shards == changed
    assert "layerwise form" in next(text for text in table["audit"] if text is not None)
    metadata = yaml.safe_load((tmp_path / "mended" / "metadata.yaml").read_text())
    assert metadata["resolved"]["audits"] == index["resolved"]["audits"]


def test_a_run_that_is_resumed_repeats_its_audits_to_the_bit(job, tmp_path, unproven, monkeypatch):
    _wrong_in_some_batches(monkeypatch)
    main(job("whole"))
    shard = tmp_path / "whole" / "shards" / "shard-00001.safetensors"
    before = {path.name: path.read_bytes() for path in shard.parent.iterdir()}
    notes = json.loads((tmp_path / "whole" / "index.json").read_text())["resolved"]
    shard.unlink()
    main(job("whole"))
    assert {path.name: path.read_bytes() for path in shard.parent.iterdir()} == before
    assert json.loads((tmp_path / "whole" / "index.json").read_text())["resolved"] == notes


def test_prompts_that_no_form_gets_right_fail_with_the_reason(job, tmp_path, unproven, monkeypatch):
    right = scores.scores_of

    def wrong(net, wanted):
        found = right(net, wanted)
        return found._replace(log_probs=1.1 * found.log_probs) if wanted.top_k > 2 else found

    monkeypatch.setattr(scores, "scores_of", wrong)
    assert main(job("failed", audit="always")) == 0
    results = open_results(tmp_path / "failed")
    assert {record.status for record in results} == {"failed"}
    assert "no form of the kernel agrees" in results[0].reason and "audit found" in results[0].reason


def test_audit_off_is_told_in_the_metadata(job, tmp_path):
    main(job("off", audit="off"))
    assert yaml.safe_load((tmp_path / "off" / "metadata.yaml").read_text())["settings"]["audit"] == "off"


@pytest.mark.parametrize("positions", ["last", "mask"])
def test_a_score_is_audited_wherever_the_bias_is(unproven, monkeypatch, caplog, positions):
    model, rows = fresh("llama"), prompts(LENGTHS)
    ids, mask = padded(rows, "left")
    where = mask.clone()
    where[:, -1] = 0
    planted(monkeypatch, _by_scale)
    with caplog.at_level(logging.INFO, logger="fisher_vmap"):
        chosen = positions if positions == "last" else where
        fisher_scores(model, ids, mask, layers=LAYERS, top_k=4, positions=chosen, audit="always")
    assert "could not be audited" not in caplog.text
    assert "the audit found the score" in caplog.text


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("module", ["unembedding", "final norm"])
def test_a_module_after_the_blocks_passes_its_audit(family, module):
    names = {"llama": ("lm_head", "model.norm"), "gpt2": ("lm_head", "transformer.ln_f")}[family]
    model, rows, name = fresh(family), prompts(LENGTHS), names[module == "final norm"]
    for _ in range(2):
        found = fisher_scores(model, *padded(rows, "left"), layers=name, top_k=4, audit="always")
        for b, row in enumerate(rows):
            expected = plain_scores(model, row, name, token_ids=found.token_ids[b])
            assert relative(found.gradients[name][b], expected.gradients) < 1e-6
