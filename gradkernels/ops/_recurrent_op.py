"""The two operators of a recurrent layer, forward only and backward only, one call for a whole sequence.

`forward` and `backward` here call the operator, or the kernel itself when nothing listens at the dispatcher: no tracer,
no mode, no transform, no tensor that is more than a plain one. That halves the cost of a one-step call.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gradkernels import backends
from gradkernels.backends._extra import PLAIN, Extra
from gradkernels.cells import CELLS, Cell, transform
from gradkernels.ops._constant import constant
from gradkernels.ops._recurrent_checks import (
    check_backward,
    check_batch_sizes,
    check_dense,
    check_extra,
    check_forward,
    check_lengths,
    check_together,
)

lib = torch.library.Library("gradkernels", "DEF")
# what is in Extra, in its order; a program that was exported before there was any of it still runs
_EXTRA = "Tensor? params=None, Tensor? seed=None, float[] noise=[], Tensor? flags=None, int skip=0, float clip=0.0, int first=0, int heads=1"
lib.define(
    "recurrent_forward(str cell, Tensor x, Tensor? weight_ih, Tensor? bias_ih, Tensor weight_hh, Tensor? bias_hh, Tensor? weight_hr, "
    "Tensor[] state, Tensor? batch_sizes, Tensor? lengths, bool reverse, int keep, str? backend, "
    f"{_EXTRA}) -> Tensor[]",
    tags=(torch.Tag.pt2_compliant_tag,),
)
lib.define(
    "recurrent_backward(str cell, Tensor?[] grads, Tensor x, Tensor? weight_ih, Tensor weight_hh, Tensor? weight_hr, Tensor[] saved, "
    "Tensor[] state, Tensor? batch_sizes, Tensor? lengths, bool reverse, bool[] need, bool gates, bool norms, str? backend, "
    f"{_EXTRA}) -> Tensor[]",
    tags=(torch.Tag.pt2_compliant_tag,),
)

# ---------------------------------------------------------------- cells by name

# cells that are in no registry; kept for good, since a traced graph knows them by name only
_given: dict[str, Cell] = {}
TRANSFORMS = {f.__name__: f for f in (transform.zoneout, transform.skip, transform.resets, transform.masked)}


def cell_of(name: str) -> Cell:
    cell = CELLS.get(name) or _given.get(name)
    return _made(name) if cell is None else cell


def _made(name: str) -> Cell:
    """The cell of a name that says how it is made of another: a program may have been exported elsewhere."""
    before, _, rest = name.partition("_")
    if before not in TRANSFORMS or not rest:
        raise ValueError(f"unknown cell {name!r}; there are {', '.join(CELLS)}")
    cell = _given[name] = TRANSFORMS[before](cell_of(rest))
    return cell


@constant
def composed(name: str, transforms: tuple[str, ...]) -> str:
    """The name of a cell made of another, the innermost transform first."""
    for before in transforms:
        name = f"{before}_{name}"
        cell_of(name)
    return name


@constant
def name_of(cell: Cell) -> str:
    """The text by which operators know a cell."""
    if CELLS.get(cell.name) == cell:
        return cell.name
    name = f"{cell.name}@{id(cell):x}"
    _given[name] = cell
    return name


# ---------------------------------------------------------------- kernels


def _whole(v: Tensor | None) -> Tensor | None:
    return v if v is None else v.contiguous()


def _check_values(x, state, batch_sizes, lengths):
    """What tensors hold is checked here, next to the kernel, on whatever way the call came.

    Nobody waits to read lengths that are on a device: backends take those outside of 0 to T for the nearest end."""
    if batch_sizes is not None:
        check_batch_sizes(batch_sizes, x.shape[0], state[0].shape[0])
    elif lengths.is_cpu:
        check_lengths(lengths, x.shape[0])
    return _whole(batch_sizes), _whole(lengths)


def _whole_extra(extra: Extra) -> Extra:
    return extra if extra is PLAIN else extra._replace(params=_whole(extra.params), flags=_whole(extra.flags))


def forward_kernel(
    cell, x, w_ih, b_ih, w_hh, b_hh, w_hr, state, batch_sizes, lengths, reverse, keep, backend, extra=PLAIN
):
    """Runs a backend; shapes have been checked."""
    module = backends.choose(backend, cell, x.dtype, x.device, extra.clip > 0)
    if batch_sizes is not None or lengths is not None:
        batch_sizes, lengths = _check_values(x, state, batch_sizes, lengths)
    weights = _whole(w_ih), _whole(b_ih), w_hh.contiguous(), _whole(b_hh), _whole(w_hr)
    state = [v.contiguous() for v in state]
    backends.ran(module)
    with torch._C._AutoDispatchBelowADInplaceOrView():  # no derivative is recorded, and what comes out is nobody's view
        return module.forward(
            cell, x.contiguous(), *weights, state, batch_sizes, lengths, reverse, keep, _whole_extra(extra)
        )


def backward_kernel(
    cell, grads, x, w_ih, w_hh, w_hr, saved, state, batch_sizes, lengths, reverse, need, gates, norms, backend, extra=PLAIN
):  # fmt: skip
    """Runs a backend; shapes have been checked."""
    module = backends.choose(backend, cell, x.dtype, x.device, extra.clip > 0)
    if batch_sizes is not None or lengths is not None:
        batch_sizes, lengths = _check_values(x, state, batch_sizes, lengths)
    tensors = x.contiguous(), _whole(w_ih), w_hh.contiguous(), _whole(w_hr)
    grads, saved, state = [_whole(g) for g in grads], [v.contiguous() for v in saved], [v.contiguous() for v in state]
    backends.ran(module)
    with torch._C._AutoDispatchBelowADInplaceOrView():
        return module.backward(
            cell, grads, *tensors, saved, state, batch_sizes, lengths, reverse, need, gates, norms, _whole_extra(extra)
        )


def tensors_of(extra: Extra) -> tuple[Tensor | None, ...]:
    return () if extra is PLAIN else (extra.params, extra.seed, extra.flags)


def extra_of(values) -> Extra:
    """What follows the backend in an operator's arguments; the dispatcher leaves out what is as by default."""
    return PLAIN if not values else Extra(*values)._replace(noise=tuple(values[2]) if len(values) > 2 else ())


