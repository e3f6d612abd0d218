"""The backward kernel's variants: what one needs, and what it cannot be."""

from __future__ import annotations

from dataclasses import dataclass

from .variant import BYTES, FRAGMENT, TILE, Variant

COUNTED = 1 << 20  # bytes that a signal can wait for, and one more
TOLD_AT_MOST = 16 << 10  # bytes that a block fetches word by word, as in transposed.cuh
NORM_BYTES = 8  # of a squared norm


@dataclass(frozen=True)
class Backward(Variant):
    """csrc/cuda/backward.cuh. A block has the transposed rows of its own U units for those of its cluster; in a grid, of a C-th
    of all units."""

    NORMS: bool = False  # whether norms of the states' adjoints are wanted

    header = "backward.cuh"
    struct = "Backward"
    arguments = "BackwardArgs"

    @property
    def octets(self) -> int:
        """Eights of units of a block."""
        return self.U // 8

    @property
    def groups(self) -> int:
        """Eights of units whose adjoints a warp computes."""
        return -(-self.C * self.octets // self.WM)

    @property
    def senders(self) -> int:
        """Blocks whose gradients a block multiplies."""
        return -(-self.H // (self.C * self.U)) if self.exchange == "grid" else 1

    @property
    def halves(self) -> int:
        """Buffers of gradients that a block of a cluster multiplies."""
        return 2 if self.exchange == "cluster" and self.C > 1 else 1

    @property
    def told(self) -> bool:
        """Whether gradients go through a grid word by word with the turn they are of, rather than by a meeting."""
        mine = self.senders * max(self.products) * self.U * self.N * BYTES[self.number]
        return self.exchange == "grid" and mine <= TOLD_AT_MOST

    @property
    def inboxes(self) -> int:
        """Buffers of partial sums."""
        return 2 if self.C > 1 and (self.told or self.exchange == "cluster") else 1

    @property
    def products(self) -> list[int]:
        """Gates of each product of a step."""
        Q = len(self.cell.second)
        return [n for n in (self.cell.G - Q, Q) if n]

    def k_tiles(self, gates: int) -> int:
        """Of the contraction of a product, of a warp."""
        return -(-self.senders * gates * self.U * BYTES[self.number] // (TILE * self.WK))

    @property
    def fits(self) -> bool:
        octets = self.C * self.octets
        return (
            self.U % 8 == 0
            and self.N % 8 == 0
            and (self.C == 1 or self.C % 2 == 0)
            and self.groups * (self.WM - 1) < octets  # else the last warp would have nothing to do
            and 4 * self.C * self.U * self.N < COUNTED
            and (self.exchange == "grid" or self.C * self.U >= self.H)
        )

    @property
    def shared_bytes(self) -> int:
        items = self.octets * (self.N // 8)  # of a block
        total = 0
        for gates in self.products:
            lines = self.k_tiles(gates) * self.WK * TILE  # a row of the batch of what is multiplied, in bytes
            total += self.in_shared(self.groups, self.k_tiles(gates)) + self.halves * self.N * lines
            if self.C > 1 and self.WK > 1:  # partial sums of warps
                total += self.WK * self.C * items * FRAGMENT // 2
        total += self.inboxes * (self.C if self.C > 1 else self.WK) * items * FRAGMENT // 2 + 16 * (self.C > 1)
        return total + NORM_BYTES * self.halves * self.WM * self.WK * self.cell.S * self.NORMS

    def exchange_bytes(self, team: int) -> int:
        """As of any variant.

        Raises:
            ValueError: a grid of more blocks than H units have gradients to publish for."""
        if self.exchange == "grid" and team > self.C * self.senders:
            raise ValueError(
                f"{team} blocks of {self.U} units share {self.H} units; {self.C * self.senders} are enough"
            )
        published = (
            (4 if self.told else 2) * self.N * self.C * self.senders * max(self.products) * self.U * BYTES[self.number]
        )
        streamed = sum(self.streamed(self.groups, self.k_tiles(gates)) for gates in self.products)
        return (published if self.exchange == "grid" else 0) + team * streamed

    @property
    def registers(self) -> int:
        cell, m_tiles, n_tiles = self.cell, -(-self.groups // 2), self.N // 8
        weights = sum(4 * m_tiles * min(self.KEPT, self.k_tiles(gates)) for gates in self.products)
        weights *= 3 if self.number == "fp32" else 1  # and what tf32 holds of each, and of the rest
        slots = -(-self.octets * n_tiles // (self.WM * self.WK))
        values = cell.A + 4 * cell.S + cell.G * (2 if cell.split else 1) + 1 + len(cell.second) + 2 * cell.P + cell.M
        return 40 + 20 * self.told + weights + 4 * m_tiles * n_tiles + slots * (2 * values + 8) + 4 * n_tiles

    @property
    def template(self) -> str:
        return f"{super().template[:-1]}, {str(self.NORMS).lower()}>"
