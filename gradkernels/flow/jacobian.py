"""The product of step Jacobians of a recurrent layer: what becomes of a small change of its states some steps later.

Dims: T steps, B batch, I inputs, n values of state (all states of a row side by side), k singular values.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from gradkernels.flow import theory
from gradkernels.flow.course import Course
from gradkernels.flow.plain import plain
from gradkernels.nn.parts import Part

EXACT = 512  # values of state up to which the matrix itself is made
LEADING = 8  # singular values beyond
RESOLUTION = 1e-13  # of the largest singular value: what is below is rounding


@dataclass(frozen=True)
class Jacobian:
    """The Jacobian J of the states after step t1 with respect to those after step t0, as `jacobian` finds it.

    Tensors are float64; without a batch in x they have no B.

    Attributes:
        steps: how many steps lie between, |t1 - t0|.
        log10_singular_values: [B, k], the largest first. Those more than 13 decades below the first are lost in rounding: -inf.
        log10_norms: [steps, B], log10 ||J_t|| of every step.
        mantissa, log10_scale: [B, n, n] and [B], J = mantissa * 10^log10_scale. These, and log10_norms, are None where only
            leading singular values were asked for.
        log10_bound: log10 of (max phi' ||W||)^steps. This and the rest are None for cells other than a simple RNN.
        mean_slope: mean phi' over steps, rows and units.
        radius, norm: spectral radius and spectral norm of W.
    """

    steps: int
    log10_singular_values: Tensor
    log10_norms: Tensor | None = field(repr=False)
    mantissa: Tensor | None = field(repr=False)
    log10_scale: Tensor | None = field(repr=False)
    log10_bound: float | None
    mean_slope: float | None
    radius: float | None
    norm: float | None

    @property
    def matrix(self) -> Tensor | None:
        """J itself, [B, n, n]; 0 where float64 ends, below 1e-308."""
        if self.mantissa is None or self.log10_scale is None:
            return None
        return self.mantissa * 10 ** self.log10_scale[..., None, None]

    @property
    def log10_norm(self) -> Tensor:
        """log10 ||J||, [B]."""
        return self.log10_singular_values[..., 0]

    @property
    def log10_product_of_norms(self) -> Tensor | None:
        """The sum of log10_norms, [B]: a bound of log10 ||J|| for every cell, on the course that was taken."""
        return None if self.log10_norms is None else self.log10_norms.sum(0)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able, without the matrix; None for what is not finite."""
        names = ("steps", "log10_singular_values", "log10_norms", "log10_product_of_norms")
        return plain({name: getattr(self, name) for name in (*names, "log10_bound", "mean_slope", "radius", "norm")})


def jacobian(
    module: nn.Module,
    x: Tensor,  # [T, B, I], [B, T, I] with batch_first, or [T, I]
    t0: int,
    t1: int,
    *,
    layer: int = 0,
    reverse: bool = False,
    hx: Any = None,
    k: int | None = None,
) -> Jacobian:
    r"""The Jacobian of a recurrent layer's states after step t1 with respect to its states after step t0.

    .. math::
        J = \frac{\partial s_{t_1}}{\partial s_{t_0}} = J_{t_1} J_{t_1 - 1} \cdots J_{t_0 + 1},
        \qquad J_t = \frac{\partial s_t}{\partial s_{t-1}} = \mathrm{diag}(\phi'(z_t))\, W \text{ in a simple RNN}

    where s holds all states of a row, h and c of an LSTM side by side. A gradient that arrives at t1 has been multiplied by the
    transpose of J when it arrives at t0: the singular values say what can become of it. Beside them stand the bound
    :math:`(\max\phi' \, \|W\|)^{t_1 - t_0}`, the spectral radius, the mean slope, and the norm of every step.

    All is computed in float64 on the CPU and scaled on the way, so that products far below 1e-308 are seen.

    Args:
        module: an LSTM, GRU, RNN or Recurrent of torch or of this package; taken as in evaluation, without dropout.
        x: input ``[T, B, I]``, ``[B, T, I]`` with batch_first, or ``[T, I]``.
        t0, t1: steps counted from 0, ``t0 <= t1``; of the reverse direction, which walks back, ``t1 <= t0``.
        layer, reverse: which layer and direction, where there are several; layers below it make its input.
        hx: initial states as the module takes them; zeros when None.
        k: how many leading singular values. None: all of them, and the matrix, for up to 512 values of state; the leading 8 beyond.
            With k they come from products with J and its transpose, by a block Krylov method, and J is never made.

    Raises:
        TypeError: module is no such layer, or x no tensor.
        ValueError: steps, layer or k out of range, shapes that do not fit, or something is not finite.

    Golub and Kahan, Calculating the singular values and pseudo-inverse of a matrix, 1965; Musco and Musco, Randomized block Krylov methods for
    stronger and faster approximate singular value decomposition, 2015.

    Example:
        >>> import torch, gradkernels as gk
        >>> rnn = gk.init.orthogonal_(torch.nn.RNN(3, 16), gain=0.9)
        >>> quiet = gk.flow.jacobian(rnn, 0.01 * torch.randn(60, 3), t0=9, t1=59)
        >>> driven = gk.flow.jacobian(rnn, torch.randn(60, 3), t0=9, t1=59)
        >>> bool(quiet.log10_bound > quiet.log10_norm > driven.log10_norm)
        True
    """
    course = Course(module, x, layer, reverse, hx)
    T, steps = course.T, abs(t1 - t0)
    if not (0 <= min(t0, t1) and max(t0, t1) < T and (t1 <= t0 if reverse else t0 <= t1)):
        order = "t1 <= t0" if reverse else "t0 <= t1"
        raise ValueError(f"t0 and t1 must be steps from 0 to {T - 1} with {order}, got t0={t0} and t1={t1}")
    n = course.start.shape[1]
    if k is not None and not 1 <= k <= n:
        raise ValueError(f"k must be from 1 to {n}, the values of state, got {k}")
    first = (T - 1 - t0 if reverse else t0) + 1
    states = course.states(course.states(course.start, 0, first)[-1], first, steps)
    product = _Product(course, first, states)
    if k is None and n <= EXACT:
        scale, mantissa, norms = product.exact()
        values = torch.linalg.svdvals(mantissa)
    else:
        scale, mantissa, norms = product.scale(), None, None
        values = leading(product.push, product.pull, states[0], k or LEADING)
    lost = values <= RESOLUTION * values[:, :1]
    at = slice(None) if course.batched else 0
    return Jacobian(
        steps,
        (values.masked_fill(lost, 0.0).log10() + scale[:, None])[at],
        None if norms is None else norms.log10()[:, at],
        None if mantissa is None else mantissa[at],
        None if mantissa is None else scale[at],
        *_simple(course.part, states[1:]),
    )


def _simple(part: Part, states: list[Tensor]) -> tuple[float | None, float | None, float | None, float | None]:
    """log10 of the bound, mean slope, spectral radius and norm of a simple RNN that went through these states."""
    name = part.cell.name.removeprefix("rnn_")
    if part.cell.name == name or name not in theory.ACTIVATIONS:
        return None, None, None, None
    [w] = part.blocks()
    radius, norm = torch.linalg.eigvals(w).abs().max().item(), torch.linalg.matrix_norm(w, 2).item()
    slope = theory.ACTIVATIONS[name].slope(torch.stack(states)).mean().item() if states else None
    return theory.bound(norm, name, len(states)), slope, radius, norm


class _Product:
    """J = J_m ... J_1 of consecutive steps as a linear map, scaled by a power of ten per step and row that is found once."""

    def __init__(self, course: Course, first: int, states: list[Tensor]):
        self.course = course
        self.steps = list(enumerate(states[:-1], first))  # (step, state that enters it [B, n])
        self.like = states[0]
        self.scales: list[Tensor] = []  # of each step [B]

    def exact(self) -> tuple[Tensor, Tensor, Tensor]:
        """log10 of the scale [B], mantissa [B, n, n], and the norms of the steps [m, B]."""
        B, n = self.like.shape
        J, total, norms = torch.eye(n, dtype=torch.double).expand(B, n, n), self.like.new_zeros(B), []
        for t, state in self.steps:
            step = self.course.matrix(t, state)
            norms.append(torch.linalg.eigvalsh(step @ step.transpose(1, 2))[:, -1].clamp(min=0).sqrt())
            J, scale = _scaled(step @ J)
            total = total + scale.log10()
        return total, J, torch.stack(norms) if norms else self.like.new_zeros(0, B)

    def scale(self) -> Tensor:
        """log10 of the product of the scales [B], which this fixes by sending some random directions through."""
        B, n = self.like.shape
        v = torch.randn(B, n, 2, dtype=torch.double, generator=torch.Generator().manual_seed(0))
        for t, state in self.steps:
            v, scale = _scaled(self.course.push(t, state, v))
            self.scales.append(scale)
        return torch.stack(self.scales).log10().sum(0) if self.scales else self.like.new_zeros(B)

    def push(self, v: Tensor) -> Tensor:
        """[B, n, k] -> J v, scaled."""
        for (t, state), scale in zip(self.steps, self.scales):
            v = self.course.push(t, state, v) / scale[:, None, None]
        return v

    def pull(self, v: Tensor) -> Tensor:
        """[B, n, k] -> J^T v, scaled."""
        for (t, state), scale in zip(reversed(self.steps), reversed(self.scales)):
            v = self.course.pull(t, state, v) / scale[:, None, None]
        return v


def _scaled(v: Tensor) -> tuple[Tensor, Tensor]:
    """[B, n, k] with a largest entry of 1 per row of the batch, and what it was divided by [B]."""
    scale = v.abs().amax((1, 2))
    scale = torch.where(scale > 0, scale, 1.0)
    return v / scale[:, None, None], scale


def leading(push: Callable[[Tensor], Tensor], pull: Callable[[Tensor], Tensor], like: Tensor, k: int) -> Tensor:
    """The k largest singular values [B, k] of a linear map A, given as A v and A^T v of [B, n, k], by block Krylov.

    Directions P_0, (A^T A) P_0, (A^T A)^2 P_0 ... are kept orthogonal in V; the singular values of A V approach those of A from
    below, here to six digits. Blocks find values that occur several times, which single vectors miss."""
    B, n = like.shape
    start = torch.randn(B, n, min(n, k + 4), dtype=torch.double, generator=torch.Generator().manual_seed(1))
    V = P = torch.linalg.qr(start).Q
    image, last, asked = push(P), None, 0
    while True:
        size = V.shape[2]
        if size >= 1.2 * asked or size == n:
            asked, values = size, torch.linalg.svdvals(image)[:, :k]
            settled = last is not None and bool(((values - last).abs() <= 1e-6 * values + 1e-13 * values[:, :1]).all())
            if settled or size == n:
                return values
            last = values
        P = pull(torch.linalg.qr(image[..., -P.shape[2] :]).Q)[..., : n - size]
        for _ in range(2):  # once leaves rounding behind, which the next turn would amplify
            P = torch.linalg.qr(P - V @ (V.transpose(1, 2) @ P)).Q
        V, image = torch.cat([V, P], 2), torch.cat([image, push(P)], 2)
