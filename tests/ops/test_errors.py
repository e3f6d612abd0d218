"""Wrong calls: the exception, its text, and that nothing has run. The operators called directly refuse the same."""

import re

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import gradkernels as gk
from gradkernels import backends

pytestmark = pytest.mark.cpu  # checks are of Python, and the same everywhere
FORWARD = torch.ops.gradkernels.recurrent_forward.default
BACKWARD = torch.ops.gradkernels.recurrent_backward.default
Z = torch.zeros


def right(cell="lstm", packed=False, **changes):
    """Arguments of a call that works, T=4 B=3 I=5 H=6, with changes."""
    G, S = {"lstm": (4, 2), "gru": (3, 1)}[cell]
    args = {"x": Z(9, 5) if packed else Z(4, 3, 5), "weight_hh": Z(G * 6, 6), "state": [Z(3, 6) for _ in range(S)]}
    args |= {"weight_ih": Z(G * 6, 5), "bias_ih": Z(G * 6), "bias_hh": Z(G * 6), "cell": cell}
    if packed:
        args["batch_sizes"] = torch.tensor([3, 3, 2, 1])
    return args | changes


LONG = torch.int64
# name: (changes, exception, text)
SHAPES = {
    "x of rank 2": ({"x": Z(4, 5)}, RuntimeError, r"x must have 3 dimensions \[T, B, I\], got 2: \[4, 5\]"),
    "x of rank 4": ({"x": Z(1, 4, 3, 5)}, RuntimeError, r"3 dimensions .* got 4"),
    "packed x of rank 3": ({"packed": True, "x": Z(3, 3, 5)}, RuntimeError, r"x must have 2 dimensions \[N, I\]"),
    "feature size": ({"x": Z(4, 3, 7)}, RuntimeError, r"Expected 5, got 7: x \[4, 3, 7\], weight_ih \[24, 5\]"),
    "gates of another width": ({"weight_ih": None, "bias_ih": None}, RuntimeError, r"Expected 24, got \[4, 3, 5\]"),
    "bias_ih without weight_ih": ({"weight_ih": None, "x": Z(4, 3, 24)}, ValueError, r"bias_ih needs weight_ih"),
    "weight_ih rows": ({"weight_ih": Z(18, 5)}, RuntimeError, r"weight_ih must have shape \[24, 'I'\].*got \[18, 5\]"),
    "weight_ih of rank 1": ({"weight_ih": Z(24)}, RuntimeError, r"weight_ih must have shape"),
    "weight_hh of rank 3": ({"weight_hh": Z(1, 24, 6)}, RuntimeError, r"weight_hh must have shape"),
    "weight_hh not gates": (
        {"weight_hh": Z(22, 6)},
        RuntimeError,
        r"weight_hh must have shape .* for lstm, got \[22, 6\]",
    ),
    "weight_hh columns": ({"weight_hh": Z(24, 5)}, RuntimeError, r"weight_hh must have shape \[24, 6\].*got \[24, 5\]"),
    "bias_ih": ({"bias_ih": Z(6)}, RuntimeError, r"bias_ih must have shape \[24\].*got \[6\]"),
    "bias_hh": ({"bias_hh": Z(24, 1)}, RuntimeError, r"bias_hh must have shape \[24\].*got \[24, 1\]"),
    "weight_hr": ({"weight_hr": Z(3, 6)}, RuntimeError, r"weight_hr must have shape \[6, 6\].*got \[3, 6\]"),
    "a projected GRU": ({"cell": "gru", "weight_hr": Z(6, 6)}, ValueError, r"cell gru cannot have weight_hr"),
    "zero hidden size": (
        {"weight_hh": Z(0, 0), "weight_ih": Z(0, 5), "bias_ih": Z(0), "bias_hh": Z(0)},
        ValueError,
        "hidden_size must be greater than zero",
    ),
    "zero columns": ({"weight_hh": Z(24, 0)}, ValueError, "hidden_size must be greater than zero"),
    "zero input size": ({"x": Z(4, 3, 0), "weight_ih": Z(24, 0)}, ValueError, "input_size must be greater than zero"),
    "too few states": ({"state": [Z(3, 6)]}, ValueError, "lstm has 2 states, got 1"),
    "too many states": ({"cell": "gru", "state": [Z(3, 6), Z(3, 6)]}, ValueError, "gru has 1 states, got 2"),
    "batch of a state": (
        {"state": [Z(4, 6), Z(4, 6)]},
        RuntimeError,
        r"state\[0\] must have shape \[3, 6\].*got \[4, 6\]",
    ),
    "width of a state": (
        {"state": [Z(3, 6), Z(3, 5)]},
        RuntimeError,
        r"state\[1\] must have shape \[3, 6\].*got \[3, 5\]",
    ),
    "rank of a state": ({"state": [Z(1, 3, 6), Z(1, 3, 6)]}, RuntimeError, r"state\[0\] must have shape"),
    "states of two sizes": (
        {"packed": True, "state": [Z(3, 6), Z(4, 6)]},
        RuntimeError,
        r"state\[1\] must have shape \[3, 6\]",
    ),
    "dtype of x": (
        {"x": Z(4, 3, 5, dtype=torch.double)},
        ValueError,
        r"x dtype \(torch.float64\) does not match weight_ih",
    ),
    "dtype of a weight": ({"weight_hh": Z(24, 6, dtype=torch.half)}, ValueError, r"does not match weight_hh dtype"),
    "dtype of a state": ({"state": [Z(3, 6), Z(3, 6).double()]}, ValueError, r"does not match state\[1\] dtype"),
    "integer x": ({"x": Z(4, 3, 5, dtype=LONG)}, TypeError, r"x must be float32.*got torch.int64"),
    "complex x": ({"x": Z(4, 3, 5, dtype=torch.cfloat)}, TypeError, r"x must be float32.*got torch.complex64"),
    "bool state": ({"state": [Z(3, 6).bool(), Z(3, 6)]}, ValueError, r"state\[0\] dtype \(torch.bool\)"),
    "device of a weight": ({"weight_hh": Z(24, 6, device="meta")}, RuntimeError, r"same device.*weight_hh is on meta"),
    "device of a state": (
        {"state": [Z(3, 6), Z(3, 6, device="meta")]},
        RuntimeError,
        r"same device.*state\[1\] is on meta",
    ),
    "both": ({"packed": True, "lengths": Z(3, dtype=LONG)}, ValueError, "give one of them"),
    "int32 lengths": ({"lengths": Z(3, dtype=torch.int32)}, TypeError, "lengths must be int64, got torch.int32"),
    "number of lengths": ({"lengths": Z(4, dtype=LONG)}, RuntimeError, r"lengths must have shape \[3\].*got \[4\]"),
    "rank of lengths": ({"lengths": Z(3, 1, dtype=LONG)}, RuntimeError, r"lengths must have shape \[3\]"),
    "int32 batch_sizes": (
        {"packed": True, "batch_sizes": Z(4, dtype=torch.int32)},
        TypeError,
        "batch_sizes must be int64",
    ),
    "rank of batch_sizes": (
        {"packed": True, "batch_sizes": Z(2, 2, dtype=LONG)},
        RuntimeError,
        "batch_sizes must have shape",
    ),
}
VALUES = {
    "negative length": ({"lengths": torch.tensor([4, -1, 2])}, r"lengths must be from 0 to T = 4, got -1"),
    "length beyond T": ({"lengths": torch.tensor([4, 5, 2])}, r"lengths must be from 0 to T = 4, got 5"),
    "huge length": ({"lengths": torch.tensor([4, 2**62, 2])}, r"lengths must be from 0 to T"),
    "sum of batch_sizes": (
        {"packed": True, "batch_sizes": torch.tensor([3, 3, 2, 2])},
        "must add up.*Expected 9, got 10",
    ),
    "batch_sizes increase": ({"packed": True, "batch_sizes": torch.tensor([3, 2, 3, 1])}, "must not increase"),
    "batch_sizes beyond B": (
        {"packed": True, "batch_sizes": torch.tensor([4, 3, 1, 1])},
        "from 0 to the rows of state, 3, got 4",
    ),
    "negative batch_sizes": ({"packed": True, "batch_sizes": torch.tensor([3, 3, 3, 3, -3])}, "from 0 to .*got -3"),
    "overflowing batch_sizes": (
        {"packed": True, "batch_sizes": torch.tensor([2**62, 2**62, 2**62, 2**62 + 9])},
        "must add up|from 0 to",
    ),
    "no batch_sizes": ({"packed": True, "batch_sizes": Z(0, dtype=LONG)}, "must add up.*Expected 9, got 0"),
}


