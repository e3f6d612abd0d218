"""The functions of a cell as a C++ struct, and `python -m gradkernels.cells.codegen`, which writes csrc/cells.gen.h.

The printed Python of a cell is arithmetic that C++ writes in the same way, so it is carried over statement by statement:
numbers become V(number), tuples become arrays.
"""

from __future__ import annotations

import argparse
import ast
import re
import sys
import threading
from collections.abc import Iterable
from pathlib import Path

from .bind import Cell

HEADER = Path(__file__).parents[2] / "csrc" / "cells.gen.h"

# Parameters and results of each function, in the order of their C++ declaration.
_PARAMETERS = {
    "x": "const V (&{})[G]",
    "r": "const V (&{})[G]",
    "s": "const V (&{})[S]",
    "t": "const V (&{})[S]",
    "dt": "const V (&{})[S]",
    "a": "const V *{}",
    "dv": "const V &{}",
}
_RESULTS = {
    "forward": {"t": "V (&{})[S]", "a": "V *{}"},
    "backward": {"dx": "V (&{})[G]", "dr": "V (&{})[G]", "ds": "V (&{})[S]", "total": "V (&{})[S]"},
    "operand": {"v": "V &{}"},
    "second_adjoint": {"v": "V &{}", "dr": "V (&{})[Q]"},
}


# Kernels are compiled by several threads at once, and before 3.12 Python counts the depth of a tree once for all of them:
# two that parse at the same time end in a SystemError.
_PARSING = threading.Lock()


def struct(cell: Cell, qualifiers: str = "static inline") -> str:
    """The C++ struct of a cell; csrc/cells.gen.h says what its members are. `qualifiers`: of its functions.

    Raises:
        NotImplementedError: it has per-unit parameters or `mean`, which the C++ drivers do not have.
        ValueError: its name cannot be one in C++.

    >>> from gradkernels.cells import get
    >>> print(struct(get("rnn_relu")))
    struct RnnRelu {
      static constexpr const char *name = "rnn_relu";
      static constexpr int G = 1, S = 1, P = 0, A = 0, Q = 0;
      static constexpr bool shared = true;
    <BLANKLINE>
      template <class V>
      static inline void forward(const V (&x)[G], const V (&r)[G], const V (&)[S], V (&t)[S], V *) {
        t[0] = relu(x[0] + r[0]);
      }
    <BLANKLINE>
      template <class V>
      static inline void backward(const V *, const V (&)[S], const V (&t)[S], const V (&dt)[S],
          V (&dx)[G], V (&dr)[G], V (&ds)[S], V (&total)[S]) {
        const V dx0 = where(t[0] <= V(0), V(0), dt[0]);
        dx[0] = dx0;
        dr[0] = dx[0];
        ds[0] = V(0);
        total[0] = dt[0];
      }
    };
    <BLANKLINE>
    """
    if cell.P:
        raise NotImplementedError(
            f"cell '{cell.name}' has per-unit parameters p, which the C++ drivers cannot pass yet"
        )
    with _PARSING:
        module = ast.parse(cell.source)
    functions = {f.name: f for f in module.body if isinstance(f, ast.FunctionDef)}
    used = {n.id for n in ast.walk(module) if isinstance(n, ast.Name)}
    if "mean" in used:
        raise NotImplementedError(f"cell '{cell.name}' has mean, a sum over units, which the C++ drivers cannot do yet")
    if not cell.name.isidentifier() or not cell.name.isascii():
        raise ValueError(f"a C++ struct cannot be named after cell '{cell.name}'")
    shared = "true" if not cell.split else "false"
    lines = [
        f"struct {type_name(cell)} {{",
        f'  static constexpr const char *name = "{cell.name}";',
        f"  static constexpr int G = {cell.G}, S = {cell.S}, P = {cell.P}, A = {cell.A}, Q = {len(cell.second)};",
        f"  static constexpr bool shared = {shared};",
    ]
    for name, results in _RESULTS.items():
        if name in functions:
            lines += ["", *_function(functions[name], results, qualifiers)]
    return "\n".join([*lines, "};\n"])


def device_struct(cell: Cell) -> str:
    """The text of cells.cuh, which every CUDA kernel includes: the struct of one cell, over the functions of math.cuh.

    Raises:
        NotImplementedError, ValueError: as `struct`.

    >>> from gradkernels.cells import get
    >>> print(device_struct(get("rnn_relu")))  # doctest: +ELLIPSIS
    // The cell rnn_relu, printed by gradkernels/cells/codegen.py.
    #pragma once
    #include "math.cuh"
    <BLANKLINE>
    namespace gk {
    <BLANKLINE>
    struct RnnRelu {
      static constexpr const char *name = "rnn_relu";
      static constexpr int G = 1, S = 1, P = 0, A = 0, Q = 0;
      static constexpr bool shared = true;
    <BLANKLINE>
      template <class V>
      GK_DEVICE static void forward(const V (&x)[G], const V (&r)[G], const V (&)[S], V (&t)[S], V *) {
        t[0] = relu(x[0] + r[0]);
      }
    ...
    } // namespace gk
    <BLANKLINE>
    """
    return _DEVICE.format(name=cell.name, struct=struct(cell, "GK_DEVICE static"))


_DEVICE = """\
// The cell {name}, printed by gradkernels/cells/codegen.py.
#pragma once
#include "math.cuh"

namespace gk {{

{struct}
}} // namespace gk
"""


