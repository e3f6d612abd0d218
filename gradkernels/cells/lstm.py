# ruff: noqa: F821 - functions of the cell language need no import
"""Long short-term memory: Hochreiter & Schmidhuber (1997), with the forget gate of Gers, Schmidhuber & Cummins (2000)."""


def lstm(x, r, s):
    """torch.nn.LSTM's step; gates i f g o, states h c; x and r are the pre-activations W_ih u + b_ih and W_hh h + b_hh.

    i, f, o = sigmoid(x + r),  g = tanh(x + r)
    c' = f * c + i * g
    h' = o * tanh(c')
    """
    i, f, g, o = sigmoid(x[0] + r[0]), sigmoid(x[1] + r[1]), tanh(x[2] + r[2]), sigmoid(x[3] + r[3])
    c = f * s[1] + i * g
    return o * tanh(c), c
