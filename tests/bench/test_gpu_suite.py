"""Rows for a GPU measured as far as it goes without one: the twin runs the kernels, events are the host's clock."""

import json
import time
from dataclasses import replace

import pytest
import torch

from bench import agreement, cases, measure, providers, run
from bench.cases import Case, Target
from bench.gpu import device, micro, picks, small, suite
from tests import place
from tests.bench.made_up import GPU, MICRO
from tests.cuda_on_cpu.machine import twin  # noqa: F401 - a fixture

ROW = Case("g", "gru", "inference", 3, 3, 24, targets=(Target("torch", 1e-9),), device="cuda")


class Watch(measure.HostWatch):
    """Where there are no events."""


@pytest.fixture
def here(monkeypatch, twin):  # noqa: F811
    """A suite of one row on "cuda", which is the twin on CPU tensors."""
    monkeypatch.setitem(cases.SUITES, "recurrent-gpu", lambda: [ROW])
    monkeypatch.setattr(suite, "why_not", lambda: None)
    monkeypatch.setattr(suite, "dead", lambda: None)
    monkeypatch.setattr(device, "Events", Watch)
    monkeypatch.setattr(device, "describe", lambda: GPU)
    monkeypatch.setattr(micro, "everything", lambda quick, path: MICRO)
    monkeypatch.setattr(suite, "plan", lambda case: "made up")
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: None)
    honest = providers.build
    on_cpu = lambda case, *more: honest(replace(case, device="cpu"), *more)
    for module in (suite, agreement):
        monkeypatch.setattr(module, "build", on_cpu)
    monkeypatch.setattr(providers.Provider, "algorithm", lambda self: "made up")
    threads = torch.get_num_threads()
    with place.tf32(torch.backends.cudnn.allow_tf32):
        yield twin
    torch.set_num_threads(threads)


def command(path, *more):
    return [
        "recurrent-gpu",
        "--budget",
        "0.01",
        "--repeat",
        "1",
        "--wait",
        "1e9",
        "--json",
        str(path),
        "--backend",
        "cuda",
        *more,
    ]


@pytest.mark.slow
def test_a_row_from_end_to_end(here, tmp_path, capsys):
    path = tmp_path / "rows.json"
    assert run.main(command(path, "--try", "exchange=grid,N=8", "--try", "C=99", "--try", "kind=step")) == 0
    report = json.loads(path.read_text())
    (row,) = report["rows"]
    assert (
        row["error"] is None and row["backend"] == "cuda" and row["plan"] == "made up" and row["algorithm"] == "made up"
    )
    assert set(row["results"]) == {"ours", "torch", "ours:exchange=grid,N=8", "ours:kind=step"}
    assert list(row["absent"]) == ["ours:C=99"] and "no plan with C=99" in row["absent"]["ours:C=99"]
    assert row["step_us"] == pytest.approx(row["results"]["ours"]["median"] * 1e3 / 3) and 0 < row["share"] < 1
    assert row["met"] is True and {r["against"] for r in row["ratios"]} == {
        "torch",
        "ours:exchange=grid,N=8",
        "ours:kind=step",
    }
    assert report["not_reached"] == [] and report["running"] is None and report["micro"] == MICRO
    kinds = {getattr(variant, "exchange", "step") for variant, _ in here.launches}
    assert {"grid", "step"} <= kinds, "each ran by its own plan"
    assert "gradkernels, exchange=grid, N=8" in capsys.readouterr().out


def test_numbers_that_disagree_leave_out_one_who_is_timed_along(here, monkeypatch):
    case = replace(ROW, providers=("ours", "torch", "ours:kind=step"), backend="reference")
    row, o = run.blank(case), run.arguments(command("x"))

    def agree(case, seen):
        if case.providers[0] != "ours":
            raise agreement.Disagreement("outputs is off")
        return {}

    monkeypatch.setattr(suite, "agree", agree)
    suite.measure(row, case, o, {})
    assert row["absent"] == {"ours:kind=step": "Disagreement: outputs is off"} and set(row["results"]) == {
        "ours",
        "torch",
    }


def test_a_compilers_own_kind_of_error_is_an_error_of_the_row(here, monkeypatch):
    class CompilationError(Exception):
        pass

    def fail(*_):
        raise CompilationError("at 3:14")

    monkeypatch.setattr(suite, "agree", fail)
    row = run.measure(ROW, run.arguments(command("x")), {})
    assert row["error"] == "RuntimeError: CompilationError: at 3:14"


def test_an_interrupted_run_goes_on_where_it_was(monkeypatch, tmp_path):
    todo = [replace(ROW, T=t) for t in (1, 2, 3, 4)]
    report, o = {"rows": [], "limits": {}, "machine": {"has": []}}, run.arguments(["recurrent-gpu"])
    measured = []

    def measure(case, o, seen):
        measured.append(case.T)
        return {**run.blank(case), "error": "not measured, but done"}

    monkeypatch.setattr(run, "measure", measure)
    monkeypatch.setattr(suite, "dead", lambda: None)
    fewer = {**run.blank(todo[2]), "results": {"ours": {}}}  # torch was not timed
    before = {"rows": [{**run.blank(todo[0]), "results": {"ours": {}, "torch": {}}}, fewer], "running": todo[1].name}
    run.resumed(report, before, todo)
    assert [r["name"] for r in report["rows"]] == [c.name for c in todo[:2]]
    assert report["rows"][1]["error"] == "the process ended while this row was measured"
    assert [r["T"] for r in run.rows(todo, o, report)] == [3, 4] and measured == [3, 4]
    assert report["not_reached"] == [] and report["running"] is None


