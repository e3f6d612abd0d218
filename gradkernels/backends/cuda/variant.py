"""One compiled form of a kernel: what its template is given, and the text that instantiates it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Protocol

from gradkernels.cells import Cell
from gradkernels.cells.codegen import type_name

BYTES = {"bf16": 2, "fp16": 2, "tf32": 4, "fp32": 4}  # of a number type of platform.cuh
LANES = 32
REGISTERS = 65536  # of a multiprocessor, of every GPU that kernels run on
TILE = 32  # bytes of the contraction that one mma takes
FRAGMENT = 512  # bytes of 16 rows of a tile, or of 16 x 8 sums in float
RING = 4  # tiles of the contraction that come from L2 at a time


class Form(Protocol):
    """What the compiler and the driver know of any kernel here; it is hashable, and equal forms are one kernel."""

    @property
    def cell(self) -> Cell: ...
    @property
    def C(self) -> int:
        """Blocks of a cluster."""
        ...

    @property
    def threads(self) -> int:
        """Of a block."""
        ...

    @property
    def shared_bytes(self) -> int: ...
    @property
    def cooperative(self) -> bool:
        """Whether it may run only when all of its blocks are resident."""
        ...

    def source(self) -> str: ...


@dataclass(frozen=True)
class Variant:
    """A kernel that keeps the recurrent matrix where it is and walks the whole sequence.

    `exchange` "cluster": the C blocks of a cluster are a team and push what they share into each other's shared memory.
    "grid": all blocks of a launch belong to teams that share through L2; the C blocks of a cluster (1: no clusters) split the
    contraction between them.
    """

    cell: Cell
    number: str  # a key of BYTES
    exchange: str  # cluster | grid
    C: int  # blocks of a cluster
    H: int  # units, rounded up to what the tiles need; how many there are is known at launch
    U: int  # units of a block
    N: int  # rows of the batch in a tile
    WM: int  # warps over the rows of the matrix
    WK: int  # warps over the contraction
    KEPT: int  # tiles of the contraction that a warp keeps in registers,
    SHARED: int  # then in shared memory; what is left is read from L2 in every step

    # What tile.cuh makes of KEPT and SHARED, for a warp that has `groups` groups of 8 rows and k_tiles of the contraction.

    def in_shared(self, groups: int, k_tiles: int) -> int:
        """Bytes of shared memory for a block's part of the matrix."""
        rest = max(0, k_tiles - self.KEPT)
        here = min(rest, self.SHARED)
        return self.WM * self.WK * (here + min(RING, rest - here)) * -(-groups // 2) * FRAGMENT

    def streamed(self, groups: int, k_tiles: int) -> int:
        """Bytes in L2 for what a block does not keep."""
        return self.WM * self.WK * max(0, k_tiles - self.KEPT - self.SHARED) * -(-groups // 2) * FRAGMENT

    header: ClassVar[str]  # the file of csrc/cuda that it is in
    struct: ClassVar[str]  # the name of the template
    arguments: ClassVar[str]  # the structure that it takes

    @property
    def threads(self) -> int:
        return LANES * self.WM * self.WK

    @property
    def cooperative(self) -> bool:
        """Whether blocks wait for blocks of other clusters: all of them then have to be resident."""
        return self.exchange == "grid"

    @property
    def fits(self) -> bool:
        """Whether the sizes are what the kernel's tiles can be put together to."""
        raise NotImplementedError

    @property
    def registers(self) -> int:
        """Of one thread, as far as that can be told beforehand."""
        raise NotImplementedError

    @property
    def shared_bytes(self) -> int:
        """Of shared memory, as the kernel lays it out; the compiler compares."""
        raise NotImplementedError

    def exchange_bytes(self, team: int) -> int:
        """Of memory for one team in L2: what its blocks share, and what of the matrix they do not keep."""
        raise NotImplementedError

    @property
    def template(self) -> str:
        sizes = (self.C, self.H, self.U, self.N, self.WM, self.WK, self.KEPT, self.SHARED)
        exchange = f"gk::Exchange::{self.exchange.title()}"
        return f"gk::{self.struct}<gk::{type_name(self.cell)}, gk::{self.number}, {exchange}, {', '.join(map(str, sizes))}>"

    def source(self) -> str:
        """The text that the compiler is given, besides the headers."""
        return (
            f'#include "{self.header}"\n'
            f"using Kernel = {self.template};\n"
            f'static_assert(Kernel::SHARED_BYTES == {self.shared_bytes}, "the planner and the kernel disagree");\n'
            f'extern "C" __global__ void __launch_bounds__({self.threads}, 1) run(gk::{self.arguments} p) {{ Kernel::run(p); }}\n'
        )
