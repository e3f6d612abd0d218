"""The rows of attention, residual + norm and convolution, and who runs them: ours, torch's functions, torch's blocks.

Dims: T tokens, B sequences, H width, `heads` of D = H / heads.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.cases import MODES, Case, Target

NORM = (512, 8, 512)  # T, B, H
LARGE = (8192, 8, 512)  # 134 MB a tensor
ATTENTION = [(512, 8, 512, 8), (2048, 2, 512, 8), (512, 8, 1024, 8)]  # T, B, H, heads
CONVOLUTION = [(512, 8, 256, 3, 4), (2048, 4, 64, 2, 16), (512, 8, 512, 3, 2)]  # T, B, channels, taps, dilation


@dataclass(frozen=True)
class Layer(Case):
    """A row; `cell` is the operation: attention, attention block, residual norm, residual rms norm, layer norm, causal conv.

    mode backward: that alone, on a GPU."""

    heads: int = 1
    causal: bool = True
    dropout: float = 0.0
    taps: int = 0
    dilation: int = 1

    @property
    def name(self) -> str:
        more = [
            self.dtype.replace("float", "fp").replace("bfp", "bf") * (self.dtype != "float32"),
            "tf32" * self.tf32,
            f"{self.heads} heads" * (self.heads > 1),
            f"of {self.H // self.heads}" * (self.heads > 1 and self.device != "cpu"),
            "full" * (not self.causal),
            f"dropout {self.dropout:g}" * bool(self.dropout),
            f"{self.taps} taps, dilation {self.dilation}" * bool(self.taps),
            "peak memory" * (self.kind == "memory"),
        ]
        return " ".join([self.cell, f"{self.T},{self.B},{self.H}", self.mode, *filter(None, more)])

    @property
    def variant(self) -> str:
        return self.name.split(self.mode, 1)[1].strip()

    def flops(self) -> int:
        """Of the matrix products; causal attention counts the half that is not masked. Backward has 2.5 times as many in attention,
        whose scores are made once more, else twice."""
        tokens, times = self.T * self.B, {"inference": 1, "backward": 2, "training": 3}[self.mode]
        scores = 2 * self.B * self.T * (self.T + 1 if self.causal else 2 * self.T) * self.H
        if self.cell == "causal conv":
            return 2 * tokens * self.H**2 * self.taps * times
        attention = int(scores * {1: 1, 2: 2.5, 3: 3.5}[times])
        if self.cell == "attention block":
            return attention + 8 * tokens * self.H**2 * times
        return attention if self.cell == "attention" else 0

    def bytes(self) -> int:
        """That a norm has to read and write: x, the residual, y; training in addition the sum, and in backward dy and the sum in,
        dx and dresidual out, which for backward alone are one where nothing is dropped. An RMSNorm here returns the sum too."""
        if not self.cell.endswith("norm"):
            return 0
        element = torch.empty((), dtype=getattr(torch, self.dtype)).element_size()
        planes = {("residual norm", "inference"): 3, ("residual norm", "training"): 4 + 4}
        planes |= {("residual norm", "backward"): 4 if self.dropout else 3}
        planes |= {("residual rms norm", "inference"): 4, ("residual rms norm", "backward"): 4}
        planes |= {("layer norm", "inference"): 2, ("layer norm", "training"): 2 + 3, ("layer norm", "backward"): 3}
        return planes[self.cell, self.mode] * self.T * self.B * self.H * element

    def exact(self) -> Layer:
        """Without what is random."""
        return replace(self, dropout=0.0)


def layers() -> list[Case]:
    """Every row for the CPU."""
    found: list[Case] = []
    for dropout, asked in ((0.0, {}), (0.1, {"inference": 15.0, "training": 5.0})):
        found += [
            Layer(
                "residual norm",
                "residual norm",
                mode,
                *NORM,
                dropout=dropout,
                targets=(Target("torch", asked.get(mode)),),
            )
            for mode in MODES
        ]
    found += [
        Layer("residual norm", "residual norm", mode, *LARGE, targets=(Target("torch"), Target("limit", 0.8)))
        for mode in MODES
    ]
    found += [Layer("layer norm", "layer norm", mode, *NORM, targets=(Target("torch", 1.0),)) for mode in MODES]
    for T, B, H, heads in ATTENTION:
        for mode, asked, share in (("inference", 1.7, 0.7), ("training", 1.5, None)):
            targets = (Target("torch", asked), *([Target("limit", share)] if share else []))
            found.append(Layer("attention", "attention", mode, T, B, H, heads=heads, targets=targets))
    T, B, H, heads = ATTENTION[0]
    for mode in MODES:
        found.append(
            Layer("attention", "attention", mode, T, B, H, heads=heads, dtype="bfloat16", targets=(Target("torch"),))
        )
        found.append(
            Layer("attention", "attention", mode, T, B, H, heads=heads, dropout=0.1, targets=(Target("torch", 3.0),))
        )
    found += [
        Layer("blocks", "attention block", mode, T, B, H, heads=heads, dropout=p, targets=(Target("torch"),))
        for p in (0.0, 0.1)
        for mode in MODES
    ]
    for T, B, H, taps, dilation in CONVOLUTION:
        found += [
            Layer(
                "convolution",
                "causal conv",
                mode,
                T,
                B,
                H,
                taps=taps,
                dilation=dilation,
                targets=(Target("torch", 1.5), Target("limit")),
            )
            for mode in MODES
        ]
    no_more = (Target("torch", 1.0),)
    T, B, H, heads = ATTENTION[0]
    found += [
        Layer("peak memory", "attention block", "training", T, B, H, "memory", heads=heads, dropout=p, targets=no_more)
        for p in (0.0, 0.1)
    ]
    found.append(Layer("peak memory", "residual norm", "training", *NORM, "memory", dropout=0.1, targets=no_more))
    found.append(
        Layer("peak memory", "attention", "training", 16384, 1, 64, "memory", dropout=0.1, targets=no_more)
    )  # one head
    found.append(
        Layer("peak memory", "causal conv", "training", 512, 8, 256, "memory", taps=3, dilation=4, targets=no_more)
    )
    return found


# ---------------------------------------------------------------- modules: x -> (outputs, nothing)


class Attention(nn.Module):
    """x [3, B, heads, T, D]"""

    def __init__(self, case: Layer, ours: bool) -> None:
        super().__init__()
        self.p, self.ours = case.dropout, ours

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = x.unbind(0)
        if not self.ours:
            return F.scaled_dot_product_attention(q, k, v, dropout_p=self.p, is_causal=True)
        import gradkernels as gk

        return gk.ops.attention(q, k, v, causal=True, dropout_p=self.p)


class Norm(nn.Module):
    """x [2, B, T, H]: what is dropped out, and the residual; or x [1, B, T, H] of a LayerNorm alone."""

    def __init__(self, case: Layer, ours: bool) -> None:
        super().__init__()
        self.p, self.ours = case.dropout, ours
        self.weight, self.bias = nn.Parameter(torch.randn(case.H)), nn.Parameter(torch.randn(case.H))

    def forward(self, x: Tensor) -> Tensor:
        residual = x[1] if x.shape[0] > 1 else None
        if self.ours:
            import gradkernels as gk

            return gk.ops.residual_norm(x[0], residual, self.weight, self.bias, dropout_p=self.p, prenorm=False)
        total = x[0] if residual is None else residual + F.dropout(x[0], self.p) if self.p else residual + x[0]
        return F.layer_norm(total, (x.shape[-1],), self.weight, self.bias)


class Convolution(nn.Module):
    """x [B, T, H]; torch's convolution wants channels first, and is given an x that lies so in memory."""

    def __init__(self, case: Layer, ours: bool) -> None:
        super().__init__()
        self.dilation, self.ours, self.past = case.dilation, ours, (case.taps - 1) * case.dilation
        self.weight = nn.Parameter(torch.randn(case.H, case.H, case.taps) / (case.H * case.taps) ** 0.5)
        self.bias = nn.Parameter(torch.randn(case.H))

    def forward(self, x: Tensor) -> Tensor:
        if self.ours:
            import gradkernels as gk

            return gk.ops.causal_conv1d(x, self.weight, self.bias, dilation=self.dilation)
        x = F.pad(x.transpose(1, 2), (self.past, 0))
        return F.conv1d(x, self.weight, self.bias, dilation=self.dilation).transpose(1, 2)


