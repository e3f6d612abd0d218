"""Dilated causal convolution of tokens as a module."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from gradkernels.ops import causal_conv1d


class CausalConv1d(nn.Module):
    """Convolves tokens with taps that lie ``dilation`` apart and never look ahead; see :func:`gradkernels.ops.causal_conv1d`.

    ``weight`` and ``bias`` are those of ``torch.nn.Conv1d(in_channels, out_channels, kernel_size)``, whose ``state_dict`` loads;
    tokens come as rows of channels, ``[B, T, in_channels]``, or ``[T, in_channels]`` without a batch.

    ``step`` takes tokens one after the other, or several at a time, with the same numbers: what the taps still need of the
    past is handed in and out.

    Args:
        in_channels, out_channels: width of a token, before and after.
        kernel_size: number of taps.
        dilation: distance of the taps, in tokens.
        bias: learn one.

    Example:
        >>> import torch, gradkernels as gk
        >>> conv = gk.nn.CausalConv1d(3, 4, kernel_size=2, dilation=2)
        >>> x = torch.randn(2, 6, 3)
        >>> whole, past, parts = conv(x), None, []
        >>> for token in x.split(1, dim=1):
        ...     y, past = conv.step(token, past)
        ...     parts.append(y)
        >>> torch.allclose(torch.cat(parts, 1), whole, atol=1e-6)
        True
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        dilation: int = 1,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        for name, n in (
            ("in_channels", in_channels),
            ("out_channels", out_channels),
            ("kernel_size", kernel_size),
            ("dilation", dilation),
        ):
            if n < 1:
                raise ValueError(f"{name} must be at least 1, got {n}")
        self.in_channels, self.out_channels, self.kernel_size = in_channels, out_channels, kernel_size
        self.dilation = dilation
        self.weight = nn.Parameter(torch.empty(out_channels, in_channels, kernel_size, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(out_channels, device=device, dtype=dtype)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As ``torch.nn.Conv1d`` does."""
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        if self.bias is not None:
            bound = 1 / math.sqrt(self.in_channels * self.kernel_size)
            nn.init.uniform_(self.bias, -bound, bound)

    def extra_repr(self) -> str:
        more = f", dilation={self.dilation}" * (self.dilation > 1) + ", bias=False" * (self.bias is None)
        return f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}{more}"

    @property
    def memory(self) -> int:
        """Tokens of the past that the next one depends on."""
        return (self.kernel_size - 1) * self.dilation

    def forward(self, input: Tensor) -> Tensor:
        if input.dim() == 2:
            return self.forward(input.unsqueeze(0)).squeeze(0)
        return causal_conv1d(input, self.weight, self.bias, self.dilation)

    def step(self, input: Tensor, past: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The next tokens, ``[B, n, in_channels]``, and the last ``memory`` tokens before them (None: there were none) -> what
        comes out for them, and the past for the next call."""
        if past is None:
            past = input.new_zeros(input.shape[0], self.memory, self.in_channels)
        if past.shape != (input.shape[0], self.memory, self.in_channels):
            raise RuntimeError(
                f"past must be {[input.shape[0], self.memory, self.in_channels]} beside input {list(input.shape)}, "
                f"got {list(past.shape)}"
            )
        x = torch.cat([past, input], 1)
        return self.forward(x)[:, self.memory :], x[:, x.shape[1] - self.memory :]
