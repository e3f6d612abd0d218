"""Triton kernels for GPUs of any vendor that Triton supports; Triton's interpreter runs them on the CPU.

A walk over the steps is one kernel for few units, and one launch or two per step for any number of them; `launch.py` chooses.
Both are generic over the cell, whose printed functions they are given. Operations without a recurrence have modules of their
own, named as they are. Triton is imported when a kernel is asked for.
"""

from __future__ import annotations

import importlib.util
import os
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gradkernels.backends import _sequence

if TYPE_CHECKING:
    from gradkernels.cells import Cell

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
CLIPS = True  # whether backward clamps the adjoint of h_t
OLDEST = (8, 0)  # compute capability of a GPU of NVIDIA's that Triton supports


def why_not(
    cell: Cell | None = None, dtype: torch.dtype | None = None, device: torch.device | None = None
) -> str | None:
    """The reason why this backend cannot run that, or None."""
    if dtype is not None and dtype not in DTYPES:
        return f"it has no kernels for {dtype}"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed; `pip install triton` (Linux)"
    reason = _no_device(device)
    if reason is None and cell is not None:
        from gradkernels.backends.triton import cells

        reason = cells.why_not(cell)
    return reason


def _no_device(device: torch.device | None) -> str | None:
    if os.environ.get("TRITON_INTERPRET") == "1":
        import triton.language as tl
        from triton.runtime.interpreter import InterpretedFunction

        if isinstance(tl.zeros, InterpretedFunction):
            return None
    kind = device.type if device is not None else "cuda" if torch.cuda.is_available() else "xpu"
    if kind not in ("cuda", "xpu"):
        return f"it runs on GPUs, and on {kind} only where TRITON_INTERPRET=1 was set before Triton was imported"
    if not getattr(torch, kind).is_available():
        return "there is no GPU that torch can use"
    if kind == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device) < OLDEST:
        return "it needs a GPU of compute capability 8.0 or newer"
    return None


def forward(*arguments: Any) -> list[Tensor]:
    """[y, (other state sequences,) *final states, (raw,) (acts)], as the reference's."""
    from gradkernels.backends.triton.walk import walk_forward

    return _sequence.forward(walk_forward, *arguments)


def backward(*arguments: Any) -> list[Tensor]:
    """[each needed gradient of x and the weights, *dstate, (norms)], as the reference's."""
    from gradkernels.backends.triton.walk import walk_backward

    return _sequence.backward(walk_backward, *arguments)
