# ruff: noqa: F821 - functions of the cell language need no import
"""Independently recurrent units: Li et al., Independently recurrent neural network (2018)."""

from .derive import cell


@cell(params=[("weight_h", 1, 1.0)])
def indrnn(x, r, s, p):
    """Each unit sees itself alone, so that its gradient through time is a power of one weight; no matrix is multiplied.

    h' = relu(x + w * h)
    """
    return relu(x[0] + p[0] * s[0])
