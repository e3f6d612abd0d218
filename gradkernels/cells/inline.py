"""A cell inside another: its printed forward, read again over other values."""

from __future__ import annotations

import ast
import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING

from .bind import Cell
from .graph import Graph, Node, Products

if TYPE_CHECKING:
    from .reader import Reader


@functools.lru_cache(maxsize=64)
def _functions(cell: Cell) -> dict[str, ast.FunctionDef]:
    return {f.name: f for f in ast.parse(cell.source).body if isinstance(f, ast.FunctionDef)}


def full_like(like: Node, value: Node) -> Node:
    """What a printed cell calls where it returns a number: here the number itself will do."""
    return value


def inline(
    cell: Cell,
    reader: Reader,
    x: Sequence[Node],
    r: Products,
    s: Sequence[Node],
    extra: Sequence[Sequence[Node]],  # p, m, d, those that the cell takes
    at: ast.AST,
    first: Node | None = None,
) -> tuple[Node, ...]:
    """The new states of a cell as nodes of the reader's graph. `first`: the state that its operand is made of, if not s[0].

    `at` is where an error points that comes of two cells in one, such as two operands."""
    graph: Graph = reader.graph
    read = lambda name, values: type(reader)(graph, f"<cell {cell.name}>", {"full_like": full_like}).function(
        _functions(cell)[name], values
    )
    leaves = [r[k] for k in range(cell.G - len(cell.second))] if cell.recurrent else []
    if cell.second:
        entering = s if first is None else [first, *s[1:]]
        operand = read("operand", [x, leaves, entering, *extra])
        leaves += [reader.take_product(at, r, k, operand) for k in cell.second]
    states: tuple[Node, ...] = read("forward", [x, leaves, s, *extra])[0]
    return states
