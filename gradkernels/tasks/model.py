"""Models that read a task's sequences: any recurrent cell, attention, or convolution between the same two ends."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor, nn

import gradkernels as gk
from gradkernels.tasks.generators import Task

BODIES = ("attention", "convolution")


class SequenceModel(nn.Module):
    """ends of a task around a body: [T, B] symbols or [T, B, inputs] numbers -> [T, B, outputs].

    Args:
        task: whose symbols are read and whose outputs are made.
        body: a name in `gradkernels.cells.CELLS`; "attention": two causal blocks; "convolution": a WaveNet whose dilations double
            until they span the task.
        hidden: units.

    Raises:
        ValueError: an unknown body.

    >>> from gradkernels.tasks import copy_memory
    >>> task = copy_memory(batch=2, delay=3)
    >>> SequenceModel(task, "gru", hidden=8)(next(task.batches())[0]).shape
    torch.Size([23, 2, 9])
    """

    def __init__(self, task: Task, body: str = "lstm", hidden: int = 64) -> None:
        super().__init__()
        if body not in gk.cells.CELLS and body not in BODIES:
            raise ValueError(f"unknown body {body!r}; there are {', '.join((*BODIES, *gk.cells.CELLS))}")
        self.reads = nn.Linear(task.inputs, hidden) if task.symbols is None else nn.Embedding(task.symbols, hidden)
        if body == "attention":
            self.body: nn.Module = Attention(hidden, task.steps)
        elif body == "convolution":
            layers = max(1, math.ceil(math.log2(task.steps)))
            self.body = gk.nn.WaveNet(hidden, hidden, channels=hidden, dilations=tuple(2**k for k in range(layers)))
        else:
            self.body = gk.nn.Recurrent(body, hidden, hidden)
        self.head = nn.Linear(hidden, task.outputs)

    def forward(self, inputs: Tensor) -> Tensor:
        x = self.reads(inputs)
        if isinstance(self.body, nn.RNNBase):
            y = self.body(x)[0]
        else:
            y = self.body(x.transpose(0, 1)).transpose(0, 1)
        return self.head(y)


class Attention(nn.Module):
    """Two blocks of causal attention over tokens that are told their place: [B, T, hidden] to the same."""

    def __init__(self, hidden: int, steps: int, heads: int = 4) -> None:
        super().__init__()
        heads = math.gcd(hidden, heads)
        self.place = nn.Parameter(torch.randn(steps, hidden) * 0.1)
        block = functools.partial(gk.nn.AttentionBlock, hidden, heads, dropout=0.0, norm="pre", causal=True)
        mix = lambda: nn.Sequential(nn.Linear(hidden, 2 * hidden), nn.GELU(), nn.Linear(2 * hidden, hidden))
        mixed = lambda: gk.nn.ResidualBlock(mix(), hidden, dropout=0.0)
        self.blocks = nn.Sequential(block(), mixed(), block(), mixed())

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.blocks(x + self.place[: x.shape[1]])
        return y
