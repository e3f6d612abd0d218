# ruff: noqa: F821 - functions of the cell language need no import
"""A derivative of the author's own, and the comparison with autograd that people can ask for."""

import pytest
import torch

from gradkernels.cells import cell


def test_check_is_rounding(each):
    assert each.check() < 1e-13


def straight_through(x, r, s):
    h = where(x[0] + r[0] > 0, 1, -1)
    return h + 0.5 * s[0]


def as_if_it_were_tanh(x, r, s, t, dt):
    u = tanh(x[0] + r[0])
    d = dt[0] * (1 - u * u)
    return (d,), (d,), (0.5 * dt[0],)


PRINTED = """\
def backward(a, s, t, dt):
    u1, = a
    d1 = dt[0] * u1
    dx = (d1,)
    return dx, dx, (0.5 * dt[0],), (dt[0],)
"""


def test_own_backward_is_printed_and_used():
    c = cell(straight_through, backward=as_if_it_were_tanh)
    assert c.source.split("\n\n\n")[1] == PRINTED.strip()
    x, r, s, dt = ([torch.randn(4, 3, dtype=torch.double)] for _ in range(4))
    t, a = c.forward(x, r, s)
    dx, dr, ds, total = c.backward(a, s, t, dt)
    want = dt[0] * (1 - torch.tanh(x[0] + r[0]) ** 2)
    torch.testing.assert_close([dx[0], dr[0], ds[0], total[0]], [want, want, 0.5 * dt[0], dt[0]])
    assert c.check() > 0.1  # the true derivative is zero


def with_operand(x, r, s, p):
    v = x[0] * s[0]
    return p[0] * tanh(x[1] + r[1](v)) + r[0]


def its_derivative(x, r, s, p, t, dt, dv):
    u = tanh(x[1] + r[1])
    d = dt[0] * p[0] * (1 - u * u)
    return (dv * s[0], d), (dt[0], d), (dv * x[0],), (dt[0] * u,)


def test_own_backward_of_a_cell_with_an_operand():
    true, own = cell(with_operand), cell(with_operand, backward=its_derivative)
    assert own.second == true.second == (1,) and own.P == 1
    assert own.check() < 1e-14


def other_arguments(x, r, s, dt):
    return (dt[0],), (dt[0],), (dt[0],)


def no_tuples(x, r, s, t, dt):
    return dt[0], dt[0], dt[0]


def too_few(x, r, s, t, dt):
    return (dt[0], dt[0]), (dt[0],), (dt[0],)


@pytest.mark.parametrize(
    "backward, message",
    [
        (other_arguments, r"the backward of this cell takes \(x, r, s, t, dt\)"),
        (no_tuples, "a backward returns dx, dr, ds, a tuple each"),
        (too_few, "dx has 1 value, 2 returned"),
    ],
    ids=lambda v: getattr(v, "__name__", ""),
)
def test_wrong_backward(backward, message):
    with pytest.raises(SyntaxError, match=message) as caught:
        cell(straight_through, backward=backward)
    assert caught.value.filename == __file__


def uses_what_it_makes(x, r, s, p, t, dt, dv):
    return (dv, dv), (dt[0], dv), (dv,), (dt[0],)


def test_adjoint_of_the_operand_is_made_of_late_gates():
    with pytest.raises(SyntaxError, match=r"dr\[1\] depends on dv"):
        cell(with_operand, backward=uses_what_it_makes)


def test_backward_that_is_no_function():
    with pytest.raises(TypeError, match="a backward is a Python function, got int"):
        cell(straight_through, backward=3)
