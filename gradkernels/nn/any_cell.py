"""Layers of any cell, and what may surround it: the regularisers, resets, heads and windows of `ops.recurrent`.

Dims: T steps, B batch, N packed tokens, I input features, H hidden units, S states of the cell.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from gradkernels import cells
from gradkernels.nn.recurrent import RNNBase
from gradkernels.ops._recurrent_options import Options, check_options

OFF = {
    "zoneout": 0,
    "recurrent_dropout": 0,
    "variational": 0,
    "weight_drop": 0,
    "noise": (),
    "skip": 0,
    "clip_grad": 0,
    "heads": 1,
    "recompute": 0,
}


class Recurrent(RNNBase):
    """Layers of any registered cell, by name, or of a Cell, shaped like torch.nn.LSTM.

    Recurrent(cell, input_size, hidden_size, num_layers=1, bias=True, batch_first=False, dropout=0.0, bidirectional=False,
    proj_size=0, device=None, dtype=None, backend=None, *, zoneout=0, recurrent_dropout=0, variational=0, weight_drop=0, noise=(),
    skip=0, clip_grad=0, heads=1, recompute=0, stateful=False)

    Parameters have torch's names and shapes, G gates stacked in weight_ih [G*H, I], weight_hh [G*H, R]; Recurrent("lstm", ...) loads
    and saves the state_dict of torch.nn.LSTM. A cell's parameters per unit are added by the names that it gives them, as
    gain_x_l0 [4, H]. A cell without a recurrent product has no bias_hh, and nothing in weight_hh.

    What follows `*` is described at `ops.recurrent`; masks are drawn in training mode, and each layer and direction draws its own.
    zoneout=(0.1, 0.05) is of h, c; weight_drop is that of AWD-LSTM; with n heads weight_hh is [G*H, H/n].

    forward(input, hx=None, lengths=None, reset=None): lengths as in LSTM; reset, bool [T, B] ([B, T] if batch_first, [T] unbatched, as
    input when packed), begins anew before that step. States go in and come out as a tuple if the cell has several, else as one
    tensor.

    stateful: the final states, detached, are where the next call begins that is given none: truncated backpropagation through time.
    They are not in the state_dict; `reset_state()` forgets them, and a batch of another size has to.

    ValueError if there is no such cell, or an option is not of its range; TypeError if it is no number.

    >>> layer = Recurrent("gru_reset_before", 3, 5, bidirectional=True)
    >>> y, h = layer(torch.randn(7, 4, 3))
    >>> y.shape, h.shape
    (torch.Size([7, 4, 10]), torch.Size([2, 4, 5]))
    >>> Recurrent("lstm_layer_norm", 3, 5, zoneout=(0.1, 0.05), variational=0.25)
    Recurrent('lstm_layer_norm', 3, 5, zoneout=(0.1, 0.05), variational=0.25)
    """

    stateful = False
    carried: tuple[Tensor, ...] | None = None
    options: dict[str, Any]  # arguments of `ops.recurrent` that are not off

    def __init__(
        self,
        cell: str | cells.Cell,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,
        device: Any = None,
        dtype: Any = None,
        backend: str | None = None,
        *,
        zoneout: float | Sequence[float] = 0,
        recurrent_dropout: float = 0,
        variational: float = 0,
        weight_drop: float = 0,
        noise: Sequence[tuple[float, float, str]] = (),
        skip: int = 0,
        clip_grad: float = 0,
        heads: int = 1,
        recompute: int = 0,
        stateful: bool = False,
    ) -> None:
        super().__init__(
            cell,
            input_size,
            hidden_size,
            num_layers,
            bias,
            batch_first,
            dropout,
            bidirectional,
            proj_size,
            device,
            dtype,
            backend=backend,
        )
        c = self.unlisted or cells.CELLS[self.cell]
        given = (zoneout, recurrent_dropout, variational, weight_drop, noise, skip, clip_grad, heads, recompute)
        # what is off is not kept: calls without options cost nothing more
        self.options = {k: v for (k, off), v in zip(OFF.items(), given) if v != off}
        check_options(c, Options(**self.options))
        if heads > 1:
            if not c.recurrent:
                raise ValueError(f"heads={heads} share a recurrent product, which {c.name} has not")
            if proj_size:
                raise ValueError(
                    f"heads={heads} share a recurrent product without projection, got proj_size={proj_size}"
                )
            if hidden_size % heads:
                raise ValueError(f"heads={heads} need a hidden_size that they divide, got {hidden_size}")
        self.stateful = bool(stateful)
        if heads > 1 or not c.recurrent or c.P:
            for k in range(len(self._all_weights)):
                self._fit(k, c, heads)
            self.reset_parameters()

    def _fit(self, k: int, c: cells.Cell, heads: int) -> None:
        """Parameters of layer and direction k as the cell and the heads have them."""
        suffix = self._suffix(k)
        name = f"weight_hh{suffix}"
        w, H = getattr(self, name), self.hidden_size
        if heads > 1 or not c.recurrent:
            setattr(self, name, nn.Parameter(w.new_empty(w.shape[0], H // heads if c.recurrent else 0)))
        if not c.recurrent and self.bias:
            self.register_parameter(f"bias_hh{suffix}", None)
        for text, count, _ in c.params:
            p = nn.Parameter(w.new_empty(*([count] if count > 1 else []), H))
            self.register_parameter(f"{text}{suffix}", p)

    def _suffix(self, k: int) -> str:
        return self._all_weights[k][0].removeprefix("weight_ih")

    def reset_parameters(self) -> None:
        """As torch has it, uniform in +-1 / sqrt(hidden_size); parameters of the cell as the cell says."""
        super().reset_parameters()
        if "options" not in self.__dict__:  # torch's constructor comes too early
            return
        for k in range(len(self._all_weights)):
            for text, _, value in (self.unlisted or cells.CELLS[self.cell]).params:
                if value is not None:
                    nn.init.constant_(getattr(self, f"{text}{self._suffix(k)}"), value)

    def _around(self, k: int, reset: Tensor | None) -> dict[str, Any]:
        c, more = self.unlisted or cells.CELLS[self.cell], dict(self.options)
        if c.params:
            suffix = self._suffix(k)
            parts = [getattr(self, f"{text}{suffix}") for text, _, _ in c.params]
            more["params"] = torch.cat([p.unsqueeze(0) if p.dim() == 1 else p for p in parts])
        if self.options or reset is not None:
            more |= {"training": self.training, "reset": reset}
        return more

    def forward(  # type: ignore[override]  # one argument more
        self,
        input: Tensor | PackedSequence,
        hx: Any = None,
        lengths: Tensor | None = None,
        reset: Tensor | PackedSequence | None = None,
    ) -> tuple[Any, Tensor | tuple[Tensor, ...]]:
        if isinstance(reset, PackedSequence):
            reset = reset.data
        elif reset is not None and not isinstance(input, PackedSequence):
            if not isinstance(reset, Tensor):
                raise TypeError(f"reset must be a tensor, got {type(reset).__name__}")
            if reset.shape != input.shape[:-1]:
                raise RuntimeError(f"reset must have shape {list(input.shape[:-1])}, got {list(reset.shape)}")
            reset = reset.unsqueeze(1) if input.dim() == 2 else reset.t() if self.batch_first else reset
        if self.stateful and hx is None and self.carried is not None:
            hx = self._left_behind(input, self.carried)
        y, final = self._forward(input, hx, lengths, reset)
        if self.stateful:
            # copies: what is done to the states that are returned is not done to these, and a graph may keep them
            self.carried = tuple(h.detach().clone() for h in (final if isinstance(final, tuple) else (final,)))
        return y, final

    def _left_behind(self, input: Tensor | PackedSequence, states: tuple[Tensor, ...]) -> Any:
        """States of the last call as hx."""
        if isinstance(input, PackedSequence):
            rank, batch = 3, int(input.batch_sizes[0])
        else:
            rank, batch = input.dim(), input.shape[0 if self.batch_first else 1]
        h = states[0]
        if rank in (2, 3) and (h.dim() != rank or (rank == 3 and h.shape[1] != batch)):
            what = f"a batch of {h.shape[1]}" if h.dim() == 3 else "a sequence without a batch"
            raise RuntimeError(
                f"the last call left states of {what} behind, and now comes "
                f"{f'one of {batch}' if rank == 3 else 'a sequence without a batch'}: call reset_state() first"
            )
        return states if len(states) > 1 else h

    def reset_state(self) -> None:
        """Forget the states that the last call left behind."""
        self.carried = None

    def _kind(self) -> str:
        return "Recurrent"

    def extra_repr(self) -> str:
        more = "".join(f", {k}={v!r}" for k, v in self.options.items())
        return f"{self.mode!r}, {super().extra_repr()}{more}{', stateful=True' * self.stateful}"


class SkipRNN(Recurrent):
    """A Recurrent layer whose output of k steps ago is added to h: h_t = f(x_t, h_{t-1}) + h_{t-k}, and zero before there is one.

    SkipRNN(cell, input_size, hidden_size, ..., *, skip, ...); arguments otherwise as of Recurrent. The gradient of the loss at step
    t reaches step 0 over a path of t / k additions, whatever the cell does to it. ValueError if skip < 1.

    Meant for cells whose output is bounded, such as RNNs and LSTMs: a GRU carries on most of its last state by itself, and with another
    one added to it states grow from step to step.

    The residual connections through time of Wang and Tian (2016); the skips of Zhang et al. (2016) are weighted ones.

    >>> layer = SkipRNN("rnn_tanh", 3, 5, skip=4)
    >>> y, h = layer(torch.randn(9, 2, 3))
    >>> y.shape, h.shape
    (torch.Size([9, 2, 5]), torch.Size([1, 2, 5]))
    """

    def __init__(self, cell: str | cells.Cell, *args: Any, skip: int, **kwargs: Any) -> None:
        if skip < 1:
            raise ValueError(f"skip must be at least 1, got {skip}")
        super().__init__(cell, *args, skip=skip, **kwargs)
