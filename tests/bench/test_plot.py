"""Pictures: every row that has a ratio is a bar, in every format."""

import json

import pytest

from tests.bench.made_up import invent

plot = pytest.importorskip("bench.plot", reason="needs matplotlib", exc_type=ImportError)


def widths(figure):
    return sorted(round(bar.get_width() + 1, 6) for ax in figure.axes for bar in ax.patches)


def test_every_ratio_is_drawn_once(report):
    rows = plot.drawable(report)
    with plot.plt.rc_context(plot.STYLE):
        figures = plot.speed(report), plot.rest(report)
    drawn = sum(len(widths(f)) for f in figures)
    peers = sum(r["group"] != "bf16" for r in rows)
    bf16 = 2 * sum(r["group"] == "bf16" for r in rows)  # against torch, and against our own fp32
    steps = sum(
        r["mode"] == "step" and r["subject"] == "ours" for r in rows
    )  # against nn.LSTM, and against nn.LSTMCell
    assert drawn == peers + bf16 + steps
    for figure in figures:
        assert all(len(ax.get_yticklabels()) == len({t.get_text() for t in ax.get_yticklabels()}) for ax in figure.axes)
        plot.plt.close(figure)


def test_bars_end_at_their_ratio_and_targets_are_marked(report):
    report["rows"] = [r for r in report["rows"] if r["name"] == "gru 128,1,256 training"]
    figure = plot.speed(report)
    assert widths(figure) == [2.0]
    (ax,) = figure.axes
    assert any(set(line.get_xdata()) == {14.0} for line in ax.lines)
    assert any(text.get_text() == "2.00x" for text in ax.texts)
    low, high = ax.get_xlim()
    assert low < 1 and high > 14
    plot.plt.close(figure)


def test_below_one_has_another_colour(report):
    report["rows"] = [r for r in report["rows"] if r["name"].startswith("lstm 1,1,64 inference one step")]
    figure = plot.rest(report)
    ahead, behind = {}, {}
    for bar in figure.axes[0].patches:
        (ahead if bar.get_width() > 0 else behind)[bar.get_facecolor()] = bar
    assert ahead and behind and not set(ahead) & set(behind)
    plot.plt.close(figure)


def test_nothing_outside_the_picture(report):
    with plot.plt.rc_context(plot.STYLE):
        for figure in (plot.speed(report), plot.rest(report)):
            figure.canvas.draw()
            box = figure.bbox
            for text in figure.findobj(plot.matplotlib.text.Text):
                if text.get_text() and text.get_visible():
                    extent = text.get_window_extent()
                    assert box.x0 <= extent.x0 and extent.x1 <= box.x1, text.get_text()
                    assert box.y0 <= extent.y0 and extent.y1 <= box.y1, text.get_text()
            plot.plt.close(figure)


@pytest.mark.parametrize("form, begins", [("png", b"\x89PNG"), ("svg", b"<?xml")])
def test_files(report, tmp_path, capsys, form, begins):
    path = tmp_path / "recurrent.json"
    path.write_text(json.dumps(report))
    name = next(r["name"] for r in report["rows"] if r["met"] is False)
    (tmp_path / "reasons.json").write_text(json.dumps({name: "a reason"}))
    assert plot.main([str(path), "--format", form]) == 0
    pictures = [tmp_path / f"recurrent.{form}", tmp_path / f"recurrent_more.{form}"]
    assert capsys.readouterr().out.splitlines() == [str(p) for p in (tmp_path / "recurrent.md", *pictures)]
    for picture in pictures:
        assert picture.read_bytes().startswith(begins) and picture.stat().st_size > 10_000
    page = (tmp_path / "recurrent.md").read_text()
    assert f"(recurrent.{form})" in page and "A reason." in page


def test_a_report_without_times_draws_nothing(report):
    report["rows"] = [{**r, "error": "no"} for r in report["rows"]]
    assert plot.speed(report) is None and plot.rest(report) is None


def test_one_row_is_enough(report):
    report["rows"] = [r for r in report["rows"] if r["name"] == "lstm 128,32,256 training probe"]
    assert plot.speed(report) is None
    plot.plt.close(plot.rest(report))
    assert invent([]) == []
