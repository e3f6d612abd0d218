"""Single steps shaped like torch.nn's LSTMCell, GRUCell and RNNCell: sequences of length one on `ops.recurrent`.

Dims: B batch, I input features, H hidden units.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.rnn import RNNCellBase as TorchRNNCellBase

from gradkernels.nn.recurrent import leave_autocast
from gradkernels.ops import recurrent


class RNNCellBase(TorchRNNCellBase):
    """What the three have in common; parameters, their names and their initial values are torch's."""

    backend: str | None = None  # as in `ops.recurrent`
    kind = "RNNCell"  # not the name of the class, which wrappers change

    def __init__(self, *args: Any, num_chunks: int, backend: str | None = None, **kwargs: Any) -> None:
        super().__init__(*args, num_chunks=num_chunks, **kwargs)
        if backend is not None:
            self.backend = backend

    def _step(self, cell: str, x: Tensor, states: tuple[Tensor, ...] | None) -> tuple[Tensor, ...]:
        """x [B, I] or [I], states [B, H] or [H] -> new states of the same shape. Ranks have been looked at; here the sizes are."""
        rank = x.dim()
        if rank == 1:
            x = x.unsqueeze(0)
            if states is not None:
                states = tuple(h.unsqueeze(0) for h in states)
        batch, features = x.shape
        if features != self.input_size:
            raise RuntimeError(f"input has inconsistent input_size: got {features} expected {self.input_size}")
        if states is not None:
            want = (batch, self.hidden_size)
            for k, h in enumerate(states):
                if h.shape != want:
                    if h.shape[0] != batch:
                        raise RuntimeError(f"Input batch size {batch} doesn't match hidden{k} batch size {h.shape[0]}")
                    width = h.shape[1] if h.dim() > 1 else h.shape[0]
                    if width != self.hidden_size:
                        raise RuntimeError(
                            f"hidden{k} has inconsistent hidden_size: got {width}, expected {self.hidden_size}"
                        )
                    raise RuntimeError(f"hidden{k} must have one dimension for each of input's, got {list(h.shape)}")
        held = self._parameters
        try:
            w_ih, w_hh, b_ih, b_hh = held["weight_ih"], held["weight_hh"], held["bias_ih"], held["bias_hh"]
        except KeyError:  # parametrizations, pruning and wrappers keep some as attributes
            w_ih, w_hh, b_ih, b_hh = self.weight_ih, self.weight_hh, self.bias_ih, self.bias_hh
        _, new = recurrent(
            x.unsqueeze(0), w_hh, states, weight_ih=w_ih, bias_ih=b_ih, bias_hh=b_hh, cell=cell, backend=self.backend
        )
        if self.kind != "RNNCell" and torch._C._is_any_autocast_enabled():
            new = leave_autocast((x if states is None else states[0]).dtype, *new)
        return new if rank == 2 else tuple(h.squeeze(0) for h in new)

    def _check_rank(self, what: str, v: Tensor) -> None:
        if v.dim() not in (1, 2):
            raise ValueError(f"{self.kind}: Expected {what} to be 1D or 2D, got {v.dim()}D instead")

    def _one(self, cell: str, x: Tensor, hx: Tensor | None) -> Tensor:
        """A step of a cell with a single state."""
        self._check_rank("input", x)
        if hx is None:
            return self._step(cell, x, None)[0]
        self._check_rank("hidden", hx)
        return self._step(cell, x, (hx,))[0]

    def extra_repr(self) -> str:
        return super().extra_repr() + (f", backend={self.backend}" if self.backend else "")


