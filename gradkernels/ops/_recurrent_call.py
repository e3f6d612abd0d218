"""One call of a recurrent cell: checks, then the kernel, the operator or the autograd Function, whichever is enough."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from gradkernels.backends._extra import PLAIN, Extra
from gradkernels.cells import Cell
from gradkernels.ops import _recurrent_op as op
from gradkernels.ops._recurrent_autograd import Recurrent, apply
from gradkernels.ops._recurrent_checks import WEIGHTS, check_extra, check_forward
from gradkernels.ops._recurrent_taps import widths

Tensors = tuple[Tensor, ...]
Inputs = tuple[Any, Any, Any, Any, Any, Any]  # x, weight_ih, bias_ih, weight_hh, bias_hh, weight_hr: Tensor or None


def call(
    c: Cell,
    name: str | None,  # by which operators know it; None: to be found
    tensors: Inputs,
    state: Sequence[Tensor] | None,
    batch_sizes: Tensor | None,
    lengths: Tensor | None,
    reverse: bool,
    probe: Tensor | None,
    every_state: bool,
    backend: str | None,
    extra: Extra = PLAIN,
) -> tuple[Tensor | Tensors, Tensors]:
    """The sequence of the first state, or with `every_state` those of all, and the final states."""
    # asked in this order: "meta" has no autocast
    if torch._C._is_any_autocast_enabled() and torch.is_autocast_enabled(tensors[0].device.type):
        tensors, state, extra = autocast(tensors, state, extra)
    fast = op.direct((*tensors, batch_sizes, lengths, *(state or ()), *op.tensors_of(extra)))
    if (
        fast or torch.compiler.is_compiling() or not torch._C._is_tracing()
    ):  # jit.trace leaves the checks to the operator
        try:
            check_forward(c, *tensors, state, batch_sizes, lengths, extra.heads)
            # in a graph the operator checks it: there numbers may be symbols
            if (extra is not PLAIN or c.P or c.M or c.D) and not torch.compiler.is_compiling():
                check_extra(c, tensors[0], tensors[3], extra)
        except AttributeError:
            check_types((*tensors, *(state or ()), batch_sizes, lengths), extra.params)
            raise
    if state is None:
        state = zeros(c, tensors[0], tensors[3], batch_sizes, extra.heads)  # as autocast left them
    if probe is not None:
        probe = check_probe(probe, c, tensors[0].device)
    S, keep = c.S, 1 if every_state else 0
    if fast:
        if not _requires_grad((*tensors, *state, probe, extra.params)):
            out = op.forward_kernel(c, *tensors, state, batch_sizes, lengths, reverse, keep, backend, extra)
            return (tuple(out[:S]), tuple(out[S:])) if every_state else (out[0], tuple(out[1:]))
        function = True
    else:
        function = _wants_function((*tensors, *state, probe, extra.params))
    name = name or op.name_of(c)
    if function:
        params, seed, noise, flags, *more = extra
        how = name, reverse, backend, noise, *more
        out = apply(Recurrent)(how, batch_sizes, lengths, seed, flags, *tensors, params, probe, *state)
        return tuple(out[:S]) if every_state else out[0], tuple(out[S : 2 * S])
    out = op.forward(name, *tensors, list(state), batch_sizes, lengths, reverse, keep, backend, extra)
    return (tuple(out[:S]), tuple(out[S:])) if every_state else (out[0], tuple(out[1:]))


def _requires_grad(tensors: Sequence[Tensor | None]) -> bool:
    """Autograd records this call, or forward mode is on."""
    if torch.is_grad_enabled():
        for v in tensors:
            if v is not None and v.requires_grad:
                return True
    return forward_ad._current_level >= 0


def _wants_function(tensors: Sequence[Tensor | None]) -> bool:
    """The operator alone is enough unless some kind of differentiation or batching is listening."""
    if torch.compiler.is_compiling():
        if torch._C._are_functorch_transforms_active():  # Dynamo would trace the forward and lose the backward
            torch._dynamo.graph_break(
                msg="torch.func transforms of a recurrent layer cannot be compiled; apply them outside torch.compile"
            )
            return True
        # A Function would be exported as no_grad; the operator has a derivative of its own. Asked of the flag: Dynamo of torch
        # 2.11 takes is_exporting() for true everywhere.
        if torch.compiler._is_exporting_flag:
            return False
        return torch.is_grad_enabled() and any(v is not None and v.requires_grad for v in tensors)
    if torch._C._are_functorch_transforms_active():
        return True
    return _requires_grad(tensors) and not torch._C._is_tracing()  # torch.jit.trace must record the operator


def autocast(tensors, state, extra):
    """Autocast is a cast of the arguments, differentiable like any other."""
    device = tensors[0].device.type
    low = torch.get_autocast_dtype(device)

    def cast(v):
        eligible = (
            v is not None and v.dtype in (torch.float32, torch.float16, torch.bfloat16) and v.device.type == device
        )
        return v.to(low) if eligible else v

    if extra is not PLAIN:
        extra = extra._replace(params=cast(extra.params), flags=cast(extra.flags))
    return tuple(cast(v) for v in tensors), None if state is None else [cast(v) for v in state], extra


def zeros(cell: Cell, x: Tensor, weight_hh: Tensor, batch_sizes: Tensor | None, heads: int) -> list[Tensor]:
    """Initial states when none are given."""
    if batch_sizes is None:
        B = x.shape[1]
    else:
        B = int(batch_sizes[0]) if batch_sizes.shape[0] else 0
        if B < 0:
            raise RuntimeError(f"batch_sizes must not be negative, got {B}")
    H = weight_hh.shape[0] // cell.G
    return [x.new_zeros(B, n) for n in (weight_hh.shape[1] * heads if cell.recurrent else H, *[H] * (cell.S - 1))]


def check_probe(probe: Tensor, cell: Cell, device: torch.device) -> Tensor | None:
    """The probe, where anybody can ask for its gradient."""
    columns = widths(cell)
    if probe.dim() != 2 or probe.shape[1] not in columns or probe.dtype != torch.float64:
        raise ValueError(
            f"probe must be float64 [steps, {columns[0]}] for {cell.name} (or [.., {columns[-1]}] for details), got {probe.dtype} "
            f"{list(probe.shape)}"
        )
    if probe.device != device:
        raise RuntimeError(
            f"expected all tensors to be on the same device, but x is on {device} and probe is on {probe.device}"
        )
    # under a transform nobody can ask for its gradient
    return None if torch._C._are_functorch_transforms_active() else probe


def check_types(values: Sequence[object], params: object = None) -> None:
    """TypeError for the first argument that is not a tensor."""
    names = ("x", *WEIGHTS, *(f"state[{k}]" for k in range(len(values) - 8)), "batch_sizes", "lengths", "params")
    for name, v in zip(names, (*values, params)):
        if not isinstance(v, Tensor) and (v is not None or name in ("x", "weight_hh") or name.startswith("state")):
            raise TypeError(f"{name} must be a tensor, got {type(v).__name__}")
