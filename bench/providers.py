"""Who runs a case: ours, torch's layer, torch's cell, the Python loop that users write where torch has no layer.

Every provider of a case holds the same weights and sees the same input; what a call costs is what a user's call costs. Between two
training calls the weights count as changed, as an optimizer changes them: nothing prepared from them may be kept.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence
from torch.utils._python_dispatch import TorchDispatchMode

from bench.cases import Case
from bench.cell_rows import CellRow
from bench.cell_rows import build as build_cell
from bench.layers import Layer
from bench.layers import build as build_layer

LABELS = {
    "ours": "gradkernels",
    "ours_fp32": "gradkernels, fp32",
    "ours_padded": "gradkernels, padded",
    "ours_unwatched": "gradkernels, no probe",
    "ours_cell": "gradkernels cell",
    "ours_plain": "gradkernels, plain cell",
    "ours_whole": "gradkernels, all kept",
    "ours_cold": "gradkernels, nothing compiled yet",
    "torch": "torch",
    "torch_fp16": "torch, fp16",
    "cell": "torch cell",
    "loop": "Python loop",
    "compiled": "Python loop, step compiled",
    "flashrnn": "FlashRNN",
    "torchrl": "TorchRL",
    "xma": "XMA",
    "best": "SDPA, the fastest backend",
    "sdpa_flash": "SDPA, flash",
    "sdpa_cudnn": "SDPA, cuDNN",
    "sdpa_efficient": "SDPA, efficient",
    "sdpa_math": "SDPA, math",
    "torch_compile": "torch.compile",
    "flex": "FlexAttention",
    "flash_attn": "flash-attn",
    "liger": "Liger",
}
PEERS = ("flashrnn", "torchrl", "xma")  # other packages' kernels, where they are installed
OTHER = {"ours_fp32": torch.float32, "torch_fp16": torch.float16}  # than the case's dtype
TORCH = {"lstm": nn.LSTM, "gru": nn.GRU, "gru_reset_before": nn.GRU}


def label(key: str) -> str:
    """What a provider is called. 'ours:exchange=grid,C=1' is ours, but for what gpu/picks.py makes of the rest."""
    return f"gradkernels, {key.partition(':')[2].replace(',', ', ')}" if ":" in key else LABELS[key]


class Loop(nn.Module):
    """The Python loop over steps that users write; the input projection of all steps is one product."""

    def __init__(self, layer: nn.RNNBase, cell: str, compiled: bool = False) -> None:
        super().__init__()
        step = {"gru_reset_before": self.reset_before, "rnn_sigmoid": self.sigmoid, "lstm": self.lstm}[cell]
        self.states = 2 if cell == "lstm" else 1
        self.step = torch.compile(step, dynamic=False) if compiled else step
        for name, p in layer.named_parameters():
            setattr(self, name, nn.Parameter(p.detach().clone()))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # x [T, B, I]
        state = (x.new_zeros(x.shape[1], self.weight_hh_l0.shape[1]),) * self.states
        outputs = []
        for gates in F.linear(x, self.weight_ih_l0, self.bias_ih_l0):
            state = self.step(gates, *state)
            outputs.append(state[0])
        final = tuple(s.unsqueeze(0) for s in state)
        return torch.stack(outputs), final if self.states > 1 else final[0]

    def lstm(self, gates: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, ...]:
        i, f, g, o = (gates + F.linear(h, self.weight_hh_l0, self.bias_hh_l0)).chunk(4, 1)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        return torch.sigmoid(o) * torch.tanh(c), c

    def sigmoid(self, gates: Tensor, h: Tensor) -> tuple[Tensor, ...]:
        return (torch.sigmoid(gates + F.linear(h, self.weight_hh_l0, self.bias_hh_l0)),)

    def reset_before(self, gates: Tensor, h: Tensor) -> tuple[Tensor, ...]:
        H = h.shape[1]
        w, b = self.weight_hh_l0, self.bias_hh_l0
        r, z = torch.sigmoid(gates[:, : 2 * H] + F.linear(h, w[: 2 * H], b[: 2 * H])).chunk(2, 1)
        n = torch.tanh(gates[:, 2 * H :] + F.linear(r * h, w[2 * H :], b[2 * H :]))
        return (n + z * (h - n),)


class Provider:
    """A module with its input, ready to be called.

    call(x) -> (outputs, final states): `x` is [T, B, I], or the data [N, I] of a packed batch; training wants its gradient.
    """

    def __init__(
        self, key: str, module: nn.Module, call: Callable[[Tensor], tuple[Tensor, Any]], x: Tensor, case: Case
    ) -> None:
        self.key, self.module, self.call, self.mode, self.case = key, module, call, case.mode, case
        self.dtype = getattr(torch, case.dtype)  # the outputs' gradient is rounded to it, for the truth in fp64 too
        self.label = label(key)
        self.x = x.detach().clone().requires_grad_(self.mode == "training")
        self.parameters = {name: p for name, p in module.named_parameters() if p.numel()}
        self.nothing = [p.detach()[:0] for p in self.parameters.values()]
        self.dy: Tensor | None = None

    def run(self) -> None:
        """What is timed."""
        if self.mode != "training":
            with torch.no_grad():
                self.call(self.x)
            return
        self.x.grad = None
        for p in self.parameters.values():
            p.grad = None
        if self.nothing:
            torch._foreach_zero_(self.nothing)  # raises the version of every weight and touches none
        y = self.call(self.x)[0]
        if self.dy is None:
            self.dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(self.dtype).to(y)
        y.backward(self.dy)

    def results(self) -> dict[str, Tensor]:
        """Outputs, final states and, when training, every gradient, by name."""
        with torch.set_grad_enabled(self.mode == "training"):
            y, final = self.call(self.x)
        found = {"outputs": y.detach()}
        for k, s in enumerate(final if isinstance(final, tuple) else (final,)):
            found[f"final state {k}"] = s.detach().reshape(-1, s.shape[-1])
        if self.mode == "training":
            self.run()
            found["gradient of x"] = self.x.grad
            found.update({f"gradient of {name}": p.grad for name, p in self.parameters.items()})
        return found

    def algorithm(self) -> str:
        """What torch runs: cuDNN and which of its algorithms, the fused oneDNN layer, or how many operations of its own."""
        if self.case.device != "cpu" and self.key.startswith("torch"):
            from bench.gpu import cudnn

            return cudnn.algorithm(self.case, cudnn.here())
        with Count() as count:
            self.run()
        fused = count.by_name.get("mkldnn_rnn_layer", 0)
        if fused:
            return f"oneDNN's fused layer, {fused} call{'s' * (fused > 1)}"
        return f"{sum(count.by_name.values())} torch operations a call"


class Count(TorchDispatchMode):
    """Counts operations by name, views left out."""

    def __init__(self) -> None:
        super().__init__()
        self.by_name: dict[str, int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not func.is_view:
            name = func._schema.name.split("::")[1]
            self.by_name[name] = self.by_name.get(name, 0) + 1
        return func(*args, **(kwargs or {}))


def layer(case: Case) -> nn.RNNBase:
    """torch's layer of the case's shape, in fp32, always with the same weights; for cells torch lacks, one with such parameters."""
    torch.manual_seed(0)
    more = {"proj_size": case.proj_size} if case.proj_size else {}
    return TORCH.get(case.cell, nn.RNN)(
        case.H, case.H, num_layers=case.layers, bidirectional=case.bidirectional, **more
    )


def ours(case: Case, weights: nn.Module) -> nn.Module:
    """Our layer with those weights."""
    import gradkernels as gk

    like: dict[str, Any] = {"num_layers": case.layers, "bidirectional": case.bidirectional, "backend": case.backend}
    if case.proj_size:
        like["proj_size"] = case.proj_size
    if case.cell == "lstm":
        module: nn.Module = gk.nn.LSTM(case.H, case.H, **like)
    elif case.cell.startswith("gru"):
        module = gk.nn.GRU(case.H, case.H, reset_after=case.cell == "gru", **like)
    else:
        module = gk.nn.RNN(case.H, case.H, nonlinearity=case.cell.removeprefix("rnn_"), **like)
    module.load_state_dict(weights.state_dict())
    return module


def build(case: Case, key: str, dtype: torch.dtype | None = None) -> Provider:
    """One provider of a case. dtype: another than the case's, for the truth that both are compared with."""
    if isinstance(case, Layer):
        return build_layer(case, key, dtype)
    if isinstance(case, CellRow):
        return build_cell(case, key, dtype)
    if key in OTHER:
        dtype = dtype or OTHER[key]
    dtype = dtype or getattr(torch, case.dtype)
    if key in PEERS:
        from bench.gpu import peers

        return peers.build(case, key, dtype)
    if ":" in key:
        from bench.gpu import picks

        return picks.build(case, key, dtype)
    torch_layer = layer(case)
    x = torch.randn(case.T, case.B, case.H, generator=torch.Generator().manual_seed(2))
    if case.mode == "step":
        return step(case, key, torch_layer, x, dtype)
    if key in ("loop", "compiled"):
        module: nn.Module = Loop(torch_layer, case.cell, key == "compiled")
    else:
        module = ours(case, torch_layer) if key.startswith("ours") else torch_layer
    rounded = getattr(torch, case.dtype)
    module, x = module.to(rounded).to(dtype).to(case.device), x.to(rounded).to(dtype).to(case.device)
    if key == "ours" and "ours_unwatched" in case.providers:
        states = 2 if case.cell == "lstm" else 1
        zeros = torch.zeros(case.T, states + 1, dtype=torch.float64, device=case.device)
        module.probes = [zeros.requires_grad_()]
    call: Callable[[Tensor], tuple[Tensor, Any]] = module
    lengths = case.lengths()
    if case.layout != "padded" and key != "ours_padded":
        sizes = torch.tensor(lengths)
        if case.layout == "packed":
            packed = pack_padded_sequence(x, sizes, enforce_sorted=False)
            x = packed.data

            def call(data):
                y, final = module(PackedSequence(data, *packed[1:]))
                return y.data, final
        elif key.startswith("ours"):
            there = sizes.to(case.device)

            def call(padded):
                return module(padded, lengths=there)
        else:

            def call(padded):  # what torch's users do with a padded batch
                y, final = module(pack_padded_sequence(padded, sizes, enforce_sorted=False))
                return pad_packed_sequence(y, total_length=case.T)[0], final

    return Provider(key, module, call, x, case)


def step(case: Case, key: str, torch_layer: nn.RNNBase, x: Tensor, dtype: torch.dtype) -> Provider:
    """One step with the states passed in, by a layer or by a cell."""
    states = tuple(
        torch.randn(case.B, case.H, generator=torch.Generator().manual_seed(3 + k)).to(dtype) for k in range(2)
    )
    if key in ("cell", "ours_cell"):
        import gradkernels as gk

        if key == "cell":
            module: nn.Module = nn.LSTMCell(case.H, case.H)
        else:
            module = gk.nn.LSTMCell(case.H, case.H, backend=case.backend)
        module.load_state_dict({name.removesuffix("_l0"): p for name, p in torch_layer.state_dict().items()})
        module.to(dtype)

        def call(row):
            h, c = module(row, states)
            return h, (h, c)

        return Provider(key, module, call, x[0].to(dtype), case)
    module = (ours(case, torch_layer) if key == "ours" else torch_layer).to(dtype)
    hx = tuple(s.unsqueeze(0) for s in states)
    return Provider(key, module, lambda x: module(x, hx), x.to(dtype), case)
