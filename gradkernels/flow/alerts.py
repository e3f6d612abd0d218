"""What a monitor points out by itself, with what helps.

Each alert names the layer, its direction, the optimizer's step and, where there is one, the time step.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from gradkernels.flow.history import Flow, Layer, Record
from gradkernels.flow.numbers import HORIZON, from_the_end

QUIET = 64  # records that a condition has to be gone for before it is pointed out again

ADVICE = {
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
    """Beyond which a value is an alert."""

    vanishing: float = HORIZON  # ||dL/dh|| over that of the last step; over a block, entrance over exit
    exploding: float = 1e3  # the same
    saturated: float = 0.9  # share of an activation's values within 5 % of an end of its range, over all steps
    dead: float = 0.1  # share of a layer's units that no gradient reaches
    stalled: float = 1e-6  # ||new - old|| / ||old|| of a group that has a gradient


@dataclass(frozen=True)
class Alert:
    """One thing to look at."""

    kind: str  # vanishing | exploding | saturated | dead | stalled | nonfinite
    layer: str
    direction: str | None
    step: int  # of the optimizer
    time_step: int | None
    value: float
    threshold: float
    message: str
    advice: str

    def to_dict(self) -> dict[str, Any]:
        found = asdict(self)
        if not math.isfinite(self.value):
            found["value"] = None
        return found

    def __str__(self) -> str:
        return f"{self.message} {self.advice}"


def alerts_of(record: Record, layers: dict[str, Layer], thresholds: Thresholds) -> Iterator[Alert]:
    """What is wrong in this record, the most fundamental first."""

    def alert(kind: str, layer: str, time: int | None, value: float, threshold: float, text: str, advice: Any) -> Alert:
        known = layers.get(layer)
        direction = known.direction if known else None
        where = f"{layer}, step {record.step}" + (f", time step {time}" if time is not None else "")
        if isinstance(advice, dict):
            family = known.cell.partition("_")[0] if known and known.cell else "block"
            advice = advice.get(family, advice["rnn"])
        return Alert(
            kind,
            layer,
            direction,
            record.step,
            time,
            value,
            threshold,
            f"{kind.capitalize()}: {where}: {text}.",
            advice,
        )

    for name, flow in reversed(record.layers.items()):  # in the order of backward, so that the first is where it began
        for signal, log10 in flow.signals.items():
            if not (broken := np.isnan(log10) | np.isposinf(log10)).any():
                continue
            hit = broken.nonzero()[0]
            t = int(hit[0] if layers[name].reverse else hit[-1])
            text = f"the gradient of {signal} is not a finite number"
            yield alert("nonfinite", name, t, float(10.0 ** log10[t]), math.inf, text, ADVICE["nonfinite"])
            break
    for name, flow in record.layers.items():
        yield from _through_time(name, flow, layers[name], thresholds, alert)
    for name, block in record.blocks.items():
        ratio = block.entrance - block.exit
        if ratio < math.log10(thresholds.vanishing):
            text = f"through the block the gradient shrinks to {10**ratio:.1e} of what it was"
            yield alert("vanishing", name, None, 10**ratio, thresholds.vanishing, text, ADVICE["vanishing"])
        elif ratio > math.log10(thresholds.exploding):
            text = f"through the block the gradient grows to {10**ratio:.1e} times what it was"
            yield alert("exploding", name, None, 10**ratio, thresholds.exploding, text, ADVICE["exploding"])
    for name, share in record.dead.items():
        if share >= thresholds.dead:
            text = f"no gradient reaches {share:.0%} of the units"
            yield alert("dead", name, None, share, thresholds.dead, text, ADVICE["dead"])
    for name, group in record.parameters.items():
        moved = group.update_ratio
        if moved is not None and group.grad > 0 and group.norm > 0 and moved < thresholds.stalled:
            text = f"an update changes the weights by {moved:.1e} of their norm"
            yield alert("stalled", name, None, moved, thresholds.stalled, text, ADVICE["stalled"])


def _through_time(name: str, flow: Flow, layer: Layer, thresholds: Thresholds, alert: Any) -> Iterator[Alert]:
    """Vanishing, exploding and saturated, of one layer."""
    log10 = flow.signals.get("h", flow.signals.get("x"))
    vanishes = False
    if log10 is not None and np.isfinite(log10).any():
        what = "dL/dh" if "h" in flow.signals else "dL/dx"
        back = from_the_end(log10[None], layer.reverse)[0]
        T = len(back)
        time = lambda k: k if layer.reverse else T - 1 - k
        last = int(np.isfinite(back).argmax())
        change = back - back[last]
        reached = np.flatnonzero(change >= math.log10(thresholds.vanishing))[-1]
        vanishes = reached < T - 1 and not np.isnan(back).any()
        if vanishes:
            end = float(10.0 ** change[-1])
            text = (
                f"{what} falls below {thresholds.vanishing:.0e} of its value at time step {time(last)}, {reached - last} steps "
                f"from there" + (f"; at time step {time(T - 1)} it is {end:.0e} of it" if end else "; it ends in zeros")
            )
            yield alert("vanishing", name, time(reached + 1), end, thresholds.vanishing, text, ADVICE["vanishing"])
        finite = np.where(np.isfinite(change), change, -np.inf)
        top = int(finite.argmax())
        if finite[top] > math.log10(thresholds.exploding):
            grown = float(10.0 ** finite[top])
            text = f"{what} grows to {grown:.0e} times its value at time step {time(last)}"
            yield alert("exploding", name, time(top), grown, thresholds.exploding, text, ADVICE["exploding"])
    kinds = dict(layer.activations)
    for gate, share in flow.saturation.items():
        mean = float(share.mean())
        # A gate that stays open or shut is no fault by itself, a long memory is made so; a relu is 0 half of the time.
        harmless = kinds[gate] == "relu" or (kinds[gate] == "sigmoid" and gate != "h" and not vanishes)
        if mean >= thresholds.saturated and not harmless:
            text = f"{mean:.0%} of the values of {kinds[gate]} {gate} are at an end of its range"
            yield alert("saturated", name, int(share.argmax()), mean, thresholds.saturated, text, ADVICE["saturated"])


class Alerts:
    """Those of a run: each kind and layer once, and again when it had been gone for a while."""

    def __init__(self, most: int = 1000) -> None:
        self.found: list[Alert] = []
        self.most = most
        self._seen: dict[tuple[str, str], int] = {}  # the last record with it

    def new(self, record: Record, candidates: Iterator[Alert]) -> list[Alert]:
        """Of the candidates those that were not there before."""
        fresh = []
        for alert in candidates:
            key = alert.kind, alert.layer
            last = self._seen.get(key)
            if last is None or record.index - last > QUIET:
                fresh.append(alert)
            self._seen[key] = record.index
        self.found += fresh[: max(0, self.most - len(self.found))]
        return fresh
