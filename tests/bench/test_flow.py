"""What watching costs, from turns made up and from a small model's."""

import json

import pytest

from bench import flow
from bench.flow import Case, Pair, Turn, judged
from gradkernels.flow import recorder


def turns(extra, luck=0.0, alone=10.0):
    """Sixteen of each model; one in eight with records, which take 0.8 ms more."""
    return [
        Turn(k, "records" if n % 8 == 7 else "", alone, extra + (-luck, luck)[k] + 0.8 * (n % 8 == 7))
        for k in (0, 1)
        for n in range(16)
    ]


def test_each_kind_of_turn_counts_as_often_as_it_comes():
    found = judged(turns(0.1))
    assert found["extra"] == pytest.approx(0.2) and found["cost"] == pytest.approx(0.02)
    assert found["interval"] == pytest.approx((0.02, 0.02)) and found["alone"]["samples"] == 32


def test_what_a_model_owes_to_its_place_is_told_apart():
    found = judged(turns(0.1, luck=0.5))
    assert found["cost"] == pytest.approx(0.02) and found["luck"] == pytest.approx(0.05)


def test_one_turn_that_was_disturbed_moves_nothing():
    assert judged([*turns(0.1), Turn(0, "", 10.0, 300.0)])["cost"] == pytest.approx(0.02, rel=0.1)


@pytest.mark.parametrize(
    ("extra", "alone", "met"), [(0.1, 10.0, "holds"), (0.3, 10.0, "falls short"), (0.3, 2.0, None)]
)
def test_verdict(extra, alone, met):
    assert judged(turns(extra, alone=alone))["met"] == met


def test_open_when_the_interval_has_the_limit_inside():
    assert judged([Turn(k, "", 10.0, extra) for k in (0, 1) for extra in (0.0, 0.6) * 4])["met"] == "open"


def test_a_period_has_the_details_and_the_records_once(monkeypatch):
    monkeypatch.setattr(flow, "WAIT", 100.0)  # nothing is left out
    monkeypatch.setattr(recorder, "WAIT", 100.0)  # and no records are made early, whatever else the machine does
    pair = Pair(Case("GRU", 3, 2, 4))
    pair.turn = 4
    found, dropped = pair.period(1)
    assert dropped == 0 and len(found) == 32 and {t.watched for t in found} == {1}
    assert sum("details" in t.kind for t in found) == 1 and sum("records" in t.kind for t in found) == 1


@pytest.mark.parametrize("body", ("RNN", "AttentionBlock"))
def test_command(body, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(flow, "WAIT", 100.0)
    monkeypatch.setattr(flow, "CASES", [Case(body, 3, 2, 4, 2)])
    monkeypatch.setattr(flow, "RESULTS", tmp_path)
    assert flow.main(["--budget", "0.1", "--json", str(tmp_path / "out.json"), "--save"]) == 0
    name = f"{body} 3,2,4 2 layers"
    assert name in capsys.readouterr().out
    (folder,) = (p for p in tmp_path.iterdir() if p.is_dir())
    (row,) = json.loads((folder / "flow.json").read_text())["rows"]
    assert row["case"] == name and f"| {name} |" in (folder / "flow.md").read_text()
    assert flow.main(["--filter", "GRU"]) == 1
