"""How a monitor measures what kernels do not: identities whose backward leaves a sum of squares as the gradient of a leaf.

To autograd such a leaf is one more input. Squares add up, so what autograd does with gradients anyway, over micro-batches,
several calls of a module or recomputation, is right for them too; in float64 they reach as far down as the norms of float32.
No hook runs in backward.

Dims: T time steps.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import Function

from gradkernels.ops._recurrent_taps import fit
from gradkernels.ops._residual_taps import ENTRANCE, RESIDUAL, SUBLAYER, at
from gradkernels.ops._squares import squares, squares_of_steps

# ---------------------------------------------------------------- what autograd sees


class Tap(Function):
    """x, unchanged; the gradient of `probe` [steps, 2] is the squared norm of dL/dx_t, and 1 for every step that there is."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, probe: Tensor, time: int, batch_sizes: Tensor | None) -> Tensor:
        ctx.time, ctx.shape = time, probe.shape
        ctx.save_for_backward(batch_sizes)
        # no view in autograd's eyes: of a Function's view nobody may write in place
        return x.detach()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        (batch_sizes,) = ctx.saved_tensors
        found = squares_of_steps(g.detach(), batch_sizes, ctx.time)
        return g, fit(torch.stack([found, torch.ones_like(found)], 1), ctx.shape), None, None


class Receive(Function):
    """x, unchanged, and a zero that `Send` hands a gradient back through: the entrance of a block.

    The gradient is the sum of two paths'. What `Send` handed back is that of the residual one, or of the sublayer's; the rest, and the
    entrance, are told to `probe`, as in `gradkernels.ops._residual_taps`.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, probe: Tensor, residual: bool) -> tuple[Tensor, Tensor]:
        ctx.other = SUBLAYER if residual else RESIDUAL
        ctx.set_materialize_grads(False)
        return x.detach(), x.new_zeros(()).expand(x.shape)

    @staticmethod
    def backward(ctx: Any, g: Tensor | None, path: Tensor | None) -> Any:
        if g is None:
            return None, None, None
        own = g.detach()
        found = at(ENTRANCE, squares(own))
        if path is not None:
            found = found + at(ctx.other, squares(own, less=path.detach()))
        return g, found, None


class Send(Function):
    """x, unchanged; its gradient is also that of `path`, the zero of `Receive`, and its square is at `place` in `probe`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, path: Tensor | None, probe: Tensor, place: int) -> Tensor:
        ctx.path, ctx.place = None if path is None else (path.dtype, path.shape), place
        return x.detach()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        back = None if ctx.path is None else g.to(ctx.path[0]).reshape(ctx.path[1])
        return g, back, at(ctx.place, squares(g.detach())), None


# ---------------------------------------------------------------- hooks


class Hook:
    """A forward hook that stays with the module it was put on: copies and pickles of the module get one that does nothing."""

    def __init__(self, call: Callable[..., Any]) -> None:
        self.call = call

    def __call__(self, *args: Any) -> Any:
        return self.call(*args)

    def __reduce__(self) -> Any:
        return _inert, ()


def _nothing(*args: Any) -> None:
    return None


def _inert() -> Callable[..., None]:
    return _nothing


def first_argument(args: tuple, kwargs: dict[str, Any]) -> tuple[Any, Callable[[Any], tuple[tuple, dict[str, Any]]]]:
    """A call's first argument, and the call with another one in its place, wherever it stands."""
    if args:
        first = args[0]
        # self-attention is called with one tensor three times, and looks whether it is one
        return first, lambda new: (tuple(new if v is first else v for v in args), kwargs)
    name = next(iter(kwargs))
    first = kwargs[name]
    return first, lambda new: (args, {k: new if v is first else v for k, v in kwargs.items()})
