"""What the kernels of attention share: whose block a program has, what it sees, tiles of heads, scores, dropout.

Scores are in units of log 2, so that exp2 is all that has to be taken of them. Query i of Tq stands beside key i + Tk - Tq,
and sees the keys from `left` places before that to `right` places behind it; causal is `right = 0`.

Dims: B sequences, Hq heads of queries, Hk of keys and values, Tq queries, Tk keys, D width of queries and keys, E of values;
BM queries and BN keys of a tile. Strides of heads are (sequence, head, token), in units of UNIT values.
"""

# The bodies of kernels are in the language of Triton.
# mypy: ignore-errors
from __future__ import annotations

import triton
import triton.language as tl

from gradkernels.backends.triton import philox

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
# Numbers of which no kernel is a special case: what divides strides is said by UNIT. Those of q are q_sb, q_sh, q_st.
SIZES = [
    *(f"{name}_s{of}" for name in ("q", "k", "v", "out", "dout", "dq", "dk", "dv", "bias") for of in "bht"),
    "slopes_stride", "n", "depth", "blocks", "Hq", "group", "Tq", "Tk", "left", "right", "below",
]  # fmt: skip

# ---------------------------------------------------------------- places


@triton.jit
def extent(
    cu,  # int32 [n + 1] or None
    s,
    T,
):
    """Where sequence s begins among all T tokens of a head, and how many it has; within them, whatever is in cu."""
    if cu is None:
        start, length = 0, T
    else:
        start = tl.minimum(tl.maximum(tl.load(cu + s), 0), T)
        length = tl.minimum(tl.maximum(tl.load(cu + s + 1), start), T) - start
        start = tl.minimum(start, T - 1)  # also where one is empty, an address is that of a token
    return start, length


@triton.jit
def place(
    program,
    cu,  # int32 [n + 1] or None
    n,  # sequences
    depth,  # binary digits of n
    blocks,  # of a head: of a sequence, or with cu of all of them
    H,
    BLOCK: tl.constexpr,
):
    """(sequence, its number in the batch, head, first token in the sequence) of the block of a program.

    Sequences that lie one after the other have blocks of their own, and sequence s begins with block cu[s] // BLOCK + s:
    as none needs more than its length // BLOCK + 1, the next one begins behind it, and a search in cu finds it. A block that is
    left over begins behind the end of its sequence."""
    block, h = program % blocks, program // blocks
    if cu is None:
        s = h // H
        h = h % H
        b = s.to(tl.int64)
    else:
        s, last = tl.zeros([], tl.int32), n - 1
        for _ in range(depth):
            middle = (s + last + 1) // 2
            reached = tl.load(cu + middle) // BLOCK + middle <= block
            s = tl.where(reached, middle, s)
            last = tl.where(reached, last, tl.maximum(middle - 1, s))
        block -= tl.load(cu + s) // BLOCK + s
        b = tl.zeros([], tl.int64)
    return s, b, h, block * BLOCK


