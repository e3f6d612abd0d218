"""What the backends of a GPU share: everything around the walk over the steps.

On a GPU the input projection is one product over all tokens before the walk, and the gradients of the weights are products
after it; only the walk itself is a kernel. A backend hands its two walks to `forward` and `backward` here. They fill tensors
that are allocated here: contiguous, on one device, in the storage of x unless said otherwise, and never without a token.

    walk_forward(cell, gates, w_hh, b_hh, w_hr, state, steps, seq, final, raw, acts, extra)
        gates [N, G*H]; w_hh [G*H, R], without heads, [G*H, 0] of a cell without a recurrent product; b_hh [G*H] or None; w_hr [R, H] or None;
        state: S of [B, R], [B, H] ...; extra: see _extra.py, params and flags in the storage of x, contiguous
        fills seq: S of [N, R], [N, H] ..., None where not wanted; final: S of [B, ..]; raw [N, H] or None; acts [N, A, H] or None
    walk_backward(cell, grads, w_hh, w_hr, seq, raw, acts, state, steps, dgates, dr, operand, dproj, dstate, norms, dparams, extra)
        grads: S of [N, ..], then S of [B, ..], None is zero; seq, raw, acts, state as forward left them
        fills dgates, dr [N, G*H], one tensor unless a gate is split; operand [N, H] or None; dproj [N, R] or None;
        dstate: S of [B, ..]; norms float64 [T, S] or None, zero at first: the squares summed over the rows of a step;
        dparams [N, P*H] or None: the gradient of params, token by token

`_unroll` defines both. Tokens that no step visits hold zeros already; the final state of a row without a step is its state.
Nothing here waits for the device, so that all of it can be captured in a graph.

Dims: T steps, B batch, N tokens, I inputs, H hidden units, R width of the first state, G gates, S states, A kept values,
P parameters of a unit.
"""

from __future__ import annotations

import contextlib
import math
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from gradkernels.backends._extra import PLAIN, Extra
from gradkernels.backends._heads import dense
from gradkernels.backends.reference import no_autocast, project, weight_gradients
from gradkernels.cells import Cell

Tensors = Sequence[Tensor | None]
Walk = Callable[..., None]

# ---------------------------------------------------------------- steps


@dataclass(frozen=True)
class Steps:
    """Which tokens make up each step.

    Row b of step t, for b < rows[t], is token first[t] + order[b] and column order[b] of the states. Step i of the walk is
    t = T - 1 - i in reverse, else i.
    """

    T: int
    B: int
    N: int
    reverse: bool
    rows: Tensor | None = None  # int32 [T] rows of each step in time, never growing; None: B
    first: Tensor | None = None  # int32 [T] the token where a step begins; None: t * B
    order: Tensor | None = None  # int32 [B] column of a row, the longest first; None: the same
    dead: Tensor | None = None  # bool [T, B, 1] which tokens of a padded batch are in no step; None: none

    @classmethod
    def of(cls, x: Tensor, B: int, batch_sizes: Tensor | None, lengths: Tensor | None, reverse: bool) -> Steps:
        """Of x [T, B, I], or packed [N, I] with batch_sizes [T] on the CPU; lengths [B], wherever they are."""
        N, device = math.prod(x.shape[:-1]), x.device
        if batch_sizes is not None:
            rows = _upload(batch_sizes, device)
            first = rows.cumsum(0, dtype=torch.int32) - rows
            return cls(rows.shape[0], B, N, reverse, rows, first)
        T = x.shape[0]
        if lengths is None:
            return cls(T, B, N, reverse)
        if lengths.device != device:
            lengths = _upload(lengths, device)
        lengths = lengths.clamp(0, T)  # on a device they are nobody's to read, and so nobody's to refuse
        dead = torch.arange(T, device=device).unsqueeze(1) >= lengths
        order = lengths.argsort(descending=True, stable=True).to(torch.int32)
        return cls(T, B, N, reverse, B - dead.sum(1, dtype=torch.int32), None, order, dead.unsqueeze(2))


