# ruff: noqa: F821 - functions of the cell language need no import
"""The simple recurrent network of Elman (1990): h' = f(x + W h), with three choices of f."""


def rnn_tanh(x, r, s):
    """h' = tanh(x + r)"""
    return tanh(x[0] + r[0])


def rnn_relu(x, r, s):
    """h' = max(x + r, 0): Le, Jaitly & Hinton (2015) start it from the identity."""
    return relu(x[0] + r[0])


def rnn_sigmoid(x, r, s):
    """h' = 1 / (1 + exp(-(x + r)))"""
    return sigmoid(x[0] + r[0])
