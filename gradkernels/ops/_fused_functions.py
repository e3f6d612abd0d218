"""The autograd Functions of an operation with kernels of its own: forward and backward, with forward mode and vmap."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.function import Function

if TYPE_CHECKING:
    from gradkernels.ops._fused import Fused


def nothing(like: Tensor) -> Tensor:
    """What an operator returns for a result that nobody wants."""
    return like.new_empty(0)


def filled(results, like: Tensor) -> tuple[Tensor, ...]:
    return tuple(nothing(like) if v is None else v for v in results)


def cut(values, n):
    """The first n and the others, of tensors that may be unpacked only once."""
    return values[:n], values[n:]


def differentiable(tensors: Sequence[Tensor | None]) -> bool:
    """Autograd records what is done with these, or forward mode is on."""
    if torch.is_grad_enabled() and any(v is not None and v.requires_grad for v in tensors):
        return True
    return forward_ad._current_level >= 0


def apply(function):
    """Function.apply binds its arguments to a signature at every call, 28 microseconds; the method below it does not, and is all
    that is needed where no transform is active."""
    if torch._C._are_functorch_transforms_active():
        return function.apply
    return super(Function, function).apply


def push(run, values, tangents):
    """Forward mode by reverse mode twice: a dual level does not nest."""
    out, pull = torch.func.vjp(run, *values)
    _, forward = torch.func.vjp(lambda *u: pull(u), *[torch.zeros_like(v) for v in out])
    return forward(tuple(torch.zeros_like(v) if t is None else t for v, t in zip(values, tangents)))


def primal(v):
    return v if v is None else forward_ad.unpack_dual(v).primal


def each(N, dims, tensors, call):
    """vmap as one call per element."""
    outs = [call(*[v.select(d, k) if d is not None else v for v, d in zip(tensors, dims)]) for k in range(N)]
    return tuple(torch.stack(v) for v in zip(*outs)), (0,) * len(outs[0])


def functions(op: Fused):
    """The autograd Functions of an operation, forward and backward."""
    n, r = len(op.tensors), op.results

    class Forward(Function):
        @staticmethod
        def forward(how, *tensors):
            return tuple(op.run(tensors, *how))

        @staticmethod
        def setup_context(ctx, inputs, output):
            ctx.how = inputs[0]
            ctx.set_materialize_grads(False)
            ctx.mark_non_differentiable(*output[r:])
            ctx.save_for_backward(*op.saved(inputs[1:], output))
            ctx.save_for_forward(*inputs[1:])

        @staticmethod
        def backward(ctx, *grads):
            how, backend = ctx.how
            tensors, outputs = cut(ctx.saved_tensors, n)
            grads = grads[:r]
            if torch.is_grad_enabled() or torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
                run = lambda need: apply(Backward)((tuple(need), how, backend), *grads, *tensors, *outputs)
            else:
                run = lambda need: op.run_backward(grads, tensors, outputs, need, how, backend)
            return None, *op.gradients(run, grads, ctx.needs_input_grad[1:], tensors, dict(zip(op.options, how)))

        @staticmethod
        def jvp(ctx, _, *tangents):
            with forward_ad._set_fwd_grad_enabled(True):  # torch switches it off here: jvp of jvp would be zero
                tensors = [primal(v) for v in ctx.saved_tensors[:n]]
                run, places = op.defined(tensors, dict(zip(op.options, ctx.how[0])))
                out = push(run, [tensors[k] for k in places], [tangents[k] for k in places])
            return (*out, *[None] * (op.outputs - r))

        @staticmethod
        def vmap(info, dims, how, *tensors):
            call = lambda *values: apply(Forward)(how, *values)
            folded = op.fold and op.fold(info.batch_size, dims[1:], tensors, dict(zip(op.options, how[0])))
            if not folded:
                return each(info.batch_size, dims[1:], tensors, call)
            values, unfold = folded
            return unfold(call(*values))

    class Backward(Function):
        @staticmethod
        def forward(how, *tensors):
            need, options, backend = how
            inputs = tensors[r : r + n]
            got = op.run_backward(tensors[:r], inputs, tensors[r + n :], list(need), options, backend)
            return filled(got, inputs[0])

        @staticmethod
        def setup_context(ctx, inputs, output):
            ctx.how = inputs[0]
            ctx.set_materialize_grads(False)
            ctx.save_for_backward(*inputs[1 : 1 + r + n])
            ctx.save_for_forward(*inputs[1 : 1 + r + n])

        @staticmethod
        def backward(ctx, *cotangents):
            need, how, _ = ctx.how
            grads, tensors = cut(ctx.saved_tensors, r)
            got = op.pull_backward(grads, tensors, need, dict(zip(op.options, how)), cotangents)
            return (None, *got, *[None] * op.outputs)

        @staticmethod
        def jvp(ctx, _, *tangents):
            need, how, _ = ctx.how
            with forward_ad._set_fwd_grad_enabled(True):
                saved = [primal(v) for v in ctx.saved_tensors]
                back, values, there, places = op.defined_backward(
                    saved[:r], saved[r:], need, dict(zip(op.options, how))
                )
                moving = [tangents[r + k] for k in places] + [tangents[k] for k in there]
                out = iter(push(back, values, moving))
            return tuple(next(out) if wanted else nothing(saved[r]) for wanted in need)

        @staticmethod
        def vmap(info, dims, how, *tensors):
            return each(info.batch_size, dims[1:], tensors, lambda *values: apply(Backward)(how, *values))

    return Forward, Backward
