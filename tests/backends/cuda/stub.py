"""Python over the stub of a driver (stub_driver.c), in a process of its own: torch must not meet it."""

import functools
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from gradkernels.backends.cuda.variant import Variant
from gradkernels.cells import CELLS

HERE = Path(__file__).parent
ROOT = HERE.parents[2]
BUILD = ROOT / "build" / "stub"

PRELUDE = """
import ctypes, json, os, threading, warnings
import torch
from gradkernels.backends.cuda import driver
from gradkernels.backends.cuda.arguments import ForwardArgs
from gradkernels.cells import CELLS
from tests.backends.cuda.stub import calls, say, tiny

STREAM = 0x77
"""


@functools.cache
def library() -> Path:
    """The folder of a libcuda.so.1 that is the stub, current."""
    source = HERE / "stub_driver.c"
    BUILD.mkdir(parents=True, exist_ok=True)
    built = BUILD / "libcuda.so.1"
    if not built.exists() or built.stat().st_mtime < source.stat().st_mtime:
        own = BUILD / f"{os.getpid()}.so"
        command = ["gcc", "-shared", "-fPIC", "-O1", "-Wall", "-Werror", "-Wl,-soname,libcuda.so.1", source, "-o", own]
        subprocess.run(command, check=True)
        own.replace(built)
    return BUILD


def run(script: str, **settings: object) -> list:
    """What the script says (`say`), after the prelude, with STUB_* of these settings in its environment."""
    with tempfile.TemporaryDirectory() as folder:
        environment = {
            **os.environ,
            "GRADKERNELS_CACHE": str(ROOT / "build" / "cubins"),
            "PYTHONPATH": str(ROOT),
            "LD_LIBRARY_PATH": str(library()),
            "STUB_LOG": str(Path(folder) / "log"),
            "SAID": str(Path(folder) / "said"),
            **{f"STUB_{name}": str(value) for name, value in settings.items()},
        }
        command = [sys.executable, "-c", PRELUDE + script]
        done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        said = Path(folder) / "said"
        return [json.loads(line) for line in said.read_text().splitlines()] if said.exists() else []


# ---------------------------------------------------------------- inside that process


class Tiny(Variant):
    """A kernel that compiles at once."""

    @property
    def shared_bytes(self) -> int:
        return 1024 * self.SHARED

    def source(self) -> str:
        return '#include "arguments.cuh"\nextern "C" __global__ void run(gk::ForwardArgs p) {}\n'


def tiny(exchange: str, C: int, kilobytes: int = 0, kind: type[Tiny] = Tiny) -> Tiny:
    """256 threads."""
    return kind(CELLS["lstm"], "bf16", exchange, C, 64, 8, 8, 8, 1, 0, kilobytes)


def say(value: object) -> None:
    with open(os.environ["SAID"], "a", encoding="utf-8") as file:
        file.write(json.dumps(value) + "\n")


def calls(*names: str) -> list[str]:
    """Calls of the driver since the last time, of those names (all: none given)."""
    log = Path(os.environ["STUB_LOG"])
    lines = log.read_text().splitlines() if log.exists() else []
    log.unlink(missing_ok=True)
    return [line for line in lines if not names or line.split()[0] in names]
