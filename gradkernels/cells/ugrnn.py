# ruff: noqa: F821 - functions of the cell language need no import
"""The update gate RNN: Collins, Sohl-Dickstein & Sussillo, Capacity and trainability in recurrent neural networks (2017)."""


def ugrnn(x, r, s):
    """One gate between the state and a candidate. Gates g c.

    g = sigmoid(x + r),  c = tanh(x + r)
    h' = g * h + (1 - g) * c
    """
    g, c = sigmoid(x[0] + r[0]), tanh(x[1] + r[1])
    return c + g * (s[0] - c)
