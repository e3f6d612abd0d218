"""The operators called directly, as exported and traced graphs call them: derivatives and vmap of their own.

`torch.library.register_autograd` would do for the first of these, but it takes a list with a None in it, as the gradients are,
for one thing without derivative.
"""

from __future__ import annotations

from itertools import compress
from types import SimpleNamespace

import torch
from torch import Tensor
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import forward_ad
from torch.autograd.function import Function
from torch.utils._pytree import tree_flatten, tree_unflatten

from gradkernels.backends import reference
from gradkernels.ops import _recurrent_op as op
from gradkernels.ops._recurrent_autograd import RecurrentBackward, apply, bundle, mapped_backward, mapped_forward

# ---------------------------------------------------------------- derivatives


class Direct(Function):
    """An operator of lists as a function of what is in them."""

    @staticmethod
    def forward(call, derivative, spec, *flat):
        with torch._C._AutoDispatchBelowAutograd():
            return tuple(call(*tree_unflatten(list(flat), spec)))

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, derivative, spec, *flat = inputs
        is_tensor = [isinstance(v, Tensor) for v in flat]
        ctx.spec = derivative, spec, [None if t else v for v, t in zip(flat, is_tensor)], is_tensor
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*compress(flat, is_tensor), *output)

    @staticmethod
    def backward(ctx, *grads):
        derivative, spec, flat, is_tensor = ctx.spec
        kept = iter(ctx.saved_tensors)
        flat = [next(kept) if t else v for v, t in zip(flat, is_tensor)]
        return None, None, None, *derivative(flat, spec, list(kept), grads, ctx.needs_input_grad[3:])


def record(*args):
    """Direct.apply; where a torch.func transform has come down to autograd, as a Function of that level alone."""
    if not torch._C._are_functorch_transforms_active():
        return apply_below(*args)
    with enable_single_level_autograd_function():
        return apply_below(*args)


apply_below = super(Function, Direct).apply  # Function.apply would enter the transform again


def through_reference(run, flat, spec, grads, needs):
    """Derivatives of `run(*args)` in torch operations, wherever `needs` asks."""
    places = [k for k, wanted in enumerate(needs) if wanted]
    wanted = [k for k, g in enumerate(grads) if g is not None]

    def function(*values):
        given = dict(zip(places, values))
        out = run(*tree_unflatten([given.get(k, v) for k, v in enumerate(flat)], spec))
        return [out[k] for k in wanted]

    _, pull = torch.func.vjp(function, *[flat[k] for k in places])
    got = dict(zip(places, pull([grads[k] for k in wanted])))
    return [got.get(k) for k in range(len(flat))]


def forward_derivative(flat, spec, out, grads, needs):
    cell, x, w_ih, b_ih, w_hh, b_hh, w_hr, state, batch_sizes, lengths, reverse, keep, backend, *more = tree_unflatten(
        flat, spec
    )
    extra = op.extra_of(more)
    S, weights = len(state), (x, w_ih, b_ih, w_hh, b_hh, w_hr)
    if keep == 2 and any(g is not None for g in grads[2 * S :]):  # nobody but a test differentiates what is kept
        run = lambda cell, *args: reference.forward(op.cell_of(cell), *args[:11], op.extra_of(args[12:]))
        return through_reference(run, flat, spec, grads, needs)
    if keep != 2:  # what backward needs was not kept: run again
        out = op.forward(cell, *weights, state, batch_sizes, lengths, reverse, 2, backend, extra)
    kept = *out[:S], *out[2 * S :]
    seq = (*grads[: S if keep else 1], *[None] * (0 if keep else S - 1))
    final = grads[S : 2 * S] if keep else grads[1 : 1 + S]
    place = 12 + S  # of params among flat, if anything but defaults follows the backend
    need = *needs[1:7], *(needs[place : place + 1] or [False])
    fixed = batch_sizes, lengths, extra.seed, extra.flags
    tensors = *weights, extra.params, *state, *kept, *seq, *final
    got = apply(RecurrentBackward)(how_of(cell, reverse, backend, extra), need, False, False, *fixed, *tensors)
    parts = iter(got)
    *got, params = (next(parts) if wanted else None for wanted in need)
    return None, *got, *parts, *[None] * 5, *[params, *[None] * (len(flat) - place - 1)][: len(flat) - place]


def backward_derivative(flat, spec, out, grads, needs):
    """`saved` counts as independent of the weights here: the forward operator answers for that dependence."""

    def run(cell, *args):
        need = [*args[10], False][:7]
        return reference.backward(op.cell_of(cell), *args[:10], need, *args[11:13], op.extra_of(args[14:]))

    return through_reference(run, flat, spec, grads, needs)


