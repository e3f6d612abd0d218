"""Which tiles, warps and stages the kernels of attention have, by GPU, kind of number, width and kernel.

The table is what compiles without spilling more than a few values, in the largest tiles that do; nothing is timed at run time. Where
Triton can give the loads of forward to warps of their own, they are: `SPECIALIZED` lists where, by version,
because elsewhere it fails to compile or silently does not, and a test compiles all of it.

Dims: Tq queries, D width of queries and keys, E of values; BM queries and BN keys of a tile.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import triton
import triton.language as tl
from triton.runtime.interpreter import InterpretedFunction

from gradkernels.backends.triton.launch import ROWS, Limits, Number, options, padded


@dataclass(frozen=True)
class Tile:
    """What a program has."""

    BM: int  # queries
    BN: int  # keys
    warps: int
    stages: int
    WS: bool = False  # whether loads are a matter of other warps than products

    @property
    def options(self) -> dict[str, Any]:
        return options(self.warps) | {"num_stages": self.stages}


@dataclass(frozen=True)
class Shape:
    """What a kernel is compiled for."""

    D: int
    E: int
    DP: int  # D or more, a power of two
    EP: int
    UNIT: int  # values that strides are counted in
    BIAS_STEP: int  # between the biases of two keys
    ACC: tl.dtype
    PRECISION: str  # of tl.dot
    BM: int
    BN: int
    WS: bool


# Bytes of a row of queries -> tiles, the best first; the first that fits into shared memory is taken, or else the least.
Rows = dict[int, list[Tile]]
LEAST = Tile(16, 16, 4, 1)
HOPPER: dict[str, Rows] = {  # values of 16 bits, whose products are made by four warps together
    "forward": {256: [Tile(128, 64, 8, 3)], 512: [Tile(64, 32, 8, 2)]},
    "queries": {128: [Tile(128, 64, 8, 2)], 256: [Tile(128, 32, 8, 2)], 512: [Tile(32, 32, 4, 2)]},
    "keys": {256: [Tile(32, 128, 8, 2)], 512: [Tile(32, 32, 8, 2)]},
    "bias": {128: [Tile(64, 64, 8, 2)], 256: [Tile(64, 32, 8, 2)], 512: [Tile(32, 32, 4, 2)]},
}
HALVES: dict[str, Rows] = {  # values of 16 bits elsewhere
    "forward": {
        128: [Tile(128, 64, 8, 3), Tile(64, 32, 4, 2)],
        256: [Tile(128, 64, 8, 3), Tile(128, 32, 8, 2), Tile(64, 32, 4, 2)],
        512: [Tile(64, 32, 8, 2), Tile(32, 32, 4, 1)],
    },
    "queries": {256: [Tile(128, 32, 8, 2), Tile(32, 32, 4, 2)], 512: [Tile(64, 32, 8, 2), Tile(32, 32, 4, 2)]},
    "keys": {
        128: [Tile(32, 128, 8, 2), Tile(32, 64, 4, 2)],
        256: [Tile(64, 64, 8, 2), Tile(32, 32, 4, 2)],
        512: [Tile(32, 32, 8, 2)],
    },
    "bias": {256: [Tile(64, 32, 8, 2), Tile(32, 32, 4, 2)], 512: [Tile(32, 32, 4, 2)]},
}
TF32: dict[str, Rows] = {
    "forward": {256: [Tile(128, 64, 8, 3), Tile(64, 32, 4, 2)], 512: [Tile(64, 32, 8, 2)], 1024: [Tile(32, 32, 8, 1)]},
    "queries": {256: [Tile(128, 32, 8, 2), Tile(32, 32, 4, 2)], 512: [Tile(32, 32, 8, 2)], 1024: [LEAST]},
    "keys": {256: [Tile(32, 64, 8, 2)], 512: [Tile(32, 32, 8, 2)], 1024: [LEAST]},
    "bias": {256: [Tile(32, 32, 4, 2)], 512: [Tile(32, 32, 8, 2)], 1024: [LEAST]},
}
ONE_BY_ONE: dict[str, Rows] = {  # products that are single operations, of all factors in registers
    "forward": {256: [Tile(64, 32, 8, 2)], 512: [Tile(32, 32, 4, 2)], 2048: [LEAST]},
    "queries": {512: [Tile(32, 32, 4, 2), Tile(16, 16, 4, 2)], 1024: [Tile(16, 16, 4, 2)], 2048: [Tile(16, 16, 8, 1)]},
    "keys": {256: [Tile(32, 32, 8, 2)], 1024: [LEAST], 2048: [Tile(16, 16, 8, 1)]},
    "bias": {256: [Tile(32, 32, 4, 2)], 1024: [Tile(16, 16, 4, 2)], 2048: [Tile(16, 16, 8, 1)]},
}

# (version of Triton, compute capability, D and E, dropout) -> the tile of forward with warps of their own for loads. Values are
# of 16 bits, rows begin on multiples of 16 bytes, and nothing is added to scores and nothing masked but by place.
SPECIALIZED: dict[tuple[str, int | None, int, bool], Tile] = {
    ("3.6", 90, 64, False): Tile(128, 128, 4, 2, True),
    ("3.6", 90, 128, False): Tile(128, 128, 4, 2, True),
    ("3.6", 100, 64, False): Tile(128, 128, 4, 2, True),
    ("3.6", 100, 64, True): Tile(128, 64, 4, 2, True),
    ("3.9", 90, 64, False): Tile(128, 128, 4, 2, True),
    ("3.9", 90, 64, True): Tile(128, 64, 4, 2, True),
    ("3.9", 90, 128, False): Tile(128, 128, 4, 2, True),
    ("3.9", 90, 128, True): Tile(128, 64, 4, 2, True),
    ("3.9", 100, 64, False): Tile(128, 128, 4, 2, True),
    ("3.9", 100, 64, True): Tile(128, 64, 4, 2, True),
}
VERSION = ".".join(triton.__version__.split(".")[:2])


def capability() -> int | None:
    """Compute capability of the current GPU of NVIDIA's; None for others, and in the interpreter."""
    if isinstance(tl.zeros, InterpretedFunction):
        return None
    target = triton.runtime.driver.active.get_current_target()
    return target.arch if target.backend == "cuda" else None


