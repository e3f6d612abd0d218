"""A GPU made of fibers: the kernels of csrc/cuda, compiled for the CPU against `twin.h`, launched on CPU tensors.

`Twin` stands where `gradkernels.backends.cuda.driver.Machine` does; the fixture `twin` puts it there:

    from tests.cuda_on_cpu.machine import twin

    def test_something(twin):
        gk.ops.recurrent(..., backend="cuda")  # on CPU tensors
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
import re
import subprocess
import uuid
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from gradkernels.cells.codegen import device_struct
from tests.csrc.test_sanitizers import need

HERE = Path(__file__).resolve().parent
KERNELS = HERE.parents[1] / "csrc" / "cuda"
BUILD = HERE.parents[1] / "build" / "twin"

COMPILER = os.environ.get("CXX", "g++").split()
FLAGS = ["-std=c++17", "-fPIC", "-fno-strict-aliasing", "-fno-gnu-unique", "-fvisibility=hidden"]
SANITIZERS = {  # of a kernel; "plain" is what runs within Python, where a failed check is a fault of the twin
    "plain": ["-O1", "-fsanitize=alignment,bounds,null"],
    "thread": ["-O1", "-g1", "-fsanitize=thread"],
    "address": ["-O1", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
}
ORDERS = ("round robin", "random", "priorities", "starve")  # as in runtime.h


class Fault(RuntimeError):
    """A kernel did what no kernel may do."""


class Hang(RuntimeError):
    """Everybody waits; the message says who and where."""


@dataclass(frozen=True)
class Schedule:
    """The order in which threads run."""

    order: str = "round robin"
    seed: int = 0

    def __str__(self) -> str:
        return f"{self.order} {self.seed}"


# What is missing shows in some order: the last two let some warps run far ahead of others.
SCHEDULES = (Schedule(), Schedule("random", 1), Schedule("priorities", 1), Schedule("priorities", 2))


class _Launch(ctypes.Structure):
    _fields_ = [(n, ctypes.c_int) for n in ("blocks", "cluster", "threads", "shared_bytes", "resident", "order")] + [
        ("seed", ctypes.c_uint),
        ("left_out", ctypes.c_char_p),
    ]


class Twin:
    """One GPU, as `driver.Machine` describes it; `schedule` and `resident` may be changed at any time.

    Args:
        capability: before (9, 0) there are no clusters.
        multiprocessors: each has room for one block.
        resident: blocks that run at the same time; None: one for each multiprocessor.
    """

    name = "twin"
    shared_bytes = 227 << 10
    max_cluster = 16

    def __init__(self, capability: tuple[int, int] = (9, 0), multiprocessors: int = 16, resident: int | None = None):
        self.capability = capability
        self.multiprocessors = multiprocessors
        self.resident = resident
        self.schedule = Schedule()
        self._kernels: dict[object, Kernel] = {}
        self.launches: list[tuple[object, int]] = []  # (variant, blocks) of all so far
        self.watch: Callable[[Kernel, int, ctypes.Structure], None] | None = None  # called before every launch

    def kernel(self, variant) -> Kernel:
        if variant not in self._kernels:
            self._kernels[variant] = Kernel(self, variant)
        return self._kernels[variant]

    def compile(self, variants: Iterable) -> None:
        """All of them, as many at once as there are cores, for those who know what they will need."""
        objects(variants, clusters=self.capability >= (9, 0))


class Kernel:
    """A compiled variant, as `driver.Kernel` describes it."""

    spilled = 0  # a CPU has no such limit

    def __init__(self, machine: Twin, variant):
        if variant.shared_bytes > machine.shared_bytes:
            raise RuntimeError(f"{variant.shared_bytes} bytes of shared memory, but a block has {machine.shared_bytes}")
        if variant.C > (machine.max_cluster if machine.capability >= (9, 0) else 1):
            raise RuntimeError(f"no clusters of {variant.C} blocks")
        self.machine, self.variant = machine, variant
        (path,) = objects([variant], clusters=machine.capability >= (9, 0))
        # PyDLL keeps the interpreter's lock: threads of Python launch one after the other.
        self.library = ctypes.PyDLL(str(path))
        for name in ("gk_report", "gk_sites"):
            getattr(self.library, name).restype = ctypes.c_char_p

    def resident(self) -> int:
        machine = self.machine
        blocks = machine.multiprocessors if machine.resident is None else machine.resident
        return blocks // self.variant.C

    def launch(self, blocks: int, arguments: ctypes.Structure) -> None:
        self.machine.launches.append((self.variant, blocks))
        if self.machine.watch is not None:
            self.machine.watch(self, blocks, arguments)
        self.run(blocks, arguments)

    def run(self, blocks: int, arguments: ctypes.Structure, left_out: str = "") -> None:
        """A launch in which the site `left_out` does nothing."""
        size = ctypes.c_int.in_dll(self.library, "gk_arguments").value
        if ctypes.sizeof(arguments) != size:
            raise RuntimeError(f"the arguments are of {ctypes.sizeof(arguments)} bytes, the kernel takes {size}")
        variant, schedule = self.variant, self.machine.schedule
        how = _Launch(
            blocks, variant.C, variant.threads, variant.shared_bytes, self.resident() * variant.C,
            ORDERS.index(schedule.order), schedule.seed, left_out.encode(),
        )  # fmt: skip
        outcome = self.library.gk_launch(ctypes.byref(how), ctypes.byref(arguments))
        if outcome:
            raise (Fault if outcome == 1 else Hang)(f"{variant}, {schedule}: {self.library.gk_report().decode()}")

    @property
    def sites(self) -> list[str]:
        """The synchronising calls of the last launch, as file:line primitive."""
        return self.library.gk_sites().decode().splitlines()

    @property
    def bank_conflicts(self) -> int:
        """How many accesses of load_tiles the last launch had to repeat."""
        return self.library.gk_bank_conflicts()


def objects(variants: Iterable, sanitizer: str = "plain", clusters: bool = True) -> list[Path]:
    """The shared objects of variants, compiled unless they are there from the same sources and flags."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(lambda v: _object(v, sanitizer, clusters), variants))


