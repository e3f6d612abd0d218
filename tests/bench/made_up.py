"""Measurements made up, so that what follows from them is known."""

from bench import report as reports
from bench.measure import Spread

LIMITS = {
    "float32": {"gflops": 400.0, "by": "oneDNN linear", "all": {"torch.mm (MKL)": 200.0, "oneDNN linear": 400.0}},
    "bfloat16": {"gflops": 800.0, "by": "torch.mm (torch)", "all": {"torch.mm (torch)": 800.0}},
    "copy": {"gbs": 50.0, "by": "copy_ of 256 MiB"},
    "waited": 0.0,
}
MACHINE = {
    "device": "cpu",
    "cpu": "Example(R) CPU @ 2.00GHz",
    "cpu_family": "family 6 model 1",
    "has": ["bf16", "avx512"],
    "cores": 2,
    "threads": 2,
    "system": "Linux 6",
    "versions": {"python": "3.11", "torch": "2.13", "gradkernels": "0.1", "mkl": "2024.2", "onednn": "3.12"},
    "capability": "AVX512",
    "backends": {"reference": "ready"},
    "commit": "0123456789abcdef",
    "dirty": True,
    "date": "2026-01-02T03:04:05Z",
}


def around(value):
    return Spread(value, value * 0.9, value * 0.95, value * 1.1, 9)


def invent(todo, **factor):
    """Rows where ours takes 10 and every other provider 10 times its factor (2 where none is given)."""
    rows = []
    for case in todo:
        row = reports.blank(case)
        reports.fill(
            row, {k: around(10.0 * (1 if k == case.providers[0] else factor.get(k, 2.0))) for k in case.providers}
        )
        row.update(rounds=9, dropped=1, algorithm="oneDNN's fused layer, 1 call")
        reports.judge(row, case, LIMITS, MACHINE["has"])
        rows.append(row)
    return rows


# ---------------------------------------------------------------- a GPU that nobody has, with times that nobody measured


def part(what, found, **key):
    return {"key": {"what": what, **key}, "found": found, "error": None}


MICRO = {
    "machine": {"name": "Example GPU", "multiprocessors": 132, "max_cluster": 16, "shared_bytes": 232448},
    "records": [
        part("clusters at a time", {"clusters": {"8": {"small": 16, "whole multiprocessors": 15}}}),
        part("launch", {"us": 2.0, "host_us": 3.0, "graph_us": 1.0}),
        part("clock under load", {"mhz": 1000.0}),  # a cycle is a nanosecond
        part("cluster barrier", {"us": 0.25}, C=8, blocks=8, threads=256),
        part("all-gather", {"us": 0.5}, C=8, blocks=8, threads=256, bytes=256),
        part("all-gather", {"us": 0.4}, C=16, blocks=16, threads=256, bytes=100),
        part("all-gather", {"us": 0.6}, C=16, blocks=16, threads=256, bytes=300),
        part(
            "all-gather", {"us": 9.9}, C=16, blocks=112, threads=256, bytes=300
        ),  # all clusters at once: another thing
        {"key": {"what": "all-gather", "C": 16, "bytes": 4096}, "found": {}, "error": "Wrong: 3 of 4096 threads"},
        part("grid barrier", {"us": 1.0}, blocks=32, threads=256),
        part("grid barrier", {"us": 1.5}, blocks=132, threads=256),
        part("words through L2", {"us": 1.0}, blocks=32, threads=256, bytes=16, sources=32),
        part("words through L2", {"us": 1.25}, blocks=128, threads=256, bytes=16, sources=128),
        part("words through L2", {"us": 5.0}, blocks=128, threads=256, bytes=256, sources=128),
        part("exchange through L2", {"us": 2.0}, blocks=128, threads=256, bytes=512, sources=128),
        part("products", {"us": 0.4, "gflops": 1.0}, number="bf16", threads=256, products=32, blocks=132),
        part("products", {"us": 0.64, "gflops": 1.0}, number="bf16", threads=32, products=16, blocks=1),
        part("weights from L2", {"us": 4.096, "gbs": 2112.0}, threads=256, bytes=65536, blocks=132),
        part("copy by torch", {"us": 1.0, "gbs": 3000.0}),
        part("product of large matrices by torch", {"us": 1.0, "gflops": 600000.0}, number="bf16"),
        part("product of large matrices by torch", {"us": 1.0, "gflops": 600000.0}, number="fp16"),
        part("product of large matrices by torch", {"us": 1.0, "gflops": 300000.0}, number="tf32"),
        part("product of large matrices by torch", {"us": 1.0, "gflops": 50000.0}, number="fp32"),
    ],
}
GPU = {
    **MACHINE,
    "device": "cuda",
    "gpu": {
        "name": "Example(R) GPU 9000",
        "capability": "9.0",
        "multiprocessors": 132,
        "memory_mib": 100000,
        "l2_mib": 50.0,
        "smi": {"clocks.max.sm": "2000 MHz"},
    },
    "versions": {**MACHINE["versions"], "cudnn": "9.20.0", "triton": "3.6.0", "nvrtc": "13.0", "driver": "600.1"},
}


def invent_gpu(todo, limits, **factor):
    """Rows of a GPU: ours takes 2 microseconds a step in inference and 5 in training, others their factor (2) times that."""
    rows = []
    for case in todo:
        row = reports.blank(case)
        ours = case.T * (5e-3 if case.mode == "training" else 2e-3)
        reports.fill(
            row, {k: around(ours * (1 if k == case.providers[0] else factor.get(k, 2.0))) for k in case.providers}
        )
        row.update(rounds=9, dropped=0, algorithm="cuDNN 9.20.0, STANDARD", backend="cuda", plan="forward: made up")
        reports.judge(row, case, limits, [], MICRO)
        rows.append(row)
    return rows
