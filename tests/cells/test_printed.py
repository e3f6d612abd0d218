# ruff: noqa: F821 - functions of the cell language need no import
"""The printed text, what is kept for backward, and the Cell that carries both."""

import ast
import copy
import dataclasses
import inspect
import itertools
import pickle
import re
import sys
import traceback
from pathlib import Path

import pytest
import torch

from gradkernels.cells import CELLS, Cell, cell, derive, differentiate, graph, lstm, save
from gradkernels.cells.bind import torch_functions

# planes of B x H that forward stores a step, beside the states
KEPT = {
    "lstm": 4,
    "gru": 4,
    "gru_reset_before": 3,
    "rnn_tanh": 0,
    "rnn_relu": 0,
    "rnn_sigmoid": 0,
    "lstm_no_forget": 3,
    "lstm_coupled": 3,
    "lstm_peephole": 4,
    "lstm_layer_norm": 8,
    "gru_layer_norm": 6,
    "slstm": 4,
    "mgu": 2,
    "indrnn": 0,
    "rnn_modrelu": 1,
    "rnn_additive": 1,
}
# operations of backward, tanh(c) of the LSTM included: one less than its and the GRU's derivatives written by hand
OPERATIONS = {"lstm": 23, "gru": 15, "gru_reset_before": 16, "rnn_tanh": 3, "rnn_relu": 2, "rnn_sigmoid": 3}


def functions(cell):
    return {f.name: f for f in ast.parse(cell.source).body}


def operations(function):
    named = lambda n: isinstance(n, ast.Call) and n.func.id != "full_like"
    return sum(isinstance(n, (ast.BinOp, ast.UnaryOp, ast.Compare)) or named(n) for n in ast.walk(function))


def test_kept_planes_of_the_registry():
    assert {name: CELLS[name].A for name in KEPT} == KEPT


def test_operations_of_backward():
    assert {name: operations(functions(CELLS[name])["backward"]) for name in OPERATIONS} == OPERATIONS


def test_printed_text_is_plain_python(each):
    """Functions of assignments and one return, over the arguments, variables assigned once and the vocabulary."""
    allowed = (
        ast.FunctionDef,
        ast.arguments,
        ast.arg,
        ast.Assign,
        ast.Return,
        ast.Tuple,
        ast.Name,
        ast.Constant,
        ast.Subscript,
    )
    allowed += (ast.BinOp, ast.UnaryOp, ast.Compare, ast.Call, ast.operator, ast.unaryop, ast.cmpop, ast.expr_context)
    wanted = ["forward", "backward", "tangent"] + ["operand", "operand_tangent", "second_adjoint"] * bool(each.second)
    assert list(functions(each)) == wanted
    for function in functions(each).values():
        assert all(isinstance(n, allowed) for n in ast.walk(function))
        assert all(isinstance(s, ast.Assign) for s in function.body[:-1]) and isinstance(function.body[-1], ast.Return)
        arguments = {a.arg for a in function.args.args}
        names = [n for n in ast.walk(function) if isinstance(n, ast.Name)]
        stored = [n.id for n in names if isinstance(n.ctx, ast.Store)]
        assert len(stored) == len(set(stored)) and arguments.isdisjoint(stored)
        assert {n.id for n in names} <= arguments | set(stored) | set(torch_functions())
        computed = {
            n.id
            for s in function.body[:-1]
            if isinstance(s.value, ast.expr)
            for n in s.targets
            if isinstance(n, ast.Name)
        }
        loaded = {n.id for n in names if isinstance(n.ctx, ast.Load)}
        assert computed <= loaded  # nothing is computed in vain


def test_the_authors_names_survive():
    f = functions(CELLS["lstm"])["forward"]
    assert {"i", "f", "g", "o", "c"} == {
        n.id for n in ast.walk(f) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)
    }


