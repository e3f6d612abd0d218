"""Cells made of other cells: what regularises a recurrence is a line around its step, so that every driver has it.

Masks are drawn by whoever calls, a plane of its own for each `m[k]`: a transform adds its planes after those of the cell.
Around one cell they belong in this order, the innermost first: zoneout, then skip, or masked, or resets.
"""

from __future__ import annotations

import ast
from collections.abc import Callable

from .bind import Cell
from .derive import build, forward_of, groups_of
from .graph import Graph, Group, Node, Products
from .inline import inline
from .reader import Reader


def zoneout(cell: Cell) -> Cell:
    """Each state keeps its old value where its mask is 0: Krueger et al. (2017).

    s'[k] = s[k] + m[M + k] * (t[k] - s[k])

    Masks are 0 or 1 in training, where a state is kept with probability p, and 1 - p in evaluation.

    >>> from gradkernels.cells import get
    >>> print(zoneout(get("rnn_tanh")).source.split("\\n\\n\\n")[0])
    def forward(x, r, s, m):
        u1 = tanh(x[0] + r[0])
        return (s[0] + m[0] * (u1 - s[0]),), (1 - u1 * u1,)
    """

    def step(g: _Around) -> list[Node]:
        s = g.take("s", cell.S)
        new = g.inline(cell, s)
        return [g.text("s + m * (t - s)", s=s[k], t=new[k], m=g["m"][cell.M + k]) for k in range(cell.S)]

    return _around("zoneout", cell, step)


def skip(cell: Cell) -> Cell:
    """The first state of some steps ago is added: h' = t[0] + d[0], a path of T / k factors for the gradient.

    Raises:
        ValueError: the cell reads a delayed value itself.
    """
    if cell.D:
        raise ValueError(f"cell {cell.name} has a delayed value already, and a cell has one")

    def step(g: _Around) -> list[Node]:
        h, *others = g.inline(cell, g.take("s", cell.S))
        return [g.text("h + d", h=h, d=g["d"][0]), *others]

    return _around("skip", cell, step)


def masked(cell: Cell) -> Cell:
    """The recurrent product is taken of a masked state: r = W (m * h) + b.

    States are m[M] * h, then those of the cell: the second one is its output, the first what the matrix multiplies. A mask for
    the whole sequence is variational dropout (Gal & Ghahramani, 2016), one a step drops other connections at every step. Whoever
    calls gives the first state masked.

    Raises:
        ValueError: the cell has a delayed value, which is of the first state, unmasked.
    """
    _refuse_delay(cell)

    def step(g: _Around) -> list[Node]:
        hidden, *s = g.take("s", cell.S + 1)
        h, *others = g.inline(cell, s, first=hidden)
        return [g.text("m * h", h=h, m=g["m"][cell.M]), h, *others]

    return _around("masked", cell, step)


def resets(cell: Cell) -> Cell:
    """All states begin again with zero where the next step's flag says so: m[M] is 0 there, else 1.

    States are m * h, h, then m * t[k] of the others: the second one is the output, from before the reset.

    Raises:
        ValueError: the cell has a delayed value, which knows nothing of resets.
    """
    _refuse_delay(cell)

    def step(g: _Around) -> list[Node]:
        hidden, _, *s = g.take("s", cell.S + 1)
        h, *others = g.inline(cell, [hidden, *s])
        reset = lambda v: g.text("m * h", h=v, m=g["m"][cell.M])
        return [reset(h), h, *map(reset, others)]

    return _around("resets", cell, step)


def _refuse_delay(cell: Cell) -> None:
    if cell.D:
        raise ValueError(f"cell {cell.name} has a delayed value, which is of its first state as it was")


class _Around:
    """What a transform builds with: the groups of the new cell, and expressions over its nodes."""

    def __init__(self, graph: Graph):
        self.graph, self.reader, self.groups = graph, Reader(graph), groups_of(graph)

    def __getitem__(self, name: str) -> Group:
        return self.groups[name]

    def take(self, name: str, count: int) -> list[Node]:
        return [self.groups[name][k] for k in range(count)]

    def text(self, text: str, **nodes: Node) -> Node:
        return self.reader.text(text, nodes)

    def inline(self, cell: Cell, s: list[Node], first: Node | None = None) -> tuple[Node, ...]:
        r = self.groups["r"]
        assert isinstance(r, Products)
        extra = [self.take(name, getattr(cell, name.upper())) for name in cell.extra]
        return inline(cell, self.reader, self.take("x", cell.G), r, s, extra, ast.Pass(), first)


def _around(what: str, cell: Cell, step: Callable[[_Around], list[Node]]) -> Cell:
    g = _Around(Graph())
    return build(f"{what}_{cell.name}", forward_of(g.graph, g.groups, step(g)), params=cell.params)
