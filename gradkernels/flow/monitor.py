"""The monitor: one line in a training loop, and the gradient's way through time is written down at every optimizer step."""

from __future__ import annotations

import math
import threading
import warnings
import weakref
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from gradkernels.flow.alerts import Alert, Alerts, FlowError, FlowWarning, Thresholds, alerts_of
from gradkernels.flow.history import History, Layer, Record
from gradkernels.flow.measure import Step, records
from gradkernels.flow.snapshot import snapshot
from gradkernels.flow.taps import DETAILS, NORMS, OFF, Recurrent, Sequence, points, readable

if TYPE_CHECKING:
    from typing_extensions import Self

DETAILED = 16  # of so many recorded steps one measures saturation and parameters, too
TOGETHER = 16  # recorded steps are read together

_watched: weakref.WeakKeyDictionary[nn.Module, weakref.ref[Monitor]] = weakref.WeakKeyDictionary()


class Monitor:
    """What :func:`watch` returns; a context manager.

    Attributes:
        step_count: optimizer steps seen so far.
        layers: the recurrent layers and directions that are watched, by name.
    """

    def __init__(
        self,
        model: nn.Module,
        every: int = 1,
        scaler: Any = None,
        *,
        keep: int = 512,
        spectra: int | None = None,
        clip: float | None = None,
        thresholds: Thresholds | None = None,
        on_alert: Callable[[Alert], object] | None = None,
        raise_on: Iterable[str] = (),
        log: Iterable[Callable[[Record], object]] = (),
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
        if not any(True for _ in model.parameters()):
            raise ValueError(f"{type(model).__name__} has no parameters: no gradient flows through it")
        for name, value in (("every", every), ("keep", keep), ("spectra", spectra)):
            if value is not None and (not isinstance(value, int) or value < (2 if name == "keep" else 1)):
                raise ValueError(f"{name} must be a positive integer, got {value!r}")
        for module in model.modules():
            if (other := _watched.get(module)) is not None and other() is not None:
                raise RuntimeError(
                    f"{type(module).__name__} is watched already; close the other monitor first, or watch the whole model once"
                )
        self.every, self.scaler, self.clip, self.spectra = every, scaler, clip, spectra
        self.thresholds = thresholds or Thresholds()
        self.on_alert, self.raise_on, self.log = on_alert, frozenset(raise_on), list(log)
        self.model = weakref.ref(model)
        self.name = type(getattr(model, "module", getattr(model, "_orig_mod", model))).__name__
        self.step_count = 0
        self.device = next(model.parameters()).device
        self._points = points(model)
        self.layers: dict[str, Layer] = {
            layer.name: layer for point in self._points if isinstance(point, Sequence) for layer in point.layers
        }
        self._history, self._alerts = History(keep), Alerts()
        self._pending: list[Step] = []
        self._lock = threading.RLock()
        self._clips = [0, 0]  # steps clipped, of how many
        self._spectra: list[tuple[int, Any]] = []
        self._nonfinite: Alert | None = None
        self._silent, self._closed = 0, False
        self._groups = _groups(model)
        self._mine: weakref.WeakKeyDictionary[Optimizer, bool] = weakref.WeakKeyDictionary()
        self._before: dict[int, Tensor] = {}  # weights before this step's update, by id
        for module in model.modules():
            _watched[module] = weakref.ref(self)
        self._hook(model)
        self._arm()

    # ------ the hot path

    def _hook(self, model: nn.Module) -> None:
        me = weakref.ref(self)  # the registry is global: it must keep neither the monitor nor the model alive

        def before(optimizer: Optimizer, args: tuple, kwargs: dict) -> None:
            if (it := me()) is not None:
                it._before_update(optimizer)

        def after(optimizer: Optimizer, args: tuple, kwargs: dict) -> None:
            if (it := me()) is not None and it.scaler is None and it._updates(optimizer):
                it.step()

        handles = [register_optimizer_step_pre_hook(before), register_optimizer_step_post_hook(after)]
        if self.scaler is not None:  # a step that is skipped never reaches the optimizer, and it is one worth seeing
            update = self.scaler.update

            def updated(*args: Any, **kwargs: Any) -> Any:
                if (it := me()) is not None:
                    it.step()
                return update(*args, **kwargs)

            self.scaler.update = updated
        self._finalizer = weakref.finalize(self, _release, handles, self._points, self.scaler)

    def _updates(self, optimizer: Optimizer) -> bool:
        """Whether this optimizer has a parameter of the model."""
        if optimizer not in self._mine:
            ids = {id(p) for _, parameters in self._groups for p in parameters}
            self._mine[optimizer] = any(id(p) in ids for g in optimizer.param_groups for p in g["params"])
        return self._mine[optimizer]

    @property
    def _level(self) -> int:
        """What the step under way measures."""
        if self._closed or self.step_count % self.every:
            return OFF
        return NORMS if self.step_count // self.every % DETAILED else DETAILS

    def _arm(self) -> None:
        level = self._level
        for point in self._points:
            if point.level != level:
                point.arm(level)

    def _before_update(self, optimizer: Optimizer) -> None:
        if self._level != DETAILS or not self._updates(optimizer):
            return
        with torch.no_grad():
            for group in optimizer.param_groups:
                for p in group["params"]:
                    if p.grad is not None:
                        self._before[id(p)] = p.detach().clone()

    def step(self) -> None:
        """Take what has been measured since the last call: an optimizer step is over.

        Called by the optimizer's own step, or by that of the scaler; by hand where neither runs in Python. Nothing is computed
        and nobody waits: references change hands.
        """
        if self._closed:
            return
        level = self._level
        if level != OFF:
            with self._lock:
                self._collect(level)
        self.step_count += 1
        if self._level != level:
            self._arm()
        if self.spectra is not None and (self.step_count - 1) % self.spectra == 0:
            self._take_spectra()
        if len(self._pending) >= TOGETHER:
            self.flush()

    def _collect(self, level: int) -> None:
        found = {(point, k): g for point in self._points for k, g in point.take()}
        scale = None
        if self.scaler is not None and self.scaler.is_enabled():
            scale = self.scaler._scale.clone() if self.scaler._scale is not None else None
        step = Step(self.step_count + 1, self.step_count // self.every, found, scale)
        if level == DETAILS:
            self._measure_parameters(step)
        if self._points and not found:
            self._silent += 1
            if self._silent == 3 and not len(self._history):
                warnings.warn(_NOTHING, FlowWarning, stacklevel=4)
        if found or step.parameters:
            self._pending.append(step)

    @torch.no_grad()
    def _measure_parameters(self, step: Step) -> None:
        unknown = torch.full((), math.nan, dtype=torch.double, device=self.device)
        for name, parameters in self._groups:
            live = [p for p in parameters if p.grad is not None]
            if not live:
                continue
            old = [self._before.get(id(p)) for p in live]
            weights = [p.detach() if o is None else o for p, o in zip(live, old)]
            change = [p.detach() - o for p, o in zip(live, old) if o is not None]
            sums = [_square(weights), _square([p.grad for p in live if p.grad is not None])]
            sums.append(_square(change) if len(change) == len(live) else unknown)
            step.parameters[name] = torch.stack([s.to(sums[0].device) for s in sums])
        self._before = {}
        for point in self._points:
            if isinstance(point, Recurrent) and (module := point.module()) is not None:
                for k, layer in enumerate(point.layers):
                    share = _dead(module, k)
                    if share is not None:
                        step.dead[layer.name] = share

    # ------ what has been found

    def flush(self) -> None:
        """Turn what steps have left into records now; it happens by itself every few recorded steps, and when somebody reads."""
        with self._lock:
            pending, self._pending = self._pending, []
            made = records(pending) if pending else []
            fresh: list[Alert] = []
            for record in made:
                self._history.append(record)
                if self.clip is not None and record.grad_norm is not None:
                    self._clips[0] += record.grad_norm >= self.clip * (1 - 1e-3)
                    self._clips[1] += 1
                fresh += self._alerts.new(record, alerts_of(record, self.layers, self.thresholds))
            if self._nonfinite is None:
                self._nonfinite = next((a for a in fresh if a.kind == "nonfinite"), None)
        for record in made:
            for sink in self.log:
                sink(record)
        for alert in fresh:
            if self.on_alert is not None:
                self.on_alert(alert)
            else:
                warnings.warn(str(alert), FlowWarning, stacklevel=2)
        for alert in fresh:
            if alert.kind in self.raise_on:
                raise FlowError(str(alert))

    def _take_spectra(self) -> None:
        from gradkernels.flow.spectrum import spectrum

        for point in self._points:
            if isinstance(point, Sequence) and (module := point.module()) is not None:
                with torch.no_grad():
                    self._spectra += [(self.step_count, s) for s in spectrum(module)]

    def _now(self) -> Record | None:
        """A record of what the step under way has measured so far."""
        found = {(point, k): g for point in self._points for k, g in point.peek()}
        if not found:
            return None
        scale = self.scaler._scale.clone() if self.scaler is not None and self.scaler._scale is not None else None
        return records([Step(self.step_count + 1, self.step_count // self.every, found, scale)])[0]

    @property
    def history(self) -> list[Record]:
        """The records there are, oldest first, with one of the step under way if it has measured something already."""
        self.flush()
        now = self._now()
        with self._lock:
            return [*self._history, *([now] if now else [])]

    @property
    def alerts(self) -> list[Alert]:
        """Everything that was pointed out, oldest first."""
        self.flush()
        now = self._now()
        with self._lock:
            found = list(self._alerts.found)
        if now is not None:
            known = {(a.kind, a.layer) for a in found}
            found += [a for a in alerts_of(now, self.layers, self.thresholds) if (a.kind, a.layer) not in known]
        return found

    def _latest(self, layer: str | None) -> tuple[str, Any]:
        if layer is not None and layer not in self.layers:
            raise KeyError(f"no layer {layer!r} is watched; there are {', '.join(self.layers) or 'none'}")
        for record in reversed(self.history):
            for name, flow in record.layers.items():
                if layer in (None, name):
                    return name, flow
        raise RuntimeError(_NOTHING)

    def log10_norms(self, layer: str | None = None, state: int = 0) -> Tensor:
        """log10 ||dL/ds_t|| over time, float32 [T], of the latest record; of the first layer and of h unless said otherwise."""
        name, flow = self._latest(layer)
        states = self.layers[name].states or ("x",)
        return torch.from_numpy(flow.signals[states[state]].copy())

    def horizon(self, layer: str | None = None) -> int | None:
        """The memory horizon of a layer in the latest record."""
        return self._latest(layer)[1].horizon

    def snapshot(self) -> dict[str, Any]:
        """Everything there is as numbers, lists and texts, ready for JSON; may be called from another thread."""
        self.flush()
        with self._lock:
            return snapshot(self)

    def close(self) -> None:
        """Stop watching; what was found stays. Nothing happens the second time."""
        if self._closed:
            return
        self.flush()
        self._closed = True
        model = self.model()
        for module in model.modules() if model is not None else ():
            _watched.pop(module, None)
        self._finalizer()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


_NOTHING = (
    "nothing has been measured yet: call loss.backward() on what the watched model computed with gradients enabled "
    "(torch.autograd.grad and torch.func leave monitors out; a model compiled before it was watched may have to be compiled again)"
)


def _release(handles: list[Any], points: list[Any], scaler: Any) -> None:
    for handle in handles:
        handle.remove()
    for point in points:
        point.close()
    if scaler is not None:
        scaler.__dict__.pop("update", None)


def _square(tensors: list[Tensor]) -> Tensor:
    norms = torch._foreach_norm(tensors, 2, torch.double)
    return torch.stack([v.square() for v in norms]).sum()


def _groups(model: nn.Module) -> list[tuple[str, list[nn.Parameter]]]:
    """Parameters by the module that has them, those of a recurrent module by layer and direction too."""
    found: dict[str, list[nn.Parameter]] = {}
    seen: set[int] = set()
    for name, module in model.named_modules():
        layers = (
            {n: names[0].removeprefix("weight_ih_") for names in module._all_weights for n in names}
            if isinstance(module, nn.RNNBase)
            else {}
        )
        for n, p in module.named_parameters(recurse=False):
            if id(p) not in seen:
                seen.add(id(p))
                key = readable(name) or type(module).__name__
                found.setdefault(f"{key}.{layers[n]}" if n in layers else key, []).append(p)
    return list(found.items())


def _dead(module: nn.RNNBase, k: int) -> Tensor | None:
    """The share of units of layer k whose rows in both weights' gradients are zero in every gate."""
    alive = None
    for name in module._all_weights[k][:2]:
        weight = module._parameters.get(name)
        if weight is None or weight.grad is None:
            return None
        rows = (weight.grad != 0).any(1).view(-1, module.hidden_size).any(0)
        alive = rows if alive is None else alive | rows
    return None if alive is None else 1.0 - alive.double().mean()


def watch(model: nn.Module, every: int = 1, scaler: Any = None, **options: Any) -> Monitor:
    """Watch how gradients travel through a model while it trains.

    >>> import torch, gradkernels as gk
    >>> model = gk.nn.LSTM(3, 8)
    >>> monitor = gk.flow.watch(model)
    >>> model(torch.randn(20, 4, 3))[0][-1].sum().backward()
    >>> monitor.log10_norms().shape
    torch.Size([20])
    """
    return Monitor(model, every, scaler, **options)
