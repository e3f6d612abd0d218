# ruff: noqa: F821 - functions of the cell language need no import
"""The minimal gated unit: Zhou et al., Minimal gated unit for recurrent neural networks (2016)."""


def mgu(x, r, s):
    """One gate does the work of the GRU's two. Gates f n.

    f = sigmoid(x_f + r_f)
    n = tanh(x_n + W_n (f * h) + b_n)
    h' = (1 - f) * h + f * n
    """
    f = sigmoid(x[0] + r[0])
    n = tanh(x[1] + r[1](f * s[0]))
    return s[0] + f * (n - s[0])
