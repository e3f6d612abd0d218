"""How far gradients reach back in time in different models, measured the same way in all of them.

Dims: T steps, B batch, I inputs.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gradkernels.flow.numbers import Array, from_the_end, horizons, log10_norm
from gradkernels.flow.plain import plain
from gradkernels.nn.convert import convert
from gradkernels.nn.parts import parts
from gradkernels.nn.recurrent import RNNBase

Factory = Callable[[], nn.Module]


@dataclass(frozen=True)
class Curve:
    """log10 of ||dL/dx_t|| or ||dL/dh_t|| of one model over a sequence: a root mean square over the batch, the median over seeds."""

    model: str
    length: int
    signal: str  # "x", "h", "c" ...
    log10: Array  # [T]
    low: Array  # [T], the least of all seeds
    high: Array  # [T], the greatest

    @property
    def ratio(self) -> float:
        """log10 of what arrives at the first step, in relation to the last."""
        return float(self.log10[0] - self.log10[-1]) if np.isfinite(self.log10[-1]) else math.nan

    @property
    def horizon(self) -> int | None:
        """The largest k with ||dL/dh_{T-k}|| >= 1e-3 ||dL/dh_T||; length - 1 is all the way."""
        return horizons(from_the_end(self.log10[None], False))[0]


@dataclass(frozen=True)
class Line:
    """What theory says of a curve: log10 of a norm, as a straight line from the last step back."""

    name: str
    length: int
    signal: str
    log10: Array  # [T]
    model: str | None = None


@dataclass(frozen=True)
class Comparison:
    """What `compare` measured: curves by model, length and signal, and lines of theory beside them.

    `str(comparison)` is a table, `plot()` a matplotlib figure, `to_dict()` and `save(path)` JSON.
    """

    title: str
    signal: str  # the one to look at first
    curves: list[Curve]
    lines: list[Line] = field(default_factory=list)
    parameters: dict[tuple[str, int], float] = field(default_factory=dict)  # model, length: log10 ||dL/dw||
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def models(self) -> list[str]:
        return list(dict.fromkeys(c.model for c in self.curves))

    @property
    def lengths(self) -> list[int]:
        return sorted({c.length for c in self.curves})

    def curve(self, model: str, length: int | None = None, signal: str | None = None) -> Curve:
        """Of one model: the longest sequence and the first signal, unless told. KeyError where there is none."""
        length, signal = length or self.lengths[-1], signal or self.signal
        for c in self.curves:
            if (c.model, c.length, c.signal) == (model, length, signal):
                return c
        raise KeyError(f"no {signal} of {model!r} over {length} steps; models are {', '.join(self.models)}")

    def horizon(self, model: str, length: int | None = None) -> int | None:
        """Steps back to which a thousandth of the gradient gets, of the longest sequence unless told."""
        return self.curve(model, length).horizon

    def horizons(self, length: int | None = None) -> dict[str, int | None]:
        """The horizon of every model."""
        return {model: self.horizon(model, length) for model in self.models}

    def __str__(self) -> str:
        width = max(map(len, self.models))
        head = "  ".join(f"{f'T={n}':>8}" for n in self.lengths)
        rows = [self.title, f"{'':{width}}  {head}   horizon"]
        for model in self.models:
            cells = "  ".join(f"{_power(self.curve(model, n).ratio):>8}" for n in self.lengths)
            far = self.horizon(model)
            rows.append(f"{model:{width}}  {cells}   {'none' if far is None else far}")
        return "\n".join(rows)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able; None for zero and for what is not finite.

        {"format": 1, "title", "signal", "settings", "lengths": [..],
         "models": [{"name", "runs": [{"length", "ratio", "horizon", "parameters", "signals": {"x": {"log10", "low", "high": [T]}, ..}}]}],
         "lines": [{"name", "model", "length", "signal", "log10": [T]}]}
        """
        return {
            "format": 1,
            "title": self.title,
            "signal": self.signal,
            "settings": self.settings,
            "lengths": self.lengths,
            "models": [{"name": m, "runs": [self._run(m, length) for length in self.lengths]} for m in self.models],
            "lines": [plain(asdict(line)) for line in self.lines],
        }

    def _run(self, model: str, length: int) -> dict[str, Any]:
        main = self.curve(model, length)
        curves = [c for c in self.curves if (c.model, c.length) == (model, length)]
        return {
            "length": length,
            "ratio": plain(main.ratio),
            "horizon": main.horizon,
            "parameters": plain(self.parameters[model, length]),
            "signals": {c.signal: plain({"log10": c.log10, "low": c.low, "high": c.high}) for c in curves},
        }

    def save(self, path: str | Path) -> Path:
        """Write `to_dict()` as JSON. OSError where that cannot be written."""
        path = Path(path)
        path.write_text(json.dumps(self.to_dict(), allow_nan=False) + "\n")
        return path

    def plot(self, path: str | Path | None = None, signal: str | None = None) -> Any:
        """A matplotlib figure, one panel per length, written to `path` if given. ImportError without matplotlib."""
        from gradkernels.flow.compare_figure import draw

        return draw(self, signal or self.signal, path)


