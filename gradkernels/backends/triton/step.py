"""The walk for any number of units: one launch per step, the recurrent matrix from L2, the cell on the accumulators.

A program has BM rows of the batch and BU units with all their gates, so that what leaves its products is the whole
pre-activation of its units and the cell runs on the spot; gates never travel through memory. Where a cell has a second
product or a projection, which need all units of the first, a step is two launches. So it is where a cell takes means over the
units of a row: the products of all gates go to memory, and a program of the second launch has whole rows.

Counted per step, e bytes a value:
    forward   2 B G H R operations; from L2: B/BM times the matrix (G H R e) and H/BU times the state (B R e);
              from memory: gates B G H e in, y and what is kept out (B (1 + A) H e), fp32 states of a program's own tile
    backward  as many operations; from L2: R/BU times the gate gradients (B G H e) and B/BM times the matrix
With B = 64, H = R = 1024, an LSTM in 16 bits, forward, tiles of 64 x 16: 0.54 GFLOP and 16 MB from L2, which bounds it: some 3
microseconds at 5 TB/s, where tiles of 32 x 16 would take 24 MB, and 64 x 32 leave three quarters of the GPU idle.
`launch.tile` weighs this. All that a step needs besides its number is the same in every launch: a graph can hold it, nothing
is compiled again for another batch or length, and where the GPU can, a launch is set up while the one before ends.

BPTT has the product first: program (rows, units) of step i multiplies the gate gradients of step i + 1, which earlier
launches have written, adds what reaches these states besides, and runs the cell's backward. After the last step one more
launch leaves the gradient of the initial state.

Dims: T steps, B batch, N tokens, H units, R width of the first state, G gates, S states, A kept values, Q gates with a second
product; K length of a contraction, KH, KV, KW lengths of padded rows; BM, BU, BK tile of rows, units, contraction.
"""

# The bodies of kernels are in the language of Triton.
# mypy: ignore-errors
from __future__ import annotations

import triton
import triton.language as tl

from gradkernels.backends.triton.blocks import (
    cast,
    clamp,
    columns,
    delayed,
    follow,
    load_parameters,
    load_planes,
    squares,
    step_rows,
    store_planes,
)
from gradkernels.backends.triton.products import add_bias, adjoint_product, gate_products

VARYING = ["i", "T", "B", "origin"]  # integers that must not be compiled in

# ---------------------------------------------------------------- forward


