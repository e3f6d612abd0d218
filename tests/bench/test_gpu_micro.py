"""Kernels that measure the parts of a step: right on the twin in every order of threads, compiled for GPUs without spilling."""

import contextlib
import ctypes
import json
import time
from types import SimpleNamespace

import pytest
import torch

from bench.gpu import micro
from bench.gpu.kernels import (
    NUMBERS,
    Arguments,
    Part,
    all_gather,
    cluster_barrier,
    empty,
    everywhere,
    exchanged,
    expected,
    launch,
    parts,
    ping_pong,
    stream,
    tensor_cores,
    told,
)  # fmt: skip
from gradkernels.backends.cuda import nvrtc
from gradkernels.cells.codegen import device_struct
from tests.cuda_on_cpu.machine import SCHEDULES, Twin

PARTS = [
    Part("launch", empty(2), 3, 5),
    Part("cluster barrier", cluster_barrier(2, 2), 4, 5),
    Part("push and back", ping_pong(4), 8, 5, sources=3),
    Part("all-gather", all_gather(4, 2, 64), 8, 7, 32),
    Part("all-gather", all_gather(4, 2, 64), 8, 7, 64),
    Part("all-gather", all_gather(4, 1, 256), 4, 7, 256),
    exchanged(4, warps=2, rounds=5),
    exchanged(4, 64, 4, 2, 5),
    exchanged(4, 64, 2, 2, 5),
    told(4, 64, 4, 2, 5),
    told(4, 8, 4, 1, 5),
    told(4, 64, 2, 1, 5),
    *(tensor_cores(number, 2, 2, 2, 2, 3) for number in NUMBERS),
    Part("weights from L2", stream(1), 2, 3, 4096, exchange=2 * 4096),
]


@pytest.mark.slow
def test_every_kernel_comes_back_with_what_it_must_in_every_order():
    twin = Twin()
    twin.compile(dict.fromkeys(part.kernel for part in PARTS))
    for twin.schedule in SCHEDULES:
        for part in PARTS:
            got = launch(twin, part, torch.device("cpu"))(part.rounds)
            assert torch.equal(got, expected(part, part.rounds)), (part, twin.schedule)


class Gpu:
    """As much of a machine as tells which parts there are."""

    def __init__(self, multiprocessors, max_cluster, shared_bytes):
        self.multiprocessors, self.max_cluster, self.shared_bytes = multiprocessors, max_cluster, shared_bytes

    def kernel(self, variant):
        assert variant.shared_bytes <= self.shared_bytes and variant.C <= self.max_cluster
        return self

    def resident(self):
        return self.multiprocessors // self.max_cluster


GPUS = {
    "sm_80": Gpu(108, 1, 166912),
    "sm_90a": Gpu(132, 16, 232448),
    "sm_100a": Gpu(148, 16, 232448),
    "sm_120": Gpu(170, 8, 101376),
}


