"""The package as a thing to install, import, read and run from a shell."""

import ast
import contextlib
import io
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import gradkernels as gk
from bench import flow, table, tasks
from bench.readme import rewritten
from gradkernels import demo
from gradkernels.__main__ import main

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]
REPORTS = [p for p in sorted((ROOT / "bench" / "results").rglob("*.json")) if p.with_suffix(".md").exists()]
README = (ROOT / "README.md").read_text()


def python(*arguments, **environment):
    """Run this Python in a process of its own, with this checkout's package."""
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def say(*arguments):
    """Exit code and output of `python -m gradkernels` with these arguments, in this process."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        code = main(list(arguments))
    return code, out.getvalue()


def test_version_is_written_once():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert project["project"]["dynamic"] == ["version"] and "version" not in project["project"]
    assert project["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "gradkernels.__version__"}
    assert f"## {gk.__version__}" in (ROOT / "CHANGELOG.md").read_text()


def test_building_does_not_import_torch():
    tree = ast.parse((ROOT / "setup.py").read_text())
    for node in ast.walk(tree):
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        names += [node.module] if isinstance(node, ast.ImportFrom) else []
        assert not any(name.split(".")[0] in ("torch", "gradkernels", "numpy") for name in names), names
    requires = tomllib.loads((ROOT / "pyproject.toml").read_text())["build-system"]["requires"]
    assert not any("torch" in line for line in requires)


def test_csrc_knows_nothing_of_torch():
    for path in (ROOT / "csrc").rglob("*.*"):
        assert not re.search(r"#include\s*[<\"](torch|ATen|c10)/", path.read_text()), path


def test_importing_is_quick_and_silent():
    """0.3 s over torch, taken as the best of three: another process may always get in between."""
    code = "import torch, time; t = time.perf_counter(); import gradkernels; d = time.perf_counter() - t; import sys; "
    found = [python("-W", "error", "-c", code + "sys.stderr.write(f'took {d}')") for _ in range(3)]
    for run in found:
        assert run.returncode == 0 and run.stdout == "" and re.fullmatch(r"took [\d.e-]+", run.stderr), run
    assert min(float(run.stderr.split()[1]) for run in found) < 0.3


@pytest.mark.parametrize("command", [(), ("demo",), ("doctor",), ("backends",), ("bench",)], ids=" ".join)
def test_help(command):
    found = python("-m", "gradkernels", *command, "--help")
    assert found.returncode == 0 and found.stdout.startswith("usage: python -m gradkernels"), found
    assert "--json" in found.stdout or not command


@pytest.mark.parametrize(
    "arguments", [("demo", "--steps", "0"), ("demo", "--cell", "elman"), ("flew",), ()], ids=" ".join
)
def test_bad_arguments_are_refused(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        main(list(arguments))
    assert stop.value.code == 2 and "usage:" in capsys.readouterr().err


def test_doctor_and_backends():
    code, text = say("doctor")
    assert code == 0 and f"gradkernels {gk.__version__}" in text
    code, text = say("doctor", "--json")
    assert code == 0 and json.loads(text)["backends"] == gk.backends()
    code, text = say("backends", "--json")
    assert code == 0 and json.loads(text) == gk.backends()
    code, text = say("backends")
    assert code == 0 and [line.split()[0] for line in text.splitlines()] == list(gk.backends())


TINY = ("--steps", "3", "--hidden", "5", "--batch", "3", "--length", "7")


@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn"])
def test_demo_agrees(cell, monkeypatch, capsys):
    if cell != "lstm":  # measured once
        monkeypatch.setattr(demo, "memory_in_own_process", lambda args, name: 1)
    assert main(["demo", "--cell", cell, "--json", *TINY]) == 0
    found = json.loads(capsys.readouterr().out)
    agreement, results = found["agreement"], found["results"]
    assert agreement["agree"] and agreement["first_beyond_bound"] is None
    for run in results.values():
        assert len(run["losses"]) == 3 and run["peak_memory_bytes"] > 0 and run["characters_per_second"] > 0
        assert 4 < run["final_loss"] < 5 and 4 < run["validation_loss"] < 5
    differences = [abs(a - b) for a, b in zip(*(run["losses"] for run in results.values()))]
    assert agreement["largest_difference"] == max(differences) <= max(agreement["bounds"]) < 1e-4
    assert found["settings"]["backend"] in gk.backends() and found["sample"].startswith("def ")


def test_demo_fails_when_the_curves_part(monkeypatch, capsys):
    """A gradient that is wrong by a part in a thousand must not pass."""
    step = demo.Trainer.run

    def run(self, steps):
        if type(self.model.recurrent) is gk.nn.LSTM:
            self.model.recurrent.weight_hh_l0.register_hook(lambda grad: grad + 1e-3)
        step(self, steps)

    monkeypatch.setattr(demo.Trainer, "run", run)
    monkeypatch.setattr(demo, "memory_in_own_process", lambda args, name: 1)
    assert main(["demo", *TINY]) == 1
    assert re.search(r"DIVERGE, first at step [23]\.", capsys.readouterr().out)


def test_demo_prints_a_table_and_plots(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demo, "memory_in_own_process", lambda args, name: 3 << 20)
    arguments = ["demo", *TINY, "--backend", "reference"]
    if importable("matplotlib"):
        arguments += ["--plot", str(tmp_path / "losses.png")]
    assert main(arguments) == 0
    text = capsys.readouterr().out
    table = re.search(r"^ +torch +gradkernels +ratio\n-+\n(.+\n)+", text, re.MULTILINE)[0].splitlines()
    assert {len(line) for line in table} == {len(table[1]), len(table[1]) - len("  ratio")}, text
    assert "agree at every step" in text and "    def " in text
    assert (tmp_path / "losses.png").exists() == importable("matplotlib")


def importable(name):
    return python("-c", f"import {name}").returncode == 0


@pytest.mark.parametrize(
    ("ours", "agree", "first"),
    [
        ([4.0, 3.0, 2.0], True, None),
        ([4.0, 3.0 + 30e-4, 2.0], True, None),
        ([4.0, 3.0 + 40e-4, 2.0], False, 2),
        ([4.0 + 1e-4, 3.0, 2.0], False, 1),
        ([4.0, 3.0, math.nan], False, 3),
        ([4.0, 3.0, math.inf], False, 3),
    ],
)
def test_loss_curves_are_compared_by_the_noise_seen_so_far(ours, agree, first):
    found = demo.compare([4.0, 3.0, 2.0], ours, [4.0, 3.0001, 2.0])
    assert (found["agree"], found["first_beyond_bound"]) == (agree, first)


def test_progress_is_plain_when_piped():
    out = io.StringIO()
    with demo.Progress(["one", "three"], 20, out) as progress:
        for _ in range(20):
            progress.advance("three", 1, "x")
    assert out.getvalue().splitlines()[0] == "three   2/20  x" and len(out.getvalue().splitlines()) == 10


def test_progress_draws_bars_on_a_terminal():
    pytest.importorskip("rich", reason="bars need rich, which the package does without")

    class Terminal(io.StringIO):
        def isatty(self):
            return True

    out = Terminal()
    with demo.Progress(["one"], 2, out) as progress:
        progress.advance("one", 2, "well")
    assert "2/2" in out.getvalue() and "well" in out.getvalue() and "one  2/2" not in out.getvalue()


def test_readme_examples_run(tmp_path):
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert blocks
    for block in blocks:
        (tmp_path / "example.py").write_text(block)
        found = python("-W", "error", str(tmp_path / "example.py"))
        assert found.returncode == 0, f"{block}\n{found.stderr}"


def test_readme_numbers_are_those_of_the_committed_report():
    assert rewritten(README) == README, "python -m bench.readme makes the table again"


@pytest.mark.parametrize("path", REPORTS, ids=lambda p: p.stem)
def test_committed_pages_are_those_of_their_reports(path):
    report, page = json.loads(path.read_text()), path.with_suffix(".md").read_text()
    if path.stem in ("flow", "tasks"):
        assert page == {"flow": flow, "tasks": tasks}[path.stem].markdown(report)
        return
    pictures = [p.name for p in (path.with_suffix(".png"), path.with_name(f"{path.stem}_more.png")) if p.exists()]
    reasons = path.with_name("reasons.json")
    known = json.loads(reasons.read_text()) if reasons.exists() else None
    assert page == table.markdown(report, known, pictures), f"python -m bench.plot {path} makes the page again"


def test_readme_links_and_commands_exist():
    links = [link for link in re.findall(r"\]\(([^)#\s]+)[^)]*\)", README) if "://" not in link]
    assert links
    for link in links:
        assert (ROOT / link).exists(), link
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"`?\bmake ([a-z]+)\b", README))
    assert {"demo", "test"} <= targets
    for target in targets:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
