"""Where a kernel can run, and which backend takes a call.

A backend is a module with `forward`, `backward` and `why_not`; `reference` says what they take and return.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import sys
import threading
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any

from gradkernels.cells import Cell

if TYPE_CHECKING:
    import torch

NAMES = ("reference", "cpu", "triton", "cuda")
# device type -> the backends to try, the best first; `reference` runs wherever torch does. ROCm calls its devices "cuda" too.
_PREFERRED = {"cpu": ("cpu",), "cuda": ("cuda", "triton")}
_ELSEWHERE = ("triton",)
_chosen: dict[tuple[object, ...], tuple[ModuleType, Cell]] = {}
_thread = threading.local()


def load(name: str) -> ModuleType:
    """The backend's module; ValueError when there is none of that name."""
    if name not in NAMES:
        raise ValueError(f"unknown backend {name!r}; there are {', '.join(NAMES)}")
    return importlib.import_module(f"{__name__}.{name}")


def backends() -> dict[str, str | None]:
    """Every backend by name: None when it can run here, else the reason and how to get it.

    >>> import gradkernels as gk
    >>> gk.backends()["reference"] is None
    True
    """
    return {name: load(name).why_not() for name in NAMES}


def choose(backend: str | None, cell: Cell, dtype: torch.dtype, device: torch.device, clip: bool = False) -> ModuleType:
    """The module that runs this call: the one named, or the best that can; `clip`: its backward has to.

    ValueError for an unknown name; RuntimeError, with the reason, when the backend that was named cannot run this call."""
    key = (backend, id(cell), dtype, device, clip)
    known = _chosen.get(key)
    if known is not None:
        return known[0]
    for name in (backend,) if backend else (*_PREFERRED.get(device.type, _ELSEWHERE), "reference"):
        module = load(name)
        reason = module.why_not(cell, dtype, device)
        if reason is None and clip and not module.CLIPS:
            reason = "its backward does not clip"
        if reason is None:
            break
    if reason is not None:
        raise RuntimeError(f"backend {backend!r} cannot run {cell.name} in {dtype} on {device}: {reason}")
    _chosen[key] = module, cell  # the cell is kept, so that its id stays its own
    return module


def choose_for(
    op: str,
    backend: str | None,
    dtype: torch.dtype,
    device: torch.device,
    tensors: Sequence[torch.Tensor | None],
    options: Mapping[str, Any],
) -> ModuleType:
    """The module of one operation that runs this call: that of the backend named, or of the best that can.

    Its `why_not(dtype, device, *tensors, **options)` is asked every time, since it may look at shapes.

    ValueError for an unknown name; RuntimeError, with the reason, when the backend that was named cannot run this call."""
    for name in (backend,) if backend else (*_PREFERRED.get(device.type, _ELSEWHERE), "reference"):
        module, reason = _op_module(name, op)
        if module is not None:
            reason = module.why_not(dtype, device, *tensors, **options)
            if reason is None:
                ran(module)
                return module
    raise RuntimeError(f"backend {backend!r} cannot run {op} in {dtype} on {device}: {reason}")


@functools.cache
def _op_module(name: str, op: str) -> tuple[ModuleType | None, str]:
    package = load(name).__name__
    if importlib.util.find_spec(f"{package}.{op}") is None:
        return None, f"it has no kernels for {op}"
    return importlib.import_module(f"{package}.{op}"), ""


def ran(module: ModuleType) -> None:
    """Note that this backend runs the call at hand."""
    _thread.last = module.__name__


def last() -> str | None:
    """Name of the backend that ran last in this thread; None before the first call."""
    name = getattr(_thread, "last", None)
    return None if name is None else name.removeprefix(f"{__name__}.").partition(".")[0]


class _Callable(ModuleType):
    """`gk.backends` is this package and, called, the table of what can run."""

    def __call__(self) -> dict[str, str | None]:
        return backends()


sys.modules[__name__].__class__ = _Callable
