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


def horizons(back: Array, threshold: float = HORIZON) -> list[int | None]:
    """The largest k with ||dL/dh_{T-k}|| >= threshold ||dL/dh_T||, for each row of `back` [n, T], log10 norms over the distance.

    Where the loss does not reach the last step, the last one that it reaches takes its place. None: it reaches no step.

    >>> horizons(np.array([[0.0, -1, -2, -4, -5], [-np.inf, 1, 0, -1, -2], [-np.inf] * 5]))
    [2, 3, None]
    """
    n, T = back.shape
    if not T:
        return [None] * n
    finite = np.isfinite(back)
    last = finite.argmax(1)  # where the loss comes in
    rows = np.arange(n)
    floor = back[rows, last] + math.log10(threshold)
    reaches = finite & (back >= floor[:, None])
    far = T - 1 - reaches[:, ::-1].argmax(1)
    return [int(k) if ok else None for k, ok in zip(far - last, reaches.any(1))]


def decays(back: Array) -> list[Decay | None]:
    """A line through each row of `back` [n, T], where it is finite; None with fewer than three such points.

    >>> decays(np.array([[0.0, -0.5, -1.0, -1.5, -np.inf]]))
    [Decay(rate=0.5, r2=1.0)]
    """
    T = back.shape[1]
    w = np.isfinite(back)
    count = w.sum(1)
    y = np.where(w, back, 0.0).astype(np.float64)
    k = np.arange(T, dtype=np.float64)
    many = np.maximum(count, 1)
    mk, my = (w * k).sum(1) / many, y.sum(1) / many
    dk, dy = w * (k - mk[:, None]), np.where(w, y - my[:, None], 0.0)
    kk, yy, ky = (dk * dk).sum(1), (dy * dy).sum(1), (dk * dy).sum(1)
    found: list[Decay | None] = []
    for c, a, b, ab in zip(count, kk, yy, ky):
        flat = b <= 1e-20 * c  # a level line is explained by its mean
        found.append(Decay(float(-ab / a), 1.0 if flat else float(ab * ab / (a * b))) if c >= 3 else None)
    return found
