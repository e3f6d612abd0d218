"""A stack of dilated causal convolutions with gates, residual and skip paths."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradkernels.nn.conv import CausalConv1d
from gradkernels.nn.remake import remade, remaking


class GatedLayer(nn.Module):
    r"""One layer: :math:`z = \tanh(a) \cdot \sigma(b)` of a convolution's two halves a and b; what is added to the residual path
    and to the skip path are linear maps of z. The last layer of a stack has no residual path to add to."""

    def __init__(self, channels, skip_channels, kernel_size, dilation, last, bias, device, dtype):
        super().__init__()
        where = {"device": device, "dtype": dtype}
        self.channels, self.last = channels, last
        self.gates = CausalConv1d(channels, 2 * channels, kernel_size, dilation, bias, **where)
        self.paths = nn.Linear(channels, skip_channels + (0 if last else channels), bias, **where)

    def forward(
        self, x: Tensor, skip: Tensor | None, past: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """x [B, T, C], the sum of the skip path [B, T, S] so far -> both after this layer, and the past for the next tokens if one
        was given."""
        if past is None:
            v = self.gates(x)
        else:
            v, past = self.gates.step(x, past)
        a, b = v.chunk(2, -1)
        with remaking():
            v = self.paths(remade(torch.mul, a.tanh(), b.sigmoid()))
        if not self.last:
            branch, v = v.split((self.channels, v.shape[-1] - self.channels), -1)
            x = x + branch
        return x, v if skip is None else skip + v, past


class WaveNet(nn.Module):
    r"""A causal network over tokens whose reach into the past doubles from layer to layer.

    .. math::
        z_l = \tanh(a_l) \cdot \sigma(b_l), \quad (a_l, b_l) = \text{conv}_l(x_l), \quad x_{l+1} = x_l + W_l z_l, \qquad
        y = W'' \text{relu}(W' \text{relu}(\textstyle\sum_l V_l z_l))

    where x_0 is a causal convolution of the input. Gradients reach each layer by the skip path past all layers above it.

    Args:
        in_channels, out_channels: width of a token, before and after.
        channels: width of the residual path.
        skip_channels: width of the skip path; channels when None.
        kernel_size: taps of every convolution.
        dilations: of the layers, in turn.
        bias: learn biases.

    Shapes: ``[B, T, in_channels]`` to ``[B, T, out_channels]``, or ``[T, ...]`` without a batch. Output t depends on input
    ``t - receptive_field + 1`` to t.

    ``step`` takes tokens one after the other, or several at a time, with the same numbers, and remembers of the past what the
    taps still need.

    Raises:
        ValueError: a size or dilation below 1, or no layer.
        RuntimeError: shapes do not fit together.

    van den Oord et al. (2016).

    Example:
        >>> import torch, gradkernels as gk
        >>> net = gk.nn.WaveNet(3, 5, channels=8, dilations=(1, 2, 4)).eval()
        >>> x = torch.randn(2, 9, 3)
        >>> whole, past, parts = net(x), None, []
        >>> for token in x.split(1, dim=1):
        ...     y, past = net.step(token, past)
        ...     parts.append(y)
        >>> net.receptive_field, torch.allclose(torch.cat(parts, 1), whole, atol=1e-6)
        (9, True)
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        channels: int = 64,
        skip_channels: int | None = None,
        kernel_size: int = 2,
        dilations: Sequence[int] = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512),
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        skip_channels = channels if skip_channels is None else skip_channels
        for name, n in (("channels", channels), ("skip_channels", skip_channels), ("out_channels", out_channels)):
            if n < 1:
                raise ValueError(f"{name} must be at least 1, got {n}")
        if not dilations:
            raise ValueError("dilations must name at least one layer")
        where = {"device": device, "dtype": dtype}
        self.in_channels, self.out_channels = in_channels, out_channels
        self.input = CausalConv1d(in_channels, channels, kernel_size, bias=bias, device=device, dtype=dtype)
        last = len(dilations) - 1
        self.layers = nn.ModuleList(
            GatedLayer(channels, skip_channels, kernel_size, d, n == last, bias, **where)
            for n, d in enumerate(dilations)
        )
        self.hidden = nn.Linear(skip_channels, skip_channels, bias, **where)
        self.output = nn.Linear(skip_channels, out_channels, bias, **where)

    @property
    def receptive_field(self) -> int:
        """Tokens of the input that one of the output depends on."""
        return 1 + self.input.memory + sum(layer.gates.memory for layer in self.layers)

    def forward(self, input: Tensor) -> Tensor:
        if input.dim() == 2:
            return self.forward(input.unsqueeze(0)).squeeze(0)
        x, skip = self.input(input), None
        for layer in self.layers:
            x, skip, _ = layer(x, skip)
        return self._head(skip)

    def step(self, input: Tensor, past: Sequence[Tensor] | None = None) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The next tokens, ``[B, n, in_channels]``, and what the last call returned as the past (None: there was none) -> what
        comes out for them, and the past for the next call: the last inputs of every convolution."""
        convs = [self.input, *(layer.gates for layer in self.layers)]
        if past is None:
            past = [input.new_zeros(input.shape[0], conv.memory, conv.in_channels) for conv in convs]
        if len(past) != len(convs):
            raise RuntimeError(f"past must be {len(convs)} tensors, one per convolution, got {len(past)}")
        x, first = self.input.step(input, past[0])
        skip, after = None, [first]
        for layer, v in zip(self.layers, past[1:]):
            x, skip, v = layer(x, skip, v)
            after.append(v)
        return self._head(skip), tuple(after)

    def _head(self, skip):
        return self.output(F.relu(self.hidden(F.relu(skip))))
