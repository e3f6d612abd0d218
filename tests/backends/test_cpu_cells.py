# ruff: noqa: F821 - functions of the cell language need no import
"""Cells that are compiled where they are used: every group of arguments, means, no product; and how compiling goes."""

import multiprocessing
import os
import random
import subprocess
import sys
import warnings
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

from gradkernels.backends import choose, cpu, reference
from gradkernels.backends._extra import DRAWN, FIXED, GIVEN, Extra
from gradkernels.backends.cpu import compile, toolchain
from gradkernels.cells import cell, get
from tests.backends.test_cpu import pytestmark as compiled
from tests.backends.test_cpu import threads, wide  # noqa: F401 - a fixture
from tests.close import assert_close_to_truth

pytestmark = [compiled, pytest.mark.cpu]
if not cpu.why_not() and compile.why_not() and os.environ.get("GRADKERNELS_REQUIRE_COMPILED") == "1":
    raise RuntimeError(f"GRADKERNELS_REQUIRE_COMPILED=1, but cells cannot be compiled: {compile.why_not()}")


@cell
def groups(x, r, s, p, m, d):
    """Parameters, masks of all three kinds and a delayed value, around two products."""
    z = sigmoid(x[0] + m[1] * r[0] + p[0] * s[0])
    n = tanh(x[1] + 0.5 * r[1](m[0] * z * s[0] + d[0])) + 0.1 * d[0] * m[2]
    return s[0] + m[1] * z * (n - s[0]) + softplus(p[1]) * 0.1


@cell
def normal(x, r, s, p, m):
    """Means that wait for one another, also where the operand of a second product is made."""
    u = r[0] + x[0]
    u = (u - mean(u)) * rsqrt(mean(square(u - mean(u))) + 1e-3)
    n = tanh(x[1] + r[1](m[0] * u * s[0] - mean(s[1])))
    c = s[1] * sigmoid(u) + p[0] * n * mean(n)
    return tanh(c - mean(c)), c


@cell
def alone(x, r, s, p, m, d):
    """No product, two states of which one is delayed."""
    h = tanh(x[0] + p[0] * s[0] + 0.5 * d[0])
    return m[0] * h, 0.9 * s[1] + erf(h) * x[1]


@cell
def alone_normal(x, r, s):
    """No product, and yet units that know of each other."""
    return sin(x[0]) + 0.5 * (s[0] - mean(s[0]))


EACH = [
    (groups, torch.float32),
    (groups, torch.float64),
    (groups, torch.bfloat16),
    (normal, torch.float32),
    (alone, torch.float32),
    (alone_normal, torch.float32),
    (get("lstm_layer_norm"), torch.float32),
]
each = pytest.mark.parametrize("c, dtype", EACH, ids=[f"{c.name}-{str(t)[6:]}" for c, t in EACH])


