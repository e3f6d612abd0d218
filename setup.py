"""Builds the CPU kernels with ninja: the same sources once per instruction set, each an extension module of its own. The CUDA
kernels are compiled where they run, so that their sources are part of the package.

Nothing here imports torch. `pip install .`, `pip install -e .` and `python setup.py build_ext --inplace` all come through
`BuildKernels`. Without a working compiler the installation succeeds, with a warning, and the package runs through its
reference backend; GRADKERNELS_REQUIRE_COMPILED=1 makes that an error (0 turns the error of an explicit build_ext into
the warning). CXX selects the compiler, MAX_JOBS the number of compilations at once.
"""

import itertools
import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py
from setuptools.errors import CompileError

ROOT = Path(__file__).resolve().parent
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
X86 = platform.machine().lower() in ("x86_64", "amd64")


def instruction_sets():
    return tuple(INSTRUCTION_SETS) if X86 else ("base",)


def compiler():
    """The C++ compiler's command as a list: $CXX, else what Python was built with, else a usual name."""
    if os.environ.get("CXX"):
        return shlex.split(os.environ["CXX"])
    built_with = shlex.split(sysconfig.get_config_var("CXX") or "")[:1]
    for name in (*built_with, "g++", "clang++", "c++"):
        if shutil.which(name):
            return [name]
    raise CompileError("no C++ compiler: neither g++ nor clang++ is in PATH, and CXX is not set")


def ninja():
    """The path of the ninja program, from the `ninja` package or from PATH."""
    try:
        from ninja import BIN_DIR
    except ImportError:
        found = shutil.which("ninja")
        if found is None:
            raise CompileError("no ninja: pip install ninja") from None
        return found
    return str(Path(BIN_DIR) / "ninja")


def escape(text):
    return str(text).replace("$", "$$").replace(":", "$:").replace(" ", "$ ")


def build_file(cxx):
    """The text of build.ninja: per instruction set one bindings object, two objects per storage type, one module."""
    import pybind11

    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    includes = [f"-isystem {shlex.quote(path)}" for path in (sysconfig.get_path("include"), pybind11.get_include())]
    undefined = "-undefined dynamic_lookup" if sys.platform == "darwin" else ""
    lines = [
        "ninja_required_version = 1.3",
        f"cxx = {shlex.join(cxx)}",
        f"flags = {FLAGS}",
        f"python = {' '.join(includes)}",
        "rule compile",
        "  command = $cxx -MMD -MF $out.d $flags $extra -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "  description = compile $what",
        "rule link",
        f"  command = $cxx -shared $flags $in -o $out {undefined}",
        "  description = link $out",
    ]

    def compile_to(name, source, extra, what):
        lines.extend(
            [
                f"build {name}: compile {escape(ROOT / source)}",
                f"  extra = {extra}",
                f"  what = {what}",
            ]
        )
        return name

    for isa in instruction_sets():
        extra = f"{INSTRUCTION_SETS[isa]} -DGK_MODULE=_cpu_{isa}"
        objects = [compile_to(f"{isa}/bindings.o", "csrc/bindings.cpp", f"{extra} $python", f"bindings ({isa})")]
        for unit, storage in itertools.product(("recurrent", "layers"), STORAGE):
            # Only the bindings see Python's and pybind11's headers: pip's throw-away copies of those must not
            # make the kernels compile again.
            define = f"{extra} -DGK_STORAGE={storage}"
            name, what = f"{isa}/{unit}-{storage}.o", f"{unit} ({isa}, {storage})"
            objects.append(compile_to(name, f"csrc/cpu/{unit}.cpp", define, what))
        lines.append(f"build _cpu_{isa}{suffix}: link {' '.join(objects)}")
    return "\n".join(lines) + "\n"


def build(folder):
    """Build all modules into `folder`, recompiling only what changed; raises CompileError."""
    folder.mkdir(parents=True, exist_ok=True)
    text = build_file(compiler())
    path = folder / "build.ninja"
    if not path.exists() or path.read_text() != text:
        path.write_text(text)
    jobs = os.environ.get("MAX_JOBS")
    command = [ninja(), "-C", str(folder), *(["-j", jobs] if jobs else [])]
    if subprocess.run(command, check=False).returncode:
        raise CompileError("the compiler failed; its message is above (pip shows it with -v)")


class BuildKernels(build_ext):
    """build_ext by ninja, in one incremental folder per Python version whatever command asks for it."""

    def build_extensions(self):
        folder = ROOT / "build" / f"kernels-{sys.implementation.cache_tag}-{sysconfig.get_platform()}"
        # Whoever says build_ext wants modules; whoever says install wants a package that works.
        required = os.environ.get("GRADKERNELS_REQUIRE_COMPILED", "1" if "build_ext" in sys.argv else "0")
        try:
            build(folder)
        except CompileError as error:
            if required != "0":
                raise
            # A module of earlier sources must not be found beside newer Python.
            for extension in self.extensions:
                for stale in (self.get_ext_fullpath(extension.name), ROOT / self.get_ext_filename(extension.name)):
                    Path(stale).unlink(missing_ok=True)
            print(
                f"\nWARNING: the compiled CPU backend was not built: {error}.\n"
                "WARNING: gradkernels is installed and runs through its reference backend, which is slow. Install a\n"
                "WARNING: C++17 compiler (apt install g++, xcode-select --install) and install again.\n",
                file=sys.stderr,
                flush=True,
            )
            return
        for extension in self.extensions:
            target = Path(self.get_ext_fullpath(extension.name))
            target.parent.mkdir(parents=True, exist_ok=True)
            self.copy_file(folder / target.name, target)


class AddSources(build_py):
    """build_py with csrc/cuda in the package; in a checkout, and so in an editable install, they are found beside it."""

    def _sources(self):
        folder = Path(self.build_lib) / "gradkernels" / "csrc" / "cuda"
        return {str(folder / path.name): str(path) for path in sorted((ROOT / "csrc" / "cuda").glob("*.cuh"))}

    def run(self):
        super().run()
        if self.editable_mode:
            return
        shutil.rmtree(Path(self.build_lib) / "gradkernels" / "csrc", ignore_errors=True)  # of an earlier build
        for target, source in self._sources().items():
            self.mkpath(str(Path(target).parent))
            self.copy_file(source, target)

    def get_outputs(self, include_bytecode=True):
        return super().get_outputs(include_bytecode) + ([] if self.editable_mode else list(self._sources()))

    def get_output_mapping(self):
        return super().get_output_mapping() | ({} if self.editable_mode else self._sources())

    def get_source_files(self):
        return super().get_source_files() + [str(Path(p).relative_to(ROOT)) for p in self._sources().values()]


if __name__ == "__main__":
    setup(
        # `optional`: setuptools then copies only what has been built.
        ext_modules=[Extension(f"gradkernels._cpu_{isa}", sources=[], optional=True) for isa in instruction_sets()],
        cmdclass={"build_ext": BuildKernels, "build_py": AddSources},
    )
