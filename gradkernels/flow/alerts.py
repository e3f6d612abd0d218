"""What a monitor points out by itself, with what helps.

Each alert names the layer, its direction, the optimizer's step and, where there is one, the time step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from gradkernels.flow.history import Flow, Layer, Record, above
from gradkernels.flow.measure import Measured
from gradkernels.flow.numbers import HORIZON, changes, from_the_end

QUIET = 64  # records that a condition has to be gone for before it begins anew

ADVICE: dict[str, Any] = {
    "vanishing": {
        "lstm": "Begin with the forget gate open: gk.init.forget_bias_(model, 3), or gk.init.chrono_(model, longest_lag) for long sequences.",
        "gru": "Begin with gates that keep the state, gk.init.chrono_(model, longest_lag), and an orthogonal recurrent matrix, gk.init.orthogonal_.",
        "rnn": "A gated cell (LSTM, GRU) keeps a path that does not shrink; gk.init.orthogonal_ or identity_, skips or attention shorten it.",
        "block": "A block before the norm (norm='pre', norm_first=True) leaves the gradient a path past every sublayer.",
    },
    "exploding": "Clip the norm, torch.nn.utils.clip_grad_norm_(parameters, 1.0), and make the recurrent matrix smaller or orthogonal: gk.init.orthogonal_.",
    "saturated": "Where an activation is flat no gradient passes: smaller weights (gk.init.orthogonal_), a normalised input, or a lower learning rate.",
    "dead": "Units that are never active get no gradient and stay so: tanh or a gated cell, gk.init.identity_, or a lower learning rate.",
    "stalled": "The weights hardly move: raise this group's learning rate, look whether its gradient vanishes, or whether it is meant to be frozen.",
    "nonfinite": "Look at the first layer and time step named here: clip the gradient, lower the learning rate, or scale a float16 loss by a GradScaler.",
}


class FlowWarning(UserWarning):
    """Something about the gradient's flow, said once."""


class FlowError(RuntimeError):
    """An alert that was asked for as an exception."""


@dataclass(frozen=True)
class Thresholds:
    """Beyond which a value is an alert, as :func:`gradkernels.flow.watch` takes them.

    Every kind is pointed out at the first record that has it, but for a vanishing gradient, which is how layers begin: with torch's
    initial weights nearly every one loses it over some ten steps, and where there is something to learn from afar gates open
    in some ten to a hundred updates. It is an alert when it has been there for `patience` records, with no more than 64 without it in between;
    1 is at once. What is no finite number is pointed out at once, but for steps that a GradScaler skips while its scale settles.

    Args:
        vanishing: ||dL/dh|| at the first time step over that at the last, or the other way round in reverse; over a block, entrance over exit.
        exploding: the same where it is largest; of norms that are larger than 1, and ten times as large as those of the layers above.
        saturated: share of an activation's values within 5 % of an end of its range, over all time steps.
        dead: share of a layer's units that no gradient reaches.
        stalled: ||new - old|| / ||old|| of a group of parameters that has a gradient.
        patience: records, not all of them in a row, before a vanishing gradient is an alert.

    Raises:
        ValueError: vanishing, saturated or dead is not in (0, 1], exploding not larger than 1, patience no positive integer.

    Example:
        >>> import torch, gradkernels as gk
        >>> model = gk.nn.RNN(3, 8)
        >>> monitor = gk.flow.watch(model, thresholds=gk.flow.Thresholds(vanishing=1e-6, patience=1))
        >>> model(torch.randn(100, 2, 3))[0][-1].sum().backward()
        >>> [(alert.kind, alert.threshold) for alert in monitor.alerts]
        [('vanishing', 1e-06)]
    """

    vanishing: float = HORIZON
    exploding: float = 1e3
    saturated: float = 0.9
    dead: float = 0.1
    stalled: float = 1e-6
    patience: int = 100

    def __post_init__(self) -> None:
        for name in ("vanishing", "saturated", "dead"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"{name} must be between 0 and 1, got {getattr(self, name)}")
        if self.exploding <= 1:
            raise ValueError(f"exploding must be larger than 1, got {self.exploding}")
        if not isinstance(self.patience, int) or self.patience < 1:
            raise ValueError(f"patience must be a positive integer, got {self.patience!r}")


