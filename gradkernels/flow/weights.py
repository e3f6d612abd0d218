"""The parameters of a model, layer by layer: their norms, those of their gradients, and how much an update changes them.

Dims: G gates, H hidden units.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from gradkernels.flow.measure import Step
from gradkernels.flow.points import Recurrent, Residual, Sequence, readable


class Weights:
    """Groups of parameters, and copies of them from before an update; the copies are made once."""

    def __init__(self, model: nn.Module) -> None:
        self.groups = groups(model)
        self.copies: dict[int, Tensor] = {}  # by id of the parameter
        self.fresh: set[int] = set()  # copies that are of this step

    @property
    def names(self) -> list[str]:
        return [name for name, _ in self.groups]

    def touched_by(self, optimizer: Optimizer) -> bool:
        ids = {id(p) for _, parameters in self.groups for p in parameters}
        return any(id(p) in ids for group in optimizer.param_groups for p in group["params"])

    @torch.no_grad()
    def keep(self, optimizer: Optimizer) -> None:
        """Before an update. What is not to be updated now, with a learning rate of 0, has none to measure."""
        for group in optimizer.param_groups:
            if group.get("lr") == 0:
                continue
            for p in group["params"]:
                if not p.requires_grad:
                    continue
                new, old = local(p), self.copies.get(id(p))
                if old is None or (old.shape, old.dtype, old.device) != (new.shape, new.dtype, new.device):
                    old = self.copies[id(p)] = torch.empty_like(new)
                old.copy_(new)
                self.fresh.add(id(p))

    @torch.no_grad()
    def measure(self, step: Step, points: list[Sequence | Residual]) -> None:
        """After it: squares of old weights, of gradients and of the change, by group; the share of dead units by layer."""
        for name, parameters in self.groups:
            live = [p for p in parameters if p.grad is not None]
            if not live:
                continue
            step.sharded |= any(local(p) is not p for p in live)
            kept = all(id(p) in self.fresh for p in live)
            new, grads = [local(p) for p in live], [local(p.grad) for p in live if p.grad is not None]
            old = [self.copies[id(p)] for p in live] if kept else new
            sums = [_square(old), _square(grads, torch.double)]  # gradients may be tiny
            if kept:
                torch._foreach_sub_(old, new)
            sums.append(_square(old) if kept else torch.full_like(sums[0], math.nan))
            step.parameters[name] = torch.stack(sums)
        self.fresh.clear()
        for point in points:
            module = point.module()
            if isinstance(point, Recurrent) and module is not None:
                for k, layer in enumerate(point.layers):
                    share = dead(module, k)
                    if share is not None:
                        step.dead[layer.name] = share

    @torch.no_grad()
    def total(self, device: torch.device, ranks: int) -> Tensor:
        """The square of all gradients together, as a share that adds up over so many ranks; NaN: there is none."""
        grads = [(p.grad, local(p.grad)) for _, parameters in self.groups for p in parameters if p.grad is not None]
        if not grads:
            return torch.full((), math.nan, dtype=torch.double, device=device)
        norms = torch._foreach_norm([mine for _, mine in grads], 2, torch.double)
        squares = torch.stack([norm.to(device) for norm in norms]).square()
        if ranks == 1 or all(mine is not whole for whole, mine in grads):
            return squares.sum()
        # what every rank has is averaged already, and is to count once
        share = [1.0 if mine is not whole else 1.0 / ranks for whole, mine in grads]
        return squares @ torch.tensor(share, dtype=torch.double, device=device)


def local(t: Tensor) -> Tensor:
    """What this rank has of it."""
    part: Tensor = getattr(t, "_local_tensor", t)
    return part


def _square(tensors: list[Tensor], dtype: torch.dtype | None = None) -> Tensor:
    return torch.stack(torch._foreach_norm(tensors, 2, dtype)).double().square().sum()


def groups(model: nn.Module) -> list[tuple[str, list[nn.Parameter]]]:
    """Parameters by the module that has them, those of a recurrent module by layer and direction too; shared ones once."""
    found: dict[str, list[nn.Parameter]] = {}
    seen: set[int] = set()
    for name, module in model.named_modules():
        layers: dict[str, str] = {}
        if isinstance(module, nn.RNNBase):
            layers = {n: names[0].removeprefix("weight_ih_") for names in module._all_weights for n in names}
        for n, p in module.named_parameters(recurse=False):
            if id(p) not in seen:
                seen.add(id(p))
                key = readable(name) or type(module).__name__
                found.setdefault(f"{key}.{layers[n]}" if n in layers else key, []).append(p)
    return list(found.items())


def dead(module: nn.Module, k: int) -> Tensor | None:
    """The share of units of layer k whose rows in the gradients [G*H, ..] of both weights are zero in every gate."""
    alive = None
    for name in module._all_weights[k][:2]:
        weight = module._parameters.get(name)
        if weight is None or weight.grad is None or local(weight) is not weight:
            return None
        rows = (weight.grad != 0).any(1).view(-1, module.hidden_size).any(0)
        alive = rows if alive is None else alive | rows
    return None if alive is None else 1.0 - alive.double().mean()
