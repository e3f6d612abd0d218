"""Records in TensorBoard, JSON lines, dicts, figures and a terminal's table."""

import io
import json
import re
import warnings

import numpy as np
import pytest
import torch
from torch import nn

import gradkernels as gk
from gradkernels.flow.figures import rows
from gradkernels.flow.log import scalars
from gradkernels.flow.table import sparkline
from tests.flow.monitored import Small


@pytest.fixture(autouse=True)
def no_alerts():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", gk.flow.FlowWarning)
        yield


def trained(steps=40, layer=None, **options):
    model = Small(layer or gk.nn.LSTM(3, 4), 4)
    monitor = gk.flow.watch(model, **options)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(6, 2, 3)).square().sum().backward()
        optimizer.step()
    return monitor


def test_scalars_are_those_of_the_record():
    monitor = trained(1)
    (record,) = monitor.history
    got, flow = scalars(record, "f"), record.layers["rnn.l0"]
    assert got["f/rnn.l0/horizon"] == 5 and got["f/rnn.l0/log10_last"] == flow.signals["h"][-1]
    assert got["f/rnn.l0/decay"] == flow.decay.rate and got["f/rnn.l0/saturated_i"] == flow.saturation["i"].mean()
    assert got["f/head/grad"] == record.parameters["head"].grad and got["f/grad_norm"] == record.grad_norm
    assert all(isinstance(v, (int, float)) and np.isfinite(v) for v in got.values())


def test_dict_log():
    seen = []
    monitor = trained(40, log=[gk.flow.DictLog(lambda values, step: seen.append((step, values)), every=8)])
    monitor.close()
    assert [step for step, _ in seen] == [1, 9, 17, 25, 33]
    assert all("flow/rnn.l0/horizon" in values for _, values in seen)


def test_one_sink_need_be_no_list():
    seen = []
    trained(3, log=seen.append).close()
    assert [record.step for record in seen] == [1, 2, 3]


def test_a_sink_that_raises_is_warned_of_once_and_dropped():
    seen, asked = [], []

    def broken(record):
        asked.append(record.step)
        raise OSError("no space left on device")

    monitor = trained(3, log=[broken, seen.append])
    with pytest.warns(gk.flow.FlowWarning) as said:
        monitor.flush()
    (warning,) = [str(w.message) for w in said]
    assert re.fullmatch(
        ".*broken failed at step 1, OSError: no space left on device; this sink gets no more records", warning
    )
    assert asked == [1] and [record.step for record in seen] == [1, 2, 3] and monitor.log == [seen.append]


