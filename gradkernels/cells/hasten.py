"""Means taken as early as they can be: a mean is linear, and what another mean is a factor or a term of need not wait for it."""

from __future__ import annotations

import ast

Term = tuple[int, ast.expr | None, ast.expr | None]  # sign, factor that is the same for a row, what a mean is taken of


def is_mean(statement: ast.stmt) -> bool:
    call = getattr(statement, "value", None)
    return isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id == "mean"


def leaves(node: ast.AST) -> list[str]:
    """The names of arguments and variables in an expression."""
    functions = {id(n.func) for n in ast.walk(node) if isinstance(n, ast.Call)}
    return [n.id for n in ast.walk(node) if isinstance(n, ast.Name) and id(n) not in functions]


def targets(statement: ast.Assign) -> list[str]:
    (target,) = statement.targets
    return [n.id for n in ast.walk(target) if isinstance(n, ast.Name)]


def assign(name: str, value: ast.expr) -> ast.Assign:
    return ast.fix_missing_locations(ast.Assign([ast.Name(name, ast.Store())], value))


class Rows:
    """What is known of the variables of a function, statement by statement."""

    def __init__(self) -> None:
        self.values: dict[str, ast.expr] = {}
        self.depth: dict[str, int] = {}  # how many means one has to wait for, one after the other
        self.of_row: set[str] = set()  # the same for all units

    def ready(self, node: ast.AST) -> int:
        return max((self.depth[n] for n in leaves(node) if n in self.depth), default=0)

    def uniform(self, node: ast.AST) -> bool:
        return all(n in self.of_row for n in leaves(node))

    def note(self, statement: ast.Assign) -> None:
        mean = is_mean(statement)
        for name in targets(statement):
            self.values[name] = statement.value
            self.depth[name] = self.ready(statement.value) + mean
            if mean or self.uniform(statement.value):
                self.of_row.add(name)

    def terms(self, node: ast.expr, late: int) -> list[Term] | None:
        """The sum that this is, of values that are there before `late`, each with a factor; None where it is no such sum."""
        if self.uniform(node):
            return [(1, node, None)]
        if self.ready(node) < late:
            return [(1, None, node)]
        match node:
            case ast.Name(id=name):
                return self.terms(self.values[name], late)
            case ast.UnaryOp(op=ast.USub(), operand=operand):
                return _scaled(self.terms(operand, late), -1)
            case ast.BinOp(left=left, op=ast.Add() | ast.Sub() as op, right=right):
                a, b = self.terms(left, late), self.terms(right, late)
                b = _scaled(b, -1 if isinstance(op, ast.Sub) else 1)
                return None if a is None or b is None else a + b
            case ast.BinOp(left=left, op=ast.Mult(), right=right) if self.uniform(left):
                return _scaled(self.terms(right, late), 1, left)
            case ast.BinOp(left=left, op=ast.Mult() | ast.Div() as op, right=right) if self.uniform(right):
                return _scaled(self.terms(left, late), 1, right, op)
        return None


def _scaled(
    terms: list[Term] | None, sign: int, by: ast.expr | None = None, op: ast.operator | None = None
) -> list[Term] | None:
    if terms is None or by is None:
        return terms and [(sign * s, factor, of) for s, factor, of in terms]
    return [
        (
            sign * s,
            by if factor is None and op is None else ast.BinOp(factor or ast.Constant(1), op or ast.Mult(), by),
            of,
        )
        for s, factor, of in terms
    ]


def hasten(statements: list[ast.stmt]) -> list[ast.Assign]:
    """The same statements, a mean being a sum of earlier ones where that shortens the wait.

    >>> f = '''
    ... u1 = mean(x)
    ... u = x - u1
    ... u2 = mean(u * g)
    ... du = g + u2 * u
    ... u3 = mean(-du)
    ... '''
    >>> print(*map(ast.unparse, hasten(ast.parse(f).body)), sep=\"\\n\")
    u1 = mean(x)
    u = x - u1
    u2 = mean(u * g)
    du = g + u2 * u
    u3_1 = mean(-g)
    u3_2 = mean(-u)
    u3 = u3_1 + u2 * u3_2
    """
    rows, out = Rows(), []
    for statement in statements:
        assert isinstance(statement, ast.Assign)
        for s in _hastened(statement, rows) if is_mean(statement) else [statement]:
            rows.note(s)
            out.append(s)
    return out


def _hastened(statement: ast.Assign, rows: Rows) -> list[ast.Assign]:
    assert isinstance(statement.value, ast.Call)
    (name,), operand = targets(statement), statement.value.args[0]
    late = rows.ready(operand)
    terms = rows.terms(operand, late) if late else None
    if terms is None:
        return [statement]
    groups: dict[str, tuple[ast.expr | None, dict[str, tuple[ast.expr, int]]]] = {}
    alone: list[tuple[int, ast.expr]] = []
    for sign, factor, of in terms:
        if of is None:
            assert factor is not None
            alone.append((sign, factor))
            continue
        _, members = groups.setdefault("" if factor is None else ast.unparse(factor), (factor, {}))
        known, count = members.get(ast.unparse(of), (of, 0))
        members[ast.unparse(of)] = known, count + sign
    made, total = [], list(alone)
    for k, (factor, members) in enumerate(groups.values()):
        sums = _sum([(count, of) for of, count in members.values() if count])
        if sums is not None:
            made.append(assign(f"{name}_{k + 1}", ast.Call(ast.Name("mean", ast.Load()), [sums], [])))
            mean = ast.Name(f"{name}_{k + 1}", ast.Load())
            total.append((1, mean if factor is None else ast.BinOp(factor, ast.Mult(), mean)))
    return [*made, assign(name, _sum(total) or ast.Constant(0))]


def _sum(terms: list[tuple[int, ast.expr]]) -> ast.expr | None:
    out: ast.expr | None = None
    for count, value in terms:
        part = value if abs(count) == 1 else ast.BinOp(ast.Constant(abs(count)), ast.Mult(), value)
        if out is None:
            out = part if count > 0 else ast.UnaryOp(ast.USub(), part)
        else:
            out = ast.BinOp(out, ast.Add() if count > 0 else ast.Sub(), part)
    return out
