"""The linear maps inside of layers, and when a submodule may be taken for what its class says."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.modules.module import _has_any_global_hook

from gradkernels.backends import cpu
from gradkernels.nn.norm import LayerNorm
from gradkernels.ops import causal_conv1d
from gradkernels.ops._recurrent_op import plain

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
KNOWN = (LayerNorm, nn.LayerNorm, nn.Linear, NonDynamicallyQuantizableLinear, nn.Dropout, nn.ReLU, nn.GELU)
MANY = 128  # tokens for which packing weights pays


def bare(*modules: nn.Module) -> bool:
    """Calling these modules does what their classes say and nothing else: nobody listens, and nobody put others in their place."""
    return not _has_any_global_hook() and all(
        type(m) in KNOWN and not any(getattr(m, hooks) for hooks in HOOKS) and "forward" not in m.__dict__
        for m in modules
    )


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """F.linear; where MKL is at half of what the machine can do, a convolution with one tap by our own kernels."""
    if not _ours(x, weight, bias):
        return F.linear(x, weight, bias)
    y = causal_conv1d(x.reshape(1, -1, x.shape[-1]), weight.unsqueeze(2), bias)
    return y.view(*x.shape[:-1], weight.shape[0])


def applied(module: Any, x: Tensor) -> Tensor:
    """module(x), of a linear map."""
    return linear(x, module.weight, module.bias) if bare(module) else module(x)


def _ours(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Many tokens of float32, in eager code."""
    if torch.compiler.is_compiling() or torch._C._is_tracing() or torch._C._are_functorch_transforms_active():
        return False
    if x.device.type != "cpu" or torch._C._is_any_autocast_enabled() or not plain((x, weight, bias)):
        return False
    if any(v is not None and v.dtype != torch.float32 for v in (x, weight, bias)):
        return False
    fits = weight.dim() == 2 and x.shape[-1:] == weight.shape[1:] and (bias is None or bias.shape == weight.shape[:1])
    return fits and x.numel() >= MANY * x.shape[-1] > 0 and weight.numel() > 0 and cpu.outruns_mkl()