@dataclass
class Call:
    """Arguments of one forward and one backward, drawn at random."""

    cell: object
    dtype: torch.dtype
    seed: int
    text: str = field(init=False)

    def __post_init__(self):
        c, r = self.cell, random.Random(self.seed)
        g = torch.Generator().manual_seed(self.seed)
        T, B = r.choice([1, 2, 5, 17, 40]), r.choice([1, 2, 3, 13, 24, 40])
        I, H = r.choice([1, 5, 33]), r.choice([1, 3, 15, 17, 63, 64, 127])
        project = c.projects and r.random() < 0.4
        R = r.choice([1, 5, 20]) if project else H
        kind, given_gates, bias = r.choice(["padded", "packed", "lengths"]), r.random() < 0.2, r.random() < 0.8
        G, K = c.G * H, R if c.recurrent else 0

        def make(*shape, fan=1):
            return (torch.randn(*shape, generator=g, dtype=torch.float64) / max(fan, 1) ** 0.5).to(self.dtype)

        ends = torch.tensor([r.randint(0 if kind == "lengths" else 1, T) for _ in range(B)])
        batch_sizes = lengths = None
        if kind == "packed":
            ends[0] = T
            batch_sizes = (ends.sort(descending=True).values > torch.arange(T)[:, None]).sum(1)
        elif kind == "lengths":
            lengths = ends
        lead = (T, B) if batch_sizes is None else (int(batch_sizes.sum()),)
        N = lead[0] * B if len(lead) == 2 else lead[0]
        x = make(*lead, G if given_gates else I)
        w_ih, b_ih = None if given_gates else make(G, I, fan=I), None if given_gates or not bias else make(G)
        w_hh, b_hh, w_hr = make(G, K, fan=K), make(G) if bias else None, make(R, H, fan=H) if project else None
        state = [make(B, R), *[make(B, H) for _ in range(c.S - 1)]]
        kinds = r.choices([DRAWN, FIXED, GIVEN], k=c.M)
        extra = Extra(
            params=make(c.P, H) if c.P else None,
            seed=torch.tensor([r.randint(-(2**63), 2**63 - 1)]) if c.M and r.random() < 0.8 else None,
            noise=tuple(v for kind in kinds for v in (r.choice([0.0, 0.3, 1.0]), r.choice([1.0, 1.25]), kind)),
            flags=(torch.rand(N, generator=g) > 0.3).to(self.dtype) if GIVEN in kinds else None,
            skip=r.choice([1, 2, 3, 16, 50]) if c.D else 0,
            clip=r.choice([0.0, 0.0, 0.3]),
            first=r.choice([0, 7, 2**33]),
        )
        ragged = batch_sizes, lengths, r.random() < 0.5
        self.forward = [c, x, w_ih, b_ih, w_hh, b_hh, w_hr, state, *ragged]
        grads = [make(*lead, s.shape[1]) if r.random() < 0.8 else None for s in state]
        grads += [make(*s.shape) if r.random() < 0.6 else None for s in state]
        need = [
            r.random() < 0.8, not given_gates and r.random() < 0.8, b_ih is not None, r.random() < 0.8, bias, project,
            c.P > 0 and r.random() < 0.8,
        ]  # fmt: skip
        gates, self.norms = r.random() < 0.3, r.random() < 0.5
        self.backward = lambda saved: [
            c, grads, x, w_ih, w_hh, w_hr, saved, state, *ragged, need, gates, self.norms,
        ]  # fmt: skip
        self.extra, self.threads = extra, r.choice([1, 2, 3, 4])
        self.text = f"{c.name} {self.seed} {self.dtype} T={T} B={B} I={I} H={H} R={R} {kind} {extra._replace(params=0, flags=0)}"

    def run(self, backend=cpu, convert=lambda v: v):
        """Everything that forward and backward return."""
        extra = Extra(*(v if v is self.extra.seed else convert(v) for v in self.extra))
        out, S = backend.forward(*[convert(v) for v in self.forward], 2, extra), self.cell.S
        saved = [*out[:S], *out[2 * S :]]
        grads = backend.backward(*[convert(v) for v in self.backward(saved)], extra)
        if self.norms:  # in float64 whatever they are made of, and judged as that; squares leave float16's range
            grads[-1] = grads[-1].to(torch.bfloat16 if self.dtype == torch.float16 else out[0].dtype)
        return out[: 2 * S] + grads


@each
def test_against_the_reference(c, dtype):
    for seed in range(40):
        call = Call(c, dtype, seed)
        torch.set_num_threads(call.threads)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(reference, "precise", lambda v: v)
            theirs = call.run(reference)
        assert_close_to_truth(call.run(), theirs, call.run(reference, convert=wide), name=call.text)


@each
def test_the_same_bits_for_any_number_of_threads(c, dtype):
    for seed in range(12):
        call, runs = Call(c, dtype, seed), []
        for n in (1, 1, 2, 3, 4):
            torch.set_num_threads(n)
            runs.append(call.run()[: -1 if call.norms else None])  # norms are summed thread by thread
        for run in runs[1:]:
            assert all(torch.equal(a, b) for a, b in zip(runs[0], run, strict=True)), call.text


def test_many_tokens_between_two_sums_of_parameters():
    """Several chunks of backward, whose sums of parameters must not run into each other."""
    torch.manual_seed(0)
    T, B, H = 150, 24, 40
    x, params = torch.randn(T, B, 2 * H), torch.randn(1, H)

    def run(backend, dtype, count):
        torch.set_num_threads(count)
        extra = Extra(params=params.to(dtype), noise=(0.0, 1.0, DRAWN), skip=3)
        given, w_hh, state = x.to(dtype), torch.zeros(2 * H, 0, dtype=dtype), [torch.zeros(B, H, dtype=dtype)] * 2
        out = backend.forward(alone, given, None, None, w_hh, None, None, state, None, None, False, 2, extra)
        grads, need = [torch.ones(T, B, H, dtype=dtype), None, None, None], [False] * 6 + [True]
        saved = [*out[:2], out[-1]]
        return backend.backward(
            alone, grads, given, None, w_hh, None, saved, state, None, None, False, need, False, False, extra
        )[0]  # fmt: skip

    theirs, truth = run(reference, torch.float32, 1), run(reference, torch.float64, 1)
    for n in (1, 2, 4):
        assert_close_to_truth(run(cpu, torch.float32, n), theirs, truth)


# ---------------------------------------------------------------- compiling


def fresh(name='a "new" $cell'):
    return cell(lambda x, r, s: tanh(x[0] - r[0]), name=name)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("GRADKERNELS_CACHE", str(tmp_path))
    cpu.entries.cache_clear(), cpu._cell_why_not.cache_clear()
    yield tmp_path / "cells"
    cpu.entries.cache_clear(), cpu._cell_why_not.cache_clear()


