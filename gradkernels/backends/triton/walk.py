"""The two walks on the host: which kind of kernel takes a call, with which tiles, and the loop of launches.

Dims: T steps, B batch, N tokens, H units, R width of the first state, G gates, S states, A kept values.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from gradkernels.backends._sequence import Steps, tf32
from gradkernels.backends.triton import cells, resident, step
from gradkernels.cells import Cell

Tensors = Sequence[Tensor | None]

ROWS = 16  # the least that tensor cores take
RESIDENT_BYTES = 64 << 10  # of a matrix that one program keeps, in registers and shared memory
PROGRAMS = 128  # enough to occupy a large GPU once
TILES = ((64, 32), (32, 32), (32, 16), (16, 16))  # rows x units of a program, the least traffic first


# ---------------------------------------------------------------- choices


def is_resident(cell: Cell, H: int, R: int, number: Number) -> bool:
    """Whether one program holds the recurrent matrix for the whole sequence: all gates of all units, padded."""
    HP, RP = padded(H), padded(R)
    return cell.G * HP * RP * number.bytes <= (RESIDENT_BYTES if number.tensor_cores else RESIDENT_BYTES // 4)


def padded(units: int) -> int:
    return max(ROWS, triton.next_power_of_2(units))


def tile(B: int, units: int, number: Number) -> tuple[int, int]:
    """Rows and units of a program: the largest tile that is not mostly empty and leaves enough programs."""
    for BM, BU in TILES if number.tensor_cores else TILES[1:]:
        if BM < 2 * B and triton.cdiv(B, BM) * triton.cdiv(units, BU) >= PROGRAMS:
            return BM, BU
    return TILES[-1]


@dataclass(frozen=True)
class Number:
    """How a dtype is multiplied and added."""

    bytes: int
    accumulator: torch.dtype
    precision: str  # of tl.dot; 16-bit and float64 products are exact anyway
    tensor_cores: bool

    @classmethod
    def of(cls, dtype: torch.dtype) -> Number:
        precision = "tf32" if dtype is torch.float32 and tf32() else "ieee"
        wide = dtype if dtype is torch.float64 else torch.float32
        return cls(dtype.itemsize, wide, precision, dtype.itemsize == 2 or precision == "tf32")

    @property
    def constants(self) -> dict[str, Any]:
        return {"ACC": tl.float64 if self.accumulator is torch.float64 else tl.float32, "PRECISION": self.precision}

    def chunk(self, K: int) -> int:
        """BK for a contraction: a line of 128 bytes, or less where that divides it and a line does not."""
        return next((BK for BK in (64, 32, 16) if BK * self.bytes <= 128 and K % BK == 0), 128 // self.bytes)


# ---------------------------------------------------------------- launches


class Launch:
    """A kernel with all its arguments but the number of the step, which comes first.

    The first call goes Triton's way, which compiles; the others go straight to what was compiled: all else is the same."""

    def __init__(self, kernel: Any, grid: tuple[int, int, int], arguments: dict[str, Any], **options: int):
        self.kernel, self.grid, self.options = kernel, grid, options
        self.arguments = [arguments[name] for name in kernel.arg_names[1:]]
        self.run: Callable[..., Any] = self._first

    def _first(self, *arguments: Any) -> None:
        compiled = self.kernel[self.grid](*arguments, **self.options)
        if compiled is not None:  # the interpreter compiles nothing
            self.run = compiled[self.grid]

    def __call__(self, i: int) -> None:
        self.run(i, *self.arguments)


def launch(kernel: Any, grid: tuple[int, ...], arguments: dict[str, Any], **options: int) -> None:
    kernel[grid](*(arguments[name] for name in kernel.arg_names), **options)


def table(steps: Steps) -> dict[str, Any]:
    return {k: getattr(steps, k) for k in ("T", "B", "rows", "first", "order")} | {"REVERSE": steps.reverse}


