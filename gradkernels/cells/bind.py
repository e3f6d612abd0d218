"""What a derived cell is: sizes and printed functions, and these functions bound to torch."""

from __future__ import annotations

import functools
import linecache
import types
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any


@dataclass(frozen=True)
class Cell:
    """One step of a recurrence: sizes, and the printed text of everything derived from its forward.

    The functions take and return tuples of tensors, elementwise and without touching their arguments: `x[G]`, `r[G]` the
    pre-activations of the input and of the recurrent product, `s[S]` the states before the step (`s[0]` is what the recurrent
    matrix multiplies), `t[S]` the states after it, `a[A]` what forward keeps, `dt[S]` the adjoints of t. All have the shape of
    one plane, such as [B, H], and one floating dtype. A cell may have more arguments, after s, in this order: `p[P]` per-unit
    parameters, `m[M]` masks, `d[D]` with the first state of some steps ago, D being 0 or 1.

    * `forward(x, r, s[, p][, m][, d]) -> t, a`
    * `backward(a, s, t[, p][, m][, d], dt) -> dx, dr, ds[, dp][, dd], total`: total holds the full adjoints of t, with what
      reaches a state through the other states of the same step; it is what `retain_grad` on them shows
    * `tangent(x, r, s[, p][, m][, d], dx, dr, ds[, dp][, dd]) -> t, dt`: forward mode

    Without a recurrent product (`recurrent` is False) r is never read, and dr is dx.

    Where a cell writes `r[k](v)`, those k are in `second`, and the driver makes two dependent products a step:

    * `operand(x, r, s[, p][, m][, d]) -> v`: reads no `r[k]` of k in second, which are made of v: `r[k] = W_k v + b_k`
    * `operand_tangent(..) -> v, dv`: arguments as tangent
    * `second_adjoint(a, s, t[, p][, m][, d], dt) -> v, dr`: v again, and `dr[k]` for k in second
    * `backward(.., dt, dv)`: takes the adjoint of v, `dv = sum_k W_k^T dr[k]`

    Cells are equal when their text is; they pickle, and copies are the cell itself.

    >>> from gradkernels.cells import get
    >>> gru = get("gru")
    >>> gru.G, gru.S, gru.A, gru.split
    (3, 1, 4, (2,))
    >>> print(get("rnn_tanh").source)
    def forward(x, r, s):
        return (tanh(x[0] + r[0]),), ()
    <BLANKLINE>
    <BLANKLINE>
    def backward(a, s, t, dt):
        dx0 = dt[0] * (1 - t[0] * t[0])
        dx = (dx0,)
        return dx, dx, (full_like(s[0], 0),), (dt[0],)
    <BLANKLINE>
    <BLANKLINE>
    def tangent(x, r, s, dx, dr, ds):
        u1 = tanh(x[0] + r[0])
        return (u1,), ((dx[0] + dr[0]) * (1 - u1 * u1),)
    <BLANKLINE>
    """

    name: str
    G: int  # gates
    S: int  # states
    P: int  # per-unit parameters
    A: int  # values kept for backward
    split: tuple[int, ...]  # gates whose dr is not their dx
    second: tuple[int, ...]  # gates whose recurrent product is of the operand instead of s[0]: the last ones
    source: str = field(repr=False)
    M: int = field(default=0, repr=False)  # masks
    D: int = field(default=0, repr=False)  # values of some steps ago
    recurrent: bool = field(default=True, repr=False)  # False: no product with the states, r is not read
    params: tuple[tuple[str, int, float | None], ...] = field(default=(), repr=False)  # names of p, see `cell`

    def __copy__(self) -> Cell:
        return self

    def __deepcopy__(self, memo: dict) -> Cell:
        return self

    def __reduce__(self) -> tuple:  # without the bound functions, which do not pickle
        return Cell, tuple(getattr(self, f.name) for f in fields(self))

    @property
    def extra(self) -> tuple[str, ...]:
        """Which of p, m and d its functions take."""
        return tuple(name for name, n in (("p", self.P), ("m", self.M), ("d", self.D)) if n)

    @property
    def means(self) -> bool:
        """Whether a step takes means over the units of a row."""
        return "= mean(" in self.source

    @property
    def projects(self) -> bool:
        """Whether the first state may be of another width than the units: only the recurrent product reads it."""
        source = self.source
        forward = source[source.index("def forward(") : source.index("def backward(")]
        return self.recurrent and "s[0]" not in forward and not (self.second or self.D)

    @functools.cached_property
    def functions(self) -> dict[str, Callable[..., Any]]:
        """The printed functions over torch tensors, by name."""
        return bind(self.source, f"<cell {self.name}>", torch_functions())

    def check(self, units: int = 7, rows: int = 3) -> float:
        """Compare the printed backward with autograd through the printed forward, in float64 on random values.

        Returns:
            The largest difference, as a share of the largest adjoint of its group: rounding, some 1e-16, unless the cell has a
            backward of its own that means something else.

        >>> from gradkernels.cells import get
        >>> get("lstm").check() < 1e-14
        True
        """
        import torch

        new = lambda n, grad=True: [torch.randn(rows, units, dtype=torch.float64, requires_grad=grad) for _ in range(n)]
        groups = {
            "x": new(self.G),
            "r": new(self.G),
            "s": new(self.S),
            "p": new(self.P),
            "m": new(self.M, False),
            "d": new(self.D),
        }
        values, dt, weight = (
            [groups[name] for name in ("x", "r", "s", *self.extra)],
            new(self.S, False),
            new(1, False)[0][0],
        )
        v = self.operand(*values) if self.second else None
        if v is not None:  # a product of v that this function can take by itself: units by a diagonal matrix
            groups["r"] = values[1] = [v * weight if k in self.second else r for k, r in enumerate(groups["r"])]
        t, a = self.forward(*values)
        after = [a, values[2], t, *values[3:], dt]
        if v is not None:
            after.append(sum(d * weight for d in self.second_adjoint(*after)[1]))
        with torch.no_grad():
            got = self.backward(*after)[:-1]
        worst, names = 0.0, ["x", "r", "s", *(name for name in self.extra if name != "m")]
        for name, adjoints in zip(names, got):
            if name == "r" and not self.recurrent:
                continue
            inputs = [v for k, v in enumerate(groups[name]) if name != "r" or k not in self.second]
            adjoints = [d for k, d in enumerate(adjoints) if name != "r" or k not in self.second]
            if not inputs:
                continue
            live = [(u, d) for u, d in zip(t, dt) if u.requires_grad]
            outputs, weights = [u for u, _ in live], [d for _, d in live]
            want = torch.autograd.grad(
                outputs, inputs, weights, allow_unused=True, materialize_grads=True, retain_graph=True
            )
            size = max(float(w.abs().max()) for w in want) or 1.0
            worst = max(worst, *(float((d - w).abs().max()) / size for d, w in zip(adjoints, want)))
        return worst

    @property
    def forward(self) -> Callable[..., Any]:
        return self.functions["forward"]

    @property
    def backward(self) -> Callable[..., Any]:
        return self.functions["backward"]

    @property
    def tangent(self) -> Callable[..., Any]:
        return self.functions["tangent"]

    @property
    def operand(self) -> Callable[..., Any]:
        return self._second("operand")

    @property
    def operand_tangent(self) -> Callable[..., Any]:
        return self._second("operand_tangent")

    @property
    def second_adjoint(self) -> Callable[..., Any]:
        return self._second("second_adjoint")

    def _second(self, name: str) -> Callable[..., Any]:
        if not self.second:
            raise AttributeError(f"cell '{self.name}' has no {name}: its recurrent products are all of s[0]")
        return self.functions[name]