def test_json_lines(tmp_path):
    log = gk.flow.JsonlLog(tmp_path / "flow.jsonl", every=10)
    monitor = trained(40, log=[log])
    monitor.close()
    log.close()
    lines = [json.loads(line) for line in (tmp_path / "flow.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 11, 21, 31]
    np.testing.assert_allclose(
        lines[1]["layers"]["rnn.l0"]["signals"]["h"], monitor.history[10].layers["rnn.l0"].signals["h"], atol=1e-4
    )


def test_an_unwritable_file_is_refused_at_once(tmp_path):
    with pytest.raises(OSError, match="missing"):
        gk.flow.JsonlLog(tmp_path / "missing" / "flow.jsonl")
    with pytest.raises(ValueError, match="every must be a positive integer, got 0"):
        gk.flow.JsonlLog(tmp_path / "flow.jsonl", every=0)


def test_what_cannot_be_logged_to_is_refused_at_once():
    with pytest.raises(TypeError, match="log must be a function of a dict and step, got int"):
        gk.flow.DictLog(3)
    with pytest.raises(TypeError, match="writer must be a SummaryWriter, got str"):
        gk.flow.TensorBoardLog("runs")


def test_tensorboard(tmp_path):
    """Written by tensorboardX, read back from its file."""
    from tensorboardX import SummaryWriter
    from tensorboardX.proto.event_pb2 import Event

    with SummaryWriter(str(tmp_path)) as writer:
        monitor = trained(20, log=[gk.flow.TensorBoardLog(writer)])
        monitor.close()
    (path,) = tmp_path.iterdir()
    data, events = path.read_bytes(), []
    while data:  # length, its checksum, record, its checksum
        n = int.from_bytes(data[:8], "little")
        events.append(Event.FromString(data[12 : 12 + n]))
        data = data[16 + n :]
    found = {(v.tag, e.step): v for e in events for v in e.summary.value}
    assert found["flow/rnn.l0/horizon", 17].simple_value == 5
    histogram = found["flow/rnn.l0/dL_dh_by_time", 1].histo
    assert list(histogram.bucket_limit) == [1, 2, 3, 4, 5, 6]
    np.testing.assert_allclose(histogram.bucket, monitor.history[0].layers["rnn.l0"].signals["h"] + 45, rtol=1e-6)
    assert {step for _, step in found} == {1, 17}


def test_writers_of_torch_have_the_same_methods():
    """What is called of a SummaryWriter, against torch's own signature."""
    import ast
    import importlib.util
    from pathlib import Path

    source = Path(importlib.util.find_spec("torch").origin).parent / "utils" / "tensorboard" / "writer.py"
    methods = {f.name: f for f in ast.walk(ast.parse(source.read_text())) if isinstance(f, ast.FunctionDef)}
    known = {a.arg for a in methods["add_histogram_raw"].args.args}
    assert {"min", "max", "num", "sum", "sum_squares", "bucket_limits", "bucket_counts", "global_step"} <= known
    assert [a.arg for a in methods["add_scalar"].args.args][1:4] == ["tag", "scalar_value", "global_step"]


@pytest.mark.parametrize("layer", (gk.nn.LSTM(3, 4, bidirectional=True), nn.GRU(3, 4)), ids=("ours", "torch"))
def test_figures(layer, tmp_path):
    monitor = trained(30, Wide(layer) if getattr(layer, "bidirectional", False) else layer)
    for name in monitor.layers:
        ax = gk.flow.heatmap(monitor, name)
        values = ax.collections[0].get_array().filled(np.nan)
        known, signal, found = rows(monitor, name, None)
        want = np.stack([r.layers[name].signals[signal] for r in found], 1)
        want[np.isinf(want)] = np.nan  # there is no colour for a zero
        np.testing.assert_allclose(values.reshape(want.shape), want, rtol=1e-6)
        lines = gk.flow.profile(monitor, name, most=3).get_lines()
        np.testing.assert_allclose(np.log10(lines[-1].get_ydata()), want[:, -1], rtol=1e-5)
        assert len(lines) == 3 and known.name == name
    ax.figure.savefig(tmp_path / "heatmap.png")
    assert (tmp_path / "heatmap.png").stat().st_size > 1000


class Wide(nn.Module):
    """Half of what a layer in two directions returns."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        y, state = self.layer(x)
        return y[..., :4] + y[..., 4:], state


def test_figures_of_what_is_not_there():
    monitor = trained(0)
    with pytest.raises(ValueError, match="h of rnn.l0 has not been measured yet"):
        gk.flow.heatmap(monitor)
    with pytest.raises(KeyError, match="no layer 'l9' is watched; there are rnn.l0"):
        gk.flow.profile(monitor, "l9")
    with pytest.raises(ValueError, match="no recurrent layer is watched"):
        gk.flow.heatmap(gk.flow.watch(nn.Linear(2, 2)))


def test_table():
    from rich.console import Console

    def text(monitor):
        console = Console(file=io.StringIO(), width=120)
        console.print(gk.flow.table(monitor))
        return console.file.getvalue()

    assert "nothing yet" in text(trained(0))
    monitor = trained(3)
    shown = text(monitor)
    log10 = monitor.history[-1].layers["rnn.l0"].signals["h"]
    assert "Small, step 3" in shown and "5 of 5" in shown and sparkline(log10) in shown
    assert re.search(rf"{log10[0]:.1f}.*{log10[-1]:.1f}", shown)


def test_the_table_fits_eighty_columns():
    from rich.console import Console

    model = nn.ModuleDict({"encoder": gk.nn.LSTM(3, 4, 2, bidirectional=True)})
    console = Console(file=io.StringIO(), width=80)
    monitor = gk.flow.watch(model, on_alert=lambda alert: None)
    model["encoder"](torch.randn(200, 2, 3))[0].sum().backward()
    monitor.step()
    console.print(gk.flow.table(monitor))
    text = console.file.getvalue()
    assert "…" not in text and all(name in text for name in (*monitor.layers, "horizon", "decay", "199 of 199"))
    assert len([line for line in text.splitlines() if "encoder" in line]) == 4


def test_live_table_prints_once_when_piped():
    from rich.console import Console

    console = Console(file=io.StringIO(), width=120)
    monitor = trained(0)
    with gk.flow.live(monitor, console=console):
        pass
    assert console.file.getvalue().count("nothing yet") == 1


@pytest.mark.parametrize("log10", ([], [-np.inf] * 3, [np.nan, 0.0], list(np.linspace(-30, 0, 127))), ids=len)
def test_sparkline_of_anything(log10):
    assert len(sparkline(np.array(log10))) == min(len(log10), 16)
