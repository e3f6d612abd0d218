"""What surrounds a cell in one call: the regularisers, resets, heads and windows of `ops.recurrent`.

A regulariser is a transform of the cell and a mask; here the cell is composed, and states go in and come out as the caller's
cell has them. Dims: as in recurrent.py; M masks.
"""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral, Real
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from gradkernels.backends._extra import DRAWN, FIXED, GIVEN, Extra
from gradkernels.backends.reference import philox
from gradkernels.cells import Cell
from gradkernels.ops import _recurrent_op as op
from gradkernels.ops._fused import draw_seed
from gradkernels.ops._recurrent_call import Inputs, Tensors, call, check_probe, zeros
from gradkernels.ops._recurrent_checks import check_forward
from gradkernels.ops._recurrent_resets import keep_flags
from gradkernels.ops._recurrent_windows import by_windows

KINDS = {"step": DRAWN, "sequence": FIXED}
WHOLE = (int, torch.SymInt, Integral)
NUMBER = (int, float, torch.SymInt, torch.SymFloat, Real)


class Options(NamedTuple):
    """The arguments of `ops.recurrent` of these names."""

    training: bool = True
    zoneout: float | Sequence[float] = 0.0
    recurrent_dropout: float = 0.0
    variational: float = 0.0
    weight_drop: float = 0.0
    noise: Sequence[tuple[float, float, str]] = ()
    seed: Tensor | None = None
    reset: Tensor | None = None
    skip: int = 0
    clip_grad: float = 0.0
    heads: int = 1
    recompute: int = 0


class Call(NamedTuple):
    """The other arguments."""

    tensors: Inputs
    params: Tensor | None
    state: Sequence[Tensor] | None
    batch_sizes: Tensor | None
    lengths: Tensor | None
    reverse: bool
    probe: Tensor | None
    every_state: bool
    backend: str | None


def _zones(c: Cell, o: Options) -> list[float]:
    """The probability of zoneout for each state."""
    return list(o.zoneout) if isinstance(o.zoneout, Sequence) else [o.zoneout] * c.S


def check_options(c: Cell, o: Options) -> None:
    """Values that no tensor has to be looked at for."""
    zones = _zones(c, o)
    for name, n in (("skip", o.skip), ("heads", o.heads), ("recompute", o.recompute)):
        if not isinstance(n, WHOLE):
            raise TypeError(f"{name} must be a whole number, got {n!r}")
    if not isinstance(o.clip_grad, NUMBER):
        raise TypeError(f"clip_grad must be a number, got {o.clip_grad!r}")
    if not isinstance(o.noise, Sequence):
        raise TypeError(f"noise must be a list of (p, high, kind), got {o.noise!r}")
    for plane in o.noise:
        if not isinstance(plane, Sequence) or len(plane) != 3:
            raise ValueError(f"noise must have (p, high, kind) for each mask, got {plane!r}")
    for name, p in (
        *(("zoneout", p) for p in zones),
        ("recurrent_dropout", o.recurrent_dropout),
        ("variational", o.variational),
        ("weight_drop", o.weight_drop),
        *(("p of noise", plane[0]) for plane in o.noise),
    ):
        if not isinstance(p, NUMBER):
            raise TypeError(f"{name} must be a number, got {p!r}")
        if not 0 <= p <= 1:
            raise ValueError(f"{name} must be between 0 and 1, got {p}")
    if len(zones) != c.S:
        raise ValueError(f"zoneout must be one number or {c.S}, one for each state of {c.name}, got {len(zones)}")
    if o.recurrent_dropout and o.variational:
        raise ValueError("recurrent_dropout draws a mask every step and variational one a sequence; give one of them")
    if (o.recurrent_dropout or o.variational or o.weight_drop) and not c.recurrent:
        raise ValueError(f"{c.name} has no recurrent product that could drop anything")
    if len(o.noise) != c.M:
        count = f"{c.M} mask{'s' * (c.M != 1)}"
        raise ValueError(f"cell {c.name} has {count}, and noise (p, high, kind) for each; got {len(o.noise)}")
    for _, _, kind in o.noise:
        if kind not in KINDS:
            raise ValueError(f"the kind of a mask is 'step' or 'sequence', got {kind!r}")
    if o.skip < 0 or (c.D and not o.skip):
        raise ValueError(
            f"skip must be {'at least 1' if c.D else 'positive, or 0 for none'} for {c.name}, got {o.skip}"
        )
    if o.skip and (o.reset is not None or o.recurrent_dropout or o.variational):
        raise ValueError(
            "reset, recurrent_dropout and variational do not reach the state of some steps ago, which skip has"
        )
    if not o.clip_grad >= 0:
        raise ValueError(f"clip_grad must not be negative, got {o.clip_grad}")
    if o.heads < 1:
        raise ValueError(f"heads must be at least 1, got {o.heads}")
    if o.recompute < 0:
        raise ValueError(f"recompute must be a number of steps, or 0 for none, got {o.recompute}")
    if o.recompute and o.skip:
        raise ValueError("recompute begins a window with the states alone, and skip needs those of the steps before")


