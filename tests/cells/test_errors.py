"""What is no cell is refused where the author wrote it: file, line, columns and a text that says what to do."""

import runpy

import pytest

from gradkernels.cells import CELLS, cell, get

# ⟦ and ⟧ mark the columns that the error must name.
WRONG = {
    "branch": ("def f(x, r, s):\n    ⟦if x[0] > 0:\n        return x[0]⟧\n    return r[0]", "a branch is not allowed; use where"),
    "conditional expression": ("def f(x, r, s):\n    return ⟦x[0] if r[0] > 0 else s[0]⟧", "a branch is not allowed; use where"),
    "for": ("def f(x, r, s):\n    ⟦for k in range(2):\n        h = x[0] + r[0]⟧\n    return h", "a loop is not allowed"),
    "while": ("def f(x, r, s):\n    ⟦while True:\n        h = x[0]⟧\n    return h", "a loop is not allowed"),
    "comprehension": ("def f(x, r, s):\n    i, f = ⟦[sigmoid(x[k] + r[k]) for k in (0, 1)]⟧\n    return i * f", "a loop is not allowed"),
    "inner function": ("def f(x, r, s):\n    ⟦def g(v):\n        return v⟧\n    return g(x[0] + r[0])", "a function inside a function"),
    "import": ("def f(x, r, s):\n    ⟦import math⟧\n    return x[0] + r[0]", "'import' is not allowed"),
    "and": ("def f(x, r, s):\n    return where(⟦x[0] > 0 and x[0] < 1⟧, x[0], r[0])", "'and' or 'or' is not allowed"),
    "unknown function": ("def f(x, r, s):\n    return ⟦gelux⟧(x[0] + r[0])", "unknown name 'gelux'; functions of a cell are abs"),
    "misspelled": ("def f(x, r, s):\n    return ⟦sigmod⟧(x[0] + r[0])", "unknown name 'sigmod'; did you mean sigmoid?"),
    "unknown name": ("def f(x, r, s):\n    h = x[0] + r[0]\n    return ⟦hh⟧", "unknown name 'hh'"),
    "after other letters": ("def f(x, r, s):\n    größe = x[0] + r[0]; return größe * ⟦alpha⟧", "unknown name 'alpha'"),
    "unknown attribute": ("import torch\ndef f(x, r, s):\n    return ⟦torch.sigmo⟧(x[0] + r[0])", "unknown name 'torch.sigmo'"),
    "not of the language": ("import torch\ndef f(x, r, s):\n    return ⟦torch.cumsum⟧(x[0] + r[0])", "torch.cumsum is no function of a cell"),
    "torch's mean": ("import torch\ndef f(x, r, s):\n    return ⟦torch.mean⟧(x[0] + r[0])", "torch.mean is no function of a cell"),
    "object": ("import torch\nw = torch.ones(3)\ndef f(x, r, s):\n    return ⟦w⟧ * (x[0] + r[0])", "'w' is a Tensor; a cell can use numbers and call functions from outside; a number for each unit is a parameter, p[k]"),
    "function as a value": ("def f(x, r, s):\n    return ⟦tanh⟧ * (x[0] + r[0])", "'tanh' is a function"),
    "method": ("def f(x, r, s):\n    return tanh(⟦x[0].sum()⟧ + r[0])", "methods are not allowed on a value"),
    "method of a group": ("def f(x, r, s):\n    return ⟦x.sum()⟧ + r[0]", "methods are not allowed on a value"),
    "attribute of a value": ("def f(x, r, s):\n    return ⟦x.T⟧ + r[0]", "a value has no attributes"),
    "arity": ("def f(x, r, s):\n    return ⟦sigmoid(x[0], r[0])⟧", "sigmoid(a) takes 1 argument, 2 given"),
    "arity of where": ("def f(x, r, s):\n    return ⟦where(x[0] > 0, r[0])⟧", "where(c, a, b) takes 3 arguments, 2 given"),
    "keyword": ("def f(x, r, s):\n    return ⟦clamp(x[0] + r[0], lo=-1, hi=1)⟧", "plain positional arguments"),
    "starred": ("def f(x, r, s):\n    return ⟦max(*x)⟧ + r[0]", "plain positional arguments"),
    "helper's arity": ("def g(a, b):\n    return a\ndef f(x, r, s):\n    return ⟦g(x[0])⟧ + r[0]", "g(a, b) takes 2 arguments, 1 given"),
    "inside a helper": ("def g(a):\n    b = 2 * a\n    return ⟦b.exp()⟧\ndef f(x, r, s):\n    return g(x[0] + r[0])", "methods are not allowed"),
    "helper with a default": ("⟦def g(a, b=1):\n    return a⟧\ndef f(x, r, s):\n    return g(x[0], 1) + r[0]", "without defaults"),
    "helper without return": ("⟦def g(a):\n    b = a⟧\ndef f(x, r, s):\n    return g(x[0]) + r[0]", "must return"),
    "helper that calls itself": ("def g(a):\n    return ⟦g(a)⟧\ndef f(x, r, s):\n    return g(x[0]) + r[0]", "g calls itself"),
    "cell that calls itself": ("def f(x, r, s):\n    return ⟦f(x, r, s)⟧", "f calls itself"),
    "negative index": ("def f(x, r, s):\n    return x[0] + r[⟦-1⟧]", "an index counts from 0"),
    "slice": ("def f(x, r, s):\n    a, b = x[⟦0:2⟧]\n    return a + b + r[0]", "an index must be a plain number"),
    "index that is a value": ("def f(x, r, s):\n    return x[⟦s[0]⟧] + r[0]", "an index must be a plain number"),
    "index that is true": ("def f(x, r, s):\n    return x[⟦True⟧] + r[0]", "an index must be a plain number"),
    "index of a value": ("def f(x, r, s):\n    return ⟦x[0][1]⟧ + r[0]", "a value cannot be indexed"),
    "index beyond a tuple": ("def f(x, r, s):\n    u = x[0], x[1]\n    return ⟦u[2]⟧ + r[0]", "index 2 in a tuple of 2"),
    "group as a value": ("def f(x, r, s):\n    return tanh(⟦x⟧ + r[0])", "a single value is wanted here"),
    "item assignment": ("def f(x, r, s):\n    ⟦x[0]⟧ = r[0]\n    return x[0]", "only names and tuples of names"),
    "item addition": ("def f(x, r, s):\n    ⟦x[0]⟧ += r[0]\n    return x[0]", "only names and tuples of names"),
    "too few names": ("def f(x, r, s):\n    ⟦a, b⟧ = x[0], r[0], s[0]\n    return a + b", "2 names for 3 values"),
    "operator": ("def f(x, r, s):\n    return ⟦x[0] @ r[0]⟧", "operator MatMult is not elementwise arithmetic"),
    "power of a value": ("def f(x, r, s):\n    return ⟦x[0] ** r[0]⟧", "a power must be a number"),
    "string": ("def f(x, r, s):\n    return x[0] + r[0] + ⟦'a'⟧", "a constant that is no number is not allowed"),
    "infinite": ("def f(x, r, s):\n    return x[0] + r[0] * ⟦1e999⟧", "must be finite"),
    "infinite from outside": ("inf = float('inf')\ndef f(x, r, s):\n    return x[0] + r[0] * ⟦inf⟧", "must be finite"),
    "division by zero": ("def f(x, r, s):\n    return x[0] + r[0] * (⟦1 / 0⟧)", "no finite value"),
    "overflow": ("def f(x, r, s):\n    return x[0] + r[0] * ⟦10.0 ** 400⟧", "no finite value"),
    "logarithm of a negative number": ("def f(x, r, s):\n    return x[0] + r[0] * ⟦log(-1)⟧", "no finite value"),
    "in a function of ours": ("def f(x, r, s):\n    return x[0] + r[0] * ⟦rsqrt(0)⟧", "no finite value"),
    "comparison as a number": ("def f(x, r, s):\n    return (⟦x[0] > 0⟧) * r[0]", "a comparison is the condition of where"),
    "comparison as a state": ("def f(x, r, s):\n    return ⟦x[0] > r[0]⟧", "a cell returns its new states"),
    "chained comparison": ("def f(x, r, s):\n    return where(⟦0 < x[0] < 1⟧, x[0], r[0])", "a condition is one comparison"),
    "equality": ("def f(x, r, s):\n    return where(⟦x[0] == 0⟧, x[0], r[0])", "a condition is one comparison"),
    "condition that is a value": ("def f(x, r, s):\n    return where(⟦x[0]⟧, x[0], r[0])", "a condition is one comparison"),
    "line of its own": ("def f(x, r, s):\n    ⟦print(x[0])⟧\n    return x[0] + r[0]", "a line that gives nothing a name is not allowed: the text is read"),
    "walrus": ("def f(x, r, s):\n    return (⟦h := x[0] + r[0]⟧)", "':=' is not allowed"),
    "set of a loop": ("def f(x, r, s):\n    a, b = ⟦{x[k] for k in (0, 1)}⟧\n    return a + r[0]", "a loop is not allowed; write out what"),
    "call of a group's value": ("def f(x, r, s):\n    return ⟦x[0](s[0])⟧ + r[0]", "x[0] is a value and no function; only r[k](v)"),
    "call of what has no name": (
        "import gradkernels as gk\ndef f(x, r, s):\n    return ⟦gk.cells.CELLS['gru']⟧(x, r, s)",
        "called by a name: give gk.cells.CELLS['gru'] one, outside of the cell",
    ),
    "no return": ("⟦def f(x, r, s):\n    h = x[0] + r[0]⟧", "a cell must return its new states"),
    "empty return": ("def f(x, r, s):\n    h = x[0] + r[0]\n    ⟦return⟧", "an empty return is not allowed"),
    "returns a group": ("def f(x, r, s):\n    h = x[0] + r[0]\n    return ⟦s⟧", "a cell returns its new states"),
    "returns nothing": ("def f(x, r, s):\n    h = x[0] + r[0]\n    return ⟦()⟧", "a cell returns its new states"),
    "returns nested": ("def f(x, r, s):\n    return ⟦x[0], (r[0], s[0])⟧", "a cell returns its new states"),
    "state that is not returned": ("def f(x, r, s):\n    return ⟦tanh(x[0] + r[0] + s[1])⟧", "s[1] is read but only 1 state is returned"),
    "states that are not returned": ("def f(x, r, s):\n    return ⟦x[0], r[0] + s[3]⟧", "s[3] is read but only 2 states are returned"),
    "no recurrence": ("⟦def f(x, r, s):\n    return tanh(x[0])⟧", "neither r nor s is read: this is no recurrent cell"),
    "no gate": ("⟦def f(x, r, s):\n    return tanh(s[0])⟧", "neither x nor r is read: a cell has at least one gate"),
    "no m": ("⟦def f(x, r, s, m):\n    return tanh(x[0] + r[0])⟧", "m is never read"),
    "two delays": ("⟦def f(x, r, s, d):\n    return tanh(x[0] + r[0]) + d[1]⟧", "d[1] is read: the first state of some steps ago is d[0]"),
    "groups in another order": ("⟦def f(x, r, s, m, p):\n    return tanh(x[0] + r[0]) * m[0] + p[0]⟧", "any of p, m, d in this order"),
    "unknown group": ("⟦def f(x, r, s, w):\n    return tanh(x[0] + r[0]) * w[0]⟧", "any of p, m, d in this order"),
    "no p": ("⟦def f(x, r, s, p):\n    return tanh(x[0] + r[0])⟧", "p is never read"),
    "a gate left out": ("⟦def f(x, r, s):\n    return tanh(x[0] + r[2])⟧", "there are 3 gates, but neither x[1] nor r[1] is read"),
    "two arguments": ("⟦def f(x, r):\n    return tanh(x[0] + r[0])⟧", "a cell takes (x, r, s), then any of p, m, d"),
    "argument list": ("⟦def f(*x):\n    return tanh(x[0])⟧", "plain positional parameters"),
    "argument with a default": ("⟦def f(x, r, s, p=0):\n    return tanh(x[0] + r[0])⟧", "without defaults"),
    "two operands": (
        "def f(x, r, s):\n    a = r[1](s[0] * x[0])\n    return x[1] + r[0] + a * ⟦r[2](s[0] * x[1])⟧",
        "a cell has one operand",
    ),
    "operand of its own product": ("def f(x, r, s):\n    a = r[1](s[0] * r[0])\n    return x[0] + ⟦r[1](a)⟧", "does not depend on r[1]"),
    "operand of another operand's product": (
        "def f(x, r, s):\n    a = r[2](s[0] * r[0])\n    return x[1] + ⟦r[1](a)⟧",
        "does not depend on r[2]",
    ),
    "operand of two values": ("def f(x, r, s):\n    return x[0] + ⟦r[0](s[0], x[0])⟧", "the product of one value, 2 given"),
    "operand that is a number": ("def f(x, r, s):\n    return x[0] + ⟦r[0](0.5)⟧", "not of a number"),
    "product both ways": ("def f(x, r, s):\n    return x[0] + r[0] + ⟦r[0](s[0] * x[0])⟧", "only one of the two"),
    "product the other way": ("def f(x, r, s):\n    return x[0] + r[0](s[0] * x[0]) + ⟦r[0]⟧", "only one of the two"),
    "product the other way, unpacked": ("def f(x, r, s):\n    h = x[0] + r[0](s[0] * x[0])\n    ⟦a, b⟧ = r\n    return h + a", "only one of the two"),
    "name of a function in text": ("act = 'tanh'\ndef f(x, r, s):\n    return ⟦act⟧(x[0] + r[0])", "act is no function of a cell"),
    "operand of a first gate": ("def f(x, r, s):\n    h = tanh(x[0] + ⟦r[0](s[0] * x[1])⟧)\n    return h * r[1]", "must be the last, r[0] is one of 2"),
    "operand in a helper": ("def g(r, v):\n    return ⟦r[0](v)⟧\ndef f(x, r, s):\n    return x[1] + g(r, s[0] * x[0])", "must be the last"),
    "negative operand": ("def f(x, r, s):\n    return x[0] + r[⟦-1⟧](s[0] * x[0])", "an index counts from 0"),
}  # fmt: skip


