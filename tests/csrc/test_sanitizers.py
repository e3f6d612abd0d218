"""The C++ drivers under the address, undefined-behaviour and thread sanitizers, without Python around it.

`recurrent_walk.cpp` and `layers_walk.cpp` draw shapes at random and compare with plain loops in double; every buffer has
exactly its size. A failure names its case: `build/sanitizers/<program> SEED CASE CASE+1 <cells>` runs that one alone.
"""

import functools
import hashlib
import os
import re
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from gradkernels.backends import cpu
from gradkernels.backends.cpu import toolchain
from gradkernels.cells import codegen
from tests.backends.test_cpu_cells import alone, alone_normal, groups, normal

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
HERE, BUILD = ROOT / "tests" / "csrc", ROOT / "build" / "sanitizers"
CASES = 200
STORAGE = toolchain.STORAGE
USER_CELLS = tuple(c.name for c in (groups, normal, alone, alone_normal))

BEST = cpu.BUILDS.get(torch.backends.cpu.get_cpu_capability(), ("base",))[0]
ISAS = tuple(dict.fromkeys(("base", BEST)))

SANITIZERS = {
    # The assertions of libstdc++ know the end of a vector, where the address sanitizer knows that of its memory.
    "address": "-fsanitize=address,undefined -fno-sanitize-recover=all -fopenmp -D_GLIBCXX_ASSERTIONS",
    # Not with -fopenmp: GCC's OpenMP runtime is built without this sanitizer, which then sees races in its barriers.
    "thread": "-fsanitize=thread",
}
OPTIONS = {
    # Fresh memory is full of NaN: what is read before it is written shows in the result.
    "ASAN_OPTIONS": "detect_leaks=1:malloc_fill_byte=255:max_malloc_fill_size=1073741824",
    "UBSAN_OPTIONS": "print_stacktrace=1",
    "TSAN_OPTIONS": "halt_on_error=1",
}


def command(sanitizer, isa):
    """The compiler and the flags of the package, but for those that the sanitizers replace."""
    kept = [f for f in toolchain.FLAGS.split() if f not in ("-O3", "-fopenmp", "-fPIC", "-fvisibility=hidden")]
    return [
        *toolchain.compiler(),
        *kept,
        "-O1",
        "-g1",
        *toolchain.INSTRUCTION_SETS[isa].split(),
        *SANITIZERS[sanitizer].split(),
    ]


@functools.cache
def missing_compiler():
    """Why there is no compiler, or None."""
    try:
        compiler = toolchain.compiler()
        subprocess.run([*compiler, "--version"], check=True, capture_output=True)
    except (toolchain.CompileError, OSError, subprocess.CalledProcessError) as error:
        return str(error)
    return None


@functools.cache
def version():
    return subprocess.run([*toolchain.compiler(), "--version"], check=True, capture_output=True).stdout


@functools.cache
def sources():
    digest = hashlib.sha256()
    for path in sorted([*ROOT.glob("csrc/**/*.h"), *HERE.glob("*.h"), *HERE.glob("*.cpp")]):
        digest.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.digest()


@functools.cache
def user_cells():
    """The text of cells that use everything a cell may have, written where user_walk.cpp finds it."""
    BUILD.mkdir(parents=True, exist_ok=True)
    text = codegen.header([groups, normal, alone, alone_normal])
    (BUILD / "user_cells.gen.h").write_text(text, encoding="utf-8")
    return text


def compile_program(name, sanitizer, isa="base", storage=None):
    """The path of the program `name`.cpp, compiled unless it is already there from the same sources and flags."""
    BUILD.mkdir(parents=True, exist_ok=True)
    target = BUILD / "-".join(filter(None, (name, sanitizer, isa, storage)))
    line = [*command(sanitizer, isa), *([f"-DGK_STORAGE={storage}"] if storage else []), str(HERE / f"{name}.cpp")]
    if name == "user_walk":
        line += [f"-I{BUILD}", f"-I{ROOT / 'csrc'}"]
    digest = hashlib.sha256(repr(line).encode() + version() + sources() + user_cells().encode()).hexdigest()
    stamp = target.with_suffix(".sha256")
    if target.exists() and stamp.exists() and stamp.read_text() == digest:
        return target
    stamp.unlink(missing_ok=True)
    made = target.with_suffix(f".{os.getpid()}")
    done = subprocess.run([*line, "-o", str(made)], check=False, capture_output=True, text=True)
    if done.returncode:
        pytest.fail(f"{' '.join(line)}\n{done.stderr}", pytrace=False)
    made.replace(target)
    stamp.write_text(digest)
    return target


@functools.cache
def fixed_addresses():
    """What to start a program with so that its addresses are not random: the thread sanitizer of older compilers cannot
    start among the many random bits of newer kernels."""
    prefix = ["setarch", "-R"]
    try:
        return prefix if subprocess.run([*prefix, "true"], check=False, capture_output=True).returncode == 0 else []
    except OSError:
        return []


def run(program, *args, timeout=300, **environment):
    env = {**os.environ, **OPTIONS, **environment}
    line = [*fixed_addresses(), program, *map(str, args)]
    return subprocess.run(line, check=False, capture_output=True, text=True, timeout=timeout, env=env)


