"""Records on their way to somewhere else: TensorBoard, a file of JSON lines, or anything that takes a dict.

Each of these is given to a monitor, `watch(model, log=[...])`, and is called with every record by the thread that trains; most
of them pass on one in `every`, since writing takes longer than measuring.

Dims: T time steps.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from gradkernels.flow.history import Record
from gradkernels.flow.snapshot import written

EVERY = 16  # records between two that are written
FLOOR = -45.0  # log10 of what is drawn as nothing: the smallest float32 and a bit


def scalars(record: Record, prefix: str = "flow") -> dict[str, float]:
    """The numbers of a record by name, as charts over training want them; what is not finite is left out.

    "flow/encoder.l0/horizon", ".../decay" (decades a step), ".../log10_last" and ".../log10_first" (of the gradient at the last and the
    first time step), ".../saturated_f" (share), "flow/block/residual_share", "flow/encoder.l0/update_ratio", "flow/grad_norm" ...
    """
    found: dict[str, float | None] = {"grad_norm": record.grad_norm}
    for name, flow in record.layers.items():
        signal = next(iter(flow.signals.values()))
        found |= {f"{name}/horizon": flow.horizon, f"{name}/decay": flow.decay and flow.decay.rate}
        found |= (
            {f"{name}/log10_first": float(signal[0]), f"{name}/log10_last": float(signal[-1])} if len(signal) else {}
        )
        found |= {f"{name}/saturated_{gate}": float(share.mean()) for gate, share in flow.saturation.items()}
    for name, block in record.blocks.items():
        found |= {f"{name}/log10_entrance": block.entrance, f"{name}/log10_exit": block.exit}
        found[f"{name}/residual_share"] = block.residual_share
    for name, group in record.parameters.items():
        found |= {f"{name}/norm": group.norm, f"{name}/grad": group.grad, f"{name}/update_ratio": group.update_ratio}
    found |= {f"{name}/dead": share for name, share in record.dead.items()}
    return {f"{prefix}/{k}": v for k, v in found.items() if v is not None and math.isfinite(v)}


class DictLog:
    """Calls `log(dict, step=...)`, as `wandb.log` and `trackio.log` take it, with the :func:`scalars` of a record.

    >>> import torch, gradkernels as gk
    >>> seen = []
    >>> model = gk.nn.GRU(3, 4)
    >>> monitor = gk.flow.watch(model, log=[DictLog(lambda values, step: seen.append(values))])
    >>> model(torch.randn(5, 2, 3))[0].sum().backward()
    >>> monitor.close()
    >>> seen[0]["flow/GRU.l0/horizon"]
    4
    """

    def __init__(self, log: Callable[..., object], every: int = EVERY, prefix: str = "flow") -> None:
        if not callable(log):
            raise TypeError(f"log must be a function of a dict and step, got {type(log).__name__}")
        self.log, self.every, self.prefix = log, _positive(every), prefix

    def __call__(self, record: Record) -> None:
        if record.index % self.every == 0:
            self.log(scalars(record, self.prefix), step=record.step)


class TensorBoardLog:
    """Writes to a SummaryWriter, torch's or tensorboardX's: scalars, and the norms over time as a histogram.

    In the tab of histograms, a bucket is a time step and its height how far the norm is above 1e-45: over training they are a
    picture of time step by training step. (Percentiles of these mean nothing.)
    """

    def __init__(self, writer: Any, every: int = EVERY, prefix: str = "flow") -> None:
        if not hasattr(writer, "add_scalar"):
            raise TypeError(f"writer must be a SummaryWriter, got {type(writer).__name__}")
        self.writer, self.every, self.prefix = writer, _positive(every), prefix

    def __call__(self, record: Record) -> None:
        if record.index % self.every:
            return
        for name, value in scalars(record, self.prefix).items():
            self.writer.add_scalar(name, value, record.step)
        for layer, flow in record.layers.items():
            for signal, log10 in flow.signals.items():
                heights = np.clip(np.nan_to_num(log10, nan=FLOOR, neginf=FLOOR, posinf=FLOOR) - FLOOR, 0, None)
                self._histogram(f"{self.prefix}/{layer}/dL_d{signal}_by_time", heights.astype(np.float64), record.step)

    def _histogram(self, name: str, heights: Any, step: int) -> None:  # [T]
        T, total = len(heights), float(heights.sum())
        t = np.arange(T)
        self.writer.add_histogram_raw(
            name,
            min=0.0,
            max=float(T),
            num=total,
            sum=float(((t + 0.5) * heights).sum()),
            sum_squares=float(((t + 0.5) ** 2 * heights).sum()),
            bucket_limits=(t + 1.0).tolist(),
            bucket_counts=heights.tolist(),
            global_step=step,
        )


class JsonlLog:
    """Appends a line of JSON for a record to a file: step, layers with their norms over time, blocks, parameters.

    Args:
        path: the file; made if it is not there.
        every: how many records come to one line.

    Raises:
        OSError: the file cannot be written; said at once, not hours later.
    """

    def __init__(self, path: str | Path, every: int = EVERY) -> None:
        self.every = _positive(every)
        self.file = open(path, "a", encoding="utf-8", buffering=1)  # noqa: SIM115 - as long as the run

    def __call__(self, record: Record) -> None:
        if record.index % self.every == 0:
            self.file.write(json.dumps({"step": record.step, **written(record)}, allow_nan=False) + "\n")

    def close(self) -> None:
        self.file.close()


def _positive(every: int) -> int:
    if not isinstance(every, int) or every < 1:
        raise ValueError(f"every must be a positive integer, got {every!r}")
    return every
