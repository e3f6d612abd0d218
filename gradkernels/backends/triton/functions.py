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


@triton.jit
def expm1(x):
    t = tanh(0.5 * x)
    return tl.where(tl.abs(x) < 1, 2 * t / (1 - t), tl.exp(x) - 1)


@triton.jit
def log1p(x):
    """W. Kahan's: what the rounding of 1 + x takes from the logarithm, the quotient gives back."""
    u = 1 + x
    return tl.where(u == 1, x, tl.where(u == float("inf"), u, tl.log(u) * (x / (u - 1))))


@triton.jit
def softplus(x):
    return relu(x) + log1p(tl.exp(-tl.abs(x)))


@triton.jit
def sin(x):
    return tl.sin(x)


@triton.jit
def cos(x):
    return tl.cos(x)


@triton.jit
def erf(x):
    return tl.erf(x)


@triton.jit
def sign(x):
    return tl.where(x > 0, 1.0, tl.where(x < 0, -1.0, 0.0)).to(x.dtype)


@triton.jit
def min(a, b):
    return tl.where(a < b, a, tl.where(a == a, b, a))  # noqa: PLR0124 - a NaN stays, whichever it is


@triton.jit
def max(a, b):
    return tl.where(a > b, a, tl.where(a == a, b, a))  # noqa: PLR0124


@triton.jit
def pow(a, n: tl.constexpr):
    """Through the logarithm in float64, which leaves float32 all its digits."""
    size = tl.exp(n * tl.log(tl.abs(a).to(tl.float64)))
    if n % 1 != 0:
        size = tl.where(a < 0, float("nan"), size)
    elif n % 2 == 1:
        size = tl.where(a < 0, -size, size)
    return size.to(a.dtype)


VOCABULARY = {
    f.__name__: f
    for f in (
        full_like,
        where,
        exp,
        expm1,
        log,
        log1p,
        sqrt,
        abs,
        sign,
        relu,
        sigmoid,
        tanh,
        softplus,
        sin,
        cos,
        erf,
        min,
        max,
        pow,
    )
}
