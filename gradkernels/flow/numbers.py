"""From squared norms to the numbers that mean something: logarithms, memory horizon, decay per step.

Dims: n records, T time steps.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.floating]

HORIZON = 1e-3  # a gradient this many times smaller than that of the last step has been forgotten


def log10_norm(squares: Array, scale: float | Array = 1.0) -> Array:
    """log10 of norms from their squares, divided by `scale`; -inf is zero, or below what the adjoint's dtype holds.

    >>> log10_norm(np.array([1e-60, 4.0, 0.0])).round(3).tolist()
    [-30.0, 0.301, -inf]
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray(0.5 * np.log10(squares) - np.log10(scale))


class Decay(NamedTuple):
    """A straight line through log10 ||dL/dh_t|| over the distance from the last step, by least squares."""

    rate: float  # decades lost with every step back in time; negative where the gradient grows
    r2: float  # the share of the variance that the line explains

    @property
    def factor(self) -> float:
        """What a step back multiplies the norm by."""
        return 10.0**-self.rate


def from_the_end(log10: Array, reverse: bool) -> Array:
    """[n, T] over time -> [n, T] over the distance from the step that the recurrence takes last."""
    return log10 if reverse else log10[:, ::-1]


def changes(back: Array) -> tuple[Array, Array]:
    """For each row of `back` [n, T], log10 norms over the distance: where the loss comes in, which is the first finite one, and the
    decades of change from there [n, T]."""
    first = np.isfinite(back).argmax(1)
    with np.errstate(invalid="ignore"):
        return first, back - back[np.arange(len(back)), first][:, None]


def horizons(back: Array, threshold: float = HORIZON) -> list[int | None]:
    """The largest k with ||dL/dh_{T-k}|| >= threshold ||dL/dh_T||, for each row of `back` [n, T], log10 norms over the distance.

    Where the loss does not reach the last step, the last one that it reaches takes its place. None: it reaches no step.

    >>> horizons(np.array([[0.0, -1, -2, -4, -5], [-np.inf, 1, 0, -1, -2], [-np.inf] * 5]))
    [2, 3, None]
    """
    if not back.size:
        return [None] * len(back)
    first, change = changes(back)
    reaches = (change >= math.log10(threshold)) & np.isfinite(change)
    far = back.shape[1] - 1 - reaches[:, ::-1].argmax(1)
    return [k if some else None for k, some in zip((far - first).tolist(), np.any(reaches, 1).tolist())]


def decays(back: Array) -> list[Decay | None]:
    """A line through each row of `back` [n, T], where it is finite; None with fewer than three such points.

    >>> decays(np.array([[0.0, -0.5, -1.0, -1.5, -np.inf]]))
    [Decay(rate=0.5, r2=1.0)]
    """
    here = np.isfinite(back)
    k = np.arange(back.shape[1]) - 0.5 * (back.shape[1] - 1)
    powers = np.stack([np.ones_like(k), k, k * k], 1)
    y = np.where(here, back, 0.0).astype(np.float64)
    (c, sk, skk), (sy, sky), syy = (here @ powers).T, (y @ powers[:, :2]).T, np.einsum("nt,nt->n", y, y)
    with np.errstate(divide="ignore", invalid="ignore"):
        vk, vy, vky = skk - sk * sk / c, syy - sy * sy / c, sky - sk * sy / c
        explained = np.where(vy > 1e-12 * syy, vky * vky / (vk * vy), 1.0)  # a level line is explained by its mean
        rate = -vky / vk
    return [Decay(r, e) if n >= 3 else None for n, r, e in zip(c.tolist(), rate.tolist(), explained.tolist())]