@pytest.mark.slow
@pytest.mark.parametrize("architecture", GPUS)
def test_every_part_compiles_without_spilling(architecture):
    found = dict.fromkeys(part.kernel for part in parts(GPUS[architecture]))
    assert len(found) >= (6 if architecture == "sm_80" else 12)
    for kernel in [empty(), *found]:
        compiled = nvrtc.compile(
            kernel.source(), {**nvrtc.headers(), "cells.cuh": device_struct(kernel.cell)}, architecture
        )
        assert compiled.spilled == 0, (kernel, compiled.log)
        assert compiled.registers <= min(255, 65536 // kernel.threads), kernel


def test_parts_tell_each_other_apart():
    for quick in (False, True):
        keys = [part.key for part in parts(GPUS["sm_90a"], quick)]
        assert all(keys.count(key) == 1 for key in keys)
    assert not any(part.kernel.C > 1 for part in parts(GPUS["sm_80"])), "no clusters, no parts of theirs"


@pytest.mark.slow
def test_all_clusters_at_once_are_as_many_as_there_is_room_for():
    twin = Twin(multiprocessors=6)
    part = everywhere(twin, 2, 32)
    assert part.blocks == 6 and part.kernel.shared_bytes == twin.shared_bytes
    assert torch.equal(launch(twin, part, torch.device("cpu"))(2), expected(part, 2))


def test_arguments_as_the_kernel_has_them():
    assert ctypes.sizeof(Arguments) == 40 and Arguments.arrivals.offset == 16


class Failing(Exception):
    pass


def test_what_fails_is_said_and_what_is_known_is_not_measured_again():
    def job(found=None, error=None):
        def run():
            if error:
                raise error
            return found

        return run

    report, said, saved = {}, [], []
    todo = [
        ({"what": "a", "C": 8}, job({"us": 1.0, "least": 0.9, "most": 1.2})),
        ({"what": "b"}, job(error=RuntimeError("no room\nand more"))),
        ({"what": "c"}, job({"us": 2.0})),
    ]
    assert micro.take(iter(todo), report, lambda: saved.append(len(report["records"])), said.append)
    a, b, c = report["records"]
    assert a["found"]["us"] == 1.0 and a["error"] is None and c["error"] is None
    assert b["error"] == "RuntimeError: no room" and b["found"] == {}
    assert saved == [1, 1, 2, 2, 3, 3], "there is a record before and after each measurement"
    assert "1.000 us" in said[0] and "C 8" in said[0] and "no room" in said[1]
    micro.take(iter([(key, job(error=Failing())) for key, _ in todo]), report, lambda: None, said.append)
    assert len(report["records"]) == 3 and len(said) == 3
    report = {}
    assert not micro.take(iter(todo), report, lambda: None, said.append, dead=lambda: "lost")
    assert len(report["records"]) == 2, "nothing is measured on a GPU that is lost"


def test_what_a_process_died_of_is_not_tried_again():
    report, todo = {}, [({"what": "a"}, lambda: (_ for _ in ()).throw(KeyboardInterrupt()))]
    with pytest.raises(KeyboardInterrupt):
        micro.take(iter(todo), report, lambda: None, print)
    assert report["records"][0]["error"] == "the process ended while this was measured"
    micro.take(iter(todo), report, lambda: None, print)


@pytest.mark.parametrize(
    "record, words",
    [
        ({"what": "launch"}, ["2.00 us of the host", "1.00 us in a graph"]),
        ({"what": "clock under load"}, ["1980 MHz"]),
        ({"what": "clusters at a time"}, ["of 8: 16 / 15"]),
        ({"what": "products", "number": "bf16"}, ["number bf16", "12.3 TFLOP/s"]),
        ({"what": "weights from L2"}, ["1,234 GB/s", "0.200 apart"]),
    ],
    ids=str,
)  # fmt: skip
def test_records_as_lines(record, words):
    found = {
        "launch": {"us": 3.0, "host_us": 2.0, "graph_us": 1.0},
        "clock under load": {"mhz": 1980.0},
        "clusters at a time": {"clusters": {"8": {"small": 16, "whole multiprocessors": 15}}},
        "products": {"us": 1.0, "gflops": 12345.0},
        "weights from L2": {"us": 1.0, "least": 0.9, "most": 1.1, "gbs": 1234.0},
    }[record["what"]]
    line = micro.said({"key": record, "found": found, "error": None})
    assert line.startswith(record["what"]) and all(word in line for word in words), line


def test_without_a_gpu_it_says_so(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert micro.main([]) == 2
    assert "CUDA" in capsys.readouterr().err


def test_jobs_tell_each_other_apart_and_the_model_knows_their_names():
    named = {
        "clusters at a time",
        "launch",
        "clock under load",
        "all-gather",
        "grid barrier",
        "products",
        "weights from L2",
    }
    named |= {"copy by torch", "product of large matrices by torch"}
    for quick in (False, True):
        keys = [key for key, _ in micro.jobs(GPUS["sm_90a"], torch.device("cpu"), quick)]
        assert all(keys.count(key) == 1 for key in keys)
        assert named <= {key["what"] for key in keys}


@pytest.mark.slow
def test_the_time_of_a_round_is_the_difference_of_two_launches(monkeypatch):
    twin, part = Twin(), exchanged(4, 64, 4, 2, 6)
    monkeypatch.setattr(
        micro, "events", lambda run: 50.0 + 3.0 * int(run().max())
    )  # 3 microseconds a round, 50 around them
    found = micro.measure(twin, part, torch.device("cpu"))
    assert found["us"] == found["least"] == found["most"] == 3.0
    monkeypatch.setattr(micro, "expected", lambda part, rounds: expected(part, rounds) + 1)
    with pytest.raises(micro.Wrong, match="256 of 256 threads saw something else"):
        micro.measure(twin, part, torch.device("cpu"))


def test_rates_follow_from_the_time_of_a_round(monkeypatch):
    part = tensor_cores("bf16", 2, 2, 3, 5, 6)
    monkeypatch.setattr(micro, "launch", lambda *_: lambda rounds: expected(part, rounds))
    times = iter([9.0, 1.0] * (micro.REPEAT + 1))
    monkeypatch.setattr(micro, "events", lambda run: next(times))
    found = micro.measure(None, part, torch.device("cpu"))
    assert found["us"] == 2.0  # 8 microseconds for 4 rounds
    assert found["gflops"] == pytest.approx(6 * 2 * 5 * (16 * 8 * 16 * 2) / 2e-6 / 1e9)


class Event:
    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        self.at = time.perf_counter()

    def synchronize(self):
        pass

    def elapsed_time(self, end):
        return (end.at - self.at) * 1e3 + 1e-6


class Graph:
    replays = 0

    def replay(self):
        Graph.replays += 1


@pytest.fixture
def faked(monkeypatch):
    """torch.cuda as far as the measurements use it, over work that the CPU does."""
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: None)
    monkeypatch.setattr(micro, "COPIED", 1 << 16)
    monkeypatch.setattr(micro, "WIDE", 64)
    return torch.device("cpu")


@pytest.mark.slow
def test_launches_and_room_on_the_twin(faked, monkeypatch):
    twin = Twin(multiprocessors=4)
    monkeypatch.setattr(twin, "max_cluster", 4)
    found = micro.launches(twin, faked)
    assert min(found.values()) > 0 and set(found) == {"host_us", "us", "graph_us"} and Graph.replays
    assert sum(blocks == 4 for _, blocks in twin.launches) >= 400
    assert micro.active(twin) == {
        "clusters": {"2": {"small": 2, "whole multiprocessors": 2}, "4": {"small": 1, "whole multiprocessors": 1}}
    }


@pytest.mark.slow
def test_the_clock_is_read_under_load_and_the_load_is_waited_for(faked, monkeypatch):
    twin, settled = Twin(multiprocessors=1), []
    monkeypatch.setattr(micro, "tensor_cores", lambda *_: tensor_cores("bf16", 1, 1, 1, 1, 3))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: settled.append(True))
    monkeypatch.setattr(micro, "events", lambda run: 3e6)
    answers = iter([{"clocks.sm": "1900 MHz"}, {"clocks.sm": "1980 MHz"}, {"clocks.sm": "1950 MHz"}, {}, {}, {}])
    monkeypatch.setattr(micro, "smi", lambda query: next(answers))
    assert micro.clock(twin, faked) == {"mhz": 1950.0} and settled == [True]
    with pytest.raises(RuntimeError, match="nvidia-smi does not say"):
        micro.clock(twin, faked)
    assert settled == [True, True]


