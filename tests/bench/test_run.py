"""The command from end to end on rows small enough for a test, its JSON, and measurements in processes of their own."""

import json
import re
import subprocess
import sys

import pytest
import torch

from bench import apart, cases, machine, run
from bench.cases import Case, Target
from bench.measure import Spread

MUST = {
    "name",
    "group",
    "kind",
    "cell",
    "mode",
    "dtype",
    "T",
    "B",
    "I",
    "H",
    "layers",
    "bidirectional",
    "proj_size",
    "layout",
}
MUST |= {"unit", "subject", "peer", "results", "rounds", "dropped", "backend", "algorithm", "agreement", "error"}
MUST |= {"gflop", "gflops", "share", "limit_ms", "ratio", "ratios", "met"}


def suite():
    return [
        Case("shapes", "lstm", "inference", 3, 2, 8, targets=(Target("torch", 1e-9), Target("limit", 1e-12))),
        Case("shapes", "lstm", "training", 3, 2, 8, targets=(Target("torch", 1e9),)),
        Case(
            "one step", "lstm", "step", 1, 1, 8, providers=("ours", "torch", "cell"), targets=(Target("torch"), Target("cell"))
        ),
    ]  # fmt: skip


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setitem(cases.SUITES, "recurrent", suite)
    monkeypatch.setattr(machine, "PRODUCTS", [(64, 64, 64)])
    monkeypatch.setattr(machine, "COPIED", 1)
    monkeypatch.setattr(machine, "limits", lambda seconds, honest=machine.limits: honest(0.0))
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


# a test machine is busy: any wait will do
QUICK = ["recurrent", "--budget", "0.02", "--repeat", "2", "--wait", "1e9", "--backend", "reference"]


def test_end_to_end(small, tmp_path, capsys):
    path = tmp_path / "deep" / "out.json"
    assert run.main([*QUICK, "--json", str(path)]) == 0
    report = json.loads(path.read_text())
    assert {"schema", "suite", "options", "machine", "limits", "limits_measured", "rows", "summary"} <= set(report)
    assert {"cpu", "cores", "threads", "capability", "versions", "commit", "dirty", "date"} <= set(report["machine"])
    assert [r["name"] for r in report["rows"]] == [c.name for c in suite()]
    for row in report["rows"]:
        assert set(row) >= MUST, MUST - set(row)
        assert row["error"] is None and row["backend"] == "reference" and row["rounds"] >= 2 and row["dropped"] == 0
        for spread in row["results"].values():
            assert 0 < spread["min"] <= spread["q1"] <= spread["median"] <= spread["q3"] and spread["samples"] >= 2
        ours, peer = row["results"][row["subject"]]["median"], row["results"][row["peer"]]["median"]
        assert row["ratio"] == peer / ours
    inference, training, step = report["rows"]
    assert inference["met"] is True and training["met"] is False and step["met"] is None
    assert training["gflop"] == 3 * inference["gflop"] and training["share"] > 0 and step["share"] is None
    text = capsys.readouterr().out
    assert all(c.name in text for c in suite()) and "1 of 2 rows meet everything" in text
    assert not list(tmp_path.rglob("*.part"))


def test_disagreement_prints_no_ratio_and_fails(small, tmp_path, capsys, monkeypatch):
    def refuse(case, seen):
        if case.mode == "training":
            raise run.Disagreement("outputs is off by 1.0e+00")
        return {}

    monkeypatch.setattr(run, "agree", refuse)
    path = tmp_path / "out.json"
    assert run.main([*QUICK, "--json", str(path)]) == 1
    _, training, step = json.loads(path.read_text())["rows"]
    assert training["results"] == {} and training["ratio"] is None and "disagree" in training["error"]
    assert step["ratio"] > 0, "the rows after are measured"
    assert "the numbers disagree, so there is no time: outputs is off" in capsys.readouterr().out


def test_a_backend_that_cannot_run_is_an_error_in_its_rows(small, capsys):
    assert run.main([*QUICK[:-1], "no such thing", "--filter", "inference$"]) == 1
    assert "ValueError" in capsys.readouterr().out


