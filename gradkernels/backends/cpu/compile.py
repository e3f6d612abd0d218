"""Drivers for a cell that did not come with the package: compiled once, kept on disk, loaded by every later process.

A cell is a struct of a few lines and the drivers are templates around it, so that there is one of its own for every cell, storage
type and instruction set. What is kept is named by the hash of all it was made of: sources, flags and compiler. Whoever waits
for a compilation is told so, by `logging`.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import os
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from gradkernels.backends import _cache as cache
from gradkernels.cells import Cell
from gradkernels.cells.codegen import struct, type_name
from gradkernels.notices import warn

from . import toolchain
from .toolchain import CompileError

LOG = logging.getLogger(__name__)
_LOADING = threading.Lock()


@functools.cache
def sources() -> Path:
    """The folder csrc, beside the package in a checkout and inside it where it was installed."""
    package = Path(__file__).resolve().parents[2]
    for root in (package, package.parent):
        if (root / "csrc" / "cpu" / "user_cell.cpp").exists():
            return root / "csrc"
    raise CompileError(f"the kernels' sources are neither in {package} nor beside it; install gradkernels again")


@functools.cache
def _texts() -> tuple[str, ...]:
    csrc = sources()
    paths = sorted([*csrc.glob("*.h"), *csrc.glob("cpu/*.h"), csrc / "cpu" / "user_cell.cpp"])
    return tuple(text for path in paths for text in (path.name, path.read_text(encoding="utf-8")))


@functools.cache
def _version() -> str:
    command = toolchain.compiler()
    try:
        done = subprocess.run([*command, "--version"], check=False, capture_output=True, text=True)
    except OSError as error:
        raise CompileError(f"{command[0]} does not run: {error}") from error
    return f"{command} {done.stdout}"


def why_not() -> str | None:
    """The reason why nothing can be compiled here, or None."""
    try:
        sources(), _version(), toolchain.ninja()
    except CompileError as error:
        return str(error)
    return None


def header(cell: Cell) -> str:
    """The text that a cell's drivers include."""
    return f"#pragma once\n\nnamespace gk {{\n\n{struct(cell)}\n}} // namespace gk\n"


def entries(cell: Cell, storage: str, isa: str) -> tuple[int, int]:
    """Addresses of the forward and the backward driver of a cell, compiled if this was not done before.

    Args:
        storage: "float", "double", "bfloat16" or "half".
        isa: of `toolchain.INSTRUCTION_SETS`.

    Raises:
        CompileError: there is no compiler, or it has failed, with what it said.
    """
    with _LOADING:
        library = ctypes.CDLL(str(_library(cell, storage, isa)))
    address = lambda name: ctypes.cast(getattr(library, name), ctypes.c_void_p).value or 0
    return address("gk_forward"), address("gk_backward")


def _name(cell: Cell, storage: str, isa: str) -> str:
    """Of everything that a library is made of."""
    flags = toolchain.FLAGS, toolchain.INSTRUCTION_SETS[isa]
    return cache.key([header(cell), *_texts(), *flags, storage, _version()])


def _library(cell: Cell, storage: str, isa: str) -> Path:
    folder, name = _folder(), _name(cell, storage, isa)
    target = folder / f"{name}.so"
    if target.exists():
        return target
    with _alone(folder / f"{name}.lock"):
        if not target.exists():  # nobody else was at it
            _compile(cell, storage, toolchain.INSTRUCTION_SETS[isa], target)
    return target


def _compile(cell: Cell, storage: str, flags: str, target: Path) -> None:
    LOG.warning("compiling the kernels of cell %r (%s): some seconds, once", cell.name, storage)
    folder = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.stem[:16]}-"))
    try:
        (folder / "user_cell.h").write_text(header(cell), encoding="utf-8")
        extra = f"{flags} -I. -DGK_STORAGE={storage} -DGK_CELL={type_name(cell)}"
        lines = toolchain.rules()
        for driver in ("forward", "backward"):
            define = f"{extra} -DGK_DRIVER={driver}"
            source = sources() / "cpu" / "user_cell.cpp"
            lines += toolchain.compile_to(f"{driver}.o", source, define, f"{driver} of {type_name(cell)} ({storage})")
        lines.append("build cell.so: link forward.o backward.o")
        toolchain.build(folder, lines, quiet=True)
        os.replace(folder / "cell.so", target)
    except OSError as error:  # the disk is full, say
        raise CompileError(str(error)) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _folder() -> Path:
    """Where libraries are kept; one of this process where none can be written."""
    folder = cache.folder()
    try:
        if folder is None:
            raise OSError("there is no home directory")
        folder = folder / "cells"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError as error:
        return _own_folder(str(error))


@functools.cache
def _own_folder(reason: str) -> Path:
    warn(
        f"compiled cells cannot be kept on disk and are compiled again in every process: {reason}; "
        "set GRADKERNELS_CACHE to a folder that can be written"
    )
    _own_folder.held = held = tempfile.TemporaryDirectory(prefix="gradkernels-")  # type: ignore[attr-defined]
    return Path(held.name)


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """One process at a time; the system lets go for one that dies."""
    import fcntl

    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        try:
            yield
        finally:
            path.unlink(missing_ok=True)  # who waits has it open, and finds the library
