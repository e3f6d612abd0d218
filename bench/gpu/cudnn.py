"""Which of cuDNN's algorithms torch asks for: the rule of `get_algo` in torch's aten/src/ATen/native/cudnn/RNN.cpp.

Nothing reports what ran, so a row names what the rule says, and the version of cuDNN.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from bench.cases import Case

BF16_SINCE = 91300  # cuDNN whose bf16 layers torch uses; with an older one torch runs a loop of its own


@dataclass(frozen=True)
class Device:
    capability: tuple[int, int]
    multiprocessors: int
    version: int | None  # of cuDNN; None: there is none


def here() -> Device:
    """The current GPU."""
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    return Device(
        (properties.major, properties.minor), properties.multi_processor_count, torch.backends.cudnn.version()
    )


def small(cell: str, H: int, backward: bool) -> bool:
    """Whether the whole matrix fits one multiprocessor, by torch's rule."""
    if cell in ("lstm", "gru"):
        return H <= (128 if backward else 192)
    return H <= (256 if backward else 384)


def persistent(case: Case, device: Device) -> bool:
    """Whether the weights may stay on the chip of many multiprocessors: fp16, one layer, one direction, round sizes, no GRU."""
    if case.dtype != "float16" or case.layers > 1 or case.bidirectional or case.H > 1024 or case.H % 128:
        return False
    major, minor = device.capability
    if major < 8 or device.multiprocessors < 98 or minor == 6 or case.cell == "gru":
        return False
    return case.B % 8 == 0 and case.B <= 128 and (case.cell == "lstm" or case.B < 96 or case.H < 896)


def one_way(case: Case, device: Device, backward: bool) -> str:
    if case.proj_size or case.layout != "padded":
        return "STANDARD"
    if case.dtype != "float64" and small(case.cell, case.H, backward):
        return "PERSIST_STATIC_SMALL_H"
    return "PERSIST_STATIC" if persistent(case, device) else "STANDARD"


def algorithm(case: Case, device: Device) -> str:
    """'cuDNN 9.20.0, PERSIST_STATIC', and for training both ways where they differ."""
    if device.version is None:
        return "no cuDNN: torch's own loop over steps"
    version = f"cuDNN {device.version // 10000}.{device.version // 100 % 100}.{device.version % 100}"
    if case.dtype == "bfloat16" and device.version < BF16_SINCE:
        return f"{version} is too old for bf16: torch's own loop over steps"
    ways = [one_way(case, device, backward) for backward in (False, True)[: 1 + (case.mode == "training")]]
    return f"{version}, {' forward and '.join(dict.fromkeys(ways))}{' backward' * (len(set(ways)) > 1)}"