def bind(source: str, filename: str, namespace: dict[str, Any]) -> dict[str, Callable[..., Any]]:
    """The functions of a generated text over the vocabulary of a namespace; tracebacks, inspect and Triton find its lines."""
    linecache.cache[filename] = (len(source), None, source.splitlines(True), filename)
    space = dict(namespace)
    exec(compile(source, filename, "exec"), space)  # noqa: S102 - text of ours, printed from a graph
    own = lambda f: isinstance(f, types.FunctionType) and f.__code__.co_filename == filename
    return {name: f for name, f in space.items() if own(f)}


@functools.cache
def torch_functions() -> dict[str, Callable[..., Any]]:
    """The vocabulary of cells over tensors."""
    import torch

    same = (
        "sigmoid",
        "tanh",
        "relu",
        "exp",
        "expm1",
        "log",
        "log1p",
        "sqrt",
        "sin",
        "cos",
        "erf",
        "abs",
        "sign",
        "pow",
    )
    tensor = lambda v, like: v if isinstance(v, torch.Tensor) else like.new_full((), v)
    pair = lambda f: lambda a, b: f(tensor(a, b), tensor(b, a))
    return {name: getattr(torch, name) for name in (*same, "where", "full_like")} | {
        "min": pair(torch.minimum),
        "max": pair(torch.maximum),
        # F.softplus turns linear at 20, where it is off by 2e-9
        "softplus": lambda a: torch.clamp(a, min=0) + torch.log1p(torch.exp(-torch.abs(a))),
        "mean": lambda a: a.mean(-1, keepdim=True).expand_as(a),
    }
