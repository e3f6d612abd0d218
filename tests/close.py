"""The one tolerance rule: an error against the truth may be at most `k` times that of torch's own kernel in the same dtype.

The truth is the same computation in float64. A few roundings of the largest value are always allowed, since torch's own kernel may
happen to be exact; in float64 itself, where the truth carries the errors of a whole calculation too, somewhat more.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten_with_path

K = 4.0  # times torch's own error
ROUNDINGS = {torch.float64: 256}  # of the tensor's largest value, always allowed; in other dtypes:
FEW = 16


def error(got: Tensor, truth: Tensor) -> float:
    """The largest difference of two tensors; where one is NaN or infinite the other has to be the same."""
    got, truth = got.detach().to("cpu", torch.float64), truth.detach().to("cpu", torch.float64)
    same = (got == truth) | (got.isnan() & truth.isnan())
    difference = torch.where(same, 0.0, got - truth).abs()
    return torch.where(difference.isnan(), torch.inf, difference).max().item() if got.numel() else 0.0


def allowed(theirs: Tensor, truth: Tensor, k: float = K) -> float:
    """How far from the truth a result in the dtype of `theirs` may be."""
    scale = truth.detach().double().nan_to_num(0.0, 0.0, 0.0).abs().max().item() if truth.numel() else 0.0
    own = error(theirs, truth)
    # an overflow of torch's own is no licence
    return (
        k * (own if own < torch.inf else 0.0) + ROUNDINGS.get(theirs.dtype, FEW) * torch.finfo(theirs.dtype).eps * scale
    )


def assert_close_to_truth(ours, theirs, truth, k: float = K, name: str = "") -> None:
    """Tensors, or trees of them of one structure: `ours` and `theirs` in the dtype under test, `truth` in float64.

    Where torch has no kernel to compare with, `theirs` is the same in plain torch operations in that dtype."""
    (a, spec), (b, _), (c, _) = (tree_flatten_with_path(v) for v in (ours, theirs, truth))
    assert len(a) == len(b) == len(c), f"{name}: {len(a)} tensors against {len(b)} and {len(c)}: {spec}"
    wrong = []
    for (path, x), (_, y), (_, z) in zip(a, b, c):
        where = f"{name}{''.join(str(p) for p in path)}" or "value"
        if x is None and y is None and z is None:
            continue
        assert x is not None and y is not None and z is not None, f"{where}: {x} against {y} and {z}"
        assert x.shape == y.shape == z.shape, (
            f"{where}: shape {list(x.shape)} against {list(y.shape)} and {list(z.shape)}"
        )
        assert x.dtype == y.dtype, f"{where}: {x.dtype} against {y.dtype}"
        got, most = error(x, z), allowed(y, z, k)
        if not got <= most:
            wrong.append(
                f"{where}: off by {got:.2e}, torch by {error(y, z):.2e}, allowed {most:.2e} ({x.dtype}, {list(x.shape)})"
            )
    assert not wrong, "\n".join(wrong)
