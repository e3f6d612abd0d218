"""Empty batches, rows without steps, single steps, NaN and Inf, saturated gates: as torch has them."""

import pytest
import torch
from torch.nn.utils.rnn import pack_padded_sequence, pack_sequence

from tests import place
from tests.nn.pairs import close, pair, tensors

KINDS = ("LSTM", "GRU", "RNN")


def with_gradients(layer, x, *args):
    """Outputs and every gradient."""
    x = x.clone().requires_grad_()
    out = layer(x, *args)
    grads = torch.autograd.grad(sum(v.sum() for v in tensors(out)), [x, *layer.parameters()])
    return [*tensors(out), *grads]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("batch_first", (False, True), ids=("", "batch_first"))
@pytest.mark.cpu
def test_no_rows(kind, batch_first, backend):
    ours, theirs = pair(kind, backend, 3, 5, 2, bidirectional=True, batch_first=batch_first)
    x = place.zeros(*((0, 4) if batch_first else (4, 0)), 3)
    close(with_gradients(ours, x), with_gradients(theirs, x))
    h = place.zeros(4, 0, 5)
    hx = (h, h) if kind == "LSTM" else h
    close(ours(x, hx), theirs(x, hx))
    assert ours(x, None, torch.zeros(0, dtype=torch.int64))[0].shape == theirs(x)[0].shape
    cell, torchs = pair(kind + "Cell", backend)
    close(with_gradients(cell, place.zeros(0, 3)), with_gradients(torchs, place.zeros(0, 3)))


@pytest.mark.parametrize("kind", KINDS)
def test_rows_without_steps_keep_their_state(kind, backend):
    """What is left is the batch without them."""
    ours, _ = pair(kind, backend, 3, 5, 2, bidirectional=True)
    x, h = place.randn(4, 3, 3), place.randn(4, 3, 5)
    give = lambda v: (v, 2 * v) if kind == "LSTM" else v
    lengths = torch.tensor([0, 4, 2])
    y, final = ours(x, give(h), lengths)
    want, others = ours(x[:, 1:], give(h[:, 1:]), lengths[1:])
    close(y[:, 1:], want)
    assert (y[:, 0] == 0).all()
    for got, kept, rest in zip(tensors(final), tensors(give(h)), tensors(others)):
        assert torch.equal(got[:, 0], kept[:, 0])
        close(got[:, 1:], rest)
    none, final = ours(x, give(h), torch.zeros(3, dtype=torch.int64))
    assert (none == 0).all() and all(torch.equal(a, b) for a, b in zip(tensors(final), tensors(give(h))))


@pytest.mark.parametrize("kind", KINDS)
def test_what_lies_beyond_a_length_does_not_matter(kind, backend):
    ours, _ = pair(kind, backend, 3, 5, 2, bidirectional=True)
    x, lengths = place.randn(5, 3, 3), place.tensor([2, 5, 1])
    beyond = (place.arange(5).unsqueeze(1) >= lengths).unsqueeze(2)
    clean = with_gradients(ours, x.masked_fill(beyond, 0.0), None, lengths)
    wild = with_gradients(ours, x.masked_fill(beyond, 1e30), None, lengths)
    close(wild, clean, rtol=0, atol=0)
    assert (
        clean[-1 - len(list(ours.parameters()))][beyond.expand(5, 3, 3)] == 0
    ).all()  # the gradient of the input there


@pytest.mark.parametrize("kind", KINDS)
def test_full_lengths_are_no_lengths(kind, backend):
    ours, _ = pair(kind, backend, 3, 5, 2, bidirectional=True, batch_first=True)
    x = place.randn(3, 5, 3)
    close(with_gradients(ours, x, None, torch.full((3,), 5)), with_gradients(ours, x))


@pytest.mark.parametrize("bad", (float("nan"), float("inf"), -float("inf")), ids=str)
@pytest.mark.parametrize("kind", (*KINDS, "RNN-relu"))
@pytest.mark.cpu
def test_nan_and_inf_go_where_torch_lets_them(kind, bad, backend):
    kind, _, nonlinearity = kind.partition("-")
    ours, theirs = pair(kind, backend, 3, 5, **({"nonlinearity": nonlinearity} if nonlinearity else {}))
    x = place.randn(5, 3, 3)
    x[2, 1, 0] = bad
    got, want = ours(x), theirs(x)
    for a, b in zip(tensors(got), tensors(want)):
        assert torch.equal(a.isnan(), b.isnan()) and torch.equal(a.isinf(), b.isinf())
    close(got, want, equal_nan=True)
    assert got[0][:2].isfinite().all() and got[0][:, [0, 2]].isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.cpu
