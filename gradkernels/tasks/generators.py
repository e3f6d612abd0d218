"""Tasks that need a gradient over a known distance, each with the loss of whoever remembers nothing.

Dims: T steps, B sequences, C classes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Task:
    """Batches without end, what is asked of a model, and how far a trivial answer gets: :func:`copy_memory`, :func:`adding`,
    :func:`subject_verb`, and what a subclass says of `steps`, `trivial`, `draw`, `loss` and `right`.

    Attributes:
        batch: B, sequences in a batch.
        seed: of the sequences.
        symbols: inputs are symbols 0 .. symbols - 1, int64 [T, B]; None: they are numbers, float32 [T, B, inputs].
        inputs: how many numbers a step has.
        outputs: C, the width of what a model returns at every step, [T, B, C].

    Raises:
        ValueError: of the functions that make one, where a size is below 1 (adding: a delay below 2).
        NotImplementedError: of Task itself.

    Example:
        >>> task = adding(batch=4, delay=10)
        >>> inputs, targets = next(task.batches())
        >>> guess = torch.ones(task.steps, task.batch, task.outputs)
        >>> inputs.shape, task.loss(guess, targets).shape, 0 <= task.right(guess, targets) <= 1
        (torch.Size([10, 4, 2]), torch.Size([]), True)
    """

    batch: int
    seed: int

    symbols: int | None = None
    inputs: int = 0
    outputs: int = 0

    @property
    def steps(self) -> int:
        """T, the length of a sequence."""
        raise NotImplementedError

    @property
    def trivial(self) -> float:
        """The least loss without memory."""
        raise NotImplementedError

    def draw(self, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """One batch: inputs, and targets as `loss` takes them."""
        raise NotImplementedError

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """(inputs, targets) without end, the same for the same seed."""
        generator = torch.Generator().manual_seed(self.seed)
        while True:
            yield self.draw(generator)

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:  # outputs [T, B, C]
        """A scalar, to be set beside `trivial`."""
        raise NotImplementedError

    def right(self, outputs: Tensor, targets: Tensor) -> float:
        """The share of what had to be remembered that is right."""
        raise NotImplementedError


@dataclass(frozen=True)
class CopyMemory(Task):
    """See `copy_memory`."""

    delay: int = 100
    items: int = 10
    symbols: int | None = 10  # 8 to remember, a blank, and the signal to answer
    outputs: int = 9

    @property
    def steps(self) -> int:
        return self.delay + 2 * self.items

    @property
    def trivial(self) -> float:
        return self.items * math.log(8) / self.steps

    def draw(self, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        items = torch.randint(8, (self.items, self.batch), generator=generator)
        inputs, targets = torch.full((2, self.steps, self.batch), 8).unbind()
        inputs[: self.items] = targets[-self.items :] = items
        inputs[-self.items - 1] = 9
        return inputs, targets

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(outputs.flatten(0, 1), targets.flatten())

    def right(self, outputs: Tensor, targets: Tensor) -> float:
        return _share(outputs[-self.items :].argmax(-1) == targets[-self.items :])


def copy_memory(batch: int = 32, delay: int = 100, items: int = 10, seed: int = 0) -> CopyMemory:
    """Say again what came first: `items` of 8 symbols, blanks, and after `delay` steps a signal to repeat them in order.

    int64 [delay + 2 items, batch] to the same shape; cross-entropy over all steps, whose trivial value, blanks and then a guess, is
    items log(8) / (delay + 2 items). Hochreiter & Schmidhuber (1997), in the form of Arjovsky, Shah & Bengio (2016).

    >>> task = copy_memory(batch=2, delay=5, items=3)
    >>> inputs, targets = next(task.batches())
    >>> inputs.shape, bool((inputs[:3] == targets[-3:]).all()), round(task.trivial, 3)
    (torch.Size([11, 2]), True, 0.567)
    """
    return CopyMemory(*_checked(batch, seed), delay=_positive(delay, "delay"), items=_positive(items, "items"))


@dataclass(frozen=True)
class Adding(Task):
    """See `adding`."""

    delay: int = 100
    inputs: int = 2
    outputs: int = 1

    @property
    def steps(self) -> int:
        return self.delay

    @property
    def trivial(self) -> float:
        return 1 / 6  # the variance of the sum of two numbers from [0, 1]

    def draw(self, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        T, B = self.delay, self.batch
        numbers, marks = torch.rand(T, B, generator=generator), torch.zeros(T, B)
        first = torch.randint(T // 2, (1, B), generator=generator)
        second = torch.randint(T // 2, T, (1, B), generator=generator)
        marks.scatter_(0, torch.cat([first, second]), 1.0)
        return torch.stack([numbers, marks], -1), (numbers * marks).sum(0)

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return F.mse_loss(outputs[-1, :, 0], targets)

    def right(self, outputs: Tensor, targets: Tensor) -> float:
        return _share((outputs[-1, :, 0] - targets).abs() < 0.1)


def adding(batch: int = 32, delay: int = 100, seed: int = 0) -> Adding:
    """Add two of `delay` numbers from [0, 1], one marked in each half, after the last.

    float32 [delay, batch, 2] (number, mark) to [batch]; mean squared error, of which 1 is always 1/6. Right is within 0.1.
    Hochreiter & Schmidhuber (1997).

    >>> inputs, targets = next(adding(batch=3, delay=6).batches())
    >>> inputs.shape, bool((inputs[..., 1].sum(0) == 2).all()), targets.shape
    (torch.Size([6, 3, 2]), True, torch.Size([3]))
    """
    if delay < 2:
        raise ValueError(f"delay must be at least 2, got {delay}")
    return Adding(*_checked(batch, seed), delay=delay)


NOUNS = (
    "key",
    "keys",
    "cabinet",
    "cabinets",
    "dog",
    "dogs",
    "letter",
    "letters",
    "window",
    "windows",
    "child",
    "children",
)
LINKS = ("near", "behind", "with", "of", "beside", "the")
VERBS = ("is", "are")
WORDS = (*NOUNS, *LINKS)  # nouns alternate: singular, plural


@dataclass(frozen=True)
class SubjectVerb(Task):
    """See `subject_verb`."""

    attractors: int = 4
    symbols: int | None = len(WORDS)
    outputs: int = 2

    @property
    def steps(self) -> int:
        return 2 + 3 * self.attractors

    @property
    def trivial(self) -> float:
        return math.log(2)

    def draw(self, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        the, B = WORDS.index("the"), self.batch
        nouns = torch.randint(len(NOUNS), (1 + self.attractors, B), generator=generator)
        links = torch.randint(len(NOUNS), the, (self.attractors, B), generator=generator)
        words = [torch.full((B,), the), nouns[0]]
        for link, noun in zip(links, nouns[1:]):
            words += [link, torch.full((B,), the), noun]
        return torch.stack(words), nouns[0] % 2

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(outputs[-1], targets)

    def right(self, outputs: Tensor, targets: Tensor) -> float:
        return _share(outputs[-1].argmax(-1) == targets)

    def text(self, inputs: Tensor) -> list[str]:
        """Sentences of [T, B]."""
        return [" ".join(WORDS[k] for k in row) for row in inputs.t().tolist()]


def subject_verb(batch: int = 32, attractors: int = 4, seed: int = 0) -> SubjectVerb:
    """Choose the verb, is or are, that goes with the first noun, past `attractors` nouns of either number.

    int64 [2 + 3 attractors, batch] to [batch], 0 singular and 1 plural; cross-entropy, log 2 for a guess. After Linzen, Dupoux &
    Goldberg (2016).

    >>> task = subject_verb(batch=1, attractors=2, seed=1)
    >>> inputs, target = next(task.batches())
    >>> task.text(inputs)[0], VERBS[int(target)]
    ('the keys of the children of the key', 'are')
    """
    return SubjectVerb(*_checked(batch, seed), attractors=_positive(attractors, "attractors"))


def _share(right: Tensor) -> float:
    return float(right.float().mean())


def _positive(value: int, name: str) -> int:
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")
    return value


def _checked(batch: int, seed: int) -> tuple[int, int]:
    return _positive(batch, "batch"), seed
