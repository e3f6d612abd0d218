"""What torch does to modules and functions: compile, export, vmap, forward mode, higher derivatives, checkpoints, parametrizations."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.export import Dim, export
from torch.func import functional_call, grad, jacfwd, jacrev, jvp, vmap
from torch.nn.utils import parametrizations, parametrize
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils.checkpoint import checkpoint

import gradkernels as gk
from tests import place
from tests.close import assert_close_to_truth
from tests.nn.loop import Loop
from tests.nn.pairs import close, pair, tensors

pytestmark = pytest.mark.usefixtures("one_thread")
KINDS = ("LSTM", "GRU", "RNN")
X = torch.randn(6, 4, 3, generator=torch.Generator().manual_seed(1))


@pytest.fixture(autouse=True)
def input_there(request, monkeypatch):
    """X where the test computes."""
    for name in ("backend", "best"):
        if name in request.fixturenames:
            request.getfixturevalue(name)
    monkeypatch.setitem(globals(), "X", X.to(place.device))


def total(tree):
    return sum((k + 1) * v.square().sum() for k, v in enumerate(tensors(tree)) if v.is_floating_point())


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()


# ---------------------------------------------------------------- compile


def compiled(f, how="aot_eager", **kwargs):
    return torch.compile(f, fullgraph=True, backend=how, **kwargs)


def train(f, module, x, *args):
    module.zero_grad()
    y = x.clone().requires_grad_()
    out = f(y, *args)
    total(out).backward()
    return out, y.grad, [p.grad for p in module.parameters()]


def test_compile_outputs_and_every_gradient(kind, best):
    ours, theirs = pair(kind, best, 3, 5, num_layers=2, bidirectional=True)
    want = train(theirs, theirs, X)
    for how in ("aot_eager", "inductor")[: 1 + (kind == "LSTM")]:
        close(train(compiled(ours, how), ours, X), want)


@pytest.mark.parametrize("how", ("dynamic", "marked"))
def test_compile_one_graph_for_every_shape(kind, how, best):
    ours, theirs = pair(kind, best, 3, 5, num_layers=2)
    count = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    f = torch.compile(ours, fullgraph=True, backend=count, dynamic=True if how == "dynamic" else None)
    for T, B in ((6, 4), (9, 4), (9, 7), (2, 2), (13, 3)):
        z = place.randn(T, B, 3, requires_grad=True)
        if how == "marked":
            torch._dynamo.mark_dynamic(z, 0), torch._dynamo.mark_dynamic(z, 1)
        out = f(z)
        out[0].sum().backward()
        close(out, theirs(z))
    assert count.frame_count <= 2


def test_compile_hx_unbatched_no_grad_frozen_eval(kind, best):
    ours, theirs = pair(kind, best, 3, 5, num_layers=2, batch_first=True)
    h = place.randn(2, 6, 5)
    hx = (h, h + 1) if kind == "LSTM" else h
    f = compiled(ours)
    close(f(X, hx), theirs(X, hx))
    close(f(X[:, 0]), theirs(X[:, 0]))
    with torch.no_grad():
        close(f(X), theirs(X))
    ours.eval(), theirs.eval()
    close(f(X), theirs(X))
    ours.requires_grad_(False)
    close(compiled(ours)(X), theirs(X))


def test_compile_lengths(kind, best):
    ours, _ = pair(kind, best, 3, 5, num_layers=2, bidirectional=True)
    f = compiled(ours, dynamic=True)
    for lengths in (torch.tensor([6, 0, 3, 1]), torch.tensor([2, 6, 6, 5])):
        close(train(f, ours, X, None, lengths), train(ours, ours, X, None, lengths))


@pytest.mark.parametrize("order", ("sorted", "unsorted"))
def test_compile_packed_sequence_as_input(kind, order, best):
    ours, theirs = pair(kind, best, 3, 5, num_layers=2)
    lengths = torch.tensor([6, 5, 3, 1] if order == "sorted" else [3, 6, 1, 5])
    packed = pack_padded_sequence(X, lengths, enforce_sorted=order == "sorted")
    close(compiled(ours)(packed), theirs(packed))


def test_compile_checkpoint_inside(kind, best):
    ours, theirs = pair(kind, best)
    f = compiled(lambda z: checkpoint(lambda u: ours(u)[0], z, use_reentrant=False))
    close(train(f, ours, X), train(lambda z: theirs(z)[0], theirs, X))


def test_compile_cells(best):
    for kind in KINDS:
        ours, theirs = pair(kind + "Cell", best)
        close(train(compiled(ours), ours, X[0]), train(theirs, theirs, X[0]))


def test_compile_recompiles_after_convert(best):
    model = nn.Sequential(nn.Linear(3, 3), nn.LSTM(3, 5)).to(place.device)
    f = torch.compile(model, backend="aot_eager")
    before = f(X)
    assert gk.convert(f) is f and type(f._orig_mod[1]) is gk.nn.LSTM
    close(f(X), before)


# ---------------------------------------------------------------- export


def test_export_with_dynamic_steps_and_batch(kind, best):
    ours, theirs = pair(kind, best, 3, 5, num_layers=2, bidirectional=True)
    sizes = ({0: Dim("T", min=1, max=4096), 1: Dim("B", min=1, max=4096)},)
    program = export(ours, (X,), dynamic_shapes=sizes)
    z = place.randn(13, 3, 3)
    close(program.module()(z), theirs(z))
    close(program.module()(z[:1, :1]), theirs(z[:1, :1]))
    buffer = io.BytesIO()
    torch.export.save(program.run_decompositions(), buffer)
    buffer.seek(0)
    close(torch.export.load(buffer).module()(z), theirs(z))


def test_export_strict_still_trains(kind, best):
    ours, theirs = pair(kind, best)
    z = place.randn(13, 3, 3)
    module = export(ours, (X,), strict=True, dynamic_shapes=({0: Dim.DYNAMIC, 1: Dim.DYNAMIC},)).module()
    total(module(z)).backward(), total(theirs(z)).backward()
    want = {n: p.grad for n, p in theirs.named_parameters()}
    close({n: p.grad for n, p in module.named_parameters()}, want)


def test_export_lengths(kind, best):
    ours, _ = pair(kind, best, 3, 5, bidirectional=True)
    lengths = torch.tensor([6, 2, 3, 1])
    program = export(ours, (X, None, lengths))
    close(program.module()(X, None, lengths.flip(0)), ours(X, None, lengths.flip(0)))


def test_jit_trace(kind, best):
    ours, theirs = pair(kind, best)
    close(torch.jit.trace(ours, (X,))(X[:3, :2]), theirs(X[:3, :2]))


# ---------------------------------------------------------------- torch.func


def double(kind, backend, *args, **kwargs):
    ours, theirs = pair(kind, backend, *args, **kwargs, dtype=torch.double)
    return ours, theirs, {n: p.detach() for n, p in ours.named_parameters()}, X.double()


@pytest.mark.cpu
def test_func_grad_jvp_vmap(kind, backend):
    ours, theirs, P, x = double(kind, backend, 3, 5, num_layers=2)
    loop = lambda m: lambda p, x: total(functional_call(m, p, (x,)))
    close(grad(loop(ours))(P, x), dict(zip(P, torch.autograd.grad(total(theirs(x)), list(theirs.parameters())))))
    many = torch.stack([x, x + 1, x - 1])
    want = [torch.stack(v) for v in zip(*(tensors(theirs(v)) for v in many))]
    close(vmap(lambda v: functional_call(ours, P, (v,)))(many), want)
    each = vmap(grad(loop(ours)), (None, 0))(P, many)  # gradients of every sample
    for k, v in enumerate(many):
        close({n: g[k] for n, g in each.items()}, grad(loop(ours))(P, v))
    v, move = torch.randn_like(x), {n: torch.randn_like(p) for n, p in P.items()}
    want = jvp(lambda p, z: functional_call(Loop(ours), p, (z,)), (P, x), (move, v))
    close(jvp(lambda p, z: functional_call(ours, p, (z,)), (P, x), (move, v)), want)


@pytest.mark.cpu
def test_func_jacobians_and_hessian(kind, backend):
    ours, theirs, P, x = double(kind, backend)
    x = x[:3, :2]
    f, g = (lambda z: functional_call(ours, P, (z,))[0][-1].sum(0)), (lambda z: theirs(z)[0][-1].sum(0))
    want = torch.autograd.functional.jacobian(g, x)
    close(jacrev(f)(x), want)
    close(jacfwd(f)(x), want)
    want = torch.autograd.functional.hessian(lambda z: g(z).sum(), x)
    close(jacfwd(jacrev(lambda z: f(z).sum()))(x), want)
    close(jacrev(jacrev(lambda z: f(z).sum()))(x), want)


@pytest.mark.cpu
def test_ensemble_of_weights(kind, backend):
    ours, theirs, P, x = double(kind, backend)
    stacked = {n: torch.stack([p, 1.1 * p]) for n, p in P.items()}
    got = vmap(lambda p: functional_call(ours, p, (x,)))(stacked)
    close([v[0] for v in tensors(got)], theirs(x))
    close([v[1] for v in tensors(got)], functional_call(theirs, {n: 1.1 * p for n, p in P.items()}, (x,)))


# ---------------------------------------------------------------- autograd


@pytest.mark.cpu
def test_double_backward(kind, backend):
    ours, theirs, _, x = double(kind, backend, 3, 5, num_layers=2, bidirectional=True)
    out = []
    for m in (ours, theirs):
        y = x.clone().requires_grad_()
        first = torch.autograd.grad(total(m(y)), [y, *m.parameters()], create_graph=True)
        out.append(torch.autograd.grad(total(first), [y, *m.parameters()]))
    close(*out)


def test_eval_mode_backward_and_retain_graph(kind, backend):
    ours, theirs = pair(kind, backend, 3, 5, num_layers=2, dropout=0.5)
    close(train(ours.eval(), ours, X), train(theirs.eval(), theirs, X))
    y = X.clone().requires_grad_()
    out = total(ours(y))
    first = torch.autograd.grad(out, y, retain_graph=True)[0]
    assert torch.equal(first, torch.autograd.grad(out, y)[0])


@pytest.mark.parametrize("reentrant", (True, False), ids=("reentrant", "not"))
def test_checkpoint(kind, reentrant, backend):
    ours, theirs = pair(kind, backend, 3, 5, num_layers=2)
    f = lambda z: checkpoint(lambda u: ours(u)[0], z, use_reentrant=reentrant)
    close(train(f, ours, X), train(lambda z: theirs(z)[0], theirs, X))


@pytest.mark.cpu
def test_batched_gradients(kind, backend):
    ours, theirs, _, x = double(kind, backend)
    grads = place.randn(3, 6, 4, 5, dtype=torch.double)
    out = []
    for m in (ours, theirs):
        y = x.clone().requires_grad_()
        o = m(y)[0]
        if m is ours:
            out.append(torch.autograd.grad(o, [y, *m.parameters()], grads, is_grads_batched=True))
        else:
            each = [torch.autograd.grad(o, [y, *m.parameters()], g, retain_graph=True) for g in grads]
            out.append([torch.stack(v) for v in zip(*each)])
    close(*out)
    y = x[:2, :1].clone()
    jacobian = torch.autograd.functional.jacobian
    close(jacobian(lambda z: ours(z)[0], y, vectorize=True), jacobian(lambda z: theirs(z)[0], y))


def test_non_contiguous_input_state_and_gradient(kind, backend):
    ours, theirs = pair(kind, backend)
    z, h = place.randn(3, 4, 6).permute(2, 1, 0), place.randn(5, 4, 1).permute(2, 1, 0)
    hx = (h, h) if kind == "LSTM" else h
    close(ours(z, hx), theirs(z, hx))
    out = []
    for m in (ours, theirs):
        y = X.clone().requires_grad_()
        out.append(torch.autograd.grad(m(y)[0], y, place.ones(()).expand(6, 4, 5)))
    close(*out)


def test_in_place_change_is_caught(kind, backend):
    for which in ("weight", "output"):
        ours, _ = pair(kind, backend)
        out = ours(X)[0]
        with torch.no_grad():
            (ours.weight_hh_l0 if which == "weight" else out).mul_(1)
        with pytest.raises(RuntimeError, match="inplace"):
            out.sum().backward()


def test_autocast(kind, backend):
    ours, theirs = pair(kind, backend, 3, 5, num_layers=2)
    results = []
    for m in (ours, theirs):
        y = X.clone().requires_grad_()
        with torch.autocast(place.device.type, torch.bfloat16):
            out = m(y)
        m.zero_grad()
        total(out).backward()
        results.append([*tensors(out), y.grad, *(p.grad.clone() for p in m.parameters())])  # .double() is in place
    assert [v.dtype for v in results[0]] == [v.dtype for v in results[1]]
    truth = train(theirs.double(), theirs, X.double())
    assert_close_to_truth(*results, [*tensors(truth[0]), truth[1], *truth[2]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("state", [None, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["LSTM", "GRU", "RNN", "LSTMCell", "GRUCell", "RNNCell"])
def test_autocast_leaves_in_torchs_dtype(name, dtype, state):
    cell = name.endswith("Cell")
    x = place.randn(*((2, 3) if cell else (4, 2, 3)), dtype=dtype)
    h = None if state is None else torch.zeros(*((2, 5) if cell else (1, 2, 5)), dtype=state)
    hx = (h, h) if name.startswith("LSTM") and h is not None else h
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = (getattr(lib, name)(3, 5)(x, hx) for lib in (gk.nn, nn))
    assert [v.dtype for v in tensors(ours)] == [v.dtype for v in tensors(theirs)]


def test_saved_tensors_hooks_and_inference_mode(kind, backend):
    ours, theirs = pair(kind, backend)
    with torch.autograd.graph.save_on_cpu():
        got = train(ours, ours, X)
    close(got, train(theirs, theirs, X))
    with torch.inference_mode():
        out = ours(X)[0]
    assert out.is_inference()
    close(out, theirs(X)[0])


# ---------------------------------------------------------------- modules


@pytest.mark.parametrize("name", ("weight_norm", "orthogonal", "spectral_norm"))
@pytest.mark.cpu
def test_parametrizations(kind, name, backend):
    ours = getattr(parametrizations, name)(pair(kind, backend)[0], "weight_hh_l0").eval()
    out = ours(X)
    total(out).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in ours.parameters())
    close(copy.deepcopy(ours)(X), out)
    close(compiled(ours)(X), out)
    plain = getattr(nn, kind)(3, 5).to(place.device)
    with torch.no_grad():
        for n, p in plain.named_parameters():
            p.copy_(getattr(ours, n))
    close(out, plain(X))
    ours.double()
    copy.deepcopy(ours)  # torch.nn.LSTM fails here: its list of weights holds a computed tensor
    parametrize.remove_parametrizations(ours, "weight_hh_l0")
    assert type(ours) is getattr(gk.nn, kind)
    plain.double().load_state_dict(ours.state_dict(), strict=True)
    close(ours(X.double()), plain(X.double()))


def test_parametrized_cells(backend):
    for kind in KINDS:
        ours, theirs = pair(kind + "Cell", backend)
        want = theirs(X[0])
        parametrizations.weight_norm(ours, "weight_hh")
        close(ours(X[0]), want)
        total(ours(X[0])).backward()
        assert all(p.grad is not None for p in ours.parameters())


def test_old_weight_norm(kind, backend):
    ours, theirs = pair(kind, backend)
    with pytest.warns(FutureWarning):
        torch.nn.utils.weight_norm(ours, "weight_hh_l0")
    close(ours(X), theirs(X))
    with torch.no_grad():
        ours.weight_hh_l0_g.mul_(2), theirs.weight_hh_l0.mul_(2)
    close(ours(X), theirs(X))


def test_functional_call_sees_the_weights_it_is_given(kind, backend):
    ours, theirs = pair(kind, backend)
    P = {n: torch.randn_like(p) for n, p in ours.named_parameters()}
    close(functional_call(ours, P, (X,)), functional_call(theirs, P, (X,)))
    close(ours(X), theirs(X))


def test_copies(kind, backend):
    ours, _ = pair(kind, backend, 3, 5, num_layers=2, bidirectional=True)
    S = gk.cells.CELLS[ours.cell].S
    ours.probes = [place.zeros(8, S + 1, dtype=torch.double, requires_grad=True) for _ in range(4)]
    want = ours(X)
    buffer = io.BytesIO()
    torch.save(ours, buffer)
    buffer.seek(0)
    loaded = pickle.loads(pickle.dumps(ours)), torch.load(buffer, weights_only=False)
    for other in (*loaded, copy.deepcopy(ours), copy.copy(ours)):
        close(other(X), want, rtol=0, atol=0)
        assert other.probes is None and type(other) is type(ours) and other.backend == backend
    assert ours.probes is not None


def test_meta_device_and_assign(kind, backend):
    meta = getattr(gk.nn, kind)(3, 5, device="meta", backend=backend)
    assert meta(torch.empty(6, 4, 3, device="meta"))[0].shape == (6, 4, 5)
    _, theirs = pair(kind, backend)
    meta.load_state_dict(theirs.state_dict(), assign=True)
    close(meta(X), theirs(X))
    empty = getattr(gk.nn, kind)(3, 5, device="meta", backend=backend).to_empty(device=place.device)
    empty.load_state_dict(theirs.state_dict())
    close(empty(X), theirs(X))


@pytest.mark.cpu
def test_dtypes_follow_the_module(kind, backend):
    ours, _ = pair(kind, backend)
    for change in ("double", "bfloat16", "half", "float"):
        dtype = getattr(torch, change)
        getattr(ours, change)()
        out = ours(X.to(dtype))
        assert {v.dtype for v in tensors(out)} == {dtype}
        total(out).backward()
        assert all(p.grad.dtype is dtype for p in ours.parameters())
        ours.zero_grad()


@pytest.mark.cpu
def test_default_dtype_and_device_context(kind, backend):
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.double)
        layer = getattr(gk.nn, kind)(3, 5, backend=backend)
        assert layer(torch.rand(6, 4, 3))[0].dtype is torch.double
    finally:
        torch.set_default_dtype(before)
    with torch.device("meta"):
        assert getattr(gk.nn, kind)(3, 5).weight_hh_l0.is_meta


def test_same_seed_same_weights(kind):
    args = (3, 5, 2)
    torch.manual_seed(3)
    theirs = getattr(nn, kind)(*args).state_dict()
    torch.manual_seed(3)
    close(getattr(gk.nn, kind)(*args).state_dict(), theirs, rtol=0, atol=0)


def test_isinstance_and_kept_names(kind):
    layer = getattr(gk.nn, kind)(3, 5, 2)
    assert isinstance(layer, nn.RNNBase) and not isinstance(layer, getattr(nn, kind))
    theirs = getattr(nn, kind)(3, 5, 2)
    assert [[p.shape for p in w] for w in layer.all_weights] == [[p.shape for p in w] for w in theirs.all_weights]
    assert len(layer._flat_weights) == len(theirs._flat_weights) and layer.flatten_parameters() is None
    assert layer.mode == theirs.mode


def test_swapped_parameter_is_used(kind, backend):
    ours, theirs = pair(kind, backend)
    new = torch.randn_like(ours.weight_hh_l0)
    ours.weight_hh_l0, theirs.weight_hh_l0 = nn.Parameter(new), nn.Parameter(new.clone())
    close(ours(X), theirs(X))
    for m in (ours, theirs):  # as DropConnect does
        del m.weight_hh_l0
        m.weight_hh_l0 = 2 * new
    close(ours(X), theirs(X))


def test_data_parallel_replicas(kind, backend):
    ours, theirs = pair(kind, backend)
    replica = ours._replicate_for_data_parallel()
    for name, p in ours.named_parameters():  # as torch.nn.parallel.replicate does
        setattr(replica, name, p.detach().clone())
    close(replica(X), theirs(X))
