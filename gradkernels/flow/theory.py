"""What theory says about gradients through time: bounds, and what becomes of them on average.

Numbers are decades, log10 of a norm, since the norms themselves leave float64 behind.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Activation(NamedTuple):
    """An activation, its slope as a function of its value, and the greatest slope there is."""

    value: Callable[[Tensor], Tensor]
    slope: Callable[[Tensor], Tensor]
    greatest: float


ACTIVATIONS = {
    "tanh": Activation(torch.tanh, lambda y: 1 - y * y, 1.0),
    "sigmoid": Activation(torch.sigmoid, lambda y: y * (1 - y), 0.25),
    "relu": Activation(torch.relu, lambda y: (y > 0).to(y.dtype), 1.0),
}


def power(rate: float, steps: int) -> float:
    """log10 of rate^steps.

    >>> round(10 ** power(0.9, 50), 5), round(10 ** power(1.1, 100)), f"{10 ** power(0.25, 50):.1e}"
    (0.00515, 13781, '7.9e-31')
    """
    if not steps:
        return 0.0
    return steps * math.log10(rate) if rate > 0 else -math.inf


def bound(norm: float, activation: str, steps: int) -> float:
    """log10 of (max phi' ||W||)^steps: no gradient of a simple RNN with this spectral norm is larger after so many steps.

    Below 0 it is sufficient for vanishing. Above 0 nothing follows: it is necessary for exploding (Pascanu et al., 2013). A sigmoid
    shrinks by 4 or more a step only where ||W|| <= 1.

    >>> bound(0.9, "tanh", 0), round(bound(4.0, "sigmoid", 50), 12)
    (0.0, 0.0)
    """
    return power(ACTIVATIONS[activation].greatest * norm, steps)


def mean_field(gain: float, activation: str, drive: float) -> tuple[float, float]:
    """Variance q of a simple RNN's pre-activations, and the factor by which a step changes the norm of a gradient, in the limit of many units.

        q = gain^2 E[phi(z)^2] + drive,    factor = gain sqrt(E[phi'(z)^2]),    z normal with variance q

    for recurrent weights that are independent with variance gain^2 / H, or orthogonal times gain, and inputs, bias included, that contribute
    variance `drive` to z, anew at every step. In the limit the factor of n steps is that of one to the n: unlike the spectral radius it knows saturation.
    For ReLU q is infinite from gain^2 = 2 on.

    Poole et al., Exponential expressivity in deep neural networks through transient chaos, 2016; Chen, Pennington and Schoenholz, Dynamical
    isometry and a mean field theory of RNNs, 2018.

    >>> q, factor = mean_field(1.0, "tanh", 0.0)
    >>> f"{factor:.3f}"  # quiet: gradients stay
    '1.000'
    >>> q, factor = mean_field(1.0, "tanh", 1 / 3)
    >>> f"{factor:.3f}"  # driven by an input: they vanish
    '0.737'
    """
    phi = ACTIVATIONS[activation]
    z = torch.linspace(-9, 9, 720, dtype=torch.double)  # not 0, where relu has no slope
    weight = (-z * z / 2).exp()
    weight /= weight.sum()
    mean = lambda v: float((weight * v).sum())
    step = lambda q: gain**2 * mean(phi.value(z * math.sqrt(q)) ** 2) + drive
    q = drive + 1.0
    for _ in range(100):
        once = step(q)
        if abs(once - q) <= 1e-12 * q:
            break
        bend = step(once) - 2 * once + q
        if once > q and bend >= 0:  # it grows, and no slower than before
            q = math.inf
            break
        q = max(drive, q - (once - q) ** 2 / bend) if bend else once  # Steffensen's method
    y = phi.value(z if q == math.inf else z * math.sqrt(q))  # only relu has no q, and its slope needs none
    return q, gain * math.sqrt(mean(phi.slope(y) ** 2))


def carry(bias: float, steps: int) -> float:
    """log10 of sigmoid(bias)^steps: what a gate with this bias, and nothing else to act on it, leaves of a state's gradient.

    >>> [round(carry(b, 200), 1) for b in (0, 1, 3, 5)]
    [-60.2, -27.2, -4.2, -0.6]
    """
    return -steps * math.log1p(math.exp(-bias)) / math.log(10)