def load(text, folder):
    """f of this text, from a file."""
    file = folder / "theirs.py"
    file.write_text(text, encoding="utf-8")
    return runpy.run_path(str(file))["f"]


@pytest.mark.parametrize("marked, message", WRONG.values(), ids=WRONG)
def test_error_at_the_authors_own_columns(marked, message, tmp_path):
    text = marked.replace("⟦", "").replace("⟧", "") + "\n"
    before, marked_text = marked.split("⟧")[0].split("⟦")
    function = load(text, tmp_path)
    with pytest.raises(SyntaxError) as caught:
        cell(function)
    e = caught.value
    assert message in e.msg
    assert (e.filename, e.lineno) == (str(tmp_path / "theirs.py"), before.count("\n") + 1)
    assert e.text == text.splitlines(keepends=True)[e.lineno - 1]
    # what is marked, or its first line
    assert e.text[e.offset - 1 : e.end_offset - 1] == marked_text.split("\n")[0]
    assert e.offset == len(before) - before.rfind("\n")


def test_no_source_text():
    with pytest.raises(
        SyntaxError, match="'<lambda>' has no source text: a cell must come from a file or a notebook cell"
    ) as caught:
        cell(eval("lambda x, r, s: x[0] + r[0]"))
    assert (caught.value.filename, caught.value.lineno) == ("<string>", 1)