def _forward_op(cell, x, w_ih, b_ih, w_hh, b_hh, w_hr, state, batch_sizes, lengths, reverse, keep, backend, *more):
    """[y, (other state sequences,) *final states, (raw,) (acts)]

    keep=0: y and the final states; 1: the sequences of all states; 2: also what backward needs: raw [N, H], the output before
    projection, if there is one, and acts [N, A, H]."""
    c, extra = cell_of(cell), extra_of(more)
    check_dense(x, w_ih, b_ih, w_hh, b_hh, w_hr, batch_sizes, lengths, *state, *tensors_of(extra))
    check_forward(c, x, w_ih, b_ih, w_hh, b_hh, w_hr, state, batch_sizes, lengths, extra.heads)
    check_extra(c, x, w_hh, extra)
    if keep not in (0, 1, 2):
        raise ValueError(f"keep must be 0, 1 or 2, got {keep}")
    return forward_kernel(
        c, x, w_ih, b_ih, w_hh, b_hh, w_hr, state, batch_sizes, lengths, reverse, keep, backend, extra
    )


def _backward_op(
    cell, grads, x, w_ih, w_hh, w_hr, saved, state, batch_sizes, lengths, reverse, need, gates, norms, backend, *more
):
    """gates=False: [each needed gradient of x, w_ih, b_ih, w_hh, b_hh, w_hr, params, *dstate, (norms)]
    gates=True: [dgates [.., G*H], (dr [.., G*H] if a gate is split), (v [.., H] if a product is taken of v),
    (dproj [.., R] if w_hr), (dparams [.., P*H] if that of params is needed), *dstate, (norms)], of which weight gradients are
    products and sums. The last of the seven flags of `need`, that of params, may be left out."""
    c, extra = cell_of(cell), extra_of(more)
    need = [*need, False] if len(need) == 6 else need
    check_dense(*grads, x, w_ih, w_hh, w_hr, *saved, batch_sizes, lengths, *state, *tensors_of(extra))
    check_backward(c, grads, x, w_ih, w_hh, w_hr, saved, state, batch_sizes, lengths, need, extra)
    how = reverse, need, gates, norms, backend, extra
    return backward_kernel(c, grads, x, w_ih, w_hh, w_hr, saved, state, batch_sizes, lengths, *how)


def _forward_fake(cell, x, w_ih, b_ih, w_hh, b_hh, w_hr, state, batch_sizes, lengths, reverse, keep, backend, *more):
    check_together(x, w_ih, b_ih, w_hh, b_hh, w_hr, *state)  # a mixture of devices may end up here
    c, lead = cell_of(cell), x.shape[:-1]
    H, N = w_hh.shape[0] // c.G, math.prod(lead)  # Size.numel() would fix dynamic sizes
    seq = [x.new_empty(*lead, v.shape[-1]) for v in state]
    kept = ([] if w_hr is None else [x.new_empty(N, H)]) + [x.new_empty(N, c.A, H)]
    return [*seq[: None if keep else 1], *(v.new_empty(v.shape) for v in state), *(kept if keep == 2 else [])]


