"""python -m gradkernels flow."""

import json
import math
import re
import socket
import sys
from urllib.request import urlopen

import pytest
import torch

import gradkernels as gk
from gradkernels.__main__ import main
from gradkernels.flow import command
from tests.flow.made_up import snapshot

TINY = ("--steps", "3", "--length", "6", "--hidden", "5", "--batch", "2")


@pytest.fixture
def out(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path / "flow.html"


def data_in(text):
    return json.loads(re.search(r'id="data">(.*?)</script>', text, re.DOTALL)[1])


def runs_in(path):
    return data_in(path.read_text())["runs"]


def test_models_are_trained_side_by_side(out, capsys):
    assert main(["flow", *TINY]) == 0
    text = capsys.readouterr().out
    names = ["rnn_tanh", "lstm", "lstm:chrono"]
    assert [run["name"] for run in runs_in(out)] == names and all(run["steps"] == [1, 2, 3] for run in runs_in(out))
    assert re.findall(r"^(\S+) +\d\.\d+ +\d of 5 +\d of 5$", text, re.MULTILINE) == names
    untrained = data_in(out.read_text())["comparison"]
    assert [model["name"] for model in untrained["models"]] == names and untrained["lengths"] == [10, 50, 100, 200]
    assert re.search(rf"^guessing +{math.log(8):.4f}$", text, re.MULTILINE) and "The report is in flow.html." in text


def test_json(out, capsys):
    assert main(["flow", "gru:orthogonal", "--json", *TINY]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["report"] == "flow.html" and list(found["runs"]) == ["gru:orthogonal"]
    one = found["runs"]["gru:orthogonal"]
    assert len(one["losses"]) == 3 and 0 <= one["horizon_first"] <= 5 and 0 <= one["horizon_last"] <= 5


def test_every_initialisation(out, capsys):
    specs = [f"lstm:{init}" for init in command.INITS]
    assert main(["flow", *specs, "--json", *TINY]) == 0
    losses = [run["losses"][0] for run in json.loads(capsys.readouterr().out)["runs"].values()]
    assert len(set(losses)) == len(command.INITS)


def test_what_it_says_is_so(out, capsys):
    """Gates that are open reach the first symbol from the first step on, a simple RNN does not."""
    assert (
        main(["flow", "rnn_tanh", "lstm:forget", "--json", "--steps", "100", "--length", "50", "--hidden", "32"]) == 0
    )
    runs = json.loads(capsys.readouterr().out)["runs"]
    assert runs["rnn_tanh"]["horizon_first"] < 20 and runs["lstm:forget"]["horizon_first"] == 49
    assert [(alert["kind"], alert["step"]) for alert in runs["rnn_tanh"]["alerts"]] == [("vanishing", 100)]


def test_a_run_that_is_broken_off_is_reported(out, monkeypatch, capsys):
    step, taken = command.step, []

    def interrupted(*arguments):
        taken.append(step(*arguments))
        if len(taken) == 2:
            raise KeyboardInterrupt
        return taken[-1]

    monkeypatch.setattr(command, "step", interrupted)
    assert main(["flow", "gru", *TINY]) == 130
    assert [run["steps"] for run in runs_in(out)] == [[1, 2]]


def test_symbols_to_remember_come_first():
    symbols, targets = next(command.batches(5, 300, 0))
    assert torch.equal(symbols[0], targets) and set(targets.tolist()) == set(range(8))
    assert symbols[1:].min() == 8 and symbols[1:].max() == 15 and symbols.shape == (5, 300)


@pytest.mark.parametrize("given", [snapshot(), {"a": snapshot(2), "b": snapshot(3)}], ids=["one", "two"])
def test_snapshots_are_read(given, out, capsys):
    out.with_name("run.json").write_text(json.dumps(given))
    assert main(["flow", "--read", "run.json", "--html", "other.html"]) == 0
    assert len(runs_in(out.with_name("other.html"))) == (1 if "format" in given else 2)
    assert capsys.readouterr().out == "The report is in other.html.\n"


def test_live(out, monkeypatch, capsys):
    """The page is there from before the first step until Ctrl-C."""
    pages = []
    serve, module = gk.flow.serve, sys.modules["gradkernels.flow.serve"]

    def begin(*arguments, **others):
        server = serve(*arguments, **others)
        pages.append(urlopen(server.url).read().decode())
        return server

    def interrupted(server):
        pages.append(urlopen(server.url).read().decode())
        server.close()

    monkeypatch.setattr(gk.flow, "serve", begin)
    monkeypatch.setattr(module.Server, "wait", interrupted)
    monkeypatch.setattr(module, "SECONDS", 0.0)
    assert main(["flow", "--live", *TINY]) == 0
    steps = [data_in(page)["runs"][0]["steps"] for page in pages]
    assert steps == [[], [1, 2, 3]]
    assert re.search(r"The page stays at http://127.0.0.1:\d+/\?token=\S+ until Ctrl-C", capsys.readouterr().out)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["elman"], "no cell 'elman'; there are "),
        (["lstm:best"], "no initialisation 'best'; there are default, "),
        (["--steps", "0"], "must be at least 1, got 0"),
    ],
)
def test_bad_arguments_are_refused(arguments, text, out, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["flow", *arguments])
    assert stop.value.code == 2 and text in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--html", "nowhere/flow.html"], "cannot be written to nowhere/flow.html: there is no folder nowhere"),
        (["--read", "nothing.json"], "No such file or directory: 'nothing.json'"),
        (["--read", "words.json"], "words.json: Expecting value"),
        (["--read", "list.json"], "list.json: expected a monitor, its snapshot or a mapping"),
        (["--read", "old.json"], "old.json: this version reads snapshots of format 1, got format 0"),
        (["rnn_tanh:chrono"], "rnn_tanh:chrono: no layer in Recurrent has a gate"),
    ],
    ids=["folder", "file", "no json", "no snapshot", "format", "no gate"],
)
def test_what_cannot_be_done_is_said_before_training(arguments, text, out, capsys):
    for name, words in (("words", "hello"), ("list", "[1]"), ("old", '{"format": 0}')):
        out.with_name(f"{name}.json").write_text(words)
    assert main(["flow", *arguments, *TINY]) == 2
    said = capsys.readouterr()
    assert text in said.err and said.err.startswith("python -m gradkernels flow: ") and "loss" not in said.out


def test_a_port_that_is_taken(out, capsys):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        assert main(["flow", "--live", "--port", str(taken.getsockname()[1]), *TINY]) == 2
    assert "Address already in use; port=0 takes a free one" in capsys.readouterr().err