@dataclass(frozen=True)
class Alert:
    """One thing to look at, in ``monitor.alerts`` and for ``on_alert``; its text is the message and the advice.

    Attributes:
        kind: "vanishing", "exploding", "saturated", "dead", "stalled" or "nonfinite"; what each means is at :class:`Thresholds`.
        layer: the name of a recurrent layer and direction, a block, or a group of parameters, as the history has it.
        direction: "forward" or "reverse"; None of what has none.
        step: of the optimizer, from 1, at which it was pointed out.
        time_step: where in the sequence, from 0: the first past the threshold on the gradient's way, or where it is worst; None of what has no time.
        value, threshold: what was measured, as a ratio or share and not its logarithm, and what it is beyond. NaN of a nonfinite one.
        message: what was seen, in one sentence.
        advice: what helps.

    Example:
        >>> import torch, gradkernels as gk
        >>> rnn = gk.nn.RNN(3, 8, nonlinearity="relu")
        >>> _ = gk.init.identity_(rnn), rnn.weight_hh_l0.data.mul_(2), rnn.bias_ih_l0.data.fill_(1)
        >>> monitor = gk.flow.watch(rnn)
        >>> rnn(torch.rand(12, 1, 3))[0][-1].sum().backward()
        >>> [alert] = monitor.alerts
        >>> alert.message
        'Exploding: RNN.l0, step 1, time step 0: dL/dh grows to 2e+03 times its value at time step 11.'
        >>> alert.time_step, alert.value > alert.threshold, alert.to_dict()["kind"]
        (0, True, 'exploding')
    """

    kind: str
    layer: str
    direction: str | None
    step: int
    time_step: int | None
    value: float
    threshold: float
    message: str
    advice: str

    def to_dict(self) -> dict[str, Any]:
        """Its attributes for JSON: a value that is not finite is None."""
        found = asdict(self)
        if not math.isfinite(self.value):
            found["value"] = None
        return found

    def __str__(self) -> str:
        return f"{self.message} {self.advice}"


class Candidate(NamedTuple):
    """An alert that has not been written out yet: most of them are known from the record before."""

    kind: str
    layer: str
    value: float
    threshold: float
    say: Callable[[], tuple[int | None, str]]  # the time step, and what there is to say


def candidates(record: Measured, layers: dict[str, Layer], thresholds: Thresholds) -> Iterator[Candidate]:
    """What is wrong in this record, the most fundamental first."""
    broken = record.broken
    for name in reversed(broken):  # in the order of backward, so that the first is where it began
        yield Candidate("nonfinite", name, math.nan, math.inf, partial(_nonfinite, record, layers[name]))
    if broken:
        return  # other numbers mean nothing then
    low, high = math.log10(thresholds.vanishing), math.log10(thresholds.exploding)
    reaches = {name: reached for name, reached in record.reaches.items() if reached is not None}
    vanishing = {name for name, reached in reaches.items() if reached.start < low}
    growing = {name for name, reached in reaches.items() if reached.top > high}
    largest = above(record.reaches, layers) if growing else {}
    for name in reaches if vanishing or growing else ():
        layer, reached = layers[name], reaches[name]
        if name in vanishing:
            say = partial(_vanishing, record, layer, thresholds.vanishing)
            yield Candidate("vanishing", name, 10.0**reached.start, thresholds.vanishing, say)
        # Where the loss comes in little by little norms grow without an explosion: it has to be more than comes from above.
        if name in growing and reached.peak > max(0.0, largest[name] + 1):
            say = partial(_exploding, record, layer)
            yield Candidate("exploding", name, 10.0**reached.top, thresholds.exploding, say)
    for name, flow in record.layers.items() if record.detailed else ():
        for gate, function in layers[name].activations if flow.saturation else ():
            # A gate that stays open or shut is no fault by itself, a long memory is made so; a relu is 0 half of the time.
            if function == "relu" or (function == "sigmoid" and gate != "h" and name not in vanishing):
                continue
            values = flow.saturation[gate]
            mean = float(values.mean())
            if mean >= thresholds.saturated:
                say = partial(_saturated, values, f"{function} {gate}")
                yield Candidate("saturated", name, mean, thresholds.saturated, say)
    for name, block in record.blocks.items():
        change = block.entrance - block.exit
        if change < low:
            text = f"through the block the gradient shrinks to {10**change:.0e} of what it was"
            yield Candidate("vanishing", name, 10**change, thresholds.vanishing, partial(_plain, text))
        elif change > high:
            text = f"through the block the gradient grows to {10**change:.0e} times what it was"
            yield Candidate("exploding", name, 10**change, thresholds.exploding, partial(_plain, text))
    for name, dead in record.dead.items():
        if dead >= thresholds.dead:
            text = f"no gradient reaches {dead:.0%} of the units"
            yield Candidate("dead", name, dead, thresholds.dead, partial(_plain, text))
    for name, group in record.parameters.items():
        moved = group.update_ratio
        if moved is not None and group.grad > 0 and moved < thresholds.stalled:
            text = f"an update changes the weights by {moved:.0e} of their norm"
            yield Candidate("stalled", name, moved, thresholds.stalled, partial(_plain, text))


