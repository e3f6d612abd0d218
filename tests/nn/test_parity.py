"""Random configurations against torch.nn: outputs, final states and every gradient, by name, under the tolerance rule.

The truth is torch's own layer in float64; what counts as close is the error of torch's own layer in the dtype under test.
Where torch has no such layer, a plain loop in torch operations takes its part. In float64, where torch would be its own truth,
with wild weights, which amplify a rounding without bound, and for tensors of a few numbers, which may be exact by luck, torch's
layer runs three times more with every weight and input moved by one rounding, and the largest of its errors counts.
"""

import contextlib
import copy
import pickle
import random
from dataclasses import dataclass, replace

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

import gradkernels as gk
from tests import place
from tests.close import assert_close_to_truth, error
from tests.nn.loop import Loop

SIZES = (1, 2, 3, 17, 63, 127)
DTYPES = {"fp32": torch.float32, "fp64": torch.float64, "bf16": torch.bfloat16, "fp16": torch.float16}
CELLS = ("lstm", "lstm", "gru", "gru", "rnn_tanh", "rnn_relu", "rnn_sigmoid", "gru_reset_before")
FORMS = ("padded", "padded", "unbatched", "sorted", "unsorted", "lengths", "lengths")


@dataclass(frozen=True)
class Case:
    seed: int
    cell: str
    form: str
    dtype: str
    T: int
    B: int
    I: int
    H: int
    layers: int
    bidirectional: bool
    proj: int
    bias: bool
    batch_first: bool
    hx: bool
    dropout: float
    gain: float  # of the weights: 1 as torch makes them, 4 saturates gates
    generic: bool  # nn.Recurrent

    def __str__(self):
        marks = [
            f"proj{self.proj}" * (self.proj > 0),
            "2way" * self.bidirectional,
            "nobias" * (not self.bias),
            "bfirst" * self.batch_first,
        ]
        marks += ["hx" * self.hx, "drop" * (self.dropout > 0), "wild" * (self.gain > 1), "generic" * self.generic]
        sizes = f"T{self.T}B{self.B}I{self.I}H{self.H}L{self.layers}"
        return "-".join([str(self.seed), self.cell, self.form, self.dtype, sizes, *filter(None, marks)])


def case(seed, largest=127, steps=63):
    r = random.Random(seed)
    cell, form = r.choice(CELLS), r.choice(FORMS)
    small = [n for n in SIZES if n <= largest]
    H, layers = r.choice(small), r.choice((1, 1, 2, 3))
    dtype = r.choice(("fp32", "fp32", "fp32", "fp64", "bf16", "fp16"))
    # 16-bit rounding of wild weights moves results by more than any kernel does
    gain = 4.0 if dtype in ("fp32", "fp64") and r.random() < 0.2 else 1.0
    # one mask for padded and packed rows there is not
    twin = cell not in ("rnn_sigmoid", "gru_reset_before")
    same_layout = form in ("padded", "unbatched") or (form != "lengths" and twin)
    return Case(
        seed,
        cell,
        form,
        dtype,
        # the loop is slow, and so is running torch four times
        T=r.choice(
            [t for t in (1, 2, 3, 17, 63) if t <= (steps if twin and H > 3 and dtype != "fp64" and gain == 1 else 17)]
        ),
        B=1 if form == "unbatched" else r.choice((1, 2, 3, 5, 17)),
        I=r.choice(small),
        H=H,
        layers=layers,
        bidirectional=r.random() < 0.4,
        proj=r.randint(1, H - 1) if cell == "lstm" and H > 1 and r.random() < 0.3 else 0,
        bias=r.random() < 0.8,
        batch_first=r.random() < 0.4,
        hx=r.random() < 0.5,
        dropout=0.4 if layers > 1 and same_layout and r.random() < 0.4 else 0.0,
        gain=gain,
        generic=cell in ("lstm", "gru_reset_before") and r.random() < 0.5,
    )


