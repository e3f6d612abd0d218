"""What the gradient of a wide probe holds beyond the squared norms of the states: measured where backward has the tensors anyway.

    columns      S       1       1                   E                    1
              |ds|^2   rows   |dx|^2   saturated values by activation   values looked at

A probe has the first two groups, the first three, or all. Everything is a sum, so that micro-batches, repeated calls, ranks and recomputation
add up. Saturated is a value within 5 % of an end of its activation's range, or a zero of relu; it is
counted in at most `ROWS` rows of the batch, the longest ones.

Dims: T steps, B batch, N tokens, H hidden units, S states, A kept values, E activations.
"""

from __future__ import annotations

import ast
import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from gradkernels.cells import Cell
from gradkernels.ops._constant import constant
from gradkernels.ops._squares import squares_of_steps

ROWS = 4
# sign (|v - centre| - width) > 0 is saturated: beyond that an activation hands on less than a fifth of its largest derivative.
# tanh(x) = 2 sigmoid(2 x) - 1 makes the first two one; of a relu it is the zero.
SATURATED = {"sigmoid": (0.5, 0.45, 1.0), "tanh": (0.0, 0.9, 1.0), "relu": (0.0, 1e-30, -1.0)}


@functools.cache
def _activations(source: str) -> tuple[tuple[str, str, str, int], ...]:
    forward = ast.parse(source).body[0]
    assert isinstance(forward, ast.FunctionDef)
    *lines, last = forward.body
    made = {line.targets[0].id: line.value for line in lines}  # type: ignore[attr-defined]
    found = []
    for group, values in zip("ta", last.value.elts):  # type: ignore[attr-defined]
        for k, v in enumerate(values.elts):
            name = v.id if isinstance(v, ast.Name) else "h" if (group, k) == ("t", 0) else ""
            v = made.get(name, v)
            if name and isinstance(v, ast.Call) and v.func.id in SATURATED:  # type: ignore[attr-defined]
                found.append((name, v.func.id, group, k))  # type: ignore[attr-defined]
    return tuple(found)


@constant
def activations(cell: Cell) -> tuple[tuple[str, str, str, int], ...]:
    """Name, function, and where it is kept ("t": among new states, "a": among what forward keeps; which) of each.

    >>> from gradkernels.cells import get
    >>> [name for name, *_ in activations(get("lstm"))], activations(get("rnn_relu"))
    (['i', 'f', 'g', 'o'], (('h', 'relu', 't', 0),))
    """
    return _activations(cell.source)


# What torch.compiler.assume_constant_result sets; that imports Dynamo, which takes seconds.
activations._dynamo_marked_constant = True  # type: ignore[attr-defined]


def widths(cell: Cell) -> tuple[int, int, int]:
    """How many columns a probe may have: norms; that of x, too; saturation, too, of a cell that has activations."""
    E = len(activations(cell))
    return cell.S + 1, cell.S + 2, cell.S + 2 + (E + 1 if E else 0)


def saturation(
    cell: Cell,
    y: Tensor,  # [T, B, R] or [N, R]
    kept: list[Tensor],  # the other state sequences, (raw,) acts [N, A, H]
    batch_sizes: Tensor | None,  # [T]
    lengths: Tensor | None,  # [B]
) -> Tensor:
    """[T, E + 1], for a cell that has activations: saturated values of each activation, and how many values were looked at."""
    acts, places = kept[-1], activations(cell)
    H, of_a = acts.shape[-1], [k for *_, group, k in places if group == "a"]
    of_t = [[y, *kept[: cell.S - 1]][k] for *_, group, k in places if group == "t"]
    if batch_sizes is not None:
        T, rows = batch_sizes.shape[0], torch.arange(ROWS)
        first = (batch_sizes.cumsum(0) - batch_sizes).unsqueeze(1) + rows
        live = (rows < batch_sizes.unsqueeze(1)).to(y.device, non_blocking=True)
        first = first.clamp(max=y.shape[0] - 1).flatten().to(y.device, non_blocking=True)
        pick = lambda v: v.index_select(0, first)
    else:
        T, B = y.shape[:2]
        r = min(B, ROWS)
        if lengths is None:
            live = None
            pick = lambda v: v[:, :r]
        else:
            chosen = lengths.to(y.device).topk(r)
            live = torch.arange(T, device=y.device).unsqueeze(1) < chosen.values
            pick = lambda v: v.index_select(1, chosen.indices)
        acts = acts.view(T, B, *acts.shape[1:])
    planes = [pick(v).reshape(T, -1, 1, H) for v in of_t]
    if of_a:
        planes.append(pick(acts).reshape(T, -1, cell.A, H)[:, :, of_a if len(of_a) < cell.A else slice(None)])
    ends = acts.new_tensor([SATURATED[function] for _, function, *_ in places]).unsqueeze(2).unbind(1)
    centre, width, sign = ends
    count = (torch.cat(planes, 2) - centre).abs_().sub_(width).mul_(sign).gt_(0).sum(3, dtype=torch.float32)
    count = (count if live is None else torch.where(live.unsqueeze(2), count, 0)).sum(1, dtype=torch.double)
    looked_at = count.new_full((T,), r * H) if live is None else live.sum(1, dtype=torch.double) * H
    return torch.cat([count, looked_at.unsqueeze(1)], 1)


def measured(
    cell: Cell,
    width: int,  # of the probe
    norms: Tensor,  # [T, S + 1], what the backend measured
    dx: Tensor | None,
    saved: list[Tensor],  # S sequences, (raw,) acts
    batch_sizes: Tensor | None,
    lengths: Tensor | None,
) -> Tensor:
    """All columns of the probe, [T, width]. The gradient of an input that wants none is not there, and counts as 0."""
    if width == cell.S + 1:
        return norms
    of_x = norms.new_zeros(norms.shape[0]) if dx is None else squares_of_steps(dx.detach(), batch_sizes)
    columns = [norms, of_x.unsqueeze(1)]
    if width > cell.S + 2:
        columns.append(saturation(cell, saved[0], saved[1:], batch_sizes, lengths))
    return torch.cat(columns, 1)


def fit(size: Tensor, shape: torch.Size) -> Tensor:
    """What was measured as the gradient of a probe: a longer probe is padded, a shorter one keeps the last steps."""
    T, C = size.shape[0], shape[0]
    return size if T == C else size[T - C :] if T > C else F.pad(size, (0, 0, 0, C - T))