def compare(
    models: Mapping[str, nn.Module | Factory] | None = None,
    lengths: Sequence[int] = (10, 50, 100, 200),
    *,
    input_size: int | None = None,
    batch: int = 8,
    seeds: int = 3,
    scale: float = 1.0,
    signal: str = "x",
    title: str = "how far gradients reach back",
) -> Comparison:
    r"""Measure how gradients travel back in time in several models, on the same inputs and from the same loss.

    For every seed and length T: inputs x_t from N(0, scale^2), and the loss is the last output y_T, projected onto a random direction v
    of length 1, so that the gradient sets out with norm 1. Measured is :math:`\log_{10} \|\partial L/\partial x_t\|` at every step,
    which every architecture has, and :math:`\|\partial L/\partial h_t\|` in the first recurrent layer, where there is one.

    That is not the norm of a parameter's gradient: sums over time are dominated by the last steps, and look the same whether or
    not anything arrives from the first ones. `Comparison.parameters` has those norms, to see it.

    Models are copied, converted to gradkernels, and run in float64, as in evaluation: norms down to 1e-150 are seen.

    Args:
        models: by name, modules, or functions without arguments that make one, called anew for every seed. A module gets
            [T, B, I], or [B, T, I] if it says `batch_first`, and returns outputs per step, or one per row, or a tuple that begins with
            them. One that begins with an Embedding gets symbols [T, B], all of them equally likely, and x_t is what the embedding makes
            of them. None: `experiments.ARCHITECTURES`, 32 inputs and 64 units wide.
        lengths: of the sequences.
        input_size: I; None asks the module, or its first recurrent layer, for its `input_size`. Given, every model gets vectors.
        batch, seeds: rows of a batch, and repetitions.
        scale: standard deviation of inputs that are vectors.
        signal: what tables and figures show first: "x", or "h" where all models are recurrent.
        title: of tables and figures.

    Raises:
        TypeError: something that is no module and makes none, no mapping of those, or a model that returns no tensor.
        ValueError: no model, a length, batch or number of seeds below 1, an input size that cannot be found, an unknown signal.

    Example:
        >>> import torch, gradkernels as gk
        >>> found = gk.flow.compare(
        ...     {"rnn": lambda: torch.nn.RNN(4, 16), "lstm, f=5": lambda: gk.init.forget_bias_(torch.nn.LSTM(4, 16), 5.0)}, (10, 40)
        ... )
        >>> found.horizon("rnn") < found.horizon("lstm, f=5")
        True
    """
    if models is None:
        from gradkernels.flow.experiments import ARCHITECTURES, INPUTS, made

        models, input_size = made(ARCHITECTURES), INPUTS
    if not isinstance(models, Mapping):
        raise TypeError(f"models must be a mapping from names to modules, got {type(models).__name__}")
    if not models:
        raise ValueError("there is no model to compare")
    if not isinstance(lengths, Iterable):
        raise TypeError(f"lengths must be several, got {lengths!r}")
    lengths = tuple(lengths)
    for name, n in (("batch", batch), ("seeds", seeds), *(("a length", n) for n in lengths or (0,))):
        if n < 1:
            raise ValueError(f"{name} must be at least 1, got {n}")
    curves, parameters = [], {}
    for name, given in models.items():
        for length in dict.fromkeys(lengths):
            runs = [_measure(name, given, length, input_size, batch, scale, seed) for seed in range(seeds)]
            parameters[name, length] = float(np.median([weights for _, weights in runs]))
            for kind in runs[0][0]:
                rows = np.stack([found[kind] for found, _ in runs])
                curves.append(Curve(name, length, kind, np.median(rows, 0), rows.min(0), rows.max(0)))
    for name in models:
        signals = list(dict.fromkeys(c.signal for c in curves if c.model == name))
        if signal not in signals:
            raise ValueError(f"signal must be one that {name} has, {', '.join(signals)}, got {signal!r}")
    settings = {"batch": batch, "seeds": seeds, "scale": scale, "dtype": "float64"}
    return Comparison(title, signal, curves, parameters=parameters, settings=settings)