def test_nan_in_state_and_weight(kind, backend):
    ours, theirs = pair(kind, backend)
    x, h = place.randn(5, 3, 3), place.zeros(1, 3, 5)
    h[0, 1, 0] = float("nan")
    hx = (h, torch.zeros_like(h)) if kind == "LSTM" else h
    close(ours(x, hx), theirs(x, hx), equal_nan=True)
    with torch.no_grad():
        ours.weight_hh_l0[0, 0] = theirs.weight_hh_l0[0, 0] = float("nan")
    close(ours(x), theirs(x), equal_nan=True)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.cpu
def test_saturated_gates(kind, backend):
    """Gates at 0 and 1 exactly: gradients vanish, and are not NaN."""
    ours, theirs = pair(kind, backend)
    with torch.no_grad():
        for p in (*ours.parameters(), *theirs.parameters()):
            p.mul_(1e4)
    x = place.randn(9, 3, 3)
    got = with_gradients(ours, x)
    close(got, with_gradients(theirs, x))
    assert all(v.isfinite().all() for v in got)


@pytest.mark.parametrize("kind", KINDS)
def test_one_of_everything(kind, backend):
    ours, theirs = pair(kind, backend, 1, 1)
    x = place.randn(1, 1, 1)
    close(with_gradients(ours, x), with_gradients(theirs, x))
    close(with_gradients(ours, x[0]), with_gradients(theirs, x[0]))


@pytest.mark.parametrize("kind", KINDS)
def test_packed_forms(kind, backend):
    ours, theirs = pair(kind, backend, 3, 5, 2, bidirectional=True)
    rows = [place.randn(n, 3) for n in (2, 5, 1, 5)]
    for packed in (
        pack_sequence(rows, enforce_sorted=False),
        pack_sequence(sorted(rows, key=len, reverse=True)),
        pack_sequence([rows[2]]),
        pack_padded_sequence(place.randn(3, 7, 3), [7, 7, 7], batch_first=True),
    ):
        got, want = ours(packed), theirs(packed)
        close(got, want)
        assert type(got[0]) is type(want[0])
        for a, b in zip(got[0], want[0]):
            assert (a is None) == (b is None)


@pytest.mark.parametrize("kind", KINDS)
def test_packed_batch_first_layer_takes_packed_input_as_it_is(kind, backend):
    ours, theirs = pair(kind, backend, 3, 5, batch_first=True)
    packed = pack_padded_sequence(place.randn(4, 6, 3), [6, 2, 1, 1], batch_first=True)
    h = place.randn(1, 4, 5)
    hx = (h, h) if kind == "LSTM" else h
    close(ours(packed, hx), theirs(packed, hx))


@pytest.mark.parametrize("kind", KINDS)
def test_layout_of_the_output(kind, backend):
    for batch_first in (False, True):
        ours, theirs = pair(kind, backend, 3, 5, batch_first=batch_first)
        x = place.randn(4, 2, 3)
        assert ours(x)[0].stride() == theirs(x)[0].stride()
        assert [h.shape for h in tensors(ours(x)[1])] == [h.shape for h in tensors(theirs(x)[1])]


@pytest.mark.parametrize("kind", KINDS)
def test_a_list_serves_as_hx_of_an_lstm(kind, backend):
    ours, theirs = pair(kind, backend)
    x, h = place.randn(4, 2, 3), place.randn(1, 2, 5)
    hx = [h, h] if kind == "LSTM" else h
    close(ours(x, hx), theirs(x, hx))
    close(ours(input=x, hx=hx), theirs(input=x, hx=hx))


@pytest.mark.parametrize("kind", KINDS)
def test_determinism(kind, backend):
    ours, _ = pair(kind, backend, 33, 65, 2, bidirectional=True)
    x = place.randn(17, 9, 33)
    first, second = with_gradients(ours, x), with_gradients(ours, x)
    assert all(torch.equal(a, b) for a, b in zip(first, second))


@pytest.mark.cpu
def test_dropout_draws_the_mask_that_torch_draws(backend):
    for kind in KINDS:
        ours, theirs = pair(kind, backend, 3, 5, 3, dropout=0.5, bidirectional=True)
        x = place.randn(6, 4, 3)
        for given in (x, pack_padded_sequence(x, [6, 3, 3, 1])):
            torch.manual_seed(7)
            want = theirs(given)
            torch.manual_seed(7)
            close(ours(given), want)
        torch.manual_seed(8)
        assert not torch.allclose(ours(x)[0], want[0].data[:1])
    everything, _ = pair("LSTM", backend, 3, 5, 2, dropout=1.0)
    assert everything(place.randn(4, 2, 3))[0].isfinite().all()
