"""The elementwise work of the pullbacks, compiled: the same numbers, rounded once."""

import os
import shutil
import subprocess
import sys

import pytest
import torch
from models import block, padded, prompts, tiny
from oracles import plain_scores, relative

from fisher_vmap import FisherModel, fisher_full, fisher_scores
from fisher_vmap.pullbacks import pointwise
from fisher_vmap.pullbacks.scratch import Scratch
from fisher_vmap.running.compiling import worth_compiling

needs_compiler = pytest.mark.skipif(
    shutil.which(os.environ.get("CXX", "g++")) is None, reason="torch.compile needs a C++ compiler"
)

LENGTHS = (5, 9, 3)
CPU = torch.device("cpu")


def rows(dtype, centred, K=3, N=7, D=20):
    """g and total [N, K, D], and what a norm shares among the cotangents, [N, 1, D]."""
    generator = torch.Generator().manual_seed(0)
    g, total = (torch.randn(N, K, D, generator=generator, dtype=torch.float64) for _ in range(2))
    scale, along, back, mean, r = (torch.randn(N, 1, D, generator=generator, dtype=torch.float64) for _ in range(5))
    shared = scale, along, back, mean if centred else None, r[..., :1]
    return g.to(dtype), total.to(dtype), [None if x is None else x.to(dtype) for x in shared]


def wide(g, shared):
    """The formula by `einsum`, in float64."""
    scale, along, back, mean, r = (None if x is None else x.double() for x in shared)
    g = g.double()
    dx = g * scale - back * torch.einsum("nkd,nd->nk", g, along[:, 0])[..., None]
    return dx if mean is None else dx - r * torch.einsum("nkd,nd->nk", g, mean[:, 0])[..., None]


@needs_compiler
@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_compiled_norm_is_the_formula_and_no_worse_than_torch(dtype, centred):
    g, total, shared = rows(dtype, centred)
    expected, gaps = wide(g, shared), {}
    for compiled in (False, True):
        with pointwise.compiled(compiled, CPU):
            dx = pointwise.norm_pullback(g, *shared, Scratch(), "dx").clone()
            added = total.clone()
            pointwise.add_norm_pullback(added, g, *shared, Scratch())
        gaps[compiled] = relative(dx, expected), relative(added, total.double() + expected)
    assert max(gaps[True]) < (1e-14 if dtype == torch.float64 else 4e-3)
    if dtype == torch.bfloat16:
        assert all(ours <= 1.1 * torchs for ours, torchs in zip(gaps[True], gaps[False], strict=True))


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_compiled_softmax_is_the_formula_and_no_worse_than_torch(dtype):
    generator = torch.Generator().manual_seed(1)
    dP = torch.randn(2, 3, 6, 4, 11, generator=generator, dtype=torch.float64).to(dtype)
    P = torch.rand(2, 3, 6, 1, 11, generator=generator, dtype=torch.float64).softmax(-1).to(dtype)
    wide_P = P.double()
    jacobian = torch.diag_embed(wide_P) - wide_P[..., :, None] * wide_P[..., None, :]
    expected, gaps = torch.einsum("bhtkij,bhtkj->bhtki", jacobian.expand(-1, -1, -1, 4, -1, -1), dP.double()), {}
    for compiled in (False, True):
        with pointwise.compiled(compiled, CPU):
            gaps[compiled] = relative(pointwise.softmax_pullback(dP.clone(), P), expected)
    assert gaps[True] < (1e-14 if dtype == torch.float64 else 3e-3)
    assert gaps[True] <= 1.1 * gaps[False] or dtype == torch.float64


@needs_compiler
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_neox"])
def test_compiled_scores_are_those_of_plain_autograd(family, monkeypatch):
    """Norms before and after, norms with a mean, blocks with a rule and without; every prompt, layer and token."""
    called, compile_ = set(), pointwise._compile
    monkeypatch.setattr(pointwise, "_compile", lambda f: (called.add(f.__name__), compile_(f))[1])
    model, batch = tiny(family, torch.float32), prompts(LENGTHS)  # in which alone their norms are ours to pull back
    layers = [block(family, 0), block(family, 2)]
    found = fisher_scores(model, *padded(batch, "left"), layers=layers, top_k=3, compile=True)
    assert "_softmax" in called or family == "gemma2"  # whose attention is transformers' own
    assert called & {"_norm_into", "_add_norm", "_centred_into", "_add_centred"} and not pointwise._given_up
    for layer in layers:
        for b, row in enumerate(batch):
            expected = plain_scores(model, row, layer, token_ids=found.token_ids[b])
            assert relative(found.gradients[layer][b], expected.gradients) < 1e-4
    called.clear()
    fisher_scores(model, *padded(batch, "left"), layers=layers, top_k=3)
    assert not called  # it ends with the call


