"""What has to be measured in processes of its own: peak memory, two trainings at once, and the first step of a new cell.

Memory: a fresh process imports everything, trains a tiny layer once (so that libraries, thread pools and code are loaded), builds the
layer, its input and the outputs' gradient, and notes what is resident. Then it resets the kernel's high-water mark, trains for three
steps and reads the mark: what is reported is mark less resident, so saved activations, gradients, workspaces and the slack of the
allocator count, and libraries, weights and input don't. Where the high-water mark cannot be reset (not Linux) it is that of the
process, less that before the three steps.
Two at once: two processes with all the machine's threads each wait for one another, then train for the same seconds; the slower one
of the two counts.
First step: a fresh process imports everything and trains a tiny layer of another cell; then it defines the cell, builds the layer and
trains one step. Whatever is compiled on the way is kept in a folder made for the occasion: empty when the first one looks into it.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from bench.cases import Case
from bench.machine import ROOT
from bench.measure import Spread
from bench.providers import build

STEPS = 3
CACHES = ("GRADKERNELS_CACHE", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")
HANGS = 900  # seconds after which a child is given up
MIB = 1 << 20


class ChildFailed(RuntimeError):
    """A measuring process ended with an error; its last words are in the text."""


def resident() -> tuple[float, float]:
    """MiB resident now, and at most since the mark was reset."""
    try:
        with open("/proc/self/status") as f:
            fields = dict(line.split(":", 1) for line in f)
    except FileNotFoundError:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / MIB
        return peak, peak
    return tuple(int(fields[key].split()[0]) / 1024 for key in ("VmRSS", "VmHWM"))  # type: ignore[return-value]


def reset_mark() -> None:
    """From here on the high-water mark is counted anew; memory that the allocator holds without need goes back before."""
    gc.collect()
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        if hasattr(libc, "malloc_trim"):  # glibc
            libc.malloc_trim(0)
        with open("/proc/self/clear_refs", "w") as f:
            f.write("5")


def memory_here(case: Case, key: str) -> dict[str, float]:
    """Peak MiB of three training steps above what was resident before them, in this process."""
    tiny = replace(case, T=2, B=2, H=8, proj_size=4 if case.proj_size else 0, layout="padded", tokens=None)
    build(tiny, key).run()
    provider = build(case, key)
    reset_mark()
    before, _ = resident()
    for _ in range(STEPS):
        provider.run()
    return {"before": before, "peak": resident()[1]}


def train_here(case: Case, key: str, seconds: float) -> list[float]:
    """Milliseconds of every step, from the word to go for that long."""
    provider = build(case, key)
    for _ in range(2):
        provider.run()
    print("ready", flush=True)
    sys.stdin.readline()
    found, end = [], time.perf_counter() + seconds
    while (begin := time.perf_counter()) < end or len(found) < 3:
        provider.run()
        found.append((time.perf_counter() - begin) * 1e3)
    return found


def first_step_here(case: Case, key: str) -> float:
    """Milliseconds from a cell's definition to the end of its first training step, in this process."""
    build(Case("", "lstm", "training", 2, 2, 8, backend=case.backend), "ours").run()
    begin = time.perf_counter()
    build(case, key).run()
    return (time.perf_counter() - begin) * 1e3


def start(
    what: str, case: Case, key: str, threads: int, seconds: float = 0.0, cache: str | None = None
) -> subprocess.Popen[str]:
    """A fresh Python at that. cache: a folder for what it compiles."""
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    task = json.dumps({"what": what, "case": case.as_dict(), "key": key, "threads": threads, "seconds": seconds})
    return subprocess.Popen(
        [sys.executable, str(Path(__file__).resolve()), task],
        env={**os.environ, "PYTHONPATH": path, **(dict.fromkeys(CACHES, cache) if cache else {})},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(child: subprocess.Popen[str]) -> Any:
    """What the child found. ChildFailed with the end of its error output if it failed."""
    try:
        out, err = child.communicate(timeout=HANGS)
    except subprocess.TimeoutExpired as e:
        child.kill()
        child.communicate()
        raise ChildFailed(f"nothing after {HANGS} s") from e
    if child.returncode:
        raise ChildFailed(f"exit status {child.returncode}: {err.strip()[-2000:]}")
    return json.loads(out.splitlines()[-1])


def memory(case: Case, threads: int, repeat: int = 1) -> dict[str, Spread]:
    """Peak MiB of each provider, every time in a fresh process."""
    found: dict[str, list[float]] = {key: [] for key in case.providers}
    for _ in range(repeat):
        for key, samples in found.items():
            got = finish(start("memory", case, key, threads))
            samples.append(got["peak"] - got["before"])
    return {key: Spread.of(samples) for key, samples in found.items()}


def first_step(case: Case, threads: int, repeat: int = 3) -> dict[str, Spread]:
    """Milliseconds to the end of a first training step of each provider; `ours` finds what `ours_cold` has compiled."""
    found: dict[str, list[float]] = {key: [] for key in case.providers}
    for _ in range(repeat):
        with tempfile.TemporaryDirectory(prefix="gradkernels-bench-") as cache:
            for key in sorted(found, key=lambda key: key != "ours_cold"):
                found[key].append(finish(start("first step", case, key, threads, cache=cache)))
    return {key: Spread.of(samples) for key, samples in found.items()}


def processes(case: Case, threads: int, seconds: float, repeat: int = 2) -> dict[str, Spread]:
    """Milliseconds of a training step of each provider while two processes of it train at once: of the slower of the two."""
    found: dict[str, list[list[float]]] = {key: [[], []] for key in case.providers}
    for turn in range(repeat):
        for key in list(found)[:: 1 if turn % 2 == 0 else -1]:
            pair = [start("train", case, key, threads, seconds) for _ in range(2)]
            for child in pair:
                assert child.stdout is not None
                child.stdout.readline()  # "ready", or nothing from one that failed: finish() tells
            for child in pair:
                if child.poll() is None:
                    assert child.stdin is not None
                    child.stdin.write("go\n")
                    child.stdin.flush()
            for samples, child in zip(found[key], pair):
                samples.extend(finish(child))
    return {key: max((Spread.of(samples) for samples in both), key=lambda s: s.median) for key, both in found.items()}


def main() -> None:
    task = json.loads(sys.argv[1])
    torch.set_num_threads(task["threads"])
    case = Case.from_dict(task["case"])
    if task["what"] == "memory":
        got: Any = memory_here(case, task["key"])
    elif task["what"] == "first step":
        got = first_step_here(case, task["key"])
    else:
        got = train_here(case, task["key"], task["seconds"])
    print(json.dumps(got))


if __name__ == "__main__":
    main()