def test_when_the_time_is_up_the_rest_is_named(monkeypatch):
    todo = [replace(ROW, T=t) for t in (1, 2, 3)]
    report, o = {"rows": [], "limits": {}, "machine": {"has": []}}, run.arguments(["recurrent-gpu", "--minutes", "1"])
    clock = iter([0.0, 1.0, 61.0])
    monkeypatch.setattr(run.time, "perf_counter", lambda: next(clock))
    monkeypatch.setattr(run, "measure", lambda case, *_: {**run.blank(case), "error": "no"})
    monkeypatch.setattr(suite, "dead", lambda: None)
    assert [r["T"] for r in run.rows(todo, o, report)] == [1]
    assert report["not_reached"] == [c.name for c in todo[1:]]


def test_a_lost_gpu_ends_the_process_with_a_status_of_its_own(here, monkeypatch, tmp_path):
    monkeypatch.setitem(cases.SUITES, "recurrent-gpu", lambda: [replace(ROW, T=t) for t in (1, 2)])
    monkeypatch.setattr(suite, "dead", lambda: "an illegal memory access was encountered")
    monkeypatch.setattr(run, "measure", lambda case, *_: {**run.blank(case), "error": "RuntimeError: illegal"})
    path = tmp_path / "rows.json"
    assert run.main(command(path)) == run.DEAD
    report = json.loads(path.read_text())
    assert (
        len(report["rows"]) == 1 and "illegal" in report["dead"] and report["not_reached"] == [replace(ROW, T=2).name]
    )
    monkeypatch.setattr(suite, "dead", lambda: None)
    assert run.main(command(path, "--resume")) == 1
    assert [r["T"] for r in json.loads(path.read_text())["rows"]] == [1, 2]


def test_small_layers_by_every_plan(here, monkeypatch, capsys):
    ran = []

    class Fake:
        def __init__(self, case, key):
            self.key = key

        def run(self):
            ran.append(self.key)
            if "grid" in self.key:
                raise RuntimeError("no room\nand more")

    monkeypatch.setattr(small, "build", Fake)
    assert small.main() == 1
    assert len(ran) == 2 * len(small.PICKS) and capsys.readouterr().out.count(": RuntimeError: no room\n") == 2


def test_picks_leave_the_planner_as_it_was(twin):  # noqa: F811
    from gradkernels import cells
    from gradkernels.backends.cuda import costs, plan

    before = plan.plan, plan._forms, plan._candidates, costs.step
    for pick, kind in (("exchange=cluster,C=2", "cluster"), ("kind=step", "step")):
        found = picks.planned(pick, twin, cells.get("gru"), "bf16", 24, 3, "forward")
        assert found.kind == kind and (kind == "step" or found.variant.C == found.team == 2)
    both = [picks.planned("forward.C=2,backward.C=1", twin, cells.get("gru"), "bf16", 24, 3, w) for w in plan.WALKS]
    assert [p.variant.C for p in both] == [2, 1]
    with pytest.raises(RuntimeError, match="no plan with N=7"):
        picks.planned("N=7", twin, cells.get("gru"), "bf16", 24, 3, "forward")
    assert before == (plan.plan, plan._forms, plan._candidates, costs.step)


class Cuda:
    """As much of torch.cuda as times calls: every call takes 2 ms, filling the caches 1."""

    def __init__(self, monkeypatch):
        self.now, self.log = 0.0, []
        cuda = self

        class Event:
            def __init__(self, enable_timing):
                assert enable_timing

            def record(self):
                self.at = cuda.now

            def elapsed_time(self, end):
                return end.at - self.at

        properties = type("P", (), {"L2_cache_size": 50 << 20})
        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda: self.log.append("settled"))
        monkeypatch.setattr(torch, "empty", lambda size, **_: cuda.other(size))

    def other(self, size):
        assert size == 100 << 20, "twice the second-level cache"
        self.zero_ = lambda: self.spend("fill", 1.0)
        return self

    def spend(self, name, ms):
        self.log.append(name)
        self.now += ms


def test_calls_are_timed_by_events_with_cold_caches(monkeypatch):
    cuda = Cuda(monkeypatch)
    watch = device.Events()
    got = watch.samples(lambda: cuda.spend("call", 2.0), measure.Plan(lead=50, calls=1, samples=4))
    assert got == [2.0] * 4
    assert cuda.log == ["call"] * 3 + ["fill", "call"] * 4 + ["settled"]
    assert measure.Plan.of(1e-5, watch.tick).calls == 1, "a call alone, however short"


def test_products_are_as_the_row_says_and_then_as_before():
    flags = lambda: (torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32)
    before = flags()
    for wanted in (True, False):
        with suite.products(replace(ROW, tf32=wanted)):
            assert flags() == (wanted, wanted)
    assert flags() == before


def test_long_sequences_are_compared_over_fewer_steps():
    long = replace(ROW, T=1024, layout="packed", tokens=2000)
    assert agreement.shortened(long).T == 48 and sum(agreement.shortened(long).lengths()) == 93
    assert agreement.shortened(replace(long, device="cpu")) == replace(long, device="cpu")
    assert agreement.peer(replace(ROW, providers=("ours", "compiled"))) == "loop"


def test_time_is_measured_once_for_each(monkeypatch):
    begin = time.perf_counter()
    spreads, rounds, _ = measure.interleaved([lambda: None], 0.0, 2, 1e9, watch=Watch())
    assert rounds == 2 and spreads[0].samples >= 2 and time.perf_counter() - begin < 5
