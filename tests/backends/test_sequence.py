"""What surrounds the walk of a GPU backend, on the CPU, around the walk that `_unroll` defines: against the reference."""

import contextlib
import threading
from types import ModuleType

import pytest
import torch

import gradkernels as gk
from gradkernels import backends
from gradkernels.backends import _sequence, _unroll, reference
from tests.close import assert_close_to_truth
from tests.ops.case import GATES, SMALL, Case, cotangents, gradients
from tests.ops.walk import Walk


def tokens(steps):
    """Tokens and columns of each step, in the order of its rows."""
    rows = [steps.B] * steps.T if steps.rows is None else steps.rows.tolist()
    first = [t * steps.B for t in range(steps.T)] if steps.first is None else steps.first.tolist()
    order = list(range(steps.B)) if steps.order is None else steps.order.tolist()
    return [[f + order[b] for b in range(n)] for f, n in zip(first, rows)], order


def packed(steps):
    """Index of all tokens in packed order, steps as `_unroll` has them, order of the columns."""
    each, order = tokens(steps)
    index, begin = [n for step in each for n in step], [sum(map(len, each[:t])) for t in range(steps.T)]
    return torch.tensor(index, dtype=torch.long), [(o, len(step)) for o, step in zip(begin, each)], torch.tensor(order)


def extras(cell, extra, steps, index, H):
    """What `_unroll` takes last: params, masks of the rows in packed order, skip."""
    each, order = tokens(steps)
    column = torch.tensor([b for step in each for b in order[: len(step)]], dtype=torch.long)
    params = None if extra.params is None else extra.params.double()
    return params, reference.masks(cell, extra, index, column, H, torch.double), extra.skip


def fill(out, v, index):
    """Rows of what was allocated; what no step visits stays as it was."""
    if out is not None:
        assert out.is_contiguous() and out.shape[1:] == v.shape[1:]
        out[index] = v.to(out.dtype)