@triton.jit(do_not_specialize=VARYING)
def forward_step(
    i,  # step of the walk
    T,
    B,
    rows,  # [T] or None
    first,  # [T] or None
    order,  # [B] or None
    gates,  # [N, G * H]
    w,  # [G * H, KH]
    bias,  # [G * H] or None
    h,  # [2, B, KH] the state to multiply, read from one half and written to the other
    v,  # [B, KV] what the second launch multiplies; None where there is none
    early,  # [B, G - Q, H] recurrent pre-activations from the first launch to the second, in ACC, or None
    state,  # S of [B, H] in ACC; the first is None where it is projected
    seq,  # S of [N, H] or None
    raw,  # [N, H] or None
    acts,  # [N, A, H] or None
    parameters,  # [P, H] or None
    seed,  # [1] or None
    flags,  # [N] or None
    origin,  # number of the first token
    PART: tl.constexpr,  # whole; or operand, then rest; of a cell with means product, then cell
    FORWARD: tl.constexpr,
    OPERAND: tl.constexpr,
    MASKS: tl.constexpr,
    G: tl.constexpr,
    S: tl.constexpr,
    A: tl.constexpr,
    Q: tl.constexpr,
    P: tl.constexpr,
    M: tl.constexpr,
    D: tl.constexpr,
    SKIP: tl.constexpr,
    H: tl.constexpr,
    KH: tl.constexpr,
    KV: tl.constexpr,
    REVERSE: tl.constexpr,
    PROJECTED: tl.constexpr,
    BM: tl.constexpr,
    BU: tl.constexpr,
    BK: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    EARLY: tl.constexpr,
):
    follow(EARLY)
    t = T - 1 - i if REVERSE else i
    n, start = step_rows(t, T, B, rows, first)
    if tl.program_id(1) * BM >= n:
        return
    b = tl.program_id(1) * BM + tl.arange(0, BM)
    u = tl.program_id(0) * BU + tl.arange(0, BU)
    col = columns(b, B, order)
    mask = (b < n)[:, None] & (u < H)[None, :]
    token = start + col
    own = col[:, None] * H + u[None, :]
    x = load_planes(gates, token[:, None] * (G * H) + u[None, :], H, mask, G)
    s = ()
    for k in tl.static_range(S):
        if state[k] is None:
            s = s + (tl.zeros([BM, BU], ACC),)
        else:
            s = s + (tl.load(state[k] + own, mask=mask, other=0.0),)
    p = load_parameters(parameters, u, H, P, ACC)
    m = ()
    if M > 0:
        m = MASKS(seed, flags, origin, token, col, b < n, tl.program_id(0) * BU, tl.zeros([BM, BU], ACC))
    d = ()
    if D > 0:
        back, begun = step_rows(t + SKIP if REVERSE else t - SKIP, T, B, rows, first)
        d = (delayed(seq[0], b, col, u, tl.minimum(back, n), begun, H, ACC),)
    half = B.to(tl.int64) * KH
    source = h + (i % 2) * half
    if PART == "whole":
        r = gate_products(source, col * KH, w, u, G, H, KH, BM, BU, BK, ACC, PRECISION)
        r = add_bias(r, bias, u, 0, G, H, ACC)
    elif PART == "operand" or PART == "product":
        r = gate_products(source, col * KH, w, u, G - Q, H, KH, BM, BU, BK, ACC, PRECISION)
        r = add_bias(r, bias, u, 0, G - Q, H, ACC)
        store_planes(early, col[:, None] * ((G - Q) * H) + u[None, :], H, mask, r, G - Q)
        if PART == "operand":
            value = OPERAND(cast(x, G, ACC), r, s, p, m, d)
            tl.store(v + col[:, None] * KV + u[None, :], value.to(v.dtype.element_ty), mask=mask)
    elif PART == "cell":
        r = load_planes(early, col[:, None] * (G * H) + u[None, :], H, mask, G)
    else:
        late = gate_products(v, col * KV, w + (G - Q) * H * KV, u, Q, H, KV, BM, BU, BK, ACC, PRECISION)
        r = load_planes(early, col[:, None] * ((G - Q) * H) + u[None, :], H, mask, G - Q)
        r = r + add_bias(late, bias, u, G - Q, Q, H, ACC)
    if PART != "operand" and PART != "product":
        x = cast(x, G, ACC)
        new, kept = FORWARD(x, r, s, p, m, d)
        if PROJECTED:
            tl.store(v + col[:, None] * KV + u[None, :], new[0].to(v.dtype.element_ty), mask=mask)
            if raw is not None:
                tl.store(raw + token[:, None] * H + u[None, :], new[0].to(raw.dtype.element_ty), mask=mask)
        else:
            out = h + ((i + 1) % 2) * half + col[:, None] * KH + u[None, :]
            tl.store(out, new[0].to(h.dtype.element_ty), mask=mask)
        for k in tl.static_range(S):
            if state[k] is not None:
                tl.store(state[k] + own, new[k], mask=mask)
                if seq[k] is not None:
                    tl.store(seq[k] + token[:, None] * H + u[None, :], new[k].to(seq[k].dtype.element_ty), mask=mask)
        if acts is not None:
            store_planes(acts, token[:, None] * (A * H) + u[None, :], H, mask, kept, A)


@triton.jit(do_not_specialize=VARYING)
def project_step(
    i,
    T,
    B,
    rows,
    first,
    order,
    v,  # [B, KV] output of the cell
    w,  # [R, KV]
    h,  # [2, B, KH]
    seq,  # [N, R]
    final,  # [B, R]
    R: tl.constexpr,
    KH: tl.constexpr,
    KV: tl.constexpr,
    REVERSE: tl.constexpr,
    BM: tl.constexpr,
    BU: tl.constexpr,
    BK: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    EARLY: tl.constexpr,
):
    follow(EARLY)
    t = T - 1 - i if REVERSE else i
    n, start = step_rows(t, T, B, rows, first)
    if tl.program_id(1) * BM >= n:
        return
    b = tl.program_id(1) * BM + tl.arange(0, BM)
    u = tl.program_id(0) * BU + tl.arange(0, BU)
    col = columns(b, B, order)
    mask = (b < n)[:, None] & (u < R)[None, :]
    out = gate_products(v, col * KV, w, u, 1, R, KV, BM, BU, BK, ACC, PRECISION)[0].to(h.dtype.element_ty)
    tl.store(h + ((i + 1) % 2) * (B.to(tl.int64) * KH) + col[:, None] * KH + u[None, :], out, mask=mask)
    tl.store(seq + (start + col)[:, None] * R + u[None, :], out, mask=mask)
    tl.store(final + col[:, None] * R + u[None, :], out, mask=mask)