def _measure(
    name: str, given: nn.Module | Factory, length: int, input_size: int | None, batch: int, scale: float, seed: int
) -> tuple[dict[str, Array], float]:
    """log10 norms [T] by signal, and log10 of the norm of all parameters' gradients."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = given() if callable(given) and not isinstance(given, nn.Module) else given
        if not isinstance(model, nn.Module):
            raise TypeError(f"{name}: a module or a function that makes one is expected, got {type(model).__name__}")
        model = copy.deepcopy(model)
        # in evaluation nothing is dropped, and every parameter takes part
        model = convert(model.cpu().double()).eval().requires_grad_()
        inputs, x = _inputs(name, model, length, batch, input_size, scale)
        layer = next((m for m in model.modules() if isinstance(m, RNNBase)), None)
        names: list[str] = []
        if layer is not None:
            S = next(parts(layer)).cell.S
            names = ["h", "c", *(f"s{k}" for k in range(2, S))][:S]
            probe = lambda: torch.zeros(length, S + 1, dtype=torch.double, requires_grad=True)
            layer.probes = [probe() for _ in layer.all_weights]
        with torch.enable_grad():
            y = _last(name, model(inputs), model)
        v = torch.randn(y.shape, dtype=y.dtype)
        y.backward(v / torch.linalg.vector_norm(v, dim=-1, keepdim=True))
    if not x:
        raise TypeError(f"{name}: {type(model).__name__} begins with an Embedding and does not call it")
    dx = torch.zeros_like(x[0]) if x[0].grad is None else x[0].grad
    found = {"x": dx.square().sum(-1).mean(0 if _batch_first(model) else 1)}
    measured = None if layer is None or layer.probes is None else layer.probes[0].grad
    if measured is not None and measured[:, -1].all():  # a layer may take fewer steps than there are
        found |= {signal: measured[:, k] / batch for k, signal in enumerate(names)}
    weights = [p.grad.double().square().sum() for p in model.parameters() if p.grad is not None]
    norms = {signal: log10_norm(v.numpy()) for signal, v in found.items()}
    return norms, float(log10_norm(torch.stack(weights).sum().numpy())) if weights else -math.inf


def _inputs(
    name: str, model: nn.Module, length: int, batch: int, width: int | None, scale: float
) -> tuple[Tensor, list[Tensor]]:
    """What a model is called with, in its own order of dimensions, and where x is found after the call."""
    first = next((m for m in model.modules() if _has_width(m) or (not [*m.children()] and [*m.parameters()])), None)
    x: list[Tensor] = []
    if width is None and isinstance(first, nn.Embedding):
        inputs = torch.randint(first.num_embeddings, (length, batch))

        def read(module: nn.Module, args: Any, y: Tensor) -> None:
            y.retain_grad()
            x.append(y)

        first.register_forward_hook(read)
    else:
        inputs = scale * torch.randn(length, batch, width or _width(name, model), dtype=torch.double)
    inputs = inputs.transpose(0, 1) if _batch_first(model) else inputs
    return inputs, x if inputs.dtype == torch.long else [inputs.requires_grad_()]


def _batch_first(model: nn.Module) -> bool:
    return bool(getattr(model, "batch_first", False))


def _has_width(module: nn.Module) -> bool:
    return isinstance(getattr(module, "input_size", None), int)


def _width(name: str, model: nn.Module) -> int:
    """The number of inputs."""
    for module in model.modules():
        if _has_width(module):
            return module.input_size
    raise ValueError(f"{name}: {type(model).__name__} has no input_size; give it to compare")


def _last(name: str, y: Any, model: nn.Module) -> Tensor:
    """The last output of every row [B, O]."""
    y = y[0] if isinstance(y, tuple) and y else y
    if not isinstance(y, Tensor) or y.dim() not in (2, 3):
        what = f"shape {list(y.shape)}" if isinstance(y, Tensor) else type(y).__name__
        raise TypeError(f"{name}: {type(model).__name__} must return outputs [T, B, O] or [B, O], got {what}")
    return y if y.dim() == 2 else y[:, -1] if _batch_first(model) else y[-1]


def _power(log10: float) -> str:
    """
    >>> _power(-62.03), _power(-43.001), _power(0.0), _power(-0.22), _power(-math.inf)
    ('9e-63', '1e-43', '1', '0.6', '0')
    """
    if not math.isfinite(log10):
        return "none" if math.isnan(log10) else "0" if log10 < 0 else "inf"
    if abs(log10) < 2:
        return f"{10**log10:.2g}"
    exponent = math.floor(log10 + math.log10(20 / 19))  # 9.5 is 10
    return f"{10 ** (log10 - exponent):.0f}e{exponent}"