def test_file_that_changed(tmp_path):
    function = load("def f(x, r, s): return x[0] + r[0]\n", tmp_path)
    (tmp_path / "theirs.py").write_text("a = 1\n")
    with pytest.raises(SyntaxError, match="was not found on this line: has the file changed") as caught:
        cell(function)
    e = caught.value
    assert (e.filename, e.lineno, e.text) == (str(tmp_path / "theirs.py"), 1, "a = 1\n")


def test_a_name_without_a_value_yet():
    @cell
    def early(x, r, s):
        return x[0] + r[0] * 2

    with pytest.raises(SyntaxError, match="unknown name 'late'"):

        @cell
        def f(x, r, s):
            return x[0] + r[0] * late

    late = 2.0
    assert early.G == 1 and late


@pytest.mark.parametrize("thing", [3, "lstm", print, pytest, CELLS["lstm"]], ids=str)
def test_not_a_function(thing):
    with pytest.raises(TypeError, match="a cell is a Python function, got "):
        cell(thing)


def test_get():
    assert get("gru") is CELLS["gru"] and get(CELLS["gru"]) is CELLS["gru"]
    with pytest.raises(
        ValueError,
        match="unknown cell 'lstm_peepole'; did you mean lstm_peephole[?] Cells are lstm, gru, gru_reset_before",
    ):
        get("lstm_peepole")
    with pytest.raises(TypeError, match="cell must be a name or a Cell, got int$"):
        get(3)
    with pytest.raises(TypeError, match="got function: @gk.cell makes a Cell of it"):
        get(lambda x, r, s: x[0] + r[0])
    for name, near in (("rnn", "rnn_tanh"), ("Gru", "gru"), ("LSTM_Peephole", "lstm_peephole")):
        with pytest.raises(ValueError, match=f"unknown cell '{name}'; did you mean {near}[?]"):
            get(name)