# ---------------------------------------------------------------- backward


@triton.jit
def entering(seq, state, offset, own, mask, begun, SKIP: tl.constexpr, S: tl.constexpr, ACC: tl.constexpr):
    """States before a step: of the step before where a row has `begun`, else the initial ones; the first not if SKIP."""
    out = ()
    for k in tl.static_range(S):
        if k == 0 and SKIP:
            out = out + (tl.zeros(mask.shape, ACC),)
        else:
            before = tl.load(seq[k] + offset, mask=mask & begun, other=0.0)
            out = out + (tl.where(begun, before, tl.load(state[k] + own, mask=mask & ~begun, other=0.0)).to(ACC),)
    return out


@triton.jit(do_not_specialize=VARYING)
def backward_step(
    i,  # launches before this one; step T - 1 - i of the walk
    T,
    B,
    rows,  # [T] or None
    first,  # [T] or None
    order,  # [B] or None
    w,  # [G * H, KW] of R columns; in the second launch of a projection w_hr [R, H]
    grads,  # S of [N, R], [N, H] .. or None: of the sequences
    seq,  # S of [N, R], [N, H] ..
    raw,  # [N, H] or None
    acts,  # [N, A, H]
    state,  # S of [B, R], [B, H] ..
    dgates,  # [N, G * H]
    dr,  # [N, G * H]
    operand,  # [N, H] or None
    dproj,  # [N, R] or None
    dstate,  # S of [B, R], [B, H] .. in ACC: adjoints of the states after this step, but for the product
    norms,  # [T, S, programs] float64 or None
    dparams,  # [N, P * H] or None
    owed,  # [N, H] in ACC, zero at first: adjoints of d by the token that d is of; or None
    parameters,  # [P, H] or None
    seed,  # [1] or None
    flags,  # [N] or None
    origin,  # number of the first token
    PART: tl.constexpr,  # whole; or open, then close, of which one makes the product and the other runs the cell
    BACKWARD: tl.constexpr,
    SECOND: tl.constexpr,
    MASKS: tl.constexpr,
    G: tl.constexpr,
    S: tl.constexpr,
    A: tl.constexpr,
    Q: tl.constexpr,
    P: tl.constexpr,
    M: tl.constexpr,
    D: tl.constexpr,
    SKIP: tl.constexpr,
    CLIP: tl.constexpr,
    H: tl.constexpr,
    R: tl.constexpr,
    KW: tl.constexpr,
    SPLIT: tl.constexpr,
    REVERSE: tl.constexpr,
    PROJECTED: tl.constexpr,
    PROGRAMS: tl.constexpr,
    BM: tl.constexpr,
    BU: tl.constexpr,
    BK: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    EARLY: tl.constexpr,
):
    follow(EARLY)
    t = i if REVERSE else T - 1 - i
    n, start = step_rows(t, T, B, rows, first)
    n_before, start_before = step_rows(t + 1 if REVERSE else t - 1, T, B, rows, first)
    n_after, start_after = step_rows(t - 1 if REVERSE else t + 1, T, B, rows, first)
    top = tl.program_id(1) * BM
    if top >= (n if PART == "close" else tl.maximum(n, n_after)):
        return
    b = top + tl.arange(0, BM)
    u = tl.program_id(0) * BU + tl.arange(0, BU)
    col = columns(b, B, order)
    live = (b < n)[:, None]
    token = tl.where(b < n, start + col, 0)
    slot = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)

    if PART != "close":
        inside = (u < R)[None, :]
        follows = b < n_after
        end = tl.where(top < n_after, (G - Q) * H, 0)
        later = tl.where(follows, start_after + col, 0) * (G * H)
        total = tl.load(dstate[0] + col[:, None] * R + u[None, :], mask=(b < B)[:, None] & inside, other=0.0)
        through = adjoint_product(dr, later, w, u, end, (G - Q) * H, R, KW, BM, BU, BK, ACC, PRECISION)
        total = tl.where(follows[:, None], total + through, total)
        dt0 = total
        if grads[0] is not None:
            offset = token[:, None] * R + u[None, :]
            dt0 = total + tl.load(grads[0] + offset, mask=live & inside, other=0.0).to(ACC)
        if D > 0:
            dt0 += tl.load(owed + token[:, None] * H + u[None, :], mask=live & inside, other=0.0)
        dt0 = clamp(dt0, CLIP)
        if norms is not None:
            tl.store(norms + t.to(tl.int64) * S * PROGRAMS + slot, squares(dt0, live & inside), mask=n > 0)
        first_state = dstate[0] + col[:, None] * R + u[None, :]
        kept = (live | follows[:, None]) & inside
        if PROJECTED:
            tl.store(dproj + token[:, None] * R + u[None, :], dt0.to(dproj.dtype.element_ty), mask=live & inside)
            tl.store(first_state, tl.where(live, 0.0, total), mask=kept)
        elif PART == "open" and Q == 0:
            tl.store(first_state, tl.where(live, dt0, total), mask=kept)

    if not (PART == "open" and Q == 0):
        mask = live & (u < H)[None, :]
        plane = token[:, None] * H + u[None, :]
        own = col[:, None] * H + u[None, :]
        a = cast(load_planes(acts, token[:, None] * (A * H) + u[None, :], H, mask, A), A, ACC)
        begun = (b < n_before)[:, None]
        offset = tl.where(b < n_before, start_before + col, 0)[:, None] * H + u[None, :]
        s = entering(seq, state, offset, own, mask, begun, PROJECTED, S, ACC)
        new = ()
        for k in tl.static_range(S):
            source = raw if k == 0 and PROJECTED else seq[k]
            new = new + (tl.load(source + plane, mask=mask, other=0.0).to(ACC),)
        if PART == "close":
            if PROJECTED:
                dt0 = adjoint_product(dproj, token * R, w, u, R, R, H, KW, BM, BU, BK, ACC, PRECISION)
            else:
                dt0 = tl.load(dstate[0] + own, mask=mask, other=0.0)
        dt = (dt0,)
        for k in tl.static_range(1, S):
            d = tl.load(dstate[k] + own, mask=mask, other=0.0)
            if grads[k] is not None:
                d += tl.load(grads[k] + plane, mask=mask, other=0.0).to(ACC)
            dt = dt + (d,)
        gate = token[:, None] * (G * H) + u[None, :]
        p = load_parameters(parameters, u, H, P, ACC)
        m = ()
        if M > 0:
            m = MASKS(seed, flags, origin, token, col, b < n, tl.program_id(0) * BU, dt0)
        d = ()
        if D > 0:
            back, then = step_rows(t + SKIP if REVERSE else t - SKIP, T, B, rows, first)
            d = (delayed(seq[0], b, col, u, tl.minimum(back, n), then, H, ACC),)
        if PART == "open":
            v, late = SECOND(a, s, new, p, m, d, dt)
            tl.store(operand + plane, v.to(operand.dtype.element_ty), mask=mask)
            store_planes(dr + (G - Q) * H, gate, H, mask, late, Q)
            tl.store(first_state, tl.where(live, dt0, total), mask=kept)
        else:
            if Q > 0:
                late = w + (G - Q) * H * KW
                dv = adjoint_product(
                    dr, token * (G * H) + (G - Q) * H, late, u, Q * H, Q * H, H, KW, BM, BU, BK, ACC, PRECISION
                )
                dx, dr_now, ds, dp, dd, full = BACKWARD(a, s, new, p, m, d, dt, dv)
            else:
                dx, dr_now, ds, dp, dd, full = BACKWARD(a, s, new, p, m, d, dt, ())
            if dparams is not None:
                store_planes(dparams, token[:, None] * (P * H) + u[None, :], H, mask, dp, P)
            if D > 0:
                debt = owed + (then + col)[:, None] * H + u[None, :]
                tl.store(debt, dd[0], mask=(b < tl.minimum(back, n))[:, None] & (u < H)[None, :])
            if SPLIT:
                store_planes(dgates, gate, H, mask, dx, G)
            # the gates of the second product are there already, and others read them
            store_planes(dr, gate, H, mask, dr_now, G - Q)
            if PART == "whole":
                tl.store(first_state, tl.where(live, ds[0], total), mask=kept)
            elif not PROJECTED:
                tl.store(dstate[0] + own, ds[0], mask=mask)
            for k in tl.static_range(1, S):
                tl.store(dstate[k] + own, ds[k], mask=mask)
                if norms is not None:
                    tl.store(norms + (t.to(tl.int64) * S + k) * PROGRAMS + slot, squares(full[k], mask), mask=n > 0)