def build(c, backend):
    """Ours, and what to compare with."""
    sizes = {n: getattr(c, n) for n in ("bias", "batch_first", "dropout", "bidirectional")} | {"num_layers": c.layers}
    if c.proj:
        sizes["proj_size"] = c.proj
    if c.generic:
        ours = gk.nn.Recurrent(c.cell, c.I, c.H, **sizes, backend=backend)
    elif c.cell == "lstm":
        ours = gk.nn.LSTM(c.I, c.H, **sizes, backend=backend)
    elif c.cell.startswith("gru"):
        ours = gk.nn.GRU(c.I, c.H, **sizes, reset_after=c.cell == "gru", backend=backend)
    else:
        ours = gk.nn.RNN(c.I, c.H, nonlinearity=c.cell[4:], **sizes, backend=backend)
    with torch.no_grad():
        for name, p in ours.named_parameters():
            p.mul_(c.gain if "weight" in name else 1.0)
    if c.cell in ("rnn_sigmoid", "gru_reset_before"):
        return ours, Loop(ours)
    if c.cell.startswith("rnn"):
        theirs = nn.RNN(c.I, c.H, nonlinearity=c.cell[4:], **sizes)
    else:
        theirs = {"lstm": nn.LSTM, "gru": nn.GRU}[c.cell](c.I, c.H, **sizes)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    return ours, theirs


def run(c, layer, dtype, x, hx, lengths, cotangents):
    """Outputs padded [T, B, R], final states, and the gradient of everything."""
    x = x.detach().to(dtype).requires_grad_()
    hx = None if hx is None else [h.detach().to(dtype).requires_grad_() for h in hx]
    given = None if hx is None else tuple(hx) if len(hx) > 1 else hx[0]
    torch.manual_seed(c.seed)  # of dropout: the same mask everywhere
    plain = isinstance(layer, (gk.nn.RNNBase, Loop))
    if c.form in ("padded", "unbatched") and not (isinstance(layer, Loop) and c.form == "unbatched"):
        y, final = layer(x, given)
    elif isinstance(layer, Loop) or (c.form == "lengths" and plain):
        y, final = loop(c, layer, x, given, lengths)
    else:  # torch packs where ours takes lengths
        packed = pack_padded_sequence(x, lengths, c.batch_first, enforce_sorted=c.form == "sorted")
        y, final = layer(packed, given)
        assert isinstance(y, PackedSequence) and torch.equal(y.batch_sizes, packed.batch_sizes)
        y = pad_packed_sequence(y, c.batch_first, total_length=c.T)[0]
    final = final if isinstance(final, tuple) else (final,)
    outs = (y, *final)
    names = ["input", *(f"hx[{k}]" for k in range(len(hx or ()))), *(n for n, _ in layer.named_parameters())]
    leaves = [x, *(hx or ()), *layer.parameters()]
    got = torch.autograd.grad(outs, leaves, [g.to(dtype) for g in cotangents(outs)])
    return {"output": y, **{f"final[{k}]": h for k, h in enumerate(final)}, **{f"d {n}": g for n, g in zip(names, got)}}


def loop(c, layer, x, hx, lengths):
    """A layer that takes lengths; the loop has no unbatched form."""
    if c.form != "unbatched":
        return layer(x, hx, lengths)
    many = lambda h: h.unsqueeze(1)
    y, final = layer(x.unsqueeze(0 if c.batch_first else 1), None if hx is None else many(hx))
    return y.squeeze(0 if c.batch_first else 1), final.squeeze(1)


