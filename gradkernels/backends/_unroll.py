"""The recurrence over rows as a loop of torch operations: forward, backward, forward mode.

Rows of all steps lie one after the other; `steps` says for each step where its rows begin and how many there are.
`params`, `masks`, `skip` and `clip` are what _extra.py says of them, masks being drawn already.

Dims: as in reference.py; P parameters of a unit, M masks.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def split(v: Tensor, H: int) -> tuple[Tensor, ...]:
    """[n, k*H] -> k tensors [n, H]"""
    return v.unflatten(1, (v.shape[1] // H, H)).unbind(1)


def advance(new: Sequence[Tensor], old: Sequence[Tensor]) -> list[Tensor]:
    """The rows that took part move on; the others keep what they have."""
    return [v if v.shape[0] == u.shape[0] else torch.cat([v, u[v.shape[0] :]]) for v, u in zip(new, old)]


def join(parts: Sequence[Tensor], like: Tensor, *width: int) -> Tensor:
    return torch.cat(list(parts)) if parts else like.new_empty(0, *width)


def walk(steps: Sequence[tuple[int, int]], reverse: bool) -> list[int]:
    """Steps in the order in which they are taken."""
    return list(reversed(range(len(steps))) if reverse else range(len(steps)))


def fit(v: Tensor | None, n: int, like: Tensor) -> Tensor:
    """The first n rows, zeros where there are fewer; [n, H]."""
    if v is None:
        return torch.zeros_like(like[:n])
    return v[:n] if v.shape[0] >= n else torch.cat([v, v.new_zeros(n - v.shape[0], *v.shape[1:])])


def extras(cell, params, masks, delayed, rows: slice, n: int) -> list[tuple[Tensor, ...]]:
    """Arguments of a cell after s, those that it has: p, m, d."""
    out = []
    if cell.P:
        out.append(tuple(v.expand(n, v.shape[0]) for v in params.unbind(0)))
    if cell.M:
        out.append(masks[:, rows].unbind(0))
    if cell.D:
        out.append((delayed,))
    return out


def unroll(cell, gates, w_hh, b_hh, w_hr, state, steps, reverse, params=None, masks=None, skip=0):
    """gates [N, G*H] -> state sequences [N, R], [N, H] ...; final states; output before projection; kept [N, A, H].

    params [P, H], masks [M, N, H]."""
    H, s, order = w_hh.shape[0] // cell.G, list(state), walk(steps, reverse)
    K = w_hh.shape[0] - len(cell.second) * H  # rows of weight_hh whose product is taken of the state
    b_first, b_second = (None, None) if b_hh is None else (b_hh[:K], b_hh[K:])
    seq, raw, acts = [[None] * len(steps) for _ in s], [None] * len(steps), [None] * len(steps)
    for i, k in enumerate(order):
        o, n = steps[k]
        x, before = split(gates[o : o + n], H), [v[:n] for v in s]
        delayed = fit(seq[0][order[i - skip]] if i >= skip else None, n, before[0]) if cell.D else None
        more = extras(cell, params, masks, delayed, slice(o, o + n), n)
        r = split(F.linear(before[0], w_hh[:K], b_first), H) if cell.recurrent else ()
        if cell.second:
            r = (*r, *split(F.linear(cell.operand(x, r, before, *more), w_hh[K:], b_second), H))
        t, a = cell.forward(x, r, before, *more)
        acts[k] = torch.stack(tuple(a), 1) if a else x[0].new_empty(n, 0, H)
        raw[k], t = t[0], (t[0] if w_hr is None else F.linear(t[0], w_hr), *t[1:])
        for j, v in enumerate(t):
            seq[j][k] = v
        s = advance(t, s)
    seq = [join(v, gates, u.shape[1]) for v, u in zip(seq, state)]
    return seq, s, None if w_hr is None else join(raw, gates, H), join(acts, gates, cell.A, H)


def unroll_backward(
    cell, grads, w_hh, w_hr, seq, raw, acts, state, steps, reverse, norms, params=None, masks=None, skip=0, clip=0.0
):
    """BPTT. grads: one per state sequence, then one per final state; None is zero.

    -> dgates [N, G*H]; dr [N, G*H], the same tensor when no gate is split; v [N, H] or None; dproj [N, R] or None;
    dparams [N, P*H] or None; dstate; and per step [T, S + 1] the squared norms of the states' adjoints and the number of rows, in
    float64: the square of any float32 fits, and squares add up."""
    S, H, order = cell.S, acts.shape[2], walk(steps, reverse)
    K = w_hh.shape[0] - len(cell.second) * H
    ds = [torch.zeros_like(v) if g is None else g for v, g in zip(state, grads[S:])]
    dgates, dr, operand, dproj, dparams, size = ([None] * len(steps) for _ in range(6))
    owed = {}  # step -> what d of a later one adds to the adjoint of its first state
    for i in reversed(range(len(order))):
        k = order[i]
        o, n = steps[k]
        po, pn = steps[order[i - 1]] if i else (0, 0)
        m = min(n, pn)  # rows that come from the step before; the others start here
        before = [
            u[:n] if m == 0 else q[po : po + m] if m == n else torch.cat([q[po : po + m], u[m:n]])
            for q, u in zip(seq, state)
        ]
        dt = [d[:n] if g is None else d[:n] + g[o : o + n] for d, g in zip(ds, grads)]
        if k in owed:
            dt[0] = dt[0] + fit(owed.pop(k), n, dt[0])
        if clip:
            dt[0] = dt[0].clamp(-clip, clip)
        after, own = [q[o : o + n] for q in seq], dt[0]
        if w_hr is not None:
            dproj[k], dt[0], after[0] = own, own @ w_hr, raw[o : o + n]
        delayed = None
        if cell.D:
            fo, fn = steps[order[i - skip]] if i >= skip else (0, 0)
            delayed = fit(seq[0][fo : fo + fn], n, before[0])
        more = extras(cell, params, masks, delayed, slice(o, o + n), n)
        a = acts[o : o + n].unbind(1)
        if cell.second:
            operand[k], late = cell.second_adjoint(a, before, after, *more, dt)
            got = cell.backward(a, before, after, *more, dt, torch.cat(tuple(late), 1) @ w_hh[K:])
        else:
            got = cell.backward(a, before, after, *more, dt)
        x, r, s, *found, total = got
        if cell.P:
            dparams[k] = torch.cat(tuple(found.pop(0)), 1)
        if cell.D and i >= skip:
            owed[order[i - skip]] = found[0][0]
        if norms:
            squares = [v.double().square().sum() for v in (own, *total[1:])]
            size[k] = torch.stack([*squares, own.new_full((), n, dtype=torch.double)])
        dgates[k] = torch.cat(tuple(x), 1)
        dr[k] = torch.cat(tuple(r), 1) if cell.split else dgates[k]
        back = dr[k][:, :K] @ w_hh[:K] + s[0] if cell.recurrent else s[0]
        ds = advance([back, *s[1:]], ds)
    width = w_hh.shape[0]
    dgates = join(dgates, acts, width)
    return (
        dgates,
        join(dr, acts, width) if cell.split else dgates,
        join(operand, acts, H) if cell.second else None,
        None if w_hr is None else join(dproj, acts, w_hr.shape[0]),
        join(dparams, acts, cell.P * H) if cell.P else None,
        ds,
        (torch.stack(size) if size else acts.new_empty(0, S + 1, dtype=torch.double)) if norms else None,
    )


def unroll_tangent(cell, primal, moving, steps, reverse, params=None, dparams=None, masks=None, skip=0):
    """Forward mode of `unroll`: (gates, w_hh, b_hh, w_hr, *state) and their tangents, None being zero."""
    (gates, w_hh, b_hh, w_hr, *s), (dgates, dw, db, dwr, *d) = primal, moving
    H, order = w_hh.shape[0] // cell.G, walk(steps, reverse)
    K = w_hh.shape[0] - len(cell.second) * H
    state, first, out = s, [None] * len(steps), [[None] * len(steps) for _ in s]
    d = [torch.zeros_like(v) if g is None else g for v, g in zip(s, d)]
    if cell.P and dparams is None:
        dparams = torch.zeros_like(params)

    def product(v, dv, rows):
        """(W v + b, its tangent) for those rows of weight_hh."""
        part = lambda u: None if u is None else u[rows]
        tangent = F.linear(dv, w_hh[rows], part(db))
        return split(F.linear(v, w_hh[rows], part(b_hh)), H), split(
            tangent if dw is None else tangent + F.linear(v, dw[rows]), H
        )

    for i, k in enumerate(order):
        o, n = steps[k]
        x, before, dbefore = split(gates[o : o + n], H), [v[:n] for v in s], [v[:n] for v in d]
        dx, then = split(dgates[o : o + n], H), order[i - skip] if i >= skip else None
        delayed, ddelayed = (
            [fit(None if then is None else v[then], n, before[0]) for v in (first, out[0])] if cell.D else (None, None)
        )
        more = extras(cell, params, masks, delayed, slice(o, o + n), n)
        dmore = [
            v for v, name in zip(extras(cell, dparams, masks, ddelayed, slice(o, o + n), n), cell.extra) if name != "m"
        ]
        r, dr = product(before[0], dbefore[0], slice(0, K)) if cell.recurrent else ((), ())
        if cell.second:
            r2, dr2 = product(*cell.operand_tangent(x, r, before, *more, dx, dr, dbefore, *dmore), slice(K, None))
            r, dr = (*r, *r2), (*dr, *dr2)
        new, tan = cell.tangent(x, r, before, *more, dx, dr, dbefore, *dmore)
        if w_hr is not None:
            tan = (F.linear(tan[0], w_hr) + (0 if dwr is None else F.linear(new[0], dwr)), *tan[1:])
            new = (F.linear(new[0], w_hr), *new[1:])
        first[k] = new[0]
        for j, v in enumerate(tan):
            out[j][k] = v
        s, d = advance(new, s), advance(tan, d)
    return [join(v, gates, u.shape[1]) for v, u in zip(out, state)], d
