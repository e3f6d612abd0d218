"""What the functions of a cell mean on a block of values in Triton, in float32 and float64, on any vendor.

Everything is made of `tl` alone, without a vendor's library, so that the interpreter runs the same text. NaN and infinity
travel as in torch. Errors are a few units in the last place, relative also near 0, where tanh(x) = 1 - 2 / (exp(2x) + 1) has
none of its digits left.
"""

# The bodies of kernels are in the language of Triton.
# mypy: ignore-errors
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def full_like(x, value):
    return tl.full(x.shape, value, x.dtype)


@triton.jit
def where(condition, a, b):
    return tl.where(condition, a, b)


@triton.jit
def exp(x):
    return tl.exp(x)


@triton.jit
def log(x):
    return tl.log(x)


@triton.jit
def sqrt(x):
    return tl.sqrt_rn(x) if x.dtype == tl.float32 else tl.sqrt(x)


@triton.jit
def abs(x):
    return tl.abs(x)


@triton.jit
def relu(x):
    return tl.where(x <= 0, 0.0, x)  # a NaN is not below 0


@triton.jit
def sigmoid(x):
    return 1 / (1 + tl.exp(-x))


@triton.jit
def tanh(x):
    """An odd polynomial (float64: a quotient of two) up to 0.625, (1 - e) / (1 + e) of e = exp(-2|x|) beyond.

    Coefficients are those of S. Moshier's Cephes library."""
    e = tl.exp(-2 * tl.abs(x))
    far = (1 - e) / (1 + e)
    z = x * x
    if x.dtype == tl.float64:
        p = (-9.64399179425052238628e-1 * z - 9.92877231001918586564e1) * z - 1.61468768441708447952e3
        q = ((z + 1.12811678491632931402e2) * z + 2.23548839060100448583e3) * z + 4.84406305325125486048e3
        near = x + x * z * (p / q)
    else:
        p = (((-5.70498872745e-3 * z + 2.06390887954e-2) * z - 5.37397155531e-2) * z + 1.33314422036e-1) * z
        near = x + x * z * (p - 3.33332819422e-1)
    return tl.where(tl.abs(x) < 0.625, near, tl.where(x < 0, -far, far))


VOCABULARY = {f.__name__: f for f in (full_like, where, exp, log, sqrt, abs, relu, sigmoid, tanh)}