@contextlib.contextmanager
def one_thread():
    """For torch's own layers: their many small operations wait for other threads by spinning, seconds on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def nudged(v, generator):
    """Every element moved by one rounding, up, down or not at all."""
    return v + v * torch.finfo(v.dtype).eps * torch.randint(-1, 2, v.shape, generator=generator).to(v)


def check(c, backend):
    if place.device is not place.CPU:  # there cuDNN draws a mask of its own
        c = replace(c, dropout=0.0)
    dtype, directions = DTYPES[c.dtype], 1 + c.bidirectional
    if place.why_not(backend, place.device, dtype) is not None:
        return
    torch.manual_seed(c.seed)
    ours, theirs = build(c, backend)
    batch = () if c.form == "unbatched" else (c.B,)
    x = torch.randn(*batch, c.T, c.I) if c.batch_first else torch.randn(c.T, *batch, c.I)
    S = gk.cells.CELLS[c.cell].S
    widths = [c.proj or c.H, c.H][:S]
    hx = [torch.randn(c.layers * directions, *batch, w) for w in widths] if c.hx else None
    lengths = torch.randint(1, c.T + 1, (c.B,))
    lengths[torch.randint(c.B, ())] = c.T
    if c.form == "sorted":
        lengths = lengths.sort(descending=True)[0]
    if c.form in ("padded", "unbatched"):
        lengths = torch.full((c.B,), c.T)
    # everything is rounded to the dtype first: what is compared is arithmetic
    at = {"device": place.device, "dtype": dtype}
    x, hx = x.to(**at), None if hx is None else [h.to(**at) for h in hx]
    ours, theirs = ours.to(**at), theirs.to(**at)
    noise = torch.Generator().manual_seed(c.seed)
    drawn = []

    def cotangents(outs):
        if not drawn:
            drawn.extend(torch.randn(v.shape, generator=noise).to(**at) for v in outs)
        return drawn

    got = run(c, ours, dtype, x, hx, lengths, cotangents)
    assert gk.backends.last() == backend
    with one_thread():
        same = run(c, theirs, dtype, x, hx, lengths, cotangents)
        truth = run(c, copy.deepcopy(theirs).double(), torch.double, x, hx, lengths, cotangents)
        few = c.H <= 3 and c.dtype == "fp32"
        for _ in range(3 if c.dtype == "fp64" or c.gain > 1 or few else 0):
            moved = copy.deepcopy(theirs)
            with torch.no_grad():
                for p in moved.parameters():
                    p.copy_(nudged(p, noise))
            other = run(c, moved, dtype, nudged(x, noise), hx and [nudged(h, noise) for h in hx], lengths, cotangents)
            same = {n: max(v, other[n], key=lambda u, t=truth[n]: error(u, t)) for n, v in same.items()}
    assert_close_to_truth(got, same, truth, name=f"{c} ")


@pytest.mark.parametrize("block", range(15))
def test_layers(block, backend):
    """Twenty configurations of the three hundred; fewer where each compiles kernels or where steps are slow, and smaller ones
    on the reference. Every one that fails is named."""
    failed = []
    for seed in range(20 * block, 20 * block + 20, 1 if backend == "cpu" else 7):
        c = case(seed, 17, 17) if backend == "reference" else case(seed)
        try:
            check(c, backend)
        except Exception as e:  # noqa: BLE001 - all are reported, with their configuration
            failed.append(f"{c}: {e if isinstance(e, AssertionError) else repr(e)}")
    assert not failed, "\n".join(failed)


# ---------------------------------------------------------------- single steps


def step_case(seed):
    r = random.Random(seed)
    return {
        "kind": r.choice(("LSTMCell", "GRUCell", "RNNCell")),
        "dtype": r.choice(("fp32", "fp64", "bf16", "fp16")),
        "batch": r.choice((None, 1, 2, 17)),
        "sizes": (r.choice(SIZES), r.choice(SIZES)),
        "bias": r.random() < 0.7,
        "hx": r.random() < 0.7,
        "relu": r.random() < 0.5,
    }


def check_step(seed, backend):
    c = step_case(seed)
    torch.manual_seed(seed)
    extra = {"nonlinearity": "relu"} if c["kind"] == "RNNCell" and c["relu"] else {}
    dtype = DTYPES[c["dtype"]]
    if place.why_not(backend, place.device, dtype) is not None:
        return
    theirs = getattr(nn, c["kind"])(*c["sizes"], bias=c["bias"], **extra).to(place.device)
    ours = getattr(gk.nn, c["kind"])(*c["sizes"], bias=c["bias"], **extra, backend=backend).to(place.device)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    lead = () if c["batch"] is None else (c["batch"],)
    x = place.randn(*lead, c["sizes"][0]).to(dtype)
    S = 2 if c["kind"] == "LSTMCell" else 1
    hx = [place.randn(*lead, c["sizes"][1]).to(dtype) for _ in range(S)] if c["hx"] else []
    cotangents = [place.randn(*lead, c["sizes"][1]).to(dtype) for _ in range(S)]

    def go(cell, dtype):
        cell = cell.to(dtype)
        leaves = [v.to(dtype).detach().requires_grad_() for v in (x, *hx)]
        given = None if not hx else tuple(leaves[1:]) if S == 2 else leaves[1]
        out = cell(leaves[0], given)
        out = out if S == 2 else (out,)
        leaves += cell.parameters()
        return [*out, *torch.autograd.grad(out, leaves, [g.to(dtype) for g in cotangents])]

    got = go(ours, dtype)
    assert gk.backends.last() == backend
    with one_thread():
        assert_close_to_truth(got, go(theirs, dtype), go(theirs, torch.double), name=f"{seed} {c} ")


@pytest.mark.parametrize("block", range(4))
def test_cells(block, backend):
    failed = []
    for seed in range(15 * block, 15 * block + 15):
        try:
            check_step(seed, backend)
        except Exception as e:  # noqa: BLE001 - all are reported, with their configuration
            failed.append(f"{seed} {step_case(seed)}: {e if isinstance(e, AssertionError) else repr(e)}")
    assert not failed, "\n".join(failed)


@pytest.mark.parametrize("kind, reset_after", (("LSTM", True), ("GRU", True), ("GRU", False), ("RNN", True)))
def test_cell_steps_are_the_layer(kind, reset_after, backend):
    extra = {} if reset_after else {"reset_after": False}
    layer = getattr(gk.nn, kind)(3, 5, **extra, backend=backend).to(place.device)
    cell = getattr(gk.nn, kind + "Cell")(3, 5, **extra, backend=backend).to(place.device)
    cell.load_state_dict({n.removesuffix("_l0"): p for n, p in layer.state_dict().items()}, strict=True)
    x, state = place.randn(6, 4, 3), None
    for v in x:
        state = cell(v, state)
    final = layer(x)[1]
    if kind == "LSTM":
        state, final = torch.stack(state), torch.stack(final)[:, 0]
    torch.testing.assert_close(state, final if kind == "LSTM" else final[0])


def test_state_dict_goes_both_ways():
    for kind, extra in (("LSTM", {"proj_size": 2}), ("GRU", {}), ("RNN", {"nonlinearity": "relu"})):
        for bias in (True, False):
            sizes = dict(num_layers=2, bidirectional=True, bias=bias, **extra)
            theirs, ours = getattr(nn, kind)(3, 5, **sizes), getattr(gk.nn, kind)(3, 5, **sizes)
            ours.load_state_dict(theirs.state_dict(), strict=True)
            theirs.load_state_dict(ours.state_dict(), strict=True)
            assert list(ours.state_dict()) == list(theirs.state_dict()) == [n for n, _ in ours.named_parameters()]
    generic = gk.nn.Recurrent("lstm", 3, 5, 2, bidirectional=True, proj_size=2)
    generic.load_state_dict(nn.LSTM(3, 5, 2, bidirectional=True, proj_size=2).state_dict(), strict=True)


def test_a_cell_of_ones_own():
    """Two gates, a Cell that is in no registry."""

    def leaky(x, r, s):
        z = sigmoid(x[0] + r[0])  # noqa: F821
        return s[0] + z * (tanh(x[1] + r[1]) - s[0])  # noqa: F821

    cell = gk.cells.cell(leaky)
    layer = gk.nn.Recurrent(cell, 3, 5, num_layers=2, bidirectional=True, dtype=torch.double, backend="reference")
    assert layer.weight_ih_l1_reverse.shape == (10, 10) and layer.bias_hh_l0.shape == (10,)
    x = torch.randn(4, 2, 3, dtype=torch.double, requires_grad=True)
    y = layer(x)[0]
    assert torch.autograd.gradcheck(lambda v: layer(v)[0], x)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other(x)[0], y)
    with pytest.raises(ValueError, match="proj_size needs a cell that uses h in its recurrent product only, not leaky"):
        gk.nn.Recurrent(cell, 3, 5, proj_size=2)
