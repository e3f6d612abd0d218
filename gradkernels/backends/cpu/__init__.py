"""The C++ kernels of csrc/ on the CPU: finds the build for this machine's instruction set and hands it addresses.

Every argument has been checked and made contiguous by the op; here tensors are allocated and pointers are passed.
A result is the same bits in every run, and for any number of threads but for the norms of a probe, which are summed
thread by thread.
"""

from __future__ import annotations

import functools
import importlib
import math
from types import ModuleType

import torch
from torch import Tensor

from gradkernels.backends._extra import PLAIN, Extra
from gradkernels.backends._heads import blocks, dense
from gradkernels.cells import CELLS, Cell
from gradkernels.cells.codegen import COMPILED
from gradkernels.notices import warn

from . import compile
from .toolchain import CompileError

# What torch found the machine to be capable of, best first; ATEN_CPU_CAPABILITY selects one by hand.
BUILDS = {"AVX512": ("avx512", "avx2", "base"), "AVX2": ("avx2", "base")}
STORAGE = {
    torch.float32: "float32",
    torch.float64: "float64",
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
}
IN_CPP = {torch.float32: "float", torch.float64: "double", torch.bfloat16: "bfloat16", torch.float16: "half"}
MAX_STATES = 8
CLIPS = True  # whether backward clamps the adjoint of h_t
HUGE = 4 << 20  # bytes from which fresh memory is asked for in large pages


@functools.cache
def build() -> ModuleType:
    """The compiled module for this machine; ImportError when there is none."""
    for name in BUILDS.get(torch.backends.cpu.get_cpu_capability(), ("base",)):
        try:
            return importlib.import_module(f"gradkernels._cpu_{name}")
        except ModuleNotFoundError:
            continue
    raise ImportError("the C++ kernels are not built; install a C++17 compiler, then `pip install .` again")


@functools.cache
def outruns_mkl() -> bool:
    """Whether our products are much faster than those of torch: MKL takes AVX-512 on processors of one maker only."""
    try:
        module = build()
    except ImportError:
        return False
    return torch.backends.mkl.is_available() and module.vector_bytes == 64 and module.vendor != "GenuineIntel"


@functools.cache
def entries(cell: Cell, dtype: torch.dtype) -> tuple[int, int]:
    """Addresses of the forward and the backward driver; CompileError where this cell has to be compiled and cannot be."""
    if cell.name in COMPILED and CELLS[cell.name] == cell:
        return build().recurrent_entries(cell.name, STORAGE[dtype])
    return compile.entries(cell, IN_CPP[dtype], build().__name__.rpartition("_")[2])


def why_not(
    cell: Cell | None = None, dtype: torch.dtype | None = None, device: torch.device | None = None
) -> str | None:
    """The reason why this backend cannot run that, or None. Asked of a cell and a dtype it compiles the kernels that are missing."""
    if device is not None and device.type != "cpu":
        return f"it runs on the CPU, not on {device}"
    if dtype is not None and dtype not in STORAGE:
        return f"it has no kernels for {dtype}"
    try:
        build()
    except ImportError as e:
        return str(e)
    if cell is None:
        return None
    if cell.S > MAX_STATES:
        return f"{cell.name!r} has {cell.S} states, and the kernels take {MAX_STATES}"
    return _cell_why_not(cell, dtype)


@functools.cache
def _cell_why_not(cell: Cell, dtype: torch.dtype | None) -> str | None:
    if dtype is None:
        return None if cell.name in COMPILED and CELLS[cell.name] == cell else compile.why_not()
    try:
        entries(cell, dtype)
    except CompileError as e:
        why = f"did not come compiled, and cannot be compiled here: {e}"
        warn(f"cell {cell.name!r} runs through the reference, which is slow: it {why}")
        return f"cell {cell.name!r} {why}"
    return None


def empty(like: Tensor, *shape: int, zero: bool = False) -> Tensor:
    t = like.new_empty(shape)
    if t.nbytes >= HUGE:
        build().huge_pages(t.data_ptr(), t.nbytes)
    return t.zero_() if zero else t


def _steps(x: Tensor, B: int, batch_sizes: Tensor | None, lengths: Tensor | None) -> tuple[int, list[Tensor | None]]:
    """T, and [rows of a step, its first token, column of a row]; None where dense."""
    if batch_sizes is not None:
        return batch_sizes.shape[0], [batch_sizes, batch_sizes.cumsum(0) - batch_sizes, None]
    T = x.shape[0]
    if lengths is None:
        return T, [None, None, None]
    order = torch.argsort(lengths, descending=True, stable=True)
    ended = torch.bincount(lengths, minlength=T + 1).cumsum(0)[:T]  # rows of length <= t
    return T, [B - ended, None, order]


def addresses(tensors: list[Tensor | None]) -> list[int]:
    return [0 if t is None else t.data_ptr() for t in tensors]


def _sizes(x: Tensor, T: int, H: int, state: list[Tensor], reverse: bool, extra: Extra, heads: int) -> list[int]:
    B, R = state[0].shape
    return [T, B, x.shape[-1], H, R, reverse, torch.get_num_threads(), extra.first, extra.skip, heads]


def _blocks(weight_hh: Tensor, heads: int) -> tuple[Tensor, int]:
    """The recurrent matrix as the kernels take it, and its heads: those are whole vectors of units, or it is made dense."""
    lanes = build().vector_bytes // (8 if weight_hh.dtype == torch.float64 else 4)
    return (weight_hh, heads) if heads == 1 or weight_hh.shape[1] % lanes == 0 else (dense(weight_hh, heads), 1)