@triton.jit
def visible(first, last, left, right, T, BLOCK: tl.constexpr):
    """(low, begin, end, high): blocks of [low, high) hold all of [0, T) that somebody from first to last sees, `left` places to
    the left of himself and `right` to the right; what is in blocks of [begin, end) is seen by all of them."""
    low = tl.maximum(first - left, 0) // BLOCK * BLOCK
    high = tl.maximum(tl.cdiv(tl.maximum(tl.minimum(last + right + 1, T), 0), BLOCK) * BLOCK, low)
    high = tl.where(first <= last, high, low)
    begin = tl.minimum(tl.maximum(tl.cdiv(tl.maximum(last - left, 0), BLOCK) * BLOCK, low), high)
    end = tl.minimum(tl.maximum(tl.maximum(tl.minimum(first + right + 1, T), 0) // BLOCK * BLOCK, begin), high)
    return low, begin, end, high


@triton.jit
def beyond(at, begin, end):
    """The loop over what is visible but not to all of them runs from low to high - (end - begin): the block that is meant."""
    return tl.where(at < begin, at, at + (end - begin))


@triton.jit
def word_rows(cu, b, h, start, i, H, T):
    """The rows of dropout's words that belong to queries i."""
    if cu is None:
        return (b * H + h) * T + i
    else:
        return (start + i).to(tl.int64) * H + h


# ---------------------------------------------------------------- tiles


@triton.jit
def head(p, strides, b, h, start, UNIT: tl.constexpr):
    """Where the tokens of a head begin."""
    return p + (b * strides[0] + h.to(tl.int64) * strides[1] + start * strides[2].to(tl.int64)) * UNIT


@triton.jit
def source(p, stride, T, BLOCK: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, UNIT: tl.constexpr, TMA: tl.constexpr):
    """What `rows` loads from: with TMA a descriptor."""
    if TMA:
        return tl.make_tensor_descriptor(p, [tl.maximum(T, 1), D], [stride.to(tl.int64) * UNIT, 1], [BLOCK, DP])
    else:
        return p


@triton.jit
def rows(
    p,
    stride,
    first,
    T,
    BLOCK: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,  # D or more, a power of two
    UNIT: tl.constexpr,
    MASKED: tl.constexpr,  # whether there may be less than BLOCK of them
    TMA: tl.constexpr = False,
):
    """[BLOCK, DP]: rows from `first` on, zero beyond T and beyond D."""
    if TMA:
        return p.load([first, 0])
    else:
        r = tl.arange(0, BLOCK)
        d = tl.arange(0, DP)
        at = p + first * stride.to(tl.int64) * UNIT + (r.to(tl.int64) * stride * UNIT)[:, None] + d[None, :]
        if MASKED:
            return tl.load(at, mask=(first + r < T)[:, None] & (d < D)[None, :], other=0.0)
        elif D != DP:
            return tl.load(at, mask=(d < D)[None, :], other=0.0)
        else:
            return tl.load(at)


@triton.jit
def store_rows(p, stride, first, T, values, D: tl.constexpr, UNIT: tl.constexpr):
    r = tl.arange(0, values.shape[0])
    d = tl.arange(0, values.shape[1])
    at = p + first * stride.to(tl.int64) * UNIT + (r.to(tl.int64) * stride * UNIT)[:, None] + d[None, :]
    tl.store(at, values.to(p.dtype.element_ty), mask=(first + r < T)[:, None] & (d < D)[None, :])


# ---------------------------------------------------------------- scores


@triton.jit
def facts(
    slopes,  # [B or 1, Hq] or None
    seed,  # int64 [1] or None
    s,
    b,
    h,
    Lq,  # queries of the sequence
    Lk,
    Tk,
    bias_strides,
    slopes_stride,
    left,
    right,
    scale,
    below,
    kept,
    ACC: tl.constexpr,
):
    """What scores and dropout of a head are told."""
    slope, drawn = tl.zeros([], ACC), tl.zeros([], tl.int64)
    if slopes is not None:
        slope = tl.load(slopes + s * slopes_stride + h).to(ACC) * LOG2E
    if seed is not None:
        drawn = tl.load(seed)
    bias_at = b * bias_strides[0] + h.to(tl.int64) * bias_strides[1]
    scale = tl.full([], scale, ACC) * LOG2E
    return Lq, Lk, left, right, scale, slope, bias_at, bias_strides[2], b * Tk, drawn, below, kept


@triton.jit
def scores(
    products,  # queries and keys across each other, either way round
    i,  # queries, [BM, 1] or [1, BM]
    j,  # keys, [1, BN] or [BN, 1]
    bias,
    slopes,
    key_mask,
    known,  # `facts`
    BIAS_STEP: tl.constexpr,
    MASKED: tl.constexpr,  # whether bounds may lie within the tile
):
    """What exp2 is taken of; -inf where a query does not see a key."""
    Lq, Lk, left, right, scale, slope, bias_at, bias_stride, mask_at, _seed, _below, _kept = known
    s = products * scale
    here = i + (Lk - Lq)
    if bias is not None:
        # a tile within the bounds may still have queries or keys of its own beyond the last
        at = bias + bias_at + i.to(tl.int64) * bias_stride + j * BIAS_STEP
        s += tl.load(at, mask=(i < Lq) & (j < Lk), other=0.0).to(s.dtype) * LOG2E
    if slopes is not None:
        s -= slope * tl.abs(here - j).to(s.dtype)
    if MASKED:
        s = tl.where((j >= here - left) & (j <= here + right) & (i < Lq) & (j < Lk), s, -float("inf"))
    if key_mask is not None:
        s = tl.where(tl.load(key_mask + mask_at + j, mask=j < Lk, other=0) != 0, s, -float("inf"))
    return s


@triton.jit
def dropout(
    row,  # of words: [BM, 1], or ACROSS [1, BM]
    first,  # key
    known,  # `facts`
    BN: tl.constexpr,
    ACC: tl.constexpr,
    ACROSS: tl.constexpr,
):
    """What the weights of keys from `first` on are multiplied with: [BM, BN], ACROSS [BN, BM]."""
    seed, below, kept = known[9], known[10], known[11]
    if ACROSS:
        w0, w1, w2, w3 = philox.words(seed, row, (first // 4 + tl.arange(0, BN // 4))[:, None])
        words = tl.join(tl.join(w0, w2), tl.join(w1, w3)).permute(0, 2, 3, 1).reshape(BN, row.shape[1])
        return tl.where(words < below.to(tl.uint32), 0.0, tl.full([], kept, ACC))
    else:
        return philox.factors(seed, row, first, below, kept, BN, ACC)
