"""What remembers how far: the table from runs made up, and the command with a run of three steps."""

import json

import pytest

from bench import tasks
from bench.tasks import markdown


def run(task, body, delay, seed, right, solved_at=None, horizon=None, init="default"):
    found = {"loss": 0.1, "trivial": 0.2, "right": right, "horizon": horizon, "solved_at": solved_at, "steps": 9}
    return {"task": task, "body": body, "init": init, "delay": delay, "seed": seed, **found, "seconds": 1.0}


def report(*rows, **options):
    about = {"options": {"seeds": 3, "steps": 9, **options}, "torch": "2.13", "commit": "0123456789"}
    return {**about, "date": "2026-01-02", "rows": rows}


def test_a_place_is_the_median_of_the_seeds_and_counts_who_solved_it():
    rights = ((0.2, None), (0.8, None), (0.99, 7))
    rows = [run("adding", "lstm", 10, k, *found, horizon=9 - k, init="chrono") for k, found in enumerate(rights)]
    text = markdown(report(*rows, run("adding", "attention", 30, 0, 1.0, 3)))
    assert "| | delay 10 | delay 30 |" in text
    assert "| lstm, chrono | 80%, 1 of 3, horizon 8 | - |" in text
    assert "| attention | - | 100%, 1 of 1 |" in text


def test_a_horizon_of_the_loss_is_told_only_where_the_loss_is_at_the_end():
    rows = [run("copy", "gru", 10, 0, 0.5, horizon=19), run("adding", "gru", 10, 0, 0.5, horizon=9)]
    of_loss, of_output = markdown(report(*rows)), markdown(report(*rows, horizon=tasks.LAST))
    assert "horizon 19" not in of_loss and "horizon 9" in of_loss and "where only that output is judged." in of_loss
    assert "horizon 19" in of_output and "horizon 9" in of_output and "where only" not in of_output


def test_the_bits_of_the_convolutions_ways_are_told():
    text = markdown(report(run("copy", "convolution", 10, 0, 0.1), run("copy", "convolution", 30, 0, 1.0, 5)))
    assert "15 = 1111b takes 4 layers, 4 of them in a row (0 of 1 seeds)" in text
    assert "35 = 100011b takes 3 layers, 2 of them in a row (1 of 1 seeds)" in text
    assert "1111b" not in markdown(report(run("copy", "gru", 10, 0, 0.1)))


@pytest.mark.parametrize(("body", "horizon"), [("gru", True), ("convolution", False)])
def test_command(body, horizon, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(tasks, "RESULTS", tmp_path)
    monkeypatch.setattr(tasks, "DELAYS", (3,))
    arguments = ["--seeds", "1", "--steps", "3", "--filter", f"copy {body} default", "--save"]
    assert tasks.main(arguments) == 0
    found = json.loads((tmp_path / "tasks.json").read_text())
    (row,) = found["rows"]
    assert (row["body"], row["delay"], row["horizon"] is not None) == (body, 3, horizon)
    text = (tmp_path / "tasks.md").read_text()
    assert (
        text == markdown(found) and text in capsys.readouterr().out and ("horizon" in text.split("## ")[1]) == horizon
    )
    assert tasks.main(["--filter", "transformer"]) == 1


def test_what_the_readme_says_is_not_solved():
    """Seeds that fail, by model, over delays of 10, 30 and 100: whoever measures anew writes that list anew."""
    rows = json.loads((tasks.RESULTS / "tasks.json").read_text())["rows"]
    failed = {}
    for row in rows:
        counts = failed.setdefault((row["task"], tasks.label(row["body"], row["init"])), dict.fromkeys(tasks.DELAYS, 0))
        counts[row["delay"]] += row["solved_at"] is None
    simple, gated = ("rnn_tanh", "rnn_tanh, orthogonal"), ("lstm", "lstm, chrono", "gru", "gru, chrono")
    want = {("adding", name): (0, 0, name == "lstm") for name in gated}
    want |= {("adding", name): (3, 3, 3) for name in simple} | {("copy", name): (3, 3, 3) for name in simple + gated}
    want |= {("adding", "attention"): (0, 0, 1), ("copy", "attention"): (0, 0, 0)}
    want |= {("adding", "convolution"): (0, 2, 3), ("copy", "convolution"): (3, 0, 2)}
    assert {name: tuple(counts.values()) for name, counts in failed.items()} == want