@pytest.fixture(autouse=True)
def nothing_runs():
    backends._thread.last = None
    yield
    assert backends.last() is None


def refused(call, exception, text):
    with pytest.raises(exception) as caught:
        call()
    assert type(caught.value) is exception, repr(caught.value)
    assert re.search(text, str(caught.value)), str(caught.value)


@pytest.mark.parametrize("grad", (False, True), ids=("no grad", "grad"))
@pytest.mark.parametrize("name", SHAPES)
def test_shapes_dtypes_devices(name, grad, backend):
    changes, exception, text = SHAPES[name]
    args = right(**changes)
    if grad and args["weight_ih"] is not None:
        args["weight_ih"].requires_grad_()
    refused(lambda: gk.ops.recurrent(**args, backend=backend), exception, text)


def direct(args, keep=2, backend=None):
    names = ("x", "weight_ih", "bias_ih", "weight_hh", "bias_hh", "weight_hr", "state", "batch_sizes", "lengths")
    return args["cell"], *(args.get(k) for k in names), False, keep, backend


@pytest.mark.parametrize("name", SHAPES)
def test_operator_called_directly(name, backend):
    changes, exception, text = SHAPES[name]
    refused(lambda: FORWARD(*direct(right(**changes), backend=backend)), exception, text)


@pytest.mark.parametrize("way", ("entry", "entry with grad", "operator", "every mode"))
@pytest.mark.parametrize("name", VALUES)
def test_values_of_lengths_and_batch_sizes(name, way, backend):
    changes, text = VALUES[name]
    args = right(**changes)
    if way == "entry with grad":
        args["weight_hh"].requires_grad_()
    if way == "operator":
        refused(lambda: FORWARD(*direct(args, backend=backend)), RuntimeError, text)
    elif way == "every mode":
        with FlopCounterMode(display=False):
            refused(lambda: gk.ops.recurrent(**args, backend=backend), RuntimeError, text)
    else:
        refused(lambda: gk.ops.recurrent(**args, backend=backend), RuntimeError, text)


