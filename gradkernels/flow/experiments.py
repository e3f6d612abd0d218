"""The experiments by which gradients through time are usually explained, set up so that they show what they are about.

Each returns a `Comparison`, with lines of theory where there is a theory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import gradkernels as gk
from gradkernels.flow import theory
from gradkernels.flow.compare import Comparison, Line, compare
from gradkernels.flow.spectrum import spectrum

__all__ = ["ARCHITECTURES", "INITIALISATIONS", "activations", "architectures", "initialisations", "spectral_norms"]

Make = Callable[[int, int], nn.Module]  # f(inputs, units)
Made = Callable[[], nn.Module]
INPUTS, UNITS = 32, 64


class Readout(nn.Module):
    """Attention over the states of a simple RNN, the last of them being the query: the gradient has a way past all steps between."""

    def __init__(self, input_size: int, hidden_size: int):
        super().__init__()
        self.rnn = gk.nn.RNN(input_size, hidden_size)
        self.attention = gk.nn.AttentionReadout(hidden_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        states, h = self.rnn(x)
        context, _ = self.attention(h[0], states)
        return context


class Encoder(nn.Module):
    """Two layers of a causal pre-norm Transformer."""

    batch_first = True

    def __init__(self, input_size: int, hidden_size: int):
        super().__init__()
        self.embed = nn.Linear(input_size, hidden_size)
        layer = lambda: gk.nn.TransformerEncoderLayer(
            hidden_size, 4, 4 * hidden_size, batch_first=True, norm_first=True
        )
        self.layers = nn.ModuleList([layer(), layer()])

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1], dtype=x.dtype)
        for layer in self.layers:
            x = layer(x, src_mask=mask, is_causal=True)
        return x


class Convolution(gk.nn.WaveNet):
    """Eight dilated causal convolutions that see 257 steps."""

    batch_first = True

    def __init__(self, input_size: int, hidden_size: int):
        super().__init__(input_size, hidden_size, hidden_size, dilations=[2**k for k in range(8)])


# What `compare` compares unless told. A new one is a line here.
ARCHITECTURES: dict[str, Make] = {
    "RNN": gk.nn.RNN,
    "LSTM": gk.nn.LSTM,
    "LSTM, forget bias 1": lambda i, h: gk.init.forget_bias_(gk.nn.LSTM(i, h), 1.0),
    "LSTM, chrono": lambda i, h: gk.init.chrono_(gk.nn.LSTM(i, h), 200),
    "GRU": gk.nn.GRU,
    "RNN, skip 8": lambda i, h: gk.nn.SkipRNN("rnn_tanh", i, h, skip=8, backend="reference"),  # no compiler
    "RNN, four time scales": lambda i, h: gk.nn.MultiScaleRNN("rnn_tanh", i, h, periods=(1, 4, 16, 64)),
    "RNN, attention readout": Readout,
    "Transformer": Encoder,
    "dilated convolution": Convolution,
}

# What gk.init does for a layer as torch makes it.
INITIALISATIONS: dict[str, Make] = {
    "RNN": gk.nn.RNN,
    "RNN, spectral_norm_ 1": lambda i, h: gk.init.spectral_norm_(gk.nn.RNN(i, h), 1.0),
    "RNN, orthogonal_": lambda i, h: gk.init.orthogonal_(gk.nn.RNN(i, h)),
    "RNN, orthogonal_ 1.3": lambda i, h: gk.init.orthogonal_(gk.nn.RNN(i, h), 1.3),
    "RNN relu": lambda i, h: gk.nn.RNN(i, h, nonlinearity="relu"),
    "RNN relu, identity_": lambda i, h: gk.init.identity_(gk.nn.RNN(i, h, nonlinearity="relu")),
    "LSTM": gk.nn.LSTM,
    "LSTM, orthogonal_": lambda i, h: gk.init.orthogonal_(gk.nn.LSTM(i, h)),
    "LSTM, forget_bias_ 1": lambda i, h: gk.init.forget_bias_(gk.nn.LSTM(i, h), 1.0),
    "LSTM, forget_bias_ 3": lambda i, h: gk.init.forget_bias_(gk.nn.LSTM(i, h), 3.0),
    "LSTM, forget_bias_ 5": lambda i, h: gk.init.forget_bias_(gk.nn.LSTM(i, h), 5.0),
    "LSTM, chrono_ 200": lambda i, h: gk.init.chrono_(gk.nn.LSTM(i, h), 200),
    "GRU": gk.nn.GRU,
    "GRU, forget_bias_ 1": lambda i, h: gk.init.forget_bias_(gk.nn.GRU(i, h), 1.0),
    "GRU, forget_bias_ 3": lambda i, h: gk.init.forget_bias_(gk.nn.GRU(i, h), 3.0),
    "GRU, chrono_ 200": lambda i, h: gk.init.chrono_(gk.nn.GRU(i, h), 200),
}


def architectures(
    names: Iterable[str] = ARCHITECTURES, lengths: Sequence[int] = (10, 50, 100, 200), **options: Any
) -> Comparison:
    """Architectures of `ARCHITECTURES`, by ||dL/dx_t||: a state that is multiplied, one that gates keep, and ways past time.

    Of several time scales the slow ones take every 4th, 16th and 64th step: what reaches far are these, not the steps between.

    `options` are those of `compare`, here and below.
    """
    models = made({name: ARCHITECTURES[name] for name in names})
    return compare(models, lengths, input_size=INPUTS, title="gradients back to the input", **options)


def initialisations(names: Iterable[str] = INITIALISATIONS, length: int = 200, **options: Any) -> Comparison:
    """What gk.init does for the reach of gradients, by ||dL/dh_t||, in layers of `INITIALISATIONS`.

    Beside simple RNNs stands mean field theory, which is about weights that are drawn: not about the identity.
    """
    models = made({name: INITIALISATIONS[name] for name in names})
    drawn = [name for name in models if name.startswith("RNN") and "identity_" not in name]
    lines = [line for name in drawn for line in _theory(name, models[name], length) if line.name == "mean field"]
    measured = compare(models, [length], signal="h", title="gradients by initial weights", **options)
    return replace(measured, lines=lines)


def spectral_norms(values: Sequence[float] = (0.8, 1.0, 1.2), steps: int = 50, **options: Any) -> Comparison:
    """Gradients of a tanh RNN over `steps` steps for recurrent matrices of the same spectral norm, by ||dL/dh_t||.

    "orthogonal" layers have next to no input: nothing saturates, radius and norm are the same, and norm^n is what happens. "random"
    ones have the same norm but a radius of about half, and follow the radius. "driven" ones are orthogonal with inputs from N(0, 1), and
    vanish for every norm here: the slopes of saturated units decide, as mean field theory says.
    """
    kinds: dict[str, tuple[Callable[[float], nn.Module], str]] = {
        "orthogonal": (lambda v: _quiet(_rnn(gk.init.orthogonal_, v)), "bound"),
        "random": (lambda v: _quiet(_rnn(gk.init.spectral_norm_, v)), "radius"),
        "driven": (lambda v: _rnn(gk.init.orthogonal_, v), "mean field"),
    }
    models: dict[str, Made] = {}
    lines: list[Line] = []
    for kind, (make, wanted) in kinds.items():
        for v in values:
            name = f"{kind} {v:g}"
            models[name] = partial(make, v)
            lines += [line for line in _theory(name, models[name], steps) if line.name == wanted]
    measured = compare(models, [steps], signal="h", title="one spectral norm, three fates", **options)
    return replace(measured, lines=lines)


def activations(steps: int = 50, **options: Any) -> Comparison:
    """Sigmoid, tanh and ReLU with an orthogonal recurrent matrix and inputs from N(0, 1), by ||dL/dh_t||.

    A sigmoid's slope is 1/4 at most. The bound of tanh and ReLU is 1: what they lose they lose by saturating and by dying.
    """
    models: dict[str, Made] = {
        name: partial(_rnn, gk.init.orthogonal_, 1.0, nonlinearity=name) for name in theory.ACTIVATIONS
    }
    lines = [line for name in models for line in _theory(name, models[name], steps) if line.name != "radius"]
    measured = compare(models, [steps], signal="h", title="activations, orthogonal weights", **options)
    return replace(measured, lines=lines)


def made(models: Mapping[str, Make]) -> dict[str, Made]:
    """Functions without arguments, as `compare` takes them."""
    return {name: partial(make, INPUTS, UNITS) for name, make in models.items()}


def _rnn(init: Callable[..., Any], value: float, **options: Any) -> nn.Module:
    return init(gk.nn.RNN(INPUTS, UNITS, **options), value)


@torch.no_grad()
def _quiet(rnn: Any) -> nn.Module:
    """With next to no input and no bias: states stay where tanh is linear."""
    for parameter, share in ((rnn.weight_ih_l0, 1e-6), (rnn.bias_ih_l0, 0.0), (rnn.bias_hh_l0, 0.0)):
        parameter.mul_(share)
    return rnn


@torch.no_grad()
def _theory(name: str, make: Made, steps: int) -> Iterator[Line]:
    """Bound, radius^n and mean field of a simple RNN, with inputs from N(0, 1), from the weights of seed 0."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        rnn: Any = make()
    [w] = spectrum(rnn)
    gain = w.singular_values.square().mean().sqrt().item()  # ||W||_F / sqrt(H)
    bias = rnn.bias_ih_l0 + rnn.bias_hh_l0
    drive = (rnn.weight_ih_l0.square().sum(1) + bias.square()).mean().item()
    _, factor = theory.mean_field(gain, rnn.nonlinearity, drive)
    greatest = theory.ACTIVATIONS[rnn.nonlinearity].greatest
    for what, rate in {"bound": greatest * w.norm, "radius": greatest * w.radius, "mean field": factor}.items():
        back = [theory.power(rate, n) for n in reversed(range(steps))]
        yield Line(what, steps, "h", np.array(back), name)