def differentiable(call, derivative):
    def kernel(*args):
        flat, spec = tree_flatten(args)
        tensors = [v for v in flat if isinstance(v, Tensor)]
        moving = forward_ad._current_level >= 0 and any(forward_ad.unpack_dual(v).tangent is not None for v in tensors)
        if moving or (torch.is_grad_enabled() and any(v.requires_grad for v in tensors)):
            return list(record(call, derivative, spec, *flat))
        with torch._C._AutoDispatchBelowAutograd():
            return call(*args)

    return kernel


op.lib.impl("recurrent_forward", differentiable(op.forward_op, forward_derivative), "Autograd")
op.lib.impl("recurrent_backward", differentiable(op.backward_op, backward_derivative), "Autograd")

# ---------------------------------------------------------------- vmap


def how_of(cell, reverse, backend, extra):
    """What is no tensor of a call, as the Functions take it."""
    return cell, reverse, backend, extra.noise, extra.skip, extra.clip, extra.first, extra.heads


def vmap_forward(info, dims, *args):
    cell, *weights, state, batch_sizes, lengths, reverse, keep, backend = args[:13]
    extra, at_params, at_seed, at_flags = mapped_extra(args[13:], dims[13:])

    def call(how, batch_sizes, lengths, seed, flags, x, w_ih, b_ih, w_hh, b_hh, w_hr, params, _, *state):
        steps = batch_sizes, lengths, reverse, keep, backend, *bundle(params, seed, flags, how)
        return op.forward_op(cell, x, w_ih, b_ih, w_hh, b_hh, w_hr, list(state), *steps)

    how, fixed = how_of(cell, reverse, backend, extra), (batch_sizes, lengths, extra.seed, extra.flags)
    given = how, *fixed, *weights, extra.params, None, *state
    at = None, *dims[8:10], at_seed, at_flags, *dims[1:7], at_params, None, *each_dim(dims[7], state)
    out, where = mapped_forward(info.batch_size, at, given, call, len(state) if keep else 1)
    return list(out), list(where)


def vmap_backward(info, dims, *args):
    cell, grads, x, w_ih, w_hh, w_hr, saved, state, batch_sizes, lengths, reverse, need, gates, norms, backend = args[
        :15
    ]
    extra, at_params, at_seed, at_flags = mapped_extra(args[15:], dims[15:])
    S = len(state)

    def call(how, need, gates, norms, batch_sizes, lengths, seed, flags, x, w_ih, _, w_hh, __, w_hr, params, *rest):
        state, saved, grads = list(rest[:S]), list(rest[S : -2 * S]), list(rest[-2 * S :])
        steps = batch_sizes, lengths, reverse, list(need), gates, norms, backend, *bundle(params, seed, flags, how)
        return op.backward_op(cell, grads, x, w_ih, w_hh, w_hr, saved, state, *steps)

    how, fixed = how_of(cell, reverse, backend, extra), (batch_sizes, lengths, extra.seed, extra.flags)
    tensors = x, w_ih, None, w_hh, None, w_hr, extra.params, *state, *saved, *grads
    lists = [d for at, values in ((dims[7], state), (dims[6], saved), (dims[1], grads)) for d in each_dim(at, values)]
    at = *[None] * 4, *dims[8:10], at_seed, at_flags, dims[2], dims[3], None, dims[4], None, dims[5], at_params, *lists
    given = how, [*need, False][:7], gates, norms, *fixed, *tensors
    out, where = mapped_backward(info.batch_size, at, given, call)
    return list(out), list(where)


def mapped_extra(more, dims):
    """The Extra of an operator's last arguments, and where its params, seed and flags are mapped."""
    dims = [*dims, *[None] * 4]
    return op.extra_of(more), dims[0], dims[1], dims[3]


def each_dim(dims, values):
    return [None] * len(values) if dims is None else list(dims)


def batched(*args):
    """The backward operator under the older vmap, that of is_grads_batched and jacobian(vectorize=True), which has no fallback
    for lists of tensors: its batched tensors are unwrapped and wrapped by hand."""
    level = torch._C._vmapmode_increment_nesting() - 1
    torch._C._vmapmode_decrement_nesting()
    is_batched = lambda v: isinstance(v, Tensor) and torch._C._functorch.is_legacy_batchedtensor(v)
    flat, spec = tree_flatten(args)
    moved = [torch._remove_batch_dim(v, level, 1, 0) if is_batched(v) else v for v in flat]
    size = next(m.shape[0] for v, m in zip(flat, moved) if m is not v)
    dims = tree_unflatten([None if m is v else 0 for v, m in zip(flat, moved)], spec)
    out, where = vmap_backward(SimpleNamespace(batch_size=size), dims, *tree_unflatten(moved, spec))
    return [torch._add_batch_dim(v, d, level) for v, d in zip(out, where)]


op.lib.impl("recurrent_backward", batched, "Batched")
torch.library.register_vmap("gradkernels::recurrent_forward", vmap_forward, lib=op.lib)
torch.library.register_vmap("gradkernels::recurrent_backward", vmap_backward, lib=op.lib)
