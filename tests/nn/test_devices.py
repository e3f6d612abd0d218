"""Layers on a GPU that is not there: fake tensors know their device, and a mixture of devices is an error in any operation."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call

import gradkernels as gk
from tests.nn.pairs import tensors
from tests.ops.case import GATES, Case

CUDA = torch.device("cuda", 0)


def on_gpu(module):
    return {name: torch.empty_like(p, device="cuda") for name, p in module.named_parameters()}


@pytest.mark.parametrize("kind", ("LSTM", "GRU", "RNN"))
@pytest.mark.parametrize("lengths", (None, "cpu", "cuda"))
def test_layers(kind, lengths):
    """Packed input is not among these: torch's fake tensors hide how many rows it has."""
    layer = getattr(gk.nn, kind)(5, 6, 2, bidirectional=True)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        args = None, None if lengths is None else torch.empty(3, dtype=torch.int64, device=lengths)
        y, final = functional_call(layer, on_gpu(layer), (torch.empty(4, 3, 5, device="cuda"), *args))
    assert y.shape == (4, 3, 12) and y.device == CUDA
    assert all(h.shape == (4, 3, 6) and h.device == CUDA for h in tensors(final))


@pytest.mark.parametrize("kind", ("LSTMCell", "GRUCell", "RNNCell"))
def test_steps(kind):
    cell = getattr(gk.nn, kind)(5, 6)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        out = tensors(functional_call(cell, on_gpu(cell), (torch.empty(3, 5, device="cuda"),)))
    assert all(h.shape == (3, 6) and h.device == CUDA for h in out)


@pytest.mark.parametrize("gates", (False, True), ids=("gradients", "parts"))
@pytest.mark.parametrize("layout", ("dense", "packed", "lengths"))
@pytest.mark.parametrize("cell", GATES)
def test_operators(cell, layout, gates):
    """What backward is said to give is beside x as well, the norms among it."""
    case, c = Case(cell, layout=layout), gk.cells.get(cell)
    given = case.tensors(torch.float32, requires_grad=False)
    steps = case.batch_sizes if layout == "packed" else None, case.lengths if layout == "lengths" else None
    with FakeTensorMode(allow_non_fake_inputs=True):
        t = {k: torch.empty(v.shape, device="cuda") for k, v in given.items()}
        x, w_ih, b_ih, w_hh, b_hh, *state = t.values()
        forward = torch.ops.gradkernels.recurrent_forward(
            cell, x, w_ih, b_ih, w_hh, b_hh, None, state, *steps, False, 2, None
        )
        seq, final, kept = forward[: c.S], forward[c.S : 2 * c.S], forward[2 * c.S :]
        backward = torch.ops.gradkernels.recurrent_backward(
            cell, [*seq, *final], x, w_ih, w_hh, None, [*seq, *kept], state, *steps, False, [True] * 5 + [False], gates, True, None
        )  # fmt: skip
    assert len(forward) == 2 * c.S + 1 and all(v.device == CUDA for v in (*forward, *backward))
    assert backward[-1].dtype == torch.float64 and backward[-1].shape == (case.T, c.S + 1)
    if not gates:
        assert [v.shape for v in backward[:5]] == [v.shape for v in (x, w_ih, b_ih, w_hh, b_hh)]


def test_mixtures_are_refused():
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        layer, x = gk.nn.LSTM(5, 6), torch.empty(4, 3, 5, device="cuda")
        with pytest.raises(
            RuntimeError, match="not at the same device, found input tensor at cuda:0 and parameter tensor at cpu"
        ):
            layer(x)
        h = torch.empty(1, 3, 6)
        with pytest.raises(RuntimeError, match="found input tensor at cuda:0 and hidden tensor at cpu"):
            functional_call(layer, on_gpu(layer), (x, (h, h)))
        probe = torch.empty(4, 3, dtype=torch.float64)
        weights = on_gpu(layer)
        with pytest.raises(RuntimeError, match="x is on cuda:0 and probe is on cpu"):
            gk.ops.recurrent(x, weights["weight_hh_l0"], weight_ih=weights["weight_ih_l0"], probe=probe)
