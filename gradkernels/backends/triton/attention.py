"""Attention in Triton: blocks of queries against blocks of keys, memory in proportion to the arguments.

Forward is one kernel. Backward is one for the queries and one for keys and values, each of which sums its own gradients in
registers in one order; a bias has a third. Nothing here waits for the device.

Dims: B sequences, Hq heads of queries, Hk of keys and values, Tq queries, Tk keys, D width of queries and keys, E of values.
"""

from __future__ import annotations

import contextvars
import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gradkernels.backends import reference, triton
from gradkernels.backends._sequence import _on
from gradkernels.backends.reference.philox import limit

NARROW = 512  # bytes of a row of which tiles fit into every GPU's shared memory


def why_not(dtype: torch.dtype, device: torch.device, *tensors: Any, **_: Any) -> str | None:
    """The reason why this backend cannot run that, or None."""
    reason = triton.why_not(None, dtype, device)
    if reason is None and len(tensors) > 2:
        q, v = tensors[0], tensors[2]
        if max(q.shape[-1], v.shape[-1]) * dtype.itemsize > NARROW:
            with _on(device):
                reason = _too_wide(q, v)
    return reason


def _too_wide(q: Tensor, v: Tensor) -> str | None:
    from gradkernels.backends.triton import launch
    from gradkernels.backends.triton.attention_tiles import choose

    at = launch.limits()
    number, D, E = launch.Number.of(q.dtype, at), q.shape[-1], v.shape[-1]
    if all(choose(kernel, number, at, D, E, None, True, False) for kernel in ("forward", "queries", "keys")):
        return None
    return f"shared memory of {at.shared} bytes is too little for heads of {max(D, E)} in {q.dtype}"


# ---------------------------------------------------------------- what kernels are told


def _rows(v: Tensor) -> Tensor:
    """Any strides do as long as the values of a row lie side by side."""
    return v if v.stride(-1) == 1 or v.shape[-1] == 1 else v.contiguous()


def _dense(v: Tensor | None) -> Tensor | None:
    return v if v is None else v.contiguous()


def _unit(heads: Sequence[Tensor]) -> int:
    """How many values strides are multiples of: as many as 16 bytes have if every row begins on a multiple of those, or 1."""
    unit = 16 // heads[0].element_size()
    wide = all(t.data_ptr() % 16 == 0 and not any(s % unit for s in t.stride()[:3]) for t in heads)
    return unit if wide else 1


def _named(name: str, strides: Sequence[int]) -> dict[str, int]:
    """Those of a sequence, a head and a token, each by itself: numbers in a tuple make kernels for special cases of them."""
    return {f"{name}_s{of}": stride for of, stride in zip("bht", strides)}


