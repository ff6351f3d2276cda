"""Autograd functions of every make, in blocks: of the old form, wrong under vmap, without a rule of either kind."""

import torch
from torch import Tensor

from toys import ToyBlock, ToyLM


class OldForm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return torch.tanh(x)

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return grad * (1 - torch.tanh(x) ** 2)


class OldFormBlock(ToyBlock):
    def think(self, x: Tensor) -> Tensor:
        return x + self.down(OldForm.apply(self.up(self.norm2(x))))


class OldFormOfManyKinds(torch.autograd.Function):
    """Whatever a context is used for: tensors, attributes, several inputs and outputs, None, gradients not needed."""

    @staticmethod
    def forward(ctx, x, power, y=None):
        ctx.power, ctx.with_y = power, y is not None
        ctx.save_for_backward(x, y)
        return x**power if y is None else x**power * y, x.detach()

    @staticmethod
    def backward(ctx, grad, _):
        x, y = ctx.saved_tensors
        slope = ctx.power * x ** (ctx.power - 1) * (y if ctx.with_y else 1.0)
        return grad * slope if ctx.needs_input_grad[0] else None, None, grad * x**ctx.power if ctx.with_y else None


class ManyKindsBlock(ToyBlock):
    def think(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.up(self.norm2(x)))
        first, _ = OldFormOfManyKinds.apply(h, 3)
        second, _ = OldFormOfManyKinds.apply(h, 2, torch.sigmoid(h))
        return x + self.down(first + second)


class OldFormByValue(OldForm):
    """Looks at its gradient's values, which no transformation allows."""

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return grad * (1 - torch.tanh(x) ** 2) if float(grad.abs().sum()) >= 0 else grad


class OldFormByValueBlock(ToyBlock):
    def think(self, x: Tensor) -> Tensor:
        return x + self.down(OldFormByValue.apply(self.up(self.norm2(x))))


class WrongUnderVmap(torch.autograd.Function):
    """A batching rule that is wrong: right in plain autograd, wrong by half under vmap."""

    @staticmethod
    def forward(x):
        return x.clone()

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, grad):
        return WrongPullback.apply(grad)


class WrongPullback(torch.autograd.Function):
    @staticmethod
    def forward(grad):
        return grad.clone()

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, grad):
        return grad

    @staticmethod
    def vmap(info, in_dims, grad):
        return 0.5 * grad, in_dims[0]


class WrongBlock(ToyBlock):
    def think(self, x: Tensor) -> Tensor:
        return super().think(WrongUnderVmap.apply(x))


class Reversible(torch.autograd.Function):
    """Runs a block without a graph and forgets what a backward would need."""

    @staticmethod
    def forward(ctx, x, block):
        return block(x)

    @staticmethod
    def backward(ctx, grad):
        raise AssertionError("training mode only")


class ReversibleLM(ToyLM):
    def walk(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = Reversible.apply(x, block)
        return x


class NoForward(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x):
        return torch.tanh(x)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(output)

    @staticmethod
    def backward(ctx, g):
        (y,) = ctx.saved_tensors
        return g * (1 - y**2)


class WrongForward(NoForward):
    generate_vmap_rule = True

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(output)
        ctx.save_for_forward(output)

    @staticmethod
    def jvp(ctx, t):
        (y,) = ctx.saved_tensors
        return t * (1 - y**2) * 1.5
