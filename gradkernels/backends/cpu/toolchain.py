"""How C++ is compiled: by setup.py for the cells that come with the package, by `compile` for others. Imports nothing of ours,
so that setup.py can load it by its path.

CXX selects the compiler, MAX_JOBS the number of compilations at once.
"""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterable
from pathlib import Path

FLAGS = (
    "-std=c++17 -O3 -fPIC -fvisibility=hidden -fopenmp -ffp-contract=fast -fno-math-errno -fno-trapping-math "
    "-Wall -Wextra -Wno-psabi"
)
INSTRUCTION_SETS = {
    "base": "",
    "avx2": "-mavx2 -mfma -mf16c",
    "avx512": "-mavx2 -mfma -mf16c -mavx512f -mavx512bw -mavx512vl -mavx512dq",
}
STORAGE = ("float", "double", "bfloat16", "half")
LAST = 20  # lines that are told of a compiler which names no error
X86 = platform.machine().lower() in ("x86_64", "amd64")


class CompileError(RuntimeError):
    """There is no compiler, or it has failed."""


def instruction_sets() -> tuple[str, ...]:
    return tuple(INSTRUCTION_SETS) if X86 else ("base",)


def compiler() -> list[str]:
    """The C++ compiler's command as a list: $CXX, else what Python was built with, else a usual name."""
    if os.environ.get("CXX"):
        return shlex.split(os.environ["CXX"])
    built_with = shlex.split(sysconfig.get_config_var("CXX") or "")[:1]
    for name in (*built_with, "g++", "clang++", "c++"):
        if shutil.which(name):
            return [name]
    raise CompileError("no C++ compiler: neither g++ nor clang++ is in PATH, and CXX is not set")


def ninja() -> str:
    """The path of the ninja program, from the `ninja` package or from PATH."""
    try:
        from ninja import BIN_DIR
    except ImportError:
        found = shutil.which("ninja")
        if found is None:
            raise CompileError("no ninja: pip install ninja") from None
        return found
    return str(Path(BIN_DIR) / "ninja")


def escape(text: object) -> str:
    return str(text).replace("$", "$$").replace(":", "$:").replace(" ", "$ ")


def rules() -> list[str]:
    """The lines that every build.ninja begins with: how to compile one object, and how to link objects."""
    undefined = "-undefined dynamic_lookup" if sys.platform == "darwin" else ""
    return [
        "ninja_required_version = 1.3",
        f"cxx = {shlex.join(compiler())}",
        f"flags = {FLAGS}",
        "rule compile",
        "  command = $cxx -MMD -MF $out.d $flags $extra -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "  description = compile $what",
        "rule link",
        f"  command = $cxx -shared $flags $in -o $out {undefined}",
        "  description = link $out",
    ]


def compile_to(name: str, source: Path, extra: str, what: str) -> list[str]:
    """The lines that make one object."""
    return [f"build {name}: compile {escape(source)}", f"  extra = {extra}", f"  what = {what}"]


def build(folder: Path, lines: Iterable[str], quiet: bool = False) -> None:
    """Build everything in `folder`, recompiling only what changed.

    Raises:
        CompileError: the compiler failed; it has said why, or where quiet the error says it."""
    folder.mkdir(parents=True, exist_ok=True)
    text, path = "\n".join(lines) + "\n", folder / "build.ninja"
    if not path.exists() or path.read_text() != text:
        path.write_text(text)
    jobs = os.environ.get("MAX_JOBS")
    command = [ninja(), "-C", str(folder), *(["-j", jobs] if jobs else [])]
    try:
        done = subprocess.run(command, check=False, capture_output=quiet, text=True)
    except OSError as error:
        raise CompileError(f"ninja does not run: {error}") from error
    if done.returncode and quiet:
        lines = done.stdout.splitlines()
        errors = [line for line in lines if "error" in line]
        raise CompileError("\n".join(errors[:8] or lines[-LAST:]))
    if done.returncode:
        raise CompileError("the compiler failed; its message is above (pip shows it with -v)")
