"""Which kernel takes a call, and why.

Three kinds: a *cluster* of blocks keeps the recurrent matrix and pushes the state around; a *grid* of blocks, resident all at
once, keeps it and shares the state through L2; or each *step* is a matrix product and a pointwise kernel. Rows of the batch
are independent, so that several teams of blocks take tiles of rows. What fits is enumerated, ranked by `costs`, compiled best
first, and taken when the driver counts enough room for it: blocks that wait for one another are never launched otherwise.
"""

from __future__ import annotations

import functools
import heapq
import itertools
from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING

import torch

from gradkernels.cells import Cell

from . import costs
from .backward import Backward
from .forward import Forward
from .variant import BYTES, REGISTERS, TILE, Variant

if TYPE_CHECKING:
    from .driver import Machine

WALKS: dict[str, type[Variant]] = {"forward": Forward, "backward": Backward}
REGISTERS_OF_THREAD = 255
SPARE = 16  # of a thread: what variants say of their registers is an estimate
ROWS = (8, 16, 32, 64)  # of a tile of the batch
WARPS = [(m, k) for m, k in itertools.product((1, 2, 4, 8), repeat=2) if 4 <= m * k <= 16]
CLUSTERS = {"cluster": (1, 2, 4, 8, 16), "grid": (1, 2, 4, 8)}
UNITS = (8, 16, 24, 32, 48, 64)  # of a block of a grid
RETRIES = 3  # of a kernel that spills registers, with fewer of them for the matrix
DOUBT = 1.2  # what was compiled and costs more than expected is taken all the same, if it is at most so much more than the next


@dataclass(frozen=True)
class Plan:
    """How one call runs."""

    kind: str  # cluster | grid | step
    variant: Variant | None  # None where kind is step
    blocks: int  # of the launch
    team: int  # of them that share a state
    why: str
    refused: tuple[tuple[str, str], ...]  # what else was thought of, and what spoke against it
    cycles: float  # of one step of all rows, by the model


@dataclass(frozen=True)
class Candidate:
    """A variant that fits by its own account, and the blocks that share a state."""

    variant: Variant
    team: int
    cycles: float  # of one step of one tile of rows

    def __str__(self) -> str:
        v = self.variant
        form = f"{v.exchange} of {self.team} blocks" if self.team > 1 else "block by itself"
        joined = f" in clusters of {v.C}" if v.exchange == "grid" and v.C > 1 else ""
        return f"{form}{joined}, {v.U} units each, tiles of {v.N} rows, {v.threads} threads"


def plan(machine: Machine, cell: Cell, number: str, H: int, B: int, which: str, norms: bool = False) -> Plan:
    """The plan for a layer of H units and B rows; `which`: forward | backward, `norms`: with norms of the adjoints.

    Costs a look-up when it has been asked before. Lengths of sequences have no part in it, the number of rows chooses between
    few variants: nothing is compiled for a new one."""
    return _plan(machine, cell, number, H, B, which, norms)


