"""The compiled kernels against the reference in float64, and what a process may do around them."""

import multiprocessing
import os
import random
import signal
import subprocess
import sys
import threading
from dataclasses import dataclass, field

import pytest
import torch

from gradkernels.backends import cpu, reference
from gradkernels.cells import CELLS, get
from gradkernels.cells.codegen import COMPILED
from tests.close import assert_close_to_truth

reason = cpu.why_not()
if reason is not None and os.environ.get("GRADKERNELS_REQUIRE_COMPILED") == "1":
    raise RuntimeError(f"GRADKERNELS_REQUIRE_COMPILED=1, but the kernels are missing: {reason}")
pytestmark = pytest.mark.skipif(reason is not None, reason=f"nothing to test: {reason}")

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def wide(v):
    """The same in float64."""
    if isinstance(v, list):
        return [wide(u) for u in v]
    return v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v


@dataclass
class Call:
    """Arguments of one forward and one backward, drawn at random; sizes that do not fit any tile are likely."""

    seed: int
    text: str = field(init=False)

    def __post_init__(self):
        r = random.Random(self.seed)
        g = torch.Generator().manual_seed(self.seed)
        self.cell = c = CELLS[r.choice(COMPILED)]
        dtype = r.choice(DTYPES)
        T, B = r.choice([1, 2, 5, 17, 40]), r.choice([1, 2, 3, 7, 13, 24, 40])
        I, H = r.choice([1, 5, 16, 33]), r.choice([1, 3, 15, 16, 17, 63, 64, 100])
        project = c.name == "lstm" and r.random() < 0.4
        R = r.choice([1, 5, 16, 20]) if project else H
        kind, given_gates, bias = r.choice(["padded", "packed", "lengths"]), r.random() < 0.2, r.random() < 0.8
        G = c.G * H

        def make(*shape, fan=1):
            return (torch.randn(*shape, generator=g, dtype=torch.float64) / fan**0.5).to(dtype)

        ends = torch.tensor([r.randint(0 if kind == "lengths" else 1, T) for _ in range(B)])
        batch_sizes = lengths = None
        if kind == "packed":
            ends[0] = T
            batch_sizes = (ends.sort(descending=True).values > torch.arange(T)[:, None]).sum(1)
        elif kind == "lengths":
            lengths = ends
        lead = (T, B) if batch_sizes is None else (int(batch_sizes.sum()),)
        x = make(*lead, G if given_gates else I)
        w_ih = None if given_gates else make(G, I, fan=I)
        b_ih = make(G) if bias and not given_gates else None
        w_hh, b_hh = make(G, R, fan=R), make(G) if bias else None
        w_hr = make(R, H, fan=H) if project else None
        state = [make(B, R), *[make(B, H) for _ in range(c.S - 1)]]
        reverse = r.random() < 0.5
        ragged = batch_sizes, lengths, reverse
        self.forward = [c, x, w_ih, b_ih, w_hh, b_hh, w_hr, state, *ragged]
        grads = [make(*lead, w) if r.random() < p else None for w, p in zip([R, H], [0.8, 0.3][: c.S])]
        grads += [make(*s.shape) if r.random() < 0.6 else None for s in state]
        inputs = not given_gates
        need = [r.random() < 0.8, inputs and r.random() < 0.8, inputs and bias, r.random() < 0.8, bias, project, False]
        self.by_gates, norms = r.random() < 0.3, r.random() < 0.5
        self.backward = lambda saved: [
            c, grads, x, w_ih, w_hh, w_hr, saved, state, *ragged, need, self.by_gates, norms,
        ]  # fmt: skip
        self.threads = r.choice([1, 2, 3, 4])
        self.text = f"{c.name} {dtype} T={T} B={B} I={I} H={H} R={R} {kind} reverse={reverse} gates={given_gates}"

    def run(self, backend=cpu, keep=2, convert=lambda v: v):
        """Everything that forward and backward return, and what forward kept."""
        out = backend.forward(*[convert(v) for v in self.forward], keep)
        if keep < 2:
            return out
        S, back = self.cell.S, self.backward([])
        saved = [*out[:S], *out[2 * S :]]
        grads = backend.backward(*[convert(v) for v in self.backward(saved)])
        if back[-1]:  # norms are float64 whatever they are made of, and are judged as what they are made of
            made_of = torch.bfloat16 if out[0].dtype == torch.float16 else out[0].dtype  # squares leave float16's range
            grads[-1] = grads[-1].to(made_of)
        return out[: 2 * S] + grads


