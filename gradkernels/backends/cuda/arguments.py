"""The structures of csrc/cuda/arguments.cuh for the host, field by field; a test compares offsets.

What is a pointer there is the address of a tensor here, 0 for none.
"""

from __future__ import annotations

import ctypes
import enum
from collections.abc import Sequence
from ctypes import c_int, c_void_p

from torch import Tensor

MAX_STATES = 8
States = c_void_p * MAX_STATES


class Walk(ctypes.Structure):
    _fields_ = [
        *((n, c_int) for n in ("T", "B", "H", "reverse")),
        *((n, c_void_p) for n in ("rows", "first", "order")),
    ]


class Team(ctypes.Structure):
    _fields_ = [("size", c_int), ("arrivals", c_void_p), ("exchange", c_void_p)]


class ForwardArgs(ctypes.Structure):
    _fields_ = [
        ("walk", Walk),
        ("team", Team),
        *((n, c_void_p) for n in ("gates", "w_hh", "b_hh")),
        *((n, States) for n in ("state", "seq", "final_state")),
        ("acts", c_void_p),
    ]


class BackwardArgs(ctypes.Structure):
    _fields_ = [
        ("walk", Walk),
        ("team", Team),
        *((n, c_void_p) for n in ("w_hh", "acts")),
        *((n, States) for n in ("seq", "state", "dseq", "dfinal")),
        *((n, c_void_p) for n in ("dgates", "dr", "operand")),
        ("dstate", States),
        ("norms", c_void_p),
    ]


class Stage(enum.IntEnum):
    CELL = 0
    SECOND = 1
    PROJECT = 2


class StepForwardArgs(ctypes.Structure):
    _fields_ = [
        ("walk", Walk),
        *((n, c_int) for n in ("step", "stage", "R")),
        *((n, c_void_p) for n in ("gates", "b_hh", "product", "second")),
        ("state", States),
        *((n, c_void_p) for n in ("operand", "wide")),
        *((n, States) for n in ("seq", "final_state")),
        *((n, c_void_p) for n in ("raw", "acts")),
    ]


class StepBackwardArgs(ctypes.Structure):
    _fields_ = [
        ("walk", Walk),
        *((n, c_int) for n in ("step", "stage", "R", "blocks")),
        *((n, c_void_p) for n in ("acts", "raw")),
        *((n, States) for n in ("seq", "state", "dseq")),
        *((n, c_void_p) for n in ("product", "second")),
        ("adjoint", States),
        *((n, c_void_p) for n in ("operand", "wide", "dgates", "dr", "v", "dproj")),
        ("dstate", States),
        ("norms", c_void_p),
    ]


def address(v: Tensor | None) -> int:
    return 0 if v is None else v.data_ptr()


def addresses(tensors: Sequence[Tensor | None]) -> ctypes.Array[c_void_p]:
    """One per state; those that the cell has not are null."""
    return States(*map(address, tensors))
