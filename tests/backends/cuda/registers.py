"""What the compiler makes of the kernels that ship: `python -m tests.backends.cuda.registers` writes registers.json anew.

Cases are layers: the planner chooses the kernel on a GPU that only compiles, and so takes part in what is recorded.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from gradkernels.backends.cuda import nvrtc, plan, step
from gradkernels.cells import CELLS
from gradkernels.cells.codegen import COMPILED, device_struct

TABLE = Path(__file__).with_suffix(".json")
BUILD = Path(__file__).resolve().parents[3] / "build" / "cubins"


class Kernel:
    """A variant that was compiled and cannot be launched."""

    def __init__(self, machine: Compiler, variant: Any):
        texts = {**nvrtc.headers(), "cells.cuh": device_struct(variant.cell)}
        self.variant, self.machine = variant, machine
        self.compiled = nvrtc.compile(variant.source(), texts, nvrtc.architecture(machine.capability))
        self.spilled = self.compiled.spilled

    def resident(self) -> int:
        return self.machine.multiprocessors // self.variant.C


@dataclass(eq=False)
class Compiler:
    """A GPU of which only the compiler is there; all its clusters and blocks are resident."""

    capability: tuple[int, int]
    multiprocessors: int
    shared_bytes: int
    max_cluster: int

    def kernel(self, variant: Any) -> Kernel:
        return Kernel(self, variant)


GPUS = {
    "sm_80": Compiler((8, 0), 108, 166912, 1),
    "sm_90a": Compiler((9, 0), 132, 232448, 16),
    "sm_100a": Compiler((10, 0), 148, 232448, 16),
    "sm_120": Compiler((12, 0), 170, 101376, 8),
}


# Cells with something that is only in the kernels that go step by step, or with more values than others.
STEPWISE = ("lstm_peephole", "lstm_layer_norm", "gru_layer_norm", "indrnn", "slstm", "rnn_modrelu")


@dataclass(frozen=True)
class Case:
    """A layer, in one direction; H 0: the kernels of the plan that goes step by step."""

    arch: str
    which: str  # forward | backward
    cell: str
    number: str
    H: int = 0
    B: int = 0
    norms: bool = False

    def __str__(self) -> str:
        size = f"{self.H}x{self.B}" if self.H else "step"
        return f"{self.arch} {self.which} {self.cell} {self.number} {size}{' norms' * self.norms}"

    @cached_property
    def kernel(self) -> Kernel:
        machine, cell = GPUS[self.arch], CELLS[self.cell]
        if not self.H:
            return machine.kernel(
                {"forward": step.StepForward, "backward": step.StepBackward}[self.which](
                    cell, self.number, step.most_units(cell)
                )
            )
        chosen = plan.plan(machine, cell, self.number, self.H, self.B, self.which, self.norms)
        if chosen.variant is None:
            raise AssertionError(f"{self} is to be a kernel, but goes step by step: {chosen.refused}")
        return machine.kernel(chosen.variant)

    def found(self) -> dict[str, Any]:
        """What is recorded."""
        kernel, v = self.kernel, self.kernel.variant
        form = (
            "step"
            if not self.H
            else f"{v.exchange} C={v.C} H={v.H} U={v.U} N={v.N} WM={v.WM} WK={v.WK} KEPT={v.KEPT} SHARED={v.SHARED}"
        )
        return {
            "form": form,
            "threads": v.threads,
            "registers": kernel.compiled.registers,
            "expected": v.registers,
            "spilled": kernel.spilled,
            "shared": v.shared_bytes,
        }


def _cases() -> list[Case]:
    both = lambda arch, *rest, **more: [Case(arch, which, *rest, **more) for which in ("forward", "backward")]
    cases = []
    for H, B in ((64, 8), (256, 8), (256, 256), (768, 16), (1024, 64)):  # clusters of 1 and more, grids, wide tiles
        cases += both("sm_90a", "lstm", "bf16", H, B)
    for cell in [name for name in COMPILED if name != "lstm"]:
        cases += both("sm_90a", cell, "bf16", 200, 8)
    cases += both("sm_90a", "gru_reset_before", "bf16", 640, 4) + both("sm_90a", "lstm_peephole", "bf16", 200, 8)
    for number in ("fp16", "tf32", "fp32"):
        cases += both("sm_90a", "lstm", number, 128, 16)
    cases.append(Case("sm_90a", "backward", "lstm", "bf16", 256, 8, norms=True))
    for cell in STEPWISE:
        cases += both("sm_90a", cell, "fp32")
    for arch in GPUS:
        if arch != "sm_90a":
            cases += both(arch, "lstm_layer_norm", "bf16")
        cases += both(arch, "lstm", "bf16") + both(arch, "gru_reset_before", "fp32")  # step by step
        if arch != "sm_90a":
            cases += both(arch, "lstm", "bf16", 256, 16) + both(arch, "gru", "tf32", 100, 16)
    return cases


CASES = _cases()


def _measured(case: Case) -> dict[str, Any]:
    os.environ["GRADKERNELS_CACHE"] = str(BUILD)
    return case.found()


def measured() -> dict[str, dict[str, Any]]:
    """All cases, compiled by two processes; what the same sources gave before is taken from build/."""
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as pool:
        return dict(zip(map(str, CASES), pool.map(_measured, CASES), strict=True))


def recorded() -> dict[str, Any]:
    return json.loads(TABLE.read_text(encoding="utf-8"))


def main() -> int:
    lines = [f"  {json.dumps(name)}: {json.dumps(found)}" for name, found in measured().items()]
    version = ".".join(map(str, nvrtc.version()))
    TABLE.write_text(f'{{"nvrtc": "{version}", "kernels": {{\n' + ",\n".join(lines) + "\n}}\n", encoding="utf-8")
    print(f"{TABLE}: {len(lines)} kernels by NVRTC {version}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
