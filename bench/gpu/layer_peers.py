"""Who runs the rows of layer_rows.py: ours, torch's eager operations, SDPA by named backend, torch.compile, and other packages.

All get the same tensors, each a leaf of its own, so that no time goes into gathering gradients. What a package or a backend refuses
is raised here, with the reason, when it is built.

Dims: T tokens, B sequences, H width, `heads` of D = H / heads.
"""

from __future__ import annotations

import contextlib
import re
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch._functorch.config
import torch.nn.functional as F
from torch import Tensor

from bench import layers
from bench.layers import Layer
from bench.providers import label

SDPA = {
    "sdpa_flash": "FLASH_ATTENTION",
    "sdpa_cudnn": "CUDNN_ATTENTION",
    "sdpa_efficient": "EFFICIENT_ATTENTION",
    "sdpa_math": "MATH",
}
OTHERS = ("torch_compile", "flex", "flash_attn", "liger")  # whose numbers are looked at before they are timed
EPS = 1e-5


class Run:
    """Functions of tensors, ready to be called.

    inference: no_grad. training: forward and backward into every tensor. backward: that alone, of a graph that is kept.
    """

    def __init__(
        self,
        key: str,
        case: Layer,
        call: Callable[..., Any],  # of the tensors -> one output or several
        tensors: dict[str, Tensor],
        around: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext,
    ) -> None:
        self.key, self.case, self.call, self.around, self.label = key, case, call, around, label(key)
        differentiated = case.mode != "inference"
        self.tensors = {name: t.detach().requires_grad_(differentiated) for name, t in tensors.items()}
        self.kept: tuple[Tensor, ...] | None = None
        self.dy: list[Tensor] | None = None

    def forward(self) -> tuple[Tensor, ...]:
        y = self.call(*self.tensors.values())
        return y if isinstance(y, tuple) else (y,)

    def gradients(self, outputs: tuple[Tensor, ...], keep: bool) -> tuple[Tensor, ...]:
        if self.dy is None:
            draw = torch.Generator(self.case.device).manual_seed(1)
            rounded = getattr(torch, self.case.dtype)  # for the truth in fp64 too
            self.dy = [torch.randn(y.shape, generator=draw, device=y.device).to(rounded).to(y) for y in outputs]
        return torch.autograd.grad(outputs, list(self.tensors.values()), self.dy, retain_graph=keep)

    def run(self) -> None:
        """What is timed."""
        with self.around():
            if self.case.mode == "inference":
                with torch.no_grad():
                    self.forward()
            elif self.case.mode == "training":
                self.gradients(self.forward(), False)
            else:
                if self.kept is None:
                    # compiled graphs would otherwise give away what they keep, once
                    with torch._functorch.config.patch(donated_buffer=False):
                        self.kept = self.forward()
                self.gradients(self.kept, True)

    def results(self) -> dict[str, Tensor]:
        """Outputs, and unless in inference the gradient of every tensor, by name."""
        with self.around(), torch.set_grad_enabled(self.case.mode != "inference"):
            outputs = self.forward()
            found = {f"output {k}": y.detach() for k, y in enumerate(outputs)}
            if self.case.mode != "inference":
                made = self.gradients(outputs, False)
                found |= {f"gradient of {name}": g for name, g in zip(self.tensors, made)}
        return found

    def algorithm(self) -> str:
        """What torch chooses among SDPA's backends, where it is to choose."""
        from torch.nn.attention import SDPBackend

        if self.case.cell != "attention":
            return "eager operations"
        q, k, v = self.tensors.values()
        return SDPBackend(torch._fused_sdp_choice(q, k, v, None, self.case.dropout, self.case.causal)).name


# ---------------------------------------------------------------- tensors, the same for everybody