def _backward_fake(
    cell, grads, x, w_ih, w_hh, w_hr, saved, state, batch_sizes, lengths, reverse, need, gates, norms, backend, *more
):
    check_together(x, w_ih, None, w_hh, None, w_hr, *state)
    c, lead, wide = cell_of(cell), x.shape[:-1], w_hh.shape[0]
    H = wide // c.G
    if gates:
        widths = [wide, *([wide] if c.split else []), *([H] if c.second else [])]
        widths += [*([] if w_hr is None else [w_hr.shape[0]]), *([c.P * H] if any(need[6:]) else [])]
        out = [x.new_empty(*lead, n) for n in widths]
    else:
        w_ih, w_hr = (None if v is None else v.shape for v in (w_ih, w_hr))
        shapes = x.shape, w_ih, (wide,), w_hh.shape, (wide,), w_hr, (c.P, H)
        out = [x.new_empty(shape) for shape, wanted in zip(shapes, need) if wanted]
    T = x.shape[0] if batch_sizes is None else batch_sizes.shape[0]
    out += [v.new_empty(v.shape) for v in state]
    return [*out, x.new_empty(T, c.S + 1, dtype=torch.double)] if norms else out


forward_op = torch.ops.gradkernels.recurrent_forward.default
backward_op = torch.ops.gradkernels.recurrent_backward.default
for _name, _kernel, _fake in (
    ("recurrent_forward", _forward_op, _forward_fake),
    ("recurrent_backward", _backward_op, _backward_fake),
):
    lib.impl(_name, _kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"gradkernels::{_name}", _fake, lib=lib)

# ---------------------------------------------------------------- past the dispatcher


def _keys(*names: str) -> int:
    keys = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, names[0]))
    for name in names[1:]:
        keys = keys | torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, name))
    return keys.raw_repr()


# A thread in which no mode, transform or tracer is at work (with and without inference mode), and a tensor that is nothing
# but memory of the CPU or of a GPU: not a subclass, batched, lazily conjugated or negated, functional, fake or sparse.
_QUIET = frozenset((_keys("BackendSelect", "ADInplaceOrView"), _keys("BackendSelect")))
_PLAIN = frozenset(
    keys
    for device in ("CPU", "CUDA")
    for keys in (
        _keys(device, "ADInplaceOrView", f"Autograd{device}", f"Autocast{device}"),
        _keys(device, f"Autocast{device}"),  # made in inference mode
    )
)
_TYPES = frozenset((Tensor, torch.nn.Parameter))
_included, _dispatch_keys = torch._C._dispatch_tls_local_include_set, torch._C._dispatch_keys
_profiling, _function_modes = torch.autograd._profiler_enabled, torch._C._len_torch_function_stack


def quiet() -> bool:
    """Nothing listens to the calls of this thread."""
    return _included().raw_repr() in _QUIET and not _profiling() and not _function_modes()


def plain(tensors) -> bool:
    """Every tensor is plain memory."""
    for v in tensors:
        if v is not None and (type(v) not in _TYPES or _dispatch_keys(v).raw_repr() not in _PLAIN):
            return False
    return True


def direct(tensors) -> bool:
    """The kernel may be called in place of the operator: no one would notice."""
    return not torch.compiler.is_compiling() and quiet() and plain(tensors)


def forward(cell, x, w_ih, b_ih, w_hh, b_hh, w_hr, state, *how):
    """The operator, for a caller who has checked the shapes and wants no derivative; what is last is an Extra."""
    *how, extra = how
    if direct((x, w_ih, b_ih, w_hh, b_hh, w_hr, *how[:2], *state, *tensors_of(extra))):
        return forward_kernel(cell_of(cell), x, w_ih, b_ih, w_hh, b_hh, w_hr, state, *how, extra)
    how += extra
    if torch.compiler.is_compiling() or torch._C._is_tracing():
        return forward_op(cell, x, w_ih, b_ih, w_hh, b_hh, w_hr, state, *how)
    with torch._C._AutoDispatchBelowAutograd():  # past the operator's own derivative, which costs more than the call
        return forward_op(cell, x, w_ih, b_ih, w_hh, b_hh, w_hr, state, *how)


def backward(cell, grads, x, w_ih, w_hh, w_hr, saved, state, batch_sizes, lengths, reverse, need, *how):
    """The operator, for a caller who wants no derivative of it; what is last is an Extra."""
    inputs, (*how, extra) = (x, w_ih, w_hh, w_hr, saved, state, batch_sizes, lengths), how
    if direct((*inputs[:4], *inputs[6:], *grads, *saved, *state, *tensors_of(extra))):
        c = cell_of(cell)
        check_backward(c, grads, *inputs, need, extra)
        return backward_kernel(c, grads, *inputs, reverse, need, *how, extra)
    how += extra
    if torch.compiler.is_compiling():
        return backward_op(cell, grads, *inputs, reverse, need, *how)
    with torch._C._AutoDispatchBelowAutograd():
        return backward_op(cell, grads, *inputs, reverse, need, *how)
