# ruff: noqa: F821 - functions of the cell language need no import
"""The gated recurrent unit in its two forms, which no choice of weights turns into each other."""


def gru(x, r, s):
    """torch.nn.GRU's and cuDNN's step: the reset gate acts after the recurrent product. Gates reset, z, n.

    reset, z = sigmoid(x + r)
    n = tanh(x_n + reset * (W_n h + b_n))
    h' = (1 - z) * n + z * h
    """
    reset, z = sigmoid(x[0] + r[0]), sigmoid(x[1] + r[1])
    n = tanh(x[2] + reset * r[2])
    return n + z * (s[0] - n)


def gru_reset_before(x, r, s):
    """The original of Cho et al. (2014), equation 8: the reset gate acts before the recurrent product. Gates reset, z, n.

    reset, z = sigmoid(x + r)
    n = tanh(x_n + W_n (reset * h) + b_n)
    h' = (1 - z) * n + z * h
    """
    reset, z = sigmoid(x[0] + r[0]), sigmoid(x[1] + r[1])
    n = tanh(x[2] + r[2](reset * s[0]))
    return n + z * (s[0] - n)