class LSTMCell(RNNCellBase):
    """torch.nn.LSTMCell's arguments, parameters and results, with `backend=None`; one step of nn.LSTM.

    LSTMCell(input_size, hidden_size, bias=True, device=None, dtype=None, *, backend=None)

        i, f, g, o = sigmoid, sigmoid, tanh, sigmoid of W_ih x + b_ih + W_hh h + b_hh
        c' = f * c + i * g,    h' = o * tanh(c')

    forward(input, hx=None) -> (h', c'): input [B, I] or [I], states (h, c) [B, H] or [H], zeros when None; float32, float64, bfloat16 or float16, as
    the weights. Errors have torch's types and texts. ValueError: another number of dimensions, another dtype than the weights, a backend
    that there is not. RuntimeError: sizes that do not fit, other than two states, a backend that cannot run here. TypeError: hx is one tensor,
    input is of integers.

    >>> import torch
    >>> h, c = LSTMCell(3, 5)(torch.randn(4, 3))
    >>> h.shape, c.shape
    (torch.Size([4, 5]), torch.Size([4, 5]))
    """

    kind = "LSTMCell"

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        backend: str | None = None,
    ) -> None:
        super().__init__(input_size, hidden_size, bias, num_chunks=4, device=device, dtype=dtype, backend=backend)

    def forward(self, input: Tensor, hx: Any = None) -> tuple[Tensor, ...]:
        self._check_rank("input", input)  # torch looks at this first
        if hx is None:
            return self._step("lstm", input, None)
        for k, value in enumerate(hx):
            self._check_rank(f"hx[{k}]", value)
        if isinstance(hx, Tensor):
            raise TypeError("lstm_cell(): argument 'hx' (position 2) must be tuple of Tensors, not Tensor")
        if len(hx) != 2:
            raise RuntimeError("lstm_cell expects two hidden states")
        return self._step("lstm", input, tuple(hx))


class GRUCell(RNNCellBase):
    """torch.nn.GRUCell's arguments, parameters and results, with `reset_after=True` and `backend=None`; one step of nn.GRU.

    GRUCell(input_size, hidden_size, bias=True, device=None, dtype=None, *, reset_after=True, backend=None)

        r, z = sigmoid of W_ih x + b_ih + W_hh h + b_hh
        n = tanh(W_in x + b_in + r * (W_hn h + b_hn))      reset_after=True, torch's
        n = tanh(W_in x + b_in + W_hn (r * h) + b_hn)      reset_after=False, the original
        h' = (1 - z) * n + z * h

    forward(input, hx=None) -> h': input [B, I] or [I], hx [B, H] or [H]; dtypes and errors as in LSTMCell.

    >>> import torch
    >>> GRUCell(3, 5)(torch.randn(4, 3), torch.zeros(4, 5)).shape
    torch.Size([4, 5])
    """

    kind = "GRUCell"
    reset_after = True

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        reset_after: bool = True,
        backend: str | None = None,
    ) -> None:
        super().__init__(input_size, hidden_size, bias, num_chunks=3, device=device, dtype=dtype, backend=backend)
        if not reset_after:
            self.reset_after = False

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        return self._one("gru" if self.reset_after else "gru_reset_before", input, hx)

    def extra_repr(self) -> str:
        return super().extra_repr() + ("" if self.reset_after else ", reset_after=False")


class RNNCell(RNNCellBase):
    """torch.nn.RNNCell's arguments, parameters and results, with nonlinearity "sigmoid" too and `backend=None`; one step of nn.RNN.

    RNNCell(input_size, hidden_size, bias=True, nonlinearity="tanh", device=None, dtype=None, *, backend=None)

        h' = tanh(W_ih x + b_ih + W_hh h + b_hh)           (or relu, or sigmoid)

    forward(input, hx=None) -> h': input [B, I] or [I], hx [B, H] or [H]; dtypes and errors as in LSTMCell. RuntimeError, at the call as torch
    has it, if the nonlinearity is none of the three.

    >>> import torch
    >>> RNNCell(3, 5, nonlinearity="relu")(torch.randn(3)).shape
    torch.Size([5])
    """

    nonlinearity: str

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        nonlinearity: str = "tanh",
        device: Any = None,
        dtype: Any = None,
        *,
        backend: str | None = None,
    ) -> None:
        super().__init__(input_size, hidden_size, bias, num_chunks=1, device=device, dtype=dtype, backend=backend)
        self.nonlinearity = nonlinearity

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        if self.nonlinearity not in ("tanh", "relu", "sigmoid"):
            raise RuntimeError(f"Unknown nonlinearity: {self.nonlinearity}")
        return self._one(f"rnn_{self.nonlinearity}", input, hx)
