"""One compiled form of a kernel: what its template is given, and the text that instantiates it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from gradkernels.cells import Cell
from gradkernels.cells.codegen import type_name

BYTES = {"bf16": 2, "fp16": 2, "tf32": 4, "fp32": 4}  # of a number type of platform.cuh
LANES = 32


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
    def shared_bytes(self) -> int:
        """Of shared memory, as the kernel lays it out; the compiler compares."""
        raise NotImplementedError

    def exchange_bytes(self, team: int) -> int:
        """Of memory through which one team shares in L2."""
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
