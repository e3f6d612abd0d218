"""Squares over the ranks of a process group: each rank has measured its own part of a batch.

Dims: T time steps, C columns of a leaf.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from gradkernels.flow.measure import Step
from gradkernels.flow.points import Residual, Sequence


def group_of(model: nn.Module) -> Any:
    """The process group over whose ranks a model's gradients are averaged; None for a model of one process."""
    if not (dist.is_available() and dist.is_initialized()):
        return None
    for module in model.modules():
        if isinstance(module, DistributedDataParallel):
            return module.process_group
        if hasattr(module, "set_reshard_after_forward"):  # FSDPModule, which not every build of torch can import
            return dist.group.WORLD
    return None


def reduce(
    steps: list[Step], points: list[Sequence | Residual], names: list[str], group: Any, device: torch.device
) -> None:
    """The sums over all ranks in place of what this rank has found, for steps that every rank has taken.

    The layout is the same on every rank, whatever each of them has met: every layer of every point, as long as the longest
    sequence anywhere.
    """
    longest = torch.tensor([getattr(point, "steps", 1) for point in points], device=device)
    dist.all_reduce(longest, dist.ReduceOp.MAX, group=group)
    lengths = longest.tolist()
    blank = torch.zeros(3, dtype=torch.double, device=device)
    parts: list[Tensor] = []
    for step in steps:
        for point, T in zip(points, lengths):
            for k, shape in enumerate(point.shapes(step.level)):
                found = step.found.get((point, k))
                if found is None:
                    parts.append(
                        torch.zeros(shape if len(shape) == 1 else (T, shape[1]), dtype=torch.double, device=device)
                    )
                else:
                    parts.append(found if len(shape) == 1 else F.pad(found, (0, 0, 0, T - len(found))))
        parts += [step.parameters.get(name, blank) for name in names if step.sharded]
        if step.total is not None:  # everywhere or nowhere
            parts.append(step.total)
    flat = torch.cat([v.flatten() for v in parts])
    dist.all_reduce(flat, group=group)
    whole = iter([v.view(p.shape) for v, p in zip(flat.split([p.numel() for p in parts]), parts)])
    for step in steps:
        step.found = {}
        for point in points:
            for k, shape in enumerate(point.shapes(step.level)):
                step.found[point, k] = next(whole)
        if step.sharded:
            step.parameters = {name: next(whole) for name in names}
        if step.total is not None:
            step.total = next(whole)
        # the loss of each rank is the mean over its own rows, and what is differentiated is their mean
        world = dist.get_world_size(group)
        step.scale = (torch.ones((), dtype=torch.double) if step.scale is None else step.scale) * world
