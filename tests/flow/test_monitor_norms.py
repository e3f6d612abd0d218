"""Norms of the gradient of every state at every step equal those of a loop written out, with retain_grad."""

import pytest
import torch
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.utils.checkpoint import checkpoint

import gradkernels as gk
from tests.close import assert_close_to_truth
from tests.flow.monitored import KINDS, measured, unrolled

T, B, I, H = 9, 4, 3, 5
LENGTHS = torch.tensor([7, 9, 1, 4])


def last(y):
    return y[-1].square().sum() + 0.1 * y.sin().sum()


def assert_norms(got, want, rounded=None):
    """As ratios, so that the smallest norm counts as much as the largest; `rounded` has torch's own errors in the dtype under test.

    Most records have no x, the last column of `want`. A monitor keeps logarithms in float32."""
    assert got.keys() == want.keys()
    for name, truth in want.items():
        columns = got[name].shape[1]
        truth, theirs = truth[:, :columns], (rounded or want)[name][:, :columns]
        here = truth > 1e-36
        ours, theirs = (torch.where(here, v / truth, 1.0).float() for v in (got[name], theirs))
        assert_close_to_truth(ours, theirs, torch.ones_like(truth), name=name)
        assert (got[name][~here] < 1e-35).all()


@pytest.mark.parametrize("layout", ("padded", "packed", "lengths"))
@pytest.mark.parametrize("cell", KINDS)
def test_every_cell_layer_and_direction(cell, layout):
    layer = KINDS[cell](I, H, num_layers=2, bidirectional=True, dtype=torch.double)
    x = torch.randn(T, B, I, dtype=torch.double, requires_grad=True)
    lengths = LENGTHS if layout != "padded" else torch.full((B,), T)
    monitor = gk.flow.watch(layer)
    if layout == "packed":
        y, _ = layer(pack_padded_sequence(x, lengths, enforce_sorted=False))
        y, _ = pad_packed_sequence(y)
    else:
        y, _ = layer(x, lengths=lengths if layout == "lengths" else None)
    last(y).backward()
    assert_norms(measured(monitor), unrolled(layer, x, lengths, last))


def test_projection():
    layer = gk.nn.LSTM(I, H, proj_size=2, batch_first=True, dtype=torch.double)
    x = torch.randn(B, T, I, dtype=torch.double, requires_grad=True)
    with gk.flow.watch(layer) as monitor:
        last(layer(x)[0].transpose(0, 1)).backward()
        want = unrolled(layer, x.transpose(0, 1), torch.full((B,), T), last)
        assert_norms(measured(monitor), want)


@pytest.mark.parametrize("cell", ("lstm", "gru", "rnn_tanh"))
def test_as_small_as_float32_reaches(cell):
    """Down to 1e-30, in float32."""
    layer = KINDS[cell](8, 16)
    x = torch.randn(90, 3, 8, requires_grad=True)
    loss = lambda y: y[-1].square().sum()
    full = torch.full((3,), 90)
    with gk.flow.watch(layer) as monitor:
        (loss(layer(x)[0]) * 1e-12).backward()
    want, rounded = (
        unrolled(layer, x, full, lambda y: loss(y) * 1e-12, dtype) for dtype in (torch.double, torch.float32)
    )
    assert want["l0"].min() < 1e-29
    got = measured(monitor)["l0"]
    here = want["l0"] > 1e-30
    assert here.sum() > 100
    assert_norms({"l0": torch.where(here, got, 0)}, {"l0": torch.where(here, want["l0"], 0)}, rounded)
    assert ((got / want["l0"])[here] - 1).abs().max() < 1e-5


@pytest.mark.parametrize("backend", ("aot_eager", pytest.param("inductor", marks=pytest.mark.slow)))
def test_compiled(backend):
    layer = gk.nn.LSTM(I, H, num_layers=2, dtype=torch.double)
    x = torch.randn(T, B, I, dtype=torch.double, requires_grad=True)
    monitor = gk.flow.watch(layer)
    last(torch.compile(layer, fullgraph=True, backend=backend)(x)[0]).backward()
    assert_norms(measured(monitor), unrolled(layer, x, torch.full((B,), T), last))
    assert monitor.history[-1].layers["LSTM.l0"].saturation.keys() == {"i", "f", "g", "o"}


def test_autocast():
    """In bfloat16, with the errors that torch's own loop has in it."""
    layer, x = gk.nn.LSTM(I, H), torch.randn(T, B, I)
    full = torch.full((B,), T)
    with gk.flow.watch(layer) as monitor, torch.autocast("cpu", torch.bfloat16):
        last(layer(x)[0].float()).backward()
    want, rounded = (unrolled(layer, x, full, last, dtype) for dtype in (torch.double, torch.bfloat16))
    assert_norms(measured(monitor), want, rounded)


# ---------------------------------------------------------------- what adds up


def whole(layer, x):
    return unrolled(layer, x, torch.full((x.shape[1],), len(x)), lambda y: y[-1].square().sum())


@pytest.fixture
def one():
    """A layer, its input, an optimizer that changes nothing."""
    layer = gk.nn.LSTM(I, H, dtype=torch.double)
    return layer, torch.randn(T, 8, I, dtype=torch.double, requires_grad=True), torch.optim.SGD(layer.parameters(), 0.0)