def passes(program, *args, **environment):
    """What the program prints; fails with all of it where its status is not 0."""
    done = run(program, *args, **environment)
    if done.returncode:
        report = (done.stdout + done.stderr)[-6000:]
        pytest.fail(f"{program} {' '.join(map(str, args))}: status {done.returncode}\n{report}", pytrace=False)
    return done.stdout


@functools.cache
def unavailable(sanitizer):
    """Why the compiler cannot make a program with that sanitizer, or None; asked of a program without our headers."""
    try:
        done = subprocess.run(
            [*toolchain.compiler(), *SANITIZERS[sanitizer].split(), "-x", "c++", "-", "-o", os.devnull],
            input="int main() {}", check=False, capture_output=True, text=True,
        )  # fmt: skip
    except OSError as error:
        return str(error)
    return f"the compiler has no {sanitizer} sanitizer: {done.stderr.strip()}" if done.returncode else None


def need(sanitizer):
    reason = missing_compiler()
    if reason is not None:
        if os.environ.get("GRADKERNELS_REQUIRE_COMPILED") == "1":
            pytest.fail(f"GRADKERNELS_REQUIRE_COMPILED=1, but {reason}", pytrace=False)
        pytest.skip(reason)
    if unavailable(sanitizer) is not None:
        pytest.skip(unavailable(sanitizer))


@pytest.fixture(scope="session")
def futures(request):
    """Compilations of all programs that the selected tests will ask for, as many at once as there are cores."""
    wanted = dict.fromkeys(i.callspec.params["program"] for i in request.session.items if i.path == Path(__file__))
    pool = ThreadPoolExecutor(os.cpu_count())
    yield {p: pool.submit(compile_program, *p) for p in wanted if not missing_compiler() and not unavailable(p[1])}
    pool.shutdown(cancel_futures=True)


@pytest.fixture
def program(request, futures):
    """The path of a program given as (name, sanitizer, isa, storage)."""
    need(request.param[1])
    return futures[request.param].result()


def programs(name, sanitizer, isas=("base",), storage=(None,)):
    every = [(name, sanitizer, isa, s) for isa in isas for s in storage]
    return pytest.mark.parametrize("program", every, ids=["-".join(filter(None, p[1:])) for p in every], indirect=True)


def walk(program, seed, cases=CASES, cells=codegen.COMPILED, **environment):
    printed = passes(program, seed, 0, cases, *cells, **environment)
    assert re.search(rf"^{cases} cases, \d{{3,}} tensors, 0 failures;", printed, re.MULTILINE), printed


@programs("faults", "address")
@pytest.mark.parametrize(
    "kind, said",
    [
        ("overflow", "heap-buffer-overflow"),
        ("leak", "detected memory leaks"),
        ("arithmetic", "signed integer overflow"),
        ("bounds", "__n < this->size()"),
    ],
    ids=["overflow", "leak", "arithmetic", "bounds"],
)
def test_address_sanitizer_finds(program, kind, said):
    done = run(program, kind)
    assert done.returncode and said in done.stderr, done
    passes(program, "none")


@programs("faults", "thread")
def test_thread_sanitizer_finds(program):
    done = run(program, "race")
    assert done.returncode and "data race" in done.stderr, done
    passes(program, "none")


@programs("recurrent_walk", "address", ISAS, STORAGE)
def test_memory(program):
    walk(program, seed=1)


@programs("recurrent_walk", "address", ISAS[-1:], ("float",))
def test_memory_where_openmp_gives_fewer_threads(program):
    walk(program, seed=2, cases=60, OMP_THREAD_LIMIT="2")


@programs("recurrent_walk", "thread", ISAS[-1:], ("float", "bfloat16"))
def test_threads(program):
    walk(program, seed=3)


@programs("user_walk", "address", ISAS[-1:], ("float",))
def test_memory_of_any_cell(program):
    walk(program, seed=4, cells=USER_CELLS)


@programs("user_walk", "thread", ISAS[-1:], ("float",))
def test_threads_of_any_cell(program):
    walk(program, seed=5, cases=100, cells=USER_CELLS)


@programs("layers_walk", "address", ISAS, STORAGE)
def test_memory_of_layers(program):
    walk(program, seed=1, cells=())


@programs("layers_walk", "thread", ISAS, ("float", "bfloat16"))
def test_threads_of_layers(program):
    """In the base too: the sanitizer does not see what is stored by mask."""
    walk(program, seed=3, cells=())


@programs("team_walk", "thread")
@pytest.mark.parametrize("size, rounds", [(1, 400), (2, 400), (3, 400), (8, 400), (17, 80)])
def test_barrier(program, size, rounds):
    assert f"{size} threads met {2 * rounds} times, 0 values" in passes(program, "barrier", size, rounds)


@programs("team_walk", "address")
def test_barrier_of_openmp_threads(program):
    assert "5 threads met 4000 times, 0 values" in passes(program, "barrier", 5, 2000)


@programs("team_walk", "address")
def test_fork_after_a_parallel_region(program):
    assert "3 forks, 0 wrong" in passes(program, "fork")
