"""Which tiles, warps and stages a kernel of attention has, by GPU, widths and pass; and where loads are a warp's own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from gradkernels.backends.triton.launch import options


@dataclass(frozen=True)
class Tile:
    """What a program has."""

    BM: int  # queries
    BN: int  # keys
    warps: int
    stages: int
    WS: bool = False

    @property
    def options(self) -> dict[str, Any]:
        return options(self.warps) | {"num_stages": self.stages}


@dataclass(frozen=True)
class Shape:
    """What a kernel is compiled for."""

    D: int
    E: int
    DP: int
    EP: int
    UNIT: int
    BIAS_STEP: int
    ACC: Any
    PRECISION: str
    BM: int
    BN: int
    WS: bool


def choose(kernel: str, call: Any) -> Tile:
    return Tile(16, 16, 4, 2)
