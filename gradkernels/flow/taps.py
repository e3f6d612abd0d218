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
from torch.autograd import forward_ad
from torch.autograd.function import Function

from gradkernels.ops._recurrent_taps import fit, squares

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
        found = squares(g.detach(), batch_sizes, ctx.time)
        return g, fit(torch.stack([found, torch.ones_like(found)], 1), ctx.shape), None, None


class Receive(Function):
    """x, unchanged, and a zero that `Send` hands a gradient back through: the entrance of a block.

    The gradient of `probe` [4] is |g|^2 of the entrance, nothing for the exit, then of the two paths that g is the sum of:
    the residual one and the sublayer's. What `Send` handed back is the one of them that `residual` says; of the residual one, which
    is the gradient of the exit, `Send` has the square.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, probe: Tensor, residual: bool) -> tuple[Tensor, Tensor]:
        ctx.residual = residual
        ctx.set_materialize_grads(False)
        return x.detach(), x.new_zeros(()).expand(x.shape)

    @staticmethod
    def backward(ctx: Any, g: Tensor | None, path: Tensor | None) -> Any:
        if g is None:
            return None, None, None
        here = there = None
        if path is not None:
            other = g.detach() - path.detach()
            here, there = (None, other) if ctx.residual else (other, path)
        return g, squared(g, None, here, there), None


class Send(Function):
    """x, unchanged; its gradient is also that of `path`, the zero of `Receive`, and its square the exit's in `probe` [4], and with
    both the residual path's."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, path: Tensor | None, probe: Tensor | None) -> Tensor:
        ctx.path = None if path is None else (path.dtype, path.shape)
        return x.detach()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        found = None
        if ctx.needs_input_grad[2]:
            found = squared(None, g, None if ctx.path is None else g, None)
        return g, None if ctx.path is None else g.to(ctx.path[0]).reshape(ctx.path[1]), found


def squared(*parts: Tensor | None) -> Tensor:
    """The squared norm of each in float64, 0 of None.

    For that torch makes a copy in float64 on a CPU, which takes ten times as long as float32 does; that is enough where it comes nowhere
    near the ends of its range.
    """
    parts = tuple(v if v is None else v.detach() for v in parts)
    some = next(v for v in parts if v is not None)
    if some.device.type == "cpu" and some.dtype == torch.float32 and not torch.compiler.is_compiling():
        flat = [v if v is None else v.reshape(-1) for v in parts]
        found = [None if v is None else torch.dot(v, v).item() for v in flat]
        if all(s is None or 1e-20 < s < 1e30 for s in found):
            return torch.tensor([s or 0.0 for s in found], dtype=torch.double)
    norm = lambda v: torch.linalg.vector_norm(v, dtype=torch.double).square()
    return torch.stack([some.new_zeros((), dtype=torch.double) if v is None else norm(v) for v in parts])


def listening() -> bool:
    """Autograd, and nothing else, records what runs now."""
    return (
        torch.is_grad_enabled()
        and (torch.compiler.is_compiling() or forward_ad._current_level < 0)
        and not torch._C._are_functorch_transforms_active()
    )


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