def test_batch_sizes_when_states_are_made(backend):
    args = right(packed=True, state=None, batch_sizes=torch.tensor([-3, 12]))
    refused(lambda: gk.ops.recurrent(**args, backend=backend), RuntimeError, "negative")
    args = right(packed=True, state=None, batch_sizes=torch.tensor([2, 3, 4]))
    refused(lambda: gk.ops.recurrent(**args, backend=backend), RuntimeError, "from 0 to|increase")


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"x": [[1.0]]}, "x must be a tensor, got list"),
        ({"weight_hh": None}, "weight_hh must be a tensor, got NoneType"),
        ({"state": [None, None]}, r"state\[0\] must be a tensor, got NoneType"),
        ({"lengths": [1, 2, 3]}, "lengths must be a tensor, got list"),
        ({"bias_hh": 0.0}, "bias_hh must be a tensor, got float"),
    ],
    ids=lambda v: next(iter(v)) if isinstance(v, dict) else None,
)
def test_what_is_no_tensor(changes, text, backend):
    refused(lambda: gk.ops.recurrent(**right(**changes), backend=backend), TypeError, text)


@pytest.mark.parametrize("way", ("sparse", "mkldnn"))
@pytest.mark.parametrize("name", ("x", "weight_hh"))
def test_other_layouts(name, way, backend):
    args = right()
    args[name] = args[name].to_sparse() if way == "sparse" else args[name].to_mkldnn()
    refused(lambda: gk.ops.recurrent(**args, backend=backend), TypeError, "dense tensors, got layout")


