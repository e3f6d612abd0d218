"""A long sequence in windows: the states between them are kept, and in backward each window is computed again.

Of T steps backward then needs x, T / k states and what k steps keep. Dims: as in recurrent.py; k steps of a window.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.function import Function
from torch.utils.checkpoint import checkpoint

from gradkernels.backends._extra import Extra
from gradkernels.cells import Cell
from gradkernels.ops import _recurrent_op as op
from gradkernels.ops._recurrent_autograd import bundle, differentiated
from gradkernels.ops._recurrent_call import Inputs, Tensors, autocast, call
from gradkernels.ops._recurrent_checks import check_extra
from gradkernels.ops._recurrent_taps import fit, measured


class Window(NamedTuple):
    steps: slice
    tokens: slice  # rows of x: steps of a padded batch, tokens of a packed one
    batch_sizes: Tensor | None
    lengths: Tensor | None
    extra: Extra


def windows(size: int, x: Tensor, batch_sizes: Tensor | None, lengths: Tensor | None, extra: Extra) -> Iterator[Window]:
    """In the order of time. A window draws the masks that the whole sequence has there."""
    T, wide = (x.shape[0], x.shape[1]) if batch_sizes is None else (batch_sizes.shape[0], 1)
    starts = range(0, max(T, 1), size)
    rows = (
        [min(size, T - t) for t in starts] if batch_sizes is None else [int(v.sum()) for v in batch_sizes.split(size)]
    )
    for t, end, n in zip(starts, itertools.accumulate(rows), rows):
        steps, tokens, first = slice(t, min(T, t + size)), slice(end - n, end), (end - n) * wide
        yield Window(
            steps,
            tokens,
            None if batch_sizes is None else batch_sizes[steps],
            None if lengths is None else (lengths - t).clamp(0, steps.stop - t),
            extra._replace(first=first, flags=None if extra.flags is None else extra.flags[first : end * wide]),
        )


class Windowed(Function):
    """(state sequences, final states) of (x, weights, params, state); how: what is no tensor."""

    @staticmethod
    def forward(ctx, how, batch_sizes, lengths, seed, flags, x, w_ih, b_ih, w_hh, b_hh, w_hr, params, probe, *state):
        name, reverse, backend, *_, size, every_state = how
        each = list(windows(size, x, batch_sizes, lengths, bundle(params, seed, flags, how[:8])))
        S, seqs, borders = len(state), [None] * len(each), [None] * len(each)
        for k in reversed(range(len(each))) if reverse else range(len(each)):
            w, borders[k] = each[k], state
            where = list(state), w.batch_sizes, w.lengths, reverse, int(every_state), backend, w.extra
            out = op.forward(name, x[w.tokens], w_ih, b_ih, w_hh, b_hh, w_hr, *where)
            seqs[k], state = out[: len(out) - S], out[len(out) - S :]
        ctx.how, ctx.S, ctx.probe = how, S, None if probe is None else probe.shape
        ctx.set_materialize_grads(False)
        kept = [v for b in borders for v in b]
        ctx.save_for_backward(batch_sizes, lengths, seed, flags, x, w_ih, b_ih, w_hh, b_hh, w_hr, params, probe, *kept)
        return (*map(torch.cat, zip(*seqs)), *state)

    @staticmethod
    def backward(ctx, *grads):
        name, reverse, backend, *_, size, every_state = ctx.how
        kept = ctx.saved_tensors  # each time that it is asked it unpacks them all
        batch_sizes, lengths, seed, flags, *inputs, params, probe = kept[:12]
        borders = [kept[k : k + ctx.S] for k in range(12, len(kept), ctx.S)]
        extra, c = bundle(params, seed, flags, ctx.how[:8]), op.cell_of(name)
        if differentiated():
            first = borders[-1 if reverse else 0]
            values = [*inputs, params, probe, *first]
            with torch.enable_grad():
                run = one_by_one(
                    size, c, name, inputs, first, batch_sizes, lengths, reverse, probe, every_state, backend, extra
                )
                out = [*(run[0] if every_state else run[:1]), *run[1]]
            there = [(v, g) for v, g in zip(out, grads) if g is not None and v.requires_grad]
            asked = [v for v, wanted in zip(values, ctx.needs_input_grad[5:]) if wanted]
            found = iter([None] * len(asked))
            if there:
                out, given = zip(*there)
                found = iter(torch.autograd.grad(out, asked, given, create_graph=True, allow_unused=True))
            return None, None, None, None, None, *(next(found) if w else None for w in ctx.needs_input_grad[5:])

        x, w_ih, b_ih, w_hh, b_hh, w_hr = inputs
        S, need = c.S, list(ctx.needs_input_grad[5:12])
        norms = probe is not None and ctx.needs_input_grad[12]
        split = S if every_state else 1
        gseq, ds = [*grads[:split], *[None] * (S - split)], list(grads[split:])
        each = list(windows(size, x, batch_sizes, lengths, extra))
        dx, sizes, sums = [None] * len(each), [None] * len(each), None
        for k in range(len(each)) if reverse else reversed(range(len(each))):
            w, state, part = each[k], list(borders[k]), x[each[k].tokens]
            steps = state, w.batch_sizes, w.lengths, reverse
            out = op.forward(name, part, w_ih, b_ih, w_hh, b_hh, w_hr, *steps, 2, backend, w.extra)
            saved = [*out[:S], *out[2 * S :]]
            given = [*(None if g is None else g[w.tokens] for g in gseq), *ds]
            got = iter(
                op.backward(name, given, part, w_ih, w_hh, w_hr, saved, *steps, need, False, norms, backend, w.extra)
            )
            found = [next(got) if wanted else None for wanted in need]
            ds = [next(got) for _ in range(S)]
            dx[k] = found[0]
            if norms:
                sizes[k] = measured(c, ctx.probe[1], next(got), found[0], saved, w.batch_sizes, w.lengths)
            wide = [v if v is None or v.dtype == torch.float64 else v.float() for v in found[1:]]
            sums = wide if sums is None else [u if u is None else u.add_(v) for u, v in zip(sums, wide)]
        size = fit(torch.cat(sizes), ctx.probe) if norms else None
        sums = [v if v is None else v.to(x.dtype) for v in sums]
        return None, None, None, None, None, torch.cat(dx) if need[0] else None, *sums, size, *ds


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
    """What `call` returns."""
    how = batch_sizes, lengths, reverse, probe, every_state, backend
    plain = torch.compiler.is_compiling() or torch._C._is_tracing() or torch._C._are_functorch_transforms_active()
    if plain or forward_ad._current_level >= 0 or not torch.is_grad_enabled():
        return one_by_one(size, cell, name, tensors, state, *how, extra)
    if torch._C._is_any_autocast_enabled() and torch.is_autocast_enabled(tensors[0].device.type):
        tensors, state, extra = autocast(tensors, state, extra)
    check_extra(cell, tensors[0], tensors[3], extra)
    params, seed, noise, flags, *more = extra
    fixed = name, reverse, backend, noise, *more, size, every_state
    out = Windowed.apply(fixed, batch_sizes, lengths, seed, flags, *tensors, params, probe, *state)
    S = cell.S
    return out[: len(out) - S] if every_state else out[0], tuple(out[len(out) - S :])


def one_by_one(
    size, cell, name, tensors, state, batch_sizes, lengths, reverse, probe, every_state, backend, extra
) -> tuple[Tensor | Tensors, Tensors]:
    """The same as one call after the other: all is kept, but in a compiled graph, which computes again what is marked so."""
    x, *weights = tensors
    T = x.shape[0] if batch_sizes is None else batch_sizes.shape[0]
    each = list(windows(size, x, batch_sizes, lengths, extra))
    outs: list[Any] = [None] * len(each)
    for k in reversed(range(len(each))) if reverse else range(len(each)):
        w = each[k]
        more = None if probe is None else of_window(probe, T, w.steps)
        how = w.batch_sizes, w.lengths, reverse, more, every_state, backend, w.extra

        def window(x, *state, how=how):
            return call(cell, name, (x, *weights), state, *how)

        if torch.compiler.is_compiling() and torch.is_grad_enabled():
            outs[k] = checkpoint(window, x[w.tokens], *state, use_reentrant=False)
        else:
            outs[k] = window(x[w.tokens], *state)
        state = outs[k][1]
    seqs = [seq for seq, _ in outs]
    return tuple(map(torch.cat, zip(*seqs))) if every_state else torch.cat(seqs), tuple(state)


def of_window(probe: Tensor, T: int, steps: slice) -> Tensor | None:
    """The part of a probe of a sequence of T steps; one that is shorter has the last steps."""
    missing = max(0, T - probe.shape[0])
    return probe[max(0, steps.start - missing) : steps.stop - missing] if steps.stop > missing else None
