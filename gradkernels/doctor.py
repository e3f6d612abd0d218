"""What this machine can run, why not, and how to get it."""

from __future__ import annotations

import os
import platform
import sys
from types import ModuleType
from typing import Any

import torch

import gradkernels
from gradkernels.backends import backends, choose, load
from gradkernels.cells import CELLS

HOW = {
    "cpu": "install a C++17 compiler (Debian, Ubuntu: apt install g++; macOS: xcode-select --install), then run "
    "`pip install --force-reinstall --no-deps .` or, in a checkout, `make build`",
}
ON_GPU = ("cuda", "triton", "reference")
TYPICAL = "lstm", 512, 32, torch.bfloat16  # the layer whose plan is shown: cell, units, rows of the batch, dtype


def _gpus() -> list[dict[str, Any]]:
    """Every GPU that torch can use: what it is, what runs there and what layers take."""
    kind = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if kind is None:
        return []
    api, found = getattr(torch, kind.type), []
    cell, H, B, dtype = TYPICAL
    for index in range(torch.accelerator.device_count()):
        device = torch.device(kind.type, index)
        nvidia = kind.type == "cuda" and torch.version.hip is None
        runs = {name: load(name).why_not(None, None, device) for name in ON_GPU}
        plan = None
        if runs["cuda"] is None:
            try:
                plan = load("cuda").explain(cell, H, B, dtype, device)
            except RuntimeError as e:  # a GPU that is lost or full is what people ask a doctor about
                plan = f"no plan: {e}"
        found.append(
            {
                "device": str(device),
                "name": api.get_device_name(index) if hasattr(api, "get_device_name") else kind.type,
                "capability": ".".join(map(str, api.get_device_capability(index))) if nvidia else None,
                "backends": runs,
                "used": choose(None, CELLS[cell], dtype, device).__name__.rpartition(".")[2],
                "plan": plan,
            }
        )
    return found


def _no_gpu() -> str:
    """Why torch has none."""
    built = torch.backends.mps.is_built() or any(getattr(torch.version, k, None) for k in ("cuda", "hip", "xpu"))
    return "torch finds none" if built else "this build of torch is for the CPU"


def as_dict() -> dict[str, Any]:
    """The findings of `doctor` as plain values, for `--json`.

    >>> from gradkernels.doctor import as_dict
    >>> as_dict()["backends"]["reference"] is None
    True
    """
    table, gpus = backends(), _gpus()
    used = "cpu" if table["cpu"] is None else "reference"
    module = None
    if used == "cpu":
        from gradkernels.backends import cpu

        module = cpu.build().__name__
    advice = [f"{name}: {HOW[name]}" for name, reason in table.items() if reason is not None and name in HOW]
    for gpu in gpus:  # some kernels are for some GPUs only; what can be installed says how
        for name, reason in gpu["backends"].items():
            if reason is not None and "pip install" in reason and (text := f"{name}: {reason}") not in advice:
                advice.append(text)
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
        "gpus": gpus,
        "no gpu": None if gpus else _no_gpu(),
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
    if found["no gpu"]:
        lines.append(f"no GPU: {found['no gpu']}")
    for gpu in found["gpus"]:
        capability = f", compute capability {gpu['capability']}" if gpu["capability"] else ""
        lines.append(f"{gpu['device']}: {gpu['name']}{capability}")
        for name, reason in gpu["backends"].items():
            lines.append(f"  backend {name:10} {'runs' if reason is None else 'cannot run: ' + reason}")
        lines.append(f"  recurrent layers there take: {gpu['used']}")
        if gpu["plan"]:
            lines.append("  for example:")
            lines += [f"    {line}" for line in gpu["plan"].splitlines()]
    lines += [f"to do: {text}" for text in found["advice"]] or ["nothing to do"]
    return "\n".join(lines)


class _Callable(ModuleType):
    """`gk.doctor` is this module and, called, its text."""

    def __call__(self) -> str:
        return doctor()


sys.modules[__name__].__class__ = _Callable