class Block(nn.Module):
    """x + dropout(attention(norm(x))), as people write it with torch's layers; parameters have the names of ours."""

    def __init__(self, case: Layer) -> None:
        super().__init__()
        self.p = case.dropout
        self.weight, self.bias = nn.Parameter(torch.randn(case.H)), nn.Parameter(torch.randn(case.H))
        self.sublayer = nn.MultiheadAttention(case.H, case.heads, batch_first=True)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(case.T), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        n = F.layer_norm(x, (x.shape[-1],), self.weight, self.bias)
        y, _ = self.sublayer(n, n, n, need_weights=False, attn_mask=self.mask, is_causal=True)
        return x + F.dropout(y, self.p)


def block(case: Layer, ours: bool) -> nn.Module:
    """The sublayer with torch's layers, or ours with those weights."""
    torch.manual_seed(0)
    module = Block(case)
    if not ours:
        return module
    import gradkernels as gk

    made = gk.nn.AttentionBlock(case.H, case.heads, dropout=case.dropout, norm="pre", causal=True)
    made.load_state_dict(module.state_dict())
    return made


def build(case: Layer, key: str, dtype: torch.dtype | None = None):
    """One provider of a row; both hold the same weights and see the same input."""
    if case.device != "cpu":
        from bench.gpu import layer_peers

        return layer_peers.build(case, key, dtype)
    from bench.providers import Provider

    torch.manual_seed(0)
    ours = key == "ours"
    T, B, H = case.T, case.B, case.H
    draw = lambda *shape: torch.randn(*shape, generator=torch.Generator().manual_seed(2))
    if case.cell == "attention":
        module: nn.Module = Attention(case, ours)
        x = draw(3, B, T, case.heads, H // case.heads).transpose(2, 3)
    elif case.cell == "causal conv":
        module, x = Convolution(case, ours), draw(B, T, H)
        if not ours:  # channels first in memory
            x = x.transpose(1, 2).contiguous().transpose(1, 2)
    elif case.cell == "attention block":
        module, x = block(case, ours), draw(B, T, H)
    else:
        module = Norm(case, ours)
        x = draw(2 if case.cell == "residual norm" else 1, B, T, H)
    rounded = getattr(torch, case.dtype)
    module.to(rounded).to(dtype or rounded)
    call: Callable[[Tensor], tuple[Tensor, tuple[()]]] = lambda x: (module(x), ())
    return Provider(key, module, call, x.to(rounded).to(dtype or rounded), case)
