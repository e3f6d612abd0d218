"""Alerts: what is pointed out, where, how often, and that nothing is where all is well."""

import math
import sys
import warnings

import pytest
import torch
from torch import nn

import gradkernels as gk
from tests.flow.monitored import Small

AT_ONCE = gk.flow.Thresholds(patience=1)


def last_step(layer, T=40, factor=1.0, thresholds=AT_ONCE, **options):
    """A monitor after one backward from the last step alone."""
    monitor = gk.flow.watch(layer, thresholds=thresholds, **options)
    (layer(torch.randn(T, 4, layer.input_size))[0][-1].square().sum() * factor).backward()
    return monitor


def kinds(monitor):
    return [(a.kind, a.layer) for a in monitor.alerts]


@pytest.fixture(autouse=True)
def no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", gk.flow.FlowWarning)
        yield


@pytest.mark.parametrize("cell", ("LSTM", "GRU", "RNN"))
def test_vanishing(cell):
    layer = getattr(gk.nn, cell)(4, 16)
    monitor = last_step(layer)
    (alert,) = [a for a in monitor.alerts if a.kind == "vanishing"]
    log10 = monitor.log10_norms()
    below = (log10 - log10[-1] < -3).nonzero().max().item()
    assert (alert.layer, alert.direction, alert.step, alert.time_step) == (f"{cell}.l0", "forward", 1, below)
    assert alert.value == pytest.approx(10 ** (log10[0] - log10[-1]).item(), rel=1e-4) and alert.threshold == 1e-3
    assert below == 39 - monitor.horizon() - 1
    assert f"{cell}.l0, step 1, time step {below}" in alert.message
    assert ("gk.init" in alert.advice) and str(alert) == f"{alert.message} {alert.advice}"


def test_vanishing_in_the_reverse_direction():
    layer = gk.nn.RNN(4, 16, bidirectional=True)
    monitor = gk.flow.watch(layer, thresholds=AT_ONCE)
    layer(torch.randn(40, 4, 4))[0][0, :, 16:].sum().backward()  # the reverse direction ends at the first step
    (alert,) = [a for a in monitor.alerts if a.kind == "vanishing"]
    log10 = monitor.log10_norms("RNN.l0_reverse")
    assert alert.direction == "reverse" and alert.time_step == (log10 - log10[0] < -3).nonzero().min().item()
    assert monitor.horizon("RNN.l0_reverse") == alert.time_step - 1


def test_exploding():
    layer = gk.nn.RNN(4, 16, nonlinearity="relu")
    with torch.no_grad():
        layer.weight_hh_l0.copy_(1.5 * torch.eye(16))
        layer.weight_ih_l0.abs_()
    monitor = last_step(layer, T=30)
    (alert,) = [a for a in monitor.alerts if a.kind == "exploding"]
    assert alert.time_step == 0 and alert.value == pytest.approx(1.5**29, rel=0.5) and "clip_grad_norm_" in alert.advice


def test_both_directions_may_explode():
    """The other direction is beside a layer and not above it: what grows as much in both has not come in from there."""
    layer = gk.nn.RNN(4, 16, nonlinearity="relu", bidirectional=True)
    with torch.no_grad():
        for name in ("l0", "l0_reverse"):
            getattr(layer, f"weight_hh_{name}").copy_(1.5 * torch.eye(16))
            getattr(layer, f"weight_ih_{name}").abs_()
    monitor = gk.flow.watch(layer)
    y = layer(torch.randn(30, 4, 4).abs())[0]
    (y[-1, :, :16].sum() + y[0, :, 16:].sum()).backward()
    assert kinds(monitor) == [("exploding", "RNN.l0"), ("exploding", "RNN.l0_reverse")]


def test_a_loss_that_comes_in_little_by_little_is_no_explosion():
    """Against the time of the lower layer's reverse direction, the gradient that comes from above grows with every step."""
    layer = gk.nn.LSTM(4, 16, num_layers=2, bidirectional=True)
    monitor = last_step(layer)
    assert monitor.history[-1].layers["LSTM.l0_reverse"].reached.top > 3
    assert "exploding" not in dict(kinds(monitor))


def test_saturated():
    layer = gk.nn.RNN(4, 16)
    with torch.no_grad():
        layer.weight_ih_l0 *= 100
    monitor = last_step(layer, T=10)
    (alert,) = [a for a in monitor.alerts if a.kind == "saturated"]
    assert alert.value > 0.9 and "tanh h" in alert.message


def test_gates_that_are_open_on_purpose_are_no_fault():
    layer = gk.init.chrono_(gk.nn.LSTM(4, 16), 1000)
    with torch.no_grad():
        layer.bias_ih_l0[16:32] += 20
        layer.bias_hh_l0[16:32] += 20
    monitor = last_step(layer, T=10)
    assert monitor.history[-1].layers["LSTM.l0"].saturation["f"].min() == 1.0
    assert monitor.alerts == []


