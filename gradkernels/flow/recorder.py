"""The writing half of a monitor: what happens at an optimizer step, and when what it has left becomes a record."""

from __future__ import annotations

import math
import threading
import time
import weakref
from collections.abc import Callable, Iterable
from numbers import Real
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from gradkernels.flow.alerts import ADVICE, Alert, Alerts, FlowError, FlowWarning, Thresholds
from gradkernels.flow.history import History, Layer, Record
from gradkernels.flow.measure import Step, records
from gradkernels.flow.points import DETAILS, NORMS, OFF, Sequence, points
from gradkernels.flow.ranks import group_of, reduce
from gradkernels.flow.weights import Weights, groups
from gradkernels.notices import warn

if TYPE_CHECKING:
    from typing_extensions import Self

# Of so many recorded steps one measures everything; before that the first, second, third, fifth, ninth ...
DETAILED = 128
TOGETHER = 128  # recorded steps are read together
TOGETHER_RANKS = 16  # and summed over ranks
SKIPS = 10  # steps that a scaler may skip, one after the other, until its scale fits
SPECTRA = 64  # steps with spectra that are kept
WAIT = 1.0  # seconds, after which fewer are read

_watched: weakref.WeakKeyDictionary[nn.Module, weakref.ref[Recorder]] = weakref.WeakKeyDictionary()


