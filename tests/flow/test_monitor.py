"""What a monitor makes of its measurements, and what it does when it is used wrongly, copied, moved or left alone."""

import copy
import gc
import io
import json
import math
import pickle
import re
import threading
import tracemalloc
import warnings
import weakref

import numpy as np
import pytest
import torch
from torch import nn

import gradkernels as gk
from gradkernels.flow.history import History, Record
from gradkernels.flow.numbers import decays, horizons
from gradkernels.flow.recorder import TOGETHER
from tests import place
from tests.flow.monitored import Small


@pytest.fixture(autouse=True)
def no_alerts():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", gk.flow.FlowWarning)
        yield


def train(model, steps, x=None, optimizer=None, monitor=None):
    x = torch.randn(6, 2, 3) if x is None else x
    optimizer = optimizer or torch.optim.SGD(model.parameters(), 0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()


def small(layer=None):
    return Small(layer or gk.nn.LSTM(3, 4), 4)


# ---------------------------------------------------------------- numbers


@pytest.mark.parametrize("T", (0, 1, 2, 3, 17))
def test_horizon_and_decay_of_a_straight_line(T):
    back = -0.5 * np.arange(T, dtype=float)[None]
    assert horizons(back) == [min(T - 1, 6) if T else None]
    (decay,) = decays(back)
    assert (decay is None) == (T < 3)
    if decay:
        assert decay.rate == pytest.approx(0.5) and decay.r2 == pytest.approx(1.0)
        assert decay.factor == pytest.approx(10**-0.5)


def test_horizon_of_gradients_that_vanish_and_come_back():
    inf, nan = math.inf, math.nan
    rows = np.array([[0, -4, -2.9, -5], [-inf, -inf, 2, -0.9], [nan, 0, 0, 0], [-inf] * 4, [0, -3, -inf, -inf]])
    assert horizons(rows) == [2, 1, 2, None, 1]


@pytest.mark.parametrize("factor", (0.5, 1.25))
def test_decay_of_both_directions(factor):
    """W = factor * I and a slope of 1: a step back, forwards in time for the reverse direction, multiplies the gradient by that."""
    layer = gk.nn.RNN(3, 4, nonlinearity="relu", bidirectional=True)
    with torch.no_grad():
        for name in ("l0", "l0_reverse"):
            getattr(layer, f"weight_hh_{name}").copy_(factor * torch.eye(4))
            getattr(layer, f"weight_ih_{name}").abs_()
            getattr(layer, f"bias_ih_{name}").fill_(1.0)
    monitor = gk.flow.watch(layer)
    y = layer(torch.rand(20, 2, 3))[0]
    (y[-1, :, :4].sum() + y[0, :, 4:].sum()).backward()
    for flow in monitor.history[-1].layers.values():
        assert flow.decay.factor == pytest.approx(factor, rel=1e-5) and flow.decay.r2 == pytest.approx(1.0)
        assert flow.horizon == (9 if factor < 1 else 19)


def test_what_comes_in_from_above_on_the_way_is_no_growth():
    """The loss is at the last step, where the lower layer's reverse direction begins: of its recurrence nothing is to be seen."""
    layer = gk.nn.LSTM(4, 16, num_layers=2, bidirectional=True)
    monitor = gk.flow.watch(layer)
    layer(torch.randn(40, 2, 4))[0][-1].sum().backward()
    flows = monitor.history[-1].layers
    assert flows["LSTM.l0_reverse"].decay is None and flows["LSTM.l0_reverse"].reached.top > 3
    assert flows["LSTM.l0"].decay.rate > 0.1 < flows["LSTM.l1"].decay.rate
    (line,) = [line for line in monitor.summary().splitlines() if "l0_reverse" in line]
    assert line.endswith("it grows on the way, by what comes in from above")


def test_decay_does_not_see_what_has_underflown():
    row = np.array([[0.0, -1, -2, -3, *[-math.inf] * 20]])
    assert decays(row)[0].rate == pytest.approx(1.0)
    noisy = decays(np.random.default_rng(0).normal(size=(1, 200)))[0]
    assert abs(noisy.rate) < 0.01 and noisy.r2 < 0.1


def test_history_is_bounded_and_even():
    history = History(keep=64, values=10**9)
    for k in range(50_000):
        history.append(Record(k + 1, k, {}))
    kept = [record.index for record in history]
    gaps = np.diff(kept)
    assert len(kept) <= 64 and kept[0] == 0 and kept[-20:] == list(range(49_980, 50_000))
    assert gaps.max() <= 4 * 50_000 / 64


def test_history_is_bounded_by_numbers_too():
    flow = gk.flow.history.Flow({"h": np.zeros(1000, np.float32)})
    history = History(keep=512, values=50_000)
    for k in range(300):
        history.append(Record(k + 1, k, {"l": flow}))
    assert history.size <= 50_000 and history.size == sum(r.size for r in history) and len(history) > 20


# ---------------------------------------------------------------- saturation, parameters


def test_saturation_is_counted_where_gates_are_at_their_ends():
    layer = gk.nn.LSTM(3, 4, dtype=torch.double)
    with torch.no_grad():
        layer.bias_ih_l0[4:8] += 30  # the forget gate is open
        layer.bias_ih_l0[8:10] -= 30  # half of the candidate is at -1
    monitor = gk.flow.watch(layer)
    layer(0.1 * torch.randn(6, 7, 3, dtype=torch.double))[0].sum().backward()
    found = monitor.history[-1].layers["LSTM.l0"].saturation
    assert {name: share.tolist() for name, share in found.items() if name in "fg"} == {"f": [1.0] * 6, "g": [0.5] * 6}
    assert max(found["i"].max(), found["o"].max()) < 0.5


@pytest.mark.parametrize("cell", ("gru", "gru_reset_before", "rnn_tanh", "rnn_relu", "rnn_sigmoid"))
def test_saturation_equals_a_count_by_hand(cell, backend):
    layer = gk.nn.Recurrent(cell, 3, 5, backend=backend).to(place.device)
    with torch.no_grad():
        layer.weight_ih_l0 *= 8
    x, lengths = place.randn(7, 6, 3), place.tensor([3, 7, 7, 0, 1, 2])
    monitor = gk.flow.watch(layer)
    y = layer(x, lengths=lengths)[0]
    y.sum().backward()
    found = monitor.history[-1].layers["Recurrent.l0"].saturation
    if cell.startswith("gru"):
        assert found.keys() == {"reset", "z", "n"}
        assert all(0 < share.mean() < 1 for share in found.values())
        return
    rows = lengths.topk(4).indices
    live = (torch.arange(7, device=x.device)[:, None] < lengths[rows])[:, :, None]
    ended = {"tanh": y.abs() > 0.9, "relu": y <= 0, "sigmoid": (y - 0.5).abs() > 0.45}[cell.partition("_")[2]]
    want = (ended[:, rows] & live).sum((1, 2)) / (live.sum((1, 2)) * 5)
    np.testing.assert_allclose(found["h"], want.cpu(), rtol=1e-6)
    assert 0 < want.mean() < 1


def test_a_cell_without_activations_of_its_own_is_watched_too():
    @gk.cell
    def average(x, r, s):
        return 0.5 * (s[0] + x[0] + 0.1 * r[0])

    layer = gk.nn.Recurrent(average, 3, 4)
    monitor = gk.flow.watch(layer)
    layer(torch.randn(5, 2, 3, requires_grad=True))[0][-1].sum().backward()
    flow = monitor.history[-1].layers["Recurrent.l0"]
    assert flow.saturation == {} and flow.signals.keys() == {"h", "x"} and flow.horizon == 4


@pytest.mark.parametrize("cell", gk.cells.CELLS)
def test_every_registered_cell_is_watched(cell):
    layer = gk.nn.Recurrent(cell, 6, 6)
    monitor = gk.flow.watch(layer)
    layer(torch.randn(5, 2, 6, requires_grad=True))[0].square().sum().backward()
    flow = monitor.history[-1].layers["Recurrent.l0"]
    assert {"h", "x"} <= flow.signals.keys() and flow.horizon == 4
    assert all(np.isfinite(v).all() and v.shape == (5,) for v in (*flow.signals.values(), *flow.saturation.values()))


@pytest.mark.parametrize(
    "options",
    (
        {"zoneout": 0.1},
        {"recurrent_dropout": 0.2},
        {"variational": 0.2},
        {"weight_drop": 0.2},
        {"heads": 2},
        {"recompute": 3},
    ),
    ids=lambda options: next(iter(options)),
)
def test_options_of_a_layer(options):
    """Details that no kernel has at hand then are missing, and nothing else."""
    layer = gk.nn.Recurrent("lstm", 6, 6, **options)
    monitor, x = gk.flow.watch(layer), torch.randn(7, 2, 6, requires_grad=True)
    for _ in range(2):
        layer(x)[0].square().sum().backward()
        monitor.step()
    for record in monitor.history:
        signals = record.layers["Recurrent.l0"].signals
        assert {"h", "c"} <= signals.keys() and all(v.shape == (7,) for v in signals.values())
        # with zoneout nothing reads the last c: a zero
        assert all(np.isfinite(v[:-1]).all() for v in signals.values()) and np.isfinite(signals["h"]).all()
        assert all(np.isfinite(v).all() for v in record.layers["Recurrent.l0"].saturation.values())
    assert monitor.horizon() == 6 and json.dumps(monitor.snapshot(), allow_nan=False)


def test_parameters_by_layer():
    model = small(gk.nn.GRU(3, 4, num_layers=2))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    monitor = gk.flow.watch(model, clip=1e-3)
    old = {n: p.detach().clone() for n, p in model.named_parameters()}
    train(model, 1, optimizer=optimizer)
    record = monitor.history[-1]
    assert list(record.parameters) == ["rnn.l0", "rnn.l1", "head"]
    for name, group in record.parameters.items():
        of = "head." if name == "head" else ("_l0" if name == "rnn.l0" else "_l1")
        mine = [n for n in old if of in n]
        total = lambda values: torch.stack([v.double().norm() for v in values]).norm().item()
        new = dict(model.named_parameters())
        assert group.norm == pytest.approx(total([old[n] for n in mine]), rel=1e-6)
        assert group.grad == pytest.approx(total([new[n].grad for n in mine]), rel=1e-6)
        ratio = total([new[n].detach() - old[n] for n in mine]) / group.norm
        assert group.update_ratio == pytest.approx(ratio, rel=1e-4)
    every = torch.stack([p.grad.double().norm() for p in model.parameters()]).norm().item()
    assert record.grad_norm == pytest.approx(every) and monitor.snapshot()["clip_rate"] == 1.0


@pytest.mark.parametrize(
    "make", (lambda: small(), lambda: nn.Sequential(nn.Flatten(1), nn.Linear(6, 2))), ids=("rnn", "linear")
)
@pytest.mark.parametrize("clipped", (True, False), ids=("clipped", "as-they-are"))
def test_clip_rate_counts_every_step(make, clipped):
    """Five large gradients in forty steps, at steps of which only some have details, and one that is no number."""
    model = make()
    optimizer, norms = torch.optim.SGD(model.parameters(), 0.0), []
    monitor = gk.flow.watch(model, clip=1.0)
    x = torch.randn(6, 2, 3)
    for k in range(40):
        optimizer.zero_grad()
        model(x).square().sum().backward()
        wanted = 30.0 if k in (1, 2, 9, 20, 33) else 0.3
        norm = torch.stack([p.grad.norm() for p in model.parameters()]).norm()
        torch._foreach_mul_([p.grad for p in model.parameters()], wanted / norm.item())
        if clipped:
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        norms.append(min(wanted, 1.0) if clipped else wanted)
        optimizer.step()
    assert monitor.snapshot()["clip_rate"] == 5 / 40
    assert [r.grad_norm for r in monitor.history] == pytest.approx(norms, rel=1e-4)
    next(model.parameters()).grad.fill_(math.nan)
    optimizer.step()
    assert monitor.snapshot()["clip_rate"] == 5 / 40


def test_a_step_that_a_scaler_skips_is_not_clipped():
    model, scaler = small(), torch.amp.GradScaler("cpu", init_scale=8.0)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    monitor = gk.flow.watch(model, scaler=scaler, clip=1e-6)
    for factor in (1.0, math.inf, 1.0, 1.0):
        optimizer.zero_grad()
        (scaler.scale(model(torch.randn(6, 2, 3)).square().sum()) * factor).backward()
        scaler.unscale_(optimizer)
        norm = torch.stack([p.grad.norm() for p in model.parameters()]).norm().item()
        scaler.step(optimizer)
        scaler.update()
    monitor.flush()
    assert monitor._clips == [3, 3] and monitor.history[-1].grad_norm == pytest.approx(norm)


def test_details_are_rare():
    model = small()
    monitor = gk.flow.watch(model)
    train(model, 130)
    detailed = [r.step for r in monitor.history if r.layers["rnn.l0"].saturation]
    assert detailed == [r.step for r in monitor.history if r.parameters] == [1, 2, 3, 5, 9, 17, 33, 65, 129]


# ---------------------------------------------------------------- when and what is recorded


def test_every():
    model = small()
    monitor = gk.flow.watch(model, every=3)
    train(model, 8)
    assert [r.step for r in monitor.history] == [1, 4, 7] and monitor.step_count == 8
    assert model.rnn.probes is None or monitor.step_count % 3 == 0


def test_a_step_under_way_is_shown_and_not_kept():
    model = small()
    monitor = gk.flow.watch(model)
    model(torch.randn(6, 2, 3)).sum().backward()
    first = monitor.log10_norms()
    assert first.shape == (6,) and torch.equal(first, monitor.log10_norms("rnn.l0", 0)) and monitor.step_count == 0
    assert not torch.equal(first, monitor.log10_norms(state=1))
    assert monitor.snapshot()["steps"] == [] and len(monitor.history) == 1
    monitor.close()
    assert torch.equal(first, monitor.log10_norms()) and monitor.snapshot()["steps"] == [1]


def test_autograd_grad_and_torch_func_leave_it_alone():
    model = small()
    monitor = gk.flow.watch(model)
    x = torch.randn(6, 2, 3)
    torch.autograd.grad(model(x).sum(), list(model.parameters()))
    values = {k: v.detach() for k, v in model.named_parameters()}
    torch.func.grad(lambda p: torch.func.functional_call(model, p, (x,)).sum())(values)
    with torch.no_grad():
        model(x)
    assert monitor.history == []


@pytest.mark.parametrize("layer", (gk.nn.LSTM, nn.LSTM), ids=("ours", "torch"))
def test_results_and_gradients_are_the_same(layer):
    torch.manual_seed(0)
    model = nn.Sequential(layer(3, 4))
    block = gk.nn.ResidualBlock(nn.Linear(4, 4), 4, dropout=0.0)
    x, found = torch.randn(6, 2, 3), []
    for watched in (False, True):
        model.zero_grad(), block.zero_grad()
        whole = nn.ModuleList([model, block])
        monitor = gk.flow.watch(whole) if watched else None
        y = block(model(x)[0])
        y.square().sum().backward()
        found.append([y.detach(), *(p.grad.clone() for p in whole.parameters())])
        assert monitor is None or monitor.close() is None
    assert all(torch.equal(a, b) for a, b in zip(*found))


def test_converted_and_closed_models_keep_nothing():
    model = small()
    hooks = lambda: sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    with gk.flow.watch(model):
        train(model, 2)
        assert hooks() == 1
    assert hooks() == 0 and model.rnn.probes is None
    train(model, 1)
    with gk.flow.watch(model) as again:
        train(model, 1)
    assert again.step_count == 1


def test_copies_and_pickles_are_not_watched():
    model = nn.Sequential(gk.nn.LSTM(3, 4), gk.nn.ResidualBlock(nn.Linear(4, 4), 4), nn.LSTM(3, 4))
    x = torch.randn(6, 2, 3)
    with gk.flow.watch(model) as monitor:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(file, weights_only=False)):
            assert other[0].probes is None
            other[1](other[0](x)[0]).sum().backward()
            other[2](x)[0].sum().backward()
            assert torch.equal(other[0](x)[0], model[0](x)[0])
        assert monitor.history == []