def test_micro_batches(one):
    layer, x, optimizer = one
    monitor = gk.flow.watch(layer)
    for part in x.split((1, 4, 3), 1):
        layer(part)[0][-1].square().sum().backward()
    optimizer.step()
    assert monitor.step_count == 1 and len(monitor.history) == 1
    assert_norms(measured(monitor), whole(layer, x))


def test_two_calls_in_one_graph(one):
    layer, x, _ = one
    monitor = gk.flow.watch(layer)
    sum(layer(part)[0][-1].square().sum() for part in x.split(4, 1)).backward()
    assert_norms(measured(monitor), whole(layer, x))


@pytest.mark.parametrize("reentrant", (True, False))
def test_checkpoint(one, reentrant):
    layer, x, _ = one
    monitor = gk.flow.watch(layer)
    checkpoint(lambda v: layer(v)[0], x, use_reentrant=reentrant)[-1].square().sum().backward()
    assert_norms(measured(monitor), whole(layer, x))


def test_backward_twice_in_two_steps(one):
    layer, x, _ = one
    monitor = gk.flow.watch(layer)
    loss = layer(x)[0][-1].square().sum()
    loss.backward(retain_graph=True)
    monitor.step()
    loss.backward()
    assert len(monitor.history) == 2
    assert_norms(measured(monitor), whole(layer, x))


def test_create_graph(one):
    layer, x, _ = one
    monitor = gk.flow.watch(layer)
    layer(x)[0][-1].square().sum().backward(create_graph=True)
    assert_norms(measured(monitor), whole(layer, x))
    assert not any(leaf.grad.requires_grad for leaf in layer.probes)


def test_scaler_and_a_step_that_is_skipped(one):
    layer, x, optimizer = one
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    monitor = gk.flow.watch(layer, scaler=scaler)
    for factor in (1.0, float("inf"), 1.0):
        optimizer.zero_grad()
        (scaler.scale(layer(x)[0][-1].square().sum()) * factor).backward()
        scaler.step(optimizer)
        scaler.update()
    first, skipped, third = monitor.history
    assert scaler.get_scale() == 512.0 and (first.step, skipped.step, third.step) == (1, 2, 3)
    assert skipped.layers["LSTM.l0"].broken and not third.layers["LSTM.l0"].broken
    assert_norms(measured(monitor), whole(layer, x))


# ---------------------------------------------------------------- lengths


def test_sequences_of_growing_and_shrinking_length(one):
    layer, x, optimizer = one
    monitor = gk.flow.watch(layer)
    for n in (4, 9, 1, 6):
        layer(x[:n])[0][-1].square().sum().backward()
        optimizer.step()
    for record, n in zip(monitor.history, (4, 9, 1, 6)):
        want = unrolled(layer, x[:n], torch.full((8,), n), lambda y: y[-1].square().sum())["l0"]
        got = 10 ** torch.from_numpy(record.layers["LSTM.l0"].signals["h"]).double()
        assert_norms({"h": got.unsqueeze(1)}, {"h": want})


def test_two_lengths_in_one_step(one):
    """The second call needs longer leaves than the first one has in its graph already."""
    layer, x, _ = one
    monitor = gk.flow.watch(layer)
    (layer(x[:4])[0].square().sum() + layer(x)[0].square().sum()).backward()
    parts = [unrolled(layer, x[:n], torch.full((8,), n), lambda y: y.square().sum())["l0"] for n in (4, 9)]
    parts[1][:4] = (parts[0].square() + parts[1][:4].square()).sqrt()
    assert_norms(measured(monitor), {"l0": parts[1]})


def test_a_sequence_longer_than_any_leaf_when_compiled():
    """Compiled code cannot make leaves: the first record has the last steps, the next one all."""
    layer = gk.nn.GRU(2, 3)
    monitor = gk.flow.watch(layer)
    x, optimizer = torch.randn(700, 1, 2), torch.optim.SGD(layer.parameters(), 0.0)
    run = torch.compile(layer, backend="aot_eager", fullgraph=True)
    for _ in range(2):
        run(x)[0].square().sum().backward()
        optimizer.step()
        monitor.flush()
    first, second = (record.layers["GRU.l0"].signals["h"] for record in monitor.history)
    assert (len(first), len(second)) == (512, 700)
    torch.testing.assert_close(torch.from_numpy(first), torch.from_numpy(second[-512:]))


def test_plain_layers_of_torch_show_their_input():
    layer = torch.nn.LSTM(I, H, batch_first=True, dtype=torch.double)
    x = torch.randn(B, T, I, dtype=torch.double)
    packed = pack_padded_sequence(x, LENGTHS, batch_first=True, enforce_sorted=False)
    for given in (x, packed):
        with gk.flow.watch(layer) as monitor:
            run = lambda v: layer(v)[0] if v is not packed else pad_packed_sequence(layer(v)[0], batch_first=True)[0]
            run(given).square().sum().backward()
            got = 10 ** monitor.log10_norms().double()
        leaf = x.clone().requires_grad_()
        again = leaf if given is x else pack_padded_sequence(leaf, LENGTHS, batch_first=True, enforce_sorted=False)
        y = layer(again)[0]
        (y if given is x else y.data).square().sum().backward()
        assert_norms({"x": got.unsqueeze(1)}, {"x": leaf.grad.norm(dim=(0, 2)).unsqueeze(1)})
