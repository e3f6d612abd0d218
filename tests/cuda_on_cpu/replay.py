"""Launches on the twin, recorded with all the memory that they can reach, and run again: by another program with a
sanitizer, in another order, with a synchronising call left out."""

from __future__ import annotations

import ctypes
import functools
import gc
import os
import struct
import subprocess
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from tests.csrc.test_sanitizers import fixed_addresses
from tests.cuda_on_cpu.machine import HERE, ORDERS, SANITIZERS, SCHEDULES, Kernel, Schedule, compiled, objects

OPTIONS = {
    "ASAN_OPTIONS": "detect_leaks=1:detect_stack_use_after_return=0",
    "UBSAN_OPTIONS": "print_stacktrace=1",
    "TSAN_OPTIONS": "halt_on_error=1:report_signal_unsafe=0:history_size=4",
}
OUTCOMES = {0: "done", 1: "fault", 2: "hang"}


@dataclass(frozen=True)
class Run:
    """What came of a launch."""

    outcome: str  # done, fault, hang; race or memory where a sanitizer ended it
    report: str
    sites: tuple[str, ...]
    memory: bytes  # all buffers, afterwards

    def same(self, other: Run) -> bool:
        return self.outcome == other.outcome == "done" and self.memory == other.memory


@dataclass(frozen=True, eq=False)
class Case:
    """A launch that can be run again."""

    variant: object
    name: str
    text: bytes  # as program.cpp reads it
    warps: int
    clusters: bool

    def run(self, sanitizer: str = "plain", schedule: Schedule = Schedule(), left_out: str = "") -> Run:  # noqa: B008
        (kernel,) = objects([self.variant], sanitizer, self.clusters)
        with tempfile.TemporaryDirectory() as folder:
            source, target = Path(folder, "case"), Path(folder, "out")
            source.write_bytes(self.text)
            line = [*fixed_addresses(), program(sanitizer), kernel, source, target]
            line += [ORDERS.index(schedule.order), schedule.seed, left_out]
            done = subprocess.run(
                list(map(str, line)),
                check=False,
                capture_output=True,
                text=True,
                timeout=300,
                env={**os.environ, **OPTIONS},
            )
            sites, _, report = done.stdout.partition("--\n")
            memory = target.read_bytes() if target.exists() else b""
        if done.returncode not in OUTCOMES or done.stderr and sanitizer == "thread":
            outcome = "race" if "ThreadSanitizer: data race" in done.stderr else "memory" if done.stderr else "crash"
            return Run(outcome, f"status {done.returncode}\n{done.stderr}", (), b"")
        return Run(OUTCOMES[done.returncode], report.strip(), tuple(sites.splitlines()), memory)


def capture(kernel: Kernel, blocks: int, arguments: ctypes.Structure, name: str = "") -> Case:
    """A launch that is about to be made: every pointer among the arguments is to lie in the memory of some tensor."""
    storages = {s.data_ptr(): s for s in (t.untyped_storage() for t in _tensors())}
    places = [(at, value) for at, value in _pointers(arguments) if value]
    owners: list[int] = []
    pointers = []
    for at, value in places:
        owner = next((p for p, s in storages.items() if p <= value < p + max(s.nbytes(), 1)), None)
        if owner is None:
            raise ValueError(f"byte {at} of {type(arguments).__name__} points to no tensor's memory")
        if owner not in owners:
            owners.append(owner)
        pointers += [at, owners.index(owner), value - owner]
    variant, image = kernel.variant, bytes(arguments)
    sizes = [blocks, variant.C, variant.threads, variant.shared_bytes, kernel.resident() * variant.C]
    text = struct.pack("8i", *sizes, len(image), len(owners), len(places)) + image
    text += struct.pack(f"{len(owners)}q", *(storages[p].nbytes() for p in owners))
    text += struct.pack(f"{len(pointers)}q", *pointers)
    text += b"".join(ctypes.string_at(p, storages[p].nbytes()) for p in owners)
    warps = blocks * variant.threads // 32
    return Case(variant, name or str(variant), text, warps, kernel.machine.capability >= (9, 0))


def _tensors() -> list[torch.Tensor]:
    plain = lambda t: t.layout == torch.strided and t.device.type == "cpu"
    return [t for t in gc.get_objects() if type(t) in (torch.Tensor, torch.nn.Parameter) and plain(t)]


def _pointers(structure, at: int = 0) -> Iterator[tuple[int, int | None]]:
    """(offset, address) of every pointer in a structure, also in the structures and arrays within it."""
    if isinstance(structure, ctypes.Array):
        size = ctypes.sizeof(structure._type_)
        members = [(at + i * size, structure._type_, v) for i, v in enumerate(structure)]
    else:
        members = [
            (at + getattr(type(structure), n).offset, t, getattr(structure, n)) for n, t, *_ in structure._fields_
        ]
    for place, kind, value in members:
        if kind is ctypes.c_void_p:
            yield place, value
        elif issubclass(kind, (ctypes.Structure, ctypes.Array)):
            yield from _pointers(value, place)


@functools.cache
def program(sanitizer: str) -> Path:
    flags = ["-std=c++17", *(() if sanitizer == "plain" else SANITIZERS[sanitizer])]
    return compiled(
        [HERE / "program.cpp", HERE / "runtime.h"], [*flags, HERE / "program.cpp", "-ldl"], f"program-{sanitizer}"
    )


def findings(case: Case) -> list[str]:
    """What is wrong with a launch as it is: it has to end in the same bits in every order, and under every sanitizer."""
    first = case.run()
    if first.outcome != "done":
        return [f"{case.name}: {first.outcome}: {first.report}"]
    starved = [Schedule("starve", warp) for warp in range(min(case.warps, 8))]  # the others do the same in other blocks
    ways = [("plain", s) for s in (*SCHEDULES[1:], *starved)]
    ways += [("thread", s) for s in SCHEDULES[:2]] + [("address", SCHEDULES[0])]

    def finding(way: tuple[str, Schedule]) -> str:
        run = case.run(*way)
        report = run.report if run.outcome != "done" else "other values"
        return "" if run.same(first) else f"{case.name}, {way[0]}, {way[1]}: {run.outcome}: {report[:4000]}"

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return [found for found in pool.map(finding, ways) if found]


def missed_without(cases: list[Case]) -> dict[str, str]:
    """Every synchronising call that any of the cases meets, and how it was missed when it was left out: by the outcome
    or the values of one of the cases in one of the orders, else by the race detector. "" is not at all: it is not needed,
    or the cases are too small to need it.
    """
    whole = [case.run() for case in cases]
    for case, run in zip(cases, whole):
        if run.outcome != "done":
            raise RuntimeError(f"{case.name}: {run.outcome}: {run.report}")
    ways = [("plain", s) for s in SCHEDULES] + [("thread", SCHEDULES[0])]

    def missed(site: str) -> str:
        for sanitizer, schedule in ways:
            for case, run in zip(cases, whole):
                if site in run.sites:
                    now = case.run(sanitizer, schedule, site)
                    if not now.same(run):
                        return f"{'values' if now.outcome == 'done' else now.outcome}, {schedule}, {case.name}"
        return ""

    sites = sorted({site for run in whole for site in run.sites})
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return dict(zip(sites, pool.map(missed, sites)))