def test_model_and_monitor_are_freed():
    model = small()
    monitor = gk.flow.watch(model)
    train(model, 2)
    model_gone, monitor_gone = weakref.ref(model), weakref.ref(monitor)
    del monitor
    gc.collect()
    assert monitor_gone() is None and model.rnn.probes is None
    gk.flow.watch(model).close()
    del model
    gc.collect()
    assert model_gone() is None


@pytest.mark.cpu
def test_stepped_by_hand_after_replays_of_a_graph(monkeypatch):
    """What a captured graph does, done by hand: it measures into the same memory at every replay, and Python does not run."""
    model = small()
    monitor = gk.flow.watch(model)
    train(model, 1)
    monkeypatch.setattr(gk.flow.recorder, "capturing", lambda device: True)
    train(model, 1)
    monkeypatch.undo()
    assert monitor.step_count == 1
    memory = model.rnn.probes[0].grad
    for factor in (4.0, 100.0):
        memory[:, :2] *= factor
        monitor.step()
    captured, replayed = (record.layers["rnn.l0"].signals["h"] for record in monitor.history[1:])
    np.testing.assert_allclose(replayed - captured, 1.0, atol=1e-5)  # ten times the norm
    assert monitor.step_count == 3


def test_optimizers_of_other_models_do_not_count():
    model, other = small(), small()
    monitor = gk.flow.watch(model)
    train(other, 2)
    train(model, 1)
    assert monitor.step_count == 1


