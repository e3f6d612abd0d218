"""Layers shaped like torch.nn's recurrent ones, on `ops.recurrent`.

One class carries the stack of layers and directions; LSTM, GRU and RNN only say which cell it is made of, and Recurrent, of any
cell, what surrounds it.
Dims: T steps, B batch, I input features, H hidden units, R = proj_size or H, S states of the cell.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from gradkernels import cells
from gradkernels.ops import recurrent

STAND_INS = {1: "RNN_TANH", 3: "GRU", 4: "LSTM"}  # number of gates -> a mode that torch's constructor knows
NAMES = {name.upper(): name for name in cells.CELLS}  # torch's modes, in their style -> cells: LSTM, GRU, RNN_TANH ...


class RNNBase(nn.RNNBase):
    """The stack of layers and directions around one cell.

    Torch's base class gives the constructor with its checks, the names and the order of the parameters, `reset_parameters`,
    `all_weights`, `check_input`, `check_hidden_size` and `repr`. It also keeps a list of the weights for cuDNN, which goes stale
    under parametrizations and breaks `deepcopy`; that list is computed here whenever somebody asks.
    """

    backend: str | None = None  # as in `ops.recurrent`; None is the best one that can run
    probes: list[Tensor] | None = None  # set by a monitor: one float64 leaf [steps, S + 1] per layer and direction
    unlisted: cells.Cell | None = None  # the cell, when no name leads to it

    def __init__(self, mode: str | cells.Cell, *args: Any, backend: str | None = None, **kwargs: Any) -> None:
        cell = cells.get(NAMES.get(mode, mode) if isinstance(mode, str) else mode)
        gates = cell.G
        super().__init__(STAND_INS.get(gates, "RNN_TANH"), *args, **kwargs)
        del self._flat_weight_refs
        self.mode = mode if isinstance(mode, str) else cell.name
        if cells.CELLS.get(self.cell) != cell:
            self.unlisted = cell
        if self.proj_size and not cell.projects:
            raise ValueError(f"proj_size needs a cell that uses h in its recurrent product only, not {cell.name}")
        if backend is not None:
            self.backend = backend
        if gates not in STAND_INS:
            for name in self._flat_weights_names:
                p = getattr(self, name)
                if "weight_hr" not in name:
                    setattr(self, name, nn.Parameter(p.new_empty(gates * p.shape[0], *p.shape[1:])))
            self.reset_parameters()

    @property
    def cell(self) -> str:
        """Name of the cell, as `gradkernels.cells` lists it."""
        return NAMES.get(self.mode, self.mode)

    @property
    def _flat_weights(self) -> list[Tensor | None]:
        return [getattr(self, name, None) for name in self._flat_weights_names]

    @_flat_weights.setter
    def _flat_weights(self, value: list[Tensor | None]) -> None:
        """Programs that replace weights by hand assign the list too; there is nothing to keep."""

    def _init_flat_weights(self) -> None:
        """Nothing is cached."""

    _update_flat_weights = flatten_parameters = _init_flat_weights

    __setattr__ = nn.Module.__setattr__

    def __getstate__(self) -> dict[str, Any]:  # a monitor watches this object, not its copies
        return {k: v for k, v in self.__dict__.items() if k != "probes"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        nn.Module.__setstate__(self, state)

    def _replicate_for_data_parallel(self) -> Any:
        return nn.Module._replicate_for_data_parallel(self)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        nn.Module._apply(self, fn, recurse)
        if self.probes is not None:
            device = getattr(self, self._all_weights[0][0]).device
            if self.probes[0].device != device:
                self.probes = [torch.zeros_like(p, device=device, requires_grad=True) for p in self.probes]
        return self

    def _weights(self, k: int) -> list[Tensor | None]:
        """weight_ih, weight_hh, bias_ih, bias_hh, weight_hr of layer and direction k, whatever put them there."""
        names, held = self._all_weights[k], self._parameters
        try:
            found = [held[name] for name in names]
        except KeyError:  # parametrizations, pruning and wrappers keep some as attributes; slower
            found = [getattr(self, name) for name in names]
        if len(found) < 4:
            found[2:2] = [None, None]
        if len(found) < 5:
            found.append(None)
        return found

    def _kind(self) -> str:  # not the name of the class, which FSDP and parametrizations change
        return self.mode.split("_")[0]

    def _wrong_rank(self, x: Tensor) -> ValueError:
        kind = self._kind()
        return ValueError(f"{kind}: Expected input to be 2D or 3D, got {x.dim()}D {'tensor ' * (kind == 'RNN')}instead")

    def _wrong_hidden_rank(self, states: tuple[Tensor, ...], batched: bool) -> RuntimeError:
        what, n = ("batched 3-D", 3) if batched else ("unbatched 2-D", 2)
        if len(states) == 1:
            got = f"hx should also be {n}-D but got {states[0].dim()}-D tensor"
        else:
            names = "hx and cx" if len(states) == 2 else "every tensor of hx"
            got = f"{names} should also be {n}-D but got ({', '.join(f'{h.dim()}-D' for h in states)}) tensors"
        return RuntimeError(f"For {what} input, {got}")

    def _states(self, hx: Any, S: int) -> tuple[Tensor, ...]:
        """hx as a tuple of S tensors."""
        if S == 1:
            return (hx,)
        if S == 2 and len(hx) < 3:
            return hx[0], hx[1]  # torch raises IndexError for a shorter one
        if len(hx) != S:
            wanted = "lstm expects two hidden states" if self._kind() == "LSTM" else f"{self.cell} expects {S} states"
            raise RuntimeError(f"{wanted}, got {len(hx)}")
        return tuple(hx)

    def _check_states(self, states: tuple[Tensor, ...], batch: int, x: Tensor) -> None:
        total, device, dtype = len(self._all_weights), x.device, x.dtype
        for k, h in enumerate(states):
            want = (total, batch, (not k and self.proj_size) or self.hidden_size)
            if h.shape != want:
                place = f"[{k}]" if len(states) > 1 else ""
                self.check_hidden_size(h, want, f"Expected hidden{place} size {{}}, got {{}}")
            if h.device != device:
                raise _apart(device, "hidden", h.device)
            if h.dtype != dtype and not torch._C._is_any_autocast_enabled():
                raise RuntimeError(
                    f"Input and hidden tensors are not the same dtype, found input tensor with {dtype} and hidden tensor with {h.dtype}"
                )

    def forward(
        self, input: Tensor | PackedSequence, hx: Any = None, lengths: Tensor | None = None
    ) -> tuple[Any, Tensor | tuple[Tensor, ...]]:
        return self._forward(input, hx, lengths)

    def _forward(self, input: Any, hx: Any, lengths: Tensor | None, reset: Any = None) -> tuple[Any, Any]:
        cell = self.unlisted or NAMES.get(self.mode, self.mode)
        S = (cells.CELLS[cell] if isinstance(cell, str) else cell).S
        first = self._weights(0)
        states = None if hx is None else self._states(hx, S)
        if isinstance(input, PackedSequence):
            if lengths is not None:
                raise ValueError("lengths cannot be given with a PackedSequence, which has its own")
            x, batch_sizes, order, back = input
            batched, zeros = True, None
            self._check(x, first[0], 2, batch_sizes)
            # order has the batch's size as its shape, which a graph can keep open
            batch = int(batch_sizes[0]) if order is None or not torch.compiler.is_compiling() else order.shape[0]
            if states is None:
                widths = [(not k and self.proj_size) or self.hidden_size for k in range(S)]
                zeros = [x.new_zeros(batch, w) for w in widths]
            else:
                self._check_states(states, batch, x)
                if order is not None:
                    states = tuple(h.index_select(1, order) for h in states)
        else:
            x, batch_sizes, zeros, rank = input, None, None, input.dim()
            batched = rank == 3
            if not batched:
                if rank != 2:
                    raise self._wrong_rank(x)
                if lengths is not None:
                    raise ValueError("lengths cannot be given with unbatched 2-D input")
                x = x.unsqueeze(1)
            elif self.batch_first:
                x = x.transpose(0, 1)
            if states is not None:
                for h in states:
                    if h.dim() != rank:
                        raise self._wrong_hidden_rank(states, batched)
                if not batched:
                    states = tuple([h.unsqueeze(1) for h in states])
            self._check(x, first[0], 3, None)
            shape = x.shape
            if states is not None:
                self._check_states(states, shape[1], x)
            if shape[0] == 0:
                raise RuntimeError("Expected sequence length to be larger than 0 in RNN")
        dtype = (x if states is None else states[0]).dtype
        x, final = self._run(x, states, zeros, cell, batch_sizes, lengths, reset, first=first)
        if self.mode.startswith("GRU") and torch._C._is_any_autocast_enabled():
            x, *final = leave_autocast(dtype, x, *final)
        if batch_sizes is not None:
            x = PackedSequence(x, batch_sizes, order, back)
            if back is not None:
                final = tuple(h.index_select(1, back) for h in final)
        elif not batched:
            x, final = x.squeeze(1), tuple(h.squeeze(1) for h in final)
        elif self.batch_first:
            x = x.transpose(0, 1)
        return x, final if S > 1 else final[0]

    def _check(self, x: Tensor, weight: Tensor, rank: int, batch_sizes: Tensor | None) -> None:
        if x.dtype != weight.dtype or x.dim() != rank or x.shape[-1] != self.input_size:
            self.check_input(x, batch_sizes)  # raises torch's own texts; lets other dtypes pass under autocast
        if x.device != weight.device:
            raise _apart(x.device, "parameter", weight.device)

    def _around(self, k: int, reset: Tensor | None) -> dict[str, Any]:
        """Further arguments of `ops.recurrent` for layer and direction k."""
        return {}

    def _one(self, k, x, state, cell, batch_sizes, lengths, reset, weights=None, reverse=False):
        """Layer and direction k: outputs, final states."""
        w_ih, w_hh, b_ih, b_hh, w_hr = weights or self._weights(k)
        probes = self.probes
        return recurrent(
            x,
            w_hh,
            state,
            weight_ih=w_ih,
            bias_ih=b_ih,
            bias_hh=b_hh,
            weight_hr=w_hr,
            cell=cell,
            lengths=lengths,
            batch_sizes=batch_sizes,
            reverse=reverse,
            probe=None if probes is None else probes[k],
            backend=self.backend,
            **self._around(k, reset),
        )

    def _run(self, x, states, zeros, *call, first):
        """All of them. x [T, B, I] or packed [N, I] -> outputs of the last layer, final states [layers * directions, B, R]."""
        total = len(self._all_weights)
        if total == 1:
            y, final = self._one(0, x, zeros if states is None else [h.squeeze(0) for h in states], *call, first)
            return y, tuple([h.unsqueeze(0) for h in final])
        # unbind and not select: the gradient is put together once, and not once per layer
        given = [zeros] * total if states is None else list(zip(*[h.unbind(0) for h in states]))
        last, directions = [], 2 if self.bidirectional else 1
        for k in range(0, total, directions):
            if k and self.dropout:
                x = F.dropout(x, self.dropout, self.training)
            # One direction after the other on a GPU too: blocks that wait for one another are known to be resident together only where
            # their kernel has the GPU to itself, and of two such kernels on two streams each might hold a part of it for good.
            outs = [self._one(j, x, given[j], *call, None if j else first, j > k) for j in range(k, k + directions)]
            last += [final for _, final in outs]
            x = outs[0][0] if directions == 1 else torch.cat([y for y, _ in outs], -1)
        return x, tuple([torch.stack(h) for h in zip(*last)])

    def extra_repr(self) -> str:
        return super().extra_repr() + (f", backend={self.backend}" if self.backend else "")


def leave_autocast(dtype: torch.dtype, *values: Tensor) -> tuple[Tensor, ...]:
    """On the CPU torch autocasts the products inside a GRU, a GRUCell and an LSTMCell, and adds to a state that keeps its dtype;
    an LSTM and an RNN come out in the lower one."""
    if values[0].device.type != "cpu":
        return values
    return tuple(v.to(dtype) for v in values)


def _apart(device: torch.device, what: str, other: torch.device) -> RuntimeError:
    return RuntimeError(
        f"Input and {what} tensors are not at the same device, found input tensor at {device} and {what} tensor at {other}"
    )


class LSTM(RNNBase):
    """torch.nn.LSTM's arguments, parameters and results, with `backend=None` and ragged batches without packing.

        i, f, g, o = sigmoid, sigmoid, tanh, sigmoid of W_ih x_t + b_ih + W_hh h_{t-1} + b_hh
        c_t = f * c_{t-1} + i * g,    h_t = o * tanh(c_t)    (then W_hr h_t, if proj_size > 0)

    LSTM(input_size, hidden_size, num_layers=1, bias=True, batch_first=False, dropout=0.0, bidirectional=False, proj_size=0,
    device=None, dtype=None, *, backend=None)

    forward(input, hx=None, lengths=None): `lengths`, int64 [B], in any order, each 0 to T, gives every row of a padded batch its own
    number of steps. Outputs beyond are 0, final states are those of each row's last step, and the reverse direction begins there:
    what a PackedSequence gives, inside a full graph and without sorting.

    Input [T, B, I], [B, T, I] with batch_first, [T, I] or packed, states [layers * directions, B, H] or without B; float32, float64, bfloat16 or
    float16, as the weights. Errors have torch's types and texts. ValueError: a size, dropout or backend that there is not, input of another
    number of dimensions or another dtype than the weights, lengths of a PackedSequence or without a batch. RuntimeError: sizes that do not fit,
    a sequence of no steps, lengths beyond T, a backend that cannot run here. TypeError: a size that is no int, lengths that are not int64.

    Hochreiter and Schmidhuber, Long short-term memory, 1997; forget gate: Gers, Schmidhuber and Cummins, 2000.

    >>> lstm = LSTM(3, 5, num_layers=2)
    >>> y, (h, c) = lstm(torch.randn(7, 4, 3), lengths=torch.tensor([7, 2, 0, 5]))
    >>> y.shape, h.shape, bool((y[2:, 1] == 0).all()), torch.equal(h[-1, 1], y[1, 1])
    (torch.Size([7, 4, 5]), torch.Size([2, 4, 5]), True, True)
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__("LSTM", *args, **kwargs)


