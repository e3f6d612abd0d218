"""What a step costs: a model that ranks plans. **None of its constants has been measured by this project yet.**

They are data sheets' and other people's figures of Hopper, or guesses; all are in `Machine`, to be replaced by what
`bench/gpu.sh` measures. A model of so few terms is no bound and no promise: it decides which kernel is compiled first.

Dims: G gates, H units, B rows of the batch, N rows of a tile; M rows and K columns of a block's share of the matrix, or of its
transpose, which is what backward multiplies with.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from gradkernels.cells import Cell

from .backward import Backward
from .variant import BYTES, Variant


@dataclass(frozen=True)
class Machine:
    """Cycles, and bytes that one multiprocessor moves in a cycle."""

    clock: float = 1.7e9  # hertz, under load
    mma: float = 6.5  # of one product of 16 x 8 x 32 bytes on a quarter of a multiprocessor
    chain: float = 130  # of four products that depend on one another, and of the loads before the first
    block: float = 250  # block barriers, sums, addresses
    gate: float = 30  # instructions of a lane for one gate of a unit: its part of the cell, loads and stores
    shared: float = 128  # shared memory
    l2: float = 24  # L2, all multiprocessors reading
    l2_latency: float = 300
    barrier: float = 900  # of a grid: fence, atomic, poll
    told: float = 1000  # a word's way through L2 to who polls for it, block barriers before and after
    neighbour: float = 16  # a neighbour's shared memory
    neighbour_latency: float = 250
    launch: float = 8500  # of the host, a matrix product or a kernel: 5 microseconds
    library: float = 2500  # products of two 16-bit numbers in a cycle by a library, of large matrices


MACHINE = Machine()
QUARTERS, LANES, TILE_BYTES = 4, 32, 512
PRODUCTS = {"bf16": 1, "fp16": 1, "tf32": 1, "fp32": 3}  # mma for a product of two numbers
LIBRARY = {"bf16": 1, "fp16": 1, "tf32": 2, "fp32": 16}  # what a library takes longer than for 16 bits


def shares(v: Variant, which: str) -> list[tuple[int, int]]:
    """M, K of every product of a step: the part of the matrix that a block multiplies with."""
    G, Q = v.cell.G, len(v.cell.second)
    parts = v.C if v.exchange == "grid" else 1  # blocks that have a part of the contraction each
    gates = [n for n in (G - Q, Q) if n]
    if which == "forward":
        return [(n * v.U * parts, v.H // parts) for n in gates]
    senders = -(-v.H // (v.C * v.U)) if v.exchange == "grid" else 1
    return [(v.C * v.U, n * v.U * senders) for n in gates]


def tiles(v: Variant, which: str) -> list[tuple[int, int]]:
    """Of 16 rows x 32 bytes, of a warp, in every product: how many over rows, how many over the contraction."""
    split = lambda n, size, warps: -(-n // (size * warps))
    size = BYTES[v.number]
    return [(-(-split(M, 8, v.WM) // 2), split(K * size, 32, v.WK)) for M, K in shares(v, which)]


def tile(v: Variant, which: str, m: Machine = MACHINE) -> float:
    """Cycles of one step of one tile of rows."""
    return v.U * v.N * v.cell.G * m.gate / LANES / QUARTERS + sum(
        _product(v, which, *pair, m) for pair in zip(shares(v, which), tiles(v, which), strict=True)
    )


def _product(v: Variant, which: str, share: tuple[int, int], tiles: tuple[int, int], m: Machine) -> float:
    """Cycles of a product with its exchange."""
    (M, K), (rows, columns), warps, size = share, tiles, v.WM * v.WK, BYTES[v.number]
    sums = rows * v.N / 8  # of a warp, independent of one another; of few it makes two chains
    busy, waiting = sums * m.mma * max(1, warps / QUARTERS), m.chain / 4 / (2 if sums < 4 else 1)
    mma = columns * PRODUCTS[v.number] * max(busy, waiting)
    column = rows * warps * TILE_BYTES
    inside = min(v.SHARED, max(0, columns - v.KEPT)) * column / m.shared
    streamed = max(0, columns - v.KEPT - v.SHARED) * column / m.l2
    operand = (v.WM * v.N * K * size + (8 * M * v.N * v.WK if v.WK > 1 else 0)) / m.shared
    cycles = max(mma, inside, streamed) + operand + m.chain + m.block
    pushed = (v.C - 1) / v.C * 4 * M * v.N / m.neighbour  # partial sums to their owners
    if v.exchange == "cluster":
        handed = v.N * v.C * v.U * size / m.neighbour if which == "forward" else pushed
        return cycles + (m.neighbour_latency + handed if v.C > 1 else 0)
    if which == "forward" or (isinstance(v, Backward) and v.told):
        cycles += m.told + 2 * v.N * K * size / m.l2  # words come with their turns
    else:
        cycles += m.barrier + m.l2_latency + v.N * K * size / m.l2
    return cycles + (m.neighbour_latency + pushed if v.C > 1 else 0)


def step(cell: Cell, number: str, H: int, B: int, multiprocessors: int, m: Machine = MACHINE) -> float:
    """Cycles of one step of all rows as launches: matrix products of a library and pointwise kernels, about alike in both
    directions."""
    launches = 4 if cell.second else 2
    read = cell.G * H * H * BYTES[number] / (m.l2 * multiprocessors)
    product = cell.G * H * H * B * LIBRARY[number] / (m.library * multiprocessors)
    return launches * m.launch + max(read, product)


def microseconds(cycles: float, m: Machine = MACHINE) -> float:
    return math.inf if math.isinf(cycles) else cycles / m.clock * 1e6
