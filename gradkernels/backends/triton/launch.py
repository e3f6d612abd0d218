"""What a kernel is launched with: the numbers, the GPU's limits, the choice between the two kinds, tiles; and the launch.

Dims: B batch, H units, R width of the first state, G gates.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.compiler.compiler import make_backend
from triton.runtime.interpreter import InterpretedFunction

from gradkernels.backends._sequence import tf32
from gradkernels.cells import Cell

ROWS = 16  # the least that tensor cores take
UNITS = 64  # of a program whose units do not meet
TILES = [(BM, BU) for BM in (16, 32, 64, 128) for BU in (16, 32)]  # rows x units of a program
L2_BYTES = 64  # a clock from L2 into a multiprocessor,
L2_SHARE = 0.4  # and which share of all of them can have that at once
PLAIN_BYTES = 16 << 10  # of a matrix whose products are unrolled into single operations

# ---------------------------------------------------------------- what there is


@dataclass(frozen=True)
class Number:
    """How a dtype is multiplied and added."""

    bytes: int
    accumulator: torch.dtype
    precision: str  # of tl.dot; products of 16-bit values and of float64 have only one
    products: int  # of a multiprocessor in a clock, about
    largest: int  # rows x units of a tile whose planes fit into registers

    @classmethod
    def of(cls, dtype: torch.dtype, at: Limits) -> Number:
        if dtype is torch.float64:
            return cls(8, torch.float64, "ieee", 64, 32 * 16)
        if dtype.itemsize == 2:
            return cls(2, torch.float32, "ieee", 1024, 128 * 32)
        if tf32() and at.tf32:
            return cls(4, torch.float32, "tf32", 512, 128 * 32)
        return cls(4, torch.float32, "ieee", 128, 32 * 32)

    @property
    def tensor_cores(self) -> bool:
        """Whether a product is one operation for a warp, of whatever size, and not one for every factor."""
        return self.products > 128

    @property
    def constants(self) -> dict[str, Any]:
        return {"ACC": tl.float64 if self.accumulator is torch.float64 else tl.float32, "PRECISION": self.precision}

    def chunk(self, K: int) -> int:
        """BK of a contraction: a line of 128 bytes, or less where that divides it and a line does not."""
        line = 128 // self.bytes
        return next((BK for BK in (line, line // 2, ROWS) if BK >= ROWS and K % BK == 0), line)


@dataclass(frozen=True)
class Limits:
    """Of the GPU at hand."""

    shared: int  # bytes of shared memory that a program can have
    multiprocessors: int
    overlap: bool  # whether a launch may begin while the one before ends
    tf32: bool  # whether Triton has such products there
    lanes: int = 32  # threads of a warp


def limits() -> Limits:
    """Those of the current device; in the interpreter, which has none, those of a small one."""
    if isinstance(tl.zeros, InterpretedFunction):
        return Limits(64 << 10, 64, False, True)
    return _limits(triton.runtime.driver.active.get_current_device())


@functools.cache
def _limits(device: int) -> Limits:
    driver = triton.runtime.driver.active
    properties, target = driver.utils.get_device_properties(device), driver.get_current_target()
    overlap = target.backend == "cuda" and target.arch >= 90
    precisions = make_backend(target).parse_options(options(4)).allowed_dot_input_precisions
    multiprocessors = properties.get("multiprocessor_count", 128)
    return Limits(properties["max_shared_mem"], multiprocessors, overlap, "tf32" in precisions, target.warp_size)


# ---------------------------------------------------------------- choices


def padded(units: int) -> int:
    return max(ROWS, triton.next_power_of_2(units))


def is_resident(cell: Cell, H: int, R: int, projected: bool, number: Number, at: Limits) -> bool:
    """Whether one program keeps the recurrent matrix, all gates of all units, and the projection: padded, in three quarters of
    shared memory, the rest being for exchanges between its warps."""
    matrices = (cell.G + projected) * padded(H) * padded(R) * number.bytes
    return matrices <= (at.shared * 3 // 4 if number.tensor_cores else PLAIN_BYTES)


def resident_options(H: int, number: Number) -> dict[str, Any]:
    return options(4 if number.tensor_cores and padded(H) <= 32 else 8)


@dataclass(frozen=True)
class Tile:
    """What a program of the per-step kernels has."""

    BM: int  # rows
    BU: int  # units
    BK: int  # values of a row at a time
    grid: tuple[int, int, int]
    options: dict[str, Any]

    @property
    def constants(self) -> dict[str, int]:
        return {"BM": self.BM, "BU": self.BU, "BK": self.BK}

    @property
    def programs(self) -> int:
        return self.grid[0] * self.grid[1]


def clocks(size: tuple[int, int], B: int, units: int, planes: int, number: Number, at: Limits) -> float:
    """That tiles of `size` need for each value of a row: the most of what L2 takes, the way from there, the arithmetic."""
    rows, columns = size[0], planes * size[1]
    programs = triton.cdiv(B, rows) * triton.cdiv(units, size[1])
    rounds, lines = triton.cdiv(programs, at.multiprocessors), (rows + columns) * number.bytes / L2_BYTES
    return max(
        programs / at.multiprocessors * lines / L2_SHARE, rounds * lines, rounds * rows * columns / number.products
    )


def stages(values: int, number: Number, at: Limits) -> int:
    """Of chunks of so many values: those on their way fill half of shared memory, so that a multiprocessor has room for two
    programs."""
    return min(max(at.shared // 2 // (values * number.bytes) + 1, 2), 5)


def tile(B: int, units: int, K: int, planes: int, number: Number, at: Limits) -> Tile:
    """The tile that takes the fewest clocks."""
    sizes = [(m, u) for m, u in TILES if m < 2 * max(B, ROWS) and m * u <= number.largest]
    BM, BU = min(sizes, key=lambda size: clocks(size, B, units, planes, number, at))
    grid = (triton.cdiv(units, BU), triton.cdiv(B, BM), 1)
    BK = number.chunk(K)
    chosen = options(8 if BM * BU > 2048 else 4) | {"num_stages": stages((BM + planes * BU) * BK, number, at)}
    return Tile(BM, BU, BK, grid, chosen | ({"launch_pdl": True} if at.overlap else {}))


def whole_rows(B: int, H: int, at: Limits) -> Tile:
    """The tile of a launch whose programs have all units of their rows, in which means are taken: a cell that takes them has
    dozens of planes, so a thread has some four values of each."""
    BU = padded(H)
    BM = max(1, min(ROWS, 1024 // BU))
    warps = min(max(BM * BU // 128, 4), 16)
    chosen = options(warps) | ({"launch_pdl": True} if at.overlap else {})
    return Tile(BM, BU, ROWS, (1, triton.cdiv(B, BM), 1), chosen)


def options(warps: int) -> dict[str, Any]:
    # fusion is what Triton does by default until 3.9, which announces a change
    return {"num_warps": warps, "enable_fp_fusion": True}


# ---------------------------------------------------------------- launches


class Launch:
    """A kernel with all its arguments but the first, the number of the step.

    The first call goes Triton's way, which compiles. The others go straight to what was compiled, with addresses in place of
    tensors: all else is the same, and to look at it again takes 14 microseconds where this takes 3."""

    def __init__(self, kernel: Any, grid: tuple[int, int, int], arguments: dict[str, Any], chosen: dict[str, Any]):
        self.kernel, self.grid, self.options = kernel, grid, chosen
        self.arguments = given = tuple(arguments[name] for name in kernel.arg_names[1:])
        self.run: Callable[..., Any] = self._first
        self.tensors = given  # whose memory it is

    def _first(self, *arguments: Any) -> None:
        compiled = self.kernel[self.grid](*arguments, **self.options)
        if compiled is not None:  # the interpreter compiles nothing
            self.run, self.arguments = compiled[self.grid], addresses(self.tensors)

    def __call__(self, i: int) -> None:
        self.run(i, *self.arguments)


def addresses(values: tuple[Any, ...]) -> tuple[Any, ...]:
    one = lambda v: v.data_ptr() if isinstance(v, Tensor) else addresses(v) if isinstance(v, tuple) else v
    return tuple(map(one, values))


def launch(kernel: Any, grid: tuple[int, ...], arguments: dict[str, Any], chosen: dict[str, Any]) -> None:
    """A kernel that is launched once."""
    kernel[grid](*(arguments[name] for name in kernel.arg_names), **chosen)
