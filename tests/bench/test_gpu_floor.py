"""The floor and the planner's constants, from measurements made up so that what follows can be worked out by hand."""

import ast
import copy
import json
from dataclasses import fields, replace

import pytest

from bench.cases import Case
from bench.gpu import floor
from gradkernels.backends.cuda import costs
from tests.bench.made_up import MICRO

CASE = Case("g", "lstm", "inference", 100, 16, 512, dtype="bfloat16", device="cuda")


def test_constants_as_worked_out_by_hand():  # a cycle is a nanosecond there
    found = {name: value for name, (value, _) in floor.constants(MICRO).items()}
    assert found["clock"] == 1e9
    assert found["mma"] == pytest.approx(400 * 4 / (32 * 8))  # 32 products by each of 8 warps, on quarters
    assert found["chain"] == pytest.approx(4 * 640 / 16)
    assert found["barrier"] == pytest.approx(1500), "of the largest grid"
    assert found["told"] == pytest.approx(1000), "1250 at 4 KB heard, 5000 at 64 KB"
    assert found["neighbour_latency"] == pytest.approx(300)  # 400 at 1600 bytes received, 600 at 4800
    assert found["neighbour"] == pytest.approx(3200 / 200)
    assert found["l2"] == pytest.approx(65536 / 4096)
    assert found["launch"] == pytest.approx(3000), "the slower of host and device"
    assert found["library"] == pytest.approx(600000 / 2 / 132)
    assert set(found) <= {f.name for f in fields(costs.Machine)}


def test_what_was_not_measured_stays_as_it_was():
    report = {**MICRO, "records": [r for r in MICRO["records"] if r["key"]["what"] == "grid barrier"]}
    assert set(floor.constants(report)) == {"barrier"}
    m = floor.machine(report)
    assert replace(m, barrier=costs.MACHINE.barrier) == costs.MACHINE != m
    assert floor.machine({**MICRO, "records": []}) == costs.MACHINE


@pytest.mark.parametrize(
    "points, a, b", [([(1, 3), (2, 5), (3, 7)], 1, 2), ([(5, 4)], 4, 0), ([(2, 3), (2, 5)], 4, 0), ([(0, 0), (1, 3), (2, 3)], 0.5, 1.5)]
)  # fmt: skip
def test_lines(points, a, b):
    assert floor.line(points) == pytest.approx((a, b))


@pytest.mark.parametrize("which", ["forward", "backward"])
def test_a_floor_is_below_what_the_planner_expects(which):
    for cell, H, B in (("lstm", 512, 16), ("gru", 200, 3), ("gru_reset_before", 256, 16)):
        least = floor.step(MICRO, cell, "bf16", H, B, which)
        assert 0 < least < floor.step(MICRO, cell, "bf16", H, B, which, floor=False)


def test_more_of_anything_is_no_cheaper():
    one = floor.step(MICRO, "lstm", "bf16", 256, 16, "forward")
    assert floor.step(MICRO, "lstm", "bf16", 512, 16, "forward") > one
    assert floor.step(MICRO, "lstm", "bf16", 256, 2048, "forward") > one
    assert floor.step(MICRO, "lstm", "tf32", 256, 16, "forward") > one
    slow = copy.deepcopy(MICRO)
    for r in slow["records"]:
        if r["key"]["what"] in ("grid barrier", "all-gather"):
            r["found"] = {k: 2 * v for k, v in r["found"].items()}
    assert floor.step(slow, "lstm", "bf16", 256, 16, "forward") > one


def test_a_row_is_its_steps_and_its_large_products():
    least = floor.floor(CASE, MICRO, gflops=1e5)
    step = floor.step(MICRO, "lstm", "bf16", 512, 16, "forward")
    product = 100 * 16 * 2 * 4 * 512 * 512  # the input projection
    assert least == pytest.approx(100 * step / 1e3 + product / 1e5 / 1e6)
    training = floor.floor(replace(CASE, mode="training"), MICRO, gflops=1e5)
    back = floor.step(MICRO, "lstm", "bf16", 512, 16, "backward")
    # the projection, its two gradients, and the gradient of the recurrent matrix
    assert training == pytest.approx(100 * (step + back) / 1e3 + 4 * product / 1e5 / 1e6)


def test_layers_follow_one_another_and_directions_need_not():
    one = floor.floor(CASE, MICRO, gflops=float("inf"))
    assert floor.floor(replace(CASE, layers=2), MICRO, gflops=float("inf")) == pytest.approx(2 * one)
    assert floor.floor(replace(CASE, bidirectional=True), MICRO, gflops=float("inf")) == pytest.approx(one)


def test_rows_that_have_ended_cost_nothing():
    ragged = replace(CASE, T=4, B=40, layout="packed", tokens=100)
    rows = [sum(n > t for n in ragged.lengths()) for t in range(4)]
    assert sum(rows) == 100 and rows[0] == 40
    steps = sum(floor.step(MICRO, "lstm", "bf16", 512, n, "forward") for n in rows)
    assert floor.floor(ragged, MICRO, gflops=float("inf")) == pytest.approx(steps / 1e3)


@pytest.mark.parametrize("more", [{"dtype": "float64"}, {"kind": "memory"}, {"proj_size": 64}], ids=str)
def test_no_floor_where_there_is_no_model(more):
    assert floor.floor(replace(CASE, **more), MICRO, 1.0) is None


def test_constants_are_printed_for_the_planner(tmp_path, capsys):
    path = tmp_path / "micro.json"
    path.write_text(json.dumps(MICRO))
    assert floor.main([str(path)]) == 0
    text = capsys.readouterr().out
    for f in fields(costs.Machine):
        assert f"    {f.name}: float = " in text
    assert "barrier: float = 1500  # grid barrier of 132 blocks; was" in text and "Example GPU" in text
    assert "shared: float = 128  # not measured: as it was" in text
    body = [line for line in text.splitlines() if line.startswith("    ")]
    tree = ast.parse("class Machine:\n" + "\n".join(body))  # it is Python as it stands
    assert [a.target.id for a in tree.body[0].body] == [f.name for f in fields(costs.Machine)]
    assert floor.main([]) == 2