def tensors(case: Layer) -> dict[str, Tensor]:
    """Of a row, in fp32, but for what a block has of parameters. Drawn on the device: on the CPU that takes longer than the row."""
    draw = torch.Generator(case.device).manual_seed(2)
    normal = lambda *shape: torch.randn(*shape, generator=draw, device=case.device)
    T, B, H = case.T, case.B, case.H
    if case.cell == "attention":  # as a projection leaves them: heads of a token side by side
        return {name: normal(B, T, case.heads, H // case.heads).transpose(1, 2) for name in "qkv"}
    if case.cell == "causal conv":
        weight = normal(H, H, case.taps) / (H * case.taps) ** 0.5
        return {"x": normal(B, T, H), "weight": weight, "bias": normal(H)}
    found = {"x": normal(B, T, H)}
    if case.cell == "attention block":
        return found
    if case.cell != "layer norm":
        found["residual"] = normal(B, T, H)
    found["weight"] = normal(H)
    return found if case.cell == "residual rms norm" else {**found, "bias": normal(H)}


# ---------------------------------------------------------------- functions


def sdpa(case: Layer) -> Callable[..., Tensor]:
    return lambda q, k, v: F.scaled_dot_product_attention(q, k, v, dropout_p=case.dropout, is_causal=case.causal)


def flex(case: Layer) -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    if case.dropout:
        raise NotImplementedError("FlexAttention has no dropout")
    attend, mask = torch.compile(flex_attention, dynamic=False), None
    if case.causal:
        visible = lambda b, h, i, j: i >= j
        mask = create_block_mask(visible, None, None, case.T, case.T, device=case.device)
    return lambda q, k, v: attend(q, k, v, block_mask=mask)


def flash_attn(case: Layer) -> Callable[..., Any]:
    """flash-attn's attention, and the norm of its Triton kernels."""
    if case.cell == "attention":
        from flash_attn import flash_attn_func

        def attend(q, k, v):
            qkv = (t.transpose(1, 2) for t in (q, k, v))
            return flash_attn_func(*qkv, dropout_p=case.dropout, causal=case.causal).transpose(1, 2)

        return attend
    from flash_attn.ops.triton.layer_norm import layer_norm_fn

    if case.cell == "layer norm":
        return lambda x, w, b: layer_norm_fn(x, w, b, eps=EPS)
    if case.cell == "residual rms norm":
        return lambda x, r, w: layer_norm_fn(x, w, None, residual=r, eps=EPS, prenorm=True, is_rms_norm=True)
    return lambda x, r, w, b: layer_norm_fn(x, w, b, residual=r, eps=EPS, dropout_p=case.dropout)


def liger(case: Layer) -> Callable[..., Any]:
    if case.cell == "layer norm":
        from liger_kernel.ops.layer_norm import LigerLayerNormFunction

        return lambda x, w, b: LigerLayerNormFunction.apply(x, w, b, EPS)
    if case.cell == "residual rms norm":
        from liger_kernel.ops.fused_add_rms_norm import LigerFusedAddRMSNormFunction

        return lambda x, r, w: LigerFusedAddRMSNormFunction.apply(x, r, w, EPS, 0.0, "llama", False)
    raise NotImplementedError(f"Liger has no {case.cell}")


def eager(case: Layer) -> Callable[..., Any]:
    """As people write it with torch's functions."""
    if case.cell == "attention":
        return sdpa(case)
    p, N = case.dropout, (case.H,)
    if case.cell == "causal conv":
        past = (case.taps - 1) * case.dilation
        return lambda x, w, b: F.conv1d(F.pad(x, (past, 0)), w, b, dilation=case.dilation)
    if case.cell == "layer norm":
        return lambda x, w, b: F.layer_norm(x, N, w, b, EPS)
    added = lambda x, r: r + (F.dropout(x, p) if p else x)
    if case.cell == "residual norm":
        return lambda x, r, w, b: F.layer_norm(added(x, r), N, w, b, EPS)

    def prenorm(x, r, w):
        s = added(x, r)
        return F.rms_norm(s, N, w, EPS), s

    return prenorm


def ours(case: Layer) -> Callable[..., Any]:
    import gradkernels as gk

    more: dict[str, Any] = {"backend": case.backend}
    if case.cell == "attention":
        return lambda q, k, v: gk.ops.attention(q, k, v, causal=case.causal, dropout_p=case.dropout, **more)
    if case.cell == "causal conv":
        return lambda x, w, b: gk.ops.causal_conv1d(x, w, b, dilation=case.dilation, **more)
    more |= {"dropout_p": case.dropout, "eps": EPS}
    if case.cell == "layer norm":
        return lambda x, w, b: gk.ops.residual_norm(x, None, w, b, prenorm=False, **more)
    if case.cell == "residual norm":
        return lambda x, r, w, b: gk.ops.residual_norm(x, r, w, b, prenorm=False, **more)
    return lambda x, r, w: gk.ops.residual_norm(x, r, w, kind="rms", **more)


FUNCTIONS = {"ours": ours, "flex": flex, "flash_attn": flash_attn, "liger": liger}

# ---------------------------------------------------------------- providers


def block(case: Layer, key: str, dtype: torch.dtype) -> Run:
    """A whole sublayer: its module's parameters are tensors of the row."""
    module = layers.block(case, key.startswith("ours")).to(getattr(torch, case.dtype)).to(dtype).to(case.device)
    named = dict(module.named_parameters())
    call = torch.compile(module, dynamic=False) if key == "torch_compile" else module
    x = tensors(case)["x"].to(getattr(torch, case.dtype)).to(dtype).to(case.device)
    run = Run(key, case, lambda x, *_: call(x), {"x": x})
    # the module's own, which are leaves already
    run.tensors |= {name: p.requires_grad_(case.mode != "inference") for name, p in named.items()}
    return run


def refusal(e: Exception, said: list[warnings.WarningMessage]) -> str:
    """A line: what was raised, and what SDPA warned of before, which is why."""
    reasons = [re.sub(r"\s*\(Triggered internally at .*", "", str(w.message), flags=re.DOTALL) for w in said]
    kept = [r for r in reasons if r and not r.endswith("because:")]
    return "; ".join([str(e).partition("\n")[0], *dict.fromkeys(kept)])


def named(case: Layer, key: str, given: dict[str, Tensor]) -> Run:
    """SDPA by one of its backends, or RuntimeError with the reason why that backend does not take it."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    run = Run(key, case, sdpa(case), given, lambda: sdpa_kernel(getattr(SDPBackend, SDPA[key])))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            run.run()
        except RuntimeError as e:
            raise RuntimeError(refusal(e, said)) from e
    return run


def build(case: Layer, key: str, dtype: torch.dtype | None = None) -> Run:
    """One provider of a row. dtype: another than the row's, for the truth that all are compared with."""
    rounded = getattr(torch, case.dtype)
    dtype = dtype or rounded
    if key.startswith("ours:"):
        from bench.gpu import layer_picks

        return layer_picks.build(case, key, dtype)
    if case.cell == "attention block":
        return block(case, key, dtype)
    given = {name: t.to(rounded).to(dtype).to(case.device) for name, t in tensors(case).items()}
    if key in SDPA:
        return named(case, key, given)
    call = FUNCTIONS.get(key, eager)(case)
    if case.cell == "causal conv" and not key.startswith("ours"):
        # channels first in memory, as torch's convolution wants them: results are turned afterwards, in `Turned`
        given["x"] = given["x"].transpose(1, 2).contiguous()
        return Turned(key, case, torch.compile(call, dynamic=False) if key == "torch_compile" else call, given)
    return Run(key, case, torch.compile(call, dynamic=False) if key == "torch_compile" else call, given)


class Turned(Run):
    """Channels first: what is compared is turned, what is timed is not."""

    def gradients(self, outputs: tuple[Tensor, ...], keep: bool) -> tuple[Tensor, ...]:
        if self.dy is None:  # the same numbers as ours gets, which are drawn with channels last
            (y,) = outputs
            draw = torch.Generator(self.case.device).manual_seed(1)
            dy = torch.randn(y.transpose(1, 2).shape, generator=draw, device=y.device)
            self.dy = [dy.to(getattr(torch, self.case.dtype)).to(y).transpose(1, 2).contiguous()]
        return super().gradients(outputs, keep)

    def results(self) -> dict[str, Tensor]:
        first = ("output 0", "gradient of x")
        return {name: t.transpose(1, 2) if name in first else t for name, t in super().results().items()}
