"""From the text of a kernel to machine code, by NVRTC alone: no toolkit, no include path, no GPU.

The headers are csrc/cuda/*.cuh, handed over as text; besides them there is cells.cuh, which is printed for each cell.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from gradkernels.backends import _cache as cache

OPTIONS = (
    "--std=c++17",
    "--device-as-default-execution-space",  # constant expressions of a struct may be used in a kernel
    "--generate-line-info",  # for profilers and compute-sanitizer; the code is the same
    "--ptxas-options=-v",  # registers and spills, in the log
)
INSTALL = "pip install cuda-bindings nvidia-cuda-nvrtc"


@dataclass(frozen=True)
class Compiled:
    """Machine code, and what the compiler said of it."""

    cubin: bytes
    log: str

    @property
    def registers(self) -> int:
        """Of one thread."""
        return self._said(r"Used (\d+) registers")

    @property
    def spilled(self) -> int:
        """Bytes of a thread's memory that stand in for registers, written and read."""
        return self._said(r"(\d+) bytes spill stores") + self._said(r"(\d+) bytes spill loads")

    @property
    def stack(self) -> int:
        """Bytes of a thread's memory: spilled registers, and arrays that are indexed by what is not a constant."""
        return self._said(r"(\d+) bytes stack frame")

    def _said(self, pattern: str) -> int:
        found = re.search(pattern, self.log)
        if found is None:
            raise RuntimeError(f"NVRTC {'.'.join(map(str, version()))} does not say '{pattern}': {self.log!r}")
        return int(found[1])


@functools.cache
def bindings() -> ModuleType:
    """cuda.bindings.nvrtc, with the library found; RuntimeError with the reason and how to get it."""
    try:
        from cuda.bindings import nvrtc
    except ImportError as e:
        raise RuntimeError(f"cuda-bindings cannot be imported ({e}); {INSTALL}") from e
    try:
        nvrtc.nvrtcVersion()
    except RuntimeError as e:
        raise RuntimeError(f"NVRTC was not found ({str(e).splitlines()[0]}); {INSTALL}") from e
    return nvrtc


def why_not() -> str | None:
    """The reason why nothing can be compiled here, or None."""
    try:
        bindings()
        headers()
    except RuntimeError as e:
        return str(e)
    return None


@functools.cache
def version() -> tuple[int, int]:
    _, major, minor = bindings().nvrtcVersion()
    return major, minor


@functools.cache
def supported() -> frozenset[int]:
    """Architectures that this NVRTC compiles for, as 90 for sm_90."""
    return frozenset(_check(bindings().nvrtcGetSupportedArchs()))


def architecture(capability: tuple[int, int]) -> str:
    """The compiler's name of a GPU of this compute capability, with what only that generation has.

    >>> architecture((8, 0)), architecture((9, 0)), architecture((12, 0))
    ('sm_80', 'sm_90a', 'sm_120')
    """
    major, minor = capability
    return f"sm_{major}{minor}{'a' if major in (9, 10) else ''}"


@functools.cache
def headers() -> Mapping[str, str]:
    """Name and text of every header; they are beside the package in a checkout and inside it where it was installed."""
    package = Path(__file__).resolve().parents[2]
    for root in (package, package.parent):
        found = {p.name: p.read_text(encoding="utf-8") for p in sorted((root / "csrc" / "cuda").glob("*.cuh"))}
        if found:
            return found
    raise RuntimeError(
        f"the kernels' sources csrc/cuda are neither in {package} nor beside it; install gradkernels again"
    )


def compile(source: str, headers: Mapping[str, str], arch: str, options: tuple[str, ...] = OPTIONS) -> Compiled:
    """Compile, or take from disk what these sources, options, architecture and compiler once gave.

    Raises:
        RuntimeError: they do not compile, with the first error and the compiler's whole log; there is no NVRTC.
    """
    texts = [part for name in sorted(headers) for part in (name, headers[name])]
    name = cache.key([source, *texts, arch, *options, repr(version())])
    known = cache.load(name)
    if known is not None:
        log, _, cubin = known.partition(b"\0")
        return Compiled(cubin, log.decode())
    made = _compile(source, headers, (f"--gpu-architecture={arch}", *options))
    cache.store(name, made.log.encode() + b"\0" + made.cubin)
    return made


def _compile(source: str, headers: Mapping[str, str], options: tuple[str, ...]) -> Compiled:
    nvrtc = bindings()
    texts, names = [t.encode() for t in headers.values()], [n.encode() for n in headers]
    program = _check(nvrtc.nvrtcCreateProgram(source.encode(), b"kernel.cu", len(names), texts, names))
    try:
        (status,) = nvrtc.nvrtcCompileProgram(program, len(options), [o.encode() for o in options])
        text = b" " * _check(nvrtc.nvrtcGetProgramLogSize(program))
        _check(nvrtc.nvrtcGetProgramLog(program, text))
        log = text.rstrip(b"\0").decode(errors="replace")
        if int(status):
            raise RuntimeError(_failure(status.name, log, options))
        cubin = b" " * _check(nvrtc.nvrtcGetCUBINSize(program))
        _check(nvrtc.nvrtcGetCUBIN(program, cubin))
    finally:
        nvrtc.nvrtcDestroyProgram(program)
    return Compiled(cubin, log)


def _failure(status: str, log: str, options: tuple[str, ...]) -> str:
    first = next((line for line in log.splitlines() if "error" in line), status)
    by = f"NVRTC {'.'.join(map(str, version()))} with {' '.join(options)}"
    return f"a CUDA kernel does not compile: {first.strip()}\n{by}; {status}\n{log}"


def _check(result: tuple[Any, ...]) -> Any:
    status, *values = result
    if int(status):
        raise RuntimeError(f"NVRTC: {status.name}")
    return values[0] if len(values) == 1 else values