def _upload(values: Tensor, device: torch.device) -> Tensor:
    """Integers of the CPU -> int32 on the device, without waiting for it."""
    values = values.to(torch.int32)
    if device.type != "cuda":
        return values.to(device, non_blocking=True)
    if not torch.cuda.is_current_stream_capturing():
        return values.pin_memory().to(device, non_blocking=True)
    # A graph would copy again at every replay, from memory that has long been somebody else's; what is filled in is its own.
    out, start = torch.empty(values.shape, dtype=torch.int32, device=device), 0
    for value, run in groupby(values.tolist()):
        end = start + len(list(run))
        out[start:end].fill_(value)
        start = end
    return out


def _entering(y: Tensor, h0: Tensor, dead: Tensor, reverse: bool) -> Tensor:
    """The state that enters each token of a ragged padded batch, [N, R], and zero where there is no step: of y [T, B, R]."""
    if reverse:  # the walk begins in the step after which no other follows
        last = torch.cat([dead[1:], torch.ones_like(dead[:1])])
        before = torch.where(last, h0, y.roll(-1, 0))
    else:
        before = torch.cat([h0.unsqueeze(0), y[:-1]])
    return before.masked_fill_(dead, 0).flatten(0, 1)


# ---------------------------------------------------------------- precision

_precision = threading.RLock()


def tf32() -> bool:
    """Whether products of float32 may round their factors to tf32: what `torch.backends.cudnn` allows torch's own layers."""
    return torch._C._get_fp32_precision_getter("cuda", "rnn") == "tf32"


@contextlib.contextmanager
def products(x: Tensor) -> Iterator[None]:
    """torch's products obey that too in here, and not what `torch.backends.cuda.matmul` says: cuDNN makes one rule of both.

    That setting belongs to the whole process: a lock keeps our own threads apart, and what is inside only launches."""
    with no_autocast(x.device):
        if x.dtype is not torch.float32 or x.device.type != "cuda":
            yield
            return
        get, put = torch._C._get_fp32_precision_getter, torch._C._set_fp32_precision_setter
        with _precision:
            before = get("cuda", "matmul")
            if (before == "tf32") is tf32():
                yield
                return
            put("cuda", "matmul", "tf32" if tf32() else "ieee")
            try:
                yield
            finally:
                put("cuda", "matmul", "none")  # whatever the wider setting says
                if get("cuda", "matmul") != before:
                    put("cuda", "matmul", before)


