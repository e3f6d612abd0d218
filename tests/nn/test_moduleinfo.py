"""The cases by which PyTorch tests these layers itself (torch.testing._internal.common_modules), run on ours.

What is done with each case is what PyTorch's test_modules.py does: forward against the layer's reference function and the torch
layer, gradients numerically to second order, non-contiguous inputs, repr, pickle, and the error inputs.
"""

import copy
import io
import re

import pytest
import torch
from torch.func import functional_call
from torch.testing._internal.common_modules import ModuleErrorEnum, module_db
from torch.testing._internal.common_utils import freeze_rng_state, noncontiguous_like
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_map_only, tree_unflatten

import gradkernels as gk
from tests import place
from tests.close import assert_close_to_truth

pytestmark = pytest.mark.usefixtures("one_thread")
KINDS = ("LSTM", "GRU", "RNN", "LSTMCell", "GRUCell", "RNNCell")
INFOS = {kind: next(i for i in module_db if i.module_cls is getattr(torch.nn, kind)) for kind in KINDS}


def inputs(kind, dtype, training):
    torch.manual_seed(0)
    info = INFOS[kind]
    return info.module_inputs_func(info, device=place.device, dtype=dtype, requires_grad=True, training=training)


def twins(kind, case, dtype, training, backend):
    """torch's layer and ours with the same weights."""
    c = case.constructor_input
    theirs = getattr(torch.nn, kind)(*c.args, **c.kwargs, dtype=dtype, device=place.device).train(training)
    ours = getattr(gk.nn, kind)(*c.args, **c.kwargs, dtype=dtype, device=place.device, backend=backend).train(training)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return theirs, ours


def tensors(tree):
    return [v for v in tree_leaves(tree) if isinstance(v, torch.Tensor)]


@pytest.mark.parametrize("training", (True, False), ids=("train", "eval"))
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64), ids=("fp32", "fp64"))
@pytest.mark.parametrize("kind", KINDS)
def test_forward_and_gradients(kind, dtype, training, backend):
    cases = inputs(kind, dtype, training)
    assert cases
    for case in cases:
        theirs, ours = twins(kind, case, dtype, training, backend)
        k = case.forward_input
        what = f"{case.constructor_input.args} {sorted(case.constructor_input.kwargs.items())}"
        got, want = with_gradients(ours, k), with_gradients(theirs, k)
        if dtype is torch.float64:  # as PyTorch compares
            torch.testing.assert_close(got, want, msg=f"{what}: {{}}".format)
        else:
            truth = with_gradients(copy.deepcopy(theirs).double(), in_double(k))
            assert_close_to_truth(got, want, truth, name=f"{what} ")
        if case.reference_fn is not None:
            args, kwargs = copy.deepcopy((tree_map(detached, k.args), k.kwargs))
            torch.testing.assert_close(
                tensors(ours(*args, **kwargs)), tensors(case.reference_fn(ours, *args, **kwargs))
            )


def with_gradients(module, call):
    """Outputs and the gradient of everything, by name."""
    out = [v for v in tensors(module(*call.args, **call.kwargs)) if v.is_floating_point()]
    leaves = [v for v in tensors((call.args, call.kwargs)) if v.requires_grad]
    grads = torch.autograd.grad(sum(v.square().sum() for v in out), [*module.parameters(), *leaves])
    names = [*(n for n, _ in module.named_parameters()), *(f"input {n}" for n in range(len(leaves)))]
    return {"outputs": out, **dict(zip(names, grads, strict=True))}


def in_double(call):
    move = lambda v: v.detach().double().requires_grad_(v.requires_grad) if v.is_floating_point() else v
    return type(call)(*tree_map_only(torch.Tensor, move, call.args), **tree_map_only(torch.Tensor, move, call.kwargs))


def detached(v):
    return v.detach() if isinstance(v, torch.Tensor) else v


def as_function(module, args):
    """The module as a function of its inputs and weights, and those."""
    names = [n for n, _ in module.named_parameters()]
    flat, spec = tree_flatten(args)

    def run(*values):
        values, weights = values[: len(flat)], values[len(flat) :]
        return tuple(tensors(functional_call(module, dict(zip(names, weights)), tree_unflatten(values, spec))))

    return run, [*flat, *(p.detach().requires_grad_() for p in module.parameters())]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.float64
def test_gradcheck_and_gradgradcheck(kind, backend):
    checked = 0
    for case in inputs(kind, torch.float64, True)[:: 1 if "Cell" in kind else 5]:
        _, ours = twins(kind, case, torch.float64, True, backend)
        if isinstance(case.forward_input.args[0], torch.nn.utils.rnn.PackedSequence):
            continue  # gradcheck takes tensors; packed input is checked below ops
        run, leaves = as_function(ours, case.forward_input.args)
        assert torch.autograd.gradcheck(run, leaves, fast_mode=True)
        assert torch.autograd.gradgradcheck(run, leaves, fast_mode=True)
        checked += 1
    assert checked > 1


@pytest.mark.parametrize("kind", KINDS)
def test_non_contiguous_inputs_and_gradients(kind, backend):
    for case in inputs(kind, torch.float32, True):
        if isinstance(case.forward_input.args[0], torch.nn.utils.rnn.PackedSequence):
            continue
        _, ours = twins(kind, case, torch.float32, True, backend)
        results = []
        for form in (lambda v: v.detach().clone(), noncontiguous_like):
            args = tree_map(lambda v, form=form: form(v).detach().requires_grad_(), case.forward_input.args)
            outs = tensors(ours(*args))
            grads = [form(torch.linspace(-1, 1, v.numel(), device=v.device).view_as(v).clone()) for v in outs]
            ours.zero_grad()
            torch.autograd.backward(outs, grads)
            results.append([*outs, *(v.grad for v in tree_leaves(args)), *(p.grad for p in ours.parameters())])
        torch.testing.assert_close(results[0], results[1])


@pytest.mark.parametrize("kind", KINDS)
def test_repr_pickle_and_deepcopy(kind, backend):
    for case in inputs(kind, torch.float32, False)[:4]:
        theirs, ours = twins(kind, case, torch.float32, False, backend)
        assert repr(ours).replace(f", backend={backend}", "") == repr(theirs)
        buffer = io.BytesIO()
        torch.save(ours, buffer)
        buffer.seek(0)
        with freeze_rng_state():
            want = ours(*case.forward_input.args)
        for other in (torch.load(buffer, weights_only=False), copy.deepcopy(ours)):
            assert list(other.state_dict()) == list(theirs.state_dict())
            torch.testing.assert_close(tensors(other(*case.forward_input.args)), tensors(want), rtol=0, atol=0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.cpu
def test_error_inputs(kind, backend):
    info = INFOS[kind]
    cases = info.module_error_inputs_func(info, device="cpu", dtype=torch.float32, requires_grad=False, training=True)
    assert cases
    for case in cases:
        c, k = case.module_error_input.constructor_input, case.module_error_input.forward_input

        if case.error_on is ModuleErrorEnum.CONSTRUCTION_ERROR:
            with pytest.raises(case.error_type) as caught:
                getattr(gk.nn, kind)(*c.args, **c.kwargs, backend=backend)
        else:
            ours = getattr(gk.nn, kind)(*c.args, **c.kwargs, backend=backend)
            with pytest.raises(case.error_type) as caught:
                ours(*k.args, **k.kwargs)
        assert re.search(case.error_regex, str(caught.value)), case.error_regex
