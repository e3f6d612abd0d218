"""Normalisation, and the block that adds what a sublayer makes of its input to the input itself."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from gradkernels.nn.remake import of, remade, remaking
from gradkernels.ops import residual_norm
from gradkernels.ops._residual_taps import Exit, Fork, listening
from gradkernels.ops.residual_norm import fused


class LayerNorm(nn.LayerNorm):
    """``torch.nn.LayerNorm``, by the kernels of :func:`gradkernels.ops.residual_norm`.

    Arguments, parameters and ``state_dict`` are torch's. Its gradients of weight and bias are summed in one order, whatever
    the number of threads.

    Example:
        >>> import torch, gradkernels as gk
        >>> norm = gk.nn.LayerNorm(8)
        >>> norm(torch.randn(2, 3, 8)).shape
        torch.Size([2, 3, 8])
    """

    def forward(self, input: Tensor) -> Tensor:
        k = len(self.normalized_shape)
        if tuple(input.shape[input.dim() - k :]) != tuple(self.normalized_shape) or input.dim() < k:
            raise RuntimeError(
                f"Given normalized_shape={list(self.normalized_shape)}, expected input with shape "
                f"[*, {', '.join(map(str, self.normalized_shape))}], but got input of size{list(input.shape)}"
            )
        if k == 1:  # as it is: three views less to make, and to go back through
            norm: Tensor = residual_norm(input, None, self.weight, self.bias, eps=self.eps, prenorm=False)
            return norm
        x = input.reshape(*input.shape[: input.dim() - k], math.prod(self.normalized_shape))
        weight, bias = (None if v is None else v.flatten() for v in (self.weight, self.bias))
        y: Tensor = residual_norm(x, None, weight, bias, eps=self.eps, prenorm=False)
        return y.view(input.shape)


class ResidualBlock(nn.Module):
    r"""A sublayer on a residual path, with dropout and normalisation: gradients reach the input past the sublayer too.

    .. math::
        \text{pre:}\quad  x + \text{dropout}(f(\text{norm}(x))) \qquad\qquad
        \text{post:}\quad \text{norm}(x + \text{dropout}(f(x)))

    Args:
        sublayer: any module from ``[.., d_model]`` to ``[.., d_model]``. Of a tuple, such as a recurrent layer returns, the
            first is taken.
        d_model: width of the last dimension.
        dropout: probability of dropout on what the sublayer returns, while training.
        norm: "pre" (He et al., 2016, as in GPT-2) or "post" (Vaswani et al., 2017).
        norm_kind: "layer" or "rms".
        eps: of the norm.

    Shapes: ``[.., d_model]`` in and out; further arguments of a call are the sublayer's. What goes into the sublayer is not kept for
    backward when it is a norm's result, but made again there; of the way out only the sum is kept.

    Raises:
        ValueError: an unknown norm or norm_kind, or dropout outside [0, 1].

    Example:
        >>> import torch, gradkernels as gk
        >>> block = gk.nn.ResidualBlock(gk.nn.GRU(8, 8), d_model=8, dropout=0.1)
        >>> block(torch.randn(5, 2, 8)).shape
        torch.Size([5, 2, 8])
    """

    probe: Tensor | None = None  # set by a monitor: a float64 leaf [4], see `ops._residual_taps`

    def __init__(
        self,
        sublayer: nn.Module,
        d_model: int,
        dropout: float = 0.1,
        norm: str = "pre",
        norm_kind: str = "layer",
        eps: float = 1e-5,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        if norm not in ("pre", "post"):
            raise ValueError(f"norm must be 'pre' or 'post', got {norm!r}")
        if norm_kind not in ("layer", "rms"):
            raise ValueError(f"norm_kind must be 'layer' or 'rms', got {norm_kind!r}")
        if not 0 <= dropout <= 1:
            raise ValueError(f"dropout must be between 0 and 1, got {dropout}")
        self.sublayer = sublayer
        self.d_model, self.dropout, self.norm, self.norm_kind, self.eps = d_model, dropout, norm, norm_kind, eps
        self.weight = nn.Parameter(torch.ones(d_model, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(d_model, device=device, dtype=dtype)) if norm_kind == "layer" else None

    def extra_repr(self) -> str:
        return f"{self.d_model}, dropout={self.dropout}, norm={self.norm!r}, norm_kind={self.norm_kind!r}"

    def forward(self, input: Tensor, *args, **kwargs) -> Tensor:
        return self._around(input, lambda x: self.sublayer(x, *args, **kwargs))

    def _around(self, input: Tensor, sublayer: Callable[[Tensor], Any]) -> Tensor:
        p, residual, probe = self.dropout if self.training else 0.0, input, self.probe
        if probe is not None and listening():
            if probe.device != input.device:
                probe = self.probe = torch.zeros_like(probe, device=input.device, requires_grad=True)
            residual, input = Fork.apply(input, probe)
        else:
            probe = None
        with remaking():
            if self.norm == "pre":
                norm = partial(normed, eps=self.eps, kind=self.norm_kind)
                out = sublayer(remade(norm, input, self.weight, self.bias))
                return added(out[0] if isinstance(out, tuple) else out, residual, p)
            out = sublayer(input)
            out = out[0] if isinstance(out, tuple) else out
            y = normed_sum(out, residual, self.weight, self.bias, p, self.eps, self.norm_kind)
            return y if probe is None else Exit.apply(y, probe)

    def __getstate__(self) -> dict[str, Any]:  # a monitor watches this object, not its copies
        return {k: v for k, v in self.__dict__.items() if k != "probe"}


def normed(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, kind: str = "layer") -> Tensor:
    """norm(x)"""
    y: Tensor = residual_norm(x, None, weight, bias, eps=eps, kind=kind, prenorm=False)
    return y


def added(x: Tensor, residual: Tensor, p: float) -> Tensor:
    """residual + dropout(x); the kernel that knows a place's factor without a stored mask is that of the norm."""
    return residual + x if p == 0 else residual_norm(x, residual, dropout_p=p)[1]


def normed_sum(
    x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, p: float, eps: float, kind: str = "layer"
) -> Tensor:
    """norm(residual + dropout(x)), for which the sum is kept."""
    y, s = residual_norm(x, residual, weight, bias, dropout_p=p, eps=eps, kind=kind)
    return of(y, partial(normed, eps=eps, kind=kind), s, weight, bias)


def dropped(x: Tensor, seed: Tensor, p: float) -> Tensor:
    """dropout(x) by a seed that was drawn before, and so the same whenever it is made."""
    s: Tensor = fused((x, None, None, None, seed), {"p": p, "eps": 1.0, "rms": True}, None)[1]
    return s