def run(c: Cell, name: str | None, given: Call, o: Options) -> tuple[Tensor | Tensors, Tensors]:
    """The call with everything around it."""
    check_options(c, o)
    name = name or op.name_of(c)
    tensors, state, batch_sizes, lengths = given.tensors, given.state, given.batch_sizes, given.lengths
    if torch.compiler.is_compiling() or not torch._C._is_tracing():
        check_forward(c, *tensors, state, batch_sizes, lengths, o.heads)
    x, probe = tensors[0], given.probe
    if o.training and o.weight_drop:
        tensors = (*tensors[:3], F.dropout(tensors[3], o.weight_drop), *tensors[4:])
    around, planes, hidden = _around(c, o)
    noise = tuple(float(v) for plane in planes for v in plane)
    seed = o.seed if o.training else None
    if seed is None and o.training and any(p > 0 for p, _, kind in planes if kind != GIVEN):
        seed = draw_seed(x)
    flags = None
    if o.reset is not None:
        flags, first = keep_flags(o.reset, x, batch_sizes, lengths, given.reverse, given.state)
        if state is not None:
            state = [first * state[0], state[0], *(first * v for v in state[1:])]
    if "masked" in around and state is not None:
        state = [_first_mask(seed, planes, state[0]) * state[0], *state]
    if around:
        name = op.composed(name, around)
        if probe is not None:  # what the cells made of this one keep, nobody asks for
            probe = check_probe(probe, c, x.device)
        if probe is not None:
            probe = F.pad(probe[:, : c.S + 2], (hidden, 0))
    inner = op.cell_of(name)
    extra = Extra(given.params, seed, noise, flags, o.skip, float(o.clip_grad), heads=o.heads)
    how = batch_sizes, lengths, given.reverse, probe, given.every_state or hidden > 0, given.backend
    if o.recompute:
        state = zeros(inner, x, tensors[3], batch_sizes, o.heads) if state is None else state
        seq, final = by_windows(o.recompute, inner, name, tensors, state, *how, extra)
    else:
        seq, final = call(inner, name, tensors, state, *how, extra)
    if hidden:
        seq = seq[hidden:] if given.every_state else seq[hidden]
    return seq, final[hidden:]


def _around(c: Cell, o: Options) -> tuple[tuple[str, ...], list[tuple[float, float, float]], int]:
    """Transforms, the innermost first; (p, high, where from) of every mask; how many states they put before those of the cell."""
    names, planes = [], [(p, high, KINDS[kind]) for p, high, kind in o.noise]
    if any(zones := _zones(c, o)):
        names.append("zoneout")
        planes += [(p, 1.0, DRAWN) for p in zones]
    if o.skip and not c.D:
        names.append("skip")
    if o.reset is not None:
        names.append("resets")
        planes.append((0.0, 1.0, GIVEN))
    p = o.variational or o.recurrent_dropout
    if p and o.training:  # in evaluation the mask is 1
        names.append("masked")
        planes.append((p, 1 / (1 - p) if p < 1 else 0.0, FIXED if o.variational else DRAWN))
    return tuple(names), planes, ("resets" in names) + ("masked" in names)


def _first_mask(seed: Tensor, planes: Sequence[tuple[float, float, float]], h: Tensor) -> Tensor:
    """What the initial state is multiplied with, [B, H]: the mask of its sequence, or one of no token."""
    p, high, kind = planes[-1]
    row = (len(planes) - (kind == FIXED) << 32) + torch.arange(h.shape[0], device=h.device)
    return philox.kept(seed, p, row.unsqueeze(1), torch.arange(h.shape[1], device=h.device)).to(h.dtype) * high
