"""The rows for a GPU: which there are, what is asked of them, which of cuDNN's algorithms torch asks for, who is timed along."""

import importlib.util
from dataclasses import replace
from types import SimpleNamespace

import pytest

from bench import run
from bench.cases import MODES, Case, quick, recurrent_gpu
from bench.gpu import cudnn, peers, picks, suite
from bench.gpu.cudnn import Device

ALL = recurrent_gpu()
H100 = Device((9, 0), 132, 92000)


def test_names_are_unique_and_all_are_for_a_gpu():
    assert len({c.name for c in ALL}) == len(ALL)
    assert {c.device for c in ALL} == {"cuda"}
    assert ALL[0].name == "lstm 1024,16,768 inference fp16", "what is most telling comes first"


@pytest.mark.parametrize(
    "name, against, at_least",
    [
        ("lstm 1024,16,768 training fp16", "torch", 1.0),
        ("lstm 1024,16,512 inference fp16", "torch", 1.5),
        ("lstm 1024,16,256 training fp16", "torch", 2.0),
        ("lstm 1024,16,768 training bf16", "torch_fp16", 1.0),
        ("lstm 1024,16,768 training bf16", "torch", 3.0),
        ("gru 1024,16,768 inference bf16", "torch", 3.0),
        ("lstm 1024,16,768 inference tf32", "torch", 3.0),
        ("lstm 1024,16,768 training fp16 2 layers", "torch", 3.0),
        ("lstm 1024,16,512 training fp16 bidirectional", "torch", 3.0),
        ("lstm 1024,16,701 inference fp16", "torch", 3.0),
        ("lstm 1024,13,768 inference fp16", "torch", 3.0),
        ("lstm 1024,16,768 training bf16 proj 384", "torch", 3.0),
        ("gru 256,64,512 training bf16 packed", "torch", 5.0),
        ("lstm 256,64,512 inference bf16 ragged", "ours_padded", 0.9),
        ("lstm 1024,16,768 training bf16 probe", "ours_unwatched", 0.971),
        ("lstm 1024,16,768 training fp16 peak memory", "torch", 1.0),
    ],
)
def test_what_is_asked(name, against, at_least):
    (case,) = [c for c in ALL if c.name == name]
    (target,) = [t for t in case.targets if t.against == against]
    assert target.at_least == at_least


def test_where_more_is_asked_cudnn_is_not_persistent():
    for case in ALL:
        if case.group == "cudnn standard":
            both = {cudnn.one_way(replace(case, mode="inference"), H100, backward) for backward in (False, True)}
            assert both == {"STANDARD"}, case.name
        if case.group == "cudnn persistent":
            assert cudnn.one_way(case, H100, False).startswith("PERSIST"), case.name


def one(**more):
    return Case("g", **{"cell": "lstm", "mode": "inference", "T": 8, "B": 16, "H": 512, "dtype": "float16", **more})


