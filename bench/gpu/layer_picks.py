"""Ours with other tiles than the shipped ones: the key of a provider says which.

attention   ours:BM=128,BN=64,warps=8,stages=3,WS=0     tiles, warps, stages, loads by warps of their own (0 or 1)
            ours:forward.BM=64,queries.warps=4          each for one kernel: forward, queries, keys
norm        ours:VALUES=16,BACKWARD=1024                constants of backends/triton/residual_norm.py
causal conv ours:BM=64,BN=128,warps=4,stages=4
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch

from bench.gpu.picks import parsed, patched
from bench.layers import Layer

KERNELS = ("forward", "queries", "keys")
NAMES = {
    "attention": {"BM", "BN", "warps", "stages", "WS"},
    "norm": {"TILE", "VALUES", "CHUNK", "FORWARD", "BACKWARD"},
    "causal conv": {"BM", "BN", "warps", "stages"},
}
VARIANTS = {  # --variants
    "attention": ("WS=0", "stages=2", "stages=3", "forward.BM=64,forward.warps=4", "queries.warps=4,keys.warps=4"),
    "norm": ("VALUES=4", "VALUES=16", "TILE=2048", "BACKWARD=1024"),
    "causal conv": ("BM=128,BN=128", "BM=128,BN=64", "BM=64,BN=64", "stages=3"),
}


def kind(case: Layer) -> str | None:
    """Whose kernels a row runs; None: those of several."""
    return "norm" if case.cell.endswith("norm") else case.cell if case.cell in NAMES else None


def fits(case: Layer, pick: str) -> bool:
    """Whether all that a pick names is something of this row's kernels."""
    it = kind(case)
    names = {name for name in parsed(pick)}
    if it == "attention":
        names = {name.rpartition(".")[2] if name.partition(".")[0] in KERNELS else name for name in names}
    return it is not None and names <= NAMES[it]


def chosen(asked: dict[str, Any], choose: Callable[..., Any], kernel: str, *more: Any) -> Any:
    """The tile that the table has for a kernel of attention, but for what is asked of it."""
    tile = choose(kernel, *more)
    for name, value in asked.items():
        which, dot, field = name.rpartition(".")
        if tile is not None and (not dot or which == kernel):
            if field == "WS" and value and kernel != "forward":
                continue  # loads that are forward's alone
            tile = replace(tile, **{field: bool(value) if field == "WS" else value})
    return tile


@contextlib.contextmanager
def by(case: Layer, pick: str) -> Iterator[None]:
    """Ours as the pick has it, for as long as the block runs. ValueError for one that names nothing of this row."""
    if not fits(case, pick):
        raise ValueError(f"{case.cell} has nothing of {pick!r}: {', '.join(sorted(NAMES.get(kind(case) or '', ())))}")
    asked: dict[str, Any] = parsed(pick)
    with contextlib.ExitStack() as stack:
        if kind(case) == "attention":
            from gradkernels.backends.triton import attention_tiles

            pick_tile = functools.partial(chosen, asked, attention_tiles.choose)
            stack.enter_context(patched(attention_tiles, choose=pick_tile))
        elif kind(case) == "norm":
            from gradkernels.backends.triton import residual_norm

            stack.enter_context(patched(residual_norm, **asked))
        else:
            from gradkernels.backends.triton import causal_conv1d as conv

            sizes, options = conv._sizes, conv._options
            same = lambda size: all(asked.get(name, value) == value for name, value in zip(("BM", "BN"), size))
            some = lambda number: [s for s in sizes(number) if same(s)] or [(asked["BM"], asked["BN"])]
            own = {f"num_{name}": asked[name] for name in ("warps", "stages") if name in asked}
            # what is remembered of sizes is that of all of them
            values = {"_sizes": some, "_tile": conv._tile.__wrapped__, "_options": lambda *a: options(*a) | own}
            stack.enter_context(patched(conv, **values))
        yield


def build(case: Layer, key: str, dtype: torch.dtype) -> Any:
    """The provider of such a key."""
    from bench.gpu import layer_peers

    pick = key.partition(":")[2]
    with by(case, pick):  # says now what is wrong with it
        made = layer_peers.build(case, "ours", dtype)
    made.key, made.around, made.label = key, functools.partial(by, case, pick), layer_peers.label(key)
    return made
