"""gpu.sh: processes with limits, sections within the time, restarts after a lost GPU, and what it says without one."""

import json
import subprocess
import sys
import time

import pytest

from bench import run as bench_run
from bench.gpu import session
from bench.gpu.session import Outcome
from bench.machine import ROOT


def python(text, seconds=30.0, quiet=30.0, folder=None):
    return session.run("section", [sys.executable, "-u", "-c", text], seconds, folder, quiet)


def test_words_go_to_the_terminal_and_into_a_file(tmp_path, capfdbinary):
    done = python("import sys; print('out'); print('err', file=sys.stderr)", folder=tmp_path)
    assert done.said == "fine" and not done.ended
    python("print('more')", folder=tmp_path)
    log = (tmp_path / "session.log").read_text()
    assert log.count("== section: ") == 2 and sorted(w for w in log.split("\n") if w.isalpha()) == [
        "err",
        "more",
        "out",
    ]
    assert sorted(capfdbinary.readouterr().out.split()) == [b"err", b"more", b"out"]


@pytest.mark.parametrize(
    "text, said",
    [
        ("raise SystemExit(3)", "exit status 3"),
        ("import os; os.kill(os.getpid(), 9)", "SIGKILL"),
        ("1 / 0", "exit status 1"),
    ],
)
def test_a_failure_is_named(tmp_path, text, said):
    assert python(text, folder=tmp_path).said == said


@pytest.mark.parametrize(
    "limits, said",
    [({"seconds": 1.0}, "ended after 1 s"), ({"quiet": 1.0}, "ended after 1 s, without a word in the last of them")],
    ids=["too long", "too quiet"],
)
def test_what_hangs_is_ended_with_its_children(tmp_path, monkeypatch, limits, said):
    monkeypatch.setattr(session, "GRACE", 0.5)
    stays = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('here'); time.sleep(60)"
    begin = time.monotonic()
    done = python(
        f"import subprocess, sys; subprocess.run([sys.executable, '-c', {stays!r}])", folder=tmp_path, **limits
    )
    assert done.ended and done.said == said and time.monotonic() - begin < 20


def test_rows_go_on_after_a_lost_gpu_and_stop_when_they_are_through(tmp_path, monkeypatch):
    outcomes = iter(
        ["exit status 3", "SIGSEGV", "ended after 100 s, without a word in the last of them", "exit status 1"]
    )
    commands = []

    def run(section, command, seconds, folder, quiet=0):
        commands.append(command)
        said = next(outcomes)
        return Outcome(section, 1.0, said, said.startswith("ended"))

    monkeypatch.setattr(session, "run", run)
    o = session.arguments(["--variants", "--filter", "lstm", "--filter", "gru", "--try", "C=4", "--quick"])
    done = session.rows(o, time.monotonic() + 300, tmp_path)
    assert [d.said for d in done][-1] == "exit status 1" and len(done) == 4
    (command,) = {tuple(c[:-1]) for c in commands}
    assert command[1:4] == ("bench/run.py", "recurrent-gpu", "--resume")
    options = bench_run.arguments([*command[2:], "4.0"])  # it knows them all
    assert options.variants and options.tries == ["C=4"] and options.filter == ["lstm", "gru"] and options.quick
    assert options.json == tmp_path / "recurrent-gpu.json" and options.micro == tmp_path / "micro.json"
    assert bench_run.DEAD == session.AGAIN


def test_a_process_that_ends_within_a_row_is_followed_by_another(tmp_path):
    path, done = tmp_path / "rows.json", Outcome("rows", 1.0, "exit status 1", False)
    assert not session.lost(done, path)
    path.write_text(json.dumps({"running": None}))
    assert not session.lost(done, path)
    path.write_text(json.dumps({"running": "lstm 1,2,3 training"}))
    assert session.lost(done, path)


def test_no_process_is_begun_when_the_time_is_over(tmp_path, monkeypatch):
    monkeypatch.setattr(session, "run", lambda *_: pytest.fail("begun"))
    assert session.rows(session.arguments([]), time.monotonic() + 5, tmp_path) == []


