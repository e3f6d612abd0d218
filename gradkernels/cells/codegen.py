"""The functions of a cell as a C++ struct, and `python -m gradkernels.cells.codegen`, which writes csrc/cells.gen.h.

The printed Python of a cell is arithmetic that C++ writes in the same way, so it is carried over statement by statement:
numbers become V(number), tuples become arrays. Where a cell has means over the units of a row, which nobody has in one place,
each function is cut at them into rounds (`rounds.py`).
"""

from __future__ import annotations

import argparse
import ast
import copy
import json
import re
import sys
import threading
from collections.abc import Iterable
from pathlib import Path

from .bind import Cell
from .rounds import cut

HEADER = Path(__file__).parents[2] / "csrc" / "cells.gen.h"

# The cells that are built with the package: those of torch, and few enough that building takes minutes. All others are built
# where they are used.
COMPILED = ("lstm", "gru", "gru_reset_before", "rnn_tanh", "rnn_relu", "rnn_sigmoid")

# Parameters and results of each function, in the order of their C++ declaration.
_PARAMETERS = {
    "x": "const V (&{})[G]",
    "r": "const V (&{})[G]",
    "s": "const V (&{})[S]",
    "p": "const V (&{})[P]",
    "m": "const V (&{})[M]",
    "d": "const V (&{})[D]",
    "t": "const V (&{})[S]",
    "dt": "const V (&{})[S]",
    "a": "const V *{}",
    "dv": "const V &{}",
    "kept": "V *{}",
    "mean": "const V *{}",
}
_RESULTS = {
    "forward": {"t": "V (&{})[S]", "a": "V *{}"},
    "backward": {
        "dx": "V (&{})[G]",
        "dr": "V (&{})[G]",
        "ds": "V (&{})[S]",
        "dp": "V (&{})[P]",
        "dd": "V (&{})[D]",
        "total": "V (&{})[S]",
    },
    "operand": {"v": "V &{}"},
    "second_adjoint": {"v": "V &{}", "dr": "V (&{})[Q]"},
}


# Kernels are compiled by several threads at once, and before 3.12 Python counts the depth of a tree once for all of them:
# two that parse at the same time end in a SystemError.
_PARSING = threading.Lock()


