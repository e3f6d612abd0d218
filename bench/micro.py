"""Small calls, where everything around the arithmetic is what costs: `pytest bench/micro.py` (needs pytest-benchmark).

`pytest bench/micro.py --benchmark-group-by=group --benchmark-columns=min,median,iqr,rounds` shows ours beside torch's in every group.
"""

import pytest
import torch
from torch import nn

import gradkernels as gk

LAYERS = {"lstm": (gk.nn.LSTM, nn.LSTM), "gru": (gk.nn.GRU, nn.GRU), "rnn": (gk.nn.RNN, nn.RNN)}
CELLS = {"lstm": (gk.nn.LSTMCell, nn.LSTMCell), "gru": (gk.nn.GRUCell, nn.GRUCell), "rnn": (gk.nn.RNNCell, nn.RNNCell)}
WHO = pytest.mark.parametrize("which", [0, 1], ids=["ours", "torch"])
KIND = pytest.mark.parametrize("kind", list(LAYERS))
SIZE = pytest.mark.parametrize("H", [64, 256])


def state(kind, *shape):
    h = torch.randn(*shape)
    return (h, torch.randn(*shape)) if kind == "lstm" else h


def equal(kind, table, H, *call):
    """A layer of ours and one of torch, with the same weights, after a look that they give the same: no time of wrong numbers."""
    pair = [module(H, H) for module in table[kind]]
    pair[0].load_state_dict(pair[1].state_dict())
    with torch.no_grad():
        results = [torch.utils._pytree.tree_leaves(module(*call)) for module in pair]
    for ours, theirs in zip(*results):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    return pair


@WHO
@SIZE
@KIND
def test_one_step_of_a_layer(benchmark, kind, H, which):
    """T = B = 1, the state carried along, as in streaming."""
    benchmark.group = f"one step, {kind} layer, H = {H}"
    call = torch.randn(1, 1, H), state(kind, 1, 1, H)
    module = equal(kind, LAYERS, H, *call)[which]
    with torch.no_grad():
        benchmark(module, *call)


@WHO
@SIZE
@KIND
def test_one_step_of_a_cell(benchmark, kind, H, which):
    benchmark.group = f"one step, {kind} cell, H = {H}"
    call = torch.randn(1, H), state(kind, 1, H)
    module = equal(kind, CELLS, H, *call)[which]
    with torch.no_grad():
        benchmark(module, *call)


@WHO
@KIND
def test_forward_too_small_for_a_team(benchmark, kind, which):
    """16 steps of one row of 32 units: one thread has it done before a second would have woken."""
    benchmark.group = f"16 steps, {kind} layer, H = 32"
    call = (torch.randn(16, 1, 32),)
    module = equal(kind, LAYERS, 32, *call)[which]
    with torch.no_grad():
        benchmark(module, *call)


@WHO
@KIND
def test_training_of_a_small_layer(benchmark, kind, which):
    """What autograd and the checks add: 4 steps of 2 rows of 16 units, forward and backward."""
    benchmark.group = f"4 steps forward and backward, {kind} layer, H = 16"
    x = torch.randn(4, 2, 16, requires_grad=True)
    module = equal(kind, LAYERS, 16, x)[which]
    dy = torch.randn(4, 2, 16)
    benchmark(lambda: module(x)[0].backward(dy))


@pytest.mark.parametrize("changed", [False, True], ids=["weights as before", "weights changed"])
@pytest.mark.parametrize("H", [256, 1024])
def test_packing_of_weights(benchmark, H, changed):
    """Two steps of an LSTM: with weights that changed since the last call they are packed again."""
    benchmark.group = f"packing, lstm layer, H = {H}"
    x = torch.randn(2, 4, H)
    module = equal("lstm", LAYERS, H, x)[0]

    def run():
        if changed:
            module.weight_hh_l0[:0].zero_()  # a new version, the same values
        return module(x)

    with torch.no_grad():
        benchmark(run)


@WHO
def test_packed_sequence(benchmark, which):
    """16 rows of 1 to 16 steps as a PackedSequence, and what is around it."""
    benchmark.group = "PackedSequence of 16 short rows, lstm layer, H = 64"
    lengths = torch.arange(1, 17)
    packed = nn.utils.rnn.pack_padded_sequence(torch.randn(16, 16, 64), lengths, enforce_sorted=False)
    module = equal("lstm", LAYERS, 64, packed)[which]
    with torch.no_grad():
        benchmark(module, packed)
