# ruff: noqa: F821 - functions of the cell language need no import
"""Cells around cells: against the same lines written over the values of the cell inside."""

import pytest
import torch

from gradkernels.cells import CELLS, cell
from gradkernels.cells.transform import masked, resets, skip, zoneout

lstm, gru, before = CELLS["lstm"], CELLS["gru"], CELLS["gru_reset_before"]
INSIDE = [lstm, gru, before]


@pytest.fixture(params=INSIDE, ids=lambda c: c.name)
def inside(request):
    return request.param


def values(n):
    return [torch.randn(5, 3, dtype=torch.double) for _ in range(n)]


def same(got, want):
    torch.testing.assert_close(list(got), list(want), rtol=0, atol=1e-15)


def test_zoneout(inside):
    x, r, s, m = values(inside.G), values(inside.G), values(inside.S), values(inside.S)
    t, _ = inside.forward(x, r, s)
    around = zoneout(inside)
    assert (around.name, around.M, around.S) == (f"zoneout_{inside.name}", inside.S, inside.S)
    same(around.forward(x, r, s, m)[0], [a + k * (b - a) for a, b, k in zip(s, t, m)])


def test_skip(inside):
    x, r, s, d = values(inside.G), values(inside.G), values(inside.S), values(1)
    t, _ = inside.forward(x, r, s)
    around = skip(inside)
    assert around.D == 1
    same(around.forward(x, r, s, d)[0], [t[0] + d[0], *t[1:]])


def test_masked(inside):
    x, r, s, m = values(inside.G), values(inside.G), values(inside.S + 1), values(1)
    t, _ = inside.forward(x, r, s[1:])
    around = masked(inside)
    assert (around.S, around.M) == (inside.S + 1, 1)
    same(around.forward(x, r, s, m)[0], [m[0] * t[0], *t])


def test_an_operand_is_made_of_the_masked_state():
    x, r, (hidden, h), m = values(3), values(3), values(2), values(1)
    want = before.operand(x, r[:2], [hidden])
    same([masked(before).operand(x, r[:2], [hidden, h], m)], [want])


def test_resets(inside):
    x, r, s, m = values(inside.G), values(inside.G), values(inside.S + 1), values(1)
    t, _ = inside.forward(x, r, [s[0], *s[2:]])
    same(resets(inside).forward(x, r, s, m)[0], [m[0] * t[0], t[0], *(m[0] * v for v in t[1:])])


def test_masks_come_after_those_inside():
    around = masked(zoneout(lstm))
    assert (around.name, around.M, around.S) == ("masked_zoneout_lstm", 3, 3)
    x, r, s, m = values(4), values(4), values(3), values(3)
    t, _ = zoneout(lstm).forward(x, r, s[1:], m[:2])
    same(around.forward(x, r, s, m)[0], [m[2] * t[0], *t])


@cell(params=[("weight_h", 1, 1.0)])
def with_parameter(x, r, s, p):
    return tanh(x[0] + r[0] + p[0] * s[0])


def test_parameters_keep_their_names():
    assert zoneout(with_parameter).params == (("weight_h", 1, 1.0),)


@pytest.mark.parametrize("around", [skip, masked, resets], ids=lambda f: f.__name__)
def test_a_delayed_value_is_the_only_one_and_the_outermost(around):
    with pytest.raises(ValueError, match="cell skip_lstm has a delayed value"):
        around(skip(lstm))


@cell
def two_of_them(x, r, s):
    """A user's cell made of others: a function of the same groups, or of tuples of values."""
    h, c = lstm(x, r, (s[0], s[1]))
    (g,) = gru((x[0], x[1], x[2]), r, (s[0],))
    return 0.5 * (h + g), c


def test_a_cell_is_a_function_in_another():
    x, r, s = values(4), values(4), values(2)
    (h, c), (g,) = lstm.forward(x, r, s)[0], gru.forward(x[:3], r[:3], s[:1])[0]
    same(two_of_them.forward(x, r, s)[0], [0.5 * (h + g), c])


def of_one_value(x, r, s):
    return lstm(x, r, s[0])


def of_too_few(x, r, s):
    return lstm(x, r, (s[0],))


def of_two_groups(x, r, s):
    return lstm(x, r)


def of_other_products(x, r, s):
    return lstm(x, x, s)


@pytest.mark.parametrize(
    "function, message",
    [
        (of_one_value, "lstm takes 2 values s"),
        (of_too_few, "lstm takes 2 values s"),
        (of_two_groups, r"lstm\(x, r, s\) takes 3 arguments, 2 given"),
        (of_other_products, "the recurrent products of lstm are r itself"),
    ],
    ids=lambda v: getattr(v, "__name__", ""),
)
def test_a_cell_called_wrongly(function, message):
    with pytest.raises(SyntaxError, match=message) as caught:
        cell(function)
    assert caught.value.text.strip().startswith("return lstm(")


def test_params_are_as_many_as_are_read():
    with pytest.raises(ValueError, match=r"reads 1 parameter p, params name \[2\]"):
        cell(params=[("w", 2, None)])(lambda x, r, s, p: tanh(x[0] + r[0] + p[0]))