@pytest.fixture
def sections(monkeypatch):
    """main() with processes that do nothing, and a GPU that is said to be there."""
    begun = []

    def run(section, command, seconds, folder, quiet=0):
        begun.append((section, command, seconds))
        return Outcome(section, 1.0, "fine", False)

    there = subprocess.CompletedProcess([], 0, stdout="some warning\nexample-gpu\n", stderr="")
    monkeypatch.setattr(session.subprocess, "run", lambda *_, **__: there)
    monkeypatch.setattr(session, "run", run)
    monkeypatch.setattr(session, "ROOT", ROOT)
    monkeypatch.setattr(session.shutil, "which", lambda tool: f"/opt/{tool}")
    return begun


def test_everything_in_order_within_the_time(sections, tmp_path, capsys):
    assert session.main([str(tmp_path)]) == 0
    names = [name for name, *_ in sections]
    assert names == ["environment", "micro", "tests", "sanitizer-memcheck", "sanitizer-racecheck", "rows", "layers"]
    limits = {name: seconds for name, _, seconds in sections}
    assert (
        limits["micro"] + limits["tests"] + 2 * limits["sanitizer-memcheck"] < 0.65 * 60 * 8.7
        and limits["rows"] < 60 * 4.5 < limits["layers"] < 60 * 9
    )
    suites = [c[2] for name, c, _ in sections if name in session.SUITES]
    assert suites == ["recurrent-gpu", "layers-gpu"]
    command = next(c for name, c, _ in sections if name == "tests")
    assert command[1:6] == ["-m", "pytest", "-m", "gpu", "-q"]
    assert [d["said"] for d in json.loads((tmp_path / "session.json").read_text())] == ["fine"] * 7
    assert f"everything is in {tmp_path}" in capsys.readouterr().out


def test_only_some_sections(sections, tmp_path):
    session.main([str(tmp_path), "--only", "rows", "--only", "micro", "--quick"])
    assert [name for name, *_ in sections] == ["environment", "micro", "rows"]
    assert sections[1][1][-1] == "--quick" and sections[2][2] > 60 * 8, "the last of the suites has all that is left"


def test_layers_alone(sections, tmp_path, monkeypatch):
    commands = []
    monkeypatch.setattr(session, "again", lambda section, command, end, *_, **__: commands.append(command) or [])
    session.main([str(tmp_path), "--only", "layers", "--try", "BM=64", "--anew"])
    (command,) = commands
    options = bench_run.arguments(command[2:])
    assert options.suite == "layers-gpu" and options.resume and options.tries == ["BM=64"] and options.micro is None
    assert options.json == tmp_path / "layers-gpu.json"


def test_missing_tools_are_named_and_no_failure(sections, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(session.shutil, "which", lambda tool: None)
    find = session.importlib.util.find_spec
    monkeypatch.setattr(session.importlib.util, "find_spec", lambda name: None if name == "pytest" else find(name))
    assert session.main([str(tmp_path), "--only", "tests", "--only", "sanitizer"]) == 0
    text = capsys.readouterr().out
    assert "pytest is not installed: the tests are left out" in text and "compute-sanitizer is not installed" in text


def test_sections_that_come_too_late_are_named(sections, tmp_path, capsys):
    assert session.main([str(tmp_path), "--minutes", "0.2"]) == 0
    assert [name for name, *_ in sections] == ["environment"]
    assert capsys.readouterr().out.count("no time left") == 5


def test_tables_of_what_there_is(sections, tmp_path, gpu_report, capsys):
    (tmp_path / "recurrent-gpu.json").write_text(json.dumps(gpu_report))
    (tmp_path / "micro.json").write_text(json.dumps(gpu_report["micro"]))
    session.main([str(tmp_path), "--only", "rows"])
    text = capsys.readouterr().out
    assert f"{len(gpu_report['rows'])} rows in {tmp_path / 'recurrent-gpu.md'}" in text
    assert "not reached: lstm 1,2,3 training" in text
    assert "lstm 1024,16,768 training fp16" in (tmp_path / "recurrent-gpu.md").read_text()
    assert sections[-1][0] == "constants"
    session.main([str(tmp_path), "--only", "rows", "--anew"])
    assert not (tmp_path / "recurrent-gpu.json").exists() and not (tmp_path / "micro.json").exists()


def test_the_script_says_that_there_is_no_gpu():
    done = subprocess.run(
        ["bash", str(ROOT / "bench" / "gpu.sh")],
        check=False,
        cwd="/",
        env={"PATH": "/usr/bin:/bin", "PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2, done.stdout
    assert done.stderr.startswith("bench/gpu.sh needs a GPU: torch ") and "CUDA" in done.stderr
