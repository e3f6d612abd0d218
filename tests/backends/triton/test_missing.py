"""Operations without a recurrence where Triton is not installed: what is asked for by name says so, all else runs."""

import pytest

from tests.backends.triton.test_processes import python

CALLS = {
    "residual_norm": "x, x",
    "causal_conv1d": "x, torch.ones(2, 4, 1)",
    "attention": "x[None], x[None], x[None]",
}


@pytest.mark.parametrize("name", CALLS)
def test_operation_without_triton(name):
    code = "import sys; sys.modules['triton'] = None; import torch, gradkernels as gk; x = torch.ones(1, 3, 4)\n"
    code += f"gk.ops.{name}({CALLS[name]})\ntry: gk.ops.{name}({CALLS[name]}, backend='triton')\n"
    code += "except RuntimeError as e: print(e)"
    reason = "Triton is not installed; `pip install triton` (Linux)"
    assert python(code) == f"backend 'triton' cannot run {name} in torch.float32 on cpu: {reason}"