def sizes(cell: Cell) -> dict[str, Any]:
    return {"G": cell.G, "S": cell.S, "A": cell.A, "Q": len(cell.second)}


def aligned(v: Tensor, to: int = 16) -> Tensor:
    """[rows, K] with rows that begin on a multiple of 16 values, so that loads are wide: a copy where they do not."""
    return F.pad(v, (0, -v.shape[1] % to)).contiguous()


# ---------------------------------------------------------------- forward


def walk_forward(
    cell: Cell,
    gates: Tensor,  # [N, G * H]
    w_hh: Tensor,  # [G * H, R]
    b_hh: Tensor | None,  # [G * H]
    w_hr: Tensor | None,  # [R, H]
    state: Sequence[Tensor],  # S of [B, R], [B, H] ..
    steps: Steps,
    seq: Tensors,  # S of [N, R], [N, H] .. to fill, None where not wanted
    final: Sequence[Tensor],  # S of [B, R], [B, H] .. to fill
    raw: Tensor | None,  # [N, H] to fill
    acts: Tensor | None,  # [N, A, H] to fill
) -> None:
    number, R = Number.of(gates.dtype), w_hh.shape[1]
    H = w_hh.shape[0] // cell.G
    code = cells.device(cell)
    arguments: dict[str, Any] = {
        **table(steps), **sizes(cell), **number.constants, "FORWARD": code.forward, "OPERAND": code.operand,
        "gates": gates, "seq": tuple(seq), "raw": raw, "acts": acts, "H": H, "R": R,
    }  # fmt: skip
    if is_resident(cell, H, R, number):
        arguments |= {"w_hh": w_hh, "b_hh": b_hh, "w_hr": w_hr, "state": tuple(state), "final": tuple(final)}
        arguments |= {"HP": padded(H), "RP": padded(R), "BM": ROWS}
        launch(resident.forward_walk, (triton.cdiv(steps.B, ROWS),), arguments, num_warps=4)
        return
    w, B = aligned(w_hh, 64 if R % 16 else 16), steps.B
    KH = w.shape[1]
    h = w.new_zeros(2, B, KH)
    h[:, :, :R] = state[0]
    wide = [v.to(number.accumulator, copy=True) for v in state]
    v = early = None
    if w_hr is not None:
        w_hr = aligned(w_hr, 64 if H % 16 else 16)
        v = w.new_zeros(B, w_hr.shape[1])
        final[0].copy_(state[0])
    if cell.second:
        v = w.new_zeros(B, KH)
        early = h.new_empty(B, cell.G - len(cell.second), H, dtype=number.accumulator)
    BM, BU = tile(B, H, number)
    arguments |= {
        "w": w, "bias": b_hh, "h": h, "v": v, "early": early, "KH": KH, "KV": 0 if v is None else v.shape[1],
        "state": (None if w_hr is not None else wide[0], *wide[1:]), "PROJECTED": w_hr is not None,
        "BM": BM, "BU": BU, "BK": number.chunk(KH),
    }  # fmt: skip
    grid = (triton.cdiv(H, BU), triton.cdiv(B, BM), 1)
    parts = ("operand", "rest") if cell.second else ("whole",)
    launches = [
        Launch(step.forward_step, grid, arguments | {"PART": part}, num_warps=4, num_stages=3) for part in parts
    ]
    if w_hr is not None:
        BM, BU = tile(B, R, number)
        change = {"w": w_hr, "seq": seq[0], "final": final[0], "BM": BM, "BU": BU, "BK": number.chunk(w_hr.shape[1])}
        grid = (triton.cdiv(R, BU), triton.cdiv(B, BM), 1)
        launches.append(Launch(step.project_step, grid, arguments | change, num_warps=4, num_stages=3))
    for i in range(steps.T):
        for part in launches:
            part(i)
    for k in range(0 if w_hr is None else 1, cell.S):
        final[k].copy_(wide[k])


