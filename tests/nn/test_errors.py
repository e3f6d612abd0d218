"""Wrong input: torch's exception types and texts, found by running torch's layer on the same call."""

import pytest
import torch
from torch.nn.utils.rnn import pack_padded_sequence

import gradkernels as gk

pytestmark = pytest.mark.cpu  # checks are of Python, and the same everywhere
LAYERS, CELLS = ("LSTM", "GRU", "RNN"), ("LSTMCell", "GRUCell", "RNNCell")


def state(kind, *shape, **kwargs):
    h = torch.zeros(*shape, **kwargs)
    return (h, h.clone()) if "LSTM" in kind else h


def packed(features=3, dtype=torch.float32, sort=True):
    lengths = torch.tensor([4, 2] if sort else [2, 4])
    return pack_padded_sequence(torch.zeros(4, 2, features, dtype=dtype), lengths, enforce_sorted=sort)


def x(*shape, **kwargs):
    return torch.zeros(*(shape or (4, 2, 3)), **kwargs)


# name -> what is called with (class, kind); input size 3, hidden size 5 where a module is made
CONSTRUCTORS = {
    "input size 0": lambda c, k: c(0, 5),
    "hidden size 0": lambda c, k: c(3, 0),
    "negative hidden size": lambda c, k: c(3, -1),
    "no layers": lambda c, k: c(3, 5, 0),
    "float input size": lambda c, k: c(3.0, 5),
    "float hidden size": lambda c, k: c(3, 5.0),
    "bias is an int": lambda c, k: c(3, 5, bias=1),
    "batch_first is an int": lambda c, k: c(3, 5, batch_first=1),
    "dropout 2": lambda c, k: c(3, 5, 2, dropout=2.0),
    "dropout -1": lambda c, k: c(3, 5, 2, dropout=-1.0),
    "dropout True": lambda c, k: c(3, 5, 2, dropout=True),
    "dropout text": lambda c, k: c(3, 5, 2, dropout="a"),
    "proj_size too large": lambda c, k: c(3, 5, proj_size=5),
    "proj_size negative": lambda c, k: c(3, 5, proj_size=-1),
    "unknown keyword": lambda c, k: c(3, 5, colour=2),
    "nothing": lambda c, k: c(),
}
CALLS = {
    "1-D input": lambda m, k: m(x(3)),
    "4-D input": lambda m, k: m(x(1, 1, 1, 3)),
    "feature size": lambda m, k: m(x(4, 2, 4)),
    "feature size, unbatched": lambda m, k: m(x(4, 4)),
    "input dtype": lambda m, k: m(x(dtype=torch.float64)),
    "input bf16": lambda m, k: m(x(dtype=torch.bfloat16)),
    "integers": lambda m, k: m(x(dtype=torch.int64)),
    "hx batch": lambda m, k: m(x(), state(k, 1, 3, 5)),
    "hx layers": lambda m, k: m(x(), state(k, 2, 2, 5)),
    "hx width": lambda m, k: m(x(), state(k, 1, 2, 6)),
    "hx 2-D": lambda m, k: m(x(), state(k, 2, 5)),
    "hx 3-D for unbatched": lambda m, k: m(x(4, 3), state(k, 1, 1, 5)),
    "hx width for unbatched": lambda m, k: m(x(4, 3), state(k, 1, 6)),
    "hx is one tensor": lambda m, k: m(x(), torch.zeros(2, 2, 5)),
    "hx of one": lambda m, k: m(x(), (torch.zeros(1, 2, 5),)),
    "hx of None": lambda m, k: m(x(), (None, None)),
    "c of another width": lambda m, k: m(x(), (torch.zeros(1, 2, 5), torch.zeros(1, 2, 4))),
    "no steps": lambda m, k: m(x(0, 2, 3)),
    "no steps, unbatched": lambda m, k: m(x(0, 3)),
    "no steps, no rows": lambda m, k: m(x(0, 0, 3)),
    "input elsewhere": lambda m, k: m(x(device="meta")),
    "hx elsewhere": lambda m, k: m(x(), state(k, 1, 2, 5, device="meta")),
    "weights elsewhere": lambda m, k: m.to("meta")(x()),
    "a list": lambda m, k: m([1.0]),
    "None": lambda m, k: m(None),
}
PACKED = {
    "feature size": lambda m, k: m(packed(4)),
    "input dtype": lambda m, k: m(packed(dtype=torch.float64)),
    "hx batch": lambda m, k: m(packed(), state(k, 1, 3, 5)),
    "hx smaller batch": lambda m, k: m(packed(), state(k, 1, 1, 5)),
    "hx width": lambda m, k: m(packed(), state(k, 1, 2, 6)),
    "hx layers": lambda m, k: m(packed(), state(k, 2, 2, 5)),
    "hx 2-D": lambda m, k: m(packed(), state(k, 2, 5)),
    "hx width, unsorted": lambda m, k: m(packed(sort=False), state(k, 1, 2, 6)),
    "hx layers, unsorted": lambda m, k: m(packed(sort=False), state(k, 2, 2, 5)),
}
STEPS = {
    "3-D input": lambda m, k: m(x(1, 2, 3)),
    "0-D input": lambda m, k: m(x()[0, 0, 0]),
    "feature size": lambda m, k: m(x(2, 4)),
    "feature size, unbatched": lambda m, k: m(x(4)),
    "hx 3-D": lambda m, k: m(x(2, 3), state(k, 1, 2, 5)),
    "hx batch": lambda m, k: m(x(2, 3), state(k, 3, 5)),
    "hx width": lambda m, k: m(x(2, 3), state(k, 2, 4)),
    "hx 1-D for 2-D": lambda m, k: m(x(2, 3), state(k, 5)),
    "hx 2-D for 1-D": lambda m, k: m(x(3), state(k, 2, 5)),
    "hx 2-D of one row for 1-D": lambda m, k: m(x(3), state(k, 1, 5)),
    "c width": lambda m, k: m(x(2, 3), (torch.zeros(2, 5), torch.zeros(2, 4))),
    "c batch": lambda m, k: m(x(2, 3), (torch.zeros(2, 5), torch.zeros(3, 5))),
    "hx of one": lambda m, k: m(x(2, 3), (torch.zeros(2, 5),)),
    "hx of three": lambda m, k: m(x(2, 3), (torch.zeros(2, 5),) * 3),
    "a list": lambda m, k: m([1.0]),
}


