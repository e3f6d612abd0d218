"""Attention forward: a program takes BM queries of a head past all keys that they see, with a running maximum and sum.

Dao, Fu, Ermon, Rudra and Ré (2022), FlashAttention. Tiles of keys that every query of the block sees come first and
need no mask, those at the bounds follow. With WS there is one loop with a mask over all of them, and tiles are loaded by
descriptors: only so does Triton give the loads to a warp of their own.

Dims: B sequences, Hq heads of queries, Hk of keys and values, Tq queries, Tk keys, D width of queries and keys, E of values;
BM queries and BN keys of a tile.
"""

# The bodies of kernels are in the language of Triton.
# mypy: ignore-errors
from __future__ import annotations

import triton
import triton.language as tl

from gradkernels.backends.triton.attention_blocks import (
    LN2,
    SIZES,
    beyond,
    dropout,
    extent,
    facts,
    head,
    place,
    rows,
    scores,
    source,
    store_rows,
    visible,
    word_rows,
)


@triton.jit
def take(
    state,  # out [BM, EP], not divided yet; the largest score [BM]; the sum of exp2 of scores less that [BM]
    query,  # [BM, DP]
    keys,
    values,
    strides,  # of a key, of a value
    first,  # key
    i,  # queries [BM]
    words,  # rows of dropout's words [BM]
    bias,
    slopes,
    key_mask,
    seed,
    known,  # `facts`
    S: tl.constexpr,
    MASKED: tl.constexpr,
):
    """The state after BN keys more."""
    acc, most, total = state
    key = rows(keys, strides[0], first, known[1], S.BN, S.D, S.DP, S.UNIT, MASKED, S.WS)
    products = tl.dot(query, tl.trans(key), input_precision=S.PRECISION, out_dtype=S.ACC)
    j = first + tl.arange(0, S.BN)
    s = scores(products, i[:, None], j[None, :], bias, slopes, key_mask, known, S.BIAS_STEP, MASKED)
    higher = tl.maximum(most, tl.max(s, 1))
    zero = tl.where(higher == -float("inf"), 0.0, higher)  # as long as nothing was to be seen
    weight = tl.exp2(s - zero[:, None])
    decay = tl.exp2(most - zero)
    total = total * decay + tl.sum(weight, 1)
    if seed is not None:
        weight *= dropout(words[:, None], first, known, S.BN, S.ACC, False)
    value = rows(values, strides[1], first, known[1], S.BN, S.E, S.EP, S.UNIT, MASKED, S.WS)
    acc = tl.dot(weight.to(value.dtype), value, acc * decay[:, None], input_precision=S.PRECISION, out_dtype=S.ACC)
    return acc, higher, total


@triton.jit(do_not_specialize=SIZES)
def attend(
    q,
    k,
    v,
    bias,  # or None
    slopes,  # [B or 1, Hq] or None
    cu_q,  # int32 [n + 1] or None
    cu_k,
    key_mask,  # bool [B, Tk] or None
    seed,  # int64 [1] or None
    out,
    lse,  # [B, Hq, Tq]
    q_sb,
    q_sh,
    q_st,
    k_sb,
    k_sh,
    k_st,
    v_sb,
    v_sh,
    v_st,
    out_sb,
    out_sh,
    out_st,
    bias_sb,
    bias_sh,
    bias_st,
    slopes_stride,  # of a sequence
    n,  # sequences
    depth,  # binary digits of n
    blocks,  # of queries of a head
    Hq,
    group,  # heads of queries that share one of keys
    Tq,
    Tk,
    left,
    right,
    scale: tl.float64,  # of scores
    below: tl.uint32,  # of dropout
    kept: tl.float64,
    S: tl.constexpr,  # attention_tiles.Shape
):
    BM: tl.constexpr = S.BM
    EP: tl.constexpr = S.EP
    # the last queries first: under a causal bound they have the most to do
    program = tl.num_programs(0) - 1 - tl.program_id(0)
    s, b, h, first = place(program, cu_q, n, depth, blocks, Hq, BM)
    q_start, Lq = extent(cu_q, s, Tq)
    k_start, Lk = extent(cu_k, s, Tk)
    known = facts(
        slopes, seed, s, b, h, Lq, Lk, Tk, (bias_sb, bias_sh, bias_st), slopes_stride, left, right,
        scale, below, kept, S.ACC,
    )  # fmt: skip
    i = first + tl.arange(0, BM)
    words = word_rows(cu_q, b, h, q_start, i, Hq, Tq)

    queries = source(head(q, (q_sb, q_sh, q_st), b, h, q_start, S.UNIT), q_st, Lq, BM, S.D, S.DP, S.UNIT, S.WS)
    keys = source(head(k, (k_sb, k_sh, k_st), b, h // group, k_start, S.UNIT), k_st, Lk, S.BN, S.D, S.DP, S.UNIT, S.WS)
    values = source(head(v, (v_sb, v_sh, v_st), b, h // group, k_start, S.UNIT), v_st, Lk, S.BN, S.E, EP, S.UNIT, S.WS)
    query = rows(queries, q_st, first, Lq, BM, S.D, S.DP, S.UNIT, True, S.WS)
    strides = k_st, v_st

    here = first + Lk - Lq
    low, begin, end, high = visible(here, tl.minimum(here + BM, Lk) - 1, left, right, Lk, S.BN)
    state = tl.zeros([BM, EP], S.ACC), tl.full([BM], -float("inf"), S.ACC), tl.zeros([BM], S.ACC)
    if S.WS:
        for at in tl.range(low, high, S.BN, warp_specialize=True):
            state = take(
                state, query, keys, values, strides, at, i, words, bias, slopes, key_mask, seed, known, S, True
            )  # fmt: skip
    else:
        for at in range(begin, end, S.BN):
            state = take(
                state, query, keys, values, strides, at, i, words, bias, slopes, key_mask, seed, known, S, False
            )  # fmt: skip
        for at in range(low, high - (end - begin), S.BN):
            bound = beyond(at, begin, end)
            state = take(
                state, query, keys, values, strides, bound, i, words, bias, slopes, key_mask, seed, known, S, True
            )  # fmt: skip

    acc, most, total = state
    nothing = total == 0
    whole = tl.where(nothing, 1.0, total)
    to = head(out, (out_sb, out_sh, out_st), b, h, q_start, S.UNIT)
    store_rows(to, out_st, first, Lq, acc / whole[:, None], S.E, S.UNIT)
    row = (b * Hq + h) * Tq + q_start + i
    tl.store(lse + row, tl.where(nothing, -float("inf"), (most + tl.log2(whole)) * LN2), mask=i < Lq)
