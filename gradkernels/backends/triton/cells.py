"""The printed functions of a cell as functions of Triton."""

from __future__ import annotations

import ast
import functools
from types import SimpleNamespace

import triton
import triton.language as tl

from gradkernels.backends.triton.functions import VOCABULARY
from gradkernels.cells import Cell
from gradkernels.cells.bind import bind


@functools.cache
def device(cell: Cell) -> SimpleNamespace:
    """FORWARD, BACKWARD and, where the cell has a second product, OPERAND and SECOND, to be called by a kernel.

    They take and return tuples of blocks of one shape, float32 or float64, as `Cell` says."""
    # the interpreter wants to see the language from every function
    space = {**VOCABULARY, "tl": tl, "__name__": f"gradkernels.cells.{cell.name}"}
    functions = bind(cell.source, f"<cell {cell.name} in triton>", space)
    wanted = {"FORWARD": "forward", "BACKWARD": "backward", "OPERAND": "operand", "SECOND": "second_adjoint"}
    return SimpleNamespace(**{k: triton.jit(functions[f]) if f in functions else None for k, f in wanted.items()})


def why_not(cell: Cell) -> str | None:
    """What of a cell the kernels do not have."""
    if cell.P:
        return f"cell {cell.name!r} has per-unit parameters, which the kernels are not given"
    module = ast.parse(cell.source)
    called = {n.func.id for n in ast.walk(module) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)}
    missing = sorted(called - set(VOCABULARY))
    if any(isinstance(n, ast.Pow) for n in ast.walk(module)):
        missing.append("**")
    return f"cell {cell.name!r} uses {', '.join(missing)}, which the kernels do not have" if missing else None