def forward(
    cell: Cell,
    x: Tensor,  # [T, B, I], or [N, I] with batch_sizes; gates [.., G * H] when weight_ih is None
    weight_ih: Tensor | None,  # [G * H, I]
    bias_ih: Tensor | None,  # [G * H]
    weight_hh: Tensor,  # [G * H, R]
    bias_hh: Tensor | None,  # [G * H]
    weight_hr: Tensor | None,  # [R, H]
    state: list[Tensor],  # [B, R], then [B, H]
    batch_sizes: Tensor | None,  # [T]
    lengths: Tensor | None,  # [B]
    reverse: bool,
    keep: int,
    extra: Extra = PLAIN,
) -> list[Tensor]:
    H, B = weight_hh.shape[0] // cell.G, state[0].shape[0]
    shape, N = x.shape[:-1], math.prod(x.shape[:-1])
    T, steps = _steps(x, B, batch_sizes, lengths)
    ragged = lengths is not None
    seq = [empty(x, *shape, s.shape[1], zero=ragged) for s in (state if keep else state[:1])]
    raw = empty(x, N, H, zero=ragged) if keep == 2 and weight_hr is not None else None
    acts = empty(x, N, cell.A, H) if keep == 2 else None
    if N == 0:
        final = [s.clone() for s in state]
    else:
        weight_hh, heads = _blocks(weight_hh, extra.heads)
        final = [torch.empty_like(s) for s in state]
        wanted = [*seq, *[None] * (cell.S - len(seq))]
        tensors = [
            *steps, extra.params, extra.seed, extra.flags,
            x, weight_ih, bias_ih, weight_hh, bias_hh, weight_hr, raw, acts, *state, *wanted, *final,
        ]  # fmt: skip
        build().recurrent(
            entries(cell, x.dtype)[0], _sizes(x, T, H, state, reverse, extra, heads), extra.noise, addresses(tensors)
        )
    return [t for t in (*seq, *final, raw, acts) if t is not None]


def backward(
    cell: Cell,
    grads: list[Tensor | None],  # of the S sequences, then of the S final states; None is zero
    x: Tensor,
    weight_ih: Tensor | None,
    weight_hh: Tensor,
    weight_hr: Tensor | None,
    saved: list[Tensor],  # S sequences, (raw [N, H],) acts [N, A, H]
    state: list[Tensor],
    batch_sizes: Tensor | None,
    lengths: Tensor | None,
    reverse: bool,
    need: list[bool],
    gates: bool,
    norms: bool,
    extra: Extra = PLAIN,
) -> list[Tensor]:
    H, (B, R) = weight_hh.shape[0] // cell.G, state[0].shape
    shape, GH = x.shape[:-1], weight_hh.shape[0]
    T, steps = _steps(x, B, batch_sizes, lengths)
    tokenless, ragged = x.numel() == 0, lengths is not None
    weight_hh, heads = _blocks(weight_hh, extra.heads)
    raw, acts = (None if weight_hr is None else saved[cell.S]), saved[-1]

    def like(wanted: bool, *size: int, rows: bool = False) -> Tensor | None:
        """A gradient to fill; rows that no step visits and weights that no token reaches are zero."""
        return empty(x, *(shape if rows else ()), *size, zero=ragged if rows else tokenless) if wanted else None

    by_gates = gates or (need[0] and weight_ih is None)
    dgates = like(by_gates, GH, rows=True)
    dr = like(gates and bool(cell.split), GH, rows=True)
    v = like(gates and bool(cell.second), H, rows=True)
    dproj = like(gates and weight_hr is not None, R, rows=True)
    dp = like(gates and cell.P > 0 and need[6], cell.P * H, rows=True)
    weights = [w and not gates for w in need]
    dx = like(weights[0] and weight_ih is not None, x.shape[-1], rows=True)
    dw_ih, db_ih = like(weights[1], GH, x.shape[-1]), like(weights[2], GH)
    dw_hh, db_hh = like(weights[3], *weight_hh.shape), like(weights[4], GH)
    dw_hr, dparams = like(weights[5], R, H), like(cell.P > 0 and weights[6], cell.P, H)
    size = torch.zeros(T, cell.S + 1, dtype=torch.float64) if norms else None
    if tokenless or acts.shape[0] == 0:
        dstate = [torch.zeros_like(s) if g is None else g.clone() for s, g in zip(state, grads[cell.S :])]
    else:
        dstate = [torch.empty_like(s) for s in state]
        tensors = [
            *steps, extra.params, extra.seed, extra.flags,
            x, weight_ih, weight_hh, weight_hr, raw, acts, *saved[: cell.S], *state, *grads,
            dx, dw_ih, db_ih, dw_hh if cell.recurrent else None, db_hh, dw_hr, dparams, *dstate,
            dgates, dr, v, dproj, dp, size,
        ]  # fmt: skip
        build().recurrent(
            entries(cell, x.dtype)[1], _sizes(x, T, H, state, reverse, extra, heads), [*extra.noise, extra.clip],
            addresses(tensors),
        )  # fmt: skip
    if dw_hh is not None and heads != extra.heads:
        dw_hh = blocks(dw_hh, extra.heads)
    first = (
        [dgates, dr, v, dproj, dp]
        if gates
        else [dgates if dx is None else dx, dw_ih, db_ih, dw_hh, db_hh, dw_hr, dparams]
    )
    return [t for t in (*first, *dstate, size) if t is not None]