def memory(kernel: str, tile: Tile, width: int, bytes: int, dropout: bool) -> int:
    """Bytes of shared memory that a program takes, about: what it keeps, what is on its way, and an exchange between warps."""
    kept, moving = (tile.BN, tile.BM) if kernel == "keys" else (tile.BM, tile.BN)
    kept = kept if kernel == "forward" else 2 * kept
    exchanged = tile.BM * tile.BN * max(4, bytes) * dropout
    return (kept + 2 * tile.stages * moving) * width * bytes + exchanged + 1024


def choose(
    kernel: str,  # forward, queries, keys or bias
    number: Number,
    at: Limits,
    D: int,
    E: int,
    Tq: int | None,  # None: it differs between sequences
    dropout: bool,
    plain: bool,  # whether rows begin on multiples of 16 bytes, and scores are those of places alone
) -> Tile | None:
    """The tile of a kernel; None: there is none that fits into shared memory."""
    width, arch = padded(max(D, E)), capability()
    short = Tq is not None and Tq <= ROWS
    if kernel == "forward" and number.bytes == 2 and D == E and plain and not short:
        special = SPECIALIZED.get((VERSION, arch, D, dropout))
        if special is not None:
            return special
    if number.bytes == 2:
        table = HOPPER if arch == 90 else HALVES
    else:
        table = TF32 if number.tensor_cores else ONE_BY_ONE
    tiles = next(tiles for row, tiles in table[kernel].items() if row >= width * number.bytes)
    for tile in (*tiles, LEAST):
        if memory(kernel, tile, width, number.bytes, dropout) <= at.shared:
            if short and kernel in (
                "forward",
                "queries",
            ):  # few queries: what there would be no rows for is not multiplied
                return Tile(ROWS, min(tile.BN, 32), 4, tile.stages)
            return tile
    return None