def test_unknown_names(backend):
    refused(lambda: gk.ops.recurrent(**right() | {"cell": "lstn"}), ValueError, "unknown cell 'lstn'.*lstm, gru")
    refused(
        lambda: gk.ops.recurrent(**right(), backend="gpu"),
        ValueError,
        "unknown backend 'gpu'; there are reference, cpu",
    )
    refused(lambda: FORWARD("lstn", *direct(right())[1:]), ValueError, "unknown cell 'lstn'")
    refused(lambda: FORWARD(*direct(right(), keep=3)), ValueError, "keep must be 0, 1 or 2")
    refused(lambda: gk.ops.recurrent(**right(params=Z(3, 6))), ValueError, "takes 0 parameters per unit")


@pytest.mark.parametrize("shape", [(4,), (4, 2), (1, 4, 3)], ids=str)
def test_probe(shape, backend):
    call = lambda p: lambda: gk.ops.recurrent(**right(), probe=p, backend=backend)
    refused(call(Z(shape, dtype=torch.double)), ValueError, r"probe must be float64 \[steps, 3\] for lstm")
    refused(call(Z(4, 3)), ValueError, "probe must be float64.*got torch.float32")


def backward_args(**changes):
    """Arguments of a backward call that works."""
    args = right()
    names = {"cell": "lstm", "grads": [Z(4, 3, 6), None, None, None], "x": args["x"], "weight_ih": args["weight_ih"]}
    names |= {"weight_hh": args["weight_hh"], "weight_hr": None, "saved": [Z(4, 3, 6), Z(4, 3, 6), Z(12, 4, 6)]}
    names |= {"state": args["state"], "batch_sizes": None, "lengths": None, "reverse": False}
    names |= {"need": [True] * 5 + [False], "gates": False, "norms": False}
    return names | changes


BACKWARD_CHANGES = {
    "number of gradients": ({"grads": [None] * 3}, ValueError, "grads must be 4 for lstm, got 3"),
    "shape of a gradient": ({"grads": [Z(4, 3, 5), None, None, None]}, RuntimeError, r"grads\[0\] must have shape"),
    "shape of a final gradient": ({"grads": [None, None, Z(1, 6), None]}, RuntimeError, r"grads\[2\] must have shape"),
    "dtype of a gradient": ({"grads": [Z(4, 3, 6).half(), None, None, None]}, ValueError, r"grads\[0\] dtype"),
    "number saved": ({"saved": [Z(4, 3, 6)] * 2}, ValueError, "saved must be 3 tensors"),
    "shape of a sequence": (
        {"saved": [Z(4, 3, 6), Z(4, 2, 6), Z(12, 4, 6)]},
        RuntimeError,
        r"saved\[1\] must have shape",
    ),
    "shape of acts": ({"saved": [Z(4, 3, 6), Z(4, 3, 6), Z(12, 3, 6)]}, RuntimeError, r"saved\[2\] must have shape"),
    "dtype of acts": ({"saved": [Z(4, 3, 6), Z(4, 3, 6), Z(12, 4, 6).double()]}, ValueError, r"saved\[2\] dtype"),
    "number of flags": ({"need": [True] * 5}, ValueError, "need must be seven flags"),
    "a gradient of nothing": ({"need": [True] * 6 + [False]}, ValueError, "gradient of a tensor that is not there"),
    "a gradient of no params": (
        {"need": [True] * 5 + [False, True]},
        ValueError,
        "gradient of a tensor that is not there",
    ),
    "state": ({"state": [Z(2, 6), Z(3, 6)]}, RuntimeError, r"state\[0\] must have shape"),
    "lengths": ({"lengths": torch.tensor([5, 0, 0])}, RuntimeError, "lengths must be from 0 to T = 4, got 5"),
}


@pytest.mark.parametrize("name", BACKWARD_CHANGES)
def test_backward_operator(name, backend):
    changes, exception, text = BACKWARD_CHANGES[name]
    refused(lambda: BACKWARD(*backward_args(**changes).values(), backend), exception, text)


def test_second_derivative_of_a_changed_lengths_tensor(backend):
    """Autograd notices that lengths were changed between forward and backward."""
    lengths, args = torch.tensor([4, 2, 1]), right()
    args["weight_hh"].requires_grad_()
    y, _ = gk.ops.recurrent(**args, lengths=lengths, backend=backend)
    lengths.fill_(100)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
    backends._thread.last = None