class GRU(RNNBase):
    """torch.nn.GRU's arguments, parameters and results, with `reset_after=True`, `backend=None` and ragged batches.

        r, z = sigmoid of W_ih x_t + b_ih + W_hh h_{t-1} + b_hh
        n = tanh(W_in x_t + b_in + r * (W_hn h_{t-1} + b_hn))      reset_after=True, torch's
        n = tanh(W_in x_t + b_in + W_hn (r * h_{t-1}) + b_hn)      reset_after=False, the original
        h_t = (1 - z) * n + z * h_{t-1}

    GRU(input_size, hidden_size, num_layers=1, bias=True, batch_first=False, dropout=0.0, bidirectional=False, device=None,
    dtype=None, *, reset_after=True, backend=None); forward(input, hx=None, lengths=None) as in LSTM, with one state. Errors are those of LSTM, and
    ValueError if a proj_size is given.

    Cho et al., Learning phrase representations using RNN encoder-decoder, 2014.

    >>> y, h = GRU(3, 5, reset_after=False)(torch.randn(7, 4, 3))
    >>> y.shape, h.shape
    (torch.Size([7, 4, 5]), torch.Size([1, 4, 5]))
    """

    def __init__(self, *args: Any, reset_after: bool = True, **kwargs: Any) -> None:
        _refuse_projection(args, kwargs, 7)
        super().__init__("GRU" if reset_after else "GRU_RESET_BEFORE", *args, **kwargs)

    @property
    def reset_after(self) -> bool:
        """Whether the reset gate multiplies W_hn h rather than h."""
        return self.mode == "GRU"

    def extra_repr(self) -> str:
        return super().extra_repr() + ("" if self.reset_after else ", reset_after=False")