def check(call):
    """Against torch operations in the same dtype, every one of which rounds, and the truth in float64."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reference, "precise", lambda v: v)
        theirs = call.run(reference)
    assert_close_to_truth(call.run(), theirs, call.run(reference, convert=wide), name=f"{call.seed}: {call.text}")


@pytest.mark.parametrize("block", range(10))
def test_against_the_reference(block):
    for seed in range(block * 30, block * 30 + 30):
        call = Call(seed)
        torch.set_num_threads(call.threads)
        check(call)


@pytest.mark.parametrize("keep", [0, 1])
def test_less_is_kept_when_less_is_asked_for(keep):
    for seed in range(40):
        call = Call(seed)
        S, full, out = call.cell.S, call.run()[: 2 * call.cell.S], call.run(keep=keep)
        want = (full[:S] if keep else full[:1]) + full[S:]
        assert len(out) == len(want), call.text
        assert all(torch.equal(a, b) for a, b in zip(out, want)), call.text


def test_the_same_bits_every_time_and_for_any_number_of_threads():
    for seed in range(60):
        call, runs = Call(seed), []
        norms = call.backward([])[-1]
        for threads in (1, 1, 2, 3, 4):
            torch.set_num_threads(threads)
            runs.append(call.run())
        assert all(torch.equal(a, b) for a, b in zip(runs[0], runs[1], strict=True)), call.text
        for run in runs[2:]:  # norms are summed thread by thread
            for a, b in list(zip(runs[0], run, strict=True))[: -1 if norms else None]:
                assert torch.equal(a, b), call.text


def test_backward_only_reads_what_forward_kept():
    for seed in range(40):
        call = Call(seed)
        kept = [v for v in call.forward if isinstance(v, torch.Tensor)]
        before = [v.clone() for v in kept]
        out = cpu.forward(*call.forward, 2)
        copies, S = [v.clone() for v in out], call.cell.S
        cpu.backward(*call.backward([*out[:S], *out[2 * S :]]))
        same = [
            torch.allclose(a, b, 0, 0, equal_nan=True) for a, b in zip([*out, *kept], [*copies, *before], strict=True)
        ]
        assert all(same), call.text


def test_more_threads_than_cores():
    torch.set_num_threads(1)
    want = [Call(seed).run() for seed in range(12)]
    torch.set_num_threads(4 * (os.cpu_count() or 1))
    for seed in range(12):
        got = Call(seed).run()
        assert all(torch.allclose(a, b) for a, b in zip(got, want[seed], strict=True))


def large(T=40, B=24, H=128):
    """A call that a team of threads is woken for."""
    torch.manual_seed(1)
    x, w, state = torch.randn(T, B, H), torch.randn(4 * H, H) / H**0.5, [torch.zeros(B, H)] * 2

    def run():
        out = cpu.forward(CELLS["lstm"], x, w, None, w, None, None, state, None, None, False, 2)
        saved, grads = [*out[:2], out[-1]], [out[0], None, None, None]
        need = [True, True, False, True, False, False, False]
        back = cpu.backward(
            CELLS["lstm"], grads, x, w, w, None, saved, state, None, None, False, need, False, False
        )  # fmt: skip
        return [*out, *back]

    return run


def same(a, b):
    return all(torch.equal(p, q) for p, q in zip(a, b, strict=True))


def test_several_python_threads_at_once():
    torch.set_num_threads(2)
    run = large()
    want, wrong = run(), []

    def work():
        torch.set_num_threads(2)
        for _ in range(5):
            if not same(run(), want):
                wrong.append(1)

    team = [threading.Thread(target=work) for _ in range(4)]
    [t.start() for t in team], [t.join() for t in team]
    assert not wrong


def _child(queue, run):
    queue.put([v.numpy() for v in run()])


def test_after_a_fork():
    torch.set_num_threads(2)
    run = (
        large()
    )  # made here: torch's own parallel operations would wait in the child for threads that it does not have
    want = run()  # ours are awake in the parent
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_child, args=(queue, run), daemon=True)
    child.start()
    try:
        got = [torch.from_numpy(v) for v in queue.get(timeout=60)]
    finally:
        child.kill()
    assert same(got, want)


class Rows(torch.utils.data.Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, k):
        return large()()[0][:, k]


def test_in_the_workers_of_a_data_loader():
    torch.set_num_threads(2)
    want = large()()[0]
    for k, row in enumerate(torch.utils.data.DataLoader(Rows(), batch_size=None, num_workers=2, timeout=60)):
        assert torch.allclose(row, want[:, k])


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="no interval timers on this system")
def test_signals_during_a_call():
    torch.set_num_threads(2)
    run, seen = large(), []
    want = run()
    before = signal.signal(signal.SIGALRM, lambda *a: seen.append(1))
    signal.setitimer(signal.ITIMER_REAL, 0.0005, 0.0005)
    try:
        good = sum(same(run(), want) for _ in range(30)) == 30
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert good
    assert seen


ALL_BUILDS = """
from gradkernels.backends import cpu
from tests.backends.test_cpu import Call, check
for seed in range(60):
    check(Call(seed))
print(cpu.build().__name__)
"""


@pytest.mark.parametrize("capability, build", [("default", "base"), ("avx2", "avx2"), ("avx512", "avx512")])
def test_every_build(capability, build):
    here = {"DEFAULT": 0, "AVX2": 1, "AVX512": 2}.get(torch.backends.cpu.get_cpu_capability(), 0)
    if {"base": 0, "avx2": 1, "avx512": 2}[build] > here:
        pytest.skip(f"this machine has no {build}, and running it would be an illegal instruction")
    done = subprocess.run(
        [sys.executable, "-c", ALL_BUILDS],
        check=False,
        env={**os.environ, "ATEN_CPU_CAPABILITY": capability, "PYTHONPATH": os.pathsep.join([os.getcwd(), *sys.path])},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-1] == f"gradkernels._cpu_{build}"


def test_what_cannot_run_says_why():
    assert "not on meta" in cpu.why_not(device=torch.device("meta"))
    assert "int64" in cpu.why_not(dtype=torch.int64)
    assert all(cpu.why_not(c, dtype, torch.device("cpu")) is None for c in map(get, COMPILED) for dtype in DTYPES)
