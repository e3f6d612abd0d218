"""One recurrent layer in one direction, over a whole sequence."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from gradkernels import cells
from gradkernels.backends._extra import PLAIN, Extra
from gradkernels.ops._recurrent_call import call
from gradkernels.ops._recurrent_options import Call, Options, run

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
    training: bool = True,
    zoneout: float | Sequence[float] = 0,
    recurrent_dropout: float = 0,
    variational: float = 0,
    weight_drop: float = 0,
    noise: Sequence[tuple[float, float, str]] = (),
    seed: Tensor | None = None,  # [1]
    reset: Tensor | None = None,  # [T, B], or [N]
    skip: int = 0,
    clip_grad: float = 0,
    heads: int = 1,
    recompute: int = 0,
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
            of rows; a probe longer than the sequence is filled with zeros, a shorter one receives the last steps. With
            further columns, ``[steps, S + 3 + E]``, it receives details too: the squared norm of the gradient of x, the number of
            saturated values of each of the E activations that backward has at hand, and of the values looked at.
        every_state: return the sequences of all S states, not of the first alone.
        backend: "cuda", "triton", "cpu" or "reference"; None takes the best that can run.
        training: draw the masks of what follows; else each is its mean.
        zoneout: probability with which a unit keeps its state from the step before (Krueger et al., 2017): of every state, or one
            number for each.
        recurrent_dropout, variational: probability with which a unit's h is dropped where :math:`W_{hh}` multiplies it, drawn every
            step, or once a sequence (Gal and Ghahramani, 2016).
        weight_drop: probability with which an element of ``weight_hh`` is dropped, once a call (DropConnect, as in AWD-LSTM).
        noise: for a cell that reads masks m of its own: (p, high, "step" or "sequence") of each, 0 with probability p, else high.
        seed: int64 ``[1]`` beside x that the masks are made of; None draws one from torch's generator. Masks are never stored.
        reset: bool ``[T, B]`` (``[N]``): begin anew, from zero states, before this step. Final states, and the outputs, are from before
            a reset; with ``every_state`` the other sequences are what the next step receives.
        skip: with k, the output of k steps before is added to h, :math:`h_t = f(x_t, h_{t-1}) + h_{t-k}`, and zero before there is one;
            of a cell that reads a delayed state d itself, what k is.
        clip_grad: with c > 0, backward clamps :math:`\partial L / \partial h_t` to [-c, c] at every step; with ``variational``,
            ``recurrent_dropout`` or ``reset`` that part of it which comes back through :math:`W_{hh}`.
        heads: with n, ``weight_hh`` is ``[G*H, H/n]`` and the recurrence block-diagonal: unit u of a gate sees the units of its head only,
            H/n in a row. The CPU's kernels multiply blocks where H/n fills vectors; elsewhere the matrix is made dense for the call.
        recompute: with k, keep the states of one step in k for backward, and compute the others again.

    Returns:
        outputs ``[T, B, R]`` (``[N, R]``; with ``every_state`` a tuple of S such tensors) and the tuple of S final states.

    Raises:
        RuntimeError: shapes or devices do not fit together, or ``backend`` cannot run this call.
        ValueError: an unknown cell or backend, mixed dtypes, zero sizes, both ``lengths`` and ``batch_sizes``, a probability outside
            of [0, 1], options that exclude one another.
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
        >>> y, _ = gk.ops.recurrent(x, w_hh, weight_ih=w_ih, zoneout=(0.1, 0.05), reset=torch.rand(7, 2) < 0.1, recompute=3)
    """
    c = cells.CELLS.get(cell) if type(cell) is str else cell
    if not isinstance(c, cells.Cell):
        c = cells.get(cell)  # its error names the registry
    tensors = x, weight_ih, bias_ih, weight_hh, bias_hh, weight_hr
    name = cell if type(cell) is str else None
    drops = zoneout or recurrent_dropout or variational or weight_drop
    if not (drops or noise or c.M or skip or c.D or clip_grad or recompute) and heads == 1 and reset is None:
        extra = PLAIN if params is None else Extra(params)
        return call(c, name, tensors, state, batch_sizes, lengths, reverse, probe, every_state, backend, extra)
    given = Call(tensors, params, state, batch_sizes, lengths, reverse, probe, every_state, backend)
    options = (
        training, zoneout, recurrent_dropout, variational, weight_drop, noise, seed, reset, skip, clip_grad, heads, recompute
    )  # fmt: skip
    return run(c, name, given, Options(*options))
