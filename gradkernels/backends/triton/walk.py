"""The two walks on the host: workspace, arguments, and the loop of launches.

Dims: T steps, B batch, N tokens, H units, R width of the first state, G gates, S states, A kept values.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from gradkernels.backends._extra import Extra
from gradkernels.backends._sequence import Steps
from gradkernels.backends.triton import cells, resident, step
from gradkernels.backends.triton.launch import (
    ROWS,
    UNITS,
    Launch,
    Limits,
    Number,
    is_resident,
    launch,
    limits,
    padded,
    resident_options,
    tile,
    whole_rows,
)
from gradkernels.cells import Cell

Tensors = Sequence[Tensor | None]


def aligned(v: Tensor) -> Tensor:
    """[rows, K] with rows that begin on a multiple of 16 values, so that loads are wide: a copy with zeros where they do not.

    As there is a copy then, its rows are a multiple of 64 long, so that chunks are as long as they get."""
    return v.contiguous() if v.shape[1] % 16 == 0 else F.pad(v, (0, -v.shape[1] % 64))


def common(cell: Cell, steps: Steps, number: Number, at: Limits, H: int, R: int, extra: Extra) -> dict[str, Any]:
    """What all kernels are told, by name."""
    functions = cells.device(cell, H if cell.means else None)
    units = padded(H) if cell.recurrent else UNITS
    return {
        **{k: getattr(steps, k) for k in ("T", "B", "rows", "first", "order")}, "REVERSE": steps.reverse,
        "G": cell.G, "S": cell.S, "A": cell.A, "Q": len(cell.second), "SPLIT": bool(cell.split), "H": H, "R": R,
        "P": cell.P, "M": cell.M, "D": cell.D, "RECURRENT": cell.recurrent, "SKIP": extra.skip, "CLIP": float(extra.clip),
        "MASKS": cells.masks(tuple(extra.noise), extra.seed is not None) if cell.M else None,
        "parameters": extra.params, "seed": extra.seed, "flags": extra.flags, "origin": extra.first,
        "HP": units, "RP": padded(R) if cell.recurrent else UNITS, "EARLY": at.overlap, **vars(functions), **number.constants,
    }  # fmt: skip


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
    extra: Extra,
) -> None:
    """The walk of `_sequence.forward`."""
    at, B, R, H = limits(), steps.B, w_hh.shape[1], w_hh.shape[0] // cell.G
    if not cell.recurrent:
        R = H
    number = Number.of(gates.dtype, at)
    arguments = common(cell, steps, number, at, H, R, extra)
    arguments |= {"gates": gates, "bias": b_hh, "seq": tuple(seq), "raw": raw, "acts": acts}
    if not cell.recurrent or is_resident(cell, H, R, w_hr is not None, number, at):
        arguments |= {"w_hh": w_hh, "w_hr": w_hr, "state": tuple(state), "final": tuple(final), "BM": ROWS}
        grid = triton.cdiv(B, ROWS), 1 if cell.recurrent else triton.cdiv(H, UNITS)
        launch(resident.forward_walk, grid, arguments, resident_options(arguments["HP"], number))
        return

    w, projected = aligned(w_hh), w_hr is not None
    h = w.new_zeros(2, B, w.shape[1])  # what lies beyond R stays zero
    h[:, :, :R] = state[0]
    wide = [None if projected and k == 0 else v.to(number.accumulator, copy=True) for k, v in enumerate(state)]
    v = early = None
    if w_hr is not None:
        w_hr = aligned(w_hr)
        v = w.new_zeros(B, w_hr.shape[1])
        final[0].copy_(state[0])
    elif cell.second:
        v = torch.zeros_like(h[0])
    if cell.second or cell.means:
        early = h.new_empty(B, cell.G - len(cell.second), H, dtype=number.accumulator)
    arguments |= {
        "w": w, "h": h, "v": v, "early": early, "KH": w.shape[1], "KV": 0 if v is None else v.shape[1],
        "state": tuple(wide), "PROJECTED": projected,
    }  # fmt: skip
    own = tile(B, H, w.shape[1], cell.G, number, at)
    parts = [("operand", own), ("rest", own)] if cell.second else [("whole", own)]
    if cell.means:
        parts = [("product", own), ("cell", whole_rows(B, H, at))]
    launches = [
        Launch(step.forward_step, tiles.grid, arguments | tiles.constants | {"PART": part}, tiles.options)
        for part, tiles in parts
    ]
    if w_hr is not None:
        own = tile(B, R, w_hr.shape[1], 1, number, at)
        change = own.constants | {"w": w_hr, "seq": seq[0], "final": final[0]}
        launches.append(Launch(step.project_step, own.grid, arguments | change, own.options))
    for i in range(steps.T):
        for part in launches:
            part(i)
    for given, kept in zip(final, wide):
        if kept is not None:
            given.copy_(kept)


# ---------------------------------------------------------------- backward


def walk_backward(
    cell: Cell,
    grads: Tensors,  # S of [N, R], [N, H] .., then S of [B, R], [B, H] ..; None is zero
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
    dparams: Tensor | None,  # [N, P * H] to fill
    extra: Extra,
) -> None:
    """The walk of `_sequence.backward`."""
    at, (B, R), H, S = limits(), state[0].shape, w_hh.shape[0] // cell.G, cell.S
    number = Number.of(dgates.dtype, at)
    resides = not cell.recurrent or is_resident(cell, H, R, w_hr is not None, number, at)
    owed = dgates.new_zeros(steps.N, H, dtype=number.accumulator) if cell.D else None
    arguments = common(cell, steps, number, at, H, R, extra) | {
        "grads": tuple(grads[:S]), "seq": tuple(seq), "raw": raw, "acts": acts, "state": tuple(state),
        "dgates": dgates, "dr": dr, "operand": operand, "dproj": dproj, "dparams": dparams, "owed": owed,
    }  # fmt: skip
    late = len(cell.second) * H
    first = tile(B, R, w_hh.shape[0] - late, 1, number, at)
    second = whole_rows(B, H, at) if cell.means else tile(B, H, late or R, 1, number, at)
    grid = triton.cdiv(B, ROWS), 1 if cell.recurrent else triton.cdiv(H, UNITS)
    programs = grid[0] * grid[1] if resides else max(first.programs, second.programs)
    # one sum for each program: added up in one order, the same bits in every run
    partial = None if norms is None else norms.new_zeros(steps.T, S, programs)
    arguments |= {"norms": partial, "PROGRAMS": programs}
    if resides:
        arguments |= {"w_hh": w_hh, "w_hr": w_hr, "last": tuple(grads[S:]), "dstate": tuple(dstate), "BM": ROWS}
        launch(resident.backward_walk, grid, arguments, resident_options(arguments["HP"], number))
    else:
        wide = tuple(
            torch.zeros_like(v, dtype=number.accumulator) if g is None else g.to(number.accumulator, copy=True)
            for v, g in zip(state, grads[S:])
        )
        arguments |= {"dstate": wide, "PROJECTED": w_hr is not None}
        w = aligned(w_hh)
        parts = [("whole", w, first)]
        if w_hr is not None or cell.second or cell.means:
            parts = [("open", w, first), ("close", w if w_hr is None else aligned(w_hr), second)]
        launches = []
        for part, matrix, own in parts:
            more = own.constants | {"PART": part, "w": matrix, "KW": matrix.shape[1]}
            launches.append(Launch(step.backward_step, own.grid, arguments | more, own.options))
        for i in range(steps.T):
            for one in launches:
                one(i)
        launches[0](steps.T)  # there is no such step: what the first one of the walk leaves to the initial state
        for given, kept in zip(dstate, wide):
            given.copy_(kept)
    if norms is not None and partial is not None:
        torch.sum(partial, 2, out=norms)
