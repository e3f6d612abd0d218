"""Groups of units on clocks of their own: the slow ones take few steps, and what they do not compute costs nothing.

Dims: T steps, B batch, N packed tokens, I input features, H hidden units of all groups, n groups, S states of the cell.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from gradkernels import cells
from gradkernels.nn.any_cell import Recurrent


class MultiScaleRNN(nn.Module):
    """n groups of H / n units each; group j takes a step when t is a multiple of periods[j], and holds its states in between.

    MultiScaleRNN(cell, input_size, hidden_size, periods=(1, 2, 4, 8), bias=True, batch_first=False, device=None, dtype=None,
    backend=None, **options)

    A group reads x_t and the outputs that all slower groups held at t - 1; information goes from the slow to the fast, as in the
    clockwork RNN of Koutnik et al. (2014), whose groups are one plain RNN with a block-triangular matrix. Each group is a layer
    `groups[j]`, a Recurrent of that cell on every periods[j]-th step: one fused call on T / periods[j] steps. Options are those of
    Recurrent from zoneout to recompute: a group is one layer in one direction.

    forward(input, hx=None, lengths=None): input [T, B, I], [B, T, I] if batch_first, [T, I], or packed; outputs [.., H], the groups
    side by side as periods has them. hx and the final states: [1, B, H] for each state of the cell, [1, H] unbatched, a tuple
    unless there is one. Clocks start anew with every call: carry states over windows whose length all periods divide.

    ValueError if n does not divide hidden_size, or a period is not positive or comes twice; TypeError of another option.

    >>> layer = MultiScaleRNN("gru", 3, 8, periods=(1, 4))
    >>> y, h = layer(torch.randn(9, 2, 3))
    >>> y.shape, h.shape, torch.equal(y[4, :, 4:], y[7, :, 4:]), torch.equal(y[4, :, 4:], y[8, :, 4:])
    (torch.Size([9, 2, 8]), torch.Size([1, 2, 8]), True, False)
    """

    def __init__(
        self,
        cell: str | cells.Cell,
        input_size: int,
        hidden_size: int,
        periods: Sequence[int] = (1, 2, 4, 8),
        bias: bool = True,
        batch_first: bool = False,
        device: Any = None,
        dtype: Any = None,
        backend: str | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        self.input_size, self.hidden_size, self.batch_first = input_size, hidden_size, batch_first
        self.periods = tuple(periods) if isinstance(periods, Sequence) else ()
        n = len(self.periods)
        if n == 0 or any(not isinstance(p, int) or p < 1 for p in self.periods) or len(set(self.periods)) < n:
            raise ValueError(f"periods must be different positive numbers of steps, got {periods!r}")
        for name in ("num_layers", "dropout", "bidirectional", "proj_size", "stateful"):
            if name in options:
                raise TypeError(f"MultiScaleRNN has no {name}: a group is one layer in one direction")
        if hidden_size % n:
            raise ValueError(f"hidden_size must be a multiple of the number of groups {n}, got {hidden_size}")
        units, kwargs = (
            hidden_size // n,
            {"bias": bias, "device": device, "dtype": dtype, "backend": backend, **options},
        )
        widths = [input_size + units * sum(q > p for q in self.periods) for p in self.periods]
        self.groups = nn.ModuleList(Recurrent(cell, width, units, **kwargs) for width in widths)

    def forward(
        self, input: Tensor | PackedSequence, hx: Any = None, lengths: Tensor | None = None
    ) -> tuple[Any, Tensor | tuple[Tensor, ...]]:
        if isinstance(input, PackedSequence):
            if lengths is not None:
                raise ValueError("lengths cannot be given with a PackedSequence, which has its own")
            x, lengths = pad_packed_sequence(input)
            y, final = self._walk(x, hx, lengths)
            return pack_padded_sequence(y, lengths, enforce_sorted=input.sorted_indices is None), final
        if input.dim() not in (2, 3):
            raise ValueError(f"MultiScaleRNN: Expected input to be 2D or 3D, got {input.dim()}D instead")
        if input.dim() == 2:
            if lengths is not None:
                raise ValueError("lengths cannot be given with unbatched 2-D input")
            each = lambda v, f: f(v) if isinstance(v, Tensor) else tuple(map(f, v))
            hx = None if hx is None else each(hx, lambda h: h.unsqueeze(1))
            y, final = self._walk(input.unsqueeze(1), hx, None)
            return y.squeeze(1), each(final, lambda h: h.squeeze(1))
        y, final = self._walk(input.transpose(0, 1) if self.batch_first else input, hx, lengths)
        return y.transpose(0, 1) if self.batch_first else y, final

    def _walk(self, x: Tensor, hx: Any, lengths: Tensor | None) -> tuple[Tensor, Tensor | tuple[Tensor, ...]]:
        """x [T, B, I] -> outputs [T, B, H], final states [1, B, H]; the slowest group first."""
        T, B, I = x.shape
        if self.input_size != I:
            raise RuntimeError(
                f"input.size(-1) must be equal to input_size. Expected {self.input_size}, got {I}: {list(x.shape)}"
            )
        if T == 0:
            raise RuntimeError("Expected sequence length to be larger than 0 in RNN")
        given = None if hx is None else (hx,) if isinstance(hx, Tensor) else tuple(hx)
        n = len(self.periods)
        for k, h in enumerate(given or ()):
            if h.shape != (1, B, self.hidden_size):
                raise RuntimeError(f"Expected hidden[{k}] size {(1, B, self.hidden_size)}, got {list(h.shape)}")
        parts = None if given is None else list(zip(*[h.chunk(n, -1) for h in given]))
        units, time = self.hidden_size // n, torch.arange(T, device=x.device)
        outputs: dict[int, Tensor] = {}
        finals: dict[int, tuple[Tensor, ...]] = {}
        slower: list[Tensor] = []  # what each slower group held at t - 1
        for p in sorted(self.periods, reverse=True):
            j = self.periods.index(p)
            state = None if parts is None else parts[j] if len(parts[j]) > 1 else parts[j][0]
            steps = None if lengths is None else (lengths + p - 1).div(p, rounding_mode="floor")
            y, final = self.groups[j](torch.cat([x, *slower], -1)[::p], state, steps)
            outputs[j], finals[j] = y[time // p], final if isinstance(final, tuple) else (final,)
            before = x.new_zeros(1, B, units) if parts is None else parts[j][0].to(y.dtype)
            slower.append(torch.cat([before, outputs[j][:-1]]))
        y = torch.cat([outputs[j] for j in range(n)], -1)
        if lengths is not None:  # a group holds what it has beyond the end of a row, too
            y = y.masked_fill((time.unsqueeze(1) >= lengths.to(x.device)).unsqueeze(2), 0)
        last = tuple(torch.cat(h, -1) for h in zip(*(finals[j] for j in range(n))))
        return y, last if len(last) > 1 else last[0]

    def extra_repr(self) -> str:
        return (
            f"{self.input_size}, {self.hidden_size}, periods={self.periods}" + ", batch_first=True" * self.batch_first
        )
