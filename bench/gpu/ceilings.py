"""What the rows of layer_rows.py are held against, measured in the same run: copies, large products, products at a head's size.

The last are made by a kernel that does what attention does with its tiles and nothing else: two products for every tile of keys,
no maximum, no exponential. Attention's floor is what it would take at that rate.

Dims: M queries and N keys of a tile, D head size.
"""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

KEYS = 4096  # of a program
COPIED = 128 << 20  # bytes: a tensor of the rows of norms
WIDE = 8192  # of large products
REPEAT = 12
TILES = [(128, 128, 8, 2), (128, 128, 8, 3), (128, 64, 8, 3), (128, 64, 4, 3), (64, 128, 4, 3)]  # M, N, warps, stages


@triton.jit
def products_of_heads(
    q,  # [programs * M, D]
    k,  # [KEYS, D]
    out,  # [programs * M, D]
    KEYS: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    D: tl.constexpr,
):
    rows = (tl.program_id(0) * M + tl.arange(0, M))[:, None] * D + tl.arange(0, D)[None, :]
    own = tl.load(q + rows)
    total = tl.zeros((M, D), tl.float32)
    for first in tl.range(0, KEYS, N):
        tile = tl.load(k + (first + tl.arange(0, N))[:, None] * D + tl.arange(0, D)[None, :])
        total = tl.dot(tl.dot(own, tl.trans(tile)).to(tile.dtype), tile, total)
    tl.store(out + rows, total.to(out.dtype.element_ty))


def of_heads(q: Tensor, k: Tensor, tile: tuple[int, int, int, int]) -> Tensor:
    """(q k^T) k, by the kernel. q [.., D], k [KEYS, D]"""
    (M, N, warps, stages), out = tile, torch.empty_like(q)
    options = {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": True}
    products_of_heads[(q.shape[0] // M,)](q, k, out, KEYS=k.shape[0], M=M, N=N, D=q.shape[1], **options)
    return out


def milliseconds(call: Callable[[], object]) -> float:
    """By events, the median of some."""
    found = []
    for _ in range(REPEAT + 2):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        end.synchronize()
        found.append(begin.elapsed_time(end))
    return statistics.median(found[2:])


def heads(D: int, dtype: torch.dtype) -> dict[str, Any]:
    """GFLOP/s of the products of heads of that size, by the best of the tiles."""
    rows = 128 * 8 * torch.cuda.get_device_properties(torch.cuda.current_device()).multi_processor_count
    q, k = (torch.randn(n, D, device="cuda").to(dtype) / D for n in (rows, KEYS))
    rates: dict[str, float] = {}
    for tile in TILES:
        try:
            rates[" ".join(map(str, tile))] = (
                4e-6 * rows * KEYS * D / milliseconds(functools.partial(of_heads, q, k, tile))
            )
        except triton.runtime.OutOfResources:  # a GPU whose shared memory is smaller
            continue
    if not rates:
        raise RuntimeError(f"no tile of heads of {D} fits")
    by = max(rates, key=rates.__getitem__)
    return {"gflops": rates[by], "by": f"tile, warps and stages {by}", "all": rates}


def large(dtype: torch.dtype, tf32: bool = False) -> dict[str, Any]:
    """GFLOP/s of torch's product of large matrices."""
    n = WIDE if dtype.itemsize == 2 else WIDE // 2
    a, b = (torch.randn(n, n, device="cuda").to(dtype) for _ in range(2))
    before, torch.backends.cuda.matmul.allow_tf32 = torch.backends.cuda.matmul.allow_tf32, tf32
    try:
        found = 2e-6 * n**3 / milliseconds(lambda: torch.mm(a, b))
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
    return {"gflops": found, "by": "torch.mm", "all": {"torch.mm": found}}


def copy() -> dict[str, Any]:
    """GB/s read and written by a copy of the size of a row's tensors, the caches full of something else before."""
    a, b, other = (torch.full((COPIED,), v, dtype=torch.uint8, device="cuda") for v in (1, 0, 2))
    found = []
    for _ in range(REPEAT + 2):
        other.zero_()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        b.copy_(a)
        end.record()
        end.synchronize()
        found.append(begin.elapsed_time(end))
    return {"gbs": 2e-6 * COPIED / statistics.median(found[2:]), "by": f"copy_ of {COPIED >> 20} MiB"}


def limits() -> dict[str, Any]:
    """All of them, as machine.limits has them. What cannot be measured is left out, and the reason is under `missing`."""
    jobs: dict[str, Callable[[], dict[str, Any]]] = {
        "copy": copy,
        "bfloat16": lambda: large(torch.bfloat16),
        "float16": lambda: large(torch.float16),
        "tf32": lambda: large(torch.float32, True),
        "float32": lambda: large(torch.float32),
        "bfloat16, heads of 64": lambda: heads(64, torch.bfloat16),
        "bfloat16, heads of 128": lambda: heads(128, torch.bfloat16),
        "float16, heads of 64": lambda: heads(64, torch.float16),
    }
    found: dict[str, Any] = {"waited": 0.0}
    missing: dict[str, str] = {}
    for name, job in jobs.items():
        try:
            found[name] = job()
        except Exception as e:  # noqa: BLE001 - a compiler's own kind of error among them
            missing[name] = f"{type(e).__name__}: {str(e).partition(chr(10))[0]}"
    return {**found, "missing": missing} if missing else found
