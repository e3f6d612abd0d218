"""The route of an operation that has a kernel for forward, a kernel for backward, and a definition in torch operations.

Eager code goes through an autograd Function, with forward mode and vmap; compiled and exported code through the operators
themselves, which have a derivative of their own. First derivatives are the backward kernel; everything beyond comes from the
definition, to any order.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from gradkernels import backends
from gradkernels.ops._fused_checks import check_dense, check_made, check_need
from gradkernels.ops._fused_functions import apply, cut, differentiable, filled, functions, nothing
from gradkernels.ops._recurrent_op import direct

lib = torch.library.Library("gradkernels", "FRAGMENT")


def draw_seed(like: Tensor) -> Tensor:
    """The seed of one call's dropout, int64 ``[1]``, from torch's generator of that device: `torch.manual_seed` rules it,
    checkpointing restores it, a CUDA graph draws a new one in every replay, and vmap has its say about randomness."""
    return torch.randint(-(2**63), 2**63 - 1, (1,), device=like.device)


def as_tuple(results):
    """An operator with one result returns it by itself."""
    return results if isinstance(results, tuple) else (results,)


def alone(f):
    """f, but what is a tuple of one comes by itself."""

    def call(*args):
        results = f(*args)
        return results if len(results) > 1 else results[0]

    return call


class Fused:
    """`call(tensors, options, backend)` -> results.

    name: of the operators, `<name>_forward` and `<name>_backward`, and of the module in each backend that has
        `why_not(dtype, device, *tensors, **options)`, `forward(*tensors, **options) -> (*results, *kept)` and
        `backward(grads, tensors, outputs, need, **options) -> [gradient of each tensor, None where not needed]`.
    tensors: names of the inputs that are tensors, with a question mark where they may be None; options: the type of every other
        one, in the operator's schema.
    results: names of what a caller gets; kept: of what backward needs besides, which has no derivative.
    check: `check(*tensors, **options)` raises where shapes, dtypes or devices of the inputs do not fit together.
    made: `made(*tensors, **options)`, shape and dtype of each of (*results, *kept).
    definition: `definition(*tensors, **options) -> results` in differentiable torch operations.
    fake: `fake(*tensors, **options) -> (*results, *kept)`, empty; where not given, as `made` says, contiguous.
    shared: `shared(tensors, options) -> {k: j}`: the gradient of tensor k is that of tensor j.
    saved: `saved(tensors, outputs) -> (*tensors, *outputs)`, as they are kept for backward: what it does not read is left out, and
        what a result stands for is not kept beside it.
    unread: names of the results that backward does not read.
    like: the layout in which backward gives the gradient of a tensor.
    fold: `fold(N, dims, tensors, options) -> (tensors, unfold)` makes one call of a vmapped one; None where it cannot.
    """

    def __init__(
        self,
        name: str,
        tensors: Sequence[str],
        options: Mapping[str, str],
        results: Sequence[str],
        kept: Sequence[str],
        check: Callable[..., None],
        made: Callable[..., tuple[tuple[Sequence[int], torch.dtype], ...]],
        definition: Callable[..., tuple[Tensor, ...]],
        fake: Callable[..., tuple[Tensor, ...]] | None = None,
        shared: Callable[..., dict[int, int]] = lambda tensors, options: {},
        fold: Callable[..., Any] | None = None,
        saved: Callable[..., tuple[Tensor | None, ...]] = lambda tensors, outputs: (*tensors, *outputs),
        like: Callable[[Tensor], Tensor] = lambda v: v.new_empty(v.shape),
        unread: Sequence[str] = (),
    ):
        self.name, self.options = name, tuple(options)
        self.tensors = tuple(t.rstrip("?") for t in tensors)
        self.required = tuple(not t.endswith("?") for t in tensors)
        self.results, self.outputs = len(results), len(results) + len(kept)
        self.check, self.made, self.definition, self.fake = check, made, definition, fake or self._empty
        self.shared, self.fold, self.saved, self.like = shared, fold, saved, like
        # grads and outputs by their names in the operator's schema; None where they are not read
        self.grad_names = tuple(f"d_{r}" for r in results)
        self.output_names = tuple(None if o in unread else f"{o}_" for o in (*results, *kept))
        given = ", ".join(f"Tensor{'?' * t.endswith('?')} {t.rstrip('?')}" for t in tensors)
        how = ", ".join(f"{kind} {option}" for option, kind in options.items())
        grads = ", ".join(f"Tensor? {g}" for g in self.grad_names)
        after = ", ".join(f"Tensor {o}_" for o in (*results, *kept))
        many = lambda n: f"({', '.join(['Tensor'] * n)})" if n > 1 else "Tensor"
        tags = (torch.Tag.pt2_compliant_tag,)
        lib.define(f"{name}_forward({given}, {how}, str? backend) -> {many(self.outputs)}", tags=tags)
        lib.define(
            f"{name}_backward({grads}, {given}, {after}, bool[] need, {how}, str? backend) -> {many(len(self.tensors))}",
            tags=tags,
        )
        for part, kernel, empty in (
            ("forward", self._forward_op, self._forward_fake),
            ("backward", self._backward_op, self._backward_fake),
        ):
            lib.impl(f"{name}_{part}", alone(kernel), "CompositeExplicitAutograd")
            torch.library.register_fake(f"gradkernels::{name}_{part}", alone(empty), lib=lib)
        self.forward_op = getattr(torch.ops.gradkernels, f"{name}_forward").default
        self.backward_op = getattr(torch.ops.gradkernels, f"{name}_backward").default
        self._exported()
        self.forward_function, self.backward_function = functions(self)

    # ---------------------------------------------------------------- one call

    def __call__(self, tensors: tuple[Tensor | None, ...], options: dict[str, Any], backend: str | None):
        how = tuple(options.values())
        if torch.compiler.is_compiling() or torch._C._is_tracing():
            return as_tuple(self.forward_op(*tensors, *how, backend))[: self.results]
        if torch._C._are_functorch_transforms_active() or differentiable(tensors):
            return apply(self.forward_function)((how, backend), *tensors)[: self.results]
        return self.run(tensors, how, backend)[: self.results]

    def run(self, tensors, how, backend):
        """The kernel, past the operator where nobody would notice."""
        if direct(tensors):
            return self._forward_kernel(tensors, dict(zip(self.options, how)), backend)
        with torch._C._AutoDispatchBelowAutograd():
            return as_tuple(self.forward_op(*tensors, *how, backend))

    def run_backward(self, grads, tensors, outputs, need, how, backend):
        if torch.compiler.is_compiling():
            return self.backward_op(*grads, *tensors, *outputs, need, *how, backend)
        if direct((*grads, *tensors, *outputs)):
            options = dict(zip(self.options, how))
            self._check_backward(grads, tensors, outputs, need, options)
            return self._backward_kernel(grads, tensors, outputs, need, options, backend)
        with torch._C._AutoDispatchBelowAutograd():
            return self.backward_op(*grads, *tensors, *outputs, need, *how, backend)

    # ---------------------------------------------------------------- the operators

    def _module(self, backend, tensors, options):
        first = tensors[0]
        return backends.choose_for(self.name, backend, first.dtype, first.device, tensors, options)

    def _forward_op(self, *args):
        n = len(self.tensors)
        tensors, options = args[:n], dict(zip(self.options, args[n:-1]))
        check_dense(self.tensors, tensors, self.required)
        self.check(*tensors, **options)
        return self._forward_kernel(tensors, options, args[-1])

    def _forward_kernel(self, tensors, options, backend):
        """Runs a backend; the inputs have been checked."""
        module = self._module(backend, tensors, options)
        with torch._C._AutoDispatchBelowADInplaceOrView():
            return module.forward(*tensors, **options)

    def _check_backward(self, grads, tensors, outputs, need, options):
        self.check(*tensors, **options)
        check_need(self.tensors, tensors, need)
        if all(g is None for g in grads):
            names = " or ".join(self.grad_names)
            raise RuntimeError(f"{self.name}_backward needs a gradient: {names} must not be None")
        made = self.made(*tensors, **options)
        check_made(self.grad_names, grads, made, self.tensors[0], tensors[0])
        check_made(self.output_names, outputs, made, self.tensors[0], tensors[0])

    def _split(self, args):
        """Arguments of the backward operator: grads, tensors, outputs, need, options, backend."""
        a, b, c = self.results, self.results + len(self.tensors), self.results + len(self.tensors) + self.outputs
        return args[:a], args[a:b], args[b:c], list(args[c]), dict(zip(self.options, args[c + 1 : -1])), args[-1]

    def _backward_op(self, *args):
        grads, tensors, outputs, need, options, backend = self._split(args)
        check_dense(self.tensors, tensors, self.required)
        check_dense(self.grad_names, grads)
        check_dense(self.output_names, outputs)
        self._check_backward(grads, tensors, outputs, need, options)
        return filled(self._backward_kernel(grads, tensors, outputs, need, options, backend), tensors[0])

    def _backward_kernel(self, grads, tensors, outputs, need, options, backend):
        """Runs a backend; everything has been checked. None for what is not needed."""
        module = self._module(backend, tensors, options)
        with torch._C._AutoDispatchBelowADInplaceOrView():
            return module.backward(grads, tensors, outputs, need, **options)

    def _empty(self, *tensors, **options):
        return tuple(tensors[0].new_empty(shape, dtype=dtype) for shape, dtype in self.made(*tensors, **options))

    def _forward_fake(self, *args):
        n = len(self.tensors)
        return tuple(self.fake(*args[:n], **dict(zip(self.options, args[n:-1]))))

    def _backward_fake(self, *args):
        _, tensors, _, need, _, _ = self._split(args)
        return tuple(self.like(v) if wanted else nothing(tensors[0]) for v, wanted in zip(tensors, need))

    def needs(self, wanted: Sequence[bool], tensors, options: dict[str, Any]) -> tuple[list[bool], dict[int, int]]:
        """What the backward kernel is asked for, and which gradients are then another's too."""
        need, same = list(wanted), self.shared(tensors, options)
        for k, j in same.items():
            need[j], need[k] = need[j] or need[k], False
        return need, same

    def gradients(self, run, grads, wanted, tensors, options):
        """One gradient per tensor, None where not wanted; `run(need)` calls the backward kernel."""
        if all(g is None for g in grads):
            return [None] * len(wanted)
        need, same = self.needs(wanted, tensors, options)
        got = run(need)
        return [got[same.get(k, k)] if w else None for k, w in enumerate(wanted)]

    def _exported(self):
        """Derivatives of the operators themselves, for graphs."""
        n, r = len(self.tensors), self.results

        def keep_forward(ctx, inputs, output):
            ctx.how, ctx.backend = inputs[n:-1], inputs[-1]
            ctx.set_materialize_grads(False)
            ctx.save_for_backward(*self.saved(inputs[:n], as_tuple(output)))

        def forward_derivative(ctx, *grads):
            tensors, outputs = cut(ctx.saved_tensors, n)
            run = lambda need: self.backward_op(*grads[:r], *tensors, *outputs, need, *ctx.how, ctx.backend)
            got = self.gradients(run, grads[:r], ctx.needs_input_grad[:n], tensors, dict(zip(self.options, ctx.how)))
            return (*got, *[None] * (len(self.options) + 1))

        def keep_backward(ctx, inputs, output):
            ctx.need, ctx.how = inputs[r + n + self.outputs], inputs[r + n + self.outputs + 1 : -1]
            ctx.set_materialize_grads(False)
            ctx.save_for_backward(*inputs[: r + n])

        def backward_derivative(ctx, *cotangents):
            grads, tensors = cut(ctx.saved_tensors, r)
            got = self.pull_backward(grads, tensors, ctx.need, dict(zip(self.options, ctx.how)), cotangents)
            return (*got, *[None] * (self.outputs + len(self.options) + 2))

        for part, derivative, keep in (
            ("forward", forward_derivative, keep_forward),
            ("backward", backward_derivative, keep_backward),
        ):
            name = f"gradkernels::{self.name}_{part}"
            torch.library.register_autograd(name, derivative, setup_context=keep, lib=lib)

    # ---------------------------------------------------------------- what the definition says

    def defined(self, tensors, options):
        """The definition as a function of the floating tensors among the inputs, and where those are."""
        places = [k for k, v in enumerate(tensors) if v is not None and v.is_floating_point()]

        def run(*values):
            given = list(tensors)
            for k, v in zip(places, values):
                given[k] = v
            return tuple(self.definition(*given, **options))

        return run, places

    def defined_backward(self, grads, tensors, need, options):
        """The gradients that `need` asks for as a function of the tensors and of the gradients that are there."""
        run, places = self.defined(tensors, options)
        there = [k for k, g in enumerate(grads) if g is not None]

        def back(*values):
            out, pull = torch.func.vjp(run, *values[: len(places)])
            full = [torch.zeros_like(v) for v in out]
            for k, g in zip(there, values[len(places) :]):
                full[k] = g
            got = dict(zip(places, pull(tuple(full))))
            return tuple(got[k] for k, wanted in enumerate(need) if wanted)

        values = [*(tensors[k] for k in places), *(grads[k] for k in there)]
        return back, values, there, places

    def pull_backward(self, grads, tensors, need, options, cotangents):
        """Gradients of the backward operator with respect to its grads and tensors."""
        back, values, there, places = self.defined_backward(grads, tensors, need, options)
        out, pull = torch.func.vjp(back, *values)
        asked = [c for c, wanted in zip(cotangents, need) if wanted]
        got = pull(tuple(torch.zeros_like(v) if c is None else c for v, c in zip(out, asked)))
        of_tensors, of_grads = dict(zip(places, got)), dict(zip(there, got[len(places) :]))
        return [*(of_grads.get(k) for k in range(len(grads))), *(of_tensors.get(k) for k in range(len(tensors)))]
