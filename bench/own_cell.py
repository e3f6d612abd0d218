# ruff: noqa: F821 - functions of the cell language need no import
"""The cell that the README writes, as it stands there; in a file of its own, so that a first step can be timed from here on."""

import gradkernels as gk


@gk.cell
def leaky(x, r, s):
    return 0.9 * s[0] + 0.1 * tanh(x[0] + r[0])