@functools.lru_cache(4096)
def _plan(machine: Machine, cell: Cell, number: str, H: int, B: int, which: str, norms: bool) -> Plan:
    if (reason := _only_stepwise(cell)) is not None:
        return Plan("step", None, 0, 0, reason, (), costs.step(cell, number, H, B, machine.multiprocessors))
    candidates = _candidates(
        cell, number, H, which, norms, _clusters(machine), machine.multiprocessors, machine.shared_bytes
    )
    refused = [
        (kind, _nothing(machine, cell, number, H, kind))
        for kind in CLUSTERS
        if kind not in {c.variant.exchange for c in candidates}
    ]
    stepwise = costs.step(cell, number, H, B, machine.multiprocessors)
    expected = [(_rounds(c, B, machine.multiprocessors // c.team) * c.cycles, k) for k, c in enumerate(candidates)]
    heapq.heapify(expected)
    counted: dict[int, tuple[Candidate, int]] = {}  # what became of a candidate, and how many teams run at a time
    while expected and expected[0][0] < stepwise:
        cycles, k = heapq.heappop(expected)
        c = candidates[k]
        if k in counted:  # still the best, with the room that there really is
            return _taken(*counted[k], B, cycles, refused)
        try:
            c, teams = _compiled(machine, c, which)
        except RuntimeError as e:
            refused.append((str(c), str(e).splitlines()[0]))
            form = c.variant.exchange, c.variant.C
            expected = [
                (cycles, j)
                for cycles, j in expected
                if (candidates[j].variant.exchange, candidates[j].variant.C) != form or candidates[j].team < c.team
            ]
            heapq.heapify(expected)
        else:
            counted[k] = c, teams
            cycles = _rounds(c, B, teams) * c.cycles
            if cycles < min(stepwise, DOUBT * expected[0][0] if expected else stepwise):
                return _taken(c, teams, B, cycles, refused)
            heapq.heappush(expected, (cycles, k))
    if expected and expected[0][0] >= stepwise:
        cycles, k = expected[0]
        refused.append((str(candidates[k]), f"{costs.microseconds(cycles):.1f} us a step are expected of it"))
    why = f"a matrix product and a kernel in every step; {costs.microseconds(stepwise):.1f} us expected of them"
    return Plan("step", None, 0, 0, why, tuple(refused), stepwise)


def _only_stepwise(cell: Cell) -> str | None:
    """What of a cell kernels that keep the matrix do not have."""
    if not cell.recurrent:
        return f"cell {cell.name!r} has no recurrent product: a kernel walks all steps by itself"
    if cell.D or cell.means:
        what = "means over its units" if cell.means else "a delayed state"
        return f"a matrix product and a kernel in every step, as cell {cell.name!r} has {what}"
    return None


def _clusters(machine: Machine) -> int:
    return machine.max_cluster if machine.capability >= (9, 0) else 1


def _nothing(machine: Machine, cell: Cell, number: str, H: int, kind: str) -> str:
    many = f"{_clusters(machine)} blocks" if kind == "cluster" else f"{machine.multiprocessors} multiprocessors"
    return f"{cell.G} x {H} x {H} numbers of {number} do not fit registers and shared memory of {many}"


def _compiled(machine: Machine, c: Candidate, which: str) -> tuple[Candidate, int]:
    """The candidate, with less in registers where they did not suffice, and how many teams run at the same time.

    Raises:
        RuntimeError: it does not compile, or the GPU has no room for a team."""
    kernel = machine.kernel(c.variant)
    for _ in range(RETRIES):
        if not kernel.spilled:
            break
        rows = max(m for m, _ in costs.tiles(c.variant, which))
        over = -(-kernel.spilled // (8 * 4 * rows))  # columns of tiles; every register is written and read
        less = _fitted(c.variant, which, machine.shared_bytes, max(0, c.variant.KEPT - over))
        if less is None or less == c.variant:
            break
        c = Candidate(less, c.team, costs.tile(less, which))
        kernel = machine.kernel(less)
    blocks = kernel.resident() * c.variant.C
    if blocks < c.team:
        raise RuntimeError(f"its {c.team} blocks wait for one another, and {blocks} run at the same time")
    return c, blocks // c.team


def _rounds(c: Candidate, B: int, teams: int) -> int:
    """Tiles that the busiest team walks one after the other."""
    return -(-B // (c.variant.N * max(1, teams)))


def _taken(c: Candidate, room: int, B: int, cycles: float, refused: list[tuple[str, str]]) -> Plan:
    teams = min(room, -(-B // c.variant.N))
    several = f"{teams} teams, each a {c}" if teams > 1 else f"one {c}"
    why = f"{several}; {costs.microseconds(cycles):.1f} us a step expected"
    return Plan(c.variant.exchange, c.variant, teams * c.team, c.team, why, tuple(refused), cycles)


# ---------------------------------------------------------------- what fits


@functools.lru_cache(256)
def _candidates(
    cell: Cell, number: str, H: int, which: str, norms: bool, max_cluster: int, multiprocessors: int, shared: int
) -> list[Candidate]:
    """The best of every form that fits, whatever the number of rows."""
    best: dict[tuple, Candidate] = {}
    for variant, team in _forms(WALKS[which], cell, number, H, max_cluster, multiprocessors, norms):
        fitted = _fitted(variant, which, shared)
        if fitted is None:
            continue
        c = Candidate(fitted, team, costs.tile(fitted, which))
        key = fitted.exchange, fitted.C, fitted.U, fitted.N
        if key not in best or c.cycles < best[key].cycles:
            best[key] = c
    return list(best.values())


def _forms(
    walk: type[Variant], cell: Cell, number: str, H: int, max_cluster: int, multiprocessors: int, norms: bool
) -> Iterator[tuple[Variant, int]]:
    """Every way to split the matrix over blocks and warps, with nothing kept yet."""
    more = {"NORMS": norms} if "NORMS" in {f.name for f in fields(walk)} else {}
    up = lambda n, m: -(-n // m) * m
    for exchange, sizes in CLUSTERS.items():
        for C in (c for c in sizes if c <= max_cluster):
            for U in (up(-(-H // C), 8),) if exchange == "cluster" else UNITS:
                team = C if exchange == "cluster" else up(-(-H // U), C)
                if team > multiprocessors or team * U >= 2 * H + 8 * (team == 1):
                    continue  # too many, or most of them without units
                for N, (WM, WK) in itertools.product(ROWS, WARPS):
                    contraction = (TILE // BYTES[number]) * WK * (C if exchange == "grid" else 1)
                    for width in (team * U, up(H, contraction)):
                        v = walk(cell, number, exchange, C, width, U, N, WM, WK, 0, 0, **more)
                        if v.fits:
                            yield v, team
                            break


def _fitted(v: Variant, which: str, shared: int, kept: int | None = None) -> Variant | None:
    """The same with as much of the matrix in registers (None: as there is room for, by the variant's own account), then in
    shared memory, as fits. A cluster has no other place."""
    columns = max(k for _, k in costs.tiles(v, which))
    if kept is None:
        most = min(REGISTERS_OF_THREAD, REGISTERS // v.threads) - SPARE
        kept = bisect_left(range(1, columns + 1), True, key=lambda k: replace(v, KEPT=k).registers > most)
        if replace(v, KEPT=kept).registers > most:
            return None
    v = replace(v, KEPT=kept, SHARED=0)
    if v.exchange == "cluster":  # nothing passes through shared memory, so that all or nothing is its least need
        v = replace(v, SHARED=columns - kept)
        return v if v.shared_bytes <= shared else None
    rest = range(columns - kept + 1)
    inside = bisect_left(rest, True, key=lambda k: replace(v, SHARED=k).shared_bytes > shared)
    return replace(v, SHARED=inside - 1) if inside else None


# ---------------------------------------------------------------- for people


def explain(cell: Cell, H: int, B: int, dtype: torch.dtype, device: torch.device) -> str:
    """The plans for both directions in words; see `gradkernels.backends.cuda.explain`."""
    from . import driver, launch  # which import this module

    return describe(driver.machine(device), cell, launch.number(dtype), H, B)


def describe(machine: Machine, cell: Cell, number: str, H: int, B: int) -> str:
    """The plans for both directions on that machine, with what was refused."""
    major, minor = machine.capability
    limits = f"{machine.multiprocessors} multiprocessors, {machine.shared_bytes} bytes of shared memory for a block"
    clusters = f"clusters of {machine.max_cluster}" if _clusters(machine) > 1 else "no clusters"
    lines = [f"{cell.name}, {H} units, {B} rows, {number} on {machine.name} (sm_{major}{minor}, {limits}, {clusters})"]
    for which in WALKS:
        chosen = plan(machine, cell, number, H, B, which)
        lines.append(f"{which}: {chosen.kind}: {chosen.why}")
        if chosen.variant is not None:
            v = chosen.variant
            columns = max(k for _, k in costs.tiles(v, which))
            lines.append(
                f"  each of {v.threads} threads in about {v.registers} registers; of {columns} columns of tiles a warp keeps "
                f"{v.KEPT} there and {v.SHARED} in shared memory, {v.shared_bytes} bytes with what else is there"
            )
        lines += [f"  not {what}: {reason}" for what, reason in chosen.refused]
    return "\n".join([*lines, "times are a model's, of constants that have not been measured"])
