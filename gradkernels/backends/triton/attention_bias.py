"""The gradient of a bias: a program sums a tile of it over whatever the bias is broadcast over, in one order.

What is kept is as large as the bias and not as the scores, at the price of making the scores once more.

Dims: B sequences, Hq heads of queries, Hk of keys and values, Tq queries, Tk keys, D width of queries and keys, E of values;
BM queries and BN keys of a tile; the bias is [B or 1, Hq or 1, Tq or 1, Tk].
"""

# The bodies of kernels are in the language of Triton.
# mypy: ignore-errors
from __future__ import annotations

import triton
import triton.language as tl

from gradkernels.backends.triton.attention_backward import gradients, largest
from gradkernels.backends.triton.attention_blocks import SIZES, facts, head, rows, visible, word_rows


@triton.jit(do_not_specialize=[*SIZES, "bias_blocks", "bias_heads", "shared_b", "shared_h"])
def adjoint_bias(
    q,
    k,
    v,
    bias,
    slopes,  # [B or 1, Hq] or None
    key_mask,  # bool [B, Tk] or None
    seed,  # int64 [1] or None
    lse,  # [B, Hq, Tq]
    dout,
    delta,  # [B, Hq, Tq]
    dbias,  # contiguous
    q_sb,
    q_sh,
    q_st,
    k_sb,
    k_sh,
    k_st,
    v_sb,
    v_sh,
    v_st,
    dout_sb,
    dout_sh,
    dout_st,
    bias_sb,
    bias_sh,
    bias_st,
    slopes_stride,  # of a sequence
    Hq,
    group,  # heads of queries that share one of keys
    Tq,
    Tk,
    left,
    right,
    scale: tl.float64,  # of scores
    below: tl.uint32,  # of dropout
    kept: tl.float64,
    blocks,  # of keys
    bias_blocks,  # of queries, or 1 where all of them share a row
    bias_heads,  # Hq or 1
    shared_b,  # sequences that share a bias: 1 or B
    shared_h,  # heads that do: 1 or Hq
    ROWS: tl.constexpr,  # whether every query has a row of its own
    S: tl.constexpr,  # attention_tiles.Shape
):
    BM: tl.constexpr = S.BM
    BN: tl.constexpr = S.BN
    first, rest = tl.program_id(0) % blocks * BN, tl.program_id(0) // blocks
    block, rest = rest % bias_blocks, rest // bias_blocks
    bias_h, bias_b = rest % bias_heads, rest // bias_heads
    j = first + tl.arange(0, BN)
    here = first + Tq - Tk
    low, _begin, _end, high = visible(here, tl.minimum(here + BN, Tq) - 1, right, left, Tq, BM)
    if ROWS:
        low = tl.maximum(low, block * BM)
        high = tl.minimum(high, block * BM + BM)
    acc = tl.zeros([BM, BN], S.ACC)
    for member in range(shared_b * shared_h):
        s = bias_b + member // shared_h
        b, h = s.to(tl.int64), bias_h + member % shared_h
        known = facts(
            slopes, seed, s, b, h, Tq, Tk, Tk, (bias_sb, bias_sh, bias_st), slopes_stride, left, right,
            scale, below, kept, S.ACC,
        )  # fmt: skip
        key = rows(
            head(k, (k_sb, k_sh, k_st), b, h // group, 0, S.UNIT), k_st, first, Tk, BN, S.D, S.DP, S.UNIT, True
        )  # fmt: skip
        value = rows(
            head(v, (v_sb, v_sh, v_st), b, h // group, 0, S.UNIT), v_st, first, Tk, BN, S.E, S.EP, S.UNIT, True
        )  # fmt: skip
        q_head = head(q, (q_sb, q_sh, q_st), b, h, 0, S.UNIT)
        dout_head = head(dout, (dout_sb, dout_sh, dout_st), b, h, 0, S.UNIT)
        for at in range(low, high, BM):
            i = at + tl.arange(0, BM)
            row = (b * Hq + h) * Tq + i
            most = largest(tl.load(lse + row, mask=i < Tq, other=-float("inf")), S.ACC)
            mean = tl.load(delta + row, mask=i < Tq, other=0.0)
            query = rows(q_head, q_st, at, Tq, BM, S.D, S.DP, S.UNIT, True)
            pull = rows(dout_head, dout_st, at, Tq, BM, S.E, S.EP, S.UNIT, True)
            products = tl.dot(query, tl.trans(key), input_precision=S.PRECISION, out_dtype=S.ACC)
            pulls = tl.dot(pull, tl.trans(value), input_precision=S.PRECISION, out_dtype=S.ACC)
            words = word_rows(None, b, h, 0, i, Hq, Tq)
            _dropped, ds = gradients(
                products, pulls, i[:, None], j[None, :], first, most[:, None], mean[:, None], words[:, None],
                bias, slopes, key_mask, seed, known, S, True, False,
            )  # fmt: skip
            acc += ds
    to = dbias + (bias_b.to(tl.int64) * bias_heads + bias_h) * tl.where(ROWS, Tq, 1) * Tk
    if ROWS:
        i = block * BM + tl.arange(0, BM)
        at = to + i.to(tl.int64)[:, None] * Tk + j[None, :]
        tl.store(at, acc.to(dbias.dtype.element_ty), mask=(i < Tq)[:, None] & (j < Tk)[None, :])
    else:
        tl.store(to + j, tl.sum(acc, 0).to(dbias.dtype.element_ty), mask=j < Tk)