def test_a_long_run_keeps_memory_bounded():
    """50,000 recorded steps, as the hot path takes them."""
    model = gk.nn.GRU(1, 1)
    monitor = gk.flow.watch(model, keep=50)
    model(torch.randn(4, 1, 1))[0].sum().backward()  # leaves are as long as the sequence from here on
    for _ in range(50_000):
        model.probes[0].grad = torch.ones(model.probes[0].shape, dtype=torch.double)
        monitor.step()
    assert len(monitor.history) <= 50 and monitor.step_count == 50_000 and len(monitor._pending) <= TOGETHER
    assert len(monitor._untold) <= TOGETHER and len(monitor._alerts.found) <= 1000


def test_layers_are_in_the_order_of_the_model_whichever_ran_first():
    model = nn.ModuleList([gk.nn.GRU(2, 2), gk.nn.LSTM(2, 2)])
    optimizer, x = torch.optim.SGD(model.parameters(), 0.1), torch.randn(4, 1, 2)
    with gk.flow.watch(model) as monitor:
        for first in (1, 0):
            y = x
            for layer in [*model][first:]:
                y, _ = layer(y)
            y.sum().backward()
            optimizer.step()
    assert [[*record.layers] for record in monitor.history] == [["1.l0"], ["0.l0", "1.l0"]]


