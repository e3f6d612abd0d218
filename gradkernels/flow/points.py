"""What in a model can be watched: points with leaves of their own, which forward hooks put into layers and blocks.

Dims: T time steps, S states of a cell, E its activations.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from gradkernels import cells
from gradkernels.flow.history import Layer
from gradkernels.flow.taps import Hook, Receive, Send, Tap, first_argument
from gradkernels.nn.recurrent import RNNBase
from gradkernels.ops._recurrent_taps import activations, widths
from gradkernels.ops._residual_taps import EXIT, RESIDUAL, SUBLAYER, listening

OFF, NORMS, DETAILS = 0, 1, 2  # what a step measures: nothing, the norms of states, everything
LENGTH = 512  # of a leaf before a sequence has been seen


class Point:
    """Something in a model with leaves of its own: `arm` says what the next step measures, `take` what this one has measured."""

    def __init__(self, name: str, module: nn.Module) -> None:
        self.name, self.module = name, weakref.ref(module)
        self.handles: list[Any] = []
        self.level = OFF

    def arm(self, level: int) -> None:
        self.level = level

    def close(self) -> None:
        self.arm(OFF)
        for handle in self.handles:
            handle.remove()


class Sequence(Point):
    """A point with a leaf [steps, columns] for each of its layers, as long as the longest sequence so far."""

    layers: list[Layer]
    columns: list[tuple[int, ...]]  # of each layer's leaf, without and with details

    def __init__(self, name: str, module: nn.RNNBase) -> None:
        super().__init__(name, module)
        self.steps, self.seen = LENGTH, False
        self.made: dict[int, list[Tensor]] = {}  # leaves by level
        self.outgrown: list[list[Tensor]] = []
        self.handles.append(module.register_forward_pre_hook(Hook(self.before), with_kwargs=True))

    @property
    def leaves(self) -> list[Tensor]:
        """Those of this step."""
        return self.made.get(self.level, [])

    def arm(self, level: int) -> None:
        super().arm(level)
        module = self.module()
        if level == OFF or module is None:
            return
        device = next(module.parameters()).device
        if level not in self.made or self.made[level][0].device != device:
            make = lambda n: torch.zeros(self.steps, n, dtype=torch.double, device=device, requires_grad=True)
            self.made[level] = [make(columns[level - 1]) for columns in self.columns]

    def before(self, module: nn.RNNBase, args: tuple, kwargs: dict[str, Any]) -> Any:
        """A forward pre-hook: leaves as long as this call's sequence."""
        if self.level == OFF or torch.compiler.is_compiling():
            return
        x = args[0] if args else kwargs.get("input")
        if isinstance(x, PackedSequence):
            T = x.batch_sizes.shape[0]
        elif isinstance(x, Tensor) and x.dim() in (2, 3):
            T = x.shape[1 if module.batch_first and x.dim() == 3 else 0]
        else:
            return  # the layer will say what is wrong
        if T > self.steps or not self.seen:
            self.seen = True
            if T and T != self.steps:
                self.resize(T)

    def resize(self, steps: int) -> None:
        """Leaves of another length. The old ones may be in a graph already: they are read once more."""
        self.outgrown.append(self.leaves)
        self.steps, self.made = steps, {}
        self.arm(self.level)

    def peek(self) -> Iterator[tuple[int, Tensor]]:
        """What has been measured since the last `take`: number of the layer, [steps, columns]."""
        for k, leaf in enumerate(self.leaves):
            found = leaf.grad
            for old in self.outgrown:
                if (earlier := old[k].grad) is not None:
                    # a negative length cuts rows off that nobody has filled
                    earlier = F.pad(earlier, (0, 0, 0, self.steps - len(earlier)))
                    found = earlier if found is None else found + earlier
            if found is not None:
                yield k, found

    def take(self) -> Iterator[tuple[int, Tensor]]:
        """The same, and the next step begins. References change hands."""
        yield from self.peek()
        for leaf in self.leaves:
            leaf.grad = None
        self.outgrown = []

    def shapes(self, level: int) -> list[tuple[int, ...]]:
        """Of the leaves of a step that measures this much."""
        return [(self.steps, columns[level - 1]) for columns in self.columns]


