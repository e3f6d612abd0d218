"""What was measured, one record an optimizer step, and the bounded memory of them.

Dims: T time steps of the sequences of that step.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from gradkernels.flow.numbers import Array, Decay


@dataclass(frozen=True)
class Layer:
    """One layer in one direction, or a plain layer of torch, as a monitor watches it."""

    name: str  # "encoder.l0", "encoder.l1_reverse"; of a plain layer the module's
    module: str
    kind: str  # "recurrent", or "input": dL/dx_t alone, as much as a layer of torch lets see
    cell: str | None
    index: int
    reverse: bool
    states: tuple[str, ...]  # "h", "c" ...
    activations: tuple[tuple[str, str], ...] = ()  # name and function of those whose saturation is counted

    @property
    def direction(self) -> str:
        return "reverse" if self.reverse else "forward"


@dataclass
class Flow:
    """Of one layer at one optimizer step. What is missing was not measured; -inf is a zero, or below the range of its dtype."""

    # log10 of ||dL/dh_t||, ||dL/dc_t||, ||dL/dx_t|| by name [T]
    signals: dict[str, Array] = field(default_factory=dict)
    saturation: dict[str, Array] = field(default_factory=dict)  # share of saturated values by gate [T]
    horizon: int | None = None
    decay: Decay | None = None  # None also where it grows tenfold by what comes in from above
    reached: Reach | None = None
    broken: bool = False  # something is no finite number


class Reach(NamedTuple):
    """How far a gradient has come, against its value where the loss enters: the last step of the recurrence that has one."""

    last: int  # how many steps before the end that is
    start: float  # decades of change until the other end of the sequence; -inf: zeros there
    top: float  # decades of change where it is largest
    peak: float  # log10 of the norm there


@dataclass(frozen=True)
class Block:
    """Norms of the gradient at a block's exit and entrance, and how much of the latter came past its sublayer."""

    entrance: float  # log10
    exit: float  # log10
    residual_share: float | None  # ||g_residual||^2 / (||g_residual||^2 + ||g_sublayer||^2)


@dataclass(frozen=True)
class Group:
    """The parameters of one layer or module."""

    norm: float
    grad: float
    update_ratio: float | None  # ||new - old|| / ||old||


@dataclass
class Record:
    """Everything measured at one optimizer step."""

    step: int  # of the optimizer, from 1
    index: int  # of the record, from 0
    layers: dict[str, Flow]
    blocks: dict[str, Block] = field(default_factory=dict)
    parameters: dict[str, Group] = field(default_factory=dict)
    dead: dict[str, float] = field(default_factory=dict)  # share of units that no gradient reaches, by layer
    grad_norm: float | None = None  # of all parameters together; with `clip` at every record
    # what a snapshot shows of it, once it has been asked for
    written: dict[str, Any] = field(default_factory=dict, repr=False)

    @functools.cached_property
    def size(self) -> int:
        """How many numbers it holds, about."""
        flows = self.layers.values()
        return 8 + sum(v.size for flow in flows for v in (*flow.signals.values(), *flow.saturation.values()))

    def settle(self) -> None:
        """Let go of what it shares with other records."""


def above(reaches: dict[str, Reach | None], layers: Mapping[str, Layer]) -> dict[str, float]:
    """log10 of the largest norm in any of the layers that come after a layer; its other direction is beside it."""
    found: dict[str, float] = {}
    largest = beside = -math.inf
    place = None
    for name, reached in reversed(reaches.items()):
        if place != (place := (layers[name].module, layers[name].index)):
            largest, beside = max(largest, beside), -math.inf
        found[name] = largest
        if reached is not None:
            beside = max(beside, reached.peak)
    return found


SETTLED = 4  # one record of so many has a copy of its own of what is taken together


class History:
    """At most `keep` records and `values` numbers: when there are more, the older half is thinned out, every other record at
    first, so that what is old is coarse, what is new is complete, and the first record stays.

    >>> history = History(keep=8)
    >>> for k in range(40):
    ...     history.append(Record(step=k + 1, index=k, layers={}))
    >>> [record.index for record in history]
    [0, 16, 32, 35, 36, 37, 38, 39]
    """

    def __init__(self, keep: int = 512, values: int = 1_000_000) -> None:
        self.keep, self.values, self.size = keep, values, 0
        self.records: list[Record] = []

    def append(self, record: Record) -> None:
        self.records.append(record)
        self.size += record.size
        while len(self.records) > self.keep or (self.size > self.values and len(self.records) > 2):
            self._thin()

    def _thin(self) -> None:
        half = max(2, len(self.records) // 2)
        coarse = [_stride(record.index) for record in self.records[:half]]
        least, kept = min(coarse[1:]), []
        for k, (record, c) in enumerate(zip(self.records, coarse)):
            if k and c <= least:
                self.size -= record.size
                continue
            kept.append(record)
            if c >= SETTLED:
                record.settle()
        self.records[:half] = kept

    def __iter__(self) -> Iterator[Record]:
        return iter(self.records)

    def __len__(self) -> int:
        return len(self.records)


def _stride(index: int) -> int:
    """The largest power of two that divides it."""
    return index & -index if index else 1 << 62


def numbers(values: Iterable[float] | Array, digits: int) -> list[float | None]:
    """For JSON: rounded, and None for what is no finite number."""
    array = np.asarray(values, np.float64)
    rounded = array.round(digits)
    finite = np.isfinite(array)
    found: list[float | None] = rounded.tolist()
    return found if finite.all() else [v if ok else None for v, ok in zip(found, finite.tolist())]