def header(cells: Iterable[Cell]) -> str:
    """All of csrc/cells.gen.h."""
    cells = list(cells)
    cases = "".join(f"  if (name == {type_name(c)}::name) return f({type_name(c)}{{}});\n" for c in cells)
    return _TEMPLATE.format(structs="\n".join(map(struct, cells)), cases=cases, first=type_name(cells[0]))


_TEMPLATE = """\
// Written by `python -m gradkernels.cells.codegen` from gradkernels/cells; a test compares. Do not edit.
// clang-format off
#pragma once
#include <stdexcept>
#include <string>

// One struct per cell: pure arithmetic over a value type V, which has + - * / and unary -, comparisons that where(c, a, b)
// accepts, construction from a number, and the functions named here (sigmoid, tanh ...), found by argument-dependent lookup.
//
// Sizes: G gates, S states, A values kept for backward, Q products of another value than s[0] (those of the last Q gates).
// x[G], r[G]: pre-activations of the input and of the recurrent product; s[S], t[S]: states before and after; a[A]: kept values.
// dt[S] -> dx[G], dr[G], ds[S]: adjoints; total[S]: full adjoints of t. shared: dx and dr are the same.
// Where Q > 0: v is what the last Q products are taken of, dv its adjoint. Results may not overlap with arguments.
namespace gk {{

{structs}
// f(Cell{{}}) of the cell of that name.
template <class F> auto with_cell(const std::string &name, F f) -> decltype(f({first}{{}})) {{
{cases}  throw std::invalid_argument("no compiled cell '" + name + "'");
}}

}} // namespace gk
"""


def type_name(cell: Cell) -> str:
    return "".join(part.capitalize() for part in cell.name.split("_"))


class _Numbers(ast.NodeTransformer):
    """Numbers as values of type V; indices stay."""

    def visit_Constant(self, node: ast.Constant) -> ast.expr:
        return ast.Call(ast.Name("V"), [node], [])

    def visit_Subscript(self, node: ast.Subscript) -> ast.expr:
        return node

    def visit_Call(self, node: ast.Call) -> ast.expr:
        if isinstance(node.func, ast.Name) and node.func.id == "full_like":
            return self.visit(node.args[1])
        node.args = [self.visit(a) for a in node.args]
        return node


def _expression(node: ast.expr) -> str:
    return ast.unparse(_Numbers().visit(node))


def _function(node: ast.FunctionDef, results: dict[str, str], qualifiers: str) -> list[str]:
    read = {n.id for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)}
    body: list[str] = []
    tuples: dict[str, list[ast.expr]] = {}
    for statement in node.body:
        match statement:
            case ast.Assign(targets=[ast.Name(id=name)], value=ast.Tuple(elts=elts)):
                tuples[name] = elts
            case ast.Assign(targets=[ast.Name(id=name)], value=value):
                kind = "auto" if isinstance(value, ast.Compare) else "V"
                body.append(f"const {kind} {name} = {_expression(value)};")
            case ast.Assign(targets=[ast.Tuple(elts=names)], value=ast.Name(id=group)):
                unpacked = [(k, ast.unparse(n)) for k, n in enumerate(names)]
                body += [f"const V {name} = {group}[{k}];" for k, name in unpacked if name in read]
            case ast.Return(value=ast.Tuple(elts=values)):
                body += _results(values, results, tuples)
            case ast.Return(value=ast.expr() as value):
                body += _results([value], results, tuples)
            case _:
                raise AssertionError(f"not a statement of a printed cell: {ast.unparse(statement)}")
    mentioned = set(re.findall(r"\w+", "\n".join(body)))
    declare = lambda name, text: text.format(name if name in mentioned else "")
    given = ", ".join(declare(a.arg, _PARAMETERS[a.arg]) for a in node.args.args)
    made = ", ".join(declare(*item) for item in results.items())
    head = f"{qualifiers} void {node.name}({given}, {made}) {{"
    head = head if len(head) < 118 else head.replace(f", {made}", f",\n      {made}")
    return [f"  {line}" for line in ["template <class V>", head, *(f"  {line}" for line in body), "}"]]


def _results(values: list[ast.expr], results: dict[str, str], tuples: dict[str, list[ast.expr]]) -> list[str]:
    lines: list[str] = []
    written: dict[str, str] = {}  # variable that is a tuple -> the result that has it already
    for value, result in zip(values, results, strict=True):
        match value:
            case ast.Name(id=name) if name in written:
                texts = [f"{written[name]}[{k}]" for k in range(len(tuples[name]))]
            case ast.Name(id=name) if name in tuples:
                written[name] = result
                texts = [_expression(e) for e in tuples[name]]
            case ast.Tuple(elts=elts):
                texts = [_expression(e) for e in elts]
            case _:
                lines.append(f"{result} = {_expression(value)};")
                continue
        assignments = [f"{result}[{k}] = {text};" for k, text in enumerate(texts)]
        line = " ".join(assignments)
        lines += assignments if len(line) > 112 else [line] if line else []
    return lines


def main(arguments: list[str] | None = None) -> int:
    from . import CELLS

    parser = argparse.ArgumentParser(prog="python -m gradkernels.cells.codegen", description="Write csrc/cells.gen.h.")
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 when the file is not current")
    options = parser.parse_args(arguments)
    text = header(CELLS.values())
    if options.check:
        if HEADER.exists() and HEADER.read_text(encoding="utf-8") == text:
            return 0
        print(f"{HEADER} is not current; run python -m gradkernels.cells.codegen", file=sys.stderr)
        return 1
    HEADER.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
