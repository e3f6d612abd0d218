"""norm(residual + dropout(x)) over rows in Triton: one pass over memory forward, one backward.

Dims: M rows, N values of a row; BM, BN tile of a program.

A row lies in the registers of one program, up to what WIDEST says; a longer one is walked twice, the second time out of L2.
The sum is rounded to storage before it is normalised, so that backward, which reads it back, has the very numbers of forward.
Statistics are in float32 (float64 for float64).

Values moved in each place of a row, which at the bandwidth of the memory is the least time there is:
    forward   reads x, residual, writes s, y: 4; LayerNorm alone reads x, writes y: 2
    backward  reads dy, ds, s, writes dx, and with dropout dresidual: 4 or 5; LayerNorm alone reads dy, x, writes dx: 3
              of rows beyond the registers dy and s once more
Masks are drawn again from seed and place. Gradients of the weights are summed in registers over a run of rows in a program, then
over the programs, both in a fixed order; a program writes N of these sums, a few in a hundred of what it reads.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gradkernels.backends import triton
from gradkernels.backends._sequence import _on
from gradkernels.backends.reference.philox import limit
from gradkernels.backends.reference.residual_norm import summed

if TYPE_CHECKING:
    from gradkernels.backends.triton.launch import Limits

TILE = 1024  # values of a program, unless a row has more
VALUES = 8  # of a thread, unless there are no more threads
FORWARD, BACKWARD = 1024, 512  # threads of the largest program; backward of all that a multiprocessor is given, too
CHUNK = 4096  # values at a time of a row that does not stay in registers
# The longest row that does, by bytes of a value: forward, backward, backward with gradients of the weights.
WIDEST = {2: (32768, 16384, 8192), 4: (32768, 16384, 8192), 8: (8192, 8192, 4096)}


def why_not(dtype: torch.dtype, device: torch.device, *_: Any, **__: Any) -> str | None:
    """The reason why this backend cannot run that, or None."""
    return triton.why_not(None, dtype, device)


def _tile(N: int, widest: int, threads: int, at: Limits) -> tuple[dict[str, int], int]:
    """BM and BN, and how many warps."""
    # the least power of two that is no less than N; Triton's own function takes a microsecond
    BN = max(16, 1 << (N - 1).bit_length()) if N <= widest else CHUNK
    BM = max(TILE // BN, 1)
    return {"BM": BM, "BN": BN}, min(BM * BN // VALUES, threads) // at.lanes


def _ceil(a: int, b: int) -> int:
    return -(-a // b)


def _computed(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _arguments(
    x: Tensor, weight: Tensor | None, seed: Tensor | None, p: float, rms: bool, at: Limits
) -> dict[str, Any]:
    """What both directions are told, by name."""
    from gradkernels.backends.triton.launch import Number

    (below, scale), N = limit(p), x.shape[-1]
    align = math.gcd(N, 16)
    return {
        "M": x.numel() // N, "n": N // align, "ALIGN": align, "seed": seed, "below": below, "scale": scale, "RMS": rms,
        "weight": _dense(weight), **Number.of(x.dtype, at).constants,
    }  # fmt: skip


def _dense(v: Tensor | None) -> Tensor | None:
    return v if v is None else v.contiguous()


def forward(
    x: Tensor,  # [.., N]
    residual: Tensor | None,  # [.., N]
    weight: Tensor | None,  # [N]
    bias: Tensor | None,  # [N]
    seed: Tensor | None,  # int64 [1]
    p: float,
    eps: float,
    rms: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(y, s, mean [M], rstd [M])"""
    from gradkernels.backends.triton import launch
    from gradkernels.backends.triton import residual_norm_kernels as kernels

    x, N = x.contiguous(), x.shape[-1]
    M = math.prod(x.shape[:-1])
    y = torch.empty_like(x)
    s = torch.empty_like(x) if summed(residual, seed) else None
    mean, rstd = x.new_empty(M, dtype=_computed(x)), x.new_empty(M, dtype=_computed(x))
    if M and N:
        with _on(x.device):
            at = launch.limits()
            tile, warps = _tile(N, WIDEST[x.dtype.itemsize][0], FORWARD, at)
            given = _arguments(x, weight, seed, p, rms, at) | tile | {"eps": eps, "WHOLE": N <= tile["BN"]}
            given |= {"x": x, "residual": _dense(residual), "bias": _dense(bias)}
            given |= {"y": y, "s": s, "mean": mean, "rstd": rstd}
            launch.launch(kernels.norm_forward, (_ceil(M, tile["BM"]),), given, launch.options(warps))
    return y, x.new_empty(0) if s is None else s, mean, rstd


def backward(
    grads: Sequence[Any],  # of the results; None is zero
    tensors: Sequence[Any],  # the arguments of forward
    outputs: Sequence[Any],  # what it returned
    need: Sequence[bool],
    p: float,
    eps: float,
    rms: bool,
) -> list[Tensor | None]:
    """The gradients of (x, residual, weight, bias, seed) that are needed."""
    from gradkernels.backends.triton import launch
    from gradkernels.backends.triton import residual_norm_kernels as kernels

    (dy, dsum), (x, residual, weight, bias, seed), (_, s, mean, rstd) = grads, tensors, outputs
    if not summed(residual, seed):
        s, dsum = x, None
    s, M, N = s.contiguous(), mean.numel(), x.shape[-1]
    dx, dresidual = (torch.empty_like(s) if wanted else None for wanted in need[:2])
    dweight, dbias = (torch.empty_like(v) if wanted else None for v, wanted in zip((weight, bias), need[2:4]))
    got = [dx, dresidual, dweight, dbias, None]
    if not M or not N:
        return [v if v is None else v.zero_() for v in got]
    with _on(x.device):
        at = launch.limits()
        tile, warps = _tile(N, WIDEST[x.dtype.itemsize][1 + any(need[2:4])], BACKWARD, at)
        parts, resident = _ceil(N, tile["BN"]), BACKWARD // (warps * at.lanes)  # of a row; programs of a multiprocessor
        run = _ceil(_ceil(M, tile["BM"]), max(at.multiprocessors * resident // parts, 1)) * tile["BM"]
        runs = _ceil(M, run)
        # tiles of dy, ds and s of the next rows are on their way, as long as three quarters of shared memory hold them
        bytes = 3 * tile["BM"] * tile["BN"] * x.dtype.itemsize
        stages = min(3, 1 + at.shared * 3 // 4 // resident // bytes)
        weight_sums, bias_sums = (mean.new_empty(runs, N) if wanted else None for wanted in need[2:4])
        tilts = mean.new_empty(2, M) if parts > 1 and dy is not None else None
        given = _arguments(s, weight, seed, p, rms, at) | tile | {"RUN": run, "STAGES": stages}
        given |= {"dy": _dense(dy), "dsum": _dense(dsum), "s": s, "tilts": tilts}
        given |= {"mean": mean.contiguous(), "rstd": rstd.contiguous()}
        given |= {"dx": dx, "dresidual": dresidual, "dweight": weight_sums, "dbias": bias_sums}
        if tilts is not None:
            launch.launch(kernels.norm_tilts, (M,), given, launch.options(warps))
        launch.launch(kernels.norm_backward, (runs, parts), given, launch.options(warps))
        if any(need[2:4]):
            BM, BN = (16, 128) if runs <= 16 else (128, 16)
            given |= {"weight_sums": weight_sums, "bias_sums": bias_sums, "dweight": dweight, "dbias": dbias}
            given |= {"RUNS": runs, "BM": BM, "BN": BN}
            launch.launch(kernels.add_runs, (_ceil(N, BN),), given, launch.options(4))
    return got
