"""One recurrent layer in one direction, over a whole sequence."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.autograd import forward_ad

from gradkernels import cells
from gradkernels.backends._extra import PLAIN, Extra
from gradkernels.ops import _recurrent_op as op
from gradkernels.ops._recurrent_autograd import Recurrent, apply
from gradkernels.ops._recurrent_checks import WEIGHTS, check_extra, check_forward
from gradkernels.ops._recurrent_taps import widths

if TYPE_CHECKING:
    from gradkernels.cells import Cell


def recurrent(
    x: Tensor,  # [T, B, I], packed [N, I], or the gates [.., G*H] when weight_ih is None
    weight_hh: Tensor,  # [G*H, R]
    state: Sequence[Tensor] | None = None,  # S tensors [B, R], [B, H] ...
    *,
    weight_ih: Tensor | None = None,  # [G*H, I]
    bias_ih: Tensor | None = None,  # [G*H]
    bias_hh: Tensor | None = None,  # [G*H]
    weight_hr: Tensor | None = None,  # [R, H]
    params: Tensor | None = None,
    cell: str | Cell = "lstm",
    lengths: Tensor | None = None,  # [B]
    batch_sizes: Tensor | None = None,  # [T]
    reverse: bool = False,
    probe: Tensor | None = None,  # [steps, S + 1]
    every_state: bool = False,
    backend: str | None = None,
) -> tuple[Tensor | tuple[Tensor, ...], tuple[Tensor, ...]]:
    r"""Run a recurrent cell over a sequence: one layer, one direction.

    With :math:`s_{-1}` the initial state, for every step t

    .. math::
        s_t, \ldots = \mathrm{cell}(W_{ih} x_t + b_{ih},\; W_{hh} h_{t-1} + b_{hh},\; s_{t-1}), \qquad h_t = W_{hr}\, s_t[0]

    where :math:`W_{hr}` is the identity unless ``weight_hr`` is given. Gates are in torch's order (i f g o; r z n).

    Args:
        x: input ``[T, B, I]``; ``[N, I]`` with ``batch_sizes``; the gates ``[.., G*H]`` already projected when ``weight_ih`` is
            None. float32, float64, bfloat16 or float16, like every other tensor here; 16-bit storage is computed in float32. On a
            GPU products of float32 are tf32 where ``torch.backends.cudnn`` allows it, as it does unless told otherwise.
        weight_hh: recurrent weight ``[G*H, R]``; R is H, or the rows of ``weight_hr``.
        state: the cell's S initial states, ``[B, R]`` the first and ``[B, H]`` the others; zeros when None.
        weight_ih, bias_ih, bias_hh: input weight ``[G*H, I]``, biases ``[G*H]``; each may be None.
        weight_hr: projection ``[R, H]`` of the first state, for cells that use it in the recurrent product only (``lstm``).
        params: parameters ``[P, H]`` of each unit, for cells that have them.
        cell: a name in ``gradkernels.cells.CELLS``, or a Cell.
        lengths: int64 ``[B]`` from 0 to T, in any order: row b has the steps t < lengths[b]. Beyond them outputs are zero, the final
            state is that of a row's last step, and ``reverse`` begins there. On the CPU, where they are checked, or beside x, where
            nobody waits to read them and what is outside counts as the nearest end.
        batch_sizes: int64 ``[T]`` on the CPU, the rows of each step as in ``torch.nn.utils.rnn.PackedSequence``.
        reverse: walk from the last step to the first.
        probe: float64 ``[steps, S + 1]``. Its gradient is, per step, the squared norm of the gradient of each state, and the number
            of rows; a probe longer than the sequence is filled with zeros, a shorter one receives the last steps. Further columns
            ask for more: ``[steps, S + 2]`` for the squared norm of the gradient of x too, and ``[steps, S + 3 + E]`` for the number
            of saturated values of each of the cell's E activations that are kept anyway, and of the values looked at.
        every_state: return the sequences of all S states, not of the first alone.
        backend: "cuda", "triton", "cpu" or "reference"; None takes the best that can run.

    Returns:
        outputs ``[T, B, R]`` (``[N, R]``; with ``every_state`` a tuple of S such tensors) and the tuple of S final states.

    Raises:
        RuntimeError: shapes or devices do not fit together, or ``backend`` cannot run this call.
        ValueError: an unknown cell or backend, mixed dtypes, zero sizes, both ``lengths`` and ``batch_sizes``.
        TypeError: x is not floating point, or something is not a tensor.

    Derivatives of any order, forward mode and ``torch.func`` pass through; second derivatives are those of the reference backend.

    The LSTM is that of Hochreiter and Schmidhuber (1997) with forget gates, as ``torch.nn.LSTM`` has it.

    Example:
        >>> import torch, gradkernels as gk
        >>> x, h, c = torch.randn(7, 2, 3), torch.zeros(2, 5), torch.zeros(2, 5)
        >>> w_ih, w_hh = torch.randn(20, 3), torch.randn(20, 5, requires_grad=True)
        >>> y, (h_n, c_n) = gk.ops.recurrent(x, w_hh, (h, c), weight_ih=w_ih, cell="lstm")
        >>> y.shape, torch.equal(y[-1], h_n)
        (torch.Size([7, 2, 5]), True)
        >>> y.sum().backward()
        >>> w_hh.grad.shape
        torch.Size([20, 5])
    """
    c = cells.CELLS.get(cell) if type(cell) is str else cell
    if not isinstance(c, cells.Cell):
        c = cells.get(cell)  # its error names the registry
    extra = PLAIN if params is None else Extra(params)
    tensors = x, weight_ih, bias_ih, weight_hh, bias_hh, weight_hr
    # asked in this order: "meta" has no autocast
    if torch._C._is_any_autocast_enabled() and torch.is_autocast_enabled(x.device.type):
        tensors, state = _autocast(tensors, state)
    fast = op.direct((*tensors, batch_sizes, lengths, *(state or ())))
    if (
        fast or torch.compiler.is_compiling() or not torch._C._is_tracing()
    ):  # jit.trace leaves the checks to the operator
        try:
            check_forward(c, *tensors, state, batch_sizes, lengths)
            if c.extra or extra is not PLAIN:
                check_extra(c, tensors[0], tensors[3], extra)
        except AttributeError:
            _check_types((*tensors, *(state or ()), batch_sizes, lengths))
            raise
    if state is None:
        state = _zeros(c, tensors[0], tensors[3], batch_sizes)  # as autocast left them
    if probe is not None:
        probe = _check_probe(probe, c, x.device)
    S, keep = c.S, 1 if every_state else 0
    if fast:
        if not _requires_grad((*tensors, *state, probe)):
            out = op.forward_kernel(c, *tensors, state, batch_sizes, lengths, reverse, keep, backend, extra)
            return (tuple(out[:S]), tuple(out[S:])) if every_state else (out[0], tuple(out[1:]))
        function = True
    else:
        function = _wants_function((*tensors, *state, probe))
    name = cell if type(cell) is str else op.name_of(c)
    if function:
        params, seed, noise, flags, skip, clip, first = extra
        how = noise, skip, clip, first
        out = apply(Recurrent)(
            name, reverse, backend, how, batch_sizes, lengths, seed, flags, *tensors, params, probe, *state
        )
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


def _autocast(tensors, state):
    """Autocast is a cast of the arguments, differentiable like any other."""
    device = tensors[0].device.type
    low = torch.get_autocast_dtype(device)

    def cast(v):
        eligible = (
            v is not None and v.dtype in (torch.float32, torch.float16, torch.bfloat16) and v.device.type == device
        )
        return v.to(low) if eligible else v

    return tuple(cast(v) for v in tensors), None if state is None else [cast(v) for v in state]


def _zeros(cell, x, weight_hh, batch_sizes):
    """Initial states when none are given."""
    if batch_sizes is None:
        B = x.shape[1]
    else:
        B = int(batch_sizes[0]) if batch_sizes.shape[0] else 0
        if B < 0:
            raise RuntimeError(f"batch_sizes must not be negative, got {B}")
    H = weight_hh.shape[0] // cell.G
    widths = [weight_hh.shape[1] if cell.recurrent else H, *[H] * (cell.S - 1)]
    return [x.new_zeros(B, n) for n in widths]


def _check_probe(probe, cell, device):
    columns = widths(cell)
    if probe.dim() != 2 or probe.shape[1] not in columns or probe.dtype != torch.float64:
        raise ValueError(
            f"probe must be float64 [steps, {columns[0]}] for {cell.name} (or [.., {columns[1]}] or [.., {columns[2]}] to measure "
            f"more), got {probe.dtype} {list(probe.shape)}"
        )
    if probe.device != device:
        raise RuntimeError(
            f"expected all tensors to be on the same device, but x is on {device} and probe is on {probe.device}"
        )
    # under a transform nobody can ask for its gradient
    return None if torch._C._are_functorch_transforms_active() else probe


def _check_types(values):
    """TypeError for the first argument that is not a tensor."""
    names = ("x", *WEIGHTS, *(f"state[{k}]" for k in range(len(values) - 8)), "batch_sizes", "lengths")
    for name, v in zip(names, values):
        if not isinstance(v, Tensor) and (v is not None or name in ("x", "weight_hh") or name.startswith("state")):
            raise TypeError(f"{name} must be a tensor, got {type(v).__name__}")