class _Call:
    """What all kernels of a call are told, by name."""

    def __init__(self, q, k, v, bias, slopes, cu_q, cu_k, key_mask, seed, causal, left, right, p, scale) -> None:
        from gradkernels.backends.triton import launch

        (self.B, self.Hq, self.Tq, self.D), (self.Hk, self.Tk, self.E) = q.shape, v.shape[1:]
        self.heads = dict(zip("qkv", map(_rows, (q, k, v))))
        self.cu, self.dropout = {"q": cu_q, "k": cu_k}, seed is not None
        self.at = launch.limits()
        self.number = launch.Number.of(q.dtype, self.at)
        self.bias, strides = None, [0, 0, 0, 0]
        if bias is not None:
            self.bias = _rows(bias)
            strides = [0 if size == 1 else stride for size, stride in zip(bias.shape, self.bias.stride())]
        self.n = self.B if cu_q is None else cu_q.shape[0] - 1
        far = self.Tq + self.Tk  # beyond everything
        below, kept = limit(p)
        self.told = {
            "bias": self.bias, "slopes": _dense(slopes), "cu_q": cu_q, "cu_k": cu_k, "key_mask": _dense(key_mask), "seed": seed,
            **_named("bias", strides), "slopes_stride": 0 if slopes is None or slopes.shape[0] == 1 else self.Hq,
            "n": self.n, "depth": self.n.bit_length(), "Hq": self.Hq, "group": self.Hq // self.Hk, "Tq": self.Tq, "Tk": self.Tk,
            "left": far if left < 0 else min(left, far), "right": 0 if causal else far if right < 0 else min(right, far),
            "scale": scale, "below": below, "kept": kept,
        }  # fmt: skip
        self.shape = {"D": self.D, "E": self.E, "BIAS_STEP": strides[3], **self.number.constants}

    def tile(self, kernel: str) -> Any:
        from gradkernels.backends.triton.attention_tiles import choose

        Tq = None if self.cu["q"] is not None else self.Tq
        added = any(self.told[name] is not None for name in ("bias", "slopes", "key_mask"))
        plain = not added and _unit(list(self.heads.values())) > 1
        return choose(kernel, self.number, self.at, self.D, self.E, Tq, self.dropout, plain)

    def blocks(self, of: str, size: int) -> int:
        """How many blocks the queries ("q") or keys ("k") of a head are, those of all sequences if they lie one after the other."""
        T = self.Tq if of == "q" else self.Tk
        return -(-T // size) if self.cu[of] is None else T // size + self.n

    def launch(self, kernel: Any, tile: Any, programs: int, heads: dict[str, Tensor], **more: Any) -> None:
        """`heads`: further tensors of which a kernel is told the strides."""
        from gradkernels.backends.triton.attention_tiles import Shape
        from gradkernels.backends.triton.launch import launch, padded

        heads = self.heads | heads
        unit = _unit(list(heads.values()))
        strides: dict[str, int] = {}
        for name, t in heads.items():
            strides |= _named(name, [s // unit for s in t.stride()])
        shape = Shape(**self.shape, DP=padded(self.D), EP=padded(self.E), UNIT=unit, BM=tile.BM, BN=tile.BN, WS=tile.WS)
        arguments = self.told | heads | strides | more | {"S": shape}
        run = functools.partial(launch, kernel, (programs,), arguments, tile.options)
        if tile.WS:
            contextvars.copy_context().run(_with_memory, run, heads["q"])
        else:
            run()


def _with_memory(run: Any, like: Tensor) -> None:
    """Descriptors are made in memory that Triton asks a function for, here in a context that nobody else sees."""
    import triton as its

    its.set_allocator(lambda size, alignment, stream: like.new_empty(size, dtype=torch.int8))
    run()


# ---------------------------------------------------------------- the backend


def forward(
    q: Tensor,  # [B, Hq, Tq, D]
    k: Tensor,  # [B, Hk, Tk, D]
    v: Tensor,  # [B, Hk, Tk, E]
    bias: Tensor | None,  # [B or 1, Hq or 1, Tq or 1, Tk or 1]
    slopes: Tensor | None,  # [B or 1, Hq]
    cu_q: Tensor | None,  # int32 [n + 1]
    cu_k: Tensor | None,  # int32 [n + 1]
    key_mask: Tensor | None,  # bool [B, Tk]
    seed: Tensor | None,  # int64 [1]
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """(out [B, Hq, Tq, E], lse [B, Hq, Tq])"""
    B, Hq, Tq, _ = q.shape
    out = q.new_empty(B, Tq, Hq, v.shape[3]).transpose(1, 2)  # heads of a token side by side
    lse = q.new_empty(B, Hq, Tq, dtype=reference.precise(q[:0]).dtype)
    if cu_q is not None or lse.numel() == 0 or k.shape[2] == 0:
        out.zero_(), lse.fill_(-torch.inf)  # for tokens that are in no sequence
    if lse.numel() == 0 or k.shape[2] == 0:
        return out, lse
    from gradkernels.backends.triton.attention_forward import attend

    with _on(q.device):
        call = _Call(q, k, v, bias, slopes, cu_q, cu_k, key_mask, seed, **options)
        tile = call.tile("forward")
        blocks = call.blocks("q", tile.BM)
        call.launch(attend, tile, blocks * Hq * B, {"out": out}, lse=lse, blocks=blocks)
    return out, lse


def backward(
    grads: Sequence[Any],  # of the results; None is zero
    tensors: Sequence[Any],  # the arguments of forward
    outputs: Sequence[Any],  # what it returned
    need: Sequence[bool],
    **options: Any,
) -> list[Tensor | None]:
    """The gradients of the tensors that are needed; those of q, k and v are made together."""
    (dout, dlse), (q, k, v, bias, *rest), (out, lse) = grads, tensors, outputs
    new = torch.empty_like if rest[1] is None and lse.numel() and k.shape[2] else torch.zeros_like
    made = [new(t) for t in (q, k, v)]
    dbias = None
    if lse.numel() == 0 or k.shape[2] == 0:
        dbias = torch.zeros_like(bias) if need[3] else None
    else:
        with _on(q.device):
            rows = [_rows(t) for t in made]
            dout = torch.zeros_like(out) if dout is None else _rows(dout)
            call = _Call(q, k, v, bias, *rest, **options)
            dbias = _backward(call, dout, _dense(dlse), _rows(out), lse.contiguous(), rows, need[3])
            made = [t if t is r else t.copy_(r) for t, r in zip(made, rows)]
    return [*(t if wanted else None for t, wanted in zip(made, need)), dbias, *[None] * len(rest)]


def _backward(call, dout, dlse, out, lse, made, need_bias):
    """Fills made, the gradients of q, k and v, and returns that of the bias."""
    from gradkernels.backends.triton.attention_backward import adjoint_keys, adjoint_queries

    (dq, dk, dv), delta = made, torch.empty_like(lse)
    tile = call.tile("queries")
    blocks = call.blocks("q", tile.BM)
    heads = {"out": out, "dout": dout, "dq": dq}
    call.launch(
        adjoint_queries, tile, blocks * call.Hq * call.B, heads, lse=lse, dlse=dlse, delta=delta, blocks=blocks
    )  # fmt: skip
    tile = call.tile("keys")
    blocks = call.blocks("k", tile.BN)
    heads = {"dout": dout, "dk": dk, "dv": dv}
    call.launch(adjoint_keys, tile, blocks * call.Hk * call.B, heads, lse=lse, delta=delta, blocks=blocks)
    return _bias_gradient(call, dout, dlse, lse, delta) if need_bias else None


def _bias_gradient(call, dout, dlse, lse, delta):
    bias = call.bias
    if bias.shape[3] == 1:
        # One number for all keys of a query moves lse by as much, and no weight; where nothing is to be seen it moves nothing.
        moved = torch.zeros_like(lse) if dlse is None else dlse.masked_fill(lse == -torch.inf, 0)
        return moved.unsqueeze(3).sum_to_size(bias.shape).to(bias.dtype)
    from gradkernels.backends.triton.attention_bias import adjoint_bias

    made = torch.empty_like(bias, memory_format=torch.contiguous_format)
    tile, (sequences, heads, own, _) = call.tile("bias"), bias.shape
    blocks, bias_blocks = -(-call.Tk // tile.BN), 1 if own == 1 else -(-call.Tq // tile.BM)
    call.launch(
        adjoint_bias, tile, blocks * bias_blocks * heads * sequences, {"dout": dout}, lse=lse, delta=delta, dbias=made,
        blocks=blocks, bias_blocks=bias_blocks, bias_heads=heads, shared_b=call.B // sequences, shared_h=call.Hq // heads,
        ROWS=own > 1,
    )  # fmt: skip
    return made
