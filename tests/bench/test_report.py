"""What follows from measurements: ratios, shares, verdicts, means."""

import json

import pytest

from bench import report as reports
from bench.cases import Case, Target
from tests.bench.made_up import LIMITS, MACHINE, around, invent

PLAIN = Case("shapes", "lstm", "inference", 128, 32, 256, targets=(Target("torch", 1.05), Target("limit", 0.95)))


def judged(case, has=("bf16",), limits=LIMITS, **medians):
    row = reports.blank(case)
    reports.fill(row, {k: around(v) for k, v in medians.items()})
    reports.judge(row, case, limits, list(has))
    return row


def test_ratio_rate_and_share():
    row = judged(PLAIN, ours=10.0, torch=20.0)
    assert row["ratio"] == 2.0
    assert row["gflop"] == pytest.approx(4.294967296)
    assert row["gflops"] == pytest.approx(429.4967296) and row["share"] == pytest.approx(429.4967296 / 400)
    assert row["limit_ms"] == pytest.approx(10.7374, rel=1e-4)
    assert row["met"] is True and not reports.short(row)


@pytest.mark.parametrize(
    "ours, torch, met, words",
    [
        (10.0, 10.5, True, []),
        (10.0, 10.4, False, ["1.04x torch, 1.05x asked"]),
        (20.0, 40.0, False, ["54% of the limit, 95% asked"]),
        (20.0, 10.0, False, ["0.50x torch, 1.05x asked", "54% of the limit, 95% asked"]),
    ],
)
def test_every_target_has_to_be_met(ours, torch, met, words):
    row = judged(PLAIN, ours=ours, torch=torch)
    assert row["met"] is met and reports.short(row) == words


def test_bf16_is_asked_only_where_the_cpu_has_it():
    case = Case(
        "bf16", "gru", "training", 8, 2, 64, dtype="bfloat16", providers=("ours", "torch", "ours_fp32"),
        targets=(Target("torch"), Target("ours_fp32", 1.8, needs="bf16")),
    )  # fmt: skip
    assert judged(case, ours=10.0, torch=9.0, ours_fp32=17.0)["met"] is False
    without = judged(case, has=(), ours=10.0, torch=9.0, ours_fp32=17.0)
    assert without["met"] is None and without["ratio"] == 0.9
    assert without["share"] == pytest.approx(without["gflops"] / 800)  # of the rate in its own dtype


def test_scale_makes_time_per_token():
    case = Case(
        "packed and ragged", "gru", "inference", 128, 32, 256, layout="packed", tokens=2048,
        providers=("ours", "torch", "ours_padded"), targets=(Target("torch"), Target("ours_padded", 0.9, scale=0.5)),
    )  # fmt: skip
    row = judged(case, ours=5.0, torch=9.0, ours_padded=9.2)
    assert row["ratios"][1]["value"] == pytest.approx(0.92) and row["met"] is True


def test_memory_has_no_rate():
    row = judged(
        Case("peak memory", "lstm", "training", 8, 2, 4, kind="memory", targets=(Target("torch", 1.0),)),
        ours=3.0,
        torch=6.0,
    )
    assert row["unit"] == "MiB" and row["ratio"] == 2.0 and row["gflops"] is None and row["share"] is None


def test_no_ratio_where_something_went_wrong():
    row = reports.blank(PLAIN)
    row["error"] = "the numbers disagree"
    reports.judge(row, PLAIN, LIMITS, [])
    assert row["ratio"] is None and row["met"] is None and row["ratios"] == []


def test_judging_again_with_other_limits():
    row = judged(PLAIN, ours=10.0, torch=20.0)
    faster = {**LIMITS, "float32": {**LIMITS["float32"], "gflops": 800.0}}
    reports.judge(row, PLAIN, faster, MACHINE["has"])
    assert row["share"] == pytest.approx(429.4967296 / 800) and row["met"] is False and len(row["ratios"]) == 2


def test_means_are_of_the_plain_shapes_alone():
    cases = [PLAIN, Case("shapes", "lstm", "training", 1, 1, 8, targets=(Target("torch", 1.0),))]
    other = Case("stacked", "lstm", "training", 1, 1, 8, layers=2, targets=(Target("torch", 1.0),))
    rows = invent(cases[:1], torch=2.0) + invent(cases[1:], torch=8.0) + invent([other], torch=100.0)
    (mean,) = reports.summarize(rows)
    assert mean == {"cell": "lstm", "rows": 2, "ratio": pytest.approx(4.0), "at_least": 1.5, "met": True}


def test_a_report_is_json(report):
    assert json.loads(json.dumps(report)) == report
