"""From what the leaves of many steps hold to records: to the host together, then numpy.

Dims: n steps taken together, T time steps, C columns of a leaf, S states.
"""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gradkernels.flow.history import Block, Flow, Group, Layer, Reach, Record, above
from gradkernels.flow.numbers import Array, changes, decays, from_the_end, horizons, log10_norm
from gradkernels.flow.points import Residual

Key = tuple[Any, int]  # a point, and the number of its layer


@dataclass
class Step:
    """What one optimizer step left, still on the device."""

    number: int
    index: int
    found: dict[Key, Tensor]  # squares, as a leaf's gradient
    scale: Tensor | None  # of the loss
    parameters: dict[str, Tensor] = field(
        default_factory=dict
    )  # squares of old weights, gradient and change; NaN: unknown
    dead: dict[str, Tensor] = field(default_factory=dict)
    level: int = 0  # what was measured
    sharded: bool = False  # each rank has but a part of every parameter
    total: Tensor | None = None  # square of all gradients together, this rank's share of it; NaN: unknown


def records(steps: list[Step]) -> tuple[list[Record], set[Any]]:
    """One record for each step, and the points whose leaves were filled to the last row: their sequences may have been longer."""
    made = [Record(step.number, step.index, {}) for step in steps]
    ones = torch.ones((), dtype=torch.double)
    scales = to_host([ones if step.scale is None else step.scale.double() for step in steps])
    # what has one shape is taken together: numpy, and a device, take longer to be called than to compute
    together: dict[tuple[Any, ...], list[tuple[int, Layer, Tensor, Any]]] = defaultdict(list)
    for k, step in enumerate(steps):
        for (point, at), squares in step.found.items():
            if isinstance(point, Residual):
                made[k].blocks[point.name] = block(to_host([squares])[0], scales[k])
            else:
                layer: Layer = point.layers[at]
                made[k].layers[layer.name] = Flow()  # in the order of the model
                together[len(layer.states), layer.reverse, squares.shape].append((k, layer, squares, point))
    totals = [step for step in steps if step.total is not None]
    sums = dict(zip((step.number for step in totals), to_host([s.total for s in totals]).tolist())) if totals else {}
    full = set()
    for (S, reverse, shape), rows in together.items():
        lengths = fill(made, rows, scales, S, reverse)
        full |= {point for (*_, point), T in zip(rows, lengths) if T == shape[0]}
    layers = {layer.name: layer for rows in together.values() for _, layer, *_ in rows}
    for record, step in zip(made, steps):
        for name, largest in above(record.layers, layers).items():
            flow = record.layers[name]
            # What grows tenfold, and not beyond what is above, came in on the way: it says nothing of a step of the recurrence.
            if flow.reached is not None and flow.reached.top > 1 and flow.reached.peak <= largest + 1:
                flow.decay = None
        record.dead = dict(zip(step.dead, to_host([*step.dead.values()]).tolist())) if step.dead else {}
        if step.parameters:
            values = to_host([*step.parameters.values()])
            record.parameters = {name: group(*row) for name, row in zip(step.parameters, values.tolist())}
            record.grad_norm = math.sqrt(values[:, 1].sum())
        if not math.isnan(total := sums.get(step.number, math.nan)):
            record.grad_norm = math.sqrt(total)
    return made, full


def to_host(tensors: list[Tensor]) -> Array:
    return torch.stack(tensors).detach().cpu().numpy()


def group(old: float, grad: float, change: float) -> Group:
    """From squares."""
    return Group(math.sqrt(old), math.sqrt(grad), math.sqrt(change / old) if old > 0 and change >= 0 else None)


def block(squares: Array, scale: float) -> Block:
    """[4] of a block: entrance, exit, residual path, sublayer."""
    entrance, exit = log10_norm(squares[:2], scale).tolist()
    paths = float(squares[2] + squares[3])
    return Block(entrance, exit, float(squares[2]) / paths if 0 < paths < math.inf else None)


def fill(
    made: list[Record], rows: list[tuple[int, Layer, Tensor, Any]], scales: Array, S: int, reverse: bool
) -> list[int]:
    """Squares [steps, C] of layers of S states, into the flows of their records; returns how many steps each has."""
    states = S or 1  # without states there is x
    squares = to_host([v for _, _, v, _ in rows])
    log10 = log10_norm(squares[:, :, :states], scales[[k for k, *_ in rows], None, None]).astype(np.float32)
    lengths = np.count_nonzero(squares[:, :, states], 1)
    for T in np.unique(lengths).tolist():
        at = np.flatnonzero(lengths == T)
        log = log10[at, :T]
        back = from_the_end(log[:, :, 0], reverse)
        broken = np.any(~(log < np.inf), (1, 2)).tolist()
        numbers = zip(at.tolist(), log, horizons(back), decays(back), reach(back), broken)
        for j, values, far, line, reached, bad in numbers:
            k, layer, *_ = rows[j]
            flow = made[k].layers[layer.name]
            own = values.T.copy()  # a view would keep the others alive
            flow.signals = dict(zip(layer.states or ("x",), own))
            flow.horizon, flow.decay, flow.reached, flow.broken = far, line, reached, bad
            if S and squares.shape[2] > S + 1:
                details(flow, layer, squares[j, :T], scales[k])
    steps: list[int] = lengths.tolist()
    return steps


def details(flow: Flow, layer: Layer, squares: Array, scale: float) -> None:
    """What a wide probe holds besides."""
    x = len(layer.states) + 1
    if squares[:, x].any():  # else nobody wanted a gradient of x
        flow.signals["x"] = log10_norm(squares[:, x], scale).astype(np.float32)
    if layer.activations and squares[:, -1].any():  # else the call made another cell of this one: zoneout, masks
        with np.errstate(invalid="ignore"):
            shares = (squares[:, x + 1 : -1] / squares[:, -1:]).astype(np.float32).T.copy()
        flow.saturation = dict(zip((name for name, _ in layer.activations), shares))


def reach(back: Array) -> list[Reach | None]:
    """Of log10 norms over the distance from the last step [n, T]; None where no step has a finite one."""
    if not back.size:
        return [None] * len(back)
    first, change = changes(back)
    top = np.where(np.isfinite(change), change, -np.inf).max(1)
    with np.errstate(invalid="ignore"):  # of a step that a scaler skips nothing is finite
        peak = back[np.arange(len(back)), first] + top
    rows = zip(first.tolist(), change[:, -1].tolist(), top.tolist(), peak.tolist())
    return [Reach(*row) if row[2] > -np.inf else None for row in rows]