def test_a_long_run_leaves_nothing_behind():
    """Training itself, whose Python memory and tensors are as many after five hundred steps as after two hundred."""
    model = nn.Sequential(gk.nn.AttentionBlock(3, 1, norm="post"), small())
    monitor, optimizer = gk.flow.watch(model, keep=16), torch.optim.SGD(model.parameters(), 1e-3)

    def held():
        monitor.flush()
        gc.collect()
        return tracemalloc.get_traced_memory()[0], sum(type(v) is torch.Tensor for v in gc.get_objects())

    tracemalloc.start()
    try:
        train(model, 200, optimizer=optimizer)
        bytes_before, tensors_before = held()
        train(model, 300, optimizer=optimizer)
        bytes_after, tensors_after = held()
    finally:
        tracemalloc.stop()
    assert monitor.step_count == 500 and len(monitor.history) <= 16
    assert tensors_after <= tensors_before and bytes_after < bytes_before + 50_000  # 300 records take 900,000


def test_snapshots_from_another_thread_while_training():
    model = small()
    monitor = gk.flow.watch(model)
    found, stop = [], threading.Event()

    def read():
        while not stop.is_set():
            found.append(json.dumps(monitor.snapshot(), allow_nan=False))

    thread = threading.Thread(target=read)
    thread.start()
    train(model, 200)
    stop.set()
    thread.join()
    final = monitor.snapshot()
    assert final["step"] == 200 and final["steps"] == list(range(1, 201)) and len(found) > 1
    assert all(json.loads(text)["steps"] == list(range(1, len(json.loads(text)["steps"]) + 1)) for text in found)


