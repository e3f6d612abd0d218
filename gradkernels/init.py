"""Initial weights that let gradients travel through time: functions that change the recurrent layers of a model in place.

Each takes a recurrent layer or cell, of torch or of this package, or a model with some inside, and returns it. Numbers are drawn on
the CPU from torch's generator, or the one that is given, so that a seed means the same on every device.
"""

from __future__ import annotations

import functools
import inspect
import itertools
from collections.abc import Callable, Iterable
from typing import TypeVar

import torch
from torch import Tensor, nn

from gradkernels.cells import Cell
from gradkernels.nn.parts import Part, found

__all__ = ["chrono_", "forget_bias_", "identity_", "orthogonal_", "spectral_norm_"]

Module = TypeVar("Module", bound=nn.Module)


def orthogonal_(module: Module, gain: float = 1.0, generator: torch.Generator | None = None) -> Module:
    """Make every block of the recurrent matrices orthogonal: all singular values are `gain`.

    A gate's block W_k [H, H] is drawn uniformly from the orthogonal matrices and multiplied by `gain`. A layer with a projection gets
    blocks [H, R] and weight_hr [R, H] with orthonormal columns and rows, so that their product has R singular values `gain`.

    Saxe, McClelland and Ganguli, Exact solutions to the nonlinear dynamics of learning in deep linear neural networks, 2014.

    The horizon, the steps back to which a thousandth of a gradient gets, of 200, in layers of 64 units with inputs from N(0, 1):

    >>> import gradkernels as gk
    >>> gk.flow.experiments.initialisations(["RNN", "RNN, orthogonal_", "RNN, orthogonal_ 1.3", "LSTM", "LSTM, orthogonal_"]).horizons()
    {'RNN': 9, 'RNN, orthogonal_': 28, 'RNN, orthogonal_ 1.3': 92, 'LSTM': 9, 'LSTM, orthogonal_': 14}

    >>> rnn = orthogonal_(torch.nn.RNN(3, 4), gain=0.9)
    >>> torch.linalg.svdvals(rnn.weight_hh_l0).allclose(torch.full((4,), 0.9))
    True
    """
    draw = lambda w: _orthogonal(w.shape[0], w.shape[1], generator)
    for part in found(module):
        _set_blocks(part, [gain * draw(w) for w in _blocks(part)])
        if (projection := part.get("weight_hr")) is not None:
            part.set("weight_hr", draw(projection))
    return module


def identity_(module: Module, scale: float = 1.0) -> Module:
    """Make every block of the recurrent matrices `scale` times the identity, and all biases zero.

    Meant for `RNN(nonlinearity="relu")`: without input such a layer hands its state on as it is.

    Le, Jaitly and Hinton, A simple way to initialize recurrent networks of rectified linear units, 2015.

    The horizon, as in `orthogonal_`:

    >>> import gradkernels as gk
    >>> gk.flow.experiments.initialisations(["RNN relu", "RNN relu, identity_"]).horizons()
    {'RNN relu': 7, 'RNN relu, identity_': 199}

    >>> rnn = identity_(torch.nn.RNN(3, 2, nonlinearity="relu"))
    >>> rnn.weight_hh_l0.tolist()
    [[1.0, 0.0], [0.0, 1.0]]
    """
    for part in found(module):
        _set_blocks(part, [scale * torch.eye(*w.shape) for w in _blocks(part)])
        for name in ("bias_ih", "bias_hh"):
            if (bias := part.get(name)) is not None:
                part.set(name, torch.zeros(bias.shape))
    return module


