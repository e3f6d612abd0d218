"""The twin itself: every primitive against numpy, what it calls a fault, and what it says when everybody waits."""

import ctypes
import itertools
import re
from dataclasses import dataclass

import numpy as np
import pytest

from tests.cuda_on_cpu.machine import HERE, KERNELS, ORDERS, Fault, Hang, Schedule, Twin

NUMBERS = ("bf16", "fp16", "tf32", "fp32")
SCHEDULE = [Schedule(), *(Schedule(o, s) for o in ORDERS[1:] for s in (1, 2))]


class Args(ctypes.Structure):
    _fields_ = [
        *((n, ctypes.c_void_p) for n in ("taken", "out", "counter")),
        *((n, ctypes.c_int) for n in ("n", "which")),
    ]


@dataclass(frozen=True)
class Small:
    """One kernel of kernels.cuh."""

    struct: str
    threads: int = 32
    C: int = 1
    cooperative: bool = False
    shared_bytes: int = 4096
    arguments: str = "Args"

    def source(self):
        return f'#include "kernels.cuh"\nextern "C" __global__ void run(gk::Args p) {{ gk::{self.struct}::run(p); }}\n'


def launch(small, taken, out, n=0, which=0, blocks=1, schedule=SCHEDULE[0], left_out="", **twin):
    """Runs it; out is written to. -> the kernel"""
    machine = Twin(**twin)
    machine.schedule = schedule
    kernel = machine.kernel(small)
    counter = np.zeros(1, np.uint32)
    kernel.run(blocks, Args(taken.ctypes.data, out.ctypes.data, counter.ctypes.data, n, which), left_out)
    return kernel


@pytest.mark.parametrize("lanes", [1, 2, 16, 31])
def test_shuffles(lanes):
    x, out = np.random.default_rng(0).standard_normal(32), np.empty(64)
    launch(Small("Shuffles"), x, out, lanes)
    there = x[np.arange(32) ^ lanes]
    np.testing.assert_array_equal(out, np.concatenate([there, there.astype(np.float32)]))
