"""What is asked, what a trivial answer loses, and that a model without the way back cannot do better."""

import math

import pytest
import torch

from gradkernels.tasks import adding, copy_memory, subject_verb
from gradkernels.tasks.generators import LINKS, NOUNS, WORDS

TASKS = [
    copy_memory(batch=5, delay=7, items=3, seed=1),
    adding(batch=5, delay=9, seed=1),
    subject_verb(batch=5, attractors=3, seed=1),
]
of_each = pytest.mark.parametrize("task", TASKS, ids=lambda t: type(t).__name__)


@of_each
def test_the_same_batches_for_the_same_seed(task):
    one, other = task.batches(), task.batches()
    for _ in range(3):
        for a, b in zip(next(one), next(other)):
            assert torch.equal(a, b)
    again = next(type(task)(**{**vars(task), "seed": 2}).batches())[0]
    assert not torch.equal(again, next(task.batches())[0])


@of_each
def test_shapes(task):
    inputs, _ = next(task.batches())
    assert inputs.shape[:2] == (task.steps, 5)
    if task.symbols is None:
        assert inputs.shape[2] == task.inputs and inputs.dtype is torch.float32
    else:
        assert inputs.dtype is torch.int64 and 0 <= inputs.min() and inputs.max() < task.symbols


def test_copy_memory():
    inputs, targets = next(TASKS[0].batches())
    assert inputs.shape == (13, 5) and (inputs[:3] < 8).all() and torch.equal(inputs[:3], targets[-3:])
    assert (
        (inputs[3:9] == 8).all() and (inputs[9] == 9).all() and (inputs[10:] == 8).all() and (targets[:10] == 8).all()
    )


def test_adding():
    inputs, targets = next(TASKS[1].batches())
    marks = inputs[..., 1]
    assert (
        (marks[:4].sum(0) == 1).all() and (marks[4:].sum(0) == 1).all() and set(marks.unique().tolist()) == {0.0, 1.0}
    )
    torch.testing.assert_close((inputs[..., 0] * marks).sum(0), targets)


def test_subject_verb():
    inputs, targets = next(TASKS[2].batches())
    for sentence, target in zip(TASKS[2].text(inputs), targets.tolist()):
        words = sentence.split()
        assert words[0] == "the" and len(words) == 11
        assert target == NOUNS.index(words[1]) % 2 == words[1].endswith(("s", "children"))
        assert all(w in LINKS for w in words[2::3]) and all(w in NOUNS for w in words[4::3])
    assert len(set(WORDS)) == len(WORDS)


def best_outputs(task, targets):
    """What is best without memory: blanks and then anything alike, the mean, or a coin."""
    out = torch.zeros(task.steps, task.batch, task.outputs)
    if task is TASKS[0]:
        out[: -task.items, :, 8] = 50.0
        out[-task.items :, :, 8] = -50.0
    elif task is TASKS[1]:
        out += 1.0
    return out


@of_each
def test_trivial_loss(task):
    """It is the loss of that answer, exactly or in the mean."""
    batches, losses = task.batches(), []
    for _ in range(400):
        _, targets = next(batches)
        losses.append(float(task.loss(best_outputs(task, targets), targets)))
    assert math.fsum(losses) / 400 == pytest.approx(task.trivial, rel=0.05 if task is TASKS[1] else 1e-5)


@of_each
def test_the_right_answer_is_right(task):
    _, targets = next(task.batches())
    out = torch.zeros(task.steps, task.batch, task.outputs)
    if task is TASKS[0]:
        out.scatter_(2, targets.unsqueeze(2), 50.0)
    elif task is TASKS[1]:
        out[-1, :, 0] = targets
    else:
        out[-1].scatter_(1, targets.unsqueeze(1), 50.0)
    assert task.right(out, targets) == 1.0 and float(task.loss(out, targets)) < 1e-6
    assert task.right(-out, targets) < 1.0


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: copy_memory(batch=0), "batch must be at least 1, got 0"),
        (lambda: copy_memory(delay=0), "delay must be at least 1, got 0"),
        (lambda: copy_memory(items=-1), "items must be at least 1, got -1"),
        (lambda: adding(delay=1), "delay must be at least 2, got 1"),
        (lambda: subject_verb(attractors=0), "attractors must be at least 1, got 0"),
    ],
)
def test_wrong_sizes(make, message):
    with pytest.raises(ValueError, match=message):
        make()
