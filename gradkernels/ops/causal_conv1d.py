"""Dilated causal convolution of tokens, without padding and without turning them around."""

from __future__ import annotations

import torch
from torch import Tensor

from gradkernels.backends.reference.causal_conv1d import definition
from gradkernels.ops._fused import Fused
from gradkernels.ops._fused_checks import check_device
from gradkernels.ops._fused_functions import nothing


def _check(x, weight, bias, dilation):
    if not x.dtype.is_floating_point:
        raise TypeError(f"x must be floating point, got {x.dtype}")
    if x.dim() != 3:
        raise RuntimeError(f"x must be [B, T, C], got {list(x.shape)}")
    if weight.dim() != 3 or weight.shape[1] != x.shape[2] or 0 in weight.shape:
        raise RuntimeError(f"weight must be [O, {x.shape[2]}, K] beside x {list(x.shape)}, got {list(weight.shape)}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise RuntimeError(
            f"bias must be [{weight.shape[0]}] beside weight {list(weight.shape)}, got {list(bias.shape)}"
        )
    if dilation < 1:
        raise ValueError(f"dilation must be at least 1, got {dilation}")
    for name, v in (("weight", weight), ("bias", bias)):
        if v is None:
            continue
        check_device(name, v, "x", x)
        if v.dtype is not x.dtype:
            raise RuntimeError(f"{name} must have x's dtype {x.dtype}, got {v.dtype}")


def _made(x, weight, bias, dilation):
    return (((*x.shape[:2], weight.shape[0]), x.dtype),)


def _fold(N, dims, tensors, options):
    """The mapped dimension joins the batch where the weights are everybody's."""
    if dims[1] is not None or dims[2] is not None:
        return None
    x = tensors[0].movedim(dims[0], 0)
    return (x.flatten(0, 1), *tensors[1:]), lambda outputs: ((outputs[0].unflatten(0, (N, x.shape[1])),), (0,))


def _saved(tensors, outputs):
    """Backward does not look at y."""
    return *tensors, nothing(tensors[0])


fused = Fused(
    "causal_conv1d",
    ("x", "weight", "bias?"),
    {"dilation": "int"},
    ("y",),
    (),
    _check,
    _made,
    definition,
    fold=_fold,
    saved=_saved,
    unread=("y",),
)


def causal_conv1d(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, dilation: int = 1, backend: str | None = None
) -> Tensor:
    r"""Convolves tokens with taps that lie ``dilation`` apart and never look ahead.

    .. math::
        y_{b,t,o} = \text{bias}_o + \sum_{k=0}^{K-1} \sum_c \text{weight}_{o,c,k} \; x_{b,\, t - (K - 1 - k) \cdot \text{dilation},\, c}

    where x is zero before its first token: ``torch.nn.functional.conv1d`` of x padded by ``(K - 1) * dilation`` on the left,
    for tokens that come as rows of channels.

    Args:
        x: ``[B, T, C]``, floating point.
        weight: ``[O, C, K]``, as ``torch.nn.Conv1d`` has it.
        bias: ``[O]`` or None.
        dilation: distance of the taps, in tokens.
        backend: "triton", "cpu" or "reference"; None takes the best that can run.

    Returns:
        y ``[B, T, O]``.

    Raises:
        RuntimeError: shapes, dtypes or devices do not fit together, or ``backend`` cannot run this call.
        ValueError: dilation below 1, or an unknown backend.
        TypeError: an argument that is no tensor, or x not floating point.

    Derivatives of any order, forward mode and ``torch.func`` pass through. 16-bit tensors are summed in float32.

    The convolution of WaveNet (van den Oord et al., 2016).

    Example:
        >>> import torch, gradkernels as gk
        >>> x, weight = torch.randn(2, 9, 3), torch.randn(4, 3, 2)
        >>> y = gk.ops.causal_conv1d(x, weight, dilation=4)
        >>> padded = torch.nn.functional.pad(x.mT, (4, 0))
        >>> torch.allclose(y, torch.nn.functional.conv1d(padded, weight, dilation=4).mT, atol=1e-5)
        True
    """
    for name, v in (("x", x), ("weight", weight), ("bias", bias)):
        if not isinstance(v, Tensor) and (v is not None or name != "bias"):
            raise TypeError(f"{name} must be a tensor{' or None' * (name == 'bias')}, got {type(v).__name__}")
    if torch._C._is_any_autocast_enabled() and torch.is_autocast_enabled(x.device.type):
        low = torch.get_autocast_dtype(x.device.type)
        x, weight, bias = (v if v is None or v.dtype == torch.float64 else v.to(low) for v in (x, weight, bias))
    _check(x, weight, bias, dilation)
    return fused((x, weight, bias), {"dilation": dilation}, backend)[0]
