"""Sums over prompts of a lens's matrices, in memory and on the disk.

Each process keeps its sums in a file of its own, a part, and a file is replaced as a whole after each shard, with the
list of the shards that are in it: a killed process loses at most the shard it was at. J is summed in float64, so that
the division of the prompts among processes does not show in float32; the even prompts alone are summed once more in
float32, for the distance of two halves.
"""

import math
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, Self

import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from fisher_vmap.errors import UserError
from fisher_vmap.lens.matrices import PromptMatrices
from fisher_vmap.results.files import replacing
from fisher_vmap.results.index import SHARD_FOLDER, Stored

_PREFIX, _SUFFIX = "part-", ".safetensors"


class Shard(Stored):
    """What is in a sum of one shard: its first `prompts` prompts, of which `used` had results."""

    prompts: int
    used: int
    tokens: int
    skipped: dict[int, str]
    """Prompt index -> why it has no matrix."""
    failed: dict[int, str]


class _State(Stored):
    mark: str
    used: tuple[int, int]
    squares: dict[str, float]
    shards: dict[int, Shard]
    crc32: dict[str, int]


class Spread(NamedTuple):
    """How well a mean over prompts is known, as parts of |J| (Frobenius); NaN for a single prompt.

    Attributes:
        standard_error: of the mean.
        split_half: |J of the even prompts - J of the odd ones|; about twice the standard error.
    """

    standard_error: float
    split_half: float


@dataclass
class Sums:
    """Sums over the prompts of some shards.

    Attributes:
        mark: identifies the fit.
        widths: layer -> D.
        total: layer -> [D, D] float64, the sum of J.
        even: layer -> [D, D] float32, the same over prompts of even index.
        metric: [D, D] float64, the sum of C.
        squares: layer -> the sum of |J|^2.
        used: how many prompts of even and of odd index are in the sums.
        shards: by number.
    """

    mark: str
    widths: Mapping[str, int]
    total: dict[str, Tensor] = field(init=False)
    even: dict[str, Tensor] = field(init=False)
    metric: Tensor = field(init=False)
    squares: dict[str, float] = field(init=False)
    used: list[int] = field(init=False)
    shards: dict[int, Shard] = field(init=False)

    def __post_init__(self) -> None:
        """Begin at zero."""
        self.total = {layer: torch.zeros(D, D, dtype=torch.float64) for layer, D in self.widths.items()}
        self.even = {layer: torch.zeros(D, D) for layer, D in self.widths.items()}
        D = next(iter(self.widths.values()))
        self.metric = torch.zeros(D, D, dtype=torch.float64)
        self.squares, self.used, self.shards = dict.fromkeys(self.widths, 0.0), [0, 0], {}

    @property
    def prompts(self) -> int:
        """How many prompts are in the sums."""
        return sum(self.used)

    def add(self, index: int, found: PromptMatrices) -> None:
        """Add the matrices of the prompt of that index."""
        odd = index % 2
        for layer, J_DD in found.jacobians.items():
            self.total[layer] += J_DD
            if not odd:
                self.even[layer] += J_DD
            self.squares[layer] += float(J_DD.double().square().sum())
        self.metric += found.metric
        self.used[odd] += 1

    def mean(self, layer: str) -> Tensor:
        """J, [D, D] float32."""
        return (self.total[layer] / self.prompts).float()

    def spread(self, layer: str) -> Spread:
        """How well it is known."""
        n, (even, odd) = self.prompts, self.used
        mean_DD = self.total[layer] / max(n, 1)
        size = float(mean_DD.norm())
        if n < 2 or not size:
            return Spread(math.nan, math.nan)
        variance = max(0.0, self.squares[layer] / n - size**2) / (n - 1)
        even_DD = self.even[layer].double()
        gap = float((even_DD / even - (self.total[layer] - even_DD) / odd).norm()) if even and odd else math.nan
        return Spread(math.sqrt(variance) / size, gap / size)

    def save(self, path: Path) -> None:
        """Replace a part's file.

        Raises:
            UserError: it cannot be written.
        """
        tensors = {f"total/{layer}": x for layer, x in self.total.items()} | {"metric": self.metric}
        tensors |= {f"even/{layer}": x for layer, x in self.even.items()}
        crc32 = {name: _crc32(x) for name, x in tensors.items()}
        used = (self.used[0], self.used[1])
        state = _State(mark=self.mark, used=used, squares=self.squares, shards=self.shards, crc32=crc32)
        with replacing(path) as file:
            file.write(save(tensors, {"state": state.model_dump_json()}))

    @classmethod
    def load(cls, path: Path) -> Self:
        """The sums of a part's file.

        Raises:
            UserError: it is damaged.
        """
        try:
            with safe_open(path, "pt") as file:
                state = _state(file.metadata())
                tensors = {name: file.get_tensor(name) for name in state.crc32}
        except (OSError, SafetensorError, ValidationError, KeyError, TypeError) as error:
            raise _broken(path, error) from error
        if wrong := [name for name, x in tensors.items() if _crc32(x) != state.crc32[name]]:
            raise _broken(path, f"the checksum of {wrong[0]} differs")
        found = cls(state.mark, {name[6:]: len(x) for name, x in tensors.items() if name.startswith("total/")})
        found.total = {layer: tensors[f"total/{layer}"] for layer in found.widths}
        found.even = {layer: tensors[f"even/{layer}"] for layer in found.widths}
        found.metric, found.squares = tensors["metric"], dict(state.squares)
        found.used, found.shards = list(state.used), dict(state.shards)
        return found

    @classmethod
    def joined(cls, parts: Sequence["Sums"]) -> "Sums":
        """The sums of several parts together."""
        found = cls(parts[0].mark, parts[0].widths)
        for part in parts:
            for layer in found.widths:
                found.total[layer] += part.total[layer]
                found.even[layer] += part.even[layer]
                found.squares[layer] += part.squares[layer]
            found.metric += part.metric
            found.used = [a + b for a, b in zip(found.used, part.used, strict=True)]
            found.shards |= part.shards
        return found


