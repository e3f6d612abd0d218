"""A function of a cell cut at its means: rounds between which those who share the units of a row add up."""

from __future__ import annotations

import ast
from collections.abc import Collection
from dataclasses import dataclass

from .hasten import Rows, hasten, is_mean, leaves, targets
from .lift import lift


@dataclass(frozen=True)
class Cut:
    """Statements of each round, the last one with the function's own result.

    Beside the function's own variables they read `mean[k]`, what is known of the row since earlier rounds, and read and write
    `kept[k]`, values that an earlier round leaves to a later one. Round k writes `out[0] .. out[means[k] - 1]`, what its means are
    taken of; when those are in `mean`, `of_row[k]` puts what follows from means alone behind them, once for all units."""

    bodies: list[list[ast.stmt]]
    means: list[int]  # of each round but the last
    of_row: list[list[ast.stmt]]  # after each of these
    rows: list[int]  # how many values those put there
    kept: int


def cut(function: ast.FunctionDef) -> Cut:
    """Means that do not wait for each other share a round. A value is computed in the first round that needs it and kept for the
    others, unless it is a few operations on what is at hand: what is the same for a whole row, and arguments, which are read anyway.

    >>> f = ast.parse('''
    ... def forward(x, r, s):
    ...     u = exp(x[0])
    ...     u1 = mean(u)
    ...     v = u - u1
    ...     u2 = mean(v * v)
    ...     return (v / sqrt(u2) * u,), ()
    ... ''').body[0]
    >>> parts = cut(f)
    >>> parts.means, parts.rows, parts.kept
    ([1, 1], [0, 1], 1)
    >>> for body in [*parts.bodies, parts.of_row[1]]:
    ...     print("; ".join(ast.unparse(statement) for statement in body))
    u = exp(x[0]); out[0] = u; kept[0] = u
    u = kept[0]; u1 = mean[0]; v = u - u1; out[0] = v * v
    u = kept[0]; u1 = mean[0]; row1 = mean[2]; v = u - u1; return ((v * row1 * u,), ())
    u2 = mean[1]; row = sqrt(u2); row1 = 1 / row; mean[2] = row1
    """
    statements, result = lift(hasten(function.body[:-1]), function.body[-1])
    made = {name: s for s in statements for name in targets(s)}
    operands = {name: s.value.args[0] for name, s in made.items() if is_mean(s)}  # type: ignore[attr-defined]
    known = Rows()
    for s in made.values():
        known.note(s)
    depth = known.depth
    rounds = max((depth[name] for name in operands), default=0)
    means = [[name for name in operands if depth[name] == k + 1] for k in range(rounds)]

    # A condition is no number, and what a group of arguments holds is there in every round: neither is kept.
    again = {name for name, s in made.items() if isinstance(s.value, (ast.Compare, ast.Name, ast.Tuple))}
    again |= {name for name in known.of_row if not depth[name]}
    of_means = known.of_row - operands.keys() - again
    readers = [(depth.get(name, rounds + 1) if name in of_means else None, s.value) for name, s in made.items()]
    asked = {n for after, value in readers for n in leaves(value) if after is None or after > depth.get(n, 0)}
    asked |= set(leaves(result))
    rows = [[name for name in made if name in of_means & asked and depth[name] == k + 1] for k in range(rounds)]
    place = {name: k for k, name in enumerate(name for both in zip(means, rows) for group in both for name in group)}
    again |= _cheap(made, again | place.keys())
    roots: list[list[ast.AST]] = [*([operands[name] for name in group] for group in means), [result]]
    _, loads = _deal(roots, made, place, again)
    again |= _cheap(made, again | place.keys(), {name for group in loads for name in group})
    fresh, loads = _deal(roots, made, place, again)
    bodies: list[list[ast.stmt]] = []
    for k in range(rounds + 1):
        body = [_assign(name, f"mean[{place[name]}]") for name in made if name in place and name in fresh[k]]
        body += {
            id(made[name]): made[name] for name in fresh[k] if name not in place
        }.values()  # a group's names share one
        body += [_store(f"out[{j}]", operands[name]) for j, name in enumerate(means[k])] if k < rounds else [result]
        bodies.append(body)
    later = {name for group in loads for name in group}
    kept = {name: k for k, name in enumerate(name for group in fresh for name in group if name in later)}
    for k, body in enumerate(bodies):
        body[:0] = [_assign(name, f"kept[{kept[name]}]") for name in loads[k]]
        if k < rounds:
            body += [_store(f"kept[{kept[name]}]", ast.Name(name, ast.Load())) for name in fresh[k] if name in kept]
    of_row = [_of_row(group, made, place) for group in rows]
    return Cut(bodies, [len(group) for group in means], of_row, [len(group) for group in rows], len(kept))


