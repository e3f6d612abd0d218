"""From what the leaves of many steps hold to records: to the host together, then numpy.

Dims: n steps taken together, T time steps, C columns of a leaf, S states.
"""

from __future__ import annotations

import functools
import math
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gradkernels.flow.history import Block, Flow, Group, Layer, Reach, Record, above
from gradkernels.flow.numbers import Array, Decay, changes, decays, from_the_end, horizons, log10_norm
from gradkernels.flow.points import Residual
from gradkernels.ops._residual_taps import ENTRANCE, EXIT, RESIDUAL, SUBLAYER

Key = tuple[Any, int]  # a point, and the number of its layer
NOWHERE: Any = None


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


@dataclass
class Rows:
    """Layers of S states in one direction at several steps, n rows: what is computed of all of them at once, and as far as somebody
    asks."""

    layers: list[Layer]  # of each row
    log10: Array  # [n, T, S or 1] of norms: of the states, or of x
    squares: Array | None  # [n, T, C], where more was measured
    scales: Array  # [n]

    @property
    def back(self) -> Array:
        return from_the_end(self.log10[:, :, 0], self.layers[0].reverse)

    @functools.cached_property
    def broken(self) -> list[bool]:
        found: list[bool] = np.any(~(self.log10 < np.inf), (1, 2)).tolist()
        return found

    @functools.cached_property
    def reaches(self) -> list[Reach | None]:
        return reach(self.back)

    @functools.cached_property
    def horizons(self) -> list[int | None]:
        return horizons(self.back)

    @functools.cached_property
    def decays(self) -> list[Decay | None]:
        return decays(self.back)

    def size(self, j: int) -> int:
        """How many numbers row j is."""
        values = self.log10 if self.squares is None else self.squares
        return int(values[j].size)

    def alone(self, j: int) -> Rows:
        """A copy of row j, which keeps no other."""
        squares = None if self.squares is None else self.squares[j : j + 1].copy()
        return Rows([self.layers[j]], self.log10[j : j + 1].copy(), squares, self.scales[j : j + 1].copy())

    def flow(self, j: int) -> Flow:
        """What users see of row j."""
        layer = self.layers[j]
        signals = dict(zip(layer.states or ("x",), self.log10[j].T.copy()))
        flow = Flow(signals, {}, self.horizons[j], self.decays[j], self.reaches[j], self.broken[j])
        if self.squares is not None:
            details(flow, layer, self.squares[j], self.scales[j])
        return flow


class Measured(Record):
    """A record whose flows are made when somebody asks: most are dropped before."""

    def __init__(self, step: int, index: int) -> None:
        super().__init__(step, index, {})
        del self.layers  # found below, and kept, at the first look
        self.rows: dict[str, tuple[Rows, int]] = {}  # in the order of the model
        self.settled = False

    @functools.cached_property
    def layers(self) -> dict[str, Flow]:  # type: ignore[override]
        made = {name: rows.flow(j) for name, (rows, j) in self.rows.items()}
        layers = {name: rows.layers[j] for name, (rows, j) in self.rows.items()}
        for name, largest in above(self.reaches, layers).items():
            flow = made[name]
            # What grows tenfold, and not beyond what is above, came in on the way: it says nothing of a step of the recurrence.
            if flow.reached is not None and flow.reached.top > 1 and flow.reached.peak <= largest + 1:
                flow.decay = None
        return made

    @functools.cached_property
    def size(self) -> int:  # type: ignore[override]
        return 8 + sum([rows.size(j) for rows, j in self.rows.values()])

    @property
    def reaches(self) -> dict[str, Reach | None]:
        """How far the gradient has come in each layer."""
        return {name: rows.reaches[j] for name, (rows, j) in self.rows.items()}

    @property
    def broken(self) -> list[str]:
        """The layers in which something is no finite number."""
        return [name for name, (rows, j) in self.rows.items() if rows.broken[j]]

    @property
    def detailed(self) -> bool:
        """Whether more than the norms of states was measured in layers."""
        return any(rows.squares is not None for rows, _ in self.rows.values())

    @property
    def empty(self) -> bool:
        """Whether nothing was measured."""
        return not (self.rows or self.blocks or self.parameters or self.grad_norm is not None)

    def settle(self) -> None:
        if not self.settled:
            self.rows = {name: (rows.alone(j), 0) for name, (rows, j) in self.rows.items()}
            self.settled = True


def records(steps: list[Step]) -> tuple[list[Measured], set[Any]]:
    """One record for each step, and the points whose leaves were filled to the last row: their sequences may have been longer."""
    made = [Measured(step.number, step.index) for step in steps]
    ones = torch.ones((), dtype=torch.double)
    scales = to_host([ones if step.scale is None else step.scale.double() for step in steps])
    found: dict[Key, list[tuple[int, Tensor]]] = defaultdict(list)
    for k, step in enumerate(steps):
        for (point, at), squares in step.found.items():
            found[point, at].append((k, squares))
            if not isinstance(point, Residual):
                made[k].rows[point.layers[at].name] = NOWHERE  # in the order of the model
    # what has one shape is taken together: numpy, and a device, take longer to be called than to compute
    together: dict[tuple[Any, ...], list[tuple[Key, int, Tensor]]] = defaultdict(list)
    for (point, at), taken in found.items():
        if isinstance(point, Residual):
            steps_of = [k for k, _ in taken]
            for k, block in zip(steps_of, blocks(to_host([v for _, v in taken]), scales[steps_of], point.pre)):
                made[k].blocks[point.name] = block
            continue
        layer: Layer = point.layers[at]
        for k, squares in taken:
            together[layer.states, layer.reverse, squares.shape].append(((point, at), k, squares))
    full = set()
    for (states, _, shape), members in together.items():
        at_steps, whole = np.array([k for _, k, _ in members]), to_host([v for *_, v in members])
        S = len(states) or 1  # without states there is x
        lengths = np.count_nonzero(whole[:, :, S], 1)  # the column of rows
        for T in np.unique(lengths).tolist():
            places = np.flatnonzero(lengths == T)
            scale, own = scales[at_steps[places]], whole[places, :T]
            layers = [point.layers[at] for (point, at), *_ in (members[j] for j in places)]
            log10 = log10_norm(own[:, :, :S], scale[:, None, None]).astype(np.float32)
            rows = Rows(layers, log10, own if states and shape[1] > S + 1 else None, scale)
            for j, (k, layer) in enumerate(zip(at_steps[places].tolist(), layers)):
                made[k].rows[layer.name] = rows, j
            if T == shape[0]:
                full |= {members[j][0][0] for j in places}
    totals = [step for step in steps if step.total is not None]
    sums = dict(zip((step.number for step in totals), to_host([s.total for s in totals]).tolist())) if totals else {}
    for record, step in zip(made, steps):
        if step.dead:
            record.dead = dict(zip(step.dead, to_host([*step.dead.values()]).tolist()))
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


def blocks(squares: Array, scales: Array, pre: bool) -> Iterator[Block]:
    """[n, 4] of a block at n steps, as `ops._residual_taps` has it."""
    log10 = log10_norm(squares, scales[:, None])
    residual, paths = squares[:, RESIDUAL], squares[:, RESIDUAL] + squares[:, SUBLAYER]
    known = (paths > 0) & (paths < math.inf)
    share = np.divide(residual, paths, out=np.zeros_like(paths), where=known)
    columns = log10[:, ENTRANCE], log10[:, RESIDUAL if pre else EXIT], share, known
    for entrance, exit, part, is_known in zip(*(column.tolist() for column in columns)):
        yield Block(entrance, exit, part if is_known else None)


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