def written(found: Candidate, record: Record, layers: dict[str, Layer]) -> Alert:
    """The alert in full."""
    time, text = found.say()
    layer = layers.get(found.layer)
    place = f"{found.layer}, step {record.step}" + ("" if time is None else f", time step {time}")
    advice = ADVICE[found.kind]
    if isinstance(advice, dict):
        family = layer.cell.partition("_")[0] if layer and layer.cell else "block"
        advice = advice.get(family, advice["gru"])
    return Alert(
        found.kind,
        found.layer,
        layer.direction if layer else None,
        record.step,
        time,
        found.value,
        found.threshold,
        f"{found.kind.capitalize()}: {place}: {text}.",
        advice,
    )


def _plain(text: str) -> tuple[None, str]:
    return None, text


def _nonfinite(record: Record, layer: Layer) -> tuple[int, str]:
    for signal, log10 in record.layers[layer.name].signals.items():
        hit = np.flatnonzero(np.isnan(log10) | np.isposinf(log10))
        if len(hit):  # backward meets it where the recurrence ends
            return int(
                hit[0] if layer.reverse else hit[-1]
            ), f"the gradient of {signal} is no finite number from here on"
    raise AssertionError("nothing is broken")


def _through_time(flow: Flow, layer: Layer) -> tuple[str, Any, Callable[[int], int]]:
    """The signal that tells of the state, its change over the distance, and the time step at a distance."""
    name = layer.states[0] if layer.states else "x"
    back = from_the_end(flow.signals[name][None], layer.reverse)
    T = back.shape[1]
    return f"dL/d{name}", changes(back)[1][0], lambda k: k if layer.reverse else T - 1 - k


def _vanishing(record: Record, layer: Layer, threshold: float) -> tuple[int, str]:
    flow = record.layers[layer.name]
    what, change, time = _through_time(flow, layer)
    assert flow.reached is not None
    first, above = flow.reached.last, np.flatnonzero(change >= math.log10(threshold))
    far, end = int(above[-1]), len(change) - 1
    rest = (
        f"at time step {time(end)} it is {10.0 ** change[end]:.0e} of it"
        if change[end] > -np.inf
        else "it ends in zeros"
    )
    text = f"{what} falls below {threshold:.0e} of its value at time step {time(first)}, {far + 1 - first} steps back; {rest}"
    return time(far + 1), text


def _exploding(record: Record, layer: Layer) -> tuple[int, str]:
    flow = record.layers[layer.name]
    what, change, time = _through_time(flow, layer)
    assert flow.reached is not None
    top = int(np.where(np.isfinite(change), change, -np.inf).argmax())
    text = f"{what} grows to {10.0 ** change[top]:.0e} times its value at time step {time(flow.reached.last)}"
    return time(top), text


def _saturated(share: Any, what: str) -> tuple[int, str]:
    return int(share.argmax()), f"{share.mean():.0%} of the values of {what} are at an end of its range"


class Alerts:
    """Those of a run: each kind and layer once, and again when it had been gone for a while.

    `skips`: records that are not finite, one after the other, before it is an alert.
    """

    def __init__(self, most: int = 1000, skips: int = 0) -> None:
        self.found: list[Alert] = []
        self.most, self.skips = most, skips
        self._broken = 0
        self._seen: dict[tuple[str, str], tuple[int, int]] = {}  # the last record with it, and how many there were

    def look(
        self, record: Measured, layers: dict[str, Layer], thresholds: Thresholds, keep: bool = True
    ) -> list[Alert]:
        """What this record has and the ones before had not; `keep`: remember it."""
        broken = self._broken + 1 if record.broken else 0
        if keep:
            self._broken = broken
        if 0 < broken <= self.skips:
            return []
        fresh: list[Alert] = []
        first: dict[tuple[str, str], Candidate] = {}
        for found in candidates(record, layers, thresholds):
            first.setdefault((found.kind, found.layer), found)
        for key, found in first.items():
            last, count = self._seen.get(key, (record.index, 0))
            count = count + 1 if record.index - last <= QUIET else 1
            if count == (thresholds.patience if found.kind == "vanishing" else 1):
                fresh.append(written(found, record, layers))
            if keep:
                self._seen[key] = record.index, count
        if keep:
            self.found += fresh[: max(0, self.most - len(self.found))]
        return fresh
