"""The course of one recurrent layer over a sequence, and its derivative with respect to the states, step by step.

The layer is only ever called, with more rows of a batch for more directions of a derivative: what it is made of is its own affair.
Dims: T steps, B batch, I inputs, n values of state (all states of a row side by side), k directions.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from gradkernels.nn.parts import Part, parts


class Course:
    """One layer and direction of a recurrent module, in float64 on the CPU, and the input that it walks over.

    Steps are counted as it walks: step 0 of the reverse direction is the last of the sequence."""

    def __init__(self, module: nn.Module, x: Tensor, layer: int, reverse: bool, hx: Any):
        every = self._parts(module)
        directions = 2 if module.bidirectional else 1
        if not 0 <= layer < module.num_layers:
            raise ValueError(f"layer must be from 0 to {module.num_layers - 1}, got {layer}")
        if reverse and directions == 1:
            raise ValueError(f"{type(module).__name__} is not bidirectional: it has no reverse direction")
        at = layer * directions + reverse
        self.part = every[at]
        x, hx, self.batched = self._check(module, x, hx, self.part.cell.S)
        for below in range(0, layer * directions, directions):
            x = torch.cat([_run(every[j], x, hx, j) for j in range(below, below + directions)], -1)
        self.layer, self.x = self.part.alone(), x.flip(0) if reverse else x
        given = [h[at] for h in hx] if hx else self._zeros(x)
        self.widths = [h.shape[-1] for h in given]
        self.start = torch.cat(given, -1)  # [B, n]

    @staticmethod
    def _parts(module: nn.Module) -> list[Part]:
        if not isinstance(module, nn.Module):
            raise TypeError(f"module must be a recurrent layer, got {type(module).__name__}")
        every = [part for part in parts(module) if part.module is module and isinstance(module, nn.RNNBase)]
        if not every:
            raise TypeError(f"module must be an LSTM, GRU, RNN or Recurrent, got {type(module).__name__}")
        if every[0].options.get("skip"):
            raise TypeError(
                f"{type(module).__name__} adds an output of some steps ago: its states alone do not say what comes next"
            )
        return every

    @staticmethod
    def _check(module: nn.Module, x: Tensor, hx: Any, S: int) -> tuple[Tensor, tuple[Tensor, ...], bool]:
        """x [T, B, I], hx as a tuple of [layers * directions, B, width] or empty, in float64; whether there was a batch."""
        if not isinstance(x, Tensor):
            raise TypeError(f"x must be a tensor, got {type(x).__name__}")
        if x.dim() not in (2, 3) or x.shape[-1] != module.input_size:
            raise ValueError(f"x must be [T, B, {module.input_size}] or [T, {module.input_size}], got {list(x.shape)}")
        batched = x.dim() == 3
        x = (x if not batched else x.transpose(0, 1) if module.batch_first else x).detach().double().cpu()
        states = () if hx is None else (hx,) if isinstance(hx, Tensor) else tuple(hx)
        states = tuple(h.detach().double().cpu() for h in states)
        if not batched:
            x, states = x.unsqueeze(1), tuple(h.unsqueeze(1) for h in states)
        if not x.numel():
            raise ValueError(f"x has no steps or rows: {list(x.shape)}")
        lead = (len(module._all_weights), x.shape[1])
        if hx is not None and (len(states) != S or any(h.dim() != 3 or h.shape[:2] != lead for h in states)):
            want, got = f"{S} of [{lead[0]}, {lead[1]}, ..]", [list(h.shape) for h in states]
            raise ValueError(f"hx must be {want} beside x {list(x.shape)}, got {got}")
        for name, values in {"x": (x,), "hx": states, "a weight": tuple(module.parameters())}.items():
            if not all(v.isfinite().all() for v in values):
                raise ValueError(f"{name} is not finite")
        return x, states, batched

    def _zeros(self, x: Tensor) -> list[Tensor]:
        _, final = self.layer(x[:1])
        return [h.new_zeros(h.shape[1:]) for h in (final if isinstance(final, tuple) else (final,))]

    @property
    def T(self) -> int:
        return self.x.shape[0]

    def _apply(self, t: int, state: Tensor, rows: int = 1) -> Tensor:
        """State [B * rows, n] after step t, given the one before; each row of x serves `rows` of them."""
        given = tuple(h.unsqueeze(0) for h in state.split(self.widths, -1))
        x = self.x[t : t + 1].repeat_interleave(rows, 1)
        _, final = self.layer(x, given if len(given) > 1 else given[0])
        return torch.cat([h.squeeze(0) for h in (final if isinstance(final, tuple) else (final,))], -1)

    @torch.no_grad()
    def states(self, start: Tensor, first: int, steps: int) -> list[Tensor]:
        """`steps` + 1 states [B, n]: `start`, which enters step `first`, and those after each step from there on."""
        found = [start]
        for t in range(first, first + steps):
            found.append(self._apply(t, found[-1]))
        return found

    def push(self, t: int, state: Tensor, directions: Tensor) -> Tensor:
        """J_t times [B, n, k], at the state that enters step t."""
        k = directions.shape[2]
        rows = directions.transpose(1, 2).flatten(0, 1)
        with forward_ad.dual_level():
            after = self._apply(t, forward_ad.make_dual(state.repeat_interleave(k, 0), rows), k)
            moved = forward_ad.unpack_dual(after).tangent
        return moved.unflatten(0, (-1, k)).transpose(1, 2)

    def pull(self, t: int, state: Tensor, directions: Tensor) -> Tensor:
        """The transpose of J_t times [B, n, k]."""
        k = directions.shape[2]
        with torch.enable_grad():
            before = state.repeat_interleave(k, 0).requires_grad_()
            after = self._apply(t, before, k)
        (moved,) = torch.autograd.grad(after, before, directions.transpose(1, 2).flatten(0, 1))
        return moved.unflatten(0, (-1, k)).transpose(1, 2)

    def matrix(self, t: int, state: Tensor) -> Tensor:
        """J_t [B, n, n]."""
        B, n = state.shape
        return self.pull(t, state, torch.eye(n, dtype=state.dtype).expand(B, n, n)).transpose(1, 2)


def _run(part: Part, x: Tensor, hx: tuple[Tensor, ...], at: int) -> Tensor:
    """Outputs [T, B, R] of a layer below."""
    given = tuple(h[at : at + 1] for h in hx)
    y, _ = part.alone()(x.flip(0) if part.reverse else x, given if len(given) > 1 else given[0] if given else None)
    return y.flip(0) if part.reverse else y
