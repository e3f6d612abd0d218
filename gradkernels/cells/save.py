"""What forward keeps for backward: a minimum cut of the graph between what backward needs and what it would cost to have it."""

from __future__ import annotations

import math
from typing import Any

from .graph import COSTLY, THERE, Node, reach

_PLANE, _CHEAP = (
    1_000_000,
    10_000,
)  # integers, so that the cut is exact; the remainder of a plane breaks ties towards early nodes


def choose_saved(outputs: list[Node], wanted: list[Node], recompute: float) -> list[Node]:
    """The cheapest set of values that forward must store so that all `wanted` can be computed.

    A value that is needed is either stored (one plane) or computed again from its arguments (`recompute` planes for a
    transcendental function, a hundredth for arithmetic). Entering states, new states, parameters and masks are there anyway;
    pre-activations x and r are not, so they are stored or avoided. Leaves other than these are adjoints from outside.
    """
    needed = reach(wanted)
    moving: set[Node] = set()  # whatever depends on adjoints: never stored
    for n in needed:
        if n.op == "leaf" and n.args[0] not in ("x", "r", *THERE) or not moving.isdisjoint(n.inputs):
            moving.add(n)
    still = [n for n in needed if n not in moving and n.op != "const"]
    free = {n for n in still if n in outputs or n.op == "leaf" and n.args[0] in THERE}
    sources = {a for n in moving for a in n.inputs} | set(wanted)
    flow = _Flow()
    for n in still:  # the side of "needed": must exist in backward; ("again", n) on that side: computed there
        if n in sources:
            flow.connect("needed", n, math.inf)
        # a condition is no number: it is computed again
        flow.connect(n, ("again", n), 0 if n in free else math.inf if n.is_condition else _PLANE + n.order)
        flow.connect(("again", n), n, math.inf)
        price = math.inf if n.op == "leaf" else round(recompute * _PLANE) if n.op in COSTLY else _CHEAP
        flow.connect(("again", n), "done", price)
        for a in n.inputs:
            flow.connect(("again", n), a, math.inf)
    side = flow.cut("needed", "done")
    return [n for n in still if n in side and ("again", n) not in side and n not in free]


class _Flow:
    """Maximum flow by shortest augmenting paths; the graphs have a few dozen nodes."""

    def __init__(self) -> None:
        self.room: dict[Any, dict[Any, float]] = {}

    def connect(self, u: Any, v: Any, capacity: float) -> None:
        self.room.setdefault(u, {})[v] = self.room.get(u, {}).get(v, 0) + capacity
        self.room.setdefault(v, {}).setdefault(u, 0)

    def cut(self, source: Any, sink: Any) -> set:
        """The nodes on the source's side of a minimum cut, the smallest such set."""
        while True:
            parent, queue = {source: None}, [source]
            for u in queue:
                for v, room in self.room.get(u, {}).items():
                    if room > 0 and v not in parent:
                        parent[v] = u
                        queue.append(v)
            if sink not in parent:
                return set(parent)
            path, v = [], sink
            while v != source:
                path.append((parent[v], v))
                v = parent[v]
            amount = min(self.room[u][v] for u, v in path)
            for u, v in path:
                self.room[u][v] -= amount
                self.room[v][u] += amount