class Recorder:
    """Arms the points of a model, takes what they have measured at every optimizer step, and turns it into records and alerts."""

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
        log: Callable[[Record], object] | Iterable[Callable[[Record], object]] = (),
        group: Any = None,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
        if not any(True for _ in model.parameters()):
            raise ValueError(f"{type(model).__name__} has no parameters: no gradient flows through it")
        for name, value in (("every", every), ("keep", keep), ("spectra", spectra)):
            if value is not None and (not isinstance(value, int) or value < (2 if name == "keep" else 1)):
                raise ValueError(f"{name} must be a positive integer, got {value!r}")
        if not any(p.requires_grad for p in model.parameters()):
            raise ValueError(
                f"no parameter of {type(model).__name__} requires a gradient: it is frozen, and nothing trains it"
            )
        if clip is not None and (isinstance(clip, bool) or not isinstance(clip, Real)):
            raise TypeError(
                f"clip must be a number, the max_norm at which gradients are clipped, got {type(clip).__name__}"
            )
        if clip is not None and not clip > 0:
            raise ValueError(f"clip must be larger than 0, got {clip!r}")
        if scaler is not None and not all(callable(getattr(scaler, name, None)) for name in ("update", "is_enabled")):
            raise TypeError(
                f"scaler must be a torch.amp.GradScaler, with update and is_enabled, got {type(scaler).__name__}"
            )
        if thresholds is not None and not isinstance(thresholds, Thresholds):
            raise TypeError(f"thresholds must be gk.flow.Thresholds, got {type(thresholds).__name__}")
        if on_alert is not None and not callable(on_alert):
            raise TypeError(f"on_alert must be a function of an alert, or None, got {type(on_alert).__name__}")
        self.raise_on, self.log = kinds(raise_on), sinks(log)
        for module in model.modules():
            if (other := _watched.get(module)) is not None and other() is not None:
                raise RuntimeError(
                    f"{type(module).__name__} is watched already; close the other monitor first, or watch the whole model once"
                )
        self.every, self.scaler, self.clip, self.spectra = every, scaler, clip, spectra
        self.thresholds = thresholds or Thresholds()
        self.on_alert = on_alert
        self.model, self.group = weakref.ref(model), group or group_of(model)
        self.name = type(unwrapped(model)).__name__
        self.step_count = 0
        self.device = next(model.parameters()).device
        self._points = points(model)
        self.layers: dict[str, Layer] = {
            layer.name: layer for point in self._points if isinstance(point, Sequence) for layer in point.layers
        }
        if spectra is not None and not self.layers:
            raise ValueError(f"spectra are those of recurrent layers, and {self.name} has none")
        self._history, self._alerts = History(keep), Alerts(skips=0 if scaler is None else SKIPS)
        self._pending: list[Step] = []
        self._captured: dict[Any, Tensor] = {}  # where a CUDA graph leaves what it measures
        self._untold: list[tuple[Record, list[Alert]]] = []
        self._short: set[Sequence] = set()
        self._lock = threading.RLock()
        self._clips = [0, 0]  # steps clipped, of how many
        self._spectra: list[list[dict[str, Any]]] = []  # by step
        self._nonfinite: Alert | None = None
        self._silent, self._heard, self._closed, self._read = 0, False, False, time.monotonic()
        self._weights = Weights(model)
        self._mine: weakref.WeakKeyDictionary[Optimizer, bool] = weakref.WeakKeyDictionary()
        self._last: tuple[Callable[[], Optimizer | None], bool] = (lambda: None), False
        self._level = OFF  # what the step under way measures
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
            if (it := me()) is None or not it._updates(optimizer):
                return
            if capturing(it.device):
                it._captured = it._found()
            elif it.scaler is None:
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
        last, mine = self._last
        if last() is optimizer:  # most models have one
            return mine
        if optimizer not in self._mine:
            if (model := self.model()) is not None:
                self._weights.groups = groups(model)  # a wrapper may have replaced parameters since
            self._mine[optimizer] = self._weights.touched_by(optimizer)
        self._last = weakref.ref(optimizer), self._mine[optimizer]
        return self._mine[optimizer]

    def _arm(self) -> None:
        """Decide what the step that begins measures."""
        index, rest = divmod(self.step_count, self.every)
        if rest:
            level = OFF
        else:
            level = DETAILS if index % DETAILED == 0 or (index < DETAILED and not index & (index - 1)) else NORMS
        if level != self._level:
            self._level = level
            for point in self._points:
                point.arm(level)

    def _before_update(self, optimizer: Optimizer) -> None:
        if self._level == DETAILS and self._updates(optimizer):
            self._weights.keep(optimizer)

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
        self._arm()
        if self.spectra is not None and (self.step_count - 1) % self.spectra == 0:
            self._take_spectra()
        many = len(self._pending)
        if self.group is not None:  # every rank at the same step
            if many >= TOGETHER_RANKS:
                self.sync()
        elif many >= TOGETHER or (many and time.monotonic() - self._read > WAIT):
            self.flush()

    def _found(self) -> dict[Any, Tensor]:
        """What the step under way has measured so far."""
        return {(point, k): g for point in self._points for k, g in point.peek()}

    def _collect(self, level: int) -> None:
        if self._captured:  # a graph writes there again with every replay
            found = {key: g.clone() for key, g in self._captured.items()}
        else:
            found = {(point, k): g for point in self._points for k, g in point.take()}
        scale = None
        if self.scaler is not None and self.scaler.is_enabled():
            scale = self.scaler._scale.clone() if self.scaler._scale is not None else None
        step = Step(self.step_count + 1, self.step_count // self.every, found, scale, level=level)
        if level == DETAILS:
            self._weights.measure(step, self._points)
        if self.clip is not None:
            ranks = 1 if self.group is None else torch.distributed.get_world_size(self.group)
            step.total = self._weights.total(self.device, ranks)
        self._heard |= bool(found) or not self._points
        self._silent += not self._heard
        if self._silent == 3 and not self._heard:
            warn(NOTHING, FlowWarning)
        if found or step.parameters or step.total is not None or self.group is not None:
            self._pending.append(step)

    # ------ what has been found

    def flush(self) -> None:
        """Turn what steps have left into records now, and tell sinks and callbacks; it happens by itself now and then.

        With a process group all ranks have to do it together: see :meth:`sync`.
        """
        if self.group is None:
            self._drain()
        self._tell()

    def sync(self) -> None:
        """:meth:`flush` on every rank of the group: a collective call. It happens by itself every 16 recorded steps."""
        with self._lock:
            if self.group is not None and self._pending:
                reduce(self._pending, self._points, self._weights.names, self.group, self.device)
            self._drain()
        self._tell()

    def _drain(self) -> None:
        """Pending steps become records. Whoever may be reading, from whichever thread: nobody is told here."""
        with self._lock:
            self._read = time.monotonic()
            pending, self._pending = self._pending, []
            made, full = records(pending) if pending else ([], set())
            self._short |= {point for point in full if not point.seen}
            for record in made:
                if record.empty:
                    continue
                self._history.append(record)
                if self.clip is not None and record.grad_norm is not None and math.isfinite(record.grad_norm):
                    # clip_grad_norm_ may have run: what it has clipped is as large as that up to rounding
                    self._clips[0] += record.grad_norm >= self.clip * (1 - 1e-3)
                    self._clips[1] += 1
                fresh = self._alerts.look(record, self.layers, self.thresholds)
                if self._nonfinite is None:
                    self._nonfinite = next((a for a in fresh if a.kind == "nonfinite"), None)
                self._untold.append((record, fresh))

    def _tell(self) -> None:
        """The thread that trains tells sinks and callbacks what is new, and raises what was asked for."""
        with self._lock:
            untold, self._untold = self._untold, []
            short, self._short = self._short, set()
        for point in short:  # of compiled code, which cannot make longer leaves when it meets a longer sequence
            point.resize(2 * point.steps)
        for record, fresh in untold:
            for sink in list(self.log):
                if (error := failed(sink, record)) is not None:
                    self.log.remove(sink)
                    warn(f"{error}; this sink gets no more records", FlowWarning)
            for alert in fresh:
                if self.on_alert is not None:
                    self.on_alert(alert)
                else:
                    warn(str(alert), FlowWarning)
        for _, fresh in untold:
            for alert in fresh:
                if alert.kind in self.raise_on:
                    raise FlowError(str(alert))

    def _take_spectra(self) -> None:
        from gradkernels.flow.spectrum import spectrum

        model = self.model()
        with torch.no_grad():
            taken = (
                [] if model is None else [{**s.to_dict(), "step": self.step_count} for s in spectrum(unwrapped(model))]
            )
        with self._lock:
            self._spectra.append(taken)
            if len(self._spectra) > SPECTRA:
                del self._spectra[1:-1:2]

    def kept(self) -> list[Record]:
        """The records of finished steps, oldest first; may be called from another thread."""
        with self._lock:
            if self.group is None:
                self._drain()
            return list(self._history)

    def close(self) -> None:
        """Stop watching; what was found stays, also of a step under way. Nothing happens the second time."""
        if self._closed:
            return
        self._finish()
        self.flush()
        self._closed = True
        model = self.model()
        for module in model.modules() if model is not None else ():
            _watched.pop(module, None)
        self._finalizer()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, *exc: object) -> None:
        if kind is None:
            self._finish()
            self.sync()
        self.close()

    def _finish(self) -> None:
        if any(True for point in self._points for _ in point.peek()):
            self.step()


