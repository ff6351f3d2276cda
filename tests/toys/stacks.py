"""Models with several lists of modules, of which one holds the decoder's blocks."""

from models import WIDTH
from torch import Tensor, nn

from toys import ToyBlock, ToyLM


class TowerAside(ToyLM):
    """A tower for something that is no text, larger than the decoder, and its own list of experts in each block."""

    def __init__(self) -> None:
        super().__init__()
        self.tower = nn.ModuleList(ToyBlock() for _ in range(9)).double()
        for block in self.blocks:
            block.experts = nn.ModuleList(nn.Linear(WIDTH, 400) for _ in range(3)).double()


class TowerOverPatches(TowerAside):
    """The tower is called as well, on one row for every two tokens, and nothing comes of it."""

    def walk(self, x: Tensor) -> Tensor:
        patches = x[:, ::2]
        for block in self.tower:
            patches = block(patches)
        return super().walk(x) + 0 * patches.sum(1, keepdim=True)


class TwoStacks(ToyLM):
    """A smaller stack below the larger one."""

    def __init__(self) -> None:
        super().__init__()
        self.lower = nn.ModuleList([ToyBlock(), ToyBlock()]).double()

    def walk(self, x: Tensor) -> Tensor:
        for block in self.lower:
            x = block(x)
        return super().walk(x)


class Grouped(ToyLM):
    """Blocks in groups: a list of lists, whose entries are not called themselves."""

    def __init__(self) -> None:
        super().__init__()
        self.groups = nn.ModuleList([nn.ModuleList(list(self.blocks)), nn.ModuleList([ToyBlock()])]).double()
        del self.blocks

    def walk(self, x: Tensor) -> Tensor:
        for group in self.groups:
            for block in group:
                x = block(x)
        return x


class InSequence(ToyLM):
    """Blocks in an `nn.Sequential`, beside another one that is larger and no stack."""

    def __init__(self) -> None:
        super().__init__()
        self.stack = nn.Sequential(*self.blocks)
        self.norm = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 4000), nn.Linear(4000, WIDTH)).double()
        del self.blocks

    def walk(self, x: Tensor) -> Tensor:
        return self.stack(x)


class SomeUncalled(ToyLM):
    """Blocks 1 and 3 wait for an image."""

    def walk(self, x: Tensor) -> Tensor:
        for block in (self.blocks[0], self.blocks[2]):
            x = block(x)
        return x