def _on(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """The device is the current one: kernels are launched there."""
    return contextlib.nullcontext() if device.type == "cpu" else getattr(torch, device.type).device(device)


# ---------------------------------------------------------------- the backend


def _rows(v: Tensor | None) -> Tensor | None:
    """[*lead, width] -> [N, width]"""
    return v if v is None else v.reshape(math.prod(v.shape[:-1]), v.shape[-1])


def _allocate(like: Tensor, zero: bool) -> Callable[..., Tensor]:
    return like.new_zeros if zero else like.new_empty


def forward(
    walk: Walk,
    cell: Cell,
    x: Tensor,  # [T, B, I], or [N, I] with batch_sizes; gates [.., G*H] when weight_ih is None
    weight_ih: Tensor | None,  # [G*H, I]
    bias_ih: Tensor | None,  # [G*H]
    weight_hh: Tensor,  # [G*H, R]
    bias_hh: Tensor | None,  # [G*H]
    weight_hr: Tensor | None,  # [R, H]
    state: Sequence[Tensor],  # S of [B, R], [B, H] ...
    batch_sizes: Tensor | None,  # [T] on the CPU
    lengths: Tensor | None,  # [B]
    reverse: bool,
    keep: int,
    extra: Extra = PLAIN,
) -> list[Tensor]:
    """[y, (other state sequences,) *final states, (raw,) (acts)], as the reference's."""
    H, lead = weight_hh.shape[0] // cell.G, x.shape[:-1]
    weight_hh = dense(weight_hh, extra.heads)
    N = math.prod(lead)
    new = _allocate(x, lengths is not None)
    seq: list[Tensor] = [new(N, v.shape[1]) for v in (state if keep else state[:1])]
    raw = new(N, H) if keep == 2 and weight_hr is not None else None
    acts = new(N, cell.A, H) if keep == 2 else None
    if N == 0:
        final = [v.clone() for v in state]
    else:
        final = [torch.empty_like(v) for v in state]
        with _on(x.device):
            steps = Steps.of(x, state[0].shape[0], batch_sizes, lengths, reverse)
            with products(x):
                gates = project(x.reshape(N, x.shape[-1]), weight_ih, bias_ih)
            wanted = [*seq, *[None] * (cell.S - len(seq))]
            walk(cell, gates, weight_hh, bias_hh, weight_hr, state, steps, wanted, final, raw, acts, extra)
    out = [*(v.view(*lead, v.shape[1]) for v in seq), *final, raw, acts]
    return [v for v in out if v is not None]


def backward(
    walk: Walk,
    cell: Cell,
    grads: Tensors,  # S like the sequences, S like the final states; None is zero
    x: Tensor,
    weight_ih: Tensor | None,
    weight_hh: Tensor,
    weight_hr: Tensor | None,
    saved: Sequence[Tensor],  # S sequences [.., R], [.., H] ..., (raw [N, H],) acts [N, A, H]
    state: Sequence[Tensor],
    batch_sizes: Tensor | None,
    lengths: Tensor | None,
    reverse: bool,
    need: Sequence[bool],
    gates: bool,
    norms: bool,
    extra: Extra = PLAIN,
) -> list[Tensor]:
    """[each needed gradient of x, the weights and params, *dstate, (norms)], or with `gates` what those are made of."""
    S, GH, lead = cell.S, weight_hh.shape[0], x.shape[:-1]
    H, N, B = GH // cell.G, math.prod(lead), state[0].shape[0]
    weight_hh = dense(weight_hh, extra.heads)
    T = lead[0] if batch_sizes is None else batch_sizes.shape[0]
    new = _allocate(x, lengths is not None)
    dgates = new(N, GH)
    dr = new(N, GH) if cell.split else dgates
    operand = new(N, H) if cell.second else None
    dproj = new(N, weight_hr.shape[0]) if weight_hr is not None else None
    dparams = new(N, cell.P * H) if cell.P and need[6] else None
    size = torch.zeros(T, S, dtype=torch.float64, device=x.device) if norms else None
    seq, raw = [_rows(v) for v in saved[:S]], (None if weight_hr is None else saved[S])
    steps = None
    if N == 0:
        dstate = [torch.zeros_like(v) if g is None else g.clone() for v, g in zip(state, grads[S:])]
    else:
        dstate = [torch.empty_like(v) for v in state]
        by_rows = [_rows(g) for g in grads]
        with _on(x.device):
            steps = Steps.of(x, B, batch_sizes, lengths, reverse)
            walk(
                cell, by_rows, weight_hh, weight_hr, seq, raw, saved[-1], state, steps, dgates, dr, operand, dproj, dstate, size,
                dparams, extra,
            )  # fmt: skip
    if gates:
        parts = [dgates, dr if cell.split else None, operand, dproj, dparams]
        out = [v.view(*lead, v.shape[1]) for v in parts if v is not None]
    else:
        out = []
        with products(x):
            if need[0]:
                dx = dgates if weight_ih is None else dgates @ weight_ih
                out.append(dx.view(x.shape))
            # states and inputs of all tokens, zero where no step is: there dgates is zero, but zero times NaN is not
            y, h0, sizes, inputs = seq[0], state[0], None, x
            if steps is not None and steps.dead is not None:
                y, h0 = (_entering(saved[0], h0, steps.dead, reverse) if need[3] and cell.recurrent else None), None
                inputs = x.masked_fill(steps.dead, 0) if need[1] else x
            elif batch_sizes is not None:
                sizes = batch_sizes if steps is None else steps.rows
            out += weight_gradients(
                cell, dgates, dr, operand, dproj, dparams, _rows(inputs), y, raw, h0, sizes, reverse, need, extra.heads
            )  # fmt: skip
        out = [v.to(x.dtype) for v in out]
    out += dstate
    if size is not None:
        each = size.new_full((T, 1), B if N else 0) if steps is None or steps.rows is None else steps.rows.unsqueeze(1)
        out.append(torch.cat([size, each.double()], 1))
    return out
