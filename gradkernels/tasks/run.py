"""Train a model on a task, watched: alone, or by torchrun in several processes whose gradients are averaged."""

from __future__ import annotations

import contextlib
import copy
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

import gradkernels as gk
from gradkernels.arguments import INITS
from gradkernels.tasks.generators import Task
from gradkernels.tasks.model import BODIES, SequenceModel


@dataclass(frozen=True)
class Result:
    """What became of a model: loss and share of right answers, means over the last tenth of its steps."""

    loss: float
    trivial: float  # the loss of whoever remembers nothing
    right: float  # share of what had to be remembered
    horizon: int | None  # steps back to which a thousandth of the last output's gradient gets; None: no recurrent layer
    solved_at: int | None  # the first step from which on nine tenths were right; None: never
    steps: int
    seconds: float

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@contextlib.contextmanager
def processes() -> Iterator[tuple[int, int]]:
    """(rank, how many), of torchrun's processes, over gloo where there is no GPU; else (0, 1)."""
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1:
        yield 0, 1
        return
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    try:
        yield dist.get_rank(), count
    finally:
        dist.destroy_process_group()


def make(task: Task, body: str, hidden: int, init: str) -> SequenceModel:
    """A model with its initial weights.

    Raises:
        ValueError: an unknown body or initialisation, or one that this body cannot have.
    """
    if init not in INITS:
        raise ValueError(f"unknown initialisation {init!r}; there are {', '.join(INITS)}")
    model = SequenceModel(task, body, hidden)
    if init != "default" and body in BODIES:
        raise ValueError(f"initialisation {init} is for recurrent cells, not for {body}")
    INITS[init](model.body, task.steps)
    return model


def train(
    task: Task,
    model: nn.Module,
    steps: int,
    rate: float = 2e-3,
    clip: float = 1.0,
    rank: int = 0,
    count: int = 1,
    each: Callable[[int, float, float], object] = lambda step, loss, right: None,
) -> Result:
    """Adam with clipped gradients for so many steps; `each` is told of every one.

    With several processes each draws its own batches, and DistributedDataParallel averages their gradients.
    """
    batches = replace(task, seed=task.seed + 7919 * rank).batches()
    wrapped = nn.parallel.DistributedDataParallel(model) if count > 1 else model
    optimizer = torch.optim.Adam(model.parameters(), lr=rate)
    losses, shares, begin = [], [], time.perf_counter()
    for step in range(steps):
        inputs, targets = next(batches)
        outputs = wrapped(inputs)
        loss = task.loss(outputs, targets)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        losses.append(loss.item())
        shares.append(task.right(outputs.detach(), targets))
        each(step, losses[-1], shares[-1])
    last = max(1, steps // 10)
    mean = lambda values: sum(values[-last:]) / last
    wrong = [k for k, share in enumerate(shares) if share < 0.9]
    solved_at = wrong[-1] + 1 if wrong else 0
    seconds = time.perf_counter() - begin
    found = None if solved_at > steps - last else solved_at
    return Result(mean(losses), task.trivial, mean(shares), horizon(task, model), found, steps, seconds)


def horizon(task: Task, model: SequenceModel) -> int | None:
    """How many steps back a thousandth of the last output's gradient gets; None without a recurrent layer.

    Not of the loss, which may come in at every step: what it hands to the early steps has no way behind it.
    """
    if not isinstance(model.body, nn.RNNBase):
        return None
    one = copy.deepcopy(model)  # the model itself may be watched already
    with gk.flow.watch(one, on_alert=lambda alert: None) as monitor:
        one(next(task.batches())[0])[-1].square().sum().backward()
        return monitor.horizon()
