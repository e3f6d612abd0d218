"""The cases by which PyTorch tests these layers itself (torch.testing._internal.common_modules), run on ours as in test_moduleinfo.py."""

import copy
import io
import warnings

import pytest
import torch
from torch.testing._internal.common_modules import module_db
from torch.testing._internal.common_utils import freeze_rng_state, noncontiguous_like
from torch.utils._pytree import tree_map, tree_map_only

import gradkernels as gk
from tests.close import assert_close_to_truth
from tests.nn.test_moduleinfo import as_function, detached, in_double, tensors

pytestmark = [
    pytest.mark.cpu,
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:.*mismatched"),
]
KINDS = ("LayerNorm", "MultiheadAttention", "TransformerEncoderLayer", "TransformerDecoderLayer")
INFOS = {kind: next(i for i in module_db if i.module_cls is getattr(torch.nn, kind)) for kind in KINDS}


def cases(kind, dtype, training, grad=True):
    torch.manual_seed(0)
    info = INFOS[kind]
    found = info.module_inputs_func(info, device="cpu", dtype=dtype, requires_grad=grad, training=training)
    assert found
    return found


def twins(kind, case, dtype, training):
    c = case.constructor_input
    theirs = getattr(torch.nn, kind)(*c.args, **c.kwargs, dtype=dtype).train(training)
    ours = getattr(gk.nn, kind)(*c.args, **c.kwargs, dtype=dtype).train(training)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return theirs, ours


def with_gradients(module, call):
    """Outputs and the gradient of everything, by name; squares of what comes out of a norm would have none."""
    out = tensors(module(*call.args, **call.kwargs))
    leaves = [v for v in tensors((call.args, call.kwargs)) if v.requires_grad]
    slopes = [torch.linspace(-1, 2, v.numel(), dtype=torch.double).cos().view_as(v).to(v.dtype) for v in out]
    grads = torch.autograd.grad(out, [*module.parameters(), *leaves], slopes)
    names = [*(n for n, _ in module.named_parameters()), *(f"input {n}" for n in range(len(leaves)))]
    return {"outputs": out, **dict(zip(names, grads, strict=True))}


def blind(theirs, case):
    """Whether some query sees no key: torch has NaN for its weights then, and ours zeros."""
    return any(v.isnan().any() for v in tensors(theirs(*case.forward_input.args, **case.forward_input.kwargs)))


@pytest.mark.parametrize("training", (True, False), ids=("train", "eval"))
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64), ids=("fp32", "fp64"))
@pytest.mark.parametrize("kind", KINDS)
def test_forward_and_gradients(kind, dtype, training):
    compared = 0
    for case in cases(kind, dtype, training):
        theirs, ours = twins(kind, case, dtype, training)
        assert not blind(theirs, case)
        k, what = case.forward_input, f"{case.desc} {case.constructor_input.args} {case.constructor_input.kwargs}"
        got, want = with_gradients(ours, k), with_gradients(theirs, k)
        if dtype is torch.float64:  # as PyTorch compares
            torch.testing.assert_close(got, want, msg=f"{what}: {{}}".format)
        else:
            truth = with_gradients(copy.deepcopy(theirs).double(), in_double(k))
            # norms over four values: a single rounding decides, and torch's may happen to be none
            assert_close_to_truth(got, want, truth, k=16.0, name=f"{what} ")
        # a reference that evaluates is for layers in training
        if case.reference_fn is not None and (training or "Transformer" not in kind):
            args, kwargs = copy.deepcopy((tree_map(detached, k.args), k.kwargs))
            want = tensors(case.reference_fn(ours, *args, **kwargs))
            torch.testing.assert_close(tensors(ours(*args, **kwargs)), want, msg=f"{what}: {{}}".format)
        compared += 1
    assert compared


@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck_and_gradgradcheck(kind):
    checked = 0
    for case in cases(kind, torch.float64, True)[:: 1 if kind == "LayerNorm" else 13]:
        _, ours = twins(kind, case, torch.float64, True)
        k = case.forward_input
        run, leaves = as_function(_Call(ours, k.kwargs), k.args)
        assert torch.autograd.gradcheck(run, leaves, fast_mode=True)
        assert torch.autograd.gradgradcheck(run, leaves, fast_mode=True)
        checked += 1
    assert checked > 1


class _Call(torch.nn.Module):
    """A module with its keywords."""

    def __init__(self, module, kwargs):
        super().__init__()
        self.module, self.kwargs = module, kwargs

    def forward(self, *args):
        return self.module(*args, **self.kwargs)


@pytest.mark.parametrize("kind", KINDS)
def test_non_contiguous_inputs_and_gradients(kind):
    for case in cases(kind, torch.float32, True):
        _, ours = twins(kind, case, torch.float32, True)
        results = []
        for form in (lambda v: v.detach().clone(), noncontiguous_like):
            args = tree_map(lambda v, form=form: form(v).detach().requires_grad_(), case.forward_input.args)
            kwargs = tree_map_only(torch.Tensor, form, case.forward_input.kwargs)
            outs = tensors(ours(*args, **kwargs))
            grads = [form(torch.linspace(-1, 1, v.numel()).view_as(v).clone()) for v in outs]
            ours.zero_grad()
            torch.autograd.backward(outs, grads)
            results.append([*outs, *(v.grad for v in args), *(p.grad for p in ours.parameters())])
        torch.testing.assert_close(results[0], results[1])


@pytest.mark.parametrize("kind", KINDS)
def test_repr_pickle_and_deepcopy(kind):
    for case in cases(kind, torch.float32, False, grad=False)[:4]:
        theirs, ours = twins(kind, case, torch.float32, False)
        assert repr(ours) == repr(theirs)
        buffer = io.BytesIO()
        torch.save(ours, buffer)
        buffer.seek(0)
        k = case.forward_input
        with freeze_rng_state():
            want = ours(*k.args, **k.kwargs)
        for other in (torch.load(buffer, weights_only=False), copy.deepcopy(ours)):
            assert list(other.state_dict()) == list(theirs.state_dict())
            torch.testing.assert_close(tensors(other(*k.args, **k.kwargs)), tensors(want), rtol=0, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_changed_in_place_and_no_grad_is_the_same(kind):
    for case in cases(kind, torch.float32, True):
        _, ours = twins(kind, case, torch.float32, True)
        k = case.forward_input
        before = [v._version for v in tensors((k.args, k.kwargs))]
        out = tensors(ours(*k.args, **k.kwargs))
        with torch.no_grad(), warnings.catch_warnings():
            assert all(map(torch.equal, tensors(ours(*k.args, **k.kwargs)), out))
        assert before == [v._version for v in tensors((k.args, k.kwargs))]
