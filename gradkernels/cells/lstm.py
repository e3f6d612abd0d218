# ruff: noqa: F821 - functions of the cell language need no import
"""Long short-term memory, with the forget gate: Hochreiter & Schmidhuber (1997), Gers, Schmidhuber & Cummins (2000)."""


def lstm(x, r, s):
    """i, f, o = sigmoid(x + r), g = tanh(x + r); c' = f * c + i * g; h' = o * tanh(c'). Gates in torch's order: i f g o."""
    i, f, g, o = sigmoid(x[0] + r[0]), sigmoid(x[1] + r[1]), tanh(x[2] + r[2]), sigmoid(x[3] + r[3])
    c = f * s[1] + i * g
    return o * tanh(c), c
