"""A layer of ours beside torch's with the same weights, and how their results are compared."""

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

import gradkernels as gk
from tests import place


def pair(kind, backend, *args, dtype=None, **kwargs):
    torch.manual_seed(0)
    theirs = getattr(nn, kind)(*(args or (3, 5)), **kwargs, dtype=dtype).to(place.device)
    ours = getattr(gk.nn, kind)(*(args or (3, 5)), **kwargs, dtype=dtype, backend=backend).to(place.device)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return ours, theirs


def tensors(tree):
    return [v for v in tree_leaves(tree) if isinstance(v, torch.Tensor)]


def close(a, b, **kwargs):
    torch.testing.assert_close(tensors(a), tensors(b), **kwargs)
