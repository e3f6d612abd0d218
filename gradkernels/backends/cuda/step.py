"""The plan that goes step by step: a matrix product of torch's, then one kernel of csrc/cuda/step.cuh, and so on.

It takes every cell, width, layout and projection; a cell without a recurrent product is one kernel that does all steps. Nothing is read back from the device: where only the device knows the rows
of a step, every launch is of all rows, and those that take no part stop at once. What a launch is told is one structure whose
`step` moves on; the tensors that products read and write are the same in every step, or views that one call made.

Dims: T steps, B batch, N tokens, H hidden units, R width of the first state, G gates, S states, A kept values, Q gates whose
product is taken of another value than the first state, K = G - Q the others.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from gradkernels.backends import _sequence
from gradkernels.backends._extra import Extra
from gradkernels.cells import Cell
from gradkernels.cells.codegen import device_struct, type_name

from .arguments import Stage, StepBackwardArgs, StepForwardArgs, Walk, address, addresses, extras
from .variant import REGISTERS

if TYPE_CHECKING:
    from .driver import Machine

UNITS = 4  # of a thread where rows are aligned to as many: 16 bytes of float
HEAVY = 16  # values of a unit of which a thread has one at a time, as registers do not suffice for more
RESIDENT = 4  # blocks that a multiprocessor has room for: registers are spent on loads under way only as far as that
WITH_MEANS = 2  # the same of cells that take means over their units, which have most values


@functools.cache
def rounds(cell: Cell) -> tuple[int, int]:
    """(the most means that a round of any function of the cell takes, the most values that a unit keeps between rounds)"""
    found = re.findall(r"kept = (\d+), rows\[\] = {[\d, ]+}, means\[\] = {([\d, ]+)};", device_struct(cell))
    means = (int(n) for _, text in found for n in text.split(","))
    return max(means, default=0), max((int(kept) for kept, _ in found), default=0)


@dataclass(frozen=True)
class Step:
    """One compiled form of the kernels of step.cuh."""

    cell: Cell
    number: str  # as in variant.py
    V: int  # units of a thread

    C: ClassVar[int] = 1
    threads: ClassVar[int] = 256
    cooperative: ClassVar[bool] = False
    header: ClassVar[str] = "step.cuh"
    struct: ClassVar[str]
    arguments: ClassVar[str]

    @property
    def shared_bytes(self) -> int:
        return self.threads // 32 * rounds(self.cell)[0] * 4  # sums that means are made of

    @property
    def registers(self) -> int:
        """Of a thread, about: most values of V units at once, and addresses; no more than blocks that are resident leave."""
        return min(24 + self.V * weight(self.cell), REGISTERS // (self.threads * self.resident))

    @property
    def resident(self) -> int:
        return WITH_MEANS if self.cell.means else RESIDENT

    @property
    def template(self) -> str:
        return f"gk::{self.struct}<gk::{type_name(self.cell)}, gk::{self.number}, {self.V}>"

    def source(self) -> str:
        """The text that the compiler is given, besides the headers."""
        return (
            f'#include "{self.header}"\n'
            f"using Kernel = {self.template};\n"
            f"static_assert(Kernel::SHARED_BYTES == {self.shared_bytes} && Kernel::THREADS == {self.threads});\n"
            f'extern "C" __global__ void __launch_bounds__({self.threads}, {self.resident}) run(gk::{self.arguments} p) {{ Kernel::run(p); }}\n'
        )

    def blocks(self, rows: int, width: int) -> int:
        return -(-rows * (width // self.V) // self.threads)

    def cells(self, rows: int, H: int) -> int:
        """Blocks that run the cell; where it takes means, a block has a row."""
        return rows if self.cell.means else self.blocks(rows, H)


@dataclass(frozen=True)
class StepForward(Step):
    struct: ClassVar[str] = "StepForward"
    arguments: ClassVar[str] = "StepForwardArgs"


@dataclass(frozen=True)
class StepBackward(Step):
    struct: ClassVar[str] = "StepBackward"
    arguments: ClassVar[str] = "StepBackwardArgs"

    @property
    def shared_bytes(self) -> int:
        return super().shared_bytes + self.threads // 32 * self.cell.S * 8  # and of the norms


def weight(cell: Cell) -> int:
    """Values of a unit that a thread has at once, with adjoints of states and parameters."""
    return cell.G + 2 * cell.S + cell.A + 2 * cell.P + cell.M + cell.D


def most_units(cell: Cell) -> int:
    """Units of a thread as far as registers suffice."""
    return 1 if cell.means or weight(cell) >= HEAVY else UNITS


def units(cell: Cell, widths: Sequence[int], tensors: Sequence[Tensor | None]) -> int:
    """Units of a thread: several where every row of all these tensors is aligned to as many."""
    aligned = all(w % UNITS == 0 for w in widths) and all(
        v is None or v.data_ptr() % (UNITS * v.element_size()) == 0 for v in tensors
    )
    return most_units(cell) if aligned else 1


def product(like: Tensor) -> Callable[[Tensor, Tensor, Tensor], object]:
    """out[n, m] = a[n, k] @ b[k, m], all of it in float: a and b are stored as `like`, out is float32.

    Of 16-bit factors torch makes a float32 result on CUDA devices only; elsewhere, which is in tests, they are converted."""
    if like.dtype is torch.float32:
        return lambda a, b, out: torch.mm(a, b, out=out)
    if like.is_cuda:
        return lambda a, b, out: torch.mm(a, b, out_dtype=torch.float32, out=out)
    return lambda a, b, out: torch.mm(a.float(), b.float(), out=out)


class Rows:
    """How many rows the host launches in each step of the walk; before the first and after the last there are none."""

    def __init__(self, steps: _sequence.Steps, sizes: list[int] | None):
        self.T, self.B = steps.T, steps.B
        self.known = steps.rows is None or sizes is not None  # else only the device knows, and all of them are launched
        self.sizes = [self.B] * self.T if sizes is None else sizes  # in time
        self.reverse = steps.reverse

    def time(self, i: int) -> int:
        return self.T - 1 - i if self.reverse else i

    def __call__(self, i: int) -> int:
        return self.sizes[self.time(i)] if 0 <= i < self.T else 0


def walk(steps: _sequence.Steps, H: int) -> Walk:
    return Walk(steps.T, steps.B, H, steps.reverse, address(steps.rows), address(steps.first), address(steps.order))


def _in_order(v: Tensor, steps: _sequence.Steps) -> Tensor:
    """[B, width] by columns of the batch -> by rows of the walk."""
    return v if steps.order is None else v.index_select(0, steps.order)


# ---------------------------------------------------------------- forward


def forward(
    machine: Machine,
    number: str,
    cell: Cell,
    gates: Tensor,  # [N, G*H]
    w_hh: Tensor,  # [G*H, R]
    b_hh: Tensor | None,  # [G*H]
    w_hr: Tensor | None,  # [R, H]
    state: Sequence[Tensor],  # S of [B, R], [B, H] ..
    steps: _sequence.Steps,
    sizes: list[int] | None,  # [T] rows of each step in time; None: B, or nobody here knows
    seq: Sequence[Tensor | None],  # S of [N, R], [N, H] ..
    final: Sequence[Tensor],  # S of [B, R], [B, H] ..
    raw: Tensor | None,  # [N, H]
    acts: Tensor | None,  # [N, A, H]
    extra: Extra,
) -> None:
    rows, Q = Rows(steps, sizes), len(cell.second)
    (B, R), H = state[0].shape, w_hh.shape[0] // cell.G
    KH = w_hh.shape[0] - Q * H
    new = functools.partial(gates.new_empty, dtype=torch.float32)
    half = gates.dtype is not torch.float32
    current = [_in_order(v, steps).to(torch.float32, copy=True) for v in state]
    operand = _in_order(state[0], steps).clone() if half else current[0]
    gate = new(B, KH)
    wide = gates.new_empty(B, H) if Q or w_hr is not None else None
    second = new(B, Q * H) if Q else new(B, R) if w_hr is not None else None
    for v, s in zip(final, state):  # of rows without a step
        v.copy_(s)

    kept = new(B, H, rounds(cell)[1]) if cell.means else None
    given = [gates, b_hh, *seq, *final, raw, acts, extra.params]  # what is allocated here is aligned
    variant = StepForward(cell, number, units(cell, (H, R), given))
    args = StepForwardArgs(
        walk(steps, H), extras(extra), 0, Stage.CELL, 1, R, address(gates), address(b_hh), address(gate), address(second), addresses(current),
        address(operand) if half else 0, address(wide), addresses(seq), addresses(final), address(raw), address(acts), address(kept),
    )  # fmt: skip
    multiply, launch = product(gates), machine.kernel(variant).launch
    if not cell.recurrent:
        args.steps = steps.T
        launch(variant.cells(B, H), args)
        return
    first, last = w_hh[:KH].t(), (w_hh[KH:] if Q else w_hr)
    last = None if last is None else last.t()

    @functools.cache
    def views(n: int) -> tuple:
        part = lambda v: None if v is None else v[:n]
        return part(operand), part(gate), part(wide), part(second), variant.cells(n, H), variant.blocks(n, R)

    with _sequence.products(gates):
        for i in range(steps.T):
            n = rows(i)
            h, r, w, r2, cells, projected = views(n)
            multiply(h, first, r)
            args.step = i
            if Q:
                args.stage = Stage.SECOND
                launch(cells, args)
                multiply(w, last, r2)
                args.stage = Stage.CELL
            launch(cells, args)
            if w_hr is not None:
                multiply(w, last, r2)
                args.stage = Stage.PROJECT
                launch(projected, args)
                args.stage = Stage.CELL


# ---------------------------------------------------------------- backward


def backward(
    machine: Machine,
    number: str,
    cell: Cell,
    grads: Sequence[Tensor | None],  # S of [N, ..], S of [B, ..]; None is zero
    w_hh: Tensor,  # [G*H, R]
    w_hr: Tensor | None,  # [R, H]
    seq: Sequence[Tensor],  # S of [N, R], [N, H] ..
    raw: Tensor | None,  # [N, H]
    acts: Tensor,  # [N, A, H]
    state: Sequence[Tensor],  # S of [B, R], [B, H] ..
    steps: _sequence.Steps,
    sizes: list[int] | None,  # as for forward
    dgates: Tensor,  # [N, G*H]
    dr: Tensor,  # [N, G*H]
    v: Tensor | None,  # [N, H]
    dproj: Tensor | None,  # [N, R]
    dstate: Sequence[Tensor],  # S of [B, R], [B, H] ..
    norms: Tensor | None,  # float64 [T, S]
    dparams: Tensor | None,  # [N, P*H]
    extra: Extra,
) -> None:
    rows, S, Q = Rows(steps, sizes), cell.S, len(cell.second)
    (B, R), H = state[0].shape, w_hh.shape[0] // cell.G
    KH = w_hh.shape[0] - Q * H
    new, stored = functools.partial(dgates.new_empty, dtype=torch.float32), dgates.new_empty
    for d, g in zip(dstate, grads[S:]):  # of rows without a step
        d.zero_() if g is None else d.copy_(g)
    adjoint = [
        new(d.shape).zero_() if g is None else _in_order(g, steps).to(torch.float32, copy=True)
        for d, g in zip(dstate, grads[S:])
    ]
    sent = new(B, R)
    # Rows of a step that lie together are multiplied where they are.
    operand = None if rows.known else stored(B, KH)
    wide = stored(B, Q * H) if Q else None if w_hr is None or rows.known else stored(B, R)
    second = new(B, H) if Q or w_hr is not None else None

    kept = new(B, H, rounds(cell)[1]) if cell.means else None
    owed = new(dgates.shape[0], H).zero_() if cell.D else None
    given = [*grads, raw, acts, *seq, *state, dgates, dr, v, dproj, *dstate, dparams, extra.params]
    variant = StepBackward(cell, number, units(cell, (H, R), given))
    multiply, launch = product(dgates), machine.kernel(variant).launch
    parts = None
    if norms is not None:
        parts = norms.new_zeros(steps.T, max(variant.cells(B, H), variant.blocks(B, R)), S)
    args = StepBackwardArgs(
        walk(steps, H), extras(extra), 0, Stage.CELL, 1, R, 0 if parts is None else parts.shape[1], address(acts), address(raw), addresses(seq),
        addresses(state), addresses(grads[:S]), address(sent), address(second), addresses(adjoint), address(operand),
        address(wide), address(dgates), address(dr), address(v), address(dproj), addresses(dstate), address(parts),
        address(dparams), address(owed), address(kept),
    )  # fmt: skip
    first, last = w_hh[:KH], (w_hh[KH:] if Q else w_hr)
    in_place = dr[:, :KH].split(rows.sizes) if rows.known else None
    projected = dproj.split(rows.sizes) if rows.known and dproj is not None else None

    @functools.cache
    def views(n: int) -> tuple:
        part = lambda v: None if v is None else v[:n]
        return part(operand), part(wide), part(second), part(sent), variant.cells(n, H), variant.blocks(n, R)

    if not cell.recurrent:
        args.step, args.steps = steps.T - 1, steps.T + 1
        launch(variant.cells(B, H), args)
    with _sequence.products(dgates):
        for i in reversed(range(-1, steps.T)) if cell.recurrent else ():
            n, t = rows(i), rows.time(i)
            here, w, r2, out, _, _ = views(n)
            *_, cells, first_state = views(max(n, rows(i + 1)))  # with those that began in the step after
            args.step = i
            if w_hr is not None:
                args.stage = Stage.PROJECT
                launch(first_state, args)
                args.stage = Stage.CELL
                if i >= 0:
                    multiply(w if projected is None else projected[t], last, r2)
            if Q and i >= 0:
                args.stage = Stage.SECOND
                launch(cells, args)
                multiply(w, last, r2)
                args.stage = Stage.CELL
            launch(cells, args)
            if i >= 0:
                multiply(here if in_place is None else in_place[t], first, out)
    if norms is not None:
        torch.sum(parts, 1, out=norms)
