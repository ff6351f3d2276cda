"""MLPs: pulled back and pushed against plain autograd, and told from what is none."""

import copy

import pytest
import torch
from devices import placed
from fused_cases import assert_pulls_back_right, draw
from models import tiny
from oracles import relative
from part_cases import by_autograd, pulled, seen_by
from torch import Tensor, nn
from torch.func import jvp, vmap
from torch.nn import functional as F
from transformers import Phi3Config
from transformers.models.phi3.modeling_phi3 import Phi3MLP
from transformers.pytorch_utils import Conv1D

from fisher_vmap.kernels.decoder_block import fused_forward
from fisher_vmap.kernels.mlp import mlp_of

D, M, N, K = 36, 58, 7, 4


class Joined(nn.Module):
    """An MLP with one layer for gate and up."""

    def __init__(self, halves: str):
        super().__init__()
        self.halves = halves
        self.both, self.out, self.act = nn.Linear(D, 2 * M), nn.Linear(M, D), nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        both = self.both(x)
        first, second = (both[..., ::2], both[..., 1::2]) if "interleaved" in self.halves else both.chunk(2, -1)
        return self.out(first * self.act(second) if "up first" in self.halves else self.act(first) * second)


class Limited(Joined):
    """With large values cut off at a limit that it holds."""

    def __init__(self):
        super().__init__("gate first")
        self.limit = 0.7

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.both(x).chunk(2, -1)
        return self.out(self.act(gate.clamp(max=self.limit)) * up.clamp(-self.limit, self.limit))


class Wide(Joined):
    """What is between its layers is computed in float32."""

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.both(x).float().chunk(2, -1)
        return self.out((self.act(gate) * up).to(x.dtype))


class Plain(nn.Module):
    def __init__(self, act=None, up=nn.Linear, dropout: float = 0.0):
        super().__init__()
        self.up, self.down, self.drop = up(D, M), nn.Linear(M, D), nn.Dropout(dropout)
        if act is not None:
            self.act = act

    def forward(self, x: Tensor) -> Tensor:
        act = getattr(self, "act", F.silu)
        return self.drop(self.down(act(self.up(x))))


def phi3(**changes) -> nn.Module:
    return Phi3MLP(Phi3Config(hidden_size=D, intermediate_size=M, pad_token_id=0, **changes))


def drawn(module: nn.Module, dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)
    return module.to(dtype).eval()


MADE = {
    "phi3": phi3,
    "joined, up first": lambda: Joined("up first"),
    "joined, interleaved": lambda: Joined("interleaved"),
    "joined, interleaved, up first": lambda: Joined("interleaved, up first"),
    "with a limit": Limited,
    "activation not held": Plain,
    "lambda": lambda: Plain(lambda x: F.relu(x).square()),
    "dropout in evaluation": lambda: Plain(nn.GELU(), dropout=0.5),
}
IN_MODELS = {
    "llama": "model.layers.1.mlp",
    "gemma2": "model.layers.2.mlp",
    "gpt2": "transformer.h.1.mlp",
    "gpt_neox": "gpt_neox.layers.1.mlp",
    "phi": "model.layers.1.mlp",
}


