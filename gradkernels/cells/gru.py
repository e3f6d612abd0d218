# ruff: noqa: F821 - functions of the cell language need no import
"""Gated recurrent units, in two forms that are not each other's parameterisation."""


def gru(x, r, s):
    """Reset after the product, as in cuDNN and torch.nn.GRU: n = tanh(x_n + reset * (W h)). Gates: reset, z, n."""
    reset, z = sigmoid(x[0] + r[0]), sigmoid(x[1] + r[1])
    n = tanh(x[2] + reset * r[2])
    return n + z * (s[0] - n)


def gru_reset_before(x, r, s):
    """Reset before the product, the original of Cho et al. (2014): n = tanh(x_n + W (reset * h)). Gates: reset, z, n."""
    reset, z = sigmoid(x[0] + r[0]), sigmoid(x[1] + r[1])
    n = tanh(x[2] + r[2](reset * s[0]))
    return n + z * (s[0] - n)
