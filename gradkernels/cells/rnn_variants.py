# ruff: noqa: F821 - functions of the cell language need no import
"""Plain recurrences whose gradient neither vanishes nor explodes by their activation."""

from .derive import cell


@cell(params=[("bias_modulus", 1, 0.0)])
def rnn_modrelu(x, r, s, p):
    """modReLU keeps signs, and with a unitary matrix the norm: Arjovsky, Shah & Bengio (2016), for real numbers.

    z = x + r
    h' = sign(z) * relu(|z| + b)
    """
    z = x[0] + r[0]
    return sign(z) * relu(abs(z) + p[0])


def rnn_additive(x, r, s):
    """A residual path through time: the Jacobian of a step is the identity and something.

    h' = h + tanh(x + r)
    """
    return s[0] + tanh(x[0] + r[0])
