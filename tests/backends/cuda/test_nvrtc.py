"""From text to machine code: what is compiled, how failures read, and what is kept on disk."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from gradkernels.backends import _cache as cache
from gradkernels.backends.cuda import nvrtc, step
from gradkernels.cells import CELLS, get
from gradkernels.cells.codegen import COMPILED, device_struct, type_name

ROOT = Path(__file__).resolve().parents[3]
SOURCE = '#include "one.cuh"\nextern "C" __global__ void run(float *p) { p[threadIdx.x] = one(); }\n'
HEADERS = {"one.cuh": "#pragma once\n__device__ float one() { return 1; }\n"}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty cache."""
    monkeypatch.setenv("GRADKERNELS_CACHE", str(tmp_path / "cache"))
    cache._not_kept.cache_clear()
    return tmp_path / "cache"


@pytest.fixture
def compilations(monkeypatch):
    """Options of every call of the compiler."""
    seen, compile = [], nvrtc._compile
    monkeypatch.setattr(nvrtc, "_compile", lambda *given: seen.append(given[2]) or compile(*given))
    return seen


# ---------------------------------------------------------------- the compiler


@pytest.mark.parametrize("arch", ["sm_80", "sm_90a", "sm_100a", "sm_120"])
def test_machine_code_and_what_the_compiler_says(arch, folder):
    made = nvrtc.compile(SOURCE, HEADERS, arch)
    assert made.cubin.startswith(b"\x7fELF") and b"run" in made.cubin
    assert 4 <= made.registers <= 32 and made.spilled == made.stack == 0 and f"'{arch}'" in made.log


def test_spilled_registers_are_counted(folder):
    source = """
extern "C" __global__ void __launch_bounds__(1024) run(float *p) {
  float v[200];
#pragma unroll
  for (int i = 0; i < 200; i++) v[i] = p[i * 1024 + threadIdx.x];
  __syncthreads();
#pragma unroll
  for (int i = 0; i < 200; i++) p[i * 1024 + threadIdx.x] = v[i] * v[(i + 100) % 200];
}
"""
    made = nvrtc.compile(source, {}, "sm_90a")
    assert made.registers == 64 and made.spilled > 400 and made.stack > 200


def test_a_kernel_that_does_not_compile(folder):
    """The first error with its file and line, then all that the compiler said; nothing is kept."""
    broken = {"one.cuh": "#pragma once\n__device__ float one() { return two; }\n"}
    with pytest.raises(RuntimeError) as failure:
        nvrtc.compile(SOURCE, broken, "sm_90a")
    first, by, *log = str(failure.value).splitlines()
    assert first == 'a CUDA kernel does not compile: one.cuh(2): error: identifier "two" is undefined'
    assert "--gpu-architecture=sm_90a" in by and by.endswith("NVRTC_ERROR_COMPILATION")
    assert any("return two" in line for line in log) and not folder.exists()


def test_an_architecture_that_does_not_exist(folder):
    with pytest.raises(RuntimeError, match="invalid value for --gpu-architecture"):
        nvrtc.compile(SOURCE, HEADERS, "sm_999")


def test_headers_are_those_of_the_package():
    assert set(nvrtc.headers()) == {p.name for p in (ROOT / "csrc" / "cuda").glob("*.cuh")}
    assert {"platform.cuh", "arguments.cuh", "math.cuh"} <= set(nvrtc.headers())


@pytest.mark.parametrize("cell", map(get, COMPILED), ids=lambda c: c.name)
def test_cells_compile_for_the_device(cell, folder):
    source = f"""
#include "cells.cuh"
extern "C" __global__ void run(float *p) {{
  using C = gk::{type_name(cell)};
  float x[C::G], r[C::G], s[C::S], t[C::S], a[C::A + 1];
  for (auto &v : x) v = *p++;
  for (auto &v : r) v = *p++;
  for (auto &v : s) v = *p++;
  C::forward(x, r, s, t, a);
  for (auto v : t) *p++ = v;
}}
"""
    made = nvrtc.compile(source, {**nvrtc.headers(), "cells.cuh": device_struct(cell)}, "sm_80")
    assert made.spilled == made.stack == 0


@pytest.mark.slow
@pytest.mark.parametrize("cell", [c for name, c in CELLS.items() if name not in COMPILED], ids=lambda c: c.name)
def test_every_cell_compiles_step_by_step(cell, folder):
    for kind in (step.StepForward, step.StepBackward):
        variant = kind(cell, "bf16", step.most_units(cell))
        made = nvrtc.compile(variant.source(), {**nvrtc.headers(), "cells.cuh": device_struct(cell)}, "sm_90a")
        assert made.spilled <= 64, variant


# ---------------------------------------------------------------- on disk


def test_what_was_compiled_is_kept(folder, compilations):
    first = nvrtc.compile(SOURCE, HEADERS, "sm_90a")
    (file,) = folder.iterdir()
    again = nvrtc.compile(SOURCE, dict(HEADERS), "sm_90a")
    assert again == first and len(compilations) == 1 and list(folder.iterdir()) == [file]