def _object(variant, sanitizer: str, clusters: bool) -> Path:
    cells = device_struct(variant.cell) if getattr(variant, "cell", None) is not None else ""
    text = "\n".join(
        [
            '#include "platform.cuh"',
            variant.source(),
            f"using Arguments = gk::{variant.arguments};",
            "#pragma GCC visibility push(default)",
            'extern "C" {',
            "extern const int gk_arguments = sizeof(Arguments);",
            "int gk_launch(const gk::twin::Launch &how, const void *arguments) {",
            "  return gk::twin::launch(how, [](const void *p) { run(*static_cast<const Arguments *>(p)); }, arguments);",
            "}",
            "}\n",
        ]
    )
    # Like NVRTC: what a template names in a branch that is not taken need not be there.
    flags = [*FLAGS, *SANITIZERS[sanitizer], *([] if clusters else ["-DGK_CLUSTERS=0", "-fpermissive"])]
    parts = [
        _runtime(n) for n in ("runtime.cpp", "scheduler.cpp", *(("undefined.cpp",) if sanitizer == "plain" else ()))
    ]
    made_of = [text, cells, *flags, sorted(_headers(text + cells).items()), *map(str, parts)]
    key = hashlib.sha256(repr(made_of).encode() + _version())
    folder = BUILD / key.hexdigest()[:24]
    target = folder / "kernel.so"
    if not target.exists():
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "cells.cuh").write_text(cells)
        (folder / "kernel.cpp").write_text(text)
        includes = [f"-I{p}" for p in (folder, KERNELS, HERE)]
        _compile([*flags, *includes, "-c", folder / "kernel.cpp"], folder / "kernel.o")
        # In Python without the sanitizer's own library, which would answer where `undefined.cpp` is to.
        library = [] if sanitizer == "plain" else SANITIZERS[sanitizer]
        _compile(["-shared", *library, folder / "kernel.o", *parts], target)
    return target


def _runtime(name: str) -> Path:
    """Never instrumented: a race detector is to see the kernel alone."""
    return compiled(
        [HERE / name, HERE / "runtime.h", HERE / "state.h"], [*FLAGS, "-O2", "-c", HERE / name], f"{Path(name).stem}.o"
    )


def compiled(sources: list[Path], arguments: list, name: str) -> Path:
    """What the compiler makes of arguments, unless it is there from the same sources."""
    digest = hashlib.sha256(repr(list(map(str, arguments))).encode() + _version())
    for path in sources:
        digest.update(path.read_bytes())
    target = BUILD / digest.hexdigest()[:24] / name
    if not target.exists():
        _compile(arguments, target)
    return target


def _compile(arguments: list, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    made = target.with_name(f"{target.name}-{uuid.uuid4().hex}")  # others may be at it too
    line = [*COMPILER, *map(str, arguments), "-o", str(made)]
    done = subprocess.run(line, check=False, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(line)}\n{done.stderr[-8000:]}")
    made.replace(target)


def _headers(text: str, seen: dict[str, str] | None = None) -> dict[str, str]:
    """The headers of ours that a text includes, and those that they include."""
    seen = {} if seen is None else seen
    for name in re.findall(r'#include "(.*)"', text):
        path = next((p / name for p in (KERNELS, HERE) if (p / name).exists()), None)
        if path is not None and name not in seen:
            seen[name] = path.read_text()
            _headers(seen[name], seen)
    return seen


@functools.cache
def _version() -> bytes:
    return subprocess.run([*COMPILER, "--version"], check=True, capture_output=True).stdout


@contextlib.contextmanager
def in_place(machine: Twin) -> Iterator[None]:
    """Within, `backend="cuda"` takes CPU tensors and launches on that machine, and fresh memory is full of NaN."""
    from gradkernels import backends
    from gradkernels.backends.cuda import driver

    deterministic = torch.are_deterministic_algorithms_enabled()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(driver, "machine", lambda device: machine)
        patch.setattr(driver, "why_not", lambda device: None)
        patch.setattr(backends, "_chosen", {})  # what it remembers of other tests
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(deterministic)


@pytest.fixture
def twin() -> Iterator[Twin]:
    """The machine of every device, for one test."""
    need("address")
    machine = Twin()
    with in_place(machine):
        yield machine