def libraries(folder):
    return sorted(path.name for path in folder.iterdir())


def test_compiled_once_and_kept(cache, monkeypatch, caplog):
    assert cpu.why_not(fresh("kept"), torch.float32, torch.device("cpu")) is None
    said = [(record.name.partition(".")[0], record.getMessage()) for record in caplog.records]
    assert said == [("gradkernels", "compiling the kernels of cell 'kept' (float): some seconds, once")]
    (kept,) = libraries(cache)
    assert kept.endswith(".so")
    cpu.entries.cache_clear()
    monkeypatch.setattr(toolchain, "build", lambda *a, **k: pytest.fail("compiled again"))
    cpu.entries(fresh("kept"), torch.float32)
    assert libraries(cache) == [kept] and len(caplog.records) == 1


def test_another_cell_or_compiler_is_another_library(cache, monkeypatch):
    name = lambda c: compile._name(c, "float", "base")
    names = {name(fresh()), name(get("lstm")), name(fresh("other")), compile._name(fresh(), "double", "base")}
    monkeypatch.setattr(compile, "_version", lambda: "g++ 99")
    assert len(names | {name(fresh())}) == 5


def test_without_a_compiler_the_reference_runs_and_says_so_once(cache, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    compile._version.cache_clear()
    c = fresh("nowhere")
    with pytest.warns(
        UserWarning, match="cell 'nowhere' runs through the reference, which is slow: it did not.*no-such-compiler"
    ) as said:
        assert choose(None, c, torch.float32, torch.device("cpu")) is reference
    assert [w.filename for w in said] == [__file__]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert choose(None, c, torch.float32, torch.device("cpu")) is reference
    with pytest.raises(
        RuntimeError, match="'cpu' cannot run nowhere in torch.float32 on cpu: .*cannot be compiled here"
    ):
        choose("cpu", c, torch.float32, torch.device("cpu"))
    assert cpu.why_not(get("lstm"), torch.float32, torch.device("cpu")) is None
    compile._version.cache_clear()


def test_what_a_compiler_says_is_said(cache, monkeypatch):
    monkeypatch.setattr(toolchain, "FLAGS", f"{toolchain.FLAGS} --no-such-flag")
    with pytest.raises(toolchain.CompileError, match="error"):
        compile.entries(fresh("broken"), "float", "base")
    assert libraries(cache) == []


def test_of_a_compiler_that_names_no_error_the_end_is_said(cache, monkeypatch, tmp_path):
    compiler = tmp_path / "compiler"
    compiler.write_text("#!/bin/sh\nfor k in $(seq 99); do echo note $k; done\nexit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    compile._version.cache_clear()
    with pytest.raises(toolchain.CompileError) as raised:
        compile.entries(fresh("silent"), "float", "base")
    compile._version.cache_clear()
    lines = str(raised.value).splitlines()
    assert len(lines) == 20 and "note 99" in lines and lines[-1].startswith("ninja")


def _build(queue, name):
    before = toolchain.build
    toolchain.build = lambda *a, **k: (queue.put(os.getpid()), before(*a, **k))
    compile.entries(fresh(name), "float", "base")


def test_processes_at_once_compile_once(cache):
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    team = [context.Process(target=_build, args=(queue, "shared")) for _ in range(3)]
    [p.start() for p in team], [p.join(120) for p in team]
    assert [p.exitcode for p in team] == [0, 0, 0]
    queue.get(timeout=10)
    assert queue.empty() and len(libraries(cache)) == 1


def test_a_folder_that_cannot_be_written(cache, monkeypatch):
    blocked = cache.parent / "file"
    blocked.write_text("")
    monkeypatch.setenv("GRADKERNELS_CACHE", str(blocked))
    compile._own_folder.cache_clear()
    with pytest.warns(UserWarning, match="cannot be kept on disk.*GRADKERNELS_CACHE"):
        folder = compile._folder()
    assert folder.is_dir() and compile._folder() == folder


def test_what_is_installed_is_enough_to_compile(cache, monkeypatch, tmp_path):
    root = Path(__file__).resolve().parents[2]
    command = [sys.executable, "setup.py", "-q", "build_py", "--build-lib", str(tmp_path / "lib")]
    subprocess.run(command, cwd=root, check=True, capture_output=True)
    csrc = tmp_path / "lib" / "gradkernels" / "csrc"
    assert (csrc / "cuda" / "step.cuh").exists() and not list(csrc.rglob("layers.cpp"))
    monkeypatch.setattr(compile, "sources", lambda: csrc)
    compile.entries(fresh("installed"), "float", "base")


def test_importing_the_package_compiles_nothing():
    code = "import gradkernels.backends.cpu.compile as c; c.toolchain.build = None; import gradkernels as gk; gk.backends()"
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)