def test_snapshot_in_full():
    model = nn.ModuleDict(
        {
            "ours": gk.nn.LSTM(3, 4, bidirectional=True),
            "plain": nn.GRU(8, 4),
            "block": gk.nn.ResidualBlock(nn.Linear(4, 4), 4),
        }
    )
    monitor = gk.flow.watch(model, spectra=2)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for _ in range(3):
        optimizer.zero_grad()
        model["block"](model["plain"](model["ours"](torch.randn(6, 2, 3))[0])[0])[-1].sum().backward()
        optimizer.step()
    got = json.loads(json.dumps(monitor.snapshot(), allow_nan=False))
    assert (got["format"], got["model"], got["every"], got["step"], got["steps"]) == (1, "ModuleDict", 1, 3, [1, 2, 3])
    layers = {layer["name"]: layer for layer in got["layers"]}
    assert list(layers) == ["ours.l0", "ours.l0_reverse", "plain"]
    assert [layer["kind"] for layer in got["layers"]] == ["recurrent", "recurrent", "input"]
    assert layers["ours.l0_reverse"]["direction"] == "reverse" and layers["ours.l0"]["cell"] == "lstm"
    assert layers["ours.l0"]["signals"].keys() == {"h", "c", "x"} and layers["plain"]["signals"].keys() == {"x"}
    log10 = monitor.history[1].layers["ours.l0"].signals["c"]
    np.testing.assert_allclose(layers["ours.l0"]["signals"]["c"][1], log10, atol=1e-4)
    assert layers["ours.l0"]["signals"]["x"] == [None] * 3  # the input wants no gradient
    assert len(layers["ours.l0"]["saturation"]["f"][0]) == 6 and len(layers["plain"]["horizon"]) == 3
    (block,) = got["blocks"]
    assert block["kind"] == "residual" and len(block["entrance"]) == len(block["residual_share"]) == 3
    assert [p["name"] for p in got["parameters"]] == [
        "ours.l0",
        "ours.l0_reverse",
        "plain.l0",
        "block",
        "block.sublayer",
    ]
    assert {s["step"] for s in got["spectra"]} == {1, 3} and len(got["spectra"]) == 2 * (4 + 4 + 3)
    assert got["clip_rate"] is None and got["nonfinite"] is None


