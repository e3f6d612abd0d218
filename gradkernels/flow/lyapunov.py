"""Lyapunov exponents of a recurrent layer: by how much a step stretches or shrinks small changes in the long run."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from gradkernels.flow.course import Course
from gradkernels.flow.plain import plain


@dataclass(frozen=True)
class Lyapunov:
    """Leading Lyapunov exponents on one course, as `lyapunov` finds them; float64, without B where x has no batch.

    Attributes:
        exponents: [B, k] in nats a step, the largest first: a change along the first grows like exp(exponent * steps), and a gradient is
            changed by the same. -inf: something is forgotten at once.
        per_step: [steps, B, k], what every step contributed; exponents are its mean.
    """

    exponents: Tensor
    per_step: Tensor = field(repr=False)

    @property
    def decades(self) -> Tensor:
        """The exponents in decades a step, [B, k]."""
        return self.exponents / math.log(10)

    @property
    def error(self) -> Tensor:
        """Standard error of the exponents [B, k], from means over eighths of the course; NaN for fewer than 8 steps."""
        size = len(self.per_step) // 8
        if not size:
            return torch.full_like(self.exponents, math.nan)
        return self.per_step[: 8 * size].unflatten(0, (8, size)).mean(1).std(0) / math.sqrt(8)

    def horizon(self, share: float = 1e-3) -> Tensor:
        """Steps after which `share` of a gradient is left along the first direction [B]; inf where it does not shrink."""
        first = self.exponents[..., 0]
        return torch.where(first < 0, math.log(share) / first, math.inf)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able; None for -inf."""
        return plain({"steps": len(self.per_step), "exponents": self.exponents, "error": self.error})


def lyapunov(
    module: nn.Module,
    x: Tensor,  # [T, B, I], [B, T, I] with batch_first, or [T, I]
    k: int | None = None,
    *,
    layer: int = 0,
    reverse: bool = False,
    hx: Any = None,
    skip: int | None = None,
) -> Lyapunov:
    r"""The k leading Lyapunov exponents of a recurrent layer that walks over x.

    .. math:: \lambda_i = \lim_{n \to \infty} \tfrac1n \log \sigma_i(J_n \cdots J_1)

    with the step Jacobians of all its states, see `jacobian`. k directions go along and are made orthogonal after every step (Benettin et
    al., 1980): :math:`J_t Q_{t-1} = Q_t R_t`, and the exponents are the means of :math:`\log |\mathrm{diag}\, R_t|`. In contrast to singular values
    of a product they do not end at a precision: directions that shrink a thousand times faster than the first are seen.

    Below 0 gradients vanish, in the long run and along all directions if the first is below; above 0 they explode, and the course is chaotic.
    In a stack every layer has exponents of its own, given the course of those below, and those of the whole are all of them together.

    Args:
        module, x, layer, reverse, hx: as in `jacobian`.
        k: how many; None: 8, or as many as there are values of state.
        skip: steps at the beginning that do not count, until directions and states have settled; None: a tenth.

    Raises:
        TypeError, ValueError: as in `jacobian`; skip leaves no step.

    Engelken, Wolf and Abbott, Lyapunov spectra of chaotic recurrent neural networks, 2023; Vogt, Puelma Touzel, Shlizerman and Lajoie, On Lyapunov
    exponents for RNNs, 2022.

    Example:
        >>> import torch, gradkernels as gk
        >>> rnn = gk.init.orthogonal_(torch.nn.RNN(3, 16, bias=False), gain=0.9)
        >>> found = gk.flow.lyapunov(rnn, torch.zeros(50, 3), k=2)
        >>> [round(v, 4) for v in found.exponents.exp().tolist()]
        [0.9, 0.9]
    """
    course = Course(module, x, layer, reverse, hx)
    B, n = course.start.shape
    k = min(n, 8) if k is None else k
    skip = course.T // 10 if skip is None else skip
    if not 1 <= k <= n:
        raise ValueError(f"k must be from 1 to {n}, the values of state, got {k}")
    if not 0 <= skip < course.T:
        raise ValueError(f"skip must leave at least one of {course.T} steps, got {skip}")
    states = course.states(course.start, 0, course.T)
    Q = torch.linalg.qr(torch.randn(B, n, k, dtype=torch.double, generator=torch.Generator().manual_seed(0))).Q
    logs = []
    for t, state in enumerate(states[:-1]):
        Q, R = torch.linalg.qr(course.push(t, state, Q))
        logs.append(R.diagonal(dim1=1, dim2=2).abs().log())
    per_step = torch.stack(logs[skip:])
    exponents, order = per_step.mean(0).sort(-1, descending=True)
    per_step = per_step.gather(2, order.expand_as(per_step))
    at = slice(None) if course.batched else 0
    return Lyapunov(exponents[at], per_step[:, at])
