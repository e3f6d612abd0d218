"""The monitor: one line in a training loop, and the gradient's way through time is written down at every optimizer step."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from gradkernels.flow.alerts import Alert
from gradkernels.flow.history import Block, Flow, Record
from gradkernels.flow.measure import Measured, Step, records
from gradkernels.flow.points import Residual
from gradkernels.flow.recorder import NOTHING, Recorder
from gradkernels.flow.snapshot import snapshot


class Monitor(Recorder):
    """What :func:`watch` returns; a context manager. Here is what one can ask it.

    The memory horizon of a layer is the largest k with ||dL/dh_{T-k}|| >= 1e-3 ||dL/dh_T||: how many steps back from the last one the
    gradient still has a thousandth of its size.

    Attributes:
        step_count: optimizer steps seen so far.
        layers: the recurrent layers and directions that are watched, by name.
    """

    def __repr__(self) -> str:
        found = f"step {self.step_count}, {len(self.layers)} layers, {len(self._blocks)} blocks"
        return f"<Monitor of {self.name}: {found}{', closed' if self._closed else ''}>"

    @property
    def _blocks(self) -> list[str]:
        return [point.name for point in self._points if isinstance(point, Residual)]

    def _now(self) -> Measured | None:
        """A record of what the step under way has measured so far."""
        found = {} if self._captured else self._found()
        if not found or self.group is not None:
            return None
        scale = self.scaler._scale.clone() if self.scaler is not None and self.scaler._scale is not None else None
        return records([Step(self.step_count + 1, self.step_count // self.every, found, scale)])[0][0]

    @property
    def history(self) -> list[Record]:
        """The records there are, oldest first, with one of the step under way if it has measured something already."""
        now = self._now()
        return [*self.kept(), *([now] if now else [])]

    @property
    def alerts(self) -> list[Alert]:
        """Everything that was pointed out, oldest first."""
        if self.group is None:
            self._drain()
        now = self._now()
        with self._lock:
            found = list(self._alerts.found)
            return found + (self._alerts.look(now, self.layers, self.thresholds, keep=False) if now else [])

    def _latest(self, layer: str | None) -> tuple[str, Any]:
        if layer is not None and layer not in self.layers:
            raise KeyError(f"no layer {layer!r} is watched; there are {', '.join(self.layers) or 'none'}")
        for record in reversed(self.history):
            for name, flow in record.layers.items():
                if layer in (None, name):
                    return name, flow
        raise RuntimeError(NOTHING if self.layers else self._no_layer())

    def _no_layer(self) -> str:
        watched = [f"the blocks {', '.join(self._blocks)}"] * bool(self._blocks) + ["the parameters"]
        return (
            f"no recurrent layer is watched: {self.name} has none; what is watched are {' and '.join(watched)}. "
            "Cells of a single step (LSTMCell, GRUCell, RNNCell) are not watched: a layer takes the whole sequence"
        )

    def log10_norms(self, layer: str | None = None, state: int = 0) -> Tensor:
        """log10 ||dL/ds_t|| over time, float32 [T], of the latest record; of the first layer and of h unless said otherwise."""
        name, flow = self._latest(layer)
        states = self.layers[name].states or ("x",)
        if not -len(states) <= state < len(states):
            what = f"{len(states)} states" if len(states) > 1 else "one state"
            raise IndexError(
                f"{name} has {what}, {', '.join(f'{k}: {s}' for k, s in enumerate(states))}; got state {state}"
            )
        return torch.from_numpy(flow.signals[states[state]].copy())

    def horizon(self, layer: str | None = None) -> int | None:
        """The memory horizon of a layer in the latest record."""
        return self._latest(layer)[1].horizon

    def summary(self) -> str:
        """A few lines for people: every layer's horizon, decay and norms at both ends, every block's norms at both and how much came past
        its sublayers, and what was pointed out."""
        history = self.history
        flows = {name: flow for record in history for name, flow in record.layers.items()}
        blocks = {name: block for record in history for name, block in record.blocks.items()}
        lines = [f"{self.name}, {self.step_count} steps"]
        for name, layer in self.layers.items():
            signal = (layer.states or ("x",))[0]
            flow = flows.get(name)
            lines.append(f"  {name}: {_of_layer(signal, flow) if flow and flow.signals[signal].size else UNMEASURED}")
        for name in self._blocks:
            lines.append(f"  {name}: {_of_block(blocks[name]) if name in blocks else UNMEASURED}")
        return "\n".join([*lines, *(f"  {alert}" for alert in self.alerts)])

    def snapshot(self) -> dict[str, Any]:
        """Everything there is as numbers, lists and texts, ready for JSON; may be called from another thread."""
        with self._lock:
            if self.group is None:
                self._drain()
            return snapshot(self)


UNMEASURED = "nothing measured yet"


def _of_layer(signal: str, flow: Flow) -> str:
    first, last = flow.signals[signal][[0, -1]].tolist()
    parts = [f"||dL/d{signal}|| {_power(first)} at the first time step, {_power(last)} at the last"]
    if flow.horizon is not None:
        parts.append(f"memory horizon {flow.horizon} of {len(flow.signals[signal]) - 1} steps")
    if flow.decay is not None:
        parts.append(f"{_slope(flow.decay.rate)} (r2 {flow.decay.r2:.2f})")
    elif flow.reached is not None and flow.reached.top > 1:
        parts.append("it grows on the way, by what comes in from above")
    return "; ".join(parts)


def _of_block(block: Block) -> str:
    ends = f"gradient {_power(block.exit)} at the exit, {_power(block.entrance)} at the entrance"
    share = block.residual_share
    return ends if share is None else f"{ends}; {share:.0%} of it came past the sublayers"


def _power(log10: float) -> str:
    if math.isnan(log10) or log10 == math.inf:
        return "not finite"
    return "0" if log10 == -math.inf else f"1e{log10:.1f}"


def _slope(rate: float) -> str:
    """Of decades lost with every step back."""
    if abs(rate) < 0.0005:
        return "steady"
    return f"{abs(rate):.3f} decades {'lost' if rate > 0 else 'gained'} a step"


def watch(model: nn.Module, every: int = 1, scaler: Any = None, **options: Any) -> Monitor:
    r"""Watch how gradients travel through a model while it trains: one line before the training loop.

    .. math::
        \log_{10} \Big\|\frac{\partial L}{\partial h_t}\Big\|, \quad
        \log_{10} \Big\|\frac{\partial L}{\partial c_t}\Big\| \qquad t = 0 \ldots T - 1

    over all rows of the batch, the whole adjoints that ``retain_grad`` on :math:`h_t` shows in an unrolled loop, for every recurrent layer and
    direction of this package, from inside the fused backward. Steps are those of any optimizer that has a parameter of the model: what
    micro-batches, several calls, checkpoints and, with a process group, ranks have measured until then adds up to one record.

    What is measured, and when:

    * at every recorded step the norms of h and c, the memory horizon (the largest k with ||dL/dh_{T-k}|| >= 1e-3 ||dL/dh_T||), the decay per step, and residual, attention and Transformer blocks
      (torch's too): norms at entrance and exit, and the share of the gradient that came past the sublayers. (After the norm, with
      ``norm="post"``: past the first sublayer.)
    * at the first, second, third, fifth, ninth ... and then every 128th recorded step also the norm of dL/dx_t where x wants a gradient, the share of
      saturated values of each gate, in up to four rows of the batch, and of every layer's parameters the norm, that of the
      gradient, and ||new - old|| / ||old||.
    * of a plain recurrent layer of torch, whose kernels tell nothing of the states, dL/dx_t of its input instead of h and c.
      `gk.convert` makes it one of ours.

    Horizon and decay are of the whole gradient. With a loss at every time step, as of a language model, it comes in at all of them, and the
    horizon is the whole sequence: how far the gradient of one output gets is what :func:`gradkernels.flow.compare` measures, of such models too.

    No hook runs in backward, and no step waits for a device; ``python -m bench.flow`` measures what it costs.

    Args:
        model: to be watched; a wrapper (DDP, torch.compile) or what is inside. Compile after watching.
        every: record one step in so many.
        scaler: the ``torch.amp.GradScaler`` in use. Norms are those of the unscaled loss, and a step that it skips has a record.
        keep: records that the history holds at most (512); older ones are thinned out, evenly, when there are more.
        spectra: at one step in so many take :func:`gradkernels.flow.spectrum` of the recurrent layers.
        clip: the ``max_norm`` at which you clip gradients: the norm of all of them together is then measured at every recorded step, after the
            update, and ``snapshot()["clip_rate"]`` is the share of these steps at which it was as large.
        thresholds: :class:`Thresholds` of alerts, and for how many records a gradient has to vanish before it is one.
        on_alert: called with every new :class:`Alert`; None warns, once a kind and layer. What it raises is raised.
        raise_on: kinds of alerts that raise :class:`FlowError`, at most 128 recorded steps or a second late.
        log: called with every record: :class:`TensorBoardLog`, :class:`JsonlLog`, :class:`DictLog`, or anything that takes one; one or several.
            A sink that raises ends no training: it is warned of, and called no more.
        group: process group whose ranks average their gradients; found in a model wrapped by DDP or FSDP before.

    Returns:
        a :class:`Monitor`; a context manager. Under CUDA graphs call its ``step()`` after each replay.

    Raises:
        TypeError: not a module, or an option of another type. ValueError: no parameters, all of them frozen, or an option out of range.
        RuntimeError: something in the model is watched already.

    Horizon and saturation: Pascanu, Mikolov and Bengio, On the difficulty of training recurrent neural networks, 2013.

    Example:
        >>> import torch, gradkernels as gk
        >>> _ = torch.manual_seed(0)
        >>> model = gk.init.forget_bias_(gk.nn.LSTM(3, 8), 5.0)
        >>> optimizer = torch.optim.Adam(model.parameters())
        >>> with gk.flow.watch(model) as monitor:
        ...     for _ in range(3):
        ...         optimizer.zero_grad()
        ...         model(torch.randn(50, 4, 3))[0][-1].square().sum().backward()
        ...         optimizer.step()
        >>> monitor.log10_norms().shape, monitor.horizon(), monitor.alerts
        (torch.Size([50]), 49, [])
        >>> [record.step for record in monitor.history], monitor.summary().splitlines()[0]
        ([1, 2, 3], 'LSTM, 3 steps')
    """
    return Monitor(model, every, scaler, **options)
