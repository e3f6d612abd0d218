"""Pages and pictures of rows measured on a GPU, from a report that is made up."""

import io
import json
import re

import pytest

from bench import cases, table
from bench.gpu import device


def plain(report):
    out = io.StringIO()
    view = table.view(out)
    view.begin(report, cases.recurrent_gpu())
    for row in report["rows"]:
        view.row(row)
    view.end(report)
    return out.getvalue()


def test_plain_lines_have_microseconds_and_the_floor(gpu_report):
    text = plain(gpu_report)
    (line,) = [x for x in text.splitlines() if x.startswith("lstm 1024,16,512 training bf16  ")]
    row = next(r for r in gpu_report["rows"] if r["name"] == "lstm 1024,16,512 training bf16")
    assert row["floor_us"] > 0 and row["share"] == pytest.approx(row["floor_us"] / 5)
    assert re.search(rf" 2\.00x +3\.00x +5\.00 \({row['floor_us']:.2f}\) +{row['share']:.0%} +9 +no", line), line
    assert "us a step (floor)" in text and "GFLOP/s" not in text.split("\n\n", 1)[1]


def test_the_gpu_the_versions_and_the_limits_are_named(gpu_report):
    text = plain(gpu_report)
    for said in (
        "Example(R) GPU 9000, compute capability 9.0, 132 multiprocessors", "clock at most 2000 MHz", "cuDNN 9.20.0", "Triton 3.6.0",
        "driver 600.1", "bfloat16 600 TFLOP/s", "tf32 300 TFLOP/s", "copy 3,000 GB/s", "clusters at a time: 15 of 8",
        "not reached: lstm 1,2,3 training",
    ):  # fmt: skip
        assert said in text, said


def test_markdown_holds_every_row_and_how_it_ran(gpu_report):
    row = gpu_report["rows"][0]
    row["absent"] = {"ours:exchange=grid": "RuntimeError: no plan", "flashrnn": "ImportError: no nvcc"}
    row["looser"] = {"torchrl": "outputs is off by 1e-2"}
    page = table.markdown(gpu_report)
    assert f"* {row['name']}, TorchRL is less exact: outputs is off by 1e-2" in page
    assert page.startswith("# Recurrent layers on Example(R) GPU 9000\n")
    for r in gpu_report["rows"]:
        assert f"| {r['name']} |" in page
    assert f"* {row['name']}: forward: made up" in page
    assert f"* {row['name']}, not timed: gradkernels, exchange=grid, RuntimeError: no plan" in page
    assert f"* {row['name']}, not timed: FlashRNN, ImportError: no nvcc" in page
    assert "milliseconds by events on the stream" in page and "by MKL or oneDNN" not in page
    assert "The peer's algorithm: torch: cuDNN 9.20.0, STANDARD." in page


def test_a_report_without_parts_has_no_floor(gpu_report):
    gpu_report["micro"] = {**gpu_report["micro"], "records": []}
    gpu_report["limits"] = device.limits(gpu_report["micro"])
    for row in gpu_report["rows"]:
        row.update(floor_us=None, share=None)
    text = plain(gpu_report)
    assert "by torch: none measured" in text and "clusters at a time" not in text
    (line,) = [x for x in text.splitlines() if x.startswith("lstm 1024,16,512 training bf16  ")]
    assert " 5.00 " in line and "(" not in line


def test_pictures(gpu_report, tmp_path):
    plot = pytest.importorskip("bench.plot", reason="needs matplotlib", exc_type=ImportError)
    from bench.gpu import panels

    path = tmp_path / "recurrent-gpu.json"
    path.write_text(json.dumps(gpu_report))
    page, *pictures = plot.render(path)
    assert [p.name for p in (page, *pictures)] == ["recurrent-gpu.md", "recurrent-gpu.png", "recurrent-gpu_more.png"]
    assert all(p.read_bytes().startswith(b"\x89PNG") and p.stat().st_size > 10_000 for p in pictures)
    rows = plot.drawable(gpu_report)
    speed, rest = panels.figures(gpu_report)
    drawn = sum(len(ax.patches) for ax in speed.axes)
    assert drawn == sum(r["kind"] == "time" and r["group"] != "gradient taps" for r in rows)
    assert any(text.get_text() == "LSTM 16, 512 fp16, both ways" for ax in rest.axes for text in ax.get_yticklabels())
    for figure in (speed, rest):
        for ax in figure.axes:
            names = [t.get_text() for t in ax.get_yticklabels()]
            assert len(names) == len(set(names)), names
        plot.plt.close(figure)


def test_folders_are_named_after_the_gpu(gpu_report):
    assert device.slug(gpu_report["machine"]) == "example-r-gpu-9000"