def _of_row(group: list[str], made: dict[str, ast.Assign], place: dict[str, int]) -> list[ast.stmt]:
    """Statements that compute these variables of what is in `mean`, and put them there too."""
    needed = _closure([made[name].value for name in group], made, place.keys() - set(group), stop=set())
    body: list[ast.stmt] = []
    for name, statement in made.items():
        if name in group or name in needed - place.keys():
            body.append(statement)
        elif name in needed:
            body.append(_assign(name, f"mean[{place[name]}]"))
    return body + [_store(f"mean[{place[name]}]", ast.Name(name, ast.Load())) for name in group]


def _deal(
    roots: list[list[ast.AST]], made: dict[str, ast.Assign], place: dict[str, int], again: set[str]
) -> tuple[list[list[str]], list[list[str]]]:
    """Of each round, the variables that it has by itself, and those that an earlier one has left to it."""
    fresh: list[list[str]] = []
    loads: list[list[str]] = []
    for of_round in roots:
        before = {name for group in fresh for name in group} - again - place.keys()
        needed = _closure(of_round, made, place.keys(), stop=before)
        loads.append([name for name in made if name in needed & before])
        fresh.append([name for name in made if name in needed - before])
    return fresh, loads


FEW = 2  # operations that are cheaper than a store and a load


def _cheap(made: dict[str, ast.Assign], at_hand: set[str], kept: Collection[str] = ()) -> set[str]:
    """The variables that are a few operations on what is at hand, and on others that are kept as they are no such thing."""
    price, cheap = dict.fromkeys(at_hand, 0), set()
    for name, statement in made.items():
        if name in price:
            continue
        mine = [n for n in leaves(statement.value) if n in made]
        operations = _operations(statement.value)
        if operations is not None and all(n in price for n in mine):
            total = operations + sum(price[n] for n in mine)
            if total <= FEW:
                price[name] = total
                cheap.add(name)
                continue
        if name in kept:
            price[name] = 0
    return cheap


def _operations(node: ast.expr) -> int | None:
    """How many additions and products this is; None where it is anything else too."""
    match node:
        case ast.BinOp(left=left, op=ast.Add() | ast.Sub() | ast.Mult(), right=right):
            parts = _operations(left), _operations(right)
            return None if None in parts else 1 + sum(n for n in parts if n is not None)
        case ast.UnaryOp(operand=operand):
            return _operations(operand)
        case ast.Name() | ast.Subscript() | ast.Constant():
            return 0
    return None


def _closure(roots: list[ast.AST], made: dict[str, ast.Assign], known: Collection[str], stop: set[str]) -> set[str]:
    """The variables that these need; nobody looks behind what is known of the row or what an earlier round has computed."""
    needed: set[str] = set()
    todo = list(roots)
    while todo:
        for name in leaves(todo.pop()):
            if name in made and name not in needed:
                needed.add(name)
                if name not in known and name not in stop:
                    todo.append(made[name].value)
    return needed


def _assign(name: str, text: str) -> ast.stmt:
    return _parsed(f"{name} = {text}")


def _store(place: str, value: ast.expr) -> ast.stmt:
    statement = _parsed(f"{place} = 0")
    assert isinstance(statement, ast.Assign)
    statement.value = value
    return statement


def _parsed(text: str) -> ast.stmt:
    return ast.parse(text).body[0]
