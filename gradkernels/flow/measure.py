"""From what the leaves of many steps hold to records: one copy to the host, then numpy.

Dims: n steps taken together, T time steps, C columns of a leaf.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gradkernels.flow.history import Block, Flow, Group, Layer, Record
from gradkernels.flow.numbers import Array, Decay, decays, from_the_end, horizons, log10_norm

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


def to_host(
    steps: list[Step], group: Any, size: int
) -> list[tuple[dict[Key, Array], dict[str, Array], dict[str, float], float]]:
    """Of every step: squares by key, squares by group of parameters, dead units, scale. One copy for all of them.

    With a process group squares are added up over its ranks; each rank's loss is the mean over its own part of a batch, and what
    is differentiated is their mean.
    """
    tensors = [
        [*s.found.values(), *s.parameters.values(), *s.dead.values(), *([s.scale] if s.scale is not None else [])]
        for s in steps
    ]
    flat = [t for row in tensors for t in row]
    if all(t.device.type == "cpu" for t in flat):
        arrays = [[t.detach().numpy() for t in row] for row in tensors]
    else:
        device = next(t.device for t in flat if t.device.type != "cpu")
        one = torch.cat([t.detach().to(device, torch.double).flatten() for t in flat]).cpu().numpy()
        cuts = iter(np.split(one, np.cumsum([t.numel() for t in flat])[:-1]))
        arrays = [[next(cuts).reshape(tuple(t.shape)) for t in row] for row in tensors]
    out = []
    for step, row in zip(steps, arrays):
        left = iter(row)
        found = {key: next(left) for key in step.found}
        parameters = {key: next(left) for key in step.parameters}
        dead = {key: float(next(left)) for key in step.dead}
        out.append((found, parameters, dead, float(next(left)) if step.scale is not None else 1.0))
    return out


def records(steps: list[Step], group: Any = None, size: int = 1) -> list[Record]:
    """One record for each step."""
    host = to_host(steps, group, size)
    made = [Record(s.number, s.index, {}) for s in steps]
    # layers of one shape are measured together
    together: dict[tuple[Key, tuple[int, ...]], list[int]] = defaultdict(list)
    for k, (found, *_) in enumerate(host):
        for key, squares in found.items():
            together[key, squares.shape].append(k)
    for (key, shape), which in together.items():
        point, at = key
        squares = np.stack([host[k][0][key] for k in which])
        scale = np.array([host[k][3] for k in which])
        if len(shape) == 1:
            for k, block in zip(which, blocks(squares, scale)):
                made[k].blocks[point.name] = block
            continue
        layer: Layer = point.layers[at]
        for k, flow in zip(which, flows(layer, squares, scale)):
            made[k].layers[layer.name] = flow
    for record, (_, parameters, dead, _) in zip(made, host):
        record.dead = dead
        total = 0.0
        for name, (old, grad, change) in parameters.items():
            total += grad
            ratio = None if np.isnan(change) or old <= 0 else float(np.sqrt(change / old))
            record.parameters[name] = Group(float(np.sqrt(old)), float(np.sqrt(grad)), ratio)
        record.grad_norm = float(np.sqrt(total)) if parameters else None
    return made


def blocks(squares: Array, scale: Array) -> list[Block]:
    """[n, 4] of a block: entrance, exit, residual path, sublayer."""
    ends = log10_norm(squares[:, :2], scale[:, None])
    paths = squares[:, 2:].sum(1)
    return [
        Block(float(e[0]), float(e[1]), float(s[2] / p) if 0 < p < np.inf else None)
        for e, s, p in zip(ends, squares, paths)
    ]


def flows(layer: Layer, squares: Array, scale: Array) -> list[Flow]:
    """[n, steps, C] of a layer. Its sequences may be of other lengths in other steps."""
    S = len(layer.states)
    rows = squares[:, :, S + (layer.kind == "input")]
    lengths = (rows > 0).sum(1)
    if len(lengths) > 1 and (lengths != lengths[0]).any():
        return [flow for k in range(len(squares)) for flow in flows(layer, squares[k : k + 1], scale[k : k + 1])]
    T = int(lengths[0])
    names = [*layer.states, "x"]
    columns = [*range(S), S if layer.kind == "input" else S + 1]
    log10 = log10_norm(squares[:, :T, columns], scale[:, None, None]).astype(np.float32)
    seen = squares[:, :T, columns[-1]].any(1)  # whether there was a gradient of x at all
    E = len(layer.activations) if squares.shape[2] > S + 2 else 0
    counts = squares[:, :T, S + 2 : S + 2 + E]
    with np.errstate(invalid="ignore"):
        shares = (counts / squares[:, :T, S + 2 + E :]).astype(np.float32) if E else counts
    back = from_the_end(log10[:, :, 0], layer.reverse)
    far: list[int | None] = horizons(back)
    fits: list[Decay | None] = decays(back)
    out = []
    for k in range(len(squares)):
        signals = {name: log10[k, :, j] for j, name in enumerate(names) if name != "x" or seen[k]}
        saturation = {name: shares[k, :, j] for j, (name, _) in enumerate(layer.activations[:E])}
        out.append(Flow(signals, saturation, far[k], fits[k]))
    return out
