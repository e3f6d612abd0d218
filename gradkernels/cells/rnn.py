# ruff: noqa: F821 - functions of the cell language need no import
"""The simple recurrent network of Elman (1990), h' = f(W_ih u + b_ih + W_hh h + b_hh), with three choices of f."""


def rnn_tanh(x, r, s):
    """h' = tanh(x + r): torch.nn.RNN's default."""
    return tanh(x[0] + r[0])


def rnn_relu(x, r, s):
    """h' = max(x + r, 0): torch.nn.RNN(nonlinearity="relu"); with identity weights Le, Jaitly & Hinton (2015)."""
    return relu(x[0] + r[0])


def rnn_sigmoid(x, r, s):
    """h' = 1 / (1 + exp(-x - r)): Elman's own choice."""
    return sigmoid(x[0] + r[0])