def part_path(folder: Path, name: str) -> Path:
    """The file of a part."""
    return folder / SHARD_FOLDER / f"{_PREFIX}{name}{_SUFFIX}"


def part_files(folder: Path) -> list[Path]:
    """The files of all parts, in the order of their names."""
    return sorted((folder / SHARD_FOLDER).glob(f"{_PREFIX}*{_SUFFIX}"))


def stored_shards(paths: Iterable[Path], mark: str) -> dict[int, tuple[Path, Shard]]:
    """The shards that are in parts, read from the heads of their files: number -> its part and its account.

    Raises:
        UserError: a part is damaged or of another fit, or a shard is in two of them.
    """
    found: dict[int, tuple[Path, Shard]] = {}
    for path in paths:
        try:
            with safe_open(path, "pt") as file:
                state = _state(file.metadata())
        except (OSError, SafetensorError, ValidationError, KeyError, TypeError) as error:
            raise _broken(path, error) from error
        if state.mark != mark:
            raise UserError(f"{path} is of another fit; move it away, or use another --output_dir")
        for number, shard in state.shards.items():
            if number in found:
                raise UserError(
                    f"shard {number} is in {found[number][0]} and in {path}: its prompts would count twice; remove one "
                    "of the two files and give the same command again"
                )
            found[number] = path, shard
    return found


def _state(metadata: Mapping[str, str] | None) -> _State:
    return _State.model_validate_json((metadata or {})["state"])


def _broken(path: Path, reason: object) -> UserError:
    what = " ".join(str(reason).split())[:160]
    return UserError(f"{path} is damaged: {what}; remove it to compute its shards again, by the same command")


def _crc32(x: Tensor) -> int:
    return zlib.crc32(x.contiguous().numpy().tobytes())
