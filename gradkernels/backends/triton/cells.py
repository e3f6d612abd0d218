"""The printed functions of a cell as functions of Triton, and the masks that a call draws for it."""

from __future__ import annotations

import ast
import functools
from types import SimpleNamespace

import triton
import triton.language as tl

from gradkernels.backends._extra import FIXED, GIVEN
from gradkernels.backends.reference.philox import limit
from gradkernels.backends.triton import philox
from gradkernels.backends.triton.functions import VOCABULARY
from gradkernels.cells import Cell
from gradkernels.cells.bind import bind

# All cells are called alike: what one has not is an empty tuple, given and taken.
_ALIKE = """
def forward_of(x, r, s, p, m, d):
    return forward(x, r, s{extra})


def operand_of(x, r, s, p, m, d):
    return operand(x, r, s{extra})


def second_of(a, s, t, p, m, d, dt):
    return second_adjoint(a, s, t{extra}, dt)


def backward_of(a, s, t, p, m, d, dt, dv):
    dx, dr, ds{found}, total = backward(a, s, t{extra}, dt{dv})
    return dx, dr, ds, {dp}, {dd}, total
"""

# The mean over the units of a row, of which a program has all.
_MEAN = """
def mean(v):
    inside = (tl.arange(0, v.shape[1]) < {H})[None, :]
    return tl.broadcast_to((tl.sum(tl.where(inside, v, 0.0), 1) / {H})[:, None], v.shape)
"""


@functools.cache
def device(cell: Cell, H: int | None = None) -> SimpleNamespace:
    """FORWARD, BACKWARD and, where the cell has a second product, OPERAND and SECOND, to be called by a kernel.

    They take and return tuples of blocks of one shape, float32 or float64, as `Cell` says, p, m and d always among the
    arguments and dp and dd among the results. H: units, of a cell that takes means over them."""
    # the interpreter wants to see the language from every function
    space = {**VOCABULARY, "tl": tl, "__name__": f"gradkernels.cells.{cell.name}"}
    where = f"<cell {cell.name} in triton>" if H is None else f"<cell {cell.name} of {H} units in triton>"
    if H is not None:
        space["mean"] = triton.jit(bind(_MEAN.format(H=H), f"<mean of {H} units in triton>", space)["mean"])
    printed = {name: triton.jit(f) for name, f in bind(cell.source, where, space).items()}
    taken = [name for name in cell.extra if name != "m"]
    text = _ALIKE.format(
        extra="".join(f", {name}" for name in cell.extra),
        found="".join(f", d{name}" for name in taken),
        dv=", dv" if cell.second else "",
        dp="dp" if cell.P else "()",
        dd="dd" if cell.D else "()",
    )
    alike = bind(text, where.replace("<cell", "<calls of cell"), {**space, **printed})
    wanted = {"FORWARD": "forward_of", "BACKWARD": "backward_of"}
    wanted |= {"OPERAND": "operand_of", "SECOND": "second_of"} if cell.second else {}
    made = {name: triton.jit(alike[f]) for name, f in wanted.items()}
    return SimpleNamespace(**{"OPERAND": None, "SECOND": None, **made})


@functools.cache
def masks(noise: tuple[float, ...], drawn: bool) -> triton.JITFunction:
    """MASKS: the masks of `Extra` for a block of rows and units, a tuple of planes; one function for each set of chances."""
    planes = []
    for k in range(len(noise) // 3):
        p, high, kind = noise[3 * k : 3 * k + 3]
        if kind == GIVEN:
            planes.append(
                "tl.broadcast_to(tl.load(flags + token, mask=live, other=0.0).to(like.dtype)[:, None], like.shape)"
            )
        elif not drawn or p == 0.0:
            planes.append(f"tl.full(like.shape, {(1 - p) * high!r}, like.dtype)")
        else:
            row = f"({'col' if kind == FIXED else 'origin + token'} + {k << 32})[:, None]"
            word = f"side_by_side(tl.load(seed), {row}, unit, like.shape[1])"
            kept = f"tl.full(like.shape, {high!r}, like.dtype)"
            planes.append(f"tl.where({word} < tl.full([], {limit(p)[0]}, tl.uint32), tl.zeros_like(like), {kept})")
    text = f"def masks(seed, flags, origin, token, col, live, unit, like):\n    return ({''.join(v + ', ' for v in planes)})\n"
    space = {"tl": tl, "side_by_side": philox.side_by_side, "__name__": "gradkernels.cells.masks"}
    return triton.jit(bind(text, f"<masks {noise} {drawn}>", space)["masks"])


def why_not(cell: Cell) -> str | None:
    """What of a cell the kernels do not have."""
    if cell.means and (cell.second or not cell.recurrent):
        return f"cell {cell.name!r} has means, and no product or a second one beside them"
    module = ast.parse(cell.source)
    called = {n.func.id for n in ast.walk(module) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)}
    missing = sorted(called - {*VOCABULARY, "mean"})
    return f"cell {cell.name!r} uses {', '.join(missing)}, which the kernels do not have" if missing else None