def test_summary_and_repr():
    block = gk.nn.ResidualBlock(nn.Linear(4, 4), 4, dropout=0.0)
    model = nn.Sequential(Small(gk.nn.LSTM(3, 4), 4, 4), block)
    monitor = gk.flow.watch(model)
    assert monitor.summary().splitlines() == [
        "Sequential, 0 steps",
        "  0.rnn.l0: nothing measured yet",
        "  1: nothing measured yet",
    ]
    assert repr(monitor) == "<Monitor of Sequential: step 0, 1 layers, 1 blocks>"
    train(model, 2)
    title, layer, residual, *_ = monitor.summary().splitlines()
    assert title == "Sequential, 2 steps" and "memory horizon 5 of 5 steps" in layer
    assert re.fullmatch(r".*; \d\.\d{3} decades (lost|gained) a step \(r2 \d\.\d\d\)", layer)
    found = monitor.history[-1].blocks["1"]
    assert residual == (
        f"  1: gradient 1e{found.exit:.1f} at the exit, 1e{found.entrance:.1f} at the entrance; "
        f"{found.residual_share:.0%} of it came past the sublayers"
    )
    monitor.close()
    assert repr(monitor).endswith("closed>")


@pytest.mark.parametrize(
    ("log10", "text"),
    [
        ([-math.inf, -1.0, 0.0], "0 at the first time step, 1e0.0 at the last"),
        ([0.0, math.nan, math.nan], "1e0.0 at the first time step, not finite at the last"),
        ([math.inf, 0.0, 0.0], "not finite at the first time step"),
        ([0.0, 0.201, 0.402], "; 0.201 decades lost a step"),
        ([0.402, 0.201, 0.0], "; 0.201 decades gained a step"),
        ([1e-5, 0.0, 2e-5], "; steady"),
    ],
    ids=("zero", "nan", "infinite", "lost", "gained", "steady"),
)
def test_summary_in_words(log10, text):
    layer = gk.nn.GRU(3, 4)
    monitor = gk.flow.watch(layer)
    layer(torch.randn(3, 2, 3))[0].sum().backward()
    monitor.step()
    (record,) = monitor.history
    flow = record.layers["GRU.l0"]
    flow.signals["h"], flow.decay = np.array(log10), decays(np.array([log10])[:, ::-1])[0]
    assert text in monitor.summary()


