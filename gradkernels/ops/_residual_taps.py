"""How a block with a residual path tells of its gradient: identities whose backward leaves squared norms as the gradient of a leaf.

To autograd such a leaf is one more input. The gradient of `probe`, float64 [4], is

    |g|^2 at the entrance, of the residual path, of the sublayer's, and at the exit

Before a norm ("pre") the residual path is the identity: what it hands back is the gradient of the exit, whose place stays 0 then.
Squares add up, so what autograd does with gradients anyway, over micro-batches, several calls or recomputation, is right for them too.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.function import Function

from gradkernels.ops._squares import joined, squares

ENTRANCE, RESIDUAL, SUBLAYER, EXIT = range(4)


def listening() -> bool:
    """Autograd, and nothing else, records what runs now."""
    return (
        torch.is_grad_enabled()
        and (torch.compiler.is_compiling() or forward_ad._current_level < 0)
        and not torch._C._are_functorch_transforms_active()
    )


def at(place: int, square: Tensor) -> Tensor:
    """What a probe receives that has but one of its numbers."""
    return F.pad(square.reshape(1), (place, 3 - place))


class Fork(Function):
    """x twice, for the residual path and for the sublayer. What comes back is added up anyway; it is looked at on the way."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, probe: Tensor) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        # no views in autograd's eyes: of a Function's view nobody may write in place
        return x.detach(), x.detach()

    @staticmethod
    def backward(ctx: Any, residual: Tensor | None, sublayer: Tensor | None) -> Any:
        if residual is not None and sublayer is not None:
            norms = residual.new_zeros(4, dtype=torch.double)
            return joined(residual, sublayer, norms), norms
        g, place = (residual, RESIDUAL) if residual is not None else (sublayer, SUBLAYER)
        if g is None:
            return None, None
        square = squares(g.detach())
        return g, at(ENTRANCE, square) + at(place, square)


class Exit(Function):
    """x, unchanged."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, probe: Tensor) -> Tensor:
        return x.detach()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        return g, at(EXIT, squares(g.detach()))
