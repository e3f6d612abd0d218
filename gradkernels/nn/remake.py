"""What a layer makes of its input in few operations is made again in backward, rather than kept for it.

    with remaking():
        h = remade(norm, x)
        q = remade(linear, h, weight, bias)
        ...

Whatever the graph would keep of h and q, or of views of them, it does not: backward calls `norm(x)` and `linear(h, ..)` again
when the first of it is asked for. Nothing is run twice by autograd, so that derivatives of any order go the usual way. This rests
on torch.autograd.graph.saved_tensors_hooks; where those have another owner (checkpointing, offloading), in graphs and under
torch.func, which have ways of their own to save memory, everything is kept.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.graph import saved_tensors_hooks

_thread = threading.local()
_PLAIN = (Tensor, torch.nn.Parameter)


def lowered(device: str) -> torch.dtype | None:
    """What autocast rounds the factors of products to, if it is on."""
    if torch._C._is_any_autocast_enabled() and torch.amp.is_autocast_available(device):
        return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    return None


class _Value:
    """A value that can be made again: how, of what, and for how many."""

    def __init__(self, make: Callable[..., Tensor], inputs: list[_Saved | None], like: Tensor) -> None:
        self.make, self.inputs, self.version = make, inputs, like._version
        self.device, self.low = like.device.type, lowered(like.device.type)
        self.readers = self.waiting = 0
        self.again: Tensor | None = None

    def get(self) -> Tensor:
        """Made when the first reader asks, dropped when the last one has."""
        made = self.again
        if made is None:
            with torch.no_grad(), self.autocast():
                made = self.make(*(v if v is None else v.get() for v in self.inputs))
            self.again, self.waiting = made, self.readers
        self.waiting -= 1
        if self.waiting == 0:
            self.again = None
        return made

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """As it was in forward, whatever it is in backward."""
        if self.low is None and lowered(self.device) is None:
            return contextlib.nullcontext()
        return torch.autocast(self.device, self.low, self.low is not None)


class _Saved:
    """What stands for a tensor until backward: the tensor, or a view of a value that can be made again."""

    __slots__ = ("tensor", "value", "version", "view")

    def __init__(self, tensor: Tensor) -> None:
        self.tensor: Tensor | None = tensor
        self.version = tensor._version
        self.value: _Value | None = None
        self.view: tuple[Any, ...] = ()

    def leave(self, value: _Value) -> None:
        assert self.tensor is not None
        self.view = self.tensor.size(), self.tensor.stride(), self.tensor.storage_offset()
        self.tensor, self.value = None, value
        value.readers += 1

    def get(self) -> Tensor:
        if self.value is not None:
            return self.value.get().as_strided(*self.view)
        assert self.tensor is not None
        if self.tensor._version != self.version:
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an inplace operation: "
                f"{self.tensor.dtype} {list(self.tensor.shape)} is at version {self.tensor._version}; "
                f"expected version {self.version} instead"
            )
        return self.tensor


class _Trail:
    """The values of one layer while its forward runs, and what else is saved, by the address of their memory."""

    def __init__(self) -> None:
        self.values: dict[int, tuple[_Value, Tensor]] = {}  # the tensor is held, so that no other comes to its address
        self.kept: dict[int, list[_Saved]] = {}

    def save(self, tensor: Tensor) -> _Saved:
        """A tensor without a graph."""
        saved, address = _Saved(tensor), _address(tensor)
        value, like = self.values.get(address, (None, tensor))
        if value is not None and tensor.dtype == like.dtype and saved.version == value.version:
            saved.leave(value)
        elif address:
            self.kept.setdefault(address, []).append(saved)
        return saved

    def enter(self, result: Tensor, make: Callable[..., Tensor], inputs: tuple[Tensor | None, ...]) -> None:
        address = _address(result)
        if not address or address in self.values or any(v is not None and _address(v) == address for v in inputs):
            return
        value = _Value(make, [v if v is None else self.save(v.detach()) for v in inputs], result)
        self.values[address] = value, result
        for saved in self.kept.pop(address, ()):  # by what made it
            assert saved.tensor is not None
            if saved.tensor.dtype == result.dtype and saved.version == value.version:
                saved.leave(value)


def _address(v: Tensor) -> int:
    """0 for what is not plain memory."""
    return v.untyped_storage().data_ptr() if type(v) in _PLAIN else 0


def _own_ways() -> bool:
    """Somebody else rules what is kept for backward, or nobody keeps anything."""
    return (
        torch.compiler.is_compiling()
        or not torch.is_grad_enabled()
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._autograd._top_saved_tensors_default_hooks(True) is not None
        or not torch._C._autograd._saved_tensors_hooks_is_enabled()
    )


@contextlib.contextmanager
def remaking() -> Iterator[None]:
    """Inside, what :func:`remade` returns is not kept for backward."""
    if _own_ways():
        yield
        return
    trail = _Trail()
    _thread.trail = trail
    try:
        with saved_tensors_hooks(trail.save, _Saved.get):
            yield
    finally:
        _thread.trail = None
        trail.values.clear()  # the graph keeps what it needs of them
        trail.kept.clear()


def remade(make: Callable[..., Tensor], *inputs: Tensor | None) -> Tensor:
    """make(*inputs), a function of these alone: with the same bits whenever it is called."""
    return of(make(*inputs), make, *inputs)


def of(result: Tensor, make: Callable[..., Tensor], *inputs: Tensor | None) -> Tensor:
    """The result, which make(*inputs) would be too."""
    if not torch.compiler.is_compiling():
        trail = getattr(_thread, "trail", None)
        if trail is not None:
            trail.enter(result, make, inputs)
    return result


def rounded(x: Tensor) -> Tensor:
    """x as autocast has it in products, which would round it by themselves, and keep that for backward."""
    low = lowered(x.device.type)
    if low is None or x.dtype in (low, torch.float64):
        return x
    return remade(functools.partial(torch.Tensor.to, dtype=low), x)
