"""Derivatives of the two operators: one autograd Function for each, so that what is differentiated can be differentiated again.

First derivatives are the backward operator; everything beyond comes from the reference, in torch operations. Each Function
exists twice: Dynamo refuses one that has a `jvp`, so compiled code takes the base and eager code a subclass with it.
"""

from __future__ import annotations

import torch
from torch.autograd import forward_ad
from torch.autograd.function import Function

from gradkernels.backends import reference
from gradkernels.backends._extra import PLAIN, Extra
from gradkernels.ops import _recurrent_op as op
from gradkernels.ops._recurrent_taps import fit, measured

# ---------------------------------------------------------------- vmap: the mapped dimension joins the batch


def fold(v, d, axis, N):
    """The mapped dimension goes in after the one that counts rows, so that every row becomes N rows side by side: steps stay
    in order, in a packed batch too."""
    if v is None:
        return None
    v = v.unsqueeze(0).expand(N, *v.shape) if d is None else v.movedim(d, 0)
    return v.movedim(0, axis + 1).flatten(axis, axis + 1)


def unfold(v, axis, N):
    """Rows apart again; the mapped dimension is then `axis + 1`."""
    return v.unflatten(axis, (v.shape[axis] // N, N))


def fold_steps(batch_sizes, lengths, N):
    return None if batch_sizes is None else batch_sizes * N, None if lengths is None else lengths.repeat_interleave(N)


def each(N, dims, args, call):
    """One call per element: where weights differ there is nothing to share."""
    outs = [call(*[v.select(d, k) if type(d) is int else v for v, d in zip(args, dims)]) for k in range(N)]
    return tuple(torch.stack(v) for v in zip(*outs)), (0,) * len(outs[0])


def mapped_forward(N, dims, args, call, sequences):
    """vmap of `Recurrent`: arguments as its forward takes them -> outputs, the first of them sequences, and where their mapped
    dimension is. Masks know their tokens: with a seed or flags the rows are not joined."""
    if any(v is not None for v in args[3:5]) or any(d is not None for d in (*dims[1:5], *dims[6:13])):
        return each(N, dims, args, call)
    x, state = args[5], args[13:]
    row = x.dim() - 2 - (dims[5] is not None)  # the dimension of x that counts rows of a step
    steps = fold_steps(*args[1:3], N)
    states = [fold(v, d, 0, N) for v, d in zip(state, dims[13:])]
    out = call(args[0], *steps, None, None, fold(x, dims[5], row, N), *args[6:13], *states)
    axes = [row] * sequences + [0] * (len(out) - sequences)
    return tuple(unfold(v, axis, N) for v, axis in zip(out, axes)), tuple(axis + 1 for axis in axes)


def mapped_backward(N, dims, args, call):
    """vmap of `RecurrentBackward`: one call for the parts, weight gradients as batched products of them."""
    how, need, gates, norms, batch_sizes, lengths, seed, flags, *tensors = args
    c, reverse, at = op.cell_of(how[0]), how[1], dims[8:]
    S = c.S
    drawn = seed is not None or flags is not None
    if norms or drawn or any(d is not None for d in (*dims[4:8], *at[1:7])):
        return each(N, dims, args, call)
    n = len(tensors) - 7 - 3 * S  # saved tensors
    row = tensors[0].dim() - 2 - (at[0] is not None)
    axes = [row, *[None] * 6, *[0] * S, *[row] * S, *[0] * (n - S), *[row] * S, *[0] * S]
    folded = [v if axis is None or v is None else fold(v, d, axis, N) for v, d, axis in zip(tensors, at, axes)]
    many, long = fold_steps(batch_sizes, lengths, N)
    out = call(how, need, True, norms, many, long, None, None, *folded)
    parts, dstate = out[: len(out) - S], out[len(out) - S :]
    ends = [unfold(v, 0, N) for v in dstate], [1] * S
    if gates:
        return (*(unfold(v, row, N) for v in parts), *ends[0]), (*[row + 1] * len(parts), *ends[1])
    x, w_ih, state = folded[0], tensors[1], folded[7 : 7 + S]
    got, where = [], []
    if need[0]:
        got.append(unfold(parts[0] if w_ih is None else parts[0] @ w_ih, row, N))
        where.append(row + 1)
    if any(need[1:]):
        left = iter(parts[1:])
        layout = reference.Layout(x, state[0].shape[0], many, long)
        rows = lambda v: layout.rows(reference.precise(v))
        dgates = rows(parts[0])
        dr = rows(next(left)) if c.split else dgates
        operand = rows(next(left)) if c.second else None
        dproj, raw = (
            (None, None)
            if tensors[5] is None
            else (rows(next(left)), layout.kept(reference.precise(folded[7 + 2 * S])))
        )
        dparams = rows(next(left)) if need[6] else None
        y, h0 = rows(folded[7 + S]), layout.batch(reference.precise(state[0]))
        with reference.no_autocast(x.device):
            products = reference.weight_gradients(
                c, dgates, dr, operand, dproj, dparams, rows(x), y, raw, h0, layout.batch_sizes, reverse, need,
                how[-1], mapped=N,
            )  # fmt: skip
        got += [v.to(x.dtype) for v in products]
        where += [0] * len(products)
    return (*got, *ends[0]), (*where, *ends[1])


# ---------------------------------------------------------------- the two Functions


class Recurrent(Function):
    """(state sequences, final states, (raw,) acts) of (x, weights, params, state).

    how: what is no tensor, (cell, reverse, backend, noise, skip, clip, first, heads), the last five as in Extra.

    The input projection is inside: double backward then needs x, not the gates, which are G planes more to keep."""

    @staticmethod
    def forward(how, batch_sizes, lengths, seed, flags, x, w_ih, b_ih, w_hh, b_hh, w_hr, params, probe, *state):
        call = list(state), batch_sizes, lengths, how[1], 2, how[2], bundle(params, seed, flags, how)
        return tuple(op.forward(how[0], x, w_ih, b_ih, w_hh, b_hh, w_hr, *call))

    @staticmethod
    def setup_context(ctx, inputs, output):
        probe, S = inputs[12], len(inputs) - 13
        ctx.spec = inputs[0], S, None if probe is None else probe.shape
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*output[2 * S :])
        keep = *inputs[1:12], *inputs[13:], *output[:S], *output[2 * S :]
        ctx.save_for_backward(*keep)
        ctx.save_for_forward(*keep)

    @staticmethod
    def backward(ctx, *grads):
        how, S, probe = ctx.spec
        cell, reverse, backend, *_ = how
        batch_sizes, lengths, seed, flags, x, w_ih, b_ih, w_hh, b_hh, w_hr, params, *rest = ctx.saved_tensors
        state, saved, grads = rest[:S], rest[S:], list(grads[: 2 * S])
        need = list(ctx.needs_input_grad[5:12])
        norms = probe is not None and ctx.needs_input_grad[12]
        if torch.compiler.is_compiling() or not differentiated():  # a compiled graph has no second derivative
            call = reverse, need, False, norms, backend, bundle(params, seed, flags, how)
            out = op.backward(cell, grads, x, w_ih, w_hh, w_hr, saved, state, batch_sizes, lengths, *call)
        else:
            tensors = x, w_ih, b_ih, w_hh, b_hh, w_hr, params, *state, *saved, *grads
            out = apply(RecurrentBackward)(how, tuple(need), False, norms, batch_sizes, lengths, seed, flags, *tensors)
        k, got = 0, []
        for wanted in need:
            got.append(out[k] if wanted else None)
            k += 1 if wanted else 0
        size = None
        if norms:
            size = measured(op.cell_of(cell), probe[1], out[k + S], got[0], saved, batch_sizes, lengths)
            size = fit(size, probe)
        return None, None, None, None, None, *got, size, *out[k : k + S]

    @staticmethod
    def vmap(info, dims, *args):
        return mapped_forward(info.batch_size, dims, args, apply(Recurrent), len(args) - 13)

    @staticmethod
    def push(spec, saved, tangents):
        (how, S, _), (batch_sizes, lengths, seed, flags, *tensors) = spec, saved
        moving, dstate = tangents[5:12], tangents[13:]
        call = batch_sizes, lengths, how[1], bundle(tensors[6], seed, flags, how)
        seq, final = reference.tangent(op.cell_of(how[0]), tensors[:7], moving, tensors[7 : 7 + S], dstate, *call)
        return (*seq, *final, *[None] * (len(tensors) - 7 - 2 * S))


class RecurrentBackward(Function):
    """The backward operator; its own derivatives, to any order, are those of the reference."""

    @staticmethod
    def forward(
        how, need, gates, norms, batch_sizes, lengths, seed, flags, x, w_ih, b_ih, w_hh, b_hh, w_hr, params, *rest
    ):
        cell, reverse, backend, *_ = how
        S = op.cell_of(cell).S
        state, saved, grads = list(rest[:S]), list(rest[S : -2 * S]), list(rest[-2 * S :])
        call = reverse, list(need), gates, norms, backend, bundle(params, seed, flags, how)
        return tuple(op.backward(cell, grads, x, w_ih, w_hh, w_hr, saved, state, batch_sizes, lengths, *call))

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.spec = inputs[:4]
        if inputs[3]:  # norms
            ctx.mark_non_differentiable(output[-1])
        ctx.save_for_backward(*inputs[4:])
        ctx.save_for_forward(*inputs[4:])

    @staticmethod
    def reference(spec, saved):
        """The same as a function of the tensors that it depends on, and where those are among the inputs. What forward had
        kept is not among them: it is computed again, so that its dependence on the inputs is seen."""
        (how, need, gates, _), (batch_sizes, lengths, seed, flags, *tensors) = spec, saved
        c = op.cell_of(how[0])
        first = len(tensors) - 2 * c.S  # of the gradients
        places = [k for k, v in enumerate(tensors) if v is not None and not 7 + c.S <= k < first]

        def run(*values):
            full = dict(zip(places, values))
            x, w_ih, b_ih, w_hh, b_hh, w_hr, params, *state = (full.get(k) for k in range(7 + c.S))
            grads = [full.get(k) for k in range(first, len(tensors))]
            steps, extra = (state, batch_sizes, lengths, how[1]), bundle(params, seed, flags, how)
            out = reference.forward(c, x, w_ih, b_ih, w_hh, b_hh, w_hr, *steps, 2, extra)
            kept = out[: c.S] + out[2 * c.S :]
            return tuple(reference.backward(c, grads, x, w_ih, w_hh, w_hr, kept, *steps, need, gates, False, extra))

        return run, places, tensors

    @staticmethod
    def backward(ctx, *cotangents):
        run, places, tensors = RecurrentBackward.reference(ctx.spec, ctx.saved_tensors)
        _, pull = torch.func.vjp(run, *[tensors[k] for k in places])
        norms = ctx.spec[-1]
        got = dict(zip(places, pull(tuple(cotangents[: len(cotangents) - norms]))))
        return (*[None] * 8, *(got.get(k) for k in range(len(tensors))))

    @staticmethod
    def push(spec, saved, tangents):
        run, places, tensors = RecurrentBackward.reference(spec, saved)
        values = [tensors[k] for k in places]
        moving = [torch.zeros_like(v) if tangents[8 + k] is None else tangents[8 + k] for k, v in zip(places, values)]
        out, pull = torch.func.vjp(run, *values)  # reverse twice: a dual_level does not nest
        _, push = torch.func.vjp(lambda *u: pull(u), *[torch.zeros_like(v) for v in out])
        return (*push(tuple(moving)), *[None] * spec[-1])

    @staticmethod
    def vmap(info, dims, *args):
        return mapped_backward(info.batch_size, dims, args, apply(RecurrentBackward))


def bundle(params, seed, flags, how):
    """The Extra of a call."""
    _, _, _, noise, skip, clip, first, heads = how
    if params is None and not (noise or skip or clip or first) and heads == 1:
        return PLAIN
    return Extra(params, seed, noise, flags, skip, clip, first, heads)


def eager(base):
    """The same Function with what Dynamo refuses."""

    class Eager(base):
        @staticmethod
        def jvp(ctx, *tangents):
            with forward_ad._set_fwd_grad_enabled(
                True
            ):  # torch calls jvp with forward mode off: jvp of jvp would silently be zero
                saved = [v if v is None else forward_ad.unpack_dual(v).primal for v in ctx.saved_tensors]
                return base.push(ctx.spec, saved, tangents)

    return Eager


for _base in (Recurrent, RecurrentBackward):
    _base.eager = eager(_base)
    # Function.apply binds its arguments to inspect.signature(forward) at every call, 28 microseconds; the method below it does not
    _base.fast = super(Function, _base.eager).apply


def apply(base):
    if torch.compiler.is_compiling():
        return base.apply
    return base.eager.apply if torch._C._are_functorch_transforms_active() else base.fast


def differentiated():
    """Somebody may want the derivative of what runs now."""
    return torch.is_grad_enabled() or forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active()
