"""Attention compiles in what ships: registers and what spills, shared memory, who loads; and what the host does over a GPU that
writes launches down.

Each version of Triton compiles one half of the cases, and all of what has warps of its own for loads with it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import pytest
import torch
import triton

from gradkernels.backends.triton import attention, attention_tiles
from gradkernels.backends.triton.attention_tiles import SPECIALIZED, VERSION
from tests.backends.triton.compiled import offline
from tests.backends.triton.compiled.calls import DTYPES

SMALL = {86: 101376}  # bytes that a block can have on GPUs that are no servers
SPILLED = 128  # bytes of a thread, little beside what it keeps in 255 registers
shift = 1 if triton.__version__ < "3.7" else 0

HOW = {"causal": True, "left": -1, "right": -1, "p": 0.1, "scale": 0.1}
FEATURES = {
    "plain": {},
    "dropout": {"seed": torch.zeros(1, dtype=torch.int64)},
    "slopes": {"slopes": torch.zeros(1, 4)},
    "sequences": {
        "cu_q": torch.tensor([0, 5, 100], dtype=torch.int32),
        "cu_k": torch.tensor([0, 5, 100], dtype=torch.int32),
    },
    "mask": {"key_mask": torch.zeros(2, 100, dtype=torch.bool)},
    "bias": {"bias": torch.zeros(1, 4, 100, 100)},
    "bias of keys": {"bias": torch.zeros(2, 1, 1, 100)},
    "bias of queries": {"bias": torch.zeros(2, 1, 100, 1)},
}
NAMES = ("bias", "slopes", "cu_q", "cu_k", "key_mask", "seed")


@dataclass(frozen=True)
class Call:
    number: str  # a key of DTYPES
    D: int
    feature: str = "plain"
    E: int = 0  # D unless said otherwise
    T: int = 100
    Tk: int = 0  # T unless said otherwise
    B: int = 2
    backward: bool = True

    def __str__(self):
        width = f"D{self.D}" + f"/{self.E}" * bool(self.E)
        return "-".join([self.number, width, self.feature.replace(" ", "-")])

    def run(self, monkeypatch):
        monkeypatch.setattr("gradkernels.backends.triton.launch.tf32", lambda: self.number == "tf32")
        given = FEATURES[self.feature]
        B, Tk = (1 if "cu_q" in given else self.B), self.Tk or self.T
        zeros = lambda *shape: torch.zeros(shape, dtype=DTYPES[self.number])
        q, k, v = zeros(B, 4, self.T, self.D), zeros(B, 2, Tk, self.D), zeros(B, 2, Tk, self.E or self.D)
        tensors = [q, k, v, *(given.get(name) for name in NAMES)]
        assert attention.why_not(q.dtype, torch.device("cpu"), *tensors) is not None  # there is no such GPU
        out = attention.forward(*tensors, **HOW)
        if self.backward:
            need = [True, True, True, "bias" in given, *[False] * 5]
            attention.backward((torch.zeros_like(out[0]), None), tensors, out, need, **HOW)


EVERY = [
    (Call("bf16", 64, "dropout"), 90),
    (Call("fp16", 128, "bias"), 90),
    (Call("bf16", 256, "sequences"), 80),
    (Call("tf32", 128, "slopes"), 90),
    (Call("bf16", 128, "mask"), 100),
    (Call("fp16", 80, "dropout", E=40), 86),
    (Call("bf16", 64, "bias of keys"), 80),
    (Call("bf16", 256, "dropout"), 90),
    (Call("tf32", 64, "sequences"), 80),
    (Call("fp32", 64, "bias of queries"), 80),
    (Call("fp64", 64, "dropout"), 90),
    (Call("bf16", 128, "dropout"), 80),
]
CASES = EVERY[shift::2]


@pytest.fixture(autouse=True)
def smaller_gpus(monkeypatch):
    for architecture, size in SMALL.items():
        monkeypatch.setitem(offline.SHARED, architecture, size)


def check(driver, architecture, call):
    for kernel in driver.kernels:
        assert kernel.shared <= offline.SHARED[architecture], kernel.name
        if isinstance(architecture, int):
            registers, spilled = kernel.resources
            print(
                f"{call} sm_{architecture} {kernel.name}: {registers} registers, {spilled} B spilled, {kernel.shared} B shared"
            )
            assert 32 < registers <= 255 and spilled <= SPILLED, (kernel.name, registers, spilled)
    for text in driver.ptx:  # one order of every sum
        assert not re.search(r"\b(atom|red|cp\.reduce)\.", text)


@pytest.mark.parametrize("call, architecture", CASES, ids=[f"{c}-sm_{a}" for c, a in CASES])
def test_compiles(call, architecture, monkeypatch):
    with offline.gpu(architecture) as driver:
        call.run(monkeypatch)
    kernels = ["attend", "adjoint_queries", "adjoint_keys"] + ["adjoint_bias"] * (
        call.feature in ("bias", "bias of keys")
    )
    assert [kernel.name for kernel in driver.kernels] == kernels
    check(driver, architecture, call)


@pytest.mark.parametrize("architecture", [("gfx942", "gfx1100")[shift]])
def test_compiles_for_another_vendor(architecture, monkeypatch):
    call = Call("fp16", 128, "dropout")
    with offline.gpu(architecture) as driver:
        call.run(monkeypatch)
    assert len(driver.kernels) == 3
    check(driver, architecture, call)


# ---------------------------------------------------------------- warps of their own for loads


LISTED = [(arch, width, drops) for version, arch, width, drops in SPECIALIZED if version == VERSION]


def test_this_version_is_listed():
    """Both that are tested are; on another one forward takes the form that compiles everywhere."""
    assert VERSION in ("3.6", "3.9") and LISTED


@pytest.mark.parametrize("feature", ["batch", "sequences"])
@pytest.mark.parametrize(
    "architecture, width, drops", LISTED, ids=[f"sm_{a}-D{w}{'-dropout' * d}" for a, w, d in LISTED]
)
def test_loads_have_warps_of_their_own(architecture, width, drops, feature, monkeypatch):
    """All that is listed, in both layouts."""
    names = ("dropout",) * drops + ("sequences",) * (feature == "sequences")
    monkeypatch.setitem(FEATURES, "these", {k: v for name in names for k, v in FEATURES[name].items()})
    call = Call(("bf16", "fp16")[drops], width, "these", backward=False)
    with offline.gpu(architecture) as driver:
        call.run(monkeypatch)
    check(driver, architecture, call)
    (text,) = driver.ptx
    assert "cp.async.bulk.tensor" in text and "setmaxnreg" in text and ("wgmma" in text or "tcgen05.mma" in text)
    assert driver.kernels[0].resources[1] <= 8


@pytest.mark.parametrize(
    "call", [Call("fp16", 64, "bias"), Call("fp16", 64, "mask"), Call("bf16", 33), Call("bf16", 80), Call("fp32", 64)]
    + [Call("fp16", 64, T=16)], ids=str,
)  # fmt: skip
def test_where_they_have_none(call, monkeypatch):
    """What Triton does not make, or what is not worth it, has the other form."""
    chosen, choose = [], attention_tiles.choose
    monkeypatch.setattr(attention_tiles, "choose", lambda *a: chosen.append(choose(*a)) or chosen[-1])
    monkeypatch.setattr("gradkernels.backends.triton.launch.launch", lambda *a: None)
    with offline.gpu(90):
        call.run(monkeypatch)
    assert len(chosen) >= 3 and not any(tile.WS for tile in chosen)
    assert (chosen[0].BM == 16) is (call.T == 16)


# ---------------------------------------------------------------- the host


def test_nothing_is_compiled_for_another_size(monkeypatch):
    """Of batch, queries or keys; only for few queries there is one kernel more, for the first two."""
    with offline.gpu(80) as driver:
        Call("fp16", 64).run(monkeypatch)
        assert len(driver.kernels) == len(driver.launches) == 3
        for B, T, Tk in ((1, 100, 64), (3, 17, 1), (1, 129, 1000)):
            Call("fp16", 64, B=B, T=T, Tk=Tk).run(monkeypatch)
        assert len(driver.kernels) == 3 and len(driver.launches) == 12
        for T in (1, 16):
            Call("fp16", 64, T=T, Tk=100).run(monkeypatch)
        assert len(driver.kernels) == 5


def test_programs(monkeypatch):
    """A block of queries or keys each; of sequences one after the other as many as there may be."""
    grids = []
    monkeypatch.setattr("gradkernels.backends.triton.launch.launch", lambda kernel, grid, *_: grids.append(grid[0]))
    with offline.gpu(80):
        Call("fp16", 64, T=300, Tk=200).run(monkeypatch)
        Call("fp16", 64, "sequences").run(monkeypatch)
    assert grids == [3 * 4 * 2, 3 * 4 * 2, 2 * 2 * 2, 2 * 4, 2 * 4, 2 * 2]


@pytest.mark.parametrize("kernel", ["forward", "queries", "keys", "bias"])
@pytest.mark.parametrize("shared", sorted(offline.SHARED.items(), key=str), ids=str)
def test_every_width_has_a_tile(kernel, shared):
    """But for heads of more than 512 bytes, which some GPUs have no room for."""
    from gradkernels.backends.triton.launch import Limits, Number

    architecture, size = shared
    at = Limits(size, 132, False, True)
    for number in (Number.of(d, at) for d in (torch.bfloat16, torch.float32, torch.float64)):
        for D in (1, 17, 64, 128, 192, 256):
            with offline.gpu(architecture):
                tile = attention_tiles.choose(kernel, number, at, D, D, 1000, True, False)
            assert tile is not None or D * number.bytes > 512
