"""What is measured: every row there, told apart, and its operations counted as by hand."""

import dataclasses

import pytest

from bench.cases import MODES, SHAPES, SUITES, Case, Target, quick, recurrent

ALL = recurrent()


def test_names_are_unique():
    assert len({c.name for c in ALL}) == len(ALL)


@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn_tanh"])
def test_every_shape_in_both_modes(cell):
    found = {(c.T, c.B, c.H, c.mode) for c in ALL if c.group == "shapes" and c.cell == cell}
    assert found == {(*shape, mode) for shape in SHAPES for mode in MODES}


@pytest.mark.parametrize(
    "name, against, at_least",
    [
        ("lstm 128,1,256 training", "torch", 2.5),
        ("lstm 512,16,128 inference", "torch", 1.05),
        ("lstm 128,64,512 training", "limit", 0.95),
        ("gru 128,1,256 training", "torch", 14.0),
        ("gru 128,1,256 inference", "torch", 5.0),
        ("gru 64,32,1024 inference", "torch", 2.2),
        ("rnn_tanh 128,1,256 training", "torch", 10.0),
        ("rnn_tanh 128,1,256 inference", "torch", 2.0),
        ("lstm 128,64,512 inference bf16", "ours_fp32", 1.8),
        ("lstm 128,32,256 inference packed", "torch", 2.4),
        ("lstm 128,32,256 training packed", "torch", 3.3),
        ("gru 128,32,256 training ragged", "ours_padded", 1.0),
        ("lstm 128,32,256 training proj 128", "torch", 1.3),
        ("lstm 128,32,256 inference 2 layers bidirectional", "torch", 1.3),
        ("gru_reset_before 128,32,256 training", "loop", 4.0),
        ("lstm 1,1,64 inference one step", "torch", 2.0),
        ("lstm 1,1,256 inference one step", "cell", 1.0),
        ("lstm 128,32,256 training probe", "ours_unwatched", 0.971),
        ("gru 64,32,1024 training peak memory", "torch", 1.0),
        ("lstm 128,1,256 training two processes", "torch", 1.0),
    ],
)
def test_what_is_asked(name, against, at_least):
    (case,) = [c for c in ALL if c.name == name]
    (target,) = [t for t in case.targets if t.against == against]
    assert target.at_least == at_least


def test_the_share_of_the_limit_is_asked_of_large_lstms_alone():
    asked = {(c.cell, c.T, c.B, c.H) for c in ALL if any(t.against == "limit" for t in c.targets)}
    assert asked == {("lstm", 128, 32, 256), ("lstm", 128, 64, 512), ("lstm", 64, 32, 1024)}


def test_every_target_is_measured():
    for case in ALL:
        assert case.providers[1] in {t.against for t in case.targets}, case.name
        assert {t.against for t in case.targets} <= {*case.providers, "limit"}, case.name


def test_lengths_are_fixed_and_make_the_sum():
    case = Case("g", "lstm", "inference", 128, 32, 256, layout="packed", tokens=2289)
    found = case.lengths()
    assert len(found) == 32 and sum(found) == 2289 and max(found) == 128 and min(found) >= 1
    assert found == case.lengths() and found != sorted(found, reverse=True)
    assert Case("g", "lstm", "inference", 5, 1, 8).lengths() is None


@pytest.mark.parametrize("tokens", [3, 4, 14, 15])
def test_lengths_at_the_ends(tokens):  # all rows of one step but the longest, and all full
    if tokens < 5 + 2:
        tokens = 7
    found = Case("g", "lstm", "inference", 5, 3, 8, layout="ragged", tokens=tokens).lengths()
    assert sum(found) == tokens and max(found) == 5


def flops(**more):
    return Case("g", **{"cell": "lstm", "mode": "inference", "T": 3, "B": 2, "H": 4, **more}).flops()


def test_operations_as_counted_by_hand():
    assert flops() == 3 * 2 * (2 * 16 * 4 + 2 * 16 * 4)  # two products of [1, 4] and [4, 16] a token
    assert flops(mode="training") == 3 * flops()
    assert flops(cell="gru") == flops() * 3 // 4
    assert flops(cell="gru_reset_before") == flops(cell="gru")
    assert flops(cell="rnn_sigmoid") == flops() // 4
    assert flops(proj_size=2) == 3 * 2 * (2 * 16 * 4 + 2 * 16 * 2 + 2 * 4 * 2)
    assert flops(layers=2) == 2 * flops()
    assert flops(bidirectional=True) == 2 * flops()
    # the second layer reads both directions of the first
    assert flops(layers=2, bidirectional=True) == 3 * 2 * 2 * (2 * 16 * (4 + 4) + 2 * 16 * (8 + 4))
    assert flops(layout="packed", tokens=4) == flops() * 4 // 6
    assert flops(dtype="bfloat16") == flops()


def test_dictionaries_and_back():
    for case in ALL:
        assert Case.from_dict(case.as_dict()) == case


def test_quick_is_a_part_without_large_shapes():
    part = quick(ALL)
    assert set(part) < set(ALL)
    assert {c.group for c in part} == {c.group for c in ALL}
    assert all(c.H <= 256 and c.B <= 32 for c in part)


def test_cases_are_values():
    case = ALL[0]
    assert hash(case) == hash(dataclasses.replace(case))
    with pytest.raises(dataclasses.FrozenInstanceError):
        case.T = 1
    assert Target("torch") == Target("torch", None, 1.0, None)
    assert SUITES["recurrent"] is recurrent