# ---------------------------------------------------------------- wrong use


def test_watching_twice():
    model = small()
    monitor = gk.flow.watch(model)
    for part in (model, model.rnn, nn.Sequential(model)):
        with pytest.raises(RuntimeError, match="is watched already; close the other monitor first"):
            gk.flow.watch(part)
    monitor.close()
    monitor.close()
    gk.flow.watch(model).close()


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda: gk.flow.watch(nn.ReLU()), ValueError, "ReLU has no parameters"),
        (lambda: gk.flow.watch(torch.zeros(3)), TypeError, "must be a torch.nn.Module, got Tensor"),
        (lambda: gk.flow.watch(small(), every=0), ValueError, "every must be a positive integer, got 0"),
        (lambda: gk.flow.watch(small(), keep=1), ValueError, "keep must be"),
        (lambda: gk.flow.watch(small(), raise_on=("vanished",)), ValueError, "unknown kind of alert 'vanished'"),
        (lambda: gk.flow.watch(small(), raise_on=("dead", ["dead"])), ValueError, "unknown kind of alert .'dead'. in"),
        (
            lambda: gk.flow.watch(small(), raise_on="dead"),
            TypeError,
            r"of kinds of alerts, \('dead',\), got the text 'dead'",
        ),
        (lambda: gk.flow.watch(small(), raise_on=3), TypeError, "raise_on must be a collection .* got int"),
        (lambda: gk.flow.watch(small(), clip="1"), TypeError, "clip must be a number, .* got str"),
        (lambda: gk.flow.watch(small(), clip=True), TypeError, "clip must be a number, .* got bool"),
        (lambda: gk.flow.watch(small(), clip=0.0), ValueError, "clip must be larger than 0, got 0.0"),
        (lambda: gk.flow.watch(small(), clip=math.nan), ValueError, "clip must be larger than 0, got nan"),
        (
            lambda: gk.flow.watch(small(), thresholds={"dead": 1}),
            TypeError,
            "thresholds must be gk.flow.Thresholds, got dict",
        ),
        (
            lambda: gk.flow.watch(small(), on_alert=[]),
            TypeError,
            "on_alert must be a function of an alert, or None, got list",
        ),
        (lambda: gk.flow.watch(small(), log=3), TypeError, "log must be a function of a record, or several, got int"),
        (lambda: gk.flow.watch(small(), log=[print, "a.jsonl"]), TypeError, "got str among them"),
        (
            lambda: gk.flow.watch(small(), scaler=1024.0),
            TypeError,
            "scaler must be a torch.amp.GradScaler, .* got float",
        ),
        (lambda: gk.flow.watch(small().requires_grad_(False)), ValueError, "no parameter of Small requires a gradient"),
        (lambda: gk.flow.watch(nn.Linear(2, 2), spectra=1), ValueError, "Linear has none"),
        (
            lambda: gk.flow.watch(small()).log10_norms(),
            RuntimeError,
            "nothing has been measured yet: call loss.backward",
        ),
        (lambda: gk.flow.watch(small()).horizon("rnn.l7"), KeyError, "no layer 'rnn.l7' is watched; there are rnn.l0"),
    ],
)
def test_wrong_use(call, error, text):
    with pytest.raises(error, match=text):
        call()


