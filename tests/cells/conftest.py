# ruff: noqa: F821 - functions of the cell language need no import
"""Cells that users might write. A test with the argument `each` runs on these and on the registry."""

import linecache
import math
import random

import pytest
import torch
import torch.nn.functional as F

from gradkernels.cells import CELLS, cell
from gradkernels.cells.transform import masked, resets, skip, zoneout

alpha = 0.1
scales = (0.5, 2.0)


@cell
def peephole(x, r, s, p):
    """Gers & Schmidhuber (2000)."""
    i, f = sigmoid(x[0] + r[0] + p[0] * s[1]), sigmoid(x[1] + r[1] + p[1] * s[1])
    c = f * s[1] + i * tanh(x[2] + r[2])
    return sigmoid(x[3] + r[3] + p[2] * c) * tanh(c), c


@cell
def slstm(x, r, s):
    """Beck et al. (2024): exponential gates, a normaliser and a stabiliser."""
    zi, zf = x[0] + r[0], x[1] + r[1]
    m = max(zf + s[3], zi)
    i, f = exp(zi - m), exp(zf + s[3] - m)
    c, n = f * s[1] + i * tanh(x[2] + r[2]), f * s[2] + i
    return sigmoid(x[3] + r[3]) * c / n, c, n, m


@cell
def layer_norm_lstm(x, r, s):
    """Ba, Kiros & Hinton (2016), the norm inside the output only."""
    i, f, g, o = sigmoid(x[0] + r[0]), sigmoid(x[1] + r[1]), tanh(x[2] + r[2]), sigmoid(x[3] + r[3])
    c = f * s[1] + i * g
    d = c - mean(c)
    return o * tanh(d / sqrt(mean(d * d) + 1e-5)), c


@cell
def minimal_gated_unit(x, r, s):
    """Zhou et al. (2016): the operand's gate is the only gate."""
    f = sigmoid(x[0] + r[0])
    return s[0] + f * (tanh(x[1] + r[1](f * s[0])) - s[0])


@cell
def two_products(x, r, s):
    """Two gates of one operand, which is used by itself too and needs a function to compute it again."""
    v = s[0] * tanh(x[0] + r[0]) + s[1]
    n = tanh(x[1] + r[1](v)) + v
    return n * sigmoid(x[2] + r[2](v)), v + 0.5 * n


@cell
def leaves(x, r, s):
    """States that are leaves, numbers and each other."""
    h = tanh(x[0] + r[0]) * s[1] + x[1] * s[2]
    return h, x[1], s[1], 0.5, h


@cell
def independent(x, r, s, p):
    """Li et al. (2018), of two states: nothing is multiplied by a matrix."""
    h = relu(x[0] + p[0] * s[0])
    return h + tanh(x[1]) * s[1], 0.5 * s[1] + p[1] * h


@cell
def with_every_group(x, r, s, p, m, d):
    """Parameters, masks and a delayed value, in both products."""
    z = sigmoid(x[0] + r[0] + p[0] * s[0])
    n = tanh(x[1] + r[1](m[0] * z * s[0] + d[0])) + 0.5 * d[0]
    return s[0] + m[1] * z * (n - s[0])


def swish(v):
    w = v * torch.sigmoid(v)
    return w + alpha


def both(groups, k):
    return groups[0][k] + groups[1][k]


@cell
def everything(x, r, s):
    """Every function there is, but mean."""
    u = exp(-abs(x[0] + r[0])) + sqrt(1 + s[0] * s[0])
    v = min(x[1], r[1]) + max(x[1] * 2, s[1]) + where(u > x[2], u * x[2], r[2] ** 3)
    positive, large = v > 0, u >= 1.2
    w = swish(v) / (2 + cos(u)) + F.softplus(x[0]) * sin(r[0]) + log(2 + square(v)) + erf(u) - relu(v)
    w += log1p(abs(v)) + expm1(-abs(u)) + clamp(v, -1, 1) + where(positive, 0.1, 0.3) * x[0] + where(large, v, 1)
    w = w + (softsign(r[2]) - silu(x[2]) + rsqrt(1 + v * v) + (2 + u) ** 1.5 + pow(1 + u, -2))
    w = (
        w * math.sqrt(scales[0])
        - both((x, r), 1)
        + sign(x[2]) * tanh(sigmoid(x[2]))
        + softplus(v)
        - max(u, 1.4)
        + min(0.3, v)
    )
    return tanh(0.1 * w), 0.9 * s[1] + alpha * u * u


ZOO = [
    independent,
    with_every_group,
    peephole,
    slstm,
    layer_norm_lstm,
    minimal_gated_unit,
    two_products,
    leaves,
    everything,
]


AROUND = [around(CELLS[name]) for around in (zoneout, skip, masked, resets) for name in ("lstm", "gru_reset_before")]


def pytest_generate_tests(metafunc):
    if "each" in metafunc.fixturenames:
        cells = [*CELLS.values(), *ZOO, *AROUND]
        metafunc.parametrize("each", cells, ids=[c.name for c in cells])


@pytest.fixture
def zoo():
    return {c.name: c for c in ZOO}


UNARY = [
    "sigmoid",
    "tanh",
    "relu",
    "softplus",
    "silu",
    "softsign",
    "exp",
    "expm1",
    "sin",
    "cos",
    "erf",
    "abs",
    "square",
]
POSITIVE = ["log", "log1p", "sqrt", "rsqrt"]


def expression(rng, names, depth):
    """A random expression that stays within a few units, so that rounding does."""
    e = lambda: expression(rng, names, depth - 1)
    if depth == 0 or rng.random() < 0.1:
        return rng.choice([*names, *names, str(round(rng.uniform(-2, 2), 2)), "1", "0", "-1"])
    kind = rng.randrange(8)
    if kind < 3:
        return f"({e()} {rng.choice('+-*')} {e()})"
    if kind == 3:
        return f"{rng.choice(UNARY)}(tanh({e()}))"
    if kind == 4:
        return f"{rng.choice(POSITIVE)}(1.5 + sin({e()}))"
    if kind == 5:
        return f"{e()} / (2 + square({e()}))"
    if kind == 6:
        return f"{rng.choice(['min', 'max'])}({e()}, {e()})"
    return f"where({e()} {rng.choice(['<', '<=', '>', '>='])} {e()}, {e()}, -{e()})"


def make_random_cell(seed, operand=False):
    """A cell of two gates, two states and one parameter, or an operand instead, of a few random lines."""
    rng = random.Random(seed)
    names = ["x[0]", "x[1]", "r[0]", "s[0]", "s[1]"]
    lines = [f"v = s[0] * {expression(rng, names, 2)}"] if operand else []
    names += ["r[1](v)"] if operand else ["r[1]", "p[0]"]
    every = " + ".join(names)  # all are read, so that sizes are known
    for k in range(4):
        lines.append(f"u{k} = {expression(rng, names, 3)}")
        names.append(f"u{k}")
    lines.append(f"return tanh(u3 + {expression(rng, names, 2)}), u2 + sin({every})")
    name = f"random{seed}" + "_operand" * operand
    text = f"def {name}(x, r, s{'' if operand else ', p'}):\n" + "".join(f"    {line}\n" for line in lines)
    file = f"<{name}>"
    linecache.cache[file] = (len(text), None, text.splitlines(True), file)
    space: dict = {}
    exec(compile(text, file, "exec"), space)  # noqa: S102 - text of ours
    return cell(space[name])


@pytest.fixture
def random_cell():
    return make_random_cell