def spectral_norm_(module: Module, value: float) -> Module:
    """Scale every block of the recurrent matrices so that its spectral norm, the largest singular value, is `value`.

    Blocks keep their shape in all other respects: the spectral radius, the largest |eigenvalue|, is scaled along and stays below.
    With a projection it is the norm of W_k W_hr. Once, unlike torch.nn.utils.parametrizations.spectral_norm.

    ValueError if value is negative or not finite, or a block is zero or not finite.

    The horizon, as in `orthogonal_`: a norm of 1 is no remedy by itself.

    >>> import gradkernels as gk
    >>> gk.flow.experiments.initialisations(["RNN", "RNN, spectral_norm_ 1"]).horizons()
    {'RNN': 9, 'RNN, spectral_norm_ 1': 8}

    >>> lstm = spectral_norm_(torch.nn.LSTM(3, 5), 0.8)
    >>> [round(torch.linalg.matrix_norm(w, 2).item(), 4) for w in lstm.weight_hh_l0.chunk(4)]
    [0.8, 0.8, 0.8, 0.8]
    """
    if not 0 <= value < torch.inf:
        raise ValueError(f"value must be a norm, finite and not negative, got {value}")
    every = found(module)
    norm = lambda w: torch.linalg.matrix_norm(w, 2).item() if w.isfinite().all() else torch.nan
    norms = {part: [norm(w) for w in part.blocks()] for part in every}
    for part, lengths in norms.items():
        for gate, length in zip(part.gates, lengths):
            if not 0 < length < torch.inf:
                raise ValueError(
                    f"{part.name}: the block of gate {gate} has norm {length} and cannot be scaled to {value}"
                )
    for part, lengths in norms.items():
        _set_blocks(part, [w * (value / length) for w, length in zip(_blocks(part), lengths)])
    return module


def forget_bias_(module: Module, value: float = 1.0) -> Module:
    """Give the gate that keeps the state a bias, so that it begins open: the forget gate of an LSTM, the update gate z of a GRU.

    A state is kept to the part sigmoid(value) a step where nothing else acts on the gate: 0.73 for 1, 0.95 for 3, 0.993 for 5.
    bias_ih of that gate becomes `value` and bias_hh 0, since the two add up. Of a cell of one's own the gate is found by trying;
    where it keeps the state when it is closed, the bias is -value.

    ValueError if no layer has such a gate, or one that has it has no bias.

    Gers, Schmidhuber and Cummins, Learning to forget, 2000; Jozefowicz, Zaremba and Sutskever, An empirical exploration of recurrent
    network architectures, 2015.

    The horizon, as in `orthogonal_`:

    >>> import gradkernels as gk
    >>> names = ["LSTM", *(f"LSTM, forget_bias_ {b}" for b in (1, 3, 5)), "GRU", *(f"GRU, forget_bias_ {b}" for b in (1, 3))]
    >>> list(gk.flow.experiments.initialisations(names).horizons().values())
    [9, 23, 199, 199, 13, 27, 160]

    >>> lstm = forget_bias_(torch.nn.LSTM(3, 2), 3.0)
    >>> lstm.bias_ih_l0[2:4].tolist(), lstm.bias_hh_l0[2:4].tolist()
    ([3.0, 3.0], [0.0, 0.0])
    """
    for part, keep, sign, _ in _keepers(module):
        _set_bias(part, keep, torch.full((part.module.hidden_size,), sign * value))
    return module


def chrono_(module: Module, longest: float, generator: torch.Generator | None = None) -> Module:
    """Give the units of a gated layer time scales from 2 to `longest` steps, as biases of the gate that keeps the state.

        b_keep = log u, u uniform in [1, longest - 1];    b_write = -b_keep, where a gate of its own writes (an LSTM's i)

    sigmoid(b_keep) = 1 - 1/(u + 1): a unit forgets in about u + 1 steps. Gates are found, and errors raised, as in `forget_bias_`;
    ValueError if longest < 2.

    Tallec and Ollivier, Can recurrent neural networks warp time?, 2018.

    The horizon, as in `orthogonal_`:

    >>> import gradkernels as gk
    >>> gk.flow.experiments.initialisations(["LSTM", "LSTM, chrono_ 200", "GRU", "GRU, chrono_ 200"]).horizons()
    {'LSTM': 9, 'LSTM, chrono_ 200': 98, 'GRU': 13, 'GRU, chrono_ 200': 199}

    >>> lstm = chrono_(torch.nn.LSTM(3, 100), longest=200)
    >>> i, f, g, o = (lstm.bias_ih_l0 + lstm.bias_hh_l0).chunk(4)
    >>> bool((1 / (1 - f.sigmoid()) <= 200.1).all()), torch.equal(i, -f)
    (True, True)
    """
    if not 2 <= longest < torch.inf:
        raise ValueError(f"longest must be at least 2 steps, got {longest}")
    for part, keep, sign, write in _keepers(module):
        u = 1 + (longest - 2) * torch.rand(part.module.hidden_size, generator=generator)
        _set_bias(part, keep, sign * u.log())
        if write is not None:
            _set_bias(part, write, -u.log())
    return module