def struct(cell: Cell, qualifiers: str = "static inline") -> str:
    """The C++ struct of a cell; csrc/cells.gen.h says what its members are. `qualifiers`: of its functions.

    >>> from gradkernels.cells import get
    >>> print(struct(get("rnn_relu")))
    struct RnnReluCell {
      static constexpr const char *name = "rnn_relu";
      static constexpr int G = 1, S = 1, P = 0, M = 0, D = 0, A = 0, Q = 0;
      static constexpr bool shared = true, recurrent = true, means = false;
    <BLANKLINE>
      using forward_rounds = NoRounds;
      template <class V>
      static inline void forward(const V (&x)[G], const V (&r)[G], const V (&)[S], V (&t)[S], V *) {
        t[0] = relu(x[0] + r[0]);
      }
    <BLANKLINE>
      using backward_rounds = NoRounds;
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
    with _PARSING:  # the rounds of a function are parsed, too
        return "\n".join([*_members(cell, qualifiers), "};\n"])


def _members(cell: Cell, qualifiers: str) -> list[str]:
    """The lines of the struct but its end."""
    module = ast.parse(cell.source)
    functions = {f.name: f for f in module.body if isinstance(f, ast.FunctionDef)}
    flag = lambda value: "true" if value else "false"
    lines = [
        f"struct {type_name(cell)} {{",
        f"  static constexpr const char *name = {json.dumps(cell.name, ensure_ascii=False)};",
        f"  static constexpr int G = {cell.G}, S = {cell.S}, P = {cell.P}, M = {cell.M}, D = {cell.D}, A = {cell.A}, Q = {len(cell.second)};",
        f"  static constexpr bool shared = {flag(not cell.split)}, recurrent = {flag(cell.recurrent)}, means = {flag(cell.means)};",
    ]
    has = {"dp": cell.P, "dd": cell.D}
    for name, every in _RESULTS.items():
        if name not in functions:
            continue
        results = {k: v for k, v in every.items() if has.get(k, True)}
        f = functions[name]
        given = [a.arg for a in f.args.args]
        if not cell.means:
            lines += ["", f"  using {name}_rounds = NoRounds;"]
            lines += _function(name, given, f.body, results, qualifiers)
            continue
        parts = cut(f)
        rows, means = (", ".join(str(n) for n in [*counts, 0]) for counts in (parts.rows, parts.means))
        lines += [
            "",
            f"  struct {name}_rounds {{",
            f"    static constexpr int count = {len(parts.means)}, kept = {parts.kept}, rows[] = {{{rows}}}, means[] = {{{means}}};",
            "  };",
        ]
        for k, body in enumerate(parts.bodies):
            made = results if k == len(parts.means) else {"out": "V *{}"}
            lines += _function(name, [f"Round<{k}>", *given, "kept", "mean"], body, made, qualifiers)
        for k, body in enumerate(parts.of_row):
            if body:
                lines += _function(name, [f"Row<{k}>"], body, {"mean": "V *{}"}, qualifiers)
    return lines


def device_struct(cell: Cell) -> str:
    """The text of cells.cuh, which every CUDA kernel includes: the struct of one cell, over the functions of math.cuh.

    >>> from gradkernels.cells import get
    >>> print(device_struct(get("rnn_relu")))  # doctest: +ELLIPSIS
    // The cell rnn_relu, printed by gradkernels/cells/codegen.py.
    #pragma once
    #include "math.cuh"
    <BLANKLINE>
    namespace gk {
    <BLANKLINE>
    template <int K> struct Round {};
    template <int K> struct Row {};
    struct NoRounds {
      static constexpr int count = 0, kept = 0, rows[] = {0}, means[] = {0};
    };
    <BLANKLINE>
    struct RnnReluCell {
      static constexpr const char *name = "rnn_relu";
      static constexpr int G = 1, S = 1, P = 0, M = 0, D = 0, A = 0, Q = 0;
      static constexpr bool shared = true, recurrent = true, means = false;
    <BLANKLINE>
      using forward_rounds = NoRounds;
      template <class V>
      GK_DEVICE static void forward(const V (&x)[G], const V (&r)[G], const V (&)[S], V (&t)[S], V *) {
        t[0] = relu(x[0] + r[0]);
      }
    ...
    } // namespace gk
    <BLANKLINE>
    """
    return _DEVICE.format(name=cell.name, rounds=ROUNDS, struct=struct(cell, "GK_DEVICE static"))


# As in csrc/cell.h, which no kernel of a GPU includes.
ROUNDS = """\
template <int K> struct Round {};
template <int K> struct Row {};
struct NoRounds {
  static constexpr int count = 0, kept = 0, rows[] = {0}, means[] = {0};
};
"""

_DEVICE = """\
// The cell {name}, printed by gradkernels/cells/codegen.py.
#pragma once
#include "math.cuh"

namespace gk {{

{rounds}
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
#include "cell.h"
#include <stdexcept>
#include <string>

// One struct per cell: pure arithmetic over a value type V, which has + - * / and unary -, comparisons that where(c, a, b)
// accepts, construction from a number, and the functions named here (sigmoid, tanh ...), found by argument-dependent lookup.
//
// Sizes: G gates, S states, P parameters, M masks, D values of some steps ago, A values kept for backward, Q products of another
// value than s[0] (those of the last Q gates).
// x[G], r[G]: pre-activations of the input and of the recurrent product; s[S], t[S]: states before and after; a[A]: kept values;
// p[P], m[M], d[D]: where a cell has them. dt[S] -> dx[G], dr[G], ds[S], dp[P], dd[D]: adjoints; total[S]: full adjoints of t.
// shared: dx and dr are the same. Not recurrent: r is not read.
// Where Q > 0: v is what the last Q products are taken of, dv its adjoint. Results may not overlap with arguments.
//
// Where a cell has means over the units of a row, a function f is in rounds: f(Round<k>, .., kept, mean, out) computes what
// f_rounds::means[k] means are taken of, for k < count; f(Round<count>, .., kept, mean, results) the rest. mean: what is known of
// the row, round after round, its means and then f_rounds::rows[k] values that f(Row<k>, mean) makes of means alone; kept[f_rounds::kept]: values of this unit that earlier rounds leave to later ones.
namespace gk {{

{structs}
// f(Cell{{}}) of the cell of that name.
template <class F> auto with_cell(const std::string &name, F f) -> decltype(f({first}{{}})) {{
{cases}  throw std::invalid_argument("no compiled cell '" + name + "'");
}}

}} // namespace gk
"""


def type_name(cell: Cell) -> str:
    """`lstm` -> LstmCell; what C++ cannot have in a name is left out."""
    return "".join(part[:1].upper() + part[1:] for part in re.split(r"[\W_]+", cell.name, flags=re.ASCII)) + "Cell"


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
    return ast.unparse(_Numbers().visit(copy.deepcopy(node)))  # several rounds may have this statement


def _function(
    name: str, given: list[str], statements: list[ast.stmt], results: dict[str, str], qualifiers: str
) -> list[str]:
    read = {n.id for s in statements for n in ast.walk(s) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)}
    body: list[str] = []
    tuples: dict[str, list[ast.expr]] = {}
    for statement in statements:
        match statement:
            case ast.Assign(targets=[ast.Name(id=variable)], value=ast.Tuple(elts=elts)):
                tuples[variable] = elts
            case ast.Assign(targets=[ast.Name(id=variable)], value=value):
                kind = "auto" if isinstance(value, ast.Compare) else "V"
                body.append(f"const {kind} {variable} = {_expression(value)};")
            case ast.Assign(targets=[ast.Subscript() as place], value=value):
                body.append(f"{ast.unparse(place)} = {_expression(value)};")
            case ast.Assign(targets=[ast.Tuple(elts=names)], value=ast.Name(id=group)):
                unpacked = [(k, ast.unparse(n)) for k, n in enumerate(names)]
                body += [f"const V {variable} = {group}[{k}];" for k, variable in unpacked if variable in read]
            case ast.Return(value=ast.Tuple(elts=values)):
                body += _results(values, results, tuples)
            case ast.Return(value=ast.expr() as value):
                body += _results([value], results, tuples)
            case _:
                raise AssertionError(f"not a statement of a printed cell: {ast.unparse(statement)}")
    mentioned = set(re.findall(r"\w+", "\n".join(body)))
    declare = lambda name, text: text.format(name if name in mentioned else "")
    parameters = ", ".join(declare(a, _PARAMETERS.get(a, a)) for a in given)
    made = ", ".join(declare(*item) for item in results.items())
    head = f"{qualifiers} void {name}({parameters}, {made}) {{"
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
    from . import get

    parser = argparse.ArgumentParser(prog="python -m gradkernels.cells.codegen", description="Write csrc/cells.gen.h.")
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 when the file is not current")
    options = parser.parse_args(arguments)
    text = header(map(get, COMPILED))
    if options.check:
        if HEADER.exists() and HEADER.read_text(encoding="utf-8") == text:
            return 0
        print(f"{HEADER} is not current; run python -m gradkernels.cells.codegen", file=sys.stderr)
        return 1
    HEADER.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
