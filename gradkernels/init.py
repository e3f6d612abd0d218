"""Initial weights that let gradients travel through time: functions that change the recurrent layers of a model in place.

Each takes a recurrent layer or cell, of torch or of this package, or a model with some inside, and returns it. Numbers are drawn on
the CPU from torch's generator, or the one that is given, so that a seed means the same on every device.
"""

from __future__ import annotations

import functools
import inspect
import itertools
from typing import NamedTuple, TypeVar

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
    measure = lambda w: torch.linalg.matrix_norm(w, 2).item() if w.isfinite().all() else torch.nan
    norms = {part: [measure(w) for w in part.blocks()] for part in every}
    for part, found_norms in norms.items():
        for gate, norm in zip(part.gates, found_norms):
            if not 0 < norm < torch.inf:
                raise ValueError(
                    f"{part.name}: the block of gate {gate} has norm {norm} and cannot be scaled to {value}"
                )
    for part, found_norms in norms.items():
        heads = part.options.get("heads", 1)
        scales = [value / norm for norm in found_norms for _ in range(heads)]
        _set_blocks(part, [w * scale for w, scale in zip(_blocks(part), scales)])
    return module


def forget_bias_(module: Module, value: float = 1.0) -> Module:
    """Give the gate that keeps the state a bias, so that it begins open: the forget gate of an LSTM, the update gate z of a GRU.

    A state is kept to the part sigmoid(value) a step where nothing else acts on the gate: 0.73 for 1, 0.95 for 3, 0.993 for 5.
    bias_ih of that gate becomes `value` and bias_hh 0, since the two add up. The gate is found by trying, also of a cell of one's own;
    where it keeps the state when it is closed, as a minimal gated unit's, the bias is -value. Behind a norm, which would take a bias
    of all units away, it is the cell's own bias.

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
    for part, (keep, sign, _) in _keepers(module):
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
        raise ValueError(f"longest must be {'finite' if longest > 2 else 'at least 2 steps'}, got {longest}")
    for part, (keep, sign, write) in _keepers(module):
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
    """The block [H, R] of every gate, of every head if there are some; none without a recurrent product."""
    weight, heads = part.get("weight_hh"), part.options.get("heads", 1)
    return [] if weight is None or not weight.numel() else list(weight.detach().chunk(part.cell.G * heads))


def _set_blocks(part: Part, new: list[Tensor]) -> None:
    if new:
        part.set("weight_hh", torch.cat(new))


def _set_bias(part: Part, gate: Gate, value: Tensor) -> None:
    """Of units [H]: the sum of both biases of a gate, or the cell's own parameter."""
    group, index = gate
    if group == "x":
        _set_row(part, "bias_ih", part.cell.G, index, value)
        _set_row(part, "bias_hh", part.cell.G, index, torch.zeros_like(value))
        return
    for name, rows, _ in part.cell.params:
        if 0 <= index < rows:
            _set_row(part, name, rows, index, value)
        index -= rows


def _set_row(part: Part, name: str, rows: int, index: int, value: Tensor) -> None:
    """One of the rows [H] that a parameter [rows * H] or [rows, H] has, where the layer has it."""
    if (whole := part.get(name)) is not None:
        whole = whole.detach().clone(memory_format=torch.contiguous_format)
        whole.view(rows, -1)[index] = value.to(whole)
        part.set(name, whole)


# ---------------------------------------------------------------- gates

Gate = tuple[str, int]  # ("x", k): the pre-activation of gate k; ("p", k): a parameter of the cell


class Roles(NamedTuple):
    """What opens the gate that keeps a state: where its bias is, the bias's sign; and where that of the gate is which writes."""

    keep: Gate
    sign: int
    write: Gate | None


def _keepers(module: nn.Module) -> list[tuple[Part, Roles]]:
    """Layers with a gate that keeps a state."""
    every = [(part, roles) for part in found(module) if (roles := _roles(part.cell)) is not None]
    if not every:
        raise ValueError(f"no layer in {type(module).__name__} has a gate that keeps its state, as LSTM and GRU have")
    for part, roles in every:
        if roles.keep[0] == "x" and part.get("bias_ih") is None:
            raise ValueError(f"{part.name} has no biases: a gate cannot be opened by one")
    return every


@functools.cache
def _roles(cell: Cell) -> Roles | None:
    """Found by opening and closing one gate after the other, with pre-activations or else with the cell's own parameters.

    A gate keeps state j if at one end t_j is s_j and dt_j/ds_j is 1, and the latter is 0 at the other. It writes if the derivative of
    t_j by the bias of another gate is 0 when it is closed and not when it is open. None: no gate keeps anything, as in a simple RNN."""
    names = list(inspect.signature(cell.tangent).parameters)
    sizes = {"x": cell.G, "r": cell.G, "s": cell.S, "p": cell.P, "m": cell.M, "d": cell.D}
    sizes = {name: n for name, n in sizes.items() if name in names}
    own = [value or 0.0 for _, rows, value in cell.params for _ in range(rows)]
    plane = lambda v: torch.full((1, 1), float(v), dtype=torch.double)

    def step(j: int, gate: Gate, end: int, by: Gate) -> tuple[float, float]:
        """t_j and its derivative, the gate being open (end = 1) or closed (-1), all states 1."""
        values = {name: [plane(name in "sm")] * n for name, n in sizes.items()}
        values["p"] = [plane(v) for v in own]
        values[gate[0]] = [plane(40 * end) if k == gate[1] else v for k, v in enumerate(values[gate[0]])]
        values |= {"d" + name: [plane((name, k) == by) for k in range(n)] for name, n in sizes.items()}
        t, dt = cell.tangent(*[values[name] for name in names])
        return t[j].item(), dt[j].item()

    near = lambda a, b: abs(a - b) < 1e-6

    def keeps(j: int, gate: Gate, sign: int) -> bool:
        (value, slope), (_, other) = step(j, gate, sign, ("s", j)), step(j, gate, -sign, ("s", j))
        return near(value, 1) and near(slope, 1) and near(other, 0)

    def writes(j: int, gate: Gate, others: list[Gate]) -> bool:
        slopes = ((step(j, gate, -1, m)[1], step(j, gate, 1, m)[1]) for m in others if m != gate)
        return any(near(closed, 0) and not near(opened, 0) for closed, opened in slopes)

    for group, j, sign in itertools.product("xp", range(cell.S), (1, -1)):
        gates = [(group, k) for k in range(sizes.get(group, 0))]
        for keep in gates:
            if keeps(j, keep, sign):
                return Roles(keep, sign, next((w for w in gates if w != keep and writes(j, w, gates)), None))
    return None