def test_states_that_a_layer_has_not():
    model = nn.ModuleList([gk.nn.LSTM(3, 4), nn.GRU(4, 4)])
    monitor = gk.flow.watch(model)
    model[1](model[0](torch.randn(6, 2, 3))[0])[0].sum().backward()
    assert torch.equal(monitor.log10_norms("0.l0", -1), monitor.log10_norms("0.l0", 1))
    with pytest.raises(IndexError, match="0.l0 has 2 states, 0: h, 1: c; got state 7"):
        monitor.log10_norms(state=7)
    with pytest.raises(IndexError, match="1 has one state, 0: x; got state 1"):
        monitor.log10_norms("1", 1)


class Loop(nn.Module):
    """A cell of a single step in a loop of its own."""

    def __init__(self):
        super().__init__()
        self.cell = gk.nn.LSTMCell(3, 4)

    def forward(self, x):
        state = None
        for row in x:
            state = self.cell(row, state)
        return state[0]


@pytest.mark.parametrize(
    ("make", "watched"),
    [
        (lambda: nn.Linear(3, 4), "Linear has none; what is watched are the parameters"),
        (lambda: Loop(), "Loop has none; what is watched are the parameters. Cells of a single step .LSTMCell"),
        (
            lambda: nn.Sequential(nn.Linear(3, 4), gk.nn.ResidualBlock(nn.Linear(4, 4), 4)),
            "Sequential has none; what is watched are the blocks 1 and the parameters",
        ),
    ],
    ids=("linear", "cell", "block"),
)
def test_no_recurrent_layer_is_said(make, watched):
    model = make()
    monitor = gk.flow.watch(model)
    train(model, 2)
    for call in (monitor.horizon, monitor.log10_norms):
        with pytest.raises(RuntimeError, match=f"no recurrent layer is watched: {watched}"):
            call()


def test_backward_never_called_is_said_once():
    model = small()
    monitor = gk.flow.watch(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in range(10):
            optimizer.step()
    assert "nothing has been measured" in str(said[0].message)
    assert len(said) == 1 and monitor.snapshot()["step"] == 10
    monitor.close()
    with gk.flow.watch(model), warnings.catch_warnings(record=True) as said:
        train(model, 1, optimizer=optimizer)
        for _ in range(10):  # somebody evaluates, or another loss is trained
            optimizer.step()
    assert said == []


def test_wrong_input_is_refused_by_the_layer_as_ever():
    model = nn.Sequential(nn.LSTM(3, 4))
    with gk.flow.watch(model):
        with pytest.raises(ValueError, match="Expected input to be 2D or 3D"):
            model(torch.randn(1, 2, 3, 3))
        with pytest.raises(RuntimeError, match="input.size"):
            model(torch.randn(5, 2, 7))
