"""Builds the CPU kernels with ninja: the same sources once per instruction set, each an extension module of its own. Cells of
one's own and the CUDA kernels are compiled where they run, so that their sources are part of the package.

Nothing here imports torch. `pip install .`, `pip install -e .` and `python setup.py build_ext --inplace` all come through
`BuildKernels`. Without a working compiler the installation succeeds, with a warning, and the package runs through its
reference backend; GRADKERNELS_REQUIRE_COMPILED=1 makes that an error (0 turns the error of an explicit build_ext into
the warning). CXX selects the compiler, MAX_JOBS the number of compilations at once.
"""

import importlib.util
import itertools
import os
import shlex
import shutil
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py
from setuptools.errors import CompileError

ROOT = Path(__file__).resolve().parent


def load(path):
    """A module by its path: importing the package would import torch."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


toolchain = load(ROOT / "gradkernels" / "backends" / "cpu" / "toolchain.py")


def build_lines():
    """The lines of build.ninja: per instruction set one bindings object, two objects per storage type, one module."""
    import pybind11

    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    includes = [f"-isystem {shlex.quote(path)}" for path in (sysconfig.get_path("include"), pybind11.get_include())]
    lines = [*toolchain.rules(), f"python = {' '.join(includes)}"]
    for isa in toolchain.instruction_sets():
        extra = f"{toolchain.INSTRUCTION_SETS[isa]} -DGK_MODULE=_cpu_{isa}"
        objects = [f"{isa}/bindings.o"]
        lines += toolchain.compile_to(
            objects[0], ROOT / "csrc" / "bindings.cpp", f"{extra} $python", f"bindings ({isa})"
        )
        for unit, storage in itertools.product(("recurrent", "layers"), toolchain.STORAGE):
            # Only the bindings see Python's and pybind11's headers: pip's throw-away copies of those must not
            # make the kernels compile again.
            define = f"{extra} -DGK_STORAGE={storage}"
            objects.append(f"{isa}/{unit}-{storage}.o")
            source = ROOT / "csrc" / "cpu" / f"{unit}.cpp"
            lines += toolchain.compile_to(objects[-1], source, define, f"{unit} ({isa}, {storage})")
        lines.append(f"build _cpu_{isa}{suffix}: link {' '.join(objects)}")
    return lines


class BuildKernels(build_ext):
    """build_ext by ninja, in one incremental folder per Python version whatever command asks for it."""

    def build_extensions(self):
        folder = ROOT / "build" / f"kernels-{sys.implementation.cache_tag}-{sysconfig.get_platform()}"
        # Whoever says build_ext wants modules; whoever says install wants a package that works.
        required = os.environ.get("GRADKERNELS_REQUIRE_COMPILED", "1" if "build_ext" in sys.argv else "0")
        try:
            toolchain.build(folder, build_lines())
        except toolchain.CompileError as error:
            if required != "0":
                raise CompileError(str(error)) from error
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
    """build_py with the sources of what is compiled where it runs: the CUDA kernels, and the drivers of any cell.

    In a checkout, and so in an editable install, they are found beside the package."""

    def _sources(self):
        folder, csrc = Path(self.build_lib) / "gradkernels" / "csrc", ROOT / "csrc"
        paths = [
            path for pattern in ("cuda/*.cuh", "*.h", "cpu/*.h", "cpu/user_cell.cpp") for path in csrc.glob(pattern)
        ]
        return {str(folder / path.relative_to(csrc)): str(path) for path in sorted(paths)}

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
        ext_modules=[
            Extension(f"gradkernels._cpu_{isa}", sources=[], optional=True) for isa in toolchain.instruction_sets()
        ],
        cmdclass={"build_ext": BuildKernels, "build_py": AddSources},
    )