def test_wrong_options():
    async def later(x, r, s):
        return x[0] + r[0]

    with pytest.raises(TypeError, match="a cell is a plain function, later is an async one"):
        cell(later)
    with pytest.raises(TypeError, match="the name of a cell is a text, got 3"):
        cell(name=3)
    for price in (-1, "much", float("nan")):
        with pytest.raises(ValueError, match="recompute is a price"):
            cell(recompute=price)


PARAMS = {
    "text": (["w"], TypeError, r"are \(name, how many, initial value\) each, got 'w'"),
    "pair": ([("w", 2)], TypeError, r"got \('w', 2\)"),
    "number": ([(3, 2, None)], TypeError, r"got \(3, 2, None\)"),
    "too few": ([("w", 1, None)], ValueError, r"reads 2 parameters p, params name \[1\]"),
    "dot": ([("w.v", 2, None)], ValueError, "cannot have a parameter of the name 'w.v'$"),
    "a layer's": ([("weight_hh", 2, None)], ValueError, "of the name 'weight_hh', which is its own"),
    "twice": ([("w", 1, None), ("w", 1, None)], ValueError, "of the name 'w', which there is already"),
}


@pytest.mark.parametrize(("params", "exception", "text"), PARAMS.values(), ids=PARAMS)
def test_wrong_params(params, exception, text):
    with pytest.raises(exception, match=text):
        cell(params=params)(lambda x, r, s, p: p[0] * x[0] + p[1] * r[0])
