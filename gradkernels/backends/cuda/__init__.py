"""The CUDA kernels of csrc/cuda on NVIDIA GPUs: compiled at run time for the GPU at hand, weights kept where they are used.

Which kernel takes a call is decided by `plan`; `explain` says it in words. A result is the same bits in every run.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from gradkernels.backends import _sequence
from gradkernels.backends._extra import PLAIN, Extra
from gradkernels.cells import Cell
from gradkernels.cells.codegen import device_struct

from . import driver, launch, plan
from .arguments import MAX_MASKS, MAX_STATES

Tensors = Sequence[Tensor | None]
CLIPS = True  # whether backward clamps the adjoint of h_t


def why_not(
    cell: Cell | None = None, dtype: torch.dtype | None = None, device: torch.device | None = None
) -> str | None:
    """The reason why this backend cannot run that, or None."""
    if dtype is not None and dtype not in launch.NUMBERS:
        return f"it has no kernels for {dtype}"
    if cell is not None and (reason := _cell_why_not(cell)) is not None:
        return reason
    return driver.why_not(device)


@functools.cache
def _cell_why_not(cell: Cell) -> str | None:
    if cell.S > MAX_STATES:
        return f"cell {cell.name!r} has {cell.S} states, and the kernels take {MAX_STATES}"
    if cell.M > MAX_MASKS:
        return f"cell {cell.name!r} has {cell.M} masks, and the kernels take {MAX_MASKS}"
    try:
        device_struct(cell)
    except (NotImplementedError, ValueError) as e:
        return str(e)
    return None


def explain(
    cell: Cell, H: int, B: int, dtype: torch.dtype = torch.bfloat16, device: torch.device | str | None = None
) -> str:
    """How a layer of H units runs on this GPU with B rows in the batch, forward and backward, and why not otherwise.

    Raises:
        RuntimeError: there is no GPU to ask.
    """
    return plan.explain(cell, H, B, dtype, torch.device("cuda") if device is None else torch.device(device))


def forward(
    cell: Cell,
    x: Tensor,  # [T, B, I] or [N, I] with batch_sizes; the gates, G*H wide, without weight_ih
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
    """[y, (other state sequences,) *final states, (raw,) (acts)]; see the op for `keep`."""
    walk = functools.partial(launch.forward, batch_sizes)
    return _sequence.forward(
        walk,
        cell,
        x,
        weight_ih,
        bias_ih,
        weight_hh,
        bias_hh,
        weight_hr,
        state,
        batch_sizes,
        lengths,
        reverse,
        keep,
        extra,
    )


def backward(
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
    """[each needed gradient of x and the weights, *dstate, (norms)], or with `gates` what those are made of; see the op."""
    walk = functools.partial(launch.backward, batch_sizes)
    return _sequence.backward(
        walk, cell, grads, x, weight_ih, weight_hh, weight_hr, saved, state, batch_sizes, lengths, reverse, need, gates, norms,
        extra,
    )  # fmt: skip
