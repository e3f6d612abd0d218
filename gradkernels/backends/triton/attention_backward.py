"""Attention backward: one kernel sums the gradients of queries over keys, another those of keys and values over queries.

Both make the weights anew from lse. What a weight is pulled by is sum_e dout_ie v_je; its mean over a row's weights,
sum_e dout_ie out_ie, is made by the first kernel, less dlse, as `delta`, and read by the second. No sum is shared by two programs, so
all have one order.

Dims: B sequences, Hq heads of queries, Hk of keys and values, Tq queries, Tk keys, D width of queries and keys, E of values;
BM queries and BN keys of a tile.
"""

# The bodies of kernels are in the language of Triton.
# mypy: ignore-errors
from __future__ import annotations

import triton
import triton.language as tl

from gradkernels.backends.triton.attention_blocks import (
    LOG2E,
    SIZES,
    beyond,
    dropout,
    extent,
    facts,
    head,
    place,
    rows,
    scores,
    store_rows,
    visible,
    word_rows,
)

# ---------------------------------------------------------------- mathematics


@triton.jit
def gradients(
    products,  # queries and keys across each other: [BM, BN], or ACROSS [BN, BM]
    pulls,  # gradients of out and values, likewise
    i,  # [BM, 1], or ACROSS [1, BM]
    j,  # [1, BN], or ACROSS [BN, 1]
    first,  # key
    most,  # like i: lse in units of log 2, inf where a query sees nothing
    delta,  # like i
    words,  # like i
    bias,
    slopes,
    key_mask,
    seed,
    known,  # `facts`
    S: tl.constexpr,
    MASKED: tl.constexpr,
    ACROSS: tl.constexpr,
):
    """The weights after dropout, and the gradient of the scores."""
    weight = tl.exp2(scores(products, i, j, bias, slopes, key_mask, known, S.BIAS_STEP, MASKED) - most)
    dropped = weight
    if seed is not None:
        factors = dropout(words, first, known, S.BN, S.ACC, ACROSS)
        dropped = weight * factors
        pulls *= factors
    return dropped, weight * (pulls - delta)


@triton.jit
def largest(lse, ACC: tl.constexpr):
    """lse in units of log 2; inf where a query sees nothing, so that its weights are zero."""
    return tl.where(lse == -float("inf"), float("inf"), lse.to(ACC) * LOG2E)


# ---------------------------------------------------------------- queries