NOTHING = (
    "nothing has been measured yet: call loss.backward() on what the watched model computed with gradients enabled "
    "(torch.autograd.grad and torch.func leave monitors out; a model compiled before it was watched may have to be compiled again)"
)


def kinds(raise_on: Iterable[str]) -> frozenset[str]:
    """Those of alerts that raise.

    Raises:
        TypeError: no collection. ValueError: something in it is no kind of alert.
    """
    if isinstance(raise_on, str):
        raise TypeError(f"raise_on must be a collection of kinds of alerts, ({raise_on!r},), got the text {raise_on!r}")
    if not isinstance(raise_on, Iterable):
        raise TypeError(f"raise_on must be a collection of kinds of alerts, got {type(raise_on).__name__}")
    found = list(raise_on)
    for kind in found:
        if kind not in [*ADVICE]:
            raise ValueError(f"unknown kind of alert {kind!r} in raise_on; kinds are {', '.join(ADVICE)}")
    return frozenset(found)


def sinks(log: Any) -> list[Callable[[Record], object]]:
    """Everything that is called with a record: one function, or several.

    Raises:
        TypeError: something else.
    """
    if callable(log):
        return [log]
    if not isinstance(log, Iterable):
        raise TypeError(f"log must be a function of a record, or several, got {type(log).__name__}")
    found = list(log)
    for sink in found:
        if not callable(sink):
            raise TypeError(f"log must be a function of a record, or several, got {type(sink).__name__} among them")
    return found


def failed(sink: Callable[[Record], object], record: Record) -> str | None:
    """Tell a sink; what went wrong, if anything did: a full disk is no reason to end a training."""
    try:
        sink(record)
    except Exception as error:  # noqa: BLE001 - whatever a sink raises
        name = getattr(sink, "__qualname__", type(sink).__qualname__)
        said = f": {error}" if str(error) else ""
        return f"{name} failed at step {record.step}, {type(error).__name__}{said}"
    return None


def capturing(device: torch.device) -> bool:
    """What runs now is recorded into a CUDA graph."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def unwrapped(model: nn.Module) -> nn.Module:
    """The user's own model inside DDP and torch.compile."""
    while (inner := getattr(model, "_orig_mod", getattr(model, "module", None))) is not None:
        model = inner
    return model


def _release(handles: list[Any], points: list[Any], scaler: Any) -> None:
    for handle in handles:
        handle.remove()
    for point in points:
        point.close()
    if scaler is not None:
        scaler.__dict__.pop("update", None)
