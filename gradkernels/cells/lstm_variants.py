# ruff: noqa: F821 - functions of the cell language need no import
"""The LSTM with a gate fewer, and with connections from its cell to its gates."""

from .derive import cell


def lstm_no_forget(x, r, s):
    """As it was published first, Hochreiter & Schmidhuber (1997): nothing is forgotten. Gates i g o, states h c.

    i, o = sigmoid(x + r),  g = tanh(x + r)
    c' = c + i * g
    h' = o * tanh(c')
    """
    i, g, o = sigmoid(x[0] + r[0]), tanh(x[1] + r[1]), sigmoid(x[2] + r[2])
    c = s[1] + i * g
    return o * tanh(c), c


def lstm_coupled(x, r, s):
    """What is forgotten makes room for what is new: CIFG of Greff et al. (2015). Gates f g o, states h c.

    f, o = sigmoid(x + r),  g = tanh(x + r)
    c' = f * c + (1 - f) * g
    h' = o * tanh(c')
    """
    f, g, o = sigmoid(x[0] + r[0]), tanh(x[1] + r[1]), sigmoid(x[2] + r[2])
    c = g + f * (s[1] - g)
    return o * tanh(c), c


@cell(params=[("weight_c", 3, None)])
def lstm_peephole(x, r, s, p):
    """The gates see the cell: Gers & Schmidhuber (2000). Gates i f g o, states h c, weights from the cell to i, f and o.

    i, f = sigmoid(x + r + w * c),  g = tanh(x + r)
    c' = f * c + i * g
    o = sigmoid(x + r + w * c')
    h' = o * tanh(c')
    """
    i, f = sigmoid(x[0] + r[0] + p[0] * s[1]), sigmoid(x[1] + r[1] + p[1] * s[1])
    g = tanh(x[2] + r[2])
    c = f * s[1] + i * g
    o = sigmoid(x[3] + r[3] + p[2] * c)
    return o * tanh(c), c
