"""Models whose chain of blocks is not whole, or no chain: other ways from a block to the top than the next block."""

from torch import Tensor

from toys import ToyBlock, ToyLM


class SharingBlock(ToyBlock):
    """Takes keys and values from a dictionary if there are any, and puts its own there if there are none."""

    def forward(self, hidden_states: Tensor, shared: dict[str, tuple[Tensor, Tensor]]) -> tuple[Tensor, str]:
        if "pair" not in shared:
            shared["pair"] = self.keys_and_values(hidden_states)
        return self.think(self.attend(hidden_states, *shared["pair"])), "and something else"


class SharedKeys(ToyLM):
    """Blocks from number 2 on attend to the keys and values of block 2."""

    def __init__(self) -> None:
        super().__init__([ToyBlock(), ToyBlock(), SharingBlock(), SharingBlock(), SharingBlock()])

    def walk(self, x: Tensor) -> Tensor:
        shared: dict[str, tuple[Tensor, Tensor]] = {}
        for block in self.blocks:
            x = block(x, shared=shared)[0] if isinstance(block, SharingBlock) else block(x)
        return x


class SkipBetween(ToyLM):
    """What block 0 returned is added again between blocks 2 and 3."""

    def walk(self, x: Tensor) -> Tensor:
        outputs = []
        for block in self.blocks:
            x = block(x if len(outputs) != 3 else x + 0.7 * outputs[0])
            outputs.append(x)
        return x


class SkipTaker(ToyBlock):
    def forward(self, hidden_states: Tensor, skip: Tensor) -> Tensor:
        return super().forward(hidden_states) + 0.7 * skip


class SkipInside(ToyLM):
    """The same, handed to block 3 as an argument: no value between the blocks gives it away."""

    def __init__(self) -> None:
        super().__init__([ToyBlock(), ToyBlock(), ToyBlock(), SkipTaker()])

    def walk(self, x: Tensor) -> Tensor:
        outputs = [self.blocks[0](x)]
        for block in self.blocks[1:3]:
            outputs.append(block(outputs[-1]))
        return self.blocks[3](outputs[-1], skip=outputs[0])


class SkipToTheHead(ToyLM):
    """What block 0 returned is added again after the last block."""

    def walk(self, x: Tensor) -> Tensor:
        first = x = self.blocks[0](x)
        for block in self.blocks[1:]:
            x = block(x)
        return x + 0.7 * first


class Between(ToyLM):
    """Something between two blocks that is no block itself."""

    def __init__(self, at: int, change, from_length: int = 0) -> None:
        super().__init__()
        self.at, self.change, self.from_length = at, change, from_length

    def walk(self, x: Tensor) -> Tensor:
        for number, block in enumerate(self.blocks):
            x = block(x)
            if number == self.at and x.shape[1] >= self.from_length:
                x = self.change(x)
        return x


class Recurrent(ToyLM):
    """Walks its blocks in the order given."""

    def __init__(self, order: tuple[int, ...]) -> None:
        super().__init__()
        self.order = order

    def walk(self, x: Tensor) -> Tensor:
        for number in self.order:
            x = self.blocks[number](x)
        return x


class Alternating(Recurrent):
    """Another order of the blocks in batches that are long."""

    def walk(self, x: Tensor) -> Tensor:
        self.order = (0, 1, 2, 3) if x.shape[1] < 12 else (0, 2, 1, 3)
        return super().walk(x)


class Looped(ToyLM):
    """Its blocks are gone through twice: a bias on one of them is added twice."""

    def walk(self, x):
        return super().walk(super().walk(x))
