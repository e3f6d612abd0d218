"""Kernels for PyTorch whose subject is how gradients travel.

Importing the package registers its operators, so that exported programs which use them can be loaded; everything else
is imported when it is first asked for.
"""

import importlib
from typing import Any

from gradkernels import backends, cells, ops
from gradkernels.cells import cell

__version__ = "0.1.0"
__all__ = ["backends", "cell", "cells", "convert", "doctor", "flow", "init", "nn", "ops", "tasks"]

_LAZY = ("doctor", "flow", "init", "nn", "tasks")


def __getattr__(name: str) -> Any:
    if name == "convert":
        value = importlib.import_module("gradkernels.nn.convert").convert
    elif name in _LAZY:
        value = importlib.import_module(f"{__name__}.{name}")
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