def test_interrupted_runs_keep_what_there_is(small, tmp_path, monkeypatch):
    measure = run.measure

    def stop(case, *more):
        if case.mode == "training":
            raise KeyboardInterrupt
        return measure(case, *more)

    monkeypatch.setattr(run, "measure", stop)
    path = tmp_path / "out.json"
    run.main([*QUICK, "--json", str(path)])
    assert len(json.loads(path.read_text())["rows"]) == 1


def test_filters_and_lists(capsys):
    assert run.main(["--list", "--filter", "gru .*bf16$", "--filter", "one step"]) == 0
    names = capsys.readouterr().out.split("\n")[:-1]
    assert names and all(re.search("gru .*bf16$|one step", n) for n in names)
    assert run.main(["--filter", "no such row"]) == 1
    assert "--list" in capsys.readouterr().err


def test_compiled_loops_on_request():
    without, with_them = (
        run.chosen(run.arguments(["--filter", "torch has not", *more])) for more in ([], ["--compile"])
    )
    assert len(without) == len(with_them) > 0
    for a, b in zip(without, with_them):
        assert (
            b.providers == (*a.providers, "compiled") and b.targets[: len(a.targets)] == a.targets and a.name == b.name
        )


def test_a_child_that_hangs_is_given_up(monkeypatch):
    monkeypatch.setattr(apart, "HANGS", 0.01)
    with pytest.raises(apart.ChildFailed, match="nothing after"):
        apart.finish(apart.start("memory", SMALL, "torch", 1))


@pytest.mark.parametrize("arguments", [["bench/run.py"], ["-m", "gradkernels", "bench"]])
def test_both_ways_to_call_it(arguments):
    found = subprocess.run(
        [sys.executable, *arguments, "recurrent", "--list", "--quick"],
        check=False,
        cwd=machine.ROOT,
        capture_output=True,
        text=True,
    )
    assert found.returncode == 0, found.stderr
    assert found.stdout.split("\n")[:-1] == [c.name for c in cases.quick(cases.recurrent())]


SMALL = Case("peak memory", "gru", "training", 64, 16, 32, kind="memory", backend="reference")


def test_peak_memory_in_a_fresh_process():
    # x, its gradient, outputs and what is kept: 64 * 16 * 32 floats are 128 KiB each
    got = apart.finish(apart.start("memory", SMALL, "torch", 1))
    assert 50 < got["before"] < got["peak"] < got["before"] + 500


def test_memory_and_processes_give_a_spread_for_each(monkeypatch):
    class Child:
        class stdin:
            @staticmethod
            def write(text):
                assert text == "go\n"

            @staticmethod
            def flush():
                pass

        class stdout:
            readline = staticmethod(lambda: "ready\n")

        def poll(self):
            return None

    found = iter([{"before": 10.0, "peak": 13.0}, {"before": 10.0, "peak": 16.0}])
    monkeypatch.setattr(apart, "start", lambda *_: Child())
    monkeypatch.setattr(apart, "finish", lambda child: next(found))
    assert {k: s.median for k, s in apart.memory(SMALL, 1).items()} == {"ours": 3.0, "torch": 6.0}
    found = iter([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0], [9.0], [8.0]])
    both = apart.processes(SMALL, 1, 0.1, 1)
    assert both["ours"] == Spread.of([4.0, 5.0, 6.0]), "the slower of the two counts"
    assert both["torch"].median == 9.0


def test_two_processes_for_real():
    pair = apart.processes(cases.replace(SMALL, T=2, providers=("torch",)), 1, 0.05, 1)
    assert pair["torch"].samples >= 3 and pair["torch"].median > 0


def test_a_child_that_fails_says_why():
    with pytest.raises(apart.ChildFailed, match="KeyError: 'nobody'"):
        apart.processes(cases.replace(SMALL, T=2, providers=("nobody",)), 1, 0.05, 1)
