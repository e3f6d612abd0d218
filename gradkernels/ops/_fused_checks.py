"""What has to be true of the arguments of an operator with kernels of its own before any kernel runs.

A public function checks what it was given. The operators behind it can be called directly, and what their backward is given was in
the hands of the user's saved-tensor hooks: they check where they enter. What only one operation knows of its arguments stands
beside it; here is what holds for all of them. After both nothing can be read outside its tensor.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NoReturn

import torch
from torch import Tensor


def wrong_shape(name: str, v: Tensor, want: Sequence[object], beside: str, other: Tensor) -> NoReturn:
    raise RuntimeError(f"{name} must have shape {list(want)} beside {beside} {list(other.shape)}, got {list(v.shape)}")


def check_device(name: str, v: Tensor, first: str, x: Tensor) -> None:
    if v.device != x.device:
        raise RuntimeError(
            f"expected all tensors to be on the same device, but {first} is on {x.device} and {name} is on {v.device}"
        )


def check_dropout(p: float, seed: Tensor | None, first: str, x: Tensor) -> None:
    if not 0 <= p <= 1:
        raise ValueError(f"p must be between 0 and 1, got {p}")
    if seed is None:
        return
    check_device("seed", seed, first, x)
    if seed.shape != (1,) or seed.dtype is not torch.int64:
        raise RuntimeError(f"seed must be int64 [1], got {seed.dtype} {list(seed.shape)}")


def check_dense(names: Sequence[str | None], tensors: Sequence[Tensor | None], required: Sequence[bool] = ()) -> None:
    """Memory with strides: other layouts have their own ideas of an address."""
    for name, v, needed in itertools.zip_longest(names, tensors, required):
        if v is None:
            if needed:
                raise TypeError(f"{name} must be a tensor, got None")
        elif name is not None and v.layout is not torch.strided:
            raise TypeError(f"{name} must be dense, got layout {v.layout} of shape {list(v.shape)}")


def check_made(
    names: Sequence[str | None],  # None: not read
    tensors: Sequence[Tensor | None],
    made: Sequence[tuple[Sequence[int], torch.dtype]],
    first: str,
    x: Tensor,
) -> None:
    """What backward is given is what forward returned, or a gradient of it."""
    for name, v, (shape, dtype) in zip(names, tensors, made):
        if v is None or name is None:
            continue
        if v.shape != tuple(shape):
            wrong_shape(name, v, shape, first, x)
        if v.dtype is not dtype:
            raise RuntimeError(f"{name} must have the dtype {dtype} beside {first} {x.dtype}, got {v.dtype}")
        check_device(name, v, first, x)


def check_need(names: Sequence[str], tensors: Sequence[Tensor | None], need: Sequence[bool]) -> None:
    if len(need) != len(names):
        raise RuntimeError(f"need must be {len(names)} flags, for {', '.join(names)}, got {len(need)}")
    for name, v, wanted in zip(names, tensors, need):
        if wanted and (v is None or not v.is_floating_point()):
            got = "None" if v is None else str(v.dtype)
            raise RuntimeError(f"need asks for the gradient of {name}, which has none: {name} is {got}")
