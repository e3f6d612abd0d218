"""The forward kernel's variants: what one needs, and what it cannot be."""

from __future__ import annotations

from .variant import BYTES, FRAGMENT, TILE, Variant


class Forward(Variant):
    """csrc/cuda/forward.cuh. A block keeps the rows of U units (in a grid with C > 1: a C-th of the columns of C U units')."""

    header = "forward.cuh"
    struct = "Forward"
    arguments = "ForwardArgs"

    @property
    def parts(self) -> int:
        """Blocks that have a part of the contraction each."""
        return self.C if self.exchange == "grid" else 1

    @property
    def octets(self) -> int:
        """Eights of units whose rows a warp multiplies."""
        return self.U // 8 * self.parts // self.WM

    @property
    def k_tiles(self) -> int:
        """Of the contraction, of a warp."""
        return self.H * BYTES[self.number] // (TILE * self.parts * self.WK)

    @property
    def products(self) -> list[int]:
        """Gates of each product of a step."""
        Q = len(self.cell.second)
        return [n for n in (self.cell.G - Q, Q) if n]

    @property
    def direct(self) -> bool:
        """Whether a warp's sums are complete, and go to the cell in registers."""
        return self.parts == 1 and self.WK == 1

    @property
    def fits(self) -> bool:
        return (
            self.U % 8 == 0
            and self.N % 8 == 0
            and self.U // 8 * self.parts % self.WM == 0
            and self.H * BYTES[self.number] % (TILE * self.parts * self.WK) == 0
            and (self.exchange == "grid" or self.H >= self.C * self.U)
        )

    @property
    def slots(self) -> int:
        """Octets by eights of batch rows whose cells a warp runs."""
        items = self.U // 8 * (self.N // 8)
        return self.octets * (self.N // 8) if self.direct else -(-items // (self.WM * self.WK))

    @property
    def shared_bytes(self) -> int:
        size, items = BYTES[self.number], self.U // 8 * (self.N // 8)
        matrix = sum(self.in_shared(gates * self.octets, self.k_tiles) for gates in self.products)
        operands = (1 if self.exchange == "grid" else 2) * self.N * self.H // self.parts * size
        sums = self.parts * self.WK * items * max(self.products) * FRAGMENT // 2
        buffers = 0 if self.direct else 2 if self.parts > 1 else 1
        return matrix + operands + buffers * sums + 16

    def exchange_bytes(self, team: int) -> int:
        words = 2 * self.N * self.H * BYTES[self.number] if self.exchange == "grid" else 0  # two buffers
        matrix = team * sum(self.streamed(gates * self.octets, self.k_tiles) for gates in self.products)
        return 2 * words + matrix  # each word with its turn

    @property
    def registers(self) -> int:
        cell, n_tiles = self.cell, self.N // 8
        m_tiles = [-(-gates * self.octets // 2) for gates in self.products]
        kept = min(self.KEPT, self.k_tiles)
        halves = 2 if self.number == "fp32" else 1  # the compiler splits what is kept once, before the steps
        weights = sum(4 * m * kept * halves for m in m_tiles)
        sums = max(4 * m * n_tiles * (2 if m * n_tiles < 4 else 1) for m in m_tiles)
        cells = self.slots * (3 * cell.G + 2 * cell.S + 2 * cell.A + 3 * cell.P + 2 * cell.M)
        fetched = 16 if self.exchange == "grid" else 0
        return 64 + weights + sums + cells + 6 * n_tiles + fetched + 16 * (kept + self.SHARED < self.k_tiles)
