"""A monitor as numbers, lists and texts: what the report, the live view and files are made of."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

import gradkernels
from gradkernels.flow.history import Layer, Record, numbers
from gradkernels.flow.points import Residual

if TYPE_CHECKING:
    from gradkernels.flow.monitor import Monitor

FORMAT = 1
DIGITS = 4


def snapshot(monitor: Monitor) -> dict[str, Any]:
    kept = list(monitor._history)
    for record in kept:
        record.written = record.written or written(record)
    rows = [record.written for record in kept]
    column = lambda name, kind, key: [w[kind][name][key] if name in w[kind] else None for w in rows]
    table = lambda kind, keys, names: [{"name": n, **{k: column(n, kind, k) for k in keys}} for n in names]
    blocks = [p for p in monitor._points if isinstance(p, Residual)]
    broken = monitor._nonfinite
    return {
        "format": FORMAT,
        "model": monitor.name,
        "versions": {"torch": torch.__version__, "gradkernels": gradkernels.__version__},
        "every": monitor.every,
        "step": monitor.step_count,
        "steps": [record.step for record in kept],
        "layers": [_layer(layer, [w["layers"].get(layer.name) for w in rows]) for layer in monitor.layers.values()],
        "blocks": [
            {**row, "kind": p.kind}
            for p, row in zip(blocks, table("blocks", ("entrance", "exit", "residual_share"), [p.name for p in blocks]))
        ],
        "parameters": table("parameters", ("norm", "grad", "update_ratio"), monitor._weights.names),
        "spectra": [one for taken in monitor._spectra for one in taken],
        "alerts": [alert.to_dict() for alert in monitor._alerts.found],
        "clip_rate": monitor._clips[0] / monitor._clips[1] if monitor._clips[1] else None,
        "nonfinite": broken and {"layer": broken.layer, "step": broken.step, "time_step": broken.time_step},
    }


def _layer(layer: Layer, flows: list[dict[str, Any] | None]) -> dict[str, Any]:
    each = lambda kind, name: [f[kind].get(name) if f else None for f in flows]
    return {
        "name": layer.name,
        "module": layer.module,
        "kind": layer.kind,
        "cell": layer.cell,
        "layer": layer.index,
        "direction": layer.direction,
        "signals": {name: each("signals", name) for name in (*layer.states, "x")},
        "saturation": {name: each("saturation", name) for name, _ in layer.activations},
        "horizon": [f and f["horizon"] for f in flows],
        "decay": [f and f["decay"] for f in flows],
    }


def written(record: Record) -> dict[str, Any]:
    """A record for JSON; made once."""
    one = lambda v, digits=DIGITS: None if v is None else numbers([v], digits)[0]
    return {
        "layers": {
            name: {
                "signals": {k: numbers(v, DIGITS) for k, v in flow.signals.items()},
                "saturation": {k: numbers(v, DIGITS) for k, v in flow.saturation.items()},
                "horizon": flow.horizon,
                "decay": flow.decay and one(flow.decay.rate, 6),
            }
            for name, flow in record.layers.items()
        },
        "blocks": {
            name: {k: one(getattr(b, k)) for k in ("entrance", "exit", "residual_share")}
            for name, b in record.blocks.items()
        },
        "parameters": {
            name: {k: one(getattr(g, k), 12) for k in ("norm", "grad", "update_ratio")}
            for name, g in record.parameters.items()
        },
    }
