"""Training by truncated backpropagation through time, a few steps at a time."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def detach(state):
    """A recurrent state without its history."""
    return tuple(s.detach() for s in state) if isinstance(state, tuple) else state.detach()


class Trainer:
    """AdamW with gradient clipping over (inputs, targets) batches; the state travels from a batch to the next.

    `run` may be called again and again, so that several trainers can take turns.

    >>> from gradkernels.tasks import CharacterModel, characters
    >>> trainer = Trainer(CharacterModel(hidden=8), characters(batch=2, length=4).batches())
    >>> trainer.run(3)
    >>> len(trainer.losses), len(trainer.seconds)
    (3, 3)
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Iterator[tuple[Tensor, Tensor]],
        rate: float = 3e-3,
        clip: float = 1.0,
    ) -> None:
        self.model, self.batches, self.clip = model, batches, clip
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=rate, fused=True)
        self.losses: list[float] = []  # per step, before its update
        self.seconds: list[float] = []  # per step: forward, backward, clipping and update
        self.characters = 0
        self._state = None

    def run(self, steps: int) -> None:
        """Take `steps` more steps."""
        self.model.train()
        for _ in range(steps):
            inputs, targets = next(self.batches)
            start = time.perf_counter()
            logits, state = self.model(inputs, self._state)
            loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
            self.optimizer.step()
            self._state = detach(state)
            self.losses.append(loss.item())
            self.seconds.append(time.perf_counter() - start)
            self.characters += inputs.numel()


@torch.no_grad()
def evaluate(model: nn.Module, batches: Iterator[tuple[Tensor, Tensor]], count: int) -> float:
    """The mean loss over the first `count` batches (fewer when there are fewer), the state carried along."""
    model.eval()
    losses, state = [], None
    for _, (inputs, targets) in zip(range(count), batches):
        logits, state = model(inputs, state)
        losses.append(F.cross_entropy(logits.flatten(0, 1), targets.flatten()).item())
    return math.fsum(losses) / len(losses)
