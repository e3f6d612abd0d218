"""A long sequence in windows: the states between them are kept, and in backward each window is computed again."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from gradkernels.backends._extra import Extra
from gradkernels.cells import Cell
from gradkernels.ops._recurrent_call import Inputs, Tensors, call


def by_windows(
    size: int,  # steps of a window
    cell: Cell,
    name: str,
    tensors: Inputs,
    state: Sequence[Tensor],
    batch_sizes: Tensor | None,
    lengths: Tensor | None,
    reverse: bool,
    probe: Tensor | None,
    every_state: bool,
    backend: str | None,
    extra: Extra,
) -> tuple[Tensor | Tensors, Tensors]:
    """What `call` returns. A window draws the masks that the whole sequence has there."""
    x, *weights = tensors
    T = x.shape[0] if batch_sizes is None else batch_sizes.shape[0]
    starts = range(0, max(T, 1), size)
    if batch_sizes is None:
        tokens = [min(size, T - t) * x.shape[1] for t in starts]
        xs = x.split(size)
    else:
        tokens = [int(v.sum()) for v in batch_sizes.split(size)]
        xs = x.split(tokens)
    ends = list(itertools.accumulate(tokens))
    # in a transform of torch.func nothing is recorded by hooks: there the windows are kept
    again = torch.is_grad_enabled() and not torch._C._are_functorch_transforms_active()
    outs: list[Any] = [None] * len(starts)
    for k in reversed(range(len(starts))) if reverse else range(len(starts)):
        t, first = starts[k], ends[k - 1] if k else 0
        steps = min(size, T - t)
        how = (
            None if batch_sizes is None else batch_sizes[t : t + size],
            None if lengths is None else (lengths - t).clamp(0, steps),
            reverse,
            None if probe is None else part(probe, T, t, t + steps),
            every_state,
            backend,
            extra._replace(first=first, flags=None if extra.flags is None else extra.flags[first : ends[k]]),
        )

        def window(x, *state, how=how):
            return call(cell, name, (x, *weights), state, *how)

        if again:
            outs[k] = checkpoint(window, xs[k], *state, use_reentrant=False, preserve_rng_state=False)
        else:
            outs[k] = window(xs[k], *state)
        state = outs[k][1]
    seqs = [seq for seq, _ in outs]
    return tuple(map(torch.cat, zip(*seqs))) if every_state else torch.cat(seqs), tuple(state)


def part(probe: Tensor, T: int, start: int, end: int) -> Tensor | None:
    """The steps of a window in a probe of a sequence of T steps; one that is shorter has the last steps."""
    missing = max(0, T - probe.shape[0])
    return probe[max(0, start - missing) : end - missing] if end > missing else None
