"""Tables: aligned when piped, complete in Markdown, nothing said of a row that failed but its error."""

import io
import re

import pytest

from bench import cases, table


@pytest.mark.parametrize(
    "value, text",
    [
        (None, ""),
        (0.0123, "0.0123"),
        (0.5, "0.500"),
        (1.234, "1.23"),
        (12.34, "12.3"),
        (1234.5, "1,234"),
        (0.0, "0.0000"),
    ],
)
def test_numbers(value, text):
    assert table.number(value) == text


def plain(report, rows=None):
    out = io.StringIO()
    view = table.view(out)
    assert isinstance(view, table.Plain)
    view.begin(report, cases.recurrent())
    for row in rows if rows is not None else report["rows"]:
        view.row(row)
    view.end(report)
    return out.getvalue()


def test_plain_lines_are_aligned_and_complete(report):
    text = plain(report)
    for row in report["rows"]:
        assert re.search(rf"^{re.escape(row['name'])} {{2,}}", text, re.MULTILINE), row["name"]
    ends = {line.rindex("met") for line in text.splitlines() if "rounds" in line and line.endswith(" met")}
    assert len(ends) == 1
    (end,) = ends
    verdicts = [line[end : end + 3] for line in text.splitlines() if line.startswith(("lstm ", "gru ", "rnn_"))]
    assert set(verdicts) <= {"yes", " no", "no ", "   ", ""} and any("yes" in v for v in verdicts)
    assert "\x1b" not in text


def test_the_machine_and_the_limits_are_named(report):
    text = plain(report)
    for said in ("Example(R) CPU", "2 cores, 2 threads, AVX512", "0123456789 and changes not committed", "torch 2.13"):
        assert said in text
    assert "fp32 products 400 GFLOP/s (oneDNN linear 400; torch.mm (MKL) 200)" in text
    assert "bf16 800 GFLOP/s" in text and "copy 50.0 GB/s" in text
    assert "LSTM fp32, geometric mean of 10 rows: 2.00x, 1.5x asked: met" in text
    assert "GRU fp32, geometric mean of 10 rows: 2.00x, 3.0x asked: short" in text


def test_a_busy_machine_is_told(report):
    assert "busy machine" not in plain(report)
    report["limits"] = {**report["limits"], "waited": 0.3}
    assert "(busy machine: threads waited 30% of that time)" in plain(report)


def test_dropped_rounds_are_counted_in_the_row(report):
    (line,) = [x for x in plain(report).splitlines() if x.startswith("lstm 128,1,256 inference ")]
    assert " 9 -1 " in line


def test_a_failed_row_has_its_error_and_no_ratio(report):
    row = {
        **report["rows"][0],
        "error": "the numbers disagree, so there is no time: outputs",
        "ratio": None,
        "ratios": [],
    }
    (line,) = [x for x in plain(report, [row]).splitlines() if x.startswith(row["name"])]
    assert "the numbers disagree" in line and "2.00x" not in line
    report["rows"] = [row]
    page = table.markdown(report)
    assert "the numbers disagree" in page and "2.00x" not in page.split("## ")[1]


def test_markdown_holds_every_row_with_as_many_columns(report):
    page = table.markdown(report, pictures=["recurrent.png"])
    assert "![ratios of every row](recurrent.png)" in page
    columns = None
    names = []
    for line in page.splitlines():
        if line.startswith(("| ms ", "| MiB ")):
            columns = line.count("|")
        elif line.startswith("| "):
            assert line.count("|") == columns, line
            names.append(line.split("|")[1].strip())
    assert names == [r["name"] for r in report["rows"]]


def test_short_rows_give_their_reason_or_say_that_there_is_none(report):
    short = [r["name"] for r in report["rows"] if r["met"] is False]
    assert len(short) > 2
    page = table.markdown(report, {short[0]: "the sun was in its eyes"}).split("## Rows that are short, and why")[1]
    assert f"**{short[0]}**" in page and "The sun was in its eyes." in page
    assert page.count("No reason given yet") == len(short) - 1


def test_live_tables_hold_every_row(report):
    rich_console = pytest.importorskip("rich.console")
    out = io.StringIO()
    live = table.Live(out)
    live.console = rich_console.Console(file=out, width=220, highlight=False)
    live.begin(report, cases.recurrent())
    for row in report["rows"][:2]:
        live.row(row)
    live.end(report)
    text = out.getvalue()
    for row in report["rows"]:
        assert row["name"] in text
