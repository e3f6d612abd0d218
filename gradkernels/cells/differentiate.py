"""Reverse and forward mode over the graph of a cell."""

from __future__ import annotations

from .graph import RULES, Graph, Node, reach
from .reader import Reader


def _contribution(graph: Graph, node: Node, k: int, g: Node) -> Node | None:
    """What argument k gets when the result has adjoint g; what the result gets when argument k has tangent g."""
    names, rules = RULES[node.op]
    if rules[k] is None:
        return None
    return Reader(graph).text(rules[k], dict(zip(names, node.args)) | {"y": node, "g": g})


def adjoints(graph: Graph, seeds: list[tuple[Node, Node]]) -> dict[Node, Node]:
    """Reverse mode: {node: adjoint}. Seeds are (value, its adjoint from outside); those of one value add up."""
    adjoint: dict[Node, Node] = {}

    def add(n: Node, g: Node) -> None:
        adjoint[n] = graph.call("add", adjoint[n], g) if n in adjoint else g

    program = [n for n in reach(value for value, _ in seeds) if not n.is_leaf]
    for value, seed in seeds:
        add(value, seed)
    for node in reversed(program):
        if node in adjoint:
            if node.name and not adjoint[node].hint:
                adjoint[node].hint = "d" + node.name
            for k, a in enumerate(node.args):
                if a.op != "const" and (g := _contribution(graph, node, k, adjoint[node])) is not None:
                    add(a, g)
    for node, g in adjoint.items():
        if node.op == "leaf" and not g.hint:
            g.hint = f"d{node.args[0]}{node.args[1]}"
    return adjoint


def tangents(graph: Graph, outputs: list[Node]) -> list[Node]:
    """Forward mode: tangents of the outputs, those of the leaves being leaves dx[k], dr[k], ds[k], dp[k], dd[k]; masks m stand."""
    tangent: dict[Node, Node] = {}
    for node in reach(outputs):
        if node.op == "leaf":
            if node.args[0] == "m":
                continue
            tangent[node] = graph.leaf("d" + node.args[0], node.args[1])
            continue
        for k, a in enumerate(node.args):
            if a in tangent and (g := _contribution(graph, node, k, tangent[a])) is not None:
                tangent[node] = graph.call("add", tangent[node], g) if node in tangent else g
    return [tangent.get(o, graph.const(0)) for o in outputs]