def error_of(call):
    try:
        call()
    except Exception as e:  # noqa: BLE001 - whatever it is, it is compared
        return e
    return None


def table(cases, kinds):
    return [pytest.param(kind, name, id=f"{kind}-{name.replace(' ', '_')}") for kind in kinds for name in cases]


def same(theirs, ours):
    """One type and one text."""
    assert theirs is not None
    assert type(ours) is type(theirs), (theirs, ours)
    assert str(ours) == str(theirs)


@pytest.mark.parametrize("kind, name", table(CONSTRUCTORS, LAYERS))
def test_constructor(kind, name):
    make = CONSTRUCTORS[name]
    theirs = error_of(lambda: make(getattr(torch.nn, kind), kind))
    ours = error_of(lambda: make(getattr(gk.nn, kind), kind))
    assert theirs is not None
    if name == "nothing":  # Python's own text counts the arguments of the constructor, and ours has one more
        assert type(ours) is TypeError and "missing" in str(ours)
    else:
        same(theirs, ours)


@pytest.mark.parametrize("kind, name", table(CALLS, LAYERS))
def test_call(kind, name, backend):
    theirs = error_of(lambda: CALLS[name](torch.nn.__dict__[kind](3, 5), kind))
    ours = error_of(lambda: CALLS[name](getattr(gk.nn, kind)(3, 5, backend=backend), kind))
    same(theirs, ours)


@pytest.mark.parametrize("kind, name", table(PACKED, LAYERS))
def test_packed_call(kind, name, backend):
    """torch.nn.LSTM alone does not look at its packed input, and fails inside; ours says what torch.nn.GRU says."""
    theirs = error_of(lambda: PACKED[name](torch.nn.__dict__["GRU"](3, 5), "GRU"))
    ours = error_of(lambda: PACKED[name](getattr(gk.nn, kind)(3, 5, backend=backend), kind))
    assert type(ours) is type(theirs)
    if name == "hx 2-D":  # torch would take one dimension for another
        assert "[2, 5]" in str(ours)
    else:
        assert str(ours).replace("hidden[0]", "hidden") == str(theirs)