class RNN(RNNBase):
    """torch.nn.RNN's arguments, parameters and results, with nonlinearity "sigmoid" too, `backend=None` and ragged batches.

        h_t = tanh(W_ih x_t + b_ih + W_hh h_{t-1} + b_hh)          (or relu, or sigmoid)

    RNN(input_size, hidden_size, num_layers=1, nonlinearity="tanh", bias=True, batch_first=False, dropout=0.0, bidirectional=False,
    device=None, dtype=None, *, backend=None); forward(input, hx=None, lengths=None) as in LSTM, with one state. Errors are those of LSTM, and
    ValueError if a proj_size is given, or a nonlinearity that is none of the three.

    Elman, Finding structure in time, 1990.

    >>> y, h = RNN(3, 5, nonlinearity="sigmoid")(torch.randn(7, 4, 3))
    >>> torch.equal(y[-1], h[0]), bool((y > 0).all())
    (True, True)
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        _refuse_projection(args, kwargs, 8)
        if len(args) > 3:
            self.nonlinearity, args = args[3], args[:3] + args[4:]
        else:
            self.nonlinearity = kwargs.pop("nonlinearity", "tanh")
        if self.nonlinearity not in ("tanh", "relu", "sigmoid"):
            raise ValueError(f"Unknown nonlinearity '{self.nonlinearity}'. Select from 'tanh', 'relu' or 'sigmoid'.")
        super().__init__(f"RNN_{self.nonlinearity.upper()}", *args, **kwargs)


def _refuse_projection(args: tuple, kwargs: dict[str, Any], position: int) -> None:
    """Torch looks at the keyword only, and fails at the first call when the argument came by position."""
    if "proj_size" in kwargs or (len(args) > position and args[position]):
        raise ValueError("proj_size argument is only supported for LSTM, not RNN or GRU")