@triton.jit
def take_keys(
    acc, query, pull, k, v, strides, first, i, most, delta, words, bias, slopes, key_mask, seed, known,
    S: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """acc [BM, DP], the gradient of the queries, after BN keys more."""
    key = rows(k, strides[0], first, known[1], S.BN, S.D, S.DP, S.UNIT, MASKED)
    value = rows(v, strides[1], first, known[1], S.BN, S.E, S.EP, S.UNIT, MASKED)
    products = tl.dot(query, tl.trans(key), input_precision=S.PRECISION, out_dtype=S.ACC)
    pulls = tl.dot(pull, tl.trans(value), input_precision=S.PRECISION, out_dtype=S.ACC)
    j = first + tl.arange(0, S.BN)
    _dropped, ds = gradients(
        products, pulls, i[:, None], j[None, :], first, most[:, None], delta[:, None], words[:, None],
        bias, slopes, key_mask, seed, known, S, MASKED, False,
    )  # fmt: skip
    return tl.dot(ds.to(key.dtype), key, acc, input_precision=S.PRECISION, out_dtype=S.ACC)


@triton.jit(do_not_specialize=SIZES)
def adjoint_queries(
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
    dout,
    dlse,  # [B, Hq, Tq] or None
    dq,
    delta,  # [B, Hq, Tq] to fill
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
    dout_sb,
    dout_sh,
    dout_st,
    dq_sb,
    dq_sh,
    dq_st,
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
    DP: tl.constexpr = S.DP
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
    row = (b * Hq + h) * Tq + q_start + i

    query = rows(
        head(q, (q_sb, q_sh, q_st), b, h, q_start, S.UNIT), q_st, first, Lq, BM, S.D, DP, S.UNIT, True
    )  # fmt: skip
    pull = rows(
        head(dout, (dout_sb, dout_sh, dout_st), b, h, q_start, S.UNIT), dout_st, first, Lq, BM, S.E, S.EP, S.UNIT, True
    )  # fmt: skip
    made = rows(
        head(out, (out_sb, out_sh, out_st), b, h, q_start, S.UNIT), out_st, first, Lq, BM, S.E, S.EP, S.UNIT, True
    )  # fmt: skip
    most = largest(tl.load(lse + row, mask=i < Lq, other=-float("inf")), S.ACC)
    mean = tl.sum(pull.to(S.ACC) * made.to(S.ACC), 1)
    if dlse is not None:
        mean -= tl.load(dlse + row, mask=i < Lq, other=0.0).to(S.ACC)
    mean = tl.where(most == float("inf"), 0.0, mean)
    tl.store(delta + row, mean, mask=i < Lq)

    k_head = head(k, (k_sb, k_sh, k_st), b, h // group, k_start, S.UNIT)
    v_head = head(v, (v_sb, v_sh, v_st), b, h // group, k_start, S.UNIT)
    strides = k_st, v_st
    here = first + Lk - Lq
    low, begin, end, high = visible(here, tl.minimum(here + BM, Lk) - 1, left, right, Lk, S.BN)
    acc = tl.zeros([BM, DP], S.ACC)
    for at in range(begin, end, S.BN):
        acc = take_keys(
            acc, query, pull, k_head, v_head, strides, at, i, most, mean, words,
            bias, slopes, key_mask, seed, known, S, False,
        )  # fmt: skip
    for at in range(low, high - (end - begin), S.BN):
        acc = take_keys(
            acc, query, pull, k_head, v_head, strides, beyond(at, begin, end), i, most, mean, words,
            bias, slopes, key_mask, seed, known, S, True,
        )  # fmt: skip
    to = head(dq, (dq_sb, dq_sh, dq_st), b, h, q_start, S.UNIT)
    store_rows(to, dq_st, first, Lq, acc * tl.full([], scale, S.ACC), S.D, S.UNIT)


# ---------------------------------------------------------------- keys and values


@triton.jit
def take_queries(
    state, key, value, q, dout, lse, delta, q_strides, dout_strides, b, h, first, key_first, bias, slopes, key_mask, seed,
    cu_q, q_start, Hq, Tq, known, S: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """The gradients of keys [BN, DP] and of values [BN, EP] after BM queries of a head more."""
    dk, dv = state
    query = rows(
        head(q, q_strides, b, h, q_start, S.UNIT), q_strides[2], first, known[0], S.BM, S.D, S.DP, S.UNIT, MASKED
    )  # fmt: skip
    pull = rows(
        head(dout, dout_strides, b, h, q_start, S.UNIT), dout_strides[2], first, known[0], S.BM, S.E, S.EP, S.UNIT, MASKED
    )  # fmt: skip
    i = first + tl.arange(0, S.BM)
    j = key_first + tl.arange(0, S.BN)
    row, there = (b * Hq + h) * Tq + q_start + i, i < known[0]
    most = largest(tl.load(lse + row, mask=there, other=-float("inf")), S.ACC)
    mean = tl.load(delta + row, mask=there, other=0.0)
    products = tl.dot(key, tl.trans(query), input_precision=S.PRECISION, out_dtype=S.ACC)
    pulls = tl.dot(value, tl.trans(pull), input_precision=S.PRECISION, out_dtype=S.ACC)
    words = word_rows(cu_q, b, h, q_start, i, Hq, Tq)
    dropped, ds = gradients(
        products, pulls, i[None, :], j[:, None], key_first, most[None, :], mean[None, :], words[None, :],
        bias, slopes, key_mask, seed, known, S, MASKED, True,
    )  # fmt: skip
    dv = tl.dot(dropped.to(pull.dtype), pull, dv, input_precision=S.PRECISION, out_dtype=S.ACC)
    dk = tl.dot(ds.to(query.dtype), query, dk, input_precision=S.PRECISION, out_dtype=S.ACC)
    return dk, dv


@triton.jit(do_not_specialize=SIZES)
def adjoint_keys(
    q,
    k,
    v,
    bias,  # or None
    slopes,  # [B or 1, Hq] or None
    cu_q,  # int32 [n + 1] or None
    cu_k,
    key_mask,  # bool [B, Tk] or None
    seed,  # int64 [1] or None
    lse,  # [B, Hq, Tq]
    dout,
    delta,  # [B, Hq, Tq]
    dk,
    dv,
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
    dk_sb,
    dk_sh,
    dk_st,
    dv_sb,
    dv_sh,
    dv_st,
    bias_sb,
    bias_sh,
    bias_st,
    slopes_stride,  # of a sequence
    n,  # sequences
    depth,  # binary digits of n
    blocks,  # of keys of a head
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
    BN: tl.constexpr = S.BN
    DP: tl.constexpr = S.DP
    EP: tl.constexpr = S.EP
    s, b, shared, first = place(tl.program_id(0), cu_k, n, depth, blocks, Hq // group, BN)
    q_start, Lq = extent(cu_q, s, Tq)
    k_start, Lk = extent(cu_k, s, Tk)
    key = rows(
        head(k, (k_sb, k_sh, k_st), b, shared, k_start, S.UNIT), k_st, first, Lk, BN, S.D, DP, S.UNIT, True
    )  # fmt: skip
    value = rows(
        head(v, (v_sb, v_sh, v_st), b, shared, k_start, S.UNIT), v_st, first, Lk, BN, S.E, EP, S.UNIT, True
    )  # fmt: skip
    # queries, seen from the keys: left and right change sides
    here = first + Lq - Lk
    low, begin, end, high = visible(here, tl.minimum(here + BN, Lq) - 1, right, left, Lq, S.BM)
    state = tl.zeros([BN, DP], S.ACC), tl.zeros([BN, EP], S.ACC)
    # One loop over blocks of all heads of the group: two of them, one within the other, take registers for both.
    inner = (end - begin) // S.BM
    for step in range(group * inner):
        h = shared * group + step // inner
        known = facts(
            slopes, seed, s, b, h, Lq, Lk, Tk, (bias_sb, bias_sh, bias_st), slopes_stride, left, right,
            scale, below, kept, S.ACC,
        )  # fmt: skip
        state = take_queries(
            state, key, value, q, dout, lse, delta, (q_sb, q_sh, q_st), (dout_sb, dout_sh, dout_st), b, h,
            begin + step % inner * S.BM, first,
            bias, slopes, key_mask, seed, cu_q, q_start, Hq, Tq, known, S, False,
        )  # fmt: skip
    outer = (high - low) // S.BM - inner
    for step in range(group * outer):
        h = shared * group + step // outer
        known = facts(
            slopes, seed, s, b, h, Lq, Lk, Tk, (bias_sb, bias_sh, bias_st), slopes_stride, left, right,
            scale, below, kept, S.ACC,
        )  # fmt: skip
        state = take_queries(
            state, key, value, q, dout, lse, delta, (q_sb, q_sh, q_st), (dout_sb, dout_sh, dout_st), b, h,
            beyond(low + step % outer * S.BM, begin, end), first,
            bias, slopes, key_mask, seed, cu_q, q_start, Hq, Tq, known, S, True,
        )  # fmt: skip
    total_k, total_v = state
    to = head(dk, (dk_sb, dk_sh, dk_st), b, shared, k_start, S.UNIT)
    store_rows(to, dk_st, first, Lk, total_k * tl.full([], scale, S.ACC), S.D, S.UNIT)
    to = head(dv, (dv_sb, dv_sh, dv_st), b, shared, k_start, S.UNIT)
    store_rows(to, dv_st, first, Lk, total_v, S.E, S.UNIT)
