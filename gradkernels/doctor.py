"""What this machine can run, why not, and how to get it."""

from __future__ import annotations

import os
import platform
import sys
from types import ModuleType
from typing import Any

import torch

import gradkernels
from gradkernels.backends import backends

HOW = {
    "cpu": "install a C++17 compiler (Debian, Ubuntu: apt install g++; macOS: xcode-select --install), then run "
    "`pip install --force-reinstall --no-deps .` or, in a checkout, `make build`",
}


def as_dict() -> dict[str, Any]:
    """The findings of `doctor` as plain values, for `--json`.

    >>> from gradkernels.doctor import as_dict
    >>> as_dict()["backends"]["reference"] is None
    True
    """
    table = backends()
    used = "cpu" if table["cpu"] is None else "reference"
    module = None
    if used == "cpu":
        from gradkernels.backends import cpu

        module = cpu.build().__name__
    advice = [f"{name}: {HOW[name]}" for name, reason in table.items() if reason is not None and name in HOW]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if torch.get_num_threads() > cores:
        advice.append(
            f"threads: torch uses {torch.get_num_threads()} on {cores} cores; torch.set_num_threads({cores}) is faster"
        )
    return {
        "gradkernels": gradkernels.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": platform.platform(),
        "instruction set": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "cores": cores,
        "backends": table,
        "used on the CPU": used,
        "compiled module": module,
        "advice": advice,
    }


def doctor() -> str:
    """What this machine runs, why a backend cannot, and what to do about it, as text for a terminal.

    >>> import gradkernels as gk
    >>> print(gk.doctor())  # doctest: +ELLIPSIS
    gradkernels ...
    """
    found = as_dict()
    lines = [f"gradkernels {found['gradkernels']}, torch {found['torch']}, Python {found['python']}, {found['system']}"]
    lines.append(f"instruction set {found['instruction set']}, {found['threads']} threads on {found['cores']} cores")
    for name, reason in found["backends"].items():
        built = f" ({found['compiled module']})" if name == "cpu" and found["compiled module"] else ""
        lines.append(f"backend {name:10} {'runs' + built if reason is None else 'cannot run: ' + reason}")
    lines.append(f"recurrent layers on the CPU take: {found['used on the CPU']}")
    lines += [f"to do: {text}" for text in found["advice"]] or ["nothing to do"]
    return "\n".join(lines)


class _Callable(ModuleType):
    """`gk.doctor` is this module and, called, its text."""

    def __call__(self) -> str:
        return doctor()


sys.modules[__name__].__class__ = _Callable