@pytest.mark.parametrize(
    "more, device, said",
    [
        ({}, H100, "cuDNN 9.20.0, PERSIST_STATIC"),
        ({"mode": "training"}, H100, "cuDNN 9.20.0, PERSIST_STATIC"),
        ({"H": 1024, "B": 128}, H100, "cuDNN 9.20.0, PERSIST_STATIC"),
        ({"H": 1152}, H100, "cuDNN 9.20.0, STANDARD"),
        ({"B": 136}, H100, "cuDNN 9.20.0, STANDARD"),
        ({"B": 12}, H100, "cuDNN 9.20.0, STANDARD"),
        ({"cell": "gru"}, H100, "cuDNN 9.20.0, STANDARD"),
        ({"cell": "rnn_tanh", "H": 896, "B": 96}, H100, "cuDNN 9.20.0, STANDARD"),
        ({"cell": "rnn_tanh", "H": 896, "B": 88}, H100, "cuDNN 9.20.0, PERSIST_STATIC"),
        ({"dtype": "bfloat16"}, H100, "cuDNN 9.20.0, STANDARD"),
        ({"dtype": "float32"}, H100, "cuDNN 9.20.0, STANDARD"),
        ({"dtype": "bfloat16"}, Device((9, 0), 132, 91002), "cuDNN 9.10.2 is too old for bf16: torch's own loop over steps"),
        ({}, Device((8, 6), 128, 92000), "cuDNN 9.20.0, STANDARD"),
        ({}, Device((8, 0), 56, 92000), "cuDNN 9.20.0, STANDARD"),
        ({"H": 192}, H100, "cuDNN 9.20.0, PERSIST_STATIC_SMALL_H"),
        ({"H": 192, "mode": "training"}, H100, "cuDNN 9.20.0, PERSIST_STATIC_SMALL_H forward and STANDARD backward"),
        ({"H": 128, "dtype": "float32", "mode": "training"}, H100, "cuDNN 9.20.0, PERSIST_STATIC_SMALL_H"),
        ({"H": 128, "dtype": "float64"}, H100, "cuDNN 9.20.0, STANDARD"),
        ({"H": 128, "proj_size": 64}, H100, "cuDNN 9.20.0, STANDARD"),
        ({"H": 128, "layout": "packed", "tokens": 40}, H100, "cuDNN 9.20.0, STANDARD"),
        ({"layers": 2}, H100, "cuDNN 9.20.0, STANDARD"),
        ({}, Device((9, 0), 132, None), "no cuDNN: torch's own loop over steps"),
    ],
    ids=str,
)  # fmt: skip
def test_which_algorithm_torch_asks_for(more, device, said):
    assert cudnn.algorithm(one(**more), device) == said


def test_quick_leaves_every_kind_of_time():
    part = quick(ALL)
    assert set(part) < set(ALL) and all(c.H <= 512 for c in part)
    assert {c.group for c in ALL} - {c.group for c in part} <= {"peak memory"}


def test_other_plans_are_timed_along_on_request():
    o = run.arguments(["recurrent-gpu", "--variants", "--try", "exchange=grid,C=4", "--filter", "1024,16,512 .*fp16$"])
    for case in run.chosen(o):
        more = [p for p in case.providers if p.startswith("ours:")]
        assert more == [
            "ours:exchange=cluster", "ours:exchange=grid", "ours:kind=step", "ours:backend=triton", "ours:exchange=grid,C=4",
        ]  # fmt: skip
        assert {t.against for t in case.targets} >= set(more) and case.mode in MODES


def test_rows_for_the_cpu_have_no_such_company():
    o = run.arguments(["recurrent", "--variants", "--quick"])
    assert all(":" not in key for case in run.chosen(o) for key in case.providers)


def test_picks_are_read():
    assert picks.parsed("exchange=grid,C=4,N=16") == {"exchange": "grid", "C": 4, "N": 16}
    for wrong in ("", "grid", "C=", "=4", "C=4,,N=8"):
        with pytest.raises(ValueError, match="NAME=VALUE"):
            picks.parsed(wrong)


def test_other_packages_are_named_only_where_they_are(monkeypatch):
    assert peers.available(one()) == ()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: SimpleNamespace() if name == "torchrl" else None)
    assert peers.available(one()) == ("torchrl",)
    assert peers.available(one(cell="rnn_tanh")) == () and peers.available(one(bidirectional=True)) == ()
    case = suite.accompanied(replace(one(), device="cuda"), SimpleNamespace(variants=False, tries=[]))
    assert case.providers == ("ours", "torch", "torchrl") and case.targets[-1].against == "torchrl"


def test_without_a_gpu_the_command_says_so(monkeypatch, capsys):
    monkeypatch.setattr(suite, "why_not", lambda: "torch finds no CUDA device")
    assert run.main(["recurrent-gpu", "--quick"]) == 2
    assert "recurrent-gpu needs a GPU: torch finds no CUDA device" in capsys.readouterr().err