@pytest.mark.parametrize("kind, name", table(STEPS, CELLS))
def test_cell_call(kind, name, backend):
    theirs = error_of(lambda: STEPS[name](getattr(torch.nn, kind)(3, 5), kind))
    ours = error_of(lambda: STEPS[name](getattr(gk.nn, kind)(3, 5, backend=backend), kind))
    same(theirs, ours)


@pytest.mark.parametrize("kind", LAYERS)
def test_hx_dtype_names_both(kind, backend):
    """Torch fails inside a matrix product or oneDNN, with RuntimeError; ours names the argument."""
    layer = getattr(gk.nn, kind)(3, 5, backend=backend)
    with pytest.raises(RuntimeError, match="float64.*float32|float32.*float64|Double.*Float|Float.*Double"):
        layer(x(), state(kind, 1, 2, 5, dtype=torch.float64))


def test_nonlinearity():
    with pytest.raises(ValueError, match="Unknown nonlinearity 'x'. Select from 'tanh', 'relu' or 'sigmoid'."):
        gk.nn.RNN(3, 5, nonlinearity="x")
    theirs, ours = (error_of(lambda c=lib.nn.RNNCell: c(3, 5, nonlinearity="x")(x(2, 3))) for lib in (torch, gk))
    same(theirs, ours)


@pytest.mark.parametrize("kind, place", (("GRU", 7), ("RNN", 8)))
def test_projection_by_position_is_refused(kind, place):
    """torch.nn.GRU takes it and fails at the first call."""
    args = [3, 5, 1, *(["tanh"] if kind == "RNN" else []), True, False, 0.0, False]
    assert len(args) == place
    assert error_of(lambda: getattr(gk.nn, kind)(*args, 0)) is None
    with pytest.raises(ValueError, match="proj_size argument is only supported for LSTM, not RNN or GRU"):
        getattr(gk.nn, kind)(*args, 2)


@pytest.mark.parametrize("kind", LAYERS)
def test_lengths(kind, backend):
    layer = getattr(gk.nn, kind)(3, 5, backend=backend)
    good = torch.tensor([4, 2])
    layer(x(), lengths=good)
    with pytest.raises(ValueError, match="lengths.*PackedSequence"):
        layer(packed(), lengths=good)
    with pytest.raises(ValueError, match="lengths.*unbatched"):
        layer(x(4, 3), lengths=good)
    wrong = [[4], [[4, 2]], [5, 2], [4, -1]]
    for bad in (good.int(), good.float(), [4, 2], *map(torch.tensor, wrong)):
        error = error_of(lambda bad=bad: layer(x(), lengths=bad))
        assert isinstance(error, (TypeError, ValueError, RuntimeError)) and "lengths" in str(error), (bad, error)


def test_recurrent(backend):
    with pytest.raises(ValueError, match="lstm"):  # lists what there is
        gk.nn.Recurrent("elman", 3, 5)
    layer = gk.nn.Recurrent("lstm", 3, 5, backend=backend)
    with pytest.raises(ValueError, match="Recurrent: Expected input to be 2D or 3D, got 1D instead"):
        layer(x(3))
    with pytest.raises(RuntimeError, match="2 states, got 3"):
        layer(x(), (torch.zeros(1, 2, 5),) * 3)


def test_backend_unknown():
    with pytest.raises(ValueError, match="backend"):
        gk.nn.LSTM(3, 5, backend="quantum")(x())


def test_dropout_warning_is_torchs():
    with pytest.warns(UserWarning) as theirs:
        torch.nn.LSTM(3, 5, dropout=0.5)
    with pytest.warns(UserWarning) as ours:
        gk.nn.LSTM(3, 5, dropout=0.5)
    assert [str(w.message) for w in ours] == [str(w.message) for w in theirs]