class Recurrent(Sequence):
    """A layer of ours: its kernels measure, in every layer and direction."""

    def __init__(self, name: str, module: RNNBase) -> None:
        super().__init__(name, module)
        cell = cells.get(module.unlisted or module.cell)
        found = tuple((n, function) for n, function, *_ in activations(cell))
        states = ("h", "c", *(f"s{k}" for k in range(2, cell.S)))[: cell.S]
        directions = 1 + module.bidirectional
        names = [f"{name}.{weights[0].removeprefix('weight_ih_')}" for weights in module._all_weights]
        self.layers = [
            Layer(n, name, "recurrent", cell.name, k // directions, k % directions == 1, states, found)
            for k, n in enumerate(names)
        ]
        norms, _, details = widths(cell)
        self.columns = [(norms, details)] * len(names)

    @property
    def leaves(self) -> list[Tensor]:
        module = self.module()  # which makes new ones when it moves to another device
        return (module is not None and module.probes) or []

    def arm(self, level: int) -> None:
        super().arm(level)
        module = self.module()
        if module is not None:
            module.probes = self.made[level] if level else None


class Input(Sequence):
    """A recurrent layer of torch, whose kernels tell nothing of the states: the gradient of its input, step by step."""

    def __init__(self, name: str, module: nn.RNNBase) -> None:
        super().__init__(name, module)
        cell = module.mode.lower()
        self.layers = [Layer(name, name, "input", cell, 0, False, ())]
        self.columns = [(2, 2)]

    def before(self, module: nn.RNNBase, args: tuple, kwargs: dict[str, Any]) -> Any:
        if self.level == OFF or not listening() or not (args or kwargs):
            return None
        super().before(module, args, kwargs)
        x, call = first_argument(args, kwargs)
        packed = isinstance(x, PackedSequence)
        data = x.data if packed else x
        if not isinstance(data, Tensor) or not (packed or data.dim() in (2, 3)) or not data.is_floating_point():
            return None  # the layer will say what is wrong
        if data.device != self.leaves[0].device:
            self.resize(self.steps)
        if packed:
            return call(x._replace(data=Tap.apply(data, self.leaves[0], 0, x.batch_sizes)))
        return call(Tap.apply(data, self.leaves[0], 1 if module.batch_first and data.dim() == 3 else 0, None))


class Residual(Point):
    """A block x -> norm?(x + sublayer(x)): what enters, what leaves, and by which path, in a leaf as `ops._residual_taps` has it."""

    def __init__(self, name: str, module: nn.Module, kind: str, pre: bool) -> None:
        super().__init__(name, module)
        self.kind, self.pre = kind, pre
        self.leaf: Tensor | None = None

    def arm(self, level: int) -> None:
        super().arm(level)
        module = self.module()
        if level == OFF or module is None:
            self.leaf = None
            return
        device = next(module.parameters()).device
        if self.leaf is None or self.leaf.device != device:
            self.leaf = torch.zeros(4, dtype=torch.double, device=device, requires_grad=True)

    def peek(self) -> Iterator[tuple[int, Tensor]]:
        if (leaf := self.leaf) is not None and leaf.grad is not None:
            yield 0, leaf.grad

    def take(self) -> Iterator[tuple[int, Tensor]]:
        yield from self.peek()
        if self.leaf is not None:
            self.leaf.grad = None

    def shapes(self, level: int) -> list[tuple[int, ...]]:
        return [(4,)]


class Probed(Residual):
    """A block of ours, which measures by itself."""

    @property
    def leaf(self) -> Tensor | None:
        module = self.module()  # which makes a new one when it moves to another device
        return None if module is None else module.probe

    @leaf.setter
    def leaf(self, value: Tensor | None) -> None:
        if (module := self.module()) is not None:
            module.probe = value


class Hooked(Residual):
    """A Transformer layer, as seen from outside.

    Before the first norm ("pre") the residual path hands back the gradient of the exit. After it ("post") the gradient of the sum is
    not to be seen, but that of the sublayer's input is, and the rest came past it.
    """

    def __init__(self, name: str, module: nn.Module, kind: str, pre: bool, sublayer: nn.Module) -> None:
        super().__init__(name, module, kind, pre)
        self.path: list[Tensor] = []  # of the calls that are under way
        self.handles.append(module.register_forward_pre_hook(Hook(self.enter), with_kwargs=True))
        self.handles.append(module.register_forward_hook(Hook(self.leave)))
        if not pre:
            self.handles.append(sublayer.register_forward_pre_hook(Hook(self.branch), with_kwargs=True))

    def arm(self, level: int) -> None:
        super().arm(level)
        self.path = []

    def enter(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
        if self.leaf is None or not listening() or not (args or kwargs):
            return None
        x, call = first_argument(args, kwargs)
        if not isinstance(x, Tensor) or not x.is_floating_point():
            return None
        if self.leaf.device != x.device:
            self.arm(self.level)
        x, path = Receive.apply(x, self.leaf, self.pre)
        self.path.append(path)
        return call(x)

    def branch(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
        if not self.path or not listening() or not (args or kwargs):
            return None
        x, call = first_argument(args, kwargs)
        if not isinstance(x, Tensor) or x.numel() != self.path[-1].numel():
            return None
        return call(Send.apply(x, self.path[-1], self.leaf, SUBLAYER))

    def leave(self, module: nn.Module, args: tuple, y: Any) -> Any:
        if not self.path:
            return None
        path = self.path.pop()
        if self.leaf is None or not isinstance(y, Tensor):
            return None
        if self.pre and path.numel() == y.numel():
            return Send.apply(y, path, self.leaf, RESIDUAL)
        return Send.apply(y, None, self.leaf, EXIT)


def points(model: nn.Module) -> list[Sequence | Residual]:
    """Everything in a model that can be watched, in the order of its modules."""
    from gradkernels import nn as ours

    transformers: list[Any] = [nn.TransformerEncoderLayer, nn.TransformerDecoderLayer]
    transformers += [t for n in ("TransformerEncoderLayer", "TransformerDecoderLayer") if (t := getattr(ours, n, None))]
    attention = getattr(ours, "AttentionBlock", ())  # a ResidualBlock, too
    found: list[Sequence | Residual] = []
    for name, module in model.named_modules():
        name = readable(name) or type(module).__name__
        if isinstance(module, RNNBase):
            found.append(Recurrent(name, module))
        elif isinstance(module, nn.RNNBase):
            found.append(Input(name, module))
        elif isinstance(module, ours.ResidualBlock):
            kind = "attention" if isinstance(module, attention) else "residual"
            found.append(Probed(name, module, kind, module.norm == "pre"))
        elif isinstance(module, (*transformers,)):
            layer: Any = module
            found.append(Hooked(name, layer, "transformer", bool(layer.norm_first), layer.self_attn))
    return found


def readable(name: str) -> str:
    """The name of a module without what wrappers put in front of it."""
    return ".".join(part for part in name.split(".") if part not in ("module", "_orig_mod", "_fsdp_wrapped_module"))