# ---------------------------------------------------------------- blocks


def _orthogonal(rows: int, columns: int, generator: torch.Generator | None) -> Tensor:
    """[rows, columns] with orthonormal columns, or rows where those are fewer."""
    q, r = torch.linalg.qr(torch.randn(max(rows, columns), min(rows, columns), dtype=torch.double, generator=generator))
    q = q * r.diagonal().sign()  # the signs that a decomposition chooses would favour some matrices
    return q if rows >= columns else q.T


def _blocks(part: Part) -> list[Tensor]:
    """The block [H, R] of every gate; none without a recurrent product."""
    weight = part.get("weight_hh")
    return [] if weight is None or not weight.numel() else list(weight.detach().chunk(part.cell.G))


def _set_blocks(part: Part, new: list[Tensor]) -> None:
    if new:
        part.set("weight_hh", torch.cat(new))


def _set_bias(part: Part, gate: int, value: Tensor) -> None:
    """The sum of both biases of a gate."""
    for name, new in (("bias_ih", value), ("bias_hh", torch.zeros_like(value))):
        bias = part.get(name)
        if bias is None:
            raise ValueError(f"{part.name} has no biases")
        blocks = list(bias.detach().chunk(part.cell.G))
        blocks[gate] = new.to(bias)
        part.set(name, torch.cat(blocks))


# ---------------------------------------------------------------- gates


def _keepers(module: nn.Module) -> Iterable[tuple[Part, int, int, int | None]]:
    """Layers with a gate that keeps a state: the gate, the sign of the bias that opens it, the gate that writes."""
    every = [(part, roles) for part in found(module) if (roles := _roles(part.cell)) is not None]
    if not every:
        raise ValueError(f"no layer in {type(module).__name__} has a gate that keeps its state, as LSTM and GRU have")
    for part, _ in every:
        if part.get("bias_ih") is None:
            raise ValueError(f"{part.name} has no biases: a gate cannot be opened by one")
    return [(part, *roles) for part, roles in every]


@functools.cache
def _roles(cell: Cell) -> tuple[int, int, int | None] | None:
    """(gate that keeps a state, sign, gate that writes or None): found by opening and closing one gate after the other.

    A gate keeps state j if dt_j/ds_j is 1 at one end and 0 at the other; it writes if dt_j/dx_m of some other gate m is 0 when it
    is closed and not when it is open. None: no gate keeps anything, as in a simple RNN."""
    names = list(inspect.signature(cell.tangent).parameters)
    sizes = {"x": "G", "r": "G", "s": "S", "p": "P", "m": "M", "d": "D"}
    groups = {name: getattr(cell, size) for name, size in sizes.items() if name in names}
    plane = lambda v: torch.full((1, 1), float(v), dtype=torch.double)

    def slope(j: int, gate: int, end: int, group: str, index: int) -> float:
        """dt_j by one of a group, the gate being open (end = 1) or closed (-1)."""
        values = {name: [plane(name in "sm") for _ in range(n)] for name, n in groups.items()}
        values["x"][gate] = plane(40 * end)
        values |= {"d" + name: [plane((name, k) == (group, index)) for k in range(n)] for name, n in groups.items()}
        return cell.tangent(*[values[name] for name in names])[1][j].item()

    for j, sign, gate in itertools.product(range(cell.S), (1, -1), range(cell.G)):
        if _near(slope(j, gate, sign, "s", j), 1) and _near(slope(j, gate, -sign, "s", j), 0):
            return gate, sign, next((k for k in range(cell.G) if k != gate and _writes(cell, slope, j, k)), None)
    return None


def _writes(cell: Cell, slope: Callable[..., float], j: int, gate: int) -> bool:
    """Whether state j depends on some other gate's input when this gate is open, and not when it is closed."""
    others = [m for m in range(cell.G) if m != gate]
    return any(_near(slope(j, gate, -1, "x", m), 0) and not _near(slope(j, gate, 1, "x", m), 0) for m in others)


def _near(a: float, b: float) -> bool:
    return abs(a - b) < 1e-6