def test_names_that_are_words_elsewhere():
    @cell
    def f(x, r, s):
        double, V = sigmoid(x[0] + r[0]), tanh(x[1])
        total = double * V + s[0]
        return total * total

    taken = {n.id for n in ast.walk(ast.parse(f.source)) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    assert {"double1", "V1", "total1"} <= taken and taken.isdisjoint({"double", "V", "total"})


def test_lambdas_on_one_line_are_told_apart():
    # fmt: off
    pair = [lambda x, r, s: tanh(x[0] + r[0]), lambda x, r, s: relu(x[0] + r[0])]
    # fmt: on
    if sys.version_info < (3, 11):  # no columns in code objects: refused rather than guessed
        with pytest.raises(SyntaxError, match="cannot be told apart before Python 3.11"):
            cell(pair[0])
        return
    first, second = map(cell, pair)
    assert "tanh" in first.source and "relu" not in first.source
    assert "relu" in second.source and "tanh" not in second.source
    assert cell(lambda x, r, s: x[0] + r[0], name="sum").name == "sum"


def test_a_lambda_inside_a_lambda():
    make = lambda x, r, s: lambda x, r, s: sigmoid(x[0] * r[0])
    assert "sigmoid" in cell(make(0, 0, 0), name="inner").forward.__code__.co_names


def test_constants_are_folded_and_identities_used():
    @cell
    def f(x, r, s):
        one = sigmoid(0) * 2
        u = x[0] * one + 0 + r[0] ** 1 - (-s[0]) * 1 + where(one < 2, 0, x[0])
        return (0 - (-u)) / clamp(3, 0, 1) * (x[0] + r[0] - (r[0] + x[0])) ** 0 + (max(0.5, 1) - 1)

    assert f.source.startswith("def forward(x, r, s):\n    u = x[0] + r[0] + s[0]\n    return (u,), ()\n")


def test_decorator_with_arguments():
    @cell(name="mine", recompute=2.0)
    def f(x, r, s):
        return tanh(x[0] + r[0])

    assert f.name == "mine"


def test_generated_lines_show_in_tracebacks():
    c = CELLS["lstm"]
    assert inspect.getsource(c.backward).startswith("def backward(a, s, t, dt):\n    i, f, g, o = a\n")
    with pytest.raises(TypeError) as caught:
        c.forward([None] * 4, [None] * 4, [None] * 2)
    assert "i = sigmoid(x[0] + r[0])" in "".join(traceback.format_exception(caught.value))


def test_cells_are_values():
    c = CELLS["gru"]
    c.forward  # noqa: B018 - binds the functions, which do not pickle
    twin = pickle.loads(pickle.dumps(c))
    assert twin == c and hash(twin) == hash(c) and twin is not c
    assert copy.deepcopy(c) is c and copy.copy(c) is c
    one = [torch.ones(2, 3)]
    torch.testing.assert_close(twin.forward(one * 3, one * 3, one), c.forward(one * 3, one * 3, one), rtol=0, atol=0)
    assert c != CELLS["lstm"] and re.fullmatch(r"Cell\(name='gru', .*second=\(\)\)", repr(c))
    with pytest.raises(dataclasses.FrozenInstanceError):
        c.name = "other"


@pytest.mark.parametrize("name", ["operand", "operand_tangent", "second_adjoint"])
def test_functions_that_only_some_cells_have(name):
    assert callable(getattr(CELLS["gru_reset_before"], name))
    with pytest.raises(AttributeError, match=f"cell 'lstm' has no {name}: its recurrent products are all of s"):
        getattr(CELLS["lstm"], name)


# ------------------------------------------------------------------ what is kept


def price(kept, wanted, outputs, moving, recompute):
    """Planes stored plus the price of what backward computes again, or infinity where pre-activations would be missing."""
    seen, total, todo = set(), float(len(kept)), list(wanted)
    while todo:
        n = todo.pop()
        if n in seen or n.op == "const" or n in outputs or n in kept:
            continue
        seen.add(n)
        if n.op == "leaf" and n.args[0] in ("x", "r"):
            return float("inf")
        total += 0 if n in moving or n.op == "leaf" else recompute if n.op in graph.COSTLY else 0.01
        todo += n.inputs
    return total


@pytest.mark.parametrize("recompute", [0.0, 0.3, 1.5])
@pytest.mark.parametrize("name", ["lstm", "gru", "gru_reset_before", "rnn_sigmoid"])
def test_no_other_choice_is_cheaper(name, recompute):
    """The cut against every choice of as many planes or fewer."""
    f = derive._read(getattr(sys.modules[f"gradkernels.cells.{name.split('_')[0]}"], name))
    seeds = [(o, f.graph.leaf("dt", k)) for k, o in enumerate(f.outputs)]
    seeds += [(f.operand, f.graph.leaf("dv"))] if f.operand else []
    adjoint = differentiate.adjoints(f.graph, seeds)
    wanted = [adjoint[n] for n in adjoint if n.op == "leaf"] + [f.operand] * (f.operand is not None)
    chosen = save.choose_saved(f.outputs, wanted, recompute)
    needed = graph.reach(wanted)
    moving = {n for n in needed if any(u.op == "leaf" and u.args[0] in ("dt", "dv") for u in graph.reach([n]))}
    candidates = [n for n in needed if n not in moving and n.op != "const" and n not in f.outputs]
    cost = lambda kept: price(set(kept), wanted, f.outputs, moving, recompute)
    choices = (kept for size in range(len(chosen) + 1) for kept in itertools.combinations(candidates, size))
    assert cost(chosen) == pytest.approx(min(map(cost, choices)))


def test_recompute_is_a_price():
    cheap, dear = cell(lstm.lstm, recompute=0.3), cell(lstm.lstm, recompute=1.5)
    assert (cheap.A, dear.A) == (4, 5)
    assert "tanh" in cheap.source.split("\n\n\n")[1] and "tanh" not in dear.source.split("\n\n\n")[1]


def test_sizes_of_the_zoo(zoo):
    sizes = {name: (c.G, c.S, c.P, c.A, c.split, c.second) for name, c in zoo.items()}
    assert sizes == {
        "independent": (2, 2, 2, 2, (), ()),
        "with_every_group": (2, 1, 1, 2, (), (1,)),
        "peephole": (4, 2, 3, 4, (), ()),
        "slstm": (4, 4, 0, 4, (), ()),
        "layer_norm_lstm": (4, 2, 0, 4, (), ()),
        "minimal_gated_unit": (2, 1, 0, 2, (), (1,)),
        "two_products": (3, 2, 0, 3, (), (1, 2)),
        "leaves": (2, 5, 0, 1, (1,), ()),
        "everything": (3, 2, 0, 6, (0, 1, 2), ()),
    }


def test_the_zoo_speaks_the_whole_language():
    text = Path(__file__).with_name("conftest.py").read_text(encoding="utf-8")
    called = {n.func.id for n in ast.walk(ast.parse(text)) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)}
    assert set(graph.VOCABULARY) <= called


def test_registry():
    """Whoever adds a cell adds nothing here."""
    assert list(CELLS)[: len(KEPT)] == list(KEPT)
    assert all(isinstance(c, Cell) and c.name == name and c.M == c.D == 0 for name, c in CELLS.items())
    some = lambda value: {name: v for name in KEPT if (v := value(CELLS[name]))}
    assert some(lambda c: c.P) == {
        "lstm_peephole": 3,
        "lstm_layer_norm": 14,
        "gru_layer_norm": 9,
        "indrnn": 1,
        "rnn_modrelu": 1,
    }
    assert some(lambda c: c.split) == {"gru": (2,), "lstm_layer_norm": (0, 1, 2, 3), "gru_layer_norm": (0, 1, 2)}
    assert some(lambda c: c.second) == {"gru_reset_before": (2,), "mgu": (1,)}
    assert some(lambda c: not c.recurrent) == {"indrnn": True}
    assert some(lambda c: c.means) == {"lstm_layer_norm": True, "gru_layer_norm": True}
