"""norm(residual + dropout(x)): the joint between two layers of a residual stack, in one pass."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gradkernels.backends.reference.residual_norm import definition, summed
from gradkernels.ops._fused import Fused, draw_seed
from gradkernels.ops._fused_checks import check_device, check_dropout, wrong_shape
from gradkernels.ops._fused_functions import nothing

KINDS = ("layer", "rms")


def _check(x, residual, weight, bias, seed, p, eps, rms):
    """The arguments of the operator; `_check_types` comes before it in the public function."""
    dtype, shape = x.dtype, x.shape
    if not dtype.is_floating_point:
        raise TypeError(f"x must be floating point, got {dtype}")
    if not shape:
        raise RuntimeError("x must have at least one dimension, got a scalar")
    check_dropout(p, seed, "x", x)
    for name, v, want in (("residual", residual, shape), ("weight", weight, shape[-1:]), ("bias", bias, shape[-1:])):
        if v is None:
            continue
        if v.shape != want:
            wrong_shape(name, v, want, "x", x)
        check_device(name, v, "x", x)
        if v.dtype is not dtype and not (name != "residual" and _beside(v, x)):
            raise RuntimeError(f"{name} must have x's dtype {dtype}, got {v.dtype}")


def _beside(weight: Tensor, x: Tensor) -> bool:
    """A weight of another dtype than x that is as good: 16-bit values are multiplied in float32."""
    return weight.dtype is torch.float32 and x.dtype in (torch.float16, torch.bfloat16)


def _made(x, residual, weight, bias, seed, p, eps, rms):
    rows = math.prod(x.shape[:-1])  # Size.numel() would fix dynamic sizes
    computed = torch.float64 if x.dtype == torch.float64 else torch.float32
    s = x.shape if summed(residual, seed) else (0,)
    return (x.shape, x.dtype), (s, x.dtype), ((rows,), computed), ((rows,), computed)


def _fold(N, dims, tensors, options):
    """Rows of the mapped dimension are rows like the others, unless a weight or the seed is mapped, or dropout counts rows."""
    if any(d is not None for d in dims[2:]) or tensors[4] is not None:
        return None
    x, residual = (
        v if v is None else v.movedim(d, 0) if d is not None else v.expand(N, *v.shape)
        for v, d in zip(tensors[:2], dims)
    )

    def unfold(outputs):
        y, s, mean, rstd = outputs
        s = s if residual is not None else s.expand(N, 0)
        return (y, s, mean.unflatten(0, (N, -1)), rstd.unflatten(0, (N, -1))), (0, 0, 0, 0)

    return (x, residual, *tensors[2:]), unfold


def _saved(tensors, outputs):
    """The results know x and the residual by their sum alone, and so do derivatives of any order: the sum itself as a residual of
    nothing has the same, and nothing takes no memory."""
    (x, residual, *weights, seed), (_, s, *statistics) = tensors, outputs
    if summed(residual, seed):
        x, residual = s.new_zeros(()).expand(s.shape), s
    return x, residual, *weights, seed, nothing(x), s, *statistics


fused = Fused(
    "residual_norm",
    ("x", "residual?", "weight?", "bias?", "seed?"),
    {"p": "float", "eps": "float", "rms": "bool"},
    ("y", "sum"),
    ("mean", "rstd"),
    _check,
    _made,
    definition,
    shared=lambda tensors, options: {0: 1} if tensors[1] is not None and options["p"] == 0 else {},
    fold=_fold,
    saved=_saved,
    unread=("y",),
)


def residual_norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    dropout_p: float = 0.0,
    eps: float = 1e-5,
    kind: str = "layer",
    prenorm: bool = True,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Adds a residual to what dropout leaves of x, and normalises the sum over its last dimension.

    .. math::
        s = \text{residual} + \text{dropout}(x), \qquad
        y = \frac{s - \mathrm{E}[s]}{\sqrt{\mathrm{Var}[s] + \epsilon}} \cdot \text{weight} + \text{bias}

    With ``kind="rms"`` the mean is not taken away: :math:`y = s / \sqrt{\mathrm{E}[s^2] + \epsilon} \cdot \text{weight}`.

    Args:
        x: ``[.., N]``, floating point.
        residual: like x; None adds nothing.
        weight, bias: ``[N]``; None leaves them out. Of x's dtype, or float32 beside 16-bit x.
        dropout_p: probability with which a value of x is dropped. The mask is never stored: it is made of a seed that torch's
            generator draws, once a call, and of each value's place.
        eps: added to the variance.
        kind: "layer" (Ba, Kiros and Hinton, 2016) or "rms" (Zhang and Sennrich, 2019).
        prenorm: return the sum too, which a pre-norm stack hands on as its next residual.
        backend: "triton", "cpu" or "reference"; None takes the best that can run.

    Returns:
        ``(y, s)`` when ``prenorm``, else y; both of x's shape and dtype. s is rounded to x's dtype before it is normalised;
        statistics are in float32 (float64 for float64).

    Raises:
        RuntimeError: shapes, dtypes or devices do not fit together, or ``backend`` cannot run this call.
        ValueError: dropout_p outside [0, 1], an unknown kind or backend.
        TypeError: x is not a floating point tensor.

    Derivatives of any order, forward mode and ``torch.func`` pass through.

    Example:
        >>> import torch, gradkernels as gk
        >>> x, residual = torch.randn(2, 3, 8, requires_grad=True), torch.randn(2, 3, 8)
        >>> y, s = gk.ops.residual_norm(x, residual, torch.ones(8), torch.zeros(8))
        >>> torch.allclose(y, torch.nn.functional.layer_norm(x + residual, (8,)), atol=1e-6)
        True
    """
    _check_types(x, residual, weight, bias, dropout_p, kind)
    if torch._C._is_any_autocast_enabled() and torch.is_autocast_enabled(x.device.type):
        x, residual, weight, bias = _autocast(x, residual, weight, bias)
    rms = kind == "rms"
    _check(x, residual, weight, bias, None, dropout_p, eps, rms)
    seed = draw_seed(x) if dropout_p > 0 else None
    y, s = fused((x, residual, weight, bias, seed), {"p": dropout_p, "eps": eps, "rms": rms}, backend)
    return (y, s if summed(residual, seed) else x) if prenorm else y


def _autocast(x, residual, weight, bias):
    """As torch's layer_norm has it: in float32 on a GPU, as it comes on the CPU; two dtypes meet in the wider one, and weights
    follow x."""
    if residual is not None and residual.dtype != x.dtype:
        wide = torch.promote_types(x.dtype, residual.dtype)
        x, residual = x.to(wide), residual.to(wide)
    if x.device.type == "cuda" and x.dtype in (torch.float16, torch.bfloat16):
        x, residual = x.float(), None if residual is None else residual.float()
    weight, bias = (v if v is None or _beside(v, x) else v.to(x.dtype) for v in (weight, bias))
    return x, residual, weight, bias


def _check_types(x, residual, weight, bias, dropout_p, kind):
    if not isinstance(x, Tensor):
        raise TypeError(f"x must be a tensor, got {type(x).__name__}")
    for name, v in (("residual", residual), ("weight", weight), ("bias", bias)):
        if v is not None and not isinstance(v, Tensor):
            raise TypeError(f"{name} must be a tensor or None, got {type(v).__name__}")
    if not 0 <= dropout_p <= 1:
        raise ValueError(f"dropout_p must be between 0 and 1, got {dropout_p}")
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