def test_dead_units():
    layer = gk.nn.RNN(4, 16, nonlinearity="relu")
    with torch.no_grad():
        layer.bias_ih_l0[:5] -= 100
    monitor = last_step(layer, T=6)
    assert "dead" not in dict(kinds(monitor))  # weights are looked at when a step is over
    monitor.step()
    (alert,) = [a for a in monitor.alerts if a.kind == "dead"]
    assert alert.value == pytest.approx(5 / 16, abs=1 / 16)


@pytest.mark.parametrize(("rate", "found"), [(1e-9, True), (1e-2, False), (0.0, False)])
def test_stalled(rate, found):
    model = Small(gk.nn.GRU(3, 4), 4)
    monitor = gk.flow.watch(model)
    optimizer = torch.optim.SGD(
        [{"params": model.rnn.parameters(), "lr": rate}, {"params": model.head.parameters()}], 0.1
    )
    for _ in range(2):
        model(torch.randn(5, 2, 3)).sum().backward()
        optimizer.step()
    assert [k for k in kinds(monitor) if k[0] == "stalled"] == [("stalled", "rnn.l0")] * found


def test_nonfinite_names_where_it_began():
    layer = gk.nn.GRU(4, 8, num_layers=2)
    monitor = gk.flow.watch(layer)
    y = layer(torch.randn(9, 2, 4))[0]
    grad = torch.zeros_like(y)
    grad[5, 0, 0] = math.nan
    y.backward(grad)
    monitor.step()
    first, second = [a for a in monitor.alerts if a.kind == "nonfinite"]
    assert (first.layer, first.time_step) == ("GRU.l1", 5) and (second.layer, second.time_step) == ("GRU.l0", 5)
    found = monitor.snapshot()
    assert found["nonfinite"] == {"layer": "GRU.l1", "step": 1, "time_step": 5}
    assert found["alerts"][0]["value"] is None and found["layers"][1]["signals"]["h"][0][:6] == [None] * 6


def test_steps_that_a_scaler_skips_are_its_own_affair():
    model, scaler = Small(gk.nn.GRU(3, 4), 4), torch.amp.GradScaler("cpu", init_scale=2.0)
    monitor = gk.flow.watch(model, scaler=scaler)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)

    def steps(n, factor):
        for _ in range(n):
            optimizer.zero_grad()
            (scaler.scale(model(torch.randn(5, 2, 3)).sum()) * factor).backward()
            scaler.step(optimizer)
            scaler.update()

    steps(3, math.inf)
    steps(1, 1.0)
    assert "nonfinite" not in dict(kinds(monitor)) and len(monitor.history) == 4
    steps(12, math.nan)  # no scale helps
    assert ("nonfinite", "rnn.l0") in kinds(monitor)


