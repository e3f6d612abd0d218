"""What the host does, over a GPU that writes launches down: how many, with what, and nothing compiled twice."""

import dataclasses

import pytest
import torch

from gradkernels.backends.triton import launch
from gradkernels.backends.triton.launch import Limits, Number, is_resident, tile
from gradkernels.cells import CELLS
from tests.backends.triton.compiled import offline
from tests.backends.triton.compiled.calls import Call

LARGE = Limits(232448, 132, True, True)
SMALL = Limits(65536, 40, False, False)
NUMBERS = {dtype: Number.of(dtype, LARGE) for dtype in (torch.bfloat16, torch.float64)}
STEPS = Call("rnn_tanh", "fp16", 512, B=40, T=4)


def test_launches_of_a_walk_by_steps(monkeypatch):
    """One a step, and one more backward; two where a cell has a second product."""
    with offline.gpu(90) as driver:
        STEPS.run(monkeypatch)
        names = [one.name for one in driver.launches]
        assert names == ["forward_step"] * 4 + ["backward_step"] * 5
        assert [one.arguments[0] for one in driver.launches] == [*range(4), *range(5)]
        first, *others = driver.launches[:4]
        for one in others:  # after the first, addresses of the same tensors
            assert one.grid == first.grid and len(one.arguments) == len(first.arguments)
            for a, b in zip(first.arguments[1:], one.arguments[1:]):
                assert b == (
                    a.data_ptr() if isinstance(a, torch.Tensor) else launch.addresses(a) if type(a) is tuple else a
                )
        driver.launches.clear()
        dataclasses.replace(STEPS, cell="gru_reset_before").run(monkeypatch)
        assert len(driver.launches) == 2 * 4 + 2 * 4 + 1


@pytest.mark.parametrize("call", [STEPS, Call("rnn_tanh", "fp16", 32)], ids=["steps", "resident"])
def test_nothing_is_compiled_for_another_batch_or_length(call, monkeypatch):
    with offline.gpu(90) as driver:
        call.run(monkeypatch)
        before = len(driver.kernels)
        for T, B in ((1, call.B), (7, call.B - 1), (2, call.B - 3)):
            dataclasses.replace(call, T=T, B=B).run(monkeypatch)
    assert len(driver.kernels) == before <= 2


@pytest.mark.parametrize("architecture", [80, 90])
def test_overlapping_launches_wait_before_they_read(architecture, monkeypatch):
    with offline.gpu(architecture) as driver:
        dataclasses.replace(STEPS, H=384).run(monkeypatch)
    assert len(driver.ptx) == 2
    for text in driver.ptx:
        reads = min(text.index(word) for word in ("ld.global", "cp.async") if word in text)
        leaves = text.index("ret;")
        assert ("griddepcontrol.wait" in text) is (architecture == 90)
        if architecture == 90:
            assert text.index("griddepcontrol.wait") < min(reads, leaves)
            assert text.index("griddepcontrol.wait") < text.index("griddepcontrol.launch_dependents")


def test_products_that_triton_has_not_got_are_not_asked_for(monkeypatch):
    """tf32 where it is allowed and there."""
    monkeypatch.setattr(launch, "tf32", lambda: True)
    assert Number.of(torch.float32, LARGE).precision == "tf32" and Number.of(torch.float32, SMALL).precision == "ieee"
    monkeypatch.setattr(launch, "tf32", lambda: False)
    assert Number.of(torch.float32, LARGE).precision == "ieee"


def test_who_keeps_the_matrix():
    bf16, fp64 = NUMBERS.values()
    small = lambda name, H, number, at, R=0: is_resident(CELLS[name], H, R or H, bool(R), number, at)
    assert small("lstm", 128, bf16, LARGE) and not small("lstm", 129, bf16, LARGE)
    assert small("lstm", 64, bf16, SMALL) and not small("lstm", 128, bf16, SMALL)
    assert small("rnn_tanh", 256, bf16, LARGE) and not small("gru", 256, bf16, LARGE)
    assert small("rnn_tanh", 256, bf16, LARGE, R=128) and not small("rnn_tanh", 256, bf16, LARGE, R=200)
    assert small("gru", 16, fp64, LARGE) and not small("gru", 32, fp64, LARGE)


@pytest.mark.parametrize("at", [LARGE, SMALL], ids=["large", "small"])
@pytest.mark.parametrize("number", NUMBERS.values(), ids=["bf16", "fp64"])
@pytest.mark.parametrize("planes", [1, 4])
def test_tiles(planes, number, at):
    """All is covered, and chunks fit twice into shared memory where they can."""
    for B in (1, 16, 17, 64, 200, 4096):
        for units in (1, 100, 512, 1024, 4096):
            one = tile(B, units, units, planes, number, at)
            assert one.grid[0] * one.BU >= units > (one.grid[0] - 1) * one.BU
            assert one.grid[1] * one.BM >= B > (one.grid[1] - 1) * one.BM and one.BM < max(2 * B, 32)
            in_flight = (one.options["num_stages"] - 1) * (one.BM + planes * one.BU) * one.BK * number.bytes
            assert in_flight <= at.shared // 2 or one.options["num_stages"] == 2
            assert in_flight <= at.shared
            assert one.BM * one.BU <= number.largest
            assert ("launch_pdl" in one.options) is at.overlap


def test_which_tiles():
    """The least traffic for a batch of some rows; many programs for one of a few; the largest tile for thousands."""
    bf16 = NUMBERS[torch.bfloat16]

    def size(B, planes):
        one = tile(B, 1024, 1024 * (5 - planes), planes, bf16, LARGE)
        return one.BM, one.BU

    assert size(1, 4) == size(16, 4) == (16, 16)
    assert size(64, 4) == (64, 16) and size(64, 1) == (32, 32)
    assert size(4096, 4) == size(4096, 1) == (128, 32)


@pytest.mark.parametrize("K, expected", [(1024, 64), (96, 32), (48, 16), (1000, 64), (5, 64)])
def test_chunks(K, expected):
    assert NUMBERS[torch.bfloat16].chunk(K) == expected