def test_everything_that_matters_is_in_the_name(folder, compilations, monkeypatch):
    variations = [
        (SOURCE, HEADERS, "sm_90a"),
        (SOURCE.replace("one()", "-one()"), HEADERS, "sm_90a"),
        (SOURCE, {"one.cuh": HEADERS["one.cuh"].replace("1", "2")}, "sm_90a"),
        (SOURCE, {**HEADERS, "two.cuh": ""}, "sm_90a"),
        (SOURCE, HEADERS, "sm_80"),
        (SOURCE, HEADERS, "sm_90a", (*nvrtc.OPTIONS, "--use_fast_math")),
    ]
    for given in variations:
        nvrtc.compile(*given)
    monkeypatch.setattr(nvrtc, "version", lambda: (99, 0))
    nvrtc.compile(*variations[0])
    assert len(compilations) == len(list(folder.iterdir())) == len(variations) + 1


def test_parts_do_not_run_into_one_another():
    assert cache.key(["ab", "c"]) != cache.key(["a", "bc"]) != cache.key(["abc"])
    assert cache.key(["ab", b"c"]) == cache.key([b"ab", "c"])


@pytest.mark.parametrize("damage", ["empty", "cut", "changed", "a folder"])
def test_damaged_files_are_compiled_again(damage, folder, compilations):
    first = nvrtc.compile(SOURCE, HEADERS, "sm_90a")
    (file,) = folder.iterdir()
    whole = file.read_bytes()
    if damage == "a folder":
        file.unlink()
        file.mkdir()
        with pytest.warns(UserWarning, match="cannot be kept on disk"):
            assert nvrtc.compile(SOURCE, HEADERS, "sm_90a").cubin == first.cubin
        return
    file.write_bytes({"empty": b"", "cut": whole[:-1], "changed": whole[:-1] + bytes([whole[-1] ^ 1])}[damage])
    assert nvrtc.compile(SOURCE, HEADERS, "sm_90a").cubin == first.cubin and len(compilations) == 2
    assert cache.load(file.name) is not None and len(list(folder.iterdir())) == 1


def test_a_folder_that_cannot_be_written_is_said_once(tmp_path, monkeypatch, compilations, recwarn):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("GRADKERNELS_CACHE", str(tmp_path / "file" / "cache"))
    cache._not_kept.cache_clear()
    for _ in range(3):
        assert nvrtc.compile(SOURCE, HEADERS, "sm_90a").cubin
    assert len(compilations) == 3
    (warning,) = recwarn.list
    assert "cannot be kept on disk" in str(warning.message) and "GRADKERNELS_CACHE" in str(warning.message)


def test_a_full_disk_leaves_nothing_behind(folder, monkeypatch, recwarn):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    assert nvrtc.compile(SOURCE, HEADERS, "sm_90a").cubin
    assert list(folder.iterdir()) == [] and "No space left" in str(recwarn.list[0].message)


def test_where_files_are(monkeypatch):
    for name in ("GRADKERNELS_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", "/home/somebody")
    assert cache.folder() == Path("/home/somebody/.cache/gradkernels")
    monkeypatch.setenv("XDG_CACHE_HOME", "/cache")
    assert cache.folder() == Path("/cache/gradkernels")
    monkeypatch.setenv("GRADKERNELS_CACHE", "/elsewhere")
    assert cache.folder() == Path("/elsewhere")
    monkeypatch.delenv("GRADKERNELS_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME")

    def homeless():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", homeless)
    assert cache.folder() is None and cache.load("0" * 64) is None


def test_processes_share_a_folder(folder):
    """All compile the same at once; each has it, and one whole file is left."""
    code = f"""
from gradkernels.backends.cuda import nvrtc
print(len(nvrtc.compile({SOURCE!r}, {HEADERS!r}, "sm_90a").cubin))
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code]
    running = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    said = [p.communicate()[0] for p in running]
    assert [p.returncode for p in running] == [0, 0, 0] and len(set(said)) == 1
    (file,) = folder.iterdir()
    assert cache.load(file.name) is not None


# ---------------------------------------------------------------- in a wheel


@pytest.mark.slow
def test_a_wheel_has_the_sources(tmp_path):
    """A package that was built elsewhere and only unpacked finds the same headers, and old ones are gone."""
    source = tmp_path / "source"
    source.mkdir()
    ignore = shutil.ignore_patterns("__pycache__", "*.so", "build")
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in"):
        shutil.copy(ROOT / name, source)
    for name in ("csrc", "gradkernels"):
        shutil.copytree(ROOT / name, source / name, ignore=ignore)
    stale = source / "build" / "lib" / "gradkernels" / "csrc" / "cuda" / "gone.cuh"
    stale.parent.mkdir(parents=True)
    stale.write_text("")
    environment = {
        **os.environ,
        "CXX": "false",
        "GRADKERNELS_REQUIRE_COMPILED": "0",
    }  # the C++ kernels are not at stake
    build = [sys.executable, "setup.py", "-q", "build", "--build-lib", "build/lib", "bdist_wheel", "--dist-dir", "dist"]
    subprocess.run(build, cwd=source, env=environment, check=True, capture_output=True)
    (wheel,) = (source / "dist").glob("*.whl")
    with zipfile.ZipFile(wheel) as packed:
        packed.extractall(tmp_path / "unpacked")
    code = "from gradkernels.backends.cuda import nvrtc; print(nvrtc.__file__, *nvrtc.headers())"
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "unpacked")}
    said = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, check=True, capture_output=True, text=True
    )
    where, *names = said.stdout.split()
    assert where.startswith(str(tmp_path / "unpacked")) and names == list(nvrtc.headers())