@needs_compiler
def test_the_other_ways_in_compile_as_well():
    model, (ids, mask) = tiny("llama"), padded(prompts(LENGTHS), "right")
    layer = block("llama", 1)
    opened, plain = (FisherModel(model, layers=layer, top_k=3, compile=compiled) for compiled in (True, False))
    assert relative(opened.scores(ids, mask).gradients[layer], plain.scores(ids, mask).gradients[layer]) < 1e-12
    u = torch.randn(3, 2, model.config.hidden_size, dtype=torch.float64)
    with opened.linearize(ids, mask) as net, plain.linearize(ids, mask) as other:
        assert relative(net.pullback(u), other.pullback(u)) < 1e-12
    factors = [
        fisher_full(model, ids, mask, layers=layer, rank=3, trace_samples=0, compile=compiled).factors[layer]
        for compiled in (True, False)
    ]
    assert relative(factors[0].mT @ factors[0], factors[1].mT @ factors[1]) < 1e-10


def test_without_a_compiler_one_line_says_so(tmp_path):
    code = (
        "import torch\n"
        "from fisher_vmap.pullbacks.pointwise import compiled\n"
        "try:\n"
        "    with compiled(True, torch.device('cpu')): pass\n"
        "except ValueError as error:\n"
        "    print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True,
        env={**os.environ, "CXX": str(tmp_path / "nowhere"), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)},
    )  # fmt: skip
    (line,) = done.stdout.splitlines()
    assert "torch.compile does not work here" in line and "leave compile false" in line


@needs_compiler
def test_what_cannot_be_compiled_goes_on_without_and_says_so(monkeypatch, caplog):
    def fails(*_, **__):
        raise RuntimeError("recompile limit")

    monkeypatch.setattr(pointwise, "_given_up", set())
    dP, P = torch.rand(2, 3, 4, dtype=torch.float64), torch.rand(2, 1, 4, dtype=torch.float64)
    with pointwise.compiled(True, CPU):
        expected = pointwise.softmax_pullback(dP.clone(), P)
        monkeypatch.setattr(pointwise, "_compile", lambda function: fails)
        for _ in range(2):
            assert relative(pointwise.softmax_pullback(dP.clone(), P), expected) < 1e-14
    assert caplog.text.count("_softmax goes on without torch.compile: recompile limit") == 1


@pytest.fixture
def clock(monkeypatch):
    """A job that takes as long as the test says, by a clock of its own."""

    class Clock:
        now, takes = 0.0, {False: 1.0, True: 0.5}
        done: list[bool]

        def job(self, compiled):
            self.done.append(compiled)
            self.now += self.takes[compiled]

    clock = Clock()
    clock.done = []
    monkeypatch.setattr("fisher_vmap.running.compiling.time.perf_counter", lambda: clock.now)
    return clock


def test_a_short_run_is_not_compiled(clock):
    assert worth_compiling(clock.job, jobs=99, least_seconds=100) is False
    assert clock.done == [False]


@pytest.mark.parametrize("jobs", [101, None])
def test_a_long_run_is_compiled_if_that_is_faster(clock, jobs):
    assert worth_compiling(clock.job, jobs, least_seconds=100) is True
    assert clock.done.count(True) == 4 and clock.done.count(False) == 4
    clock.takes = {False: 1.0, True: 1.0}
    assert worth_compiling(clock.job, jobs, least_seconds=100) is False


def test_a_long_run_goes_on_without_a_compiler(clock, caplog):
    def job(compiled):
        if compiled:
            raise ValueError("no compiler")
        clock.job(compiled)

    assert worth_compiling(job, jobs=None) is False
    assert "no compiler" in caplog.text