def test_large_products_and_copies(faked):
    before = torch.backends.cuda.matmul.allow_tf32
    for number in NUMBERS:
        found = micro.matrix_product(faked, number)
        n = 128 // NUMBERS[number].itemsize
        assert (
            found["gflops"] == pytest.approx(2 * n**3 / found["us"] / 1e3)
            and found["least"] <= found["us"] <= found["most"]
        )
    assert torch.backends.cuda.matmul.allow_tf32 is before
    found = micro.copy(faked)
    assert found["gbs"] == pytest.approx(2 * 65536 / found["us"] / 1e3)
    assert micro.step_product(faked, 2, 16, 4, torch.bfloat16)["us"] > 0


def test_everything_is_kept_in_a_file_and_not_measured_again(faked, monkeypatch, tmp_path):
    from gradkernels.backends.cuda import driver

    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    machine = SimpleNamespace(name="no GPU", multiprocessors=1, max_cluster=1, shared_bytes=0)
    monkeypatch.setattr(driver, "machine", lambda device: machine)
    monkeypatch.setattr(micro, "jobs", lambda *_: iter([({"what": "a"}, lambda: {"us": 1.0})]))
    path, said = tmp_path / "deep" / "micro.json", []
    report = micro.everything(path=path, say=said.append)
    assert report["machine"]["name"] == "no GPU" and report["lost"] is False and len(said) == 1
    assert json.loads(path.read_text())["records"] == report["records"]
    micro.everything(path=path, say=said.append)
    assert len(said) == 1
