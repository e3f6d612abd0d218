"""The rows of attention, norms and convolution: told apart, counted as by hand, the same numbers from both, one page and picture."""

import json
from dataclasses import replace

import pytest
import torch

from bench import layers, providers
from bench import report as reports
from bench.agreement import Disagreement, agree
from bench.cases import SUITES, Case
from bench.layers import Layer
from tests.bench.made_up import LIMITS, MACHINE, invent

ALL = layers.layers()


def tiny(case):
    """The same row, small: T is no multiple of anything, and longer than what a dilated tap reaches back. What is random is out."""
    return replace(case.exact(), T=7 + 2 * case.dilation, B=3, H=8, heads=min(case.heads, 2))


TINY = list({tiny(c): None for c in ALL if c.kind == "time"})
ids = lambda c: c.name


def test_names_are_unique_and_survive_json():
    assert len({c.name for c in ALL}) == len(ALL)
    for case in ALL:
        assert Case.from_dict(json.loads(json.dumps(case.as_dict()))) == case
    assert SUITES["layers"]() == ALL


def test_every_target_is_measured():
    for case in ALL:
        assert case.targets and {t.against for t in case.targets} <= {*case.providers, "limit"}, case.name


def row(cell, mode="inference", **more):
    return Layer("g", cell, mode, **{"T": 3, "B": 2, "H": 4, **more})


def test_operations_as_counted_by_hand():
    # 6 pairs of a query and a key it sees, 2 sequences, 4 channels; scores, and sums of values
    pairs = 6 * 2 * 4 * 2 * 2
    assert row("attention").flops() == row("attention", heads=2).flops() == pairs
    assert row("attention", "training").flops() == 3.5 * pairs
    projections = 6 * 4 * (2 * 4 * 4)  # q k v and the output of 6 tokens
    assert row("attention block").flops() == pairs + projections
    assert row("attention block", "training").flops() == 3.5 * pairs + 3 * projections
    assert row("causal conv", taps=3).flops() == 6 * 3 * (2 * 4 * 4)
    assert row("causal conv", "training", taps=3, dilation=2).flops() == 3 * row("causal conv", taps=3).flops()
    assert row("residual norm").flops() == row("layer norm", "training").flops() == 0


def test_bytes_as_counted_by_hand():
    plane = 3 * 2 * 4 * 4
    assert row("layer norm").bytes() == 2 * plane  # x, y
    assert row("layer norm", "training").bytes() == 5 * plane  # and x, dy, dx
    assert row("residual norm").bytes() == 3 * plane  # x, residual, y
    assert row("residual norm", "training").bytes() == 8 * plane  # and the sum out and in, dy, dx, dresidual
    assert row("residual norm", dtype="bfloat16").bytes() == 3 * plane // 2
    assert row("attention").bytes() == row("causal conv", taps=3).bytes() == 0


@pytest.mark.parametrize("case", TINY, ids=ids)
def test_both_agree(case):
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


@pytest.mark.parametrize("cell", ["attention", "attention block", "residual norm"])
@pytest.mark.parametrize("key", ["ours", "torch"])
def test_dropout_is_in_the_time_and_out_of_the_comparison(cell, key):
    case = row(cell, "training", T=16, H=8, heads=2, dropout=0.5)
    for same, drawn in ((case, True), (case.exact(), False)):
        provider = providers.build(same, key)
        first, second = (provider.call(provider.x)[0] for _ in range(2))
        assert torch.equal(first, second) is not drawn


def test_a_wrong_layer_is_caught(monkeypatch):
    honest = layers.Norm.forward
    monkeypatch.setattr(layers.Norm, "forward", lambda self, x: honest(self, x) * (1.001 if self.ours else 1))
    with pytest.raises(Disagreement, match="outputs is off by"):
        agree(row("layer norm"))


def report():
    rows = invent(ALL)
    return {
        "schema": reports.SCHEMA, "suite": "layers", "options": {}, "machine": MACHINE, "limits": LIMITS, "rows": rows,
        "summary": reports.summarize(rows), "seconds": 1.0,
    }  # fmt: skip


def test_rates_are_of_what_limits():
    by_name = {r["name"]: r for r in report()["rows"]}
    norm = by_name["residual norm 8192,8,512 inference"]  # 403 MB in 10 ms, of 50 GB/s
    assert norm["gbs"] == pytest.approx(40.265, rel=1e-4) and norm["share"] == pytest.approx(40.265 / 50, rel=1e-4)
    attention = by_name["attention 512,8,512 inference 8 heads"]  # 2.15 GFLOP in 10 ms, of 400 a second
    assert attention["gflops"] == pytest.approx(215.17, rel=1e-3) and attention["gbs"] == 0
    assert attention["share"] == pytest.approx(215.17 / 400, rel=1e-3)


def test_a_report_renders(tmp_path):
    plot = pytest.importorskip("bench.plot", reason="needs matplotlib", exc_type=ImportError)
    path = tmp_path / "layers.json"
    path.write_text(json.dumps(report()))
    page, picture = plot.render(path)
    assert picture.read_bytes().startswith(b"\x89PNG")
    text = page.read_text()
    assert text.startswith("# Attention, norms and convolution on Example")
    for case in ALL:
        assert f"| {case.name} |" in text


def test_every_ratio_to_torch_is_drawn_once():
    plot = pytest.importorskip("bench.plot", reason="needs matplotlib", exc_type=ImportError)
    made = report()
    with plot.plt.rc_context(plot.STYLE):
        figure = plot.layers(made)
        figure.canvas.draw()
    assert sum(len(ax.patches) for ax in figure.axes) == len(ALL)
    for text in figure.findobj(plot.matplotlib.text.Text):
        if text.get_text() and text.get_visible():
            extent = text.get_window_extent()
            assert figure.bbox.x0 <= extent.x0 and extent.x1 <= figure.bbox.x1, text.get_text()
    plot.plt.close(figure)