def walk_forward(cell, gates, w_hh, b_hh, w_hr, state, steps, seq, final, raw, acts, extra):
    index, where, order = packed(steps)
    wide = lambda v: None if v is None else v.double()
    got = _unroll.unroll(
        cell, gates.double()[index], *map(wide, (w_hh, b_hh, w_hr)), [wide(v)[order] for v in state], where, steps.reverse,
        *extras(cell, extra, steps, index, w_hh.shape[0] // cell.G),
    )  # fmt: skip
    for out, v in zip((*seq, raw, acts), (*got[0], *got[2:])):
        fill(out, v, index)
    for out, v in zip(final, got[1]):
        fill(out, v, order)


def walk_backward(
    cell, grads, w_hh, w_hr, seq, raw, acts, state, steps, dgates, dr, operand, dproj, dstate, norms, dparams, extra
):
    index, where, order = packed(steps)
    rows = lambda v: None if v is None else v.double()[index]
    batch = lambda v: None if v is None else v.double()[order]
    S = cell.S
    grads = [*map(rows, grads[:S]), *map(batch, grads[S:])]
    weights = w_hh.double(), None if w_hr is None else w_hr.double()
    *parts, ds, size = _unroll.unroll_backward(
        cell, grads, *weights, [*map(rows, seq)], rows(raw), rows(acts), [*map(batch, state)], where, steps.reverse, norms is not None,
        *extras(cell, extra, steps, index, acts.shape[2]), extra.clip,
    )  # fmt: skip
    assert (dr is dgates) == (not cell.split)
    for out, v in zip((dgates, dr, operand, dproj, dparams), parts):
        fill(out, v, index)
    for out, v in zip(dstate, ds):
        fill(out, v, order)
    if norms is not None:
        assert (norms == 0).all()
        norms.copy_(size[:, :S])


@pytest.fixture(autouse=True)
def unrolled(monkeypatch):
    """A backend of that name."""
    module = ModuleType("gradkernels.backends.unrolled")
    module.why_not, module.CLIPS = lambda *_: None, True
    module.forward = lambda *args: _sequence.forward(walk_forward, *args)
    module.backward = lambda *args: _sequence.backward(walk_backward, *args)
    monkeypatch.setattr(backends, "NAMES", (*backends.NAMES, "unrolled"))
    monkeypatch.setattr(backends, "_chosen", {})
    load = backends.load
    monkeypatch.setattr(backends, "load", lambda name: module if name == "unrolled" else load(name))


def check(case, dtype, **options):
    low = case.tensors(dtype)
    high = {k: v.detach().double().requires_grad_() for k, v in low.items()}
    random = cotangents(case.loop()(*high.values()))
    truth = gradients(case.call("reference", **options), high, random)
    theirs = gradients(case.loop(), {k: v.detach().requires_grad_() for k, v in low.items()}, random)
    ours = gradients(case.call("unrolled", **options), low, random)
    assert backends.last() == "unrolled"
    assert_close_to_truth(ours, theirs, truth, name=str(case))


LAYOUTS = [
    Case(cell, T=6, B=5, I=3, H=7, layout=layout, reverse=reverse)
    for cell in GATES
    for layout in ("dense", "packed", "lengths")
    for reverse in (False, True)
]
LAYOUTS += [
    Case("lstm", R=2, layout=layout, reverse=reverse, bias=bias)
    for layout, reverse, bias in (("dense", False, True), ("packed", True, False), ("lengths", True, True))
]
LAYOUTS += [Case(cell, gates=True, layout="lengths", reverse=True) for cell in GATES]
LAYOUTS += [Case("gru", T=1, B=1, I=1, H=1, layout=layout) for layout in ("dense", "packed", "lengths")]


@pytest.mark.parametrize("dtype", (torch.float64, torch.float32, torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("case", LAYOUTS, ids=str)
def test_outputs_and_gradients(case, dtype):
    check(case, dtype)


@pytest.mark.parametrize("reverse", (False, True), ids=("", "reverse"))
@pytest.mark.parametrize("sizes", [[3, 2, 1], [3, 1, 0], [0, 0], [5, 5]], ids=str)
@pytest.mark.parametrize("cell", ("lstm", "gru_reset_before"))
def test_packed_steps_need_not_reach_every_row(cell, sizes, reverse):
    case = Case(cell, T=len(sizes), B=5, reverse=reverse)
    t = {**case.tensors(), "x": torch.randn(sum(sizes), 4, dtype=torch.double, requires_grad=True)}
    probes = [torch.zeros(len(sizes), len(t) - 4, dtype=torch.double, requires_grad=True) for _ in range(2)]
    f, g = (case.call(n, batch_sizes=torch.tensor(sizes), probe=p) for n, p in zip(("unrolled", "reference"), probes))
    random = cotangents(f(*t.values()))
    named = [{**t, "probe": p} for p in probes]
    ours, want = (gradients(lambda *v, f=f: f(*v[:-1]), n, random) for f, n in zip((f, g), named))
    assert_close_to_truth(ours, want, want)


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_norms_and_missing_gradients(case):
    """The op itself: every part that can be asked for, with some of the gradients missing."""
    cell, t = gk.cells.get(case.cell), case.tensors(requires_grad=False)
    x, w_ih, b_ih, w_hh, b_hh, w_hr = (
        t.get(k) for k in ("x", "weight_ih", "bias_ih", "weight_hh", "bias_hh", "weight_hr")
    )
    state = [t[k] for k in case.names if k.startswith("state")]
    steps = case.batch_sizes if case.layout == "packed" else None, case.lengths if case.layout == "lengths" else None
    S = cell.S
    for keep in (0, 1, 2):
        args = cell, x, w_ih, b_ih, w_hh, b_hh, w_hr, state, *steps, case.reverse, keep
        out, want = (backends.load(n).forward(*args) for n in ("unrolled", "reference"))
        assert_close_to_truth(out, want, want)
    kept, every = want[:S] + want[2 * S :], [v is not None for v in (x, w_ih, b_ih, w_hh, b_hh, w_hr, None)]
    for missing in range(2 * S + 1):
        grads = [None if k in (missing, 2 * S - missing) else torch.randn_like(v) for k, v in enumerate(want[: 2 * S])]
        for need in (every, [False] * 7, [True, *[False] * 6], [False, *every[1:]]):
            for gates in (False, True):
                args = cell, grads, x, w_ih, w_hh, w_hr, kept, state, *steps, case.reverse, need, gates, True
                got, expected = (backends.load(n).backward(*args) for n in ("unrolled", "reference"))
                assert_close_to_truth(got, expected, expected)


@pytest.mark.parametrize("shape", [(0, 3), (4, 0), (0, 0)], ids=str)
@pytest.mark.parametrize("cell", ("lstm", "gru"))
def test_nothing(cell, shape):
    case = Case(cell, T=shape[0], B=shape[1])
    t, probe = case.tensors(), torch.zeros(shape[0], 3 if cell == "lstm" else 2, dtype=torch.double, requires_grad=True)
    f = case.call("unrolled", probe=probe)
    out, grads = gradients(lambda *v: f(*v[:-1]), {**t, "probe": probe}, random := cotangents(f(*t.values())))
    S = len(out) // 2
    assert all(torch.equal(v, t[f"state[{k}]"]) for k, v in enumerate(out[S:]))
    assert all(torch.equal(grads[f"state[{k}]"], random[S + k]) for k in range(S))
    assert all(
        (g == 0).all() and g.shape == t[k].shape for k, g in grads.items() if not k.startswith(("state", "probe"))
    )


@pytest.mark.parametrize("reverse", (False, True), ids=("", "reverse"))
@pytest.mark.parametrize("cell", GATES)
def test_what_lies_beyond_a_row_does_not_matter(cell, reverse):
    """Neither what x holds there, nor the state of a row without a step."""
    case = Case(cell, T=6, B=4, layout="lengths", reverse=reverse)
    assert 0 in case.lengths
    t = case.tensors()
    x = t["x"].detach().clone()
    x[torch.arange(6).unsqueeze(1) >= case.lengths] = torch.nan
    bad = {**t, "x": x.requires_grad_()}
    for k in case.names:
        if k.startswith("state"):
            bad[k] = t[k].detach().masked_fill((case.lengths == 0).unsqueeze(1), torch.inf).requires_grad_()
    random = cotangents(case.call("unrolled")(*t.values()))
    good, other = (gradients(case.call("unrolled"), v, random) for v in (t, bad))
    S = len(good[0]) // 2
    assert all(map(torch.equal, good[0][:S], other[0][:S])) and all(torch.equal(good[1][k], other[1][k]) for k in t)


def test_an_infinite_last_state_stays_out_of_the_weights():
    """Nothing follows it, so no product is taken of it."""
    lengths, x = torch.tensor([2, 4]), torch.ones(4, 2, 1)
    x[1, 0] = torch.inf
    w_ih, w_hh = torch.ones(1, 1, requires_grad=True), torch.ones(1, 1, requires_grad=True)
    y, _ = gk.ops.recurrent(x, w_hh, weight_ih=w_ih, cell="rnn_relu", lengths=lengths, backend="unrolled")
    y[:, 1].sum().backward()
    assert y[1, 0] == torch.inf and w_hh.grad.isfinite().all()


def test_lengths_of_a_device_are_clamped():
    """There nobody looks at them: beyond the batch is its end."""
    x = torch.zeros(3, 4, 1)
    steps = _sequence.Steps.of(x, 4, None, torch.tensor([-2, 7, 0, 2]), False)
    assert steps.rows.tolist() == [2, 2, 1] and steps.order[:2].tolist() == [1, 3]


class Never(torch.utils._python_dispatch.TorchDispatchMode):
    """Refuses what reads from the device: `.item()`, sizes that depend on values, copies to the CPU."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert torch.Tag.data_dependent_output not in func.tags, func
        by_numbers = func is torch.ops.aten.index.Tensor and all(i is None or i.dtype != torch.bool for i in args[1])
        assert by_numbers or torch.Tag.dynamic_output_shape not in func.tags, func
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("reverse", (False, True), ids=("", "reverse"))
@pytest.mark.parametrize("layout", ("dense", "packed", "lengths"))
def test_nothing_is_read_back(layout, reverse):
    case, cell = Case("lstm", layout=layout, reverse=reverse, R=2), gk.cells.get("lstm")
    t = case.tensors(torch.float32, requires_grad=False)
    x, state = t["x"], [t["state[0]"], t["state[1]"]]
    w_ih, b_ih, w_hh, b_hh, w_hr = (t[k] for k in ("weight_ih", "bias_ih", "weight_hh", "bias_hh", "weight_hr"))
    steps = case.batch_sizes if layout == "packed" else None, case.lengths if layout == "lengths" else None
    nothing = lambda *_: None
    with Never():
        out = _sequence.forward(nothing, cell, x, w_ih, b_ih, w_hh, b_hh, w_hr, state, *steps, reverse, 2)
        seq, final, kept = out[:2], out[2:4], out[4:]
        _sequence.backward(
            nothing, cell, [*seq, *final], x, w_ih, w_hh, w_hr, [*seq, *kept], state, *steps, reverse, [*[True] * 6, False], False, True
        )  # fmt: skip
    for read in (torch.nonzero, lambda v: v[v > 0], lambda v: float(v.sum())):
        with pytest.raises(AssertionError, match="nonzero|index|_local_scalar_dense"), Never():
            read(x)


@pytest.fixture
def precision():
    """torch's settings as they were."""
    get, put = torch._C._get_fp32_precision_getter, torch._C._set_fp32_precision_setter
    old = {k: get(*k) for k in (("generic", "all"), ("cuda", "all"), ("cuda", "rnn"), ("cuda", "matmul"))}
    yield get, put
    for k, v in old.items():
        put(*k, v)


def test_tf32_is_what_cudnn_allows(precision):
    for allowed in (True, False):
        with torch.backends.cudnn.flags(allow_tf32=allowed):
            assert _sequence.tf32() is allowed
    torch.backends.cudnn.rnn.fp32_precision = "ieee"
    assert not _sequence.tf32()


@pytest.mark.parametrize("rnn", ("tf32", "ieee"))
@pytest.mark.parametrize("matmul", ("tf32", "ieee", "none"))
@pytest.mark.parametrize("wider", ("tf32", "ieee", "none"))
def test_products_obey_the_setting_of_recurrent_layers(wider, matmul, rnn, precision, monkeypatch):
    """And leave the other one as it was, whatever happens inside and however many come at once."""
    get, put = precision
    put("cuda", "all", wider)
    put("cuda", "matmul", matmul)
    put("cuda", "rnn", rnn)
    before, seen = get("cuda", "matmul"), []

    class Elsewhere:
        dtype, device = torch.float32, torch.device("cuda")

    monkeypatch.setattr(_sequence, "no_autocast", lambda device: contextlib.nullcontext())

    def work():
        for _ in range(20):
            with contextlib.suppress(KeyError), _sequence.products(Elsewhere):
                seen.append(get("cuda", "matmul") == "tf32")
                raise KeyError

    threads = [threading.Thread(target=work) for _ in range(3)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert seen == [rnn == "tf32"] * 60 and get("cuda", "matmul") == before


SEED = torch.tensor([77])
EXTRAS = [("lstm_layer_norm", ()), ("indrnn", (("zoneout", 0.3),)), ("gru", (("variational", 0.4), ("reset", True)))]
EXTRAS += [
    ("lstm", (("zoneout", 0.3), ("skip", 2), ("clip_grad", 0.3))),
    ("lstm_layer_norm", (("recurrent_dropout", 0.4),)),
    ("lstm", (("heads", 2),)),
    ("gru", (("heads", 3), ("zoneout", 0.3))),
]


@pytest.mark.parametrize("reverse", (False, True), ids=("", "reverse"))
@pytest.mark.parametrize("layout", ("dense", "packed", "lengths"))
@pytest.mark.parametrize(("cell", "options"), EXTRAS, ids=str)
def test_parameters_masks_delays(cell, options, layout, reverse):
    """Tokens and columns of every row, what dead tokens leave in sums, and cells without a product."""
    walk = Walk(cell, options, layout, reverse, H=6 if "heads" in dict(options) else 5)
    random = cotangents(walk.call("reference", SEED)(*walk.tensors().values()))
    ours, want = (gradients(walk.call(name, SEED), walk.tensors(), random) for name in ("unrolled", "reference"))
    assert_close_to_truth(ours, want, want)
    assert backends.last() == "reference"
    if "skip" not in dict(options):
        windows = gradients(walk.call("unrolled", SEED, recompute=3), walk.tensors(), random)
        assert_close_to_truth(windows, want, want)