@pytest.mark.parametrize("factor", (math.inf, -math.inf, math.nan))
def test_a_step_that_is_skipped_gives_no_warnings_of_numpy(factor):
    model = nn.Sequential(gk.nn.AttentionBlock(4, 1, dropout=0.0), Small(gk.nn.RNN(4, 4), 4, 1))
    scaler, optimizer = torch.amp.GradScaler("cpu", init_scale=2.0), torch.optim.SGD(model.parameters(), 0.1)
    monitor = gk.flow.watch(model, scaler=scaler, clip=1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (scaler.scale(model(torch.randn(5, 2, 4)).sum()) * factor).backward()
        scaler.step(optimizer)
        scaler.update()
        monitor.flush()
        assert "not finite" in monitor.summary() and monitor.snapshot()["steps"] == [1]


def test_well_behaved_training_says_nothing():
    model = Small(gk.init.chrono_(gk.nn.LSTM(3, 16), 10), 16)
    monitor = gk.flow.watch(model)
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    for _ in range(70):
        optimizer.zero_grad()
        model(torch.randn(10, 4, 3)).square().sum().backward()
        optimizer.step()
    assert monitor.alerts == []


def test_said_once_and_to_whom():
    layer = gk.nn.RNN(4, 16)
    told = []
    monitor = gk.flow.watch(layer, on_alert=told.append)
    for _ in range(300):
        layer(torch.randn(40, 4, 4))[0][-1].sum().backward()
        monitor.step()
    monitor.flush()
    assert [(a.kind, a.step) for a in told] == [("vanishing", 100)] and told == monitor.alerts


@pytest.mark.parametrize(
    ("course", "at"),
    [
        ([(9, 40), (60, 2), (9, 40)], [70]),  # the tenth
        ([(9, 40), (64, 2), (9, 40)], []),  # it had gone
        ([(9, 40), (64, 2), (10, 40)], [83]),
        ([(12, 40), (63, 2), (90, 40)], [10]),  # the same still
        ([(12, 40), (64, 2), (20, 40)], [10, 86]),
        ([(6, 40), (1, 2)] * 9, [11]),
    ],
    ids=str,
)
def test_a_vanishing_gradient_has_to_stay(course, at):
    """So many steps with sequences so long: over two of them nothing vanishes."""
    layer = gk.nn.RNN(4, 16)
    monitor = gk.flow.watch(layer, thresholds=gk.flow.Thresholds(patience=10))
    for steps, T in course:
        for _ in range(steps):
            layer(torch.randn(T, 1, 4))[0][-1].sum().backward()
            monitor.step()
    monitor.flush()
    assert [a.step for a in monitor.alerts if a.kind == "vanishing"] == at


def test_the_step_under_way_may_be_the_one_too_many():
    layer = gk.nn.RNN(4, 16)
    monitor = gk.flow.watch(layer, thresholds=gk.flow.Thresholds(patience=2))
    for found in ([], ["vanishing"]):
        layer(torch.randn(40, 4, 4))[0][-1].sum().backward()
        assert [a.kind for a in monitor.alerts] == found == [a.kind for a in monitor.alerts]
        monitor.step()


def test_warned_by_default():
    layer = gk.nn.RNN(4, 16)
    with pytest.warns(gk.flow.FlowWarning, match="Vanishing: RNN.l0, step 1, time step"):
        last_step(layer).close()


def here():
    """This file, and the line of the caller."""
    return __file__, sys._getframe(1).f_lineno


def test_a_warning_is_at_the_users_line():
    """That of optimizer.step(), beneath hooks of torch's, and that of flush(): not one of this package."""
    layer = gk.nn.RNN(4, 16)
    optimizer = torch.optim.SGD(layer.parameters(), 0.1)
    monitor = gk.flow.watch(layer, thresholds=AT_ONCE)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in range(3):  # nothing is measured
            optimizer.step(), (place := here())
        assert [(w.filename, w.lineno) for w in said] == [place]
        layer(torch.randn(40, 4, 4))[0][-1].sum().backward()
        optimizer.step()
        monitor.flush(), (place := here())
    assert [(w.filename, w.lineno) for w in said[1:]] == [place] and "Vanishing" in str(said[1].message)


def test_a_sink_that_fails_is_warned_of_at_the_users_line():
    layer = gk.nn.RNN(4, 16)
    monitor = last_step(layer, log=lambda record: 1 / 0, on_alert=lambda alert: None)
    monitor.step()
    with pytest.warns(gk.flow.FlowWarning, match="ZeroDivisionError") as said:
        monitor.flush(), (place := here())
    assert [(w.filename, w.lineno) for w in said] == [place]


def test_raised_on_request():
    layer = gk.nn.RNN(4, 16)
    monitor = last_step(layer, raise_on=("vanishing",), on_alert=lambda alert: None)
    monitor.step()
    with pytest.raises(gk.flow.FlowError, match="Vanishing: RNN.l0"):
        monitor.flush()


def test_what_a_callback_raises_is_raised():
    def refuse(alert):
        raise ZeroDivisionError

    layer = gk.nn.RNN(4, 16)
    monitor = last_step(layer, on_alert=refuse)
    monitor.step()
    with pytest.raises(ZeroDivisionError):
        monitor.flush()


def test_thresholds():
    layer = gk.nn.RNN(4, 16)
    never = gk.flow.Thresholds(vanishing=1e-300, patience=1)
    assert last_step(layer, thresholds=never).alerts == []
    again = gk.nn.RNN(4, 16)
    monitor = last_step(again, T=3, thresholds=gk.flow.Thresholds(vanishing=0.99, patience=1))
    assert kinds(monitor) == [("vanishing", "RNN.l0")] and monitor.alerts[0].threshold == 0.99
    with pytest.raises(ValueError, match="vanishing must be between 0 and 1, got 2"):
        gk.flow.Thresholds(vanishing=2)
    with pytest.raises(ValueError, match="exploding must be larger than 1, got 0.5"):
        gk.flow.Thresholds(exploding=0.5)
    with pytest.raises(ValueError, match="patience must be a positive integer, got 0"):
        gk.flow.Thresholds(patience=0)


def test_blocks():
    shrink = nn.Linear(4, 4, bias=False)
    block = gk.nn.ResidualBlock(shrink, 4, dropout=0.0, norm="post")
    with torch.no_grad():
        block.weight *= 1e-5
    monitor = gk.flow.watch(block, thresholds=AT_ONCE)
    block(torch.randn(3, 4)).sum(1).square().sum().backward()
    (alert,) = monitor.alerts
    assert (alert.kind, alert.layer, alert.time_step, alert.direction) == ("vanishing", "ResidualBlock", None, None)