def mlp(kind: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    if kind == "in float32":  # which a module of float64 would narrow
        return drawn(Wide("gate first"), dtype)
    return drawn(MADE[kind](), dtype) if kind in MADE else tiny(kind, dtype).get_submodule(IN_MODELS[kind])


@pytest.mark.parametrize("kind", [*IN_MODELS, *MADE])
def test_fused_pullbacks(kind, device):
    assert_pulls_back_right(mlp(kind), D, 1e-12, device)


@pytest.mark.parametrize("kind", ["llama", "phi3", "gpt2", "joined, interleaved, up first"])
def test_fused_pushforwards(kind, device):
    module, x, T = placed((mlp(kind), draw(2, 5, D), draw(K, 2, 5, D, seed=1)), device)
    forward = fused_forward(module)
    found = vmap(lambda t: jvp(forward, (x,), (t,))[1])(T)
    expected = torch.stack([jvp(module, (x,), (t,))[1] for t in T])
    assert relative(found, expected) < 1e-12
    assert relative(jvp(forward, (x,), (T[0],))[1], expected[0]) < 1e-12


@pytest.mark.parametrize("ends", [[], [3]])
@pytest.mark.parametrize("kind", [*IN_MODELS, *MADE])
def test_pullbacks_from_the_forward(kind, ends, device):
    module, x, G = placed((mlp(kind), draw(1, N, D), draw(N, K, D, seed=1)), device)
    part = mlp_of(module)
    assert relative(pulled(part, module, x, G, ends), by_autograd(module, x, G)) < 1e-12
    assert part.width >= M


@pytest.mark.parametrize("kind", ["llama", "phi3", "gpt2", "in float32"])
def test_bfloat16_is_no_further_from_the_truth_than_autograd(kind, device):
    low = copy.deepcopy(mlp(kind)).to(torch.bfloat16)
    module, x, G = placed((low, draw(1, N, D), draw(N, K, D, seed=1)), device)
    x, G = x.bfloat16(), G.bfloat16()
    truth = by_autograd(copy.deepcopy(module).double(), x.double(), G.double())
    own, plain = pulled(mlp_of(module), module, x, G, [3]), by_autograd(module, x, G)
    assert own.dtype == torch.bfloat16
    assert relative(own, truth) < 1.2 * relative(plain, truth) < 0.02


def test_the_forward_of_a_part_is_the_modules_own():
    module = mlp("phi3")
    x = draw(1, N, D)
    y, seen = seen_by(mlp_of(module), module, x)
    assert torch.equal(mlp_of(module).forward(x)[0], y)
    assert list(seen.outputs) == [module.gate_up_proj]


def test_what_is_no_gated_mlp():
    mlp = tiny("llama").get_submodule("model.layers.1.mlp")
    assert mlp_of(mlp) is not None

    class Other(type(mlp)):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    other = Other(mlp.config).double()
    assert mlp_of(other) is None and fused_forward(other) is None


class Scaled(Plain):
    """With a scale that is one for now."""

    def __init__(self):
        super().__init__(nn.SiLU())
        self.scale = nn.Buffer(torch.ones(M))

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.scale * self.act(self.up(x)))


class Cut(Plain):
    """With large values cut off, without a word of it in what it holds."""

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.act(self.up(x).clamp(max=10.0)))


class Branched(Plain):
    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.act(self.up(x))) + x


class OwnLinear(nn.Linear):
    pass


class OwnConv1D(Conv1D):
    def __init__(self, inputs: int, outputs: int):
        super().__init__(outputs, inputs)


@pytest.mark.parametrize(
    "refused",
    [
        Scaled,
        lambda: Cut(nn.SiLU()),
        lambda: Branched(nn.SiLU()),
        lambda: Plain(nn.Softmax(-1)),
        lambda: Plain(nn.LayerNorm(M)),
        lambda: Plain(lambda x: F.silu(x) - F.silu(x).mean()),
        lambda: Plain(nn.SiLU(), up=OwnLinear),
        lambda: Plain(nn.SiLU(), up=OwnConv1D),
        lambda: nn.Sequential(nn.Linear(D, M), nn.SiLU(), nn.Linear(M, M), nn.SiLU(), nn.Linear(M, D)),
    ],
)
def test_what_does_more_is_refused(refused):
    module = drawn(refused())
    if isinstance(module, Scaled):
        nn.init.ones_(module.scale)
    assert mlp_of(module) is None and fused_forward(module) is None


def test_dropout_in_training_is_refused():
    module = drawn(Plain(nn.SiLU(), dropout=1e-9))
    assert mlp_of(module) is not None
    assert mlp_of(module.train()) is None


@pytest.mark.parametrize("where", ["", "up", "act"])
def test_hooks_and_replaced_forwards_are_refused(where):
    module = drawn(Plain(nn.SiLU()))
    inner = module.get_submodule(where)
    handle = inner.register_forward_hook(lambda *_: None)
    assert mlp_of(module) is None
    assert (fused_forward(module) is None) == bool(where)  # its own hooks are called all the same
    handle.remove()
    assert mlp_of(module) is not None
    inner.forward = inner.forward
    assert mlp_of(module) is None and fused_forward(module) is None