# ---------------------------------------------------------------- backward


def walk_backward(
    cell: Cell,
    grads: Tensors,  # S of [N, R], [N, H] .., then S of [B, ..]; None is zero
    w_hh: Tensor,  # [G * H, R]
    w_hr: Tensor | None,  # [R, H]
    seq: Sequence[Tensor],  # S of [N, R], [N, H] ..
    raw: Tensor | None,  # [N, H]
    acts: Tensor,  # [N, A, H]
    state: Sequence[Tensor],  # S of [B, R], [B, H] ..
    steps: Steps,
    dgates: Tensor,  # [N, G * H] to fill
    dr: Tensor,  # [N, G * H] to fill; dgates itself where no gate is split
    operand: Tensor | None,  # [N, H] to fill
    dproj: Tensor | None,  # [N, R] to fill
    dstate: Sequence[Tensor],  # S of [B, R], [B, H] .. to fill
    norms: Tensor | None,  # [T, S] float64 to fill
) -> None:
    number, (B, R), S, Q = Number.of(dgates.dtype), state[0].shape, cell.S, len(cell.second)
    H = w_hh.shape[0] // cell.G
    code = cells.device(cell)
    partial = None
    arguments: dict[str, Any] = {
        **table(steps), **sizes(cell), **number.constants, "BACKWARD": code.backward, "SECOND": code.second_adjoint,
        "grads": tuple(grads[:S]), "seq": tuple(seq), "raw": raw, "acts": acts, "state": tuple(state), "H": H, "R": R,
        "dgates": dgates, "dr": dr, "operand": operand, "dproj": dproj, "SPLIT": bool(cell.split),
    }  # fmt: skip
    if is_resident(cell, H, R, number):
        programs = triton.cdiv(B, ROWS)
        if norms is not None:
            partial = norms.new_zeros(steps.T, S, programs)
        arguments |= {"w_hh": w_hh, "w_hr": w_hr, "last": tuple(grads[S:]), "dstate": tuple(dstate), "norms": partial}
        arguments |= {"HP": padded(H), "RP": padded(R), "BM": ROWS}
        launch(resident.backward_walk, (programs,), arguments, num_warps=4)
    else:
        wide = [
            torch.zeros_like(v, dtype=number.accumulator) if g is None else g.to(number.accumulator, copy=True)
            for v, g in zip(state, grads[S:])
        ]
        first, second = tile(B, R, number), tile(B, H, number)
        grids = [(triton.cdiv(units, BU), triton.cdiv(B, BM), 1) for units, (BM, BU) in ((R, first), (H, second))]
        programs = max(x * y for x, y, _ in grids)
        if norms is not None:
            partial = norms.new_zeros(steps.T, S, programs)
        w, K = aligned(w_hh), (cell.G - Q) * H
        arguments |= {"dstate": tuple(wide), "norms": partial, "PROGRAMS": programs, "PROJECTED": w_hr is not None}

        def prepare(part: str, which: int, w: Tensor, K: int) -> Launch:
            BM, BU = (first, second)[which]
            more = {"PART": part, "w": w, "KW": w.shape[1], "BM": BM, "BU": BU, "BK": number.chunk(K)}
            return Launch(step.backward_step, grids[which], arguments | more, num_warps=4, num_stages=3)

        if w_hr is not None:
            launches = [prepare("open", 0, w, K), prepare("close", 1, aligned(w_hr), R)]
        elif cell.second:
            launches = [prepare("open", 0, w, K), prepare("close", 1, w, Q * H)]
        else:
            launches = [prepare("whole", 0, w, K)]
        for i in range(steps.T):
            for part in launches:
                part(i)
        launches[0](steps.T)  # there is no such step: what the first one leaves to the initial state
        for given, kept in zip(dstate, wide):
            given.copy_(kept)
    if norms is not None and partial is not None:
        torch.sum(partial, 2, out=norms)
