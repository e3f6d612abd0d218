"""What has to be true of the arguments of a recurrent call before any kernel runs.

Shapes, dtypes and devices cost little and are checked where a call enters: in `ops.recurrent`, and again in the
operators themselves, which can be called directly. What depends on the values of `batch_sizes` and `lengths` is checked
once, beside the kernel, which both ways lead through. After both nothing can be read outside its tensor.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, NoReturn

import torch
from torch import Tensor

from gradkernels.backends._extra import FIXED, GIVEN, PLAIN, Extra

if TYPE_CHECKING:
    from gradkernels.cells import Cell

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
WEIGHTS = ("weight_ih", "bias_ih", "weight_hh", "bias_hh", "weight_hr")


def _wrong(name: str, v: Tensor, want: Sequence[object], because: str = "") -> NoReturn:
    raise RuntimeError(f"{name} must have shape {list(want)}{because}, got {list(v.shape)}")


def check_forward(
    cell: Cell,
    x: Tensor,
    weight_ih: Tensor | None,
    bias_ih: Tensor | None,
    weight_hh: Tensor,
    bias_hh: Tensor | None,
    weight_hr: Tensor | None,
    state: Sequence[Tensor] | None,  # None: zeros will be made to fit
    batch_sizes: Tensor | None,
    lengths: Tensor | None,
    heads: int = 1,
) -> None:
    """Shapes, dtypes and devices of a forward call."""
    dtype, device = x.dtype, x.device
    if dtype not in DTYPES:
        raise TypeError(f"x must be float32, float64, bfloat16 or float16, got {dtype}")
    shape, w = x.shape, weight_hh.shape
    if len(w) != 2:
        _wrong("weight_hh", weight_hh, (f"{cell.G} * H", "H"))
    if w[0] == 0 or (w[1] == 0 and cell.recurrent):
        raise ValueError(f"hidden_size must be greater than zero, got weight_hh {list(w)}")
    G, wide = cell.G, w[0]
    if wide % G:
        _wrong("weight_hh", weight_hh, (f"{G} * H", "H"), f" for {cell.name}")
    H, R = wide // G, w[1] * heads
    if heads > 1 and (weight_hr is not None or not cell.recurrent):
        raise ValueError(f"heads of {cell.name} need a recurrent product without weight_hr")
    if not cell.recurrent:
        if R:
            _wrong("weight_hh", weight_hh, (wide, 0), f" for {cell.name}, which has no recurrent product")
        if bias_hh is not None:
            raise ValueError(f"bias_hh is a part of the recurrent product, which {cell.name} has not")
        R = H
    if batch_sizes is None:
        if len(shape) != 3:
            raise RuntimeError(f"x must have 3 dimensions [T, B, I], got {len(shape)}: {list(shape)}")
        B = shape[1]
        if lengths is not None:
            if lengths.dtype is not torch.int64:
                raise TypeError(f"lengths must be int64, got {lengths.dtype}")
            if lengths.shape != (B,):
                _wrong("lengths", lengths, (B,), f", one for each row of x {list(shape)}")
            if lengths.device != device and lengths.device.type != "cpu":
                raise RuntimeError(f"lengths must be on the CPU or beside x on {device}, got {lengths.device}")
    else:
        if lengths is not None:
            raise ValueError("lengths and batch_sizes are two ways to say the same; give one of them")
        if len(shape) != 2:
            raise RuntimeError(f"x must have 2 dimensions [N, I] with batch_sizes, got {len(shape)}: {list(shape)}")
        if batch_sizes.dtype is not torch.int64:
            raise TypeError(f"batch_sizes must be int64, got {batch_sizes.dtype}")
        if batch_sizes.dim() != 1:
            _wrong("batch_sizes", batch_sizes, ("T",))
        if batch_sizes.device.type not in ("cpu", "meta"):
            raise RuntimeError(f"batch_sizes must be on the CPU, as PackedSequence has it, got {batch_sizes.device}")
        B = None
    if weight_ih is None:
        if bias_ih is not None:
            raise ValueError("bias_ih needs weight_ih: without it x is the gates, already projected")
        if shape[-1] != wide:
            raise RuntimeError(
                f"x is the gates, without weight_ih: x.size(-1) must be weight_hh.size(0). Expected {wide}, got {list(shape)}"
            )
    else:
        if len(weight_ih.shape) != 2 or weight_ih.shape[0] != wide:
            _wrong("weight_ih", weight_ih, (wide, "I"), f" beside weight_hh {list(w)}")
        if weight_ih.shape[1] != shape[-1]:
            raise RuntimeError(
                f"x.size(-1) must be equal to weight_ih.size(1). Expected {weight_ih.shape[1]}, got {shape[-1]}: "
                f"x {list(shape)}, weight_ih {list(weight_ih.shape)}"
            )
        if shape[-1] == 0:
            raise ValueError(f"input_size must be greater than zero, got x {list(shape)}")
    if bias_ih is not None and bias_ih.shape != (wide,):
        _wrong("bias_ih", bias_ih, (wide,), f" beside weight_hh {list(w)}")
    if bias_hh is not None and bias_hh.shape != (wide,):
        _wrong("bias_hh", bias_hh, (wide,), f" beside weight_hh {list(w)}")
    if weight_hr is None:
        if R != H and heads == 1:
            _wrong("weight_hh", weight_hh, (wide, H), f" for {cell.name} without weight_hr")
        if R != H:
            _wrong("weight_hh", weight_hh, (wide, f"{H} / {heads}"), f" for {cell.name} with {heads} heads")
    else:
        if weight_hr.shape != (R, H):
            _wrong("weight_hr", weight_hr, (R, H), f" beside weight_hh {list(w)}")
        if not cell.projects:
            raise ValueError(
                f"cell {cell.name} cannot have weight_hr: it uses its first state outside the recurrent product"
            )
    if state is not None:
        if len(state) != cell.S:
            raise ValueError(f"{cell.name} has {cell.S} states, got {len(state)}")
        for k, v in enumerate(state):
            want = R if k == 0 else H
            if v.dim() != 2 or v.shape[1] != want or (B is not None and v.shape[0] != B):
                _wrong(
                    f"state[{k}]",
                    v,
                    ("B" if B is None else B, want),
                    f" beside x {list(shape)} and weight_hh {list(w)}",
                )
            if B is None:  # packed: the first state says how many rows there are
                B = v.shape[0]
    check_together(x, weight_ih, bias_ih, weight_hh, bias_hh, weight_hr, *(state or ()))


def check_extra(cell: Cell, x: Tensor, weight_hh: Tensor, extra: Extra) -> None:
    """Parameters, masks, delay and clipping of a call, after `check_forward`."""
    params, seed, noise, flags, skip, clip, first, _ = extra
    P, M, H, shape = cell.P, cell.M, weight_hh.shape[0] // cell.G, x.shape
    if (params is not None) != (P > 0):
        got = "none" if params is None else list(params.shape)
        raise ValueError(f"cell {cell.name} takes {P} parameters per unit, params [{P}, {H}]; got {got}")
    if params is not None:
        if params.shape != (P, H):
            _wrong("params", params, (P, H), f" for {cell.name} beside weight_hh {list(weight_hh.shape)}")
        if params.dtype is not x.dtype or params.device != x.device:
            _mixed("params", params, x)
    if len(noise) != 3 * M:
        raise ValueError(f"cell {cell.name} has {M} masks, and noise three numbers for each; got {len(noise)}")
    kinds = noise[2::3]
    for k, (p, kind) in enumerate(zip(noise[::3], kinds)):
        if not 0 <= p <= 1:
            raise ValueError(f"mask {k} of {cell.name}: its probability must be between 0 and 1, got {p}")
        if kind not in (0, FIXED, GIVEN):
            raise ValueError(f"mask {k} of {cell.name}: its kind must be 0, 1 or 2, got {kind}")
    if seed is not None and (seed.shape != (1,) or seed.dtype is not torch.int64 or seed.device != x.device):
        raise ValueError(f"seed must be int64 [1] on {x.device}, got {seed.dtype} {list(seed.shape)} on {seed.device}")
    if (flags is not None) != (GIVEN in kinds):
        raise ValueError(f"flags are for masks of kind 2, and {cell.name} was given kinds {list(kinds)}")
    if flags is not None:
        N = shape[0] if len(shape) == 2 else shape[0] * shape[1]
        if flags.dim() != 1 or flags.shape[0] != N:
            _wrong("flags", flags, (N,), f", one for each token of x {list(shape)}")
        if flags.dtype is not x.dtype or flags.device != x.device:
            _mixed("flags", flags, x)
    if skip < 0 or (skip > 0) != (cell.D > 0):
        raise ValueError(f"skip must be {'at least 1' if cell.D else '0'} for {cell.name}, got {skip}")
    if not clip >= 0:
        raise ValueError(f"clip must not be negative, got {clip}")
    if first < 0:
        raise ValueError(f"first must not be negative, got {first}")


def check_together(x: Tensor, *others: Tensor | None) -> None:
    """One dtype and one device: x, the five weights, the states."""
    dtype, device = x.dtype, x.device
    for k, v in enumerate(others):
        if v is not None and (v.dtype is not dtype or v.device != device):
            _mixed(WEIGHTS[k] if k < 5 else f"state[{k - 5}]", v, x)


def _mixed(name: str, v: Tensor, x: Tensor) -> NoReturn:
    if v.device != x.device:
        raise RuntimeError(
            f"expected all tensors to be on the same device, but x is on {x.device} and {name} is on {v.device}"
        )
    raise ValueError(f"x dtype ({x.dtype}) does not match {name} dtype ({v.dtype}). Convert input: x.to({v.dtype})")


def check_backward(
    cell: Cell,
    grads: Sequence[Tensor | None],
    x: Tensor,
    weight_ih: Tensor | None,
    weight_hh: Tensor,
    weight_hr: Tensor | None,
    saved: Sequence[Tensor],
    state: Sequence[Tensor],
    batch_sizes: Tensor | None,
    lengths: Tensor | None,
    need: Sequence[bool],
    extra: Extra = PLAIN,
) -> None:
    """Shapes, dtypes and devices of a backward call: what `saved` and `grads` hold comes back through autograd, whose
    saved-tensor hooks belong to the user."""
    check_forward(cell, x, weight_ih, None, weight_hh, None, weight_hr, state, batch_sizes, lengths, extra.heads)
    if extra is not PLAIN or cell.P or cell.M or cell.D:
        check_extra(cell, x, weight_hh, extra)
    S, H, lead = cell.S, weight_hh.shape[0] // cell.G, x.shape[:-1]
    N = lead[0] if batch_sizes is not None else lead[0] * lead[1]
    want = [(*lead, v.shape[1]) for v in state]
    want += [(N, cell.A, H)] if weight_hr is None else [(N, H), (N, cell.A, H)]
    if len(saved) != len(want):
        raise ValueError(f"saved must be {len(want)} tensors for {cell.name}, got {len(saved)}")
    for k, v in enumerate(saved):
        if v.shape != want[k]:
            _wrong(f"saved[{k}]", v, want[k])
        if v.dtype is not x.dtype or v.device != x.device:
            _mixed(f"saved[{k}]", v, x)
    if len(grads) != 2 * S:
        raise ValueError(f"grads must be {2 * S} for {cell.name}, got {len(grads)}")
    for k, g in enumerate(grads):
        if g is None:
            continue
        if g.shape != (want[k] if k < S else state[k - S].shape):
            _wrong(f"grads[{k}]", g, want[k] if k < S else state[k - S].shape)
        if g.dtype is not x.dtype or g.device != x.device:
            _mixed(f"grads[{k}]", g, x)
    if len(need) != 7:
        raise ValueError(f"need must be seven flags, of which the last may be left out, got {len(need)}")
    if (need[1] and weight_ih is None) or (need[5] and weight_hr is None) or (need[6] and not cell.P):
        raise ValueError("need asks for the gradient of a tensor that is not there")


def check_dense(*tensors: Tensor | None) -> None:
    """Memory with strides: other layouts have their own ideas of an address."""
    for v in tensors:
        if v is not None and v.layout is not torch.strided:
            raise TypeError(f"recurrent layers take dense tensors, got layout {v.layout} of shape {list(v.shape)}")


def check_batch_sizes(batch_sizes: Tensor, N: int, B: int) -> None:
    """The rows of each step are in the tensor, and no step has more rows than the one before."""
    sizes = batch_sizes.tolist()
    if sum(sizes) != N:
        raise RuntimeError(f"batch_sizes must add up to the rows of x. Expected {N}, got {sum(sizes)}")
    if sizes and (sizes[0] > B or min(sizes) < 0):
        raise RuntimeError(
            f"batch_sizes must be from 0 to the rows of state, {B}, got {sizes[0] if sizes[0] > B else min(sizes)}"
        )
    if any(a < b for a, b in itertools.pairwise(sizes)):
        raise RuntimeError("batch_sizes must not increase")


def check_lengths(lengths: Tensor, T: int) -> None:
    """Every row ends inside the batch."""
    wrong = [n for n in lengths.tolist() if not 0 <= n <= T]
    if wrong:
        raise RuntimeError(f"lengths must be from 0 to T = {T}, got {wrong[0]}")
