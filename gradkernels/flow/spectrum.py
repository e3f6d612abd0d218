"""Spectra of recurrent matrices: eigenvalues say what powers of a matrix do in the end, singular values what one step can do."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from gradkernels.flow.plain import plain
from gradkernels.nn.parts import found


@dataclass(frozen=True)
class Spectrum:
    """The spectrum of one recurrent block W [H, H], as `spectrum` finds it; all numbers are those of float64.

    Attributes:
        name: layer and gate, "encoder.l0.f"; "encoder.l0" where there is one gate.
        layer: the layer and direction, "encoder.l0", "encoder.l0_reverse".
        gate: of the block, "" where there is one.
        eigenvalues: complex [H], the largest first.
        radius: spectral radius, the largest |eigenvalue|: ||W^n||^(1/n) for n to infinity.
        norm: spectral norm, the largest singular value: the most that one product with W stretches a vector by. radius <= norm.
        singular_values: [H], the largest first.
    """

    name: str
    layer: str
    gate: str
    eigenvalues: Tensor = field(repr=False)
    radius: float
    norm: float
    singular_values: Tensor = field(repr=False)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able: eigenvalues as [real, imaginary], None for what is not finite."""
        found = {name: getattr(self, name) for name in ("name", "layer", "gate", "radius", "norm", "singular_values")}
        return plain(found | {"eigenvalues": torch.view_as_real(self.eigenvalues)})


def spectrum(module: nn.Module) -> list[Spectrum]:
    r"""Spectrum of every recurrent block in a module: of every recurrent layer, direction and gate.

    The step Jacobian of a simple RNN is :math:`\mathrm{diag}(\phi'(z_t))\, W`. Its product over n steps is

    * at most :math:`(\max\phi' \cdot \|W\|)^n` in norm: a *norm* below 1 is enough for gradients to vanish, one above 1 is necessary
      for them to explode and not enough;
    * :math:`W^n` where nothing saturates, which grows like :math:`\rho^n` by the spectral *radius*. The two agree where W is normal, orthogonal
      for one; of a matrix of independent entries the norm is twice the radius;
    * what the activation's *mean slope* makes of it where units saturate. No spectrum shows that; `jacobian` does.

    In a gated cell the blocks act through gates beside a path that keeps the state: blocks of radius 0.5 do not mean that it forgets.

    Args:
        module: recurrent layers or cells of torch or of this package, or a model with some inside, wherever their weights are.
            Behind a projection (proj_size) a block is W_k W_hr. Cells without a recurrent product have no spectrum.

    Returns:
        one `Spectrum` per block, in the order of the model, gates in torch's order (i f g o; reset z n). Of weights that are not finite
        it is NaN.

    Raises:
        TypeError: not a module.
        ValueError: no recurrent layer in it.

    Pascanu, Mikolov and Bengio, On the difficulty of training recurrent neural networks, 2013.

    Example:
        >>> import torch, gradkernels as gk
        >>> rnn = gk.init.orthogonal_(torch.nn.RNN(3, 8), gain=0.9)
        >>> [one] = gk.flow.spectrum(rnn)
        >>> print(f"{one.name}: radius {one.radius:.3f}, norm {one.norm:.3f}")
        RNN.l0: radius 0.900, norm 0.900
        >>> [s.name for s in gk.flow.spectrum(torch.nn.Sequential(torch.nn.LSTM(3, 4)))]
        ['0.l0.i', '0.l0.f', '0.l0.g', '0.l0.o']
    """
    return [
        _of(block, part.name, gate if part.cell.G > 1 else "")
        for part in found(module)
        for gate, block in zip(part.gates, part.blocks())
    ]


def _of(w: Tensor, layer: str, gate: str) -> Spectrum:
    """w [H, H] float64 on the CPU"""
    if w.isfinite().all():
        values, singular = torch.linalg.eigvals(w), torch.linalg.svdvals(w)
    else:
        values, singular = torch.full((len(w),), complex(math.nan, math.nan)), torch.full((len(w),), math.nan)
    values = values[values.abs().argsort(descending=True, stable=True)]
    name = f"{layer}.{gate}" if gate else layer
    return Spectrum(name, layer, gate, values, values[0].abs().item(), singular[0].item(), singular)
