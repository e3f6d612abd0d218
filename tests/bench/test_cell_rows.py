"""The rows of the family of cells: told apart, counted as by hand, the same numbers from everybody, one page and picture."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bench import agreement, apart, cell_loops, cell_rows, providers
from bench import report as reports
from bench.agreement import Disagreement, agree
from bench.cases import SUITES, Case, Target, quick
from bench.cell_rows import LONG, CellRow
from bench.measure import Spread
from gradkernels import cells
from tests.bench.made_up import LIMITS, MACHINE, invent

ALL = cell_rows.cell_rows()


def tiny(case):
    """The same row, small: periods and a skip still come into it, and a window that is not full. Units for four groups."""
    return replace(case, T=11, B=3, H=8, recompute=case.recompute and 4, backend="reference")


TINY = list({tiny(c): None for c in ALL if c.kind == "time"})
ids = lambda c: c.name


def test_names_are_unique_and_survive_json():
    assert len({c.name for c in ALL}) == len(ALL)
    for case in ALL:
        assert Case.from_dict(json.loads(json.dumps(case.as_dict()))) == case
    assert SUITES["cells"]() == ALL


def test_every_cell_that_torch_lacks_has_both_modes():
    for cell in {*cells.CELLS} - {*cell_rows.ELSEWHERE}:
        assert {c.mode for c in ALL if c.cell == cell} == {"inference", "training"}, cell


@pytest.mark.parametrize(
    "name, against, at_least, scale",
    [
        ("lstm_layer_norm 128,32,256 training", "loop", 4.0, 1.0),
        ("lstm_layer_norm 128,1,256 inference", "ours_plain", 0.8, 1.0),
        ("lstm_peephole 128,32,256 training", "ours_plain", 0.8, 1.0),
        ("lstm 128,32,256 training zoneout 0.1", "ours_plain", 0.8, 1.0),
        ("lstm 128,32,256 inference skip 8", "ours_plain", 0.8, 1.0),
        ("lstm_coupled 128,32,256 inference", "ours_plain", None, 0.75),
        ("leaky 128,32,256 training", "ours_plain", 1 / 1.3, 0.25),
        ("lstm 20000,1,256 training recompute 128 peak memory", "torch", 1.0, 1.0),
        ("leaky 128,32,256 training first step", "ours_cold", None, 1.0),
    ],
)
def test_what_is_asked(name, against, at_least, scale):
    (case,) = [c for c in ALL if c.name == name]
    (target,) = [t for t in case.targets if t.against == against]
    assert target == Target(against, at_least, scale)


def test_gates_are_those_of_the_cells():
    for case in ALL:
        for target in case.targets:
            if target.against == "ours_plain":
                assert target.scale == case.definition().G / cells.get(case.plain).G, case.name


def flops(cell, mode="inference", **more):
    return CellRow("g", cell, mode, 3, 2, 4, **more).flops()


def test_operations_as_counted_by_hand():
    one = 3 * 2 * 2 * 4 * 4  # a product of [1, 4] and [4, 4] for each of 6 tokens
    assert flops("lstm_layer_norm") == one * 4 * 2  # four gates of the input and of the state
    assert flops("lstm_coupled", "training") == one * 3 * 2 * 3
    assert flops("mgu") == one * 2 * 2 and flops("leaky") == one * 2
    assert flops("indrnn") == one  # nothing of the state
    assert flops("lstm", zoneout=0.5) == flops("lstm", recompute=2) == flops("lstm")
    # two units each: one group takes all 3 steps and sees the input and the other, which takes 2 steps
    assert flops("gru", periods=(1, 2)) == 3 * 2 * (2 * 3 * 2 * (4 + 2 + 2)) + 2 * 2 * (2 * 3 * 2 * (4 + 2))
    assert CellRow("g", "mgu", "training", 3, 2, 4).bytes() == 0


@pytest.mark.parametrize("case", TINY, ids=ids)
def test_everybody_agrees(case):
    worst = agree(case)
    assert worst["error"] <= worst["allowed"]


@pytest.mark.parametrize("case", [c for c in TINY if c.mode == "training"], ids=ids)
def test_training_gives_every_gradient(case):
    for key in case.providers:
        provider = providers.build(case, key)
        provider.run()
        assert provider.x.grad.abs().sum() > 0
        for name, p in provider.parameters.items():
            assert p.grad is not None and p.grad.abs().sum() > 0, (key, name)


@pytest.mark.parametrize("options", [{"zoneout": 0.5}, {"variational": 0.5}], ids=str)
@pytest.mark.parametrize("key", ["ours", "loop"])
def test_masks_are_drawn_in_training_alone(options, key):
    training = CellRow("g", "lstm", "training", 5, 2, 8, backend="reference", **options)
    for case, drawn in ((training, True), (training.exact(), False), (replace(training, mode="inference"), False)):
        provider = providers.build(case, key)
        first, second = (provider.call(provider.x)[0] for _ in range(2))
        assert torch.equal(first, second) is not drawn


@pytest.mark.parametrize("cell", ["lstm_peephole", "mgu", "indrnn"])
def test_a_cell_without_a_loop_has_one_of_its_own_text(cell, monkeypatch):
    """With parameters of units, with a second product, and without any."""
    layer = cell_rows.ours(CellRow("g", cell, "training", 4, 3, 8, backend="reference"))
    w, c = cell_loops.Weights(layer), cells.get(cell)
    values = torch.randn(3, c.G * 8), *(torch.randn(3, 8) for _ in range(c.S))
    written = cell_loops.STEPS[cell](w, *values)
    monkeypatch.delitem(cell_loops.STEPS, cell)
    for ours, theirs in zip(cell_loops.step_of(c)(w, *values), written, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_a_wrong_loop_is_caught(monkeypatch):
    coupled = lambda w, x, h, c: cell_loops.lstm_coupled(w, x, h, 1.001 * c)
    monkeypatch.setitem(cell_loops.STEPS, "lstm_coupled", coupled)
    with pytest.raises(Disagreement, match="outputs is off by"):
        agree(CellRow("g", "lstm_coupled", "training", 4, 3, 6, providers=("ours", "loop"), backend="reference"))


def test_of_long_sequences_the_beginning_is_compared(monkeypatch):
    seen, build = [], agreement.build
    monkeypatch.setattr(agreement, "build", lambda case, *more: seen.append(case) or build(tiny(case), *more))
    (case,) = [c for c in ALL if (c.T, c.B, c.H) == LONG and c.kind == "memory" and c.cell == "gru"]
    agree(case)
    assert {c.T for c in seen} == {cell_rows.COMPARED} and cell_rows.COMPARED % case.recompute == 1


def test_the_readme_has_this_cell():
    root = Path(__file__).parents[2]
    text = (root / "bench" / "own_cell.py").read_text()
    assert text[text.index("@gk.cell") :].strip() in (root / "README.md").read_text()


def test_first_steps_are_taken_in_one_folder_the_one_that_compiles_before(monkeypatch):
    calls = []
    monkeypatch.setattr(apart, "start", lambda what, case, key, threads, cache: calls.append((what, key, cache)))
    monkeypatch.setattr(apart, "finish", lambda child: float(len(calls)))
    (case,) = [c for c in ALL if c.kind == "first step"]
    found = apart.first_step(case, 1, repeat=2)
    assert [key for _, key, _ in calls] == ["ours_cold", "ours", "loop"] * 2
    assert len({cache for *_, cache in calls[:3]}) == 1 and calls[0][2] != calls[3][2]
    assert found["ours_cold"] == Spread.of([1.0, 4.0]) and found["ours"] == Spread.of([2.0, 5.0])


def test_a_first_step_for_real():
    case = CellRow("g", "leaky", "training", 3, 2, 8, "first step", providers=("ours", "loop"), backend="reference")
    assert 0 < apart.finish(apart.start("first step", case, "ours", 1)) < 60e3


def report():
    rows = invent(ALL, loop=4.0, ours_cold=30.0)
    return {
        "schema": reports.SCHEMA, "suite": "cells", "options": {}, "machine": MACHINE, "limits": LIMITS, "rows": rows,
        "summary": reports.summarize(rows), "seconds": 1.0,
    }  # fmt: skip


def test_a_report_renders(tmp_path):
    plot = pytest.importorskip("bench.plot", reason="needs matplotlib", exc_type=ImportError)
    path = tmp_path / "cells.json"
    path.write_text(json.dumps(report()))
    page, picture = plot.render(path)
    assert picture.read_bytes().startswith(b"\x89PNG")
    text = page.read_text()
    assert text.startswith("# The family of cells on Example")
    for case in ALL:
        assert f"| {case.name} |" in text
    for group in {c.group for c in ALL}:
        assert f"## {group}\n" not in text, "a heading says what is compared"


def test_every_ratio_is_drawn_once():
    plot = pytest.importorskip("bench.plot", reason="needs matplotlib", exc_type=ImportError)
    made = report()
    with plot.plt.rc_context(plot.STYLE):
        figure = plot.cells(made)
        figure.canvas.draw()
    assert sum(len(ax.patches) for ax in figure.axes) == sum(len(r["ratios"]) for r in made["rows"])
    for text in figure.findobj(plot.matplotlib.text.Text):
        if text.get_text() and text.get_visible():
            extent = text.get_window_extent()
            assert figure.bbox.x0 <= extent.x0 and extent.x1 <= figure.bbox.x1, text.get_text()
    plot.plt.close(figure)
    assert plot.cells({**made, "rows": []}) is None


def test_quick_leaves_long_sequences_out():
    part = quick(ALL)
    assert {c.group for c in ALL} - {c.group for c in part} == {"long sequences"}
    assert any(c.kind == "first step" for c in part)
