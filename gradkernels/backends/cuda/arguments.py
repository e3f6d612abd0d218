"""The structures of csrc/cuda/arguments.cuh for the host, field by field; a test compares offsets.

What is a pointer there is the address of a tensor here, 0 for none.
"""

from __future__ import annotations

import ctypes
import enum
from collections.abc import Sequence
from ctypes import c_float, c_int, c_int64, c_uint, c_void_p

from torch import Tensor

from gradkernels.backends import _extra
from gradkernels.backends._extra import Extra
from gradkernels.backends.reference.philox import limit

MAX_STATES = 8
MAX_MASKS = 8
States = c_void_p * MAX_STATES


class Walk(ctypes.Structure):
    _fields_ = [
        *((n, c_int) for n in ("T", "B", "H", "reverse")),
        *((n, c_void_p) for n in ("rows", "first", "order")),
    ]


class Team(ctypes.Structure):
    _fields_ = [("size", c_int), ("arrivals", c_void_p), ("exchange", c_void_p)]


class MaskKind(enum.IntEnum):
    SAME = 0
    DRAWN = 1
    FIXED = 2
    GIVEN = 3


class Mask(ctypes.Structure):
    _fields_ = [("kind", c_int), ("below", c_uint), ("high", c_float)]


class ExtraArgs(ctypes.Structure):
    _fields_ = [
        *((n, c_void_p) for n in ("params", "seed", "flags")),
        *(("first", c_int64), ("skip", c_int), ("clip", c_float)),
        ("masks", Mask * MAX_MASKS),
    ]


class ForwardArgs(ctypes.Structure):
    _fields_ = [
        ("walk", Walk),
        ("team", Team),
        ("extra", ExtraArgs),
        *((n, c_void_p) for n in ("gates", "w_hh", "b_hh")),
        *((n, States) for n in ("state", "seq", "final_state")),
        ("acts", c_void_p),
    ]


class BackwardArgs(ctypes.Structure):
    _fields_ = [
        ("walk", Walk),
        ("team", Team),
        ("extra", ExtraArgs),
        *((n, c_void_p) for n in ("w_hh", "acts")),
        *((n, States) for n in ("seq", "state", "dseq", "dfinal")),
        *((n, c_void_p) for n in ("dgates", "dr", "operand")),
        ("dstate", States),
        *((n, c_void_p) for n in ("norms", "dparams")),
    ]


class Stage(enum.IntEnum):
    CELL = 0
    SECOND = 1
    PROJECT = 2


class StepForwardArgs(ctypes.Structure):
    _fields_ = [
        ("walk", Walk),
        ("extra", ExtraArgs),
        *((n, c_int) for n in ("step", "stage", "steps", "R")),
        *((n, c_void_p) for n in ("gates", "b_hh", "product", "second")),
        ("state", States),
        *((n, c_void_p) for n in ("operand", "wide")),
        *((n, States) for n in ("seq", "final_state")),
        *((n, c_void_p) for n in ("raw", "acts", "kept")),
    ]


class StepBackwardArgs(ctypes.Structure):
    _fields_ = [
        ("walk", Walk),
        ("extra", ExtraArgs),
        *((n, c_int) for n in ("step", "stage", "steps", "R", "blocks")),
        *((n, c_void_p) for n in ("acts", "raw")),
        *((n, States) for n in ("seq", "state", "dseq")),
        *((n, c_void_p) for n in ("product", "second")),
        ("adjoint", States),
        *((n, c_void_p) for n in ("operand", "wide", "dgates", "dr", "v", "dproj")),
        ("dstate", States),
        *((n, c_void_p) for n in ("norms", "dparams", "owed", "kept")),
    ]


def address(v: Tensor | None) -> int:
    return 0 if v is None else v.data_ptr()


def addresses(tensors: Sequence[Tensor | None]) -> ctypes.Array[c_void_p]:
    """One per state; those that the cell has not are null."""
    return States(*map(address, tensors))


def extras(extra: Extra) -> ExtraArgs:
    """Of a call; the tensors stay the caller's."""
    noise, drawn = extra.noise, extra.seed is not None
    masks = [_mask(p, high, kind, drawn) for p, high, kind in zip(noise[::3], noise[1::3], noise[2::3])]
    return ExtraArgs(
        address(extra.params), address(extra.seed), address(extra.flags), extra.first, extra.skip, extra.clip,
        (Mask * MAX_MASKS)(*masks),
    )  # fmt: skip


def _mask(p: float, high: float, kind: float, drawn: bool) -> Mask:
    if kind == _extra.GIVEN:
        return Mask(MaskKind.GIVEN)
    if not drawn or p == 0:
        return Mask(MaskKind.SAME, 0, (1 - p) * high)
    return Mask(MaskKind.FIXED if kind == _extra.FIXED else MaskKind.DRAWN, limit(p)[0], high)
