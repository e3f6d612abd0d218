"""The walk for few units: one program has BM rows of the batch and all units, and the matrix stays with it for all steps.

The matrix is loaded once, before the loop; the compiler puts it into shared memory. A step is then: one product
[BM, R] x [R, G H], the cell, stores. What the next step reads from memory is loaded before the products of this one, so that
its latency hides behind them. Programs never meet, rows of the batch being independent, and one launch does the sequence.

Counted per step and program, e bytes a value: 2 BM G H R operations on tensor cores; G H R e from shared memory, at 128 a clock;
two special functions, of 16 a clock, for every sigmoid and tanh; forward reads BM G H e from memory and writes BM (1 + A) H e;
backward reads BM (A + 2 S + 1) H e and writes BM G H e (twice where a gate is split). An LSTM in 16 bits, forward, BM = 16:

    H = 64    256 clocks of shared memory, 640 of special functions, 8 KB in and 10 KB out
    H = 128  1024                         1280                      16 KB        20 KB

A step is latency, then: of one product, the exchanges between warps around it, one cell. So BM is the least that a tensor
core takes, 16, for the most programs.

Units are padded to a power of two: with zeros in the matrix, so that no product sees what padded units hold. Of a cell without
a recurrent product units do not meet, and a program has HP of them.

What a cell reads of some steps ago (d) its own program has stored; what it owes to that step (dd) waits in memory, `owed`, too. Both
are written by one thread and read by another, hence a barrier a step.

Dims: T steps, B batch, N tokens, H units, R width of the first state, G gates, S states, A kept values, Q gates with a second
product, P parameters, M masks, D delayed values; HP, RP: H and R padded.
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
    load_parameters,
    load_planes,
    squares,
    step_rows,
    store_planes,
)

VARYING = ["T", "B", "origin"]  # integers that must not be compiled in


@triton.jit
def steps_of(top, T, rows):
    """How many steps have a row `top`: rows [T] never grow."""
    count = T
    if rows is not None:
        low = 0 * T
        while low < count:
            middle = (low + count) // 2
            taken = tl.load(rows + middle) > top
            low = tl.where(taken, middle + 1, low)
            count = tl.where(taken, count, middle)
    return count


@triton.jit
def load_matrix(w, row, column, H: tl.constexpr, WIDTH: tl.constexpr, HEIGHT: tl.constexpr, COUNT: tl.constexpr):
    """COUNT blocks of [COUNT * H, WIDTH], rows and columns in any orientation, zero beyond HEIGHT and WIDTH."""
    out = ()
    for g in tl.static_range(COUNT):
        mask = (row < HEIGHT) & (column < WIDTH)
        out = out + (tl.load(w + g * H * WIDTH + row * WIDTH + column, mask=mask, other=0.0),)
    return out


@triton.jit
def load_rows(p, b, col, u, B, WIDTH: tl.constexpr):
    return tl.load(p + col[:, None] * WIDTH + u[None, :], mask=(b < B)[:, None] & (u < WIDTH)[None, :], other=0.0)


@triton.jit
def store_rows(p, b, col, u, B, WIDTH: tl.constexpr, value):
    mask = (b < B)[:, None] & (u < WIDTH)[None, :]
    tl.store(p + col[:, None] * WIDTH + u[None, :], value.to(p.dtype.element_ty), mask=mask)


@triton.jit
def without_padding(v, u, WIDTH: tl.constexpr, PADDED: tl.constexpr):
    """Zero in units that there are none of: zero times what a cell makes of zeros may be NaN."""
    return v if WIDTH % PADDED == 0 else tl.where((u < WIDTH)[None, :], v, 0.0)


# ---------------------------------------------------------------- forward


@triton.jit
def products(a, w, bias, FIRST: tl.constexpr, COUNT: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr):
    """Planes [BM, HP] of gates FIRST .. FIRST + COUNT: a w_g + bias_g."""
    out = ()
    for g in tl.static_range(FIRST, FIRST + COUNT):
        r = tl.dot(a.to(w[g].dtype), w[g], input_precision=PRECISION, out_dtype=ACC)
        out = out + (r + bias[g],)
    return out


@triton.jit(do_not_specialize=VARYING)
def forward_walk(
    T,
    B,
    rows,  # [T] or None
    first,  # [T] or None
    order,  # [B] or None
    gates,  # [N, G * H]
    w_hh,  # [G * H, R]
    bias,  # [G * H] or None
    w_hr,  # [R, H] or None
    state,  # S of [B, R], [B, H] ..
    seq,  # S of [N, R], [N, H] .. or None
    final,  # S of [B, R], [B, H] ..
    raw,  # [N, H] or None
    acts,  # [N, A, H] or None
    parameters,  # [P, H] or None
    seed,  # [1] or None
    flags,  # [N] or None
    origin,  # number of the first token
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
    RECURRENT: tl.constexpr,
    SKIP: tl.constexpr,
    H: tl.constexpr,
    R: tl.constexpr,
    HP: tl.constexpr,
    RP: tl.constexpr,
    REVERSE: tl.constexpr,
    BM: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
):
    b = tl.program_id(0) * BM + tl.arange(0, BM)
    col = columns(b, B, order)
    u = tl.program_id(1) * HP + tl.arange(0, HP)
    v = tl.program_id(1) * RP + tl.arange(0, RP)
    w = ()
    if RECURRENT:
        w = load_matrix(w_hh, u[None, :], v[:, None], H, R, H, G)
    p = load_parameters(parameters, u, H, P, ACC)
    if w_hr is not None:
        projection = load_matrix(w_hr, v[None, :], u[:, None], R, H, R, 1)[0]
    added = ()
    for g in tl.static_range(G):
        if bias is None:
            added = added + (tl.zeros([1, HP], ACC),)
        else:
            added = added + (tl.load(bias + g * H + u, mask=u < H, other=0.0).to(ACC)[None, :],)
    h = load_rows(state[0], b, col, v, B, R).to(ACC)
    others = ()
    for k in tl.static_range(1, S):
        others = others + (load_rows(state[k], b, col, u, B, H).to(ACC),)

    steps = steps_of(tl.program_id(0) * BM, T, rows)
    t = steps - 1 if REVERSE else 0 * steps
    n, start = step_rows(t, steps, B, rows, first)
    mask = (b < n)[:, None] & (u < H)[None, :]
    x = load_planes(gates, (start + col)[:, None] * (G * H) + u[None, :], H, mask, G)
    for i in range(steps):
        t = steps - 1 - i if REVERSE else i
        n, start = step_rows(t, steps, B, rows, first)
        live = (b < n)[:, None]
        mask = live & (u < H)[None, :]
        token = (start + col)[:, None]
        now = cast(x, G, ACC)
        following, begin = step_rows(t - 1 if REVERSE else t + 1, steps, B, rows, first)
        ahead = (b < following)[:, None] & (u < H)[None, :]
        x = load_planes(gates, (begin + col)[:, None] * (G * H) + u[None, :], H, ahead, G)

        r = ()
        if RECURRENT:
            r = products(h, w, added, 0, G - Q, PRECISION, ACC)
        s = (tl.zeros([BM, HP], ACC) if w_hr is not None else h,) + others
        m = ()
        if M > 0:
            m = MASKS(seed, flags, origin, start + col, col, b < n, tl.program_id(1) * HP, now[0])
        d = ()
        if D > 0:
            back, begun = step_rows(t + SKIP if REVERSE else t - SKIP, steps, B, rows, first)
            d = (delayed(seq[0], b, col, u, tl.minimum(back, n), begun, H, ACC),)
        if Q > 0:
            value = without_padding(OPERAND(now, r, s, p, m, d), u, H, HP)
            r = r + products(value, w, added, G - Q, Q, PRECISION, ACC)
        new, kept = FORWARD(now, r, s, p, m, d)
        y = without_padding(new[0], u, H, HP)
        if w_hr is not None:
            if raw is not None:
                tl.store(raw + token * H + u[None, :], y.to(raw.dtype.element_ty), mask=mask)
            y = tl.dot(y.to(projection.dtype), projection, input_precision=PRECISION, out_dtype=ACC)
        tl.store(seq[0] + token * R + v[None, :], y.to(seq[0].dtype.element_ty), mask=live & (v < R)[None, :])
        if acts is not None:
            store_planes(acts, token * (A * H) + u[None, :], H, mask, kept, A)
        h = tl.where(live, y, h)
        moved = ()
        for k in tl.static_range(1, S):
            if seq[k] is not None:
                tl.store(seq[k] + token * H + u[None, :], new[k].to(seq[k].dtype.element_ty), mask=mask)
            moved = moved + (tl.where(live, new[k], others[k - 1]),)
        others = moved
        if D > 0:
            tl.debug_barrier()
    store_rows(final[0], b, col, v, B, R, h)
    for k in tl.static_range(1, S):
        store_rows(final[k], b, col, u, B, H, others[k - 1])


# ---------------------------------------------------------------- backward


@triton.jit
def fetch(
    t,
    steps,
    B,
    rows,
    first,
    b,
    col,
    u,
    v,
    grads,
    seq,
    raw,
    acts,
    state,
    S: tl.constexpr,
    A: tl.constexpr,
    H: tl.constexpr,
    R: tl.constexpr,
    REVERSE: tl.constexpr,
):
    """What step t of backward reads, as it is stored: kept values; states before and after, the first only where it has the
    width of the units; gradients of the sequences."""
    n, start = step_rows(t, steps, B, rows, first)
    n_before, start_before = step_rows(t + 1 if REVERSE else t - 1, steps, B, rows, first)
    live = (b < n)[:, None]
    begun = (b < n_before)[:, None]
    mask = live & (u < H)[None, :]
    token = (start + col)[:, None]
    plane = token * H + u[None, :]
    a = load_planes(acts, token * (A * H) + u[None, :], H, mask, A)
    before = ()
    after = ()
    arriving = ()
    for k in tl.static_range(S):
        if k > 0 or raw is None:
            earlier = tl.load(seq[k] + (start_before + col)[:, None] * H + u[None, :], mask=mask & begun, other=0.0)
            initial = tl.load(state[k] + col[:, None] * H + u[None, :], mask=mask & ~begun, other=0.0)
            before = before + (tl.where(begun, earlier, initial),)
            after = after + (tl.load(seq[k] + plane, mask=mask, other=0.0),)
        else:
            reached = tl.load(raw + plane, mask=mask, other=0.0)
            before = before + (tl.zeros_like(reached),)
            after = after + (reached,)
        if grads[k] is not None:
            if k == 0:
                inside = live & (v < R)[None, :]
                arriving = arriving + (tl.load(grads[0] + token * R + v[None, :], mask=inside, other=0.0),)
            else:
                arriving = arriving + (tl.load(grads[k] + plane, mask=mask, other=0.0),)
        else:
            arriving = arriving + (0.0,)
    return a, before, after, arriving


@triton.jit(do_not_specialize=VARYING)
def backward_walk(
    T,
    B,
    rows,  # [T] or None
    first,  # [T] or None
    order,  # [B] or None
    w_hh,  # [G * H, R]
    w_hr,  # [R, H] or None
    grads,  # S of [N, R], [N, H] .. or None: of the sequences
    last,  # S of [B, R], [B, H] .. or None: of the final states
    seq,  # S of [N, R], [N, H] ..
    raw,  # [N, H] or None
    acts,  # [N, A, H]
    state,  # S of [B, R], [B, H] ..
    dgates,  # [N, G * H]
    dr,  # [N, G * H]
    operand,  # [N, H] or None
    dproj,  # [N, R] or None
    dstate,  # S of [B, R], [B, H] ..
    norms,  # [T, S, programs] float64 or None
    dparams,  # [N, P * H] or None
    owed,  # [N, H] in ACC, zero at first: adjoints of d by the token that d is of; or None
    parameters,  # [P, H] or None
    seed,  # [1] or None
    flags,  # [N] or None
    origin,  # number of the first token
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
    RECURRENT: tl.constexpr,
    SKIP: tl.constexpr,
    CLIP: tl.constexpr,
    H: tl.constexpr,
    R: tl.constexpr,
    HP: tl.constexpr,
    RP: tl.constexpr,
    SPLIT: tl.constexpr,
    REVERSE: tl.constexpr,
    BM: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
):
    b = tl.program_id(0) * BM + tl.arange(0, BM)
    col = columns(b, B, order)
    u = tl.program_id(1) * HP + tl.arange(0, HP)
    v = tl.program_id(1) * RP + tl.arange(0, RP)
    w = ()
    if RECURRENT:
        w = load_matrix(w_hh, u[:, None], v[None, :], H, R, H, G)
    p = load_parameters(parameters, u, H, P, ACC)
    programs = tl.num_programs(0) * tl.num_programs(1)
    if w_hr is not None:
        projection = load_matrix(w_hr, v[:, None], u[None, :], R, H, R, 1)[0]
    dh = tl.zeros([BM, RP], ACC) if last[0] is None else load_rows(last[0], b, col, v, B, R).to(ACC)
    others = ()
    for k in tl.static_range(1, S):
        if last[k] is None:
            others = others + (tl.zeros([BM, HP], ACC),)
        else:
            others = others + (load_rows(last[k], b, col, u, B, H).to(ACC),)

    steps = steps_of(tl.program_id(0) * BM, T, rows)
    t = 0 * steps if REVERSE else steps - 1
    a, before, after, arriving = fetch(
        t, steps, B, rows, first, b, col, u, v, grads, seq, raw, acts, state, S, A, H, R, REVERSE
    )
    for i in range(steps):
        t = i if REVERSE else steps - 1 - i
        n, start = step_rows(t, steps, B, rows, first)
        live = (b < n)[:, None]
        mask = live & (u < H)[None, :]
        inside = live & (v < R)[None, :]
        token = (start + col)[:, None]
        kept = cast(a, A, ACC)
        s = cast(before, S, ACC)
        new = cast(after, S, ACC)
        dt0 = dh if grads[0] is None else dh + arriving[0].to(ACC)
        dt = ()
        for k in tl.static_range(1, S):
            dt = dt + (others[k - 1] if grads[k] is None else others[k - 1] + arriving[k].to(ACC),)
        a, before, after, arriving = fetch(
            t + 1 if REVERSE else t - 1,
            steps, B, rows, first, b, col, u, v, grads, seq, raw, acts, state, S, A, H, R, REVERSE,
        )  # fmt: skip
        if D > 0:
            dt0 += tl.load(owed + token * H + u[None, :], mask=mask, other=0.0)
        dt0 = clamp(dt0, CLIP)
        if norms is not None:
            slot = norms + t.to(tl.int64) * S * programs + tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
            tl.store(slot, squares(dt0, inside))
        if w_hr is not None:
            tl.store(dproj + token * R + v[None, :], dt0.to(dproj.dtype.element_ty), mask=inside)
            dt0 = tl.dot(dt0.to(projection.dtype), projection, input_precision=PRECISION, out_dtype=ACC)
        dt = (dt0,) + dt
        gate = token * (G * H) + u[None, :]
        m = ()
        if M > 0:
            m = MASKS(seed, flags, origin, start + col, col, b < n, tl.program_id(1) * HP, dt0)
        d = ()
        if D > 0:
            back, begun = step_rows(t + SKIP if REVERSE else t - SKIP, steps, B, rows, first)
            d = (delayed(seq[0], b, col, u, tl.minimum(back, n), begun, H, ACC),)
        if Q > 0:
            value, late = SECOND(kept, s, new, p, m, d, dt)
            tl.store(operand + token * H + u[None, :], value.to(operand.dtype.element_ty), mask=mask)
            dv = tl.zeros([BM, HP], ACC)
            for q in tl.static_range(Q):
                factor = without_padding(late[q], u, H, HP).to(w[0].dtype)
                dv = tl.dot(factor, w[G - Q + q], dv, input_precision=PRECISION, out_dtype=ACC)
            dx, dr_now, ds, dp, dd, full = BACKWARD(kept, s, new, p, m, d, dt, dv)
        else:
            dx, dr_now, ds, dp, dd, full = BACKWARD(kept, s, new, p, m, d, dt, ())
        if dparams is not None:
            store_planes(dparams, token * (P * H) + u[None, :], H, mask, dp, P)
        if D > 0:
            debt = owed + (begun + col)[:, None] * H + u[None, :]
            tl.store(debt, dd[0], mask=(b < tl.minimum(back, n))[:, None] & (u < H)[None, :])
        store_planes(dr, gate, H, mask, dr_now, G)
        if SPLIT:
            store_planes(dgates, gate, H, mask, dx, G)
        through = tl.zeros([BM, RP], ACC) if w_hr is not None else ds[0]
        for g in tl.static_range(G - Q if RECURRENT else 0):
            factor = without_padding(dr_now[g], u, H, HP).to(w[0].dtype)
            through = tl.dot(factor, w[g], through, input_precision=PRECISION, out_dtype=ACC)
        dh = tl.where(live, through, dh)
        moved = ()
        for k in tl.static_range(1, S):
            if norms is not None:
                tl.store(slot + k * programs, squares(full[k], mask))
            moved = moved + (tl.where(live, ds[k], others[k - 1]),)
        others = moved
        if D > 0:
            tl.debug_barrier()
    store_rows(dstate[0], b, col, v, B, R, dh)
    for k in tl.static_range(1, S):
        store_rows(dstate[k], b, col, u, B, H, others[k - 1])
