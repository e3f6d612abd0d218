"""Random cells: whatever the language can say, what is derived from it is its derivative."""

import pytest
import torch


@pytest.mark.parametrize("seed", range(60))
def test_random_cell(seed, random_cell):
    c = random_cell(seed)
    assert (c.G, c.S, c.P) == (2, 2, 1)
    new = lambda n: [torch.randn(50, dtype=torch.double, requires_grad=True) for _ in range(n)]
    x, r, s, p = new(2), new(2), new(2), new(1)
    inputs = [*x, *r, *s, *p]
    t, a = c.forward(x, r, s, p)
    assert all(u.dtype == torch.double for u in a)
    dt = [torch.randn_like(u) for u in t]
    want = torch.autograd.grad(t, inputs, dt, allow_unused=True, materialize_grads=True)
    *groups, _ = c.backward(a, s, t, p, dt)
    got = [g for group in groups for g in group]
    moving = [torch.randn_like(u) for u in inputs]
    _, tangent = c.tangent(x, r, s, p, moving[:2], moving[2:4], moving[4:6], moving[6:])
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-11, atol=1e-12)
    # <dt, J v> = <J^T dt, v>
    ahead = sum((u * d) for u, d in zip(tangent, dt))
    behind = sum((w * v) for w, v in zip(want, moving))
    torch.testing.assert_close(ahead, behind, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("seed", range(30))
def test_random_cell_with_an_operand(seed, random_cell):
    c = random_cell(seed, operand=True)
    assert (c.G, c.S, c.second) == (2, 2, (1,))
    x, (r,), s = ([torch.randn(50, dtype=torch.double, requires_grad=True) for _ in range(n)] for n in (2, 1, 2))
    weight = 0.7  # of the second product, elementwise here
    v = c.operand(x, [r], s)
    t, a = c.forward(x, [r, weight * v], s)
    assert all(u.dtype == torch.double for u in a)
    dt = [torch.randn_like(u) for u in t]
    want = torch.autograd.grad(t, [*x, r, *s], dt, allow_unused=True, materialize_grads=True)
    again, (late,) = c.second_adjoint(a, s, t, dt)
    dx, dr, ds, _ = c.backward(a, s, t, dt, weight * late)
    torch.testing.assert_close(again, v, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(dr[1], late, rtol=0, atol=0)
    for g, w in zip([*dx, dr[0], *ds], want, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-11, atol=1e-12)
